import os
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from flowkit.data import FromArrays
from flowkit.modules import ConditionalFlowMatching
from flowkit.nn import MLP


def ready(*args, **options):
    data = FromArrays(*args, **options)
    data.setup()
    return data


def content(data):
    """All samples and conditions, sorted by the first number of each sample."""
    parts = [data.split(name)[:] for name in ("train", "val", "test")]
    x1 = torch.cat([part["x1"] for part in parts])
    order = x1.flatten(1)[:, 0].argsort()
    conds = [part["cond"] for part in parts if "cond" in part]
    return x1[order], torch.cat(conds)[order] if conds else None


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


LEVELS = torch.arange(120, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 5)
LABELS = torch.arange(120) % 3


@pytest.mark.parametrize(
    "x1",
    [
        LEVELS,
        LEVELS.numpy(),
        LEVELS.permute(0, 2, 3, 1),
        np.asfortranarray(LEVELS.permute(0, 2, 3, 1).numpy())[::1],
        LEVELS.double() / 127.5 - 1,
        (LEVELS.numpy() / 127.5 - 1).astype(">f4"),
    ],
    ids=["bytes", "numpy", "channels last", "fortran", "float64", "other byte order"],
)
def test_the_same_images_in_any_form_are_the_same_data(x1):
    found, cond = content(ready(x1, LABELS.numpy().astype(np.int32)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LEVELS.float() / 127.5 - 1, rtol=0, atol=2e-7)
    assert torch.equal(cond, LABELS)


@pytest.mark.parametrize(
    ("x1", "value_range"),
    [
        (LEVELS.float() / 255, (0, 1)),
        (LEVELS.int(), (0, 255)),
        (LEVELS.numpy().astype(np.uint16) * 257, (0, 65535)),
        (LEVELS.half() - 128, [-128, 127]),
    ],
)
def test_a_range_is_mapped_to_that_of_images(x1, value_range):
    found, _ = content(ready(x1, value_range=value_range))
    torch.testing.assert_close(found, LEVELS.float() / 127.5 - 1, rtol=0, atol=2e-7)


def test_gray_images_get_a_channel_and_points_and_latents_stay_as_they_are():
    assert ready(LEVELS[:, 0]).shape == (1, 4, 5)
    points = torch.arange(200.0).reshape(100, 2) - 3
    assert torch.equal(content(ready(points.double()))[0], points)
    latents = torch.arange(100.0)[:, None, None, None].expand(-1, 4, 2, 2)
    assert torch.equal(content(ready(latents))[0], latents)
    numbers = torch.arange(100.0)[:, None]
    data = ready(numbers, numbers / 2)
    assert data.num_classes is None
    assert torch.equal(content(data)[1], numbers / 2)


@pytest.mark.parametrize(
    "items",
    [
        TensorDataset(LEVELS, LABELS),
        Items([(level.numpy(), int(label)) for level, label in zip(LEVELS, LABELS, strict=True)]),
        Items([{"x1": a, "cond": b} for a, b in zip(LEVELS, LABELS, strict=True)]),
    ],
    ids=["tuples", "arrays and numbers", "mappings"],
)
def test_a_data_set_is_read_item_by_item(items):
    data = ready(items, class_names=["a", "b", "c"])
    found, cond = content(data)
    torch.testing.assert_close(found, LEVELS.float() / 127.5 - 1, rtol=0, atol=2e-7)
    assert torch.equal(cond, LABELS)
    assert (data.num_classes, data.class_names) == (3, ["a", "b", "c"])


def test_items_may_have_no_conditions():
    for items in (Items(list(LEVELS)), TensorDataset(LEVELS), Items([{"x1": x} for x in LEVELS])):
        assert content(ready(items))[1] is None


def test_new_samples_move_no_other_and_equal_ones_stay_together():
    x1 = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    rows = [
        {name: set(map(tuple, data.split(name)[:]["x1"].tolist())) for name in data.sizes()}
        for data in (
            ready(x1[:1200], test_fraction=0.1),
            ready(torch.cat([x1, x1]).flip(0), test_fraction=0.1),
        )
    ]
    for name in ("train", "val", "test"):
        assert rows[0][name] < rows[1][name]
    assert not rows[1]["train"] & rows[1]["test"]


def test_files_are_read_from_their_folder(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", LEVELS.numpy())
    np.save(tmp_path / "y.npy", LABELS.numpy())
    there = ready("x.npy", "y.npy", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ready("x.npy", "y.npy").fingerprint("test") == there.fingerprint("test")
    assert torch.equal(content(there)[1], LABELS)


def test_a_trainer_of_lightning_learns_from_it():
    """Samples come to the place of all points."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=0.02)
    module = ConditionalFlowMatching(MLP((2,), width=32), optimizer=optimizer)
    data = FromArrays(torch.full((300, 2), 3.0) + torch.arange(300.0)[:, None] / 3000)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=200, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, data)
    mean = module.sample(200, seeds=range(200)).mean(0)
    torch.testing.assert_close(mean, torch.full((2,), 3.05), rtol=0, atol=0.3)


class Ran:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_of_python_objects_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.array([Ran()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x1 must be a whole \.npy file of numbers, without Py"):
        ready("x.npy")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_arrays_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", LEVELS.numpy())
    whole = (tmp_path / "x.npy").read_bytes()
    np.savez(tmp_path / "z.npy", LEVELS.numpy())
    np.save(tmp_path / "s.npy", np.zeros(9, [("a", "f4"), ("b", "i4")]))
    os.replace(tmp_path / "z.npy.npz", tmp_path / "z.npy")
    (tmp_path / "half.npy").write_bytes(whole[:-9])
    (tmp_path / "head.npy").write_bytes(whole[:40])
    (tmp_path / "none.npy").touch()
    for name in ("half.npy", "head.npy"):
        with pytest.raises(ValueError, match=rf"x1 must be a whole \.npy file .* got .*{name}: "):
            ready(name, root=tmp_path)
    for name in ("z.npy", "none.npy"):
        with pytest.raises(ValueError, match=r"x1 must be a \.npy file, as numpy.save writes it"):
            ready(name, root=tmp_path)
    with pytest.raises(TypeError, match="x1 must hold real numbers, got "):
        ready("s.npy", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cond must be a \.npy file, got .*away\.npy; a "):
        ready("x.npy", "away.npy", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x1 must be a \.npy file, got "):
        ready(tmp_path)


FLOATS = torch.linspace(-1, 1, 120)[:, None, None, None].expand(-1, 1, 4, 4)


@pytest.mark.parametrize(
    ("x1", "cond", "kind", "message"),
    [
        ([1, 2], None, TypeError, "x1 must be a tensor, an array, a .npy file or a data set of"),
        (
            LEVELS.long(),
            None,
            TypeError,
            r"x1 must hold bytes \(uint8\) or floats, got torch.int64",
        ),
        (LEVELS > 3, None, TypeError, r"x1 must hold bytes \(uint8\) or floats, got torch.bool"),
        (FLOATS + 1j, None, TypeError, "x1 must hold real numbers, got torch.complex64"),
        (np.array(["a"]), None, TypeError, "x1 must hold real numbers, got <U1"),
        (FLOATS.to("meta"), None, TypeError, "x1 must hold real numbers, got a tensor on the meta"),
        (LEVELS[:0], None, ValueError, r"x1 must hold samples, got shape \(0, 3, 4, 5\)"),
        (
            FLOATS[:, 0, 0, 0],
            None,
            ValueError,
            r"x1 must have two dimensions or more, \(N, \*\), g",
        ),
        (LEVELS[:, 0, 0], None, ValueError, r"x1 must be images .* got shape \(120, 5\); reshape"),
        (LEVELS[:, :2], None, ValueError, r"x1 must be images .* got shape \(120, 2, 4, 5\); res"),
        (
            FLOATS * 2,
            None,
            ValueError,
            r"x1 must hold images in \[-1, 1\], got values in \[-2, 2\]",
        ),
        (
            FLOATS.abs(),
            None,
            ValueError,
            r"got values in \[0.*, 1\]; value_range=\[0,1\] maps them, ",
        ),
        (
            128 + 127 * FLOATS,
            None,
            ValueError,
            r"got values in \[1, 255\]; value_range=\[0,255\] m",
        ),
        (
            FLOATS / 0,
            None,
            ValueError,
            "x1 must be finite, got 1920 NaN or infinite of 1920 values",
        ),
        (FLOATS, LABELS[1:], ValueError, r"cond must have 120 rows like x1, got shape \(119,\)"),
        (FLOATS, LABELS * 1.0, TypeError, r"cond must hold whole numbers .*; astype\(int\) makes"),
        (FLOATS, LABELS > 1, TypeError, r"cond must hold whole numbers .* got torch.bool of sha"),
        (
            FLOATS,
            LABELS[:, None],
            TypeError,
            r"cond must hold whole numbers .* of shape \(120, 1\)",
        ),
        (
            FLOATS,
            LABELS - 1,
            ValueError,
            r"cond must hold labels in \[0, 1\], got values in \[-1, ",
        ),
        (
            TensorDataset(LEVELS),
            LABELS,
            ValueError,
            "cond must be None for a data set, whose items",
        ),
        (Items([]), None, ValueError, "x1 must hold samples, got an empty Items"),
        (Items(["a"]), None, TypeError, "items of x1 must be a tensor, .* got str in item 0"),
        (Items([{"image": 1}]), None, TypeError, "items of x1 must be .* got keys image in item 0"),
        (Items([("a", 1)]), None, TypeError, "x1 of an item must be a tensor or an array, got str"),
        (
            Items([(LEVELS[0], "a")]),
            None,
            TypeError,
            "cond of item 0 must hold real numbers, got <U1",
        ),
        (
            Items([LEVELS[0], LEVELS[0, 0]]),
            None,
            ValueError,
            r"x1 of all items must have one sha.*1$",
        ),
        (
            Items([(LEVELS[0], 1), LEVELS[1]]),
            None,
            ValueError,
            "must all have a cond or none, got 1",
        ),
    ],
)
def test_other_data_are_refused(x1, cond, kind, message):
    with pytest.raises(kind, match=message):
        ready(x1, cond)


def test_streams_and_wrong_options_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="x1 must be a data set with a length and items by number"):
        ready(Endless())
    with pytest.raises(
        ValueError, match=r"value_range must be two increasing numbers, got \[1, 0\]"
    ):
        FromArrays(LEVELS, value_range=[1, 0])
    with pytest.raises(
        ValueError, match=r"cond must hold labels in \[0, 1\], got values in \[0, 2"
    ):
        ready(LEVELS, LABELS, class_names=["a", "b"])


def test_what_may_be_a_mistake_is_said():
    gray = FLOATS[:, 0]
    for x1, option in (
        (gray.abs() / gray.abs().max(), "value_range=[0,1]"),
        (gray / gray.abs().max(), "value_range=[-1,1]"),
        (gray.abs() / gray.abs().max() * 200, "value_range=[0,255]"),
        (gray / gray.abs().max() * 9, "value_range=[<black>,<white>]"),
    ):
        data = ready(x1)
        said = f"read as sequences (N, T, C), not as gray images (N, H, W): with {option} they are"
        assert said in data.summary()
        assert data.shape == gray.shape[1:]
        if "<" not in option:  # what the line says makes images
            low, high = (float(n) for n in option[13:-1].split(","))
            images = ready(x1, value_range=(low, high))
            assert images.shape == (1, *gray.shape[1:])
            assert "not as" not in images.summary()
            expected = 2 * (x1 - low) / (high - low) - 1
            assert content(images)[0].sum() == pytest.approx(expected.sum().item(), rel=1e-4)
    four = torch.rand(40, 4, 2, 2)
    assert "not read as images, which have 1 or 3 channels" in ready(four).summary()
    assert "test takes a share of 0.2, since" in ready(LEVELS).summary()
