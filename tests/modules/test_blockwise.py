"""The Lightning module of blockwise flow matching."""

import copy
import math
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from flowkit import grids
from flowkit.blockwise import Blockwise, BlockwiseDiT, BlockwiseMLP, copies
from flowkit.blockwise.alignment import resize_tokens
from flowkit.guidance import DropCond
from flowkit.modules import BlockwiseFlowMatching, ConditionalFlowMatching
from flowkit.nn import ResidualMLP
from flowkit.sampling import ODESampler

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*no `val_dataloader`.*:UserWarning",
    "ignore:.*in eval mode at the start.*:UserWarning",
)


def tiny(**options):
    return BlockwiseMLP((2,), **{"edges": 3, "width": 16, "residual_depth": 1, **options})


def fit(module, batches, folder, **options):
    options = {"max_steps": len(batches), "log_every_n_steps": 1, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, num_workers=0))
    return trainer


def points(count, size=12):
    return [{"x1": torch.randn(size, 2)} for _ in range(count)]


class Tokens(nn.Module):
    """An encoder: four tokens of eight fixed random features."""

    width = 8

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8).requires_grad_(False)

    def forward(self, images):
        return self.linear(images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(images), 4, 16))


def tiny_dit(**options):
    sizes = {"edges": 2, "patch": 4, "width": 16, "heads": 2, "trunk_depth": 1, "stack_depth": 1}
    return BlockwiseDiT((1, 8, 8), **{**sizes, **options})


# --- stage 1 ---------------------------------------------------------------------------------


def test_alignment_trains_the_trunk_and_the_projector_alone():
    torch.manual_seed(1)
    flow = tiny_dit()
    module = BlockwiseFlowMatching(flow, Tokens(), align_weight=0.5)
    batch = {"x1": torch.randn(6, 1, 8, 8)}
    terms = module.loss(batch, torch.Generator().manual_seed(0))
    plain = BlockwiseFlowMatching(flow).loss(batch, torch.Generator().manual_seed(0))
    assert -1 <= terms["align"] <= 1
    torch.testing.assert_close(terms["flow"], plain["loss"].detach())
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.5 * terms["align"])
    # of a fresh network, whose velocity is zero, the trunk gets its gradient from the alignment
    terms["loss"].backward()
    got = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[0] for n in got} == {"projector", "velocity"}
    assert "velocity.trunk.modulation.weight" in got
    assert not any(n.startswith("velocity.stacks") for n in got)
    assert not any("encoder" in n for n in module.state_dict())


def test_alignment_stops_at_its_step_and_needs_no_encoder_at_weight_zero():
    def refuse(images):
        raise AssertionError

    module = BlockwiseFlowMatching(tiny_dit(), refuse, align_weight=0.0, encoder_width=8)
    assert "align" not in module.loss({"x1": torch.randn(6, 1, 8, 8)})
    module = BlockwiseFlowMatching(tiny_dit(), Tokens(), align_stop=0)
    assert "align" not in module.loss({"x1": torch.randn(6, 1, 8, 8)})


def test_alignment_stops_in_a_fit(tmp_path):
    seen = []

    class Watched(BlockwiseFlowMatching):
        def loss(self, batch, generator=None):
            terms = super().loss(batch, generator)
            seen.append("align" in terms)
            return terms

    batches = [{"x1": torch.randn(6, 1, 8, 8)} for _ in range(4)]
    fit(Watched(tiny_dit(), Tokens(), align_stop=2), batches, tmp_path)
    assert seen == [True, True, False, False]


def test_an_encoder_is_made_when_it_is_first_needed():
    made = []

    def make():
        made.append(1)
        return Tokens()

    module = BlockwiseFlowMatching(tiny_dit(), partial(make), encoder_width=8)
    assert not made
    for _ in range(2):
        module.loss({"x1": torch.randn(6, 1, 8, 8)})
    assert made == [1]
    with pytest.raises(ValueError, match="encoder_width must be given for an encoder"):
        BlockwiseFlowMatching(tiny_dit(), lambda x: x)


def test_tokens_of_wide_images_meet_the_features_of_their_place():
    """4x4 tokens of a 4x16 image, of which the trunk has 2x8: both are 16, and differ in place."""

    class Squares:
        sides = (4, 4)

        def __call__(self, images):
            return tokens

    tokens = torch.randn(2, 16, 8)
    flow = BlockwiseDiT((1, 4, 16), 2, 2, 16, 2, 1, 1)
    module = BlockwiseFlowMatching(flow, Squares(), encoder_width=8)
    module.projector = nn.Identity()
    images = torch.zeros(2, 1, 4, 16)
    right = resize_tokens(tokens, (4, 4), (2, 8))
    assert module._alignment(right, images).item() == pytest.approx(-1)
    assert module._alignment(tokens, images).item() > -0.9
    module.encoder = lambda images: tokens
    with pytest.raises(ValueError, match=r"must have the attribute sides.* 16 tokens of .*4, 16"):
        module._alignment(right, images)


