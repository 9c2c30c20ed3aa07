# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import (
    Compose,
    CopyItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Orientationd,
    ScaleIntensityd,
    SpatialPadd,
)

from monai_sacb.data import PairDataset
from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.transforms import (
    DDFToDisplacementd,
    LoadVolumed,
    PadPaird,
    RestoreGridd,
    SaveRegistrationd,
    WarpByDDFd,
    save_displacement,
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


STRAIGHT = (0, 0, 0)
RAS = affine_of("RAS", (1, 1, 1), (0, 0, 0), STRAIGHT)
LAS = affine_of("LAS", (1, 1, 1), (40, -30, 12), STRAIGHT)
LPS = affine_of("LPS", (2, 2, 2), (40, 30, -12), STRAIGHT)
PIR = affine_of("PIR", (1, 1.5, 0.8), (-7, 8, 9), STRAIGHT)
ASL = affine_of("ASL", (1, 1, 1), (-90, 120, 60), STRAIGHT)
ANISOTROPIC = affine_of("RAS", (0.7, 1.1, 4.0), (-100, 50, 3), STRAIGHT)
OBLIQUE = affine_of("RAS", (1, 1, 1), (5, 6, 7), (10, -15, 20))
OBLIQUE_ASL = affine_of("ASL", (0.9, 1.2, 2.5), (-5, 60, 7), (-20, 12, 25))

# sizes and affines of the moving and the fixed file, size that the working grid is padded to
PAIRS: dict[str, tuple[tuple[int, ...], np.ndarray, tuple[int, ...], np.ndarray, int]] = {
    "RAS": ((18, 20, 16), RAS, (18, 20, 16), RAS, -1),
    "LAS": ((18, 20, 16), LAS, (18, 20, 16), LAS, -1),
    "LPS": ((18, 20, 16), LPS, (18, 20, 16), LPS, -1),
    "PIR": ((18, 20, 16), PIR, (18, 20, 16), PIR, -1),
    "anisotropic": ((18, 20, 16), ANISOTROPIC, (18, 20, 16), ANISOTROPIC, -1),
    "oblique": ((18, 20, 16), OBLIQUE, (18, 20, 16), OBLIQUE, -1),
    "oblique ASL": ((18, 20, 16), OBLIQUE_ASL, (18, 20, 16), OBLIQUE_ASL, -1),
    "padded": ((18, 20, 16), LPS, (18, 20, 16), LPS, 24),
    "sizes": ((17, 20, 18), RAS, (20, 18, 15), RAS, -1),
    "sizes, padded": ((17, 20, 18), LAS, (20, 18, 15), LAS, 23),
    "LPS to RAS": ((18, 20, 16), LPS, (18, 20, 16), RAS, -1),
    "oblique to LAS, sizes": ((17, 20, 18), OBLIQUE, (20, 18, 15), LAS, -1),
    "anisotropic to ASL, sizes": ((18, 16, 17), ANISOTROPIC, (20, 18, 15), ASL, -1),
    "PIR to oblique ASL, sizes, padded": ((17, 20, 18), PIR, (19, 16, 21), OBLIQUE_ASL, 24),
}


def smooth(shape: tuple[int, ...], sigma: float, seed: int) -> np.ndarray:
    """Random and smooth, of mean 0 and standard deviation 1."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return (noise - noise.mean()) / noise.std()


class KnownField(torch.nn.Module):
    """In the place of a network: a smooth field of some voxels, whatever the images are."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        field = np.stack([1.2 * smooth(tuple(image.shape[2:]), 3.0, seed) for seed in (11, 12, 13)])
        return torch.from_numpy(field[None]).float()


def write_pair(
    folder: Path,
    moving: tuple[tuple[int, ...], np.ndarray],
    fixed: tuple[tuple[int, ...], np.ndarray],
    extension: str = ".nii.gz",
) -> list[dict[str, str]]:
    """Images with texture, and label maps of a few regions."""
    subjects = []
    for seed, (name, (shape, affine)) in enumerate((("mov", moving), ("fix", fixed))):
        texture = smooth(shape, 1.0, seed)
        arrays = {
            "image": (500 + 100 * texture).astype(np.int16),
            "label": np.digitize(smooth(shape, 2.0, seed + 5), [-0.8, 0.0, 0.8]).astype(np.uint8),
        }
        subject = {}
        for key, array in arrays.items():
            subject[key] = str(folder / f"{name}_{key}{extension}")
            nifti = str(folder / f"{name}_{key}.nii.gz")
            nib.save(nib.Nifti1Image(array, affine), nifti)
            if extension != ".nii.gz":
                itk.imwrite(itk.imread(nifti), subject[key])
        subjects.append(subject)
    return subjects


def register(subjects: list[dict[str, str]], output_dir: Path, spatial_size: int = -1) -> None:
    """From files to files, as the bundle's inference does it."""
    keys = ["image", "label"]
    preprocessing = Compose(
        [
            LoadVolumed(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            CopyItemsd("image", names="source"),
            ScaleIntensityd("image"),
            SpatialPadd(["image", "source", "label"], [spatial_size] * 3),
            EnsureTyped(["image", "source"], dtype=torch.float32),
        ]
    )
    pair_transform = PadPaird(["image", "source", "label"])
    dataset = PairDataset(subjects, preprocessing, [(0, 1)], pair_transform, cache_rate=0.0, progress=False)
    results = ["warped_image", "warped_label", "displacement"]
    postprocessing = Compose(
        [
            WarpByDDFd(["moving_source", "moving_label"], results[:2], mode=["bilinear", "nearest"]),
            DDFToDisplacementd(),
            RestoreGridd(results, mode=["bilinear", "nearest", "bilinear"], padding_mode=["zeros", "zeros", "border"]),
            SaveRegistrationd(output_dir),
        ]
    )
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1),
        network=KnownField(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=postprocessing,
    ).run()


def resampled_by_itk(moving: str, field: str, interpolator: Any) -> np.ndarray:
    """The moving file resampled through the field, on the grid of the field's file, axes as in nibabel."""
    displacement = itk.imread(field, itk.Vector[itk.F, 3])
    vectors = itk.image_from_array(itk.array_from_image(displacement).astype(np.float64), is_vector=True)
    vectors.CopyInformation(displacement)
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(vectors)
    image = itk.imread(moving, itk.F)
    kind = type(image)
    resample = itk.ResampleImageFilter[kind, kind].New(
        Input=image, Transform=transform, Interpolator=interpolator[kind, itk.D].New()
    )
    resample.SetOutputParametersFromImage(displacement)
    resample.Update()
    return np.asarray(itk.array_from_image(resample.GetOutput())).T


def warped_by_itk(moving: str, field: str) -> np.ndarray:
    """The same by the filter that takes a field as such."""
    displacement = itk.imread(field, itk.Vector[itk.F, 3])
    image = itk.imread(moving, itk.F)
    warp = itk.WarpImageFilter[type(image), type(image), type(displacement)].New(
        Input=image, DisplacementField=displacement
    )
    warp.SetOutputParametersFromImage(displacement)
    warp.Update()
    return np.asarray(itk.array_from_image(warp.GetOutput())).T


def places(folder: Path, moving: nib.Nifti1Image) -> np.ndarray:
    """Where in the moving file, in voxels ``(D, H, W, 3)``, the written field sends each fixed voxel."""
    field = nib.load(folder / "displacement.nii.gz")
    vectors = np.asarray(field.dataobj)[:, :, :, 0].astype(np.float64) * [-1, -1, 1]
    voxels = np.moveaxis(np.indices(vectors.shape[:3]), 0, -1)
    world = nib.affines.apply_affine(field.affine, voxels) + vectors
    return nib.affines.apply_affine(np.linalg.inv(moving.affine), world)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_itk_gets_the_same_picture_from_the_written_field(tmp_path: Path, pair: Any) -> None:
    moving_shape, moving_affine, fixed_shape, fixed_affine, spatial_size = pair
    moving, fixed = write_pair(tmp_path, (moving_shape, moving_affine), (fixed_shape, fixed_affine))
    register([moving, fixed], tmp_path / "out", spatial_size)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "mov_image_to_fix_image"
    assert sorted(os.listdir(folder)) == ["displacement.nii.gz", "warped.nii.gz", "warped_label.nii.gz"]
    field = str(folder / "displacement.nii.gz")
    written = {name: nib.load(folder / f"{name}.nii.gz") for name in ("warped", "warped_label", "displacement")}
    # on the grid of the fixed file
    for image in written.values():
        assert image.shape[:3] == fixed_shape
        np.testing.assert_allclose(image.affine, fixed_affine, atol=1e-4)
    # interior: the partner's neighbours are all in the moving file
    partners = places(folder, nib.load(moving["image"]))
    inside = ((partners > 0.01) & (partners < np.array(moving_shape) - 1.01)).all(-1)
    assert inside.mean() > 0.35
    warped = np.asarray(written["warped"].dataobj)
    original = np.asarray(nib.load(moving["image"]).dataobj).astype(np.float64)
    for by_itk in (
        resampled_by_itk(moving["image"], field, itk.LinearInterpolateImageFunction),
        warped_by_itk(moving["image"], field),
    ):
        np.testing.assert_allclose(warped[inside], by_itk[inside], atol=1e-4 * np.ptp(original))
    # the images have texture: a field half a voxel off would not do
    assert warped[inside].std() > 50
    if moving_shape == fixed_shape:
        assert np.abs(warped - original)[inside].mean() > 30
    # labels agree where rounding is not a matter of chance
    label = np.asarray(written["warped_label"].dataobj)
    by_itk = resampled_by_itk(moving["label"], field, itk.NearestNeighborInterpolateImageFunction)
    clear = inside & (np.abs(partners % 1 - 0.5).min(-1) > 0.01)
    assert clear.sum() > 0.9 * inside.sum()
    np.testing.assert_array_equal(label[clear], by_itk[clear])
    assert label.dtype == np.uint8 and set(np.unique(label[clear])) == {0, 1, 2, 3}


@pytest.mark.parametrize("extension", [".nii", ".mha", ".nrrd"])
def test_other_formats(tmp_path: Path, extension: str) -> None:
    moving, fixed = write_pair(tmp_path, ((17, 20, 18), OBLIQUE), ((20, 18, 15), LPS), extension)
    register([moving, fixed], tmp_path / "out")
    folder = tmp_path / "out" / "mov_image_to_fix_image"
    warped = nib.load(folder / "warped.nii.gz")
    assert warped.shape == (20, 18, 15)
    np.testing.assert_allclose(warped.affine, LPS, atol=1e-4)
    field = str(folder / "displacement.nii.gz")
    by_itk = resampled_by_itk(moving["image"], field, itk.LinearInterpolateImageFunction)
    partners = places(folder, nib.load(tmp_path / "mov_image.nii.gz"))
    inside = ((partners > 0.01) & (partners < np.array((17, 20, 18)) - 1.01)).all(-1)
    assert inside.mean() > 0.35
    np.testing.assert_allclose(np.asarray(warped.dataobj)[inside], by_itk[inside], atol=0.1)


def test_header_of_a_field(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(0, 5, (3, 4, 5, 6)).astype(np.float32)
    save_displacement(torch.from_numpy(vectors), torch.from_numpy(OBLIQUE_ASL), tmp_path / "deep" / "field.nii.gz")
    assert os.listdir(tmp_path / "deep") == ["field.nii.gz"]
    image = nib.load(tmp_path / "deep" / "field.nii.gz")
    assert image.shape == (4, 5, 6, 1, 3)
    assert int(image.header["intent_code"]) == 1007
    assert image.header["dim"][:6].tolist() == [5, 4, 5, 6, 1, 3]
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, OBLIQUE_ASL, atol=1e-5)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(image.dataobj)[:, :, :, 0], -1, 0), vectors)
    # and what ITK makes of it
    read = itk.imread(str(tmp_path / "deep" / "field.nii.gz"), itk.Vector[itk.F, 3])
    assert list(itk.size(read)) == [4, 5, 6]
    np.testing.assert_array_equal(np.asarray(itk.array_from_image(read)).T, vectors)
    np.testing.assert_allclose(list(itk.spacing(read)), np.linalg.norm(OBLIQUE_ASL[:3, :3], axis=0), rtol=1e-5)
    lps = np.diag([-1, -1, 1])
    np.testing.assert_allclose(list(itk.origin(read)), lps @ OBLIQUE_ASL[:3, 3], rtol=1e-5)
    directions = lps @ OBLIQUE_ASL[:3, :3] / np.linalg.norm(OBLIQUE_ASL[:3, :3], axis=0)
    np.testing.assert_allclose(itk.array_from_matrix(read.GetDirection()), directions, atol=1e-5)


