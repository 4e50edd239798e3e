"""Editing of a region: pixels outside of it stay."""

import pytest
import torch

from flowkit.sampling import ODESampler
from flowkit.symmetrical.regions import put_back


def test_the_region_alone_changes():
    """A field that drives everything to 9: outside of the region the image ends as given."""
    x0, x1 = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[:, 1:3, 2:] = True
    seen = []

    def velocity(x, t, cond):
        seen.append((t[0].item(), x.clone()))
        return (9 - x[:, :1]).expand_as(x) / (1 - t[:, None, None, None])

    state = torch.cat([x0, torch.zeros(2, 3, 4, 4)], 1)
    callback = put_back(x0, x1, region)
    x = ODESampler(5).solve(velocity, state, callback=callback).x
    outside = ~region[:, None]
    assert torch.equal(x[:, :1][outside], x1[outside])
    torch.testing.assert_close(x[:, :1][~outside], torch.full_like(x1[~outside], 9.0))
    for t, x in seen:
        torch.testing.assert_close(x[:, :1][outside], torch.lerp(x0, x1, t)[outside])
    with pytest.raises(ValueError, match=r"region must have shape \(B, H, W\), one value per"):
        put_back(x0, x1, region[:, :2])


def test_a_latent_cell_that_the_region_touches_changes():
    x0, x1 = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, 0, 3] = True
    x = put_back(x0, x1, region)(1, 1.0, torch.full((1, 1, 2, 2), 5.0))
    assert x.flatten().tolist() == [5, 1, 1, 1]
