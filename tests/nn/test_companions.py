"""Networks whose state has companions."""

import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from flowkit.guidance import ClassifierFree, DropCond
from flowkit.losses import flow_matching_loss
from flowkit.nn import Conditioned, DiffusersVelocity, DiT, Inpainting, Patches, SemanticMap
from flowkit.nn.embed import SidesError


class Seen(nn.Module):
    """Remembers its input, and returns the first ``channels`` of it."""

    def __init__(self, channels=4):
        super().__init__()
        self.channels = channels

    def forward(self, x, t, cond=None):
        self.x, self.t, self.cond = x, t, cond
        return x[:, : self.channels]


def test_inpainting_channels_are_in_order():
    net = Seen()
    x, masked = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    mask, label, t = torch.ones(2, 1, 3, 5), torch.tensor([1, 2]), torch.rand(2)
    v = Inpainting(net)(x, t, {"mask": mask, "label": label, "masked": masked})
    assert net.x.shape == (2, 9, 3, 5)
    assert torch.equal(net.x[:, :4], x)
    assert torch.equal(net.x[:, 4:8], masked)
    assert torch.equal(net.x[:, 8:], mask)
    assert net.cond is label
    assert net.t is t
    assert torch.equal(v, x)


def test_label_alone_is_guided_and_dropped():
    """The null condition names the label: what is seen of the image stays."""
    net, null = Seen(1), {"label": 7}
    x, label = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
    cond = {"masked": torch.ones_like(x), "mask": torch.ones(3, 1, 2, 2), "label": label}
    dropped = DropCond(1.0, null)(cond)
    assert dropped["label"].tolist() == [7, 7, 7]
    assert dropped["masked"] is cond["masked"]
    ClassifierFree(Inpainting(net), 2.0, null)(x, torch.zeros(3), cond)
    assert net.cond.tolist() == [0, 1, 2, 7, 7, 7]
    assert torch.equal(net.x[:3], net.x[3:])


