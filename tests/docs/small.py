"""What makes a documented command small: a few steps of a few samples with tiny networks."""

import json
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

TRAINING = ("train", "autoencoder", "blockwise")
WIDTHS = {
    "MLP": {"width": 16, "depth": 1},
    "ResidualMLP": {"width": 16, "depth": 1},
    "DiT": {"width": 24, "depth": 1, "heads": 2},
    "unet2d": {"width": 16, "multipliers": "[1,1]"},
    "SequenceDiT": {"width": 16, "depth": 1, "heads": 2},
    "BlockwiseDiT": {"width": 24, "heads": 2, "trunk_depth": 1},
    "BlockwiseMLP": {"width": 16, "trunk_depth": 1},
    "autoencoder_kl": {"width": 16},
}
OPTIONS = {
    "sample": {"num_samples": 12, "batch_size": 12},
    "evaluate": {"num_samples": 20, "batch_size": 20},
    "report": {"num_samples": 20, "solvers": "[euler,heun]", "nfe": "[4]"},
    "boss": {
        "budgets": "[3]",
        "fine_steps": 12,
        "start": 16,
        "limit": 32,
        "search_noises": 24,
        "fresh_noises": 20,
        "num_samples": 20,
        "adaptive": "[0.1]",
    },
    "pairs": {"num_noises": 60, "fine_steps": 12},
    "edit": {"num_steps": 3, "num_iters": 2},
    "compare_edits": {
        "num_inverted": 4,
        "num_edited": 4,
        "num_steps": 5,
        "solves": "[2]",
        "rows": 1,
    },
    "consistency": {"num_samples": 20},
    "inpaint": {"num_images": 2, "num_samples": 2},
    "semantic": {"num_images": 12, "rows": 2, "columns": 1},
    "pareto": {"num_samples": 10, "nfe": "[6]", "repetitions": 1},
    "tokens": {"steps": 3, "sizes.depth": 1},
    "epsilon": {"num_samples": 100},
    "encode": {"shard_size": 1000},
}


def small(recipe: str, given: list[str], cfg: DictConfig, resumed: int) -> list[str]:
    """The overrides of a command, and behind them those that make it take a second or two."""
    if recipe in TRAINING:
        more = dict(_training(cfg, resumed, go_on=cfg.get("resume") is not None))
    elif recipe == "compare":
        more = dict(_comparison(cfg))
    else:
        more = dict(OPTIONS.get(recipe, {}))
        if cfg.get("data") is not None:
            more |= _data(cfg.data)
    if recipe not in TRAINING and _has_steps(cfg):
        more["sampler.grid"] = 2
    if OmegaConf.select(cfg, "metric") is not None or "metric=classifier" in given:
        given = [o for o in given if not o.startswith("metric=")]
        more["metric"] = "pixels"
    return given + [f"{key}={value}" for key, value in more.items()]


def _training(cfg: DictConfig, resumed: int, go_on: bool) -> Iterator[tuple[str, Any]]:
    yield "trainer.max_steps", 4 + 2 * resumed
    yield "trainer.val_check_interval", 4
    yield "trainer.enable_progress_bar", "false"
    yield "++trainer.limit_val_batches", 1
    if go_on:
        return
    yield "batch_size", 6
    yield "trainer.accelerator", "cpu"
    yield from _data(cfg.data).items()
    if OmegaConf.select(cfg, "callback.ema._target_"):
        yield "callback.ema.decay", 0.5
    samples = OmegaConf.select(cfg, "callback.samples") or {}
    if "rows" in samples:
        yield "callback.samples.rows", 1
    if _has_steps(cfg):
        yield "sampler.grid", 2
    if "num_scale_images" in cfg:
        yield "num_scale_images", 50
        yield "num_samples", 20
    for part in ("model", "vae"):
        yield from _networks(cfg.get(part), part)


def _data(data: DictConfig) -> dict[str, Any]:
    return {"data.size": 400} if data.get("_target_", "").endswith(".Toy") else {}


def _networks(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Sizes of the networks of a configuration, whatever they lie in."""
    if isinstance(node, DictConfig):
        name = str(OmegaConf.to_container(node, resolve=False).get("_target_", "")).split(".")[-1]
        for key, value in WIDTHS.get(name, {}).items():
            if key in node:
                yield f"{path}.{key}", value
        for key in node:
            if not OmegaConf.is_interpolation(node, key):
                yield from _networks(node._get_node(key), f"{path}.{key}")


def _comparison(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    yield "seeds", "[0]"
    training = ["trainer.max_steps=6", "trainer.val_check_interval=6", "batch_size=32"]
    yield "overrides", _strings([*cfg.overrides, *training, "trainer.enable_progress_bar=false"])
    grid = [] if "sampler=dopri5" in cfg.evaluate else ["sampler.grid=2"]
    yield "evaluate", _strings([*cfg.evaluate, "num_samples=20", *grid])


def _has_steps(cfg: DictConfig) -> bool:
    """Whether the number of steps is that of a grid, and not an adaptive method's own."""
    sampler = cfg.get("sampler") or {}
    return isinstance(sampler.get("grid"), int) and "rtol" not in sampler


def _strings(values: list[str] | ListConfig) -> str:
    return json.dumps(list(values), separators=(",", ":"))
