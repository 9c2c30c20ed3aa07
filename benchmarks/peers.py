# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Registration tools, and networks of this project's interface, on the same pairs, judged by the same metrics.

    pip install antspyx picsl_greedy itk-elastix convexAdam
    python benchmarks/peers.py --dataset_dir DIR --dataset hippocampus --output_dir OUT \\
        --methods identity synpreset syn syncc greedy elastix convexadam \\
        --weights sacb=output_hippocampus/model.pt voxelmorph=OUT_VXM/model.pt,benchmarks/voxelmorph.json --refine 50

All methods get the same arrays: those of the bundle's evaluation with the overlay bundle/configs/data_<dataset>.json.
Weights are ``name=file``, or ``name=file,overlay`` where the overlay defines another network; with ``--refine STEPS``
each network appears as it is and refined by each of these numbers of steps, and so does the refinement alone, from no
displacement. With ``--contrast`` the moving image gets another contrast, as if of another modality. OUT/peers.csv has a
row for each pair and method and grows as they are done: the same command goes on where the last one ended, and tries
again what failed. OUT/<method>.log has what a tool wrote. Seconds are CPU time, of all threads. The settings of the
tools are constants of peer_methods.py.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# of the time that one method takes; set before the libraries that read them are loaded, here and in the workers
_THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv[:-1] else "1"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ[_name] = _THREADS

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peer_methods import CONFIGS, METHODS, Method, Network, Optimization, Registration, Worker  # noqa: E402

from monai.bundle import ConfigParser  # noqa: E402
from monai.metrics import DiceMetric  # noqa: E402

from monai_sacb.data import PairDataset  # noqa: E402
from monai_sacb.metrics import compute_folds, compute_label_hausdorff, compute_sdlogj, lowest_mean  # noqa: E402
from monai_sacb.networks.layers import warp  # noqa: E402
from monai_sacb.transforms import warp_labels  # noqa: E402
from monai_sacb.utils import pair_names, plain_tensor  # noqa: E402

# a tool's own warp and ours differ by rounding and by what they do at the image's edge; a wrong field by far more
MAX_WARP_DIFFERENCE = 0.01
# what a moving image of intensities 0 to 1 is turned into; the background stays 0
CONTRASTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda image: image,
    "gamma": lambda image: image**2,
    "inverted": lambda image: torch.where(image > 0, 1 - image, image),
}


def read_pairs(
    dataset: str, dataset_dir: str, output_dir: str, settings: Sequence[str]
) -> tuple[PairDataset, dict[str, list[int]]]:
    """The pairs of the bundle's evaluation, and the labels (positions) of each group that has a mean of its own."""
    parser = ConfigParser()
    parser.read_config([str(path) for path in config_files(dataset)])
    parser["dataset_dir"], parser["output_dir"] = dataset_dir, output_dir
    for setting in settings:
        name, _, value = setting.partition("=")
        parser[name] = value
    pairs = parser.get_parsed_content("validate#dataset")
    names = parser.get_parsed_content("label_names")
    chosen = (parser.get_parsed_content("label_groups") if "label_groups" in parser else None) or {}
    groups = {group: [names.index(name) for name in members] for group, members in chosen.items()}
    return pairs, groups or {"all": list(range(len(names)))}


def config_files(dataset: str) -> list[Path]:
    return [CONFIGS / "train.json", CONFIGS / f"data_{dataset}.json"]


