"""Chunks: windows by brute force, masks behind the end, and the loss that they give."""

import pytest
import torch

from flowkit.losses import flow_matching_loss
from flowkit.nn import SequenceDiT
from flowkit.policies import PolicyVelocity, chunks


def episode(steps=5, size=2):
    generator = torch.Generator().manual_seed(steps)
    return {
        "obs": torch.randn(steps, 3, generator=generator),
        "action": torch.randn(steps, size, generator=generator),
    }


@pytest.mark.parametrize(("steps", "horizon"), [(5, 3), (5, 5), (3, 8), (1, 4)])
def test_windows_by_brute_force(steps, horizon):
    """Also of episodes that are shorter than a chunk."""
    own = episode(steps)
    batch = chunks(own, horizon, future=True)
    assert batch["x1"].shape == (steps, 2, horizon)
    for n in range(steps):
        for h in range(horizon):
            inside = n + h < steps
            expected = own["action"][n + h] if inside else torch.zeros(2)
            assert torch.equal(batch["x1"][n, :, h], expected)
            assert batch["mask"][n, 0, h] == inside
        assert torch.equal(batch["cond"]["future"][n], own["obs"][min(n + horizon, steps - 1)])
    assert torch.equal(batch["cond"]["vector"], own["obs"])
    assert torch.equal(batch["cond"]["frame_mask"], batch["mask"][:, 0].bool())


def test_the_masked_loss_is_divided_by_what_counts():
    """An episode of one step: 1 of 8 actions counts; divided by all, the loss is an eighth."""
    batch = chunks({"obs": torch.zeros(1, 3), "action": torch.full((1, 2), 3.0)}, 8)
    batch["x0"] = torch.zeros_like(batch["x1"])
    loss = flow_matching_loss(lambda x, t, cond: 0 * x, batch)["loss"]
    assert loss == pytest.approx(9.0)


def test_nothing_behind_the_end_reaches_loss_or_gradient():
    torch.manual_seed(0)
    velocity = PolicyVelocity(SequenceDiT((2, 4), width=16, depth=2, heads=2, vector=3), obs_size=3)
    for parameter in velocity.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    own = episode(6)
    velocity.learn(own["action"], own["obs"])
    batch, losses = chunks(own, 4), []
    for value in (0.0, 100.0):
        x1 = torch.where(batch["mask"] > 0, batch["x1"], value)
        x1.requires_grad_()
        generator = torch.Generator().manual_seed(1)
        losses.append(
            flow_matching_loss(velocity, {**batch, "x1": x1}, generator=generator)["loss"]
        )
    losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    hidden = (batch["mask"] == 0).expand_as(x1)
    assert (x1.grad[hidden] == 0).all()
    assert (x1.grad[~hidden] != 0).all()


def test_parts_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="action of an episode must have 5 steps like obs, got 4"):
        chunks({**episode(), "action": torch.zeros(4, 2)}, 3)
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        chunks(episode(), 0)
