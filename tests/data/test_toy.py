import math

import pytest
import torch

from flowkit.data import Toy, sample_toy

N = 100_000
RING = 12.5 + math.sqrt(0.1)
HEIGHT = 2 / math.pi  # mean of the sine over half a turn
SHIFT = 0.2**2 / 12
STEP = 0.5 - 2 * HEIGHT  # from the upper moon's mean height to the lower one's
MOMENTS = {  # mean, then variances and covariance
    "gaussian": ((0, 0), (1, 1, 0)),
    "mixture": ((0, 0), (4.25, 0.25, 0)),
    "5gaussians": ((0, 0), (RING, RING, 0)),
    "8gaussians": ((0, 0), (RING, RING, 0)),
    "moons": (
        (0.8, 0.05),
        (
            9 * (0.5 + 0.25 + SHIFT),
            9 * (0.5 - HEIGHT**2 + STEP**2 / 4 + SHIFT),
            9 * (STEP / 4 + SHIFT),
        ),
    ),
    "checkerboard": ((0, 0), (64 / 12, 64 / 12, 1)),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_of_the_closed_form(name):
    points, _ = sample_toy(name, N, torch.Generator().manual_seed(0))
    mean, second = MOMENTS[name]
    centered = points.double() - torch.tensor(mean)
    products = torch.stack(
        [*centered.T, centered[:, 0] ** 2, centered[:, 1] ** 2, centered.prod(1)], dim=1
    )
    error = products.mean(0) - torch.tensor([0, 0, *second], dtype=torch.float64)
    assert (error.abs() < 5 * products.std(0) / math.sqrt(N)).all()


@pytest.mark.parametrize(
    ("name", "parts"),
    [("mixture", 2), ("5gaussians", 5), ("8gaussians", 8), ("moons", 2), ("checkerboard", 8)],
)
def test_parts_are_equally_likely(name, parts):
    labels = sample_toy(name, N, torch.Generator().manual_seed(1))[1]
    spread = math.sqrt(N * (1 / parts) * (1 - 1 / parts))
    assert ((labels.bincount(minlength=parts) - N / parts).abs() < 5 * spread).all()


def test_gaussians_of_a_ring_sit_where_their_labels_say():
    points, labels = sample_toy("8gaussians", N, torch.Generator().manual_seed(2))
    for k in range(8):
        part = points[labels == k].double()
        center = torch.tensor([5 * math.cos(k * math.pi / 4), 5 * math.sin(k * math.pi / 4)])
        error = 5 * (0.1**0.25) / math.sqrt(len(part))
        torch.testing.assert_close(part.mean(0), center.double(), rtol=0, atol=error)
        assert part.var(0).tolist() == pytest.approx([math.sqrt(0.1)] * 2, rel=0.07)


def test_moons_lie_on_their_arcs():
    points, labels = sample_toy("moons", 10_000, torch.Generator().manual_seed(3))
    arcs = (points + 1) / 3
    arcs = torch.where(labels[:, None] == 0, arcs, torch.tensor([1.0, 0.5]) - arcs)
    # The shift s moves a point along (1, 1), on the lower moon against it: |p ∓ s(1, 1)| = 1
    # has the root s = ±(m - √(m² - (|p|² - 1)/2)), m the mean coordinate.
    m, sign = arcs.mean(1), 1 - 2 * labels
    discriminant = m.square() - (arcs.square().sum(1) - 1) / 2
    assert (discriminant > -1e-5).all()
    root = discriminant.clamp(min=0).sqrt()
    shifts = torch.stack([sign * (m - root), sign * (m + root)])
    assert ((shifts > -1e-3) & (shifts < 0.201)).any(0).all()
    assert (arcs[:, 1] > -0.201).all()


def test_checkerboard_fills_its_eight_cells():
    points, labels = sample_toy("checkerboard", N, torch.Generator().manual_seed(4))
    cells = ((points + 4) / 2).floor()
    assert (cells.sum(1) % 2 == 0).all()
    assert cells.min() == 0
    assert cells.max() == 3
    for k in range(8):
        assert len(cells[labels == k].unique(dim=0)) == 1
    within = (points + 4) / 2 - cells
    assert within.var(0).tolist() == pytest.approx([1 / 12] * 2, rel=0.02)


def test_samples_come_from_the_generator_alone():
    for name in MOMENTS:
        torch.manual_seed(0)
        first = sample_toy(name, 5, torch.Generator().manual_seed(7))[0]
        torch.manual_seed(1)
        assert torch.equal(first, sample_toy(name, 5, torch.Generator().manual_seed(7))[0])


def test_ranks_together_see_the_points_of_one_process():
    settings = {"source": "8gaussians", "target": "moons", "cond": "binary"}
    alone, half = Toy(batch_size=6, **settings), Toy(batch_size=3, **settings)
    alone.setup()
    half.setup()
    whole = alone.stream()[5]
    ranks = [half.stream(rank, 2)[5] for rank in range(2)]
    for key in ("x0", "x1", "cond"):
        assert torch.equal(whole[key], torch.stack([r[key] for r in ranks], 1).flatten(0, 1))


def test_points_are_fresh_and_splits_fixed():
    data = Toy(target="checkerboard", cond="label", size=50, batch_size=20, seed=1)
    other = Toy(target="checkerboard", cond="label", size=50, batch_size=20, seed=2)
    data.setup()
    other.setup()
    points = torch.cat([data.stream()[k]["x1"] for k in range(20)])
    assert len(points.unique(dim=0)) == 400
    assert not torch.equal(data.stream()[0]["x1"], other.stream()[0]["x1"])
    assert data.fingerprint("val") == other.fingerprint("val")
    assert data.fingerprint("val") != data.fingerprint("test")
    assert (data.shape, data.num_classes) == ((2,), 8)
    assert "x0" not in data.val[:]


def test_conditions_belong_to_their_target():
    generator = torch.Generator()
    for cond in ("binary", "continuous"):
        data = Toy("8gaussians", "moons", cond=cond, size=2000, batch_size=2000)
        data.setup()
        for batch in (data.val[:], data.stream()[3]):
            # A point of the lower moon is above none of the upper one at the same place.
            if cond == "continuous":
                assert data.num_classes is None
                assert torch.equal(batch["cond"], batch["x1"][:, :1])
            else:
                assert data.num_classes == 2
                lower = batch["x1"][batch["cond"] == 1]
                assert lower[:, 0].mean() - batch["x1"][:, 0].mean() == pytest.approx(1.5, abs=0.2)
            radius = batch["x0"].norm(dim=1)
            assert radius.mean().item() == pytest.approx(5, abs=0.1)
            assert abs(torch.corrcoef(torch.stack([radius, batch["x1"][:, 0]]))[0, 1]) < 0.12
    assert sample_toy("gaussian", 3, generator)[1] is None


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "no classes"),
        ({"cond": "binary"}, "2 classes"),
        ({"cond": "continuous"}, "no classes but other conditions"),
        ({"source": "8gaussians"}, "no classes, source samples"),
    ],
)
def test_summary_says_what_a_batch_will_hold(settings, found):
    data = Toy(size=1500, **settings)
    data.setup()
    counts = "1,500 train, 1,500 val, 1,500 test samples"
    assert data.summary() == f"Toy: {counts} of shape (2,), {found}"


