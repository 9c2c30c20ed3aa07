# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai.data import MetaTensor

from monai_sacb.metrics import (
    LabelHausdorffMetric,
    LabelSurfaceDiceMetric,
    compute_label_hausdorff,
    compute_label_surface_dice,
    compute_surface_distances,
)

SPACING = (0.5, 1.0, 3.0)
NAN, INF = math.nan, math.inf

# shapes of pred and fixed, further arguments, message
ILL_CASES: list[tuple[tuple, tuple, dict[str, Any], str]] = [
    ((1, 1, 4, 4, 4), (1, 1, 4, 4, 5), {}, r"\[1, 1, 4, 4, 4\] and \[1, 1, 4, 4, 5\]"),
    ((2, 1, 4, 4, 4), (1, 1, 4, 4, 4), {}, r"\[2, 1, 4, 4, 4\] and \[1, 1, 4, 4, 4\]"),
    ((1, 2, 4, 4, 4), (1, 2, 4, 4, 4), {}, r"\(B, 1, \*spatial\)"),
    ((1, 1, 4), (1, 1, 4), {"spacing": (1,)}, r"2-D or 3-D, got \[1, 1, 4\]"),
    ((1, 1, 4, 4, 4), (1, 1, 4, 4, 4), {"spacing": (1, 1)}, r"each of the 3 axes, got \(1, 1\)"),
    ((1, 1, 4, 4, 4), (1, 1, 4, 4, 4), {"spacing": (1, 0, 1)}, r"got \(1, 0, 1\)"),
    ((1, 1, 4, 4, 4), (1, 1, 4, 4, 4), {"spacing": (1, NAN, 1)}, r"got \(1, nan, 1\)"),
    ((1, 1, 4, 4, 4), (1, 1, 4, 4, 4), {"num_labels": 0}, "num_labels must be at least 1, got 0"),
]


def box(shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...], value: int = 1) -> torch.Tensor:
    """A label map ``(1, 1, *shape)`` with one box."""
    result = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    result[(0, 0, *(slice(a, b) for a, b in zip(start, stop)))] = value
    return result


def blobs(seed: int, shape: tuple[int, ...] = (20, 18, 16), num_labels: int = 5) -> torch.Tensor:
    """Random label maps ``(2, 1, *shape)``."""
    noise = np.random.RandomState(seed).standard_normal((2, num_labels + 1, *shape))
    maps = [ndimage.gaussian_filter(n, (0, *[2.0] * len(shape))).argmax(0) for n in noise]
    return torch.from_numpy(np.stack(maps))[:, None]


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """Corners between voxels of a mask and others, ``(N, d)``, in voxels of an array with a rim of one."""
    padded = np.pad(mask, 1)
    sums = ndimage.uniform_filter(padded.astype(float), 2, mode="constant", origin=0)
    return np.argwhere((sums > 1e-6) & (sums < 1 - 1e-6))


@pytest.mark.parametrize("shape", [(20, 18, 16), (33, 29)])
@pytest.mark.parametrize("percentile", [100])
def test_largest_distance_by_brute_force(shape: tuple[int, ...], percentile: int) -> None:
    pred, fixed = blobs(0, shape), blobs(1, shape)
    spacing = SPACING[: len(shape)]
    values = compute_label_hausdorff(pred, fixed, spacing, 5, percentile)
    assert values.shape == (2, 5) and values.dtype == torch.float64
    for b in range(2):
        for i in range(5):
            p, f = (surface_voxels((x[b, 0] == i + 1).numpy()) * spacing for x in (pred, fixed))
            distances = np.linalg.norm(p[:, None] - f[None], axis=-1)
            expected = max(distances.min(0).max(), distances.min(1).max())
            assert values[b, i].item() == pytest.approx(expected, rel=1e-12) and expected > 1


def test_each_distance_of_a_label() -> None:
    pred, fixed = blobs(0)[0, 0], blobs(1)[0, 0]
    labels = list(compute_surface_distances(pred, fixed, SPACING, 5))
    for i, found in enumerate(labels):
        assert found is not None
        p, f = (surface_voxels((x == i + 1).numpy()) * SPACING for x in (pred, fixed))
        distances = np.linalg.norm(p[:, None] - f[None], axis=-1)
        np.testing.assert_allclose(found.pred_to_fixed, np.sort(distances.min(1)), rtol=1e-12)
        np.testing.assert_allclose(found.fixed_to_pred, np.sort(distances.min(0)), rtol=1e-12)
        assert len(found.pred_areas) == len(p) and len(found.fixed_areas) == len(f)
        assert found.pred_areas.min() > 0


