"""Exports of flows: files that draw samples without flowkit, checked as they are written."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.adapters.diffusers_folder import check_diffusers, write_diffusers
from flowkit.adapters.exports import OPSET, Solve, traced, write_onnx, write_torch
from flowkit.autoencoders import identity
from flowkit.blockwise import Blockwise
from flowkit.checks import check_choice, check_number, check_whole
from flowkit.extras import install
from flowkit.modules import FlowModule
from flowkit.modules.flow import known_shape
from flowkit.nn import DiffusersVelocity
from flowkit.provenance import read_json, versions, write_atomically, write_json
from flowkit.runs.export_page import readme
from flowkit.runs.records import weights
from flowkit.sampling import ADAPTIVE, ODESampler, Sampler, seeded_noise

FORMATS = ("torch", "onnx", "diffusers")
OLDEST = "2.9"  # torch with loops in ONNX (2.8), and with graphs that check no sizes (2.9)
PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "diffusers": ()}
FILES = {"torch": "model.pt2", "onnx": "model.onnx", "diffusers": "model_index.json"}
SEEDS, BATCHES, TOLERANCE = 64, (1, 7, 64), 1e-3

Draw = Callable[..., Tensor]


def export(
    module: FlowModule,
    folder: str | Path,
    format: str = "torch",
    sampler: Sampler | None = None,
    guidance: float | None = None,
    classes: Sequence[str] | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """Write a flow as a file that draws samples from noise and labels without flowkit.

    The file holds the network, every step of the solver, guidance and the decoder. It is read
    again, and draws 64 samples from the seeds 0 to 63, in batches of 1, 7 and 64. Only if they are
    those of the module, the folder is written: the file, ``README.md`` and ``export.json``.

    Args:
        module: A flow from noise, and from class labels or none, with weights in float32.
        folder: The folder; it is made.
        format: ``"torch"`` writes ``model.pt2`` for `torch.export.load`, ``"onnx"`` ``model.onnx``,
            ``"diffusers"`` a folder with ``model_index.json`` and a pipeline.
        sampler: A sampler of fixed steps from 0 to 1; None takes the module's own.
        guidance: Scale of classifier-free guidance; None and 1 are no guidance.
        classes: Names of the classes; None takes those of the module, if it has labels.
        license: License of the weights, for the records.

    Returns:
        The record, as ``export.json`` holds it.

    Raises:
        ImportError: If packages of the extra ``export`` are not installed, or torch is too old.
        TypeError: If the flow, its network or the sampler is of a kind that the format cannot hold.
        ValueError: If an option does not fit, the folder holds another export, or the samples of
            the file differ from those of the module by more than ``TOLERANCE``, relative to the
            largest number where this is above 1.
        RuntimeError: If the module has seen no batch.

    An example::

        export(module, "digits", "onnx", ODESampler(8), guidance=2, classes=[*"0123456789"])
    """
    sampler = cast(ODESampler, module.default_sampler if sampler is None else sampler)
    _check(module, format, sampler, guidance)
    shape, folder = known_shape(module.sample_shape), Path(folder)
    classes = module.class_names if classes is None else classes
    scale = 1.0 if guidance is None else float(guidance)
    about = _about(module, format, sampler, scale, classes, license)
    _check_place(folder, about)
    inputs = [seeded_noise(shape, range(SEEDS))]
    if classes is not None:
        inputs.append(torch.arange(SEEDS) % len(classes))
    began = time.perf_counter()
    expected = _of_module(module, sampler, guidance, inputs)
    checks: dict[str, Any] = {"run": _since(began)}
    about["output"] = ["batch", *expected.shape[1:]]
    with TemporaryDirectory() as made:
        place, began = Path(made), time.perf_counter()
        _write(module, sampler, scale, shape, classes, format, place, about)
        checks["export"] = _since(began)
        checks |= _compared(_reader(format, place), inputs, expected, format)
        record = {**about, "checks": checks}
        (place / "README.md").write_text(readme(record))
        files = sorted(file.relative_to(place) for file in place.rglob("*") if file.is_file())
        record["bytes"] = sum((place / file).stat().st_size for file in files)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).touch()  # tells files that a kill has left from those of the user
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / file, partial(copyfile, place / file))
    write_json(folder / "export.json", record)  # last: it stands for a whole export
    (folder / BEGUN).unlink()
    return record


def _since(began: float) -> dict[str, float]:
    """Return the seconds since a time."""
    return {"seconds": round(time.perf_counter() - began, 3)}


def _check(module: FlowModule, format: str, sampler: Sampler, guidance: Any) -> None:
    """Require a flow, a sampler and guidance that a file can hold."""
    check_choice(format, FORMATS, "format")
    if missing := [name for name in PACKAGES[format] if find_spec(name) is None]:
        raise ImportError(
            f"{', '.join(missing)} must be installed for format={format}, got none; "
            f"{install('export')}"
        )
    if format != "diffusers" and torch.__version__ < OLDEST:
        raise ImportError(
            f"torch must be {OLDEST} or later for format={format}, got {torch.__version__}; "
            f"{install('export')}"
        )
    if not isinstance(sampler, ODESampler) or sampler.method in ADAPTIVE:
        got = sampler.method if isinstance(sampler, ODESampler) else type(sampler).__name__
        raise TypeError(
            f"sampler must take fixed steps to be exported, as sampler=heun does, got {got}; its "
            "steps depend on the samples or draw noise"
        )
    check_whole(sampler.times)
    if type(module).solve is not FlowModule.solve:
        raise TypeError(
            "module must carry noise to data alone to be exported, got "
            f"{type(module).__name__}, whose states hold labels, too"
        )
    if isinstance(module.velocity, Blockwise):
        raise TypeError(
            "velocity must be one network for all times to be exported, got Blockwise; an export "
            "holds one network, and calls it in a loop"
        )
    if guidance is not None:
        check_number(guidance, "guidance")
    module.guided(guidance)
    found = {p.dtype for p in module.parameters()} - {torch.float32}
    if found:
        raise TypeError(f"module must have weights in float32 to be exported, got {found.pop()}")
    if module.device.type != "cpu":
        raise ValueError(f"module must be on the CPU to be exported, got {module.device}")
    if format == "diffusers":
        check_diffusers(module.velocity, sampler, module.autoencoder)


def _about(
    module: FlowModule,
    format: str,
    sampler: ODESampler,
    scale: float,
    classes: Sequence[str] | None,
    license: str | None,
) -> dict[str, Any]:
    """Return what a reader of the file must know, which the file holds, too."""
    noise = ["batch", *known_shape(module.sample_shape)]
    labels = {} if classes is None else {"labels": ["batch"]}
    return {
        "format": format,
        "file": FILES[format],
        "inputs": {"noise": noise, **labels},
        "classes": None if classes is None else list(classes),
        "guidance": scale,
        "method": sampler.method,
        "grid": sampler.times.tolist(),
        "convention": CONVENTIONS[format == "diffusers"],
        "license": license,
        "weights": weights(module),
        "autoencoder": identity(module.autoencoder)["hash"],
        "opset": OPSET if format == "onnx" else None,
        "versions": versions(),
    }


CONVENTIONS = (
    "noise is standard normal; numbers of images lie about in [-1, 1]: clamp before you save them; "
    "the time inside runs from 0 at noise to 1 at data, and the network predicts data - noise",
    "noise is standard normal; sigma = 1 - t falls from 1 at noise to 0 at data, and the scheduler "
    "gets noise - data; the network itself predicts data - noise at the time "
    "time_scale * (1 - sigma), and pipeline.py turns both round",
)


def _check_place(folder: Path, about: dict[str, Any]) -> None:
    """Require a new folder, or one of the same export, which a kill may have cut short."""
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if "export.json" in there:
        known = read_json(folder / "export.json")
        known = known if isinstance(known, dict) else {}
        others = [key for key in about if known.get(key) != about[key]]
        holds = f"one of another {others[0]}" if others else None
    else:
        holds = min(there, default=None) if BEGUN not in there else None
    if holds is not None:
        raise ValueError(
            f"out must be a new folder or hold the same export, got {folder}, which holds {holds}"
        )


BEGUN = ".export-begun"


def _of_module(
    module: FlowModule, sampler: ODESampler, guidance: float | None, inputs: Sequence[Tensor]
) -> Tensor:
    """Return the samples of the module itself."""
    noise, *labels = inputs
    state = module.solve(noise, sampler, labels[0] if labels else None, guidance).x
    with torch.no_grad():
        return module.autoencoder.decode(state).cpu()


def _write(
    module: FlowModule,
    sampler: ODESampler,
    scale: float,
    shape: tuple[int, ...],
    classes: Sequence[str] | None,
    format: str,
    place: Path,
    about: dict[str, Any],
) -> None:
    """Write the files of a format."""
    if format == "diffusers":
        count = None if classes is None else len(classes)
        net = cast(DiffusersVelocity, module.velocity)
        write_diffusers(net, sampler, module.autoencoder, scale, count, shape, place)
        return
    null = 0.0 if module.drop_cond is None else cast(float, module.drop_cond.null)
    solve = Solve(module.velocity, sampler, scale, null)
    program = traced(solve, module.autoencoder, shape, classes is not None)
    write = {"torch": write_torch, "onnx": write_onnx}[format]
    write(program, place / FILES[format], json.dumps(about, indent=2))


def _reader(format: str, place: Path) -> Draw:
    """Read an export, and return what draws from noise and labels."""
    if format == "torch":
        return cast(Draw, torch.export.load(place / FILES[format]).module())
    if format == "onnx":
        from onnxruntime import InferenceSession

        session = InferenceSession(place / FILES[format])

        def run(*inputs: Tensor) -> Tensor:
            named = {name: x.numpy() for name, x in zip(("noise", "labels"), inputs, strict=False)}
            return torch.from_numpy(session.run(None, named)[0])

        return run
    from diffusers import DiffusionPipeline  # type: ignore[attr-defined]
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:  # the code to trust is the copy of our own file
        pipeline: Any = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    finally:
        logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)

    def draw(noise: Tensor, labels: Tensor | None = None) -> Tensor:
        found = pipeline(labels, len(noise), noise=noise, output_type="pt").images
        return 2 * found - 1

    return draw


def _compared(
    draw: Draw, inputs: Sequence[Tensor], expected: Tensor, format: str
) -> dict[str, Any]:
    """Compare the samples of a file with those of the module.

    Raises:
        ValueError: If they differ.
    """
    if format == "diffusers":  # a pipeline returns pixels, which end at -1 and 1
        expected = expected.clamp(-1, 1)
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    largest, last = 0.0, {}
    for size in BATCHES:
        began = time.perf_counter()
        found = draw(*(x[:size] for x in inputs))
        last = _since(began)
        if found.shape != expected[:size].shape:
            raise ValueError(
                f"{format} must give samples of shape {tuple(expected[:size].shape)}, got "
                f"{tuple(found.shape)}; nothing is written"
            )
        largest = max(largest, (found - expected[:size]).abs().max().item())
    if not largest <= allowed:
        raise ValueError(
            f"{format} must give the samples of the run within {allowed:.3g}, got a difference of "
            f"{largest:.3g}; nothing is written"
        )
    return {
        "file": last,
        "samples": SEEDS,
        "batches": list(BATCHES),
        "largest difference": largest,
        "tolerance": allowed,
    }
