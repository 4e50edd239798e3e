"""Latent flow matching: the facts that a correct implementation meets."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.diagnosis import diagnose
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.guidance import DropCond
from flowkit.inpainting import RandomMasks
from flowkit.modules import LatentFlowMatching
from flowkit.modules.latent import describe_latents, expected_losses
from flowkit.nn import MLP, DiT, Inpainting, autoencoder_kl
from flowkit.sampling import ODESampler


class Zero(nn.Module):
    def forward(self, x, t, cond=None):
        return torch.zeros_like(x)


class Scaled:
    """Latents ``s x``: the least autoencoder there is."""

    def __init__(self, s):
        self.s = s

    def encode(self, images):
        return self.s * images

    def decode(self, latents):
        return latents / self.s


def small_autoencoder(seed=3):
    torch.manual_seed(seed)
    autoencoder = KLAutoencoder(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)))
    return autoencoder.fit_scale(torch.rand(50, 1, 8, 8) * 2 - 1)


def images(count=8, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def dit(channels=4, size=4, **options):
    torch.manual_seed(0)
    net = DiT((channels, size, size), patch=2, width=16, depth=1, heads=2, **options)
    for parameter in net.outputs.parameters():  # a new network's output is zero
        nn.init.normal_(parameter, std=0.3)
    return net


# --- losses ---------------------------------------------------------------------------------------


def test_zero_network_has_loss_one_plus_energy_of_latents():
    unit = {"x1": torch.randn(4000, 4, 4, 4)}
    loss = LatentFlowMatching(Zero(), Identity()).loss(unit)["loss"]
    assert loss.item() == pytest.approx(2.00, abs=0.02)
    loss = LatentFlowMatching(Zero(), Scaled(0.5)).loss(unit)["loss"]
    assert loss.item() == pytest.approx(1.25, abs=0.02)


@pytest.mark.parametrize("s", [0.3, 1.0, 2.5])
def test_irreducible_loss_of_gaussian_latents(s):
    module = LatentFlowMatching(GaussianFlow(0.7, s), Identity())
    loss = module.loss({"x1": 0.7 + s * torch.randn(400_000, 1)})["loss"]
    assert loss.item() == pytest.approx(s * math.pi / 2, rel=0.01)


def test_a_trained_network_ends_just_above_the_irreducible_loss():
    torch.manual_seed(0)
    s = 0.5
    net = MLP((2,), width=64, depth=2, activation="silu")
    module = LatentFlowMatching(net, Identity())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        loss = module.loss({"x1": s * torch.randn(512, 2)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealing.step()
    # Against the exact field on the same draws: the difference is the field's own error.
    with torch.no_grad():
        final, least = (
            LatentFlowMatching(velocity, Identity())
            .loss({"x1": s * torch.randn(200_000, 2, generator=_seeded())}, _seeded(1))["loss"]
            .item()
            for velocity in (net, GaussianFlow(0.0, s))
        )
    assert least < final < 1.03 * least
    assert least == pytest.approx(s * math.pi / 2, rel=0.01)


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "std"), [(1, 0.0), (2, 0.2), (4, 0.3405), (8, 0.4148)])
def test_few_euler_steps_lose_variance(steps, std):
    """The map is affine, so two points tell mean and std without sampling error."""
    module = LatentFlowMatching(GaussianFlow(2.0, 0.5), Identity())
    low, middle, high = module.solve(torch.tensor([[-1.0], [0.0], [1.0]]), ODESampler(steps)).x
    assert middle.item() == pytest.approx(2, abs=1e-6)
    assert (high - low).item() / 2 == pytest.approx(std, abs=5e-5)


def test_scale_is_applied_on_both_sides():
    """Decoded stds of data with std 1/.18215: alike where the solver is exact, else not."""
    truth = 1 / 0.18215
    exact, coarse = [], []
    for s in (0.05, 0.18215, 1.0):
        module = LatentFlowMatching(GaussianFlow(0.0, s * truth), Scaled(s))
        module.loss({"x1": truth * torch.randn(8, 1, dtype=torch.float64)})
        for sampler, stds in (
            (ODESampler(1, "dopri5", rtol=1e-8, atol=1e-8), exact),
            (ODESampler(8), coarse),
        ):
            noise = torch.randn(50_000, 1, generator=_seeded(), dtype=torch.float64)
            x = module.autoencoder.decode(module.solve(noise, sampler).x)
            stds.append((x.std() / truth / noise.std()).item())
    assert exact == pytest.approx([1.0] * 3, rel=1e-5)
    assert coarse == pytest.approx([0.771, 0.851, 0.700], abs=0.0006)


class TwoClasses(nn.Module):
    """N(−1.5, .5²) and N(1.5, .5²); label 2 is their mixture."""

    def __init__(self):
        super().__init__()
        self.fields = [GaussianFlow(m, 0.5) for m in (-1.5, 1.5)]
        means = torch.tensor([[-1.5], [1.5]])
        self.fields.append(MixtureFlow(torch.ones(2), means, torch.full((2,), 0.5)))

    def forward(self, x, t, cond):
        fields = torch.stack([field(x, t) for field in self.fields])
        return fields[cond, torch.arange(len(x))]


def test_guidance_algebra():
    module = LatentFlowMatching(TwoClasses(), Identity(), drop_cond=DropCond(0.1, 2))
    module.sample_shape = (1,)
    n, sampler = 8000, ODESampler(40, "heun")
    ones, null = torch.ones(n, dtype=torch.long), torch.full((n,), 2)
    means, stds = [], []
    for scale in (0, 0.5, 1, 1.5, 2, 4):
        x = module.sample(n, sampler, ones, range(n), scale)
        means.append(x.mean().item())
        stds.append(x.std().item())
        if scale in (0, 1):
            alone = module.sample(n, sampler, ones if scale else null, range(n))
            assert torch.equal(x, alone)
    assert means == pytest.approx([0, 1.05, 1.5, 1.70, 1.83, 2.19], abs=0.03)
    assert stds == sorted(stds, reverse=True)


def test_labels_are_dropped_in_training_alone():
    seen = []

    class Labels(Zero):
        def forward(self, x, t, cond):
            seen.append(cond)
            return super().forward(x, t)

    module = LatentFlowMatching(Labels(), Identity(), drop_cond=DropCond(0.1, 5))
    batch = {"x1": torch.zeros(100_000, 1), "cond": torch.zeros(100_000, dtype=torch.long)}
    module.loss(batch, _seeded())
    module.eval()
    module.loss(batch, _seeded())
    dropped, kept = ((cond == 5).sum().item() for cond in seen)
    assert 9_700 <= dropped <= 10_300
    assert kept == 0


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_same_seeds_give_the_same_samples_in_any_batch(batch):
    module = LatentFlowMatching(dit(num_classes=3), small_autoencoder())
    module.loss({"x1": images(), "cond": torch.arange(8) % 3})
    labels, sampler = torch.arange(64) % 3, ODESampler(2)
    whole = module.sample(64, sampler, labels, range(64))
    parts = [
        module.sample(len(seeds), sampler, labels[seeds], seeds)
        for seeds in torch.arange(64).split(batch)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (64, 1, 8, 8)


# --- latents --------------------------------------------------------------------------------------


def test_latents_are_drawn_anew_at_every_use():
    autoencoder = small_autoencoder()
    module, batch = LatentFlowMatching(Zero(), autoencoder), {"x1": images()}
    first, second = module.encode(batch)["x1"], module.encode(batch)["x1"]
    std = autoencoder.posterior(images()).std
    assert ((first - second) / std).std().item() == pytest.approx(math.sqrt(2), rel=0.1)
    assert torch.equal(module.encode(batch, _seeded())["x1"], module.encode(batch, _seeded())["x1"])
    assert module.sample_shape == (4, 4, 4)


def test_cached_latents_are_used_as_they_are():
    autoencoder = small_autoencoder()
    module = LatentFlowMatching(Zero(), autoencoder)
    z = torch.randn(8, 4, 4, 4)
    assert torch.equal(module.encode({"x1": z, "encoded_by": autoencoder.hash})["x1"], z)


def test_latents_of_another_autoencoder_are_refused_by_both_hashes():
    ours, other = small_autoencoder(), small_autoencoder(seed=4)
    module = LatentFlowMatching(Zero(), ours)
    batch = {"x1": torch.randn(8, 4, 4, 4), "encoded_by": other.hash}
    with pytest.raises(ValueError, match=f"cached latents, hash {other.hash}, got {ours.hash}"):
        module.loss(batch)


def test_latents_of_another_shape_are_refused():
    module = LatentFlowMatching(Zero(), Identity())
    module.loss({"x1": torch.randn(8, 4, 4, 4)})
    for shape in [(8, 4, 2, 2), (8, 3, 4, 4)]:
        with pytest.raises(ValueError, match=r"x1 must be encoded to shape \(B, 4, 4, 4\) as in"):
            module.loss({"x1": torch.randn(*shape)})


def test_checkpoint_holds_the_identity_and_no_weight_of_the_autoencoder():
    ours, other = small_autoencoder(), small_autoencoder(seed=4)
    module = LatentFlowMatching(dit(), ours)
    module.loss({"x1": images()})
    assert all(name.startswith("velocity.") for name in module.state_dict())
    assert not any(p is q for p in module.parameters() for q in ours.vae.parameters())
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["flowkit"]["autoencoder"] == {"hash": ours.hash, "config": ours.config}
    again = LatentFlowMatching(dit(), small_autoencoder())
    again.on_load_checkpoint(checkpoint)
    assert again.sample_shape == (4, 4, 4)
    for wrong in (other, Identity()):
        with pytest.raises(ValueError, match=f"hash {ours.hash}, got {wrong.hash}"):
            LatentFlowMatching(dit(), wrong).on_load_checkpoint(checkpoint)


class Learnable(nn.Module):
    """A user's own autoencoder, with weights of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def encode(self, images):
        return self.scale * images

    def decode(self, latents):
        return latents / self.scale


