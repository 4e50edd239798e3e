"""Regression by the network of a flow: the mean of what a flow keeps apart."""

import pytest
import torch

from flowkit.modules import ConditionalFlowMatching, Regression
from flowkit.nn import MLP
from flowkit.sampling import ODESampler


def two_ways(count=256):
    """Data at −1 and 1, a third of them on the right."""
    sides = torch.where(torch.rand(count, 1) < 1 / 3, 1.0, -1.0)
    return {"x1": sides + 0.05 * torch.randn(count, 1)}


def trained(kind, steps=250):
    torch.manual_seed(0)
    module = kind(MLP((1,), width=32, depth=2))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss(two_ways())["loss"].backward()
        optimizer.step()
    return module


def test_a_flow_keeps_both_ways_and_the_regression_takes_their_mean():
    flow, regression = trained(ConditionalFlowMatching), trained(Regression)
    x = flow.sample(500, ODESampler(20), seeds=range(500))
    assert (x > 0).float().mean().item() == pytest.approx(1 / 3, abs=0.1)
    assert ((x.abs() - 1).abs() < 0.4).float().mean() > 0.9
    answers = regression.sample(5, seeds=range(5))
    assert (answers + 1 / 3).abs().max() < 0.1
    assert answers.std() == 0  # it starts from 0, whatever the noise


def test_the_loss_is_the_masked_mean_square_at_zero():
    asked = []

    def net(x, t, cond):
        asked.append((x, t))
        return torch.full_like(x, 2.0)

    mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    batch = {"x1": torch.tensor([[[1.0, 5.0, 9.0]]]), "mask": mask}
    assert Regression(net).loss(batch)["loss"].item() == pytest.approx((1 + 9) / 2)
    ((x, t),) = asked
    assert (x == 0).all()
    assert (t == 0).all()
