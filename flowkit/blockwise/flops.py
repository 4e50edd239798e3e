"""What a network computes, counted by torch; and what the parts of a `Blockwise` cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise
from flowkit.blockwise.parts import Usage
from flowkit.checks import check_at_least
from flowkit.types import Cond, take, to_device
from flowkit.velocity import Velocity


class Flops(NamedTuple):
    """Floating-point operations of matrix products and convolutions, two per multiply-add.

    ``linear``: all but attention's two products, ``q kᵀ`` and ``weights · v``, which are
    ``attention``. Papers differ in whether they count these.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """With attention products."""
        return self.linear + self.attention


@torch.no_grad()
def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """Run a function once and count, by `torch.utils.flop_counter`; also on the meta device.

    Batched products are taken to be attention's, as in all networks of flowkit.

    >>> count_flops(torch.nn.Linear(3, 5), torch.zeros(2, 3))
    Flops(linear=60, attention=0)
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Spelt out by this backend, attention is counted on every device; the fused kernels of CPUs
    # are not known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    counts = counter.get_flop_counts().get("Global", {})
    batched = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    attention = sum(counts.get(op, 0) for op in batched)
    return Flops(counter.get_total_flops() - attention, attention)


def part_flops(flow: Blockwise, x: Tensor, cond: Cond = None) -> dict[str, Flops]:
    """What each part takes for one sample, by its name in the flow's ``usage``.

    Args:
        flow: In any ``feature_mode``; its counts of calls are left alone.
        x: States ``(B, *)``, the first of which is used.
        cond: Their conditions.
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
    """What all the rows of some solves took: see `part_flops`."""
    rows = usage.rows
    return Flops(
        sum(parts[name].linear * count for name, count in rows.items()),
        sum(parts[name].attention * count for name, count in rows.items()),
    )


def network_flops(velocity: Velocity, x: Tensor, cond: Cond = None) -> Flops:
    """What one call of a velocity takes for one sample: see `part_flops` for the arguments."""
    return count_flops(velocity, *_first(velocity, x, cond))


def solve_cost(flow: Blockwise, x: Tensor, cond: Cond, num_samples: int) -> dict[str, Any]:
    """What a flow's solves computed since its ``usage`` was cleared, for their record.

    Args:
        flow: What was sampled from.
        x: States ``(B, *)``, the first of which is used.
        cond: Their conditions.
        num_samples: How many were drawn.

    Returns:
        ``feature_mode``, the share of each segment that features are carried over at most
        (``reach``), the ``calls`` of each part in all, and ``gflops`` and
        ``gflops_without_attention`` per sample.
    """
    flops = used_flops(flow.usage, part_flops(flow, x, cond))
    return {
        "feature_mode": flow.feature_mode,
        "reach": flow.reach.get(flow.feature_mode),
        "calls": dict(sorted(flow.usage.calls.items())),
        "gflops": flops.total / num_samples / 1e9,
        "gflops_without_attention": flops.linear / num_samples / 1e9,
    }


def _first(velocity: Any, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """The first sample, at time 0, on the velocity's device."""
    weight = next(velocity.parameters(), x) if isinstance(velocity, torch.nn.Module) else x
    cond = to_device(take(cond, slice(0, 1)), weight.device)
    return x[:1].to(weight.device), torch.zeros(1, device=weight.device), cond


def step_prices(parts: Mapping[str, Flops], segment: int, mode: str = "fra") -> tuple[int, int]:
    """FLOPs of a segment's first Euler step and of each later one, attention included.

    Args:
        parts: See `part_flops`.
        segment: Which.
        mode: The feature mode.
    """
    stack = parts[f"stacks.{segment}"].total
    trunk = parts["trunk"].total if "trunk" in parts else 0
    later = {"full": trunk, "cached": 0, "fra": 0}[mode]
    if mode == "fra":
        later = parts["feature_residual"].total
    return stack + trunk, stack + later


def predicted_gain(
    parts: Mapping[str, Flops], steps: int | Sequence[int], attention: bool = True
) -> float:
    """How much less sampling computes with feature residuals than with full features.

    ``Σ n_m C_full / Σ [C_full + (n_m − 1) C_fra]`` over the segments.

    Args:
        parts: See `part_flops`.
        steps: Euler steps in each segment, a number or one per segment.
        attention: Whether attention's products count.

    >>> parts = {"trunk": Flops(6, 0), "stacks.0": Flops(4, 0), "feature_residual": Flops(1, 0)}
    >>> predicted_gain(parts, 3)
    1.5
    """
    cost = {name: part.total if attention else part.linear for name, part in parts.items()}
    stacks = [value for name, value in cost.items() if name.startswith("stacks.")]
    counts = [steps] * len(stacks) if isinstance(steps, int) else list(steps)
    full = fra = 0
    for stack, n in zip(stacks, counts, strict=True):
        check_at_least(n, 1, "steps")
        full += n * (cost["trunk"] + stack)
        fra += cost["trunk"] + stack + (n - 1) * (cost["feature_residual"] + stack)
    return full / fra
