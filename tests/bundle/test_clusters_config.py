# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from monai.bundle import ConfigWorkflow

from monai_sacb.networks import cluster_labels

Make = Callable[..., ConfigWorkflow]


def test_label_volumes_on_the_grids_of_the_files(workflow: Make, weights: str, sample: Path, tmp_path: Path) -> None:
    """Of a cropped moving image and a fixed image that is stored with other axes."""
    image = nib.as_closest_canonical(nib.load(sample / "images" / "brain_00.nii.gz"))
    moving, fixed = tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz"
    nib.save(image.slicer[2:-3, :, 1:], moving)
    turned = nib.load(sample / "images" / "brain_01.nii.gz")
    nib.save(turned.as_reoriented(nib.orientations.axcodes2ornt("SLA", (("L", "R"), ("P", "A"), ("I", "S")))), fixed)
    options = {"ckpt_path": weights, "moving_image": str(moving), "fixed_image": str(fixed)}
    flow = workflow("inference", "clusters", workflow_type="infer", **options)
    flow.run()
    folder = tmp_path / "output" / "registered" / "moving_to_fixed"
    names = [f"fixed_clusters_level{i}" for i in (2, 3, 4, 5)] + [f"warped_clusters_level{i}" for i in (2, 3, 4)]
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {
        *names, "moving_clusters_level5", "warped", "displacement"
    }  # fmt: skip
    pair = flow.parser.get_parsed_content("dataset")[0]
    network = flow.parser.get_parsed_content("network")
    images = torch.cat([pair["moving_image"], pair["fixed_image"]]).as_tensor()[None]
    maps = dict(zip(("moving", "fixed"), cluster_labels(network, images)))
    for name in (*names, "moving_clusters_level5"):
        role, level = name.split("_")[0], int(name[-1])
        volume, file = nib.load(folder / f"{name}.nii.gz"), moving if role == "moving" else fixed
        assert volume.shape == nib.load(file).shape and volume.get_data_dtype() == np.uint8
        np.testing.assert_allclose(volume.affine, nib.load(file).affine, atol=1e-5)
        expected = maps["fixed" if role == "fixed" else "moving"][0, level - 2].numpy()
        if role == "moving":
            # centred in the larger image
            low = [(n - m) // 2 for n, m in zip(expected.shape, volume.shape)]
            expected = expected[tuple(slice(i, i + m) for i, m in zip(low, volume.shape))]
        found = np.asarray(nib.as_closest_canonical(volume).dataobj)
        # all voxels, but for those at the border of two clusters in another run
        assert found.min() >= 1 and (found == expected).mean() > 0.99, name
