# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Files of points: CSV, and 3D Slicer's ``.fcsv`` and ``.mrk.json``.

Inside, points are RAS millimetres; what frame a file is in, it says itself, and is written in the same again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from monai_sacb.data.slicer_markups import MarkupsSource, new_markups, parse_markups
from monai_sacb.data.spatial_mapping import Grid, apply_affine
from monai_sacb.utils import first_line, replacing

__all__ = ["POINT_SUFFIXES", "PointSet", "PointTable", "read_point_set", "read_point_table", "write_point_set"]

POINT_SUFFIXES = (".csv", ".fcsv", ".mrk.json")
# no file of points comes near it, and what is no file of points must not fill the memory
MAX_BYTES = 1 << 26
FCSV_COLUMNS = ["id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "associatedNodeID"]
# how .fcsv files have named the frames over time
FCSV_FRAMES = {"0": "ras", "RAS": "ras", "1": "lps", "LPS": "lps"}


@dataclass(frozen=True)
class PointTable:
    """
    Lines of a CSV or ``.fcsv`` file, with what is known about them.

    Args:
        lines: all of them, as they were.
        rows: of each point, the index of its line, and its fields.
        columns: which fields are the coordinates.
        label_column: which is the label, if any.
        frame: ``"ras"`` or ``"lps"``, millimetres; None for voxels.
        separator: between the fields, a comma or a blank.
    """

    lines: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    columns: tuple[int, ...]
    label_column: int | None
    frame: str | None
    separator: str

    @property
    def labels(self) -> tuple[str, ...]:
        column = self.label_column
        return tuple("" if column is None else fields[column] for _, fields in self.rows)

    def render(self, positions: Sequence[Sequence[float]]) -> str:
        """The text of the file with other coordinates, which are in its own frame."""
        lines = list(self.lines)
        for (index, old), position in zip(self.rows, positions):
            fields = list(old)
            for column, value in zip(self.columns, position):
                fields[column] = repr(float(value))
            lines[index] = _csv_line(fields) if self.separator == "," else " ".join(fields)
        return "\n".join(lines) + ("\n" if lines[-1] else "")


@dataclass(frozen=True)
class PointSet:
    """
    Points with their names, and the file that they came from.

    Args:
        positions: ``(N, 3)``, RAS millimetres; kept as float64.
        labels: a name for each, possibly empty; all empty if None.
        source: the rest of the file, in which points that were moved are written again.
        suffix: of that file, one of ``POINT_SUFFIXES``.

    Raises:
        ValueError: When positions have another shape or are not finite, or labels are not as many.
    """

    positions: torch.Tensor
    labels: tuple[str, ...] | None = None
    source: PointTable | MarkupsSource | None = None
    suffix: str = ".csv"

    def __post_init__(self) -> None:
        positions = torch.as_tensor(self.positions).detach().cpu().double()
        if positions.dim() != 2 or positions.shape[1] != 3:
            raise ValueError(f"positions must have shape (N, 3), got {list(positions.shape)}.")
        bad = int((~torch.isfinite(positions)).sum())
        if bad:
            raise ValueError(f"positions must be finite, got {bad} NaN or infinite values.")
        labels = ("",) * len(positions) if self.labels is None else tuple(self.labels)
        if len(labels) != len(positions):
            raise ValueError(f"there must be one label for each of {len(positions)} points, got {len(labels)}.")
        if self.suffix not in POINT_SUFFIXES:
            raise ValueError(f"suffix must be one of {POINT_SUFFIXES}, got '{self.suffix}'.")
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.positions)

    def moved(self, positions: torch.Tensor) -> PointSet:
        """The same points at other places ``(N, 3)``, RAS millimetres."""
        if tuple(positions.shape) != tuple(self.positions.shape):
            raise ValueError(f"positions must have shape {list(self.positions.shape)}, got {list(positions.shape)}.")
        return replace(self, positions=positions)


# ---- text ----


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    # what spreadsheets write may start with a byte order mark
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _fields(line: str) -> list[str]:
    # early editions of Learn2Reg separate the numbers by blanks
    if "," not in line:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]


