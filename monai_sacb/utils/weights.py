# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["compare_states", "not_finite", "read_checkpoint"]

# what torch.load raises for a file that is not one, is cut short, or would run code
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
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
        raise ValueError(f"'{path}' is not a readable checkpoint of tensors and numbers.") from error


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors of a state dict that hold NaN or infinite values, sorted."""
    return sorted(
        name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    )


def compare_states(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str | None:
    """
    Say how the parameters in a checkpoint differ from those of a network.

    Args:
        expected: state dict of the network.
        given: state dict of the checkpoint.

    Returns:
        how many parameters are missing, unknown or of another shape, with examples; None where all belong together.
    """
    missing, surplus = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    misfits = sorted(k for k in expected.keys() & given.keys() if expected[k].shape != given[k].shape)
    if not missing and not surplus and not misfits:
        return None
    kinds = ((missing, "parameters are missing"), (misfits, "have another shape"), (surplus, "are unknown"))
    return ", ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for names, what in kinds if names)
