# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch.utils.data import Dataset, Subset

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["PairJournal"]

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encoded(value: float) -> float | str:
    # JSON has no word for these
    return value if math.isfinite(value) else str(value)


def _decoded(value: float | str) -> float:
    return NOT_FINITE[value] if isinstance(value, str) else float(value)


class PairJournal:
    """
    What an evaluation has measured so far, a line of a file for each pair, so that it can go on where it was stopped.

    A line is on the disk before the next pair begins. One that was cut off by a kill does not count. While an
    evaluation writes to the file, another process is refused.

    Args:
        path: the file. It is removed when the evaluation has been reported.
        settings: whatever decides the results, by name, such as the weights and the data; anything that JSON can hold.
        resume: whether to go on with what the file holds; if not, it begins anew.

    Raises:
        ValueError: When the file to go on with is not a journal, or one of other settings, or another process writes to
            it.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self.path = Path(path)
        # as JSON gives it back
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        self._rows: dict[int, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if resume and self.path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            header = dict(json.loads(lines[0])["settings"])
            whole = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
            rows = {int(line["pair"]): line for line in whole}
            for row in rows.values():
                row["values"] = {name: [_decoded(v) for v in column] for name, column in row["values"].items()}
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{self.path}' is not the journal of an evaluation; remove it to begin anew.") from error
        differing = [n for n in {**header, **self.settings} if header.get(n) != self.settings.get(n)]
        if differing:
            raise ValueError(
                f"'{self.path}' was written with other settings ({', '.join(differing)}); evaluate without resume, or "
                "into another folder."
            )
        self._rows = rows

    def _lock(self, file: IO[str]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another evaluation is writing to '{self.path}'; use another folder.") from error

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each pair: ``pair`` (its index), ``moving``, ``fixed``, ``values`` (lists, by name)."""
        return [self._rows[pair] for pair in sorted(self._rows)]

    def begin(self) -> None:
        """Write the file with the rows that are to be kept, of earlier runs."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            with open(self.path, "a", encoding="utf-8") as file:
                self._lock(file)
        temporary = self.path.with_name(f".{self.path.name}.part")
        # open, and thereby locked, until the evaluation ends
        self._file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115
        self._lock(self._file)
        lines = [json.dumps({"settings": self.settings}), *map(self._line, self.rows)]
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        temporary.replace(self.path)

    def _line(self, row: Mapping[str, Any]) -> str:
        values = {name: [_encoded(value) for value in column] for name, column in row["values"].items()}
        return json.dumps({**row, "values": values})

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of the pairs that have just been measured; after :py:meth:`begin`."""
        if self._file is None:
            raise ValueError(f"the journal '{self.path}' has not begun.")
        for row in rows:
            self._rows[int(row["pair"])] = dict(row)
            self._file.write(self._line(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Leave the file to others."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file: all has been reported."""
        self._rows = {}
        self.path.unlink(missing_ok=True)
        self.close()

    def remaining(self, dataset: Dataset) -> Dataset:
        """
        The pairs of a dataset that have not been measured.

        Args:
            dataset: the pairs; the items carry their index under ``pair_index``, as those of
                :py:class:`monai_sacb.data.PairDataset`.

        Returns:
            the dataset itself, or a part of it. An engine needs one pair at least: where all have been measured, the
            last one is once more.
        """
        number = len(dataset)  # type: ignore[arg-type]
        left = [index for index in range(number) if index not in self._rows]
        return dataset if len(left) == number else Subset(dataset, left or [number - 1])
