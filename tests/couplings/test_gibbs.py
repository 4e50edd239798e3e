"""Gibbs weights against closed forms: of Gaussians, for which everything is known."""

import math
import warnings

import numpy as np
import ot
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes
from torch.testing import assert_close

from flowkit.couplings import (
    Coupling,
    Division,
    Gibbs,
    Independent,
    Potentials,
    RowSoftmax,
    cost_matrix,
)
from flowkit.losses import flow_matching_loss
from flowkit.metrics import point_metrics
from flowkit.nn import MLP
from flowkit.types import Pairs

INF = math.inf


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(batch: int, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, batch, *shape, generator=seeded(seed))
    return x[0], x[1]


def weights(coupling: Gibbs, x0, x1, cond=None) -> torch.Tensor:
    return coupling.pair(x0, x1, cond).log_weight.double().exp()


def quadrature(mean: float = 0.0, std: float = 1.0):
    """Weights, ``x0`` and ``x1``: all pairs of Gauss-Hermite nodes of N(0, 1) and N(mean, std²)."""
    nodes, mass = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
    x0, x1 = torch.meshgrid(nodes, mean + std * nodes, indexing="ij")
    return torch.outer(mass, mass).ravel() / mass.sum() ** 2, x0.reshape(-1, 1), x1.reshape(-1, 1)


def weighted(coupling: Gibbs, mean: float = 0.0, std: float = 1.0):
    """Multiply the nodes' weights by the coupling's: expectations under ``q`` without sampling."""
    mass, x0, x1 = quadrature(mean, std)
    return mass * weights(coupling, x0, x1), x0, x1


def moments(w, x0, x1):
    """Weighted means and the covariance matrix of one-dimensional pairs."""
    z = torch.cat([x0, x1], 1).double()
    mean = (w[:, None] * z).sum(0) / w.sum()
    return mean, (w[:, None] * (z - mean)).T @ (z - mean) / w.sum()


def generated(w, x0, x1) -> tuple[float, float]:
    """Mean and deviation of N(0, 1) carried along the flow that regression on the pairs learns.

    Of Gaussian pairs the flow is affine: it maps the source's tilted law onto the data's.
    """
    mean, cov = moments(w, x0, x1)
    std = (cov[1, 1] / cov[0, 0]).sqrt()
    return (mean[1] - std * mean[0]).item(), std.item()


# ----------------------------------------------------------------------- between equal Gaussians


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_weighted_moments_of_equal_gaussians(epsilon, normalize):
    w, x0, x1 = weighted(Gibbs(epsilon, "sqeuclidean", normalize))
    a = 2 / epsilon
    _, cov = moments(w, x0, x1)
    assert cov[0, 0] == pytest.approx((1 + a) / (1 + 2 * a), rel=1e-5)
    assert cov[0, 1] / cov.diagonal().prod().sqrt() == pytest.approx(a / (1 + a), rel=1e-5)
    square = (w * (x0 - x1)[:, 0].square()).sum() / w.sum()
    assert square == pytest.approx(2 / (1 + 2 * a), rel=1e-5)
    ess = w.sum() ** 2 / (w.square() / quadrature()[0]).sum()
    assert ess == pytest.approx(math.sqrt(1 + 8 / epsilon) / (1 + 4 / epsilon), rel=1e-5)
    if epsilon == 4:
        known = [cov[0, 0], cov[0, 1] / cov[0, 0], square, ess]
        assert known == pytest.approx([0.75, 1 / 3, 1.0, 0.8660254], rel=1e-5)


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_effective_sample_size_falls_as_a_power_of_the_dimension(dim):
    coupling = Gibbs(4.0, "sqeuclidean")
    found = coupling.telemetry(coupling.pair(*normals(400_000, dim)))
    assert found["ess"].item() == pytest.approx(0.8660**dim, rel=0.03)


