# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.modules.loss import _Loss

from monai.utils import LossReduction

__all__ = ["LNCCLoss"]


def _window_sum(x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Sum over the cubic window around every voxel, zeros outside, one axis after the other."""
    dims = x.dim() - 2
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    x = F.pad(x, [kernel_size // 2] * (2 * dims))
    for axis in range(dims):
        window = [1] * dims
        window[axis] = kernel_size
        x = pool(x, window, stride=1)
    return x * float(kernel_size**dims)


class LNCCLoss(_Loss):
    """
    Negative mean of the squared local normalized cross-correlation, as SACB-Net and VoxelMorph train with.

    Window sums take zeros outside the image and always count the full window. Against MONAI's
    ``LocalNormalizedCrossCorrelationLoss``, which clamps the variances, this one adds a constant to their product, so
    that areas without contrast count little. Computed in float32 at least, also under autocast. The images should lie
    in [0, 1].

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
            volume = float(self.kernel_size ** (pred.dim() - 2))
            # Around their means the images lose no digits in the squares. The zeros outside the image are not part of
            # what is shifted: where a window reaches out, only "inside" of its voxels are, and a term makes up for it.
            spatial = list(range(2, pred.dim()))
            mean_p, mean_t = pred.detach().mean(spatial, keepdim=True), target.detach().mean(spatial, keepdim=True)
            pred, target = pred - mean_p, target - mean_t
            inside = _window_sum(torch.ones_like(pred[:1, :1]), self.kernel_size)
            outside = 1 - inside / volume
            products = torch.cat([pred, target, pred * pred, target * target, pred * target], 1)
            sums = _window_sum(products, self.kernel_size)
            sum_p, sum_t, sum_pp, sum_tt, sum_pt = sums.chunk(5, 1)
            # sum((p - mean_p) * (t - mean_t)) = sum(p * t) - sum(p) * sum(t) / volume, and likewise the variances,
            # which rounding must not make negative
            cross = (
                sum_pt - sum_p * sum_t / volume + outside * (mean_t * sum_p + mean_p * sum_t + mean_p * mean_t * inside)
            )
            var_p = sum_pp - sum_p * sum_p / volume + outside * mean_p * (2 * sum_p + mean_p * inside)
            var_t = sum_tt - sum_t * sum_t / volume + outside * mean_t * (2 * sum_t + mean_t * inside)
            var_p, var_t = var_p.clamp(min=0), var_t.clamp(min=0)
            # at most 1 but for rounding
            ncc = -((cross * cross) / (var_p * var_t + self.smooth)).clamp(max=1.0)
        if self.reduction == LossReduction.MEAN.value:
            return ncc.mean()
        return ncc.sum() if self.reduction == LossReduction.SUM.value else ncc
