# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Memory and seconds that a registration of two large images takes, against those that it says it would.

    python benchmarks/large_pair.py --shape 512 512 400 --output_dir output_large

makes two images of smooth blobs, the one bent into the other, as 16-bit NIfTI, asks `monai-sacb register --dry_run` for
the expected seconds and memory, and registers them. Prints one line of JSON: working grid, expected and seen peak
resident memory in MB (10⁶ bytes) and seconds, and the exit code with the last line of a refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

SPACING = (0.7, 0.7, 0.8)
# voxels of the noise whose interpolation makes the blobs
BLOBS = 20
# largest displacement, as a part of the image
BEND = 0.02
SEEN = ("code", "memory_mb", "seconds", "cpu_seconds")


def write_blobs(path: Path, shape: list[int], bend: float) -> None:
    """Blobs in an ellipsoid, slice by slice."""
    coarse = torch.rand(1, 1, BLOBS, BLOBS, BLOBS, generator=torch.Generator().manual_seed(0))
    voxels = np.zeros(shape, np.int16)
    first, second, third = (torch.linspace(-1, 1, size) for size in shape)
    plane = torch.stack(torch.meshgrid(second, third, indexing="ij"), -1)
    for i, place in enumerate(first):
        points = torch.cat([torch.full_like(plane[..., :1], float(place)), plane], -1)
        points = points + 2 * bend * torch.sin(4 * points.roll(1, -1))
        values = F.grid_sample(coarse, points.flip(-1)[None, None], mode="bilinear", align_corners=True)[0, 0, 0]
        inside = points.square().sum(-1) < 0.8
        voxels[i] = torch.where(inside, 200 + 800 * values, 0).to(torch.int16).numpy()
    nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING, 1.0])), path)


def _first_to_go() -> None:
    """Should the machine have too little memory, this process is the one to end, not another's."""
    if sys.platform.startswith("linux"):
        Path("/proc/self/oom_score_adj").write_text("1000")


def run(arguments: list[str]) -> dict[str, Any]:
    """Run the command line; its exit code, output, peak resident memory in MB and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "monai_sacb", "register", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_first_to_go
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "code": process.returncode,
        "output": output,
        "memory_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def main() -> None:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400])
    parser.add_argument("--refine", type=int, default=10)
    parser.add_argument("--affine", default="false")
    parser.add_argument("--output_dir", type=Path, default=Path("output_large"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    paths = [options.output_dir / f"{name}.nii" for name in ("fixed", "moving")]
    for path, bend in zip(paths, (0.0, BEND)):
        write_blobs(path, options.shape, bend)
    arguments = ["--fixed", str(paths[0]), "--moving", str(paths[1]), "--output_dir", str(options.output_dir / "pair")]
    arguments += ["--refine", str(options.refine), "--affine", options.affine]
    plan = run([*arguments, "--dry_run"])
    if plan["code"] != 0:
        raise SystemExit(plan["output"])
    said = json.loads(plan["output"][plan["output"].index("{") :])
    seen = run(arguments)
    result = {
        "shape": options.shape,
        "working_grid": said["working_grid"],
        "dry_run": {key: plan[key] for key in SEEN},
        "expected": {"memory_mb": said["expected_memory_mb"], "seconds": said["expected_seconds"]},
        "seen": {key: seen[key] for key in SEEN},
    }
    if seen["code"] in (0, 3):
        result["seconds_of_stages"] = json.loads((options.output_dir / "pair" / "metrics.json").read_text())["seconds"]
    else:
        result["last_line"] = seen["output"].strip().splitlines()[-1:]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
