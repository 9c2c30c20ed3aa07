# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction

__all__ = ["PairwiseMetric", "spacings_of"]


def spacings_of(reference: torch.Tensor) -> list[list[float]]:
    """
    Voxel sizes of a batch, from the affine of a ``MetaTensor``; 1 mm for a plain tensor.

    Args:
        reference: ``(B, C, *spatial)``. A batch has one affine, or one for each of its images.

    Returns:
        for each image, the voxel size along each axis in mm.
    """
    dims = reference.dim() - 2
    affines = reference.affine if isinstance(reference, MetaTensor) else torch.eye(dims + 1)
    affines = affines.expand(len(reference), *affines.shape[-2:])
    # of a slice that is tilted in space, axes have components in all three directions
    spacings: list[list[float]] = affines[:, :-1, :dims].double().norm(dim=1).tolist()
    return spacings


class PairwiseMetric(CumulativeIterationMetric):
    """
    Base of metrics with one row of values for each registered pair.

    Args:
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def __init__(self, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__()
        self.reduction = reduction

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        """Reduce the values of all pairs so far."""
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError(f"nothing has been measured yet, the buffer is {type(data).__name__}.")
        return do_metric_reduction(data, reduction or self.reduction)[0]
