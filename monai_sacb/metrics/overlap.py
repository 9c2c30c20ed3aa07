# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["compute_label_dice", "lowest_mean", "lowest_quantile"]


def compute_label_dice(pred: torch.Tensor, target: torch.Tensor, label_ids: Sequence[int]) -> torch.Tensor:
    """
    Dice of label maps for any ids, counted without a map for each label.

    MONAI's ``DiceMetric`` numbers classes without gaps; FreeSurfer's ids, which go up to 14175, would be as many maps.

    Args:
        pred, target: ``(B, 1, *spatial)``, whole numbers.
        label_ids: the ids to score.

    Returns:
        ``(B, len(label_ids))``, float64; NaN where neither map has the label.

    Raises:
        ValueError: When the shapes differ or have not one channel, or an id is given twice.
    """
    if pred.shape != target.shape or pred.dim() < 3 or pred.shape[1] != 1:
        raise ValueError(
            f"pred and target must have one shape (B, 1, *spatial), got {list(pred.shape)} and {list(target.shape)}."
        )
    ids, order = torch.tensor([int(label) for label in label_ids], dtype=torch.long).sort()
    if len(ids.unique()) != len(ids):
        raise ValueError(f"label_ids must differ from each other, got {list(label_ids)}.")
    dice = torch.empty(len(pred), len(ids), dtype=torch.float64)
    if not len(ids):
        return dice

    def numbered(label: torch.Tensor) -> torch.Tensor:
        """Positions in the sorted ids; their number for any other value."""
        flat = label.flatten().long().cpu()
        position = torch.searchsorted(ids, flat).clamp(max=len(ids) - 1)
        return torch.where(ids[position] == flat, position, len(ids))

    for row, one, other in zip(dice, pred, target):
        a, b = numbered(one), numbered(other)
        sizes = (a.bincount(minlength=len(ids) + 1) + b.bincount(minlength=len(ids) + 1))[:-1].double()
        common = a[a == b].bincount(minlength=len(ids) + 1)[:-1].double()
        row[order] = torch.where(sizes > 0, 2 * common / sizes, torch.nan)
    return dice


def _cases(values: torch.Tensor | Sequence[float], fraction: float) -> torch.Tensor:
    """The values that count, one for each case, in growing order."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    cases = torch.as_tensor(values, dtype=torch.float64)
    if cases.dim() not in (1, 2):
        raise ValueError(f"values must be (cases,) or (cases, structures), got shape {list(cases.shape)}.")
    if cases.dim() == 2:
        cases = cases.nanmean(1)
    return cases[~cases.isnan()].sort().values


def lowest_mean(values: torch.Tensor | Sequence[float], fraction: float = 0.3) -> torch.Tensor:
    """
    Mean of the lowest values, such as Dice30: the mean Dice of the worst 30 % of the cases.

    Args:
        values: one value for each case; or ``(cases, structures)``, of which the mean of each case is taken, without
            NaN. A case without any value does not count.
        fraction: part of the cases. Their number is rounded to the nearest one, half up, and is at least 1.

    Returns:
        the mean, a scalar, float64; NaN where no case counts.

    Raises:
        ValueError: When the fraction is not above 0 and at most 1, or the values have more than two axes.
    """
    cases = _cases(values, fraction)
    # a product such as 0.35 * 10 must not fall below the half that it stands for
    number = int(fraction * len(cases) + 0.5 + 1e-9)
    return cases[: max(number, 1)].mean()


def lowest_quantile(values: torch.Tensor | Sequence[float], fraction: float = 0.3) -> torch.Tensor:
    """
    The value below which a part of the cases lies, interpolated linearly between cases.

    The evaluation script of the Learn2Reg challenge (github.com/MDL-UzL/L2R) reports this one as "30", of the means of
    the cases over their structures; for the standard deviation of the Jacobian determinant and the error of
    landmarks, of which less is better, it takes ``fraction=0.7``.

    Args:
        values: as of :py:func:`lowest_mean`.
        fraction: part of the cases.

    Returns:
        the quantile, a scalar, float64; NaN where no case counts.

    Raises:
        ValueError: When the fraction is not above 0 and at most 1, or the values have more than two axes.
    """
    cases = _cases(values, fraction)
    return cases.quantile(fraction) if len(cases) else torch.tensor(torch.nan, dtype=torch.float64)
