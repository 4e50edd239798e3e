"""A flow as one graph from noise to data, in the formats of `torch.export` and of ONNX."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.autoencoders import Autoencoder
from flowkit.guidance import combine
from flowkit.sampling import MeanVelocity, ODESampler
from flowkit.types import Cond
from flowkit.velocity import Velocity

OPSET = 18  # of ONNX: the first with all operators of the exporter, for old runtimes, too
MANY = 64  # samples of the trace; diffusers' networks branch at 64 rows


class _Recorder:
    """A velocity whose k-th result is the k-th unit vector: it reads the solver's coefficients."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []
        self.times: list[tuple[float, float]] = []
        self.end = 1.0

    def begin_step(self, t_left: float, t_right: float) -> None:
        self.end = t_right

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        v = torch.zeros_like(x)
        v[0, len(self.points)] = 1
        self.points.append(x[0].clone())
        self.times.append((float(t), self.end))
        return v


def evaluations(sampler: ODESampler) -> Tensor:
    """Return a solve of fixed steps as a table with a row per evaluation of the velocity.

    Every such solver is linear in the velocities ``v_k = v(z_k, t_k)``, and the points ``z_k`` of
    its evaluations follow from a few of them:

        z_{k+1} = z_k + Σ_w d_{k,w} v_{k−w},    z_0 the noise,    the last point the data.

    The coefficients are read from the solver itself: it solves for a state that holds them.

    Args:
        sampler: A sampler of fixed steps.

    Returns:
        Rows ``[t_k, end of the step, d_{k,0}, d_{k,1}, …]`` in float64.

    >>> evaluations(ODESampler([0.0, 0.25, 1.0]))
    tensor([[0.0000, 0.2500, 0.2500],
            [0.2500, 1.0000, 0.7500]], dtype=torch.float64)
    """
    recorder = _Recorder()
    most = 4 * len(sampler.times)  # evaluations of rk4
    last = sampler(recorder, torch.zeros(1, most, dtype=torch.float64))[0]
    count = len(recorder.points)
    moves = torch.stack([*recorder.points, last]).diff(dim=0)[:, :count]
    rows, columns = moves.nonzero(as_tuple=True)
    width = int((rows - columns).max()) + 1
    bands = [F.pad(moves.diagonal(-w), (w, 0)) for w in range(width)]
    times = torch.tensor(recorder.times, dtype=torch.float64)
    return torch.cat([times, torch.stack(bands, 1)], 1)


class Solve(nn.Module):
    """The whole way from noise to a state of data: every step of the solver, guidance included.

    It is a loop over the rows of `evaluations`, so its graph holds the network once, for any number
    of steps. It is made to be traced, see `traced`.

    Args:
        velocity: The network, without guidance.
        sampler: A sampler of fixed steps.
        scale: Scale of classifier-free guidance; 1 is no guidance.
        null: The label that means *no label*, for guidance.
    """

    table: Tensor

    def __init__(
        self, velocity: Velocity, sampler: ODESampler, scale: float = 1.0, null: float = 0
    ) -> None:
        super().__init__()
        self.velocity, self.scale, self.null = velocity, scale, null
        self.means = isinstance(velocity, MeanVelocity) and sampler.method == "euler"
        self.register_buffer("table", evaluations(sampler).float())

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return states ``(B, *)`` for noise ``(B, *)`` and labels ``(B,)``."""
        from torch._higher_order_ops.scan import scan

        cond, plain = labels, torch.contiguous_format
        if self.scale != 1 and labels is not None:
            cond = torch.cat([labels, torch.full_like(labels, self.null)])

        def step(carry: tuple[Tensor, ...], row: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            z, *earlier = carry
            recent = [self._velocity(z, row[0], row[1], cond), *earlier]
            for w, v in enumerate(recent):
                z = z + row[2 + w] * v
            carry = z, *recent[:-1]  # of equal strides from row to row, and no tensor twice
            return tuple(one.clone(memory_format=plain) for one in carry), row[0].clone()

        width = self.table.shape[1] - 2
        start = (noise, *(torch.zeros_like(noise) for _ in range(width - 1)))
        last, _ = scan(step, start, self.table)
        return last[0]

    def _velocity(self, z: Tensor, t: Tensor, end: Tensor, cond: Tensor | None) -> Tensor:
        """Return the guided velocity; with guidance, both rows of a sample in one call."""
        count, guided = z.shape[0], self.scale != 1
        x = torch.cat([z, z]) if guided else z
        times = t.expand(x.shape[0])
        if self.means:
            v = cast(MeanVelocity, self.velocity).mean(x, times, end.expand(x.shape[0]), cond)
        else:
            v = self.velocity(x, times, cond)
        return combine(v[:count], v[count:], self.scale) if guided else v


class _Decode(nn.Module):
    """The decoder of an autoencoder, with its frozen parts where torch finds them."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.parts = nn.ModuleList(
            part for part in vars(autoencoder).values() if isinstance(part, nn.Module)
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.autoencoder.decode(states)


