"""Mean velocities in closed form."""

import torch


def gaussian_mean(flow):
    """The mean velocity of a `GaussianFlow` from t to s, as a network of two times.

    Along the flow ``x_τ = τ mean + σ(τ) z`` with ``σ² = (1 − τ)² + τ² std²``.
    """

    def net(x, t, cond=None):
        t, s = (time.reshape(-1, *(1,) * (x.ndim - 1)) for time in t.unbind(1))
        width = [((1 - time) ** 2 + (time * flow.std) ** 2).sqrt() for time in (t, s)]
        z = (x - t * flow.mean) / width[0]
        moved = (s - t) * flow.mean + (width[1] - width[0]) * z
        step = torch.where(s == t, 1.0, s - t)
        return torch.where(s == t, flow(x, t.flatten()), moved / step)

    return net
