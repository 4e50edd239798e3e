"""The joint flow of image and label, against closed forms."""

import math

import pytest
import torch

from flowkit.nn import ResidualMLP
from flowkit.sampling import ODESampler
from flowkit.symmetrical import JointFlow, OneHot, Ordinal, Simplex
from flowkit.symmetrical.joint import ImageVelocity, JointField, pack, unpack
from tests.symmetrical.exact_joint import ClassMixture, GaussianPair

TWO_CLASSES = ClassMixture(
    torch.tensor([[-1.0], [1.0]]), torch.tensor([[-1.0], [1.0]]), std=0.5, code_std=0.05
)
DRAWS, HEUN = 50_000, ODESampler(40, "heun")


class Recorder:
    """A network that keeps what it is asked, and answers zeros."""

    def __init__(self):
        self.calls = []

    def __call__(self, state, t):
        self.calls.append((state.clone(), t.clone()))
        return torch.zeros_like(state)


def _loss_call(two_times, x1, y0, **options):
    network = Recorder()
    JointFlow(network, two_times).loss(
        x1, y0, generator=torch.Generator().manual_seed(0), **options
    )
    return network.calls[0]


# --- states and targets -------------------------------------------------------------------------


def test_the_state_is_noise_and_label_at_0_and_image_and_noise_at_1():
    """Seen through the loss's own states, which are linear in t: extrapolate each pair's line."""
    x1, y0 = torch.full((4096, 1), 5.0), torch.full((4096, 2), -7.0)
    state, t = _loss_call(False, x1, y0)
    x, y, t = state[:, :1], state[:, 1:], t[:, None]
    noise_x, noise_y = (x - t * x1) / (1 - t), (y - (1 - t) * y0) / t
    for noise in (noise_x[t[:, 0] < 0.99], noise_y[t[:, 0] > 0.01]):
        assert noise.mean().item() == pytest.approx(0, abs=0.05)
        assert noise.std().item() == pytest.approx(1, abs=0.03)
    near_0, near_1 = t[:, 0] < 0.01, t[:, 0] > 0.99
    assert (y[near_0] + 7).abs().max() < 0.2
    assert (x[near_1] - 5).abs().max() < 0.2


@pytest.mark.parametrize("two_times", [False, True])
def test_targets_are_the_derivatives_of_the_states(two_times):
    """Central differences of the interpolant, found by moving the drawn times by ±h."""
    x1, y0, h = torch.randn(16, 3).double(), torch.randn(16, 2).double(), 1e-4

    class Shifted(JointFlow):
        shift = (0.0, 0.0)

        def _draw_times(self, *arguments):
            t, s = super()._draw_times(*arguments)
            t, s = 0.05 + 0.9 * t.double(), 0.05 + 0.9 * s.double()
            return t + Shifted.shift[0], s + Shifted.shift[1]

    def state(shift):
        network, Shifted.shift = Recorder(), shift
        flow, generator = Shifted(network, two_times), torch.Generator().manual_seed(1)
        image_loss, label_loss = flow.loss(x1, y0, boundary_share=0.0, generator=generator)
        return network.calls[0][0], image_loss, label_loss

    dx = (state((h, 0))[0] - state((-h, 0))[0])[:, :3] / (2 * h)
    dy = (state((0, h))[0] - state((0, -h))[0])[:, 3:] / (2 * h)
    _, image_loss, label_loss = state((0.0, 0.0))
    # a zero network's losses are the targets' mean squares, and those of the derivatives are zero
    assert image_loss.item() == pytest.approx(dx.square().mean().item(), abs=1e-4)
    assert label_loss.item() == pytest.approx(dy.square().mean().item(), abs=1e-4)
    knowing, Shifted.shift = Shifted(lambda *_: torch.cat([dx, dy], 1), two_times), (0.0, 0.0)
    losses = knowing.loss(x1, y0, boundary_share=0.0, generator=torch.Generator().manual_seed(1))
    assert max(losses).item() < 1e-12


