# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Files of mappings: ITK's transform files, and displacement images taken for mappings.

Inside, all is RAS millimetres; ITK's LPS exists in the files only. Every mapping pulls back: it takes a place in the
fixed image's space to its partner in the moving image's space, which is what ITK, ANTs and 3D Slicer need to resample.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import signal
import struct
import tempfile
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch

from monai.utils import optional_import

from monai_sacb.data.displacement_files import (
    NIFTI_SUFFIXES,
    READ_ERRORS,
    VECTOR_IMAGE_SUFFIXES,
    field_from_itk_image,
    has_suffix,
    read_displacement,
    read_failure,
)
from monai_sacb.data.frames import LPS_TO_RAS, lps_affine, turned_vectors
from monai_sacb.data.itk_images import place_itk_image, quiet_itk
from monai_sacb.data.spatial_mapping import PhysicalField, SpatialMapping
from monai_sacb.utils import replacing

__all__ = ["mapping_from_itk", "mapping_to_itk", "read_transform", "write_transform"]

# not on Windows
resource, has_resource = optional_import("resource")
HDF5_SUFFIXES = (".h5", ".hdf5")
TEXT_SUFFIXES = (".tfm", ".txt")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TEXT_SIGNATURE = "#Insight Transform File"
# ITK's transforms that are a displacement field and nothing else when they are applied
FIELD_CLASSES = (
    "DisplacementFieldTransform",
    "BSplineSmoothingOnUpdateDisplacementFieldTransform",
    "GaussianSmoothingOnUpdateDisplacementFieldTransform",
)
# of a transform file, before compression: double precision, and what a composite of affines takes
BYTES_PER_VALUE, BASE_BYTES = 8, 1 << 15
# of a CPU, to read a file: many times what it takes
BASE_SECONDS, BYTES_PER_SECOND, WAIT_FACTOR = 5, 1 << 20, 20
# the disk, the quota, or the largest size of a file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# an affine in MATLAB's form has a few hundred bytes
MAX_MATLAB_BYTES = 1 << 20


def mapping_to_itk(mapping: SpatialMapping) -> Any:
    """
    ITK's composite transform that maps points as a mapping does, in LPS millimetres.

    Args:
        mapping: in RAS millimetres. Of no stages: the composite holds an affine that does nothing, since readers do not
            expect an empty one.

    Returns:
        ``itk.CompositeTransform[itk.D, 3]`` of affine and displacement field transforms.

    Raises:
        ValueError: When a field's grid has no volume.
    """
    composite = itk.CompositeTransform[itk.D, 3].New()
    # ITK sends points through the transform that was added last first
    for stage in reversed(mapping.stages or (torch.eye(4, dtype=torch.float64),)):
        composite.AddTransform(_field_to_itk(stage) if isinstance(stage, PhysicalField) else _affine_to_itk(stage))
    return composite


def _affine_to_itk(affine: torch.Tensor) -> Any:
    # a mapping in LPS: turned before and after, unlike a grid's affine
    matrix = lps_affine(affine) @ LPS_TO_RAS
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:3, :3])))
    transform.SetOffset(matrix[:3, 3].tolist())
    return transform


def _field_to_itk(field: PhysicalField) -> Any:
    geometry = lps_affine(field.affine)
    if not np.isfinite(geometry).all() or np.linalg.det(geometry) == 0:
        raise ValueError(f"the grid of a field must have a volume, got the affine {field.affine.tolist()}.")
    vectors = turned_vectors(field.vectors.detach().cpu())
    # memory of ITK's own: that of an array would not live as long as the transform
    image = itk.Image[itk.Vector[itk.D, 3], 3].New()
    image.SetRegions([int(size) for size in vectors.shape[1:]])
    image.Allocate()
    # ITK's arrays have the axes backwards, the components last
    itk.array_view_from_image(image)[...] = vectors.numpy().transpose(3, 2, 1, 0)
    place_itk_image(image, geometry)
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(image)
    return transform


def mapping_from_itk(transform: Any) -> SpatialMapping:
    """
    The mapping of an ITK transform.

    Args:
        transform: 3-D, in LPS millimetres: linear of any class, a displacement field, or a composite of those, which
            may hold composites in turn.

    Returns:
        the mapping in RAS millimetres.

    Raises:
        ValueError: When the transform is of another kind, or not 3-D.
    """
    return SpatialMapping(_stages(transform))


