# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The convolution whose taps are scaled by a gate of the region that a voxel belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_sacb.networks.layers.neighborhood import pad_spatial, shifted, window_offsets

__all__ = ["cluster_adaptive_conv"]


def _forward(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, kernel: int
) -> torch.Tensor:
    batch, channels, spatial = x.shape[0], x.shape[1], list(x.shape[2:])
    offsets = window_offsets(len(spatial), kernel)
    padded = pad_spatial(x, kernel // 2)
    taps = weight.permute(2, 0, 1)
    y = bias.transpose(1, 2).gather(2, labels.unsqueeze(1).expand(-1, bias.shape[2], -1))
    for tap, offset in enumerate(offsets):
        gate = gates[:, :, tap].gather(1, labels).view([batch, 1] + spatial)
        gated = (shifted(padded, offset, spatial) * gate).view(batch, channels, -1)
        y = torch.baddbmm(y, taps[tap].unsqueeze(0).expand(batch, -1, -1), gated)
    return y.view([batch, weight.shape[0]] + spatial)


class _ClusterAdaptiveConv(torch.autograd.Function):
    """Keeps the input, not its 27 gated copies, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        gates: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        kernel: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, gates, labels)
        ctx.kernel = kernel
        return _forward(x, weight, gates, bias, labels, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, gates, labels = ctx.saved_tensors
        kernel = ctx.kernel
        batch, channels, spatial = x.shape[0], x.shape[1], list(x.shape[2:])
        padded = pad_spatial(x, kernel // 2)
        grad_padded = torch.zeros_like(padded)
        grad_weight = torch.empty_like(weight)
        grad_gates = torch.empty_like(gates)
        grad_y = grad_y.reshape(batch, weight.shape[0], -1)
        clusters = torch.arange(gates.shape[1], device=x.device).view(1, -1, 1)
        member = (labels.unsqueeze(1) == clusters).to(grad_y.dtype)
        for tap, offset in enumerate(window_offsets(x.dim() - 2, kernel)):
            neighbor = shifted(padded, offset, spatial).reshape(batch, channels, -1)
            gate = gates[:, :, tap].gather(1, labels).unsqueeze(1)
            back = torch.matmul(weight[:, :, tap].t(), grad_y)
            per_voxel = (back * neighbor).sum(1, keepdim=True)
            grad_gates[:, :, tap] = torch.bmm(member, per_voxel.transpose(1, 2)).squeeze(2)
            grad_weight[:, :, tap] = torch.bmm(grad_y, (neighbor * gate).transpose(1, 2)).sum(0)
            target = shifted(grad_padded, offset, spatial)
            target += (back * gate).view(batch, channels, *spatial)
        grad_x = shifted(grad_padded, [kernel // 2] * len(spatial), spatial).contiguous()
        grad_bias = torch.bmm(member, grad_y.transpose(1, 2))
        return grad_x, grad_weight, grad_gates, grad_bias, None, None


def cluster_adaptive_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    gates: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    kernel_size: int = 3,
) -> torch.Tensor:
    """
    Convolution with one weight whose taps and bias depend on the cluster of the output voxel.

    ``y(p) = sum over taps t of gates[S(p), t] * weight[:, :, t] @ x(p + t) + bias[S(p)]``, zeros outside the image. The
    work of one plain convolution, whatever the number of clusters.

    Args:
        x: ``(B, C_in, *spatial)``, 2-D or 3-D.
        weight: ``(C_out, C_in, T)``, the ``T = kernel_size ** d`` taps in row-major order of the axes.
        gates: ``(B, K, T)``, factor of every tap for every cluster.
        bias: ``(B, K, C_out)``, bias for every cluster.
        labels: ``(B, N)``, cluster S(p) of every voxel, integers in ``[0, K)``, voxels in row-major order.
        kernel_size: odd window size.

    Returns:
        ``(B, C_out, *spatial)``, differentiable once with respect to ``x``, ``weight``, ``gates`` and ``bias``.

    Raises:
        ValueError: When the shapes do not belong together.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025, section 3.
    """
    spatial = list(x.shape[2:])
    num_voxels = 1
    for size in spatial:
        num_voxels *= size
    num_taps = len(window_offsets(len(spatial), kernel_size))
    if (
        kernel_size % 2 != 1
        or weight.dim() != 3
        or gates.dim() != 3
        or list(weight.shape) != [weight.shape[0], x.shape[1], num_taps]
        or list(gates.shape) != [x.shape[0], gates.shape[1], num_taps]
        or list(bias.shape) != [x.shape[0], gates.shape[1], weight.shape[0]]
        or list(labels.shape) != [x.shape[0], num_voxels]
    ):
        raise ValueError(
            f"shapes do not belong together: x {list(x.shape)}, weight {list(weight.shape)}, gates "
            f"{list(gates.shape)}, bias {list(bias.shape)}, labels {list(labels.shape)}, kernel_size {kernel_size}."
        )
    labels = labels.long()
    # one type for all operands, which autocast would otherwise mix
    weight, gates, bias = weight.to(x.dtype), gates.to(x.dtype), bias.to(x.dtype)
    if torch.jit.is_scripting():
        return _forward(x, weight, gates, bias, labels, kernel_size)
    with torch.autocast(device_type=x.device.type, enabled=False):
        # a trace cannot hold a Python function
        if torch.jit.is_tracing() or not torch.is_grad_enabled():
            y = _forward(x, weight, gates, bias, labels, kernel_size)
        else:
            y = _ClusterAdaptiveConv.apply(x, weight, gates, bias, labels, kernel_size)
    return y
