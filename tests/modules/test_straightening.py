"""Straightening: exact in the affine case; adapters, streams and starts."""

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from flowkit import boss
from flowkit.autoencoders import KLAutoencoder
from flowkit.exact import GaussianFlow
from flowkit.modules import ConditionalFlowMatching, Straightening
from flowkit.nn import MLP, autoencoder_kl, unet2d
from flowkit.nn.lora import add_lora, merge_lora
from flowkit.sampling import ODESampler

F64 = torch.float64


class AffinePerInterval(nn.Module):
    """``v = a_k x + b_k`` in interval ``k``."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid
        self.a, self.b = (nn.Parameter(torch.zeros(len(grid) - 1, dtype=F64)) for _ in range(2))

    def forward(self, x, t, cond=None):
        k = torch.searchsorted(self.grid, t, right=True) - 1
        return self.a[k][:, None] * x + self.b[k][:, None]


def test_straightening_is_exact_in_the_affine_case():
    flow, x0 = GaussianFlow(2.0, 0.3), torch.randn(200, 1, dtype=F64)
    costs = boss.step_costs(flow, x0, 100)
    grid = boss.bellman_grid(costs, 100, 4)
    batch = boss.segments(flow, x0, 100, grid)
    student = AffinePerInterval(grid)
    module = Straightening(student)
    # the loss is a quadratic in each interval's two numbers: solve it
    chord = (batch["x1"] - batch["x0"]) / (batch["t1"] - batch["t0"])[:, None]
    with torch.no_grad():
        for k, t in enumerate(grid[:-1]):
            rows = batch["t0"] == t
            design = torch.cat([batch["x0"][rows], torch.ones(200, 1, dtype=F64)], 1)
            student.a[k], student.b[k] = torch.linalg.lstsq(design, chord[rows]).solution[:, 0]
    assert module.loss(batch)["loss"] < 1e-20
    fresh = torch.randn(50, 1, dtype=F64)
    with torch.no_grad():
        teacher, mine = ODESampler(100)(flow, fresh), ODESampler(grid)(student, fresh)
    torch.testing.assert_close(mine, teacher, rtol=0, atol=1e-10)
    # plain Euler on the same grid is far off
    assert (ODESampler(grid)(flow, fresh) - teacher).abs().max() > 0.1


def test_segments_are_learnt_at_their_start_and_pairs_between():
    seen = []

    def velocity(x, t, cond=None):
        seen.append((x, t))
        return torch.zeros_like(x)

    x0, x1 = torch.randn(2, 64, 3)
    batch = {"x0": x0, "x1": x1, "t0": torch.full((64,), 0.2), "t1": torch.full((64,), 0.7)}
    loss = Straightening(velocity).loss(batch)["loss"]
    assert torch.equal(seen[0][0], x0)
    assert torch.equal(seen[0][1], batch["t0"])
    torch.testing.assert_close(loss, ((x1 - x0) / 0.5).square().mean())
    loss = Straightening(velocity).loss({"x0": x0, "x1": x1})["loss"]
    torch.testing.assert_close(loss, (x1 - x0).square().mean())
    x, t = seen[1]
    torch.testing.assert_close(x, x0 + t[:, None] * (x1 - x0))
    assert 0.8 < t.max() <= 1
    assert 0 <= t.min() < 0.2


def test_reflow_learns_the_pairs_of_the_teacher():
    """Gradient descent on an affine field of x: its one step becomes the teacher's whole way."""
    flow, x0 = GaussianFlow(2.0, 0.3), torch.randn(4000, 1)
    pairs = boss.segments(flow, x0, 100, 1)
    module = Straightening(MLP((1,), width=64, depth=2))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(300):
        rows = slice(step % 10 * 400, step % 10 * 400 + 400)
        loss = module.loss({"x0": pairs["x0"][rows], "x1": pairs["x1"][rows]})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = torch.randn(500, 1)
    target = ODESampler(100)(flow, fresh)
    with torch.no_grad():
        after = (ODESampler(1)(module, fresh) - target).square().mean().sqrt()
    before = (ODESampler(1)(flow, fresh) - target).square().mean().sqrt()
    assert after < 0.1 < 0.25 < before


# --- a run to start from -------------------------------------------------------------------------


@pytest.fixture
def teacher(monkeypatch):
    """What `load_run` gives: a labeled network of odd weights."""
    module = ConditionalFlowMatching(MLP((2,), width=16, num_classes=3, activation="tanh"))
    module.loss({"x1": torch.randn(4, 2), "cond": torch.tensor([0, 1, 2, 3])})
    module.eval().requires_grad_(False)
    monkeypatch.setattr("flowkit.modules.straightening.load_run", lambda folder: module)
    return module


def student_net(width=16):
    torch.manual_seed(1)
    return MLP((2,), width=width, num_classes=3, activation="tanh")


def points():
    return torch.randn(7, 2), torch.rand(7), torch.randint(4, (7,))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_student_starts_as_the_teacher_exactly(teacher, lora_rank):
    module = Straightening(student_net(), start="run", lora_rank=lora_rank)
    x, t, cond = points()
    assert not torch.equal(module(x, t, cond), teacher(x, t, cond))
    module.on_fit_start()
    assert torch.equal(module(x, t, cond), teacher(x, t, cond))
    assert module.sample_shape == (2,)
    assert not [name for name in module.state_dict() if "teacher" in name]
    assert len(list(module.parameters())) == len(list(module.velocity.parameters()))


