"""Networks of other conventions: exact predictions give the exact velocity, in diffusers' words."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from flowkit.adapters import (
    from_data_prediction,
    from_noise_prediction,
    from_reversed_time,
    to_sigmas,
)
from flowkit.exact import GaussianFlow
from flowkit.flowopt import FlowOpt
from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear
from flowkit.sampling import ODESampler
from flowkit.velocity import Velocity

PATHS = [Linear(), Linear(sigma_min=0.1), Cosine(), VP(), Affine(lambda t: t**2, lambda t: 1 - t)]
MEAN, STD = 1.5, 0.5


def predictions(path):
    """E[x0 | x_t] and E[x1 | x_t] of N(MEAN, STD²) by conditioning a Gaussian."""

    def gaussian(x, t):
        a, b, _, _ = path.coefficients(t[:, None])
        return (x - a * MEAN) / (a**2 * STD**2 + b**2), a, b

    def noise(x, t, cond=None):
        deviation, _, b = gaussian(x, t)
        return b * deviation

    def clean(x, t, cond=None):
        deviation, a, _ = gaussian(x, t)
        return MEAN + a * STD**2 * deviation

    return noise, clean


def marginal_velocity(path, x, t):
    """Of a Gaussian path: the mean's derivative, and the logarithmic one of the width."""
    a, b, da, db = path.coefficients(t[:, None])
    slope = (a * da * STD**2 + b * db) / (a**2 * STD**2 + b**2)
    return da * MEAN + slope * (x - a * MEAN)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_exact_predictions_give_the_exact_velocity(path):
    x, t = torch.randn(50, 3).double(), torch.rand(50).double() * 0.98 + 0.01
    noise, clean = predictions(path)
    expected = marginal_velocity(path, x, t)
    for velocity in (from_noise_prediction(noise, path), from_data_prediction(clean, path)):
        assert isinstance(velocity, Velocity)
        torch.testing.assert_close(velocity(x, t), expected, rtol=1e-9, atol=1e-9)
    if path == Linear():
        torch.testing.assert_close(expected, GaussianFlow(MEAN, STD)(x, t))


def test_predictions_in_the_networks_own_time_and_under_conditions():
    noise, clean = predictions(Linear())
    x, t, seen = torch.randn(4, 3).double(), torch.rand(4).double() * 0.9 + 0.05, []

    def in_steps(function):
        def network(x, step, cond):
            seen.append((step, cond))
            return function(x, 1 - step / 1000)

        return network

    for adapt, function in ((from_noise_prediction, noise), (from_data_prediction, clean)):
        velocity = adapt(in_steps(function), time=lambda t: 1000 * (1 - t))
        torch.testing.assert_close(velocity(x, t, "c"), adapt(function)(x, t))
    assert all(torch.equal(step, 1000 * (1 - t)) and cond == "c" for step, cond in seen)


def test_half_precision_states_keep_their_dtype():
    noise, clean = predictions(Linear())
    x, t = torch.randn(4, 3).bfloat16(), torch.full((4,), 0.5)
    for velocity in (from_noise_prediction(noise), from_data_prediction(clean)):
        assert velocity(x, t).dtype == torch.bfloat16


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("path", [*PATHS, VP(0)], ids=range(len(PATHS) + 1))
def test_a_prediction_gives_the_velocity_wherever_it_determines_it(path, t):
    """At the ends as well, and with states and times in half precision."""
    x, t = torch.randn(5, 2).half(), torch.full((5,), t).half()
    a, b, da, db = (c.item() for c in path.coefficients(t[:1].double()))
    expected = marginal_velocity(path, x.double(), t.double())
    for adapt, predict, share in zip(
        (from_noise_prediction, from_data_prediction), predictions(path), (a, b), strict=True
    ):
        velocity = adapt(lambda x, t, c, f=predict: f(x.double(), t.double()), path)
        if share == 0 or not math.isfinite(da + db):
            with pytest.raises(ValueError, match=f"t must be a time at which .* got {t[0]}"):
                velocity(x, t)
        else:
            v = velocity(x, t)
            assert v.dtype == torch.float16
            torch.testing.assert_close(v.double(), expected, rtol=2**-11, atol=1e-5)


