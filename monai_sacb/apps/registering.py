# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``register``: one pair of files, or a list of them."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_sacb.apps.pair_reading import PairFiles
from monai_sacb.apps.planning import plan_registration
from monai_sacb.apps.registration import (
    RegistrationOptions,
    RegistrationResult,
    Setting,
    register_files,
    request_digest,
)
from monai_sacb.utils import WorkClaims, replacing, sentence, subject_names

__all__ = ["PairsResult", "register"]

logger = logging.getLogger(__name__)

PAIRS_TABLE = "pairs.csv"
PAIRS_LOCK = ".pairs.lock"
COLUMNS = tuple(PairFiles.__dataclass_fields__)
# of the table of many pairs
TABLE = ("output", "verdict", "similarity_before", "similarity_after", "dice_before", "dice_after", "folds_percent")


class PairsResult(list[dict[str, Any]]):
    """A row for each pair of a list, with its ``verdict``, or ``error`` and a ``message``."""

    def table(self) -> str:
        """The rows as lines of text."""
        cells = [list(TABLE)]
        for row in self:
            values = [row.get(name) for name in TABLE]
            cells.append([f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values])
        widths = [max(len(line[i]) for line in cells) for i in range(len(TABLE))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
        return "\n".join(
            line + (f"  {row['message']}" if row.get("message") else "") for line, row in zip(lines, [{}, *self])
        )

    @property
    def verdict(self) -> str:
        """The worst of all: ``error``, ``failed``, ``check`` or ``good``."""
        verdicts = {row["verdict"] for row in self}
        return next((v for v in ("error", "failed", "check") if v in verdicts), "good")


def _read_pairs(path: str) -> list[tuple[str, PairFiles]]:
    """Names and files of the pairs of a CSV file; paths relative to it."""
    root = Path(path).parent
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True) if line]
        header, rows = (lines[0], lines[1:]) if lines else ([], [])
        wrong = [number for number, row in enumerate(rows, start=1) if len(row) != len(header)]
        if wrong:
            raise ValueError(f"pair {wrong[0]} has {len(rows[wrong[0] - 1])} columns instead of {len(header)}")
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"cannot read pairs '{path}': {reason}.") from error
    unknown = [name for name in header if name not in (*COLUMNS, "output")]
    missing = [name for name in ("fixed", "moving") if name not in header]
    if missing or unknown:
        known = ", ".join((*COLUMNS, "output"))
        raise ValueError(
            f"pairs '{path}' must have the columns fixed and moving, and perhaps others of {known}; got {header}."
        )
    if not rows:
        raise ValueError(f"pairs '{path}' lists no pair.")
    result: list[tuple[str, PairFiles]] = []
    for number, values in enumerate(rows, start=1):
        row = dict(zip(header, values))
        paths = {key: str(root / os.path.expanduser(row[key])) for key in COLUMNS if row.get(key)}
        if "fixed" not in paths or "moving" not in paths:
            raise ValueError(f"pairs '{path}': pair {number} lacks its fixed or moving image.")
        default = "_to_".join(subject_names([paths[role]])[0] for role in ("moving", "fixed"))
        name = row.get("output") or default
        if Path(name).is_absolute() or ".." in Path(name).parts or Path(name) == Path("."):
            raise ValueError(f"pairs '{path}': output '{name}' of pair {number} leads out of the output folder.")
        result.append((str(Path(name)), PairFiles(**paths)))
    names = [name for name, _ in result]
    if PAIRS_TABLE in names:
        raise ValueError(f"pairs '{path}': no output can be called {PAIRS_TABLE}, which is the table of all pairs.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"pairs '{path}' has several pairs with the output '{repeated[0]}'; give a column 'output'.")
    return result


def _row(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    dice = metrics.get("dice", {})
    return {
        "output": name,
        "verdict": metrics["verdict"],
        "similarity_before": metrics["similarity"]["before"],
        "similarity_after": metrics["similarity"]["after"],
        "dice_before": dice.get("before", {}).get("mean"),
        "dice_after": dice.get("after", {}).get("mean"),
        "folds_percent": metrics["folds_percent"],
        "message": " ".join(metrics["reasons"]) if metrics["verdict"] != "good" else "",
    }


def _done_row(
    name: str, files: PairFiles, folder: Path, options: RegistrationOptions, setting: Setting
) -> dict[str, Any] | None:
    """The row of a pair whose results are there, whole, and of the same files and options; None if they are not."""
    try:
        sidecar, metrics = (
            json.loads((folder / file).read_text(encoding="utf-8")) for file in ("transform.json", "metrics.json")
        )
        whole = all((folder / file).is_file() for file in sidecar["files"].values())
        if whole and sidecar["request_sha256"] == request_digest(files, options, setting):
            return _row(name, metrics)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # none, or of something else
        pass
    return None


def _registered_row(
    name: str, files: PairFiles, folder: Path, options: RegistrationOptions, setting: Setting
) -> dict[str, Any]:
    try:
        return _row(name, register_files(files, folder, options, setting).metrics)
    except Exception as error:
        # whatever it is: the others do not depend on this one
        message = sentence(error)
        expected = isinstance(error, (ValueError, OSError, RuntimeError, MemoryError))
        logger.error(f"{name}: {message}", exc_info=not expected)
        return {"output": name, "verdict": "error", "message": message}


def _remove_remains(folder: Path) -> None:
    """Temporary folders of a process that was killed while it had this pair."""
    name = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}")
    for parent in (folder.parent, folder):
        for path in parent.iterdir() if parent.is_dir() else ():
            if name.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _register_pairs(
    pairs: Sequence[tuple[str, PairFiles]], output_dir: str, options: RegistrationOptions, resume: bool
) -> PairsResult:
    setting, root = Setting(options), Path(output_dir)
    found: dict[str, dict[str, Any]] = {}
    try:
        if not resume:
            for name, files in pairs:
                found[name] = _registered_row(name, files, root / name, options, setting)
            return PairsResult(found.values())
        claims = WorkClaims(root / PAIRS_LOCK)
        # what others have in hand comes last: they may not live to finish it
        for wait in (False, True):
            for name, files in pairs:
                if name in found:
                    continue
                with claims.claim(name, wait) as ours:
                    if ours:
                        row = _done_row(name, files, root / name, options, setting)
                        if row is None:
                            _remove_remains(root / name)
                            row = _registered_row(name, files, root / name, options, setting)
                        found[name] = row
        return PairsResult(found[name] for name, _ in pairs)
    finally:
        # of those that are done, also when it was interrupted
        if found:
            with replacing(Path(output_dir) / PAIRS_TABLE) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, [*TABLE, "message"])
                writer.writeheader()
                writer.writerows(found[name] for name, _ in pairs if name in found)


