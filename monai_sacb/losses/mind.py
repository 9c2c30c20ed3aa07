# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-similarity context: what a place looks like beside its surroundings, in images of any contrast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.modules.loss import _Loss

from monai.utils import LossReduction

from monai_sacb.losses.intensity_scale import intensity_scale
from monai_sacb.losses.lncc import _window_sum
from monai_sacb.networks.layers.descriptor import neighbor_pairs
from monai_sacb.networks.layers.neighborhood import shifted
from monai_sacb.utils import check_count

__all__ = ["MINDSSCLoss", "mind_ssc"]

# A variance below this part of its mean over the image is noise, and is taken for as much.
MIN_VARIANCE = 1e-3
# Keeps images without any contrast from dividing by zero or by rounding errors; far below the variance of an image with
# values in [0, 1].
TINY = 1e-8
# The least it becomes for images of large values, which are scaled into [-1, 1].
LEAST_TINY = 1e-30


class _Descriptor(torch.autograd.Function):
    """The descriptor of an image; keeps itself, the image and two maps more for the gradient."""

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, tiny: torch.Tensor, radius: int, dilation: int) -> torch.Tensor:
        spatial = list(image.shape[2:])
        dims, reach = len(spatial), radius + dilation
        padded = F.pad(image, [reach, reach] * dims, mode="replicate")
        channels = 2 * dims * (dims - 1)
        scale = 1 / (image.shape[1] * (2 * radius + 1) ** dims)
        distances = image.new_empty([len(image), channels, *spatial])
        for i, (size, start, end, *places) in enumerate(neighbor_pairs(spatial, dilation)):
            window = [n + 2 * radius for n in size]
            squares = (shifted(padded, start, window) - shifted(padded, end, window)).square_().sum(1, keepdim=True)
            patches = shifted(_window_sum(squares, 2 * radius + 1), [radius] * dims, size)
            for j, place in enumerate(places):
                distances[:, 2 * i + j] = shifted(patches, place, spatial)[:, 0]
        distances.mul_(scale)
        mean = distances.mean(1, keepdim=True)
        floor = MIN_VARIANCE * mean.mean(list(range(1, mean.dim())), keepdim=True)
        variance = mean.clamp(min=floor) + tiny
        descriptor = distances.sub_(distances.amin(1, keepdim=True)).div_(variance).neg_().exp_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(image, descriptor, variance, (mean > floor).to(mean.dtype).div_(channels))
            ctx.radius, ctx.dilation = radius, dilation
        return descriptor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        image, descriptor, variance, share = ctx.saved_tensors
        radius, dilation, spatial = ctx.radius, ctx.dilation, list(image.shape[2:])
        dims, reach = len(spatial), radius + dilation
        # m_k = exp(-(D_k - min D) / V): by D_k, by the smallest of the D and by V, which is their mean
        slope = (grad * descriptor).div_(variance).neg_()
        least, total = descriptor.argmax(1, keepdim=True), slope.sum(1, keepdim=True)
        slope += (torch.special.entr(descriptor).mul_(grad).sum(1, keepdim=True) / variance).mul_(share)
        slope.scatter_add_(1, least, total.neg_())
        slope.mul_(2 / (image.shape[1] * (2 * radius + 1) ** dims))
        padded = F.pad(image, [reach, reach] * dims, mode="replicate")
        grad_padded = torch.zeros_like(padded)
        for i, (size, start, end, *places) in enumerate(neighbor_pairs(spatial, dilation)):
            window = [n + 2 * radius for n in size]
            patches = image.new_zeros([len(image), 1, *window])
            for j, place in enumerate(places):
                shifted(patches, [radius + n for n in place], spatial)[:, 0] += slope[:, 2 * i + j]
            step = shifted(padded, start, window) - shifted(padded, end, window)
            step *= _window_sum(patches, 2 * radius + 1)
            shifted(grad_padded, start, window).add_(step)
            shifted(grad_padded, end, window).sub_(step)
        # what was padded is a copy of the border
        for axis, size in enumerate(spatial, start=2):
            inner = grad_padded.narrow(axis, reach, size)
            inner.narrow(axis, 0, 1).add_(grad_padded.narrow(axis, 0, reach).sum(axis, keepdim=True))
            after = grad_padded.narrow(axis, reach + size, reach)
            inner.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
            grad_padded = inner
        return grad_padded, None, None, None


def mind_ssc(image: torch.Tensor, radius: int = 2, dilation: int = 2) -> torch.Tensor:
    """
    Self-similarity context: how much the patches around a voxel resemble each other.

    Every channel compares two patches beside the voxel, on two different axes: D, their mean squared difference, makes
    ``exp(-(D - min D) / mean D)``, minimum and mean over the channels. The voxel's own patch takes no part. Images of
    the same anatomy have similar descriptors whatever their contrast: the descriptor does not change when intensities
    are multiplied by any number but zero, negative ones among them, or shifted. Where an image has no contrast, it is
    1. Outside, the image goes on as at its border. Computed in float32 at least, also under autocast.

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; the channels are compared together. Intensities should be of the order
            of 1 or larger.
        radius: half width of a patch, ``2 * radius + 1`` voxels wide.
        dilation: distance of the patches from the voxel, in voxels.

    Returns:
        ``(B, 12, *spatial)``, one channel for every pair of the 6 neighbors that do not face each other; in 2-D
        ``(B, 4, *spatial)``, of 4 neighbors. Values in [0, 1]. Differentiable once.

    Raises:
        ValueError: When the image is not 2-D or 3-D or a number is out of its range.

    Source: Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013.
    """
    if image.dim() not in (4, 5):
        raise ValueError(f"image must be (B, C, H, W[, D]), got shape {list(image.shape)}.")
    _check_patches(radius, dilation)
    if image.dtype != torch.float64:
        image = image.float()
    # so that squares stay finite, whatever the intensities are
    scale = intensity_scale(image, list(range(1, image.dim())))
    tiny = (TINY * scale.square()).clamp_(min=LEAST_TINY)
    return _Descriptor.apply(image * scale, tiny, radius, dilation)


def _check_patches(radius: int, dilation: int) -> None:
    check_count("radius", radius, 0)
    check_count("dilation", dilation, 1)


class MINDSSCLoss(_Loss):
    """
    Mean squared difference of the self-similarity context of two images, for images of different contrasts.

    See :py:func:`mind_ssc`.

    Args:
        radius: half width of a patch, ``2 * radius + 1`` voxels wide.
        dilation: distance of the patches from the voxel, in voxels.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a map of the descriptors' shape).

    Raises:
        ValueError: When an argument is out of its range.

    Source: Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013.
    """

    def __init__(self, radius: int = 2, dilation: int = 2, reduction: LossReduction | str = LossReduction.MEAN) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        _check_patches(radius, dilation)
        self.radius = radius
        self.dilation = dilation

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: warped moving image, ``(B, C, *spatial)``, 2-D or 3-D.
            target: fixed image, of the same size; the number of its channels may be another.

        Returns:
            the loss, in [0, 1] for ``reduction="mean"``.

        Raises:
            ValueError: When the sizes differ or are not 2-D or 3-D.
        """
        if pred.dim() not in (4, 5) or len(pred) != len(target) or pred.shape[2:] != target.shape[2:]:
            raise ValueError(
                "pred and target must be (B, C, H, W[, D]) of one size, got "
                f"{list(pred.shape)} and {list(target.shape)}."
            )
        with torch.autocast(device_type=pred.device.type, enabled=False):
            one, other = (mind_ssc(image, self.radius, self.dilation) for image in (pred, target))
            return F.mse_loss(one, other, reduction=self.reduction)
