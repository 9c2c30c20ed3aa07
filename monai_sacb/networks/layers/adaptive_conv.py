# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The convolution whose taps are scaled by a gate of the region that a voxel belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_sacb.networks.layers.neighborhood import Windows, empty_maps, pad_spatial, shifted, window_offsets
from monai_sacb.utils import is_exported

__all__ = ["cluster_adaptive_conv"]


# One tap after the other: no index arithmetic and no value that the host must know; can be scripted and exported.


def _tapwise(
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


def _tapwise_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels, spatial = x.shape[0], x.shape[1], list(x.shape[2:])
    padded = pad_spatial(x, kernel // 2)
    grad_padded = torch.zeros_like(padded)
    grad_weight = weight.new_empty(weight.shape)
    grad_gates = gates.new_empty(gates.shape)
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
    return grad_x, grad_weight, grad_gates, torch.bmm(member, grad_y.transpose(1, 2))


# One matrix product per cluster, over the windows of its voxels: the arithmetic of one plain convolution. The windows
# are gathered a few thousand voxels at a time, so that they stay in a CPU's cache.


def _members(labels: torch.Tensor, num_clusters: int, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The voxels of every cluster, at most ``size`` at a time."""
    # bytes are sorted several times faster
    keys = labels.to(torch.uint8) if num_clusters <= 256 else labels
    order = keys.argsort(stable=True)
    counts = torch.bincount(labels, minlength=num_clusters).tolist()
    for cluster, voxels in enumerate(order.split(counts)):
        for part in voxels.split(size):
            if part.numel() > 0:
                yield cluster, part


def _grouped(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, kernel: int
) -> torch.Tensor:
    num_clusters = gates.shape[1]
    lowest, highest = (int(value) for value in labels.aminmax()) if labels.numel() > 0 else (0, 0)
    if lowest < 0 or highest >= num_clusters:
        raise ValueError(f"labels must lie in [0, {num_clusters}), got {lowest if lowest < 0 else highest}.")
    (batch, channels), spatial, out_channels = x.shape[:2], list(x.shape[2:]), weight.shape[0]
    windows = Windows(spatial, kernel, x.device)
    size = windows.chunk_size(channels)
    taps = weight.permute(2, 1, 0)
    y = x.new_empty([batch, labels.shape[1], out_channels])
    for i in range(batch):
        padded = windows.pad(x[i])
        gated = (gates[i].unsqueeze(2).unsqueeze(3) * taps).flatten(1, 2)
        for cluster, voxels in _members(labels[i], num_clusters, size):
            rows = windows.rows(padded, windows.corner[voxels])
            y[i].index_copy_(0, voxels, torch.addmm(bias[i, cluster], rows, gated[cluster]))
    return y.unflatten(1, spatial).movedim(-1, 1)


def _grouped_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, channels), spatial = x.shape[:2], list(x.shape[2:])
    out_channels, num_taps = weight.shape[0], weight.shape[2]
    windows = Windows(spatial, kernel, x.device)
    size = windows.chunk_size(max(channels, out_channels))
    taps = weight.permute(2, 1, 0)
    mirrored = weight.flip(2).permute(2, 0, 1).reshape(num_taps * out_channels, channels)
    mirrored_gates = gates.flip(2)
    grad_taps = torch.zeros_like(taps)
    grad_gates = gates.new_empty(gates.shape)
    grad_bias = gates.new_zeros([batch, gates.shape[1], out_channels])
    grad_x = x.new_empty([batch, labels.shape[1], channels])
    for i in range(batch):
        padded, padded_grad = windows.pad(x[i]), windows.pad(grad_y[i])
        # of every cluster, the sum over its voxels of window times gradient: the gradients of weight and gates are
        # sums over it
        products = gates.new_zeros([gates.shape[1], num_taps * channels, out_channels])
        for cluster, voxels in _members(labels[i], gates.shape[1], size):
            corner = windows.corner[voxels]
            rows = padded_grad.index_select(0, corner + windows.middle)
            products[cluster].addmm_(windows.rows(padded, corner).t(), rows)
            grad_bias[i, cluster] += rows.sum(0)
        products = products.unflatten(1, [num_taps, channels])
        grad_taps += (products * gates[i].unsqueeze(2).unsqueeze(3)).sum(0)
        grad_gates[i] = (products * taps).sum([2, 3])
        # a convolution of the gradient whose taps are gated by the cluster of the voxel that they come from
        positions = windows.pad(labels[i].view([1] + spatial)) * num_taps
        tap_index = torch.arange(num_taps, device=x.device)
        for corner, part in zip(windows.corner.split(size), grad_x[i].split(size)):
            gate = mirrored_gates[i].take(windows.rows(positions, corner).add_(tap_index))
            rows = windows.rows(padded_grad, corner).view(-1, num_taps, out_channels).mul_(gate.unsqueeze(2))
            torch.mm(rows.flatten(1), mirrored, out=part)
    return grad_x.unflatten(1, spatial).movedim(-1, 1), grad_taps.permute(2, 1, 0).contiguous(), grad_gates, grad_bias


# The backward pass needs the input, labels and small weights, and none of the gated copies.


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, kernel: int
) -> torch.Tensor:
    return (_grouped if x.is_cpu else _tapwise)(x, weight, gates, bias, labels, kernel)


def _convolve_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # the backward pass may run within the caller's autocast
    with torch.autocast(device_type=x.device.type, enabled=False):
        return (_grouped_backward if x.is_cpu else _tapwise_backward)(grad_y, x, weight, gates, labels, kernel)


class _AdaptiveConv(torch.autograd.Function):
    forward = staticmethod(_convolve)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, gates, _, labels, ctx.kernel = inputs
        ctx.save_for_backward(x, weight, gates, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, gates, labels = ctx.saved_tensors
        return (*_convolve_backward(grad_y, x, weight, gates, labels, ctx.kernel), None, None)


# The same as operators, which torch.compile takes as they are. Only there: outside, an operator lets the tangents of
# forward-mode differentiation pass for zero, where a Function refuses them.


@torch.library.custom_op("monai_sacb::cluster_adaptive_conv", mutates_args=())
def _compiled_conv(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, kernel: int
) -> torch.Tensor:
    return _convolve(x, weight, gates, bias, labels, kernel)


@_compiled_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_maps(x, weight.shape[0])


@torch.library.custom_op("monai_sacb::cluster_adaptive_conv_backward", mutates_args=())
def _compiled_conv_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, labels: torch.Tensor, kernel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _convolve_backward(grad_y, x, weight, gates, labels, kernel)


@_compiled_conv_backward.register_fake
def _(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_bias = gates.new_empty([x.shape[0], gates.shape[1], weight.shape[0]])
    return empty_maps(x, x.shape[1]), weight.new_empty(weight.shape), gates.new_empty(gates.shape), grad_bias


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_compiled_conv_backward(grad_y, *ctx.saved_tensors, ctx.kernel), None, None)


_compiled_conv.register_autograd(_backward, setup_context=_AdaptiveConv.setup_context)


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
        ValueError: When the shapes do not belong together, or (on a CPU) a label is not in ``[0, K)``.

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
        return _tapwise(x, weight, gates, bias, labels, kernel_size)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if is_exported():
            return _tapwise(x, weight, gates, bias, labels, kernel_size)
        if torch.compiler.is_compiling():
            return _compiled_conv(x, weight, gates, bias, labels, kernel_size)
        return _AdaptiveConv.apply(x, weight, gates, bias, labels, kernel_size)
