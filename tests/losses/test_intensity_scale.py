# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from monai.data import MetaTensor

from monai_sacb.losses import LNCCLoss, MINDSSCLoss
from monai_sacb.losses.intensity_scale import intensity_scale

SIZE = (12, 11, 13)
# largest absolute value, factor
TEST_CASES = [
    (0.0, 1.0),
    (1e-42, 1.0),
    (0.3, 1.0),
    (0.999, 1.0),
    (1.5, 0.5),
    (3000.0, 2.0**-12),
    (1e30, 2.0**-100),
    (3.4e38, 2.0**-128),
]
LOSSES = {"lncc": LNCCLoss(), "lncc_5": LNCCLoss(5), "mind": MINDSSCLoss()}


def noise(shape: tuple[int, ...] = (2, 1, *SIZE)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def one_voxel(value: float) -> torch.Tensor:
    image = torch.zeros(2, 1, *SIZE)
    image[:, :, 6, 5, 7] = value
    return image


# a moving and a fixed image each, in a column
IMAGES = {
    "constant": torch.full((2, 1, *SIZE), 3.0),
    "constant of 1e30": torch.full((2, 1, *SIZE), 1e30),
    "empty": torch.zeros(2, 1, *SIZE),
    "one voxel": one_voxel(1.0),
    "one voxel of 1e30": one_voxel(1e30),
    "1e-30": noise() * 1e-30,
    "denormal": noise() * 1e-42,
    "1e10": noise() * 1e10,
    "1e30": noise() * 1e30,
    "largest": noise() * 3.3e38,
    "both signs": noise() * 3.3e38 * torch.where(noise() > 0.5, 1, -1),
    "offset of 3000": noise() + 3000,
    "offset of 1e30": noise() * 1e26 + 1e30,
    "negative": -1000 * noise() - 5,
    "negative of 1e30": -1e30 * noise() - 1e29,
    "one of the two": noise() * torch.tensor([1.0, 1e30]).view(2, 1, 1, 1, 1),
    "half flat": torch.where(torch.arange(SIZE[-1]) < 6, 1e28, noise() * 1e30),
}


def value_and_gradients(loss: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    pred, target = (image.clone().requires_grad_() for image in images.split(1))
    value = loss(pred, target)
    return value, list(torch.autograd.grad(value, (pred, target)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("largest", "factor"), TEST_CASES)
def test_factor(largest: float, factor: float, sign: int) -> None:
    image = torch.stack([sign * largest * noise((1, *SIZE)) for _ in range(2)])
    image[:, :, 2, 3, 4] = sign * largest
    image[1] = 0
    scale = intensity_scale(image, [1, 2, 3, 4])
    assert scale.dtype == torch.float32 and scale.flatten().tolist() == [factor, 1.0]
    assert (image * scale).abs().max() == pytest.approx(largest * factor)
    # exact, for all that does not vanish
    assert torch.equal((image * scale).double(), image.double() * factor)
    assert intensity_scale(image.double(), [2, 3, 4]).dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", IMAGES)
def test_finite(kind: str, name: str) -> None:
    value, gradients = value_and_gradients(LOSSES[name], IMAGES[kind])
    assert math.isfinite(value) and -1 <= value <= 1
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    descriptor = LOSSES[name](IMAGES[kind][:1], IMAGES[kind][:1].flip(2))
    assert math.isfinite(descriptor)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1e6, 1e10, 1e18, 1e30, 3.3e38])
def test_the_size_of_intensities_does_not_matter(factor: float, name: str) -> None:
    expected, slopes = value_and_gradients(LOSSES[name], 1e3 * noise())
    value, gradients = value_and_gradients(LOSSES[name], factor * noise())
    assert abs(expected) > 0.01 and value.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, slope in zip(gradients, slopes):
        assert slope.abs().max() > 0
        # near the largest number there is, gradients are as small as numbers get
        tolerance = 1e-3 if factor < 1e38 else 0.1
        gradient = gradient.double() * (factor / 1e3)
        assert (gradient - slope).abs().max() < tolerance * slope.abs().max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e30), (torch.float16, 6e4), (torch.float32, 1e30)])
def test_half_precision(dtype: torch.dtype, factor: float, autocast: torch.dtype | None, name: str) -> None:
    images = (factor * noise()).to(dtype)
    expected = LOSSES[name](*(images.double() / factor * 1e3).split(1))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value, gradients = value_and_gradients(LOSSES[name], images)
    assert value.dtype == torch.float32 and abs(expected) > 0.01
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert all(torch.isfinite(gradient).all() and gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(broken: float, name: str) -> None:
    images = noise()
    images[0, 0, 6, 5, 7] = broken
    assert not math.isfinite(LOSSES[name](*images.split(1)))


@pytest.mark.parametrize("name", LOSSES)
def test_images_with_metadata(name: str) -> None:
    images = 1e30 * noise()
    value = LOSSES[name](*(MetaTensor(image) for image in images.split(1)))
    assert float(value) == float(LOSSES[name](*images.split(1))) != 0
