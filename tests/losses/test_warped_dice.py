# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai.losses import DiceLoss
from monai.networks import one_hot
from monai.networks.blocks import Warp

from monai_sacb.losses import WarpedLabelDiceLoss
from monai_sacb.networks.layers import warp

# shape of the moving and of the fixed image, labels, type of the maps
TEST_CASES = [
    ((1, 9, 11), (9, 11), 1, torch.uint8),
    ((3, 8, 7), (8, 7), 4, torch.int64),
    ((2, 6, 9), (8, 7), 3, torch.float32),
    ((1, 7, 8, 9), (7, 8, 9), 2, torch.int16),
    ((2, 6, 5, 7), (6, 5, 7), 40, torch.uint8),
    ((2, 5, 6, 4), (6, 5, 7), 3, torch.int32),
    ((1, 1, 8, 9), (1, 8, 9), 2, torch.uint8),
]


def make(
    moving: tuple[int, ...], fixed: tuple[int, ...], labels: int, dtype: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(labels)
    batch = moving[0]
    maps = [
        torch.randint(0, labels + 1, (batch, 1, *shape), generator=generator).to(dtype) for shape in (moving[1:], fixed)
    ]
    ddf = 1.7 * torch.randn(batch, len(fixed), *fixed, generator=generator, dtype=torch.float64)
    return maps[0], maps[1], ddf


def by_definition(
    moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, labels: int, **arguments: float
) -> torch.Tensor:
    maps = [one_hot(label.long(), labels + 1, dtype=ddf.dtype) for label in (moving, fixed)]
    return DiceLoss(include_background=False, **arguments)(warp(maps[0], ddf), maps[1])


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize(("moving", "fixed", "labels", "dtype"), TEST_CASES)
def test_equals_dice_of_one_hot_maps(
    moving: tuple[int, ...],
    fixed: tuple[int, ...],
    labels: int,
    dtype: torch.dtype,
    precision: torch.dtype,
    relative_error,
) -> None:
    data = make(moving, fixed, labels, dtype)
    ours, theirs = (data[2].to(precision).requires_grad_() for _ in range(2))
    before = [label.clone() for label in data[:2]]
    value = WarpedLabelDiceLoss()(*data[:2], ours, labels)
    expected = by_definition(*data[:2], theirs, labels)
    assert value.shape == () and value.dtype == precision
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) and 0.05 < value.item() < 0.99
    value.backward()
    expected.backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(before, data[:2]))


def test_equals_dice_of_maps_that_monai_warps(relative_error) -> None:
    moving, fixed, ddf = make((2, 6, 5, 7), (6, 5, 7), 3)
    ours, theirs = (ddf.float().requires_grad_() for _ in range(2))
    value = WarpedLabelDiceLoss()(moving, fixed, ours, 3)
    maps = [one_hot(label.long(), 4) for label in (moving, fixed)]
    expected = DiceLoss(include_background=False)(Warp(padding_mode="zeros")(maps[0], theirs), maps[1])
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(ours.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 3, 4, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    moving, fixed, ddf = make(shape, shape[1:], 2)
    # away from whole numbers, where linear interpolation has kinks
    ddf = ddf.floor() + 0.1 + 0.8 * (ddf - ddf.floor())
    loss = WarpedLabelDiceLoss()
    assert torch.autograd.gradcheck(lambda field: loss(moving, fixed, field, 3), (ddf.requires_grad_(),))


def test_absent_labels() -> None:
    """In no image, in one, in both: as MONAI's loss has it."""
    moving, fixed, ddf = make((2, 8, 9), (8, 9), 2)
    moving[0][moving[0] == 1] = 3
    expected = by_definition(moving, fixed, ddf, 5).item()
    assert WarpedLabelDiceLoss()(moving, fixed, ddf, 5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smooth_nr, smooth_dr", [(1.0, 1.0), (1e-6, 3.0)])
def test_constants(smooth_nr: float, smooth_dr: float) -> None:
    data = make((2, 8, 9), (8, 9), 3)
    expected = by_definition(*data, 3, smooth_nr=smooth_nr, smooth_dr=smooth_dr).item()
    assert WarpedLabelDiceLoss(smooth_nr, smooth_dr)(*data, 3).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("role", [0, 1])
def test_subjects_without_labels(role: int) -> None:
    *maps, ddf = make((3, 8, 9), (8, 9), 3, torch.int16)
    maps[role][1] = -1
    value = WarpedLabelDiceLoss()(*maps, ddf.requires_grad_(), 3)
    pairs = list(zip(*(t.split(1) for t in (*maps, ddf))))
    expected = np.mean([by_definition(*pairs[i], 3).item() for i in (0, 2)])
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert (ddf.grad[1] == 0).all() and ddf.grad[0].abs().max() > 0
    maps[role][:] = -1
    value = WarpedLabelDiceLoss()(*maps, ddf, 3)
    value.backward()
    assert value.item() == 0 and torch.isfinite(ddf.grad).all()


def test_other_values_are_background() -> None:
    moving, fixed, ddf = make((1, 8, 9), (8, 9), 3, torch.int16)
    expected = by_definition(*(label * (label < 3) for label in (moving, fixed)), ddf, 2).item()
    assert WarpedLabelDiceLoss()(moving, fixed, ddf, 2).item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    moving, fixed, ddf = make((1, 8, 9), (8, 9), 3)
    half = ddf.bfloat16().requires_grad_()
    value = WarpedLabelDiceLoss()(moving, fixed, half, 3)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_definition(moving, fixed, half.detach().float(), 3).item(), rel=1e-5)
    value.backward()
    assert half.grad.abs().max() > 0


def test_descent_registers() -> None:
    grid = torch.from_numpy(np.indices((16, 18))).float()
    moving, fixed = (((grid - c).square().sum(0) < 16)[None, None].byte() for c in (7, 9))
    shift = torch.zeros(1, 2, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.1)
    values = []
    for _ in range(40):
        loss = WarpedLabelDiceLoss()(moving, fixed, shift.expand(-1, -1, 16, 18), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.3 and values[-1] < 0.1
    np.testing.assert_allclose(shift.detach().flatten(), -2, atol=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"smooth_nr": 0.0}, r"smooth_nr must be positive, got 0\.0"), ({"smooth_dr": -1}, r"smooth_dr must be.*got -1")],
)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarpedLabelDiceLoss(**arguments)


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 1, 4, 4), (1, 1, 4, 4), (1, 3, 4, 4)),
        ((1, 1, 4, 4), (1, 1, 4, 5), (1, 2, 4, 4)),
        ((2, 1, 4, 4), (1, 1, 4, 4), (1, 2, 4, 4)),
        ((1, 2, 4, 4), (1, 1, 4, 4), (1, 2, 4, 4)),
        ((1, 1, 4, 4, 4), (1, 1, 4, 4), (1, 2, 4, 4)),
        ((1, 1, 4), (1, 1, 4), (1, 1, 4)),
    ],
)
def test_ill_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"the label maps must be"):
        WarpedLabelDiceLoss()(*(torch.zeros(shape) for shape in shapes), 2)


def test_no_labels() -> None:
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        WarpedLabelDiceLoss()(*make((1, 4, 4), (4, 4), 2), 0)
