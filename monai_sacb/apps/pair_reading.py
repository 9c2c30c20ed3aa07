# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading and checking all files of a pair, before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from monai.data import MetaTensor

from monai_sacb.data.foreground import background_value, foreground_mask
from monai_sacb.data.point_files import PointSet, read_point_set
from monai_sacb.data.spatial_mapping import Grid, SpatialMapping
from monai_sacb.data.transform_files import read_transform
from monai_sacb.data.volumes import check_overlap, read_label_volume, read_mask_volume, read_volume

__all__ = ["PairFiles", "Subject", "read_affine", "read_pair", "read_subject"]

# of a voxel: what two headers of one grid may differ by
GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class PairFiles:
    """Paths of what belongs to a pair; None for what there is not."""

    fixed: str
    moving: str
    moving_label: str | None = None
    fixed_label: str | None = None
    moving_points: str | None = None
    fixed_points: str | None = None
    fixed_mask: str | None = None
    moving_mask: str | None = None

    @property
    def paths(self) -> list[str]:
        """All that are given."""
        return [path for path in vars(self).values() if path is not None]


@dataclass(frozen=True)
class Subject:
    """
    One side of a pair.

    Args:
        role: ``"fixed"`` or ``"moving"``.
        path: absolute path of the image.
        image: ``(1, D, H, W)``, float32.
        foreground: ``(1, D, H, W)``, bool, where the image is not background.
        background: value of what lies outside.
        label: label map on the grid of the image.
        points: landmarks.
        mask: ``(1, D, H, W)`` on the grid of the image, not zero where the images are to be compared.
    """

    role: str
    path: str
    image: MetaTensor
    foreground: torch.Tensor
    background: float
    label: MetaTensor | None = None
    points: PointSet | None = None
    mask: MetaTensor | None = None

    @property
    def grid(self) -> Grid:
        return Grid.of(self.image)


def _check_same_grid(name: str, path: str, volume: MetaTensor, image_path: str, grid: Grid) -> None:
    own = Grid.of(volume)
    if own.shape != grid.shape:
        raise ValueError(f"{name} '{path}' has size {own.shape}, but its image '{image_path}' has {grid.shape}.")
    # how far apart corresponding corners lie, in voxels
    corners = torch.cartesian_prod(*[torch.tensor([0.0, size - 1.0], dtype=torch.float64) for size in grid.shape])
    places = corners @ own.affine[:3, :3].T + own.affine[:3, 3]
    voxels = (places - grid.affine[:3, 3]) @ torch.linalg.inv(grid.affine[:3, :3]).T
    distance = float((voxels - corners).abs().max())
    if distance > GRID_TOLERANCE:
        raise ValueError(
            f"{name} '{path}' does not lie where its image '{image_path}' does: by their headers, corners are up to "
            f"{distance:.3g} voxels apart."
        )


def read_subject(
    role: str, image: str, label: str | None = None, points: str | None = None, mask: str | None = None
) -> Subject:
    """
    Read and check one side of a pair.

    Args:
        role: what it is, for messages.
        image, label, points, mask: paths.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a file cannot be used, or does not lie as the image does.
    """
    volume = read_volume(image, role)
    grid = Grid.of(volume)
    label_volume = mask_volume = None
    if label is not None:
        label_volume = read_label_volume(label, f"{role}_label")
        _check_same_grid(f"{role}_label", label, label_volume, image, grid)
    if mask is not None:
        mask_volume = read_mask_volume(mask, f"{role}_mask")
        _check_same_grid(f"{role}_mask", mask, mask_volume, image, grid)
    return Subject(
        role,
        str(Path(image).resolve()),
        volume,
        foreground_mask(volume),
        background_value(volume),
        label_volume,
        None if points is None else read_point_set(points, grid),
        mask_volume,
    )


def read_pair(files: PairFiles, affine: torch.Tensor | None = None) -> tuple[Subject, Subject]:
    """
    Read and check a pair.

    Args:
        files: paths.
        affine: ``(4, 4)``, RAS millimetres, from the fixed image's space to the moving image's, where one is given.
            By it, or else by the headers, the fields of view must overlap.

    Returns:
        the moving and the fixed subject.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a file cannot be used, or the files do not belong together.
    """
    moving = read_subject("moving", files.moving, files.moving_label, files.moving_points, files.moving_mask)
    fixed = read_subject("fixed", files.fixed, files.fixed_label, files.fixed_points, files.fixed_mask)
    if moving.points is not None and fixed.points is not None:
        numbers = len(moving.points.positions), len(fixed.points.positions)
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"moving_points '{files.moving_points}' has {numbers[0]} points, but fixed_points "
                f"'{files.fixed_points}' has {numbers[1]}; they are paired by their order."
            )
    if affine is None:
        check_overlap(moving.image, fixed.image, "by their headers; they must be aligned first")
    else:
        placed = moving.image.clone()
        placed.affine = torch.linalg.inv(affine) @ moving.grid.affine
        check_overlap(placed, fixed.image, "after the given affine")
    return moving, fixed


def read_affine(path: str) -> torch.Tensor:
    """
    One affine of a transform file: ``(4, 4)``, RAS millimetres, from the fixed image's space to the moving image's.

    Raises:
        ValueError: When the file holds anything but affines, or one that cannot be inverted.
    """
    mapping: SpatialMapping = read_transform(path)
    affine = torch.eye(4, dtype=torch.float64)
    for stage in mapping.stages:
        if not isinstance(stage, torch.Tensor):
            raise ValueError(f"affine '{path}' holds a displacement field; only linear transforms can be given.")
        affine = stage @ affine
    if abs(float(torch.linalg.det(affine))) < 1e-6:
        raise ValueError(f"affine '{path}' cannot be inverted: {affine.tolist()}.")
    return affine
