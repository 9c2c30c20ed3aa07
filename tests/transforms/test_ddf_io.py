# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter

from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, Rotate90d, SpatialPadd

from monai_sacb.data.spatial_mapping import PhysicalField, SpatialMapping
from monai_sacb.data.transform_files import write_transform
from monai_sacb.transforms import LoadDDFd, LoadVolumed, SaveDDFd, WarpByDDFd

SHAPE = (12, 14, 13)
EXTENSIONS = [".nii", ".nii.gz", ".h5"]


def smooth(shape: tuple[int, ...], sigma: float, seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return (noise - noise.mean()) / noise.std()


def field(shape: tuple[int, ...] = SHAPE, strength: float = 0.9) -> torch.Tensor:
    return torch.from_numpy(np.stack([strength * smooth(shape, 3, seed) for seed in range(len(shape))])).float()


def pair(
    moving: np.ndarray, fixed: np.ndarray, moving_shape: tuple[int, ...] = SHAPE, fixed_shape: tuple[int, ...] = SHAPE
) -> dict[str, Any]:
    return {
        f"{role}_image": MetaTensor(
            torch.from_numpy(smooth(shape, 1, seed)).float()[None],
            affine=torch.from_numpy(affine),
            meta={"filename_or_obj": f"/d/{role[:3]}.nii.gz"},
        )
        for seed, (role, shape, affine) in enumerate(
            (("moving", moving_shape, moving), ("fixed", fixed_shape, fixed)), 11
        )
    }


def resampled_by_itk(moving: Path, fixed: Path, transform: Path) -> np.ndarray:
    """The moving file resampled through a transform's file on the grid of the fixed file, axes as in nibabel."""
    if transform.name.endswith(".h5"):
        (mapping,) = itk.transformread(str(transform))
    else:
        displacement = itk.imread(str(transform), itk.Vector[itk.F, 3])
        vectors = itk.image_from_array(itk.array_from_image(displacement).astype(np.float64), is_vector=True)
        vectors.CopyInformation(displacement)
        mapping = itk.DisplacementFieldTransform[itk.D, 3].New()
        mapping.SetDisplacementField(vectors)
    image = itk.imread(str(moving), itk.F)
    resample = itk.ResampleImageFilter[type(image), type(image)].New(Input=image, Transform=mapping)
    resample.SetOutputParametersFromImage(itk.imread(str(fixed), itk.F))
    resample.Update()
    return np.asarray(itk.array_from_image(resample.GetOutput())).T


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("moving", GEOMETRIES)
@pytest.mark.parametrize("fixed", GEOMETRIES)
def test_round_trip(tmp_path: Path, fixed: str, moving: str, extension: str) -> None:
    data = pair(GEOMETRIES[moving], GEOMETRIES[fixed], (11, 15, 12))
    data["pred"] = field()
    saved = SaveDDFd(tmp_path, extension=extension, path_keys="path")(data)
    assert saved["path"] == str(tmp_path / "mov_to_fix" / f"pred{extension}") and saved["pred"] is data["pred"]
    assert os.listdir(tmp_path / "mov_to_fix") == [f"pred{extension}"]
    loaded = LoadDDFd("path")(saved)["path"]
    assert loaded.dtype == torch.float32 and loaded.is_contiguous()
    torch.testing.assert_close(loaded.as_tensor(), data["pred"], rtol=0, atol=1e-4)
    assert torch.equal(loaded.affine, data["fixed_image"].affine)
    assert loaded.meta["filename_or_obj"] == "/d/fix.nii.gz"


@pytest.mark.parametrize("extension", [".nii.gz", ".h5"])
@pytest.mark.parametrize(
    ("fixed", "moving"),
    [*((name, name) for name in GEOMETRIES), ("RAS", "oblique"), ("oblique ASL", "LIA"), ("LIA", "oblique ASL")],
)
def test_itk_gets_the_same_picture(tmp_path: Path, fixed: str, moving: str, extension: str) -> None:
    shapes = {"moving": (14, 13, 15), "fixed": SHAPE}
    data: dict[str, Any] = {}
    for seed, (role, name) in enumerate((("moving", moving), ("fixed", fixed))):
        data[f"{role}_image"] = str(tmp_path / f"{role}.nii.gz")
        array = smooth(shapes[role], 1, seed).astype(np.float32)
        nib.save(nib.Nifti1Image(array, GEOMETRIES[name]), data[f"{role}_image"])
    keys = ["moving_image", "fixed_image"]
    # the fixed image's array as in its file, the moving image's turned
    data = Compose([LoadVolumed(keys), EnsureChannelFirstd(keys), Orientationd(keys[:1], "RAS", labels=None)])(data)
    data["pred"] = field()
    data = Compose([WarpByDDFd("moving_image", "warped"), SaveDDFd(tmp_path, extension=extension, path_keys="p")])(data)
    by_itk = resampled_by_itk(tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz", Path(data["p"]))
    places = np.indices(SHAPE) + data["pred"].numpy()
    last = np.array(data["moving_image"].shape[1:]).reshape(3, 1, 1, 1) - 1
    inside = ((places > 0.01) & (places < last - 0.01)).all(0)
    assert inside.mean() > 0.5
    warped, original = data["warped"][0].numpy(), data["moving_image"][0].numpy()
    np.testing.assert_allclose(warped[inside], by_itk[inside], atol=1e-3 * np.ptp(original))
    # the images have texture: a field with an axis or a sign wrong would not do
    assert warped[inside].std() > 0.5


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_images_may_have_moved_on(tmp_path: Path, extension: str) -> None:
    """Saved before and loaded after both images were turned and padded, each in a way of its own."""
    data = pair(GEOMETRIES["oblique ASL"], GEOMETRIES["LIA"])
    data["pred"] = field()
    data = SaveDDFd(tmp_path, extension=extension, path_keys="path")(data)
    turn = Compose(
        [
            Orientationd(["fixed_image"], "RAS", labels=None),
            SpatialPadd("fixed_image", (17, 18, 16)),
            Rotate90d("moving_image", 1, (0, 2)),
            SpatialPadd("moving_image", (19, 18, 17)),
        ]
    )
    turned = LoadDDFd("path")(turn({key: data[key] for key in ("moving_image", "fixed_image", "path")}))
    ddf = turned["path"]
    assert ddf.shape == (3, 17, 18, 16) and torch.equal(ddf.affine, turned["fixed_image"].affine)
    # each voxel of the grid that the file has, found again: its partner is at the same place in space
    voxels = np.moveaxis(np.indices(SHAPE), 0, -1).reshape(-1, 3)
    partners = apply_affine(GEOMETRIES["oblique ASL"], voxels + data["pred"].flatten(1).T.numpy())
    world = apply_affine(GEOMETRIES["LIA"], voxels)
    now = apply_affine(np.linalg.inv(turned["fixed_image"].affine.numpy()), world)
    np.testing.assert_allclose(now, now.round(), atol=1e-3)
    now = now.round().astype(int)
    moved = now + ddf.as_tensor().numpy()[(slice(None), *now.T)].T
    np.testing.assert_allclose(apply_affine(turned["moving_image"].affine.numpy(), moved), partners, atol=2e-3)
    # and the picture stays the same
    before = WarpByDDFd("moving_image", "w")(data)["w"][0].numpy().reshape(-1)
    after = WarpByDDFd("moving_image", "w", "path")(turned)["w"][0].numpy()[tuple(now.T)]
    places = voxels + data["pred"].flatten(1).T.numpy()
    inside = ((places > 0.01) & (places < np.array(SHAPE) - 1.01)).all(1)
    np.testing.assert_allclose(after[inside], before[inside], atol=2e-3)


def test_outside_the_grid_of_the_file_nothing_is_displaced(tmp_path: Path) -> None:
    affine = GEOMETRIES["oblique"]
    data = pair(affine, affine)
    data["pred"] = torch.full((3, *SHAPE), 0.75)
    data = SaveDDFd(tmp_path, path_keys="path")(data)
    ddf = LoadDDFd("path")(SpatialPadd(["moving_image", "fixed_image"], (16, 18, 17))(data))["path"].as_tensor()
    inner = torch.zeros(16, 18, 17, dtype=torch.bool)
    inner[2:-2, 2:-2, 2:-2] = True
    torch.testing.assert_close(ddf[:, inner], torch.full_like(ddf[:, inner], 0.75), rtol=0, atol=1e-4)
    assert ddf[:, ~inner].abs().max() < 1e-4


@pytest.mark.parametrize("extension", [".h5", ".tfm"])
def test_affine_and_composite_transforms(tmp_path: Path, extension: str) -> None:
    fixed, moving = (torch.from_numpy(GEOMETRIES[name]) for name in ("LIA", "oblique"))
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3] += 0.05 * torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4)))
    vectors = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1, 1).expand(3, *SHAPE).contiguous()
    stages = [affine] if extension == ".tfm" else [PhysicalField(vectors, fixed), affine]
    write_transform(SpatialMapping(stages), tmp_path / f"t{extension}")
    data = {**pair(moving.numpy(), fixed.numpy()), "t": tmp_path / f"t{extension}"}
    ddf = LoadDDFd("t")(data)["t"].as_tensor().numpy()
    voxels = np.moveaxis(np.indices(SHAPE), 0, -1)
    shift = np.array([0.0, 0, 0] if extension == ".tfm" else [1.0, -2.0, 0.5])
    partners = apply_affine(affine.numpy(), apply_affine(fixed.numpy(), voxels) + shift)
    expected = apply_affine(np.linalg.inv(moving.numpy()), partners) - voxels
    np.testing.assert_allclose(np.moveaxis(ddf, 0, -1), expected, atol=1e-3)
    assert np.abs(ddf).max() > 1


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("geometry", ["RAS", "oblique ASL"])
def test_slices(tmp_path: Path, geometry: str, extension: str) -> None:
    affine = GEOMETRIES[geometry]
    data = pair(affine, affine, (9, 12), (10, 11))
    data["pred"] = field((10, 11))
    saved = SaveDDFd(tmp_path, extension=extension, path_keys="path")(data)
    loaded = LoadDDFd("path")(saved)["path"]
    assert loaded.shape == (2, 10, 11) and torch.equal(loaded.affine, data["fixed_image"].affine)
    torch.testing.assert_close(loaded.as_tensor(), data["pred"], rtol=0, atol=1e-4)


