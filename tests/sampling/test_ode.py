"""The sampler: observed orders, published numbers, counts, memory, gradients and refusals."""

import gc
import math
from functools import partial

import pytest
import torch
from scipy import stats

from flowkit import grids
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.likelihood import log_likelihood
from flowkit.sampling import ADAPTIVE, FIXED, ODESampler, seeded_noise

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "rk4": 4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "rk4": 4}  # a step
FLOW = GaussianFlow(2.0, 0.5)
RING = MixtureFlow(
    torch.ones(3).double(),
    torch.tensor([[2.0, 0], [-1, 1], [0, -2]]).double(),
    torch.full((3,), 0.8),
)


def noise(batch=4, dim=2):
    return torch.randn(batch, dim, dtype=torch.float64)


class Recorder:
    """A velocity that remembers its calls."""

    def __init__(self, velocity=FLOW):
        self.velocity, self.times = velocity, []
        self.x, self.conds, self.seen_rows = [], [], 0

    def __call__(self, x, t, cond=None):
        assert t.shape == (len(x),)
        assert (t == t[0]).all()
        self.times.append(t[0].clone())
        self.x.append(x.clone())
        self.conds.append(cond)
        self.seen_rows += len(x)
        return self.velocity(x, t, cond)

    @property
    def floats(self):
        return [t.item() for t in self.times]


class Caching:
    """A velocity that wants to know its solve and its steps."""

    def __init__(self, velocity=FLOW):
        self.velocity, self.bound = velocity, []

    def __call__(self, x, t, cond=None):
        raise AssertionError("the bound velocity is to be used")

    def bind(self, cond, grid):
        self.bound.append(_Bound(self.velocity, cond, grid))
        return self.bound[-1]


class _Bound(Recorder):
    def __init__(self, velocity, cond, grid):
        super().__init__(velocity)
        self.cond, self.grid, self.steps = cond, grid, []

    def begin_step(self, t_left, t_right):
        self.steps.append((t_left, t_right))


# --- accuracy -------------------------------------------------------------------------------------


def smooth_grid(n, kind):
    """Grids that refine regularly, so that an order can be observed."""
    if kind == "uniform":
        return grids.uniform(n)
    t = grids.uniform(n)
    return t + 0.12 * torch.sin(2 * math.pi * t)


@pytest.mark.parametrize("direction", ["solve", "invert"])
@pytest.mark.parametrize("kind", ["uniform", "uneven"])
@pytest.mark.parametrize("method", FIXED)
def test_observed_order(method, kind, direction):
    x = RING.means + 0.3 if direction == "invert" else noise(3)
    exact = getattr(ODESampler(1, "dopri8", rtol=1e-12, atol=1e-12), direction)(RING, x).x
    coarse = 40 if method == "rk4" else 80
    errors = [
        (getattr(ODESampler(smooth_grid(n, kind), method), direction)(RING, x).x - exact)
        .abs()
        .max()
        .item()
        for n in (coarse, 2 * coarse)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[method], abs=0.1)


