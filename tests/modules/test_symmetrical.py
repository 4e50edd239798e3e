"""The module of symmetrical flow matching."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn

from flowkit.autoencoders import Identity
from flowkit.guidance import ClassifierFree
from flowkit.modules import SymmetricalFlowMatching
from flowkit.modules.earlier import current
from flowkit.nn import DiT, ResidualMLP
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.symmetrical import JointFlow, LabelStates, OneHot, OneHotMask, Ordinal, RGBPalette
from flowkit.symmetrical.label_states import label_noise
from flowkit.symmetrical.regions import put_back
from tests.symmetrical.exact_joint import ClassMixture

MIXTURE = ClassMixture(
    torch.randn(3, 2, generator=torch.Generator().manual_seed(1)), OneHot(3).table, 0.5, 0.1
)


def _exact(times="two-time", **options):
    """A module of the closed-form network, for three classes of points."""
    module = SymmetricalFlowMatching(MIXTURE, OneHot(3), times, **options)
    module.sample_shape, module.label_shape = (2,), (3,)
    return module


def _net(channels=4, times="two-time", size=8):
    net = ResidualMLP(
        (channels, size, size), width=16, depth=1, num_times=2 if times == "two-time" else 1
    )
    nn.init.normal_(net.outputs.weight, std=0.1)
    return net


def _images(times="two-time", **options):
    """A module with random weights that has seen digits-like images of three classes."""
    module = SymmetricalFlowMatching(_net(4, times), OneHot(3), times, **options)
    module.loss({"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3})
    return module


def _masks(times="two-time", codec=None, **options):
    codec = codec or OneHotMask(3)
    module = SymmetricalFlowMatching(_net(1 + codec.channels, times), codec, times, **options)
    module.loss({"x1": torch.randn(6, 1, 8, 8), "cond": torch.randint(3, (6, 8, 8))})
    return module


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_the_loss_weighs_the_means_of_its_parts(times):
    module = _images(times, image_weight=0.7)
    batch = {"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3}
    terms = module.loss(batch, torch.Generator().manual_seed(0))
    expected = 0.7 * terms["image_loss"] + 0.3 * terms["label_loss"]
    torch.testing.assert_close(terms["loss"], expected)
    generator = torch.Generator().manual_seed(0)
    y0 = module.codec.dequantize(module.codec.encode(batch["cond"]), generator)
    by_hand = module.joint.loss(batch["x1"], y0, generator=generator)
    torch.testing.assert_close((terms["image_loss"], terms["label_loss"]), by_hand)


def test_what_the_batch_holds_and_the_share_of_the_boundary_reach_the_joint_flow():
    module = _images(boundary_share=1.0)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    batch = {"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3}
    batch |= {"x0": torch.randn(6, 1, 8, 8), "mask": (torch.rand(6, 1, 8, 8) < 0.5).float()}
    found = module.loss(batch, draws[0])
    y0 = module.states.encode(batch["cond"], dequantize=True, generator=draws[1])
    options = {"x0": batch["x0"], "mask": batch["mask"], "generator": draws[1]}
    expected = module.joint.loss(batch["x1"], y0, boundary_share=1.0, **options)
    torch.testing.assert_close((found["image_loss"], found["label_loss"]), expected)
    for left_out in ("x0", "mask"):
        other = {name: value for name, value in batch.items() if name != left_out}
        image_loss = module.loss(other, torch.Generator().manual_seed(0))["image_loss"]
        assert abs(image_loss - expected[0]) > 1e-3


def test_without_label_weight_label_outputs_get_exactly_no_gradient():
    module = _images(image_weight=1.0)
    module.loss({"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3})["loss"].backward()
    gradient = module.velocity.outputs.weight.grad.unflatten(0, (4, 64))
    assert bool((gradient[1:] == 0).all())
    assert gradient[0].abs().max() > 0
    module = _images(image_weight=0.0)
    module.loss({"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3})["loss"].backward()
    gradient = module.velocity.outputs.weight.grad.unflatten(0, (4, 64))
    assert bool((gradient[0] == 0).all())
    assert gradient[1:].abs().max() > 0


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_ignored_pixels_get_exactly_no_gradient(times):
    answer = torch.zeros(6, 4, 8, 8, requires_grad=True)
    codec = OneHotMask(3, ignore_index=255)
    module = SymmetricalFlowMatching(lambda state, t: answer, codec, times, boundary_share=0.0)
    masks = torch.randint(3, (6, 8, 8))
    masks[:, 2:4, 5] = 255
    module.loss({"x1": torch.randn(6, 1, 8, 8), "cond": masks})["loss"].backward()
    ignored = answer.grad[:, 1:, 2:4, 5]
    assert bool((ignored == 0).all())
    assert bool((answer.grad[:, 1:, 5] != 0).all())


def test_weights_of_classes_ignored_pixels_and_latent_cells():
    states = LabelStates(OneHotMask(2, ignore_index=9), nn.Identity())
    masks = torch.tensor([[[0, 1, 9, 9], [1, 1, 0, 1]]])
    full = states.weight(masks, torch.zeros(1, 2, 2, 4), [1.0, 3.0])
    assert full.tolist() == [[[[1, 3, 0, 0], [3, 3, 1, 3]]]]
    cells = states.weight(masks, torch.zeros(1, 5, 1, 2), [1.0, 3.0])
    assert cells.tolist() == [[[[2.5, 1.0]]]]
    assert states.weight(masks, torch.zeros(1, 2, 2, 4)).tolist() == [
        [[[1, 1, 0, 0], [1, 1, 1, 1]]]
    ]
    classes = LabelStates(OneHot(3), nn.Identity())
    assert classes.weight(torch.tensor([2, 0]), torch.zeros(2, 3)) is None
    assert classes.weight(torch.tensor([2, 0]), torch.zeros(2, 3), [1, 2, 5]).tolist() == [[5], [1]]


def test_class_weights_weigh_the_label_loss():
    weights = [1.0, 5.0, 0.0]
    module, batch = _images(class_weights=weights), {}
    batch = {"x1": torch.randn(6, 1, 8, 8), "cond": torch.tensor([0, 0, 1, 2, 2, 2])}
    terms = module.loss(batch, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    y0 = module.codec.dequantize(module.codec.encode(batch["cond"]), generator)
    weight = torch.tensor([1.0, 1, 5, 0, 0, 0])[:, None]
    by_hand = module.joint.loss(batch["x1"], y0, label_weight=weight, generator=generator)
    torch.testing.assert_close((terms["image_loss"], terms["label_loss"]), by_hand)


def test_labels_are_hidden_in_training_only():
    module = _images(label_dropout=1.0)
    batch = {"x1": torch.randn(6, 1, 8, 8), "cond": torch.arange(6) % 3}
    assert module.loss(batch)["label_loss"].item() == 0
    assert module.eval().loss(batch)["label_loss"].item() > 0


def test_a_few_steps_learn_labels():
    """Two classes told apart by their brightness: fifty steps are enough to read most labels."""
    net = ResidualMLP((3, 4, 4), width=32, depth=1, num_times=2)
    module = SymmetricalFlowMatching(net, OneHot(2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    labels = torch.arange(64) % 2
    images = torch.randn(64, 1, 4, 4) + 2 * labels[:, None, None, None] - 1
    for _ in range(150):
        optimizer.zero_grad()
        module.loss({"x1": images, "cond": labels})["loss"].backward()
        optimizer.step()
    assert (module.classify(images).probabilities.argmax(1) == labels).float().mean() > 0.95


# --- labels of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_one_step_classification_is_the_posterior(times):
    x = torch.randn(40, 2)
    probabilities, uncertainty = _exact(times).classify(x)
    expected = MIXTURE.posterior(x)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(uncertainty, 1 - expected.amax(1), atol=1e-5, rtol=0)


def test_many_draws_in_many_steps_approach_the_posterior():
    x = torch.randn(5, 2)
    probabilities, _ = _exact().classify(x, ODESampler(20), draws=200)
    exact = MIXTURE.posterior(x)
    spread = (exact * (1 - exact) / 200).sqrt()
    assert ((probabilities - exact).abs() < 3.5 * spread + 0.005).all()


def test_the_noise_of_codes_does_not_lower_the_mean_of_many():
    """Sampled codes are spread around their points: each clipped, the winner stays below 1."""
    codec = OneHot(10)
    states = LabelStates(codec, Identity())
    code = codec.encode(torch.tensor([3])).expand(4000, -1)
    draws = codec.dequantize(code, torch.Generator().manual_seed(0))
    clipped = codec.posterior(draws).mean(0)[3].item()
    assert clipped < 0.97
    assert states.posterior(draws[:, None])[0, 3].item() == pytest.approx(1, abs=0.01)


def test_classification_repeats_and_does_not_depend_on_the_batch():
    module = _images()
    x = torch.randn(7, 1, 8, 8)
    sampler = ODESampler(3)
    first = module.classify(x, sampler, draws=2).probabilities
    assert torch.equal(module.classify(x, sampler, draws=2).probabilities, first)
    parts = [module.classify(x[i : i + 1], sampler, 2, seeds=[i]).probabilities for i in range(7)]
    torch.testing.assert_close(torch.cat(parts), first, atol=1e-6, rtol=1e-5)
    other = module.classify(x, sampler, 2, seeds=range(10, 17)).probabilities
    assert (other - first).abs().max() > 1e-4


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_one_step_labels_of_n_images_cost_n_network_rows(times):
    rows = []
    module = _images(times)
    module.velocity.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    module.classify(torch.randn(13, 1, 8, 8))
    assert rows == [13]
    solution = module.solve_labels(torch.randn(13, 1, 8, 8), torch.randn(13, 3), ODESampler(4))
    assert (solution.nfe, solution.rows) == (4, 52)
    assert rows == [13] * 5


def test_more_than_one_symmetric_euler_step_warns():
    module, x = _images("symmetric"), torch.randn(2, 1, 8, 8)
    for sampler in (ODESampler(2), ODESampler(1, "heun")):
        with pytest.warns(UserWarning, match="several steps of symmetric mode may be worse than"):
            module.classify(x, sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.classify(x, ODESampler(1))
        _images().classify(x, ODESampler(2))


def test_segmentation_takes_the_most_probable_label_of_each_pixel():
    module, x = _masks(), torch.randn(3, 1, 8, 8)
    mask, confidence = module.segment(x)
    p = module.posterior(x)
    assert p.shape == (3, 3, 8, 8)
    assert torch.equal(mask, p.argmax(1))
    assert torch.equal(confidence, p.amax(1))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 4)])
def test_images_noise_and_labels_noise_are_independent(shape):
    """Though their seeds are the same: one image's numbers never show in its label's."""
    images = seeded_noise(shape, range(2000)).flatten(1)
    labels = label_noise(shape, range(2000))[:, 0].flatten(1)
    correlation = torch.corrcoef(torch.cat([images, labels], 1).T)[
        : images.shape[1], images.shape[1] :
    ]
    assert correlation.abs().max() < 0.11
    assert labels.std().item() == pytest.approx(1, abs=0.03)


# --- images of labels ---------------------------------------------------------------------------


def test_two_time_generation_has_the_classes_own_law():
    module, labels = _exact(), torch.arange(6000) % 3
    x = module.generate(labels, ODESampler(20, "heun"), seeds=range(6000))
    for k in range(3):
        mine = x[labels == k]
        torch.testing.assert_close(mine.mean(0), MIXTURE.means[k], atol=0.04, rtol=0)
        torch.testing.assert_close(mine.std(0), torch.full((2,), 0.5), atol=0.03, rtol=0)


def test_the_guided_velocity_is_that_of_images_alone():
    """In two-time mode any sampler takes it; solving with it is what `solve` does."""
    module, x0 = _images(label_dropout=0.1), torch.randn(5, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 2, 3])
    for guidance in (None, 1.0, 2.0, 0.0):
        x = ODESampler(3)(module.guided(guidance), x0, labels)
        torch.testing.assert_close(module.solve(x0, ODESampler(3), labels, guidance).x, x)
    assert isinstance(module.guided(2.0), ClassifierFree)
    v = [module(x0, torch.full((5,), 0.3), labels)]
    y = module.codec.encode(labels.clamp_max(2)) * (labels < 3)[:, None]
    s = (labels == 3).float()
    v.append(module.joint(x0, y, torch.full((5,), 0.3), s)[0])
    torch.testing.assert_close(v[0], v[1])
    wrapped = module.guided(lambda velocity: lambda x, t, cond=None: 2 * velocity(x, t, cond))
    torch.testing.assert_close(wrapped(x0, torch.full((5,), 0.3), labels), 2 * v[0])


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_guidance_extrapolates_from_the_hidden_label(times):
    module, x0 = _images(times, label_dropout=0.1), torch.randn(4, 1, 8, 8)
    labels, null, sampler = torch.tensor([0, 1, 2, 0]), torch.full((4,), 3), ODESampler(1)
    plain = module.solve(x0, sampler, labels).x
    hidden = module.solve(x0, sampler, null).x
    solution = module.solve(x0, sampler, labels, 3.0)
    torch.testing.assert_close(solution.x, hidden + 3 * (plain - hidden))
    assert (solution.nfe, solution.rows) == (1, 8)
    assert torch.equal(module.solve(x0, sampler, labels, 1.0).x, plain)
    assert torch.equal(module.solve(x0, sampler, None).x, hidden)
    assert (plain - hidden).abs().max() > 1e-4


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_paths_and_samples_are_of_images_alone(times):
    module, labels = _images(times), torch.tensor([0, 2])
    solution = module.solve(torch.randn(2, 1, 8, 8), ODESampler(3), labels, return_path=True)
    assert solution.path.shape == (4, 2, 1, 8, 8)
    assert torch.equal(solution.path[-1], solution.x)
    x = module.generate(labels, ODESampler(3), seeds=[4, 5])
    torch.testing.assert_close(module.sample(1, ODESampler(3), labels[1:], seeds=[5]), x[1:])


def test_labels_move_in_symmetric_mode_and_stay_in_two_time_mode():
    for times, moves in (("symmetric", True), ("two-time", False)):
        seen = []
        module = _images(times)
        module.velocity.register_forward_pre_hook(
            lambda net, args, seen=seen: seen.append(args[0][:, 1:].clone())
        )
        module.generate(torch.tensor([0, 1]), ODESampler(2), seeds=[0, 1])
        assert torch.equal(seen[0][:, :, 0, 0], module.codec.encode(torch.tensor([0, 1])))
        assert ((seen[1] - seen[0]).abs().max() > 1e-4) == moves


def test_pairs_agree_with_the_mixture():
    images, labels = _exact().sample_pairs(3000, ODESampler(20, "heun"))
    torch.testing.assert_close(
        labels.bincount(minlength=3) / 3000, torch.full((3,), 1 / 3), atol=0.03, rtol=0
    )
    for k in range(3):
        torch.testing.assert_close(images[labels == k].mean(0), MIXTURE.means[k], atol=0.07, rtol=0)
    again = _exact().sample_pairs(2, ODESampler(20, "heun"), seeds=[7, 8])
    assert torch.equal(
        again.images[1:], _exact().sample_pairs(1, ODESampler(20, "heun"), [8]).images
    )
    # without seeds every call draws others, as in `sample`
    one, two = (_exact().sample_pairs(1, ODESampler(2)).images for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_editing_keeps_all_outside_of_the_region(times):
    module, images = _masks(times), torch.randn(3, 1, 8, 8)
    old = torch.randint(3, (3, 8, 8))
    new = old.clone()
    new[:, 2:5, 1:7] = (new[:, 2:5, 1:7] + 1) % 3
    region = new != old
    edited = module.edit(images, new, region, ODESampler(4), seeds=[1, 2, 3])
    assert torch.equal(edited[:, 0][~region], images[:, 0][~region])
    assert (edited - images)[:, 0][region].abs().min() > 1e-4
    # it is the solve from the seeds' noise with the callback of the library
    x0 = seeded_noise((1, 8, 8), [1, 2, 3])
    keep = put_back(x0, images, region)
    assert torch.equal(module.solve(x0, ODESampler(4), new, callback=keep).x, edited)


# --- latent mode --------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A small autoencoder: 2x2 blocks as channels, with a posterior of unit std around them."""

    hash = "blocks"

    def posterior(self, images):
        from flowkit.autoencoders import Posterior

        mean = F.pixel_unshuffle(images, 2)
        return Posterior(mean, torch.ones_like(mean))

    def encode(self, images):
        return self.posterior(images).sample()

    def decode(self, latents):
        return F.pixel_shuffle(latents, 2)


