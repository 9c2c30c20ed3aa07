# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .conv_norm_act import ConvNormAct, SameConv
from .flow_estimator import ConvFlowEstimator, MatchingFlowEstimator
from .sacb_block import SACBlock
from .similarity_matching import SimilarityMatching

__all__ = ["ConvFlowEstimator", "ConvNormAct", "MatchingFlowEstimator", "SACBlock", "SameConv", "SimilarityMatching"]
