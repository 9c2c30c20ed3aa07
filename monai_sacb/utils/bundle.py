# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

__all__ = ["find_bundle_root"]


def find_bundle_root() -> str:
    """
    The bundle's folder, seen from the current one: itself, ``bundle``, or its only subfolder that is a bundle.

    A bundle is a folder with ``configs/metadata.json``. Returns ``"."`` where there is none.
    """
    folders = [Path("."), Path("bundle"), *sorted(path for path in Path(".").iterdir() if path.is_dir())]
    for folder in folders:
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    return "."
