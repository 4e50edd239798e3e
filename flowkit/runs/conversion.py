"""Conversion of voices by a run: recordings of any length, and measures on test pairs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.audio import (
    LogMel,
    MelStates,
    by_windows,
    check_reference,
    frame_noise,
    hear,
    leveled,
    mel_cepstral_distortion,
    variance_ratio,
    word_error_rate,
    word_error_rate_stderr,
)
from flowkit.audio.vocoders import Vocoder
from flowkit.checks import check_between, check_finite, check_floating
from flowkit.data import Speech
from flowkit.data.speech import Windows
from flowkit.runs.run import Run
from flowkit.runs.sounds import data_of
from flowkit.sampling import Sampler
from flowkit.types import Cond

ENROLLED = 10  # utterances that stand for a voice
FRAMES = 64  # of the log-mel that a vocoder is tried on


@dataclass(frozen=True, eq=False)
class Converter:
    """A run that converts voices, with its map of states and its encoder of voices.

    Args:
        run: The run.
        data: Its data module, which need not be set up.
        sampler: The solver and its grid.
        vocoder: Makes waves of log-mels.
    """

    run: Run
    data: Speech
    sampler: Sampler
    vocoder: Vocoder

    @classmethod
    def of(cls, run: Run, sampler: Sampler, vocoder: Vocoder) -> "Converter":
        """Build the parts of a run.

        Raises:
            TypeError: If the run was not trained on speech, or the vocoder returns no waves.
            ValueError: If spectrogram or encoder are not those of the training, or the vocoder
                does not fit the spectrogram.
        """
        data = data_of(run, Speech, "speech (data=voices or speech)")
        one = cls(run, data, sampler, vocoder)
        one._try()
        return one

    @property
    def states(self) -> MelStates:
        """Map between log-mels and states."""
        return self.data.states

    @property
    def mel(self) -> LogMel:
        """The spectrogram."""
        return self.states.mel

    def voice(self, reference: Tensor) -> dict[str, Tensor]:
        """Return the part of the condition that a reference ``(S,)`` gives.

        The embedding is that of the whole reference; the frames that are attended to are in its
        middle.

        Raises:
            ValueError: If the reference is shorter than half a second, or silent.
        """
        check_reference(reference, self.mel.rate)
        states = self.states.of_waves(leveled(reference)[None])
        start = max(0, states.shape[-1] - self.data.reference) // 2
        tokens = states[..., start : start + self.data.reference].mT
        return {
            "vector": self.data.speaker([reference]),
            "tokens": tokens,
            "token_mask": torch.ones(tokens.shape[:2], dtype=torch.bool),
        }

    def convert(
        self, wave: Tensor, reference: Tensor, seed: int, overlap: int
    ) -> tuple[Tensor, Tensor]:
        """Say what a recording of any length says in the voice of a reference.

        Windows of the length of training overlap, and the noise belongs to the frames, so they meet
        without seams. The end of the last window is masked.

        Args:
            wave: The recording ``(S,)``.
            reference: A recording ``(R,)`` of the voice.
            seed: Seed of the noise.
            overlap: Frames that neighboring windows share.

        Returns:
            The conversion ``(S,)``, and its log-mel ``(n_mels, T)``.
        """
        size, mel = self.data.frames, self.mel
        check_between(overlap, 0, size - 1, "overlap")
        voice, heard = self.voice(reference), self.states.of_waves(leveled(wave)[None])
        frames = heard.shape[-1]

        def answer(part: Tensor, start: int) -> Tensor:
            mask = (torch.arange(start, start + size) < frames)[None]
            x0 = frame_noise(mel.n_mels, start, size, seed)[None]
            return self._answers(x0, {"frames": part, "frame_mask": mask, **voice})

        log_mel = by_windows(answer, heard, size, overlap)
        found = self.wave(log_mel)
        found = F.pad(found, (0, max(0, len(wave) - len(found))))[: len(wave)]
        return found, log_mel[0]

    @torch.no_grad()
    def wave(self, log_mel: Tensor) -> Tensor:
        """Return the wave ``(S,)`` that the vocoder makes of a log-mel ``(1, n_mels, T)``."""
        return self.vocoder(log_mel, self.mel)[0].detach().float().cpu()

    @torch.no_grad()
    def _try(self) -> None:
        """Require a vocoder of the spectrogram's hop, by the silence of 64 frames."""
        mel = self.mel
        silence = torch.full((1, mel.n_mels, FRAMES), mel.floor).log()
        waves = self.vocoder(silence, mel)
        check_floating(waves, "vocoder")
        low, high = (FRAMES - 1) * mel.hop, (FRAMES + 2) * mel.hop
        if tuple(waves.shape[:-1]) != (1,) or not low <= waves.shape[-1] < high:
            raise ValueError(
                f"vocoder must return waves (B, S) of log-mels (B, {mel.n_mels}, T) with "
                f"S = T * {mel.hop} or about that, got {tuple(waves.shape)} for {FRAMES} frames"
            )
        check_finite(waves, "vocoder")

    def _answers(self, x0: Tensor, cond: Cond) -> Tensor:
        """Return log-mels ``(B, n_mels, T)``."""
        module = self.run.module
        found = module.solve(x0, self.sampler, cond, self.run.guidance).x
        return self.states.decode(module.autoencoder.decode(found).float().cpu())


