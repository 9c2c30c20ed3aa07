# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .bundle import bundle_source, find_bundle_root, running_bundle
from .errors import first_line, sentence
from .files import file_digest, new_folder, replacing
from .json_files import json_text, write_json
from .numbers import check_count
from .resources import peak_memory_mb
from .settings import settings_digest
from .subjects import pair_names, subject_name, subject_names
from .tensors import image_name, is_exported, is_traced, plain_tensor
from .weights import compare_states, not_finite, read_checkpoint

__all__ = [
    "bundle_source",
    "check_count",
    "compare_states",
    "file_digest",
    "find_bundle_root",
    "first_line",
    "image_name",
    "is_exported",
    "is_traced",
    "json_text",
    "new_folder",
    "not_finite",
    "pair_names",
    "peak_memory_mb",
    "plain_tensor",
    "read_checkpoint",
    "replacing",
    "running_bundle",
    "sentence",
    "settings_digest",
    "subject_name",
    "subject_names",
    "write_json",
]
