# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["file_digest", "new_folder", "replacing"]


def _publish(temporary: Path, path: Path, mode: int) -> None:
    """Give what is written its name, and the mode that the process gives; tempfile's is for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)
    os.replace(temporary, path)


@contextmanager
def replacing(path: str | os.PathLike[str], alone: bool = False) -> Iterator[Path]:
    """
    Give a temporary name beside a file to write to, and rename it to the file's once all is written.

    Whatever happens in between, a reader finds either the old file or the whole new one.

    Args:
        path: the file. Its folder is made where it is missing.
        alone: whether no other process writes this file meanwhile; what killed ones have left is removed then.

    Yields:
        the temporary path, with the same extensions (which file writers look at).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, dot, extensions = path.name.partition(".")
    if alone:
        # eight characters of tempfile's own
        pattern = f".{glob.escape(stem)}-{'[a-z0-9_]' * 8}{glob.escape(dot + extensions)}"
        for leftover in path.parent.glob(pattern):
            leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{stem}-", suffix=dot + extensions, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _publish(temporary, path, 0o666)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Give a temporary folder beside a new one to fill, private meanwhile, and rename it once all is written.

    Args:
        path: the folder, which must not exist. Folders above are made where they are missing.

    Yields:
        the temporary folder; if anything fails, it is removed.

    Raises:
        FileExistsError: When there is such a folder or file.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"'{target}' exists already.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        _publish(temporary, target, 0o777)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: str | os.PathLike[str]) -> str:
    """
    SHA-256 of a file's content, as hexadecimal digits.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: When it does not exist.
    """
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
