# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import glob
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai.data import MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing

from monai_sacb.utils import read_checkpoint, replacing

__all__ = ["DiskCacheDataset", "file_hashing"]

# of formats that keep the voxels in a file of another ending
HEADER_SUFFIXES = (".mhd", ".nhdr", ".hdr", ".img")


def _parts(path: Path) -> list[Path]:
    """The files that an image consists of: it may be a folder, or a header beside the voxels."""
    if path.is_dir():
        return sorted(part for part in path.iterdir() if part.is_file())
    if path.suffix.lower() in HEADER_SUFFIXES:
        return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [path] if path.is_file() else []


def file_hashing(item: Any) -> bytes:
    """Hash of an entry of a list of subjects that changes with the files that it names."""
    files = []
    for value in item.values() if isinstance(item, Mapping) else (item,):
        if isinstance(value, (str, os.PathLike)):
            stats = [(part.name, part.stat()) for part in _parts(Path(value))]
            files.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return pickle_hashing([pickle_hashing(item), files])


def _transform_hashing(transforms: Any) -> bytes:
    """Hash of transforms with all their settings."""
    try:
        return hashlib.sha256(pickle.dumps(transforms)).hexdigest().encode()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"transforms with a cache_dir must be such as pickle can write, but {error}.") from error


def _plain(value: Any) -> Any:
    """A value of meta data in a type that is read back without running anything."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # contiguous and native, as tensors are
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(entry) for entry in value) if type(value) in (list, tuple) else list(value)
    # text enumerations, such as the keys of meta data
    return str(value) if isinstance(value, str) else value


def _packed(entry: Any) -> Any:
    """An entry of a transformed subject for the file: tensors with meta data as both apart."""
    if isinstance(entry, MetaTensor):
        # a view would be written with all of the tensor that it looks at
        parts = {"tensor": entry.as_tensor().contiguous().clone(), "meta": _plain(dict(entry.meta))}
        return {"meta_tensor": {**parts, "operations": _plain(list(entry.applied_operations))}}
    if isinstance(entry, torch.Tensor):
        return {"value": entry.contiguous().clone()}
    return {"value": _plain(entry)}


def _unpacked(entry: Mapping[str, Any]) -> Any:
    if "meta_tensor" not in entry:
        return entry["value"]
    parts = entry["meta_tensor"]
    return MetaTensor(parts["tensor"], meta=parts["meta"], applied_operations=parts["operations"])


class DiskCacheDataset(PersistentDataset):
    """
    MONAI's ``PersistentDataset`` for dictionaries of images with their meta data: subjects are transformed when they
    are first asked for, and read from a folder from then on, so that a training starts at once and its memory stays.

    Against MONAI's, meta data are kept, files of the folder are read without running anything, are written to a
    temporary name and renamed, and one that cannot be read is made again. The name of such a file is made of the entry
    of the list of subjects, the sizes and times of the files that this names, and the transforms with their settings:
    where one of them changes, the subject is transformed anew. Files that are not used any more stay in the folder.

    Args:
        data: the subjects, dictionaries of paths.
        transform: transform of one subject to a dictionary. What comes after its first random transform is not cached.
        cache_dir: the folder; made where it is missing. Several runs may share it.

    Raises:
        ValueError: When the folder is a file, or a transform has settings that pickle cannot write, such as a lambda.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Any, Any]],
        transform: Sequence[Callable] | Callable,
        cache_dir: str | os.PathLike[str],
    ) -> None:
        if Path(cache_dir).exists() and not Path(cache_dir).is_dir():
            raise ValueError(f"cache_dir must be a folder, got the file '{cache_dir}'.")
        super().__init__(data, transform, cache_dir, hash_func=file_hashing, hash_transform=_transform_hashing)

    def _cachecheck(self, item_transformed: Any) -> Any:
        name = hashlib.sha256(self.hash_func(item_transformed) + self.transform_hash.encode()).hexdigest()
        path = Path(self.cache_dir) / f"{name}.pt"
        if path.is_file():
            try:
                return {key: _unpacked(entry) for key, entry in read_checkpoint(path).items()}
            except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, FileNotFoundError):
                # not ours, or deleted in between: as if it were not there
                pass
        item = self._pre_transform(deepcopy(item_transformed))
        packed = {key: _packed(entry) for key, entry in item.items()}
        with replacing(path) as temporary:
            torch.save(packed, temporary)
        # in the types that will be read: a batch may hold both
        return {key: _unpacked(entry) for key, entry in packed.items()}
