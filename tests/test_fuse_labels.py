# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark that labels each image by the labels of others."""

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

from monai_sacb.data import load_subjects
from monai_sacb.networks.nets import IdentityField

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuse_labels.py"
AXES = ["RAS", "LIA", "PSR", "SPL", "RAS", "AIL"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """With a model that moves nothing."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    namespace = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(namespace["main"].__globals__, "load_pretrained", lambda model: IdentityField())
    return namespace


def write_image(array: np.ndarray, axes: str, path: Path) -> None:
    """Of an array in RAS."""
    image = nib.Nifti1Image(array, np.eye(4))
    nib.save(image.as_reoriented(nib.orientations.axcodes2ornt(axes)), path)


def read_ras(path: str) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def write_dataset(folder: Path, labels: list[np.ndarray]) -> None:
    """Images in all orientations with labels in RAS, the last two in the list for validation."""
    (folder / "labels").mkdir(parents=True)
    entries = []
    for i, label in enumerate(labels):
        values = np.random.default_rng(i).uniform(size=label.shape).astype(np.float32)
        entries.append({"image": f"image_{i}.nii.gz", "label": f"labels/image_{i}.nii.gz"})
        write_image(values, AXES[i], folder / entries[-1]["image"])
        write_image(label, AXES[i], folder / entries[-1]["label"])
    fixed, moving = entries[-2:]
    pair = {role: entry["image"] for role, entry in (("fixed", fixed), ("moving", moving))}
    pair |= {"fixed_label": fixed["label"], "moving_label": moving["label"]}
    content = {"name": "made up", "training": entries[:-2], "validation": entries[-2:], "registration_val": [pair]}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "labels.json").write_text(json.dumps({"labels": {"one": 1, "two": 2}}))


def cube(value: int, first: int, shape: tuple[int, ...] = (30, 40, 20)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[first : first + 8, 10:25, 5:12] = value
    return label


def run(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments), "--num_workers", "0"])
    script["main"]()


class Shift(torch.nn.Module):
    """A shift along the first axis by the value of the moving image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(1, 3, *images.shape[2:])
        ddf[:, 0] = images[:, 0]
        return ddf


def test_fuse(script: dict[str, Any]) -> None:
    """Two of three atlases agree, once they are laid on the image; each alone is somewhere else."""
    atlases = []
    for shift, first in ((2.0, 12), (-3.0, 7), (0.0, 14)):
        label = torch.from_numpy(cube(2, first)).long()
        atlases.append(
            (torch.full((1, *label.shape), shift), torch.nn.functional.one_hot(label, 3).movedim(-1, 0).float())
        )
    fused = script["fuse"](Shift(), torch.zeros(1, 30, 40, 20), atlases)
    assert torch.equal(fused[0], torch.from_numpy(cube(2, 10)))


def test_wrong_labels_are_voted_down(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "source", tmp_path / "fused"
    write_dataset(source, [cube(2, 10), cube(1, 20), cube(2, 10), cube(2, 10), cube(1, 3), cube(2, 9)])
    run(script, monkeypatch, source, "any", output, "--atlases", 3)
    subjects = [load_subjects(output, section) for section in ("training", "validation")]
    assert [len(section) for section in subjects] == [4, 2]
    for i, subject in enumerate([*subjects[0], *subjects[1]]):
        assert Path(subject["image"]).samefile(source / f"image_{i}.nii.gz")
        image, label = nib.load(subject["image"]), nib.load(subject["label"])
        assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
        assert np.array_equal(read_ras(subject["label"]), cube(2, 10))
    pair = json.loads((output / "dataset.json").read_text())["registration_val"][0]
    assert pair["fixed_label"] == "labels/image_4.nii.gz" and pair["moving_label"] == "labels/image_5.nii.gz"
    assert json.loads((output / "labels.json").read_text())["labels"] == {"one": 1, "two": 2}
    # the dataset itself has kept its own
    assert np.array_equal(read_ras(str(source / "labels/image_1.nii.gz")), cube(1, 20))


def test_no_image_votes_on_itself(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [cube(1, 4), cube(2, 15), cube(1, 8), cube(2, 9)]
    write_dataset(tmp_path / "source", labels)
    run(script, monkeypatch, tmp_path / "source", "any", tmp_path / "fused", "--atlases", 1)
    found = [read_ras(subject["label"]) for subject in load_subjects(tmp_path / "fused", "training")]
    assert np.array_equal(found[0], labels[1]) and np.array_equal(found[1], labels[0])


@pytest.mark.parametrize(
    ("atlases", "shape", "output", "message"),
    [
        (0, (30, 40, 20), "fused", "--atlases must be from 1 to 1, got 0"),
        (2, (30, 40, 20), "fused", "--atlases must be from 1 to 1, got 2"),
        (1, (30, 70, 20), "fused", "image_0.nii.gz' is larger than"),
        (1, (30, 40, 20), "source", "holds the dataset itself"),
    ],
)
def test_refused(
    script: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    atlases: int,
    shape: tuple[int, ...],
    output: str,
    message: str,
) -> None:
    write_dataset(tmp_path / "source", [cube(1, 4, shape)] * 4)
    with pytest.raises(SystemExit, match=message):
        run(script, monkeypatch, tmp_path / "source", "any", tmp_path / output, "--atlases", atlases)
    assert not (tmp_path / "fused").exists()
