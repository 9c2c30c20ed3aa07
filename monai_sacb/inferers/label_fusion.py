# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""One label map of several that different atlases propose."""

from __future__ import annotations

import math

import torch

from monai_sacb.losses import LNCCLoss
from monai_sacb.utils import check_count

__all__ = ["LabelFusion", "fuse_labels"]

FUSIONS = ("majority", "locally_weighted")
# of rounding in sums of weights: what differs by less is equal
EQUAL = 1e-6


def fuse_labels(labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    At each voxel the label with the largest sum of weights; of equal ones the smallest.

    The memory does not grow with the number of labels.

    Args:
        labels: ``(N, 1, *spatial)``, whole numbers: N proposals for one image.
        weights: ``(N, 1, *spatial)``, not negative; by default all are equal, and the majority decides.

    Returns:
        ``(1, *spatial)``, of the type of the labels.

    Raises:
        ValueError: When the shapes do not belong together, or a weight is negative or not finite.

    Source: Artaechevarria et al., Combination strategies in multi-atlas image segmentation, IEEE TMI 2009.
    """
    if labels.dim() < 3 or labels.shape[1] != 1 or len(labels) < 1 or labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers (N, 1, *spatial), got {labels.dtype} {list(labels.shape)}.")
    if weights is not None:
        if weights.shape != labels.shape:
            raise ValueError(
                f"weights must have the shape of the labels {list(labels.shape)}, got {list(weights.shape)}."
            )
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError("weights must be finite and not negative.")
    votes = torch.ones(labels.shape, device=labels.device) if weights is None else weights
    fused = labels[0].clone()
    best = torch.full(fused.shape, -math.inf, device=labels.device)
    for candidate in labels:
        score = torch.stack([vote * (label == candidate) for vote, label in zip(votes, labels)]).sum(0)
        wins = (score > best + EQUAL) | ((score >= best - EQUAL) & (candidate < fused))
        fused, best = torch.where(wins, candidate, fused), torch.maximum(best, score)
    return fused


class LabelFusion:
    """
    How the labels of several atlases become one map.

    Args:
        fusion: ``"majority"``, each atlas has one vote; or ``"locally_weighted"``, the vote of an atlas counts at each
            voxel as its squared local correlation with the subject there does, to a power.
        kernel_size: window of the correlation in voxels.
        power: of the correlation.
        floor: of a weight, so that atlases have equal votes where none resembles the subject.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(self, fusion: str = "majority", kernel_size: int = 9, power: float = 2.0, floor: float = 1e-3) -> None:
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got '{fusion}'.")
        check_count("kernel_size", kernel_size, 3)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        for name, value in (("power", power), ("floor", floor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")
        self.fusion = fusion
        self.kernel_size = int(kernel_size)
        self.power = float(power)
        self.floor = float(floor)

    @property
    def weighted(self) -> bool:
        """Whether images are compared."""
        return self.fusion != "majority"

    def weights(self, warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """
        Weights of one atlas.

        Args:
            warped, fixed: ``(B, 1, *spatial)``: the atlas on the subject's grid, and the subject.

        Returns:
            ``(B, 1, *spatial)``, in [floor, 1 + floor].
        """
        local = LNCCLoss(kernel_size=self.kernel_size, reduction="none")
        return (-local(warped, fixed)).clamp(0, 1) ** self.power + self.floor

    def __call__(self, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """:py:func:`fuse_labels`."""
        return fuse_labels(labels, weights)
