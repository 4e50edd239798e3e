"""FlowOpt: closed forms, counts, what backtracking promises, and refusals."""

import gc
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit import grids
from flowkit.flowopt import FlowOpt, step_bound
from flowkit.guidance import ClassifierFree
from flowkit.sampling import ODESampler
from tests.flowopt.fields import (
    CENTERED,
    LEFT,
    MODES,
    RIGHT,
    Counted,
    bimodal,
    data,
    linear,
    slope,
    steered,
)

SLOPES = {5: 0.3692307692, 10: 0.4307826049, 20: 0.4642475007}  # of Euler's map of N(0, .25)
PUBLISHED = {
    "FLUX.1-dev": (15, 13, 8, 131),
    "SD3": (15, 12, 8, 121),
    "inversion": (10, 10, 30, 321),
}


# --- the update ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SLOPES)
@pytest.mark.parametrize("backtrack", [True, False])
def test_one_exact_step_solves_a_gaussian(n, backtrack):
    assert slope(n) == pytest.approx(SLOPES[n], abs=1e-10)
    flowopt = FlowOpt(ODESampler(n), step_size=1 / slope(n), num_iters=1, backtrack=backtrack)
    edit = flowopt(CENTERED, data())
    assert (edit.residuals[0] > 1e-4).all()
    assert (edit.residuals[1] < 1e-12).all()


@pytest.mark.parametrize("n", SLOPES)
def test_twice_the_exact_step_keeps_the_norm_and_more_grows(n):
    kept = FlowOpt(ODESampler(n), 2 / slope(n), 5, backtrack=False)(CENTERED, data())
    torch.testing.assert_close(kept.residuals[1:], kept.residuals[:-1], rtol=1e-9, atol=0)
    with pytest.warns(UserWarning, match=r"step_size must lie below .*use backtrack=True"):
        grown = FlowOpt(ODESampler(n), 2.02 / slope(n), 5, backtrack=False)(CENTERED, data())
    torch.testing.assert_close(grown.residuals[1:], 1.02 * grown.residuals[:-1], rtol=1e-9, atol=0)


def test_step_sizes_about_the_bound_decay_and_grow():
    def field(x, t, cond=None):
        return x * torch.tensor([0.0, 1.0]).to(x)

    x1, sampler = data(4, 2), ODESampler(10)
    bound = step_bound(field, sampler, x1, rounds=20).bound
    torch.testing.assert_close(bound, torch.full_like(bound, 2 / 1.1**10))
    assert bound[0].item() == pytest.approx(0.771087, abs=1e-6)
    decays = FlowOpt(sampler, 0.77, 400, backtrack=False)(field, x1)
    assert (decays.residuals[-1] < 0.4 * decays.residuals[0]).all()
    with pytest.warns(UserWarning, match="step_size must lie below 0.77"):
        grows = FlowOpt(sampler, 0.78, 400, backtrack=False)(field, x1)
    assert set(grows.status) == {"diverged"}
    factors = grows.residuals[1:] / grows.residuals[:-1]
    assert factors[60:90].mean().item() == pytest.approx(0.78 * 1.1**10 - 1, rel=1e-3)


def test_the_iterates_are_those_of_the_formula():
    sampler, x1, eta = ODESampler(4), data(), 0.3
    edit = FlowOpt(sampler, eta, 3, backtrack=False)(steered, x1, source=RIGHT, target=LEFT)
    z = sampler.invert(steered, x1, RIGHT, correct=True).x
    for k in range(4):
        x = sampler(steered, z, LEFT)
        torch.testing.assert_close(edit.trace[k], x)
        torch.testing.assert_close(edit.residuals[k], (x - x1).square().mean(1).sqrt())
        if k < 3:
            z = z - eta * (x - x1)
    torch.testing.assert_close(edit.z, z)
    torch.testing.assert_close(edit.x, x)


