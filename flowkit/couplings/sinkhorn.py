"""Entropic transport plans: Sinkhorn's iteration with annealing and Newton steps.

Sinkhorn's iteration alone needs a number of iterations that grows like ``cost / reg``. Here, the
temperature falls in stages, and where the iteration is slow, a Newton step on the dual takes its
place. One iteration of either kind takes two products of the kernel with a vector.
"""

import math
from typing import NamedTuple

import numpy as np

FACTOR = 4  # of two temperatures in turn
STAGES = 20  # at most; beyond 4²⁰, float64 has no digits left for cost / reg
# Errors of marginals before the last stage, relative to the marginals. Potentials of a sharp plan
# are only as good as those of the plan before it.
LOOSE = 0.01
SLOW = 0.5  # the error must fall by this factor, or a Newton step comes next
FLOOR = -300.0  # logarithm of the least entry of a kernel; subnormal numbers are slow
RANGE = 1e20  # of scalings; larger ones are absorbed by the kernel
REACH = 20.0  # of a Newton step, in units of the temperature


def sinkhorn(cost: np.ndarray, reg: float, max_iters: int, tol: float) -> tuple[np.ndarray, float]:
    """Return the plan ``(N, M)`` of `transport.entropic_plan`, and the error of its marginals.

    Columns of the plan sum to ``1 / M``. The error is the Euclidean norm of the difference of its
    row sums to ``1 / N``. Each stage starts from a linear extrapolation of the last two stages, as
    potentials are smooth in the temperature.

    Args:
        cost: ``(N, M)`` float64, finite.
        reg: Positive, in units of the cost.
        max_iters: Number of iterations, over all stages.
        tol: Error that ends the iteration.

    Sources: B. Schmitzer, *Stabilized sparse scaling algorithms for entropy regularized transport
    problems*, 2019 (absorption and ε-scaling); C. Brauer, C. Clason, D. Lorenz and B. Wirth, *A
    Sinkhorn-Newton method for entropic optimal transport*, 2017 (arXiv 1710.06635). Here, Newton's
    method sees the dual as a function of the row potentials alone, and takes turns with Sinkhorn's
    iteration.

    >>> plan, error = sinkhorn(np.array([[0.0, 1.0], [1.0, 0.0]]), 0.1, 100, 1e-6)
    >>> plan.round(4)
    array([[0.5, 0. ],
           [0. , 0.5]])
    """
    f, g = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
    steps = f, g
    ratio = min(max(float(cost.std()) / reg, 1), FACTOR**STAGES)
    first = int(math.log(ratio, FACTOR))
    for stage in range(first, -1, -1):
        temperature = reg * FACTOR**stage
        scaling = _Scaling(cost, f + steps[0], g + steps[1], temperature, max_iters)
        scaling.balance(max(tol, LOOSE / math.sqrt(len(f))) if stage else tol)
        new = scaling.potentials()
        if stage < first:
            steps = (new[0] - f) / FACTOR, (new[1] - g) / FACTOR
        (f, g), max_iters = new, scaling.left
    state = scaling.state
    return state.u[:, None] * scaling.kernel * state.v, state.error


class _State(NamedTuple):
    """Scalings ``u (N,)`` and ``v (M,)`` of a kernel ``K``, whose columns balance."""

    u: np.ndarray
    v: np.ndarray
    product: np.ndarray  # K v
    rows: np.ndarray  # u K v, the row sums of the plan
    error: float
    dual: float  # ⟨log u⟩ + ⟨log v⟩, which the balanced plan makes largest


class _Scaling:
    """The plan ``diag(u) K diag(v)`` at one temperature.

    Attributes:
        kernel: ``K = exp((f ⊕ g − cost) / temperature)``, with potentials ``f, g`` such that the
            largest entry of every row and of every column is 1.
        left: Iterations that are left.
    """

    def __init__(
        self, cost: np.ndarray, f: np.ndarray, g: np.ndarray, temperature: float, left: int
    ) -> None:
        self.cost, self.temperature, self.left = cost, temperature, left
        self._absorb(f, g)

    def _absorb(self, f: np.ndarray, g: np.ndarray) -> None:
        """Make the kernel of the potentials ``f (N,)`` and ``g (M,)``, up to maxima."""
        log = f[:, None] - self.cost
        log += g
        row = log.max(1)
        log -= row[:, None]
        column = log.max(0)
        log -= column
        log /= self.temperature
        self.f, self.g = f - row, g - column
        self.kernel = np.exp(np.maximum(log, FLOOR, out=log), out=log)
        self.state = self._scaled(np.ones_like(f))

    def _scaled(self, u: np.ndarray) -> _State:
        """Balance the columns."""
        v = 1 / (u @ self.kernel)
        v /= len(v)
        product = self.kernel @ v
        rows = u * product
        short = rows - 1 / len(u)
        dual = float(np.log(u).mean() + np.log(v).mean())
        return _State(u, v, product, rows, math.sqrt(short @ short), dual)

    def potentials(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``f (N,)`` and ``g (M,)`` of the plan ``exp((f ⊕ g − cost) / temperature)``."""
        f = self.f + self.temperature * np.log(self.state.u)
        return f, self.g + self.temperature * np.log(self.state.v)

    def balance(self, tol: float) -> None:
        """Iterate until the row sums are off by at most ``tol``."""
        last = math.inf
        while self.state.error > tol and self.left > 0:
            if self.state.error > SLOW * last:
                self._search(self._direction(tol))
                last = math.inf
            else:
                last = self.state.error
                self.state = self._scaled(1 / (len(self.f) * self.state.product))
                self.left -= 1
            u, v = self.state.u, self.state.v
            if max(u.max(), v.max()) > RANGE or min(u.min(), v.min()) < 1 / RANGE:
                self._absorb(*self.potentials())

    def _direction(self, tol: float) -> np.ndarray:
        """Return the Newton direction of ``log u``, by conjugate gradients.

        With balanced columns, the dual is a concave function of ``log u``. Its gradient is
        ``1/N − r`` and its Hessian ``−(diag(r) − M P Pᵀ)``, for a plan ``P`` with row sums ``r``.
        The diagonal preconditions. A tenth of the residual is left for the next Newton step.
        """
        u, v, _, rows, _, _ = self.state
        x, residual = np.zeros_like(u), 1 / len(u) - rows
        z = residual / rows
        direction, size = z, float(residual @ z)
        goal = 0.01 * size
        weight = len(v) * v * v
        while size > goal and residual @ residual > tol * tol / 4 and self.left > 0:
            self.left -= 1
            image = rows * direction
            image -= u * (self.kernel @ (weight * ((u * direction) @ self.kernel)))
            curvature = float(direction @ image)
            # Below, rounding decides: parts of the plan hardly exchange mass.
            if curvature <= 1e-12 * float(direction @ (rows * direction)):
                break
            x += (size / curvature) * direction
            residual -= (size / curvature) * image
            z = residual / rows
            before, size = size, float(residual @ z)
            direction = z + (size / before) * direction
        return x

    def _search(self, x: np.ndarray) -> None:
        """Move ``log u`` along ``x`` as far as the dual grows; else stay, for Sinkhorn's step."""
        start, far = self.state, float(np.abs(x).max())
        slope = float(x @ (1 / len(x) - start.rows))
        step = min(1.0, REACH / far) if far else 0.0
        while step > 1e-3 and self.left > 0:
            self.left -= 1
            state = self._scaled(start.u * np.exp(step * x))
            # Close to the solution, the growth of the dual drowns in rounding.
            if state.dual - start.dual >= 0.1 * step * slope or state.error < start.error / 2:
                self.state = state
                return
            step /= 4
