# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Orientationd,
    Spacingd,
    SpatialPadd,
)

from monai_sacb.transforms import (
    DDFToDisplacementd,
    FieldOfViewd,
    LoadVolumed,
    PadPaird,
    RestoreGridd,
    WarpByDDFd,
    ddf_to_displacement,
    warp_labels,
)


def rotation(degrees: Sequence[float]) -> np.ndarray:
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        plane = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[np.ix_(plane, plane)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        result = turn @ result
    return result


def affine_of(axcodes: str, spacing: Sequence[float], origin: Sequence[float], degrees: Sequence[float]) -> np.ndarray:
    """Voxels to RAS mm of an image with these axes, turned by three angles."""
    axes = np.zeros((3, 3))
    for column, code in enumerate(axcodes):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        axes[row, column] = 1.0 if code in "RAS" else -1.0
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ axes @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


GEOMETRIES: dict[str, np.ndarray] = {
    "RAS": affine_of("RAS", (1, 1, 1), (0, 0, 0), (0, 0, 0)),
    "LAS": affine_of("LAS", (1, 1, 1), (40, -30, 12), (0, 0, 0)),
    "LPS": affine_of("LPS", (2, 2, 2), (40, 30, -12), (0, 0, 0)),
    "PIR": affine_of("PIR", (1, 1.5, 0.8), (-7, 8, 9), (0, 0, 0)),
    "anisotropic": affine_of("RAS", (0.7, 1.1, 4.0), (-100, 50, 3), (0, 0, 0)),
    "oblique": affine_of("RAS", (1, 1, 1), (5, 6, 7), (10, -15, 20)),
    "oblique ASL": affine_of("ASL", (0.9, 1.2, 2.5), (-5, 60, 7), (-20, 12, 25)),
}


def smooth_field(shape: tuple[int, ...], strength: float = 1.5, seed: int = 0) -> np.ndarray:
    """A random smooth field ``(d, *shape)`` in voxels."""
    noise = np.random.default_rng(seed).standard_normal((len(shape), *shape))
    field = np.stack([gaussian_filter(component, 3) for component in noise])
    return strength * field / field.std()


def image(
    shape: tuple[int, ...], affine: np.ndarray | None = None, seed: int = 0, name: str = "x.nii.gz"
) -> MetaTensor:
    array = np.random.default_rng(seed).random((1, *shape), dtype=np.float32)
    return MetaTensor(
        torch.from_numpy(array),
        affine=torch.from_numpy(np.eye(4) if affine is None else affine),
        meta={"filename_or_obj": name},
    )


def world(affine: Any, voxels: np.ndarray) -> np.ndarray:
    """RAS mm of voxels ``(N, 3)``."""
    return nib.affines.apply_affine(np.asarray(affine), voxels)


# ---- FieldOfViewd ----


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 4, 5, 6), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_mask_is_one_where_the_image_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    affine = torch.from_numpy(GEOMETRIES["oblique"])
    measured = MetaTensor(torch.zeros(shape, dtype=dtype), affine=affine, meta={"filename_or_obj": "x.nii.gz"})
    result = FieldOfViewd("image")({"image": measured, "other": 1})
    assert result.keys() == {"image", "other", "field_of_view"}
    assert result["image"] is measured and not measured.any()
    mask = result["field_of_view"]
    assert mask.dtype == torch.uint8 and tuple(mask.shape) == (1, *shape[1:])
    assert (mask == 1).all()
    assert torch.equal(mask.affine, affine)


def test_mask_is_padded_along() -> None:
    data = FieldOfViewd(
        ["moving_image", "fixed_image", "absent"], ["moving_field_of_view", "fixed_field_of_view", "x"], True
    )({"moving_image": image((4, 9, 6)), "fixed_image": image((7, 5, 6))})
    assert data.keys() == {"moving_image", "fixed_image", "moving_field_of_view", "fixed_field_of_view"}
    padded = PadPaird()(data)
    for role in ("moving", "fixed"):
        assert tuple(padded[f"{role}_field_of_view"].shape) == (1, 7, 9, 6)
        # the images have no voxel that is 0
        assert torch.equal(
            padded[f"{role}_field_of_view"].as_tensor(), (padded[f"{role}_image"].as_tensor() != 0).to(torch.uint8)
        )
        assert torch.equal(padded[f"{role}_field_of_view"].affine, padded[f"{role}_image"].affine)


