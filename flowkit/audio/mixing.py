"""Mixtures of two waves at a given ratio."""

import torch
from torch import Tensor

from flowkit.checks import check_finite, check_same_shape


def mix(target: Tensor, other: Tensor, snr_db: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the mixture and the target in it, with one gain for both and peaks within 1.

    ``mixture = g (target + a · other)`` with ``10 log10(‖target‖² / ‖a · other‖²) = snr_db`` and
    the largest ``g ≤ 1`` that keeps mixture and target within [-1, 1].

    Source: Yuan et al. 2024, *FlowSep* (arXiv 2409.07614), section 4.1: −15 to 15 dB.

    Args:
        target: Waves ``(B, T)``.
        other: Waves of the same shape.
        snr_db: Ratio of the energies in dB, one number or ``(B,)``.

    Raises:
        ValueError: If the shapes differ, a wave is silent, or a value is not finite.

    >>> mixture, target = mix(torch.ones(1, 4), torch.ones(1, 4), 20.0)
    >>> mixture, target
    (tensor([[1., 1., 1., 1.]]), tensor([[0.9091, 0.9091, 0.9091, 0.9091]]))
    """
    check_same_shape(target, other, ("target", "other"))
    if target.ndim != 2:
        raise ValueError(f"target must be (B, T), got {tuple(target.shape)}")
    energies = []
    for name, wave in (("target", target), ("other", other)):
        check_finite(wave, name)
        energies.append(wave.double().square().sum(1))
        if not bool((energies[-1] > 0).all()):
            row = int((energies[-1] <= 0).nonzero()[0, 0])
            raise ValueError(f"{name} must not be silent, got silence in row {row}")
    ratio = torch.as_tensor(snr_db, dtype=torch.float64, device=target.device)
    check_finite(ratio, "snr_db")
    scale = (energies[0] / energies[1] / 10 ** (ratio / 10)).sqrt()
    mixture = target + scale[:, None].to(target.dtype) * other
    peak = torch.maximum(mixture.abs().amax(1), target.abs().amax(1)).clamp_min(1)[:, None]
    return mixture / peak, target / peak
