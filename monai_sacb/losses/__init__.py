# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .lncc import LNCCLoss
from .registration import RegistrationLoss
from .smoothness import GradientPenaltyLoss

__all__ = ["GradientPenaltyLoss", "LNCCLoss", "RegistrationLoss"]
