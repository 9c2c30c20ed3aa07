# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Prepare the data of ``bundle/configs/brain.json``: whole-head label maps, laid on the MNI152 template.

    python benchmarks/head_label_maps.py MAPS_DIR DATASET_DIR

Every label map (``*.nii.gz``, FreeSurfer ids) is given a rough T1 contrast, registered affinely to the template that
nilearn ships (global correlation at 4 mm, brain only), and resampled to one grid of 1 mm around the template's brain
with the nearest label. The last two by name are for validation, at 2 mm, beside images of that contrast. The template
places the maps and enters no training. Three minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nilearn.datasets import load_mni152_template

from monai.networks.layers import gaussian_1d, separable_filtering

from monai_sacb.networks.layers import reference_grid, warp
from monai_sacb.transforms import sample_labels

logger = logging.getLogger(__name__)

# centre of the template's brain in mm, and sizes of the grid in voxels of 1 mm: a head of whatever pose at 2 mm and
# 80 x 96 x 80 voxels lies inside
CENTER, SIZE = (0.0, -17.0, 5.0), (192, 224, 192)
VALIDATION_SIZE = (80, 96, 80)
# FreeSurfer ids: a rough T1 contrast of brain tissue
INTENSITIES = {
    **dict.fromkeys((2, 41, 7, 46, 85, 251, 252, 253, 254, 255), 1.0),
    **dict.fromkeys((16, 28, 60), 0.9),
    **dict.fromkeys((10, 49, 13, 52), 0.8),
    **dict.fromkeys((11, 12, 26, 50, 51, 58, 17, 18, 53, 54), 0.65),
    **dict.fromkeys((3, 42, 8, 47), 0.6),
    **dict.fromkeys((4, 5, 14, 15, 43, 44), 0.15),
}


def grid_affine(center: tuple[float, ...], size: tuple[int, ...], spacing: float) -> np.ndarray:
    """Affine (voxels to RAS mm) of a grid around a place."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.asarray(center) - spacing * (np.asarray(size) - 1) / 2
    return affine


def contrast(label: np.ndarray) -> torch.Tensor:
    """The rough T1 image (1, 1, *spatial) of a label map, brain only."""
    table = torch.zeros(int(label.max()) + 1)
    for value, intensity in INTENSITIES.items():
        if value < len(table):
            table[value] = intensity
    return table[torch.from_numpy(label.astype(np.int64))][None, None]


def register(moving: torch.Tensor, moving_affine: np.ndarray, fixed: torch.Tensor, steps: int = 150) -> np.ndarray:
    """
    Affine mapping (4, 4), RAS mm, of the places of the fixed image to those of the moving one; by global correlation.

    Args:
        moving: (1, 1, *spatial), at any place.
        moving_affine: its affine.
        fixed: (1, 1, *spatial), on the grid of 4 mm around ``CENTER``.
        steps: number of gradient steps.
    """
    size = tuple(fixed.shape[2:])
    fixed_affine = torch.from_numpy(grid_affine(CENTER, size, 4.0)).float()
    to_voxels = torch.from_numpy(np.linalg.inv(moving_affine)).float()
    grid = reference_grid(list(size), fixed.device)
    points = fixed_affine[:3, :3] @ grid.flatten(1) + fixed_affine[:3, 3:]
    center = torch.tensor(CENTER)[:, None]
    places = torch.from_numpy(moving_affine).float()[:3, :3] @ torch.nonzero(moving[0, 0] > 0.3).float().T
    start = places.mean(1, keepdim=True) + torch.from_numpy(moving_affine).float()[:3, 3:]
    linear, shift = torch.zeros(3, 3, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [linear], "lr": 0.01}, {"params": [shift], "lr": 1.0}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    blurred = separable_filtering(moving, [gaussian_1d(torch.tensor(3.0))] * 3)
    target = fixed - fixed.mean()
    for _ in range(steps):
        there = (torch.eye(3) + linear) @ (points - center) + start + shift
        voxels = (to_voxels[:3, :3] @ there + to_voxels[:3, 3:]).view(1, 3, *size)
        value = warp(blurred, voxels - grid)
        value = value - value.mean()
        loss = 1 - (value * target).sum() / (value.norm() * target.norm())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    logger.info(f"correlation with the template {1 - float(loss.detach()):.3f}")
    matrix = np.eye(4)
    matrix[:3, :3] += linear.detach().numpy()
    offset = (start + shift).detach().numpy()[:, 0]
    matrix[:3, 3] = offset - matrix[:3, :3] @ np.asarray(CENTER)
    return matrix


def template() -> torch.Tensor:
    """The template's brain (1, 1, *spatial) on the grid of 4 mm around ``CENTER``."""
    image = load_mni152_template(resolution=2)
    data = separable_filtering(
        torch.from_numpy(image.get_fdata())[None, None].float(), [gaussian_1d(torch.tensor(1.5))] * 3
    )
    size = tuple(n // 4 for n in SIZE)
    grid = reference_grid(list(size), data.device)
    matrix = torch.from_numpy(np.linalg.inv(image.affine) @ grid_affine(CENTER, size, 4.0)).float()
    places = (matrix[:3, :3] @ grid.flatten(1) + matrix[:3, 3:]).view(1, 3, *size)
    return warp(data, places - grid)


def resample(label: np.ndarray, affine: np.ndarray, size: tuple[int, ...], spacing: float) -> np.ndarray:
    """A label map on a grid around ``CENTER``; ``affine`` takes its voxels to the template's RAS mm."""
    matrix = torch.from_numpy(np.linalg.inv(affine) @ grid_affine(CENTER, size, spacing)).float()
    grid = reference_grid(list(size), torch.device("cpu"))
    places = (matrix[:3, :3] @ grid.flatten(1) + matrix[:3, 3:]).view(1, 3, *size)
    return sample_labels(torch.from_numpy(label)[None], places)[0].numpy()


def main() -> None:
    """Run the preparation."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps_dir", type=Path)
    parser.add_argument("dataset_dir", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.maps_dir.glob("*.nii.gz"))
    if len(files) < 4:
        raise SystemExit(f"'{arguments.maps_dir}' holds {len(files)} label maps; at least 4 are needed.")
    for name in ("images", "labels"):
        (arguments.dataset_dir / name).mkdir(parents=True, exist_ok=True)
    fixed = template()
    content: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for number, path in enumerate(files):
        logger.info(path.name)
        image = nib.load(path)
        label = np.asanyarray(image.dataobj).round().astype(np.int16)
        # the mapping takes the template's places to the map's
        affine = np.linalg.inv(register(contrast(label), image.affine, fixed)) @ image.affine
        section = "training" if number < len(files) - 2 else "validation"
        size, spacing = (SIZE, 1.0) if section == "training" else (VALIDATION_SIZE, 2.0)
        placed = resample(label, affine, size, spacing)
        entry = {"image": f"images/{path.name}", "label": f"labels/{path.name}"}
        new = grid_affine(CENTER, size, spacing)
        nib.save(nib.Nifti1Image(placed, new), arguments.dataset_dir / entry["label"])
        nib.save(nib.Nifti1Image(contrast(placed)[0, 0].numpy(), new), arguments.dataset_dir / entry["image"])
        content[section].append(entry)
    (arguments.dataset_dir / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
