# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Which subjects of a dataset are registered to which."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from monai_sacb.data.datalist import (
    SUBJECT_LISTS,
    _pair_section,
    _read_json,
    _section,
    _subject,
    load_pairs,
    load_subjects,
)
from monai_sacb.data.pickle_reader import PICKLE_SUFFIXES, read_pickled_arrays

__all__ = ["atlas_to_subject", "make_pairs", "read_pairs_csv", "required_entries", "subject_to_atlas"]

STRATEGIES = ("auto", "all", "listed", "atlas_to_subject", "subject_to_atlas")
# lists of pairs in a dataset.json, by the section that they belong to; the first is one of Learn2Reg's
PAIR_LISTS = {
    "training": "training_paired_images",
    "validation": "registration_val",
    "test": "registration_test",
}
CSV_COLUMNS = ("moving", "fixed", "moving_label", "fixed_label")


def required_entries(**weights: float) -> list[str]:
    """
    Which entries of the subjects a training needs: those whose terms of the loss have a weight.

    Args:
        **weights: the weight of the term that needs an entry, by entry, such as ``label=1.0, points=0.0``.

    Raises:
        ValueError: When a weight is not a finite number of at least 0.
    """
    for entry, weight in weights.items():
        if not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(
                f"the weight of the loss of {entry} must be a finite number of at least 0, got {weight!r}."
            )
    return [entry for entry, weight in weights.items() if weight > 0]


def atlas_to_subject(num_subjects: int, atlas: int) -> list[tuple[int, int]]:
    """(moving, fixed) index pairs of the atlas, by its index, with every other subject; the atlas moves."""
    if not 0 <= atlas < num_subjects:
        raise ValueError(f"atlas must be an index below {num_subjects}, got {atlas}.")
    return [(atlas, subject) for subject in range(num_subjects) if subject != atlas]


def subject_to_atlas(num_subjects: int, atlas: int) -> list[tuple[int, int]]:
    """(moving, fixed) index pairs of every other subject with the atlas, by its index; the atlas is fixed."""
    return [(subject, atlas) for atlas, subject in atlas_to_subject(num_subjects, atlas)]


