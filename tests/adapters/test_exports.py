"""A solve as a table, and the loop over it: the same samples as those of the sampler."""

from importlib import import_module

import pytest
import torch
from torch import nn

from flowkit.adapters.exports import Solve, evaluations
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.sampling.solvers import FIXED
from tests.runs.exported import flow

GRID = [0.0, 0.1, 0.15, 0.6, 1.0]


def swirl(x, t, cond=None):
    """A field that is linear in nothing."""
    return torch.sin(3 * x.flip(1) + t[:, None]) + x**2 * t[:, None]


@pytest.mark.parametrize("method", FIXED)
def test_the_table_replays_the_solver(method):
    """All evaluations, at their points and times, from no more velocities than it needs."""
    seen = []

    def watched(x, t, cond=None):
        seen.append((x.clone(), float(t[0])))
        return swirl(x, t)

    sampler, x = ODESampler(GRID, method), torch.randn(5, 2, dtype=torch.float64)
    expected = sampler(watched, x)
    table = evaluations(sampler)
    recent = []
    for row, (point, time) in zip(table, seen, strict=True):
        torch.testing.assert_close(x, point, rtol=1e-12, atol=1e-12)
        assert row[0] == time
        recent = [swirl(x, row[:1].expand(5)), *recent]
        for weight, v in zip(row[2:], recent, strict=False):
            x = x + weight * v
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    assert table.shape[1] - 2 == {"euler": 1, "ab2": 3, "rk4": 4}.get(method, 2)
    per_step = len(table) // (len(GRID) - 1)
    ends = torch.tensor(GRID[1:], dtype=torch.float64).repeat_interleave(per_step)
    assert torch.equal(table[-len(ends) :, 1], ends)


def python_loop(step, carry, rows):
    """What a scan computes, without a compiler."""
    for row in rows:
        carry, out = step(carry, row)
    return carry, out


@pytest.mark.parametrize(
    ("kind", "method", "scale"),
    [
        ("points", "ab2", 1.0),
        ("labels", "rk4", 1.0),
        ("labels", "heun", 2.5),
        ("residual", "euler", 0.0),
        ("means", "euler", 2.5),
        ("means", "euler", 1.0),
        ("means", "midpoint", 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:a mean velocity gives only its instantaneous velocity")
def test_the_loop_gives_the_samples_of_the_module(kind, method, scale, monkeypatch):
    monkeypatch.setattr(import_module("torch._higher_order_ops.scan"), "scan", python_loop)
    module, sampler = flow(kind), ODESampler(GRID, method)
    noise = seeded_noise(module.sample_shape, range(6))
    labels = None if kind == "points" else torch.arange(6) % 4  # the last is no label
    expected = module.solve(noise, sampler, labels, scale).x
    solve = Solve(module.velocity, sampler, scale, 3)
    with torch.no_grad():
        found = solve(noise) if labels is None else solve(noise, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Counts(nn.Module):
    """A network that takes its batch for a number."""

    def forward(self, x, t, cond=None):
        return x * torch.arange(float(len(x.tolist())))[:, None]


@pytest.mark.slow
def test_a_network_that_cannot_be_traced_is_named():
    from flowkit.adapters.exports import traced
    from flowkit.autoencoders import Identity

    solve = Solve(Counts(), ODESampler(2)).eval()
    with pytest.raises(ValueError, match=r"velocity must (be a network that|work for batches)"):
        traced(solve, Identity(), (2,), labels=False)
