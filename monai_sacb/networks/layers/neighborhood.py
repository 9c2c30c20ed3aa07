# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Helpers for operators on the neighbours of every voxel: all voxels one offset at a time, or some whole windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monai_sacb.utils import is_exported

__all__ = ["Windows", "empty_maps", "pad_spatial", "shifted", "window_mean", "window_offsets"]

# windows that are gathered at a time: a few megabytes, the second level of a CPU's cache
CHUNK_ELEMENTS = 2**19


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


def empty_maps(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Empty maps of the size of others, in the layout in which the operators leave theirs."""
    batch, spatial = x.shape[0], x.shape[2:]
    if x.device.type == "cpu":
        return x.new_empty([batch, *spatial, channels]).movedim(-1, 1)
    return x.new_empty([batch, channels, *spatial])


def _pooled_mean(x: torch.Tensor, kernel: int) -> torch.Tensor:
    # explicit zeros: the divisor is the full window at the border too, and pooling refuses axes shorter than its window
    x = pad_spatial(x, kernel // 2)
    return F.avg_pool3d(x, kernel, 1) if x.dim() == 5 else F.avg_pool2d(x, kernel, 1)


def window_mean(x: torch.Tensor, kernel: int = 3) -> torch.Tensor:
    """
    Mean over the window of every voxel, zeros outside, of 2-D or 3-D ``(B, C, *spatial)``; in float32 at least.
    """
    if x.dtype != torch.float64:
        x = x.float()
    if torch.jit.is_scripting():
        return _pooled_mean(x, kernel)
    # ONNX takes no convolution whose weight comes from the size of another map
    if is_exported() or not (x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.enabled):
        return _pooled_mean(x, kernel)
    # the convolution of each channel by itself, of a library that has it, takes a fifth of the time of pooling
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    weight = x.new_full([x.shape[1], 1] + [kernel] * (x.dim() - 2), 1.0 / kernel ** (x.dim() - 2))
    with torch.autocast("cpu", enabled=False):
        return convolve(x, weight, padding=kernel // 2, groups=x.shape[1])


class Windows:
    """The window of every voxel as one row, ``(n, taps * C)``, for any selection of voxels.

    The image lies padded and channels-last in memory, so that the taps along the last axis are one run of numbers.
    """

    def __init__(self, spatial_shape: list[int], kernel: int, device: torch.device) -> None:
        self.kernel, self.spatial_shape = kernel, spatial_shape
        self.corner = torch.zeros([1] * len(spatial_shape), dtype=torch.long, device=device)
        self.runs = torch.zeros(1, dtype=torch.long, device=device)
        stride = 1
        for axis in range(len(spatial_shape) - 1, -1, -1):
            shape = [1] * len(spatial_shape)
            shape[axis] = -1
            self.corner = self.corner + torch.arange(spatial_shape[axis], device=device).view(shape) * stride
            if axis < len(spatial_shape) - 1:
                steps = torch.arange(kernel, device=device) * stride
                self.runs = (steps.unsqueeze(1) + self.runs).flatten()
            stride *= spatial_shape[axis] + kernel - 1
        self.corner = self.corner.flatten()
        # from the corner of the window to each of its voxels, and to its middle
        self.taps = (self.runs.unsqueeze(1) + torch.arange(kernel, device=device)).flatten()
        self.num_taps = self.taps.numel()
        self.middle = int(self.taps[self.num_taps // 2])

    def chunk_size(self, channels: int) -> int:
        """Number of voxels whose windows are to be gathered at a time."""
        return max(16, CHUNK_ELEMENTS // (self.num_taps * channels))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """``(C, *spatial)`` as rows ``(padded voxels, C)``."""
        width = self.kernel // 2
        return F.pad(x.movedim(0, -1), [0, 0] + [width, width] * len(self.spatial_shape)).flatten(0, -2).contiguous()

    def rows(self, padded: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """The windows with the given corners, ``(n, taps * C)``, of what :py:meth:`pad` gives."""
        channels = padded.shape[1]
        runs = padded.as_strided(
            [padded.shape[0] - self.kernel + 1, self.kernel * channels], [channels, 1], padded.storage_offset()
        )
        index = (corner.unsqueeze(1) + self.runs).flatten()
        return runs.index_select(0, index).view(corner.numel(), -1)

    def steps(self, dtype: torch.dtype) -> torch.Tensor:
        """Where the voxels of a window lie, seen from its middle, ``(taps, d)``."""
        offsets = window_offsets(len(self.spatial_shape), self.kernel)
        return torch.tensor(offsets, dtype=dtype, device=self.taps.device) - self.kernel // 2