@pytest.mark.parametrize("kind", ["random", "alternating"])
def test_ab2_is_second_order_on_irregular_grids(kind):
    """The weights know the last step; those of equal steps would be of order one here."""

    def grid(n):
        steps = torch.tensor([1.0, 3.0]).double().repeat(n // 2)
        if kind == "random":
            steps = torch.rand(40, generator=torch.Generator().manual_seed(1)).double() + 0.2
            steps = steps.repeat_interleave(n // 40)
        ends = torch.cat([torch.zeros(1).double(), steps.cumsum(0)])
        return ends / ends[-1]

    x = noise(3)
    exact = FLOW.solution(x)
    errors = [(ODESampler(grid(n), "ab2")(FLOW, x) - exact).abs().max() for n in (160, 320)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_reach_their_tolerance(method):
    x = noise(8)
    for tol in (1e-4, 1e-6):
        sampler = ODESampler(1, method, rtol=tol, atol=tol)
        assert (sampler(FLOW, x) - FLOW.solution(x)).abs().max() < 30 * tol
        back = sampler.invert(FLOW, FLOW.solution(x)).x
        assert (back - x).abs().max() < 100 * tol


@pytest.mark.parametrize(("n", "std"), [(1, 0), (2, 0.2), (4, 0.3405), (8, 0.4148)])
def test_published_stds_of_few_euler_steps(n, std):
    start = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    low, high = ODESampler(n)(FLOW, start)[:, 0]
    assert (high - low).item() == pytest.approx(std, abs=5e-5)
    assert low.item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "slope"), [(5, 0.3692307692), (10, 0.4307826049), (20, 0.4642475007)]
)
def test_euler_map_of_a_gaussian_is_the_known_product(n, slope):
    low, high = ODESampler(n)(GaussianFlow(0.0, 0.5), torch.tensor([[0.0], [1.0]]).double())[:, 0]
    assert (high - low).item() == pytest.approx(slope, abs=1e-10)
    h, product = 1 / n, 1.0
    for t in (k / n for k in range(n)):
        product *= 1 + h * (0.25 * t - (1 - t)) / ((1 - t) ** 2 + 0.25 * t**2)
    assert (high - low).item() == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "n", "std"),
    [
        ("euler", 6, 0.389061),
        ("euler", 12, 0.441709),
        ("euler", 24, 0.470036),
        ("euler", 48, 0.484797),
        ("heun", 6, 0.503613),
        ("heun", 12, 0.501267),
        ("heun", 24, 0.500362),
    ],
)
def test_final_stds_on_uniform_grids(method, n, std):
    low, high = ODESampler(n, method)(FLOW, torch.tensor([[0.0], [1.0]]).double())[:, 0]
    assert (high - low).item() == pytest.approx(std, abs=1e-6)
    assert low.item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize(("n", "error"), [(5, 4.378e-2), (10, 1.073e-2), (20, 2.609e-3)])
def test_corrected_inversion_is_second_order(n, error):
    field = Recorder(lambda x, t, cond: -x)
    sampler, x1 = ODESampler(n), torch.ones(1, 1, dtype=torch.float64)
    inverted = sampler.invert(field, x1, correct=True)
    assert inverted.nfe == len(field.times) == n + 1
    rebuilt = sampler(lambda x, t, cond: -x, inverted.x)
    assert (rebuilt - x1).abs().item() == pytest.approx(error, rel=5e-4)


def test_plain_inversion_is_first_order_with_n_evaluations():
    x1 = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for n in (20, 40):
        inverted = ODESampler(n).invert(lambda x, t, cond: -x, x1)
        assert inverted.nfe == n
        rebuilt = ODESampler(n)(lambda x, t, cond: -x, inverted.x)
        errors.append((rebuilt - x1).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])  # ab2 starts anew
def test_two_partial_solves_make_a_whole_one(method):
    grid, x = grids.shifted(7, 3.0), noise()
    whole = ODESampler(grid, method)(FLOW, x)
    half = ODESampler(grid[:4], method)(FLOW, x)
    assert torch.equal(ODESampler(grid[3:], method)(FLOW, half), whole)


# --- counts and times -----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["solve", "invert"])
@pytest.mark.parametrize("method", FIXED)
def test_exact_number_of_evaluations(method, direction):
    field = Recorder()
    solution = getattr(ODESampler(6, method), direction)(field, noise(batch=5))
    expected = 6 * EVALUATIONS[method] + (method == "ab2")
    assert solution.nfe == len(field.times) == expected
    assert solution.rows == field.seen_rows == 5 * expected


@pytest.mark.parametrize("method", ADAPTIVE)
def test_evaluations_of_adaptive_methods_are_counted(method):
    field = Recorder()
    solution = ODESampler(3, method).solve(field, noise(batch=5), return_path=True)
    assert solution.nfe == len(field.times)
    assert solution.rows == field.seen_rows == 5 * solution.nfe


def test_a_grid_of_s_plus_one_points_makes_s_steps_and_reaches_the_end():
    grid, reached = grids.power(5, 2.0), []
    field = Recorder()
    ODESampler(grid).solve(field, noise(), callback=lambda k, t, x: reached.append((k, t)))
    assert field.floats == grid[:-1].tolist()
    assert reached == list(zip(range(1, 6), grid[1:].tolist(), strict=True))


@pytest.mark.parametrize(
    ("method", "nodes"),
    [("euler", [0]), ("midpoint", [0, 0.5]), ("heun", [0, 1]), ("rk4", [0, 0.5, 0.5, 1])],
)
def test_stages_lie_where_the_method_says(method, nodes):
    grid, field = torch.tensor([0.1, 0.3, 0.8]).double(), Recorder()
    ODESampler(grid, method)(field, noise())
    expected = [a + c * (b - a) for a, b in ((0.1, 0.3), (0.3, 0.8)) for c in nodes]
    assert field.floats == pytest.approx(expected, abs=1e-7)


