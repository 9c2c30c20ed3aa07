# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from monai_sacb.metrics.base import PairwiseMetric
from monai_sacb.utils import plain_tensor

__all__ = ["FoldsMetric", "compute_folds", "jacobian_determinant"]


def jacobian_determinant(ddf: torch.Tensor) -> torch.Tensor:
    """
    Determinant of the gradient of the mapping ``p -> p + ddf(p)``, central differences (one-sided at the border).

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i; d = 2 or 3, at least two voxels
            along each axis.

    Returns:
        ``(B, *spatial)``, without unit; at most 0 where the mapping folds.

    Raises:
        ValueError: When the shape is not that of such a field.
    """
    dims = ddf.dim() - 2
    if dims not in (2, 3) or ddf.shape[1] != dims or min(ddf.shape[2:]) < 2:
        raise ValueError(
            f"ddf must be a field (B, d, *spatial) of at least 2 voxels along each of its d = 2 or 3 axes, got shape "
            f"{list(ddf.shape)}."
        )
    # rows: component, columns: axis of the derivative
    gradient = torch.stack(torch.gradient(ddf, dim=list(range(2, dims + 2))), 2)
    identity = torch.eye(dims, dtype=ddf.dtype, device=ddf.device).view(1, dims, dims, *[1] * dims)
    j = gradient + identity
    if dims == 2:
        return j[:, 0, 0] * j[:, 1, 1] - j[:, 0, 1] * j[:, 1, 0]
    return (
        j[:, 0, 0] * (j[:, 1, 1] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 1])
        - j[:, 0, 1] * (j[:, 1, 0] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 0])
        + j[:, 0, 2] * (j[:, 1, 0] * j[:, 2, 1] - j[:, 1, 1] * j[:, 2, 0])
    )


def compute_folds(ddf: torch.Tensor) -> torch.Tensor:
    """
    Percentage of voxels at which a mapping folds: the determinant of its gradient is at most 0, or not a number.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.

    Returns:
        ``(B, 1)``, per cent.
    """
    return 100.0 * (~(jacobian_determinant(ddf) > 0)).flatten(1).float().mean(1, keepdim=True)


class FoldsMetric(PairwiseMetric):
    """
    :py:func:`compute_folds` as a MONAI metric.

    Args:
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_folds(plain_tensor(y_pred))
