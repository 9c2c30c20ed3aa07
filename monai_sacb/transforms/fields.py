# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Dictionary transforms of displacement fields in voxels.

A displacement field (DDF) is ``(d, *spatial)``, in voxels of the fixed grid, channel i along array axis i, and pulls
back: ``warped(p) = moving(p + ddf(p))``. Images are paired by array index, whatever their affines say.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform

from monai_sacb.data.voxel_fields import ddf_to_displacement
from monai_sacb.networks.layers import compose, invert
from monai_sacb.transforms.common import one_output_each, with_geometry
from monai_sacb.utils import check_count, plain_tensor

__all__ = ["ComposeDDFd", "DDFToDisplacementd", "InvertDDFd", "MaskDDFd"]

# an inverse is warned of where more than this share of it is off by more than this many voxels
INVERSE_SHARE, INVERSE_VOXELS = 0.01, 0.1


def field_of(key: Hashable, value: Any) -> torch.Tensor:
    """A field ``(d, *spatial)`` as a plain tensor of at least single precision; refused where it is not one."""
    if not isinstance(value, torch.Tensor) or value.dim() not in (3, 4) or value.shape[0] != value.dim() - 1:
        given = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(f"{key} must be a field (d, *spatial) with d = 2 or 3, got {given}.")
    ddf = plain_tensor(value)
    return ddf if ddf.dtype == torch.float64 else ddf.float()


class ComposeDDFd(MapTransform):
    """
    One displacement field that does what several do in turn: ``p -> p + first(p) -> ... + second(...) -> ...``.

    To warp an image by the result is to warp it by the last field, then by the one before, and so on to the first, with
    a single interpolation: the first field starts on the grid of the final fixed image, the last ends in the moving
    image. With fields of two subjects to a template, ``subject(p) = template(p + ddf(p))``, the fixed subject's field
    and then the moving subject's inverse field lay one subject on the other.

    Args:
        keys: fields ``(d, *spatial)`` in voxels, pull-back, all on one grid, in the order in which points go through
            them.
        output_key: where the one field ``(d, *spatial)`` goes; it takes the geometry of the first.
        padding_mode: what the later fields are outside the grid, as in :py:func:`monai_sacb.networks.layers.warp`.
        allow_missing_keys: make no field where one of these is missing, or is a path that was not loaded.

    Raises:
        ValueError: When an entry is no field, or the fields are not on one grid.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_key: Hashable = "pred",
        padding_mode: str = "border",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_key = output_key
        self.padding_mode = padding_mode

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        given = [key for key in self.key_iterator(data) if isinstance(data[key], torch.Tensor)]
        if self.allow_missing_keys and len(given) < len(self.keys):
            return dict(data)
        fields = [field_of(key, data[key]) for key in self.keys]
        shapes = {key: list(field.shape) for key, field in zip(self.keys, fields)}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise ValueError(f"fields must lie on one grid to be composed, got {shapes}.")
        ddf = fields[0][None]
        for field in fields[1:]:
            ddf = compose(ddf, field[None].to(ddf.device), self.padding_mode)
        return {**data, self.output_key: with_geometry(ddf[0], data[self.keys[0]])}


class InvertDDFd(MapTransform):
    """
    The displacement field of the inverse mapping, by fixed-point iteration.

    A field takes voxels of the fixed grid to voxels of the moving grid; its inverse takes those of the moving grid
    back, and lays the fixed image on the moving one. The result therefore lies on the moving image's grid and takes its
    geometry. Where the iteration does not converge, as where the field folds, a warning is logged.

    Args:
        keys: fields ``(d, *spatial)`` in voxels of the fixed grid, pull-back.
        output_keys: where the inverse fields ``(d, *spatial)`` in voxels of the moving grid go.
        num_steps: number of iterations, see :py:func:`monai_sacb.networks.layers.invert`.
        moving_key: the moving image, ``(C, *spatial)``, of the size of the field. Without it, None, the results keep
            the geometry of the fields.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many output keys as keys, ``num_steps`` is below 1, an entry is no field, or
            the moving image has another size.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_keys: KeysCollection = "inverse_ddf",
        num_steps: int = 30,
        moving_key: Hashable | None = "moving_image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = one_output_each(self.keys, output_keys)
        check_count("num_steps", num_steps)
        self.num_steps = num_steps
        self.moving_key = moving_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in self.key_iterator(data, self.output_keys):
            ddf = field_of(key, data[key])
            reference = data[key if self.moving_key is None else self.moving_key]
            if reference.shape[1:] != ddf.shape[1:]:
                raise ValueError(
                    f"{self.moving_key} must have the size of the field {key}, {list(ddf.shape[1:])}, got "
                    f"{list(reference.shape[1:])}."
                )
            inverse = invert(ddf[None], self.num_steps)
            # where the inverse and then the field do not lead back
            off = float((compose(inverse, ddf[None]).norm(dim=1) > INVERSE_VOXELS).float().mean())
            if off > INVERSE_SHARE:
                logging.getLogger(__name__).warning(
                    f"the inverse of {key} is off by more than {INVERSE_VOXELS} voxels at {100 * off:.1f} % of them."
                )
            result[output_key] = with_geometry(inverse[0], reference)
        return result


class MaskDDFd(MapTransform):
    """
    Set fields to NaN where a map is 0, which says that they do not count there.

    :py:class:`monai_sacb.metrics.FieldErrorMetric` passes over such voxels of a true field.

    Args:
        keys: fields ``(d, *spatial)``.
        mask_key: the map, ``(1, *spatial)``.
        allow_missing_keys: whether a key, or the map, may be absent; without a map, fields stay as they are.

    Raises:
        ValueError: When the map is not on the grid of the field.
    """

    def __init__(
        self, keys: KeysCollection, mask_key: Hashable = "fixed_label", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        if self.allow_missing_keys and self.mask_key not in data:
            return result
        mask = plain_tensor(data[self.mask_key])
        for key in self.key_iterator(data):
            ddf = field_of(key, data[key])
            if list(mask.shape) != [1, *ddf.shape[1:]]:
                raise ValueError(
                    f"{self.mask_key} must be {[1, *ddf.shape[1:]]}, on the grid of {key}, got {list(mask.shape)}."
                )
            result[key] = with_geometry(torch.where(mask.to(ddf.device) != 0, ddf, torch.nan), data[key])
        return result


class DDFToDisplacementd(Transform):
    """
    Dictionary wrapper of :py:func:`ddf_to_displacement`.

    Args:
        ddf_key: the field in voxels, ``(d, *spatial)``.
        fixed_key, moving_key: the two images, with their affines, on the grid of the field.
        output_key: where the displacement in LPS millimetres goes; it takes the geometry of the fixed image.
    """

    def __init__(
        self,
        ddf_key: str = "pred",
        fixed_key: str = "fixed_image",
        moving_key: str = "moving_image",
        output_key: str = "displacement",
    ) -> None:
        self.ddf_key = ddf_key
        self.fixed_key = fixed_key
        self.moving_key = moving_key
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        fixed, moving = data[self.fixed_key], data[self.moving_key]
        displacement = ddf_to_displacement(plain_tensor(data[self.ddf_key]), fixed.affine, moving.affine)
        return {**data, self.output_key: with_geometry(displacement, fixed)}
