"""What is refused before a training: pictures that a policy could not see, sizes without a fit."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from flowkit.adapters import DataPrediction, NoisePrediction
from flowkit.audio import PhoneRecognizer, VoiceVelocity
from flowkit.data import Speech
from flowkit.nn import SequenceDiT
from flowkit.nn.embed import SidesError
from flowkit.policies import ActionNormalizer, ImageEncoder, PolicyVelocity
from flowkit.runs.learning import sides_told_by_data, teach


class Train:
    """A split whose images have a shape, or without images."""

    def __init__(self, shape):
        self.shape = shape

    def __getitem__(self, index):
        cond = {"vector": torch.zeros(1, 3)}
        images = {} if self.shape is None else {"image": torch.zeros(1, *self.shape)}
        return {"cond": cond | images}


def taught(encoder, shape):
    """Teach a policy with this encoder; its data have images of this shape."""
    vector = 3 if encoder is None else 8
    net = SequenceDiT((2, 6), width=8, depth=1, heads=2, vector=vector)
    actions, observations = (ActionNormalizer.fit(torch.randn(9, size)) for size in (2, 3))
    policy = PolicyVelocity(net, obs_size=3, encoder=encoder)
    data = SimpleNamespace(actions=actions, observations=observations, train=Train(shape))
    teach(policy, data)
    return policy


def sized(image_size=20, channels=3):
    return ImageEncoder(3, image_size=image_size, channels=channels, size=8, width=4)


class Mean(torch.nn.Module):
    """An encoder of one's own, which takes any number of channels."""

    image_size = 20

    def forward(self, image, obs):
        return image.float().mean((1, 2, 3))[:, None].expand(-1, 8) + obs.sum(1, keepdim=True)


@pytest.mark.parametrize("encoder", [sized(), Mean()])
def test_an_encoder_of_the_images_is_taken(encoder):
    policy = taught(encoder, (3, 20, 20))
    assert not policy.actions.scale.isnan().any()
    cond = {"vector": torch.zeros(1, 3), "image": torch.zeros(1, 3, 20, 20)}
    assert policy.encode(cond)["vector"].shape == (1, 8)
    assert taught(None, None).image_size is None


@pytest.mark.parametrize(
    ("encoder", "shape", "error", "message"),
    [
        (sized(), (3, 16, 16), ValueError, r"model\.encoder\.image_size must be 16, .*, got 20"),
        (sized(), (1, 20, 20), ValueError, r"model\.encoder\.channels must be 1, .*, got 3"),
        (torch.nn.Identity(), (3, 20, 20), ValueError, "encoder must have image_size, the side"),
        (sized(), None, ValueError, "got ImageEncoder for data without images"),
        (None, (3, 20, 20), ValueError, "got NoneType for data with images"),
    ],
)
def test_images_that_an_encoder_does_not_see_are_told_before_the_training(
    encoder, shape, error, message
):
    with pytest.raises(error, match=message):
        taught(encoder, shape)


def test_an_encoder_of_the_image_alone_is_refused():
    encoder = torch.nn.Identity()
    encoder.image_size = 20
    with pytest.raises(TypeError, match=r"model\.encoder must be callable as encoder\(image, obs"):
        taught(encoder, (3, 20, 20))


@pytest.mark.parametrize("wrapped", [lambda net: net, DataPrediction, NoisePrediction])
def test_a_voice_takes_the_recognizer_of_its_data_whatever_it_predicts(wrapped):
    net = SequenceDiT((4, 6), width=8, depth=1, heads=2, frames=8, vector=4, tokens=4)
    voice = VoiceVelocity(net, PhoneRecognizer(4, width=8, codes=4))
    data = Mock(spec=Speech, recognizer=PhoneRecognizer(4, width=8, codes=4))
    assert voice.content.hash != data.recognizer.hash
    teach(wrapped(voice), data)
    assert voice.content.hash == data.recognizer.hash


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [
        ({"frames": 84}, (1, 84, 64), "data.frames must be a multiple of 16 for .*frames=80 or da"),
        ({"frames": 40}, (8, 10, 16), "data.frames must be a multiple of 64 for .*; give .*=64$"),
        ({"image_size": 30}, (1, 30, 30), "data.image_size must be a .* of 16 .*=16 or .*=32$"),
    ],
)
def test_sides_that_do_not_fit_are_told_by_the_option_of_the_data(data, shape, message):
    error = SidesError((2, *shape), 16)
    told = sides_told_by_data(OmegaConf.create(data))
    with pytest.raises(ValueError, match=message) as raised, told:
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("data", "shape"), [({"frames": 80}, (1, 80, 60)), ({"root": "images"}, (1, 30, 30))]
)
def test_sides_that_no_option_decides_on_are_told_by_the_network(data, shape):
    error = SidesError((2, *shape), 16)
    message = r"x must have sides .* of 16 .*shape \(2, 1, "
    told = sides_told_by_data(OmegaConf.create(data))
    with pytest.raises(SidesError, match=message) as raised, told:
        raise error
    assert raised.value is error
    assert error.__cause__ is None


def test_sides_that_a_new_network_cannot_cut_are_told_by_the_option_of_the_data():
    model = {"_target_": "flowkit.nn.DiT", "shape": [1, 30, 30], "patch": 4}
    message = "^data.image_size must be a multiple of 4 for this network, got 30; give .*=28 or .*"
    told = sides_told_by_data(OmegaConf.create({"image_size": 30}))
    with pytest.raises(ValueError, match=message), told:
        instantiate({"net": model})
