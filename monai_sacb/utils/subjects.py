# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What to call subjects in tables and names of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from monai.data import MetaTensor

__all__ = ["file_stem", "pair_names", "subject_name", "subject_names"]


def file_stem(path: str) -> str:
    """Name of a file without the folder and the extension, of which ``.gz`` is a part."""
    name = PurePath(path).name
    # of "sub.01.nii.gz" neither less nor more
    return PurePath(name.removesuffix(".gz")).stem


def subject_name(image: Any) -> str:
    """Name of a subject: the file name of its image without extension; empty where it is not known."""
    return file_stem(str(image.meta.get("filename_or_obj", ""))) if isinstance(image, MetaTensor) else ""


def subject_names(paths: Sequence[str]) -> list[str]:
    """
    Names of subjects that tell them apart: file names without extension, and the folders above where they do not.

    Args:
        paths: the files of their images.

    Returns:
        as many names; one name for one path.
    """
    depths = dict.fromkeys(paths, 1)
    parts = {path: (*PurePath(path).parts[:-1], file_stem(path)) for path in depths}
    repeated = Counter(parts.values())
    # "a.nii" beside "a.mha"
    parts = {path: PurePath(path).parts if repeated[part] > 1 else part for path, part in parts.items()}
    while True:
        names = {path: "_".join(parts[path][-depth:]) for path, depth in depths.items()}
        counts = Counter(names.values())
        same = [path for path, name in names.items() if counts[name] > 1 and depths[path] < len(parts[path])]
        if not same:
            return [names[path] for path in paths]
        for path in same:
            depths[path] += 1


def pair_names(pair: Mapping[Any, Any]) -> tuple[str, str]:
    """
    Names of the moving and the fixed subject of a pair.

    Args:
        pair: ``moving_subject`` and ``fixed_subject``, as :py:class:`monai_sacb.data.PairDataset` adds them, or else
            ``moving_image`` and ``fixed_image``, whose files give the names.
    """
    moving, fixed = (
        str(pair.get(f"{role}_subject") or subject_name(pair[f"{role}_image"])) for role in ("moving", "fixed")
    )
    return moving, fixed
