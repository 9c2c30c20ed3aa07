# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading arrays from pickle files, without running anything that such a file may hold."""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

__all__ = ["PickledVolumeReader", "read_pickled_arrays"]

PICKLE_SUFFIXES = (".pkl", ".pickle")
# position in the tuple of each kind of volume
ITEMS = {"image": 0, "label": 1}
# bool, signed, unsigned, floating point and complex
NUMERIC = re.compile(r"[biufc]\d{1,2}")
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    MemoryError,
    OverflowError,
    RecursionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)


class _RefusedError(ValueError):
    """What a file is refused for, in words."""


class _Opaque:
    """What a pickle may name but not look into, change or call, such as the class of arrays."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it sets the state of something that is no array")


class _Function(_Opaque):
    """A function that a pickle may call. Without attributes, so that a pickle cannot change it either."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _RefusedError("it changes a function")


class _DType:
    """Description of a type of numbers, with the methods that unpickling calls."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *flags: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not NUMERIC.fullmatch(code):
            raise _RefusedError(f"an array has values of type {code!r}, which are no numbers")
        self._code = code
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        # sub-arrays, names and fields of a structured type
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise _RefusedError("an array has values of a structured type")
        self._order = order

    def build(self) -> np.dtype:
        return np.dtype(self._order + self._code)


class _Array:
    """Parts of an array, put together only when the pickle has come to its end."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, fortran, data = state
        self._parts = (data, dtype, shape, "F" if fortran else "C")

    def build(self) -> np.ndarray:
        data, dtype, shape, order = self._parts
        if not isinstance(dtype, _DType) or order not in ("C", "F"):
            raise _RefusedError("an array is described wrongly")
        # strings are what Python 2 had for bytes
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, (bytes, bytearray)):
            raise _RefusedError(f"an array has its values in a {type(data).__name__}")
        shape = ensure_tuple(shape)
        if len(shape) > 32 or not all(type(size) is int and size >= 0 for size in shape):
            raise _RefusedError(f"an array has the shape {shape}")
        kind = dtype.build()
        if math.prod(shape) * kind.itemsize != len(data):
            raise _RefusedError(f"an array of shape {shape} and type {kind} has {len(data)} bytes")
        return np.frombuffer(data, kind).reshape(shape, order=order)


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise _RefusedError(f"it encodes a {type(text).__name__} as {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: Any, data: Any) -> _Array:
    return _Array(data, dtype, (), "C")


def _standin(module: str, name: str) -> Any:
    """Our own harmless counterpart of what a pickle of numpy arrays refers to; nothing of numpy is handed out."""
    # numpy 1 and 2 name their modules differently
    place = module.replace("numpy._core.", "numpy.core.")
    if (place, name) == ("numpy.core.multiarray", "_reconstruct"):
        return _Function(lambda *_: _Array())
    if (place, name) == ("numpy.core.numeric", "_frombuffer"):
        return _Function(lambda data, dtype, shape, order: _Array(data, dtype, shape, order))
    if (place, name) == ("numpy.core.multiarray", "scalar"):
        return _Function(_scalar)
    if (module, name) == ("numpy", "dtype"):
        return _Function(_DType)
    if (module, name) == ("numpy", "ndarray"):
        return _Opaque()
    if (module, name) == ("_codecs", "encode"):
        return _Function(_encode)
    if (module, name) in (("__builtin__", "bytes"), ("builtins", "bytes")):
        # no bytes at all, in protocols 0 to 2; with arguments it would make as many as they say
        return _Function(lambda: b"")
    raise _RefusedError(f"it refers to '{module}.{name}', which arrays do not need; nothing of it was run")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        return _standin(module, name)


def _check_memo(content: bytes) -> None:
    """Refuse places in the unpickler's memory beyond what a file of this size can fill: all below would be made."""
    for opcode, argument, _ in pickletools.genops(content):
        place = int(argument) if argument is not None and opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") else 0
        if not 0 <= place <= len(content):
            raise _RefusedError(f"it stores something at place {place}, but has only {len(content)} bytes")


def read_pickled_arrays(path: str | os.PathLike[str]) -> list[np.ndarray]:
    """
    The arrays in a pickle file: of a single one, or of a tuple or list of them.

    Nothing but numeric numpy arrays, of numpy 1 or 2 and protocols 0 to 5, is understood; a file that refers to any
    other class or function is refused before it is called.

    Args:
        path: the file.

    Returns:
        the arrays in their order, read-only.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not a pickle, is cut short, or holds or refers to anything else.
    """
    content = Path(path).read_bytes()
    try:
        _check_memo(content)
        # Python 2 wrote bytes as strings, which latin1 keeps as they are
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        entries = loaded if isinstance(loaded, (tuple, list)) else [loaded]
        if not entries:
            raise _RefusedError("it holds no arrays")
        for entry in entries:
            if not isinstance(entry, _Array):
                raise _RefusedError(f"it holds a {type(entry).__name__.strip('_')} beside arrays")
        return [entry.build() for entry in entries]
    except _RefusedError as error:
        raise ValueError(f"'{path}' is refused: {error}.") from error
    except _MALFORMED as error:
        raise ValueError(f"'{path}' is not a whole pickle file of numpy arrays.") from error


class PickledVolumeReader(ImageReader):
    """
    Read one volume from a ``.pkl`` file that holds a tuple ``(image, label)`` of numpy arrays, or a single array.

    Pre-processed releases of brain data come in this form. A pickle file can hold a program; here, nothing but numeric
    arrays is understood, see :py:func:`read_pickled_arrays`. :py:class:`monai_sacb.transforms.LoadVolumed` chooses this
    reader, and the item, by itself.

    Args:
        item: which of the arrays: ``"image"`` for the first, ``"label"`` for the second, or its index.
        affine: ``(4, 4)``, voxels to RAS millimetres. Defaults to the identity, voxels of 1 mm along the axes R, A and
            S: such files say nothing of their place in space.

    Raises:
        ValueError: When ``item`` or ``affine`` is none of these.
    """

    def __init__(self, item: str | int = "image", affine: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        index = ITEMS.get(item, -1) if isinstance(item, str) else item
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"item must be 'image', 'label' or an index of at least 0, got {item!r}.")
        matrix = np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise ValueError(f"affine must be a finite 4 x 4 matrix, got {affine!r}.")
        self.item = item
        self.index = index
        self.affine = matrix

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether the file, or all of the files, are ``.pkl`` or ``.pickle`` files."""
        return all(Path(path).suffix.lower() in PICKLE_SUFFIXES for path in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> np.ndarray:
        """
        Args:
            data: path of the file, or a sequence of one path.
            kwargs: none.

        Returns:
            the array of the item, writable and in the byte order of this machine.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When the file is refused, has no such item, or more arrays than an image and its label map where
                those are asked for by name, its numbers are complex, or there are several files.
        """
        paths = ensure_tuple(data)
        if len(paths) != 1:
            raise ValueError(f"one pickle file is read at a time, got {len(paths)}.")
        arrays = read_pickled_arrays(paths[0])
        if self.index >= len(arrays):
            raise ValueError(f"'{paths[0]}' has no item {self.item!r}, it holds {len(arrays)} array(s).")
        if isinstance(self.item, str) and len(arrays) > len(ITEMS):
            # a pair of images with their label maps, say: the second array would not be a label map
            raise ValueError(
                f"'{paths[0]}' must hold an image and perhaps its label map, it holds {len(arrays)} arrays."
            )
        array = arrays[self.index]
        if array.dtype.kind == "c":
            raise ValueError(f"'{paths[0]}' holds complex numbers.")
        return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")

    def get_data(self, img: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Args:
            img: array ``(*spatial)`` from :py:meth:`read`.

        Returns:
            the array, and its meta data: affine, original_affine, space, spatial_shape and original_channel_dim (none).
        """
        meta: dict[str, Any] = {
            MetaKeys.AFFINE: self.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: self.affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(img.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        }
        return img, meta
