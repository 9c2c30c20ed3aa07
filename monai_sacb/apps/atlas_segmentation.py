# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation by registration: an atlas is laid on a subject, and its labels with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai.data import MetaTensor

from monai_sacb.apps.pair_metrics import local_similarity
from monai_sacb.apps.pair_reading import Subject, read_subject
from monai_sacb.apps.working_pair import WorkingPair, pair_grid
from monai_sacb.data.foreground import background_value, foreground_mask
from monai_sacb.data.spatial_mapping import SpatialMapping, resample_volume
from monai_sacb.data.volumes import check_overlap
from monai_sacb.inferers import LabelFusion, RegistrationInferer
from monai_sacb.metrics import jacobian_determinant
from monai_sacb.networks.layers import warp
from monai_sacb.utils import check_count, json_text, plain_tensor

__all__ = ["REGISTRATION_KEY", "AtlasSegmentation"]

# entry of the meta data of an answer: how its registrations went, as JSON
REGISTRATION_KEY = "registration"


def _inside(root: Path, name: Any) -> str:
    """The path of a file of a bundle; refused where it leads out of the bundle, by whatever way."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"an atlas must be named by the path of a file in the bundle, got {name!r}.")
    path = (root / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root.resolve()):
        raise ValueError(f"'{name}' leads out of the bundle '{root}', which is refused.")
    return str(path)


def _read_atlases(root: Path, atlases: Any) -> list[Subject]:
    if not isinstance(atlases, Sequence) or isinstance(atlases, str) or not atlases:
        raise ValueError(f"atlases must be a list of entries with image and label, got {atlases!r}.")
    subjects = []
    for atlas in atlases:
        if not isinstance(atlas, Mapping) or set(atlas) != {"image", "label"}:
            raise ValueError(f"an atlas must have an image and a label, got {atlas!r}.")
        image, label = (_inside(root, atlas[key]) for key in ("image", "label"))
        subjects.append(read_subject("atlas", image, label))
        lowest = int(plain_tensor(subjects[-1].label).min())
        if lowest < 0:
            raise ValueError(f"atlas_label '{label}' has the label {lowest}; labels must be positive, 0 is background.")
    return subjects


class AtlasSegmentation(nn.Module):
    """
    A segmentation model that learns nothing: atlases are registered to the subject, and their labels carried along.

    The stages are those of :py:func:`monai_sacb.apps.register`, with the atlas as the moving and the subject as the
    fixed image: an affine stage, a network or none, instance optimization. Subjects may have any size, spacing and
    orientation. Nothing is written, and nothing of one subject is kept for the next.

    Args:
        bundle_root: folder of the bundle.
        atlases: entries with ``image`` and ``label``, paths within that folder. The files are read once, here.
        network: ``(B, 2, *grid)``, the moving image first, to a DDF in voxels of the fixed grid, pull-back; such as
            :py:class:`monai_sacb.networks.nets.SACBNet`; for none,
            :py:class:`monai_sacb.networks.nets.IdentityField`.
        scale_intensity: dictionary transform that brings the entry ``image`` to [0, 1].
        working_grid: arguments of :py:func:`monai_sacb.data.make_working_grid`.
        refinement: such as :py:class:`monai_sacb.inferers.InstanceOptimization`.
        refine: its steps; 0 for none.
        fine_grid: arguments of :py:func:`monai_sacb.data.make_working_grid` for a finer grid, on which the refinement
            goes on where atlas and subject have more to show; None for none.
        fine_refinement: such as :py:class:`monai_sacb.inferers.InstanceOptimization`, for that grid.
        fine: its steps; 0 for none.
        affine_stage: such as :py:class:`monai_sacb.inferers.AffineRegistration`; None where the headers of atlases and
            subjects say how they lie to each other.
        fusion: how the labels of several atlases become one map; by majority by default.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When a path leads out of the bundle, a file cannot be used, or an argument is not as said.
    """

    def __init__(
        self,
        bundle_root: str | os.PathLike[str],
        atlases: Sequence[Mapping[str, str]],
        network: nn.Module,
        scale_intensity: Callable[[dict[str, Any]], Any],
        working_grid: Mapping[str, Any],
        refinement: Callable[..., torch.Tensor],
        refine: int = 0,
        fine_grid: Mapping[str, Any] | None = None,
        fine_refinement: Callable[..., torch.Tensor] | None = None,
        fine: int = 0,
        affine_stage: Callable[..., torch.Tensor] | None = None,
        fusion: LabelFusion | None = None,
    ) -> None:
        super().__init__()
        check_count("refine", refine, 0)
        check_count("fine", fine, 0)
        if fine > 0 and (fine_grid is None or fine_refinement is None):
            raise ValueError(f"fine = {fine} steps need fine_grid and fine_refinement.")
        self.atlases = _read_atlases(Path(bundle_root), atlases)
        # one type for all subjects, the smallest that holds every id
        highest = max(int(plain_tensor(atlas.label).max()) for atlas in self.atlases)
        self.dtype = next(t for t in (torch.uint8, torch.int16, torch.int32) if highest <= torch.iinfo(t).max)
        self.network = network
        self.scale_intensity = scale_intensity
        self.working_grid = dict(working_grid)
        self.refinement = refinement
        self.refine = int(refine)
        self.fine_grid, self.fine_refinement, self.fine = fine_grid, fine_refinement, int(fine)
        self.affine_stage = affine_stage
        self.fusion = LabelFusion() if fusion is None else fusion
        self.inferer = RegistrationInferer()

    def _pair(self, atlas: Subject, subject: Subject) -> WorkingPair:
        if self.affine_stage is None:
            check_overlap(atlas.image, subject.image, "by their headers; they must be aligned first")
            affine = torch.eye(4, dtype=torch.float64)
        else:
            affine = self.affine_stage(atlas.image, subject.image)
        return WorkingPair(
            atlas, subject, affine, self.scale_intensity, pair_grid(atlas, subject, affine, self.working_grid)
        )

    def _carry(
        self, atlas: Subject, subject: Subject, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
        """Labels of an atlas on the subject's grid, their weights there, and how the registration went."""
        pair = self._pair(atlas, subject)
        ddf = pair.network_ddf(self.network, self.inferer, device)
        if self.refine > 0:
            ddf = pair.refined_ddf(ddf, self.refinement, self.refine)
        if self.fine_grid is not None and self.fine_refinement is not None:
            pair, ddf = pair.refined_on_finer_grid(ddf, self.fine_refinement, self.fine, self.fine_grid)
        ddf = ddf.float().cpu()
        mapping = SpatialMapping([pair.displacement(ddf).resampled(subject.grid), pair.affine])
        label = plain_tensor(resample_volume(atlas.label, mapping, subject.grid, mode="label"))
        warped = warp(pair.moving[None], ddf[None])
        numbers = {
            "atlas": Path(atlas.path).name,
            "similarity_affine": round(local_similarity(pair.moving, pair.fixed, pair.foreground), 4),
            "similarity": round(local_similarity(warped[0], pair.fixed, pair.foreground), 4),
            "folds_percent": round(100 * float((jacobian_determinant(ddf[None]) <= 0).double().mean()), 4),
        }
        weights = None
        if self.fusion.weighted and len(self.atlases) > 1:
            local = MetaTensor(self.fusion.weights(warped, pair.fixed[None])[0], affine=pair.grid.affine)
            weights = plain_tensor(resample_volume(local, SpatialMapping(), subject.grid, fill=self.fusion.floor))
        return label, weights, numbers

    def _segment(self, subject: Subject, device: torch.device) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        carried = [self._carry(atlas, subject, device) for atlas in self.atlases]
        numbers = [entry for _, _, entry in carried]
        if len(carried) == 1:
            return carried[0][0], numbers
        weights = [weight for _, weight, _ in carried if weight is not None]
        labels = torch.stack([label for label, _, _ in carried])
        return self.fusion(labels, torch.stack(weights) if weights else None), numbers

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """
        Segment subjects.

        Args:
            image: ``(B, 1, D, H, W)`` as it is in the file, of any size and range; where it lies is in its affine
                (``MetaTensor``). Voxels of a plain tensor count as 1 mm along R, A and S.

        Returns:
            ``(B, 1, D, H, W)``, uint8, int16 or int32, the smallest that holds the atlases' ids: these ids on the grid
            of the image, with its meta data and, on a ``MetaTensor``, the entry ``registration`` as JSON: for each
            atlas the similarity (mean squared local correlation) after the affine and after all stages, and the share
            of voxels where the field folds.

        Raises:
            ValueError: When the image is not as said, not finite or constant, or it cannot be registered.
        """
        if image.dim() != 5 or image.shape[1] != 1 or image.numel() == 0:
            raise ValueError(f"image must have shape (B, 1, D, H, W), got {list(image.shape)}.")
        volumes = plain_tensor(image).detach().float().cpu()
        answers, reports = [], []
        for index, volume in enumerate(volumes):
            affine: torch.Tensor = image.affine if isinstance(image, MetaTensor) else torch.eye(4)
            affine = (affine[index] if affine.dim() == 3 else affine).detach().cpu().double()
            bad, (low, high) = int((~torch.isfinite(volume)).sum()), torch.aminmax(volume)
            if bad or low == high:
                what = f"{bad} NaN or infinite voxels" if bad else f"{float(low):g} everywhere"
                raise ValueError(f"image must be finite and not constant, got {what} in subject {index} of the batch.")
            placed = MetaTensor(volume, affine=affine)
            subject = Subject("fixed", "the subject", placed, foreground_mask(placed), background_value(placed))
            label, numbers = self._segment(subject, image.device)
            answers.append(label.to(self.dtype))
            reports.append(json_text(numbers))
        answer = torch.stack(answers).to(image.device)
        if not isinstance(image, MetaTensor):
            return answer
        result = MetaTensor(answer)
        result.copy_meta_from(image)
        # of a batch, meta data are lists
        result.meta[REGISTRATION_KEY] = reports if image.is_batch else reports[0]
        return result
