# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Fields in voxels from and to the files that ITK, ANTs and 3D Slicer take for transforms."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from monai_sacb.data.displacement_files import save_displacement
from monai_sacb.data.frames import turned_vectors
from monai_sacb.data.spatial_mapping import Grid, PhysicalField, SpatialMapping
from monai_sacb.data.transform_files import read_transform, write_transform
from monai_sacb.data.voxel_fields import ddf_to_displacement, displacement_to_ddf
from monai_sacb.transforms.common import one_output_each, with_geometry
from monai_sacb.transforms.fields import field_of
from monai_sacb.transforms.save import PairFolders
from monai_sacb.utils import image_name

__all__ = ["LoadDDFd", "SaveDDFd"]

DISPLACEMENT_EXTENSIONS = (".nii.gz", ".nii")
EXTENSIONS = (*DISPLACEMENT_EXTENSIONS, ".h5")
# of a voxel: what the header of a file makes of an affine
GRID_TOLERANCE = 1e-3


def _affine(key: Hashable, image: Any) -> torch.Tensor:
    if not isinstance(image, MetaTensor) or image.dim() not in (3, 4) or tuple(image.affine.shape) != (4, 4):
        given = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"{key} must be an image (C, *spatial), 2-D or 3-D, with its affine (4, 4), got {given}.")
    return torch.as_tensor(image.affine, dtype=torch.float64, device="cpu")


class SaveDDFd(MapTransform):
    """
    Write fields as transforms that ITK, ANTs, SimpleITK and 3D Slicer apply.

    Each goes to ``<output_dir>/<moving>_to_<fixed>/<key><extension>`` (see :py:class:`PairFolders`), on the grid that
    the fixed image lies on by now: displacements in LPS millimetres from the place of each voxel to that of its partner
    in the moving image, both by the images' own affines. Resampling the moving image through the file therefore gives
    what :py:class:`WarpByDDFd` gives. The field of a slice is written as a volume of one slice.

    Args:
        output_dir: folder of the folders.
        keys: fields ``(d, *spatial)`` in voxels of the fixed grid, pull-back.
        moving_key, fixed_key: the two images ``(C, *spatial)``, with their affines; the fixed one of the field's size.
        extension: ``".nii.gz"`` or ``".nii"`` for a NIfTI vector image (intent 1007), ``".h5"`` for a transform file
            of ITK.
        path_keys: where the paths of the files go; by default they are not kept.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When the extension is another one, there are not as many path keys as keys, an entry is no finite
            field, or an image has no affine or the fixed one another size.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        keys: KeysCollection = "pred",
        moving_key: str = "moving_image",
        fixed_key: str = "fixed_image",
        extension: str = ".nii.gz",
        path_keys: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if extension not in EXTENSIONS:
            raise ValueError(f"extension must be one of {EXTENSIONS}, got {extension!r}.")
        self.folders = PairFolders(output_dir, moving_key, fixed_key)
        self.extension = extension
        self.path_keys = (None,) * len(self.keys) if path_keys is None else one_output_each(self.keys, path_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, path_key in self.key_iterator(data, self.path_keys):
            ddf = field_of(key, data[key]).detach().cpu()
            fixed_key, moving_key = self.folders.fixed_key, self.folders.moving_key
            fixed, moving = _affine(fixed_key, data[fixed_key]), _affine(moving_key, data[moving_key])
            if data[fixed_key].shape[1:] != ddf.shape[1:]:
                raise ValueError(
                    f"{image_name(fixed_key, data[fixed_key])} must have the size of the field {key}, "
                    f"{list(ddf.shape[1:])}, got {list(data[fixed_key].shape[1:])}."
                )
            displacement = ddf_to_displacement(ddf, fixed, moving)
            path = self.folders(data) / f"{key}{self.extension}"
            if self.extension in DISPLACEMENT_EXTENSIONS:
                save_displacement(displacement, fixed, path)
            else:
                volume = displacement if displacement.dim() == 4 else displacement[..., None]
                write_transform(SpatialMapping([PhysicalField(turned_vectors(volume), fixed)]), path)
            if path_key is not None:
                result[path_key] = str(path)
        return result


class LoadDDFd(MapTransform):
    """
    Load transforms as ITK, ANTs and 3D Slicer write them, as fields in voxels for the two images at hand.

    The undoing of :py:class:`SaveDDFd`, but any mapping of physical space will do: affine transforms, composites, and
    displacements on another grid than that of the fixed image, which are interpolated linearly and are none outside
    their grid, as ITK has it. Images may have been turned, padded or resampled since: their affines say where they are.

    Args:
        keys: entries with the path of a file, as :py:func:`monai_sacb.data.transform_files.read_transform` reads it: an
            image of displacements (``.nii.gz`` and others; LPS millimetres) or a transform file (``.h5`` and others),
            from the fixed image's space to the moving image's. They become fields ``(d, *spatial)`` in voxels of the
            fixed grid, pull-back, with the geometry of the fixed image.
        moving_key, fixed_key: the two images ``(C, *spatial)``, with their affines.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When a file cannot be read, an image has no affine, or the mapping leads out of a slice.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        moving_key: str = "moving_image",
        fixed_key: str = "fixed_image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.moving_key = moving_key
        self.fixed_key = fixed_key

    @staticmethod
    def _displacement(path: str, grid: Grid) -> torch.Tensor:
        """Displacement ``(3, *grid.shape)`` in LPS millimetres."""
        mapping = read_transform(path)
        stage = mapping.stages[0] if len(mapping.stages) == 1 else None
        if isinstance(stage, PhysicalField) and stage.grid.shape == grid.shape:
            # how far the corners of the two grids are from each other, in voxels
            last = torch.tensor(grid.shape, dtype=torch.float64)
            off = (torch.linalg.inv(grid.affine) @ stage.affine - torch.eye(4, dtype=torch.float64))[:3].abs()
            if float((off[:, :3] @ last + off[:, 3]).max()) < GRID_TOLERANCE:
                return turned_vectors(stage.vectors)
        return turned_vectors(mapping.flatten(grid).vectors)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(data):
            if not isinstance(data[key], (str, os.PathLike)):
                raise ValueError(f"{key} must be the path of a transform, got {type(data[key]).__name__}.")
            path = os.fspath(data[key])
            fixed, moving = (_affine(name, data[name]) for name in (self.fixed_key, self.moving_key))
            size = [int(n) for n in data[self.fixed_key].shape[1:]]
            # a slice is a volume of one
            depth, height, width = (*size, 1)[:3]
            ddf = displacement_to_ddf(self._displacement(path, Grid((depth, height, width), fixed)), fixed, moving)
            if len(size) == 2:
                out = float(ddf[2].abs().max())
                if out > 0.01:
                    raise ValueError(f"{key} '{path}' leads out of the slice by up to {out:.3g} of its thickness.")
                ddf = ddf[:2, :, :, 0]
            device = data[self.fixed_key].device
            result[key] = with_geometry(ddf.contiguous().to(device), data[self.fixed_key])
        return result
