"""Samples and measurements of a run."""

import json

import pytest
import torch

from flowkit.modules import load_run
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.sample import choose_labels, sample

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
    assert (record["nfe"], record["network_rows_per_sample"]) == (50, 50)
    expected = load_run(tiny_run).sample(5, cond=stored["cond"], seeds=range(5))
    torch.testing.assert_close(drawn, expected)


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 9\], got \[3, 10\]"):
        choose_labels([3, 10], 4, 10)
    with pytest.raises(ValueError, match="labels must be null for a run without classes"):
        choose_labels([3], 4, None)


def test_evaluation_is_a_record_and_repeats_exactly(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", *EVALUATE]
    first = evaluate(configure("evaluate", *options, "guidance=1.5"))
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(first))
    again = evaluate(configure("evaluate", *options, "guidance=1.5"))
    assert again["metrics"] == first["metrics"]
    assert first["weights"]["kind"] == "averaged"
    assert first["weights"]["step"] == 20
    assert first["sampling"]["guidance"] == 1.5
    assert first["sampling"]["nfe"] == 4
    assert first["sampling"]["network_rows_per_sample"] == 8
    assert first["metrics"]["frechet_distance"] > first["metrics"]["floor"]["frechet_distance"]
    assert set(first) == {"metrics", "weights", "sampling", "data", "versions"}
    assert "fid" not in json.dumps(first).lower().replace("fidelity", "")


def test_evaluation_of_points(configure, tmp_path):
    from flowkit.recipes.train import train
    from tests.recipes.conftest import TINY

    train(configure("train", *TINY, "data=toy", "data.size=500", f"run_dir={tmp_path}"))
    cfg = configure("evaluate", f"run={tmp_path}", "num_samples=50", "sampler.grid=4")
    metrics = evaluate(cfg)["metrics"]
    assert metrics["w2_squared"] == pytest.approx(metrics["w2"] ** 2)
    # a barely trained flow hardly moves: its path energy is far below the transport it needs
    assert metrics["path_energy_below_w2_squared"] is True
