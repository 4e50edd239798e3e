"""Autoencoders of diffusers beside the KL autoencoder: small ones, made from their configs."""

import pytest
import torch

from flowkit.autoencoders import (
    DCAutoencoder,
    KLAutoencoder,
    RAEAutoencoder,
    TinyAutoencoder,
    check_identity,
    identity,
    mean_latents,
)
from flowkit.nn import autoencoder_kl


def tiny(**config):
    from diffusers import AutoencoderTiny

    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    blocks |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**blocks, **{"scaling_factor": 0.5, "shift_factor": 0.25, **config})


def dc(**config):
    from diffusers import AutoencoderDC

    sizes = {"block_out_channels": (16, 16), "layers_per_block": (1, 1)}
    sizes |= {"qkv_multiscales": ((), ())}
    both = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()
    }
    return AutoencoderDC(latent_channels=4, **both, **{"scaling_factor": 0.41, **config})


def rae(**config):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    encoder = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "patch_size": 4}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    moments = {
        "latents_mean": torch.full((64, 2, 2), 0.5),
        "latents_std": torch.full((64, 2, 2), 2.0),
    }
    options = {"encoder_input_size": 28, **encoder, **decoder, **moments, **config}
    return diffusers.AutoencoderRAE(**options)


KINDS = {
    "tiny": (TinyAutoencoder, tiny, (3, 8, 12), 2, (4, 4, 6)),
    "dc": (DCAutoencoder, dc, (3, 8, 12), 2, (4, 4, 6)),
    "rae": (RAEAutoencoder, rae, (3, 8, 8), 4, (64, 2, 2)),
}


def made(kind, **config):
    torch.manual_seed(3)
    return KINDS[kind][0](KINDS[kind][1](**config))


def pictures(shape, count=3):
    return 2 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) - 1


def by_hand(kind, vae, x):
    """Scaled latents and their images, from the network itself."""
    if kind == "tiny":
        z = vae.encode(x).latents
        return (z - 0.25) * 0.5, vae.decode(z).sample
    if kind == "dc":
        z = vae.encode(x).latent
        return z * 0.41, vae.decode(z).sample
    z = vae.encode((x + 1) / 2).latent
    return z, 2 * vae.decode(z).sample - 1


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_images_are_the_networks_and_nothing_is_drawn(kind):
    _, _, shape, factor, latent = KINDS[kind]
    autoencoder, x = made(kind), pictures(shape)
    expected, images = by_hand(kind, autoencoder.vae, x)
    z = autoencoder.encode(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(autoencoder.decode(z), images)
    assert torch.equal(z, autoencoder.encode(x))
    assert torch.equal(z, mean_latents(autoencoder, x))
    assert torch.equal(autoencoder.posterior(x).std, torch.zeros_like(z))
    assert autoencoder.factor == factor
    assert autoencoder.latent_shape(shape) == z.shape[1:] == latent
    alone = torch.cat([autoencoder.encode(one[None]) for one in x])
    torch.testing.assert_close(z, alone, rtol=1e-4, atol=1e-5)


def test_latents_of_a_representation_are_scaled_by_its_own_moments():
    plain = made("rae", latents_mean=None, latents_std=None).double()
    x = pictures((3, 8, 8)).double()
    raw = plain.encode(x) * (1 + 1e-5)  # diffusers adds 1e-5 to each deviation
    scaled = (raw - 0.5) / (2 + 1e-5)
    torch.testing.assert_close(made("rae").double().encode(x), scaled)
    twice = made("rae", scaling_factor=2.0).double()
    torch.testing.assert_close(twice.encode(x), 2 * scaled)
    torch.testing.assert_close(twice.decode(2 * scaled), made("rae").double().decode(scaled))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_network_is_the_same_and_others_are_refused(kind, tmp_path):
    autoencoder, x = made(kind), pictures(KINDS[kind][2])
    autoencoder.save_pretrained(tmp_path / "own")
    again = KINDS[kind][0].from_pretrained(tmp_path / "own")
    assert again.hash == autoencoder.hash
    assert torch.equal(again.encode(x), autoencoder.encode(x))
    torch.manual_seed(4)
    other = KINDS[kind][0](KINDS[kind][1]())
    with pytest.raises(ValueError, match="autoencoder must be the one that the flow was made with"):
        check_identity(identity(autoencoder), other, "the flow")
    KLAutoencoder(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2))).save_pretrained(tmp_path)
    words = f"path must hold an {KINDS[kind][0].kind}, got an AutoencoderKL"
    with pytest.raises(ValueError, match=words):
        KINDS[kind][0].from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="vae must be an AutoencoderKL of diffusers, got Autoenc"):
        KLAutoencoder(autoencoder.vae)


@pytest.mark.parametrize("kind", ["tiny", "dc"])
def test_sides_that_do_not_divide_are_refused_or_padded(kind):
    autoencoder = made(kind)
    with pytest.raises(ValueError, match=r"sides divisible by 2, got \(1, 3, 8, 9\)"):
        autoencoder.encode(pictures((3, 8, 9), 1))
    torch.manual_seed(3)
    gray = KINDS[kind][0](KINDS[kind][1](), image_shape=(1, 8, 9))
    x = pictures((1, 8, 9), 1)
    color = torch.cat([x, x[..., -1:]], -1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(gray.encode(x), autoencoder.encode(color))
    assert gray.decode(gray.encode(x)).shape == x.shape
    assert gray.hash != autoencoder.hash


def test_representations_take_images_of_one_size():
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 8, 8\), got \(1, 3, 12"):
        made("rae").encode(pictures((3, 12, 12), 1))
    with pytest.raises(ValueError, match=r"image_shape must be \(1 or 3, 8, 8\) for this Autoen"):
        RAEAutoencoder(rae(), image_shape=(3, 12, 12))
    gray, x = RAEAutoencoder(rae(), image_shape=(1, 8, 8)), pictures((1, 8, 8))
    assert gray.decode(gray.encode(x)).shape == x.shape
    with pytest.raises(ValueError, match="reshape_to_2d of vae must be true, got false"):
        RAEAutoencoder(rae(reshape_to_2d=False))
