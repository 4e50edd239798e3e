"""Autoencoders: both maps, the scale, and which autoencoder it is."""

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKL

from flowkit.autoencoders import (
    Autoencoder,
    Identity,
    KLAutoencoder,
    Posterior,
    check_identity,
    identity,
    mean_latents,
)
from flowkit.nn import autoencoder_kl


def small(shape=(1, 8, 8), **options):
    torch.manual_seed(3)
    return autoencoder_kl(shape, **{"width": 8, "multipliers": (1, 2), **options})


def sd_style(**config):
    """A network as published ones are: color, a scale, and a size that binds nobody."""
    torch.manual_seed(3)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        **{"sample_size": 512, **config},
    )


def pictures(count=6, shape=(1, 8, 8), seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_latents_and_images_are_the_networks_with_the_scale_on_both_sides():
    vae = sd_style(scaling_factor=0.5, shift_factor=0.3)
    autoencoder, x = KLAutoencoder(vae), pictures(shape=(3, 16, 16))
    raw = vae.encode(x).latent_dist
    posterior = autoencoder.posterior(x)
    torch.testing.assert_close(posterior.mean, (raw.mean - 0.3) * 0.5)
    torch.testing.assert_close(posterior.std, raw.std * 0.5)
    torch.testing.assert_close(
        autoencoder.decode(posterior.mean), vae.decode(raw.mean).sample, rtol=1e-4, atol=1e-5
    )


def test_channel_moments_of_the_config_are_read_as_diffusers_writes_them():
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    vae = sd_style(latents_mean=mean, latents_std=std, scaling_factor=0.25)
    x = pictures(shape=(3, 16, 16))
    expected = (vae.encode(x).latent_dist.mean - torch.tensor(mean)[:, None, None]) * 0.25
    expected = expected / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(KLAutoencoder(vae).posterior(x).mean, expected)


def test_encoding_draws_from_the_posterior():
    autoencoder, x = KLAutoencoder(small()), pictures(1)
    mean, std = autoencoder.posterior(x)
    draws = autoencoder.encode(x.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    standard = (draws - mean) / std
    assert standard.mean().abs() < 0.01
    assert standard.std().item() == pytest.approx(1, abs=0.01)
    again = autoencoder.encode(x.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert Posterior(mean, 0 * std).sample().equal(mean)


def test_fitted_scale_makes_every_channel_standard():
    autoencoder, x = KLAutoencoder(small()), pictures(200)
    before = autoencoder.encode(x)
    assert (before.mean((0, 2, 3)).abs() > 0.1).any(), "nothing to be fitted otherwise"
    assert autoencoder.fit_scale(x, batch_size=32) is autoencoder
    z = autoencoder.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.03, rtol=0)


def test_fitted_scale_is_the_exact_moment_whatever_the_batches_and_the_scale_before():
    x = pictures(50)
    raw = small().eval().encode(x).latent_dist
    mean = raw.mean.mean((0, 2, 3))
    second = (raw.mean.square() + raw.std.square()).mean((0, 2, 3))
    std = (second - mean.square()).sqrt()
    autoencoder = KLAutoencoder(small())
    for batches in (x, x.split(7), iter(x.split(50))):
        autoencoder.fit_scale(batches, batch_size=13)
        torch.testing.assert_close(autoencoder.mean.flatten(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(autoencoder.std.flatten(), std, rtol=1e-4, atol=1e-5)


def test_decoding_undoes_the_scale():
    """The scale cancels: a round trip is that of the network, however latents are scaled."""
    x, autoencoder = pictures(20), KLAutoencoder(small())
    before = autoencoder.decode(autoencoder.posterior(x).mean)
    autoencoder.fit_scale(x)
    after = autoencoder.decode(autoencoder.posterior(x).mean)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_saved_folder_holds_everything(tmp_path):
    autoencoder, x = KLAutoencoder(small()).fit_scale(pictures(20)), pictures(3)
    autoencoder.save_pretrained(tmp_path)
    again = KLAutoencoder.from_pretrained(tmp_path)
    assert again.hash == autoencoder.hash
    assert again.config == autoencoder.config
    assert again.image_shape == (1, 8, 8)
    z = again.encode(x, torch.Generator().manual_seed(0))
    assert torch.equal(z, autoencoder.encode(x, torch.Generator().manual_seed(0)))
    assert torch.equal(again.decode(z), autoencoder.decode(z))


def test_folders_of_diffusers_are_read(tmp_path):
    sd_style(scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
    autoencoder = KLAutoencoder.from_pretrained(tmp_path, subfolder="vae")
    assert autoencoder.std.flatten().tolist() == pytest.approx([1 / 0.18215] * 4)
    assert autoencoder.encode(pictures(2, (3, 8, 12))).shape == (2, 4, 2, 3)


def test_a_folder_without_a_network_is_named_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(OSError, match=rf"hub:owner/name, got {tmp_path}/no; a relative path"):
        KLAutoencoder.from_pretrained(tmp_path / "no")


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 10, 7), (1, 5, 5)])
def test_any_size_comes_back(shape):
    autoencoder = KLAutoencoder(small(shape, multipliers=(1, 1, 1)))
    latents = autoencoder.encode(pictures(2, shape))
    assert latents.shape[1:] == autoencoder.latent_shape(shape) == (4, *_up(shape, 4))
    assert autoencoder.decode(latents).shape == (2, *shape)


def _up(shape, factor):
    return tuple(math.ceil(side / factor) for side in shape[1:])


def test_padding_repeats_the_last_pixels_and_keeps_the_rest_in_place():
    autoencoder, x = KLAutoencoder(small((1, 7, 6), multipliers=(1, 1, 1))), pictures(1, (1, 7, 6))
    padded = autoencoder.pad(x)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :7, :6], x)
    assert torch.equal(padded[..., 7, :6], x[..., 6, :])
    assert (padded[..., 6:] == padded[..., 5:6]).all()
    # cropping takes the same corner: the decoded whole agrees with the decoder's own
    z = autoencoder.posterior(x).mean
    whole = autoencoder.vae.decode(z * autoencoder.std + autoencoder.mean).sample
    assert torch.equal(autoencoder.decode(z), whole[..., :7, :6])


