"""Demonstrations of robots: episodes of observations and actions, as chunks."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import check_at_least, check_choice
from flowkit.data.arrays import Index, positions
from flowkit.data.episode_files import Keys, Recorded, read_episodes
from flowkit.data.files import content_splits
from flowkit.data.splits import SplitData
from flowkit.policies import ActionNormalizer, windows
from flowkit.provenance import content_hash
from flowkit.types import Batch

PREDICT = ("action", "future")


@dataclass(frozen=True, eq=False)
class Chunks:
    """Split of chunks: one for each step of its episodes, see `flowkit.policies.chunks`.

    Args:
        steps: ``obs (S, O)``, ``action (S, D)`` and possibly ``image (S, C, H, W)`` of all steps.
        ends: For each step, the position behind the last step of its episode.
        horizon: Actions of a chunk.
        future: Whether conditions hold the observation after the chunk.
        predict: ``"action"``, or ``"future"`` for batches whose ``x1`` is that observation.

    >>> steps = {"obs": torch.zeros(3, 2), "action": torch.ones(3, 1)}
    >>> Chunks(steps, torch.tensor([3, 3, 3]), horizon=2)[[2]]["mask"].tolist()
    [[[1.0, 0.0]]]
    """

    steps: Mapping[str, Tensor]
    ends: Tensor
    horizon: int
    future: bool = False
    predict: str = "action"

    def __len__(self) -> int:
        """Return the number of chunks, which is that of the steps."""
        return len(self.ends)

    def __getitem__(self, index: Index) -> Batch:
        """Return the chunks at the positions of an index as one batch."""
        rows = positions(index, len(self))
        if self.predict == "action":
            return windows(self.steps, self.ends, rows, self.horizon, self.future)
        later = torch.minimum(rows + self.horizon, self.ends[rows] - 1)
        obs = self.steps["obs"]
        return cast(Batch, {"x1": obs[later], "cond": {"vector": obs[rows]}})

    def fingerprint(self) -> str:
        """Return the SHA-256 of all steps and of the form of a chunk."""
        form = f"{self.horizon} {self.future} {self.predict}"
        return content_hash({**self.steps, "ends": self.ends}, form)


class Demonstrations(SplitData):
    """Chunks of demonstrations, from a file or folder of one of these formats:

    - **npz** with ``obs (S, O)``, ``action (S, D)`` and ``episode_ends (E,)``, as
      ``flowkit demonstrate`` writes it;
    - **HDF5 of robomimic**: ``data/demo_0/obs/<key>`` and ``data/demo_0/actions``;
    - **LeRobot** v2.1 and v3.0: a folder with ``meta/info.json`` and parquet files;
    - **JSONL of ViPRA**: a step a line with ``raw_action``, ``proprio`` and ``image``.

    Batches hold normalized chunks ``x1 (B, D, H)``, their ``mask`` and raw observations as
    ``cond``, see `flowkit.policies.chunks`. Episodes are divided into splits by a hash of their
    content; the statistics are those of the training split alone.

    Args:
        root: The file or folder.
        horizon: Actions of a chunk.
        normalize: Kind of the statistics of actions, ``"std"`` or ``"quantile"``.
        episodes: Number of training episodes; None takes all.
        obs: Names of the parts of an observation; None takes those of the format.
        action: Name of the action; None takes that of the format.
        camera: Name of the images; None reads none.
        image_size: Side of an image in pixels.
        future: Whether conditions hold the observation after the chunk.
        predict: ``"action"``, or ``"future"`` to learn latent actions from episodes that may have
            no actions: ``x1 (B, O)`` is then the observation after the chunk.
        val_fraction: The share of episodes of the validation split.
        test_fraction: The share of episodes of the test split.
        split_seed: The seed of the splits.
        batch_size: Chunks per process and training step.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance.

    Attributes:
        actions: Statistics of actions; set by ``setup``.
        observations: Statistics of observations; set by ``setup``.

    Raises:
        ValueError: If a number is out of range; on ``setup``, if an episode holds NaN, has no steps
            or other sizes than the others, or a camera or a video is missing or damaged. The error
            names the episode.
    """

    recipe = "rollout"
    actions: ActionNormalizer | None = None
    observations: ActionNormalizer

    def __init__(
        self,
        root: str | Path,
        horizon: int = 14,
        normalize: str = "std",
        episodes: int | None = None,
        obs: Sequence[str] | None = None,
        action: str | None = None,
        camera: str | None = None,
        image_size: int = 84,
        future: bool = False,
        predict: str = "action",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        check_at_least(horizon, 1, "horizon")
        check_at_least(image_size, 1, "image_size")
        check_at_least(1 if episodes is None else episodes, 1, "episodes")
        check_choice(predict, PREDICT, "predict")
        self.root, self.horizon, self.normalize = Path(root), horizon, normalize
        self.keys, self.image_size = Keys(obs, action, camera), image_size
        self.episodes, self.future, self.predict = episodes, future, predict
        self.fractions, self.split_seed = {"val": val_fraction, "test": test_fraction}, split_seed

    def load(self) -> Mapping[str, Chunks]:
        """Read the episodes, check them, divide them, and fit the statistics."""
        found = [self._checked(episode) for episode in read_episodes(self.root, self.keys)]
        _check_alike(found)
        keys = [hashlib.sha256(episode["obs"].numpy().data).hexdigest() for _, episode in found]
        parts = content_splits(keys, self.fractions, self.split_seed, what="episodes")
        parts["train"] = parts["train"][: self.episodes]
        splits = {name: [found[int(number)][1] for number in part] for name, part in parts.items()}
        train = {key: torch.cat([e[key] for e in splits["train"]]) for key in found[0][1]}
        notes = [", ".join(f"{len(part)} {name}" for name, part in splits.items()) + " episodes"]
        self.observations = ActionNormalizer.fit(train["obs"], outside="keep", may_be_constant=True)
        if still := int((train["obs"] == train["obs"][:1]).all(0).sum()):
            notes.append(f"{still} of {train['obs'].shape[1]} numbers of an observation constant")
        if self.predict == "action":
            self.actions = ActionNormalizer.fit(train["action"], self.normalize, "keep")
        self.notes = notes
        return {name: self._split(part) for name, part in splits.items()}

    def _split(self, episodes: Sequence[Mapping[str, Tensor]]) -> Chunks:
        """Return the chunks of some episodes, with normalized actions."""
        steps = {key: torch.cat([e[key] for e in episodes]) for key in episodes[0]}
        lengths = torch.tensor([len(e["obs"]) for e in episodes])
        ends = lengths.cumsum(0).repeat_interleave(lengths)
        if self.actions is not None:
            steps["action"] = self.actions.normalize(steps["action"])
        return Chunks(steps, ends, self.horizon, self.future, self.predict)

    def _checked(self, episode: Recorded) -> tuple[str, dict[str, Tensor]]:
        """Return an episode as tensors.

        Raises:
            ValueError: If parts differ in length, are empty or not finite, or there is no action.
        """
        parts: dict[str, Any] = {"obs": episode.obs}
        if self.predict == "action":
            if episode.action is None:
                raise ValueError(
                    f"action of {episode.name} must be given, got none; predict=future learns "
                    "without actions"
                )
            parts["action"] = episode.action
        found = {}
        for name, part in parts.items():
            value = torch.from_numpy(np.array(part, np.float32, order="C"))
            if value.ndim != 2 or not len(value) or len(value) != len(episode.obs):
                raise ValueError(
                    f"{name} of {episode.name} must have shape ({len(episode.obs)}, n) with at "
                    f"least one step, got {tuple(value.shape)}"
                )
            if not bool(value.isfinite().all()):
                step = int((~value.isfinite()).nonzero()[0, 0])
                raise ValueError(
                    f"{name} of {episode.name} must be finite, got NaN or infinity at step {step}"
                )
            found[name] = value
        if episode.images is not None:
            if len(episode.images) != len(episode.obs):
                raise ValueError(
                    f"images of {episode.name} must be {len(episode.obs)}, one a step, got "
                    f"{len(episode.images)}"
                )
            found["image"] = _resized(torch.from_numpy(episode.images.copy()), self.image_size)
        return episode.name, found


def _resized(images: Tensor, size: int) -> Tensor:
    """Return images ``(T, H, W, C)`` or ``(T, C, H, W)`` as bytes ``(T, C, size, size)``."""
    if images.shape[-1] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if tuple(images.shape[2:]) == (size, size):
        return images.contiguous()
    small = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).byte()


def _check_alike(episodes: Sequence[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Require all episodes to have numbers of the same sizes."""
    first_name, first = episodes[0]
    for name, episode in episodes:
        for key, value in episode.items():
            if value.shape[1:] != first[key].shape[1:]:
                raise ValueError(
                    f"{key} of all episodes must have one shape, got {tuple(first[key].shape[1:])} "
                    f"in {first_name} and {tuple(value.shape[1:])} in {name}"
                )