def test_an_edit_comes_nearer_to_its_source_by_a_known_factor_and_ends_there():
    x1 = data(5, 2) * 0.5 + torch.tensor([2.0, 0.0]).double()
    sampler = ODESampler(10)
    edit = FlowOpt(sampler, 0.25, 30, backtrack=False)(steered, x1, RIGHT, LEFT)
    distance = (edit.trace - x1).norm(dim=-1)
    torch.testing.assert_close(distance[1:], distance[:-1] * (1 - 0.25 * slope(10)))
    assert 1 - 0.25 * slope(10) == pytest.approx(0.8923, abs=5e-5)
    assert (edit.trace[0][:, 0] < 0).all(), "the first iterate is of the target"
    limit = FlowOpt(sampler, "auto", 60)(steered, x1, RIGHT, LEFT)
    assert (limit.residuals[-1] < 1e-9).all()
    torch.testing.assert_close(limit.x, x1)


def test_an_edit_to_its_own_condition_is_the_inversion_bit_for_bit():
    x1 = data().float()
    cond = torch.full((6,), 2.0)
    for options in ({}, {"step_size": 0.3, "backtrack": False}, {"anderson": 2}):
        flowopt = FlowOpt(ODESampler(5), num_iters=4, **options)
        inversion, edit = flowopt(steered, x1, cond), flowopt(steered, x1, cond, cond)
        for a, b in zip(inversion[:5], edit[:5], strict=True):
            assert torch.equal(a, b)
        assert inversion[5:] == edit[5:]


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_without_iterations_it_inverts_and_regenerates(method):
    sampler, x1 = ODESampler(4, method), data()
    edit = FlowOpt(sampler, num_iters=0)(steered, x1, RIGHT, LEFT)
    z = sampler.invert(steered, x1, RIGHT, correct=method == "euler").x
    assert torch.equal(edit.z, z)
    assert torch.equal(edit.x, sampler(steered, z, LEFT))
    assert torch.equal(edit.trace[0], edit.x)


def test_a_network_without_derivatives():
    class Quantized:
        def __call__(self, x, t, cond=None):
            return torch.round(CENTERED(x.detach(), t) * 64) / 64

    edit = FlowOpt(ODESampler(10), num_iters=30)(Quantized(), data())
    assert not edit.x.requires_grad
    assert (edit.residuals[-1] < 0.02).all()
    assert (edit.residuals[-1] < edit.residuals[0]).all()


def test_gradients_are_neither_needed_nor_recorded():
    net = torch.nn.Linear(3, 3).double()
    seen = []

    def field(x, t, cond=None):
        seen.append(torch.is_grad_enabled())
        return net(x)

    assert not FlowOpt(ODESampler(2), 0.1, 2)(field, data()).x.requires_grad
    assert not any(seen)


@pytest.mark.parametrize("backtrack", [True, False])
def test_an_automatic_step_is_half_of_the_bound(backtrack):
    """Of f(z) = 4 z: the bound is 1/2, with which nothing moves; half of it solves at once."""
    field, sampler = linear(4 * torch.eye(3)), ODESampler(1)
    edit = FlowOpt(sampler, num_iters=1, backtrack=backtrack)(field, data())
    bound = step_bound(field, sampler, data()).bound
    torch.testing.assert_close(bound, torch.full_like(bound, 0.5), rtol=1e-9, atol=0)
    step = torch.full_like(bound, 0.25 * (1.2 if backtrack else 1))
    torch.testing.assert_close(edit.step_size, step, rtol=1e-9, atol=0)
    assert (edit.residuals[1] < 1e-8 * edit.residuals[0]).all()


def test_the_measured_direction_has_a_part_of_every_feature():
    """Slope 1 along (1, 1) and 4 along (1, −1), which equal numbers would not see."""
    field = linear([[2.5, -1.5], [-1.5, 2.5]])
    edit = FlowOpt(ODESampler(1), num_iters=1)(field, data(4, 2))
    step = torch.full((4,), 1.2 * 0.25).double()  # accepted, and raised
    torch.testing.assert_close(edit.step_size, step, rtol=0.02, atol=0)


