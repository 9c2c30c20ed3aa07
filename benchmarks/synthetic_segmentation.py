# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
Label T1 images cut out around the hippocampus by a network that has seen no image at all.

    python benchmarks/synthetic_segmentation.py MAPS_DIR DATASET_DIR OUTPUT_DIR

A UNet is trained on images made of whole-head label maps (``*.nii.gz``, FreeSurfer ids) around each hippocampus: random
shapes, T1-like contrasts and, one in five, any contrast. Then it labels the images of the lists ``training`` and
``validation`` of a dataset; the labels of the dataset are not read. OUTPUT_DIR becomes a dataset of the same images and
pairs with the labels ``STRUCTURES``, for training and validation without labels of one's own, with ``labels.json``, a
config that says so.

Source: Billot et al., SynthSeg: segmentation of brain MRI scans of any contrast and resolution without retraining,
Medical Image Analysis 2023, for the idea.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    LoadImage,
    MapTransform,
    OneOf,
    Orientation,
    RandAdjustContrastd,
    RandBiasFieldd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    ScaleIntensity,
    ScaleIntensityRangePercentiles,
    ScaleIntensityRangePercentilesd,
    SpatialPad,
)
from monai.utils import set_determinism

from monai_sacb.transforms import RandDiffeomorphismd, RandLabelsToImaged
from monai_sacb.utils import write_json

SIZE = (48, 64, 48)
# of the maps, as much around a hippocampus as deformations may reach
REACH = (80, 96, 80)
HIPPOCAMPI = (17, 53)
# FreeSurfer ids
STRUCTURES = {
    "hippocampus": HIPPOCAMPI,
    "amygdala": (18, 54),
    "ventricle": (4, 43, 5, 44, 31, 63),
    "white_matter": (2, 41, 7, 46),
    "cortex": (3, 42, 8, 47),
}
# intensity in T1: of tissues, and below of what is in none
TISSUES = {
    0.95: (2, 41, 7, 46, 85, 16, 28, 60),
    0.6: (3, 42, 8, 47, 11, 50, 12, 51, 26, 58, 17, 53, 18, 54),
    0.8: (10, 49, 13, 52),
    0.1: (4, 43, 5, 44, 14, 15, 24, 72),
}
SECTIONS = ("training", "validation")
HEAD_ID, HEAD_INTENSITY, OTHER_INTENSITY = 500, 0.3, 0.1


class RandKeepAroundd(RandomizableTransform, MapTransform):
    """
    Blacken all but a box around one label, as images are that were cut out around it.

    Args:
        keys: what is blackened; all alike.
        label_key: label map.
        label: the label.
        margins: least and greatest distance of a side of the box from the label, in voxels.
    """

    def __init__(self, keys: list[str], label_key: str, label: int, margins: tuple[int, int] = (2, 9)) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.label_key, self.label, self.margins = label_key, label, margins

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize(None)
        found = torch.nonzero(torch.as_tensor(data[self.label_key])[0] == self.label)
        result = dict(data)
        if len(found) == 0:
            return result
        margins = torch.from_numpy(self.R.randint(self.margins[0], self.margins[1] + 1, (2, found.shape[1])))
        first, last = (found.amin(0) - margins[0]).clamp(min=0), found.amax(0) + 1 + margins[1]
        box = (slice(None), *(slice(int(a), int(b)) for a, b in zip(first, last)))
        for key in self.key_iterator(data):
            kept = torch.zeros_like(data[key])
            kept[box] = data[key][box]
            result[key] = kept
        return result


