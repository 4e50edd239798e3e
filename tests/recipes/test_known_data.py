"""A run knows the data of its training: what has changed since is told, and stops a command."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import Folder
from flowkit.data.splits import partition
from flowkit.modules.checkpoints import read_config
from flowkit.recipes.blockwise import blockwise
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pairs import pairs
from flowkit.recipes.report import report
from flowkit.recipes.train import train
from flowkit.runs import Run
from flowkit.runs.resuming import resumed
from flowkit.runs.splits import as_trained, located, placed, stored_data
from tests.recipes.conftest import TINY, status_of

OPTIONS = ["data=folder", "data.image_size=4", "data.channels=1", "data.test_fraction=0.3"]
SHORT = ["num_samples=40", "sampler.grid=1"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(root, name, levels, start=0):
    (root / name).mkdir(parents=True, exist_ok=True)
    for k, level in enumerate(levels, start):
        Image.new("L", (4, 4), level).save(root / name / f"{k}.bmp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 80 dark images of ape and 80 light ones of bee, in a folder beside them."""
    from hydra import compose, initialize_config_dir

    from tests.conftest import CONF

    place = tmp_path_factory.mktemp("trained")
    write(place / "photos", "ape", range(80))
    write(place / "photos", "bee", range(150, 230))
    options = [*TINY, *OPTIONS, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # the path of the data is relative
        with initialize_config_dir(CONF, version_base="1.3"):
            train(compose("train", overrides=[*options, "data.root=photos", "run_dir=run"]))
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of run and images of its own, as the working folder."""
    shutil.copytree(trained, tmp_path / "here")
    record = tmp_path / "here" / "run" / "data.json"
    record.write_text(record.read_text().replace(str(trained), str(tmp_path / "here")))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def opened(place, **options):
    return Run.load(place / "run", **options).data


def contents(data, split):
    """Gray levels of a split."""
    x1 = data.split(split)[:]["x1"]
    return set(((x1[:, 0, 0, 0] + 1) * 127.5).round().long().tolist())


def test_the_record_holds_classes_files_and_splits(place):
    record = json.loads((place / "run" / "data.json").read_text())
    data = opened(place)
    assert (record["kind"], record["classes"], record["num_classes"]) == (
        "Folder",
        ["ape", "bee"],
        2,
    )
    assert record["preprocessing"] == {"image_size": 4, "channels": 1}
    assert record["root"] == str(place / "photos")
    for name in ("train", "val", "test"):
        files = {file for file, (_, split) in record["files"].items() if split == name}
        assert files == set(data.split(name).names)
        assert record["splits"][name]["fingerprint"] == data.fingerprint(name)
    assert len(record["files"]) == 160


CHANGES = {
    "one file more": (lambda root: write(root, "bee", [99], 500), "1 file added (bee/500.bmp)"),
    "two files less": (
        lambda root: [(root / "ape" / f"{k}.bmp").unlink() for k in (3, 5)],
        "2 files removed (ape/3.bmp, ape/5.bmp)",
    ),
    "a class less": (
        lambda root: shutil.rmtree(root / "ape"),
        "got class ape removed, with 80 files; if this",
    ),
    "other pixels": (lambda root: write(root, "ape", [255] * 3), "3 files changed (ape/0.bmp, "),
    "another name of a class": (
        lambda root: (root / "ape").rename(root / "zebra"),
        "classes zebra, bee instead of ape, bee; 80 files renamed (zebra/0.bmp, ",
    ),
    "a third class": (
        lambda root: write(root, "cow", [7]),
        "classes ape, bee, cow instead of ape, bee; 1 file added (cow/0.bmp)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_told_and_refused(place, change, capsys):
    make, told = CHANGES[change]
    make(place / "photos")
    if change == "a third class":  # its label would be the one that means no label
        for changed in ("refuse", "accept"):
            with pytest.raises(ValueError, match="no other classes than the run, ape, bee, got"):
                opened(place, data_changed=changed)
        return
    with pytest.raises(ValueError, match="data must be those of the run's training, got") as error:
        opened(place)
    assert told in str(error.value)
    assert str(error.value).endswith("; if this is right: data_changed=accept")
    capsys.readouterr()
    accepted = opened(place, data_changed="accept").changes
    assert accepted in told or told in accepted
    assert "data      no number of before can be compared with" in capsys.readouterr().out


def test_accepted_data_keep_splits_and_classes(place):
    before = opened(place)
    held_out, seen = contents(before, "test"), contents(before, "train")
    (place / "photos" / "ape").rename(place / "photos" / "zebra")
    write(place / "photos", "bee", [100, 101, 102], 900)
    data = opened(place, data_changed="accept")
    assert data.class_names == ["zebra", "bee"]
    for name in ("train", "val", "test"):
        level = ((data.split(name)[:]["x1"][:, 0, 0, 0] + 1) * 127.5).round()
        assert torch.equal(data.split(name)[:]["cond"], (level > 90).long())
    assert held_out <= contents(data, "test") <= held_out | {100, 101, 102}
    assert seen <= contents(data, "train") <= seen | {100, 101, 102}
    assert Run.load(place / "run").class_number("bee") == 1  # of the record: nothing is opened


def test_recipes_refuse_and_accept(place, configure):
    root = place / "photos"
    for file in (root / "ape").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    for recipe, options in ((evaluate, SHORT), (report, ["num_samples=40", "nfe=[2]"])):
        cfg = configure(recipe.__name__, "run=run", *options)
        with pytest.raises(ValueError, match="got 80 files changed"):
            recipe(cfg)
    record = evaluate(configure("evaluate", "run=run", *SHORT, "data_changed=accept"))
    assert record["data"]["changes"].startswith("80 files changed (ape/0.bmp, ")
    options = ["resume=run", "trainer.max_steps=3"]
    cfg = configure("train", *options)
    with pytest.raises(ValueError, match="got 80 files changed"):
        train(resumed(cfg, options))
    cfg = configure("train", *options, "data_changed=accept")
    train(resumed(cfg, [*options, "data_changed=accept"]))
    assert opened(place).changes is None  # the run has seen the new pixels
    assert resumed(configure("train", "resume=run"), []).data_changed == "refuse"


def test_the_classifier_of_other_pixels_is_another(place, configure):
    """The distance is measured by a classifier of the pixels that are there."""
    first = evaluate(configure("evaluate", "run=run", *SHORT))["metrics"]
    for name in ("ape", "bee"):
        for file in (place / "photos" / name).iterdir():
            Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    options = ["run=run", *SHORT, "data_changed=accept"]
    other = evaluate(configure("evaluate", *options))["metrics"]
    assert other["features"]["hash"] != first["features"]["hash"]


def test_data_are_found_from_elsewhere_and_in_a_new_place(place, configure, monkeypatch, tmp_path):
    expected = contents(opened(place), "test")
    monkeypatch.chdir(tmp_path)
    assert contents(opened(place), "test") == expected
    (place / "photos").rename(place / "moved")
    with pytest.raises(FileNotFoundError, match=r"got photos; a relative .*; give .* data.root="):
        opened(place)
    assert contents(opened(place, data_root="here/moved"), "test") == expected
    evaluate(configure("evaluate", f"run={place}/run", *SHORT, "data.root=here/moved"))
    write(tmp_path / "other", "ape", range(80))
    with pytest.raises(ValueError, match="got class bee removed, with 80 files"):
        opened(place, data_root="other")
    overrides = [f"resume={place}/run", "data.root=here/moved", "trainer.max_steps=3"]
    cfg = configure("train", f"resume={place}/run")
    assert resumed(cfg, overrides).data.root == "here/moved"
    with pytest.raises(ValueError, match=r"data\.root must be null for data without a folder"):
        stored_data({"_target_": "flowkit.data.Digits"}, root="x")


def test_places_are_given_by_their_options():
    config = {"data": {"font": "???", "query": {"path": "???"}}}
    found, root = placed(config, {"data.root": "a", "data.query.path": "b"})
    assert located(found["data"], None, root) == {"font": "a", "query": {"path": "b"}}
    assert config["data"]["query"] == {"path": "???"}
    for option in ("data.captions", "data.query.file", "data.font.path"):
        with pytest.raises(ValueError, match=f"{option} must be null for data without this place"):
            placed(config, {option: "x"})


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
def test_a_resumed_command_finds_its_data_in_a_new_place(place, monkeypatch, capsys):
    """Though the default data of the command have no root."""
    (place / "photos").rename(place / "moved")
    words = ["train", "resume=run", "trainer.max_steps=3"]
    assert status_of(words, monkeypatch) == 2
    assert "data.root=" in capsys.readouterr().err
    assert status_of([*words, "data.root=moved"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "resuming  run from step " in out
    assert "run       run" in out


def test_blocks_of_a_run_find_its_data_in_a_new_place(place, configure):
    (place / "photos").rename(place / "moved")
    options = ["run=run", "stage=flow", "edges=2", *TINY[2:-1], "trainer.max_steps=1"]
    with pytest.raises(FileNotFoundError, match=r"got photos; a relative .*; give .* data.root="):
        blockwise(configure("blockwise", *options, "run_dir=blocks"))
    blockwise(configure("blockwise", *options, "run_dir=blocks", "data.root=moved"))
    record = json.loads((place / "blocks" / "data.json").read_text())
    assert record["root"] == str(place / "moved")
    write(place / "moved", "bee", [99], 500)
    with pytest.raises(ValueError, match="got 1 file added"):
        blockwise(configure("blockwise", *options, "run_dir=more", "data.root=moved"))


def test_runs_before_splits_by_content_keep_those_by_order():
    """Of tar files and of the hub: their records do not say how they were divided."""
    for name, since in (("Folder", {}), ("Shards", {"split_by": "content"})):
        node = {"_target_": f"flowkit.data.{name}", "root": "x"}
        assert as_trained(node, None)["split_by"] == "order"
        assert as_trained({**node, "split_by": "content"}, None)["split_by"] == "content"
        assert as_trained(node, {"files": {}, **since}) == node
        inner = {"_target_": "flowkit.data.Masks", "images": node}
        assert as_trained(inner, None)["images"]["split_by"] == "order"
    for name in ("Hub", "Shards"):
        node = {"_target_": f"flowkit.data.{name}"}
        assert as_trained(node, {"files": {}})["split_by"] == "order"


def test_students_of_pairs_know_the_data_of_their_teacher(place, configure):
    options = ["run=run", "out=made", "num_noises=8", "batch_size=8", "fine_steps=1"]
    pairs(configure("pairs", *options))
    node = {"_target_": "flowkit.data.Pairs", "root": "made"}
    assert isinstance(stored_data(node), Folder)
    assert isinstance(stored_data(node, root="photos"), Folder)
    write(place / "photos", "bee", [99], 500)
    with pytest.raises(ValueError, match="got 1 file added"):
        stored_data(node)


def test_runs_without_a_record_keep_the_splits_of_their_training(place, capsys):
    """Before version 0.2 a split was made of places in the order of all files."""
    (place / "run" / "data.json").unlink()
    config = (place / "run" / "config.yaml").read_text()
    (place / "run" / "config.yaml").write_text(config.replace("  split_by: content\n", ""))
    assert "split_by" not in read_config(place / "run")["data"]
    data = opened(place)
    names = sorted(f"{c}/{k}.bmp" for c in ("ape", "bee") for k in range(80))
    labels = torch.tensor([0] * 80 + [1] * 80)
    parts = partition(160, [0.05, 0.3], 0, labels)
    assert data.test.names == [names[i] for i in parts[2]]
    assert "changes since the training are not seen: no data.json in" in capsys.readouterr().out
    write(place / "photos", "cow", [7])
    with pytest.raises(
        ValueError, match="must have the 2 classes of the run, got 3: ape, bee, cow"
    ):
        opened(place)


def test_damaged_records_are_named(place):
    file = place / "run" / "data.json"
    record = json.loads(file.read_text())
    for name, value in (("files", {"a": 1}), ("classes", 5), ("splits", [])):
        file.write_text(json.dumps({**record, name: value}))
        with pytest.raises(ValueError, match=rf"{name} in .*data\.json must"):
            opened(place)


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
def test_values_of_a_resumed_run_are_those_of_its_own_parts(
    configure, tmp_path, monkeypatch, capsys
):
    """Also of parts that the command does not have by default; slips name the nearest option."""
    monkeypatch.chdir(tmp_path)
    options = ["data=toy", "data.size=40", "model=mlp", "lr_scheduler=one_cycle", "callback=raw"]
    train(configure("train", *TINY, *options, "trainer.max_steps=2", "run_dir=run"))
    words = ["train", "resume=run", "trainer.max_steps=3"]
    for option, said in (
        ("trainer.max_step=4", "option must exist, got trainer.max_step; did you mean trainer.max"),
        ("data.root=x", "option must exist, got data.root"),
        ("path.sigma=1", "path.sigma must stay as it is when a run is resumed, got path.sigma=1;"),
        ("optimizer.lr=-1", "optimizer.lr must be float > 0, got -1"),
    ):
        assert status_of([*words, option], monkeypatch) == 2
        assert f"error: {said}" in capsys.readouterr().err
    assert status_of([*words, "lr_scheduler.max_lr=0.025"], monkeypatch) == 0
    assert read_config("run")["lr_scheduler"]["max_lr"] == 0.025
