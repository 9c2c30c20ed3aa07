# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.handlers.pair_journal import PairJournal
from monai_sacb.handlers.pair_metric import pair_items, pair_values
from monai_sacb.metrics import bootstrap_interval, lowest_mean
from monai_sacb.utils import gather_rows, is_writer, pair_names, replacing, wait_for_processes, world_size
from monai_sacb.visualize import plot_structures

__all__ = ["RegistrationTable"]


def _mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN, without a warning, of nothing."""
    counts = values[~np.isnan(values)]
    return float(counts.mean()) if counts.size else math.nan


def _row_means(columns: np.ndarray) -> np.ndarray:
    return np.array([_mean(row) for row in columns])


def _finite(value: float) -> float | None:
    # JSON has neither NaN nor infinity
    return value if math.isfinite(value) else None


class RegistrationTable:
    """
    Report an evaluation: a table of each structure in the log, and files of its pairs and structures.

    Writes ``pairs.csv`` (a row for each pair, a column for each metric and structure), ``structures.csv`` (a row for
    each structure) and ``summary.json`` (means over the pairs) from what :py:class:`monai_sacb.handlers.PairMetric`
    measures; and where it is asked for, ``structures.png`` with a box for each structure before and after. Of several
    processes that share the pairs, the first reports those of all.

    Args:
        output_dir: folder of the files.
        label_names: names of the structures, in the order of the metrics' columns.
        structure_metrics: names of the metrics with one column for each structure, as far as an evaluation has them.
        others: names of further metrics, of which the mean of each pair is reported; those that an evaluation does not
            have are left out.
        groups: names of structures, by the name of their group: their mean is reported as well.
        dice: those of the structure metrics whose mean over the lowest 30 % of the pairs is reported, Dice30.
        absent_as_zero: whether to report the Dice metrics also with 0, not NaN, for structures that a pair does not
            have, as some published tables do.
        num_resamples: of the bootstrap over subjects that gives the 95 % interval of each mean; 0 for no intervals.
        plot: the two structure metrics to draw, before and after; None for no picture.
        journal: keeps the rows of an evaluation that may be stopped and resumed.

    Raises:
        ValueError: When a group names an unknown structure, or two of structures, groups and ``mean`` have one name,
            or the number of resamples is none.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        label_names: Sequence[str],
        structure_metrics: Sequence[str] = (
            "val_dice_before",
            "val_dice",
            "val_dice_linear",
            "val_hd95_before_mm",
            "val_hd95_mm",
            "val_surface_dice_before",
            "val_surface_dice",
        ),
        others: Sequence[str] = (
            "val_field_error_before_mm",
            "val_field_error_mm",
            "val_tre_before_mm",
            "val_tre_mm",
            "val_folds_percent",
            "val_ndv_percent",
            "val_sdlogj",
            "val_similarity",
            "seconds",
            "peak_memory_mb",
        ),
        groups: Mapping[str, Sequence[str]] | None = None,
        dice: Sequence[str] = ("val_dice_before", "val_dice", "val_dice_linear"),
        absent_as_zero: bool = False,
        num_resamples: int = 0,
        plot: Sequence[str] | None = None,
        journal: PairJournal | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.label_names = list(label_names)
        self.groups = {name: list(members) for name, members in (groups or {}).items()}
        reserved = {"mean", *self.groups}
        for name in self.label_names:
            if name in reserved or self.label_names.count(name) > 1:
                raise ValueError(f"a structure, a group and their mean need different names, got '{name}' twice.")
        for name, members in self.groups.items():
            unknown = [member for member in members if member not in self.label_names]
            if unknown or not members:
                raise ValueError(f"group '{name}' must name some of the structures, got {unknown or members}.")
        if not isinstance(num_resamples, int) or num_resamples < 0:
            raise ValueError(f"num_resamples must be a whole number of at least 0, got {num_resamples!r}.")
        self.structure_metrics = list(structure_metrics)
        self.others = list(others)
        self.dice = list(dice)
        self.absent_as_zero = absent_as_zero
        self.num_resamples = num_resamples
        self.plot = plot
        self.journal = journal
        self.logger = logging.getLogger(__name__)
        self._rows: list[dict[str, Any]] = []

    def attach(self, engine: Workflow) -> None:
        """Collect the values of every pair, and report when the evaluation has ended."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Workflow) -> None:
        self._rows = []
        # what an earlier evaluation measured must not appear in this one's table
        engine.state.metric_details = {}
        engine.state.pair_values = {}
        if self.journal is not None:
            self.journal.begin()

    def _iteration_completed(self, engine: Workflow) -> None:
        values = {
            name: pair_values(engine)[name].double().cpu()
            for name in (*self.structure_metrics, *self.others)
            if name in pair_values(engine)
        }
        rows = []
        for i, item in enumerate(pair_items(engine)):
            moving, fixed = pair_names(item)
            row = {"pair": int(item.get("pair_index", len(self._rows) + i)), "moving": moving, "fixed": fixed}
            rows.append({**row, "values": {name: value[i].tolist() for name, value in values.items()}})
        self._rows += rows
        if self.journal is not None:
            self.journal.append(rows)

    def _tables(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """By metric, the values of all pairs, ``(pairs, columns)``."""
        tables = {}
        for name in (*self.structure_metrics, *self.others):
            width = max((len(row["values"].get(name, ())) for row in rows), default=0)
            if width:
                missing = [math.nan] * width
                tables[name] = np.array([row["values"].get(name, missing) for row in rows], dtype=np.float64)
        return tables

    def _columns(self, tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every column of the table of pairs, with one value for each pair."""
        columns = {}
        for name in self.structure_metrics:
            if name in tables:
                by_name = dict(zip(self.label_names, tables[name].T))
                columns.update({f"{name}/{label}": values for label, values in by_name.items()})
                for group, members in self.groups.items():
                    columns[f"{name}/{group}"] = _row_means(np.stack([by_name[member] for member in members], 1))
                columns[f"{name}/mean"] = _row_means(tables[name])
        columns.update({name: _row_means(tables[name]) for name in self.others if name in tables})
        return columns

    def _completed(self, engine: Workflow) -> None:
        rows = self._rows if self.journal is None else self.journal.rows
        if world_size() > 1:
            rows = list(gather_rows({row["pair"]: row for row in rows}).values())
        if is_writer():
            self._report(rows)
        if self.journal is not None:
            # when all is on the disk
            wait_for_processes()
            self.journal.remove()

    def _report(self, rows: Sequence[Mapping[str, Any]]) -> None:
        tables = self._tables(rows)
        columns = self._columns(tables)
        pairs = [(row["moving"], row["fixed"]) for row in rows]
        summary = self._summary(columns, tables, pairs)
        first = next((name for name in self.structure_metrics if name in tables), None)
        if first is not None:
            absent = [label for label in self.label_names if math.isnan(summary[f"{first}/{label}"])]
            if absent:
                quoted = ", ".join(f"'{label}'" for label in absent)
                self.logger.warning(f"No pair has {quoted} in both images: wrong label ids?")
        self.logger.info("\n" + self._text(summary, tables, len(rows)))
        self._write_csv("pairs.csv", ["moving", "fixed", *columns], zip(*zip(*pairs), *columns.values()))
        self._write_structures(columns, tables)
        with replacing(self.output_dir / "summary.json", alone=True) as path:
            finite = {name: _finite(value) for name, value in summary.items()}
            path.write_text(json.dumps({"pairs": len(rows), **finite}, indent=2) + "\n", encoding="utf-8")
        # one of an earlier evaluation must not pass for this one's
        (self.output_dir / "structures.png").unlink(missing_ok=True)
        if self.plot is not None and all(name in tables for name in self.plot):
            before, after = (tables[name] for name in self.plot)
            with replacing(self.output_dir / "structures.png", alone=True) as path:
                plot_structures(before, after, self.label_names, self.plot[1]).savefig(path, dpi=120)

    def _summary(
        self, columns: Mapping[str, np.ndarray], tables: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]
    ) -> dict[str, float]:
        """Means over the pairs, with Dice30 and intervals."""
        summary = {name: _mean(values) for name, values in columns.items()}
        means = [f"{name}/{part}" for name in self.structure_metrics for part in (*self.groups, "mean")]
        for name in (name for name in means if name in columns):
            if name.rpartition("/")[0] in self.dice:
                summary[f"{name}_lowest30"] = float(lowest_mean(columns[name].tolist()))
        if self.absent_as_zero:
            for name in (name for name in self.dice if name in tables):
                # not those pairs that have no label maps at all
                measured = tables[name][~np.isnan(tables[name]).all(1)]
                summary[f"{name}/mean_absent_as_zero"] = _mean(np.nan_to_num(measured).ravel())
        if self.num_resamples > 0:
            for name in (name for name in (*means, *self.others) if name in columns):
                interval = bootstrap_interval(columns[name].tolist(), pairs, num_resamples=self.num_resamples)
                summary[f"{name}_low95"], summary[f"{name}_high95"] = interval
        return summary

    def _write_csv(self, name: str, header: Sequence[str], rows: Any) -> None:
        path = self.output_dir / name
        with replacing(path, alone=True) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in rows:
                writer.writerow([value if isinstance(value, str) else f"{value:.6g}" for value in row])

    def _write_structures(self, columns: Mapping[str, np.ndarray], tables: Mapping[str, np.ndarray]) -> None:
        names = [name for name in self.structure_metrics if name in tables]
        if not names:
            # one of an earlier evaluation must not pass for this one's
            (self.output_dir / "structures.csv").unlink(missing_ok=True)
            return
        header = [f"{name} {what}" for name in names for what in ("mean", "std", "median", "pairs")]
        rows = []
        for label in (*self.label_names, *self.groups, "mean"):
            row: list[Any] = [label]
            for name in names:
                values = columns[f"{name}/{label}"]
                values = values[~np.isnan(values)]
                some = values.size > 0
                # a distance may be infinite: there is no spread of it
                with np.errstate(invalid="ignore"):
                    row += [f(values) if some else math.nan for f in (np.mean, np.std, np.median)] + [values.size]
            rows.append(row)
        self._write_csv("structures.csv", ["structure", *header], rows)

    def _text(self, summary: Mapping[str, float], tables: Mapping[str, np.ndarray], num_pairs: int) -> str:
        """The means over the pairs, for people to read."""
        names = [name for name in self.structure_metrics if name in tables]
        titles = [name.removeprefix("val_") for name in names]
        widths = [max(10, len(title) + 2) for title in titles]
        others = [name for name in self.others if name in tables]
        rows = [*self.label_names, *self.groups, "mean"] if names else []
        left = max(22, *(len(row) + 2 for row in (*rows, *others, f"{num_pairs} pairs")))
        lines = [f"{f'{num_pairs} pairs':<{left}}" + "".join(f"{t:>{w}}" for t, w in zip(titles, widths))]
        for row in rows:
            cells = [f"{summary[f'{name}/{row}']:>{width}.4f}" for name, width in zip(names, widths)]
            lines.append(f"{row:<{left}}" + "".join(cells))
        for title, suffix in (
            ("lowest 30 %", "_lowest30"),
            ("mean, absent as 0", "_absent_as_zero"),
            ("95 % from", "_low95"),
            ("95 % to", "_high95"),
        ):
            values = [summary.get(f"{name}/mean{suffix}") for name in names]
            if any(value is not None for value in values):
                cells = [" " * w if v is None else f"{v:>{w}.4f}" for v, w in zip(values, widths)]
                lines.append(f"{title:<{left}}" + "".join(cells))
        width = widths[0] if widths else 10
        lines += [f"{name:<{left}}{summary[name]:>{width}.4f}" for name in others]
        return "\n".join(lines)
