# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from monai.data import MetaTensor

from monai_sacb.visualize import plot_registration

TITLES = ["fixed", "moving", "warped", "moving - fixed", "warped - fixed", "deformed grid"]


def images(shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Moving, fixed and warped image of random voxels between 1 and 2, on a background of zeros."""
    result = []
    for i in range(3):
        image = torch.zeros(shape)
        inner = tuple(slice(2, n - 2) for n in shape)
        image[inner] = 1 + torch.rand(image[inner].shape, generator=torch.Generator().manual_seed(seed + i))
        result.append(image)
    return result


def shown(ax: Axes) -> np.ndarray:
    """The picture of one part, axes in the order of the array."""
    (picture,) = ax.images
    return np.asarray(picture.get_array()).T


def parts(figure: Figure) -> dict[str, Axes]:
    return {ax.get_title(): ax for ax in figure.axes}


def lines(ax: Axes) -> list[list[np.ndarray]]:
    """For each array axis the lines ``(N, 2)``, in voxels, on which that coordinate of the moving grid is constant."""
    sets = [collection for collection in ax.collections if isinstance(collection, ContourSet)]
    return [[p for path in s.get_paths() for p in path.to_polygons(closed_only=False)] for s in sets]


@pytest.mark.parametrize("shape", [(14, 17, 12), (14, 17)], ids=["volume", "slice"])
def test_six_parts(shape: tuple[int, ...]) -> None:
    moving, fixed, warped = images(shape)
    figure = plot_registration(moving, fixed, warped, torch.zeros(len(shape), *shape), "two brains")
    assert [ax.get_title() for ax in figure.axes] == TITLES
    assert figure.get_suptitle() == "two brains"
    arrays = {"moving": moving, "fixed": fixed, "warped": warped}
    arrays = {name: (x[:, :, 6] if x.dim() == 3 else x).numpy() for name, x in arrays.items()}
    arrays |= {f"{name} - fixed": arrays[name] - arrays["fixed"] for name in ("moving", "warped")}
    arrays["deformed grid"] = arrays["fixed"]
    for name, ax in parts(figure).items():
        np.testing.assert_allclose(shown(ax), arrays[name], atol=1e-6)
        # the second array axis goes up
        assert ax.images[0].origin == "lower"


def test_scales_can_be_compared() -> None:
    moving, fixed, warped = images((14, 17))
    figure = plot_registration(10 * moving, fixed, warped, torch.zeros(2, 14, 17))
    limits = {name: ax.images[0].get_clim() for name, ax in parts(figure).items()}
    low, high = fixed.min().item(), fixed.max().item()
    for name in ("fixed", "moving", "warped", "deformed grid"):
        assert limits[name] == pytest.approx((low, high))
    # no difference is white, whatever the images are
    for name in ("moving - fixed", "warped - fixed"):
        assert limits[name][0] == -limits[name][1] < 0
        assert limits[name] == limits["warped - fixed"]


@pytest.mark.parametrize(("filled", "expected"), [((3, 9), 6), ((0, 3), 1), ((11, 12), 11), ((0, 0), 6), ((0, 12), 6)])
def test_slice_is_in_the_middle_of_the_fixed_image(filled: tuple[int, int], expected: int) -> None:
    shape = (9, 10, 12)
    fixed = torch.full(shape, -1000.0)
    fixed[3:6, 3:6, slice(*filled)] = 50.0
    moving = torch.arange(12.0).expand(shape)
    figure = plot_registration(moving, fixed, moving + 100, torch.zeros(3, *shape))
    assert (shown(parts(figure)["moving"]) == expected).all()
    assert (shown(parts(figure)["warped"]) == expected + 100).all()


def test_no_displacement_is_a_straight_grid() -> None:
    _, fixed, _ = images((13, 17))
    figure = plot_registration(fixed, fixed, fixed, torch.zeros(2, 13, 17))
    along = lines(parts(figure)["deformed grid"])
    assert len(along) == 2
    for axis, size in enumerate((13, 17)):
        places = sorted({round(float(v), 3) for line in along[axis] for v in np.unique(line[:, axis].round(3))})
        # a line every few voxels, over the whole image
        steps = np.diff(places)
        assert len(places) >= size // 4 and steps.min() == steps.max() > 1
        assert places[0] <= 3 and places[-1] >= size - 4
        for line in along[axis]:
            assert np.ptp(line[:, axis]) < 1e-3
            assert np.ptp(line[:, 1 - axis]) == pytest.approx((17, 13)[axis] - 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [1.0, -0.5])
def test_grid_is_that_of_the_moving_image(axis: int, shift: float) -> None:
    _, fixed, _ = images((13, 17))
    ddf = torch.zeros(2, 13, 17)
    straight = lines(parts(plot_registration(fixed, fixed, fixed, ddf))["deformed grid"])
    ddf[axis] = shift
    moved = lines(parts(plot_registration(fixed, fixed, fixed, ddf))["deformed grid"])

    def places(ways: list[list[np.ndarray]], which: int) -> set[float]:
        return {round(float(line[:, which].mean()), 2) for line in ways[which]}

    # moving(p + shift) is seen at p: its lines lie that much further back
    inside = {p - shift for p in places(straight, axis) if 0 <= p - shift <= (12, 16)[axis]}
    assert len(inside) >= 3
    assert inside <= places(moved, axis)
    assert places(moved, 1 - axis) == places(straight, 1 - axis)


def test_grid_follows_an_analytic_field() -> None:
    shape = (40, 36)
    x, y = np.meshgrid(*(np.arange(float(n)) for n in shape), indexing="ij")
    ddf = np.stack([2.0 * np.sin(2 * np.pi * y / 36), 1.5 * np.cos(2 * np.pi * x / 40)])
    _, fixed, _ = images(shape)
    along = lines(parts(plot_registration(fixed, fixed, fixed, torch.from_numpy(ddf)))["deformed grid"])
    checked = 0
    for line in along[0]:
        # where the line is, the moving coordinate is a whole number
        coordinate = line[:, 0] + 2.0 * np.sin(2 * np.pi * line[:, 1] / 36)
        assert np.ptp(coordinate) < 0.05
        assert abs(coordinate.mean() - round(coordinate.mean())) < 0.05
        checked += len(line)
        assert np.ptp(line[:, 0]) > 0.5 or len(line) < 10
    for line in along[1]:
        coordinate = line[:, 1] + 1.5 * np.cos(2 * np.pi * line[:, 0] / 40)
        assert np.ptp(coordinate) < 0.05
        checked += len(line)
    assert checked > 500


def test_field_of_the_slice() -> None:
    shape = (13, 17, 12)
    _, fixed, _ = images(shape)
    ddf = torch.zeros(3, *shape)
    straight = lines(parts(plot_registration(fixed, fixed, fixed, ddf))["deformed grid"])
    # displacement in other slices, and across the slice, is not seen in it
    ddf[:, :, :, :6] = 2.0
    ddf[:, :, :, 7:] = -2.0
    ddf[2] = 3.0
    other = lines(parts(plot_registration(fixed, fixed, fixed, ddf))["deformed grid"])
    for a, b in zip(straight, other):
        assert len(a) == len(b) and all(np.allclose(x, y) for x, y in zip(a, b))
    ddf[0, :, :, 6] = 0.5
    moved = lines(parts(plot_registration(fixed, fixed, fixed, ddf))["deformed grid"])
    assert not all(len(x) == len(y) and np.allclose(x, y) for x, y in zip(straight[0], moved[0]))


TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "needs gradient": lambda x: x.clone().requires_grad_(),
    "meta": lambda x: MetaTensor(x),
}


@pytest.mark.parametrize("convert", TYPES.values(), ids=TYPES)
def test_types_of_tensors(convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    moving, fixed, warped = (convert(x) for x in images((10, 11, 9)))
    figure = plot_registration(moving, fixed, warped, convert(torch.full((3, 10, 11, 9), 0.25)))
    np.testing.assert_allclose(shown(parts(figure)["moving"]), images((10, 11, 9))[0][:, :, 4], atol=0.01)
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_images_without_contrast(value: float) -> None:
    constant = torch.full((9, 10, 8), value)
    figure = plot_registration(constant, constant, constant, torch.zeros(3, 9, 10, 8))
    assert (shown(parts(figure)["fixed"]) == value).all()
    assert pixels(figure).std() > 0


def pixels(figure: Figure) -> np.ndarray:
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float64)


def test_figure_can_be_drawn_and_nothing_is_kept() -> None:
    import matplotlib.pyplot as plt

    moving, fixed, warped = images((12, 13, 10))
    pictures = [
        pixels(plot_registration(m, fixed, warped, torch.zeros(3, 12, 13, 10))) for m in (moving, moving, fixed)
    ]
    assert pictures[0].std() > 20
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    # figures that pyplot does not know of need not be closed
    assert plt.get_fignums() == []


SHAPE = (6, 7, 8)
# shapes of moving, fixed, warped and ddf
ILL_CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "moving": ((6, 7, 9), SHAPE, SHAPE, (3, *SHAPE)),
    "fixed": (SHAPE, (6, 8, 8), SHAPE, (3, *SHAPE)),
    "warped": (SHAPE, SHAPE, (7, 7, 8), (3, *SHAPE)),
    "field of another grid": (SHAPE, SHAPE, SHAPE, (3, 6, 7, 9)),
    "field of two components": (SHAPE, SHAPE, SHAPE, (2, *SHAPE)),
    "field with the axis of a batch": (SHAPE, SHAPE, SHAPE, (1, 3, *SHAPE)),
    "images with channels": ((1, *SHAPE), (1, *SHAPE), (1, *SHAPE), (3, *SHAPE)),
    "slices with a field of volumes": ((6, 7), (6, 7), (6, 7), (3, 6, 7)),
}


@pytest.mark.parametrize("shapes", ILL_CASES.values(), ids=ILL_CASES)
def test_ill_formed(shapes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        plot_registration(*(torch.zeros(shape) for shape in shapes))
    for name, shape in zip(("moving", "fixed", "warped", "ddf"), shapes):
        assert f"{name} {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("dims", [1, 4])
def test_images_that_are_no_slices_or_volumes(dims: int) -> None:
    shape = (6,) * dims
    with pytest.raises(ValueError) as caught:
        plot_registration(*[torch.zeros(shape)] * 3, torch.zeros(dims, *shape))
    assert str(list(shape)) in str(caught.value)
