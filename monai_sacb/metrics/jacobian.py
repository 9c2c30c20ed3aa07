# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

from monai.utils import MetricReduction

from monai_sacb.metrics.base import PairwiseMetric
from monai_sacb.utils import plain_tensor

__all__ = [
    "FoldsMetric",
    "NDVMetric",
    "SDLogJMetric",
    "compute_folds",
    "compute_ndv",
    "compute_sdlogj",
    "jacobian_determinant",
]


def _determinant(j: torch.Tensor) -> torch.Tensor:
    """Determinant of the matrices ``(B, d, d, *spatial)``, d = 2 or 3."""
    if j.shape[1] == 2:
        return j[:, 0, 0] * j[:, 1, 1] - j[:, 0, 1] * j[:, 1, 0]
    return (
        j[:, 0, 0] * (j[:, 1, 1] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 1])
        - j[:, 0, 1] * (j[:, 1, 0] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 0])
        + j[:, 0, 2] * (j[:, 1, 0] * j[:, 2, 1] - j[:, 1, 1] * j[:, 2, 0])
    )


def _check_field(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Refuse what is not a field, or a mask that does not lie on its grid."""
    dims = ddf.dim() - 2
    if dims not in (2, 3) or ddf.shape[1] != dims or min(ddf.shape[2:]) < 2:
        raise ValueError(
            f"ddf must be a field (B, d, *spatial) of at least 2 voxels along each of its d = 2 or 3 axes, got shape "
            f"{list(ddf.shape)}."
        )
    if mask is not None and mask.shape != (len(ddf), 1, *ddf.shape[2:]):
        raise ValueError(
            f"mask must be {[len(ddf), 1, *ddf.shape[2:]]}, one channel on the grid of the field, got shape "
            f"{list(mask.shape)}."
        )


def jacobian_determinant(ddf: torch.Tensor) -> torch.Tensor:
    """
    Determinant of the gradient of the mapping ``p -> p + ddf(p)``, central differences (one-sided at the border).

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i; d = 2 or 3, at least two voxels
            along each axis.

    Returns:
        ``(B, *spatial)``, without unit; at most 0 where the mapping folds.

    Raises:
        ValueError: When the shape is not that of such a field.
    """
    _check_field(ddf)
    dims = ddf.dim() - 2
    # rows: component, columns: axis of the derivative
    gradient = torch.stack(torch.gradient(ddf, dim=list(range(2, dims + 2))), 2)
    identity = torch.eye(dims, dtype=ddf.dtype, device=ddf.device).view(1, dims, dims, *[1] * dims)
    return _determinant(gradient + identity)


def compute_folds(ddf: torch.Tensor) -> torch.Tensor:
    """
    Percentage of voxels at which a mapping folds: the determinant of its gradient is at most 0, or not a number.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.

    Returns:
        ``(B, 1)``, per cent.
    """
    return 100.0 * (~(jacobian_determinant(ddf) > 0)).flatten(1).float().mean(1, keepdim=True)


def compute_sdlogj(ddf: torch.Tensor, mask: torch.Tensor | None = None, border: int = 2) -> torch.Tensor:
    """
    SDlogJ: standard deviation of the logarithm of the determinant of a mapping's gradient, over the voxels of an image.

    As the evaluation of the Learn2Reg challenge (github.com/MDL-UzL/L2R) counts it: of ``log(clip(det + 3, 1e-9,
    1e9))``, central differences, without the two outermost voxels at each side, divided by the number of voxels.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.
        mask: ``(B, 1, *spatial)``, not zero where a voxel counts, as in the tasks of the challenge that have one; all
            voxels by default.
        border: number of voxels at each side that do not count. With 0, the differences there are one-sided.

    Returns:
        ``(B, 1)``, without unit; NaN where no voxel counts, or the field is not finite where it does.

    Raises:
        ValueError: When the shape is not that of a field, the mask does not fit it, or the border leaves no voxel.
    """
    _check_field(ddf, mask)
    if border < 0 or min(ddf.shape[2:]) <= 2 * border:
        raise ValueError(
            f"border must be at least 0 and leave a voxel of the grid {list(ddf.shape[2:])} along each axis, got "
            f"{border}."
        )
    interior = (slice(None), *(slice(border, size - border) for size in ddf.shape[2:]))
    # a sum over millions of voxels needs more digits than a field has
    log = (jacobian_determinant(ddf)[interior].double() + 3).clamp(1e-9, 1e9).log()
    if mask is None:
        return log.flatten(1).std(1, correction=0, keepdim=True).to(ddf.dtype)
    counts = mask[:, 0][interior] != 0
    inside = (x[c] for x, c in zip(log, counts))
    nothing = log.new_full([1], torch.nan)
    return torch.stack([x.std(0, correction=0, keepdim=True) if len(x) else nothing for x in inside]).to(ddf.dtype)


def compute_ndv(ddf: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Non-diffeomorphic volume (Liu et al., "On Finite Difference Jacobian Computation in Deformable Image Registration",
    IJCV 2024): how much of the volume is turned inside out, in per cent. In 2-D, the non-diffeomorphic area.

    Each cell between eight voxel centres can be divided into five tetrahedra in two ways; the mapping is taken as
    linear in each. What counts is the volume that the turned ones have after the mapping, the mean of the two ways,
    against that of the grid. In 2-D, two triangles, in two ways. Differences of one kind alone, as in
    :py:func:`compute_folds`, do not see every fold. Outside the grid, the displacement is that of its border.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back, channel i along array axis i.
        mask: ``(B, 1, *spatial)``, not zero where a voxel counts; all voxels by default.

    Returns:
        ``(B, 1)``, per cent; NaN where no voxel counts, or the field is not a number where it does.

    Raises:
        ValueError: When the shape is not that of a field, or the mask does not fit it.
    """
    _check_field(ddf, mask)
    dims = ddf.dim() - 2
    identity = torch.eye(dims).tolist()
    # each simplex is a voxel and d of its neighbours: those of a corner of a cell
    simplices = [
        [[s * x for x in row] for s, row in zip(signs, identity)] for signs in itertools.product((1, -1), repeat=dims)
    ]
    if dims == 3:
        # and those in the middle, which the other four leave
        middle = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
        simplices += [middle, [[-x for x in offset] for offset in middle]]
    padded = F.pad(ddf, [1] * (2 * dims), mode="replicate")
    folded = torch.zeros_like(ddf[:, 0])
    for simplex in simplices:
        edges = []
        for offset in simplex:
            starts = [1 + int(o) for o in offset]
            neighbor = [slice(None)] * 2 + [slice(i, i + size) for i, size in zip(starts, ddf.shape[2:])]
            shift = torch.tensor(offset, dtype=ddf.dtype, device=ddf.device).view(1, dims, *[1] * dims)
            edges.append(padded[tuple(neighbor)] - ddf + shift)
        # numbering the neighbours the other way round would change the sign
        sign = torch.linalg.det(torch.tensor(simplex)).sign().item()
        folded += (-sign * _determinant(torch.stack(edges, 2))).clamp(min=0)
    # a simplex has 1/d! of the volume of its edges' box, and both divisions are counted
    folded = folded.flatten(1).double() / (2 * math.factorial(dims))
    if mask is None:
        return 100.0 * folded.mean(1, keepdim=True).to(ddf.dtype)
    counts = (mask != 0).flatten(1)
    total = torch.where(counts, folded, 0.0).sum(1, keepdim=True)
    return (100.0 * total / counts.sum(1, keepdim=True)).to(ddf.dtype)


class FoldsMetric(PairwiseMetric):
    """
    :py:func:`compute_folds` as a MONAI metric.

    Args:
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_folds(plain_tensor(y_pred))


class SDLogJMetric(PairwiseMetric):
    """
    :py:func:`compute_sdlogj` as a MONAI metric. A mask of the voxels that count may be given as y.

    Args:
        border: number of voxels at each side that do not count. The value of a field that has no others is NaN.
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.

    Raises:
        ValueError: When the border is negative.
    """

    def __init__(self, border: int = 2, reduction: MetricReduction | str = MetricReduction.MEAN) -> None:
        super().__init__(reduction)
        if border < 0:
            raise ValueError(f"border must be at least 0, got {border}.")
        self.border = border

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if min(y_pred.shape[2:]) <= 2 * self.border:
            # a thin volume must not end an evaluation
            return torch.full((len(y_pred), 1), torch.nan)
        return compute_sdlogj(plain_tensor(y_pred), None if y is None else plain_tensor(y), self.border)


class NDVMetric(PairwiseMetric):
    """
    :py:func:`compute_ndv` as a MONAI metric. A mask of the voxels that count may be given as y.

    Args:
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return compute_ndv(plain_tensor(y_pred), None if y is None else plain_tensor(y))
