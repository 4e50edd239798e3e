"""Images and their masks from files."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import MaskFolder
from flowkit.data.mask_folder import read_mask

COLORS = [[0, 0, 0], [200, 10, 0], [10, 0, 200]]


def blocks(height, width, size, seed=0):
    """Labels 0, 1, 2 in blocks of ``size`` pixels."""
    cells = np.random.default_rng(seed).integers(0, 3, (height // size, width // size))
    return cells.repeat(size, 0).repeat(size, 1).astype(np.uint8)


def write(root, count=30, size=8):
    """Images of three gray levels, and masks of the same pattern."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for k in range(count):
        labels = blocks(size, 2 * size, 2, seed=k)
        Image.fromarray(labels * 100).convert("RGB").save(root / "images" / f"{k:02}.png")
        Image.fromarray(labels).save(root / "masks" / f"{k:02}.png")
    return root


def labels_of_images(x1):
    return ((x1.mean(1) + 1) * 127.5 / 100).round().long()


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_labels_are_levels_indices_or_places_of_colors(tmp_path, mode):
    labels = blocks(8, 8, 1)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette(np.array(COLORS, np.uint8).tobytes())
    if mode == "I;16":
        image = Image.fromarray(labels.astype(np.uint16) * 300)
    if mode == "RGB":
        image = Image.fromarray(np.array(COLORS, np.uint8)[labels])
    image.save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", 8, COLORS if mode == "RGB" else None)
    assert read.dtype == torch.int64
    assert read.tolist() == (labels.astype(int) * (300 if mode == "I;16" else 1)).tolist()


def test_bits_are_two_labels(tmp_path):
    labels = blocks(8, 8, 1) > 0
    Image.fromarray(labels).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 8).tolist() == labels.astype(int).tolist()


def test_a_palette_may_be_read_by_its_colors(tmp_path):
    labels = blocks(8, 8, 1)
    image = Image.fromarray(2 - labels)
    image.putpalette(np.array(COLORS[::-1], np.uint8).tobytes())
    image.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 8, COLORS).tolist() == labels.tolist()


@pytest.mark.parametrize("image_size", [4, 8, 16])
def test_masks_are_cut_and_resized_as_their_images(root, image_size):
    """Blocks of two pixels, at half, whole and twice their size: the middle square of each."""
    data = MaskFolder(root, image_size)
    data.setup()
    batch = data.train[:]
    assert batch["cond"].shape == (len(data.train), image_size, image_size)
    expected = torch.from_numpy(blocks(8, 16, 2, seed=int(data.train.masks[3].stem))[:, 4:12])
    factor = image_size / 8
    rows = (torch.arange(image_size) / factor).long()
    assert torch.equal(batch["cond"][3], expected[rows][:, rows].long())
    if image_size == 8:  # others are smoothed images of sharp masks
        assert torch.equal(batch["cond"], labels_of_images(batch["x1"]))


def test_masks_are_mirrored_with_their_images(root):
    data, plain = (MaskFolder(root, 8, batch_size=16, flip=flip) for flip in (True, False))
    data.setup()
    plain.setup()
    changed = 0
    for step in range(4):
        batch, still = data.stream()[step], plain.stream()[step]
        assert torch.equal(batch["cond"], labels_of_images(batch["x1"]))
        mirrored = (batch["x1"] != still["x1"]).flatten(1).any(1)
        assert torch.equal(batch["cond"][mirrored], still["cond"][mirrored].flip(-1))
        changed += int(mirrored.sum())
    assert 20 < changed < 44


def test_splits_are_disjoint_and_whole(root):
    data = MaskFolder(root, 8, channels=1, val_fraction=0.2, test_fraction=0.1)
    data.setup()
    masks = [mask.stem for name in ("train", "val", "test") for mask in data.split(name).masks]
    assert sorted(masks) == [f"{k:02}" for k in range(30)]
    assert data.shape == (1, 8, 8)
    assert data.summary().endswith(", masks")
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(batch["cond"], data.test[:]["cond"])


def test_the_fingerprint_follows_masks_and_colors(root):
    def fingerprint(**options):
        data = MaskFolder(root, 8, **options)
        data.setup()
        return data.fingerprint("train")

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(colors=[[level] * 3 for level in range(3)]) != first
    for mask in (root / "masks").iterdir():
        Image.open(mask).save(mask, compress_level=0)
    assert fingerprint() != first


def _setup(root, **options):
    MaskFolder(root, 8, **options).setup()


def test_missing_lossy_and_doubled_masks_are_named(root):
    mask = root / "masks" / "03.png"
    message = "must have one mask of the same name .* got 1 without: "
    Image.open(mask).save(mask.with_suffix(".tif"))
    with pytest.raises(ValueError, match=message + r"03.png \(03.png, 03.tif\)"):
        _setup(root)
    Image.open(mask).save(mask.with_suffix(".jpg"))
    mask.with_suffix(".tif").unlink()
    mask.unlink()
    with pytest.raises(ValueError, match=message + r"03.png \(03.jpg\)"):
        _setup(root)
    mask.with_suffix(".jpg").unlink()
    with pytest.raises(ValueError, match=message + r"03.png \(no mask\)"):
        _setup(root)


def test_masks_of_another_size_than_the_image_are_named(root):
    Image.new("L", (8, 8)).save(root / "masks" / "05.png")
    with pytest.raises(
        ValueError,
        match=r"size of their images, got 1 .*05.png \(\(8, 8\) beside \(16, 8\)\)",
    ):
        _setup(root)


def test_an_image_that_was_turned_has_the_size_that_is_seen(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = blocks(8, 16, 2, seed=5)
    turned = np.rot90(labels * 100)  # turned clockwise, it is seen as it was
    Image.fromarray(turned).save(root / "images" / "05.png", exif=exif)
    data = MaskFolder(root, 8)
    data.setup()
    batch = data.train[:]
    assert torch.equal(batch["cond"], labels_of_images(batch["x1"]))


def test_folders_that_are_missing_or_empty_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root .* got no images and no masks in"):
        _setup(tmp_path)
    write(tmp_path, count=5)
    for mask in (tmp_path / "masks").iterdir():
        mask.unlink()
    with pytest.raises(ValueError, match=r"root must hold images .* got no image in .*masks"):
        _setup(tmp_path)


def test_what_is_no_mask_is_refused_by_its_name(root):
    file = root / "masks" / "07.png"
    Image.fromarray(np.array(COLORS, np.uint8)[blocks(8, 16, 2)]).save(file)
    with pytest.raises(ValueError, match=r"07.png \(mask must hold one label per pixel, got"):
        _setup(root)
    other = np.array(COLORS, np.uint8)[blocks(8, 16, 2)]
    other[3, 9] = [1, 2, 3]
    Image.fromarray(other).save(file)
    message = re.escape("mask must hold only the given colors, got [1, 2, 3]")
    with pytest.raises(ValueError, match=message):
        read_mask(file, 8, COLORS)
    (root / "masks" / "08.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"files must be readable, got 1 broken: .*08.png"):
        _setup(root)


@pytest.mark.parametrize("colors", [[[0, 0, 0]], [[0, 0], [1, 1]], [[0, 0, 0]] * 2, [[0, 0, 256]]])
def test_bad_colors_are_refused(tmp_path, colors):
    with pytest.raises(ValueError, match=r"colors must be two or more RGB triples in 0\.\.\.255"):
        MaskFolder(tmp_path, 8, colors=colors)
