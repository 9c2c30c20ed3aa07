# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from monai.data import MetaTensor

from monai_sacb.transforms import CheckGridd, CheckPaird, CheckVolumed


def image(shape: tuple[int, ...], value: float | None = None, name: str | None = None) -> MetaTensor:
    array = torch.arange(float(np.prod(shape))).reshape(shape)
    if value is not None:
        array.flatten()[-1] = value
    return MetaTensor(array, meta={} if name is None else {"filename_or_obj": name})


# (arguments, images)
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "volume": ({}, {"image": image((1, 4, 5, 6))}),
    "several channels": ({}, {"image": image((3, 4, 5, 6))}),
    "as many channels as wanted": ({"in_channels": 2}, {"image": image((2, 4, 5, 6))}),
    "slice": ({"spatial_dims": 2}, {"image": image((1, 4, 5))}),
    "row": ({"spatial_dims": 2}, {"image": image((1, 4, 1))}),
    "plain tensor": ({}, {"image": torch.rand(1, 2, 2, 2)}),
    "integers": ({}, {"image": torch.ones(1, 2, 2, 2, dtype=torch.int16)}),
    "negative and huge": ({}, {"image": image((1, 4, 5, 6), -3e38)}),
}


@pytest.mark.parametrize(("arguments", "data"), GOOD.values(), ids=GOOD)
def test_good_images_pass_unchanged(arguments: dict[str, Any], data: dict[str, Any]) -> None:
    checked = CheckVolumed("image", **arguments)(data)
    assert checked is not data and checked.keys() == data.keys()
    assert checked["image"] is data["image"]


def test_only_the_keys_are_looked_at() -> None:
    data = {"image": image((1, 4, 5, 6)), "other": image((1, 2), float("nan"))}
    assert set(CheckVolumed("image")(data)) == {"image", "other"}
    with pytest.raises(ValueError, match="other"):
        CheckVolumed(["image", "other"])(data)


def test_missing_keys() -> None:
    data = {"image": image((1, 4, 5, 6))}
    assert set(CheckVolumed(["image", "label"], allow_missing_keys=True)(data)) == {"image"}
    with pytest.raises(KeyError, match="label"):
        CheckVolumed(["image", "label"])(data)


NAN, INF = float("nan"), float("inf")


def with_affine(diagonal: list[float]) -> MetaTensor:
    return MetaTensor(torch.rand(1, 4, 5, 6), affine=torch.diag(torch.tensor(diagonal, dtype=torch.float64)))


# (arguments, image, message)
ILL_CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "slice": ({}, image((1, 4, 5)), r"^image is a 2-D image of size \(4, 5\); the network needs 3-D"),
    "slice as a volume": ({}, image((1, 4, 5, 1)), r"^image is a 2-D image of size \(4, 5, 1\); .* 3-D"),
    "slice of another axis": ({}, image((1, 1, 5, 4)), r"^image is a 2-D image of size \(1, 5, 4\)"),
    "time series": ({}, image((1, 4, 5, 6, 7)), r"^image is a 4-D image of size \(4, 5, 6, 7\)"),
    "row": ({}, image((1, 4)), r"^image is a 1-D image of size \(4,\)"),
    "volume for a 2-D network": (
        {"spatial_dims": 2},
        image((1, 4, 5, 6)),
        r"3-D image of size \(4, 5, 6\); the network needs 2-D",
    ),
    "channels": ({"in_channels": 1}, image((3, 4, 5, 6)), r"^image has 3 channels; the network needs 1\."),
    "no channels": ({"in_channels": 2}, image((0, 4, 5, 6)), r"has 0 channels; the network needs 2"),
    "NaN": ({}, image((1, 4, 5, 6), NAN), r"^image has 1 NaN or infinite"),
    "infinite": ({}, image((1, 4, 5, 6), INF), r"^image has 1 NaN or infinite"),
    "minus infinite": ({}, image((1, 4, 5, 6), -INF), r"^image has 1 NaN or infinite"),
    "all NaN": ({}, torch.full((1, 2, 3, 4), NAN), r"^image has 24 NaN or infinite"),
    "NaN of a slice": ({"spatial_dims": 2}, image((1, 4, 5), NAN), r"^image has 1 NaN"),
    "no voxels": ({}, image((1, 4, 0, 6)), r"^image has no voxels: its size is \(4, 0, 6\)"),
    "flat affine": ({}, with_affine([1, 1, 0, 1]), r"^image has an affine that cannot be inverted: \[\[1\.0"),
    "affine without numbers": ({}, with_affine([1, NAN, 1, 1]), r"^image has an affine that cannot be inverted.*nan"),
    "with its file": ({}, image((1, 4, 5, 6), NAN, "/d/s.nii.gz"), r"^image '/d/s\.nii\.gz' has 1 NaN"),
    "slice with its file": ({}, image((1, 4, 5), None, "/d/s.png"), r"^image '/d/s\.png' is a 2-D"),
    "channels with its file": ({"in_channels": 1}, image((2, 4, 5, 6), None, "/d/s.mha"), r"^image '/d/s\.mha' has 2"),
}


