# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResampleToMatch, SpatialPad, Transform
from monai.utils import ensure_tuple_rep

from monai_sacb.networks.layers import warp
from monai_sacb.transforms.common import one_output_each, with_geometry
from monai_sacb.utils import plain_tensor

__all__ = [
    "FieldOfViewd",
    "PadPaird",
    "RestoreGridd",
    "WarpByDDFd",
    "warp_labels",
]


class FieldOfViewd(MapTransform):
    """
    Add a mask of where an image has been measured, to be padded along with it.

    :py:class:`monai_sacb.losses.RegistrationLoss` can then compare two images only where both have been measured, and
    does not reward it when the edges of two differently cropped images come to lie on each other.

    Args:
        keys: images ``(C, *spatial)``, before they are padded.
        output_keys: where the masks ``(1, *spatial)`` of ones go, uint8.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many output keys as keys.
    """

    def __init__(
        self, keys: KeysCollection, output_keys: KeysCollection = "field_of_view", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = one_output_each(self.keys, output_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in self.key_iterator(data, self.output_keys):
            ones = torch.ones_like(plain_tensor(data[key])[:1], dtype=torch.uint8)
            result[output_key] = with_geometry(ones, data[key])
        return result


class PadPaird(Transform):
    """
    Centre-pad both images of a pair, and what belongs to them, with zeros to the larger size along each axis.

    Args:
        keys: what to pad for each of the two roles, for ``image`` the entries ``moving_image`` and ``fixed_image``.
            Entries that are missing, or not loaded, are passed over.
    """

    def __init__(self, keys: Sequence[str] = ("image", "label", "field_of_view")) -> None:
        self.keys = tuple(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        sizes = [tuple(data[f"{role}_image"].shape[1:]) for role in ("moving", "fixed")]
        if sizes[0] != sizes[1]:
            pad = SpatialPad([max(size) for size in zip(*sizes)])
            for key in (f"{role}_{key}" for role in ("moving", "fixed") for key in self.keys):
                if isinstance(data.get(key), torch.Tensor):
                    result[key] = pad(data[key])
        return result


def warp_labels(label: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
    """
    Warp a label map as one map for each label, linearly, and take the label with the largest value at each voxel.

    Smoother than sampling the nearest voxel, and the protocol of most published tables since 2022. One label is warped
    at a time: the memory does not grow with their number.

    Args:
        label: ``(B, 1, *spatial)``, whole numbers.
        ddf: ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back.

    Returns:
        ``(B, 1, *spatial)``, of the type of the label map; 0 outside it.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    # what is outside counts as background
    largest = 1 - warp((label != 0).to(ddf.dtype), ddf)
    warped = torch.zeros_like(largest, dtype=label.dtype)
    for value in torch.unique(label).tolist():
        if value != 0:
            probability = warp((label == value).to(ddf.dtype), ddf)
            warped = torch.where(probability > largest, value, warped).to(label.dtype)
            largest = torch.maximum(probability, largest)
    return warped


class WarpByDDFd(MapTransform):
    """
    Warp images with a displacement field. The results take the geometry of the fixed image.

    Args:
        keys: images on the moving side, ``(C, *spatial)``.
        output_keys: where the warped images go.
        ddf_key: DDF ``(d, *spatial)`` in voxels of the fixed grid, pull-back.
        reference_key: the fixed image.
        mode: ``"bilinear"``, ``"nearest"``, or ``"label"`` (:py:func:`warp_labels`); one for all keys or one for each.
        padding_mode: what lies outside the moving image, see :py:func:`monai_sacb.networks.layers.warp`.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many output keys as keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection,
        ddf_key: str = "pred",
        reference_key: str = "fixed_image",
        mode: str | Sequence[str] = "bilinear",
        padding_mode: str = "zeros",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = one_output_each(self.keys, output_keys)
        self.ddf_key = ddf_key
        self.reference_key = reference_key
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.padding_mode = padding_mode

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        ddf = plain_tensor(data[self.ddf_key])
        for key, output_key, mode in self.key_iterator(data, self.output_keys, self.mode):
            image = plain_tensor(data[key]).to(ddf.device)
            if mode == "label":
                warped = warp_labels(image[None], ddf[None])[0]
            else:
                warped = warp(image[None], ddf[None], mode=mode, padding_mode=self.padding_mode)[0]
            result[output_key] = with_geometry(warped, data[self.reference_key])
        return result


class RestoreGridd(MapTransform):
    """
    Bring results from the grid that the network worked on back to the grid of the file of the fixed image.

    Args:
        keys: results on the working grid, ``(C, *spatial)``, with its affine.
        reference_key: the preprocessed fixed image; its meta data remember the file's affine and size.
        mode: interpolation, one for all keys or one for each. Where preprocessing only turned, padded or cropped the
            image, ``"nearest"`` and ``"bilinear"`` both return the very voxels.
        padding_mode: what lies outside the working grid.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When the reference does not carry the meta data of its file.
    """

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: str = "fixed_image",
        mode: str | Sequence[str] = "bilinear",
        padding_mode: str | Sequence[str] = "zeros",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.padding_mode = ensure_tuple_rep(padding_mode, len(self.keys))
        self.resample = ResampleToMatch()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        reference = data[self.reference_key]
        meta = reference.meta if isinstance(reference, MetaTensor) else {}
        missing = [key for key in ("spatial_shape", "original_affine", "filename_or_obj") if key not in meta]
        if missing:
            raise ValueError(f"{self.reference_key} must carry the meta data of its file, but it has no {missing}.")
        size = [int(n) for n in meta["spatial_shape"]]
        affine = torch.as_tensor(meta["original_affine"], dtype=torch.float64)
        native = MetaTensor(torch.zeros(1, *size), affine=affine, meta={"filename_or_obj": meta["filename_or_obj"]})
        for key, mode, padding_mode in self.key_iterator(data, self.mode, self.padding_mode):
            image = data[key]
            restored = self.resample(image, native, mode=mode, padding_mode=padding_mode, dtype=torch.float64)
            result[key] = MetaTensor(
                restored.as_tensor().to(image.dtype), affine=affine, meta={"filename_or_obj": meta["filename_or_obj"]}
            )
        return result
