from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flowkit.data import Digits
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData, partition


@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=200),
    st.floats(0.01, 0.45),
    st.floats(0.01, 0.45),
    st.integers(0, 100),
)
def test_parts_are_disjoint_stratified_and_repeatable(classes, val, test, seed):
    labels = torch.tensor(classes)
    assume(sum(max(1, round(f * len(labels))) for f in (val, test)) < len(labels))
    parts = partition(len(labels), [val, test], seed, labels)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    for part, fraction in zip(parts[1:], (val, test), strict=True):
        share = max(1, round(fraction * len(labels)))
        assert len(part) == share
        for k in labels.unique():
            proportional = share * (labels == k).sum() / len(labels)
            assert abs((labels[part] == k).sum() - proportional) < 2
    again = partition(len(labels), [val, test], seed, labels)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_parts_are_random_in_choice_and_order():
    labels = torch.arange(10).repeat_interleave(100)
    _, val = partition(1000, [0.2], 0, labels)
    _, other = partition(1000, [0.2], 1, labels)
    common = len(set(val.tolist()) & set(other.tolist()))
    assert abs(common - 40) < 28  # hypergeometric: 200·200/1000, standard deviation 5.1
    # The first half is no pile of the first classes: 50 of 100 places for classes below 5.
    assert abs(int((labels[val[:100]] < 5).sum()) - 50) < 25


@pytest.mark.parametrize("fractions", [[0.0], [0.5, 0.5], [-0.1, 0.2], [float("nan")]])
def test_fractions_out_of_range_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions of the splits must be positive and sum to"):
        partition(10, fractions, 0)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="number of samples must be at least 3, got 2"):
        partition(2, [0.1, 0.1], 0)
    with pytest.raises(ValueError, match="fractions of the splits must leave samples for training"):
        partition(20, [0.5, 0.49], 0)


class Numbers(SplitData):
    """Thirteen numbered samples; an epoch ends within a batch of four."""

    def __init__(self, num_workers=0, batch_size=4):
        super().__init__(batch_size=batch_size, seed=1, num_workers=num_workers)
        self.loads = 0

    def load(self):
        self.loads += 1
        rows = torch.arange(19.0)[:, None]
        return {
            "train": Arrays({"x1": rows[:13]}),
            "val": Arrays({"x1": rows[13:]}),
            "test": Arrays({"x1": rows[:5]}),
        }


class Recorder(LightningModule):
    """A model that notes what it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["x1"].flatten().tolist())
        return (self.weight - batch["x1"].mean()).square()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["x1"].flatten().tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def new_trainer(**options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return Trainer(**(defaults | options))


def fit(data, ckpt_path=None, **options):
    module, trainer = Recorder(), new_trainer(**options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


class Keep(Callback):
    """Writes a checkpoint where Lightning's own callback would, after some batches."""

    def __init__(self, file, batches):
        self.file, self.batches = file, batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.file)


def expected(steps):
    data = Numbers()
    data.setup()
    return [data.stream()[k]["x1"].flatten().tolist() for k in range(steps)]


