"""Objectives of FlowOpt: masks, operators, refusals."""

from dataclasses import replace

import pytest
import torch

from flowkit.flowopt import FlowOpt
from flowkit.flowopt.objectives import choose
from flowkit.sampling import ODESampler
from tests.flowopt.fields import CENTERED, LEFT, MIDDLE, RIGHT, Mean, data, linear, steered


def test_the_region_is_the_targets_and_the_rest_the_sources():
    x1 = data(5, 4) * 0.5
    x1[:, 0] += 2
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    edit = FlowOpt(ODESampler(10), "auto", 40)(steered, x1, RIGHT, LEFT, mask=mask)
    assert (edit.residuals[-1] < 1e-9).all()
    torch.testing.assert_close(edit.x[:, 2:], x1[:, 2:])
    assert (edit.x[:, 0] < 0).all()
    torch.testing.assert_close(edit.x[:, :2], edit.trace[0][:, :2])
    rmse = (edit.trace - x1)[..., 2:].square().mean(-1).sqrt()
    torch.testing.assert_close(edit.residuals, rmse)


@pytest.mark.parametrize("pull", [-50.0, 50.0])
def test_a_step_is_measured_outside_of_the_region(pull):
    """The free element moves the other one by 50 times as much, which no update uses."""
    field = linear([[1.0, pull], [0.0, 1.0]])
    flowopt = FlowOpt(ODESampler(1), num_iters=1, backtrack=False)
    edit = flowopt(
        lambda x, t, cond: field(x, t) + cond,
        data(4, 2),
        MIDDLE,
        RIGHT,
        mask=torch.tensor([0.0, 1.0]),
    )
    torch.testing.assert_close(edit.step_size, torch.ones(4).double())
    assert (edit.residuals[1] < 1e-7 * edit.residuals[0]).all()


def test_distance_counts_the_region_too():
    x1 = data(5, 4) * 0.5 + torch.tensor([2.0, 0, 0, 0]).double()
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    flowopt = FlowOpt(ODESampler(10), 0.5, 20, distance=1.0)
    edit = flowopt(steered, x1, RIGHT, LEFT, mask=mask)
    assert (edit.residuals[-1] < 1e-2).all()
    assert ((edit.trace - x1).square().mean(-1).sqrt() > 1.0).all()
    assert set(edit.status) == {"iterations"}


def test_an_empty_region_is_none_and_a_fraction_weighs():
    x1 = data()
    flowopt = FlowOpt(ODESampler(5), 0.5, 4)
    plain, empty = flowopt(CENTERED, x1), flowopt(CENTERED, x1, mask=torch.zeros(3))
    torch.testing.assert_close(plain.x, empty.x)
    torch.testing.assert_close(plain.residuals, empty.residuals)
    region = torch.tensor([True, False, False])
    assert torch.equal(
        flowopt(CENTERED, x1, mask=region).x, flowopt(CENTERED, x1, mask=1.0 * region).x
    )
    half = flowopt(CENTERED, x1, mask=torch.full((1, 3), 0.5))
    most = flowopt(CENTERED, x1, mask=torch.full((1, 3), 0.75))
    torch.testing.assert_close(half.residuals[0], plain.residuals[0])
    for found, step in ((half, 0.25), (most, 0.125)):  # the share that is to stay
        weaker = replace(flowopt, step_size=step)(CENTERED, x1)
        torch.testing.assert_close(found.x, weaker.x)


def test_the_second_derivative_of_a_mask_is_its_weight():
    mask, x = torch.tensor([0.75, 0.5, 0.0]), data()
    torch.testing.assert_close(
        choose(data(), mask, None).normal(x), x * torch.tensor([0.25, 0.5, 1])
    )


def test_an_operator_matches_measurements_alone():
    x1 = data(5, 4)
    flowopt = FlowOpt(ODESampler(10), "auto", 80)
    edit = flowopt(steered, x1, MIDDLE, RIGHT / 4, operator=Mean())
    assert (edit.residuals[-1] < 1e-9).all()
    torch.testing.assert_close(Mean()(edit.x), Mean()(x1))
    assert not torch.allclose(edit.x, x1, atol=1e-3)
    torch.testing.assert_close(
        edit.residuals,
        (Mean()(edit.trace.flatten(0, 1)) - Mean()(x1).repeat(81, 1))
        .square()
        .mean(-1)
        .sqrt()
        .reshape(81, 5),
    )
    # the update stays in the range of the adjoint
    change = edit.z - ODESampler(10).invert(steered, x1, MIDDLE, correct=True).x
    torch.testing.assert_close(change[:, ::2], change[:, 1::2])


def test_an_operator_that_hides_is_a_region():
    class Hide:
        def __call__(self, x):
            return x[:, 1:]

        def adjoint(self, y):
            return torch.cat([torch.zeros_like(y[:, :1]), y], 1)

    x1, flowopt = data(), FlowOpt(ODESampler(5), 0.7, 5)
    mask = torch.tensor([1.0, 0.0, 0.0])
    a = flowopt(CENTERED, x1, operator=Hide())
    b = flowopt(CENTERED, x1, mask=mask)
    torch.testing.assert_close(a.x, b.x)
    torch.testing.assert_close(a.residuals, b.residuals)


def test_masks_and_operators_that_do_not_fit():
    flowopt, x1 = FlowOpt(ODESampler(2), 0.5, 1), data()
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        flowopt(CENTERED, x1, mask=[1, 0, 0])
    with pytest.raises(ValueError, match=r"mask must lie in \[0, 1\], got nan"):
        flowopt(CENTERED, x1, mask=torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match=r"mask must broadcast to x1, \(6, 3\), got \(4,\)"):
        flowopt(CENTERED, x1, mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"mask must lie in \[0, 1\], got 2.0"):
        flowopt(CENTERED, x1, mask=torch.tensor([0.0, 2.0, 0.0]))
    with pytest.raises(ValueError, match=r"mask must lie in \[0, 1\], got -1.0"):
        flowopt(CENTERED, x1, mask=torch.tensor([0.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match=r"mask must be below 1 somewhere in every sample"):
        flowopt(CENTERED, x1, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must be below 1 somewhere in every sample"):
        flowopt(CENTERED, x1, mask=(torch.arange(6)[:, None] == 2).double())
    with pytest.raises(ValueError, match="mask must be None with an operator, got both"):
        flowopt(CENTERED, x1, mask=torch.ones(3), operator=Mean())

    class Wrong(Mean):
        def adjoint(self, y):
            return y

    with pytest.raises(
        ValueError, match=r"operator.adjoint\(operator\(x1\)\) must have the shape of x1"
    ):
        flowopt(CENTERED, data(4, 4), operator=Wrong())
