"""Is it noise? Null distributions, and what structure does to them."""

import pytest
import torch
from scipy import stats

from flowkit.metrics.gaussianity import gaussianity


@pytest.mark.parametrize("shape", [(1, 8, 8), (64,), (4, 16, 16), (5, 30)])
def test_deviates_of_noise_are_standard_normal(shape):
    found = gaussianity(torch.randn(2000, *shape))
    assert stats.kstest(found.chi2.numpy(), stats.norm.cdf).pvalue > 1e-3
    sides = shape[-2:] if len(shape) > 2 else shape[-1:]
    dim = torch.tensor(shape).prod().item()
    # E ‖z‖ / √d = 1 − 1 / 4d, with a variance of 1 / 2d.
    assert found.norm.mean().item() == pytest.approx(1 - 0.25 / dim, abs=5 / (4000 * dim) ** 0.5)
    pairs = [dim // side * (side - 1) for side in sides]
    std = sum(1 / n for n in pairs) ** 0.5 / len(pairs)
    assert found.autocorrelation.std().item() == pytest.approx(std, rel=0.1)
    assert abs(found.autocorrelation.mean().item()) < 5 * std / 2000**0.5


def test_structure_is_seen():
    noise = torch.randn(50, 1, 16, 16)
    louder = gaussianity(1.5 * noise)
    torch.testing.assert_close(louder.norm, 1.5 * gaussianity(noise).norm)
    assert (louder.chi2 > 5).all()
    smooth = torch.nn.functional.avg_pool2d(noise, 2, 1)
    smooth = smooth / smooth.square().mean((1, 2, 3), keepdim=True).sqrt()
    found = gaussianity(smooth)
    torch.testing.assert_close(found.norm, torch.ones(50).double())
    assert found.autocorrelation.mean().item() == pytest.approx(0.5, abs=0.03)
    assert gaussianity(torch.ones(1, 3, 4)).autocorrelation.item() == pytest.approx(1)


def test_values_by_hand():
    found = gaussianity(torch.tensor([[1.0, 2.0, 3.0]]))
    assert found.norm.item() == pytest.approx((14 / 3) ** 0.5)
    spread = 2 / 27
    chi2 = ((14 / 3) ** (1 / 3) - 1 + spread) / spread**0.5
    assert found.chi2.item() == pytest.approx(chi2)
    assert found.autocorrelation.item() == pytest.approx((2 + 6) / 2 / (14 / 3))
    # Sequences have neighbors along their length; videos along height and width.
    sequence = gaussianity(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]))
    assert sequence.autocorrelation.item() == pytest.approx((2 - 3) / 2 / (15 / 4))
    video = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * torch.tensor([1.0, -1.0])[:, None, None]
    both = (2 + 12) / 2 + (3 + 8) / 2  # along the width and along the height
    found = gaussianity(video[None, None]).autocorrelation.item()
    assert found == pytest.approx(both / 2 / (30 / 4))


def test_a_sample_needs_neighbors():
    with pytest.raises(ValueError, match="sides of z must be at least 2, got 1"):
        gaussianity(torch.randn(3, 1))
