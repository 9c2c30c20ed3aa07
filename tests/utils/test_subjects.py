# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai.data import MetaTensor

from monai_sacb.utils import pair_names, subject_name, subject_names

NAMES = {
    "file names": (["x/a.nii.gz", "x/b.nii"], ["a", "b"]),
    "points": (["sub.01.nii.gz", "sub.02.nii.gz", "c.d.mha"], ["sub.01", "sub.02", "c.d"]),
    "folders": (["/d/s1/t1.nii.gz", "/d/s2/t1.nii.gz", "/d/s2/t2.nii.gz"], ["s1_t1", "s2_t1", "t2"]),
    "deep folders": (["s1/mri/t1.mgz", "s2/mri/t1.mgz"], ["s1_mri_t1", "s2_mri_t1"]),
    "one of them deeper": (["t1.nii", "a/t1.nii"], ["t1", "a_t1"]),
    "formats": (["/d/a.nii", "/d/a.mha", "/d/b.nii"], ["a.nii", "a.mha", "b"]),
    "one subject twice": (["x/a.nii", "y/a.nii", "x/a.nii"], ["x_a", "y_a", "x_a"]),
    "none": ([], []),
}


@pytest.mark.parametrize(("paths", "expected"), NAMES.values(), ids=NAMES)
def test_names_tell_subjects_apart(paths: list[str], expected: list[str]) -> None:
    assert subject_names(paths) == expected


def test_names_of_a_pair() -> None:
    image = MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": "/data/sub.01.nii.gz"})
    assert subject_name(image) == "sub.01" and subject_name(torch.zeros(1)) == subject_name(MetaTensor([0])) == ""
    pair = {"moving_image": image, "fixed_image": torch.zeros(1, 2, 2), "fixed_subject": "s2_t1"}
    assert pair_names(pair) == ("sub.01", "s2_t1")
