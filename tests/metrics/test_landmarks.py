# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator

from monai_sacb.metrics import LandmarkErrorMetric, compute_tre

# shape of the field, spacing, type
TEST_CASES = [
    ((1, 2, 5, 7), (1.0, 1.0), torch.float64),
    ((2, 2, 4, 3), (0.5, 3.0), torch.float32),
    ((3, 3, 4, 5, 6), (1.0, 2.5, 0.7), torch.float64),
    ((1, 3, 7, 2, 3), (2.0, 2.0, 2.0), torch.bfloat16),
]

# field, fixed points, moving points, further arguments, message
ILL_CASES: list[tuple[tuple, tuple, tuple, dict[str, Any], str]] = [
    ((1, 3, 4, 4), (1, 5, 2), (1, 5, 2), {}, r"got shape \[1, 3, 4, 4\]"),
    ((1, 1, 4), (1, 5, 1), (1, 5, 1), {}, r"got shape \[1, 1, 4\]"),
    ((1, 2, 4, 4), (1, 5, 3), (1, 5, 3), {}, r"B and d of the field, \[1, 2\], got shapes \[1, 5, 3\]"),
    ((2, 2, 4, 4), (1, 5, 2), (1, 5, 2), {}, r"\[2, 2\], got shapes \[1, 5, 2\]"),
    ((1, 2, 4, 4), (1, 5, 2), (1, 4, 2), {}, r"\[1, 5, 2\] and \[1, 4, 2\]"),
    ((1, 2, 4, 4), (5, 2), (5, 2), {}, r"\[5, 2\] and \[5, 2\]"),
    ((1, 2, 4, 4), (1, 5, 2), (1, 5, 2), {"spacing": (1, 1, 1)}, r"each of the 2 axes, got \(1, 1, 1\)"),
    ((1, 2, 4, 4), (1, 5, 2), (1, 5, 2), {"order": 0}, "order must be 1 to 5, got 0"),
]