def test_perceptrons_align_one_token():
    encoder = Tokens()
    module = BlockwiseFlowMatching(BlockwiseMLP((1, 8, 8), edges=2, width=16), encoder)
    assert "align" in module.loss({"x1": torch.randn(6, 1, 8, 8)})


def test_cached_latents_are_no_images():
    module = BlockwiseFlowMatching(tiny_dit(), Tokens())
    with pytest.raises(
        ValueError, match="batch must hold images for the encoder, got cached latents"
    ):
        module.loss({"x1": torch.randn(6, 1, 8, 8), "encoded_by": "identity"})


# --- stage 2, and stacks alone ---------------------------------------------------------------


def trained_parameters(module):
    return {n.removeprefix("velocity.") for n, p in module.named_parameters() if p.requires_grad}


def test_stage_two_trains_the_residual_alone(tmp_path):
    flow = tiny()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    for block in flow.feature_residual.blocks:
        nn.init.zeros_(block.modulation[1].weight)
        nn.init.zeros_(block.modulation[1].bias)
    before = copy.deepcopy(flow.state_dict())
    module = BlockwiseFlowMatching(flow, stage="fra", optimizer=partial(torch.optim.AdamW, lr=3e-3))
    assert all(n.startswith("feature_residual.") for n in trained_parameters(module))
    batches = points(1, 256) * 150
    assert module.loss(batches[0])["ratio"] == 1
    with pytest.warns(
        UserWarning, match="stage fra trains on the trunk as it is, since start is not given"
    ):
        fit(module, batches, tmp_path)
    assert module.loss(batches[0])["ratio"] < 0.5
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("feature_residual."), name


def test_a_stack_is_trained_alone(tmp_path):
    flow = tiny()
    before = copy.deepcopy(flow.state_dict())
    nn.init.normal_(flow.trunk.outputs.weight)
    module = BlockwiseFlowMatching(flow, segments=[1])
    assert trained_parameters(module) == {
        f"stacks.1.{n}" for n, _ in flow.stacks[1].named_parameters()
    }
    assert set(module.loss(points(1)[0])) == {"loss", "explained", "segment_1"}
    fit(module, points(3), tmp_path)
    changed = {n for n, v in flow.state_dict().items() if not torch.equal(v, before[n])}
    assert {n.rsplit(".", 3)[0] for n in changed - {"trunk.outputs.weight"}} <= {
        "stacks.1.blocks",
        "stacks.1",
        "stacks.1.blocks.0",
    }
    with pytest.raises(ValueError, match=r"segments must lie in \[0, 2\], got \[3\]"):
        BlockwiseFlowMatching(tiny(), segments=[3])


def test_frozen_parts_drop_nothing_out():
    """Otherwise the second stage would chase features of a trunk that no solve ever sees."""
    flow = tiny(dropout=0.5)
    module = BlockwiseFlowMatching(flow, stage="fra").train()
    assert [part.training for part in (flow.trunk, flow.stacks[0], flow.feature_residual)] == [
        False,
        False,
        True,
    ]
    for p in flow.trunk.parameters():
        nn.init.normal_(p, std=0.3)
    x, t = torch.randn(5, 2), torch.rand(5)
    assert torch.equal(flow.features(x, t), flow.features(x, t))
    assert not module.eval().flow.feature_residual.training
    module = BlockwiseFlowMatching(tiny(dropout=0.5), segments=[1]).train()
    assert [stack.training for stack in module.flow.stacks] == [False, True, False]
    assert not module.flow.trunk.training
    assert all(part.training for part in module.flow.stacks[1].modules())
    assert BlockwiseFlowMatching(flow.requires_grad_(True)).train().flow.trunk.training


# --- starting from other runs ----------------------------------------------------------------


def save_run(module, folder):
    (folder / "checkpoints").mkdir(parents=True)
    state = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(state)
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    return folder


def test_stage_two_starts_from_a_run_of_stage_one(tmp_path):
    first = BlockwiseFlowMatching(tiny(residual_depth=None))
    for p in first.parameters():
        nn.init.normal_(p)
    run = save_run(first, tmp_path / "first")
    second = BlockwiseFlowMatching(tiny(), stage="fra", start=run)
    fit(second, points(1), tmp_path)
    for name, value in first.flow.state_dict().items():
        assert torch.equal(second.flow.state_dict()[name], value)
    other = BlockwiseFlowMatching(tiny(edges=2), stage="fra", start=run)
    with pytest.raises(RuntimeError, match="start must hold weights of these blocks, got a run"):
        fit(other, points(1), tmp_path)


def test_a_plain_run_migrates_and_samples_bit_for_bit_the_same(tmp_path):
    net = ResidualMLP((2,), width=16, depth=1)
    for p in net.parameters():
        nn.init.normal_(p)
    run = save_run(ConditionalFlowMatching(net), tmp_path / "plain")
    fresh = ResidualMLP((2,), width=16, depth=1)
    module = BlockwiseFlowMatching(Blockwise(None, copies(fresh, 4), 4), start=run)
    fit(module, points(1), tmp_path, max_steps=0)
    module.sample_shape = (2,)
    plain = ConditionalFlowMatching(net)
    plain.sample_shape = (2,)
    for sampler in (ODESampler(8), ODESampler(8, "heun")):
        a, b = (m.sample(5, sampler, seeds=range(5)) for m in (module, plain))
        assert torch.equal(a, b)


