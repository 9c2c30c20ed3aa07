# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai.losses import BendingEnergyLoss, DiffusionLoss

from monai_sacb.losses import BendingPenaltyLoss, GradientPenaltyLoss

# shape, type
TEST_CASES = [
    ((1, 2, 7, 9), torch.float32),
    ((3, 2, 2, 5), torch.float64),
    ((2, 3, 5, 4, 6), torch.float32),
    ((1, 3, 2, 2, 2), torch.float64),
]

ILL_CASES = [(1, 2, 4, 4, 4), (1, 3, 4, 4), (1, 1, 4), (1, 4, 4, 4, 4, 4), (1, 3, 4, 1, 4), (2, 2, 1, 4), (3, 4, 4, 4)]


def field(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("shape", "dtype"), TEST_CASES)
def test_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ddf = field(shape, dtype)
    loss = GradientPenaltyLoss()(ddf)
    expected = np.mean([np.mean(np.diff(ddf.double().numpy(), axis=axis) ** 2) for axis in range(2, len(shape))])
    assert loss.shape == () and loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_parity(parity, relative_error) -> None:
    recorded = parity("losses")
    ddf = torch.from_numpy(recorded["flow"]).requires_grad_()
    loss = GradientPenaltyLoss()(ddf)
    assert loss.item() == pytest.approx(float(recorded["grad_l2"]), rel=1e-5)
    loss.backward()
    assert relative_error(ddf.grad, recorded["grad_l2_grad"]) < 1e-4


@pytest.mark.parametrize("dims", [2, 3])
def test_values(dims: int) -> None:
    """u = A x has derivatives A: the mean over axes of the mean over components of their squares."""
    matrix = torch.arange(1.0, dims * dims + 1).view(dims, dims)
    grid = torch.from_numpy(np.indices((5, 6, 7)[:dims])).float()
    ddf = torch.einsum("ij,j...->i...", matrix, grid)[None]
    expected = matrix.square().mean(0).mean().item()
    assert GradientPenaltyLoss()(ddf).item() == pytest.approx(expected, rel=1e-5)
    # a translation is free, and twice the field costs four times as much
    assert GradientPenaltyLoss()(ddf + 100.0).item() == pytest.approx(expected, rel=1e-3)
    assert GradientPenaltyLoss()(2 * ddf).item() == pytest.approx(4 * expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_about_a_third_of_diffusion_loss() -> None:
    """On a field whose forward and central differences are about equal."""
    grid = torch.from_numpy(np.indices((30, 32, 28))).float()
    ddf = torch.stack([(grid * step).sum(0).mul(0.05).sin() for step in (1.0, 2.0, 0.5)])[None]
    ratio = DiffusionLoss()(ddf).item() / GradientPenaltyLoss()(ddf).item()
    assert 2.5 < ratio < 3.5


def test_checkerboard_is_not_smooth() -> None:
    """Central differences would not see it."""
    grid = torch.from_numpy(np.indices((8, 8))).float()
    ddf = ((grid[:1] + grid[1:]) % 2).expand(2, 8, 8)[None]
    assert GradientPenaltyLoss()(ddf).item() == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 3, 3, 2, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(GradientPenaltyLoss(), (field(shape).requires_grad_(),))


def test_batch_equals_mean_of_one_by_one() -> None:
    ddf = field((3, 3, 4, 5, 6)) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
    alone = [GradientPenaltyLoss()(ddf[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(GradientPenaltyLoss()(ddf), torch.stack(alone).mean())
    assert alone[2] > 4 * alone[0]


def test_descent_smooths() -> None:
    ddf = field((1, 3, 8, 8, 8), torch.float32).requires_grad_()
    optimizer, losses = torch.optim.Adam([ddf], 0.05), []
    for _ in range(30):
        loss = GradientPenaltyLoss()(ddf)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and losses[0] > 1


@pytest.mark.parametrize("shape", ILL_CASES)
def test_ill_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"got shape \[{', '.join(map(str, shape))}\]"):
        GradientPenaltyLoss()(torch.zeros(shape))


# a spacing, as one value for each axis
SPACINGS = [(None, (1.0, 1.0, 1.0)), (2.5, (2.5, 2.5, 2.5)), ((1.0, 2.0, 0.5), (1.0, 2.0, 0.5))]


def quadratic(dims: int, sizes: tuple[float, ...]) -> tuple[torch.Tensor, np.ndarray]:
    """A field that is u(x) = x' H x / 2 in mm, in voxels; and the matrix H of every component."""
    hessians = np.random.default_rng(4).normal(size=(dims, dims, dims))
    hessians = hessians + hessians.transpose(0, 2, 1)
    step = np.array(sizes[:dims]).reshape(-1, *[1] * dims)
    points = np.indices((5, 6, 7)[:dims]) * step
    field_mm = np.einsum("ijk,j...,k...->i...", hessians, points, points) / 2
    return torch.from_numpy(field_mm / step)[None], hessians


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("spacing", "sizes"), SPACINGS)
def test_gradient_in_mm(dims: int, spacing: float | tuple[float, ...] | None, sizes: tuple[float, ...]) -> None:
    """u = A x in mm has derivatives A, whatever the voxels."""
    if isinstance(spacing, tuple):
        spacing = spacing[:dims]
    matrix = torch.arange(1.0, dims * dims + 1, dtype=torch.float64).view(dims, dims)
    step = torch.tensor(sizes[:dims], dtype=torch.float64).view(-1, *[1] * dims)
    ddf = (torch.einsum("ij,j...->i...", matrix, torch.from_numpy(np.indices((5, 6, 7)[:dims])) * step) / step)[None]
    assert GradientPenaltyLoss(spacing)(ddf).item() == pytest.approx(matrix.square().mean().item(), rel=1e-10)
    # affine motion bends nothing
    assert BendingPenaltyLoss(spacing)(ddf).item() < 1e-20


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("spacing", "sizes"), SPACINGS)
def test_bending_in_mm(dims: int, spacing: float | tuple[float, ...] | None, sizes: tuple[float, ...]) -> None:
    """Finite differences of a quadratic field are its derivatives."""
    if isinstance(spacing, tuple):
        spacing = list(spacing[:dims])
    ddf, hessians = quadratic(dims, sizes)
    expected = np.square(hessians).sum((1, 2))
    assert BendingPenaltyLoss(spacing)(ddf).item() == pytest.approx(expected.mean(), rel=1e-9)
    energies = BendingPenaltyLoss(spacing, reduction="none")(ddf)
    assert energies.shape == (1, dims, *(n - 2 for n in ddf.shape[2:]))
    np.testing.assert_allclose(energies.numpy(), np.broadcast_to(expected.reshape(1, -1, *[1] * dims), energies.shape))


@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (1, 3, 5, 4, 6)])
def test_isotropic_voxels(loss: type, shape: tuple[int, ...]) -> None:
    ddf = field(shape)
    in_voxels, in_mm = loss()(ddf), loss(4.0)(ddf)
    factor = 1.0 if loss is GradientPenaltyLoss else 16.0
    torch.testing.assert_close(in_voxels, factor * in_mm)
    torch.testing.assert_close(in_mm, loss([4.0] * shape[1])(ddf))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 3, 9), torch.float32), ((1, 3, 7, 3, 6), torch.float64), ((2, 3, 9, 8, 7), torch.float32)],
)
def test_bending_equals_monais(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, relative_error, recwarn: pytest.WarningsRecorder
) -> None:
    ours, theirs = (field(shape, dtype).requires_grad_() for _ in range(2))
    value = BendingPenaltyLoss(reduction=reduction)(ours)
    assert not [warning for warning in recwarn if "non-tuple sequence" in str(warning.message)]
    expected = BendingEnergyLoss(reduction=reduction)(theirs)
    assert value.shape == expected.shape and value.dtype == dtype
    assert relative_error(value, expected) < 1e-6
    seed = torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    value.backward(seed)
    expected.backward(seed)
    assert relative_error(ours.grad, theirs.grad) < 2e-6


