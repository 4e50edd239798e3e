"""Anderson acceleration of many small fixed-point iterations at once."""

import torch
from torch import Tensor

from flowkit.checks import expand_like


class Anderson:
    """Anderson acceleration of ``z ← z − η g(z)``, for every sample of a batch on its own.

    With the differences ``Δz_j``, ``Δg_j`` of consecutive iterates, the update is
    ``η g + Σ γ_j (Δz_j − η Δg_j)``, where ``γ`` minimizes ``‖g − Σ γ_j Δg_j‖``. Source: Walker &
    Ni, *Anderson Acceleration for Fixed-Point Iterations*, 2011, with mixing parameter ``η``.

    Args:
        memory: Number of differences that are kept. With 0 the update is ``η g``.

    >>> history, z = Anderson(memory=1), torch.tensor([[3.0]])
    >>> for _ in range(2):  # one difference solves g(z) = z
    ...     dz = -history.update(z, step=torch.tensor([0.1]))
    ...     history.remember(dz, dz, accepted=torch.tensor([True]))
    ...     z = z + dz
    >>> bool(z.abs() < 1e-5)
    True
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Return the update ``(B, *)``, which the caller subtracts from the states.

        Args:
            gradient: ``g (B, *)`` at the states.
            step: ``η (B,)``.
        """
        if not self.pairs:
            return expand_like(step, gradient) * gradient
        dz, dg = (torch.stack(part, 1).flatten(2) for part in zip(*self.pairs, strict=True))
        g = gradient.reshape(len(gradient), 1, -1)
        gram, right = torch.bmm(dg, dg.mT), torch.bmm(dg, g.mT)
        # Forgotten pairs are zero. The ridge gives them the weight zero.
        finfo, diagonal = torch.finfo(gram.dtype), gram.diagonal(dim1=1, dim2=2)
        diagonal += 10 * finfo.eps * diagonal.sum(1, keepdim=True) + finfo.tiny
        weights = torch.linalg.solve_ex(gram, right).result.mT
        rest = torch.baddbmm(g, weights, dg, alpha=-1)
        return torch.baddbmm(expand_like(step, g) * rest, weights, dz).reshape(gradient.shape)

    def remember(self, dz: Tensor, dg: Tensor, accepted: Tensor) -> None:
        """Store one more pair of differences.

        Args:
            dz: Difference ``Δz (B, *)`` of the last two states.
            dg: Difference ``Δg (B, *)`` of their gradients.
            accepted: Booleans ``(B,)``. A sample with False forgets all of its own pairs.
        """
        if self.memory:
            self.pairs = [*self.pairs, (dz, dg)][-self.memory :]
            if not bool(accepted.all()):
                where = expand_like(accepted, dz)
                self.pairs = [(dz.where(where, 0), dg.where(where, 0)) for dz, dg in self.pairs]
