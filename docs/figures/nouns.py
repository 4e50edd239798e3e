"""Draws nouns.png: the seven nouns and how they meet."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY = "#22303c", "#68737d"
TRAIN, USE, BOTH = "#dbe7f6", "#fde4d3", "#e6eee0"


def box(axes, x, y, width, height, title, text, color):
    """A rounded box with a bold title and a line below it."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1.2",
            facecolor=color,
            edgecolor=INK,
            linewidth=1,
        )
    )
    middle = x + width / 2
    axes.text(
        middle,
        y + height - 2.1,
        title,
        ha="center",
        va="top",
        fontsize=12,
        weight="bold",
        color=INK,
    )
    axes.text(
        middle,
        y + height - 6.4,
        text,
        ha="center",
        va="top",
        fontsize=9,
        color=INK,
        linespacing=1.4,
    )


def arrow(axes, start, end, **options):
    """An arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.2, **options
        )
    )


def label(axes, x, y, text, **options):
    """A gray note."""
    axes.text(x, y, text, fontsize=9, color=GREY, **{"ha": "center", "va": "center"} | options)


figure, axes = plt.subplots(figsize=(11, 5.9), layout="constrained")
axes.set(xlim=(-1, 111), ylim=(0, 60), xticks=[], yticks=[])
axes.axis("off")

axes.text(0, 58, "Training", fontsize=13, weight="bold", color="#3b6fb6", va="center")
box(axes, 0, 38.5, 23, 12, "coupling", "which noise x0 goes\nwith which data x1", TRAIN)
box(axes, 31, 38.5, 24, 12, "path", "where a pair is at t: x_t\nhow fast it moves: u", TRAIN)
box(
    axes,
    63,
    38.5,
    26,
    12,
    "module",
    "makes velocity(x_t, t, cond)\nclose to u, by regression",
    TRAIN,
)
arrow(axes, (23, 44.5), (31, 44.5))
arrow(axes, (55, 44.5), (63, 44.5))
label(axes, 27, 46.6, "x0, x1")
label(axes, 59, 46.6, "x_t, u")

axes.text(0, 34.3, "Sampling", fontsize=13, weight="bold", color="#c9561d", va="center")
box(axes, 0, 19, 23, 12, "sampler", "solves dx/dt = velocity\non a grid of times", USE)
box(axes, 31, 19, 24, 12, "guidance", "wraps a velocity,\nand is a velocity", USE)
box(axes, 63, 19, 26, 12, "velocity", "velocity(x, t, cond):\nanything called so", BOTH)
arrow(axes, (76, 38.5), (76, 31))
label(axes, 77.5, 34.8, "learns", ha="left")
arrow(axes, (63, 25), (55, 25))
arrow(axes, (31, 25), (23, 25))

text = "images\nto latents\nbefore training;\n\nlatents\nto images\nafter sampling\n\n(or Identity)"
box(axes, 95, 19, 15, 31.5, "autoencoder", text, BOTH)
axes.plot([102.5, 102.5, 11.5], [50.5, 54.5, 54.5], color=INK, linewidth=1.2)
arrow(axes, (11.5, 54.6), (11.5, 50.5))
label(axes, 59, 56.3, "data x1")

# the axis of time
arrow(axes, (11.5, 19), (11.5, 10.8))
arrow(axes, (4, 9), (108, 9))
for x, title, note in ((11.5, "t = 0", "noise x0"), (102.5, "t = 1", "data x1")):
    axes.plot([x, x], [8, 10], color=INK, linewidth=1.4)
    axes.text(x, 6.8, title, ha="center", va="top", fontsize=11, weight="bold", color=INK)
    label(axes, x, 2.6, note)
arrow(axes, (102.5, 10.8), (102.5, 18.8))
label(axes, 101.3, 14.8, "decode", ha="right")
label(axes, 57, 11.2, "the sampler goes from left to right, its inversion from right to left")
figure.savefig(Path(__file__).parent / "nouns.png", dpi=110)
