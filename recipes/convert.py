"""Say what a recording says in another voice, or measure a run on test pairs.

flowkit convert run=runs/takin audio=source.wav reference=voice.wav     a recording of any length
flowkit convert run=runs/takin audio=source.wav reference=voice.wav guidance=1 sampler.grid=4
flowkit convert run=runs/takin                                          measures on 20 test pairs

The coefficient w of Takin-VC is guidance=1 + w. Waves are made by a vocoder: that of Griffin and
Lim needs no training, and a better one is vocoder=hifigan vocoder.path=... or vocoder._target_ of
your own, called with log-mels and their map.
"""

import time
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.adapters.predictions import network_of
from flowkit.audio import VoiceVelocity, check_reference, save_spectrograms, write_audio
from flowkit.audio.files import Recording, open_audio
from flowkit.audio.voices import LEAST
from flowkit.places import check_writable
from flowkit.provenance import tensor_hash
from flowkit.runs import Run
from flowkit.runs.conversion import Converter, measure
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording

SHOWN = 4  # test pairs in the picture and as audio


def convert(cfg: DictConfig) -> Tensor | list[Tensor]:
    """Convert as configured; write ``converted.json``, the picture and the sound.

    Returns:
        The conversion ``(S,)``, or those of the test pairs.
    """
    if (cfg.audio is None) != (cfg.reference is None):
        raise ValueError(
            f"reference must be given with audio, and only then, got audio={cfg.audio or 'null'} "
            f"and reference={cfg.reference or 'null'}; give a recording of the voice"
        )
    heard: dict[str, Recording] = {}
    if cfg.audio is not None:  # before the work
        heard = {name: open_audio(cfg[name], name) for name in ("audio", "reference")}
        check_reference(*heard["reference"])
        if (length := len(heard["audio"].wave) / heard["audio"].rate) < LEAST:
            raise ValueError(f"audio must have at least {LEAST} s, got {length:.3g} s; record more")
    run = Run.load(cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg))
    folder = Path(cfg.out) if cfg.out else run.results / "converted"
    check_writable(folder, "out")
    converter = Converter.of(run, run.sampler(cfg.sampler), instantiate(cfg.vocoder))
    overlap = converter.data.frames // 4 if cfg.overlap is None else cfg.overlap
    sampling = {
        **run.describe(converter.sampler),
        "seed": cfg.seed,
        "overlap": overlap,
        "vocoder": OmegaConf.to_container(cfg.vocoder),
    }
    if heard:
        return _file(cfg, converter, folder, overlap, sampling, heard)
    return _test(cfg, converter, folder, overlap, sampling)


def _file(
    cfg: DictConfig,
    converter: Converter,
    folder: Path,
    overlap: int,
    sampling: dict,
    heard: dict[str, Recording],
) -> Tensor:
    """Convert a recording."""
    mel = converter.mel
    waves = {name: recording.at(mel.rate) for name, recording in heard.items()}
    wave, reference = waves["audio"], waves["reference"]
    begun = time.perf_counter()
    found, log_mel = converter.convert(wave, reference, cfg.seed, overlap)
    seconds, length = time.perf_counter() - begun, len(wave) / mel.rate
    sampling |= {name: [str(cfg[name]), tensor_hash(own)] for name, own in waves.items()}
    sampling |= {"audio_seconds": round(length, 3), "seconds": round(seconds, 3)}
    files = [folder / f"converted.{ending}" for ending in ("json", "png", "wav")]
    record = converter.run.record(sampling, **_hashes(converter))
    with recording(record, files):
        panels = [("recording", mel(wave[None])[0]), ("conversion", log_mel)]
        save_spectrograms([*panels, ("reference", mel(reference[None])[0])], files[1], mel)
        write_audio(found, files[2], mel.rate)
    print(
        f"time      {seconds:.2f} s for {length:.2f} s of sound, {seconds / length:.2f} s a second"
    )
    print(f"picture   {files[1]}\nsound     {files[2]}")
    return found


def _test(
    cfg: DictConfig, converter: Converter, folder: Path, overlap: int, sampling: dict
) -> list[Tensor]:
    """Measure the run on pairs of its test split."""
    mel, converter = converter.mel, replace(converter, data=converter.run.data)
    metrics, found = measure(converter, cfg.num_pairs, cfg.seed, overlap, cfg.words, cfg.targets)
    record = converter.run.record(sampling, metrics=metrics, **_hashes(converter))
    files = [folder / "pairs.json", folder / "pairs.png"]
    names = ("source", "reference", "answer")
    shown = found[:SHOWN]
    written = {
        folder / f"pairs-{name}-{k}.wav": getattr(one, name)
        for k, one in enumerate(shown)
        for name in names
    }
    with recording(record, [*files, *written]):
        panels = []
        for one in shown:
            panels += [(name, mel(getattr(one, name)[None])[0]) for name in names[:2]]
            panels += [("answer", one.log_mel)]
        save_spectrograms(panels, files[1], mel, columns=3)
        for file, wave in written.items():
            write_audio(wave, file, mel.rate)
    for name, value in metrics.items():
        print(f"{name:<31} {value:.4g}")
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return [one.answer for one in found]


def _hashes(converter: Converter) -> dict:
    """Return the hashes of all that a conversion depends on beside the weights."""
    network = network_of(converter.run.module.velocity)
    own = {"recognizer": network.content.hash} if isinstance(network, VoiceVelocity) else {}
    if (weights := getattr(converter.vocoder, "hash", None)) is not None:
        own["vocoder"] = weights
    return {**converter.data.hashes(), **own}


@hydra.main(version_base="1.3", config_path="../conf", config_name="convert")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit convert``."""
    convert(cfg)


if __name__ == "__main__":
    main()
