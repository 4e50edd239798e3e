"""The data module of a run on sounds, built without its splits, and what classifies its sounds."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.audio.pictures import DECIBELS, RANGE
from flowkit.data import Mixtures, Speech
from flowkit.metrics import ConvClassifier, train_classifier
from flowkit.metrics.features import training_settings
from flowkit.modules.checkpoints import build
from flowkit.modules.trust import trusting
from flowkit.provenance import cache_folder, cached
from flowkit.runs.known_data import read_data_record
from flowkit.runs.processes import say
from flowkit.runs.run import Run
from flowkit.runs.splits import check_given

Kind = TypeVar("Kind", Mixtures, Speech)

LEARNED, CHUNK = 3000, 500  # training sounds of a classifier, and those drawn at once
EPOCHS = 6
FEATURES = 16  # few, since a Fréchet distance of a hundred sounds must estimate their covariance
POOLED, FEWEST = 4, 4  # frames that it sees as one, and the fewest of these


def data_of(run: Run, kind: type[Kind], words: str) -> Kind:
    """Build the data module of a run for its map of states and its encoder.

    Args:
        run: The run.
        kind: The class that the data must be of.
        words: What the run must be trained on, for the error.

    Raises:
        TypeError: If the data are of another class.
        ValueError: If spectrogram or encoder are not those of the training, or the encoder of a
            shared model is not given.
    """
    node = run.config["data"]
    with trusting(run.trust):
        data: Any = build(node, "data")
    if not isinstance(data, kind):
        raise TypeError(f"run must be trained on {words}, got {type(data).__name__}")
    check_given({name: part for name, part in node.items() if isinstance(part, Mapping)})
    record = read_data_record(run.folder)
    known = {} if record is None else record["preprocessing"]
    for name, value in data.hashes().items():
        if known.get(name, value) != value:
            raise ValueError(
                f"data.{name} must be that of the run's training, hash {known[name]}, got {value}"
            )
    return data


def classifier_of(data: Mixtures) -> ConvClassifier:
    """Return a classifier of the kinds of single sounds, trained once and kept in the user's cache.

    Args:
        data: Data with classes, set up.
    """
    split, classes = replace(data.listed("train"), size=LEARNED), data.classes or ()
    own: dict[str, Any] = {
        "epochs": EPOCHS,
        "num_features": FEATURES,
        "name": f"conv-classifier-{type(data).__name__.lower()}",
    }

    def trained() -> ConvClassifier:
        say(f"features  training a classifier of {len(classes)} kinds on {LEARNED:,} sounds")
        parts = [split.sounds(slice(k, min(k + CHUNK, LEARNED))) for k in range(0, LEARNED, CHUNK)]
        images = torch.cat([as_images(data.states.mel(part.target)) for part in parts])
        kinds = torch.cat([part.kinds for part in parts])
        return train_classifier(images, kinds, len(classes), **own)

    shape = as_images(torch.zeros(1, data.states.mel.n_mels, split.frames)).shape[1:]
    seen = [split.fingerprint(), *classes, POOLED, FEWEST, RANGE, *shape]
    key = hashlib.sha256(json.dumps([seen, training_settings(**own)]).encode()).hexdigest()[:16]
    file = cache_folder() / f"classifier-{key}-sounds.safetensors"
    return cached(file, ConvClassifier.load, trained, lambda path, net: net.save(path))


def as_images(log_mels: Tensor) -> Tensor:
    """Return log-mels ``(B, n_mels, T)`` as images ``(B, 1, n_mels, max(4, T // 4))`` in [-1, 1].

    1 is the loudest value of each sound, so its level does not matter, and -1 is 80 dB below.

    >>> as_images(torch.tensor([0.0, -10, -4.605, -10]).repeat_interleave(4)[None, None])
    tensor([[[[ 1.0000, -1.0000,  0.0000, -1.0000]]]])
    """
    below = DECIBELS * (log_mels - log_mels.amax((1, 2), keepdim=True))
    images = 1 + 2 * (below / RANGE).clamp_min(-1)
    size = log_mels.shape[1], max(FEWEST, log_mels.shape[2] // POOLED)
    return F.adaptive_avg_pool2d(images[:, None], size)