def test_planes_are_constant_and_their_mean_is_the_codes_velocity():
    x, y = torch.randn(3, 2, 4, 5), torch.randn(3, 6)
    state = pack(x, y)
    assert state.shape == (3, 8, 4, 5)
    assert torch.equal(state[1, 2:, 3, 1], y[1])
    back_x, back_y = unpack(state, 2, 2)
    assert torch.equal(back_x, x)
    torch.testing.assert_close(back_y, y)
    answer = torch.randn(3, 8, 4, 5)
    v_x, v_y = JointFlow(lambda state, t: answer)(x, y, torch.zeros(3), torch.zeros(3))
    assert torch.equal(v_x, answer[:, :2])
    torch.testing.assert_close(v_y, answer[:, 2:].mean((2, 3)))


def test_masks_and_points_are_joined_as_they_are():
    for x, y in (
        (torch.randn(3, 1, 4, 4), torch.randn(3, 2, 4, 4)),
        (torch.randn(3, 5), torch.randn(3, 2)),
    ):
        back_x, back_y = unpack(pack(x, y), x.shape[1], y.ndim)
        assert torch.equal(back_x, x)
        assert torch.equal(back_y, y)


def test_two_times_cover_the_square_and_its_edges():
    x1, y0 = torch.zeros(20_000, 1), torch.zeros(20_000, 1)
    _, times = _loss_call(True, x1, y0, boundary_share=0.5)
    t, s = times.unbind(1)
    clean_label, clean_image = s == 0, t == 1
    assert not bool((clean_label & clean_image).any())
    assert clean_label.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert clean_image.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (clean_image & (s == 1)).float().mean().item() == pytest.approx(0.125, abs=0.01)
    assert s[clean_image & (s < 1)].mean().item() == pytest.approx(0.5, abs=0.02)
    inside = ~clean_label & ~clean_image
    quadrants = torch.histogramdd(times[inside].double(), bins=[2, 2], range=[0.0, 1.0] * 2).hist
    torch.testing.assert_close(
        quadrants / inside.sum(), torch.full_like(quadrants, 0.25), atol=0.02, rtol=0
    )
    assert t[clean_label].mean().item() == pytest.approx(0.5, abs=0.02)
    _, times = _loss_call(True, x1, y0, boundary_share=0.0)
    assert not bool((times == 1).any() or (times == 0).any())


def test_clean_sides_carry_no_loss():
    """With all pairs on the edges, half of them move the image and half the label, not both."""
    x1, y0 = 3 + torch.zeros(4000, 1), 3 + torch.zeros(4000, 1)
    network = Recorder()
    image_loss, label_loss = JointFlow(network).loss(x1, y0, boundary_share=1.0)
    state, times = network.calls[0]
    assert bool(((times[:, 0] == 1) | (times[:, 1] == 0)).all())
    # E(3 − ξ)² = 10 for what moves; the clean side is exactly its data
    assert image_loss.item() == pytest.approx(10, abs=0.4)
    assert label_loss.item() == pytest.approx(10, abs=0.4)
    for side, clean in ((0, times[:, 0] == 1), (1, times[:, 1] == 0)):
        assert bool((state[clean, side] == 3).all())

    def wrong_on_clean_sides(state, t):
        return 1e3 * torch.stack([(t[:, 0] == 1), (t[:, 1] == 0)], 1).float()

    losses = JointFlow(wrong_on_clean_sides).loss(x1, y0, boundary_share=1.0)
    assert max(losses).item() < 11


@pytest.mark.parametrize("two_times", [False, True])
def test_hidden_labels_are_zeros_without_loss(two_times):
    x1, y0 = torch.randn(5000, 1), torch.full((5000, 2), 2.0)
    state, times = _loss_call(two_times, x1, y0, label_dropout=0.3, boundary_share=0.0)
    hidden = (state[:, 1:] == 0).all(1)
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.02)
    if two_times:
        assert bool((times[hidden, 1] == 1).all())
        assert bool((times[~hidden, 1] < 1).all())
    flow = JointFlow(Recorder(), two_times)
    _, label_loss = flow.loss(x1, y0, label_dropout=0.3, boundary_share=0.0)
    assert label_loss.item() == pytest.approx(5, abs=0.3)  # E(ξ − 2)², of those that have labels
    image_loss, label_loss = flow.loss(x1, y0, label_dropout=1.0, boundary_share=0.0)
    assert label_loss.item() == 0
    assert image_loss.item() == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_sums_in_float32(dtype):
    """Squares of 300 are beyond float16, and so is a count of 80 000."""
    x1, y0 = torch.full((2, 1, 200, 200), 300.0, dtype=dtype), torch.zeros(2, 1, 200, 200).to(dtype)
    flow = JointFlow(lambda state, t: torch.zeros_like(state), two_times=False)
    mask = torch.ones(2, 1, 200, 200, dtype=dtype)
    for options in ({}, {"mask": mask}):
        loss, _ = flow.loss(x1, y0, x0=torch.zeros_like(x1), **options)
        assert loss.item() == pytest.approx(300**2, rel=1e-5)
    assert flow.loss(x1, y0, mask=torch.zeros_like(mask))[0].item() == 0


