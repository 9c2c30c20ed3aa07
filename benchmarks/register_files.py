# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice of pairs of files registered by ``monai_sacb.apps.register``, for groups of labels.

    python benchmarks/register_files.py --folders DIR/aligned_2mm DIR/raw --labels DIR/labels.json --pairs 10 2 \\
        --output_dir OUT --model none --refine 200 --greedy

Each folder has images and label maps, in subfolders images and labels or as *_image.nii.gz and *_label.nii.gz; of each
the first pairs of successive subjects are registered (of two subjects both ways). Which labels are cortical and which
subcortical is in bundle/configs/data_oasis.json; maps may have FreeSurfer's ids or the overlay's renumbered ones.
Labels are warped to the nearest voxel. Seconds are those of the whole registration, from reading to the report. With
``--greedy`` (``pip install picsl_greedy``), greedy registers the same files, affinely from their centres and then
deformably at full resolution with the settings of peer_methods.py; its seconds are those of the tool alone.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from peer_methods import GREEDY, GREEDY_AFFINE

from monai.bundle import ConfigParser

from monai_sacb.apps import RegistrationResult, register
from monai_sacb.apps.pair_metrics import compare_labels
from monai_sacb.data import SpatialMapping, read_displacement
from monai_sacb.data.displacement_files import ddf_from_field
from monai_sacb.data.volumes import read_label_volume
from monai_sacb.metrics import compute_folds

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"
GROUPS = ("cortical", "subcortical")


def list_pairs(folder: Path, number: int) -> list[tuple[tuple[Path, Path], tuple[Path, Path]]]:
    """Image and label map of the moving and of the fixed subject."""
    nested = (folder / "images").is_dir()
    images, labels = (
        sorted((folder / kind).glob("*.nii.gz") if nested else folder.glob(f"*_{kind[:-1]}.nii.gz"))
        for kind in ("images", "labels")
    )
    subjects = list(zip(images, labels))
    return [(subjects[i], subjects[(i + 1) % len(subjects)]) for i in range(min(number, len(subjects)))]


def read_groups() -> list[dict[str, set[int]]]:
    """Ids of each group, as the overlay of the data set has them: renumbered by their order, and FreeSurfer's."""
    parser = ConfigParser()
    # an overlay changes entries of the training config
    parser.read_config([str(CONFIGS / name) for name in ("train.json", "data_oasis.json")])
    labels, groups = parser["labels"], parser.get_parsed_content("label_groups")
    position = {label: index for index, label in enumerate(parser["renumbered_ids"])}
    freesurfer = {group: {labels[name] for name in names} for group, names in groups.items()}
    return [{group: {position[label] for label in ids} for group, ids in freesurfer.items()}, freesurfer]


def group_means(structures: dict[str, float], groups: dict[str, set[int]]) -> list[float]:
    return [statistics.fmean(v for k, v in structures.items() if int(k) in groups[group]) for group in GROUPS]


def register_by_greedy(moving: Path, fixed: Path, folder: Path) -> tuple[SpatialMapping, list[float]]:
    """Its mapping, and seconds and percentage of folds."""
    sitk: Any = importlib.import_module("SimpleITK")
    tool: Any = importlib.import_module("picsl_greedy").Greedy3D()
    images = {
        name: sitk.ReadImage(str(path), sitk.sitkFloat32) for name, path in (("fixed", fixed), ("moving", moving))
    }
    common = "-i fixed moving -threads 1 -seed 1 -V 0"
    start = time.perf_counter()
    tool.execute(f"{common} {GREEDY_AFFINE.replace('identity', 'image-centers')} -o affine", **images, affine=None)
    tool.execute(f"{common} {GREEDY} -it affine -wp 0 -o warp", warp=None)
    seconds = time.perf_counter() - start
    tool.execute("-V 0 -rf fixed -rc both -wp 0 -r warp affine", both=None)
    path = folder / "greedy_displacement.nii.gz"
    sitk.WriteImage(tool["both"], str(path))
    field = read_displacement(path)
    return SpatialMapping([field]), [seconds, float(compute_folds(ddf_from_field(field)[None]))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Dice of pairs of files.")
    parser.add_argument("--folders", nargs="+", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", type=int, default=[10])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", default="none")
    parser.add_argument("--refine", type=int)
    parser.add_argument("--fine", type=int)
    parser.add_argument("--greedy", action="store_true")
    options = parser.parse_args()
    numbering = read_groups()
    rows, greedy_rows = [], []
    for folder, number in zip(options.folders, options.pairs, strict=True):
        for (moving, moving_label), (fixed, fixed_label) in list_pairs(folder, number):
            name = f"{moving.name.split('.')[0]}_to_{fixed.name.split('.')[0]}"
            start = time.perf_counter()
            result = register(
                fixed=str(fixed),
                moving=str(moving),
                output_dir=str(options.output_dir / name),
                model=options.model,
                refine=options.refine,
                fine=options.fine,
            )
            seconds = time.perf_counter() - start
            if not isinstance(result, RegistrationResult):
                raise TypeError(f"one result was expected, got {type(result).__name__}.")
            maps = [read_label_volume(str(path)) for path in (moving_label, fixed_label)]
            # the identifiers of the cortex begin at 1000 in FreeSurfer's numbering
            groups = numbering[int(maps[1].max() >= 1000)]
            affine = SpatialMapping(result.mapping.stages[1:])
            dice = compare_labels(*maps, {"affine": affine, "after": result.mapping}, mode="nearest")
            row = [seconds, result.metrics["folds_percent"], result.metrics["inverse_consistency_mm"]["median"]]
            for stage in ("affine", "after"):
                row += group_means(dice[stage]["structures"], groups)
            rows.append(row)
            sys.stdout.write(f"{name}: {result.verdict}, " + ", ".join(f"{value:.4f}" for value in row) + "\n")
            if options.greedy:
                mapping, row = register_by_greedy(moving, fixed, options.output_dir / name)
                dice = compare_labels(*maps, {"after": mapping}, mode="nearest")
                greedy_rows.append(row + group_means(dice["after"]["structures"], groups))
                sys.stdout.write("    greedy: " + ", ".join(f"{value:.4f}" for value in greedy_rows[-1]) + "\n")
            sys.stdout.flush()
    means = [statistics.fmean(column) for column in zip(*rows)]
    titles = ["seconds", "folds %", "inverse mm", *(f"{s} {g}" for s in ("affine", "registered") for g in GROUPS)]
    sys.stdout.write(
        f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n| {' | '.join(f'{mean:.4f}' for mean in means)} |\n"
    )
    if greedy_rows:
        means = [statistics.fmean(column) for column in zip(*greedy_rows)]
        sys.stdout.write("greedy, seconds, folds %, cortical, subcortical: ")
        sys.stdout.write(", ".join(f"{mean:.4f}" for mean in means) + "\n")


if __name__ == "__main__":
    main()
