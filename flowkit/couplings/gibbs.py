"""Gibbs weights: independent pairs, each with a weight ``exp(−c/ε)`` of its loss."""

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_choice, check_finite
from flowkit.couplings.debiasing import Division, Potentials, RowSoftmax, draw
from flowkit.couplings.epsilon import variance_components
from flowkit.couplings.transport import Cost, check_cost, check_ends, paired, pairwise, points
from flowkit.distributed import gathered, own
from flowkit.types import Cond, Pairs, take

Normalize = Literal["batch", "running", "class", "none"]
Debias = RowSoftmax | Division | Potentials | None


class Gibbs(nn.Module):
    """Independent pairs with weights ``w(x0, x1) = exp(−c(x0, x1)/ε) / Z``: W-CFM.

    A step computes one distance per pair and solves no assignment problem. Weighted pairs follow
    ``q = w · μ⊗ν / Z``. This is exactly the entropic optimal plan (same ``c``, same ``ε``) between
    *its own* ends ``h_x μ / Z`` and ``h_y ν / Z``, with the tilts ``h_x(x) = E_x1 w(x, x1)`` and
    ``h_y(y) = E_x0 w(x0, y)``. The plan connects ``μ`` and ``ν`` only if both tilts are constant.
    Sampling starts from the source without its tilt, so in general the samples are biased, by order
    ``1/ε``. A small ``ε`` makes paths straight and samples biased. `telemetry` measures the tilt,
    ``debias`` removes the tilt, and `flowkit.couplings.suggest_epsilon` chooses ``ε``.

    The class is a module because it has state: log Z (``"running"``) and the samples that
    ``debias`` remembers. The state changes in training mode only. The ranks of a distributed run
    share the state and need equal batch sizes.

    Args:
        epsilon: Positive, in units of the cost. With ``inf``, the pairs stay as they come with
            weights of exactly 1, whatever the other arguments are: plain flow matching, bit for
            bit.
        cost: Cost of a pair, as for `flowkit.couplings.MinibatchOT`. The paper's experiments use
            the *unsquared* ``"euclidean"`` distance. ``"inner"`` has the same plan as
            ``"sqeuclidean"``, but another tilt.
        normalize: Definition of ``Z``. ``"batch"``: the mean over the batch, so weights have mean
            1; this estimate has a bias of order ``1/B``. ``"running"``: the mean over about the
            last thousand batches, without this bias. ``"class"``: the mean over each label of the
            batch; the other choices change how often training sees a class. ``"none"``: 1.
        debias: ``None``, `RowSoftmax`, `Division` or `Potentials`.
        pool: At least 1. Above 1, the batch is a pool: ``B/pool`` pairs are drawn from the batch by
            weight, with replacement, and have no weights afterwards. So no forward pass is spent on
            pairs of small weight.

    Raises:
        TypeError: If ``debias`` is an object of another type.
        ValueError: If a number is out of its range or a name is unknown.

    Source: Calvo-Ordoñez et al., *Weighted Conditional Flow Matching*, 2025 (arXiv 2507.22270). In
    the paper, both potentials of the plan are 1. The normalizations other than ``"batch"``,
    ``debias`` and ``pool`` are additions of flowkit.

    >>> x0, x1 = torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])
    >>> Gibbs(epsilon=1.0).pair(x0, x1).log_weight.exp()
    tensor([1.4621, 0.5379])
    """

    log_z: Tensor
    num_batches: Tensor

    def __init__(
        self,
        epsilon: float,
        cost: Cost = "euclidean",
        normalize: Normalize = "batch",
        debias: Debias = None,
        pool: int = 1,
    ) -> None:
        super().__init__()
        if not epsilon > 0:
            raise ValueError(
                f"epsilon must be positive, got {epsilon}; inf gives plain flow matching"
            )
        check_cost(cost)
        check_choice(normalize, ("batch", "running", "class", "none"), "normalize")
        check_at_least(pool, 1, "pool")
        if not isinstance(debias, Debias):
            raise TypeError(
                f"debias must be None, RowSoftmax(), Division() or Potentials(), got {debias!r}"
            )
        if pool > 1 and isinstance(debias, RowSoftmax):
            raise ValueError(
                f"pool must be 1 with RowSoftmax(), got {pool}; RowSoftmax draws pairs"
            )
        self.epsilon, self.cost, self.normalize = epsilon, cost, normalize
        self.debias, self.pool = debias, pool
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        self._warned: set[str] = set()

    def _apply(self, fn: Callable, recurse: bool = True) -> "Gibbs":
        """Convert the module as torch does, but keep log Z in float32.

        A running mean does not move in half precision: one batch changes it by a thousandth.
        """
        log_z = self.log_z
        super()._apply(fn, recurse)
        if not log_z.is_meta:
            self.log_z = log_z.to(self.log_z.device)
        return self

    def extra_repr(self) -> str:
        """Return the settings as text."""
        return f"epsilon={self.epsilon}, cost={self.cost!r}, normalize={self.normalize!r}"

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Weight the pairs ``x0, x1 (B, *)``, or draw pairs by their weights.

        Returns:
            ``B`` pairs with ``log_weight (B,)``. With `RowSoftmax`, ``B`` pairs without weights;
            with ``pool`` above 1, ``B // pool`` pairs without weights.

        Raises:
            TypeError: If a sample is not of real numbers, or ``normalize="class"`` and ``cond``
                holds no labels.
            ValueError: If there is no sample, shapes differ, a cost is not finite, or all weights
                underflow.
        """
        check_ends(x0, x1)
        labels = self._labels(cond, len(x1))
        if self.epsilon == math.inf:
            return Pairs(x0, x1, cond, torch.zeros(len(x1), device=x1.device))
        a, b = points(x0.detach()), points(x1.detach())
        if isinstance(self.debias, RowSoftmax):
            log_kernel = self.log_kernel(a, b)
            self._check(log_kernel - log_kernel.max(), x0, x1)
            columns = self.debias.partners(log_kernel, labels, generator)
            return Pairs(x0, x1[columns], take(cond, columns))
        log_weight = paired(a, b, self.cost) * (-1 / self.epsilon)
        if self.debias is not None:
            log_weight += self.debias(self.log_kernel, a, b, labels)
        log_weight = self._normalized(log_weight, labels)
        self._check(log_weight, x0, x1)
        if self.pool == 1:
            return Pairs(x0, x1, cond, log_weight)
        check_at_least(len(x1), self.pool, "batch size")
        rows = draw(log_weight.softmax(0)[None], len(x1) // self.pool, generator)[0]
        return Pairs(x0[rows], x1[rows], take(cond, rows))

    def log_kernel(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return ``−c/ε (N, M)`` of float32 rows ``x0 (N, d)`` and ``x1 (M, d)``."""
        return pairwise(x0, x1, self.cost).mul_(-1 / self.epsilon)

    @torch.no_grad()
    def telemetry(self, pairs: Pairs) -> dict[str, Tensor]:
        """Measure the effect of the weights on a batch of pairs; warn once if the effect is bad.

        Returns:
            - ``ess``: effective number of pairs ``(Σw)² / (N Σw²)``, in (0, 1].
            - ``log_weight_variance``: ``Var(log w)``.
            - ``interaction``: share of the variance of the cost over all ``(x0_i, x1_j)`` that is
              not a function of ``x0`` plus a function of ``x1``. Only this share selects partners;
              the rest tilts the ends.
            - ``tilt``: relative variance of ``h_x`` and ``h_y`` (mean of both) after ``debias``,
              corrected for sampling noise.

            The first two values describe the weights of the pairs. For pairs without weights, they
            describe all ``(x0_i, x1_j)``. With ``normalize="class"``, the last two values describe
            the largest class.
        """
        x0, x1 = pairs.x0[:_ROWS], pairs.x1[:_ROWS]
        labels = self._labels(pairs.cond, len(pairs.x1))
        if labels is not None:
            labels = labels[:_ROWS]
            largest = labels == labels.mode().values
            x0, x1, labels = x0[largest], x1[largest], labels[largest]
        a, b = points(x0), points(x1)
        cost = pairwise(a, b, self.cost)
        log_weight = cost * (-1 / self.epsilon)
        of_pairs = log_weight if pairs.log_weight is None else pairs.log_weight
        weight = (of_pairs - of_pairs.max()).exp()
        x0_part, x1_part, rest = variance_components(cost)
        plan = self._plan(log_weight, a, b, labels)
        found = {
            "ess": weight.mean().square() / weight.square().mean(),
            "log_weight_variance": of_pairs.var(correction=0),
            "interaction": rest / (x0_part + x1_part + rest).clamp_min(1e-30),
            "tilt": sum(variance_components(plan / plan.mean())[:2]) / 2,
        }
        if len(a) >= 16:  # a variance of fewer samples is too uncertain for a warning
            self._warn(float(found["ess"]), float(found["interaction"]))
        return found

    def _plan(self, log_kernel: Tensor, a: Tensor, b: Tensor, labels: Tensor | None) -> Tensor:
        """Return the weights of all pairs ``(N, M)`` after ``debias``, divided by their maximum."""
        if isinstance(self.debias, RowSoftmax):
            return log_kernel.softmax(1)
        if self.debias is not None and self.epsilon < math.inf:
            f, g = self.debias.factors(self.log_kernel, a, b, labels)
            log_kernel = log_kernel + f[:, None] + g
        return (log_kernel - log_kernel.max()).exp()

    def _normalized(self, log_weight: Tensor, labels: Tensor | None) -> Tensor:
        """Subtract log Z; the order of operations keeps the digits of differences."""
        if self.normalize == "none":
            return log_weight
        everyone = gathered(log_weight) if self.training else log_weight
        if labels is not None:
            all_labels = gathered(labels) if self.training else labels
            return _class_normalized(log_weight, labels, everyone, all_labels)
        if self.normalize == "batch" or not (self.training or self.num_batches):
            normalized = everyone.log_softmax(0).add_(math.log(len(everyone)))
            return normalized if everyone is log_weight else own(normalized, len(log_weight))
        if self.training:
            self.num_batches += 1
            new = 1 / min(int(self.num_batches), _MEMORY)
            log_z = everyone.logsumexp(0) + math.log(new / len(everyone))
            if new < 1:
                log_z = torch.logaddexp(self.log_z + math.log1p(-new), log_z)
            self.log_z.copy_(log_z)
        return log_weight - self.log_z

    def _labels(self, cond: Cond, batch: int) -> Tensor | None:
        """Return the labels ``(B,)``, or ``None`` if this coupling does not use labels."""
        labels = None
        if isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point():
            labels = cond
        if self.normalize != "class":
            if labels is not None and self.epsilon < math.inf:
                self._once(
                    "labels",
                    "Gibbs weights change how often each label occurs in training; "
                    "set normalize='class'",
                )
            return None
        if labels is None:
            of = None if cond is None else type(cond).__name__
            if isinstance(cond, Tensor):
                of = f"{cond.dtype} {tuple(cond.shape)}"
            raise TypeError(
                f"cond must hold labels (B,) if normalize='class', got {of}; "
                "set normalize='batch' for other conditions and without conditions"
            )
        if len(labels) != batch:
            raise ValueError(f"cond must have length {batch}, got {len(labels)}")
        return labels

    def _check(self, log_weight: Tensor, x0: Tensor, x1: Tensor) -> None:
        """Require log weights that do not all underflow, and name the cause otherwise."""
        low, high = (v.item() for v in log_weight.aminmax())
        if math.isfinite(low) and high > _LOG_TINY:
            return
        check_finite(x0, "x0")
        check_finite(x1, "x1")
        if not bool(torch.isfinite(paired(points(x0), points(x1), self.cost)).all()):
            raise ValueError("cost must be finite, got NaN or infinite values for finite samples")
        raise ValueError(
            f"epsilon must give at least one weight above 0, got {self.epsilon}, for which the "
            f"largest weight is exp({high:.4g}); raise epsilon or set normalize='batch'"
        )

    def _warn(self, ess: float, interaction: float) -> None:
        """Warn of few effective pairs and of a cost that hardly selects partners."""
        if ess < 0.1:
            self._once(
                "ess",
                f"Gibbs weights leave {ess:.1%} of the pairs effective at epsilon "
                f"{self.epsilon:g}; raise epsilon, see flowkit.couplings.suggest_epsilon",
            )
        if interaction < 0.05 and self.epsilon < math.inf:
            self._once(
                "interaction",
                f"only {interaction:.1%} of the variance of Gibbs log weights selects partners, "
                "the rest tilts the ends; set debias=Potentials(), use latents or another cost",
            )

    def _once(self, kind: str, message: str) -> None:
        """Warn once per kind of message."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=6)


def _class_normalized(
    log_weight: Tensor, labels: Tensor, everyone: Tensor, all_labels: Tensor
) -> Tensor:
    """Subtract the log mean of each class over all ranks."""
    classes, ids = all_labels.unique(return_inverse=True)
    top = everyone.new_full((len(classes),), -math.inf).scatter_reduce(0, ids, everyone, "amax")
    total = torch.zeros_like(top).index_add(0, ids, (everyone - top[ids]).exp())
    mine = torch.searchsorted(classes, labels)
    return log_weight - top[mine] - (total / ids.bincount()).log()[mine]


_MEMORY = 1000  # number of batches in the running mean of log Z
_ROWS = 256  # largest number of samples that telemetry uses
_LOG_TINY = -87.0  # exp of a smaller number underflows in float32
