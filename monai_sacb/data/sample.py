# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""A small cohort of brains with known deformations, made from a real template."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from tqdm.auto import tqdm

from monai.utils import optional_import

from monai_sacb.networks.layers import exponential, reference_grid, warp

__all__ = ["SAMPLE_LABELS", "random_velocity", "sample_dataset"]

SAMPLE_LABELS = {"csf": 1, "grey_matter": 2, "white_matter": 3}
# (smoothness, strength) of the velocity fields in mm: one for the shape of the head, one for single gyri
VELOCITY_SCALES_MM = ((25.0, 7.0), (12.0, 3.0))
# space between the brain and the edge of the grid, for brains that grow
MARGIN_MM = 12.0
# over which velocities fall to zero at the edge of the grid
TAPER_VOXELS = 4

logger = logging.getLogger(__name__)


def random_velocity(
    shape: tuple[int, ...], scales: tuple[tuple[float, float], ...], rng: np.random.Generator
) -> torch.Tensor:
    """
    A smooth random stationary velocity field, zero at the edge of the grid; its exponential is a diffeomorphism.

    Args:
        shape: spatial shape of the grid.
        scales: (standard deviation of the smoothing, root mean square of the displacement) of each summand, in voxels.
        rng: source of the noise.

    Returns:
        ``(1, d, *shape)`` in voxels per unit of time, float32.
    """
    velocity = np.zeros((len(shape), *shape))
    # the edge of the grid stays where it is: nothing leaves the grid, and the field is a diffeomorphism of it
    taper = np.ones(shape)
    for axis, size in enumerate(shape):
        distance = np.minimum(np.arange(size), np.arange(size)[::-1]) / TAPER_VOXELS
        taper *= np.sin(0.5 * np.pi * np.clip(distance, 0, 1)).reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
    for smoothness, strength in scales:
        for component in velocity:
            noise = gaussian_filter(rng.standard_normal(shape), smoothness, mode="nearest")
            component += strength * taper * noise / np.sqrt((noise**2).mean())
    return torch.from_numpy(velocity[None].astype(np.float32))


def _template(spacing: float) -> tuple[torch.Tensor, np.ndarray]:
    """T1, grey and white matter ``(1, 3, D, H, W)`` at 1 mm, smoothed for sampling at a spacing; and the affine."""
    datasets, found = optional_import("nilearn.datasets")
    if not found:
        raise ModuleNotFoundError(
            "the built-in sample is made from the brain template of nilearn: pip install nilearn, or give "
            "a dataset_dir of your own."
        )
    images = [
        load(resolution=1)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    ]
    maps: list[np.ndarray] = [np.clip(np.asarray(image.dataobj, dtype=np.float32), 0, None) for image in images]
    maps[0] = maps[0] / np.percentile(maps[0][maps[0] > 0], 99.5)
    # as a scanner with such voxels would blur
    smooth = [gaussian_filter(m, 0.42 * spacing) for m in maps]
    return torch.from_numpy(np.stack(smooth)[None]), np.asarray(images[0].affine)


