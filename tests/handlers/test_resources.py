# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairResources, RegistrationTable
from monai_sacb.handlers import resources as module
from monai_sacb.utils import resources

SHAPE = (6, 7, 8)


class Slow(torch.nn.Module):
    """In the place of a network: takes longer for each pair than for the one before, and memory in the second."""

    def __init__(self, megabytes: int = 0) -> None:
        super().__init__()
        self.calls = 0
        self.megabytes = megabytes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(0.05 * self.calls)
        if self.calls == 2:
            torch.ones(self.megabytes, 1000, 250)
        return torch.zeros(image.shape[0], 3, *image.shape[2:])


def evaluator(num_pairs: int, network: torch.nn.Module, handlers: Iterable[Any], batch_size: int = 1, **kwargs: Any):
    data = [
        {f"{role}_image": MetaTensor(torch.rand(1, *SHAPE)) for role in ("moving", "fixed")} for _ in range(num_pairs)
    ]
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=network,
        prepare_batch=PrepareRegistrationBatch(),
        val_handlers=list(handlers),
        **kwargs,
    )


def test_seconds_of_each_pair() -> None:
    engine = evaluator(3, Slow(), [PairResources()])
    engine.run()
    seconds = engine.state.metric_details["seconds"]
    assert seconds.shape == (3, 1)
    for i, value in enumerate(seconds.flatten().tolist(), start=1):
        assert 0.05 * i <= value < 0.05 * i + 0.05
    assert engine.state.metrics["seconds"] == pytest.approx(seconds.mean().item())


def test_pairs_of_a_batch_share_its_seconds() -> None:
    engine = evaluator(5, Slow(), [PairResources()], batch_size=2)
    engine.run()
    seconds = engine.state.metric_details["seconds"].flatten().tolist()
    assert len(seconds) == 5 and seconds[0] == seconds[1] and seconds[2] == seconds[3]
    assert 0.025 <= seconds[0] < 0.05 <= seconds[2] < 0.1 and seconds[4] >= 0.15


def test_what_comes_after_the_network_does_not_count() -> None:
    def wait(item: dict) -> dict:
        time.sleep(0.3)
        return item

    engine = evaluator(1, Slow(), [PairResources()], postprocessing=wait)
    engine.run()
    assert engine.state.metrics["seconds"] < 0.3


def test_peak_memory_of_the_process() -> None:
    """300 MB more than the process ever had, in the second of three pairs."""
    before = module._peak_memory(torch.device("cpu"))
    engine = evaluator(3, Slow(int(before) + 300), [PairResources()])
    engine.run()
    memory = engine.state.metric_details["peak_memory_mb"]
    assert memory.shape == (3, 1)
    first, second, third = memory.flatten().tolist()
    assert before <= first < before + 100 and before + 280 < second and third >= second
    assert engine.state.metrics["peak_memory_mb"] == pytest.approx(memory.mean().item())


def test_every_run_is_measured_anew() -> None:
    engine = evaluator(2, Slow(), [PairResources()])
    for _ in range(2):
        engine.run()
        assert engine.state.metric_details["seconds"].shape == (2, 1)
    # the third and the fourth call of the network
    assert engine.state.metric_details["seconds"].min() >= 0.15


@pytest.mark.parametrize("table_first", [False, True])
def test_columns_of_the_table(tmp_path: Path, table_first: bool) -> None:
    handlers = [PairResources("took", "needed"), RegistrationTable(tmp_path, [], others=["took", "needed"])]
    engine = evaluator(3, Slow(), reversed(handlers) if table_first else handlers, batch_size=2)
    engine.run()
    with open(tmp_path / "pairs.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("took", "needed"):
        expected = engine.state.metric_details[name].flatten().tolist()
        assert [float(row[name]) for row in rows] == pytest.approx(expected, rel=1e-5) and min(expected) > 0


def test_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "has_resource", False)
    engine = evaluator(2, Slow(), [PairResources()])
    engine.run()
    assert engine.state.metric_details["peak_memory_mb"].isnan().all()
    assert engine.state.metric_details["seconds"].min() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    before = module._peak_memory(device)
    # given back at once, but it was needed
    torch.ones(50, 1000, 250, device=device)
    assert before + 49 < module._peak_memory(device) < before + 60
