# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""A label bundle behind the real server of MONAI Label, on loopback, asked over REST and by its Python client.

    python benchmarks/label_server.py --bundle BUNDLE --images DIR/raw/*_03_image.nii.gz \\
        --labels DIR/raw/*_03_label.nii.gz --concurrent 8

Run it by a Python that has monailabel (README.md says how to install it). Each image is asked for once as a study, by
REST; the first also as an upload, and by the client. All answers must have the shape and the affine of the image and
be equal; Dice is of the structures that the atlas and the subject's label map have, by their ids, 0 for one that the
answer has lost. Then as many requests as said are sent at
once, and each answer must be that of before. The server keeps its files in a private folder, which is removed, and is
stopped in every case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

ROOT = Path(__file__).resolve().parents[1]
# seconds
START, ANSWER, STOP = 900, 3600, 20
# mm, of 32-bit numbers
ROUNDING = 1e-6
# torchvision's wheel on PyPI cannot load its operators beside a torch for CPUs; monailabel needs but their names
LAUNCH = """
import runpy, sys, torch
if sys.argv.pop(1) == "without":
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
runpy.run_module("monailabel.main", run_name="__main__")
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(arguments: Sequence[str], work: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of MONAI Label, which is stopped at the end, with all that it has started."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(work / "tmp"),
        # any other source than the default, which asks the internet at the start
        "MONAI_ZOO_SOURCE": "ngc",
    }
    operators = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, env=environment)
    with open(log, "a", encoding="utf-8") as output:
        # its temporary files are made by names: the folder and the umask keep them private
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "without" if operators.returncode else "with", *arguments],
            cwd=work,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            umask=0o077,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                if process.poll() is None:
                    os.killpg(process.pid, number)
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                continue
            break


@contextmanager
def running_server(bundle: Path, work: Path, log: Path) -> Iterator[str]:
    """The address of a server with the bundle and the studies in ``work``; it is stopped at the end."""
    (work / "tmp").mkdir(mode=0o700)
    app = work / "apps" / "monaibundle"
    with started(["apps", "--download", "--name", app.name, "--output", "apps"], work, log) as copying:
        if copying.wait(START) != 0 or not app.is_dir():
            raise RuntimeError(f"the app monaibundle could not be copied; see '{log}'.")
    shutil.copytree(bundle, app / "model" / bundle.name)
    port = free_port()
    arguments = ["start_server", "--app", str(app), "--studies", str(work / "studies")]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in {"models": bundle.name, "skip_trainers": "true", "sam2": "false"}.items():
        arguments += ["--conf", name, value]
    with started(arguments, work, log) as server:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; see '{log}'.")
            try:
                if requests.get(f"{address}/info/", timeout=START).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), np.asarray(image.affine)


def asked(address: str, model: str, image: str, answer: Path, upload: Path | None = None) -> float:
    """Seconds of one request over REST; its label map is written to a file."""
    start = time.perf_counter()
    files = None
    if upload is not None:
        files = {"file": (upload.name, upload.read_bytes())}
    response = requests.post(
        f"{address}/infer/{model}",
        params={"output": "image", **({} if upload else {"image": image})},
        data={"params": json.dumps({"device": "cpu"})},
        files=files,
        timeout=ANSWER,
    )
    response.raise_for_status()
    answer.write_bytes(response.content)
    return time.perf_counter() - start


def check(answer: Path, image: Path) -> np.ndarray:
    """The labels, if they lie where the image does; oblique axes are rounded once more as the answer is written."""
    (labels, affine), (voxels, expected) = read(answer), read(image)
    difference = float(np.abs(affine - expected).max())
    if labels.shape != voxels.shape or difference > ROUNDING:
        raise ValueError(f"'{answer}': shape {labels.shape} and affine {difference:g} off those of '{image}'.")
    return labels


def dice(answer: np.ndarray, truth: np.ndarray, model_ids: Collection[int]) -> dict[int, float]:
    """Of each structure that the atlas and the subject have: 0 where the answer has lost it, as in the evaluation."""
    ids = sorted(set(model_ids) & {int(i) for i in np.unique(truth)} - {0})
    return {
        i: 2 * float(((answer == i) & (truth == i)).sum() / ((answer == i).sum() + (truth == i).sum())) for i in ids
    }


def by_client(address: str, model: str, image: str) -> tuple[Path, dict[str, Any]]:
    from monailabel.client import MONAILabelClient

    file, parameters = MONAILabelClient(server_url=address).infer(model=model, image_id=image, params={"device": "cpu"})
    return Path(file), parameters


def scores(found: dict[int, float], groups: dict[str, set[int]]) -> str:
    parts = []
    for name, ids in {"all": set(found), **groups}.items():
        values = [value for i, value in found.items() if i in ids]
        parts.append(f"{name} {statistics.fmean(values):.4f}" if values else f"{name} none")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="A label bundle behind the server of MONAI Label.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", nargs="+", type=Path, required=True)
    parser.add_argument("--labels", nargs="*", type=Path, default=[])
    parser.add_argument("--groups", action="store_true", help="Dice of the groups of data_oasis.json, FreeSurfer's ids")
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--log", type=Path, default=Path("label_server.log"))
    options = parser.parse_args()
    if options.labels and len(options.labels) != len(options.images):
        parser.error(f"{len(options.images)} images and {len(options.labels)} label maps do not belong together")
    # as an interruption does: the server is stopped, and the folder removed
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    groups: dict[str, set[int]] = {}
    if options.groups:
        from register_files import read_groups

        groups = read_groups()[1]
    model = options.bundle.resolve().name
    # a folder that nobody else may look into
    with tempfile.TemporaryDirectory(prefix="label_server_") as folder:
        work = Path(folder)
        answers = work / "answers"
        for place in (work / "studies", answers):
            place.mkdir()
        studies = {}
        for number, image in enumerate(options.images):
            suffix = ".nii.gz" if image.name.endswith(".gz") else image.suffix
            studies[f"subject_{number}"] = Path(shutil.copy(image, work / "studies" / f"subject_{number}{suffix}"))
        with running_server(options.bundle.resolve(), work, options.log) as address:
            info = requests.get(f"{address}/info/", timeout=ANSWER).json()["models"][model]
            say(f"model '{model}' ({info['type']}), {len(info['labels'])} labels")
            results = {}
            for number, (name, image) in enumerate(studies.items()):
                seconds = asked(address, model, name, answers / f"{name}.nii.gz")
                results[name] = check(answers / f"{name}.nii.gz", image)
                difference = np.abs(read(answers / f"{name}.nii.gz")[1] - read(image)[1]).max()
                line = f"{options.images[number].name}: {seconds:.1f} s, affines differ by {difference:.1g}"
                if options.labels:
                    found = dice(results[name], read(options.labels[number])[0], info["labels"].values())
                    line += f", Dice of {len(found)} structures: {scores(found, groups)}"
                say(line)
            first = next(iter(studies))
            asked(address, model, first, answers / "upload.nii.gz", upload=studies[first])
            file, parameters = by_client(address, model, first)
            for kind, path in (("upload", answers / "upload.nii.gz"), ("client", file)):
                if not np.array_equal(check(path, studies[first]), results[first]):
                    raise ValueError(f"the answer to the {kind} differs from that to the study.")
            file.unlink()
            say(f"upload and Python client: the same answer; {json.dumps(parameters['registration'])}")
            names = [list(studies)[i % len(studies)] for i in range(options.concurrent)]
            start = time.perf_counter()
            paths = [answers / f"concurrent_{i}.nii.gz" for i in range(len(names))]
            pool = ThreadPoolExecutor(max(1, len(names)))
            try:
                list(pool.map(lambda job: asked(address, model, *job), zip(names, paths)))
            finally:
                # where this is interrupted, requests end when the server does
                pool.shutdown(wait=False, cancel_futures=True)
            for name, path in zip(names, paths):
                if not np.array_equal(check(path, studies[name]), results[name]):
                    raise ValueError(f"a concurrent answer for '{name}' differs from the one before.")
            say(f"{len(names)} concurrent requests: the same answers, {time.perf_counter() - start:.1f} s in all")
            time.sleep(1)
            left = sorted(str(path.relative_to(work)) for path in (work / "tmp").rglob("*") if path.is_file())
            private = not stat.S_IMODE((work / "tmp").stat().st_mode) & 0o077
            say(f"temporary files: folder {'private' if private else 'OPEN'}, left behind: {left or 'none'}")
    say("server stopped")


if __name__ == "__main__":
    main()
