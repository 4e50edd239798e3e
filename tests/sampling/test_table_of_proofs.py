"""The tables of ``docs/samplers.md``: computed, asserted and compared with the page.

``python -m tests.sampling.test_table_of_proofs`` writes them into the page; rows of other toolkits
(extra ``bench``) are written where they are installed, and left as they are otherwise.
"""

import gc
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.optimize import brentq
from scipy.stats import norm
from torchdiffeq import odeint

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.sampling import ADAPTIVE, FIXED, MeanVelocity, ODESampler, SDESampler, sde
from tests.sampling.test_ode import Census
from tests.sampling.test_sde import Basis, moments

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"
EXACT = "exact"

PARTS = [(0.3, -2.0, 0.4), (0.7, 1.0, 0.6)]  # weight, mean, standard deviation
WEIGHTS, MEANS, STDS = torch.tensor(PARTS, dtype=torch.float64).T
MIXTURE, GAUSSIAN = MixtureFlow(WEIGHTS, MEANS[:, None], STDS), GaussianFlow(2.0, 0.5)
X0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "rk4": 4}
CALLS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 1, "rk4": 4}  # a step
CORRECTED = {"`euler`, `correct=True`": 1, "`euler`, `correct=3`": 3}


def solution():
    """In one dimension the flow keeps the order of points: quantiles of noise go to the data's."""
    return torch.tensor([[quantile(norm.cdf(x.item()), 1)] for x in X0], dtype=torch.float64)


def cdf(y, t):
    """The probability of values below ``y`` at a time ``t`` of `MIXTURE`."""
    return sum(w * norm.cdf(y, t * m, math.hypot(1 - t, t * s)) for w, m, s in PARTS)


def quantile(p, t):
    return brentq(lambda y: cdf(y, t) - p, -9, 9, xtol=1e-15)


