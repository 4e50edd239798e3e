"""Pictures and progress while training."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.modules import (
    AveragedWeights,
    ConditionalFlowMatching,
    LastCheckpoint,
    SampleGrid,
    callbacks,
)
from flowkit.modules.callbacks import StepProgress
from flowkit.modules.flow import brings_start
from flowkit.nn import ResidualMLP
from flowkit.sampling import seeded_noise


class Recording(torch.nn.Module):
    """A field that stands still, and notes its conditions."""

    def forward(self, x, t, cond=None):
        self.cond = cond
        return torch.zeros_like(x)


@pytest.fixture
def drawn(monkeypatch):
    """Draw the picture of a batch: returns what it shows, and under which conditions."""

    def draw(batch, rows=2, **data):
        shown = []
        monkeypatch.setattr(callbacks, "save_picture", lambda x, *_, **__: shown.append(x))
        module = ConditionalFlowMatching(Recording())
        module.sample_shape = (2,)
        trainer = SimpleNamespace(
            sanity_checking=False,
            is_global_zero=True,
            global_step=3,
            loggers=[],
            datamodule=SimpleNamespace(**data),
        )
        SampleGrid("nowhere", rows=rows).on_validation_batch_start(trainer, module, batch, 0)
        return shown[0], module.velocity.cond

    return draw


X1 = torch.zeros(50, 2)
X0 = torch.arange(100.0).reshape(50, 2)
LABELS = torch.arange(50) % 3


def test_pictures_start_from_noise_and_all_classes_in_turn(drawn):
    shown, cond = drawn({"x1": X1, "cond": LABELS}, num_classes=3)
    assert torch.equal(shown, seeded_noise((2,), range(6)))
    assert cond.tolist() == [0, 1, 2, 0, 1, 2]
    shown, cond = drawn({"x1": X1}, num_classes=None)
    assert torch.equal(shown, seeded_noise((2,), range(20)))
    assert cond is None


def test_pictures_start_from_the_source_samples_of_the_data(drawn):
    shown, cond = drawn({"x1": X1, "x0": X0, "cond": LABELS}, num_classes=3)
    assert torch.equal(shown, X0[:6])
    assert cond.tolist() == LABELS[:6].tolist()
    # Source samples that are noise are as good as any other noise.
    shown, cond = drawn({"x1": X1, "x0": X0, "cond": LABELS}, num_classes=3, x0_is_noise=True)
    assert torch.equal(shown, seeded_noise((2,), range(6)))


def test_pictures_take_conditions_that_are_no_labels_from_the_data(drawn):
    floats = torch.linspace(0, 1, 50)[:, None]
    shown, cond = drawn({"x1": X1, "cond": floats}, num_classes=None)
    assert torch.equal(shown, seeded_noise((2,), range(20)))
    assert torch.equal(cond, floats[:20])
    masks = torch.zeros(50, 8, 8, dtype=torch.long)
    shown, cond = drawn({"x1": X1, "cond": {"mask": masks}}, rows=9, num_classes=2)
    assert len(shown) == len(cond["mask"]) == 18
    assert brings_start({"x1": X1, "cond": masks}, SimpleNamespace(num_classes=2))


class Steady(ConditionalFlowMatching):
    """A training whose weight is the number of steps, ``1, 2, 3, …``, and so is a counter."""

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=1.0))
        self.velocity.weight.data.zero_()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("learned", torch.tensor([math.nan, math.inf]))  # until `setup`

    def setup(self, stage):
        self.learned.fill_(3.0)

    def loss(self, batch, generator=None):
        self.steps += 1
        return {"loss": -self.velocity.weight.sum()}


def steady(folder, steps, resume=None, every=1, **options):
    """Return the checkpoint after a number of steps with averaged weights."""
    kept = LastCheckpoint(folder / str(steps), every_n_steps=1000)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[AveragedWeights(0.8, every), kept],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    batches = DataLoader([{"x1": torch.zeros(1)}] * 60, None)
    trainer.fit(Steady(), batches, ckpt_path=resume, weights_only=True)
    return torch.load(folder / f"{steps}/last.ckpt", weights_only=True)


def averaged(steps, every=1):
    """The average by the definition, of the weights 1, 1 + every, …."""
    counted = range(1, steps + 1, every)
    value = float(counted[0])
    for n, weight in enumerate(counted[1:], start=1):
        decay = min(0.8, (1 + n) / (10 + n))
        value = decay * value + (1 - decay) * weight
    return value


QUIET = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")


@QUIET
@pytest.mark.parametrize("every", [1, 3])
def test_the_decay_of_averaged_weights_warms_up(tmp_path, every):
    """At 6 steps the decay still rises, at 60 it is the largest one (from step 35 on)."""
    assert averaged(2) == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    for steps in (2, 6, 60):
        state = steady(tmp_path, steps, every=every)
        found = state["state_dict"]["velocity.weight"].item()
        assert found == pytest.approx(averaged(steps, every), rel=1e-5)
        assert state["current_model_state"]["velocity.weight"] == steps
        assert state["state_dict"]["steps"] == max(range(1, steps + 1, every))
        assert state["state_dict"]["learned"].tolist() == pytest.approx([3.0, 3.0])


@QUIET
def test_a_resumed_average_goes_on_with_its_warm_up(tmp_path):
    steady(tmp_path, 7)
    state = steady(tmp_path, 20, tmp_path / "7/last.ckpt")
    assert state["averaging_state"]["n_averaged"] == 20
    assert state["state_dict"]["velocity.weight"].item() == pytest.approx(averaged(20), rel=1e-5)


@QUIET
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_averages_of_half_precision_are_kept_in_float32(tmp_path, precision):
    """Steps of a fifth of the distance are below the round-off of bfloat16 from step 40 on."""
    state = steady(tmp_path, 60, precision=precision)
    found = state["state_dict"]["velocity.weight"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(averaged(60), rel=1e-5)


def test_averages_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5"):
        AveragedWeights(1.5)
    with pytest.raises(ValueError, match="update_every_n_steps must be at least 1, got 0"):
        AveragedWeights(update_every_n_steps=0)


@QUIET
def test_the_time_of_a_training_is_told_after_20_batches(tmp_path, monkeypatch, capsys):
    """Batches 6 to 20 took 30 seconds, so 250 more take 500 seconds."""
    monkeypatch.setattr(callbacks.time, "perf_counter", iter([100.0, 130.0]).__next__)
    trainer = Trainer(
        max_steps=270,
        callbacks=[StepProgress()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_epochs=-1,
    )
    batches = DataLoader([{"x1": X1[:2]}] * 6, batch_size=None)
    trainer.fit(ConditionalFlowMatching(ResidualMLP((2,), width=2, depth=1)), batches)
    out = capsys.readouterr().out
    assert "time      about 8 min more on this machine" in out
    assert "\r" not in out  # since this is no terminal
    told = [line.split(" batches")[0] for line in out.splitlines() if line.startswith("training")]
    assert told == [f"training  {27 * k} of 270" for k in range(1, 11)]


@QUIET
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_bar_starts_where_the_training_stands(tmp_path, accumulate, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # else there is no bar

    def fit(steps, **options):
        bar = StepProgress(refresh_rate=1)
        trainer = Trainer(
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            callbacks=[bar],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = ConditionalFlowMatching(ResidualMLP((2,), width=4, depth=1))
        # Epochs of six batches: the bar counts on through them.
        trainer.fit(module, DataLoader([{"x1": X1}] * 6, batch_size=None), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        shown = bar.train_progress_bar
        return shown.initial, shown.n, shown.total, shown.desc

    assert fit(4) == (0, 4 * accumulate, 4 * accumulate, "training: ")
    resumed = fit(10, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed == (4 * accumulate, 10 * accumulate, 10 * accumulate, "training: ")
