# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Landmarks: reading them, and carrying them from one image to the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from monai_sacb.data.point_files import read_point_set, read_point_table
from monai_sacb.networks.layers import unwarp_points, warp_points
from monai_sacb.transforms.common import one_output_each
from monai_sacb.utils import check_count, plain_tensor

__all__ = ["LoadPointsd", "PointsToVoxelsd", "TransformPointsd", "read_points", "transform_points"]


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


def read_points(path: str | os.PathLike[str], spatial_dims: int = 3) -> tuple[torch.Tensor, bool]:
    """
    Read landmarks from a file of 3D Slicer (``.fcsv``, ``.mrk.json``; 3-D), or a CSV file of one of two kinds.

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
    if spatial_dims == 3 and str(path).lower().endswith((".fcsv", ".mrk.json")):
        return read_point_set(path).positions, False
    points, table = read_point_table(path, spatial_dims)
    if table.frame == "lps":
        points[:, :2] *= -1
    return points, table.frame is None


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


class TransformPointsd(MapTransform):
    """
    Carry points through a displacement field, in RAS millimetres.

    **Direction.** As it is, points of the *fixed* image go to their partners in the *moving* image: the direction of
    the field itself, opposite to that in which images are warped. What comes out is to be compared with the landmarks
    of the moving image; their distance is the target registration error. With ``inverse=True``, points of the *moving*
    image go to their partners in the *fixed* image: they travel with the image content, as warped images do.

    The images are paired by array index: the voxel p of the fixed grid and the voxel ``p + ddf(p)`` of the moving grid
    are partners, and both grids lie where their own affines say. For the inverse that equation is solved at each point,
    by fixed-point iteration; where it does not converge, as where the field folds, a warning is logged.

    Args:
        keys: points ``(N, d)``, RAS millimetres, of the fixed image (of the moving image with ``inverse=True``).
            Entries that are not loaded are passed over.
        output_keys: where the partners ``(N, d)`` go, RAS millimetres.
        ddf_key: DDF ``(d, *spatial)`` in voxels of the fixed grid, pull-back; None for no displacement at all, the
            state before registration.
        fixed_key, moving_key: the two images, with their affines, on the grid of the field.
        inverse: False from the fixed to the moving image, True from the moving to the fixed image.
        num_steps: number of iterations of the inverse.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many output keys as keys, or another argument is out of its range.
    """

    def __init__(
        self,
        keys: KeysCollection = "fixed_points",
        output_keys: KeysCollection = "warped_points",
        ddf_key: str | None = "pred",
        fixed_key: str = "fixed_image",
        moving_key: str = "moving_image",
        inverse: bool = False,
        num_steps: int = 100,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = one_output_each(self.keys, output_keys)
        if not isinstance(inverse, bool):
            raise ValueError(f"inverse must be True or False, got {inverse!r}.")
        check_count("num_steps", num_steps)
        self.ddf_key = ddf_key
        self.fixed_key = fixed_key
        self.moving_key = moving_key
        self.inverse = inverse
        self.num_steps = num_steps

    def _moved(self, voxels: torch.Tensor, ddf: torch.Tensor, key: Hashable) -> torch.Tensor:
        if not self.inverse:
            return warp_points(voxels[None], ddf[None])[0]
        found = unwarp_points(voxels[None], ddf[None], self.num_steps)
        off = (warp_points(found, ddf[None])[0] - voxels).norm(dim=1)
        bad = int((~(off < 0.1)).sum())
        if bad:
            logging.getLogger(__name__).warning(
                f"{bad} of {len(off)} {key} have no partner within 0.1 voxel; the worst is off by "
                f"{float(off.max()):.3g} voxels."
            )
        return found[0]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in self.key_iterator(data, self.output_keys):
            if not isinstance(data[key], torch.Tensor):
                continue
            fixed, moving = (
                torch.as_tensor(data[image].affine, dtype=torch.float64) for image in (self.fixed_key, self.moving_key)
            )
            start, end = (moving, fixed) if self.inverse else (fixed, moving)
            points = plain_tensor(data[key])
            # double precision between the affines, whose origins may be far away
            voxels = transform_points(points.double(), torch.linalg.inv(start))
            if self.ddf_key is not None:
                ddf = plain_tensor(data[self.ddf_key])
                voxels = self._moved(voxels.to(ddf.device), ddf, key)
            result[output_key] = transform_points(voxels, end).to(points.dtype)
        return result
