"""Flow-matching loss, for any training loop."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowkit.checks import (
    at_least_float32,
    check_at_least,
    check_between,
    check_choice,
    check_same_shape,
    check_samples,
    check_times,
    expand_like,
)
from flowkit.couplings import Coupling, Independent
from flowkit.distributed import mean_over_ranks
from flowkit.paths import Linear, Path, noise_like
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Cond, Pairs, take
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
        TypeError: If ``x1`` or ``x0`` is not a tensor of floats.
        ValueError: If ``x1`` has no sample. If the batch has a mask that does not fit ``x1``, or a
            mask and a coupling that changes ``x1``.

    >>> pairs = draw_pairs({"x1": torch.ones(2, 1), "x0": torch.zeros(2, 1)})
    >>> pairs.x0.flatten().tolist(), pairs.x1.flatten().tolist()
    ([0.0, 0.0], [1.0, 1.0])
    """
    x1, x0 = batch["x1"], batch.get("x0")
    check_samples(x1, "x1", floating=True)
    if x0 is None:
        x0 = noise_like(x1, generator)
    check_samples(x0, "x0", floating=True)
    pairs = coupling.pair(x0, x1, batch.get("cond"), generator)
    if (mask := batch.get("mask")) is not None:
        check_mask(mask, x1)
        if pairs.x1 is not x1:
            raise ValueError(f"mask must come with a coupling that keeps x1, got {coupling}")
    return pairs


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Require a mask of real numbers with the dimensions of ``x (B, *)``, each of its size or 1.

    Fewer dimensions would broadcast too, but along other dimensions than its author meant: a mask
    ``(B,)`` of samples along the last one.

    Raises:
        TypeError: If the mask is not a tensor of real numbers.
        ValueError: If the shape differs.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of real numbers, got {kind}")
    sizes = zip(mask.shape, x.shape, strict=False)
    if mask.ndim != x.ndim or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"mask must have the {x.ndim} dimensions of x1, {tuple(x.shape)}, or 1 in place of "
            f"some, got shape {tuple(mask.shape)}"
        )


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

    The loss is a mean over elements, computed in float32 at least. The coupling pairs the data of
    the batch with the ``x0`` of the batch, or with standard normal noise if there is none. If the
    coupling gives log-weights, their exponentials multiply the losses of the pairs. In a batch with
    ``t0`` and ``t1`` the pairs are segments of a flow. Their times are drawn within [t0, t1], and
    their velocities are per unit of the flow's time.

    Under ``torch.distributed`` the mean of the losses of all ranks is the loss of their joint
    batch. For this, a mask is counted over all ranks, but only while gradients are enabled. The
    loss is 0 if the mask counts no element.

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
        the velocity explains, 0 for a velocity of zeros and without energy. It stays below 1, since
        pairs cross.

    Raises:
        TypeError: If ``x1``, ``x0``, ``t0`` or ``t1`` do not hold floats, or ``mask`` does not hold
            real numbers.
        ValueError: If shapes differ. If the batch has no sample. If the batch has a mask and the
            coupling changes ``x1``. If segments are incomplete, do not increase in time, or come
            with a path or coupling other than the default.

    >>> from flowkit.exact import GaussianFlow
    >>> batch = {"x1": 2 + 0.5 * torch.randn(4096, 2)}
    >>> loss = flow_matching_loss(GaussianFlow(2.0, 0.5), batch)["loss"]
    >>> bool((loss - 0.5 * torch.pi / 2).abs() < 0.05)
    True
    """
    _check_segments(batch, path, coupling)
    pairs = draw_pairs(batch, coupling, generator)
    dtype = at_least_float32(pairs.x1.dtype)
    t = times(len(pairs.x1), pairs.x1.device, generator).to(dtype)
    x_t, t, u, cond = draw_states(pairs, t, path, drop_cond, generator)
    if "t0" in batch and "t1" in batch:
        t0, t1 = batch["t0"].to(dtype), batch["t1"].to(dtype)
        t, u = torch.lerp(t0, t1, t), u / expand_like(t1 - t0, u)
    v = velocity(x_t, t, cond)
    check_samples(v, "velocity(x, t, cond)", floating=True)
    check_same_shape(v, u, ("velocity(x, t, cond)", "x"))

    v, u, weight, mask = v.to(dtype), u.to(dtype), pair_weights(pairs, u), batch.get("mask")
    if mask is not None:
        mask = mask.to(dtype)
        weight = mask if weight is None else weight * mask
    loss, energy = _mean_square(v - u, weight, mask), _mean_square(u, weight, mask)
    seen = {} if observe is None else observe(pairs)
    return {"loss": loss, "explained": explained_share(loss, energy), **seen}


def mean_flow_loss(
    net: Velocity,
    batch: Batch,
    path: Path = Linear(),
    coupling: Coupling = Independent(),
    times: Times = Uniform(),
    drop_cond: Drop | None = None,
    generator: torch.Generator | None = None,
    *,
    tangent: str = "network",
    flow_share: float = 0.5,
    power: float = 1.0,
    field: Callable[[Draw], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the loss of mean flows, ``E w ‖u(x_t, t, s) − sg(v̂ + (s − t) du/dt)‖²``.

    The network learns the mean velocity ``u(x, t, s) = 1/(s − t) ∫_t^s v(x_τ, τ) dτ``, see
    `flowkit.sampling.MeanVelocity`. Its derivative with respect to the start of the step gives

        u = v + (s − t) du/dt,    du/dt = ∂_t u + v · ∂_x u,

    whose right side is the target, without gradient. The derivative along the tangent
    ``(v, 1, 0)`` of ``(x, t, s)`` is one forward-mode product. A share ``flow_share`` of the batch
    (rounded down) has ``s = t``, which is plain flow matching; the others have two times in order,
    and only these cost the product. Each pair has the weight ``w = sg((‖Δ‖² + 1e-3) / d)^−power``
    for the error ``Δ`` in ``d`` elements. ``power = 0, flow_share = 1`` is `flow_matching_loss`.

    Sources: Geng et al., *Mean Flows for One-step Generative Modeling*, 2025 (arXiv 2505.13447),
    algorithm 1 and equation 22; Geng et al., *Improved Mean Flows*, 2025 (arXiv 2512.02012), for
    the network's own tangent. There time runs from data to noise, so ``s`` is before ``t``.

    Args:
        net: Network in training, ``net(x, t, cond)`` with ``t (B, 2)``: the times ``t`` and ``s``.
        batch: See `flowkit.types.Batch`; not of segments.
        path: The path between both ends of a pair.
        coupling: Chooses the ``x0`` of every ``x1``.
        times: Distribution of both times.
        drop_cond: Hides some conditions from the network.
        generator: Draws noise, coupling, times and dropped conditions.
        tangent: Velocity ``v`` of the tangent: ``"network"`` is the network's own ``u(x, t, t)``,
            of less variance; ``"conditional"`` is ``v̂``, as published first.
        flow_share: Share of the batch with ``s = t``, in [0, 1].
        power: Exponent of the weights, at least 0; 0 weights all pairs equally.
        field: Returns ``v̂ (B, *)``, without gradient, for training examples. None takes the
            conditional velocity ``u`` of a pair.

    Returns:
        ``loss``; ``explained`` and ``explained_mean``, the shares of the energy of the targets that
        the network explains with ``s = t`` and with ``s > t``. The weighted loss itself stays near
        1 and says little.

    Raises:
        TypeError: If ``x1`` or ``x0`` do not hold floats.
        ValueError: If shapes differ, an option is out of its range, or the batch holds segments.

    >>> def net(x, t, cond):  # the mean velocity of all flows to the one point 3
    ...     return (3 - x) / (1 - t[:, :1])
    >>> terms = mean_flow_loss(net, {"x1": torch.full((8, 2), 3.0)}, power=0)
    >>> bool(terms["loss"] < 1e-6)
    True
    """
    check_choice(tangent, ("network", "conditional"), "tangent")
    check_between(flow_share, 0, 1, "flow_share")
    check_at_least(power, 0, "power")
    if {"t0", "t1"} & set(batch):
        raise ValueError(f"batch must hold no segments of a flow, got {sorted(batch)}")
    pairs = draw_pairs(batch, coupling, generator)
    size, dtype = len(pairs.x1), at_least_float32(pairs.x1.dtype)
    first, second = (times(size, pairs.x1.device, generator).to(dtype) for _ in range(2))
    means = slice(math.ceil((1 - flow_share) * size))  # the first: batches are in random order
    t, s = first.clone(), first.clone()
    t[means], s[means] = torch.minimum(first, second)[means], torch.maximum(first, second)[means]
    draw = draw_states(pairs, t, path, drop_cond, generator)
    u = net(draw.x_t, torch.stack([t, s], 1), draw.cond)
    check_samples(u, "net(x, t, cond)", floating=True)
    check_same_shape(u, draw.u, ("net(x, t, cond)", "x"))
    with torch.no_grad():
        target = (draw.u if field is None else field(draw)).to(dtype, copy=True)
        check_same_shape(target, draw.u, ("field(draw)", "x"))
        if means.stop:
            part = Draw(draw.x_t[means], t[means], target[means], take(draw.cond, means))
            slope = _slope(net, part, s[means], tangent)
            target[means] += expand_like(s - t, slope)[means] * slope

    error, mask = u.to(dtype) - target, batch.get("mask")
    if mask is not None:
        mask = mask.to(dtype).expand(error.shape)
    counted = torch.ones_like(error)
    for factor in (pair_weights(pairs, error), mask):
        counted = counted if factor is None else counted * factor
    return {
        "loss": _mean_square(error, counted * _adaptive(error.detach(), mask, power), mask),
        "explained": _explained(error, target, counted, slice(means.stop, None)),
        "explained_mean": _explained(error, target, counted, means),
    }


