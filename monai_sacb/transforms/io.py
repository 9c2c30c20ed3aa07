# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from monai.config import KeysCollection
from monai.data import ImageReader, MetaTensor
from monai.transforms import LoadImaged, MapTransform

from monai_sacb.data.pickle_reader import PickledVolumeReader
from monai_sacb.data.volumes import read_volume
from monai_sacb.utils import first_line

__all__ = ["LoadVolumed", "MetaToResultd", "ReadVolumed"]

# MemoryError and OverflowError: a header that promises more than there is
_UNREADABLE = (
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    struct.error,
    zlib.error,
    ImageFileError,
    HeaderDataError,
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


class ReadVolumed(MapTransform):
    """
    Read images as the commands do, by :py:func:`monai_sacb.data.read_volume`: any file that nibabel or ITK reads or a
    folder of a DICOM series, checked, as ``(1, D, H, W)``, float32, in the file's axis order, where ITK sees it.

    Args:
        keys: entries with the path of an image.
        allow_missing_keys: whether a key may be absent.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be used; the message says why.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(data):
            result[key] = read_volume(data[key], str(key))
        return result


class MetaToResultd(MapTransform):
    """
    Move an entry of an image's meta data, JSON, to where MONAI Label looks for what belongs into its answer.

    Args:
        keys: images; those without the entry are passed over.
        meta_key: the entry.
        output_key: a dictionary of the data, made where it is missing, that gets an entry of the same name.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When the entry is not JSON.
    """

    def __init__(
        self, keys: KeysCollection, meta_key: str, output_key: str = "result", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.meta_key = meta_key
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            if isinstance(image, MetaTensor) and self.meta_key in image.meta:
                image = image.clone()
                content = json.loads(image.meta.pop(self.meta_key))
                result[key] = image
                result[self.output_key] = {**result.get(self.output_key, {}), self.meta_key: content}
        return result
