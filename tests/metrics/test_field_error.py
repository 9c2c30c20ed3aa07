# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from monai.data import MetaTensor

from monai_sacb.metrics import FieldErrorMetric, compute_field_error

# shape, spacing, type
TEST_CASES = [
    ((1, 2, 5, 7), (1.0, 1.0), torch.float32),
    ((2, 2, 4, 3), (0.5, 3.0), torch.float64),
    ((3, 3, 4, 5, 6), (1.0, 2.5, 0.7), torch.float32),
    ((1, 3, 1, 1, 1), (2.0, 2.0, 2.0), torch.float64),
]

# shapes of the two fields, spacing, message
ILL_CASES = [
    ((1, 3, 4, 4, 4), (1, 3, 4, 4, 5), (1, 1, 1), r"\[1, 3, 4, 4, 4\] and true_ddf \[1, 3, 4, 4, 5\]"),
    ((2, 3, 4, 4, 4), (1, 3, 4, 4, 4), (1, 1, 1), r"\[2, 3, 4, 4, 4\] and true_ddf \[1, 3, 4, 4, 4\]"),
    ((1, 3, 4, 4, 4), (1, 3, 4, 4, 4), (1, 1), r"spacing \(1, 1\)"),
    ((1, 2, 4, 4), (1, 2, 4, 4), (1.5, 1, 1), r"spacing \(1\.5, 1, 1\)"),
    ((1, 2, 4, 4), (1, 3, 4, 4), (1, 1), r"\[1, 2, 4, 4\] and true_ddf \[1, 3, 4, 4\]"),
]


def fields(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    ddf, true_ddf = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return ddf, true_ddf


def affine_of(spacing: tuple[float, ...], oblique: bool = True) -> torch.Tensor:
    """RAS+ affine of an oblique grid with the given voxel size."""
    rotation = linalg.expm(np.array([[0, -0.4, 0.2], [0.4, 0, -0.7], [-0.2, 0.7, 0]])) if oblique else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing)
    affine[:3, 3] = (-90.0, 20.0, 5.0)
    return torch.from_numpy(affine)


@pytest.mark.parametrize(("shape", "spacing", "dtype"), TEST_CASES)
def test_definition(shape: tuple[int, ...], spacing: tuple[float, ...], dtype: torch.dtype) -> None:
    ddf, true_ddf = fields(shape, dtype)
    error = compute_field_error(ddf, true_ddf, spacing)
    assert error.shape == (shape[0], 1) and error.dtype == dtype
    for i in range(shape[0]):
        difference = (ddf[i] - true_ddf[i]).double().numpy()
        mm = difference * np.array(spacing).reshape(-1, *[1] * (len(shape) - 2))
        assert error[i].item() == pytest.approx(np.linalg.norm(mm, axis=0).mean(), rel=1e-5)


def test_value() -> None:
    """3 voxels of 1 mm and 4 voxels of 2 mm away: the distance is √(3² + 8²) mm, everywhere."""
    ddf = torch.zeros(1, 3, 4, 5, 6)
    true_ddf = torch.tensor([3.0, -4.0, 0.0]).view(1, 3, 1, 1, 1).expand_as(ddf)
    assert compute_field_error(ddf, true_ddf, (1.0, 2.0, 9.0)).item() == pytest.approx(73**0.5)
    assert compute_field_error(true_ddf, true_ddf, (1.0, 2.0, 9.0)).item() == 0


def test_voxels_without_truth_do_not_count() -> None:
    ddf, true_ddf = fields((2, 3, 4, 5, 6))
    true_ddf[0, :, 2:] = float("nan")
    # one unknown component suffices
    true_ddf[0, 1, 0, 0] = float("nan")
    error = compute_field_error(ddf, true_ddf, (1, 1, 1))
    distance = (ddf - true_ddf).norm(dim=1)
    known = torch.ones(4, 5, 6, dtype=torch.bool)
    known[2:] = False
    known[0, 0] = False
    assert error[0].item() == pytest.approx(distance[0][known].mean().item(), rel=1e-5)
    assert error[1].item() == pytest.approx(distance[1].mean().item(), rel=1e-5)
    true_ddf[1] = float("nan")
    error = compute_field_error(ddf, true_ddf, (1, 1, 1))
    assert torch.isnan(error[1]) and not torch.isnan(error[0])


