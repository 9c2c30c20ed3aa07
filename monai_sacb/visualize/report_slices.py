# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Slices of volumes as a radiologist looks at them, whatever the order and direction of the array's axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_sacb.data.spatial_mapping import Grid, apply_affine, sample_volume

__all__ = [
    "PLANES",
    "PatientSlice",
    "box_corners",
    "foreground_box",
    "intensity_window",
    "joined_box",
    "middle_of",
    "patient_slice",
]

# axes of RAS space: from top to bottom, from left to right of the picture, and across
PLANES = {"axial": (1, 0, 2), "coronal": (2, 0, 1), "sagittal": (2, 1, 0)}
# the picture begins at the positive end of each axis: right on the left (radiological), front on the left, head on top
POSITIVE, NEGATIVE = "RAS", "LPI"
# HU
CT_AIR, CT_SOFT_TISSUE = -500.0, (-160.0, 240.0)
# values that the percentiles are taken from
MAX_SAMPLES = 1_000_000
# around the body, mm
MARGIN = 8.0


@dataclass(frozen=True)
class PatientSlice:
    """
    One slice of a grid, along the closest axes of the patient.

    Args:
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``.
        grid: what is cut.
        axes: array axes from top to bottom, from left to right of the picture, and across.
        rows, columns: indices along the first two, in the picture's order.
        index: along the third.
    """

    plane: str
    grid: Grid
    axes: tuple[int, int, int]
    rows: np.ndarray
    columns: np.ndarray
    index: int

    @property
    def spacing(self) -> tuple[float, float]:
        """Millimetres from row to row and from column to column."""
        return self.grid.spacing[self.axes[0]], self.grid.spacing[self.axes[1]]

    @property
    def size(self) -> tuple[float, float]:
        """Height and width, millimetres."""
        return len(self.rows) * self.spacing[0], len(self.columns) * self.spacing[1]

    @property
    def letters(self) -> tuple[str, str, str, str]:
        """Directions of the patient at the top, bottom, left and right of the picture."""
        top, left, _ = PLANES[self.plane]
        return POSITIVE[top], NEGATIVE[top], POSITIVE[left], NEGATIVE[left]

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """The slice ``(rows, columns)`` of a volume ``(..., D, H, W)`` on the grid, with the leading axes last."""
        volume = np.moveaxis(volume, (-3, -2, -1), (0, 1, 2))
        index: list[Any] = [0, 0, 0]
        index[self.axes[0]], index[self.axes[1]] = self.rows[:, None], self.columns[None, :]
        index[self.axes[2]] = self.index
        return np.asarray(volume[tuple(index)])

    def places(self) -> np.ndarray:
        """Voxel coordinates of the grid, ``(rows, columns, 3)``, float64."""
        voxels = np.empty((len(self.rows), len(self.columns), 3))
        voxels[..., self.axes[0]] = self.rows[:, None]
        voxels[..., self.axes[1]] = self.columns
        voxels[..., self.axes[2]] = self.index
        return voxels

    def sample(
        self, volume: torch.Tensor, to_ras: torch.Tensor, affine: torch.Tensor, mode: str, fill: float
    ) -> np.ndarray:
        """
        Another volume at the places of the slice.

        Args:
            volume: ``(1, D, H, W)``.
            to_ras: ``(4, 4)``, its voxels to RAS millimetres.
            affine: ``(4, 4)``, RAS millimetres, from the space of the slice to that of the volume.
            mode: as for :py:func:`monai_sacb.data.spatial_mapping.sample_volume`.
            fill: what lies outside.

        Returns:
            ``(rows, columns)``.
        """
        voxels = torch.from_numpy(self.places().reshape(-1, 3))
        matrix = torch.linalg.inv(to_ras) @ affine @ self.grid.affine
        values = sample_volume(volume, apply_affine(matrix, voxels), mode, fill)
        return values.numpy().reshape(len(self.rows), len(self.columns))

    def position_of(self, voxel: np.ndarray) -> tuple[int, int]:
        """Where a voxel ``(3,)`` lies in the slice: row and column."""
        row = int(np.argmin(np.abs(self.rows - voxel[self.axes[0]])))
        return row, int(np.argmin(np.abs(self.columns - voxel[self.axes[1]])))


