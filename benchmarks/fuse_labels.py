# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Label the images of a dataset anew, each by the labels of others that a model has laid on it.

    python benchmarks/fuse_labels.py DATASET_DIR MODEL OUTPUT_DIR

DATASET_DIR holds a dataset.json whose lists ``training`` and ``validation`` have images of at most 48x64x48 voxels and
labels, as benchmarks/synthetic_segmentation.py writes it, and ``labels.json``. Each image receives, voxel by voxel, the
label that most of ``--atlases`` images of the list ``training``, never itself, agree on: what is wrong in one label
alone is voted down. OUTPUT_DIR becomes a dataset of the same images and pairs with the new labels.

Source: Heckemann et al., Automatic anatomical brain MRI segmentation combining label propagation and decision fusion,
NeuroImage 2006.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from synthetic_segmentation import SECTIONS, SIZE, on_own_grid, prepare, read_volume, relabelled
from tqdm import tqdm

from monai.data import DataLoader, Dataset, MetaTensor
from monai.networks.utils import one_hot
from monai.transforms import SpatialPad

from monai_sacb.networks import load_pretrained
from monai_sacb.networks.layers import warp
from monai_sacb.utils import write_json


def fuse(
    network: torch.nn.Module, fixed: torch.Tensor, atlases: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
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
        raise SystemExit(f"--atlases must be from 1 to {len(content['training']) - 1}, got {arguments.atlases}.")
    described = relabelled(content, arguments.dataset_dir, arguments.output_dir)
    network = load_pretrained(arguments.model)
    pad = SpatialPad(SIZE)
    images: dict[str, MetaTensor] = {}
    labels: dict[str, torch.Tensor] = {}
    for entry in tqdm([entry for name in SECTIONS for entry in content[name]], desc="reading", unit="image"):
        image = prepare(arguments.dataset_dir / entry["image"])
        if image.shape[1:] != SIZE:
            raise SystemExit(f"'{entry['image']}' is larger than {SIZE} voxels.")
        images[entry["image"]] = image
        labels[entry["image"]] = pad(read_volume(arguments.dataset_dir / entry["label"])).as_tensor().round()
    candidates = [entry["image"] for entry in content["training"]]
    choice = random.Random(arguments.seed)
    jobs = [
        {
            "image": old["image"],
            "label": new["label"],
            "others": choice.sample([name for name in candidates if name != old["image"]], arguments.atlases),
        }
        for section in SECTIONS
        for old, new in zip(content[section], described[section])
    ]

    def label(job: dict[str, Any]) -> str:
        image = images[job["image"]]
        atlases = [(images[name].as_tensor(), one_hot(labels[name], classes, dim=0)) for name in job["others"]]
        fused = fuse(network, image.as_tensor(), atlases)
        nib.save(on_own_grid(fused, image), arguments.output_dir / job["label"])
        return str(job["label"])

    (arguments.output_dir / "labels").mkdir(parents=True, exist_ok=True)
    loader = DataLoader(Dataset(jobs, label), batch_size=None, num_workers=arguments.num_workers)
    for _ in tqdm(loader, desc="labelling", unit="image"):
        pass
    shutil.copy(arguments.dataset_dir / "labels.json", arguments.output_dir)
    # the last file: where it is, the others are
    write_json(described, arguments.output_dir / "dataset.json")


if __name__ == "__main__":
    main()
