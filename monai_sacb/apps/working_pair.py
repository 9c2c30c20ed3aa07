# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Two images on the grid that they are compared on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from monai.data import MetaTensor

from monai_sacb.apps.pair_reading import Subject
from monai_sacb.data.spatial_mapping import Grid, PhysicalField, SpatialMapping, resample_volume
from monai_sacb.data.working_grid import make_working_grid, resample_to_working_grid
from monai_sacb.utils import plain_tensor

__all__ = ["WorkingPair", "finer_grid", "pair_grid"]

# voxels of a finer grid are smaller at least by this factor, or it is not worth its time
FINER = 0.9


def pair_grid(moving: Subject, fixed: Subject, affine: torch.Tensor, options: Mapping[str, Any]) -> Grid:
    """
    A grid on which two subjects are compared.

    Args:
        moving, fixed: the two subjects.
        affine: ``(4, 4)``, RAS millimetres, from the fixed image's space to the moving image's.
        options: further arguments of :py:func:`monai_sacb.data.make_working_grid`.
    """
    return make_working_grid(fixed.grid, fixed.foreground, moving.grid, moving.foreground, affine, **options)


def finer_grid(
    coarse: Grid, moving: Subject, fixed: Subject, affine: torch.Tensor, options: Mapping[str, Any]
) -> Grid | None:
    """
    A second grid for details, or None where the images have hardly more to show than the first one does.

    Args:
        coarse: the first grid.
        moving, fixed, affine, options: as of :py:func:`pair_grid`.
    """
    detail = max(min(moving.grid.spacing), min(fixed.grid.spacing))
    if detail >= FINER * max(coarse.spacing):
        return None
    grid = pair_grid(moving, fixed, affine, options)
    return grid if max(grid.spacing) < FINER * max(coarse.spacing) else None


class WorkingPair:
    """
    Both images on the grid that they are compared on.

    Args:
        moving, fixed: the two subjects.
        affine: ``(4, 4)``, RAS millimetres, from the fixed image's space to the moving image's.
        scale_intensity: dictionary transform that brings the entry ``image`` to [0, 1].
        grid: such as of :py:func:`pair_grid`.

    Raises:
        ValueError: When the images have no voxel in common to be compared.
    """

    def __init__(
        self,
        moving: Subject,
        fixed: Subject,
        affine: torch.Tensor,
        scale_intensity: Callable[[dict[str, Any]], Any],
        grid: Grid,
    ) -> None:
        self.moving_subject, self.fixed_subject, self.affine, self.grid = moving, fixed, affine, grid
        self._scale_intensity = scale_intensity
        identity = torch.eye(4, dtype=torch.float64)
        self.fixed = self._scale(resample_to_working_grid(fixed.image, identity, self.grid, fixed.background))
        self.moving = self.moved(affine)
        # nearest, and nothing outside
        self.foreground = self._sampled(fixed.foreground, fixed.grid, identity)
        self.fixed_mask = self._compared(fixed, identity)
        self.moving_mask = self._compared(moving, affine)
        if not bool((self.fixed_mask & self.moving_mask).any()):
            raise ValueError(
                f"moving '{moving.path}' and fixed '{fixed.path}' have nothing in common after the affine stage"
                f"{' inside the masks' if moving.mask is not None or fixed.mask is not None else ''}."
            )

    def _compared(self, subject: Subject, affine: torch.Tensor) -> torch.Tensor:
        """Where a subject has been measured, and its mask holds."""
        measured = torch.ones_like(subject.foreground) if subject.mask is None else plain_tensor(subject.mask) != 0
        return self._sampled(measured, subject.grid, affine)

    def _scale(self, image: MetaTensor) -> torch.Tensor:
        return plain_tensor(self._scale_intensity({"image": image})["image"]).float()

    def moved(self, affine: torch.Tensor) -> torch.Tensor:
        """The moving image through an affine, scaled."""
        moving = self.moving_subject
        return self._scale(resample_to_working_grid(moving.image, affine, self.grid, moving.background))

    def _sampled(self, mask: torch.Tensor, grid: Grid, affine: torch.Tensor) -> torch.Tensor:
        volume = MetaTensor(mask.to(torch.uint8), affine=grid.affine)
        return plain_tensor(resample_volume(volume, SpatialMapping([affine]), self.grid, mode="nearest")) > 0

    def network_ddf(
        self,
        network: Callable[[torch.Tensor], torch.Tensor] | None,
        inferer: Callable[..., torch.Tensor] | None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """
        A network's field.

        Args:
            network: ``(B, 2, *grid)``, the moving image first, to a DDF; None for no displacement.
            inferer: ``(inputs, network) -> DDF``.
            device: where the network is.

        Returns:
            DDF ``(3, *grid)`` in voxels of the grid, on the device.
        """
        if network is None or inferer is None:
            return torch.zeros(3, *self.grid.shape, device=device)
        with torch.inference_mode():
            ddf: torch.Tensor = inferer(torch.cat([self.moving, self.fixed])[None].to(device), network)[0]
        return ddf

    def refined_ddf(
        self, ddf: torch.Tensor, refinement: Callable[..., torch.Tensor], iterations: int | None = None
    ) -> torch.Tensor:
        """
        A field after instance optimization, where both images have been measured and their masks hold.

        Args:
            ddf: ``(3, *grid)`` in voxels of the grid.
            refinement: such as :py:class:`monai_sacb.inferers.InstanceOptimization`.
            iterations: its steps; by default its own.
        """
        # masks that hold everywhere would only cost time
        masks = {
            f"{role}_mask": mask[None].float().to(ddf.device)
            for role, mask in (("moving", self.moving_mask), ("fixed", self.fixed_mask))
            if not bool(mask.all())
        }
        moving, fixed = (image[None].to(ddf.device) for image in (self.moving, self.fixed))
        return refinement(moving, fixed, ddf[None], iterations=iterations, **masks)[0]

    def refined_on_finer_grid(
        self, ddf: torch.Tensor, refinement: Callable[..., torch.Tensor], iterations: int, options: Mapping[str, Any]
    ) -> tuple[WorkingPair, torch.Tensor]:
        """
        A field after instance optimization on a second, finer grid; the field as it is where there is none.

        Args:
            ddf: ``(3, *grid)`` in voxels of the grid.
            refinement: such as :py:class:`monai_sacb.inferers.InstanceOptimization`.
            iterations: its steps; none for 0.
            options: of the finer grid, arguments of :py:func:`monai_sacb.data.make_working_grid`.

        Returns:
            the pair on the grid of the field, and the field in voxels of that grid.
        """
        moving, fixed, affine = self.moving_subject, self.fixed_subject, self.affine
        grid = finer_grid(self.grid, moving, fixed, affine, options) if iterations > 0 else None
        if grid is None:
            return self, ddf
        finer = WorkingPair(moving, fixed, affine, self._scale_intensity, grid)
        vectors = self.displacement(ddf).resampled(grid).vectors
        start = torch.einsum("ij,jdhw->idhw", torch.linalg.inv(grid.affine)[:3, :3].float(), vectors)
        return finer, finer.refined_ddf(start.to(ddf.device), refinement, iterations)

    def displacement(self, ddf: torch.Tensor) -> PhysicalField:
        """A DDF ``(3, *grid.shape)`` in voxels of the grid, as RAS millimetres."""
        matrix = self.grid.affine[:3, :3].float()
        return PhysicalField(torch.einsum("ij,jdhw->idhw", matrix, ddf.float().cpu()), self.grid.affine)
