# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``convert``: displacement fields from one convention to another."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
from nibabel.filebasedimages import ImageFileError

from monai_sacb.data.displacement_files import (
    NIFTI_SUFFIXES,
    VECTOR_IMAGE_SUFFIXES,
    ddf_from_field,
    field_from_ddf,
    read_displacement,
    read_voxel_ddf,
    write_displacement,
    write_voxel_ddf,
)
from monai_sacb.data.spatial_mapping import Grid, PhysicalField, SpatialMapping
from monai_sacb.data.transform_files import read_transform, write_transform
from monai_sacb.data.volumes import read_volume
from monai_sacb.data.voxel_fields import load_learn2reg_field, save_learn2reg_field

__all__ = ["FIELD_KINDS", "convert"]

FIELD_KINDS = ("itk_nifti", "itk_h5", "voxel", "learn2reg")
# endings that belong to one kind only
TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt", ".mat")


def _kind_of_name(path: str) -> str | None:
    name = Path(path).name.lower()
    kinds = {"itk_h5": TRANSFORM_SUFFIXES, "itk_nifti": VECTOR_IMAGE_SUFFIXES, "learn2reg": (".npz",)}
    return next((kind for kind, suffixes in kinds.items() if name.endswith(suffixes)), None)


def _kind_of_file(path: str) -> str:
    """What kind of field a file holds, as far as that is certain."""
    kind = _kind_of_name(path)
    if kind is not None:
        return kind
    if not path.lower().endswith(NIFTI_SUFFIXES):
        raise ValueError(
            f"input '{path}' has an ending of no kind of field; source must be one of {', '.join(FIELD_KINDS)}."
        )
    try:
        shape = nib.load(path).shape
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise ValueError(f"cannot read input '{path}', which may be damaged.") from error
    if len(shape) == 4 and shape[3] == 3:
        raise ValueError(
            f"input '{path}' is in voxels, either on the grid of its header or of Learn2Reg, which has none; "
            "source must say 'voxel' or 'learn2reg'."
        )
    # of the others, the reader says what they are instead
    return "itk_nifti"


def _check_kind(name: str, kind: str | None) -> None:
    if kind is not None and kind not in FIELD_KINDS:
        raise ValueError(f"{name} must be one of {', '.join(FIELD_KINDS)}, got '{kind}'.")


def _read(path: str, kind: str, fixed: Grid | None, moving: Grid | None) -> SpatialMapping:
    if kind == "itk_h5":
        return read_transform(path)
    if kind == "itk_nifti":
        return SpatialMapping([read_displacement(path)])
    if kind == "voxel":
        return SpatialMapping([read_voxel_ddf(path, fixed, moving)])
    if fixed is None:
        raise ValueError("a field of Learn2Reg does not know its grid; fixed must be the fixed image's file.")
    return SpatialMapping([field_from_ddf(load_learn2reg_field(path), fixed, moving)])


def _as_field(mapping: SpatialMapping, fixed: Grid | None, path: str) -> PhysicalField:
    """The whole mapping as one field: on the fixed image's grid, or that which the mapping has by itself."""
    first = mapping.stages[0] if mapping.stages else None
    if fixed is None:
        if not isinstance(first, PhysicalField):
            raise ValueError(
                f"input '{path}' does not begin with a field on a grid of the fixed image's space; "
                "fixed must be the fixed image's file."
            )
        if len(mapping.stages) == 1:
            return first
        fixed = first.grid
    return mapping.flatten(fixed)


def convert(
    input: str,
    output: str,
    source: str | None = None,
    target: str | None = None,
    fixed: str | None = None,
    moving: str | None = None,
) -> str:
    """
    Convert a displacement field from one convention to another; all of them lead from the fixed to the moving image.

    The kinds are: itk_nifti, an image of vectors in LPS mm (NIfTI; read from .nrrd and .mha too); itk_h5, a transform
    file of ITK with all its stages (.h5; affines also .tfm, .txt, and .mat to read); voxel, NIfTI (D, H, W, 3), where
    the partner of voxel p of the fixed image is voxel p + field(p) of the moving image; learn2reg, the same without a
    grid (.nii.gz, .npz).

    Args:
        input: the file to read.
        output: the file to write.
        source: kind of the input; needed where the file does not tell: for fields in voxels.
        target: kind of the output; needed unless the ending tells, as .h5 and .npz do.
        fixed: the fixed image, on whose grid the output lies. By default the grid that the field has itself; learn2reg,
            and transforms that do not begin with a field, have none. An output of kind itk_h5 keeps all stages as they
            are.
        moving: the moving image, in whose voxels fields of kind voxel and learn2reg count; by default they count in a
            grid equal to the fixed one.

    Returns:
        the file that was written.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a kind is unknown or missing, or a file cannot be read or is of another kind.
    """
    _check_kind("source", source)
    _check_kind("target", target)
    if not Path(input).is_file():
        raise FileNotFoundError(f"input '{input}' does not exist.")
    if Path(output).is_dir():
        raise IsADirectoryError(f"output '{output}' is a folder; a file is needed.")
    target = target or _kind_of_name(output)
    if target is None:
        raise ValueError(
            f"the ending of output '{output}' does not tell its kind; target must be one of {', '.join(FIELD_KINDS)}."
        )
    _check_output(output, target)
    source = source or _kind_of_file(input)
    fixed_grid, moving_grid = (
        None if path is None else Grid.of(read_volume(path, f"{role} image", allow_constant=True))
        for role, path in (("fixed", fixed), ("moving", moving))
    )
    mapping = _read(input, source, fixed_grid, moving_grid)
    if target == "itk_h5":
        write_transform(mapping, output)
        return output
    field = _as_field(mapping, fixed_grid, input)
    if target == "itk_nifti":
        write_displacement(field, output)
    elif target == "voxel":
        write_voxel_ddf(field, output, moving_grid)
    else:
        save_learn2reg_field(ddf_from_field(field, moving_grid), output)
    return output


def _check_output(path: str, kind: str) -> None:
    """Refuse a name that the kind cannot have, before any work."""
    suffixes = {
        "itk_nifti": NIFTI_SUFFIXES,
        "itk_h5": (".h5", ".hdf5", ".tfm", ".txt"),
        "voxel": NIFTI_SUFFIXES,
        "learn2reg": (".nii.gz", ".npz"),
    }[kind]
    if not path.endswith(suffixes):
        raise ValueError(f"a field of kind {kind} must be written to {' or '.join(suffixes)}, got output '{path}'.")
