"""Mean velocities: exact steps of any size, and the instantaneous velocity for everything else."""

import pytest
import torch

from flowkit import boss, grids
from flowkit.exact import GaussianFlow
from flowkit.guidance import Autoguidance, ClassifierFree
from flowkit.sampling import MeanVelocity, ODESampler
from flowkit.velocity import bind
from tests.exact_means import gaussian_mean

F64 = torch.float64
FLOW = GaussianFlow(torch.tensor([1.5, -0.5], dtype=F64), torch.tensor([0.3, 2.0], dtype=F64))
MEAN = MeanVelocity(gaussian_mean(FLOW))


def _noise(n=7):
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "grid", [1, 2, 5, [0, 0.07, 0.6, 1], grids.power(3, 2.0)], ids=["1", "2", "5", "list", "power"]
)
def test_euler_steps_of_any_size_are_exact(grid):
    x0 = _noise()
    solution = ODESampler(grid).solve(MEAN, x0, return_path=True)
    torch.testing.assert_close(solution.x, FLOW.solution(x0), rtol=0, atol=1e-12)
    times = ODESampler(grid).times.tolist()
    for t, state in zip(times, solution.path, strict=True):
        there = FLOW.mean * t + x0 * ((1 - t) ** 2 + (t * FLOW.std) ** 2).sqrt()
        torch.testing.assert_close(state, there, rtol=0, atol=1e-12)
    assert solution.nfe == len(times) - 1


def test_a_part_of_the_way_is_exact_too():
    x0 = _noise()
    half = ODESampler([0.0, 0.4])(MEAN, x0)
    torch.testing.assert_close(ODESampler([0.4, 1.0])(MEAN, half), FLOW.solution(x0))


@pytest.mark.parametrize("method", ["heun", "midpoint", "rk4", "ab2", "dopri5"])
def test_other_methods_take_the_instantaneous_velocity_and_say_so(method):
    x0, sampler = _noise(), ODESampler(4, method)
    with pytest.warns(UserWarning, match="gives only its instantaneous velocity") as said:
        found = sampler(MEAN, x0)
    assert len(said) == 1
    expected = sampler.solve(FLOW, x0, callback=lambda *_: None).x  # dopri5 stops at each time
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("correct", [0, 2])
def test_inversion_takes_the_instantaneous_velocity(correct):
    x1, sampler = FLOW.solution(_noise()), ODESampler(6)
    with pytest.warns(UserWarning, match="instantaneous"):
        found = sampler.invert(MEAN, x1, correct=correct).x
    torch.testing.assert_close(found, sampler.invert(FLOW, x1, correct=correct).x)


def test_a_call_is_the_instantaneous_velocity():
    x, t = _noise(), torch.linspace(0, 1, 7, dtype=F64)
    torch.testing.assert_close(MEAN(x, t), FLOW(x, t), rtol=0, atol=1e-12)


def test_guided_means_are_combined_means():
    def net(x, t, cond):
        return cond[:, None] * (t[:, 1:] ** 2 + t[:, :1]) * torch.ones_like(x)

    x, cond = torch.zeros(2, 1, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    guided = ODESampler([0.0, 0.5, 1.0])(ClassifierFree(MeanVelocity(net), 3.0, -1.0), x, cond)
    # u(0, ½) = ¼ c, u(½, 1) = 3/2 c, each step ½ long; guidance takes 3 c + 2 for c
    torch.testing.assert_close(guided[:, 0], (3 * cond + 2) * (0.25 + 1.5) / 2)
    weak = MeanVelocity(lambda x, t, cond: 0 * x)
    found = ODESampler(1)(Autoguidance(MeanVelocity(net), weak, 2.0), x, cond)
    torch.testing.assert_close(found[:, 0], 2 * cond)


def test_solves_do_not_share_their_steps():
    x0, inner = _noise(), []

    def net(x, t, cond):  # another solve begins and ends within each call
        if not inner:
            inner.append(x0)
            inner[0] = ODESampler(1)(velocity, x0)
        return MEAN.net(x, t)

    velocity = MeanVelocity(net)
    torch.testing.assert_close(ODESampler([0.0, 0.5, 1.0])(velocity, x0), FLOW.solution(x0))
    torch.testing.assert_close(inner[0], FLOW.solution(x0))


def test_a_bound_velocity_serves_one_solve_after_another():
    x0, bound = _noise(), bind(MEAN)
    torch.testing.assert_close(ODESampler(2)(bound, x0), FLOW.solution(x0))
    with pytest.warns(UserWarning, match="instantaneous"):
        found = ODESampler(3, "heun")(bound, x0)
    torch.testing.assert_close(found, ODESampler(3, "heun")(FLOW, x0))


def test_means_do_not_mix_with_velocities():
    mixed = Autoguidance(MEAN, FLOW, 2.0)
    with pytest.warns(UserWarning, match="instantaneous"):
        found = ODESampler(2)(mixed, _noise())
    torch.testing.assert_close(found, ODESampler(2)(FLOW, _noise()))


@pytest.mark.parametrize("field", [FLOW, MEAN], ids=["velocity", "mean"])
def test_costs_of_guided_velocities_take_the_short_way(field):
    """One evaluation per time, and two rows for guidance; only means need one per step."""
    guided = ClassifierFree(lambda x, t, cond: FLOW(x, t), 2.0, 0.0) if field is FLOW else field
    counted, cond = bind(guided, torch.zeros(3)), torch.zeros(3)

    class Once:
        def __call__(self, x, t, cond=None):
            return counted(x, t, cond)

        def bind(self, cond, grid=None):
            return counted

    boss.step_costs(Once(), _noise(3), 8, cond)
    assert counted.rows == (3 * 8 * 2 if field is FLOW else 3 * (8 + 8 + 36))


def test_costs_of_means_are_those_of_their_steps():
    def net(x, t, cond):  # not the mean of its own velocity: large steps cost something
        return gaussian_mean(FLOW)(x, t, cond) * (1 + (t[:, 1:] - t[:, :1]) ** 2)

    velocity, x0, fine = MeanVelocity(net), _noise(12), grids.uniform(6)
    states = ODESampler(fine).solve(velocity, x0, return_path=True).path
    costs = boss.step_costs(velocity, x0, fine, chunk_size=5)
    for j in range(6):
        for k in range(j + 1, 7):
            step = ODESampler(fine[[j, k]])(velocity, states[j])
            expected = (step - states[k]).square().sum(1).mean()
            torch.testing.assert_close(costs[j, k], expected, rtol=1e-9, atol=1e-14)
    exact = boss.step_costs(MEAN, x0, fine)
    assert (exact[exact.isfinite()] < 1e-20).all()
    found = boss.endpoint_grid(velocity, x0, fine, 2)
    errors = [
        (ODESampler([0.0, m, 1.0])(velocity, x0) - states[-1]).square().sum()
        for m in fine[1:-1].tolist()
    ]
    assert found[1] == fine[1 + int(torch.stack(errors).argmin())]


@pytest.mark.parametrize("net", [MEAN, 3.0, None])
def test_what_is_no_network_of_two_times_is_refused(net):
    with pytest.raises(TypeError, match="net must be a network called as"):
        MeanVelocity(net)