class Converted(NamedTuple):
    """A conversion of the test split."""

    source: Tensor
    """Wave of what is said."""
    reference: Tensor
    """Wave of the voice."""
    answer: Tensor
    """The conversion."""
    log_mel: Tensor
    """Its log-mel."""
    truth: Tensor | None
    """The same text in the voice, if there is such an utterance."""


def measure(
    converter: Converter,
    count: int,
    seed: int,
    overlap: int,
    words: bool,
    targets: Sequence[str] | None = None,
) -> tuple[dict[str, float], list[Converted]]:
    """Measure conversions between voices of the test split.

    Args:
        converter: The run.
        count: Number of conversions.
        seed: Seed of the noise.
        overlap: Frames that neighboring windows share.
        words: Whether to recognize words, which takes seconds for each second of speech.
        targets: Names of the voices to convert to; None means all.

    Returns:
        The measures, and the conversions. Similarities are cosines of an embedding with the mean
        embedding of up to 10 utterances of a voice, and an answer is classified as the voice with
        the largest one. ``_of_source`` is measured on the sources as they are, ``_of_truth`` on
        true utterances after the vocoder: floor and ceiling. ``_stderr`` is a standard error.

    Raises:
        ImportError: If words are to be recognized without a recognizer.
    """
    split, mel = converter.data.listed("test"), converter.mel
    pairs, found, seconds = split.pairs(count, targets), [], 0.0
    texts = [split.utterances.texts[pair.source] for pair in pairs]
    known = [k for k, text in enumerate(texts) if text is not None]
    if words and known:
        hear([])  # a missing recognizer is told now and not after the work
    for k, pair in enumerate(pairs):
        source, reference = split.wave(pair.source), split.wave(pair.reference)
        begun = time.perf_counter()
        answer, log_mel = converter.convert(source, reference, seed + k, overlap)
        seconds += time.perf_counter() - begun
        truth = None if pair.truth is None else split.wave(pair.truth)
        found.append(Converted(source, reference, answer, log_mel, truth))
    true = [one for one in found if one.truth is not None]
    waves = [one.truth for one in true if one.truth is not None]
    again = [converter.wave(mel(wave[None])) for wave in waves]
    length = sum(len(one.source) for one in found) / mel.rate
    metrics = {"num_pairs": count, "real_time_factor": seconds / length}
    speakers = split.utterances.speakers
    wanted = [speakers[pair.reference] for pair in pairs]
    before = [speakers[pair.source] for pair in pairs]
    metrics |= _voices(converter, split, found, again, wanted, before)
    if true:
        log_mels = [
            (one.log_mel, mel(one.truth[None])[0], mel(one.source[None])[0])
            for one in true
            if one.truth is not None
        ]
        metrics |= {
            "mcd": _mean([mel_cepstral_distortion(a, b) for a, b, _ in log_mels]),
            "mcd_of_source": _mean([mel_cepstral_distortion(c, b) for _, b, c in log_mels]),
            "variance_ratio": _mean([variance_ratio(a, b) for a, b, _ in log_mels]),
        }
    if words and known:
        said = [text for text in texts if text is not None]
        heard = hear([found[k].answer for k in known])
        metrics["wer"] = word_error_rate(heard, said)
        metrics["wer_stderr"] = word_error_rate_stderr(heard, said)
        metrics["wer_of_source"] = word_error_rate(hear([found[k].source for k in known]), said)
        if len(true) == len(known) == count:
            metrics["wer_of_truth"] = word_error_rate(hear(again), said)
    return metrics, found


def _voices(
    converter: Converter,
    split: Windows,
    found: Sequence[Converted],
    again: Sequence[Tensor],
    targets: Sequence[int],
    sources: Sequence[int],
) -> dict[str, float]:
    """Return the measures of whose voice the answers have."""
    speakers = sorted(set(split.utterances.speakers))
    enrolled = [split.of_speaker(one)[:ENROLLED] for one in speakers]
    voices = torch.stack(
        [F.normalize(torch.stack([*map(split.embedding, own)]).mean(0), dim=0) for own in enrolled]
    )
    target, source = (voices[[speakers.index(one) for one in own]] for own in (targets, sources))
    answers = converter.data.speaker([one.answer for one in found])
    before = converter.data.speaker([one.source for one in found])
    closest = torch.tensor(speakers)[(answers @ voices.T).argmax(1)]
    metrics = {
        "similarity_to_target": _mean((answers * target).sum(1).tolist()),
        "similarity_to_source": _mean((answers * source).sum(1).tolist()),
        "similarity_to_target_of_source": _mean((before * target).sum(1).tolist()),
        "classified_as_target": _mean((closest == torch.tensor(targets)).double().tolist()),
    }
    if len(again) == len(found):
        true = converter.data.speaker(again)
        metrics["similarity_to_target_of_truth"] = _mean((true * target).sum(1).tolist())
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
