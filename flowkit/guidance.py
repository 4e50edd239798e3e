"""Guidance: wrappers around velocities that are velocities themselves.

A sampler, BOSS, FlowOpt or a likelihood sees a guided field as just another field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from flowkit.checks import (
    check_between,
    check_cond,
    check_floating,
    check_number,
    expand_like,
)
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind

Null = float | Tensor | Mapping[str, float | Tensor]

# On a CPU a doubled batch saves the overhead of a call, and loses to two calls once activations
# leave the cache. Time of one doubled call over that of two, on one core of two, over perceptrons,
# convolutions and transformers: 0.65-0.85 for one sample (but 1.2-1.4 for one image of 8x8 in a
# convolution), 0.65-0.95 up to 64 rows of small states, near 1 at 256 rows of points or 8-16
# thousand numbers of images, 1.0-1.6 beyond. On accelerators the batch is always doubled.
# A guided call adds 12 to 14 us to the doubled one (copies, halves, their combination): with an MLP
# of width 64 and labels it takes 0.61 of two calls at batch 8 and 0.72 at batch 64, where the
# doubled call alone is 0.51 and 0.64. Outside of a solve it prepares its condition: 0.77 and 0.84.
DOUBLED_ROWS, DOUBLED_NUMBERS = 256, 8192


def combine(v: Tensor, v_null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of two velocities, ``v_null + scale (v − v_null)``.

    ``scale = 1`` returns ``v`` and ``scale = 0`` returns ``v_null``, both exactly. Source: Ho &
    Salimans, *Classifier-Free Diffusion Guidance*, 2022 (arXiv 2207.12598), equation 6, with
    ``scale = 1 + w``.

    Args:
        v: The conditional velocity ``(B, *)``.
        v_null: The unconditional one, or a weaker model's.
        scale: A number γ, or a tensor of the velocities' type that broadcasts to them.

    >>> combine(torch.tensor([2.0]), torch.tensor([0.5]), 3.0)
    tensor([5.])
    """
    return torch.lerp(v_null, v, scale)


def replace_cond(cond: Cond, null: Null, where: Tensor | None = None) -> Cond:
    """Return ``cond`` with the null condition in place, for all samples or ``where (B,)`` is true.

    Args:
        cond: A tensor ``(B, *)`` or a mapping of them.
        null: A number or a tensor of a sample's shape; for a mapping, a mapping of those for the
            conditions to replace (the others stay).
        where: Boolean ``(B,)``; None means everywhere.

    Raises:
        TypeError: If only one of ``cond`` and ``null`` is a mapping, or ``cond`` is None or no
            condition.
        ValueError: If ``null`` names a condition that ``cond`` has not.

    >>> replace_cond(torch.tensor([3, 4]), 10, where=torch.tensor([True, False]))
    tensor([10,  4])
    """
    if cond is None:
        raise TypeError(
            "cond must be given to replace it by the null condition, got None; guidance needs "
            "labels or another condition to guide to"
        )
    check_cond(cond)
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
    if isinstance(null, int | float):
        value = torch.full_like(cond, null)
    else:
        value = torch.as_tensor(null, dtype=cond.dtype, device=cond.device).expand(cond.shape)
    return value if where is None else torch.where(expand_like(where, cond), value, cond)


def is_null(cond: Cond, null: Null) -> Tensor:
    """Return which samples ``(B,)`` have the null condition, in all that it names.

    >>> is_null(torch.tensor([3, 10]), 10)
    tensor([False,  True])
    """
    hidden = replace_cond(cond, null)
    if isinstance(cond, Mapping) and isinstance(hidden, Mapping):
        return torch.stack([_equal(cond[name], hidden[name]) for name in cond]).all(0)
    return _equal(cast(Tensor, cond), cast(Tensor, hidden))


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b).reshape(len(a), -1).all(1)