def _expanded(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.expanduser(os.fspath(path))


def register(
    fixed: str | None = None,
    moving: str | None = None,
    output_dir: str | None = None,
    moving_label: str | None = None,
    fixed_label: str | None = None,
    moving_points: str | None = None,
    fixed_points: str | None = None,
    fixed_mask: str | None = None,
    moving_mask: str | None = None,
    pairs: str | None = None,
    model: str = "none",
    affine: str = "true",
    refine: int | None = None,
    fine: int | None = None,
    fill: float | None = None,
    keep_dtype: bool = False,
    seed: int = 0,
    num_threads: int | None = None,
    device: str | None = None,
    dry_run: bool = False,
    resume: bool = False,
) -> RegistrationResult | PairsResult | dict[str, Any]:
    """
    Register two images as they come: find where each place of the fixed image lies in the moving image.

    Any size, spacing and orientation; NIfTI, NRRD, MetaImage or a folder of a DICOM series. An affine stage, then a
    network, then gradient descent on the field itself. Everything is written at the grid of the fixed image's file,
    sampled once from the moving image's file.

    Args:
        fixed: the image that stays; results lie on its grid.
        moving: the image that is moved.
        output_dir: folder for the results; files of an earlier registration in it are replaced.
        moving_label: label map of the moving image, to be carried along.
        fixed_label: label map of the fixed image, to compare with.
        moving_points: landmarks of the moving image (.csv in millimetres, .fcsv or .mrk.json of 3D Slicer), to be
            carried along.
        fixed_points: their partners in the fixed image, in the same order, to compare with.
        fixed_mask: where the fixed image is compared, not zero.
        moving_mask: where the moving image is compared, not zero.
        pairs: a CSV file with the columns fixed and moving and perhaps those of the files above, instead of one pair;
            paths relative to it. A column output names folders within output_dir. A pair that cannot be registered does
            not end the others.
        model: name of a model that came along, file of weights, folder of a bundle, or none.
        affine: true to estimate it, false where the images are aligned by their headers, or the file of a transform.
        refine: steps of gradient descent on the field; by default 150 without a network, and after one 50 or what the
            card of the model says.
        fine: further steps on a finer grid, of the images' own voxels or 8 million in all, where they have more to show
            than the grid before; 20 by default, and none where refine is 0.
        fill: value outside the moving image; by default 0, or the smallest value of a CT.
        keep_dtype: write images in the type of their files, not as float32.
        seed: of the affine stage's samples.
        num_threads: threads to use.
        device: such as cpu or cuda:0; the first GPU by default, if there is one.
        dry_run: check the files and say what would be done, in what time and memory; write nothing.
        resume: of a list of pairs, register those that have no results yet of the same files and options. Several
            processes may be started on one list and one output_dir: each takes what no other has in hand.

    Returns:
        the result of the pair; a row for each pair of a list; or the plan.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a file or an option cannot be used; the message says why.
    """
    own = [
        _expanded(path)
        for path in (fixed, moving, moving_label, fixed_label, moving_points, fixed_points, fixed_mask, moving_mask)
    ]
    pairs, output_dir = _expanded(pairs), _expanded(output_dir)
    options = RegistrationOptions(
        os.path.expanduser(str(model)),
        os.path.expanduser(str(affine)),
        refine,
        fine,
        fill,
        keep_dtype,
        seed,
        num_threads,
        device,
    )
    if output_dir is None or not output_dir.strip():
        raise ValueError("register needs output_dir, the folder for the results.")
    if pairs is not None:
        if any(path is not None for path in own):
            raise ValueError("give either pairs or the files of one pair, not both.")
        if Path(pairs).resolve() == (Path(output_dir) / PAIRS_TABLE).resolve():
            raise ValueError(f"pairs '{pairs}' would be replaced by the table of results; move it out of output_dir.")
        listed = _read_pairs(pairs)
        if dry_run:
            setting = Setting(options)
            return {name: plan_registration(files, Path(output_dir) / name, options, setting) for name, files in listed}
        return _register_pairs(listed, output_dir, options, resume)
    if resume:
        raise ValueError("resume goes with a list of pairs.")
    if own[0] is None or own[1] is None:
        raise ValueError("register needs a fixed and a moving image, or pairs.")
    files = PairFiles(own[0], own[1], *own[2:])
    if dry_run:
        return plan_registration(files, output_dir, options, Setting(options))
    return register_files(files, output_dir, options)
