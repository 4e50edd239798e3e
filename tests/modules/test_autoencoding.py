"""Training of autoencoders, and pictures of conditions."""

import pytest
import torch
from torch import nn

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.exact import GaussianFlow
from flowkit.inpainting import RandomMasks
from flowkit.modules import LatentFlowMatching
from flowkit.modules.autoencoding import Autoencoding, FeatureError
from flowkit.modules.condition_grid import condition_grid
from flowkit.nn import autoencoder_kl
from flowkit.sampling import ODESampler


def network(shape=(1, 8, 8), multipliers=(1, 2)):
    torch.manual_seed(0)
    return autoencoder_kl(shape, width=8, multipliers=multipliers)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_loss_is_error_and_divergence_per_pixel():
    """The divergence of an image by its 64 pixels, and not by its 16 latents."""
    vae, x = network(multipliers=(1, 1, 1)), torch.rand(5, 1, 8, 8) * 2 - 1
    terms = Autoencoding(vae, kl_weight=0.5).loss({"x1": x}, seeded())
    law = vae.encode(x).latent_dist
    z = law.mean + law.std * torch.randn(law.mean.shape, generator=seeded())
    l1 = (vae.decode(z).sample - x).abs().mean()
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(law.mean, law.std), normal(0, 1))
    kl = divergence.flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["l1"], l1)
    torch.testing.assert_close(terms["kl"], kl)
    assert law.mean[0].numel() == 16
    assert kl > 1e-2
    torch.testing.assert_close(terms["loss"], l1 + 0.5 * kl / 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_sums_in_float32(dtype):
    """A divergence of 1e5 nats per image is beyond float16."""
    vae, x = network(), torch.rand(5, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias[:4] = 60.0
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3))
    module = Autoencoding(vae, perceptual=FeatureError(trunk), perceptual_weight=0.3)
    exact = module.loss({"x1": x}, seeded())
    found = module.to(dtype).loss({"x1": x.to(dtype)}, seeded())
    assert exact["kl"] > 1e5
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0)


def test_images_of_any_size_are_compared_where_they_are():
    vae, x = network((1, 7, 6), (1, 1, 1)), torch.rand(3, 1, 7, 6) * 2 - 1
    terms = Autoencoding(vae, kl_weight=0.0).loss({"x1": x}, seeded())
    autoencoder = KLAutoencoder(vae)
    decoded = autoencoder.decode(autoencoder.encode(x, seeded()))
    torch.testing.assert_close(terms["loss"], (decoded - x).abs().mean())


def test_perceptual_term_is_weighed_moved_and_not_stored():
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    error, x = FeatureError(trunk), torch.rand(2, 1, 8, 8)
    module = Autoencoding(network(), perceptual=error, perceptual_weight=0.3)
    terms = module.loss({"x1": x}, seeded())
    expected = terms["l1"] + 1e-6 * terms["kl"] / 64 + 0.3 * terms["perceptual"]
    torch.testing.assert_close(terms["loss"], expected)
    assert all(name.startswith("vae.") for name in module.state_dict())
    module.train()
    assert not trunk.training
    module.double()
    assert trunk[0].weight.dtype == torch.float64
    held = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert held == {id(p) for p in module.vae.parameters()}


def test_feature_error_compares_directions_of_features():
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.SiLU(), nn.Conv2d(4, 4, 3, bias=False))
    a, b = torch.randn(2, 2, 1, 8, 8)
    first = FeatureError(trunk[:1])
    assert first(a, 3 * a).item() == pytest.approx(0, abs=1e-6)
    assert first(a, -a).item() == pytest.approx(4)
    layers = [trunk[:1], trunk]
    by_hand = []
    for part in layers:
        f, g = (nn.functional.normalize(part(x), dim=1) for x in (a, b))
        by_hand.append((f - g).square().sum(1).mean())
    torch.testing.assert_close(FeatureError(trunk)(a, b), torch.stack(by_hand).mean())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kl_weight must be at least 0, got -1"):
        Autoencoding(network(), kl_weight=-1)
    with pytest.raises(ValueError, match="trunk must have convolutions among its layers"):
        FeatureError(nn.Sequential(nn.Flatten()))


class Towards(nn.Module):
    """Half the way to the masked image, or to a map's gray levels."""

    def forward(self, x, t, cond=None):
        target = cond["masked"] if isinstance(cond, dict) else cond[:, None].float() / 4
        return 0.5 * (target - x)


def test_grid_shows_given_real_and_samples_row_by_row():
    module = LatentFlowMatching(Towards(), Identity(), masks=RandomMasks())
    module.sample_shape = (1, 8, 8)
    x = torch.rand(6, 1, 8, 8) + 0.1
    picture = condition_grid(module, {"x1": x}, 4, 3, ODESampler(2))
    rows = picture.unflatten(0, (4, 5))
    assert torch.equal(rows[:, 1], x[:4])
    hole = rows[:, 0] == 0
    assert torch.equal(rows[:, 0][~hole], x[:4][~hole])
    for k in range(2, 5):
        assert torch.equal(rows[:, k][~hole], x[:4][~hole])
        assert not torch.equal(rows[:, k][hole], rows[:, 2 + (k - 1) % 3][hole])
    assert torch.equal(condition_grid(module, {"x1": x}, 4, 3, ODESampler(2)), picture)


def test_grid_shows_maps_as_gray_levels_and_latents_as_images():
    torch.manual_seed(1)
    autoencoder = KLAutoencoder(network())
    module = LatentFlowMatching(GaussianFlow(0.0, 1.0), autoencoder)
    x = torch.rand(2, 1, 8, 8)
    maps = torch.zeros(2, 8, 8, dtype=torch.long)
    maps[:, 2:4], maps[:, 4:] = 2, 4
    z = module.encode({"x1": x})["x1"]
    batch = {"x1": z, "cond": maps, "encoded_by": autoencoder.hash}
    rows = condition_grid(module, batch, 2, 1, ODESampler(2)).unflatten(0, (2, 3))
    assert torch.equal(rows[:, 0, 0], maps / 2 - 1)
    torch.testing.assert_close(rows[:, 1], autoencoder.decode(z))
    with pytest.raises(ValueError, match="module must have masks, or the batch maps"):
        condition_grid(module, {"x1": x, "cond": torch.zeros(2)}, 2, 1)


def test_a_loss_that_is_not_finite_names_the_images():
    x = torch.zeros(3, 1, 8, 8)
    x[1, 0, 2, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"got nan at step 0, batch 7; x1 is not .* rows \[1\]"):
        Autoencoding(network()).training_step({"x1": x}, 7)
