# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Files of displacement fields: images of vectors in millimetres as ITK has them, and of voxels.

Inside, all is RAS millimetres; ITK's LPS exists in the files only. Fields pull back: they lead from a place in the
fixed image's space to its partner in the moving image's space.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from monai_sacb.data.frames import lps_affine, turned_vectors
from monai_sacb.data.itk_images import quiet_itk, read_itk_header
from monai_sacb.data.spatial_mapping import Grid, PhysicalField
from monai_sacb.data.voxel_fields import ddf_to_displacement, displacement_to_ddf
from monai_sacb.utils import replacing

__all__ = [
    "ddf_from_field",
    "field_from_ddf",
    "field_from_itk_image",
    "read_displacement",
    "read_voxel_ddf",
    "save_displacement",
    "write_displacement",
    "write_voxel_ddf",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
VECTOR_IMAGE_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
    LookupError,
    struct.error,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)


def has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def read_failure(error: BaseException) -> str:
    """What went wrong, as the end of a sentence; ITK's messages have it in one of several lines."""
    if isinstance(error, MemoryError):
        return "it says that it is larger than the memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # the place in ITK's source, and the address of an object there, say nothing to anybody
    noise = r"^(?:ITK |itk::)ERROR: (\w+\(0x[0-9a-f]+\): )?"
    lines = [re.sub(noise, "", line.strip()) for line in str(error).splitlines()]
    line = next((line for line in lines if line and not re.search(r"\.[ch]xx:\d+:$", line)), "").rstrip(".:")
    return line or type(error).__name__


# ---- images of vectors ----


def save_displacement(displacement: torch.Tensor, affine: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """
    Write a displacement field as the NIfTI vector image that ITK, ANTs and 3D Slicer take for a transform.

    Args:
        displacement: ``(3, *spatial)``, 2-D or 3-D, LPS millimetres, from each voxel of the fixed grid to its partner's
            place. That of a slice is written as a volume of one slice.
        affine: ``(4, 4)``, voxels of the fixed grid to RAS millimetres.
        path: the file, ``.nii`` or ``.nii.gz``; written to a temporary name and renamed.

    Raises:
        ValueError: When the shape is not that of a field, or values are not finite.
    """
    if displacement.dim() not in (3, 4) or displacement.shape[0] != 3:
        raise ValueError(f"displacement must have shape (3, *spatial), 2-D or 3-D, got {list(displacement.shape)}.")
    bad = int((~torch.isfinite(displacement)).sum())
    if bad:
        raise ValueError(f"displacement must be finite, got {bad} NaN or infinite values.")
    # NIfTI keeps the components of a vector in the fifth axis
    array = displacement.detach().cpu().numpy().astype(np.float32)
    vectors = np.moveaxis(array.reshape(*array.shape, *[1] * (5 - array.ndim)), 0, -1)
    image = nib.Nifti1Image(vectors, np.asarray(affine))
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        nib.save(image, temporary)


def write_displacement(field: PhysicalField, path: str | os.PathLike[str]) -> None:
    """
    Write a field as :py:func:`save_displacement` does: NIfTI vector image, intent 1007, LPS millimetres, float32.

    Args:
        field: in RAS millimetres.
        path: the file, ``.nii`` or ``.nii.gz``.

    Raises:
        ValueError: When the name ends otherwise, or the field is not finite.
    """
    if not has_suffix(Path(path), NIFTI_SUFFIXES):
        raise ValueError(f"a displacement image must end in .nii or .nii.gz, got '{Path(path).name}'.")
    save_displacement(turned_vectors(field.vectors), field.affine, path)


def _read_nifti(path: Path) -> tuple[Any, tuple[int, ...], torch.Tensor]:
    """A NIfTI file, its shape, and voxels to RAS millimetres."""
    image: Any = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"it is {type(image).__name__} instead of NIfTI")
    if image.get_data_dtype().kind not in "fiu":
        raise ValueError(f"its values are of type {image.get_data_dtype()}")
    unit = image.header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise ValueError(f"its grid is in the unit '{unit}' instead of mm")
    affine = torch.as_tensor(np.asarray(image.affine), dtype=torch.float64)
    if not bool(torch.isfinite(affine).all()) or float(torch.linalg.det(affine)) == 0:
        raise ValueError(f"its affine is no affine of a volume: {affine.tolist()}")
    return image, tuple(int(size) for size in image.shape), affine


