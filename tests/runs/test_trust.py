"""Files of other people run none of their code: a corpus of attacks, and what must still load."""

import ast
import importlib
import json
import os
import pickle
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

import flowkit
from flowkit.modules import load_run
from flowkit.modules.checkpoints import build, read_config
from flowkit.modules.earlier import current, current_name
from flowkit.modules.listed import NAMES, find
from flowkit.modules.trust import check, trust_file, trusted, trusting
from flowkit.recipes.blockwise import blockwise
from flowkit.recipes.train import train
from flowkit.runs import Run
from flowkit.runs.records import recorded
from flowkit.runs.resuming import continued, resumed
from flowkit.runs.splits import stored_data
from tests.conftest import CONF

ROOT = Path(__file__).resolve().parents[2]
EARLIER = ROOT / "tests/runs/earlier"
CANARY = Path("canary")  # in the folder of a test
TOUCH = {"_args_": ["touch canary"]}
OPENS = {"_target_": "builtins.open", "_args_": ["canary", "w"]}
SYSTEM = {"_target_": "os.system", **TOUCH}

# Nodes that would make the file `canary` or reach another machine, and what the error names.
ATTACKS = {
    "os": (SYSTEM, "os.system"),
    "posix": ({"_target_": "posix.system", **TOUCH}, "posix.system"),
    "another name of an argument": (
        {
            "_target_": "transformers.ViTConfig",
            "attribute_map": {"zz": "_attn_implementation"},
            "zz": "owner/kernels",
        },
        "attribute_map",
    ),
    "open": (OPENS, "builtins.open"),
    "through our paths": ({"_target_": "flowkit.paths.torch.os.system", **TOUCH}, "torch.os"),
    "through torch": ({"_target_": "torch.os.system", **TOUCH}, "torch.os.system"),
    "through torch.nn": ({"_target_": "torch.nn.modules.module.os.system", **TOUCH}, "os.system"),
    "through grids": ({"_target_": "flowkit.grids.Path.touch", "_args_": ["canary"]}, "touch"),
    "through an old name": ({"_target_": "flowkit.solvers.torch.os.system", **TOUCH}, "os.system"),
    "build": (
        {"_target_": "flowkit.modules.checkpoints.build", "_recursive_": False, "node": OPENS},
        "checkpoints.build",
    ),
    "build of an old name": (
        {"_target_": "flowkit.modules.runs.build", "_recursive_": False, "node": OPENS},
        "build",
    ),
    "instantiate": (
        {"_target_": "hydra.utils.instantiate", "_recursive_": False, "config": SYSTEM},
        "instantiate",
    ),
    "get_method": ({"_target_": "hydra.utils.get_method", "path": "os.system"}, "get_method"),
    "call": ({"_target_": "hydra.utils.call", "_recursive_": False, "config": SYSTEM}, "call"),
    "a run": ({"_target_": "flowkit.modules.load_run", "folder": "evil"}, "load_run"),
    "a Run": ({"_target_": "flowkit.runs.Run.load", "folder": "evil"}, "Run.load"),
    "torch.load": ({"_target_": "torch.load", "f": "evil.pt", "weights_only": False}, "torch.load"),
    "torch.hub": ({"_target_": "torch.hub.load", "repo_or_dir": "evil/net"}, "torch.hub.load"),
    "eval": ({"_target_": "builtins.eval", "_args_": ["open('canary', 'w')"]}, "builtins.eval"),
    "exec": ({"_target_": "builtins.exec", "_args_": ["open('canary', 'w')"]}, "builtins.exec"),
    "partial": (
        {"_target_": "functools.partial", "_args_": [{**SYSTEM, "_partial_": True}]},
        "os.system",
    ),
    "partial node": ({**SYSTEM, "_partial_": True}, "os.system"),
    "subprocess": ({"_target_": "subprocess.run", "args": ["touch", "canary"]}, "subprocess.run"),
    "an argument": ({"_target_": "torch.nn.Identity", "x": SYSTEM}, "os.system"),
    "positional": ({"_target_": "torch.nn.Identity", "_args_": [SYSTEM]}, "os.system"),
    "in lists": ({"_target_": "torch.nn.Identity", "x": [[{"y": [OPENS]}]]}, "builtins.open"),
    "without recursion": (
        {"_target_": "torch.nn.Identity", "_recursive_": False, "x": SYSTEM},
        "os.system",
    ),
    "a module of the folder": ({"_target_": "evil.Net"}, "evil.Net"),
    "a trusted beginning": ({"_target_": "flowkit_evil.Net"}, "flowkit_evil.Net"),
    "a private name": ({"_target_": "flowkit.paths.__loader__.load_module"}, "__loader__"),
    "a method of a class": ({"_target_": "torch.nn.Module.apply", "fn": SYSTEM}, "Module.apply"),
    "a name that is a list": ({"_target_": ["os.system"], "_args_": ["touch canary"]}, "os.system"),
    "a network with code of the hub": (
        {"_target_": "transformers.Dinov2Config", "attn_implementation": "evil/kernel"},
        "evil/kernel",
    ),
    "a server for the token": (
        {
            "_target_": "flowkit.autoencoders.KLAutoencoder.from_pretrained",
            "path": "hub:a/b",
            "proxies": {"https": "evil:1"},
        },
        "evil:1",
    ),
    "a server by a partial": (
        {
            "_target_": "functools.partial",
            "_args_": [
                {
                    "_target_": "flowkit.autoencoders.KLAutoencoder.from_pretrained",
                    "_partial_": True,
                }
            ],
            "proxies": "evil:1",
        },
        "evil:1",
    ),
    "a pipeline": ({"_target_": "diffusers.DiffusionPipeline.from_pretrained"}, "from_pretrained"),
    "a logger with credentials": (
        {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "http://evil"},
        "http://evil",
    ),
    "a logger by the name of its module": (
        {"_target_": "lightning.pytorch.loggers.wandb.WandbLogger", "entity": "evil"},
        "evil",
    ),
    "a reference": (
        {"_target_": "torch.nn.Identity", "x": "${oc.create:{_target_: os.system}}"},
        "x",
    ),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A working folder with a module of the attacker, and no settings of the user."""
    (tmp_path / "evil.py").write_text("open('canary', 'w')\n")
    (tmp_path / "flowkit_evil.py").write_text("open('canary', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def _with(node, kind="conditional", file="config.yaml"):
    """An earlier run whose network has a node as argument."""
    folder = Path(shutil.copytree(EARLIER / kind, "run", dirs_exist_ok=True))
    config = yaml.safe_load((folder / file).read_text())
    config["module"]["path"] = node
    (folder / file).write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_named_and_calls_nothing(name):
    node, refused = ATTACKS[name]
    with pytest.raises(ValueError, match="stored configuration must name only") as error:
        load_run(_with(node))
    assert "module.path" in str(error.value)
    assert refused in str(error.value)
    with pytest.raises(ValueError, match=r"source in x"):
        build(current({"data": node}), "source in x")
    assert not CANARY.exists()


def test_nothing_is_called_before_the_last_node_is_checked():
    """The trusted first node would make the canary."""
    node = {"a": OPENS, "z": SYSTEM}
    with trusting(["builtins.open"]), pytest.raises(ValueError, match=r"c.z._target_: os.system"):
        build(node, "c")
    assert not CANARY.exists()


def test_sources_of_pairs_and_caches_are_checked():
    Path("pairs").mkdir()
    columns = {name: torch.randn(40, 2) for name in ("x0", "x1")}
    save_file(columns, "pairs/pairs-0.safetensors")
    record = {
        "format": "flowkit-pairs",
        "version": 1,
        "shards": ["pairs-0.safetensors"],
        "rows_per_noise": 1,
        "num_classes": None,
        "x0_is_noise": True,
        "encoded_by": None,
        "source": OPENS,
        "provenance": {"model_hash": None},
    }
    Path("pairs/pairs.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"source in pairs._target_: builtins.open"):
        stored_data({"_target_": "flowkit.data.Pairs", "root": "pairs"})
    Path("latents").mkdir()
    index = {"autoencoder": {"hash": "x"}, "latent_shape": [1, 2, 2], "image_shape": [1, 4, 4]}
    index |= {"num_classes": None, "class_names": None, "source": {"images": [OPENS]}, "splits": {}}
    Path("latents/index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"source in latents.images\[0\]._target_: builtins.open"):
        stored_data({"_target_": "flowkit.data.Latents", "root": "latents"})
    with pytest.raises(ValueError, match=r"data._target_: builtins.open"):
        _ = Run(Path("run"), {"data": OPENS}, None).data
    assert not CANARY.exists()


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"path": SYSTEM}, "module.path._target_: os.system"),
        ({"path": "${oc.create:{_target_: os.system}}"}, "module.path"),
        ({"path": "${oc.select:none,{_target_: os.system}}"}, "module.path"),
        ({"path": "${${seed}:x}"}, "module.path"),
        ({"_target_": "${oc.env:HOME}"}, "module._target_"),
        ({"path": "${oc.env:SECRET}"}, r"trust=\[oc.env:SECRET\]"),
        ({"path": "${oc.decode:'{_target_: os.system}'}"}, "module.path"),
    ],
)
def test_resume_checks_the_stored_configuration(configure, change, refused):
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    config = yaml.safe_load((folder / "unresolved.yaml").read_text())
    config["module"] |= change
    (folder / "unresolved.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=refused):
        resumed(configure("train", "resume=run"), [])
    assert not CANARY.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callback.samples.folder", "elsewhere"),
        ("logger.csv.save_dir", "${run_dir}/../elsewhere"),
        ("logger.csv.name", "../../elsewhere"),
        ("trainer.default_root_dir", "s3://elsewhere"),
    ],
)
def test_a_resumed_run_writes_to_its_folder_alone(configure, key, value):
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    config = OmegaConf.load(folder / "unresolved.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "unresolved.yaml")
    with pytest.raises(
        ValueError, match=rf"{key} must lie in the run folder run .*, got .*elsewhere"
    ):
        resumed(configure("train", "resume=run"), [])
    assert resumed(configure("train", "resume=run"), [f"{key}={'mine'}"])


def _stored(change, file="unresolved.yaml"):
    """A copy of an earlier run whose file of the configuration is changed."""
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    config = yaml.safe_load((folder / file).read_text())
    change(config)
    (folder / file).write_text(yaml.safe_dump(config))
    return folder


BUILT = (
    "!!pairs [x: {_target_: flowkit.modules.checkpoints._built, _recursive_: false,"
    " node: {_target_: os.system, _args_: [touch canary]}}]"
)


@pytest.mark.parametrize("tag", [BUILT, BUILT.replace("!!pairs", "!!omap"), "!!set {a, b}"])
def test_tags_hide_no_node(configure, tag):
    """Of tuples and sets a walk of lists and mappings sees nothing."""
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    text = (folder / "config.yaml").read_text()
    assert "\n  velocity:\n" in text
    text = text.replace("\n  velocity:\n", f"\n  velocity:\n    extra: {tag}\n")
    (folder / "config.yaml").write_text(text)
    one_line = r"^configuration must be plain YAML, got run/config.yaml: .*$"
    for command in (
        lambda: load_run(folder),
        lambda: blockwise(configure("blockwise", "run=run", "run_dir=new")),
        lambda: train(
            configure("train", "module=straightening", "module.start=run", "run_dir=new")
        ),
    ):
        with pytest.raises(ValueError, match=one_line):
            command()
    assert not CANARY.exists()
    for hidden in ((("x", SYSTEM),), {1}, b"x"):
        with pytest.raises(ValueError, match=rf"a\.b: {type(hidden).__name__}; remove it"):
            check({"b": hidden}, "a")


@pytest.mark.parametrize("name", ["ModelCheckpoint", "OnExceptionCheckpoint", "SpikeDetection"])
def test_callbacks_that_write_and_delete_elsewhere_need_trust(configure, name):
    target = f"lightning.pytorch.callbacks.{name}"
    _stored(lambda config: config["callback"].update(mine={"_target_": target}))
    with pytest.raises(ValueError, match=rf"run\.callback\.mine\._target_: {target}"):
        resumed(configure("train", "resume=run"), [])
    override = f"trust=[{target}]"
    assert resumed(configure("train", "resume=run", override), ["resume=run", override])


@pytest.mark.parametrize(
    ("state", "refused"),
    [
        ({"best_model_path": "local://victim"}, True),
        ({"best_k_models": {"/etc/passwd": 0.1}}, True),
        ({"kept": ["../victim/a.ckpt"]}, True),
        ({"best_model_path": "run/checkpoints/best.ckpt", "monitor": "val"}, False),
        ({"best_model_path": "", "step": 3}, False),
    ],
)
def test_states_of_callbacks_name_files_of_the_run_alone(state, refused):
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    file = folder / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["callbacks"] = {"ModelCheckpoint{'monitor': 'a/b'}": state}
    torch.save(content, file)
    if refused:
        with pytest.raises(ValueError, match=r"ModelCheckpoint.* must go on with files in .*run, "):
            continued(file)
    else:
        assert continued(file)["callbacks"]


def test_places_of_a_resumed_run_are_no_links_and_have_names(configure):
    def positional(config):
        config["logger"]["csv"] = {
            "_target_": "lightning.pytorch.loggers.CSVLogger",
            "_args_": ["/tmp/elsewhere"],
        }

    folder = _stored(positional)
    with pytest.raises(ValueError, match=r"logger.csv must name its arguments, got /tmp/elsewhere"):
        resumed(configure("train", "resume=run"), [])
    shutil.rmtree(folder)
    _stored(lambda config: None)
    Path("victim.txt").write_text("mine")
    (folder / "metrics.json").symlink_to(Path("victim.txt").absolute())
    with pytest.raises(ValueError, match="must lie in its folder, got the link run/metrics"):
        resumed(configure("train", "resume=run"), [])


def test_a_start_without_a_network_is_refused(configure):
    folder = _stored(lambda config: config["module"].pop("velocity"), "config.yaml")
    start = ["module=straightening", "module.start=run", "run_dir=new"]
    with pytest.raises(ValueError, match=r"module\.start must have a network as module\.velocity"):
        train(configure("train", *start))
    (folder / "config.yaml").write_text("data: {}\n")
    with pytest.raises(ValueError, match="run must be a run of `flowkit train` with a flow, got"):
        blockwise(configure("blockwise", "run=run", "run_dir=new"))


def test_arguments_that_do_not_fit_name_their_node():
    with pytest.raises(
        TypeError, match=r"of flowkit.paths.Linear must fit its arguments, got .*no"
    ):
        build({"_target_": "flowkit.paths.Linear", "no": 1})


@pytest.mark.parametrize("part", ["velocity", "autoencoder"])
def test_the_start_of_a_training_is_checked(configure, part):
    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["module"][part] = SYSTEM
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"module of run.{part}._target_: os.system"):
        train(configure("train", "module=straightening", "module.start=run", "run_dir=new"))
    with pytest.raises(ValueError, match=r"run.module\.\w+._target_: os.system"):
        blockwise(configure("blockwise", "run=run", "run_dir=new"))
    assert not CANARY.exists()


def test_a_pickle_is_no_checkpoint():
    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    folder = Path(shutil.copytree(EARLIER / "conditional", "run"))
    (folder / "checkpoints/last.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RuntimeError, match=r"checkpoint must be readable, got .*last.ckpt"):
        load_run(folder)
    assert not CANARY.exists()


# --- trust ------------------------------------------------------------------------------------


class Line:
    """A path of the user."""


OWN = {"_target_": f"{__name__}.Line"}


def test_trust_comes_from_the_call_the_settings_and_never_from_the_run(configure):
    name = OWN["_target_"]
    folder = _with(OWN)
    for file in ("trust.txt", "flowkit/trust.txt", ".config/flowkit/trust.txt"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(name)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "trust": [name]}))
    fix = rf"trust=\[{name}\].*trust=\['{name}'\].*{trust_file()}"
    with pytest.raises(ValueError, match=fix):
        load_run(folder)
    assert type(load_run(folder, trust=[name]).path).__name__ == "Line"
    assert type(Run.load(folder, trust=name).module.path).__name__ == "Line"
    with pytest.raises(ValueError, match=name):  # the trust of one call ends with it
        load_run(folder)
    trust_file().parent.mkdir(parents=True)
    trust_file().write_text(f"# mine\n{name}  # a path\n")
    assert name in trusted()
    assert load_run(folder).weights["step"] == 2
    assert configure("sample", "run=x", f"trust=[{name},oc.env:A]").trust == [name, "oc.env:A"]


@pytest.mark.parametrize("name", ["mypackage.*", "", "os.system()", "a b"])
def test_only_names_are_trusted(name):
    with pytest.raises(ValueError, match="trust must be a list of dotted names"), trusting([name]):
        pass


def test_variables_of_the_environment_stay_references(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    cfg = OmegaConf.create(
        {
            "a": "${oc.env:SECRET}",
            "b": "x/${a}/y",
            "c": "${oc.decode:${oc.env:N,3}}",
            "trust": ["m.N"],
        }
    )
    kept = recorded(cfg)
    assert kept == {"a": "${oc.env:SECRET}", "b": "x/${oc.env:SECRET}/y", "c": 3}
    assert cfg.b == "x/hunter2/y"
    with pytest.raises(ValueError, match=r"c.b: x/\$.*trust=\[oc.env:SECRET\]"):
        build(kept, "c")
    with trusting(["oc.env:SECRET"]):
        assert build(kept)["b"] == "x/hunter2/y"
        monkeypatch.delenv("SECRET")
        with pytest.raises(ValueError, match="SECRET must be set in the environment"):
            build(kept)


# --- the list ---------------------------------------------------------------------------------


def test_all_that_configurations_name_is_listed():
    named = (ROOT / "tests/runs/earlier/targets.txt").read_text().split()
    for file in Path(CONF).rglob("*.yaml"):
        named += re.findall(r"_target_: *([\w.]+)", file.read_text())
    missing = {name for name in named if name != "null" and find(current_name(name)) is None}
    assert missing == set()


def test_all_that_earlier_runs_store_is_free():
    for folder in EARLIER.iterdir():
        if folder.is_dir():
            check(read_config(folder), folder.name)
            check(read_config(folder, "unresolved.yaml"), folder.name, resolved=False)


UNLISTED = ("boss", "diagnosis", "flowopt", "runs")  # nothing of these is a part of a run


def test_each_public_class_is_listed_and_each_name_is_one():
    for module in pkgutil.iter_modules(flowkit.__path__, "flowkit."):
        package = importlib.import_module(module.name) if module.ispkg else None
        for name in getattr(package, "__all__", ()):
            found = getattr(package, name)
            own = isinstance(found, type) and found.__module__.startswith(module.name)
            if own and module.name.rpartition(".")[2] not in UNLISTED:
                assert find(f"{module.name}.{name}") is found, name
    for module, names in NAMES.items():
        for name in names:
            assert callable(find(f"{module}.{name}")), name
    assert find("lightning.pytorch.trainer.trainer.Trainer") is find("lightning.Trainer")


# --- the source -------------------------------------------------------------------------------

MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def _unsafe(call):
    """The rule that a call breaks, or None."""
    name, keys = ast.unparse(call.func), {key.arg: ast.unparse(key.value) for key in call.keywords}
    if name in ("eval", "exec", "__import__", "yaml.load", "os.system", "torch.hub.load"):
        return name
    if name == "torch.load" and keys.get("weights_only") != "True":
        return name
    if name.endswith("Image.open") and "formats" not in keys:
        return name
    return "allow_pickle" if keys.get("allow_pickle", "False") != "False" else None


def _broken(text):
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call) and (rule := _unsafe(node)):
            found.append(rule)
    return found


def test_the_source_reads_nothing_that_runs_code():
    files = [*(ROOT / "flowkit").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 100
    assert {
        file.name: _broken(file.read_text()) for file in files if _broken(file.read_text())
    } == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader)",
        "eval(x)",
        "exec(x)",
        "PIL.Image.open(f)",
    ],
)
def test_the_walk_finds_each_rule(line):
    assert _broken(line)
    assert not _broken("net.eval(); torch.load(f, weights_only=True); Image.open(f, formats=X)")
