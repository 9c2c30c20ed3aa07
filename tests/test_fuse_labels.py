# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark that labels images by the labels of others."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import monai_sacb.networks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = str(BENCHMARKS / "fuse_labels.py")
SHAPE = (30, 40, 36)
BOX = (slice(8, 20), slice(10, 25), slice(9, 21))


class Shift(torch.nn.Module):
    """A field that takes every voxel from so many further along the first axis."""

    def __init__(self, voxels: float) -> None:
        super().__init__()
        self.voxels = voxels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(len(x), 3, *x.shape[2:])
        ddf[:, 0] = self.voxels
        return ddf


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images of one box, on grids of other axes; two labels of it are wrong."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    folder = tmp_path / "dataset"
    (folder / "labels").mkdir(parents=True)
    values = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    for i, axes in enumerate(("RAS", "LIA", "PSR", "RAS", "RAS")):
        label = np.zeros(SHAPE, np.uint8)
        label[BOX] = (1, 1, 2, 1, 0)[i]
        for name, array in ((f"image_{i}.nii.gz", values), (f"labels/label_{i}.nii.gz", label)):
            image = nib.Nifti1Image(array, np.eye(4)).as_reoriented(nib.orientations.axcodes2ornt(axes))
            nib.save(image, folder / name)
    entries = [{"image": f"image_{i}.nii.gz", "label": f"labels/label_{i}.nii.gz"} for i in range(5)]
    pair = {"fixed": "image_3.nii.gz", "moving": "image_4.nii.gz"}
    pair |= {"fixed_label": "labels/label_3.nii.gz", "moving_label": "labels/label_4.nii.gz"}
    content = {"training": entries[:4], "validation": entries[4:], "registration_val": [pair]}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "labels.json").write_text(json.dumps({"labels": {"one": 1, "two": 2}}))
    monkeypatch.setattr(monai_sacb.networks, "load_pretrained", {"none moves": Shift(0)}.__getitem__)
    return folder


def test_votes_move_with_the_images(dataset: Path) -> None:
    fuse = runpy.run_path(SCRIPT)["fuse"]
    probabilities = [torch.zeros(3, 32, 32, 32) for _ in range(3)]
    for i, places in enumerate(((10, 20), (10, 20), (12, 22))):
        probabilities[i][1, slice(*places)] = 1
        probabilities[i][0] = 1 - probabilities[i][1]
    image = torch.rand(1, 32, 32, 32)
    label = fuse(Shift(2), image, [(image, one) for one in probabilities])
    expected = torch.zeros(1, 32, 32, 32)
    # where two of three lie
    expected[:, 8:18] = 1
    assert label.dtype == torch.uint8 and torch.equal(label.float(), expected)


def test_dataset(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: wrong labels are voted down, on the grids of their images."""
    output = tmp_path / "fused"
    options = ["--atlases", "3", "--num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["", str(dataset), "none moves", str(output), *options])
    runpy.run_path(SCRIPT, run_name="__main__")
    content = json.loads((output / "dataset.json").read_text())
    entries = [*content["training"], *content["validation"]]
    assert len(entries) == 5 and set(content["registration_val"][0]) == {
        "fixed",
        "moving",
        "fixed_label",
        "moving_label",
    }
    assert (output / "labels.json").read_text() == (dataset / "labels.json").read_text()
    for i, entry in enumerate(entries):
        assert (output / entry["image"]).samefile(dataset / f"image_{i}.nii.gz")
        image, label = (nib.load(output / entry[key]) for key in ("image", "label"))
        assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
        found = np.asarray(nib.as_closest_canonical(label).dataobj)
        assert found.shape == SHAPE and set(np.unique(found)) == {0, 1}
        inside = np.zeros(SHAPE, bool)
        inside[BOX] = True
        # two of the three that vote on it are right
        assert np.array_equal(found == 1, inside), i


@pytest.mark.parametrize("number", [0, 4])
def test_number_of_atlases(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    arguments: list[Any] = ["", dataset, "none moves", tmp_path / "fused", "--atlases", number]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match=f"--atlases must be of 1 to 3, got {number}"):
        runpy.run_path(SCRIPT, run_name="__main__")
    assert not (tmp_path / "fused").exists()
