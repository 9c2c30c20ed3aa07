# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction

__all__ = ["PairwiseMetric"]


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
