"""Guidance: wrappers around velocities that are velocities themselves.

A sampler, BOSS, FlowOpt or a likelihood sees a guided field as just another field.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkit.checks import check_between, expand_like
from flowkit.types import Cond, Velocity

Null = float | Tensor | Mapping[str, float | Tensor]

# Above this many numbers in a state, one call on a doubled batch no longer beats two calls on
# the CPU (measured; on accelerators the doubled batch wins or ties throughout).
DOUBLED_LIMIT = 65_536


def replace_cond(cond: Cond, null: Null, where: Tensor | None = None) -> Cond:
    """Return ``cond`` with the null condition in place, for all samples or ``where (B,)`` is true.

    Args:
        cond: A tensor ``(B, *)`` or a mapping of them.
        null: A number or a tensor of a sample's shape; for a mapping, a mapping of those for the
            conditions to replace (the others stay).
        where: Boolean ``(B,)``; None means everywhere.

    Raises:
        TypeError: If only one of ``cond`` and ``null`` is a mapping, or ``cond`` is None.
        ValueError: If ``null`` names a condition that ``cond`` has not.

    >>> replace_cond(torch.tensor([3, 4]), 10, where=torch.tensor([True, False]))
    tensor([10,  4])
    """
    if cond is None:
        raise TypeError("cond must be given to replace it by the null condition, got None")
    if isinstance(cond, Mapping) and isinstance(null, Mapping):
        if unknown := sorted(set(null) - set(cond)):
            raise ValueError(f"null must name conditions among {sorted(cond)}, got {unknown}")
        return {**cond, **{name: _replace(cond[name], null[name], where) for name in null}}
    if isinstance(cond, Mapping) or isinstance(null, Mapping):
        raise TypeError(
            "null must be a mapping exactly when cond is one, "
            f"got null {type(null).__name__} and cond {type(cond).__name__}"
        )
    return _replace(cond, null, where)


def _replace(cond: Tensor, null: float | Tensor, where: Tensor | None) -> Tensor:
    value = torch.as_tensor(null, dtype=cond.dtype, device=cond.device).expand(cond.shape)
    return value if where is None else torch.where(expand_like(where, cond), value, cond)


class DropCond(nn.Module):
    """Drop conditions in training, each sample's with probability ``prob``; nothing in ``eval()``.

    The training half of classifier-free guidance. Source: Ho & Salimans, *Classifier-Free
    Diffusion Guidance*, 2022 (arXiv 2207.12598), algorithm 1.

    Args:
        prob: Probability in [0, 1].
        null: The null condition, see `replace_cond`; all conditions of a mapping that it names
            are dropped together.

    >>> DropCond(prob=1.0, null=10)(torch.tensor([3, 4]))
    tensor([10, 10])
    """

    def __init__(self, prob: float, null: Null):
        super().__init__()
        check_between(prob, 0, 1, "prob")
        if null is None:
            raise TypeError(
                "null must be the null condition (a number, tensor or mapping), got None"
            )
        self.prob, self.null = prob, null

    def forward(self, cond: Cond, generator: torch.Generator | None = None) -> Cond:
        """Return the condition with some samples' replaced; None stays None."""
        if cond is None or not self.training or self.prob == 0:
            return cond
        first = next(iter(cond.values())) if isinstance(cond, Mapping) else cond
        draw = torch.rand(len(first), device=first.device, generator=generator)
        return replace_cond(cond, self.null, draw < self.prob)


@dataclass(frozen=True, eq=False)
class ClassifierFree:
    """Classifier-free guidance, ``v_null + scale (v_cond − v_null)``, for any scale.

    ``scale = 1`` is the conditional field and ``scale = 0`` the unconditional one, bit for bit
    and with one network row per sample; others need two. Outside the interval of times the field
    is the conditional one.

    Sources: Ho & Salimans, *Classifier-Free Diffusion Guidance*, 2022 (arXiv 2207.12598),
    equation 6, with ``scale = 1 + w``; Kynkäänniemi et al., *Applying Guidance in a Limited
    Interval*, 2024 (arXiv 2404.07724).

    Args:
        velocity: A field trained with dropped conditions (see `DropCond`).
        scale: Any finite number γ.
        null: The null condition it was trained with, see `replace_cond`.
        interval: Times ``(low, high)``, both included, where the guidance acts.

    >>> def field(x, t, cond):
    ...     return cond[:, None].float()
    >>> guided = ClassifierFree(field, scale=1.5, null=0)
    >>> guided(torch.zeros(1, 1), torch.zeros(1), torch.tensor([2]))
    tensor([[3.]])
    """

    velocity: Velocity
    scale: float
    null: Null
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"interval must be increasing times within [0, 1], got {tuple(self.interval)}"
            )
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"scale must be finite, got {self.scale}")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Guided velocity ``(B, *)``; ``cond`` must be given."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Guided":
        """Prepare for one solve, counting network rows."""
        return _Guided(self, cond, grid)