def _stages(transform: Any) -> list[torch.Tensor | PhysicalField]:
    transform = itk.down_cast(transform)
    name = transform.GetNameOfClass()
    if name == "CompositeTransform":
        children = [transform.GetNthTransform(i) for i in range(transform.GetNumberOfTransforms())]
        return [stage for child in reversed(children) for stage in _stages(child)]
    if (transform.GetInputSpaceDimension(), transform.GetOutputSpaceDimension()) != (3, 3):
        raise ValueError(f"{name} is {transform.GetInputSpaceDimension()}-D instead of 3-D")
    if name in FIELD_CLASSES:
        image = transform.GetDisplacementField()
        if image is None or not all(image.GetBufferedRegion().GetSize()):
            raise ValueError(f"{name} holds no field")
        return [field_from_itk_image(image)]
    if transform.IsLinear():

        def moved(point: list[float]) -> np.ndarray:
            return np.array(list(transform.TransformPoint(point)), dtype=np.float64)

        matrix = np.eye(4)
        matrix[:3, 3] = moved([0.0, 0.0, 0.0])
        matrix[:3, :3] = np.stack([moved(axis) for axis in np.eye(3).tolist()], -1) - matrix[:3, 3:]
        probe = [91.0, -57.0, 33.0]
        # some classes inherit the word linear without being so
        if not np.isfinite(matrix).all() or np.allclose(matrix[:3, :3] @ probe + matrix[:3, 3], moved(probe)):
            return [torch.from_numpy(lps_affine(torch.from_numpy(matrix)) @ LPS_TO_RAS)]
    raise ValueError(f"it holds a {name}; only linear transforms and displacement fields can be read")


def write_transform(mapping: SpatialMapping, path: str | os.PathLike[str]) -> None:
    """
    Write a mapping as the transform file that ITK, SimpleITK, antsApplyTransforms and 3D Slicer take for resampling.

    Args:
        mapping: in RAS millimetres.
        path: the file, ``.h5``: a composite of all stages, double precision; or ``.tfm`` or ``.txt``, for affine stages
            only, which become one. Written to a temporary name and renamed.

    Raises:
        ValueError: When the name ends otherwise, or a displacement field is to be written as text.
        OSError: When it cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(HDF5_SUFFIXES + TEXT_SUFFIXES):
        raise ValueError(f"a transform must end in {', '.join(HDF5_SUFFIXES + TEXT_SUFFIXES)}, got '{path.name}'.")
    if path.name.endswith(HDF5_SUFFIXES):
        transform = mapping_to_itk(mapping)
    else:
        total = torch.eye(4, dtype=torch.float64)
        for stage in mapping.stages:
            if isinstance(stage, PhysicalField):
                raise ValueError(f"a displacement field can be written to .h5 only, got '{path.name}'.")
            total = stage.double().cpu() @ total
        transform = _affine_to_itk(total)
    with replacing(path) as temporary:
        try:
            _check_room(temporary, path, mapping)
            with quiet_itk():
                itk.transformwrite([transform], str(temporary), compression=path.name.endswith(HDF5_SUFFIXES))
        except RuntimeError as error:
            raise OSError(f"cannot write the transform '{path}': {read_failure(error)}.") from error


def _check_room(temporary: Path, path: Path, mapping: SpatialMapping) -> None:
    """
    Refuse to write to a disk without the room for a mapping before compression, by taking it and giving it back.

    HDF5 cannot close a file that it could not write to the end, and ends the process with a crash when it exits.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    values = sum(stage.vectors.numel() for stage in mapping.stages if isinstance(stage, PhysicalField))
    with temporary.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, BASE_BYTES + BYTES_PER_VALUE * values)
        except OSError as error:
            # others are of file systems that cannot reserve
            if error.errno in FULL:
                raise OSError(error.errno, error.strerror, str(path)) from error
        file.truncate(0)


