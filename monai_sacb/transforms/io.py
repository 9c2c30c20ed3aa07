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

from monai_sacb.data.pickle_reader import PickledVolumeReader
from monai_sacb.utils import first_line

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
    MONAI's ``LoadImaged``, which says in one sentence which file could not be read and why, and reads ``.pkl`` files.

    A ``.pkl`` file holds a tuple of arrays, image and label map. An entry whose key ends in ``label`` takes the second,
    any other the first: list the file under both keys. See :py:class:`monai_sacb.data.PickledVolumeReader`, which is
    also the reader to name for other items.

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
        self.pickle_readers = {item: PickledVolumeReader(item) for item in ("image", "label")}

    def _reader(self, key: Hashable, files: Any) -> ImageReader | None:
        """The reader for pickled arrays where the file is one and no reader is named; None to leave it to MONAI."""
        reader = self.pickle_readers["label" if str(key).endswith("label") else "image"]
        return reader if self._loader.auto_select and reader.verify_suffix(files) else None

    def __call__(self, data: Mapping[Hashable, Any], reader: ImageReader | None = None) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(data):
            try:
                loaded[key] = self._loader(data[key], reader or self._reader(key, data[key]))
            except _UNREADABLE as error:
                raise ValueError(f"cannot read {key} '{data[key]}': {first_line(error)}.") from error
        return loaded
