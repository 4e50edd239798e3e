"""Files below a folder: what is found and said, and splits that do not depend on other files."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Folder, MaskFolder, Shards
from flowkit.data.files import content_splits, file_hashes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def picture(file, level=0, size=(4, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(file)


def ready(root, kind=Folder, **options):
    data = kind(root, **{"image_size": 4, "channels": 1, **options})
    data.setup()
    return data


def members(data):
    return {name: split for name, (_, split) in data.files.items()}


# --- splits -----------------------------------------------------------------------------------


def test_sizes_of_splits_follow_the_fractions():
    """Counts are binomial: within five standard deviations."""
    n = 20_000
    parts = content_splits([str(k) for k in range(n)], {"val": 0.03, "test": 0.2}, seed=4)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(n))
    for name, share in (("train", 0.77), ("val", 0.03), ("test", 0.2)):
        assert abs(len(parts[name]) - share * n) < 5 * (n * share * (1 - share)) ** 0.5
    others = content_splits([str(k) for k in range(n)], {"val": 0.03, "test": 0.2}, seed=5)
    common = len(set(parts["test"].tolist()) & set(others["test"].tolist()))
    assert abs(common - 0.04 * n) < 5 * (0.04 * n) ** 0.5


def test_new_samples_move_no_other_and_each_split_has_one():
    keys = [f"{k}" for k in range(3000)]
    whole = content_splits(keys, {"val": 0.1, "test": 0.1}, 0)
    some = content_splits(keys[700:1900], {"val": 0.1, "test": 0.1}, 0)
    for name, part in some.items():
        assert {keys[700 + k] for k in part} <= {keys[k] for k in whole[name]}
    other = content_splits(keys, {"val": 0.3, "test": 0.1}, 0)  # nor does the share of val
    assert other["test"].equal(whole["test"])
    for size in range(3, 30):
        parts = content_splits(keys[:size], {"val": 0.02, "test": 0.02}, 0)
        assert min(map(len, parts.values())) >= 1
    with pytest.raises(ValueError, match="got 2 samples and none for "):
        content_splits(keys[:2], {"val": 0.5, "test": 0.4}, 0)


@pytest.mark.parametrize("kind", [Folder, MaskFolder])
def test_one_more_file_leaves_the_others_in_their_splits(tmp_path, kind):
    """Under the order of files, nine tenths of the held-out images had been trained on."""
    names = [f"{k:03}.png" for k in range(120)]
    for k, name in enumerate(names):
        for part in [""] if kind is Folder else ["images", "masks"]:
            picture(tmp_path / part / name, k)
    options = {"val_fraction": 0.2, "test_fraction": 0.2}
    before = members(ready(tmp_path, kind, **options))
    for part in [""] if kind is Folder else ["images", "masks"]:
        picture(tmp_path / part / "000-new.png", 251)
    after = members(ready(tmp_path, kind, **options))
    assert before.items() <= after.items()
    assert len(after) == len(before) + (1 if kind is Folder else 2)


@pytest.mark.parametrize("split_by", ["content", "order"])
@pytest.mark.parametrize("kind", [Folder, MaskFolder])
def test_splits_of_a_record_stay_with_copies_and_new_files(tmp_path, kind, split_by):
    """Every image is there twice. New files, and another share, move none of the record."""
    places = [""] if kind is Folder else ["images", "masks"]
    for k in range(60):
        for part in places:
            picture(tmp_path / part / f"{k}.png", k // 2)
    before = ready(tmp_path, kind, split_by=split_by, test_fraction=0.3)
    for part in places:
        picture(tmp_path / part / "0-new.png", 99)
    data = kind(tmp_path, 4, 1, split_by=split_by, split_seed=3, test_fraction=0.1)
    data.known = before.record()
    data.setup()
    assert members(before).items() <= members(data).items()
    assert set(members(before).values()) >= {"train", "val", "test"}


def test_folders_with_names_of_splits_are_splits(tmp_path):
    for k in range(40):
        picture(tmp_path / "train" / "ab"[k % 2] / f"{k}.png", k)
    for k in range(9):
        picture(tmp_path / "Validation" / "ab"[k % 2] / f"{k}.png", 100 + k)
    data = ready(tmp_path, test_fraction=0.3)
    assert data.class_names == ["a", "b"]
    assert len(data.val) == 9
    assert data.val[:]["x1"].min() > data.train[:]["x1"].max()
    assert len(data.train) + len(data.test) == 40
    assert data.summary().endswith(
        "2 classes (a, b); folders Validation, train are splits, test is taken from train"
    )
    picture(tmp_path / "test" / "c" / "1.png")
    assert ready(tmp_path).class_names == ["a", "b", "c"]
    (tmp_path / "bird").mkdir()
    picture(tmp_path / "bird" / "1.png")
    assert ready(tmp_path).class_names == ["Validation", "bird", "test", "train"]


def test_splits_of_images_and_masks(tmp_path):
    for part in ("images", "masks"):
        for k in range(20):
            picture(tmp_path / part / ("train" if k < 15 else "test") / f"{k}.png", k)
    data = ready(tmp_path, MaskFolder)
    assert {int(mask.stem) for mask in data.test.masks} == set(range(15, 20))
    assert len(data.train) + len(data.val) == 15


# --- content ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Folder, MaskFolder, Shards])
@pytest.mark.parametrize("part", ["images", "masks"])
def test_other_content_of_the_same_size_and_time_is_another_fingerprint(tmp_path, kind, part):
    """Pixels are inverted in place, and the time of the last write is set back."""
    for place in ("images", "masks"):
        for k in range(30):
            file = tmp_path / place / f"{k}.bmp"
            picture(file, k)
    if kind is Shards:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for file in sorted((tmp_path / part).iterdir()):
                tar.add(file, file.name)
    root = tmp_path / part if kind is Folder else tmp_path
    share = {"test_fraction": 0.05}
    first = ready(root, kind, **share).fingerprint("train")
    assert ready(root, kind, **share).fingerprint("train") == first
    file = tmp_path / "0.tar" if kind is Shards else tmp_path / part / "7.bmp"
    before = file.stat()
    content = bytearray(file.read_bytes())
    position = content.rindex(bytes([7] * 4)) if kind is Shards else len(content) - 4
    content[position : position + 4] = bytes([248] * 4)
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    prints = [ready(root, kind, **share).fingerprint(name) for name in ("train", "val", "test")]
    assert first not in prints


def test_hashes_are_those_of_the_content_and_files_are_read_once(tmp_path, cache, monkeypatch):
    import hashlib

    for k in range(5):
        (tmp_path / f"{k}").write_bytes(bytes([k] * 1000))
    names = [f"{k}" for k in range(5)]
    expected = [hashlib.sha256(bytes([k] * 1000)).hexdigest() for k in range(5)]
    assert file_hashes(tmp_path, names) == expected
    assert not list(cache.rglob("*.json"))  # the files are too new
    monkeypatch.setattr("flowkit.data.files.SETTLED", -1)
    assert file_hashes(tmp_path, names) == expected
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("a file was read again"))
        assert file_hashes(tmp_path, names[::-1]) == expected[::-1]
    (tmp_path / "3").write_bytes(bytes([9] * 1000))
    assert file_hashes(tmp_path, names)[3] == hashlib.sha256(bytes([9] * 1000)).hexdigest()
    (store,) = cache.rglob("*.json")
    store.write_text('{"3": 5}')
    assert file_hashes(tmp_path, names)[:3] == expected[:3]


# --- what is found ----------------------------------------------------------------------------


def test_hidden_files_are_left_out_and_counted(tmp_path):
    for k in range(12):
        picture(tmp_path / "cat" / f"{k}.png", k)
    for name in (
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/._0.png",
        "cat/._1.png",
        ".hidden/x.png",
    ):
        picture(tmp_path / name)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "cat" / "labels.csv").write_text("x")
    (tmp_path / "cat" / "a.HEIC").write_text("x")
    (tmp_path / "LICENSE").write_text("x")
    data = ready(tmp_path, test_fraction=0.1)
    assert data.class_names == ["cat"]
    assert len(data.files) == 12
    assert data.summary().endswith(
        "1 class (cat); 5 hidden files or folders skipped; 3 files of other types not read "
        "(1 .csv, 1 .heic, 1 without suffix)"
    )


def test_links_are_followed_and_loops_end(tmp_path):
    for k in range(6):
        picture(tmp_path / "set" / "cat" / f"{k}.png", k)
        picture(tmp_path / "far" / "deep" / f"{k}.png", 100 + k)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "set" / "cat" / "link.png").symlink_to(tmp_path / "far" / "deep" / "0.png")
    (tmp_path / "far" / "again").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "far" / "deep" / "up").symlink_to(tmp_path / "far", target_is_directory=True)
    data = ready(tmp_path / "set", val_fraction=0.2, test_fraction=0.2)
    assert data.class_names == ["cat", "dog"]
    assert {name for name in data.files if name.startswith("dog/deep")} == {
        f"dog/deep/{k}.png" for k in range(6)
    }
    assert "cat/link.png" in data.files
    assert data.notes == ["2 links to a folder above not followed"]
    (tmp_path / "far" / "deep").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"got 1 that lead nowhere: .*link\.png"):
        ready(tmp_path / "set")


def test_images_that_are_too_large_are_named_with_what_to_do(tmp_path):
    for part in ("images", "masks"):
        for k in range(5):
            picture(tmp_path / part / f"{k}.png", k)
    Image.new("1", (15000, 13000)).save(tmp_path / "masks" / "big.png")
    picture(tmp_path / "images" / "big.png")
    message = r"big\.png \(more than 178 megapixels; store it with fewer pixels\)"
    with pytest.raises(ValueError, match=message):
        ready(tmp_path / "masks")
    with pytest.raises(ValueError, match=message):
        ready(tmp_path, MaskFolder)


def test_images_of_the_same_stem_are_all_kept_or_refused(tmp_path):
    for k in range(6):
        picture(tmp_path / "images" / f"{k}.png", k)
        picture(tmp_path / "images" / f"{k}.bmp", 50 + k)
        picture(tmp_path / "masks" / f"{k}.png", k)
    data = ready(tmp_path / "images", val_fraction=0.2, test_fraction=0.2)
    levels = torch.cat([data.split(name)[:]["x1"][:, 0, 0, 0] for name in data.sizes()])
    found = ((levels + 1) * 127.5).round().long().sort().values
    assert found.tolist() == [*range(6), *range(50, 56)]
    with pytest.raises(ValueError, match=r"more than the suffix.*got 12 that do not: 0\.bmp; 0\.p"):
        ready(tmp_path, MaskFolder)


# --- tar files --------------------------------------------------------------------------------


def pack(file, names):
    with tarfile.open(file, "w") as tar:
        for k, name in enumerate(names):
            content = b"1"
            if not name.endswith((".cls", ".json")):
                buffer = io.BytesIO()
                Image.fromarray(np.full((4, 4), k, np.uint8)).save(buffer, "PNG")
                content = buffer.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    ("names", "count", "first"),
    [
        ([f"day.{k}.png" for k in range(40)], 40, "day.0.png"),  # one sample: day
        (["1.png", "2.png"] + ["1.png"] * 3, 3, "1.png"),
        ([f"{k}.png" for k in range(9)] + ["a/4.png", "4.jpg"], 1, "4.jpg"),
        (["1.png", "1.cls", "1.cls"], 1, "1.cls"),
    ],
)
def test_members_that_would_replace_each_other_are_refused(tmp_path, names, count, first):
    pack(tmp_path / "0.tar", names)
    with pytest.raises(ValueError, match=rf"got {count} others in .*0\.tar: {first}"):
        ready(tmp_path, Shards)


def test_members_that_are_not_read_are_counted(tmp_path):
    images = [f"./a/{k}.png" for k in range(20)] + [f"b/{k}.png" for k in range(20)]
    others = ["./a/3.seg.png", "a/._3.png", "__MACOSX/a/4.png", "a/3.json", "b/3.json"]
    pack(tmp_path / "0.tar", images + others)
    for _ in range(2):  # the second time from the index
        data = ready(tmp_path, Shards, val_fraction=0.2, test_fraction=0.2)
        assert sum(data.sizes().values()) == 40
        assert data.summary().endswith(
            "; 5 members of other types not read (2 .json, 2 hidden, 1 further images)"
        )
