"""Latents read from a cache that the command ``flowkit encode`` writes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from flowkit.couplings import Coupling
from flowkit.data.arrays import Index, positions
from flowkit.data.cache import Columns, Shards, read_index
from flowkit.data.splits import SplitData
from flowkit.data.stream import Stream, keyed_generator, stream_positions
from flowkit.sampling import seeded_noise
from flowkit.types import Batch, Cond

# Samples use small seeds; with this offset no latent has the noise of a sample. `seeded_noise` uses
# the lower 32 bits of a seed, so the offset fits into 32 bits.
_FIRST_SEED = 2**31


@dataclass(frozen=True, eq=False)
class LatentSplit:
    """Split of a cache. Each row has its own seed, so a row always gives the same latent.

    Args:
        shards: The shards, which hold the posteriors.
        shape: Shape ``(c, h, w)`` of a latent.
        encoded_by: Hash of the autoencoder.
        images: SHA-256 of the images.
    """

    shards: Shards
    shape: tuple[int, ...]
    encoded_by: str
    images: str

    def __len__(self) -> int:
        """Return the number of rows; a mirror image has a row of its own."""
        return len(self.shards)

    def __getitem__(self, index: Index) -> Batch:
        """Draw the latents at the positions of an index, the same at every call."""
        rows = positions(index, len(self))
        batch = self.draw(rows, seeded_noise(self.shape, rows + _FIRST_SEED))
        return cast(Batch, {**batch, "encoded_by": self.encoded_by})

    def draw(self, rows: Tensor, noise: Tensor) -> Batch:
        """Return the latents ``mean + std · noise`` of rows ``(n,)``, with their conditions."""
        columns = self.shards.read(rows)
        x1 = columns["mean"].addcmul_(columns["std"], noise)
        cond = _cond(columns)
        return Batch(x1=x1) if cond is None else Batch(x1=x1, cond=cond)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the autoencoder, the images and the number of rows."""
        key = json.dumps([self.encoded_by, self.images, len(self)])
        return hashlib.sha256(key.encode()).hexdigest()


def _cond(columns: Columns) -> Cond:
    """Return the condition in the columns of a shard: tensors by name, a tensor or None."""
    named = {k.removeprefix("cond."): v for k, v in columns.items() if k.startswith("cond.")}
    return named or columns.get("cond")


@dataclass(frozen=True, eq=False)
class LatentStream(Stream):
    """Training stream that draws new latents from their posteriors at every step.

    The noise of a step, like its samples, depends on three values only: the seed, the step, and
    the product of batch size and number of ranks.
    """

    def samples(self, step: int) -> Batch:
        """Return this rank's latents of a step."""
        split, start = cast(LatentSplit, self.split), step * self.total
        rows = stream_positions(len(split), self.seed, start, start + self.total)
        generator = keyed_generator(self.seed, "posterior", step)
        noise = torch.randn(self.total, *split.shape, generator=generator)
        return split.draw(rows[self.share], noise[self.share])

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step, with the hash of the autoencoder as ``encoded_by``."""
        encoded_by = cast(LatentSplit, self.split).encoded_by
        return cast(Batch, {**super().__getitem__(step), "encoded_by": encoded_by})


class Latents(SplitData):
    """Latents of images, read from the folder of ``flowkit encode``: ``x1 (B, c, h, w)``, ``cond``.

    A latent is a draw ``mean + std · ε`` from its posterior, with ``ε ~ N(0, I)``. The training
    stream draws a new ``ε`` at every step. The splits use a fixed ``ε`` for each row. Batches hold
    the hash of the autoencoder as ``encoded_by``, and a module with another autoencoder refuses
    them. Files are mapped into memory, so only the rows of a batch are read.

    Args:
        root: The folder of the cache.
        batch_size: Samples per process and training step.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs latents with noise in the workers of the loader; see `SplitData`.

    Attributes:
        autoencoder: Hash and config of the autoencoder, see `flowkit.autoencoders.identity`.
        image_shape: Shape ``(C, H, W)`` of the images.
        source: The configuration of the data module of the images, or None. An evaluation compares
            with these images.

    Raises:
        FileNotFoundError: On ``setup``, if the cache is not finished or a shard is missing.
        ValueError: On ``setup``, if a shard is damaged or holds another encoding.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
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
