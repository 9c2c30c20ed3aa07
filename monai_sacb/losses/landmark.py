# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from monai_sacb.losses.spacing import check_spacing, voxel_sizes
from monai_sacb.networks.layers import warp_points

__all__ = ["LandmarkLoss"]


class LandmarkLoss(nn.Module):
    """
    Mean distance of landmarks of the fixed image, carried by the field, to their partners in the moving image.

    The mean is taken over the landmarks of each pair, then over the pairs that have any.

    Args:
        spacing: voxel size of the moving image in mm, for distances in mm; one for all axes or one for each.
            Defaults to ``None``: voxels.

    Raises:
        ValueError: When the spacing is out of its range.
    """

    def __init__(self, spacing: float | Sequence[float] | None = None) -> None:
        super().__init__()
        self.spacing = check_spacing(spacing)

    def forward(self, moving_points: torch.Tensor, fixed_points: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        """
        Args:
            moving_points: landmarks of the moving image, ``(B, N, d)``, in voxels: voxel centers are at whole numbers,
                coordinate i is along array axis i.
            fixed_points: their partners in the fixed image, of the same form. Rows with a NaN in either do not count.
            ddf: DDF ``(B, d, *spatial)``, in voxels of the fixed grid, pull-back: a point p of the fixed image goes to
                ``p + ddf(p)``, linear between the voxels, outside as at the border.

        Returns:
            the mean distance, a scalar; 0 without landmarks.

        Raises:
            ValueError: When the shapes do not belong together or do not fit the spacing.
        """
        dims = ddf.dim() - 2
        if (
            dims not in (2, 3)
            or ddf.shape[1] != dims
            or fixed_points.dim() != 3
            or fixed_points.shape != moving_points.shape
            or (len(fixed_points), fixed_points.shape[2]) != (len(ddf), dims)
        ):
            raise ValueError(
                "both sets of points must be (B, N, d) and ddf (B, d, *spatial) with d = 2 or 3, got "
                f"{list(moving_points.shape)}, {list(fixed_points.shape)} and {list(ddf.shape)}."
            )
        sizes = voxel_sizes(self.spacing, dims)
        if ddf.dtype != torch.float64:
            ddf = ddf.float()
        fixed_points, moving_points = fixed_points.to(ddf), moving_points.to(ddf)
        counts = ~(fixed_points + moving_points).isnan().any(2)
        # neither the distance nor its gradient must meet a NaN
        fixed_points, moving_points = (
            torch.where(counts.unsqueeze(2), points, 0.0) for points in (fixed_points, moving_points)
        )
        with torch.autocast(device_type=ddf.device.type, enabled=False):
            offset = warp_points(fixed_points, ddf) - moving_points
        if self.spacing is not None:
            offset = offset * offset.new_tensor(sizes)
        distance = torch.linalg.vector_norm(offset, dim=2) * counts
        number = counts.sum(1)
        means = distance.sum(1) / number.clamp(min=1)
        return means.sum() / (number > 0).sum().clamp(min=1)
