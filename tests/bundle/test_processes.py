# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes give what one gives."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from matplotlib.image import imread
from scipy import ndimage
from several_processes import run_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai.bundle import ConfigWorkflow

from monai_sacb.networks.nets import SACBNet

Make = Callable[..., ConfigWorkflow]
ROOT = Path(__file__).resolve().parents[2]
SHAPE = (36, 33)
FLAT: dict[str, Any] = {"network_def#spatial_dims": 2, "spatial_size": [-1, -1]}
LABELS = {"labels": {"disc": 1, "ring": 2}}
# in double precision, two orders of summation stay together for longer than a few steps
DOUBLE = {
    "train#trainer#to_kwargs": {"dtype": torch.float64},
    "validate#evaluator#to_kwargs": {"dtype": torch.float64},
    "network_def#scaled_matching": True,
}
PAIRS = [(4, 5), (5, 6), (6, 4), (5, 4), (6, 5)]


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects to train on, one of them without a label map; five pairs of three others."""
    folder = tmp_path_factory.mktemp("slices")
    rows, columns = np.indices(SHAPE)
    rng = np.random.default_rng(0)
    subjects = []
    for i in range(7):
        distance = np.hypot(rows - 17 - rng.uniform(-3, 3), columns - 16 - rng.uniform(-3, 3))
        label = np.where(distance < 6, 1, np.where(distance < 11, 2, 0)).astype(np.uint8)
        image = ndimage.gaussian_filter(np.array([0.05, 1.0, 0.5])[label] + 0.02 * rng.random(SHAPE), 0.7)
        for name, array in (("image", image.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 3.0, 1.0, 1.0])), folder / f"{name}_{i}.nii.gz")
        subjects.append({"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"})
    del subjects[0]["label"]
    listed = [{"moving": subjects[m]["image"], "fixed": subjects[f]["image"]} for m, f in PAIRS]
    content = {"training": subjects[:4], "validation": subjects[4:], "registration_val": listed}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "one_pair.json").write_text(json.dumps({**content, "registration_val": listed[:1]}))
    return folder


@pytest.fixture
def flat_weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(SACBNet(spatial_dims=2, base_channels=2, num_clusters=3).state_dict(), path)
    return str(path)


def curves(folder: Path, runs: int) -> dict[str, list[float]]:
    """Every curve that has been written for TensorBoard; by one process in each run."""
    found: dict[str, list[float]] = {}
    files = sorted((folder / "tensorboard").iterdir())
    assert len({file.name.split(".")[-2] for file in files}) == runs
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = found.get(tag, []) + [event.value for event in events.Scalars(tag)]
    return found


def pictures(folder: Path) -> dict[str, dict[int, float]]:
    """How much there is to see on every picture for TensorBoard, by name and number."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
        for tag in events.Tags()["images"]:
            images = [imread(BytesIO(event.encoded_image_string)) for event in events.Images(tag)]
            kept = found.setdefault(tag, {})
            kept.update({len(kept) + i: float(image.std()) for i, image in enumerate(images)})
    return found


def pairs_of(folder: Path) -> list[list[str]]:
    """The table of pairs but for the columns that differ from run to run."""
    with open(folder / "pairs.csv", newline="") as file:
        header, *rows = csv.reader(file)
    same = [i for i, name in enumerate(header) if name not in ("seconds", "peak_memory_mb")]
    assert header[2] == "val_dice_before/disc" and rows
    return [[row[i] for i in same] for row in rows]


