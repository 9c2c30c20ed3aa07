# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["bundle_source", "find_bundle_root", "running_bundle"]


def _is_bundle(folder: str) -> bool:
    # os.path, unlike pathlib, answers no for what may not be looked at
    return os.path.isfile(os.path.join(folder, "configs", "metadata.json"))


def find_bundle_root() -> str:
    """
    The bundle's folder, seen from the current one: itself, ``bundle``, or its only subfolder that is a bundle.

    A bundle is a folder with ``configs/metadata.json``. Returns ``"."`` where there is none, or no single one.
    """
    for folder in (".", "bundle"):
        if _is_bundle(folder):
            return folder
    try:
        subfolders = [entry.name for entry in os.scandir(".") if _is_bundle(entry.name)]
    except OSError:
        return "."
    return subfolders[0] if len(subfolders) == 1 else "."


def bundle_source() -> Path:
    """The folder of the bundle that the package came with, in an installation or a clone, or that it came inside."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "bundle", package.parent / "bundle", package.parent):
        if (folder / "configs" / "metadata.json").is_file():
            return folder
    raise FileNotFoundError(f"this installation of monai_sacb in '{package}' has no bundle; install it again.")


def running_bundle(holding: str) -> str:
    """
    The folder of the bundle that is being run, from wherever.

    Args:
        holding: a file in it, by which it is known.

    Returns:
        the first folder of Python's search path that is a bundle with this file: MONAI puts that of a bundle there
        when it runs it; ``"."`` where there is none.
    """
    for folder in [*sys.path[1:], *sys.path[:1]]:
        if folder and _is_bundle(folder) and os.path.isfile(os.path.join(folder, holding)):
            return folder
    return "."
