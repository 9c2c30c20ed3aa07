# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.inferers import match_contrast
from monai_sacb.networks.layers import warp

# spatial shape, batch, channels, type
TEST_CASES = [
    ((33, 40), 1, 1, torch.float32),
    ((24, 29), 3, 2, torch.float64),
    ((22, 25, 20), 1, 1, torch.float32),
    ((17, 16, 21), 2, 2, torch.float32),
]


def smooth_image(spatial: tuple[int, ...], batch: int = 1, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Intensities in [0, 1] without steps, with a background of zeros."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, *[size // 5 for size in spatial], generator=generator)
    image = F.interpolate(coarse, size=spatial, mode="bilinear" if len(spatial) == 2 else "trilinear")
    image = image * 0.9 + 0.1
    image[..., :3] = 0
    return image


def curve(values: torch.Tensor) -> torch.Tensor:
    """Another contrast: neither rising nor falling throughout; the background is bright."""
    return torch.where(values > 0, 0.2 + (values - 0.6).square() * 2, 0.9)


@pytest.mark.parametrize(("spatial", "batch", "channels", "dtype"), TEST_CASES)
def test_finds_the_curve(spatial: tuple[int, ...], batch: int, channels: int, dtype: torch.dtype) -> None:
    moving = smooth_image(spatial, batch, channels).to(dtype)
    # the first field is right, and is not zero
    ddf = torch.zeros(batch, len(spatial), *spatial, dtype=dtype)
    ddf[:, 0] = 2
    fixed = curve(warp(moving, ddf, padding_mode="border"))
    matched = match_contrast(moving, fixed, ddf)
    assert matched.shape == moving.shape and matched.dtype == dtype
    expected = curve(moving)
    error = (matched - expected).abs()
    assert error.mean() < 0.01 and error[moving == 0].max() < 0.02
    assert (moving - expected).abs().mean() > 0.2
    one_by_one = torch.cat([match_contrast(m[None], f[None], d[None]) for m, f, d in zip(moving, fixed, ddf)])
    assert torch.equal(one_by_one, matched)
    assert torch.equal(match_contrast(moving, fixed, ddf), matched)


def test_mean_of_what_is_found() -> None:
    """Of two tissues with one intensity in the moving image."""
    moving = torch.zeros(1, 1, 20, 20)
    moving[..., 10:] = 1
    fixed = torch.where(moving > 0, 0.2, 0.0)
    fixed[..., :5, 10:] = 0.6
    matched = match_contrast(moving, fixed, torch.zeros(1, 2, 20, 20))
    assert matched[moving > 0].unique().tolist() == pytest.approx([0.25 * 0.6 + 0.75 * 0.2], abs=1e-3)
    assert matched[moving == 0].abs().max() == 0


def test_only_inside_the_masks() -> None:
    moving = smooth_image((24, 26, 20))
    fixed = curve(moving)
    zeros = torch.zeros(1, 3, 24, 26, 20)
    inside = torch.zeros_like(moving)
    inside[:, :, 4:-4, 4:-4] = 1
    expected = match_contrast(moving, fixed, zeros, fixed_mask=inside)
    spoilt = torch.where(inside > 0, fixed, 7.0)
    for masks in ({"fixed_mask": inside}, {"moving_mask": inside}, {"moving_mask": inside, "fixed_mask": inside}):
        assert torch.equal(match_contrast(moving, spoilt, zeros, **masks), expected)
    assert not torch.allclose(match_contrast(moving, spoilt, zeros), expected, atol=0.1)
    # nothing to learn from
    assert torch.equal(match_contrast(moving, fixed, zeros, fixed_mask=torch.zeros_like(inside)), moving)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_image_that_is_not_finite_stays(value: float) -> None:
    moving, fixed = smooth_image((16, 18), channels=2), smooth_image((16, 18), channels=2, seed=1)
    expected = match_contrast(moving, fixed, torch.zeros(1, 2, 16, 18))
    moving[0, 0, 5, 6] = value
    matched = match_contrast(moving, fixed, torch.zeros(1, 2, 16, 18))
    torch.testing.assert_close(matched[:, 0], moving[:, 0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(matched[:, 1], expected[:, 1]) and not torch.equal(matched[:, 1], moving[:, 1])


def test_constant_image_stays() -> None:
    moving = torch.full((1, 1, 16, 16), 3.0)
    assert torch.equal(match_contrast(moving, smooth_image((16, 16)), torch.zeros(1, 2, 16, 16)), moving)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bins": 1}, "num_bins must be a whole number of at least 2, got 1"),
        ({"fixed": torch.rand(1, 1, 16, 15)}, r"must have one shape .* got \[1, 1, 16, 16\], \[1, 1, 16, 15\]"),
        ({"ddf": torch.zeros(1, 3, 16, 16)}, r"ddf must be .* \[1, 3, 16, 16\]"),
        ({"moving_mask": torch.ones(1, 2, 16, 16)}, r"moving_mask must be \[1, 1, 16, 16\].* got \[1, 2, 16, 16\]"),
        ({"fixed_mask": torch.ones(16, 16)}, r"fixed_mask must be \[1, 1, 16, 16\].* got \[16, 16\]"),
    ],
)
def test_ill_arguments(arguments: dict[str, Any], message: str) -> None:
    pair = {"moving": torch.rand(1, 1, 16, 16), "fixed": torch.rand(1, 1, 16, 16), "ddf": torch.zeros(1, 2, 16, 16)}
    with pytest.raises(ValueError, match=message):
        match_contrast(**{**pair, **arguments})
