# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Volumes from the files that people have, with the geometry that ITK finds in them, and back into files.

Fields are applied by ITK, ANTs and 3D Slicer to the same files, so that where a header can be read in two ways, ITK's
way is the right one. In memory, geometry is MONAI's: an affine from voxels to RAS millimetres.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from monai.data import MetaTensor

from monai_sacb.data.displacement_files import NIFTI_SUFFIXES
from monai_sacb.data.frames import LPS_TO_RAS
from monai_sacb.data.itk_images import array_to_itk, itk_reason, quiet_itk, read_itk_header
from monai_sacb.utils import plain_tensor, replacing

__all__ = ["VOLUME_SUFFIXES", "check_overlap", "read_label_volume", "read_mask_volume", "read_volume", "write_volume"]

VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")
# of the images that ITK's package for Python writes
ITK_TYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
# cosine between two axes; ITK refuses NIfTI files from about twice as much
SHEAR_TOLERANCE = 1.5e-4
# of a voxel: what headers differ by when one and the same is written in two ways
GRID_TOLERANCE = 0.02
# of the distance of slices: by how much they may lie off their even places
SLICE_TOLERANCE = 0.1
# millimetres, from a tenth of a micrometre on
VOXEL_SIZES = (1e-4, 1e4)
# points along each axis at which fields of view are compared
OVERLAP_POINTS = 48

# MemoryError and OverflowError: a header that promises more than there is
_UNREADABLE = (OSError, EOFError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError, zlib.error)
# numpy's names of the components that ITK knows under C's
_COMPONENTS = {
    "unsigned_char": "uint8",
    "char": "int8",
    "short": "int16",
    "unsigned_short": "uint16",
    "int": "int32",
    "unsigned_int": "uint32",
    "float": "float32",
    "double": "float64",
}


class _Raw(NamedTuple):
    """What a file holds: values in its axis order, affine to RAS mm, and the type that keeps the values."""

    array: np.ndarray
    affine: np.ndarray
    dtype: str


def _itk_affine(io: Any) -> np.ndarray:
    """Voxels to RAS millimetres, of the first three axes, from ITK's reader."""
    direction = np.array([io.GetDirection(axis)[:3] for axis in range(3)]).T
    affine = np.eye(4)
    affine[:3, :3] = direction * [io.GetSpacing(axis) for axis in range(3)]
    affine[:3, 3] = [io.GetOrigin(axis) for axis in range(3)]
    return np.asarray(LPS_TO_RAS @ affine)


def _check_layout(name: str, shape: tuple[int, ...], components: int = 1) -> None:
    """Refuse what is not one scalar volume; ``shape`` may have axes of length one at its end."""
    if components > 1:
        kind = "a colour image" if components in (3, 4) else "not a scalar image"
        raise ValueError(f"{name} is {kind}, with {components} values a voxel; one value a voxel is needed.")
    frames = int(np.prod(shape[3:]))
    if frames != 1:
        raise ValueError(f"{name} is a {len(shape)}-D image of size {shape}, {frames} volumes in one; one is needed.")
    if len(shape) < 3 or 1 in shape[:3]:
        raise ValueError(f"{name} is a single slice or less, of size {shape}; a volume is needed.")
    if 0 in shape:
        raise ValueError(f"{name} has no voxels: its size is {shape}.")