class Threshold:
    """A network that knows: the mask of an image is where its red is positive."""

    def __init__(self, codec):
        self.codec = codec

    def __call__(self, state, t):
        images = F.pixel_shuffle(state[:, :12], 2)
        code = self.codec.encode((images[:, 0] > 0).long())
        return torch.cat([0 * state[:, :12], state[:, 12:] - F.pixel_unshuffle(code, 2)], 1)


@pytest.mark.parametrize("times", ["two-time", "symmetric"])
def test_latent_masks_go_through_the_autoencoder_and_back(times):
    codec = RGBPalette([[0, 0, 0], [255, 255, 255]])
    module = SymmetricalFlowMatching(Threshold(codec), codec, times, autoencoder=Blocks())
    images = torch.randn(5, 3, 8, 8)
    masks = (images[:, 0] > 0).long()
    module.loss({"x1": images, "cond": masks})
    assert (module.sample_shape, module.label_shape) == ((12, 4, 4), (12, 4, 4))
    # known images and masks are the posterior's mean: its noise would spoil most pixels
    mask, confidence = module.segment(images)
    assert torch.equal(mask, masks)
    assert confidence.min() > 0.99
    y, hidden = module.states.condition(masks, module.label_shape)
    assert torch.equal(y, F.pixel_unshuffle(codec.encode(masks), 2))
    assert not bool(hidden.any())


