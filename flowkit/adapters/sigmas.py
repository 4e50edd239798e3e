"""Grids as the noise levels of diffusers' flow-matching pipelines."""

from collections.abc import Sequence

from torch import Tensor

from flowkit.checks import as_grid, check_positive


def to_sigmas(grid: Tensor | Sequence[float] | int, shift: float = 1.0) -> list[float]:
    """Return a grid as ``sigmas=`` of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    ``σ = 1 − t`` at the start of each step; the scheduler appends the last one, 0, itself. It also
    shifts what it is given, ``σ ↦ shift σ / (1 + (shift−1) σ)``, which is undone beforehand, so
    that the pipeline steps exactly on the grid. Its Euler steps are then flowkit's, with
    ``v(x, t) = −model(x, 1000 (1 − t))``.

    Args:
        grid: Times ending at 1, or a number of uniform steps. A grid that starts after 0 is for
            image to image.
        shift: The scheduler's own: ``scheduler.config.shift``, 3 for Stable Diffusion 3; with
            ``use_dynamic_shifting`` it is ``exp(mu)``.

    Raises:
        ValueError: If the grid does not end at 1.

    >>> to_sigmas([0.0, 0.5, 1.0])
    [1.0, 0.5]
    >>> to_sigmas([0.0, 0.5, 1.0], shift=3.0)
    [1.0, 0.25]
    """
    times = as_grid(grid)
    check_positive(shift, "shift")
    if times[-1] != 1:
        raise ValueError(
            f"grid must end at 1, got {times[-1].item():.6g}; the scheduler's last sigma is 0"
        )
    sigmas = 1 - times[:-1]
    return (sigmas / (shift + (1 - shift) * sigmas)).tolist()
