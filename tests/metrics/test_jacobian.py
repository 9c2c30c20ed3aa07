# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from monai.data import MetaTensor

from monai_sacb.metrics import (
    FoldsMetric,
    NDVMetric,
    SDLogJMetric,
    compute_folds,
    compute_ndv,
    compute_sdlogj,
    jacobian_determinant,
)

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
    for function in (jacobian_determinant, compute_folds, compute_sdlogj, compute_ndv):
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


@pytest.mark.parametrize(("shape", "border"), [((2, 2, 7, 9), 2), ((2, 3, 6, 5, 7), 2), ((1, 3, 5, 4, 6), 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_sdlogj(shape: tuple[int, ...], border: int, masked: bool) -> None:
    ddf = field(shape)
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(1)) > 0.4
    values = compute_sdlogj(ddf, mask if masked else None, border)
    assert values.shape == (shape[0], 1) and values.dtype == torch.float64
    inner = tuple(slice(border, size - border) for size in shape[2:])
    for i in range(shape[0]):
        log = np.log(np.clip(by_numpy(ddf[i].numpy())[inner] + 3, 1e-9, 1e9))
        expected = np.std(log[mask[i, 0].numpy()[inner]] if masked else log)
        assert values[i].item() == pytest.approx(expected, rel=1e-9) and expected > 0.1


@pytest.mark.parametrize(
    ("scales", "expected"), [((1.0, 1.0, 1.0), 0.0), ((2.0, 1.0, 1.0), 0.0), ((-3.0, 2.0, 1.0), 0.0)]
)
def test_sdlogj_of_a_constant_determinant(scales: tuple[float, ...], expected: float) -> None:
    grid = torch.from_numpy(np.indices((6, 7, 8)).astype(float))
    ddf = ((torch.tensor(scales, dtype=torch.float64) - 1).view(3, 1, 1, 1) * grid)[None]
    assert compute_sdlogj(ddf).item() == pytest.approx(expected, abs=1e-9)


def test_sdlogj_of_two_halves() -> None:
    """Determinant 1 in one half and 3 in the other: the logarithms of 4 and 6, half their difference apart."""
    ddf = torch.zeros(1, 2, 9, 12, dtype=torch.float64)
    ddf[:, 1] = 2.0 * (torch.arange(12.0) - 6).clamp(min=0)
    # between the halves, the difference across the kink lies between them
    mask = torch.ones(1, 1, 9, 12)
    mask[..., 6] = 0
    mask[..., 2] = 0
    assert compute_sdlogj(ddf, mask).item() == pytest.approx(math.log(6 / 4) / 2, rel=1e-9)


def turned_volume(ddf: np.ndarray, mask: np.ndarray | None = None) -> float:
    """
    Non-diffeomorphic volume in per cent by cells, with numpy: one field ``(d, *spatial)``, cells one by one.

    A cell on the rim reaches half out of the grid, with the displacement of the border; of a division, each voxel is
    charged with the simplex at its own corner, and with one of the two in the middle of the cell in 3-D.
    """
    dims = len(ddf)
    padded = np.pad(ddf, [(0, 0)] + [(1, 1)] * dims, mode="edge")
    mapping = padded + np.indices(padded.shape[1:]) - 1
    charged = np.zeros([size + 2 for size in ddf.shape[1:]])
    for cell in np.ndindex(*[size + 1 for size in ddf.shape[1:]]):
        corners = {c: mapping[(slice(None), *np.add(cell, c))] for c in itertools.product((0, 1), repeat=dims)}
        simplices = [(c, [tuple(np.abs(np.subtract(c, axis))) for axis in np.eye(dims, dtype=int)]) for c in corners]
        if dims == 3:
            for parity in (0, 1):
                first, *others = (c for c in corners if sum(c) % 2 == parity)
                charge = (0, 0, 0) if parity == 0 else (1, 1, 1)
                others = [c for c in (first, *others) if c != charge]
                simplices.append((charge, others))
        for corner, others in simplices:
            after = np.linalg.det([corners[c] - corners[corner] for c in others])
            before = np.linalg.det(np.subtract(others, corner))
            turned = after * np.sign(before) < 0
            charged[tuple(np.add(cell, corner))] += turned * abs(after) / math.factorial(dims) / 2
    charged = charged[(slice(1, -1),) * dims]
    return 100 * (charged.mean() if mask is None else charged[mask].mean())


@pytest.mark.parametrize("shape", [(2, 2, 6, 5), (2, 3, 4, 3, 5)])
def test_ndv_by_cells(shape: tuple[int, ...]) -> None:
    ddf = field(shape) * torch.tensor([0.4, 1.5], dtype=torch.float64).view(2, *[1] * (len(shape) - 1))
    values = compute_ndv(ddf)
    assert values.shape == (2, 1) and 0.05 < values[0] < values[1]
    mask = torch.rand((2, 1, *shape[2:]), generator=torch.Generator().manual_seed(1)) > 0.4
    masked = compute_ndv(ddf, mask)
    for i in range(2):
        assert values[i].item() == pytest.approx(turned_volume(ddf[i].numpy()), rel=1e-9)
        assert masked[i].item() == pytest.approx(turned_volume(ddf[i].numpy(), mask[i, 0].numpy()), rel=1e-9)
    torch.testing.assert_close(compute_ndv(ddf.float()), values.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_ndv_of_simple_mappings(dims: int) -> None:
    shape = (40, 6, 5)[:dims]
    grid = torch.from_numpy(np.indices(shape).astype(float))[None]
    # neither a shift nor a stretch turns anything
    assert compute_ndv(torch.full_like(grid, 1.7)).item() == 0
    assert compute_ndv(2 * grid).item() == 0
    # mirrored along an axis and stretched by 3: all of it is turned, and three times as large; but for the rim, which
    # keeps its direction
    mirrored = torch.zeros_like(grid)
    mirrored[:, 0] = -4 * grid[:, 0]
    assert compute_ndv(mirrored).item() == pytest.approx(300 * 39 / 40)


def test_ndv_sees_what_central_differences_do_not() -> None:
    """Every second voxel moves by more than one voxel: the differences across two voxels are those of the identity."""
    ddf = torch.zeros(1, 3, 8, 8, 8)
    ddf[:, 0, 1::2] = 1.5
    assert compute_folds(ddf[:, :, :, 1:-1]).item() < 25 and (jacobian_determinant(ddf)[:, 1:-1] > 0).all()
    assert compute_ndv(ddf).item() > 10


def test_zero_determinant_has_no_volume() -> None:
    ddf = torch.zeros(1, 2, 6, 6)
    ddf[:, 0] = -torch.arange(6.0).view(6, 1)
    assert compute_folds(ddf).item() == 100.0 and compute_ndv(ddf).item() == 0


@pytest.mark.parametrize("function", [compute_sdlogj, compute_ndv])
def test_what_does_not_count(function) -> None:
    ddf = field((2, 3, 7, 6, 8), scale=0.3)
    ddf[:, :, 3, 3, 3] = float("nan")
    assert function(ddf).isnan().all()
    mask = torch.ones(2, 1, 7, 6, 8)
    mask[:, :, 2:5, 2:5, 2:5] = 0
    assert not function(ddf, mask).isnan().any() and (function(ddf, mask) > 0).all()
    mask[1] = 0
    assert function(ddf, mask)[1].isnan() and not function(ddf, mask)[0].isnan()
    for shape in ((2, 1, 7, 6, 7), (1, 1, 7, 6, 8), (2, 3, 7, 6, 8), (2, 7, 6, 8)):
        with pytest.raises(ValueError, match=r"mask must be \[2, 1, 7, 6, 8\].*got shape"):
            function(ddf, torch.ones(shape))


def test_thin_volumes_have_no_sdlogj() -> None:
    metric = SDLogJMetric()
    assert metric(field((2, 3, 8, 9, 4))).isnan().tolist() == [[True], [True]]
    assert metric(field((1, 3, 8, 9, 5))).item() > 0
    with pytest.raises(ValueError, match="got -1"):
        SDLogJMetric(border=-1)


@pytest.mark.parametrize("border", [-1, 3, 9])
def test_ill_border(border: int) -> None:
    with pytest.raises(ValueError, match=rf"leave a voxel of the grid \[7, 6, 8\] along each axis, got {border}"):
        compute_sdlogj(field((1, 3, 7, 6, 8)), border=border)


@pytest.mark.parametrize(("metric", "function"), [(SDLogJMetric(), compute_sdlogj), (NDVMetric(), compute_ndv)])
@pytest.mark.parametrize("as_list", [False, True])
def test_metrics_with_a_mask(metric, function, as_list: bool) -> None:
    ddf, mask = field((3, 3, 6, 7, 5)), (torch.arange(7) > 2).view(1, 1, 1, 7, 1).expand(3, 1, 6, 7, 5)
    metric.reset()
    metric(MetaTensor(ddf) if not as_list else list(ddf))
    torch.testing.assert_close(torch.as_tensor(metric.aggregate("none")), function(ddf))
    assert metric.aggregate().item() == pytest.approx(function(ddf).mean().item())
    metric.reset()
    metric(*(list(x) if as_list else MetaTensor(x) for x in (ddf, mask)))
    torch.testing.assert_close(torch.as_tensor(metric.aggregate("none")), function(ddf, mask))
    assert (function(ddf, mask) != function(ddf)).all()


def test_border_of_the_metric() -> None:
    ddf = field((1, 2, 8, 9))
    assert SDLogJMetric(border=0)(ddf).item() == compute_sdlogj(ddf, border=0).item() != compute_sdlogj(ddf).item()
