"""Reading of runs and shared models: configuration, weights, and the module that they describe.

Every stored configuration is read by `read_config`, which translates names of earlier versions.
`build` makes the objects that a configuration describes, after `trust.check`.
"""

import copy
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from flowkit.checks import check_choice
from flowkit.hub import folder_of, is_pushed
from flowkit.modules import pushed
from flowkit.modules.earlier import current
from flowkit.modules.flow import FlowModule
from flowkit.modules.listed import find
from flowkit.modules.resume import ExactResume
from flowkit.modules.trust import CONTROLS, check, substituted, trusting
from flowkit.provenance import bounded, read_bounded, read_json
from flowkit.rules import why_no_run

CONFIG, CHECKPOINT = "config.yaml", "checkpoints/last.ckpt"
DATA = "data.json"  # record of the data, see `flowkit.runs.known_data`
UNRESOLVED = "unresolved.yaml"  # the configuration with its references; `resume` changes values


def load_run(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    weights: str = "averaged",
    trust: Sequence[str] = (),
) -> FlowModule:
    """Rebuild the module of a run or of a shared model, in ``eval`` mode on the CPU.

    Of a run folder, the function reads the resolved ``config.yaml`` and, with torch's
    ``weights_only``, the last checkpoint; of a pushed folder ``config.json`` and the safetensors.
    ``module.weights`` records the kind and the step of the weights, and ``module.class_names`` the
    names of the classes. Runs of earlier versions load as well. The configuration may name the
    classes that flowkit lists, see `flowkit.modules.listed`, and those that you trust.

    Args:
        folder: Folder of ``flowkit train`` or ``flowkit push``, ``hub:owner/name`` on the Hugging
            Face hub, or ``flowkit:name`` for a model that is part of flowkit.
        checkpoint: Checkpoint file of a run; None is the last checkpoint.
        weights: ``"averaged"``, or ``"raw"`` for the weights of the last step. A run without
            averaged weights (``callback=raw``) always gives its raw weights.
        trust: Dotted names of other classes that the configuration may name, for example
            ``["mypackage.Net"]``: their code runs. See also `trust.trust_file`.

    Raises:
        FileNotFoundError: If the folder is not a run, or has no weights yet.
        ValueError: If the run does not train a flow, if ``weights`` is another word, if the
            configuration names a class that is neither listed nor trusted, or if a shared model is
            of another format, another direction of time or another autoencoder.
        RuntimeError: If the weights are damaged or belong to another model.
        ImportError: If a class that the configuration names cannot be imported.
        OSError: If the hub does not give the model.
    """
    module, config = load_module(folder, checkpoint, weights, trust)
    if not isinstance(module, FlowModule):
        raise ValueError(
            f"run must be a run of a flow, got {type(module).__name__} in {folder}; train a policy "
            f"on it: flowkit train experiment=obstacle_chunks model.latents={folder} "
            "data.future=true"
        )
    module.configuration = config
    module.class_names = config["classes"] if config.get("num_classes") else None
    return module


def load_module(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    weights: str = "averaged",
    trust: Sequence[str] = (),
) -> tuple[ExactResume, dict[str, Any]]:
    """Load the module of any run of ``flowkit train``, as `load_run`, and its configuration."""
    check_choice(weights, ("averaged", "raw"), "weights")
    place, folder = folder, folder_of(folder)
    config, is_shared = read_config(folder), is_pushed(folder)
    if is_shared and (weights == "raw" or checkpoint is not None):
        other = "raw weights" if checkpoint is None else f"checkpoint {checkpoint}"
        raise ValueError(f"a shared model must be loaded as it is, got {other} of {place}")
    with trusting(trust):
        module = build(_module_of(config, folder), "module")
    if is_shared:
        pushed.restore(module, folder, config)
    else:
        file = folder / CHECKPOINT if checkpoint is None else Path(checkpoint)
        restore(module, read_checkpoint(file), file, weights)
        found = read_json(folder / DATA) if (folder / DATA).is_file() else None
        record = found if isinstance(found, dict) else None
        config |= {"data_record": record, "classes": (record or {}).get("classes")}
    return module.eval().requires_grad_(False), config