def test_bad_batches_are_refused():
    flow = JointFlow(lambda state, t: torch.zeros_like(state), two_times=False)
    x1, y0 = torch.zeros(2, 1, 2, 2), torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"x1 must be a floating-point tensor, got torch.int64"):
        flow.loss(x1.long(), y0)
    with pytest.raises(
        ValueError, match=r"mask must have the 4 dimensions of x1, .* got shape \(2"
    ):
        flow.loss(x1, y0, mask=torch.ones(2))


def test_losses_are_weighted_means_over_what_counts():
    x1, y0 = torch.zeros(6, 1, 2, 2), torch.zeros(6, 3, 2, 2)

    # images and their noise are zeros, so that the answers are the errors
    answer = torch.zeros(6, 4, 2, 2)
    answer[:, 0, 0, 0], answer[:, 0, 1, 1] = 2.0, 4.0
    weight = torch.zeros(6, 1, 2, 2)
    weight[..., 0, 0], weight[..., 1, 1] = 3.0, 1.0
    flow, x0 = JointFlow(lambda state, t: answer, False), torch.zeros(6, 1, 2, 2)
    assert flow.loss(x1, y0, x0=x0)[0].item() == pytest.approx((4 + 16) / 4)
    assert flow.loss(x1, y0, x0=x0, mask=weight)[0].item() == pytest.approx((3 * 4 + 16) / 4)
    # the label's errors are its noise: a weight picks one pixel's
    generator = torch.Generator()
    one = torch.zeros(6, 1, 2, 2)
    one[..., 0, 1] = 1.0
    _, picked = flow.loss(x1, y0, x0=x0, label_weight=one, generator=generator.manual_seed(3))
    _, every = flow.loss(
        x1, y0, x0=x0, label_weight=3 * torch.ones(1), generator=generator.manual_seed(3)
    )
    _, plain = flow.loss(x1, y0, x0=x0, generator=generator.manual_seed(3))
    torch.testing.assert_close(every, plain)
    generator.manual_seed(3)
    torch.rand(6, generator=generator)
    noise = torch.randn(6, 3, 2, 2, generator=generator)
    torch.testing.assert_close(plain, noise.square().mean())
    torch.testing.assert_close(picked, noise[..., 0, 1].square().mean())


def test_a_network_of_other_channels_is_refused():
    flow = JointFlow(lambda state, t: state[:, :1])
    with pytest.raises(ValueError, match=r"velocity\(state, t\) must have the shape of state"):
        flow(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


def test_a_network_built_for_other_states_or_times_says_which_these_are():
    x, y, t = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3), torch.zeros(2)
    for shape, num_times, why in (
        ((1, 8, 8), 2, r"x must have shape \(B, 1, 8, 8\), got \(2, 4, 8, 8\)"),
        ((4, 8, 8), 1, r"t must have shape \(2,\), got \(2, 2\)"),
    ):
        flow = JointFlow(ResidualMLP(shape, width=8, depth=1, num_times=num_times))
        expected = r"image and code of shape \(2, 4, 8, 8\) and times of shape \(2, 2\), got an "
        with pytest.raises(ValueError, match=expected + "error: " + why):
            flow(x, y, t, t)


# --- the readout --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [OneHot(4), Simplex(4), Ordinal(4)])
@pytest.mark.parametrize("two_times", [False, True])
def test_one_step_is_the_expected_code_whatever_the_noise(codec, two_times):
    mixture = ClassMixture(torch.randn(4, 3).double(), codec.table.double(), std=0.7, code_std=0.1)
    flow, x1 = JointFlow(mixture, two_times), torch.randn(50, 3).double()
    p = mixture.posterior(x1)
    for scale in (0.0, 1.0, 30.0):
        noise = scale * torch.randn(50, codec.channels).double()
        solution = flow.solve_codes(ODESampler(1), x1, noise)
        torch.testing.assert_close(solution.x, p @ codec.table.double(), atol=1e-6, rtol=0)
        assert (solution.nfe, solution.rows) == (1, 50)
    if not isinstance(codec, Ordinal):
        torch.testing.assert_close(codec.posterior(solution.x), p, atol=1e-6, rtol=0)


