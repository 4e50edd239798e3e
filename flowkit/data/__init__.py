"""Data sets as Lightning data modules that yield ``flowkit.types.Batch``."""

from flowkit.data.arrays import Arrays
from flowkit.data.cache import write_cache
from flowkit.data.digits import Digits
from flowkit.data.folder import Folder
from flowkit.data.hub import Hub
from flowkit.data.idx import IDX
from flowkit.data.latents import Latents
from flowkit.data.mask_folder import MaskFolder
from flowkit.data.masks import Masks
from flowkit.data.pairs import Pairs
from flowkit.data.shards import Shards
from flowkit.data.splits import SplitData
from flowkit.data.toy import Toy, sample_toy

__all__ = [
    "IDX",
    "Arrays",
    "Digits",
    "Folder",
    "Hub",
    "Latents",
    "MaskFolder",
    "Masks",
    "Pairs",
    "Shards",
    "SplitData",
    "Toy",
    "sample_toy",
    "write_cache",
]
