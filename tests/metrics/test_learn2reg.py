# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
The metrics against published evaluation code, whose figures are recorded in ``tests/parity/learn2reg.npz``.

Recorded: what the functions of the Learn2Reg challenge's evaluation script (github.com/MDL-UzL/L2R, February 2025) and
DeepMind's ``surface-distance``, which it uses, give in double precision for the cases below; and the non-diffeomorphic
volume by ``digital-diffeomorphism`` 1.1.1. There are 20 synthetic cases, which :py:func:`synthetic_case` builds again
from their numbers, and 5 with the fields that a network trained on hippocampus images gave for pairs of them, of which
the file holds 12 x 16 x 12 control points, ``control``: figures and test alike take the field interpolated linearly
between these. The label maps and landmarks of all cases are synthetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from monai.metrics import DiceMetric

from monai_sacb.metrics import (
    compute_label_hausdorff,
    compute_label_surface_dice,
    compute_ndv,
    compute_sdlogj,
    compute_tre,
    jacobian_determinant,
    lowest_quantile,
)
from monai_sacb.networks.layers import warp

NUM_LABELS = 4
NUM_SYNTHETIC = 20
NUM_REAL = 5
CASES = range(NUM_SYNTHETIC + NUM_REAL)
SHAPES = ((24, 28, 26), (25, 22, 30), (48, 64, 48))
SPACINGS = ((1.0, 1.0, 1.0), (0.8, 1.25, 2.5))
TOLERANCE = 1.0
EXACT = {"rtol": 0, "atol": 1e-6, "equal_nan": True}


class Case(NamedTuple):
    """A pair in the form of the script: label maps ``(*spatial)``, field ``(3, *spatial)``, points in voxels."""

    ddf: np.ndarray
    moving: np.ndarray
    fixed: np.ndarray
    fixed_points: np.ndarray
    moving_points: np.ndarray
    spacing: tuple[float, float, float]