def described(
    module: FlowModule, config: Mapping[str, Any] | None, dtype: str
) -> tuple[FlowModule, Mapping[str, Any]]:
    """Return a copy of a module with rounded weights, and its configuration.

    Args:
        module: The module.
        config: Configuration of the module; None takes that of the run it was loaded from.
        dtype: Type of the numbers, see `pushed.round_weights`.

    Raises:
        ValueError: If neither is known, or the configuration builds another module.
    """
    if config is None:
        if module.configuration is None:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                "config must be given for a module made in Python, got None; write its class and "
                f"arguments: config={{'_target_': '{name}', 'velocity': {{'_target_': ...}}}}"
            )
        twin = copy.deepcopy(module)
        pushed.round_weights(twin, dtype)
        return twin, module.configuration
    twin = build(copy.deepcopy(dict(config)), "config")
    kinds, theirs = (
        {name: _settings(part, name) for name, part in one.named_modules()}
        for one in (module, twin)
    )
    if differing := [name for name in {**kinds, **theirs} if kinds.get(name) != theirs.get(name)]:
        raise ValueError(
            "config must build the module, got other classes or settings of "
            f"{', '.join(name or 'the module' for name in sorted(differing)[:5])}"
        )
    try:
        twin.load_state_dict(module.state_dict())
    except RuntimeError as error:
        raise ValueError(f"config must build the module, got other weights: {error}") from error
    for name in ("path", "coupling", "times", "codec"):
        values = [getattr(one, name, None) for one in (module, twin)]
        if not isinstance(values[0], torch.nn.Module) and values[0] != values[1]:
            raise ValueError(
                f"config must build the module, got {name} {values[1]} instead of {values[0]}"
            )
    saved: dict[str, Any] = {}
    module.on_save_checkpoint(saved)
    twin.on_load_checkpoint(saved)
    twin.weights, twin.class_names = module.weights, module.class_names
    twin.default_sampler = module.default_sampler
    pushed.round_weights(twin, dtype)
    own, shape = config.get("velocity"), module.sample_shape
    count = own.get("num_classes") if isinstance(own, Mapping) else None
    count = count if module.class_names is None else len(module.class_names)
    images = getattr(module.autoencoder, "image_shape", shape)
    known = {"num_classes": count, "shape": shape, "image_shape": images}
    return twin.eval().requires_grad_(False), {**known, "module": dict(config)}


def _settings(part: torch.nn.Module, name: str) -> tuple[type, dict[str, Any]]:
    """Return the class of a part of a module, and its plain settings."""
    plain = (str, int, float, bool, tuple, type(None))
    public = vars(part).items() if name else ()  # those of the whole module may have changed
    return type(part), {k: v for k, v in public if k[0] != "_" and isinstance(v, plain)}


def weights_of(place: str | Path) -> dict[str, Any]:
    """Read the weights of a run or a shared model; of a run that averages them, the average.

    Raises:
        FileNotFoundError: If there are none.
        RuntimeError: If they are damaged.
    """
    folder = folder_of(place)
    if is_pushed(folder):
        return pushed.read_weights(folder)
    return read_checkpoint(folder / CHECKPOINT)["state_dict"]