def test_gray_images_in_a_color_network():
    vae = sd_style()
    gray, x = KLAutoencoder(vae, image_shape=(1, 10, 10)), pictures(2, (1, 10, 10))
    color = KLAutoencoder(vae, image_shape=(3, 10, 10))
    mean = gray.posterior(x).mean
    assert torch.equal(mean, color.posterior(x.repeat(1, 3, 1, 1)).mean)
    torch.testing.assert_close(gray.decode(mean), color.decode(mean).mean(1, keepdim=True))
    assert gray.decode(mean).shape == (2, 1, 10, 10)


def test_network_is_no_part_of_a_module_but_goes_where_it_goes():
    autoencoder = KLAutoencoder(small())
    owner = torch.nn.Module()
    owner.autoencoder = autoencoder
    assert not list(owner.parameters())
    assert not owner.state_dict()
    owner.train()
    assert not autoencoder.vae.training
    owner.double()
    assert {p.dtype for p in autoencoder.vae.parameters()} == {torch.float64}
    assert autoencoder.mean.dtype == torch.float64
    assert autoencoder.encode(pictures(1).double()).dtype == torch.float64
    assert not any(p.requires_grad for p in autoencoder.vae.parameters())


def test_copies_are_independent_and_the_same():
    autoencoder = KLAutoencoder(small())
    other = copy.deepcopy(autoencoder)
    other.double()
    assert autoencoder.encode(pictures(1)).dtype == torch.float32
    assert other.hash == autoencoder.hash


def test_latents_are_not_rounded_in_autocast():
    autoencoder, x = KLAutoencoder(small()), pictures(2)
    plain = autoencoder.posterior(x).mean
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.posterior(x).mean, plain)
        decoded = autoencoder.decode(plain)
    assert torch.equal(decoded, autoencoder.decode(plain))


def test_gradients_reach_latents_but_not_weights():
    autoencoder = KLAutoencoder(small())
    z = torch.zeros(1, 4, 4, 4, requires_grad=True)
    autoencoder.decode(z).square().sum().backward()
    assert z.grad.abs().max() > 0


def test_hash_tells_weights_scale_and_shape_apart():
    autoencoder = KLAutoencoder(small())
    hashes = {autoencoder.hash, KLAutoencoder(small((1, 8, 7))).hash}
    autoencoder.fit_scale(pictures(20))
    hashes.add(autoencoder.hash)
    torch.nn.init.zeros_(autoencoder.vae.quant_conv.bias)
    hashes.add(KLAutoencoder(autoencoder.vae).hash)
    with torch.no_grad():
        autoencoder.vae.quant_conv.bias[0] += 1e-6
    hashes.add(KLAutoencoder(autoencoder.vae).hash)
    assert len(hashes) == 5
    assert KLAutoencoder(small()).hash == KLAutoencoder(small()).hash


