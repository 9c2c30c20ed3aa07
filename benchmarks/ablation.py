# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What each part of the network and of its training is worth on the hippocampus set: one short training for each arm.

    python benchmarks/ablation.py --dataset_dir Task04_Hippocampus --output_dir output_ablation --epochs 10 --seeds 0

trains each arm as `data_hippocampus.json` says but for one thing, for the same number of steps, and prints Dice and
folds of the 60 pairs after the last step. Arms that are done are not trained again. With ``--label_weight``, labels
count in training. A step of a symmetric arm registers a pair in both directions, which costs as much as two steps of
the others; such arms are there for as many steps, and for as many registrations.
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
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from monai.bundle import ConfigParser

from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.blocks import SACBlock
from monai_sacb.networks.layers import KMeans, warp

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


class _Constant(nn.Module):
    """A small network of a block that does not see the centroids: it has its parameters and one answer for all."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, centroids: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.zeros_like(centroids))


class _EachLevel(nn.Module):
    """The loss, and the local NCC of halved images at the levels 2 to 4 under the fields that the network has there."""

    def __init__(self, loss: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.similarity = LNCCLoss(kernel_size=5)
        self.fields: list[torch.Tensor] = []
        for estimator in list(network.estimators)[1:]:
            estimator.register_forward_hook(self._keep)

    def _keep(self, estimator: nn.Module, inputs: tuple[torch.Tensor, ...], ddf: torch.Tensor) -> None:
        if estimator.training:
            self.fields.append(ddf)

    def forward(self, pred: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value = self.loss(pred, target)
        moving, fixed = target["moving_image"], target["fixed_image"]
        for level, ddf in enumerate(reversed(self.fields), 1):
            moving, fixed = F.avg_pool3d(moving, 2), F.avg_pool3d(fixed, 2)
            value = value + 0.5**level * self.similarity(warp(moving, ddf), fixed)
        self.fields.clear()
        return value


class _Average:
    """Exchange the weights after the last step for their exponential average over about the last fifty."""

    def __init__(self, network: nn.Module, decay: float = 0.98) -> None:
        self.network = network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def __call__(self, engine: Engine) -> None:
        self.average.update_parameters(self.network)
        if engine.state.iteration == engine.state.max_epochs * engine.state.epoch_length:
            self.network.load_state_dict(self.average.module.state_dict())


def _each_block(change: Callable[[SACBlock], None]) -> Callable[[ConfigParser], None]:
    def apply(parser: ConfigParser) -> None:
        for block in parser.get_parsed_content("network").modules():
            if isinstance(block, SACBlock):
                change(block)

    return apply


def _without_clusters(block: SACBlock) -> None:
    block.clusterer = _NoClusters()


def _with_gradient(block: SACBlock) -> None:
    block.clusterer = _MeansWithGradient(block.clusterer)


def _constant_gates(block: SACBlock) -> None:
    block.gate_mlp = _Constant(block.gate_mlp)


def _constant_biases(block: SACBlock) -> None:
    block.bias_mlp = _Constant(block.bias_mlp)


def _loss_of_each_level(parser: ConfigParser) -> None:
    trainer = parser.get_parsed_content("train#trainer")
    trainer.loss_function = _EachLevel(trainer.loss_function, parser.get_parsed_content("network"))


def _averaged(parser: ConfigParser) -> None:
    trainer = parser.get_parsed_content("train#trainer")
    # before any handler that looks at the weights at the end of an epoch
    trainer.add_event_handler(Events.ITERATION_COMPLETED, _Average(parser.get_parsed_content("network")))


class Arm(NamedTuple):
    """What is different; with ``length`` times the steps."""

    text: str
    overrides: Mapping[str, Any] = MappingProxyType({})
    change: Callable[[ConfigParser], None] | None = None
    files: tuple[str, ...] = ()
    length: float = 1.0


ARMS = {
    "base": Arm("K = 7, matching scaled, LNCC window 5"),
    "plain": Arm("no clusters: the same parameters, constant gates and biases", change=_each_block(_without_clusters)),
    "gates_off": Arm("constant gates, biases by cluster", change=_each_block(_constant_gates)),
    "biases_off": Arm("constant biases, gates by cluster", change=_each_block(_constant_biases)),
    "k1": Arm("K = 1: gates of the mean feature", {"network_def#num_clusters": 1}),
    "k3": Arm("K = 3", {"network_def#num_clusters": 3}),
    "k15": Arm("K = 15", {"network_def#num_clusters": 15}),
    "gradient": Arm("gradients through the centroids", change=_each_block(_with_gradient)),
    "unscaled": Arm("matching as in the paper, not scaled", {"network_def#scaled_matching": False}),
    "corners": Arm("fields doubled by voxel areas, not corners", {"network_def#align_corners": False}),
    "diffeomorphic": Arm("velocities integrated at each level", {"network_def#diffeomorphic": True}),
    "passes": Arm("two passes, half the steps", {"network_def#num_passes": 2}, length=0.5),
    "symmetric": Arm("both directions, inverse consistency", files=("symmetric.json",)),
    "symmetric_half": Arm("the same, half the steps", files=("symmetric.json",), length=0.5),
    "symmetric_strong": Arm(
        "the same, inverse consistency ten times as heavy",
        {"inverse_consistency_weight": 0.1},
        files=("symmetric.json",),
        length=0.5,
    ),
    "directions": Arm("both directions alone", {"inverse_consistency_weight": 0.0}, files=("symmetric.json",)),
    "window9": Arm("LNCC window 9", {"lncc_window": 9}),
    "window7": Arm("LNCC window 7", {"lncc_window": 7}),
    "lambda_half": Arm("half the regularization", {"regularization_weight": 0.05, "bending_weight": 0.5}),
    "lambda_double": Arm("twice the regularization", {"regularization_weight": 0.2, "bending_weight": 2.0}),
    "levels": Arm("a loss at each level", change=_loss_of_each_level),
    "average": Arm("average of the weights", change=_averaged),
    "augment": Arm("augmentation", files=("augment.json",)),
}


def train(arm: Arm, output_dir: Path, overrides: dict[str, Any], size: list[int] | None = None) -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "data_hippocampus.json", *arm.files)])
    for key, value in {**overrides, "output_dir": str(output_dir), **arm.overrides}.items():
        parser[key] = value
    if size is not None:
        crop = {
            "_target_": "CenterSpatialCropd",
            "keys": ["image", "label"],
            "roi_size": size,
            "allow_missing_keys": True,
        }
        parser["subject_transforms"] = [*parser["subject_transforms"], crop]
    parser.get_parsed_content("initialize")
    if arm.change is not None:
        arm.change(parser)
    # validates after the last epoch, and only then
    parser.get_parsed_content("train#trainer").run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=15, help="of 20 steps each")
    parser.add_argument("--label_weight", type=float, default=0.0)
    parser.add_argument("--size", nargs=3, type=int, help="of the middle that images are cropped to: less time a step")
    arguments = parser.parse_args()
    lines = []
    for name in arguments.arms:
        dice, folds = [], []
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{name}_{seed}_{arguments.epochs}epochs_label{arguments.label_weight:g}"
            if arguments.size:
                folder = folder.with_name(f"{folder.name}_{'x'.join(map(str, arguments.size))}")
            if not (folder / "summary.json").is_file():
                start, epochs = time.perf_counter(), round(ARMS[name].length * arguments.epochs)
                options = {
                    "dataset_dir": arguments.dataset_dir,
                    "seed": seed,
                    "max_epochs": epochs,
                    "val_interval": epochs,
                    "saved_pairs": 0,
                    "label_weight": arguments.label_weight,
                }
                train(ARMS[name], folder, options, arguments.size)
                sys.stderr.write(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s\n")
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            dice.append(summary["val_dice/mean"])
            folds.append(summary["val_folds_percent"])
        spread = f" ± {statistics.stdev(dice):.4f}" if len(dice) > 1 else ""
        lines.append(f"| {ARMS[name].text} | {statistics.mean(dice):.4f}{spread} | {statistics.mean(folds):.3f} % |")
    sys.stdout.write("\n".join(["| | Dice, nearest | folds |", "|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    main()
