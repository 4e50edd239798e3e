"""Pictures of sounds while training: what they show of padded samples."""

from types import SimpleNamespace

import torch

from flowkit.audio import LogMel, MelStates
from flowkit.modules import SampleSounds

STATES = MelStates(LogMel())


def test_padding_of_a_sample_is_shown_as_silence(tmp_path, monkeypatch):
    """A solve leaves noise there; the batch has more rows than the picture."""
    shown = {}
    monkeypatch.setattr(
        "flowkit.modules.sounds.save_spectrograms",
        lambda panels, *_, **__: shown.update(panels),
    )
    lengths = torch.tensor([7, 12, 3])
    mask = torch.arange(12) < lengths[:, None]
    samples = 0.1 * torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0))
    cond = {"frames": torch.zeros(3, 64, 12), "tokens": torch.zeros(3, 5, 64), "frame_mask": mask}
    data = SimpleNamespace(states=STATES)
    pictures = SampleSounds(tmp_path, rows=2, sounds=0)
    pictures.save(samples, tmp_path / "step-1.png", 1, {"cond": cond}, data)
    assert list(shown) == [
        f"{name} {k}" for k in (0, 1) for name in ("reference", "source", "sample")
    ]
    decoded = STATES.decode(samples)
    silence = STATES.decode(torch.full((64, 5), STATES.silence))
    assert torch.equal(shown["sample 0"][:, :7], decoded[0, :, :7])
    assert torch.equal(shown["sample 0"][:, 7:], silence)
    assert torch.equal(shown["sample 1"], decoded[1])
