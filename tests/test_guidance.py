"""Guidance: the algebra on known classes, exact special cases, rows, conditions."""

import pytest
import torch
from torch import nn

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.guidance import (
    DOUBLED_NUMBERS,
    DOUBLED_ROWS,
    Autoguidance,
    ClassifierFree,
    DropCond,
    combine,
    replace_cond,
)
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.velocity import Velocity, bind

NULL = 2
BOTH = MixtureFlow(torch.ones(2), torch.tensor([[-1.5], [1.5]]), torch.full((2,), 0.5))
CLASSES = GaussianFlow(-1.5, 0.5), GaussianFlow(1.5, 0.5), BOTH


def two_classes(x, t, cond=None):
    """N(−1.5, .5²) for label 0, N(1.5, .5²) for 1, and both for the null label."""
    fields = torch.stack([field(x, t) for field in CLASSES])
    return fields[cond, torch.arange(len(x))]


class Counting:
    """Counts the network's calls and rows."""

    def __init__(self, velocity=two_classes):
        self.velocity, self.calls, self.rows_seen = velocity, 0, 0

    def __call__(self, x, t, cond=None):
        self.calls += 1
        self.rows_seen += len(x)
        return self.velocity(x, t, cond)


def state(batch=6, *shape):
    torch.manual_seed(batch)
    return torch.randn(batch, *(shape or (1,))), torch.rand(batch), torch.arange(batch) % 2


# --- the algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "mean"), [(0, 0.0), (0.5, 1.05), (1, 1.5), (1.5, 1.70), (2, 1.83), (4, 2.19)]
)
def test_mean_of_a_guided_class(scale, mean):
    x0 = seeded_noise((1,), range(10_000))
    field = ClassifierFree(two_classes, scale, NULL)
    x = ODESampler(50, "heun")(field, x0, torch.ones(len(x0), dtype=torch.long))
    assert x.mean().item() == pytest.approx(mean, abs=0.03)


def test_std_of_a_guided_class_falls_with_the_scale():
    x0 = seeded_noise((1,), range(4000))
    cond = torch.ones(len(x0), dtype=torch.long)
    stds = [
        ODESampler(50, "heun")(ClassifierFree(two_classes, scale, NULL), x0, cond).std().item()
        for scale in (0, 0.5, 1, 1.5, 2, 4)
    ]
    assert stds == sorted(stds, reverse=True)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 1.5, 7.0])
@pytest.mark.parametrize("batch", [3, DOUBLED_ROWS + 1])
def test_guided_velocity_is_the_formula(scale, batch):
    x, t, cond = state(batch)
    v, v_null = two_classes(x, t, cond), two_classes(x, t, torch.full_like(cond, NULL))
    guided = ClassifierFree(two_classes, scale, NULL)(x, t, cond)
    torch.testing.assert_close(guided, v_null + scale * (v - v_null))


def test_every_channel_is_guided():
    def field(x, t, cond):
        return cond[:, None, None, None] * torch.ones_like(x)

    x, t, cond = state(2, 4, 3, 3)
    guided = ClassifierFree(field, 3.0, 0)(x, t, cond)
    torch.testing.assert_close(guided, 3.0 * field(x, t, cond))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_scales_one_and_zero_are_bit_for_bit(interval):
    x, t, cond = state(64)
    t[:] = 0.4
    one = ClassifierFree(two_classes, 1.0, NULL, interval)(x, t, cond)
    zero = ClassifierFree(two_classes, 0.0, NULL, interval)(x, t, cond)
    assert torch.equal(one, two_classes(x, t, cond))
    assert torch.equal(zero, two_classes(x, t, torch.full_like(cond, NULL)))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_outside_its_interval_the_field_is_the_conditional_one(scale):
    x, t, cond = state(64)
    t = torch.linspace(0, 1, 64)
    guided = ClassifierFree(two_classes, scale, NULL, (0.3, 0.7))(x, t, cond)
    everywhere = ClassifierFree(two_classes, scale, NULL)(x, t, cond)
    inside = (t >= 0.3) & (t <= 0.7)
    assert torch.equal(guided[~inside], two_classes(x, t, cond)[~inside])
    assert torch.equal(guided[inside], everywhere[inside])


