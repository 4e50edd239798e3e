"""The file format to share: a folder with weights, ``config.json`` and a model card.

``config.json`` is written last, so a folder that loads is whole. It holds what rebuilding needs, in
the form of a run's ``config.yaml``, and neither optimizer nor places of the machine.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowkit._version import __version__
from flowkit.autoencoders import FrozenAutoencoder
from flowkit.checks import check_choice
from flowkit.hub import CONFIG, WEIGHTS, is_pushed
from flowkit.modules.earlier import current
from flowkit.provenance import read_json, tensor_hash, write_atomically, write_json, write_text
from flowkit.sampling import ODESampler

if TYPE_CHECKING:
    from flowkit.modules.flow import FlowModule

FORMAT, VERSION = "flowkit", 1
TIME = {"noise": 0, "data": 1}
AUTOENCODER = "autoencoder"  # folder of its own network, within the pushed folder
GIVEN_LATER = "???"  # place of data, which a shared file does not know
PLACES = ("root", "path", "font")  # arguments of data; a relative one may be elsewhere now
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}

KEPT = ("guidance", "image_shape", "needs_data", "num_classes", "prediction", "shape")
OF_TRAINING = ("optimizer", "lr_scheduler", "start", "encoder")  # arguments of modules
DATA_OF_TRAINING = ("coupling", "recognition")  # arguments of data
CACHES = ("flowkit.data.Latents", "flowkit.data.Pairs")  # their images are elsewhere
FIELDS: dict[str, tuple[Any, str]] = {
    "module": (dict, "a mapping"),
    "state": (dict, "a mapping"),
    "weights": (dict, "a mapping"),
    "sampler": (dict, "a mapping"),
    "data": (dict | None, "a mapping or null"),
    "data_record": (dict | None, "a mapping or null"),
    "num_classes": (int | None, "a number or null"),
    "classes": (list | None, "a list or null"),
    "guidance": (int | float | None, "a number or null"),
}

Config = dict[str, Any]
Writer = Callable[[Path], Any]


# --- reading ------------------------------------------------------------------------------------


def read(folder: Path) -> Config:
    """Read the configuration of a pushed folder, with the names of this version.

    Raises:
        ValueError: If the file is not of this format, of another version of it, of the other
            direction of time, or lacks a field.
    """
    file = folder / CONFIG
    found = read_json(file)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"format in {file} must be {FORMAT}; `flowkit push` writes such folders")
    if found.get("format_version") != VERSION:
        raise ValueError(
            f"format_version in {file} must be {VERSION}, got {found.get('format_version')}; it "
            f"was written by flowkit {found.get('flowkit')}, this is {__version__}"
        )
    if found.get("time") != TIME:
        raise ValueError(
            f"time in {file} must be {json.dumps(TIME)}, got {json.dumps(found.get('time'))}; "
            "flowkit's time is 0 at noise, 1 at data"
        )
    for name, (kind, words) in FIELDS.items():
        if name not in found or not isinstance(found[name], kind):
            raise ValueError(f"{name} in {file} must be {words}, got {found.get(name)!r}")
    names = found["classes"]
    words = [name for name in names or () if isinstance(name, str)]
    if names is not None and not len(words) == len(names) == found["num_classes"]:
        raise ValueError(
            f"classes in {file} must be {found['num_classes']} names, got {len(words)}"
        )
    shape = found["state"].get("sample_shape")
    sides = shape if isinstance(shape, list) else [0]
    if shape is not None and not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"sample_shape in {file} must be a list of int >= 1 or null, got {shape}")
    found = current(found)
    node = found["module"].get("autoencoder")
    if isinstance(node, dict) and node.get("path") == AUTOENCODER:
        node["path"] = str(folder / AUTOENCODER)
    parts = ("path", "coupling", "autoencoder")  # which another training takes from a run
    return {**found, **{name: found["module"].get(name) for name in parts}}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a pushed folder.

    Raises:
        FileNotFoundError: If there are none.
        RuntimeError: If the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"a pushed folder must hold {WEIGHTS}, got none in {folder}")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise RuntimeError(f"weights must be readable, got {file}: {error}") from error


def restore(module: "FlowModule", folder: Path, config: Config) -> None:
    """Load the weights and the state of a pushed folder into its module.

    Raises:
        RuntimeError: If the weights do not fit the module, or are not those of ``config.json``.
        ValueError: If the autoencoder is another, or a field is malformed.
    """
    file, state = folder / WEIGHTS, read_weights(folder)
    try:
        module.on_load_checkpoint({"flowkit": {"noise_seed": None, **config["state"]}})
        module.default_sampler = _sampler(config["sampler"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} must fit its module, got {error!r}") from error
    left = {name for name in module.state_dict() if _is_left_out(module, name)}
    ours = {name: tuple(x.shape) for name, x in module.state_dict().items() if name not in left}
    theirs = {name: tuple(x.shape) for name, x in state.items()}
    for words, names in {
        "missing": ours.keys() - theirs.keys(),
        "unexpected": theirs.keys() - ours.keys(),
        "of another shape": {n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]},
    }.items():
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            raise RuntimeError(
                f"weights must fit the configured module, got {file} with {len(names)} {words}: "
                f"{shown}"
            )
    module.load_state_dict(state, strict=False)
    digest, known = hash_of(module), config["weights"].get("hash")
    if digest != known:
        raise RuntimeError(f"weights must have the hash in {CONFIG}, {known}, got {digest}: {file}")
    module.weights = {name: config["weights"].get(name) for name in ("kind", "step")}


def _sampler(node: Mapping[str, Any]) -> ODESampler:
    """Build the default sampler."""
    try:
        grid = torch.tensor(node["grid"], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampler.grid must be a list of times, got {node['grid']}") from error
    return ODESampler(grid, node["method"])


def _is_left_out(module: "FlowModule", name: str) -> bool:
    """Return True for a weight that only the training uses."""
    return name.partition(".")[0] in module.of_training


# --- writing ------------------------------------------------------------------------------------


def shared_state(module: "FlowModule") -> dict[str, Tensor]:
    """Return the weights that are shared: all but those that only the training uses."""
    state = module.state_dict()
    return {name: value for name, value in state.items() if not _is_left_out(module, name)}


def hash_of(module: "FlowModule") -> str:
    """Return the hash of the weights that are shared."""
    return tensor_hash(shared_state(module))


@torch.no_grad()
def round_weights(module: "FlowModule", dtype: str) -> None:
    """Round the weights of a module, and of its autoencoder, to the numbers of a type.

    Raises:
        ValueError: If a weight is beyond the numbers of the type.
    """
    check_choice(dtype, DTYPES, "dtype")
    for name, value in shared_state(module).items():
        if value.dtype == torch.float32:
            rounded = value.to(DTYPES[dtype]).float()
            if value.isfinite().all() and not rounded.isfinite().all():
                raise ValueError(f"dtype must hold all weights, got {dtype} and overflow in {name}")
            value.copy_(rounded)
    own = module.autoencoder
    if isinstance(own, FrozenAutoencoder) and dtype != "float32":
        vae = _as_type(_as_type(own.vae, DTYPES[dtype]), torch.float32)
        module.autoencoder = type(own)(vae, own.image_shape)


def portable(module: "FlowModule", configuration: Mapping[str, Any], dtype: str) -> Config:
    """Return the configuration that is shared.

    Args:
        module: The module, with rounded weights.
        configuration: That of its run.
        dtype: Type of the numbers in the file.

    Raises:
        ValueError: If the module's configuration names a place of this machine.
    """
    node = copy.deepcopy(dict(configuration["module"]))
    node = {name: value for name, value in node.items() if name not in OF_TRAINING}
    own = node.get("autoencoder")
    if isinstance(own, dict) and _is_embedded(own):
        places = ("path", "subfolder", "revision", "variant")
        rest = {name: value for name, value in own.items() if name not in places}
        node["autoencoder"] = {**rest, "path": AUTOENCODER}
    _check_no_place(node, "module")
    saved: dict[str, Any] = {}
    module.on_save_checkpoint(saved)
    state = {name: value for name, value in saved["flowkit"].items() if name != "noise_seed"}
    sampler = module.default_sampler
    weights = {**(module.weights or {"kind": "raw", "step": None}), "hash": hash_of(module)}
    record = configuration.get("data_record")
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "flowkit": __version__,
        "time": TIME,
        "module": node,
        "state": state,
        "weights": {**weights, "dtype": dtype},
        "sampler": {"method": sampler.method, "grid": sampler.times.tolist()},
        **{name: configuration.get(name) for name in KEPT},
        "classes": module.class_names,
        "data": _placeless(configuration.get("data")),
        "data_record": None if record is None else {**record, "root": None, "files": {}},
    }


def _as_type(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a network as torch does; that of diffusers warns of layers that it does not have."""
    return nn.Module.to(vae, dtype)


