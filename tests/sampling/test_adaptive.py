"""Where and how solvers evaluate: within the ends of a solve, and anew at a velocity's edges."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from flowkit import grids
from flowkit.exact import GaussianFlow
from flowkit.likelihood import log_likelihood
from flowkit.sampling import ADAPTIVE, FIXED, ODESampler
from flowkit.velocity import bind

FLOW = GaussianFlow(2.0, 0.5)
LOW_ORDER = ("fehlberg2", "adaptive_heun", "bosh3")
CASES = [  # methods of low order would take thousands of steps to follow much exactly
    (method, slope, tol)
    for method in ADAPTIVE
    for slope, tol in ((1e-4, 1e-2), (1e-4, 1e-9), (0.3, 1e-2), (0.3, 1e-5), (0.3, 1e-9))
    if not (method in LOW_ORDER and slope == 0.3 and tol < 1e-2)
]
CASES += [(method, slope, 1e-2) for method in FIXED for slope in (1e-4, 0.3)]


def noise():
    return torch.randn(4, 2, dtype=torch.float64)


class Slow:
    """``dx/dt = slope (c + t) x``: a first guess of a step, by ‖x‖ / ‖v‖, is far longer than 1."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, x, t, cond=None):
        return self.slope * (0.1 + t)[:, None] * x

    def solution(self, x, t0, t1):
        return x * math.exp(self.slope * (0.1 * (t1 - t0) + (t1**2 - t0**2) / 2))


class Within:
    """A velocity that refuses times outside of a solve's ends, or of the step it serves."""

    def __init__(self, velocity, low, high, edges=(), steps=False):
        self.velocity, self.low, self.high = velocity, low, high
        self.edges = edges
        if steps:
            self.begin_step = self._begin_step

    def bind(self, cond, grid):
        return self

    def _begin_step(self, left, right):
        self.low, self.high = left, right

    def __call__(self, x, t, cond=None):
        low, high = t.new_tensor([self.low, self.high])  # rounded as the times are
        if not bool(((t >= low) & (t <= high)).all()):
            raise ArithmeticError(f"{t.tolist()} outside of [{low}, {high}]")
        return self.velocity(x, t)


@pytest.mark.parametrize(("method", "slope", "tol"), CASES)
def test_no_evaluation_lies_outside_of_the_solve(method, slope, tol):
    flow, x, grid = Slow(slope), noise(), [0.1, 0.3, 0.7] if slope > 0.1 else [0.0, 1.0]
    sampler = ODESampler(grid, method, rtol=tol, atol=tol)
    low, high = grid[0], grid[-1]
    for dtype in (torch.float64, torch.float32) if tol == 1e-2 else (torch.float64,):
        for direction, ends in (("solve", (low, high)), ("invert", (high, low))):
            start = x.to(dtype)
            for told in ({}, {"edges": [0.05, 0.2, 0.55, 0.9], "steps": True}):
                end = getattr(sampler, direction)(Within(flow, low, high, **told), start).x
                if method in ADAPTIVE:
                    exact = flow.solution(start, *ends)
                    torch.testing.assert_close(end, exact, rtol=30 * tol, atol=30 * tol)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_no_evaluation_of_a_likelihood_lies_outside(method):
    x, grid = 0.1 * noise(), [0.0, 0.1, 0.3, 0.6, 1.0]
    sampler = ODESampler(grid, method, rtol=1e-3, atol=1e-3)
    for steps in (False, True):
        field = Within(Slow(0.01), 0.0, 1.0, edges=[0.2, 0.55], steps=steps)
        value = log_likelihood(sampler, field, x, divergence="exact").value
        growth = 0.01 * (0.1 + 1 / 2)
        start = torch.distributions.Normal(0, 1).log_prob(x * math.exp(-growth)).sum(1)
        torch.testing.assert_close(value, start - 2 * growth, rtol=0, atol=growth / 2)


class Jumps:
    """``dx/dt`` is −x, then 2, then x/2: exactly solved from block to block."""

    edges = (0.3, 0.55)

    def __init__(self):
        self.left = None

    def bind(self, cond, grid):
        return self

    def begin_step(self, left, right):
        self.left = left

    def __call__(self, x, t, cond=None):
        block = sum(self.left >= edge for edge in self.edges)
        return (-x, torch.full_like(x, 2.0), x / 2)[block]


