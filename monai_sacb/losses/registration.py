# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
import torch.distributed as dist
from torch import nn

from monai.networks import one_hot

from monai_sacb.losses.inverse_consistency import InverseConsistencyLoss
from monai_sacb.losses.landmark import LandmarkLoss
from monai_sacb.losses.lncc import LNCCLoss
from monai_sacb.losses.smoothness import GradientPenaltyLoss
from monai_sacb.losses.warped_dice import WarpedLabelDiceLoss, has_labels
from monai_sacb.networks.layers import warp
from monai_sacb.utils import world_size

__all__ = ["RegistrationLoss"]


class RegistrationLoss(nn.Module):
    """
    Similarity of the warped moving image to the fixed one, plus smoothness of the field, plus overlap of labels, plus
    distance of landmarks, plus agreement of the fields of both directions.

    Every term is a module that can be exchanged, for one of MONAI's losses for instance. The terms of labels and of
    landmarks are left out where a batch has none.

    Args:
        similarity: ``(warped, fixed) -> loss``. Defaults to :py:class:`LNCCLoss` with its window of 9 voxels.
        regularization: ``(ddf) -> loss``, or several with their names. Defaults to :py:class:`GradientPenaltyLoss`.
        regularization_weight: weight λ of the regularization, or of each by name.
        label: a :py:class:`WarpedLabelDiceLoss`, the default; or ``(warped one-hot, fixed one-hot) -> loss``, such as
            MONAI's ``DiceLoss``, whose memory grows with the number of labels. Used only where ``label_weight`` is not
            0.
        label_weight: weight of the label term. The labels of the moving image are warped as one-hot maps, linearly.
        num_labels: number of labels, which are the values 1 to ``num_labels``; needed for the label term.
        use_masks: compare the images only where both have been measured (see
            :py:class:`monai_sacb.transforms.FieldOfViewd`): for images that are cropped differently.
        landmarks: ``(moving points, fixed points, ddf) -> loss``. Defaults to :py:class:`LandmarkLoss`, in voxels.
        landmark_weight: weight of the landmark term.
        similarity_key: the entries that the similarity compares, ``"image"``, or ``"anatomy"``: images of one contrast
            that the network does not see, see :py:class:`monai_sacb.transforms.LabelsToImaged`.
        inverse_consistency: ``(ddf, ddf of the other direction, mask or None) -> loss``. Defaults to
            :py:class:`InverseConsistencyLoss`.
        inverse_consistency_weight: weight of the term that makes the fields of both directions inverse to each other,
            which needs batches of :py:class:`monai_sacb.engines.PrepareRegistrationBatch` with ``symmetric=True``.
        all_processes: weight the terms of labels and of landmarks, the means over the pairs that have these, such that
            the mean over the processes of a ``DistributedDataParallel`` training is that over all of their pairs. All
            processes must then call the loss at every step.

    Attributes:
        weights: weight of each term, named ``"similarity"``, ``"label"``, ``"landmarks"``, ``"inverse_consistency"``
            and ``"regularization"`` or as given, which :py:class:`monai_sacb.handlers.LossWeightSchedule` changes.
        last_terms: value of each term that the last call computed, without its weight and without gradient; see
            :py:class:`monai_sacb.handlers.LossTerms`.

    Raises:
        ValueError: When a weight is negative or not finite, weights and regularizations have not the same names, or the
            label term is wanted without ``num_labels``.

    Source: Cheng et al., SACB-Net, CVPR 2025.
    """

    def __init__(
        self,
        similarity: nn.Module | None = None,
        regularization: nn.Module | Mapping[str, nn.Module] | None = None,
        regularization_weight: float | Mapping[str, float] = 1.0,
        label: nn.Module | None = None,
        label_weight: float = 0.0,
        num_labels: int | None = None,
        use_masks: bool = False,
        landmarks: nn.Module | None = None,
        landmark_weight: float = 0.0,
        similarity_key: str = "image",
        inverse_consistency: nn.Module | None = None,
        inverse_consistency_weight: float = 0.0,
        all_processes: bool = False,
    ) -> None:
        super().__init__()
        if regularization is None:
            regularization = GradientPenaltyLoss()
        if not isinstance(regularization, (Mapping, nn.ModuleDict)):
            regularization = {"regularization": regularization}
        if not isinstance(regularization_weight, Mapping):
            regularization_weight = {"regularization": regularization_weight}
        reserved = {"similarity", "label", "landmarks", "inverse_consistency"}
        if set(regularization) != set(regularization_weight) or reserved & set(regularization):
            raise ValueError(
                "regularization and regularization_weight must have the same names, other than similarity, label, "
                f"landmarks and inverse_consistency, got {sorted(regularization)} and {sorted(regularization_weight)}."
            )
        self.weights = {
            "similarity": 1.0,
            **regularization_weight,
            "label": label_weight,
            "landmarks": landmark_weight,
            "inverse_consistency": inverse_consistency_weight,
        }
        for name, weight in self.weights.items():
            if not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} must be a finite number of at least 0, got {weight!r}.")
        if self.weights["label"] > 0 and not num_labels:
            raise ValueError(f"the label term needs num_labels of at least 1, got {num_labels}.")
        self.similarity = LNCCLoss() if similarity is None else similarity
        self.regularization_names = list(regularization)
        # a list, unlike a dictionary of modules, takes terms of any name
        self.regularizations = nn.ModuleList(regularization.values())
        self.label = WarpedLabelDiceLoss() if label is None else label
        self.num_labels = num_labels
        self.use_masks = use_masks
        if similarity_key not in ("image", "anatomy"):
            raise ValueError(f"similarity_key must be 'image' or 'anatomy', got {similarity_key!r}.")
        self.similarity_key = similarity_key
        self.all_processes = all_processes
        self.landmarks = LandmarkLoss() if landmarks is None else landmarks
        self.inverse_consistency = InverseConsistencyLoss() if inverse_consistency is None else inverse_consistency
        self.last_terms: dict[str, torch.Tensor] = {}

    def forward(self, pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)``, in voxels of the fixed grid, pull-back.
            target: ``moving_image`` and ``fixed_image``, ``(B, C, *spatial)``. Possibly ``moving_label`` and
                ``fixed_label``, ``(B, 1, *spatial)``, values 0 to ``num_labels``, or -1 throughout for a subject
                without labels; ``moving_landmarks`` and ``fixed_landmarks``, ``(B, N, d)``, in voxels, rows of NaN
                where there are less. With ``use_masks`` also ``moving_field_of_view`` and ``fixed_field_of_view``,
                ``(B, 1, *spatial)``, 0 or 1. With ``similarity_key="anatomy"`` also ``moving_anatomy`` and
                ``fixed_anatomy``, ``(B, C, *spatial)``. For the term of inverse consistency ``reverse``, ``(B,)``:
                which pair of the batch is each one's other direction.

        Returns:
            the weighted sum, a scalar.

        Raises:
            ValueError: When the batch lacks the fields of view, the anatomy or the other directions that are wanted,
                or the label term has been switched on without ``num_labels``.
        """
        terms = {"similarity": self.similarity(*self._images(pred, target))}
        for name, term in zip(self.regularization_names, self.regularizations):
            if self.weights[name] > 0:
                terms[name] = term(pred)
        if self.weights["label"] > 0 and "moving_label" in target and "fixed_label" in target:
            label = self._label_term(pred, target["moving_label"], target["fixed_label"])
            if label is not None:
                terms["label"] = label
        if self.weights["landmarks"] > 0 and "moving_landmarks" in target and "fixed_landmarks" in target:
            terms["landmarks"] = self.landmarks(target["moving_landmarks"], target["fixed_landmarks"], pred)
        if self.weights["inverse_consistency"] > 0:
            terms["inverse_consistency"] = self._consistency_term(pred, target)
        if self.all_processes and world_size() > 1:
            self._balance(terms, pred, target)
        self.last_terms = {name: value.detach() for name, value in terms.items()}
        loss = self.weights["similarity"] * terms.pop("similarity")
        for name, value in terms.items():
            loss = loss + self.weights[name] * value
        return loss

    def _balance(self, terms: dict[str, torch.Tensor], pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> None:
        """Weight the terms that some pairs lack by how many of this process have them, of those of all processes."""
        measured = {
            "label": lambda moving, fixed: has_labels(moving) & has_labels(fixed),
            "landmarks": lambda moving, fixed: (~(moving + fixed).isnan()).all(2).any(1),
        }
        own = {name: 0 for name in measured if self.weights[name] > 0}
        for name in own:
            moving, fixed = (target.get(f"{role}_{name}") for role in ("moving", "fixed"))
            if moving is not None and fixed is not None:
                own[name] = int(measured[name](moving, fixed).sum())
        if not own:
            return
        every = torch.tensor(list(own.values()), device=pred.device)
        dist.all_reduce(every)
        for (name, number), total in zip(own.items(), every.tolist()):
            if total > 0:
                value = terms.get(name)
                terms[name] = 0.0 * pred.sum() if value is None else value * (number * world_size() / total)

    def _images(self, pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The warped and the fixed image that are compared, zero outside the masks if they are wanted."""
        keys = [f"{role}_{self.similarity_key}" for role in ("moving", "fixed")]
        if any(key not in target for key in keys):
            raise ValueError(f"the similarity compares {keys}, but the batch has {sorted(target)}.")
        warped, fixed = warp(target[keys[0]], pred), target[keys[1]]
        if not self.use_masks:
            return warped, fixed
        missing = [key for key in ("moving_field_of_view", "fixed_field_of_view") if key not in target]
        if missing:
            raise ValueError(f"use_masks needs fields of view, but the batch has no {missing}.")
        # nearest and without gradient: nothing is gained by moving the edge of the mask
        moving, fixed_mask = (target[f"{role}_field_of_view"].to(warped.dtype) for role in ("moving", "fixed"))
        mask = fixed_mask * warp(moving, pred.detach(), mode="nearest")
        return warped * mask, fixed * mask

    def _label_term(self, pred: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor | None:
        """The label term of those pairs of which both subjects have labels, if there are any."""
        if self.num_labels is None:
            raise ValueError(f"the label term needs num_labels of at least 1, got {self.num_labels}.")
        labelled = has_labels(moving) & has_labels(fixed)
        if not labelled.any():
            return None
        if isinstance(self.label, WarpedLabelDiceLoss):
            return self.label(moving, fixed, pred, self.num_labels)
        moving_maps, fixed_maps = (one_hot(label[labelled], self.num_labels + 1) for label in (moving, fixed))
        return self.label(warp(moving_maps, pred[labelled]), fixed_maps)

    def _consistency_term(self, pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Each field with that of its other direction, within the fixed image's mask if masks are wanted."""
        if "reverse" not in target:
            raise ValueError(
                "the term of inverse consistency needs both directions of every pair in one batch, as "
                "PrepareRegistrationBatch(symmetric=True) makes them."
            )
        mask = target["fixed_field_of_view"] if self.use_masks else None
        return self.inverse_consistency(pred, pred[target["reverse"]], mask)
