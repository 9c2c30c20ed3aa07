# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Put the weights of a training into the bundle: with a card, and the training's curves as a table and a plot.

    python benchmarks/ship_model.py --output_dir output_supervised --name hippocampus \
        --title "hippocampus, with labels" --data "..." --licence "..." --command "..." \
        --evaluation output_evaluated/summary.json --settings '{"working_grid#spacing": 1.0}'

writes NAME.pt (or ``--file``.pt) and its card NAME.json into bundle/models, NAME_training.csv and NAME_training.png
into bundle/docs. Whenever the weights are loaded by name, the card's ``sha256`` is compared and its ``settings`` used.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai_sacb.networks import load_pretrained
from monai_sacb.utils import file_digest, replacing, write_json

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"


def training_curves(log_dir: Path) -> dict[int, dict[str, float]]:
    """
    Of each epoch: the mean loss of its steps, its terms, and the metrics of the validation after it.

    After its last epoch a training validates the best weights once more, and evaluations may write into the same
    folder: what counts is the first number after the end of an epoch, and before that of the next one.
    """
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if "train_loss" not in tags:
        raise SystemExit(f"'{log_dir}' does not hold the curves of a training.")
    terms = [tag for tag in tags if tag.startswith("loss_")]
    epochs = {event.step for tag in terms for event in events.Scalars(tag)}
    steps = events.Scalars("train_loss")
    length = len(steps) // len(epochs)
    curves: dict[int, dict[str, float]] = {
        epoch: {"train_loss": sum(event.value for event in steps[length * i : length * (i + 1)]) / length}
        for i, epoch in enumerate(sorted(epochs))
    }
    ended = {event.step: event.wall_time for event in events.Scalars(terms[0])}
    for tag in tags:
        for event in events.Scalars(tag):
            epoch, after = event.step, ended.get(event.step + 1, math.inf)
            if tag != "train_loss" and epoch in curves and ended[epoch] - 1 <= event.wall_time <= after:
                curves[epoch].setdefault(tag, event.value)
    return curves


def read_curves(path: Path) -> dict[int, dict[str, float]]:
    """What :py:func:`write_curves` has written."""
    with open(path, newline="", encoding="utf-8") as file:
        return {
            int(row.pop("epoch")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def write_curves(curves: dict[int, dict[str, float]], path: Path) -> None:
    names = sorted({name for row in curves.values() for name in row}, key=lambda name: (name != "train_loss", name))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *names])
        for epoch, row in curves.items():
            writer.writerow([epoch, *(f"{row[name]:.5f}" if name in row else "" for name in names)])


def plot_curves(curves: dict[int, dict[str, float]], title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, names in (
        (
            left,
            ["train_loss", *sorted({name for row in curves.values() for name in row if name.startswith("loss_")})],
        ),
        (right, ["val_dice_before", "val_dice", "val_dice_linear"]),
    ):
        for name in names:
            points = [(epoch, row[name]) for epoch, row in curves.items() if name in row]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if axis is right else None)
        axis.set_xlabel("epoch")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="of the training")
    parser.add_argument("--name", required=True, help="what register --model calls it")
    parser.add_argument("--file", help="name of the file, if it is another")
    parser.add_argument("--title", required=True)
    parser.add_argument("--data", required=True, help="what it was trained on")
    parser.add_argument("--licence", required=True, help="of the data and of the weights")
    parser.add_argument("--command", required=True, help="by which it was trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="entries of the configs to be used with it")
    parser.add_argument("--before", type=Path, help="curves, as CSV, of the training that this one went on from")
    parser.add_argument("--evaluation", type=Path, help="summary.json of its evaluation")
    arguments = parser.parse_args()
    stem = arguments.file or arguments.name
    source, target = arguments.output_dir / "model.pt", BUNDLE / "models" / f"{stem}.pt"
    state = torch.load(source, map_location="cpu", weights_only=True)
    curves = training_curves(arguments.output_dir / "tensorboard")
    if arguments.before is not None:
        before = read_curves(arguments.before)
        curves = {**before, **{max(before) + epoch: row for epoch, row in curves.items()}}
    metrics = {}
    if arguments.evaluation is not None:
        summary = json.loads(arguments.evaluation.read_text(encoding="utf-8"))
        metrics = {key: value for key, value in summary.items() if "/" not in key or key.endswith("/mean")}
    card = {
        "name": arguments.name,
        "title": arguments.title,
        "sha256": file_digest(source),
        "parameters": sum(value.numel() for value in state.values() if value.is_floating_point()),
        "data": arguments.data,
        "licence": arguments.licence,
        "training": {
            "command": arguments.command,
            "seed": arguments.seed,
            "epochs": max(curves),
            "best_val_dice": max((row["val_dice"] for row in curves.values() if "val_dice" in row), default=None),
        },
        "metrics": metrics,
        "settings": arguments.settings,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("monai-sacb", "monai", "torch")},
    }
    target.parent.mkdir(exist_ok=True)
    write_curves(curves, BUNDLE / "docs" / f"{stem}_training.csv")
    plot_curves(curves, arguments.title, BUNDLE / "docs" / f"{stem}_training.png")
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
    write_json(card, target.with_suffix(".json"))
    # refuses what cannot be used
    load_pretrained(arguments.name)


if __name__ == "__main__":
    main()
