"""Exports: what they hold, that they draw the run's samples without flowkit, and refusals."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard

from flowkit.modules import SymmetricalFlowMatching
from flowkit.runs import export, exporting
from flowkit.sampling import ODESampler, SDESampler
from tests.runs.exported import CLASSES, flow

EULER = ODESampler([0.0, 0.2, 0.7, 1.0])


def exported(kind, folder, format, sampler=EULER, guidance=2.0, **more):
    module = flow(kind)
    classes = CLASSES if module.drop_cond else None
    scale = guidance if module.drop_cond else None
    return module, export(module, folder, format, sampler, scale, classes, **more)


# --- a folder of diffusers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latents", "plain unet", "diffusers dit"])
def test_a_pipeline_of_diffusers_draws_the_images_of_the_module(kind, tmp_path):
    """On other seeds than those of the check, in another order of labels, and as pictures."""
    from diffusers import DiffusionPipeline

    module, record = exported(kind, tmp_path / "out", "diffusers", license="mine: all\nof it")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    labels = torch.tensor([2, 0, 1, 1, 3]) if module.drop_cond else None
    scale = 2.0 if module.drop_cond else None
    expected = module.sample(5, EULER, labels, range(90, 95), scale)
    noise = torch.stack(
        [torch.randn(module.sample_shape, generator=torch.manual_seed(s)) for s in range(90, 95)]
    )
    found = pipeline(labels, 5, noise=noise, output_type="pt").images
    torch.testing.assert_close(2 * found - 1, expected.clamp(-1, 1), rtol=0, atol=1e-5)
    assert found.std() > 0.05
    levels = json.loads((tmp_path / "out" / "model_index.json").read_text())["sigmas"]
    assert levels == pytest.approx([1.0, 0.8, 0.3])
    (picture, *_) = pipeline(labels, 5, noise=noise).images
    if labels is not None:
        with pytest.raises(ValueError, match=r"class_labels must lie in \[0, .*, got \[-1\]"):
            pipeline([-1])
    assert picture.size == tuple(expected.shape[2:])
    assert record["checks"]["largest difference"] < 1e-5
    page = ModelCard.load(tmp_path / "out" / "README.md")
    assert page.data.license == "mine: all\nof it"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_an_older_torch_is_refused_before_the_work(format, folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.8.1+cpu"))
    with pytest.raises(ImportError, match=f"^torch must be 2.9 or later for format={format}, got"):
        exported("plain unet", folder, format)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    with pytest.raises(TypeError, match="sampler must take fixed steps"):
        exported("plain unet", folder, format, SDESampler(4))
    assert not folder.exists()


def test_samples_that_differ_leave_nothing(folder, monkeypatch):
    reader = exporting._reader

    def wrong(format, place):
        draw = reader(format, place)
        return lambda *inputs: draw(*inputs) + 2e-3 * (len(inputs[0]) == 7)

    monkeypatch.setattr(exporting, "_reader", wrong)
    said = r"diffusers must give the samples of the run within 0.001, got a difference of 0.002; no"
    with pytest.raises(ValueError, match=said):
        exported("plain unet", folder, "diffusers")
    assert not folder.exists()


def test_an_export_is_written_again_but_never_over_another(folder):
    exported("plain unet", folder, "diffusers")
    first = {f: f.read_bytes() for f in folder.rglob("*") if f.suffix != ".json" and f.is_file()}
    (folder / "export.json").unlink()  # as a kill before the last file
    (folder / ".export-begun").touch()
    (folder / "README.md.host-1-abc.partial").touch()
    exported("plain unet", folder, "diffusers")
    exported("plain unet", folder, "diffusers")
    assert all(file.read_bytes() == content for file, content in first.items())
    with pytest.raises(ValueError, match=r"same export, got .*, which holds one of another"):
        exported("plain unet", folder, "diffusers", ODESampler(2))
    own = folder.parent / "own"
    own.mkdir()
    (own / "README.md").write_text("mine")  # named like a file of an export
    with pytest.raises(ValueError, match=r"got .*, which holds README.md"):
        exported("plain unet", own, "diffusers")
    assert (own / "README.md").read_text() == "mine"


# --- refusals ----------------------------------------------------------------------------------


REFUSED = {
    "format must be one of diffusers, onnx, torch, got 'tf'": ("labels", {"format": "tf"}),
    "sampler must take fixed steps to be exported, .* got dopri5": (
        "labels",
        {"sampler": ODESampler(1, "dopri5")},
    ),
    "sampler must take fixed steps .* got SDESampler; its steps .* or draw noise": (
        "labels",
        {"sampler": SDESampler(4)},
    ),
    "sampler.grid must run from 0 to 1, got 0.0 to 0.5": (
        "labels",
        {"sampler": ODESampler([0.0, 0.5])},
    ),
    "guidance must be null or 1 for a model that never trained": ("points", {"guidance": 2.0}),
    "guidance must be a number, got '2'": ("labels", {"guidance": "2"}),
    "velocity must be one of UNet2DModel, .* got MLP; format=torch and": (
        "labels",
        {"format": "diffusers"},
    ),
    "velocity must be one of UNet2DModel, .* got MeanVelocity": ("means", {"format": "diffusers"}),
    "sampler must be euler for format=diffusers, got heun; sampler=euler steps=25": (
        "unet",
        {"format": "diffusers", "sampler": ODESampler(3, "heun")},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_file_can_hold_is_refused(message, folder):
    kind, options = REFUSED[message]
    module = flow(kind)
    with pytest.raises((TypeError, ValueError), match=message):
        export(module, folder, **{"classes": CLASSES, **options})
    assert not folder.exists()


def test_other_methods_types_and_shapes_are_refused(folder):
    from flowkit.blockwise import BlockwiseMLP

    module = flow("labels")
    with pytest.raises(TypeError, match=r"module must have weights in float32 .* torch.bfloat16"):
        export(module.bfloat16(), folder, classes=CLASSES)
    module = flow("points")
    module.sample_shape = None
    with pytest.raises(RuntimeError, match="sample_shape must be known"):
        export(module, folder)
    module.velocity = BlockwiseMLP((2,), width=8, edges=2)
    with pytest.raises(TypeError, match=r"velocity must be one network for all times .* Blockwise"):
        export(module, folder)
    module.__class__ = SymmetricalFlowMatching
    with pytest.raises(TypeError, match="SymmetricalFlowMatching, whose states hold labels, too"):
        exporting._check(module, "torch", EULER, None)


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda n: None if n == "onnxscript" else find(n))
    said = r"onnxscript must be installed for format=onnx, got none; pip .*'\.\[export\]'"
    with pytest.raises(ImportError, match=said):
        export(flow("points"), folder, "onnx")


# --- torch.export and ONNX ------------------------------------------------------------------------

MADE = [  # an export takes seconds
    ("points", "torch", "heun"),
    ("labels", "onnx", "ab2"),
    ("means", "torch", "euler"),
    ("latents", "onnx", "euler"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes an export once: module, sampler, folder and record."""
    known = {}

    def make(kind, format, method):
        if (kind, format) not in known:
            folder, sampler = tmp_path_factory.mktemp(kind), ODESampler(EULER.grid, method)
            module, record = exported(kind, folder / format, format, sampler)
            known[kind, format] = module, sampler, folder / format, record
        return known[kind, format]

    return make


