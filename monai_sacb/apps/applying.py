# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``apply``: carry images, label maps and points through a registration, forward or back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_sacb.data.foreground import background_value
from monai_sacb.data.point_files import POINT_SUFFIXES, read_point_set, write_point_set
from monai_sacb.data.spatial_mapping import Grid, InverseMapping, PointMapping, resample_volume
from monai_sacb.data.transform_files import read_transform
from monai_sacb.data.volumes import VOLUME_SUFFIXES, read_label_volume, read_volume, write_volume
from monai_sacb.utils import plain_tensor

__all__ = ["apply", "load_mappings"]

logger = logging.getLogger(__name__)

# of a grid that a side-car may ask for: sixteen times that of the largest scans
MAX_VOXELS = 1 << 31
INTERPOLATIONS = ("linear", "nearest", "label")
# share of neighbouring voxels of one value, background left out: structures are solid, images are not
SOLID_SHARE = 0.6


def _sidecar_grid(folder: Path, role: str) -> Grid | None:
    """The grid of an image as a registration's side-car has it."""
    path = folder / "transform.json"
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))[role]
        depth, height, width = (int(size) for size in content["shape"])
        affine = torch.tensor(content["affine"], dtype=torch.float64)
        usable = affine.shape == (4, 4) and bool(torch.isfinite(affine).all()) and float(torch.linalg.det(affine)) != 0
        if not usable or min(depth, height, width) < 1 or depth * height * width > MAX_VOXELS:
            raise ValueError("a grid is wrong")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"'{path}' is not the side-car of a registration.") from error
    return Grid((depth, height, width), affine)


def load_mappings(transform: str) -> tuple[PointMapping, PointMapping]:
    """
    A mapping from the fixed image's space to the moving image's, and its inverse.

    Args:
        transform: the output folder of a registration, or a file of a transform.

    Raises:
        FileNotFoundError: When there is no such folder or file.
        ValueError: When it cannot be read.
    """
    path = Path(transform)
    if path.is_dir():
        files = path / "transform.h5", path / "inverse_transform.h5"
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"'{transform}' is not the output folder of a registration: it has no {missing[0]}."
            )
        return read_transform(str(files[0])), read_transform(str(files[1]))
    mapping = read_transform(str(path))
    return mapping, InverseMapping(mapping)


def _is_label_map(image: torch.Tensor) -> bool:
    """Whether a volume ``(1, D, H, W)`` holds labels: whole numbers, most of them equal to their neighbours."""
    values = plain_tensor(image)[0]
    if bool((values != values.round()).any()) or float(values.min()) < 0:
        return False
    equal = pairs = 0
    for axis in range(3):
        size = values.shape[axis] - 1
        one, other = values.narrow(axis, 0, size), values.narrow(axis, 1, size)
        inside = (one != 0) & (other != 0)
        pairs += int(inside.sum())
        equal += int((inside & (one == other)).sum())
    # a map of nothing has no neighbours
    return equal >= SOLID_SHARE * pairs


def _is_points(path: str) -> bool:
    return path.lower().endswith(POINT_SUFFIXES)


def apply(
    transform: str,
    input: str,
    output: str,
    reference: str | None = None,
    inverse: bool = False,
    interpolation: str | None = None,
    fill: float | None = None,
    keep_dtype: bool = False,
) -> str:
    """
    Carry an image, a label map or points from the moving image's space to the fixed image's, or back.

    Args:
        transform: output folder of a registration, or a transform file (.h5, .tfm, .mat, displacement as .nii.gz).
        input: an image or label map of any format that is read, or points (.csv in millimetres, .fcsv, .mrk.json).
        output: the file to write: .nii, .nii.gz, .nrrd or .mha; points as one of theirs.
        reference: image whose grid the result lies on; by default the fixed image (with inverse, the moving one).
        inverse: carry from the fixed image's space to the moving image's.
        interpolation: linear, nearest, or label (each voxel takes the label with the largest linear weight); by
            default linear for images and label for label maps.
        fill: value outside the input; by default 0, or the smallest value of a CT.
        keep_dtype: write an image in the type of its file, not as float32. Label maps stay whole numbers anyway.

    Returns:
        the file that was written.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When something cannot be used; the message says why.
    """
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got '{interpolation}'.")
    transform, input, output = str(transform), str(input), str(output)
    if not Path(input).exists():
        raise FileNotFoundError(f"input '{input}' does not exist.")
    if Path(output).is_dir():
        raise IsADirectoryError(f"output '{output}' is a folder; a file is needed.")
    suffixes = POINT_SUFFIXES if _is_points(input) else VOLUME_SUFFIXES
    if not (output.lower() if _is_points(input) else output).endswith(suffixes):
        raise ValueError(f"output '{output}' must end in {', '.join(suffixes)}.")
    forward, backward = load_mappings(transform)
    if _is_points(input):
        given = {"reference": reference, "interpolation": interpolation, "fill": fill, "keep_dtype": keep_dtype or None}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{unused[0]} has no meaning for points.")
        points = read_point_set(input)
        # points go with the image content, against the direction in which images are looked up
        mapping = forward if inverse else backward
        write_point_set(points.moved(mapping.transform_points(points.positions)), output)
        return output
    mapping = backward if inverse else forward
    if reference is not None:
        grid = Grid.of(read_volume(reference, "reference", allow_constant=True))
    else:
        found = _sidecar_grid(Path(transform), "moving" if inverse else "fixed") if Path(transform).is_dir() else None
        if found is None:
            raise ValueError(f"'{transform}' does not say on which grid the result is to lie: give a reference.")
        grid = found
    image = read_volume(input, "input", allow_constant=True)
    as_label = _is_label_map(image) if interpolation is None else interpolation == "label"
    mode = interpolation or ("label" if as_label else "linear")
    logger.info(f"'{input}' is taken for {'a label map' if as_label else 'an image'}; interpolation: {mode}.")
    if as_label:
        if fill is not None and fill != int(fill):
            raise ValueError(f"fill must be a whole number for a label map, got {fill}.")
        label = read_label_volume(input, "input")
        write_volume(resample_volume(label, mapping, grid, mode, 0.0 if fill is None else fill), output)
        return output
    outside = background_value(image) if fill is None else fill
    resampled = resample_volume(image, mapping, grid, mode, outside)
    dtype = np.dtype(str(image.meta["original_dtype"]))
    whole = mode == "nearest" and np.issubdtype(dtype, np.integer)
    write_volume(resampled, output, dtype if keep_dtype or whole else np.dtype(np.float32))
    return output
