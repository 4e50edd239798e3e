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


@pytest.mark.parametrize("attends", [False, True])
def test_a_vector_joins_the_time_of_a_unet_and_needs_no_tokens(attends):
    torch.manual_seed(0)
    kind = "CrossAttnDownBlock2D" if attends else "DownBlock2D"
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", kind),
        mid_block_type="UNetMidBlock2D",
        up_block_types=(kind.replace("Down", "Up"), "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=6,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=5,
        resnet_time_scale_shift="scale_shift",
    ).eval()
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
    assert (velocity(x, t, {**cond, "vector": cond["vector"] + 1}) - found).abs().max() > 1e-4


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
