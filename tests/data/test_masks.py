"""Masks made from images by a rule."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from flowkit.data import Digits, Toy
from flowkit.data.arrays import Arrays
from flowkit.data.masks import ForegroundRule, Masks
from flowkit.data.splits import SplitData
from tests.conftest import CONF


class Halves(SplitData):
    """Images whose left half alone is bright, mirrored in training."""

    def __init__(self):
        super().__init__(batch_size=64, seed=0, num_workers=0, flip=True)

    def load(self):
        self.num_classes = 2
        images = -torch.ones(32, 1, 4, 4)
        images[..., :2] = 1
        split = Arrays({"x1": images, "cond": torch.arange(32) % 2})
        return {"train": split, "val": split, "test": split}


def test_masks_are_the_rule_on_every_split():
    plain, data = Digits(batch_size=8), Masks(Digits(batch_size=8), threshold=-0.25)
    plain.setup()
    data.setup()
    for name in ("train", "val", "test"):
        images, batch = plain.split(name)[:50], data.split(name)[:50]
        assert torch.equal(batch["x1"], images["x1"])
        foreground = images["x1"][:, 0] > -0.25
        assert torch.equal(batch["cond"] > 0, foreground)
        labels = images["cond"][:, None, None].expand_as(foreground)
        assert torch.equal(batch["cond"][foreground], 1 + labels[foreground])
        assert len(data.split(name)) == len(plain.split(name))
        assert data.fingerprint(name) != plain.fingerprint(name)
    assert (data.shape, data.num_classes, data.batch_size) == ((1, 8, 8), None, 8)
    assert data.summary().endswith(", masks")


def test_training_masks_follow_mirrored_images():
    data = Masks(Halves(), threshold=0.0)
    data.setup()
    batch = data.stream()[3]
    mirrored = batch["x1"][:, 0, 0, 0] < 0
    assert 10 < mirrored.sum() < 54
    assert torch.equal(batch["cond"] > 0, batch["x1"][:, 0] > 0)
    plain = data.images.stream()[3]
    assert torch.equal(plain["x1"], batch["x1"])
    assert torch.equal(batch["cond"].amax((1, 2)) - 1, plain["cond"])


def test_loaders_serve_masks():
    data = Masks(Digits(batch_size=16), classes=False)
    data.setup()
    assert next(iter(data.train_dataloader()))["cond"].shape == (16, 8, 8)
    batches = list(data.test_dataloader())
    assert torch.cat([b["cond"] for b in batches]).unique().tolist() == [0, 1]
    assert sum(len(b["x1"]) for b in batches) == len(data.test)


def test_colors_count_by_their_mean():
    images = torch.tensor([1.0, -1.0, -0.6]).reshape(1, 3, 1, 1)
    assert ForegroundRule(-0.25, classes=False)(images).item() == 1
    assert ForegroundRule(-0.15, classes=False)(images).item() == 0


def test_classes_need_labels():
    data = Masks(Toy(size=10))
    data.setup()
    with pytest.raises(ValueError, match="classes must be False for data without labels, got True"):
        data.test[:2]


@pytest.mark.parametrize("name", ["digits_masks", "fashion_mnist_masks"])
def test_configurations_build(name, configure):
    assert (Path(CONF) / "data" / f"{name}.yaml").is_file()
    cfg = configure("train", f"data={name}", "batch_size=7", "seed=3")
    data = instantiate(cfg.data)
    assert isinstance(data, Masks)
    assert (data.batch_size, data.seed, data.images.batch_size) == (7, 3, 7)