def test_time_is_kept_in_float64_beside_float32_states():
    field = Recorder()
    ODESampler(1000)(field, torch.zeros(1, 1))
    exact = torch.tensor([k / 1000 for k in range(1000)], dtype=torch.float64)
    assert torch.equal(torch.stack(field.times), exact.float())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", [*FIXED, "dopri5", "corrected"])
def test_a_velocity_of_a_wider_type_leaves_the_state_its_own(method, grad):
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=grad)
    field = Recorder(lambda x, t, cond: -weight * x.double())
    x = torch.ones(2, 3)
    if method == "corrected":
        solution = ODESampler(4).invert(field, x, correct=True)
    else:
        solution = ODESampler(4, method).solve(field, x)
    assert {state.dtype for state in field.x} == {solution.x.dtype} == {torch.float32}


def test_float64_states_meet_float64_times():
    field = Recorder()
    ODESampler(3)(field, noise())
    assert {t.dtype for t in field.times} == {torch.float64}


# --- path, callback, bind -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_path_holds_the_states_at_the_grid(method):
    grid, x = grids.shifted(4, 2.0), noise()
    sampler = ODESampler(grid, method)
    solution, states = sampler.solve(FLOW, x, return_path=True), []
    sampler.solve(FLOW, x, callback=lambda k, t, x: states.append(x.clone()))
    assert torch.equal(solution.path, torch.stack([x, *states]))
    assert torch.equal(solution.path[-1], solution.x)
    assert sampler.solve(FLOW, x).path is None


def test_path_of_the_exact_flow_at_every_node():
    x = noise()
    path = ODESampler(5, "dopri5", rtol=1e-9, atol=1e-9).solve(FLOW, x, return_path=True).path
    for t, state in zip(grids.uniform(5).tolist(), path, strict=True):
        std = math.sqrt((1 - t) ** 2 + 0.25 * t**2)
        torch.testing.assert_close(state, 2 * t + std * x, rtol=1e-7, atol=1e-7)


def test_path_of_an_inversion_runs_from_data_to_noise():
    x = noise()
    solution = ODESampler(5).invert(FLOW, x, return_path=True)
    assert torch.equal(solution.path[0], x)
    assert torch.equal(solution.path[-1], solution.x)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_callback_replaces_the_state(method):
    known, kept = torch.full((4, 2), 7.0).double(), torch.full((4, 2), 7.0).double()
    field = Recorder()
    solution = ODESampler(3, method).solve(
        field, noise(), callback=lambda k, t, x: known if k == 2 else None, return_path=True
    )
    assert torch.equal(solution.path[2], kept)
    assert any(torch.equal(x, kept) for x in field.x)
    if method != "ab2":  # which starts anew in a solve of its own
        torch.testing.assert_close(solution.x, ODESampler([2 / 3, 1.0], method)(FLOW, kept))
    assert torch.equal(known, kept), "the caller's tensor was changed"


def test_last_replacement_is_the_result():
    assert ODESampler(2)(FLOW, noise()).abs().sum() > 0
    x = ODESampler(2).solve(FLOW, noise(), callback=lambda k, t, x: x * 0).x
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("direction", ["solve", "invert"])
def test_input_is_not_changed(method, direction):
    x = noise()
    before = x.clone()
    getattr(ODESampler(3, method), direction)(FLOW, x)
    assert torch.equal(x, before)


def test_condition_reaches_the_velocity():
    field, cond = Recorder(), {"label": torch.arange(4)}
    ODESampler(3, "heun")(field, noise(), cond)
    assert all(seen is cond for seen in field.conds)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("direction", ["solve", "invert"])
