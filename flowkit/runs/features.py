"""Feature networks for the options in ``conf/metric`` and ``conf/perceptual``."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.data import SplitData
from flowkit.metrics import (
    ConvClassifier,
    Features,
    NetworkFeatures,
    Pixels,
    PixelSVC,
    inception,
    pretrained,
    train_classifier,
)
from flowkit.metrics.features import training_settings
from flowkit.modules.autoencoding import FeatureError
from flowkit.modules.flow import labels_of
from flowkit.provenance import cache_folder, cached
from flowkit.runs.processes import say


def features_for(data: SplitData | None, seed: int) -> Features:
    """Return `classifier_features`, or `pixel_features` for data without two classes or more."""
    if _has_classes(data):
        return classifier_features(data, seed)
    if data is None:
        say("features  pixels, since there are no data to train a classifier on")
    else:
        say("features  pixels, since the data do not have several classes")
    return pixel_features(data)


def _has_classes(data: SplitData | None) -> bool:
    """Return True for data with labels of two classes or more; False for files without data."""
    if data is None:
        return False
    several = data.num_classes is not None and data.num_classes > 1
    return several and labels_of(data.train[:1], data.num_classes) is not None


def classifier_features(data: SplitData | None, seed: int) -> ConvClassifier:
    """Return a classifier of the data's classes, trained once and kept in the user's cache.

    Raises:
        ValueError: If the data do not have labels of several classes.
    """
    if data is None:
        raise ValueError(
            "metric must be another than classifier without data to train it on, got classifier; "
            "give data or a run as reference=, or a run as samples="
        )
    if not _has_classes(data):
        raise ValueError(
            "metric must be pixels or inception for data without several classes, got classifier"
        )
    train, classes = data.train, cast(int, data.num_classes)
    own: dict[str, Any] = {
        "seed": seed,
        "epochs": min(20, max(3, 30_000 // len(train))),
        "name": f"conv-classifier-{type(data).__name__.lower()}",
    }

    def trained() -> ConvClassifier:
        say(f"features  training a classifier on {len(train):,} images")
        batch = train[:]
        return train_classifier(batch["x1"], cast(Tensor, batch.get("cond")), classes, **own)

    key = json.dumps([data.fingerprint("train"), classes, training_settings(**own)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = cache_folder() / f"classifier-{digest}-{seed}.safetensors"
    return cached(file, ConvClassifier.load, trained, lambda path, net: net.save(path))


def judge_of(images: Tensor, labels: Tensor | None) -> PixelSVC | None:
    """Return a judge fitted to training images and their classes, or None without classes.

    With images of one class there is no judge, and a printed line says so.
    """
    if labels is None:
        return None
    if len(labels.unique()) < 2:
        say("judge     left out, since the training images have one class only")
        return None
    return PixelSVC(images, labels)


def pixel_features(data: SplitData | None) -> Pixels:
    """Return flattened pixels as features."""
    return Pixels()


def inception_features(
    data: SplitData | None, weights: str | None = None, device: str = "cpu"
) -> Features:
    """Return the Inception features of FID, from a file of weights."""
    return inception(weights, device)


def dinov2_features(
    data: SplitData | None, weights: str | None = None, device: str = "cpu"
) -> Features:
    """Return the features of DINOv2, from a folder of the transformers library."""
    return pretrained("dinov2", weights, device)


def clip_features(
    data: SplitData | None, weights: str | None = None, device: str = "cpu"
) -> Features:
    """Return the features of CLIP, from a folder of the transformers library."""
    return pretrained("clip", weights, device)


def network_features(
    data: SplitData | None, network: DictConfig, name: str | None = None, device: str = "cpu"
) -> Features:
    """Return the features of any network; ``network`` is its node, whose values are hashed.

    Raises:
        TypeError: If ``network`` is a module already.
    """
    if not isinstance(network, DictConfig):
        raise TypeError(
            f"network must be a node of the configuration, got {type(network).__name__}; a file of "
            "metric needs _recursive_: false"
        )
    settings = json.dumps(OmegaConf.to_container(network, resolve=True), sort_keys=True)
    return NetworkFeatures(instantiate(network), name, device, settings)


def classifier_error(
    data: SplitData, metric: Callable[[SplitData], ConvClassifier]
) -> FeatureError:
    """Return a perceptual term with the layers of the classifier of ``flowkit evaluate``."""
    return FeatureError(metric(data).trunk)
