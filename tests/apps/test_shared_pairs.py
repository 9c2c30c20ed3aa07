# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes on one list of pairs, without any that directs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from several_processes import run_processes
from synthetic_pair import Pair

from monai_sacb.apps import register, registering
from monai_sacb.apps.pair_outputs import output_folder
from monai_sacb.apps.pair_reading import PairFiles
from monai_sacb.apps.registration import request_digest
from monai_sacb.utils import WorkClaims

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["a", "b", "a-long_name", "gone"]


@pytest.fixture
def listed(pair: Pair, tmp_path: Path) -> dict[str, Any]:
    rows = [f"{pair.fixed},{pair.moving},{name}" for name in NAMES[:-1]] + [f"missing.nii,{pair.moving},gone"]
    (tmp_path / "pairs.csv").write_text("\n".join(["fixed,moving,output", *rows]) + "\n")
    options = {"affine": "false", "refine": 0, "resume": True, "num_threads": 1}
    return {"pairs": str(tmp_path / "pairs.csv"), "output_dir": str(tmp_path / "out"), **options}


def times(folder: Path) -> dict[str, int]:
    return {name: os.stat(folder / name / "transform.json").st_mtime_ns for name in NAMES[:-1]}


def test_a_dead_process_is_replaced(listed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on one list, the first of which is killed in the middle of the first pair."""
    out = tmp_path / "out"

    def register_files(files: PairFiles, folder: Path, options: Any, setting: Any) -> SimpleNamespace:
        if files.fixed.endswith("missing.nii"):
            raise FileNotFoundError(2, "No such file", files.fixed)
        metrics: dict[str, Any] = {"verdict": "good", "reasons": [], "similarity": {"before": 0.1, "after": 0.5}}
        metrics["folds_percent"] = 0.0
        with output_folder(folder) as temporary:
            if os.environ["RANK"] == "0":
                (tmp_path / "begun").touch()
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            (temporary / "metrics.json").write_text(json.dumps(metrics))
            sidecar = {"files": {}, "request_sha256": request_digest(files, options, setting)}
            (temporary / "transform.json").write_text(json.dumps(sidecar))
        with open(tmp_path / "done.txt", "a") as file:
            file.write(f"{folder.name}\n")
        return SimpleNamespace(metrics=metrics)

    monkeypatch.setattr(registering, "register_files", register_files)

    def work() -> None:
        while os.environ["RANK"] == "1" and not (tmp_path / "begun").exists():
            time.sleep(0.01)
        result = register(**listed)
        assert [row["output"] for row in result] == NAMES
        assert [row["verdict"] for row in result] == ["good"] * 3 + ["error"]

    assert run_processes(work) == [-signal.SIGKILL, 0]
    # the first pair was left for last
    assert (tmp_path / "done.txt").read_text().split() == [*NAMES[1:-1], NAMES[0]]
    # nor is anything left of the dead one's
    assert {path.name for path in out.iterdir()} == {*NAMES[:-1], ".pairs.lock", "pairs.csv"}
    before, table = times(out), (out / "pairs.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:4]] == [[name, "good"] for name in NAMES[:-1]]
    # nothing is left to do; what could not be done is tried again, and fails by itself
    monkeypatch.undo()
    register(**listed)
    assert times(out) == before and (out / "pairs.csv").read_text().splitlines()[:4] == table[:4]


@pytest.mark.parametrize("change", ["option", "file", "result", "damage"])
def test_what_is_not_as_it_was_is_done_again(
    listed: dict[str, Any], pair: Pair, tmp_path: Path, quick_report: None, change: str
) -> None:
    listed["pairs"] = str(tmp_path / "one.csv")
    fixed = tmp_path / "fixed.nii.gz"
    fixed.write_bytes(Path(pair.fixed).read_bytes())
    (tmp_path / "one.csv").write_text(f"fixed,moving,output\n{fixed},{pair.moving},a\n")
    (row,) = register(**listed)
    folder = tmp_path / "out" / "a"
    stamp = os.stat(folder / "transform.json").st_mtime_ns
    assert register(**listed) == [row] and os.stat(folder / "transform.json").st_mtime_ns == stamp
    if change == "option":
        listed["fill"] = 3.0
    elif change == "file":
        os.utime(fixed)
    elif change == "result":
        (folder / "warped.nii.gz").unlink()
    else:
        (folder / "metrics.json").write_text("{")
    register(**listed)
    assert os.stat(folder / "transform.json").st_mtime_ns > stamp and (folder / "warped.nii.gz").is_file()
    assert json.loads((folder / "metrics.json").read_text())["verdict"] == row["verdict"]


def test_resume_needs_a_list(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume goes with a list of pairs"):
        register(fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / "out"), resume=True)


def test_claims(tmp_path: Path) -> None:
    """A claim holds against other processes, for its name alone, and ends with the process that has it."""
    claims = WorkClaims(tmp_path / "folder" / "lock")

    def hold() -> None:
        with claims.claim("x") as ours:
            assert ours
            if os.environ["RANK"] == "0":
                (tmp_path / "held").touch()
                time.sleep(1.0)
                os.kill(os.getpid(), signal.SIGKILL)

    def other() -> None:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with claims.claim("x") as ours:
            assert not ours
        with claims.claim("y") as ours:
            assert ours
        start = time.monotonic()
        with claims.claim("x", wait=True) as ours:
            assert ours and time.monotonic() - start > 0.2

    def work() -> None:
        (hold if os.environ["RANK"] == "0" else other)()

    assert run_processes(work) == [-signal.SIGKILL, 0]


@pytest.mark.slow
def test_two_commands_one_of_which_is_killed(listed: dict[str, Any], tmp_path: Path) -> None:
    """The command line, with nothing in the place of anything."""
    out = tmp_path / "out"
    options = [f"--{name}={value}" for name, value in listed.items()]
    command = [sys.executable, "-m", "monai_sacb", "register", *options]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(out.glob(".a-????????")):
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.kill(first.pid, signal.SIGKILL)
    table, _ = second.communicate(timeout=600)
    # the missing file of the fourth pair is the only complaint
    assert first.wait() == -signal.SIGKILL and second.returncode == 2
    assert table.count("\n") == 1 + len(NAMES) and table.count("error") == 1
    assert {path.name for path in out.iterdir()} == {*NAMES[:-1], ".pairs.lock", "pairs.csv"}
    before = times(out)
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 2
    assert times(out) == before
