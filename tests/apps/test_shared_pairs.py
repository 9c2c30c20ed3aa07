# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes on one list of pairs, without any that directs them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from several_processes import run_processes
from synthetic_pair import Pair

from monai_sacb.apps import register, registration
from monai_sacb.utils import WorkClaims

NAMES = ["a", "b", "a-long_name", "gone"]


@pytest.fixture
def listed(pair: Pair, tmp_path: Path) -> dict[str, Any]:
    rows = [f"{pair.fixed},{pair.moving},{name}" for name in NAMES[:-1]] + [f"missing.nii,{pair.moving},gone"]
    (tmp_path / "pairs.csv").write_text("\n".join(["fixed,moving,output", *rows]) + "\n")
    options = {"affine": "false", "refine": 0, "resume": True, "num_threads": 1}
    return {"pairs": str(tmp_path / "pairs.csv"), "output_dir": str(tmp_path / "out"), **options}


def times(folder: Path) -> dict[str, int]:
    return {name: os.stat(folder / name / "transform.json").st_mtime_ns for name in NAMES[:-1]}


def test_a_dead_process_is_replaced(
    listed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_report: None
) -> None:
    out = tmp_path / "out"
    page = registration.write_report

    def dies(folder: Path, checks: object) -> None:
        if os.environ["RANK"] == "0":
            # everything but the report has been written, and another one waits for this pair
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        with open(tmp_path / "done.txt", "a") as file:
            file.write(f"{folder.name[1:-9]}\n")
        page(folder, checks)

    monkeypatch.setattr(registration, "write_report", dies)

    def work() -> None:
        if os.environ["RANK"] == "1":
            while not list(out.glob(".a-????????")):
                time.sleep(0.01)
        result = register(**listed)
        assert [row["output"] for row in result] == NAMES
        assert [row["verdict"] == "error" for row in result] == [False, False, False, True]

    assert run_processes(work) == [-signal.SIGKILL, 0]
    assert sorted((tmp_path / "done.txt").read_text().split()) == sorted(NAMES[:-1])
    # nor is anything left of the dead one's
    assert {path.name for path in out.iterdir()} == {*NAMES[:-1], ".pairs.lock", "pairs.csv"}
    before, table = times(out), (out / "pairs.csv").read_bytes()
    monkeypatch.setattr(registration, "write_report", page)
    register(**listed)
    assert times(out) == before and (out / "pairs.csv").read_bytes() == table


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
