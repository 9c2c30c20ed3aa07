# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from monai_sacb.inferers import LabelFusion, fuse_labels

SHAPES = [(2, 1, 9), (3, 1, 6, 7), (5, 1, 4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_majority_is_the_mode(shape: tuple[int, ...]) -> None:
    """Of values that occur equally often, scipy takes the smallest, too."""
    labels = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0)) * 500
    expected = stats.mode(labels.numpy(), axis=0).mode
    fused = fuse_labels(labels)
    assert fused.dtype == labels.dtype and np.array_equal(fused.numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_by_hand(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, shape, generator=generator)
    weights = torch.rand(shape, generator=generator)
    sums = torch.stack([(weights * (labels == value)).sum(0) for value in range(4)])
    assert torch.equal(fuse_labels(labels, weights), sums.argmax(0))


def test_equal_weights_are_a_majority() -> None:
    labels = torch.randint(0, 3, (4, 1, 5, 5), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    assert torch.equal(fuse_labels(labels, torch.full(labels.shape, 0.1)), fuse_labels(labels))


def test_one_proposal_is_the_answer() -> None:
    labels = torch.tensor([[[7, 0, 2035]]])
    assert torch.equal(fuse_labels(labels), labels[0])


ILL_FUSIONS = {
    "floats": (torch.rand(2, 1, 4), None, r"whole numbers \(N, 1, \*spatial\), got torch.float32"),
    "two channels": (torch.ones(2, 2, 4, dtype=torch.long), None, r"got torch.int64 \[2, 2, 4\]"),
    "no dimension": (torch.ones(2, 1, dtype=torch.long), None, r"got torch.int64 \[2, 1\]"),
    "none": (torch.ones(0, 1, 4, dtype=torch.long), None, r"got torch.int64 \[0, 1, 4\]"),
    "weights of another shape": (torch.ones(2, 1, 4, dtype=torch.long), torch.ones(2, 4), r"the shape of the labels"),
    "negative": (torch.ones(2, 1, 4, dtype=torch.long), -torch.ones(2, 1, 4), r"finite and not negative"),
    "NaN": (torch.ones(2, 1, 4, dtype=torch.long), torch.full((2, 1, 4), torch.nan), r"finite and not negative"),
}


@pytest.mark.parametrize("labels, weights, message", ILL_FUSIONS.values(), ids=ILL_FUSIONS)
def test_ill_formed(labels: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_labels(labels, weights)


def test_weights_follow_the_resemblance() -> None:
    generator = torch.Generator().manual_seed(3)
    fixed = torch.rand(1, 1, 20, 20, 20, generator=generator)
    warped = 0.5 * fixed + 0.2
    warped[:, :, 10:] = torch.rand(1, 1, 10, 20, 20, generator=generator)
    fusion = LabelFusion("locally_weighted", kernel_size=5, power=1.0, floor=0.01)
    weights = fusion.weights(warped, fixed)
    assert fusion.weighted and weights.shape == fixed.shape
    # numpy's correlation of one window, squared
    window = (slice(3, 8), slice(6, 11), slice(9, 14))
    correlation = np.corrcoef(warped[0, 0][window].flatten(), fixed[0, 0][window].flatten())[0, 1]
    assert abs(float(weights[0, 0, 5, 8, 11]) - 0.01 - correlation**2) < 0.01
    assert weights[:, :, 3:7, 3:-3, 3:-3].min() > 0.95 and weights[:, :, 13:-3, 3:-3, 3:-3].mean() < 0.1
    assert weights.min() >= 0.01
    assert not LabelFusion().weighted


ILL_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "fusion": ({"fusion": "staple"}, r"one of majority, locally_weighted, got 'staple'"),
    "even window": ({"kernel_size": 4}, r"kernel_size must be odd, got 4"),
    "small window": ({"kernel_size": 1}, r"kernel_size must be a whole number of at least 3"),
    "power": ({"power": 0.0}, r"power must be positive, got 0"),
    "floor": ({"floor": float("nan")}, r"floor must be positive, got nan"),
}


@pytest.mark.parametrize("arguments, message", ILL_SETTINGS.values(), ids=ILL_SETTINGS)
def test_ill_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelFusion(**arguments)
