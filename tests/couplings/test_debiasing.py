"""Removal of the bias of Gibbs weights."""

import math

import numpy as np
import ot
import pytest
import torch
from torch.testing import assert_close

from flowkit.couplings import (
    Division,
    Gibbs,
    Potentials,
    RowSoftmax,
    cost_matrix,
    debiasing,
    gibbs,
)
from tests.couplings.kernels import (
    generated,
    moments,
    normals,
    seeded,
    two_classes,
    weighted,
    weights,
)


def _shifted(batch: int, seed: int = 0):
    x0, noise = normals(batch, 1, seed=seed)
    return x0, 2 + 0.5 * noise


def _seen(coupling: Gibbs, batches: int, batch: int, skip: int = 0):
    """Weights and pairs of a stream, all but the first ``skip`` batches."""
    parts = []
    for k in range(batches):
        pairs = coupling.pair(*_shifted(batch, seed=k), generator=seeded(k))
        w = torch.ones(len(pairs.x0)) if pairs.log_weight is None else pairs.log_weight.exp()
        parts.append((w.double(), pairs.x0, pairs.x1))
    return tuple(torch.cat(part) for part in zip(*parts[skip:], strict=True))


def test_one_division_halves_the_bias_as_predicted():
    coupling = Gibbs(4.0, "sqeuclidean", "none", Division(4000))
    levels = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    quantiles = torch.special.ndtri(levels)[:, None]
    coupling.pair(quantiles, 2 + 0.5 * quantiles)  # to be remembered
    mean, std = generated(*weighted(coupling.eval(), 2, 0.5))
    assert mean == pytest.approx(1.8926, abs=2e-4)
    assert std == pytest.approx(0.5033, abs=2e-4)


def test_running_potentials_remove_the_bias():
    seen = _seen(Gibbs(4.0, "sqeuclidean", "running", Potentials(1024)), 200, 256, skip=40)
    mean, std = generated(*seen)
    assert mean == pytest.approx(2.0, abs=0.03)
    assert std == pytest.approx(0.5, abs=0.02)
    # The covariance c of the entropic plan solves c² + (ε/2) c = variance of x0 · variance of x1.
    assert moments(*seen)[1][0, 1] == pytest.approx(math.sqrt(1 + 0.25) - 1, abs=0.02)


def test_row_softmax_keeps_the_source_and_moves_the_data():
    x0, x1 = _shifted(4000)
    pairs = Gibbs(4.0, "sqeuclidean", debias=RowSoftmax()).pair(x0, x1, generator=seeded())
    assert pairs.x0 is x0
    assert pairs.log_weight is None
    # One half Sinkhorn step: y | x has precision 4 + 2/ε and mean (8 + 2x/ε) / precision.
    slope, left = 0.5 / 4.5, 1 / 4.5
    z = torch.cat([pairs.x0, pairs.x1], 1).double()
    assert z[:, 1].mean() == pytest.approx(8 / 4.5, abs=0.04)
    assert z.T.cov()[0, 1] == pytest.approx(slope, abs=0.03)
    assert z[:, 1].var() == pytest.approx(left + slope**2, abs=0.02)


def test_row_softmax_draws_from_the_rows_of_the_kernel():
    """Of copies of four points: which copy is drawn does not matter."""
    x0, x1 = normals(4, 2)
    expected = (-cost_matrix(x0, x1, "euclidean") / 0.7).softmax(1)
    ends, counts = (x0.repeat(200, 1), x1.repeat(200, 1)), torch.zeros(4, 4)
    for seed in range(15):
        drawn = Gibbs(0.7, debias=RowSoftmax()).pair(*ends, generator=seeded(seed)).x1
        columns = (drawn[:, None] == x1).all(2).int().argmax(1)
        counts.index_put_((torch.arange(800) % 4, columns), torch.ones(800), accumulate=True)
    assert_close(counts / 3000, expected, rtol=0, atol=0.035)
    assert Gibbs(0.7, debias=RowSoftmax()).pair(*ends, generator=seeded(14)).x1.equal(drawn)


