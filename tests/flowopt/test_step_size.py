"""Measured bounds on the step size: eigenvalues, rotations, counts, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit.flowopt import FlowOpt, step_bound
from flowkit.flowopt.step_size import require_step
from flowkit.sampling import ODESampler
from tests.flowopt.fields import CENTERED, Counted, data, linear, rotation


def test_power_iteration_finds_what_random_pairs_miss():
    """64 dimensions, eigenvalues 1 and one of 10: the bound is 0.2."""
    values = torch.ones(64, dtype=torch.float64)
    values[17] = 10
    field, sampler = linear(torch.diag(values)), ODESampler(1)
    z = torch.randn(20, 64, dtype=torch.float64)
    one, four = (step_bound(field, sampler, z, rounds=r).bound for r in (1, 4))
    assert one.min() > 0.25
    assert one.max() > 0.6
    assert four.median().item() == pytest.approx(0.2, abs=5e-5)
    assert four.max().item() == pytest.approx(0.2, abs=0.01)
    random = torch.randn(2, 200, 64, dtype=torch.float64)
    df = random * values
    pairs = 2 * (random * df).sum(-1) / df.square().sum(-1)
    assert pairs.min() > 0.22


@pytest.mark.parametrize("degrees", [0, 30, 60, 89])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_and_cosine_of_a_rotation(degrees, dtype):
    field = linear(rotation(degrees))
    velocity = lambda x, t, cond=None: field(x.double(), t).to(x.dtype)  # noqa: E731
    found = step_bound(velocity, ODESampler(1), torch.randn(3, 2, dtype=dtype))
    expected = torch.full((3,), math.cos(math.radians(degrees)), dtype=dtype)
    tol = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(found.bound, expected, rtol=0, atol=tol)
    torch.testing.assert_close(found.cosine, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("degrees", [0, 30, 60])
@pytest.mark.parametrize("latents", [torch.float32, None])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 0.03), (torch.float16, 0.008)])
def test_the_bound_of_half_precision_results_is_that_of_exact_ones(degrees, latents, dtype, tol):
    """Differences that suit float32 would drown in the rounding of the results."""
    field = linear(rotation(degrees))
    velocity = lambda x, t, cond=None: field(x.double(), t).to(dtype)  # noqa: E731
    z = torch.randn(100, 2).to(latents or dtype)
    found = step_bound(velocity, ODESampler(1), z)
    expected = torch.full((100,), math.cos(math.radians(degrees)))
    torch.testing.assert_close(found.bound, expected, rtol=0, atol=tol)
    torch.testing.assert_close(found.cosine, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("degrees", [90, 120, 180])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rotation_from_a_right_angle_on_is_refused(degrees, dtype):
    field = linear(rotation(degrees).to(dtype))
    velocity = lambda x, t, cond=None: field(x.double(), t).to(dtype)  # noqa: E731
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match=r"cosine of Δz and Δf must be positive .* got \["):
            step_bound(velocity, ODESampler(1), torch.randn(3, 2, dtype=dtype))
        with pytest.raises(ValueError, match=r"cosine .* for samples \[0, 1, 2\]"):
            FlowOpt(ODESampler(1), num_iters=2)(velocity, torch.randn(3, 2, dtype=dtype))


def test_every_sample_of_a_right_angle_is_refused():
    field, z = linear(rotation(90)), torch.randn(200, 2)
    velocity = lambda x, t, cond=None: field(x.double(), t).float()  # noqa: E731
    for row in z[:, None]:
        with pytest.raises(ValueError, match="must be positive"):
            step_bound(velocity, ODESampler(1), row)


def test_the_bound_is_the_least_of_all_rounds():
    matrix = torch.tensor([[1.0, 1.6], [0.0, 1.0]]).double()
    z = torch.randn(100, 2, dtype=torch.float64)

    def found(rounds):
        generator = torch.Generator().manual_seed(0)
        return step_bound(linear(matrix), ODESampler(1), z, rounds=rounds, generator=generator)

    directions = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    bounds, cosines = [], []
    for _ in range(3):
        image = directions @ matrix.T
        product = (directions * image).sum(1)
        bounds.append(2 * product / image.square().sum(1) * 1.0)
        cosines.append(product / directions.norm(dim=1) / image.norm(dim=1))
        directions = image
    bounds, cosines = torch.stack(bounds), torch.stack(cosines)
    assert (bounds.argmin(0) < 2).any(), "the last is not always the least"
    torch.testing.assert_close(found(3).bound, bounds.amin(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(found(3).cosine, cosines.amin(0), rtol=1e-8, atol=1e-8)


def test_latents_of_zero_are_measured():
    found = step_bound(linear(4 * torch.eye(3)), ODESampler(1), torch.zeros(2, 3).double())
    torch.testing.assert_close(found.bound, torch.full((2,), 0.5).double())


def test_the_bound_is_that_under_the_condition():
    def stretched(x, t, cond):
        return (cond[:, None] - 1) * x

    cond = torch.tensor([2.0, 4.0, 0.5]).double()
    found = step_bound(stretched, ODESampler(1), data(3, 2), cond)
    torch.testing.assert_close(found.bound, 2 / cond)


@pytest.mark.parametrize(("eps", "size"), [(2**-8, 100), (2**-23, 3)])
def test_a_cosine_must_exceed_ten_roundings_of_its_difference(eps, size):
    """Rounding ``ε`` of a difference of size ``ε^⅓``, of which a direction takes ``1/√d``."""
    least = 10 * eps / eps ** (1 / 3) / size**0.5
    z = torch.zeros(2, size)
    require_step(torch.tensor([1.05 * least, 1.0]), z, eps)
    with pytest.raises(ValueError, match=r"for samples \[0\]"):
        require_step(torch.tensor([0.95 * least, 1.0]), z, eps)
    with pytest.raises(ValueError, match=r"got \[-0.125, -0.333333\] for samples \[0, 1\]"):
        require_step(torch.tensor([-0.125, -1 / 3]), z, eps)


def test_a_constant_flow_has_no_step():
    with pytest.raises(ValueError, match=r"cosine of Δz and Δf must be positive"):
        step_bound(lambda x, t, cond: -x, ODESampler(1), torch.randn(2, 3))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
def test_the_bound_of_a_symmetric_map_is_two_over_its_largest_eigenvalue(seed, n):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    field = linear(basis @ torch.diag(values) @ basis.T)
    z = torch.randn(2, n, generator=generator, dtype=torch.float64)
    found = step_bound(field, ODESampler(1), z, rounds=200, generator=generator)
    exact = 2 / values.max().item()  # neighboring eigenvalues are told apart slowly
    assert ((found.bound > (1 - 1e-6) * exact) & (found.bound < 1.02 * exact)).all()
    assert (found.cosine > 0).all()


def test_a_measurement_counts_its_solves():
    net = Counted()
    assert step_bound(net, ODESampler(5), data(), rounds=3).nfe == net.calls == 4 * 5


def test_arguments_of_a_measurement_that_do_not_fit():
    with pytest.raises(ValueError, match="z must be finite"):
        step_bound(CENTERED, ODESampler(2), torch.full((1, 2), torch.nan))
    for wrong, kind in ((torch.zeros(1, 2).long(), "torch.int64"), ([[0.0]], "list")):
        with pytest.raises(TypeError, match=f"z must be a floating-point tensor, got {kind}"):
            step_bound(CENTERED, ODESampler(2), wrong)
    with pytest.raises(ValueError, match=r"z must hold at least one .* got shape \(0, 2\)"):
        step_bound(CENTERED, ODESampler(2), torch.zeros(0, 2))
    with pytest.raises(TypeError, match=r"cond must be a tensor, .* got int"):
        step_bound(CENTERED, ODESampler(2), data(), 3)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        step_bound(CENTERED, ODESampler(2), data(), rounds=0)
