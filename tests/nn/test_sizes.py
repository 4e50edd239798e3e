"""Sizes of networks are integers: 2.0 would fail later, in words of torch, or not at all."""

import pytest

from flowkit.nn import MLP, DiT, Patches, ResidualMLP, SemanticMap, SequenceDiT, unet2d

SEQUENCE = {"width": 8, "depth": 1, "heads": 2, "kernel": 3}
CONDITIONS = {"frames": 2, "vector": 2, "tokens": 2, "num_times": 2}
DIT = {"width": 8, "depth": 1, "heads": 2, "patch": 2, "num_classes": 3, "in_channels": 2}
PERCEPTRON = {"width": 8, "depth": 1, "num_times": 2}
NETWORKS = [
    (SequenceDiT, {"shape": (2, 6)}, {**SEQUENCE, **CONDITIONS}),
    (DiT, {"shape": (1, 4, 4)}, {**DIT, "num_times": 2}),
    (MLP, {"shape": (2,)}, {**PERCEPTRON, "num_classes": 3}),
    (MLP, {"shape": (2,)}, {**PERCEPTRON, "cond_dim": 3}),
    (ResidualMLP, {"shape": (2,)}, {**PERCEPTRON, "num_classes": 3}),
    (unet2d, {"shape": (1, 4, 4)}, {"width": 8, "layers": 1, "num_classes": 3}),
    (SemanticMap, {"net": MLP((2,))}, {"num_classes": 3, "factor": 2, "channels": 4}),
    (Patches, {"net": MLP((2,))}, {"size": 2}),
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