def drawn(module, sampler, noise, labels):
    """The data of the module itself."""
    cond, scale = (labels, 2.0) if module.drop_cond else (None, None)
    with torch.no_grad():
        return module.autoencoder.decode(module.solve(noise, sampler, cond, scale).x)


def read_torch(file):
    return torch.export.load(file).module()


def read_onnx(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file)

    def run(*inputs):
        named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        return torch.from_numpy(session.run(None, named)[0])

    return run


READ = {"torch": read_torch, "onnx": read_onnx}


def inside(format, file):
    """The text within a file about it."""
    if format == "onnx":
        import onnx

        return {p.key: p.value for p in onnx.load(file).metadata_props}["flowkit"]
    with zipfile.ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("flowkit.json"))
        return archive.read(name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "format", "method"), MADE)
def test_a_file_draws_the_samples_of_the_module(kind, format, method, made):
    """In batches that the check did not try; and it tells what it is, but not where it was made."""
    module, sampler, folder, record = made(kind, format, method)
    file = folder / record["file"]
    draw = READ[format](file)
    for count in (3, 130):
        noise, labels = torch.randn(count, *module.sample_shape), torch.arange(count).flip(0) % 4
        expected = drawn(module, sampler, noise, labels)
        found = draw(noise, labels) if module.drop_cond else draw(noise)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.05
    told = json.loads(inside(format, file))
    assert told == {key: record[key] for key in told}
    assert told["grid"] == pytest.approx([0.0, 0.2, 0.7, 1.0])
    assert told["classes"] == (CLASSES if module.drop_cond else None)
    content = file.read_bytes()
    assert not [w for w in ("site-packages", os.getcwd(), "exports.py") if w.encode() in content]


@pytest.mark.slow
def test_a_file_holds_its_weights_once(made):
    """Six calls of a network of 140 kB would make 840 kB."""
    module, _, folder, record = made(*MADE[0])
    weights = sum(4 * p.numel() for p in module.parameters())
    assert weights > 130_000
    assert weights < (folder / record["file"]).stat().st_size < weights + 100_000


@pytest.mark.slow
def test_exports_run_where_flowkit_is_not_installed(made, tmp_path):
    """By the lines of their own page, in an environment without flowkit."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/*/site-packages"))
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(here) + "\n")  # no hook of an editable install
    run = partial(
        subprocess.run,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        check=False,
    )
    python = [str(environment / "bin" / "python"), "-I", "-c"]
    assert "No module named 'flowkit'" in run([*python, "import flowkit"], cwd=tmp_path).stderr
    for kind, format, method in [MADE[2], MADE[1], ("latents", "diffusers", "euler")]:
        module, sampler, folder, _ = made(kind, format, method)
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
        pictures = "import numpy\nprint(numpy.stack(images).tolist())"
        code += pictures if format == "diffusers" else "print(data.tolist())"
        result = run([*python, code], cwd=folder)
        assert result.returncode == 0, result.stderr
        noise = torch.randn(3, *module.sample_shape, generator=torch.manual_seed(0))
        expected = drawn(module, sampler, noise, torch.arange(3))
        found, allowed = torch.tensor(json.loads(result.stdout)), 1e-4
        if format == "diffusers":  # bytes
            found, expected = found / 127.5 - 1, expected.clamp(-1, 1).squeeze(1)
            allowed = 1 / 127.5
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
