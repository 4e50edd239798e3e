"""Joint flow of an image and its label: one network, two states, one or two times.

    x_t = (1 − t) ξ_x + t x₁       v_x = x₁ − ξ_x        image: noise at t = 0, data at t = 1
    y_s = (1 − s) y₀  + s ξ_y      v_y = ξ_y − y₀        label: data at s = 0, noise at s = 1

Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634). The paper has
``s = t``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import at_least_float32, check_same_shape, check_samples, expand_like
from flowkit.distributed import mean_over_ranks
from flowkit.guidance import combine
from flowkit.losses import check_mask
from flowkit.paths import Linear, noise_like
from flowkit.sampling import ODESampler, Solution
from flowkit.types import Cond
from flowkit.velocity import Velocity

PATH = Linear()


@dataclass(frozen=True, eq=False)
class JointFlow:
    """The velocities of image and code, computed by one network on both states.

    The states are concatenated along dimension 1. A code ``(B, K)`` of images ``(B, C, H, W)``
    enters as ``K`` constant planes, and the means of the network's last ``K`` planes are the
    velocity of the code.

    Args:
        network: Called as ``network(state, t)`` on states ``(B, C + K, *)``.
        two_times: If True, the network takes the times ``(t, s)`` as ``t (B, 2)``. If False, it
            takes ``t (B,)`` only, and ``s = t``.

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
        """Compute the velocities of image and code.

        Args:
            x: Images ``(B, C, *)``.
            y: Codes ``(B, K)`` or ``(B, K, *)``.
            t: Times ``(B,)`` of the images.
            s: Times ``(B,)`` of the codes; ignored by a network of one time.

        Returns:
            The velocities, of the shapes of ``x`` and ``y``.

        Raises:
            ValueError: If the network takes or returns states or times of other shapes.
        """
        state, times = pack(x, y), torch.stack([t, s], 1) if self.two_times else t
        try:
            v = self.network(state, times)
        except ValueError as error:
            raise ValueError(
                f"velocity must take image and code of shape {tuple(state.shape)} and times of "
                f"shape {tuple(times.shape)}, got an error: {error}; build the network with "
                f"{state.shape[1]} channels, no classes and num_times={1 + self.two_times}, or, "
                "for two times, put one with 1 more channel into flowkit.symmetrical.TwoTimes"
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
        """Compute the losses ``E ‖v̂_x − v_x‖²`` and ``E ‖v̂_y − v_y‖²`` at random times.

        With one time, ``t`` is uniform in [0, 1]. With two times, a share ``boundary_share`` of the
        pairs ``(t, s)`` lies on the boundary of the unit square, and the others are uniform inside.
        Half of the pairs on the boundary have a clean label (``s = 0``), half a clean image
        (``t = 1``). The solves of the flow never move a clean side. Its velocity would be noise
        that the network cannot know, so that the loss leaves it out. Half of the pairs with a
        clean image have pure noise as label (``s = 1``), since a solve of the label starts there.
        At other times the network can read the label from its noisy code: a class that every pixel
        of a mask repeats is visible through much noise. There the network need not learn to read
        the label from the image.

        Args:
            x1: Images ``(B, C, *)``.
            y0: Dequantized codes ``(B, K)`` or ``(B, K, *)``.
            x0: Noise of the images ``(B, C, *)``; None to draw it.
            mask: Weights of the images' elements, broadcastable to ``x1``; None for 1 everywhere.
            label_weight: Weights of the codes' elements, broadcastable to ``y0``; None for 1
                everywhere.
            boundary_share: Share, in [0, 1], of pairs with one clean side; for two times.
            label_dropout: Probability of hiding a label. A hidden label has zeros as its code and
                no loss. With two times its time is ``s = 1``.
            generator: Draws noise, times and hidden labels.

        Raises:
            TypeError: If ``x1`` is not a tensor of floats, or ``mask`` not one of real numbers.
            ValueError: If there is no sample, or shapes differ.

        Returns:
            The loss of the images and the loss of the labels. Each is a weighted mean over its own
            elements.
        """
        check_samples(x1, "x1", floating=True)
        if mask is not None:
            check_mask(mask, x1)
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
        """Move noise ``x0`` to images and codes ``y`` to noise, from ``t = s = 0`` to 1.

        This is for flows of one time. Flows of two times have an `ImageVelocity`, which keeps the
        codes as they are.

        Args:
            sampler: Solver and grid.
            x0: Noise ``(B, C, *)``.
            y: Codes ``(B, K)`` or ``(B, K, *)``.
            known: Booleans ``(B,)``: True for samples with a label. The other codes must be zeros
                and stay zeros.
            scale: Scale of guidance; 1 turns guidance off.
            **options: Other arguments of ``sampler.solve``. A callback sees the images and, behind
                them on dimension 1, their codes.

        Returns:
            The solution, with states and path of the images only.
        """
        field, channels = JointField(self, x0.shape[1], y.ndim, scale=scale), x0.shape[1]
        solution = sampler.solve(field, pack(x0, y), known, **options)
        path = None if solution.path is None else solution.path[:, :, :channels]
        return solution._replace(x=solution.x[:, :channels], path=path)

    def solve_codes(
        self, sampler: ODESampler, x1: Tensor, noise: Tensor, *, return_path: bool = False
    ) -> Solution:
        """Move label noise to the codes of images, from ``s = 1`` to 0.

        Args:
            sampler: Solver and grid; it is run backwards.
            x1: Images ``(B, C, *)``. With two times they stay as they are.
            noise: Noise ``(B, K)`` or ``(B, K, *)``.
            return_path: Whether to keep the codes at all times of the grid, from 1 to 0.

        Returns:
            The solution, with states and path of the codes only.
        """
        if self.two_times:
            return sampler.invert(_code_velocity(self), noise, x1, return_path=return_path)
        channels, field = x1.shape[1], JointField(self, x1.shape[1], noise.ndim)
        solution = sampler.invert(field, pack(x1, noise), return_path=return_path)
        path = solution.path
        if path is not None:
            path = torch.stack([unpack(state, channels, noise.ndim)[1] for state in path])
        return solution._replace(x=unpack(solution.x, channels, noise.ndim)[1], path=path)

    def solve_pairs(self, sampler: ODESampler, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Move noise to images and their codes at once; for flows of two times.

        Args:
            sampler: Solver and grid.
            x0: Noise ``(B, C, *)`` of the images.
            noise: Noise ``(B, K)`` or ``(B, K, *)`` of the codes.

        Returns:
            Images and codes, of the shapes of their noise.
        """
        field = JointField(self, x0.shape[1], noise.ndim, across=True)
        return unpack(sampler(field, pack(x0, noise)), x0.shape[1], noise.ndim)

    def _draw_times(
        self,
        batch: int,
        device: torch.device,
        share: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw the times ``t (B,)`` of images and ``s (B,)`` of labels, see `loss`."""
        if not self.two_times:
            t = torch.rand(batch, device=device, generator=generator)
            return t, t
        t, s, side = torch.rand(3, batch, device=device, generator=generator)
        t = torch.where((side >= share / 2) & (side < share), 1.0, t)
        s = torch.where((side >= share * 3 / 4) & (side < share), 1.0, s)
        return t, torch.where(side < share / 2, 0.0, s)


class JointField:
    """The velocity of image and code together, on the packed state, for one solve.

    Along the diagonal ``s = t``, the image moves to data and the label to noise. Across it, with
    ``s = 1 − t``, both move to data. The condition holds booleans ``(B,)``: False for a sample
    without a label, whose code does not move.

    Args:
        flow: The joint flow.
        channels: Number ``C`` of channels of the image.
        code_ndim: Number of dimensions of a batch of codes.
        across: True to move both to data.
        scale: Scale of guidance for the image's velocity; 1 turns guidance off.
    """

    def __init__(
        self,
        flow: JointFlow,
        channels: int,
        code_ndim: int,
        across: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.flow, self.channels, self.code_ndim = flow, channels, code_ndim
        self.across, self.scale, self.rows = across, scale, 0

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> "JointField":
        """Return a field that counts the network rows of one solve in ``rows``."""
        return JointField(self.flow, self.channels, self.code_ndim, self.across, self.scale)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Compute the velocity ``(B, C + K, *)`` of packed states ``x`` at times ``t (B,)``."""
        x, y = unpack(x, self.channels, self.code_ndim)
        v_null = None
        if self.scale != 1:
            v_null, _ = self._evaluate(x, torch.zeros_like(y), t, torch.ones_like(t))
            v_null = v_null.clone()  # a velocity may reuse its output buffer
        v_x, v_y = self._evaluate(x, y, t, 1 - t if self.across else t)
        if v_null is not None:
            v_x = combine(v_x, v_null, self.scale)
        if isinstance(cond, Tensor):
            v_y = v_y * expand_like(cond, v_y)
        return pack(v_x, -v_y if self.across else v_y)

    def _evaluate(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both velocities, and count the rows."""
        self.rows += len(x)
        return self.flow(x, y, t, s)


class ImageVelocity:
    """The velocity of images given labels, for flows of two times. The labels do not move.

    Args:
        flow: The joint flow.
        condition: Returns the codes ``(B, K)`` or ``(B, K, *)`` of a condition, and booleans
            ``(B,)``: True for a sample without a label.
    """

    def __init__(self, flow: JointFlow, condition: Callable[[Cond], tuple[Tensor, Tensor]]) -> None:
        self.flow, self.condition = flow, condition

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Compute the velocity of images ``x (B, C, *)`` at times ``t (B,)`` given labels.

        Raises:
            RuntimeError: If the flow has one time.
        """
        return self.bind(cond)(x, t)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> Velocity:
        """Encode the labels once, for one solve.

        Raises:
            RuntimeError: If the flow has one time, since its labels move with the images.
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


def _code_velocity(flow: JointFlow) -> Velocity:
    """Make the velocity of codes, whose condition is the images; for flows of two times."""

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return flow(cast(Tensor, cond), x, torch.ones_like(t), t)[1]

    return velocity


def pack(x: Tensor, y: Tensor) -> Tensor:
    """Join images ``(B, C, *)`` and codes to states ``(B, C + K, *)``.

    Codes ``(B, K, *)`` are joined as they are, codes ``(B, K)`` as constant planes.

    >>> pack(torch.zeros(2, 1, 4, 4), torch.ones(2, 3))[0, :, 0, 0]
    tensor([0., 1., 1., 1.])
    """
    if y.ndim < x.ndim:
        y = y.reshape(*y.shape, *(1,) * (x.ndim - 2)).expand(*y.shape, *x.shape[2:])
    return torch.cat([x, y], 1)


def unpack(state: Tensor, channels: int, code_ndim: int) -> tuple[Tensor, Tensor]:
    """Split states ``(B, C + K, *)`` into images and codes, the inverse of `pack`.

    Args:
        state: The states.
        channels: Number ``C`` of channels of the images.
        code_ndim: Number of dimensions of the codes. For 2, they are the means of their planes.

    >>> x, y = unpack(pack(torch.zeros(2, 1, 4, 4), torch.ones(2, 3)), channels=1, code_ndim=2)
    >>> x.shape, y.shape
    (torch.Size([2, 1, 4, 4]), torch.Size([2, 3]))
    """
    x, y = state[:, :channels], state[:, channels:]
    return x, y if code_ndim == state.ndim else y.flatten(2).mean(2)


def _times(weight: Tensor | None, factor: Tensor) -> Tensor:
    """Multiply a weight, of which None stands for 1, by a factor."""
    return factor if weight is None else weight * factor


def _mean_square(error: Tensor, weight: Tensor | None) -> Tensor:
    """Compute ``Σ w e² / Σ w`` of an error ``e`` and weights ``w``; None stands for ``w = 1``."""
    error = error.to(at_least_float32(error.dtype))
    if weight is None:
        return error.square().mean()
    weight = weight.to(error.dtype).expand(error.shape)
    count = weight.sum()
    # The losses of all ranks are averaged, so each is divided by the same count. Only in training
    # do all ranks reach this line together.
    count = mean_over_ranks(count) if torch.is_grad_enabled() else count
    return (weight * error.square()).sum() / count.clamp_min(1e-12)
