import subprocess
import sys

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from flowkit.nn import DiffusersVelocity, unet2d

NULL = 4


def transformer(**options) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=NULL,
        norm_num_groups=1,
        **options,
    )


def stirred_unet(**options) -> DiffusersVelocity:
    torch.manual_seed(0)
    velocity = unet2d((1, 8, 8), width=8, **options)
    torch.nn.init.normal_(velocity.net.conv_out.weight, std=0.1)
    return velocity.eval()


def inputs(batch: int = 5, channels: int = 1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % (NULL + 1)


def test_import_is_light():
    code = "import sys, flowkit.nn; print(sorted({'diffusers', 'lightning'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("time_scale", [1000.0, 1.0])
def test_unet_gets_scaled_time_and_labels(time_scale):
    velocity = DiffusersVelocity(stirred_unet(num_classes=NULL).net, time_scale=time_scale)
    x, t, label = inputs()
    expected = velocity.net(x, time_scale * t, label).sample
    torch.testing.assert_close(velocity(x, t, label), expected)
    other = velocity(x, t, torch.full_like(label, NULL))
    assert ((velocity(x, t, label) - other).flatten(1).norm(dim=1) > 1e-4).tolist() == [
        True, True, True, True, False,
    ]  # fmt: skip


def test_unet_samples_do_not_see_each_other():
    velocity = stirred_unet(num_classes=NULL)
    x, t, label = inputs()
    alone = [velocity(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(velocity(x, t, label), torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_memory_format_changes_no_values():
    net = stirred_unet().net
    x, t, _ = inputs()
    plain = net(x, 1000 * t).sample
    velocity = DiffusersVelocity(net, channels_last=True)
    assert velocity.net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(velocity(x, t), plain, atol=1e-5, rtol=1e-4)


def test_transformer_labels_are_dropped_by_nobody_else():
    velocity = DiffusersVelocity(transformer())
    x, t, label = inputs(64, 3)
    expected = velocity.net.eval()(x, 1000 * t, label).sample
    velocity.train()
    torch.testing.assert_close(velocity(x, t, label), expected)
    null = torch.full_like(label, NULL)
    assert not torch.allclose(velocity(x, t, null), expected, atol=1e-4)


def test_learned_variance_is_an_explicit_choice():
    net = transformer(out_channels=6)
    x, t, label = inputs(5, 3)
    with pytest.raises(ValueError, match="drop_sigma must be True for a network of 3 input and 6"):
        DiffusersVelocity(net)
    velocity = DiffusersVelocity(net, drop_sigma=True)
    assert torch.equal(velocity(x, t, label), net(x, 1000 * t, label).sample[:, :3])
    with pytest.raises(
        ValueError, match="drop_sigma must be False for a network of 3 input and None"
    ):
        DiffusersVelocity(transformer(), drop_sigma=True)


def test_mapping_conditions_are_keyword_arguments():
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()
    x, t, label = inputs(5, 4)
    cond = {
        "encoder_hidden_states": torch.randn(5, 3, 16),
        "pooled_projections": torch.randn(5, 12),
    }
    velocity = DiffusersVelocity(net)
    expected = net(x, timestep=1000 * t, **cond).sample
    torch.testing.assert_close(velocity(x, t, cond), expected)
    with pytest.raises(TypeError, match="cond must be a mapping of keyword arguments of SD3Trans"):
        velocity(x, t, label)


def conditional_unet(down="DownBlock2D", up="UpBlock2D", mid="UNetMidBlock2D", **options):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", down),
        mid_block_type=mid,
        up_block_types=(up, "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=6,
        resnet_time_scale_shift="scale_shift",
        **options,
    ).eval()


PROJECTION = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5}


@pytest.mark.parametrize(
    ("attends", "parts"),
    [
        (False, {}),
        (True, {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}),
        (True, {"up": "CrossAttnUpBlock2D"}),
        (True, {"up": "SimpleCrossAttnUpBlock2D"}),
        (True, {"mid": "UNetMidBlock2DCrossAttn"}),
        (True, {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}),
    ],
)
def test_a_vector_joins_the_time_of_a_unet_and_needs_no_tokens(attends, parts):
    net = conditional_unet(**parts, **PROJECTION)
    x, t, _ = inputs(3, 1)
    cond, velocity = {"vector": torch.randn(3, 5)}, DiffusersVelocity(net)
    tokens = None
    if attends:
        with pytest.raises(TypeError, match=r"missing \['encoder_hidden_states'\]"):
            velocity(x, t, cond)
        tokens = torch.randn(3, 4, 6)
        cond["tokens"] = tokens
    found = velocity(x, t, cond)
    expected = net(x, 1000 * t, tokens, class_labels=cond["vector"]).sample
    torch.testing.assert_close(found, expected)
    for name, value in cond.items():
        other = velocity(x, t, {**cond, name: value + torch.randn(value.shape)})
        assert (other - found).abs().max() > 1e-5, name


def refused(velocity, cond, words, batch=3):
    x, t, _ = inputs(batch)
    t = t if velocity.num_times == 1 else t[:, None].expand(-1, 2)
    with pytest.raises(TypeError, match=words):
        velocity(x, t, cond)


def test_what_a_unet_would_ignore_is_refused():
    tokens, vector = torch.randn(3, 4, 6), torch.randn(3, 5)
    plain = DiffusersVelocity(conditional_unet(**PROJECTION))
    words = r"without effect \['encoder_hidden_states'\]"
    for name in ("tokens", "encoder_hidden_states"):
        refused(plain, {"vector": vector, name: tokens}, words)
    mask = {"vector": vector, "token_mask": torch.ones(3, 4)}
    refused(plain, mask, r"without effect \['encoder_attention_mask'\]")
    twice = {"vector": vector, "class_labels": vector}
    refused(plain, twice, r"given twice \['class_labels'\]")
    for cond in ({}, None):
        refused(plain, cond, r"missing \['class_labels'\]")
    unlabeled = DiffusersVelocity(conditional_unet())
    refused(unlabeled, {"class_labels": torch.arange(3)}, r"without effect \['class_labels'\]")
    for num_times in (1, 2):
        labels = {"class_labels": torch.arange(3)}
        without = unet2d((1, 8, 8), width=8, num_times=num_times)
        refused(without, labels, r"without effect \['class_labels'\]")
        for classes in (None, NULL):
            velocity = unet2d((1, 8, 8), classes, width=8, num_times=num_times)
            refused(velocity, {"vector": vector}, r"unknown \['vector'\]")
        refused(velocity, {}, r"missing \['class_labels'\]")
        refused(velocity, vector[:, 0], "cond must hold integer labels, got torch.float32")
        refused(velocity, {"class_labels": vector[:, 0]}, "cond must hold integer labels")


def test_no_condition_is_an_empty_one():
    x, t, _ = inputs(3)
    net = conditional_unet()
    expected = net(x, 1000 * t, None).sample
    for cond in (None, {}):
        assert torch.equal(DiffusersVelocity(net)(x, t, cond), expected)
        attending = DiffusersVelocity(conditional_unet(up="CrossAttnUpBlock2D"))
        refused(attending, cond, r"missing \['encoder_hidden_states'\]")


@pytest.mark.parametrize("num_times", [1, 2])
def test_labels_have_the_same_effect_by_any_name_and_type(num_times):
    velocity = stirred_unet(num_classes=NULL, num_times=num_times)
    x, t, label = inputs()
    t = t if num_times == 1 else torch.stack([t, t], 1)
    expected = velocity(x, t, label)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(velocity(x, t, label.to(dtype)), expected)
    assert torch.equal(velocity(x, t, {"class_labels": label}), expected)
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got values in \[5"):
        velocity(x, t, {"class_labels": torch.full((5,), 5)})


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 28, 28), (8, 16, 16)),
        ((3, 32, 32), (8, 16, 16)),
        ((1, 8, 8), (8, 16, 16)),
        ((1, 6, 6), (8, 16)),
        ((2, 7, 8), (8,)),
    ],
)
def test_unet_halves_while_sides_are_even(shape, widths):
    velocity = unet2d(shape, num_classes=NULL, width=8)
    assert velocity.net.config.block_out_channels == widths
    x = torch.randn(2, *shape)
    assert torch.equal(velocity(x, torch.rand(2), torch.tensor([0, NULL])), torch.zeros_like(x))


