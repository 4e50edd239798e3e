"""Training runs: what they leave behind, and exact resumption."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flowkit.metrics.pictures import save_picture
from flowkit.modules import load_run
from flowkit.modules.checkpoints import read_checkpoint
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from flowkit.sampling import ODESampler, seeded_noise
from tests.recipes.conftest import TINY

SHORT_EPOCH = ["trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.val_check_interval=0.5"]
SHORT_EPOCH += ["batch_size=400", "trainer.log_every_n_steps=1"]  # 4 steps


def _state(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def _losses(run):
    rows = [row for file in sorted(run.glob("logs/*/metrics.csv")) for row in _read(file)]
    return [(int(r["step"]), float(r["train/loss"])) for r in rows if r["train/loss"]]


def _read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_run_folder_is_self_contained(tiny_run):
    assert (tiny_run / "config.yaml").is_file()
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == [
        "step-000010.png",
        "step-000020.png",
    ]
    assert [p.name for p in (tiny_run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert "${" not in (tiny_run / "config.yaml").read_text()
    assert list(tiny_run.glob("tensorboard/*/events*"))


@pytest.mark.parametrize(
    ("steps", "given", "pictures"),
    [(11, [], [3, 6, 9, 11]), (12, ["trainer.val_check_interval=7"], [7, 12]), (2, [], [1, 2])],
)
def test_every_training_ends_with_a_validation_and_a_picture(
    configure, tmp_path, capsys, steps, given, pictures
):
    options = [o for o in TINY if "val_check" not in o and "max_steps" not in o]
    options += [f"trainer.max_steps={steps}", "trainer.log_every_n_steps=1", *given]
    train(configure("train", *options, f"run_dir={tmp_path}"))
    files = [tmp_path / "samples" / f"step-{step:06d}.png" for step in pictures]
    assert sorted((tmp_path / "samples").iterdir()) == files
    (table,) = tmp_path.glob("logs/*/metrics.csv")
    losses = {int(row["step"]) + 1: row["val/loss"] for row in _read(table) if row["val/loss"]}
    assert list(losses) == pictures
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-4:])
    assert said["run"] == str(tmp_path)
    assert said["picture"] == str(files[-1])
    assert said["numbers"] == str(table)
    assert f"loss {float(losses[steps]):.4f} at step {steps}" in said["held"]


@pytest.mark.parametrize("given", [[], ["callback=raw", "trainer.max_steps=4"]])
def test_resume_makes_what_a_kill_after_the_last_checkpoint_left_out(
    given, configure, tmp_path, capsys
):
    """A picture, or the last row of a table: the numbers are those of an unkilled training."""
    left_out = ("val_check", "max_steps", "losses")
    options = [o for o in TINY if not any(word in o for word in left_out)] + SHORT_EPOCH
    train(configure("train", *options, *given, f"run_dir={tmp_path}"))
    picture = max((tmp_path / "samples").iterdir())
    step, content = int(picture.stem[5:]), picture.read_bytes()
    (table,) = tmp_path.glob("logs/*/metrics.csv")
    loss = _read(table)[-1]["val/loss"]
    weights = _state(tmp_path)["state_dict"]

    def resume():
        train(resumed(configure("train", f"resume={tmp_path}"), []))

    for kind in ("picture", "table", "plot"):
        {"picture": picture, "table": table, "plot": tmp_path / "losses.png"}[kind].unlink()
        capsys.readouterr()
        resume()
        said = capsys.readouterr().out
        assert picture.read_bytes() == content
        assert (tmp_path / "losses.png").is_file()
        assert f"picture   {picture}\n" in said
        assert f"held out  loss {float(loss):.4f} at step {step}\n" in said
        (*_, table) = sorted(tmp_path.glob("logs/*/metrics.csv"))
        assert _read(table)[-1] | {"step": str(step - 1), "val/loss": loss} == _read(table)[-1]
        for other in set(tmp_path.glob("logs/*/metrics.csv")) - {table}:
            other.unlink()
    found = _state(tmp_path)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match=f"must exceed the steps already made, got {step}"):
        resume()


def test_the_last_logged_loss_is_of_the_last_step(configure, tmp_path):
    rows = []
    for every in (1, 5):
        folder = tmp_path / str(every)
        options = [*TINY, "trainer.max_steps=7", f"trainer.log_every_n_steps={every}"]
        train(configure("train", *options, f"run_dir={folder}"))
        rows.append(_losses(folder))
    assert rows[1] == [rows[0][4], rows[0][6]]


def test_intervals_follow_the_number_of_steps(configure, tmp_path):
    for steps, interval in ((10_000, 1000), (4001, 1000), (3998, 1000), (300, 75), (1, 1)):
        cfg = configure("train", f"trainer.max_steps={steps}")
        assert cfg.trainer.val_check_interval == interval
    assert configure("train", "trainer.max_steps=-1").trainer.val_check_interval == 1000
    assert configure("train", "experiment=digits_cfm").trainer.val_check_interval == 500


def test_checkpoints_hold_the_average_of_the_weights(configure, tmp_path):
    """EMA by hand over the raw weights of every step equals the checkpoint's weights."""
    options = [*TINY, f"run_dir={tmp_path}", "trainer.max_steps=5", "callback.ema.decay=0.3"]
    cfg = configure("train", *options)
    raw = []
    cfg.callback.checkpoint.every_n_steps = 1
    from flowkit import modules

    class Record(modules.LastCheckpoint):
        def on_train_batch_end(self, trainer, module, *args):
            raw.append({k: v.clone() for k, v in module.state_dict().items()})
            super().on_train_batch_end(trainer, module, *args)

    original, modules.LastCheckpoint = modules.LastCheckpoint, Record
    try:
        train(cfg)
    finally:
        modules.LastCheckpoint = original
    averaged = _state(tmp_path)["state_dict"]
    for name, value in averaged.items():
        expected = raw[0][name]
        for step, decay in zip(raw[1:], (2 / 11, 3 / 12, 0.3, 0.3), strict=True):
            expected = decay * expected + (1 - decay) * step[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert any((averaged[n] - raw[-1][n]).abs().max() > 1e-4 for n in averaged)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_goes_on_exactly(configure, tmp_path, accumulate):
    """12 steps, and 7 steps + resume to 12, give the same losses and weights, bit for bit."""
    options = [*TINY, "trainer.log_every_n_steps=1", "+model.dropout=0.1"]
    options.append(f"trainer.accumulate_grad_batches={accumulate}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure("train", *options, "trainer.max_steps=12", f"run_dir={whole}"))
    train(configure("train", *options, "trainer.max_steps=7", f"run_dir={parts}"))
    torch.rand(17)  # whatever else the process draws must not matter
    cfg = resumed(configure("train", f"resume={parts}"), ["trainer.max_steps=12"])
    train(cfg)
    assert _losses(parts) == _losses(whole)
    a, b = _state(whole), _state(parts)
    assert a["global_step"] == b["global_step"] == 12
    for part in ("state_dict", "current_model_state"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)


class Kill(Callback):
    """Ends a training at a step, as a pulled plug would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise ConnectionError("the plug was pulled")


def test_resuming_after_a_kill_goes_on_exactly(configure, tmp_path):
    """Killed at step 9 with a checkpoint of step 6: steps 7 to 12 again, on the same schedule."""
    options = [*TINY, "trainer.log_every_n_steps=1", "trainer.max_steps=12"]
    options += ["trainer.val_check_interval=6", "lr_scheduler=cosine"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure("train", *options, f"run_dir={whole}"))
    kill = "+callback.kill={_target_: tests.recipes.test_train.Kill, step: 9}"
    with pytest.raises(ConnectionError):
        train(configure("train", *options, f"run_dir={parts}", kill))
    assert _state(parts)["global_step"] == 6
    train(resumed(configure("train", f"resume={parts}"), ["callback.kill=null"]))
    assert dict(_losses(parts)) == dict(_losses(whole))
    for name, value in _state(whole)["state_dict"].items():
        assert torch.equal(value, _state(parts)["state_dict"][name])


def _copy(run, folder):
    return Path(shutil.copytree(run, folder))


def _contents(run):
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_resume_takes_the_runs_configuration_and_values_only(tiny_run, configure):
    cfg = configure("train", f"resume={tiny_run}")
    values = ["trainer.max_steps=99", "optimizer.lr=1e-4", "+callback.ema.update_every_n_steps=2"]
    changed = resumed(cfg, [f"resume={tiny_run}", "hydra.run.dir=elsewhere", *values])
    assert (changed.trainer.max_steps, changed.model.width) == (99, 32)
    assert (changed.optimizer.lr, changed.callback.ema.update_every_n_steps) == (1e-4, 2)
    assert changed.run_dir == str(tiny_run)
    for override in ("model=dit", "model.width=64", "optimizer._target_=torch.optim.SGD"):
        key = override.split("=")[0]
        with pytest.raises(ValueError, match=f"{key} must stay as it is when a run is resumed"):
            resumed(cfg, [override])
    with pytest.raises(ValueError, match=r"max_stepz; did you mean trainer.max_steps"):
        resumed(cfg, ["trainer.max_stepz=99"])


def test_a_schedule_follows_the_length_of_a_resumed_run(configure, tmp_path):
    cfg = configure("train", *TINY, "lr_scheduler=cosine", f"run_dir={tmp_path}")
    train(cfg)
    assert "T_max: 20" in (tmp_path / "config.yaml").read_text()
    options = ["trainer.max_steps=40", "+trainer.limit_val_batches=0"]
    longer = resumed(configure("train", f"resume={tmp_path}"), options)
    assert longer.module.lr_scheduler.T_max == 40
    train(longer)
    assert "T_max: 40" in (tmp_path / "config.yaml").read_text()
    assert _state(tmp_path)["lr_schedulers"][0]["T_max"] == 40


def test_resuming_from_nothing_says_so(configure, tmp_path):
    with pytest.raises(FileNotFoundError, match="resume must be a run folder or a checkpoint"):
        train(configure("train", f"resume={tmp_path / 'no'}", f"run_dir={tmp_path}"))
    with pytest.raises(FileNotFoundError, match=r"must be a run folder with unresolved.yaml"):
        resumed(configure("train", f"resume={tmp_path}"), [])


def test_what_cannot_go_on_is_left_untouched(tiny_run, configure, tmp_path):
    run = _copy(tiny_run, tmp_path / "run")
    before = _contents(run)
    cfg = configure("train", f"resume={run}")
    with pytest.raises(ValueError, match=r"got 20; .*last.ckpt is at step 20: raise trainer.max_s"):
        train(resumed(cfg, []))
    with pytest.raises(FileExistsError, match=r"hydra.run.dir must hold no trained run, got .*run"):
        train(configure("train", *TINY, f"run_dir={run}"))
    assert _contents(run) == before

    # Without averaging, the averaged weights would take the place of the trained ones.
    with pytest.raises(ValueError, match=r"callback\.ema must stay for a run that averages"):
        train(resumed(cfg, ["trainer.max_steps=40", "callback.ema=null"]))
    assert _contents(run) == before

    # Another model is refused before the folder is made.
    checkpoint, other = run / "checkpoints" / "last.ckpt", tmp_path / "other"
    options = [*TINY, f"resume={checkpoint}", f"run_dir={other}", "trainer.max_steps=30"]
    with pytest.raises(RuntimeError, match="checkpoint must fit the configured module"):
        train(configure("train", *options, "model.width=16"))
    assert not other.exists()

    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    before = _contents(run)
    with pytest.raises(RuntimeError, match=r"checkpoint must be readable, got .*last.ckpt"):
        train(resumed(cfg, ["trainer.max_steps=40"]))
    assert _contents(run) == before


def test_pictures_of_training_are_of_the_averaged_weights(tiny_run, tmp_path):
    def picture(module):
        x0 = seeded_noise(module.sample_shape, range(10))
        samples = module.solve(x0, ODESampler(2, "heun"), torch.arange(10)).x
        names = [str(digit) for digit in range(10)]
        return save_picture(samples, tmp_path / "samples.png", captions=names).read_bytes()

    module = load_run(tiny_run)
    assert picture(module) == (tiny_run / "samples" / "step-000020.png").read_bytes()
    module.load_state_dict(_state(tiny_run)["current_model_state"])
    assert picture(module) != (tiny_run / "samples" / "step-000020.png").read_bytes()


def test_training_starts_with_what_was_found(configure, tmp_path, capsys):
    train(configure("train", *TINY, f"run_dir={tmp_path}", "trainer.max_steps=1"))
    data, model, *_ = capsys.readouterr().out.splitlines()
    assert data.endswith(
        "1,437 train, 180 val, 180 test samples of shape (1, 8, 8), 10 classes (0, 1, 2, …)"
    )
    assert model.startswith("model     ConditionalFlowMatching of ResidualMLP, ")


def test_validation_and_pictures_use_the_same_noise_every_time(tiny_run, configure, tmp_path):
    """Two validations of unchanged weights give the same loss."""
    options = [*TINY, "optimizer.lr=0", "trainer.max_steps=20", f"run_dir={tmp_path}"]
    train(configure("train", *options))
    (file,) = tmp_path.glob("logs/*/metrics.csv")
    losses = [row["val/loss"] for row in _read(file) if row["val/loss"]]
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_data_without_labels_need_no_class_settings(configure, tmp_path):
    options = [*TINY, "data=toy", "data.size=500", f"run_dir={tmp_path}"]
    module = train(configure("train", *options))
    assert module.drop_cond is None
    assert load_run(tmp_path).sample(4, seeds=range(4)).shape == (4, 2)


def test_training_learns(configure, tmp_path):
    """On the digits 150 steps predict more than half of the target's energy, unseen data too."""
    options = [*TINY, "model.width=128", "trainer.max_steps=150", "trainer.val_check_interval=150"]
    train(configure("train", *options, f"run_dir={tmp_path}"))
    (file,) = tmp_path.glob("logs/*/metrics.csv")
    explained = [float(row["val/explained"]) for row in _read(file) if row["val/explained"]]
    assert explained[-1] > 0.5


def test_an_experiment_may_set_the_decay_of_what_callback_raw_leaves_out(configure, tmp_path):
    options = [*TINY, "experiment=digits_cfm", "callback=raw", "trainer.max_steps=2"]
    options += [f"run_dir={tmp_path}"]
    assert configure("train", *options).callback.ema.decay > 0
    train(configure("train", *options))
    assert "current_model_state" not in _state(tmp_path)
