# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from monai_sacb.networks.cluster_maps import CLUSTER_LEVELS
from monai_sacb.visualize.registration import middle_slice, show_slice

__all__ = ["plot_clusters"]


def plot_clusters(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    moving_clusters: torch.Tensor,
    fixed_clusters: torch.Tensor,
    title: str = "",
) -> Figure:
    """
    What the network has looked at: two images and the clusters of each level, see
    :py:func:`monai_sacb.networks.cluster_labels`.

    Args:
        moving, fixed: ``(D, H, W)`` on one grid, or ``(H, W)``. Of a volume, the slice across the last axis in the
            middle of the fixed image is shown (axial in RAS orientation).
        moving_clusters, fixed_clusters: ``(4, *spatial)``, labels of the levels 2, 3, 4 and 5.
        title: line above the picture.

    Returns:
        the figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    expected = (len(CLUSTER_LEVELS), *fixed.shape)
    one_grid = moving.shape == fixed.shape and expected == moving_clusters.shape == fixed_clusters.shape
    if not one_grid or fixed.dim() not in (2, 3):
        raise ValueError(
            f"moving {list(moving.shape)}, fixed {list(fixed.shape)}, and their clusters {list(moving_clusters.shape)} "
            f"and {list(fixed_clusters.shape)} must be of one 2-D or 3-D grid, with {len(CLUSTER_LEVELS)} levels."
        )
    rows = [
        (name, image.detach().cpu().float().numpy(), clusters.detach().cpu().numpy())
        for name, image, clusters in (("fixed", fixed, fixed_clusters), ("moving", moving, moving_clusters))
    ]
    if fixed.dim() == 3:
        k = middle_slice(rows[0][1])
        rows = [(name, image[..., k], clusters[..., k]) for name, image, clusters in rows]
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1 + len(CLUSTER_LEVELS))
    for line, (name, image, clusters) in zip(axes, rows):
        show_slice(line[0], image, name, cmap="gray")
        for ax, level, labels in zip(line[1:], CLUSTER_LEVELS, clusters):
            warped = name == "moving" and level < max(CLUSTER_LEVELS)
            # as many colours as one can tell apart, over and over
            shown = np.asarray((labels - 1) % 20)
            show_slice(ax, shown, f"level {level}{', warped' if warped else ''}", cmap="tab20", vmin=0, vmax=19)
    if title:
        figure.suptitle(title)
    return figure
