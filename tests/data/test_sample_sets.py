"""Sets of samples: the same images in every format, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data.broken import BrokenFiles
from flowkit.data.digits import Digits
from flowkit.data.image_files import folder_of_images, tar_of_images
from flowkit.data.npz import Npz
from flowkit.data.pixels import Resize
from flowkit.data.sample_sets import Drawn, NpzImages, OfSplit, Resized, SampleSet
from flowkit.metrics import from_uint8
from flowkit.metrics.pictures import to_uint8

COUNT = 13
G = torch.Generator().manual_seed(3)
COLOR = torch.randint(0, 256, (COUNT, 3, 6, 5), dtype=torch.uint8, generator=G)
LABELS = torch.randint(0, 4, (COUNT,), generator=G)


def write_folder(root, pixels, suffix=".png"):
    root.mkdir(parents=True, exist_ok=True)
    for k, one in enumerate(pixels):
        array = one.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(root / f"{k}{suffix}")
    return root


def write_tar(file, folder, labels):
    with tarfile.open(file, "w") as tar:
        for k, label in enumerate(labels.tolist()):
            contents = {"png": (folder / f"{k}.png").read_bytes(), "cls": str(label).encode()}
            for kind, content in contents.items():
                info = tarfile.TarInfo(f"{k}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def sets(tmp_path):
    """The same images in all formats."""
    last = COLOR.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=last, arr_1=LABELS.numpy())
    np.savez_compressed(tmp_path / "z.npz", arr_0=last, arr_1=LABELS.numpy())
    folder = write_folder(tmp_path / "folder", COLOR)
    pairs = [[f"{k}.png", int(label)] for k, label in enumerate(LABELS)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs[::-1]}))
    write_tar(tmp_path / "a.tar", folder, LABELS)
    torch.save({"samples": from_uint8(COLOR), "cond": LABELS}, tmp_path / "a.pt")
    return {
        "npz": NpzImages(Npz.open(tmp_path / "a.npz")),
        "compressed": NpzImages(Npz.open(tmp_path / "z.npz")),
        "folder": folder_of_images(folder, "samples"),
        "tar": tar_of_images([tmp_path / "a.tar"], "a.tar", "samples"),
        "pt": Drawn.open(tmp_path / "a.pt", "samples", "round"),
    }


def test_every_format_gives_the_same_images_and_classes(sets):
    rows = torch.tensor([0, 2, 3, 12])
    for name, found in sets.items():
        assert isinstance(found, SampleSet)
        assert (len(found), found.shape) == (COUNT, (3, 6, 5)), name
        for chosen in (rows, torch.arange(COUNT)):
            pixels, labels = found.read(chosen)
            assert pixels.dtype == torch.uint8
            assert torch.equal(pixels, COLOR[chosen]), name
            assert torch.equal(labels, LABELS[chosen]), name


def test_the_state_follows_the_files(sets, tmp_path):
    before = {name: found.state for name, found in sets.items()}
    assert len(set(before.values())) == len(before)
    write_folder(tmp_path / "folder", 255 - COLOR[:1])
    assert folder_of_images(tmp_path / "folder", "samples").state != before["folder"]
    torch.save({"samples": from_uint8(COLOR), "cond": None}, tmp_path / "a.pt")
    other = Drawn.open(tmp_path / "a.pt", "samples", "round")
    assert other.state != before["pt"] != Drawn.open(tmp_path / "a.pt", "samples", "floor").state
    assert other.read(torch.tensor([0])).labels is None


def test_the_state_follows_each_of_many_classes(tmp_path):
    for k in range(1200):
        Image.new("L", (2, 2), k % 256).save(tmp_path / f"{k}.bmp")
    states = set()
    for label in (0, 1):  # of an image in the middle
        pairs = [[f"{k}.bmp", label if k == 600 else 0] for k in range(1200)]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
        states.add(folder_of_images(tmp_path, "samples").state)
    assert len(states) == 2


def test_gray_files_have_one_channel_and_a_color_among_them_three(tmp_path):
    gray = folder_of_images(write_folder(tmp_path / "a", COLOR[:3, :1]), "samples")
    assert gray.shape == (1, 6, 5)
    write_folder(tmp_path / "a" / "deep" / "er", COLOR[:1])
    mixed = folder_of_images(tmp_path / "a", "samples")
    assert mixed.shape == (3, 6, 5)
    pixels = mixed.read(torch.arange(4)).pixels
    assert torch.equal(pixels[:3], COLOR[:3, :1].expand(-1, 3, -1, -1))
    assert torch.equal(pixels[3], COLOR[0])


def test_names_are_in_natural_order_and_sub_folders_are_classes_if_asked(tmp_path):
    for folder, level in (("c10", 100), ("c2", 20)):
        images = (
            torch.full((11, 1, 4, 4), level).byte() + torch.arange(11).byte()[:, None, None, None]
        )
        write_folder(tmp_path / folder, images)
    found = folder_of_images(tmp_path, "samples", class_folders=True)
    pixels, labels = found.read(torch.arange(22))
    assert pixels[:, 0, 0, 0].tolist() == [*range(20, 31), *range(100, 111)]
    assert labels.tolist() == [0] * 11 + [1] * 11
    assert found.classes == ["c2", "c10"]
    assert folder_of_images(tmp_path, "samples").read(torch.arange(1)).labels is None
    write_folder(tmp_path, COLOR[:1, :1])
    with pytest.raises(ValueError, match=r"samples must lie in class folders .*, got 0\.png in"):
        folder_of_images(tmp_path, "samples", class_folders=True)


def test_the_quality_of_jpeg_files_is_in_the_record(tmp_path):
    for k in range(3):
        Image.fromarray(COLOR[k].permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.jpg", quality=83)
    stored = folder_of_images(tmp_path, "samples").stored
    assert (stored["file_format"], stored["jpeg_quality"]) == ("jpeg", 83)
    write_folder(tmp_path, COLOR[:1])
    assert folder_of_images(tmp_path, "samples").stored["file_format"] == "jpeg, png"


def test_floats_become_bytes_by_the_rule(tmp_path):
    samples = torch.rand(4, 1, 3, 3, generator=G) * 2 - 1
    torch.save({"samples": samples, "cond": torch.rand(4, 2)}, tmp_path / "a.pt")
    for rule in ("round", "floor", "truncate"):
        found = Drawn.open(tmp_path / "a.pt", "samples", rule)
        assert torch.equal(found.read(torch.arange(4)).pixels, to_uint8(samples, rule))
        assert found.read(torch.arange(4)).labels is None
        assert found.stored["quantization"] == rule
    samples[2, 0, 1, 1] = torch.nan
    torch.save({"samples": samples}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in sample 2 of .*a\.pt"):
        Drawn.open(tmp_path / "a.pt", "samples", "round").read(torch.arange(1, 4))


def test_a_split_of_data_gives_its_own_bytes():
    data = Digits()
    data.setup()
    found = OfSplit(data.test, "digits", data.num_classes, data.class_names)
    pixels, labels = found.read(torch.tensor([1, 5]))
    assert torch.equal(from_uint8(pixels), from_uint8(to_uint8(data.test[[1, 5]]["x1"])))
    assert torch.equal(labels, data.test[[1, 5]]["cond"])


def test_a_resize_is_the_same_in_every_format(sets, tmp_path):
    for resize in (Resize(4), Resize(4, "bicubic"), Resize(4, "bilinear", antialias=False)):
        folder = folder_of_images(tmp_path / "folder", "samples", resize=resize)
        expected = torch.stack([resize(one) for one in COLOR])
        assert folder.shape == expected.shape[1:] == (3, 4, 4)
        assert torch.equal(folder.read(torch.arange(COUNT)).pixels, expected)
        for name in ("npz", "pt"):
            found = Resized(sets[name], resize)
            assert found.shape == (3, 4, 4)
            assert torch.equal(found.read(torch.arange(COUNT)).pixels, expected)
            assert found.state != sets[name].state


# --- refused ----------------------------------------------------------------------------------


def npz_of(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return NpzImages(Npz.open(tmp_path / "a.npz"), "reference")


LAST = COLOR.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (LAST / 127.5 - 1, TypeError, r"float64 in \[-1, 1\] in .*; write \(127.5 \* \(x \+ 1\)\)"),
        (LAST / 255, TypeError, r"float64 in \[0, 1\] in .*; write \(255 \* x\)"),
        (LAST.astype(np.float32), TypeError, r"float32 in \[0, 255\] in .*; write x.round\(\)"),
        (LAST.astype(int), TypeError, r"int64 in \[0, 255\] in .*"),
        (7.0 * LAST, TypeError, r"float64 in \[0, 1785\] in .*; map them to whole numbers"),
        (LAST.astype("U3"), TypeError, "uint8 images in arr_0, got <U3"),
        (COLOR.numpy(), ValueError, r"got shape \(13, 3, 6, 5\) in .*; channels are last: write"),
        (LAST[..., 0], ValueError, r"got shape \(13, 6, 5\) in .*write x\[..., None\]"),
        (LAST[0], ValueError, r"got shape \(6, 5, 3\) in .*; of one image write x\[None\]"),
        (LAST / np.longdouble(255), TypeError, r"arr_0, got (float128|float64) "),
        ((LAST / 255).astype(">f4"), TypeError, r"got >f4 in \[0, 1\] in .*; write \(255 \* x\)"),
        (LAST[:0], ValueError, "images, got none"),
        (LAST[:, :0], ValueError, "images, got none"),
        (LAST.reshape(-1), ValueError, r"got shape \(1170,\)"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_fix(tmp_path, array, error, message):
    with pytest.raises(error, match=rf"reference must hold .*{message}"):
        npz_of(tmp_path, arr_0=array)


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros(COUNT), np.zeros((COUNT, 1), int)])
def test_classes_of_another_number_or_kind_are_refused(tmp_path, labels):
    with pytest.raises(TypeError, match="arr_1 of reference must hold 13 whole numbers as classes"):
        npz_of(tmp_path, arr_0=LAST, arr_1=labels)


def test_sizes_that_differ_are_named_with_the_fix(tmp_path):
    write_folder(tmp_path / "x", COLOR)
    write_folder(tmp_path / "y", torch.zeros(2, 3, 9, 8).byte())
    with pytest.raises(
        ValueError,
        match=r"samples must be images of one size, got 2 sizes: 5x6 \(13, .*/x/0.png\); "
        r"8x9 \(2, .*/y/0.png\); resize=5 crops and resamples all",
    ):
        folder_of_images(tmp_path, "samples")
    assert folder_of_images(tmp_path, "samples", resize=Resize(5)).shape == (3, 5, 5)


def test_files_that_are_no_images_and_broken_ones_are_named(tmp_path):
    write_folder(tmp_path, COLOR)
    content = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(content[:-40])
    found = folder_of_images(tmp_path, "samples")  # its header is whole
    with pytest.raises(BrokenFiles, match=r"got 1 broken: \S+4\.png \(image file is truncated"):
        found.read(torch.arange(COUNT))
    (tmp_path / "7.png").write_text("hello")
    (tmp_path / "8.png").write_bytes(b"")
    with pytest.raises(
        BrokenFiles, match=r"samples must be readable .* got 2 broken: \S+7\.png .*8"
    ):
        folder_of_images(tmp_path, "samples")


def test_an_empty_folder_and_lists_of_classes_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"samples must hold images .*, got no image in .*1 .txt"):
        folder_of_images(tmp_path, "samples")
    write_folder(tmp_path, COLOR[:2])
    for labels in (
        [["0.png", 1]],
        [["0.png", 1], ["1.png", -1]],
        [["0.png", 1], ["1.png", 0.5]],
        3,
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(ValueError, match=r"labels in .*dataset\.json must"):
            folder_of_images(tmp_path, "samples")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert folder_of_images(tmp_path, "samples").labels is None


@pytest.mark.parametrize(
    "content",
    [
        {"samples": COLOR},
        {"other": 1},
        [1],
        {"samples": torch.rand(3, 2)},
        {"samples": torch.rand(0, 1, 2, 2)},
    ],
    ids=lambda content: str(type(content)),
)
def test_tensors_that_are_no_samples_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"samples must hold (floats|images)"):
        Drawn.open(tmp_path / "a.pt", "samples", "round")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickled_program_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"samples": Evil()}, "a.pt")
    with pytest.raises(ValueError, match="samples must be a file of flowkit sample format=pt"):
        Drawn.open(Path("a.pt"), "samples", "round")
    assert not Path("ran").exists()