def test_a_pool_draws_pairs_by_their_weights():
    x0, x1 = normals(8, 2)
    cond = torch.arange(8.0)[:, None]
    expected = (-(x0 - x1).norm(dim=1) / 0.5).softmax(0)
    coupling, counts = Gibbs(0.5, pool=4), torch.zeros(8)
    for seed in range(3000):
        pairs = coupling.pair(x0, x1, cond, seeded(seed))
        assert len(pairs.x0) == 2
        assert pairs.log_weight is None
        rows = pairs.cond[:, 0].long()
        assert pairs.x0.equal(x0[rows])
        assert pairs.x1.equal(x1[rows])
        counts.index_add_(0, rows, torch.ones(2))
    assert_close(counts / 6000, expected, rtol=0, atol=0.025)


def test_a_pair_with_all_the_weight_is_drawn_every_time():
    x0, x1 = torch.zeros(6, 1), torch.tensor([[90.0], [0.0], [90.0], [80.0], [90.0], [90.0]])
    assert Gibbs(0.5, pool=2).pair(x0, x1).x1.tolist() == [[0.0]] * 3


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_potentials_on_a_fixed_set_are_those_of_sinkhorn(epsilon):
    """A memory that holds the same points again and again does Sinkhorn on them."""
    x0, x1 = normals(40, 2)
    x1 = x1 + 1
    coupling = Gibbs(epsilon, "sqeuclidean", "none", Potentials(80))
    for _ in range(300):
        coupling.pair(x0, x1)
    f, g = coupling.debias.factors(coupling.log_kernel, x0, x1, None)
    cost = cost_matrix(x0, x1).double()
    plan = (f[:, None] + g - cost / epsilon).exp() / 1600
    uniform = np.full(40, 1 / 40)
    expected = ot.sinkhorn(uniform, uniform, cost.numpy(), epsilon, numItermax=10_000, stopThr=1e-9)
    assert_close(plan, torch.from_numpy(expected), rtol=1e-3, atol=1e-7)


def test_division_is_by_the_tilts_of_earlier_batches():
    (a0, a1), (b0, b1) = normals(50, 3), normals(30, 3, seed=1)
    coupling = Gibbs(2.0, "euclidean", "none", Division(1000))
    coupling.pair(a0, a1)
    w = weights(coupling, b0, b1)
    h_x = (-cost_matrix(b0, a1, "euclidean") / 2).double().exp().mean(1)
    h_y = (-cost_matrix(a0, b1, "euclidean") / 2).double().exp().mean(0)
    plain = weights(Gibbs(2.0, "euclidean", "none"), b0, b1)
    assert_close(w, plain / (h_x * h_y), rtol=1e-5, atol=0)


def test_memory_keeps_the_last_samples_and_rests_in_eval():
    coupling = Gibbs(2.0, debias=Division(50))
    for seed in range(3):
        coupling.pair(*normals(30, 2, seed=seed))
    last = normals(30, 2, seed=2)
    assert coupling.debias.rows.shape == (2, 50, 4)
    assert coupling.debias.rows[0, -30:, :2].equal(last[0])
    assert coupling.debias.rows[1, -30:, :2].equal(last[1])
    before = coupling.debias.rows
    coupling.eval().pair(*normals(30, 2, seed=5))
    assert coupling.debias.rows is before


