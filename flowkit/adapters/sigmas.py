"""Grids as noise levels of diffusers' schedulers."""

from collections.abc import Sequence

from torch import Tensor

from flowkit.checks import as_grid, check_positive


def to_sigmas(grid: Tensor | Sequence[float] | int, shift: float = 1.0) -> list[float]:
    """Convert a grid to the argument ``sigmas`` of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    The noise levels are ``σ = 1 − t`` at the start of each step. The scheduler itself appends the
    last level 0. The scheduler also shifts the levels by ``σ ↦ shift σ / (1 + (shift−1) σ)``. This
    function applies the inverse shift first, so the pipeline steps exactly on the grid. The
    pipeline's Euler steps then equal flowkit's, with ``v(x, t) = −model(x, 1000 (1 − t))``.

    Args:
        grid: Times that end at 1, or a number of uniform steps. A grid with a start above 0 is for
            image-to-image pipelines.
        shift: Shift of the scheduler, positive: ``scheduler.config.shift``, which is 3 for Stable
            Diffusion 3. With ``use_dynamic_shifting``, the shift is ``exp(mu)``.

    Returns:
        Noise levels, one per step.

    Raises:
        ValueError: If the grid does not end at 1 or ``shift`` is not positive.

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
