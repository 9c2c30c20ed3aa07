# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Geometries, and ITK's own images and transforms to compare with, made without the package."""

from __future__ import annotations

from typing import Any

import itk
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from monai_sacb.data.spatial_mapping import PhysicalField

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def geometry(axes: str, spacing: tuple[float, ...], origin: tuple[float, ...], degrees: float = 0.0) -> np.ndarray:
    """Voxels to RAS millimetres, turned about two axes."""
    matrix = np.zeros((3, 3))
    for column, code in enumerate(axes):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        matrix[row, column] = 1.0 if code in "RAS" else -1.0
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


ISOTROPIC, ANISOTROPIC = (1.5, 1.5, 1.5), (0.9, 1.3, 3.0)
GRIDS = {
    "RAS": geometry("RAS", ISOTROPIC, (-10, -12, 5)),
    "RAS anisotropic": geometry("RAS", ANISOTROPIC, (-10, -12, -18)),
    "LAS": geometry("LAS", ISOTROPIC, (12, -12, 5)),
    "LAS anisotropic": geometry("LAS", ANISOTROPIC, (8, -12, -18)),
    "LPS": geometry("LPS", ISOTROPIC, (12, 14, 5)),
    "LPS anisotropic": geometry("LPS", ANISOTROPIC, (8, 11, -18)),
    "oblique": geometry("RAS", ISOTROPIC, (-8, -12, 5), 20),
    "oblique ASL anisotropic": geometry("ASL", ANISOTROPIC, (15, -12, -4), -25),
}
# of points in RAS millimetres: a turn of about 10 degrees, shear, scale and a shift
AFFINE = geometry("RAS", (1.05, 0.95, 1.0), (1.5, -2.0, 0.7), 6) @ np.array(
    [[1, 0.05, 0, 0], [0, 1, -0.03, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
)


def smooth(shape: tuple[int, ...], sigma: float = 2.0, seed: int = 0) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return np.asarray((noise - noise.mean()) / noise.std(), dtype=np.float32)


def smooth_field(
    shape: tuple[int, int, int], affine: np.ndarray, strength: float = 1.0, sigma: float = 3.0
) -> PhysicalField:
    """A random field of about ``strength`` millimetres."""
    vectors = strength * np.stack([smooth(shape, sigma, seed) for seed in (5, 6, 7)])
    return PhysicalField(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(affine))


def itk_image(array: np.ndarray, affine: np.ndarray, vector: bool = False) -> Any:
    """An image of ITK from an array ``(D, H, W)`` (``(D, H, W, 3)``, LPS, if of vectors) and its affine in RAS."""
    axes = (2, 1, 0, 3) if vector else (2, 1, 0)
    if vector:
        image = itk.Image[itk.Vector[itk.D, 3], 3].New()
        image.SetRegions([int(size) for size in array.shape[:3]])
        image.Allocate()
        itk.array_view_from_image(image)[...] = array.transpose(axes)
    else:
        image = itk.image_from_array(np.ascontiguousarray(array.transpose(axes)))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
    return image


def itk_affine(affine: np.ndarray) -> Any:
    matrix = LPS @ affine @ LPS
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:3, :3])))
    transform.SetOffset(matrix[:3, 3].tolist())
    return transform


def itk_field(field: PhysicalField) -> Any:
    vectors = np.moveaxis(field.vectors.numpy(), 0, -1) * [-1, -1, 1]
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(itk_image(vectors, field.affine.numpy(), vector=True))
    return transform


def itk_composite(*stages: np.ndarray | PhysicalField) -> Any:
    """ITK's composite of stages in the order in which points go through them."""
    composite = itk.CompositeTransform[itk.D, 3].New()
    for stage in reversed(stages):
        composite.AddTransform(itk_field(stage) if isinstance(stage, PhysicalField) else itk_affine(stage))
    return composite


def itk_points(transform: Any, points: np.ndarray) -> np.ndarray:
    """Points in RAS millimetres through a transform in LPS."""
    signs = np.array([-1.0, -1.0, 1.0])
    return np.array([list(transform.TransformPoint((p * signs).tolist())) for p in points]) * signs


def itk_resample(image: Any, transform: Any, shape: tuple[int, ...], affine: np.ndarray, nearest: bool = False) -> Any:
    """The image on a grid through a transform, as an array ``(D, H, W)``."""
    reference = itk_image(np.zeros(shape, dtype=np.float32), affine)
    kind = itk.NearestNeighborInterpolateImageFunction if nearest else itk.LinearInterpolateImageFunction
    result = itk.resample_image_filter(
        image,
        transform=transform,
        interpolator=kind[type(image), itk.D].New(),
        use_reference_image=True,
        reference_image=reference,
        default_pixel_value=0,
    )
    return itk.array_from_image(result).transpose(2, 1, 0)
