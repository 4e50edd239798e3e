"""Feature networks for the options in ``conf/metric`` and ``conf/perceptual``."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from flowkit.data import SplitData
from flowkit.metrics import (
    ConvClassifier,
    Features,
    Pixels,
    inception,
    train_classifier,
)
from flowkit.modules.autoencoding import FeatureError
from flowkit.modules.flow import labels_of
from flowkit.provenance import cache_folder
from flowkit.runs.processes import say


def features_for(data: SplitData, seed: int) -> Features:
    """Return `classifier_features`, or `pixel_features` for data without class labels."""
    if labels_of(data.train[:1], data.num_classes) is not None:
        return classifier_features(data, seed)
    say("features  pixels, since the data have no class labels")
    return pixel_features(data)


def classifier_features(data: SplitData, seed: int) -> ConvClassifier:
    """Return a classifier of the data's classes, trained once and kept in the user's cache.

    Raises:
        ValueError: If the data have no class labels.
    """
    train = data.train
    if data.num_classes is None or labels_of(train[:1], data.num_classes) is None:
        raise ValueError(
            "metric must be pixels or inception for data without class labels, got classifier"
        )
    cache = cache_folder()
    file = cache / f"classifier-{data.fingerprint('train')[:16]}-{seed}.safetensors"
    if file.is_file():
        return ConvClassifier.load(file)
    say(f"features  training a classifier on {len(train):,} images")
    batch = train[:]
    epochs = min(20, max(3, 30_000 // len(train)))
    name = f"conv-classifier-{type(data).__name__.lower()}"
    labels = cast(Tensor, batch.get("cond"))
    net = train_classifier(
        batch["x1"], labels, data.num_classes, seed=seed, epochs=epochs, name=name
    )
    cache.mkdir(parents=True, exist_ok=True)
    net.save(file)
    return net


def pixel_features(data: SplitData) -> Pixels:
    """Return flattened pixels as features."""
    return Pixels()


def inception_features(data: SplitData, weights: str, device: str = "cpu") -> Features:
    """Return the Inception features of FID, from a file of weights."""
    return inception(weights, device)


def classifier_error(
    data: SplitData, metric: Callable[[SplitData], ConvClassifier]
) -> FeatureError:
    """Return a perceptual term with the layers of the classifier of ``flowkit evaluate``."""
    return FeatureError(metric(data).trunk)