ILL_MASKS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "two outputs for one key": (lambda: FieldOfViewd("a", ["x", "y"]), ValueError, r"1.*2|'y'"),
    "one output for two keys": (lambda: FieldOfViewd(["a", "b"], ["x"]), ValueError, r"2.*1|'x'"),
    # the second mask would take the place of the first
    "one output name for two keys": (lambda: FieldOfViewd(["a", "b"]), ValueError, r"2.*1|field_of_view"),
    "missing key": (lambda: FieldOfViewd("a")({"b": image((2, 2, 2))}), KeyError, r"a"),
}


@pytest.mark.parametrize(("call", "error", "message"), ILL_MASKS.values(), ids=ILL_MASKS)
def test_ill_formed_masks(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- PadPaird ----

SIZES = {
    "all axes": ((4, 5, 6), (7, 8, 11), (7, 8, 11)),
    "each on its own axis": ((9, 5, 6), (4, 8, 6), (9, 8, 6)),
    "fixed is smaller": ((9, 9, 9), (4, 7, 8), (9, 9, 9)),
    "slices": ((4, 9), (7, 6), (7, 9)),
}


@pytest.mark.parametrize(("moving", "fixed", "expected"), SIZES.values(), ids=SIZES)
def test_padded_about_the_centre(moving: tuple[int, ...], fixed: tuple[int, ...], expected: tuple[int, ...]) -> None:
    affine = GEOMETRIES["oblique ASL"]
    data = {"moving_image": image(moving, affine, 1), "fixed_image": image(fixed, affine, 2)}
    data |= {key.replace("image", "label"): (value > 0.5).to(torch.uint8) for key, value in data.items()}
    padded = PadPaird()({**data, "name": "x"})
    assert padded["name"] == "x"
    for key, before in data.items():
        after = padded[key]
        size = np.array(before.shape[1:])
        assert tuple(after.shape) == (1, *expected)
        assert after.dtype == before.dtype
        # on both sides the same, up to one voxel
        start = np.argwhere(after.numpy()[0] > 0).min(0)
        assert (np.abs(np.array(expected) - size - 2 * start) <= 1).all()
        inside = (slice(None), *(slice(a, a + n) for a, n in zip(start, size)))
        np.testing.assert_array_equal(after.numpy()[inside], before.numpy())
        # zeros outside
        assert after.as_tensor().sum(dtype=torch.float64) == before.as_tensor().sum(dtype=torch.float64)
        if len(size) == 3:
            # every voxel stays where it is in the world
            corner = size - 1
            np.testing.assert_allclose(world(after.affine, start + corner), world(before.affine, corner), atol=1e-9)
    # what belongs together is padded alike
    for role in ("moving", "fixed"):
        both = padded[f"{role}_image"].as_tensor(), padded[f"{role}_label"].as_tensor()
        assert torch.equal((both[0] > 0.5).to(torch.uint8), both[1])
    assert data["moving_image"].shape[1:] == moving and data["fixed_image"].shape[1:] == fixed


def test_pairs_of_one_size_are_left_alone() -> None:
    data = {"moving_image": image((4, 5, 6)), "fixed_image": image((4, 5, 6), seed=1), "fixed_label": "label.nii.gz"}
    padded = PadPaird()(data)
    assert padded is not data and padded.keys() == data.keys()
    assert all(padded[key] is data[key] for key in data)


def test_only_what_is_asked_for_is_padded() -> None:
    data = {
        f"{role}_{key}": image(size)
        for role, size in (("moving", (4, 4, 4)), ("fixed", (6, 6, 6)))
        for key in ("image", "source", "other")
    }
    padded = PadPaird(["image", "source", "absent"])({**data, "moving_label": "not loaded"})
    assert {key: tuple(value.shape) for key, value in padded.items() if not isinstance(value, str)} == {
        "moving_image": (1, 6, 6, 6),
        "moving_source": (1, 6, 6, 6),
        "moving_other": (1, 4, 4, 4),
        "fixed_image": (1, 6, 6, 6),
        "fixed_source": (1, 6, 6, 6),
        "fixed_other": (1, 6, 6, 6),
    }
    assert padded["moving_label"] == "not loaded"


def test_fields_are_padded_with_zeros() -> None:
    data: dict[str, Any] = {"moving_image": image((4, 4, 4)), "fixed_image": image((6, 6, 6))}
    data["moving_ddf"] = torch.ones(3, 4, 4, 4)
    padded = PadPaird(["image", "ddf"])(data)["moving_ddf"]
    assert padded.shape == (3, 6, 6, 6)
    assert padded[:, 1:5, 1:5, 1:5].sum() == padded.sum() == 192


@pytest.mark.parametrize("missing", ["moving_image", "fixed_image"])
def test_a_pair_has_two_images(missing: str) -> None:
    data = {"moving_image": image((4, 4, 4)), "fixed_image": image((6, 6, 6))}
    del data[missing]
    with pytest.raises(KeyError, match=missing):
        PadPaird()(data)


# ---- WarpByDDFd ----


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize(
    ("moving", "fixed"),
    [((11, 13, 12), (11, 13, 12)), ((9, 15, 12), (11, 13, 12)), ((14, 11), (14, 11)), ((16, 9), (14, 11))],
    ids=str,
)
def test_warped_as_scipy_does(moving: tuple[int, ...], fixed: tuple[int, ...], mode: str, padding_mode: str) -> None:
    ddf = smooth_field(fixed)
    data = {
        "moving_image": image(moving, seed=1),
        "fixed_image": image(fixed, GEOMETRIES["oblique"], seed=2, name="fixed.nii.gz"),
        "pred": torch.from_numpy(ddf),
    }
    warped = WarpByDDFd("moving_image", "warped_image", mode=mode, padding_mode=padding_mode)(data)["warped_image"]
    places = np.indices(fixed) + ddf
    expected = map_coordinates(
        data["moving_image"].numpy()[0].astype(np.float64),
        places,
        order=1 if mode == "bilinear" else 0,
        mode="grid-constant" if padding_mode == "zeros" else "nearest",
    )
    # rounding decides between neighbours half way
    clear = np.abs(places % 1 - 0.5).min(0) > 1e-3 if mode == "nearest" else np.ones(fixed, bool)
    assert clear.mean() > 0.9
    np.testing.assert_allclose(warped.numpy()[0][clear], expected[clear], atol=1e-5)
    assert isinstance(warped, MetaTensor)
    np.testing.assert_array_equal(warped.affine, data["fixed_image"].affine)
    assert warped.meta["filename_or_obj"] == "fixed.nii.gz"
    assert warped.dtype == torch.float32


def test_several_keys_with_modes_of_their_own() -> None:
    ddf = torch.zeros(3, 5, 6, 7)
    ddf[1] = 0.75
    label = torch.randint(0, 200, (1, 5, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    two = torch.rand(2, 5, 6, 7)
    data = {"a": two, "b": label, "field": ddf, "fixed_image": image((5, 6, 7))}
    transform = WarpByDDFd(
        ["a", "b", "c"], ["x", "y", "z"], "field", mode=["bilinear", "nearest", "nearest"], allow_missing_keys=True
    )
    result = transform(data)
    assert result.keys() == {*data, "x", "y"}
    torch.testing.assert_close(
        result["x"].as_tensor()[:, :, :-1], 0.25 * two[:, :, :-1] + 0.75 * two[:, :, 1:], atol=1e-5, rtol=0
    )
    assert result["y"].dtype == torch.uint8
    assert torch.equal(result["y"].as_tensor()[:, :, :-1], label[:, :, 1:])
    assert not result["y"].as_tensor()[:, :, -1].any()
    # the input stays what it was
    assert data["a"] is two and set(data) == {"a", "b", "field", "fixed_image"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(14, 13), (11, 13, 12)], ids=str)
def test_labels_warped_as_one_map_each(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = [0, 3, 7, 40]
    noise = gaussian_filter(np.random.default_rng(3).standard_normal(shape), 0.8)
    label = np.array(values)[np.digitize(noise / noise.std(), [-0.7, 0.0, 0.7])]
    ddf = smooth_field(shape, 1.5, seed=4)
    places = np.indices(shape) + ddf
    maps = np.stack(
        [
            map_coordinates((label == v).astype(float), places, order=1, mode="grid-constant", cval=v == 0)
            for v in values
        ]
    )
    expected = np.array(values)[maps.argmax(0)]
    # where two labels are even, rounding decides
    best = np.sort(maps, 0)
    clear = best[-1] - best[-2] > 1e-4
    assert clear.mean() > 0.9
    tensor = torch.from_numpy(label).to(dtype)[None]
    warped = warp_labels(tensor[None], torch.from_numpy(ddf)[None].float())
    assert warped.dtype == dtype and tuple(warped.shape) == (1, 1, *shape)
    np.testing.assert_array_equal(warped[0, 0].numpy()[clear], expected[clear])
    # not what the nearest voxel gives
    nearest = map_coordinates(label, places, order=0, mode="grid-constant")
    assert (nearest != expected)[clear].mean() > 0.03
    reference = image(shape)
    result = WarpByDDFd("l", "w", mode="label")(
        {"l": tensor, "pred": torch.from_numpy(ddf).float(), "fixed_image": reference}
    )
    assert torch.equal(result["w"].as_tensor(), warped[0])
    assert isinstance(result["w"], MetaTensor)


def test_labels_of_a_batch_and_of_another_size() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (3, 1, 7, 8, 9), generator=generator)
    ddf = torch.rand(3, 3, 6, 9, 8, generator=generator) * 4 - 2
    together = warp_labels(label, ddf)
    assert tuple(together.shape) == (3, 1, 6, 9, 8)
    for i in range(3):
        assert torch.equal(together[i : i + 1], warp_labels(label[i : i + 1], ddf[i : i + 1]))
    assert torch.equal(warp_labels(label, torch.zeros(3, 3, 7, 8, 9)), label)


def test_outside_is_background() -> None:
    label = torch.full((1, 1, 4, 4, 4), 5)
    ddf = torch.zeros(1, 3, 4, 4, 4)
    ddf[:, 0] = 0.6
    warped = warp_labels(label, ddf)
    assert (warped[:, :, :3] == 5).all() and not warped[:, :, 3].any()


def test_warped_image_has_a_geometry_of_its_own() -> None:
    data = {"moving_image": image((4, 4, 4)), "fixed_image": image((4, 4, 4), seed=1), "pred": torch.zeros(3, 4, 4, 4)}
    warped = WarpByDDFd("moving_image", "warped_image")(data)["warped_image"]
    warped.affine = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0]))
    warped.meta["filename_or_obj"] = "other.nii.gz"
    np.testing.assert_array_equal(data["fixed_image"].affine, np.eye(4))
    assert data["fixed_image"].meta["filename_or_obj"] == "x.nii.gz"


