"""Features of DINOv2, CLIP and of any network, on small networks."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from flowkit.metrics import NetworkFeatures, Pretrained, image_metrics, pretrained, to_uint8
from flowkit.metrics.kernels import cmmd, gaussian, kernel_distance
from flowkit.provenance import tensor_hash
from tests.metrics.samples import normal

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}


def small(kind):
    torch.manual_seed(0)
    if kind == "dinov2":
        config = transformers.Dinov2Config(hidden_size=16, image_size=28, **SIZES)
        return transformers.Dinov2Model(config)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, image_size=28, projection_dim=4, intermediate_size=8, **SIZES
    )
    return transformers.CLIPVisionModelWithProjection(config)


@pytest.mark.parametrize(("kind", "side"), [("dinov2", 224), ("clip", 28)])
def test_features_are_those_of_the_makers_processing(kind, side, tmp_path):
    """Bytes, resized, normalized by color; the class token or the image embedding."""
    net = small(kind)
    net.save_pretrained(tmp_path / "net")
    features = pretrained(kind, tmp_path / "net")
    images = normal(3, 3, 40, 33, dtype=torch.float32).clamp(-1, 1)
    values = F.interpolate(
        to_uint8(images) / 255, (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    names = {"dinov2": "IMAGENET_DEFAULT", "clip": "OPENAI_CLIP"}
    mean, std = (
        torch.tensor(getattr(transformers.image_utils, f"{names[kind]}_{name}"))[:, None, None]
        for name in ("MEAN", "STD")
    )
    with torch.no_grad():
        found = net.eval()(pixel_values=(values - mean) / std)
    exact = found.last_hidden_state[:, 0] if kind == "dinov2" else found.image_embeds
    torch.testing.assert_close(features(images), exact, rtol=1e-5, atol=1e-5)
    gray = images[:, :1]
    torch.testing.assert_close(features(gray), features(gray.expand(-1, 3, -1, -1)))
    assert features.name == f"{kind}-16-at-{side}"
    assert features.hash == tensor_hash(net.state_dict())
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1 or 3, H, W\), got"):
        features(images[:, :2])


def test_only_clip_has_cmmd():
    train, test, fake = normal(3, 20, 3, 9, 9).float().clamp(-1, 1)
    features = Pretrained(small("clip"), "clip")
    record = image_metrics(train, test, fake, features)
    sets = [F.normalize(features((to_uint8(x) / 127.5 - 1).float()).double()) for x in (fake, test)]
    assert record["cmmd"] == pytest.approx(cmmd(*sets), rel=1e-3)
    value, ends = kernel_distance(*sets, kernel=gaussian)
    assert record["cmmd_unbiased"] == pytest.approx(1000 * value, rel=1e-3)
    assert record["cmmd_unbiased_interval"] == pytest.approx([1000 * end for end in ends], rel=1e-3)
    assert "cmmd" in record["floor"]
    assert "cmmd" not in image_metrics(train, test, fake, Pretrained(small("dinov2"), "dinov2"))


def test_missing_and_other_networks_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a dinov2 network, got None"):
        pretrained("dinov2", None)
    with pytest.raises(ValueError, match="give a folder of it, or hub:openai/clip-vit-large"):
        pretrained("clip", None)
    with pytest.raises(FileNotFoundError, match="weights must be a folder or hub:owner/name, got"):
        pretrained("clip", tmp_path / "none")
    small("dinov2").save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=r"must hold a clip network, got .*type dinov2.* publish"):
        pretrained("clip", tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold a dinov2 network, got .* makers publish"):
        pretrained("dinov2", tmp_path / "net")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold a dinov2 network, got .* makers publish"):
        pretrained("dinov2", tmp_path / "empty")


def test_any_network_gives_features():
    """Of data of any shape, in evaluation mode, with a name and the hash of its weights."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.9), nn.Unflatten(1, (2, 2)))
    features = NetworkFeatures(net)
    sound = normal(70, 5, dtype=torch.float32)  # more than a batch
    torch.testing.assert_close(features(sound), net[0](sound).detach())
    assert (features.name, features.hash) == ("Sequential", NetworkFeatures(net).hash)
    assert not features(sound).requires_grad
    with pytest.raises(TypeError, match="net must be a torch module, got function"):
        NetworkFeatures(lambda x: x)
    with pytest.raises(ValueError, match=r"net must return features \(3, F\), got \(15,\)"):
        NetworkFeatures(nn.Flatten(0))(sound[:3])


class Power(nn.Module):
    """No weights; a buffer that is not stored, and a power that nothing prints."""

    def __init__(self, power=1, shift=0.0):
        super().__init__()
        self.power = power
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x):
        return x.flatten(1) ** self.power + self.shift


class Same(Power):
    """Another class with other code."""


def test_networks_of_the_same_weights_have_hashes_of_their_own():
    """So that no features of one are taken from a cache for the other."""

    config = OmegaConf.load("conf/metric/network.yaml")
    config.device = "cpu"

    def of(kind="Power", **settings):
        config.network = {"_target_": f"{__name__}.{kind}", **settings}
        return instantiate(config)(None)

    nets = [of(), of(power=3), of(power=1), of(kind="Same"), of(shift=0.5)]
    assert of(power=3)(torch.full((1, 1), 2.0)).item() == 8
    assert len({net.hash for net in nets}) == 5
    assert of(power=3).hash == nets[1].hash
    first, second, third = (NetworkFeatures(Power(shift=x)).hash for x in (0.0, 1.0, 0.0))
    assert first == third != second
    pools = [NetworkFeatures(nn.AvgPool2d(2, stride=k)).hash for k in (1, 2)]
    assert pools[0] != pools[1]
    config._recursive_ = True
    with pytest.raises(TypeError, match=r"node of the configuration, got Power; .* _recursive_"):
        of()