def test_a_mapping_may_not_lead_out_of_the_slice(tmp_path: Path) -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[2, 3] = 0.5
    write_transform(SpatialMapping([affine]), tmp_path / "t.tfm")
    data = {**pair(np.eye(4), np.eye(4), (9, 12), (9, 12)), "t": str(tmp_path / "t.tfm")}
    with pytest.raises(ValueError, match=r"t '.*t\.tfm' leads out of the slice by up to 0\.5 of its thickness"):
        LoadDDFd("t")(data)


def test_several_fields_and_pairs(tmp_path: Path) -> None:
    save = SaveDDFd(tmp_path, ["a", "b", "c"], path_keys=["pa", "pb", "pc"], allow_missing_keys=True)
    data = {**pair(np.eye(4), np.eye(4)), "a": field(), "b": -field()}
    saved = save(data)
    assert saved.keys() == {*data, "pa", "pb"}
    assert sorted(os.listdir(tmp_path / "mov_to_fix")) == ["a.nii.gz", "b.nii.gz"]
    loaded = LoadDDFd(["pa", "pb", "pc"], allow_missing_keys=True)(saved)
    assert torch.equal(loaded["pa"], -loaded["pb"]) and loaded["pa"].abs().max() > 1
    # other files with the same names
    other = pair(np.eye(4), np.eye(4))
    for image in other.values():
        image.meta["filename_or_obj"] = image.meta["filename_or_obj"].replace("/d/", "/e/")
    save({**other, "a": field()})
    assert os.listdir(tmp_path / "mov_to_fix_2") == ["a.nii.gz"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    data = {**pair(np.eye(4), np.eye(4)), "pred": field().to(dtype).requires_grad_()}
    loaded = LoadDDFd("path")(SaveDDFd(tmp_path, path_keys="path")(data))["path"]
    torch.testing.assert_close(loaded.as_tensor(), data["pred"].detach().float(), rtol=0, atol=1e-5)


PAIR = pair(np.eye(4), np.eye(4))
PLAIN = {key: value.as_tensor() for key, value in PAIR.items()}
ILL_ARGUMENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "extension": (lambda p: SaveDDFd(p, extension=".mha"), r"extension must be one of .* got '\.mha'"),
    "paths": (lambda p: SaveDDFd(p, ["a", "b"], path_keys="c"), r"one output key"),
    "no field": (lambda p: SaveDDFd(p)({**PAIR, "pred": PAIR["fixed_image"]}), r"pred must be a field.*\[1, 12"),
    "NaN": (lambda p: SaveDDFd(p)({**PAIR, "pred": field() * torch.nan}), r"must be finite, got 6552 NaN"),
    "NaN in a transform": (
        lambda p: SaveDDFd(p, extension=".h5")({**PAIR, "pred": field() * torch.nan}),
        r"must be finite, got 6552 NaN",
    ),
    "size": (
        lambda p: SaveDDFd(p)({**PAIR, "pred": torch.zeros(3, 4, 5, 6)}),
        r"fixed_image '/d/fix.nii.gz' must have the size of the field pred, \[4, 5, 6\], got \[12, 14, 13\]",
    ),
    "no affine": (lambda p: SaveDDFd(p)({**PLAIN, "pred": field()}), r"fixed_image must be an image .* its affine"),
    "no affine to load by": (lambda p: LoadDDFd()({**PLAIN, "pred": str(p / "x.h5")}), r"fixed_image must be an image"),
    "loaded already": (lambda p: LoadDDFd()({**PAIR, "pred": field()}), r"pred must be the path.*got Tensor"),
    "no file": (lambda p: LoadDDFd()({**PAIR, "pred": str(p / "x.nii.gz")}), r"cannot read .*x\.nii\.gz'"),
    "no transform": (lambda p: LoadDDFd()({**PAIR, "pred": str(p / "x.h5")}), r"cannot read .*x\.h5'"),
    "another format": (lambda p: LoadDDFd()({**PAIR, "pred": str(p / "x.png")}), r"cannot read .*x\.png'"),
}


@pytest.mark.parametrize(("call", "message"), ILL_ARGUMENTS.values(), ids=ILL_ARGUMENTS)
def test_ill_arguments(tmp_path: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("make", [lambda p: SaveDDFd(p), lambda p: LoadDDFd()], ids=["save", "load"])
def test_missing_keys(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    with pytest.raises(KeyError, match="pred"):
        make(tmp_path)(PAIR)
