"""Latents from a cache that `flowkit encode` wrote."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.data.arrays import Index, positions
from flowkit.data.cache import Columns, Shards, read_index
from flowkit.data.splits import SplitData
from flowkit.data.stream import Stream, keyed_generator, stream_positions
from flowkit.sampling import seeded_noise
from flowkit.types import Batch, Cond

# Apart from the seeds of samples, so that no latent shares its noise with one; in the 32 bits that
# count, see `flowkit.sampling.seeded_noise`.
_FIRST_SEED = 2**31


@dataclass(frozen=True, eq=False)
class LatentSplit:
    """A split of a cache; its latents are drawn from their posteriors, row by row the same.

    Args:
        shards: Where the posteriors are.
        shape: ``(c, h, w)`` of a latent.
        encoded_by: Hash of the autoencoder.
        images: SHA-256 of the images.
    """

    shards: Shards
    shape: tuple[int, ...]
    encoded_by: str
    images: str

    def __len__(self) -> int:
        """Return the number of entries; mirror images are entries of their own."""
        return len(self.shards)

    def __getitem__(self, index: Index) -> Batch:
        """Draw the latents at some positions, the same at every call."""
        rows = positions(index, len(self))
        batch = self.draw(rows, seeded_noise(self.shape, rows + _FIRST_SEED))
        return cast(Batch, {**batch, "encoded_by": self.encoded_by})

    def draw(self, rows: Tensor, noise: Tensor) -> Batch:
        """Return ``mean + std · noise`` of rows ``(n,)``, with their conditions."""
        columns = self.shards.read(rows)
        x1 = columns["mean"].addcmul_(columns["std"], noise)
        cond = _cond(columns)
        return Batch(x1=x1) if cond is None else Batch(x1=x1, cond=cond)

    def fingerprint(self) -> str:
        """Return the SHA-256 of autoencoder, images and number of entries."""
        key = json.dumps([self.encoded_by, self.images, len(self)])
        return hashlib.sha256(key.encode()).hexdigest()


def _cond(columns: Columns) -> Cond:
    named = {k.removeprefix("cond."): v for k, v in columns.items() if k.startswith("cond.")}
    return named or columns.get("cond")


@dataclass(frozen=True, eq=False)
class LatentStream(Stream):
    """A stream whose latents are drawn anew from their posteriors at every step.

    The noise of a step is that of all ranks together, like the samples: a function of the seed,
    the step and the product of ranks and batch size alone.
    """

    def samples(self, step: int) -> Batch:
        """Return this rank's latents of a step."""
        split, start = cast(LatentSplit, self.split), step * self.total
        rows = stream_positions(len(split), self.seed, start, start + self.total)
        generator = keyed_generator(self.seed, "posterior", step)
        noise = torch.randn(self.total, *split.shape, generator=generator)
        return split.draw(rows[self.share], noise[self.share])

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step, which says whose latents it holds."""
        encoded_by = cast(LatentSplit, self.split).encoded_by
        return cast(Batch, {**super().__getitem__(step), "encoded_by": encoded_by})


class Latents(SplitData):
    """Latents of images that `flowkit encode` put into a folder: ``x1 (B, c, h, w)``, ``cond``.

    Shards are mapped into memory, not loaded. Batches hold the autoencoder's hash as
    ``encoded_by``, by which a module that has another refuses them. In the training stream a
    latent is a new draw from its posterior each time; elsewhere a row is always the same draw.

    Args:
        root: The folder.
        batch_size: Samples per process and step.
        seed: The seed of the training stream.
        num_workers: Processes that read ahead.
        coupling: Pairs latents with noise in the loader; see ``SplitData``.

    Attributes:
        autoencoder: Hash and config of the autoencoder, see `flowkit.autoencoders.identity`.
        image_shape: ``(C, H, W)`` of the images.
        source: The configuration of the images' own data module, or None; evaluations measure
            against its images.

    Raises:
        FileNotFoundError: On ``setup``, if the cache is not finished or shards are missing.
        ValueError: On ``setup``, if shards are damaged or of another encoding.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Any = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, coupling=coupling
        )
        self.root = Path(root)

    def load(self) -> Mapping[str, LatentSplit]:
        """Read the index and check the shards."""
        index = read_index(self.root)
        self.autoencoder, self.source = index["autoencoder"], index["source"]
        self.image_shape = tuple(index["image_shape"])
        self.num_classes, self.class_names = index["num_classes"], index["class_names"]
        return {
            name: LatentSplit(
                Shards.find(self.root, split["shards"]),
                tuple(index["latent_shape"]),
                self.autoencoder["hash"],
                split["images"],
            )
            for name, split in index["splits"].items()
        }

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return LatentStream(
            self.train, self.batch_size, self.seed, rank, world_size, coupling=self.coupling
        )
