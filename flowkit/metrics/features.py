"""Feature networks: they map images in [-1, 1] to vectors and have a name and a hash."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowkit.checks import as_sizes, check_at_least, check_integer, check_labels
from flowkit.nn.stored import Stored
from flowkit.provenance import tensor_hash

SMOOTHING = 0.1  # of the labels that a classifier is trained on


@runtime_checkable
class Features(Protocol):
    """Protocol of a feature network, from images ``(B, C, H, W)`` in [-1, 1] to ``(B, F)``."""

    @property
    def name(self) -> str:
        """Name in records."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of the weights. Only distances with equal hashes can be compared."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of images ``(B, C, H, W)``."""
        ...


@runtime_checkable
class SeveralOutputs(Features, Protocol):
    """Protocol of a feature network that also has spatial features or logits."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``features (B, F)`` and, if any, ``spatial (B, S)`` and ``logits (B, K)``."""
        ...


def outputs_of(features: Features, images: Tensor) -> dict[str, Tensor]:
    """Return all outputs of a feature network; of most networks the features alone.

    >>> list(outputs_of(Pixels(), torch.zeros(2, 1, 4, 4)))
    ['features']
    """
    if isinstance(features, SeveralOutputs):
        return features.outputs(images)
    return {"features": features(images)}


def distance_name(features: Features) -> str:
    """Return how the Fréchet distance of these features may be called; FID is one network's.

    >>> distance_name(Pixels())
    'Fréchet distance'
    """
    return getattr(features, "distance_name", "Fréchet distance")


def family(features: Features) -> str:
    """Return the family of published networks, ``"inception"`` or ``"clip"``, or ``""``.

    It decides which published metrics are measured.

    >>> family(Pixels())
    ''
    """
    return getattr(features, "family", "")


class Pixels:
    """Pixels or coordinates as features, for points and very small images.

    >>> Pixels()(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 64])
    """

    name = "pixels"
    hash = tensor_hash([])

    def __call__(self, images: Tensor) -> Tensor:
        """Flatten ``(B, *)`` to ``(B, F)``."""
        return images.flatten(1)


class ConvClassifier(Stored):
    """Convolutional classifier; the output of its layer before the last gives the features.

    Layers: two 3×3 convolutions, each with batch norm, SiLU and 2×2 max pooling, then a linear
    layer to ``num_features``, SiLU, and a linear layer to the classes. The features are the input
    of the last SiLU, so no dimension is constant. `train_classifier` trains a classifier.

    Args:
        shape: Shape ``(C, H, W)`` of an image; both sides at least 4.
        num_classes: Number of classes.
        num_features: Dimension of the features.
        width: Channels of the first convolution. The second has ``2 · width``.
        name: Name in records.

    Raises:
        ValueError: If a side of the images is below 4.

    >>> net = ConvClassifier((1, 8, 8), num_classes=10).eval()
    >>> net(torch.zeros(5, 1, 8, 8)).shape, net.logits(torch.zeros(5, 1, 8, 8)).shape
    (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        num_features: int = 64,
        width: int = 32,
        name: str = "conv-classifier",
    ) -> None:
        super().__init__()
        channels, height, side = as_sizes(shape, "shape")
        sizes = {"num_classes": num_classes, "num_features": num_features, "width": width}
        for size_of, size in sizes.items():
            check_integer(size, size_of, 1)
        check_at_least(min(height, side), 4, "shape's sides")
        self.name = name
        self.config = {
            "shape": list(shape),
            **sizes,
            "name": name,
        }
        self.trunk = nn.Sequential(
            *_block(channels, width),
            *_block(width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 4) * (side // 4), num_features),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes))

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        return tensor_hash(self.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, num_features)`` of images ``(B, C, H, W)`` in [-1, 1].

        The features carry no gradient.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 4 or list(images.shape[1:]) != self.config["shape"]:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, self.config['shape']))}), "
                f"got {tuple(images.shape)}"
            )
        return in_batches(self.trunk, images, 500)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        return self.head(self(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.logits(images).softmax(-1)

    def predict(self, images: Tensor) -> Tensor:
        """Return the most probable classes ``(B,)`` of images ``(B, C, H, W)``."""
        return self.logits(images).argmax(-1)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    num_features: int = 64,
    width: int = 32,
    name: str = "conv-classifier",
) -> ConvClassifier:
    """Train a `ConvClassifier` by cross-entropy: AdamW with a one-cycle learning rate.

    The function does not change the global random state. The same seed gives the same weights on
    the same machine with the same number of threads. Held-out accuracy: .992 to .994 on 360 digits
    of scikit-learn (3 seeds, about 1.2 s on 2 CPU cores), .920 on Fashion-MNIST with ``epochs=3``
    (67 s).

    Args:
        images: Training images ``(N, C, H, W)`` in [-1, 1]; their device runs the training.
        labels: Classes ``(N,)`` of the images, in ``[0, num_classes)``.
        num_classes: Number of classes.
        seed: Seeds the initial weights and the order of the images.
        epochs: Passes over the images.
        batch_size: Images per step; an incomplete last batch is left out.
        learning_rate: The largest learning rate of the cycle.
        num_features: Dimension of the features.
        width: Channels of the first convolution.
        name: Name in records, for example that of the data set.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: If a shape is wrong, a label is out of range, or there are fewer than 2 images.
        TypeError: If ``labels`` does not hold integers.

    >>> labels = torch.arange(64) % 2
    >>> images = (labels[:, None, None, None] - 0.5).expand(-1, 1, 8, 8)
    >>> net = train_classifier(images, labels, num_classes=2, epochs=10, batch_size=16)
    >>> bool((net.predict(images) == labels).all())
    True
    """
    if images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(
            f"labels must have shape (N,) beside images (N, C, H, W), got {tuple(labels.shape)} "
            f"beside {tuple(images.shape)}"
        )
    check_labels(labels, num_classes, "labels")
    check_at_least(epochs, 1, "epochs")
    check_at_least(len(images), 2, "the number of images")
    batch_size = min(batch_size, len(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, side = images.shape[1:]
        net = ConvClassifier((channels, height, side), num_classes, num_features, width, name)
    net.to(images.device).train()
    optimizer = torch.optim.AdamW(net.parameters())  # the cycle sets its learning rate
    steps = epochs * (len(images) // batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order[: len(order) - len(order) % batch_size].split(batch_size):
            logits = net.head(net.trunk(images[rows]))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return net.eval()


def training_settings(**given: Any) -> dict[str, Any]:
    """Return all settings of a `train_classifier`, for the key of a cache: given ones and defaults.

    >>> training_settings(epochs=3)["epochs"], training_settings()["batch_size"]
    (3, 128)
    """
    parameters = inspect.signature(train_classifier).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **given, "smoothing": SMOOTHING}


def _block(channels: int, width: int) -> list[nn.Module]:
    """Return the layers of one convolution block, which halves the sides of the images."""
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.MaxPool2d(2),
    ]


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Any], images: Tensor, size: int) -> Any:
    """Apply a function to batches of ``size`` images and concatenate its results by name."""
    found = [function(batch) for batch in images.split(size)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
