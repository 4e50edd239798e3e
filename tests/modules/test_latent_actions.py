"""Latent actions: which of four motions was made, from observations alone."""

import math

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy, one_hot

from flowkit.modules import LatentActions
from flowkit.nn import SequenceDiT
from flowkit.policies import ChunkPolicy, LatentActionModel, PolicyVelocity

MOTIONS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


def pairs(count=256, seed=None):
    """Observations before and after a motion, whose second number has a law of the first."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    now = torch.randn(count, 2, generator=generator)
    motion = torch.randint(4, (count,), generator=generator)
    motion = torch.where(now[:, 0] > 0, motion % 2, motion)  # on the right, one of two
    later = now + MOTIONS[motion] + 0.05 * torch.randn(count, 2, generator=generator)
    return {"x1": later, "cond": {"vector": now}}, motion


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    module = LatentActions(LatentActionModel(2, num_codes=8, tokens=1, width=8, hidden=32))
    module.learn(torch.randn(1000, 2))
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(500):
        optimizer.zero_grad()
        module.loss(pairs()[0])["loss"].backward()
        optimizer.step()
    return module.eval()


@pytest.mark.slow
def test_codes_tell_motions_apart_and_predict_the_future(module):
    batch, motion = pairs(2000, seed=1)
    codes = module.model.infer(batch["cond"]["vector"], batch["x1"])[:, 0]
    table = one_hot(codes, 8).T @ one_hot(motion, 4)
    assert table.amax(1).sum() / 2000 > 0.95  # each code stands for one motion
    assert module.loss(batch)["explained"] > 0.95


@pytest.mark.slow
def test_the_prior_draws_the_motions_that_occur_there(module):
    """On the right the motions up and down do not occur: their codes are not drawn."""
    batch, motion = pairs(2000, seed=2)
    codes = module.model.infer(batch["cond"]["vector"], batch["x1"])[:, 0]
    meaning = (one_hot(codes, 8).T @ one_hot(motion, 4)).argmax(1)
    now = batch["cond"]["vector"]
    right = now[:, 0] > 0.5
    drawn = meaning[module.model.draw(now, torch.Generator().manual_seed(0))[:, 0]]
    assert (drawn[right] < 2).float().mean() > 0.95
    assert (drawn[now[:, 0] < -0.5] >= 2).float().mean() == pytest.approx(0.5, abs=0.1)


def test_codes_that_are_drawn_belong_together():
    """Two ways, (1, 2, 3) and (3, 0, 1): the draws are these and no mixture, both equally often."""
    torch.manual_seed(0)
    model = LatentActionModel(2, num_codes=4, tokens=3, width=4, hidden=32)
    LatentActions(model).learn(torch.randn(1000, 2))
    ways, now = torch.tensor([[1, 2, 3], [3, 0, 1]]), torch.randn(2000, 2)
    optimizer = torch.optim.Adam(model.prior.parameters(), 1e-2)
    for _ in range(150):
        codes = ways.repeat(64, 1)
        logits = model.logits(now[torch.randint(2000, (128,))], codes)
        loss = cross_entropy(logits.flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 3 * loss.item() == pytest.approx(math.log(2), abs=0.1)  # of a choice between two
    drawn = model.draw(now, torch.Generator().manual_seed(0))
    shares = [(drawn == way).all(1).float().mean() for way in ways]
    assert sum(shares) > 0.97
    assert shares[0] == pytest.approx(0.5, abs=0.06)
    codes = torch.randint(4, (5, 3))
    other = torch.cat([codes[:, :1], (codes[:, 1:] + 1) % 4], 1)
    before, after = model.logits(now[:5], codes), model.logits(now[:5], other)
    assert torch.equal(before[:, :2], after[:, :2])  # they see the first code at most
    assert not torch.equal(before[:, 2], after[:, 2])


def test_a_policy_infers_in_training_and_draws_in_a_rollout():
    module = LatentActions(LatentActionModel(2, num_codes=8, tokens=1, width=8, hidden=32))
    module.learn(torch.randn(1000, 2))
    velocity = PolicyVelocity(
        SequenceDiT((1, 4), width=16, depth=1, heads=2, vector=2, tokens=8),
        obs_size=2,
        latents=module.model,
    )
    velocity.learn(torch.randn(9, 1), torch.randn(9, 2))
    batch, _ = pairs(64, seed=3)
    now, later = batch["cond"]["vector"], batch["x1"]
    found = velocity.encode({"vector": now, "future": later})["tokens"]
    assert torch.equal(found, module.model.embed(module.model.infer(now, later)))
    codes = module.model.draw(now, torch.Generator().manual_seed(1))
    given = velocity.encode({"vector": now, "codes": codes})["tokens"]
    assert torch.equal(given, module.model.embed(codes))
    with pytest.raises(ValueError, match="cond must hold codes or future for this policy, got vec"):
        velocity.encode({"vector": now})
    assert not any(p.requires_grad for p in velocity.latents.parameters())


def test_what_a_rollout_draws_follows_from_its_own_seed_alone():
    """Codes and noise are those of the policy's seed, whatever was drawn before; seeds differ."""
    torch.manual_seed(0)
    model = LatentActionModel(2, num_codes=8, tokens=3, width=8, hidden=32)
    LatentActions(model).learn(torch.randn(1000, 2))
    net = SequenceDiT((1, 4), width=16, depth=1, heads=2, vector=2, tokens=8)
    velocity = PolicyVelocity(net, obs_size=2, latents=model)
    for parameter in velocity.net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    velocity.learn(torch.randn(9, 1), torch.randn(9, 2))
    policy, drawn = ChunkPolicy(velocity), {}
    encode = velocity.encode

    def watching(cond):
        drawn.setdefault(policy.generator.initial_seed(), []).append(cond["codes"])
        return encode(cond)

    velocity.encode = watching
    chunks = {}
    for seed, other in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(other)
        policy.reset(seed)
        chunks.setdefault(seed, []).append(torch.cat([policy(torch.ones(2)) for _ in range(3)]))
    assert torch.equal(*chunks[3])
    assert torch.equal(torch.cat(drawn[3][:3]), torch.cat(drawn[3][3:]))
    assert not torch.equal(torch.cat(drawn[3][:3]), torch.cat(drawn[4]))


