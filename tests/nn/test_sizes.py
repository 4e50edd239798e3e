"""Sizes of networks are integers: 2.0 would fail later, in words of torch, or not at all."""

import pytest
from torch import nn

from flowkit.audio import PhoneRecognizer
from flowkit.blockwise import BlockwiseDiT, BlockwiseMLP, MaskedEncoder, copies
from flowkit.metrics import ConvClassifier
from flowkit.nn import (
    MLP,
    DiT,
    Patches,
    ResidualMLP,
    SemanticMap,
    SequenceDiT,
    autoencoder_kl,
    unet2d,
)
from flowkit.nn.embed import TimeLabelEmbedding
from flowkit.nn.lora import add_lora
from flowkit.policies import ActionNormalizer, ImageEncoder, LatentActionModel
from flowkit.symmetrical import NoisePath

SEQUENCE = {"width": 8, "depth": 1, "heads": 2, "kernel": 3}
CONDITIONS = {"frames": 2, "vector": 2, "tokens": 2, "num_times": 2}
DIT = {"width": 8, "depth": 1, "heads": 2, "patch": 2, "num_classes": 3}
PERCEPTRON = {"width": 8, "depth": 1, "num_times": 2}
BLOCKS = {"trunk_depth": 1, "stack_depth": 1, "residual_depth": 1, "num_classes": 3}
TRANSFORMER = {"patch": 2, "width": 8, "heads": 2, "stack_width": 8, "rank": 2}
ACTIONS = {"obs_size": 2, "num_codes": 4, "tokens": 2, "width": 4, "hidden": 8}
ENCODER = {"obs_size": 2, "image_size": 8, "channels": 3, "size": 4, "width": 4}
VAE = {"width": 8, "latent_channels": 2, "layers": 1}
NETWORKS = [
    (SequenceDiT, {"shape": (2, 6)}, {**SEQUENCE, **CONDITIONS}),
    (DiT, {"shape": (1, 4, 4)}, {**DIT, "in_channels": 2, "num_times": 2}),
    (MLP, {"shape": (2,)}, {**PERCEPTRON, "num_classes": 3}),
    (MLP, {"shape": (2,)}, {**PERCEPTRON, "cond_dim": 3}),
    (ResidualMLP, {"shape": (2,)}, {**PERCEPTRON, "num_classes": 3}),
    (unet2d, {"shape": (1, 4, 4)}, {"width": 8, "layers": 1, "num_classes": 3}),
    (autoencoder_kl, {"shape": (1, 4, 4), "multipliers": (1,)}, VAE),
    (SemanticMap, {"net": MLP((2,))}, {"num_classes": 3, "factor": 2, "channels": 4}),
    (Patches, {"net": MLP((2,))}, {"size": 2}),
    (TimeLabelEmbedding, {}, {"width": 8, "num_classes": 3, "num_times": 2, "frequencies": 16}),
    (BlockwiseMLP, {"shape": (2,), "edges": 2}, {**BLOCKS, "width": 8}),
    (BlockwiseDiT, {"shape": (1, 4, 4), "edges": 2}, {**BLOCKS, **TRANSFORMER}),
    (copies, {"velocity": MLP((2,))}, {"num_segments": 2}),
    (MaskedEncoder, {"shape": (1, 4, 4)}, {"patch": 2, "width": 8, "depth": 1, "heads": 2}),
    (LatentActionModel, {}, ACTIONS),
    (ImageEncoder, {}, ENCODER),
    (ActionNormalizer, {}, {"size": 2}),
    (PhoneRecognizer, {}, {"n_mels": 4, "width": 8, "codes": 4}),
    (ConvClassifier, {"shape": (1, 8, 8)}, {"num_classes": 3, "num_features": 4, "width": 8}),
    (NoisePath, {"net": MLP((2,))}, {"channels": 1}),
    (lambda rank: add_lora(nn.Sequential(nn.Linear(2, 2)), rank), {}, {"rank": 2}),
]


@pytest.mark.parametrize(
    ("build", "given", "sizes", "name"),
    [(*network, name) for network in NETWORKS for name in network[2]],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_sizes_must_be_integers(build, given, sizes, name):
    build(**given, **sizes)
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, got {sizes[name]}\.0$"):
        build(**given, **{**sizes, name: float(sizes[name])})


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (MLP, (2.7,)),
        (SequenceDiT, (2, 2.7)),
        (ResidualMLP, (2.7,)),
        (BlockwiseMLP, (2.7,)),
        (DiT, (1, 4, 2.7)),
        (unet2d, (1, 4, 2.7)),
        (autoencoder_kl, (1, 4, 2.7)),
        (MaskedEncoder, (1, 4, 2.7)),
        (BlockwiseDiT, (1, 4, 2.7)),
        (ConvClassifier, (1, 4, 2.7)),
    ],
)
def test_shapes_hold_integers(build, shape):
    options = {"num_classes": 3} if build is ConvClassifier else {}
    with pytest.raises(TypeError, match=r"^each of shape must be an integer, got 2\.7$"):
        build(shape, **options)


@pytest.mark.parametrize("build", [unet2d, autoencoder_kl])
def test_multipliers_are_integers(build):
    with pytest.raises(TypeError, match=r"^each of multipliers must be an integer, got 1\.5$"):
        build((1, 4, 4), width=8, multipliers=(1.5, 2))
