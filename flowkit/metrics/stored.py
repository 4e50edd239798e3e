"""Features stored on disk, so that they are computed only once."""

import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from flowkit.metrics.features import Features, distance_name, family, outputs_of
from flowkit.metrics.pictures import to_uint8
from flowkit.provenance import cached, tensor_hash


class StoredFeatures:
    """Features with a cache in a folder.

    The name of a file is a hash of the feature network and of the 8-bit images.

    Args:
        features: The feature network, for images whose features are not stored.
        folder: The folder of the cache. It is created if it does not exist. If it cannot be
            written, nothing is stored, with a warning.

    >>> import tempfile, torch
    >>> from flowkit.metrics import Pixels
    >>> features = StoredFeatures(Pixels(), tempfile.mkdtemp())
    >>> features(torch.zeros(2, 1, 4, 4)).shape, len(list(features.folder.iterdir()))
    (torch.Size([2, 16]), 1)
    """

    def __init__(self, features: Features, folder: str | Path) -> None:
        self.features, self.folder = features, Path(folder)
        self.name, self.hash = features.name, features.hash
        self.distance_name, self.family = distance_name(features), family(features)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return all outputs of the network for images ``(B, C, H, W)`` in [-1, 1]."""
        content = f"outputs of {self.name} {self.hash} {tensor_hash(to_uint8(images))}"
        key = hashlib.sha256(content.encode()).hexdigest()
        file = self.folder / f"features-{key[:32]}.safetensors"
        found = cached(
            file,
            load_file,
            lambda: {k: x.contiguous() for k, x in outputs_of(self.features, images).items()},
            lambda path, found: save_file(found, path),
        )
        return {name: x.to(images.device) for name, x in found.items()}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        return self.outputs(images)["features"]
