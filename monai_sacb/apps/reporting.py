# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``report``: the page of a registration, made anew from its folder."""

from __future__ import annotations

import os

from monai_sacb.apps.verdict import check_metrics
from monai_sacb.visualize.report import write_report
from monai_sacb.visualize.report_source import ReportSource

__all__ = ["report"]


def report(output_dir: str | os.PathLike[str]) -> str:
    """
    Write ``report.html`` into the output folder of a registration, from what ``register`` wrote there.

    Args:
        output_dir: the folder.

    Returns:
        the file.

    Raises:
        FileNotFoundError: When the folder is not the result of a registration.
        ValueError: When one of its files is broken.
    """
    source = ReportSource.read(output_dir)
    try:
        checks = check_metrics(source.metrics)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"'{source.folder / 'metrics.json'}' cannot be laid beside the thresholds: {error}") from error
    return write_report(source, checks)
