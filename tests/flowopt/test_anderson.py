"""Anderson acceleration: linear problems, forgotten pairs."""

import torch

from flowkit.flowopt import FlowOpt
from flowkit.flowopt.anderson import Anderson
from flowkit.sampling import ODESampler
from tests.flowopt.fields import MODES, bimodal, data, linear


def test_anderson_solves_a_linear_problem_in_as_many_steps_as_it_has_dimensions():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    x1 = data()
    plain, fast = (FlowOpt(ODESampler(1), 0.2, 5, anderson=m)(linear(matrix), x1) for m in (0, 4))
    assert (plain.residuals[-1] > 1e-3 * plain.residuals[0]).all()
    assert (fast.residuals[-1] < 1e-9 * fast.residuals[0]).all()


def test_without_memory_the_update_is_the_step():
    history, gradient = Anderson(memory=0), data(2)
    history.remember(gradient, gradient, accepted=torch.tensor([True, True]))
    step = torch.tensor([0.5, 2.0]).double()
    torch.testing.assert_close(history.update(gradient, step), step[:, None] * gradient)


def test_a_rejected_sample_forgets_its_pairs_and_no_other_does():
    history, gradient = Anderson(memory=2), data(2)
    history.remember(gradient, gradient, accepted=torch.tensor([True, False]))
    update = history.update(gradient, torch.tensor([0.1, 0.1]).double())
    torch.testing.assert_close(update[0], gradient[0])  # of g(z) = z, at once
    torch.testing.assert_close(update[1], 0.1 * gradient[1])


def one_by_one(y, step, num_iters):
    """FlowOpt on one sample in one dimension, with one pair: the secant method, damped."""
    sampler = ODESampler(4)
    f = lambda z: sampler(MODES, torch.full((1, 1), z, dtype=torch.float64)).item()  # noqa: E731
    z = sampler.invert(MODES, torch.full((1, 1), y, dtype=torch.float64), correct=True).x.item()
    g, pair, residuals, events = f(z) - y, None, [], []
    for _ in range(num_iters):
        residuals.append(abs(g))
        update = step * g
        if pair is not None:
            share = g / pair[1]
            update = step * (g - share * pair[1]) + share * pair[0]
        trial = z - update
        g_trial = f(trial) - y
        accepted = abs(g_trial) <= abs(g)
        events.append((accepted, pair is not None))
        pair = (trial - z, g_trial - g) if accepted else None
        step *= 1.2 if accepted else 0.5
        z, g = (trial, g_trial) if accepted else (z, g)
    return [*residuals, abs(g)], events


def test_iterations_with_rejections_are_those_of_each_sample_alone():
    x1 = bimodal()[:40].double()
    edit = FlowOpt(ODESampler(4), 3.0, 6, anderson=1)(MODES, x1)
    alone = [one_by_one(y, 3.0, 6) for y in x1[:, 0].tolist()]
    expected = torch.tensor([residuals for residuals, _ in alone]).double().T
    torch.testing.assert_close(edit.residuals, expected, rtol=1e-6, atol=1e-10)
    assert any((False, True) in events for _, events in alone), "a pair was forgotten"