def test_more_steps_of_the_symmetric_flow_leave_the_right_conditional():
    """The recovered label's coefficient of x, for correlation .8, against known values."""
    flow = JointFlow(GaussianPair(0.8), two_times=False)
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    known = {1: 0.8, 2: 0.5619, 5: 0.5958, 10: 0.6015, 25: 0.6062, 50: 0.6080}
    for steps, expected in known.items():
        found = flow.solve_codes(ODESampler(steps), one, zero).x.item()
        assert found == pytest.approx(expected, abs=1e-4)
    # the exact flow is a rotation, and its angle is not that of the regression
    field = JointField(flow, 1, 2)
    rotation = ODESampler(100, "rk4").invert(field, torch.eye(2).double()).x
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2).double(), atol=1e-8, rtol=0)
    assert rotation[0, 1].item() == pytest.approx(0.60995, abs=1e-5)


def test_even_a_label_that_equals_the_image_is_not_recovered():
    flow = JointFlow(GaussianPair(1 - 1e-9), two_times=False)
    found = flow.solve_codes(
        ODESampler(100, "rk4"), torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    )
    assert found.x.item() == pytest.approx(0.747, abs=1e-3)


def _accuracy(flow, steps, generator):
    labels = torch.randint(2, (DRAWS,), generator=generator)
    noise = torch.randn(2, DRAWS, 1, generator=generator)
    x1 = TWO_CLASSES.means[labels] + 0.5 * noise[0]
    codes = flow.solve_codes(ODESampler(steps), x1, noise[1]).x
    return ((codes[:, 0] > 0).long() == labels).float().mean().item()


def test_accuracy_of_the_symmetric_flow_falls_with_its_steps():
    flow, generator = JointFlow(TWO_CLASSES, two_times=False), torch.Generator().manual_seed(0)
    bayes = 0.5 * (1 + math.erf(2 / math.sqrt(2)))
    # within the errors of these draws and of those that the known values come from
    for steps, expected in ((1, bayes), (1, 0.9768), (2, 0.9309), (25, 0.8648)):
        assert _accuracy(flow, steps, generator) == pytest.approx(expected, abs=0.004)


def _agreement(flow, sampler, generator):
    """Of images generated for labels, by the best classifier there is."""
    labels = torch.randint(2, (DRAWS,), generator=generator)
    noise = torch.randn(2, DRAWS, 1, generator=generator)
    codes = TWO_CLASSES.codes[labels] + 0.05 * noise[1]
    if flow.two_times:
        velocity = ImageVelocity(flow, lambda y: (y, torch.zeros(DRAWS)))
        x = sampler(velocity, noise[0], codes)
    else:
        x = flow.solve_images(sampler, noise[0], codes, torch.ones(DRAWS)).x
    return ((x[:, 0] > 0).long() == labels).float().mean().item(), x, labels


def test_two_times_sample_the_right_conditionals():
    """Images given labels, labels given images, and pairs, each against the mixture's own law."""
    flow, generator = JointFlow(TWO_CLASSES), torch.Generator().manual_seed(0)
    agreement, x, labels = _agreement(flow, HEUN, generator)
    assert agreement == pytest.approx(0.977, abs=0.004)
    for k, mean in enumerate((-1.0, 1.0)):
        assert x[labels == k].mean().item() == pytest.approx(mean, abs=0.01)
        assert x[labels == k].std().item() == pytest.approx(0.5, abs=0.015)
    symmetric, _, _ = _agreement(JointFlow(TWO_CLASSES, two_times=False), HEUN, generator)
    assert symmetric < 0.9
    # a label drawn from p(k | x), not the most probable one: P(k̂ = k) = E Σ p²
    x1 = torch.full((DRAWS, 1), 0.2)
    codes = flow.solve_codes(HEUN, x1, torch.randn(DRAWS, 1, generator=generator)).x
    expected = TWO_CLASSES.posterior(x1[:1])[0, 1].item()
    assert (codes > 0).float().mean().item() == pytest.approx(expected, abs=0.007)
    x, y = flow.solve_pairs(HEUN, *torch.randn(2, DRAWS, 1, generator=generator))
    assert ((x > 0) == (y > 0)).float().mean().item() == pytest.approx(0.977, abs=0.004)
    assert (y > 0).float().mean().item() == pytest.approx(0.5, abs=0.008)


