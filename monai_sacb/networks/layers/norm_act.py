# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Instance norm and LeakyReLU in one, in the memory of one feature map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from monai_sacb.utils import is_traced

__all__ = ["instance_norm_leaky_relu"]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``(B, C, *spatial)`` as ``(B, L, W, C)``, all lines of the last axis; a view if contiguous or channels-last."""
    if x.is_contiguous():
        return x.flatten(2, -2).permute(0, 2, 3, 1)
    return x.movedim(1, -1).flatten(1, -3)


def _maps(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``(B, L, W, C)`` as ``(B, C, *spatial)`` of the shape of another tensor; a view."""
    return rows.unflatten(1, like.shape[2:-1]).movedim(-1, 1)


# Means over millions of voxels are taken line by line and then in double precision: their error is the same at every
# voxel, so that it adds up in the gradient of a weight while the gradient itself cancels.


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Mean over the voxels, ``(B, 1, 1, C)``."""
    return rows.mean(2, keepdim=True).mean(1, keepdim=True, dtype=torch.float64).to(rows.dtype)


def _mean_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over the voxels of ``a * b``, ``(B, 1, 1, C)``, without a third array of their size."""
    # all C x C products cost less than one more pass over memory as long as there are few channels
    products = torch.matmul(a.transpose(2, 3), b).diagonal(dim1=2, dim2=3)
    return products.mean(1, dtype=torch.float64).div_(a.shape[2]).to(a.dtype).unsqueeze(1).unsqueeze(1)


def _precise_mean(x: torch.Tensor) -> torch.Tensor:
    """The same of maps ``(B, C, *spatial)``: ``(B, C, 1, ...)``, in operations that ONNX knows."""
    rest = list(range(2, x.dim() - 1))
    return x.mean(-1, keepdim=True).mean(rest, keepdim=True, dtype=torch.float64).to(x.dtype)


class _InstanceNormLeakyReLU(torch.autograd.Function):
    """Overwrites its input and keeps nothing but its output, from which LeakyReLU is undone in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, negative_slope: float, eps: float) -> torch.Tensor:
        rows = _rows(x)
        rows.sub_(_mean(rows))
        scale = (_mean_product(rows, rows) + eps).rsqrt_()
        rows.mul_(scale)
        F.leaky_relu_(rows, negative_slope)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, scale)
        ctx.negative_slope = negative_slope
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, scale = ctx.saved_tensors
        y_rows, grad = _rows(y), _rows(grad_y)
        grad = torch.ops.aten.leaky_relu_backward(grad, y_rows, ctx.negative_slope, True)
        normalized = F.leaky_relu(y_rows, 1.0 / ctx.negative_slope)
        projection = _mean_product(grad, normalized)
        grad.sub_(_mean(grad)).addcmul_(normalized, -projection).mul_(scale)
        return _maps(grad, y), None, None


def instance_norm_leaky_relu(x: torch.Tensor, negative_slope: float = 0.1, eps: float = 1e-5) -> torch.Tensor:
    """
    ``leaky_relu(instance_norm(x))``, which may overwrite ``x``.

    For feature maps that nothing else needs, such as the output of a convolution: neither the map in front of the norm
    nor that between norm and activation is kept for the backward pass.

    Args:
        x: ``(B, C, *spatial)``, contiguous or channels-last.
        negative_slope: slope of the activation for negative values.
        eps: added to the variance.

    Returns:
        ``(B, C, *spatial)``, each channel of each image with mean 0 and variance 1 before the activation.

    Source: Bulò et al., In-place activated BatchNorm for memory-optimized training of DNNs, CVPR 2018.
    """
    if not torch.jit.is_scripting():
        invertible = negative_slope > 0 and x.dtype in (torch.float32, torch.float64)
        in_place = (x.is_contiguous() or x.movedim(1, -1).is_contiguous()) and not (x.is_leaf and x.requires_grad)
        if invertible and in_place and not is_traced():
            return _InstanceNormLeakyReLU.apply(x, negative_slope, eps)
        if torch.onnx.is_in_onnx_export():
            # its operator of that name needs to know the number of channels, which it loses on the way
            x = x - _precise_mean(x)
            return F.leaky_relu(x * (_precise_mean(x.square()) + eps).rsqrt(), negative_slope)
    return F.leaky_relu(F.instance_norm(x, eps=eps), negative_slope)
