"""A velocity may return the same memory from every call: no result changes."""

import pytest
import torch
from torch import nn

from flowkit import boss
from flowkit.adapters import from_data_prediction, from_noise_prediction, from_reversed_time
from flowkit.autoencoders import Identity
from flowkit.blockwise import Blockwise
from flowkit.flowopt import FlowOpt, step_bound
from flowkit.guidance import DOUBLED_ROWS, Autoguidance, ClassifierFree
from flowkit.likelihood import log_likelihood
from flowkit.modules import LatentFlowMatching
from flowkit.sampling import ADAPTIVE, FIXED, ODESampler
from flowkit.symmetrical import JointFlow
from flowkit.symmetrical.joint import ImageVelocity, JointField, pack
from flowkit.velocity import bind

pytestmark = [
    pytest.mark.filterwarnings("ignore:grid must hold the edges"),
    pytest.mark.filterwarnings("ignore:step_size must lie below"),
]

NULL = 3
GRID = [0.1, 0.25, 0.3, 0.6, 0.8]  # uneven, without the ends, where predictions are singular
WEIGHT = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def field(x, t, cond=None):
    """A curved field that depends on all its arguments."""
    push = 1.0 if cond is None else 1 + cond[:, None].to(x)
    return torch.tanh(x @ WEIGHT.to(x)) * push + torch.cos(3 * t.to(x))[:, None]


def joint(state, t, cond=None):
    """A field of image and code, on packed states ``(B, C, 2)``."""
    return (
        torch.tanh(state.roll(1, 1) @ WEIGHT.to(state))
        + t.reshape(len(t), -1).sum(1)[:, None, None]
    )


class Reusing:
    """Writes all results to the same memory, which holds NaN during a call."""

    def __init__(self, velocity):
        self.velocity, self.memory = velocity, torch.full((100_000,), torch.nan).double()

    def __call__(self, *arguments):
        v = self.velocity(*arguments).clone()
        self.memory.fill_(torch.nan)
        out = self.memory.view(v.dtype).detach()[: v.numel()].view(v.shape)
        return out.copy_(v)


class Stack:
    """A part of a blockwise flow."""

    def __init__(self, velocity):
        self.net = velocity

    def velocity(self, x, t, cond, h):
        return self.net(x, t, cond)


class Net(nn.Module):
    def __init__(self, velocity):
        super().__init__()
        self.call = velocity

    def forward(self, x, t, cond=None):
        mask = cond["mask"].flatten(1).mean(1)
        return self.call(x.flatten(1), t, mask).view(x.shape)


def twice(f):
    bound = bind(f)
    return bound.wrapped(lambda x, t, cond: 2 * bound(x, t, cond))


def weaker(f):
    """Another field in the same memory."""
    return lambda x, t, cond=None: f(x, t, NULL - cond)


WRAPPERS = {
    "bare": lambda f: f,
    "guided": lambda f: ClassifierFree(f, 2.0, NULL),
    "unconditional": lambda f: ClassifierFree(f, 0.0, NULL),
    "guided in an interval": lambda f: ClassifierFree(f, 2.0, NULL, (0.27, 0.65)),
    "guided twice": lambda f: ClassifierFree(ClassifierFree(f, 2.0, NULL), 1.5, NULL),
    "guided by itself": lambda f: Autoguidance(f, weaker(f), 2.0),
    "guided by guidance": lambda f: Autoguidance(ClassifierFree(f, 2.0, NULL), f, 1.5),
    "guidance of autoguidance": lambda f: ClassifierFree(
        Autoguidance(f, weaker(f), 2.0), 1.5, NULL
    ),
    "bound": twice,
    "reversed time": from_reversed_time,
    "noise": from_noise_prediction,
    "data": from_data_prediction,
    "guided data": lambda f: ClassifierFree(from_data_prediction(f), 2.0, NULL),
    "blockwise": lambda f: Blockwise(None, [Stack(f)] * 3, [0.0, 0.3, 0.6, 1.0]),
    "guided blocks": lambda f: ClassifierFree(
        Blockwise(None, [Stack(f)] * 3, [0.0, 0.3, 0.6, 1.0]), 2.0, NULL
    ),
}
# Through these a solver sees the memory itself, through the others a new tensor.
HANDED_ON = ["bare", "unconditional", "guided in an interval", "blockwise"]
every = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
some = pytest.mark.parametrize("wrap", [WRAPPERS[name] for name in HANDED_ON], ids=HANDED_ON)


def state(batch=5):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 2, dtype=torch.float64, generator=generator)
    return x, torch.arange(batch) % 3


def assert_same(run, wrap=lambda f: f, f=field):
    """Compare the results of a field with those of the same field in one memory."""
    torch.testing.assert_close(run(wrap(Reusing(f))), run(wrap(f)), rtol=0, atol=0, equal_nan=False)


