"""What stands in ``earlier/numbers.json``: numbers of runs, by code that any version can run."""

import torch

from flowkit.autoencoders import KLAutoencoder
from flowkit.modules import load_run


def numbers(folder, network):
    """Velocities ``(3, 4)`` of a run: the first elements of three states, under a condition."""
    generator = torch.Generator().manual_seed(0)
    module, shape = load_run(folder), network["shape"]
    x = torch.randn(3, *shape, generator=generator)
    times = (3,) if network["num_times"] == 1 else (3, network["num_times"])
    t = torch.rand(times, generator=generator)
    cond = None if network["num_classes"] is None else torch.tensor([0, 3, 9])
    if folder.name == "inpainting":
        masked = torch.randn(3, *shape, generator=generator)
        cond = {"masked": masked, "mask": (masked[:, :1] > 0).float(), "label": cond}
    if folder.name == "semantic":
        cond = torch.arange(3 * 64).reshape(3, 8, 8) % 11
    with torch.no_grad():
        return module.velocity(x, t, cond).flatten(1)[:, :4].tolist()


def decoded(folder):
    """Pixels ``(4,)`` of an autoencoder's image."""
    latents = torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)
    return KLAutoencoder.from_pretrained(folder).decode(latents).flatten()[:4].tolist()