class _Guided:
    """`ClassifierFree` during one solve.

    A velocity that itself wants to be bound (it caches) is bound once for each condition and
    called twice; any other is called once on the doubled batch where that is faster.
    """

    def __init__(self, guidance: ClassifierFree, cond: Cond, grid: Tensor | None):
        self.scale, self.interval = guidance.scale, guidance.interval
        self.null = replace_cond(cond, guidance.null)
        bind = getattr(guidance.velocity, "bind", None)
        self.separate = bind is not None
        self.positive = bind(cond, grid) if bind else guidance.velocity
        self.negative = bind(self.null, grid) if bind else guidance.velocity
        self.rows = 0

    def begin_step(self, left: float, right: float) -> None:
        for field in (self.positive, self.negative):
            if (begin := getattr(field, "begin_step", None)) is not None:
                begin(left, right)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        low, high = self.interval
        active = (t >= low) & (t <= high)
        if self.scale == 1 or not bool(active.any()):
            self.rows += len(x)
            return self.positive(x, t, cond)
        if self.scale == 0 and bool(active.all()):
            self.rows += len(x)
            return self.negative(x, t, self.null)
        self.rows += 2 * len(x)
        if self.separate or (x.device.type == "cpu" and x.numel() > DOUBLED_LIMIT):
            v, v_null = self.positive(x, t, cond), self.negative(x, t, self.null)
        else:
            both = _concatenate(cond, self.null)
            v, v_null = self.positive(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        scale = torch.where(active, self.scale, 1.0).to(x.dtype)
        return torch.lerp(v_null, v, expand_like(scale, x))


@dataclass(frozen=True, eq=False)
class Autoguidance:
    """Guidance by a weaker version of the model itself, ``v_weak + scale (v − v_weak)``.

    Source: Karras et al., *Guiding a Diffusion Model with a Bad Version of Itself*, 2024 (arXiv
    2406.02507), equation 3. Both fields get the condition; no dropped conditions are needed.

    >>> strong, weak = (lambda x, t, cond: 2 * x), (lambda x, t, cond: x)
    >>> Autoguidance(strong, weak, scale=3.0)(torch.ones(1, 1), torch.zeros(1))
    tensor([[4.]])
    """

    velocity: Velocity
    weak: Velocity
    scale: float

    def __post_init__(self):
        if not abs(self.scale) < float("inf"):
            raise ValueError(f"scale must be finite, got {self.scale}")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Guided velocity ``(B, *)``."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Autoguided":
        """Prepare for one solve, counting the network rows of both."""
        return _Autoguided(self, cond, grid)


class _Autoguided:
    def __init__(self, guidance: Autoguidance, cond: Cond, grid: Tensor | None):
        self.scale, self.rows = guidance.scale, 0
        self.fields = []
        for field in (guidance.velocity, guidance.weak):
            bind = getattr(field, "bind", None)
            self.fields.append(bind(cond, grid) if bind else field)

    def begin_step(self, left: float, right: float) -> None:
        for field in self.fields:
            if (begin := getattr(field, "begin_step", None)) is not None:
                begin(left, right)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        self.rows += (1 if self.scale == 1 else 2) * len(x)
        v = self.fields[0](x, t, cond)
        return v if self.scale == 1 else torch.lerp(self.fields[1](x, t, cond), v, self.scale)


def _concatenate(a: Cond, b: Cond) -> Cond:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {name: torch.cat([a[name], b[name]]) for name in a}
    return torch.cat([a, b])  # type: ignore[list-item]  # both tensors: replace_cond keeps kinds
