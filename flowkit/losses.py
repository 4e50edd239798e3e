"""The flow-matching loss, for any training loop."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_same_shape, check_times, expand_like
from flowkit.couplings import Coupling, Independent
from flowkit.distributed import mean_over_ranks
from flowkit.paths import Linear, Path, noise_like
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Cond, Pairs
from flowkit.velocity import Velocity

Drop = Callable[[Cond, torch.Generator | None], Cond]


class Draw(NamedTuple):
    """States ``x_t (B, *)`` of pairs at times ``t (B,)``, where ``u`` is to be learnt.

    ``cond`` is what the velocity is told.
    """

    x_t: Tensor
    t: Tensor
    u: Tensor
    cond: Cond


def draw_pairs(
    batch: Batch, coupling: Coupling = Independent(), generator: torch.Generator | None = None
) -> Pairs:
    """Pair the data of a batch with its own ``x0``, or else with standard normal noise.

    Raises:
        ValueError: If the batch has a mask and the coupling moves ``x1``.

    >>> pairs = draw_pairs({"x1": torch.ones(2, 1), "x0": torch.zeros(2, 1)})
    >>> pairs.x0.flatten().tolist(), pairs.x1.flatten().tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """
    x1, x0 = batch["x1"], batch.get("x0")
    if x0 is None:
        x0 = noise_like(x1, generator)
    pairs = coupling.pair(x0, x1, batch.get("cond"), generator)
    if batch.get("mask") is not None and pairs.x1 is not x1:
        raise ValueError(f"mask must come with a coupling that keeps x1, got {coupling}")
    return pairs


def draw_states(
    pairs: Pairs,
    t: Tensor,
    path: Path = Linear(),
    drop_cond: Drop | None = None,
    generator: torch.Generator | None = None,
) -> Draw:
    """Go along the path to times ``t (B,)``, then drop conditions.

    >>> draw = draw_states(Pairs(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor([0.25]))
    >>> draw.x_t.item(), draw.u.item()
    (0.25, 1.0)
    """
    x_t, t, u = path.sample(pairs.x0, pairs.x1, t, generator)
    return Draw(x_t, t, u, pairs.cond if drop_cond is None else drop_cond(pairs.cond, generator))


def time_dtype(x: Tensor) -> torch.dtype:
    """The type of times beside data: at least float32, also beside half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def flow_matching_loss(
    velocity: Velocity,
    batch: Batch,
    path: Path = Linear(),
    coupling: Coupling = Independent(),
    times: Times = Uniform(),
    drop_cond: Drop | None = None,
    generator: torch.Generator | None = None,
    observe: Callable[[Pairs], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Conditional flow matching: ``E ‖v(x_t, t, cond) − u‖²``, a mean over elements.

    Pairs ``(x0, x1)`` come from the coupling of the batch's data with standard normal noise, or
    with the batch's own ``x0``; a coupling's log-weights multiply each pair's loss. In a batch
    with ``t0`` and ``t1`` the pairs are segments of a flow: times are drawn within [t0, t1], and
    velocities are per unit of the flow's time.

    Under ``torch.distributed`` the mean of all ranks' losses is that of their joint batch: while
    gradients are enabled, a mask is counted over all ranks.

    Source: Lipman et al., *Flow Matching for Generative Modeling*, 2022 (arXiv 2210.02747),
    equation 9; Tong et al. 2023 (arXiv 2302.00482), algorithm 1, for couplings.

    Args:
        velocity: The field to train.
        batch: See `flowkit.types.Batch`.
        path: Where pairs are at time ``t``.
        coupling: Which ``x0`` goes with which ``x1``.
        times: Distribution of ``t``.
        drop_cond: Applied to the condition before the velocity sees it, see
            `flowkit.guidance.DropCond`.
        generator: Draws everything: noise, coupling, times, dropped conditions.
        observe: Sees the pairs; what it says of them is returned as well. See
            `flowkit.couplings.Gibbs.telemetry`.

    Raises:
        ValueError: If shapes differ; if a mask meets a coupling that moves ``x1``; or if segments
            are incomplete, not increasing in time, or meet a path or coupling that is not the
            default.

    Returns:
        ``loss``, and ``explained``: the share ``1 − loss / E‖u‖²`` of the target's energy that is
        predicted, 0 for a zero network. It stays below 1, since pairs cross.

    >>> from flowkit.exact import GaussianFlow
    >>> batch = {"x1": 2 + 0.5 * torch.randn(4096, 2)}
    >>> loss = flow_matching_loss(GaussianFlow(2.0, 0.5), batch)["loss"]
    >>> bool((loss - 0.5 * torch.pi / 2).abs() < 0.05)
    True
    """
    _check_segments(batch, path, coupling)
    pairs = draw_pairs(batch, coupling, generator)
    t = times(len(pairs.x1), pairs.x1.device, generator).to(time_dtype(pairs.x1))
    x_t, t, u, cond = draw_states(pairs, t, path, drop_cond, generator)
    if "t0" in batch and "t1" in batch:
        t0, length = batch["t0"], batch["t1"] - batch["t0"]
        t, u = t0 + length * t, u / expand_like(length, u)
    v = velocity(x_t, t, cond)
    check_same_shape(v, u, ("velocity(x, t, cond)", "x"))

    weight = None if pairs.log_weight is None else expand_like(pairs.log_weight.exp().to(u), u)
    if (mask := batch.get("mask")) is not None:
        weight = mask if weight is None else weight * mask
    loss, energy = _mean_square(v - u, weight, mask), _mean_square(u.detach(), weight, mask)
    seen = {} if observe is None else observe(pairs)
    return {"loss": loss, "explained": 1 - loss.detach() / energy, **seen}


def _check_segments(batch: Batch, path: Path, coupling: Coupling) -> None:
    given = {"t0", "t1"} & set(batch)
    if not given:
        return
    if len(given) == 1 or "x0" not in batch:
        raise ValueError(
            f"batch must hold x0, t0 and t1 together where it holds segments, got {sorted(batch)}"
        )
    if path != Linear() or not isinstance(coupling, Independent):
        raise ValueError(
            "path and coupling must be Linear() and Independent() for segments with t0 and t1, "
            f"whose chord they would change, got {path} and {coupling}"
        )
    t0, t1 = batch["t0"], batch["t1"]  # type: ignore[typeddict-item]  # all are there
    for name, t in (("t0", t0), ("t1", t1)):
        check_times(t, len(batch["x1"]), name)
    if not bool((t0 < t1).all()):
        raise ValueError(f"t1 must be larger than t0, got t1 − t0 = {(t1 - t0).min().item()}")


def _mean_square(x: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """Mean of ``weight x²`` over the elements that ``mask`` counts."""
    squares = x.square() if weight is None else weight * x.square()
    # The same mean with and without weights, so that weights of 1 change no bit.
    if mask is None:
        return squares.mean()
    count = mask.expand(x.shape).sum()
    # Ranks' losses are averaged: each is divided by the same count. Only training has them in step.
    return squares.sum() / (mean_over_ranks(count) if torch.is_grad_enabled() else count)