def test_plain_reference_gives_plain_result() -> None:
    moving = torch.rand(1, 4, 4)
    data = {"moving_image": moving, "fixed_image": torch.rand(1, 4, 4), "pred": torch.zeros(2, 4, 4)}
    warped = WarpByDDFd("moving_image", "warped_image")(data)["warped_image"]
    assert type(warped) is torch.Tensor
    torch.testing.assert_close(warped, moving)


PAIR = {"m": torch.rand(1, 4, 4, 4), "l": torch.rand(1, 4, 4, 4), "fixed_image": image((4, 4, 4))}
ILL_WARPS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one output for two keys": (lambda: WarpByDDFd(["m", "l"], ["w"]), ValueError, r"2.*1|'w'"),
    "one output name for two keys": (lambda: WarpByDDFd(["m", "l"], "w"), ValueError, r"2.*1|w"),
    "two outputs for one key": (lambda: WarpByDDFd("m", ["w", "x"]), ValueError, r"1.*2|'x'"),
    "modes": (lambda: WarpByDDFd(["m", "l"], ["w", "x"], mode=["nearest"] * 3), ValueError, r"2.*3|nearest"),
    "unknown mode": (
        lambda: WarpByDDFd("m", "w", mode="cubic")({**PAIR, "pred": torch.zeros(3, 4, 4, 4)}),
        ValueError,
        r"'cubic'",
    ),
    "unknown padding": (
        lambda: WarpByDDFd("m", "w", padding_mode="wrap")({**PAIR, "pred": torch.zeros(3, 4, 4, 4)}),
        ValueError,
        r"'wrap'",
    ),
    "labels by a field of a slice": (
        lambda: warp_labels(torch.ones(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4)),
        ValueError,
        r"\[1, 2, 4, 4\]",
    ),
    "field of a slice": (
        lambda: WarpByDDFd("m", "w")({**PAIR, "pred": torch.zeros(2, 4, 4)}),
        ValueError,
        r"\[1, 2, 4, 4\]",
    ),
    "no field": (lambda: WarpByDDFd("m", "w")(PAIR), KeyError, r"pred"),
    "no image": (lambda: WarpByDDFd("n", "w")({**PAIR, "pred": torch.zeros(3, 4, 4, 4)}), KeyError, r"n"),
}


