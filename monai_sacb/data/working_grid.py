# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The grid on which two images are compared, and how they get there."""

from __future__ import annotations

import math

import nibabel as nib
import torch

from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter

from monai_sacb.data.spatial_mapping import Grid, SpatialMapping, apply_affine, resample_volume
from monai_sacb.utils import plain_tensor

__all__ = ["make_working_grid", "resample_to_working_grid"]

# fewer voxels along an axis leave nothing to compare
MIN_SIZE = 16
# voxel sizes that differ by less are one
SAME_SPACING = 0.01


def _bounds(mask: torch.Tensor) -> torch.Tensor:
    """First and last voxel along each axis that is in the mask ``(D, H, W)``, ``(2, 3)``."""
    bounds = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        filled = mask.any(others[1]).any(others[0]).nonzero()[:, 0]
        bounds.append([int(filled[0]), int(filled[-1])] if len(filled) else [0, mask.shape[axis] - 1])
    return torch.tensor(bounds, dtype=torch.float64).T


def make_working_grid(
    fixed_grid: Grid,
    fixed_foreground: torch.Tensor,
    moving_grid: Grid,
    moving_foreground: torch.Tensor,
    affine: torch.Tensor,
    spacing: float | None = None,
    max_voxels: int = 1_000_000,
    margin: float = 10.0,
) -> Grid:
    """
    A grid around what is to be seen of both images, in the fixed image's space.

    Its axes are those of the fixed image, turned and ordered as near to R, A and S as they can be. It holds the
    foregrounds of both images as far as they lie in the fixed image, and a margin. Along an axis whose voxels have the
    spacing already, voxels are those of the fixed image.

    Args:
        fixed_grid, moving_grid: grids of the two images.
        fixed_foreground, moving_foreground: ``(1, D, H, W)``, bool, where there is something.
        affine: ``(4, 4)``, RAS millimetres, from the fixed image's space to the moving image's.
        spacing: voxel size in millimetres. Defaults to that of the fixed image's smallest side, or larger, as
            ``max_voxels`` demands.
        max_voxels: voxels at most, where no spacing is given.
        margin: millimetres around the foregrounds.

    Raises:
        ValueError: When a number is out of its range, or a mask does not fit its grid.
    """
    if spacing is not None and not 0 < spacing < math.inf:
        raise ValueError(f"spacing must be positive, got {spacing}.")
    if max_voxels < MIN_SIZE**3 or not 0 <= margin < math.inf:
        raise ValueError(
            f"max_voxels must be at least {MIN_SIZE**3} and margin not negative, got {max_voxels} and {margin}."
        )
    for name, mask, grid in (("fixed", fixed_foreground, fixed_grid), ("moving", moving_foreground, moving_grid)):
        if tuple(mask.shape) != (1, *grid.shape):
            raise ValueError(f"{name}_foreground must have shape {(1, *grid.shape)}, got {tuple(mask.shape)}.")
    sizes = torch.tensor(fixed_grid.spacing, dtype=torch.float64)
    last = torch.tensor(fixed_grid.shape, dtype=torch.float64) - 1
    bounds = _bounds(fixed_foreground[0])
    corners = torch.cartesian_prod(*_bounds(moving_foreground[0]).T)
    back = torch.linalg.inv(fixed_grid.affine) @ torch.linalg.inv(affine) @ moving_grid.affine
    moved = apply_affine(back, corners)
    # of tiny images, no more than half their own size
    reach = torch.minimum(margin / sizes, (last + 1) / 2)
    low = (torch.minimum(bounds[0], moved.amin(0)) - reach).clamp(min=-reach, max=last)
    high = torch.minimum(torch.maximum(bounds[1], moved.amax(0)) + reach, last + reach).clamp(min=low)
    extent = (high - low) * sizes
    if spacing is None:
        spacing = float(sizes.min())
        for _ in range(20):  # the count is rounded up along each axis
            count = math.prod(max(MIN_SIZE, math.floor(length / spacing) + 1) for length in extent.tolist())
            if count <= max_voxels:
                break
            spacing *= (count / max_voxels) ** (1 / 3) * 1.001
    scale, start, shape = [], [], []
    for axis in range(3):
        own, length = float(sizes[axis]), float(extent[axis])
        same = abs(own - spacing) <= SAME_SPACING * spacing
        step = own if same else spacing
        count = max(MIN_SIZE, math.floor(length / step + 1e-6) + 1)
        first = float(low[axis]) - ((count - 1) * step - length) / (2 * own)
        scale.append(step / own)
        start.append(float(round(first)) if same else first)
        shape.append(count)
    matrix = torch.diag(torch.tensor([*scale, 1.0], dtype=torch.float64))
    matrix[:3, 3] = torch.tensor(start, dtype=torch.float64)
    matrix = fixed_grid.affine @ matrix
    # nearest to R, A, S
    orientation = nib.orientations.io_orientation(matrix.numpy())
    turn = torch.from_numpy(nib.orientations.inv_ornt_aff(orientation, shape)).double()
    ordered = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        ordered[int(target)] = shape[axis]
    return Grid((ordered[0], ordered[1], ordered[2]), matrix @ turn)


def resample_to_working_grid(
    image: MetaTensor, affine: torch.Tensor, grid: Grid, background: float = 0.0
) -> MetaTensor:
    """
    An image on a working grid, smoothed first where the grid is coarser than the image, so that nothing aliases.

    Args:
        image: ``(1, D, H, W)`` with its affine.
        affine: ``(4, 4)``, RAS millimetres, from the space of the grid to that of the image.
        grid: the working grid.
        background: what lies outside the image.

    Returns:
        ``(1, *grid.shape)``, float32, with the affine of the grid.
    """
    own = Grid.of(image)
    # size of a voxel of the working grid along the axes of the image, in the image's voxels
    steps = torch.linalg.inv(own.affine)[:3, :3] @ affine[:3, :3] @ grid.affine[:3, :3]
    sigmas = [0.5 * math.sqrt(max(factor**2 - 1, 0.0)) for factor in steps.norm(dim=1).tolist()]
    volume = plain_tensor(image).float()
    if max(sigmas) > 0.1:
        # around the background, since the filter takes zeros outside
        smooth = GaussianFilter(3, [max(sigma, 1e-3) for sigma in sigmas])
        volume = smooth((volume - background)[None])[0] + background
    return resample_volume(MetaTensor(volume, affine=own.affine), SpatialMapping([affine]), grid, fill=background)
