# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .cluster_maps import ClusterRecorder, cluster_labels
from .official import load_official_checkpoint
from .pretrained import available_models, find_model, load_pretrained, stored_setting

__all__ = [
    "ClusterRecorder",
    "available_models",
    "cluster_labels",
    "find_model",
    "load_official_checkpoint",
    "load_pretrained",
    "stored_setting",
]
