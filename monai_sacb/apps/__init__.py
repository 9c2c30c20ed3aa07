# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .applying import apply
from .bundle_copy import bundle, bundle_source
from .convert_field import convert
from .evaluating import evaluate
from .information import info
from .models import available_models, find_model, load_pretrained
from .registering import register
from .registration import RegistrationResult
from .reporting import report

__all__ = [
    "RegistrationResult",
    "apply",
    "available_models",
    "bundle",
    "bundle_source",
    "convert",
    "evaluate",
    "find_model",
    "info",
    "load_pretrained",
    "register",
    "report",
]
