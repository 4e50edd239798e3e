from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from flowkit.data.arrays import Arrays
from flowkit.data.stream import InOrder, Steps, Stream, draw_pairs, keyed_generator
from flowkit.data.stream import stream_positions as positions

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)


class Pairs(NamedTuple):
    x0: Tensor
    x1: Tensor
    cond: Tensor | None = None
    log_weight: Tensor | None = None


class Sorted:
    """Pairs one-dimensional points in ascending order."""

    def pair(self, x0, x1, cond=None, generator=None):
        order = x1[:, 0].argsort()
        return Pairs(x0.sort(0).values, x1[order], None if cond is None else cond[order])


class Shuffled:
    """Pairs at random, to see whose generator draws."""

    def pair(self, x0, x1, cond=None, generator=None):
        return Pairs(x0[torch.randperm(len(x0), generator=generator)], x1, cond)


def numbered(size):
    return Arrays({"x1": torch.arange(float(size))[:, None], "cond": torch.arange(size)})


@given(SIZES, SEEDS, st.integers(0, 5))
def test_each_epoch_holds_every_sample_once(size, seed, epoch):
    entries = positions(size, seed, epoch * size, (epoch + 1) * size)
    assert sorted(entries.tolist()) == list(range(size))


@given(SIZES, SEEDS, st.integers(0, 100), st.integers(1, 100), st.integers(1, 100))
def test_stream_does_not_depend_on_where_it_is_cut(size, seed, start, first, second):
    whole = positions(size, seed, start, start + first + second)
    parts = [
        positions(size, seed, start, start + first),
        positions(size, seed, start + first, start + first + second),
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = positions(1000, 0, 0, 2000).chunk(2)
    other = positions(1000, 1, 0, 1000)
    for a, b in [(first, second), (first, other)]:
        # Two random permutations agree in one place on average, with a variance of one.
        assert (a == b).sum() <= 6


@given(SIZES, SEEDS, st.integers(1, 5), st.integers(1, 4), st.integers(0, 30))
def test_ranks_together_see_the_batch_of_one_process(size, seed, batch_size, world, step):
    split = numbered(size)
    ranks = [Stream(split, batch_size, seed, rank, world)[step]["cond"] for rank in range(world)]
    alone = Stream(split, batch_size * world, seed)[step]["cond"]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(), alone)


@given(SIZES, SEEDS, st.integers(1, 7), st.integers(0, 40))
def test_resumed_stream_is_the_tail_of_the_uninterrupted_one(size, seed, batch_size, start):
    stream = Stream(numbered(size), batch_size, seed)
    full = [stream[k]["cond"] for k in range(start + 5)]
    for k, _ in zip(Steps(stream, lambda: start), range(5), strict=False):
        assert torch.equal(stream[k]["cond"], full[k])


def test_steps_are_endless_and_ask_for_their_start_again():
    start = 3
    steps = Steps(Stream(numbered(4), 2, 0), lambda: start)
    assert [k for k, _ in zip(steps, range(3), strict=False)] == [3, 4, 5]
    start = 7
    assert next(iter(steps)) == 7
    with pytest.raises(TypeError, match="len"):
        len(steps)


def test_flips_mirror_half_of_the_images_whatever_the_world_size():
    ramp = torch.arange(4.0).expand(400, 1, 3, 4).contiguous()
    split = Arrays({"x1": ramp, "cond": torch.arange(400)})
    alone = Stream(split, 400, seed=5, flip=True)
    images = alone[2]["x1"]
    mirrored = (images == torch.tensor([3.0, 2, 1, 0])).flatten(1).all(1)
    assert torch.equal(images[~mirrored], ramp[~mirrored])
    # Binomial(400, 1/2): five standard deviations are 50.
    assert abs(int(mirrored.sum()) - 200) < 50
    assert torch.equal(images, alone[2]["x1"])
    again = (alone[3]["x1"][:, 0, 0, 0] == 3).sum()
    assert not torch.equal(alone[3]["x1"], images)
    assert abs(int(again) - 200) < 50
    ranks = [Stream(split, 100, 5, r, 4, flip=True)[2]["x1"] for r in range(4)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), images)


def test_masks_are_mirrored_with_their_images():
    images = torch.arange(400.0 * 12).reshape(400, 1, 3, 4)
    split = Arrays({"x1": images, "cond": images[:, 0].clone()})
    batch = Stream(split, 400, seed=5, flip=True)[2]
    mirrored = batch["x1"][:, 0, 0, 0] > batch["x1"][:, 0, 0, 1]
    assert 150 < mirrored.sum() < 250
    assert torch.equal(batch["cond"], batch["x1"][:, 0])


def test_coupling_pairs_data_with_noise_of_their_own_key():
    stream = Stream(numbered(50), 8, seed=3, rank=1, world_size=2, coupling=Sorted())
    batch = stream[4]
    plain = Stream(numbered(50), 8, seed=3, rank=1, world_size=2)[4]
    noise = torch.randn(8, 1, generator=keyed_generator(3, "pairs", 4, 1))
    assert torch.equal(batch["x0"], noise.sort(0).values)
    assert torch.equal(batch["x1"], plain["x1"].sort(0).values)
    assert torch.equal(batch["cond"].float(), batch["x1"][:, 0])
    other = Stream(numbered(50), 8, seed=3, rank=0, world_size=2, coupling=Sorted())[4]
    assert not torch.equal(other["x0"], batch["x0"])


def test_pairs_do_not_touch_the_global_generator():
    stream = Stream(numbered(50), 8, seed=3, flip=False, coupling=Shuffled())
    torch.manual_seed(0)
    first, state = stream[0], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first["x0"], stream[0]["x0"])
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_given_source_samples_are_paired_and_labels_are_optional():
    batch = {"x1": torch.tensor([[3.0], [1.0]]), "x0": torch.tensor([[9.0], [8.0]])}
    paired = draw_pairs(batch, Sorted(), torch.Generator())
    assert paired.keys() == {"x0", "x1"}
    assert paired["x1"].flatten().tolist() == [1, 3]
    assert paired["x0"].flatten().tolist() == [8, 9]


def test_weighted_couplings_are_refused():
    class Weighted:
        def pair(self, x0, x1, cond=None, generator=None):
            return Pairs(x0, x1, cond, torch.zeros(len(x0)))

    with pytest.raises(ValueError, match="coupling must return pairs without weights"):
        Stream(numbered(5), 2, 0, coupling=Weighted())[0]


@pytest.mark.parametrize("extra", [{"mask"}, {"t0", "t1"}])
def test_what_pairs_would_lose_is_refused(extra):
    split = Arrays({name: torch.rand(5, 1) for name in ("x0", "x1", *extra)})
    message = f"coupling must be null for data with {', '.join(sorted(extra))}, got .*Sorted"
    with pytest.raises(ValueError, match=message):
        Stream(split, 2, 0, coupling=Sorted())[0]
    assert extra < set(Stream(split, 2, 0)[0])


@given(SIZES, st.integers(1, 9), st.integers(1, 4))
def test_ranks_read_a_split_once_and_in_order(size, batch_size, world):
    split, seen = numbered(size), []
    for rank in range(world):
        batches = InOrder(split, batch_size, rank, world)
        labels = [batches[i]["cond"] for i in range(len(batches))]
        assert all(len(part) == batch_size for part in labels[:-1])
        assert all(len(part) >= 1 for part in labels)
        own = torch.cat(labels).tolist() if labels else []
        assert own == list(range(rank, size, world))
        seen += own
    assert sorted(seen) == list(range(size))