def test_latent_training_draws_images_from_the_posterior_but_not_masks():
    seen = []

    def network(state, t):
        seen.append((state, t))
        return torch.zeros_like(state)

    codec = RGBPalette([[0, 0, 0], [255, 255, 255]], q=0.0)
    module = SymmetricalFlowMatching(network, codec, autoencoder=Blocks(), boundary_share=1.0)
    images, masks = torch.zeros(2000, 3, 2, 2), torch.zeros(2000, 2, 2).long()
    module.loss({"x1": images, "cond": masks})
    state, t = seen[0]
    clean_image, clean_label = t[:, 0] == 1, t[:, 1] == 0
    assert state[clean_image, :12].std().item() == pytest.approx(1, abs=0.05)
    assert bool((state[clean_label, 12:] == -1).all())


def test_cached_latents_train_as_their_images_do():
    def module():
        codec = RGBPalette([[0, 0, 0], [255, 255, 255]])
        return SymmetricalFlowMatching(Threshold(codec), codec, autoencoder=Blocks())

    latents, masks = torch.randn(6, 12, 4, 4), torch.randint(2, (6, 8, 8))
    batch = {"x1": latents, "cond": masks, "encoded_by": "blocks"}
    terms = module().loss(batch, torch.Generator().manual_seed(0))
    fresh = module()
    generator = torch.Generator().manual_seed(0)
    y0 = fresh.states.encode(masks, dequantize=True, generator=generator)
    by_hand = fresh.joint.loss(latents, y0, generator=generator)
    torch.testing.assert_close((terms["image_loss"], terms["label_loss"]), by_hand)
    with pytest.raises(ValueError, match=r"have the latents' size \(4, 4\), got \(3, 3\) of masks"):
        module().loss({**batch, "cond": masks[:, :6, :6]})
    with pytest.raises(ValueError, match="a label per image or masks"):
        module().loss({**batch, "cond": masks[:5]})


