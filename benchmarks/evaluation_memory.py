# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Resident memory of one evaluation of many pairs.

    python benchmarks/evaluation_memory.py --pairs 200

makes volumes of noise with label maps in a temporary folder, evaluates pairs of them with a network as it starts by
the bundle's `evaluate.json` (all metrics, tables, journal), and prints one line of JSON: resident memory at pair 20 and
at the last, in MiB, and its growth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import islice, permutations
from pathlib import Path

import torch
from ignite.engine import Events
from pair_loading import SETTLED_PAIR, make_subjects, resident_mib

from monai.bundle import ConfigWorkflow

from monai_sacb.networks.nets import SACBNet

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"


def main() -> None:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--size", type=int, default=16)
    options = parser.parse_args()
    if options.pairs <= SETTLED_PAIR:
        parser.error(f"--pairs must be above {SETTLED_PAIR}")
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        number = next(n for n in range(2, options.pairs + 2) if n * (n - 1) >= options.pairs)
        make_subjects(folder, number, options.size)
        listed = islice(permutations(range(number), 2), options.pairs)
        rows = [",".join(f"{kind}_{i:04d}.nii.gz" for kind in ("image", "label") for i in pair) for pair in listed]
        (folder / "pairs.csv").write_text("\n".join(["moving,fixed,moving_label,fixed_label", *rows, ""]))
        torch.save(SACBNet(base_channels=2, num_clusters=3).state_dict(), folder / "model.pt")
        workflow = ConfigWorkflow(
            config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
            workflow_type="train",
            logging_file=False,
            val_pairs=str(folder / "pairs.csv"),
            dataset_dir=None,
            pairs=str(folder / "pairs.csv"),
            output_dir=str(folder / "output"),
            ckpt_path=str(folder / "model.pt"),
            device=torch.device("cpu"),
            num_resamples=10,
            **{"network_def#base_channels": 2, "network_def#num_clusters": 3},
        )
        workflow.run_id = "evaluating"
        workflow.initialize()
        evaluator = workflow.parser.get_parsed_content("validate#evaluator")
        for pair in (SETTLED_PAIR, options.pairs):
            evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=pair), lambda: memory.append(resident_mib()))
        workflow.run()
        pairs = json.loads((folder / "output" / "summary.json").read_text())["pairs"]
    first, last = memory
    result = {
        "pairs": pairs,
        f"mib_at_pair_{SETTLED_PAIR}": round(first, 1),
        "mib_at_last_pair": round(last, 1),
        "growth_percent": round(100 * (last / first - 1), 2),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
