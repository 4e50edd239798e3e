"""InceptionV3: outputs, resizing, names by the hash of the weights; against torch-fidelity."""

import hashlib
import json
import math
import os
import subprocess
import venv

import pytest
import torch

from flowkit.metrics import (
    Features,
    Inception,
    InceptionV3,
    Pixels,
    SeveralOutputs,
    StoredFeatures,
    image_metrics,
    inception,
    outputs_of,
    to_uint8,
)
from flowkit.metrics.inception import SHA256, resize
from tests.metrics.samples import normal
from tests.test_architecture import ROOT, _copy_of_the_checkout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def network(weights):
    return inception(weights)


def test_outputs_are_the_layers_of_adm(network):
    """Of bytes in three equal channels; spatial features in the order row, column, channel."""
    gray = 3 * normal(1, 1, 20, 30, dtype=torch.float32)  # clamped
    seen = {}
    for name in ("Conv2d_1a_3x3", "Mixed_6d", "Mixed_7c"):
        network.net.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    found = network.outputs(gray)
    pixels = (resize(to_uint8(gray).float(), 299) - 128) / 128
    torch.testing.assert_close(seen["Conv2d_1a_3x3"][0], pixels.expand(-1, 3, -1, -1))
    features = seen["Mixed_7c"][1].mean((2, 3))
    torch.testing.assert_close(found["features"], features)
    torch.testing.assert_close(found["logits"], features @ network.net.fc.weight.T)
    spatial = found["spatial"].reshape(17, 17, 7)
    for row, column, channel in ((3, 5, 6), (16, 0, 2)):
        assert spatial[row, column, channel] == seen["Mixed_6d"][1][0, channel, row, column]
    assert isinstance(network, Features)
    assert isinstance(network, SeveralOutputs)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1 or 3, H, W\), got"):
        network(torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(("height", "width", "side"), [(5, 9, 7), (8, 3, 8), (2, 2, 5), (1, 30, 4)])
def test_resizing_is_that_of_tensorflow_1(height, width, side):
    image = normal(1, 1, height, width)

    def value(row, column):
        y, x = row * height / side, column * width / side
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        at = image[0, 0]
        upper = at[top, left] * (1 - x + left) + at[top, right] * (x - left)
        lower = at[bottom, left] * (1 - x + left) + at[bottom, right] * (x - left)
        return upper * (1 - y + top) + lower * (y - top)

    exact = torch.tensor([[value(row, column) for column in range(side)] for row in range(side)])
    torch.testing.assert_close(resize(image, side)[0, 0], exact, rtol=1e-12, atol=1e-12)


def test_only_the_published_weights_give_fid(weights, network):
    assert network.hash == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network.name == "inception-v3 of other weights"
    assert network.distance_name == "Fréchet distance"
    published = Inception(network.net, SHA256)
    assert (published.name, published.distance_name) == ("inception-v3", "FID")


def test_the_file_is_named_with_its_size_hash_and_place(tmp_path):
    told = r"6726825d\.pth \(95,628,359 bytes, SHA-256 6726825d0af5\w{52}\) at https://github\.com"
    for given in (None, tmp_path / "none.pth"):
        with pytest.raises(ValueError, match=f"weights must be a file .* got {given}; .*{told}"):
            inception(given)
    torch.save({"scale": Pixels()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=f"weights must hold tensors only, got .*{told}"):
        inception(tmp_path / "code.pth")
    for other in ({"fc.weight": torch.zeros(2)}, torch.zeros(3)):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=f"must hold the tensors of InceptionV3, got .*{told}"):
            inception(tmp_path / "other.pth")


class Small:
    """Stands for Inception: features, spatial features and logits of the pixels."""

    name, hash, family, distance_name = "small", "0", "inception", "FID"

    def outputs(self, images):
        flat = images.flatten(1)
        return {"features": flat[:, :3], "spatial": flat[:, 3:5] ** 2, "logits": 9 * flat[:, :4]}

    def __call__(self, images):
        return self.outputs(images)["features"]


def test_records_hold_what_the_outputs_allow(tmp_path):
    from flowkit.metrics import Moments, frechet_distance, inception_score, prdc

    train, test, fake = normal(3, 40, 1, 3, 3).float() / 3
    record = image_metrics(train, test, fake, StoredFeatures(Small(), tmp_path), extrapolate=True)
    assert json.loads(json.dumps(record)) == record
    saved = [outputs_of(Small(), to_uint8(x).float() / 127.5 - 1) for x in (train, test, fake)]
    spatial = [Moments() for _ in saved]
    for moments, outputs in zip(spatial, saved, strict=True):
        moments.update(outputs["spatial"])
    exact = [frechet_distance(x["spatial"], saved[1]["spatial"]) for x in saved]
    assert record["spatial_frechet_distance"] == pytest.approx(exact[2], rel=1e-5)
    assert record["floor"]["spatial_frechet_distance"] == pytest.approx(exact[0], rel=1e-5)
    assert record["distance_name"] == "FID"
    score = inception_score(saved[2]["logits"])
    assert (record["inception_score"], record["inception_score_std"]) == pytest.approx(score)
    near = prdc(saved[1]["features"], saved[2]["features"], 3)  # as ADM
    assert (record["neighbors"], record["precision"], record["recall"]) == (3, near[0], near[1])
    low, high = record["frechet_distance_infinity_interval"]
    assert low < record["frechet_distance_infinity"] < high
    assert record["left_out"] == {}
    plain = image_metrics(train, test, fake, Pixels())
    assert plain["neighbors"] == 5
    assert plain["distance_name"] == "Fréchet distance"
    assert not {"inception_score", "frechet_distance_infinity", "cmmd"} & plain.keys()


ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
from unittest.mock import MagicMock
import torch
from flowkit.metrics import InceptionV3, frechet_distance, image_metrics, inception
from flowkit.metrics import inception_score, outputs_of, pretrained, prdc
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

found = {"torchvision": importlib.util.find_spec("torchvision") is not None}
torch.manual_seed(0)
net = InceptionV3()
for module in net.modules():
    if isinstance(module, torch.nn.Conv2d):
        torch.nn.init.kaiming_normal_(module.weight)
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.5, 1.5)
torch.save(net.state_dict(), "inception.pth")
images = torch.randint(0, 256, (36, 3, 20, 24), dtype=torch.uint8)
images[12:24] //= 2
unit = images.float() / 127.5 - 1
network = inception("inception.pth")
record = image_metrics(*unit.split(12), network)
found["record"] = {name: record[name] for name in ("distance_name", "num_samples", "num_reference")}
sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
Dinov2Model(Dinov2Config(hidden_size=16, image_size=28, **sizes)).save_pretrained("dinov2")
small = CLIPVisionConfig(hidden_size=16, image_size=28, projection_dim=4, **sizes)
CLIPVisionModelWithProjection(small).save_pretrained("clip")
for kind in ("dinov2", "clip"):
    features = pretrained(kind, kind)
    record = image_metrics(*unit.split(12), features)
    found[kind] = [features(unit).shape[1], record["frechet_distance"], record.get("cmmd")]

