"""Networks of blocks: transformers and perceptrons."""

import math

import pytest
import torch

from flowkit import grids
from flowkit.blockwise import BlockwiseDiT
from flowkit.blockwise.dit import rotary, rotate
from flowkit.sampling import ODESampler
from tests.blockwise.small_flows import FLOWS, randomised, tiny_dit


@pytest.mark.parametrize("name", FLOWS)
def test_features_act_on_the_velocity_and_its_loss_on_the_trunk(name):
    make, shape = FLOWS[name]
    flow = randomised(make()).requires_grad_(True)
    x, t = torch.randn(2, *shape), torch.rand(2)
    cond = torch.arange(2) if name == "dit" else None
    flow(x, t, cond).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for p in flow.trunk.blocks.parameters() if p.ndim > 1
    )


@pytest.mark.parametrize("name", FLOWS)
def test_a_fresh_network_is_zero(name):
    make, shape = FLOWS[name]
    flow = make()
    cond = torch.arange(4) % 3 if name == "dit" else None
    x, t = torch.randn(4, *shape), torch.rand(4)
    assert not flow(x, t, cond).any()
    assert not flow.feature_residual(x, t, cond).any()
    assert flow.trunk.features(x, t, cond).any()


def test_segments_differ_in_depth_width_and_steps():
    flow = randomised(
        tiny_dit(edges=[0, 0.3, 0.6, 1], stack_depth=[1, 2, 3], stack_width=[16, 32, 16])
    )
    assert [len(stack.blocks) for stack in flow.stacks] == [1, 2, 3]
    assert sorted(flow.trunk.heads) == ["16", "32"]
    x0, cond = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    grid = grids.blockwise(flow.edges, [1, 2, 3])
    ODESampler(grid)(flow, x0, cond)
    assert [flow.usage.calls[f"stacks.{m}"] for m in range(3)] == [1, 2, 3]


def test_the_residual_may_see_the_start():
    flow = randomised(tiny_dit(sees_start=True, feature_mode="fra"))
    x0, cond = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    h = flow.trunk.features(x0, torch.zeros(2), cond)
    residual = flow.feature_residual
    a, b = residual(x0, torch.ones(2), cond, h), residual(x0, torch.ones(2), cond, 2 * h)
    assert not torch.allclose(a, b)
    fra = ODESampler(6)(flow, x0, cond)
    flow.feature_mode = "cached"
    assert not torch.equal(fra, ODESampler(6)(flow, x0, cond))


def test_rotary_products_depend_on_relative_positions_alone():
    cos, sin = rotary((4, 5), 16)
    q, k = torch.randn(2, 16)
    turned_q, turned_k = (rotate(a.expand(20, 16), cos, sin) for a in (q, k))
    product = (turned_q @ turned_k.T).reshape(4, 5, 4, 5)
    for row, column in ((1, 0), (0, 1), (2, 3)):
        a = product[0, 0, row, column]
        torch.testing.assert_close(product[1, 1, row + 1, column + 1], a, rtol=1e-4, atol=1e-4)
    assert (product[0, 0, 1, 0] - product[0, 0, 0, 1]).abs() > 1e-2
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(20))


@pytest.mark.parametrize("size", [4, 16, 64])
def test_rotary_angles_are_those_of_base_10000(size):
    """Rows turn the pairs ``(i, i + size/4)`` of the first half, columns those of the second."""
    quarter, x = size // 4, torch.randn(size, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary((3, 7), size))
    for row, column in ((0, 0), (2, 1), (1, 6)):
        expected = x.clone()
        for half, position in enumerate((row, column)):
            for i in range(quarter):
                a, b = 2 * quarter * half + i, 2 * quarter * half + i + quarter
                turn = position * 10_000.0 ** (-i / quarter)
                expected[a] = x[a] * math.cos(turn) - x[b] * math.sin(turn)
                expected[b] = x[b] * math.cos(turn) + x[a] * math.sin(turn)
        found = rotate(x, cos[7 * row + column], sin[7 * row + column])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"patch": 3}, "patch must divide the image size 8x8, got 3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide the width 32, got 3"),
        ({"heads": 16}, "width / heads must be a multiple of 4, got 32 / 16"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"stack_width": 0}, "stack_width must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"trunk_depth": 0}, "trunk_depth must be at least 1, got 0"),
        ({"stack_depth": [1, 0, 1]}, "stack_depth must be at least 1, got 0"),
        ({"residual_depth": 0}, "residual_depth must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(option, message):
    sizes = {"edges": 3, "width": 32, "heads": 2, "trunk_depth": 1, "stack_depth": 1}
    with pytest.raises(ValueError, match=message):
        BlockwiseDiT((1, 8, 8), **{**sizes, **option})