def test_latent_generation_editing_and_pairs_are_images():
    codec = RGBPalette(3)
    net = DiT((24, 4, 4), patch=2, width=16, depth=1, heads=2, num_times=2)
    nn.init.normal_(net.outputs.linear.weight, std=0.1)
    module = SymmetricalFlowMatching(net, codec, autoencoder=Blocks(), label_dropout=0.1)
    images, masks = torch.randn(4, 3, 8, 8), torch.randint(3, (4, 8, 8))
    module.loss({"x1": images, "cond": masks})
    assert module.generate(masks, ODESampler(2), guidance=2.0).shape == (4, 3, 8, 8)
    pairs = module.sample_pairs(4, ODESampler(2))
    assert (pairs.images.shape, pairs.labels.shape) == ((4, 3, 8, 8), (4, 8, 8))
    region = torch.zeros(4, 8, 8, dtype=torch.bool)
    region[:, 3, 3] = True
    edited = module.edit(images, masks, region, ODESampler(2))
    changed = ((edited - images).abs() > 1e-6).any(1)
    cell = torch.zeros_like(region)
    cell[:, 2:4, 2:4] = True
    assert torch.equal(changed, cell)


# --- earlier versions ---------------------------------------------------------------------------


def test_the_share_of_the_boundary_has_its_earlier_name_with_a_warning():
    message = r"^edges is named boundary_share since flowkit 0.2.0; flowkit 0.4.0 will not take"
    with pytest.warns(FutureWarning, match=message):
        module = SymmetricalFlowMatching(_net(), OneHot(3), edges=0.25)
    assert module.boundary_share == 0.25
    with pytest.raises(TypeError, match="boundary_share must be given once, got edges as well"):
        SymmetricalFlowMatching(_net(), OneHot(3), boundary_share=0.25, edges=0.25)


