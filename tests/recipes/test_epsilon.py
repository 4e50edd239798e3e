"""`flowkit epsilon`: its options take effect, and its seed fixes its result."""

import json

import pytest
import torch

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.nn import autoencoder_kl
from flowkit.recipes.epsilon import epsilon

SIZES = []


class Counting(Identity):
    """Keeps the sizes of the batches that it encodes."""

    def encode(self, images):
        SIZES.append(len(images))
        return images


def drawing():
    """An autoencoder that draws its latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KLAutoencoder(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)))


def choose(configure, folder, made_by, *options):
    cfg = configure(
        "epsilon",
        "data=digits",
        "num_samples=50",
        f"autoencoder._target_=tests.recipes.test_epsilon.{made_by}",
        f"out={folder}",
        *options,
    )
    found = epsilon(cfg)
    assert json.loads((folder / "epsilon.json").read_text())["epsilon"] == found.epsilon
    return found.epsilon


def test_the_autoencoder_gets_batches_of_the_stated_size(configure, tmp_path):
    SIZES.clear()
    parts = choose(configure, tmp_path, "Counting", "batch_size=16")
    assert SIZES == [16, 16, 16, 2]
    assert parts == choose(configure, tmp_path, "Counting", "batch_size=256")
    assert SIZES[4:] == [50]


@pytest.mark.slow
def test_the_seed_fixes_latents_too(configure, tmp_path):
    first, again = (choose(configure, tmp_path, "drawing", "target=ess") for _ in range(2))
    assert first == again
    assert first != choose(configure, tmp_path, "drawing", "target=ess", "seed=1")
