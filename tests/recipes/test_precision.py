"""What makes training faster or smaller changes its results by round-off only."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from flowkit.flowopt import FlowOpt
from flowkit.modules import load_run
from flowkit.nn import DiT, ResidualMLP, unet2d
from flowkit.nn.dit import DiTBlock
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.train import train
from flowkit.sampling import ODESampler
from tests.recipes.conftest import TINY
from tests.recipes.test_train import _losses


def stir(net):
    """Give every parameter a random part, so that no zero start hides a path."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def output_and_gradients(net):
    torch.manual_seed(2)
    v = net(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 5]))
    v.square().sum().backward()
    return {"v": v.detach(), **{name: p.grad for name, p in net.named_parameters()}}


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    calls, forward = [], DiTBlock.forward
    monkeypatch.setattr(DiTBlock, "forward", lambda *args: calls.append(1) or forward(*args))
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        options = {"width": 32, "depth": 3, "heads": 2, "num_classes": 5}
        net = stir(DiT((1, 8, 8), **options, gradient_checkpointing=again))
        found[again] = output_and_gradients(net)
        assert len(calls) == (6 if again else 3)
        calls.clear()
        with torch.no_grad():
            net(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        assert len(calls) == 3
        calls.clear()
    for name, value in found[False].items():
        assert_close(found[True][name], value, rtol=1e-6, atol=1e-7)


def test_channels_last_changes_round_off_only():
    found = []
    for last in (False, True):
        torch.manual_seed(0)
        net = stir(unet2d((1, 8, 8), num_classes=5, width=8, channels_last=last))
        found.append(output_and_gradients(net))
    # Gradients of biases that a norm takes out are round-off alone.
    scale = max(value.abs().max().item() for value in found[0].values())
    for name, value in found[0].items():
        assert_close(found[1][name], value, rtol=1e-4, atol=1e-6 * scale)


def test_fused_adamw_makes_the_same_steps():
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = stir(ResidualMLP((1, 8, 8), width=16, depth=1, num_classes=5))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            output_and_gradients(net)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    # A step is of the size of the rate, whatever the gradient: round-off in tiny ones shows.
    assert_close(weights[1], weights[0], rtol=0, atol=1e-5)


def run(configure, folder, *options):
    common = [*TINY, "trainer.log_every_n_steps=1", f"run_dir={folder}"]
    train(configure("train", *common, *options))
    return torch.tensor([loss for _, loss in _losses(folder)])


def test_mixed_precision_follows_full_precision(configure, tmp_path, monkeypatch):
    """Losses of 20 steps agree within 1 % each; times and weights stay in float32."""
    exact = run(configure, tmp_path / "exact")
    seen, forward = set(), ResidualMLP.forward

    def spy(net, x, t, cond=None):
        v = forward(net, x, t, cond)
        if net.training:
            seen.add((t.dtype, v.dtype))
        return v

    monkeypatch.setattr(ResidualMLP, "forward", spy)
    mixed = run(configure, tmp_path / "mixed", "trainer.precision=bf16-mixed")
    assert seen == {(torch.float32, torch.bfloat16)}
    assert not mixed.equal(exact)
    assert_close(mixed, exact, rtol=1e-2, atol=0)
    weights = load_run(tmp_path / "mixed").state_dict().values()
    assert {w.dtype for w in weights if w.is_floating_point()} == {torch.float32}


def test_latents_of_flowopt_stay_in_float32(tiny_run):
    """A network in half precision is inverted in float32."""
    net = load_run(tiny_run).velocity.to(torch.bfloat16)
    seen = set()

    def velocity(x, t, cond=None):
        seen.add((x.dtype, t.dtype))
        return net(x, t, torch.full((len(x),), 3))

    x1 = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        edit = FlowOpt(ODESampler(3), step_size=0.1, num_iters=2)(velocity, x1)
    assert seen == {(torch.bfloat16, torch.float32)}
    assert edit.z.dtype == torch.float32
    assert not edit.z.equal(edit.z.bfloat16().float())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of names it still uses
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_it_is(configure, tmp_path):
    """Losses of 20 steps, two validations and their pictures among them, agree within 1e-4."""
    eager = run(configure, tmp_path / "eager")
    compiled = run(configure, tmp_path / "compiled", "compile=true")
    assert_close(compiled, eager, rtol=1e-4, atol=0)
    a, b = (load_run(tmp_path / name).state_dict() for name in ("eager", "compiled"))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_close(b[name], value, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("data", ["digits", pytest.param("toy", marks=pytest.mark.slow)])
def test_a_run_in_half_precision_is_drawn_and_evaluated(configure, tmp_path, data):
    """Pictures in training, samples and metrics are those of a run in float32, up to round-off."""
    options, name = {
        "digits": (["metric=pixels", "num_samples=100"], "frechet_distance"),
        "toy": (["num_samples=300"], "w2"),
    }[data]
    parts = [] if data == "digits" else ["data=toy", "model=mlp"]
    metrics = {}
    for precision in ("32-true", "bf16-true", "64-true"):
        folder = tmp_path / precision
        losses = run(configure, folder, *parts, f"trainer.precision={precision}")
        assert losses.isfinite().all()
        assert (folder / "samples" / "step-000020.png").is_file()
        metrics[precision] = evaluate(configure("evaluate", f"run={folder}", *options))["metrics"]
    exact = metrics["32-true"][name]
    assert metrics["bf16-true"][name] == pytest.approx(exact, rel=0.05)
    assert metrics["64-true"][name] == pytest.approx(exact, rel=0.1)  # other noise in training
