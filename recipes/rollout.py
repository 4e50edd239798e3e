"""Roll out a policy in a simulator, and measure its success.

flowkit rollout run=runs/push env=metaworld task=push-v3
flowkit rollout run=runs/obstacle env=obstacle episodes=50 execute=14
flowkit rollout run=runs/push env=metaworld task=push-v3 sampler.grid=4 prefix=7

The starts of episodes follow from the seed, so two runs face the same ones. A record holds success
with Wilson's interval, smoothness, rates and latencies; a picture shows the paths of the first
episodes from above, and an animation the first of them. With MUJOCO_GL=egl or osmesa the animation
is the simulator's own picture. A policy with images needs one of these: it sees the pictures that
its demonstrations show. Simulators need the extra robots.
"""

import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from flowkit.checks import usable_device
from flowkit.modules import Regression
from flowkit.places import check_writable
from flowkit.policies import ChunkPolicy, PolicyVelocity, RecedingHorizon, environment, roll_out
from flowkit.runs import Run
from flowkit.runs.processes import say
from flowkit.runs.records import recording
from flowkit.runs.rollout_pictures import ANIMATED, save_animation, save_paths


def rollout(cfg: DictConfig) -> dict[str, Any]:
    """Roll out as configured; write ``rollout.json``, ``rollout.png`` and ``rollout.gif``.

    Returns:
        The metrics.
    """
    run = Run.load(cfg.run, cfg.weights, usable_device(cfg.device), 1, cfg.trust)
    velocity: Any = run.module.velocity
    if not isinstance(velocity, PolicyVelocity):
        raise TypeError(
            "run must be a run of a policy (model=policy) to act, got a velocity of class "
            f"{type(velocity).__name__}"
        )
    folder = Path(cfg.out) if cfg.out else run.results / "rollout"
    check_writable(folder, "out")
    regresses = isinstance(run.module, Regression)
    sampler = run.module.default_sampler if regresses else run.ode_sampler(cfg.sampler)
    control = RecedingHorizon(
        ChunkPolicy(velocity, sampler, noise=not regresses), cfg.execute, cfg.prefix
    )
    env = environment(cfg.env, cfg.task)
    image_size = velocity.image_size
    _check_sizes(velocity, env)
    prefixes, begun = velocity.net.prefixes, time.perf_counter()
    found = roll_out(env, control, cfg.episodes, cfg.seed, min(cfg.shown, ANIMATED), image_size)
    seconds = time.perf_counter() - begun
    metrics = {
        **found.metrics(),
        "solves": len(control.seconds),
        "prefixes": velocity.net.prefixes - prefixes,
        "clipped": velocity.actions.clipped,
        "seconds": round(seconds, 2),
    }
    rendered = bool(found.frames)
    acting = {key: cfg[key] for key in ("env", "task", "episodes", "execute", "prefix", "seed")}
    acting |= {"horizon": velocity.shape[1], "image_size": image_size}
    acting["animation"] = "rendered" if rendered else "paths from above, for want of a renderer"
    record = run.record(run.describe(sampler), rollout=metrics, acting=acting)
    files = [folder / f"rollout.{kind}" for kind in ("json", "png", "gif")]
    with recording(record, files):
        save_paths(found, files[1], cfg.shown)
        save_animation(found, files[2], cfg.shown)
    share, (low, high) = metrics["success"]["value"], metrics["success"]["interval"]
    say(f"success   {share:.3f} [{low:.3f}, {high:.3f}] of {cfg.episodes} episodes")
    if "left" in metrics:
        say(f"left      {metrics['left']:.3f} of the successful episodes")
    say(
        f"control   {metrics['control_hz']:.0f} Hz, {metrics['policy_hz']:.0f} Hz without the "
        f"simulator; a chunk in {metrics['latency_ms_50']:.1f} ms ({metrics['latency_ms_99']:.1f} "
        "ms in 99 of 100)"
    )
    say(f"picture   {files[1]}\nanimation {files[2]}\nrecord    {files[0]}")
    return metrics


def _check_sizes(velocity: PolicyVelocity, env: Any) -> None:
    """Require a policy of the numbers that the environment gives and takes."""
    seen = env.obs_size if velocity.encoder is None else len(env.proprio)
    for name, own, given in (
        ("actions", velocity.actions.size, env.action_size),
        ("observations", velocity.observations.size, seen),
    ):
        if own != given:
            raise ValueError(f"run must have {name} of size {given} for {env.name}, got {own}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="rollout")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit rollout``."""
    rollout(cfg)


if __name__ == "__main__":
    main()
