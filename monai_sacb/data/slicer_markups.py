# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The JSON in which 3D Slicer keeps markups (``.mrk.json``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MarkupsSource", "new_markups", "parse_markups"]

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
# what 3D Slicer writes has about six levels
MAX_DEPTH = 50
FRAMES = ("LPS", "RAS")
# their geometry stands beside the control points, and would not move with them
NOT_POINTS = ("ROI", "Plane")
SIGNS = {"LPS": (-1.0, -1.0, 1.0), "RAS": (1.0, 1.0, 1.0)}


@dataclass(frozen=True)
class MarkupsSource:
    """
    A document, and where its points are.

    Args:
        document: the JSON.
        places: of each point, the indices of its list of markups and in that of its control points.
    """

    document: dict[str, Any]
    places: tuple[tuple[int, int], ...]

    def render(self, positions: Sequence[Sequence[float]]) -> str:
        """The document with other places of its points, given in RAS millimetres, each written in its own frame."""
        markups = [dict(markup) for markup in self.document["markups"]]
        for markup in markups:
            markup["controlPoints"] = [dict(point) for point in markup.get("controlPoints", [])]
        for (i, j), position in zip(self.places, positions):
            signs = SIGNS[markups[i]["coordinateSystem"]]
            # adding 0 makes -0 a plain 0
            markups[i]["controlPoints"][j]["position"] = [s * float(x) + 0.0 for s, x in zip(signs, position)]
        return json.dumps({**self.document, "markups": markups}, indent=4, ensure_ascii=False) + "\n"


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _position(value: Any, name: str) -> list[float]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"the position of {name} is not a list of three numbers: {str(value)[:100]}")
    numbers = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise ValueError(f"the position of {name} is not a list of three numbers: {str(value)[:100]}")
        try:
            numbers.append(float(item))
        except OverflowError:
            numbers.append(math.inf)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"the position of {name} is not finite: {numbers!s}")
    return numbers


def _entries(holder: Any, key: str, name: str) -> list[dict[str, Any]]:
    entries = holder.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"'{key}' of {name} is not a list of objects")
    return entries


def parse_markups(text: str) -> tuple[list[list[float]], list[str], MarkupsSource]:
    """
    The points of a document.

    Args:
        text: JSON of one or several lists of markups.

    Returns:
        the places of the control points that are placed, of all lists in order, RAS millimetres; their labels; and the
        document to write them in again.

    Raises:
        ValueError: When it is no such document, or one of other things than points.
        RecursionError: When it is nested beyond Python's limits.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} in line {error.lineno}") from error
    if not isinstance(document, dict) or "markups" not in document:
        raise ValueError("it is JSON, but has no 'markups'")
    _check_depth(document)
    positions: list[list[float]] = []
    labels: list[str] = []
    places: list[tuple[int, int]] = []
    for i, markup in enumerate(_entries(document, "markups", "the file")):
        name = f"markups {i + 1}"
        if markup.get("type") in NOT_POINTS:
            raise ValueError(f"{name} is of type {markup['type']}, which is more than points")
        frame = markup.get("coordinateSystem")
        if not isinstance(frame, str) or frame not in FRAMES:
            raise ValueError(f"the coordinateSystem of {name} must be LPS or RAS, got {str(frame)[:100]!r}")
        units = markup.get("coordinateUnits", "mm")
        if any(unit != "mm" for unit in (units if isinstance(units, list) else [units])):
            raise ValueError(f"the coordinateUnits of {name} must be mm, got {str(units)[:100]!r}")
        for j, point in enumerate(_entries(markup, "controlPoints", name)):
            value = point.get("position")
            # points that were announced, but are nowhere yet
            if value is None or point.get("positionStatus", "defined") != "defined":
                continue
            position = _position(value, f"control point {j + 1} of {name}")
            positions.append([sign * number for sign, number in zip(SIGNS[frame], position)])
            label = point.get("label", "")
            labels.append(label if isinstance(label, str) else "")
            places.append((i, j))
    if not positions:
        raise ValueError("it holds no points")
    return positions, labels, MarkupsSource(document, tuple(places))


def new_markups(positions: Sequence[Sequence[float]], labels: Sequence[str]) -> dict[str, Any]:
    """
    A document of one list of points.

    Args:
        positions: ``(N, 3)``, RAS millimetres; written in LPS, as 3D Slicer does.
        labels: a name for each.
    """
    points = [
        {
            "id": str(number),
            "label": label,
            "position": [-float(position[0]) + 0.0, -float(position[1]) + 0.0, float(position[2]) + 0.0],
            "orientation": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
            "positionStatus": "defined",
        }
        for number, (position, label) in enumerate(zip(positions, labels), start=1)
    ]
    markups = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": points}
    return {"@schema": SCHEMA, "markups": [markups]}
