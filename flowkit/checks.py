"""Checks of arguments, with one wording for all errors.

Every message reads ``<argument> must <rule>, got <value>[; <fix>]``. A wrong value raises
``ValueError``, a wrong type raises ``TypeError``.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape ``t (B,)`` to ``(B, 1, ..., 1)`` so that it broadcasts against ``x (B, *)``.

    >>> expand_like(torch.zeros(3), torch.zeros(3, 2, 5)).shape
    torch.Size([3, 1, 1])
    """
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def check_times(t: Tensor, batch: int, name: str = "t") -> None:
    """Require a tensor ``t (batch,)`` of floats in [0, 1].

    Raises:
        ValueError: If the shape is wrong or a value lies outside [0, 1].
        TypeError: If ``t`` does not hold floats.
    """
    if t.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
    if t.numel():
        low, high = (v.item() for v in torch.aminmax(t))
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} must lie in [0, 1], got values in [{low}, {high}]; "
                "flowkit's time is 0 at noise, 1 at data"
            )


def check_same_shape(x0: Tensor, x1: Tensor, names: tuple[str, str] = ("x0", "x1")) -> None:
    """Require two tensors of the same shape, so that no dimension broadcasts by accident.

    Raises:
        ValueError: If the shapes differ.
    """
    if x0.shape != x1.shape:
        raise ValueError(
            f"{names[0]} must have the shape of {names[1]}, {tuple(x1.shape)}, "
            f"got {tuple(x0.shape)}"
        )


def as_grid(grid: Tensor | Sequence[float] | int, name: str = "grid") -> Tensor:
    """Convert sampling times to a 1-D float64 tensor, strictly increasing within [0, 1].

    Args:
        grid: At least 2 times, or the number ``n >= 1`` of uniform steps from 0 to 1.
        name: Name of the argument in errors.

    Returns:
        The times ``(n + 1,)`` on the CPU.

    Raises:
        TypeError: If ``grid`` is neither a whole number nor a tensor or sequence of real numbers.
        ValueError: If there are fewer than 2 times, or they do not increase strictly, or one lies
            outside [0, 1].

    >>> as_grid(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    if isinstance(grid, int) and not isinstance(grid, bool):
        check_at_least(grid, 1, name)
        return torch.linspace(0, 1, grid + 1, dtype=torch.float64)
    try:
        kind = None if isinstance(grid, float) else torch.as_tensor(grid).dtype
    except (TypeError, ValueError, RuntimeError):  # no numbers, or rows of different lengths
        kind = None
    if kind is None or kind.is_complex or kind == torch.bool:
        raise TypeError(f"{name} must be a number of steps or a tensor of times, got {grid!r}")
    times = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"{name} must be a 1-D tensor of at least 2 times, got shape {tuple(times.shape)}"
        )
    increasing = bool((times[1:] > times[:-1]).all())
    if not increasing or times[0] < 0 or times[-1] > 1:
        rule = "lie in [0, 1]" if increasing else "increase strictly"
        raise ValueError(f"{name} must {rule}, got {[round(v, 6) for v in times.tolist()]}")
    return times


def check_whole(times: Tensor) -> None:
    """Require times that start at 0 and end at 1: a whole solve from noise to data.

    Raises:
        ValueError: If the first time is not 0 or the last time is not 1.
    """
    if times[0] != 0 or times[-1] != 1:
        raise ValueError(
            f"sampler.grid must run from 0 to 1, got {times[0].item()} to {times[-1].item()}"
        )


def check_number(value: float, name: str) -> None:
    """Require a finite number.

    Raises:
        TypeError: If ``value`` is a string or None.
        ValueError: If ``value`` is NaN or infinite.
    """
    _check_number(value, name)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_number(value: object, name: str) -> None:
    """Refuse None, and a string: the command line keeps a value that is no number as a string."""
    if isinstance(value, str) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_at_least(value: float, minimum: float, name: str) -> None:
    """Require a number ``value >= minimum``.

    Raises:
        TypeError: If ``value`` is a string or None.
        ValueError: If ``value < minimum`` or ``value`` is NaN.
    """
    _check_number(value, name)
    if not (value >= minimum):
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_integer(value: int, name: str, minimum: float = -math.inf) -> None:
    """Require an integer ``value >= minimum``; 3.0 and True do not count as integers.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If ``value < minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    check_at_least(value, minimum, name)


def as_sizes(sizes: Sequence[int], name: str) -> tuple[int, ...]:
    """Return sizes, such as those of a shape, as a tuple; each must be an integer of at least 1."""
    for size in sizes:
        check_integer(size, f"each of {name}", 1)
    return tuple(int(size) for size in sizes)


def check_positive(value: float, name: str) -> None:
    """Require a finite number ``value > 0``.

    Raises:
        TypeError: If ``value`` is a string or None.
        ValueError: If ``value`` is not positive or not finite.
    """
    _check_number(value, name)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_between(value: float, low: float, high: float, name: str) -> None:
    """Require a number ``low <= value <= high``.

    Raises:
        TypeError: If ``value`` is a string or None.
        ValueError: If ``value`` lies outside ``[low, high]`` or is NaN.
    """
    _check_number(value, name)
    if not (low <= value <= high):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def check_choice(value: object, choices: Collection[str], name: str) -> None:
    """Require one of the names in ``choices``.

    Raises:
        ValueError: If ``value`` is not in ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(sorted(choices))}, got {value!r}")


def as_labels(labels: Tensor, name: str = "cond") -> Tensor:
    """Convert integer labels to int64, so that comparisons with other integers do not overflow.

    Raises:
        TypeError: If ``labels`` holds floats, complex numbers or booleans.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer labels, got {labels.dtype}")
    return labels.long()


