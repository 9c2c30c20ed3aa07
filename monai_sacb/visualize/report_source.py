# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a registration wrote, and the files that it was made from as far as they are still there."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError

from monai.data import MetaTensor

from monai_sacb.data.displacement_files import read_displacement
from monai_sacb.data.spatial_mapping import Grid, PhysicalField
from monai_sacb.data.volumes import read_label_volume, read_volume
from monai_sacb.utils import first_line

__all__ = ["ReportSource"]

NEEDED = ("transform.json", "metrics.json", "warped.nii.gz", "displacement.nii.gz", "jacobian.nii.gz")
# of a voxel: what headers of one grid may differ by
GRID_TOLERANCE = 0.1
VERDICTS = ("good", "check", "failed")

_UNREADABLE = (OSError, EOFError, MemoryError, OverflowError, TypeError, ValueError, zlib.error, ImageFileError)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object, got {type(content).__name__}.")
    return content


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A written volume, of the size that it must have."""
    try:
        image: Any = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise ValueError(f"cannot read '{path}': {first_line(error)}.") from error
    if array.shape != shape:
        raise ValueError(f"'{path}' must have the size {shape} of the fixed image, got {array.shape}.")
    return array


def _description(path: str) -> str:
    """What the header of a NIfTI file says about it in words; empty for others."""
    try:
        image = nib.load(path)
    except (OSError, ImageFileError):
        return ""
    if not isinstance(image, nib.Nifti1Pair):
        return ""
    return bytes(image.header["descrip"].tobytes()).rstrip(b"\0").decode("latin-1")


@dataclass
class ReportSource:
    """
    Content of an output folder.

    Args:
        folder: where it is.
        transform, metrics: the two JSON files.
        grid: of the fixed image.
        affine: ``(4, 4)``, the affine stage, RAS millimetres, from fixed to moving.
        warped: ``(D, H, W)`` on the fixed grid.
        total: the whole mapping, RAS millimetres, on the fixed grid.
        jacobian: ``(D, H, W)``, determinant of the whole mapping.
        warped_label: ``(D, H, W)``, None if there is none.
        originals: of ``fixed``, ``moving``, ``fixed_label`` and ``moving_label`` what is there, ``(1, D, H, W)``.
        notes: sentences on what is not there.
    """

    folder: Path
    transform: dict[str, Any]
    metrics: dict[str, Any]
    grid: Grid
    affine: torch.Tensor
    warped: np.ndarray
    total: PhysicalField
    jacobian: np.ndarray
    warped_label: np.ndarray | None = None
    originals: dict[str, MetaTensor] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, output_dir: str | os.PathLike[str]) -> ReportSource:
        """
        Read a folder that a registration wrote.

        Raises:
            FileNotFoundError: When it is none.
            ValueError: When one of its files is broken.
        """
        folder = Path(output_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder '{folder}'.")
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"'{folder}' is not the result of a registration: it has no {', '.join(missing)}.")
        transform, metrics = _read_json(folder / "transform.json"), _read_json(folder / "metrics.json")
        if metrics.get("verdict") not in VERDICTS:
            raise ValueError(f"'{folder / 'metrics.json'}' must hold a verdict, got {metrics.get('verdict')!r}.")
        if not isinstance(metrics.get("reasons", []), list):
            raise ValueError(f"'{folder / 'metrics.json'}' must hold a list of reasons, got {metrics['reasons']!r}.")
        try:
            first, second, third = (int(size) for size in transform["fixed"]["shape"])
            matrices = [np.array(m, dtype=np.float64) for m in (transform["fixed"]["affine"], transform["affine"])]
            paths = {role: str(transform[role]["path"]) for role in ("fixed", "moving")}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"'{folder / 'transform.json'}' does not describe a registration: {error!r}.") from error
        for matrix in matrices:
            if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
                raise ValueError(f"'{folder / 'transform.json'}' holds an affine that is none: {matrix.tolist()}.")
        grid = Grid((first, second, third), torch.from_numpy(matrices[0]))
        total = read_displacement(folder / "displacement.nii.gz")
        if total.grid.shape != grid.shape:
            raise ValueError(
                f"'{folder / 'displacement.nii.gz'}' must have the size {grid.shape} of the fixed image, got "
                f"{total.grid.shape}."
            )
        source = cls(
            folder,
            transform,
            metrics,
            grid,
            torch.from_numpy(matrices[1]),
            _read_array(folder / "warped.nii.gz", grid.shape),
            total,
            _read_array(folder / "jacobian.nii.gz", grid.shape),
        )
        if (folder / "warped_label.nii.gz").is_file():
            source.warped_label = _read_array(folder / "warped_label.nii.gz", grid.shape)
        for role in ("fixed", "moving"):
            source._find(role, role, paths[role])
            label = transform.get(f"{role}_label")
            if label is not None:
                source._find(role, f"{role}_label", str(label))
        return source

    def _find(self, role: str, key: str, path: str) -> None:
        """Read a file that the registration was made from, or note why it cannot be shown."""
        name = f"{role} image" if key == role else f"{role} label map"
        try:
            volume = read_volume(path, name) if key == role else read_label_volume(path, name)
            grid, then = Grid.of(volume), self.transform[role]
            same = list(grid.shape) == [int(size) for size in then["shape"]]
            affine = torch.tensor(then["affine"], dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            self.notes.append(f"The {name} is not shown: {error}")
            return
        if not same or not torch.allclose(grid.affine, affine, rtol=0.0, atol=GRID_TOLERANCE * min(grid.spacing)):
            self.notes.append(f"The {name} '{path}' is not shown: its grid is not that of the registration any more.")
            return
        self.originals[key] = volume
        if key == role:
            self.descriptions[role] = _description(path)
