# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .bundle_copy import bundle, bundle_source

__all__ = ["bundle", "bundle_source"]
