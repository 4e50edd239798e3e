"""Published settings of FlowOpt for text-to-image pipelines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Published settings of FlowOpt for one pipeline at 1024x1024 pixels, with Euler steps.

    Args:
        num_steps: Number of steps ``T`` of the whole grid.
        num_kept: Number ``n`` of the last steps, which the solve uses.
        num_iters: Number ``N`` of updates.
        step_size: Fixed step size ``η``, without backtracking.
        source_guidance: ``guidance_scale`` of the source prompt.
        target_guidance: ``guidance_scale`` of the target prompt.

    Source: Ronai et al., *FlowOpt*, 2025 (arXiv 2510.22010).

    >>> SD3_EDITING.nfe, FLUX_EDITING.nfe, FLUX_INVERSION.nfe
    (121, 131, 321)
    """

    num_steps: int
    num_kept: int
    num_iters: int
    step_size: float
    source_guidance: float = 1.0
    target_guidance: float = 3.5

    @property
    def nfe(self) -> int:
        """Number of velocity evaluations, ``(n + 1) + (N + 1) n``."""
        return self.num_kept + 1 + (self.num_iters + 1) * self.num_kept


SD3_EDITING = Published(15, 12, 8, 0.01)
SD3_INVERSION = Published(10, 10, 30, 0.01)
FLUX_EDITING = Published(15, 13, 8, 0.0025)
FLUX_INVERSION = Published(10, 10, 30, 0.0025)
