# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Numbers that tell whether a registration worked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from monai.data import MetaTensor

from monai_sacb.apps.pair_outputs import Outputs
from monai_sacb.data.spatial_mapping import Grid, PointMapping, apply_affine, inside_buffer, resample_volume
from monai_sacb.losses import LNCCLoss
from monai_sacb.metrics import compute_label_dice
from monai_sacb.utils import plain_tensor

__all__ = ["compare_labels", "compare_points", "field_metrics", "local_similarity"]

# points of the foreground at which a mapping is looked at
MAX_POINTS = 200_000


def local_similarity(image: torch.Tensor, fixed: torch.Tensor, mask: torch.Tensor) -> float:
    """
    Mean squared local correlation of two images in windows of 9 voxels, in [0, 1].

    Args:
        image, fixed: ``(1, D, H, W)`` on one grid.
        mask: ``(1, D, H, W)``, bool, where it counts.
    """
    ncc = -LNCCLoss(kernel_size=9, reduction="none")(image[None], fixed[None])[0]
    return float(ncc[mask].double().mean()) if bool(mask.any()) else 0.0


def compare_labels(
    moving_label: MetaTensor, fixed_label: MetaTensor, stages: Mapping[str, PointMapping], mode: str = "label"
) -> dict[str, Any]:
    """
    Dice of two label maps through mappings, for each structure that both have.

    Args:
        moving_label, fixed_label: ``(1, D, H, W)``, whole numbers, each with its affine.
        stages: mappings by name.
        mode: how labels are looked up, ``"label"`` or ``"nearest"``.

    Returns:
        for each name the ``mean`` and the ``structures`` by their ids.
    """
    grid, fixed = Grid.of(fixed_label), plain_tensor(fixed_label)
    ids = sorted(set(torch.unique(fixed).tolist()) & set(torch.unique(plain_tensor(moving_label)).tolist()) - {0})
    result = {}
    for name, mapping in stages.items():
        warped = plain_tensor(resample_volume(moving_label, mapping, grid, mode=mode))
        dice = compute_label_dice(warped[None], fixed[None], ids)[0].tolist()
        result[name] = {
            "mean": sum(dice) / len(dice) if dice else None,
            "structures": {str(int(label)): value for label, value in zip(ids, dice)},
        }
    return result


def compare_points(
    moving_points: torch.Tensor, fixed_points: torch.Tensor, stages: Mapping[str, PointMapping]
) -> dict[str, float]:
    """
    Distances of landmarks of the moving image from where mappings take those of the fixed image, in millimetres.

    Args:
        moving_points, fixed_points: ``(N, 3)``, RAS millimetres, paired by their order.
        stages: mappings by name.

    Returns:
        the mean by name, and the largest after the last as ``max_after``.
    """
    result, distances = {}, torch.zeros(1)
    for name, mapping in stages.items():
        distances = (mapping.transform_points(fixed_points) - moving_points.double()).norm(dim=1)
        result[name] = float(distances.mean())
    result["max_after"] = float(distances.max())
    return result


def _quantiles(values: torch.Tensor, names: dict[str, float]) -> dict[str, float | None]:
    values = values[~values.isnan()].double()
    if not len(values):
        return dict.fromkeys(names)
    values = values.sort().values
    return {name: float(values[round(share * (len(values) - 1))]) for name, share in names.items()}


def field_metrics(outputs: Outputs) -> dict[str, Any]:
    """
    How regular a mapping is, how far it moves, how well its inverse undoes it, and how much of the image it finds.

    ``jacobian`` and ``folds_percent`` are of all voxels of the fixed image, ``inverse_residual_mm`` of those of the
    inverse (forward after inverse), the others of the fixed image's foreground. ``inverse_consistency_mm`` is of the
    inverse after the mapping, between the voxels of the inverse.
    """
    fixed, moving = outputs.fixed, outputs.moving
    voxels = fixed.foreground[0].nonzero()
    box = apply_affine(fixed.grid.affine, torch.stack([voxels.amin(0), voxels.amax(0)]).double())
    voxels = voxels[:: max(1, len(voxels) // MAX_POINTS)]
    places = apply_affine(fixed.grid.affine, voxels.double())
    partners = outputs.mapping.transform_points(places)
    in_moving = apply_affine(torch.linalg.inv(moving.grid.affine), partners)
    inside = inside_buffer(in_moving, moving.grid.shape)
    residual = (outputs.inverse.transform_points(partners[inside]) - places[inside]).norm(dim=1)
    moved = outputs.field.vectors[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].norm(dim=0)
    jacobian = outputs.jacobian.flatten()
    return {
        "folds_percent": 100.0 * float((~(jacobian > 0)).double().mean()),
        "sdlogj": float((jacobian[fixed.foreground.flatten()].double() + 3).clamp(1e-9, 1e9).log().std(correction=0)),
        "jacobian": _quantiles(jacobian, {"min": 0.0, "p1": 0.01, "median": 0.5, "p99": 0.99, "max": 1.0}),
        "displacement_mm": _quantiles(moved, {"median": 0.5, "p99": 0.99, "max": 1.0}),
        "inverse_consistency_mm": _quantiles(residual, {"median": 0.5, "p95": 0.95, "max": 1.0}),
        "inverse_residual_mm": _quantiles(outputs.inverse_errors.flatten(), {"median": 0.5, "p95": 0.95, "max": 1.0}),
        "voxel_mm": max(math.prod(subject.grid.spacing) ** (1 / 3) for subject in (fixed, moving)),
        "overlap_percent": 100.0 * float(inside.double().mean()),
        "extent_mm": float((box[1] - box[0]).norm()),
    }
