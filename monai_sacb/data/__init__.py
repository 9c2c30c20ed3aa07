# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .collate import collate_pairs
from .convert import convert_pickled_folder
from .datalist import load_pairs, load_request, load_subjects
from .disk_cache import DiskCacheDataset
from .displacement_files import read_displacement, write_displacement
from .folders import describe_folder, list_volumes
from .pair_dataset import PairDataset
from .pairs import atlas_to_subject, make_pairs, read_pairs_csv, required_entries, subject_to_atlas
from .pickle_reader import PickledVolumeReader, read_pickled_arrays
from .point_files import read_point_set, write_point_set
from .replacing_writer import ReplacingNibabelWriter
from .sample import sample_dataset
from .sharing import SharedRandomSampler, share_dataset
from .spatial_mapping import Grid, PhysicalField, SpatialMapping, invert_mapping, resample_volume, sample_volume
from .transform_files import read_transform, write_transform
from .volumes import read_label_volume, read_mask_volume, read_volume, write_volume
from .working_grid import make_working_grid, resample_to_working_grid

__all__ = [
    "DiskCacheDataset",
    "Grid",
    "PairDataset",
    "PhysicalField",
    "PickledVolumeReader",
    "ReplacingNibabelWriter",
    "SharedRandomSampler",
    "SpatialMapping",
    "atlas_to_subject",
    "collate_pairs",
    "convert_pickled_folder",
    "describe_folder",
    "invert_mapping",
    "list_volumes",
    "load_pairs",
    "load_request",
    "load_subjects",
    "make_pairs",
    "make_working_grid",
    "read_displacement",
    "read_label_volume",
    "read_mask_volume",
    "read_pairs_csv",
    "read_pickled_arrays",
    "read_point_set",
    "read_transform",
    "read_volume",
    "required_entries",
    "resample_to_working_grid",
    "resample_volume",
    "sample_dataset",
    "sample_volume",
    "share_dataset",
    "subject_to_atlas",
    "write_displacement",
    "write_point_set",
    "write_transform",
    "write_volume",
]
