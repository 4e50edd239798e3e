"""The recipes of blockwise flow matching, from tokens to the table of cost and quality."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from flowkit import grids
from flowkit.blockwise import StoredTokens, part_flops, predicted_gain, step_prices
from flowkit.modules import load_run
from flowkit.modules.checkpoints import read_config
from flowkit.recipes.blockwise import blockwise, network
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pareto import pareto
from flowkit.recipes.sample import sample
from flowkit.recipes.tokens import tokens
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from flowkit.sampling import ODESampler
from tests.conftest import CONF

SHORT = [
    "batch_size=24",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "+trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "callback.ema.decay=0.5",
    "callback.samples.rows=1",
    "callback.losses=null",
    "logger.tensorboard=null",
]
SMALL = ["model.width=16", "model.heads=2", "model.trunk_depth=1", "model.edges=3"]
STAGE1 = [
    *SHORT,
    *SMALL,
    "module=blockwise",
    "model=blockwise_dit",
    "encoder@module.encoder=stored",
    "module.encoder_width=16",
    "module.projector_width=32",
    "sampler=blockwise",
    "sampler.grid.steps=1",
]


def composed(recipe, *overrides, **values):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(recipe, overrides=[str(o) for o in overrides])
    cfg.update({key: str(value) for key, value in values.items()})
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("blockwise")


@pytest.fixture(scope="module")
def stored(folder):
    """Tokens of a tiny encoder."""
    sizes = ["sizes.width=16", "sizes.depth=1", "sizes.heads=2", "steps=2"]
    return tokens(composed("tokens", *sizes, out=folder / "tokens"))


@pytest.fixture(scope="module")
def stage1(folder, stored):
    """A run aligned with the tokens."""
    train(composed("train", *STAGE1, f"module.encoder.file={stored}", run_dir=folder / "stage1"))
    return folder / "stage1"


@pytest.fixture(scope="module")
def stage2(folder, stage1):
    """Its feature residual."""
    blockwise(composed("blockwise", *SHORT, run=stage1, run_dir=folder / "stage2"))
    return folder / "stage2"


@pytest.fixture(scope="module")
def plain(folder):
    """A plain run."""
    options = [*SHORT, "model.width=16", "model.depth=1", "sampler.grid=2"]
    train(composed("train", *options, run_dir=folder / "plain"))
    return folder / "plain"


def differing(a, b):
    """Names of the weights that two runs do not share."""
    first, second = (load_run(run).velocity.state_dict() for run in (a, b))
    return {n for n in first | second if not (n in first and n in second)} | {
        n for n in first.keys() & second.keys() if not torch.equal(first[n], second[n])
    }


def test_tokens_are_those_of_training_and_validation_images(stored):
    from flowkit.data import Digits

    data = Digits(batch_size=1)
    data.setup()
    found = StoredTokens(stored)
    assert found(data.train[:50]["x1"]).shape == (50, 16, 16)
    assert found(data.val[:]["x1"]).shape == (180, 16, 16)
    with pytest.raises(ValueError, match="flowkit tokens"):
        found(data.train[:2]["x1"].flip(-1))


def test_mirrored_images_have_tokens_where_training_mirrors(tmp_path):
    cfg = composed("tokens", "steps=1", "sizes.width=16", "sizes.depth=1", out=tmp_path)
    from flowkit.data import Digits
    from flowkit.recipes.tokens import images

    data = Digits(batch_size=1)
    data.setup()
    once = sum(len(batch) for batch in images(data, cfg.batch_size))
    data.flip = True
    assert sum(len(batch) for batch in images(data, cfg.batch_size)) == once + len(data.train)


def test_a_run_is_loaded_and_sampled_without_the_tokens(stage1, stored):
    assert read_config(stage1)["module"]["encoder"]["file"] == str(stored)
    hidden = stored.rename(stored.with_suffix(".away"))
    try:
        module = load_run(stage1)
        sampler = ODESampler(3)
        assert module.sample(2, sampler, torch.tensor([0, 1]), [0, 1]).shape == (2, 1, 8, 8)
    finally:
        hidden.rename(stored)
    rows = next(stage1.glob("logs/*/metrics.csv")).read_text().splitlines()
    assert "val/align" in rows[0]


def test_the_second_stage_is_one_command(stage1, stage2):
    flow = load_run(stage2).velocity
    assert flow.feature_mode == "fra"
    changed = differing(stage1, stage2)
    assert changed == {n for n in flow.state_dict() if n.startswith("feature_residual.")}
    assert any(p.any() for p in flow.feature_residual.blocks[0].modulation.parameters())
    # it is resumed like any other, without the run it started from
    moved = stage1.rename(stage1.with_name("away"))
    try:
        cfg = resumed(composed("train", f"resume={stage2}"), ["trainer.max_steps=6"])
        train(cfg)
    finally:
        moved.rename(stage1)
    again = load_run(stage2)
    assert again.weights["step"] == 6
    assert differing(stage1, stage2) == changed


def test_a_stopped_run_of_blockwise_is_not_taken_over(stage1, stage2):
    before = (stage2 / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"continues with flowkit train resume={stage2}"):
        blockwise(composed("blockwise", *SHORT, f"resume={stage2}", run=stage1, run_dir=stage2))
    assert (stage2 / "config.yaml").read_text() == before


def test_one_stack_is_trained_alone_and_swapped_in(folder, stage1):
    run = folder / "stack"
    options = [*SHORT, "stage=flow", "segments=[1]"]
    blockwise(composed("blockwise", *options, run=stage1, run_dir=run))
    flow = load_run(run).velocity
    changed = differing(stage1, run)
    assert changed
    assert changed <= {n for n in flow.state_dict() if n.startswith("stacks.1.")}
    old = load_run(stage1).velocity
    x0, cond, sampler = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), ODESampler(6)
    a, b = (sampler.solve(f, x0, cond, return_path=True).path for f in (old, flow))
    assert torch.equal(a[:3], b[:3])  # up to the second segment
    assert not torch.equal(a[4], b[4])
    old.stacks[1].load_state_dict(flow.stacks[1].state_dict())
    assert torch.equal(sampler(old, x0, cond), sampler(flow, x0, cond))


@pytest.mark.parametrize("burden", [False, True])
def test_a_plain_run_becomes_blocks_that_sample_bit_for_bit_the_same(folder, plain, burden):
    run = folder / f"blocks-{burden}"
    options = [*SHORT, "stage=flow", "edges=4", f"equal_burden={burden}", "optimizer.lr=0"]
    blockwise(composed("blockwise", *options, run=plain, run_dir=run))
    module, old = load_run(run), load_run(plain)
    edges = module.velocity.edges
    assert len(edges) == 5
    assert (edges == (0.0, 0.25, 0.5, 0.75, 1.0)) is not burden
    cond, sampler = torch.tensor([0, 1, 2, 3]), ODESampler(list(edges), "heun")
    for guidance in (None, 2.0):
        a, b = (m.sample(4, sampler, cond, range(4), guidance) for m in (module, old))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["plain", "blocks-False"])
def test_a_run_without_a_trunk_has_no_second_stage(folder, plain, kind):
    if kind != "plain":
        options = [*SHORT, "stage=flow", "edges=2"]
        blockwise(composed("blockwise", *options, run=plain, run_dir=folder / "without_trunk"))
    run = plain if kind == "plain" else folder / "without_trunk"
    cfg = composed("blockwise", *SHORT, run=run, run_dir=folder / "no")
    with pytest.raises(ValueError, match="run must be of blocks with a trunk for stage fra"):
        blockwise(cfg)


def test_a_trunk_that_is_trained_on_samples_with_its_own_features(folder, stage2):
    run = folder / "trained_on"
    blockwise(composed("blockwise", *SHORT, "stage=flow", run=stage2, run_dir=run))
    assert load_run(run).velocity.feature_mode == "full"
    run = folder / "stack_of_stage_two"
    options = [*SHORT, "stage=flow", "segments=[0]"]
    blockwise(composed("blockwise", *options, run=stage2, run_dir=run))
    assert load_run(run).velocity.feature_mode == "fra"


GRID = ["sampler=euler", "sampler.grid=6", "num_samples=10", "batch_size=4", "guidance=2"]


def test_samples_say_their_feature_mode_and_what_they_took(folder, stage1, stage2, plain, capsys):
    """10 samples in 3 batches, 6 steps in 3 segments; guided: two calls, each with its features."""
    found = {}
    for mode in ("null", "full", "cached", "fra"):
        out = folder / "drawn" / mode
        sample(composed("sample", *GRID, f"feature_mode={mode}", run=stage2, out=out))
        found[mode] = json.loads((out / "samples.json").read_text())["sampling"]
        assert f"features  {mode if mode != 'null' else 'fra'}\n" in capsys.readouterr().out
    stacks = {f"stacks.{m}": 2 * 3 * 2 for m in range(3)}
    reused = {**stacks, "trunk": 2 * 3 * 3}
    assert found["full"]["calls"] == {**stacks, "trunk": 2 * 3 * 6}
    assert found["cached"]["calls"] == reused
    assert found["fra"]["calls"] == {**reused, "feature_residual": 2 * 3 * 3}
    assert {k: v for k, v in found["null"].items() if k != "seconds"} == {
        k: v for k, v in found["fra"].items() if k != "seconds"
    }
    flow = load_run(stage2).velocity
    parts = part_flops(flow, torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    full, fra = (found[mode]["gflops"] for mode in ("full", "fra"))
    first, later = step_prices(parts, 0)
    assert (full, fra) == pytest.approx((12 * first / 1e9, 6 * (first + later) / 1e9))
    assert full / fra == pytest.approx(predicted_gain(parts, 2))
    cfg = composed("evaluate", *GRID, "metric=pixels", "feature_mode=cached", run=stage2)
    cfg.out = str(folder / "evaluated")
    sampling = evaluate(cfg)["sampling"]
    assert sampling["feature_mode"] == "cached"
    assert sampling["calls"] == found["cached"]["calls"]
    assert sampling["tolerance"] is None
    # no drift is tolerated: as full features
    cfg.tolerance, cfg.out = 0, str(folder / "refreshed")
    sampling = evaluate(cfg)["sampling"]
    assert sampling["tolerance"] == 0
    assert sampling["calls"] == found["full"]["calls"]
    cfg.tolerance = "little"
    with pytest.raises(TypeError, match="tolerance must be a number, got 'little'"):
        evaluate(cfg)
    cfg.feature_mode = "full"
    with pytest.raises(ValueError, match="tolerance must be null if no features are reused"):
        evaluate(cfg)
    for run, rule in (
        (stage1, "feature_residual must be given for feature_mode 'fra', got None; train one"),
        (plain, "feature_mode must be null for a run without blocks, got fra"),
    ):
        with pytest.raises(ValueError, match=rule):
            sample(composed("sample", *GRID, "feature_mode=fra", run=run, out=folder / "no"))


def test_points_are_evaluated_with_what_they_took(tmp_path):
    options = [*SHORT, "data=toy", "module=blockwise", "model.width=16", "model.edges=2"]
    options += ["model.trunk_depth=1", "sampler.grid=2"]
    train(composed("train", *options, run_dir=tmp_path))
    cfg = composed("evaluate", "sampler=euler", "sampler.grid=4", "num_samples=50", run=tmp_path)
    cfg.feature_mode = "cached"
    sampling = evaluate(cfg)["sampling"]
    assert sampling["feature_mode"] == "cached"
    assert sampling["calls"] == {"stacks.0": 2, "stacks.1": 2, "trunk": 2}
    assert sampling["gflops"] > 0


def allocated(found, mode):
    """Variant and number of steps of a mode's only row with allocated steps."""
    (key,) = (key[2:] for key in found if key[1:3] == (mode, "allocated steps"))
    return key