def test_automatic_steps_converge_at_any_scale():
    for scale in (0.05, 1.0, 30.0):
        matrix = scale * torch.diag(torch.tensor([1.0, 0.5, 0.3]))
        for options in ({}, {"backtrack": False}, {"anderson": 3}):
            edit = FlowOpt(ODESampler(1), num_iters=60, **options)(linear(matrix), data())
            assert (edit.residuals[-1] < 1e-5 * scale).all()
            torch.testing.assert_close(
                linear(matrix)(edit.z, None) + edit.z, edit.x, rtol=1e-9, atol=1e-9
            )


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("backtrack", [True, False])
@pytest.mark.parametrize("anderson", [0, 3])
def test_published_counts_at_the_network(name, backtrack, anderson):
    total, n, num_iters, nfe = PUBLISHED[name]
    sampler = ODESampler(grids.shifted(total, 3.0)[total - n :])
    net = Counted()
    edit = FlowOpt(sampler, 0.01, num_iters, backtrack, anderson=anderson)(net, data())
    assert edit.nfe == net.calls == nfe == (n + 1) + (num_iters + 1) * n


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), num_iters=st.integers(0, 5), eta=st.floats(0.01, 20.0))
def test_counts_for_every_setting_rejected_trials_included(n, num_iters, eta):
    net = Counted()
    edit = FlowOpt(ODESampler(n), eta, num_iters)(net, data())
    assert edit.nfe == net.calls == (n + 1) + (num_iters + 1) * n
    assert edit.residuals.shape == (num_iters + 1, 6)


def test_measuring_the_step_costs_four_solves():
    net = Counted()
    edit = FlowOpt(ODESampler(5), num_iters=2)(net, data())
    assert edit.nfe == net.calls == 6 + 3 * 5 + 4 * 5


def test_skipping_the_noisiest_steps_starts_at_their_end():
    grid, times = grids.shifted(8, 3.0)[3:], []

    def field(x, t, cond=None):
        times.append(t[0].item())
        return CENTERED(x, t)

    FlowOpt(ODESampler(grid), 0.5, 2)(field, data())
    assert min(times) == grid[0].item() > 0


# --- backtracking -------------------------------------------------------------------------------


def test_backtracking_where_a_fixed_step_oscillates():
    x1, sampler = bimodal(), ODESampler(10)
    with pytest.warns(UserWarning, match="step_size must lie below"):
        fixed = FlowOpt(sampler, 0.2, 60, backtrack=False)(MODES, x1)
    oscillating = fixed.residuals[-1] > 1e-2
    assert 0 < oscillating.sum() < 40
    edit = FlowOpt(sampler, 0.2, 60)(MODES, x1)
    assert (edit.residuals[1:] <= edit.residuals[:-1]).all()
    assert edit.residuals[-1].square().mean().sqrt() <= 1e-3


def test_a_rejected_trial_repeats_the_iterate_and_halves_the_step():
    field = linear(2 * torch.eye(2))
    edit = FlowOpt(ODESampler(1), 3.0, 3)(field, data(3, 2))  # factors |1 − 2η|: 5, 2, 0.5
    assert torch.equal(edit.trace[0], edit.trace[1])
    assert torch.equal(edit.trace[0], edit.trace[2])
    torch.testing.assert_close(edit.residuals[3], 0.5 * edit.residuals[0])
    torch.testing.assert_close(edit.step_size, torch.full((3,), 3 / 4 * 1.2).double())


