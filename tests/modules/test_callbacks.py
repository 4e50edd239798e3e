"""Pictures and progress while training."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.modules import ConditionalFlowMatching, SampleGrid, callbacks
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
        monkeypatch.setattr(callbacks, "save_picture", lambda x, *_: shown.append(x))
        module = ConditionalFlowMatching(Recording())
        module.sample_shape = (2,)
        trainer = SimpleNamespace(
            sanity_checking=False,
            is_global_zero=True,
            global_step=3,
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


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_bar_starts_where_the_training_stands(tmp_path, accumulate):
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
