"""Look for what is wrong with a run, or with anybody's network.

flowkit doctor run=runs/quickstart
flowkit doctor velocity=mypackage.make data=digits
flowkit doctor velocity=mypackage.make data=toy conditions=false    a network without conditions

Each line is ok, or says what to look at and what to do. Alarms come first, and their cause before
what may follow from it. The network sees held-out data, and nothing is trained. The exit status is
0, with alarms too.

mypackage.make is your function without arguments that returns your velocity(x, t, cond).
"""

import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from flowkit.checks import check_at_least, usable_device
from flowkit.couplings import Independent
from flowkit.diagnosis import Finding, diagnose
from flowkit.diagnosis.diagnose import ordered
from flowkit.diagnosis.examples import Watched
from flowkit.hub import results_of
from flowkit.places import check_writable
from flowkit.provenance import versions
from flowkit.runs import Run
from flowkit.runs.diagnosing import (
    Subject,
    check_recorded,
    chosen,
    encoded,
    examine,
    learnt_guidance,
    paired,
    progress,
)
from flowkit.runs.records import recording
from flowkit.runs.splits import prepared
from flowkit.types import to_device

OF_RUNS = {"weights": "averaged", "guidance": None, "trust": [], "data_changed": "refuse"}
OF_NETWORKS = {
    "conditions": True,
    "path": {"_target_": "flowkit.paths.Linear", "sigma_min": 0.0, "sigma": 0.0},
    "autoencoder": {"_target_": "flowkit.autoencoders.Identity"},
}

Subjects = tuple[Subject, dict[str, Any], list[Finding]]


def doctor(cfg: DictConfig) -> list[Finding]:
    """Diagnose as configured; print the findings and write ``doctor.json``.

    Returns:
        The findings, alarms first.
    """
    if (cfg.run is None) == (cfg.velocity is None):
        got = "neither" if cfg.run is None else "both"
        raise ValueError(
            "one of run and velocity must be given, as run=<run folder> or velocity=<function>, "
            f"got {got}"
        )
    check_at_least(cfg.num_samples, 32, "num_samples")
    out = Path(cfg.out or results_of(cfg.run or "runs") / "doctor")
    check_writable(out, "out")
    subject, record, own = _of_run(cfg) if cfg.velocity is None else _of_user(cfg)
    pairs = subject.pairs
    networks = {
        name: Watched(velocity)
        for name in ("velocity", "raw", "guided")
        if (velocity := getattr(subject, name)) is not None
    }
    generator, began = torch.Generator().manual_seed(cfg.seed), time.perf_counter()
    found = diagnose(
        x0=pairs.x0,
        x1=pairs.x1,
        cond=pairs.cond,
        path=subject.path,
        generator=generator,
        **networks,  # type: ignore[arg-type]
    )
    found = ordered([*own, *found])
    cost = {
        "calls": sum(network.calls for network in networks.values()),
        "rows": sum(network.rows for network in networks.values()),
        "seconds": round(time.perf_counter() - began, 2),
    }
    record = {
        "findings": [finding._asdict() for finding in found],
        "num_samples": len(pairs.x1),
        "seed": cfg.seed,
        "cost": cost,
        **record,
        "versions": versions(),
    }
    file = out / "doctor.json"
    with recording(record, [file]):
        print(table(found))
    print(f"samples   {len(pairs.x1)} that the training has not seen")
    print(f"network   {cost['calls']:,} calls, {cost['rows']:,} rows, {cost['seconds']:.0f} s")
    print(f"numbers   {file}")
    return found


def table(found: list[Finding]) -> str:
    """Return the findings as aligned lines, each advice under its line."""
    width = max(len(finding.name) for finding in found)
    lines = []
    for name, ok, figure, advice in found:
        lines.append(f"{'ok' if ok else 'look here':<9}  {name:<{width}}  {figure}")
        if advice:
            lines.append(f"{'':<9}  {'':<{width}}  -> {advice}")
    return "\n".join(lines)


def _of_run(cfg: DictConfig) -> Subjects:
    """Return what to look at in a run, its part of the record, and lines that need no network."""
    _refuse(cfg, OF_NETWORKS, "run")
    if cfg.get("data") is None:
        check_recorded(cfg.run, cfg.data_changed)
    run = Run.load(
        cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, data_changed=cfg.data_changed
    )
    data = None if cfg.get("data") is None else prepared(instantiate(cfg.data), "test")
    subject = examine(run, data, cfg.num_samples, cfg.seed)
    if (scale := learnt_guidance(run)) is not None:
        print(f"without condition, since the network has learnt guidance {scale:g}")
    record = {"run": str(cfg.run), "weights": run.weights, "guidance": run.guidance}
    return subject, record, [line for line in [progress(run)] if line is not None]


def _of_user(cfg: DictConfig) -> Subjects:
    """Return what to look at in the user's network, its part of the record, and no more lines.

    Raises:
        TypeError: If the function returns no velocity.
        ValueError: If there are no data, no such function, or it fails.
    """
    _refuse(cfg, OF_RUNS, "velocity")
    if cfg.get("data") is None:
        raise ValueError("data must be given with velocity=, as data=<data>, got null")
    device = usable_device(cfg.device)
    try:
        velocity = get_object(cfg.velocity)()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            "velocity must name a function without arguments that returns a velocity, got "
            f"{cfg.velocity}: {type(error).__name__}: {reason}"
        ) from error
    if not callable(velocity):
        raise TypeError(
            f"velocity must return velocity(x, t, cond), got {type(velocity).__name__} from "
            f"{cfg.velocity}"
        )
    if isinstance(velocity, nn.Module):
        velocity = velocity.to(device)
    data = prepared(instantiate(cfg.data), "test")
    generator = torch.Generator().manual_seed(cfg.seed)
    batch = chosen(data, cfg.num_samples, generator)
    x1 = encoded(instantiate(cfg.autoencoder), batch["x1"], cfg.batch_size, generator)
    states: Any = {"x1": x1.to(device)}
    if cfg.conditions and batch.get("cond") is not None:
        states["cond"] = to_device(batch["cond"], device)
    if "x0" in batch:
        states["x0"] = batch["x0"].to(device)
    pairs = paired(states, Independent(), len(batch["x1"]), generator)
    record = {"velocity": cfg.velocity, "data": type(data).__name__}
    return Subject(velocity, pairs, instantiate(cfg.path)), record, []


def _refuse(cfg: DictConfig, defaults: dict[str, Any], kind: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: If one of them has another value than its default.
    """
    for name, default in defaults.items():
        value = OmegaConf.to_container(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name]
        if value != default:
            raise ValueError(f"{name} must be absent with {kind}=, where it is unused, got {value}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="doctor")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit doctor``."""
    doctor(cfg)


if __name__ == "__main__":
    main()
