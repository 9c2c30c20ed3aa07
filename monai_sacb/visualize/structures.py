# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = ["plot_structures"]

COLORS = ("lightgrey", "tab:blue")


def plot_structures(before: np.ndarray, after: np.ndarray, names: Sequence[str], title: str = "") -> Figure:
    """
    A box for each structure before and after registration: quartiles, median, whiskers to 1.5 times their distance.

    Args:
        before, after: ``(pairs, structures)``; NaN and infinite values are left out.
        names: of the structures.
        title: what has been measured.

    Returns:
        a figure, not known to pyplot; the structures in the order given, from top to bottom.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    if before.ndim != 2 or before.shape != after.shape or before.shape[1] != len(names):
        raise ValueError(
            f"before and after must be (pairs, {len(names)} structures), got {before.shape} and {after.shape}."
        )
    figure = Figure(figsize=(8.0, 1.5 + 0.35 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    for values, color, shift in ((before, COLORS[0], -0.18), (after, COLORS[1], 0.18)):
        ax.boxplot(
            [column[np.isfinite(column)] for column in values.T],
            positions=np.arange(len(names)) + shift,
            orientation="horizontal",
            widths=0.3,
            patch_artist=True,
            boxprops={"facecolor": color},
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
        )
    ax.set_yticks(np.arange(len(names)), labels=list(names))
    ax.invert_yaxis()
    ax.set_xlabel(title)
    ax.grid(axis="x", alpha=0.4)
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor="black", label=t) for c, t in zip(COLORS, ("before", "after"))],
        loc="outside upper right",
        ncols=2,
    )
    return figure