def _check_spacing(name: str, spacing: Any) -> None:
    sizes = [float(size) for size in spacing]
    if not all(np.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(f"{name} has voxels of {sizes} mm by its header; sizes must be positive numbers.")
    if min(sizes) < VOXEL_SIZES[0] or max(sizes) > VOXEL_SIZES[1]:
        raise ValueError(
            f"{name} has voxels of {sizes} mm by its header; sizes must be from {VOXEL_SIZES[0]:g} to "
            f"{VOXEL_SIZES[1]:g} mm."
        )


def _check_nifti_header(name: str, path: str) -> None:
    """Refuse what readers of NIfTI silently repair or pass on: sizes that are none, positions that are not numbers."""
    header_path = re.sub(r"\.img(\.gz)?$", r".hdr\1", path)
    with ImageOpener(header_path) as file:
        block = file.read(540)
    # the first number is the size of the header, in either byte order
    kind = (
        nib.Nifti2Header
        if 540 in np.frombuffer(block[:4], "<i4").tolist() + np.frombuffer(block[:4], ">i4").tolist()
        else nib.Nifti1Header
    )
    header = kind(block[: kind.sizeof_hdr], check=False)
    _check_spacing(name, header["pixdim"][1 : 1 + min(3, max(1, int(header["dim"][0])))])
    fields = (["srow_x", "srow_y", "srow_z"] if header["sform_code"] > 0 else []) + (
        ["quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"]
        if header["qform_code"] > 0
        else []
    )
    bad = [field for field in fields if not np.isfinite(header[field]).all()]
    if bad:
        raise ValueError(f"{name} has NaN or infinite numbers in its header: {', '.join(bad)}.")


def _itk_geometry(name: str, path: str, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The affine by which ITK reads a file, of which nibabel has found another one perhaps."""
    try:
        io = read_itk_header(path)
    except RuntimeError as error:
        if "orthonormal" in str(error) and np.linalg.det(affine[:3, :3]) == 0:
            raise ValueError(f"{name} has a header whose axes span no volume: {affine.tolist()}.") from error
        if "orthonormal" in str(error):
            raise ValueError(
                f"{name} has a sheared header, its axes are not at right angles: {affine.tolist()}; "
                "ITK cannot hold that, so resample it to a rectangular grid first."
            ) from error
        raise
    # ITK knows neither MGH nor NIfTI-2 files
    if io is None:
        return affine
    found = _itk_affine(io)
    corners = np.array(np.meshgrid(*[[0, size - 1] for size in shape[:3]])).reshape(3, -1)
    difference = (found - affine)[:3, :3] @ corners + (found - affine)[:3, 3:]
    if np.abs(difference).max() > GRID_TOLERANCE * np.linalg.norm(found[:3, :3], axis=0).min():
        logging.getLogger(__name__).warning(
            f"The header of {name} places its voxels in two ways, up to {np.linalg.norm(difference, axis=0).max():.3g} "
            f"mm apart; {found.tolist()} is used, as ITK, ANTs and 3D Slicer do, not {affine.tolist()}."
        )
    return found


def _read_nibabel(name: str, path: str) -> _Raw | None:
    """By nibabel, which notices truncated NIfTI files where ITK does not; None for files that it does not know."""
    try:
        image = nib.load(path)
    except ImageFileError:
        return None
    except HeaderDataError as error:
        raise ValueError(f"cannot read {name}: {itk_reason(error)}") from error
    if isinstance(image, nib.Nifti1Pair):
        _check_nifti_header(name, path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise ValueError(f"{name} is not a volume, but holds {type(image).__name__}.")
    stored = image.get_data_dtype()
    _check_layout(name, image.shape, len(stored.names or ("value",)))
    if stored.kind not in "iufb":
        raise ValueError(f"{name} has voxels of type {stored}; real numbers are needed.")
    affine = _itk_geometry(name, path, np.asarray(image.affine, np.float64), image.shape)
    # scaled integers come as float64, of which the file has no more than float32
    array = np.asarray(image.dataobj).reshape(image.shape[:3])
    return _Raw(array, affine, stored.newbyteorder("=").name if array.dtype.kind == stored.kind else "float32")


def _pixel_type(dtype: str) -> Any:
    types = {"uint8": itk.UC, "int16": itk.SS, "uint16": itk.US, "float32": itk.F}
    return types.get(dtype, itk.D)


def _from_itk(image: Any, affine: np.ndarray, dtype: str) -> _Raw:
    # ITK's arrays have the last axis first
    return _Raw(itk.array_from_image(image).transpose(2, 1, 0), affine, dtype)


def _read_itk(name: str, path: str) -> _Raw:
    io = read_itk_header(path)
    if io is None:
        raise ValueError(f"{name} is not an image that nibabel or ITK reads.")
    dims = io.GetNumberOfDimensions()
    _check_layout(name, tuple(io.GetDimensions(axis) for axis in range(dims)), io.GetNumberOfComponents())
    _check_spacing(name, [io.GetSpacing(axis) for axis in range(3)])
    affine = _itk_affine(io)
    dtype = _COMPONENTS.get(io.GetComponentTypeAsString(io.GetComponentType()), "float64")
    reader = itk.ImageFileReader[itk.Image[_pixel_type(dtype), 3]].New(FileName=path)
    with quiet_itk():
        reader.Update()
    return _from_itk(reader.GetOutput(), affine, dtype)


def _read_series(name: str, path: str) -> _Raw:
    """The one series in a folder of DICOM files."""
    with quiet_itk():
        finder = itk.GDCMSeriesFileNames.New(UseSeriesDetails=True, Directory=path)
        found = list(finder.GetSeriesUIDs())
    if not found:
        raise ValueError(f"{name} is a folder without DICOM images.")
    files = {uid: list(finder.GetFileNames(uid)) for uid in found}
    if len(found) > 1:
        series = ", ".join(f"'{uid}' ({len(files[uid])} files)" for uid in found)
        raise ValueError(f"{name} is a folder with {len(found)} DICOM series: {series}; give a folder with one.")
    slices = files[found[0]]
    if len(slices) < 2:
        raise ValueError(f"{name} is a folder with a single DICOM slice; a volume is needed.")
    io = read_itk_header(slices[0])
    _check_layout(name, (io.GetDimensions(0), io.GetDimensions(1), len(slices)), io.GetNumberOfComponents())
    # slices may be scaled each by its own factor
    reader = itk.ImageSeriesReader[itk.Image[itk.F, 3]].New(FileNames=slices)
    reader.SetImageIO(itk.GDCMImageIO.New())
    with quiet_itk():
        reader.Update()
    image = reader.GetOutput()
    spacing = np.array(image.GetSpacing())
    _check_spacing(name, spacing)
    details = dict(image)
    uneven = float(details.get("ITK_non_uniform_sampling_deviation", 0.0))
    if uneven > SLICE_TOLERANCE * spacing[2]:
        raise ValueError(f"{name} has slices up to {uneven:.3g} mm off their even places; some may be missing.")
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * spacing
    affine[:3, 3] = np.array(image.GetOrigin())
    raw = _from_itk(image, LPS_TO_RAS @ affine, _COMPONENTS.get(io.GetComponentTypeAsString(io.GetComponentType()), ""))
    whole = raw.dtype.lstrip("u").startswith("int") and bool((raw.array == np.rint(raw.array)).all())
    return raw if whole else raw._replace(dtype="float32")


def _read(path: str | os.PathLike[str], name: str) -> tuple[_Raw, dict[str, Any], str]:
    """The content of a file that has passed the checks of geometry, meta data, and what to call it in messages."""
    place = Path(path).expanduser().absolute()
    named = f"{name} '{place}'"
    if not place.exists():
        raise FileNotFoundError(f"{named} does not exist.")
    try:
        if place.is_dir():
            raw = _read_series(named, str(place))
        else:
            raw = _read_nibabel(named, str(place)) or _read_itk(named, str(place))
    except _UNREADABLE as error:
        # the sentences of this module name the file already
        if named in str(error):
            raise
        raise ValueError(f"cannot read {named}, which may be damaged or truncated: {itk_reason(error)}") from error
    _check_layout(named, raw.array.shape)
    if not np.isfinite(raw.affine).all():
        raise ValueError(f"{named} has an affine with NaN or infinite numbers: {raw.affine.tolist()}.")
    spacing = np.linalg.norm(raw.affine[:3, :3], axis=0)
    _check_spacing(named, spacing)
    cosines = raw.affine[:3, :3] / spacing
    shear = float(np.abs(cosines.T @ cosines - np.eye(3)).max())
    if shear > SHEAR_TOLERANCE:
        raise ValueError(
            f"{named} has a sheared header, its axes are not at right angles (cosine {shear:.3g}); ITK cannot hold "
            "that, so resample it to a rectangular grid first."
        )
    bad = int((~np.isfinite(raw.array)).sum()) if raw.array.dtype.kind == "f" else 0
    if bad:
        raise ValueError(f"{named} has {bad} NaN or infinite voxels.")
    meta = {"filename_or_obj": str(place), "original_dtype": raw.dtype, "spatial_shape": np.array(raw.array.shape)}
    return raw, meta, named


def _volume(array: np.ndarray, raw: _Raw, meta: dict[str, Any]) -> MetaTensor:
    values = torch.from_numpy(np.ascontiguousarray(array))[None]
    affine = torch.from_numpy(np.ascontiguousarray(raw.affine))
    return MetaTensor(values, affine=affine, meta={**meta, "original_affine": affine.clone()})


def read_volume(path: str | os.PathLike[str], name: str = "image", allow_constant: bool = False) -> MetaTensor:
    """
    Read an image that can be registered, from whatever file it lies in.

    Args:
        path: a file that nibabel or ITK reads (NIfTI, NRRD, MetaImage, MGH, ...), or a folder with one DICOM series.
        name: what the image is, for messages, such as ``"moving image"``.
        allow_constant: whether all voxels may have one value, as where only the grid matters.

    Returns:
        ``(1, D, H, W)``, float32, in the file's axis order. Its affine leads to RAS millimetres and is the one that ITK
        finds in the file; a warning is logged where the header can be read otherwise. Meta data: ``filename_or_obj`` is
        the absolute path, ``original_dtype`` the type (of numpy) that keeps the file's values, after scaling.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is damaged or no image; when it is not one scalar volume; when its voxel sizes are not
            positive, its header is not finite or sheared, its voxels are not finite or all the same; when a folder has
            no DICOM series, or several, or slices are missing.
    """
    raw, meta, named = _read(path, name)
    with np.errstate(over="ignore"):
        array = raw.array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{named} has values beyond those of 32-bit numbers.")
    if not allow_constant and array.min() == array.max():
        raise ValueError(f"{named} is constant, {array.flat[0]:g} everywhere; there is nothing to register.")
    return _volume(array, raw, meta)


def read_label_volume(path: str | os.PathLike[str], name: str = "label map") -> MetaTensor:
    """
    Read a label map. Labels stored as floating point numbers are fine if they are whole. An empty map is warned of.

    Args:
        path: as for :py:func:`read_volume`.
        name: what the map is, for messages.

    Returns:
        ``(1, D, H, W)``, int32, otherwise as from :py:func:`read_volume`.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: As for :py:func:`read_volume`, except that a constant map is not refused; and when values are not
            whole or do not fit into 32 bits.
    """
    raw, meta, named = _read(path, name)
    array = raw.array
    if array.dtype.kind == "f":
        broken = array != np.rint(array)
        count = int(broken.sum())
        if count:
            raise ValueError(
                f"{named} is not a label map: {count} voxels hold no whole number, such as {array[broken][0]:g}; it "
                "may have been resampled linearly."
            )
    lowest, highest = array.min(), array.max()
    limits = np.iinfo(np.int32)
    if lowest < limits.min or highest > limits.max:
        raise ValueError(f"{named} has labels from {lowest:g} to {highest:g}, which 32-bit integers cannot hold.")
    if lowest == highest == 0:
        logging.getLogger(__name__).warning(f"{named} is empty.")
    return _volume(array.astype(np.int32), raw, meta)


def read_mask_volume(path: str | os.PathLike[str], name: str = "mask") -> MetaTensor:
    """
    Read a mask: all voxels that are not 0.

    Args:
        path: as for :py:func:`read_volume`.
        name: what the mask is, for messages.

    Returns:
        ``(1, D, H, W)``, bool, otherwise as from :py:func:`read_volume`.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: As for :py:func:`read_volume`, except that a mask may be full; and when it is empty.
    """
    raw, meta, named = _read(path, name)
    mask = raw.array != 0
    if not mask.any():
        raise ValueError(f"{named} is empty: all its voxels are 0.")
    return _volume(mask, raw, meta)


def check_overlap(moving: MetaTensor, fixed: MetaTensor, by: str = "by their headers") -> float:
    """
    Refuse a pair said to be aligned whose fields of view have nothing in common.

    Args:
        moving: ``(C, D, H, W)`` with its affine to RAS millimetres.
        fixed: likewise.
        by: what has placed them, for the message.

    Returns:
        which share of the fixed image's field of view lies in the moving image's, above 0 and up to 1, to about a
        percent.

    Raises:
        ValueError: When the fields of view are disjoint.
    """

    def share(inner: MetaTensor, outer: MetaTensor) -> float:
        steps = [torch.linspace(-0.5, size - 0.5, OVERLAP_POINTS, dtype=torch.float64) for size in inner.shape[1:]]
        voxels = torch.cartesian_prod(*steps)
        between = torch.linalg.inv(outer.affine.double().cpu()) @ inner.affine.double().cpu()
        places = voxels @ between[:3, :3].T + between[:3, 3]
        size = torch.tensor(outer.shape[1:], dtype=torch.float64)
        # a field of view may be matched exactly, up to rounding
        return float(((places >= -0.5 - 1e-6) & (places <= size - 0.5 + 1e-6)).all(1).double().mean())

    covered = share(fixed, moving)
    # a small image may lie between the points of a large one
    if covered == 0 and share(moving, fixed) == 0:
        names = [
            f"the {role} image" + (f" '{image.meta['filename_or_obj']}'" if "filename_or_obj" in image.meta else "")
            for role, image in (("moving", moving), ("fixed", fixed))
        ]
        distance = float((_centre(moving) - _centre(fixed)).norm())
        raise ValueError(
            f"the fields of view of {names[0]} and {names[1]} do not overlap {by}: their centres are "
            f"{distance:.4g} mm apart."
        )
    return max(covered, float(np.finfo(np.float32).tiny))


def _centre(image: MetaTensor) -> torch.Tensor:
    middle = (torch.tensor(image.shape[1:], dtype=torch.float64) - 1) / 2
    affine = image.affine.double().cpu()
    return affine[:3, :3] @ middle + affine[:3, 3]


def write_volume(image: MetaTensor, path: str | os.PathLike[str], dtype: Any = None) -> None:
    """
    Write a volume by a temporary name and renamed: as NIfTI, millimetres, sform and qform both set, or by ITK.

    Args:
        image: ``(1, D, H, W)`` with its affine to RAS millimetres, real or integer.
        path: the file, ``.nii`` or ``.nii.gz``; ``.nrrd`` or ``.mha``, compressed.
        dtype: numpy's type of the stored values, unscaled; the image's own by default (uint8 for bool, int32 for int64,
            float32 for halves). For integers values are rounded, and cut to the type's range, which is warned of.

    Raises:
        ValueError: When the image is not one volume with an affine or not finite, the name has another extension, or
            the type is not one of real numbers.
        OSError: When it cannot be written.
    """
    if not isinstance(image, MetaTensor) or image.dim() != 4 or len(image) != 1:
        raise ValueError(
            f"image must have shape (1, D, H, W) and an affine, got {type(image).__name__} {list(image.shape)}."
        )
    # ITK's writers and readers look for lower case
    if not str(path).endswith(VOLUME_SUFFIXES):
        raise ValueError(f"the file must be named {', '.join(VOLUME_SUFFIXES)}, got '{path}'.")
    values = plain_tensor(image)[0].detach().cpu()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    array = values.numpy()
    wanted = np.dtype(
        {"bool": "uint8", "int64": "int32"}.get(array.dtype.name, array.dtype) if dtype is None else dtype
    )
    if wanted.kind not in "iuf" or wanted.name == "float16":
        raise ValueError(f"dtype must be an integer or a float type that NIfTI knows, got {dtype}.")
    nifti = str(path).endswith(NIFTI_SUFFIXES)
    if not nifti and wanted.name not in ITK_TYPES:
        raise ValueError(f"'{path}' must be of one of the types {', '.join(ITK_TYPES)}, got {wanted.name}.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{path}: an image must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite voxels."
        )
    if wanted.kind in "iu" and array.dtype != wanted:
        limits = np.iinfo(wanted)
        array = np.rint(array) if array.dtype.kind == "f" else array
        outside = int(((array < limits.min) | (array > limits.max)).sum())
        if outside:
            logging.getLogger(__name__).warning(f"{path}: {outside} voxels are cut to the range of {wanted.name}.")
        array = array.clip(limits.min, limits.max)
    affine = image.affine.double().cpu().numpy()
    if not nifti:
        volume = array_to_itk(array.astype(wanted), LPS_TO_RAS @ affine)
        with replacing(path) as temporary:
            try:
                with quiet_itk():
                    itk.imwrite(volume, str(temporary), compression=True)
            except RuntimeError as error:
                raise OSError(f"cannot write '{path}': {itk_reason(error)}") from error
        return
    written = nib.Nifti1Image(array.astype(wanted), affine, dtype=wanted)
    # ITK looks at the sform only under this code, other tools at the qform
    written.set_sform(affine, code=1)
    written.set_qform(affine, code=1)
    written.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        nib.save(written, temporary)
