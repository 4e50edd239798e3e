"""Sequences of any length: masks, conditions, and what a solve prepares once."""

import pytest
import torch

from flowkit.losses import flow_matching_loss
from flowkit.nn import SequenceDiT
from flowkit.sampling import ODESampler

KINDS = {"frames": 3, "vector": 5, "tokens": 4}


def filled(**sizes):
    """A network whose gates are open, so that every input has an effect."""
    torch.manual_seed(0)
    net = SequenceDiT((2, 6), width=32, depth=2, heads=2, **sizes).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def conditions(batch=3, length=6, tokens=4):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "frames": draw(batch, 3, length),
        "vector": draw(batch, 5),
        "tokens": draw(batch, tokens, 4),
    }


@pytest.fixture
def net():
    return filled(**KINDS, kernel=3)


def state(batch=3, length=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 2, length, generator=generator, dtype=torch.float64)


def test_padding_with_masks_changes_no_velocity(net):
    """Of frames and of tokens, whatever the padding holds; the velocity of padding is 0."""
    x, t, cond = state(), torch.tensor([0.1, 0.5, 0.9]).double(), conditions()
    expected = net(x, t, cond)
    for value in (0.0, 1e3):
        longer = torch.full((3, 2, 4), value).double()
        padded = {
            "frames": torch.cat([cond["frames"], torch.full((3, 3, 4), value)], 2),
            "vector": cond["vector"],
            "tokens": torch.cat([cond["tokens"], torch.full((3, 2, 4), value)], 1),
            "frame_mask": torch.arange(10).expand(3, 10) < 6,
            "token_mask": torch.arange(6).expand(3, 6) < 4,
        }
        found = net(torch.cat([x, longer], 2), t, padded)
        assert (found[..., :6] - expected).abs().max() < 1e-6
        assert (found[..., 6:] == 0).all()
    assert (net(torch.cat([x, longer], 2), t, _long(cond))[..., :6] - expected).abs().max() > 1e-2


def _long(cond):
    """Padded frames without a mask."""
    return {**cond, "frames": torch.nn.functional.pad(cond["frames"], (0, 4))}


def test_masked_states_change_no_loss_and_have_no_gradient():
    net = filled(vector=5)
    mask = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] + [0.0] * 5]).double()
    losses, x1 = [], state().requires_grad_()
    for value in (0.0, 7.0):
        held = torch.where(mask[:, None] > 0, x1, value)
        cond = {"vector": conditions()["vector"], "frame_mask": mask.bool()}
        batch = {"x1": held, "cond": cond, "mask": mask[:, None]}
        losses.append(
            flow_matching_loss(net, batch, generator=torch.Generator().manual_seed(0))["loss"]
        )
    assert abs(losses[0] - losses[1]) < 1e-6
    batch = {"x1": x1, "cond": cond, "mask": mask[:, None]}
    flow_matching_loss(net, batch, generator=torch.Generator().manual_seed(0))["loss"].backward()
    masked = mask[:, None].expand_as(x1) == 0
    assert (x1.grad[masked] == 0).all()
    assert (x1.grad[~masked] != 0).all()


def test_a_solve_prepares_its_condition_once(net):
    """Cached as uncached; the reference calls the network anew at every step."""
    x, cond, before = state(), conditions(), net.prefixes
    cond["token_mask"] = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    cached = ODESampler(10).solve(net, x, cond)
    assert net.prefixes - before == 1
    plain = ODESampler(10).solve(lambda x, t, cond: net(x, t, cond), x, cond)
    assert net.prefixes - before == 11
    assert (cached.x - plain.x).abs().max() < 1e-5
    assert (cached.nfe, cached.rows) == (10, 30)


@pytest.mark.parametrize("name", KINDS)
def test_every_part_of_the_condition_counts(name, net):
    x, t, cond = state(), torch.full((3,), 0.5).double(), conditions()
    other = {**cond, name: cond[name] + 1}
    assert (net(x, t, other) - net(x, t, cond)).abs().max() > 1e-3


def test_a_sample_without_tokens_is_finite_and_sees_none():
    net = filled(tokens=4)
    x, t = state(), torch.full((3,), 0.5).double()
    cond = {"tokens": conditions()["tokens"], "token_mask": torch.zeros(3, 4)}
    found = net(x, t, cond)
    other = net(x, t, {**cond, "tokens": cond["tokens"] * 9})
    empty = net(x, t, {"tokens": cond["tokens"][:, :0]})
    assert torch.equal(found, other)
    assert (found - empty).abs().max() < 1e-12


def test_a_block_sums_up_neighboring_frames():
    """By hand: frames beyond both ends, and those under a mask, count as 0."""
    torch.manual_seed(0)
    layer = SequenceDiT((2, 6), width=4, depth=1, heads=1, kernel=3).double().neighbors[0]
    h = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(layer(h, None), h)  # a new one
    torch.nn.init.normal_(layer.sum.weight)
    torch.nn.init.normal_(layer.sum.bias)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found, weight = layer(h, mask), layer.sum.weight[:, 0]
    normed = (h - h.mean(2, keepdim=True)) / h.var(2, keepdim=True, correction=0).add(1e-6).sqrt()
    for b, count in ((0, 5), (1, 3)):
        for n in range(count):
            near = [(k, n + k - 1) for k in range(3) if 0 <= n + k - 1 < count]
            expected = h[b, n] + layer.sum.bias + sum(weight[:, k] * normed[b, m] for k, m in near)
            torch.testing.assert_close(found[b, n], expected)


def test_a_kernel_must_be_odd():
    for kernel in (0, 4):
        with pytest.raises(
            ValueError, match=f"kernel must be an odd number of frames, got {kernel}"
        ):
            SequenceDiT((2, 6), width=8, depth=1, heads=2, kernel=kernel)
    for kernel in (3.0, 2.5, "3", True):
        with pytest.raises(TypeError, match=f"kernel must be an integer, got {kernel!r}"):
            SequenceDiT((2, 6), width=8, depth=1, heads=2, kernel=kernel)


def test_frames_know_their_places():
    net = filled()
    x, t = torch.ones(1, 2, 5).double(), torch.full((1,), 0.5).double()
    v = net(x, t)
    assert v.std(2).min() > 1e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vector": None}, ValueError, "cond must hold vector for this network, got frames, tok"),
        ({"vectr": torch.zeros(3, 5)}, ValueError, "cond must hold some of frames, .*, got vectr"),
        ({"vector": torch.zeros(3, 6)}, ValueError, r"vector must have 2 dimensions with size 5"),
        ({"frames": torch.zeros(3, 3, 7)}, ValueError, "frames must have the 6 frames of x, got 7"),
        ({"frame_mask": torch.ones(3, 7)}, ValueError, r"frame_mask must have shape \(3, 6\)"),
    ],
)
def test_wrong_conditions_are_named(change, error, message, net):
    cond = {k: v for k, v in {**conditions(), **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        net(state(), torch.rand(3).double(), {k: v.double() for k, v in cond.items()})


def test_a_network_without_tokens_refuses_them():
    net = SequenceDiT((2, 6), width=8, depth=1, heads=2)
    with pytest.raises(ValueError, match="cond must not hold tokens for this network, got tokens"):
        net(torch.zeros(1, 2, 6), torch.rand(1), {"tokens": torch.zeros(1, 2, 4)})
    with pytest.raises(TypeError, match=r"cond must be a mapping of frames, .*, got Tensor"):
        net(torch.zeros(1, 2, 6), torch.rand(1), torch.zeros(1))
