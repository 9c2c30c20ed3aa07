# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai.data import MetaTensor

from monai_sacb.metrics import FoldsMetric, compute_folds, jacobian_determinant

# shape, type
TEST_CASES = [
    ((1, 2, 7, 9), torch.float32),
    ((3, 2, 2, 5), torch.float64),
    ((2, 3, 5, 4, 6), torch.float32),
    ((1, 3, 2, 2, 3), torch.float64),
]

ILL_CASES = [(1, 2, 4, 4, 4), (1, 3, 4, 4), (1, 1, 4), (1, 4, 4, 4, 4, 4), (1, 3, 4, 1, 4), (2, 2, 1, 4), (3, 4, 4, 4)]


def field(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def by_numpy(ddf: np.ndarray) -> np.ndarray:
    """Determinant of the gradient of p + ddf(p) of one field ``(d, *spatial)``."""
    mapping = np.indices(ddf.shape[1:]) + ddf
    gradient = np.stack([np.stack(np.gradient(component), -1) for component in mapping], -2)
    return np.linalg.det(gradient)


def folding(percent_of_rows: int) -> torch.Tensor:
    """A field of 10 rows whose mapping runs backwards along the second axis in some of them."""
    ddf = torch.zeros(1, 2, 10, 6)
    ddf[:, 1, : percent_of_rows // 10] = -2.0 * torch.arange(6.0)
    return ddf


@pytest.mark.parametrize(("shape", "dtype"), TEST_CASES)
def test_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ddf = field(shape, dtype)
    determinant = jacobian_determinant(ddf)
    assert determinant.shape == (shape[0], *shape[2:]) and determinant.dtype == dtype
    folds = compute_folds(ddf)
    assert folds.shape == (shape[0], 1)
    for i in range(shape[0]):
        expected = by_numpy(ddf[i].double().numpy())
        np.testing.assert_allclose(determinant[i].numpy(), expected, atol=1e-4 if dtype == torch.float32 else 1e-12)
        assert folds[i].item() == pytest.approx(100 * (expected <= 0).mean(), abs=1e-4)


def test_parity(parity, relative_error) -> None:
    recorded = parity("jacobian")
    ddf = torch.from_numpy(recorded["flow"])
    determinant = jacobian_determinant(ddf.double())[0]
    assert relative_error(determinant, recorded["jacobian_determinant"]) < 1e-5
    assert compute_folds(ddf).item() == pytest.approx(float(recorded["percent_nonpositive"]), abs=1e-4)
    log = (determinant + 3).clamp(1e-9, 1e9).log()
    assert log.std(unbiased=False).item() == pytest.approx(float(recorded["sd_log_j"]), rel=1e-5)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.0, 0.0], [0.0, 0.0]],
        [[0.5, -0.2], [0.1, -0.3]],
        [[-2.5, 0.0], [0.3, 0.1]],
        [[0.2, -0.1, 0.4], [0.0, -0.5, 0.3], [-0.2, 0.1, 0.1]],
        [[0.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]],
    ],
)
def test_linear_mapping(matrix: list[list[float]]) -> None:
    """p -> (1 + A) p has the determinant of 1 + A everywhere, at the border too."""
    a = np.array(matrix)
    grid = np.indices((5, 6, 7)[: len(a)]).astype(float)
    ddf = torch.from_numpy(np.einsum("ij,j...->i...", a, grid) + 4.0)[None]
    expected = np.linalg.det(np.eye(len(a)) + a)
    determinant = jacobian_determinant(ddf)
    torch.testing.assert_close(determinant, torch.full_like(determinant, expected), rtol=0, atol=1e-9)
    assert compute_folds(ddf).item() == (100.0 if expected <= 0 else 0.0)


def test_zero_counts_as_a_fold() -> None:
    """A mapping that collapses a line to a point cannot be undone."""
    ddf = torch.zeros(1, 2, 6, 6)
    ddf[:, 0] = -torch.arange(6.0).view(6, 1)
    assert jacobian_determinant(ddf).abs().max() == 0
    assert compute_folds(ddf).item() == 100.0


@pytest.mark.parametrize("shape", [(3, 2, 6, 7), (3, 3, 5, 6, 4)])
def test_batch_equals_one_by_one(shape: tuple[int, ...]) -> None:
    ddf = field(shape) * torch.tensor([0.1, 0.6, 2.0]).view(3, *[1] * (len(shape) - 1))
    determinant, folds = jacobian_determinant(ddf), compute_folds(ddf)
    for i in range(3):
        assert torch.equal(determinant[i : i + 1], jacobian_determinant(ddf[i : i + 1]))
        assert torch.equal(folds[i : i + 1], compute_folds(ddf[i : i + 1]))
    assert folds[0] < folds[1] < folds[2]


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 3, 3, 2, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(jacobian_determinant, (field(shape).requires_grad_(),))


@pytest.mark.parametrize("shape", ILL_CASES)
def test_ill_shapes(shape: tuple[int, ...]) -> None:
    for function in (jacobian_determinant, compute_folds):
        with pytest.raises(ValueError, match=rf"got shape \[{', '.join(map(str, shape))}\]"):
            function(torch.zeros(shape))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_metric(as_list: bool, meta: bool) -> None:
    metric = FoldsMetric()
    for rows in ((10, 30), (50,)):
        ddf = torch.cat([folding(r) for r in rows])
        ddf = MetaTensor(ddf) if meta else ddf
        values = metric(list(ddf) if as_list else ddf)
        torch.testing.assert_close(torch.as_tensor(values).flatten(), torch.tensor([float(r) for r in rows]))
    assert metric.aggregate().item() == pytest.approx(30.0)
    assert metric.aggregate("sum").item() == pytest.approx(90.0)
    assert metric.get_buffer().shape == (3, 1)
    metric.reset()
    metric(folding(70))
    assert metric.aggregate().item() == pytest.approx(70.0)


def test_metric_reduction() -> None:
    metric = FoldsMetric(reduction="none")
    metric(torch.cat([folding(20), folding(40)]))
    torch.testing.assert_close(metric.aggregate(), torch.tensor([[20.0], [40.0]]))


def test_metric_before_any_value() -> None:
    with pytest.raises(ValueError, match="nothing has been measured yet, the buffer is NoneType"):
        FoldsMetric().aggregate()


def test_field_that_is_no_number() -> None:
    ddf = torch.full((1, 3, 4, 4, 4), float("nan"))
    assert compute_folds(ddf).item() != 0
