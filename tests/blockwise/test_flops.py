"""Counted and predicted FLOPs."""

import pytest
import torch

from flowkit.blockwise import (
    BlockwiseDiT,
    Flops,
    count_flops,
    part_flops,
    predicted_gain,
    step_prices,
    used_flops,
)
from flowkit.nn import DiT
from flowkit.sampling import ODESampler
from tests.blockwise.small_flows import randomised, tiny_dit


def test_flops_of_a_small_transformer_by_hand():
    net = DiT((1, 8, 8), patch=2, width=32, depth=3, heads=2, num_classes=3)
    x, t, cond = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    tokens, w = 16, 32
    block = 2 * tokens * 12 * w**2 + 2 * 6 * w**2
    ends = 2 * tokens * (4 * w + 4 * w) + 2 * (256 * w + w**2) + 2 * 2 * w**2
    expected = Flops(2 * (3 * block + ends), 2 * 3 * 4 * tokens**2 * w)
    assert count_flops(net, x, t, cond) == expected
    assert count_flops(net.to("meta"), *(a.to("meta") for a in (x, t, cond))) == expected


def test_what_a_solve_computes_is_counted_from_calls():
    flow = randomised(tiny_dit(feature_mode="fra"))
    x0, cond = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    parts = part_flops(flow, x0, cond)
    assert set(parts) == {"trunk", "feature_residual", "stacks.0", "stacks.1", "stacks.2"}
    sampler = ODESampler(9)
    sampler(flow, x0, cond)
    predicted = used_flops(flow.usage, parts)
    assert count_flops(sampler, flow, x0, cond) == predicted
    fra = predicted.total
    flow.usage.clear()
    flow.feature_mode = "full"
    sampler(flow, x0, cond)
    full = used_flops(flow.usage, parts).total
    assert full / fra == pytest.approx(predicted_gain(parts, 3))
    first, later = step_prices(parts, 0)
    assert fra == 4 * 3 * (first + 2 * later)
    assert step_prices(parts, 0, "full") == (first, first)


@pytest.fixture(scope="module")
def xl():
    """The published XL/2 on the meta device, and what its parts take."""
    with torch.device("meta"):
        flow = BlockwiseDiT((4, 32, 32), num_classes=1000, residual_depth=4)
        x, cond = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long)
    return flow, part_flops(flow, x, cond)


def _millions(*modules):
    return sum({p: p.numel() for m in modules for p in m.parameters()}.values()) / 1e6


def test_parameters_of_the_published_size(xl):
    flow, _ = xl
    near = {"rel": 1e-3}
    residual = flow.feature_residual
    assert _millions(flow.trunk.blocks[0]) == pytest.approx(18.27, **near)
    assert _millions(flow.stacks[0].blocks[0]) == pytest.approx(18.60, **near)
    assert _millions(residual.blocks[0]) == pytest.approx(23.91, **near)
    assert _millions(residual) == pytest.approx(95.6, **near)
    assert _millions(flow) - _millions(residual) == pytest.approx(955.3, **near)
    assert _millions(flow.trunk, flow.stacks[0]) == pytest.approx(490.3, **near)


def test_flops_of_the_published_size(xl):
    _, parts = xl
    call = Flops(*(a + b for a, b in zip(parts["trunk"], parts["stacks.0"], strict=True)))
    later = Flops(
        *(a + b for a, b in zip(parts["feature_residual"], parts["stacks.0"], strict=True))
    )
    near = {"rel": 1e-3}
    assert call.linear / 1e9 == pytest.approx(221.65, **near)
    assert call.total / 1e9 == pytest.approx(229.20, **near)
    assert later.linear / 1e9 == pytest.approx(91.14, **near)
    published = {2: 1.42, 4: 1.79, 8: 2.06, 16: 2.23}
    for steps, gain in published.items():
        assert predicted_gain(parts, steps, attention=False) == pytest.approx(gain, abs=0.006)
    assert predicted_gain(parts, 10**6, attention=False) == pytest.approx(2.43, abs=0.006)


def test_flops_of_the_network_it_is_compared_with():
    with torch.device("meta"):
        net = DiT.from_name("DiT-XL/2", (4, 32, 32), num_classes=1000)
        x, t, cond = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    flops = count_flops(net, x, t, cond)
    assert flops.linear / 1e9 == pytest.approx(228.78, rel=1e-3)
    assert flops.total / 1e9 == pytest.approx(237.24, rel=1e-3)


TRUNK, STACK, RESIDUAL = (Flops(n, 0) for n in (6, 4, 1))
ALL = {"trunk": TRUNK, "stacks.0": STACK, "feature_residual": RESIDUAL}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_prices(ALL, 1), r"parts must hold stacks.1, got feature_residual, stacks.0,"),
        (
            lambda: step_prices({"trunk": TRUNK, "stacks.0": STACK}, 0),
            "parts must hold feature_residual, got stacks.0, trunk",
        ),
        (lambda: step_prices(ALL, 0, "half"), "mode must be one of cached, fra, full, got 'half'"),
        (lambda: predicted_gain({}, 2), "parts must hold trunk, got none"),
        (
            lambda: predicted_gain({"trunk": TRUNK, "feature_residual": RESIDUAL}, 2),
            "parts must hold stacks.0, got",
        ),
        (lambda: predicted_gain(ALL, [2, 3]), "steps must hold one number per segment, 1, got 2"),
        (lambda: predicted_gain(ALL, 0), "steps must be at least 1, got 0"),
    ],
)
def test_prices_and_gains_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
