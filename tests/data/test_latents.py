"""Caches of latents: what they hold, that they survive interruptions, and what they refuse."""

import itertools
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowkit.autoencoders import KLAutoencoder
from flowkit.couplings import MinibatchOT
from flowkit.data import Latents
from flowkit.data.arrays import Arrays
from flowkit.data.cache import write_cache
from flowkit.data.splits import SplitData
from flowkit.data.stream import stream_positions
from flowkit.nn import autoencoder_kl
from flowkit.sampling import seeded_noise

SIZES = {"train": 23, "val": 7, "test": 5}


class Pictures(SplitData):
    """Random images with a condition."""

    def __init__(self, flip=False, cond="label", num_workers=0, seed=0):
        super().__init__(batch_size=4, seed=0, num_workers=num_workers, flip=flip)
        self.kind, self.content = cond, seed
        self.num_classes = 3 if cond == "label" else None

    def load(self):
        g = torch.Generator().manual_seed(self.content)

        def split(count):
            x1 = torch.rand(count, 1, 8, 8, generator=g) * 2 - 1
            if self.kind is None:
                return Arrays({"x1": x1})
            shape = (count,) if self.kind == "label" else (count, 8, 8)
            return Arrays({"x1": x1, "cond": torch.randint(0, 3, shape, generator=g)})

        return {name: split(count) for name, count in SIZES.items()}


def pictures(**options):
    data = Pictures(**options)
    data.setup()
    return data


@pytest.fixture(scope="module")
def autoencoder():
    return make(3)


def make(seed):
    torch.manual_seed(seed)
    net = KLAutoencoder(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)))
    return net.fit_scale(torch.rand(20, 1, 8, 8))


def cached(root, **options):
    data = Latents(root, **{"batch_size": 4, **options})
    data.setup()
    return data


def encoded(data, autoencoder, root, **options):
    return write_cache(data, autoencoder, root, **{"shard_size": 5, "batch_size": 3, **options})


def moments(split, rows):
    """Mean and std of the posteriors, by what noise makes of them."""
    rows = torch.as_tensor(rows)
    zero = torch.zeros(len(rows), *split.shape)
    mean = split.draw(rows, zero)["x1"]
    return mean, split.draw(rows, zero + 1)["x1"] - mean


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cache_holds_the_posteriors_and_labels_of_all_images(autoencoder, tmp_path, num_workers):
    images = pictures(num_workers=num_workers)
    encoded(images, autoencoder, tmp_path)
    data = cached(tmp_path)
    assert (data.shape, data.image_shape, data.num_classes) == ((4, 4, 4), (1, 8, 8), 3)
    for name, count in SIZES.items():
        split, real = data.split(name), images.split(name)[:]
        assert len(split) == count
        mean, std = moments(split, range(count))
        expected = autoencoder.posterior(real["x1"])
        close(mean, expected.mean)
        close(std, expected.std)
        assert torch.equal(split[:]["cond"], real["cond"])
    # in any order, as often as asked for
    rows = [22, 0, 5, 4, 5, 13]
    close(moments(data.train, rows)[0], autoencoder.posterior(images.train[rows]["x1"]).mean)
    assert torch.equal(data.train[rows]["cond"], images.train[rows]["cond"])
    assert data.train[[]]["x1"].shape == (0, 4, 4, 4)


