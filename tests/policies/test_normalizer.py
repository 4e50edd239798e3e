"""Statistics of actions: inverse, constants, ranges, and checkpoints without them."""

import warnings

import pytest
import torch

from flowkit.nn import SequenceDiT
from flowkit.policies import ActionNormalizer, PolicyVelocity


def actions(count=500, size=4):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 1e-4, 30.0, 0.3])
    return torch.randn(count, size, generator=generator) * spread + torch.tensor([0.0, 5.0, -9, 1])


@pytest.mark.parametrize("kind", ["std", "quantile"])
def test_the_inverse_is_exact(kind):
    x = actions()
    normalizer = ActionNormalizer.fit(x, kind)
    again = normalizer.denormalize(normalizer.normalize(x))
    assert ((again - x).abs() <= 2e-6 * x.abs().amax(0)).all()
    assert normalizer.clipped == 0


def test_kinds_are_the_moments_and_the_quantiles():
    x = actions()
    by_std = ActionNormalizer.fit(x).normalize(x).double()
    assert by_std.mean(0).abs().max() < 1e-2  # 1e-4 beside 5 in float32
    assert (by_std.std(0, correction=0) - 1).abs().max() < 1e-2
    normal = ActionNormalizer.fit(x, "quantile")
    ends = torch.quantile(x.double(), torch.tensor([0.01, 0.99]).double(), dim=0)
    expected = torch.tensor([-1.0, 1.0])[:, None].expand(2, 4)
    assert (normal.normalize(ends.float()) - expected).abs().max() < 1e-2
    assert ((normal.normalize(x).abs() <= 1).float().mean(0) - 0.98).abs().max() < 0.005


def test_a_constant_dimension_is_safe_and_said():
    x = actions()
    x[:, 2] = 0.7
    with pytest.warns(UserWarning, match=r"got constant dimensions \[2\]; their scale is 0.001"):
        normalizer = ActionNormalizer.fit(x)
    velocity = PolicyVelocity(SequenceDiT((4, 2), width=16, depth=1, heads=2, vector=4), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        velocity.learn(actions(), observations=x)  # there it is usual
    with pytest.warns(UserWarning, match=r"actions must move .* got constant dimensions \[2\]"):
        velocity.learn(x, observations=x)
    assert normalizer.normalize(x).isfinite().all()
    assert normalizer.normalize(x)[:, 2].abs().max() == 0
    assert (normalizer.denormalize(torch.full((1, 4), 3.0))[0, 2] - 0.7).abs() < 1e-6


def test_actions_outside_are_clipped_and_counted_or_an_error_or_kept():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    clips = ActionNormalizer.fit(x)
    beyond = torch.tensor([[5.0, 1.0], [0.5, -4.0], [0.5, 1.0]])
    expected = clips.normalize(torch.tensor([[1.0, 1.0], [0.5, 0.0], [0.5, 1.0]]))
    assert torch.equal(clips.normalize(beyond), expected)
    assert clips.clipped == 2
    assert torch.equal(clips.denormalize(torch.tensor([9.0, -9.0])), torch.tensor([1.0, 0.0]))
    assert clips.clipped == 4
    raises = ActionNormalizer.fit(x, outside="error")
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 1\] in dimension 0, got 5"):
        raises.normalize(beyond)
    keeps = ActionNormalizer.fit(x, outside="keep")
    assert torch.allclose(keeps.denormalize(keeps.normalize(beyond)), beyond)


def test_missing_statistics_are_an_error_and_never_an_identity():
    """Neither a checkpoint without them nor a normalizer without a fit passes data through."""
    fitted = ActionNormalizer.fit(actions())
    state = fitted.state_dict()
    again = ActionNormalizer(4)
    with pytest.raises(RuntimeError, match="statistics of the normalizer must be known, got none"):
        again.normalize(torch.zeros(4))
    renamed = {f"norm.{key}": value for key, value in state.items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="scale must hold statistics of 4 dimensions"):
            again.load_state_dict(renamed, strict=strict)
        with pytest.raises(RuntimeError, match="center must hold statistics of 4 dimensions"):
            again.load_state_dict({**state, "center": torch.full((4,), torch.nan)}, strict=strict)
    again.load_state_dict(state)
    assert torch.equal(again.normalize(actions()), fitted.normalize(actions()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ActionNormalizer.fit(torch.zeros(3)), r"actions must have shape \(N, D\)"),
        (lambda: ActionNormalizer.fit(torch.zeros(0, 3)), r"actions must have shape \(N, D\)"),
        (lambda: ActionNormalizer.fit(torch.full((2, 2), torch.nan)), "actions must be finite"),
        (lambda: ActionNormalizer.fit(actions(), "range"), "kind must be one of quantile, std"),
        (lambda: ActionNormalizer(0), "size must be at least 1, got 0"),
        (
            lambda: ActionNormalizer.fit(actions()).normalize(torch.zeros(7)),
            "actions must have 4 dimensions, got 7",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