@pytest.mark.parametrize("name", ["field.nii", "field.nii.gz"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32], ids=str)
def test_types_and_extensions(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    vectors = torch.arange(3.0 * 8).reshape(3, 2, 2, 2).to(dtype).requires_grad_()
    save_displacement(vectors, torch.eye(4), str(tmp_path / name))
    image = nib.load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[1, 0, 1, 0], [5.0, 13.0, 21.0])
    assert image.get_data_dtype() == np.float32
    assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5, 6), (1, 3, 4, 5, 6), (4, 5, 6, 3), (2, 4, 5)], ids=str)
def test_ill_formed_fields(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        save_displacement(torch.zeros(shape), torch.eye(4), tmp_path / "out" / "field.nii.gz")
    assert str(list(shape)) in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_field_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    field = torch.zeros(3, 4, 5, 6)
    field[1, 2] = value
    with pytest.raises(ValueError, match="displacement must be finite, got 30 NaN or infinite values"):
        save_displacement(field, torch.eye(4), tmp_path / "field.nii.gz")
    data = {key: MetaTensor(torch.zeros(1, 4, 5, 6)) for key in ("moving_image", "fixed_image", "warped_image")}
    with pytest.raises(ValueError, match="displacement must be finite"):
        SaveRegistrationd(tmp_path)({**data, "displacement": MetaTensor(field)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None) -> None:
    target = tmp_path / "field.nii.gz"
    if old is not None:
        target.write_bytes(old)
    save = nib.save

    def failing(image: Any, path: Path) -> None:
        save(image, path)
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        save_displacement(torch.zeros(3, 2, 2, 2), torch.eye(4), target)
    assert os.listdir(tmp_path) == ([] if old is None else ["field.nii.gz"])
    assert old is None or target.read_bytes() == old


def item(names: tuple[str | None, str | None] = ("/d/a.nii.gz", "/d/b.nii.gz"), **entries: Any) -> dict[str, Any]:
    images = [MetaTensor(torch.rand(1, 2, 2, 2), meta={} if n is None else {"filename_or_obj": n}) for n in names]
    return {"moving_image": images[0], "fixed_image": images[1], **entries}


def on_grid(array: Any, affine: np.ndarray = LPS) -> MetaTensor:
    return MetaTensor(torch.as_tensor(array), affine=torch.from_numpy(affine))


CONTENTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "image": ({"warped_image": on_grid(torch.rand(1, 4, 5, 6))}, ["warped.nii.gz"]),
    "label": ({"warped_label": on_grid(torch.ones(1, 4, 5, 6))}, ["warped_label.nii.gz"]),
    "field": ({"displacement": on_grid(torch.rand(3, 4, 5, 6))}, ["displacement.nii.gz"]),
    "image and field": (
        {"warped_image": on_grid(torch.rand(1, 4, 5, 6)), "displacement": on_grid(torch.rand(3, 4, 5, 6))},
        ["displacement.nii.gz", "warped.nii.gz"],
    ),
}


@pytest.mark.parametrize(("entries", "files"), CONTENTS.values(), ids=CONTENTS)
def test_as_far_as_the_entries_exist(tmp_path: Path, entries: dict[str, Any], files: list[str]) -> None:
    data = item(**entries)
    result = SaveRegistrationd(tmp_path / "out")(data)
    assert result is not data and all(result[key] is data[key] for key in data) and len(result) == len(data)
    folder = tmp_path / "out" / "a_to_b"
    assert (sorted(os.listdir(folder)) if files else os.listdir(tmp_path)) == files
    for key, name in (("warped_image", "warped"), ("warped_label", "warped_label")):
        if key in entries:
            image = nib.load(folder / f"{name}.nii.gz")
            assert image.shape == (4, 5, 6)
            np.testing.assert_array_equal(np.asarray(image.dataobj), entries[key].numpy()[0])
            np.testing.assert_allclose(image.affine, LPS)
    if "displacement" in entries:
        array = np.asarray(nib.load(folder / "displacement.nii.gz").dataobj)
        np.testing.assert_array_equal(np.moveaxis(array[:, :, :, 0], -1, 0), entries["displacement"].numpy())
    umask = os.umask(0)
    os.umask(umask)
    assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~umask for name in files)


