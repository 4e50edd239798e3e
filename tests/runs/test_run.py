"""What recipes share of a run folder."""

import json

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from flowkit import grids
from flowkit.data import Digits
from flowkit.modules import load_run
from flowkit.modules.checkpoints import build, read_checkpoint
from flowkit.modules.trust import trusting
from flowkit.recipes.boss import boss
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from flowkit.runs import Run
from flowkit.runs.starts import FRESH
from flowkit.runs.tables import markdown
from flowkit.sampling import ODESampler, sample_seeds, seeded_noise
from tests.recipes.conftest import TINY


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory):
    """A run that was configured with guidance, whose average differs from its last weights."""
    from hydra import compose, initialize_config_dir

    from tests.conftest import CONF

    folder = tmp_path_factory.mktemp("guided") / "run"
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=[*TINY, "guidance=3", f"run_dir={folder}"])
    train(cfg)
    return folder


def drawn(run, guidance, weights="averaged"):
    """Ten samples of two Heun steps, as `sample` should draw them."""
    module = load_run(run, weights=weights)
    return module.sample(10, ODESampler(2, "heun"), torch.arange(10), range(10), guidance)


@pytest.mark.parametrize("weights", ["averaged", "raw"])
def test_weights_are_those_asked_for(guided_run, weights):
    run = Run.load(guided_run, weights)
    state = read_checkpoint(guided_run / "checkpoints/last.ckpt")
    stored = state["state_dict" if weights == "averaged" else "current_model_state"]
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, stored[name]), name
    assert run.weights["kind"] == weights
    assert run.weights["step"] == 20


def test_raw_weights_are_others_and_only_kinds_are_asked_for(guided_run):
    averaged, raw = (Run.load(guided_run, kind).weights["hash"] for kind in ("averaged", "raw"))
    assert averaged != raw
    with pytest.raises(ValueError, match="weights must be"):
        Run.load(guided_run, "ema")


def test_a_run_without_an_average_has_raw_weights_alone(configure, tmp_path):
    options = [o for o in TINY if not o.startswith("callback.ema")]
    train(configure("train", *options, "callback=raw", f"run_dir={tmp_path}"))
    assert {Run.load(tmp_path, kind).weights["kind"] for kind in ("averaged", "raw")} == {"raw"}


def test_a_run_has_its_data_classes_and_guidance(guided_run):
    run = Run.load(guided_run)
    assert isinstance(run.data, Digits)
    assert run.data is run.data
    assert (run.num_classes, run.classes) == (10, [str(digit) for digit in range(10)])
    assert (run.guidance, run.sample_shape, run.brings_starts) == (3, (1, 8, 8), False)
    assert Run.load(guided_run, guidance=1).guidance == 1
    assert run.made_with("euler")["guidance"] == 3
    assert Run.load(guided_run, guidance=1).made_with("euler")["guidance"] is None


def test_the_velocity_is_guided(guided_run):
    run, (x, cond) = Run.load(guided_run), Run.load(guided_run).starts(0)(0, 4)
    t, null = torch.full((4,), 0.3), torch.full((4,), 10)
    plain = Run.load(guided_run, guidance=1).velocity
    expected = plain(x, t, null) + 3 * (plain(x, t, cond) - plain(x, t, null))
    torch.testing.assert_close(run.velocity(x, t, cond), expected)


def test_starts_are_numbered(guided_run):
    starts = Run.load(guided_run).starts(7)
    x0, cond = starts(8, 4)
    assert torch.equal(x0, seeded_noise((1, 8, 8), sample_seeds(7, 8, 4)))
    assert cond.tolist() == [8, 9, 0, 1]
    assert torch.equal(starts(FRESH, 1)[0], seeded_noise((1, 8, 8), sample_seeds(7, FRESH, 1)))
    earlier = Run.load(guided_run).starts(7, seeding=1)
    assert torch.equal(earlier(8, 4)[0], seeded_noise((1, 8, 8), range(15, 19)))


def test_guidance_that_a_run_was_not_trained_for_is_refused_when_it_is_loaded(tmp_path, configure):
    options = [*TINY, "module.drop_cond.prob=0", f"run_dir={tmp_path}"]
    train(configure("train", *options))
    with pytest.raises(ValueError, match="guidance must be null or 1 for a model"):
        Run.load(tmp_path, guidance=2)