def _check_null(null: object) -> None:
    """Require a number, a tensor or a mapping."""
    if null is None or isinstance(null, str):
        raise TypeError(
            f"null must be the null condition (a number, tensor or mapping), got {null!r}"
        )


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

    def __init__(self, prob: float, null: Null) -> None:
        super().__init__()
        check_between(prob, 0, 1, "prob")
        _check_null(null)
        self.prob, self.null = prob, null

    def forward(self, cond: Cond, generator: torch.Generator | None = None) -> Cond:
        """Return the condition with some samples' replaced; None stays None."""
        check_cond(cond)
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

    Both rows of a small batch go through the network in one call, which saves up to a third of the
    time; large ones on a CPU take two calls, which are as fast or faster there. The exception is
    one small image in a network of convolutions: 1.2 to 1.4 times the time of two calls.

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

    def __post_init__(self) -> None:
        if isinstance(self.velocity, BoundVelocity) and self.velocity.prepared:
            raise TypeError(
                "velocity must not be bound to a condition, got a bound one; guide it, then bind it"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"interval must be increasing times within [0, 1], got {tuple(self.interval)}"
            )
        check_number(self.scale, "scale")
        _check_null(self.null)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Guided velocity ``(B, *)``; ``cond`` must be given."""
        check_floating(x, "x")
        return self.bind(cond)(x, t)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Guided":
        """Prepare for one solve, counting network rows."""
        return _Guided(self, cond, grid)


class _Pair:
    """Two bound velocities that take their steps together."""

    def __init__(self, first: BoundVelocity, second: BoundVelocity) -> None:
        self.fields = first, second
        self.distinct = (first,) if first is second else (first, second)

    @property
    def rows(self) -> int:
        return sum(field.rows for field in self.distinct)

    @property
    def edges(self) -> list[float]:
        return sorted({edge for field in self.distinct for edge in field.edges})

    def begin_step(self, t_left: float, t_right: float) -> None:
        for field in self.distinct:
            field.begin_step(t_left, t_right)

    @property
    def has_means(self) -> bool:
        """Means combine with means only."""
        return all(field.has_means for field in self.distinct)

    def average_steps(self, on: bool) -> None:
        for field in self.distinct:
            field.average_steps(on)


class _Guided(_Pair):
    """`ClassifierFree` during one solve.

    A velocity that offers ``bind`` (it caches something for a condition) is bound once for each
    condition and called twice. Any other velocity is called once on the doubled batch where one
    call is faster than two.
    """

    def __init__(self, guidance: ClassifierFree, cond: Cond, grid: Tensor | None) -> None:
        self.guidance, self.cond, self.null = guidance, cond, replace_cond(cond, guidance.null)
        field = bind(guidance.velocity, cond, grid)
        self.separate = field.prepared
        super().__init__(
            field, bind(guidance.velocity, self.null, grid) if self.separate else field
        )
        self.both: Cond = None  # of the doubled batch, from its first call
        low, high = guidance.interval
        self.scale, self.limited = guidance.scale, low > 0 or high < 1
        self.always = not self.limited and self.scale not in (0, 1)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        scale = self.scale
        if self.always:
            v, v_null = self._evaluate(x, t)
            return combine(v, v_null, scale)
        field, null_field = self.fields
        if scale == 1:
            return field(x, t, self.cond)
        if self.limited:
            low, high = self.guidance.interval
            inside = (t >= low) & (t <= high)
            if not bool(inside.any()):
                return field(x, t, self.cond)
            if not bool(inside.all()):  # each sample has a time of its own
                v, v_null = self._evaluate(x, t)
                return torch.where(expand_like(inside, x), combine(v, v_null, scale), v)
        if scale == 0:
            return null_field(x, t, self.null)
        v, v_null = self._evaluate(x, t)
        return combine(v, v_null, scale)

    def _evaluate(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional velocity."""
        field, null_field = self.fields
        rows, numbers = len(x), x.numel()
        if self.separate or ((rows > DOUBLED_ROWS or numbers > DOUBLED_NUMBERS) and x.is_cpu):
            # a copy, since a velocity may reuse its output buffer
            return field(x, t, self.cond).clone(), null_field(x, t, self.null)
        # Beside a small network every operation shows. A copy into a buffer of the solve takes
        # longer than `cat`, and a call of the bound velocity longer than one of its own.
        if self.both is None:
            self.both = _concatenate(self.cond, self.null)
        field.count(1, 2 * rows)
        v, v_null = field.velocity(torch.cat((x, x)), torch.cat((t, t)), self.both).unsafe_chunk(2)
        return v, v_null


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

    def __post_init__(self) -> None:
        check_number(self.scale, "scale")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Guided velocity ``(B, *)``."""
        check_floating(x, "x")
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Autoguided":
        """Prepare for one solve, counting the network rows of both."""
        return _Autoguided(self, cond, grid)


class _Autoguided(_Pair):
    """`Autoguidance` during one solve."""

    def __init__(self, guidance: Autoguidance, cond: Cond, grid: Tensor | None) -> None:
        self.scale = guidance.scale
        super().__init__(*(bind(f, cond, grid) for f in (guidance.velocity, guidance.weak)))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        field, weak = self.fields
        v = field(x, t, cond)
        if self.scale == 1:
            return v
        # a copy, since the two fields may share an output buffer
        v = v.clone()
        return combine(v, weak(x, t, cond), self.scale)


def _concatenate(a: Cond, b: Cond) -> Cond:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {name: torch.cat([a[name], b[name]]) for name in a}
    return torch.cat([a, b])  # type: ignore[list-item]  # both tensors: replace_cond keeps kinds
