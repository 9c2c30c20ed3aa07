# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Distances between the surfaces of structures in label maps numbered 1 to L, one column for each label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from monai.metrics.utils import get_code_to_measure_table
from monai.utils import MetricReduction

from monai_sacb.metrics.base import PairwiseMetric, spacings_of
from monai_sacb.utils import plain_tensor

__all__ = [
    "LabelHausdorffMetric",
    "LabelSurfaceDiceMetric",
    "SurfaceDistances",
    "compute_label_hausdorff",
    "compute_label_surface_dice",
    "compute_surface_distances",
]


class SurfaceDistances(NamedTuple):
    """
    Distances between the surfaces of one structure in two images, of each element of a surface to the other surface.

    In mm, in growing order, infinite where the other image has no such structure; and the areas of the elements in the
    same order, in mm² (lengths in mm in 2-D).
    """

    pred_to_fixed: np.ndarray
    fixed_to_pred: np.ndarray
    pred_areas: np.ndarray
    fixed_areas: np.ndarray

    def percentile(self, percentile: float) -> float:
        """The larger of the two distances that so many per cent of each surface do not exceed."""
        values = []
        for distances, areas in ((self.pred_to_fixed, self.pred_areas), (self.fixed_to_pred, self.fixed_areas)):
            if len(distances) == 0:
                return math.inf
            i = np.searchsorted(np.cumsum(areas) / np.sum(areas), percentile / 100.0)
            values.append(float(distances[min(int(i), len(distances) - 1)]))
        return max(values)

    def overlap(self, tolerance: float) -> float:
        """The part of both surfaces that lies no further from the other one than the tolerance in mm."""
        near = self.pred_areas[self.pred_to_fixed <= tolerance].sum()
        near += self.fixed_areas[self.fixed_to_pred <= tolerance].sum()
        return float(near / (self.pred_areas.sum() + self.fixed_areas.sum()))


def _check(pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float], num_labels: int) -> None:
    dims = fixed.dim()
    if dims not in (2, 3) or pred.shape != fixed.shape:
        raise ValueError(
            f"pred and fixed must be label maps of one shape (*spatial), 2-D or 3-D, got {list(pred.shape)} and "
            f"{list(fixed.shape)}."
        )
    if len(spacing) != dims or not all(0 < size < math.inf for size in spacing):
        raise ValueError(f"spacing must be a positive number for each of the {dims} axes, got {tuple(spacing)}.")
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
    for name, label in (("pred", pred), ("fixed", fixed)):
        if label.is_floating_point() and not bool((label == label.round()).all()):
            raise ValueError(f"{name} must hold whole numbers, as a label map does.")


def _bounding_box(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    """The smallest box around two boxes, either of which there may not be."""
    if first is None or second is None:
        return first or second
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second))


