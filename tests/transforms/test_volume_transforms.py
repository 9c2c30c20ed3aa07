# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.data import MetaTensor

from monai_sacb.transforms import MetaToResultd, ReadVolumed


def test_read_as_it_is_in_the_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, -2, 5], [1.5, 0, 0, 6], [0, 1, 0, 7], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    given = {"image": str(tmp_path / "a.nii.gz"), "image_path": "a", "other": 3}
    data = ReadVolumed("image")(given)
    assert data["image"].shape == (1, 5, 6, 7) and data["image"].dtype == torch.float32
    assert np.array_equal(data["image"].numpy()[0], values)
    assert np.allclose(data["image"].affine, affine) and np.allclose(data["image"].meta["original_affine"], affine)
    assert tuple(data["image"].meta["spatial_shape"]) == (5, 6, 7)
    assert {key: data[key] for key in ("image_path", "other")} == {"image_path": "a", "other": 3}
    assert given["image"] == str(tmp_path / "a.nii.gz")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image '.*none.nii' does not exist"):
        ReadVolumed("image")({"image": str(tmp_path / "none.nii")})
    with pytest.raises(KeyError):
        ReadVolumed("image")({})
    assert ReadVolumed("image", allow_missing_keys=True)({"a": 1}) == {"a": 1}


def test_entry_moves_to_the_result() -> None:
    image = MetaTensor(torch.ones(1, 2, 2), meta={"numbers": json.dumps([{"a": 1.5}]), "filename_or_obj": "x"})
    given = {"pred": image, "result": {"before": 1}}
    data = MetaToResultd("pred", "numbers")(given)
    assert data["result"] == {"before": 1, "numbers": [{"a": 1.5}]}
    assert "numbers" not in data["pred"].meta and data["pred"].meta["filename_or_obj"] == "x"
    assert torch.equal(data["pred"], image)
    # what was given stays
    assert "numbers" in image.meta and given["result"] == {"before": 1}


@pytest.mark.parametrize("image", [torch.ones(1, 2), MetaTensor(torch.ones(1, 2))], ids=["tensor", "no entry"])
def test_nothing_to_move(image: torch.Tensor) -> None:
    assert MetaToResultd("pred", "numbers", "out")({"pred": image}).keys() == {"pred"}


def test_entry_that_is_not_json() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        MetaToResultd("pred", "numbers")({"pred": MetaTensor(torch.ones(1, 2), meta={"numbers": "half a"})})
