# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch

from monai.utils import MetricReduction

from monai_sacb.metrics.base import PairwiseMetric, spacings_of
from monai_sacb.utils import plain_tensor

__all__ = ["FieldErrorMetric", "compute_field_error"]


def compute_field_error(ddf: torch.Tensor, true_ddf: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """
    Mean distance between where two fields send a voxel.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.
        true_ddf: the true field, of the same form. Voxels where it is NaN do not count.
        spacing: voxel size along each axis, in mm.

    Returns:
        ``(B, 1)`` in mm; NaN where no voxel counts.

    Raises:
        ValueError: When the shapes differ or the spacing does not fit them.
    """
    if ddf.shape != true_ddf.shape or len(spacing) != ddf.shape[1]:
        raise ValueError(
            f"ddf {list(ddf.shape)} and true_ddf {list(true_ddf.shape)} must have one shape, and spacing "
            f"{tuple(spacing)} a value for each of its components."
        )
    scale = torch.as_tensor(spacing, dtype=ddf.dtype, device=ddf.device).view(1, -1, *[1] * (ddf.dim() - 2))
    true_ddf = true_ddf.to(ddf)
    distance = ((ddf - true_ddf) * scale).square().sum(1).sqrt()
    # only the true field says what does not count: a field that is not finite must not look right
    counts = ~true_ddf.isnan().any(1)
    total = torch.where(counts, distance, 0.0).flatten(1).sum(1, keepdim=True)
    return total / counts.flatten(1).sum(1, keepdim=True)


class FieldErrorMetric(PairwiseMetric):
    """
    :py:func:`compute_field_error` as a MONAI metric. The voxel size is that of the true field, a ``MetaTensor``
    (1 mm for a plain tensor).

    Args:
        identity: measure no displacement at all instead of the prediction: the error before registration.
        reduction: how the values of the images are reduced, as in MONAI's metrics.
    """

    def __init__(self, identity: bool = False, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__(reduction)
        self.identity = identity

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise ValueError("the true field is needed as y.")
        ddf, true_ddf = plain_tensor(y_pred), plain_tensor(y)
        if self.identity:
            ddf = torch.zeros_like(ddf)
        errors = [compute_field_error(ddf[i : i + 1], true_ddf[i : i + 1], s) for i, s in enumerate(spacings_of(y))]
        return torch.cat(errors)
