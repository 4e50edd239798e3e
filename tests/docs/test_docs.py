"""Every block of code in the documentation runs; what its machine lacks is composed and checked.

The blocks of a page run from top to bottom in one folder: Python in one namespace, commands in
this process and on tiny sizes. The folder holds what pages may take for granted: a run,
``runs/quickstart``, and a few pictures.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from flowkit.__main__ import main, recipes
from flowkit.data import Digits
from flowkit.places import files_as_option
from tests.conftest import CONF
from tests.docs.small import small

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GALLERY = ROOT / "docs/gallery.md"  # whose commands are composed, and not run
LANGUAGES = {"python", "bash", "yaml", "text"}
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w-]*)( title=\"(?P<file>.*)\")?$"
)

# Folders and files that no page makes: their commands are composed, and not run.
ELSEWHERE = re.compile(
    r"runs/(fashion|big|symmetrical_masks|symmetrical_fashion|symmetrical_latent|xl2)\w*(/.*)?"
    r"|stable-diffusion-3|imagenet|sd_vae|tars|weights-inception.pth|mnist|(hub:)?owner/name"
)
PATHS = (
    "run",
    "resume",
    "module.start",
    "model.latents",
    "autoencoder.path",
    "data.root",
    "data.path",
    "sampler.grid.file",
    "image",
    "mask",
    "pipeline",
    "metric.weights",
    "module.encoder.file",
)


class Block(NamedTuple):
    """A block of code, and the line that it starts at."""

    language: str
    code: str
    line: int
    file: str | None
    """Where a reader is to put it."""


class Command(NamedTuple):
    """A line of a shell."""

    words: list[str]
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, opened, lines = [], None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, lines = (fence, number), []
        elif opened and fence and fence["fence"] == opened[0]["fence"] and not fence["language"]:
            first, line = opened
            found.append(Block(first["language"], "\n".join(lines), line, first["file"]))
            opened = None
        elif opened:
            lines.append(line.removeprefix(opened[0]["indent"]))
    assert opened is None, f"{page}: the block of line {opened[1]} has no end"
    return found


def commands(block: Block) -> list[Command]:
    """The lines of a shell's block, continued ones joined, without comments."""
    code, number, found = block.code.replace("\\\n", " "), block.line, []
    for line in code.splitlines():
        number += 1
        if words := shlex.split(line, comments=True):
            found.append(Command(words, number))
    return found


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def composed(recipe: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=overrides)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_of_languages_that_are_tested(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            written_at_build = target.endswith("commands.md")
            assert written_at_build or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_imports_public_packages_only(page):
    """A reader learns ``flowkit.boss``, never ``flowkit.boss.search``."""
    code = "\n".join(block.code for block in blocks(page) if block.language == "python")
    assert not re.findall(r"(?:from|import) flowkit\.\w+\.\S+", code)


def test_the_command_reference_names_every_recipe_and_option():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.commands()
    for recipe in recipes():
        assert f"## flowkit {recipe}\n" in text
        for key in OmegaConf.load(ROOT / "conf" / f"{recipe}.yaml"):
            assert key in ("defaults", "hydra") or f"{key}:" in text, (recipe, key)


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//", page.read_text()
        )
        assert not fetched, page


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name)
def test_yaml_parses(page):
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.code), f"{name(page)}:{block.line}"


@pytest.mark.parametrize("page", pages_with("bash"), ids=name)
def test_commands_compose(page, monkeypatch):
    """Recipes, options and choices of every command exist, and so do targets and extras."""
    for block in blocks(page):
        for command in commands(block) if block.language == "bash" else []:
            where = f"{name(page)}:{command.line}"
            words = command.words
            if words[0] == "torchrun":
                words = ["flowkit", *words[words.index("flowkit") + 1 :]]
            if words[0] == "flowkit":
                check_command(words[1:], where)
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), where
            elif words[:2] == ["pip", "install"]:
                check_extras(words, where)
            elif words[:2] == ["jupyter", "lab"]:
                assert all((ROOT / path).exists() for path in words[2:]), where
            elif words[0] == "source":
                assert words[1] == ".venv/bin/activate", where  # of the environment that make makes
            elif words[0] == "python":
                assert any(other.file == words[1] for other in blocks(page)), where
            else:
                pytest.fail(f"{where}: no test knows {words[0]}")


def check_command(words: list[str], where: str) -> None:
    if not words or words == ["--help"]:
        return
    recipe, overrides = words[0], [w for w in words[1:] if not w.startswith("--")]
    assert recipe in recipes(), where
    overrides = files_as_option(recipe, overrides)
    own = [w for w in words[1:] if w.startswith("--config-dir")]
    try:
        cfg = composed(recipe, overrides) if not own else None
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error
    if recipe == "compare" and cfg is not None:
        cells = [*cfg.couplings.values(), *cfg.problems.values()]
        for cell in cells:
            composed("train", [*cfg.overrides, *cell])
        composed("evaluate", list(cfg.evaluate))


