"""A pipeline as a velocity generates what the pipeline itself generates."""

import copy

import pytest
import torch

from flowkit.adapters import DiffusersPipelineFlow
from flowkit.adapters.published import (
    FLUX_EDITING,
    FLUX_INVERSION,
    SD3_EDITING,
    SD3_INVERSION,
)
from flowkit.flowopt import FlowOpt, step_bound
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.velocity import Velocity
from tests.adapters import tiny_pipelines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the libraries' own making

NOISE = seeded_noise((4, 8, 8), [0, 1])  # latents of 64x64 pixels


@pytest.fixture(scope="module")
def sd3():
    return tiny_pipelines.stable_diffusion_3()


@pytest.fixture(scope="module")
def flux():
    return tiny_pipelines.flux()


def pack(x):
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpack(x, h=8, w=8):
    b, _, c = x.shape
    x = x.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, h, w)


def generated(flow, cond, num_steps, noise=NOISE):
    return ODESampler(flow.grid(num_steps, noise))(flow, noise, cond)


# --- the pipelines' own results --------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("shifting", [{}, {"use_dynamic_shifting": True, "max_shift": 1.15}])
def test_stable_diffusion_3_generates_what_its_pipeline_does(guidance, shifting):
    pipeline = tiny_pipelines.stable_diffusion_3(**shifting)
    prompts = ["a cat", "a dog on the beach"]
    expected = pipeline(
        prompts,
        negative_prompt=["bad", "bad"],
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=NOISE.clone(),
        height=64,
        width=64,
        output_type="latent",
    ).images
    flow = DiffusersPipelineFlow(pipeline)
    cond = flow.encode_prompt(prompts, guidance, negative_prompt="bad")
    with torch.no_grad():
        ours = generated(flow, cond, 6)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    assert (ours - NOISE).abs().max() > 0.1


def test_stable_diffusion_3_with_its_third_encoder():
    pipeline = tiny_pipelines.stable_diffusion_3(with_t5=True)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    expected = pipeline("a cat", latents=NOISE[:1], height=64, width=64, **options).images
    flow = DiffusersPipelineFlow(pipeline)
    with torch.no_grad():
        ours = generated(flow, flow.encode_prompt("a cat", 2.0), 3, NOISE[:1])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
@pytest.mark.parametrize("embeds", [True, False])
def test_flux_generates_what_its_pipeline_does(true_cfg, embeds):
    pipeline = tiny_pipelines.flux(embeds)
    prompts, guidance = ["a cat", "a dog on the beach"], 3.5 if embeds else 1.0
    expected = pipeline(
        prompts,
        negative_prompt=["bad", "bad"],
        true_cfg_scale=true_cfg,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=pack(NOISE),
        height=64,
        width=64,
        output_type="latent",
    ).images
    flow = DiffusersPipelineFlow(pipeline)
    cond = flow.encode_prompt(prompts, guidance, negative_prompt="bad", true_cfg_scale=true_cfg)
    with torch.no_grad():
        ours = generated(flow, cond, 6)
    torch.testing.assert_close(ours, unpack(expected), rtol=1e-4, atol=2e-5)
    assert (ours - NOISE).abs().max() > 0.1


