# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Output folders as a registration writes them, made without registering anything."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_sacb.data.displacement_files import write_displacement
from monai_sacb.data.spatial_mapping import Grid, PhysicalField, SpatialMapping, resample_volume
from monai_sacb.data.volumes import read_label_volume, read_volume, write_volume
from monai_sacb.metrics import jacobian_determinant

GOOD_METRICS: dict[str, Any] = {
    "verdict": "good",
    "reasons": ["All checks are within their limits."],
    "similarity": {"measure": "local NCC", "before": 0.31, "affine": 0.42, "after": 0.63},
    "dice": {
        "before": {"mean": 0.41, "structures": {"1": 0.40, "2": 0.42}},
        "affine": {"mean": 0.52, "structures": {"1": 0.50, "2": 0.54}},
        "after": {"mean": 0.78, "structures": {"1": 0.75, "2": 0.81}},
    },
    "landmarks_mm": {"before": 8.1, "affine": 4.2, "after": 1.3, "max_after": 3.9},
    "folds_percent": 0.002,
    "sdlogj": 0.08,
    "jacobian": {"min": 0.2, "p1": 0.6, "median": 1.0, "p99": 1.7, "max": 2.5},
    "displacement_mm": {"median": 1.8, "p99": 6.0, "max": 9.0},
    "inverse_consistency_mm": {"median": 0.01, "p95": 0.05, "max": 0.9},
    "overlap_percent": 99.1,
    "extent_mm": 210.0,
    "self_check": {"max_difference": 2e-5, "tolerance": 1e-3, "compared": "warped.nii.gz with ITK's resampling"},
    "seconds": {"reading": 0.5, "affine": 8.0, "refinement": 30.2},
    "peak_memory_mb": 1204.0,
}


def good_metrics(**changes: Any) -> dict[str, Any]:
    """Metrics of a good registration, with some of them replaced: ``similarity__after=0.2``."""
    metrics = copy.deepcopy(GOOD_METRICS)
    for name, value in changes.items():
        *above, last = name.split("__")
        place = metrics
        for key in above:
            place = place[key]
        place[last] = value
    return metrics


def wave(grid: Grid, amplitude: float, length: float = 60.0) -> PhysicalField:
    """A smooth displacement of ``amplitude`` mm in waves of ``length`` mm, in RAS."""
    vectors = torch.empty(3, *grid.shape)
    for part, places in grid.places():
        turned = places[:, [1, 2, 0]] * (2 * torch.pi / length)
        vectors[:, part] = (amplitude * torch.sin(turned)).T.reshape(3, -1, *grid.shape[1:]).float()
    return PhysicalField(vectors, grid.affine)


def write_result(
    folder: Path,
    fixed: Path,
    moving: Path,
    affine: torch.Tensor,
    amplitude: float,
    fixed_label: Path | None = None,
    moving_label: Path | None = None,
    metrics: dict[str, Any] | None = None,
    length: float = 60.0,
) -> Path:
    """A folder for the mapping ``x -> affine(x + wave(x))`` of two files."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed_image, moving_image = read_volume(fixed), read_volume(moving)
    grid = Grid.of(fixed_image)
    field = wave(grid, amplitude, length)
    mapping = SpatialMapping([field, affine])
    fill = min(0.0, float(moving_image.min()))
    write_volume(resample_volume(moving_image, mapping, grid, fill=fill), folder / "warped.nii.gz", np.float32)
    if moving_label is not None:
        label = resample_volume(read_label_volume(moving_label), mapping, grid, mode="label")
        write_volume(label, folder / "warped_label.nii.gz")
    write_displacement(mapping.flatten(grid), folder / "displacement.nii.gz")
    ddf = torch.einsum("ij,jdhw->idhw", torch.linalg.inv(grid.affine)[:3, :3].float(), field.vectors)
    jacobian = jacobian_determinant(ddf[None])[0] * float(torch.linalg.det(affine[:3, :3]))
    nib.save(nib.Nifti1Image(jacobian.numpy(), grid.affine.numpy()), folder / "jacobian.nii.gz")

    def described(path: Path, of: Grid) -> dict[str, Any]:
        return {"path": str(path), "shape": list(of.shape), "affine": of.affine.tolist()}

    sidecar = {
        "format": 1,
        "direction": "pull-back: fixed to moving",
        "units": "mm",
        "frame": "LPS",
        "fixed": described(fixed, grid),
        "moving": described(moving, Grid.of(moving_image)),
        "moving_label": None if moving_label is None else str(moving_label),
        "fixed_label": None if fixed_label is None else str(fixed_label),
        "stages": ["displacement", "affine"],
        "affine": affine.tolist(),
        "affine_source": "estimated",
        "model": {"name": "brain", "sha256": "ab" * 32},
        "refine": 50,
        "seed": 0,
        "device": "cpu",
        "working_grid": {"shape": list(grid.shape), "affine": grid.affine.tolist(), "spacing": list(grid.spacing)},
        "files": {"warped": "warped.nii.gz"},
        "versions": {"monai_sacb": "0.1.0", "monai": "1.6.1", "torch": "2.9.0"},
        "date": "2026-01-02T03:04:05+00:00",
    }
    (folder / "transform.json").write_text(json.dumps(sidecar))
    (folder / "metrics.json").write_text(json.dumps(metrics or good_metrics()))
    return folder
