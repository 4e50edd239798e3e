import gzip
import re
import struct

import pytest
import torch

from flowkit.data import IDX
from flowkit.data.idx import DEBIAN_FASHION_MNIST, read_idx


def write_idx(file, values):
    data = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    data += bytes(values.flatten().tolist())
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_set(root, labels=None, test_labels=None):
    """Forty 2x3 images whose first pixel is their label, twelve for test."""
    labels = torch.arange(40) % 4 if labels is None else labels
    test_labels = torch.arange(12) % 4 if test_labels is None else test_labels
    for part, values, suffix in (("train", labels, ".gz"), ("t10k", test_labels, "")):
        images = torch.arange(len(values) * 6).reshape(-1, 2, 3) % 256
        images[:, 0, 0] = values
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", values)


def test_files_are_read_split_and_mapped(tmp_path):
    write_set(tmp_path)
    data = IDX(tmp_path, val_fraction=0.2)
    data.setup()
    assert (data.shape, data.num_classes, data.class_names) == ((1, 2, 3), 4, None)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [32, 8, 12]
    assert data.val[:]["cond"].bincount().tolist() == [2, 2, 2, 2]
    for name in ("train", "val", "test"):
        batch = data.split(name)[:]
        assert torch.equal(batch["cond"], ((batch["x1"][:, 0, 0, 0] + 1) * 127.5).round().long())
    expected = (torch.arange(72).reshape(12, 1, 2, 3) / 127.5 - 1).float()
    torch.testing.assert_close(data.test[:]["x1"][..., 1:], expected[..., 1:], rtol=0, atol=2e-7)
    seen = torch.cat([data.train[:]["x1"], data.val[:]["x1"]]).flatten(1)
    assert len(seen.unique(dim=0)) == 40


def test_plain_and_packed_files_agree(tmp_path):
    values = torch.randint(0, 256, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    write_idx(tmp_path / "plain", values)
    write_idx(tmp_path / "packed.gz", values)
    assert torch.equal(read_idx(tmp_path / "plain").long(), values)
    assert torch.equal(read_idx(tmp_path / "packed.gz").long(), values)


def test_missing_files_say_what_was_looked_for_and_how_to_get_it(tmp_path):
    data = IDX(tmp_path / "nowhere")
    message = (
        f"root must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz, got neither in "
        f"{tmp_path}/nowhere; install Fashion-MNIST by apt-get install dataset-fashion-mnist"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        data.setup()


def test_damaged_files_are_named(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"t10k-images.* must hold \(12, 2, 3\) bytes, got 71"):
        IDX(tmp_path).setup()
    file.write_bytes(b"\x00\x00\x0d" + whole[3:])
    with pytest.raises(ValueError, match=r"t10k-images.* must be an IDX file of unsigned bytes"):
        IDX(tmp_path).setup()
    for content in (gzip.compress(whole)[:-9], whole):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gz must be a complete gzip file, got"):
            read_idx(tmp_path / "x.gz")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"t10k-images.* must be an IDX file of unsigned bytes"):
        IDX(tmp_path).setup()


def test_labels_must_fit(tmp_path):
    write_set(tmp_path, test_labels=torch.arange(12) % 5)
    with pytest.raises(ValueError, match=r"labels of .*t10k.* must hold labels in \[0, 3\]"):
        IDX(tmp_path).setup()
    with pytest.raises(ValueError, match=r"labels of .*train.* must hold labels in \[0, 1\]"):
        IDX(tmp_path, class_names=["a", "b"]).setup()
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", torch.zeros(11).long())
    with pytest.raises(ValueError, match="must hold 12 labels, one per image, got"):
        IDX(tmp_path).setup()
    write_idx(tmp_path / "t10k-images-idx3-ubyte", torch.zeros(12, 4).long())
    with pytest.raises(ValueError, match=r"must hold images \(N, H, W\), got \(12, 4\)"):
        IDX(tmp_path).setup()


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is missing")
def test_fashion_mnist_has_its_known_shape():
    data = IDX(flip=True)
    data.setup()
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [55_000, 5000, 10_000]
    assert data.class_names is not None
    assert (data.num_classes, data.class_names[9]) == (10, "ankle boot")
    for name, share in (("train", 5500), ("val", 500), ("test", 1000)):
        assert data.split(name)[:]["cond"].bincount().tolist() == [share] * 10
    # The training files' mean gray level is known to be 72.94 of 255.
    pixels = torch.cat([data.train[:]["x1"], data.val[:]["x1"]])
    assert (pixels.double().mean().item() + 1) * 127.5 == pytest.approx(72.94, abs=0.005)
