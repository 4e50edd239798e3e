"""Grids as noise levels of diffusers' scheduler, and a whole pipeline on an optimized grid."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from flowkit import boss, grids
from flowkit.adapters import to_sigmas
from flowkit.sampling import ODESampler


@given(
    inner=st.sets(st.integers(1, 999), max_size=20),
    shift=st.floats(0.2, 10),
    start=st.sampled_from([0.0, 0.0005]),
)
def test_the_scheduler_steps_on_the_grid(inner, shift, start):
    grid = torch.tensor([start, *sorted(k / 1000 for k in inner), 1.0], dtype=torch.float64)
    fixed = FlowMatchEulerDiscreteScheduler(shift=shift)
    fixed.set_timesteps(sigmas=to_sigmas(grid, shift))
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=to_sigmas(grid, shift), mu=math.log(shift))
    for scheduler in (fixed, dynamic):
        torch.testing.assert_close(
            1 - scheduler.sigmas.double(), grid, rtol=0, atol=2e-6, check_dtype=False
        )
        assert len(scheduler.timesteps) == len(grid) - 1


def test_a_grid_that_stops_early_is_refused():
    with pytest.raises(ValueError, match=r"grid must end at 1, got 0.8; the scheduler's last"):
        to_sigmas([0.0, 0.8])
    with pytest.raises(ValueError, match="shift must be positive and finite, got 0"):
        to_sigmas(4, shift=0)


def tiny_pipeline(shift):
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_pipeline_follows_an_optimized_grid(shift):
    pipeline = tiny_pipeline(shift)
    prompt = {
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
    }

    def velocity(x, t, cond):
        cond = {name: value.expand(len(x), *value.shape[1:]) for name, value in cond.items()}
        return -20 * pipeline.transformer(x, timestep=1000 * (1 - t), **cond).sample

    forward = pipeline.transformer.forward
    x0 = torch.randn(12, 4, 8, 8)
    cond = {name: value.expand(12, *value.shape[1:]) for name, value in prompt.items()}
    grid = boss.endpoint_grid(velocity, x0[:8], 16, 4, {name: v[:8] for name, v in cond.items()})
    assert (grid - grids.uniform(4)).abs().max() > 0.01
    ours = ODESampler(grid).solve(velocity, x0[:1], prompt, return_path=True).path

    # twenty times a new network's output, so that the path is worth comparing
    def louder(*args, **options):
        out = forward(*args, **options)
        return tuple(20 * o for o in out) if isinstance(out, tuple) else out

    pipeline.transformer.forward = louder
    states = []
    result = pipeline(
        prompt_embeds=prompt["encoder_hidden_states"],
        pooled_prompt_embeds=prompt["pooled_projections"],
        guidance_scale=1.0,
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        sigmas=to_sigmas(grid, pipeline.scheduler.config.shift),
        num_inference_steps=4,
        latents=x0[:1].clone(),
        output_type="latent",
        callback_on_step_end=lambda _, step, t, kept: states.append(kept["latents"].clone()) or {},
    )
    assert len(states) == 4
    assert (ours[-1] - ours[0]).std() > 0.5
    torch.testing.assert_close(torch.stack(states), ours[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.images, ours[-1], rtol=1e-4, atol=1e-4)