def landmarks(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A field, and nine landmarks of each image, those of the fixed one inside the grid."""
    rng = np.random.RandomState(4)
    fixed = rng.uniform(size=(shape[0], 9, shape[1])) * (np.array(shape[2:]) - 1)
    arrays = rng.standard_normal(shape), fixed, fixed + rng.standard_normal(fixed.shape)
    ddf, *points = (torch.from_numpy(x) for x in arrays)
    return [ddf.to(dtype), *points]


@pytest.mark.parametrize(("shape", "spacing", "dtype"), TEST_CASES)
def test_linear_interpolation(shape: tuple[int, ...], spacing: tuple[float, ...], dtype: torch.dtype) -> None:
    ddf, fixed, moving = landmarks(shape, dtype)
    errors = compute_tre(moving, fixed, ddf, spacing)
    assert errors.shape == fixed.shape[:2] and errors.dtype == torch.float64
    axes = [np.arange(size) for size in shape[2:]]
    for i in range(shape[0]):
        at = RegularGridInterpolator(axes, ddf[i].double().movedim(0, -1).numpy())
        places = fixed[i].numpy() + at(fixed[i].numpy())
        expected = np.linalg.norm((places - moving[i].numpy()) * spacing, axis=1)
        np.testing.assert_allclose(errors[i], expected, rtol=1e-9)


def test_linear_field_has_no_half_voxel() -> None:
    """p -> A p + b, exactly, at any place: the classical half voxel would show."""
    matrix = np.array([[0.9, 0.1, 0.0], [-0.2, 1.1, 0.1], [0.0, 0.3, 0.8]])
    shift = np.array([0.5, -1.0, 2.0])
    grid = np.indices((6, 7, 8)).astype(float)
    ddf = np.einsum("ij,jxyz->ixyz", matrix - np.eye(3), grid) + shift.reshape(3, 1, 1, 1)
    fixed = np.random.RandomState(0).uniform(size=(1, 20, 3)) * np.array([5, 6, 7])
    moving = fixed @ matrix.T + shift
    tensors = [torch.from_numpy(x) for x in (moving, fixed, ddf[None])]
    assert compute_tre(*tensors, (1.0, 2.0, 3.0)).max() < 1e-12
    tensors[0] = tensors[0] + torch.tensor([3.0, -2.0, 0.0])
    torch.testing.assert_close(compute_tre(*tensors, (1.0, 2.0, 3.0)), torch.full((1, 20), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 3])
def test_outside_the_grid(order: int) -> None:
    ddf, _, _ = landmarks((1, 2, 5, 7))
    outside = torch.tensor([[[-3.0, 2.0], [1.0, 99.0], [40.0, 40.0]]], dtype=torch.float64)
    border = torch.tensor([[0, 2], [1, 6], [4, 6]])
    expected = torch.stack([ddf[0, :, i, j].norm() for i, j in border.tolist()])[None]
    torch.testing.assert_close(compute_tre(outside, outside, ddf, (1, 1), order), expected)


def test_unknown_landmarks() -> None:
    ddf, fixed, moving = landmarks((2, 3, 4, 5, 6))
    expected = compute_tre(moving, fixed, ddf, (1, 1, 1))
    fixed[0, 2, 1] = float("nan")
    moving[1, 4:] = float("nan")
    expected[0, 2] = expected[1, 4:] = float("nan")
    torch.testing.assert_close(compute_tre(moving, fixed, ddf, (1, 1, 1)), expected, equal_nan=True)
    assert compute_tre(moving[:, :0], fixed[:, :0], ddf, (1, 1, 1)).shape == (2, 0)
    assert compute_tre(moving, fixed, torch.full_like(ddf, float("nan")), (1, 1, 1)).isnan().all()


@pytest.mark.parametrize(("ddf", "fixed", "moving", "arguments", "message"), ILL_CASES)
def test_ill_arguments(ddf: tuple, fixed: tuple, moving: tuple, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_tre(*(torch.zeros(shape) for shape in (moving, fixed, ddf)), **{"spacing": (1, 1), **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metric(dtype: torch.dtype) -> None:
    metric = LandmarkErrorMetric()
    # as many landmarks as each pair has
    for number, dims in ((4, 3), (2, 3)):
        y = torch.arange(number * dims, dtype=dtype).view(number, dims)
        y_pred = y + torch.tensor([3.0, 0.0, 4.0], dtype=dtype) * torch.arange(number, dtype=dtype)[:, None]
        metric([y_pred], [y])
    torch.testing.assert_close(metric.get_buffer(), torch.tensor([[7.5], [2.5]], dtype=torch.float64))
    assert metric.aggregate().item() == pytest.approx(5.0)


def test_metric_leaves_out_what_is_not_known() -> None:
    y = torch.zeros(3, 3, 2)
    y_pred = torch.tensor([0.0, 2.0]).expand(3, 3, 2).clone()
    y_pred[:, 2] = 99.0
    y[0, 2, 0] = float("nan")
    y[1] = float("nan")
    y_pred[2, 1] = float("nan")
    values = LandmarkErrorMetric()(y_pred, y)
    torch.testing.assert_close(values[:, 0], torch.tensor([2.0, torch.nan, torch.nan]).double(), equal_nan=True)


def test_ill_metric() -> None:
    with pytest.raises(ValueError, match="landmarks of the moving image are needed as y"):
        LandmarkErrorMetric()(torch.zeros(1, 4, 3))
    for first, second in (((1, 4, 3), (1, 5, 3)), ((1, 4), (1, 4))):
        with pytest.raises(ValueError, match=r"one shape \(B, N, d\)"):
            LandmarkErrorMetric()(torch.zeros(first), torch.zeros(second))
    with pytest.raises(ValueError, match="nothing has been measured"):
        LandmarkErrorMetric().aggregate()
