# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.layers import warp

# shape, window, constant, type
TEST_CASES = [
    ((1, 1, 12, 13), 9, 1e-5, torch.float32),
    ((2, 1, 10, 9, 11), 9, 1e-5, torch.float32),
    ((2, 3, 8, 7, 9), 5, 1e-3, torch.float64),
    ((3, 2, 9, 15), 3, 1e-5, torch.float64),
    # a window larger than the image
    ((1, 1, 4, 5, 3), 9, 1e-5, torch.float64),
    ((1, 1, 1, 20), 7, 1e-2, torch.float32),
    ((1, 2, 6, 7), 1, 1e-5, torch.float64),
]

ILL_CASES = [
    ({"kernel_size": 0}, r"kernel_size must be a positive odd number, got 0"),
    ({"kernel_size": 8}, r"kernel_size must be a positive odd number, got 8"),
    ({"kernel_size": -3}, r"kernel_size must be a positive odd number, got -3"),
    ({"smooth": 0.0}, r"smooth must be positive, got 0\.0"),
    ({"smooth": -1e-5}, r"smooth must be positive, got -1e-05"),
    ({"reduction": "median"}, r"median"),
]

# shapes of the two images, message
ILL_SHAPES = [
    ((1, 1, 8, 8), (1, 1, 8, 9), r"\[1, 1, 8, 8\] and \[1, 1, 8, 9\]"),
    ((2, 1, 8, 8), (1, 1, 8, 8), r"\[2, 1, 8, 8\] and \[1, 1, 8, 8\]"),
    ((1, 2, 8, 8, 8), (1, 1, 8, 8, 8), r"\[1, 2, 8, 8, 8\] and \[1, 1, 8, 8, 8\]"),
    ((1, 1, 8), (1, 1, 8), r"\[1, 1, 8\] and \[1, 1, 8\]"),
    ((1, 1, 4, 4, 4, 4), (1, 1, 4, 4, 4, 4), r"\[1, 1, 4, 4, 4, 4\]"),
]


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    """Two images in [0, 1] that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [first.to(dtype), (0.6 * first.square() + 0.4 * second).to(dtype)]


def by_definition(pred: torch.Tensor, target: torch.Tensor, window: int, smooth: float) -> torch.Tensor:
    """The map, with explicit windows: a convolution with ones, in float64, zeros outside."""
    dims = pred.dim() - 2
    conv = F.conv3d if dims == 3 else F.conv2d
    count = window**dims

    def total(x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(x.shape[1], 1, *[window] * dims, dtype=torch.float64)
        return conv(x, ones, padding=window // 2, groups=x.shape[1])

    p, t = pred.double(), target.double()
    cross = total(p * t) - total(p) * total(t) / count
    variance_p = total(p * p) - total(p) ** 2 / count
    variance_t = total(t * t) - total(t) ** 2 / count
    return -(cross**2) / (variance_p * variance_t + smooth)


@pytest.mark.parametrize(("shape", "window", "smooth", "dtype"), TEST_CASES)
def test_definition(shape: tuple[int, ...], window: int, smooth: float, dtype: torch.dtype, relative_error) -> None:
    pred, target = images(shape, dtype)
    expected = by_definition(pred, target, window, smooth)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        actual = LNCCLoss(window, smooth, reduction)(pred, target)
        assert actual.shape == value.shape and actual.dtype == dtype
        if window == 1:
            # without neighbours there is no correlation
            assert actual.abs().max() < 1e-6
        else:
            assert relative_error(actual, value) < tolerance
    if window > 1:
        assert -1 <= expected.mean() < -0.01


def test_parity(parity, relative_error) -> None:
    recorded = parity("losses")
    fixed, moving = torch.from_numpy(recorded["fixed"]), torch.from_numpy(recorded["moving"]).requires_grad_()
    loss = LNCCLoss()(moving, fixed)
    assert loss.item() == pytest.approx(float(recorded["ncc"]), rel=1e-5)
    loss.backward()
    assert relative_error(moving.grad, recorded["ncc_grad_moving"]) < 5e-4


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (1, 2, 3, 4, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    pred, target = (image.requires_grad_() for image in images(shape))
    assert torch.autograd.gradcheck(LNCCLoss(kernel_size=3, smooth=1e-2), (pred, target))


def test_gradient_of_the_definition(relative_error) -> None:
    pred, target = images((1, 1, 12, 11, 13), torch.float32)
    single, exact = pred.clone().requires_grad_(), pred.double().requires_grad_()
    LNCCLoss()(single, target).backward()
    by_definition(exact, target.double(), 9, 1e-5).mean().backward()
    assert relative_error(single.grad, exact.grad) < 5e-4


def test_values() -> None:
    image = images((1, 1, 14, 15, 13))[0]
    # an image correlates with itself, with its negative, and with any contrast; nothing with a constant
    loss = LNCCLoss(smooth=1e-12)
    same = loss(image, image).item()
    assert same == pytest.approx(-1, abs=1e-6)
    # brightness would matter at the border, where zeros come in
    for other in (0.2 * image, -0.7 * image):
        assert loss(image, other).item() == pytest.approx(same, abs=1e-6)
    inside = (slice(None), slice(None), *[slice(4, -4)] * 3)
    brighter = LNCCLoss(smooth=1e-12, reduction="none")(image, 0.5 * image + 0.3)[inside]
    torch.testing.assert_close(brighter, torch.full_like(brighter, -1.0), rtol=0, atol=1e-6)
    noise = images((1, 1, 14, 15, 13), seed=1)[0]
    centered = LNCCLoss(reduction="none")(image - 0.5, noise - 0.5)
    assert -0.02 < centered.mean() < 0


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_areas_without_contrast(value: float) -> None:
    pred = torch.full((1, 1, 20, 20), value, requires_grad=True)
    target = torch.full((1, 1, 20, 20), 0.3)
    loss = LNCCLoss(reduction="none")(pred, target)
    assert loss[..., 4:-4, 4:-4].abs().max() < 1e-2
    loss.mean().backward()
    assert torch.isfinite(pred.grad).all()
    # rounding noise in a flat area is no correlation
    noise = images((1, 1, 20, 20))
    flat = LNCCLoss(reduction="none")(*(1e-4 * image for image in noise))
    assert flat.abs().max() < 1e-2
    assert LNCCLoss()(*noise) < -0.3


def nearly_flat(level: float, contrast: float) -> list[torch.Tensor]:
    """A nearly flat image and one with contrast, in single precision."""
    generator = torch.Generator().manual_seed(0)
    flat, target = (torch.rand(1, 1, 24, 24, 24, generator=generator) for _ in range(2))
    return [level + contrast * flat, target]


@pytest.mark.parametrize("contrast", [0.0, 1e-6, 1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("level", [0.3, 0.9, 1.0])
def test_rounding_in_nearly_flat_areas(level: float, contrast: float) -> None:
    """Variances that rounding makes negative must not turn the sign."""
    pred, target = nearly_flat(level, contrast)
    exact = by_definition(pred, target, 9, 1e-5).float()
    loss = LNCCLoss(reduction="none")(pred, target)
    assert loss.max() <= 0 and loss.min() >= -1
    inside = (slice(None), slice(None), *[slice(4, -4)] * 3)
    assert (loss - exact)[inside].abs().mean() < 5e-3


@pytest.mark.parametrize("level", [0.9, 1.0])
def test_rounding_at_small_contrast(level: float) -> None:
    pred, target = nearly_flat(level, 1e-3)
    exact = by_definition(pred, target, 9, 1e-5).float()
    loss = LNCCLoss(reduction="none")(pred, target)
    inside = (slice(None), slice(None), *[slice(4, -4)] * 3)
    assert loss.min() >= -1.001 and (loss - exact)[inside].abs().mean() < 2e-2


def test_the_better_fit_has_the_lower_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 1, 6, 6, 6, generator=generator), size=(20, 20, 20), mode="trilinear")
    losses = [LNCCLoss()(image.roll(shift, 2), image).item() for shift in (0, 1, 2, 4)]
    assert losses == sorted(losses) and losses[3] - losses[0] > 0.1


@pytest.mark.parametrize("shape", [(3, 1, 9, 8), (2, 2, 7, 6, 8)])
def test_batch_and_symmetry(shape: tuple[int, ...]) -> None:
    pred, target = images(shape)
    loss = LNCCLoss(5)
    alone = [loss(pred[i : i + 1], target[i : i + 1]) for i in range(shape[0])]
    torch.testing.assert_close(loss(pred, target), torch.stack(alone).mean())
    torch.testing.assert_close(loss(target, pred), loss(pred, target))
    channels = [loss(pred[:, i : i + 1], target[:, i : i + 1]) for i in range(shape[1])]
    torch.testing.assert_close(loss(pred, target), torch.stack(channels).mean())
    assert torch.equal(loss(pred, target), loss(pred, target)) and loss(pred, target) < -0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    """Sums of 729 squares do not fit half precision: they are taken in single precision."""
    pred, target = (image.to(dtype) for image in images((1, 1, 12, 12, 12)))
    expected = LNCCLoss()(pred.float(), target.float())
    assert expected < -0.1
    loss = LNCCLoss()(pred, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LNCCLoss()(pred, target), expected)
        assert torch.equal(LNCCLoss()(pred.float(), target.float()), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_descent_finds_a_displacement(dims: int) -> None:
    """A free field, improved by some steps, lays one image on the other."""
    generator = torch.Generator().manual_seed(1)
    mode = "trilinear" if dims == 3 else "bilinear"
    fixed = F.interpolate(torch.rand(1, 1, *[7] * dims, generator=generator), size=(20,) * dims, mode=mode)
    true = F.interpolate(torch.randn(1, dims, *[3] * dims, generator=generator), size=(20,) * dims, mode=mode)
    moving = warp(fixed, 0.8 * true)
    ddf = torch.zeros(1, dims, *[20] * dims, requires_grad=True)
    optimizer, losses = torch.optim.Adam([ddf], 0.05), []
    for _ in range(20):
        loss = LNCCLoss()(warp(moving, ddf), fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4 * (1 + losses[0])


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LNCCLoss(**arguments)


@pytest.mark.parametrize(("pred", "target", "message"), ILL_SHAPES)
def test_ill_shapes(pred: tuple[int, ...], target: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"pred and target must have one shape .*{message}"):
        LNCCLoss()(torch.zeros(pred), torch.zeros(target))