def smooth(rng: np.random.RandomState, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random functions ``(count, *shape)`` of mean square 1: cosines of up to one and a half periods."""
    waves = [np.cos(np.pi * np.arange(4)[:, None] * (np.arange(n) + 0.5) / n) for n in shape]
    functions = np.einsum("cijk,ix,jy,kz->cxyz", rng.standard_normal((count, 4, 4, 4)), *waves)
    return functions / np.sqrt(np.mean(functions**2, axis=(1, 2, 3), keepdims=True))


def synthetic_case(number: int, control: np.ndarray | None = None) -> Case:
    """The case of that number; with the field between control points ``(3, *points)``, where these are given."""
    # the one generator of numpy whose numbers never change
    rng = np.random.RandomState(1000 + number)
    shape = SHAPES[2] if control is not None else SHAPES[number % 2]
    if control is None:
        ddf = (0.4 + 0.15 * number) * smooth(rng, 3, shape)
    else:
        ddf = control.astype(np.float64)
        for axis, size in enumerate(shape, start=1):
            places = np.linspace(0, ddf.shape[axis] - 1, size)
            ddf = np.apply_along_axis(lambda y, x=places: np.interp(x, np.arange(len(y)), y), axis, ddf)
    # no label comes near the border: where a field leaves the image, the ways to sample the nearest voxel differ
    places = np.stack([(i + 0.5) / n - 0.5 for i, n in zip(np.indices(shape), shape)])
    inside = (places**2).sum(0) < 0.33**2
    functions = smooth(rng, NUM_LABELS, shape)
    fixed = np.where(inside, 1 + functions.argmax(0), 0)
    moving = np.where(inside, 1 + (functions + 0.3 * smooth(rng, NUM_LABELS, shape)).argmax(0), 0)
    # labels that one of the images lacks, and a single voxel that no voxel of the fixed image is sent to
    if number in (16, 18):
        fixed[fixed == 3] = 0
    if number in (17, 18):
        moving[moving == 3] = 0
    if number == 19:
        moving[moving == 2] = 0
        moving[6, 12, 9] = 2
    last = np.array(shape) - 1.0
    at_voxels = np.floor(rng.uniform(size=(10, 3)) * (last + 1))
    between = rng.uniform(size=(10, 3)) * last
    fixed_points = np.concatenate([at_voxels, between])
    return Case(
        ddf, moving, fixed, fixed_points, fixed_points + 2 * rng.standard_normal((20, 3)), SPACINGS[number % 4 // 2]
    )


@pytest.fixture(scope="module")
def recorded(parity: Callable[[str], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the scripts gave: one row for each case."""
    return parity("learn2reg")


def case_and_tensors(number: int, recorded: dict[str, np.ndarray]) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A case, its field, and its warped and fixed label maps one after the other, with a batch axis."""
    control = recorded["control"][number - NUM_SYNTHETIC] if number >= NUM_SYNTHETIC else None
    case = synthetic_case(number, control)
    ddf = torch.from_numpy(case.ddf)[None]
    warped = warp(torch.from_numpy(case.moving)[None, None].double(), ddf, mode="nearest")
    return case, ddf, torch.stack([warped, torch.from_numpy(case.fixed)[None, None].double()])


def test_recorded_cases_say_something(recorded: dict[str, np.ndarray]) -> None:
    assert all(len(recorded[name]) == len(CASES) for name in recorded if name not in ("control", "quantile"))
    for name, low, high in (("dice", 0.2, 0.9), ("hd95", 1, 12), ("sdlogj", 0.01, 0.8), ("tre", 0.1, 20)):
        values = recorded[name][np.isfinite(recorded[name])]
        assert values.min() < values.max() and low < np.median(values) < high, name
    assert (recorded["folds"] > 0).sum() >= 5 and (recorded["folds"] == 0).sum() >= 5
    assert (recorded["ndv"] > 0).sum() >= 5
    assert np.isnan(recorded["hd95"]).any() and np.isinf(recorded["hd95"]).any()
    assert np.abs(recorded["control"]).max() > 1


@pytest.mark.parametrize("number", CASES)
def test_labels(number: int, recorded: dict[str, np.ndarray]) -> None:
    case, _, (warped, fixed) = case_and_tensors(number, recorded)
    # the script leaves out what the moving image lacks; a metric of two label maps cannot know
    known = [bool((case.moving == i + 1).any()) for i in range(NUM_LABELS)]
    dice = DiceMetric(include_background=False, num_classes=NUM_LABELS + 1)(warped, fixed)[0]
    np.testing.assert_allclose(dice[known], recorded["dice"][number][known], **EXACT)
    for name, spacing in (("hd95", (1.0, 1.0, 1.0)), ("hd95_mm", case.spacing)):
        distances = compute_label_hausdorff(warped, fixed, spacing, NUM_LABELS)[0]
        np.testing.assert_allclose(distances[known], recorded[name][number][known], **EXACT)
    largest = compute_label_hausdorff(warped, fixed, case.spacing, NUM_LABELS, percentile=100)[0]
    np.testing.assert_allclose(largest[known], recorded["hd100_mm"][number][known], **EXACT)
    overlaps = compute_label_surface_dice(warped, fixed, case.spacing, NUM_LABELS, TOLERANCE)[0]
    np.testing.assert_allclose(overlaps[known], recorded["surface_dice"][number][known], **EXACT)


@pytest.mark.parametrize("number", range(4))
def test_labels_of_a_slice(number: int, recorded: dict[str, np.ndarray]) -> None:
    case, _, labels = case_and_tensors(number, recorded)
    warped, fixed = labels[:, :, :, case.fixed.shape[0] // 2]
    distances = compute_label_hausdorff(warped, fixed, case.spacing[1:], NUM_LABELS)[0]
    np.testing.assert_allclose(distances, recorded["hd95_slice"][number], **EXACT)
    overlaps = compute_label_surface_dice(warped, fixed, case.spacing[1:], NUM_LABELS, TOLERANCE)[0]
    np.testing.assert_allclose(overlaps, recorded["surface_dice_slice"][number], **EXACT)


@pytest.mark.parametrize("number", CASES)
def test_jacobian(number: int, recorded: dict[str, np.ndarray]) -> None:
    _, ddf, (_, fixed) = case_and_tensors(number, recorded)
    assert compute_sdlogj(ddf).item() == pytest.approx(recorded["sdlogj"][number], abs=1e-6)
    assert compute_sdlogj(ddf, fixed > 0).item() == pytest.approx(recorded["sdlogj_masked"][number], abs=1e-6)
    # the determinant of the script; its own count of folds takes it for det + 3 and is always 0
    inner = jacobian_determinant(ddf)[:, 2:-2, 2:-2, 2:-2]
    assert (inner <= 0).sum().item() == recorded["folds"][number]
    assert compute_ndv(ddf).item() == pytest.approx(recorded["ndv"][number], abs=1e-6)
    assert compute_ndv(ddf, fixed > 0).item() == pytest.approx(recorded["ndv_masked"][number], abs=1e-6)
    # a field as networks give it
    assert compute_sdlogj(ddf.float()).item() == pytest.approx(recorded["sdlogj"][number], rel=1e-4)


@pytest.mark.parametrize("number", CASES)
def test_landmarks(number: int, recorded: dict[str, np.ndarray]) -> None:
    case, ddf, _ = case_and_tensors(number, recorded)
    points = (torch.from_numpy(case.moving_points)[None], torch.from_numpy(case.fixed_points)[None])
    cubic = compute_tre(*points, ddf, case.spacing, order=3)[0]
    np.testing.assert_allclose(cubic, recorded["tre"][number], **EXACT)
    linear = compute_tre(*points, ddf, case.spacing)[0]
    # the first ten lie on voxel centres
    np.testing.assert_allclose(linear[:10], recorded["tre"][number][:10], **EXACT)
    assert (linear[10:] - cubic[10:]).abs().min() > 0


@pytest.mark.parametrize(("name", "fraction"), [("dice", 0.3), ("sdlogj", 0.7)])
def test_quantile_over_cases(name: str, fraction: float, recorded: dict[str, np.ndarray]) -> None:
    expected = recorded["quantile"][["dice", "sdlogj"].index(name)]
    assert lowest_quantile(torch.from_numpy(recorded[name]), fraction).item() == pytest.approx(expected, abs=1e-6)