def patient_slice(grid: Grid, plane: str, voxel: np.ndarray, box: np.ndarray | None = None) -> PatientSlice:
    """
    The slice through a voxel.

    Args:
        grid: what is cut; where it is oblique, along its axes that are closest to the patient's.
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``.
        voxel: ``(3,)``, array indices.
        box: ``(2, 3)``, first and last index along each array axis that is shown; all by default.
    """
    # for each array axis its patient axis and direction
    orientation = nib.orientations.io_orientation(grid.affine.numpy())
    of_patient = {int(world): axis for axis, (world, _) in enumerate(orientation)}
    first, second, across = (of_patient[world] for world in PLANES[plane])
    box = np.array([[0, 0, 0], np.array(grid.shape) - 1]) if box is None else box
    indices = []
    for axis in (first, second):
        line = np.arange(box[0, axis], box[1, axis] + 1)
        indices.append(line[::-1] if orientation[axis, 1] > 0 else line)
    index = int(np.clip(voxel[across], 0, grid.shape[across] - 1))
    return PatientSlice(plane, grid, (first, second, across), indices[0], indices[1], index)


def intensity_window(volume: np.ndarray) -> tuple[float, float]:
    """
    Intensities from black to white: soft tissue where values go down to -500 (CT), else percentiles, which a few
    outliers do not move.
    """
    values = volume.reshape(-1)
    values = values[:: max(1, values.size // MAX_SAMPLES)]
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    least, low = (float(x) for x in np.percentile(values, (0.1, 0.5)))
    if least <= CT_AIR:
        return CT_SOFT_TISSUE
    # most of a skull-stripped volume is background
    above = values[values > low]
    return low, float(np.percentile(above, 99.8)) if above.size else low + 1.0


def _profiles(mask: np.ndarray) -> list[np.ndarray]:
    """Number of voxels set at each index of each axis."""
    return [mask.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]


def middle_of(mask: np.ndarray) -> np.ndarray:
    """The voxel ``(3,)`` that has half of a mask on each side along each axis; the middle if the mask is empty."""
    middles = []
    for profile in _profiles(mask):
        total = np.cumsum(profile)
        middles.append(int(np.searchsorted(total, total[-1] / 2)) if total[-1] else len(profile) // 2)
    return np.array(middles)


def foreground_box(mask: np.ndarray) -> np.ndarray:
    """
    First and last index along each axis between which a mask lies, ``(2, 3)``; the whole volume if it is empty.

    Planes with hardly a voxel of it are noise.
    """
    box = []
    for profile in _profiles(mask):
        filled = np.flatnonzero(profile > 0.01 * profile.max())
        box.append((filled[0], filled[-1]) if filled.size else (0, len(profile) - 1))
    return np.array(box).T


def joined_box(grid: Grid, boxes: list[np.ndarray]) -> np.ndarray:
    """The part ``(2, 3)`` of a grid around points given by voxel coordinates ``(N, 3)`` each, and a margin."""
    corners = np.concatenate(boxes)
    margin = MARGIN / np.array(grid.spacing)
    last = np.array(grid.shape) - 1
    low = np.clip(np.floor(corners.min(0) - margin), 0, last)
    high = np.clip(np.ceil(corners.max(0) + margin), 0, last)
    return np.stack([low, high]).astype(int)


def box_corners(box: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The eight corners of a box ``(2, 3)`` under a matrix ``(4, 4)``: ``(8, 3)``."""
    corners = np.stack(np.meshgrid(*box.T, indexing="ij"), -1).reshape(-1, 3).astype(float)
    return np.asarray(corners @ matrix[:3, :3].T + matrix[:3, 3])