def _nifti_displacement(path: Path) -> PhysicalField:
    image, shape, affine = _read_nifti(path)
    intent = int(image.header["intent_code"])
    name = bytes(image.header["intent_name"].tobytes()).rstrip(b"\0").decode("latin-1")
    if len(shape) == 4 and shape[3] == 3:
        raise ValueError(
            f"it is 4-D of shape {shape}, which may be a field in voxels, "
            "instead of a vector image (D, H, W, 1, 3) with intent 1007 in LPS mm"
        )
    if len(shape) != 5 or shape[3:] != (1, 3) or intent != 1007:
        raise ValueError(
            f"its shape {shape} and intent {intent} are not those of a vector image (D, H, W, 1, 3) with intent 1007"
        )
    if "NREG" in name:
        raise ValueError(f"it is a transform of NiftyReg ('{name}'), which is not in ITK's form")
    vectors = np.asarray(image.dataobj, dtype=np.float32)[:, :, :, 0]
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(vectors, -1, 0)))
    return PhysicalField(turned_vectors(tensor), affine)


def field_from_itk_image(image: Any) -> PhysicalField:
    """The field of an ITK image of vectors in LPS millimetres."""
    # ITK's arrays have the axes backwards, the components last
    array = np.asarray(itk.array_view_from_image(image)).transpose(3, 2, 1, 0).astype(np.float32)
    geometry = torch.eye(4, dtype=torch.float64)
    direction = np.asarray(itk.array_from_matrix(image.GetDirection()), dtype=np.float64)
    geometry[:3, :3] = torch.from_numpy(direction * np.array(list(image.GetSpacing())))
    geometry[:3, 3] = torch.tensor(list(image.GetOrigin()), dtype=torch.float64)
    if not bool(torch.isfinite(geometry).all()) or float(torch.linalg.det(geometry)) == 0:
        raise ValueError("the grid of its field has no volume")
    vectors = torch.from_numpy(np.ascontiguousarray(array))
    return PhysicalField(turned_vectors(vectors), torch.from_numpy(lps_affine(geometry)))


def _itk_displacement(path: Path) -> PhysicalField:
    source = read_itk_header(str(path))
    if source is None:
        raise ValueError("ITK does not know its format")
    dims, components = int(source.GetNumberOfDimensions()), int(source.GetNumberOfComponents())
    kind = source.GetComponentTypeAsString(source.GetComponentType())
    if (dims, components) != (3, 3) or kind not in ("float", "double"):
        raise ValueError(f"it is {dims}-D with {components} components of type {kind} instead of 3-D with 3 floats")
    reader = itk.ImageFileReader[itk.Image[itk.Vector[itk.F, 3], 3]].New(FileName=str(path))
    with quiet_itk():
        reader.Update()
    return field_from_itk_image(reader.GetOutput())


