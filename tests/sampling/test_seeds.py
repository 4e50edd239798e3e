"""Seeds of samples: runs with different seeds share no noise, whatever batches and processes."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowkit.modules.flow import drawn_seeds
from flowkit.runs.drawing import start
from flowkit.sampling import sample_seeds, seeded_noise
from flowkit.symmetrical.label_states import LABEL_STREAM

MODULUS = 2**31


def first_seeds(seeds: range) -> Tensor:
    return torch.tensor([sample_seeds(seed, 0, 1).start for seed in seeds])


def test_runs_begin_far_apart():
    difference = torch.arange(1, 10_001)
    start = first_seeds(range(1, 10_001))  # seed 0 begins at 0, and all differences are alike
    gap = torch.minimum(start, MODULUS - start)
    assert bool((gap * difference >= 0.38 * MODULUS).all())
    shifted = first_seeds(range(-7, 9_993))
    assert torch.equal((shifted + 7 * start[0]) % MODULUS, first_seeds(range(10_000)))


def test_a_thousand_runs_of_nine_hundred_thousand_samples_share_no_seed():
    count = 900_000
    runs = sorted(((s := sample_seeds(k, 0, count)).start, s.stop) for k in range(1000))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(runs))
    assert runs[0][0] >= 0
    assert runs[-1][1] <= MODULUS  # the upper half is for other streams: labels and latents
    assert LABEL_STREAM >= MODULUS


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40])
@pytest.mark.parametrize("seeding", [1, 2])
def test_seeds_do_not_depend_on_the_batch(seed, seeding):
    whole = sample_seeds(seed, 0, 10, seeding)
    parts = [sample_seeds(seed, first, 3, seeding) for first in range(0, 9, 3)]
    assert [s for part in parts for s in part] == list(whole)[:9]
    assert list(whole) == list(range(whole.start, whole.start + 10))


def test_seed_zero_and_the_first_rule_keep_their_numbers():
    assert sample_seeds(0, 5, 20) == sample_seeds(0, 5, 20, seeding=1) == range(5, 25)
    assert sample_seeds(7, 5, 20, seeding=1) == range(12, 32)


@pytest.mark.parametrize("seeding", [1, 2])
def test_noise_of_neighboring_seeds_is_shared_under_the_first_rule_only(seeding):
    def noise(seed: int, batch_size: int) -> tuple[Tensor, dict]:
        cfg = SimpleNamespace(seed=seed, batch_size=batch_size, seeding=seeding)
        batches, record = start(SimpleNamespace(sample_shape=(2,)), cfg, 20)
        return torch.cat(list(batches)), record

    (a, record), (b, _) = noise(3, 8), noise(4, 8)
    shared = (a[:, None] == b).all(2).sum()
    assert shared == (19 if seeding == 1 else 0)
    assert torch.equal(noise(3, 20)[0], a)
    assert torch.equal(seeded_noise((2,), range(*record["seeds"])), a)
    assert record["seeding"] == seeding


def test_drawn_seeds_are_different_and_follow_the_global_generator():
    torch.manual_seed(0)
    first, second = drawn_seeds(400_000), drawn_seeds(400_000)
    both = torch.cat([torch.tensor(first), torch.tensor(second)]) % 2**32  # torch takes 32 bits
    assert len(both.unique()) == 800_000
    torch.manual_seed(0)
    assert drawn_seeds(400_000) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, -1, 1), "first must be at least 0, got -1"),
        ((0, 0, -1), "count must be at least 0, got -1"),
        ((0, 0, 1, 3), "seeding must be 1 or 2, got 3"),
    ],
)
def test_wrong_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_seeds(*arguments)
