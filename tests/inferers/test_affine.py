# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from monai.data import MetaTensor

from monai_sacb.data.foreground import foreground_mask
from monai_sacb.data.spatial_mapping import Grid, SpatialMapping, apply_affine, resample_volume
from monai_sacb.data.volumes import read_label_volume, read_volume
from monai_sacb.inferers import AffineRegistration, estimate_affine

RAW = Path(__file__).resolve().parents[3] / "shared" / "data" / "oasis_trt20" / "raw"


def phantom(seed: int = 0) -> MetaTensor:
    """A body of several tissues, about 120 x 150 x 110 mm, 2 mm voxels, in air."""
    rng = np.random.default_rng(seed)
    shape = (80, 90, 76)
    z, y, x = np.meshgrid(*[2.0 * (np.arange(size) - (size - 1) / 2) for size in shape], indexing="ij")
    body = (z / 60) ** 2 + (y / 75) ** 2 + (x / 55) ** 2 + 0.2 * (z / 60) * (y / 75) < 1
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 4)
    image = np.where(body, 100 + 30 * np.digitize(texture, [-0.02, 0.0, 0.02]), 0.0)
    image[(z - 25) ** 2 + (y + 30) ** 2 + (x - 12) ** 2 < 15**2] = 250
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (-70, -100, -90)
    return MetaTensor(torch.from_numpy(image).float()[None], affine=torch.from_numpy(affine))


def places(image: MetaTensor, step: int = 97) -> torch.Tensor:
    """Places of the foreground in RAS mm, ``(N, 3)``."""
    return apply_affine(Grid.of(image).affine, foreground_mask(image)[0].nonzero()[::step].double())


