# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from monai_sacb.metrics.base import PairwiseMetric
from monai_sacb.utils import plain_tensor

__all__ = ["LandmarkErrorMetric", "compute_tre"]


def compute_tre(
    moving_points: torch.Tensor,
    fixed_points: torch.Tensor,
    ddf: torch.Tensor,
    spacing: Sequence[float],
    order: int = 1,
) -> torch.Tensor:
    """
    Target registration error: how far a field sends the landmarks of the fixed image from their partners.

    A fixed landmark p goes to ``p + ddf(p)``. Voxel centres are at whole numbers; outside the grid the field is what it
    is at the border. The evaluation of the Learn2Reg challenge (github.com/MDL-UzL/L2R) interpolates the field by cubic
    splines, ``order=3``; at voxel centres all orders are the same.

    Args:
        moving_points: ``(B, N, d)``, voxels of the moving grid. A row that has a NaN, as one has that fills up a
            batch, has no error.
        fixed_points: their partners ``(B, N, d)``, voxels of the fixed grid, likewise.
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.
        spacing: voxel size of the moving grid along each axis, in mm.
        order: of the splines that interpolate the field: 1 is linear, 3 cubic.

    Returns:
        ``(B, N)`` in mm, float64; NaN where a landmark is not known, or the field is not a number.

    Raises:
        ValueError: When the shapes do not belong together, the spacing does not fit them, or the order is not 1 to 5.
    """
    dims = ddf.dim() - 2
    if dims not in (2, 3) or ddf.shape[1] != dims:
        raise ValueError(f"ddf must be a field (B, d, *spatial) with d = 2 or 3, got shape {list(ddf.shape)}.")
    if fixed_points.dim() != 3 or fixed_points.shape[::2] != ddf.shape[:2] or moving_points.shape != fixed_points.shape:
        raise ValueError(
            f"fixed_points and moving_points must both be (B, N, d) with B and d of the field, {list(ddf.shape[:2])}, "
            f"got shapes {list(fixed_points.shape)} and {list(moving_points.shape)}."
        )
    if len(spacing) != dims:
        raise ValueError(f"spacing must have a value for each of the {dims} axes, got {tuple(spacing)}.")
    if order not in range(1, 6):
        raise ValueError(f"order must be 1 to 5, got {order}.")
    fields = (ddf if ddf.dtype == torch.float64 else ddf.float()).detach().cpu().numpy()
    fixed, moving = (points.detach().double().cpu().numpy() for points in (fixed_points, moving_points))
    last = np.array(ddf.shape[2:]) - 1.0
    errors = np.full(fixed.shape[:2], np.nan)
    for field, start, end, row in zip(fields, fixed, moving, errors):
        known = ~np.isnan(start).any(1)
        places = start[known]
        inside = places.clip(0, last).T
        shift = np.stack([map_coordinates(c, inside, output=np.float64, order=order) for c in field], 1)
        row[known] = np.linalg.norm((places + shift - end[known]) * np.array(spacing), axis=1)
    return torch.from_numpy(errors).to(ddf.device)


class LandmarkErrorMetric(PairwiseMetric):
    """
    Mean distance between two sets of landmarks of each pair, in mm.

    Takes landmarks ``(B, N, d)`` in mm: as y_pred those of the fixed image where the registration sends them, as y
    their partners in the moving image, in the same frame and order. A row where y has a NaN, such as one that fills up
    a batch, does not count. The value of a pair is NaN when no row counts, or when y_pred is not a number where y is.

    Args:
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise ValueError("the landmarks of the moving image are needed as y.")
        if y_pred.dim() != 3 or y_pred.shape != y.shape:
            raise ValueError(
                f"the landmarks must have one shape (B, N, d), got {list(y_pred.shape)} and {list(y.shape)}."
            )
        points = plain_tensor(y_pred).double()
        distances = torch.linalg.vector_norm(points - plain_tensor(y).to(points), dim=2)
        # only the reference says what does not count: a landmark that was sent nowhere must not look right
        counts = ~plain_tensor(y).to(points.device).isnan().any(2)
        total = torch.where(counts, distances, 0.0).sum(1, keepdim=True)
        return total / counts.sum(1, keepdim=True)
