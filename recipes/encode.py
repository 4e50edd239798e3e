"""Encode images once, and store their latents for training.

flowkit encode data=fashion_mnist autoencoder.path=runs/autoencoder out=latents/fashion
flowkit encode data=folder data.root=photos data.image_size=256 out=latents/photos \
    autoencoder.path=hub:stabilityai/sd-vae-ft-mse

The same command continues a stopped call. Then train on the latents:

flowkit train data=latents data.root=latents/fashion
"""

import math
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from flowkit.autoencoders import FrozenAutoencoder
from flowkit.checks import usable_device
from flowkit.data.cache import SPLITS, write_cache
from flowkit.runs.known_data import write_data_record
from flowkit.runs.records import recorded
from flowkit.runs.splits import prepared


def encode(cfg: DictConfig) -> dict[str, Any]:
    """Encode as configured; write the cache of latents and return its index."""
    device = usable_device(cfg.device)
    data = prepared(instantiate(cfg.data))
    autoencoder = instantiate(cfg.autoencoder)
    if not isinstance(autoencoder, FrozenAutoencoder):
        raise TypeError(
            f"autoencoder must be a network of diffusers, got {type(autoencoder).__name__}; give "
            "autoencoder.path=<folder or name on the hub>"
        )
    autoencoder.to(device)
    source = recorded(cfg.data)
    total = sum(len(data.split(name)) for name in SPLITS)
    with tqdm(total=total, desc="encoding", unit=" images", disable=None) as bar:
        index = write_cache(
            data, autoencoder, cfg.out, cfg.shard_size, cfg.batch_size, source, bar.update
        )
    write_data_record(Path(cfg.out), data, source)
    counts = {
        name: sum(shard["rows"] for shard in split["shards"])
        for name, split in index["splits"].items()
    }
    size = sum(counts.values()) * math.prod(index["latent_shape"]) * 8 / 2**20
    print(
        f"latents   {Path(cfg.out)}: {', '.join(f'{n:,} {name}' for name, n in counts.items())} "
        f"of shape {tuple(index['latent_shape'])}, {size:,.0f} MiB\n"
        f"encoder   {autoencoder.hash}"
    )
    return index


@hydra.main(version_base="1.3", config_path="../conf", config_name="encode")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit encode``."""
    encode(cfg)


if __name__ == "__main__":
    main()
