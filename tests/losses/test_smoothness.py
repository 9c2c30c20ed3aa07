# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai.losses import DiffusionLoss

from monai_sacb.losses import GradientPenaltyLoss

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
