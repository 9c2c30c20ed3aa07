# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .flow_estimator import ConvFlowEstimator, MatchingFlowEstimator
from .sacb_block import SACBlock
from .similarity_matching import SimilarityMatching

__all__ = ["ConvFlowEstimator", "MatchingFlowEstimator", "SACBlock", "SimilarityMatching"]