def test_quality_against_cost(folder, stage2, plain):
    out = folder / "pareto"
    cfg = composed(
        "pareto",
        f"runs={{FRA: {stage2}, plain: [{plain}]}}",
        "nfe=[3,4,6]",
        "tolerances=[1e9]",
        "allocate=true",
        "num_samples=20",
        "batch_size=10",
        "repetitions=1",
        "guidance=2",
        "metric=pixels",
        out=out,
    )
    rows = pareto(cfg)
    record = json.loads((out / "pareto.json").read_text())
    assert record["rows"] == json.loads(json.dumps(rows))
    found = {(r["name"], r["mode"], r["variant"], r["nfe"]): r for r in rows}
    assert {key[:2] + key[3:] for key in found if key[2] is None} == {
        *(("FRA", mode, nfe) for mode in ("full", "cached", "fra") for nfe in (3.0, 6.0)),
        *(("plain", "full", nfe) for nfe in (3.0, 4.0, 6.0)),
    }
    # guided: two rows a sample, in two batches
    fra = found["FRA", "fra", None, 6.0]
    stacks = {f"stacks.{m}": 8 for m in range(3)}
    assert fra["calls"] == {"feature_residual": 12, "trunk": 12, **stacks}
    assert found["FRA", "full", None, 6.0]["calls"] == {"trunk": 24, **stacks}
    assert found["FRA", "cached", None, 6.0]["gflops"] < found["FRA", "fra", None, 6.0]["gflops"]
    # with one step a segment, or a tolerance that is never passed, nothing differs
    same = [found["FRA", mode, None, 3.0]["frechet_distance"] for mode in ("full", "cached", "fra")]
    assert len(set(same)) == 1
    refreshed = found["FRA", "fra", "refreshed at 1e+09", 6.0]
    assert refreshed["calls"] == fra["calls"]
    assert refreshed["frechet_distance"] == fra["frechet_distance"]
    # allocated steps cost no more, and their grids serve any sampler
    for mode in ("full", "cached", "fra"):
        even, other = (found["FRA", mode, *key] for key in ((None, 6.0), allocated(found, mode)))
        assert other["gflops"] <= even["gflops"]
        file = out / f"grid-FRA-stage2-{mode}-2.json"
        assert grids.load(file).tolist() == other["sampling"]["grid"]
        assert sum(grids.provenance(file)["steps"]) == other["nfe"]
    (one, two) = record["gains"]
    assert (one["steps_per_segment"], one["predicted"], one["flops"]) == (1, 1.0, 1.0)
    assert two["predicted"] == pytest.approx(two["flops"])
    text = (out / "pareto.md").read_text()
    assert "| frechet distance, unreliable | class agreement |" in text  # of few samples
    assert "| FRA | fra, refreshed at 1e+09 | 6 | 1 |" in text
    assert "segment" in (out / "drift-FRA-stage2.txt").read_text()
    assert (out / "pareto.png").stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match="runs must name run folders, got nowhere"):
        pareto(composed("pareto", "runs={a: nowhere}", out=out))