def _neighbor_codes(mask: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Which of the voxels around each corner between them are inside, as the bits of a number."""
    # a rim of one voxel closes surfaces at the edge of the box
    padded = np.pad(mask, 1)
    codes = np.zeros([size - 1 for size in padded.shape], dtype=np.uint8)
    for offset, bit in np.ndenumerate(kernel):
        codes |= padded[tuple(slice(o, o + size) for o, size in zip(offset, codes.shape))] * np.uint8(bit)
    return codes


def _distances(pred: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks, of which one at least is not empty."""
    table, kernel = (x.numpy() for x in get_code_to_measure_table(spacing))
    codes = [_neighbor_codes(mask, kernel[0, 0]) for mask in (pred, fixed)]
    # neither all of the neighbours nor none of them are inside
    edges = [(code != 0) & (code != len(table) - 1) for code in codes]
    areas = [table[code[edge]].astype(np.float64) for code, edge in zip(codes, edges)]
    points = [np.argwhere(edge) * np.array(spacing, dtype=np.float64) for edge in edges]
    result = []
    for i, j in ((0, 1), (1, 0)):
        if len(points[i]) and len(points[j]):
            # a tree of the surface alone: exact, and the distance transform of a volume costs more
            distances = KDTree(points[j]).query(points[i])[0]
        else:
            distances = np.full(len(points[i]), np.inf)
        order = np.lexsort((areas[i], distances))
        result.append((distances[order], areas[i][order]))
    (pred_to_fixed, pred_areas), (fixed_to_pred, fixed_areas) = result
    return SurfaceDistances(pred_to_fixed, fixed_to_pred, pred_areas, fixed_areas)


def compute_surface_distances(
    pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float], num_labels: int
) -> Iterator[SurfaceDistances | None]:
    """
    Distances between the surfaces of each structure in two label maps.

    A surface runs between voxel centres; its elements and their areas are those of marching cubes, as in DeepMind's
    ``surface-distance``. One label at a time is computed, in the box around it, when it is asked for: the memory does
    not grow with their number.

    Args:
        pred: ``(*spatial)``, whole numbers, labels numbered 1 to L.
        fixed: the reference, of the same form.
        spacing: voxel size along each axis, in mm.
        num_labels: L; larger and negative numbers are passed over.

    Returns:
        an iterator over the labels; ``None`` for a label in neither image.

    Raises:
        ValueError: When the shapes differ, the spacing does not fit them, a number is not whole or out of its range.

    Source: Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", 2021.
    """
    _check(pred, fixed, spacing, num_labels)
    arrays = [label.detach().cpu().to(torch.int32).clamp(min=0).numpy() for label in (pred, fixed)]
    boxes = [find_objects(array, num_labels) for array in arrays]

    def each_label() -> Iterator[SurfaceDistances | None]:
        for number, (first, second) in enumerate(zip(*boxes), start=1):
            box = _bounding_box(first, second)
            yield None if box is None else _distances(arrays[0][box] == number, arrays[1][box] == number, spacing)

    return each_label()


def _columns(
    pred: torch.Tensor,
    fixed: torch.Tensor,
    spacing: Sequence[float],
    num_labels: int,
    value: Callable[[SurfaceDistances], float],
) -> torch.Tensor:
    """``(B, L)`` values of the labels; NaN for those that the fixed images do not have."""
    if pred.shape != fixed.shape or fixed.dim() not in (4, 5) or fixed.shape[1] != 1:
        raise ValueError(
            f"pred and fixed must be label maps of one shape (B, 1, *spatial), 2-D or 3-D, got {list(pred.shape)} and "
            f"{list(fixed.shape)}."
        )
    rows = []
    for maps in zip(pred[:, 0], fixed[:, 0]):
        labels = compute_surface_distances(*maps, spacing, num_labels)
        rows.append([math.nan if s is None or len(s.fixed_areas) == 0 else value(s) for s in labels])
    return torch.tensor(rows, dtype=torch.float64, device=fixed.device)


def compute_label_hausdorff(
    pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float], num_labels: int, percentile: float = 95.0
) -> torch.Tensor:
    """
    Hausdorff distance of each structure: the larger of the percentiles of the distances from one surface to the other,
    in which each element counts by its area.

    These are the figures of the Learn2Reg challenge (github.com/MDL-UzL/L2R), whose script measures in voxels,
    ``spacing=(1, 1, 1)``. It leaves out, besides, labels that the moving image lacks, whatever has become of them.

    Args:
        pred: ``(B, 1, *spatial)``, warped label maps, labels numbered 1 to L.
        fixed: label maps of the fixed images, of the same form.
        spacing: voxel size along each axis, in mm.
        num_labels: L.
        percentile: between 0 and 100; 100 is the largest distance.

    Returns:
        ``(B, L)`` in mm, float64. NaN for a label that the fixed image does not have, as in MONAI's ``DiceMetric``;
        infinite for one that only the fixed image has.

    Raises:
        ValueError: When the shapes differ, the spacing does not fit them, a number is not whole or out of its range.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie between 0 and 100, got {percentile}.")
    return _columns(pred, fixed, spacing, num_labels, lambda s: s.percentile(percentile))


def compute_label_surface_dice(
    pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float], num_labels: int, tolerance: float
) -> torch.Tensor:
    """
    Surface Dice of each structure: the part of both surfaces, by area, that lies within a tolerance of the other one.

    Args:
        pred: ``(B, 1, *spatial)``, warped label maps, labels numbered 1 to L.
        fixed: label maps of the fixed images, of the same form.
        spacing: voxel size along each axis, in mm.
        num_labels: L.
        tolerance: distance that passes, in mm.

    Returns:
        ``(B, L)`` between 0 and 1, float64. NaN for a label that the fixed image does not have; 0 for one that only the
        fixed image has.

    Raises:
        ValueError: When the shapes differ, the spacing does not fit them, a number is not whole or out of its range.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 mm and finite, got {tolerance}.")
    return _columns(pred, fixed, spacing, num_labels, lambda s: s.overlap(tolerance))


