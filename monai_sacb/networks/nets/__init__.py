# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .feature_pyramid import FeaturePyramidEncoder
from .identity_field import IdentityField
from .sacb_net import SACBNet

__all__ = ["FeaturePyramidEncoder", "IdentityField", "SACBNet"]
