# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``bundle``: a copy of the bundle, to work with or to hand to the Model Zoo."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from monai_sacb.utils import bundle_source, new_folder, replacing, write_json
from monai_sacb.version import __version__

__all__ = ["bundle"]

PARTS = ("LICENSE", "configs", "docs", "models")
PACKAGE = "monai_sacb"
# what the Model Zoo takes
LARGEST_FILE = 25 * 10**6
ZOO_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
ZOO_NEEDS = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
# one date for all files, so that the same content gives the same archive
ZIP_DATE = (2026, 1, 1, 0, 0, 0)


def _add_package(folder: Path) -> None:
    """Put the package's code into a bundle, which then does not ask for the package any more."""
    source = Path(__file__).resolve().parents[1]
    # in an installation the bundle lies inside the package
    ignored = shutil.ignore_patterns("__pycache__", "bundle")
    shutil.copytree(source, folder / PACKAGE, ignore=ignored)
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["required_packages_version"].pop(PACKAGE, None)
    write_json(metadata, path)


def _check_zoo(folder: Path, name: str) -> None:
    """Refuse what the Model Zoo would."""
    if not ZOO_NAME.fullmatch(name):
        raise ValueError(f"a bundle in an archive needs a name of a-z, 0-9 and single underscores, got '{name}'.")
    for needed in ZOO_NEEDS:
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"a bundle in an archive needs the file '{needed}', which this one has not.")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise ValueError(
                f"'{path.relative_to(folder)}' has {path.stat().st_size / 1e6:.1f} MB; the Model Zoo takes files of "
                f"{LARGEST_FILE / 1e6:.0f} MB at most."
            )


def _write_archive(folder: Path, name: str, path: Path) -> None:
    """Zip a folder, under the bundle's name inside."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                entry = zipfile.ZipInfo(f"{name}/{file.relative_to(folder).as_posix()}", ZIP_DATE)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())


def bundle(output_dir: str | os.PathLike[str], self_contained: bool = False, archive: bool = False) -> str:
    """
    Write a copy of the MONAI bundle that came with the package.

    Args:
        output_dir: the new folder; it must not exist yet. Its name is the bundle's.
        self_contained: put the code of this package into the folder, so that the bundle runs, from its folder or with
            it on PYTHONPATH, where the package is not installed.
        archive: also write ``NAME_vVERSION.zip`` beside the folder, which the Model Zoo and ``monai.bundle.download``
            take, and refuse what they do not: other names than of a-z, 0-9 and underscores, files above 25 MB, and a
            bundle without ``models/model.pt``.

    Returns:
        the folder, or the archive where one was asked for.

    Raises:
        FileExistsError: When the folder or the archive exists.
        FileNotFoundError: When an archive lacks a file that it must have.
        ValueError: When an archive would have another name, or a larger file, than is allowed.
    """
    target = Path(output_dir)
    name = target.resolve().name
    zipped = target.resolve().parent / f"{name}_v{__version__}.zip"
    for path in (target, zipped) if archive else (target,):
        if path.exists():
            raise FileExistsError(f"'{path}' exists already.")
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
        if self_contained:
            _add_package(folder)
        if archive:
            _check_zoo(folder, name)
            _write_archive(folder, name, zipped)
    return str(zipped if archive else target)
