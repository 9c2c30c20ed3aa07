# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders of subjects without a ``dataset.json``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_sacb.data.pickle_reader import PICKLE_SUFFIXES, read_pickled_arrays

__all__ = ["describe_folder", "list_volumes"]

# what the commands read, in any case
READABLE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgh", ".mgz")
# of a folder, to see whether they hold label maps
CHECKED_FILES = 10
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


def list_volumes(path: str | os.PathLike[str]) -> list[str]:
    """
    The images in a folder, by name; without hidden files and subfolders.

    Args:
        path: the folder; or one image.

    Raises:
        FileNotFoundError: When there is no such folder, or no image in it.
        ValueError: When two images have one name but for the extension: their results would have one name, too.
    """
    place = Path(path)
    if place.is_file():
        return [str(place)]
    if not place.is_dir():
        raise FileNotFoundError(f"folder '{place}' does not exist.")
    files = sorted(
        str(file)
        for file in place.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name.lower().endswith(READABLE_SUFFIXES)
    )
    if not files:
        raise FileNotFoundError(f"folder '{place}' has no image ({', '.join(READABLE_SUFFIXES)}).")
    stems = [Path(file.removesuffix(".gz")).stem for file in files]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise ValueError(f"folder '{place}' has several images called '{repeated[0]}'.")
    return files