def test_an_autoencoder_of_ones_own_is_frozen_and_moved_but_not_stored():
    module = LatentFlowMatching(dit(channels=1, size=8), Learnable())
    assert all(name.startswith("velocity.") for name in module.state_dict())
    optimizer = module.configure_optimizers()
    module.train().loss({"x1": images()})["loss"].backward()
    optimizer.step()
    assert module.autoencoder.scale.item() == 2
    assert not module.autoencoder.training
    assert module.double().autoencoder.scale.dtype == torch.float64


def test_training_leaves_the_autoencoder_alone():
    autoencoder = small_autoencoder()
    module = LatentFlowMatching(dit(), autoencoder)
    before = {k: v.clone() for k, v in autoencoder.vae.state_dict().items()}
    optimizer = module.configure_optimizers()
    module.loss({"x1": images()})["loss"].backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in autoencoder.vae.state_dict().items())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.velocity.parameters()}


# --- inpainting -----------------------------------------------------------------------------------


class FromCondition(nn.Module):
    """Carries noise half the way to the image it is told of; remembers what it was told."""

    def forward(self, x, t, cond=None):
        self.cond = cond
        return 0.5 * (cond["masked"] - x)


def inpainter(**options):
    module = LatentFlowMatching(FromCondition(), Identity(), masks=RandomMasks(), **options)
    module.sample_shape = (1, 8, 8)
    return module


