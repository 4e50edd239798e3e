"""The Lightning modules without a recipe."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

import flowkit
from flowkit.data import Digits
from flowkit.exact import GaussianFlow
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.modules import ConditionalFlowMatching, load_run
from flowkit.modules.checkpoints import build
from flowkit.modules.trust import trusting
from flowkit.nn import MLP, DiT, ResidualMLP
from flowkit.sampling import ODESampler


def _trained(**options):
    net = ResidualMLP((2,), width=16, depth=1, num_classes=3)
    module = ConditionalFlowMatching(net, drop_cond=DropCond(0.1, 3), **options)
    module.loss({"x1": torch.randn(8, 2), "cond": torch.arange(8) % 3})
    return module


def test_loss_is_the_plain_loss():
    net = ResidualMLP((2,), width=16, depth=1)
    torch.nn.init.normal_(net.outputs.weight)
    batch = {"x1": torch.randn(8, 2)}
    ours = ConditionalFlowMatching(net).loss(batch, torch.Generator().manual_seed(1))
    plain = flow_matching_loss(net, batch, generator=torch.Generator().manual_seed(1))
    assert ours.keys() == plain.keys()
    assert torch.equal(ours["loss"], plain["loss"])


def test_samples_of_the_exact_flow_have_its_law():
    module = ConditionalFlowMatching(GaussianFlow(2.0, 0.5))
    module.sample_shape = (3,)
    x = module.sample(4000, ODESampler(20, "rk4"), seeds=range(4000))
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_seeds_fix_samples_and_their_absence_does_not():
    module = ConditionalFlowMatching(GaussianFlow(2.0, 0.5))
    module.sample_shape = (3,)
    assert torch.equal(module.sample(2, seeds=[7, 8])[1], module.sample(1, seeds=[8])[0])
    assert not torch.equal(module.sample(2), module.sample(2))


def test_sampling_leaves_the_training_mode_alone():
    module = _trained()
    modes = []
    module.velocity.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    module.train()
    module.sample(1, ODESampler(1), torch.tensor([0]))
    assert module.training
    assert modes == [False]


def test_sample_refuses_what_it_cannot_do():
    fresh = ConditionalFlowMatching(GaussianFlow(2.0, 0.5))
    with pytest.raises(RuntimeError, match="sample_shape must be known to sample, got None"):
        fresh.sample(1)
    fresh.sample_shape = (2,)
    with pytest.raises(ValueError, match="seeds must hold num_samples = 2, got 1"):
        fresh.sample(2, seeds=[1])
    for wrong in (2, "ab", [0.5, 1], torch.tensor(3)):
        with pytest.raises(TypeError, match="seeds must be a sequence of integers, one per sample"):
            fresh.sample(2, seeds=wrong)
    with pytest.raises(ValueError, match="cond must hold num_samples = 2, got 3"):
        fresh.sample(2, cond=torch.zeros(3))
    with pytest.raises(ValueError, match=r"got 2.0; .* module.drop_cond.prob=0.1"):
        fresh.sample(2, guidance=2.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fresh.sample(2, sampelr=None)


def test_guidance_one_is_the_conditional_field_bit_for_bit():
    module = _trained()
    torch.nn.init.normal_(module.velocity.outputs.weight)
    cond = torch.tensor([0, 1, 2])
    plain = module.sample(3, cond=cond, seeds=range(3))
    assert torch.equal(module.sample(3, cond=cond, seeds=range(3), guidance=1.0), plain)
    assert not torch.equal(module.sample(3, cond=cond, seeds=range(3), guidance=2.0), plain)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
def test_nan_stops_training_with_step_batch_and_row(tmp_path):
    data = torch.randn(12, 2)
    data[9, 1] = float("nan")
    batches = [{"x1": part} for part in data.split(4)]
    module = ConditionalFlowMatching(ResidualMLP((2,), width=16, depth=1))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(
        RuntimeError,
        match=r"got nan at step 2, batch 2; x1 is not finite in its rows \[1\]",
    ):
        trainer.fit(module, DataLoader(batches, batch_size=None))


def test_the_checkpoint_knows_the_shape_of_a_sample():
    module, other = _trained(), _trained()
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other.sample_shape = None
    other.on_load_checkpoint(checkpoint)
    assert other.sample_shape == (2,)


def test_load_run_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="run must be a run folder, hub:owner/name or"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "module:\n  _target_: flowkit.modules.ConditionalFlowMatching\n"
        "  velocity: {_target_: flowkit.exact.GaussianFlow, mean: 0.0, std: 1.0}\n"
    )
    with pytest.raises(FileNotFoundError, match="has the run saved a checkpoint"):
        load_run(tmp_path)
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(RuntimeError, match=r"checkpoint must be readable, got .*last.ckpt"):
        load_run(tmp_path)
    torch.save({"state_dict": {"velocity.w": torch.zeros(1)}}, file)
    with pytest.raises(RuntimeError, match=r"must fit the configured module.* in .*last.ckpt"):
        load_run(tmp_path)


def test_build_agrees_with_hydra():
    node = {
        "_target_": "collections.OrderedDict",
        "_args_": [[["a", {"_target_": "fractions.Fraction", "_args_": [1, 3]}]]],
        "b": {"c": [1, {"_target_": "datetime.timedelta", "days": 2}]},
    }
    with trusting(["collections.OrderedDict", "fractions.Fraction", "datetime.timedelta"]):
        assert build(node) == instantiate(OmegaConf.create(node), _convert_="all")
        half = build({"_target_": "fractions.Fraction", "_partial_": True, "denominator": 2})
    assert half(1) == 0.5


@pytest.mark.parametrize("name", ["no_such_module.Thing", "fractions.NoSuchClass"])
def test_a_class_that_is_not_here_is_named_with_what_to_do(name):
    place = name.split(".")[0]
    message = f"got '{name}'; run in the folder that holds {place},"
    with trusting(name), pytest.raises(ImportError, match=message):
        build({"_target_": name})


class Rates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        group = optimizer.param_groups[0]
        self.seen.append((trainer.global_step, group["lr"], group["weight_decay"]))


SCHEDULES = {
    "cosine": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4),
    "one cycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4),
    "none": None,
}


def _fit(folder, steps, schedule, decay=0.0, **options):
    adamw = partial(torch.optim.AdamW, lr=0.1, weight_decay=decay)
    net = ResidualMLP((2,), width=4, depth=1)
    module = ConditionalFlowMatching(net, optimizer=adamw, lr_scheduler=schedule)
    rates = Rates()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[rates],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader([{"x1": torch.randn(3, 2)}] * 8, batch_size=None), **options)
    trainer.save_checkpoint(folder / "last.ckpt")
    return rates.seen


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_follows_the_schedule_and_values_configured_now(tmp_path, name):
    short, long = SCHEDULES[name], SCHEDULES[name]
    if short is not None:
        length = "T_max" if name == "cosine" else "total_steps"
        long = partial(short.func, **{**short.keywords, length: 8})
    whole = _fit(tmp_path, 8, long, decay=0.5)
    resume = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    first = _fit(tmp_path, 4, short)
    assert _fit(tmp_path, 8, long, decay=0.5, **resume) == whole[4:]
    assert first != whole[:4]
    assert [step for step, *_ in whole] == list(range(8))


class Halves(nn.Module):
    """An autoencoder of a user's own, with weights, which names no hash."""

    def __init__(self, gain=2.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def encode(self, images):
        return images[:, :1] / self.gain

    def decode(self, latents):
        return (latents * self.gain).repeat(1, 2)


def test_an_autoencoder_that_names_no_hash_is_known_by_its_weights():
    modules = [
        ConditionalFlowMatching(MLP((1,), width=8, depth=1), autoencoder=Halves(gain))
        for gain in (2.0, 3.0)
    ]
    modules[0].loss({"x1": torch.randn(4, 2)})
    checkpoint: dict = {}
    modules[0].on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="autoencoder must be the one that the flow was made with"):
        modules[1].on_load_checkpoint(checkpoint)
    modules[1].autoencoder.load_state_dict(modules[0].autoencoder.state_dict())
    modules[1].on_load_checkpoint(checkpoint)
    assert modules[1].sample_shape == (1,)


@pytest.mark.parametrize(
    "call",
    [
        lambda **typo: ODESampler(4, **typo),
        lambda **typo: ODESampler(4).solve(GaussianFlow(0.0, 1.0), torch.zeros(1, 2), **typo),
        lambda **typo: flowkit.Linear(**typo),
        lambda **typo: flowkit.MinibatchOT(**typo),
        lambda **typo: flowkit.ClassifierFree(GaussianFlow(0.0, 1.0), 2.0, 0, **typo),
        lambda **typo: flowkit.flow_matching_loss(GaussianFlow(0.0, 1.0), {}, **typo),
        lambda **typo: flowkit.log_likelihood(ODESampler(4), None, torch.zeros(1, 2), **typo),
        lambda **typo: MLP((2,), **typo),
        lambda **typo: DiT.from_name("DiT-S/2", (4, 8, 8), **typo),
        lambda **typo: ConditionalFlowMatching(MLP((2,)), **typo),
        lambda **typo: Digits(**typo),
    ],
)
def test_no_misspelt_keyword_is_swallowed(call):
    with pytest.raises(TypeError, match="unexpected keyword argument 'sede'"):
        call(sede=0)
