"""Arrays of npz files by rows: mapped, unpacked, damaged."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from numpy.lib import format as npy

from flowkit.data.npz import Npz

ARRAY = np.arange(50 * 6, dtype=np.uint8).reshape(50, 2, 3)


@pytest.fixture(params=["stored", "compressed"])
def file(request, tmp_path):
    save = np.savez if request.param == "stored" else np.savez_compressed
    save(tmp_path / "a.npz", arr_0=ARRAY, other=np.arange(50) ** 2)
    return tmp_path / "a.npz"


@pytest.mark.parametrize("rows", [[0], [3, 4, 5], [1, 7, 49], list(range(50)), []], ids=str)
def test_rows_are_those_of_numpy(file, rows):
    npz = Npz.open(file)
    assert npz.names == ["arr_0", "other"]
    assert (npz.shape("arr_0"), npz.dtype("arr_0")) == ((50, 2, 3), np.uint8)
    found = npz.rows("arr_0", torch.tensor(rows, dtype=torch.long))
    assert np.array_equal(found.numpy(), ARRAY[rows])
    assert npz.whole("other").tolist() == [k * k for k in range(50)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_of_other_byte_orders_have_their_values(save, tmp_path):
    array = np.arange(12.0).reshape(4, 3) / 7
    save(tmp_path / "a.npz", big=array.astype(">f8"), little=array.astype("<f8"))
    npz = Npz.open(tmp_path / "a.npz")
    for name in ("big", "little"):
        for rows in ([1, 2], [0, 3]):
            assert np.array_equal(npz.rows(name, torch.tensor(rows)).numpy(), array[rows])


def test_later_and_earlier_rows_follow_one_another_in_any_order(file):
    npz = Npz.open(file)
    for rows in ([10, 12], [13], [2, 3], [0], [40, 49]):
        assert np.array_equal(npz.rows("arr_0", torch.tensor(rows)).numpy(), ARRAY[rows])


def test_arrays_in_fortran_order(tmp_path):
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(ARRAY))
    assert np.array_equal(
        Npz.open(tmp_path / "f.npz").rows("a", torch.tensor([5, 9])), ARRAY[[5, 9]]
    )
    np.savez_compressed(tmp_path / "g.npz", a=np.asfortranarray(ARRAY))
    npz = Npz.open(tmp_path / "g.npz")
    assert np.array_equal(npz.whole("a"), ARRAY)
    with pytest.raises(ValueError, match=r"a in .*must be in C order to be read by rows"):
        npz.rows("a", torch.tensor([0]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_holds_the_rows_alone(save, tmp_path):
    """Of 24 MB a read of 100 rows takes what 100 rows take, four times at most."""
    save(tmp_path / "a.npz", arr_0=np.zeros((10_000, 2400), np.uint8))
    npz = Npz.open(tmp_path / "a.npz")
    tracemalloc.start()
    npz.rows("arr_0", torch.arange(9_900, 10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 240_000 + 2**21  # and the pieces that are skipped


def _read(file):
    return Npz.open(file).rows("arr_0", torch.arange(50))


def _refused(file):
    with pytest.raises(ValueError, match=rf"{file} must be an npz file as numpy.savez writes it"):
        _read(file)
    return True


def test_damaged_files_are_refused(file):
    content = file.read_bytes()
    for damaged in (b"", b"hello", content[:100], content[:-30], content[: len(content) // 2]):
        file.write_bytes(damaged)
        assert _refused(file)


def test_a_compressed_array_with_damaged_bytes_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    random = np.random.default_rng(0).integers(0, 256, ARRAY.shape, dtype=np.uint8)
    np.savez_compressed(file, arr_0=random)
    content = bytearray(file.read_bytes())
    content[200:260] = bytes(60)
    file.write_bytes(content)
    assert _refused(file)


def test_headers_that_lie_and_python_objects_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    for header in (
        {"descr": "|u1", "fortran_order": False, "shape": (2**40, 3)},
        {"descr": "|u1", "fortran_order": False, "shape": (-1, 3)},
        {"descr": "|O", "fortran_order": False, "shape": (2,)},
    ):
        raw = io.BytesIO()
        npy.write_array_header_1_0(raw, header)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("arr_0.npy", raw.getvalue() + b"123456")
        assert _refused(file)


def test_the_place_of_an_array_regards_the_extra_field_of_its_header(tmp_path):
    """As zip tools write it; the directory at the end has another."""
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("arr_0.npy")
        info.extra = struct.pack("<HH4s", 0x7777, 4, b"abcd")
        raw = io.BytesIO()
        np.save(raw, ARRAY)
        archive.writestr(info, raw.getvalue())
    assert np.array_equal(Npz.open(file).rows("arr_0", torch.arange(50)).numpy(), ARRAY)
