# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .refinement import refine_ddf
from .registration import RegistrationInferer

__all__ = ["RegistrationInferer", "refine_ddf"]
