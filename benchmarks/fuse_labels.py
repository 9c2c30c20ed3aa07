# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Label the images of a dataset anew, each by the labels of others that a model has laid on it.

    python benchmarks/fuse_labels.py DATASET_DIR MODEL OUTPUT_DIR

DATASET_DIR holds a dataset.json whose lists ``training`` and ``validation`` have images and labels, as
benchmarks/synthetic_segmentation.py writes it, and ``labels.json``. Each image receives, voxel by voxel, the label that
most of ``--atlases`` images of the list ``training``, never itself, agree on: what is wrong in one label alone is voted
down. OUTPUT_DIR becomes a dataset of the same images and pairs with the new labels.

Source: Heckemann et al., Automatic anatomical brain MRI segmentation combining label propagation and decision fusion,
NeuroImage 2006.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from synthetic_segmentation import SECTIONS, SIZE, read_volume
from tqdm import tqdm

from monai.data import DataLoader, Dataset, MetaTensor
from monai.networks.utils import one_hot
from monai.transforms import Compose, Orientation, ScaleIntensity, ScaleIntensityRangePercentiles, SpatialPad

from monai_sacb.networks import load_pretrained
from monai_sacb.networks.layers import warp
from monai_sacb.utils import write_json

prepare = Compose([ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True), ScaleIntensity()])


def fuse(network: torch.nn.Module, fixed: torch.Tensor, atlases: list[tuple[torch.Tensor, torch.Tensor]]) -> MetaTensor:
    """
    Args:
        network: registers a moving and a fixed image.
        fixed: image (1, *spatial).
        atlases: images and their labels as probabilities (classes, *spatial).

    Returns:
        The label (1, *spatial) that most atlases agree on.
    """
    votes = torch.zeros_like(atlases[0][1])[None]
    with torch.inference_mode():
        for moving, probabilities in atlases:
            votes += warp(probabilities[None], network(torch.cat([moving, fixed])[None]))
    return votes.argmax(1).byte()


def main() -> None:
    """Label a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_dir", type=Path, help="with a dataset.json and labels.json")
    parser.add_argument("model", help="a shipped model's name or a file of weights")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--atlases", type=int, default=10, help="images that vote on each")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that label")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    content = json.loads((arguments.dataset_dir / "dataset.json").read_text(encoding="utf-8"))
    classes = 1 + len(json.loads((arguments.dataset_dir / "labels.json").read_text(encoding="utf-8"))["labels"])
    if not 0 < arguments.atlases < len(content["training"]):
        raise SystemExit(f"--atlases must be of 1 to {len(content['training']) - 1}, got {arguments.atlases}.")
    network = load_pretrained(arguments.model).eval()
    pad = SpatialPad(SIZE)
    images: dict[str, MetaTensor] = {}
    labels: dict[str, torch.Tensor] = {}
    for entry in tqdm([entry for name in SECTIONS for entry in content[name]], desc="reading", unit="image"):
        images[entry["image"]] = pad(prepare(read_volume(arguments.dataset_dir / entry["image"])))
        labels[entry["image"]] = pad(read_volume(arguments.dataset_dir / entry["label"])).as_tensor().round()
    candidates = [entry["image"] for entry in content["training"]]
    choice = random.Random(arguments.seed)
    (arguments.output_dir / "labels").mkdir(parents=True, exist_ok=True)
    described: dict[str, list[dict[str, str]]] = {
        name: [
            {
                key: value
                if key.endswith("label")
                else os.path.relpath(arguments.dataset_dir / value, arguments.output_dir)
                for key, value in entry.items()
            }
            for entry in entries
        ]
        for name, entries in content.items()
    }
    jobs = [
        {**entry, "others": choice.sample([name for name in candidates if name != entry["image"]], arguments.atlases)}
        for section in SECTIONS
        for entry in content[section]
    ]

    def label(job: dict[str, Any]) -> str:
        volume = images[job["image"]]
        atlases = [(images[name].as_tensor(), one_hot(labels[name], classes, dim=0)) for name in job["others"]]
        fused = fuse(network, volume.as_tensor(), atlases)
        found = MetaTensor(fused, affine=volume.affine, applied_operations=volume.applied_operations)
        affine = volume.meta["original_affine"]
        found = Orientation(nib.aff2axcodes(affine), labels=None)(pad.inverse(found))
        nib.save(nib.Nifti1Image(found[0].numpy().astype(np.uint8), affine), arguments.output_dir / job["label"])
        return str(job["label"])

    loader = DataLoader(Dataset(jobs, label), batch_size=None, num_workers=arguments.num_workers)
    for _ in tqdm(loader, desc="labelling", unit="image"):
        pass
    shutil.copy(arguments.dataset_dir / "labels.json", arguments.output_dir)
    # the last file: where it is, the others are
    write_json(described, arguments.output_dir / "dataset.json")


if __name__ == "__main__":
    main()