def test_configurations_of_earlier_runs_build_without_that_warning():
    codec = {"_target_": "flowkit.codecs.OneHot", "num_classes": 3}
    node = {"_target_": "flowkit.modules.SymmetricalFlowMatching", "codec": codec, "edges": 0.25}
    module = instantiate(current(node), velocity=_net())
    assert (module.boundary_share, module.codec) == (0.25, OneHot(3))


# --- state --------------------------------------------------------------------------------------


def test_a_checkpoint_knows_shapes_and_autoencoder():
    module = _masks()
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    other = SymmetricalFlowMatching(_net(4), OneHotMask(3))
    other.on_load_checkpoint(checkpoint)
    assert (other.sample_shape, other.label_shape) == ((1, 8, 8), (3, 8, 8))
    another = SymmetricalFlowMatching(_net(4), OneHotMask(3), autoencoder=Blocks())
    with pytest.raises(ValueError, match="autoencoder must be the one that the flow was made with"):
        another.on_load_checkpoint(checkpoint)


def test_a_copy_computes_with_its_own_weights():
    module = _images()
    other = copy.deepcopy(module)
    nn.init.zeros_(other.velocity.outputs.weight)
    x = torch.randn(2, 1, 8, 8)
    assert other.joint(x, torch.zeros(2, 3), *torch.rand(2, 2))[0].abs().max() == 0
    assert module.joint(x, torch.zeros(2, 3), *torch.rand(2, 2))[0].abs().max() > 0