@pytest.mark.parametrize("scale", [0.0, 2.0])
@pytest.mark.parametrize("time", [0.0, 0.29, 0.71, 0.9])
@pytest.mark.parametrize("batch", [4, DOUBLED_ROWS + 1])
def test_a_batch_outside_the_interval_gets_the_conditional_field(scale, time, batch):
    x, _, cond = state(batch)
    t = torch.full((batch,), time)
    guided = ClassifierFree(two_classes, scale, NULL, (0.3, 0.7))(x, t, cond)
    assert torch.equal(guided, two_classes(x, t, cond))
    assert not torch.allclose(guided, two_classes(x, t, torch.full_like(cond, NULL)), atol=1e-3)


@pytest.mark.parametrize("end", [0.3, 0.7])
def test_the_interval_includes_its_ends(end):
    x, _, cond = state(4)
    t = torch.full((4,), end)
    for interval in ((0.3, 0.7), (end, end)):
        guided = ClassifierFree(two_classes, 3.0, NULL, interval)(x, t, cond)
        assert torch.equal(guided, ClassifierFree(two_classes, 3.0, NULL)(x, t, cond))


def test_autoguidance_is_the_formula():
    x, t, cond = state(8)
    weak = lambda x, t, cond: -x  # noqa: E731
    for scale in (0.0, 0.5, 1.0, 3.0):
        v, w = two_classes(x, t, cond), -x
        guided = Autoguidance(two_classes, weak, scale)(x, t, cond)
        torch.testing.assert_close(guided, w + scale * (v - w))
    assert torch.equal(Autoguidance(two_classes, weak, 1.0)(x, t, cond), v)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "interval", "rows_per_sample"),
    [
        (1.0, (0.0, 1.0), 10),
        (0.0, (0.0, 1.0), 10),
        (2.0, (0.0, 1.0), 20),
        (2.0, (0.3, 0.6), 14),  # t = .3, .4, .5, .6 of ten steps
        (0.0, (0.3, 0.6), 10),
        (2.0, (0.95, 1.0), 10),  # no step starts there
    ],
)
@pytest.mark.parametrize("batch", [4, DOUBLED_ROWS + 1])
def test_rows_are_those_the_network_saw(scale, interval, rows_per_sample, batch):
    x, _, cond = state(batch)
    net = Counting()
    solution = ODESampler(10).solve(ClassifierFree(net, scale, NULL, interval), x, cond)
    assert solution.nfe == 10
    assert solution.rows == net.rows_seen == rows_per_sample * batch


@pytest.mark.parametrize(
    ("shape", "calls"),
    [
        ((1, 1), 1),
        ((DOUBLED_ROWS, 1), 1),
        ((DOUBLED_ROWS + 1, 1), 2),
        ((2, DOUBLED_NUMBERS // 2), 1),
        ((2, DOUBLED_NUMBERS // 2 + 1), 2),
    ],
)
def test_small_states_are_doubled_into_one_call(shape, calls):
    net = Counting(lambda x, t, cond: x * cond[:, None])
    x, t, cond = state(*shape)
    ClassifierFree(net, 2.0, NULL)(x, t, cond)
    assert net.calls == calls
    assert net.rows_seen == 2 * len(x)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 50), (2.0, 100)])
def test_rows_of_autoguidance(scale, rows):
    strong, weak = Counting(), Counting()
    x, _, cond = state(5)
    solution = ODESampler(10).solve(Autoguidance(strong, weak, scale), x, cond)
    assert solution.rows == strong.rows_seen + weak.rows_seen == rows


def test_rows_of_guidance_around_guidance():
    strong, weak = Counting(), Counting()
    x, _, cond = state(5)
    field = ClassifierFree(Autoguidance(strong, weak, 2.0), 1.5, NULL)
    solution = ODESampler(10, "heun").solve(field, x, cond)
    assert solution.nfe == 20
    assert solution.rows == strong.rows_seen + weak.rows_seen == 2 * 2 * 20 * 5


# --- wrappers around velocities that are bound ----------------------------------------------------


class Caching:
    """Two_classes with a cache of its condition, told its steps."""

    def __init__(self):
        self.bound = []

    def __call__(self, x, t, cond=None):
        raise AssertionError("the bound velocity is to be used")

    def bind(self, cond, grid):
        self.bound.append(_Cached(cond, grid))
        return self.bound[-1]


class _Cached:
    def __init__(self, cond, grid):
        self.cond, self.grid, self.steps, self.rows = cond, grid, [], 0

    def begin_step(self, t_left, t_right):
        self.steps.append((t_left, t_right))

    def __call__(self, x, t, cond=None):
        assert torch.equal(cond, self.cond), "a cache was used for another condition"
        self.rows += len(x)
        return two_classes(x, t, self.cond)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.4, 0.8)])
