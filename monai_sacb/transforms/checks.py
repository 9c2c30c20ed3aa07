# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from monai_sacb.utils import image_name

__all__ = ["CheckGridd", "CheckPaird", "CheckVolumed"]

# of a voxel: what headers differ by when one and the same is written in two ways
GRID_TOLERANCE = 0.02


class CheckVolumed(MapTransform):
    """
    Refuse images that registration cannot work with: of other dimensions than the network's, empty, or not finite.

    Args:
        keys: images ``(C, *spatial)``.
        spatial_dims: dimensions of the network, 2 or 3.
        in_channels: channels that an image must have; any number by default.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When an image has another number of dimensions or channels, no voxels, NaN or infinite voxels, or an
            affine that cannot be inverted.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_dims: int = 3,
        in_channels: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            image = data[key]
            spatial = tuple(image.shape[1:])
            # readers give a single slice as a volume of thickness one
            flat = self.spatial_dims == 3 and len(spatial) == 3 and 1 in spatial
            if len(spatial) != self.spatial_dims or flat:
                dims = 2 if flat else len(spatial)
                raise ValueError(
                    f"{image_name(key, image)} is a {dims}-D image of size {spatial}; the network needs "
                    f"{self.spatial_dims}-D images."
                )
            if self.in_channels is not None and image.shape[0] != self.in_channels:
                raise ValueError(
                    f"{image_name(key, image)} has {image.shape[0]} channels; the network needs {self.in_channels}."
                )
            if 0 in spatial:
                raise ValueError(f"{image_name(key, image)} has no voxels: its size is {spatial}.")
            if isinstance(image, MetaTensor):
                affine = torch.as_tensor(image.affine, dtype=torch.float64)
                if not bool(torch.isfinite(affine).all()) or float(torch.linalg.det(affine)) == 0:
                    raise ValueError(
                        f"{image_name(key, image)} has an affine that cannot be inverted: {affine.tolist()}."
                    )
                if self.spatial_dims == 2 and float(torch.linalg.det(affine[:2, :2])) == 0:
                    raise ValueError(
                        f"{image_name(key, image)} is a slice that is not axial by its affine {affine.tolist()}; 2-D "
                        "images are turned within the axial plane only."
                    )
            bad = int((~torch.isfinite(torch.as_tensor(image))).sum())
            if bad:
                raise ValueError(f"{image_name(key, image)} has {bad} NaN or infinite voxels.")
        return dict(data)


class CheckGridd(MapTransform):
    """
    Refuse a label map whose voxels do not lie as those of its image do, by the headers of their files.

    Images and label maps are turned to one orientation each by its own header: two that differ would be turned
    differently. Only directions and voxel sizes are compared, not origins, which play no part.

    Args:
        keys: label maps ``(C, *spatial)``, as loaded.
        reference_key: the image.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When size, directions or voxel sizes differ from the image's.
    """

    def __init__(
        self, keys: KeysCollection = "label", reference_key: str = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data[self.reference_key]
        for key in self.key_iterator(data):
            label = data[key]
            names = f"{image_name(key, label)} and {image_name(self.reference_key, image)}"
            if label.shape[1:] != image.shape[1:]:
                raise ValueError(
                    f"{names} have different sizes, {tuple(label.shape[1:])} and {tuple(image.shape[1:])}."
                )
            if isinstance(label, MetaTensor) and isinstance(image, MetaTensor):
                a, b = (torch.as_tensor(x.affine, dtype=torch.float64)[:-1, :-1] for x in (label, image))
                if bool(((a - b).norm(dim=0) > GRID_TOLERANCE * b.norm(dim=0)).any()):
                    raise ValueError(
                        f"{names} lie differently by their headers: {self._grid(label)} and {self._grid(image)}."
                    )
        return dict(data)

    @staticmethod
    def _grid(image: MetaTensor) -> str:
        sizes = " x ".join(f"{size:.3g}" for size in image.pixdim.tolist())
        return f"axes {''.join(nib.aff2axcodes(image.affine.numpy()))}, voxels of {sizes} mm"


class CheckPaird(Transform):
    """
    Refuse a pair whose images do not belong together, in the number of channels, the size of image and label, or the
    number of points.

    Voxel sizes that differ by more than a percent are warned of: the network pairs voxels by their indices.

    Raises:
        ValueError: When the moving and the fixed image have different numbers of channels or points, or a label map has
            another size than its image.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        moving, fixed = data["moving_image"], data["fixed_image"]
        if moving.shape[0] != fixed.shape[0]:
            raise ValueError(
                f"{image_name('moving_image', moving)} has {moving.shape[0]} channels, but "
                f"{image_name('fixed_image', fixed)} has {fixed.shape[0]}."
            )
        if isinstance(moving, MetaTensor) and isinstance(fixed, MetaTensor):
            sizes = [image.pixdim.tolist() for image in (moving, fixed)]
            if any(abs(a - b) > 0.01 * max(a, b) for a, b in zip(*sizes)):
                logging.getLogger(__name__).warning(
                    f"{image_name('moving_image', moving)} has voxels of {sizes[0]} mm, but "
                    f"{image_name('fixed_image', fixed)} of {sizes[1]} mm; they are paired by their indices."
                )
        for role, image in (("moving", moving), ("fixed", fixed)):
            label = data.get(f"{role}_label")
            if label is not None and label.shape[1:] != image.shape[1:]:
                raise ValueError(
                    f"{image_name(f'{role}_label', label)} has size {tuple(label.shape[1:])}, but "
                    f"{image_name(f'{role}_image', image)} has {tuple(image.shape[1:])}."
                )
        # paths are points that the preprocessing did not load
        points = [p for p in (data.get("moving_points"), data.get("fixed_points")) if isinstance(p, torch.Tensor)]
        if len(points) == 2 and len(points[0]) != len(points[1]):
            raise ValueError(
                f"{image_name('moving_image', moving)} has {len(points[0])} points, but "
                f"{image_name('fixed_image', fixed)} has {len(points[1])}; they are paired by their order."
            )
        return dict(data)
