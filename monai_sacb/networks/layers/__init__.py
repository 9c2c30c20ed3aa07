# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .adaptive_conv import cluster_adaptive_conv
from .clustering import KMeans, kmeans
from .descriptor import self_similarity
from .fields import compose, exponential, invert, reference_grid, unwarp_points, warp, warp_points
from .norm_act import instance_norm_leaky_relu

__all__ = [
    "KMeans",
    "cluster_adaptive_conv",
    "compose",
    "exponential",
    "instance_norm_leaky_relu",
    "invert",
    "kmeans",
    "reference_grid",
    "self_similarity",
    "unwarp_points",
    "warp",
    "warp_points",
]
