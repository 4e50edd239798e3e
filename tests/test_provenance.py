"""Digests that files hold, and files that are whole."""

import multiprocessing
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from flowkit.autoencoders import identity, mean_latents
from flowkit.data.arrays import Arrays
from flowkit.errors import line_of
from flowkit.provenance import content_hash, tensor_hash, versions, write_atomically
from tests.metrics.samples import normal


class Scaled(nn.Module):
    """An autoencoder without a posterior."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.net.weight.data = torch.tensor([[1.0, -2.0]])
        self.net.bias.data = torch.tensor([0.5])

    def encode(self, images):
        return 3 * images

    def decode(self, latents):
        return latents / 3


def test_digests_are_those_that_earlier_files_hold():
    found = identity(Scaled())["hash"]
    assert found == "91626220cc2562a4a59c8ae1ab7b583f33a11ac2af9d139343164a6bd43a8f51"
    columns = {"b": torch.tensor([1, 2]), "a": torch.tensor(1.5, dtype=torch.bfloat16)}
    found = content_hash(columns, '{"a": [2], "x": 1}')
    assert found == "3d01f1d9db7b7c9039013a9d6230c4f4a30480631f240c61e0c271e87e55afa6"
    split = Arrays({"x1": torch.tensor([[0.5], [1.0]]), "cond": torch.tensor([4, 5])})
    expected = "129e6dcbcd971b427d1bd01a9a62e33af3012faef0763f495bb100bfa823ace3"
    assert split.fingerprint() == expected
    found = tensor_hash({"b": torch.tensor([1, 2]), "a": torch.tensor(1.5)})
    assert found == "84e5edc3945c257e646522ea55bf4a5652ea830471cb27942b79ef8362fbdecf"


@pytest.mark.parametrize("digest", [tensor_hash, content_hash])
def test_digests_see_names_types_shapes_and_values_and_nothing_else(digest):
    x = torch.arange(6.0).reshape(2, 3)
    same = digest({"a": x, "b": x[0]})
    assert same == digest({"b": x[0].clone(), "a": x.T.contiguous().T})
    others = [
        {"a": x, "c": x[0]},
        {"a": x.double(), "b": x[0]},
        {"a": x.reshape(3, 2), "b": x[0]},
        {"a": x + 1, "b": x[0]},
    ]
    assert len({same, *map(digest, others)}) == 5


def test_a_file_is_replaced_by_a_whole_one(tmp_path):
    file, seen = tmp_path / "a.bin", []

    def write(partial):
        seen.append((partial.name, file.read_bytes()))
        partial.write_bytes(b"new")

    file.write_bytes(b"old")
    write_atomically(file, write)
    ((partial, before),) = seen
    assert re.fullmatch(rf"a\.bin\.\w+-{os.getpid()}-\w+\.partial", partial)
    assert before == b"old"
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    file = tmp_path / "a[1].bin"  # a pattern of glob, too

    def die(partial):
        partial.write_bytes(b"ha")
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=write_atomically, args=(file, die))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    living = tmp_path / left.name.replace(f"-{process.pid}-", f"-{os.getpid()}-")
    others = [living, tmp_path / f"a[1].bin.elsewhere-{process.pid}-ab.partial"]
    others.append(tmp_path / left.name.replace("a[1]", "b"))
    for other in others:
        other.touch()
    write_atomically(file, lambda partial: partial.write_bytes(b"new"))
    assert set(tmp_path.iterdir()) == {file, *others}


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    file, link = tmp_path / "a.bin", tmp_path / "link.bin"
    file.write_bytes(b"old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_atomically(link, lambda partial: partial.write_bytes(b"new"))
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o777 == 0o640


def test_threads_may_write_one_file_at_once(tmp_path):
    file, texts = tmp_path / "a.txt", [str(k) * 5000 for k in range(8)]

    def write(text):
        for _ in range(10):
            write_atomically(file, lambda partial: partial.write_text(text))
            assert file.read_text() in texts

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts))  # raises what a thread raised
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")

    def fail(partial):
        partial.write_bytes(b"ne")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_known_latents_are_the_posteriors_mean_or_what_is_encoded():
    class Law:
        mean = torch.tensor([7.0])

    class Drawn(Scaled):
        def posterior(self, images):
            return Law()

    x = torch.ones(1, 2)
    assert torch.equal(mean_latents(Scaled(), x), torch.full((1, 2), 3.0))
    assert mean_latents(Drawn(), x) is Law.mean


def test_tensor_hash_sees_every_bit():
    x = normal(3, 4)
    views = {tensor_hash(y) for y in (x, x.clone(), x.T.contiguous().T)}
    assert len(views) == 1
    bumped = x.clone()
    bumped[2, 3] = np.nextafter(bumped[2, 3].item(), 9)
    others = (bumped, x.T, x.float(), x.reshape(-1), x.bool(), x.to(torch.bfloat16), x[:0], x[0, 0])
    assert len(views | {tensor_hash(y) for y in others}) == 9
    assert tensor_hash({"a": x, "b": bumped}) == tensor_hash({"b": bumped, "a": x})
    assert tensor_hash({"a": x, "b": bumped}) != tensor_hash({"b": x, "a": bumped})


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "flowkit", "lightning", "torchmetrics", "scipy"} <= set(found)


WRITERS = {
    "text": lambda file: file.write_text("x" * 9999),
    "torch": lambda file: torch.save(torch.rand(9999), file),
    "safetensors": lambda file: save_file({"x": torch.rand(9999)}, file),
    "picture": lambda file: Image.effect_noise((99, 99), 50).save(file, "PNG"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_finds_no_room_is_named_whatever_library_writes_it(name, tmp_path):
    """The system refuses files of more than 4000 bytes."""
    (file := tmp_path / name).write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(file))) as error:
            write_atomically(file, WRITERS[name])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(line_of(error.value)).startswith(f"{file} must be written whole, got ")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_other_errors_of_a_write_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as error:
        write_atomically(tmp_path / "a", lambda _: (tmp_path / "nowhere").read_text())
    assert str(line_of(error.value)).endswith(
        "nowhere must be usable, got No such file or directory"
    )
    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "a", _fail)
    assert line_of(OSError(30, "Read-only file system")) == (
        "files must be written whole, got Read-only file system"
    )


def _fail(file):
    raise RuntimeError("a bug")