def around(points: torch.Tensor, axis: list[float], degrees: float, shift: float, scale: float) -> torch.Tensor:
    """Turned about the centre of points, scaled, and shifted by a length in mm."""
    centre = points.mean(0).numpy()
    affine = np.eye(4)
    affine[:3, :3] = (
        scale * Rotation.from_rotvec(math.radians(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    )
    affine[:3, 3] = centre + shift * np.array([1, -1, 1]) / math.sqrt(3) - affine[:3, :3] @ centre
    return torch.from_numpy(affine)


def moved_copy(image: MetaTensor, truth: torch.Tensor, shape: tuple[int, int, int]) -> MetaTensor:
    """The image as seen through an affine, on an oblique grid of 0.9 x 1.3 x 1.1 mm or coarser, in another order."""
    step = 120 / min(shape) / 0.9 if min(shape) < 120 else 1.0
    affine = torch.eye(4, dtype=torch.float64)
    order = torch.tensor([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    tilt = torch.from_numpy(Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix())
    affine[:3, :3] = tilt @ order @ torch.diag(step * torch.tensor([0.9, 1.3, 1.1], dtype=torch.float64))
    centre = apply_affine(torch.linalg.inv(truth), places(image)).mean(0)
    affine[:3, 3] = centre - affine[:3, :3] @ (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    return resample_volume(image, SpatialMapping([truth]), Grid(shape, affine))


def mean_error(found: torch.Tensor, truth: torch.Tensor, moving: MetaTensor) -> float:
    """Mean distance in the moving image's foreground, mm."""
    points = places(moving)
    return float((apply_affine(found, apply_affine(torch.linalg.inv(truth), points)) - points).norm(dim=1).mean())


# axis, degrees, shift in mm, scale, whether the copy's contrast is inverted
CASES = [
    ([1.0, 0, 0], 0.0, 0.0, 1.0, False),
    ([1.0, 0.5, 0], 30.0, 20.0, 1.1, False),
    ([0, 1.0, -1], -30.0, 20.0, 0.9, False),
    ([0.2, -1, 1.0], 30.0, 300.0, 1.0, True),
]


@pytest.mark.parametrize(("axis", "degrees", "shift", "scale", "inverted"), CASES)
def test_known_affine_is_found(axis: list[float], degrees: float, shift: float, scale: float, inverted: bool) -> None:
    moving = phantom()
    truth = around(places(moving), axis, degrees, shift, scale)
    fixed = moved_copy(moving, truth, (96, 78, 84))
    if inverted:
        fixed = torch.where(fixed > 50, 400 - fixed, 0)
    found = estimate_affine(moving, fixed, spacings=(8.0, 4.0), iterations=(40, 40), num_points=8000)
    assert found.shape == (4, 4) and found.dtype == torch.float64
    assert mean_error(found, truth, moving) < 0.5
    assert mean_error(torch.eye(4, dtype=torch.float64), truth, moving) > 5 or degrees == 0


@pytest.fixture(scope="module")
def pair() -> tuple[MetaTensor, MetaTensor, torch.Tensor]:
    moving = phantom()
    truth = around(places(moving), [1.0, -0.5, 0.3], 12, 15, 1.05)
    return moving, moved_copy(moving, truth, (96, 78, 84)), truth


FAST: dict[str, Any] = {
    "spacings": (8.0, 4.0),
    "iterations": (30, 30),
    "num_points": 4000,
    "angles": (-20.0, 0.0, 20.0),
}


def test_same_seed_same_bits(pair: tuple[MetaTensor, MetaTensor, torch.Tensor]) -> None:
    moving, fixed, truth = pair
    first, second, other = (AffineRegistration(**FAST, seed=seed)(moving, fixed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    for found in (first, other):
        assert mean_error(found, truth, moving) < 1


def test_masks_keep_what_they_hide_out(pair: tuple[MetaTensor, MetaTensor, torch.Tensor]) -> None:
    moving, fixed, truth = pair
    # in each image a bright block of its own, next to the centre
    spoilt, hidden = [], []
    for image, corner in ((moving, (42, 40, 38)), (fixed, (20, 28, 30))):
        mask = torch.ones_like(image.as_tensor())
        block = (slice(None), *(slice(start, start + 24) for start in corner))
        mask[block] = 0
        spoilt.append(torch.where(mask > 0, image, 260))
        hidden.append(mask)
    found = estimate_affine(*spoilt, fixed_mask=hidden[1], moving_mask=hidden[0], **FAST)
    assert mean_error(found, truth, moving) < 1
    assert mean_error(found, truth, moving) < mean_error(estimate_affine(*spoilt, **FAST), truth, moving)
    # what the masks hide does not matter at all to what lies in them
    assert not torch.equal(found, estimate_affine(*spoilt, fixed_mask=hidden[1], **FAST))


def test_initial_affine_reaches_what_no_other_start_does(pair: tuple[MetaTensor, MetaTensor, torch.Tensor]) -> None:
    moving, _, _ = pair
    truth = around(places(moving), [0.3, 1, 0.1], 150, 10, 1)
    fixed = moved_copy(moving, truth, (96, 78, 84))
    alone = {**FAST, "angles": (0.0,)}
    assert mean_error(estimate_affine(moving, fixed, **alone), truth, moving) > 10
    near = around(places(fixed), [1.0, 0, 0], 5, 4, 1)
    assert mean_error(estimate_affine(moving, fixed, initial=truth @ near, **alone), truth, moving) < 1


def test_result_is_not_worse_than_the_headers_alignment() -> None:
    # one step of descent from far is worse than what the headers say
    moving = phantom()
    registration = AffineRegistration((8.0,), (1,), 2000, angles=(0.0,))
    found = registration(moving, moving)
    assert mean_error(found, torch.eye(4, dtype=torch.float64), moving) < 0.5


def test_stages_are_told(pair: tuple[MetaTensor, MetaTensor, torch.Tensor]) -> None:
    told: list[str] = []
    estimate_affine(pair[0], pair[1], progress=told.append, **FAST)
    # 16 voxels along the body's shortest side
    assert told == ["affine at 6.75 mm", "affine at 4 mm"]


def test_meaningless_headers_and_a_small_object() -> None:
    # a crop of 32 mm: levels are finer than those of a head
    body = phantom()
    affine = torch.diag(torch.tensor([0.5, 0.5, 0.5, 1], dtype=torch.float64))
    moving = MetaTensor(body[:, 8:72, 12:76, 6:70].as_tensor().clone(), affine=affine)
    truth = around(places(moving), [0.0, 0.3, 1], 10, 1, 1)
    grid = Grid((60, 60, 60), affine.clone())
    grid.affine[:3, 3] = 1.0
    fixed = resample_volume(moving, SpatialMapping([truth]), grid)
    away = MetaTensor(fixed.as_tensor(), affine=fixed.affine.clone())
    away.affine[:3, 3] += 500
    found = estimate_affine(moving, away, **FAST)
    back = torch.eye(4, dtype=torch.float64)
    back[:3, 3] = -500
    assert mean_error(found, truth @ back, moving) < 0.5


def flat(value: float = 1.0, size: int = 20) -> MetaTensor:
    return MetaTensor(torch.full((1, size, size, size), value), affine=torch.eye(4, dtype=torch.float64))


SMALL = MetaTensor(ndimage.gaussian_filter(torch.rand(1, 20, 20, 20).numpy(), (0, 2, 2, 2)), affine=torch.eye(4))
ILL_CASES = [
    ({"moving": flat()}, "moving image is constant, 1 everywhere"),
    ({"fixed": flat(0)}, "fixed image is constant, 0 everywhere"),
    ({"fixed": SMALL / 0}, "fixed image must be finite, got 8000 NaN"),
    ({"moving": torch.rand(1, 9, 9, 9)}, r"moving image must have shape \(1, D, H, W\) and an affine, got Tensor"),
    ({"moving": MetaTensor(torch.rand(2, 9, 9, 9))}, r"got MetaTensor \[2, 9, 9, 9\]"),
    ({"fixed": MetaTensor(torch.rand(1, 9, 3, 9))}, r"fixed image must have 4 voxels or more .* got \[9, 3, 9\]"),
    ({"fixed": MetaTensor(SMALL, affine=torch.zeros(4, 4))}, "fixed image has an affine that cannot be inverted"),
    ({"fixed_mask": torch.zeros(1, 20, 20, 20)}, "the mask of fixed image is empty"),
    ({"moving_mask": torch.ones(1, 20, 20, 21)}, r"the mask of moving image must have its shape \[1, 20, 20, 20\]"),
    ({"initial": torch.zeros(4, 4)}, "initial must be a finite affine"),
    ({"initial": torch.eye(3)}, "initial must be a finite affine"),
]


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_images_that_cannot_be_registered(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_affine(**{"moving": SMALL, "fixed": SMALL, **arguments})


def test_nothing_in_common() -> None:
    # the moving mask lies where no place of the fixed image comes to
    mask = torch.zeros(1, 20, 20, 20)
    mask[:, 0, 0, 0] = 1
    with pytest.raises(ValueError, match=r"cannot be registered by an affine: neither .* look at the masks") as caught:
        estimate_affine(SMALL, SMALL, moving_mask=mask, angles=(0.0,))
    assert "ITK" not in str(caught.value) and "\n" not in str(caught.value)


ILL_ARGUMENTS = [
    ({"spacings": (2.0, 4.0), "iterations": (5, 5)}, "spacings must be positive and fall"),
    ({"spacings": (4.0, 0.0), "iterations": (5, 5)}, "spacings must be positive and fall"),
    ({"spacings": "coarse"}, "spacings must be finite numbers, got 'coarse'"),
    ({"spacings": ()}, r"spacings must be finite numbers, got \(\)"),
    ({"iterations": (5, 5)}, r"one for each of 3 spacings, got \[5, 5\]"),
    ({"iterations": (5, 5, 0)}, r"whole numbers of at least 1, .* got \[5, 5, 0\]"),
    ({"angles": (float("nan"),)}, r"angles must be finite numbers, got \(nan,\)"),
    ({"num_points": 10}, "num_points must be a whole number of at least 1000, got 10"),
    ({"num_bins": 2.5}, r"num_bins must be a whole number of at least 8, got 2\.5"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"num_threads": True}, "num_threads must be a whole number of at least 1, got True"),
    ({"max_zoom": 1}, "max_zoom must be above 1, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), ILL_ARGUMENTS)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffineRegistration(**arguments)


@pytest.fixture(scope="module")
def raw() -> dict[str, MetaTensor]:
    if not RAW.is_dir():
        pytest.skip("the raw volumes of OASIS-TRT-20 are not in ../shared/data")
    images = {number: read_volume(RAW / f"oasis_trt_{number}_image.nii.gz") for number in ("02", "03")}
    labels = {f"{n} label": read_label_volume(RAW / f"oasis_trt_{n}_label.nii.gz") for n in images}
    return {**images, **labels}


def test_large_affine_of_a_brain_is_undone(raw: dict[str, MetaTensor]) -> None:
    truth = around(places(raw["02"]), [1.0, -2, 0.5], 30, 20, 1.1)
    fixed = moved_copy(raw["02"], truth, (230, 180, 200))
    found = estimate_affine(raw["02"], fixed)
    assert mean_error(found, truth, raw["02"]) < 0.5
    assert mean_error(torch.eye(4, dtype=torch.float64), truth, raw["02"]) > 25


def test_labels_of_two_brains_come_together(raw: dict[str, MetaTensor]) -> None:
    def dice(affine: torch.Tensor) -> float:
        moving, fixed = raw["02 label"], raw["03 label"]
        warped = resample_volume(moving, SpatialMapping([affine]), Grid.of(fixed), mode="nearest")
        sizes = [torch.bincount(x.as_tensor().long().flatten(), minlength=5000) for x in (warped, fixed)]
        same = torch.bincount(fixed.as_tensor()[warped.as_tensor() == fixed.as_tensor()].long(), minlength=5000)
        both = (torch.bincount(moving.as_tensor().long().flatten(), minlength=5000) > 0) & (sizes[1] > 0)
        both[0] = False
        return float((2 * same / (sizes[0] + sizes[1]))[both].mean())

    assert dice(torch.eye(4, dtype=torch.float64)) < 0.1
    assert dice(estimate_affine(raw["02"], raw["03"])) > 0.4