# --- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stored", "masked", "dinov2"])
def test_encoders_are_made_late(name, configure):
    cfg = configure("train", "module=blockwise", f"encoder@module.encoder={name}")
    assert cfg.module.encoder._partial_
    make = instantiate(cfg.module.encoder)
    assert callable(make)


SHAPES = ([1, 8, 8], [1, 28, 28])
NO_FOLDER = {"_target_": "flowkit.autoencoders.Identity"}  # where a trained one is taken from one


@pytest.mark.parametrize("name", ["digits_blockwise", "fashion_blockwise"])
def test_experiments_build(name, configure, tmp_path):
    cfg = configure("train", f"experiment={name}", f"run_dir={tmp_path}")
    cfg.autoencoder = NO_FOLDER
    cfg.network.shape = SHAPES["fashion" in name]
    cfg.num_classes = cfg.network.num_classes = 10
    module = instantiate(cfg.module)
    assert module.flow.num_segments == 6
    assert instantiate(cfg.sampler).times.tolist()[4] == pytest.approx(1 / 6)


@pytest.mark.parametrize("name", ["digits_blockwise_table", "fashion_blockwise_table"])
def test_rows_of_the_tables_have_equal_active_size(name, configure, tmp_path):
    table, active = configure("compare", f"experiment={name}"), {}
    for row, overrides in table.couplings.items():
        for data in table.problems.values():
            options = [*table.overrides, *data, *overrides, f"run_dir={tmp_path}"]
            cfg = configure("train", *options)
            cfg.autoencoder = NO_FOLDER
            cfg.network.shape = SHAPES["fashion" in name]
            cfg.num_classes = cfg.network.num_classes = 10
            flow = instantiate(cfg.module).flow
            parts = [flow.stacks[0]] if flow.trunk is None else [flow.trunk, flow.stacks[0]]
            counted = {p: p.numel() for part in parts for p in part.parameters()}
            active[row] = sum(counted.values())
            assert flow.num_segments == (1 if row.startswith("M1") else 6)
    assert active["M1"] == active["M6"]
    assert active["M1-SFG"] == active["M6-SFG"]