def read_displacement(path: str | os.PathLike[str]) -> PhysicalField:
    """
    Read a displacement image as ITK, ANTs and 3D Slicer write it.

    Args:
        path: a NIfTI vector image (5-D, intent 1007), or an NRRD or MetaImage file of vectors; LPS millimetres.

    Returns:
        the field in RAS millimetres.

    Raises:
        ValueError: When the file cannot be read, or is no such image, as a scalar image or a field in voxels.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if has_suffix(path, NIFTI_SUFFIXES):
            field = _nifti_displacement(path)
        elif has_suffix(path, VECTOR_IMAGE_SUFFIXES):
            field = _itk_displacement(path)
        else:
            raise ValueError(f"its name does not end in {', '.join(NIFTI_SUFFIXES + VECTOR_IMAGE_SUFFIXES)}")
        _check_finite(field.vectors)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read the displacement image '{path}': {read_failure(error)}.") from error
    return field


def _check_finite(vectors: torch.Tensor) -> None:
    bad = int((~torch.isfinite(vectors)).sum())
    if bad or not vectors.numel():
        raise ValueError(f"it has {bad} NaN or infinite values" if bad else "it is empty")


# ---- fields in voxels ----


def ddf_from_field(field: PhysicalField, moving_grid: Grid | None = None) -> torch.Tensor:
    """
    A field in voxels.

    Args:
        field: in RAS millimetres, on a grid of the fixed image's space.
        moving_grid: the moving image's; the field's own if None.

    Returns:
        ``(3, D, H, W)``, float32, pull-back: the partner of the voxel p is the voxel ``p + ddf(p)`` of the moving grid.
    """
    vectors = turned_vectors(field.vectors.double())
    return displacement_to_ddf(vectors, field.affine, field.affine if moving_grid is None else moving_grid.affine)


def field_from_ddf(ddf: torch.Tensor, fixed_grid: Grid, moving_grid: Grid | None = None) -> PhysicalField:
    """
    :py:func:`ddf_from_field` undone.

    Args:
        ddf: ``(3, D, H, W)`` in voxels, pull-back.
        fixed_grid: what the field lies on.
        moving_grid: the moving image's; the fixed one if None.

    Returns:
        the field in RAS millimetres.

    Raises:
        ValueError: When the field does not have the shape of its grid.
    """
    if tuple(ddf.shape) != (3, *fixed_grid.shape):
        raise ValueError(f"a field on the grid {fixed_grid.shape} must have shape (3, D, H, W), got {list(ddf.shape)}.")
    moving = fixed_grid if moving_grid is None else moving_grid
    vectors = ddf_to_displacement(ddf, fixed_grid.affine, moving.affine)
    return PhysicalField(turned_vectors(vectors), fixed_grid.affine)


def write_voxel_ddf(field: PhysicalField, path: str | os.PathLike[str], moving_grid: Grid | None = None) -> None:
    """
    Write a field in voxels, as :py:func:`ddf_from_field` has it: NIfTI ``(D, H, W, 3)``, float32, on the field's grid.

    Args:
        field: in RAS millimetres, on a grid of the fixed image's space.
        path: the file, ``.nii`` or ``.nii.gz``; written to a temporary name and renamed.
        moving_grid: the moving image's; the field's own if None.

    Raises:
        ValueError: When the name ends otherwise.
    """
    if not has_suffix(Path(path), NIFTI_SUFFIXES):
        raise ValueError(f"a field in voxels must end in .nii or .nii.gz, got '{Path(path).name}'.")
    array = np.moveaxis(ddf_from_field(field, moving_grid).numpy(), 0, -1)
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(array, field.affine.numpy()), temporary)


def read_voxel_ddf(
    path: str | os.PathLike[str], fixed_grid: Grid | None = None, moving_grid: Grid | None = None
) -> PhysicalField:
    """
    Read a field in voxels, as :py:func:`write_voxel_ddf` writes it.

    Args:
        path: the file, ``.nii`` or ``.nii.gz``, ``(D, H, W, 3)``.
        fixed_grid: what the field lies on; the grid of the file if None.
        moving_grid: the moving image's; the fixed one if None.

    Returns:
        the field in RAS millimetres.

    Raises:
        ValueError: When the file cannot be read, is no such field, or does not have the shape of the grid.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if not has_suffix(path, NIFTI_SUFFIXES):
            raise ValueError("its name does not end in .nii or .nii.gz")
        image, shape, affine = _read_nifti(path)
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"its shape {shape} is not (D, H, W, 3)")
        array = np.asarray(image.dataobj, dtype=np.float32)
        ddf = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))
        _check_finite(ddf)
        grid = Grid((shape[0], shape[1], shape[2]), affine) if fixed_grid is None else fixed_grid
        return field_from_ddf(ddf, grid, moving_grid)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read the field in voxels '{path}': {read_failure(error)}.") from error
