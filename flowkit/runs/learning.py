"""Lessons before a training: what networks take from their data or from another run."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.adapters.predictions import network_of
from flowkit.audio import VoiceVelocity
from flowkit.data import Speech
from flowkit.modules.checkpoints import CONFIG, read_config
from flowkit.modules.latent_actions import load_latents
from flowkit.modules.trust import check
from flowkit.nn.embed import SidesError
from flowkit.policies import LatentActionModel, PolicyVelocity
from flowkit.runs.resuming import folder_of

NO_PREDICTION = (
    "prediction must be velocity for a policy, whose rollouts take the network's velocity"
)


def follow_latents(cfg: DictConfig, checkpoint: Path | None = None) -> str | None:
    """Give a policy the network of latent actions of the run in ``model.latents``.

    ``module.velocity`` then holds this network, and the checkpoints hold its weights, so the run of
    the policy needs the other run no more, also to be resumed. ``model.latents`` stays the place.

    Args:
        cfg: The configuration, which is changed.
        checkpoint: The checkpoint that the training continues.

    Returns:
        The run whose weights the network takes; None without one, and for a checkpoint.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If it is a run of something else, of other steps, the data do not give what the
            codes are inferred from, or the network is to predict noise or data.
    """
    place = OmegaConf.select(cfg, "model.latents")
    followed = OmegaConf.is_dict(OmegaConf.select(cfg, "module.velocity.latents"))
    if not isinstance(place, str) or (followed and checkpoint is not None):
        return None
    if cfg.get("prediction", "velocity") != "velocity":
        raise ValueError(f"{NO_PREDICTION}, got {cfg.prediction}")
    node, horizon = _latents_in(place, checkpoint)
    if not isinstance(node, dict):
        raise ValueError(
            f"model.latents must be a run of latent actions (module=latent_actions), got {place}"
        )
    check(node, f"module.model of {place}")
    if not cfg.data.get("future"):
        raise ValueError(
            "data.future must be true to train on latent actions, got false; the codes are "
            "inferred from the observation after a chunk"
        )
    if cfg.data.horizon != horizon:
        raise ValueError(
            f"data.horizon must be that of model.latents, {horizon}, got {cfg.data.horizon}"
        )
    cfg.module.velocity = copy.deepcopy(cfg.model)  # with its references
    cfg.module.velocity.latents, cfg.module.velocity.net.tokens = node, node["width"]
    return place if checkpoint is None else None


def _latents_in(place: str, checkpoint: Path | None) -> tuple[Any, Any]:
    """Return the network of latent actions and its horizon, as the run of a checkpoint has them.

    Without a checkpoint, or for one outside of a run, they are those of the run at ``place``.
    """
    if checkpoint is not None and (folder_of(checkpoint) / CONFIG).is_file():
        config = read_config(folder_of(checkpoint))
        node = ((config.get("module") or {}).get("velocity") or {}).get("latents")
    else:
        config = read_config(place, name="model.latents")
        node = (config.get("module") or {}).get("model")
    return node, (config.get("data") or {}).get("horizon")


@contextmanager
def sides_told_by_data(data: DictConfig) -> Iterator[None]:
    """Tell errors about sides of a state by the data's option that decides on them, if one does.

    Raises:
        ValueError: In place of such an error, also of one in the building of a network.
    """
    try:
        yield
    except Exception as error:
        sides = error if isinstance(error, SidesError) else error.__cause__
        told = _told(data, sides) if isinstance(sides, SidesError) else None
        if told is None:
            raise
        raise ValueError(told) from error


def _told(data: DictConfig, error: SidesError) -> str | None:
    """Return the message in terms of the data's option; None if no option decides on the sides."""
    side, unit = error.shape[2], error.multiple
    name = "frames" if "frames" in data else "image_size"
    value = data.get(name)
    if not isinstance(value, int) or value % side or not side % unit:  # another side, or no such
        return None
    unit *= value // side  # of the data, whose states an autoencoder may have made smaller
    below = value // unit * unit
    fits = " or ".join(f"data.{name}={size}" for size in (below, below + unit) if size)
    return f"data.{name} must be a multiple of {unit} for this network, got {value}; give {fits}"


def teach(network: Any, data: Any, latents: str | None = None) -> None:
    """Give a policy, latent actions or a converter of voices what it knows before its training.

    Args:
        network: Any network; others than these stay as they are.
        data: The data, set up. Their statistics become part of the network.
        latents: Run whose weights the latent actions of a policy take.

    Raises:
        TypeError: If the encoder of pictures of a policy is not called as one.
        ValueError: If the data are not those of such a network, or a policy predicts noise or data.
    """
    if isinstance(network, LatentActionModel):
        if getattr(data, "predict", None) != "future":
            raise ValueError(
                "data must be demonstrations with data.predict=future for latent actions, got "
                f"{type(data).__name__}"
            )
        network.observations.take(*data.observations.buffers())
    elif isinstance(network, PolicyVelocity):
        actions = getattr(data, "actions", None)
        if actions is None:
            raise ValueError(
                f"data must be demonstrations with actions for a policy, got {type(data).__name__}"
            )
        network.take(actions, data.observations)
        _check_pictures(network, data.train[:1]["cond"].get("image"))
        if latents is not None and network.latents is not None:
            network.latents.load_state_dict(load_latents(latents).state_dict())
    elif isinstance(inner := network_of(network), PolicyVelocity):
        raise ValueError(f"{NO_PREDICTION}, got {type(network).__name__}")
    elif isinstance(inner, VoiceVelocity):
        if not isinstance(data, Speech):
            raise ValueError(f"data must be speech for a voice, got {type(data).__name__}")
        inner.take(data.recognizer)


def _check_pictures(network: PolicyVelocity, image: Tensor | None) -> None:
    """Require a policy that sees the pictures ``(B, C, W, W)`` of the data, or none as they do."""
    encoder, size = network.encoder, network.image_size
    if (encoder is None) != (image is None):
        raise ValueError(
            "model.encoder must be given with data.camera (model=policy_images), and only then, "
            f"got {type(encoder).__name__} for data {'without' if image is None else 'with'} images"
        )
    if encoder is None or image is None:
        return
    try:
        inspect.signature(encoder.forward).bind("image", "obs")
    except TypeError as error:
        raise TypeError(
            f"model.encoder must be callable as encoder(image, obs), got {type(encoder).__name__}: "
            f"{error}"
        ) from error
    channels = image.shape[1]
    own = {"image_size": (image.shape[2], size)}
    own["channels"] = (channels, getattr(encoder, "channels", channels))
    for name, (shown, seen) in own.items():
        if shown != seen:
            raise ValueError(
                f"model.encoder.{name} must be {shown}, that of the data's images, got {seen}"
            )
