"""Measures of separated sounds and converted voices."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_finite, check_same_shape


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio in dB ``(B,)`` of waves ``(B, T)``.

    ``10 log10(‖a s‖² / ‖a s − ŝ‖²)`` with ``a = ⟨ŝ, s⟩ / ‖s‖²`` and both waves of zero mean. Only
    waves with the phase of the target can be measured: a vocoder's are far off by nature.

    Source: Le Roux et al. 2019 (arXiv 1811.02508), equation 5.

    Args:
        estimate: Estimated waves.
        target: True waves of the same shape.

    Raises:
        ValueError: If the shapes differ, a value is not finite, or a target is silent.

    >>> a = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    >>> si_sdr(3 * a + 0.3 * torch.tensor([[1.0, 1.0, -1.0, -1.0]]), a).item()
    20.0
    """
    check_same_shape(estimate, target, ("estimate", "target"))
    for name, wave in (("estimate", estimate), ("target", target)):
        check_finite(wave, name)
    s, e = (wave.double() - wave.double().mean(-1, keepdim=True) for wave in (target, estimate))
    energy = s.square().sum(-1)
    if not bool((energy > 0).all()):
        raise ValueError("target must not be silent, got a constant wave")
    projected = ((e * s).sum(-1) / energy)[..., None] * s
    signal, rest = projected.square().sum(-1), (projected - e).square().sum(-1)
    return (10 * torch.log10(signal / rest)).to(estimate.dtype)


def si_sdr_improvement(estimate: Tensor, target: Tensor, mixture: Tensor) -> Tensor:
    """Return by how many dB ``(B,)`` an estimate is better than the mixture itself."""
    return si_sdr(estimate, target) - si_sdr(mixture, target)


def log_mel_error(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference ``(B,)`` of natural log-mels ``(B, n_mels, T)`` in dB.

    >>> log_mel_error(torch.ones(1, 2, 3), torch.zeros(1, 2, 3))
    tensor([8.6859])
    """
    check_same_shape(estimate, target, ("estimate", "target"))
    return (estimate - target).abs().flatten(1).mean(1) * (20 / np.log(10))


def mel_cepstral_distortion(estimate: Tensor, target: Tensor, coefficients: int = 13) -> float:
    """Return the mel-cepstral distortion in dB of two utterances of any lengths.

    ``(10 √2 / ln 10) · mean ‖c − ĉ‖`` over the frames of the best alignment (dynamic time warping),
    with cepstral coefficients 1 to 13 of natural log-mels, ``L = c₀ + Σ c_m cos(π m (k + ½) / K)``
    in band ``k`` of ``K``: the level ``c₀`` is left out. So it is the root mean square over the
    bands of the difference in dB of what 13 coefficients keep, for any number of bands.

    Source: Kubichek, *Mel-cepstral distance measure*, 1993.

    Args:
        estimate: Log-mels ``(n_mels, T)``.
        target: Log-mels ``(n_mels, S)``.
        coefficients: Number of coefficients, below ``n_mels``.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    from scipy.fft import dct

    if estimate.ndim != 2 or target.ndim != 2 or len(estimate) != len(target):
        raise ValueError(
            f"estimate and target must be (n_mels, frames) with equal n_mels, got "
            f"{tuple(estimate.shape)} and {tuple(target.shape)}"
        )
    check_at_least(coefficients, 1, "coefficients")
    check_at_least(len(estimate) - 1, coefficients, "n_mels - 1")
    a, b = (
        np.asarray(dct(log_mel.double().numpy(), axis=0))[1 : coefficients + 1].T / len(log_mel)
        for log_mel in (estimate, target)
    )
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return float(10 * np.sqrt(2) / np.log(10) * distances[tuple(aligned(distances))].mean())


def variance_ratio(estimate: Tensor, target: Tensor) -> float:
    """Return the variance of log-mels over time, as a ratio to that of others; 1 is as lively.

    The variances are averaged over the bands. A mean of all ways to say something is smooth, and
    has a ratio below 1.

    Args:
        estimate: Log-mels ``(n_mels, T)``, of any length.
        target: Log-mels ``(n_mels, S)``.

    Raises:
        ValueError: If the target does not change over time.

    >>> wave = torch.tensor([[-1.0, 1.0]])
    >>> variance_ratio(0.5 * wave, wave)
    0.25
    """
    own, given = (float(x.double().var(1, correction=0).mean()) for x in (estimate, target))
    if not given > 0:
        raise ValueError("target must change over time, got constant log-mels")
    return own / given


def aligned(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the path of least total cost through ``(T, S)``, by dynamic time warping.

    It leads from the first to the last pair in steps of one frame in one or both of the two.

    >>> aligned(np.array([[0.0, 1.0], [1.0, 0.0]]))
    (array([0, 1]), array([0, 1]))
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for k in range(2, rows + columns + 1):  # all pairs i + j = k at once
        i = np.arange(max(1, k - columns), min(rows, k - 1) + 1)
        j = k - i
        best = np.minimum(total[i - 1, j - 1], np.minimum(total[i - 1, j], total[i, j - 1]))
        total[i, j] = costs[i - 1, j - 1] + best
    i, j, path = rows, columns, []
    while i and j:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: total[at])
    first, second = zip(*reversed(path), strict=True)
    return np.array(first), np.array(second)


def word_error_rate(heard: Sequence[str], true: Sequence[str]) -> float:
    """Return the words inserted, deleted and replaced in all texts, per word of the true texts.

    Case and punctuation do not count.

    Args:
        heard: Texts as recognized.
        true: Texts as spoken, in the same order.

    Raises:
        ValueError: If the numbers of texts differ, or no word is spoken.

    >>> word_error_rate(["the cat sat"], ["The black cat sat."])
    0.25
    """
    wrong, spoken = word_errors(heard, true).sum(0).tolist()
    return wrong / spoken


def word_error_rate_stderr(heard: Sequence[str], true: Sequence[str]) -> float:
    """Return the standard error of `word_error_rate`, since other texts give another rate.

    It is that of a ratio of sums over N texts, with e_k wrong of n_k words,
    ``√(N / (N − 1) Σ_k (e_k − r n_k)²) / Σ_k n_k``, and infinite for one text. Source: Cochran,
    *Sampling Techniques*, 1977, section 2.11.

    >>> round(word_error_rate_stderr(["one two", "six"], ["one two", "one two"]), 3)
    0.5
    """
    wrong, spoken = word_errors(heard, true).T.double()
    if len(wrong) == 1:
        return math.inf
    left = wrong - wrong.sum() / spoken.sum() * spoken
    share = len(left) / (len(left) - 1)
    return float((share * left.square().sum()).sqrt() / spoken.sum())


def word_errors(heard: Sequence[str], true: Sequence[str]) -> Tensor:
    """Return the numbers of wrong and of true words of each text ``(N, 2)``.

    See `word_error_rate`.
    """
    if len(heard) != len(true):
        raise ValueError(f"heard must hold {len(true)} texts like true, got {len(heard)}")
    pairs = [(_words(a), _words(b)) for a, b in zip(heard, true, strict=True)]
    check_at_least(sum(len(b) for _, b in pairs), 1, "number of spoken words")
    return torch.tensor([[_edits(a, b), len(b)] for a, b in pairs])


def _words(text: str) -> list[str]:
    kept = "".join(c if c.isalnum() or c.isspace() or c == "'" else " " for c in text.lower())
    return kept.split()


def _edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the Levenshtein distance of two sequences."""
    before = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        now = [i]
        for j, other in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (word != other)))
        before = now
    return before[-1]
