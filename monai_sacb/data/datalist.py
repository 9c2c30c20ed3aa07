# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading ``dataset.json`` folders in the form of the Medical Segmentation Decathlon and of Learn2Reg."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_sacb.data.folders import describe_folder

__all__ = ["load_pairs", "load_request", "load_subjects"]

logger = logging.getLogger(__name__)

SUBJECT_LISTS = ("training", "validation")
PAIR_LISTS = ("registration_val", "registration_test")
# entries of a subject that are paths; whatever else it says is passed over
FILE_KEYS = ("image", "label", "mask", "points", "ddf", "inverse_ddf")
HELD_OUT_FRACTION = 0.1


def _read_json(dataset_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """
    The parsed ``dataset.json`` of a folder (or the JSON file itself) and the folder paths are relative to. Of a folder
    without one, what :py:func:`monai_sacb.data.describe_folder` says.
    """
    path = Path(os.path.abspath(dataset_dir))
    if path.is_dir():
        path = path / "dataset.json"
    if not path.is_file():
        described = describe_folder(path.parent) if Path(dataset_dir).is_dir() else None
        if described is None:
            raise FileNotFoundError(f"no dataset.json at '{path}', nor folders Train and Val of .pkl files beside it.")
        return path.parent, described
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not a JSON file ({error}).") from error
    if not isinstance(content, dict) or not any(
        isinstance(content.get(n), list) for n in (*SUBJECT_LISTS, *PAIR_LISTS)
    ):
        raise ValueError(f"'{path}' is not a dataset description: it has no list 'training' of subjects.")
    return path.parent, content


def _subject(entry: Any, root: Path, where: str) -> dict[str, str]:
    """One subject with absolute paths, keys ``image`` and, where given, others such as ``label``."""
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), str):
        raise ValueError(f"{where} must be a path or an object with a path 'image', got {entry!r}.")
    keypoints = entry.get("keypoints")
    if isinstance(keypoints, str) and entry.get("points") is None:
        # Learn2Reg's name for points; some of its lists say .nii.gz where the file is a CSV
        entry = {**entry, "points": re.sub(r"\.nii\.gz$", ".csv", keypoints)}
    subject = {}
    for key in FILE_KEYS:
        value = entry.get(key)
        if value is None:
            continue
        # control characters: no file of anybody's is called so
        if not isinstance(value, str) or not value.strip() or any(ord(character) < 32 for character in value):
            raise ValueError(f"{where}: {key} must be one path, got {value!r}.")
        path = Path(os.path.normpath(root / value))
        if not path.exists():
            raise FileNotFoundError(f"{where}: {key} '{path}' does not exist.")
        subject[key] = str(path)
    return subject


def _section(content: Mapping[str, Any], root: Path, name: str) -> list[dict[str, str]]:
    entries = content.get(name) or []
    if not isinstance(entries, list):
        raise ValueError(f"{root / 'dataset.json'}: '{name}' must be a list, got {type(entries).__name__}.")
    subjects = [_subject(entry, root, f"{root / 'dataset.json'}: {name}[{i}]") for i, entry in enumerate(entries)]
    for image, number in Counter(subject["image"] for subject in subjects).items():
        if number > 1:
            raise ValueError(f"{root / 'dataset.json'}: '{name}' lists '{image}' {number} times.")
    return subjects


def merge_subjects(subjects: Iterable[Mapping[str, str]], where: object) -> dict[str, dict[str, str]]:
    """By image, all that several mentions of a subject say of it."""
    merged: dict[str, dict[str, str]] = {}
    for subject in subjects:
        known = merged.setdefault(subject["image"], {})
        for key, value in subject.items():
            if known.setdefault(key, value) != value:
                raise ValueError(f"{where} gives '{subject['image']}' two files as {key}: '{known[key]}', '{value}'.")
    return merged


def _test_images(content: Mapping[str, Any], root: Path) -> set[str]:
    """Images that are for testing, whether or not they are there."""
    images = []
    for name in ("test", "registration_test"):
        entries = content.get(name)
        for entry in entries if isinstance(entries, list) else ():
            roles = [entry.get(key) for key in ("image", "moving", "fixed")] if isinstance(entry, Mapping) else [entry]
            images += [image for image in roles if isinstance(image, str)]
    return {os.path.normpath(root / image) for image in images}


