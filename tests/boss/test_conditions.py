"""Conditions of diffusers pipelines: one prompt for all samples, one per sample, guidance."""

from functools import partial

import pytest
import torch

from flowkit import boss
from flowkit.adapters import DiffusersPipelineFlow
from flowkit.sampling import ODESampler, seeded_noise
from tests.adapters import tiny_pipelines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the libraries' own making

NOISE = seeded_noise((4, 8, 8), range(12))
FINE = torch.tensor([0, 0.05, 0.15, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def flows():
    pipelines = {"sd3": tiny_pipelines.stable_diffusion_3(), "flux": tiny_pipelines.flux()}
    return {name: DiffusersPipelineFlow(pipeline) for name, pipeline in pipelines.items()}


def conditions(flow, kind):
    """Return a function from prompts to conditions, of few tokens so that tests are short."""
    options = {"sd3": (1.0, {}), "sd3 guided": (4.0, {"negative_prompt": "bad"})}
    options["flux"] = (3.5, {"true_cfg_scale": 2.0, "negative_prompt": "bad"})
    scale, more = options[kind]

    def encode(prompts):
        cond = flow.encode_prompt(prompts, scale, **more)
        return {name: value[:, :6] if value.ndim == 3 else value for name, value in cond.items()}

    return encode


@pytest.mark.parametrize("kind", ["sd3", "sd3 guided", "flux"])
def test_one_prompt_serves_all_samples(flows, kind):
    flow = flows[kind.split()[0]]
    encode = conditions(flow, kind)
    one, repeated = encode("a cat"), encode(["a cat"] * 12)
    for method, size in (("euler", 12), ("euler", 5), ("heun", 5)):
        found, expected = (
            boss.step_costs(flow, NOISE, FINE, cond, method=method, chunk_size=chunk)
            for cond, chunk in ((one, size), (repeated, 7))
        )
        torch.testing.assert_close(found, expected, **NEAR)
    options = {"fine_steps": FINE, "extra_noises": 16}
    found, expected = (boss.optimize_grid(flow, NOISE, 3, c, **options) for c in (one, repeated))
    assert found.winner == expected.winner
    assert found.scores == pytest.approx(expected.scores, rel=1e-3)
    for name, grid in found.grids.items():
        assert torch.equal(grid, expected.grids[name])
    made, wanted = (boss.segments(flow, NOISE, 6, 2, cond) for cond in (one, repeated))
    torch.testing.assert_close(made, wanted, **NEAR)


@pytest.mark.parametrize("kind", ["sd3 guided", "flux"])
def test_each_sample_keeps_its_own_prompt(flows, kind):
    flow = flows[kind.split()[0]]
    encode, words = conditions(flow, kind), [f"a {word}" for word in "abcdef"]
    x0 = NOISE[:1].expand(6, -1, -1, -1)
    costs = boss.step_costs(flow, x0, FINE, encode(words), groups=6, chunk_size=4)
    alone = [boss.step_costs(flow, x0[:1], FINE, encode(word)) for word in words]
    torch.testing.assert_close(costs, torch.stack(alone), **NEAR)
    assert (costs[0, 0, -1] / costs[1:, 0, -1] - 1).abs().min() > 1e-4  # the prompts differ


def test_guidance_of_two_rows_is_that_of_two_networks(flows):
    pipeline = flows["sd3"].pipeline
    with torch.no_grad():
        embeds, null, pooled, null_pooled = pipeline.encode_prompt(
            "a cat", None, None, negative_prompt="bad"
        )

    def by_hand(x, t, cond=None):
        v, v_null = (
            -pipeline.transformer(
                x,
                timestep=1000 * (1 - t),
                encoder_hidden_states=words.expand(len(x), -1, -1),
                pooled_projections=pool.expand(len(x), -1),
            ).sample
            for words, pool in ((embeds[:, :6], pooled), (null[:, :6], null_pooled))
        )
        return v_null + 4 * (v - v_null)

    flow, cond = flows["sd3"], conditions(flows["sd3"], "sd3 guided")("a cat")
    found = boss.step_costs(flow, NOISE, FINE, cond, chunk_size=5)
    torch.testing.assert_close(found, boss.step_costs(by_hand, NOISE, FINE), **NEAR)
    grids = {"even": torch.linspace(0, 1, 4), "late": torch.tensor([0, 0.6, 1.0])}
    options = {"reference": ODESampler(8, "heun")}
    found = boss.score_grids(flow, NOISE, grids, cond, **options)
    assert found == pytest.approx(boss.score_grids(by_hand, NOISE, grids, **options), rel=1e-3)


def test_labels_of_one_row_are_for_all_samples():
    def velocity(x, t, cond):
        return cond[:, None] * (t[:, None] - x)

    x0 = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    one, ten = torch.tensor([2.0]), torch.full((10,), 2.0)
    found, expected = (boss.step_costs(velocity, x0, FINE, c, chunk_size=4) for c in (one, ten))
    assert torch.equal(found, expected)
    grid, expected = (boss.endpoint_grid(velocity, x0, 20, 3, c) for c in (one, ten))
    assert torch.equal(grid, expected)
    for call in (boss.step_costs, boss.segments, partial(boss.optimize_grid, fine_steps=8)):
        args = (4,) if call is not boss.segments else (4, 2)
        with pytest.raises(ValueError, match=r"one for each of 10 samples, got .* shape \(3,\)"):
            call(velocity, x0, *args, torch.ones(3))
        with pytest.raises(TypeError, match="cond must be a tensor, a mapping of tensors or None"):
            call(velocity, x0, *args, [1.0] * 10)
