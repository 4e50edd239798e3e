"""A velocity of chunks that knows the numbers of its robot, and the policy that it makes."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from flowkit.checks import check_integer
from flowkit.nn.sequence import SequenceDiT
from flowkit.policies.latents import LatentActionModel
from flowkit.policies.normalizer import ActionNormalizer
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import Velocity

RAW = ("image", "future", "codes")  # parts of a condition that the network sees encoded


class ImageEncoder(nn.Module):
    """Small convolutional network from a picture and an observation to one vector.

        vector = A o + B flatten(maps(picture))

    Three convolutions, each of half the side, give maps of features; the matrix ``B`` reads each
    feature at each place. So the place of a small thing is one linear step away, and is learned
    from few pictures.

    Args:
        obs_size: Size ``O`` of an observation.
        image_size: Side ``W`` of a picture in pixels.
        channels: Channels ``C`` of a picture.
        size: Size ``G`` of the vector.
        width: Channels of the first layer; the others have twice as many.

    Raises:
        ValueError: If a size is below 1; on a call, if a picture has another shape.

    >>> encoder = ImageEncoder(obs_size=2)
    >>> encoder(torch.zeros(5, 3, 84, 84, dtype=torch.uint8), torch.zeros(5, 2)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        obs_size: int,
        image_size: int = 84,
        channels: int = 3,
        size: int = 64,
        width: int = 16,
    ) -> None:
        super().__init__()
        sizes = {"obs_size": obs_size, "image_size": image_size, "channels": channels}
        for name, value in {**sizes, "size": size, "width": width}.items():
            check_integer(value, name, 1)
        self.image_size, self.channels = image_size, channels
        self.maps = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        side = -(-image_size // 8)
        self.seen = nn.Linear(2 * width * side**2, size)
        self.known = nn.Linear(obs_size, size)

    def forward(self, image: Tensor, obs: Tensor) -> Tensor:
        """Return the vector ``(B, G)`` of pictures ``(B, C, W, W)`` in bytes and ``obs (B, O)``."""
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"image must have shape (B, {', '.join(map(str, expected))}) for this policy, got "
                f"{tuple(image.shape)}"
            )
        return self.known(obs) + self.seen(self.maps(image.to(self.seen.weight.dtype) / 127.5 - 1))


