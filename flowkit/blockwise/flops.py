"""Floating-point operations of networks, and of the parts of a `Blockwise` flow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise
from flowkit.blockwise.parts import Usage
from flowkit.checks import check_at_least, check_choice
from flowkit.types import Cond, take, to_device
from flowkit.velocity import Velocity


class Flops(NamedTuple):
    """Floating-point operations of matrix products and convolutions; a multiply-add counts as two.

    ``attention``: the two products of attention, ``q kᵀ`` and ``weights · v``. ``linear``: all
    other products. Some papers count attention's products, some do not.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Sum of ``linear`` and ``attention``."""
        return self.linear + self.attention


@torch.no_grad()
def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """Run a function once and count its operations, also on the meta device.

    The counter is ``torch.utils.flop_counter``. Batched products count as attention; in flowkit's
    networks, only attention uses batched products.

    Args:
        function: The function.
        *args: Its arguments.

    >>> count_flops(torch.nn.Linear(3, 5), torch.zeros(2, 3))
    Flops(linear=60, attention=0)
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the fused attention kernels of CPUs. This backend computes
    # attention from single products, which the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    counts = counter.get_flop_counts().get("Global", {})
    batched = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    attention = sum(counts.get(op, 0) for op in batched)
    return Flops(counter.get_total_flops() - attention, attention)


def part_flops(flow: Blockwise, x: Tensor, cond: Cond = None) -> dict[str, Flops]:
    """Return the operations of each part for one sample, by the part's name in ``flow.usage``.

    Args:
        flow: Blockwise flow in any ``feature_mode``; its counts of calls do not change.
        x: States ``(B, *)``; the function uses the first state.
        cond: Conditions of the states.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> sorted(part_flops(BlockwiseMLP((2,), edges=2, width=16), torch.zeros(1, 2)))
    ['stacks.0', 'stacks.1', 'trunk']
    """
    x, t, cond = _first(flow, x, cond)
    parts, h = {}, None
    if flow.trunk is not None:
        parts["trunk"] = count_flops(flow.trunk.features, x, t, cond)
        h = flow.trunk.features(x, t, cond)
    for m, stack in enumerate(flow.stacks):
        parts[f"stacks.{m}"] = count_flops(stack.velocity, x, t, cond, h)
    if (residual := flow.feature_residual) is not None:
        seen = (h,) if getattr(residual, "sees_start", False) else ()
        parts["feature_residual"] = count_flops(residual, x, t, cond, *seen)
    return parts


def used_flops(usage: Usage, parts: Mapping[str, Flops]) -> Flops:
    """Return the operations of all counted rows.

    Args:
        usage: Counts of rows of some solves.
        parts: Operations of each part for one sample, see `part_flops`.

    >>> usage = Usage()
    >>> usage.add("trunk", rows=3)
    >>> used_flops(usage, {"trunk": Flops(linear=10, attention=2)})
    Flops(linear=30, attention=6)
    """
    rows = usage.rows
    return Flops(
        sum(parts[name].linear * count for name, count in rows.items()),
        sum(parts[name].attention * count for name, count in rows.items()),
    )


def network_flops(velocity: Velocity, x: Tensor, cond: Cond = None) -> Flops:
    """Return the operations of one call of a velocity for one sample.

    Args:
        velocity: The velocity.
        x: States ``(B, *)``; the function uses the first state.
        cond: Conditions of the states.

    >>> network_flops(lambda x, t, cond: x @ torch.ones(3, 3), torch.zeros(5, 3))
    Flops(linear=18, attention=0)
    """
    return count_flops(velocity, *_first(velocity, x, cond))


def solve_cost(flow: Blockwise, x: Tensor, cond: Cond, num_samples: int) -> dict[str, Any]:
    """Return the cost of a flow's solves since ``flow.usage.clear()``, as a record.

    Args:
        flow: The sampled flow.
        x: States ``(B, *)``; the function uses the first state.
        cond: Conditions of the states.
        num_samples: Number of samples of these solves.

    Returns:
        ``feature_mode``; ``tolerance``, the largest predicted error of reused features, or None
        without a limit; ``calls`` of each part; and ``gflops`` and ``gflops_without_attention`` per
        sample.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow, x = BlockwiseMLP((2,), edges=2, width=16), torch.zeros(4, 2)
    >>> v = flow(x, torch.full((4,), 0.7))
    >>> solve_cost(flow, x, None, num_samples=4)["calls"]
    {'stacks.1': 1, 'trunk': 1}
    """
    flops = used_flops(flow.usage, part_flops(flow, x, cond))
    limit, mode = flow.drift_limit, flow.feature_mode
    tolerance = limit.tolerance if limit is not None and mode in limit.errors else None
    return {
        "feature_mode": mode,
        "tolerance": tolerance,
        "calls": dict(sorted(flow.usage.calls.items())),
        "gflops": flops.total / num_samples / 1e9,
        "gflops_without_attention": flops.linear / num_samples / 1e9,
    }


def _first(velocity: Any, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """Return the first sample, at time 0, on the velocity's device."""
    weight = next(velocity.parameters(), x) if isinstance(velocity, torch.nn.Module) else x
    cond = to_device(take(cond, slice(0, 1)), weight.device)
    return x[:1].to(weight.device), torch.zeros(1, device=weight.device), cond


