"""Separation by a run: recordings of any length, and measures on test mixtures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.audio import (
    LogMel,
    MelStates,
    by_windows,
    frame_noise,
    log_mel_error,
    mixture_phase,
    si_sdr,
)
from flowkit.checks import check_between
from flowkit.data import Mixtures
from flowkit.data.mixtures import Sounds
from flowkit.metrics import ConvClassifier, frechet_distance
from flowkit.runs.run import Run
from flowkit.runs.sounds import FEATURES, as_images, classifier_of, data_of
from flowkit.sampling import Sampler, sample_seeds, seeded_noise
from flowkit.types import take


@dataclass(frozen=True, eq=False)
class Separator:
    """A run that separates sounds, with its map of states and its encoder of texts.

    Args:
        run: The run.
        data: Its data module, which need not be set up.
        sampler: The solver and its grid.
    """

    run: Run
    data: Mixtures
    sampler: Sampler

    @classmethod
    def of(cls, run: Run, sampler: Sampler) -> "Separator":
        """Build the parts of a run.

        Raises:
            TypeError: If the run was not trained on mixtures of sounds.
            ValueError: If spectrogram or encoder are not those of the training.
        """
        words = "mixtures of sounds (data=instruments or captioned_audio)"
        return cls(run, data_of(run, Mixtures, words), sampler)

    @property
    def states(self) -> MelStates:
        """Map between log-mels and states."""
        return self.data.states

    @property
    def mel(self) -> LogMel:
        """The spectrogram."""
        return self.states.mel

    def answers(self, frames: Tensor, texts: Mapping[str, Tensor], x0: Tensor) -> Tensor:
        """Return log-mels ``(B, n_mels, T)`` of the sounds that texts ask for.

        Args:
            frames: States of the mixtures.
            texts: Codes of the texts.
            x0: Noise ``(B, *)``.
        """
        module = self.run.module
        cond = {"frames": frames, **texts}
        found = module.solve(x0, self.sampler, cond, self.run.guidance).x
        return self.states.decode(module.autoencoder.decode(found).float().cpu())

    def separate(self, wave: Tensor, text: str, seed: int, overlap: int) -> tuple[Tensor, Tensor]:
        """Separate a recording of any length.

        Windows of the length of training overlap, and the noise belongs to the frames, so they meet
        without seams. Silence fills the last window.

        Args:
            wave: The recording ``(S,)``.
            text: Names the sound.
            seed: Seed of the noise.
            overlap: Frames that neighboring windows share.

        Returns:
            The sound ``(S,)`` with the phase of the recording, and its log-mel ``(n_mels, T)``.
        """
        size, hop = self.data.frames, self.mel.hop
        texts = self.data.query([text])
        frames = self.mel.frames(len(wave))
        factor = size // self._shape()[1]
        check_between(overlap, 0, size - factor, "overlap")
        step = (size - overlap) // factor * factor  # windows begin with a frame of a latent
        count = max(0, -(-(frames - size) // step))
        spare = (size + count * step - 1) * hop + hop // 2 - len(wave)
        heard = self.mel(torch.nn.functional.pad(wave[None], (0, max(0, spare))))

        def answer(part: Tensor, start: int) -> Tensor:
            x0 = self._noise(start // factor, seed)
            return self.answers(self.states.encode(part), texts, x0[None])

        found = by_windows(answer, heard, size, size - step)[..., :frames]
        return mixture_phase(found, wave[None], self.mel)[0], found[0]

    def _shape(self) -> tuple[int, int, int]:
        """Return channels, frames and bands of a state; a sequence has one band."""
        shape = self.run.sample_shape
        return (shape[0], shape[1], 1) if len(shape) == 2 else cast(Any, shape)

    def _noise(self, start: int, seed: int) -> Tensor:
        """Return the noise of a window from its first frame."""
        channels, frames, bands = self._shape()
        noise = frame_noise(channels * bands, start, frames, seed)
        return noise.reshape(channels, bands, frames).mT.reshape(self.run.sample_shape)


def measure(
    separator: Separator, count: int, answers: int, seed: int, seeding: int, batch_size: int
) -> tuple[dict[str, Any], Sounds, Tensor]:
    """Measure the answers to test mixtures, with their own texts and with those of absent sounds.

    Args:
        separator: The run.
        count: Number of mixtures, at most the size of the test split.
        answers: Answers to each mixture.
        seed: Seed of the noise.
        seeding: Version of the seeds of samples.
        batch_size: Mixtures per batch.

    Returns:
        The measures, the mixtures, and the log-mels of the first answers. ``si_sdr_improvement`` is
        in dB with the phase of the mixture; ``_best`` is that of the best answer to each mixture,
        ``_of_truth`` that of the true log-mel, the ceiling, and ``_of_other`` that of the answer to
        a text that names another sound of the mixture. Energies are those of the answers in dB
        relative to the mixtures. With classes of sounds, ``class_agreement`` and
        ``frechet_distance`` are those of log-mels by `classifier_of`, whose name and hash are
        ``features``. The distance is that to other single sounds, as many as mixtures; it is left
        out for less than 32 mixtures, which do not give a covariance of its 16 features.
    """
    split, run, mel = separator.data.listed("test"), separator.run, separator.mel
    # before the work, which it must fit
    network = None if separator.data.classes is None else classifier_of(separator.data)
    count = min(count, len(split))
    sounds, batch = split.sounds(slice(count)), split[slice(count)]
    frames = cast(dict[str, Tensor], batch.get("cond"))["frames"]
    texts = {name: separator.data.query(words) for name, words in _asked(sounds).items()}

    def answered(name: str, number: int) -> Tensor:
        seeds = sample_seeds(seed, number * count, count, seeding)
        found = []
        for start in range(0, count, batch_size):
            rows = slice(start, min(count, start + batch_size))
            x0 = seeded_noise(run.sample_shape, seeds[rows])
            codes = cast(dict[str, Tensor], take(texts[name], rows))
            found.append(separator.answers(frames[rows], codes, x0))
        return torch.cat(found)

    truth = mel(sounds.target)
    before = si_sdr(sounds.mixture, sounds.target)
    heard = [answered("present", number) for number in range(answers)]
    waves = [mixture_phase(one, sounds.mixture, mel) for one in heard]
    gains = torch.stack([si_sdr(wave, sounds.target) - before for wave in waves])
    absent, other = (
        mixture_phase(answered(name, 0), sounds.mixture, mel) for name in ("absent", "other")
    )
    ideal = mixture_phase(truth, sounds.mixture, mel)
    metrics: dict[str, Any] = {
        "num_mixtures": count,
        "si_sdr_improvement": _mean(gains[0]),
        "si_sdr_improvement_stderr": float(gains[0].std() / count**0.5) if count > 1 else 0.0,
        "si_sdr_improvement_best": _mean(gains.amax(0)),
        "si_sdr_improvement_of_truth": _mean(si_sdr(ideal, sounds.target) - before),
        "si_sdr_improvement_of_other": _mean(si_sdr(other, sounds.target) - before),
        "log_mel_error": _mean(log_mel_error(heard[0], truth)),
        "log_mel_error_of_mixture": _mean(log_mel_error(mel(sounds.mixture), truth)),
        "energy": _mean(_level(waves[0]) - _level(sounds.mixture)),
        "energy_of_target": _mean(_level(sounds.target) - _level(sounds.mixture)),
        "energy_of_absent": _mean(_level(absent) - _level(sounds.mixture)),
    }
    if network is not None:
        fresh = replace(split, size=2 * count).sounds(slice(count, 2 * count)).target
        shown = {"": heard[0], "_of_mixture": mel(sounds.mixture), "_of_truth": truth}
        metrics |= _kinds(network, shown, sounds.kinds, mel(fresh))
        metrics["features"] = {"name": network.name, "hash": network.hash}
    return metrics, sounds, heard[0]


def _kinds(
    network: ConvClassifier, shown: Mapping[str, Tensor], kinds: Tensor, fresh: Tensor
) -> dict[str, float]:
    """Return how often log-mels are of the kind asked for, and their distance to single sounds."""
    metrics, single = {}, network(as_images(fresh))
    for name, log_mels in shown.items():
        images = as_images(log_mels)
        agreement = (network.logits(images).argmax(1) == kinds).double()
        metrics[f"class_agreement{name}"] = _mean(agreement)
        if len(images) >= 2 * FEATURES:  # fewer do not give a covariance
            metrics[f"frechet_distance{name}"] = frechet_distance(network(images), single)
    return metrics


def _asked(sounds: Sounds) -> dict[str, Sequence[str]]:
    """Return texts of the sounds asked for, of absent ones, and of others in the mixtures."""
    others = [texts[0] for texts in sounds.others]
    return {"present": sounds.captions, "absent": sounds.absent, "other": others}


def _level(waves: Tensor) -> Tensor:
    """Return the energy of waves ``(B, S)`` in dB ``(B,)``; silence has -120."""
    return 10 * torch.log10(waves.double().square().mean(1).clamp_min(1e-12))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