def test_every_parameter_of_a_unet_learns():
    velocity = unet2d((1, 8, 8), num_classes=NULL, width=8)
    x, t, label = inputs(5)
    optimizer = torch.optim.AdamW(velocity.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (velocity(x, t, label) - x).square().mean().backward()
        optimizer.step()
    dead = [n for n, p in velocity.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_states_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"x must have 1 channels, got shape \(2, 3, 8, 8\)"):
        unet2d((1, 8, 8), width=8)(torch.zeros(2, 3, 8, 8), torch.rand(2))


def test_sides_that_levels_cannot_halve_are_told():
    velocity = stirred_unet()  # two levels below the first, with attention
    x = torch.randn(2, 1, 10, 8)
    with pytest.raises(
        ValueError, match=r"sides that are multiples of 4 .* got shape .2, 1, 10, 8"
    ):
        velocity(x, torch.rand(2))
    assert velocity(x[:, :, :8], torch.rand(2)).shape == (2, 1, 8, 8)


def test_input_errors():
    x, t, label = inputs()
    velocity = unet2d((1, 8, 8), num_classes=NULL, width=8)
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got values in \[5"):
        velocity(x, t, torch.full((5,), 5))
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got None"):
        velocity(x, t)
    with pytest.raises(ValueError, match="cond must be None for a network without num_classes"):
        unet2d((1, 8, 8), width=8)(x, t, label)
    with pytest.raises(ValueError, match=r"t must have shape \(5,\), got \(5, 2\)"):
        velocity(x, torch.rand(5, 2), label)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\), got \(2,\)"):
        unet2d((2,))
    with pytest.raises(ValueError, match="multipliers must be at least 1, got 0"):
        unet2d((1, 8, 8), multipliers=())