@pytest.mark.parametrize(("call", "error", "message"), ILL_WARPS.values(), ids=ILL_WARPS)
def test_ill_formed_warps(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- ddf_to_displacement ----


@pytest.mark.parametrize("moving", GEOMETRIES)
@pytest.mark.parametrize("fixed", GEOMETRIES)
def test_displacement_leads_to_the_partner(fixed: str, moving: str) -> None:
    shape = (5, 6, 7)
    ddf = np.random.default_rng(0).normal(0, 3, (3, *shape))
    affines = torch.from_numpy(GEOMETRIES[fixed]), torch.from_numpy(GEOMETRIES[moving])
    displacement = ddf_to_displacement(torch.from_numpy(ddf), *affines)
    assert displacement.dtype == torch.float32 and tuple(displacement.shape) == ddf.shape
    voxels = np.indices(shape).reshape(3, -1).T
    partners = voxels + ddf.reshape(3, -1).T
    expected = world(affines[1], partners) - world(affines[0], voxels)
    expected[:, :2] *= -1
    np.testing.assert_allclose(displacement.numpy().reshape(3, -1).T, expected, rtol=1e-5, atol=1e-4)


def test_directions_by_hand() -> None:
    ddf = torch.zeros(3, 2, 2, 2)
    ddf[0] = 1.0
    las = torch.from_numpy(GEOMETRIES["LAS"])
    # one voxel along the first axis is 1 mm to the left, which is +x in LPS
    assert ddf_to_displacement(ddf, las, las)[:, 0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    pir = torch.from_numpy(GEOMETRIES["PIR"])
    # ... 1 mm to the back, which is +y
    assert ddf_to_displacement(ddf, pir, pir)[:, 1, 0, 1].tolist() == [0.0, 1.0, 0.0]
    # ... up, 4 mm along the third axis
    spaced = torch.from_numpy(GEOMETRIES["anisotropic"])
    np.testing.assert_allclose(ddf_to_displacement(ddf.flip(0), spaced, spaced)[:, 1, 1, 0], [0, 0, 4], atol=1e-5)


def test_no_displacement_on_one_grid() -> None:
    affine = torch.from_numpy(GEOMETRIES["oblique ASL"])
    assert not ddf_to_displacement(torch.zeros(3, 4, 5, 6), affine, affine).any()
    # on another grid, the places differ
    moved = affine.clone()
    moved[:3, 3] += torch.tensor([1.0, 2.0, 3.0])
    displacement = ddf_to_displacement(torch.zeros(3, 4, 5, 6), affine, moved)
    np.testing.assert_allclose(displacement[:, 2, 3, 4], [-1, -2, 3], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_grids_in_half_precision(dtype: torch.dtype) -> None:
    ddf = torch.zeros(3, 600, 2, 2, dtype=dtype)
    ddf[0] = 0.5
    affine = torch.from_numpy(GEOMETRIES["oblique"])
    exact = ddf_to_displacement(ddf.double(), affine, affine)
    torch.testing.assert_close(ddf_to_displacement(ddf, affine, affine), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5, 6), (1, 3, 4, 5, 6), (4, 4, 5, 6), (3, 4, 5), (4, 5, 6)], ids=str)
def test_what_is_no_field_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        ddf_to_displacement(torch.zeros(shape), torch.eye(4), torch.eye(4))
    assert str(list(shape)) in str(caught.value)
    for affines in ((torch.eye(3), torch.eye(4)), (torch.eye(4), torch.eye(3))):
        with pytest.raises(ValueError, match=r"_affine must have shape \(4, 4\), got \[3, 3\]"):
            ddf_to_displacement(torch.zeros(2, 4, 5), *affines)


def test_displacement_in_a_dictionary() -> None:
    shape = (4, 5, 6)
    data = {
        "moving_image": image((7, 8, 9), GEOMETRIES["LPS"], 1, "m.nii.gz"),
        "fixed_image": image(shape, GEOMETRIES["oblique"], 2, "f.nii.gz"),
        "pred": torch.from_numpy(smooth_field(shape)),
    }
    result = DDFToDisplacementd()(data)
    assert result.keys() == {*data, "displacement"}
    expected = ddf_to_displacement(
        data["pred"], torch.from_numpy(GEOMETRIES["oblique"]), torch.from_numpy(GEOMETRIES["LPS"])
    )
    assert torch.equal(result["displacement"].as_tensor(), expected)
    np.testing.assert_array_equal(result["displacement"].affine, GEOMETRIES["oblique"])
    named = {"u": data["pred"], "a": data["fixed_image"], "b": data["moving_image"]}
    again = DDFToDisplacementd("u", fixed_key="a", moving_key="b", output_key="v")(named)
    assert torch.equal(again["v"].as_tensor(), expected)


# ---- RestoreGridd ----

NATIVE = (10, 13, 12)
PREPROCESSING: dict[str, list[Callable]] = {
    "nothing": [],
    "turned": [Orientationd("image", "RAS", labels=None)],
    "turned another way": [Orientationd("image", "PIL", labels=None)],
    "padded": [SpatialPadd("image", (16, 16, 17))],
    "turned and padded": [Orientationd("image", "RAS", labels=None), SpatialPadd("image", (16, 17, 19))],
}


def preprocessed(folder: Path, array: np.ndarray, geometry: str, steps: Sequence[Callable]) -> MetaTensor:
    path = folder / "fixed.nii.gz"
    nib.save(nib.Nifti1Image(array, GEOMETRIES[geometry]), path)
    return Compose([LoadVolumed("image"), EnsureChannelFirstd("image"), *steps])({"image": str(path)})["image"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("steps", PREPROCESSING.values(), ids=PREPROCESSING)
def test_the_very_voxels_come_back(tmp_path: Path, geometry: str, steps: list[Callable], mode: str) -> None:
    array = np.random.default_rng(0).random(NATIVE, dtype=np.float32) + 1
    fixed = preprocessed(tmp_path, array, geometry, steps)
    if steps and geometry == "PIR":
        # something was done to it
        assert fixed.shape[1:] != NATIVE or not np.array_equal(fixed[0].numpy(), array)
    result = RestoreGridd("warped", mode=mode)({"warped": fixed.clone(), "fixed_image": fixed})
    restored = result["warped"]
    assert tuple(restored.shape) == (1, *NATIVE)
    np.testing.assert_allclose(restored.numpy()[0], array, atol=1e-6)
    if mode == "nearest":
        np.testing.assert_array_equal(restored.numpy()[0], array)
    np.testing.assert_allclose(restored.affine, GEOMETRIES[geometry], atol=1e-6)
    assert restored.meta["filename_or_obj"] == str(tmp_path / "fixed.nii.gz")
    # the reference stays on the working grid
    assert result["fixed_image"] is fixed


@pytest.mark.parametrize("geometry", ["LPS", "oblique ASL"])
@pytest.mark.parametrize(("mode", "dtype"), [("nearest", torch.uint8), ("nearest", torch.int32)], ids=str)
def test_label_maps_keep_type_and_values(tmp_path: Path, geometry: str, mode: str, dtype: torch.dtype) -> None:
    labels = np.random.default_rng(0).integers(0, 250, NATIVE).astype(np.int16)
    fixed = preprocessed(tmp_path, labels, geometry, PREPROCESSING["turned and padded"])
    label = fixed.to(dtype)
    restored = RestoreGridd("label", mode=mode)({"label": label, "fixed_image": fixed})["label"]
    assert restored.dtype == dtype
    np.testing.assert_array_equal(restored.numpy()[0], labels)


def test_several_keys_with_modes_of_their_own_and_missing_ones(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random(NATIVE, dtype=np.float32) + 1
    crop = [Orientationd("image", "RAS", labels=None), CenterSpatialCropd("image", (6, 6, 6))]
    fixed = preprocessed(tmp_path, array, "LPS", crop)
    transform = RestoreGridd(
        ["zeros", "absent", "border"],
        mode=["bilinear", "nearest", "bilinear"],
        padding_mode=["zeros", "zeros", "border"],
        allow_missing_keys=True,
    )
    vectors = MetaTensor(torch.cat([fixed.as_tensor()] * 3) * torch.tensor([1, 2, 3]).view(3, 1, 1, 1), meta=fixed.meta)
    result = transform({"zeros": fixed.clone(), "border": vectors, "fixed_image": fixed})
    assert result.keys() == {"zeros", "border", "fixed_image"}
    zeros, border = result["zeros"].numpy()[0], result["border"].numpy()
    kept = zeros > 0.5
    assert kept.sum() == 6**3
    np.testing.assert_allclose(zeros[kept], array[kept], atol=1e-6)
    # components are not mixed, and the edge goes on outside
    assert border.shape == (3, *NATIVE)
    np.testing.assert_allclose(border[1:], border[:1] * np.array([2, 3]).reshape(2, 1, 1, 1), rtol=1e-5)
    np.testing.assert_allclose(border[0][kept], array[kept], atol=1e-6)
    assert (border[0] >= 1).all()
    first = np.argwhere(kept).min(0)
    np.testing.assert_allclose(border[0][0, 0, 0], array[tuple(first)], atol=1e-5)


@pytest.mark.parametrize("geometry", ["RAS", "LAS", "oblique", "oblique ASL"])
@pytest.mark.parametrize("pixdim", [(1.5, 1.5, 1.5), (0.8, 1.0, 2.0)], ids=str)
def test_resampled_fields_come_back(tmp_path: Path, geometry: str, pixdim: tuple[float, ...]) -> None:
    fixed = preprocessed(
        tmp_path,
        np.random.default_rng(0).random(NATIVE, dtype=np.float32),
        geometry,
        [Orientationd("image", "RAS", labels=None), Spacingd("image", pixdim), CropForegroundd("image", "image")],
    )
    # linear in the world: sampling twice changes nothing
    matrix = np.random.default_rng(1).normal(0, 0.3, (3, 3))
    voxels = np.indices(fixed.shape[1:]).reshape(3, -1).T
    field = (world(fixed.affine, voxels) @ matrix.T).T.reshape(3, *fixed.shape[1:])
    displacement = MetaTensor(torch.from_numpy(field).float(), meta=dict(fixed.meta))
    restored = RestoreGridd("u", padding_mode="border")({"u": displacement, "fixed_image": fixed})["u"]
    native = np.indices(NATIVE).reshape(3, -1).T
    expected = (world(GEOMETRIES[geometry], native) @ matrix.T).T.reshape(3, *NATIVE)
    inner = (slice(None), *[slice(3, -3)] * 3)
    np.testing.assert_allclose(restored.numpy()[inner], expected[inner], atol=2e-3)
    np.testing.assert_allclose(restored.affine, GEOMETRIES[geometry], atol=1e-6)


@pytest.mark.parametrize("reference", [torch.zeros(1, 4, 5, 6), MetaTensor(torch.zeros(1, 4, 5, 6))])
def test_restore_grid_needs_the_file(reference: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"fixed_image must carry .* it has no \[.*'original_affine'"):
        RestoreGridd("u")({"u": MetaTensor(torch.zeros(3, 4, 5, 6)), "fixed_image": reference})


ILL_GRIDS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "modes": (lambda: RestoreGridd(["a", "b"], mode=["nearest"] * 3), ValueError, r"2.*3"),
    "padding modes": (lambda: RestoreGridd(["a", "b"], padding_mode=["zeros"]), ValueError, r"2.*1"),
    "missing key": (
        lambda: RestoreGridd("a")(
            {
                "fixed_image": MetaTensor(
                    torch.zeros(1, 2, 2, 2),
                    meta={"spatial_shape": [2, 2, 2], "original_affine": np.eye(4), "filename_or_obj": "f"},
                )
            }
        ),
        KeyError,
        r"a",
    ),
    "missing reference": (lambda: RestoreGridd("a")({"a": image((2, 2, 2))}), KeyError, r"fixed_image"),
}


@pytest.mark.parametrize(("call", "error", "message"), ILL_GRIDS.values(), ids=ILL_GRIDS)
def test_ill_formed_grids(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
