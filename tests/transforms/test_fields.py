# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from geometries import GEOMETRIES
from scipy.ndimage import gaussian_filter, map_coordinates

from monai.data import MetaTensor
from monai.transforms import Compose, DeleteItemsd

from monai_sacb.networks.layers import exponential, warp
from monai_sacb.transforms import ComposeDDFd, InvertDDFd, MaskDDFd, WarpByDDFd

FIXED, MOVING = (torch.from_numpy(GEOMETRIES[name]) for name in ("LIA", "oblique ASL"))


def smooth_field(shape: tuple[int, ...], seed: int = 0, strength: float = 0.8) -> torch.Tensor:
    """A random smooth field ``(d, *shape)`` in voxels."""
    noise = np.random.default_rng(seed).standard_normal((len(shape), *shape))
    field = np.stack([gaussian_filter(component, 3) for component in noise])
    return torch.from_numpy(strength * field / field.std()).float()


def still_at_the_border(shape: tuple[int, ...], strength: float = 0.9) -> torch.Tensor:
    """A smooth velocity ``(1, d, *shape)`` under which nothing leaves the grid."""
    velocity = smooth_field(shape, strength=strength)
    for axis, size in enumerate(shape, start=1):
        window = torch.sin(torch.arange(size) * np.pi / (size - 1))
        velocity = velocity * window.view(-1, *[1] * (velocity.dim() - 1 - axis))
    return velocity[None]


