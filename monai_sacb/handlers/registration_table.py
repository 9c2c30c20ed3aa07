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

import torch
from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.handlers.pair_metric import pair_items
from monai_sacb.utils import replacing, subject_name

__all__ = ["RegistrationTable"]


def _mean(values: torch.Tensor) -> float:
    return float(values.double().nanmean())


class RegistrationTable:
    """
    Report an evaluation: a table of each structure before and after in the log, one row for each pair in a file.

    Writes ``pairs.csv`` and ``summary.json`` from the details that the evaluator's metrics keep.

    Args:
        output_dir: folder of the two files.
        label_names: names of the structures, in the order of the metrics' columns.
        after, before: names of the metrics, such as Dice, with one column for each structure.
        others: names of further metrics, of which the mean of each pair is reported; those that an evaluation does not
            have are left out.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        label_names: Sequence[str],
        after: str = "val_dice",
        before: str = "val_dice_before",
        others: Sequence[str] = (
            "val_dice_linear",
            "val_field_error_before_mm",
            "val_field_error_mm",
            "val_folds_percent",
            "val_similarity",
        ),
    ) -> None:
        self.output_dir = Path(output_dir)
        self.label_names = list(label_names)
        self.after = after
        self.before = before
        self.others = list(others)
        self.logger = logging.getLogger(__name__)
        self._pairs: list[tuple[str, str]] = []

    def attach(self, engine: Workflow) -> None:
        """Collect the names of the pairs, and report when the evaluation has ended."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Workflow) -> None:
        self._pairs = []
        # the details of an earlier evaluation must not appear in this one's table
        engine.state.metric_details = {}

    def _iteration_completed(self, engine: Workflow) -> None:
        for item in pair_items(engine):
            self._pairs.append((subject_name(item["moving_image"]), subject_name(item["fixed_image"])))

    def _columns(self, details: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Every measured column, of one value for each pair."""
        columns: dict[str, torch.Tensor] = {}
        for name in (self.before, self.after):
            if name in details:
                for i, label in enumerate(self.label_names):
                    columns[f"{name}/{label}"] = details[name][:, i].cpu()
                columns[f"{name}/mean"] = details[name].double().nanmean(1).cpu()
        for name in self.others:
            if name in details:
                columns[name] = details[name].double().nanmean(1).cpu()
        return columns

    def _completed(self, engine: Workflow) -> None:
        columns = self._columns(engine.state.metric_details)
        self.logger.info("\n" + self.table(columns))
        with replacing(self.output_dir / "pairs.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["moving", "fixed", *columns])
            for i, names in enumerate(self._pairs):
                writer.writerow([*names, *(f"{float(values[i]):.6g}" for values in columns.values())])
        summary: dict[str, float | int | None] = {"pairs": len(self._pairs)}
        for name, values in columns.items():
            mean = _mean(values)
            # JSON has no NaN
            summary[name] = None if math.isnan(mean) else mean
        with replacing(self.output_dir / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def table(self, columns: Mapping[str, torch.Tensor]) -> str:
        """The means over the pairs, as text."""
        lines = [f"{f'{len(self._pairs)} pairs':<22}{'Dice before':>12}{'after':>10}"]
        for label in [*self.label_names, "mean"]:
            keys = [f"{self.before}/{label}", f"{self.after}/{label}"]
            if all(key in columns for key in keys):
                before, after = (_mean(columns[key]) for key in keys)
                lines.append(f"{label:<24}{before:>10.4f}{after:>10.4f}")
        lines += [f"{name:<34}{_mean(columns[name]):>10.4f}" for name in self.others if name in columns]
        return "\n".join(lines)
