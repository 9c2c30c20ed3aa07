# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Landmarks: reading them, and carrying them from one image to the other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from monai_sacb.networks.layers import warp_points
from monai_sacb.utils import plain_tensor

__all__ = ["LoadPointsd", "PointsToVoxelsd", "WarpPointsd", "read_points", "transform_points"]


def transform_points(points: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """
    Apply an affine to points, in double precision, on the device of the points.

    Args:
        points: ``(..., N, d)``, 2-D or 3-D.
        affine: ``(d + 1, d + 1)``; of a larger one, such as the ``(4, 4)`` of a 2-D image, the part for d axes.

    Returns:
        ``(..., N, d)``, of the type of the points (float32 for whole numbers).

    Raises:
        ValueError: When the shapes do not belong together.
    """
    if points.dim() < 2 or points.shape[-1] not in (2, 3):
        raise ValueError(f"points must have shape (..., N, d) with d = 2 or 3, got {list(points.shape)}.")
    dims = points.shape[-1]
    if affine.dim() != 2 or affine.shape[0] != affine.shape[1] or affine.shape[0] <= dims:
        raise ValueError(
            f"affine must have shape ({dims + 1}, {dims + 1}) for {dims}-D points, got {list(affine.shape)}."
        )
    matrix = torch.as_tensor(to_affine_nd(dims, plain_tensor(affine).cpu()), dtype=torch.float64, device=points.device)
    moved = points.double() @ matrix[:dims, :dims].T + matrix[:dims, dims]
    return moved.to(points.dtype if points.is_floating_point() else torch.float32)


def _fields(line: str) -> list[str]:
    # early editions of Learn2Reg separate the numbers by blanks
    return [field.strip() for field in line.split(",")] if "," in line else line.split()


def _frame(words: str) -> str | None:
    """The frame that a comment or a header names, LPS or RAS."""
    found = set(re.findall(r"(?<![a-z])(lps|ras)(?![a-z])", words.lower()))
    if len(found) > 1:
        raise ValueError("it names both LPS and RAS")
    return found.pop() if found else None


def _numbers(rows: list[tuple[int, list[str]]], columns: list[int], width: int) -> list[list[float]]:
    result = []
    for number, row in rows:
        if len(row) != width:
            raise ValueError(f"line {number} has {len(row)} columns instead of {width}")
        try:
            values = [float(row[column]) for column in columns]
        except ValueError as error:
            raise ValueError(f"line {number} is not numeric: {','.join(row)!r}") from error
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"line {number} has a value that is not finite: {','.join(row)!r}")
        result.append(values)
    return result


def _is_numeric(row: list[str]) -> bool:
    try:
        [float(field) for field in row]
    except ValueError:
        return False
    return True


def read_points(path: str | os.PathLike[str], spatial_dims: int = 3) -> tuple[torch.Tensor, bool]:
    """
    Read landmarks from a CSV file, of one of two kinds.

    - Without a header, as Learn2Reg has them: as many numbers in a line as there are dimensions, in voxels of the array
      in the file of the image that they belong to.
    - With a header ``x,y,z`` (``x,y`` in 2-D), and possibly other columns such as ``label``, which are passed over:
      RAS millimetres, or LPS where a comment line (``# LPS``) or the header (``x_lps,y_lps,z_lps``) says so.

    Args:
        path: the file.
        spatial_dims: 2 or 3.

    Returns:
        points ``(N, d)``, float64, and whether they are in voxels; RAS millimetres if not.

    Raises:
        ValueError: When the file cannot be read or is of neither kind.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    try:
        # what spreadsheets write may start with a byte order mark
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        rows = [(i, _fields(line)) for i, line in enumerate(lines, start=1) if line and not line.startswith("#")]
        frame = _frame(" ".join(line for line in lines if line.startswith("#")))
        if not rows:
            raise ValueError("it holds no points")
        first = rows[0][1]
        in_voxels = _is_numeric(first)
        if in_voxels:
            if frame is not None:
                raise ValueError(
                    f"a comment says {frame.upper()}, but voxels are meant where there is no header 'x,y,z'"
                )
            points = torch.tensor(_numbers(rows, list(range(spatial_dims)), spatial_dims), dtype=torch.float64)
            return points, True
        names = [re.sub(r"[\s_(-]*(lps|ras)[\s)]*$", "", name.lower()) for name in first]
        axes = "xyz"[:spatial_dims]
        if any(names.count(axis) != 1 for axis in axes) or (spatial_dims == 2 and "z" in names):
            raise ValueError(
                f"it has neither columns of numbers only nor a header {','.join(axes)!r}: {','.join(first)!r}"
            )
        if len(rows) == 1:
            raise ValueError("it holds no points")
        frame = _frame(" ".join([frame or "", *first]))
        points = torch.tensor(_numbers(rows[1:], [names.index(axis) for axis in axes], len(names)), dtype=torch.float64)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"cannot read points '{path}': {reason}.") from error
    if frame == "lps":
        points[:, :2] *= -1
    return points, False


class LoadPointsd(MapTransform):
    """
    Load landmarks of a subject with :py:func:`read_points`, as places in RAS millimetres.

    The points of two subjects belong together by their order in the files.

    Args:
        keys: entries with the path of a CSV file.
        reference_key: the image that the points belong to, ``(C, *spatial)``, preprocessed or not: points in voxels
            count in the array of its file, whose affine and dimensions are known from its meta data.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When a file cannot be read, or the image does not carry the affine of its file.
    """

    def __init__(
        self, keys: KeysCollection = "points", reference_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path by its points, ``(N, d)``, RAS millimetres, float32."""
        result = dict(data)
        for key in self.key_iterator(data):
            image = data[self.reference_key]
            points, in_voxels = read_points(data[key], image.dim() - 1)
            if in_voxels:
                meta = image.meta if isinstance(image, MetaTensor) else {}
                if "original_affine" not in meta:
                    raise ValueError(
                        f"{self.reference_key} must carry the affine of its file: {key} are in its voxels."
                    )
                points = transform_points(points, torch.as_tensor(meta["original_affine"]))
            result[key] = points.float()
        return result


