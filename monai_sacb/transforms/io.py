# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from typing import Any

from nibabel.filebasedimages import ImageFileError

from monai.config import KeysCollection
from monai.data import ImageReader
from monai.transforms import LoadImaged

__all__ = ["LoadVolumed"]

# MemoryError and OverflowError: a header that promises more than there is
_UNREADABLE = (
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
    ImageFileError,
)


class LoadVolumed(LoadImaged):
    """
    MONAI's ``LoadImaged``, which says in one sentence which file could not be read and why.

    Args:
        keys: entries with the path of an image.
        **kwargs: as for ``monai.transforms.LoadImaged``, except that images always carry their meta data.

    Raises:
        ValueError: When a file is missing, truncated or not an image.
    """

    def __init__(self, keys: KeysCollection, **kwargs: Any) -> None:
        if not kwargs.get("image_only", True):
            raise ValueError("image_only must be True, got False.")
        super().__init__(keys, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(data):
            try:
                loaded[key] = self._loader(data[key], reader)
            except _UNREADABLE as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ValueError(f"cannot read {key} '{data[key]}': {reason}") from error
        return loaded