def test_guidance_binds_once_for_each_condition(interval):
    x, _, cond = state(6)
    field, sampler = Caching(), ODESampler(4, "heun")
    solution = sampler.solve(ClassifierFree(field, 2.0, NULL, interval), x, cond)
    plain = sampler.solve(ClassifierFree(two_classes, 2.0, NULL, interval), x, cond)
    torch.testing.assert_close(solution.x, plain.x)
    assert len(field.bound) == 2
    positive, negative = field.bound
    assert torch.equal(positive.cond, cond)
    assert torch.equal(negative.cond, torch.full_like(cond, NULL))
    quarters = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    for bound in field.bound:
        assert bound.steps == quarters
        assert torch.equal(bound.grid, sampler.times)
    assert solution.rows == plain.rows == positive.rows + negative.rows


def test_autoguidance_binds_both_fields_to_the_condition_and_the_grid():
    x, _, cond = state(6)
    strong, weak, sampler = Caching(), Caching(), ODESampler(4)
    sampler.solve(Autoguidance(strong, weak, 2.0), x, cond)
    for (bound,) in (strong.bound, weak.bound):
        assert torch.equal(bound.cond, cond)
        assert torch.equal(bound.grid, sampler.times)


class Edged:
    """Two_classes, with steps that no edge may divide."""

    def __init__(self, *edges):
        self.edges, self.steps = edges, []

    def begin_step(self, t_left, t_right):
        self.steps.append((t_left, t_right))

    def __call__(self, x, t, cond=None):
        return two_classes(x, t, cond)


def test_steps_end_at_the_edges_of_both_fields():
    x, _, cond = state(6)
    strong, weak = Edged(0.3), Edged(0.6)
    solution = ODESampler(2).solve(Autoguidance(strong, weak, 2.0), x, cond)
    assert solution.nfe == 4
    assert strong.steps == weak.steps == [(0.0, 0.3), (0.3, 0.5), (0.5, 0.6), (0.6, 1.0)]


def test_two_solves_do_not_share_a_cache():
    x, _, cond = state(6)
    field = ClassifierFree(Caching(), 2.0, NULL)
    a, b = (ODESampler(4).solve(field, x, c) for c in (cond, 1 - cond))
    c = ODESampler(4).solve(field, x, cond)
    assert torch.equal(a.x, c.x)
    assert a.rows == b.rows == c.rows


def test_a_velocity_may_reuse_its_buffer():
    x, t, cond = state(DOUBLED_ROWS + 1)
    buffer = torch.empty_like(x)
    reuse = ClassifierFree(lambda x, t, c: buffer.copy_(two_classes(x, t, c)), 2.0, NULL)
    assert torch.equal(reuse(x, t, cond), ClassifierFree(two_classes, 2.0, NULL)(x, t, cond))


def test_guided_fields_are_velocities():
    assert isinstance(ClassifierFree(two_classes, 2.0, NULL), Velocity)
    assert isinstance(Autoguidance(two_classes, two_classes, 2.0), Velocity)


def test_gradients_flow_through_guidance():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    field = ClassifierFree(lambda x, t, c: theta * c[:, None] * x, 2.0, 0)
    x = torch.ones(2, 1, dtype=torch.float64)
    slope = torch.tensor([[1.0], [2.0]]) / 3 * 2  # of one Euler step, guided
    ODESampler(3)(field, x, torch.tensor([1, 2])).sum().backward()
    expected = (3 * slope * (1 + 0.5 * slope) ** 2).sum()
    assert theta.grad.item() == pytest.approx(expected.item())


