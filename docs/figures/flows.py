"""Draws moons.png, pairs.png and hero.png: real flows, trained here in about a minute.

python docs/figures/flows.py                 the two figures of points
python docs/figures/flows.py runs/quickstart     and that of digits
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from flowkit.couplings import Independent, MinibatchOT
from flowkit.data import sample_toy as sample
from flowkit.losses import flow_matching_loss
from flowkit.modules import load_run
from flowkit.nn import MLP
from flowkit.sampling import ODESampler, seeded_noise

HERE = Path(__file__).parent
GREY, BLUE, ORANGE = "#9aa3ad", "#3b6fb6", "#e8743b"
LIMITS = {"xlim": (-4.9, 6.9), "ylim": (-3.5, 3.7)}


def trained(coupling, steps=3000):
    """A small network that carries a Gaussian to two moons."""
    torch.manual_seed(0)
    network = MLP((2,), width=128, depth=3, activation="silu")
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = flow_matching_loss(network, {"x1": sample("moons", 256)[0]}, coupling=coupling)
        optimizer.zero_grad()
        loss["loss"].backward()
        optimizer.step()
        annealing.step()
    return network.eval().requires_grad_(False)


def plain(axes, **options):
    """Axes without ticks or frame."""
    axes.set(xticks=[], yticks=[], **options)
    for side in axes.spines.values():
        side.set_visible(False)


def color(t):
    """From gray at noise to orange at data."""
    return plt.matplotlib.colors.LinearSegmentedColormap.from_list("t", [GREY, BLUE, ORANGE])(
        float(t)
    )


def moons(path):
    """The same points at five times."""
    figure, panels = plt.subplots(1, 5, figsize=(11, 1.9), layout="constrained")
    for axes, t in zip(panels, (0, 0.25, 0.5, 0.75, 1), strict=True):
        points = path[round(t * (len(path) - 1))]
        axes.scatter(*points.T, s=3, color=color(t), linewidths=0, alpha=0.7)
        plain(axes, aspect="equal", **LIMITS)
        end = {0: " (noise)", 1: " (data)"}.get(t, "")
        axes.set_title(f"t = {t}{end}", fontsize=11)
    figure.savefig(HERE / "moons.png", dpi=110)


def pairs(flows):
    """Pairs of two couplings, and the trajectories that networks learn from them."""
    generator = torch.Generator().manual_seed(0)
    x0, (x1, _) = torch.randn(100, 2, generator=generator), sample("moons", 100, generator)
    noise = seeded_noise((2,), range(1500))
    figure, panels = plt.subplots(1, 4, figsize=(12, 2.3), layout="constrained")
    for k, (name, (coupling, flow)) in enumerate(flows.items()):
        given = coupling.pair(x0, x1)
        path = ODESampler(40, "heun").solve(flow, noise, return_path=True).path
        for axes, lines, start, end, what in (
            (panels[k], torch.stack([given.x0, given.x1]), x0, x1, "pairs"),
            (panels[2 + k], path[:, :100], noise[:100], path[-1], "learned trajectories"),
        ):
            axes.plot(*lines.unbind(-1), color=BLUE, lw=0.6, alpha=0.5)
            axes.scatter(*start.T, s=7, color=GREY, zorder=2, linewidths=0)
            axes.scatter(*end.T, s=6, color=ORANGE, zorder=3, linewidths=0, alpha=0.7)
            plain(axes, aspect="equal", **LIMITS)
            axes.set_title(f"{name}: {what}", fontsize=11)
    figure.savefig(HERE / "pairs.png", dpi=110)


def hero(path, run):
    """Left, points on their way to two moons; right, digits on theirs."""
    module = load_run(run)
    labels = torch.arange(10)
    field = module.guided(2.0)
    start = seeded_noise(module.sample_shape, range(10))
    with torch.no_grad():
        states = ODESampler(40, "heun").solve(field, start, labels, return_path=True).path
    shown = [0, 12, 20, 26, 32, 40]
    figure = plt.figure(figsize=(11, 4.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = left.subplots()
    axes.plot(*path[:, :220].unbind(-1), color=BLUE, lw=0.5, alpha=0.35)
    axes.scatter(*path[0, :700].T, s=5, color=GREY, linewidths=0)
    axes.scatter(*path[-1].T, s=4, color=ORANGE, linewidths=0, alpha=0.8, zorder=3)
    plain(axes, aspect="equal", **LIMITS)
    left.suptitle("points: noise (gray) flows to data (orange)", fontsize=11)
    panels = right.subplots(len(shown), 10)
    for row, k in zip(panels, shown, strict=True):
        for image, panel in zip(states[k], row, strict=True):
            panel.imshow(image[0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            plain(panel)
        row[0].set_ylabel(
            f"t = {k / 40:g}", rotation=0, ha="right", va="center", fontsize=9, labelpad=4
        )
    right.suptitle("images: ten digits, from noise (top) to data (bottom)", fontsize=11)
    figure.savefig(HERE / "hero.png", dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    couplings = {"independent": Independent(), "transport": MinibatchOT()}
    flows = {name: (coupling, trained(coupling)) for name, coupling in couplings.items()}
    noise = seeded_noise((2,), range(2500))
    path = ODESampler(40, "heun").solve(flows["transport"][1], noise, return_path=True).path
    plain_path = ODESampler(40, "heun").solve(flows["independent"][1], noise, return_path=True).path
    moons(plain_path)
    pairs(flows)
    if len(sys.argv) > 1:
        hero(path, sys.argv[1])