def test_another_network_is_refused(teacher):
    module = Straightening(student_net(width=8), start="runs/a")
    with pytest.raises(
        ValueError, match="velocity must be the network of the run runs/a, got other"
    ):
        module.on_fit_start()


def test_a_flow_that_is_more_than_its_network_is_refused(teacher):
    teacher.guided = lambda guidance: lambda x, t, cond: -x
    with pytest.raises(ValueError, match="run whose network is the velocity of its states, got Co"):
        Straightening(student_net()).begin(teacher)


def test_states_are_never_encoded_again():
    autoencoder = KLAutoencoder(autoencoder_kl((1, 8, 8), width=4, multipliers=(1, 2)))
    shape = autoencoder.encode(torch.zeros(1, 1, 8, 8)).shape[1:]
    module = Straightening(lambda x, t, cond: torch.zeros_like(x), autoencoder=autoencoder)
    x0, x1 = torch.randn(2, 6, *shape)
    expected = (x1 - x0).square().mean()
    for owner in ({}, {"encoded_by": autoencoder.hash}):
        loss = module.loss({"x0": x0, "x1": x1, **owner})["loss"]
        torch.testing.assert_close(loss, expected)
    with pytest.raises(
        ValueError, match="autoencoder must be the autoencoder of the cached latents"
    ):
        module.loss({"x0": x0, "x1": x1, "encoded_by": "another"})


@pytest.mark.parametrize("grid", [None, 3])
def test_the_teacher_makes_segments_of_the_conditions(teacher, grid, monkeypatch):
    module = Straightening(student_net(), start="run", grid=grid, fine_steps=6)
    module.on_fit_start()
    made = []
    monkeypatch.setattr(
        "flowkit.modules.straightening.flow_matching_loss",
        lambda velocity, batch, times, generator: made.append(batch) or {"loss": torch.tensor(0)},
    )
    cond = torch.tensor([0, 1, 2, 1])
    generator = torch.Generator().manual_seed(5)
    module.loss({"x1": torch.zeros(4, 2), "cond": cond}, generator)
    x0 = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    expected = boss.segments(teacher, x0, 6, grid or 1, cond)
    if grid is None:
        expected = {k: v for k, v in expected.items() if k not in ("t0", "t1")}
    assert made[0].keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[0][key], value)


def test_without_a_teacher_batches_must_be_pairs():
    with pytest.raises(RuntimeError, match=r"batch must hold x0 .* or on data=pairs"):
        Straightening(student_net()).loss({"x1": torch.zeros(4, 2)})


class Segments(LightningDataModule):
    def __init__(self, teacher):
        super().__init__()
        x0, cond = torch.randn(64, 2), torch.arange(64) % 3
        self.batch = boss.segments(teacher, x0, 20, 2, cond)

    def train_dataloader(self):
        return DataLoader([self.batch] * 60, batch_size=None)


def fit(module, data, folder, max_steps, decay):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[EMAWeightAveraging(decay=decay)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_average_starts_at_the_teacher_too(teacher, tmp_path):
    module = Straightening(student_net(), "run", optimizer=lambda p: torch.optim.SGD(p, lr=1e-6))
    inputs = points()
    fit(module, Segments(teacher), tmp_path, max_steps=3, decay=0.9999)
    torch.testing.assert_close(module(*inputs), teacher(*inputs), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_lowers_the_loss_and_leaves_the_teacher(teacher, tmp_path):
    module = Straightening(student_net(), "run", optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    data = Segments(teacher)
    before = Straightening(teacher.velocity).loss(data.batch)["loss"]
    fit(module, data, tmp_path, max_steps=60, decay=0.5)
    assert module.loss(data.batch)["loss"] < 0.6 * before
    assert torch.equal(Straightening(teacher.velocity).loss(data.batch)["loss"], before)


# --- adapters ------------------------------------------------------------------------------------

NETS = {
    "mlp": (lambda: MLP((2,), width=16, num_classes=3), (2,)),
    "unet": (lambda: unet2d((1, 8, 8), num_classes=3, width=8, multipliers=(1, 2)), (1, 8, 8)),
}


def shaken(net):
    """The network with every trainable number moved."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)
def test_adapters_start_as_identity_and_merge(make, shape):
    base = shaken(make())
    inputs = torch.randn(5, *shape), torch.rand(5), torch.randint(4, (5,))
    expected = base(*inputs)
    names = list(base.state_dict())
    total = sum(p.numel() for p in base.parameters())
    net = add_lora(base, rank=2)
    assert torch.equal(net(*inputs), expected)
    trainable = [n for n, p in net.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)
    assert 0 < sum(p.numel() for p in net.parameters() if p.requires_grad) < total
    shaken(net)
    moved = net(*inputs)
    assert (moved - expected).abs().max() > 1e-2
    merged = merge_lora(net)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(merged(*inputs), moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(*inputs), moved, rtol=0, atol=0)  # merging works on a copy


def test_only_adapters_are_trained_and_merged_by_the_module(teacher):
    module = Straightening(student_net(), start="run", lora_rank=2)
    module.on_fit_start()
    optimizer = module.configure_optimizers()
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
    shaken(module.velocity)
    inputs = points()
    torch.testing.assert_close(module.merged()(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)


def test_bad_adapters_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="net must have linear or convolution layers, got Seq"):
        add_lora(nn.Sequential(nn.ReLU()), 1)
    with pytest.raises(ValueError, match="lora_rank must be at least 0, got -1"):
        Straightening(student_net(), lora_rank=-1)