class PointsToVoxelsd(MapTransform):
    """
    Give landmarks in voxels of the grid that an image lies on by now; after the last transform that changes the grid.

    Args:
        keys: points ``(N, d)``, RAS millimetres. Entries that are not loaded are passed over.
        reference_keys: the image for each of them, ``(C, *spatial)``.
        output_keys: where the points in voxels go, ``(N, d)``.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many reference or output keys as keys.
    """

    def __init__(
        self,
        keys: KeysCollection = ("moving_points", "fixed_points"),
        reference_keys: KeysCollection = ("moving_image", "fixed_image"),
        output_keys: KeysCollection = ("moving_landmarks", "fixed_landmarks"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_keys = ensure_tuple(reference_keys)
        self.output_keys = ensure_tuple(output_keys)
        for name, others in (("reference", self.reference_keys), ("output", self.output_keys)):
            if len(others) != len(self.keys):
                raise ValueError(f"there must be one {name} key for each of the keys {self.keys}, got {others}.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, reference_key, output_key in self.key_iterator(data, self.reference_keys, self.output_keys):
            if isinstance(data[key], torch.Tensor):
                affine = torch.as_tensor(data[reference_key].affine, dtype=torch.float64)
                result[output_key] = transform_points(plain_tensor(data[key]), torch.linalg.inv(affine))
        return result


class WarpPointsd(MapTransform):
    """
    Carry landmarks of the fixed image to their places in the moving image, RAS millimetres.

    The images are paired by array index: a point is at the voxel p of the fixed grid, goes to the voxel ``p + ddf(p)``
    of the moving grid, and both grids lie where their own affines say. What comes out is to be compared with the
    landmarks of the moving image; their distance is the target registration error.

    Args:
        keys: points of the fixed image, ``(N, d)``, RAS millimetres. Entries that are not loaded are passed over.
        output_keys: where the points ``(N, d)`` in the moving image go, RAS millimetres.
        ddf_key: DDF ``(d, *spatial)`` in voxels of the fixed grid, pull-back; None for no displacement at all, the
            state before registration.
        fixed_key, moving_key: the two images, with their affines, on the grid of the field.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many output keys as keys.
    """

    def __init__(
        self,
        keys: KeysCollection = "fixed_points",
        output_keys: KeysCollection = "warped_points",
        ddf_key: str | None = "pred",
        fixed_key: str = "fixed_image",
        moving_key: str = "moving_image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple(output_keys)
        if len(self.output_keys) != len(self.keys):
            raise ValueError(f"there must be one output key for each of the keys {self.keys}, got {self.output_keys}.")
        self.ddf_key = ddf_key
        self.fixed_key = fixed_key
        self.moving_key = moving_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in self.key_iterator(data, self.output_keys):
            if not isinstance(data[key], torch.Tensor):
                continue
            fixed, moving = (
                torch.as_tensor(data[image].affine, dtype=torch.float64) for image in (self.fixed_key, self.moving_key)
            )
            points = plain_tensor(data[key])
            # double precision between the affines, whose origins may be far away
            voxels = transform_points(points.double(), torch.linalg.inv(fixed))
            if self.ddf_key is not None:
                ddf = plain_tensor(data[self.ddf_key])
                voxels = warp_points(voxels.to(ddf.device)[None], ddf[None])[0]
            result[output_key] = transform_points(voxels, moving).to(points.dtype)
        return result
