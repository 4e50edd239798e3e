"""States in half precision: solved in float32, so that short steps are not lost to rounding."""

import pytest
import torch

from flowkit.exact import GaussianFlow
from flowkit.sampling import FIXED, ODESampler

FLOW = GaussianFlow(2.0, 0.5)
HALF = [torch.bfloat16, torch.float16]


class Network:
    """A velocity that computes in its own dtype: what goes in and comes out is rounded to it."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, x, t, cond=None):
        assert x.dtype == self.dtype
        assert t.dtype == torch.float32
        return FLOW(x.float(), t).to(self.dtype)


def rms(a, b):
    return (a.float() - b).square().mean().sqrt().item()


def solve(method, direction):
    if method == "corrected":
        return lambda n, *args, **kwargs: ODESampler(n).invert(*args, correct=True, **kwargs)
    return lambda n, *args, **kwargs: getattr(ODESampler(n, method), direction)(*args, **kwargs)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("direction", ["solve", "invert"])
@pytest.mark.parametrize("method", [*FIXED, "corrected", "dopri5"])
def test_the_error_is_the_rounding_of_the_result(method, direction, dtype):
    """100 Euler steps of a state in bfloat16 would make it 20 times as large."""
    x = torch.randn(64, 3).to(dtype)
    run, n = solve(method, direction), 100 if method in ("euler", "ab2") else 40
    exact = run(n, FLOW, x.float()).x
    found = run(n, Network(dtype), x, return_path=True)
    assert found.x.dtype == found.path.dtype == dtype
    assert rms(found.x, exact) < 2 * rms(exact.to(dtype), exact)
    assert torch.equal(found.path[0], x)
    assert torch.equal(found.path[-1], found.x)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_the_network_gets_the_condition(method):
    """A constant velocity, whose solve is exact."""
    cond = torch.tensor([1.0, -3.0]).bfloat16()
    found = ODESampler(4, method)(
        lambda x, t, cond: cond[:, None].expand_as(x), torch.zeros(2, 3).bfloat16(), cond
    )
    torch.testing.assert_close(found, cond[:, None].expand(2, 3))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_callbacks_see_and_replace_states_in_float32(method, dtype):
    """A replacement in float32 keeps its digits; one in half precision is taken, too."""
    x, shift = torch.randn(64, 3).to(dtype), 1e-4
    sampler = ODESampler(40 if method != "dopri5" else 5, method)

    def nudge(step, t, state):
        assert state.dtype == torch.float32
        return state + shift

    exact = sampler.solve(FLOW, x.float(), callback=nudge).x
    found = sampler.solve(Network(dtype), x, callback=nudge).x
    assert found.dtype == dtype
    assert rms(found, exact) < 2 * rms(exact.to(dtype), exact)
    known = torch.full_like(x, 0.5)
    last = sampler.solve(Network(dtype), x, callback=lambda step, t, state: known).x
    assert torch.equal(last, known)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_float32_states_take_velocities_in_half_precision(method, dtype):
    x = torch.randn(64, 3)
    sampler = ODESampler(40 if method != "dopri5" else 1, method)
    found = sampler(lambda x, t, cond: FLOW(x, t).to(dtype), x)
    assert found.dtype == torch.float32
    exact = sampler(FLOW, x)
    assert rms(found, exact) < rms(exact.to(dtype), exact)


def test_gradients_reach_a_state_in_half_precision():
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    ODESampler(100)(lambda x, t, cond: -x, x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 - 1 / 100) ** 100))
