"""The search for the grid of a diffusers pipeline."""

import json
import shutil

import pytest
import torch

from flowkit import boss as library
from flowkit import grids
from flowkit.adapters import DiffusersPipelineFlow
from flowkit.recipes.boss import boss
from flowkit.runs.searching import Watched
from flowkit.sampling import ODESampler, seeded_noise
from tests.adapters import tiny_pipelines
from tests.adapters.test_pipelines import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SEARCH = ["budgets=[2]", "num_steps=3", "fine_steps=5", "start=16", "limit=16", "search_noises=6",
          "extra_noises=4", "fresh_noises=3", "adaptive=[]", "height=32", "width=32"]  # fmt: skip
MAKE = {
    "sd3": tiny_pipelines.stable_diffusion_3,
    "shifting": lambda: tiny_pipelines.stable_diffusion_3(use_dynamic_shifting=True),
    "flux": tiny_pipelines.flux,
}
OPTIONS = {
    "sd3": ["prompt=[a cat,a dog]", "negative_prompt=bad", "guidance=4", "batch_size=5"],
    "shifting": ["prompt=a cat", "guidance=1"],
    "flux": ["prompt=a cat", "true_cfg_scale=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    MAKE["sd3"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sd3", "shifting", pytest.param("flux", marks=pytest.mark.slow)])
def test_the_pipeline_steps_on_the_grid(name, configure, tmp_path, capsys):
    pipeline = MAKE[name]()
    pipeline.save_pretrained(tmp_path)
    record = boss(configure("boss", f"pipeline={tmp_path}", *OPTIONS[name], *SEARCH))
    out, noise = tmp_path / "boss", seeded_noise((4, 4, 4), [7])
    assert f"sigmas    {out / 'sigmas.json'}" in capsys.readouterr().out

    flow = DiffusersPipelineFlow(pipeline)
    guidance = {"guidance_scale": {"sd3": 4.0, "shifting": 1.0, "flux": 3.5}[name]}
    guidance |= {"sd3": {"negative_prompt": "bad"}, "flux": {"true_cfg_scale": 2.0}}.get(name, {})
    cond = flow.encode_prompt("a cat", **guidance)
    for file, steps in (("sigmas.json", 3), ("sigmas-2.json", 2)):
        arguments = json.loads((out / file).read_text())
        latents = pack(noise) if name == "flux" else noise
        drawn = pipeline("a cat", latents=latents, output_type="latent", **arguments).images
        grid = grids.load(out / file.replace("sigmas", "grid"))
        assert len(grid) == steps + 1
        with torch.no_grad():
            expected = ODESampler(grid)(flow, noise, cond)
        drawn = unpack(drawn, 4, 4) if name == "flux" else drawn
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=2e-5)

    prompts = ["a cat", "a dog"] if name == "sd3" else ["a cat"]
    assert record["prompts"] == prompts
    x0 = seeded_noise((4, 4, 4), range(1_000_000, 1_000_003))
    three = {
        kind: torch.tensor(grid, dtype=torch.float64) for kind, grid in record["grids"].items()
    }
    torch.testing.assert_close(three["baseline"], flow.grid(3, noise))
    cond = flow.encode_prompt((prompts * 3)[:3], **guidance)
    accurate = ODESampler(flow.grid(25, noise), "rk4")
    expected = library.score_grids(flow, x0, three, cond, reference=accurate)
    made = {row["grid"]: row["error"] for row in record["comparison"] if row["steps"] == 3}
    assert made == pytest.approx(expected, rel=1e-3)


def test_what_does_not_fit_is_refused(folder, tiny_run, configure, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    small = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = UNet2DModel(8, block_out_channels=(8,), norm_num_groups=4, **small)
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    shutil.copytree(folder, tmp_path / "part", ignore=shutil.ignore_patterns("transformer"))
    karras = tmp_path / "karras"
    shutil.copytree(folder, karras)
    scheduler = karras / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "use_karras_sigmas": True}))
    cat = [f"pipeline={folder}", "prompt=a cat"]
    for options, message in (
        (["prompt=a cat"], "run or pipeline must be given, but not both, got None and None"),
        ([f"run={tiny_run}", *cat], "run or pipeline must be given, but not both"),
        ([f"run={tiny_run}", "prompt=a cat"], "prompt must be null without pipeline=, got a cat"),
        ([f"run={tiny_run}"], "height must be null without pipeline=, got 32"),
        ([f"pipeline={folder}"], "prompt must be given for a pipeline, got None"),
        ([f"pipeline={tmp_path}", "prompt=a cat"], "a folder written by save_pretrained, got"),
        ([f"pipeline={tmp_path}/part", "prompt=a cat"], "must be a whole folder written by save_"),
        ([f"pipeline={tmp_path}/ddpm", "prompt=a cat"], "pipeline must be a Stable.* got DDPMPipe"),
        ([f"pipeline={karras}", "prompt=a cat"], "must take the noise levels that it is given"),
        ([*cat, "method=heun"], "method must be euler for a pipeline, got heun"),
        ([*cat, "metric=pixels"], "metric must be null for a pipeline, got flowkit.runs.pixel_f"),
        ([*cat, "height=40"], "height must be divisible by 16, got 40"),
        ([*cat, "guidance=1", "negative_prompt=bad"], "negative_prompt must be null without guid"),
    ):
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            boss(configure("boss", *SEARCH, *options))


def test_batches_of_the_network_change_nothing():
    pipeline = MAKE["sd3"]()
    calls = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["timestep"])), with_kwargs=True
    )
    x, t = seeded_noise((4, 4, 4), range(5)), torch.linspace(0.1, 0.9, 5)
    whole, parts = (DiffusersPipelineFlow(pipeline, size) for size in (None, 2))
    for prompts in ("a cat", [f"a {word}" for word in "abcde"]):
        cond = whole.encode_prompt(prompts, 4.0)
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(parts(x, t, cond), whole(x, t, cond), rtol=1e-4, atol=1e-5)
        assert calls == [4, 4, 2, 10]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DiffusersPipelineFlow(pipeline, 0)


def test_a_bar_moves_by_the_samples_of_evaluations():
    class Bar:
        def __init__(self):
            self.n = 0

        def update(self, count):
            self.n += count

    def field(x, t, cond):
        return -x

    bar, x0 = Bar(), torch.randn(24, 2)
    costs = library.step_costs(Watched(field, bar), x0, 10)
    assert torch.equal(costs, library.step_costs(field, x0, 10))
    assert bar.n == 24 * 10
    bar.n = 0
    library.optimize_grid(Watched(field, bar), x0, 3, fine_steps=10, extra_noises=16)
    most = library.search_rows(24, 3, fine_steps=10, extra_noises=16)
    assert most["costs"] + most["scores"] < bar.n <= sum(most.values())
