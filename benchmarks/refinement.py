# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice against steps and seconds of the refinement from coarse to fine, on pairs of OASIS-TRT-20.

    python benchmarks/refinement.py --dataset_dir DIR/aligned_2mm --steps 0 25 50 100 200
    python benchmarks/refinement.py --dataset_dir DIR/aligned_2mm --weights output_oasis/model.pt --steps 0 50 100

DIR/aligned_2mm has images/ and labels/, DIR has labels.json. The start is no displacement, or with ``--weights`` the
field of the bundle's network, whose own seconds count too. Pairs are those of neighbors in the list of subjects:
``--first`` and ``--pairs`` choose among them. Dice is of labels warped to the nearest; seconds are CPU time of all
threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# of the time that a pair takes; set before the libraries that read them are loaded
_THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv[:-1] else "1"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = _THREADS

import torch  # noqa: E402

from monai.bundle import ConfigParser  # noqa: E402
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityRangePercentilesd  # noqa: E402

from monai_sacb.handlers.checkpoint import load_weights  # noqa: E402
from monai_sacb.inferers import InstanceOptimization  # noqa: E402
from monai_sacb.metrics import compute_folds, compute_sdlogj  # noqa: E402
from monai_sacb.networks import stored_setting  # noqa: E402
from monai_sacb.networks.layers import warp  # noqa: E402
from monai_sacb.utils import plain_tensor  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"


def read_subjects(folder: Path) -> list[dict[str, torch.Tensor]]:
    scale = {"lower": 0.5, "upper": 99.5, "b_min": 0.0, "b_max": 1.0, "clip": True}
    load = Compose(
        [
            LoadImaged(["image", "label"]),
            EnsureChannelFirstd(["image", "label"]),
            ScaleIntensityRangePercentilesd("image", **scale),
        ]
    )
    files = zip(sorted((folder / "images").iterdir()), sorted((folder / "labels").iterdir()))
    loaded = (load({"image": str(image), "label": str(label)}) for image, label in files)
    return [{key: plain_tensor(one[key])[None].float() for key in ("image", "label")} for one in loaded]


def mean_dice(warped: torch.Tensor, fixed: torch.Tensor, labels: Sequence[int]) -> float:
    """Mean over the labels that either image has."""
    first, second = (x.long().flatten() for x in (warped, fixed))
    size = 1 + max(int(first.max()), int(second.max()), *labels)
    both = torch.bincount(first[first == second], minlength=size).double()
    total = torch.bincount(first, minlength=size).double() + torch.bincount(second, minlength=size)
    return float((2 * both / total)[list(labels)].nanmean())


def read_network(weights: str) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "data_oasis.json", "evaluate.json")])
    parser["network_def#self_similarity"] = stored_setting(weights, "self_similarity", False)
    network: torch.nn.Module = parser.get_parsed_content("network_def").eval()
    load_weights(network, weights)
    return network


def measure(
    moving: dict[str, torch.Tensor],
    fixed: dict[str, torch.Tensor],
    network: torch.nn.Module | None,
    optimization: InstanceOptimization,
    steps: int,
    groups: Sequence[Sequence[int]],
) -> list[float]:
    before = time.process_time()
    with torch.no_grad():
        images = torch.cat([moving["image"], fixed["image"]], 1)
        start = torch.zeros(1, 3, *images.shape[2:]) if network is None else network(images)
    ddf = optimization(moving["image"], fixed["image"], start, steps)
    seconds = time.process_time() - before
    warped = warp(moving["label"], ddf, mode="nearest")
    dice = [mean_dice(warped, fixed["label"], group) for group in groups]
    return [*dice, float(compute_folds(ddf)), float(compute_sdlogj(ddf)), seconds]


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Dice against steps of the refinement, on pairs of OASIS-TRT-20.")
    parser.add_argument("--dataset_dir", required=True, help="aligned_2mm or aligned_1mm")
    parser.add_argument("--weights", help="of the bundle's network; the start is its field")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 25, 50, 100, 200])
    parser.add_argument("--set", nargs="*", default=[], help="settings of InstanceOptimization: name=JSON value")
    parser.add_argument("--first", type=int, default=0, help="first pair")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings: dict[str, Any] = {}
    for setting in options.set:
        name, _, value = setting.partition("=")
        settings[name] = json.loads(value)
    optimization = InstanceOptimization(**settings)
    folder = Path(options.dataset_dir)
    ids = json.loads((folder.parent / "labels.json").read_text(encoding="utf-8"))
    rare = set(ids["rare_do_not_score"])
    groups = [[i for i in ids[key] if i not in rare] for key in ("cortical_DKT31", "subcortical_paired_scored")]
    subjects = read_subjects(folder)
    pairs = list(itertools.pairwise(subjects))[options.first : options.first + options.pairs]
    network = None if options.weights is None else read_network(options.weights)
    write("| steps | cortical Dice | subcortical Dice | folds % | SDlogJ | CPU s/pair | gain per s |")
    write("|---" * 7 + "|")
    first: list[float] | None = None
    for steps in options.steps:
        rows = [measure(moving, fixed, network, optimization, steps, groups) for moving, fixed in pairs]
        mean = [statistics.fmean(column) for column in zip(*rows)]
        first = first or mean
        # of the mean of both groups, against the first row
        seconds = mean[4] - first[4]
        gain = f"{(sum(mean[:2]) - sum(first[:2])) / 2 / seconds:.4f}" if seconds > 0.01 else ""
        cells = [str(steps), *(f"{value:.4f}" for value in mean[:4]), f"{mean[4]:.2f}", gain]
        write("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
