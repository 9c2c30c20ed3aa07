# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark that labels images by a network trained on synthetic ones."""

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
from torch.optim.swa_utils import get_ema_multi_avg_fn

from monai.utils import set_determinism

from monai_sacb.data import load_pairs, load_subjects

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "synthetic_segmentation.py"
GRID = np.stack(np.meshgrid(*[np.arange(64)] * 3, indexing="ij"), -1)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def maps_dir(tmp_path: Path) -> Path:
    """A brain of two balls in white matter, one of them beside an amygdala; LIA as the maps are."""
    label = np.full((64, 64, 64), 2, np.float32)
    label[np.linalg.norm(GRID - [20, 32, 32], axis=-1) < 7] = 17
    label[np.linalg.norm(GRID - [44, 32, 32], axis=-1) < 9] = 53
    label[np.linalg.norm(GRID - [20, 44, 32], axis=-1) < 5] = 18
    folder = tmp_path / "maps"
    folder.mkdir()
    image = nib.Nifti1Image(label, np.eye(4)).as_reoriented(nib.orientations.axcodes2ornt(("L", "I", "A")))
    nib.save(image, folder / "one.nii.gz")
    return folder


class Bright(torch.nn.Module):
    """Calls 3 what is brighter than 0.5."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(image), 6, *image.shape[2:])
        scores[:, 0], scores[:, 3] = 25.0, 50 * image[:, 0]
        return scores


def test_regions(script: dict[str, Any], maps_dir: Path) -> None:
    """Each hippocampus lies in the middle of its region, in RAS."""
    regions, ids = script["hippocampus_regions"](maps_dir)
    assert ids == [0, 2, 17, 18, 53] and [list(region.shape) for region in regions] == [[1, 80, 96, 80]] * 2
    for region, label, radius in zip(regions, (17, 53), (7, 9)):
        place = torch.nonzero(region[0] == ids.index(label)).float()
        assert (place.mean(0) - torch.tensor([39.5, 47.5, 39.5])).abs().max() <= 1
        assert len(place) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.1)
    # the amygdala is before the left one, by twelve voxels
    before = torch.nonzero(regions[0][0] == ids.index(18)).float().mean(0) - torch.nonzero(
        regions[0][0] == ids.index(17)
    ).float().mean(0)
    assert torch.allclose(before, torch.tensor([0.0, 12.0, 0.0]), atol=0.5)


def test_synthesis(script: dict[str, Any], maps_dir: Path) -> None:
    """Image and structures lie together, cut out around the hippocampus; no two are alike, but for a seed."""
    regions, ids = script["hippocampus_regions"](maps_dir)
    make = script["synthesis"](ids).set_random_state(0)
    pairs = [make({"label": regions[0]}) for _ in range(6)]
    again = script["synthesis"](ids).set_random_state(0)({"label": regions[0]})
    assert torch.equal(again["image"], pairs[0]["image"]) and not torch.equal(pairs[0]["image"], pairs[1]["image"])
    contrasts = []
    for pair in pairs:
        image, label = pair["image"], pair["label"]
        assert image.shape == label.shape == (1, *script["SIZE"])
        assert float(image.min()) == 0 and float(image.max()) == 1
        assert set(label.unique().tolist()) <= {0, 1, 2, 4} and 300 < (label == 1).sum() < 5000
        inside = torch.nonzero(label[0] > 0)
        # black outside of the box
        box = [slice(int(a), int(b) + 1) for a, b in zip(inside.amin(0), inside.amax(0))]
        outside = torch.ones_like(label[0], dtype=torch.bool)
        outside[tuple(box)] = False
        assert outside.any() and image[0][outside].mean() < 0.05
        contrasts.append(float(image[label == 4].mean() - image[label == 1].mean()))
    # most of them as in T1: white matter is brighter
    assert sum(contrast > 0.1 for contrast in contrasts) >= 4


@pytest.mark.parametrize("axes", ["RAS", "LIA", "PSR"])
@pytest.mark.parametrize("shape", [(35, 51, 35), (30, 90, 20)])
def test_labels_lie_on_the_grid_of_their_image(
    script: dict[str, Any], tmp_path: Path, axes: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).uniform(0, 100, shape).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([1.0, 1, 1, 1])).as_reoriented(nib.orientations.axcodes2ornt(axes))
    nib.save(image, tmp_path / "image.nii.gz")
    label = script["label_image"](Bright(), tmp_path / "image.nii.gz")
    data = np.asarray(image.dataobj)
    low, high = np.percentile(data, [0.5, 99.5])
    assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
    # interpolated between two percentiles, the border may lie a little beside
    assert np.mean((np.asarray(label.dataobj) == 3) == (data > (low + high) / 2)) > 0.999


@pytest.mark.slow
def test_training_learns(script: dict[str, Any], maps_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the hippocampus of an image that it has not seen."""
    # weights of the last steps alone: those of the first are part of the mean of so few
    monkeypatch.setitem(script["train"].__globals__, "get_ema_multi_avg_fn", lambda decay: get_ema_multi_avg_fn(0.9))
    set_determinism(0)
    network = script["train"](maps_dir, steps=80)
    set_determinism(None)
    regions, ids = script["hippocampus_regions"](maps_dir)
    make = script["synthesis"](ids).set_random_state(1)
    overlaps = []
    for region in regions:
        pair = make({"label": region})
        with torch.inference_mode():
            found = network(pair["image"].as_tensor()[None]).argmax(1) == 1
        true = torch.as_tensor(pair["label"]) == 1
        overlaps.append(float(2 * (found & true).sum() / (found.sum() + true.sum())))
    # the whole box around it, the best that can be said without having learned anything, has 0.2
    assert min(overlaps) > 0.3, overlaps


def test_dataset(maps_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command; the labels of the dataset are not needed, and what it writes is a dataset."""
    source = tmp_path / "source"
    source.mkdir()
    names = [f"image_{i}.nii.gz" for i in range(4)]
    for i, name in enumerate(names):
        values = np.random.default_rng(i).uniform(size=(30, 40, 30)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), source / name)
    content = {
        "training": [{"image": name, "label": "absent.nii.gz"} for name in names[:2]],
        "validation": [{"image": name} for name in names[2:]],
        "registration_val": [{"fixed": names[2], "moving": names[3]}],
    }
    (source / "dataset.json").write_text(json.dumps(content))
    output = tmp_path / "labelled"
    monkeypatch.setattr(sys, "argv", ["", str(maps_dir), str(source), str(output), "--steps", "1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    set_determinism(None)
    subjects = [load_subjects(output, section) for section in ("training", "validation")]
    for subject, name in zip([*subjects[0], *subjects[1]], names, strict=True):
        assert Path(subject["image"]).samefile(source / name)
        assert nib.load(subject["label"]).shape == (30, 40, 30)
    assert load_pairs(output, subjects[1]) == [(1, 0)]
    assert (output / "segmentation.pt").stat().st_size > 10**6
    assert json.loads((output / "labels.json").read_text())["labels"]["hippocampus"] == 1


def test_no_maps(script: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no label maps"):
        script["hippocampus_regions"](tmp_path)
