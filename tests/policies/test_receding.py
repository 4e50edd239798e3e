"""Execution of chunks: how often it decodes, what it holds fixed, and whether it dithers."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from flowkit.exact import MixtureFlow
from flowkit.nn import SequenceDiT
from flowkit.policies import ChunkPolicy, ImageEncoder, PolicyVelocity, RecedingHorizon
from flowkit.sampling import ODESampler


@pytest.mark.parametrize("execute", [1, 3, 7, 14])
@pytest.mark.parametrize("steps", [1, 14, 20])
@pytest.mark.parametrize("prefix", [None, 2])
def test_a_chunk_serves_so_many_steps(execute, steps, prefix):
    """``⌈L/k⌉`` solves; and with the action of step n in chunks, step n gets its own."""
    given = []

    def policy(obs, held=None):
        given.append(held)
        return obs + torch.arange(16.0)[:, None]

    control = RecedingHorizon(policy, execute, prefix)
    taken = [control(torch.tensor([float(step)])).item() for step in range(steps)]
    assert len(control.seconds) == len(given) == math.ceil(steps / execute)
    if not prefix:
        assert taken == list(range(steps))


def test_solves_with_a_prefix():
    """The next chunk begins while two actions are left: these are what it holds, never zeros."""
    calls = []

    def policy(obs, held=None):
        calls.append((obs.item(), None if held is None else held.flatten().tolist()))
        chunk = 100 * len(calls) + torch.arange(6.0)[:, None]
        return chunk if held is None else torch.cat([held, chunk[len(held) :]])

    control = RecedingHorizon(policy, execute=3, prefix=2)
    taken = [control(torch.tensor(float(step))).item() for step in range(9)]
    assert calls == [(0, None), (3, [103.0, 104.0]), (6, [203.0, 204.0])]
    assert taken == [100, 101, 102, 103, 104, 202, 203, 204, 302]
    control.reset()
    assert control(torch.tensor(9.0)).item() == 400
    assert calls[-1] == (9, None)


def policy_of(seed=0, size=2, horizon=6):
    """A policy with open gates, and actions around 5: far from zeros."""
    torch.manual_seed(seed)
    net = SequenceDiT((size, horizon), width=16, depth=2, heads=2, vector=3)
    velocity = PolicyVelocity(net, obs_size=3)
    for parameter in velocity.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    velocity.learn(5 + torch.randn(200, size), torch.randn(200, 3))
    return velocity


def test_the_prefix_is_held_on_its_path_through_the_solve():
    velocity, seen = policy_of(), []
    bound = velocity.bind

    def watching(cond, grid):
        inner = bound(cond, grid)

        def call(x, t, cond=None):
            seen.append((t[0].item(), x.clone()))
            return inner(x, t)

        return call

    velocity.bind = watching
    policy = ChunkPolicy(velocity)
    policy.reset(3)
    held = torch.tensor([[4.5, 5.5], [5.0, 4.0]])
    chunk = policy(np.zeros(3), held)
    assert torch.equal(chunk[:2], held)
    noise, target = seen[0][1][0, :, :2], velocity.actions.normalize(held).T
    for t, x in seen:
        assert (x[0, :, :2] - torch.lerp(noise, target, t)).abs().max() < 1e-6
    policy.reset(3)
    zeros = policy(np.zeros(3), torch.zeros(2, 2).clamp(velocity.actions.low))
    assert (zeros[2:] - chunk[2:]).abs().max() > 1e-3  # what is held counts


def test_a_solve_prepares_the_observation_once_and_agrees_with_one_that_does_not():
    velocity = policy_of()
    policy, before = ChunkPolicy(velocity, ODESampler(10)), velocity.net.prefixes
    policy.reset(1)
    chunk = policy(np.ones(3))
    assert velocity.net.prefixes - before == 1
    noise = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(1))
    plain = lambda x, t, cond: velocity(x, t, cond)  # noqa: E731
    with torch.no_grad():
        x = ODESampler(10).solve(plain, noise, {"vector": torch.ones(1, 3)}).x
    assert (velocity.actions.denormalize(x[0].T) - chunk).abs().max() < 1e-5


def test_deciding_at_every_step_dithers_and_chunks_do_not():
    """Two ways, at −1 and 1 a step: eight steps one way arrive at 8, a new choice each step not.

    A walk of eight random signs ends beyond 6 with the chance 2/256.
    """
    flow = MixtureFlow(torch.ones(2) / 2, torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.05))
    shares = {}
    for execute in (1, 8):
        generator = torch.Generator().manual_seed(0)

        def policy(obs, generator=generator):
            noise = torch.randn(1, 1, generator=generator)
            return ODESampler(8)(flow, noise).expand(8, 1)

        control, arrived = RecedingHorizon(policy, execute), 0
        for _ in range(20):
            control.reset()
            arrived += abs(sum(control(torch.zeros(1)).item() for _ in range(8))) > 6
        shares[execute] = arrived / 20
    assert shares[8] > 0.9
    assert shares[1] < 0.2


def test_a_whole_chunk_without_looking_misses_what_moves():
    """A goal that turns around: executing all 16 of a chunk arrives late, executing 4 does not."""
    errors = {}
    for execute in (4, 16):
        place, goal, error = 0.0, 0.0, []
        control = RecedingHorizon(lambda obs: (obs / 4).expand(16, 1), execute)
        for step in range(64):
            goal = math.sin(step / 8)
            place += control(torch.tensor([goal - place])).item()
            error.append(abs(goal - place))
        errors[execute] = sum(error) / 64
    assert errors[16] > 2 * errors[4]


def test_chunks_that_are_too_short_are_refused():
    control = RecedingHorizon(lambda obs: torch.zeros(6, 1), execute=5, prefix=2)
    with pytest.raises(ValueError, match="must fit a chunk of 6 actions, got 5 and 2"):
        control(torch.zeros(1))
    with pytest.raises(ValueError, match="execute must be at least 1, got 0"):
        RecedingHorizon(lambda obs: torch.zeros(6, 1), execute=0)


def test_a_policy_sees_its_image_and_refuses_to_go_without():
    torch.manual_seed(0)
    net = SequenceDiT((2, 6), width=16, depth=1, heads=2, vector=8)
    encoder = ImageEncoder(obs_size=3, image_size=20, size=8, width=4)
    velocity = PolicyVelocity(net, obs_size=3, encoder=encoder)
    for parameter in velocity.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    velocity.learn(torch.randn(50, 2), torch.randn(50, 3))
    policy, chunk = ChunkPolicy(velocity, ODESampler(2)), {}
    for shade in (0, 255):
        policy.reset(1)
        image = np.full((3, 20, 20), shade, np.uint8)
        chunk[shade] = policy({"vector": np.zeros(3), "image": image})
    assert (chunk[0] - chunk[255]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cond must hold image for this policy, got vector"):
        policy(np.zeros(3))
    large = {"vector": np.zeros(3), "image": np.zeros((3, 24, 24), np.uint8)}
    with pytest.raises(ValueError, match=r"shape \(B, 3, 20, 20\) .*, got \(1, 3, 24, 24\)"):
        policy(large)
    assert velocity.image_size == 20
    velocity.encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"encoder must have image_size, .*, got Identity with N"):
        _ = velocity.image_size


def test_an_encoder_learns_where_a_small_thing_is():
    """The height of a thing of 5 pixels, from 80 pictures: its vector tells that of others."""
    torch.manual_seed(0)
    encoder = ImageEncoder(obs_size=1, image_size=32, channels=1, size=1, width=8)
    rows, columns = torch.randint(2, 30, (160,)), torch.randint(22, 24, (160,))
    image = torch.zeros(160, 1, 32, 32, dtype=torch.uint8)
    for down, right in product(range(-2, 3), repeat=2):
        image[torch.arange(160), 0, rows + down, columns + right] = 255
    target, obs = (rows / 16 - 1)[:, None], torch.zeros(160, 1)
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-2)
    for _ in range(100):
        loss = (encoder(image[:80], obs[:80]) - target[:80]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (encoder(image[80:], obs[80:]) - target[80:]).square().mean()
    assert error < 0.05 * target[80:].var()