def lightning(test):
    # What Lightning warns about on its own: a torch name it uses, and few workers.
    for message in (".*LeafSpec.*", ".*does not have many workers"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


@lightning
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_training_sees_the_batches_of_an_uninterrupted_one(
    tmp_path, num_workers, accumulate
):
    options = {
        "accumulate_grad_batches": accumulate,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    }
    keep = Keep(tmp_path / "passing.ckpt", 6 * accumulate)
    straight, _ = fit(Numbers(num_workers), max_steps=10, callbacks=[keep], **options)
    assert straight.seen == expected(10 * accumulate)
    assert len(straight.validated) == 2 * (10 * accumulate // 3)

    half, trainer = fit(Numbers(num_workers), max_steps=6, **options)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    for checkpoint in ("stopped.ckpt", "passing.ckpt"):
        rest, _ = fit(Numbers(num_workers), tmp_path / checkpoint, max_steps=10, **options)
        assert half.seen + rest.seen == straight.seen
        assert torch.equal(rest.weight, straight.weight)


@lightning
def test_training_that_died_within_a_step_repeats_that_step(tmp_path):
    class Dying(Recorder):
        def training_step(self, batch, batch_idx):
            if batch_idx == 7:
                raise KeyError("the lights went out")
            return super().training_step(batch, batch_idx)

    module, options = Dying(), {"max_steps": 10, "limit_val_batches": 0}
    trainer = new_trainer(**options)
    with pytest.raises(KeyError, match="the lights"):
        trainer.fit(module, Numbers())
    trainer.save_checkpoint(tmp_path / "died.ckpt")
    rest, _ = fit(Numbers(), tmp_path / "died.ckpt", **options)
    assert module.seen + rest.seen == expected(10)


@lightning
def test_lightning_epochs_continue_the_stream():
    module, _ = fit(Numbers(), max_epochs=3, limit_train_batches=2, limit_val_batches=0)
    assert module.seen == expected(6)


@lightning
def test_overfitting_repeats_the_first_batches():
    module, _ = fit(Numbers(), max_steps=6, overfit_batches=2, limit_val_batches=0)
    assert module.seen == expected(2) * 3


@lightning
def test_validation_reads_its_split_in_order():
    data = Numbers()
    module, trainer = fit(data, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
    assert module.validated == [[13, 14, 15, 16], [17, 18]]
    assert data.loads == 1
    trainer.validate(module, data, verbose=False)
    assert module.validated[2:] == [[13, 14, 15, 16], [17, 18]]
    assert data.loads == 1


def test_loaders_take_the_share_of_their_rank():
    data = Numbers(batch_size=2)
    data.setup()
    progress = SimpleNamespace(total=SimpleNamespace(processed=5))
    data.trainer = SimpleNamespace(
        global_rank=1,
        world_size=2,
        overfit_batches=0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    batch = next(iter(data.train_dataloader()))["x1"].flatten().tolist()
    assert batch == expected(6)[5][1::2]
    assert [b["x1"].flatten().tolist() for b in data.val_dataloader()] == [[14, 16], [18]]
    assert [b["x1"].flatten().tolist() for b in data.test_dataloader()] == [[1, 3]]


def test_a_split_is_read_whole_outside_of_training():
    data = Numbers()
    data.setup("fit")
    rows = torch.cat([batch["x1"] for batch in data.dataloader("train", batch_size=5)])
    assert torch.equal(rows, torch.arange(13.0)[:, None])
    assert data.shape == (1,)
    assert (data.num_classes, data.class_names) == (None, None)


def test_use_before_setup_and_wrong_names_are_refused():
    data = Numbers()
    with pytest.raises(RuntimeError, match=r"Numbers must be set up .*; call setup\(\) first"):
        _ = data.train
    with pytest.raises(ValueError, match="split must be one of test, train, val, got 'valid'"):
        data.split("valid")


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Digits(batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        Digits(num_workers=-1)


def test_digits_are_mapped_exactly_and_split_by_class():
    from sklearn.datasets import load_digits

    data = Digits()
    data.setup()
    assert (data.num_classes, data.class_names) == (10, list("0123456789"))
    splits = [data.train, data.val, data.test]
    rows = torch.cat([split[:]["x1"] for split in splits])
    labels = torch.cat([split[:]["cond"] for split in splits])
    levels = (rows + 1) * 8
    assert set(levels.unique().tolist()) == set(range(17))

    scans = load_digits()
    ours = torch.cat([labels[:, None], levels.flatten(1)], dim=1).unique(dim=0)
    theirs = torch.cat(
        [torch.tensor(scans.target)[:, None], torch.tensor(scans.data)], dim=1
    ).unique(dim=0)
    assert len(rows) == 1797
    assert torch.equal(ours.double(), theirs.double())

    for split in splits:
        share = split[:]["cond"].bincount() / len(split)
        torch.testing.assert_close(share, labels.bincount() / 1797, rtol=0, atol=2 / len(split))
    prints = {data.fingerprint(name) for name in ("train", "val", "test")}
    again, other = Digits(seed=1), Digits(split_seed=1)
    again.setup()
    other.setup()
    assert again.fingerprint("val") in prints
    assert other.fingerprint("val") not in prints
    assert len(prints) == 3
