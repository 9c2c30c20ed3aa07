# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import itk
import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from monai.data import MetaTensor

from monai_sacb.data.foreground import CT_AIR, foreground_mask
from monai_sacb.data.frames import LPS_TO_RAS
from monai_sacb.data.itk_images import array_to_itk, itk_reason
from monai_sacb.utils import check_count, image_name, plain_tensor

__all__ = ["AffineRegistration", "estimate_affine"]

# Hounsfield units: what lies below is padding, not air
CT_LOWEST = -1024.0
# intensities beyond these shares of the voxels do not stretch the histogram
INTENSITY_SHARES = (0.001, 0.995)
# mm around the foreground where points are drawn too: outlines align images
RIM = 10.0
# voxels that a level must have along the foreground's shortest side, and along any axis
SIDE_VOXELS = 16
AXIS_VOXELS = 4
# share of the points that must fall into the moving image
MIN_OVERLAP = 0.2
# starts that are descended from
DESCENTS = 4


class _Image(NamedTuple):
    """A volume ready to be measured: values, affine to LPS mm, where it shows something, where it may be looked at."""

    array: np.ndarray
    affine: np.ndarray
    foreground: np.ndarray
    mask: np.ndarray | None

    @property
    def spacing(self) -> np.ndarray:
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def centre(self) -> np.ndarray:
        """Centre of mass of the foreground, which counts the same everywhere: contrasts differ, outlines less so."""
        weights = self.foreground if self.mask is None else self.foreground & self.mask
        return _apply(self.affine, np.array(ndimage.center_of_mass(weights if weights.any() else self.foreground)))

    def side(self) -> float:
        """The shortest side of the box around the foreground, mm."""
        box = ndimage.find_objects(self.foreground.astype(np.uint8))[0]
        return float(min((part.stop - part.start) * size for part, size in zip(box, self.spacing)))


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.asarray(points @ affine[:3, :3].T + affine[:3, 3])


def _prepare(image: Any, mask: Any, name: str) -> _Image:
    """Check an image and its mask, and cut outliers off its intensities."""
    if not isinstance(image, MetaTensor) or image.dim() != 4 or len(image) != 1 or min(image.shape) < 1:
        raise ValueError(
            f"{name} must have shape (1, D, H, W) and an affine, got {type(image).__name__}"
            f" {list(getattr(image, 'shape', ()))}."
        )
    named = image_name(name, image)
    if min(image.shape[1:]) < AXIS_VOXELS:
        raise ValueError(
            f"{named} must have {AXIS_VOXELS} voxels or more along every axis, got {list(image.shape[1:])}."
        )
    array = plain_tensor(image)[0].detach().cpu().float().numpy()
    affine = image.affine.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{named} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite voxels.")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"{named} has an affine that cannot be inverted: {affine.tolist()}.")
    selected = None
    if mask is not None:
        if tuple(mask.shape) != tuple(image.shape):
            raise ValueError(f"the mask of {named} must have its shape {list(image.shape)}, got {list(mask.shape)}.")
        selected = plain_tensor(mask)[0].detach().cpu().numpy() != 0
        if not selected.any():
            raise ValueError(f"the mask of {named} is empty.")
    foreground = foreground_mask(image)[0].cpu().numpy()
    low = float(np.quantile(array[::2, ::2, ::2], INTENSITY_SHARES[0]))
    high = float(np.quantile(array[foreground], INTENSITY_SHARES[1]))
    if array.min() <= CT_AIR:
        low = max(low, CT_LOWEST)
    if high <= low:
        low, high = float(array.min()), float(array.max())
    if high <= low:
        raise ValueError(f"{named} is constant, {low:g} everywhere; there is nothing to register.")
    return _Image((array.clip(low, high) - low) / (high - low), LPS_TO_RAS @ affine, foreground, selected)


