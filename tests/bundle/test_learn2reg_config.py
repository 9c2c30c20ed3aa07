# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from monai.bundle import ConfigWorkflow

from monai_sacb.transforms import load_learn2reg_field
from monai_sacb.utils import sentence

Make = Callable[..., ConfigWorkflow]


@pytest.fixture
def challenge(sample: Path, tmp_path: Path) -> Path:
    """The sample under the names of the challenge, some of it turned."""
    folder = tmp_path / "challenge"
    folder.mkdir()
    for number in range(5):
        image = nib.load(sample / "images" / f"brain_{number:02d}.nii.gz")
        if number % 2:
            image = image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
        # even sizes, as half resolution needs them
        array = np.asarray(image.dataobj)
        array = array[tuple(slice(0, size - size % 2) for size in array.shape)]
        nib.save(nib.Nifti1Image(array, image.affine), folder / f"Brain_{number:04d}_0000.nii.gz")
    names = [f"./Brain_{number:04d}_0000.nii.gz" for number in range(5)]
    content = {
        "training": [{"image": name} for name in names],
        "registration_val": [{"fixed": names[4], "moving": names[2]}, {"fixed": names[1], "moving": names[3]}],
        "registration_test": [{"fixed": names[0], "moving": names[2]}],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


LISTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "validation": ({}, ["disp_0001_0003.nii.gz", "disp_0004_0002.nii.gz"]),
    "test": ({"pair_list": "registration_test"}, ["disp_0000_0002.nii.gz"]),
    "half resolution": ({"half_resolution": "true"}, ["disp_0001_0003.npz", "disp_0004_0002.npz"]),
    "long names": (
        {"pair_list": "registration_test", "long_names": True},
        ["disp_0000_0000_0002_0000.nii.gz"],
    ),
}


@pytest.mark.parametrize(("options", "names"), LISTS.values(), ids=LISTS)
def test_a_field_for_every_pair(
    workflow: Make, weights: str, challenge: Path, tmp_path: Path, options: dict[str, Any], names: list[str]
) -> None:
    flow = workflow(
        "inference", "learn2reg", workflow_type="infer", ckpt_path=weights, dataset_dir=str(challenge), **options
    )
    flow.run()
    submission = tmp_path / "output" / "submission"
    assert sorted(path.name for path in submission.iterdir()) == names
    assert not (tmp_path / "output" / "registered").exists()
    for name in names:
        field = load_learn2reg_field(submission / name)
        digits = [part for part in name.split(".")[0].split("_")[1:] if part != "0000" or "0000_0002" in name]
        fixed = digits[0]
        assert tuple(field.shape[1:]) == nib.load(challenge / f"Brain_{fixed}_0000.nii.gz").shape
        assert torch.isfinite(field).all() and field.abs().max() > 0.05


def test_two_pairs_of_one_name_are_refused_before_any_is_registered(
    workflow: Make, weights: str, challenge: Path, tmp_path: Path
) -> None:
    (challenge / "other").mkdir()
    again = "other/Brain_0002_0000.nii.gz"
    (challenge / again).write_bytes((challenge / "Brain_0002_0000.nii.gz").read_bytes())
    content = json.loads((challenge / "dataset.json").read_text())
    content["registration_val"].append({"fixed": content["registration_val"][0]["fixed"], "moving": again})
    (challenge / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError) as caught:
        workflow("inference", "learn2reg", workflow_type="infer", ckpt_path=weights, dataset_dir=str(challenge)).run()
    assert "would be written to 'disp_0004_0002'" in sentence(caught.value)
    assert not (tmp_path / "output" / "submission").exists()


def test_the_arrays_warped_as_the_challenge_does_it(
    workflow: Make, weights: str, challenge: Path, tmp_path: Path
) -> None:
    """Without any affine, the field gives the image that the bundle writes."""
    for overlays in ((), ("learn2reg",)):
        workflow(
            "inference",
            *overlays,
            workflow_type="infer",
            ckpt_path=weights,
            dataset_dir=str(challenge),
            refine=5,
        ).run()
    output = tmp_path / "output"
    for fixed_id, moving_id in (("0004", "0002"), ("0001", "0003")):
        moving = nib.load(challenge / f"Brain_{moving_id}_0000.nii.gz").get_fdata()
        field = load_learn2reg_field(output / "submission" / f"disp_{fixed_id}_{moving_id}.nii.gz").numpy()
        warped = nib.load(output / "registered" / f"Brain_{moving_id}_0000_to_Brain_{fixed_id}_0000" / "warped.nii.gz")
        places = np.indices(moving.shape) + field
        inside = ((places > 0.01) & (places < np.array(moving.shape).reshape(3, 1, 1, 1) - 1.01)).all(0)
        assert inside.mean() > 0.5 and np.abs(field).max() > 1.0
        by_challenge = map_coordinates(moving, places, order=1)
        np.testing.assert_allclose(warped.get_fdata()[inside], by_challenge[inside], atol=1e-3 * np.ptp(moving))
        assert np.abs(by_challenge - moving)[inside].mean() > 0.01 * np.ptp(moving)
