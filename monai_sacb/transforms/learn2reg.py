# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Displacement fields in the forms that the Learn2Reg challenge takes."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monai.transforms import Transform

from monai_sacb.data.voxel_fields import (
    LEARN2REG_EXTENSIONS,
    displacement_to_ddf,
    load_learn2reg_field,
    save_learn2reg_field,
)
from monai_sacb.utils import image_name, subject_name

__all__ = ["SaveLearn2Regd", "displacement_to_ddf", "load_learn2reg_field", "save_learn2reg_field"]


def _numbers(key: str, image: Any) -> tuple[str, str]:
    """The numbers of subject and modality, four digits each, that Learn2Reg gives in the name of a file."""
    name = subject_name(image)
    challenge = re.search(r"(\d{4})_(\d{4})$", name)
    if challenge:
        return challenge[1], challenge[2]
    # data from elsewhere: the last number is the subject's
    digits = re.findall(r"\d+", name)
    if not digits:
        raise ValueError(f"{image_name(key, image)} has no number in its name for the field's name 'disp_0001_0002'.")
    return digits[-1].zfill(4), "0000"


class SaveLearn2Regd(Transform):
    """
    Write the field of one pair for a submission to Learn2Reg, ``disp_<fixed>_<moving>.nii.gz``.

    The numbers are those in the names of the images' files, ``<task>_<subject>_<modality>.nii.gz``. Where the
    modalities differ and are not 0000 for the fixed and 0001 for the moving image, names hold those too:
    ``disp_<fixed>_<modality>_<moving>_<modality>.nii.gz``.

    Args:
        output_dir: folder of the submission.
        displacement_key: displacement ``(3, D, H, W)`` in LPS millimetres, on the grid of the fixed image's file: run
            :py:class:`RestoreGridd` first.
        moving_key, fixed_key: the two images, for their names, and the moving one for the affine of its file.
        extension: ``".nii.gz"`` or ``".npz"``.
        half_resolution: see :py:func:`save_learn2reg_field`; always ``.npz``.
        long_names: put the modalities into every name.

    Raises:
        ValueError: When the file of an image has no number in its name, two pairs would have one name, or the moving
            image does not carry the meta data of its file.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        displacement_key: str = "displacement",
        moving_key: str = "moving_image",
        fixed_key: str = "fixed_image",
        extension: str = ".nii.gz",
        half_resolution: bool = False,
        long_names: bool = False,
    ) -> None:
        if extension not in LEARN2REG_EXTENSIONS:
            raise ValueError(f"extension must be one of {LEARN2REG_EXTENSIONS}, got '{extension}'.")
        self.output_dir = Path(output_dir)
        self.displacement_key = displacement_key
        self.moving_key = moving_key
        self.fixed_key = fixed_key
        self.extension = ".npz" if half_resolution else extension
        self.half_resolution = half_resolution
        self.long_names = long_names
        # which images each file was written for
        self._written: dict[str, tuple[str, str]] = {}

    def _path(self, moving: Any, fixed: Any) -> Path:
        (fixed_id, fixed_modality), (moving_id, moving_modality) = (
            _numbers(key, image) for key, image in ((self.fixed_key, fixed), (self.moving_key, moving))
        )
        short = fixed_modality == moving_modality or (fixed_modality, moving_modality) == ("0000", "0001")
        if short and not self.long_names:
            name = f"disp_{fixed_id}_{moving_id}"
        else:
            name = f"disp_{fixed_id}_{fixed_modality}_{moving_id}_{moving_modality}"
        files = (image_name(self.moving_key, moving), image_name(self.fixed_key, fixed))
        if self._written.setdefault(name, files) != files:
            raise ValueError(f"{' and '.join(files)} would be written to '{name}', as {self._written[name]} before.")
        return self.output_dir / (name + self.extension)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        displacement, moving = data[self.displacement_key], data[self.moving_key]
        meta = moving.meta if isinstance(moving, MetaTensor) else {}
        if "original_affine" not in meta:
            raise ValueError(f"{self.moving_key} must carry the meta data of its file, but it has no original_affine.")
        path = self._path(moving, data[self.fixed_key])
        ddf = displacement_to_ddf(displacement.as_tensor(), displacement.affine, meta["original_affine"])
        save_learn2reg_field(ddf, path, self.half_resolution)
        return dict(data)
