# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The whole way of slices: training, evaluation, registration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from monai.bundle import ConfigWorkflow

Make = Callable[..., ConfigWorkflow]
SHAPE = (36, 33)
FLAT: dict[str, Any] = {"network_def#spatial_dims": 2, "spatial_size": [-1, -1], "labels": {"disc": 1, "ring": 2}}
# pixels of 2 x 3 mm, first axis to the left
AFFINE = np.diag([-2.0, 3.0, 1.0, 1.0])


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    folder = tmp_path / "slices"
    folder.mkdir()
    rows, columns = np.indices(SHAPE)
    rng = np.random.default_rng(0)
    training = []
    for i in range(6):
        row, column = 17 + rng.uniform(-3, 3), 16 + rng.uniform(-3, 3)
        distance = np.hypot(rows - row, columns - column)
        label = np.where(distance < 6, 1, np.where(distance < 11, 2, 0)).astype(np.uint8)
        image = ndimage.gaussian_filter(np.array([0.05, 1.0, 0.5])[label] + 0.02 * rng.random(SHAPE), 0.7)
        for name, array in (("image", image.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(array, AFFINE), folder / f"{name}_{i}.nii.gz")
        training.append({"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"})
    (folder / "dataset.json").write_text(json.dumps({"training": training}))
    return folder


def test_train_evaluate_and_register(workflow: Make, slices: Path, tmp_path: Path) -> None:
    given = {**FLAT, "dataset_dir": str(slices), "max_epochs": 2, "pairs_per_epoch": 4, "val_interval": 2}
    workflow("train", **given, label_weight=1.0).run()
    weights = str(tmp_path / "output" / "model.pt")
    flow = workflow("train", "evaluate", **given, ckpt_path=weights, output_dir=str(tmp_path / "evaluation"))
    flow.run_id = "evaluating"
    flow.run()
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["pairs"] == 2 and 0.2 < summary["val_dice_before/mean"] < 1
    assert 0 < summary["val_hd95_before_mm/mean"] < 40 and summary["val_sdlogj"] > 0
    assert (tmp_path / "evaluation" / "registration.png").stat().st_size > 1000
    flow = workflow(
        "inference",
        workflow_type="infer",
        **{key: value for key, value in FLAT.items() if key != "labels"},
        dataset_dir=str(slices),
        ckpt_path=weights,
    )
    flow.run()
    folder = tmp_path / "output" / "registered" / "image_4_to_image_5"
    field = nib.load(folder / "displacement.nii.gz")
    assert field.shape == (*SHAPE, 1, 1, 3) and np.allclose(field.affine, AFFINE)
    vectors = np.asarray(field.dataobj)[:, :, 0, 0]
    assert (vectors[..., 2] == 0).all() and np.abs(vectors[..., :2]).max() > 0
    # the same image by hand: LPS millimetres to pixels, first axis to the left and second to the front
    pixels = np.indices(SHAPE) + np.stack([vectors[..., 0] / 2, -vectors[..., 1] / 3])
    moving = np.asarray(nib.load(slices / "image_4.nii.gz").dataobj)
    warped = np.asarray(nib.load(folder / "warped.nii.gz").dataobj)
    np.testing.assert_allclose(
        warped[3:-3, 3:-3], ndimage.map_coordinates(moving, pixels, order=1)[3:-3, 3:-3], atol=1e-3
    )