def test_mirror_images_are_entries_of_their_own(autoencoder, tmp_path):
    images = pictures(flip=True, cond="map")
    encoded(images, autoencoder, tmp_path)
    data = cached(tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [46, 7, 5]
    real, split = images.train[:], data.train
    start = 0
    for part in torch.arange(23).split(5):  # of each shard its images, then their mirror images
        x, maps = real["x1"][part], real["cond"][part]
        for images_, labels in ((x, maps), (x.flip(-1), maps.flip(-1))):
            rows = range(start, start + len(part))
            close(moments(split, rows)[0], autoencoder.posterior(images_).mean)
            assert torch.equal(split[rows]["cond"], labels)
            start += len(part)


def test_images_without_conditions(autoencoder, tmp_path):
    encoded(pictures(cond=None), autoencoder, tmp_path)
    assert set(cached(tmp_path).train[:2]) == {"x1", "encoded_by"}


def test_named_conditions_keep_their_names(autoencoder, tmp_path):
    images = pictures(cond=None, flip=True)
    for split in SIZES:
        columns = dict(images.split(split).columns)
        images._splits[split] = _Named(columns["x1"])
    encoded(images, autoencoder, tmp_path)
    train = cached(tmp_path).train
    assert train[[3, 1]]["cond"]["a"].tolist() == [3, 1]
    # what is not as large as the image is no map to mirror with it
    words = train[:]["cond"]["b"]
    assert len(words) == 46
    assert (words == torch.arange(6.0).view(3, 2)).all()


class _Named:
    def __init__(self, x1):
        self.x1 = x1

    def __len__(self):
        return len(self.x1)

    def __getitem__(self, rows):
        count = torch.arange(len(self))[rows]
        words = torch.arange(6.0).expand(len(count), 6).unflatten(1, (3, 2))
        return {"x1": self.x1[rows], "cond": {"a": count, "b": words}}

    def fingerprint(self):
        return "named"


# --- draws ----------------------------------------------------------------------------------------


def test_training_draws_anew_and_elsewhere_a_row_is_one_draw(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    data = cached(tmp_path, batch_size=23)
    rows = list(range(7))
    assert torch.equal(data.val[rows]["x1"], data.val[:]["x1"])
    assert torch.equal(data.val[[6, 2]]["x1"], data.val[:]["x1"][[6, 2]])
    mean, std = moments(data.val, torch.arange(7))
    own = ((data.val[:]["x1"] - mean) / std).flatten(1)
    samples = seeded_noise(data.val.shape, range(7)).flatten(1)
    correlation = torch.corrcoef(torch.cat([own, samples])).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9, "no row shares its noise with a sample"

    stream = data.stream()
    draws = torch.cat([stream[k]["x1"] for k in range(40)])
    rows = stream_positions(23, seed=0, start=0, stop=40 * 23)
    assert rows.bincount().tolist() == [40] * 23
    mean, std = moments(data.train, rows)
    noise = (draws - mean) / std
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    of_one = noise[rows == 3].flatten(1)
    assert torch.corrcoef(of_one).fill_diagonal_(0).abs().max() < 0.5, "a new draw each time"


def test_a_batch_is_a_function_of_seed_and_step(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    first, again, other = (cached(tmp_path, seed=s).stream() for s in (1, 1, 2))
    for step in (5, 0):
        assert torch.equal(first[step]["x1"], again[step]["x1"])
    assert not torch.equal(first[0]["x1"], other[0]["x1"])


def test_ranks_share_the_batch_of_one_process(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    whole = cached(tmp_path, batch_size=4).stream()[3]
    data = cached(tmp_path, batch_size=2)
    parts = [data.stream(rank, 2)[3] for rank in (0, 1)]
    for key in ("x1", "cond"):
        joined = torch.stack([p[key] for p in parts], 1).flatten(0, 1)
        assert torch.equal(joined, whole[key])


def test_workers_draw_the_same(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    loaders = [cached(tmp_path, num_workers=n).train_dataloader() for n in (0, 2)]
    for a, b in itertools.islice(zip(*loaders, strict=True), 6):
        assert torch.equal(a["x1"], b["x1"])
        assert a["encoded_by"] == b["encoded_by"] == autoencoder.hash


def test_pairing_in_the_loader_keeps_the_hash(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    batch = cached(tmp_path, coupling=MinibatchOT(cond_weight=float("inf"))).stream()[0]
    assert batch["encoded_by"] == autoencoder.hash
    assert batch["x0"].shape == batch["x1"].shape


# --- on disk --------------------------------------------------------------------------------------


class Stop(BaseException):
    """Like an interrupt by hand."""


def test_interrupted_encoding_goes_on_without_encoding_twice(autoencoder, tmp_path, monkeypatch):
    images = pictures(flip=True)
    encoded(images, autoencoder, tmp_path / "whole")
    seen = []

    def stop(count):
        seen.append(count)
        if sum(seen) > 12:
            raise Stop

    with pytest.raises(Stop):
        encoded(images, autoencoder, tmp_path / "parts", done=stop)
    parts = tmp_path / "parts"
    with pytest.raises(FileNotFoundError, match=r"got no index.json in .*run `flowkit encode`"):
        cached(parts)
    kept = {f: f.stat().st_mtime_ns for f in parts.glob("*.safetensors")}
    assert [f.name for f in sorted(kept)] == ["train-00000.safetensors", "train-00001.safetensors"]

    encodings, posterior = [], KLAutoencoder.posterior
    monkeypatch.setattr(
        KLAutoencoder, "posterior", lambda self, x: encodings.append(len(x)) or posterior(self, x)
    )
    counts = []
    encoded(images, autoencoder, parts, done=counts.append)
    assert sum(encodings) == 2 * (23 - 10) + 7 + 5
    assert sum(counts) == 23 + 7 + 5, "the bar ends at the number of images"
    assert all(f.stat().st_mtime_ns == time for f, time in kept.items())
    assert _content(parts) == _content(tmp_path / "whole")
    # and nothing is left to do
    encodings.clear()
    encoded(images, autoencoder, parts)
    assert not encodings


def _content(root):
    """All that a cache says; the order of a file's metadata is safetensors' own affair."""
    content = {"index": (root / "index.json").read_text()}
    for file in root.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            columns = {name: shard.get_tensor(name).tolist() for name in shard.keys()}  # noqa: SIM118
            content[file.name] = (shard.metadata(), columns)
    return content


def test_damaged_and_missing_shards_are_named_and_encoded_again(autoencoder, tmp_path):
    images = pictures()
    encoded(images, autoencoder, tmp_path)
    before = _content(tmp_path)
    (tmp_path / "train-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"got no .*train-00002.safetensors; run `flowkit"):
        cached(tmp_path)
    encoded(images, autoencoder, tmp_path)
    shard = tmp_path / "val-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shards must be complete, got .*val-00001.safetensors"):
        cached(tmp_path)
    encoded(images, autoencoder, tmp_path)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"autoencoder": null}'])
def test_a_foreign_index_is_named(autoencoder, tmp_path, text):
    encoded(pictures(), autoencoder, tmp_path)
    before = _content(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json must be as `flowkit encode` writes it, got"):
        cached(tmp_path)
    encoded(pictures(), autoencoder, tmp_path)
    assert _content(tmp_path) == before


def test_another_encoding_in_the_same_folder_is_refused_and_leaves_the_cache(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    before, other = _content(tmp_path), make(4)
    with pytest.raises(ValueError, match=f"autoencoder {other.hash}, got .*{autoencoder.hash}"):
        encoded(pictures(), other, tmp_path)
    with pytest.raises(ValueError, match="root must hold latents of one encoding, with images"):
        encoded(pictures(seed=1), autoencoder, tmp_path)
    with pytest.raises(ValueError, match=r"with mirrored True, got .* with False; choose another"):
        encoded(pictures(flip=True), autoencoder, tmp_path)
    with pytest.raises(ValueError, match=r"with rows 0:6, got .* with 0:5"):
        encoded(pictures(), autoencoder, tmp_path, shard_size=6)
    assert _content(tmp_path) == before
    cached(tmp_path)


def test_shards_of_another_cache_are_refused_by_both_hashes(autoencoder, tmp_path):
    other = make(4)
    encoded(pictures(), autoencoder, tmp_path / "a")
    encoded(pictures(), other, tmp_path / "b")
    name = "train-00001.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(
        ValueError, match=f"must have the hashes .*{autoencoder.hash} and .*got .*{other.hash}"
    ):
        cached(tmp_path / "a")


def test_latents_of_another_shape_than_the_index_says_are_refused(autoencoder, tmp_path):
    index = encoded(pictures(), autoencoder, tmp_path)
    file = tmp_path / "train-00000.safetensors"
    columns = {k: v[:, :3] if v.ndim > 1 else v for k, v in load_file(file).items()}
    tag = {
        "autoencoder": autoencoder.hash,
        "images": index["splits"]["train"]["images"],
    }
    save_file({k: v.contiguous() for k, v in columns.items()}, file, metadata=tag)
    with pytest.raises(ValueError, match=r"shape \[5, 4, 4, 4\] as .* got \[5, 3, 4, 4\] in"):
        cached(tmp_path)


def test_index_says_whose_latents_these_are(autoencoder, tmp_path):
    source = {"_target_": "some.Data", "root": "x"}
    encoded(pictures(), autoencoder, tmp_path, source=source)
    data, index = cached(tmp_path), json.loads((tmp_path / "index.json").read_text())
    assert data.source == source
    assert data.autoencoder == {"hash": autoencoder.hash, "config": autoencoder.config}
    assert index["splits"]["train"]["images"] == pictures().fingerprint("train")
    prints = {data.fingerprint(name) for name in SIZES}
    assert len(prints) == 3
    assert cached(tmp_path).fingerprint("train") in prints


def test_latents_are_mapped_into_memory_not_loaded(tmp_path):
    """A cache of 64 MB costs next to nothing to open, and its pages belong to the file."""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks into /proc")
    rows, shape = 32_000, (4, 8, 8)
    tag = {"autoencoder": "a", "images": "b"}
    columns = {name: torch.ones(rows, *shape) for name in ("mean", "std")}
    index = {
        **dict.fromkeys(("num_classes", "class_names", "source")),
        "autoencoder": {"hash": "a", "config": None},
        "image_shape": [1, 8, 8],
        "latent_shape": list(shape),
        "splits": {},
    }
    for name in ("train", "val", "test"):
        shards = [{"file": f"{name}.safetensors", "rows": rows if name == "train" else 1}]
        index["splits"][name] = {"images": "b", "shards": shards}
        part = {k: v if name == "train" else v[:1].clone() for k, v in columns.items()}
        save_file(part, tmp_path / f"{name}.safetensors", metadata=tag)
    (tmp_path / "index.json").write_text(json.dumps(index))
    del columns, part
    before = _anonymous_memory()
    data = cached(tmp_path, batch_size=64)
    assert data.stream()[0]["x1"].shape == (64, *shape)
    assert _anonymous_memory() - before < 8
    assert str(tmp_path / "train.safetensors") in Path("/proc/self/maps").read_text()


def _anonymous_memory():
    """Megabytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_splits_travel_to_other_processes(autoencoder, tmp_path):
    encoded(pictures(), autoencoder, tmp_path)
    split = cached(tmp_path).val
    split[:2]
    assert torch.equal(pickle.loads(pickle.dumps(split))[:]["x1"], split[:]["x1"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda a, r: encoded(pictures(), a, r, shard_size=0), "shard_size must be at least 1"),
        (lambda a, r: encoded(_points(), a, r), r"data must hold images \(C, H, W\), got shape"),
        (lambda a, r: encoded(_bad_labels(), a, r), r"cond of data must hold labels in \[0, 1\]"),
        (lambda a, r: encoded(pictures(), _color(), r), r"images must have shape \(B, 3, 8, 8\)"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(autoencoder, tmp_path, run, message):
    with pytest.raises(ValueError, match=message):
        run(autoencoder, tmp_path)


def _points():
    data = pictures()
    data._splits = {name: Arrays({"x1": torch.zeros(3, 2)}) for name in SIZES}
    return data


def _bad_labels():
    data = pictures()
    data.num_classes = 2
    return data


def _color():
    return KLAutoencoder(autoencoder_kl((3, 8, 8), width=8, multipliers=(1, 2)))
