import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Folder
from flowkit.data.folder import square


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def lanczos(size, pixels, start, length):
    """Weights (size, pixels) that reduce [start, start + length) of a row to ``size`` pixels."""
    scale = length / size
    centers = start + (np.arange(size) + 0.5) * scale
    u = (np.arange(pixels) + 0.5 - centers[:, None]) / scale
    weights = np.where(np.abs(u) < 3, np.sinc(u) * np.sinc(u / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def test_crop_without_change_of_size_is_exact():
    wide, tall = noise(4, 10), noise(10, 4)
    assert np.array_equal(square(Image.fromarray(wide), 4).permute(1, 2, 0), wide[:, 3:7])
    assert np.array_equal(square(Image.fromarray(tall), 4).permute(1, 2, 0), tall[3:7])


def test_reduction_is_one_lanczos_resampling_of_the_centered_square():
    pixels = noise(60, 100, channels=1)
    ours = square(Image.fromarray(pixels), 10, channels=1)[0].double().numpy()
    expected = lanczos(10, 60, 0, 60) @ pixels.astype(float) @ lanczos(10, 100, 20, 60).T
    # Pillow rounds twice, after each axis: half a level, and half a level weighed by a filter
    # whose absolute weights sum to less than two.
    assert np.abs(ours - expected).max() <= 1.5


def test_fine_stripes_average_out():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    reduced = square(Image.fromarray(stripes), 8, channels=1)
    assert (reduced.double() - 127.5).abs().max() < 6


def test_orientation_is_respected(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = noise(4, 4)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        ours = square(turned, 4).permute(1, 2, 0).numpy()
    assert np.array_equal(ours, np.rot90(pixels[:, 2:6], -1))


def test_modes_are_converted():
    gray = noise(5, 5, channels=1)
    assert torch.equal(square(Image.fromarray(gray), 5), torch.tensor(gray).expand(3, 5, 5))
    red = Image.new("RGB", (3, 3), (255, 0, 0))
    assert square(red, 3, channels=1).unique().tolist() == [76]  # ITU-R 601 luma of red
    palette = Image.fromarray(noise(6, 6)).quantize(8)
    assert np.array_equal(square(palette, 6).permute(1, 2, 0), np.array(palette.convert("RGB")))
    with pytest.raises(ValueError, match="image must have 8 bits per channel, got mode I;16"):
        square(Image.fromarray(np.zeros((3, 3), np.uint16)), 3)


def write_classes(root, counts):
    """Images whose gray level is their number within all of the set."""
    level = 0
    for name, count in counts.items():
        (root / name).mkdir()
        for i in range(count):
            Image.new("L", (6, 5), level).save(root / name / f"{i:03}.png")
            level += 1


def test_sub_folders_are_classes(tmp_path):
    write_classes(tmp_path, {"dog": 20, "cat": 10})
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    data = Folder(tmp_path, 4, channels=1, val_fraction=0.1, test_fraction=0.2, batch_size=7)
    data.setup()
    assert (data.class_names, data.num_classes, data.shape) == (["cat", "dog"], 2, (1, 4, 4))
    levels = []
    for name in ("train", "val", "test"):
        batch = data.split(name)[:]
        level = ((batch["x1"] + 1) * 127.5).round().flatten(1)
        assert (level == level[:, :1]).all()
        assert torch.equal(batch["cond"], (level[:, 0] < 20).long())
        levels += level[:, 0].tolist()
    assert sorted(levels) == list(range(30))

    whole = torch.cat([b["x1"] for b in data.dataloader("train")])
    assert torch.equal(whole, data.train[:]["x1"])
    second = list(itertools.islice(data.train_dataloader(), 2))[1]
    assert torch.equal(data.stream()[1]["x1"], second["x1"])


def test_flat_folders_have_no_labels(tmp_path):
    for i in range(5):
        Image.fromarray(noise(4, 4, seed=i)).save(tmp_path / f"{i}.png")
    data = Folder(tmp_path, 4)
    data.setup()
    assert (data.num_classes, data.class_names) == (None, None)
    assert data.train[:].keys() == {"x1"}
    assert data.train[[]]["x1"].shape == (0, 3, 4, 4)
    assert ", no classes; test takes a share of 0.2" in data.summary()


def test_fingerprint_follows_names_sizes_and_labels(tmp_path):
    write_classes(tmp_path, {"a": 9, "b": 9})

    def fingerprint(**options):
        data = Folder(tmp_path, **({"image_size": 4} | options))
        data.setup()
        return data.fingerprint("train")

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_size=5) != first
    assert fingerprint(channels=1) != first
    assert fingerprint(split_seed=1) != first
    for file in (tmp_path / "a").iterdir():
        Image.fromarray(noise(30, 30)).save(file)
    assert fingerprint() != first


def test_broken_files_are_all_counted_and_ten_named(tmp_path):
    write_classes(tmp_path, {"a": 14})
    for i in range(12):
        (tmp_path / "a" / f"{i:03}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"got 12 broken: .*000\.png .*") as error:
        Folder(tmp_path, 4).setup()
    assert len(re.findall(r"\d{3}\.png \(", str(error.value))) == 10
    assert "…; remove or replace them" in str(error.value)


def test_files_cut_short_are_named_before_training(tmp_path):
    """Few files are all decoded, of many some; all with ``verify``, or when they are read."""
    for i in range(4):
        Image.fromarray(noise(64, 64, seed=i)).save(tmp_path / f"{i}.jpg")
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"got 1 broken: .*2\.jpg \(.*truncated"):
        Folder(tmp_path, 64).setup()
    (tmp_path / "2.jpg").write_bytes(whole)
    for i in range(100):
        Image.fromarray(noise(8, 8, seed=i)).save(tmp_path / f"more-{i}.jpg")
    data = Folder(tmp_path, 8)
    data.setup()
    (tmp_path / data.train.names[1]).write_bytes(whole[: len(whole) // 2])
    (tmp_path / data.train.names[60]).write_bytes(whole[: len(whole) // 3])
    split, cut = data.train, {data.train.names[1], data.train.names[60]}
    with pytest.raises(ValueError, match=r"got 1 broken: .*truncated"):
        split[[60]]
    with pytest.raises(ValueError, match="got 2 broken: ") as error:
        Folder(tmp_path, 8, verify=True).setup()
    assert all(name in str(error.value) for name in cut)


def test_images_of_16_bits_are_named_before_training(tmp_path):
    for i in range(90):
        Image.fromarray(noise(4, 4, seed=i)).save(tmp_path / f"{i}.png")
    deep = np.full((4, 4), 700, np.uint16)
    Image.fromarray(deep).save(tmp_path / "33.png")
    with pytest.raises(ValueError, match=r"33.png \(image must have 8 bits per channel"):
        Folder(tmp_path, 4).setup()


def test_folders_that_make_no_data_set_are_refused(tmp_path):
    (files := tmp_path / "files").mkdir()
    (files / "a.zip").touch()
    (files / "a.png").touch()
    for name, fix in (("a.zip", "unpack it, and give the folder"), ("a.png", "give its folder")):
        with pytest.raises(NotADirectoryError, match=f"got the file .*{name}; {fix}"):
            Folder(files / name, 4).setup()
    files.rename(tmp_path.with_name("away"))
    with pytest.raises(FileNotFoundError, match=r"root must be a folder, got .*nowhere"):
        Folder(tmp_path / "nowhere", 4).setup()
    with pytest.raises(ValueError, match=r"root must hold images \(.bmp, .* got no image in"):
        Folder(tmp_path, 4).setup()
    write_classes(tmp_path, {"a": 5, "empty": 0})
    with pytest.raises(ValueError, match="class folders must hold images, got no image in empty"):
        Folder(tmp_path, 4).setup()
    (tmp_path / "empty").rmdir()
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"images must lie in class folders .* got loose.png besi"):
        Folder(tmp_path, 4).setup()


def test_arguments_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        Folder(tmp_path, 0)
    with pytest.raises(ValueError, match=r"channels must be 1 \(gray\) or 3 \(RGB\), got 4"):
        Folder(tmp_path, 4, channels=4)
