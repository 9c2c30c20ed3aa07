# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from monai.bundle import ConfigWorkflow

from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.layers import warp

Make = Callable[..., ConfigWorkflow]


def test_properties(workflow: Make) -> None:
    assert workflow("inference", workflow_type="infer").check_properties() == []


def test_pairs_of_a_dataset(workflow: Make, weights: str, sample: Path, tmp_path: Path) -> None:
    workflow("inference", workflow_type="infer", ckpt_path=weights).run()
    folders = sorted(path.name for path in (tmp_path / "output" / "registered").iterdir())
    assert folders == ["brain_03_to_brain_04", "brain_04_to_brain_03"]
    label = nib.load(tmp_path / "output" / "registered" / folders[0] / "warped_label.nii.gz")
    original = nib.load(sample / "labels" / "brain_04.nii.gz")
    assert label.shape == original.shape and set(np.unique(np.asarray(label.dataobj))) == {0, 1, 2, 3}


def test_two_files(workflow: Make, weights: str, sample: Path, tmp_path: Path) -> None:
    """The files on disk equal what the network's field does to the moving image, in its own intensities."""
    files = {
        "moving_image": str(sample / "images" / "brain_00.nii.gz"),
        "fixed_image": str(sample / "images" / "brain_01.nii.gz"),
        "moving_label": str(sample / "labels" / "brain_00.nii.gz"),
    }
    workflow("inference", workflow_type="infer", ckpt_path=weights, dataset_dir=None, **files).run()
    folder = tmp_path / "output" / "registered" / "brain_00_to_brain_01"
    fixed = nib.load(files["fixed_image"])
    warped = nib.load(folder / "warped.nii.gz")
    assert warped.shape == fixed.shape
    np.testing.assert_allclose(warped.affine, fixed.affine)
    displacement = np.asarray(nib.load(folder / "displacement.nii.gz").dataobj)[:, :, :, 0]
    # LPS millimetres to voxels of this RAS grid
    ddf = torch.from_numpy(np.moveaxis(displacement * np.array([-1, -1, 1]) / 8.0, -1, 0)[None]).float()
    assert ddf.abs().max() > 0.05
    for name, source, mode in (
        ("warped", files["moving_image"], "bilinear"),
        ("warped_label", files["moving_label"], "nearest"),
    ):
        moving = torch.from_numpy(np.asarray(nib.load(source).dataobj, dtype=np.float32))[None, None]
        expected = warp(moving, ddf, mode=mode)[0, 0].numpy()
        found = np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj)
        differing = np.abs(found - expected) > 1e-3 * np.abs(expected).max()
        # a label on the boundary between two voxels may fall either way
        assert differing.mean() < (1e-3 if mode == "nearest" else 1e-9)


def test_refinement(workflow: Make, weights: str, sample: Path, tmp_path: Path) -> None:
    """A few steps for the pair at hand bring the images closer than the network alone, which is hardly trained."""
    names = ("brain_00", "brain_01")
    images = {
        f"{role}_image": str(sample / "images" / f"{name}.nii.gz") for role, name in zip(("moving", "fixed"), names)
    }
    fixed = torch.from_numpy(np.asarray(nib.load(images["fixed_image"]).dataobj, dtype=np.float32))[None, None]
    losses = []
    for refine in (0, 10):
        output = tmp_path / f"refined_{refine}"
        workflow(
            "inference", workflow_type="infer", ckpt_path=weights, dataset_dir=None, output_dir=str(output),
            refine=refine, **images,
        ).run()  # fmt: skip
        warped = nib.load(output / "registered" / "brain_00_to_brain_01" / "warped.nii.gz")
        warped = torch.from_numpy(np.asarray(warped.dataobj, dtype=np.float32))[None, None]
        losses.append(LNCCLoss(5)(warped / warped.max(), fixed / fixed.max()).item())
    assert losses[1] < losses[0] - 0.1


def test_images_of_different_sizes(workflow: Make, weights: str, sample: Path, tmp_path: Path) -> None:
    """The result lies on the fixed image's own grid, whatever the sizes and orientations."""
    image = nib.load(sample / "images" / "brain_00.nii.gz")
    data = np.asarray(image.dataobj)
    cropped = tmp_path / "cropped.nii.gz"
    nib.save(nib.as_closest_canonical(image).slicer[2:-3, :, 1:], cropped)
    turned = tmp_path / "turned.nii.gz"
    flip = image.affine @ np.diag([-1, 1, 1, 1])
    flip[:3, 3] += image.affine[:3, 0] * (data.shape[0] - 1)
    nib.save(nib.Nifti1Image(data[::-1].transpose(2, 0, 1), flip[:, [2, 0, 1, 3]]), turned)
    workflow(
        "inference", workflow_type="infer", ckpt_path=weights, moving_image=str(cropped), fixed_image=str(turned)
    ).run()
    warped = nib.load(tmp_path / "output" / "registered" / "cropped_to_turned" / "warped.nii.gz")
    fixed = nib.load(turned)
    assert warped.shape == fixed.shape
    np.testing.assert_allclose(warped.affine, fixed.affine, atol=1e-5)
    assert np.asarray(warped.dataobj).std() > 0