def step_prices(parts: Mapping[str, Flops], segment: int, mode: str = "fra") -> tuple[int, int]:
    """Return the operations of a segment's first Euler step and of each later step, with attention.

    Args:
        parts: Operations of each part, see `part_flops`.
        segment: Number of the segment, from 0.
        mode: The feature mode: ``"full"``, ``"cached"`` or ``"fra"``.

    Raises:
        ValueError: If ``parts`` do not hold the segment or a part that the mode needs, or the mode
            is unknown.

    >>> parts = {"trunk": Flops(6, 0), "stacks.0": Flops(4, 0), "feature_residual": Flops(1, 0)}
    >>> step_prices(parts, 0)
    (10, 5)
    """
    check_choice(mode, ("full", "cached", "fra"), "mode")
    _check_parts(parts, f"stacks.{segment}", *(["feature_residual"] if mode == "fra" else []))
    stack = parts[f"stacks.{segment}"].total
    trunk = parts["trunk"].total if "trunk" in parts else 0
    later = {"full": trunk, "cached": 0, "fra": 0}[mode]
    if mode == "fra":
        later = parts["feature_residual"].total
    return stack + trunk, stack + later


def predicted_gain(
    parts: Mapping[str, Flops], steps: int | Sequence[int], attention: bool = True
) -> float:
    """Return the ratio of operations with full features to operations with feature residuals.

    The equation is ``Σ n_m C_full / Σ [C_full + (n_m − 1) C_fra]``, summed over the segments.

    Args:
        parts: Operations of each part, see `part_flops`.
        steps: Number of Euler steps in each segment: one number, or one number per segment.
        attention: Whether attention's products count.

    Raises:
        ValueError: If a number of steps is below 1, there is not one number per segment, or
            ``parts`` do not hold a trunk, a feature residual and a stack.

    >>> parts = {"trunk": Flops(6, 0), "stacks.0": Flops(4, 0), "feature_residual": Flops(1, 0)}
    >>> predicted_gain(parts, 3)
    1.5
    """
    _check_parts(parts, "trunk", "feature_residual", "stacks.0")
    cost = {name: part.total if attention else part.linear for name, part in parts.items()}
    stacks = [value for name, value in cost.items() if name.startswith("stacks.")]
    counts = [steps] * len(stacks) if isinstance(steps, int) else list(steps)
    if len(counts) != len(stacks):
        raise ValueError(
            f"steps must hold one number per segment, {len(stacks)}, got {len(counts)}"
        )
    full = fra = 0
    for stack, n in zip(stacks, counts, strict=True):
        check_at_least(n, 1, "steps")
        full += n * (cost["trunk"] + stack)
        fra += cost["trunk"] + stack + (n - 1) * (cost["feature_residual"] + stack)
    return full / fra


def _check_parts(parts: Mapping[str, Flops], *names: str) -> None:
    """Require the operations of the named parts."""
    for name in names:
        if name not in parts:
            raise ValueError(f"parts must hold {name}, got {', '.join(sorted(parts)) or 'none'}")
