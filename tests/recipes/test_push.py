"""Pushed folders: the same samples, from anywhere, and refused by name if anything is wrong."""

import ast
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from safetensors.torch import load_file, save_file

from flowkit import grids, hub
from flowkit.hub import results_of
from flowkit.modules import ConditionalFlowMatching, FlowModule, MeanFlowMatching, load_run
from flowkit.modules.card import _use
from flowkit.modules.checkpoints import read_config
from flowkit.nn import ResidualMLP
from flowkit.provenance import tensor_hash, write_json
from flowkit.recipes.push import push
from flowkit.runs import Run, own_grid
from tests.conftest import CONF
from tests.recipes.conftest import status_of

FEW = ["num_samples=4", "sampler.grid=2", "seed=3"]


def pushing(*options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return push(compose("push", overrides=[*FEW, *map(str, options)]))


@pytest.fixture(scope="module")
def pushed(tiny_run, tmp_path_factory):
    """A pushed folder. Tests copy it before they change it."""
    return pushing(f"run={tiny_run}", f"to={tmp_path_factory.mktemp('shared') / 'tiny'}")


@pytest.fixture
def mine(pushed, tmp_path):
    return shutil.copytree(pushed, tmp_path / "mine")


def drawn(module, sampler=None):
    cond = torch.arange(6) + 2
    return module.sample(6, sampler=sampler, cond=cond, seeds=range(6))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed(folder, change):
    """Change config.json, by a function of its content."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    write_json(folder / "config.json", config)
    return folder


# --- the same model -----------------------------------------------------------------------------


def test_a_pushed_folder_gives_the_samples_of_its_run_bit_for_bit(tiny_run, pushed):
    run, shared = load_run(tiny_run), load_run(pushed)
    sampler = run.default_sampler
    assert drawn(run, sampler).equal(drawn(shared, sampler))
    assert shared.weights == run.weights == {"kind": "averaged", "step": 20}
    assert shared.class_names == run.class_names == list("0123456789")
    assert shared.default_sampler.times.tolist() == [0, 0.5, 1]  # that of the push
    assert not any(p.requires_grad for p in shared.parameters())
    assert not shared.training


def test_what_a_pushed_folder_holds(tiny_run, pushed):
    assert {file.name for file in pushed.iterdir()} == {
        *("model.safetensors", "config.json", "samples.png", "README.md")
    }
    text = (pushed / "config.json").read_text()
    config = json.loads(text)
    assert not {"optimizer", "lr_scheduler"} & config["module"].keys()
    assert str(tiny_run.parent) not in text
    assert (
        config["data_record"]["splits"]
        == json.loads((tiny_run / "data.json").read_text())["splits"]
    )
    with Image.open(pushed / "samples.png") as picture:
        assert picture.size == (4 * 66 + 2, 66 + 2 + 12)  # a line of names


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_every_weight_once(dtype, tiny_run, tmp_path):
    run, kind = load_run(tiny_run), getattr(torch, dtype)
    folder = pushing(f"run={tiny_run}", f"to={tmp_path / 'half'}", f"dtype={dtype}")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {kind}
    state = load_run(folder).state_dict()
    assert all(state[k].equal(v.to(kind).float()) for k, v in run.state_dict().items())
    run.save_pretrained(tmp_path / "python", dtype=dtype)
    assert tensor_hash(load_run(tmp_path / "python").state_dict()) == tensor_hash(state)
    assert not all(state[k].equal(v) for k, v in run.state_dict().items())


def test_weights_beyond_half_precision_are_refused(tiny_run, tmp_path):
    module = load_run(tiny_run)
    next(module.parameters()).data[0] = 1e6
    with pytest.raises(ValueError, match="dtype must hold all weights, got float16 and overflow"):
        module.save_pretrained(tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a recipe is run that is imported already
def test_recipes_take_a_pushed_folder_and_leave_it_as_it_is(pushed, tmp_path, monkeypatch, capsys):
    """Alone, in another place; results go to the working folder."""
    place = tmp_path / "elsewhere" / "mine"
    shutil.copytree(pushed, place)
    before = contents(place)
    monkeypatch.chdir(tmp_path)
    few = ["num_samples=20", "batch_size=20"]
    image = tmp_path / "image.png"
    Image.new("L", (8, 8), 90).save(image)
    for words in (
        ["sample", *few, "labels=[3]"],
        ["evaluate", *few, "metric=pixels"],
        ["edit", f"image={image}", "source=3", "target=8", "num_steps=2", "num_iters=1"],
    ):
        assert status_of([words[0], f"run={place}", *words[1:]], monkeypatch) == 0
    capsys.readouterr()
    assert contents(place) == before
    assert results_of(place) != results_of(place.parent / "other" / place.name)
    results = tmp_path / results_of(place)
    assert results.name.startswith("pushed-mine-")
    for name in ("drawn/samples.pt", "metrics.json", "edits/image.png-3-to-8/edit.json"):
        assert (results / name).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "image.png", "runs"]
    record = json.loads((results / "metrics.json").read_text())
    assert record["samples"]["name"] == str(place)
    assert status_of(["train", f"resume={place}"], monkeypatch) == 2
    assert "got the shared model" in capsys.readouterr().err


def test_metrics_and_grids_of_these_weights_are_shared_without_places(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    digest = Run.load(run).weights["hash"]
    metrics = {
        "metrics": {
            "frechet_distance": 2.0,
            "frechet_distance_interval": [1.5, 2.5],
            "class_agreement": 0.9,
            "judge": {"test_accuracy": 0.8},
        },
        "samples": {"name": str(run)},
        "reference": {"num_samples": 180, "name": "Digits, test split"},
        "weights": {"kind": "averaged", "step": 20, "hash": digest},
        "sampling": {"method": "heun", "grid": [0, 1], "guidance": 1.5, "seeds": [0, 100]},
    }
    write_json(run / "metrics.json", metrics)
    (run / "boss").mkdir()
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    grids.save(times, run / "boss" / "grid.json", model_hash=digest)
    grids.save([0.0, 0.2, 0.4, 1.0], run / "boss" / "grid-3.json", model_hash=digest)
    grids.save([0.0, 1.0], run / "boss" / "grid-1.json", model_hash="another")
    folder = pushing(f"run={run}", f"to={tmp_path / 'a'}", "dtype=float16")
    shared = json.loads((folder / "metrics.json").read_text())
    assert shared == {**metrics, "samples": {"name": "run"}}
    card = (folder / "README.md").read_text()
    assert "| Fréchet distance | 2 | 1.5 to 2.5 |" not in card  # it has no other name here
    assert "| frechet distance | 2 | 1.5 to 2.5 |\n" in card
    assert "| class agreement (judge on real test images: 0.8) | 0.9 |  |\n" in card
    for words in ("heun, 1 step", "guidance 1.5", "seeds 0 to 99", "180 of the reference"):
        assert words in card
    assert re.findall(r"file=<folder>/(\S+)", card) == ["grid-2.json", "grid-3.json"]
    assert "Measured before the weights were rounded to float16." in card
    assert "grid-1.json is of other weights" in capsys.readouterr().out
    assert own_grid(2, str(folder)).equal(times)
    assert own_grid(1, str(folder)) is None
    again = Run.load(folder)
    grids.load(folder / "grid-2.json", again.made_with("euler"))  # a warning is an error
    second = pushing(f"run={folder}", f"to={tmp_path / 'b'}")  # of a pushed one
    assert json.loads((second / "metrics.json").read_text()) == shared
    metrics["weights"]["hash"] = "another"
    write_json(run / "metrics.json", metrics)
    third = pushing(f"run={run}", f"to={tmp_path / 'c'}")
    assert not (third / "metrics.json").exists()
    assert "Not measured" in (third / "README.md").read_text()
    assert str(tmp_path) not in "".join(f.read_text() for f in third.glob("*.json"))


STRANGE = "mine: all # of it"


@pytest.mark.parametrize(
    ("license", "front"), [("mit", "mit"), (None, "other"), (STRANGE, STRANGE), ("no", "no")]
)
def test_the_hub_reads_the_front_matter_of_the_card(license, front, tiny_run, tmp_path):
    options = [] if license is None else [f"license={json.dumps(license)}"]
    folder = pushing(f"run={tiny_run}", f"to={tmp_path / 'new'}", *options)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == front
    assert card.data.library_name == "flowkit"
    assert "flow-matching" in card.data.tags
    assert ("No license was given" in card.text) == (license is None)
    again = pushing(f"run={folder}", f"to={tmp_path / 'again'}")
    assert huggingface_hub.ModelCard.load(again / "README.md").data.license == front


@pytest.mark.parametrize("name", ["cat", "big cat", "it's", 'a "b"', "x\\", "a,b]", "日本 {"])
def test_the_commands_of_a_card_name_a_class_as_the_shell_and_python_read_it(name):
    text = _use({"classes": [name]}, "runs/x", [])
    (line,) = (line for line in text.splitlines() if line.startswith("flowkit sample"))
    *_, option = shlex.split(line)
    (override,) = OverridesParser.create().parse_overrides([option])
    assert override.value() == [name]
    (shown,) = re.findall(r"cond=4 \* (\[.*\])", text)
    assert ast.literal_eval(shown) == [name]


# --- names --------------------------------------------------------------------------------------


@pytest.fixture
def fetched(pushed, monkeypatch):
    """What is asked of the hub, which holds a pushed folder."""
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(pushed)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_the_hub_is_fetched_by_its_whole_name(
    fetched, tiny_run, tmp_path, monkeypatch, capsys
):
    shared = load_run("hub:owner/name")
    assert drawn(shared).equal(drawn(load_run(tiny_run), shared.default_sampler))
    assert {name for name, _ in fetched} == {"owner/name"}
    fetched.clear()
    ConditionalFlowMatching.from_pretrained("hub:owner/name", revision="v1", token="t")
    assert fetched[0][1]["revision"] == "v1"
    assert fetched[0][1]["token"] == "t"
    monkeypatch.chdir(tmp_path)
    few = ["num_samples=10", "batch_size=10"]
    assert status_of(["sample", "run=hub:owner/name", *few], monkeypatch) == 0
    capsys.readouterr()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.pt")] == [
        "runs/hub-owner--name/drawn/samples.pt"
    ]
    with pytest.raises(TypeError, match="must hold a MeanFlowMatching, got a Conditional"):
        MeanFlowMatching.from_pretrained("hub:owner/name")


@pytest.mark.parametrize("place", ["owner/name", "owner/nmae", "nowhere"])
def test_a_mistyped_path_is_never_looked_for_on_the_hub(place, fetched, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="run must be a run folder, hub:owner/name or"):
        FlowModule.from_pretrained(place)
    assert status_of(["sample", f"run={place}"], monkeypatch) == 2
    assert "run must be a run folder, hub:owner/name or" in capsys.readouterr().err
    assert not fetched


@pytest.mark.parametrize("name", ["hub:name", "hub:a/b/c", "hub:", "hub:a b/c", "hub:/c"])
def test_malformed_names_of_the_hub(name, fetched, tiny_run):
    with pytest.raises(ValueError, match="must be named hub:owner/name or flowkit:name, got hub:"):
        load_run(name)
    with pytest.raises(ValueError, match="to=hub: must be owner/name on the hub, got"):
        pushing(f"run={tiny_run}", f"to='{name}'")
    assert not fetched


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["push", "to=flowkit:x"],
            "to must be a folder or hub:owner/name, got flowkit:x, the name",
        ),
        (["push", "to=flowkit:x/y"], "to must be a folder or hub:owner/name, got flowkit:x/y, the"),
        (["push", "to=hub:x"], "to=hub: must be owner/name on the hub, got x"),
        (["sample", "out=flowkit:x"], "out must be a folder, got flowkit:x, the name of a shared"),
        (["sample", "out=hub:a/b"], "out must be a folder, got hub:a/b, the name of a shared"),
    ],
)
def test_names_of_models_are_no_places(words, said, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of([*words, f"run={tiny_run}"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # as in other runs
@pytest.mark.parametrize("kind", ["OfflineModeIsEnabled", "RepositoryNotFoundError", "OSError"])
def test_errors_of_the_hub_have_one_line(kind, monkeypatch, capsys):
    errors = {"OSError": OSError("no\nroute")}
    errors["OfflineModeIsEnabled"] = huggingface_hub.errors.OfflineModeIsEnabled("offline\nmode")
    gone = type("RepositoryNotFoundError", (Exception,), {})
    errors["RepositoryNotFoundError"] = gone("404\n\nnot found")

    def fail(*_, **__):
        raise errors[kind]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert status_of(["sample", "run=hub:owner/name"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hub:owner/name must be reachable, got ")


def test_models_of_flowkit_by_their_names(pushed, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    with pytest.raises(ValueError, match="got digits; this flowkit has none"):
        load_run("flowkit:digits")
    shutil.copytree(pushed, tmp_path / "weights" / "digits")
    assert hub.shipped() == ["digits"]
    module = load_run("flowkit:digits")
    assert drawn(module).equal(drawn(load_run(tiny_run), module.default_sampler))
    with pytest.raises(ValueError, match="got digts; did you mean digits"):
        load_run("flowkit:digts")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_command_on_a_model_of_flowkit_writes_to_the_working_folder(
    pushed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "weights")
    shutil.copytree(pushed, tmp_path / "weights" / "digits")
    before = contents(tmp_path / "weights")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    few = ["num_samples=10", "batch_size=10"]
    assert status_of(["sample", "run=flowkit:digits", *few], monkeypatch) == 0
    assert status_of(["sample", "run=flowkit:digts", *few], monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: flowkit: must name a model of flowkit, got digts; did you mean digits?\n"
    )
    assert contents(tmp_path / "weights") == before
    (file,) = (tmp_path / "work").rglob("*.pt")
    assert file.parts[-4:] == ("runs", "flowkit-digits", "drawn", "samples.pt")


# --- sending ------------------------------------------------------------------------------------


class Api:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self, fail=None):
        self.sent, self.fail = [], fail

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if self.fail:
            raise self.fail
        self.sent.append(("repo", repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, **options):
        self.sent.append(("files", repo_id, contents(folder_path), options["commit_message"]))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def api(monkeypatch):
    made = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def test_a_push_to_the_hub_writes_the_folder_first(api, tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    folder = pushing(f"run={run}", "to=hub:owner/name", "private=true", "license=mit")
    assert folder.parent == run / "pushed"
    (_, *repo), (_, name, files, _) = api.sent
    assert (repo, name) == (["owner/name", True], "owner/name")
    assert files == contents(folder)
    assert "flowkit sample run=hub:owner/name" in files["README.md"].decode()
    assert "https://hub/owner/name" in capsys.readouterr().out
    assert drawn(load_run(folder)).isfinite().all()


def test_a_module_is_sent_as_users_of_the_hub_expect(api, tiny_run, tmp_path):
    module = FlowModule.from_pretrained(tiny_run)
    url = module.push_to_hub("owner/name", token="secret", commit_message="first")
    assert url == "https://hub/owner/name"
    assert api.token == "secret"
    files, message = api.sent[-1][2:]
    assert message == "first"
    assert {"model.safetensors", "config.json", "README.md"} == files.keys()
    assert b"secret" not in b"".join(files.values())
    module.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="owner/other")
    assert api.sent[-1][1] == "owner/other"
    with pytest.raises(ValueError, match="repo_id must be owner/name on the hub, got a/b/c"):
        module.push_to_hub("a/b/c")


@pytest.mark.filterwarnings("ignore")
def test_a_push_that_the_hub_refuses_leaves_the_folder(
    api, tiny_run, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    api.fail = huggingface_hub.errors.LocalTokenNotFoundError("no token")
    words = ["push", f"run={run}", "to=hub:owner/name", *FEW]
    assert status_of(words, monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: hub:owner/name must be reachable, got LocalTokenNotFoundError: log in by "
        "`hf auth login`, or give token=\n"
    )
    (folder,) = (run / "pushed").iterdir()
    load_run(folder)


# --- places -------------------------------------------------------------------------------------


def test_a_folder_with_other_weights_or_files_is_left_alone(tiny_run, pushed, tmp_path):
    other = shutil.copytree(tiny_run, tmp_path / "other")
    state = torch.load(other / "checkpoints/last.ckpt", weights_only=True)
    state["state_dict"] = {k: v + 1 for k, v in state["state_dict"].items()}
    torch.save(state, other / "checkpoints/last.ckpt")
    mine = shutil.copytree(pushed, tmp_path / "mine")
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("my notes")
    (tmp_path / "file").write_text("text")
    for place, words in {
        mine: "must be a new folder or hold the same weights, got .* with others",
        own: "must be a new folder or hold the same weights, got .* with README.md",
        other: "must be a new folder or hold the same weights, got",
        tmp_path / "file": "to must be a folder, got the file",
    }.items():
        before = contents(place) if place.is_dir() else place.read_text()
        with pytest.raises((ValueError, NotADirectoryError), match=words):
            pushing(f"run={other}", f"to={place}")
        assert (contents(place) if place.is_dir() else place.read_text()) == before
    with pytest.raises(ValueError, match="save_directory must be a new folder or hold"):
        load_run(tiny_run).save_pretrained(own)
    assert contents(own) == {"README.md": b"my notes"}


def test_a_second_push_of_the_same_weights_keeps_what_the_first_said(tiny_run, mine):
    card = (mine / "README.md").read_bytes()
    before = contents(mine)
    pushing(f"run={tiny_run}", f"to={mine}")
    assert contents(mine).keys() == before.keys()
    (mine / "notes.txt").write_text("mine")
    pushing(f"run={tiny_run}", f"to={mine}", "license=mit")
    assert (mine / "earlier-1" / "README.md").read_bytes() == card
    assert b"license: mit" in (mine / "README.md").read_bytes()
    assert (mine / "notes.txt").read_text() == "mine"


def test_a_run_without_a_checkpoint_is_refused(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has the run saved a checkpoint"):
        pushing(f"run={run}", f"to={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


def test_places_of_this_machine_are_not_shared(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    photos = {"_target_": "flowkit.data.Folder", "root": str(tmp_path), "image_size": 8}
    config["data"] = {**photos, "channels": 1, "more": [{"file": f"{tmp_path}/a.csv"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    folder = pushing(f"run={run}", f"to={tmp_path / 'new'}")
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.glob("*.[jm][sd]*"))
    assert "data.root=<folder of the data>" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"data.root and data.more\[0\].file must be given for"):
        _ = Run.load(folder).data
    module = load_run(tiny_run)
    node = {**module.configuration["module"]}
    node["velocity"] = {**node["velocity"], "file": str(tmp_path)}
    module.configuration = {**module.configuration, "module": node}
    with pytest.raises(ValueError, match=r"no place of this machine, got module.velocity.file="):
        module.save_pretrained(tmp_path / "x")


# --- refusals -----------------------------------------------------------------------------------


def put(*keys, value):
    def change(config):
        node = config
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


WRONG = {
    "time": (put("time", value={"noise": 1, "data": 0}), 'time in .* got {"noise": 1, "data": 0}'),
    "version": (put("format_version", value=2), "format_version in .* must be 1, got 2"),
    "format": (put("format", value="x"), "format in .* must be flowkit"),
    "class": (
        put("module", "velocity", value={"_target_": "os.system", "command": "touch x"}),
        "must name only what flowkit lists or you trust, got module.velocity._target_: os.system",
    ),
    "autoencoder": (
        put("state", "autoencoder", "hash", value="f" * 64),
        "autoencoder must be the one that the flow was made with, hash ffff",
    ),
    "weights": (put("weights", "hash", value="0"), "weights must have the hash in config.json, 0"),
    "shape": (put("state", "sample_shape", value="abc"), "sample_shape in .* must be a list of"),
    "state": (put("state", value={}), "must fit its module, got KeyError"),
    "sampler": (put("sampler", value={}), "must fit its module, got KeyError"),
    "classes": (put("classes", value=["a"]), "classes in .* must be 10 names, got 1"),
    "guidance": (put("guidance", value="x"), "guidance in .* must be a number or null, got 'x'"),
    "data": (lambda config: config.pop("data"), "data in .* must be a mapping or null, got None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_refused_by_name(name, mine):
    change, words = WRONG[name]
    with pytest.raises((ValueError, RuntimeError), match=words):
        load_run(changed(mine, change))
    assert not (mine / "x").exists()


def test_data_of_a_config_build_only_what_is_listed(mine):
    value = {"_target_": "os.system", "command": f"touch {mine}/x"}
    run = Run.load(changed(mine, put("data", value=value)))
    with pytest.raises(ValueError, match=r"or you trust, got data._target_: os.system"):
        _ = run.data
    assert not (mine / "x").exists()
    run = Run.load(changed(mine, put("data", value=None)))
    with pytest.raises(ValueError, match="a shared model without a configuration of data"):
        _ = run.data


def test_json_is_read_to_a_bound(mine):
    (mine / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="file must"):
        read_config(mine)


def altered(state, name):
    first = sorted(state)[0]
    if name == "missing":
        del state[first]
    elif name == "unexpected":
        state["more"] = torch.zeros(1)
    elif name == "of another shape":
        state[first] = torch.zeros(3, 3, 3)
    else:
        state[first] = state[first] + 1
    return first if name != "unexpected" else "more"


@pytest.mark.parametrize("name", ["missing", "unexpected", "of another shape", "hash"])
def test_weights_that_do_not_fit_are_named(name, mine):
    file = mine / "model.safetensors"
    state = load_file(file)
    key = altered(state, name)
    save_file(state, file)
    words = "hash in config.json" if name == "hash" else f"with 1 {name}: {key}"
    with pytest.raises(RuntimeError, match=words):
        load_run(mine)


def test_damaged_and_absent_weights(mine):
    file = mine / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match=r"weights must be readable, got .*model.safetensors"):
        load_run(mine)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors, got none in"):
        load_run(mine)


def test_a_shared_model_has_no_raw_weights_and_no_checkpoints(mine):
    for options in ({"weights": "raw"}, {"checkpoint": "a.ckpt"}):
        with pytest.raises(ValueError, match="a shared model must be loaded as it is, got"):
            load_run(mine, **options)


def test_a_student_starts_from_a_pushed_model(tiny_run, pushed):
    student = MeanFlowMatching(
        ResidualMLP((1, 8, 8), 32, 1, num_classes=10, num_times=2, time_scale=10),
        start=str(pushed),
    )
    student.on_fit_start()
    state, taught = student.state_dict(), load_run(tiny_run).state_dict()
    shared = [name for name, value in taught.items() if any(value.equal(x) for x in state.values())]
    assert len(shared) > len(taught) / 2
