# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Small pairs of files in every geometry, whose true deformation is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import itk
import numpy as np


def blobs(points: np.ndarray) -> np.ndarray:
    """A smooth object about 60 mm wide around the origin of space, ``(..., 3)`` RAS mm -> intensity in 0..100."""
    x, y, z = np.moveaxis(points, -1, 0)
    body = 1 / (1 + np.exp((np.sqrt((x / 26) ** 2 + (y / 30) ** 2 + (z / 24) ** 2) - 1) * 12))
    rng = np.random.default_rng(0)
    texture = np.full(x.shape, 0.5)
    for centre, sign in zip(rng.uniform(-26, 26, (250, 3)), rng.choice([-0.4, 0.4], 250)):
        texture += sign * np.exp(-((points - centre) ** 2).sum(-1) / (2 * 2.8**2))
    # nothing at all outside, as around a stripped brain
    return np.where(body > 0.02, 100 * body * texture.clip(0, 1), 0)


def structures(points: np.ndarray) -> np.ndarray:
    """Label ids 3 and 1021 in the object."""
    x, y, z = np.moveaxis(points, -1, 0)
    label = np.where(((x / 20) ** 2 + (y / 22) ** 2 + (z / 18) ** 2) < 1, 3, 0)
    return np.where((((x - 4) / 9) ** 2 + ((y + 5) / 10) ** 2 + (z / 8) ** 2) < 1, 1021, label)


def deformation(points: np.ndarray) -> np.ndarray:
    """Places in the moving image of places in the fixed image: up to about 4 mm away."""
    x, y, z = np.moveaxis(points, -1, 0)
    return points + np.stack([3 * np.sin(y / 14), 2.5 * np.cos(z / 12) * np.sin(x / 20), 2 * np.sin(x / 13 + 1)], -1)


def grid_points(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def centred(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The same directions and voxel sizes, with the middle of the grid near the origin of space."""
    result = affine.copy()
    result[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2) + (1.5, -2.0, 1.0)
    return result


class Pair(NamedTuple):
    """Files of a pair."""

    moving: str
    fixed: str
    moving_label: str
    fixed_label: str


MakePair = Callable[..., Pair]


def write_itk(array: np.ndarray, affine: np.ndarray, path: str) -> None:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    itk.imwrite(image, path)
