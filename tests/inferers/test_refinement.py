# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_sacb.inferers import InstanceOptimization, refine_ddf
from monai_sacb.inferers.control_grid import ControlGrid, coarser_shape, resample_field, resample_image
from monai_sacb.inferers.masked_similarity import fill_outside
from monai_sacb.losses import FoldPenaltyLoss, GradientPenaltyLoss, LNCCLoss, MINDSSCLoss
from monai_sacb.metrics import compute_folds
from monai_sacb.networks.layers import warp

# spatial shape, batch, channels, type
TEST_CASES = [
    ((33, 30), 1, 1, torch.float32),
    ((24, 29), 3, 2, torch.float64),
    ((22, 25, 20), 1, 1, torch.float32),
    ((17, 16, 21), 2, 2, torch.float32),
]

ILL_ARGUMENTS = [
    ({"iterations": -1}, "iterations must be a whole number of at least 0, got -1"),
    ({"spacing": 0}, "spacing must be a whole number of at least 1, got 0"),
    ({"patience": 2.5}, r"patience must be a whole number of at least 1, got 2\.5"),
    ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0, got nan"),
    ({"regularization_weight": "much"}, "regularization_weight must be a finite number of at least 0, got 'much'"),
    ({"fold_weight": -1.0}, r"fold_weight must be a finite number of at least 0, got -1\.0"),
    ({"fold_weight": True}, "fold_weight must be a finite number of at least 0, got True"),
    ({"fold_margin": float("inf")}, "margin must be a finite number of at least 0, got inf"),
    ({"levels": []}, r"levels must be pairs .* got \[\]"),
    ({"levels": "4 2 1"}, r"levels must be pairs .* got '4 2 1'"),
    ({"levels": [4, 2, 1]}, r"levels must be pairs .* got \[4, 2, 1\]"),
    ({"levels": [(1, 0.5), (2, 0.5)]}, r"levels must be pairs .* got \[\(1, 0\.5\), \(2, 0\.5\)\]"),
    ({"levels": [(0, 1.0)]}, r"levels must be pairs .* got \[\(0, 1\.0\)\]"),
    ({"levels": [(1.5, 1.0)]}, r"levels must be pairs .* got \[\(1\.5, 1\.0\)\]"),
    ({"levels": [(1, 0.0)]}, r"levels must be pairs .* got \[\(1, 0\.0\)\]"),
    ({"contrast_gain": -0.1}, r"contrast_gain must be None or a finite number of at least 0, got -0\.1"),
    ({"contrast_gain": "much"}, "contrast_gain must be None or a finite number of at least 0, got 'much'"),
    ({"levels": [(1, float("nan"))]}, r"levels must be pairs .* got \[\(1, nan\)\]"),
]