def read_volume(path: Path) -> MetaTensor:
    """(1, *spatial), in RAS."""
    return Compose([LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS", labels=None)])(path)


# what networks are given: (1, *spatial), in RAS, scaled to [0, 1], of SIZE at least
prepare = Compose(
    [
        LoadImage(image_only=True),
        EnsureChannelFirst(),
        Orientation("RAS", labels=None),
        ScaleIntensityRangePercentiles(0.5, 99.5, 0.0, 1.0, clip=True),
        ScaleIntensity(),
        SpatialPad(SIZE),
    ]
)


def on_own_grid(label: torch.Tensor, image: MetaTensor) -> nib.Nifti1Image:
    """The label (1, *spatial) of a prepared image, on the grid of its file."""
    found = MetaTensor(label, affine=image.affine, applied_operations=list(image.applied_operations))
    found = prepare.inverse(found)
    return nib.Nifti1Image(found[0].numpy().astype(np.uint8), image.meta["original_affine"])


def relabelled(content: Mapping[str, Any], dataset_dir: Path, output_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The content of a dataset.json for a folder with new labels of the same images, labels/NAME of each."""
    if output_dir.resolve() == dataset_dir.resolve():
        raise SystemExit(f"'{output_dir}' holds the dataset itself: its labels would be lost.")
    names = [Path(entry["image"]).name for section in SECTIONS for entry in content[section]]
    if len(set(names)) < len(names):
        raise SystemExit(f"'{dataset_dir}' has images of one name in several folders.")

    def there(image: str) -> str:
        return os.path.relpath(dataset_dir / image, output_dir)

    def label_of(image: str) -> str:
        return f"labels/{Path(image).name}"

    described = {
        section: [{"image": there(entry["image"]), "label": label_of(entry["image"])} for entry in content[section]]
        for section in SECTIONS
    }
    described["registration_val"] = []
    for pair in content.get("registration_val", []):
        files = {role: there(pair[role]) for role in ("fixed", "moving")}
        described["registration_val"].append(files | {f"{role}_label": label_of(pair[role]) for role in files})
    return described


def hippocampus_regions(maps_dir: Path) -> tuple[list[torch.Tensor], list[int]]:
    """The maps (1, *REACH) around each hippocampus, in numbers of the list of ids that comes with them."""
    regions = []
    for path in tqdm(sorted(maps_dir.glob("*.nii.gz")), desc="reading", unit="map"):
        volume = read_volume(path)[0].numpy().round().astype(np.int64)
        padded = np.pad(volume, [(size, size) for size in REACH])
        for label in HIPPOCAMPI:
            place = np.argwhere(volume == label)
            if len(place) == 0:
                raise SystemExit(f"'{path}' has no label {label}.")
            start = (place.min(0) + place.max(0)) // 2 - np.asarray(REACH) // 2
            regions.append(padded[tuple(slice(s + n, s + 2 * n) for s, n in zip(start, REACH))])
    if not regions:
        raise SystemExit(f"'{maps_dir}' holds no label maps (*.nii.gz).")
    ids = sorted({0}.union(*(np.unique(region).tolist() for region in regions)))
    return [torch.from_numpy(np.searchsorted(ids, region)).short()[None] for region in regions], ids


def synthesis(ids: list[int]) -> Compose:
    """From a map ``label`` to an image and the structures in it."""
    intensities = {number: value for value, group in TISSUES.items() for number in group}
    means = [intensities.get(i, HEAD_INTENSITY if i >= HEAD_ID else OTHER_INTENSITY) for i in ids]
    means[0] = 0.0
    number = {label: i for i, label in enumerate(ids)}
    contrast: dict[str, Any] = {
        "num_labels": len(ids) - 1,
        "groups": [[number[i] for i in group if i in number] for group in TISSUES.values()],
    }
    target = torch.zeros(len(ids), dtype=torch.uint8)
    for value, group in enumerate(STRUCTURES.values(), start=1):
        target[[number[i] for i in group if i in number]] = value

    def structures(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"image": data["image"], "label": target[torch.as_tensor(data["label"])[:1].long()]}

    return Compose(
        [
            RandDiffeomorphismd(
                "label", spatial_size=SIZE, amplitude=3.0, rotation=0.25, scaling=0.2, translation=4.0, subsamples=True
            ),
            RandFlipd("label", prob=0.5, spatial_axis=0),
            OneOf(
                [
                    RandLabelsToImaged("label", "image", means=means, spread=0.12, **contrast),
                    RandLabelsToImaged("label", "image", **contrast),
                ],
                weights=[0.8, 0.2],
            ),
            structures,
            RandBiasFieldd("image", prob=0.7, coeff_range=(-0.15, 0.15)),
            RandGaussianSmoothd("image", prob=0.7, sigma_x=(0.25, 0.8), sigma_y=(0.25, 0.8), sigma_z=(0.25, 0.8)),
            RandGaussianNoised("image", prob=0.7, std=0.05),
            RandAdjustContrastd("image", prob=0.7, gamma=(0.75, 1.35)),
            RandKeepAroundd(["image", "label"], "label", 1),
            ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True),
        ]
    )


def train(maps_dir: Path, steps: int, learning_rate: float = 2e-3, batch_size: int = 2) -> torch.nn.Module:
    """The mean of the weights of the last some hundred steps."""
    regions, ids = hippocampus_regions(maps_dir)
    drawn = [{"label": random.choice(regions)} for _ in range(steps * batch_size)]
    loader = DataLoader(Dataset(drawn, synthesis(ids)), batch_size=batch_size, num_workers=0)
    network = UNet(3, 1, len(STRUCTURES) + 1, (24, 48, 96, 192), (2, 2, 2), num_res_units=2, norm="instance")
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    bar = tqdm(loader, desc="training", unit="step")
    for batch in bar:
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(batch["image"])
        loss = loss_function(scores.float(), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return averaged.module.eval()


def label_image(network: torch.nn.Module, path: Path) -> nib.Nifti1Image:
    """The structures of an image file, on its own grid; the network is asked for the image and its mirror image."""
    image = prepare(path)
    infer = SlidingWindowInferer(SIZE, overlap=0.5)
    with torch.inference_mode():
        scores = infer(image[None].as_tensor(), network).softmax(1)
        scores += infer(image[None].as_tensor().flip(2), network).softmax(1).flip(2)
    return on_own_grid(scores.argmax(1).byte(), image)


def main() -> None:
    """Train, and label a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps_dir", type=Path)
    parser.add_argument("dataset_dir", type=Path, help="with a dataset.json")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=3000, help="of training, with two images each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    content = json.loads((arguments.dataset_dir / "dataset.json").read_text(encoding="utf-8"))
    described = relabelled(content, arguments.dataset_dir, arguments.output_dir)
    set_determinism(arguments.seed)
    network = train(arguments.maps_dir, arguments.steps)
    (arguments.output_dir / "labels").mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), arguments.output_dir / "segmentation.pt")
    for section in SECTIONS:
        for old, new in zip(tqdm(content[section], desc=f"labelling {section}", unit="image"), described[section]):
            nib.save(label_image(network, arguments.dataset_dir / old["image"]), arguments.output_dir / new["label"])
    numbers = {name: value for value, name in enumerate(STRUCTURES, start=1)}
    write_json({"labels": numbers}, arguments.output_dir / "labels.json")
    # the last file: where it is, the others are
    write_json(described, arguments.output_dir / "dataset.json")


if __name__ == "__main__":
    main()