def test_area_of_a_ball() -> None:
    """The elements of the surface add up to 4 π r², whatever the voxel size (less what marching cubes add)."""
    spacing = (0.5, 0.7, 0.4)
    grid = np.stack([(i - 30) * s for i, s in zip(np.indices((61, 61, 61)), spacing)])
    ball = torch.from_numpy((grid**2).sum(0) < 100)
    (found,) = compute_surface_distances(ball, ball, spacing, 1)
    assert found is not None
    assert found.fixed_areas.sum() == pytest.approx(4 * math.pi * 100, rel=0.12)
    assert not found.fixed_to_pred.any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift(axis: int) -> None:
    """Boxes shifted by two voxels: two ends lie two voxels apart, the sides less than that."""
    fixed = box((14, 14, 14), (4, 4, 4), (9, 9, 9))
    pred = torch.roll(fixed, 2, axis + 2)
    distance = 2 * SPACING[axis]
    assert compute_label_hausdorff(pred, fixed, SPACING, 1, 100).item() == pytest.approx(distance)
    assert compute_label_hausdorff(pred, fixed, SPACING, 1, 95).item() == pytest.approx(distance)
    overlaps = [compute_label_surface_dice(pred, fixed, SPACING, 1, t).item() for t in (0, distance * 0.99, distance)]
    assert 0 < overlaps[0] < 0.8 and overlaps[0] <= overlaps[1] < 1 and overlaps[2] == 1


def test_elements_count_by_their_area() -> None:
    """A thin needle is a small part of the surface: the percentile does not see it, the largest distance does."""
    fixed = box((40, 20, 20), (2, 2, 2), (18, 18, 18))
    pred = fixed.clone()
    pred[0, 0, 18:24, 9, 9] = 1
    assert compute_label_hausdorff(pred, fixed, (1, 1, 1), 1).item() == 0
    assert compute_label_hausdorff(pred, fixed, (1, 1, 1), 1, 100).item() == 6
    assert 0.95 < compute_label_surface_dice(pred, fixed, (1, 1, 1), 1, 0).item() < 1


def test_labels_of_one_image_only() -> None:
    fixed, pred = torch.zeros(1, 1, 8, 8, 8, dtype=torch.int64), torch.zeros(1, 1, 8, 8, 8, dtype=torch.int64)
    # 1 in both, 2 in the fixed image, 3 in the other, 4 in neither; what is no label is passed over
    fixed[..., :3, :], pred[..., :4, :] = 1, 1
    fixed[..., 5, :], pred[..., 6, :] = 2, 3
    fixed[..., 7, :], pred[..., 7, :] = 9, -1
    found = list(compute_surface_distances(pred[0, 0], fixed[0, 0], (1, 1, 1), 4))
    assert [s is None for s in found] == [False, False, False, True]
    assert np.isinf(found[1].fixed_to_pred).all() and len(found[1].pred_to_fixed) == 0
    assert np.isinf(found[2].pred_to_fixed).all() and len(found[2].fixed_to_pred) == 0
    np.testing.assert_array_equal(compute_label_hausdorff(pred, fixed, (1, 1, 1), 4)[0], [1, INF, NAN, NAN])
    overlaps = compute_label_surface_dice(pred, fixed, (1, 1, 1), 4, 1.0)[0]
    np.testing.assert_array_equal(overlaps, [1, 0, NAN, NAN])
    # a mean that a lost label does not enter would be wrong
    metric = LabelHausdorffMetric(4)
    metric(pred, fixed)
    assert metric.aggregate().item() == INF


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.bool])
def test_types(dtype: torch.dtype) -> None:
    pred, fixed = ((x == 1).to(dtype) for x in (blobs(0), blobs(1)))
    expected = compute_label_hausdorff(blobs(0), blobs(1), SPACING, 1)
    assert torch.equal(compute_label_hausdorff(pred, fixed, SPACING, 1), expected) and (expected > 0).all()


def test_label_at_the_border_is_closed_there() -> None:
    """A label map says nothing of what is outside: enlarging it changes nothing."""
    pred, fixed = blobs(0), blobs(1)
    larger = [torch.nn.functional.pad(x, (3, 4, 1, 0, 2, 5)) for x in (pred, fixed)]
    assert (pred[:, :, 0] > 0).any()
    values = compute_label_hausdorff(*larger, SPACING, 5, 80)
    assert torch.equal(compute_label_hausdorff(pred, fixed, SPACING, 5, 80), values)


