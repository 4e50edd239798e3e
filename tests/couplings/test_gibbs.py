"""Gibbs weights: moments, telemetry, classes and limits."""

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
from tests.couplings.kernels import (
    generated,
    moments,
    normals,
    quadrature,
    seeded,
    two_classes,
    weighted,
    weights,
)

INF = math.inf


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


def test_plain_weights_bias_the_samples_as_predicted():
    mean, std = generated(*weighted(Gibbs(4.0, "sqeuclidean"), 2, 0.5))
    assert mean == pytest.approx(1.49086, abs=1e-5)
    assert std == pytest.approx(0.57735, abs=1e-5)


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


def test_telemetry_of_partners_drawn_by_rows_is_that_of_the_softmax():
    """Its rows have the sum 1, so the tilt is that of the data alone."""
    x0, x1 = normals(12, 2)
    coupling = Gibbs(0.7, debias=RowSoftmax())
    plan = (-cost_matrix(x0, x1, "euclidean") / 0.7).softmax(1)
    tilt = 12 * plan.mean(0).mul(12).sub(1).square().sum() / 12 / 11
    rest = (12 * (plan - plan.mean(0))).square().sum() / 121
    expected = (tilt - rest / 12).clamp_min(0) / 2
    assert_close(coupling.telemetry(Pairs(x0, x1, None))["tilt"], expected)


@pytest.mark.parametrize("debias", [Division, Potentials])
def test_the_tilt_of_a_class_is_measured_with_the_factors_of_the_class(debias):
    x0, x1 = normals(96, 2)
    label = (torch.arange(96) >= 56).long()
    of_class = Gibbs(2.0, debias=debias(), normalize="class")
    alone = Gibbs(2.0, debias=debias())
    for seed in range(3):
        x0, x1 = normals(96, 2, seed=seed)
        pairs = of_class.pair(x0, x1 + 9 * label[:, None], label)
        only = alone.pair(x0[:56], x1[:56])
    assert_close(of_class.telemetry(pairs)["tilt"], alone.telemetry(only)["tilt"])


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
    pairs = Gibbs(INF).pair(*normals(5, 2), cond := torch.arange(5))
    assert pairs.cond is cond
    assert pairs.log_weight.exp().equal(torch.ones(5))


def test_a_conversion_keeps_the_digits_of_log_z():
    """Half precision would round it; a module on the meta device holds no number to keep."""
    coupling = Gibbs(1.0, normalize="running")
    coupling.pair(*normals(50, 2))
    before = coupling.log_z.clone()
    assert before != before.bfloat16()
    for converted in (coupling.bfloat16(), coupling.double(), coupling.cpu()):
        assert converted is coupling
        assert coupling.log_z.equal(before)
        assert dict(coupling.named_buffers())["log_z"] is coupling.log_z
    assert coupling.to("meta").log_z.is_meta
    empty = coupling.to_empty(device="cpu").log_z
    assert (empty.device.type, empty.dtype) == ("cpu", torch.float32)
    parent = torch.nn.Sequential(Gibbs(1.0, normalize="running")).half()
    assert parent[0].log_z.dtype == torch.float32


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
    for coupling in (Gibbs(1.0), Gibbs(1.0, debias=RowSoftmax())):
        with pytest.raises(ValueError, match=r"^x0 must be finite, got 16 NaN or infinite of 16"):
            coupling.pair(x0 * math.nan, x1)
        with pytest.raises(ValueError, match=r"^x1 must be finite, got 16 NaN or infinite of 16"):
            coupling.pair(x0, x1 * math.nan)
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