def test_keys_can_be_named(tmp_path: Path) -> None:
    data = {
        "m": item()["moving_image"],
        "f": item()["fixed_image"],
        "w": on_grid(torch.rand(1, 2, 3, 4)),
        "warped_image": on_grid(torch.rand(1, 2, 2, 2)),
        "u": on_grid(torch.rand(3, 2, 3, 4)),
        "l": on_grid(torch.ones(1, 2, 3, 4)),
    }
    SaveRegistrationd(str(tmp_path), "w", "l", "u", "m", "f")(data)
    assert nib.load(tmp_path / "a_to_b" / "warped.nii.gz").shape == (2, 3, 4)
    assert sorted(os.listdir(tmp_path / "a_to_b")) == ["displacement.nii.gz", "warped.nii.gz", "warped_label.nii.gz"]


def test_several_channels_are_the_fourth_axis(tmp_path: Path) -> None:
    array = torch.rand(2, 3, 4, 5)
    SaveRegistrationd(tmp_path)(item(warped_image=on_grid(array)))
    image = nib.load(tmp_path / "a_to_b" / "warped.nii.gz")
    assert image.shape == (3, 4, 5, 2)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., 1], array[1])


# label map, label_ids -> values and type in the file
LABELS: dict[str, tuple[list[float], list[int] | None, list[int], type]] = {
    "small": ([0, 1, 3], None, [0, 1, 3], np.uint8),
    "up to 255": ([0, 255], None, [0, 255], np.uint8),
    "large": ([0, 256, 2035], None, [0, 256, 2035], np.int32),
    "negative": ([-1, 0, 5], None, [-1, 0, 5], np.int32),
    "not quite whole": ([0.9999999, 2.0000002, 0], None, [1, 2, 0], np.uint8),
    "numbered back": ([0, 1, 2, 3, 2], [17, 4, 53], [0, 17, 4, 53, 4], np.uint8),
    "numbered back to large ones": ([0, 1, 2], [1035, 2035], [0, 1035, 2035], np.int32),
    "numbered back, one absent": ([0, 2], [1035, 7], [0, 7], np.uint8),
}


