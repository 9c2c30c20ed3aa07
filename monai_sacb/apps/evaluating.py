# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``evaluate``: how well a transform lays label maps and landmarks on each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from monai.data import MetaTensor

from monai_sacb.apps.applying import load_mappings
from monai_sacb.apps.pair_metrics import compare_points
from monai_sacb.data.point_files import read_point_set
from monai_sacb.data.spatial_mapping import Grid, PointMapping, SpatialMapping, resample_volume
from monai_sacb.data.volumes import read_label_volume
from monai_sacb.metrics import compute_label_dice, compute_label_hausdorff
from monai_sacb.transforms import number_labels
from monai_sacb.utils import plain_tensor, write_json

__all__ = ["Evaluation", "evaluate"]

METRICS = ("dice_before", "dice", "dice_linear", "hd95_before_mm", "hd95_mm")


class Evaluation(dict[str, Any]):
    """``structures``, a row of metrics for each; ``mean``; and ``landmarks_mm``, as far as there are any."""

    def table(self) -> str:
        """A line for each structure, and their mean."""
        rows = [["structure", *METRICS]]
        for name, values in [
            *self.get("structures", {}).items(),
            *([("mean", self["mean"])] if "mean" in self else []),
        ]:
            rows.append([name, *("" if values[m] is None else f"{values[m]:.4f}" for m in METRICS)])
        lines = []
        if len(rows) > 1:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        if "landmarks_mm" in self:
            values = ", ".join(f"{name} {value:.3f}" for name, value in self["landmarks_mm"].items())
            lines.append(f"landmarks, mm: {values}")
        return "\n".join(lines)


def _read_names(path: str | None) -> dict[int, str]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {int(key): str(value) for key, value in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'names \'{path}\' must be a JSON file of an object {{"id": "name"}}.') from error
    if len(set(names.values())) < len(names):
        raise ValueError(f"names '{path}' gives one name to several labels.")
    return names


def _compare(
    moving: MetaTensor, fixed: MetaTensor, forward: PointMapping, names: dict[int, str]
) -> dict[str, dict[str, Any]]:
    grid, target = Grid.of(fixed), plain_tensor(fixed)
    ids = sorted((set(torch.unique(target).tolist()) & set(torch.unique(plain_tensor(moving)).tolist())) - {0})
    if names:
        ids = [label for label in ids if label in names]
    if not ids:
        raise ValueError("the label maps have no label in common that could be scored.")
    columns: dict[str, list[float]] = {}
    # without gaps, for the distances
    fixed_numbered = number_labels(target, ids)
    stages: dict[str, tuple[PointMapping, str]] = {
        "before": (SpatialMapping(), "nearest"),
        "after": (forward, "nearest"),
        "linear": (forward, "label"),
    }
    for stage, (mapping, mode) in stages.items():
        warped = plain_tensor(resample_volume(moving, mapping, grid, mode))
        suffix = {"before": "_before", "after": "", "linear": "_linear"}[stage]
        columns[f"dice{suffix}"] = compute_label_dice(warped[None], target[None], ids)[0].tolist()
        if stage != "linear":
            numbered = number_labels(warped, ids)
            distances = compute_label_hausdorff(numbered[None], fixed_numbered[None], grid.spacing, len(ids))
            columns[f"hd95{suffix}_mm"] = distances[0].tolist()
    return {
        names.get(label, str(label)): {metric: columns[metric][i] for metric in METRICS} for i, label in enumerate(ids)
    }


def evaluate(
    transform: str,
    fixed_label: str | None = None,
    moving_label: str | None = None,
    fixed_points: str | None = None,
    moving_points: str | None = None,
    names: str | None = None,
    output: str | None = None,
) -> Evaluation:
    """
    Dice and surface distance of label maps, and the error of landmarks, before and after a registration.

    Args:
        transform: output folder of a registration, or a transform file.
        fixed_label: label map in the fixed image's space.
        moving_label: label map in the moving image's space.
        fixed_points: landmarks in the fixed image's space (.csv, .fcsv, .mrk.json).
        moving_points: their partners in the moving image's space, in the same order.
        names: a JSON file of an object {"id": "name"}: the labels to score, and what to call them. By default all
            labels that both maps have.
        output: a JSON file for the numbers.

    Returns:
        for each structure Dice before, after with labels warped to the nearest voxel, and after with labels warped as
        linear one-hot maps; the 95th percentile of the surface distance before and after; and the means.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When something cannot be used; the message says why.
    """
    labels, points = (fixed_label, moving_label), (fixed_points, moving_points)
    if labels == points == (None, None):
        raise ValueError("evaluate needs fixed_label and moving_label, or fixed_points and moving_points.")
    for kind, pair in (("label", labels), ("points", points)):
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"evaluate needs both fixed_{kind} and moving_{kind}, got one.")
    forward, _ = load_mappings(transform)
    result = Evaluation()
    if fixed_label is not None and moving_label is not None:
        moving = read_label_volume(moving_label, "moving_label")
        fixed = read_label_volume(fixed_label, "fixed_label")
        structures = _compare(moving, fixed, forward, _read_names(names))
        table = torch.tensor([[row[metric] for metric in METRICS] for row in structures.values()], dtype=torch.float64)
        # a structure that has been lost has an infinite distance, which the mean must show
        means = dict(zip(METRICS, table.nanmean(0).tolist()))
        result |= {"structures": structures, "mean": means}
    if fixed_points is not None and moving_points is not None:
        sets = read_point_set(moving_points).positions, read_point_set(fixed_points).positions
        if len(sets[0]) != len(sets[1]):
            raise ValueError(
                f"moving_points has {len(sets[0])} points, but fixed_points has {len(sets[1])}; they are paired by "
                "their order."
            )
        result["landmarks_mm"] = compare_points(*sets, {"before": SpatialMapping(), "after": forward})
    if output is not None:
        write_json(result, output)
    return result