def test_solving_leaves_the_training_mode_alone():
    module, x = _images(label_dropout=0.1).train(), torch.randn(2, 1, 8, 8)
    modes = []
    module.velocity.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    module.classify(x)
    module.generate(torch.tensor([0, 1]), ODESampler(1))
    module.sample_pairs(2, ODESampler(1))
    assert modes == [False] * 3
    assert module.training
    assert isinstance(module.joint, JointFlow)


# --- bad input ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    options = {"velocity": _net(), "codec": OneHot(3)}
    with pytest.raises(ValueError, match="times must be one of symmetric, two-time, got 'both'"):
        SymmetricalFlowMatching(**options, times="both")
    for name in ("image_weight", "boundary_share", "label_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got 1.5"):
            SymmetricalFlowMatching(**options, **{name: 1.5})
    with pytest.raises(ValueError, match="class_weights must hold 3 weights, one per class, got 2"):
        SymmetricalFlowMatching(**options, class_weights=[1, 2])
    for weights in ([-1, 1, 1], [float("nan"), 1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="class_weights must be finite, at least 0"):
            SymmetricalFlowMatching(**options, class_weights=weights)
    middle = {**options, "codec": Ordinal(3), "times": "symmetric", "label_dropout": 0.1}
    with pytest.raises(ValueError, match=r"label_dropout must be 0 in .* got class 1"):
        SymmetricalFlowMatching(**middle)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        Ordinal(1)


def test_labels_and_pairs_need_the_whole_way():
    module, x, part = _images(), torch.randn(2, 1, 8, 8), ODESampler([0.5, 1.0])
    region = torch.ones(2, 8, 8, dtype=torch.bool)
    for call in (
        lambda: module.classify(x, part),
        lambda: module.sample_pairs(2, part),
        lambda: module.edit(x, torch.zeros(2).long(), region, part),
    ):
        with pytest.raises(ValueError, match=r"sampler.grid must run from 0 to 1, got 0.5 to 1.0"):
            call()


def test_bad_batches_are_refused():
    module, x = _images(), torch.randn(4, 1, 8, 8)
    with pytest.raises(TypeError, match="cond must be a tensor of labels, got NoneType"):
        module.loss({"x1": x})
    with pytest.raises(ValueError, match=r"labels in \[0, 2\], got values in \[0, 3\]"):
        module.loss({"x1": x, "cond": torch.arange(4)})
    with pytest.raises(TypeError, match="labels must hold integer labels, got torch"):
        module.loss({"x1": x, "cond": torch.rand(4)})
    for shape in ((4, 7, 8), (3,), (4, 1)):
        with pytest.raises(ValueError, match=r"masks of the images' size \(8, 8\), got shape"):
            module.loss({"x1": x, "cond": torch.zeros(shape).long()})
    with pytest.raises(ValueError, match=r"states have shape \(3,\) as before, got \(3, 8, 8\) of"):
        module.loss({"x1": x, "cond": torch.zeros(4, 8, 8).long()})
    batch = {"x1": x, "cond": torch.zeros(4).long(), "t0": torch.zeros(4), "t1": torch.ones(4)}
    with pytest.raises(ValueError, match="batch must hold whole pairs for a joint flow, got segm"):
        module.loss(batch)


def test_bad_conditions_are_refused():
    module, masks = _images(), _masks(label_dropout=0.1)
    with pytest.raises(ValueError, match="trained without label_dropout, got no labels"):
        module.sample(2)
    with pytest.raises(ValueError, match=r"cond must hold labels .* got 1 samples without a label"):
        module.generate(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"labels must hold labels in \[0, 2\], got values"):
        module.generate(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="guidance must be null or 1 for a model that never"):
        module.generate(torch.tensor([0]), guidance=2.0)
    with pytest.raises(
        ValueError, match=r"codes have shape \(3, 8, 8\) as in training, got \(3, 4, 4\) of labels"
    ):
        masks.generate(torch.zeros(2, 4, 4).long())
    with pytest.raises(TypeError, match="cond must be a tensor of labels, got dict"):
        masks.sample(2, cond={"mask": torch.zeros(2, 8, 8).long()})
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"region must have shape \(2, 8, 8\), one value per pixel"
    ):
        masks.edit(images, torch.zeros(2, 8, 8).long(), torch.zeros(2, 4, 4).bool())
    with pytest.raises(
        ValueError, match=r"images must hold at least one image, got shape \(0, 1, 8, 8\)"
    ):
        module.classify(images[:0])
    with pytest.raises(ValueError, match="cond must hold one label per sample, 2, got 3"):
        masks.edit(images, torch.zeros(3, 8, 8).long(), torch.zeros(2, 8, 8).bool())
    for labels in ([0, 1], 3, torch.tensor(3)):
        with pytest.raises(TypeError, match=r"labels must be a tensor \(B,\) or \(B, H, W\), got "):
            module.generate(labels)
    for wrong, name in ((images.byte(), "torch.uint8"), ([images], "list")):
        with pytest.raises(TypeError, match=rf"floating-point tensor in \[-1, 1\], got {name}"):
            module.classify(wrong)
    same = [module.classify(x).probabilities for x in (images, images.double())]
    assert torch.equal(*same)
    for call in (module.classify, lambda x: module.edit(x, torch.tensor([0, 1]), x[:, 0] > 0)):
        with pytest.raises(ValueError, match=r"states of shape \(1, 8, 8\) as in training, got"):
            call(images[..., 1:])
    with pytest.raises(ValueError, match="code must be finite, got 3 NaN or infinite of 6 values"):
        module.classify(torch.stack([images[0], images[1] / 0]))


def test_what_a_mode_cannot_do_is_refused():
    symmetric = _images("symmetric", label_dropout=0.1)
    with pytest.raises(RuntimeError, match="times must be 'two-time' to sample pairs, got 'symm"):
        symmetric.sample_pairs(3)
    with pytest.raises(RuntimeError, match="times must be 'two-time' for a velocity of images"):
        symmetric(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="guidance must be a number here, got a function"):
        symmetric.generate(torch.tensor([0]), guidance=lambda velocity: velocity)
    with pytest.raises(RuntimeError, match="got masks; use segment"):
        _masks().classify(torch.randn(2, 1, 8, 8))
    with pytest.raises(RuntimeError, match="got classes; use classify"):
        _images().segment(torch.randn(2, 1, 8, 8))
    fresh = SymmetricalFlowMatching(_net(), OneHot(3))
    with pytest.raises(RuntimeError, match="label_shape and sample_shape must be known, got None"):
        fresh.classify(torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError, match="seeds must hold one seed per sample, 2, got 3"):
        _images().classify(torch.randn(2, 1, 8, 8), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        _images().classify(torch.randn(2, 1, 8, 8), draws=0)