@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
@pytest.mark.parametrize("spacing", [None, (0.5, 2.0, 3.0)])
def test_reductions(loss: type, spacing: tuple[float, ...] | None) -> None:
    ddf = field((2, 3, 5, 4, 6))
    none = loss(spacing, reduction="none")(ddf)
    assert none.shape[:2] == (2, 3) and none.min() > 0 and none.std() > 0
    torch.testing.assert_close(loss(spacing)(ddf), none.mean())
    torch.testing.assert_close(loss(spacing, reduction="sum")(ddf), none.sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 3, 3, 3, 4)])
@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
def test_gradcheck_in_mm(loss: type, shape: tuple[int, ...], reduction: str) -> None:
    spacing = (0.5, 2.0, 3.0)[: shape[1]]
    assert torch.autograd.gradcheck(loss(spacing, reduction=reduction), (field(shape).requires_grad_(),))


@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
def test_half_precision_is_computed_in_single(loss: type) -> None:
    ddf = (10 * field((1, 3, 8, 8, 8))).bfloat16()
    value = loss()(ddf.requires_grad_())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(loss()(ddf.double()).item(), rel=1e-5)
    value.backward()
    assert ddf.grad.dtype == torch.bfloat16 and ddf.grad.abs().max() > 0


@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": 0}, r"spacing must be .* got 0"),
        ({"spacing": -1.5}, r"spacing must be .* got -1\.5"),
        ({"spacing": [1.0, float("inf")]}, r"got \[1\.0, inf\]"),
        ({"spacing": (1.0, float("nan"), 1.0)}, r"got \(1\.0, nan, 1\.0\)"),
        ({"spacing": (1, 1, 1, 1)}, r"got \(1, 1, 1, 1\)"),
        ({"spacing": "mm"}, r"got 'mm'"),
        ({"spacing": []}, r"got \[\]"),
        ({"reduction": "median"}, r"median"),
    ],
)
def test_ill_arguments(loss: type, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**arguments)


@pytest.mark.parametrize("loss", [GradientPenaltyLoss, BendingPenaltyLoss])
def test_spacing_of_another_dimension(loss: type) -> None:
    with pytest.raises(ValueError, match=r"spacing \(1\.0, 2\.0\) has not one value for each of the 3 axes"):
        loss((1.0, 2.0))(torch.zeros(1, 3, 4, 4, 4))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 4), (1, 3, 4, 2, 4), (1, 1, 4), (2, 2, 2, 4), (3, 4, 4, 4)])
def test_ill_shapes_of_bending(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"at least 3 voxels.*got shape \[{', '.join(map(str, shape))}\]"):
        BendingPenaltyLoss()(torch.zeros(shape))