# --- telemetry -------------------------------------------------------------------------------


def test_losses_and_gradients_are_logged_by_segment(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module = BlockwiseFlowMatching(tiny())
    nn.init.normal_(module.flow.trunk.outputs.weight)
    norms = []

    def remember(optimizer):
        gradients = [p.grad for p in module.flow.stacks[2].parameters()]
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))

    original = module.on_before_optimizer_step
    module.on_before_optimizer_step = lambda optimizer: (original(optimizer), remember(optimizer))
    logger = CSVLogger(tmp_path)
    trainer = fit(module, points(2), tmp_path, logger=logger)
    assert trainer.logged_metrics["train/gradient_2"].item() == pytest.approx(norms[-1], rel=1e-4)
    names = set(trainer.logged_metrics)
    assert {f"train/{kind}_{m}" for kind in ("gradient", "segment") for m in range(3)} <= names


def test_a_stack_without_gradients_is_reported(tmp_path):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def velocity(self, x, t, cond, h):
            return x * self.weight.detach()

    flow = tiny()
    nn.init.normal_(flow.trunk.outputs.weight)
    flow.stacks[1] = Detached()
    with pytest.warns(UserWarning, match=r"every stack must get gradients, .* stacks \[1\] in 3"):
        fit(BlockwiseFlowMatching(flow), points(3), tmp_path)


def test_small_batches_take_turns_and_a_checkpoint_remembers_whose(tmp_path):
    module = BlockwiseFlowMatching(tiny(edges=6))
    nn.init.normal_(module.flow.trunk.outputs.weight)
    seen = [set(module.loss({"x1": torch.randn(4, 2)})) - {"loss", "explained"} for _ in range(3)]
    assert seen[0] == {f"segment_{m}" for m in (0, 1, 2, 3)}
    assert seen[1] == {f"segment_{m}" for m in (4, 5, 0, 1)}
    assert seen[2] == {f"segment_{m}" for m in (2, 3, 4, 5)}
    stored = {}
    module.on_save_checkpoint(stored)
    other = BlockwiseFlowMatching(tiny(edges=6))
    other.on_load_checkpoint(stored)
    again = [set(m.loss({"x1": torch.randn(4, 2)})) for m in (module, other)]
    assert again[0] == again[1]
    # validation always begins with the first, and takes nobody's turn
    module.eval()
    first = [module.loss({"x1": torch.randn(4, 2)}) for _ in range(2)]
    assert set(first[0]) == set(first[1]) == {"loss", "explained", *seen[0]}
    # all of them get gradients, so that nothing is reported
    module.train()
    fit(BlockwiseFlowMatching(module.flow), points(3, 4), tmp_path)


# --- sampling, and bad input -----------------------------------------------------------------


def test_sampling_by_the_module_follows_the_feature_mode():
    flow = tiny(num_classes=3)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    module = BlockwiseFlowMatching(flow, drop_cond=DropCond(0.1, 3))
    module.sample_shape = (2,)
    sampler, cond = ODESampler(grids.blockwise(3, 4)), torch.arange(5) % 3
    flow.usage.clear()
    results = {}
    for mode in ("full", "cached", "fra"):
        flow.feature_mode = mode
        results[mode] = module.sample(5, sampler, cond, range(5), guidance=2.0)
    assert flow.usage.calls["trunk"] == 2 * (12 + 3 + 3)
    assert not torch.equal(results["full"], results["fra"])
    # given to a sampler, the module is its blocks
    flow.feature_mode = "cached"
    x0, before = torch.randn(5, 2), flow.usage.calls["trunk"]
    with torch.no_grad():
        direct = sampler(module.eval(), x0, cond)
    assert flow.usage.calls["trunk"] == before + 3
    assert torch.equal(direct, module.solve(x0, sampler, cond).x)
    with pytest.warns(UserWarning, match="grid must hold the edges between segments"):
        module.sample(5, ODESampler(25, "heun"), cond, range(5))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="velocity must be a Blockwise, got ResidualMLP"):
        BlockwiseFlowMatching(ResidualMLP((2,)))
    with pytest.raises(ValueError, match="feature_residual must be part of the velocity"):
        BlockwiseFlowMatching(tiny(residual_depth=None), stage="fra")
    with pytest.raises(ValueError, match="trunk must be part of the velocity"):
        BlockwiseFlowMatching(Blockwise(None, copies(ResidualMLP((2,)), 2), 2), lambda x: x)
    with pytest.raises(ValueError, match="stage must be one of flow, fra, got 'both'"):
        BlockwiseFlowMatching(tiny(), stage="both")
