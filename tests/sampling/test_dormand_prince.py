"""Dormand and Prince's method of our own, beside torchdiffeq's: same steps, same states."""

import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.sampling import ODESampler

FIELDS = {
    "gaussian": GaussianFlow(2.0, 0.5),
    "narrow": GaussianFlow(0.0, 0.02),
    "mixture": MixtureFlow(
        torch.ones(3), torch.tensor([[2.0, 0], [-1, 1], [0, -2]]), torch.full((3,), 0.3)
    ),
    "waves": lambda x, t, cond=None: torch.sin(20 * t)[:, None] * x.flip(-1) + 5 * torch.cos(x),
    "at rest": lambda x, t, cond=None: torch.zeros_like(x),
}


def torchdiffeq(field, x, times, tol):
    """One solve an interval, as its own ``dopri5`` makes it; the state and the calls."""
    calls = 0
    for t, end in pairwise(times):

        def velocity(time, y, low=min(t, end), high=max(t, end)):
            nonlocal calls
            calls += 1
            return field(y, time.clamp(low, high).to(y.dtype).expand(len(y)))

        interval = torch.tensor([t, end], dtype=torch.float64)
        x = odeint(
            velocity, x, interval, rtol=tol, atol=tol, method="dopri5",
            options={"step_t": interval[1:]},
        )[-1]  # fmt: skip
    return x, calls


@pytest.mark.parametrize("direction", ["solve", "invert"])
@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("name", FIELDS)
def test_steps_and_states_are_those_of_torchdiffeq(name, tol, direction):
    """Rejected steps included, which "waves" and "narrow" have; all but rounding is the same."""
    field, grid = FIELDS[name], [0.0, 0.3, 1.0]
    sampler = ODESampler(grid, "dopri5", rtol=tol, atol=tol)
    x = torch.randn(32, 2, dtype=torch.float64)
    ours = getattr(sampler, direction)(field, x, callback=lambda step, t, x: None)
    theirs, calls = torchdiffeq(field, x, grid if direction == "solve" else grid[::-1], tol)
    assert ours.nfe == calls
    torch.testing.assert_close(ours.x, theirs, rtol=1e-10, atol=1e-11)
    if tol < 1e-4:
        return
    x = x.float()
    ours = getattr(sampler, direction)(field, x, callback=lambda step, t, x: None)
    theirs, calls = torchdiffeq(field, x, grid if direction == "solve" else grid[::-1], tol)
    assert ours.x.dtype == torch.float32
    assert ours.nfe == calls
    torch.testing.assert_close(ours.x, theirs, rtol=2e-5, atol=2e-4)


def test_the_error_follows_the_tolerances():
    x = torch.randn(64, 2, dtype=torch.float64)
    flow = FIELDS["gaussian"]
    for tol in (1e-4, 1e-6, 1e-8, 1e-10):
        found = ODESampler(1, "dopri5", rtol=tol, atol=tol)(flow, x)
        assert (found - flow.solution(x)).abs().max() < 20 * tol


def test_one_long_step_is_of_order_five():
    """Tolerances so wide that the first step is the whole interval: the formula alone."""
    field = lambda x, t, cond=None: -(x**2) * (1 + t)[:, None]  # noqa: E731
    errors = []
    for h in (0.05, 0.025):
        found = ODESampler([0.0, h], "dopri5", rtol=1.0, atol=1e3).solve(
            field, torch.ones(1, 1, dtype=torch.float64)
        )
        errors.append(abs(found.x.item() - 1 / (1 + h + h * h / 2)))
        assert found.nfe == 8  # the first velocity, one to choose the step, and six stages
    assert math.log2(errors[0] / errors[1]) == pytest.approx(6, abs=0.3)


def test_states_of_any_layout():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    sampler = ODESampler(2, "dopri5")
    found = sampler(FIELDS["gaussian"], x)
    torch.testing.assert_close(found, sampler(FIELDS["gaussian"], x.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(found, FIELDS["gaussian"].solution(x), rtol=1e-4, atol=1e-4)


def test_autocast_leaves_the_state_its_digits():
    """A product of the stages in bfloat16 would cost five digits."""
    x, sampler = torch.randn(64, 3), ODESampler(1, "dopri5", rtol=1e-6, atol=1e-6)
    exact = sampler(FIELDS["gaussian"], x)
    for gradient in (False, True):
        x.requires_grad_(gradient)
        with torch.autocast("cpu", torch.bfloat16):
            found = sampler(FIELDS["gaussian"], x)
        torch.testing.assert_close(found, exact, rtol=0, atol=0 if not gradient else 1e-5)


def test_gradients_of_a_state_that_the_velocity_does_not_see():
    x = torch.ones(2, 3, requires_grad=True)
    ODESampler(2, "dopri5")(lambda x, t, cond: torch.ones(2, 3), x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


@pytest.mark.parametrize("first", [0.0, 0.31, 0.5])
def test_gradients_may_begin_within_a_step(first):
    """Before them states lie in buffers, which the graph must find as they were."""
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def velocity(x, t, cond=None):
        return torch.sin(x) * (theta if t[0] > first else 0.5)

    def end(value):
        with torch.no_grad():
            theta.fill_(value)
        # wide tolerances: as long as they all fit, steps do not depend on theta
        return ODESampler([0.0, 0.3, 0.6, 1.0], "dopri5", rtol=1.0, atol=1.0).solve(
            velocity, x, callback=lambda step, t, x: None
        )

    x = torch.tensor([[0.3], [1.2]], dtype=torch.float64)
    end(0.5).x.sum().backward()
    with torch.no_grad():
        high, low = end(0.5 + 1e-5), end(0.5 - 1e-5)
    assert high.nfe == low.nfe == 24
    slope = (high.x.sum() - low.x.sum()).item() / 2e-5
    assert theta.grad.item() == pytest.approx(slope, rel=1e-8)


def test_an_overflow_of_the_state_shortens_the_step():
    """A guess leaves the range of float32, though every velocity is finite."""
    calls = []

    def velocity(x, t, cond=None):
        calls.append(bool(x.isfinite()))
        sign = (-1) ** len(calls)
        return torch.full_like(x, sign * 3e38) if 2 < len(calls) <= 8 else -0.1 * x

    found = ODESampler(1, "dopri5", rtol=1e-3, atol=1e-3)(velocity, torch.ones(1, 1))
    assert not all(calls)
    assert found.item() == pytest.approx(math.exp(-0.1), rel=1e-3)
