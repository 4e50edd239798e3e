"""Samples and measurements of a run."""

import json
import time
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from omegaconf import open_dict
from tqdm import tqdm

from flowkit.adapters import DataPrediction
from flowkit.data import Toy
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData
from flowkit.metrics import Pixels
from flowkit.modules import FlowModule, load_run
from flowkit.paths import Cosine
from flowkit.provenance import tensor_hash
from flowkit.recipes.evaluate import evaluate, picture_rows
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from flowkit.runs import Run, features_for
from flowkit.runs.drawing import draw_parts, proportional_rows
from flowkit.runs.parts import Parts
from flowkit.runs.starts import choose_labels
from flowkit.sampling import ODESampler, SDESampler, sample_seeds, seeded_noise
from tests.recipes.conftest import TINY

EVALUATE = ["num_samples=40", "sampler.grid=2", "metric=pixels"]


def test_samples_do_not_depend_on_the_batch(tiny_run, configure, tmp_path):
    drawn = [
        sample(
            configure(
                "sample",
                f"run={tiny_run}",
                f"out={tmp_path}",
                "num_samples=12",
                "guidance=2",
                f"batch_size={size}",
            )
        )
        for size in (1, 7, 12)
    ]
    torch.testing.assert_close(drawn[0], drawn[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn[1], drawn[2], rtol=1e-4, atol=1e-5)
    assert drawn[0].std() > 0.1


def test_sample_writes_what_it_drew(tiny_run, configure, tmp_path):
    cfg = configure("sample", f"run={tiny_run}", f"out={tmp_path}", "labels=[3,8]", "num_samples=5")
    drawn = sample(cfg)
    stored = torch.load(tmp_path / "samples.pt", weights_only=True)
    assert torch.equal(stored["samples"], drawn)
    assert stored["cond"].tolist() == [3, 8, 3, 8, 3]
    record = json.loads((tmp_path / "samples.json").read_text())
    drawing = record["sampling"]
    assert (drawing["nfe"], drawing["network_rows_per_sample"]) == (50, 50)
    assert (drawing["num_samples"], drawing["batch_size"], drawing["seeds"]) == (5, 256, [0, 5])
    assert drawing["conditions"] == "the labels asked for, in turn"
    held = tensor_hash(load_run(tiny_run).state_dict())
    assert record["weights"] == {"kind": "averaged", "step": 20, "hash": held}
    expected = load_run(tiny_run).sample(5, cond=stored["cond"], seeds=range(5))
    torch.testing.assert_close(drawn, expected)
    # other labels are another drawing, beside which this one is kept; a grid may be given as times
    options = [f"run={tiny_run}", f"out={tmp_path}", "num_samples=5", "sampler.grid=[0,0.3,1]"]
    sample(configure("sample", *options, "labels=[3]"))
    sample(configure("sample", *options, "labels=[8]"))
    kept = [json.loads(file.read_text())["sampling"] for file in tmp_path.glob("samples*.json")]
    assert sorted(map(str, (drawing["labels"] for drawing in kept))) == ["[3, 8]", "[3]", "[8]"]
    for name in ("num_samples", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            sample(configure("sample", *options, f"{name}=0"))


def test_sample_says_what_it_draws_before_it_draws(
    tiny_run, configure, tmp_path, monkeypatch, capsys
):
    said = []
    solve = FlowModule.solve
    monkeypatch.setattr(
        FlowModule,
        "solve",
        lambda *args, **more: said.append(capsys.readouterr()) or solve(*args, **more),
    )
    options = ["num_samples=6", "guidance=2", "sampler=euler", "sampler.grid=3", "batch_size=4"]
    sample(configure("sample", f"run={tiny_run}", f"out={tmp_path}", *options))
    told = f"drawing   6 samples of {tiny_run}: euler, 3 steps, guidance 2, on cpu\n"
    assert [one.out for one in said] == [told, ""]
    assert "".join(one.err for one in said) == ""  # no bar, since this is no terminal


@pytest.mark.parametrize(
    ("sampler", "moves"),
    [(ODESampler(3, "heun"), [1, 1, 1, 0, 1, 1, 1, 0]), (ODESampler(3, "dopri5"), [1, 1])],
)
def test_the_bar_moves_with_the_steps_of_a_solver(sampler, moves, tiny_run, monkeypatch):
    made = []

    class Recorded(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.n = 0
            made.append((options, []))

        def update(self, n=1):
            self.n += n
            made[-1][1].append(n)

    monkeypatch.setattr("flowkit.runs.parts.tqdm", Recorded)
    run = Run.load(tiny_run)
    x0 = seeded_noise(run.sample_shape, range(5)).split(3)
    samples, _ = draw_parts(run, x0, torch.arange(5), sampler)
    ((options, found),) = made
    assert (options["total"], found) == (sum(moves), moves)
    expected = run.module.solve(torch.cat(x0), sampler, torch.arange(5), run.guidance).x
    if sampler.method == "heun":  # dopri5 chooses its steps for a batch
        assert torch.allclose(samples["samples"], expected, atol=1e-5)


def test_seconds_are_of_sampling_alone(tiny_run):
    run, x0 = Run.load(tiny_run), [torch.randn(2, 1, 8, 8)]

    def slow(samples):
        time.sleep(0.5)
        return {"samples": samples}

    cond = torch.tensor([0, 1])
    assert draw_parts(run, x0, cond, ODESampler(2), slow)[1]["seconds"] < 0.4


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\], got \[3, 10\]"):
        choose_labels([3, 10], 4, 10)
    with pytest.raises(ValueError, match="labels must be null for a run without classes"):
        choose_labels([3], 4, None)
    for labels in ("three", [1.5], 3):
        with pytest.raises(ValueError, match="labels must be a list of classes, such as"):
            choose_labels(labels, 4, 10)


def test_evaluation_is_a_record_and_repeats_exactly(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", *EVALUATE]
    first = evaluate(configure("evaluate", *options, "guidance=1.5"))
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(first))
    again = evaluate(configure("evaluate", *options, "guidance=1.5"))
    assert again["metrics"] == first["metrics"]
    assert not (tmp_path / "metrics-1.json").exists()
    held = tensor_hash(load_run(tiny_run).state_dict())
    assert first["weights"] == {"kind": "averaged", "step": 20, "hash": held}
    assert first["sampling"]["conditions"] == "labels in the proportions of the test split"
    assert (first["sampling"]["source"], first["sampling"]["seeds"]) == ("noise", [0, 40])
    assert first["sampling"]["guidance"] == 1.5
    assert first["sampling"]["nfe"] == 4
    assert first["sampling"]["network_rows_per_sample"] == 8
    assert first["metrics"]["frechet_distance"] > first["metrics"]["floor"]["frechet_distance"]
    parts = {"metrics", "samples", "reference", "weights", "sampling", "data", "versions"}
    assert set(first) == parts
    assert "fid" not in json.dumps(first).lower().replace("fidelity", "")


@pytest.mark.parametrize("recipe", ["sample", "evaluate"])
def test_a_stopped_drawing_goes_on_where_it_was(tiny_run, configure, tmp_path, monkeypatch, recipe):
    """The plug is pulled in the third of five batches: the second call makes only three."""
    solve, made = FlowModule.solve, []

    def stumble(self, x0, *args, **kwargs):
        if len(made) == 2:
            raise ConnectionError("the plug was pulled")
        made.append(len(x0))
        return solve(self, x0, *args, **kwargs)

    run = {"sample": sample, "evaluate": evaluate}[recipe]
    options = [f"run={tiny_run}", "sampler.grid=2", "num_samples=40", "batch_size=8"]
    options += ["metric=pixels"] if recipe == "evaluate" else []
    whole = run(configure(recipe, *options, f"out={tmp_path}/whole"))
    options.append(f"out={tmp_path}/parts")
    monkeypatch.setattr(FlowModule, "solve", stumble)
    with pytest.raises(ConnectionError):
        run(configure(recipe, *options))
    (parts,) = (tmp_path / "parts").iterdir()
    assert [file.name for file in sorted(parts.iterdir())] == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    made.extend([0])
    again = run(configure(recipe, *options))
    assert made == [8, 8, 0, 8, 8, 8]
    if recipe == "sample":
        assert torch.equal(again, whole)
    else:
        assert again["metrics"] == whole["metrics"]
    assert not parts.exists()

    # Other options begin anew, also another rule of seeds.
    for other in ("seed=1", "seeding=1"):
        made[2:] = [0]
        run(configure(recipe, *options, other))
        assert made == [8, 8, 0, *[8] * 5]


def test_several_processes_need_a_kind_of_device(tiny_run, configure):
    cfg = configure("sample", f"run={tiny_run}", "device=cuda:1", "devices=2")
    with pytest.raises(ValueError, match="device must have no number with devices=2, got cuda:1"):
        sample(cfg)


def test_a_damaged_part_is_named_and_made_again(tiny_run, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(Parts, "remove", lambda self: None)
    options = [f"run={tiny_run}", "num_samples=4", "sampler.grid=1", f"out={tmp_path}"]
    whole = sample(configure("sample", *options))
    (file,) = tmp_path.glob("parts-*/000000.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:50])
    with pytest.warns(UserWarning, match=r"cache must be readable, got .*000000.safe.*again"):
        assert torch.equal(sample(configure("sample", *options)), whole)
    assert len(file.read_bytes()) == len(content)


def test_weights_that_were_not_averaged_are_called_raw(configure, tmp_path):
    options = [*TINY[:-2], "callback=raw", "sampler.grid=2", "trainer.max_steps=10"]
    options.remove("callback.ema.decay=0.9")
    train(configure("train", *options, f"run_dir={tmp_path}"))
    assert load_run(tmp_path).weights == {"kind": "raw", "step": 10}


def test_earlier_results_are_kept_beside_the_newest(tiny_run, configure, tmp_path):
    def run(*options):
        common = [f"run={tiny_run}", f"out={tmp_path}", "sampler=euler", "num_samples=4"]
        sample(configure("sample", *common, *options))
        stored = sorted(tmp_path.glob("samples*.json"))
        return {f.stem: json.loads(f.read_text())["sampling"]["seeds"][0] for f in stored}

    one, two = (sample_seeds(seed, 0, 1).start for seed in (1, 2))
    assert run("seed=1") == {"samples": one}
    assert run("seed=1") == {"samples": one}
    assert run("seed=2") == {"samples": two, "samples-1": one}
    assert run("seed=3", "seeding=1") == {"samples": 3, "samples-1": one, "samples-2": two}
    for kind in ("png", "pt"):
        assert len(list(tmp_path.glob(f"samples*.{kind}"))) == 3
    first, last = (torch.load(tmp_path / f"samples{n}.pt") for n in ("-1", ""))
    assert not torch.equal(first["samples"], last["samples"])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 200))
def test_labels_keep_the_proportions_of_the_test_split(labels, num_samples):
    labels = torch.tensor(labels)
    chosen = labels[proportional_rows(labels, num_samples)]
    assert len(chosen) == num_samples
    for label in labels.unique():
        share = num_samples * (labels == label).sum() / len(labels)
        assert abs((chosen == label).sum() - share) <= 1


def test_the_picture_is_balanced_whatever_the_proportions():
    labels = torch.tensor([4] * 30 + [7] * 3 + [9] * 12)[torch.randperm(45)]
    rows, columns = picture_rows(labels)
    assert labels[rows].reshape(-1, columns).tolist() == [[4, 7, 9]] * 3
    assert len(rows.unique()) == 9


def _shades(labels, generator=None):
    """Images of a dark class 0 and a bright class 1."""
    noise = torch.randn(len(labels), 1, 4, 4, generator=generator)
    return labels[:, None, None, None] - 0.5 + 0.1 * noise


class Skewed(SplitData):
    """Four dark images to every bright one."""

    def __init__(self):
        super().__init__(batch_size=20, seed=0, num_workers=0)
        self.num_classes = 2

    def load(self):
        labels, generator = (torch.arange(100) % 5 == 4).long(), torch.Generator().manual_seed(5)
        return {
            k: Arrays({"x1": _shades(labels, generator), "cond": labels})
            for k in ("train", "val", "test")
        }


def test_a_perfect_model_of_unequal_classes_meets_the_floor(configure, tmp_path, monkeypatch):
    """About 0.02; as many samples of either class would be 1.5 away."""
    cfg = configure("train", *TINY, f"run_dir={tmp_path}", "trainer.max_steps=2")
    with open_dict(cfg):
        cfg.data = {"_target_": "tests.recipes.test_sample_evaluate.Skewed"}
    train(cfg)
    monkeypatch.setattr(
        "flowkit.recipes.evaluate.draw_parts",
        lambda run, x0, cond, sampler, finish, parts: (finish(_shades(cond)), {}),
    )
    own = "trust=[tests.recipes.test_sample_evaluate.Skewed]"
    options = [f"run={tmp_path}", *EVALUATE, "num_samples=100", own]
    metrics = evaluate(configure("evaluate", *options))["metrics"]
    assert metrics["frechet_distance"] < 2 * metrics["floor"]["frechet_distance"] < 0.1
    assert metrics["class_agreement"] == 1


def _train_toy(configure, folder, *options):
    """A run on points; at a learning rate of 0 its field is 0 everywhere."""
    settings = ["data=toy", "data.size=300", "trainer.max_steps=20", *options]
    train(configure("train", *TINY, *settings, f"run_dir={folder}"))


def test_samples_start_from_the_source_samples_of_the_data(configure, tmp_path):
    source = ["data.source=8gaussians", "data.target=moons", "data.cond=binary"]
    _train_toy(configure, tmp_path, *source, "optimizer.lr=0")
    data = Toy("8gaussians", "moons", "binary", size=300)
    data.setup()
    options = [f"run={tmp_path}", "num_samples=30", "sampler=euler", "sampler.grid=2"]
    drawn = sample(configure("sample", *options))
    assert torch.equal(drawn, data.test[:30]["x0"])
    stored = torch.load(tmp_path / "drawn" / "samples.pt", weights_only=True)
    assert torch.equal(stored["cond"], data.test[:30]["cond"])
    drawing = json.loads((tmp_path / "drawn" / "samples.json").read_text())["sampling"]
    assert (drawing["source"], drawing["seeds"]) == ("test split", None)

    ones = data.test[:]["x0"][data.test[:]["cond"] == 1]
    assert torch.equal(sample(configure("sample", *options, "labels=[1]")), ones[:30])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\], got \[2\]"):
        sample(configure("sample", *options, "labels=[2]"))

    record = evaluate(configure("evaluate", *options))
    assert record["metrics"]["path_energy"] == 0
    assert record["metrics"]["w2"] == record["metrics"]["transport_w2"]
    assert (record["sampling"]["source"], record["sampling"]["seeds"]) == ("test split", None)


def test_float_conditions_go_from_training_to_evaluation(configure, tmp_path):
    model = ["data.cond=continuous", "model=mlp", "+model.cond_dim=1", "callback.samples.rows=2"]
    _train_toy(configure, tmp_path, *model)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    data = Toy(cond="continuous", size=300)
    data.setup()
    options = [f"run={tmp_path}", "num_samples=1000", "sampler.grid=2"]
    assert len(sample(configure("sample", *options))) == 300
    stored = torch.load(tmp_path / "drawn" / "samples.pt", weights_only=True)
    assert torch.equal(stored["cond"], data.test[:]["cond"])
    record = evaluate(configure("evaluate", *options))
    assert record["sampling"]["conditions"] == "of the test split"
    assert record["sampling"]["seeds"] == [0, 300]
    with pytest.raises(ValueError, match="labels must be null for a run without classes"):
        sample(configure("sample", *options, "labels=[1]"))


def test_evaluation_of_points(configure, tmp_path):
    _train_toy(configure, tmp_path)
    cfg = configure("evaluate", f"run={tmp_path}", "num_samples=50", "sampler=dopri5")
    record = evaluate(cfg)
    # The path is measured on a grid of its own, in one batch: the record says which.
    assert len(record["sampling"]["grid"]) == 101
    assert record["sampling"]["batch_size"] == 50
    metrics = record["metrics"]
    assert metrics["w2_squared"] == pytest.approx(metrics["w2"] ** 2)
    # a barely trained flow hardly moves: its path energy is far below the transport it needs
    assert metrics["path_energy_below_w2_squared"] is True


class Masks(SplitData):
    """Images whose conditions are masks of three classes."""

    num_classes = 3

    def __init__(self):
        super().__init__(batch_size=4, seed=0, num_workers=0)

    def load(self):
        part = Arrays({"x1": torch.zeros(4, 1, 2, 2), "cond": torch.ones(4, 2, 2).long()})
        return {"train": part, "val": part, "test": part}


def test_data_without_class_labels_are_measured_by_their_pixels(capsys):
    data = Masks()
    data.setup()
    assert isinstance(features_for(data, seed=0), Pixels)
    assert "pixels, since the data do not have several classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sampler=dopri5", "sampler.grid=8"], "sampler.grid must be 1 for dopri5, .* got 8 steps"),
        (
            ["sampler.method=bosh3"],
            "sampler.grid must be 1 for bosh3, .* got [0-9]+ steps; set sampler",
        ),
        (
            ["sampler=dopri5", "sampler.method=euler"],
            "sampler.[ra]tol must be absent for euler, .* ",
        ),
        (
            ["+sampler.atol=0.1"],
            "sampler.atol must be absent for heun, .* got 0.1; choose sampler=heun",
        ),
    ],
)
def test_options_that_a_method_would_ignore_are_refused(
    tiny_run, configure, tmp_path, options, message
):
    for recipe, call, more in (
        ("sample", sample, [f"run={tiny_run}", f"out={tmp_path}"]),
        ("evaluate", evaluate, [f"run={tiny_run}", f"out={tmp_path}", "metric=pixels"]),
        ("train", train, [*TINY, f"run_dir={tmp_path}"]),
    ):
        with pytest.raises(ValueError, match=message):
            call(configure(recipe, *more, *options))
    assert not any(tmp_path.iterdir())


