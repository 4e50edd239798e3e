"""Files made to harm: they end in an error that names them, without programs, and within bounds."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file

from flowkit.autoencoders import KLAutoencoder
from flowkit.data import Folder, Latents, MaskFolder, Pairs, Shards, idx
from flowkit.data.mask_folder import read_mask
from flowkit.modules.checkpoints import read_config
from flowkit.provenance import read_json
from flowkit.recipes.edit import read_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture
def programs(monkeypatch):
    """Calls of Ghostscript."""
    calls = []

    def ghostscript(*args, **kwargs):
        calls.append(args)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    return calls


# --- pictures ---------------------------------------------------------------------------------


def test_postscript_by_the_name_of_a_picture_starts_no_program(tmp_path, programs):
    for name in ("images/a.png", "masks/a.png", "plain/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(EPS)
    file = tmp_path / "plain/a.png"
    with pytest.raises(ValueError, match=r"a\.png \(cannot identify image file"):
        Folder(tmp_path / "plain", 8).setup()
    with pytest.raises(ValueError, match=r"a\.png"):
        MaskFolder(tmp_path, 8).setup()
    with pytest.raises(OSError, match="cannot identify"):
        read_mask(file, 8)
    with pytest.raises(ValueError, match=rf"image must be a picture file, got {file}"):
        read_image(file, 3)
    assert programs == []
    with Image.open(file) as picture:  # what the fixture counts
        picture.load()
    assert len(programs) == 1


def test_postscript_in_a_data_set_of_the_hub_starts_no_program(tmp_path, programs):
    datasets = pytest.importorskip("datasets")
    from flowkit.data import Hub

    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": EPS, "path": None}] * 8}, features)
    rows.save_to_disk(tmp_path / "set")
    data = Hub(tmp_path / "set", 8, label_column=None, val_fraction=0.2, test_fraction=0.2)
    with pytest.raises(ValueError, match=r"row \d \(cannot identify"):
        data.setup()
    assert programs == []


# --- tar and gzip files -----------------------------------------------------------------------


def _tar(file, name, content=b"", **header):
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    if header:
        raw = bytearray(file.read_bytes())
        raw[124:136] = b"%011o\0" % header["size"]
        raw[156:157] = header.get("kind", b"0")
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw[:512])
        file.write_bytes(raw)


@pytest.mark.slow  # reads gigabytes of sparse files
@pytest.mark.parametrize(
    ("name", "kind"), [("1.png", b"0"), ("1.cls", b"0"), ("1.png", b"x"), ("1.png", b"L")]
)
def test_a_member_of_gigabytes_is_refused_in_little_memory(tmp_path, name, kind):
    """An image, a label, a header of attributes and a long name that claim 8 GB - 1."""
    _tar(tmp_path / "0.tar", name, b"7", size=2**33 - 1, kind=kind)
    with (tmp_path / "0.tar").open("r+b") as file:
        file.truncate(2**33)  # a sparse file on the disk: the bytes can be read
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"0\.tar"):
        Shards(tmp_path, 8).setup()
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_sparse_member_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("1.cls")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10 * 2**30)}
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"shards must hold images, got no image in .*0\.tar"):
        Shards(tmp_path, 8).setup()


@pytest.mark.parametrize(("name", "value"), [("size", 2**40), ("size", -1), ("shard", 7)])
def test_a_false_index_of_tar_files_is_refused(tmp_path, name, value):
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(20):
            member = tarfile.TarInfo(f"{k}.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    Shards(tmp_path, 8, val_fraction=0.1, test_fraction=0.1).setup()
    from safetensors import safe_open

    with safe_open(tmp_path / "index.safetensors", "pt") as index:
        columns, files = {k: index.get_tensor(k) for k in index.keys()}, index.metadata()  # noqa: SIM118
    columns[name] = torch.full_like(columns[name], value)
    save_file(columns, tmp_path / "index.safetensors", metadata=files)
    data = Shards(tmp_path, 8, val_fraction=0.1, test_fraction=0.1)
    with pytest.raises(ValueError, match=str(value) if name == "size" else "must number a tar"):
        data.setup() or data.test[:1]


def test_a_gzip_file_is_read_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "LARGEST", 1000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match=r"a\.gz must hold at most 1000 bytes"):
        idx.read_idx(tmp_path / "a.gz")


# --- YAML and JSON ----------------------------------------------------------------------------

BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,  # 9^11 values in 400 bytes
        MERGES,
        "a: &a [*a]",
        "a: " + "[" * 10_000 + "]" * 10_000,
        "a: " + "{b: " * 10_000 + "1" + "}" * 10_000,
        "- " * 10_000 + "a",
        "a: !!python/object/apply:os.system ['touch canary']",
        "a: !!python/name:os.system",
        "[1, 2]",
        "a: [",
        "a: \udcff",
    ],
    ids=lambda text: text[:12],
)
def test_a_configuration_is_plain_and_bounded(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"got.* .*config\.yaml"):
        read_config(tmp_path)
    assert not Path("canary").exists()


@pytest.mark.parametrize("depth", [100, 10_000])
def test_json_is_bounded(tmp_path, depth):
    (tmp_path / "a.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=r"got .*a\.json|a\.json$"):
        read_json(tmp_path / "a.json")


def test_a_large_text_file_is_refused_without_being_read(tmp_path):
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match=r"file must have at most 67108864 bytes, got more in"):
        read_config(tmp_path)


def test_numbers_are_those_of_omegaconf(tmp_path):
    """A number written by hand, such as 1e-3, is one."""
    numbers = "1e-3 1E5 -2.5e+3 .5 1. 5 -7 0x1f 1_000 1_0.5 .inf -.inf +1e3 1.0e-3"
    others = "1.0.0 e3 1e 2026-01-31 true null ~ 12:30 yes '1e-3' 1e-3x .e3"
    values = f"{numbers} {others}".split(" ")
    text = "".join(f"k{k}: {value}\n" for k, value in enumerate(values))
    (tmp_path / "config.yaml").write_text(text)
    expected = OmegaConf.to_container(OmegaConf.create(text))
    found = read_config(tmp_path)
    assert found["k0"] == 1e-3
    assert {k: (type(v), v) for k, v in found.items()} == {
        k: (type(v), v) for k, v in expected.items()
    }


# --- places -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "", 3])
def test_shards_lie_in_their_folder(tmp_path, name):
    index = {"autoencoder": {"hash": "x"}, "latent_shape": [1], "image_shape": [1], "source": None}
    shards = {"images": "y", "shards": [{"file": name, "rows": 1}]}
    index |= {"num_classes": None, "class_names": None, "splits": {"train": shards}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    record = {"format": "flowkit-pairs", "version": 1, "shards": [name], "rows_per_noise": 1}
    record |= {"num_classes": None, "x0_is_noise": True, "encoded_by": None, "source": {}}
    (tmp_path / "pairs.json").write_text(json.dumps({**record, "provenance": {}}))
    for data in (Latents(tmp_path), Pairs(tmp_path)):
        with pytest.raises(ValueError, match=f"files must lie in {tmp_path}, got {name!r}"):
            data.setup()


def test_a_mistyped_path_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "diffusers.AutoencoderKL.load_config",
        lambda place, **options: asked.append((place, options)) or 1 / 0,
    )
    with pytest.raises(FileNotFoundError, match=r"got runs/vae; .*on the hub it is path=hub:runs/"):
        KLAutoencoder.from_pretrained("runs/vae")
    Path("runs/vae").mkdir(parents=True)
    for place in ("runs/vae", "hub:owner/vae"):
        with pytest.raises(ZeroDivisionError):
            KLAutoencoder.from_pretrained(place)
    assert asked == [("runs/vae", {"local_files_only": True}), ("owner/vae", {})]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "flowkit", "encode", "--cfg", "job"],
        ["-m", "flowkit.recipes.encode", "--cfg", "job"],  # as Lightning starts processes
        ["-c", "import flowkit.__main__ as m; m.main()", "encode", "--cfg", "job"],
    ],
    ids=lambda command: command[1][:18],
)
def test_a_module_of_the_working_folder_replaces_no_package(tmp_path, command):
    for name in ("hydra", "omegaconf", "pathlib"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\n")
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    safe = ["-P"] if command[0] == "-c" else []  # as the script of the command starts
    done = subprocess.run(
        [sys.executable, *safe, *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "shard_size" in done.stdout
    assert not (tmp_path / "canary").exists()
