"""Flow-matching loss, for any training loop."""

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
"""A function that hides some conditions of a batch, such as `flowkit.guidance.DropCond`."""


class Draw(NamedTuple):
    """Training examples of a velocity: its arguments ``(x_t, t, cond)`` and its target ``u``."""

    x_t: Tensor
    """States ``(B, *)`` of pairs."""
    t: Tensor
    """Times ``(B,)`` of the states."""
    u: Tensor
    """Target velocities ``(B, *)``."""
    cond: Cond
    """The condition, after some of its values are dropped."""


def draw_pairs(
    batch: Batch, coupling: Coupling = Independent(), generator: torch.Generator | None = None
) -> Pairs:
    """Pair the data of a batch with the ``x0`` of the batch, or with standard normal noise.

    Args:
        batch: See `flowkit.types.Batch`. Without ``x0`` noise is drawn.
        coupling: Chooses the ``x0`` of every ``x1``.
        generator: Draws the noise and the coupling.

    Returns:
        Pairs ``(x0, x1)`` with their conditions.

    Raises:
        ValueError: If the batch has a mask and the coupling changes ``x1``.

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
    """Compute states of pairs on the path at times ``t (B,)``, and drop conditions.

    Args:
        pairs: Pairs ``(x0, x1)``, each ``(B, *)``.
        t: Times ``(B,)`` in [0, 1].
        path: The path between both ends of a pair.
        drop_cond: Hides some conditions; None keeps all.
        generator: Draws the noise of the path, if it has any, and the dropped conditions.

    Returns:
        States, times, target velocities and conditions.

    >>> draw = draw_states(Pairs(torch.zeros(1, 1), torch.ones(1, 1)), torch.tensor([0.25]))
    >>> draw.x_t.item(), draw.u.item()
    (0.25, 1.0)
    """
    x_t, t, u = path.sample(pairs.x0, pairs.x1, t, generator)
    return Draw(x_t, t, u, pairs.cond if drop_cond is None else drop_cond(pairs.cond, generator))


def time_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the times of data ``x``: its type, but not narrower than float32.

    >>> time_dtype(torch.zeros(1, dtype=torch.float16))
    torch.float32
    """
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
    """Compute the loss of conditional flow matching, ``E ‖v(x_t, t, cond) − u‖²``.

    The loss is a mean over elements. The coupling pairs the data of the batch with the ``x0`` of
    the batch, or with standard normal noise if there is none. If the coupling gives log-weights,
    their exponentials multiply the losses of the pairs. In a batch with ``t0`` and ``t1`` the pairs
    are segments of a flow. Their times are drawn within [t0, t1], and their velocities are per
    unit of the flow's time.

    Under ``torch.distributed`` the mean of the losses of all ranks is the loss of their joint
    batch. For this, a mask is counted over all ranks, but only while gradients are enabled.

    Source: Lipman et al., *Flow Matching for Generative Modeling*, 2022 (arXiv 2210.02747),
    equation 9. For couplings: Tong et al., *Improving and Generalizing Flow-Based Generative Models
    with Minibatch Optimal Transport*, 2023 (arXiv 2302.00482), algorithm 1.

    Args:
        velocity: The velocity in training.
        batch: See `flowkit.types.Batch`.
        path: The path between both ends of a pair.
        coupling: Chooses the ``x0`` of every ``x1``.
        times: Distribution of ``t``.
        drop_cond: Hides some conditions from the velocity, see `flowkit.guidance.DropCond`. None
            keeps all.
        generator: Draws noise, coupling, times and dropped conditions.
        observe: Called with the pairs. Its results are added to those of the loss. See
            `flowkit.couplings.Gibbs.telemetry`.

    Returns:
        ``loss``, and ``explained = 1 − loss / E‖u‖²``: the share of the energy of the targets that
        the velocity explains, 0 for a velocity of zeros. It stays below 1, since pairs cross.

    Raises:
        TypeError: If ``t0`` or ``t1`` do not hold floats.
        ValueError: If shapes differ. If the batch has a mask and the coupling changes ``x1``. If
            segments are incomplete, do not increase in time, or come with a path or coupling other
            than the default.

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
    """Require segments, if the batch holds any, to be complete and to increase in time."""
    given = {"t0", "t1"} & set(batch)
    if not given:
        return
    if len(given) == 1 or "x0" not in batch:
        raise ValueError(
            f"batch must hold x0, t0 and t1 together if it holds segments, got {sorted(batch)}"
        )
    if path != Linear() or not isinstance(coupling, Independent):
        raise ValueError(
            "path and coupling must be Linear() and Independent() for segments with t0 and t1, "
            f"got {path} and {coupling}; any other changes the chords of segments"
        )
    t0, t1 = batch["t0"], batch["t1"]  # type: ignore[typeddict-item]  # all are present
    for name, t in (("t0", t0), ("t1", t1)):
        check_times(t, len(batch["x1"]), name)
    if not bool((t0 < t1).all()):
        raise ValueError(f"t1 must be larger than t0, got t1 − t0 = {(t1 - t0).min().item()}")


def _mean_square(x: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """Compute the mean of ``weight x²`` over the elements that ``mask`` counts."""
    squares = x.square() if weight is None else weight * x.square()
    # The mean is the same function with and without weights, so that weights of 1 change no bit.
    if mask is None:
        return squares.mean()
    count = mask.expand(x.shape).sum()
    # The losses of all ranks are averaged, so each is divided by the same count. Only in training
    # do all ranks reach this line together.
    return squares.sum() / (mean_over_ranks(count) if torch.is_grad_enabled() else count)