def test_times_of_the_grid_serve_the_path_energy_by_adaptive_methods(configure, tmp_path):
    """And only many of them do; by default there are 100 steps."""
    train(configure("train", *TINY, "data=toy", "data.size=200", f"run_dir={tmp_path}"))
    energies = {}
    for grid in (1, 100, 300):
        options = [f"run={tmp_path}", "num_samples=40", "sampler=dopri5", f"sampler.grid={grid}"]
        record = evaluate(configure("evaluate", *options))
        assert len(record["sampling"]["grid"]) == max(grid, 100) + 1
        energies[grid] = record["metrics"]["path_energy"]
    assert energies[1] == energies[100] != energies[300]
    assert energies[100] == pytest.approx(energies[300], rel=0.02)
    with pytest.raises(ValueError, match=r"must be 1, or have 100 steps at least .* got 8 steps"):
        evaluate(configure("evaluate", *options[:-1], "sampler.grid=8"))


def test_a_mean_flow_is_sampled_by_its_means_and_the_record_says_so(configure, tmp_path):
    train(configure("train", "module=mean_flow", *TINY, f"run_dir={tmp_path}"))
    module, noise = load_run(tmp_path), seeded_noise((1, 8, 8), range(3))
    for sampler, said in (("few_steps", "mean over each step"), ("heun", "instantaneous")):
        options = [f"run={tmp_path}", f"sampler={sampler}", "sampler.grid=2", "num_samples=3"]
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            drawn = sample(configure("sample", *options, f"out={tmp_path}/{sampler}"))
        assert len([w for w in heard if "instantaneous" in str(w.message)]) == (sampler == "heun")
        record = json.loads((tmp_path / sampler / "samples.json").read_text())["sampling"]
        assert record["velocity"] == said
        field = module.velocity if sampler == "few_steps" else module.velocity.forward
        method = "euler" if sampler == "few_steps" else "heun"
        expected = ODESampler(2, method)(field, noise, torch.arange(3))
        torch.testing.assert_close(drawn, expected)


