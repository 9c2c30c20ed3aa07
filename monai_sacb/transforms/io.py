# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from typing import Any

from nibabel.filebasedimages import ImageFileError

from monai.data import ImageReader
from monai.transforms import LoadImaged

__all__ = ["LoadVolumed"]


class LoadVolumed(LoadImaged):
    """
    MONAI's ``LoadImaged``, which says in one sentence which file could not be read and why.

    Args:
        keys, *args, **kwargs: as for ``monai.transforms.LoadImaged``.

    Raises:
        ValueError: When a file is missing, truncated or not an image.
    """

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key, meta_key, meta_key_postfix in self.key_iterator(data, self.meta_keys, self.meta_key_postfix):
            single = LoadImaged.__new__(LoadImaged)
            single.__dict__.update(self.__dict__)
            single.keys, single.meta_keys, single.meta_key_postfix = (key,), (meta_key,), (meta_key_postfix,)
            try:
                loaded.update(LoadImaged.__call__(single, {key: data[key]}, reader))
            except (OSError, EOFError, RuntimeError, ValueError, zlib.error, ImageFileError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ValueError(f"cannot read {key} '{data[key]}': {reason}") from error
        return loaded
