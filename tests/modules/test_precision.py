"""Every module in every precision: training, validation and samples, beside those of float32."""

import copy
import logging
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.blockwise import BlockwiseMLP
from flowkit.couplings import Division, Gibbs, MinibatchOT, Potentials, RowSoftmax, Sinkhorn
from flowkit.guidance import DropCond
from flowkit.inpainting import RandomMasks
from flowkit.modules import (
    BlockwiseFlowMatching,
    ConditionalFlowMatching,
    LatentFlowMatching,
    Straightening,
    SymmetricalFlowMatching,
    WeightedFlowMatching,
)
from flowkit.modules.latent import expected_losses
from flowkit.nn import MLP, DiT, Inpainting, ResidualMLP, autoencoder_kl, unet2d
from flowkit.paths import VP
from flowkit.sampling import ODESampler
from flowkit.symmetrical import NoisePath, OneHot, OneHotMask, TwoTimes
from flowkit.times import Beta, LogitNormal, Stratified
from tests.modules.no_float64 import device_without_float64

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:only .* of the variance",
    "ignore:every stack must get gradients",  # two steps are few
    "ignore:stage fra trains on the trunk as it is",
)

SHAPES = {
    "points": (2,),
    "data": (2,),
    "images": (1, 4, 4),
    "latents": (1, 4, 4),
    "labels": (1, 4, 4),
    "masks": (1, 4, 4),
}
BATCH = 64


def mlp(**options):
    return MLP((2,), width=8, depth=1, **options)


def residual(shape=(1, 4, 4), **options):
    return ResidualMLP(shape, width=8, depth=1, **options)


def weighted(**options):
    return WeightedFlowMatching(mlp(), epsilon=4.0, **options)


def kl():
    return KLAutoencoder(autoencoder_kl((1, 4, 4), width=8, multipliers=(1, 2)))


def inpainting():
    net = Inpainting(DiT((1, 4, 4), width=16, depth=1, heads=2, in_channels=3))
    return LatentFlowMatching(net, Identity(), masks=RandomMasks())


def masks():
    net = NoisePath(TwoTimes(unet2d((4, 4, 4), width=8, multipliers=(1,))), channels=1)
    return SymmetricalFlowMatching(net, OneHotMask(2), label_dropout=0.5)


CASES = {
    "conditional": ("points", lambda: ConditionalFlowMatching(mlp())),
    "beta": ("points", lambda: ConditionalFlowMatching(mlp(), VP(), times=Beta(1.5, 1.0))),
    "stratified": ("points", lambda: ConditionalFlowMatching(mlp(), times=Stratified())),
    "logit-normal": ("points", lambda: ConditionalFlowMatching(mlp(), times=LogitNormal())),
    "transport": ("points", lambda: ConditionalFlowMatching(mlp(), coupling=MinibatchOT())),
    "sinkhorn": ("points", lambda: ConditionalFlowMatching(mlp(), coupling=Sinkhorn(1.0))),
    "labels": (
        "labels",
        lambda: ConditionalFlowMatching(residual(num_classes=3), drop_cond=DropCond(0.5, 3)),
    ),
    "weighted": ("points", weighted),
    "running": ("points", lambda: weighted(normalize="running", debias=Potentials(32))),
    "division": ("points", lambda: weighted(debias=Division(32))),
    "row softmax": ("points", lambda: weighted(debias=RowSoftmax())),
    "latent": ("latents", lambda: LatentFlowMatching(residual((4, 2, 2)), kl())),
    "inpainting": ("images", inpainting),
    "blockwise": (
        "points",
        lambda: BlockwiseFlowMatching(
            BlockwiseMLP((2,), edges=2, width=8),
            encoder=lambda x: x[:, None],
            encoder_width=2,
            projector_width=8,
        ),
    ),
    "residual": (
        "points",
        lambda: BlockwiseFlowMatching(
            BlockwiseMLP((2,), edges=2, width=8, residual_depth=1), stage="fra"
        ),
    ),
    "symmetrical": (
        "labels",
        lambda: SymmetricalFlowMatching(residual((4, 4, 4), num_times=2), OneHot(3)),
    ),
    "one time": (
        "labels",
        lambda: SymmetricalFlowMatching(residual((4, 4, 4)), OneHot(3), times="symmetric"),
    ),
    "masks": ("masks", masks),
    "straightening": ("points", lambda: Straightening(mlp())),
}


