# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Displacement fields in voxels, and the forms in which the Learn2Reg challenge takes them."""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import zoom

from monai_sacb.data.frames import turned_vectors
from monai_sacb.networks.layers import reference_grid
from monai_sacb.utils import first_line, replacing

__all__ = [
    "LEARN2REG_EXTENSIONS",
    "ddf_to_displacement",
    "displacement_to_ddf",
    "load_learn2reg_field",
    "save_learn2reg_field",
]

LEARN2REG_EXTENSIONS = (".nii.gz", ".npz")
# of the parsers of zip archives, of numpy's headers and of NIfTI; RuntimeError: encrypted, or packed in unknown ways
_UNREADABLE = (
    OSError,
    EOFError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ImageFileError,
    HeaderDataError,
)


def ddf_to_displacement(ddf: torch.Tensor, fixed_affine: torch.Tensor, moving_affine: torch.Tensor) -> torch.Tensor:
    """
    Displacement in millimetres of ITK's LPS frame from a field in voxels.

    The images are paired by array index: the voxel p of the fixed image goes to the voxel ``p + ddf(p)`` of the moving
    image's grid, and each place is where its own image's affine says.

    Args:
        ddf: ``(d, *spatial)`` in voxels, 2-D or 3-D, pull-back, channel i along array axis i.
        fixed_affine: ``(4, 4)``, voxels of the fixed grid to RAS millimetres.
        moving_affine: ``(4, 4)``, voxels of the moving grid to RAS millimetres.

    Returns:
        ``(3, *spatial)``, for every voxel of the fixed grid the vector from its place to its partner's in the moving
        image, LPS millimetres, float32. A slice, too, lies in space.

    Raises:
        ValueError: When the shape is not that of a field, or an affine not ``(4, 4)``.
    """
    dims = ddf.dim() - 1
    if dims not in (2, 3) or ddf.shape[0] != dims:
        raise ValueError(f"ddf must have shape (d, *spatial) with d = 2 or 3, got {list(ddf.shape)}.")
    for name, affine in (("fixed_affine", fixed_affine), ("moving_affine", moving_affine)):
        if tuple(affine.shape) != (4, 4):
            raise ValueError(f"{name} must have shape (4, 4), got {list(affine.shape)}.")
    voxels = reference_grid(list(ddf.shape[1:]), ddf.device).double()
    fixed, moving = (torch.as_tensor(a, dtype=torch.float64, device=ddf.device) for a in (fixed_affine, moving_affine))
    column = (3, *[1] * dims)
    partner = torch.einsum("ij,j...->i...", moving[:3, :dims], voxels + ddf) + moving[:3, 3].view(column)
    place = torch.einsum("ij,j...->i...", fixed[:3, :dims], voxels) + fixed[:3, 3].view(column)
    return turned_vectors(partner - place).float()


def displacement_to_ddf(
    displacement: torch.Tensor, fixed_affine: torch.Tensor, moving_affine: torch.Tensor
) -> torch.Tensor:
    """
    Field in voxels from a displacement in millimetres of ITK's LPS frame, as
    :py:func:`ddf_to_displacement` undone, for any grids of the two images.

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
    between = inverse @ fixed
    partner = torch.einsum("ij,jdhw->idhw", between[:3, :3], voxels) + between[:3, 3].view(3, 1, 1, 1)
    partner = partner + torch.einsum("ij,jdhw->idhw", inverse[:3, :3], turned_vectors(displacement.double()))
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
    if not path.name.endswith(LEARN2REG_EXTENSIONS):
        raise ValueError(
            f"the file of a Learn2Reg field must end in {' or '.join(LEARN2REG_EXTENSIONS)}, got '{path.name}'."
        )
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
    if not path.name.endswith(LEARN2REG_EXTENSIONS):
        raise ValueError(
            f"the file of a Learn2Reg field must end in {' or '.join(LEARN2REG_EXTENSIONS)}, got '{path.name}'."
        )
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
        places = array.shape[:1] + array.shape[-1:] if path.name.endswith(".npz") else array.shape[-1:]
        if array.ndim != 4 or 3 not in places:
            raise ValueError(f"its shape {array.shape} is neither (D, H, W, 3) nor, in .npz, (3, D/2, H/2, W/2)")
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise ValueError(f"it has {bad} NaN or infinite values")
    except _UNREADABLE as error:
        raise ValueError(f"cannot read the field '{path}': {first_line(error)}.") from error
    if array.shape[-1] == 3:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))
    return torch.from_numpy(np.stack([zoom(component, 2, order=2) for component in array]))
