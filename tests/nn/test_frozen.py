"""Parts that a module uses without training or storing them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from flowkit.autoencoders import KLAutoencoder
from flowkit.blockwise import BlockwiseMLP
from flowkit.modules import BlockwiseFlowMatching, ConditionalFlowMatching, Straightening
from flowkit.modules.autoencoding import Autoencoding, FeatureError
from flowkit.nn import ResidualMLP, autoencoder_kl
from flowkit.nn.frozen import Frozen


class Learner(Frozen, frozen=("guide",)):
    def __init__(self, guide):
        super().__init__()
        self.student, self.guide = nn.Linear(2, 2), guide


class Other(Learner, frozen=("judge",)):
    def __init__(self, guide, judge):
        super().__init__(guide)
        self.judge = judge


def guide():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))


def test_a_frozen_part_is_no_part_to_torch():
    learner = Learner(guide())
    assert sorted(learner.state_dict()) == ["student.bias", "student.weight"]
    assert {id(p) for p in learner.parameters()} == {id(p) for p in learner.student.parameters()}
    assert list(learner.modules()) == [learner, learner.student]
    assert list(learner.buffers()) == []


def test_it_is_frozen_when_assigned_and_stays_so():
    learner = Learner(guide())
    for _ in range(2):
        learner.train().requires_grad_(True)
        assert not any(part.training for part in learner.guide.modules())
        assert not any(p.requires_grad for p in learner.guide.parameters())
        learner.guide = guide()  # another one, later
    x = torch.randn(4, 2)
    assert torch.equal(learner.guide(x), learner.guide(x))  # nothing is dropped out


def test_it_moves_with_its_module():
    learner = Learner(guide()).double()
    assert {p.dtype for p in learner.guide.parameters()} == {torch.float64}
    assert learner.to("meta").guide[0].weight.device.type == "meta"


def test_a_copy_has_a_copy_of_its_own():
    learner = Learner(guide())
    for twin in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert twin.guide is not learner.guide
        assert torch.equal(twin.guide[0].weight, learner.guide[0].weight)
        assert sorted(twin.state_dict()) == ["student.bias", "student.weight"]
        assert not twin.train().guide.training
        twin.double()
        assert twin.guide[0].weight.dtype == torch.float64
        assert learner.guide[0].weight.dtype == torch.float32


def test_an_average_of_weights_leaves_it_alone():
    learner = Learner(guide())
    average = AveragedModel(learner, use_buffers=True)
    before = learner.guide[0].weight.clone()
    nn.init.ones_(learner.guide[0].weight)
    average.update_parameters(learner)
    assert torch.equal(average.module.guide[0].weight, before)


def test_a_class_has_its_parents_frozen_parts_and_none_of_its_childrens():
    other = Other(guide(), nn.Linear(2, 1))
    assert sorted(other.state_dict()) == ["student.bias", "student.weight"]
    assert other.double().guide[0].weight.dtype == other.judge.weight.dtype == torch.float64
    learner = Learner(guide())
    learner.judge = nn.Linear(2, 1)
    assert "judge.weight" in learner.state_dict()


@pytest.mark.parametrize("part", [None, torch.sin, "name"], ids=str)
def test_what_is_no_module_is_kept_as_it_is(part):
    learner = Learner(part).double()
    assert learner.guide is part
    assert "guide" not in learner.state_dict()


VAE = ((1, 8, 8), 8, (1, 2))
MODULES = {
    "autoencoder": lambda: ConditionalFlowMatching(ResidualMLP((2,)), autoencoder=guide()),
    "perceptual": lambda: Autoencoding(
        autoencoder_kl(*VAE), perceptual=FeatureError(nn.Sequential(nn.Conv2d(1, 2, 3)))
    ),
    "encoder": lambda: BlockwiseFlowMatching(
        BlockwiseMLP((2,), edges=2, width=8), nn.Linear(2, 8), encoder_width=8
    ),
    "teacher": lambda: taught(),
    "vae": lambda: KLAutoencoder(autoencoder_kl(*VAE)),
}


def taught():
    module = Straightening(ResidualMLP((2,)))
    module.begin(ConditionalFlowMatching(ResidualMLP((2,))))
    return module


@pytest.mark.parametrize("name", MODULES)
def test_the_frozen_parts_of_the_toolkit(name):
    module = MODULES[name]()
    part = getattr(module, name)
    assert isinstance(part, nn.Module)
    module.train()
    assert not part.training
    assert not any(p.requires_grad for p in part.parameters())
    assert not {id(p) for p in part.parameters()} & {id(p) for p in module.parameters()}
    assert not [key for key in module.state_dict() if key.startswith(name)]
    twin = copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    assert getattr(twin, name) is not part
    assert {x.dtype for x in getattr(twin.double(), name).parameters()} == {torch.float64}
    assert {x.dtype for x in part.parameters()} == {torch.float32}