@pytest.mark.parametrize(("ddf", "true_ddf", "spacing", "message"), ILL_CASES)
def test_ill_arguments(ddf: tuple, true_ddf: tuple, spacing: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_field_error(torch.zeros(ddf), torch.zeros(true_ddf), spacing)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_metric_takes_the_voxel_size_of_the_true_field(oblique: bool, as_list: bool) -> None:
    spacing = (0.8, 2.0, 1.5)
    ddf, true_ddf = fields((2, 3, 4, 5, 6))
    expected = compute_field_error(ddf, true_ddf, spacing)
    plain = compute_field_error(ddf, true_ddf, (1, 1, 1))
    assert (expected - plain).abs().min() > 0.1
    affine = affine_of(spacing, oblique)
    truth = MetaTensor(true_ddf, affine=torch.stack([affine, affine]))
    metric = FieldErrorMetric()
    if as_list:
        metric(list(ddf), [MetaTensor(t, affine=affine) for t in true_ddf])
    else:
        metric(MetaTensor(ddf), truth)
    assert metric.aggregate().item() == pytest.approx(expected.mean().item(), rel=1e-5)
    torch.testing.assert_close(torch.as_tensor(metric.aggregate("none")), expected)
    # a plain tensor has voxels of 1 mm
    metric.reset()
    metric(ddf, true_ddf)
    assert metric.aggregate().item() == pytest.approx(plain.mean().item(), rel=1e-5)


def test_metric_in_two_dimensions() -> None:
    ddf, true_ddf = fields((1, 2, 5, 6))
    affine = torch.diag(torch.tensor([3.0, 0.5, 1.0, 1.0]))
    metric = FieldErrorMetric()
    metric(ddf, MetaTensor(true_ddf, affine=affine))
    assert metric.aggregate().item() == pytest.approx(compute_field_error(ddf, true_ddf, (3.0, 0.5)).item(), rel=1e-5)


def test_metric_before_registration() -> None:
    """``identity`` measures how far the true field moves, whatever was predicted."""
    ddf, true_ddf = fields((2, 3, 4, 5, 6))
    metric = FieldErrorMetric(identity=True)
    metric(ddf, true_ddf)
    expected = true_ddf.norm(dim=1).flatten(1).mean(1).mean().item()
    assert metric.aggregate().item() == pytest.approx(expected, rel=1e-5)
    before = metric.aggregate().item()
    metric.reset()
    metric(true_ddf, true_ddf)
    assert metric.aggregate().item() == pytest.approx(before) and before > 1


def test_metric_collects_and_reduces() -> None:
    ddf, true_ddf = fields((3, 2, 5, 6))
    expected = compute_field_error(ddf, true_ddf, (1, 1))
    metric = FieldErrorMetric(reduction="none")
    metric(ddf[:2], true_ddf[:2])
    metric(ddf[2:], true_ddf[2:])
    torch.testing.assert_close(metric.aggregate(), expected)
    assert metric.aggregate("mean").item() == pytest.approx(expected.mean().item())
    # an image without any known voxel is left out of the mean
    metric.reset()
    metric(ddf, torch.where(torch.arange(3).view(3, 1, 1, 1) == 1, float("nan"), true_ddf))
    assert metric.aggregate("mean").item() == pytest.approx(expected[[0, 2]].mean().item())


def test_ill_metric() -> None:
    with pytest.raises(ValueError, match="nothing has been measured yet, the buffer is NoneType"):
        FieldErrorMetric().aggregate()
    with pytest.raises(ValueError, match="the true field is needed as y"):
        FieldErrorMetric()(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 4\] and true_ddf \[1, 2, 4, 5\]"):
        FieldErrorMetric()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))


def test_prediction_that_is_no_number_counts() -> None:
    ddf, true_ddf = fields((1, 3, 4, 5, 6))
    ddf[:, :, 1] = float("nan")
    assert torch.isnan(compute_field_error(ddf, true_ddf, (1, 1, 1))).all()


def test_metric_of_a_batch_of_two_voxel_sizes() -> None:
    ddf, true_ddf = fields((2, 3, 4, 5, 6))
    affine = torch.stack([affine_of((1.0, 1.0, 1.0)), affine_of((3.0, 3.0, 3.0))])
    metric = FieldErrorMetric(reduction="none")
    metric(ddf, MetaTensor(true_ddf, affine=affine))
    expected = compute_field_error(ddf, true_ddf, (1, 1, 1)) * torch.tensor([[1.0], [3.0]])
    torch.testing.assert_close(metric.aggregate(), expected)
