# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
from pathlib import Path

from monai_sacb.utils import bundle_source, new_folder

__all__ = ["bundle"]

PARTS = ("LICENSE", "configs", "docs", "models")


def bundle(output_dir: str | os.PathLike[str]) -> str:
    """
    Write a copy of the MONAI bundle that came with the package.

    Args:
        output_dir: the new folder; it must not exist yet.

    Returns:
        the folder.

    Raises:
        FileExistsError: When the folder exists.
    """
    source = bundle_source()
    with new_folder(output_dir) as folder:
        for part in PARTS:
            path = source / part
            if path.is_dir():
                shutil.copytree(path, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy2(path, folder / part)
        # a place for weights, which the zoo's layout has even where none come along
        (folder / "models").mkdir(exist_ok=True)
    return str(Path(output_dir))
