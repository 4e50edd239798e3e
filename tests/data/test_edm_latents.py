"""Latents in single files: the public format, what is drawn from them, and bad files in words."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.data import EDMLatents
from flowkit.data.stream import keyed_generator, stream_positions
from flowkit.exact import GaussianFlow
from flowkit.modules import LatentFlowMatching
from flowkit.nn import autoencoder_kl
from flowkit.sampling import seeded_noise

COUNT, SHAPE = 24, (4, 3, 2)


def network(seed=3, **scale):
    """A network with a scale that is no identity."""
    torch.manual_seed(seed)
    vae = autoencoder_kl((1, 6, 4), width=8, multipliers=(1, 2))
    vae.register_to_config(
        latents_mean=[1.0, -2.0, 0.5, 0.0], latents_std=[2.0, 1.0, 0.5, 4.0], scaling_factor=1.0
    )
    return KLAutoencoder(vae)


@pytest.fixture(scope="module")
def autoencoder():
    return network()


def arrays(single=False):
    drawn = np.random.default_rng(0)
    mean = drawn.normal(size=(COUNT, *SHAPE)).astype(np.float32)
    std = drawn.uniform(0.1, 0.6, size=mean.shape).astype(np.float32)
    return mean if single else np.concatenate([mean, std], 1)


def name(number):
    return f"{number // 10:05d}/img-mean-std-{number:08d}.npy"


def files(latents=None, labels=True):
    """The files of a folder as the tools of EDM2 write them, by name."""
    made = {}
    for number, array in enumerate(arrays() if latents is None else latents):
        stream = io.BytesIO()
        np.save(stream, array)
        made[name(number)] = stream.getvalue()
    pairs = [[one, number % 3] for number, one in enumerate(made)] if labels else None
    return {**made, **listed(pairs)}


def write(root, content):
    for one, data in content.items():
        (root / one).parent.mkdir(parents=True, exist_ok=True)
        (root / one).write_bytes(data)
    return root


def pack(file, content, method=zipfile.ZIP_STORED):
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", method) as archive:
        for one, data in content.items():
            archive.writestr(one, data)
    return file


def opened(root, autoencoder, **options):
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    data = EDMLatents(root, autoencoder, **fractions, **{"batch_size": 4, **options})
    data.setup()
    return data


def rows_of(data, split="train"):
    """The numbers of the files of a split."""
    return data.split(split).shards.rows


def scaled(autoencoder, raw):
    return (raw - autoencoder.mean) / autoencoder.std


def test_the_stream_draws_new_latents_at_every_step_by_its_seed(tmp_path, autoencoder):
    """z = (mean + std ε − shift) · scale, with ε of seed and step; a step alone is the same."""
    data = opened(write(tmp_path, {f"vae-sd/{k}": v for k, v in files().items()}), autoencoder)
    assert data.summary() == (
        "EDMLatents: 14 train, 5 val, 5 test samples of shape (4, 3, 2), 3 classes"
    )
    assert data.image_shape == (1, 6, 4)
    both, own = torch.from_numpy(arrays()), rows_of(data)
    for step in (0, 3, 7):
        batch = data.stream()[step]
        noise = torch.randn(4, *SHAPE, generator=keyed_generator(0, "posterior", step))
        rows = own[stream_positions(len(own), 0, 4 * step, 4 * step + 4)]
        expected = scaled(autoencoder, both[rows, :4] + both[rows, 4:] * noise)
        torch.testing.assert_close(batch["x1"], expected)
        assert torch.equal(batch["cond"], rows % 3)
        assert batch["encoded_by"] == autoencoder.hash
    halves = [data.stream(rank, 2)[1]["x1"] for rank in range(2)]
    whole = opened(tmp_path, autoencoder, batch_size=8).stream()[1]["x1"]
    torch.testing.assert_close(torch.stack(halves, 1).flatten(0, 1), whole)
    rows = rows_of(data, "val")
    fixed = seeded_noise(SHAPE, torch.arange(len(rows)) + 2**31)
    expected = scaled(autoencoder, both[rows, :4] + both[rows, 4:] * fixed)
    torch.testing.assert_close(data.val[:]["x1"], expected)
    assert sorted(torch.cat([rows_of(data, s) for s in ("train", "val", "test")])) == [*range(24)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_and_folders_hold_the_same(method, tmp_path, autoencoder):
    plain = opened(write(tmp_path / "plain", files()), autoencoder)
    packed = pack(tmp_path / "packed" / "vae-sd.zip", files(), method)
    for root in (packed, packed.parent):
        found = opened(root, autoencoder)
        assert torch.equal(found.stream()[2]["x1"], plain.stream()[2]["x1"])
        assert torch.equal(found.test[:]["cond"], plain.test[:]["cond"])


def test_images_beside_the_latents_are_not_read(tmp_path, autoencoder):
    content = {f"vae-sd/{one}": data for one, data in files().items()}
    alone = opened(write(tmp_path / "alone", content), autoencoder)
    content |= {"images/dataset.json": b"no JSON", "dataset.json": b"no JSON"}
    content |= {"images/00000/img00000000.png": b"no image", "images/00000/a.npy": b"no array"}
    both = opened(write(tmp_path / "both", content), autoencoder, verify=True)
    assert both.fingerprint("train") == alone.fingerprint("train")
    assert torch.equal(both.stream()[1]["x1"], alone.stream()[1]["x1"])


def test_single_latents_and_no_labels(tmp_path, autoencoder):
    data = opened(write(tmp_path, files(arrays(single=True), labels=False)), autoencoder)
    latents = scaled(autoencoder, torch.from_numpy(arrays(single=True)))
    batch, rows = data.stream()[5], rows_of(data)
    rows = rows[stream_positions(len(rows), 0, 20, 24)]
    torch.testing.assert_close(batch["x1"], latents[rows])
    assert "cond" not in batch
    assert data.num_classes is None


def test_fingerprints_follow_content_and_autoencoder(tmp_path, autoencoder):
    """All of the splits; the same files give the same, whenever they are opened."""

    def prints(root, made_by):
        data = opened(root, made_by)
        return tuple(data.fingerprint(split) for split in ("train", "val", "test"))

    content = files()
    plain = write(tmp_path / "a", content)
    changed = write(tmp_path / "b", {**content, name(0): files(arrays() * 2)[name(0)]})
    seen = {prints(plain, autoencoder), prints(changed, autoencoder), prints(plain, network(4))}
    assert len(seen) == 3
    assert prints(plain, autoencoder) in seen


def test_a_module_with_another_autoencoder_refuses_them(tmp_path, autoencoder):
    batch = opened(write(tmp_path, files()), autoencoder).stream()[0]
    LatentFlowMatching(GaussianFlow(0.0, 1.0), autoencoder).loss(batch)
    with pytest.raises(ValueError, match="autoencoder must be the autoencoder of the cached laten"):
        LatentFlowMatching(GaussianFlow(0.0, 1.0), network(4)).loss(batch)


def _with(number, change):
    def made():
        latents = list(arrays())
        latents[number] = change(latents[number])
        return files(latents)

    return made


def listed(labels):
    return {"dataset.json": json.dumps({"labels": labels}).encode()}


def _nan(array):
    array = array.copy()
    array[0, 0, 0] = np.nan
    return array


def _without_a_label():
    content = files()
    listing = json.loads(content["dataset.json"])
    return {**content, **listed(listing["labels"][:-2])}


BAD = {
    "no dataset.json": (
        lambda: {k: v for k, v in files().items() if k != "dataset.json"},
        r"root must hold dataset\.json beside the latents, got none in",
    ),
    "no label": (
        _without_a_label,
        r"labels must name all files, got no label of 2 in .*dataset\.json: 00002/img-mean-std-00",
    ),
    "labels that are no classes": (
        lambda: (
            files()
            | {"dataset.json": json.dumps({"labels": [[name(k), -1] for k in range(24)]}).encode()}
        ),
        "labels must be whole numbers from 0, got others",
    ),
    "another listing": (
        lambda: files() | {"dataset.json": b"[1, 2]"},
        "labels must be null or pairs of a file and its class|labels must name all files",
    ),
    "channels": (
        _with(3, lambda a: a[:6]),
        r"latents must have shape \(8, h, w\) .* or \(4, h, w\), as the autoencoder has 4 chan.*"
        r"got \(6, 3, 2\) in .*00000003\.npy",
    ),
    "sizes": (_with(5, lambda a: a[:, :2]), r"must have one size, 3x2, got \(8, 2, 2\) in"),
    "NaN": (_with(7, _nan), r"latents must be finite, got NaN or infinity in .*00000007\.npy"),
    "negative deviations": (_with(2, lambda a: -abs(a)), "must be standard deviations, got nega"),
    "objects": (_with(1, lambda a: np.array([{}])), r"must be whole \.npy files, got .*0001\.npy"),
    "half of a file": (
        lambda: files() | {name(4): files()[name(4)][:150]},
        r"latents must be whole \.npy files, got .*00000004\.npy",
    ),
    "no files": (lambda: {"dataset.json": b"{}"}, r"root must hold latents as \.npy files, got no"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_told_in_words(what, packed, tmp_path, autoencoder):
    made, words = BAD[what]
    root = pack(tmp_path / "a.zip", made()) if packed else write(tmp_path, made())
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        opened(root, autoencoder, verify=True)


def test_what_made_them_must_be_said(tmp_path):
    with pytest.raises(TypeError, match="autoencoder must be the network that made the latents, "):
        EDMLatents(tmp_path, Identity())
    with pytest.raises(FileNotFoundError, match="root must be"):
        opened(tmp_path / "nowhere", network())
