# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and of the pages beside the bundle runs, and what they say comes true."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[1]
HIPPOCAMPUS = ROOT.parent / "shared" / "data" / "Task04_Hippocampus"
OASIS = ROOT.parent / "shared" / "data" / "oasis_trt20"
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "bundle" / "docs").glob("*.md") if path.stem != "README")]
BLOCKS = [
    (page.name, language, code.strip())
    for page in PAGES
    for language, code in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
]
PYTHON = [(name, code) for name, language, code in BLOCKS if language == "python"]
SHELL = [code for _, language, code in BLOCKS if language == "bash"]
# what the README says of numbers needs nothing that is made before it
MEASURED = PAGES[0].read_text(encoding="utf-8").split("\n## Results\n")[1]


def anchors(page: Path) -> set[str]:
    """What one can link to within a page, as GitHub names it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_kinds_of_blocks() -> None:
    assert {language for _, language, _ in BLOCKS} == {"bash", "python", "text", "json"}
    assert len(PYTHON) >= 8 and len(SHELL) >= 20


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links(page: Path) -> None:
    """They lead to files and headings that are there; those of a page that comes with the bundle stay within it."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file() or target.is_dir(), link
        assert page == PAGES[0] or target.is_relative_to(ROOT / "bundle"), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(PAGES) >= 10
    for page in (*PAGES[1:], ROOT / "bundle" / "docs" / "tutorial.ipynb"):
        assert f"(bundle/docs/{page.name})" in text, page.name


def test_picture_of_the_conventions(tmp_path: Path) -> None:
    """It can be drawn anew."""
    draw = runpy.run_path(str(ROOT / "benchmarks" / "conventions_picture.py"))["draw"]
    draw(str(tmp_path / "drawn.png"))
    shipped = ROOT / "bundle" / "docs" / "conventions.png"
    assert 10_000 < shipped.stat().st_size < 200_000
    drawn, kept = (imread(path) for path in (tmp_path / "drawn.png", shipped))
    # fonts may differ
    assert all(abs(a - b) <= 0.1 * b for a, b in zip(drawn.shape[:2], kept.shape[:2]))


