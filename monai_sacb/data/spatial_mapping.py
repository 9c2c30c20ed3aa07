# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Mappings of physical space, and images looked up through them as ITK looks them up.

Everything here is in RAS millimetres and pulls back: a mapping takes a place in the fixed image's space to its partner
in the moving image's space. Grids and images are 3-D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from monai.data import MetaTensor

from monai_sacb.utils import plain_tensor

__all__ = [
    "Grid",
    "InverseMapping",
    "PhysicalField",
    "PointMapping",
    "SpatialMapping",
    "invert_mapping",
    "resample_volume",
    "sample_volume",
]

# points that are looked at in one go: bounds the memory whatever the size of a grid
CHUNK = 1 << 20
# of a voxel: over which a field is taken for linear where its gradient is needed
NEWTON_STEP = 0.25
# voxels from which on an inverse is first looked for on a coarser grid
LARGE = 1 << 18


class Grid(NamedTuple):
    """
    Where the voxels of a volume lie.

    Args:
        shape: number of voxels along the three array axes.
        affine: ``(4, 4)``, float64, voxels to RAS millimetres.
    """

    shape: tuple[int, int, int]
    affine: torch.Tensor

    @classmethod
    def of(cls, image: Any) -> Grid:
        """The grid of an image ``(C, D, H, W)`` with its affine (``MetaTensor``)."""
        if not isinstance(image, MetaTensor) or image.dim() != 4:
            raise ValueError(f"a volume (C, D, H, W) with meta data is needed, got {type(image).__name__}.")
        depth, height, width = (int(size) for size in image.shape[1:])
        return cls((depth, height, width), torch.as_tensor(image.affine, dtype=torch.float64, device="cpu"))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel along the array axes, millimetres."""
        first, second, third = self.affine[:3, :3].norm(dim=0).tolist()
        return first, second, third

    def coarser(self, step: int) -> Grid:
        """The grid of every ``step``-th voxel along each axis, the first one included."""
        scale = torch.diag(torch.tensor([step, step, step, 1.0], dtype=torch.float64))
        depth, height, width = (-(-size // step) for size in self.shape)
        return Grid((depth, height, width), self.affine @ scale)

    def places(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The places of all voxels, RAS millimetres, ``(N, 3)``, in pieces, each with its slices along axis 0."""
        depth, height, width = self.shape
        step = max(1, CHUNK // max(1, height * width))
        for start in range(0, depth, step):
            part = slice(start, min(depth, start + step))
            axes = [torch.arange(part.start, part.stop), torch.arange(height), torch.arange(width)]
            voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3).double()
            yield part, apply_affine(self.affine, voxels)


class PhysicalField(NamedTuple):
    """
    Displacements on a grid, linear between voxels, and none outside the grid, as ITK has it.

    Args:
        vectors: ``(3, D, H, W)``, float32, RAS millimetres, from each voxel's place to its partner's.
        affine: ``(4, 4)``, float64, voxels to RAS millimetres.
    """

    vectors: torch.Tensor
    affine: torch.Tensor

    @property
    def grid(self) -> Grid:
        _, depth, height, width = self.vectors.shape
        return Grid((depth, height, width), self.affine)

    def displacements(self, points: torch.Tensor, fill: float | None = 0.0) -> torch.Tensor:
        """Displacements ``(N, 3)``, float64, at points ``(N, 3)``; outside the grid ``fill``, or as at its border."""
        return sample_volume(self.vectors, apply_affine(torch.linalg.inv(self.affine), points), fill=fill).double().T

    def resampled(self, grid: Grid) -> PhysicalField:
        """The same displacements on another grid; outside the own one, those at its border."""
        vectors = torch.empty(3, *grid.shape)
        for part, places in grid.places():
            vectors[:, part] = self.displacements(places, fill=None).T.reshape(3, -1, *grid.shape[1:]).float()
        return PhysicalField(vectors, grid.affine)


