# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["plot_registration"]

GRID_STEP = 3


def middle_slice(fixed: np.ndarray) -> int:
    """The slice across the last axis through the middle of what is not background."""
    filled = np.flatnonzero((fixed > fixed.min()).any(axis=(0, 1)))
    return int(filled[len(filled) // 2]) if filled.size else fixed.shape[2] // 2


def show_slice(ax: Axes, image: np.ndarray, title: str, **kwargs: object) -> None:
    ax.imshow(image.T, origin="lower", interpolation="nearest", **kwargs)  # type: ignore[arg-type]
    ax.set_title(title)
    ax.set_axis_off()


def plot_registration(
    moving: torch.Tensor, fixed: torch.Tensor, warped: torch.Tensor, ddf: torch.Tensor, title: str = ""
) -> Figure:
    """
    One registered pair at a glance: the three images, what differs before and after, and the deformed grid.

    Args:
        moving, fixed, warped: ``(D, H, W)`` on one grid, or ``(H, W)``. Of a volume, the slice across the last axis in
            the middle of the fixed image is shown (axial in RAS orientation).
        ddf: ``(d, *spatial)`` in voxels of the fixed grid, pull-back.
        title: line above the picture.

    Returns:
        the figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    one_grid = moving.shape == fixed.shape == warped.shape and tuple(ddf.shape) == (fixed.dim(), *fixed.shape)
    if not one_grid or fixed.dim() not in (2, 3):
        raise ValueError(
            f"moving {list(moving.shape)}, fixed {list(fixed.shape)}, warped {list(warped.shape)} and ddf "
            f"{list(ddf.shape)} must be of one 2-D or 3-D grid."
        )
    arrays = [x.detach().cpu().float().numpy() for x in (moving, fixed, warped)]
    field = ddf.detach().cpu().float().numpy()
    if fixed.dim() == 3:
        k = middle_slice(arrays[1])
        arrays = [x[:, :, k] for x in arrays]
        field = field[:2, :, :, k]
    moving_slice, fixed_slice, warped_slice = arrays
    low, high = float(fixed_slice.min()), float(max(fixed_slice.max(), fixed_slice.min() + 1e-6))
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for ax, image, name in zip(axes[0], (fixed_slice, moving_slice, warped_slice), ("fixed", "moving", "warped")):
        show_slice(ax, image, name, cmap="gray", vmin=low, vmax=high)
    scale = (high - low) / 2
    for ax, image, name in zip(axes[1], (moving_slice, warped_slice), ("moving - fixed", "warped - fixed")):
        show_slice(ax, image - fixed_slice, name, cmap="coolwarm", vmin=-scale, vmax=scale)
    ax = axes[1, 2]
    show_slice(ax, fixed_slice, "deformed grid", cmap="gray", vmin=low, vmax=high, alpha=0.4)
    # where the lines of the moving image's grid come to lie in the fixed image
    rows, columns = np.meshgrid(*(np.arange(n) for n in fixed_slice.shape), indexing="ij")
    for coordinate, size in zip((rows + field[0], columns + field[1]), fixed_slice.shape):
        ax.contour(coordinate.T, levels=np.arange(0, size, GRID_STEP), colors="tab:blue", linewidths=0.7)
    if title:
        figure.suptitle(title)
    return figure
