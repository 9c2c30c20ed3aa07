# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["bootstrap_interval"]


def bootstrap_interval(
    values: Sequence[float],
    pairs: Sequence[tuple[Hashable, Hashable]],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Interval of the mean over pairs, by a bootstrap over subjects.

    Pairs that share a subject are not independent, so subjects are drawn, not pairs: in each resample, a pair counts as
    often as its moving times as its fixed subject has been drawn.

    Args:
        values: one value for each pair; NaN does not count.
        pairs: the (moving, fixed) subjects of each pair.
        confidence: probability that the interval is to cover, between 0 and 1.
        num_resamples: number of resamples.
        seed: of the random numbers; the same arguments give the same interval.

    Returns:
        lower and upper end; NaN where no value counts, or where there are less than three subjects.

    Raises:
        ValueError: When there are not as many values as pairs, or a number is out of its range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
    """
    if len(values) != len(pairs):
        raise ValueError(f"there must be one value for each pair, got {len(values)} values and {len(pairs)} pairs.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    numbers = np.asarray(values, dtype=np.float64)
    counts = ~np.isnan(numbers)
    position = {subject: i for i, subject in enumerate(dict.fromkeys(subject for pair in pairs for subject in pair))}
    # two subjects are one pair, in two directions: nothing is drawn that could differ
    if not counts.any() or len(position) < 3:
        return float("nan"), float("nan")
    moving, fixed = np.array([[position[subject] for subject in pair] for pair in pairs])[counts].T
    numbers = numbers[counts]
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(position), np.full(len(position), 1 / len(position)), size=num_resamples)
    means = []
    # one resample at a time: of all at once, the memory would grow with pairs times resamples
    for times in drawn:
        weight = times[moving] * times[fixed]
        chosen = weight > 0
        if chosen.any():
            # an infinite distance that has not been drawn must not make the mean NaN
            means.append(np.average(numbers[chosen], weights=weight[chosen]))
    if not means:
        return float("nan"), float("nan")
    # observed values, since there is nothing between two infinite ones
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
    return float(low), float(high)
