"""Segments of equal burden."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit.blockwise import (
    equal_burden,
)


@settings(max_examples=50, deadline=None)
@given(
    burden=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    num_segments=st.integers(1, 8),
)
def test_equal_burden_gives_each_segment_the_same(burden, num_segments):
    times = torch.linspace(0, 1, len(burden) + 1, dtype=torch.float64)
    density = torch.tensor(burden, dtype=torch.float64)
    edges = equal_burden(times, density, num_segments)
    fine = torch.cat([times, edges]).unique()
    middle = (fine[1:] + fine[:-1]) / 2
    mass = density[torch.bucketize(middle, times[1:-1])] * fine.diff()
    owner = torch.bucketize(middle, edges[1:-1])
    shares = torch.zeros(num_segments, dtype=torch.float64).index_add(0, owner, mass)
    torch.testing.assert_close(shares, shares.mean().expand(num_segments), rtol=1e-6, atol=0)


def test_equal_burden_refuses_what_is_no_burden():
    times = torch.tensor([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="burden must be positive and finite, got"):
        equal_burden(times, torch.tensor([1.0, 0.0]), 2)
    with pytest.raises(ValueError, match="burden must hold one number per interval, 2, got"):
        equal_burden(times, torch.ones(3), 2)
