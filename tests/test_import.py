"""What ``import flowkit`` brings along."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import flowkit

HEAVY = {"scipy", "diffusers", "lightning", "hydra", "omegaconf", "torchmetrics", "ot"}
HEAVY |= {"torchdiffeq", "matplotlib", "sklearn", "PIL", "transformers", "datasets"}


def test_importing_flowkit_loads_torch_and_nothing_heavier():
    script = "import sys, torch; before = set(sys.modules); import flowkit; "
    script += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "flowkit" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", flowkit.__all__)
def test_every_public_name_is_that_of_its_home(name):
    homes = [module for module, names in flowkit._HOMES.items() if name in names]
    if homes:
        home = importlib.import_module(f"flowkit.{homes[0]}")
        assert getattr(flowkit, name) is getattr(home, name)
    elif name != "__version__":
        assert getattr(flowkit, name) is importlib.import_module(f"flowkit.{name}")


def test_public_names_are_found_by_a_fresh_interpreter_and_others_are_refused():
    """Fresh, since whatever was imported before stays on the package."""
    script = "import flowkit; print(*[getattr(flowkit, name) and name for name in dir(flowkit)])"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(flowkit.__all__) <= set(result.stdout.split())
    with pytest.raises(AttributeError, match="module 'flowkit' has no attribute 'sampel'"):
        flowkit.sampel  # noqa: B018


PACKAGES = sorted(
    name for _, name, is_package in pkgutil.iter_modules(flowkit.__path__) if is_package
)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_of_packages_are_listed_once_in_order_and_are_there(package):
    module = importlib.import_module(f"flowkit.{package}")
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_import_is_declared():
    """What the code imports is a dependency or an extra, under the name that the index has."""
    import ast
    import re
    import tomllib
    from pathlib import Path

    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = [
        *project["dependencies"],
        *(r for name in extras if name != "dev" for r in extras[name]),
    ]
    declared = {re.split(r"[<>=\[]", requirement)[0].lower() for requirement in users}
    on_the_index = {"PIL": "pillow", "sklearn": "scikit-learn", "hydra": "hydra-core", "ot": "pot"}
    on_the_index |= {"yaml": "pyyaml", "mlflow": "mlflow-skinny"}
    imported = set()
    for file in [*(root / "flowkit").rglob("*.py"), *(root / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            imported |= {name.partition(".")[0] for name in names}
    third_party = imported - set(sys.stdlib_module_names) - {"flowkit"}
    assert {"torch", "PIL", "ot"} <= third_party
    named = {on_the_index.get(name, name.lower().replace("_", "-")) for name in third_party}
    assert named <= {name.replace("_", "-") for name in declared}


def test_a_velocity_is_found_where_earlier_code_looks_for_it():
    import flowkit
    from flowkit.types import Velocity

    assert Velocity is flowkit.velocity.Velocity is flowkit.Velocity


@pytest.mark.parametrize("name", ["modules", "metrics", "data", "runs", "adapters"])
def test_every_package_is_an_attribute(name):
    script = f"import flowkit; print(flowkit.{name}.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"flowkit.{name}"


def test_a_copy_of_the_package_alone_imports_and_takes_no_strangers_recipes(tmp_path):
    """Beside a user's own folder `recipes`, say."""
    import shutil
    from pathlib import Path

    import flowkit

    shutil.copytree(Path(flowkit.__file__).parent, tmp_path / "flowkit")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("raise SystemExit('ran')")
    script = "import sys, flowkit; print(flowkit.__file__, 'flowkit.recipes' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert result.stdout.split() == [str(tmp_path / "flowkit" / "__init__.py"), "False"]