def test_oblong_images_and_images_as_pipelines_give_them(flux):
    noise = seeded_noise((4, 4, 12), [3])
    images = flux(
        "a cat",
        num_inference_steps=3,
        guidance_scale=3.5,
        latents=pack(noise),
        height=32,
        width=96,
        output_type="pt",
    ).images
    flow = DiffusersPipelineFlow(flux)
    with torch.no_grad():
        ours = flow.decode(generated(flow, flow.encode_prompt("a cat", 3.5), 3, noise))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_follows_the_pipeline(dtype):
    pipeline = tiny_pipelines.flux().to(dtype)
    options = {"num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "latent"}
    noise = NOISE[:1].to(dtype)
    expected = pipeline("a cat", latents=pack(noise), height=64, width=64, **options).images
    flow = DiffusersPipelineFlow(pipeline)
    with torch.no_grad():
        ours = generated(flow, flow.encode_prompt("a cat", 3.5), 4, noise)
    torch.testing.assert_close(ours, unpack(expected), rtol=0.02, atol=0.05)


# --- times ------------------------------------------------------------------------------------


def test_grids_are_the_schedulers_and_know_the_resolution(sd3, flux):
    for pipeline in (sd3, flux):
        flow = DiffusersPipelineFlow(pipeline)
        grid = flow.grid(10, NOISE)
        assert grid.dtype == torch.float64
        assert len(grid) == 11
        assert (grid[0], grid[-1]) == (0, 1)
        assert grid[1] < 0.1, "small steps near the noise"
    large = DiffusersPipelineFlow(flux).grid(10, torch.zeros(1, 4, 32, 32))
    small = DiffusersPipelineFlow(flux).grid(10, torch.zeros(1, 4, 4, 4))
    # exp(mu) of the two resolutions: 256 tokens lie beyond, 4 at the low end of the scale
    sigma = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    for grid, tokens in ((large, 256), (small, 4)):
        mu = 0.5 + (tokens - 4) / 60 * 0.65
        shifted = torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + 1 / sigma - 1)
        torch.testing.assert_close(grid[:-1], 1 - shifted.double(), rtol=0, atol=1e-6)


def test_the_pipelines_scheduler_is_left_alone(sd3):
    before = copy.deepcopy(sd3.scheduler.__dict__)
    DiffusersPipelineFlow(sd3).grid(7, NOISE)
    assert torch.equal(sd3.scheduler.sigmas, before["sigmas"])


# --- images and prompts --------------------------------------------------------------------------


def test_encode_shifts_and_scales_and_decode_undoes_it(sd3):
    flow, images = DiffusersPipelineFlow(sd3), torch.rand(2, 3, 64, 64) * 2 - 1
    latents = flow.encode(images)
    assert latents.shape == (2, 4, 8, 8)
    with torch.no_grad():
        mode = sd3.vae.encode(images).latent_dist.mode()
        expected = sd3.vae.decode(mode).sample
    torch.testing.assert_close(latents, (mode - 0.06) * 1.5)
    torch.testing.assert_close(flow.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_one_prompt_serves_a_batch_and_samples_do_not_mix(sd3, flux):
    for pipeline in (sd3, flux):
        flow = DiffusersPipelineFlow(pipeline)
        options = {"true_cfg_scale": 2.0} if pipeline is flux else {}
        t = torch.tensor([0.2, 0.7])
        one = flow.encode_prompt("a cat", 3.0, **options)
        two = flow.encode_prompt(["a cat", "a dog"], 3.0, **options)
        with torch.no_grad():
            v, w = flow(NOISE, t, one), flow(NOISE, t, two)
            torch.testing.assert_close(v[:1], w[:1], rtol=1e-4, atol=1e-5)
            assert (v[1] - w[1]).abs().max() > 1e-4
            torch.testing.assert_close(flow(NOISE[1:], t[1:], one), v[1:], rtol=1e-4, atol=1e-5)


def test_guidance_reaches_the_network(sd3, flux):
    t = torch.full((2,), 0.5)
    for pipeline in (sd3, flux):
        flow = DiffusersPipelineFlow(pipeline)
        assert isinstance(flow, Velocity)
        with torch.no_grad():
            plain, guided = (
                flow(NOISE, t, flow.encode_prompt("a cat", scale)) for scale in (1.0, 5.0)
            )
        assert (plain - guided).abs().max() > 1e-5


# --- editing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_published_settings_edit_with_the_published_count(name, request):
    pipeline = request.getfixturevalue(name)
    flow = DiffusersPipelineFlow(pipeline)
    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["timestep"])), with_kwargs=True
    )
    x1 = flow.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    for published, nfe in ((flow.editing, {"sd3": 121, "flux": 131}[name]), (flow.inversion, 321)):
        calls.clear()
        sampler = ODESampler(flow.grid(published.num_steps, x1)[-published.num_kept - 1 :])
        flowopt = FlowOpt(sampler, published.step_size, published.num_iters, backtrack=False)
        source = flow.encode_prompt("a cat", published.source_guidance)
        target = flow.encode_prompt("a dog", published.target_guidance)
        edit = flowopt(flow, x1, source, target if published is flow.editing else None)
        assert edit.nfe == len(calls) == published.nfe == nfe
        kept = published.num_kept
        doubled = (published.num_iters + 1) * kept if name == "sd3" and nfe != 321 else 0
        assert sum(calls) == nfe + doubled
        assert (edit.residuals[-1] < edit.residuals[0]).all()
    hook.remove()