def measure(
    pair: Mapping[str, Any], image: np.ndarray, found: Registration, groups: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Every metric of one pair; ``image`` is the moving image that the method was given."""
    ddf = torch.from_numpy(found.ddf)[None]
    if not bool(torch.isfinite(ddf).all()):
        raise RuntimeError("the field is not finite")
    moving, fixed = (plain_tensor(pair[f"{role}_label"])[None] for role in ("moving", "fixed"))
    num_labels = 1 + max(max(group) for group in groups.values())
    values: dict[str, float] = {}
    if found.warped is not None:
        # the middle: at the edge of the image tools differ in what lies outside
        inner = tuple(slice(2, -2) for _ in range(3))
        ours = warp(torch.from_numpy(image)[None, None], ddf)[0, 0]
        difference = (ours - torch.as_tensor(found.warped, dtype=torch.float32)).abs()[inner].mean()
        values["warp_difference"] = float(difference)
        if not values["warp_difference"] < MAX_WARP_DIFFERENCE:
            raise RuntimeError(f"the tool's warped image differs from ours by {float(difference):.4f}")
    for name, warped in (("dice", warp(moving, ddf, mode="nearest")), ("dice_linear", warp_labels(moving, ddf))):
        dice = DiceMetric(include_background=False, num_classes=num_labels + 1)(warped, fixed)[0]
        for group, members in groups.items():
            values[f"{name}/{group}"] = float(dice[list(members)].double().nanmean())
        if name == "dice":
            distances = compute_label_hausdorff(warped, fixed, pair["fixed_image"].pixdim.tolist(), num_labels)[0]
            # a label that has vanished shows in its Dice; one infinite distance would hide all others
            distances[distances.isinf()] = torch.nan
            for group, members in groups.items():
                values[f"hd95/{group}"] = float(distances[list(members)].double().nanmean())
    values["folds_percent"] = float(compute_folds(ddf))
    values["sdlogj"] = float(compute_sdlogj(ddf))
    values["seconds"], values["wall_seconds"] = found.cpu_seconds, found.wall_seconds
    return values


def columns(groups: Mapping[str, Sequence[int]]) -> list[str]:
    per_group = [f"{name}/{group}" for group in groups for name in ("dice", "dice_linear", "hd95")]
    numbers = [*per_group, "folds_percent", "sdlogj", "seconds", "wall_seconds", "warp_difference"]
    return ["pair", "moving", "fixed", "method", "status", *numbers]


def read_rows(path: Path, header: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """What an earlier run has done, by pair and method; of repeated ones the last."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(header):
            raise ValueError(f"'{path}' has other columns than this run: {reader.fieldnames}.")
        # a killed run may have left half a line
        rows = [row for row in reader if None not in row.values()]
    return {(row["pair"], row["method"]): row for row in rows}


def table(
    rows: Mapping[tuple[str, str], Mapping[str, str]], methods: Sequence[str], groups: Mapping[str, Any], pairs: int
) -> str:
    """Means over the pairs that succeeded, as Markdown."""
    titles = ["method"]
    for group in groups:
        of = "" if len(groups) == 1 else f"{group} "
        titles += [f"{of}Dice", f"{of}linear", f"{of}Dice30", f"{of}HD95"]
    titles += ["folds %", "SDlogJ", "s/pair", "pairs", "failed"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for method in methods:
        own = [row for (pair, name), row in rows.items() if name == method and int(pair) < pairs]
        done = [row for row in own if row["status"] == "done"]

        def mean(column: str, digits: int, done: Sequence[Mapping[str, str]] = done) -> str:
            values = [float(row[column]) for row in done if not math.isnan(float(row[column]))]
            return f"{statistics.fmean(values):.{digits}f}" if values else ""

        cells = [method]
        for group in groups:
            lowest = float(lowest_mean([float(row[f"dice/{group}"]) for row in done]))
            cells += [mean(f"dice/{group}", 4), mean(f"dice_linear/{group}", 4)]
            cells += [f"{lowest:.4f}" if done else "", mean(f"hd95/{group}", 2)]
        cells += [mean("folds_percent", 4), mean("sdlogj", 4), mean("seconds", 2), str(len(done))]
        lines.append("| " + " | ".join([*cells, str(len(own) - len(done))]) + " |")
    return "\n".join(lines)


def chosen_methods(options: argparse.Namespace) -> dict[str, tuple[type[Method], tuple[Any, ...]]]:
    methods = {name: METHODS[name] for name in options.methods}
    configs = [str(path) for path in config_files(options.dataset)]
    for iterations in options.refine:
        methods[f"refinement {iterations}"] = (Optimization, (configs, iterations))
    for weights in options.weights:
        name, _, files = weights.partition("=")
        file, _, overlay = files.partition(",")
        for iterations in dict.fromkeys((0, *options.refine)):
            label = f"{name} refined {iterations}" if iterations else name
            all_configs = [*configs, overlay] if overlay else configs
            methods[label] = (Network, (all_configs, os.path.abspath(file), iterations))
    return methods


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Registration tools and networks on the same pairs.")
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--dataset", required=True, help="the overlay bundle/configs/data_<dataset>.json")
    parser.add_argument("--set", nargs="*", default=[], help="entries of the overlay: name=value")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=["identity"])
    parser.add_argument("--weights", nargs="*", default=[], help="name=file or name=file,overlay")
    parser.add_argument("--refine", type=int, nargs="*", default=[], help="steps of refinement")
    parser.add_argument("--contrast", choices=list(CONTRASTS), default="same", help="of the moving image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first pairs")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    pairs, groups = read_pairs(options.dataset, options.dataset_dir, options.output_dir, options.set)
    number = len(pairs) if options.limit is None else min(options.limit, len(pairs))
    methods = chosen_methods(options)
    header, path = columns(groups), output / "peers.csv"
    rows = read_rows(path, header)
    workers = {
        name: Worker(method, arguments, options.threads, str(output / f"{name.replace(' ', '_')}.log"))
        for name, (method, arguments) in methods.items()
    }
    new = not path.is_file()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        if new:
            writer.writeheader()
        for index in range(number):
            missing = [name for name in methods if rows.get((str(index), name), {}).get("status") != "done"]
            if not missing:
                continue
            pair = pairs[index]
            moving, fixed = (plain_tensor(pair[f"{role}_image"])[0].numpy() for role in ("moving", "fixed"))
            moving = CONTRASTS[options.contrast](torch.from_numpy(moving)).numpy()
            names = pair_names(pair)
            for name in missing:
                row = {"pair": str(index), "moving": names[0], "fixed": names[1], "method": name, "status": "done"}
                # one number is missing where a method has no warp of its own, all where it failed
                row.update(dict.fromkeys(header[len(row) :], "nan"))
                try:
                    found = workers[name].register(moving, fixed, pair["fixed_image"].pixdim.tolist())
                    row.update({key: f"{value:.6g}" for key, value in measure(pair, moving, found, groups).items()})
                except RuntimeError as error:
                    row["status"] = f"failed: {error}".replace("\n", " ")[:300]
                rows[(str(index), name)] = row
                writer.writerow(row)
                file.flush()
                write(f"pair {index}, {name}: {row['status']}, Dice {row[header[5]]}, {row['seconds']} s")
    for worker in workers.values():
        worker.close()
    write(table(rows, list(methods), groups, number))


if __name__ == "__main__":
    main()
