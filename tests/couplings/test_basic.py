"""Independent, exact and entropic pairs, with and without conditions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from flowkit.couplings import (
    Coupling,
    Gibbs,
    Independent,
    MinibatchOT,
    Sinkhorn,
    basic,
    cost_matrix,
    suggest_epsilon,
)
from flowkit.couplings.transport import COSTS, assign, entropic_plan, paired, points
from tests.couplings.points import normals, seeded, seeds

INF = float("inf")


def total(x0, x1, cost="sqeuclidean") -> float:
    return float(paired(points(x0), points(x1), cost).double().sum())


def partner(x0: torch.Tensor, paired: torch.Tensor) -> list[int]:
    """Where in x0 (all rows different) each row of the pairs came from."""
    return (paired[:, None] == x0).flatten(2).all(2).int().argmax(1).tolist()


@given(seed=seeds, batch=st.integers(1, 6), cost=st.sampled_from(sorted(COSTS)))
@settings(max_examples=60, deadline=None)
def test_exact_transport_equals_brute_force(seed, batch, cost):
    x0, x1 = normals(seed, batch, 3)
    pairs = MinibatchOT(cost).pair(x0, x1)
    best = min(total(x0[list(p)], x1, cost) for p in itertools.permutations(range(batch)))
    assert total(pairs.x0, x1, cost) == pytest.approx(best, rel=1e-5, abs=1e-4)


@given(seed=seeds, batch=st.integers(1, 50), dim=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_pairs_are_a_permutation_no_worse_than_a_random_one(seed, batch, dim):
    x0, x1 = normals(seed, batch, dim)
    pairs = MinibatchOT().pair(x0, x1)
    assert sorted(partner(x0, pairs.x0)) == list(range(batch))
    assert pairs.x1 is x1
    other = torch.randperm(batch, generator=seeded(seed))
    assert total(pairs.x0, x1) <= total(x0[other], x1) * (1 + 1e-6)


@given(seed=seeds, angle=st.floats(0, 6.3), shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_rotating_and_translating_both_ends_keeps_the_pairs(seed, angle, shift):
    x0, x1 = normals(seed, 20, 2)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    plain = MinibatchOT().pair(x0, x1)
    moved = MinibatchOT().pair(x0 @ turn + shift, x1 @ turn + shift)
    back = x0[partner(x0 @ turn + shift, moved.x0)]
    assert total(back, x1) == pytest.approx(total(plain.x0, x1), rel=1e-4)


@pytest.mark.parametrize(
    "x",
    [torch.arange(12), torch.randn(6, 2, 3).bfloat16(), torch.randint(255, (9, 3, 4, 4)).byte()],
)
def test_any_shape_and_dtype_passes_unchanged(x):
    order = torch.randperm(len(x), generator=seeded(1))
    pairs = MinibatchOT().pair(x[order], x)
    assert pairs.x0.dtype == x.dtype
    assert pairs.x0.equal(x)


def test_mixed_precision_around_the_coupling_does_not_coarsen_the_cost():
    x0, x1 = normals(0, 256, 50)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = MinibatchOT().pair(x0, x1)
    assert mixed.x0.equal(MinibatchOT().pair(x0, x1).x0)


def test_gradients_pass_through_the_pairs():
    x0, x1 = normals(0, 5, 2)
    MinibatchOT().pair(x0.requires_grad_(), x1).x0.sum().backward()
    assert_close(x0.grad, torch.ones(5, 2))
    MinibatchOT(across_ranks=True).pair(x0, x1).x0.sum().backward()  # one rank
    assert_close(x0.grad, torch.full((5, 2), 2.0))


def separated_classes(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0, noise = normals(0, batch, 2)
    label = torch.arange(batch) % 2
    return x0, 0.3 * noise + 6 * label[:, None] - 3, label


def test_plain_transport_skews_the_source_of_each_class_and_says_so():
    x0, x1, label = separated_classes(400)
    with pytest.warns(
        UserWarning, match=r"skews the source.*set cond_weight \(for labels float\('inf'\)"
    ):
        pairs = MinibatchOT().pair(x0, x1, label)
    # Each class takes one half of the source, cut along the diagonal.
    side = x0.sum(1).sort().values
    assert_close(pairs.x0.sum(1)[label == 1].mean(), side[200:].mean(), rtol=0, atol=0.02)
    assert_close(pairs.x0.sum(1)[label == 0].mean(), side[:200].mean(), rtol=0, atol=0.02)
    assert abs(x0.sum(1)[label == 1].mean()) < 0.2 < 1 < side[200:].mean()


@given(seed=seeds, classes=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_infinite_weight_keeps_the_source_of_each_class_and_is_optimal_within(seed, classes):
    x0, x1 = normals(seed, 24, 2)
    label = torch.randint(classes, (24,), generator=seeded(seed))
    pairs = MinibatchOT(cond_weight=INF).pair(x0, x1 + 3 * label[:, None], label)
    assert label[partner(x0, pairs.x0)].equal(label)
    assert sorted(partner(x0, pairs.x0)) == list(range(24))
    for k in label.unique():
        rows = label == k
        alone = MinibatchOT().pair(x0[rows], x1[rows])
        assert total(pairs.x0[rows], x1[rows]) == pytest.approx(total(alone.x0, x1[rows]), rel=1e-5)


def test_weight_runs_from_plain_transport_to_transport_within_classes():
    x0, x1, label = separated_classes(60)
    plain = MinibatchOT().pair(x0, x1).x0
    assert MinibatchOT(cond_weight=0.0).pair(x0, x1, label).x0.equal(plain)
    within = MinibatchOT(cond_weight=INF).pair(x0, x1, label).x0
    assert MinibatchOT(cond_weight=1e12).pair(x0, x1, label).x0.equal(within)
    costs, agree = [], []
    for weight in (0.0, 5.0, 10.0, 20.0, 40.0):
        pairs = MinibatchOT(cond_weight=weight).pair(x0, x1, label)
        costs.append(total(pairs.x0, x1))
        agree.append(int((label[partner(x0, pairs.x0)] == label).sum()))
    assert costs == sorted(costs)
    assert agree == sorted(agree)
    assert agree[0] < agree[2] < agree[-1]


def test_float_conditions_cost_their_squared_distance():
    x0, x1 = normals(0, 30, 2)
    cond = torch.randn(30, 3, generator=seeded(1))
    pairs = MinibatchOT(cond_weight=2.0).pair(x0, x1, cond)
    cost = cost_matrix(x0, x1) + 2 * cost_matrix(cond, cond)
    rows = linear_sum_assignment(cost.double().T)[1]
    assert partner(x0, pairs.x0) == rows.tolist()
    assert MinibatchOT(cond_weight=1e9).pair(x0, x1, cond).x0.equal(x0)


def test_a_mapping_costs_the_sum_of_its_entries():
    x0, x1 = normals(0, 6, 2)
    cond = {
        "label": torch.tensor([0, 1, 0, 1, 0, 1]),
        "code": torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1], [3, 1], [0, 2]]),
        "angle": torch.linspace(-1, 1, 6),
    }
    same_code = (cond["code"][:, None] == cond["code"]).all(2)
    extra = (
        (cond["label"][:, None] != cond["label"]).float()
        + (~same_code).float()
        + (cond["angle"][:, None] - cond["angle"]).square()
    )
    cost = cost_matrix(x0, x1) + 1.5 * extra
    best = min(itertools.permutations(range(6)), key=lambda p: cost[list(p), range(6)].sum())
    pairs = MinibatchOT(cond_weight=1.5).pair(x0, x1, cond)
    assert partner(x0, pairs.x0) == list(best)
    assert pairs.cond is cond


def test_infinite_weight_on_several_labels_means_their_joint_class():
    x0, x1 = normals(0, 40, 2)
    cond = {"a": torch.arange(40) % 2, "b": torch.arange(40) // 20 > 0}
    origin = partner(x0, MinibatchOT(cond_weight=INF).pair(x0, x1, cond).x0)
    assert cond["a"][origin].equal(cond["a"])
    assert cond["b"][origin].equal(cond["b"])
    assert origin != list(range(40))


def test_labels_of_several_columns_are_one_class_per_row():
    x0, x1 = normals(0, 40, 2)
    label = torch.stack([torch.arange(40) % 2, torch.arange(40) // 20], 1)
    origin = partner(x0, MinibatchOT(cond_weight=INF).pair(x0, x1, label).x0)
    assert label[origin].equal(label)
    assert len({tuple(row) for row in label.tolist()}) == 4


@pytest.mark.parametrize("dim", [2, 50])
def test_a_batch_far_from_the_origin_is_paired_exactly(dim):
    """Products of coordinates of 3000 have an error of 100 in float32."""
    x0, x1 = (3000 * (-1) ** torch.arange(dim) + x for x in normals(0, 40, dim))
    cost = torch.cdist(x0.double(), x1.double()).square()
    least = cost[linear_sum_assignment(cost)].sum().item()
    found = total(MinibatchOT().pair(x0, x1).x0, x1)
    assert found == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_pair_their_joint_batch_or_their_own(monkeypatch, rank):
    x0, x1 = normals(0, 30, 2)
    label = torch.arange(30) % 2
    mine = slice(15 * rank, 15 * rank + 15)
    everyone = {15: {x[mine].sum().item(): x for x in (x0, x1, label)}}
    monkeypatch.setattr(basic, "place", lambda: (rank, 2))
    monkeypatch.setattr(basic, "gathered", lambda x: everyone[len(x)][x.sum().item()])
    monkeypatch.setattr(basic, "own", lambda x, batch: x[batch * rank :][:batch])

    def paired(x0, x1, label, **options):
        return MinibatchOT(cond_weight=INF, **options).pair(x0, x1, label).x0

    own = x0[mine], x1[mine], label[mine]
    joint, within = paired(x0, x1, label)[mine], paired(*own)
    assert not joint.equal(within)
    assert paired(*own, across_ranks=True).equal(joint)
    assert paired(*own[:2], {"label": own[2]}, across_ranks=True).equal(joint)
    pairs = MinibatchOT(across_ranks=True).pair(*own[:2])
    assert pairs.x0.equal(MinibatchOT().pair(x0, x1).x0[mine])
    pairs = MinibatchOT(cond_weight=INF, across_ranks=True).pair(*own)
    assert pairs.x1 is own[1]
    assert pairs.cond is own[2]
    with torch.no_grad():  # validation pairs within a rank
        assert paired(*own, across_ranks=True).equal(within)
    sharp = Sinkhorn(1e-3, cond_weight=INF, max_iters=20_000)
    assert sharp.pair(*own, generator=seeded(0)).x0.equal(within)


def test_sinkhorn_runs_from_the_permutation_to_independence():
    x0, noise = torch.arange(24.0).reshape(12, 2), normals(0, 12, 2)[0]
    x1 = x0.flip(0) + 0.1 * noise
    close = Sinkhorn(reg=0.1).pair(x0, x1, generator=seeded(0))
    assert close.x0.equal(MinibatchOT().pair(x0, x1).x0)
    assert close.x0.equal(x0.flip(0))
    plan = entropic_plan(cost_matrix(x0, x1), reg=1e7, max_iters=100)
    assert_close(plan, torch.full_like(plan, 1 / 144), rtol=1e-4, atol=0)


def test_sinkhorn_draws_partners_from_the_plan_given_the_data():
    # Copies of four points: the plan between the copies is the plan between the points.
    x0, x1 = normals(0, 4, 1)
    given_x1 = 4 * entropic_plan(cost_matrix(x0, x1), reg=2.0, max_iters=1000)
    generator, counts = seeded(0), torch.zeros(4, 4)
    for _ in range(40):
        pairs = Sinkhorn(reg=2.0).pair(x0.repeat(25, 1), x1.repeat(25, 1), generator=generator)
        assert pairs.x1.equal(x1.repeat(25, 1))
        origin = torch.tensor(partner(x0, pairs.x0))
        counts.index_put_((origin, torch.arange(100) % 4), torch.ones(100), accumulate=True)
    assert_close(counts / 1000, given_x1.float(), rtol=0, atol=0.06)


def test_sinkhorn_is_reproducible_and_respects_classes():
    x0, x1 = normals(0, 50, 2)
    label = torch.arange(50) % 3
    label[7] = 9  # alone in its class
    coupling = Sinkhorn(reg=5.0, cond_weight=INF)
    first, second = (coupling.pair(x0, x1, label, seeded(7)).x0 for _ in range(2))
    assert first.equal(second)
    assert not first.equal(coupling.pair(x0, x1, label, seeded(8)).x0)
    assert label[partner(x0, first)].equal(label)
    with pytest.warns(UserWarning, match="Sinkhorn ignores cond"):
        Sinkhorn(reg=5.0).pair(x0, x1, label)


def test_sinkhorn_that_has_not_converged_warns():
    x0, x1 = normals(0, 50, 2)
    with pytest.warns(UserWarning, match=r"off by more than 1e-06 after 5 iterations at reg 0.01"):
        Sinkhorn(reg=0.01, max_iters=5).pair(x0, x1)


def test_independent_returns_its_inputs():
    x0, x1 = normals(0, 3, 2)
    label = torch.arange(3)
    pairs = Independent().pair(x0, x1, label)
    assert pairs.x0 is x0
    assert pairs.x1 is x1
    assert pairs.cond is label
    assert pairs.log_weight is None
    assert all(isinstance(c, Coupling) for c in (Independent(), MinibatchOT(), Sinkhorn(1.0)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MinibatchOT("l2"), "cost must be one of cityblock, euclidean, inner, sqeuclidean"),
        (lambda: MinibatchOT(cond_weight=-1.0), r"cond_weight must be at least 0, got -1"),
        (lambda: MinibatchOT(cond_weight=math.nan), r"cond_weight must be at least 0, got nan"),
        (lambda: Sinkhorn(0.0), r"reg must be positive and finite, got 0"),
        (lambda: Sinkhorn(INF), r"reg must be positive and finite, got inf"),
        (lambda: Sinkhorn(1.0, max_iters=0), r"max_iters must be at least 1, got 0"),
        (lambda: Sinkhorn(1.0, "l2"), "cost must be one of"),
        (lambda: Sinkhorn(1.0, cond_weight=-1.0), r"cond_weight must be at least 0, got -1"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("coupling", [MinibatchOT(cond_weight=1.0), Sinkhorn(1.0, cond_weight=1.0)])
def test_bad_batches(coupling):
    x, bad = torch.ones(4, 2), torch.tensor([[1.0, 2.0]] * 3 + [[math.nan, 0.0]])
    with pytest.raises(ValueError, match=r"x0 must have the shape of x1, \(4, 2\), got \(3, 2\)"):
        coupling.pair(x[:3], x)
    with pytest.raises(ValueError, match="x0 must be finite, got 1 NaN"):
        coupling.pair(bad, x)
    with pytest.raises(ValueError, match="x1 must be finite, got 1 NaN"):
        coupling.pair(x, bad)
    with pytest.raises(ValueError, match=r"cond\['a'\] must be finite, got 1 NaN"):
        coupling.pair(x, x, {"a": bad})
    with pytest.raises(ValueError, match=r"cond must have length 4, got shape \(3,\)"):
        coupling.pair(x, x, torch.arange(3))
    with pytest.raises(TypeError, match=r"cond\['a'\] must be a tensor, got list"):
        coupling.pair(x, x, {"a": [1, 2, 3, 4]})


WRONG = [
    (
        torch.ones(4, 2, dtype=torch.cfloat),
        TypeError,
        "must be a tensor of real numbers, got torch",
    ),
    (torch.ones(4, 2, device="meta"), TypeError, "must hold data, got a tensor on the meta device"),
    (torch.ones(0, 2), ValueError, r"must hold at least one sample, .* got shape \(0, 2\)"),
    (torch.ones(()), ValueError, r"must hold at least one sample, .* got shape \(\)"),
    ([[1.0]], TypeError, "must be a tensor of real numbers, got list"),
]


@pytest.mark.parametrize(("x", "error", "message"), WRONG)
def test_bad_kinds_are_refused(x, error, message):
    good = torch.ones(4, 2)
    for coupling in (Independent(), MinibatchOT(), Sinkhorn(1.0), Gibbs(1.0), Gibbs(INF)):
        with pytest.raises(error, match=f"x0 {message}"):
            coupling.pair(x, good)
        with pytest.raises(error, match=f"x1 {message}"):
            coupling.pair(good, x)
    for function in (cost_matrix, suggest_epsilon):
        with pytest.raises(error, match=f"x0 {message}"):
            function(x, good)
        with pytest.raises(error, match=f"x1 {message}"):
            function(good, x)


def test_samples_that_would_broadcast_are_refused():
    for coupling in (Independent(), MinibatchOT(), Sinkhorn(1.0), Gibbs(1.0)):
        with pytest.raises(
            ValueError, match=r"x0 must have the shape of x1, \(4, 2\), got \(4, 1\)"
        ):
            coupling.pair(torch.ones(4, 1), torch.ones(4, 2))


def test_complex_conditions_are_refused():
    x = torch.randn(4, 2)
    with pytest.raises(TypeError, match=r"cond must hold real numbers, got torch.complex64"):
        MinibatchOT(cond_weight=1.0).pair(x, x, torch.ones(4, dtype=torch.cfloat))


def test_a_cost_of_half_precision_is_taken_as_it_is():
    """A matrix product of a user's own cost returns bfloat16 under autocast."""
    x0, x1 = normals(0, 32, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = MinibatchOT(lambda a, b: (a - b).abs().bfloat16().sum(-1)).pair(x0, x1)
    least = cost_matrix(x0, x1, "cityblock")[assign(cost_matrix(x0, x1, "cityblock")), range(32)]
    assert total(mixed.x0, x1, "cityblock") == pytest.approx(least.sum().item(), rel=0.01)


def test_infinite_weight_needs_labels():
    x = torch.ones(4, 2)
    with pytest.raises(TypeError, match=r"cond must hold integer labels.*set a finite cond_weight"):
        MinibatchOT(cond_weight=INF).pair(x, x, torch.rand(4))
