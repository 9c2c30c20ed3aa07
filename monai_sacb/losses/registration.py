# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import nn

from monai.losses import DiceLoss
from monai.networks import one_hot

from monai_sacb.losses.lncc import LNCCLoss
from monai_sacb.losses.smoothness import GradientPenaltyLoss
from monai_sacb.networks.layers import warp

__all__ = ["RegistrationLoss"]


class RegistrationLoss(nn.Module):
    """
    Similarity of the warped moving image to the fixed one, plus smoothness of the field, plus overlap of labels.

    Every term is a module that can be exchanged, for one of MONAI's losses for instance.

    Args:
        similarity: ``(warped, fixed) -> loss``. Defaults to :py:class:`LNCCLoss` with its window of 9 voxels.
        regularization: ``(ddf) -> loss``, or several with their names. Defaults to :py:class:`GradientPenaltyLoss`.
        regularization_weight: weight λ of the regularization, or of each by name.
        label: ``(warped one-hot, fixed one-hot) -> loss``. Defaults to MONAI's ``DiceLoss`` without background. Used
            only where ``label_weight`` is not 0.
        label_weight: weight of the label term. The labels of the moving image are warped as one-hot maps, linearly.
        num_labels: number of labels, which are the values 1 to ``num_labels``; needed for the label term.
        use_masks: compare the images only where both have been measured (see
            :py:class:`monai_sacb.transforms.FieldOfViewd`): for images that are cropped differently.

    Attributes:
        weights: weight of each term, named ``"similarity"``, ``"label"`` and ``"regularization"`` or as given, which
            :py:class:`monai_sacb.handlers.LossWeightSchedule` changes.

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
    ) -> None:
        super().__init__()
        if regularization is None:
            regularization = GradientPenaltyLoss()
        if not isinstance(regularization, (Mapping, nn.ModuleDict)):
            regularization = {"regularization": regularization}
        if not isinstance(regularization_weight, Mapping):
            regularization_weight = {"regularization": regularization_weight}
        if set(regularization) != set(regularization_weight) or {"similarity", "label"} & set(regularization):
            raise ValueError(
                "regularization and regularization_weight must have the same names, other than similarity and label, "
                f"got {sorted(regularization)} and {sorted(regularization_weight)}."
            )
        self.weights = {"similarity": 1.0, **regularization_weight, "label": label_weight}
        for name, weight in self.weights.items():
            if not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} must be a finite number of at least 0, got {weight!r}.")
        if self.weights["label"] > 0 and not num_labels:
            raise ValueError(f"the label term needs num_labels of at least 1, got {num_labels}.")
        self.similarity = LNCCLoss() if similarity is None else similarity
        self.regularization_names = list(regularization)
        # a list, unlike a dictionary of modules, takes terms of any name
        self.regularizations = nn.ModuleList(regularization.values())
        self.label = DiceLoss(include_background=False) if label is None else label
        self.num_labels = num_labels
        self.use_masks = use_masks

    def forward(self, pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)``, in voxels of the fixed grid, pull-back.
            target: ``moving_image`` and ``fixed_image``, ``(B, C, *spatial)``; with the label term also
                ``moving_label`` and ``fixed_label``, ``(B, 1, *spatial)``, values 0 to ``num_labels``; with
                ``use_masks`` also ``moving_field_of_view`` and ``fixed_field_of_view``, ``(B, 1, *spatial)``, 0 or 1.

        Returns:
            the weighted sum, a scalar.

        Raises:
            ValueError: When the batch lacks the labels or the fields of view that are wanted.
        """
        warped, fixed = warp(target["moving_image"], pred), target["fixed_image"]
        if self.use_masks:
            missing = [key for key in ("moving_field_of_view", "fixed_field_of_view") if key not in target]
            if missing:
                raise ValueError(f"use_masks needs fields of view, but the batch has no {missing}.")
            # nearest and without gradient: nothing is gained by moving the edge of the mask
            mask = target["fixed_field_of_view"] * warp(target["moving_field_of_view"], pred.detach(), mode="nearest")
            warped, fixed = warped * mask, fixed * mask
        loss = self.weights["similarity"] * self.similarity(warped, fixed)
        for name, term in zip(self.regularization_names, self.regularizations):
            if self.weights[name] > 0:
                loss = loss + self.weights[name] * term(pred)
        if self.weights["label"] > 0:
            missing = [key for key in ("moving_label", "fixed_label") if key not in target]
            if self.num_labels is None:
                raise ValueError(f"the label term needs num_labels of at least 1, got {self.num_labels}.")
            if missing:
                raise ValueError(f"the label term of the loss needs labels, but the batch has no {missing}.")
            moving_maps, fixed_maps = (
                one_hot(target[key], self.num_labels + 1) for key in ("moving_label", "fixed_label")
            )
            loss = loss + self.weights["label"] * self.label(warp(moving_maps, pred), fixed_maps)
        return loss
