# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_sacb.data.foreground import background_value, foreground_mask


def ball(size: int, radius: float) -> torch.Tensor:
    axis = torch.arange(size) - (size - 1) / 2
    return ((axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) <= radius**2)[None]


def noise(size: int, scale: float) -> torch.Tensor:
    return scale * torch.rand(1, size, size, size, generator=torch.Generator().manual_seed(0))


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 3.0], 0.0), ([-1024.0, 900.0], -1024.0), ([-500.0, 0.0], -500.0), ([-3.0, 5.0], 0.0)],
)
def test_value_outside(values: list[float], expected: float) -> None:
    assert background_value(torch.tensor(values)) == expected


@pytest.mark.parametrize("least", [0.0, -2.0])
def test_stripped_image(least: float) -> None:
    brain = ball(24, 8)
    image = torch.where(brain, noise(24, 5) + 1, least)
    assert torch.equal(foreground_mask(image), brain)


def test_body_with_its_lungs_but_without_the_table() -> None:
    body, lung, table = ball(32, 12), ball(32, 5), torch.zeros(1, 32, 32, 32, dtype=torch.bool)
    table[:, 2:30, 1:3, 2:30] = True
    image = noise(32, 30) - 1000
    image[body | table] += 1020
    image[lung] = -800
    assert torch.equal(foreground_mask(image), body)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_noisy_background(scale: float) -> None:
    head = ball(32, 12)
    image = scale * (noise(32, 0.1) + head * (0.6 + noise(32, 0.4)))
    # a hot voxel does not count
    image[0, 16, 16, 16] = 1e4 * scale
    assert dice(foreground_mask(image), head) > 0.99


def test_image_without_background_is_all_or_most() -> None:
    image = 5 + torch.from_numpy(np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32))
    assert foreground_mask(image).float().mean() > 0.8


def test_never_empty() -> None:
    for image in (torch.zeros(1, 4, 5, 6), torch.full((1, 4, 5, 6), -1000.0)):
        assert bool(foreground_mask(image).all())


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6), (1, 0, 5, 6)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image must have shape \(1, D, H, W\), got \["):
        foreground_mask(torch.zeros(shape))
