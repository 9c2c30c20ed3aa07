# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README runs, and what it says comes true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HIPPOCAMPUS = ROOT.parent / "shared" / "data" / "Task04_Hippocampus"
OASIS = ROOT.parent / "shared" / "data" / "oasis_trt20"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code.strip() for language, code in BLOCKS if language == "bash"]


def test_kinds_of_blocks() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "text", "json"}
    assert len(PYTHON) >= 3 and len(SHELL) >= 6


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sample_dataset" in code:
        pytest.importorskip("nilearn")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_install_command_is_the_first_step() -> None:
    """The installation of the two set-up commands; that of the tests is what continuous integration runs."""
    steps = SHELL[0].split(" && ")
    assert steps[:2] == ["python3 -m venv .venv", '.venv/bin/pip install ".[sample]"']
    assert SHELL[1] == '.venv/bin/pip install ".[sample,test]" && .venv/bin/pytest'


@pytest.mark.slow
def test_shell_blocks_in_their_order(tmp_path: Path) -> None:
    """Trainings and refinement are cut short; all else is run to the letter."""
    pytest.importorskip("nilearn")
    for folder in ("bundle", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("monai-sacb", "-m monai_sacb"), ("torchrun", "-m torch.distributed.run")):
        script = programs / name
        # not a link: the interpreter finds its virtual environment by its own place
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "Task04_Hippocampus").symlink_to(HIPPOCAMPUS)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DATASET": str(tmp_path / "output/sample"),
        "DATA": str(OASIS),
    }
    for block in [SHELL[0].split(" && ")[-1].replace(".venv/bin/python", "python"), *SHELL[2:]]:
        command = re.sub(r"(run training(?:[^\n\\]|\\\n)*)", r"\1 --max_epochs 1 --pairs_per_epoch 2", block)
        command = command.replace("--refine 100", "--refine 1")
        command = re.sub(r"(benchmarks/encoders.py.*)", r"\1 --encoders resnet --epochs 1", command)
        command = re.sub(r"--epochs \d+ --seeds .*", "--epochs 1 --seeds 0 --arms base --size 32 32 32", command)
        sizes = "--network_size 32 32 32 --training_size 32 32 32 --largest 32"
        command = re.sub(r"(benchmarks/performance.py.*)--rounds \d", rf"\1--rounds 1 {sizes}", command)
        command = re.sub(r"--kills \d+", "--kills 1", command)
        command = command.replace("--seconds 1", "--seconds 0.1").replace(
            "evaluation_memory.py --pairs 200", "evaluation_memory.py --pairs 21"
        )
        # the tools are not dependencies
        command = command.replace("identity greedy convexadam", "identity --limit 1")
        if "$DATA" in command.replace("$DATASET", ""):
            # of other subjects than one may have; cut short
            if not (OASIS / "aligned_2mm").is_dir():
                continue
            command = command.replace("--pairs 10 2", "--pairs 1 0").replace("--refine 200", "--refine 1")
            command = re.sub(r"--steps .*", "--steps 0 1", command.replace("--pairs 4", "--pairs 1"))
        if "Task04_Hippocampus" in command and not (HIPPOCAMPUS / "dataset.json").is_file():
            # the data are not ours to give
            continue
        if ".onnx" in command and find_spec("onnxruntime") is None:
            continue
        if "--archive" in command and not (ROOT / "bundle" / "models" / "model.pt").is_file():
            # an archive without it is refused
            continue
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pair = "output/registered/brain_12_to_brain_13"
    assert {
        "output/model.pt",
        "output/registration.png",
        "output/pairs.csv",
        "output/checkpoint.pt",
        f"{pair}/warped.nii.gz",
        f"{pair}/warped_label.nii.gz",
        f"{pair}/displacement.nii.gz",
        "output_own/model.pt",
        "output_tuned/model.pt",
        "output_evaluation/structures.csv",
        "output_evaluation/structures.png",
        "pair/report.html",
        "pair/transform.h5",
        "carried.nii.gz",
        "back.nii.gz",
        "carried.csv",
        "field.nii.gz",
        "my_bundle/configs/train.json",
        "my_bundle/LICENSE",
        "output_clusters/registered/brain_12_to_brain_13/fixed_clusters_level2.nii.gz",
        "output_two/model.pt",
        "output_two/registered.jsonl",
        "many/brain_13_to_brain_12/report.html",
        "brain_atlas/configs/inference.json",
        "segmented/brain_13_seg.nii.gz",
    } <= made
