# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .registration import plot_registration

__all__ = ["plot_registration"]
