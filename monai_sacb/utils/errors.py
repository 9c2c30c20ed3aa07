# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

__all__ = ["first_line", "sentence"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the name of its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def sentence(error: BaseException) -> str:
    """One line that says what is wrong: of an error that MONAI's configs have wrapped, the first."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MemoryError):
        return "there is not enough memory for this."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'" if error.filename else error.strerror
    text = str(error).strip()
    # the key alone says little
    if isinstance(error, KeyError):
        text = f"KeyError: {text}"
    return text.splitlines()[0].strip() if text else type(error).__name__
