# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What each part of the network and of its training is worth on the hippocampus set: one short training for each arm.

    python benchmarks/ablation.py --dataset_dir Task04_Hippocampus --output_dir output_ablation --epochs 15 --seeds 0

trains each arm as `data_hippocampus.json` says but for one thing, for the same number of steps, and prints Dice and
folds of the 60 pairs after the last step. Arms that are done are not trained again. With ``--label_weight``, labels
count in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from monai.bundle import ConfigParser

from monai_sacb.networks.blocks import SACBlock
from monai_sacb.networks.layers import KMeans

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"


class _NoClusters(nn.Module):
    """One cluster with a centroid of zeros: gates and bias are constants, as in a plain convolution."""

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, count, channels = points.shape
        return points.new_zeros(batch, count, dtype=torch.long), points.new_zeros(batch, 1, channels)


class _MeansWithGradient(nn.Module):
    """Centroids computed once more, as the means of the features assigned to them, so that gradients pass."""

    def __init__(self, clusterer: KMeans) -> None:
        super().__init__()
        self.clusterer = clusterer

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels, centroids = self.clusterer(points)
        sums = torch.zeros_like(centroids, dtype=points.dtype)
        index = labels.long()[..., None].expand_as(points)
        sums = sums.scatter_add(1, index, points)
        counts = points.new_zeros(*centroids.shape[:2], 1).scatter_add(
            1, labels.long()[..., None], torch.ones_like(points[..., :1])
        )
        return labels, torch.where(counts > 0, sums / counts.clamp(min=1), centroids.to(points.dtype))


def _each_block(change: Callable[[SACBlock], None]) -> Callable[[nn.Module], None]:
    def apply(network: nn.Module) -> None:
        for block in network.modules():
            if isinstance(block, SACBlock):
                change(block)

    return apply


def _without_clusters(block: SACBlock) -> None:
    block.clusterer = _NoClusters()


def _with_gradient(block: SACBlock) -> None:
    block.clusterer = _MeansWithGradient(block.clusterer)


class Arm(NamedTuple):
    """What is different."""

    text: str
    overrides: Mapping[str, Any] = MappingProxyType({})
    change: Callable[[nn.Module], None] | None = None
    files: tuple[str, ...] = ()


ARMS = {
    "base": Arm("K = 7, matching scaled, LNCC window 5"),
    "plain": Arm("no clusters: the same parameters, constant gates", change=_each_block(_without_clusters)),
    "k1": Arm("K = 1: gates of the mean feature", {"network_def#num_clusters": 1}),
    "k3": Arm("K = 3", {"network_def#num_clusters": 3}),
    "k15": Arm("K = 15", {"network_def#num_clusters": 15}),
    "gradient": Arm("gradients through the centroids", change=_each_block(_with_gradient)),
    "unscaled": Arm("matching as in the paper, not scaled", {"network_def#scaled_matching": False}),
    "diffeomorphic": Arm("velocities integrated at each level", {"network_def#diffeomorphic": True}),
    "window9": Arm("LNCC window 9", {"lncc_window": 9}),
    "augment": Arm("augmentation", files=("augment.json",)),
}


def train(arm: Arm, output_dir: Path, overrides: dict[str, Any]) -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "data_hippocampus.json", *arm.files)])
    for key, value in {**overrides, "output_dir": str(output_dir), **arm.overrides}.items():
        parser[key] = value
    parser.get_parsed_content("initialize")
    if arm.change is not None:
        arm.change(parser.get_parsed_content("network"))
    parser.get_parsed_content("training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=15, help="of 20 steps each")
    parser.add_argument("--label_weight", type=float, default=0.0)
    arguments = parser.parse_args()
    lines = []
    for name in arguments.arms:
        dice, folds = [], []
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{name}_{seed}_{arguments.epochs}epochs_label{arguments.label_weight:g}"
            if not (folder / "summary.json").is_file():
                start = time.perf_counter()
                options = {
                    "dataset_dir": arguments.dataset_dir,
                    "seed": seed,
                    "max_epochs": arguments.epochs,
                    "val_interval": arguments.epochs,
                    "saved_pairs": 0,
                    "label_weight": arguments.label_weight,
                }
                train(ARMS[name], folder, options)
                sys.stderr.write(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s\n")
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            dice.append(summary["val_dice/mean"])
            folds.append(summary["val_folds_percent"])
        spread = f" ± {statistics.stdev(dice):.4f}" if len(dice) > 1 else ""
        lines.append(f"| {ARMS[name].text} | {statistics.mean(dice):.4f}{spread} | {statistics.mean(folds):.3f} % |")
    sys.stdout.write("\n".join(["| | Dice, nearest | folds |", "|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    main()
