"""Every option of every configuration group composes and builds."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import flowkit.recipes._resolvers  # noqa: F401  # the configuration calls them
from flowkit import rules
from flowkit.__main__ import experiments, recipes
from flowkit.autoencoders import KLAutoencoder
from flowkit.modules.checkpoints import build
from flowkit.nn import autoencoder_kl
from flowkit.runs.logs import build_loggers
from tests.conftest import CONF
from tests.test_other_autoencoders import KINDS

TRAIN_GROUPS = [
    "model",
    "module",
    "path",
    "coupling",
    "times",
    "autoencoder",
    "optimizer",
    "lr_scheduler",
    "sampler",
    "callback",
    "logger",
    "trainer",
]
MANDATORY = {
    "sampler/from_file": "sampler.grid.file={tmp}/grid.json",
    **{f"autoencoder/{kind}": "autoencoder.path={tmp}/autoencoder" for kind in ("kl", *KINDS)},
}


OF_SEQUENCES = ("model/policy", "model/sequence", "model/latent_actions", "module/latent_actions")
LARGE = ("model/blockwise_xl2", "model/separation_unet")


def _options(group):
    return [f"{group}/{file.stem}" for file in sorted(Path(CONF, group).glob("*.yaml"))]


@pytest.mark.parametrize("option", [o for group in TRAIN_GROUPS for o in _options(group)])
def test_option(option, configure, tmp_path):
    from flowkit import grids

    grids.save(grids.uniform(2), tmp_path / "grid.json")
    if option == "trainer/slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", exc_type=ImportError)
    group, name = option.split("/")
    overrides = [f"{group}={name}", f"run_dir={tmp_path}"]
    if option == "autoencoder/kl":
        vae = autoencoder_kl((1, 8, 8), width=4, multipliers=(1, 2))
        KLAutoencoder(vae).save_pretrained(tmp_path / "autoencoder")
    if group == "autoencoder" and name in KINDS:
        kind, make = KINDS[name][:2]
        kind(make()).save_pretrained(tmp_path / "autoencoder")
    if option == "model/voice":
        overrides.append("data=voices")
    if option in MANDATORY:
        overrides.append(MANDATORY[option].format(tmp=tmp_path))
    cfg = configure("train", *overrides)
    rules.check("train", OmegaConf.to_container(cfg))
    cfg.shape, cfg.num_classes = [1, 8, 8], 10
    cfg.network.shape, cfg.network.num_classes = [1, 8, 8], 10
    cfg.network.num_times = 2 if option == "module/mean_flow" else 1
    if option.startswith(OF_SEQUENCES):
        cfg.network.shape, cfg.network.vector = [2, 14], 6
    if option == "model/separation_patches":
        cfg.network.vector = 384
    if option == "model/voice":
        cfg.network.shape, cfg.network.vector = [64, 128], 256
        cfg.network.frames = cfg.network.tokens = 64
    node = cfg[group]
    if group == "logger":
        names = {type(logger).__name__ for logger in build_loggers(node, tmp_path, 0)}
        assert names == {part._target_.split(".")[-1] for part in node.values() if part}
    elif group == "callback":
        parts = [instantiate(part) for part in node.values() if part and part._target_]
        assert all(part is not None for part in parts)
        assert parts
    elif group == "trainer":
        assert instantiate(node, logger=False).max_steps == node.max_steps
    else:
        # A billion parameters need no memory to be built.
        with torch.device("meta" if option in LARGE else "cpu"):
            built = instantiate(node)
        made = built.func if node.get("_partial_") else built
        target = node._target_.split(".")
        assert {getattr(made, "__name__", ""), type(made).__name__, "unet2d"} & {*target}
        resolved = OmegaConf.to_container(cfg, resolve=True)[group]
        with torch.device("meta" if option in LARGE else "cpu"):
            again = build(resolved)
        assert type(getattr(again, "func", again)) is type(made)


def _given(value):
    """A configuration whose user has given all that must be given."""
    if isinstance(value, dict):
        return {key: _given(part) for key, part in value.items()}
    return "r" if value == "???" else value


EXPERIMENTS = [(recipe, name) for recipe in recipes() for name in experiments(recipe)]


def test_every_experiment_is_of_one_recipe_whose_command_its_header_states():
    assert sorted(f"experiment/{name}" for _, name in EXPERIMENTS) == _options("experiment")
    for recipe, name in EXPERIMENTS:
        commands = re.findall(
            rf"flowkit (\w+) experiment={name}\b", Path(CONF, f"experiment/{name}.yaml").read_text()
        )
        assert set(commands) == {recipe}


@pytest.mark.parametrize(("recipe", "name"), EXPERIMENTS)
def test_experiment_composes_under_its_recipe_and_states_its_result(
    recipe, name, configure, monkeypatch
):
    text = Path(CONF, f"experiment/{name}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "2 CPU cores" in header or "not yet run" in header or "GPU" in header
    cfg = configure(recipe, f"experiment={name}")
    monkeypatch.setattr(rules, "_of_kind", lambda *_: True)  # runs and files are made elsewhere
    values = OmegaConf.to_container(cfg)
    rules.check(recipe, _given(values))
    written = OmegaConf.create(text)
    written.pop("defaults", None)
    both = OmegaConf.merge(cfg, written)
    assert OmegaConf.to_container(both) == OmegaConf.to_container(cfg)  # what it says is what holds
    if recipe == "train":
        shape = [2] if cfg.data._target_ == "flowkit.data.Toy" else [1, 8, 8]
        if cfg.data._target_ == "flowkit.data.Demonstrations":
            shape, cfg.network.vector = [2, 14], 6
        if cfg.data._target_ == "flowkit.data.Instruments":
            shape, cfg.network.frames, cfg.network.vector = [64, 256], 64, 384
        if cfg.model._target_ == "flowkit.audio.VoiceVelocity":
            shape, cfg.network.vector = [cfg.data.states.mel.n_mels, cfg.data.frames], 256
            cfg.network.frames = cfg.network.tokens = shape[0]
        for node in (cfg, cfg.network):
            node.shape, node.num_classes = shape, 10
        cfg.image_shape = shape
        with torch.device("meta"):  # the largest would take 4 GB
            network = instantiate(cfg.model)
        assert sum(p.numel() for p in network.parameters()) > 5000
    if recipe == "compare":
        for problem, coupling in product(cfg.problems.values(), cfg.couplings.values()):
            cell = configure("train", *cfg.overrides, *problem, *coupling)
            rules.check("train", OmegaConf.to_container(cell))
            assert cell.trainer.max_steps > 0
        assert configure("evaluate", "run=r", *cfg.evaluate).run == "r"


@pytest.mark.parametrize("option", _options("debug"))
def test_debug_composes(option, configure, tmp_path):
    cfg = configure("train", f"debug={option.split('/')[1]}", f"run_dir={tmp_path}")
    assert cfg.trainer.max_steps <= 1000


@pytest.mark.parametrize("option", _options("metric"))
def test_metric_composes(option, configure, tmp_path):
    name = option.split("/")[1]
    extra = ["metric.network._target_=torch.nn.Flatten"] if name == "network" else []
    cfg = configure("evaluate", f"metric={name}", "samples=s", *extra)
    rules.check("evaluate", OmegaConf.to_container(cfg))
    assert callable(instantiate(cfg.metric))


@pytest.mark.parametrize("option", _options("vocoder"))
def test_vocoder_composes(option, configure, monkeypatch):
    name = option.split("/")[1]
    monkeypatch.setattr(rules, "_of_kind", lambda *_: True)  # the run is made elsewhere
    extra = ["vocoder.path=v"] if name == "hifigan" else []
    cfg = configure("convert", f"vocoder={name}", "run=r", *extra)
    rules.check("convert", _given(OmegaConf.to_container(cfg)))
    assert callable(instantiate(cfg.vocoder))