class PolicyVelocity(nn.Module):
    """Velocity of chunks ``(B, D, H)`` of normalized actions, under raw observations.

    It holds the statistics of actions and observations as buffers, so a checkpoint is a whole
    policy. All that depends on the observation alone is computed once a solve, see ``bind``: the
    network's prefix, the vector of a picture, the latent action.

    Args:
        net: The network, built with ``vector`` of the size of the observation, or of the encoder's
            vector, and with ``tokens`` of the size of a latent action's.
        obs_size: Size ``O`` of an observation.
        encoder: Network from a picture and the normalized observation to the vector, called as
            ``encoder(image, obs)``, with the side of its pictures as ``image_size``, such as
            `ImageEncoder`; None without pictures.
        latents: A trained `LatentActionModel`, which is not trained further. In training it infers
            the latent action from the observation after the chunk; a rollout draws one, see
            `ChunkPolicy`.

    Raises:
        ValueError: If the latent actions are of observations of another size.

    >>> net = SequenceDiT((2, 14), width=16, depth=1, heads=2, vector=4)
    >>> velocity = PolicyVelocity(net, obs_size=4)
    >>> velocity.learn(torch.randn(9, 2), torch.randn(9, 4))
    >>> velocity(torch.zeros(1, 2, 14), torch.zeros(1), {"vector": torch.zeros(1, 4)}).shape
    torch.Size([1, 2, 14])
    """

    def __init__(
        self,
        net: SequenceDiT,
        obs_size: int,
        encoder: nn.Module | None = None,
        latents: LatentActionModel | None = None,
    ) -> None:
        super().__init__()
        if latents is not None and latents.observations.size != obs_size:
            raise ValueError(
                f"latents must be of observations of size {obs_size}, got "
                f"{latents.observations.size}"
            )
        self.net, self.encoder = net, encoder
        self.latents = None if latents is None else latents.requires_grad_(False)
        self.actions = ActionNormalizer(net.shape[0])
        self.observations = ActionNormalizer(obs_size, outside="keep")

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, H)`` of a chunk."""
        return self.net.shape

    @property
    def image_size(self) -> int | None:
        """Side of the pictures that the policy sees, in pixels; None for one without pictures.

        Raises:
            ValueError: If the encoder does not say it.
        """
        if self.encoder is None:
            return None
        size = getattr(self.encoder, "image_size", None)
        if not isinstance(size, int):
            raise ValueError(
                "encoder must have image_size, the side of its pictures in pixels, got "
                f"{type(self.encoder).__name__} with {size}"
            )
        return size

    def take(self, actions: ActionNormalizer, observations: ActionNormalizer) -> None:
        """Take the statistics of demonstrations.

        Raises:
            ValueError: If the demonstrations have other sizes.
        """
        for name, own, given in (
            ("actions", self.actions, actions),
            ("observations", self.observations, observations),
        ):
            if own.size != given.size:
                raise ValueError(f"{name} must have {own.size} dimensions, got {given.size}")
            own.take(*given.buffers())

    def learn(self, actions: Tensor, observations: Tensor, kind: str = "std") -> None:
        """Take the statistics of actions ``(N, D)`` and observations ``(N, O)``."""
        seen = ActionNormalizer.fit(observations, may_be_constant=True)
        self.take(ActionNormalizer.fit(actions, kind), seen)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, D, H)`` under ``cond`` of observations, see `chunks`."""
        return self.net(x, t, self.encode(cond))

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> Velocity:
        """Return the velocity of one solve."""
        return self.net.bind(self.encode(cond), grid)

    def encode(self, cond: Cond) -> dict[str, Tensor]:
        """Return the condition of the network for observations.

        Args:
            cond: ``vector (B, O)``, with an encoder ``image (B, C, H, W)``, and with latent actions
                either their ``codes (B, k)`` or the observation after the chunk, ``future (B, O)``.

        Raises:
            TypeError: If ``cond`` is not a mapping.
            ValueError: If a part is missing, or there is an image without an encoder.
        """
        if not isinstance(cond, Mapping) or "vector" not in cond:
            raise TypeError("cond must be a mapping with the observation as vector")
        found = {key: value for key, value in cond.items() if key not in RAW}
        found["vector"] = self.observations.normalize(cond["vector"])
        if ("image" in cond) != (self.encoder is not None):
            state = "hold" if self.encoder is not None else "not hold"
            raise ValueError(f"cond must {state} image for this policy, got {', '.join(cond)}")
        if self.encoder is not None:
            found["vector"] = self.encoder(cond["image"], found["vector"])
        if self.latents is not None:
            found["tokens"] = self.latents.embed(self._codes(self.latents, cond))
        return found

    def _codes(self, latents: LatentActionModel, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of a condition, given or inferred."""
        if "codes" in cond:
            return cond["codes"]
        if "future" not in cond:
            raise ValueError(
                f"cond must hold codes or future for this policy, got {', '.join(cond)}; "
                "demonstrations give future with data.future=true"
            )
        return latents.infer(cond["vector"], cond["future"])


class ChunkPolicy:
    """Policy that decodes a chunk of actions from noise: ``policy(obs) -> (H, D)``.

    All that it draws, noise and the codes of latent actions, comes from its own generator.

    Args:
        velocity: The trained velocity.
        sampler: Solver and grid; 10 Euler steps by default.
        noise: Whether a chunk starts from noise; False starts from 0, for a regression.

    >>> net = SequenceDiT((2, 14), width=16, depth=1, heads=2, vector=4)
    >>> velocity = PolicyVelocity(net, obs_size=4)
    >>> velocity.learn(torch.randn(9, 2), torch.randn(9, 4))
    >>> ChunkPolicy(velocity)(torch.zeros(4)).shape
    torch.Size([14, 2])
    """

    def __init__(
        self, velocity: PolicyVelocity, sampler: ODESampler | None = None, noise: bool = True
    ) -> None:
        self.velocity, self.noise = velocity, noise
        self.sampler = ODESampler(10) if sampler is None else sampler
        self.generator = torch.Generator()
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: what it draws follows from a seed."""
        self.generator.manual_seed(seed)

    @torch.no_grad()
    def __call__(self, obs: Any, prefix: Tensor | None = None) -> Tensor:
        """Return a chunk ``(H, D)`` for an observation ``(O,)``, or a mapping with an image.

        Args:
            obs: The observation: an array, or a mapping of ``vector (O,)`` and
                ``image (C, H, W)``.
            prefix: Actions ``(p, D)`` that begin the chunk and are held fixed: at each time of the
                solve the state of these frames is that of the path from the noise to them.
        """
        weights = next(self.velocity.parameters())
        given = obs if isinstance(obs, Mapping) else {"vector": obs}
        cond = {key: torch.as_tensor(np.asarray(value))[None] for key, value in given.items()}
        cond = {
            key: value.to(weights.device, value.dtype if key == "image" else weights.dtype)
            for key, value in cond.items()
        }
        x0 = torch.randn(1, *self.velocity.shape, generator=self.generator) * self.noise
        x0 = x0.to(weights)
        if (latents := self.velocity.latents) is not None:
            cond["codes"] = latents.draw(cond["vector"], self.generator)
        hold = None if prefix is None else self._holding(x0, prefix.to(weights))
        x = self.sampler.solve(cast(Velocity, self.velocity), x0, cond, callback=hold).x
        chunk = self.velocity.actions.denormalize(x[0].T).cpu()
        return chunk if prefix is None else torch.cat([prefix.to(chunk), chunk[len(prefix) :]])

    def _holding(self, x0: Tensor, prefix: Tensor) -> Any:
        """Return the callback that holds the first actions of a chunk on their path."""
        size, target = len(prefix), self.velocity.actions.normalize(prefix).T

        def hold(step: int, t: float, x: Tensor) -> Tensor:
            held = x.clone()
            held[..., :size] = torch.lerp(x0[..., :size], target.expand_as(x0[..., :size]), t)
            return held

        return hold
