# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from monai_sacb.data import list_volumes


def test_images_by_name(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.NRRD", "c.mha", ".hidden.nii", "notes.txt", "d.nii"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii").mkdir()
    assert list_volumes(tmp_path) == [str(tmp_path / name) for name in ("a.NRRD", "b.nii.gz", "c.mha", "d.nii")]
    assert list_volumes(tmp_path / "d.nii") == [str(tmp_path / "d.nii")]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none' does not exist"):
        list_volumes(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"has no image \(.nii, .nii.gz"):
        list_volumes(tmp_path)


def test_names_that_would_clash(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.mha"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several images called 'a'"):
        list_volumes(tmp_path)
