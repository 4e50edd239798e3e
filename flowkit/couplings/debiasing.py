"""Corrections of the bias of Gibbs weights.

Weights ``w = exp(−c/ε)`` on independent pairs change the density of both ends. The density of the
source is multiplied by ``h_x(x0) = E_x1 w``, the density of the data by ``h_y(x1) = E_x0 w``. These
factors are called *tilts*. Three classes reduce them, from the cheapest to the most exact.
`RowSoftmax` keeps the source exact. `Division` divides the weights by both tilts once. `Potentials`
repeats the division until both ends are exact, so the pairs follow the entropic optimal plan. All
three are arguments of `flowkit.couplings.Gibbs`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least
from flowkit.distributed import gathered

LogKernel = Callable[[Tensor, Tensor], Tensor]
"""Function from rows ``(N, d)`` and ``(M, d)`` to ``−c/ε (N, M)``."""


@dataclass(frozen=True)
class RowSoftmax:
    """Partners from the batch: each ``x0_i`` draws ``x1_j`` with probability ``∝ exp(−c_ij/ε)``.

    This is one half of a Sinkhorn iteration. Each ``x0`` occurs exactly once, so the source has no
    tilt; the data keep a tilt. The pairs have no weights, so the network spends no forward pass on
    a pair of small weight. A step computes ``B²`` distances. With ``normalize="class"``, partners
    have the same class.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]])
    >>> Gibbs(epsilon=0.1, debias=RowSoftmax()).pair(x0, x1).x1.ravel()
    tensor([1., 8.])
    """

    def partners(
        self, log_kernel: Tensor, labels: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Draw one column ``(B,)`` for each row of ``log_kernel (B, B)``.

        Args:
            log_kernel: ``−c/ε (B, B)``.
            labels: Classes ``(B,)``; a row draws only columns of its class. ``None`` for no
                classes.
            generator: Source of random numbers.
        """
        if labels is not None:
            log_kernel = log_kernel.masked_fill(labels[:, None] != labels, -math.inf)
        return draw(log_kernel.softmax(1), 1, generator)[:, 0]


class _Memory(nn.Module):
    """Samples of both ends from recent batches, each with its log factor of the weight.

    The samples are state, but they are not buffers. Weight averaging also averages buffers, and the
    average of two samples is not a sample. Checkpoints hold the samples. Every rank holds the
    samples of all ranks.
    """

    refine: bool

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        check_at_least(size, 1, "size")
        self.size = size
        # For source and data, the columns are sample, log factor, label (0 without labels).
        self.rows = torch.empty(2, 0, 2)

    def get_extra_state(self) -> Tensor:
        """Return the remembered samples for a checkpoint."""
        return self.rows

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the remembered samples from a checkpoint."""
        self.rows = state

    def extra_repr(self) -> str:
        """Return the settings as text."""
        return f"size={self.size}"

    def forward(
        self, log_kernel: LogKernel, x0: Tensor, x1: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return the log factors ``f(x0) + g(x1) (B,)``; in training, remember the batch."""
        f, g = self.factors(log_kernel, x0, x1, labels)
        if self.training:
            kept = (f, g) if self.refine else (torch.zeros_like(f), torch.zeros_like(g))
            new = self._of_all_ranks(_rows(x0, x1, *kept, labels))
            # The empty memory before the first batch has no dimension d yet.
            old = self.rows.to(new) if self.rows.shape[1] else new[:, :0]
            self.rows = torch.cat([old, new], 1)[:, -self.size :].clone()
        return f + g

    def factors(
        self, log_kernel: LogKernel, x0: Tensor, x1: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``f(x0), g(x1) (B,)``: minus the log means of the kernel over the other end.

        The means run over the remembered samples, without the current batch: the weight of a pair
        must not enter its own divisor. The first batch is an exception, because nothing is
        remembered yet.
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
        """Join the rows ``(2, B, d + 2)`` of all ranks in training."""
        return gathered(rows.transpose(0, 1)).transpose(0, 1) if self.training else rows


class Division(_Memory):
    """Weights ``w / (ĥ_x(x0) ĥ_y(x1))``; both tilts are estimated on the last ``size`` samples.

    This is one Sinkhorn iteration for both sides at once, so a part of the tilt remains. Example:
    source ``N(0, 1)``, data ``N(2, ¼)``, ``ε = 4``, squared cost. The samples then have mean 1.89;
    plain weights give 1.49. A step computes ``2 B size`` distances. With ``normalize="class"``,
    each class has its own tilts.

    Args:
        size: Number of remembered samples of each end, at least 1.

    Raises:
        ValueError: If ``size`` is below 1.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.zeros(2, 1), torch.ones(2, 1)
    >>> Gibbs(epsilon=1.0, debias=Division(size=64)).pair(x0, x1).log_weight
    tensor([0., 0.])
    """

    refine = False


class Potentials(_Memory):
    """Weights ``exp(f(x0) + g(x1) − c/ε)`` with running Sinkhorn potentials ``f, g``.

    The potentials are ``f(x) = −log E_y exp(g(y) − c(x, y)/ε)`` and
    ``g(y) = −log E_x exp(f(x) − c(x, y)/ε)``. The expectations run over the last ``size`` samples,
    with the potentials that these samples had when they were computed. When all remembered samples
    have been replaced once, one more Sinkhorn iteration is done. In the limit, no end has a tilt:
    the pairs follow the entropic plan between source and data. A step computes ``2 B size``
    distances.

    Source: Mensch and Peyré, *Online Sinkhorn: Optimal Transport Distances from Sample Streams*,
    2020 (arXiv 2003.01415). Their method keeps every sample, with decaying weights.

    Args:
        size: Number of remembered samples of each end, at least 1; several batches are a good size.

    Raises:
        ValueError: If ``size`` is below 1.

    >>> from flowkit.couplings import Gibbs
    >>> x0, x1 = torch.zeros(2, 1), torch.ones(2, 1)
    >>> Gibbs(epsilon=1.0, debias=Potentials(size=64)).pair(x0, x1).log_weight
    tensor([0., 0.])
    """

    refine = True


def draw(weight: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``count`` column numbers with replacement from each row of weights ``(N, M)``.

    Returns:
        Integers ``(N, count)``. The drawing runs on the generator's device.
    """
    device = weight.device
    if generator is not None:
        weight = weight.to(generator.device)
    return weight.multinomial(count, replacement=True, generator=generator).to(device)


def _rows(x0: Tensor, x1: Tensor, f: Tensor, g: Tensor, labels: Tensor | None) -> Tensor:
    """Stack both ends as rows ``(2, B, d + 2)``: sample, log factor, label."""
    label = f.new_zeros(len(f)) if labels is None else labels.to(f)
    columns = torch.stack([f, label], 1), torch.stack([g, label], 1)
    return torch.stack([torch.cat([x, y], 1) for x, y in zip((x0, x1), columns, strict=True)])


def _log_mean(log_terms: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the log of the row means of ``exp(log_terms)`` over the counted entries.

    A row without a counted entry has the value 0.
    """
    if counts is None:
        return log_terms.logsumexp(1) - math.log(log_terms.shape[1])
    number = counts.sum(1)
    mean = log_terms.masked_fill(~counts, -math.inf).logsumexp(1) - number.log()
    return torch.where(number > 0, mean, 0.0)
