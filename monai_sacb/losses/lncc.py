# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.modules.loss import _Loss

from monai.utils import LossReduction

from monai_sacb.losses.intensity_scale import intensity_scale

__all__ = ["LNCCLoss"]

# The least that is added to the product of the variances of images within [-1, 1]: far below rounding, but not 0.
LEAST_SMOOTH = 1e-20


def _line_sum(x: torch.Tensor, kernel_size: int, axis: int) -> torch.Tensor:
    """Sums of ``kernel_size`` successive values along an axis, zeros outside, by sums of 1, 2, 4, ... values."""
    size = x.shape[axis]
    padding = [0] * (2 * (x.dim() - axis))
    padding[-2:] = [kernel_size // 2] * 2
    part = F.pad(x, padding)
    # the window is an odd number: one value, and a power of two for each further digit of its binary form
    total, start, span = part.narrow(axis, 0, size), 1, 1
    while 2 * span <= kernel_size:
        length = part.shape[axis] - span
        part = part.narrow(axis, 0, length) + part.narrow(axis, span, length)
        span *= 2
        if kernel_size & span:
            total = total + part.narrow(axis, start, size)
            start += span
    return total


def _window_sum(x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Sum over the cubic window around every voxel, zeros outside, one axis after the other."""
    for axis in range(2, x.dim()):
        x = _line_sum(x, kernel_size, axis)
    return x


class _LocalCorrelation(torch.autograd.Function):
    """Map of the squared local correlation of two images, negative; keeps five maps for the gradient, or seven."""

    @staticmethod
    def forward(ctx: Any, pred: torch.Tensor, target: torch.Tensor, kernel_size: int, smooth: float) -> torch.Tensor:
        volume = float(kernel_size ** (pred.dim() - 2))
        # Around their means the images lose no digits in the squares. The zeros outside the image are not part of
        # what is shifted: where a window reaches out, only "inside" of its voxels are, and a term makes up for it.
        # And within [-1, 1], squares and the product of two of them stay finite, whatever the intensities are.
        spatial = list(range(2, pred.dim()))
        scale_p, scale_t = intensity_scale(pred, spatial), intensity_scale(target, spatial)
        least = (smooth * (scale_p * scale_t).square()).clamp_(min=min(smooth, LEAST_SMOOTH))
        pred, target = pred * scale_p, target * scale_t
        shift_p, shift_t = pred.mean(spatial, keepdim=True), target.mean(spatial, keepdim=True)
        pred.sub_(shift_p)
        target.sub_(shift_t)
        inside = _window_sum(torch.ones_like(pred[:1, :1]), kernel_size)
        outside = 1 - inside / volume
        sum_p, sum_t = _window_sum(pred, kernel_size), _window_sum(target, kernel_size)
        # sum((p - mean_p) * (t - mean_t)) = sum(p * t) - sum(p) * sum(t) / volume, and likewise the variances,
        # which rounding must not make negative
        cross = _window_sum(pred * target, kernel_size).sub_(sum_p * sum_t / volume)
        cross += outside * (shift_t * sum_p + shift_p * sum_t + shift_p * shift_t * inside)
        var_p = _window_sum(pred * pred, kernel_size).sub_(sum_p * sum_p / volume)
        var_p = var_p.add_(outside * shift_p * (2 * sum_p + shift_p * inside)).clamp_(min=0)
        var_t = _window_sum(target * target, kernel_size).sub_(sum_t * sum_t / volume)
        var_t = var_t.add_(outside * shift_t * (2 * sum_t + shift_t * inside)).clamp_(min=0)
        scale = (var_p * var_t).add_(least).reciprocal_()
        ncc = -(cross * cross * scale)
        if any(ctx.needs_input_grad[:2]):
            # nothing to gain where rounding has led out of the range
            slope = torch.where(ncc >= -1, -2 * cross * scale, 0)
            curve = 0.5 * slope * cross * scale
            grad_p, grad_t = -curve * var_t * (var_p > 0), -curve * var_p * (var_t > 0)
            # the mean over a window, the zeros outside the image among it, of the images as they were shifted
            mean_p, mean_t = sum_p / volume - outside * shift_p, sum_t / volume - outside * shift_t
            saved = [pred, target, slope]
            for needed, grad, own, other, factor in zip(
                ctx.needs_input_grad, (grad_p, grad_t), (mean_p, mean_t), (mean_t, mean_p), (scale_p, scale_t)
            ):
                saved += [grad, slope * other + 2 * grad * own, factor] if needed else []
            ctx.save_for_backward(*saved)
            ctx.kernel_size = kernel_size
        # at most 1 but for rounding
        return ncc.clamp_(min=-1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pred, target, slope, *maps = ctx.saved_tensors
        grad_cross = _window_sum(grad * slope, ctx.kernel_size)
        grads: list[torch.Tensor | None] = []
        for needed, own, other in zip(ctx.needs_input_grad, (pred, target), (target, pred)):
            if not needed:
                grads.append(None)
                continue
            variance, means, factor, *maps = maps
            image = other * grad_cross
            image += 2 * own * _window_sum(grad * variance, ctx.kernel_size)
            grads.append(image.sub_(_window_sum(grad * means, ctx.kernel_size)).mul_(factor))
        return (*grads, None, None)


class LNCCLoss(_Loss):
    """
    Negative mean of the squared local normalized cross-correlation, as SACB-Net and VoxelMorph train with.

    Window sums take zeros outside the image and always count the full window. Against MONAI's
    ``LocalNormalizedCrossCorrelationLoss``, which clamps the variances, this one adds a constant to their product, so
    that areas without contrast count little. Computed in float32 at least, also under autocast. The images should lie
    in [0, 1], as the constant is of that order; finite intensities of any size give a finite loss and gradient.

    Args:
        kernel_size: odd window size in voxels.
        smooth: constant added to the product of the variances (sums over the window).
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a map of the image's shape).

    Raises:
        ValueError: When an argument is out of its range.

    Source: Cheng et al., SACB-Net, CVPR 2025; Balakrishnan et al., VoxelMorph, IEEE TMI 2019, section III.
    """

    def __init__(
        self, kernel_size: int = 9, smooth: float = 1e-5, reduction: LossReduction | str = LossReduction.MEAN
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}.")
        if smooth <= 0:
            raise ValueError(f"smooth must be positive, got {smooth}.")
        self.kernel_size = kernel_size
        self.smooth = smooth

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: warped moving image, ``(B, C, *spatial)``, 2-D or 3-D.
            target: fixed image, of the same shape.

        Returns:
            the loss, at least -1 and at most 0 for ``reduction="mean"``.

        Raises:
            ValueError: When the shapes differ or are not 2-D or 3-D.
        """
        if pred.shape != target.shape or pred.dim() not in (4, 5):
            raise ValueError(
                "pred and target must have one shape (B, C, H, W[, D]), got "
                f"{list(pred.shape)} and {list(target.shape)}."
            )
        with torch.autocast(device_type=pred.device.type, enabled=False):
            if pred.dtype != torch.float64:
                pred, target = pred.float(), target.float()
            ncc = _LocalCorrelation.apply(pred, target, self.kernel_size, self.smooth)
        if self.reduction == LossReduction.MEAN.value:
            return ncc.mean()
        return ncc.sum() if self.reduction == LossReduction.SUM.value else ncc