class _Chain(nn.Module):
    """A solve, then a decoder."""

    def __init__(self, solve: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.solve, self.decode = solve, decode

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.decode(self.solve(noise) if labels is None else self.solve(noise, labels))


def traced(
    solve: Solve, autoencoder: Autoencoder, shape: Sequence[int], labels: bool
) -> torch.export.ExportedProgram:
    """Return a graph from ``noise`` and ``labels`` to data, for batches of every size.

    Networks may take another branch for large batches: diffusers' do. The first trace takes the
    branch of large batches, and the second one sees a graph without branches.

    Args:
        solve: The solve.
        autoencoder: Decodes its result.
        shape: Shape of the noise of one sample.
        labels: True if samples have labels.

    Raises:
        ValueError: If a network cannot be traced, or its graph serves one size of a batch only.
    """
    noise = torch.randn(MANY, *shape)
    inputs = {"noise": noise}
    if labels:
        inputs["labels"] = torch.zeros(MANY, dtype=torch.int64)
    first = _graph(_frozen(solve), inputs, MANY, strict=True)
    decode = _graph(_frozen(_Decode(autoencoder)), {"states": noise}, MANY, strict=False)
    whole = _Chain(*(part.module(check_guards=False) for part in (first, decode)))
    program = _graph(whole, inputs, 1, strict=False)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            for name in PRIVATE:
                node.meta.pop(name, None)
    return program


def _frozen(part: Any) -> Any:
    """Return a copy whose weights need no gradients: a loop with gradients is slow."""
    if not isinstance(part, nn.Module):
        return part
    return copy.deepcopy(part).eval().requires_grad_(False)


def _graph(
    part: nn.Module, inputs: Mapping[str, Tensor], smallest: int, strict: bool
) -> torch.export.ExportedProgram:
    """Return the graph of a module for all batches that are not smaller than a number."""
    sizes: Any = {name: {0: torch.export.Dim.AUTO(min=smallest)} for name in inputs}
    what = "velocity" if strict else "autoencoder"
    try:
        with torch.no_grad(), _quiet():
            found = torch.export.export(
                part, tuple(inputs.values()), dynamic_shapes=sizes, strict=strict
            )
    except Exception as error:  # of torch's tracer, of a hundred kinds
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{what} must be a network that torch.export can trace, got "
            f"{type(error).__name__}: {reason}"
        ) from error
    nodes = [n for n in found.graph.nodes if n.op == "placeholder" and n.name in inputs]
    if any(isinstance(node.meta["val"].shape[0], int) for node in nodes):
        raise ValueError(
            f"{what} must work for batches of every size, got a network whose graph serves "
            f"{MANY} samples only; take sizes of tensors from x.shape, not from len(x)"
        )
    return found


PRIVATE = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
"""Where a node comes from: paths of this machine, and most of a file's size."""


def write_torch(program: torch.export.ExportedProgram, file: Path, about: str) -> None:
    """Write a ``.pt2`` file for `torch.export.load`, with a text as ``flowkit.json`` inside."""
    torch.export.save(program, file, extra_files={"flowkit.json": about})


def write_onnx(program: torch.export.ExportedProgram, file: Path, about: str) -> None:
    """Write an ONNX file, with a text as its metadata ``flowkit``."""
    with torch.no_grad(), _quiet():
        made: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=["data"], verbose=False
        )
    graph = made.model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.shape = type(value.shape)(["batch", *value.shape.dims[1:]])
    for node in graph.all_nodes():
        node.metadata_props.clear()
    made.model.metadata_props["flowkit"] = about
    made.save(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away what torch says to its own developers."""
    loggers = [logging.getLogger(f"torch.onnx._internal.exporter.{n}") for n in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


NOISY = ("_core", "_registration")
