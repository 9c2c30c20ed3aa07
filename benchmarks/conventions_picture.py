# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw ``bundle/docs/conventions.png``: which way a field points, which way content goes, and RAS beside LPS."""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# voxels of a slice, as in the page's example
PLACE, PARTNER, SIZE = (4, 5), (5, 3), 8
BLUE, RED, GREY = "tab:blue", "tab:red", "0.55"


def grid(ax: Axes, title: str, voxel: tuple[int, int], name: str, color: str) -> None:
    for line in np.arange(SIZE + 1) - 0.5:
        ax.plot([line, line], [-0.5, SIZE - 0.5], color="0.85", linewidth=0.8)
        ax.plot([-0.5, SIZE - 0.5], [line, line], color="0.85", linewidth=0.8)
    ax.add_patch(Rectangle((voxel[0] - 0.5, voxel[1] - 0.5), 1, 1, color=color, alpha=0.35))
    ax.text(voxel[0] + 0.6, voxel[1], name, va="center", color=color, fontsize=12)
    ax.set(xlabel="array axis 0 (channel 0)", ylabel="array axis 1 (channel 1)", aspect="equal")
    ax.set(xlim=(-0.6, SIZE - 0.4), ylim=(-0.6, SIZE - 0.4), xticks=range(SIZE), yticks=range(SIZE))
    ax.set_title(title)


def frames(ax: Axes) -> None:
    for (x, y), name, color in (
        ((1, 0), "R", BLUE),
        ((0, 1), "A", BLUE),
        ((-1, 0), "L", RED),
        ((0, -1), "P", RED),
    ):
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
        ax.text(1.13 * x, 1.13 * y, name, ha="center", va="center", color=color, fontsize=13)
    ax.plot([0], [0], "o", color="k")
    ax.text(0, -1.55, "third axis, S: to the head in both", ha="center", color=GREY)
    ax.text(0.12, 0.45, "RAS: inside", color=BLUE)
    ax.text(-0.12, -0.5, "LPS: in ITK's files", color=RED, ha="right")
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.7, 1.4), aspect="equal")
    ax.set_axis_off()
    ax.set_title("seen from the head, face upwards")


def draw(path: str) -> None:
    figure = Figure(figsize=(13, 4.5))
    FigureCanvasAgg(figure)
    fixed, moving, space = figure.subplots(1, 3)
    grid(fixed, "fixed image, warped image, field", PLACE, "p", BLUE)
    grid(moving, "moving image", PARTNER, "p + ddf(p)", RED)
    for ax, solid in ((fixed, True), (moving, False)):
        style = {"arrowstyle": "-|>", "color": "k", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        if solid:
            ax.annotate("", PARTNER, PLACE, arrowprops=style)
            ax.text(PARTNER[0], PARTNER[1] - 0.2, "ddf(p) = (1, -2)", ha="center", va="top")
        else:
            ax.annotate("", PLACE, PARTNER, arrowprops={**style, "linestyle": "--"})
            ax.text(PLACE[0], PLACE[1] + 0.2, "content and points go to p", ha="center")
    frames(space)
    figure.savefig(path, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="bundle/docs/conventions.png")
    draw(parser.parse_args().output)