def test_reversed_time_is_the_mirrored_flow():
    flow, seen = GaussianFlow(MEAN, STD), []

    def network(x, time, cond):  # noise - data, with noise at time 1000
        seen.append((time[0].item(), cond))
        return -flow(x, 1 - time / 1000)

    velocity, x0 = from_reversed_time(network, 1000), torch.randn(5, 3).double()
    assert isinstance(velocity, Velocity)
    cond = torch.arange(5)
    torch.testing.assert_close(ODESampler(4)(velocity, x0, cond), ODESampler(4)(flow, x0))
    assert [time for time, _ in seen] == [1000, 750, 500, 250]
    assert all(given is cond for _, given in seen)


def test_reversed_time_takes_the_steps_of_diffusers():
    torch.manual_seed(0)
    weight = torch.randn(3, 3).double()
    network = lambda x, step, cond: torch.tanh(x @ weight) * (0.5 + step[:, None] / 1000)  # noqa: E731
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=3.0), torch.randn(5, 3).double()
    grid = torch.tensor([0.0, 0.1, 0.25, 0.6, 1.0], dtype=torch.float64)
    ours = ODESampler(grid)(from_reversed_time(network, 1000), x)
    scheduler.set_timesteps(sigmas=to_sigmas(grid, 3.0))
    for step in scheduler.timesteps:
        x = scheduler.step(network(x, step.expand(5), None), step, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_predicted_noise_of_a_diffusion_model_flows_where_ddim_steps():
    """VP's continuous times are DDPM's linear steps in the limit, and so is DDIM its flow."""
    noise, _ = predictions(VP())
    x = torch.randn(20, 3, dtype=torch.float64)
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    ours = ODESampler(1000, "midpoint")(from_noise_prediction(noise, VP()), x)
    for step in scheduler.timesteps:
        t = torch.full((20,), 1 - (step.item() + 1) / 1000, dtype=torch.float64)
        x = scheduler.step(noise(x, t), step, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=0.02)
    assert (x.std() - STD).abs() < 0.1


def test_predicted_data_are_sampled_by_euler_to_the_end_and_edited_before_it():
    noise, clean = predictions(Linear())
    x0, end = torch.randn(6, 2).double(), torch.linspace(0, 0.99, 12, dtype=torch.float64)
    samples = ODESampler(10)(from_data_prediction(clean), x0)
    torch.testing.assert_close(samples, ODESampler(10)(GaussianFlow(MEAN, STD), x0))
    inversion = FlowOpt(ODESampler(end), num_iters=30)(from_data_prediction(clean), samples)
    assert (inversion.residuals[-1] < 1e-6).all()
    start = 1 - end.flip(0)
    inversion = FlowOpt(ODESampler(start), num_iters=30)(from_noise_prediction(noise), samples)
    assert (inversion.residuals[-1] < 1e-6).all()


def test_refusals():
    x, t = torch.zeros(2, 3), torch.tensor([0.5, 0.0])
    with pytest.raises(
        ValueError, match=r"t must be a time at which predicted noise .* got 0.0; start the"
    ):
        from_noise_prediction(lambda x, t, c: x)(x, t)
    for path in (Linear(), VP()):
        with pytest.raises(
            ValueError, match=r"t must be a time at which .* data .* got 1.0; end the"
        ):
            from_data_prediction(lambda x, t, c: x, path)(x, 1 - t)
    assert from_noise_prediction(lambda x, t, c: x, VP())(x, t).isfinite().all()
    with pytest.raises(ValueError, match=r"predicted noise .* got 1.0; end the grid earlier"):
        # b'(1) is unbounded, so that any error of a prediction is, too.
        from_noise_prediction(lambda x, t, c: torch.full_like(x, 1e-3), VP())(x, 1 - t)
    for adapt in (from_noise_prediction, from_data_prediction):
        for path in (Linear(sigma=0.1), BrownianBridge(0.5)):
            with pytest.raises(ValueError, match=r"path must be a x1 \+ b x0 without added noise"):
                adapt(lambda x, t, c: x, path)
    with pytest.raises(ValueError, match="time_scale must be positive and finite, got 0"):
        from_reversed_time(lambda x, t, c: x, 0)