def batch_of(kind):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, BATCH, *SHAPES[kind], generator=generator).unbind()
    batch = {"x0": x0, "x1": 2 * x1 + 1}
    if kind in ("latents", "data"):
        del batch["x0"]  # latents have another shape
    if kind == "labels":
        batch["cond"] = torch.arange(BATCH) % 3
    if kind == "masks":
        batch["cond"] = torch.randint(2, (BATCH, 4, 4), generator=generator)
    return batch


def samples(module, kind, sampler):
    """Samples of whatever kind the module draws."""
    batch = batch_of(kind)
    if kind == "masks":
        return module.generate(batch["cond"][:4], sampler, seeds=range(4))
    if getattr(module, "masks", None) is not None:
        mask = (torch.arange(4) < 2).float().expand(4, 1, 4, 4)
        drawn = module.inpaint(batch["x1"][:4], mask, 1, sampler, seeds=range(4))
        return drawn[:, 0]
    return module.sample(4, sampler, batch["cond"][:4] if "cond" in batch else None, range(4))


def trained(name, precision, folder):
    """Train two steps, with a validation after each; return the module and its losses."""
    kind, make = CASES[name]
    torch.manual_seed(0)
    module = make()
    module.make_optimizer = partial(torch.optim.SGD, lr=1e-2)
    return module, fitted(module, precision, kind, folder)


def fitted(module, precision, kind, folder):
    """Train a module for two steps; return its losses."""
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": folder}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    trainer = Trainer(max_steps=2, val_check_interval=1, precision=precision, **options)
    data = DataLoader([batch_of(kind)] * 2, batch_size=None)
    trainer.fit(module, data, data)
    return {k: trainer.callback_metrics[k].item() for k in ("train/loss", "val/loss")}


@pytest.fixture(scope="module", params=CASES)
def exact(request, tmp_path_factory):
    """A module in float32: its name, its losses and samples of two methods."""
    name = request.param
    module, losses = trained(name, "32-true", tmp_path_factory.mktemp("exact"))
    return name, losses, [samples(module, CASES[name][0], sampler) for sampler in SAMPLERS]


SAMPLERS = [ODESampler(4, "heun"), ODESampler(4, "ab2")]
PRECISIONS = {  # type of samples; largest relative error of losses, and error of samples of size 2
    "bf16-true": (torch.bfloat16, 3e-3, 0.04),
    "bf16-mixed": (torch.float32, 3e-3, 1e-3),
    "16-true": (torch.float16, 1e-3, 0.01),
    "64-true": (torch.float64, 1e-5, 1e-4),
}
# In float64, noise of labels and times within segments are other draws than in float32.
DRAWS = {"latent", "blockwise", "residual", "symmetrical", "one time", "masks"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_module_in_every_precision(exact, precision, tmp_path):
    name, losses, drawn = exact
    dtype, of_losses, of_samples = PRECISIONS[precision]
    if precision == "64-true" and name in DRAWS:
        of_losses, of_samples = 0.1, 0.05
    module, found = trained(name, precision, tmp_path)
    assert found == pytest.approx(losses, rel=of_losses)
    for sampler, wanted in zip(SAMPLERS, drawn, strict=True):
        x = samples(module, CASES[name][0], sampler)
        assert x.dtype == torch.promote_types(
            dtype, wanted.dtype if name == "inpainting" else dtype
        )
        torch.testing.assert_close(x.double(), wanted.double(), rtol=0, atol=of_samples)


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_teacher_teaches_in_every_precision(precision, grid, tmp_path):
    """The loss of a student that is its teacher's copy, which its pairs or chords determine."""
    losses = {}
    for kind in ("32-true", precision):
        torch.manual_seed(0)
        teacher = ConditionalFlowMatching(mlp())
        teacher.sample_shape = (2,)
        student = Straightening(mlp(), grid=grid, fine_steps=4)
        student.begin(teacher)
        student.make_optimizer = partial(torch.optim.SGD, lr=0.0)
        losses[kind] = fitted(student, kind, "data", tmp_path)["val/loss"]
    assert losses[precision] == pytest.approx(losses["32-true"], rel=0.03)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_times_are_as_fine_in_half_precision(precision, tmp_path):
    """Draws of the trainer's type take 256 or 2048 values only."""
    seen = []

    def times(batch, device=None, generator=None):
        t = torch.rand(batch, device=device, generator=generator)
        seen.append(t)
        return t

    torch.manual_seed(0)
    module = ConditionalFlowMatching(mlp(), times=times)
    module.make_optimizer = partial(torch.optim.SGD, lr=1e-2)
    options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    data = DataLoader([{"x1": torch.randn(2000, 2)}], batch_size=None)
    Trainer(max_steps=1, accelerator="cpu", precision=precision, **options).fit(module, data, data)
    assert torch.get_default_dtype() == torch.float32
    assert all(t.dtype == torch.float32 and t.unique().numel() > 1990 for t in seen)


def test_adam_in_float16_is_explained(tmp_path):
    module = ConditionalFlowMatching(mlp())
    options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    data = DataLoader([{"x1": torch.randn(8, 2)}] * 5, batch_size=None)
    with pytest.raises(RuntimeError, match=r"Adam's eps of 1e-8 is 0 in float16; set trainer.prec"):
        Trainer(max_steps=5, accelerator="cpu", precision="16-true", **options).fit(
            module, data, data
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_module_samples_in_its_own_type(dtype):
    torch.manual_seed(0)
    module = ConditionalFlowMatching(mlp())
    module.sample_shape = (2,)
    exact, net = module.sample(8, ODESampler(4), seeds=range(8)), module.velocity
    for converted in (module.to(dtype), ConditionalFlowMatching(net)):
        converted.sample_shape = (2,)
        x = converted.sample(8, ODESampler(4), seeds=range(8))
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), exact, rtol=0, atol=0.03)


