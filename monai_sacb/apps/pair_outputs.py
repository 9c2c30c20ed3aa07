# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What one registration writes, all at the files' own grids, and the check that other tools get the same of it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import torch

from monai.data import MetaTensor

from monai_sacb.apps.pair_reading import Subject
from monai_sacb.data.displacement_files import write_displacement
from monai_sacb.data.frames import lps_affine
from monai_sacb.data.itk_images import array_to_itk, quiet_itk, read_itk_header
from monai_sacb.data.point_files import PointSet, write_point_set
from monai_sacb.data.spatial_mapping import (
    PhysicalField,
    SpatialMapping,
    apply_affine,
    invert_mapping,
    resample_volume,
)
from monai_sacb.data.transform_files import write_transform
from monai_sacb.data.volumes import write_volume
from monai_sacb.metrics import jacobian_determinant

__all__ = [
    "OUTPUT_FILES",
    "Outputs",
    "check_by_itk",
    "check_output_folder",
    "output_folder",
    "physical_jacobian",
    "write_outputs",
]

OUTPUT_FILES = (
    "warped.nii.gz",
    "warped_label.nii.gz",
    "fixed_warped.nii.gz",
    "displacement.nii.gz",
    "transform.h5",
    "inverse_displacement.nii.gz",
    "inverse_transform.h5",
    "jacobian.nii.gz",
    "transform.json",
    "metrics.json",
    "report.html",
    "warped_points.csv",
    "warped_points.fcsv",
    "warped_points.mrk.json",
)
# voxels that the check by ITK looks at
MAX_CHECKED_VOXELS = 2_000_000
# voxels from the edge of an image within which rounding decides what is inside
EDGE = 1e-3


def _replace_files(source: Path, target: Path) -> None:
    """Put new files in the place of those of an earlier registration; if that fails, all is as it was."""
    written = sorted(path.name for path in source.iterdir())
    folders = [name for name in {*OUTPUT_FILES, *written} if (target / name).is_dir()]
    if folders:
        raise IsADirectoryError(f"'{target / folders[0]}' is a folder, where a file of the results is to go.")
    old = source / "old"
    old.mkdir()
    try:
        for name in {*OUTPUT_FILES, *written}:
            if (target / name).exists():
                os.replace(target / name, old / name)
        for name in written:
            os.replace(source / name, target / name)
    except BaseException:
        for name in written:
            if not (source / name).exists():
                (target / name).unlink(missing_ok=True)
        for path in old.iterdir():
            os.replace(path, target / path.name)
        raise


def check_output_folder(output_dir: str | os.PathLike[str], inputs: Iterable[str] = ()) -> Path:
    """
    Refuse, before any work, a folder that results cannot go to.

    Args:
        output_dir: the folder, which need not exist.
        inputs: files of which none may be replaced.

    Returns:
        the folder.

    Raises:
        NotADirectoryError: When it is a file, or a link that leads nowhere.
        PermissionError: When nothing can be written there.
        ValueError: When results would replace an input.
    """
    target = Path(output_dir)
    if (target.exists() or target.is_symlink()) and not target.is_dir():
        raise NotADirectoryError(
            f"output_dir '{target}' is {'a file' if target.exists() else 'a link that leads nowhere'}."
        )
    # a link in the output folder would be replaced, too
    places = [place for path in inputs for place in (Path(path).resolve(), Path(path).absolute())]
    clash = [path for path in places if path.parent == target.resolve() and path.name in OUTPUT_FILES]
    if clash:
        raise ValueError(f"output_dir '{target}' holds the input '{clash[0].name}', which the results would replace.")
    above = (target.absolute(), *target.absolute().parents)
    existing = next(folder for folder in above if folder.exists() or folder.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"output_dir '{target}' cannot be made: '{existing}' is no folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir '{target}' cannot be written: there is no permission for '{existing}'.")
    return target