@pytest.mark.parametrize(("arguments", "bad", "message"), ILL_CASES.values(), ids=ILL_CASES)
def test_bad_images_are_refused(arguments: dict[str, Any], bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckVolumed("image", **arguments)({"image": bad})


@pytest.mark.parametrize(("spacing", "warned"), [((1, 1, 1), False), ((1, 1.005, 1), False), ((1, 2, 1), True)])
def test_voxel_sizes_that_differ(spacing: tuple[float, ...], warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    data = {"moving_image": with_affine([1, 1, 1, 1]), "fixed_image": with_affine([*spacing, 1])}
    assert set(CheckPaird()(data)) == set(data)
    assert ("paired by their indices" in caplog.text) == warned
    assert (
        "moving_image has voxels of [1.0, 1.0, 1.0] mm, but fixed_image of [1.0, 2.0, 1.0]" in caplog.text
    ) == warned


@pytest.mark.parametrize("spatial_dims", [0, 1, 4, -3])
def test_dimensions_of_no_network(spatial_dims: int) -> None:
    with pytest.raises(ValueError, match=rf"got {spatial_dims}"):
        CheckVolumed("image", spatial_dims=spatial_dims)


def pair(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {key: image(shape, name=f"/d/{key}.nii.gz") for key, shape in shapes.items()}


GOOD_PAIRS = {
    "images": pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 4, 5, 6)),
    "other sizes": pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 7, 8, 9)),
    "labels": pair(
        moving_image=(2, 4, 5, 6), fixed_image=(2, 7, 8, 9), moving_label=(1, 4, 5, 6), fixed_label=(1, 7, 8, 9)
    ),
    "one label": pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 7, 8, 9), fixed_label=(1, 7, 8, 9)),
    "slices": pair(moving_image=(1, 4, 5), fixed_image=(1, 5, 4), moving_label=(1, 4, 5)),
}


@pytest.mark.parametrize("data", GOOD_PAIRS.values(), ids=GOOD_PAIRS)
def test_good_pairs_pass_unchanged(data: dict[str, Any]) -> None:
    checked = CheckPaird()(data)
    assert checked is not data and checked.keys() == data.keys()
    assert all(checked[key] is data[key] for key in data)


@pytest.mark.parametrize("points", [torch.rand(7, 3), "points.csv"], ids=["as many", "not loaded"])
def test_points_that_may_be_paired(points: Any) -> None:
    data = pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 4, 5, 6))
    for entries in ({"moving_points": points, "fixed_points": torch.rand(7, 3)}, {"fixed_points": points}):
        assert CheckPaird()({**data, **entries}).keys() == {*data, *entries}


ILL_PAIRS = {
    "channels": (
        pair(moving_image=(1, 4, 5, 6), fixed_image=(3, 4, 5, 6)),
        r"moving_image '/d/moving_image\.nii\.gz' has 1 channels, but fixed_image '/d/fixed_image\.nii\.gz' has 3",
    ),
    "moving label": (
        pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 7, 8, 9), moving_label=(1, 7, 8, 9)),
        r"moving_label '.*moving_label\.nii\.gz' has size \(7, 8, 9\), but moving_image .* has \(4, 5, 6\)",
    ),
    "fixed label": (
        pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 7, 8, 9), fixed_label=(1, 8, 7, 9)),
        r"fixed_label '.*fixed_label\.nii\.gz' has size \(8, 7, 9\), but fixed_image .* has \(7, 8, 9\)",
    ),
    "label of other dimensions": (
        pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 4, 5, 6), fixed_label=(1, 4, 5)),
        r"fixed_label .* has size \(4, 5\), but fixed_image .* has \(4, 5, 6\)",
    ),
    "points": (
        {
            **pair(moving_image=(1, 4, 5, 6), fixed_image=(1, 4, 5, 6)),
            "moving_points": torch.rand(7, 3),
            "fixed_points": torch.rand(8, 3),
        },
        r"moving_image .* has 7 points, but fixed_image .* has 8; they are paired by their order",
    ),
    "without files": (
        {"moving_image": torch.rand(2, 3, 3), "fixed_image": torch.rand(1, 3, 3)},
        r"^moving_image has 2 channels, but fixed_image has 1\.",
    ),
}


@pytest.mark.parametrize(("data", "message"), ILL_PAIRS.values(), ids=ILL_PAIRS)
def test_bad_pairs_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckPaird()(data)


def grid_pair(label_affine: np.ndarray, image_affine: np.ndarray, size: tuple[int, ...] = (4, 5, 6)) -> dict[str, Any]:
    return {
        "image": MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.from_numpy(image_affine)),
        "label": MetaTensor(torch.zeros(1, *size), affine=torch.from_numpy(label_affine)),
    }


def moved(*diagonal: float) -> np.ndarray:
    affine = np.diag([*diagonal, 1.0])
    affine[:3, 3] = 17.0
    return affine


@pytest.mark.parametrize(
    "other", [np.eye(4), moved(1.0, 1.0, 1.0), moved(1.01, 1.0, 0.995)], ids=["same", "origin", "rounding"]
)
def test_label_maps_that_lie_as_their_images(other: np.ndarray) -> None:
    data = grid_pair(other, np.eye(4))
    assert CheckGridd()(data) == data
    assert CheckGridd(allow_missing_keys=True)({"image": data["image"]}).keys() == {"image"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            grid_pair(np.diag([-1.0, -1, 1, 1]), np.eye(4)),
            r"label and image lie differently .*: axes LPS, .* and axes RAS",
        ),
        (grid_pair(np.diag([3.0, 3, 3, 1]), np.eye(4)), r"voxels of 3 x 3 x 3 mm and .* voxels of 1 x 1 x 1 mm"),
        (grid_pair(np.eye(4)[[1, 0, 2, 3]], np.eye(4)), r"axes ARS"),
        (grid_pair(np.eye(4), np.eye(4), (4, 6, 5)), r"different sizes, \(4, 6, 5\) and \(4, 5, 6\)"),
    ],
    ids=["turned", "spacing", "swapped", "size"],
)
def test_label_maps_that_lie_elsewhere(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckGridd()(data)
