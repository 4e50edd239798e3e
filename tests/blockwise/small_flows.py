"""Small trunks, stacks and flows that the tests of blockwise flows share."""

import torch

from flowkit.blockwise import (
    Blockwise,
    BlockwiseDiT,
    BlockwiseMLP,
)


class Line:
    """``F = A + t B``, stacks that add features, and the exact residual: length of segment × B."""

    def __init__(self, edges):
        generator = torch.Generator().manual_seed(3)
        self.a, self.b = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        self.edges = torch.tensor(edges, dtype=torch.float64)
        self.calls = []

    def features(self, x, t, cond):
        self.calls.append(t[0].item())
        scale = 1.0 if cond is None else cond[:, None].double()
        return scale * (self.a + t[:, None] * self.b)

    def velocity(self, x, t, cond, h):
        return h.to(x) - x * t[:, None]

    def __call__(self, x, t, cond=None):
        m = torch.bucketize(t.contiguous(), self.edges[1:-1].to(t))  # an edge ends a segment
        scale = 1.0 if cond is None else cond[:, None].double()
        return scale * (self.edges[m + 1] - self.edges[m])[:, None] * self.b


def line_flow(edges, mode, residual=True):
    line = Line(edges)
    stacks = [line] * (len(edges) - 1)
    return Blockwise(line, stacks, edges, line if residual else None, mode)


def randomised(net, std=0.3):
    """Weights without the zeros of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * std / max(1, p.shape[-1]) ** 0.5)
    return net.eval().requires_grad_(False)


def tiny_dit(**options):
    options = {"edges": 3, "width": 32, "heads": 2, "trunk_depth": 2, "stack_depth": 1, **options}
    return BlockwiseDiT((1, 8, 8), num_classes=3, residual_depth=1, **options)


def tiny_mlp(**options):
    return BlockwiseMLP((2,), **{"edges": 3, "width": 16, "residual_depth": 1, **options})


FLOWS = {"dit": (tiny_dit, (1, 8, 8)), "mlp": (tiny_mlp, (2,))}