def test_without_a_sampler_it_is_that_of_the_method(tiny_run, configure, tmp_path):
    train(configure("train", "module=mean_flow", *TINY, f"run_dir={tmp_path}/mean"))
    taken = {
        (tiny_run,): (25, "heun"),
        (f"{tmp_path}/mean",): (4, "euler"),
        (f"{tmp_path}/mean", "sampler.grid=1"): (1, "euler"),
        (f"{tmp_path}/mean", "sampler.method=heun"): (4, "heun"),
        (tiny_run, "sampler.grid=[0,.3,1]"): (2, "heun"),
    }
    for (run, *options), (steps, method) in taken.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Heun does not use the means
            sample(configure("sample", f"run={run}", *options, "num_samples=2", f"out={tmp_path}"))
        record = json.loads((tmp_path / "samples.json").read_text())["sampling"]
        assert (len(record["grid"]) - 1, record["method"]) == (steps, method)
    with pytest.raises(TypeError, match="sampler must be another than auto, which is for trained"):
        train(configure("train", *TINY, "sampler=auto", f"run_dir={tmp_path}/other"))


def test_networks_that_predict_the_data_are_runs(configure, tmp_path):
    train(configure("train", "prediction=data", "path=cosine", *TINY, f"run_dir={tmp_path}"))
    velocity = load_run(tmp_path).velocity
    assert isinstance(velocity, DataPrediction)
    assert velocity.path == Cosine()
    options = ["module=mean_flow", "prediction=noise", *TINY, f"run_dir={tmp_path}/2"]
    with pytest.raises(
        ValueError, match=r"prediction must be velocity for MeanFlowMatching, .* got noise"
    ):
        train(configure("train", *options))


