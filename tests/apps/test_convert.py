# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Fields carry points to the same places in each form, by ITK's account where it reads the form."""

from __future__ import annotations

import inspect
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from itk_oracle import AFFINE, GRIDS, itk_composite, itk_field, itk_points, smooth, smooth_field

from monai_sacb.apps.convert_field import FIELD_KINDS, convert
from monai_sacb.data.displacement_files import read_displacement, write_displacement
from monai_sacb.data.spatial_mapping import PhysicalField, SpatialMapping
from monai_sacb.data.transform_files import write_transform
from monai_sacb.data.voxel_fields import load_learn2reg_field

FIXED, MOVING = (12, 10, 11), (9, 11, 10)
NAMES = {"itk_nifti": "f.nii.gz", "itk_h5": "f.h5", "voxel": "f.nii", "learn2reg": "f.npz"}
GEOMETRIES = [("oblique ASL anisotropic", "LAS"), ("RAS", "oblique"), ("LPS anisotropic", "LPS anisotropic")]


def image(path: Path, shape: tuple[int, ...], name: str) -> str:
    nib.save(nib.Nifti1Image(smooth(shape), GRIDS[name]), path)
    return str(path)


def voxels_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape, (50, 3))


def partners(path: Path, kind: str, fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Where voxels of the fixed grid go, RAS millimetres, by ITK or, for fields in voxels, by hand."""
    voxels = voxels_of(FIXED)
    places = voxels @ fixed[:3, :3].T + fixed[:3, 3]
    if kind == "itk_h5":
        return itk_points(itk.transformread(str(path))[0], places)
    if kind == "itk_nifti":
        return itk_points(itk_field(read_displacement(path)), places)
    ddf = load_learn2reg_field(path).numpy() if kind == "learn2reg" else None
    array = np.moveaxis(ddf, 0, -1) if ddf is not None else np.asarray(nib.load(path).dataobj)
    there = voxels + array[tuple(voxels.T)]
    return there @ moving[:3, :3].T + moving[:3, 3]


@pytest.mark.parametrize("source", FIELD_KINDS)
@pytest.mark.parametrize("target", FIELD_KINDS)
@pytest.mark.parametrize(("fixed", "moving"), GEOMETRIES)
def test_from_each_kind_to_each(tmp_path: Path, fixed: str, moving: str, source: str, target: str) -> None:
    images = {
        "fixed": image(tmp_path / "fixed.nii.gz", FIXED, fixed),
        "moving": image(tmp_path / "moving.nii.gz", MOVING, moving),
    }
    field = smooth_field(FIXED, GRIDS[fixed], 2.0)
    start, first, second = tmp_path / "d.nii.gz", tmp_path / "1" / NAMES[source], tmp_path / "2" / NAMES[target]
    write_displacement(field, start)
    assert convert(str(start), str(first), target=source, **images) == str(first)
    convert(str(first), str(second), source=source, target=target, **images)
    back = tmp_path / "back.nii"
    convert(str(second), str(back), source=target, target="itk_nifti", **images)
    voxels = voxels_of(FIXED)
    expected = voxels @ GRIDS[fixed][:3, :3].T + GRIDS[fixed][:3, 3] + field.vectors[(slice(None), *voxels.T)].numpy().T
    # Learn2Reg's archives are float16: 1/64 voxel where they are 16 to 32 voxels
    rough = "learn2reg" in (source, target)
    affines = GRIDS[fixed], GRIDS[moving]
    for path, kind in ((first, source), (second, target), (back, "itk_nifti")):
        assert np.abs(partners(path, kind, *affines) - expected).max() < (0.3 if rough else 1e-3), kind
    if not rough:
        torch.testing.assert_close(read_displacement(back).vectors, field.vectors, rtol=0, atol=1e-3)


def test_learn2reg_of_full_precision(tmp_path: Path) -> None:
    field = smooth_field(FIXED, GRIDS["oblique"], 2.0)
    fixed = image(tmp_path / "fixed.nii.gz", FIXED, "oblique")
    write_displacement(field, tmp_path / "d.nii.gz")
    convert(str(tmp_path / "d.nii.gz"), str(tmp_path / "l.nii.gz"), target="learn2reg")
    assert (nib.load(tmp_path / "l.nii.gz").affine == np.eye(4)).all()
    convert(str(tmp_path / "l.nii.gz"), str(tmp_path / "back.nii"), "learn2reg", "itk_nifti", fixed)
    found = read_displacement(tmp_path / "back.nii")
    torch.testing.assert_close(found.vectors, field.vectors, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.affine, field.affine, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("target", ["itk_nifti", "voxel", "learn2reg"])
def test_stages_become_one_field(tmp_path: Path, target: str) -> None:
    """On the grid of the fixed image, or of the field where points go through it first."""
    name = "oblique"
    field = smooth_field(FIXED, GRIDS[name], 2.0)
    fixed = image(tmp_path / "fixed.nii.gz", FIXED, name)
    affine = torch.from_numpy(AFFINE)
    voxels = voxels_of(FIXED)
    places = voxels @ GRIDS[name][:3, :3].T + GRIDS[name][:3, 3]
    orders: list[tuple[list[torch.Tensor | PhysicalField], str | None]] = [
        ([field, affine], None),
        ([field, affine], fixed),
        ([affine, field], fixed),
        ([affine], fixed),
    ]
    for stages, image_file in orders:
        write_transform(SpatialMapping(stages), tmp_path / "t.h5")
        output = tmp_path / "out.nii.gz"
        convert(str(tmp_path / "t.h5"), str(output), target=target, fixed=image_file)
        composite = itk_composite(*[s.numpy() if isinstance(s, torch.Tensor) else s for s in stages])
        expected = itk_points(composite, places)
        found = partners(output, target, GRIDS[name], GRIDS[name])
        assert np.abs(found - expected).max() < 1e-3
    for stages in ([affine, field], [affine]):
        write_transform(SpatialMapping(stages), tmp_path / "t.h5")
        with pytest.raises(ValueError, match=r"does not begin with a field .* fixed must be the fixed image's file\.$"):
            convert(
                str(tmp_path / "t.h5"), str(tmp_path / "no.nii"), target=target if target != "learn2reg" else "voxel"
            )
    assert not (tmp_path / "no.nii").exists()


def test_affines_between_their_files(tmp_path: Path) -> None:
    write_transform(SpatialMapping([torch.from_numpy(AFFINE)]), tmp_path / "a.h5")
    convert(str(tmp_path / "a.h5"), str(tmp_path / "a.tfm"))
    points = np.random.default_rng(0).uniform(-50, 50, (20, 3))
    found = itk_points(itk.transformread(str(tmp_path / "a.tfm"))[0], points)
    np.testing.assert_allclose(found, points @ AFFINE[:3, :3].T + AFFINE[:3, 3], atol=1e-6)


def test_arguments_are_words_for_a_command_line() -> None:
    names = list(inspect.signature(convert).parameters)
    assert names == ["input", "output", "source", "target", "fixed", "moving"]


BAD = {
    "source": ({"source": "ants"}, r"source must be one of itk_nifti, itk_h5, voxel, learn2reg, got 'ants'"),
    "target": ({"target": "ants"}, r"target must be one of .*, got 'ants'"),
    "no target": ({"output": "o.nii.gz"}, r"does not tell its kind; target must be one of"),
    "ending": ({"target": "voxel", "output": "o.npz"}, r"kind voxel must be written to .nii or .nii.gz, got output"),
    "mat": ({"output": "o.mat"}, r"kind itk_h5 must be written to .h5 or"),
    "vectors": ({"output": "o.mha"}, r"kind itk_nifti must be written to"),
    "in voxels": ({"input": "v.nii.gz"}, r"is in voxels, .* source must say 'voxel' or 'learn2reg'"),
    "scalar": ({"input": "fixed.nii.gz"}, r"are not those of a vector image"),
    "unknown": ({"input": "x.txt.zip"}, r"has an ending of no kind of field; source must be one of"),
    "junk": ({"input": "junk.nii"}, r"cannot read input .*, which may be damaged"),
    "wrong source": ({"source": "voxel"}, r"is not \(D, H, W, 3\)"),
    "no fixed": ({"source": "learn2reg", "input": "v.nii.gz"}, r"does not know its grid; fixed must be"),
    "other fixed": (
        {"source": "voxel", "input": "v.nii.gz", "fixed": "small.nii.gz"},
        r"must have shape \(3, D, H, W\)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    field = smooth_field(FIXED, GRIDS["RAS"])
    write_displacement(field, tmp_path / "d.nii.gz")
    convert(str(tmp_path / "d.nii.gz"), str(tmp_path / "v.nii.gz"), target="voxel")
    image(tmp_path / "fixed.nii.gz", FIXED, "RAS")
    image(tmp_path / "small.nii.gz", MOVING, "RAS")
    for name in ("x.txt.zip", "junk.nii"):
        (tmp_path / name).write_bytes(b"junk")
    arguments = {"input": "d.nii.gz", "output": "o.h5", **changes}
    for key in ("input", "output", "fixed"):
        if key in arguments:
            arguments[key] = str(tmp_path / arguments[key])
    with pytest.raises(ValueError, match=message) as caught:
        convert(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not list(tmp_path.glob("o.*"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input '.*' does not exist"):
        convert(str(tmp_path / "d.nii.gz"), "o.h5")
    write_displacement(smooth_field(FIXED, GRIDS["RAS"]), tmp_path / "d.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"fixed image '.*' does not exist"):
        convert(str(tmp_path / "d.nii.gz"), str(tmp_path / "o.h5"), fixed=str(tmp_path / "no.nii"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        convert(str(tmp_path / "d.nii.gz"), str(tmp_path))
