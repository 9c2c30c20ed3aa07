# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

__all__ = ["GradientPenaltyLoss"]


class GradientPenaltyLoss(nn.Module):
    """
    Mean over the axes of the mean squared forward difference of a displacement field, in voxels.

    MONAI's ``DiffusionLoss`` sums squared central differences over the axes and is about three times as large: weights
    do not carry over.

    Source: Cheng et al., SACB-Net, CVPR 2025; Balakrishnan et al., VoxelMorph, IEEE TMI 2019, section III.
    """

    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)`` in voxels, d = 2 or 3.

        Returns:
            the penalty, a scalar.

        Raises:
            ValueError: When the shape is not that of a field with at least two voxels along every axis.
        """
        dims = pred.dim() - 2
        if dims not in (2, 3) or pred.shape[1] != dims or min(pred.shape[2:]) < 2:
            raise ValueError(
                "pred must be a field (B, d, *spatial) of at least 2 voxels along each of its d = 2 or 3 axes, got "
                f"shape {list(pred.shape)}."
            )
        penalty = torch.zeros((), dtype=pred.dtype, device=pred.device)
        for axis in range(2, dims + 2):
            penalty = penalty + pred.diff(dim=axis).square().mean()
        return penalty / dims
