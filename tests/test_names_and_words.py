"""What holds of all files: names that are public, and the style of docstrings."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

import flowkit
import flowkit.conf
import flowkit.recipes

ROOT = Path(__file__).parents[1]
PACKAGE = Path(flowkit.__file__).parent
CONF = Path(flowkit.conf.__path__[0])
RECIPES = Path(flowkit.recipes.__path__[0])


def _is_public(name):
    """Whether a dotted name is one that its package lists, or its root module defines openly.

    An attribute of a public class is public, such as ``KLAutoencoder.from_pretrained``.
    """
    _, module, *attributes = name.split(".")
    if not attributes:
        return module in flowkit.__all__ or (PACKAGE / module).with_suffix(".py").is_file()
    home = importlib.import_module(f"flowkit.{module}")
    listed = getattr(home, "__all__", None)
    if listed is None:
        listed = [a for a in vars(home) if not a.startswith("_")]
    return attributes[0] in listed and not any(a.startswith("_") for a in attributes)


def _targets():
    for file in sorted(CONF.rglob("*.yaml")):
        for name in re.findall(r"_target_: [\"']?(flowkit\.[\w.]+)", file.read_text()):
            yield file.relative_to(CONF), name


def _sources():
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(file.read_text())["cells"]:
            yield file.name, "".join(cell["source"])
    for file in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        yield str(file.relative_to(ROOT)), file.read_text()


def _imported(text):
    """The names that are imported from flowkit, in code or in a block of code."""
    for module, names in re.findall(r"from (flowkit[\w.]*) import (\([^)]*\)|[^\n]*)", text):
        for name in re.sub(r"#.*", "", names).strip("()").split(","):
            if name.strip():
                yield f"{module}.{name.split()[0]}"
    yield from re.findall(r"^\s*import (flowkit\.[\w.]+)", text, re.MULTILINE)


def test_what_is_public():
    assert _is_public("flowkit.sampling.ODESampler")
    assert _is_public("flowkit.grids.uniform")
    assert _is_public("flowkit.ODESampler")
    assert _is_public("flowkit.autoencoders.KLAutoencoder.from_pretrained")
    assert not _is_public("flowkit.sampling.ode.ODESampler")
    assert not _is_public("flowkit.checks._check_number")
    assert not _is_public("flowkit.sampling.anything")
    text = "from flowkit.nn import (\n    MLP,  # plain\n    DiT as D,\n)\nimport flowkit.grids\n"
    assert [*_imported(text)] == ["flowkit.nn.MLP", "flowkit.nn.DiT", "flowkit.grids"]


def test_configurations_name_only_public_names():
    found = list(_targets())
    assert len(found) > 50
    assert not [(str(file), name) for file, name in found if not _is_public(name)]


def test_notebooks_and_documents_import_only_public_names():
    found = [(where, name) for where, text in _sources() for name in _imported(text)]
    assert {where for where, _ in found} >= {"README.md", "CONTRIBUTING.md"}
    assert not [pair for pair in found if not _is_public(pair[1])]


def test_advice_names_extras_and_no_package_of_an_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [file for folder in (PACKAGE, RECIPES) for file in folder.rglob("*.py")]
    files += [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    texts = [file.read_text() for file in (*files, *(ROOT / "notebooks").glob("*.ipynb"))]
    found = [name for text in texts for name in re.findall(r"install\(['\"](\w+)['\"]\)", text)]
    for text in texts:
        assert "flowkit-fm[" not in text
        for names in re.findall(r"['\"]\.\[([\w,]+)\]['\"]", text):
            found += names.split(",")
    assert {"audio", "export", "hub", "robots"} <= set(found)
    assert set(found) <= set(project["optional-dependencies"])


def _docstrings(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, ast.get_docstring(node) or ""


@pytest.mark.parametrize("folder", [PACKAGE, RECIPES], ids=["flowkit", "recipes"])
def test_docstrings_say_what_is_done_and_no_sentence_ends_in_nothing(folder):
    """No question words at their start, and no "is none" but in "there is none"."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node, text in _docstrings(file):
            if folder == PACKAGE and re.match(r"(What|How|Where|Whether|Which|Who)\b", text):
                found.append(f"{file.name}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}")
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if re.search(r"(?<!there )\b(is|are) none\b", line):
                found.append(f"{file.name}:{number} {line.strip()}")
    assert not found, "\n".join(found)
