# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from monai_sacb.networks.layers.neighborhood import Windows, empty_maps, pad_spatial, shifted, window_offsets
from monai_sacb.utils import is_exported

__all__ = ["SimilarityMatching"]


def _expected_offset(moving: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
    """One offset after the other over the whole map, which can be scripted and exported and suits a GPU."""
    spatial = list(fixed.shape[2:])
    dims = len(spatial)
    radius = window // 2
    padded = pad_spatial(moving, radius)
    offsets = window_offsets(dims, window)
    scores = torch.cat([(fixed * shifted(padded, offset, spatial)).sum(1, keepdim=True) for offset in offsets], 1)
    # a field in half precision is off by tenths of a voxel
    weights = scores.softmax(1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    displacement: list[torch.Tensor] = []
    for axis in range(dims):
        expected = torch.zeros_like(weights[:, 0])
        for tap, offset in enumerate(offsets):
            step = offset[axis] - radius
            if step != 0:
                expected = expected + step * weights[:, tap]
        displacement.append(expected)
    return torch.stack(displacement, 1)


def _match(
    windows: Windows, padded: torch.Tensor, corner: torch.Tensor, fixed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows ``(n, taps, C)`` and softmax weights ``(n, taps)`` of voxels whose features are ``fixed (n, C)``."""
    taps = windows.rows(padded, corner).view(corner.numel(), windows.num_taps, -1)
    return taps, torch.bmm(fixed.unsqueeze(1), taps.transpose(1, 2)).squeeze(1).softmax(1)


# A few thousand voxels at a time, whose windows stay in a CPU's cache, and nothing kept for the backward pass but the
# two maps.


def _windowed(moving: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
    spatial = list(fixed.shape[2:])
    windows = Windows(spatial, window, fixed.device)
    size = windows.chunk_size(fixed.shape[1])
    steps = windows.steps(fixed.dtype)
    ddf = fixed.new_empty([fixed.shape[0], windows.corner.numel(), len(spatial)])
    for i in range(fixed.shape[0]):
        padded, rows = windows.pad(moving[i]), fixed[i].movedim(0, -1).flatten(0, -2)
        for corner, part, out in zip(windows.corner.split(size), rows.split(size), ddf[i].split(size)):
            torch.mm(_match(windows, padded, corner, part)[1], steps, out=out)
    return ddf.transpose(1, 2).unflatten(2, spatial)


def _windowed_backward(
    grad_ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    spatial = list(fixed.shape[2:])
    windows = Windows(spatial, window, fixed.device)
    num_taps, channels = windows.num_taps, fixed.shape[1]
    size = windows.chunk_size(channels)
    steps = windows.steps(fixed.dtype)
    mirrored = torch.arange(num_taps - 1, -1, -1, device=fixed.device)
    grad_moving, grad_fixed = (fixed.new_empty([fixed.shape[0], windows.corner.numel(), channels]) for _ in range(2))
    grad_scores = fixed.new_empty([windows.corner.numel(), num_taps])
    for i in range(fixed.shape[0]):
        padded, rows = windows.pad(moving[i]), fixed[i].movedim(0, -1).flatten(0, -2)
        grad_rows = grad_ddf[i].flatten(1).t()
        for corner, part, grad, scores, out in zip(
            *(t.split(size) for t in (windows.corner, rows, grad_rows, grad_scores, grad_fixed[i]))
        ):
            taps, weights = _match(windows, padded, corner, part)
            slope = grad @ steps.t()
            torch.mul(weights, slope - (weights * slope).sum(1, keepdim=True), out=scores)
            torch.bmm(scores.unsqueeze(1), taps, out=out.unsqueeze(1))
        # seen from a voxel of the moving map, the tap that leads to it from a neighbor is the mirrored one
        padded_scores = windows.pad(grad_scores.t().unflatten(1, spatial)).flatten()
        padded = windows.pad(fixed[i])
        for corner, out in zip(windows.corner.split(size), grad_moving[i].split(size)):
            taps = windows.rows(padded, corner).view(corner.numel(), num_taps, channels)
            index = (corner.unsqueeze(1) + windows.taps) * num_taps + mirrored
            torch.bmm(padded_scores.take(index).unsqueeze(1), taps, out=out.unsqueeze(1))
    grads = [t.transpose(1, 2).unflatten(2, spatial) for t in (grad_moving, grad_fixed)]
    return grads[0], grads[1]


class _ExpectedOffset(torch.autograd.Function):
    forward = staticmethod(_windowed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        moving, fixed, ctx.window = inputs
        ctx.save_for_backward(moving, fixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ddf: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # the backward pass may run within the caller's autocast
        moving, fixed = ctx.saved_tensors
        with torch.autocast(device_type=grad_ddf.device.type, enabled=False):
            return (*_windowed_backward(grad_ddf, moving, fixed, ctx.window), None)


# The same as operators, which torch.compile takes as they are; see cluster_adaptive_conv for why only there.


@torch.library.custom_op("monai_sacb::expected_offset", mutates_args=())
def _compiled_offset(moving: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
    return _windowed(moving, fixed, window)


@_compiled_offset.register_fake
def _(moving: torch.Tensor, fixed: torch.Tensor, window: int) -> torch.Tensor:
    return empty_maps(fixed, fixed.dim() - 2)


@torch.library.custom_op("monai_sacb::expected_offset_backward", mutates_args=())
def _compiled_offset_backward(
    grad_ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _windowed_backward(grad_ddf, moving, fixed, window)


@_compiled_offset_backward.register_fake
def _(
    grad_ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_maps(moving, moving.shape[1]), empty_maps(fixed, fixed.shape[1])


def _backward(ctx: Any, grad_ddf: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_compiled_offset_backward(grad_ddf, *ctx.saved_tensors, ctx.window), None)


_compiled_offset.register_autograd(_backward, setup_context=_ExpectedOffset.setup_context)


class SimilarityMatching(nn.Module):
    """
    Displacement between two feature maps: the expected offset under a softmax of feature products.

    For every voxel p, the inner products of ``fixed(p)`` with ``moving(p + q)`` over the offsets q of a small cubic
    window, zeros outside the image, pass through a softmax; the result is the mean offset under these weights.

    Args:
        window: odd size of the search window. At most ``window // 2`` voxels per axis can be found.
        scale: factor of the products before the softmax, the inverse of its temperature. The paper has none.

    Raises:
        ValueError: When ``window`` is not a positive odd number, or ``scale`` is not positive.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025, section 3.
    """

    def __init__(self, window: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        if window < 1 or window % 2 != 1:
            raise ValueError(f"window must be a positive odd number, got {window}.")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a positive number, got {scale}.")
        self.window = window
        # part of the state: weights that were trained with one scale are worth nothing with another
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor(float(scale)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a state without it is one of the paper's network
        state_dict.setdefault(f"{prefix}scale", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """
        Args:
            moving: features of the moving image, ``(B, C, *spatial)``.
            fixed: features of the fixed image, ``(B, C, *spatial)``.

        Returns:
            displacement ``(B, d, *spatial)`` in voxels of this grid, pull-back (from fixed to moving), channel i along
            array axis i.

        Raises:
            ValueError: When the two shapes differ, or have no spatial axis.
        """
        if moving.shape != fixed.shape or fixed.dim() < 3:
            raise ValueError(
                f"moving and fixed features must have one shape (B, C, *spatial), got {list(moving.shape)} and "
                f"{list(fixed.shape)}."
            )
        fixed = fixed * self.scale
        if torch.jit.is_scripting():
            return _expected_offset(moving, fixed, self.window)
        if is_exported() or not fixed.is_cpu or fixed.dim() == 3:
            return _expected_offset(moving, fixed, self.window)
        dtype = torch.float64 if fixed.dtype == torch.float64 else torch.float32
        with torch.autocast("cpu", enabled=False):
            if torch.compiler.is_compiling():
                return _compiled_offset(moving.to(dtype), fixed.to(dtype), self.window)
            return _ExpectedOffset.apply(moving.to(dtype), fixed.to(dtype), self.window)
