# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch

from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction

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
    distance = ((ddf - true_ddf.to(ddf)) * scale).square().sum(1).sqrt()
    return distance.flatten(1).nanmean(1, keepdim=True)


class FieldErrorMetric(CumulativeIterationMetric):
    """
    :py:func:`compute_field_error` as a MONAI metric. The voxel size is that of the true field, a ``MetaTensor``
    (1 mm for a plain tensor).

    Args:
        identity: measure no displacement at all instead of the prediction: the error before registration.
        reduction: how the values of the images are reduced, as in MONAI's metrics.
    """

    def __init__(self, identity: bool = False, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__()
        self.identity = identity
        self.reduction = reduction

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise ValueError("the true field is needed as y.")
        dims = y_pred.shape[1]
        spacing = [1.0] * dims
        if isinstance(y, MetaTensor):
            affine = y.affine[0] if y.affine.dim() == 3 else y.affine
            spacing = affine[:dims, :dims].double().norm(dim=0).tolist()
        ddf = torch.zeros_like(torch.as_tensor(y_pred)) if self.identity else torch.as_tensor(y_pred)
        return compute_field_error(_plain(ddf), _plain(y), spacing)

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError(f"nothing has been measured yet, the buffer is {type(data).__name__}.")
        return do_metric_reduction(data, reduction or self.reduction)[0]


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_tensor() if isinstance(x, MetaTensor) else x
