# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_sacb.metrics import lowest_mean, lowest_quantile

NAN = float("nan")

# values, fraction, mean of the lowest
TEST_CASES = [
    ([0.5, 0.1, 0.9, 0.3], 0.5, 0.2),
    ([0.5, 0.1, 0.9, 0.3], 1.0, 0.45),
    # at least one
    ([0.5, 0.1, 0.9, 0.3], 0.01, 0.1),
    # 1.2 cases are one, 1.5 are two, 3.5 are four, though 0.35 * 10 is a little less
    ([0.5, 0.1, 0.9, 0.3], 0.3, 0.1),
    ([0.1, 0.2, 0.3, 0.4, 0.5], 0.3, 0.15),
    (np.arange(10.0).tolist(), 0.35, 1.5),
    # a case without a value does not count
    ([NAN, 0.5, 0.1, NAN, 0.9, 0.3], 0.5, 0.2),
    ([0.7], 0.3, 0.7),
    ([[0.2, 0.4], [0.9, NAN], [NAN, NAN], [0.0, 0.2]], 0.3, 0.1),
]


@pytest.mark.parametrize(("values", "fraction", "expected"), TEST_CASES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lowest_mean(values: list, fraction: float, expected: float, as_tensor: bool) -> None:
    result = lowest_mean(torch.tensor(values) if as_tensor else values, fraction)
    assert result.dim() == 0 and result.item() == pytest.approx(expected)


def test_dice30() -> None:
    """60 cases, of which 18 are 30 %."""
    values = np.random.RandomState(0).uniform(size=60)
    assert lowest_mean(values.tolist()).item() == pytest.approx(np.sort(values)[:18].mean())
    assert lowest_quantile(values.tolist()).item() == pytest.approx(np.quantile(values, 0.3))


@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
def test_lowest_quantile(fraction: float) -> None:
    values = np.random.RandomState(1).uniform(size=(13, 4))
    values[2] = NAN
    values[5, 1] = NAN
    expected = np.quantile(np.delete([np.nanmean(row) for row in np.delete(values, 2, 0)], []), fraction)
    assert lowest_quantile(torch.from_numpy(values), fraction).item() == pytest.approx(expected)


@pytest.mark.parametrize("function", [lowest_mean, lowest_quantile])
def test_nothing_and_ill_arguments(function) -> None:
    assert math.isnan(function([]).item()) and math.isnan(function([NAN, NAN]).item())
    for fraction in (0, -0.3, 1.1, NAN):
        with pytest.raises(ValueError, match=rf"above 0 and at most 1, got {fraction}"):
            function([0.5], fraction)
    with pytest.raises(ValueError, match=r"got shape \[2, 2, 2\]"):
        function(torch.zeros(2, 2, 2))
