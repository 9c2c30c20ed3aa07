# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .bundle import bundle_source, find_bundle_root, running_bundle
from .claims import WorkClaims
from .errors import first_line, sentence
from .files import file_digest, new_folder, replacing
from .json_files import json_text, write_json
from .numbers import check_count
from .processes import (
    from_writer,
    gather_rows,
    is_writer,
    join_processes,
    process_device,
    process_rank,
    process_share,
    wait_for_processes,
    world_size,
)
from .resources import available_memory_mb, peak_memory_mb
from .settings import settings_digest
from .subjects import file_stem, pair_names, subject_name, subject_names
from .tensors import image_name, is_exported, is_traced, plain_tensor
from .weights import compare_states, not_finite, read_checkpoint

__all__ = [
    "WorkClaims",
    "available_memory_mb",
    "bundle_source",
    "check_count",
    "compare_states",
    "file_digest",
    "file_stem",
    "find_bundle_root",
    "first_line",
    "from_writer",
    "gather_rows",
    "image_name",
    "is_exported",
    "is_traced",
    "is_writer",
    "join_processes",
    "json_text",
    "new_folder",
    "not_finite",
    "pair_names",
    "peak_memory_mb",
    "plain_tensor",
    "process_device",
    "process_rank",
    "process_share",
    "read_checkpoint",
    "replacing",
    "running_bundle",
    "sentence",
    "settings_digest",
    "subject_name",
    "subject_names",
    "wait_for_processes",
    "world_size",
    "write_json",
]
