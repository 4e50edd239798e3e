"""Low-rank adapters by their formula."""

import pytest
import torch
from torch import nn

from flowkit.nn.lora import add_lora, merge_lora

pytest.importorskip("peft")


def test_adapters_add_b_a_to_every_layer_and_merge_into_the_weights():
    """``W x + B A x`` with ``A`` of ``rank`` rows, for linear layers and convolutions."""
    generator, rank = torch.Generator().manual_seed(0), 2
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))
    plain = [nn.utils.parameters_to_vector(net[k].parameters()).clone() for k in (0, 2, 3)]
    x = torch.randn(6, 1, 4, 4, generator=generator)
    before = net(x)
    add_lora(net, rank)
    torch.testing.assert_close(net(x), before)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all("lora_" in name for name, _ in trained)
    for _, p in trained:
        p.data.copy_(torch.randn(p.shape, generator=generator))

    h = x
    for k in (0, 2, 3):
        layer = net[k]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape[0] == b.shape[1] == rank
        base = layer.get_base_layer()
        weight = base.weight + (b.flatten(1) @ a.flatten(1)).reshape(base.weight.shape)
        if k == 0:
            h = nn.functional.conv2d(h, weight, base.bias).flatten(1)
        else:
            h = nn.functional.linear(h, weight, base.bias)
    torch.testing.assert_close(net(x), h, rtol=1e-4, atol=1e-4)
    merged = merge_lora(net)
    torch.testing.assert_close(merged(x), h, rtol=1e-4, atol=1e-4)
    assert [type(m).__name__ for m in merged] == ["Conv2d", "Flatten", "Linear", "Linear"]
    torch.testing.assert_close(net(x), h, rtol=1e-4, atol=1e-4)
    for k, values in zip((0, 2, 3), plain, strict=True):
        kept = nn.utils.parameters_to_vector(net[k].get_base_layer().parameters())
        assert torch.equal(kept, values)


def test_ranks_below_1_and_networks_without_layers_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="net must have linear or convolution layers, got GELU"):
        add_lora(nn.GELU(), 1)