@pytest.mark.parametrize("debias", [Division, Potentials])
def test_state_is_restored_exactly(debias):
    def stream(coupling, seeds):
        return [coupling.pair(*normals(20, 2, seed=k)).log_weight for k in seeds]

    whole, first, second = (Gibbs(1.0, normalize="running", debias=debias(64)) for _ in range(3))
    expected = stream(whole, range(12))[6:]
    stream(first, range(6))
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(stream(second, range(6, 12)), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("debias", [Division, Potentials])
def test_tilts_of_a_class_are_its_own(debias):
    """Weights within a class are as if there were no other."""
    x0, x1, label = two_classes(200)
    both = Gibbs(1.0, "sqeuclidean", "class", debias(4000))
    alone = Gibbs(1.0, "sqeuclidean", "batch", debias(4000))
    rows = label == 1
    for seed in range(4):
        x0 = normals(200, 1, seed=seed)[0]
        ours = both.pair(x0, x1, label).log_weight[rows]
        assert_close(ours, alone.pair(x0[rows], x1[rows]).log_weight, rtol=1e-4, atol=1e-4)


def test_means_run_over_the_seen_samples_of_a_class():
    """Two samples of the first class, one of the second, none of the third: its factor is 1."""
    (a0, a1), (b0, b1) = normals(3, 2), normals(3, 2, seed=1)
    coupling = Gibbs(2.0, "sqeuclidean", "none", Division(100))
    coupling.debias(coupling.log_kernel, a0, a1, torch.tensor([0, 0, 1]))
    f, g = coupling.debias.factors(coupling.log_kernel, b0, b1, torch.arange(3))
    of_x0, of_x1 = (-cost_matrix(b0, a1) / 2).exp(), (-cost_matrix(b1, a0) / 2).exp()
    for factor, kernel in ((f, of_x0), (g, of_x1)):
        means = torch.stack([kernel[0, :2].mean(), kernel[1, 2], torch.tensor(1.0)])
        assert_close(factor, -means.log())


def test_row_softmax_stays_within_classes():
    x0, x1, label = two_classes(200)
    pairs = Gibbs(1.0, normalize="class", debias=RowSoftmax()).pair(x0, x1, label)
    assert pairs.cond.equal(label)
    assert not pairs.x1.equal(x1)
    assert set(pairs.x1[label == 0].ravel().tolist()) <= set(x1[label == 0].ravel().tolist())
    moved = Gibbs(1.0, debias=RowSoftmax()).pair(x0, x1, {"label": label, "x": x1})
    assert moved.cond["x"].equal(moved.x1)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_their_batches_in_training_alone(monkeypatch, rank):
    x0, x1, label = two_classes(30)
    mine = slice(15 * rank, 15 * rank + 15)

    def weighed(normalize, rows, debias=None, training=True):
        cond = label[rows] if normalize == "class" else None
        coupling = Gibbs(1.0, normalize=normalize, debias=debias).train(training)
        return coupling.pair(x0[rows], x1[rows], cond).log_weight

    expected = {}
    for normalize in ("batch", "class"):
        joint, within = weighed(normalize, slice(None))[mine], weighed(normalize, mine)
        assert not torch.allclose(joint, within)
        expected[normalize] = joint, within
    whole, plain = Division(50), weighed("none", slice(None))
    weighed("none", slice(None), whole)
    alone = weighed("none", mine, Division(50), training=False)
    for module in (gibbs, debiasing):
        monkeypatch.setattr(
            module,
            "gathered",
            lambda x: (
                {1: plain, 3: whole.rows.transpose(0, 1)}[x.ndim]
                if x.is_floating_point()
                else label
            ),
        )
    monkeypatch.setattr(gibbs, "own", lambda x, batch: x[batch * rank :][:batch])
    for normalize, (joint, within) in expected.items():
        assert_close(weighed(normalize, mine), joint)
        assert_close(weighed(normalize, mine, training=False), within)
    memory = Division(50)
    weighed("none", mine, memory)
    assert memory.rows.equal(whole.rows)
    assert weighed("none", mine, Division(50), training=False).equal(alone)


@pytest.mark.filterwarnings("ignore:only 4.4% of the variance")
@pytest.mark.parametrize("debias", [Division, Potentials])
def test_debiasing_shrinks_the_tilt(debias):
    plain, ours = Gibbs(2.0, "sqeuclidean"), Gibbs(2.0, "sqeuclidean", debias=debias(4096))
    for seed in range(40):
        pairs = ours.pair(*_shifted(512, seed=seed))
    before, after = (c.telemetry(pairs)["tilt"] for c in (plain, ours))
    assert after < before / (4 if debias is Division else 50)
