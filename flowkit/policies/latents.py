"""Latent actions: what happened between two observations, in a few codes, without any action."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_integer
from flowkit.policies.normalizer import ActionNormalizer


class Inferred(NamedTuple):
    """Latent actions and what training needs of them."""

    codes: Tensor
    """Numbers of codes ``(B, k)``."""
    latents: Tensor
    """Vectors before quantization ``(B, k, width)``."""
    quantized: Tensor
    """Their codes' vectors ``(B, k, width)``; gradients pass to ``latents``."""


class LatentActionModel(nn.Module):
    """Inverse dynamics through a bottleneck of codes, forward dynamics, and a prior of codes.

        codes = quantize(inverse(o, o′)),    o′ ≈ o + forward(o, codes),
        prior p(codes | o) = Π_j p(code_j | o, code_1, …, code_{j−1})

    The bottleneck of ``k`` codes out of ``num_codes`` keeps what the observation ``o`` does not
    tell about the later one ``o′``: which motion was made. Pairs of observations suffice. The
    prior draws one code after the other, so that they belong together: of two ways, codes drawn
    independently would mix both.

    Args:
        obs_size: Size ``O`` of an observation.
        num_codes: Codes of the book, at least 2.
        tokens: Codes ``k`` of a latent action.
        width: Size of a code's vector.
        hidden: Size of the hidden layers.

    Raises:
        ValueError: If a size is too small.

    Source: the tokenizer of Routray et al., *ViPRA: Video Prediction for Robot Actions*, 2025
    (arXiv 2511.07732), with 8 codes, for observations in place of videos. Quantization with a
    straight-through gradient: van den Oord et al., *Neural Discrete Representation Learning*, 2017
    (arXiv 1711.00937).

    >>> model = LatentActionModel(obs_size=4)
    >>> now, later = torch.randn(64, 4), torch.randn(64, 4)
    >>> model.observations.take(*torch.tensor([[0.0] * 4, [1.0] * 4, [-9.0] * 4, [9.0] * 4]))
    >>> codes = model.infer(now, later)
    >>> codes.shape, model.embed(codes).shape, model.draw(now, torch.Generator()).shape
    (torch.Size([64, 4]), torch.Size([64, 4, 16]), torch.Size([64, 4]))
    """

    def __init__(
        self,
        obs_size: int,
        num_codes: int = 8,
        tokens: int = 4,
        width: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        check_integer(num_codes, "num_codes", 2)
        sizes = {"obs_size": obs_size, "tokens": tokens, "width": width, "hidden": hidden}
        for name, size in sizes.items():
            check_integer(size, name, 1)
        self.num_codes, self.tokens, self.width = num_codes, tokens, width
        self.observations = ActionNormalizer(obs_size, outside="keep")
        self.inverse = _perceptron(2 * obs_size, hidden, tokens * width)
        self.forwards = _perceptron(obs_size + tokens * width, hidden, obs_size)
        self.prior = _perceptron(obs_size + tokens * width + tokens, hidden, num_codes)
        self.book = nn.Parameter(torch.randn(num_codes, width))

    def quantize(self, now: Tensor, later: Tensor) -> Inferred:
        """Infer latent actions from normalized observations ``(B, O)``."""
        latents = self.inverse(torch.cat([now, later - now], 1))
        latents = latents.reshape(len(now), self.tokens, self.width)
        codes = torch.cdist(latents, self.book.expand(len(now), -1, -1)).argmin(2)
        return Inferred(codes, latents, latents + (self.embed(codes) - latents).detach())

    def predict(self, now: Tensor, quantized: Tensor) -> Tensor:
        """Return the change ``(B, O)`` of a normalized observation under a latent action."""
        return self.forwards(torch.cat([now, quantized.flatten(1)], 1))

    def logits(self, now: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of the prior ``(B, k, num_codes)`` for normalized observations.

        Those of a code depend on the codes before it, and on no later one.
        """
        places = torch.eye(self.tokens, device=now.device).expand(len(now), -1, -1)
        before = torch.ones_like(places).tril(-1)[..., None]
        known = (self.embed(codes).detach()[:, None] * before).flatten(2)
        return self.prior(torch.cat([now[:, None].expand(-1, self.tokens, -1), known, places], 2))

    @torch.no_grad()
    def infer(self, obs: Tensor, future: Tensor) -> Tensor:
        """Return the codes ``(B, k)`` between raw observations ``(B, O)``."""
        normal = self.observations.normalize
        return self.quantize(normal(obs), normal(future)).codes

    @torch.no_grad()
    def draw(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw codes ``(B, k)`` from the prior, for raw observations ``(B, O)``."""
        now = self.observations.normalize(obs)
        codes = torch.zeros(len(obs), self.tokens, dtype=torch.long, device=obs.device)
        for place in range(self.tokens):
            shares = F.softmax(self.logits(now, codes)[:, place], -1).to(generator.device)
            codes[:, place] = torch.multinomial(shares, 1, generator=generator)[:, 0].to(obs.device)
        return codes

    def embed(self, codes: Tensor) -> Tensor:
        """Return the vectors ``(B, k, width)`` of codes ``(B, k)``."""
        return F.embedding(codes, self.book)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a perceptron of two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, outputs),
    )