@pytest.mark.parametrize(("name", "code"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_block(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sample_dataset" in code:
        pytest.importorskip("nilearn")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})


def test_example_of_the_conventions() -> None:
    """The numbers of its table, by the affine of its code and nothing else."""
    text = (ROOT / "bundle" / "docs" / "conventions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (voxels|RAS|LPS)\b[^|]*\|(.*)\|(.*)\|(.*)\|$", text, flags=re.MULTILINE)
    table = {name: [np.array([float(n) for n in cell.strip(" ()").split(",")]) for cell in row] for name, *row in rows}
    affine = np.array([[2.0, 0, 0, -10], [0, 2, 0, -20], [0, 0, 2, 4]])
    assert "[[2.0, 0, 0, -10], [0, 2, 0, -20], [0, 0, 2, 4]" in text and set(table) == {"voxels", "RAS", "LPS"}
    for place, ras, lps in zip(*(table[name][:2] for name in ("voxels", "RAS", "LPS"))):
        assert np.array_equal(nib.affines.apply_affine(np.vstack([affine, [0, 0, 0, 1]]), place), ras)
        assert np.array_equal(ras * [-1, -1, 1], lps)
    for fixed, partner, displacement in table.values():
        assert np.array_equal(partner - fixed, displacement) and np.abs(displacement).min() > 0


def test_install_command_is_the_first_step() -> None:
    """The installation of the two set-up commands; that of the tests is what continuous integration runs."""
    steps = SHELL[0].split(" && ")
    assert steps[:2] == ["python3 -m venv .venv", '.venv/bin/pip install ".[sample]"']
    assert SHELL[1] == '.venv/bin/pip install ".[sample,test]" && .venv/bin/pytest -n 2 --dist loadfile'


def shorten(dataset: Path, folder: Path) -> None:
    """A dataset of two of the pairs of another, and of a few of its training subjects."""
    content = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    content["registration_val"] = content["registration_val"][:2]
    paired = {pair[role] for pair in content["registration_val"] for role in ("fixed", "moving")}
    content["validation"] = [subject for subject in content["validation"] if subject["image"] in paired]
    content["training"] = content["training"][:4]
    folder.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (folder / name).symlink_to(dataset / name)
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def run_in_order(blocks: list[str], tmp_path: Path) -> None:
    """Trainings and refinement are cut short; all else is run to the letter."""
    for folder in ("bundle", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("monai-sacb", "-m monai_sacb"), ("torchrun", "-m torch.distributed.run")):
        script = programs / name
        # not a link: the interpreter finds its virtual environment by its own place
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        script.chmod(0o755)
    if (HIPPOCAMPUS / "dataset.json").is_file():
        shorten(HIPPOCAMPUS, tmp_path / "Task04_Hippocampus")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DATASET": str(tmp_path / "output/sample"),
        "DATA": str(OASIS),
    }
    for block in blocks:
        command = re.sub(r"(run training(?:[^\n\\]|\\\n)*)", r"\1 --max_epochs 1 --pairs_per_epoch 2", block)
        command = command.replace("--refine 100", "--refine 1")
        command = re.sub(r"(benchmarks/encoders.py.*)", r"\1 --encoders resnet --epochs 1", command)
        command = re.sub(
            r"--epochs \d+ --seeds (?:[^\n\\]|\\\n)*", "--epochs 1 --seeds 0 --arms base --size 32 32 32", command
        )
        sizes = "--network_size 32 32 32 --training_size 32 32 32 --largest 32"
        command = re.sub(r"(benchmarks/performance.py.*)--rounds \d", rf"\1--rounds 1 {sizes}", command)
        command = re.sub(r"--kills \d+", "--kills 1", command)
        command = command.replace("--shape 256 256 200", "--shape 48 48 40")
        if find_spec("atheris") is None:
            command = re.sub(r".*--engine atheris.*\n", "", command)
        command = command.replace("--seconds 1", "--seconds 0.1").replace(
            "evaluation_memory.py --pairs 200", "evaluation_memory.py --pairs 21"
        )
        # the tools are not dependencies
        command = re.sub("identity greedy( convexadam)?", "identity --limit 1", command)
        if "$DATA" in command.replace("$DATASET", ""):
            # of other subjects than one may have; cut short
            if not (OASIS / "aligned_2mm").is_dir():
                continue
            command = command.replace("$DATA/raw --pairs 1 ", "$DATA/aligned_2mm --pairs 1 ")
            command = command.replace("$DATA/aligned_1mm", "$DATA/aligned_2mm")
            command = command.replace("benchmarks/oasis.sh", "SUBJECTS=2 LIMIT=1 METHODS=identity benchmarks/oasis.sh")
            command = command.replace("--pairs 10 2", "--pairs 1 0").replace("--refine 200", "--refine 1")
            command = re.sub(r"--pairs \d+ --steps [\d ]*\d", "--pairs 1 --steps 0 1", command)
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


@pytest.mark.slow
def test_shell_blocks_of_numbers(tmp_path: Path) -> None:
    """The commands beside the README's numbers run."""
    blocks = [code for code in SHELL[2:] if code in MEASURED]
    assert len(blocks) >= 10
    run_in_order(blocks, tmp_path)


@pytest.mark.slow
def test_shell_blocks_in_their_order(tmp_path: Path) -> None:
    """All other commands run; those of the README come first, and the pages go on from what they have made."""
    pytest.importorskip("nilearn")
    main = SHELL[0].split(" && ")[-1].replace(".venv/bin/python", "python")
    blocks = [main, *(code for code in SHELL[2:] if code not in MEASURED)]
    assert len(blocks) >= 15
    run_in_order(blocks, tmp_path)
    # ITK's image is the one that has been written
    names = ("pair/warped.nii.gz", "warped_by_itk.nii.gz")
    ours, itks = (np.asarray(nib.load(tmp_path / name).dataobj) for name in names)
    assert np.abs(ours - itks).max() < 1e-3 * np.abs(ours).max()
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
