"""The joint flow of an image and its label: one network, two states, one or two times.

    x_t = (1 − t) ξ_x + t x₁       v_x = x₁ − ξ_x        image: noise at t = 0, data at t = 1
    y_s = (1 − s) y₀  + s ξ_y      v_y = ξ_y − y₀        label: data at s = 0, noise at s = 1

Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634), where ``s = t``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import check_same_shape, expand_like
from flowkit.distributed import mean_over_ranks
from flowkit.guidance import combine
from flowkit.paths import Linear, noise_like
from flowkit.sampling import ODESampler, Solution
from flowkit.sampling.ode import Callback
from flowkit.types import Cond
from flowkit.velocity import Velocity

PATH = Linear()


@dataclass(frozen=True, eq=False)
class JointFlow:
    """A network on states of image and code, side by side on dimension 1, as their velocities.

    A code ``(B, K)`` beside images ``(B, C, H, W)`` enters as constant planes, and the mean of the
    network's planes is its velocity.

    Args:
        network: Called as ``network(state, t)`` on ``(B, C + K, *)``.
        two_times: Whether it takes ``(t, s)`` as ``t (B, 2)``, or ``t (B,)`` alone.

    >>> def network(state, t):
    ...     return torch.ones_like(state)
    >>> flow = JointFlow(network)
    >>> v_x, v_y = flow(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), torch.zeros(2), torch.ones(2))
    >>> v_x.shape, v_y.shape
    (torch.Size([2, 1, 4, 4]), torch.Size([2, 3]))
    """

    network: Velocity
    two_times: bool = True

    def __call__(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities of ``x (B, C, *)`` and ``y (B, K)`` or ``(B, K, *)`` at times ``(B,)``.

        Raises:
            ValueError: If the network takes or returns other states or times.
        """
        state, times = pack(x, y), torch.stack([t, s], 1) if self.two_times else t
        try:
            v = self.network(state, times)
        except ValueError as error:
            raise ValueError(
                f"velocity must take image and code of shape {tuple(state.shape)} and times of "
                f"shape {tuple(times.shape)}, got an error: {error}; build the network with "
                f"{state.shape[1]} channels, no classes and num_times={1 + self.two_times}, or for "
                "two times one of 1 more channel within flowkit.symmetrical.networks.TwoTimes"
            ) from error
        check_same_shape(v, state, ("velocity(state, t)", "state"))
        return unpack(v, x.shape[1], y.ndim)

    def loss(
        self,
        x1: Tensor,
        y0: Tensor,
        *,
        x0: Tensor | None = None,
        mask: Tensor | None = None,
        label_weight: Tensor | None = None,
        boundary_share: float = 0.5,
        label_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean squared errors of the image's and of the label's velocity, at random times.

        With one time it is uniform. With two, ``(t, s)`` is uniform in the square but for a share
        ``boundary_share``, half of which has the label clean (``s = 0``) and half the image
        (``t = 1``). A clean side is never moved, so that its loss, which would be noise alone, is
        left out. Of the pairs with a clean image, half have nothing but noise for a label
        (``s = 1``): that corner is all that one step sees. A class that every pixel of a mask
        repeats shows through much noise, and away from the corner the network need not know it
        from the image.

        Args:
            x1: Images ``(B, C, *)``.
            y0: Dequantized codes ``(B, K)`` or ``(B, K, *)``.
            x0: Noise of the images; drawn if None.
            mask: Weight of the images' elements, broadcastable to them.
            label_weight: Weight of the codes' elements, broadcastable to them.
            boundary_share: Share of pairs with one clean side, for two times.
            label_dropout: Probability of hiding a label: zeros for its code, with two times at
                ``s = 1``, and no label loss.
            generator: Draws everything.

        Returns:
            The image's loss and the label's, each a mean over its own (counted) elements.
        """
        t, s = self._draw_times(len(x1), x1.device, boundary_share, generator)
        image = PATH.sample(noise_like(x1, generator) if x0 is None else x0, x1, t)
        label = PATH.sample(y0, noise_like(y0, generator), s)
        y_s = label.x_t
        if self.two_times:
            mask = _times(mask, expand_like(t < 1, x1))
            label_weight = _times(label_weight, expand_like(s > 0, y0))
        if label_dropout > 0:
            draw = torch.rand(len(y0), device=y0.device, generator=generator)
            kept = expand_like(draw >= label_dropout, y0)
            y_s, s = y_s * kept, torch.where(draw < label_dropout, 1.0, s)
            label_weight = _times(label_weight, kept)
        v_x, v_y = self(image.x_t, y_s, t, s)
        return _mean_square(v_x - image.u, mask), _mean_square(v_y - label.u, label_weight)

    def solve_images(
        self,
        sampler: ODESampler,
        x0: Tensor,
        y: Tensor,
        known: Tensor,
        scale: float = 1.0,
        **options: Any,
    ) -> Solution:
        """Carry noise ``x0`` to images while codes ``y`` go, from ``t = s = 0`` to 1.

        For flows of one time; those of two have an `ImageVelocity`, whose codes stay.

        Args:
            sampler: The solver and grid.
            x0: Noise ``(B, C, *)``.
            y: Codes ``(B, K)`` or ``(B, K, *)``.
            known: Whose labels are known, ``(B,)``; others' codes must be and stay zeros.
            scale: Of guidance; 1 is none.
            **options: Other arguments of ``sampler.solve``. A callback sees the images with their
                codes behind, on dimension 1.
        """
        field, channels = JointField(self, x0.shape[1], y.ndim, scale=scale), x0.shape[1]
        solution = sampler.solve(field, pack(x0, y), known, **options)
        path = None if solution.path is None else solution.path[:, :, :channels]
        return solution._replace(x=solution.x[:, :channels], path=path)

    def solve_codes(self, sampler: ODESampler, x1: Tensor, noise: Tensor) -> Solution:
        """Carry noise ``(B, K)`` or ``(B, K, *)`` to the codes of images ``x1``, from 1 to 0."""
        if self.two_times:
            return sampler.invert(_code_velocity(self), noise, x1)
        field = JointField(self, x1.shape[1], noise.ndim)
        solution = sampler.invert(field, pack(x1, noise))
        return solution._replace(x=unpack(solution.x, x1.shape[1], noise.ndim)[1])

    def solve_pairs(self, sampler: ODESampler, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Carry both from noise, to images and their codes; for flows of two times."""
        field = JointField(self, x0.shape[1], noise.ndim, across=True)
        return unpack(sampler(field, pack(x0, noise)), x0.shape[1], noise.ndim)

    def _draw_times(
        self,
        batch: int,
        device: torch.device,
        share: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        if not self.two_times:
            t = torch.rand(batch, device=device, generator=generator)
            return t, t
        t, s, side = torch.rand(3, batch, device=device, generator=generator)
        t = torch.where((side >= share / 2) & (side < share), 1.0, t)
        s = torch.where((side >= share * 3 / 4) & (side < share), 1.0, s)
        return t, torch.where(side < share / 2, 0.0, s)


class JointField:
    """The velocity of image and code together, on the packed state, for one solve.

    Along the diagonal ``s = t`` the image comes while the label goes; across it, ``s = 1 − t``,
    both come. The condition ``(B,)`` says whose labels are known: others' stay zero.

    Args:
        flow: The joint flow.
        channels: ``C``, the image's channels.
        code_ndim: Dimensions of a batch of codes.
        across: Solve for pairs.
        scale: Of guidance, on the image's velocity; 1 is none.
    """

    def __init__(self, flow: JointFlow, channels: int, code_ndim: int, across=False, scale=1.0):
        self.flow, self.channels, self.code_ndim = flow, channels, code_ndim
        self.across, self.scale, self.rows = across, scale, 0

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> "JointField":
        """Return a field that counts the rows of one solve."""
        return JointField(self.flow, self.channels, self.code_ndim, self.across, self.scale)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C + K, *)`` of packed states ``x``."""
        x, y = unpack(x, self.channels, self.code_ndim)
        v_x, v_y = self._evaluate(x, y, t, 1 - t if self.across else t)
        if self.scale != 1:
            v_null, _ = self._evaluate(x, torch.zeros_like(y), t, torch.ones_like(t))
            v_x = combine(v_x, v_null, self.scale)
        if isinstance(cond, Tensor):
            v_y = v_y * expand_like(cond, v_y)
        return pack(v_x, -v_y if self.across else v_y)

    def _evaluate(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        self.rows += len(x)
        return self.flow(x, y, t, s)


class ImageVelocity:
    """The velocity of images given labels, for flows of two times: labels stay as they are.

    Args:
        flow: The joint flow.
        condition: Makes codes ``(B, *)`` of a condition, and says which are hidden ``(B,)``.
    """

    def __init__(self, flow: JointFlow, condition: Callable[[Cond], tuple[Tensor, Tensor]]):
        self.flow, self.condition = flow, condition

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C, *)`` at ``x (B, C, *)`` and ``t (B,)`` given labels ``cond``."""
        return self.bind(cond)(x, t)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> Velocity:
        """Encode the labels for one solve.

        Raises:
            RuntimeError: If the flow has one time, by which its labels would have to move.
        """
        if not self.flow.two_times:
            raise RuntimeError(
                "times must be 'two-time' for a velocity of images alone, got 'symmetric'; use "
                "solve, sample or generate"
            )
        y, hidden = self.condition(cond)

        def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
            s = hidden.to(t).expand(len(x))
            return self.flow(x, y.expand(len(x), *y.shape[1:]), t, s)[0]

        return velocity


def put_back(x0: Tensor, x1: Tensor, region: Tensor) -> Callback:
    """Keep images outside of a region on the straight path from ``x0`` to ``x1``.

    Args:
        x0: The noise ``(B, C, h, w)`` that the solve starts from.
        x1: The images or latents; outside of the region the solve ends at them exactly.
        region: Where to leave the solve alone, ``(B, H, W)``, at the size of the images. A latent
            cell that it touches is left alone as a whole.

    Returns:
        A callback of a sampler, for states that begin with the images' channels.

    Raises:
        ValueError: If the region is not one place per pixel.

    >>> x1, region = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
    >>> put_back(torch.zeros(1, 1, 1, 2), x1, region)(1, 0.25, torch.full((1, 1, 1, 2), 7.0))
    tensor([[[[7.0000, 0.2500]]]])
    """
    height, width = x1.shape[2:]
    if region.ndim != 3 or len(region) != len(x1) or region[0].numel() < height * width:
        raise ValueError(
            f"region must have shape (B, H, W), one place per pixel, got {tuple(region.shape)}"
        )
    cells = F.adaptive_max_pool2d(region.to(x1)[:, None], (height, width)) > 0

    def callback(step: int, t: float, state: Tensor) -> Tensor:
        image, rest = state[:, : x1.shape[1]], state[:, x1.shape[1] :]
        return torch.cat([torch.where(cells, image, torch.lerp(x0, x1, t)), rest], 1)

    return callback


def _code_velocity(flow: JointFlow) -> Velocity:
    """The velocity of codes given images, which are the condition; for flows of two times."""

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return flow(cast(Tensor, cond), x, torch.ones_like(t), t)[1]

    return velocity


def pack(x: Tensor, y: Tensor) -> Tensor:
    """Join images ``(B, C, *)`` and codes to states ``(B, C + K, *)``; ``(B, K)`` as planes.

    >>> pack(torch.zeros(2, 1, 4, 4), torch.ones(2, 3))[0, :, 0, 0]
    tensor([0., 1., 1., 1.])
    """
    if y.ndim < x.ndim:
        y = y.reshape(*y.shape, *(1,) * (x.ndim - 2)).expand(*y.shape, *x.shape[2:])
    return torch.cat([x, y], 1)


def unpack(state: Tensor, channels: int, code_ndim: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: images, and codes of ``code_ndim`` dimensions, being the means of planes."""
    x, y = state[:, :channels], state[:, channels:]
    return x, y if code_ndim == state.ndim else y.flatten(2).mean(2)


def _times(weight: Tensor | None, factor: Tensor) -> Tensor:
    return factor if weight is None else weight * factor


def _mean_square(error: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of squares over what the weight counts."""
    if weight is None:
        return error.square().mean()
    weight = weight.to(error.dtype).expand(error.shape)
    count = weight.sum()
    # Ranks' losses are averaged: each is divided by the same count. Only training has them in step.
    count = mean_over_ranks(count) if torch.is_grad_enabled() else count
    return (weight * error.square()).sum() / count.clamp_min(1e-12)
