# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from monai_sacb.networks.layers import compose, exponential, invert, reference_grid, warp

# image shape, spatial shape of the field, type
TEST_CASES = [
    ((1, 1, 9, 12), (9, 12), torch.float32),
    ((2, 3, 7, 5), (7, 5), torch.float64),
    ((1, 2, 6, 9, 7), (6, 9, 7), torch.float32),
    ((3, 1, 5, 8, 4), (5, 8, 4), torch.float64),
    ((2, 1, 2, 3, 2), (2, 3, 2), torch.float32),
    # the image may have another size than the field
    ((1, 1, 9, 12), (5, 16), torch.float32),
    ((2, 2, 6, 5, 7), (8, 3, 7), torch.float64),
]

# scipy's name of what lies outside
SCIPY_MODES = {"zeros": "grid-constant", "border": "nearest", "reflection": "mirror"}

# image shape, field shape, options, message
ILL_CASES = [
    ((1, 1, 4, 4), (1, 3, 4, 4), {}, r"\[1, 1, 4, 4\] and \[1, 3, 4, 4\]"),
    ((1, 1, 4, 4, 4), (1, 3, 4, 4), {}, r"\[1, 1, 4, 4, 4\] and \[1, 3, 4, 4\]"),
    ((2, 1, 4, 4), (1, 2, 4, 4), {}, r"\[2, 1, 4, 4\] and \[1, 2, 4, 4\]"),
    ((1, 1, 4), (1, 1, 4), {}, r"\[1, 1, 4\] and \[1, 1, 4\]"),
    ((1, 1, 4, 4, 4, 4), (1, 4, 4, 4, 4, 4), {}, r"\[1, 1, 4, 4, 4, 4\]"),
    ((1, 1, 4, 4), (1, 2, 4, 4), {"mode": "cubic"}, r"mode must be 'bilinear' or 'nearest', got 'cubic'"),
    ((1, 1, 4, 4), (1, 2, 4, 4), {"padding_mode": "wrap"}, r"padding_mode must be .* got 'wrap'"),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_field(batch: int, spatial: tuple[int, ...], scale: float, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return scale * torch.randn(batch, len(spatial), *spatial, generator=rng(seed), dtype=torch.float64).to(dtype)


def smooth_field(spatial: tuple[int, ...], scale: float, sigma: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Field of ``(1, d, *spatial)`` in float64 with its largest component equal to ``scale``."""
    generator = np.random.default_rng(seed)
    field = np.stack([ndimage.gaussian_filter(generator.standard_normal(spatial), sigma) for _ in spatial])
    return torch.from_numpy(scale * field / np.abs(field).max())[None]


def scipy_sample(image: np.ndarray, ddf: np.ndarray, order: int, mode: str) -> np.ndarray:
    """``image (C, *spatial)`` at ``p + ddf(p)``."""
    points = np.indices(ddf.shape[1:]) + ddf
    return np.stack([ndimage.map_coordinates(c, points, order=order, mode=mode, cval=0.0) for c in image])


def interior(x: torch.Tensor, margin: int) -> torch.Tensor:
    return x[(..., *[slice(margin, -margin)] * (x.dim() - 2))]


@pytest.mark.parametrize(("shape", "spatial", "dtype"), TEST_CASES)
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_scipy(
    shape: tuple[int, ...], spatial: tuple[int, ...], dtype: torch.dtype, mode: str, padding_mode: str
) -> None:
    image = torch.randn(shape, generator=rng(), dtype=torch.float64).to(dtype)
    ddf = random_field(shape[0], spatial, 2.5, dtype)
    if mode == "nearest":
        # keep away from the half, where neighbours are equally near
        ddf = ddf.floor() + 0.1 + 0.3 * torch.rand(ddf.shape, generator=rng(2), dtype=dtype)
    warped = warp(image, ddf, mode=mode, padding_mode=padding_mode)
    assert warped.shape == (*shape[:2], *spatial) and warped.dtype == dtype
    order = 1 if mode == "bilinear" else 0
    for i in range(shape[0]):
        expected = scipy_sample(image[i].double().numpy(), ddf[i].double().numpy(), order, SCIPY_MODES[padding_mode])
        atol = 1e-12 if dtype == torch.float64 else 2e-5
        np.testing.assert_allclose(warped[i].numpy(), expected, rtol=0, atol=atol)


def test_parity(parity, relative_error) -> None:
    recorded = parity("warp")
    source, flow = torch.from_numpy(recorded["source"]), torch.from_numpy(recorded["flow"])
    assert relative_error(warp(source, flow), recorded["warped"]) < 1e-5
    assert relative_error(warp(source, flow, mode="nearest"), recorded["warped_nearest"]) < 1e-6


@pytest.mark.parametrize("oblique", [False, True])
def test_itk(oblique: bool) -> None:
    """ITK resamples in physical space, with its own spacing, direction and order of the axes."""
    itk = pytest.importorskip("itk")
    shape, spacing = (14, 11, 17), np.array([2.5, 0.7, 1.3])
    generator = np.random.default_rng(0)
    image = ndimage.gaussian_filter(generator.standard_normal(shape), 1.0)
    ddf = smooth_field(shape, 2.0, sigma=2.0)[0].numpy()
    rotation = linalg.expm(np.array([[0, -0.3, 0.2], [0.3, 0, -0.1], [-0.2, 0.1, 0]]))
    direction = rotation if oblique else np.eye(3)

    def as_itk(array: np.ndarray, pixel: object) -> object:
        volume = itk.image_from_array(np.ascontiguousarray(array, np.float32), ttype=itk.Image[pixel, 3])
        volume.SetSpacing(spacing[::-1].tolist())
        volume.SetOrigin([5.0, -3.0, 11.0])
        volume.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))
        return volume

    # voxels of the array's axes -> mm along ITK's axes -> mm of the patient
    mm = np.moveaxis(ddf[::-1], 0, -1) * spacing[::-1]
    field = as_itk(mm @ direction.T, itk.Vector[itk.F, 3])
    moving = as_itk(image, itk.F)
    warper = itk.WarpImageFilter[type(moving), type(moving), type(field)].New()
    warper.SetInput(moving)
    warper.SetDisplacementField(field)
    warper.SetOutputParametersFromImage(moving)
    warper.Update()
    expected = itk.array_from_image(warper.GetOutput())
    ours = warp(torch.from_numpy(image).float()[None, None], torch.from_numpy(ddf).float()[None])[0, 0].numpy()
    # ITK does not blend with what lies outside
    points = np.indices(shape) + ddf
    inside = np.all([(p >= 0) & (p <= n - 1) for p, n in zip(points, shape)], axis=0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], expected[inside], atol=1e-4)
    assert np.abs(image - expected)[inside].max() > 0.05


@pytest.mark.parametrize("spatial", [(8, 11), (5, 8, 7), (40, 33, 36)])
def test_zero_field_is_the_identity(spatial: tuple[int, ...]) -> None:
    image = torch.randn(2, 2, *spatial, generator=rng())
    ddf = torch.zeros(2, len(spatial), *spatial)
    torch.testing.assert_close(warp(image, ddf), image, rtol=0, atol=5e-5)
    assert torch.equal(warp(image, ddf, mode="nearest"), image)
    field = random_field(2, spatial, 2.0, torch.float32)
    torch.testing.assert_close(compose(ddf, field), field, rtol=0, atol=1e-4)
    assert torch.equal(compose(field, ddf), field)
    assert torch.equal(exponential(ddf), ddf)
    assert torch.equal(invert(ddf), ddf)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_direction_and_unit(axis: int) -> None:
    """A displacement of +2 voxels along an axis pulls from 2 voxels further; zeros come in at the far end."""
    image = torch.randn(1, 1, 6, 7, 8, generator=rng())
    ddf = torch.zeros(1, 3, 6, 7, 8)
    ddf[:, axis] = 2.0
    expected = image.roll(-2, axis + 2)
    expected.narrow(axis + 2, image.shape[axis + 2] - 2, 2).zero_()
    torch.testing.assert_close(warp(image, ddf), expected, rtol=0, atol=1e-5)


def test_linear_function_is_sampled_exactly() -> None:
    grid = reference_grid([20, 24, 22], torch.device("cpu")).double()[None]
    slope, ddf = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64), smooth_field((20, 24, 22), 2.0)
    image = torch.einsum("i,bi...->b...", slope, grid)[:, None]
    expected = torch.einsum("i,bi...->b...", slope, grid + ddf)[:, None]
    torch.testing.assert_close(interior(warp(image, ddf), 2), interior(expected, 2), rtol=0, atol=1e-11)


def test_reference_grid() -> None:
    grid = reference_grid([2, 3, 4], torch.device("cpu"))
    assert grid.dtype == torch.float32
    np.testing.assert_array_equal(grid.numpy(), np.indices((2, 3, 4)))


# type of the image, mode, type of the result
@pytest.mark.parametrize(
    ("dtype", "mode", "expected"),
    [
        (torch.uint8, "nearest", torch.uint8),
        (torch.int64, "nearest", torch.int64),
        (torch.bool, "nearest", torch.bool),
        (torch.uint8, "bilinear", torch.float32),
        (torch.int32, "bilinear", torch.float32),
        (torch.float16, "bilinear", torch.float16),
        (torch.bfloat16, "nearest", torch.bfloat16),
        (torch.float64, "bilinear", torch.float64),
    ],
)
def test_types(dtype: torch.dtype, mode: str, expected: torch.dtype) -> None:
    image = torch.randint(0, 2 if dtype == torch.bool else 100, (1, 1, 7, 9), generator=rng()).to(dtype)
    ddf = torch.floor(random_field(1, (7, 9), 2.0, torch.float32))
    warped = warp(image, ddf, mode=mode)
    assert warped.dtype == expected
    reference = scipy_sample(image[0].double().numpy(), ddf[0].double().numpy(), 0, "grid-constant")
    np.testing.assert_allclose(warped[0].double().numpy(), reference, rtol=0, atol=1e-4 if mode == "nearest" else 0.05)
    assert reference.max() > 0


def test_half_precision_field_on_a_long_axis() -> None:
    """Half precision cannot count to 3000; the coordinates are not computed in it."""
    image = torch.arange(3000.0).expand(1, 1, 2, 3000)
    ddf = torch.zeros(1, 2, 2, 3000, dtype=torch.float16)
    ddf[:, 1] = -0.5
    torch.testing.assert_close(warp(image, ddf)[..., 1:], image[..., 1:] - 0.5, rtol=0, atol=1e-3)


def test_autocast_keeps_precision() -> None:
    image, ddf = torch.randn(1, 1, 8, 9, 7, generator=rng()), random_field(1, (8, 9, 7), 2.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(image, ddf), warp(image.clone(), ddf))
        under = warp(image, ddf), compose(ddf, ddf), exponential(ddf), invert(ddf)
    for actual, expected in zip(under, (warp(image, ddf), compose(ddf, ddf), exponential(ddf), invert(ddf))):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("spatial", [(6, 9), (5, 6, 7)])
def test_batch_equals_one_by_one(spatial: tuple[int, ...], mode: str) -> None:
    image, ddf = torch.randn(3, 2, *spatial, generator=rng()), random_field(3, spatial, 2.0, torch.float32)
    together = warp(image, ddf, mode=mode)
    assert torch.equal(together, warp(image, ddf, mode=mode))
    for i in range(3):
        assert torch.equal(together[i : i + 1], warp(image[i : i + 1], ddf[i : i + 1], mode=mode))


@pytest.mark.parametrize("spatial", [(3, 4), (3, 2, 4)])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_gradient(spatial: tuple[int, ...], padding_mode: str) -> None:
    image = torch.randn(2, 2, *spatial, generator=rng(), dtype=torch.float64).requires_grad_()
    # between the voxels, where linear interpolation is differentiable
    ddf = random_field(2, spatial, 1.0, torch.float64).floor() + 0.3
    ddf = (ddf + 0.3 * torch.rand(ddf.shape, generator=rng(3), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, u: warp(a, u, padding_mode=padding_mode), (image, ddf))
    warp(image, ddf, padding_mode=padding_mode).square().sum().backward()
    assert image.grad.abs().max() > 0 and ddf.grad.abs().max() > 0


@pytest.mark.parametrize(("image", "ddf", "options", "message"), ILL_CASES)
def test_ill_arguments(image: tuple[int, ...], ddf: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp(torch.zeros(image), torch.zeros(ddf), **options)


@pytest.mark.parametrize("spatial", [(9, 12), (7, 9, 8)])
def test_compose_follows_the_points(spatial: tuple[int, ...]) -> None:
    first = random_field(2, spatial, 1.5, torch.float64, seed=1)
    second = random_field(2, spatial, 1.5, torch.float64, seed=2)
    for padding_mode, mode in SCIPY_MODES.items():
        both = compose(first, second, padding_mode=padding_mode)
        for i in range(2):
            there = scipy_sample(second[i].numpy(), first[i].numpy(), 1, mode)
            np.testing.assert_allclose(both[i].numpy(), first[i].numpy() + there, atol=1e-11)
    np.testing.assert_allclose(compose(first, second), compose(first, second, padding_mode="border"), atol=0)


def test_compose_equals_warping_twice() -> None:
    spatial = (30, 34)
    first, second = smooth_field(spatial, 2.0, seed=1), smooth_field(spatial, 2.0, seed=2)
    image = smooth_field(spatial, 1.0, sigma=5.0, seed=3)[:, :1]
    once = warp(image, compose(first, second))
    twice = warp(warp(image, second), first)
    other_order = warp(warp(image, first), second)
    assert interior(once - twice, 5).abs().mean() < 0.2 * interior(once - other_order, 5).abs().mean()
    assert interior(compose(first, second) - compose(second, first), 5).abs().max() > 0.3


@pytest.mark.parametrize("spatial", [(30, 26), (20, 24, 22)])
def test_inverse_undoes(spatial: tuple[int, ...]) -> None:
    ddf = smooth_field(spatial, 2.5, sigma=5.0)
    inverse = invert(ddf)
    # the fixed point itself, then the other side, where the inverse is interpolated
    assert interior(compose(inverse, ddf), 4).abs().max() < 1e-5
    assert interior(compose(ddf, inverse), 4).abs().max() < 0.05
    assert invert(ddf, num_steps=1).sub(inverse).abs().max() > 0.1


@pytest.mark.parametrize(("scales", "steps"), [((1.2, 1.2, 1.2), 60), ((3.0, 3.0, 3.0), 60), ((0.5, 1.0, 4.0), 150)])
def test_inverse_of_a_scaling(scales: tuple[float, ...], steps: int) -> None:
    """x -> c + s (x - c) is undone by x -> c + (x - c) / s, which linear interpolation represents exactly."""
    centered = reference_grid([21, 25, 19], torch.device("cpu")).double()[None]
    centered = centered - centered.mean((2, 3, 4), keepdim=True)
    factors = torch.tensor(scales, dtype=torch.double).view(1, 3, 1, 1, 1)
    inverse = invert((factors - 1) * centered, num_steps=steps)
    # where the way back leads out of the grid, the field is not known
    known = (
        ((centered / factors).abs() <= centered.amax((2, 3, 4), keepdim=True)).all(1, keepdim=True).expand_as(centered)
    )
    torch.testing.assert_close(inverse[known], ((1 / factors - 1) * centered)[known], rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [0, -4])
def test_ill_invert(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {steps}"):
        invert(torch.zeros(1, 2, 4, 4), num_steps=steps)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 2, 4, 4, 4), (1, 1, 4)])
def test_fields_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    ddf = torch.zeros(shape)
    for function in (invert, exponential, lambda u: compose(u, u)):
        with pytest.raises(ValueError, match=rf"got \[{', '.join(map(str, shape))}\]"):
            function(ddf)


@pytest.mark.parametrize("shift", [(2.0, -3.25), (1.0, 0.5, -2.0)])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_exponential_of_a_constant_is_a_translation(shift: tuple[float, ...], steps: int) -> None:
    velocity = torch.tensor(shift).view(1, -1, *[1] * len(shift)).expand(1, -1, *[12] * len(shift))
    torch.testing.assert_close(exponential(velocity, num_steps=steps), velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spatial", [(30, 26), (20, 24, 22)])
def test_exponential_of_the_negative_is_the_inverse(spatial: tuple[int, ...]) -> None:
    velocity = smooth_field(spatial, 3.0, sigma=5.0)
    forward, backward = exponential(velocity), exponential(-velocity)
    assert forward.abs().max() > 2
    for both in (compose(forward, backward), compose(backward, forward)):
        assert interior(both, 5).abs().max() < 0.03
    torch.testing.assert_close(interior(invert(forward), 5), interior(backward, 5), rtol=0, atol=0.03)
    # plain negation is no inverse
    assert interior(compose(forward, -forward), 5).abs().max() > 0.1


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.0, -0.25], [0.25, 0.0]],
        [[0.05, 0.1], [-0.2, -0.1]],
        [[0.0, -0.2, 0.1], [0.2, 0.0, -0.05], [-0.1, 0.05, 0.0]],
    ],
)
def test_exponential_of_a_linear_field(matrix: list[list[float]]) -> None:
    """v(x) = A (x - c) flows to c + expm(A) (x - c), away from the border."""
    a = np.array(matrix)
    dims = len(a)
    centered = np.indices((31,) * dims) - 15.0
    velocity = torch.from_numpy(np.einsum("ij,j...->i...", a, centered))[None]
    expected = torch.from_numpy(np.einsum("ij,j...->i...", linalg.expm(a) - np.eye(dims), centered))[None]
    error = [
        interior(exponential(velocity, num_steps=steps) - expected, 9).abs().max() / interior(expected, 9).abs().max()
        for steps in (4, 7, 14)
    ]
    assert error[0] < 2e-2 and error[1] < 2e-3 and error[2] < 2e-5


def test_ill_exponential() -> None:
    with pytest.raises(ValueError, match="num_steps must not be negative, got -1"):
        exponential(torch.zeros(1, 2, 4, 4), num_steps=-1)


@pytest.mark.parametrize("spatial", [(8, 7), (6, 5, 7)])
def test_script(spatial: tuple[int, ...]) -> None:
    ddf = random_field(2, spatial, 1.0, torch.float32)
    image = torch.randn(2, 3, *spatial, generator=rng())
    scripted = torch.jit.script(warp)
    for mode in ("bilinear", "nearest"):
        for padding_mode in SCIPY_MODES:
            assert torch.equal(scripted(image, ddf, mode, padding_mode), warp(image, ddf, mode, padding_mode))
    assert torch.equal(torch.jit.script(compose)(ddf, 0.5 * ddf), compose(ddf, 0.5 * ddf))
    assert torch.equal(torch.jit.script(invert)(ddf), invert(ddf))
    assert torch.equal(torch.jit.script(exponential)(ddf), exponential(ddf))


def test_compose_checks_the_second_field() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1, 4, 5\]"):
        compose(torch.zeros(1, 2, 4, 5), torch.zeros(1, 1, 4, 5))
