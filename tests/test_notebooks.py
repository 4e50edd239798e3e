"""Every notebook runs from top to bottom, in an empty folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from flowkit.data.idx import DEBIAN_FASHION_MNIST
from flowkit.data.instruments import DEBIAN_SOUNDFONT

RENDERS = DEBIAN_SOUNDFONT.is_file() and shutil.which("fluidsynth") is not None
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.enable_socket  # the kernel is spoken to over local sockets
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook machinery
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    if "IDX()" in file.read_text() and not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("dataset-fashion-mnist is missing")
    if "flowkit:instruments" in file.read_text() and not RENDERS:
        pytest.skip("fluidsynth or its soundfont is missing")
    if "flowkit.policies" in file.read_text():
        pytest.importorskip("mujoco")
    kernel = tmp_path / "jupyter" / "kernels" / "here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="here",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises with the cell and its traceback
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_small_and_without_errors(file):
    assert file.stat().st_size < 300_000
    for cell in json.loads(file.read_text())["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
