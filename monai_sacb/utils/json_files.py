# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from monai_sacb.utils.files import replacing

__all__ = ["json_text", "write_json"]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def json_text(content: Any) -> str:
    """Content as JSON, which knows no NaN and no infinite numbers: they become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def write_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write content as JSON, by a temporary name and renamed; see :py:func:`json_text`."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(content) + "\n", encoding="utf-8")
