# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of pickled subjects without a ``dataset.json``, in the layout of pre-processed brain data releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai_sacb.data.pickle_reader import PICKLE_SUFFIXES, read_pickled_arrays

__all__ = ["describe_folder"]

# what the folder of each list of subjects may be called, in any case
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


def _pair(moving: dict[str, str], fixed: dict[str, str]) -> dict[str, str]:
    """A listed pair, with the labels that both subjects have."""
    pair = {"fixed": fixed["image"], "moving": moving["image"]}
    return pair | {f"{role}_label": s["label"] for role, s in (("fixed", fixed), ("moving", moving)) if "label" in s}


def describe_folder(folder: Path) -> dict[str, Any] | None:
    """
    What a ``dataset.json`` would say of a folder with subfolders of pickled subjects.

    The subfolders are called ``Train``, ``Val`` and, if there is one, ``Test``, in any case. Each of their ``.pkl``
    files is a subject, listed by name. Whether such files hold label maps is seen from the first one. A file
    ``atlas.pkl`` beside the subfolders is the atlas; it is the moving image of the listed pairs.

    Args:
        folder: the folder.

    Returns:
        lists ``training``, ``validation`` and ``test`` of subjects, ``atlas``, and the pairs ``registration_val`` and
        ``registration_test`` of the atlas with the subjects; paths are relative to the folder. None where the folder
        has no training subjects of this kind.

    Raises:
        ValueError: When the first file of a subfolder is not a pickle file of arrays.
    """
    if not folder.is_dir():
        return None
    content: dict[str, Any] = {}
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    for section, names in SECTION_FOLDERS.items():
        files = [file for path in subfolders if path.name.lower() in names for file in _pickles(path)]
        if files:
            labelled = len(read_pickled_arrays(files[0])) > 1
            content[section] = [_entry(file, folder, labelled) for file in files]
    if "training" not in content:
        return None
    atlas = next((path for path in _pickles(folder) if path.stem.lower() == "atlas"), None)
    if atlas is not None:
        content["atlas"] = _entry(atlas, folder, len(read_pickled_arrays(atlas)) > 1)
        for section, name in (("validation", "registration_val"), ("test", "registration_test")):
            if section in content:
                content[name] = [_pair(content["atlas"], subject) for subject in content[section]]
    return content
