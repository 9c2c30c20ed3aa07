# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from monai.transforms import Transform

from monai_sacb.networks.cluster_maps import CLUSTER_LEVELS
from monai_sacb.transforms.common import with_geometry
from monai_sacb.transforms.save import PairFolders, save_nifti_volume
from monai_sacb.transforms.spatial import RestoreGridd
from monai_sacb.utils import plain_tensor

__all__ = ["SaveClusterMapsd"]


class SaveClusterMapsd(Transform):
    """
    Write the clusters of a pair as label volumes into its folder, beside what :py:class:`SaveRegistrationd` writes.

    ``fixed_clusters_level2.nii.gz`` to ``..._level5`` are those of the fixed image, on the grid of its file;
    ``warped_clusters_level2`` to ``..._level4`` those of the moving image as the network has warped it so far, on the
    same grid; and ``moving_clusters_level5`` those of the moving image itself, on the grid of its file. Labels begin at
    1; 0 is outside of what the network was given.

    Args:
        output_dir: folder of the folders of pairs.
        moving_clusters_key, fixed_clusters_key: label maps ``(4, *spatial)``, see
            :py:class:`monai_sacb.handlers.ClusterMaps`.
        moving_key, fixed_key: the two images, with the meta data of their files.

    Raises:
        ValueError: When an image does not carry the meta data of its file.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        moving_clusters_key: str = "moving_clusters",
        fixed_clusters_key: str = "fixed_clusters",
        moving_key: str = "moving_image",
        fixed_key: str = "fixed_image",
    ) -> None:
        self.folders = PairFolders(output_dir, moving_key, fixed_key)
        self.moving_clusters_key = moving_clusters_key
        self.fixed_clusters_key = fixed_clusters_key
        self.moving_key = moving_key
        self.fixed_key = fixed_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        folder = self.folders(data)
        for role, key in (("moving", self.moving_clusters_key), ("fixed", self.fixed_clusters_key)):
            for level, labels in zip(CLUSTER_LEVELS, plain_tensor(data[key]).cpu()):
                warped = role == "moving" and level < max(CLUSTER_LEVELS)
                reference_key = self.moving_key if role == "moving" and not warped else self.fixed_key
                entries: dict[Hashable, Any] = {
                    "labels": with_geometry(labels[None], data[reference_key]),
                    "image": data[reference_key],
                }
                restored = RestoreGridd("labels", "image", mode="nearest")(entries)["labels"]
                array = restored.numpy().astype(np.uint8 if labels.max() < 256 else np.int16)
                name = f"{'warped' if warped else role}_clusters_level{level}.nii.gz"
                save_nifti_volume(array, restored.affine, folder / name)
        return dict(data)
