# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from monai_sacb.utils import image_name, plain_tensor

__all__ = ["CommonLabelsd", "SelectLabelsd", "number_labels"]

MAX_COUNTED_RANGE = 1 << 20


def number_labels(label: torch.Tensor, label_ids: Sequence[int]) -> torch.Tensor:
    """
    Number the configured label values 1, 2, ... in their order; every other value becomes 0.

    Args:
        label: label map of any shape; the values must be whole numbers.
        label_ids: the label values.

    Returns:
        uint8 map of the same shape (int16 for more than 255 labels).

    Raises:
        ValueError: When ``label_ids`` is empty, repeats a value or holds 0, or the map has values between two numbers.
    """
    if len(label_ids) == 0 or len(set(label_ids)) != len(label_ids) or 0 in label_ids:
        raise ValueError(f"label_ids must be distinct values other than 0, got {list(label_ids)}.")
    if label.is_floating_point() and bool((label != label.round()).any()):
        value = float(label[label != label.round()].flatten()[0])
        raise ValueError(f"a label map must hold whole numbers, got {value:g}; it may have been resampled linearly.")
    # one pass over the map, however many labels there are
    values, order = torch.tensor(label_ids, device=label.device).sort()
    numbers = (order + 1).to(torch.uint8 if len(label_ids) < 256 else torch.int16)
    whole = label.long()
    place = torch.bucketize(whole, values).clamp_(max=len(values) - 1)
    return torch.where(values[place] == whole, numbers[place], 0)


def _values(label: torch.Tensor) -> list[int]:
    """The values in a label map, in growing order."""
    whole = plain_tensor(label).long()
    if whole.numel() == 0:
        return []
    lowest, highest = (int(value) for value in torch.aminmax(whole))
    if highest - lowest > MAX_COUNTED_RANGE:
        return [int(value) for value in torch.unique(whole)]
    # counting is faster than sorting
    return [lowest + int(value) for value in torch.bincount((whole - lowest).flatten()).nonzero()[:, 0]]


class SelectLabelsd(MapTransform):
    """
    Dictionary wrapper of :py:func:`number_labels`.

    The values that were found are kept in the meta data under ``label_ids``, as text, for
    :py:class:`monai_sacb.data.PairDataset` to check.

    Args:
        keys: label maps.
        label_ids: the label values.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When a label value is not a whole number, or as :py:func:`number_labels`, with the file's name.
    """

    def __init__(self, keys: KeysCollection, label_ids: Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if any(isinstance(label_id, bool) or not isinstance(label_id, Integral) for label_id in label_ids):
            raise ValueError(f"label_ids must be whole numbers, got {list(label_ids)}.")
        self.label_ids = [int(label_id) for label_id in label_ids]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(data):
            label = data[key]
            try:
                result[key] = number_labels(label, self.label_ids)
            except ValueError as error:
                raise ValueError(f"{image_name(key, label)}: {error}") from error
            if isinstance(result[key], MetaTensor):
                result[key].meta["label_ids"] = " ".join(str(value) for value in _values(label))
        return result


class CommonLabelsd(MapTransform):
    """
    Make background of the labels that another label map does not have.

    A structure that only one image of a pair has cannot be registered. With this, metrics, which leave out what the
    fixed image lacks, leave out what either image lacks, as the evaluation of Learn2Reg does.

    Args:
        keys: label maps of the fixed images.
        reference_keys: for each of them the label map of the moving image. Where there is none, nothing is changed.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are not as many reference keys as keys.
    """

    def __init__(
        self,
        keys: KeysCollection = "fixed_label",
        reference_keys: KeysCollection = "moving_label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_keys = ensure_tuple(reference_keys)
        if len(self.reference_keys) != len(self.keys):
            raise ValueError(
                f"there must be one reference key for each of the keys {self.keys}, got {self.reference_keys}."
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, reference_key in self.key_iterator(data, self.reference_keys):
            if reference_key in data:
                label = data[key]
                values = torch.as_tensor(_values(data[reference_key]), device=label.device)
                result[key] = torch.where(torch.isin(plain_tensor(label).long(), values), label, 0)
        return result
