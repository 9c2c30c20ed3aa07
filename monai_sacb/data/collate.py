# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.data import list_data_collate

__all__ = ["collate_pairs"]


def collate_pairs(batch: Sequence[Mapping[Hashable, Any]]) -> Any:
    """
    MONAI's ``list_data_collate`` of the entries that all pairs of a batch have.

    Where only some subjects have a label map, a batch has the labels if all of its pairs do, and else none. Lists of
    pairs that differ in nothing are collated as by MONAI. :py:class:`PairDataset` says at the start what is missing.

    Args:
        batch: dictionaries of pairs.

    Returns:
        one dictionary, with tensors ``(B, ...)``.
    """
    if not batch or not all(isinstance(pair, Mapping) for pair in batch):
        return list_data_collate(batch)
    # in the order of the first pair
    common = [key for key in batch[0] if all(key in pair for pair in batch)]
    return list_data_collate([{key: pair[key] for key in common} for pair in batch])