class _LabelSurfaceMetric(PairwiseMetric):
    """Base of the two metrics: one row of labels for each pair, with the voxel size of each fixed label map."""

    def __init__(self, num_labels: int, spacing: Sequence[float] | None, reduction: MetricReduction | str) -> None:
        super().__init__(reduction)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        self.num_labels = num_labels
        self.spacing = None if spacing is None else tuple(spacing)

    def _compute_pair(self, pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
        raise NotImplementedError

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if y is None:
            raise ValueError("the label map of the fixed image is needed as y.")
        spacings = spacings_of(y) if self.spacing is None else [self.spacing] * len(y)
        pred, fixed = plain_tensor(y_pred), plain_tensor(y)
        if pred.shape != fixed.shape:
            raise ValueError(f"the label maps must have one shape, got {list(pred.shape)} and {list(fixed.shape)}.")
        return torch.cat([self._compute_pair(pred[i : i + 1], fixed[i : i + 1], s) for i, s in enumerate(spacings)])


class LabelHausdorffMetric(_LabelSurfaceMetric):
    """
    :py:func:`compute_label_hausdorff` as a MONAI metric, of label maps ``(B, 1, *spatial)`` numbered 1 to L.

    A label that the warped map has lost is infinitely far away, and so is the mean: it must not look right.

    Args:
        num_labels: L, the number of columns.
        percentile: between 0 and 100.
        spacing: voxel size along each axis in mm. By default that of the fixed label map, a ``MetaTensor`` (1 mm for a
            plain tensor).
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def __init__(
        self,
        num_labels: int,
        percentile: float = 95.0,
        spacing: Sequence[float] | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
    ) -> None:
        super().__init__(num_labels, spacing, reduction)
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must lie between 0 and 100, got {percentile}.")
        self.percentile = percentile

    def _compute_pair(self, pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
        return compute_label_hausdorff(pred, fixed, spacing, self.num_labels, self.percentile)


class LabelSurfaceDiceMetric(_LabelSurfaceMetric):
    """
    :py:func:`compute_label_surface_dice` as a MONAI metric, of label maps ``(B, 1, *spatial)`` numbered 1 to L.

    Args:
        num_labels: L, the number of columns.
        tolerance: distance that passes, in mm.
        spacing: voxel size along each axis in mm. By default that of the fixed label map, a ``MetaTensor`` (1 mm for a
            plain tensor).
        reduction: how the values of the pairs are reduced, as in MONAI's metrics.
    """

    def __init__(
        self,
        num_labels: int,
        tolerance: float = 1.0,
        spacing: Sequence[float] | None = None,
        reduction: MetricReduction | str = MetricReduction.MEAN,
    ) -> None:
        super().__init__(num_labels, spacing, reduction)
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be at least 0 mm and finite, got {tolerance!r}.")
        self.tolerance = tolerance

    def _compute_pair(self, pred: torch.Tensor, fixed: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
        return compute_label_surface_dice(pred, fixed, spacing, self.num_labels, self.tolerance)