@contextmanager
def output_folder(output_dir: str | os.PathLike[str], inputs: Iterable[str] = ()) -> Iterator[Path]:
    """
    A temporary folder beside the output folder, whose files take their place in it once all are written.

    Files of an earlier registration in the output folder are replaced, others stay. If anything fails before, the
    output folder is as it was.

    Args:
        output_dir: the output folder; it is made where it is missing.
        inputs: files of which none may be replaced.

    Yields:
        the temporary folder.

    Raises:
        OSError: As for :py:func:`check_output_folder`, and when something cannot be written.
        ValueError: When results would replace an input.
    """
    target = check_output_folder(output_dir, inputs)
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if target.is_dir() else target.parent))
        yield temporary
        if target.is_dir():
            _replace_files(temporary, target)
        else:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)
            os.replace(temporary, target)
            made = []
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not target.exists():
            for folder in made:
                try:
                    folder.rmdir()
                except OSError:
                    break


def physical_jacobian(field: PhysicalField, affine: torch.Tensor) -> torch.Tensor:
    """
    Determinant of the gradient of ``x -> affine(x + field(x))`` at each voxel, by central differences.

    Args:
        field: displacements in the fixed image's space.
        affine: ``(4, 4)``, RAS millimetres, applied after the field.

    Returns:
        ``(D, H, W)``, float32.
    """
    to_voxels = torch.linalg.inv(field.affine)[:3, :3].to(field.vectors.dtype)
    factor = float(torch.linalg.det(affine[:3, :3]))
    depth = field.vectors.shape[1]
    result = torch.empty(field.vectors.shape[1:])
    step = max(1, (1 << 21) // max(1, field.vectors[0, 0].numel()))
    for start in range(0, depth, step):
        stop = min(depth, start + step)
        # one more slice on each side, for the differences
        low, high = max(0, start - 1), min(depth, stop + 1)
        ddf = torch.einsum("ij,jdhw->idhw", to_voxels, field.vectors[:, low:high])
        result[start:stop] = jacobian_determinant(ddf[None])[0, start - low : stop - low]
    return result * factor


class Outputs:
    """
    The mappings of a registration at the files' own grids.

    Args:
        moving, fixed: the two subjects.
        displacement: displacements in the fixed image's space, on any grid.
        affine: ``(4, 4)``, RAS millimetres, applied after the displacement.
    """

    def __init__(self, moving: Subject, fixed: Subject, displacement: PhysicalField, affine: torch.Tensor) -> None:
        self.moving, self.fixed, self.affine = moving, fixed, affine
        self.field = displacement.resampled(fixed.grid)
        self.inverse_field, self.inverse_errors = invert_mapping(self.field, affine, moving.grid)
        self.mapping = SpatialMapping([self.field, affine])
        self.inverse = SpatialMapping([self.inverse_field, torch.linalg.inv(affine)])
        self.jacobian = physical_jacobian(self.field, affine)

    def warped_points(self) -> PointSet | None:
        """The landmarks of the moving image at their places in the fixed image."""
        points = self.moving.points
        return None if points is None else points.moved(self.inverse.transform_points(points.positions))


def write_outputs(
    outputs: Outputs, folder: Path, fill: float | None = None, keep_dtype: bool = False
) -> dict[str, str]:
    """
    Write images, fields and points of a registration.

    Args:
        outputs: the mappings.
        folder: an existing folder.
        fill: value outside the images; by default the background of each.
        keep_dtype: write images in the type of their files, rounded and cut off; float32 if not.

    Returns:
        names of the files by what they are.
    """
    moving, fixed = outputs.moving, outputs.fixed
    files = {}
    for key, subject, mapping, grid in (
        ("warped", moving, outputs.mapping, fixed.grid),
        ("fixed_warped", fixed, outputs.inverse, moving.grid),
    ):
        image = resample_volume(subject.image, mapping, grid, fill=subject.background if fill is None else fill)
        dtype = np.dtype(str(subject.image.meta["original_dtype"])) if keep_dtype else np.dtype(np.float32)
        files[key] = f"{key}.nii.gz"
        write_volume(image, folder / files[key], dtype)
    if moving.label is not None:
        files["warped_label"] = "warped_label.nii.gz"
        label = resample_volume(moving.label, outputs.mapping, fixed.grid, mode="label")
        write_volume(label, folder / files["warped_label"])
    for key, mapping, grid in (
        ("", outputs.mapping, fixed.grid),
        ("inverse_", outputs.inverse, moving.grid),
    ):
        files[f"{key}displacement"] = f"{key}displacement.nii.gz"
        write_displacement(mapping.flatten(grid), folder / files[f"{key}displacement"])
        files[f"{key}transform"] = f"{key}transform.h5"
        write_transform(mapping, folder / files[f"{key}transform"])
    files["jacobian"] = "jacobian.nii.gz"
    write_volume(MetaTensor(outputs.jacobian[None], affine=fixed.grid.affine), folder / files["jacobian"], np.float32)
    points = outputs.warped_points()
    if points is not None:
        files["warped_points"] = f"warped_points{points.suffix}"
        write_point_set(points, folder / files["warped_points"])
    return files


def _itk_image(subject: Subject) -> tuple[Any, str]:
    """The image of a subject for ITK, read anew from its file where ITK reads such files, and how it came about."""
    if Path(subject.path).is_file():
        header = read_itk_header(subject.path)
        if header is not None and header.GetNumberOfDimensions() == 3:
            with quiet_itk():
                return itk.imread(subject.path, itk.F), "the moving file, read by ITK,"
    volume = subject.image.numpy()[0].astype(np.float32)
    return array_to_itk(volume, lps_affine(subject.grid.affine)), "the moving image, as it was read here,"


def check_by_itk(outputs: Outputs, folder: Path, background: float, tolerance: float) -> dict[str, Any]:
    """
    Resample the moving image through the written transform by ITK and compare with the written image.

    Of large images only every second or third voxel is looked at, and none that is found at the very edge of the moving
    image, where rounding decides whether it is inside.

    Args:
        outputs: the mappings. The moving image is read anew by ITK where its file is one that ITK reads.
        folder: holds ``warped.nii.gz`` and ``transform.h5``.
        background: what lies outside the moving image.
        tolerance: largest difference that counts as none, of the range of intensities.

    Returns:
        ``max_difference``, of the range of intensities; ``tolerance``; and ``compared``, in words.
    """
    moving, fixed = outputs.moving, outputs.fixed
    kind = itk.Image[itk.F, 3]
    image, origin = _itk_image(moving)
    written = itk.imread(str(folder / "warped.nii.gz"), itk.F)
    # a composite comes as the only entry of a list
    transform = itk.transformread(str(folder / "transform.h5"))[0]
    step = math.ceil((math.prod(fixed.grid.shape) / MAX_CHECKED_VOXELS) ** (1 / 3))
    coarse = fixed.grid.coarser(step)
    resample = itk.ResampleImageFilter[kind, kind].New(
        Input=image,
        Transform=transform,
        Interpolator=itk.LinearInterpolateImageFunction[kind, itk.D].New(),
        DefaultPixelValue=float(background),
        OutputOrigin=itk.origin(written),
        OutputDirection=written.GetDirection(),
        OutputSpacing=[size * step for size in itk.spacing(written)],
        Size=list(coarse.shape),
    )
    resample.Update()
    # arrays have ITK's axes backwards
    theirs = itk.array_from_image(resample.GetOutput()).T
    ours = itk.array_from_image(written).T[::step, ::step, ::step]
    to_voxels = torch.linalg.inv(moving.grid.affine)
    last = torch.tensor(moving.grid.shape, dtype=torch.float64) - 0.5
    edge = torch.empty(coarse.shape, dtype=torch.bool)
    for part, places in coarse.places():
        voxels = apply_affine(to_voxels, outputs.mapping.transform_points(places))
        near = ((voxels + 0.5).abs() < EDGE) | ((voxels - last).abs() < EDGE)
        edge[part] = near.any(1).view(-1, *coarse.shape[1:])
    dtype = nib.load(folder / "warped.nii.gz").get_data_dtype()
    theirs = theirs.astype(np.float64)
    if np.issubdtype(dtype, np.integer):
        # written as whole numbers, of which rounding may choose the next one
        limits = np.iinfo(dtype)
        theirs = np.rint(theirs).clip(limits.min, limits.max)
        difference = np.maximum(np.abs(theirs - ours) - 1, 0)[~edge.numpy()]
    else:
        difference = np.abs(theirs - ours)[~edge.numpy()]
    spread = float(moving.image.max() - moving.image.min())
    return {
        "max_difference": float(difference.max(initial=0.0)) / spread,
        "tolerance": tolerance,
        "compared": f"warped.nii.gz with {origin} resampled by ITK through transform.h5",
    }
