# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a registration would do, before it is done."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from monai_sacb.apps.memory import expected_memory_mb
from monai_sacb.apps.pair_outputs import check_output_folder
from monai_sacb.apps.pair_reading import PairFiles, read_affine, read_pair
from monai_sacb.apps.registration import RegistrationOptions, Setting
from monai_sacb.apps.working_pair import finer_grid, pair_grid

__all__ = ["plan_registration"]


def plan_registration(
    files: PairFiles, output_dir: str | os.PathLike[str], options: RegistrationOptions, setting: Setting
) -> dict[str, Any]:
    """
    Read and check the files of a pair and say what registering them would do.

    Args:
        files: what belongs to the pair.
        output_dir: where the results would go.
        options: how to register.
        setting: the model.

    Returns:
        grids, stages, and the expected seconds and memory: estimates from the numbers ``costs`` of ``register.json``,
        for one thread of a usual processor.

    Raises:
        OSError: When the results could not be written there.
        ValueError: When a file or an option cannot be used.
    """
    check_output_folder(output_dir, [*files.paths, options.affine])
    source = options.affine_source
    given = read_affine(options.affine) if source == "given" else None
    moving, fixed = read_pair(files, given)
    # without the affine stage it is not known where the moving image will lie: about where the fixed one is
    affine = torch.eye(4, dtype=torch.float64) if given is None else given
    other = fixed if source == "estimated" else moving
    grid = pair_grid(other, fixed, affine, setting.get("working_grid"))
    finer = finer_grid(grid, other, fixed, affine, setting.get("fine_grid")) if setting.fine > 0 else None
    fine = 0 if finer is None else math.prod(finer.shape)
    costs = setting.get("costs")
    working, native = math.prod(grid.shape), math.prod(fixed.grid.shape) + math.prod(moving.grid.shape)
    network = setting.network is not None
    # networks of other bundles may know no passes
    passes = getattr(setting.network, "num_passes", 1) if network else 0
    seconds = {
        "affine": costs["affine_seconds"] if source == "estimated" else 0.0,
        "network": costs["network_seconds_per_million"] * working * passes / 1e6,
        "refinement": costs["refinement_seconds_per_million"] * (setting.refine * working + setting.fine * fine) / 1e6,
        "files": costs["file_seconds_per_million"] * native / 1e6,
    }
    memory = expected_memory_mb(costs, native, working, network, setting.refine, fine)
    stages = [
        {"estimated": "affine: estimated by mutual information", "aligned": "affine: none, the headers count"}.get(
            source, f"affine: '{options.affine}'"
        ),
        f"network: {setting.model.name}",
        f"refinement: {setting.refine} steps" if setting.refine else "refinement: none",
        f"refinement on a finer grid: {setting.fine} steps" if fine else "refinement on a finer grid: none",
    ]
    return {
        "fixed": {"path": fixed.path, "shape": list(fixed.grid.shape), "spacing_mm": _rounded(fixed.grid.spacing)},
        "moving": {"path": moving.path, "shape": list(moving.grid.shape), "spacing_mm": _rounded(moving.grid.spacing)},
        "working_grid": {"shape": list(grid.shape), "spacing_mm": _rounded(grid.spacing)},
        **({} if finer is None else {"fine_grid": {"shape": list(finer.shape), "spacing_mm": _rounded(finer.spacing)}}),
        "stages": stages,
        "device": str(setting.device),
        "expected_seconds": round(sum(seconds.values()), 1),
        "expected_memory_mb": round(memory),
    }


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, 3) for value in values]
