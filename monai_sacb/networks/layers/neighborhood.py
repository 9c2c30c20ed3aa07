# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Helpers for operators that visit the neighbours of every voxel one offset at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["pad_spatial", "shifted", "window_offsets"]


def window_offsets(spatial_dims: int, window: int) -> list[list[int]]:
    """Offsets of a cubic window, in row-major order of the axes, counted from the window's first corner."""
    num_offsets = 1
    for _ in range(spatial_dims):
        num_offsets *= window
    offsets: list[list[int]] = []
    for rest in range(num_offsets):
        offset = [0] * spatial_dims
        for axis in range(spatial_dims - 1, -1, -1):
            offset[axis] = rest % window
            rest = rest // window
        offsets.append(offset)
    return offsets


def pad_spatial(x: torch.Tensor, width: int) -> torch.Tensor:
    """Add ``width`` zeros at both ends of every spatial axis of ``(B, C, *spatial)``."""
    return F.pad(x, [width, width] * (x.dim() - 2))


def shifted(padded: torch.Tensor, offset: list[int], spatial_shape: list[int]) -> torch.Tensor:
    """View of ``spatial_shape`` that starts at ``offset`` in the spatial axes of ``padded`` ``(B, C, *spatial)``."""
    for axis, (start, size) in enumerate(zip(offset, spatial_shape)):
        padded = padded.narrow(axis + 2, start, size)
    return padded