def _pair_section(content: Mapping[str, Any], root: Path, name: str) -> list[tuple[dict[str, str], dict[str, str]]]:
    """The (moving, fixed) subjects of every listed pair, with whatever labels the pair itself names."""
    pairs = []
    entries = content.get(name) or []
    if not isinstance(entries, list):
        raise ValueError(f"{root / 'dataset.json'}: '{name}' must be a list, got {entries!r}.")
    for i, entry in enumerate(entries):
        where = f"{root / 'dataset.json'}: {name}[{i}]"
        if not isinstance(entry, Mapping) or not {"fixed", "moving"} <= entry.keys():
            raise ValueError(f"{where} must be an object with paths 'fixed' and 'moving', got {entry!r}.")
        roles = []
        for role in ("moving", "fixed"):
            files = {"image": entry[role], "label": entry.get(f"{role}_label")}
            roles.append(_subject({k: v for k, v in files.items() if v is not None}, root, f"{where} {role}"))
        pairs.append((roles[0], roles[1]))
    return pairs


def _pair_subjects(content: Mapping[str, Any], root: Path, name: str) -> dict[str, dict[str, str]]:
    """By image, the subjects of a list of pairs, with all that the lists of subjects know of them."""
    listed = [subject for pair in _pair_section(content, root, name) for subject in pair]
    images = {subject["image"] for subject in listed}
    known = (s for section in SUBJECT_LISTS for s in _section(content, root, section) if s["image"] in images)
    return merge_subjects([*listed, *known], root / "dataset.json")


def load_subjects(dataset_dir: str | os.PathLike[str], section: str = "training") -> list[dict[str, str]]:
    """
    The subjects of a dataset folder that are trained on, or those that are evaluated on.

    Subjects of the list ``validation`` and of the pairs ``registration_val`` are for evaluation. Where a dataset names
    neither, the last tenth of the training subjects by file name (at least two) is held out. No subject is in both, nor
    are those of the list ``test`` and of the pairs ``registration_test`` trained on.

    Args:
        dataset_dir: folder with a ``dataset.json``, or such a file, whose paths are relative to it; or a folder of
            pickled subjects, see :py:func:`describe_folder`.
        section: ``"training"``, ``"validation"``, or ``"test"``: the list ``test`` and the subjects of the pairs
            ``registration_test``.

    Returns:
        one dictionary of absolute paths for each subject: ``image``, and ``label`` and others where listed.

    Raises:
        FileNotFoundError: When the description or a file that it lists does not exist.
        ValueError: When the description is not one, or has no subjects for the section.
    """
    if section not in ("training", "validation", "test"):
        raise ValueError(f"section must be 'training', 'validation' or 'test', got '{section}'.")
    root, content = _read_json(dataset_dir)
    if section == "test":
        # the list of subjects knows their labels, where it has them
        paired = _pair_subjects(content, root, "registration_test").values()
        tested = merge_subjects([*paired, *_section(content, root, "test")], root / "dataset.json")
        if not tested:
            raise ValueError(f"'{root}' lists no test subjects.")
        return list(tested.values())
    training, validation = (_section(content, root, name) for name in SUBJECT_LISTS)
    tested_images = _test_images(content, root)
    training = [subject for subject in training if subject["image"] not in tested_images]
    held_out = {subject["image"]: subject for subject in validation} | _pair_subjects(content, root, "registration_val")
    if not held_out:
        if len(training) < 4:
            raise ValueError(
                f"'{root}' lists {len(training)} training subjects and none for validation; at least 4 are needed to "
                "hold some out."
            )
        by_name = sorted(training, key=lambda subject: subject["image"])
        number = max(2, round(len(training) * HELD_OUT_FRACTION))
        held_out = {subject["image"]: subject for subject in by_name[-number:]}
        names = ", ".join(Path(path).name for path in held_out)
        logger.info(f"No validation list in '{root}': {number} of {len(training)} subjects are held out: {names}.")
    if section == "validation":
        return list(held_out.values())
    subjects = [subject for subject in training if subject["image"] not in held_out]
    if len(subjects) < 2:
        raise ValueError(f"'{root}' has {len(subjects)} training subjects; at least 2 are needed to form a pair.")
    return subjects