def linear_field(matrix: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """The field of ``p -> matrix (p - c) + c`` with c the centre of the grid."""
    centre = (np.array(shape) - 1).reshape(-1, *[1] * len(shape)) / 2
    voxels = np.indices(shape) - centre
    return torch.from_numpy(np.einsum("ij,j...->i...", matrix, voxels) - voxels).float()


def shrinking(dims: int, seed: int) -> np.ndarray:
    """A linear map that does not lead out of the grid."""
    return 0.8 * np.eye(dims) + 0.05 * np.random.default_rng(seed).standard_normal((dims, dims))


# ---- ComposeDDFd ----


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("shape", [(12, 14), (10, 12, 14)], ids=str)
def test_linear_maps_are_multiplied(shape: tuple[int, ...], number: int) -> None:
    matrices = [shrinking(len(shape), seed) for seed in range(number)]
    keys = ["a", "b", "c"][:number]
    data: dict[str, Any] = {key: linear_field(matrix, shape) for key, matrix in zip(keys, matrices)}
    data["a"] = MetaTensor(data["a"], affine=FIXED, meta={"filename_or_obj": "f"})
    before = {key: value.clone() for key, value in data.items()}
    result = ComposeDDFd(keys, "total")(data)
    assert result.keys() == {*keys, "total"} and data.keys() == set(keys)
    product, reverse = np.eye(len(shape)), np.eye(len(shape))
    for matrix in matrices:
        product, reverse = matrix @ product, reverse @ matrix
    total = result["total"]
    torch.testing.assert_close(total.as_tensor(), linear_field(product, shape), atol=1e-4, rtol=0)
    assert number == 1 or (total.as_tensor() - linear_field(reverse, shape)).abs().max() > 0.02
    assert torch.equal(total.affine, FIXED) and total.meta["filename_or_obj"] == "f"
    assert all(torch.equal(data[key], before[key]) for key in data)


def test_warping_once_is_warping_by_the_last_first() -> None:
    shape = (24, 20, 22)
    image = torch.from_numpy(gaussian_filter(np.random.default_rng(9).random(shape), 2)).float()[None]
    data = {"first": smooth_field(shape, 0), "second": smooth_field(shape, 1), "image": image, "fixed_image": image}
    data = Compose(
        [
            ComposeDDFd(["first", "second"]),
            WarpByDDFd("image", "once"),
            WarpByDDFd("image", "between", "second"),
            WarpByDDFd("between", "twice", "first"),
            WarpByDDFd("image", "between", "first"),
            WarpByDDFd("between", "other_order", "second"),
        ]
    )(data)
    inner = (0, *[slice(5, -5)] * 3)
    error = (data["once"] - data["twice"])[inner].abs().max()
    assert error < 0.15 * (data["once"] - image)[inner].abs().max()
    assert error < 0.3 * (data["once"] - data["other_order"])[inner].abs().max()


def test_what_lies_outside_the_grid() -> None:
    data = {"a": torch.full((2, 4, 4), 9.0), "b": torch.full((2, 4, 4), 2.0)}
    assert (ComposeDDFd(["a", "b"])(data)["pred"] == 11).all()
    assert (ComposeDDFd(["a", "b"], padding_mode="zeros")(data)["pred"] == 9).all()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_types(dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype) -> None:
    ddf = ComposeDDFd(["a", "b"])({key: torch.ones(3, 4, 5, 6, dtype=d) for key, d in zip("ab", dtypes)})["pred"]
    assert ddf.dtype == expected and (ddf == 2).all()


# what of the two fields there is
INCOMPLETE: dict[str, dict[str, Any]] = {
    "no fields": {},
    "only the first": {"a": torch.ones(3, 4, 4, 4)},
    "only the second": {"b": torch.ones(3, 4, 4, 4)},
    "paths": {"a": "a.nii.gz", "b": "b.nii.gz"},
    "one path": {"a": torch.ones(3, 4, 4, 4), "b": "b.nii.gz"},
}


@pytest.mark.parametrize("fields", INCOMPLETE.values(), ids=INCOMPLETE)
def test_nothing_to_compose(fields: dict[str, Any]) -> None:
    data = {"image": 1, **fields}
    assert ComposeDDFd(["a", "b"], allow_missing_keys=True)(data) == data
    with pytest.raises((KeyError, ValueError), match=r"Key `[ab]`|[ab] must be a field .* got '[ab].nii.gz'"):
        ComposeDDFd(["a", "b"])(data)


# ---- InvertDDFd ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (18, 20, 16)], ids=str)
def test_linear_maps_are_inverted(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # stretching, so that the inverse does not lead out of the grid
    matrix = np.linalg.inv(shrinking(len(shape), 0))
    data = {"pred": linear_field(matrix, shape).to(dtype), "moving_image": MetaTensor(torch.rand(1, *shape))}
    inverse = InvertDDFd(num_steps=60)(data)["inverse_ddf"]
    assert inverse.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    expected = linear_field(np.linalg.inv(matrix), shape).to(inverse.dtype)
    atol = 0.02 if dtype == torch.float16 else 1e-4
    torch.testing.assert_close(inverse.as_tensor(), expected, atol=atol, rtol=0)


def test_exponential_of_the_negative_is_the_oracle(caplog: pytest.LogCaptureFixture) -> None:
    velocity = still_at_the_border((24, 20, 22))
    data = {"pred": exponential(velocity)[0], "other": exponential(-velocity)[0], "m": torch.rand(1, 24, 20, 22)}
    result = InvertDDFd(["pred", "other"], ["back", "forth"], moving_key="m")(data)
    for name, expected in (("back", data["other"]), ("forth", data["pred"])):
        error = (result[name] - expected).norm(dim=0)
        assert error.mean() < 0.02 and error.max() < 0.2 < 1 < expected.norm(dim=0).max()
    assert not caplog.records


def test_geometry_is_the_moving_images() -> None:
    moving = MetaTensor(torch.rand(1, 6, 7, 8), affine=MOVING, meta={"filename_or_obj": "m.nii.gz"})
    ddf = MetaTensor(torch.full((3, 6, 7, 8), 0.25), affine=FIXED)
    inverse = InvertDDFd()({"pred": ddf, "moving_image": moving})["inverse_ddf"]
    assert torch.equal(inverse.affine, MOVING) and inverse.meta["filename_or_obj"] == "m.nii.gz"
    assert (inverse.as_tensor() == -0.25).all()
    inverse.meta["filename_or_obj"] = "other"
    assert moving.meta["filename_or_obj"] == "m.nii.gz"
    own = InvertDDFd(moving_key=None)({"pred": ddf})["inverse_ddf"]
    assert torch.equal(own.affine, FIXED)
    plain = InvertDDFd(moving_key=None)({"pred": ddf.as_tensor()})["inverse_ddf"]
    assert type(plain) is torch.Tensor


def test_fixed_image_comes_to_lie_on_the_moving_one() -> None:
    shape = (24, 20, 22)
    moving = torch.from_numpy(gaussian_filter(np.random.default_rng(9).random(shape), 3)).float()[None]
    ddf = exponential(still_at_the_border(shape))
    fixed = warp(moving[None], ddf)[0]
    result = InvertDDFd()({"pred": ddf[0], "moving_image": moving})
    places = np.indices(shape) + result["inverse_ddf"].numpy()
    back = map_coordinates(fixed[0].numpy(), places, order=1)
    inner = tuple([slice(5, -5)] * 3)
    assert np.abs(back - moving[0].numpy())[inner].mean() < 0.3 * np.abs(fixed - moving)[0].numpy()[inner].mean()


def test_folds_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ddf = torch.zeros(2, 16, 16)
    ddf[0] = 6 * torch.sin(torch.arange(16.0))[:, None]
    with caplog.at_level(logging.WARNING):
        InvertDDFd(moving_key=None)({"pred": ddf})
    assert "the inverse of pred is off by more than 0.1 voxels at" in caplog.text


# ---- MaskDDFd ----


def test_masked_voxels_do_not_count() -> None:
    label = torch.zeros(1, 5, 6, 7, dtype=torch.uint8)
    label[0, 1:3, 2, 3:6] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    data = {"a": MetaTensor(torch.full((3, 5, 6, 7), 0.75), affine=FIXED), "fixed_label": label}
    ddf = MaskDDFd("a")(data)["a"]
    assert torch.equal(torch.isfinite(ddf.as_tensor()), (label > 0).expand(3, -1, -1, -1))
    assert (ddf.as_tensor()[torch.isfinite(ddf.as_tensor())] == 0.75).all()
    assert torch.equal(ddf.affine, FIXED) and (data["a"] == 0.75).all()
    other = MaskDDFd("a", "mask")({"a": data["a"], "mask": 1 - label.clamp(max=1)})["a"]
    assert torch.equal(torch.isfinite(other.as_tensor()[0]), label[0] == 0)


def test_no_mask_and_no_field() -> None:
    data = {"a": torch.ones(2, 4, 5)}
    with pytest.raises(KeyError, match="fixed_label"):
        MaskDDFd("a")(data)
    assert MaskDDFd("a", allow_missing_keys=True)(data) == data
    assert MaskDDFd("b", allow_missing_keys=True)({"fixed_label": 1}) == {"fixed_label": 1}


def test_the_true_field_of_the_sample() -> None:
    """As the bundle makes it: each subject has a field to the template and its inverse."""
    shape = (10, 12, 14)
    names = [f"{role}_{kind}" for role in ("moving", "fixed") for kind in ("ddf", "inverse_ddf")]
    data: dict[str, Any] = {name: torch.full((3, *shape), 50.0) for name in names}
    to_template, to_moving = shrinking(3, 0), shrinking(3, 1)
    data["fixed_ddf"], data["moving_inverse_ddf"] = (linear_field(m, shape) for m in (to_template, to_moving))
    label = (torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8)
    transform = Compose(
        [
            ComposeDDFd(["fixed_ddf", "moving_inverse_ddf"], "true_ddf", allow_missing_keys=True),
            MaskDDFd("true_ddf", "fixed_label", allow_missing_keys=True),
            DeleteItemsd(names),
        ]
    )
    result = transform({**data, "fixed_label": label})
    assert result.keys() == {"fixed_label", "true_ddf"}
    expected = torch.where(label > 0, linear_field(to_moving @ to_template, shape), torch.nan)
    torch.testing.assert_close(result["true_ddf"], expected, atol=1e-4, rtol=0, equal_nan=True)
    assert transform({**dict.fromkeys(names, "path"), "fixed_label": label}).keys() == {"fixed_label"}
    assert transform({}) == {}


FIELD = torch.zeros(3, 4, 4, 4)
ILL_ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "grids": (
        lambda: ComposeDDFd(["a", "b"])({"a": FIELD, "b": torch.zeros(3, 4, 4, 5)}),
        r"one grid.*'a': \[3, 4, 4, 4\], 'b': \[3, 4, 4, 5\]",
    ),
    "slice and volume": (lambda: ComposeDDFd(["a", "b"])({"a": FIELD, "b": torch.zeros(2, 4, 4)}), r"\[2, 4, 4\]"),
    "a batch": (lambda: ComposeDDFd(["a", "b"])({"a": FIELD, "b": FIELD[None]}), r"b must be a field.*\[1, 3, 4, 4"),
    "an image": (lambda: ComposeDDFd(["a", "b"])({"a": FIELD[:1], "b": FIELD}), r"a must be a field.*\[1, 4, 4, 4\]"),
    "padding": (lambda: ComposeDDFd(["a", "b"], padding_mode="wrap")({"a": FIELD, "b": FIELD}), r"'wrap'"),
    "outputs": (lambda: InvertDDFd(["a", "b"], "c"), r"one output key"),
    "no steps": (lambda: InvertDDFd(num_steps=0), r"num_steps must be a whole number of at least 1, got 0"),
    "half a step": (lambda: InvertDDFd(num_steps=1.5), r"got 1\.5"),  # type: ignore[arg-type]
    "a truth for a number": (lambda: InvertDDFd(num_steps=True), r"got True"),
    "no field": (lambda: InvertDDFd(moving_key=None)({"pred": "x.nii.gz"}), r"pred must be a field.*'x.nii.gz'"),
    "moving image of another size": (
        lambda: InvertDDFd()({"pred": FIELD, "moving_image": torch.zeros(1, 4, 4, 5)}),
        r"moving_image must have the size of the field pred, \[4, 4, 4\], got \[4, 4, 5\]",
    ),
    "mask of another size": (
        lambda: MaskDDFd("a")({"a": FIELD, "fixed_label": torch.zeros(1, 4, 5, 4)}),
        r"fixed_label must be \[1, 4, 4, 4\], on the grid of a, got \[1, 4, 5, 4\]",
    ),
    "mask of two channels": (
        lambda: MaskDDFd("a")({"a": FIELD, "fixed_label": torch.zeros(2, 4, 4, 4)}),
        r"got \[2, 4, 4, 4\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), ILL_ARGUMENTS.values(), ids=ILL_ARGUMENTS)
def test_ill_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "transform", [ComposeDDFd(["a"]), InvertDDFd("a"), MaskDDFd("a")], ids=lambda t: type(t).__name__
)
def test_missing_keys(transform: Any) -> None:
    data = {"fixed_label": torch.ones(1, 4, 4), "moving_image": torch.ones(1, 4, 4)}
    with pytest.raises(KeyError, match="a"):
        transform(data)
    transform.allow_missing_keys = True
    assert transform(data).keys() == data.keys()