def rms(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def order(errors):
    """From errors at some number of steps and at twice as many."""
    return math.log2(errors[0] / errors[1])


def states_held(solve):
    """Most states that live at an evaluation, the caller's and the velocity included."""
    gc.collect()
    gc.freeze()
    try:
        census = Census(1009 * 13)
        solve(census, torch.randn(1009, 13))
    finally:
        gc.unfreeze()
    return census.most


# --- the tables: rows of numbers by name ----------------------------------------------------------


def fixed_steps():
    """Errors on the mixture, and of going back to the noise and forth again."""
    x1, rows = solution(), {}
    for name in [*FIXED, *CORRECTED]:
        method, correct = (name, 0) if name in FIXED else ("euler", CORRECTED[name])

        def there(n, method=method):
            return rms(ODESampler(n, method)(MIXTURE, X0), x1)

        def back(n, method=method, correct=correct):
            noise = ODESampler(n, method).invert(MIXTURE, x1, correct=correct)
            return rms(ODESampler(n, method)(MIXTURE, noise.x), x1), noise.nfe

        if name in FIXED:
            errors, calls = [there(n) for n in (10, 100, 160, 320)], CALLS[name]
            held = states_held(ODESampler(8, method))
        else:
            errors, calls = [back(n)[0] for n in (10, 100, 160, 320)], correct
            held = states_held(lambda f, x, c=correct: ODESampler(8).invert(f, x, correct=c))
        shown = f"`{name}`" if name in FIXED else name
        rows[shown] = [order(errors[2:]), *errors[:2], back(100)[0], calls, held]
    rows["mean velocity, `euler`"] = means(x1)
    return rows


def means(x1):
    """Steps by the mean of the same velocity: exact at any number; the way back is not a mean."""
    exact = MeanVelocity(mean_velocity)
    assert all(rms(ODESampler(n)(exact, X0), x1) < 1e-12 for n in (1, 2, 10, 100))
    with pytest.warns(UserWarning, match="instantaneous"):
        noise = ODESampler(100).invert(exact, x1).x
    held = states_held(
        lambda f, x: ODESampler(8)(MeanVelocity(lambda x, t, cond: f(x, t[:, 0])), x)
    )
    return [EXACT, EXACT, EXACT, rms(ODESampler(100)(exact, noise), x1), 1, held]


def mean_velocity(x, t, cond=None):
    """The mean velocity of `MIXTURE` from t to s: points keep their quantile."""
    moved = []
    for x_t, (t_, s) in zip(x.flatten().tolist(), t.tolist(), strict=True):
        if t_ == s:
            moved.append(MIXTURE(x.new_tensor([[x_t]]), x.new_tensor([t_])).item())
        else:
            moved.append((quantile(cdf(x_t, t_), s) - x_t) / (s - t_))
    return x.new_tensor(moved)[:, None]


def adaptive():
    x1, rows = solution(), {}
    for method in ADAPTIVE:
        row = []
        for tol in (1e-3, 1e-5):
            sampler = ODESampler(1, method, rtol=tol, atol=tol)
            there = sampler.solve(MIXTURE, X0)
            again = sampler(MIXTURE, sampler.invert(MIXTURE, x1).x)
            row += [rms(there.x, x1), there.nfe, rms(again, x1)]
        rows[f"`{method}`"] = row
    return rows


def stochastic():
    """Mean and variance at the end, exactly: on a Gaussian flow a solve is affine."""
    rows, noise, sde._Noise = {}, sde._Noise, Basis
    try:
        for method in ("euler", "heun"):
            for diffusion in sde.DIFFUSIONS:
                errors = []
                for n in (10, 100, 200):
                    sampler = SDESampler(n, diffusion, 1.0, method)
                    mean, variance = moments(sampler, GAUSSIAN)
                    assert mean == pytest.approx(2, abs=1e-12)
                    errors.append(abs(math.sqrt(variance) - 0.5))
                rows[f"`{method}`, `{diffusion}`"] = [order(errors[1:]), *errors[:2]]
    finally:
        sde._Noise = noise
    for name, row in rows.items():
        method = name.split("`")[1]
        row += [CALLS[method], states_held(SDESampler(8, "sigma", 1.0, method))]
    return rows


def rounded(dtype):
    """A network that computes in its own type."""
    return lambda x, t, cond=None: GAUSSIAN(x.to(dtype).float(), t).to(dtype)


def bfloat16_states(n):
    """What no sampler here does: Euler steps of a state in bfloat16."""
    x = X0.bfloat16()
    for k in range(n):
        x = x + rounded(torch.bfloat16)(x, torch.full((len(x),), k / n)) / n
    return x


def precision():
    """What float32 changes, and what a network in bfloat16 changes of that."""
    rows, steps = {}, (10, 100, 1000)
    samplers = {f"`{method}`": lambda n, m=method: ODESampler(n, m) for method in FIXED}
    for method in ("euler", "heun"):
        name = f"`SDESampler`, `{method}`"
        samplers[name] = lambda n, m=method: SDESampler(n, "sigma", 1.0, m)
    for name, sampler in samplers.items():
        float32, half = [], []
        for n in steps:
            exact, single = (sampler(n)(GAUSSIAN, x) for x in (X0, X0.float()))
            float32.append(rms(single, exact))
            half.append(rms(sampler(n)(rounded(torch.bfloat16), X0.float()), single))
        rows[name] = [*float32, *half]
    exact = {n: ODESampler(n)(GAUSSIAN, X0) for n in steps}
    rows["`euler` by hand, states in bfloat16"] = ["", "", ""] + [
        rms(bfloat16_states(n), exact[n]) for n in steps
    ]
    return rows


def peers():
    """Other toolkits on the same grid: the error at the end, and evaluations."""
    x1, x0 = solution(), X0.float()

    def diffusers(n):
        scheduler, x = FlowMatchEulerDiscreteScheduler(), x0
        scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
        for t in scheduler.timesteps:  # its t is 1000 (1 − ours), its velocity points to the noise
            x = scheduler.step(-counted(x, 1 - t / 1000), t, x, return_dict=False)[0]
        return x

    def diffeq(n, method):
        times = torch.linspace(0, 1, n + 1)
        return odeint(lambda t, x: counted(x, t), x0, times, method=method)[-1]

    def facebook(n, method):
        from flow_matching.solver import ODESolver

        return ODESolver(counted).sample(x0, step_size=1 / n, method=method)

    def counted(x, t, **extras):
        nonlocal calls
        calls += 1
        return MIXTURE(x, t.expand(len(x)))

    loops = {"diffusers `FlowMatchEulerDiscreteScheduler`": ("euler", diffusers)}
    toolkits = {"torchdiffeq": diffeq}
    if find_spec("flow_matching"):
        toolkits["flow_matching"] = facebook
    for toolkit, solve in toolkits.items():
        for method in ("euler", "midpoint"):
            loops[f"{toolkit} `{method}`"] = method, lambda n, s=solve, m=method: s(n, m)
    rows = {}
    for name, (method, loop) in loops.items():
        row, calls = [], 0
        for n in (10, 100):
            calls = 0
            row += [rms(loop(n), x1), rms(ODESampler(n, method)(MIXTURE, x0), x1)]
        rows[name] = [*row, calls]
    return rows


BACK, CALLS_OF = "back and forth", "evaluations a step"
TABLES = {
    fixed_steps: ["fixed steps", "order", "10 steps", "100 steps", BACK, CALLS_OF, "states"],
    adaptive: ["adaptive", *["error", "evaluations", BACK] * 2],
    stochastic: ["stochastic", "weak order", "10 steps", "100 steps", CALLS_OF, "states"],
    precision: ["precision", *("10 steps", "100", "1000") * 2],
    peers: ["other toolkits", "10 steps", "flowkit", "100 steps", "flowkit", "evaluations"],
}


# --- the page -------------------------------------------------------------------------------------


def cell(value):
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if 0.5 < value < 10 else f"{value:.1e}"


def table(header, rows):
    lines = [
        header,
        ["---"] * len(header),
        *([name, *map(cell, row)] for name, row in rows.items()),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def written(header):
    """The place of a table in the page, and its rows."""
    page = PAGE.read_text()
    first = "| " + " | ".join(header) + " |\n"
    found = re.search(re.escape(first) + r"(\|.*\n)*", page)
    assert found, f"{PAGE} lacks the table of {header[0]}"
    lines = [line.strip("| ").split(" | ") for line in found[0].splitlines()[2:]]
    return found.span(), {name: row for name, *row in lines}


def assert_written(make, rows, factor):
    """The page has these rows; numbers may differ by a factor, counts may not."""
    _, page = written(TABLES[make])
    assert page.keys() >= rows.keys()
    assert make is peers or page.keys() == rows.keys()
    for name, row in rows.items():
        for number, text in zip(row, page[name], strict=True):
            if isinstance(number, float):
                # an order, or an error, which is written with two digits
                is_order = 0.5 < number < 10 and factor < 2
                allowed = 0.05 if is_order else max(factor - 1, 1 / 15) * number
                assert abs(float(text) - number) <= allowed, (name, number, text)
            else:
                assert text == cell(number), name


# --- the proofs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_fixed_steps():
    rows = fixed_steps()
    for method in FIXED:
        observed, ten, hundred, back, calls, _ = rows[f"`{method}`"]
        assert observed == pytest.approx(ORDERS[method], abs=0.1)
        assert hundred < ten / 3 ** ORDERS[method]
        assert back < 2.5 * hundred
        assert ODESampler(5, method).solve(MIXTURE, X0).nfe == 5 * calls + (method == "ab2")
    euler = rows["`euler`"][3]
    assert rows["mean velocity, `euler`"][3] < 1.5 * euler
    assert rows["`euler`, `correct=True`"][0] == pytest.approx(2, abs=0.1)
    assert rows["`euler`, `correct=3`"][3] < rows["`euler`, `correct=True`"][3] < euler / 30
    assert_written(fixed_steps, rows, 1.1)


@pytest.mark.slow
def test_adaptive():
    rows = adaptive()
    for coarse, _, _, fine, _, back in rows.values():
        assert fine < coarse / 20
        assert back < 20 * fine + 1e-4
    for method in ("dopri5", "dopri8", "bosh3", "adaptive_heun"):
        coarse, _, _, fine, _, _ = rows[f"`{method}`"]
        assert coarse < 10e-3
        assert fine < 50e-5
    assert_written(adaptive, rows, 1.1)


@pytest.mark.slow
def test_stochastic():
    rows = stochastic()
    for name, (observed, ten, hundred, _, _) in rows.items():
        exponent = 1 if name.startswith("`euler`") else 2
        assert observed == pytest.approx(exponent, abs=0.1)
        assert hundred < ten / 2**exponent
    assert_written(stochastic, rows, 1.1)


@pytest.mark.slow
def test_precision():
    """Rounding does not grow with the steps, unless it is that of states."""
    rows = precision()
    *_, by_hand = rows.values()
    for name, row in rows.items():
        if row is by_hand:
            continue
        assert max(row[:3]) < 5e-5, name
        assert max(row[3:]) < 0.015, name
        assert row[5] < by_hand[5] / 20, name
    assert by_hand[5] > 10 * by_hand[3]
    assert_written(precision, rows, 3)


def test_peers():
    """The same method on the same grid has the same error."""
    rows = peers()
    for name, (ten, our_ten, hundred, our_hundred, calls) in rows.items():
        assert ten == pytest.approx(our_ten, rel=0.01), name
        assert hundred == pytest.approx(our_hundred, rel=0.05), name
        assert calls == (200 if "midpoint" in name else 100)
    assert_written(peers, rows, 1.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for maker, columns in TABLES.items():
        (start, end), kept = written(columns)
        fresh = maker()
        if maker is peers:
            fresh = {**kept, **fresh}
        text = PAGE.read_text()
        PAGE.write_text(text[:start] + table(columns, fresh) + text[end:])
