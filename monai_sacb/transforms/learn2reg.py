# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Displacement fields in the forms that the Learn2Reg challenge takes."""

from __future__ import annotations

import itertools
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
from monai_sacb.utils import file_stem, image_name, subject_name

__all__ = ["SaveLearn2Regd", "displacement_to_ddf", "load_learn2reg_field", "save_learn2reg_field"]


def _numbers(name: str, described: str) -> tuple[str, str]:
    """The numbers of subject and modality, four digits each, that Learn2Reg gives in the name of a file."""
    challenge = re.search(r"(\d{4})_(\d{4})$", name)
    if challenge:
        return challenge[1], challenge[2]
    # data from elsewhere: the last number is the subject's
    digits = re.findall(r"\d+", name)
    if not digits:
        raise ValueError(f"{described} has no number in its name for the field's name 'disp_0001_0002'.")
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

    def _name(self, moving: tuple[str, str], fixed: tuple[str, str], written: dict[str, tuple[str, str]]) -> str:
        """The name for two images, each by its subject's name and what to call it; other pairs must have others."""
        (fixed_id, fixed_modality), (moving_id, moving_modality) = _numbers(*fixed), _numbers(*moving)
        short = fixed_modality == moving_modality or (fixed_modality, moving_modality) == ("0000", "0001")
        if short and not self.long_names:
            name = f"disp_{fixed_id}_{moving_id}"
        else:
            name = f"disp_{fixed_id}_{fixed_modality}_{moving_id}_{moving_modality}"
        files = (moving[1], fixed[1])
        if written.setdefault(name, files) != files:
            raise ValueError(f"{' and '.join(files)} would be written to '{name}', as {' and '.join(written[name])}.")
        return name + self.extension

    def checked(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        What is to be registered, after a look at the names that all of its fields will have.

        Args:
            request: ``data`` and ``pairs``, as from :py:func:`monai_sacb.data.load_request`.

        Returns:
            the same.

        Raises:
            ValueError: When the file of an image has no number in its name, or two pairs would have one name.
        """
        paths = [str(subject["image"]) for subject in request["data"]]
        names = [file_stem(path) for path in paths]
        pairs = itertools.permutations(range(len(paths)), 2) if request["pairs"] is None else request["pairs"]
        written: dict[str, tuple[str, str]] = {}
        for pair in pairs:
            moving, fixed = (
                (names[i], f"{key} '{paths[i]}'") for i, key in zip(pair, (self.moving_key, self.fixed_key))
            )
            self._name(moving, fixed, written)
        return request

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        displacement, image = data[self.displacement_key], data[self.moving_key]
        meta = image.meta if isinstance(image, MetaTensor) else {}
        if "original_affine" not in meta:
            raise ValueError(f"{self.moving_key} must carry the meta data of its file, but it has no original_affine.")
        moving, fixed = (
            (subject_name(data[key]), image_name(key, data[key])) for key in (self.moving_key, self.fixed_key)
        )
        name = self._name(moving, fixed, self._written)
        ddf = displacement_to_ddf(displacement.as_tensor(), displacement.affine, meta["original_affine"])
        save_learn2reg_field(ddf, self.output_dir / name, self.half_resolution)
        return dict(data)
