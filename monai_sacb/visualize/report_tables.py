# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of the registration report in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from monai_sacb.data.spatial_mapping import Grid
from monai_sacb.visualize.report_source import ReportSource

__all__ = ["KeyNumber", "NumberTable", "describe_affine", "headline", "provenance", "tables"]

# smaller numbers are rounding
LEAST = 0.001
# an en dash where there is no number, and the sign between sizes
NOTHING, TIMES = "\N{EN DASH}", " \N{MULTIPLICATION SIGN} "


class KeyNumber(NamedTuple):
    """A number at the top of the page."""

    name: str
    value: str
    text: str
    mark: str


class NumberTable(NamedTuple):
    """A table of numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]


def number(value: Any, digits: int = 3) -> str:
    """A number in words, whatever it is."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value) or isinstance(value, int):
        return str(value)
    if 0 < value < LEAST:
        return f"below {LEAST:g}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def _part(metrics: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = metrics.get(key)
    return value if isinstance(value, Mapping) else {}


def _course(values: Sequence[Any], form: str) -> str:
    return " → ".join(
        format(v, form) if isinstance(v, int | float) and not isinstance(v, bool) else NOTHING for v in values
    )


def headline(metrics: Mapping[str, Any], checks: Sequence[Any], folds: int) -> list[KeyNumber]:
    """
    The few numbers that decide.

    Args:
        metrics: content of ``metrics.json``.
        checks: measurements beside their limits.
        folds: number of folded voxels.
    """

    def mark(start: str) -> str:
        marks = [check.mark for check in checks if check.name.startswith(start)]
        return next((m for m in ("failed", "check", "good") if m in marks), "")

    similarity, dice, points = (_part(metrics, key) for key in ("similarity", "dice", "landmarks_mm"))
    numbers = [
        KeyNumber(
            "Similarity",
            _course([similarity.get("before"), similarity.get("after")], ".2f"),
            "before → after, 1 is best",
            mark("Similarity"),
        )
    ]
    if dice:
        means = [_part(dice, key).get("mean") for key in ("before", "after")]
        numbers.append(KeyNumber("Dice of labels", _course(means, ".2f"), "before → after, 1 is best", mark("Dice")))
    if points:
        values = [points.get("before"), points.get("after")]
        numbers.append(
            KeyNumber(
                "Landmarks", _course(values, ".1f") + " mm", "apart, before → after", mark("Distance of the land")
            )
        )
    displacement, inverse = _part(metrics, "displacement_mm"), _part(metrics, "inverse_consistency_mm")
    return [
        *numbers,
        KeyNumber("Folds", f"{number(metrics.get('folds_percent'), 2)} %", f"{folds:,} voxels", mark("Folds")),
        KeyNumber(
            "Displacement",
            f"{number(displacement.get('median'), 2)} mm",
            f"median; largest {number(displacement.get('max'))} mm",
            mark("Displacement"),
        ),
        KeyNumber(
            "There and back",
            f"{number(inverse.get('median'), 2)} mm",
            f"median error; 95 % within {number(inverse.get('p95'), 2)} mm",
            mark("Error of the inverse"),
        ),
        KeyNumber(
            "Overlap",
            f"{number(metrics.get('overlap_percent'))} %",
            "of the fixed body found in the moving image",
            mark("Overlap"),
        ),
    ]


