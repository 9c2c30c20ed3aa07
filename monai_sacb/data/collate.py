# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from monai.data import list_data_collate

__all__ = ["collate_pairs"]


def _fill_labels(batch: Sequence[dict[Hashable, Any]], key: str, image_key: str) -> None:
    """Give the pairs without a label map one that is -1 throughout."""
    dtypes = [torch.promote_types(pair[key].dtype, torch.int16) for pair in batch if key in pair]
    if not 0 < len(dtypes) < len(batch):
        return
    for pair in batch:
        if key in pair:
            pair[key] = pair[key].to(dtypes[0])
        else:
            pair[key] = torch.full_like(pair[image_key][:1], -1, dtype=dtypes[0])


def _fill_points(batch: Sequence[dict[Hashable, Any]], key: str) -> None:
    """Give all pairs as many landmarks as the one that has most, with rows of NaN."""
    some = [pair[key] for pair in batch if isinstance(pair.get(key), torch.Tensor)]
    if not some:
        return
    most = max(len(points) for points in some)
    for pair in batch:
        points = pair.get(key, some[0][:0])
        pair[key] = pad(points, (0, 0, 0, most - len(points)), value=float("nan"))


def collate_pairs(batch: Sequence[Mapping[Hashable, Any]]) -> Any:
    """
    MONAI's ``list_data_collate`` for pairs that differ in what they hold.

    Where only some pairs of a batch have a label map, the others get one that is -1 throughout; where they have
    different numbers of landmarks, the missing ones are NaN: the losses of this package pass over both. Of the other
    entries, a batch has those that all of its pairs have.

    Args:
        batch: dictionaries of pairs.

    Returns:
        one dictionary, with tensors ``(B, ...)``.
    """
    if not batch or not all(isinstance(pair, Mapping) for pair in batch):
        return list_data_collate(batch)
    filled = [dict(pair) for pair in batch]
    for role in ("moving", "fixed"):
        _fill_labels(filled, f"{role}_label", f"{role}_image")
        for key in (f"{role}_points", f"{role}_landmarks"):
            _fill_points(filled, key)
    # in the order of the first pair
    common = [key for key in filled[0] if all(key in pair for pair in filled)]
    return list_data_collate([{key: pair[key] for key in common} for pair in filled])