def test_bound_velocity_serves_one_solve_and_knows_its_steps(method, direction):
    grid, cond, field = grids.power(3, 2.0), torch.arange(4), Caching()
    sampler = ODESampler(grid, method)
    for _ in range(2):
        getattr(sampler, direction)(field, noise(), cond)
    steps = list(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
    assert len(field.bound) == 2
    for bound in field.bound:
        assert bound.cond is cond
        assert torch.equal(bound.grid, grid)
        assert bound.steps == (steps if direction == "solve" else steps[::-1])


@pytest.mark.parametrize("method", [*FIXED, "dopri5", "corrected"])
def test_every_stage_is_evaluated_within_the_step_it_serves(method):
    class Blocks(Caching):
        def bind(self, cond, grid):
            bound = super().bind(cond, grid)
            bound.velocity = self.check
            return bound

        def check(self, x, t, cond):
            left, right = self.bound[0].steps[-1]
            assert left - 1e-7 <= t[0] <= right + 1e-7
            return -x

    sampler = ODESampler(grids.power(4, 2.0), "euler" if method == "corrected" else method)
    if method == "corrected":
        sampler.invert(Blocks(), noise(), correct=True)
    else:
        sampler.solve(Blocks(), noise())
        sampler.invert(Blocks(), noise())


# --- memory, buffers, gradients -------------------------------------------------------------------


class Census:
    """Counts the states alive at each evaluation; returns a fresh result."""

    def __init__(self, numel):
        self.numel, self.most = numel, 0

    def __call__(self, x, t, cond=None):
        v = -x
        states = {
            o.data_ptr()
            for o in gc.get_objects()
            if type(o) is torch.Tensor and o.numel() == self.numel
        }
        self.most = max(self.most, len(states))
        return v


@pytest.fixture
def _only_new_objects():
    """What lives already is none of `gc.get_objects`' business."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize(
    ("method", "most"),
    # the caller's x, the state and the velocity; more where a step needs more at once
    [
        ("euler", 3),
        ("midpoint", 4),
        ("heun", 5),
        ("ab2", 5),
        ("rk4", 6),
        ("dopri5", 16),
        ("corrected", 5),
    ],
)
def test_memory_does_not_grow_with_the_number_of_steps(method, most):
    x = torch.randn(1009, 13)
    for n in (2, 12):
        census = Census(x.numel())
        if method == "corrected":
            ODESampler(n).invert(census, x, correct=True)
        else:
            ODESampler(n, method)(census, x)
        assert census.most == most


@pytest.mark.parametrize("method", [*FIXED, "dopri5", "corrected"])
def test_velocity_may_reuse_its_output_buffer(method):
    buffer = torch.empty(4, 2, dtype=torch.float64)

    def reuse(x, t, cond=None):
        return buffer.copy_(RING(x, t))

    x = noise()
    if method == "corrected":
        ours, fresh = (ODESampler(5).invert(f, x, correct=True).x for f in (reuse, RING))
    else:
        ours, fresh = (ODESampler(5, method)(f, x) for f in (reuse, RING))
    assert torch.equal(ours, fresh)


@pytest.mark.parametrize("method", [*FIXED, "dopri5", "corrected"])
def test_velocity_may_return_its_input(method):
    def same(field):
        if method == "corrected":
            return ODESampler(5).invert(field, x, correct=True).x
        return ODESampler(5, method)(field, x)

    x = noise()
    assert torch.equal(same(lambda x, t, cond: x), same(lambda x, t, cond: x.clone()))


@pytest.mark.parametrize("method", [*FIXED, "dopri5", "corrected"])
def test_gradients_flow_through_a_solve(method):
    """Of the parameters, of the state and through times that a graph holds on to."""

    def end(theta, x):
        def velocity(x, t, cond=None):
            return torch.sin(theta * x) * t[:, None] + theta

        if method == "corrected":
            return ODESampler(3).invert(velocity, x, correct=True).x
        return ODESampler(3, method, rtol=1e-9, atol=1e-9)(velocity, x)

    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = noise(2, 1).requires_grad_()
    assert torch.autograd.gradcheck(end, (theta, x), eps=1e-6, atol=1e-5)


def test_gradients_flow_where_only_later_steps_have_them():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def velocity(x, t, cond=None):
        return x * theta if t[0] > 0.4 else x * 0.5

    x = ODESampler(2)(velocity, torch.ones(1, 1, dtype=torch.float64))
    x.sum().backward()
    assert x.item() == pytest.approx(1.25 * 1.25)
    assert theta.grad.item() == pytest.approx(1.25 * 0.5)


def test_path_keeps_gradients():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sampler = ODESampler(2)
    solution = sampler.solve(lambda x, t, c: theta * x, torch.ones(1, 1).double(), return_path=True)
    solution.path[1].sum().backward()
    assert theta.grad.item() == pytest.approx(0.5)


def test_no_graph_is_built_without_gradients():
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        x = ODESampler(3)(lambda x, t, cond: net(x), torch.zeros(1, 2))
    assert not x.requires_grad


# --- seeded noise ---------------------------------------------------------------------------------


def test_seeded_noise_depends_on_its_seed_alone():
    seeds = [5, 0, 123456789, 5]
    together = seeded_noise((2, 3), seeds)
    for k, seed in enumerate(seeds):
        assert torch.equal(together[k], seeded_noise((2, 3), [seed])[0])
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(seeded_noise((2, 3), torch.tensor(seeds)), together)


def test_seeded_noise_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seeded_noise((4,), range(10))
    assert torch.equal(torch.rand(1), expected)


def test_seeded_noise_is_standard_normal_over_seeds():
    x = seeded_noise((4,), range(2000)).double()
    assert stats.kstest(x.flatten().numpy(), stats.norm.cdf).pvalue > 0.01
    correlation = torch.corrcoef(x.T) - torch.eye(4)
    assert correlation.abs().max() < 0.08


@pytest.mark.parametrize("batch", [1, 7])
def test_samples_do_not_depend_on_the_batch(batch):
    x0, sampler = seeded_noise((2,), range(14)), ODESampler(5, "heun")
    parts = torch.cat([sampler(FLOW, part) for part in x0.split(batch)])
    assert torch.equal(parts, sampler(FLOW, x0))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODESampler([0.0, 5.0]), r"grid must lie in \[0, 1\], got \[0.0, 5.0\]"),
        (lambda: ODESampler([1.0, 0.0]), "grid must increase strictly"),
        (lambda: ODESampler(0), "grid must be at least 1, got 0"),
        (lambda: ODESampler(4, "eular"), "method must be one of .*euler.*, got 'eular'"),
        (lambda: ODESampler(4, rtol=0.0), "rtol must be positive and finite, got 0.0"),
        (lambda: ODESampler(4, atol=-1.0), "atol must be positive and finite, got -1.0"),
        (
            lambda: ODESampler(4, "heun").invert(FLOW, noise(), correct=True),
            "correct must be False for method 'heun', got True; it undoes Euler steps",
        ),
        (
            lambda: ODESampler(1)(lambda x, t, cond: x[:, :1], noise()),
            r"velocity\(x, t, cond\) must have the shape of x, \(4, 2\), got \(4, 1\)",
        ),
        (
            lambda: ODESampler(4).solve(FLOW, noise(), callback=lambda k, t, x: x[0]),
            r"the callback's result must have the shape of x, \(4, 2\), got \(2,\)",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("solve", ["solve", "invert", "log_likelihood"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(2, 2, dtype=torch.long),
            TypeError,
            "be a floating-point tensor, got torch.int6",
        ),
        (torch.zeros(2, 2).cfloat(), TypeError, "be a floating-point tensor, got torch.complex64"),
        (torch.zeros(2, 2).numpy(), TypeError, "be a floating-point tensor, got ndarray"),
        ([[0.0, 1.0]], TypeError, "be a floating-point tensor, got list"),
        (torch.zeros(2, 2, device="meta"), TypeError, "hold data, got a tensor on the meta dev"),
        (torch.zeros(0, 2), ValueError, r"hold at least one sample, .* got shape \(0, 2\)"),
        (torch.zeros(()), ValueError, r"hold at least one sample, .* got shape \(\)"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "be finite, got 1 NaN or infinite of 2"),
        (torch.tensor([[1.0, math.inf]]), ValueError, "be finite, got 1 NaN or infinite of 2"),
    ],
)
def test_states_that_are_none_are_refused(x, error, message, solve):
    calls, sampler = Recorder(), ODESampler(4)
    solve = getattr(sampler, solve, partial(log_likelihood, sampler))
    with pytest.raises(error, match=f"x1? must {message}"):
        solve(calls, x)
    assert not calls.times


@pytest.mark.parametrize("grid", ["8", 8.5, None, True, ["a"], [[0.0], [0.5, 1.0]], 1j, [0, 1j]])
def test_grids_of_a_wrong_kind_are_refused(grid):
    with pytest.raises(TypeError, match="grid must be a number of steps or a tensor of times, got"):
        ODESampler(grid)


@pytest.mark.parametrize("correct", [1.5, "yes", None])
def test_a_number_of_corrections_is_whole(correct):
    with pytest.raises(TypeError, match="correct must be an integer, got"):
        ODESampler(4).invert(FLOW, noise(), correct=correct)


def test_misspelt_keywords_are_refused():
    with pytest.raises(TypeError, match="num_steps"):
        ODESampler(num_steps=4)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="retrun_path"):
        ODESampler(4).solve(FLOW, noise(), retrun_path=True)  # pyright: ignore[reportCallIssue]