def tables(metrics: Mapping[str, Any]) -> list[NumberTable]:
    """Dice of each structure, landmarks, and all other numbers of ``metrics.json``."""
    result = []
    dice = _part(metrics, "dice")
    stages = [stage for stage in ("before", "affine", "after") if isinstance(dice.get(stage), Mapping)]
    if stages:
        structures = {stage: _part(dice[stage], "structures") for stage in stages}
        names = list(dict.fromkeys(str(name) for stage in stages for name in structures[stage]))
        rows = [["mean", *(_course([dice[stage].get("mean")], ".3f") for stage in stages)]]
        for name in names:
            values = [{str(k): v for k, v in structures[stage].items()}.get(name) for stage in stages]
            rows.append([name, *(_course([value], ".3f") for value in values)])
        result.append(NumberTable("Dice by structure", ["structure", *stages], rows))
    points = _part(metrics, "landmarks_mm")
    if points:
        result.append(
            NumberTable("Landmarks, mm apart", list(map(str, points)), [[number(value) for value in points.values()]])
        )
    units = {
        "displacement_mm": "Displacement after the affine, mm",
        "inverse_consistency_mm": "Error of the inverse, mm",
        "jacobian": "Jacobian determinant",
        "similarity": "Similarity",
        "self_check": "Check by another program",
        "seconds": "Time, s",
        "folds_percent": "Folds, % of the voxels",
        "sdlogj": "Spread of log(3 + Jacobian)",
        "overlap_percent": "Overlap, % of the fixed body",
        "inverse_residual_mm": "Error of the inverse at its voxels, mm",
        "voxel_mm": "Side of a voxel, mm",
        "extent_mm": "Diagonal of the fixed body, mm",
        "peak_memory_mb": "Peak memory, MB",
    }
    rows = []
    for key, value in metrics.items():
        if key in ("verdict", "reasons", "dice", "landmarks_mm", "thresholds"):
            continue
        if isinstance(value, Mapping):
            rows.append([units.get(key, key), ", ".join(f"{name} {number(v)}" for name, v in value.items())])
        else:
            rows.append([units.get(key, key), number(value, 4)])
    result.append(NumberTable("All measurements", ["measurement", "value"], rows))
    return result


def describe_affine(affine: np.ndarray, grid: Grid, voxel: np.ndarray) -> str:
    """The affine stage ``(4, 4)`` in words: how it turns, scales, and moves the middle of the body."""
    left, scales, right = np.linalg.svd(affine[:3, :3])
    rotation = left @ right
    mirrored = np.linalg.det(rotation) < 0
    angle = math.degrees(math.acos(float(np.clip((np.trace(rotation * (-1 if mirrored else 1)) - 1) / 2, -1, 1))))
    middle = (grid.affine.numpy() @ np.append(voxel.astype(float), 1))[:3]
    moved = float(np.linalg.norm(affine[:3, :3] @ middle + affine[:3, 3] - middle))
    words = f"turns by {angle:.1f}°, moves the middle of the body by {moved:.1f} mm, scales by {scales[-1]:.2f} to "
    return words + f"{scales[0]:.2f}" + (", and mirrors" if mirrored else "")


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return TIMES.join(_flat(entry) for entry in value)
    return number(value, 4)


def provenance(source: ReportSource) -> list[tuple[str, str]]:
    """Where the result comes from: files, model, settings, versions and date."""
    transform, rows = source.transform, []
    for role in ("fixed", "moving"):
        entry = transform[role]
        spacing = np.linalg.norm(np.array(entry["affine"], dtype=float)[:3, :3], axis=0).round(3).tolist()
        rows.append((f"{role.capitalize()} image", str(entry["path"])))
        rows.append(("", f"{_flat(entry.get('shape'))} voxels of {_flat(spacing)} mm"))
        if source.descriptions.get(role):
            rows.append(("", f"header: {source.descriptions[role]}"))
    for key, value in transform.items():
        if key in ("fixed", "moving", "affine", "files", "format", "frame", "units", "affine_frame") or value is None:
            continue
        if key in ("working_grid", "fine_grid") and isinstance(value, Mapping):
            value = (
                f"{_flat(value.get('shape'))} voxels of {_flat([round(s, 3) for s in value.get('spacing') or []])} mm"
            )
        rows.append((key.replace("_", " ").capitalize(), _flat(value)))
    if transform.get("model") is None:
        rows.append(("Model", "none"))
    return rows
