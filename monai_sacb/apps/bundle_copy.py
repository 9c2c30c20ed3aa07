# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from monai_sacb.utils import bundle_source

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
    target = Path(output_dir)
    if target.exists():
        raise FileExistsError(f"'{target}' exists already.")
    source = bundle_source()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for part in PARTS:
            path = source / part
            if path.is_dir():
                shutil.copytree(path, temporary / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy2(path, temporary / part)
        # a place for weights, which the zoo's layout has even where none come along
        (temporary / "models").mkdir(exist_ok=True)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)
