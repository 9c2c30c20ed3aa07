# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The flow estimators on other encoders, with and without the spatial-awareness blocks, under one budget.

    python benchmarks/encoders.py --dataset_dir Task04_Hippocampus --output_dir output_encoders

trains each arm on the hippocampus set as `data_hippocampus.json` says but for the encoder, for the same number of
steps, and prints Dice and folds of the 60 pairs after the last step, the number of parameters, and the CPU seconds of a
training step by itself. "Without" are the same parameters, whose gates and biases do not depend on clusters. Arms that
are done are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ablation import ARMS, CONFIGS, Arm, train

from monai.bundle import ConfigParser

ENCODERS = {
    "paper": ("SACB-Net's own", ()),
    "swin": ("MONAI's SwinTransformer", ("encoder_swin.json",)),
    "resnet": ("MONAI's ResNet", ("encoder_resnet.json",)),
    "segresnet": ("MONAI's SegResNet", ("encoder_segresnet.json",)),
}
SIZE = (48, 64, 48)


def cost(arm: Arm, repeats: int = 5) -> tuple[int, float]:
    """Number of parameters, and the median CPU seconds of a step on a pair of noise."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "data_hippocampus.json", *arm.files)])
    torch.manual_seed(0)
    network, loss = parser.get_parsed_content("network"), parser.get_parsed_content("loss")
    optimizer = parser.get_parsed_content("optimizer")
    device = parser.get_parsed_content("device")
    if arm.change is not None:
        arm.change(parser)
    images = torch.rand(1, 2, *SIZE, device=device)
    batch = {"moving_image": images[:, :1], "fixed_image": images[:, 1:]}
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        optimizer.zero_grad()
        loss(network(images), batch).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return sum(parameter.numel() for parameter in network.parameters()), statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--epochs", type=int, default=15, help="of 10 steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options: dict[str, Any] = {
        "dataset_dir": arguments.dataset_dir,
        "seed": arguments.seed,
        "pairs_per_epoch": 10,
        "max_epochs": arguments.epochs,
        "val_interval": arguments.epochs,
        "saved_pairs": 0,
        # validated at its end, and not again
        "training": ["$@train#trainer.run()"],
    }
    lines = []
    for name in arguments.encoders:
        text, files = ENCODERS[name]
        for blocks, change in (("with", None), ("without", ARMS["plain"].change)):
            arm = Arm(text, change=change, files=files)
            folder = arguments.output_dir / f"{name}_{blocks}_{arguments.seed}_{arguments.epochs}epochs"
            if not (folder / "summary.json").is_file():
                start = time.perf_counter()
                train(arm, folder, options)
                sys.stderr.write(f"{name} {blocks}: {time.perf_counter() - start:.0f} s\n")
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            parameters, seconds = cost(arm)
            lines.append(
                f"| {text} | {blocks} | {summary['val_dice/mean']:.3f} | {summary['val_folds_percent']:.3f} % | "
                f"{parameters / 1e6:.2f} million | {seconds:.2f} |"
            )
    head = ["| encoder | SACB | Dice, nearest | folds | parameters | CPU seconds a step |", "|---|---|---|---|---|---|"]
    sys.stdout.write("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