def apply_affine(affine: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Points ``(N, 3)`` under an affine ``(4, 4)``, float64."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def inside_buffer(voxels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Which of the places ``(N, 3)`` in voxels lie in an image, half a voxel around its outermost centres included."""
    size = torch.tensor(list(shape), dtype=voxels.dtype, device=voxels.device)
    return ((voxels >= -0.5) & (voxels < size - 0.5)).all(1)


def _linear(volume: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Values ``(C, N)`` of a volume at places in voxels, beyond the outermost centres as there."""
    last = torch.tensor([max(size - 1, 1) for size in volume.shape[1:]], dtype=voxels.dtype, device=voxels.device)
    # grid_sample wants coordinates in [-1, 1], last axis first
    places = (2 * voxels / last - 1).flip(-1).to(volume.dtype)
    values = F.grid_sample(volume[None], places.view(1, -1, 1, 1, 3), padding_mode="border", align_corners=True)
    return values.view(volume.shape[0], -1)


def _lookup(volume: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Values ``(C, N)`` at whole voxels ``(N, 3)``, beyond the outermost as there."""
    _, depth, height, width = volume.shape
    i, j, k = (indices[:, axis].clamp(0, size - 1) for axis, size in enumerate((depth, height, width)))
    return volume.flatten(1)[:, (i * height + j) * width + k]


def _majority(volume: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """
    The label ``(1, N)`` with the largest linear weight among the eight voxels around each place; of equal ones the
    smallest. As warping a map of each label linearly and taking the largest, at a cost that no number of labels raises.
    """
    low = voxels.floor()
    upper = (voxels - low).T
    low = low.long()
    corners = torch.cartesian_prod(*[torch.arange(2, device=voxels.device)] * 3)
    values = torch.cat([_lookup(volume, low + corner) for corner in corners])
    result = values[:1].clone()
    # most places lie inside a structure
    mixed = (values != values[:1]).any(0).nonzero()[:, 0]
    values, upper = values[:, mixed], upper[:, mixed]
    weights = torch.stack(
        [torch.where(corner[:, None] == 1, upper, 1 - upper).prod(0) for corner in corners.to(upper.dtype)]
    )
    # sorted, so that of labels with equal weights the smallest comes first
    values, order = values.sort(0)
    weights = weights.gather(0, order)
    votes = torch.stack([(weights * (values == value)).sum(0) for value in values])
    # rounding must not decide between equals
    winner = (votes >= votes.amax(0) - 1e-9).to(torch.uint8).argmax(0, keepdim=True)
    result[0, mixed] = values.gather(0, winner)[0]
    return result


def sample_volume(
    volume: torch.Tensor, voxels: torch.Tensor, mode: str = "linear", fill: float | None = 0.0
) -> torch.Tensor:
    """
    Values of a volume at places in voxels, by ITK's rule of what is inside.

    Args:
        volume: ``(C, D, H, W)``.
        voxels: ``(N, 3)``, float64.
        mode: ``"linear"``; ``"nearest"``, where halves go up; or ``"label"``, the label with the largest linear weight.
        fill: what lies outside; None for the value at the border.

    Returns:
        ``(C, N)``; float32 (float64 of a float64 volume) if linear, else of the type of the volume.

    Raises:
        ValueError: When the mode is unknown.
    """
    if mode == "linear":
        values = _linear(volume if volume.dtype == torch.float64 else volume.float(), voxels)
    elif mode == "nearest":
        values = _lookup(volume, (voxels + 0.5).floor().long())
    elif mode == "label":
        values = torch.cat([_majority(volume[channel, None], voxels) for channel in range(len(volume))])
    else:
        raise ValueError(f"mode must be 'linear', 'nearest' or 'label', got '{mode}'.")
    if fill is not None:
        values[:, ~inside_buffer(voxels, volume.shape[1:])] = fill
    return values


def _newton(
    displacement: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    points: torch.Tensor,
    error: torch.Tensor,
    step: float,
    num_steps: int = 15,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Solve ``x + u(x) = target`` where the fixed-point iteration does not come to an end, as where the mapping shrinks.

    Newton's steps with the gradient from differences over ``step``, halved where they do not help.
    """
    points, error = points.clone(), error.clone()
    scale = torch.ones_like(error)
    for _ in range(num_steps if len(points) else 0):
        here = displacement(points)
        shifts = step * torch.eye(3, dtype=points.dtype)
        columns = [(displacement(points + shift) - here) / step for shift in shifts]
        gradient = torch.stack(columns, -1) + torch.eye(3, dtype=points.dtype)
        # where the mapping folds the gradient has no inverse; a slope of one then
        singular = torch.linalg.det(gradient).abs() < 1e-3
        gradient[singular] = torch.eye(3, dtype=points.dtype)
        moved = points + scale[:, None] * torch.linalg.solve(gradient, target - points - here)
        distance = (moved + displacement(moved) - target).norm(dim=1)
        better = distance < error
        points[better], error[better] = moved[better], distance[better]
        scale = torch.where(better, (2 * scale).clamp(max=1.0), scale / 2)
    return points, error


def _solve(
    displacement: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    guess: torch.Tensor,
    step: float,
    num_steps: int,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Solve ``x + u(x) = target`` by fixed-point iteration, and by damped Newton steps where that does not converge.

    Args:
        displacement: ``u``, of points ``(N, 3)`` in millimetres.
        target: ``(N, 3)``, float64.
        guess: where to start, likewise.
        step: millimetres over which ``u`` is taken for linear.
        num_steps: fixed-point iterations at most.
        tolerance: millimetres; a point is done when it is mapped as close to its target.

    Returns:
        the points, and how far from its target each one is mapped: ``(N, 3)`` and ``(N,)``. Where the mapping folds
        that may be no solution, but the best place that was met.
    """
    current, active = guess, torch.arange(len(target))
    # the best place so far, and how far it is from where it should be mapped to
    found, error = guess.clone(), torch.full([len(target)], torch.inf, dtype=torch.float64)
    for _ in range(num_steps + 1):
        moved = target[active] - displacement(current)
        distance = (moved - current).norm(dim=1)
        better = distance < error[active]
        found[active[better]], error[active[better]] = current[better], distance[better]
        rest = distance > tolerance
        if not bool(rest.any()):
            break
        active, current = active[rest], moved[rest]
    left = (error > tolerance).nonzero()[:, 0]
    found[left], error[left] = _newton(displacement, target[left], found[left], error[left], step)
    return found, error


class PointMapping(Protocol):
    """Anything that takes points ``(N, 3)`` in RAS millimetres to others."""

    def transform_points(self, points: torch.Tensor) -> torch.Tensor:
        """Where points go, ``(N, 3)``, float64."""


class SpatialMapping:
    """
    A mapping of space in stages, of which each is an affine or a displacement field.

    Args:
        stages: in the order in which points go through them (ITK's composite transforms list them backwards):
            affines ``(4, 4)`` of RAS millimetres, and :py:class:`PhysicalField`. None are the identity.

    Raises:
        ValueError: When a stage is neither, or not finite.
    """

    def __init__(self, stages: Iterable[torch.Tensor | PhysicalField] = ()) -> None:
        checked: list[torch.Tensor | PhysicalField] = []
        for stage in stages:
            if isinstance(stage, PhysicalField):
                if stage.vectors.dim() != 4 or len(stage.vectors) != 3 or stage.affine.shape != (4, 4):
                    raise ValueError(
                        "a displacement field must have vectors (3, D, H, W) and an affine (4, 4), got "
                        f"{list(stage.vectors.shape)} and {list(stage.affine.shape)}."
                    )
                bad = int((~torch.isfinite(stage.vectors)).sum())
                if bad:
                    raise ValueError(f"a displacement field must be finite, got {bad} NaN or infinite values.")
                stage = PhysicalField(plain_tensor(stage.vectors).float(), stage.affine.double())
            else:
                stage = torch.as_tensor(stage, dtype=torch.float64)
                if stage.shape != (4, 4) or not bool(torch.isfinite(stage).all()):
                    raise ValueError(f"an affine must be finite and (4, 4), got {stage.tolist()}.")
            checked.append(stage)
        self.stages = tuple(checked)

    def transform_points(self, points: torch.Tensor) -> torch.Tensor:
        """
        Where points go.

        Args:
            points: ``(N, 3)``, RAS millimetres of the fixed image's space.

        Returns:
            ``(N, 3)``, RAS millimetres of the moving image's space, float64.
        """
        if points.dim() != 2 or points.shape[1] != 3:
            raise ValueError(f"points must have shape (N, 3), got {list(points.shape)}.")
        points = points.double()
        for stage in self.stages:
            if isinstance(stage, PhysicalField):
                points = points + stage.displacements(points)
            else:
                points = apply_affine(stage, points)
        return points

    def inverse_transform_points(
        self, points: torch.Tensor, num_steps: int = 100, tolerance: float = 1e-4
    ) -> torch.Tensor:
        """
        Where points come from: the inverse, stage by stage, of fields by iteration.

        Args:
            points: ``(N, 3)``, RAS millimetres of the moving image's space.
            num_steps: iterations at most.
            tolerance: millimetres; a point is done when it is mapped as close to where it should.

        Returns:
            ``(N, 3)``, RAS millimetres of the fixed image's space, float64. Where a field folds, a place near by.
        """
        points = points.double()
        for stage in reversed(self.stages):
            if isinstance(stage, PhysicalField):
                points, _ = _solve(
                    stage.displacements, points, points, NEWTON_STEP * min(stage.grid.spacing), num_steps, tolerance
                )
            else:
                points = apply_affine(torch.linalg.inv(stage), points)
        return points

    def flatten(self, grid: Grid) -> PhysicalField:
        """The whole mapping as one displacement field on a grid of the fixed image's space."""
        vectors = torch.empty(3, *grid.shape)
        for part, places, moved in moved_grid(self, grid):
            vectors[:, part] = (moved - places).T.reshape(3, -1, *grid.shape[1:]).float()
        return PhysicalField(vectors, grid.affine)


class InverseMapping:
    """
    The inverse of a mapping, found anew for each point.

    Args:
        mapping: what is to be undone.
    """

    def __init__(self, mapping: SpatialMapping) -> None:
        self.mapping = mapping

    def transform_points(self, points: torch.Tensor) -> torch.Tensor:
        """Where points come from; see :py:meth:`SpatialMapping.inverse_transform_points`."""
        return self.mapping.inverse_transform_points(points)


def moved_grid(mapping: PointMapping, grid: Grid) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The places of a grid's voxels and where a mapping takes them, in pieces as of :py:meth:`Grid.places`."""
    stages = mapping.stages if isinstance(mapping, SpatialMapping) else ()
    first = stages[0] if stages and isinstance(stages[0], PhysicalField) else None
    # most often a field lies on the grid that is asked for: its vectors need no interpolation
    if first is not None and (first.grid.shape != grid.shape or not torch.equal(first.affine, grid.affine)):
        first = None
    rest = mapping if first is None else SpatialMapping(stages[1:])
    for part, places in grid.places():
        start = places if first is None else places + first.vectors[:, part].reshape(3, -1).T.double()
        yield part, places, rest.transform_points(start)


def resample_volume(
    image: MetaTensor, mapping: PointMapping, grid: Grid, mode: str = "linear", fill: float = 0.0
) -> MetaTensor:
    """
    Look an image up through a mapping, at each voxel of a grid, once.

    Args:
        image: on the moving side, ``(C, D, H, W)`` with its affine.
        mapping: from the space of the grid to that of the image.
        grid: what the result lies on.
        mode: as for :py:func:`sample_volume`.
        fill: what lies outside the image.

    Returns:
        ``(C, *grid.shape)`` with the affine of the grid; float32 if linear (float64 of float64), else of the type of
        the image. It keeps no other meta data.
    """
    to_voxels = torch.linalg.inv(Grid.of(image).affine)
    volume = plain_tensor(image)
    linear = volume.dtype if volume.dtype == torch.float64 else torch.float32
    result = torch.empty(len(volume), *grid.shape, dtype=linear if mode == "linear" else volume.dtype)
    for part, _, moved in moved_grid(mapping, grid):
        voxels = apply_affine(to_voxels, moved)
        result[:, part] = sample_volume(volume, voxels, mode, fill).view(len(volume), -1, *grid.shape[1:])
    return MetaTensor(result, affine=grid.affine)


def invert_mapping(
    field: PhysicalField,
    affine: torch.Tensor,
    grid: Grid,
    num_steps: int = 50,
    tolerance: float = 1e-3,
) -> tuple[PhysicalField, torch.Tensor]:
    """
    The inverse of ``x -> affine(x + field(x))``, as a mapping of the same form on a grid of the moving image's space.

    By fixed-point iteration at every voxel y of the grid: ``x <- affine⁻¹(y) - field(x)``, and by damped Newton steps
    where it does not converge. Outside its grid the field counts as at the border, so that the inverse has no jump
    there.

    Args:
        field: the displacement, in the fixed image's space.
        affine: ``(4, 4)``, RAS millimetres, after the field.
        grid: what the inverse lies on, in the moving image's space.
        num_steps: iterations at most.
        tolerance: millimetres; a place is done when it is mapped as close to where it should.

    Returns:
        the displacement w such that ``y -> affine⁻¹(y + w(y))`` is the inverse, and the error of each voxel in the
        fixed space, ``(*grid.shape)`` in millimetres: NaN where the inverse leads out of the field's grid.

    Raises:
        ValueError: When a number is out of its range.
    """
    if num_steps < 1 or tolerance <= 0:
        raise ValueError(f"num_steps must be at least 1 and tolerance positive, got {num_steps} and {tolerance}.")
    affine = torch.as_tensor(affine, dtype=torch.float64)
    back, to_voxels = torch.linalg.inv(affine), torch.linalg.inv(field.affine)

    def displacement(points: torch.Tensor) -> torch.Tensor:
        return field.displacements(points, fill=None)

    step = NEWTON_STEP * min(field.grid.spacing)
    guess: PhysicalField | None = None
    if math.prod(grid.shape) > LARGE:
        # most of the way once for 64 voxels
        guess, _ = invert_mapping(field, affine, grid.coarser(4), num_steps, tolerance)
    vectors = torch.empty(3, *grid.shape)
    errors = torch.empty(grid.shape)
    for part, places in grid.places():
        start = apply_affine(back, places)
        current = start
        if guess is not None:
            voxels = apply_affine(torch.linalg.inv(guess.affine), places)
            current = apply_affine(back, places + sample_volume(guess.vectors, voxels, fill=None).double().T)
        found, error = _solve(displacement, start, current, step, num_steps, tolerance)
        vectors[:, part] = (apply_affine(affine, found) - places).T.reshape(3, -1, *grid.shape[1:]).float()
        inside = inside_buffer(apply_affine(to_voxels, found), field.vectors.shape[1:])
        errors[part] = torch.where(inside, error, torch.nan).view(-1, *grid.shape[1:]).float()
    return PhysicalField(vectors, grid.affine), errors
