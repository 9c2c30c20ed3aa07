# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ignite.engine import Events
from torch.utils.data import Dataset, Subset

from monai.engines import Workflow
from monai.utils import optional_import

from monai_sacb.handlers.pair_metric import pair_items
from monai_sacb.utils import from_writer, is_writer, pair_names, process_rank, world_size

__all__ = ["PairJournal"]

# not on Windows, where nothing is locked
fcntl, has_fcntl = optional_import("fcntl")

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
    evaluation writes to the file, another process is refused. Processes that share the pairs have a file each, with
    their rank in its name, and go on with what is in all of the files, however many there were before.

    Attached to an engine, it notes which pairs are done, without values.

    Args:
        path: the file, of the first process. It is removed when the evaluation has been reported.
        settings: whatever decides the results, by name, such as the weights and the data; anything that JSON can hold.
        resume: whether to go on with what the file holds; if not, it begins anew.

    Raises:
        ValueError: When the file to go on with is not a journal, or one of other settings, or another process writes to
            it.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        main = Path(path)
        rank = process_rank()
        self.path = main if rank == 0 else main.with_name(f"{main.stem}.{rank}{main.suffix}")
        self._main = main
        # as JSON gives it back
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))
        self._rows: dict[int, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if resume and is_writer():
            for file in (main, *self._others().values()):
                if file.is_file():
                    self._rows.update(self._read(file))
        if resume:
            # all divide the same rest
            self._rows = from_writer(self._rows)

    def _others(self) -> dict[int, Path]:
        """The files of other ranks, perhaps of an earlier run with more of them."""
        files = self._main.parent.glob(f"{glob.escape(self._main.stem)}.*{self._main.suffix}")
        ranks = {file.name.removesuffix(self._main.suffix)[len(self._main.stem) + 1 :]: file for file in files}
        return {int(rank): file for rank, file in sorted(ranks.items()) if rank.isdigit()}

    def attach(self, engine: Workflow) -> None:
        """Note every pair when it is done."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Workflow) -> None:
        self.begin()

    def _iteration_completed(self, engine: Workflow) -> None:
        rows = []
        for item in pair_items(engine):
            moving, fixed = pair_names(item)
            rows.append({"pair": int(item["pair_index"]), "moving": moving, "fixed": fixed, "values": {}})
        self.append(rows)

    def _completed(self, engine: Workflow) -> None:
        self.close()

    def _read(self, path: Path) -> dict[int, dict[str, Any]]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            header = dict(json.loads(lines[0])["settings"])
            whole = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
            rows = {int(line["pair"]): line for line in whole}
            for row in rows.values():
                row["moving"], row["fixed"] = str(row["moving"]), str(row["fixed"])
                row["values"] = {name: [_decoded(v) for v in column] for name, column in row["values"].items()}
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"'{path}' is not the journal of an evaluation; remove it to begin anew.") from error
        names = {**header, **self.settings}
        # the journal's own names may be anything
        differing = [n if n.isprintable() else repr(n) for n in names if header.get(n) != self.settings.get(n)]
        if differing and path != self._main:
            # left over from before the first process began anew
            return {}
        if differing:
            raise ValueError(
                f"'{path}' was written with other settings ({', '.join(differing)}); begin without resume, or "
                "into another folder."
            )
        return rows

    def _lock(self, file: IO[str]) -> None:
        if not has_fcntl:
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
        if is_writer():
            for rank, other in self._others().items():
                if rank >= world_size():
                    # what it held is in this one
                    other.unlink(missing_ok=True)

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
        if is_writer():
            for file in self._others().values():
                file.unlink(missing_ok=True)
        self.close()

    def remaining(self, dataset: Dataset, at_least_one: bool = True) -> Dataset:
        """
        The pairs of a dataset that have not been measured.

        Args:
            dataset: the pairs; the items carry their index under ``pair_index``, as those of
                :py:class:`monai_sacb.data.PairDataset`.
            at_least_one: measure the last one once more where all have been, since an engine needs one.

        Returns:
            the dataset itself, or a part of it.
        """
        number = len(dataset)  # type: ignore[arg-type]
        left = [index for index in range(number) if index not in self._rows]
        return dataset if len(left) == number else Subset(dataset, left or [number - 1] * at_least_one)
