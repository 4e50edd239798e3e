"""What removes the tilt from Gibbs weights: the rungs between a plain weight and transport.

Weights ``w = exp(−c/ε)`` on independent pairs tilt both ends by ``h_x(x0) = E_x1 w`` and
``h_y(x1) = E_x0 w``. Each rung brings the pairs closer to the entropic plan between the two ends as
they are: ``RowSoftmax`` keeps the source, ``Division`` divides by both tilts once, ``Potentials``
goes on dividing until nothing is left to divide. They are parts of `flowkit.couplings.Gibbs`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least
from flowkit.distributed import gathered

LogKernel = Callable[[Tensor, Tensor], Tensor]
"""From rows ``(N, d)`` and ``(M, d)`` to ``−c/ε (N, M)``."""


@dataclass(frozen=True)
class RowSoftmax:
    """Every ``x0_i`` draws its partner in the batch, ``x1_j`` with probability ``∝ exp(−c_ij/ε)``.

    One half of a Sinkhorn round: the source is exact, since each ``x0`` occurs once; the data keep
    a tilt. Pairs come without weights, so that no forward pass is wasted on a light pair, for
    ``B²`` distances a step. With ``normalize="class"`` partners are of one class.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]])
    >>> Gibbs(epsilon=0.1, debias=RowSoftmax()).pair(x0, x1).x1.ravel()
    tensor([1., 8.])
    """

    def partners(
        self, log_kernel: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Draw the column ``(B,)`` that goes with each row of ``log_kernel (B, B)``."""
        if labels is not None:
            log_kernel = log_kernel.masked_fill(labels[:, None] != labels, -math.inf)
        return draw(log_kernel.softmax(1), 1, generator)[:, 0]


class _Memory(nn.Module):
    """Samples of both ends from recent batches, each with its log factor of the weight.

    They are state, but no buffers: buffers are averaged together with the weights, and the
    average of two samples is no sample. Checkpoints hold them; every rank has those of all.
    """

    refine: bool

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        check_at_least(size, 1, "size")
        self.size = size
        # Of source and data: sample, log factor, label (0 without labels).
        self.rows = torch.empty(2, 0, 2)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds."""
        return self.rows

    def set_extra_state(self, state: Tensor) -> None:
        """Restore it."""
        self.rows = state

    def extra_repr(self) -> str:
        """The settings."""
        return f"size={self.size}"

    def forward(
        self, log_kernel: LogKernel, x0: Tensor, x1: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the log factors ``f(x0) + g(x1) (B,)`` of a batch; remembers it in training."""
        f, g = self.factors(log_kernel, x0, x1, labels)
        if self.training:
            kept = (f, g) if self.refine else (torch.zeros_like(f), torch.zeros_like(g))
            new = self._of_all_ranks(_rows(x0, x1, *kept, labels))
            # Before the first batch there is no dimension to agree in.
            old = self.rows.to(new) if self.rows.shape[1] else new[:, :0]
            self.rows = torch.cat([old, new], 1)[:, -self.size :].clone()
        return f + g

    def factors(
        self, log_kernel: LogKernel, x0: Tensor, x1: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``f(x0), g(x1) (B,)``: minus the log means of the kernel over the other end.

        The means are over what is remembered, which leaves out the batch itself: a pair's own
        weight must not be in its divisor. Only the first batch has nothing else.
        """
        rows = self.rows.to(x0)
        if not rows.shape[1]:
            zero = x0.new_zeros(len(x0))
            rows = self._of_all_ranks(_rows(x0, x1, zero, zero, labels))
        (source, f, source_labels), (data, g, data_labels) = (
            (end[:, :-2], end[:, -2], end[:, -1]) for end in rows
        )
        of_x0 = log_kernel(x0, data).add_(g)
        of_x1 = log_kernel(source, x1).add_(f[:, None]).T
        if labels is None:
            return -_log_mean(of_x0), -_log_mean(of_x1)
        same = (labels[:, None] == ends for ends in (data_labels, source_labels))
        return -_log_mean(of_x0, next(same)), -_log_mean(of_x1, next(same))

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        return gathered(rows.transpose(0, 1)).transpose(0, 1) if self.training else rows


class Division(_Memory):
    """Weights ``w / (ĥ_x(x0) ĥ_y(x1))``, with both tilts estimated on the last ``size`` samples.

    One round of Sinkhorn from both sides at once, so some tilt is left: between ``N(0, 1)`` and
    ``N(2, ¼)`` at ``ε = 4`` (squared cost) samples have mean 1.89, where plain weights give 1.49.
    A step costs ``2 B size`` distances. With ``normalize="class"`` tilts are those of each class.

    Args:
        size: How many samples of either end are remembered.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.zeros(2, 1), torch.ones(2, 1)
    >>> Gibbs(epsilon=1.0, debias=Division(size=64)).pair(x0, x1).log_weight
    tensor([0., 0.])
    """

    refine = False


class Potentials(_Memory):
    """Weights ``exp(f(x0) + g(x1) − c/ε)`` with running Sinkhorn potentials ``f, g``.

    ``f(x) = −log E_y exp(g(y) − c(x, y)/ε)`` and ``g`` likewise, where the expectations are over
    the last ``size`` samples and their potentials as they were computed then: each time the memory
    has turned over, another round of Sinkhorn has been done. In the limit neither end is
    tilted, and the pairs are the entropic plan between source and data, for ``2 B size`` distances
    a step. Source: Mensch and Peyré, *Online Sinkhorn: Optimal Transport Distances from Sample
    Streams*, 2020 (arXiv 2003.01415), which keeps every sample, with decaying weights.

    Args:
        size: How many samples of either end are remembered; several batches.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.zeros(2, 1), torch.ones(2, 1)
    >>> Gibbs(epsilon=1.0, debias=Potentials(size=64)).pair(x0, x1).log_weight
    tensor([0., 0.])
    """

    refine = True


def draw(weight: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``count`` places with replacement from each row, on the generator's device."""
    device = weight.device
    if generator is not None:
        weight = weight.to(generator.device)
    return weight.multinomial(count, replacement=True, generator=generator).to(device)


def _rows(x0: Tensor, x1: Tensor, f: Tensor, g: Tensor, labels: Tensor | None) -> Tensor:
    """Stack both ends as rows ``(2, B, d + 2)``."""
    label = f.new_zeros(len(f)) if labels is None else labels.to(f)
    columns = torch.stack([f, label], 1), torch.stack([g, label], 1)
    return torch.stack([torch.cat([x, y], 1) for x, y in zip((x0, x1), columns, strict=True)])


def _log_mean(log_terms: Tensor, counts: Tensor | None = None) -> Tensor:
    """Log of the row means of ``exp(log_terms)``, over those that count; 0 where none does."""
    if counts is None:
        return log_terms.logsumexp(1) - math.log(log_terms.shape[1])
    number = counts.sum(1)
    mean = log_terms.masked_fill(~counts, -math.inf).logsumexp(1) - number.log()
    return torch.where(number > 0, mean, 0.0)