@settings(max_examples=30, deadline=None)
@given(eta=st.floats(1e-3, 1e4), anderson=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_backtracking_never_goes_back_and_returns_its_best(eta, anderson, seed):
    x1 = MODES.sample(8, torch.Generator().manual_seed(seed)).double()
    edit = FlowOpt(ODESampler(5), eta, 12, anderson=anderson)(MODES, x1)
    assert (edit.residuals[1:] <= edit.residuals[:-1]).all()
    torch.testing.assert_close((edit.x - x1).square().mean(1).sqrt(), edit.residuals.amin(0))
    torch.testing.assert_close(ODESampler(5)(MODES, edit.z), edit.x)


@pytest.mark.parametrize("backtrack", [True, False])
@pytest.mark.parametrize("options", [{}, {"anderson": 2}, {"patience": 2, "tolerance": 1e-3}])
def test_a_sample_does_not_depend_on_its_batch(backtrack, options):
    x1 = bimodal()[:7].double()
    flowopt = FlowOpt(ODESampler(6), num_iters=9, backtrack=backtrack, **options)
    together = flowopt(MODES, x1)
    for k in range(7):
        alone = flowopt(MODES, x1[k : k + 1])
        assert alone.status[0] == together.status[k]
        for name in ("x", "z", "step_size"):
            a, b = getattr(alone, name)[0], getattr(together, name)[k]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for name in ("trace", "residuals"):
            a, b = getattr(alone, name)[:, 0], getattr(together, name)[:, k]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- stopping and divergence --------------------------------------------------------------------


def test_tolerance_ends_each_sample_at_its_own_iteration():
    x1 = data() * torch.logspace(0, -3, 6).double()[:, None]
    eta, n = 1.0, 10
    net = Counted()
    edit = FlowOpt(ODESampler(n), eta, 80, backtrack=False, tolerance=1e-5)(net, x1)
    assert set(edit.status) == {"converged"}
    assert (edit.residuals[-1] <= 1e-5).all()
    ended = (edit.residuals <= 1e-5).long().argmax(0)
    assert ended[0] > ended[-1]
    expected = torch.log(1e-5 / edit.residuals[0]) / math.log(1 - slope(n))
    assert (ended - expected.clamp_min(0).ceil()).abs().max() <= 1
    assert net.calls == edit.nfe == 11 + 10 * (1 + ended.max().item()), "no solve after the last"
    for k, end in enumerate(ended.tolist()):
        assert (edit.residuals[end:, k] == edit.residuals[end, k]).all()


def test_distance_ends_an_edit_on_its_way_back():
    x1 = data(5, 2) * 0.5 + torch.tensor([2.0, 0.0]).double()
    edit = FlowOpt(ODESampler(10), 0.25, 60, backtrack=False, distance=1.0)(
        steered, x1, RIGHT, LEFT
    )
    rmse = (edit.x - x1).square().mean(1).sqrt()
    assert set(edit.status) == {"stopped"}
    assert ((rmse <= 1.0) & (rmse > 0.89)).all()


def test_patience_ends_a_plateau():
    def field(x, t, cond=None):  # the second coordinate cannot be reached
        return x * torch.tensor([0.0, -1.0]).to(x)

    edit = FlowOpt(ODESampler(1), 1.0, 50, patience=3)(field, data(4, 2))
    assert set(edit.status) == {"stopped"}
    assert edit.nfe == 2 + 1 + 3
    assert FlowOpt(ODESampler(1), 1.0, 5)(field, data(4, 2)).status == ("iterations",) * 4


def test_callback_sees_every_iterate_and_ends_all_or_some():
    x1, seen = data(), []
    flowopt = FlowOpt(ODESampler(5), 0.5, 6)
    edit = flowopt(CENTERED, x1, callback=lambda k, x, z: seen.append((k, x.clone(), z.clone())))
    assert [k for k, *_ in seen] == list(range(7))
    assert torch.equal(torch.stack([x for _, x, _ in seen]), edit.trace)
    assert torch.equal(seen[-1][2], edit.z)
    for _, x, z in seen:
        torch.testing.assert_close(ODESampler(5)(CENTERED, z), x)
    stopped = flowopt(CENTERED, x1, callback=lambda k, x, z: k == 2)
    assert set(stopped.status) == {"stopped"}
    assert stopped.nfe == 6 + 3 * 5
    assert torch.equal(stopped.x, edit.trace[2])
    assert (stopped.trace[2:] == edit.trace[2]).all()
    some = flowopt(CENTERED, x1, callback=lambda k, x, z: torch.arange(6) < 3)
    assert some.status == ("stopped",) * 3 + ("iterations",) * 3
    assert torch.equal(some.x[:3], edit.trace[0, :3])
    assert torch.equal(some.x[3:], edit.x[3:])


def test_divergence_is_noticed_warned_of_once_and_the_best_iterate_kept():
    x1 = data()
    with pytest.warns(UserWarning, match="step_size must lie below") as caught:
        edit = FlowOpt(ODESampler(10), 9.0, 50, backtrack=False)(CENTERED, x1)
    assert len(caught) == 1
    assert set(edit.status) == {"diverged"}
    assert torch.equal(edit.x, edit.trace[0])
    torch.testing.assert_close(ODESampler(10)(CENTERED, edit.z), edit.x)
    assert edit.nfe < 11 + 51 * 10
    assert (edit.residuals.amax(0) > 10 * edit.residuals[0]).all()
    last = edit.residuals[-1]
    assert ((last > 10 * edit.residuals[0]) & (last < 100 * edit.residuals[0])).all()


@pytest.mark.parametrize("backtrack", [True, False])
def test_nan_from_the_network_ends_its_own_sample_alone(backtrack):
    class Breaks(Counted):
        def __call__(self, x, t, cond=None):
            v = super().__call__(x, t, cond)
            if self.calls > 6 + 2 * 5:
                v[1] = torch.nan
            return v

    x1 = data()
    flowopt = FlowOpt(ODESampler(5), 0.5, 5, backtrack)
    message = r"velocity must be finite, got NaN or infinite results for samples \[1\]; the best"
    with pytest.warns(UserWarning, match=message) as caught:
        edit = flowopt(Breaks(), x1)
    assert [w.filename for w in caught] == [__file__]
    sound = flowopt(CENTERED, x1)
    assert edit.status == tuple("diverged" if k == 1 else "iterations" for k in range(6))
    assert torch.equal(edit.x[1], sound.trace[1, 1]), "its best iterate"
    others = [0, 2, 3, 4, 5]
    assert torch.equal(edit.x[others], sound.x[others])
    assert edit.z.isfinite().all()


def test_nan_from_the_start_is_divergence():
    net = Counted(lambda x, t, cond: x * torch.nan)
    with pytest.warns(UserWarning, match=r"velocity must be finite, got .* \[0, 1, 2, 3, 4, 5\]"):
        edit = FlowOpt(ODESampler(5), num_iters=5)(net, data())
    assert set(edit.status) == {"diverged"}
    assert net.calls == edit.nfe == 6 + 5


def test_an_exact_start_is_no_divergence():
    """Where inverting is exact, residuals are rounding, which may grow tenfold."""
    edit = FlowOpt(ODESampler(3), 0.5, 20, backtrack=False)(lambda x, t, c: 0 * x + 1, data())
    assert set(edit.status) <= {"iterations", "converged"}
    assert (edit.residuals < 1e-14).all()
    rounding = torch.randn(2000, 1)
    edit = FlowOpt(ODESampler(3), 1.9, 20, backtrack=False)(lambda x, t, c: 0 * x + 1, rounding)
    first = edit.residuals[0]
    assert ((edit.residuals.amax(0) > 10 * first) & (first > 0)).any()
    assert set(edit.status) <= {"iterations", "converged"}


@pytest.mark.parametrize("first", [1e-10, 1e-7])
def test_divergence_begins_above_the_rounding_of_results(first):
    """Residuals grow by 1.5, from below the root of the rounding and from above."""
    moved = torch.tensor(first).double()
    flowopt = FlowOpt(ODESampler(1), 2.5, 60, backtrack=False)
    with pytest.warns(UserWarning, match="step_size must lie below"):
        edit = flowopt(lambda x, t, cond: cond.expand_as(x), data(1), 0 * moved, moved)
    limit = 10 * max(first, 2.0**-26)
    assert edit.status == ("diverged",)
    assert limit < edit.residuals[-1].item() < 1.6 * limit


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_a_step_is_judged_where_differences_exceed_their_rounding(scale):
    """By 4000 roundings of the results: 40 000 roundings tell a step above the bound, 400 do not.

    f(z) = z + c, and the residual grows by a quarter an iteration.
    """
    x1 = scale * torch.tensor([[1.0, -1.0]]).double()
    for roundings in (400, 40_000):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            flowopt = FlowOpt(ODESampler(1), 2.25, 3, backtrack=False)
            flowopt(
                lambda x, t, cond: cond.expand_as(x),
                x1,
                0 * x1,
                scale * roundings * 2.0**-52 + 0 * x1,
            )
        assert len(caught) == (roundings > 4000)


def test_divergence_begins_at_ten_times_the_first_residual():
    """Residuals grow by 1.5: the sixth is the first above ten."""
    with pytest.warns(UserWarning, match="step_size must lie below"):
        edit = FlowOpt(ODESampler(1), 1.25, 12, backtrack=False)(linear(2 * torch.eye(3)), data())
    assert set(edit.status) == {"diverged"}
    torch.testing.assert_close(edit.residuals[-1], 1.5**6 * edit.residuals[0])


@pytest.mark.parametrize(("eta", "status"), [(0.005, "iterations"), (0.0002, "stopped")])
def test_an_improvement_is_one_of_a_thousandth(eta, status):
    """Residuals fall by 1 % and by 0.04 % an iteration."""
    edit = FlowOpt(ODESampler(1), eta, 9, False, patience=1)(linear(2 * torch.eye(3)), data())
    assert set(edit.status) == {status}


def test_a_residual_that_stays_equal_is_accepted():
    x1 = torch.tensor([[1.0, -2.0], [4.0, 3.0]]).double()
    edit = FlowOpt(ODESampler(1), 1.0, 1)(linear(2 * torch.eye(2)), x1)
    assert torch.equal(edit.residuals[0], edit.residuals[1])
    assert (edit.step_size == 1.2).all()


def test_an_exact_start_has_converged():
    edit = FlowOpt(ODESampler(3), 0.5, 5)(lambda x, t, cond: 0 * x, data())
    assert (set(edit.status), edit.nfe) == ({"converged"}, 4 + 3)


def test_an_automatic_step_above_half_of_the_next_bound_is_lowered():
    """f(z) = z + c for z > 0, and (1 + bend) z + c below; the second iterate lies below."""

    def field(x, t, cond):
        return bend * x.clamp(max=0) + cond

    x1, zero = torch.full((1, 1), 0.5).double(), torch.zeros(()).double()
    for bend in (0.6, 3.0):
        edit = FlowOpt(ODESampler(1), num_iters=1, backtrack=False)(field, x1, zero, zero + 1)
        mean = 1 + bend / 2  # from 0.5 to -0.5
        torch.testing.assert_close(edit.step_size, torch.tensor([1 / mean]).double())


def test_a_sample_that_has_ended_needs_no_step():
    def field(x, t, cond):
        return (cond[:, None] - 1) * x  # f(z) = cond z, without a step for cond = -1

    x1 = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).double()
    edit = FlowOpt(ODESampler(1), num_iters=3)(field, x1, torch.tensor([-1.0, 2.0]).double())
    assert edit.status[0] == "converged"
    assert edit.residuals[-1, 1] < 1e-8


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_float32_beside_a_half_precision_network(dtype):
    seen, x_seen, z_seen = set(), [], []

    def field(x, t, cond=None):
        seen.add((x.dtype, t.dtype))
        return CENTERED(x.float(), t).to(dtype)

    x1 = data(64).to(dtype)
    flowopt = FlowOpt(ODESampler(10), 0.01, 60, backtrack=False)
    edit = flowopt(field, x1, callback=lambda k, x, z: x_seen.append(x) or z_seen.append(z.clone()))
    assert torch.equal(torch.stack(x_seen), edit.trace)
    assert x_seen[0].dtype == dtype
    assert seen == {(dtype, torch.float32)}
    assert (edit.z.dtype, edit.x.dtype, edit.trace.dtype) == (torch.float32, dtype, dtype)
    exact = flowopt(CENTERED, x1.float())
    assert (edit.z - exact.z).square().mean().sqrt() < 0.02
    moved, wanted = (e[-1] - e[0] for e in (torch.stack(z_seen), torch.stack([exact.z] * 2)))
    assert moved.abs().max() > 0
    assert wanted.abs().max() == 0