def test_guidance_of_the_symmetric_flow_extrapolates_the_images_velocity_alone():
    mixture = ClassMixture(torch.eye(2).double(), OneHot(2).table.double(), 0.5, 0.1)
    flow = JointFlow(mixture, two_times=False)
    state, t = torch.randn(7, 4).double(), torch.rand(7).double()
    x, y = unpack(state, 2, 2)
    plain, null = mixture(state, t), mixture(torch.cat([x, torch.zeros_like(y)], 1), t)
    field = JointField(flow, 2, 2, scale=2.5)
    guided = field(state, t, torch.ones(7))
    torch.testing.assert_close(guided[:, :2], null[:, :2] + 2.5 * (plain - null)[:, :2])
    torch.testing.assert_close(guided[:, 2:], plain[:, 2:])
    assert field.rows == 14
    # an unknown label stays zero on its way
    unknown = JointField(flow, 2, 2)(torch.cat([x, 0 * y], 1), t, torch.zeros(7))
    assert torch.equal(unknown[:, 2:], torch.zeros(7, 2).double())


# --- solves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 7, 25])
def test_every_grid_ends_exactly_and_calls_are_counted(steps):
    seen = []

    def network(state, t):
        seen.append(t[0].tolist())
        return torch.ones_like(state)

    x, y = torch.zeros(3, 1), torch.zeros(3, 1)
    for two_times in (False, True):
        seen.clear()
        solution = JointFlow(network, two_times).solve_codes(ODESampler(steps), x, y)
        assert len(seen) == solution.nfe == steps
        assert solution.rows == 3 * steps
        assert seen[0] == ([1.0, 1.0] if two_times else 1.0)
        torch.testing.assert_close(solution.x, torch.full((3, 1), -1.0), atol=1e-6, rtol=0)
    seen.clear()
    x, y = JointFlow(network).solve_pairs(ODESampler(steps), x, y)
    assert seen[0] == [0.0, 1.0]
    torch.testing.assert_close(torch.cat([x, y], 1), torch.tensor([[1.0, -1.0]] * 3))


@pytest.mark.parametrize("two_times", [False, True])
def test_the_path_of_codes_is_that_of_the_codes_alone(two_times):
    """At velocity 1 codes go from their noise at 1 to noise − 1 at 0, for classes and for masks."""
    flow, x1 = (
        JointFlow(lambda state, t: torch.ones_like(state), two_times),
        torch.zeros(2, 1, 3, 3),
    )
    for noise in (torch.randn(2, 4), torch.randn(2, 4, 3, 3)):
        solution = flow.solve_codes(ODESampler(4), x1, noise, return_path=True)
        gone = torch.arange(5).reshape(5, *(1,) * noise.ndim) / 4
        torch.testing.assert_close(solution.path, noise - gone)
        assert torch.equal(solution.path[-1], solution.x)
        assert flow.solve_codes(ODESampler(4), x1, noise).path is None


def test_there_and_back_returns_to_the_start():
    field = JointField(JointFlow(GaussianPair(0.8), two_times=False), 1, 2)
    start = torch.randn(20, 2).double()
    there = ODESampler(50, "rk4").solve(field, start).x
    back = ODESampler(50, "rk4").invert(field, there).x
    assert (there - start).abs().max() > 0.5
    torch.testing.assert_close(back, start, atol=1e-6, rtol=0)


def test_the_times_of_each_solve():
    network = Recorder()
    flow = JointFlow(network)
    velocity = ImageVelocity(flow, lambda cond: (cond, torch.tensor([False, True])))
    ODESampler(2)(velocity, torch.zeros(2, 1), torch.ones(2, 1))
    assert [t.tolist() for _, t in network.calls] == [[[0, 0], [0, 1]], [[0.5, 0], [0.5, 1]]]
    network.calls.clear()
    flow.solve_codes(ODESampler(2), torch.zeros(1, 1), torch.ones(1, 1))
    assert [t.tolist() for _, t in network.calls] == [[[1, 1]], [[1, 0.5]]]
