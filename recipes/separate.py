"""Separate the sound that a text asks for from a recording, or measure a run on test mixtures.

flowkit separate run=runs/flowsep audio=mix.wav query="violin"     a recording of any length
flowkit separate run=runs/flowsep audio=mix.wav query="violin" guidance=2 sampler.grid=4
flowkit separate run=runs/flowsep                                  measures on 100 test mixtures

The sound is written with the phase of the recording, so it holds nothing that the recording lacks.
The measures need the waves of test mixtures, in pairs with the sounds in them. `flowkit evaluate`
compares two sets of samples and knows no pairs, so the measures are here.
"""

import time
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig
from torch import Tensor

from flowkit.audio import mixture_phase, save_spectrograms, write_audio
from flowkit.audio.files import Recording, open_audio
from flowkit.places import check_writable
from flowkit.provenance import tensor_hash
from flowkit.runs import Run
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording
from flowkit.runs.separation import Separator, measure

SHOWN = 4  # test mixtures in the picture and as audio


def separate(cfg: DictConfig) -> Tensor:
    """Separate as configured; write ``separated.json``, the picture and the sounds.

    Returns:
        The separated wave ``(S,)``, or those of the test mixtures ``(B, S)``.
    """
    if (cfg.audio is None) != (cfg.query is None):
        raise ValueError(
            f"query must be given with audio, and only then, got audio={cfg.audio or 'null'} and "
            f"query={cfg.query or 'null'}; name the sound, as in query=violin"
        )
    heard = None if cfg.audio is None else open_audio(cfg.audio)  # before the work
    run = Run.load(cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg))
    folder = Path(cfg.out) if cfg.out else run.results / "separated"
    check_writable(folder, "out")
    separator = Separator.of(run, run.sampler(cfg.sampler))
    if heard is None:
        return _test(cfg, separator, folder)
    return _file(cfg, separator, folder, heard)


def _file(cfg: DictConfig, separator: Separator, folder: Path, heard: Recording) -> Tensor:
    """Separate a recording."""
    mel, run = separator.mel, separator.run
    wave = heard.at(mel.rate)
    overlap = separator.data.frames // 4 if cfg.overlap is None else cfg.overlap
    begun = time.perf_counter()
    found, log_mel = separator.separate(wave, cfg.query, cfg.seed, overlap)
    seconds, length = time.perf_counter() - begun, len(wave) / mel.rate
    sampling = {
        **run.describe(separator.sampler),
        "audio": [str(cfg.audio), tensor_hash(wave)],
        "query": cfg.query,
        "seed": cfg.seed,
        "overlap": overlap,
        "audio_seconds": round(length, 3),
        "seconds": round(seconds, 3),
    }
    files = [folder / f"separated.{ending}" for ending in ("json", "png", "wav")]
    record = run.record(sampling, **separator.data.hashes())
    with recording(record, files):
        panels = [("recording", mel(wave[None])[0]), (cfg.query, log_mel)]
        save_spectrograms(panels, files[1], mel)
        write_audio(found, files[2], mel.rate)
    print(
        f"time      {seconds:.2f} s for {length:.2f} s of sound, {seconds / length:.2f} s a second"
    )
    print(f"picture   {files[1]}\nsound     {files[2]}")
    return found


def _test(cfg: DictConfig, separator: Separator, folder: Path) -> Tensor:
    """Measure the run on mixtures of its test split."""
    run, mel = separator.run, separator.mel
    separator = replace(separator, data=run.data)  # with the splits loaded
    metrics, sounds, log_mels = measure(
        separator, cfg.num_mixtures, cfg.num_samples, cfg.seed, cfg.seeding, cfg.batch_size
    )
    sampling = {
        **run.describe(separator.sampler),
        "num_samples": cfg.num_samples,
        "seed": cfg.seed,
        "seeding": cfg.seeding,
    }
    record = run.record(sampling, metrics=metrics, **separator.data.hashes())
    files = [folder / "mixtures.json", folder / "mixtures.png"]
    waves = mixture_phase(log_mels, sounds.mixture, mel)
    shown = {"mixture": sounds.mixture, "target": sounds.target, "answer": waves}
    written = {
        folder / f"mixtures-{name}-{k}.wav": wave[k]
        for name, wave in shown.items()
        for k in range(min(SHOWN, len(wave)))
    }
    with recording(record, [*files, *written]):
        panels = []
        for k in range(min(SHOWN, len(log_mels))):
            panels += [("mixture", mel(sounds.mixture[k : k + 1])[0])]
            panels += [("target", mel(sounds.target[k : k + 1])[0])]
            panels += [(sounds.captions[k], log_mels[k])]
        save_spectrograms(panels, files[1], mel, columns=3)
        for file, wave in written.items():
            write_audio(wave, file, mel.rate)
    for name, value in metrics.items():
        if name != "features":
            print(f"{name:<28} {value:.4g}")
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return waves


@hydra.main(version_base="1.3", config_path="../conf", config_name="separate")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit separate``."""
    separate(cfg)


if __name__ == "__main__":
    main()