def test_symmetric_and_one_by_one() -> None:
    pred, fixed = blobs(0), blobs(1)
    for function in (compute_label_hausdorff, lambda *a: compute_label_surface_dice(*a, 1.0)):
        values = function(pred, fixed, SPACING, 5)
        torch.testing.assert_close(values, function(fixed, pred, SPACING, 5))
        single = [function(pred[i : i + 1], fixed[i : i + 1], SPACING, 5) for i in range(2)]
        assert torch.equal(values, torch.cat(single))
        assert (values > 0).all() and (values[0] != values[1]).all()


@pytest.mark.parametrize(("pred", "fixed", "arguments", "message"), ILL_CASES)
def test_ill_arguments(pred: tuple, fixed: tuple, arguments: dict[str, Any], message: str) -> None:
    arguments = {"spacing": (1, 1, 1), "num_labels": 2, **arguments}
    for function, further in ((compute_label_hausdorff, {}), (compute_label_surface_dice, {"tolerance": 1.0})):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(pred), torch.zeros(fixed), **arguments, **further)


def test_ill_values() -> None:
    zeros = torch.zeros(1, 1, 4, 4)
    for name, maps in (("pred", (zeros + 0.5, zeros)), ("fixed", (zeros, zeros + math.nan))):
        with pytest.raises(ValueError, match=f"{name} must hold whole numbers"):
            compute_label_hausdorff(*maps, (1, 1), 1)
    with pytest.raises(ValueError, match="percentile must lie between 0 and 100, got 101"):
        compute_label_hausdorff(zeros, zeros, (1, 1), 1, 101)
    with pytest.raises(ValueError, match="tolerance must be at least 0 mm and finite, got -1"):
        compute_label_surface_dice(zeros, zeros, (1, 1), 1, -1)
    with pytest.raises(ValueError, match=r"\(\*spatial\), 2-D or 3-D, got \[4, 4\] and \[4, 5\]"):
        compute_surface_distances(torch.zeros(4, 4), torch.zeros(4, 5), (1, 1), 1)


METRICS: list[tuple[Callable, Callable]] = [
    (LabelHausdorffMetric, lambda p, f, s: compute_label_hausdorff(p, f, s, 5)),
    (LabelSurfaceDiceMetric, lambda p, f, s: compute_label_surface_dice(p, f, s, 5, 1.0)),
]


@pytest.mark.parametrize(("metric_class", "function"), METRICS)
@pytest.mark.parametrize("as_list", [False, True])
def test_metric_takes_the_voxel_size_of_the_fixed_label(metric_class, function, as_list: bool) -> None:
    pred, fixed = blobs(0), blobs(1)
    # the axes of an image may point anywhere
    affine = torch.tensor([[0, -1.0, 0, 7], [0.5, 0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    expected = function(pred, fixed, SPACING)
    metric = metric_class(5)
    if as_list:
        metric(list(pred), [MetaTensor(x, affine=affine) for x in fixed])
    else:
        metric(MetaTensor(pred, affine=torch.eye(4) * 9), MetaTensor(fixed, affine=torch.stack([affine] * 2)))
    torch.testing.assert_close(torch.as_tensor(metric.aggregate("none")), expected)
    assert metric.aggregate().item() == pytest.approx(expected.mean().item(), rel=1e-6)
    # voxels, as published tables have them
    for spaced, arguments in ((MetaTensor(fixed, affine=affine), {"spacing": (1, 1, 1)}), (fixed, {})):
        metric = metric_class(5, **arguments)
        metric(pred, spaced)
        torch.testing.assert_close(torch.as_tensor(metric.aggregate("none")), function(pred, fixed, (1, 1, 1)))
    assert (function(pred, fixed, (1, 1, 1)) != expected).all()


def test_options_of_the_metrics() -> None:
    pred, fixed = blobs(0), blobs(1)
    values = [LabelHausdorffMetric(5, percentile=p)(pred, fixed) for p in (50, 95, 100)]
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()
    overlaps = [LabelSurfaceDiceMetric(5, tolerance=t)(pred, fixed) for t in (0, 1, 3)]
    assert (overlaps[0] < overlaps[1]).all() and (overlaps[1] < overlaps[2]).all()


@pytest.mark.parametrize("metric_class", [LabelHausdorffMetric, LabelSurfaceDiceMetric])
def test_ill_metrics(metric_class) -> None:
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        metric_class(0)
    with pytest.raises(ValueError, match=r"(percentile|tolerance) must .* got -3"):
        metric_class(2, -3)
    with pytest.raises(ValueError, match="label map of the fixed image is needed as y"):
        metric_class(2)(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"one shape, got \[1, 1, 4, 4\] and \[1, 1, 4, 5\]"):
        metric_class(2)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