def _path_energy(epsilon: float) -> float:
    """Energy of the flow learnt from weighted pairs of N(0, 1): regression on a grid of times."""
    _, cov = moments(*weighted(Gibbs(epsilon, "sqeuclidean")))
    steps = 1000
    energy, scale = 0.0, 1.0
    for k in range(steps):
        t = (k + 0.5) / steps
        position = torch.tensor([1 - t, t], dtype=torch.float64)
        velocity = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        slope = (velocity @ cov @ position / (position @ cov @ position)).item()
        middle = scale * math.exp(slope / steps / 2)
        energy += (slope * middle) ** 2 / steps
        scale *= math.exp(slope / steps)
    return energy


def test_path_energy_of_the_learnt_flow():
    energies = []
    for epsilon in (1.0, 4.0, 40.0, 1e7):
        rho = (2 / epsilon) / (1 + 2 / epsilon)
        expected = 2 * (1 - rho) - math.sqrt(1 - rho**2) * math.acos(rho)
        energies.append(_path_energy(epsilon))
        assert energies[-1] == pytest.approx(expected, abs=1e-5)
    assert energies[1] == pytest.approx(0.172774, abs=1e-5)
    assert energies[-1] == pytest.approx(0.429204, abs=1e-5)
    assert energies == sorted(energies)


def test_energy_below_the_transport_is_flagged():
    """Tilted flows move too little: their energy falls below W2², which is no virtue."""
    x0, x1 = normals(500, 1)
    x1 = 2 + 0.5 * x1
    mean, std = generated(*weighted(Gibbs(1.0, "sqeuclidean"), 2, 0.5))
    path = torch.stack([x0, mean + std * x0])
    record = point_metrics(x1, path[-1], path, 1)
    assert record["path_energy_below_w2_squared"]
    assert record["path_energy"] < record["transport_w2_squared"]


# -------------------------------------------------------------------------- bias and its removal


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


def test_plain_weights_bias_the_samples_as_predicted():
    mean, std = generated(*weighted(Gibbs(4.0, "sqeuclidean"), 2, 0.5))
    assert mean == pytest.approx(1.49086, abs=1e-5)
    assert std == pytest.approx(0.57735, abs=1e-5)


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


# --------------------------------------------------------------------------------- what theory says


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_weights_are_the_entropic_plan_between_their_own_ends_only(epsilon):
    x0, x1 = normals(30, 2)
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    coupling = Gibbs(epsilon, normalize="none")
    w = weights(coupling, x0[rows.ravel()], x1[columns.ravel()]).reshape(30, 30).numpy()
    q, cost = w / w.sum(), -epsilon * np.log(w)
    options = {"method": "sinkhorn_log", "numItermax": 100_000, "stopThr": 1e-15, "warn": False}
    own = ot.sinkhorn(q.sum(1), q.sum(0), cost, epsilon, **options)
    assert abs(own - q).max() < 1e-12
    uniform = np.full(30, 1 / 30)
    given = ot.sinkhorn(uniform, uniform, cost, epsilon, **options)
    assert abs(given - q).max() > 0.1 * q.max()


def test_points_on_concentric_circles_are_not_tilted():
    angle = torch.arange(60).double() * 2 * math.pi / 60
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    w = (-torch.cdist(circle, 3 * circle) / 0.8).exp()
    for sums in (w.sum(0), w.sum(1)):
        assert_close(sums / sums.mean(), torch.ones(60).double(), rtol=0, atol=1e-14)
    # In the float32 of training.
    x0, x1 = circle.repeat_interleave(60, 0), 3 * circle.repeat(60, 1)
    w = weights(Gibbs(0.8), x0, x1).reshape(60, 60)
    for sums in (w.sum(0), w.sum(1)):
        assert_close(sums, torch.full((60,), 60.0).double(), rtol=1e-5, atol=0)
    found = Gibbs(0.8).telemetry(Pairs(circle, 3 * circle))
    assert found["tilt"] < 1e-10
    assert found["interaction"] == pytest.approx(1, abs=1e-5)


def test_weights_vanish_as_selectors_in_high_dimension():
    x0, x1 = normals(4000, 3072)
    coupling = Gibbs(0.09 * math.sqrt(3072))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = coupling.telemetry(coupling.pair(x0, x1))
    assert found["ess"].item() == pytest.approx(0.960, abs=0.005)


