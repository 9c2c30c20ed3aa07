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

from monai_sacb.utils import image_name

__all__ = ["SelectLabelsd", "number_labels"]


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
    selected = torch.zeros_like(label, dtype=torch.uint8 if len(label_ids) < 256 else torch.int16)
    for number, label_id in enumerate(label_ids, start=1):
        selected[label == label_id] = number
    return selected


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
                found = torch.unique(label.as_tensor()).tolist()
                result[key].meta["label_ids"] = " ".join(str(int(value)) for value in found)
        return result
