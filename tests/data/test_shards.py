import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Shards
from flowkit.data.shards import INDEX, Tars
from flowkit.data.splits import SPLITS, partition
from flowkit.data.stream import Stream


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 6), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def root(tmp_path):
    """120 images in six files; the gray level is the number, the class its parity."""
    for shard in range(6):
        members = {}
        for number in range(20 * shard, 20 * shard + 20):
            members[f"a/{number:04}.PNG"] = png(number)
            members[f"a/{number:04}.cls"] = str(number % 2).encode()
        write(tmp_path / f"part-{shard}.tar", members)
    return tmp_path


def opened(root, **options):
    data = Shards(root, 4, **{"channels": 1, "val_fraction": 0.1, "test_fraction": 0.1, **options})
    data.setup()
    return data


def numbers(batch):
    level = ((batch["x1"] + 1) * 127.5).round().long().flatten(1)
    assert (level == level[:, :1]).all()
    return level[:, 0]


def test_splits_hold_every_image_with_its_label(root):
    data = opened(root)
    assert (data.shape, data.num_classes) == ((1, 4, 4), 2)
    seen = []
    for name, size in (("train", 96), ("val", 12), ("test", 12)):
        batch = data.split(name)[:]
        assert torch.equal(batch["cond"], numbers(batch) % 2)
        assert abs(len(batch["cond"]) - size) < 14  # binomial, standard deviation 4.4 and 3.3
        seen += numbers(batch).tolist()
    assert sorted(seen) == list(range(120))
    assert numbers(data.train[[5, 2]]).tolist() == numbers(data.train[:])[[5, 2]].tolist()


def test_new_samples_and_new_files_move_no_other(root):
    before = opened(root)
    old = {name: set(numbers(before.split(name)[:]).tolist()) for name in SPLITS}
    members = {f"a/{number:04}.PNG": png(number) for number in range(100, 150)}
    members |= {f"a/{number:04}.cls": b"0" for number in range(100, 150)}
    write(root / "part-5.tar", members)  # 20 of them were there
    write(root / "part-0-more.tar", {"0200.png": png(200), "0200.cls": b"1"})
    data = opened(root)
    new = {name: set(numbers(data.split(name)[:]).tolist()) for name in SPLITS}
    for name in SPLITS:
        assert new[name] & set(range(120)) == old[name]
    assert sum(map(len, new.values())) == 151
    places = partition(151, [0.1, 0.1], 0, data.train.columns["label"])
    assert torch.equal(opened(root, split_by="order").test.rows, places[2].sort().values)


def test_an_epoch_sees_every_image_once_and_few_files_at_a_time(root):
    split = opened(root, mix=2).train
    shard = split.columns["shard"][split.rows]
    orders = [split.order(0, epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(split)))
        blocks, start = [], 0
        while start < len(order):  # files are read two by two, to their end
            files = shard[order[start:]].unique_consecutive()[:2].unique()
            size = int(torch.isin(shard, files).sum())
            assert torch.isin(shard[order[start : start + size]], files).all()
            blocks.append(tuple(files.tolist()))
            start += size
        assert sorted(sum(blocks, ())) == list(range(6))
        # Within a block both files are mixed: a run of one has two samples on average.
        runs = len(shard[order].unique_consecutive())
        assert len(split) / runs < 3
    assert not orders[0].equal(orders[1])
    assert not orders[0].equal(split.order(1, 0))
    assert orders[0].equal(split.order(0, 0))


def test_ranks_share_a_step_and_any_step_can_be_had(root):
    data = opened(root, batch_size=10, seed=3)
    alone = [numbers(data.stream()[step]) for step in range(25)]
    epoch = torch.cat(alone)[: len(data.train)]
    assert sorted(epoch.tolist()) == sorted(numbers(data.train[:]).tolist())
    for step in (0, 9, 24):  # 9 and 24 lie across and beyond an epoch's end
        ranks = [numbers(Stream(data.train, 5, 3, rank, 2)[step]) for rank in (0, 1)]
        assert torch.stack(ranks, 1).flatten().equal(alone[step])
    anew = opened(root, batch_size=10, seed=3)
    assert numbers(anew.stream()[17]).equal(alone[17])


def test_workers_read_what_this_process_reads(root):
    data, inside = opened(root, num_workers=2, batch_size=7), opened(root, batch_size=7)
    for (_, batch), step in zip(enumerate(data.train_dataloader()), range(5), strict=False):
        assert torch.equal(batch["x1"], inside.stream()[step]["x1"])


def test_the_index_is_written_once_and_follows_the_files(root, monkeypatch):
    first = opened(root).fingerprint("train")
    assert (root / INDEX).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *args: pytest.fail("the index was not used"))
        assert opened(root).fingerprint("train") == first
    write(root / "part-9.tar", {"x.png": png(200), "x.cls": b"2"})
    again = opened(root)
    assert again.num_classes == 3
    assert again.fingerprint("train") != first
    # made anew, of the same size
    write(root / "part-9.tar", {"x.png": png(200), "x.cls": b"5"})
    assert opened(root).num_classes == 6
    write(root / "part-9.tar", {"x.png": png(200), "x.cls": b"2"})
    (root / INDEX).write_bytes(b"damaged")
    assert opened(root).fingerprint("train") == again.fingerprint("train")


def test_images_without_labels(tmp_path):
    write(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(9)})
    data = opened(tmp_path)
    assert data.num_classes is None
    assert data.train[:].keys() == {"x1"}
    assert isinstance(data.train, Tars)
    assert data.train[[]]["x1"].shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, r"shards must be tar files with labels, got .*a\.tar"),
        ({"1.txt": b"no image"}, r"shards must hold images, got no image in .*a\.tar"),
        (
            {"1.png": png(1), "2.cls": b"3"},
            r"samples must have an image, got no image for 2 in ",
        ),
        ({"1.png": png(1), "1.cls": b"cat"}, r"shards must be tar files with labels, got .*a\.tar"),
        ({"1.png": png(1), "1.cls": b"-1"}, r"a\.tar: label must be at least 0, got -1"),
        (
            {"1.png": png(1), "1.cls": b"3", "2.png": png(1)},
            r"labels must be given for all samples or for no sample, ",
        ),
    ],
)
def test_shards_that_make_no_data_set_are_refused(tmp_path, members, message):
    if members is None:
        (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    else:
        write(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_what_is_not_there_and_what_does_not_decode_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must be a folder, got .*nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root must hold tar files, got no tar file in"):
        opened(tmp_path)
    write(tmp_path / "a.tar", {f"{n}.png": png(n)[: 30 if n < 9 else None] for n in range(12)})
    with pytest.raises(ValueError, match=r"files must be readable, got \d+ broken: .*a\.tar at"):
        torch.cat([opened(tmp_path).split(name)[:]["x1"] for name in ("train", "val", "test")])