def test_published_values():
    assert (SD3_EDITING.num_steps, SD3_EDITING.num_kept, SD3_EDITING.step_size) == (15, 12, 0.01)
    assert (FLUX_EDITING.num_steps, FLUX_EDITING.num_kept) == (15, 13)
    assert FLUX_EDITING.step_size == FLUX_INVERSION.step_size == 0.0025
    assert SD3_INVERSION.step_size == 0.01
    guidance = {(p.source_guidance, p.target_guidance) for p in (SD3_EDITING, FLUX_EDITING)}
    assert guidance == {(1.0, 3.5)}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_automatic_steps_work_on_a_pipeline(name, request):
    flow = DiffusersPipelineFlow(request.getfixturevalue(name))
    x1 = flow.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    sampler, cond = ODESampler(flow.grid(4, x1)), flow.encode_prompt("a cat")
    assert (step_bound(flow, sampler, x1, cond).bound > 0.1).all()
    edit = FlowOpt(sampler, num_iters=5)(flow, x1, cond, flow.encode_prompt("a dog", 3.0))
    assert (edit.residuals[-1] < 0.2 * edit.residuals[0]).all()


# --- refusals ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(sd3, flux):
    from diffusers import DDIMScheduler

    with pytest.raises(TypeError, match=r"pipeline must be a StableDiffusion3Pipeline or .* str"):
        DiffusersPipelineFlow("pipeline")
    other = copy.copy(sd3)
    other.scheduler = DDIMScheduler()
    with pytest.raises(TypeError, match=r"scheduler must be a FlowMatchEuler.* got DDIMScheduler"):
        DiffusersPipelineFlow(other)
    flow = DiffusersPipelineFlow(sd3)
    for shape in ((1, 3, 64, 60), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must have shape .* divisible by 16, got"):
            flow.encode(torch.zeros(shape))
    with pytest.raises(TypeError, match="cond must be made by encode_prompt, got NoneType"):
        flow(NOISE, torch.zeros(2))
    with pytest.raises(ValueError, match="true_cfg_scale must be 1 for Stable Diffusion 3, got 2"):
        flow.encode_prompt("a cat", true_cfg_scale=2.0)
    schnell = DiffusersPipelineFlow(tiny_pipelines.flux(False))
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 for a FLUX without .* got 3.5"):
        schnell.encode_prompt("a cat", 3.5)
    for pipeline, options in ((sd3, {}), (sd3, {"guidance_scale": 2.0}), (flux, {})):
        other = DiffusersPipelineFlow(pipeline)
        cond = other.encode_prompt(["a cat", "a dog", "a cow"], **options)
        message = r"one row for all samples, or one for each of 2 samples, got .* shape \(3,"
        with pytest.raises(ValueError, match=message):
            other(NOISE, torch.zeros(2), cond)
    with pytest.raises(ValueError, match="number of prompts must be at least 1"):
        flow.encode_prompt([])
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        flow.grid(0, NOISE)
