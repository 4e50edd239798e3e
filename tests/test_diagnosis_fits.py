"""Fits of a diagnosis: their numbers, and how much they hold at once."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowkit.diagnosis.examples import Watched, draw_examples
from flowkit.diagnosis.fits import fit_of
from flowkit.diagnosis.readings import Search
from flowkit.exact import GaussianFlow
from flowkit.paths import Linear
from tests.test_diagnosis import COUNT, FLOW, seeded


class Largest(TorchFunctionMode):
    """Remembers the bytes of the largest tensor that a function has returned."""

    bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, found.nbytes if type(found) is Tensor else 0)
        return found


def test_a_fit_holds_a_small_part_of_the_states():
    x0, x1 = torch.randn(2, 40, 768, generator=seeded())
    examples = draw_examples(x0, x1, None, Linear(), seeded())
    v, states = GaussianFlow(0.0, 1.0)(examples.x_t, examples.t), examples.x_t.nbytes
    search = Search(Watched(lambda x, t, cond: x), examples, Linear(), seeded(), v, x1)
    with Largest() as largest:
        fit_of(v, examples, x1, Linear(), seeded())
        assert largest.bytes < 0.35 * states  # 32 of 1040 rows, 5 terms in float64
    with Largest() as largest:
        search.best()  # it holds all outputs of the network
        assert largest.bytes <= states


def test_a_fit_is_that_of_all_rows_at_once():
    x0, x1, labels = FLOW.draw(COUNT, seeded())
    examples = draw_examples(x0, x1, labels, Linear(), seeded())
    v = 0.8 * FLOW(examples.x_t, examples.t, labels[examples.pair])
    fit = fit_of(v, examples, x1, Linear(), seeded(1))
    half = torch.randperm(COUNT, generator=seeded(1)) < COUNT / 2
    t, own = examples.t[:, None].double(), half[examples.pair]
    mean, var = (
        torch.where(own[:, None], f(x1[~half].double()), f(x1[half].double()))
        for f in (lambda x: x.mean(0), lambda x: x.var(0))
    )
    slope = (t * var - (1 - t)) / (t**2 * var + (1 - t) ** 2)
    simple = mean + slope * (examples.x_t - t * mean)
    features = torch.stack([v.double(), examples.x_t.double(), simple, torch.ones_like(simple)], -1)
    u, left = examples.u.double(), examples.u.double() - v
    gain, mask = torch.zeros(len(t), dtype=torch.float64), []
    for k in range(8):
        here = (examples.t >= k / 8) & (examples.t < (k + 1) / 8)
        mask.append(here)
        for side in (own, ~own):
            a, b = features[here & side].flatten(0, 1), left[here & side].flatten()
            weights = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
            rest = here & ~side
            better = left[rest] - features[rest] @ weights
            gain[rest] = (left[rest].square() - better.square()).mean(1)
    energy, loss = u.square().mean(1), left.square().mean(1)
    other = (u - simple).square().mean(1)
    for k, here in enumerate(mask):
        size = energy[here].mean()
        found = torch.tensor([fit.explained[k].value, fit.worse[k].value, fit.avoidable[k].value])
        wanted = [1 - loss[here].mean() / size, (loss - other)[here].mean() / size]
        wanted.append(gain[here].mean() / loss[here].mean())
        assert torch.allclose(found.double(), torch.stack(wanted), atol=1e-5)
    factor = (u * v).sum() / v.double().square().sum()
    scaled = (u - factor * v).square().mean() / loss.mean()
    assert fit.total.value == pytest.approx((gain.mean() / loss.mean()).item(), rel=1e-5)
    assert fit.factor == pytest.approx(factor.item(), rel=1e-9)
    assert fit.by_factor == pytest.approx(1 - scaled.item(), rel=1e-6)