# --- conditions -----------------------------------------------------------------------------------


def test_null_mapping_replaces_what_it_names_and_keeps_the_rest():
    seen = []

    def field(x, t, cond):
        seen.append(cond)
        return cond["label"][:, None] + cond["image"]

    x, t, _ = state(2)
    cond = {"label": torch.tensor([3, 4]), "image": torch.tensor([[10.0], [20.0]])}
    guided = ClassifierFree(field, 2.0, {"label": 0})(x, t, cond)
    torch.testing.assert_close(guided, torch.tensor([[16.0], [28.0]]))
    assert torch.equal(seen[0]["label"], torch.tensor([3, 4, 0, 0]))
    assert torch.equal(seen[0]["image"], torch.tensor([[10.0], [20.0]] * 2))
    assert torch.equal(cond["label"], torch.tensor([3, 4])), "the caller's condition was changed"


def test_null_tensor_has_the_shape_of_one_sample():
    null, cond = torch.tensor([1.0, 2.0, 3.0]), torch.randn(4, 3)
    assert torch.equal(replace_cond(cond, null), null.expand(4, 3))
    where = torch.tensor([True, False, True, False])
    mixed = replace_cond(cond, null, where)
    assert torch.equal(mixed[where], null.expand(2, 3))
    assert torch.equal(mixed[~where], cond[~where])


def test_drop_cond_drops_each_sample_with_its_probability():
    drop = DropCond(0.1, NULL)
    dropped = (drop(torch.zeros(100_000, dtype=torch.long)) == NULL).sum().item()
    assert abs(dropped - 10_000) <= 300


def test_drop_cond_is_off_in_eval():
    drop, cond = DropCond(1.0, NULL).eval(), torch.zeros(100, dtype=torch.long)
    assert torch.equal(drop(cond), cond)
    assert torch.equal(drop.train()(cond), torch.full_like(cond, NULL))
    assert torch.equal(DropCond(0.0, NULL)(cond), cond)


def test_the_null_condition_has_the_type_of_the_condition():
    for cond in (torch.tensor([1.5, 2.5]), torch.tensor([1, 2])):
        for where in (None, torch.tensor([True, False])):
            assert replace_cond(cond, 7, where).dtype == cond.dtype
            assert replace_cond(cond, torch.tensor(7.0).double(), where).dtype == cond.dtype


def test_drop_cond_follows_a_parent_module():
    net = nn.Module()
    net.drop = DropCond(1.0, NULL)
    cond = torch.zeros(5, dtype=torch.long)
    assert torch.equal(net.eval().drop(cond), cond)


def test_drop_cond_drops_named_conditions_together():
    cond = {name: torch.zeros(1000) for name in ("a", "b", "c")}
    dropped = DropCond(0.5, {"a": 1.0, "b": 1.0})(cond)
    assert 0 < dropped["a"].sum() < 1000
    assert torch.equal(dropped["a"], dropped["b"])
    assert torch.equal(dropped["c"], cond["c"])


