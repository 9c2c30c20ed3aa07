# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .backbone_pyramid import BackbonePyramid, ResNetPyramidEncoder, SegResNetPyramidEncoder, SwinPyramidEncoder
from .feature_pyramid import FeaturePyramidEncoder
from .identity_field import IdentityField
from .sacb_net import SACBNet

__all__ = [
    "BackbonePyramid",
    "FeaturePyramidEncoder",
    "IdentityField",
    "ResNetPyramidEncoder",
    "SACBNet",
    "SegResNetPyramidEncoder",
    "SwinPyramidEncoder",
]
