"""Anderson acceleration: linear problems, forgotten pairs."""

import torch

from flowkit.flowopt import FlowOpt
from flowkit.flowopt.anderson import Anderson
from flowkit.sampling import ODESampler
from tests.flowopt.fields import data, linear


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
