# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Mapping

from monai_sacb.apps.verdict import VerdictThresholds, check_metrics
from monai_sacb.visualize.report import write_report
from monai_sacb.visualize.report_source import ReportSource

__all__ = ["report"]


def report(
    output_dir: str | os.PathLike[str], thresholds: VerdictThresholds | Mapping[str, float] | None = None
) -> str:
    """
    Write ``report.html`` into the output folder of a registration, from what ``register`` wrote there.

    Args:
        output_dir: the folder.
        thresholds: limits that the measurements are laid beside, as for
            :py:func:`monai_sacb.apps.verdict.check_metrics`; by default those in ``metrics.json``, or else the
            package's. The verdict stays the one that ``register`` gave.

    Returns:
        the file.

    Raises:
        FileNotFoundError: When the folder is not the result of a registration.
        ValueError: When one of its files is broken.
    """
    source = ReportSource.read(output_dir)
    try:
        checks = check_metrics(source.metrics, thresholds)
    except ValueError as error:
        raise ValueError(f"'{source.folder / 'metrics.json'}' cannot be laid beside the thresholds: {error}") from error
    return write_report(source, checks)