def _is_embedded(node: Mapping[str, Any]) -> bool:
    """Return True for an autoencoder in a folder, which becomes a part of the pushed folder."""
    target = str(node.get("_target_"))
    by_path = target.startswith("flowkit.autoencoders.") and target.endswith(".from_pretrained")
    return by_path and not str(node.get("path")).startswith("hub:")


def _placeless(node: Any, name: str = "") -> Any:
    """Return the configuration of data without places of this machine.

    Caches of latents and pairs have no images of their own, so nothing of them is left.
    """
    if isinstance(node, Mapping):
        if node.get("_target_") in CACHES:
            return None
        kept = (item for item in node.items() if item[0] not in DATA_OF_TRAINING)
        return {name: _placeless(value, name) for name, value in kept}
    if isinstance(node, list):
        return [_placeless(value) for value in node]
    if not isinstance(node, str) or node.startswith("hub:"):
        return node
    return GIVEN_LATER if name in PLACES or is_place(node) else node


def asked(data: Any) -> list[str]:
    """Return the options that give the places which shared data do not name.

    >>> asked({"images": {"root": "???"}, "query": {"path": "???"}})
    ['data.root', 'data.query.path']
    """
    keys = (key for key, text in _texts(data, "data") if text == GIVEN_LATER)
    own = rf"data\.(images\.)*({'|'.join(PLACES)})"  # for which recipes have one option
    return list(dict.fromkeys("data.root" if re.fullmatch(own, key) else key for key in keys))


