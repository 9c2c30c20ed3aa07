# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai.data import MetaTensor
from monai.transforms import Transform

from monai_sacb.data.displacement_files import save_displacement
from monai_sacb.utils import replacing, subject_name

__all__ = ["SaveRegistrationd", "save_displacement"]


def save_nifti_volume(array: np.ndarray, affine: torch.Tensor, path: Path) -> None:
    # one channel is written as a plain volume, several as the fourth axis
    array = (
        array[0] if array.shape[0] == 1 else np.moveaxis(array.reshape(*array.shape, *[1] * (4 - array.ndim)), 0, -1)
    )
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(array, np.asarray(affine)), temporary)


class PairFolders:
    """
    A folder for each pair, ``<moving>_to_<fixed>`` after the files of the two images, or after ``moving_subject`` and
    ``fixed_subject`` where the pair has these. Pairs of other files with the same names get a number behind it.

    Args:
        output_dir: folder of the folders.
        moving_key, fixed_key: the two images.
    """

    def __init__(self, output_dir: str | os.PathLike[str], moving_key: str, fixed_key: str) -> None:
        self.output_dir = Path(output_dir)
        self.moving_key = moving_key
        self.fixed_key = fixed_key
        # which files each folder was written for: different images may have files of one name
        self._folders: dict[str, tuple[str, str]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> Path:
        images = (data[self.moving_key], data[self.fixed_key])
        files = [
            str(image.meta.get("filename_or_obj", "")) if isinstance(image, MetaTensor) else "" for image in images
        ]
        moving, fixed = (
            data.get(f"{role}_subject") or subject_name(image) or role
            for role, image in zip(("moving", "fixed"), images)
        )
        name = f"{moving}_to_{fixed}"
        unique, number = name, 1
        while self._folders.setdefault(unique, (files[0], files[1])) != tuple(files):
            number += 1
            unique = f"{name}_{number}"
        return self.output_dir / unique


class SaveRegistrationd(Transform):
    """
    Write the result of one pair into a folder of its own, ``<moving>_to_<fixed>`` (see :py:class:`PairFolders`).

    Writes ``warped.nii.gz``, ``warped_label.nii.gz`` and ``displacement.nii.gz``, as far as the entries exist, on
    the grid that their affine says; run :py:class:`RestoreGridd` first for that of the fixed image's file.

    Args:
        output_dir: folder of the folders.
        image_key: warped image, ``(C, *spatial)``.
        label_key: warped label map, ``(1, *spatial)``.
        displacement_key: displacement ``(3, *spatial)`` in LPS millimetres.
        moving_key, fixed_key: the two images, whose files give the folder its name.
        label_ids: values to write for the labels 1, 2, ..., where ``SelectLabelsd`` has numbered them anew.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        image_key: str = "warped_image",
        label_key: str = "warped_label",
        displacement_key: str = "displacement",
        moving_key: str = "moving_image",
        fixed_key: str = "fixed_image",
        label_ids: Sequence[int] | None = None,
    ) -> None:
        self.folders = PairFolders(output_dir, moving_key, fixed_key)
        self.image_key = image_key
        self.label_key = label_key
        self.displacement_key = displacement_key
        self.label_ids = label_ids

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        folder = self.folders(data)
        if self.displacement_key in data:
            # first, since it looks at what it is given
            displacement = data[self.displacement_key]
            save_displacement(displacement.as_tensor(), displacement.affine, folder / "displacement.nii.gz")
        if self.image_key in data:
            image = data[self.image_key]
            save_nifti_volume(image.detach().cpu().numpy(), image.affine, folder / "warped.nii.gz")
        if self.label_key in data:
            label = data[self.label_key]
            array = np.rint(label.detach().cpu().numpy()).astype(np.int64)
            if self.label_ids is not None:
                array = np.array([0, *self.label_ids])[array]
            small = np.uint8 if array.min() >= 0 and array.max() < 256 else np.int32
            save_nifti_volume(array.astype(small), label.affine, folder / "warped_label.nii.gz")
        return dict(data)
