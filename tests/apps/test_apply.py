# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from synthetic_pair import Pair, deformation, grid_points, structures

from monai_sacb.apps import apply, evaluate


def volume(path: Path | str) -> np.ndarray:
    return nib.load(path).get_fdata()


@pytest.mark.parametrize("transform", ["", "transform.h5", "displacement.nii.gz"])
def test_image_as_register_wrote_it(pair: Pair, registered: Path, tmp_path: Path, transform: str) -> None:
    output = tmp_path / "again.nii.gz"
    assert apply(str(registered / transform), pair.moving, str(output), reference=pair.fixed) == str(output)
    ours, again = volume(registered / "warped.nii.gz"), volume(output)
    assert np.mean(np.abs(ours - again) > 0.01) < 1e-4
    assert again.std() > 5


def test_label_map_is_recognised_and_stays_whole(pair: Pair, registered: Path, tmp_path: Path) -> None:
    output = tmp_path / "label.nii.gz"
    apply(str(registered), pair.moving_label, str(output))
    assert np.array_equal(volume(output), volume(registered / "warped_label.nii.gz"))
    assert np.issubdtype(nib.load(output).get_data_dtype(), np.integer)
    # labels stored as floating point numbers are labels, too
    image = nib.load(pair.moving_label)
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float32), image.affine), tmp_path / "float.nii.gz")
    apply(str(registered), str(tmp_path / "float.nii.gz"), str(tmp_path / "again.nii.gz"))
    assert np.array_equal(volume(output), volume(tmp_path / "again.nii.gz"))


def test_back_to_the_moving_image(pair: Pair, registered: Path, tmp_path: Path) -> None:
    output = tmp_path / "back.nii.gz"
    apply(str(registered), pair.fixed, str(output), inverse=True)
    assert np.array_equal(volume(output), volume(registered / "fixed_warped.nii.gz"))
    # from the forward transform alone, inverted at each place
    apply(str(registered / "transform.h5"), pair.fixed, str(tmp_path / "alone.nii.gz"), pair.moving, inverse=True)
    difference = np.abs(volume(output) - volume(tmp_path / "alone.nii.gz"))
    assert np.median(difference) < 0.05 and difference.mean() < 0.5


def test_there_and_back_again(pair: Pair, registered: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.nii.gz", tmp_path / "back.nii.gz"
    apply(str(registered), pair.moving_label, str(there))
    apply(str(registered), str(there), str(back), inverse=True)
    original = volume(pair.moving_label)
    assert np.mean(volume(back)[original > 0] == original[original > 0]) > 0.93


@pytest.mark.parametrize("interpolation, whole", [("nearest", True), ("label", True), ("linear", False)])
def test_interpolation(pair: Pair, registered: Path, tmp_path: Path, interpolation: str, whole: bool) -> None:
    output = tmp_path / "out.nii.gz"
    apply(str(registered), pair.moving_label, str(output), interpolation=interpolation)
    assert (set(np.unique(volume(output))) == {0, 3, 1021}) is whole


def test_finer_reference(pair: Pair, registered: Path, tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.5, 1.2, 1.0])
    affine[:3, 3] = (-15, -15, -15)
    reference = tmp_path / "reference.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((30, 20, 25), np.float32), affine), reference)
    output = tmp_path / "out.nii.gz"
    apply(str(registered), pair.moving_label, str(output), reference=str(reference))
    assert np.allclose(nib.load(output).affine, affine)
    expected = structures(deformation(grid_points((30, 20, 25), affine)))
    assert np.mean(volume(output) == expected) > 0.93


@pytest.mark.parametrize("inverse", [False, True])
def test_points(registered: Path, tmp_path: Path, inverse: bool) -> None:
    fixed = np.random.default_rng(1).uniform(-12, 12, (10, 3))
    moving = deformation(fixed)
    source, target = (fixed, moving) if inverse else (moving, fixed)
    rows = [",".join(f"{value:.5f}" for value in point) for point in source]
    (tmp_path / "in.csv").write_text("\n".join(["x,y,z", *rows]) + "\n")
    apply(str(registered), str(tmp_path / "in.csv"), str(tmp_path / "out.csv"), inverse=inverse)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "x,y,z"
    carried = np.array([[float(value) for value in line.split(",")] for line in lines[1:]])
    assert np.linalg.norm(carried - target, axis=1).mean() < 0.4 * np.linalg.norm(source - target, axis=1).mean()


ILL_CASES: list[tuple[dict[str, Any], str]] = [
    ({"interpolation": "cubic"}, "interpolation must be one of linear, nearest, label, got 'cubic'"),
    ({"input": "missing.nii.gz"}, "input 'missing.nii.gz' does not exist"),
    ({"reference": "missing.nii.gz"}, "missing.nii.gz' does not exist"),
    ({"transform": "missing"}, "missing"),
    ({"output": "."}, "output '.' is a folder"),
    ({"output": "x.png"}, "x.png"),
]


@pytest.mark.parametrize("options, message", ILL_CASES)
def test_ill_formed(
    pair: Pair, registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"transform": str(registered), "input": pair.moving, "output": "out.nii.gz", **options}
    with pytest.raises((ValueError, OSError), match=message):
        apply(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_no_registration(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the output folder of a registration"):
        apply(str(tmp_path), pair.moving, str(tmp_path / "out.nii.gz"))


def test_file_alone_needs_a_reference(pair: Pair, registered: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a reference"):
        apply(str(registered / "transform.h5"), pair.moving, str(tmp_path / "out.nii.gz"))


def test_evaluate(pair: Pair, registered: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"3": "shell", "1021": "core"}')
    result = evaluate(
        str(registered),
        pair.fixed_label,
        pair.moving_label,
        names=str(tmp_path / "names.json"),
        output=str(tmp_path / "numbers.json"),
    )
    assert set(result["structures"]) == {"shell", "core"}
    fixed = volume(pair.fixed_label)
    linear = volume(registered / "warped_label.nii.gz")
    for name, label in (("shell", 3), ("core", 1021)):
        row = result["structures"][name]
        both = 2 * np.sum((fixed == label) & (linear == label)) / (np.sum(fixed == label) + np.sum(linear == label))
        assert row["dice_linear"] == pytest.approx(both, abs=1e-6)
        assert row["dice"] > row["dice_before"] and row["hd95_mm"] <= row["hd95_before_mm"]
    assert result["mean"]["dice"] == pytest.approx(
        (result["structures"]["shell"]["dice"] + result["structures"]["core"]["dice"]) / 2
    )
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    assert result.table().splitlines()[0].split()[0] == "structure" and "core" in result.table()


EVALUATE_CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "needs fixed_label and moving_label"),
    ({"fixed_label": "a.nii"}, "needs both fixed_label and moving_label, got one"),
    ({"moving_points": "a.csv"}, "needs both fixed_points and moving_points, got one"),
    ({"fixed_label": "a.nii", "moving_label": "b.nii"}, "b.nii' does not exist"),
]


@pytest.mark.parametrize("options, message", EVALUATE_CASES)
def test_evaluate_ill_formed(registered: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(str(registered), **options)