def test_small_steps_do_not_stall():
    """The same updates in half precision vanish below half a unit in the last place."""
    x1 = torch.randn(400, 1).to(torch.bfloat16)

    shift = torch.tensor(1.0)

    def conditional(x, t, cond):
        return cond.to(x).expand_as(x)

    edit = FlowOpt(ODESampler(1), 0.0025, 2000, backtrack=False, keep=())(
        conditional, x1, torch.tensor(0.0), shift
    )
    assert edit.residuals[-1].square().mean().sqrt() < 0.01
    z = x1.clone()
    for _ in range(2000):
        z = z - 0.0025 * (z + shift - x1)
    assert (z + shift - x1).float().square().mean().sqrt() > 0.1


# --- guidance and velocities that are bound -----------------------------------------------------


def test_a_guided_field_is_just_another_field():
    x1 = data(4, 2)
    guided = ClassifierFree(steered, 1.7, null=0.0)
    source, target = torch.full((4,), 2.0).double(), torch.full((4,), -2.0).double()
    edit = FlowOpt(ODESampler(5), 0.5, 3, backtrack=False)(guided, x1, source, target)
    z = ODESampler(5).invert(guided, x1, source, correct=True).x
    torch.testing.assert_close(edit.trace[0], ODESampler(5)(guided, z, target))
    assert edit.nfe == 6 + 4 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_velocity_is_bound_for_every_solve(dtype):
    bound = []

    class Caching:
        def __call__(self, x, t, cond=None):
            raise AssertionError("the bound velocity is to be used")

        def bind(self, cond, grid):
            bound.append(cond)
            assert grid.sort().values.tolist() == ODESampler(3).times.tolist()
            return _Bound()

    class _Bound:
        def __init__(self):
            self.steps = []

        def __call__(self, x, t, cond=None):
            assert len(self.steps) >= 1
            return CENTERED(x, t)

        def begin_step(self, left, right):
            self.steps.append((left, right))

    FlowOpt(ODESampler(3), 0.5, 2)(Caching(), data().to(dtype), RIGHT, LEFT)
    assert [cond.item() for cond in bound] == [2, -2, -2, -2]


