# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from monai_sacb.losses import LandmarkLoss

NAN = float("nan")


def make(batch: int, spatial: tuple[int, ...], number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random field, and points of which some lie outside."""
    generator = np.random.default_rng(number)
    ddf = generator.normal(size=(batch, len(spatial), *spatial))
    fixed, moving = (generator.uniform(-2, 8, (batch, number, len(spatial))) for _ in range(2))
    return torch.from_numpy(moving), torch.from_numpy(fixed), torch.from_numpy(ddf)


def by_definition(
    moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, sizes: tuple[float, ...]
) -> list[list[float]]:
    """The distances of every pair, by SciPy."""
    result = []
    for field, start, end in zip(ddf.numpy(), fixed.numpy(), moving.numpy()):
        carried = start + np.stack([map_coordinates(c, start.T, order=1, mode="nearest") for c in field], -1)
        distances = np.sqrt(np.square((carried - end) * np.array(sizes)).sum(1))
        result.append([d for d in distances if not np.isnan(d)])
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "spatial", "number", "spacing"),
    [
        (1, (7, 6), 1, None),
        (3, (5, 8), 9, (0.5, 3.0)),
        (2, (6, 7, 5), 8, 2.0),
        (1, (6, 1, 7), 8, (1.0, 2.0, 3.0)),
    ],
)
def test_definition(
    batch: int, spatial: tuple[int, ...], number: int, spacing: float | tuple[float, ...] | None, dtype: torch.dtype
) -> None:
    data = make(batch, spatial, number)
    sizes = spacing if isinstance(spacing, tuple) else (spacing or 1.0,) * len(spatial)
    expected = np.mean([np.mean(d) for d in by_definition(*data, sizes)])
    value = LandmarkLoss(spacing)(*(t.to(dtype) for t in data))
    assert value.shape == () and value.dtype == dtype
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_voxel_centers_are_at_whole_numbers() -> None:
    ddf = torch.zeros(1, 2, 5, 5)
    ddf[0, :, 3, 1] = torch.tensor([3.0, -4.0])
    points = torch.tensor([[[3.0, 1.0]]])
    assert LandmarkLoss()(points, points, ddf).item() == pytest.approx(5.0)
    assert LandmarkLoss()(points + torch.tensor([3.0, -4.0]), points, ddf).item() == pytest.approx(0.0, abs=1e-5)
    assert LandmarkLoss(0.5)(points, points, ddf).item() == pytest.approx(2.5)


def test_rows_of_nan_do_not_count() -> None:
    moving, fixed, ddf = make(3, (6, 7, 5), 8)
    fixed[0, 5:], moving[1, 2], fixed[2, 1, 0], moving[2, 6, 2] = NAN, NAN, NAN, NAN
    distances = by_definition(moving, fixed, ddf, (1, 1, 1))
    assert [len(d) for d in distances] == [5, 7, 6]
    value = LandmarkLoss()(moving, fixed, ddf.requires_grad_())
    assert value.item() == pytest.approx(np.mean([np.mean(d) for d in distances]), rel=1e-6)
    # a pair without any
    fixed[1] = NAN
    value = LandmarkLoss()(moving, fixed, ddf)
    assert value.item() == pytest.approx(np.mean([np.mean(d) for d in distances[::2]]), rel=1e-6)
    value.backward()
    assert torch.isfinite(ddf.grad).all() and (ddf.grad[1] == 0).all() and ddf.grad[0].abs().max() > 0
    value = LandmarkLoss()(moving, torch.full_like(fixed, NAN), ddf)
    assert value.item() == 0 and value.requires_grad
    assert LandmarkLoss()(moving[:, :0], fixed[:, :0], ddf).item() == 0


def test_batch_equals_mean_of_one_by_one() -> None:
    data = make(3, (6, 7), 4)
    alone = torch.stack([LandmarkLoss()(*(t[i : i + 1] for t in data)) for i in range(3)])
    torch.testing.assert_close(LandmarkLoss()(*data), alone.mean())


@pytest.mark.parametrize("spatial", [(5, 6), (4, 5, 3)])
def test_gradcheck(spatial: tuple[int, ...]) -> None:
    moving, fixed, ddf = make(2, spatial, 3)
    fixed[1, 2] = NAN
    assert torch.autograd.gradcheck(lambda u: LandmarkLoss(2.0)(moving, fixed, u), (ddf.requires_grad_(),))


def test_points_that_fit_have_a_finite_gradient() -> None:
    points = torch.ones(1, 2, 2)
    ddf = torch.zeros(1, 2, 4, 4, requires_grad=True)
    LandmarkLoss()(points, points, ddf).backward()
    assert torch.isfinite(ddf.grad).all()


def test_descent_carries_the_points() -> None:
    moving, fixed, _ = (t.float() for t in make(1, (6, 7), 3))
    ddf = torch.zeros(1, 2, 6, 7, requires_grad=True)
    optimizer, values = torch.optim.Adam([ddf], 0.2), []
    for _ in range(60):
        loss = LandmarkLoss()(moving, fixed, ddf)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 2 and values[-1] < 0.2 * values[0]


@pytest.mark.parametrize(
    ("ddf", "fixed", "moving"),
    [
        ((1, 2, 4, 4), (1, 5, 3), (1, 5, 3)),
        ((1, 2, 4, 4), (1, 5, 2), (1, 4, 2)),
        ((2, 2, 4, 4), (1, 5, 2), (1, 5, 2)),
        ((1, 3, 4, 4), (1, 5, 3), (1, 5, 3)),
        ((1, 2, 4, 4), (5, 2), (5, 2)),
    ],
)
def test_ill_shapes(ddf: tuple[int, ...], fixed: tuple[int, ...], moving: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"both sets of points must be \(B, N, d\) and ddf .*, got"):
        LandmarkLoss()(torch.zeros(moving), torch.zeros(fixed), torch.zeros(ddf))


@pytest.mark.parametrize("spacing", [0.0, (1.0, -1.0), "mm"])
def test_ill_spacing(spacing: object) -> None:
    with pytest.raises(ValueError, match="spacing must be"):
        LandmarkLoss(spacing)


def test_spacing_of_another_dimension() -> None:
    with pytest.raises(ValueError, match="each of the 2 axes"):
        LandmarkLoss((1, 1, 1))(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), torch.zeros(1, 2, 4, 4))
