# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from monai.data import MetaTensor

__all__ = ["image_name", "is_exported", "is_traced", "plain_tensor"]


def is_exported() -> bool:
    """Whether operations are being recorded for use where this package may be missing: by tracing or export."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_exporting())


def is_traced() -> bool:
    """Whether operations are being recorded: a recording holds no Python function, nor sizes that depend on data."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_compiling())


def plain_tensor(x: Any) -> torch.Tensor:
    """The tensor without meta data, or an array as a tensor."""
    return x.as_tensor() if isinstance(x, MetaTensor) else torch.as_tensor(x)


def image_name(key: Hashable, image: Any) -> str:
    """What to call an image in a message: its key and, where known, its file."""
    filename = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
    return f"{key} '{filename}'" if filename else str(key)