def upsampled(shape: tuple[int, ...], spatial: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    coarse = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    return F.interpolate(coarse, size=spatial, mode=mode, align_corners=True).to(dtype)


def make_pair(
    spatial: tuple[int, ...], batch: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32, size: float = 1.5
) -> list[torch.Tensor]:
    """Moving image, fixed image, and the field by which the second was made from the first."""
    dims = len(spatial)
    true = size * upsampled((batch, dims, *[4] * dims), spatial, 1, dtype)
    moving = upsampled((batch, channels, *[11] * dims), spatial, 0, dtype).sigmoid()
    return [moving, warp(moving, true), true]


def inner_error(ddf: torch.Tensor, true: torch.Tensor) -> float:
    """Mean length of the error where the images are known."""
    inside = (slice(None), *[slice(3, -3)] * (ddf.dim() - 2))
    return (ddf - true).norm(dim=1)[inside].mean().item()


def objective(moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor, weight: float, folds: float) -> float:
    """The objective at full resolution, of the public parts."""
    value = LNCCLoss(5)(warp(moving, ddf), fixed) + weight * GradientPenaltyLoss()(ddf) + folds * FoldPenaltyLoss()(ddf)
    return value.item()


@pytest.mark.parametrize(("spatial", "batch", "channels", "dtype"), TEST_CASES)
def test_finds_the_deformation(spatial: tuple[int, ...], batch: int, channels: int, dtype: torch.dtype) -> None:
    moving, fixed, true = make_pair(spatial, batch, channels, dtype)
    ddf = refine_ddf(moving, fixed, torch.zeros_like(true), regularization_weight=0.05)
    assert ddf.shape == true.shape and ddf.dtype == dtype and not ddf.requires_grad
    assert inner_error(ddf, true) < 0.3 * inner_error(0 * true, true)
    assert compute_folds(ddf).max() < 0.5


@pytest.mark.parametrize("spatial", [(40, 44), (26, 24, 28)])
def test_finds_the_deformation_in_another_contrast(spatial: tuple[int, ...]) -> None:
    moving, fixed, true = make_pair(spatial)
    ddf = refine_ddf(
        moving, 1 - fixed, 0 * true, similarity=MINDSSCLoss(radius=1, dilation=1), regularization_weight=0.02
    )
    assert inner_error(ddf, true) < 0.4 * inner_error(0 * true, true)


@pytest.mark.parametrize("spatial", [(40, 44), (26, 24, 28)])
def test_matched_contrast_joins_where_it_helps(spatial: tuple[int, ...]) -> None:
    """Local correlation knows straight lines; this contrast rises and falls."""
    moving, fixed, true = make_pair(spatial, size=0.7)
    other = (2 * fixed - 0.9).abs()
    kwargs = {"regularization_weight": 0.05, "iterations": 60}
    errors = {
        gain: inner_error(refine_ddf(moving, other, 0 * true, contrast_gain=gain, **kwargs), true)
        for gain in (None, 0.02)
    }
    assert errors[0.02] < 0.8 * errors[None] and errors[0.02] < 0.6 * inner_error(0 * true, true)
    # no gain is large enough
    never, rarely = (refine_ddf(moving, other, 0 * true, contrast_gain=gain, **kwargs) for gain in (None, 1e9))
    assert torch.equal(never, rarely)


def test_coarse_levels_reach_farther() -> None:
    """A shift of many voxels, of an image with detail that misleads the finest level alone."""
    generator = torch.Generator().manual_seed(0)
    wide = F.avg_pool2d(torch.rand(1, 1, 90, 90, generator=generator), 3, 1)
    moving, fixed = wide[..., 8:72, 8:72], wide[..., 14:78, 8:72]
    true = torch.tensor([6.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    kwargs = {"similarity": LNCCLoss(9), "regularization_weight": 0.5, "iterations": 150}
    coarse = refine_ddf(moving, fixed, torch.zeros(1, 2, 64, 64), **kwargs)
    fine = refine_ddf(moving, fixed, torch.zeros(1, 2, 64, 64), levels=[(1, 1.0)], **kwargs)
    inside = (slice(None), slice(None), slice(8, -12), slice(4, -4))
    error = [(ddf - true)[inside].norm(dim=1).mean().item() for ddf in (coarse, fine)]
    assert error[0] < 1.0 and error[0] < 0.5 * error[1]


@pytest.mark.parametrize("iterations", [1, 7, 30])
@pytest.mark.parametrize("start", ["zeros", "true", "smooth", "rough", "folded"])
def test_never_worse_than_the_start(start: str, iterations: int) -> None:
    moving, fixed, true = make_pair((21, 18, 16))
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(5))
    ddf = {
        "zeros": 0 * true,
        "true": true,
        "smooth": 0.7 * true,
        "rough": true + 0.2 * noise,
        "folded": true + 1.5 * noise,
    }[start]
    for weight, folds, rate in ((0.36, 10.0, 0.5), (0.0, 0.0, 0.5), (0.36, 10.0, 50.0), (5.0, 0.0, 0.5)):
        refined = refine_ddf(
            moving,
            fixed,
            ddf,
            iterations=iterations,
            regularization_weight=weight,
            fold_weight=folds,
            learning_rate=rate,
        )
        before = objective(moving, fixed, ddf, weight, folds)
        after = objective(moving, fixed, refined, weight, folds)
        assert torch.equal(refined, ddf) or after < before


def test_a_start_that_nothing_improves_comes_back() -> None:
    moving, fixed, true = make_pair((20, 22))
    assert torch.equal(refine_ddf(moving, fixed, true, learning_rate=0.0), true)
    # identical images, and no displacement
    assert torch.equal(refine_ddf(moving, moving, 0 * true), 0 * true)
    assert torch.equal(refine_ddf(moving, fixed, true, iterations=0), true)


def test_fold_penalty_unfolds() -> None:
    """Two images that have nothing to do with each other, and no regularization."""
    images = [torch.rand(1, 1, 20, 22, 18, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    start = torch.zeros(1, 3, 20, 22, 18)
    free, kept = (refine_ddf(*images, start, regularization_weight=0.0, fold_weight=weight) for weight in (0.0, 100.0))
    assert compute_folds(free).item() > 1 and compute_folds(kept).item() < 0.1 * compute_folds(free).item()
    assert kept.abs().max() > 0.3


@pytest.mark.parametrize("spatial", [(40, 36), (24, 22, 26)])
@pytest.mark.parametrize("similarity", [None, MINDSSCLoss(1, 1)])
@pytest.mark.parametrize("which", ["moving", "fixed", "both"])
def test_what_lies_outside_the_masks_plays_no_part(
    spatial: tuple[int, ...], similarity: Callable[..., torch.Tensor] | None, which: str
) -> None:
    moving, fixed, true = make_pair(spatial, batch=2, size=0.8)
    inside = (slice(None), slice(None), *[slice(4, -6)] * len(spatial))
    masks, images = {}, {"moving": moving, "fixed": fixed}
    changed = {}
    for name, image in images.items():
        changed[name] = image
        if which in (name, "both"):
            masks[f"{name}_mask"] = torch.zeros_like(image).index_fill_(0, torch.tensor([0, 1]), 0.0)
            masks[f"{name}_mask"][inside] = 1
            other = 5 * torch.rand(image.shape, generator=torch.Generator().manual_seed(9))
            other.view(-1)[0] = torch.nan
            changed[name] = torch.where(masks[f"{name}_mask"] > 0, image, other)
    kwargs = {"similarity": similarity, "iterations": 40, "regularization_weight": 0.2, **masks}
    ddf = refine_ddf(moving, fixed, 0 * true, **kwargs)
    assert torch.equal(refine_ddf(changed["moving"], changed["fixed"], 0 * true, **kwargs), ddf)
    assert (ddf - true)[inside].norm(dim=1).mean() < 0.8 * true[inside].norm(dim=1).mean()
    # and without masks it does
    del kwargs["moving_mask" if which != "fixed" else "fixed_mask"]
    if which != "both":
        clean = changed[which].nan_to_num()
        pair = (clean, fixed) if which == "moving" else (moving, clean)
        assert not torch.equal(refine_ddf(*pair, 0 * true, **kwargs), ddf)


def test_masks_leave_the_penalties_alone() -> None:
    """A start that folds far outside the mask unfolds there."""
    moving, fixed, true = make_pair((40, 40))
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., :12] = 1
    ddf = torch.zeros_like(true)
    ddf[..., 16:24, 30:33] = 6.0
    assert compute_folds(ddf) > 1
    refined = refine_ddf(moving, fixed, ddf, iterations=60, moving_mask=mask, fixed_mask=mask)
    assert compute_folds(refined) < 0.5 and refined[..., 24:].abs().max() < 5


def test_masks_everywhere_change_nothing() -> None:
    """The same descent as without masks."""
    moving, fixed, true = make_pair((24, 26, 22))
    mask = torch.ones_like(moving)
    plain = refine_ddf(moving, fixed, 0 * true, iterations=20)
    masked = refine_ddf(moving, fixed, 0 * true, iterations=20, fixed_mask=mask)
    # sums in another order, and steps of Adam, which has no small ones
    assert (masked - plain).abs().mean() < 1e-3 * plain.abs().mean()


def test_fill_outside() -> None:
    image = torch.rand(2, 3, 13, 10, 7)
    mask = (torch.rand(2, 1, 13, 10, 7) < 0.05).float()
    filled = fill_outside(image, mask)
    inside = (mask > 0).expand_as(image)
    assert torch.equal(filled[inside], image[inside])
    for one, original, known in zip(filled.flatten(0, 1), image.flatten(0, 1), inside.flatten(0, 1)):
        assert original[known].min() - 1e-6 <= one.min() and one.max() <= original[known].max() + 1e-6
    # a constant goes on, and so does about a slope
    assert torch.allclose(fill_outside(torch.full_like(image, 0.3), mask), torch.tensor(0.3))
    slope = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    holes = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    assert (fill_outside(slope, holes) - slope).abs().mean() < 0.02


@pytest.mark.parametrize("spatial", [(21, 26), (17, 14, 18)])
def test_batch_equals_one_by_one(spatial: tuple[int, ...]) -> None:
    moving, fixed, true = make_pair(spatial, batch=3)
    mask = (torch.rand(3, 1, *spatial, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    together = refine_ddf(moving, fixed, 0.5 * true, iterations=12, fixed_mask=mask)
    for i in range(3):
        one = slice(i, i + 1)
        alone = refine_ddf(moving[one], fixed[one], 0.5 * true[one], iterations=12, fixed_mask=mask[one])
        assert torch.equal(together[one], alone)
    assert torch.equal(refine_ddf(moving, fixed, 0.5 * true, iterations=12, fixed_mask=mask), together)


@pytest.mark.parametrize("spatial", [(5, 5), (5, 40), (5, 6, 7), (9, 5, 31), (13, 64)])
@pytest.mark.parametrize("spacing", [1, 2, 7])
def test_any_size(spatial: tuple[int, ...], spacing: int) -> None:
    moving, fixed, true = make_pair(spatial, size=0.5)
    ddf = refine_ddf(moving, fixed, 0 * true, iterations=15, spacing=spacing, regularization_weight=0.05)
    assert ddf.shape == true.shape and bool(ddf.isfinite().all())
    before, after = (objective(moving, fixed, x, 0.05, 10.0) for x in (0 * true, ddf))
    # a point for every voxel of a tiny image may find nothing better
    assert after < before or (spacing == 1 and torch.equal(ddf, 0 * true))


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_within_the_context_of_the_caller(context: Callable[[], Any]) -> None:
    moving, fixed, true = make_pair((16, 18, 15))
    expected = refine_ddf(moving, fixed, 0 * true, iterations=5)
    with context(), torch.autocast("cpu", torch.bfloat16):
        images = [t.clone() for t in (moving, fixed, 0 * true)]
        assert torch.equal(refine_ddf(*images, iterations=5), expected)
    assert refine_ddf(moving, fixed, (0 * true).bfloat16(), iterations=5).dtype == torch.bfloat16


def test_number_of_steps() -> None:
    moving, fixed, true = make_pair((40, 36))
    shapes = []

    def similarity(warped: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(warped.shape[2:]) if warped.requires_grad else None)
        return (warped - target).square().mean()

    for iterations in (1, 2, 3, 10, 23):
        shapes.clear()
        refine_ddf(moving, fixed, 0 * true, similarity, iterations=iterations, levels=[[2, 3], [1, 5]])
        assert sum(shape is not None for shape in shapes) == iterations
        assert sum(shape == (20, 18) for shape in shapes) == round(iterations * 3 / 8)
        assert set(shapes) <= {None, (20, 18), (40, 36)}


@pytest.mark.parametrize(("arguments", "message"), ILL_ARGUMENTS)
def test_ill_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_ddf(*make_pair((8, 9)), **arguments)
    with pytest.raises(ValueError, match=message):
        InstanceOptimization(**arguments)


@pytest.mark.parametrize("name", ["moving_mask", "fixed_mask"])
def test_ill_masks(name: str) -> None:
    moving, fixed, true = make_pair((12, 13), batch=2)
    with pytest.raises(ValueError, match=rf"{name} must be \[2, 1, 12, 13\].* got \[2, 1, 12, 12\]"):
        refine_ddf(moving, fixed, true, **{name: torch.ones(2, 1, 12, 12)})
    empty = torch.ones(2, 1, 12, 13)
    empty[1] = 0
    with pytest.raises(ValueError, match=f"{name} must have voxels that are not zero for each image"):
        refine_ddf(moving, fixed, true, **{name: empty})
    with pytest.raises(ValueError, match="with masks, the similarity must have an attribute 'reduction'"):
        refine_ddf(moving, fixed, true, lambda a, b: (a - b).mean(), **{name: torch.ones(2, 1, 12, 13)})


def test_ill_images() -> None:
    moving, fixed, true = make_pair((12, 13))
    one, other = torch.zeros(2, 1, 1, 12, 13).unbind()
    one[..., :5], other[..., 8:] = 1, 1
    with pytest.raises(ValueError, match=r"must be finite, got inf: .* the masks have nothing in common"):
        refine_ddf(moving, fixed, 0 * true, moving_mask=one, fixed_mask=other)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        refine_ddf(moving * torch.nan, fixed, true)
    for value in (torch.inf, -torch.inf):
        spoilt = moving.clone()
        spoilt[0, 0, 6, 6] = value
        for pair in ((spoilt, fixed), (moving, spoilt)):
            with pytest.raises(ValueError, match="must be finite, got nan: an image or the field is not"):
                refine_ddf(*pair, 0 * true)
    with pytest.raises(ValueError, match="at least 5 voxels along every axis"):
        refine_ddf(moving[..., :4], fixed[..., :4], true[..., :4])


def test_optimization_with_masks() -> None:
    moving, fixed, true = make_pair((16, 18, 15), batch=2)
    mask = torch.ones_like(moving)
    mask[..., :5] = 0
    assert torch.equal(
        InstanceOptimization(iterations=6)(moving, fixed, 0 * true, moving_mask=mask),
        refine_ddf(moving, fixed, 0 * true, iterations=6, moving_mask=mask),
    )


def test_parameters_of_the_similarity_are_left_alone() -> None:
    moving, fixed, true = make_pair((20, 22))
    torch.manual_seed(0)
    features = torch.nn.Conv2d(1, 2, 3)
    ddf = refine_ddf(
        moving, fixed, 0 * true, lambda a, b: (features(a) - features(b)).square().mean(), regularization_weight=0.0
    )
    assert features.weight.grad is None and ddf.abs().max() > 0.05


def test_patience_stops() -> None:
    moving, fixed, true = make_pair((20, 22))
    calls = []

    def similarity(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (warped - fixed).square().mean() + len(calls)

    refine_ddf(moving, fixed, 0 * true, similarity, iterations=40, levels=[(1, 1.0)], patience=4)
    # the start; then the first to the fifth field, none of which is better; and the result
    assert len(calls) == 7


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("similarity", "factor", "offset"),
    [(None, 1e10, 0.0), (None, 1e30, 0.0), (None, 3e38, 0.0), (None, -1e30, 0.0), (MINDSSCLoss(1, 1), 1e30, 1e30)],
)
def test_intensities_of_any_size(similarity: Any, factor: float, offset: float, autocast: torch.dtype | None) -> None:
    moving, fixed, true = make_pair((26, 24, 28), 1, 1, torch.float32)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        refined = refine_ddf(factor * moving + offset, factor * fixed + offset, 0 * true, similarity, iterations=30)
    assert refined.dtype == torch.float32 and torch.isfinite(refined).all()
    assert inner_error(refined, true) < 0.6 * inner_error(0 * true, true)


@pytest.mark.parametrize("value", [0.0, 3.0, 3000.0, -1e30, 1e-30])
@pytest.mark.parametrize("similarity", [None, MINDSSCLoss(1, 1)])
def test_images_without_contrast(similarity: Any, value: float) -> None:
    """Nothing to gain: the start comes back, or one as near to it as the border of the image allows."""
    moving = torch.full((1, 1, 12, 11, 13), value)
    for fixed in (moving, torch.rand_like(moving)):
        start = 0.1 * upsampled((1, 3, 4, 4, 4), (12, 11, 13), 0, torch.float32)
        refined = refine_ddf(moving, fixed, start, similarity, iterations=5)
        assert torch.isfinite(refined).all() and (refined - start).abs().max() < 2
        assert refined.abs().max() > 0


def test_objective_that_is_not_finite_stops() -> None:
    moving, fixed, true = make_pair((20, 22))
    values = iter([1.0, 0.5, float("nan"), 2.0, 0.0])
    ddf = refine_ddf(moving, fixed, 0 * true, lambda warped, fixed: 0 * warped.sum() + next(values), levels=[(1, 1.0)])
    # the start, the first field, the second, after which there is no more, and the result, which is worse
    assert next(values) == 0.0
    assert torch.equal(ddf, 0 * true)


def test_own_regularization_and_its_weight() -> None:
    moving, fixed, true = make_pair((20, 22))
    free = refine_ddf(moving, fixed, 0 * true, regularization_weight=0.0)
    stiff = refine_ddf(
        moving, fixed, 0 * true, regularization=lambda ddf: ddf.square().mean(), regularization_weight=100.0
    )
    assert stiff.abs().max() < 0.1 * free.abs().max()


@pytest.mark.parametrize(
    ("moving", "fixed", "ddf", "message"),
    [
        ((1, 1, 8, 8), (1, 1, 8, 9), (1, 2, 8, 9), r"\[1, 1, 8, 8\], \[1, 1, 8, 9\] and \[1, 2, 8, 9\]"),
        ((1, 1, 8, 8), (1, 1, 8, 8), (1, 3, 8, 8), r"\[1, 3, 8, 8\]"),
        ((2, 1, 8, 8), (2, 1, 8, 8), (1, 2, 8, 8), r"\[1, 2, 8, 8\]"),
        ((1, 1, 8), (1, 1, 8), (1, 1, 8), r"\[1, 1, 8\]"),
    ],
)
def test_ill_shapes(moving: tuple[int, ...], fixed: tuple[int, ...], ddf: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_ddf(torch.zeros(moving), torch.zeros(fixed), torch.zeros(ddf))


def test_settings_are_the_fields_alone() -> None:
    moving, fixed, true = make_pair((20, 22))
    optimization = InstanceOptimization(iterations=5, spacing=3)
    optimization.note = "of the caller"  # type: ignore[attr-defined]
    assert len({optimization, InstanceOptimization()}) == 2
    expected = refine_ddf(moving, fixed, 0 * true, iterations=5, spacing=3)
    assert torch.equal(optimization(moving, fixed, 0 * true), expected)


@pytest.mark.parametrize(("spatial", "spacing"), [((11, 8), 2), ((9, 12, 6), 3), ((5, 7, 8), 1), ((6, 5), 9)])
def test_control_grid(spatial: tuple[int, ...], spacing: int) -> None:
    grid = ControlGrid(spatial, spacing, torch.float64)
    points = torch.rand(2, 3, *grid.shape, dtype=torch.float64)
    field = grid.field(points)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    torch.testing.assert_close(field, F.interpolate(points, size=spatial, mode=mode, align_corners=True))
    torch.testing.assert_close(grid.fit(field), points)
    # no other points are nearer to a field that is not of this kind
    other = torch.rand(2, 3, *spatial, dtype=torch.float64)
    best = grid.fit(other)
    assert (grid.field(best) - other).norm() <= (grid.field(best + 0.01 * (points - 0.5)) - other).norm()
    assert grid.steps.flatten().tolist() == pytest.approx([(n - 1) / (k - 1) for n, k in zip(spatial, grid.shape)])
    assert all(step <= spacing for step in grid.steps.flatten().tolist())


def test_resolutions() -> None:
    assert coarser_shape((80, 96, 81), 4) == [20, 24, 21] and coarser_shape((5, 20, 100), 4) == [5, 8, 25]
    assert coarser_shape((7, 9), 1) == [7, 9]
    # a linear field and a linear image are the same things on every grid
    matrix = np.array([[0.1, -0.2], [0.05, 0.3]])
    for size in ((20, 26), (41, 17)):
        ddf = torch.from_numpy(np.einsum("ij,j...->i...", matrix, np.indices((40, 50)).astype(float)))[None]
        coarse = resample_field(ddf, size)
        scale = torch.tensor([(n - 1) / (m - 1) for n, m in zip(size, (40, 50))], dtype=torch.float64).view(1, 2, 1, 1)
        places = torch.from_numpy(np.indices(size).astype(float))[None] / scale
        expected = torch.einsum("ij,bj...->bi...", torch.from_numpy(matrix), places) * scale
        torch.testing.assert_close(coarse, expected)
    image = torch.rand(1, 1, 64, 64)
    coarse = resample_image(image, (16, 16))
    assert coarse.std() < 0.4 * image.std() and coarse.mean().item() == pytest.approx(image.mean().item(), abs=0.02)
    assert torch.allclose(resample_image(torch.full((1, 2, 9, 40, 12), 0.7), (9, 10, 8)), torch.tensor(0.7))