def _coarser(image: _Image, spacing: float) -> _Image:
    """The image smoothed and thinned out to about a voxel size in mm, along each axis as far as it is finer."""
    strides = [
        min(max(1, round(spacing / size)), max(1, length // AXIS_VOXELS))
        for size, length in zip(image.spacing, image.array.shape)
    ]
    sigmas = [0.5 * stride if stride > 1 else 0.0 for stride in strides]
    smooth = ndimage.gaussian_filter(image.array, sigmas, mode="nearest", truncate=3) if any(sigmas) else image.array
    starts = [(length - 1) % stride // 2 for length, stride in zip(image.array.shape, strides)]
    thin = tuple(slice(start, None, stride) for start, stride in zip(starts, strides))
    step = np.eye(4)
    step[:3, :3] = np.diag(strides)
    step[:3, 3] = starts
    mask = None if image.mask is None else image.mask[thin]
    if image.mask is not None and mask is not None and not mask.any():
        # too small a mask for these voxels: they count where any of theirs does
        mask = ndimage.maximum_filter(image.mask, strides)[thin]
    return _Image(smooth[thin], image.affine @ step, image.foreground[thin], mask)


def _draw_points(fixed: _Image, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places ``(N, 3)``, LPS mm, in and around the foreground, or in the mask; between voxels, to favour no grid."""
    if fixed.mask is None or not fixed.mask.any():
        distance = ndimage.distance_transform_edt(~fixed.foreground, fixed.spacing)
        candidates = np.flatnonzero(distance <= RIM) if fixed.foreground.any() else np.arange(fixed.array.size)
    else:
        candidates = np.flatnonzero(fixed.mask)
    chosen = rng.choice(candidates, min(count, len(candidates)), replace=False)
    voxels = np.stack(np.unravel_index(np.sort(chosen), fixed.array.shape), -1) + rng.random((len(chosen), 3)) - 0.5
    return _apply(fixed.affine, voxels.clip(0, np.array(fixed.array.shape) - 1))


class _Level:
    """
    Mutual information of two images of one resolution under affines ``(4, 4)`` in LPS mm, by ITK, and its descent.

    The points are drawn once, so that values can be compared and the same seed gives the same bits.
    """

    def __init__(
        self, moving: _Image, fixed: _Image, num_points: int, num_bins: int, num_threads: int, rng: np.random.Generator
    ) -> None:
        points = _draw_points(fixed, num_points, rng)
        self.places = points
        self.moving = moving
        self.to_voxels = np.linalg.inv(moving.affine)
        self.centre = points.mean(0)
        # mm that a place moves, in the mean, by a change of one in a column of the matrix
        self.radii = np.sqrt(((points - self.centre) ** 2).mean(0)).clip(min=1e-3)
        # ITK does not keep Python's objects alive
        self.images = [array_to_itk(image.array.astype(np.float32), image.affine) for image in (fixed, moving)]
        self.points = itk.PointSet[itk.F, 3].New()
        for index, point in enumerate(points.tolist()):
            self.points.SetPoint(index, point)
        if moving.mask is not None:
            self.mask = itk.ImageMaskSpatialObject[3].New()
            self.mask.SetImage(array_to_itk(moving.mask.astype(np.uint8), moving.affine))
            self.mask.Update()
        self.transform = itk.AffineTransform[itk.D, 3].New()
        self.transform.SetCenter(self.centre.tolist())
        self.parameters = itk.OptimizerParameters[itk.D](12)
        self.derivative = itk.Array[itk.D]()
        self.num_bins = num_bins
        self.num_threads = num_threads
        self.metric = self._new_metric()

    def _new_metric(self) -> Any:
        image_type = itk.Image[itk.F, 3]
        metric = itk.MattesMutualInformationImageToImageMetricv4[image_type, image_type].New()
        metric.SetFixedImage(self.images[0])
        metric.SetMovingImage(self.images[1])
        metric.SetVirtualDomainFromImage(self.images[0])
        metric.SetNumberOfHistogramBins(self.num_bins)
        metric.SetUseFixedImageGradientFilter(False)
        metric.SetUseMovingImageGradientFilter(False)
        metric.SetMaximumNumberOfWorkUnits(self.num_threads)
        metric.SetFixedSampledPointSet(self.points)
        metric.SetUseSampledPointSet(True)
        if self.moving.mask is not None:
            metric.SetMovingImageMask(self.mask)
        metric.SetMovingTransform(self.transform)
        metric.Initialize()
        return metric

    def _parameters(self, affine: np.ndarray) -> np.ndarray:
        """The matrix row by row, and the shift of the centre."""
        shift = _apply(affine, self.centre) - self.centre
        return np.concatenate([affine[:3, :3].ravel(), shift])

    def _affine(self, parameters: np.ndarray) -> np.ndarray:
        affine = np.eye(4)
        affine[:3, :3] = parameters[:9].reshape(3, 3)
        affine[:3, 3] = parameters[9:] + self.centre - affine[:3, :3] @ self.centre
        return affine

    def _overlap(self, affine: np.ndarray) -> float:
        """Share of the points that fall into the moving image and its mask."""
        voxels = np.rint(_apply(self.to_voxels @ affine, self.places)).astype(np.int64)
        inside = ((voxels >= 0) & (voxels < self.moving.array.shape)).all(1)
        if self.moving.mask is not None:
            inside[inside] = self.moving.mask[tuple(voxels[inside].T)]
        return float(inside.mean())

    def _measure(self, parameters: np.ndarray, derive: bool = False) -> tuple[float, float, np.ndarray]:
        """Mutual information, share of the points that it is from, and its derivative."""
        share = self._overlap(self._affine(parameters))
        gradient = np.zeros(12)
        if share < MIN_OVERLAP:
            return 0.0, share, gradient
        for index, value in enumerate(parameters.tolist()):
            self.parameters.SetElement(index, value)
        self.transform.SetParameters(self.parameters)
        try:
            if derive:
                # ITK gives the direction of descent of -MI
                self.metric.GetDerivative(self.derivative)
                value = -self.metric.GetCurrentValue()
                gradient = np.array([self.derivative.GetElement(index) for index in range(12)])
            else:
                value = -self.metric.GetValue()
        except RuntimeError:
            # nothing to compare; a metric that has failed once crashes the process when it is asked again
            self.metric = self._new_metric()
            return 0.0, share, np.zeros(12)
        if not math.isfinite(value) or not np.isfinite(gradient).all():
            return 0.0, share, np.zeros(12)
        return value, share, gradient

    def score(self, affine: np.ndarray) -> float:
        """
        Mutual information times the share of the points inside the moving image, which keeps one that shows little of
        it from winning; 0 where they hardly overlap.
        """
        value, share, _ = self._measure(self._parameters(affine))
        return value * share

    def descend(self, affine: np.ndarray, stage: str, iterations: int) -> np.ndarray:
        """The affine near one with the most mutual information, turned and shifted, scaled as well, or any."""
        start = self._parameters(affine)
        radius = float(np.sqrt((self.radii**2).sum()))

        def parameters(steps: np.ndarray) -> np.ndarray:
            """Of steps, all in mm, from the start."""
            if stage == "affine":
                return start + np.concatenate([(steps[:9].reshape(3, 3) / self.radii).ravel(), steps[9:]])
            turn = Rotation.from_rotvec(steps[3:6] / radius).as_matrix()
            scale = math.exp(steps[6] / radius) if stage == "similarity" else 1.0
            return np.concatenate([(scale * turn @ start[:9].reshape(3, 3)).ravel(), start[9:] + steps[:3]])

        def objective(steps: np.ndarray) -> tuple[float, np.ndarray]:
            value, _, gradient = self._measure(parameters(steps), derive=True)
            # smooth functions of a few numbers: central differences are exact to the tenth digit
            small = 1e-4 * np.eye(len(steps))
            jacobian = [(parameters(steps + step) - parameters(steps - step)) / 2e-4 for step in small]
            return -value, -np.stack(jacobian) @ gradient

        count = {"rigid": 6, "similarity": 7, "affine": 12}[stage]
        found = minimize(
            objective,
            np.zeros(count),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-7, "gtol": 1e-6},
        )
        return self._affine(parameters(found.x))


def _about(affine: np.ndarray, turn: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """An affine after a rotation about a place of its own space."""
    before = np.eye(4)
    before[:3, :3] = turn
    before[:3, 3] = centre - turn @ centre
    return np.asarray(affine @ before)


def _check_numbers(name: str, values: Any) -> None:
    plain = not isinstance(values, str) and isinstance(values, Sequence) and len(values) > 0
    if not plain or any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite numbers, got {values!r}.")


class AffineRegistration:
    """
    Estimate the affine between two volumes of any contrast, by ITK's Mattes mutual information.

    Headers may say where the images lie, or nothing: the search starts from the headers' alignment and from the centres
    of mass of the two foregrounds, each turned in a grid of angles; the best few are descended from, coarse to fine,
    rigid, with one scale, then affine (L-BFGS, all steps in mm). What is returned is never worse, by mutual information
    times overlap on the finest level, than the headers' alignment, the centres of mass or the affine given.

    Args:
        spacings: voxel sizes of the levels, mm, coarse to fine. Small objects take finer ones.
        iterations: of each stage on each level, at most; as many as ``spacings``.
        num_points: places in the fixed image that are looked at, at most. They are drawn in and around its foreground,
            or in its mask.
        num_bins: of the joint histogram, along each side.
        angles: degrees that starts are turned by about each axis, all combinations.
        max_zoom: by how much the affine may stretch or shrink; where it does more, the stage before stands.
        seed: of the places. The same seed gives the same bits.
        num_threads: of the metric. With more than one, sums are added in varying order: results differ in last digits.

    Raises:
        ValueError: When a number is out of its range.
    """

    def __init__(
        self,
        spacings: Sequence[float] = (8.0, 4.0, 2.0),
        iterations: Sequence[int] = (60, 60, 40),
        num_points: int = 20000,
        num_bins: int = 32,
        angles: Sequence[float] = (-40.0, -20.0, 0.0, 20.0, 40.0),
        max_zoom: float = 2.0,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        _check_numbers("spacings", spacings)
        _check_numbers("iterations", iterations)
        _check_numbers("angles", angles)
        _check_numbers("max_zoom", [max_zoom])
        if min(spacings) <= 0 or list(spacings) != sorted(spacings, reverse=True):
            raise ValueError(f"spacings must be positive and fall from level to level, got {list(spacings)}.")
        if len(iterations) != len(spacings) or min(iterations) < 1 or any(int(count) != count for count in iterations):
            raise ValueError(
                f"iterations must be whole numbers of at least 1, one for each of {len(spacings)} spacings, got "
                f"{list(iterations)}."
            )
        check_count("num_points", num_points, 1000)
        check_count("num_bins", num_bins, 8)
        check_count("seed", seed, 0)
        check_count("num_threads", num_threads, 1)
        if max_zoom <= 1:
            raise ValueError(f"max_zoom must be above 1, got {max_zoom}.")
        self.spacings = tuple(float(spacing) for spacing in spacings)
        self.iterations = tuple(int(count) for count in iterations)
        self.num_points = int(num_points)
        self.num_bins = int(num_bins)
        self.angles = tuple(float(angle) for angle in angles)
        self.max_zoom = float(max_zoom)
        self.seed = int(seed)
        self.num_threads = int(num_threads)

    def __call__(
        self,
        moving: MetaTensor,
        fixed: MetaTensor,
        fixed_mask: torch.Tensor | None = None,
        moving_mask: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            moving: ``(1, D, H, W)`` with its affine to RAS millimetres, 4 voxels or more along every axis.
            fixed: likewise, of any other size, spacing and orientation.
            fixed_mask: of the fixed image's shape; only where it is not 0 are the images compared.
            moving_mask: likewise for the moving image.
            initial: ``(4, 4)``, RAS millimetres, pull-back: a start besides those that the images give.
            progress: called with the name of each stage before it.

        Returns:
            ``(4, 4)``, float64, RAS millimetres, pull-back: fixed point -> moving point.

        Raises:
            ValueError: When an argument is not as said, an image is constant or not finite, a mask is empty, or the
                images cannot be registered.
        """
        images = _prepare(moving, moving_mask, "moving image"), _prepare(fixed, fixed_mask, "fixed image")
        starts = [np.eye(4)]
        if initial is not None:
            given = torch.as_tensor(initial, dtype=torch.float64).cpu().numpy()
            if given.shape != (4, 4) or not np.isfinite(given).all() or abs(np.linalg.det(given)) < 1e-12:
                raise ValueError(f"initial must be a finite affine (4, 4) that can be inverted, got {given.tolist()}.")
            starts.append(LPS_TO_RAS @ given @ LPS_TO_RAS)
        try:
            affine = self._register(*images, starts, progress or (lambda stage: None))
        except RuntimeError as error:
            raise ValueError(
                f"{image_name('moving image', moving)} and {image_name('fixed image', fixed)} cannot be registered by "
                f"an affine: {itk_reason(error)}"
            ) from error
        if affine is None:
            raise ValueError(
                f"{image_name('moving image', moving)} and {image_name('fixed image', fixed)} cannot be registered by "
                f"an affine: neither by their headers nor by their centres of mass do they overlap by "
                f"{100 * MIN_OVERLAP:g} % and have anything in common; look at the masks, where there are any."
            )
        return torch.from_numpy(np.ascontiguousarray(LPS_TO_RAS @ affine @ LPS_TO_RAS))

    def _register(
        self, moving: _Image, fixed: _Image, starts: list[np.ndarray], progress: Callable[[str], None]
    ) -> np.ndarray | None:
        """The affine in LPS mm; None where there is no start with any mutual information."""
        rng = np.random.default_rng(self.seed)
        centre, centred = fixed.centre(), np.eye(4)
        centred[:3, 3] = moving.centre() - centre
        starts = [*starts, centred]
        # levels that leave too little of a small object are finer; those of a coarse image are what it has
        finest = min(moving.side(), fixed.side()) / SIDE_VOXELS
        sizes = [min(spacing, finest) for spacing in self.spacings]
        # the coarse levels come from the finest: smoothing the whole images each time is most of the work
        moving, fixed = _coarser(moving, sizes[-1]), _coarser(fixed, sizes[-1])
        current: list[np.ndarray] = []
        level = None
        for index, (size, iterations) in enumerate(zip(sizes, self.iterations)):
            progress(f"affine at {size:.3g} mm")
            level = _Level(
                _coarser(moving, size), _coarser(fixed, size), self.num_points, self.num_bins, self.num_threads, rng
            )
            if index == 0:
                current = self._search(level, starts, centre)
                if not current:
                    return None
            current = [level.descend(affine, "rigid" if index == 0 else "similarity", iterations) for affine in current]
            current = [max(current, key=level.score)]
            rigid = current[0]
            if index > 0 or len(self.spacings) == 1:
                bent = level.descend(rigid, "affine", iterations)
                zooms = np.linalg.svd(bent[:3, :3], compute_uv=False)
                if zooms.max() > self.max_zoom or zooms.min() < 1 / self.max_zoom or np.linalg.det(bent) < 0:
                    logging.getLogger(__name__).warning(
                        f"The affine at {size:.3g} mm would stretch by {zooms.tolist()}; it is left out."
                    )
                elif level.score(bent) > level.score(rigid):
                    current = [bent]
        candidates = [*current, *starts]
        scores = [level.score(affine) for affine in candidates] if level is not None else []
        best = int(np.argmax(scores))
        logging.getLogger(__name__).info(f"mutual information of result, headers, ..., centres of mass: {scores}")
        return candidates[best]

    def _search(self, level: _Level, starts: list[np.ndarray], centre: np.ndarray) -> list[np.ndarray]:
        """The best of all starts at all angles, and each of the starts as it is."""
        turns = [
            Rotation.from_euler("xyz", (x, y, z), degrees=True).as_matrix()
            for x in self.angles
            for y in self.angles
            for z in self.angles
        ]
        turned = [_about(start, turn, centre) for start in starts for turn in turns]
        scored = sorted(((level.score(affine), -number) for number, affine in enumerate(turned)), reverse=True)
        best = [turned[-number] for value, number in scored[:DESCENTS] if value > 0]
        return [*best, *(start for start in starts if level.score(start) > 0)]


def estimate_affine(
    moving: MetaTensor,
    fixed: MetaTensor,
    fixed_mask: torch.Tensor | None = None,
    moving_mask: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """
    Estimate the affine between two volumes: :py:class:`AffineRegistration` as a function.

    Args:
        moving, fixed, fixed_mask, moving_mask, initial, progress: as for its call.
        **options: as for its making, such as ``seed`` and ``num_threads``.

    Returns:
        ``(4, 4)``, float64, RAS millimetres, pull-back: fixed point -> moving point.

    Raises:
        ValueError: When an argument is not as said, or the images cannot be registered.
    """
    return AffineRegistration(**options)(moving, fixed, fixed_mask, moving_mask, initial, progress)
