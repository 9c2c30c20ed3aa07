# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the registration report: one slice each, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy import ndimage

from monai_sacb.visualize.report_slices import PatientSlice

__all__ = ["Panel", "SlicePainter", "checkerboard", "fuse", "gradient_css", "window"]

DPI = 100
# pixels; thin slabs are framed, so that letters have room
MIN_SIDE = 110
LINE_WIDTH = 1.0
# millimetres between the lines of the deformed grid, and about how many of them fit a picture
GRID_STEPS, GRID_LINES = (1, 2, 5, 10, 20, 50), 26
# edges: width of the smoothing in mm, and share of the strongest gradient above which an edge counts
EDGE_SIGMA, EDGE_SHARE = 1.5, 0.22
FOLD_COLOR = "#39ff14"


class Panel(NamedTuple):
    """A picture in words and pixels."""

    png: bytes
    width: int
    height: int
    alt: str

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def window(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities as brightness from 0 to 1; what is not finite is black."""
    scaled = (np.nan_to_num(image.astype(np.float32), nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-30)
    return np.clip(scaled, 0.0, 1.0)


def fuse(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Two images of brightness ``(H, W)`` as one of colours: fixed magenta, moving green, grey where they agree."""
    return np.stack([fixed, moving, fixed], -1)


def checkerboard(fixed: np.ndarray, moving: np.ndarray, view: PatientSlice, tile: float) -> np.ndarray:
    """Tiles of ``tile`` mm taken from two images ``(H, W)`` in turn, the fixed image first."""
    rows, columns = (
        np.floor((np.arange(count) + 0.5) * step / tile).astype(int) for count, step in zip(fixed.shape, view.spacing)
    )
    return np.where((rows[:, None] + columns) % 2 == 0, fixed, moving)


def gradient_css(name: str) -> str:
    """A colour map as a CSS gradient from left to right."""
    colors = (colormaps[name](np.linspace(0, 1, 17))[:, :3] * 255).round().astype(int)
    return "linear-gradient(to right, " + ", ".join(f"rgb({r},{g},{b})" for r, g, b in colors) + ")"


def _png(canvas: FigureCanvasAgg) -> tuple[bytes, int, int]:
    """Few colours are a third of the size, and the eye sees no difference."""
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all():
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
    else:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue(), image.width, image.height


class SlicePainter:
    """
    Draws onto one slice, in millimetres from its upper left corner.

    Args:
        view: the slice.
        pixels_per_mm: the same for all slices, so that they compare.
    """

    def __init__(self, view: PatientSlice, pixels_per_mm: float) -> None:
        self.view, self.scale = view, pixels_per_mm
        height, width = view.size
        self.pixels = [max(MIN_SIDE, round(side * pixels_per_mm)) for side in (height, width)]
        self.figure = Figure(figsize=(self.pixels[1] / DPI, self.pixels[0] / DPI), dpi=DPI, facecolor="black")
        self.canvas = FigureCanvasAgg(self.figure)
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set_axis_off()
        half_height, half_width = (side / pixels_per_mm / 2 for side in self.pixels)
        self.ax.set_xlim(width / 2 - half_width, width / 2 + half_width)
        self.ax.set_ylim(height / 2 + half_height, height / 2 - half_height)
        # a tile of a checkerboard, a step of a grid
        self.extent = (0.0, width, height, 0.0)

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the columns and of the rows, millimetres."""
        rows, columns = ((np.arange(len(n)) + 0.5) for n in (self.view.rows, self.view.columns))
        return columns * self.view.spacing[1], rows * self.view.spacing[0]

    def image(self, values: np.ndarray, alpha: float = 1.0) -> SlicePainter:
        """Brightness ``(rows, columns)`` or colours ``(rows, columns, 3)``, from 0 to 1."""
        limits: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0} if values.ndim == 2 else {}
        self.ax.imshow(values, extent=self.extent, aspect="auto", interpolation="hanning", alpha=alpha, **limits)
        return self

    def colors(self, values: np.ndarray, cmap: str, low: float, high: float) -> SlicePainter:
        """Values ``(rows, columns)`` as colours; what is not finite is black."""
        shown = np.ma.masked_invalid(values)
        kwargs: dict[str, Any] = {"cmap": cmap, "vmin": low, "vmax": high, "interpolation": "nearest"}
        self.ax.imshow(shown, extent=self.extent, aspect="auto", **kwargs)
        return self

    def _lines(self, lines: Sequence[np.ndarray], color: str, width: float, outline: bool = False) -> None:
        collection = LineCollection(lines, colors=color, linewidths=width)
        if outline:
            collection.set_path_effects([withStroke(linewidth=width + 1.2, foreground="black", alpha=0.6)])
        self.ax.add_collection(collection, autolim=False)

    def edges(self, values: np.ndarray, color: str = "#ffd21f", width: float = LINE_WIDTH) -> SlicePainter:
        """The strong edges of brightness ``(rows, columns)`` as lines."""
        if min(values.shape) < 3:
            return self
        sigma = [max(EDGE_SIGMA / step, 0.6) for step in self.view.spacing]
        strength = ndimage.gaussian_gradient_magnitude(values, sigma)
        curvature = ndimage.gaussian_laplace(values, sigma)
        keep = strength > max(EDGE_SHARE * float(np.percentile(strength, 99.5)), 1e-6)
        # at an edge the curvature changes its sign
        z = np.ma.masked_array(curvature, ~keep)
        x, y = self._grid()
        self._lines([np.asarray(line) for line in contour_generator(x, y, z).lines(0.0)], color, width)
        return self

    def contours(self, labels: np.ndarray, color: str, width: float) -> SlicePainter:
        """The outline of each label ``(rows, columns)`` but 0."""
        if min(labels.shape) < 2:
            return self
        # structures that the picture cuts off are closed at its border
        padded = np.pad(labels, 1)
        x, y = (
            np.concatenate([[line[0] - step], line, [line[-1] + step]])
            for line, step in zip(self._grid(), self.view.spacing[::-1])
        )
        lines = []
        for label in np.unique(padded):
            if label != 0:
                mask = padded == label
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                part = (slice(rows[0] - 1, rows[-1] + 2), slice(columns[0] - 1, columns[-1] + 2))
                generator = contour_generator(x[part[1]], y[part[0]], mask[part].astype(np.float32))
                lines += [np.asarray(line) for line in generator.lines(0.5)]
        self._lines(lines, color, width)
        return self

    def deformed_grid(self, shift: np.ndarray, step: float, color: str = "#4fc3ff") -> SlicePainter:
        """
        Where the lines of a regular grid come to lie.

        Args:
            shift: ``(rows, columns, 2)``, displacement downwards and to the right, millimetres.
            step: millimetres from line to line.
            color: of the lines.
        """
        if min(shift.shape[:2]) < 2:
            return self
        x, y = self._grid()
        for place in (y[:, None] + shift[..., 0], x[None, :] + shift[..., 1]):
            generator = contour_generator(x, y, np.ma.masked_invalid(place))
            first, last = (int(np.floor(value / step)) for value in (np.nanmin(place), np.nanmax(place)))
            lines = [np.asarray(a) for n in range(first, last + 2) for a in generator.lines((n + 0.5) * step)]
            self._lines(lines, color, 0.8)
        return self

    def folds(self, mask: np.ndarray) -> SlicePainter:
        """Mark the voxels ``(rows, columns)`` that fold, however small they are."""
        rows, columns = np.nonzero(mask)
        x, y = self._grid()
        # points of 1/72 inch
        side = max(4.0, max(self.view.spacing) * self.scale * 72 / DPI)
        self.ax.scatter(x[columns], y[rows], s=side**2, marker="s", color=FOLD_COLOR, linewidths=0)
        return self

    def ring(self, voxel: np.ndarray) -> SlicePainter:
        """A ring around a voxel ``(3,)``."""
        row, column = self.view.position_of(voxel)
        x, y = self._grid()
        self.ax.scatter(x[column], y[row], s=420, facecolors="none", edgecolors=FOLD_COLOR, linewidths=1.6)
        return self

    def panel(self, alt: str) -> Panel:
        """The picture with the patient's directions at its sides."""
        top, bottom, left, right = self.view.letters
        height, width = self.pixels
        for letter, x, y in (
            (top, width / 2, height - 9),
            (bottom, width / 2, 9),
            (left, 9, height / 2),
            (right, width - 9, height / 2),
        ):
            text = self.figure.text(
                x / width, y / height, letter, color="white", size=9, weight="bold", ha="center", va="center"
            )
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
        png, width, height = _png(self.canvas)
        sides = f"{top} at the top, {bottom} at the bottom, {left} on the left, {right} on the right"
        return Panel(png, width, height, f"{alt}, {self.view.plane} slice; {sides}.")


def grid_step(views: Sequence[PatientSlice]) -> float:
    """Millimetres between the lines of the deformed grid: a round number."""
    wanted = max(max(view.size) for view in views) / GRID_LINES
    return float(min(GRID_STEPS, key=lambda step: abs(np.log(step / wanted))))