def test_wrong_parts_are_named():
    net = SequenceDiT((1, 4), width=16, depth=1, heads=2, vector=3, tokens=8)
    with pytest.raises(ValueError, match="latents must be of observations of size 3, got 2"):
        PolicyVelocity(net, obs_size=3, latents=LatentActionModel(2, width=8))
    with pytest.raises(
        TypeError, match=r"model must be a LatentActionModel \(model=latent_actions"
    ):
        LatentActions(net)


def test_no_code_is_lost():
    """Codes far from all latent vectors are used again after a step."""
    torch.manual_seed(0)
    module = LatentActions(LatentActionModel(2, num_codes=8, tokens=2, width=4, hidden=16))
    module.learn(torch.randn(100, 2))
    with torch.no_grad():
        module.model.book[1:] = 100.0
    batch = pairs(seed=4)[0]
    assert module.loss(batch)["used"] == 1 / 8
    assert module.loss(batch)["used"] > 0.7


def _process(rank, folder):
    """Keep the book after a step in which each of two processes used a code of its own."""
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    module = LatentActions(LatentActionModel(2, num_codes=8, tokens=1, width=4, hidden=16))
    counts = torch.zeros(8, dtype=torch.long)
    counts[rank] = 5
    latents = torch.full((5, 4), 10.0 + rank)
    module._revive(counts, latents, torch.Generator().manual_seed(rank))
    torch.save(module.model.book.detach(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_revive_the_same_codes_alike(tmp_path):
    """A code that any process used stays, and the others move to vectors of the first one."""
    start_processes(_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[2:], torch.full((6, 4), 10.0))
    torch.manual_seed(0)
    model = LatentActionModel(2, num_codes=8, tokens=1, width=4, hidden=16)
    assert torch.equal(first[:2], model.book[:2])
