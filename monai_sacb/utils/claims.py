# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monai.utils import optional_import

__all__ = ["WorkClaims"]

fcntl, has_fcntl = optional_import("fcntl")


class WorkClaims:
    """
    Which of several processes works on what, without any that directs them.

    A claim is a lock on one byte of a file that they share. The system takes it back when the process ends, however it
    ends, so that another one can go on with its work. Where the system has no such locks (Windows), all is free.

    Args:
        path: the file, which stays empty; its folder is made where it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """
        Claim a piece of work, until the block ends.

        Args:
            name: what it is.
            wait: wait for the process that has it, where there is one.

        Yields:
            whether it is ours. That two names stand for the same byte hardly ever happens, and only delays.
        """
        if not has_fcntl:
            yield True
            return
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        # for each claim anew: to close the file gives up what the process holds of it
        with open(self.path, "ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except (BlockingIOError, PermissionError):
                # the system may say either
                yield False
                return
            yield True
