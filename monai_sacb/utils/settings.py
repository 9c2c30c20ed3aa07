# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Telling whether two runs were set up alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

__all__ = ["settings_digest"]


def _described(value: Any, above: tuple[int, ...]) -> Any:
    """The settings of an object as JSON can hold them: no addresses, no weights, no state of random numbers."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (PurePath, torch.device, torch.dtype, np.dtype, bytes)):
        return str(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in above or isinstance(value, (np.random.RandomState, np.random.Generator, torch.Generator)):
        return kind
    above = (*above, id(value))
    if isinstance(value, torch.nn.Parameter):
        return [kind, list(value.shape)]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return [kind, np.asarray(torch.as_tensor(value).detach().cpu()).tolist()]
    if isinstance(value, Mapping):
        return [kind, [[_described(k, above), _described(v, above)] for k, v in value.items()]]
    if isinstance(value, Set):
        return [kind, sorted(json.dumps(_described(entry, above)) for entry in value)]
    if isinstance(value, Sequence):
        return [kind, [_described(entry, above) for entry in value]]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), list(value.co_names), [_described(entry, above) for entry in value.co_consts]]
    if isinstance(value, FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__module__, value.__qualname__, _described((value.__code__, value.__defaults__, closure), above)]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", kind)
    return [kind, [[k, _described(v, above)] for k, v in vars(value).items() if k != "training"]]


def settings_digest(*objects: Any) -> str:
    """
    SHA-256 of the settings of objects, such as transforms and networks, as hexadecimal digits.

    Two objects made with the same arguments have the same digest, also in different runs. Parameters count by their
    shapes only, and random states not at all.

    Args:
        *objects: anything.
    """
    return hashlib.sha256(json.dumps(_described(objects, ())).encode()).hexdigest()
