# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .conv_norm_act import ConvNormAct, SameConv
from .flow_estimator import ConvFlowEstimator, MatchingFlowEstimator
from .sacb_block import SACBlock
from .sacb_layers import SACBConv, SACBNorm, register_sacb_layers
from .similarity_matching import SimilarityMatching

# any MONAI network takes these by name from then on
register_sacb_layers()

__all__ = [
    "ConvFlowEstimator",
    "ConvNormAct",
    "MatchingFlowEstimator",
    "SACBConv",
    "SACBNorm",
    "SACBlock",
    "SameConv",
    "SimilarityMatching",
    "register_sacb_layers",
]
