import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Hub

datasets = pytest.importorskip("datasets")


def make(count, first=0, names=("even", "odd")):
    """Gray 6x4 images whose level is their number, labeled by its parity."""
    labels = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    levels = range(first, first + count)
    images = [Image.fromarray(np.full((4, 6), level, np.uint8)) for level in levels]
    rows = {"image": images, "label": [level % 2 for level in levels]}
    return datasets.Dataset.from_dict(rows, features=features)


def levels(split):
    batch = split[:]
    level = ((batch["x1"] + 1) * 127.5).round()[:, 0, 0, 0].long()
    assert torch.equal(batch["cond"], level % 2)
    return level.tolist()


def test_single_data_set_is_cut_in_three(tmp_path):
    make(40).save_to_disk(tmp_path / "set")
    data = Hub(tmp_path / "set", 4, channels=1, val_fraction=0.1, test_fraction=0.2, batch_size=3)
    data.setup()
    assert (data.shape, data.num_classes, data.class_names) == ((1, 4, 4), 2, ["even", "odd"])
    parts = [levels(data.split(name)) for name in ("train", "val", "test")]
    assert sorted(itertools.chain(*parts)) == list(range(40))
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) - 40 * share) < 12  # binomial, standard deviation 2.9 at most
    assert data.stream()[0]["x1"].shape == (3, 1, 4, 4)


def test_parts_of_the_set_are_kept_and_the_rest_carved(tmp_path):
    parts = {"train": make(20), "test": make(6, first=100)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    data = Hub(tmp_path / "set", 4, val_fraction=0.2)
    data.setup()
    assert levels(data.test) == list(range(100, 106))
    assert 0 < len(data.val) < 12
    assert "share" not in data.summary()
    assert sorted(levels(data.train) + levels(data.val)) == list(range(20))


def test_new_rows_move_no_other(tmp_path):
    """Wherever they lie; a copy of an image goes where the image is."""
    make(120).save_to_disk(tmp_path / "old")
    several = [make(60, 160), make(120), make(20, 10)]
    datasets.concatenate_datasets(several).save_to_disk(tmp_path / "new")
    parts = []
    for name in ("old", "new"):
        data = Hub(tmp_path / name, 4, channels=1, val_fraction=0.1, test_fraction=0.2)
        data.setup()
        parts.append([set(levels(data.split(split))) for split in ("train", "val", "test")])
    for old, new in zip(*parts, strict=True):
        assert new & set(range(120)) == old
    data = Hub(tmp_path / "new", 4, test_fraction=0.2, split_by="order")
    data.setup()
    assert [len(data.val), len(data.test)] == [10, 40]


def test_labels_may_be_absent_or_unnamed(tmp_path):
    make(10, names=None).save_to_disk(tmp_path / "set")
    data = Hub(tmp_path / "set", 4)
    data.setup()
    assert (data.num_classes, data.class_names) == (2, None)
    data = Hub(tmp_path / "set", 4, label_column=None)
    data.setup()
    assert data.num_classes is None
    assert data.train[:].keys() == {"x1"}


def test_a_folder_of_images_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("even", "odd"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
    for level in range(10):
        file = f"{['even', 'odd'][level % 2]}/{level}.png"
        Image.new("L", (5, 4), level).save(tmp_path / "set" / "train" / file)
    data = Hub(tmp_path / "set", 4, channels=1)
    data.setup()
    assert data.class_names == ["even", "odd"]
    parts = [levels(data.split(name)) for name in ("train", "val", "test")]
    assert sorted(itertools.chain(*parts)) == list(range(10))
    assert data.fingerprint("train") != data.fingerprint("val")


def test_fingerprint_follows_the_content(tmp_path):
    make(12).save_to_disk(tmp_path / "one")
    make(12).save_to_disk(tmp_path / "same")
    make(12, first=2).save_to_disk(tmp_path / "other")
    prints = []
    for name in ("one", "same", "other"):
        data = Hub(tmp_path / name, 4)
        data.setup()
        prints.append(data.fingerprint("train"))
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_what_does_not_fit_is_refused(tmp_path):
    make(10).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="image_column must be one of image, label, got 'img'"):
        Hub(tmp_path / "set", 4, image_column="img").setup()
    with pytest.raises(ValueError, match="label_column must be one of image, label, got 'class'"):
        Hub(tmp_path / "set", 4, label_column="class").setup()
    datasets.DatasetDict({"evaluation": make(4)}).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match="path must have a part train, got evaluation in"):
        Hub(tmp_path / "odd", 4).setup()
    hidden = make(4).map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": make(10), "test": hidden}).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match=r"labels of test must hold labels in \[0, 1\], got valu"):
        Hub(tmp_path / "hidden", 4).setup()
    named = make(4).cast_column("label", datasets.Value("string"))
    named.save_to_disk(tmp_path / "named")
    with pytest.raises(TypeError, match="label_column must hold integers, got '0' in label"):
        Hub(tmp_path / "named", 4).setup()


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets must be installed .*'\.\[hub\]'"):
        Hub(tmp_path, 4).setup()