def check_extras(words: list[str], where: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert f"\n{extra} = [" in text, f"{where}: {extra}"


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    """What pages take for granted."""
    root = tmp_path_factory.mktemp("things")
    data = Digits()
    data.setup()
    images, labels = data.test[:]["x1"], data.test[:]["cond"]
    save_bytes(gray(images[labels == 3][0]), root / "three.png")
    color = torch.nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)
    for kind in ("photos/cats", "photos/dogs", "scenes/images", "scenes/masks"):
        (root / kind).mkdir(parents=True)
    for k in range(120):
        picture = gray(color[k])
        save_bytes(picture, root / "photos" / ("cats", "dogs")[k % 2] / f"{k}.png")
        save_bytes(picture, root / "scenes" / "images" / f"{k}.png")
        save_bytes(picture[:1] // 52, root / "scenes" / "masks" / f"{k}.png")
    (root / "images").mkdir()
    for k in range(60):
        save_bytes(gray(images[k]), root / "images" / f"{k}.png")
    last = gray(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    np.savez(root / "samples.npz", arr_0=last, arr_1=labels.numpy())
    here = Path.cwd()
    os.chdir(root)
    try:
        run(["train", "experiment=digits_cfm", "hydra.run.dir=runs/quickstart"])
    finally:
        os.chdir(here)
    return root


def gray(image: torch.Tensor) -> torch.Tensor:
    return (image * 127.5 + 127.5).byte()


def save_bytes(image: torch.Tensor, file: Path) -> None:
    from PIL import Image

    array = image.permute(1, 2, 0).squeeze(-1).numpy()
    Image.fromarray(array).save(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize(
    "page", [p for p in pages_with("python", "bash") if p != GALLERY], ids=name
)
def test_page_runs(page, things, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    shutil.copytree(things, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    names, resumed = {"__name__": "__page__"}, 0
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.code)
        elif block.language == "python":
            torch.manual_seed(0)
            code = "\n" * block.line + block.code  # so that errors name the page's line
            exec(compile(code, str(page), "exec"), names)
        elif block.language == "bash":
            for command in commands(block):
                if command.words[0] == "python":
                    run_script(command.words[1:])
                elif command.words[0] == "flowkit" and len(command.words) > 1:
                    resumed += any(word.startswith("resume=") for word in command.words)
                    run(command.words[1:], f"{name(page)}:{command.line}", resumed)


def run(words: list[str], where: str = "", resumed: int = 0) -> None:
    """Run a command of the command line in this process, if its data are on the machine."""
    if "--help" in words:
        return
    recipe, given = words[0], words[1:]
    own = [word for word in given if word.startswith("--")]
    given = files_as_option(recipe, [word for word in given if not word.startswith("--")])
    if own:
        config = own[0].partition("=")[2]
        GlobalHydra.instance().clear()
        added = [f"hydra.searchpath=[file://{Path(config).resolve()}]"]
        cfg = composed(recipe, [*added, *given])
    else:
        cfg = composed(recipe, given)
    if elsewhere(recipe, given, cfg, where):
        return
    words = [recipe, *own, *small(recipe, given, cfg, resumed)]
    saved = hydra.main, sys.argv, sys.path[:], dict(os.environ), torch.get_num_threads()
    GlobalHydra.instance().clear()
    try:
        sys.argv = ["flowkit", *words]
        main()
    except SystemExit as error:
        if error.code:
            pytest.fail(f"{where}: flowkit {' '.join(words)}\n{error.code}")
    finally:
        hydra.main, sys.argv, sys.path[:], environment, threads = saved
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        GlobalHydra.instance().clear()


def run_script(words: list[str]) -> None:
    saved = sys.argv
    GlobalHydra.instance().clear()
    try:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = saved
        GlobalHydra.instance().clear()


def elsewhere(recipe: str, given: list[str], cfg: DictConfig, where: str) -> bool:
    """Whether a command needs data, devices or runs that this machine does not have."""
    devices = OmegaConf.select(cfg, "trainer.devices"), cfg.get("devices")
    if cfg.get("device") == "cuda" or any(d not in (None, 1) for d in devices):
        return True
    if OmegaConf.select(cfg, "trainer.strategy") is not None or cfg.get("compile"):
        return True
    data = OmegaConf.to_container(cfg.data, resolve=False) if cfg.get("data") else {}
    data = data.get("images", data)
    target = data.get("_target_", "")
    if target.endswith(".IDX") and data.get("root") is None:
        return not Path("/usr/share/dataset-fashion-mnist").exists() or recipe == "compare"
    if target.endswith(".Hub"):
        return True
    if "dinov2" in str(given) or "xl2" in str(given):
        return True
    if cfg.get("env") == "metaworld" and importlib.util.find_spec("metaworld") is None:
        return True
    # A soundfont, its player and an encoder of texts.
    if "flowsep" in str(given) or "run=flowkit:instruments" in given:
        return True
    if "takin" in str(given):  # voices and an encoder of them
        return True
    if str(cfg.get("to")).startswith("hub:"):
        return True
    if recipe == "compare" and len(cfg.couplings) * len(cfg.problems) > 2:
        return True
    paths = {key: OmegaConf.select(cfg, key, throw_on_missing=False) for key in PATHS}
    if recipe == "pareto":
        paths |= cfg.runs
    for key, path in paths.items():
        if isinstance(path, str) and not Path(path).exists():
            if ELSEWHERE.fullmatch(path):
                return True
            pytest.fail(f"{where}: {key}={path} is made by no command before it")
    return False