def test_training_tells_the_network_what_lies_around_random_holes():
    module, x = inpainter(), images()
    module.loss({"x1": x, "cond": torch.arange(8)}, _seeded())
    cond = module.velocity.cond
    mask = (cond["mask"] + 1) / 2
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(cond["masked"], x * (1 - mask))
    assert cond["label"].tolist() == list(range(8))
    module.loss({"x1": x}, _seeded(1))
    assert not torch.equal(module.velocity.cond["mask"], cond["mask"])
    assert "label" not in module.velocity.cond


def test_known_pixels_are_exact_when_pasted_back():
    module, x = inpainter(), images(3)
    mask = RandomMasks()(3, (8, 8), _seeded())
    filled = module.inpaint(x, mask, 4, ODESampler(2), seeds=range(12))
    assert filled.shape == (3, 4, 1, 8, 8)
    known = (mask == 0)[:, None].expand_as(filled)
    assert torch.equal(filled[known], x[:, None].expand_as(filled)[known])
    free = module.inpaint(x, mask, 4, ODESampler(2), seeds=range(12), paste_back=False)
    assert not torch.equal(free[known], x[:, None].expand_as(filled)[known])
    assert torch.equal(free[~known], filled[~known])


def test_fillings_are_those_of_their_seeds_and_of_their_image():
    net = Inpainting(dit(1, 8, in_channels=3, num_classes=4))
    module = LatentFlowMatching(net, Identity(), drop_cond=DropCond(0.5, {"label": 4}))
    module.sample_shape = (1, 8, 8)
    x, mask, labels = images(2), RandomMasks()(2, (8, 8), _seeded()), torch.tensor([0, 3])
    both = module.inpaint(x, mask, 3, ODESampler(2), labels, range(6))
    second = module.inpaint(x[1:], mask[1:], 2, ODESampler(2), labels[1:], [4, 5])
    torch.testing.assert_close(both[1, 1:], second[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[1, 1], both[1, 2])
    # without labels they are left open, as in training
    opened = module.inpaint(x, mask, 1, ODESampler(2), seeds=[1, 2])
    null = module.inpaint(x, mask, 1, ODESampler(2), torch.tensor([4, 4]), [1, 2])
    assert torch.equal(opened, null)
    # also where the configuration brings the null label in a mapping of its own
    module.drop_cond.null = OmegaConf.create({"label": 4})
    assert torch.equal(module.inpaint(x, mask, 1, ODESampler(2), seeds=[1, 2]), null)
    with pytest.raises(ValueError, match=r"labels must be given with guidance, .* guidance 2"):
        module.inpaint(x, mask, 1, ODESampler(2), seeds=[1, 2], guidance=2.0)


def test_inpainting_through_an_autoencoder():
    autoencoder = small_autoencoder()
    module = LatentFlowMatching(Inpainting(dit(in_channels=9)), autoencoder, masks=RandomMasks())
    x = images(4)
    assert module.loss({"x1": x})["loss"].isfinite()
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    filled = module.inpaint(x, mask, 2, ODESampler(2), seeds=range(8))
    assert torch.equal(filled[:, 0][mask == 0], x[mask == 0])
    assert not torch.equal(filled[:, 0], filled[:, 1])


def test_masks_of_cells_are_made_in_the_way_of_the_training():
    """Also after loading: checkpoints of earlier versions do not tell the way, it was the pixel."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 3:6] = 1  # cells of 2x2 pixels: the first column of cells begins inside
    touched = [[-1] * 4, [-1, 1, 1, -1], [-1, 1, 1, -1], [-1] * 4]
    nearest = [[-1] * 4, [-1, -1, 1, -1], [-1, -1, 1, -1], [-1] * 4]
    autoencoder = small_autoencoder()
    draw = lambda *_: mask  # noqa: E731
    for resize, expected in (("max", touched), ("nearest", nearest)):
        module = LatentFlowMatching(FromCondition(), autoencoder, masks=draw, mask_resize=resize)
        stored = {"state_dict": module.state_dict()}
        module.loss({"x1": images(1)}, _seeded())
        assert module.velocity.cond["mask"].tolist() == [[expected]]
        module.inpaint(images(1), mask, 1, ODESampler(1), seeds=[0])
        assert module.velocity.cond["mask"].tolist() == [[expected]]
        module.on_save_checkpoint(stored)
        other = LatentFlowMatching(FromCondition(), autoencoder, masks=draw)
        assert other.mask_resize == "max"
        other.on_load_checkpoint(stored)
        assert other.mask_resize == resize
    del stored["flowkit"]["mask_resize"]
    other = LatentFlowMatching(FromCondition(), autoencoder, masks=draw)
    other.on_load_checkpoint(stored)
    assert other.mask_resize == "nearest"
    with pytest.raises(ValueError, match="mask_resize must be one of max, nearest, got 'mean'"):
        LatentFlowMatching(FromCondition(), autoencoder, mask_resize="mean")


def test_masks_and_caches_that_do_not_fit_are_refused():
    module = inpainter()
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 1, 8, 8\), got \(2, 1, 4, 4"):
        module.inpaint(images(2), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        module.inpaint(images(2), torch.zeros(2, 1, 8, 8), 0)
    with pytest.raises(ValueError, match="x1 must hold images for random masks, got cached"):
        module.loss({"x1": images(), "encoded_by": "identity"})


# --- diagnosis ------------------------------------------------------------------------------------


def test_expected_losses_are_those_of_the_zero_and_the_gaussian_network():
    stds, means = torch.tensor([0.5, 1.0, 2.0, 1.5]), torch.tensor([0.0, 1.0, -1.0, 0.3])
    shape = (4, 1, 1)
    z = means.reshape(shape) + stds.reshape(shape) * torch.randn(20_000, 4, 2, 2)
    expected = expected_losses(z)
    exact = GaussianFlow(means.reshape(shape), stds.reshape(shape))
    for velocity, name in ((Zero(), "zero"), (exact, "gaussian")):
        terms = LatentFlowMatching(velocity, Identity()).loss({"x1": z})
        assert terms["loss"].item() == pytest.approx(expected[name], rel=0.01)
    assert terms["explained"].item() == pytest.approx(expected["explained"], abs=0.01)
    assert expected["std"] == pytest.approx(z.std().item(), rel=1e-3)


def test_diagnosis_warns_of_a_scale_that_was_never_set():
    for std, told in ((1.0, False), (5.5, True), (0.1, True)):
        z = std * torch.randn(2000, 4, 2, 2)
        text = describe_latents(z, expected_losses(z))
        assert ("set the scale of the autoencoder" in text) == told
    assert (
        "latents   (4, 2, 2) have mean 0.00 and std 0.10: the loss of a zero network is 1.01"
        in text
    )


@pytest.mark.slow  # two diagnoses
def test_the_doctor_names_a_forgotten_scale_of_the_autoencoder():
    """Latents of std 5.5, as those of Stable Diffusion; the velocity has learnt scaled ones."""
    torch.manual_seed(3)
    vae = autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2))
    seen, held_out = images(400), images(200, seed=1)
    with torch.no_grad():
        first = KLAutoencoder(vae).posterior(seen)
        vae.quant_conv.weight[:4] *= 5.5 / first.mean.std()
        vae.quant_conv.bias[:4] *= 5.5 / first.mean.std()
    vae.register_to_config(scaling_factor=1 / 5.5)
    scaled = KLAutoencoder(vae)
    vae.register_to_config(scaling_factor=1.0)
    forgotten = KLAutoencoder(vae)
    z = scaled.encode(seen, _seeded())
    velocity, x0 = GaussianFlow(z.mean(0), z.std(0)), torch.randn(200, *z.shape[1:])
    found = {}
    for autoencoder in (scaled, forgotten):
        module = LatentFlowMatching(velocity, autoencoder)
        x1 = module.encode({"x1": held_out}, _seeded())["x1"]
        found[autoencoder] = diagnose(module.velocity, x0, x1, path=module.path)
    (own,) = [one for one in found[scaled] if one.name == "input scale"]
    assert own.ok
    alarm = found[forgotten][0]
    assert (alarm.name, alarm.ok) == ("input scale", False)
    assert float(alarm.figure.split()[3].rstrip(",")) == pytest.approx(1 / 5.5, rel=0.1)
    assert "latents: the scale of the autoencoder" in alarm.advice


def test_losses_are_foretold_for_straight_independent_pairs_alone():
    text = describe_latents(torch.randn(9, 4, 2, 2), {"mean": 0.0, "std": 1.0})
    assert text == "latents   (4, 2, 2) have mean 0.00 and std 1.00"


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
def test_diagnosis_is_logged_once_at_the_start(tmp_path, capsys):
    from lightning import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    batches = DataLoader([{"x1": images(64, seed=k)} for k in range(3)], batch_size=None)
    module = LatentFlowMatching(dit(), small_autoencoder())
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="logs"),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, batches)
    assert capsys.readouterr().out.count("the loss of a zero network") == 1
    text = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    header, first = (line.split(",") for line in text.splitlines()[:2])
    row = dict(zip(header, first, strict=True))
    assert float(row["latents/zero"]) == pytest.approx(2, abs=0.3)


# --- conditions that are data -----------------------------------------------------------------


def test_conditions_that_are_data_are_encoded_in_training_and_in_a_solve():
    seen = []

    def velocity(x, t, cond):
        seen.append(cond)
        return x * 0

    flow = LatentFlowMatching(velocity, Scaled(3.0), encode_cond=["frames"])
    frames, text = torch.randn(2, 1, 4, 4), torch.randn(2, 5)
    flow.loss({"x1": torch.randn(2, 1, 4, 4), "cond": {"frames": frames, "text": text}})
    flow.sample(2, ODESampler(2), {"frames": frames, "text": text}, seeds=[0, 1])
    assert len(seen) == 3  # encoded once a solve, not at every step
    for cond in seen:
        assert torch.equal(cond["frames"], 3 * frames)
        assert torch.equal(cond["text"], text)
    for cond in ({"text": text}, text):
        with pytest.raises(TypeError, match="cond must be a mapping with frames"):
            flow.sample(2, ODESampler(2), cond, seeds=[0, 1])


def test_an_encoded_condition_is_the_mean_of_its_latents():
    autoencoder, seen = small_autoencoder(), []

    def velocity(x, t, cond):
        seen.append(cond["frames"])
        return x * 0

    flow = LatentFlowMatching(velocity, autoencoder, encode_cond=["frames"])
    given = images(3)
    for seed in (0, 1):
        torch.manual_seed(seed)
        flow.loss({"x1": images(3, 1), "cond": {"frames": given}})
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0], autoencoder.posterior(given).mean)