def load_pairs(
    dataset_dir: str | os.PathLike[str], subjects: Sequence[Mapping[str, str]], name: str = "registration_val"
) -> list[tuple[int, int]] | None:
    """
    The pairs that a dataset lists, as positions in a list of subjects.

    Args:
        dataset_dir: folder with a ``dataset.json``, or such a file.
        subjects: subjects with their paths ``image``, as from :py:func:`load_subjects`.
        name: ``"registration_val"`` or ``"registration_test"``.

    Returns:
        (moving, fixed) index pairs, or None where the dataset lists none (all ordered pairs are meant then).

    Raises:
        ValueError: When a listed pair names a subject that is not among the given ones.
    """
    if name not in PAIR_LISTS:
        raise ValueError(f"name must be one of {PAIR_LISTS}, got '{name}'.")
    root, content = _read_json(dataset_dir)
    index = {subject["image"]: i for i, subject in enumerate(subjects)}
    pairs = []
    for i, (moving, fixed) in enumerate(_pair_section(content, root, name)):
        for subject in (moving, fixed):
            if subject["image"] not in index:
                raise ValueError(f"{name}[{i}] names '{subject['image']}', which is not among the subjects.")
        pairs.append((index[moving["image"]], index[fixed["image"]]))
    return pairs or None


def load_request(
    dataset_dir: str | os.PathLike[str] | None = None,
    moving_image: str | None = None,
    fixed_image: str | None = None,
    moving_label: str | None = None,
    fixed_label: str | None = None,
    pair_list: str | None = None,
) -> dict[str, Any]:
    """
    What to register: two image files, or else the pairs of a dataset folder.

    Args:
        dataset_dir: folder with a ``dataset.json``, used where no files are given: its listed pairs
            (``registration_val``, else ``registration_test``), or all ordered pairs of its validation subjects, or else
            of its training subjects.
        moving_image, fixed_image: the two files.
        moving_label, fixed_label: label maps of the two images, where there are any.
        pair_list: the list of pairs of the dataset that is meant, ``"registration_val"`` or ``"registration_test"``.

    Returns:
        ``data``, the subjects, and ``pairs``, their (moving, fixed) index pairs or None for all ordered pairs, as
        :py:class:`monai_sacb.data.PairDataset` takes them.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When only one of the two images is given, or nothing at all, or the dataset has no such list of
            pairs.
    """
    if pair_list is not None and pair_list not in PAIR_LISTS:
        raise ValueError(f"pair_list must be one of {PAIR_LISTS}, got '{pair_list}'.")
    if (moving_image is None) != (fixed_image is None):
        given = "moving_image" if fixed_image is None else "fixed_image"
        raise ValueError(f"registration needs both moving_image and fixed_image, got only {given}.")
    if moving_image is not None and fixed_image is not None:
        moving = {"image": str(moving_image)} | ({} if moving_label is None else {"label": str(moving_label)})
        fixed = {"image": str(fixed_image)} | ({} if fixed_label is None else {"label": str(fixed_label)})
        data = [_subject(moving, Path.cwd(), "moving"), _subject(fixed, Path.cwd(), "fixed")]
        return {"data": data, "pairs": [(0, 1)]}
    if dataset_dir is None:
        raise ValueError("nothing to register: give moving_image and fixed_image, or dataset_dir.")
    root, content = _read_json(dataset_dir)
    for name in PAIR_LISTS if pair_list is None else (pair_list,):
        subjects = list(_pair_subjects(content, root, name).values())
        if subjects:
            return {"data": subjects, "pairs": load_pairs(dataset_dir, subjects, name)}
    if pair_list is not None:
        raise ValueError(f"'{root}' has no list '{pair_list}' of pairs.")
    subjects = _section(content, root, "validation") or _section(content, root, "training")
    if len(subjects) < 2:
        raise ValueError(f"'{root}' lists {len(subjects)} subjects; at least 2 are needed to form a pair.")
    return {"data": subjects, "pairs": None}
