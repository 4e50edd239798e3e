"""Tiny flows to export, with weights that are not zero."""

import torch

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.guidance import DropCond
from flowkit.modules import ConditionalFlowMatching, MeanFlowMatching
from flowkit.nn import MLP, DiffusersVelocity, DiT, ResidualMLP, autoencoder_kl, unet2d

CLASSES = ["cat", "dog", "owl"]
GUIDED = DropCond(0.1, 3)


def _diffusers_dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    return DiffusersVelocity(net, time_scale=250.0, drop_sigma=True)


def _latents():
    """Gray images of odd sides from a network of colors."""
    autoencoder = KLAutoencoder(
        autoencoder_kl((3, 9, 9), width=8, multipliers=(1, 2)), image_shape=(1, 9, 9)
    )
    return autoencoder.fit_scale(torch.randn(32, 1, 9, 9))


MAKERS = {
    "points": lambda: ((2,), MLP((2,), width=128), None),
    "labels": lambda: ((2,), MLP((2,), width=16, num_classes=3), GUIDED),
    "residual": lambda: ((1, 8, 8), ResidualMLP((1, 8, 8), 16, 1, num_classes=3), GUIDED),
    "dit": lambda: ((1, 8, 8), DiT((1, 8, 8), 4, 16, 1, 2, num_classes=3), GUIDED),
    "unet": lambda: ((1, 8, 8), unet2d((1, 8, 8), 3, width=8, time_scale=10), GUIDED),
    "plain unet": lambda: ((1, 8, 8), unet2d((1, 8, 8), width=8), None),
    "diffusers dit": lambda: ((1, 8, 8), _diffusers_dit(), GUIDED),
    "latents": lambda: ((4, 5, 5), unet2d((4, 5, 5), 3, width=8), GUIDED),
    "means": lambda: ((2,), MLP((2,), width=16, num_classes=3, num_times=2), GUIDED),
}


def flow(kind):
    """A flow of a kind, whose samples depend on noise, labels and every step."""
    torch.manual_seed(0)
    shape, net, drop_cond = MAKERS[kind]()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    method = MeanFlowMatching if kind == "means" else ConditionalFlowMatching
    autoencoder = _latents() if kind == "latents" else Identity()
    module = method(net, autoencoder=autoencoder, drop_cond=drop_cond).eval()
    module.sample_shape = shape
    return module
