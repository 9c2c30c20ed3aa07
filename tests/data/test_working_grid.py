# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES

from monai.data import MetaTensor

from monai_sacb.data import Grid, make_working_grid, resample_to_working_grid

IDENTITY = torch.eye(4, dtype=torch.float64)


def filled(shape: tuple[int, ...], part: tuple[slice, ...] = (slice(None),) * 3) -> torch.Tensor:
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[(0, *part)] = True
    return mask


def places(grid: Grid) -> torch.Tensor:
    return torch.cat([points for _, points in grid.places()])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_axes_are_nearest_to_ras_and_the_foreground_is_inside(name: str) -> None:
    fixed = Grid((30, 40, 36), torch.from_numpy(GEOMETRIES[name]))
    part = (slice(5, 20), slice(10, 31), slice(8, 30))
    grid = make_working_grid(fixed, filled(fixed.shape, part), fixed, filled(fixed.shape, part), IDENTITY, spacing=1.3)
    assert "".join(nib.aff2axcodes(grid.affine.numpy())) == "RAS"
    assert grid.spacing == pytest.approx((1.3, 1.3, 1.3))
    # directions are those of the fixed image
    turn = torch.linalg.inv(fixed.affine[:3, :3] / torch.tensor(fixed.spacing)) @ (grid.affine[:3, :3] / 1.3)
    assert torch.allclose(turn.abs().sum(0), torch.ones(3, dtype=torch.float64), atol=1e-9)
    corners = torch.cartesian_prod(*[torch.tensor([float(p.start), p.stop - 1.0], dtype=torch.float64) for p in part])
    world = corners @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    voxels = (world - grid.affine[:3, 3]) @ torch.linalg.inv(grid.affine[:3, :3]).T
    assert bool((voxels >= 0).all()) and bool((voxels <= torch.tensor(grid.shape) - 1).all())


def test_voxels_of_the_same_size_are_those_of_the_fixed_image() -> None:
    fixed = Grid((30, 40, 36), torch.from_numpy(GEOMETRIES["RPS"]))
    grid = make_working_grid(fixed, filled(fixed.shape), fixed, filled(fixed.shape), IDENTITY, spacing=2.0, margin=0.0)
    voxels = (places(grid) - fixed.affine[:3, 3]) @ torch.linalg.inv(fixed.affine[:3, :3]).T
    # the third axis has voxels of 1 mm
    assert torch.allclose(voxels[:, :2], voxels[:, :2].round(), atol=1e-9)
    assert sorted(grid.shape) == sorted((30, 40, 18))


@pytest.mark.parametrize("max_voxels", [20_000, 60_000, 10**7])
def test_number_of_voxels_is_bounded(max_voxels: int) -> None:
    fixed = Grid((50, 60, 55), torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)))
    grid = make_working_grid(
        fixed, filled(fixed.shape), fixed, filled(fixed.shape), IDENTITY, max_voxels=max_voxels, margin=0.0
    )
    assert math.prod(grid.shape) <= max_voxels
    # no finer than the image, no coarser than need be
    assert min(grid.spacing) >= 1.0 - 1e-9
    assert math.prod(grid.shape) > 0.7 * min(max_voxels, 50 * 60 * 163)


def test_grid_reaches_for_the_moving_image_but_not_far_out_of_the_fixed_one() -> None:
    fixed = Grid((40, 40, 40), IDENTITY)
    near = filled(fixed.shape, (slice(15, 25),) * 3)
    alone = make_working_grid(fixed, near, fixed, near, IDENTITY, spacing=1.0, margin=2.0)
    both = make_working_grid(fixed, near, fixed, filled(fixed.shape), IDENTITY, spacing=1.0, margin=2.0)
    assert alone.shape == (16, 16, 16) and both.shape == (44, 44, 44)
    shift = IDENTITY.clone()
    shift[0, 3] = -500.0
    away = make_working_grid(fixed, near, fixed, near, shift, spacing=1.0, margin=2.0)
    assert float(places(away)[:, 0].max()) <= 41.0 + 1e-9


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("spacing", [0.8, 2.5])
def test_linear_image_stays_linear(name: str, spacing: float) -> None:
    """Whatever the smoothing, what grows linearly in space still has its value at each place."""
    affine = torch.from_numpy(GEOMETRIES[name])
    own = Grid((30, 34, 32), affine)
    slope = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    image = MetaTensor((places(own) @ slope).float().view(1, *own.shape), affine=affine)
    part = (slice(10, 20), slice(11, 22), slice(12, 21))
    move = IDENTITY.clone()
    move[:3, 3] = torch.tensor([1.0, -2.0, 0.5])
    grid = make_working_grid(own, filled(own.shape, part), own, filled(own.shape, part), move, spacing, margin=0.0)
    result = resample_to_working_grid(image, move, grid)
    expected = (places(grid) + move[:3, 3]) @ slope
    voxels = (places(grid) + move[:3, 3] - affine[:3, 3]) @ torch.linalg.inv(affine[:3, :3]).T
    inner = ((voxels > 6) & (voxels < torch.tensor(own.shape) - 7)).all(1)
    assert int(inner.sum()) > 20
    assert float((result.as_tensor().flatten().double() - expected)[inner].abs().max()) < 1e-3 * float(
        image.abs().max()
    )
    assert np.allclose(result.affine, grid.affine)


def test_coarse_grids_do_not_alias() -> None:
    """A pattern finer than the grid averages out instead of turning into a coarse one."""
    stripes = (torch.arange(60) % 2).float().expand(1, 60, 60, 60)
    own = Grid((60, 60, 60), IDENTITY)
    grid = make_working_grid(own, filled(own.shape), own, filled(own.shape), IDENTITY, spacing=4.0, margin=0.0)
    result = resample_to_working_grid(MetaTensor(stripes.contiguous(), affine=IDENTITY), IDENTITY, grid).as_tensor()
    assert float((result[:, 3:-3, 3:-3, 3:-3] - 0.5).abs().max()) < 0.02


ILL_CASES = [
    ({"spacing": 0.0}, "spacing must be positive, got 0.0"),
    ({"spacing": float("nan")}, "spacing must be positive"),
    ({"max_voxels": 10}, "max_voxels must be at least 4096"),
    ({"margin": -1.0}, "margin not negative, got .* -1.0"),
]


@pytest.mark.parametrize("options, message", ILL_CASES)
def test_ill_formed(options: dict[str, float], message: str) -> None:
    fixed = Grid((20, 20, 20), IDENTITY)
    with pytest.raises(ValueError, match=message):
        make_working_grid(fixed, filled(fixed.shape), fixed, filled(fixed.shape), IDENTITY, **options)


def test_mask_of_another_size() -> None:
    fixed = Grid((20, 20, 20), IDENTITY)
    with pytest.raises(ValueError, match=r"moving_foreground must have shape \(1, 20, 20, 20\)"):
        make_working_grid(fixed, filled(fixed.shape), fixed, filled((20, 20, 19)), IDENTITY)
