# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed again and again against one that is not.

    python benchmarks/kill_training.py --kills 20 --output_dir output_kills

trains a small network on made-up slices by the bundle's `train.json`, once undisturbed. Then the same training is
killed (SIGKILL) at random moments of its life and started again with `--resume true` until it ends by itself, and begun
anew until there were enough kills. After every third kill, the newest state is cut at a random place, too, and before
every fifth start, the disk is made too small for a state. Weights, the states of optimizer and random numbers, best
metric, tables and curves must be those of the undisturbed training, bit for bit. Prints one line of JSON.

The imports are done once, and each training is a fork of this process: all that follows the imports, from the parsing
of the configs to the end, is where it may be hit. Moments are drawn in CPU time, so that other work does not matter.

    python benchmarks/kill_training.py --early --kills 5 --output_dir output_kills

starts `python -m monai.bundle run` instead and kills it before its first state, imports included; one training meets
all the kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import monai.bundle

import monai_sacb.apps  # noqa: F401, what a training would import later
from monai_sacb.utils import read_checkpoint

CONFIG = Path(__file__).resolve().parents[1] / "bundle" / "configs" / "train.json"
SIZE = (32, 32)
TRAINING: dict[str, Any] = {
    "run_id": "training",
    "config_file": str(CONFIG),
    "logging_file": False,
    "network_def#spatial_dims": 2,
    "network_def#base_channels": 2,
    "network_def#num_clusters": 3,
    "spatial_size": [-1, -1],
    "labels": {"disc": 1, "ring": 2},
    "max_epochs": 6,
    "pairs_per_epoch": 3,
    "val_interval": 2,
    "device": "$torch.device('cpu')",
}
TABLES = ("pairs.csv", "structures.csv", "summary.json")
# bytes of the largest file on the disk that is too small
SMALL_DISK = 100_000


