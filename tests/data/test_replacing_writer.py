# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.data import MetaTensor
from monai.transforms import SaveImage


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.arange(24, dtype=torch.int16).view(1, 2, 3, 4), affine=affine)
    image.meta["filename_or_obj"] = "a.nii.gz"
    save = SaveImage(
        tmp_path, "seg", output_dtype=None, separate_folder=False, writer="monai_sacb.data.ReplacingNibabelWriter"
    )
    save(image)
    assert os.listdir(tmp_path) == ["a_seg.nii.gz"]
    written = nib.load(tmp_path / "a_seg.nii.gz")
    assert np.array_equal(written.dataobj, image.array[0]) and np.array_equal(written.affine, affine)
    assert written.get_data_dtype() == np.int16
    before = (tmp_path / "a_seg.nii.gz").read_bytes()

    def stopped(_: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(image + 1)
    assert os.listdir(tmp_path) == ["a_seg.nii.gz"] and (tmp_path / "a_seg.nii.gz").read_bytes() == before