@pytest.mark.parametrize(("label", "label_ids", "expected", "dtype"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("tensor_dtype", [torch.float32, torch.float64], ids=str)
def test_label_values(
    tmp_path: Path,
    label: list[float],
    label_ids: list[int] | None,
    expected: list[int],
    dtype: type,
    tensor_dtype: torch.dtype,
) -> None:
    tensor = torch.tensor(label, dtype=tensor_dtype).reshape(1, -1, 1, 1)
    SaveRegistrationd(tmp_path, label_ids=label_ids)(item(warped_label=on_grid(tensor)))
    image = nib.load(tmp_path / "a_to_b" / "warped_label.nii.gz")
    assert image.get_data_dtype() == dtype
    assert np.asarray(image.dataobj).ravel().tolist() == expected


NAMES: dict[str, tuple[list[tuple[str | None, str | None]], list[str]]] = {
    "pairs": (
        [("/d/a.nii.gz", "/d/b.nii.gz"), ("/d/b.nii.gz", "/d/a.nii.gz"), ("/d/a.nii.gz", "/d/c.mha")],
        ["a_to_b", "b_to_a", "a_to_c"],
    ),
    "same pair again": ([("/d/a.nii", "/d/b.nii")] * 3, ["a_to_b"] * 3),
    "same names in other folders": (
        [
            ("/1/t1.nii.gz", "/2/t1.nii.gz"),
            ("/2/t1.nii.gz", "/1/t1.nii.gz"),
            ("/1/t1.nii.gz", "/3/t1.nii.gz"),
            ("/1/t1.nii.gz", "/2/t1.nii.gz"),
            ("/2/t1.nii.gz", "/1/t1.nii.gz"),
        ],
        ["t1_to_t1", "t1_to_t1_2", "t1_to_t1_3", "t1_to_t1", "t1_to_t1_2"],
    ),
    "a real name that looks like a number of ours": (
        [("/1/a.nii", "/2/b.nii"), ("/3/a.nii", "/2/b.nii"), ("/1/a.nii", "/2/b_2.nii"), ("/3/a.nii", "/2/b.nii")],
        ["a_to_b", "a_to_b_2", "a_to_b_2_2", "a_to_b_2"],
    ),
    "no names": ([(None, None), ("", "/d/b.nii")], ["moving_to_fixed", "moving_to_b"]),
}


@pytest.mark.parametrize(("files", "folders"), NAMES.values(), ids=NAMES)
def test_each_pair_has_a_folder_of_its_own(
    tmp_path: Path, files: list[tuple[str | None, str | None]], folders: list[str]
) -> None:
    save = SaveRegistrationd(tmp_path)
    for number, (names, folder) in enumerate(zip(files, folders)):
        save(item(names, warped_image=on_grid(torch.full((1, 2, 2, 2), float(number)))))
        assert np.asarray(nib.load(tmp_path / folder / "warped.nii.gz").dataobj).max() == number
    assert sorted(os.listdir(tmp_path)) == sorted(set(folders))
    last = {folder: number for number, folder in enumerate(folders)}
    for folder, number in last.items():
        assert np.asarray(nib.load(tmp_path / folder / "warped.nii.gz").dataobj).max() == number


@pytest.mark.parametrize("missing", ["moving_image", "fixed_image"])
def test_pair_without_an_image(tmp_path: Path, missing: str) -> None:
    data = item(warped_image=on_grid(torch.rand(1, 2, 2, 2)))
    del data[missing]
    with pytest.raises(KeyError, match=missing):
        SaveRegistrationd(tmp_path)(data)


def test_ill_formed_field_in_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[2, 4, 5\]"):
        SaveRegistrationd(tmp_path)(item(displacement=on_grid(torch.zeros(2, 4, 5))))
    assert os.listdir(tmp_path) == []