def test_identity_is_checked_by_both_hashes_with_the_difference():
    ours = KLAutoencoder(small())
    record = identity(ours)
    check_identity(record, ours, "the flow")
    fitted = KLAutoencoder(small()).fit_scale(pictures(20))
    with pytest.raises(
        ValueError, match=rf"hash {ours.hash}, got {fitted.hash}; they differ in latents_mean None"
    ):
        check_identity(record, fitted, "the flow")
    other = KLAutoencoder(small())
    torch.nn.init.zeros_(other.vae.quant_conv.bias)
    other = KLAutoencoder(other.vae)
    with pytest.raises(
        ValueError,
        match=f"the cache was made with, hash {ours.hash}, got {other}".replace(
            str(other), other.hash
        ),
    ):
        check_identity(record, other, "the cache")
    with pytest.raises(ValueError, match=f"hash identity, got {ours.hash}"):
        check_identity(identity(Identity()), ours, "the flow")


def test_latents_without_noise_are_means_and_networks_without_a_hash_have_that_of_their_weights():
    autoencoder, x = KLAutoencoder(small()), pictures(2)
    assert torch.equal(mean_latents(autoencoder, x), autoencoder.posterior(x).mean)
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert identity(one)["hash"] == identity(copy.deepcopy(one))["hash"] != identity(other)["hash"]
    fitted = KLAutoencoder(sd_style(shift_factor=0.3, scaling_factor=0.5))
    config = fitted.fit_scale(pictures(20, (3, 8, 8))).config
    assert (config["shift_factor"], config["scaling_factor"]) == (None, 1.0)


def test_both_are_autoencoders():
    assert isinstance(KLAutoencoder(small()), Autoencoder)
    assert isinstance(Identity(), Autoencoder)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: KLAutoencoder(torch.nn.Linear(1, 1)), TypeError, "vae must be an AutoencoderKL"),
        (
            lambda: KLAutoencoder(sd_style(), image_shape=(2, 8, 8)),
            ValueError,
            r"image_shape must be \(1 or 3, H, W\), got \(2, 8, 8\)",
        ),
        (
            lambda: KLAutoencoder(sd_style()).encode(torch.zeros(1, 3, 10, 8)),
            ValueError,
            r"sides divisible by 4, got \(1, 3, 10, 8\); image_shape=\(3, 10, 8\) pads",
        ),
        (
            lambda: KLAutoencoder(sd_style()).encode(torch.zeros(1, 3, 8, 10)),
            ValueError,
            r"sides divisible by 4, got \(1, 3, 8, 10\)",
        ),
        (
            lambda: KLAutoencoder(sd_style()).encode(torch.zeros(1, 1, 8, 8)),
            ValueError,
            r"images must have shape \(B, 3, H, W\).*turns gray into color",
        ),
        (
            lambda: KLAutoencoder(small()).encode(torch.zeros(1, 1, 8, 10)),
            ValueError,
            r"images must have shape \(B, 1, 8, 8\), got \(1, 1, 8, 10\)",
        ),
        (
            lambda: KLAutoencoder(small()).encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
            TypeError,
            r"images must be floats in \[-1, 1\], got torch.uint8",
        ),
        (
            lambda: KLAutoencoder(small()).decode(torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"latents must have shape \(B, 4, 4, 4\), got \(1, 3, 4, 4\)",
        ),
        (
            lambda: KLAutoencoder(sd_style()).decode(torch.zeros(1, 5, 4, 4)),
            ValueError,
            r"latents must have shape \(B, 4, h, w\), got \(1, 5, 4, 4\)",
        ),
        (
            lambda: KLAutoencoder(small()).fit_scale([]),
            ValueError,
            "the number of latents in images must be at least 2, got 0",
        ),
        (
            lambda: KLAutoencoder(sd_style(latents_mean=[0.0], latents_std=[1.0])),
            ValueError,
            "latents_mean and latents_std of vae must hold 4 numbers, got 1 and 1",
        ),
        (
            lambda: KLAutoencoder(sd_style(latents_mean=[0.0] * 4, latents_std=[1, 1, 0, 1])),
            ValueError,
            "the std of latents must be positive and finite",
        ),
        (
            lambda: KLAutoencoder(sd_style(shift_factor=float("nan"))),
            ValueError,
            "the mean of latents must be finite",
        ),
        (lambda: autoencoder_kl((8, 8)), ValueError, r"shape must be \(C, H, W\), got \(8, 8\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()
