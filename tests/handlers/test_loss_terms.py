# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import TensorBoardStatsHandler

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import LossTerms
from monai_sacb.losses import BendingPenaltyLoss, GradientPenaltyLoss, RegistrationLoss


class Terms(RegistrationLoss):
    """Takes the values of its terms from the batch."""

    def forward(self, values: dict[str, float], target: object = None) -> None:
        self.last_terms = {name: torch.tensor(value) for name, value in values.items()}


def run(loss: Terms, steps: list[dict[str, float]], epochs: int = 1) -> list[dict[str, float]]:
    """The metrics of every epoch."""
    engine = Engine(lambda engine, batch: loss(batch))
    LossTerms(loss).attach(engine)
    seen: list[dict[str, float]] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))
    engine.run(steps, max_epochs=epochs, epoch_length=len(steps) // epochs)
    return seen


def test_means_of_every_epoch() -> None:
    steps = [{"similarity": v, "regularization": 10 * v} for v in (1.0, 2.0, 6.0, 5.0, 5.0, 8.0)]
    assert run(Terms(), steps, 2) == [
        {"loss_similarity": 3.0, "loss_regularization": 30.0},
        {"loss_similarity": 6.0, "loss_regularization": 60.0},
    ]


def test_terms_of_some_batches(caplog: pytest.LogCaptureFixture) -> None:
    """Averaged over those; gone in an epoch that has none, which is said where the term has a weight."""
    steps = [{"similarity": 1.0, "regularization": 1.0} for _ in range(6)]
    steps[0]["label"], steps[2]["label"] = 0.5, 0.7
    with caplog.at_level(logging.WARNING):
        seen = run(Terms(label_weight=0.5, num_labels=2), steps, 2)
    assert seen[0]["loss_label"] == pytest.approx(0.6) and "loss_label" not in seen[1]
    assert [r.message for r in caplog.records if "loss" in r.message] == [
        "The term 'label' of the loss has the weight 0.5, but no pair of epoch 2 has what it needs."
    ]


def test_other_metrics_stay() -> None:
    loss = Terms()
    engine = Engine(lambda engine, batch: loss({"similarity": 1.0, "regularization": 2.0}))
    engine.add_event_handler(Events.STARTED, lambda e: e.state.metrics.update(other=3.0))
    LossTerms(loss).attach(engine)
    engine.run(range(2))
    assert engine.state.metrics == {"other": 3.0, "loss_similarity": 1.0, "loss_regularization": 2.0}


class Field(nn.Module):
    """A field that is its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.ddf = nn.Parameter(0.3 * torch.randn(1, 2, 12, 13, generator=torch.Generator().manual_seed(0)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.ddf.expand(len(image), -1, -1, -1)


def test_curves_in_tensorboard(tmp_path: Path) -> None:
    """In a training: each term has its curve, and their weighted sum is the curve of the loss."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(4):
        pair = {f"{role}_image": torch.rand(1, 12, 13, generator=generator) for role in ("moving", "fixed")}
        pair |= {f"{role}_label": (pair[f"{role}_image"] > 0.5).byte() for role in ("moving", "fixed")}
        pair |= {f"{role}_landmarks": 10 * torch.rand(5, 2, generator=generator) for role in ("moving", "fixed")}
        pairs.append(pair)
    weights = {"gradient": 0.3, "bending": 0.05}
    loss = RegistrationLoss(
        regularization={"gradient": GradientPenaltyLoss(), "bending": BendingPenaltyLoss()},
        regularization_weight=weights,
        label_weight=0.5,
        num_labels=1,
        landmark_weight=0.1,
    )
    network, losses = Field(), []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=DataLoader(Dataset(pairs), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        loss_function=loss,
        prepare_batch=PrepareRegistrationBatch(),
        train_handlers=[
            LossTerms(loss),
            TensorBoardStatsHandler(log_dir=str(tmp_path), iteration_log=False),
        ],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    trainer.run()
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    names = ["similarity", "gradient", "bending", "label", "landmarks"]
    assert {f"loss_{name}" for name in names} <= set(log.Tags()["scalars"])
    curves = {name: log.Scalars(f"loss_{name}") for name in names}
    assert all([point.step for point in curve] == [1, 2, 3] for curve in curves.values())
    for epoch in range(3):
        total = sum(loss.weights[name] * curve[epoch].value for name, curve in curves.items())
        assert total == pytest.approx(sum(losses[2 * epoch : 2 * epoch + 2]) / 2, rel=1e-5)