def make_slices(folder: Path) -> None:
    """Discs in rings, with their label maps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, columns = np.indices(SIZE)
    entries = []
    for i in range(6):
        distance = np.hypot(rows - rng.uniform(13, 19), columns - rng.uniform(13, 19))
        label = np.where(distance < 6, 1, np.where(distance < 11, 2, 0)).astype(np.uint8)
        image = ndimage.gaussian_filter(np.array([0.05, 1.0, 0.5])[label] + 0.02 * rng.random(SIZE), 0.7)
        entry = {"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"}
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / entry["image"])
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / entry["label"])
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))


def start(data: Path, output: Path, resume: bool, small_disk: bool = False) -> int:
    """Start a training in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(output.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if small_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, resource.RLIM_INFINITY))
        monai.bundle.run(**TRAINING, dataset_dir=str(data), output_dir=str(output), resume=resume)
        code = 0
    except BaseException as error:
        sys.stderr.write(f"{error!r} from {error.__cause__!r}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_by_command(data: Path, output: Path, resume: bool) -> int:
    """Start a training by the command line; its id."""
    options = {**TRAINING, "dataset_dir": data, "output_dir": output, "resume": resume}
    command = [sys.executable, "-m", "monai.bundle", "run", options.pop("run_id")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log).pid


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(process: int, kill_at: float = float("inf")) -> tuple[int | None, float]:
    """Wait for the end of a process, or kill it at some CPU second; its exit code, None if killed, and its CPU time."""
    used = 0.0
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used
        used = cpu_seconds(process)
        if used >= kill_at:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None, used
        time.sleep(0.005)


def curves(folder: Path) -> dict[tuple[str, int], set[float]]:
    """All values that TensorBoard's files have for a curve and a step."""
    found: dict[tuple[str, int], set[float]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault((tag, event.step), set()).add(event.value)
    return found


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def differences(folder: Path, whole: Path) -> list[str]:
    """What is not as in the undisturbed training."""
    wrong = []
    for name in ("model.pt", "checkpoint.pt", "checkpoint_previous.pt"):
        a, b = (torch.load(place / name, weights_only=True) for place in (folder, whole))
        if not same(a, b):
            wrong.append(name)
    wrong += [name for name in TABLES if (folder / name).read_bytes() != (whole / name).read_bytes()]
    if curves(folder) != curves(whole):
        wrong.append("curves")
    files = [
        sorted(str(p.relative_to(f)) for p in f.rglob("[!.]*") if "events.out" not in p.name) for f in (folder, whole)
    ]
    if files[0] != files[1]:
        wrong.append(f"files {sorted(set(files[0]) ^ set(files[1]))}")
    return wrong


def phase(folder: Path) -> str:
    """How far a training that was killed had come."""
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        try:
            return f"epoch {read_checkpoint(folder / name)['epoch']}"
        except (FileNotFoundError, ValueError):
            # none yet, or one that was cut
            continue
    return "before the first state"


def kill_early(output: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill one training again and again before its first state, and let it end; counts, and what is wrong then."""
    data, whole, folder = (output / name for name in ("data", "whole", "killed"))
    process = start_by_command(data, whole, resume=False)
    folder_made = first_state = 0.0
    while not (whole / "checkpoint.pt").exists() and not os.waitid(
        os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        first_state = cpu_seconds(process)
        folder_made = folder_made if whole.exists() else first_state
        time.sleep(0.005)
    code, life = wait(process)
    if code != 0:
        raise SystemExit(f"the undisturbed training ended with {code}: see '{whole.with_suffix('.log')}'.")
    phases: Counter[str] = Counter()
    for number in range(kills):
        # every second one when there is something of it already
        moment = draw.uniform(folder_made if number % 2 else 0, first_state)
        wait(start_by_command(data, folder, number > 0), moment)
        phases[phase(folder) if folder.exists() else "before its folder"] += 1
    code, _ = wait(start_by_command(data, folder, True))
    wrong = differences(folder, whole) if code == 0 else [f"ended with {code}"]
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*")]
    times = {"CPU seconds to the first state": first_state, "CPU seconds of a training": life}
    return {"kills": kills, "killed at": dict(phases), "temporary files left": left, **times, "wrong": wrong}


def main() -> None:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("output_kills"))
    parser.add_argument("--early", action="store_true", help="kill before the first state, imports included")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    output = options.output_dir.resolve()
    if output.exists():
        raise SystemExit(f"'{output}' exists already; name another folder.")
    data, whole = output / "data", output / "whole"
    make_slices(data)
    if options.early:
        result = kill_early(output, options.kills, draw)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.exit(1 if result["wrong"] else 0)
    code, life = wait(start(data, whole, resume=False))
    if code != 0:
        raise SystemExit(f"the undisturbed training ended with {code}: see '{whole.with_suffix('.log')}'.")
    counts: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    wrong: list[str] = []
    starts = 0
    while counts["kills"] < options.kills:
        counts["trainings"] += 1
        folder = output / f"killed_{counts['trainings']}"
        resume, code = False, None
        while code != 0:
            starts += 1
            small_disk = starts % 5 == 0
            code, _ = wait(start(data, folder, resume, small_disk), draw.uniform(0, life))
            resume = True
            if code is None:
                counts["kills"] += 1
                phases[phase(folder)] += 1
            elif code != 0 and small_disk:
                counts["full disks"] += 1
                if "no space for" not in folder.with_suffix(".log").read_text():
                    wrong.append(f"{folder.name}: no sentence about the disk")
            elif code != 0:
                raise SystemExit(f"'{folder.name}' ended with {code}: see '{folder.with_suffix('.log')}'.")
            newest, before = folder / "checkpoint.pt", folder / "checkpoint_previous.pt"
            if code is None and counts["kills"] % 3 == 0 and newest.is_file() and before.is_file():
                counts["cut states"] += 1
                content = newest.read_bytes()
                newest.write_bytes(content[: draw.randrange(len(content))])
        found = differences(folder, whole)
        wrong += [f"{folder.name}: {name}" for name in found]
        counts["temporary files left"] += len(list(folder.rglob(".*")))
        if not found:
            shutil.rmtree(folder)
    result = {**counts, "killed at": dict(sorted(phases.items())), "CPU seconds of a training": life, "wrong": wrong}
    sys.stdout.write(json.dumps(result) + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
