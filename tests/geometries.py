# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Orientations in which image files come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def turned(matrix: Sequence[Sequence[float]], origin: Sequence[float], degrees: float = 0.0) -> np.ndarray:
    """Voxels to RAS mm, turned about two axes."""
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = (
        np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array(matrix)
    )
    affine[:3, 3] = origin
    return affine


GEOMETRIES: dict[str, np.ndarray] = {
    "RAS": np.eye(4),
    "LIA": turned([[-1, 0, 0], [0, 0, 1.5], [0, -0.8, 0]], (90, -120, 60)),
    "RPS": turned([[2, 0, 0], [0, -2, 0], [0, 0, 1]], (-40, 30, 1012)),
    "oblique": turned([[1, 0, 0], [0, 1, 0], [0, 0, 1]], (5, 6, 7), 20),
    "oblique ASL": turned([[0, 0, -2.5], [0.9, 0, 0], [0, 1.2, 0]], (-5, 60, 7), -25),
}