# torch-fidelity imports torchvision for other networks and data; what is compared does not use it.
for name in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
    sys.modules["torchvision" + name] = MagicMock()
for name in ("CIFAR10", "CIFAR100", "STL10"):
    setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], "inception.pth")
ours, (features, logits) = outputs_of(network, unit), theirs(images)
found["features"] = ((ours["features"] - features).abs().max() / features.abs().max()).item()
found["logits"] = ((ours["logits"] - logits).abs().max() / logits.abs().max()).item()

def fid(a, b):
    return fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)

torch.manual_seed(1)
a, b = torch.randn(300, 20).double(), 0.8 * torch.randn(250, 20).double() + 0.3
low = a @ torch.randn(20, 7).double() @ torch.randn(7, 20).double()  # singular
for name, x, y in (("full", a, b), ("singular", low, b), ("few", a[:15], b[:9])):
    their = fid(x, y)["frechet_inception_distance"]
    found[f"fid {name}"] = frechet_distance(x, y) / their - 1
their = isc_features_to_metric(4 * a, 7, False)
own = inception_score(4 * a, 7)
found["isc"] = [x / their[f"inception_score_{name}"] - 1 for name, x in zip(("mean", "std"), own)]
found["prc"] = [list(prdc(b, a, 3)[:2]), list(calculate_precision_recall_full(a, b, 3))]
Path("found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.enable_socket
def test_the_extra_in_an_empty_environment_agrees_with_torch_fidelity(tmp_path):
    """Nothing needs torchvision. torch-fidelity is installed without what it needs."""
    checkout = _copy_of_the_checkout(tmp_path / "checkout")
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
    constraints = ROOT / "constraints.txt"
    (torch_version,) = (x for x in constraints.read_text().split() if x.startswith("torch=="))
    pip = (python, "-m", "pip", "install", "--quiet", "-c", str(constraints))
    fidelity = ("--no-deps", "torch-fidelity==0.4.0")
    (tmp_path / "script.py").write_text(ELSEWHERE)
    for command in (
        (*pip, torch_version),
        (*pip, f"{checkout}[fid]"),
        (*pip, *fidelity),
        (python, "script.py"),
    ):
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["torchvision"] is False
    assert found["record"] == {
        "distance_name": "Fréchet distance",
        "num_samples": 12,
        "num_reference": 12,
    }
    assert found["features"] < 2e-6
    assert found["logits"] < 2e-6
    for name in ("full", "singular", "few"):
        assert abs(found[f"fid {name}"]) < 1e-6
    assert max(map(abs, found["isc"])) < 1e-9
    assert found["prc"][0] == pytest.approx(found["prc"][1], abs=1e-6)
    for kind, size in (("dinov2", 16), ("clip", 4)):
        assert found[kind][0] == size
        assert math.isfinite(found[kind][1])
    assert found["clip"][2] > 0
    assert found["dinov2"][2] is None
