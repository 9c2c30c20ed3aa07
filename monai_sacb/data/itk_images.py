# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Images of ITK from arrays in our axis order, and readers of ITK without their side effects."""

from __future__ import annotations

import locale
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import itk
import numpy as np

__all__ = ["array_to_itk", "itk_reason", "place_itk_image", "quiet_itk", "read_itk_header"]

STDERR = 2
# warnings, locale and stderr belong to the process: one thread at a time puts them aside
_process = threading.RLock()


def place_itk_image(image: Any, affine: np.ndarray) -> None:
    """Set spacing, origin and direction of an ITK image by an affine ``(4, 4)`` from voxels to LPS millimetres."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3] / spacing)))


def array_to_itk(array: np.ndarray, affine: np.ndarray) -> Any:
    """
    An ITK image of a copy of an array.

    Args:
        array: ``(D, H, W)``, of a type that ITK has images of.
        affine: ``(4, 4)``, voxels to LPS millimetres.
    """
    # ITK's arrays have the axes backwards
    image = itk.image_from_array(np.ascontiguousarray(array.transpose(2, 1, 0)))
    place_itk_image(image, affine)
    return image


@contextmanager
def quiet_itk() -> Iterator[None]:
    """
    Let ITK read and write without side effects.

    It prints warnings, and the C libraries under it print errors of their own beside the exception that follows; what
    matters of them is said by whoever calls it. Its reader of DICOM changes the locale of the process, and so the
    encoding of files that are opened later. Nothing that is to be seen on stderr may happen meanwhile.
    """
    with _process, _native_errors_dropped():
        shown, place = itk.Object.GetGlobalWarningDisplay(), locale.setlocale(locale.LC_ALL)
        itk.Object.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            itk.Object.SetGlobalWarningDisplay(shown)
            locale.setlocale(locale.LC_ALL, place)


@contextmanager
def _native_errors_dropped() -> Iterator[None]:
    try:
        kept = os.dup(STDERR)
    except OSError:
        # there is no stderr that anything could be printed to
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), STDERR)
            yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)


def read_itk_header(path: str) -> Any:
    """ITK's reader for a file, with the header read; None where ITK knows no such files."""
    with quiet_itk():
        io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
        if io is not None:
            io.SetFileName(path)
            io.ReadImageInformation()
    return io


def itk_reason(error: BaseException) -> str:
    """The message of an error in one line, without the addresses that ITK puts into it."""
    text = re.split(r"ITK ERROR: (?:\w+\(0x[0-9a-f]+\): )?", str(error))[-1]
    return " ".join(text.split())[:300] or type(error).__name__