def _slope(net: Velocity, draw: Draw, s: Tensor, tangent: str) -> Tensor:
    """Return ``du/dt`` of the mean velocity along the flow, in float32 at least."""
    x, t, v, cond = draw
    if tangent == "network":
        v = net(x, torch.stack([t, t], 1), cond)

    # Compiled networks and fused attention have no forward-mode derivative.
    call = net.forward if isinstance(net, nn.Module) else net
    with sdpa_kernel(SDPBackend.MATH), _ContiguousNorms(), forward_ad.dual_level():
        along = forward_ad.make_dual(x, v.to(x)), forward_ad.make_dual(t, torch.ones_like(t))
        u = call(along[0], torch.stack([along[1], s], 1), cond)
        slope = forward_ad.unpack_dual(u).tangent
    return torch.zeros_like(x, dtype=t.dtype) if slope is None else slope.to(t.dtype)


class _ContiguousNorms(TorchFunctionMode):
    """Within it, group norms get contiguous inputs: their forward-mode derivative needs them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def _adaptive(error: Tensor, mask: Tensor | None, power: float) -> Tensor:
    """Return the weights ``((‖Δ‖² + 1e-3) / d)^−power`` of pairs as ``(B, 1, …, 1)``."""
    squares = error.square() if mask is None else mask * error.square()
    size = torch.full_like(squares, 1.0) if mask is None else mask
    square, count = (value.flatten(1).sum(1) for value in (squares, size))
    return expand_like(((square + 1e-3) / count.clamp(min=1)) ** -power, error)


def _explained(error: Tensor, target: Tensor, counted: Tensor, rows: slice) -> Tensor:
    """Return the explained share of the energy of some rows; 0 if there are none."""
    squares = (counted * value.detach().square() for value in (error, target))
    return explained_share(*(square[rows].sum() for square in squares))


def pair_weights(pairs: Pairs, x: Tensor) -> Tensor | None:
    """Return the weights of pairs as ``(B, 1, ..., 1)`` in float32, for ``x (B, *)``; None for 1.

    Raises:
        ValueError: If there is not one weight per pair.
    """
    if pairs.log_weight is None:
        return None
    if pairs.log_weight.shape != (len(x),):
        raise ValueError(
            f"log_weight of a coupling must have shape ({len(x)},), "
            f"got {tuple(pairs.log_weight.shape)}"
        )
    return expand_like(pairs.log_weight.to(at_least_float32(x.dtype)).exp(), x)


def explained_share(loss: Tensor, energy: Tensor) -> Tensor:
    """Return ``1 − loss / energy`` without gradient, and 0 without energy.

    >>> explained_share(torch.tensor(1.0), torch.tensor(4.0))
    tensor(0.7500)
    """
    return torch.where(energy == 0, 0.0, 1 - loss / energy).detach()


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
    count = mean_over_ranks(count) if torch.is_grad_enabled() else count
    return squares.sum() / torch.where(count == 0, 1.0, count)
