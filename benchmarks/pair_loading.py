# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""
How soon the pairs of many subjects can be used, and what memory they take while one after the other is loaded.

    python benchmarks/pair_loading.py --subjects 300 --size 64 --pairs 500 --mode cache_dir

Makes NIfTI files of random images and label maps in a temporary folder, puts the preprocessing of the bundle's
training and all ordered pairs upon them, draws pairs as the training does, and prints one line of JSON: seconds from
the made files to the dataset and to the first pair (imports not counted), resident memory at pair 20 and at the last,
in MiB, its growth, and seconds a pair.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from torch.utils.data import RandomSampler

from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.utils import set_determinism

import monai_sacb
from monai_sacb.data import PairDataset, collate_pairs, make_pairs

CONFIG = Path(__file__).resolve().parents[1] / "bundle" / "configs" / "train.json"
MODES = {"cache_dir": {"cache_rate": 0.0}, "cache_rate_0": {"cache_rate": 0.0}, "cache_rate_1": {"cache_rate": 1.0}}
# by which allocators have got their working memory
SETTLED_PAIR = 20


def resident_mib() -> float:
    """Resident memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_subjects(folder: Path, subjects: int, size: int) -> None:
    """NIfTI files of random images and label maps with a dataset.json."""
    rng = np.random.default_rng(0)
    entries = []
    # two more, for validation, so that none of the others is held out
    for i in range(subjects + 2):
        entry = {"image": f"./image_{i:04d}.nii.gz", "label": f"./label_{i:04d}.nii.gz"}
        nib.save(nib.Nifti1Image(rng.random((size,) * 3, dtype=np.float32), np.eye(4)), folder / entry["image"])
        nib.save(nib.Nifti1Image(rng.integers(0, 4, (size,) * 3, np.uint8), np.eye(4)), folder / entry["label"])
        entries.append(entry)
    content = {"training": entries[:subjects], "validation": entries[subjects:]}
    (folder / "dataset.json").write_text(json.dumps(content))


def main() -> None:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description="start time and memory of pair loading")
    parser.add_argument("--subjects", type=int, default=300)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--mode", choices=MODES, default="cache_dir")
    parser.add_argument("--num_workers", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_subjects(folder, options.subjects, options.size)
        set_determinism(0)
        start = time.perf_counter()
        config = ConfigParser(ConfigParser.load_config_file(CONFIG))
        config["dataset_dir"] = str(folder)
        transform = config.get_parsed_content("train#preprocessing")
        request = make_pairs(folder, "training", "all")
        dataset = PairDataset(
            request["data"],
            transform,
            request["pairs"],
            config.get_parsed_content("pair_transform"),
            label_ids=[1, 2, 3],
            cache_dir=folder / "cache" if options.mode == "cache_dir" else None,
            **MODES[options.mode],
        )
        sampler = RandomSampler(dataset, num_samples=options.pairs)
        loader = DataLoader(
            dataset, sampler=sampler, batch_size=1, num_workers=options.num_workers, collate_fn=collate_pairs
        )
        made = time.perf_counter() - start
        memory = {}
        for i, _ in enumerate(loader, start=1):
            if i == 1:
                first = time.perf_counter() - start
            if i in (SETTLED_PAIR, options.pairs):
                memory[i] = resident_mib()
        total = time.perf_counter() - start
    growth = memory[options.pairs] / memory[SETTLED_PAIR] - 1
    result = {
        "mode": options.mode,
        "subjects": options.subjects,
        "pairs_there_are": len(dataset),
        "pairs_loaded": options.pairs,
        "dataset_s": round(made, 2),
        "first_pair_s": round(first, 2),
        f"mib_at_pair_{SETTLED_PAIR}": round(memory[SETTLED_PAIR], 1),
        "mib_at_last_pair": round(memory[options.pairs], 1),
        "growth_percent": round(100 * growth, 2),
        "s_per_pair": round((total - first) / max(options.pairs - 1, 1), 4),
        "version": monai_sacb.__version__,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