def test_drop_cond_follows_the_generator_and_lets_none_be():
    drop, cond = DropCond(0.5, NULL), torch.zeros(100, dtype=torch.long)
    a, b, c = (drop(cond, torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert drop(None) is None


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ClassifierFree(two_classes, 2.0, NULL, (0.6, 0.4)),
            ValueError,
            r"interval must be increasing times within \[0, 1\], got \(0.6, 0.4\)",
        ),
        (
            lambda: ClassifierFree(two_classes, 2.0, NULL, (0.0, 1.01)),
            ValueError,
            "interval must be increasing times",
        ),
        (
            lambda: ClassifierFree(two_classes, float("nan"), NULL),
            ValueError,
            "scale must be finite, got nan",
        ),
        (
            lambda: Autoguidance(two_classes, two_classes, float("inf")),
            ValueError,
            "scale must be finite, got inf",
        ),
        (
            lambda: ClassifierFree(two_classes, 2.0, NULL)(torch.zeros(1, 1), torch.zeros(1)),
            TypeError,
            "cond must be given to replace it by the null condition, got None",
        ),
        (
            lambda: replace_cond({"a": torch.zeros(1)}, {"b": 0}),
            ValueError,
            r"null must name conditions among \['a'\], got \['b'\]",
        ),
        (
            lambda: replace_cond({"a": torch.zeros(1)}, 0),
            TypeError,
            "null must be a mapping exactly when cond is one, got null int and cond dict",
        ),
        (lambda: DropCond(1.5, NULL), ValueError, r"prob must lie in \[0, 1\], got 1.5"),
        (lambda: DropCond(0.1, None), TypeError, "null must be the null condition .* got None"),
        (lambda: ClassifierFree(two_classes, "2", NULL), TypeError, "scale must be a number"),
        (lambda: Autoguidance(two_classes, two_classes, None), TypeError, "scale must be a number"),
        (lambda: ClassifierFree(two_classes, 2.0, None), TypeError, "null must be .* got None"),
        (lambda: DropCond(0.1, "3"), TypeError, "null must be the null condition .* got '3'"),
        (lambda: DropCond(0.1, NULL)(3), TypeError, "cond must be a tensor, .* got int"),
        (lambda: replace_cond(3, NULL), TypeError, "cond must be a tensor, .* got int"),
        (
            lambda: replace_cond({"a": 3}, {"a": 0}),
            TypeError,
            "cond must be a tensor, .* got a mapping of int",
        ),
        *(
            (lambda field=field: field(torch.zeros(1, 1), torch.zeros(1), [1]), TypeError, message)
            for field, message in (
                (ClassifierFree(two_classes, 2.0, NULL), "cond must be a tensor, .* got list"),
                (Autoguidance(two_classes, two_classes, 2.0), "cond must be .* got list"),
            )
        ),
        *(
            (lambda field=field, x=x: field(x, torch.zeros(1), torch.zeros(1)), TypeError, message)
            for field in (
                ClassifierFree(two_classes, 2.0, NULL),
                Autoguidance(two_classes, two_classes, 2.0),
            )
            for x, message in (
                (torch.zeros(1, 1, dtype=torch.uint8), "x must be a floating.*got torch.uint8"),
                (torch.zeros(1, 1).long(), "x must be a floating-point tensor, got torch.int64"),
                ([[0.0]], "x must be a floating-point tensor, got list"),
            )
        ),
        (lambda: ClassifierFree(two_classes, scael=2.0, null=NULL), TypeError, "scael"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def scaled(x, t, cond):
    return (1 + cond[:, None]) * x


@pytest.mark.parametrize(
    "field",
    [
        ClassifierFree(scaled, 2.0, NULL),
        ClassifierFree(scaled, 2.0, NULL, (0.3, 0.7)),
        Autoguidance(scaled, lambda x, t, cond: -x, 2.0),
    ],
)
def test_nan_stays_in_its_sample_and_no_samples_are_none(field):
    x, t, cond = state(4)
    x[1] = torch.nan
    guided, rest = field(x, t, cond), [0, 2, 3]
    assert guided[1].isnan()
    torch.testing.assert_close(guided[rest], field(x[rest], t[rest], cond[rest]))
    assert field(x[:0], t[:0], cond[:0]).shape == (0, 1)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_velocities_are_combined_by_the_formula(scale, dtype):
    v, v_null = torch.randn(2, 5, 3).to(dtype)
    guided = combine(v, v_null, scale)
    exact = v_null.double() + scale * (v.double() - v_null.double())
    torch.testing.assert_close(guided, exact.to(dtype))
    per_sample = torch.full((5, 1), scale, dtype=dtype)
    torch.testing.assert_close(combine(v, v_null, per_sample), guided)
    if scale in (0, 1):
        assert torch.equal(guided, v if scale else v_null)


def test_a_velocity_that_is_bound_to_its_condition_is_not_guided_any_more():
    class Prepared:
        def bind(self, cond, grid=None):
            return lambda x, t, cond_=None: cond[:, None] - x

        def __call__(self, x, t, cond=None):
            return self.bind(cond)(x, t)

    bound = bind(Prepared(), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="velocity must not be bound to a condition, got a bound"):
        ClassifierFree(bound, 2.0, null=0)
