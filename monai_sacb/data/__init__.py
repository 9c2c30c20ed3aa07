# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .datalist import load_pairs, load_request, load_subjects
from .pair_dataset import PairDataset
from .sample import sample_dataset

__all__ = ["PairDataset", "load_pairs", "load_request", "load_subjects", "sample_dataset"]
