# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What dictionary transforms have in common."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.utils import ensure_tuple

__all__ = ["one_output_each", "with_geometry"]


def with_geometry(tensor: torch.Tensor, reference: Any) -> torch.Tensor:
    """The tensor with the geometry (affine and meta data) of a reference image."""
    if isinstance(reference, MetaTensor):
        return MetaTensor(tensor, meta=dict(reference.meta))
    return tensor


def one_output_each(keys: Sequence[Hashable], output_keys: KeysCollection) -> tuple[Hashable, ...]:
    """Output keys as a tuple; refused with a ``ValueError`` where there are not as many as keys."""
    outputs: tuple[Hashable, ...] = ensure_tuple(output_keys)
    if len(outputs) != len(keys):
        raise ValueError(f"there must be one output key for each of the keys {tuple(keys)}, got {outputs}.")
    return outputs
