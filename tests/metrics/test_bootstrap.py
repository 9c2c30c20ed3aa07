# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from monai_sacb.metrics import bootstrap_interval

ILL_CASES = [
    ({"values": [1.0]}, "1 values and 2 pairs"),
    ({"confidence": 1.0}, r"confidence must lie between 0 and 1, got 1\.0"),
    ({"confidence": 0}, "confidence must lie between 0 and 1, got 0"),
    ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
]


def test_equals_scipy_where_no_subject_is_shared() -> None:
    """A pair of a subject with itself is drawn by its square: with values of weight one, the plain bootstrap."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.1, 400)
    # every fixed subject occurs once, and one moving subject in all pairs
    low, high = bootstrap_interval(values.tolist(), [("atlas", i) for i in range(400)], num_resamples=4000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=rng).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-3)


def test_shared_subjects_widen_the_interval() -> None:
    """A value that belongs to the subject: many pairs do not tell more than the few subjects do."""
    rng = np.random.default_rng(1)
    effect = rng.normal(0.0, 1.0, 12)
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    values = [effect[i] + effect[j] for i, j in pairs]
    low, high = bootstrap_interval(values, pairs)
    naive = bootstrap_interval(values, [("atlas", i) for i in range(len(pairs))])
    assert high - low > 2 * (naive[1] - naive[0])
    # as if the mean of 12 subjects, twice, were estimated
    assert high - low == pytest.approx(2 * 2 * 1.96 * effect.std() / 12**0.5, rel=0.25)
    assert low < np.mean(values) < high


def test_confidence_and_seed() -> None:
    values, pairs = np.linspace(0, 1, 20).tolist(), [(i, (i + 1) % 20) for i in range(20)]
    wide, narrow = (bootstrap_interval(values, pairs, confidence=c) for c in (0.99, 0.5))
    assert wide[0] <= narrow[0] < narrow[1] <= wide[1] and wide != narrow
    assert bootstrap_interval(values, pairs) == bootstrap_interval(values, pairs)
    assert bootstrap_interval(values, pairs) != bootstrap_interval(values, pairs, seed=1, num_resamples=50)


def test_nan_does_not_count() -> None:
    values, pairs = [0.1, math.nan, 0.4, 0.9], [(0, 1), (1, 2), (2, 3), (3, 0)]
    low, high = bootstrap_interval(values, pairs)
    assert 0.1 <= low < high <= 0.9
    assert all(math.isnan(end) for end in bootstrap_interval([math.nan] * 4, pairs))


def test_infinite_values() -> None:
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    values = [math.inf if pair == (0, 1) else 1.0 + 0.01 * pair[1] for pair in pairs]
    low, high = bootstrap_interval(values, pairs)
    # whoever draws both of the two subjects has an infinite mean
    assert 1.0 < low < 1.2 and high == math.inf


def test_two_subjects_tell_nothing_of_their_spread() -> None:
    for pairs in ([("a", "b")], [("a", "b"), ("b", "a")]):
        assert all(math.isnan(end) for end in bootstrap_interval([0.5, 0.9][: len(pairs)], pairs))


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"values": [0.0, 1.0], "pairs": [(0, 1), (1, 0)], **arguments})
