import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flowkit.data.arrays import Arrays, positions
from flowkit.metrics import from_uint8


def test_gray_levels_map_exactly_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    mapped = from_uint8(levels)
    assert mapped.dtype == torch.float32
    assert mapped[0] == -1
    assert mapped[255] == 1
    torch.testing.assert_close(
        mapped.double(), levels.double() / 127.5 - 1, rtol=0, atol=torch.finfo(torch.float32).eps
    )
    back = ((mapped + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, levels)


@given(st.integers(0, 20), st.slices(20))
def test_slices_lists_and_tensors_agree(length, part):
    expected = list(range(length))[part]
    mask = torch.zeros(length, dtype=torch.bool)
    mask[expected] = True
    assert positions(part, length).tolist() == expected
    assert positions(expected, length).tolist() == expected
    assert positions(torch.tensor(expected, dtype=torch.long), length).tolist() == expected
    assert positions(mask, length).tolist() == sorted(expected)


def test_batch_holds_every_column_in_the_order_asked():
    split = Arrays(
        {
            "x1": torch.tensor([[0], [51], [255]], dtype=torch.uint8),
            "cond": torch.tensor([7, 8, 9]),
            "x0": torch.tensor([[0.5], [1.5], [2.5]]),
        }
    )
    for index in ([2, 0, -1], torch.tensor([2, 0, 2])):
        batch = split[index]
        assert batch["x1"].flatten().tolist() == [1, -1, 1]
        assert batch["cond"].tolist() == [9, 7, 9]
        assert batch["x0"].flatten().tolist() == [2.5, 0.5, 2.5]
    assert split[1:]["cond"].tolist() == [8, 9]
    assert split[[]]["x1"].shape == (0, 1)


def test_single_positions_are_refused():
    split = Arrays({"x1": torch.zeros(3, 2)})
    for index in (0, torch.tensor(0), torch.zeros(1, 1).long(), [0.5], torch.ones(2).bool()):
        with pytest.raises(TypeError, match="index must be a slice, a list or a 1-D tensor"):
            split[index]
    for index in ([3], [-4]):
        with pytest.raises(IndexError, match=r"index must lie in \[-3, 2\], got"):
            split[index]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(bad):
    x1 = torch.zeros(30, 1, 2, 2)
    x1[17, 0, 1, 0] = bad
    with pytest.raises(ValueError, match=r"x1 of scans\.pt must be finite, got .* at index 17"):
        Arrays({"x1": x1}, name="scans.pt")
    cond = torch.zeros(30)
    cond[3] = bad
    with pytest.raises(ValueError, match=r"cond of data must be finite, got .* at index 3"):
        Arrays({"x1": torch.zeros(30, 2), "cond": cond})


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="cond of data must have 3 rows like x1, got 2"):
        Arrays({"x1": torch.zeros(3, 2), "cond": torch.zeros(2)})


def test_fingerprint_depends_on_content_alone():
    x1, cond = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    first = Arrays({"x1": x1, "cond": cond}, "one name").fingerprint()
    assert first == Arrays({"cond": cond.clone(), "x1": x1.clone()}, "another").fingerprint()
    changed = x1.clone()
    changed[2, 1] += 1e-6
    others = [
        {"x1": changed, "cond": cond},
        {"x1": x1.reshape(3, 1, 2), "cond": cond},
        {"x1": x1, "cond": cond.int()},
        {"x1": x1},
    ]
    assert len({first, *(Arrays(columns).fingerprint() for columns in others)}) == 5