def test_training_all_blocks_on_leaves_the_feature_residual_and_the_edges():
    stored = {"_target_": "x", "edges": 3, "residual_depth": 1, "feature_mode": "fra"}
    options = {"stage": "flow", "segments": None, "edges": None, "equal_burden": False}
    left = network(stored, OmegaConf.create(options))
    assert left == {**stored, "residual_depth": None, "feature_mode": "full"}
    one = network(stored, OmegaConf.create({**options, "segments": [1]}))
    assert one == stored  # the trunk stays, and what follows it
    for given in ({"edges": 4}, {"equal_burden": True}):
        with pytest.raises(ValueError, match="edges must be null for a run with blocks"):
            network(stored, OmegaConf.create({**options, **given}))


def test_the_published_size_is_a_named_configuration(configure, tmp_path):
    """Parameters with and without the projector, within 0.1 %; FLOPs: with the network."""
    cfg = configure("train", "experiment=imagenet_blockwise_xl2", f"run_dir={tmp_path}")
    cfg.network.shape = [4, 32, 32]
    cfg.num_classes = cfg.network.num_classes = 1000
    with torch.device("meta"):
        module = instantiate(cfg.module)
    count = sum(p.numel() for p in module.parameters()) / 1e6
    flow = sum(p.numel() for p in module.flow.parameters()) / 1e6
    assert count == pytest.approx(963.4, rel=1e-3)
    assert flow == pytest.approx(955.3, rel=1e-3)
    assert (cfg.optimizer.lr, cfg.callback.ema.decay, cfg.batch_size) == (1e-4, 0.9999, 1536)
    # the second stage's, by the configuration that `flowkit blockwise` makes
    stored = OmegaConf.to_container(cfg.module.velocity, resolve=True)
    options = {"stage": "fra", "residual_depth": 4, "edges": None, "equal_burden": False}
    second = network(stored, OmegaConf.create(options))
    with torch.device("meta"):
        flow = instantiate(second)
        x, cond = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long)
    residual = sum(p.numel() for p in flow.feature_residual.parameters()) / 1e6
    assert residual == pytest.approx(95.6, rel=1e-3)
    parts = part_flops(flow, x, cond)
    full, later = (
        [sum(part) / 1e9 for part in zip(parts[name], parts["stacks.0"], strict=True)]
        for name in ("trunk", "feature_residual")
    )
    assert (full[0], sum(full)) == pytest.approx((221.65, 229.20), rel=1e-3)
    assert later[0] == pytest.approx(91.14, rel=1e-3)