def _module_of(config: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Return the configuration of the module, which runs of other recipes do not have."""
    module = config.get("module")
    if not isinstance(module, dict):
        raise ValueError(f"run must be a run of `flowkit train` with a flow, got {folder}")
    return module


def read_network(folder: str | Path, name: str = "run") -> dict[str, Any]:
    """Read the configuration of a run whose network another training starts from.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If the run does not train a flow, or its module names no network.
    """
    config = read_config(folder, name=name)
    if not isinstance(_module_of(config, folder).get("velocity"), dict):
        raise ValueError(f"{name} must have a network as module.velocity, got none in {folder}")
    return config


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint from which a run continues, or None if there is no checkpoint.

    A checkpoint that Lightning saved when SLURM stopped the job has precedence over the last one.
    """
    saved = sorted(Path(folder).glob("hpc_ckpt_*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    last = Path(folder) / CHECKPOINT
    return saved[-1] if saved else last if last.is_file() else None


def read_config(folder: str | Path, file: str = CONFIG, name: str = "run") -> dict[str, Any]:
    """Read a configuration file of a run or of a shared model, with the names of this version.

    Raises:
        FileNotFoundError: If the folder has no such file.
        ValueError: If the file is not YAML of a mapping, or is too large or too deep; or as
            `pushed.read`.
    """
    place, folder = folder, folder_of(folder)
    if is_pushed(folder) and file == CONFIG:
        return pushed.read(folder)
    path = folder / file
    if not path.is_file():
        kind, why = f"folder with a {file}", "" if file != CONFIG else why_no_run(str(place))
        kind = "run folder, hub:owner/name or flowkit:name" if file == CONFIG else kind
        raise FileNotFoundError(f"{name} must be a {kind}, got {place}{why}")
    text = read_bounded(path)
    try:
        found = bounded(_Loader(text).get_single_data(), path)
    except (yaml.YAMLError, RecursionError) as error:
        words = " ".join(str(error).split())  # one line
        raise ValueError(f"configuration must be plain YAML, got {path}: {words}") from error
    if not isinstance(found, dict):
        raise ValueError(f"configuration must be a mapping, got {type(found).__name__} in {path}")
    return current(found)


PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """YAML of plain types as OmegaConf reads it: ``1e-3`` is a number, a date is a string.

    Without tags: ``!!pairs`` and its like make tuples and sets, which could hide a node.
    """

    yaml_constructors: ClassVar[Any] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in PLAIN
    }
    yaml_implicit_resolvers: ClassVar[Any] = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse keys ``<<``: merged mappings can grow without a bound.

        Raises:
            ConstructorError: If there is such a key.
        """
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "keys << are not read")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def restore(
    module: ExactResume, state: dict[str, Any], file: Path, weights: str = "averaged"
) -> None:
    """Load the state of a checkpoint into its module.

    Args:
        module: The module, built from the configuration of the run.
        state: Content of the checkpoint, see `read_checkpoint`.
        file: File of the checkpoint, for error messages.
        weights: ``"averaged"`` or ``"raw"``.

    Raises:
        RuntimeError: If the checkpoint belongs to another model.
    """
    misfit = _MISFIT.format(file)
    try:
        module.on_load_checkpoint(state)
    except KeyError as error:  # messages of other errors, for example of an autoencoder, are clear
        raise RuntimeError(misfit) from error
    averaged = weights == "averaged" and "current_model_state" in state
    raw = state.get("current_model_state", state["state_dict"])
    try:
        module.load_state_dict(state["state_dict"] if averaged else raw)
    except (KeyError, RuntimeError) as error:
        raise RuntimeError(misfit) from error
    module.weights = {"kind": "averaged" if averaged else "raw", "step": state["global_step"]}


_MISFIT = "checkpoint must fit the configured module, got another model or format in {}"


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, with torch's ``weights_only``.

    Raises:
        FileNotFoundError: If the file does not exist.
        RuntimeError: If the file cannot be read or is not a checkpoint.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint must be a file, got {file}; has the run saved a checkpoint?"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for a damaged file
        raise RuntimeError(f"checkpoint must be readable, got {file}: {error}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise RuntimeError(_MISFIT.format(file))
    return state


def build(node: Any, place: str = "configuration") -> Any:
    """Build a resolved configuration, as Hydra's ``instantiate(node, _convert_="all")`` does.

    Modules load runs, and this layer must work without Hydra, so this function replaces Hydra's.
    Containers are plain dictionaries and lists, so ``_convert_`` has no effect. The whole tree is
    checked before the first call.

    Args:
        node: The configuration.
        place: Name of the node, for errors.

    Raises:
        ImportError: If a ``_target_`` cannot be imported.
        ValueError: If a ``_target_`` is neither listed nor trusted, see `trust.check`.

    >>> build({"_target_": "flowkit.paths.Linear", "sigma": 0.5})
    Linear(sigma_min=0.0, sigma=0.5)
    """
    check(node, place)
    return _built(node)


def _built(node: Any, recursive: bool = True) -> Any:
    """Build a checked configuration."""
    if isinstance(node, str):
        return substituted(node)
    if isinstance(node, list):
        return [_built(item, recursive) for item in node]
    if not isinstance(node, dict):
        return node
    recursive = node.get("_recursive_", recursive)
    if "_target_" not in node:
        return {key: _built(value, recursive) for key, value in node.items()}
    given = {key: value for key, value in node.items() if key not in CONTROLS}
    args = node.get("_args_", [])
    if recursive:
        given, args = _built(given), _built(args)
    target = find(node["_target_"]) or _locate(node["_target_"])
    made = partial(target, *args, **given)
    if node.get("_partial_"):
        return made
    try:
        inspect.signature(target).bind(*args, **given)
    except TypeError as error:
        raise TypeError(
            f"configuration of {node['_target_']} must fit its arguments, got {error}"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    return made()


def _locate(name: str) -> Any:
    """Import the object of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute, None)
        if found is not None:
            return found
    raise ImportError(
        f"_target_ must name an importable object, got {name!r}; run in the folder that holds "
        f"{parts[0]}, or add that folder to PYTHONPATH"
    )
