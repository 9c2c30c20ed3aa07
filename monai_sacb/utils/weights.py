# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_checkpoint"]

# what torch.load raises for a file that is not one, is cut short, or would run code
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


def read_checkpoint(path: str | os.PathLike[str], safe_globals: Sequence[Any] = ()) -> Any:
    """
    Read a file that ``torch.save`` wrote, on the CPU, without running anything that is in it.

    Args:
        path: the file.
        safe_globals: what it may refer to beside tensors and plain Python values.

    Returns:
        the content.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is not such a file, is cut short, or refers to anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist.")
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"'{path}' is not a readable checkpoint of tensors and numbers ({reason}).") from error
