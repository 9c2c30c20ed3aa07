# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from monai_sacb.losses import MINDSSCLoss, mind_ssc

# shape, radius, dilation
TEST_CASES = [
    ((2, 1, 9, 7), 1, 1),
    ((1, 1, 8, 11), 2, 2),
    ((1, 3, 6, 5), 0, 3),
    ((1, 1, 7, 6, 8), 2, 2),
    ((2, 2, 5, 7, 6), 1, 1),
    ((1, 1, 3, 1, 4), 1, 2),
]


def noise(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    mode = "trilinear" if len(shape) == 5 else "bilinear"
    return F.interpolate(noise((*shape[:2], *[max(2, n // 3) for n in shape[2:]]), seed), size=shape[2:], mode=mode)


def by_definition(image: np.ndarray, radius: int, dilation: int) -> np.ndarray:
    """The descriptor of one image ``(C, *spatial)``; the channels in no particular order."""
    dims = image.ndim - 1
    steps = [np.array(s) * dilation for s in itertools.product((-1, 0, 1), repeat=dims) if np.abs(s).sum() == 1]
    reach = dilation + radius
    distances = []
    for a, b in itertools.combinations(steps, 2):
        if (a == -b).all():
            continue
        padded = [np.pad(channel, reach, mode="edge") for channel in image]
        one, other = (np.stack([np.roll(c, tuple(-s), range(dims)) for c in padded]) for s in (a, b))
        patches = ndimage.uniform_filter(np.square(one - other).mean(0), 2 * radius + 1)
        distances.append(patches[(slice(reach, -reach),) * dims])
    distance = np.stack(distances)
    variance = distance.mean(0)
    variance = np.maximum(variance, 1e-3 * variance.mean())
    return np.exp(-(distance - distance.min(0)) / variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "radius", "dilation"), TEST_CASES)
def test_definition(shape: tuple[int, ...], radius: int, dilation: int, dtype: torch.dtype) -> None:
    image = noise(shape, dtype=dtype)
    descriptor = mind_ssc(image, radius, dilation)
    assert descriptor.dtype == dtype and descriptor.shape == (shape[0], 12 if len(shape) == 5 else 4, *shape[2:])
    expected = np.stack([by_definition(one, radius, dilation) for one in image.double().numpy()])
    # sorted: the order of the channels is nobody's business, but the same at all voxels
    order, reference = (np.lexsort(d[0].reshape(d.shape[1], -1).T.round(4)) for d in (descriptor.numpy(), expected))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    np.testing.assert_allclose(descriptor.numpy()[:, order], expected[:, reference], atol=tolerance)
    assert descriptor.amax(1).min() == 1.0 and descriptor.std() > 0.05


@pytest.mark.parametrize("shape", [(2, 1, 12, 13), (1, 1, 9, 8, 10)])
@pytest.mark.parametrize(("factor", "offset"), [(-1.0, 1.0), (20.0, 0.0), (-30.0, 5.0)])
def test_linear_maps_of_intensities_change_nothing(shape: tuple[int, ...], factor: float, offset: float) -> None:
    image = smooth(shape)
    torch.testing.assert_close(mind_ssc(factor * image + offset), mind_ssc(image), atol=1e-3, rtol=0)
    # while another image is another
    assert (mind_ssc(smooth(shape, 1)) - mind_ssc(image)).abs().mean() > 0.05


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("contrast", ["same", "inverted", "monotone"])
def test_least_where_images_are_aligned(dims: int, contrast: str) -> None:
    image = smooth((1, 1, *(24, 22, 20)[:dims]), 3)
    other = {"same": image, "inverted": 1 - image, "monotone": (3 * image).exp()}[contrast]
    inner = (slice(None), slice(None), *[slice(4, -4)] * dims)
    aligned = MINDSSCLoss()(image[inner], other[inner]).item()
    for axis, step in itertools.product(range(2, dims + 2), (-2, -1, 1, 2)):
        shifted = MINDSSCLoss()(other.roll(step, axis)[inner], image[inner]).item()
        assert shifted > 1.2 * aligned + 0.002


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (1, 1, 7, 8, 9)])
def test_images_without_contrast(shape: tuple[int, ...]) -> None:
    image = torch.full(shape, 0.3).requires_grad_()
    assert (mind_ssc(image) == 1).all()
    textured = noise(shape, dtype=torch.float32).requires_grad_()
    # one half of it flat
    half = torch.where(torch.arange(shape[-1]) < shape[-1] // 2, 0.0, textured)
    for pred, target in ((image, textured), (half, image), (textured, half)):
        loss = MINDSSCLoss()(pred, target)
        gradients = torch.autograd.grad(loss, (image, textured), allow_unused=True, retain_graph=True)
        assert 0 < loss.item() < 1
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        assert max(gradient.abs().max() for gradient in gradients if gradient is not None) < 1e3


@pytest.mark.parametrize(("shape", "radius", "dilation"), [((2, 2, 4, 5), 1, 1), ((1, 1, 3, 4, 3), 1, 2)])
def test_gradcheck(shape: tuple[int, ...], radius: int, dilation: int) -> None:
    image = noise(shape, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mind_ssc(x, radius, dilation), (image,))
    other = noise(shape, 6).requires_grad_()
    assert torch.autograd.gradcheck(MINDSSCLoss(radius, dilation), (image, other))


def test_batch_equals_one_by_one() -> None:
    images, others = (
        smooth((3, 1, 9, 10, 8)) * torch.tensor([1.0, 0.1, 9.0]).view(3, 1, 1, 1, 1),
        noise((3, 1, 9, 10, 8)),
    )
    torch.testing.assert_close(mind_ssc(images), torch.cat([mind_ssc(image[None]) for image in images]))
    alone = torch.stack([MINDSSCLoss()(*(t[i : i + 1] for t in (images, others))) for i in range(3)])
    torch.testing.assert_close(MINDSSCLoss()(images, others), alone.mean())


def test_reductions() -> None:
    pred, target = noise((2, 1, 6, 7)), noise((2, 3, 6, 7), 1)
    none = MINDSSCLoss(1, 1, "none")(pred, target)
    torch.testing.assert_close(none, (mind_ssc(pred, 1, 1) - mind_ssc(target, 1, 1)).square())
    torch.testing.assert_close(MINDSSCLoss(1, 1)(pred, target), none.mean())
    torch.testing.assert_close(MINDSSCLoss(1, 1, "sum")(pred, target), none.sum())


def test_autocast_computes_in_single() -> None:
    pred, target = (smooth((1, 1, 10, 11, 9), seed).bfloat16() for seed in (0, 1))
    expected = MINDSSCLoss()(pred.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MINDSSCLoss()(pred.requires_grad_(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert pred.grad.abs().max() > 0


def test_descent_moves_an_image_of_other_contrast() -> None:
    """Shifted by a voxel and a half and inverted, it finds its place."""
    image = smooth((1, 1, 20, 22), 3)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.15)
    eye = torch.eye(2, dtype=torch.float64)

    def moved(image: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normalized = shift.flip(0) * 2 / torch.tensor([21.0, 19.0])
        grid = F.affine_grid(torch.cat([eye, normalized[:, None]], 1)[None], [1, 1, 20, 22], align_corners=True)
        return F.grid_sample(image, grid, padding_mode="border", align_corners=True)

    target = 1 - moved(image, torch.tensor([1.5, -1.0], dtype=torch.float64))
    for _ in range(60):
        loss = MINDSSCLoss()(moved(image, shift)[..., 4:-4, 4:-4], target[..., 4:-4, 4:-4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(shift.detach(), [1.5, -1.0], atol=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1}, r"radius must be a whole number of at least 0, got -1"),
        ({"radius": 1.5}, r"radius must be.*got 1\.5"),
        ({"radius": True}, r"radius must be.*got True"),
        ({"dilation": 0}, r"dilation must be a whole number of at least 1, got 0"),
    ],
)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MINDSSCLoss(**arguments)
    with pytest.raises(ValueError, match=message):
        mind_ssc(torch.zeros(1, 1, 5, 5), **arguments)


def test_ill_reduction() -> None:
    with pytest.raises(ValueError, match="median"):
        MINDSSCLoss(reduction="median")


@pytest.mark.parametrize(
    ("one", "other"), [((1, 1, 5, 5), (1, 1, 5, 6)), ((2, 1, 5, 5), (1, 1, 5, 5)), ((1, 1, 5), (1, 1, 5))]
)
def test_ill_shapes(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"got \[{', '.join(map(str, one))}\] and"):
        MINDSSCLoss()(torch.zeros(one), torch.zeros(other))
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\[, D\]\), got shape \[1, 5, 5\]"):
        mind_ssc(torch.zeros(1, 5, 5))