def _check_no_place(node: Any, key: str) -> None:
    """Require a configuration without places of this machine."""
    for where, text in _texts(node, key):
        if is_place(text):
            raise ValueError(
                f"a shared configuration must name no place of this machine, got {where}={text}; "
                "only autoencoders in a folder are written beside the weights"
            )


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield all texts of a configuration, with their dotted names."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{key}[{number}]")
    elif isinstance(node, str):
        yield key, node


def is_place(text: str) -> bool:
    """Return True for an absolute path, and for a relative one of several parts that exists."""
    try:
        return Path(text).is_absolute() or ("/" in text and Path(text).exists())
    except OSError:  # a name that is too long
        return False


def check_place(folder: Path, digest: str | None = None, argument: str = "to") -> None:
    """Require a folder that can take a pushed model: new, empty, or of the same weights.

    Args:
        folder: The folder.
        digest: Hash of the weights; None leaves out their comparison.
        argument: Name of the folder in errors.

    Raises:
        NotADirectoryError: If it is a file.
        ValueError: If it holds other files, or a model with other weights.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{argument} must be a folder, got the file {folder}")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [file.name for file in files if file.suffix != ".partial"]
    begun = CONFIG not in names and _is_begun(folder)  # by a killed call
    if not names or begun:
        return
    if not is_pushed(folder) or read_json(folder / CONFIG).get("format") != FORMAT:
        raise ValueError(
            f"{argument} must be a new folder or hold the same weights, got {folder} with "
            f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}; choose another folder"
        )
    known = read(folder)["weights"].get("hash")
    if digest is not None and known != digest:
        raise ValueError(
            f"{argument} must be a new folder or hold the same weights, got {folder} with others "
            f"(hash {known}, not {digest}); choose another folder"
        )


def _is_begun(folder: Path) -> bool:
    """Return True for a folder with the weights of a call that did not end."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            return (opened.metadata() or {}).get("format_of") == FORMAT
    except (OSError, SafetensorError):
        return False


def write(
    module: "FlowModule", folder: Path, config: Config, files: Mapping[str, Writer | str | None]
) -> None:
    """Write a pushed folder: the weights first, ``config.json`` last.

    Args:
        module: The module, with rounded weights.
        folder: The folder, after `check_place`.
        config: Result of `portable`.
        files: Other files: a text, or a function that writes one atomically; None for none.
    """
    from safetensors.torch import save_file

    dtype = DTYPES[config["weights"]["dtype"]]
    state = {}
    for name, value in shared_state(module).items():
        stored = value.to(dtype) if value.dtype == torch.float32 else value
        state[name] = stored.cpu().contiguous().clone()  # safetensors shares no memory
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format_of": FORMAT}  # one entry: several would be written in a random order

    def save(file: Path) -> None:
        file.touch()
        mode = file.stat().st_mode  # which safetensors would narrow to its owner
        save_file(state, file, about)
        file.chmod(mode)

    write_atomically(folder / WEIGHTS, save)
    if (config["module"].get("autoencoder") or {}).get("path") == AUTOENCODER:
        own: Any = module.autoencoder
        vae = _as_type(copy.deepcopy(own.vae), dtype)
        type(own)(vae, own.image_shape).save_pretrained(folder / AUTOENCODER)
    for name, content in files.items():
        if isinstance(content, str):
            write_text(folder / name, content)
        elif content is not None:
            content(folder / name)
    write_json(folder / CONFIG, config)