def test_a_stochastic_sampler(tiny_run, configure, tmp_path):
    """Fresh noise on the way; the same samples in any batch; the record names it all."""
    options = [f"run={tiny_run}", "sampler=sde", "sampler.grid=3", "num_samples=12", "guidance=2"]
    drawn = [
        sample(configure("sample", *options, f"out={tmp_path}/{size}", f"batch_size={size}"))
        for size in (5, 12)
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    drawing = json.loads((tmp_path / "12" / "samples.json").read_text())["sampling"]
    settings = {"method": "euler", "diffusion": "sigma", "scale": 1.0, "guidance": 2}
    assert {name: drawing[name] for name in settings} == settings
    assert drawing["grid"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert "rtol" not in drawing
    plain = sample(configure("sample", *options, f"out={tmp_path}/0", "sampler.scale=0"))
    ode = [*options[:1], "sampler=euler", *options[2:], f"out={tmp_path}/ode"]
    assert torch.equal(plain, sample(configure("sample", *ode)))
    assert (plain - drawn[1]).abs().max() > 0.1


def test_a_stochastic_sampler_has_no_path_energy_and_the_path_of_its_run(configure, tmp_path):
    settings = ["data=toy", "data.size=300", "trainer.max_steps=20", "path=cosine"]
    train(configure("train", *TINY, *settings, f"run_dir={tmp_path}"))
    options = [f"run={tmp_path}", "num_samples=40"]
    metrics = evaluate(configure("evaluate", *options, "sampler=sde", "sampler.grid=4"))["metrics"]
    assert metrics["w2"] > 0
    assert "path_energy" not in metrics
    module = load_run(tmp_path)
    x0 = seeded_noise((2,), range(5))
    found = module.solve(x0, SDESampler(4, "sigma")).x
    expected = SDESampler(4, "sigma", path=Cosine())(module.velocity, x0)
    assert torch.equal(found, expected)


def test_a_stochastic_sampler_needs_independent_noise(configure, tmp_path):
    """A coupled run's velocity does not give the score; nor do source samples of the data."""
    for name, (settings, message) in {
        "ot": (
            ["coupling=minibatch_ot"],
            "trained on independent noise, got SDESampler; its score",
        ),
        "given": (["data.source=8gaussians"], "bring their source samples, got SDESampler"),
    }.items():
        _train_toy(configure, tmp_path / name, *settings)
        if name == "ot":
            with pytest.raises(TypeError, match=message):
                _train_toy(configure, tmp_path / "pictures", *settings, "sampler=sde")
        cfg = configure("sample", f"run={tmp_path / name}", "num_samples=4", "sampler=sde")
        with pytest.raises(TypeError, match=f"sampler must be an ODESampler .*{message}"):
            sample(cfg)