@pytest.mark.parametrize(("option", "scale"), [("null", 3), ("1", 1), ("2", 2)])
def test_sample_takes_the_guidance_of_the_run(guided_run, configure, tmp_path, option, scale):
    options = ["num_samples=10", "sampler.grid=2", f"guidance={option}", f"out={tmp_path}"]
    found = sample(configure("sample", f"run={guided_run}", *options))
    torch.testing.assert_close(found, drawn(guided_run, scale))
    assert json.loads((tmp_path / "samples.json").read_text())["sampling"]["guidance"] == scale


def test_recipes_take_raw_weights(guided_run, configure, tmp_path):
    options = [f"run={guided_run}", "weights=raw"]
    few = ["num_samples=10", "sampler.grid=2", f"out={tmp_path}/drawn"]
    found = sample(configure("sample", *options, *few))
    torch.testing.assert_close(found, drawn(guided_run, 3, "raw"))
    assert not torch.allclose(found, drawn(guided_run, 3))
    pixels = ["metric=pixels", "num_samples=20", "sampler.grid=2", f"out={tmp_path}"]
    record = evaluate(configure("evaluate", *options, *pixels))
    assert record["weights"] == Run.load(guided_run, "raw").weights


def test_a_grid_is_of_the_guidance_of_the_run(guided_run, configure, tmp_path):
    search = ["num_steps=2", "budgets=[2]", "fine_steps=6", "start=16", "limit=16"]
    search += ["search_noises=6", "fresh_noises=4", "adaptive=[]", f"out={tmp_path}"]
    record = boss(configure("boss", f"run={guided_run}", *search))
    assert record["guidance"] == 3
    assert len(grids.load(tmp_path / "grid.json", Run.load(guided_run).made_with("euler"))) == 3


# --- configurations ---------------------------------------------------------------------------


def join(*parts, **options):
    """What was given, as it is."""
    return [*parts, options]


OWN = ["tests.runs.test_run.join", "fractions.Fraction"]
NODE = {"_target_": "tests.runs.test_run.join", "a": {"_target_": "fractions.Fraction"}}


@pytest.mark.parametrize(
    "node",
    [
        NODE,
        {**NODE, "_recursive_": False},
        {**NODE, "_recursive_": False, "b": [NODE, 1]},
        {**NODE, "b": {**NODE, "_recursive_": False}},
        {**NODE, "_recursive_": False, "_args_": [NODE]},
        {**NODE, "_args_": [1, NODE, [NODE]]},
        {**NODE, "_convert_": "all"},
        {**NODE, "_convert_": "partial", "b": {"c": [1, 2]}},
        {**NODE, "b": None, "c": {"d": {"e": NODE}}},
        [NODE, {"a": NODE}],
        {"a": [NODE], "b": 1},
        {"_target_": "fractions.Fraction", "_args_": [1, 2]},
    ],
)
def test_stored_configurations_are_built_as_hydra_does(node):
    expected = instantiate(OmegaConf.create(node), _convert_="all")
    with trusting(OWN):
        found = build(node)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("recursive", [True, False])
def test_partial_nodes_are_built_as_hydra_does(recursive):
    node = {**NODE, "_partial_": True, "_recursive_": recursive, "_args_": [2]}
    with trusting(OWN):
        found, expected = build(node), instantiate(node, _convert_="all")
    assert (found.func, found.args, found.keywords) == (
        expected.func,
        tuple(expected.args),
        expected.keywords,
    )
    assert found(3) == expected(3)
    assert isinstance(found.keywords["a"], dict) is not recursive


# --- tables -----------------------------------------------------------------------------------


def test_a_table_aligns_words_and_numbers():
    assert markdown(["a", "b", "n"], [["x", "y", "1"], ["z", "", "2"]], names=(0, 1)) == (
        "| a | b | n |\n| --- | --- | ---: |\n| x | y | 1 |\n| z |  | 2 |\n"
    )
    assert markdown(["n", "a"], [], names=[1]) == "| n | a |\n| ---: | --- |\n"
