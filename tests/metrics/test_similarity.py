# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_sacb.losses import LNCCLoss
from monai_sacb.metrics import SimilarityMetric


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    fixed = torch.rand(3, 1, 10, 11, 12, generator=generator)
    return fixed + 0.3 * torch.rand(fixed.shape, generator=generator), fixed


def test_is_the_loss_of_each_pair_with_its_sign_turned() -> None:
    warped, fixed = images()
    metric = SimilarityMetric()
    values = metric(warped, fixed)
    expected = [-LNCCLoss()(warped[i : i + 1], fixed[i : i + 1]).item() for i in range(3)]
    assert values.flatten().tolist() == pytest.approx(expected)
    assert metric.aggregate().item() == pytest.approx(sum(expected) / 3)
    assert min(expected) > 0.3


def test_more_is_better() -> None:
    warped, fixed = images()
    metric = SimilarityMetric()
    same, similar, other = (metric(x, fixed).mean() for x in (fixed, warped, fixed.flip(2)))
    assert same > similar > other


def test_any_loss() -> None:
    warped, fixed = images()
    values = SimilarityMetric(nn.MSELoss())(warped, fixed)
    assert values.flatten().tolist() == pytest.approx([-float((w - f).square().mean()) for w, f in zip(warped, fixed)])


def test_needs_both_images_and_something_measured() -> None:
    with pytest.raises(ValueError, match="the fixed image is needed"):
        SimilarityMetric()(images()[0])
    with pytest.raises(ValueError, match="nothing has been measured"):
        SimilarityMetric().aggregate()