@every
@pytest.mark.parametrize("method", [*FIXED, "corrected", "fixed point"])
def test_solves(wrap, method):
    x, cond = state()

    def run(velocity):
        with torch.no_grad():
            if method in ("corrected", "fixed point"):
                correct = 1 if method == "corrected" else 3
                found = ODESampler(GRID).invert(
                    velocity, x, cond, correct=correct, return_path=True
                )
                return found.x, found.path
            sampler = ODESampler(GRID, method, rtol=0.1, atol=0.1)
            there = sampler.solve(velocity, x, cond, return_path=True)
            back = sampler.invert(velocity, x, cond, callback=lambda step, t, x: None)
            return there.x, there.path, back.x

    assert_same(run, wrap)


@every
@pytest.mark.parametrize("batch", [6, DOUBLED_ROWS + 6])
def test_times_of_their_own(wrap, batch):
    x, cond = state(batch)
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)
    assert_same(lambda velocity: velocity(x, t, cond).clone(), wrap)


@some
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_likelihoods(wrap, divergence):
    x, cond = state()

    def run(velocity):
        generator = torch.Generator().manual_seed(0)
        sampler = ODESampler([0.0, 0.3, 0.6, 1.0], "midpoint")
        return log_likelihood(sampler, velocity, x, cond, divergence, 2, generator)

    assert_same(run, wrap)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_solves(method):
    x, cond = state()
    sampler = ODESampler(GRID, method, rtol=0.1, atol=0.1)

    def run(velocity):
        back = sampler.invert(velocity, x, cond, callback=lambda step, t, x: None)
        return sampler(velocity, x, cond), back.x

    assert_same(run)


@some
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_boss(wrap, method):
    x, cond = state(7)
    fine = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)

    def run(velocity):
        two = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
        accurate = ODESampler(torch.linspace(0.1, 0.9, 17, dtype=torch.float64), "heun")
        costs = [
            boss.step_costs(velocity, x, fine, cond, method=method, reference=reference)
            for reference in (None, accurate)
        ]
        end = boss.endpoint_grid(velocity, x, fine, 3, cond, method=method)
        pieces = boss.segments(velocity, x, fine, two, cond, method=method)
        scores = boss.score_grids(
            velocity, x, {"two": two}, cond, method=method, reference=accurate
        )
        return *costs, end, pieces["x0"], pieces["x1"], torch.tensor(scores["two"])

    assert_same(run, wrap)


@some
def test_flowopt(wrap):
    x, cond = state()
    mask = torch.tensor([0.0, 0.5]).double()

    def run(velocity):
        sampler = ODESampler(GRID)
        found = [
            FlowOpt(sampler, 0.2, 6, anderson=2)(velocity, x, cond),
            FlowOpt(sampler, 0.02, 4, backtrack=False)(velocity, x, cond, 2 - cond, mask=mask),
            FlowOpt(ODESampler(GRID, "heun"), 0.1, 3)(velocity, x, cond, 2 - cond),
        ]
        return [part for edit in found for part in (edit.z, edit.trace, edit.residuals)]

    assert_same(run, wrap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_measured_steps(dtype):
    x, cond = state()

    def run(velocity):
        velocity = Autoguidance(velocity, weaker(velocity), 2.0)
        bound = step_bound(
            velocity, ODESampler(4), x.to(dtype), cond, generator=torch.Generator().manual_seed(0)
        )
        edit = FlowOpt(ODESampler(4), num_iters=3)(velocity, x.to(dtype), cond)
        return bound.bound, bound.cosine, edit.z, edit.residuals, edit.step_size

    assert_same(run)


@pytest.mark.parametrize("method", ["heun", "dopri5"])
@pytest.mark.parametrize("shape", [(4,), (4, 2)], ids=["class", "mask"])
def test_images_with_labels(method, shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=generator)
    y = torch.randn(5, *shape, dtype=torch.float64, generator=generator)
    sampler = ODESampler(GRID, method, rtol=0.1, atol=0.1)

    def run(network):
        one, two = JointFlow(network, two_times=False), JointFlow(network)
        known = torch.arange(5) > 1
        labeled = ImageVelocity(
            two,
            lambda cond: (
                cond[:, None].expand(y.shape)
                if y.ndim == 2
                else cond[:, None, None].expand(y.shape),
                torch.zeros(5),
            ),
        )
        guided = ClassifierFree(labeled, 2.0, 0.5)
        field = JointField(two, 3, y.ndim, across=True, scale=2.0)
        with torch.no_grad():
            return (
                one.solve_images(sampler, x, y, known, scale=2.0).x,
                one.solve_codes(sampler, x, y).x,
                two.solve_codes(sampler, x, y).x,
                *two.solve_pairs(sampler, x, y),
                sampler(guided, x, torch.arange(5).double()),
                sampler(field, pack(x, y)),
            )

    assert_same(run, f=joint)


def test_inpainting():
    images = torch.rand(3, 1, 1, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mask = torch.tensor([1.0, 0.0]).expand(3, 1, 1, 2)

    def run(velocity):
        module = LatentFlowMatching(Net(velocity), Identity())
        module.sample_shape = (1, 1, 2)
        return module.inpaint(images, mask, 2, ODESampler(5, "ab2"), seeds=range(6))

    assert_same(run)