class SilentJumps(Jumps):
    """The same, found by the time, without a word on steps."""

    begin_step = None

    def __call__(self, x, t, cond=None):
        self.left = t[0].item()
        return super().__call__(x, t, cond)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("velocity", [Jumps(), SilentJumps()], ids=["told", "silent"])
def test_adaptive_solves_start_anew_at_edges(velocity, method):
    """A step across a jump would cost the order, or hundreds of evaluations."""
    x = noise()
    exact = (x * math.exp(-0.3) + 2 * 0.25) * math.exp(0.45 / 2)
    sampler = ODESampler(1, method, rtol=1e-7, atol=1e-7)
    solution = sampler.solve(velocity, x)
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=2e-6)
    smooth = sum(
        ODESampler([0.0, end], method, rtol=1e-7, atol=1e-7).solve(lambda x, t, c: -x, x).nfe
        for end in (0.3, 0.25, 0.45)
    )
    assert solution.nfe <= smooth
    if type(velocity) is Jumps:
        torch.testing.assert_close(sampler.invert(velocity, exact).x, x, rtol=0, atol=2e-6)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("direction", ["solve", "invert"])
@pytest.mark.parametrize(("bad", "found"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_a_velocity_that_is_not_finite_is_named_with_its_time(method, direction, bad, found):
    times = []

    def velocity(x, t, cond=None):
        times.append(t[0].item())
        v = -x
        v[1, 0] = torch.where(t[0] == (0.25 if direction == "solve" else 0.75), bad, v[1, 0])
        return v

    sampler = ODESampler([0.25, 0.75], method)
    with pytest.raises(ValueError, match=rf"^velocity must be finite, got {found} at t=0\.[27]5$"):
        getattr(sampler, direction)(velocity, noise())
    assert len(times) == 1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_velocity_that_becomes_nan_on_the_way(method):
    def velocity(x, t, cond=None):
        return torch.where((t > 0.4)[:, None], math.nan, -x)

    bound = bind(velocity)
    with pytest.raises(ValueError, match="velocity must be finite, got NaN at t=") as caught:
        ODESampler(1, method, rtol=1e-4, atol=1e-4)(bound, noise())
    assert 0.4 < float(str(caught.value).split("t=")[1]) <= 1
    assert bound.nfe > 1


def test_tolerances_out_of_reach_are_named():
    with pytest.raises(
        ValueError, match=r"^rtol and atol must be within reach of a velocity in float32, got 1e-10"
    ):
        ODESampler([0.5, 1.0], "dopri5", rtol=1e-10, atol=1e-10)(
            lambda x, t, cond: 1e10 * torch.randn_like(x), torch.zeros(2, 2)
        )


def test_assertions_of_a_velocity_are_its_own():
    def velocity(x, t, cond=None):
        assert t[0] < 0.5, "mine"
        return -x

    with pytest.raises(AssertionError, match="mine"):
        ODESampler(1, "dopri5")(velocity, noise())


# --- devices without float64 ----------------------------------------------------------------------


class WithoutFloat64(TorchFunctionMode):
    """Refuses float64 on the device of the data, as Apple's MPS does; grids stay on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        placed = any(isinstance(value, torch.device) for value in given)
        from_data = any(
            isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in given
        )
        double = isinstance(result, torch.Tensor) and result.dtype == torch.float64
        if double and (placed or from_data):
            raise TypeError("Cannot convert a tensor to float64 on this device")
        return result


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_devices_without_float64_solve_in_float32(method):
    x, sampler = torch.randn(4, 2), ODESampler(grids.uniform(2), method, rtol=1e-3, atol=1e-3)
    exact = sampler(FLOW, x)
    expected = log_likelihood(sampler, FLOW, x, divergence="exact")
    with WithoutFloat64():
        torch.testing.assert_close(sampler(FLOW, x), exact)
        for flow in (FLOW, Jumps()):
            sampler.invert(flow, x, return_path=True)
        found = log_likelihood(sampler, FLOW, x, divergence="exact")
        log_likelihood(sampler, FLOW, x)
        log_likelihood(sampler, FLOW, x.half())
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), expected.value, rtol=1e-4, atol=1e-4)