def _brain_box(t1: torch.Tensor, spacing: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """First template voxel and shape of a grid of a spacing (in template voxels of 1 mm) around the brain."""
    filled = [np.flatnonzero((t1 > 0.1).any(dim=dims).numpy()) for dims in ((2, 1), (2, 0), (1, 0))]
    low = np.array([f[0] for f in filled]) - MARGIN_MM
    high = np.array([f[-1] for f in filled]) + MARGIN_MM
    return low, tuple(int(n) for n in np.ceil((high - low) / spacing))


def _subject(
    template: torch.Tensor, origin: np.ndarray, shape: tuple[int, ...], spacing: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One subject: image, label map, and the fields from it to the template's grid and back, in voxels."""
    scales = tuple((smoothness / spacing, strength / spacing) for smoothness, strength in VELOCITY_SCALES_MM)
    velocity = random_velocity(shape, scales, rng)
    ddf = exponential(velocity)
    voxels = reference_grid(list(shape), ddf.device)
    # from voxels of the subject's grid to voxels of the 1 mm template
    place = torch.from_numpy(origin.astype(np.float32)).view(1, 3, 1, 1, 1) + spacing * (voxels + ddf)
    t1, grey, white = warp(template, place - voxels)[0].numpy()
    brain = t1 > 0.1
    tissue = np.stack([1 - grey - white, grey, white]).argmax(0) + 1
    contrast = np.clip(t1, 0, None) ** rng.uniform(0.7, 1.4)
    bias = np.exp(0.2 * random_velocity(shape, ((60.0 / spacing, 1.0),), rng)[0, 0].numpy())
    noise = rng.normal(0, rng.uniform(0.01, 0.03), shape)
    image = brain * np.clip(contrast * bias + noise, 0, None) * rng.uniform(300, 3000)
    return {
        "image": image.astype(np.int16),
        "label": (brain * tissue).astype(np.uint8),
        "ddf": np.moveaxis(ddf[0].numpy(), 0, -1),
        "inverse_ddf": np.moveaxis(exponential(-velocity)[0].numpy(), 0, -1),
    }


def sample_dataset(
    dataset_dir: str | os.PathLike[str],
    num_training: int = 12,
    num_validation: int = 4,
    spacing: float = 4.0,
    seed: int = 0,
) -> str:
    """
    Make a cohort of brains, or find it where it was made before.

    Each subject is the MNI152 T1 template (its grey and white matter give the labels), deformed by a random smooth
    diffeomorphism and given a contrast, a bias field and noise of its own. With ``subject(p) = template(p + ddf(p))``,
    both fields ``ddf`` and ``inverse_ddf`` (in voxels, pull-back) are kept, so that the true field between any two
    subjects is known: see :py:class:`monai_sacb.transforms.ComposeDDFd`.

    Args:
        dataset_dir: folder for the NIfTI files and a Decathlon-style ``dataset.json``. An existing folder with a sample
            of the same arguments is used as it is.
        num_training, num_validation: numbers of subjects.
        spacing: voxel size in mm.
        seed: seed of everything random.

    Returns:
        the folder.

    Raises:
        ValueError: When an argument is out of its range, or the folder holds something else.
        ModuleNotFoundError: When nilearn, which ships the template, is not installed.
    """
    if num_training < 2 or num_validation < 2:
        raise ValueError(f"at least 2 subjects each are needed to form a pair, got {num_training}, {num_validation}.")
    if not 1.0 <= spacing <= 8.0:
        raise ValueError(f"spacing must be between 1 and 8 mm, got {spacing}.")
    folder = Path(dataset_dir)
    made_with = {"num_training": num_training, "num_validation": num_validation, "spacing": spacing, "seed": seed}
    if folder.exists():
        _check_sample(folder, made_with)
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_sample(temporary, made_with, num_training, num_validation, spacing, seed)
        temporary.chmod(0o755)
        try:
            os.replace(temporary, folder)
        except OSError:
            # another process may have made it in the meantime
            _check_sample(folder, made_with)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info(f"Made a sample of {num_training + num_validation} subjects in '{folder}'.")
    return str(folder)


def _check_sample(folder: Path, made_with: dict[str, float]) -> None:
    """Refuse a folder that is not a sample made with the same arguments."""
    try:
        found = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["made_with"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    if found != made_with:
        raise ValueError(f"'{folder}' exists and is not a sample made with {made_with}.")


def _write_sample(
    folder: Path, made_with: dict[str, float], num_training: int, num_validation: int, spacing: float, seed: int
) -> None:
    template, affine = _template(spacing)
    origin, shape = _brain_box(template[0, 0], spacing)
    # the template's axes are those of RAS space
    grid_affine = np.diag([spacing, spacing, spacing, 1.0])
    grid_affine[:3, 3] = affine[:3, :3] @ origin + affine[:3, 3]
    entries = []
    for i in tqdm(range(num_training + num_validation), desc="making the sample", unit="subject"):
        files = {}
        for key, array in _subject(template, origin, shape, spacing, np.random.default_rng([seed, i])).items():
            files[key] = f"./{key}s/brain_{i:02d}.nii.gz"
            path = folder / files[key]
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, grid_affine), path)
        entries.append(files)
    dataset = {
        "name": "monai_sacb sample",
        "description": "MNI152 T1 template under random diffeomorphisms; ddf and inverse_ddf are in voxels",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", **{str(value): name for name, value in SAMPLE_LABELS.items()}},
        "made_with": made_with,
        "numTraining": num_training,
        "training": entries[:num_training],
        "validation": entries[num_training:],
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n", encoding="utf-8")
