# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

from monai.data import NibabelWriter

from monai_sacb.utils import replacing

__all__ = ["ReplacingNibabelWriter"]


class ReplacingNibabelWriter(NibabelWriter):
    """
    MONAI's writer of NIfTI files, by a temporary name and renamed: whatever happens meanwhile, there is no half file.

    It is the ``writer`` for ``monai.transforms.SaveImaged``; arguments are those of ``monai.data.NibabelWriter``.
    """

    def write(self, filename: str | os.PathLike[str], verbose: bool = False, **kwargs: Any) -> None:
        """Write to a file; arguments are those of ``monai.data.NibabelWriter.write``."""
        with replacing(filename) as temporary:
            super().write(temporary, verbose=verbose, **kwargs)
