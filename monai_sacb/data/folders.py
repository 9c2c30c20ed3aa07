# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of pickled subjects without a ``dataset.json``, in the layout of pre-processed brain data releases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_sacb.data.pickle_reader import PICKLE_SUFFIXES, read_pickled_arrays

__all__ = ["describe_folder"]

# what the folder of each list of subjects may be called, in any case
# of a folder, to see whether they hold label maps
CHECKED_FILES = 10
SECTION_FOLDERS = {
    "training": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def _pickles(folder: Path) -> list[Path]:
    """The pickle files in a folder, sorted; without hidden ones, which some systems leave beside files."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES and not p.name.startswith("."))


def _entry(path: Path, root: Path, labelled: bool) -> dict[str, str]:
    name = path.relative_to(root).as_posix()
    return {"image": name, "label": name} if labelled else {"image": name}


def _have_labels(files: Sequence[Path]) -> bool:
    """Whether the pickle files of a folder hold label maps, by the first one, and some others where it has none."""
    first = len(read_pickled_arrays(files[0]))
    if first > 2:
        raise ValueError(f"'{files[0]}' must hold an image and perhaps its label map, got {first} arrays.")
    # to read hundreds of files would take too long
    for file in files[1 :: max(1, len(files) // CHECKED_FILES)] if first == 1 else ():
        if len(read_pickled_arrays(file)) > 1:
            raise ValueError(f"'{file}' holds a label map, but '{files[0]}' of the same folder holds none.")
    return first == 2


def _pair(moving: dict[str, str], fixed: dict[str, str]) -> dict[str, str]:
    """A listed pair, with the labels that both subjects have."""
    pair = {"fixed": fixed["image"], "moving": moving["image"]}
    return pair | {f"{role}_label": s["label"] for role, s in (("fixed", fixed), ("moving", moving)) if "label" in s}


def describe_folder(folder: Path) -> dict[str, Any] | None:
    """
    What a ``dataset.json`` would say of a folder with subfolders of pickled subjects.

    The subfolders are called ``Train``, ``Val`` and, if there is one, ``Test``, in any case. Each of their ``.pkl``
    files is a subject, listed by name; all of a subfolder hold a label map, or none. A file
    ``atlas.pkl`` beside the subfolders is the atlas; it is the moving image of the listed pairs.

    Args:
        folder: the folder.

    Returns:
        lists ``training``, ``validation`` and ``test`` of subjects, ``atlas``, and the pairs ``registration_val`` and
        ``registration_test`` of the atlas with the subjects; paths are relative to the folder. None where the folder
        has no training subjects of this kind.

    Raises:
        ValueError: When the first file of a subfolder is not a pickle file of one or two arrays, or it has no label map
            while others do.
    """
    if not folder.is_dir():
        return None
    content: dict[str, Any] = {}
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    for section, names in SECTION_FOLDERS.items():
        files = [file for path in subfolders if path.name.lower() in names for file in _pickles(path)]
        if files:
            content[section] = [_entry(file, folder, _have_labels(files)) for file in files]
    if "training" not in content:
        return None
    atlas = next((path for path in _pickles(folder) if path.stem.lower() == "atlas"), None)
    if atlas is not None:
        content["atlas"] = _entry(atlas, folder, len(read_pickled_arrays(atlas)) > 1)
        for section, name in (("validation", "registration_val"), ("test", "registration_test")):
            if section in content:
                content[name] = [_pair(content["atlas"], subject) for subject in content[section]]
    return content
