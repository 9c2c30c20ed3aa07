# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from monai_sacb.networks.layers.neighborhood import pad_spatial, shifted, window_offsets

__all__ = ["SimilarityMatching"]


class SimilarityMatching(nn.Module):
    """
    Displacement between two feature maps: the expected offset under a softmax of feature products.

    For every voxel p, the inner products of ``fixed(p)`` with ``moving(p + q)`` over the offsets q of a small cubic
    window, zeros outside the image, pass through a softmax; the result is the mean offset under these weights.

    Args:
        window: odd size of the search window. At most ``window // 2`` voxels per axis can be found.

    Raises:
        ValueError: When ``window`` is not a positive odd number.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025, section 3.
    """

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        if window < 1 or window % 2 != 1:
            raise ValueError(f"window must be a positive odd number, got {window}.")
        self.window = window

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """
        Args:
            moving: features of the moving image, ``(B, C, *spatial)``.
            fixed: features of the fixed image, ``(B, C, *spatial)``.

        Returns:
            displacement ``(B, d, *spatial)`` in voxels of this grid, pull-back (from fixed to moving), channel i along
            array axis i.

        Raises:
            ValueError: When the two shapes differ, or have no spatial axis.
        """
        if moving.shape != fixed.shape or fixed.dim() < 3:
            raise ValueError(
                f"moving and fixed features must have one shape (B, C, *spatial), got {list(moving.shape)} and "
                f"{list(fixed.shape)}."
            )
        spatial = list(fixed.shape[2:])
        dims = len(spatial)
        radius = self.window // 2
        padded = pad_spatial(moving, radius)
        offsets = window_offsets(dims, self.window)
        scores = torch.cat([(fixed * shifted(padded, offset, spatial)).sum(1, keepdim=True) for offset in offsets], 1)
        # a field in half precision is off by tenths of a voxel
        weights = scores.softmax(1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
        displacement: list[torch.Tensor] = []
        for axis in range(dims):
            expected = torch.zeros_like(weights[:, 0])
            for tap, offset in enumerate(offsets):
                step = offset[axis] - radius
                if step != 0:
                    expected = expected + step * weights[:, tap]
            displacement.append(expected)
        return torch.stack(displacement, 1)