def test_map_is_reduced_by_learned_squares():
    """Each pixel of the state is told of its own square of labels (and, mixed, its neighbors')."""
    net = Seen()
    velocity = SemanticMap(net, num_classes=3, factor=4, channels=2)
    velocity.reduce = velocity.reduce[0]  # the cut into squares alone
    x, labels = torch.randn(1, 4, 2, 3), torch.randint(0, 4, (1, 8, 12))
    velocity(x, torch.zeros(1), labels)
    reduced = net.x[:, 4:]
    assert torch.equal(net.x[:, :4], x)
    weight, bias = velocity.reduce.weight, velocity.reduce.bias
    for i in range(2):
        for j in range(3):
            square = labels[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            expected = bias.clone()
            for a in range(4):
                for b in range(4):
                    expected = expected + weight[:, square[a, b], a, b]
            torch.testing.assert_close(reduced[0, :, i, j], expected)


def test_map_of_an_odd_size_is_continued_by_its_last_labels():
    velocity = SemanticMap(Seen(), num_classes=3, factor=4)
    x, labels = torch.randn(1, 4, 2, 2), torch.randint(0, 4, (1, 7, 6))
    whole = torch.cat([labels, labels[:, -1:]], 1)
    whole = torch.cat([whole, whole[:, :, -1:], whole[:, :, -1:]], 2)
    velocity(x, torch.zeros(1), labels)
    seen = velocity.net.x
    velocity(x, torch.zeros(1), whole)
    assert torch.equal(velocity.net.x, seen)


def test_projector_of_the_map_is_trained():
    torch.manual_seed(0)
    net = DiT((4, 2, 2), patch=1, width=16, depth=1, heads=2, in_channels=8)
    for name, parameter in net.named_parameters():  # a new network's output is zero
        if "modulation" in name or "outputs" in name:
            nn.init.normal_(parameter, std=0.1)
    velocity = SemanticMap(net, num_classes=3, factor=4)
    before = {name: value.clone() for name, value in velocity.reduce.named_parameters()}
    optimizer = torch.optim.SGD(velocity.parameters(), lr=0.1)
    batch = {"x1": torch.randn(8, 4, 2, 2), "cond": torch.randint(0, 3, (8, 8, 8))}
    flow_matching_loss(velocity, batch)["loss"].backward()
    optimizer.step()
    for name, value in velocity.reduce.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_a_full_null_map_is_the_null_condition():
    velocity = SemanticMap(Seen(), num_classes=3, factor=2)
    x, labels = torch.randn(2, 4, 2, 2), torch.zeros(2, 4, 4, dtype=torch.long)
    assert (DropCond(1.0, 3)(labels) == 3).all()
    guided = ClassifierFree(velocity, 0.0, 3)(x, torch.zeros(2), labels)
    assert torch.equal(guided, velocity(x, torch.zeros(2), torch.full((2, 4, 4), 3)))


def _inpaint(cond):
    Inpainting(Seen())(torch.zeros(2, 4, 3, 3), torch.zeros(2), cond)


def _map(cond):
    SemanticMap(Seen(), num_classes=3, factor=4)(torch.zeros(2, 4, 2, 2), torch.zeros(2), cond)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: _inpaint(None), TypeError, "mapping with the names masked and mask, got NoneType"),
        (
            lambda: _inpaint({"mask": torch.zeros(2, 1, 3, 3)}),
            TypeError,
            r"cond must be a mapping with the names masked and mask, got \['mask'\]",
        ),
        (
            lambda: _inpaint({"masked": torch.zeros(2, 4, 3, 3), "mask": torch.zeros(2, 1, 6, 6)}),
            ValueError,
            r"cond\['mask'\] must have shape \(2, 1, 3, 3\), got \(2, 1, 6, 6\)",
        ),
        (lambda: Conditioned(Seen(), []), ValueError, "names in beside must be at least 1, got 0"),
        (lambda: _map(None), TypeError, "cond must be a map of labels, got NoneType"),
        (
            lambda: _map(torch.full((2, 8, 8), 4)),
            ValueError,
            r"cond must hold labels in \[0, 3\], got values in \[4, 4\]",
        ),
        (lambda: _map(torch.zeros(2, 8, 8)), TypeError, "cond must hold integer labels"),
        (
            lambda: _map(torch.zeros(2, 8, 4, dtype=torch.long)),
            ValueError,
            r"cond must have shape \(2, 8, 8\), or sides up to 3 smaller, got \(2, 8, 4\)",
        ),
        (
            lambda: _map(torch.zeros(2, dtype=torch.long)),
            ValueError,
            r"cond must have shape \(2, 8, 8\), or sides up to 3 smaller, got \(2,\)",
        ),
        (lambda: SemanticMap(Seen(), 0, 4), ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_bad_conditions_are_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_the_answer_is_added_to_a_part_of_the_condition():
    x, t = torch.randn(2, 4, 3, 3), torch.rand(2)
    cond = {"mask": torch.randn(2, 1, 3, 3), "frames": torch.randn(2, 4, 3, 3)}
    plain = Conditioned(Seen(), ["mask", "frames"])
    added = Conditioned(Seen(), ["mask", "frames"], onto="frames")
    torch.testing.assert_close(added(x, t, cond) - plain(x, t, cond), cond["frames"])
    assert torch.equal(added.net.x, torch.cat([x, cond["mask"], cond["frames"]], 1))
    with pytest.raises(ValueError, match="onto must be one of frames, mask, got 'mixture'"):
        Conditioned(Seen(), ["mask", "frames"], onto="mixture")
    with pytest.raises(
        ValueError, match=r"cond\['mask'\] must have the shape of the answer of net"
    ):
        Conditioned(Seen(), ["mask", "frames"], onto="mask")(x, t, cond)


def test_a_square_of_pixels_is_a_pixel_of_channels():
    seen = []

    def net(x, t, cond):
        seen.append((x, t, cond))
        return 2 * x

    x, t = torch.randn(3, 2, 6, 4), torch.rand(3)
    v = Patches(net, 2)(x, t, "text")
    assert torch.equal(v, 2 * x)  # each value came back to its place
    inner, *rest = seen[0]
    assert inner.shape == (3, 8, 3, 2)
    assert rest == [t, "text"]
    for row in range(3):
        for column in range(2):
            square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(inner[:, :, row, column], square.reshape(3, 8))
    for bad in (torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 4, 5)):
        with pytest.raises(SidesError, match=r"sides that are multiples of 2 .* shape \(1, 2, "):
            Patches(net, 2)(bad, t)
    with pytest.raises(ValueError, match=r"x must have shape \(B, C, H, W\), got \(1, 2, 4\)"):
        Patches(net, 2)(torch.zeros(1, 2, 4), t)
    unet = UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    plain = Patches(DiffusersVelocity(unet), 2)
    wrapped = Patches(Conditioned(DiffusersVelocity(unet), ["frames"]), 2)
    assert plain(torch.zeros(1, 1, 8, 4), t[:1]).shape == (1, 1, 8, 4)
    cond = {"frames": torch.zeros(1, 0, 3, 2)}
    for velocity, given in ((plain, None), (wrapped, cond)):  # cut, but not halved
        with pytest.raises(SidesError, match=r"multiples of 4 .* shape \(1, 1, 6, 4\)") as raised:
            velocity(torch.zeros(1, 1, 6, 4), t[:1], given)
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (str(copy), copy.multiple) == (str(raised.value), 4)
    with pytest.raises(SidesError, match=r"multiples of 4 .* shape \(1, 1, 5, 4\)"):
        plain(torch.zeros(1, 1, 5, 4), t[:1])  # not cut
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Patches(net, 0)


