# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from monai_sacb.losses import FoldPenaltyLoss
from monai_sacb.metrics import compute_folds

# a matrix A: u(x) = A x has the determinant det(I + A) everywhere
MATRICES = [
    [[0.1, 0.3], [-0.2, -0.7]],
    [[-2.0, 0.0], [0.0, 0.5]],
    [[0.0, 0.0], [0.0, 0.0]],
    [[-1.6, 0.1, 0.0], [0.3, 0.2, -0.4], [0.0, 0.5, -0.1]],
    [[-0.9, 0.0, 0.2], [0.0, 0.0, 0.1], [0.1, 0.0, 0.3]],
    [[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]],  # two axes change places
]

ILL_ARGUMENTS = [
    ({"margin": -0.1}, r"margin must be a finite number of at least 0, got -0\.1"),
    ({"margin": float("nan")}, "margin must be a finite number of at least 0, got nan"),
    ({"margin": "wide"}, "margin must be a finite number of at least 0, got 'wide'"),
    ({"margin": True}, "margin must be a finite number of at least 0, got True"),
    ({"power": 0.5}, r"power must be a finite number of at least 1, got 0\.5"),
    ({"power": float("inf")}, "power must be a finite number of at least 1, got inf"),
    ({"reduction": "median"}, "median"),
]


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("matrix", MATRICES)
def test_linear_maps(matrix: list[list[float]], margin: float, power: float) -> None:
    dims = len(matrix)
    points = np.indices((4, 5, 3)[:dims]).astype(float)
    ddf = torch.from_numpy(np.einsum("ij,j...->i...", np.array(matrix), points))[None]
    expected = max(margin - np.linalg.det(np.eye(dims) + np.array(matrix)), 0.0) ** power
    assert FoldPenaltyLoss(margin, power)(ddf).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # a translation changes nothing
    assert FoldPenaltyLoss(margin, power)(ddf + 7.0).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (2, 3, 4, 3, 5)])
def test_is_the_gradient_within_the_cell(shape: tuple[int, ...]) -> None:
    """The derivatives, by autograd, of linear interpolation at the corners of every cell."""
    ddf, dims = noise(shape), shape[1]
    found = FoldPenaltyLoss(1.0, 1.0, reduction="none")(ddf)
    corners = [c for c in np.ndindex(*[2] * dims) if sum(c) % 2 == 0]
    assert found.shape == (2, len(corners), *(n - 1 for n in shape[2:]))
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, cell = int(rng.integers(2)), [int(rng.integers(n - 1)) for n in shape[2:]]
        box = ddf[image][(slice(None), *[slice(i, i + 2) for i in cell])]
        for number, corner in enumerate(corners):

            def place(t: torch.Tensor, box: torch.Tensor = box) -> torch.Tensor:
                values = box
                for axis in range(dims):
                    values = values[:, 0] * (1 - t[axis]) + values[:, 1] * t[axis]
                return values + t

            matrix = torch.autograd.functional.jacobian(place, torch.tensor(corner, dtype=torch.float64))
            expected = max(1.0 - torch.linalg.det(matrix).item(), 0.0)
            assert found[image, number][tuple(cell)].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", [(3, 2, 6, 5), (2, 3, 4, 5, 3)])
def test_reductions_and_batch(shape: tuple[int, ...]) -> None:
    ddf = noise(shape)
    none = FoldPenaltyLoss(reduction="none")(ddf)
    assert none.min() == 0 and none.max() > 0.1
    torch.testing.assert_close(FoldPenaltyLoss()(ddf), none.mean())
    torch.testing.assert_close(FoldPenaltyLoss(reduction="sum")(ddf), none.sum())
    alone = torch.cat([FoldPenaltyLoss(reduction="none")(one) for one in ddf.split(1)])
    assert torch.equal(alone, none)


@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (1, 3, 3, 4, 2)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(FoldPenaltyLoss(0.9), (noise(shape).requires_grad_(),))


@pytest.mark.parametrize("shape", [(1, 2, 16, 18), (1, 3, 10, 9, 11)])
def test_descent_unfolds(shape: tuple[int, ...]) -> None:
    ddf = (0.5 * noise(shape, torch.float32)).requires_grad_()
    optimizer = torch.optim.Adam([ddf], 0.03)
    before, start = compute_folds(ddf.detach()).item(), FoldPenaltyLoss()(ddf).item()
    for _ in range(150):
        optimizer.zero_grad()
        FoldPenaltyLoss()(ddf).backward()
        optimizer.step()
    assert FoldPenaltyLoss()(ddf).item() < 0.02 * start
    # the count is of other differences, which tell a little more
    assert before > 2 and compute_folds(ddf.detach()).item() < 0.15 * before


def test_half_precision_is_computed_in_single() -> None:
    ddf = noise((1, 3, 5, 6, 7)).bfloat16().requires_grad_()
    value = FoldPenaltyLoss()(ddf)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(FoldPenaltyLoss()(ddf.double()).item(), rel=1e-5)
    value.backward()
    assert ddf.grad is not None and ddf.grad.dtype == torch.bfloat16 and ddf.grad.abs().max() > 0


@pytest.mark.parametrize(("arguments", "message"), ILL_ARGUMENTS)
def test_ill_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldPenaltyLoss(**arguments)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 4), (1, 3, 4, 4), (1, 1, 4), (1, 3, 4, 1, 4), (2, 2, 1, 4)])
def test_ill_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"at least 2 voxels.*got shape \[{', '.join(map(str, shape))}\]"):
        FoldPenaltyLoss()(torch.zeros(shape))
