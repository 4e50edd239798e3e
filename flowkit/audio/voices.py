"""The velocity of a voice conversion, and what all of its recordings share."""

from collections.abc import Mapping

from torch import Tensor, nn

from flowkit.audio.content import PhoneRecognizer
from flowkit.nn.sequence import SequenceDiT
from flowkit.types import Cond
from flowkit.velocity import Velocity

LEVEL = 0.05  # root mean square of a recording, -26 dB
SHORTEST = 0.5  # seconds of a reference
LEAST = 0.1  # seconds of what is said, several frames for a vocoder


def leveled(wave: Tensor) -> Tensor:
    """Return a wave ``(T,)`` at the level of all speech here, so that a recording's is no matter.

    Raises:
        ValueError: If the wave is silent.
    """
    level = float(wave.square().mean().sqrt())
    if not level > 0:
        raise ValueError("audio must not be silent, got only zeros")
    return wave * (LEVEL / level)


def check_reference(wave: Tensor, rate: int) -> None:
    """Require a reference from which a voice can be known.

    Raises:
        ValueError: If it is shorter than half a second.
    """
    if len(wave) < SHORTEST * rate:
        raise ValueError(
            f"reference must have at least {SHORTEST} s, got {len(wave) / rate:.2f} s; record a "
            "sentence or more"
        )


class VoiceVelocity(nn.Module):
    """Velocity of mel states ``(B, n_mels, T)`` that say what the source says in another voice.

    The condition holds the source as ``frames (B, n_mels, T)``. The network never sees it: it gets
    its content, see `flowkit.audio.PhoneRecognizer`, by a linear layer of its own. The voice comes
    as ``vector (B, G)``, an embedding of the speaker, and as ``tokens (B, N, W)``, frames of a
    reference that all frames attend to. The masks are those of `flowkit.nn.SequenceDiT`.

    The recognizer is frozen and part of the weights, so a checkpoint is a whole converter. Content
    and tokens are prepared once a solve, see ``bind``.

    Source: Takin-VC, 2024 (arXiv 2410.01350).

    Args:
        net: The network, built with ``frames`` of any number of channels, ``vector`` and
            ``tokens``.
        content: The recognizer; a training gives it its weights, see `take`.

    >>> import torch
    >>> net = SequenceDiT((64, 20), width=16, depth=1, heads=2, frames=8, vector=4, tokens=64)
    >>> velocity = VoiceVelocity(net, PhoneRecognizer(64, width=8, codes=4))
    >>> cond = {"frames": torch.randn(1, 64, 20), "vector": torch.randn(1, 4)}
    >>> cond["tokens"] = torch.randn(1, 9, 64)
    >>> velocity(torch.randn(1, 64, 20), torch.zeros(1), cond).shape
    torch.Size([1, 64, 20])
    """

    def __init__(self, net: SequenceDiT, content: PhoneRecognizer) -> None:
        super().__init__()
        if net.sizes["frames"] is None:
            raise ValueError("net must be built with frames, got frames=None")
        self.net, self.content = net, content.requires_grad_(False)
        self.fuse = nn.Linear(content.channels, net.sizes["frames"])

    def take(self, recognizer: PhoneRecognizer) -> None:
        """Take the weights of a recognizer.

        Raises:
            ValueError: If it has another size.
        """
        own, given = self.content.config, recognizer.config
        for name in ("n_mels", "width", "codes"):
            if own[name] != given[name]:
                raise ValueError(f"content.{name} must be {own[name]}, got {given[name]}")
        self.content.load_state_dict(recognizer.state_dict())
        self.content.config = dict(given)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, n_mels, T)`` at ``x`` and ``t (B,)``."""
        return self.net(x, t, self.encode(cond))

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> Velocity:
        """Return the velocity of one solve."""
        return self.net.bind(self.encode(cond), grid)

    def encode(self, cond: Cond) -> dict[str, Tensor]:
        """Return the condition of the network: the content in place of the source.

        Raises:
            TypeError: If ``cond`` is not a mapping with ``frames``.
        """
        if not isinstance(cond, Mapping) or "frames" not in cond:
            raise TypeError("cond must be a mapping with the source as frames")
        mask = cond.get("frame_mask")
        content = self.content.content(cond["frames"], None if mask is None else mask.bool())
        return {**cond, "frames": self.fuse(content.mT).mT}
