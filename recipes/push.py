"""Write a run as a folder to share, and send it to the Hugging Face hub.

flowkit push run=runs/mine to=shared/mine                      a folder, without a network
flowkit push run=runs/mine to=shared/mine license=mit dtype=float16
flowkit push run=runs/mine to=hub:owner/name license=mit       the hub; log in by `hf auth login`

The folder holds model.safetensors, config.json, README.md (a model card), samples.png, the metrics
of flowkit evaluate and the grids of flowkit boss. Models of sounds and policies have the numbers
and the picture of flowkit separate, convert or rollout. Recipes read it, and its name on the hub:

flowkit sample run=shared/mine
flowkit sample run=hub:owner/name
"""

import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from flowkit import hub
from flowkit.modules.card import card, recipe_of
from flowkit.modules.pushed import check_place, hash_of, portable, round_weights, write
from flowkit.modules.trust import trusting
from flowkit.places import check_writable
from flowkit.rules import CONF
from flowkit.runs import Run
from flowkit.runs.known_data import place_of
from flowkit.runs.pushing import (
    CARD,
    METRICS,
    PICTURE,
    copied,
    grids_of,
    images_of,
    license_of_card,
    metrics_of,
    picture_of,
    put_aside,
)
from flowkit.sampling import ODESampler

OF_DRAWN = ("num_samples", "labels", "seed", "batch_size")  # options of pictures of samples


def push(cfg: DictConfig) -> Path:
    """Push as configured; return the folder."""
    on_hub = cfg.to.startswith("hub:")
    if on_hub:
        hub.check_name(cfg.to.removeprefix("hub:"), "to=hub:")
    else:
        check_place(Path(cfg.to))  # before the work
    run = Run.load(cfg.run, "averaged", cfg.device, None, cfg.trust, **place_of(cfg))
    data, record = images_of(run.config["data"], run.folder)
    with trusting(cfg.trust):
        recipe = recipe_of({"data": data})
    check_options(cfg, recipe)
    module, _ = run.module, run.weights  # whose hash is that before rounding
    round_weights(module, cfg.dtype)
    digest = hash_of(module)
    folder = run.results / "pushed" / digest[:12] if on_hub else Path(cfg.to)
    check_writable(folder, "to")
    check_place(folder, digest)
    sampler = run.sampler(cfg.sampler)
    if not isinstance(sampler, ODESampler):
        raise TypeError(
            "sampler must be an ODESampler (such as sampler=heun), which a shared model has as its "
            "own, got SDESampler"
        )
    module.default_sampler = sampler
    known = dict(module.configuration or {})
    shared = portable(module, {**known, "data": data, "data_record": record}, cfg.dtype)
    origin = known.get("weights", {}).get("origin") or run.weights["hash"]
    shared["weights"]["origin"] = origin  # before any rounding: of metrics and grids
    hashes = {origin, run.weights["hash"], digest}
    metrics, measured = metrics_of(run, recipe, hashes)
    grids = grids_of(run, hashes, digest)
    labels = cfg.labels
    if OmegaConf.is_list(labels):
        labels = [run.class_number(label) for label in labels]
    picture, words = None, None
    if recipe == "sample":
        drawn = (cfg.num_samples, cfg.seed, cfg.batch_size)
        picture, words = picture_of(run, sampler, labels, *drawn)
    elif measured is not None:
        picture, words = copied(measured), f"A picture of `flowkit {recipe}`, not chosen."
    place = cfg.to if on_hub else folder.name
    texts = {METRICS: None if metrics is None else json.dumps(metrics, indent=2) + "\n", **grids}
    license = cfg.license or license_of_card(run)
    with trusting(cfg.trust):
        texts[CARD] = card(shared, place, license, metrics, list(grids), words)
    put_aside(folder, texts)
    write(module, folder, shared, {**texts, PICTURE: picture})
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"model     {folder}, {size / 2**20:.2f} MiB\ncard      {folder / CARD}")
    if on_hub:
        print(f"hub       {hub.upload(folder, cfg.to, private=cfg.private)}")
    return folder


def check_options(cfg: DictConfig, recipe: str) -> None:
    """Require no option of a picture of samples for a run whose picture is that of its measures.

    Raises:
        ValueError: If there is one.
    """
    defaults: Any = OmegaConf.load(CONF / "push.yaml")
    for name in OF_DRAWN if recipe != "sample" else ():
        if cfg[name] != defaults[name]:
            raise ValueError(
                f"{name} must be absent for a run of flowkit {recipe}, where it is unused, got "
                f"{cfg[name]}"
            )


@hydra.main(version_base="1.3", config_path="../conf", config_name="push")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit push``."""
    push(cfg)


if __name__ == "__main__":
    main()
