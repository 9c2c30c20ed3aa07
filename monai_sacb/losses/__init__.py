# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .fold import FoldPenaltyLoss
from .inverse_consistency import InverseConsistencyLoss
from .landmark import LandmarkLoss
from .lncc import LNCCLoss
from .mind import MINDSSCLoss, mind_ssc
from .registration import RegistrationLoss
from .smoothness import BendingPenaltyLoss, GradientPenaltyLoss
from .warped_dice import WarpedLabelDiceLoss

__all__ = [
    "BendingPenaltyLoss",
    "FoldPenaltyLoss",
    "GradientPenaltyLoss",
    "InverseConsistencyLoss",
    "LNCCLoss",
    "LandmarkLoss",
    "MINDSSCLoss",
    "RegistrationLoss",
    "WarpedLabelDiceLoss",
    "mind_ssc",
]
