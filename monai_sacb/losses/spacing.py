# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Voxel sizes as losses take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

__all__ = ["check_spacing", "voxel_sizes"]


def check_spacing(spacing: float | Sequence[float] | None) -> tuple[float, ...] | None:
    """
    Refuse what cannot be a voxel size.

    Args:
        spacing: voxel size in mm, one for all axes or one for each; ``None`` for voxels.

    Returns:
        one value, or one for each axis; or ``None``.

    Raises:
        ValueError: When a size is not positive and finite, or there are more than three.
    """
    if spacing is None:
        return None
    sizes = tuple(spacing) if isinstance(spacing, Sequence) else (spacing,)
    if len(sizes) not in (1, 2, 3) or not all(isinstance(size, Real) and 0 < size < math.inf for size in sizes):
        raise ValueError(f"spacing must be None, a positive number or one for each of 2 or 3 axes, got {spacing!r}.")
    return tuple(float(size) for size in sizes)


def voxel_sizes(spacing: tuple[float, ...] | None, dims: int) -> tuple[float, ...]:
    """
    The voxel size along each axis, 1 where all is measured in voxels.

    Args:
        spacing: what :py:func:`check_spacing` gives.
        dims: number of axes.

    Raises:
        ValueError: When there are sizes for another number of axes.
    """
    sizes = (1.0,) if spacing is None else spacing
    if len(sizes) not in (1, dims):
        raise ValueError(f"spacing {sizes} has not one value for each of the {dims} axes of the field.")
    return sizes * dims if len(sizes) == 1 else sizes