def read_pairs_csv(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Pairs in a CSV file, with its subjects.

    Args:
        path: the file, with a header line and the columns ``moving`` and ``fixed``, and perhaps ``moving_label`` and
            ``fixed_label``: paths relative to the file. A ``.pkl`` file has its label map inside. An empty label is no
            label.

    Returns:
        ``data``, the subjects by first appearance, and ``pairs``, their (moving, fixed) index pairs.

    Raises:
        FileNotFoundError: When the file, or one that it lists, does not exist.
        ValueError: When it is not such a file, has no pairs, or gives one image two different labels.
    """
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise FileNotFoundError(f"no file of pairs at '{path}'.")
    try:
        # with or without the mark that spreadsheets put at the start
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' is not a CSV file in UTF-8 ({error}).") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if not {"moving", "fixed"} <= set(header) or len(set(header)) != len(header) or set(header) - set(CSV_COLUMNS):
        raise ValueError(
            f"'{path}' must begin with a line of the columns moving,fixed and perhaps moving_label,fixed_label, got "
            f"{','.join(header)!r}."
        )
    subjects: dict[str, dict[str, str]] = {}
    order: dict[str, int] = {}
    pairs = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(value.strip() for value in row):
            continue
        where = f"'{path}' line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where} must have {len(header)} values, got {len(row)}.")
        values = {name: value.strip() for name, value in zip(header, row)}
        pair = []
        for role in ("moving", "fixed"):
            label = values.get(f"{role}_label") or None
            subject = _named_subject(values[role], label, path.parent, f"{where}: {role}", subjects)
            known = subjects.setdefault(subject["image"], subject)
            if len({s["label"] for s in (known, subject) if "label" in s}) > 1:
                raise ValueError(f"{where} gives '{subject['image']}' another label than a line before.")
            known.update(subject)
            pair.append(order.setdefault(subject["image"], len(order)))
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise ValueError(f"'{path}' lists no pairs.")
    return {"data": list(subjects.values()), "pairs": pairs}


def _named_subject(
    image: str, label: str | None, root: Path, where: str, known: Mapping[str, dict[str, str]] | None = None
) -> dict[str, str]:
    """A subject that is given by paths, with the label map inside a pickle file where there is one."""
    if not image:
        raise ValueError(f"{where} is empty.")
    subject = _subject({"image": image} | ({} if label is None else {"label": label}), root, where)
    path = subject["image"]
    if label is None and known is not None and path in known:
        return known[path]
    if label is None and Path(path).suffix.lower() in PICKLE_SUFFIXES and len(read_pickled_arrays(path)) > 1:
        subject["label"] = path
    return subject


def _atlas(dataset_dir: str | os.PathLike[str], atlas: Any) -> dict[str, str]:
    """The atlas that the user or else the dataset names."""
    if isinstance(atlas, Mapping):
        return _subject(atlas, Path.cwd(), "atlas")
    root, content = _read_json(dataset_dir)
    # what the lists know of it, such as its label map
    known = {subject["image"]: subject for name in SUBJECT_LISTS for subject in _section(content, root, name)}
    if atlas is not None:
        subject = _named_subject(str(atlas), None, Path.cwd(), "atlas")
        return known.get(subject["image"], {}) | subject
    if content.get("atlas") is None:
        raise ValueError(
            f"'{root}' names no atlas: give one, list it in dataset.json under 'atlas', or put a file atlas.pkl there."
        )
    subject = _subject(content["atlas"], root, f"{root / 'dataset.json'}: atlas")
    return known.get(subject["image"], {}) | subject


def _listed(
    dataset_dir: str | os.PathLike[str], subjects: Sequence[Mapping[str, str]], section: str
) -> list[tuple[int, int]] | None:
    """The pairs that a dataset lists for a section; in training, only those of which neither subject is held out."""
    if section != "training":
        return load_pairs(dataset_dir, subjects, PAIR_LISTS[section])
    root, content = _read_json(dataset_dir)
    index = {subject["image"]: i for i, subject in enumerate(subjects)}
    found = [(m["image"], f["image"]) for m, f in _pair_section(content, root, PAIR_LISTS[section])]
    return [(index[m], index[f]) for m, f in found if m in index and f in index] or None


def make_pairs(
    dataset_dir: str | os.PathLike[str] | None,
    section: str = "training",
    strategy: str = "auto",
    atlas: str | os.PathLike[str] | Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    What is trained on, or evaluated on: the subjects of a dataset and which of them are registered to which.

    Args:
        dataset_dir: folder or file as for :py:func:`load_subjects`; not needed for a CSV file.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        strategy: one of

            - ``"auto"``: in validation and test the pairs that the dataset lists, where it does, or else, and in
              training, all ordered pairs;
            - ``"all"``: all ordered pairs;
            - ``"listed"``: the pairs that the dataset lists, ``training_paired_images``, ``registration_val`` or
              ``registration_test``;
            - ``"atlas_to_subject"``: the atlas is moving, each of the other subjects fixed;
            - ``"subject_to_atlas"``: the other way round;
            - the path of a CSV file, see :py:func:`read_pairs_csv`, whatever the section. Labels that it does not name
              are those that the dataset lists for an image.
        atlas: path of the atlas, or its paths ``image`` and ``label``. Defaults to the subject under the key ``atlas``
            of ``dataset.json``, or to ``atlas.pkl`` in a folder of pickled subjects. It comes last in the subjects
            where it is not one of them.

    Returns:
        ``data``, the subjects, and ``pairs``, their (moving, fixed) index pairs or None for all ordered pairs, as
        :py:class:`PairDataset` takes them.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When the strategy is none of these, an atlas is wanted and there is none, or given and not wanted,
            or the dataset lists no pairs.
    """
    if section not in PAIR_LISTS:
        raise ValueError(f"section must be one of {tuple(PAIR_LISTS)}, got '{section}'.")
    strategy = str(strategy)
    table = strategy.lower().endswith(".csv")
    if not table and strategy not in STRATEGIES:
        raise ValueError(f"pairs must be one of {STRATEGIES} or the path of a .csv file, got '{strategy}'.")
    if atlas is not None and (table or "atlas" not in strategy):
        raise ValueError(
            f"an atlas is used with the pairs 'atlas_to_subject' and 'subject_to_atlas', got '{strategy}'."
        )
    if table:
        request = read_pairs_csv(strategy)
        if dataset_dir is not None:
            # what the dataset knows of the subjects, such as their label maps
            root, content = _read_json(dataset_dir)
            known = {subject["image"]: subject for name in SUBJECT_LISTS for subject in _section(content, root, name)}
            request["data"] = [known.get(subject["image"], {}) | subject for subject in request["data"]]
        return request
    if dataset_dir is None:
        raise ValueError(f"the pairs '{strategy}' need a dataset_dir.")
    subjects = load_subjects(dataset_dir, section)
    if "atlas" in strategy:
        subject = _atlas(dataset_dir, atlas)
        images = [s["image"] for s in subjects]
        if subject["image"] not in images:
            images.append(subject["image"])
            subjects.append(subject)
        function = atlas_to_subject if strategy == "atlas_to_subject" else subject_to_atlas
        pairs = function(len(subjects), images.index(subject["image"]))
        if not pairs:
            raise ValueError(f"'{dataset_dir}' has no subject for {section} beside the atlas.")
        return {"data": subjects, "pairs": pairs}
    every = strategy == "all" or (section, strategy) == ("training", "auto")
    listed = None if every else _listed(dataset_dir, subjects, section)
    if listed is None and strategy == "listed":
        raise ValueError(f"'{dataset_dir}' has no list '{PAIR_LISTS[section]}' of pairs for {section}.")
    if listed is None and len(subjects) < 2:
        raise ValueError(f"'{dataset_dir}' has 1 subject for {section}; at least 2 are needed to form a pair.")
    return {"data": subjects, "pairs": listed}
