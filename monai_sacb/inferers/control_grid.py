# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Fields that are linear between the points of a coarse grid, and images of several resolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["ControlGrid", "coarser_shape", "resample_field", "resample_image"]

# no axis is shortened below this: what is left of an image must have something to compare
LEAST_VOXELS = 8


class ControlGrid:
    """
    Control points over an image, evenly spaced with one on each of its outermost voxels, linear in between.

    Interpolation is a product with one small matrix per axis: on a CPU twice as fast as ``interpolate``, backwards too,
    and its least-squares inverse is another such product.

    Args:
        spatial_shape: the image's shape.
        spacing: distance of the points in voxels, at most.
        dtype, device: of the fields.
    """

    def __init__(
        self, spatial_shape: Sequence[int], spacing: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.shape = [math.ceil((size - 1) / spacing) + 1 for size in spatial_shape]
        self.matrices, self.inverses = [], []
        for size, number in zip(spatial_shape, self.shape):
            places = torch.arange(size, dtype=torch.float64) * ((number - 1) / (size - 1))
            points = torch.arange(number, dtype=torch.float64)
            matrix = (1 - (places[:, None] - points).abs()).clamp(min=0)
            self.matrices.append(matrix.to(device, dtype))
            self.inverses.append(torch.linalg.pinv(matrix).to(device, dtype))
        steps = [(size - 1) / (number - 1) for size, number in zip(spatial_shape, self.shape)]
        # distance of the points in voxels, as a factor of the components of a field
        self.steps = torch.tensor(steps, dtype=dtype, device=device).view(1, -1, *[1] * len(steps))

    def field(self, control: torch.Tensor) -> torch.Tensor:
        """Values at the voxels, ``(B, C, *spatial)``, of those at the points, ``(B, C, *shape)``."""
        return _product(self.matrices, control)

    def fit(self, field: torch.Tensor) -> torch.Tensor:
        """Values at the points whose :py:meth:`field` is the nearest to the one given, in the mean of squares."""
        return _product(self.inverses, field)


def _product(matrices: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One matrix along each spatial axis."""
    x = x @ matrices[-1].T
    x = matrices[-2] @ x
    if len(matrices) == 3:
        x = (matrices[0] @ x.flatten(3)).unflatten(3, x.shape[3:])
    return x


def coarser_shape(spatial_shape: Sequence[int], factor: int) -> list[int]:
    """Shape of an image with every axis shortened ``factor`` times, none to less than 8 voxels."""
    return [max(math.ceil(size / factor), min(size, LEAST_VOXELS)) for size in spatial_shape]


def resample_image(image: torch.Tensor, spatial_shape: Sequence[int]) -> torch.Tensor:
    """
    The image on fewer voxels, linear, smoothed before as the distance of the voxels asks; the corners stay.

    Args:
        image: ``(B, C, *spatial)``.
        spatial_shape: the new shape, at most as large.
    """
    if list(image.shape[2:]) == list(spatial_shape):
        return image
    dims = image.dim() - 2
    for axis, (size, new) in enumerate(zip(image.shape[2:], spatial_shape)):
        # half the distance of the new voxels, less the half voxel that the old ones are themselves
        variance = 0.25 * (((size - 1) / (new - 1)) ** 2 - 1)
        if variance <= 0:
            continue
        radius = min(math.ceil(3 * math.sqrt(variance)), size - 1)
        offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
        kernel = (-0.5 * offsets.square() / variance).exp()
        moved = image.movedim(axis + 2, -1)
        lines = F.pad(moved.reshape(-1, 1, size), [radius, radius], mode="replicate")
        lines = F.conv1d(lines, (kernel / kernel.sum()).view(1, 1, -1))
        image = lines.view(moved.shape).movedim(-1, axis + 2)
    mode = "bilinear" if dims == 2 else "trilinear"
    return F.interpolate(image, size=list(spatial_shape), mode=mode, align_corners=True)


def resample_field(ddf: torch.Tensor, spatial_shape: Sequence[int]) -> torch.Tensor:
    """The field on another grid over the same space, the corners on the corners, in voxels of that grid."""
    if list(ddf.shape[2:]) == list(spatial_shape):
        return ddf
    mode = "bilinear" if ddf.dim() == 4 else "trilinear"
    scale = ddf.new_tensor([(new - 1) / (size - 1) for new, size in zip(spatial_shape, ddf.shape[2:])])
    scale = scale.view(1, -1, *[1] * (ddf.dim() - 2))
    return scale * F.interpolate(ddf, size=list(spatial_shape), mode=mode, align_corners=True)
