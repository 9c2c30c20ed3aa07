# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Displacement fields in the forms that the Learn2Reg challenge takes."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from scipy.ndimage import zoom

from monai.data import MetaTensor
from monai.transforms import Transform

from monai_sacb.networks.layers import reference_grid
from monai_sacb.utils import image_name, replacing, subject_name

__all__ = ["SaveLearn2Regd", "displacement_to_ddf", "load_learn2reg_field", "save_learn2reg_field"]

EXTENSIONS = (".nii.gz", ".npz")


def displacement_to_ddf(
    displacement: torch.Tensor, fixed_affine: torch.Tensor, moving_affine: torch.Tensor
) -> torch.Tensor:
    """
    Field in voxels from a displacement in millimetres of ITK's LPS frame, as
    :py:func:`monai_sacb.transforms.ddf_to_displacement` undone, for any grids of the two images.

    Args:
        displacement: ``(3, D, H, W)``, for every voxel of a grid of the fixed image the vector from its place to its
            partner's in the moving image, LPS millimetres.
        fixed_affine: ``(4, 4)``, voxels of that grid to RAS millimetres.
        moving_affine: ``(4, 4)``, voxels of the moving image's grid to RAS millimetres.

    Returns:
        ``(3, D, H, W)``, float32, pull-back: the partner of the voxel p is the voxel ``p + ddf(p)`` of the moving grid,
        channel i along array axis i.

    Raises:
        ValueError: When the displacement is not 3-D.
    """
    if displacement.dim() != 4 or displacement.shape[0] != 3:
        raise ValueError(f"displacement must have shape (3, D, H, W), got {list(displacement.shape)}.")
    device = displacement.device
    fixed, moving = (torch.as_tensor(a, dtype=torch.float64, device=device) for a in (fixed_affine, moving_affine))
    inverse = torch.linalg.inv(moving)
    voxels = reference_grid(list(displacement.shape[1:]), device).double()
    lps = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64, device=device).view(3, 1, 1, 1)
    between = inverse @ fixed
    partner = torch.einsum("ij,jdhw->idhw", between[:3, :3], voxels) + between[:3, 3].view(3, 1, 1, 1)
    partner = partner + torch.einsum("ij,jdhw->idhw", inverse[:3, :3], lps * displacement.double())
    return (partner - voxels).float()


def save_learn2reg_field(ddf: torch.Tensor, path: str | os.PathLike[str], half_resolution: bool = False) -> None:
    """
    Write a field as a submission to Learn2Reg holds it.

    Args:
        ddf: ``(3, D, H, W)`` in voxels, pull-back, on the array of the fixed image's file, neither turned nor padded.
        path: the file: ``.nii.gz``, float32, or ``.npz``, float16 (rounds displacements of 16 to 32 voxels to 1/64);
            ``(D, H, W, 3)``. Written to a temporary name and renamed.
        half_resolution: the form of the editions of 2020 and 2021, ``.npz`` with float16 ``(3, D/2, H/2, W/2)``: half
            as many voxels from corner to corner, displacements still in voxels of the full grid.

    Raises:
        ValueError: When the shape is not that of a 3-D field, values are not finite (or too large for float16), the
            extension is another one, or a grid of odd size is to be halved.
    """
    path = Path(path)
    if ddf.dim() != 4 or ddf.shape[0] != 3:
        raise ValueError(f"ddf must have shape (3, D, H, W), got {list(ddf.shape)}.")
    if not path.name.endswith(EXTENSIONS):
        raise ValueError(f"the file of a Learn2Reg field must end in {' or '.join(EXTENSIONS)}, got '{path.name}'.")
    if half_resolution and not path.name.endswith(".npz"):
        raise ValueError(f"fields of half resolution are .npz files, got '{path.name}'.")
    if half_resolution and any(size % 2 for size in ddf.shape[1:]):
        raise ValueError(f"half resolution needs even sizes, got {tuple(ddf.shape[1:])}.")
    array = ddf.detach().cpu().numpy().astype(np.float32)
    # the challenge doubles it by the same function
    array = np.stack([zoom(c, 0.5, order=2) for c in array]) if half_resolution else np.moveaxis(array, 0, -1)
    if path.name.endswith(".npz"):
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"ddf must be finite, got {bad} NaN or infinite values.")
    with replacing(path) as temporary:
        if path.name.endswith(".npz"):
            np.savez_compressed(temporary, array)
        else:
            # voxels have no place in the world, and the challenge's own examples none either
            nib.save(nib.Nifti1Image(array, np.eye(4)), temporary)


def load_learn2reg_field(path: str | os.PathLike[str]) -> torch.Tensor:
    """
    Read a field of a submission to Learn2Reg, in any of the forms that :py:func:`save_learn2reg_field` writes.

    Args:
        path: the file, ``.nii.gz`` or ``.npz``. A field of half resolution is doubled as the challenge does it, by
            splines of order 2.

    Returns:
        ``(3, D, H, W)``, float32, in voxels, pull-back, on the array of the fixed image's file.

    Raises:
        ValueError: When the file cannot be read or holds no such field.
    """
    path = Path(path)
    if not path.name.endswith(EXTENSIONS):
        raise ValueError(f"the file of a Learn2Reg field must end in {' or '.join(EXTENSIONS)}, got '{path.name}'.")
    try:
        if path.name.endswith(".npz"):
            if path.is_file() and not zipfile.is_zipfile(path):
                raise ValueError("it is no archive of arrays")
            with np.load(path, allow_pickle=False) as arrays:
                if len(arrays.files) != 1:
                    raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
                array = arrays[arrays.files[0]]
        else:
            array = np.asarray(nib.load(path).dataobj)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"its values are of type {array.dtype}")
        array = array.astype(np.float32)
        # fields of half resolution are in .npz files only
        places = (array.shape[0], array.shape[-1]) if path.name.endswith(".npz") else (array.shape[-1],)
        if array.ndim != 4 or 3 not in places:
            raise ValueError(f"its shape {array.shape} is neither (D, H, W, 3) nor, in .npz, (3, D/2, H/2, W/2)")
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(f"it has {bad} NaN or infinite values")
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, ImageFileError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read the field '{path}': {reason}.") from error
    if array.shape[-1] == 3:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))
    return torch.from_numpy(np.stack([zoom(component, 2, order=2) for component in array]))


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
        if extension not in EXTENSIONS:
            raise ValueError(f"extension must be one of {EXTENSIONS}, got '{extension}'.")
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