# --- what is kept -------------------------------------------------------------------------------


def test_only_the_iterates_asked_for_are_kept():
    x1 = data()
    flowopt = FlowOpt(ODESampler(5), 0.5, 6)
    full = flowopt(CENTERED, x1)
    part = replace(flowopt, keep=(0, 4))(CENTERED, x1)
    assert torch.equal(part.trace, full.trace[[0, 4]])
    assert replace(flowopt, keep=())(CENTERED, x1).trace.shape == (0, 6, 3)
    assert torch.equal(part.x, full.x)
    assert torch.equal(part.residuals, full.residuals)


@pytest.mark.parametrize("backtrack", [True, False])
def test_memory_does_not_grow_with_the_iterations(backtrack):
    gc.collect()
    gc.freeze()
    most, x1 = [], torch.randn(1009, 13)

    def census(x, t, cond=None):
        v = CENTERED(x, t)
        alive = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        most[-1] = max(
            most[-1],
            len({o.untyped_storage().data_ptr() for o in alive if o.numel() == x1.numel()}),
        )
        return v

    for num_iters in (2, 11):
        most.append(0)
        FlowOpt(ODESampler(2), 0.5, num_iters, backtrack, keep=())(census, x1)
    gc.unfreeze()
    assert most[0] == most[1]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"step_size": -1.0}, "step_size must be positive and finite, got -1.0"),
        ({"step_size": "big"}, "step_size must be a number or 'auto', got 'big'"),
        ({"num_iters": -1}, "num_iters must be at least 0, got -1"),
        ({"anderson": -1}, "anderson must be at least 0"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
        ({"distance": -0.1}, "distance must be at least 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"keep": [9]}, r"keep must lie in \[0, 8\], got 9"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FlowOpt(ODESampler(2), **options)


def test_inputs_that_do_not_fit():
    flowopt, x1 = FlowOpt(ODESampler(2), 0.5, 1), data()
    with pytest.raises(TypeError, match=r"x1 must be a floating-point tensor, got torch\.int64"):
        flowopt(CENTERED, torch.zeros(2, 2).long())
    with pytest.raises(TypeError, match=r"x1 must be a floating-point tensor, got torch\.uint8"):
        flowopt(CENTERED, torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="x1 must be a floating-point tensor, got list"):
        flowopt(CENTERED, [[0.0]])
    with pytest.raises(ValueError, match=r"x1 must hold at least one .* got shape \(0, 3\)"):
        flowopt(CENTERED, x1[:0])
    with pytest.raises(TypeError, match=r"source must be a tensor, .* got int"):
        flowopt(steered, x1, 3)
    with pytest.raises(TypeError, match=r"target must be a tensor, .* got a mapping of int"):
        flowopt(steered, x1, RIGHT, {"label": 3})
    with pytest.raises(ValueError, match="x1 must be finite, got 1 NaN"):
        flowopt(CENTERED, x1.where(x1 < x1.max(), torch.nan))


def test_an_admissible_step_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for eta in (0.5, 2.0, 4.0):
            edit = FlowOpt(ODESampler(10), eta, 40, backtrack=False)(CENTERED, data().float())
            assert (edit.residuals[-1] < 1e-3).all()  # it is admissible
