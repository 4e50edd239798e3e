"""What a cache of latents saves."""

import statistics
import time

import pytest
import torch

from flowkit.autoencoders import KLAutoencoder
from flowkit.data import Latents
from flowkit.data.arrays import Arrays
from flowkit.data.cache import write_cache
from flowkit.data.splits import SplitData
from flowkit.modules import LatentFlowMatching
from flowkit.nn import DiT, autoencoder_kl, unet2d

pytestmark = pytest.mark.benchmark

BATCH, ROUNDS = 32, 7


class Noise(SplitData):
    """Images of no meaning."""

    def __init__(self, shape, count):
        super().__init__(batch_size=BATCH, seed=0, num_workers=0)
        self.image_shape, self.count = shape, count

    def load(self):
        def split(count):
            shape = (count, *self.image_shape)
            return Arrays({"x1": torch.randint(0, 256, shape, dtype=torch.uint8)})

        return {"train": split(self.count), "val": split(2), "test": split(2)}


# Levels, blocks and factor of Stable Diffusion's encoder with a small DiT, a quarter as wide and
# on images of a quarter of the side; and the networks of the experiment fashion_mnist_latent. A
# step without encoding is (encoder + flow) / flow faster, so that a cache gains little where the
# encoder is the lighter of the two. The last number is the least gain asked for.
SETTINGS = {
    "64x64 by 8, DiT": ((3, 64, 64), 32, (1, 2, 4, 4), 2, lambda s: DiT(s, 2, 192, 6, 3), 3.0),
    "28x28 by 4, UNet": ((1, 28, 28), 16, (1, 2, 2), 1, lambda s: unet2d(s, width=64), 1.0),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_from_a_cache_against_encoding_on_the_fly(benchmark, tmp_path, setting):
    """In processor time of one thread, which other work on the machine changes little."""
    shape, width, multipliers, layers, network, least = SETTINGS[setting]
    torch.manual_seed(0)
    autoencoder = KLAutoencoder(autoencoder_kl(shape, width, multipliers, layers=layers))
    images = Noise(shape, 4 * BATCH)
    images.setup()
    write_cache(images, autoencoder, tmp_path, batch_size=BATCH)
    latents = Latents(tmp_path, BATCH)
    latents.setup()
    module = LatentFlowMatching(network(latents.shape), autoencoder)
    optimizer = module.configure_optimizers()
    streams = {"cache": latents.stream(), "on the fly": images.stream()}

    def step(name, number):
        loss = module.loss(streams[name][number])["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds = {name: [] for name in streams}
    reading = []
    for number in range(ROUNDS + 1):
        for name in streams:
            start = time.process_time()
            step(name, number)
            if number:  # the first is warming up
                seconds[name].append(time.process_time() - start)
        start = time.process_time()
        streams["cache"][number]
        reading.append(time.process_time() - start)
    speed = {name: BATCH / statistics.median(values) for name, values in seconds.items()}
    ratio = speed["cache"] / speed["on the fly"]
    print(
        f"\n{setting}: {speed['cache']:.0f} images/s from the cache (reading a batch takes "
        f"{1e3 * statistics.median(reading):.2f} ms), {speed['on the fly']:.0f} encoding on the "
        f"fly, {ratio:.1f} times faster"
    )
    benchmark.extra_info.update(times_faster=ratio, **speed)
    benchmark.pedantic(step, args=("cache", 0), rounds=1)
    assert ratio >= least