def test_source_samples_are_paired_in_the_stream():
    class Reverse:
        def pair(self, x0, x1, cond=None, generator=None):
            from types import SimpleNamespace

            return SimpleNamespace(x0=x0.flip(0), x1=x1, cond=cond, log_weight=None)

    plain = Toy("8gaussians", "moons", cond="binary", batch_size=5)
    paired = Toy("8gaussians", "moons", cond="binary", batch_size=5, coupling=Reverse())
    plain.setup()
    paired.setup()
    before, after = plain.stream()[2], paired.stream()[2]
    assert torch.equal(after["x0"], before["x0"].flip(0))
    assert torch.equal(after["x1"], before["x1"])
    assert torch.equal(after["cond"], before["cond"])


def test_unknown_names_list_the_choices():
    choices = "5gaussians, 8gaussians, checkerboard, gaussian, mixture, moons, got 'moon'"
    with pytest.raises(ValueError, match=f"name of a toy set must be one of {choices}"):
        sample_toy("moon", 3)
    with pytest.raises(ValueError, match=f"target must be one of {choices}"):
        Toy(target="moon")
    with pytest.raises(ValueError, match=f"source must be one of {choices}"):
        Toy(source="moon")
    with pytest.raises(ValueError, match="cond must be one of binary, continuous, label, got 'x'"):
        Toy(cond="x")


def test_conditions_must_fit_the_target():
    with pytest.raises(ValueError, match="cond must fit the target, got 'label' for gaussian with"):
        Toy(target="gaussian", cond="label")
    with pytest.raises(ValueError, match="got 'binary' for 8gaussians with 8 labels"):
        Toy(target="8gaussians", cond="binary")
