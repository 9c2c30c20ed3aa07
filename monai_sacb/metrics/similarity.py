# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from monai.utils import MetricReduction

from monai_sacb.losses import LNCCLoss
from monai_sacb.metrics.base import PairwiseMetric
from monai_sacb.utils import plain_tensor

__all__ = ["SimilarityMetric"]


class SimilarityMetric(PairwiseMetric):
    """
    Similarity of the warped and the fixed image: a similarity loss with its sign turned, so that more is better.

    It needs no labels, and can choose the best model where there are none.

    Args:
        loss: ``(warped, fixed) -> loss``. Defaults to :py:class:`monai_sacb.losses.LNCCLoss`.
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def __init__(self, loss: nn.Module | None = None, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__(reduction)
        self.loss = LNCCLoss() if loss is None else loss

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise ValueError("the fixed image is needed as y.")
        pairs = zip(plain_tensor(y_pred), plain_tensor(y))
        return torch.stack([-self.loss(warped[None], fixed[None]).reshape(1) for warped, fixed in pairs])