def _matlab_vectors(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file of level 4, which ITK and ANTs write affines in."""
    result: dict[str, np.ndarray] = {}
    while data:
        if len(data) < 20:
            raise ValueError("it ends too early")
        # machine, zero, precision and kind are the digits of the first number
        order = "<" if 0 <= struct.unpack_from("<i", data)[0] < 5000 else ">"
        kind, rows, columns, imaginary, length = struct.unpack_from(f"{order}5i", data)
        item = {0: f"{order}f8", 10: f"{order}f4"}.get(kind % 1000)
        if item is None or kind % 10 or imaginary or rows < 0 or columns != 1 or not 1 <= length <= 256:
            raise ValueError("it is no MATLAB file of level 4 with an affine of ITK or ANTs")
        size = int(item[-1]) * rows
        if 20 + length + size > len(data):
            raise ValueError("it ends too early")
        name = data[20 : 20 + length].rstrip(b"\0").decode("latin-1")
        result[name] = np.frombuffer(data, item, rows, 20 + length).astype(np.float64)
        data = data[20 + length + size :]
    return result


def _text_of_matlab(path: Path) -> str:
    """An affine in MATLAB's form as ITK's text."""
    if path.stat().st_size > MAX_MATLAB_BYTES:
        raise ValueError("it is too large for an affine")
    vectors = _matlab_vectors(path.read_bytes())
    fixed = vectors.pop("fixed", None)
    if fixed is None or len(vectors) != 1:
        raise ValueError("it is no MATLAB file of level 4 with an affine of ITK or ANTs")
    ((name, parameters),) = vectors.items()
    if not re.fullmatch(r"\w+_(double|float)_\d_\d", name):
        raise ValueError(f"it holds '{name}', which is no transform of ITK")
    numbers = [" ".join(repr(float(value)) for value in vector) for vector in (parameters, fixed)]
    lines = (f"{TEXT_SIGNATURE} V1.0", "#Transform 0", f"Transform: {name}", "Parameters: ", "FixedParameters: ")
    return "\n".join([*lines[:3], lines[3] + numbers[0], lines[4] + numbers[1], ""])


def _read_text(text: str) -> list[Any]:
    if not text.startswith(TEXT_SIGNATURE):
        raise ValueError(f"it does not start with '{TEXT_SIGNATURE}'")
    names = [name.strip() for name in re.findall(r"^Transform:(.*)", text, re.MULTILINE)]
    if not names:
        raise ValueError("it holds 0 transforms instead of one")
    # ITK itself stumbles over others
    unknown = [name for name in names if not re.fullmatch(r"\w{1,100}_(double|float)_\d_\d", name)]
    if unknown:
        raise ValueError(f"it holds {unknown[0][:100]!r}, which is no transform of ITK")
    # ANTs writes affines in the name of a class that ITK by itself does not make
    text = text.replace("MatrixOffsetTransformBase_", "AffineTransform_")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "transform.tfm"
        file.write_text(text, encoding="utf-8")
        with quiet_itk():
            return list(itk.transformread(str(file)))


def _refuse_damaged_hdf5(path: Path) -> None:
    """On some files HDF5 crashes, at once or when the process ends, or never stops: let that be another process."""
    if not has_resource:
        return
    seconds = BASE_SECONDS + path.stat().st_size // BYTES_PER_SECOND
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limits = (seconds if most == resource.RLIM_INFINITY else min(seconds, most), most)
    source, target = os.pipe()
    with open(source, encoding="utf-8") as answer:
        child = os.fork()
        if child == 0:
            try:
                faulthandler.disable()
                resource.setrlimit(resource.RLIMIT_CPU, limits)
                # one that waits, as for a lock that another thread has held, takes no CPU time
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(WAIT_FACTOR * seconds)
                itk.transformread(str(path))
            except READ_ERRORS as error:
                os.write(target, read_failure(error).encode())
            finally:
                os._exit(0)
        try:
            os.close(target)
            failure = answer.read()
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    if status != 0 or failure:
        raise ValueError(failure or "HDF5 crashes on it, or comes to no end")


def _read_hdf5(path: Path) -> list[Any]:
    with path.open("rb") as file:
        if file.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            raise ValueError("it is no HDF5 file")
    with quiet_itk():
        # ITK loads its readers when they are first used: here, not in the child and then once more
        itk.TransformFileReaderTemplate[itk.D].New()
        _refuse_damaged_hdf5(path)
        return list(itk.transformread(str(path)))


def read_transform(path: str | os.PathLike[str]) -> SpatialMapping:
    """
    Read a mapping from a file of ITK, ANTs or 3D Slicer.

    Args:
        path: a transform file (``.h5``, ``.tfm``, ``.txt``, ``.mat``) that holds a linear transform, a displacement
            field or a composite of those; or a displacement image as for :py:func:`read_displacement`.

    Returns:
        the mapping in RAS millimetres.

    Raises:
        ValueError: When the file cannot be read, or holds a transform of another kind.
    """
    path = Path(path)
    if has_suffix(path, NIFTI_SUFFIXES + VECTOR_IMAGE_SUFFIXES):
        return SpatialMapping([read_displacement(path)])
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if has_suffix(path, HDF5_SUFFIXES):
            transforms = _read_hdf5(path)
        elif has_suffix(path, TEXT_SUFFIXES):
            transforms = _read_text(path.read_text(encoding="utf-8"))
        elif has_suffix(path, (".mat",)):
            transforms = _read_text(_text_of_matlab(path))
        else:
            known = HDF5_SUFFIXES + TEXT_SUFFIXES + (".mat",) + NIFTI_SUFFIXES + VECTOR_IMAGE_SUFFIXES
            raise ValueError(f"its name does not end in {', '.join(known)}")
        if len(transforms) != 1:
            raise ValueError(f"it holds {len(transforms)} transforms instead of one")
        return mapping_from_itk(transforms[0])
    except READ_ERRORS as error:
        raise ValueError(f"cannot read the transform '{path}': {read_failure(error)}.") from error