def test_the_running_log_z_stays_in_float32():
    """In bfloat16 its steps of a thousandth would be lost, and weights be off by up to 13 %."""
    torch.manual_seed(0)
    exact, half = (Gibbs(1.0, normalize="running") for _ in range(2))
    half.bfloat16()
    for _ in range(40):
        x0, x1 = 20 * torch.randn(2, 16, 8)
        a, b = exact.pair(x0, x1).log_weight, half.pair(x0, x1).log_weight
        assert torch.equal(a, b)
    assert torch.equal(half.bfloat16().log_z, exact.log_z)
    assert half.double().log_z.dtype == torch.float32
    assert abs(exact.log_z) > 20


# --- a device without float64 ------------------------------------------------------------------


def test_the_simulated_device_refuses_float64_and_computes_as_the_cpu():
    torch.manual_seed(0)
    net, x = mlp(), torch.randn(4, 2)
    wanted = net(x, torch.rand(4))
    with device_without_float64() as device:
        for make in (
            lambda: torch.zeros(2, dtype=torch.float64, device=device),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=device),
            lambda: x.to(device).double(),
            lambda: torch.ones(2).double().to(device),
        ):
            with pytest.raises(TypeError, match="the device has no float64"):
                make()
        torch.ones(2).double()
        torch.manual_seed(0)
        there = copy.deepcopy(net).to(device)(x.to(device), torch.rand(4).to(device))
        assert there.device == device
        assert there.cpu().shape == wanted.shape


@pytest.mark.parametrize("name", CASES)
def test_no_module_needs_float64_on_its_device(name):
    kind, make = CASES[name]
    torch.manual_seed(0)
    module, batch = make(), batch_of(kind)
    on_cpu = copy.deepcopy(module)
    wanted = on_cpu.loss(batch, torch.Generator().manual_seed(0))["loss"].item()
    drawn = samples(on_cpu, kind, SAMPLERS[0])
    with device_without_float64() as device:
        module.to(device)
        there = {k: v.to(device) for k, v in batch.items()}
        loss = module.loss(there, torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        assert loss.device == device
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        for sampler in SAMPLERS:
            found = samples(module, kind, sampler)
            assert found.device == device
        torch.testing.assert_close(samples(module, kind, SAMPLERS[0]).cpu(), drawn)


def test_sums_in_float64_are_made_on_the_cpu():
    torch.manual_seed(0)
    autoencoder, images = kl(), torch.randn(8, 1, 4, 4)
    there = copy.deepcopy(autoencoder)
    fitted = autoencoder.fit_scale(images)
    latents = fitted.posterior(images).mean
    losses = expected_losses(latents)
    with device_without_float64() as device:
        there.to(device).fit_scale(images)
        torch.testing.assert_close(there.std.cpu(), fitted.std)
        assert expected_losses(latents.to(device)) == losses
