"""Networks in files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flowkit.nn.stored import Stored


class Scale(Stored):
    def __init__(self, width, name="scale"):
        super().__init__()
        self.config, self.name = {"width": width, "name": name}, name
        self.scale = nn.Parameter(torch.arange(float(width)))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.scale * x)


def test_a_network_comes_back_as_it_was(tmp_path):
    net, x = Scale(3, "other"), torch.randn(5, 3)
    net(x)  # moves the norm's averages
    net.save(tmp_path / "net.safetensors")
    again = Scale.load(tmp_path / "net.safetensors")
    assert (again.name, again.training) == ("other", False)
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(x), net.eval()(x))
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_what_is_no_stored_network_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"file must be written by Scale\.save, got"):
        Scale.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"file must be one of Scale\.save, got .*missing"):
        Scale.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"file must be written by Scale\.save, got .*text"):
        Scale.load(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", {"config": "no JSON"})
    with pytest.raises(ValueError, match=r"file must be JSON, got .*odd"):
        Scale.load(tmp_path / "odd.safetensors")


class Renamed(Stored):
    def __init__(self, size, name="scale"):
        super().__init__()


class Wider(Scale):
    def __init__(self, width, name="scale"):
        super().__init__(width + 1, name)


class Narrow(Scale):
    def __init__(self, width, name="scale"):
        if width > 2:
            raise ValueError(f"width must be at most 2, got {width}")
        super().__init__(width, name)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Renamed, "unexpected keyword argument 'width'"),
        (Wider, r"size mismatch for scale"),
        (Narrow, "width must be at most 2, got 3"),
    ],
)
def test_a_network_of_another_version_is_told_as_such(tmp_path, kind, reason):
    """Its argument has another name, its layers another size, or its rules are stricter."""
    Scale(3).save(tmp_path / "net.safetensors")
    words = f"file must be of this version's {kind.__name__}, got .*net.* of another version or .*"
    with pytest.raises(ValueError, match=words + reason):
        kind.load(tmp_path / "net.safetensors")
