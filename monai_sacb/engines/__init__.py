# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .prepare_batch import PrepareRegistrationBatch

__all__ = ["PrepareRegistrationBatch"]