def as_seeds(seeds: Iterable[int] | Tensor, count: int | None = None) -> list[int]:
    """Return the seeds of samples as a list.

    Raises:
        TypeError: If ``seeds`` is no sequence of integers.
        ValueError: If there are not ``count`` of them.
    """
    listed = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    try:
        found = [operator.index(seed) for seed in listed]
    except TypeError:
        raise TypeError(
            f"seeds must be a sequence of integers, one per sample, got {seeds!r}; for example "
            "range(8)"
        ) from None
    if count is not None and len(found) != count:
        raise ValueError(f"seeds must hold one seed per sample, {count}, got {len(found)}")
    return found


def check_labels(labels: Tensor, num_classes: int, name: str = "cond", fix: str = "") -> None:
    """Require integer labels in ``[0, num_classes)``.

    Args:
        labels: Labels of any shape.
        num_classes: Number of classes.
        name: Name of the argument in errors.
        fix: Advice at the end of the error message.

    Raises:
        TypeError: If ``labels`` does not hold integers.
        ValueError: If a label lies outside the range.
    """
    as_labels(labels, name)
    if labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} must hold labels in [0, {num_classes - 1}], got values in [{low}, {high}]"
                + (fix and f"; {fix}")
            )


def check_cond(cond: object, name: str = "cond") -> None:
    """Require a condition: a tensor, a mapping of tensors, or None.

    Raises:
        TypeError: If ``cond`` is of another kind.
    """
    values = cond.values() if isinstance(cond, Mapping) else [cond]
    if cond is not None and not all(isinstance(value, Tensor) for value in values):
        got = ", ".join(sorted({type(value).__name__ for value in values}))
        got = f"a mapping of {got}" if isinstance(cond, Mapping) else got
        raise TypeError(
            f"{name} must be a tensor, a mapping of tensors or None, got {got}; "
            "give a label as a tensor with one label per sample"
        )


def check_finite(x: Tensor, name: str) -> None:
    """Require a tensor without NaN and infinity.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {x.numel()} values")


def check_floating(x: Tensor, name: str) -> None:
    """Require a tensor of floats.

    Raises:
        TypeError: If ``x`` is not a tensor, or does not hold real floats.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")


def check_samples(x: Tensor, name: str, *, floating: bool = False) -> None:
    """Require samples ``(B, *)`` of real numbers, ``B >= 1``, whose values can be read.

    Args:
        x: The samples.
        name: Name of the argument in errors.
        floating: Whether the numbers must be floats.

    Raises:
        TypeError: If ``x`` is not a tensor of such numbers, or is on the meta device.
        ValueError: If ``x`` has no sample or no element.

    >>> check_samples(torch.zeros(2, 3, dtype=torch.uint8), "x1")
    """
    if floating:
        check_floating(x, name)
    if not isinstance(x, Tensor) or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
    if x.is_meta:
        raise TypeError(f"{name} must hold data, got a tensor on the meta device")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(
            f"{name} must hold at least one sample, with shape (B, *), got shape {tuple(x.shape)}"
        )


def check_state(x: Tensor, name: str = "x") -> None:
    """Require a state ``(B, *)`` that a solve can start from: finite real floats, ``B >= 1``.

    Raises:
        TypeError: If ``x`` is not a tensor of real floats, or is on the meta device.
        ValueError: If ``x`` has no sample or no element, or a value is NaN or infinite.
    """
    check_samples(x, name, floating=True)
    check_finite(x, name)


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device of this machine, after a test allocation.

    Raises:
        ValueError: If this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be a device of this machine, such as cpu, got {name}: {reason}"
        ) from error
    return device


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return a type of floats, but float32 for half precision.

    Times, coefficients and sums of squares need it: float16 ends at 65504, and bfloat16 has three
    digits.

    >>> at_least_float32(torch.float16), at_least_float32(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def renamed_arguments(
    *, since: str, removed_in: str, **names: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keyword arguments under their old names, too, for a while.

    The function itself, and its signature, know the new names only. A test fails once flowkit's
    version has reached ``removed_in``, so that old names do go.

    Args:
        since: The version of flowkit that renamed them.
        removed_in: The version from which on old names are errors.
        names: ``old="new"`` for each.

    Raises:
        TypeError: When the function is called with an argument under both of its names.

    >>> @renamed_arguments(since="0.2.0", removed_in="0.4.0", colour="color")
    ... def paint(color: str) -> str:
    ...     return f"all in {color}"
    >>> paint(color="red")
    'all in red'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{new} must be given once, got {old} as well, its old name")
                warnings.warn(
                    f"{old} is named {new} since flowkit {since}; "
                    f"flowkit {removed_in} will not take {old}",
                    FutureWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return renamed

    return decorate