@pytest.mark.parametrize(("batch", "expected"), [(2, 1.298), (8, 1.052), (64, 1.007)])
def test_self_normalization_is_biased_and_running_z_is_not(batch, expected):
    # Batches of a size at once: classes of as many pairs, each normalized on its own.
    x0, x1 = normals(2_048_000, 1)
    square = (x0 - x1)[:, 0].square().double()
    w = weights(Gibbs(4.0, "sqeuclidean", "class"), x0, x1, torch.arange(len(x0)) // batch)
    # With the known Z = 1/√2 the mean is 1: what that one misses by is noise of both.
    exact = (-square / 4).exp() * math.sqrt(2)
    assert 1 + ((w - exact) * square).mean() == pytest.approx(expected, abs=0.0015)

    running = Gibbs(4.0, "sqeuclidean", "running")
    seen = 3000 * batch
    total, parts = 0.0, [x[:seen].split(batch) for x in (x0, x1, square, exact)]
    for *ends, squares, known in zip(*parts, strict=True):
        w = running.pair(*ends).log_weight.double().exp()
        total += ((w - known) * squares).sum().item()
    assert 1 + total / seen == pytest.approx(1.0, abs=0.03 if batch == 2 else 0.006)


def test_running_log_z_is_the_mean_over_all_batches():
    coupling = Gibbs(1.0, normalize="running")
    batches = [normals(7, 2, seed=k) for k in range(20)]
    for x0, x1 in batches:
        last = coupling.pair(x0, x1).log_weight
    x0, x1 = (torch.cat(ends) for ends in zip(*batches, strict=True))
    z = (-(x0 - x1).norm(dim=1)).exp().mean()
    assert_close(coupling.log_z.exp(), z, rtol=1e-5, atol=0)
    assert_close(last, -(x0 - x1).norm(dim=1)[-7:] - z.log(), rtol=1e-5, atol=1e-5)
    assert coupling.num_batches == 20
    coupling.eval().pair(x0 + 9, x1)
    assert coupling.num_batches == 20


def test_running_log_z_before_any_batch_is_that_of_the_batch():
    x0, x1 = normals(7, 2)
    ours = Gibbs(1.0, normalize="running").eval().pair(x0, x1).log_weight
    assert ours.equal(Gibbs(1.0).pair(x0, x1).log_weight)


# --------------------------------------------------------------------------------------- classes


def two_classes(batch: int):
    x0, noise = normals(batch, 1)
    label = torch.arange(batch) % 2
    return x0, noise + 3 * label[:, None], label


def test_plain_weights_shift_the_shares_of_classes_and_class_weights_do_not():
    mass, x0, near = quadrature()
    x0, x1 = torch.cat([x0, x0]), torch.cat([near, near + 3])
    label = torch.arange(2).repeat_interleave(len(near))
    with pytest.warns(UserWarning, match="how often each label occurs.*normalize='class'"):
        w = mass.repeat(2) * weights(Gibbs(4.0, "sqeuclidean"), x0, x1, label)
    assert w[label == 1].sum() / w.sum() == pytest.approx(0.2451, abs=5e-5)

    x0, x1, label = two_classes(10_000)
    w = weights(Gibbs(4.0, "sqeuclidean", "class"), x0, x1, label)
    assert w[label == 1].sum() / w.sum() == pytest.approx(0.5, abs=1e-6)


@given(seed=st.integers(0, 2**31), classes=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_class_weights_are_those_of_each_class_alone(seed, classes):
    x0, x1 = normals(24, 2, seed=seed)
    label = 7 * torch.randint(classes, (24,), generator=seeded(seed)) - 3
    w = Gibbs(0.4, normalize="class").pair(x0, x1, label).log_weight
    for k in label.unique():
        rows = label == k
        assert_close(w[rows], Gibbs(0.4).pair(x0[rows], x1[rows]).log_weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("debias", [Division(4000), Potentials(4000)])
def test_tilts_of_a_class_are_its_own(debias):
    """Weights within a class are as if there were no other."""
    x0, x1, label = two_classes(200)
    both = Gibbs(1.0, "sqeuclidean", "class", debias)
    alone = Gibbs(1.0, "sqeuclidean", "batch", type(debias)(4000))
    rows = label == 1
    for seed in range(4):
        x0 = normals(200, 1, seed=seed)[0]
        ours = both.pair(x0, x1, label).log_weight[rows]
        assert_close(ours, alone.pair(x0[rows], x1[rows]).log_weight, rtol=1e-4, atol=1e-4)


def test_row_softmax_stays_within_classes():
    x0, x1, label = two_classes(200)
    pairs = Gibbs(1.0, normalize="class", debias=RowSoftmax()).pair(x0, x1, label)
    assert pairs.cond.equal(label)
    assert not pairs.x1.equal(x1)
    assert set(pairs.x1[label == 0].ravel().tolist()) <= set(x1[label == 0].ravel().tolist())
    moved = Gibbs(1.0, debias=RowSoftmax()).pair(x0, x1, {"label": label, "x": x1})
    assert moved.cond["x"].equal(moved.x1)


# -------------------------------------------------------------------------------------- telemetry


def test_telemetry_of_known_weights():
    x0, x1 = normals(64, 2)
    log_weight = torch.linspace(-1, 1, 64)
    found = Gibbs(1.0).telemetry(Pairs(x0, x1, None, log_weight))
    w = log_weight.exp()
    assert_close(found["ess"], w.sum() ** 2 / (64 * w.square().sum()))
    assert_close(found["log_weight_variance"], log_weight.var(correction=0))


def test_interaction_is_the_share_that_is_not_separable():
    """Of ‖x − y‖² between N(0, I_d): 4 ⟨x, y⟩² has variance 4d of 8d, whatever the scale of ε."""
    x0, x1 = normals(256, 20)
    for epsilon in (20.0, 500.0):
        found = Gibbs(epsilon, "sqeuclidean").telemetry(Pairs(x0, x1))
        assert found["interaction"].item() == pytest.approx(0.5, abs=0.05)
    with pytest.warns(UserWarning, match=r"only 0.\d% of the variance .* debias=Potentials\(\)"):
        separable = Gibbs(99.0, lambda a, b: a.sum(-1) + b.sum(-1)).telemetry(Pairs(x0, x1))
    assert separable["interaction"] < 0.001


def test_tilt_is_the_relative_variance_of_the_closed_form():
    a = 1 / 3  # h_x ∝ exp(−x²/6) at ε = 4, whose relative variance is known
    expected = (1 + a) / math.sqrt(1 + 2 * a) - 1
    coupling = Gibbs(4.0, "sqeuclidean")
    tilts = [coupling.telemetry(Pairs(*normals(256, 1, seed=k)))["tilt"] for k in range(40)]
    assert torch.stack(tilts).mean().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.filterwarnings("ignore:only 4.4% of the variance")
@pytest.mark.parametrize("debias", [Division(4096), Potentials(4096)])
def test_debiasing_shrinks_the_tilt(debias):
    plain, ours = Gibbs(2.0, "sqeuclidean"), Gibbs(2.0, "sqeuclidean", debias=debias)
    for seed in range(40):
        pairs = ours.pair(*_shifted(512, seed=seed))
    before, after = (c.telemetry(pairs)["tilt"] for c in (plain, ours))
    assert after < before / (4 if isinstance(debias, Division) else 50)


def test_few_effective_pairs_warn_once():
    x0, x1 = normals(256, 8)
    coupling = Gibbs(0.05)
    with pytest.warns(UserWarning, match=r"leave \d.\d% of the pairs effective at epsilon 0.05"):
        coupling.telemetry(coupling.pair(x0, x1))
    coupling.telemetry(coupling.pair(x0, x1))  # a second warning would be an error here


def test_class_telemetry_looks_at_the_largest_class():
    x0, x1, label = two_classes(200)
    label[:60] = 1
    coupling = Gibbs(4.0, "sqeuclidean", "class")
    ours = coupling.telemetry(Pairs(x0, x1, label, torch.zeros(200)))
    rows = label == 1
    alone = Gibbs(4.0, "sqeuclidean").telemetry(Pairs(x0[rows], x1[rows]))
    assert_close(ours["tilt"], alone["tilt"])
    assert_close(ours["interaction"], alone["interaction"])


# ------------------------------------------------------------------------------ numbers and inputs


def test_large_costs_leave_weights_of_mean_one():
    x0, x1 = torch.zeros(512, 1), 1000 + torch.rand(512, 1)
    w = weights(Gibbs(1.0), x0, x1)
    assert w.isfinite().all()
    assert abs(w.mean() - 1) < 1e-6
    assert w.max() / w.min() == pytest.approx(math.e, rel=0.02)


def test_infinite_epsilon_is_plain_flow_matching_bit_for_bit():
    torch.manual_seed(0)
    network = MLP((3, 4))
    batch = {"x1": torch.randn(33, 3, 4)}
    results = []
    for coupling in (Independent(), Gibbs(INF), Gibbs(INF, debias=Potentials())):
        terms = flow_matching_loss(network, batch, coupling=coupling, generator=seeded())
        network.zero_grad()
        terms["loss"].backward()
        results.append((terms, [p.grad.clone() for p in network.parameters()]))
    for terms, gradients in results[1:]:
        assert terms["loss"].equal(results[0][0]["loss"])
        assert terms["explained"].equal(results[0][0]["explained"])
        assert all(a.equal(b) for a, b in zip(gradients, results[0][1], strict=True))
    pairs = Gibbs(INF).pair(*normals(5, 2))
    assert pairs.log_weight.exp().equal(torch.ones(5))


def test_weights_multiply_the_loss_of_each_pair():
    x0, x1 = normals(40, 3)
    w = weights(Gibbs(1.0), x0, x1)
    loss = flow_matching_loss(
        lambda x, t, c: torch.zeros_like(x), {"x0": x0, "x1": x1}, coupling=Gibbs(1.0)
    )["loss"]
    assert_close(loss.double(), (w[:, None] * (x1 - x0).square()).mean(), rtol=1e-5, atol=0)


def test_drawn_pairs_shorten_the_batch_that_the_network_sees():
    rows = []

    def field(x, t, cond):
        rows.append((len(x), len(t), len(cond)))
        return torch.zeros_like(x)

    batch = {"x1": torch.randn(64, 2), "cond": torch.randn(64, 1)}
    flow_matching_loss(field, batch, coupling=Gibbs(1.0, pool=4))
    assert rows == [(16, 16, 16)]
    batch["mask"] = torch.ones(64, 2)
    with pytest.raises(ValueError, match="mask must come with a coupling that keeps x1, got Gibbs"):
        flow_matching_loss(field, batch, coupling=Gibbs(1.0, pool=4))


def test_weights_carry_no_gradient_and_pairs_do():
    x0, x1 = normals(6, 2)
    pairs = Gibbs(1.0).pair(x0.requires_grad_(), x1)
    assert not pairs.log_weight.requires_grad
    assert pairs.x0 is x0
    assert isinstance(Gibbs(1.0), Coupling)


def test_any_shape_and_dtype():
    images = torch.randint(0, 255, (2, 6, 3, 4, 4), dtype=torch.uint8)
    ours = Gibbs(100.0).pair(*images).log_weight
    flat = images.flatten(2).double()
    expected = (-(flat[0] - flat[1]).norm(dim=1) / 100).log_softmax(0) + math.log(6)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Gibbs(0.0), ValueError, "epsilon must be positive, got 0.0; inf gives plain"),
        (lambda: Gibbs(-1.0), ValueError, "epsilon must be positive, got -1"),
        (lambda: Gibbs(math.nan), ValueError, "epsilon must be positive, got nan"),
        (lambda: Gibbs(1.0, "l2"), ValueError, "cost must be one of cityblock, euclidean, inner"),
        (lambda: Gibbs(1.0, normalize="sum"), ValueError, "normalize must be one of batch, class"),
        (lambda: Gibbs(1.0, debias="tilt"), TypeError, r"debias must be None, RowSoftmax\(\)"),
        (lambda: Gibbs(1.0, pool=0), ValueError, "pool must be at least 1, got 0"),
        (lambda: Gibbs(1.0, debias=RowSoftmax(), pool=2), ValueError, "pool must be 1 with Row"),
        (lambda: Division(0), ValueError, "size must be at least 1, got 0"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_bad_batches():
    x0, x1 = normals(8, 2)
    by_class = Gibbs(1.0, normalize="class")
    with pytest.raises(
        TypeError, match=r"cond must hold labels \(B,\) if normalize='class', got None; set"
    ):
        by_class.pair(x0, x1)
    with pytest.raises(TypeError, match=r"got torch.float32 \(8, 1\); set normalize='batch'"):
        by_class.pair(x0, x1, torch.rand(8, 1))
    with pytest.raises(ValueError, match="cond must have length 8, got 7"):
        by_class.pair(x0, x1, torch.arange(7))
    with pytest.raises(ValueError, match=r"x0 must have the shape of x1, \(8, 2\)"):
        Gibbs(1.0).pair(x0[:7], x1)
    with pytest.raises(ValueError, match="x1 must be finite, got 16 NaN or infinite of 16"):
        Gibbs(1.0).pair(x0, x1 * math.nan)
    with pytest.raises(ValueError, match="cost must be finite, got NaN"):
        Gibbs(1.0, lambda a, b: (a - b).sum(-1) * math.nan).pair(x0, x1)
    with pytest.raises(ValueError, match=r"cost must map .* got \(8, 2\) for 8 pairs"):
        Gibbs(1.0, lambda a, b: (a - b).abs()).pair(x0, x1)
    with pytest.raises(ValueError, match="batch size must be at least 9, got 8"):
        Gibbs(1.0, pool=9).pair(x0, x1)


def test_underflow_of_all_weights_says_what_to_change():
    x0, x1 = normals(8, 2)
    with pytest.raises(
        ValueError,
        match=r"epsilon must give .* got 0.01, .* largest weight is exp\(-\d+.*; raise eps",
    ):
        Gibbs(0.01, normalize="none").pair(x0, x1 + 5)
    running = Gibbs(0.01, normalize="running")
    running.pair(x0, x0)
    with pytest.raises(ValueError, match="set normalize='batch'"):
        running.pair(x0, x1 + 50)
    assert Gibbs(0.01).pair(x0, x1 + 5).log_weight.isfinite().all()
    drawn = Gibbs(0.01, debias=RowSoftmax()).pair(x0, x1 + 5)
    assert drawn.x1.isfinite().all()


# ----------------------------------------------------------------------------------- two processes


def _stream(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 24, 2, generator=torch.Generator().manual_seed(seed))
    return x[0], x[1] + 1, torch.arange(24) % 3


def _couplings() -> dict[str, Gibbs]:
    return {
        "batch": Gibbs(0.5),
        "running": Gibbs(0.5, normalize="running"),
        "class": Gibbs(0.5, normalize="class"),
        "division": Gibbs(0.5, normalize="running", debias=Division(48)),
        "potentials": Gibbs(0.5, normalize="running", debias=Potentials(48)),
    }


def _weights(rank: int, world: int) -> dict[str, dict]:
    """Log weights of this rank's part of a stream of batches, and the state it leaves."""
    found = {}
    for name, coupling in _couplings().items():
        parts = []
        for seed in range(6):
            ends = [end[rank::world] for end in _stream(seed)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts.append(coupling.pair(*ends).log_weight)
        found[name] = {"log_weight": torch.stack(parts), "log_z": coupling.log_z}
        if coupling.debias is not None:
            found[name]["rows"] = coupling.debias.rows
    return found


def _process(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(_weights(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_weight_as_one(tmp_path):
    start_processes(_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = _weights(0, 1)
    for name, expected in one.items():
        ours = torch.empty_like(expected["log_weight"])
        for rank in (0, 1):
            ours[:, rank::2] = ranks[rank][name]["log_weight"]
        assert_close(ours, expected["log_weight"], rtol=1e-4, atol=1e-4)
        assert ranks[0][name]["log_z"].equal(ranks[1][name]["log_z"])
        assert_close(ranks[0][name]["log_z"], expected["log_z"], rtol=1e-5, atol=1e-5)
        if "rows" in expected:
            assert ranks[0][name]["rows"].equal(ranks[1][name]["rows"])
    assert one["running"]["log_z"].abs() > 0.1