def _csv_line(fields: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(fields)
    return buffer.getvalue()


def _frame(words: str) -> str | None:
    """The frame that a comment or a header names, LPS or RAS."""
    found = set(re.findall(r"(?<![a-z])(lps|ras)(?![a-z])", words.lower()))
    if len(found) > 1:
        raise ValueError("it names both LPS and RAS")
    return found.pop() if found else None


def _content(lines: Sequence[str]) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Lines with fields, each with its index, and the comments."""
    stripped = [line.strip() for line in lines]
    rows = [(i, _fields(line)) for i, line in enumerate(stripped) if line and not line.startswith("#")]
    if not rows:
        raise ValueError("it holds no points")
    return rows, [line for line in stripped if line.startswith("#")]


def _numbers(rows: Sequence[tuple[int, list[str]]], columns: Sequence[int]) -> list[list[float]]:
    result = []
    for index, row in rows:
        try:
            values = [float(row[column]) for column in columns]
        except ValueError as error:
            raise ValueError(f"line {index + 1} is not numeric: {_excerpt(row)}") from error
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"line {index + 1} has a value that is not finite: {_excerpt(row)}")
        result.append(values)
    return result


def _excerpt(row: Sequence[str]) -> str:
    text = ",".join(row)
    return repr(text if len(text) <= 100 else text[:100] + "...")


def _is_numeric(row: Sequence[str]) -> bool:
    try:
        [float(field) for field in row]
    except ValueError:
        return False
    return True


def _check_width(rows: Sequence[tuple[int, list[str]]], width: int) -> None:
    for index, row in rows:
        if len(row) != width:
            raise ValueError(f"line {index + 1} has {len(row)} columns instead of {width}")


def _parse_csv(lines: Sequence[str], spatial_dims: int) -> tuple[PointTable, list[list[float]]]:
    rows, comments = _content(lines)
    frame = _frame(" ".join(comments))
    first = rows[0][1]
    label: int | None = None
    columns = list(range(spatial_dims))
    if _is_numeric(first):
        if frame is not None:
            raise ValueError(f"a comment says {frame.upper()}, but voxels are meant where there is no header 'x,y,z'")
        _check_width(rows, spatial_dims)
    else:
        names = [re.sub(r"[\s_(-]*(lps|ras)[\s)]*$", "", name.lower()) for name in first]
        axes = "xyz"[:spatial_dims]
        if any(names.count(axis) != 1 for axis in axes) or (spatial_dims == 2 and "z" in names):
            raise ValueError(
                f"it has neither columns of numbers only nor a header {','.join(axes)!r}: {_excerpt(first)}"
            )
        if len(rows) == 1:
            raise ValueError("it holds no points")
        frame = _frame(" ".join([frame or "", *first])) or "ras"
        columns = [names.index(axis) for axis in axes]
        label = next((names.index(name) for name in ("label", "name") if name in names), None)
        rows = rows[1:]
        _check_width(rows, len(names))
    separator = "," if any("," in lines[index] for index, _ in rows) else " "
    table = PointTable(tuple(lines), tuple((i, tuple(row)) for i, row in rows), tuple(columns), label, frame, separator)
    return table, _numbers(rows, columns)


def _parse_fcsv(lines: Sequence[str]) -> tuple[PointTable, list[list[float]]]:
    header = {"coordinatesystem": "", "columns": ""}
    for line in lines:
        found = re.match(r"\s*#\s*(CoordinateSystem|columns)\s*=\s*(.*?)\s*$", line, re.IGNORECASE)
        if found:
            header[found[1].lower()] = found[2]
    frame = FCSV_FRAMES.get(header["coordinatesystem"].upper())
    if frame is None:
        raise ValueError(
            f"its coordinate system is '{header['coordinatesystem']}' instead of one that a line "
            "'# CoordinateSystem = LPS' (or RAS, 0, 1) names"
        )
    names = [name.strip().lower() for name in header["columns"].split(",")]
    if any(names.count(axis) != 1 for axis in "xyz"):
        raise ValueError(f"it has no line '# columns = ' with x, y and z: '{header['columns'][:100]}'")
    rows, _ = _content(lines)
    columns = [names.index(axis) for axis in "xyz"]
    label = names.index("label") if "label" in names else None
    # newer versions of 3D Slicer write more fields than they name
    least = max(*columns, label or 0) + 1
    for index, row in rows:
        if len(row) < least:
            raise ValueError(f"line {index + 1} has {len(row)} columns instead of {least} or more")
    table = PointTable(tuple(lines), tuple((i, tuple(row)) for i, row in rows), tuple(columns), label, frame, ",")
    return table, _numbers(rows, columns)


def _read_failure(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return first_line(error)


# ---- files ----


def read_point_table(path: str | os.PathLike[str], spatial_dims: int = 3) -> tuple[torch.Tensor, PointTable]:
    """
    Read a CSV file of points, with or without a header.

    - Without a header, as Learn2Reg has them: as many numbers in a line as there are dimensions, in voxels of the array
      in the file of the image that they belong to.
    - With a header ``x,y,z`` (``x,y`` in 2-D), and possibly other columns such as ``label``: RAS millimetres, or LPS
      where a comment line (``# LPS``) or the header (``x_lps,y_lps,z_lps``) says so.

    Args:
        path: the file.
        spatial_dims: 2 or 3.

    Returns:
        the points ``(N, d)``, float64, in the frame of the file, and all else in it.

    Raises:
        ValueError: When the file cannot be read or is of neither kind.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    try:
        table, numbers = _parse_csv(_read_lines(path), spatial_dims)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"cannot read points '{path}': {_read_failure(error)}.") from error
    return torch.tensor(numbers, dtype=torch.float64), table


def read_point_set(path: str | os.PathLike[str], grid: Grid | None = None) -> PointSet:
    """
    Read points from a CSV file, or one of 3D Slicer (``.fcsv``, ``.mrk.json``).

    Args:
        path: the file. In a CSV file, columns ``x,y,z[,label]`` are RAS millimetres unless a column or a comment says
            LPS. Control points that 3D Slicer has not placed are passed over.
        grid: of the image that the points belong to, for CSV files without a header, which are in its voxels.

    Returns:
        the points, RAS millimetres.

    Raises:
        ValueError: When the file cannot be read, is none of these, or is in voxels of no known grid.
    """
    name = Path(path).name.lower()
    if not name.endswith(POINT_SUFFIXES):
        raise ValueError(f"cannot read points '{path}': its name does not end in {', '.join(POINT_SUFFIXES)}.")
    source: PointTable | MarkupsSource
    if name.endswith(".csv"):
        points, source = read_point_table(path)
        if source.frame is None:
            if grid is None:
                raise ValueError(
                    f"cannot read points '{path}': it has no header 'x,y,z', so it is in voxels instead of millimetres."
                )
            # moved, they are in no voxels of that grid any more: written, they get a header
            return PointSet(apply_affine(grid.affine, points))
        return PointSet(points * _signs(source.frame), source.labels, source, ".csv")
    try:
        lines = _read_lines(path)
        if name.endswith(".fcsv"):
            source, numbers = _parse_fcsv(lines)
            points = torch.tensor(numbers, dtype=torch.float64) * _signs(source.frame)
            return PointSet(points, source.labels, source, ".fcsv")
        numbers, labels, source = parse_markups("\n".join(lines))
        return PointSet(torch.tensor(numbers, dtype=torch.float64), tuple(labels), source, ".mrk.json")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read points '{path}': {_read_failure(error)}.") from error


def write_point_set(points: PointSet, path: str | os.PathLike[str]) -> None:
    """
    Write points in the form that the name asks for.

    Args:
        points: RAS millimetres. If they came from a file of the same form, all else in it is kept, its frame too;
            otherwise CSV files are RAS (which their columns mean), those of 3D Slicer LPS (which they say).
        path: the file, ``.csv``, ``.fcsv`` or ``.mrk.json``; written to a temporary name and renamed.

    Raises:
        ValueError: When the name ends otherwise.
    """
    name = Path(path).name.lower()
    suffix = next((suffix for suffix in POINT_SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"a file of points must end in {', '.join(POINT_SUFFIXES)}, got '{Path(path).name}'.")
    source = points.source if points.suffix == suffix else None
    if isinstance(source, PointTable):
        # adding 0 makes -0 a plain 0
        text = source.render((points.positions * _signs(source.frame) + 0.0).tolist())
    elif isinstance(source, MarkupsSource):
        text = source.render(points.positions.tolist())
    else:
        text = _new_file(points, suffix)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _signs(frame: str | None) -> torch.Tensor:
    return torch.tensor([-1.0, -1.0, 1.0] if frame == "lps" else [1.0, 1.0, 1.0], dtype=torch.float64)


def _new_file(points: PointSet, suffix: str) -> str:
    labels = [" ".join(label.split()) for label in points.labels or ()]
    if suffix == ".mrk.json":
        return json.dumps(new_markups(points.positions.tolist(), labels), indent=4, ensure_ascii=False) + "\n"
    if suffix == ".csv":
        named = any(labels)
        lines = ["x,y,z,label" if named else "x,y,z"]
        for position, label in zip(points.positions.tolist(), labels):
            lines.append(_csv_line([*(repr(value + 0.0) for value in position), *([label] if named else [])]))
        return "\n".join([*lines, ""])
    lines = [
        "# Markups fiducial file version = 5.6",
        "# CoordinateSystem = LPS",
        f"# columns = {','.join(FCSV_COLUMNS)}",
    ]
    for number, (position, label) in enumerate(zip((points.positions * _signs("lps") + 0.0).tolist(), labels), start=1):
        place = [repr(value) for value in position]
        lines.append(_csv_line([str(number), *place, "0", "0", "0", "1", "1", "1", "0", label, "", ""]))
    return "\n".join([*lines, ""])