def files_of(folder: Path) -> list[str]:
    """All but the curves, whose files have names of their own in every run."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "tensorboard")
    return sorted(str(path.relative_to(folder)) for path in files)


def run_to_the_end(flow: ConfigWorkflow) -> None:
    flow.run()
    flow.finalize()


def run_killed(flow: ConfigWorkflow, evaluator: str, pair: int) -> None:
    """The process of rank 1 dies in front of one of its pairs."""
    if os.environ["RANK"] == "1":
        flow.parser.get_parsed_content(evaluator).add_event_handler(
            Events.ITERATION_STARTED(once=pair), lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
    flow.run()


def test_training_equals_that_of_one_process(workflow: Make, slices: Path, tmp_path: Path) -> None:
    """With pairs without labels, random augmentation, validation, and a training that is stopped and resumed."""
    options: dict[str, Any] = {
        **FLAT,
        **LABELS,
        **DOUBLE,
        "dataset_dir": str(slices),
        "pairs_per_epoch": 7,
        "label_weight": 1.0,
        "saved_pairs": 2,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    network = "$@network_def.double().to(@device)"
    # the processes have as many pairs each
    alone = {"output_dir": str(one), "batch_size": 2, "network": network, "pairs_per_epoch": 8}
    workflow("train", "augment", **{**options, **alone}).run()

    def train(**overrides: Any) -> None:
        together = {"output_dir": str(two), "network#module": network}
        run_to_the_end(workflow("train", "augment", "multi_gpu_train", **{**options, **together, **overrides}))

    def first_epoch() -> None:
        train(max_epochs=1, **{"lr_scheduler#total_iters": 2})

    def second_epoch() -> None:
        train(resume=True)

    assert run_processes(first_epoch) == [0, 0]
    assert run_processes(second_epoch) == [0, 0]
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two)]
    assert states[0]["epoch"] == states[1]["epoch"] == 2
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])
    for name, value in states[0]["network"].items():
        # a bias in front of a norm has a gradient of zero, and moves by rounding alone
        if not name.endswith("conv.bias"):
            torch.testing.assert_close(value, states[1]["network"][name], rtol=1e-5, atol=1e-7)
    best = [torch.load(folder / "model.pt", weights_only=True) for folder in (one, two)]
    assert best[0].keys() == best[1].keys()
    expected, curve = curves(one, 1), curves(two, 2)
    assert curve.keys() == expected.keys() and len(expected["train_loss"]) == 8
    assert expected["loss_label"][0] > 0.1
    # the validation of the best weights that ends a training is there once more
    for name, values in expected.items():
        places = [0, 2] if name.startswith("val_") else range(len(values))
        found = [curve[name][i] for i in places]
        assert found == pytest.approx(values[: len(found)], rel=1e-5), name
    shown = pictures(one)
    assert shown.keys() == pictures(two).keys() == {"registration", "clusters"}
    assert all(len(steps) == 3 and min(steps.values()) > 0.1 for steps in shown.values())
    assert len(pairs_of(one)) == len(PAIRS)
    for expected_row, found_row in zip(pairs_of(one), pairs_of(two), strict=True):
        assert found_row[:2] == expected_row[:2]
        # the weights differ by rounding
        assert [float(v) for v in found_row[2:]] == pytest.approx([float(v) for v in expected_row[2:]], rel=1e-4)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0] == pytest.approx(summaries[1])
    assert files_of(one) == files_of(two) and "registered/image_5_to_image_6/warped.nii.gz" in files_of(one)


def test_evaluation_goes_on_in_any_number_of_processes(
    workflow: Make, slices: Path, flat_weights: str, tmp_path: Path
) -> None:
    """One that is stopped in one of three processes, and resumed in two, equals that of one process."""
    one, several = tmp_path / "one", tmp_path / "several"

    def evaluate(*overlay: str, output_dir: Path, **overrides: Any) -> ConfigWorkflow:
        flow = workflow(
            "train", "evaluate", *overlay, **FLAT, **LABELS, **overrides, dataset_dir=str(slices),
            output_dir=str(output_dir), ckpt_path=flat_weights,
        )  # fmt: skip
        flow.run_id = "evaluating"
        return flow

    evaluate(output_dir=one).run()

    def stopped() -> None:
        # its second pair is the last of all
        run_killed(evaluate("multi_gpu_evaluate", output_dir=several), "validate#evaluator", pair=2)

    def resumed() -> None:
        flow = evaluate("multi_gpu_evaluate", output_dir=several, resume="true")
        # all that has been measured, whoever did
        assert len(flow.parser.get_parsed_content("journal").rows) == len(PAIRS) - 1
        run_to_the_end(flow)

    codes = run_processes(stopped, number=3)
    assert 0 not in codes and codes[1] == -signal.SIGKILL
    journals = ["pairs.1.jsonl", "pairs.2.jsonl", "pairs.jsonl"]
    assert [name for name in files_of(several) if name.startswith("pairs")] == journals
    assert run_processes(resumed) == [0, 0]
    assert pairs_of(several) == pairs_of(one) and len(pairs_of(one)) == len(PAIRS)
    # of each run, the first pair that it had is saved whole
    made = [{name for name in files_of(folder) if "/" not in name} for folder in (one, several)]
    assert made[0] == made[1] and not any(name.endswith("jsonl") for name in made[0])


def test_fewer_pairs_than_processes(workflow: Make, slices: Path, flat_weights: str, tmp_path: Path) -> None:
    def run() -> None:
        given = {**FLAT, "dataset_dir": str(slices / "one_pair.json"), "ckpt_path": flat_weights}
        flow = workflow("train", "evaluate", "multi_gpu_evaluate", **given, **LABELS)
        flow.run_id = "evaluating"
        flow.run()
        flow = workflow("inference", "multi_gpu_inference", workflow_type="infer", **given)
        flow.run_id = "registering"
        run_to_the_end(flow)

    assert run_processes(run) == [0, 0]
    assert len(pairs_of(tmp_path / "output")) == 1
    assert json.loads((tmp_path / "output" / "summary.json").read_text())["pairs"] == 1
    assert [path.name for path in (tmp_path / "output" / "registered").iterdir()] == ["image_4_to_image_5"]


def test_registering_goes_on(workflow: Make, slices: Path, flat_weights: str, tmp_path: Path) -> None:
    """What a dead process has done is not done again, and what it has left is."""
    one, several = tmp_path / "one", tmp_path / "several"

    def register(*overlay: str, output_dir: Path, **overrides: Any) -> ConfigWorkflow:
        given = {**FLAT, "dataset_dir": str(slices), "ckpt_path": flat_weights, "output_dir": str(output_dir)}
        flow = workflow("inference", *overlay, workflow_type="infer", **given, **overrides)
        flow.run_id = "registering"
        return flow

    register(output_dir=one).run()

    def stopped() -> None:
        run_killed(register("multi_gpu_inference", output_dir=several), "evaluator", pair=1)
        os._exit(3)

    assert run_processes(stopped) == [3, -signal.SIGKILL]
    folders = sorted(path.name for path in (several / "registered").iterdir())
    assert folders == ["image_4_to_image_5", "image_6_to_image_4", "image_6_to_image_5"]
    before = {name: os.stat(several / name).st_mtime_ns for name in files_of(several) if name.endswith(".nii.gz")}

    def resumed() -> None:
        run_to_the_end(register("multi_gpu_inference", output_dir=several, resume="true"))

    assert run_processes(resumed) == [0, 0]
    names = files_of(one)
    assert [name for name in files_of(several) if name != "registered.1.jsonl"] == names
    for name in (name for name in names if name.endswith(".nii.gz")):
        assert (several / name).read_bytes() == (one / name).read_bytes()
        if name in before:
            assert os.stat(several / name).st_mtime_ns == before[name]
    # nothing is left to do, in one process either
    os.remove(several / "registered" / "image_4_to_image_5" / "warped.nii.gz")
    register(output_dir=several, resume=True).run()
    assert not (several / "registered" / "image_4_to_image_5" / "warped.nii.gz").exists()
    register(output_dir=several).run()
    assert files_of(several) == names


@pytest.mark.parametrize("overlay", ["multi_gpu_train", "multi_gpu_evaluate", "multi_gpu_inference"])
def test_started_without_torchrun(workflow: Make, monkeypatch: pytest.MonkeyPatch, overlay: str) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    base = ["inference"] if "inference" in overlay else ["train", "evaluate"]
    with pytest.raises(RuntimeError) as caught:
        workflow(*base, overlay, workflow_type="infer", device="$monai_sacb.utils.process_device()")
    assert "start it by 'torchrun" in str(caught.value.__cause__)


def bundle_command(configs: list[str], run: str, **options: Any) -> list[str]:
    files = str([f"bundle/configs/{name}.json" for name in configs])
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["-m", "monai.bundle", "run", run, "--config_file", files, *given]


def torchrun(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


QUICK_OPTIONS = {
    **FLAT,
    **LABELS,
    "pairs_per_epoch": 2,
    "val_interval": 1,
    "network_def#base_channels": 2,
    "network_def#num_clusters": 3,
}


@pytest.mark.slow
def test_two_machines(slices: Path, tmp_path: Path) -> None:
    """Two agents, as on two machines, with one process each, to the letter of the command line."""
    options = {**QUICK_OPTIONS, "max_epochs": 1, "dataset_dir": slices, "output_dir": tmp_path / "out"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    command = bundle_command(["train", "multi_gpu_train"], "training", **options)
    agents = [torchrun("--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", *address, *command) for i in (0, 1)]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    SACBNet(spatial_dims=2, base_channels=2, num_clusters=3).load_state_dict(
        torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    )
    assert len(pairs_of(tmp_path / "out")) == len(PAIRS)
    curves(tmp_path / "out", 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_process_ends_all(slices: Path, tmp_path: Path, rank: int) -> None:
    options = {**QUICK_OPTIONS, "max_epochs": 500, "dataset_dir": slices, "output_dir": tmp_path / "out"}
    command = bundle_command(["train", "multi_gpu_train"], "training", **options)
    agent = torchrun("--standalone", "--nproc_per_node=2", *command)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "checkpoint.pt").exists():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"monai.bundle" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[rank], signal.SIGKILL)
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode != 0 and "Signal 9" in output
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        agent.kill()
