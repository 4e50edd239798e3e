"""Pictures and sounds of samples during the training on mixtures or voices."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from flowkit.audio import griffin_lim, save_spectrograms, write_audio
from flowkit.checks import check_at_least
from flowkit.modules.callbacks import SampleGrid
from flowkit.modules.flow import Guidance
from flowkit.sampling import Sampler

SHARP = 60  # iterations of Griffin-Lim; more are not heard


class SampleSounds(SampleGrid):
    """Spectrograms and sounds of samples, saved at every validation from the same starts.

    A row of the picture holds a mixture of the first validation batch, the sound that is asked for
    and the sample; for voices a reference, the source and the sample, which says it in the same
    voice. The same three are written as audio by `flowkit.audio.griffin_lim`, which needs no phase:
    ``<folder>/step-<step>/<row>-mixture.wav`` and so on.

    Args:
        folder: The folder of the pictures, which are ``<folder>/step-<step>.png``.
        sampler: The solver and its grid; None means the default of `FlowModule.sample`.
        guidance: Scale of classifier-free guidance, or a function that wraps the velocity; None
            means no guidance.
        rows: Rows of the picture, at least 1.
        sounds: Rows that are also written as audio, at least 0.

    Raises:
        ValueError: If a number is out of range.
        TypeError: In training, if the data are no sounds.
    """

    widest = 1

    def __init__(
        self,
        folder: str | Path,
        sampler: Sampler | None = None,
        guidance: Guidance = None,
        rows: int = 4,
        sounds: int = 2,
    ) -> None:
        super().__init__(folder, sampler, guidance, rows)
        check_at_least(sounds, 0, "sounds")
        self.sounds = sounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other data before the work."""
        super().setup(trainer, pl_module, stage)
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "states"):
            raise TypeError(
                "callback.samples must be SampleGrid for data without sounds, got "
                f"{type(self).__name__} with {type(data).__name__}"
            )

    def save(self, samples: Tensor, file: Path, columns: int, batch: Any, data: Any) -> None:
        """Save mixtures, sounds and samples as a picture and as audio."""
        states, cond = data.states, batch["cond"]
        if "frame_mask" in cond:  # of voices, whose references are tokens
            mask = cond["frame_mask"][: len(samples), None].to(samples.device)
            drawn = torch.where(mask, samples, data.states.silence)  # padding holds noise
            kinds = {"reference": cond["tokens"].mT, "source": cond["frames"], "sample": drawn}
        else:
            kinds = {"mixture": cond["frames"], "target": batch["x1"], "sample": samples}
        shown = {name: states.decode(x[: self.rows].float().cpu()) for name, x in kinds.items()}
        panels = [
            (f"{name} {k}", log_mels[k])
            for k in range(len(shown["sample"]))
            for name, log_mels in shown.items()
        ]
        save_spectrograms(panels, file, states.mel, columns=3)
        count = min(self.sounds, len(shown["sample"]))
        if not count:
            return
        folder = file.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name, log_mels in shown.items():
            waves = griffin_lim(log_mels[:count], states.mel, iterations=SHARP)
            for k, wave in enumerate(waves):
                write_audio(wave, folder / f"{k}-{name}.wav", states.mel.rate)