@pytest.fixture
def separation():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return Conditioned(DiffusersVelocity(net), ["frames"])


def test_a_separation_sees_mixture_and_tokens_but_no_padding(separation):
    x, t = torch.randn(2, 2, 8, 8), torch.rand(2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    cond = {"frames": torch.randn(2, 2, 8, 8), "tokens": torch.randn(2, 3, 6), "token_mask": mask}
    with torch.no_grad():
        v = separation(x, t, cond)
        padding = torch.where(mask[..., None], cond["tokens"], 7.0)
        torch.testing.assert_close(separation(x, t, {**cond, "tokens": padding}), v)
        for name in ("frames", "tokens"):
            other = separation(x, t, {**cond, name: cond[name] + 1})
            assert (other - v).abs().flatten(1).amax(1).min() > 1e-4
        null = {"tokens": torch.zeros(2, 3, 6), "token_mask": torch.zeros(2, 3, dtype=torch.bool)}
        assert torch.isfinite(separation(x, t, {**cond, **null})).all()
        swapped = separation(cond["frames"], t, {**cond, "frames": x})
        assert (swapped - v).abs().max() > 1e-4  # they are two different inputs


def test_a_network_of_diffusers_names_what_it_misses(separation):
    x, t = torch.randn(2, 2, 8, 8), torch.rand(2)
    with pytest.raises(
        TypeError,
        match=r"arguments of UNet2DConditionModel, got \['vector'\]; missing "
        r"\['encoder_hidden_states'\], unknown \['vector'\]",
    ):
        separation(x, t, {"frames": x, "vector": x})
    odd = torch.randn(2, 2, 7, 8)
    cond = {"frames": odd, "tokens": torch.randn(2, 3, 6), "token_mask": torch.ones(2, 3)}
    assert separation(odd, t, cond).shape == odd.shape  # blocks with attention to tokens take it
    cond = {"frames": x[..., 1:], "tokens": torch.randn(2, 3, 6), "token_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"must have shape .2, 2, 8, 8., got .2, 2, 8, 7."):
        separation(x, t, cond)
