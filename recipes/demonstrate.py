"""Record demonstrations of a scripted expert in a simulator.

flowkit demonstrate env=metaworld task=push-v3 num=150 out=runs/push.npz
flowkit demonstrate env=metaworld task=push-v3 num=150 style=both out=runs/push_both.npz
flowkit demonstrate env=obstacle num=100 out=runs/obstacle.npz
MUJOCO_GL=egl flowkit demonstrate env=obstacle task=wide camera=image out=runs/obstacle_images.npz

Then: flowkit train experiment=push_chunks data.root=runs/push.npz

The file holds the successful episodes, one after another: obs, action and episode_ends. With
camera=image it also holds a picture of each step as image, and obs only the robot's own place;
data=demonstrations reads it with data.camera=image. A record with the settings lies beside it. The
same seed gives the same file. Simulators need the extra robots.
"""

import io
import time
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
from omegaconf import DictConfig

from flowkit.policies import demonstrate as record_episodes
from flowkit.policies import environment
from flowkit.provenance import versions, write_atomically
from flowkit.runs.processes import say
from flowkit.runs.records import recording

TAKEN = ("obs", "action", "episode_ends", "file", "allow_pickle")  # arrays, options of savez


def demonstrate(cfg: DictConfig) -> dict[str, np.ndarray]:
    """Record demonstrations as configured; write the ``.npz`` file and its record.

    Returns:
        The arrays of the file.
    """
    file = Path(cfg.out)
    if file.suffix != ".npz":
        raise ValueError(f"out must be a file with the suffix .npz, got {file}")
    camera, image_size = cfg.camera, None if cfg.camera is None else cfg.image_size
    if camera in TAKEN:
        raise ValueError(f"camera must be another name than {', '.join(TAKEN)}, got {camera}")
    env, begun = environment(cfg.env, cfg.task), time.perf_counter()
    arrays, tried = record_episodes(env, cfg.num, cfg.style, cfg.seed, image_size)
    if camera is not None:
        arrays[camera] = arrays.pop("image")
    seconds = time.perf_counter() - begun
    settings = {key: cfg[key] for key in ("env", "task", "num", "style", "camera", "seed")}
    settings["image_size"] = image_size
    steps = int(arrays["episode_ends"][-1])
    record = {
        "demonstrations": {**settings, "tried": tried, "steps": steps},
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    content = io.BytesIO()
    np.savez(content, **cast(Any, arrays))
    files = [file.with_suffix(".json"), file]
    with recording(record, files):
        write_atomically(file, lambda partial: partial.write_bytes(content.getvalue()))
    say(f"episodes  {cfg.num} of {tried} tried succeeded, {steps:,} steps, in {seconds:.1f} s")
    say(f"file      {file}\nrecord    {files[0]}")
    return arrays


@hydra.main(version_base="1.3", config_path="../conf", config_name="demonstrate")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit demonstrate``."""
    demonstrate(cfg)


if __name__ == "__main__":
    main()
