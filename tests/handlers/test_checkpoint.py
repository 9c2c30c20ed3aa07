# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import random
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.metrics import MAEMetric

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import BestModelSaver, LoadWeights, PairMetric, TrainingCheckpoint
from monai_sacb.networks.nets import SACBNet
from monai_sacb.transforms import WarpByDDFd

LOGGER = "monai_sacb.handlers.checkpoint"
CPU = torch.device("cpu")
LEARNING_RATE = 0.05
PREVIOUS = "checkpoint_previous.pt"


class InterruptionError(Exception):
    """Somebody pulls the plug."""


@pytest.fixture(autouse=True)
def _global_random_states() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


class Network(nn.Module):
    """Two convolutions; PyTorch's random numbers drop channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, channels, 3, padding=1)
        self.norm = nn.BatchNorm3d(channels)
        self.drop = nn.Dropout3d(0.3)
        self.last = nn.Conv3d(channels, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(image)))))


def pairs(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {f"{role}_image": torch.rand(1, 5, 6, 7, generator=generator) for role in ("moving", "fixed")}
        for _ in range(number)
    ]


def noisy_loss(ddf: torch.Tensor, target: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Python's and NumPy's random numbers decide upon the loss, too."""
    wanted = target["moving_image"] - target["fixed_image"]
    return (ddf * (1 + np.random.rand()) - wanted).square().mean() * (1 + random.random())


class Training:
    """A small training with everything that the bundle's has; ``seed`` is what the process starts with."""

    def __init__(
        self,
        folder: Path,
        max_epochs: int,
        resume: bool = False,
        seed: int = 0,
        interval: int = 1,
        num_pairs: int = 4,
        schedule: bool = True,
        network: nn.Module | None = None,
    ) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.folder = folder
        self.network = Network() if network is None else network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=max_epochs, power=0.9)
        self.best_saver = BestModelSaver(folder / "model.pt", self.network)
        self.evaluator = SupervisedEvaluator(
            device=CPU,
            val_data_loader=DataLoader(Dataset(pairs(2, seed=1)), batch_size=1),
            network=self.network,
            prepare_batch=PrepareRegistrationBatch(),
            postprocessing=WarpByDDFd("moving_image", "warped_image"),
            key_val_metric={"val_difference": PairMetric(MAEMetric(), ["warped_image", "fixed_image"])},
            val_handlers=[self.best_saver],
        )
        self.checkpoint = TrainingCheckpoint(
            folder / "checkpoint.pt",
            self.network,
            self.optimizer,
            self.scheduler if schedule else None,
            self.evaluator,
            self.best_saver,
            resume=resume,
            interval=interval,
        )
        self.trainer = SupervisedTrainer(
            device=CPU,
            max_epochs=max_epochs,
            train_data_loader=DataLoader(Dataset(pairs(num_pairs, seed=2)), batch_size=1, shuffle=True),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=noisy_loss,
            prepare_batch=PrepareRegistrationBatch(),
            train_handlers=[
                ValidationHandler(interval=1, validator=self.evaluator, epoch_level=True),
                LrScheduleHandler(self.scheduler, print_lr=False),
                self.checkpoint,
            ],
        )
        # (epoch, iteration, loss, learning rate) of every step
        self.steps: list[tuple[int, int, float, float]] = []
        self.metrics: list[float] = []
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        self.evaluator.add_event_handler(Events.COMPLETED, self._validated)

    def _step(self) -> None:
        state = self.trainer.state
        self.steps.append((state.epoch, state.iteration, state.output[0]["loss"], self.optimizer.param_groups[0]["lr"]))

    def _validated(self) -> None:
        self.metrics.append(self.evaluator.state.metrics["val_difference"])

    def run(self, stop_at: int | None = None) -> Training:
        """Train; an iteration to stop at comes in the middle of an epoch, and nothing of the epoch is kept."""
        if stop_at is None:
            self.trainer.run()
            return self

        def stop() -> None:
            raise InterruptionError

        self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), stop)
        with pytest.raises(InterruptionError):
            self.trainer.run()
        return self

    def state(self, name: str) -> dict[str, Any]:
        return dict(torch.load(self.folder / name, weights_only=True))

    @property
    def files(self) -> dict[str, Any]:
        return {name: torch.load(self.folder / name, weights_only=True) for name in ("checkpoint.pt", "model.pt")}


def same(a: Any, b: Any) -> bool:
    """Equality to the last bit of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# ---- the whole of a training ----


@pytest.mark.parametrize("stops", [[5], [6], [9], [5, 10]], ids=str)
def test_resumed_training_is_the_uninterrupted_one(tmp_path: Path, stops: list[int]) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Training(tmp_path / "whole", 3).run()
    assert len(whole.steps) == 12
    done: list[tuple[int, int, float, float]] = []
    for number, stop in enumerate([*stops, None]):
        # every part starts with random numbers of its own, and knows the files only
        part = Training(tmp_path / "parts", 3, resume=number > 0, seed=100 * number).run(stop)
        kept = 4 * ((stop or 12) // 4)
        if number > 0:
            assert part.steps[0][1] % 4 == 1 and part.steps[0][0] > 1
        done = [*done, *(step for step in part.steps if step[1] <= kept)]
    assert done == whole.steps
    assert same(part.files, whole.files)
    assert same(dict(part.network.state_dict()), dict(whole.network.state_dict()))
    assert same(part.optimizer.state_dict(), whole.optimizer.state_dict())
    assert part.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    for state in ("best_metric", "best_metric_epoch"):
        assert getattr(part.evaluator.state, state) == getattr(whole.evaluator.state, state)
    # nothing else is left behind
    assert sorted(os.listdir(tmp_path / "parts")) == ["checkpoint.pt", "checkpoint_previous.pt", "model.pt"]
    assert part.state(PREVIOUS)["epoch"] == 2


def test_random_numbers_matter_here(tmp_path: Path) -> None:
    # or the comparison above would hold without their states
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Training(tmp_path / "a", 2).run(5)
    copy(tmp_path / "a", tmp_path / "c")
    with_states = Training(tmp_path / "a", 2, resume=True, seed=1).run()
    for name in ("python", "numpy", "torch"):
        folder = copy(tmp_path / "c", tmp_path / name)
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        Training(tmp_path / "b", 2, seed=77).run(5)
        state["random"][name] = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["random"][name]
        torch.save(state, folder / "checkpoint.pt")
        assert Training(folder, 2, resume=True, seed=1).run().steps != with_states.steps, name


@pytest.mark.parametrize("epochs", [2, 1])
def test_finished_training_has_nothing_to_do(tmp_path: Path, epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    first = Training(tmp_path, 2).run()
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    with caplog.at_level(logging.INFO, LOGGER):
        # also where fewer epochs are wanted than were done
        again = Training(tmp_path, epochs, resume=True, seed=5).run()
    assert again.steps == [] and again.metrics == []
    assert same(dict(again.network.state_dict()), dict(first.network.state_dict()))
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    assert again.evaluator.state.best_metric == first.evaluator.state.best_metric
    assert f"Resumed after epoch 2 of {epochs}" in caplog.text


@pytest.mark.parametrize("done", [1, 2], ids=["interrupted", "finished"])
def test_resumed_to_go_on_for_longer(tmp_path: Path, done: int) -> None:
    """The schedule is that of the new length, or the learning rate of a finished training would stay at zero."""
    Training(tmp_path, 2).run(None if done == 2 else 4 * done + 1)
    longer = Training(tmp_path, 5, resume=True)
    longer.run()
    assert [step[0] for step in longer.steps] == [epoch for epoch in range(done + 1, 6) for _ in range(4)]
    rates = [step[3] for step in longer.steps[::4]]
    expected = [LEARNING_RATE * (1 - epoch / 5) ** 0.9 for epoch in range(done, 5)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_missing_file_starts_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "plain").mkdir()
    with caplog.at_level(logging.INFO, LOGGER):
        started = Training(tmp_path / "new", 1, resume=True).run()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(tmp_path / "new" / "checkpoint.pt") in warnings[0] and "beginning" in warnings[0]
    assert started.steps == Training(tmp_path / "plain", 1).run().steps
    assert len(started.steps) == 4


def test_without_resume_the_old_file_is_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "checkpoint.pt").write_text("not a checkpoint")
    with caplog.at_level(logging.INFO, LOGGER):
        training = Training(tmp_path, 1).run()
    assert training.steps == Training(tmp_path / "plain", 1).run().steps
    assert training.files["checkpoint.pt"]["epoch"] == 1
    assert "Resumed" not in caplog.text and "Nothing to resume" not in caplog.text


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"),
    [(1, 3, [1, 2, 3]), (2, 5, [None, 2, 2, 4, 5]), (3, 4, [None, None, 3, 4]), (7, 2, [None, 2])],
    ids=str,
)
def test_saved_every_few_epochs_and_at_the_end(
    tmp_path: Path, interval: int, epochs: int, expected: list[int | None]
) -> None:
    training = Training(tmp_path, epochs, interval=interval, num_pairs=1)
    found: list[int | None] = []

    def look() -> None:
        path = tmp_path / "checkpoint.pt"
        found.append(torch.load(path, weights_only=True)["epoch"] if path.is_file() else None)

    training.trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    training.run()
    assert found == expected


def test_content_of_the_state(tmp_path: Path) -> None:
    training = Training(tmp_path, 2).run()
    state = training.files["checkpoint.pt"]
    assert state["epoch"] == 2 and state["epoch_length"] == 4
    assert same(state["network"], dict(training.network.state_dict()))
    assert same(state["optimizer"], training.optimizer.state_dict())
    # the step of the schedule belongs to the epoch
    assert state["lr_scheduler"]["last_epoch"] == 2
    assert state["best_metric"] == max(training.metrics)
    assert state["best_metric_epoch"] == 1 + int(np.argmax(training.metrics))
    assert type(state["best_metric"]) is float and type(state["best_metric_epoch"]) is int


def test_training_without_schedule_and_validation(tmp_path: Path) -> None:
    def make(seed: int, resume: bool) -> tuple[nn.Module, SupervisedTrainer]:
        torch.manual_seed(seed)
        network = nn.Conv3d(2, 3, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        trainer = SupervisedTrainer(
            device=CPU,
            max_epochs=2,
            train_data_loader=DataLoader(Dataset(pairs(2, seed=2)), batch_size=1),
            network=network,
            optimizer=optimizer,
            loss_function=lambda ddf, target: (ddf - target["fixed_image"]).square().mean(),
            prepare_batch=PrepareRegistrationBatch(),
            train_handlers=[TrainingCheckpoint(str(tmp_path / "c.pt"), network, optimizer, resume=resume)],
        )
        return network, trainer

    network, trainer = make(0, False)
    trainer.run()
    expected = dict(network.state_dict())
    network, trainer = make(0, False)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: trainer.terminate())
    trainer.run()
    network, trainer = make(9, True)
    trainer.run()
    assert same(dict(network.state_dict()), expected)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["lr_scheduler"] is None and "best_metric" not in state


# ---- files that do not fit ----


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return edit


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


# what happened to the file, arguments of the training that is resumed, message
ILL_STATES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), {}, r"checkpoint\.pt' is (damaged|not)"),
    "text": (lambda p: p.write_text("epoch: 3"), {}, r"checkpoint\.pt' is (damaged|not)"),
    "half": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        {},
        r"checkpoint\.pt' is (damaged|not)",
    ),
    "list": (lambda p: torch.save([1, 2], p), {}, r"checkpoint\.pt' is not the state of a training"),
    "best weights": (edited(lambda s: s["network"]), {}, r"checkpoint\.pt' is not the state of a training"),
    "no optimizer": (edited(without("optimizer")), {}, r"checkpoint\.pt' is not the state of a training"),
    "no random states": (edited(without("random", "epoch")), {}, r"checkpoint\.pt' is not the state of a training"),
    "other network": (lambda p: None, {"network": Network(5)}, r"checkpoint\.pt' holds the weights of another network"),
    "other epochs": (lambda p: None, {"num_pairs": 3}, r"epochs of 4 iterations, this training of 3"),
    "list of weights": (edited(lambda s: s.update(network=[1])), {}, r"checkpoint\.pt' is not a state dict"),
}


@pytest.mark.parametrize(("change", "arguments", "message"), ILL_STATES.values(), ids=ILL_STATES)
def test_states_that_cannot_be_resumed(
    tmp_path: Path, change: Callable[[Path], Any], arguments: dict[str, Any], message: str
) -> None:
    Training(tmp_path, 2).run(5)
    change(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    training = Training(tmp_path, 2, resume=True, **arguments)
    with pytest.raises(ValueError, match=message) as caught:
        training.run()
    assert "\n" not in str(caught.value)
    assert training.steps == []
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("interval", [0, -1])
def test_ill_formed_interval(tmp_path: Path, interval: int) -> None:
    network = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=rf"got {interval}"):
        TrainingCheckpoint(tmp_path / "c.pt", network, torch.optim.SGD(network.parameters(), lr=1), interval=interval)


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Training(tmp_path, 2).run(5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = torch.save
    failed: list[str] = []

    def failing(content: Any, file: io.BytesIO) -> None:
        if ("epoch" in content) == (name == "checkpoint.pt"):
            failed.append(name)
            raise OSError("disk full")
        save(content, file)

    resumed = Training(tmp_path, 2, resume=True)
    if name == "model.pt":

        def forget() -> None:
            # any value is better
            resumed.evaluator.state.best_metric = -1

        resumed.trainer.add_event_handler(Events.EPOCH_STARTED, forget)
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        resumed.run()
    assert failed == [name]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "model.pt"]
    assert (tmp_path / name).read_bytes() == before[name]
    monkeypatch.undo()
    # what is left can be gone on from
    assert len(Training(tmp_path, 2, resume=True).run().steps) == 4


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system writes no file beyond 4 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_ends_the_training_and_keeps_the_last_state(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Training(tmp_path / "whole", 3).run()
    Training(tmp_path / "parts", 3).run(9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=r"no space for the 0\.0 MB of '.*' \(File too large\); what was there is kept"):
        Training(tmp_path / "parts", 3, resume=True).run()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before
    assert same(Training(tmp_path / "parts", 3, resume=True).run().files, whole.files)


def test_other_errors_of_the_system_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError, match="Permission denied"):
        Training(tmp_path, 1).run()


@pytest.mark.parametrize("size", [None, 0, 1, 0.5, 0.9], ids=str)
def test_damaged_state_is_passed_over_for_the_one_before(
    tmp_path: Path, size: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """``size`` is what is left of the newest state; None: a kill came between two renamings."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Training(tmp_path / "whole", 4).run()
    Training(tmp_path / "parts", 4).run(13)
    newest = tmp_path / "parts" / "checkpoint.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: size if isinstance(size, int) else int((size or 0) * len(content))])
    if size is None:
        newest.unlink()
    resumed = Training(tmp_path / "parts", 4, resume=True, seed=3)
    with caplog.at_level(logging.INFO, LOGGER):
        resumed.run(stop_at=10)
    assert resumed.steps[0][:2] == (3, 9)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (size is not None)
    assert all(str(newest) in text and PREVIOUS in text and "\n" not in text for text in warnings)
    assert f"Resumed after epoch 2 of 4 from '{resumed.checkpoint.previous_path}'" in caplog.text
    # the damaged file never takes the place of a good one
    last = Training(tmp_path / "parts", 4, resume=True, seed=5).run()
    assert last.steps[0][:2] == (3, 9)
    assert same(last.files, whole.files) and last.state(PREVIOUS)["epoch"] == 3


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    Training(tmp_path, 3).run(9)
    for name in ("checkpoint.pt", PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint_previous\.pt' is not a readable"):
        Training(tmp_path, 3, resume=True).run()


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_state_of_an_earlier_training_does_not_come_back(
    tmp_path: Path, stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Begun anew in its folder and killed, perhaps before the first save, and resumed."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "used").mkdir()
    plain = Training(tmp_path / "plain", 3).run()
    earlier = Training(tmp_path / "used", 3, seed=9).run()
    with caplog.at_level(logging.WARNING, LOGGER):
        Training(tmp_path / "used", 3).run(stop)
    assert "checkpoint_replaced.pt" in caplog.text and "begins anew" in caplog.text
    assert same(earlier.state("checkpoint_replaced.pt")["network"], dict(earlier.network.state_dict()))
    assert same(Training(tmp_path / "used", 3, resume=stop > 1, seed=0).run().files, plain.files)


def test_leftovers_of_kills_are_removed(tmp_path: Path) -> None:
    others = [".checkpoint-other.pt", ".checkpoint-abcdefgh.txt", "checkpoint-abcdefgh.pt"]
    for name in [".checkpoint-abcd_f1h.pt", ".model-12345678.pt", *others]:
        (tmp_path / name).write_bytes(b"half of a state")
    Training(tmp_path, 1).run()
    assert sorted(os.listdir(tmp_path)) == sorted(["checkpoint.pt", "model.pt", *others])


# ---- the best weights ----


class Constant(nn.Module):
    """A network whose metric is its only weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.ones_like(image[:, :1])


def constant_evaluator(network: nn.Module, saver: BestModelSaver) -> SupervisedEvaluator:
    zeros = {key: torch.zeros(1, 2, 2, 2) for key in ("moving_image", "fixed_image", "zero")}
    return SupervisedEvaluator(
        device=CPU,
        val_data_loader=DataLoader(Dataset([zeros]), batch_size=1),
        network=network,
        prepare_batch=PrepareRegistrationBatch(),
        key_val_metric={"val_weight": PairMetric(MAEMetric(), ["pred", "zero"])},
        val_handlers=[saver],
    )


# metrics of the validations -> weight on disk after each
SEQUENCES: dict[str, tuple[list[float], list[float]]] = {
    "rising": ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
    "falling": ([0.3, 0.2, 0.1], [0.3, 0.3, 0.3]),
    "up and down": ([0.2, 0.5, 0.1, 0.4, 0.6, 0.3], [0.2, 0.5, 0.5, 0.5, 0.6, 0.6]),
    "zero": ([0.0, 0.0], [0.0, 0.0]),
}


@pytest.mark.parametrize(("values", "expected"), SEQUENCES.values(), ids=SEQUENCES)
def test_best_weights_are_kept(tmp_path: Path, values: list[float], expected: list[float]) -> None:
    network = Constant()
    path = tmp_path / "deep" / "model.pt"
    evaluator = constant_evaluator(network, BestModelSaver(str(path), network))
    found = []
    for epoch, value in enumerate(values, start=1):
        network.weight.data.fill_(value)
        evaluator.run(global_epoch=epoch)
        state = torch.load(path, weights_only=True)
        # a plain state dict
        assert state.keys() == {"weight"}
        found.append(state["weight"].item())
    assert found == pytest.approx(expected)
    assert evaluator.state.best_metric == pytest.approx(max(values))
    assert os.listdir(path.parent) == ["model.pt"]


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    network = small()
    saver = BestModelSaver(tmp_path / "model.pt", network)
    state = SimpleNamespace(best_metric=1.0, metrics={"dice": 1.0}, key_metric_name="dice")
    with torch.no_grad():
        network[0].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"diverged: 1 tensors of the network have NaN .*0\.weight"):
        saver(SimpleNamespace(state=state))
    assert list(tmp_path.iterdir()) == []


def test_same_value_again_is_not_written_again(tmp_path: Path) -> None:
    network = Constant()
    evaluator = constant_evaluator(network, BestModelSaver(tmp_path / "model.pt", network))
    network.weight.data.fill_(0.5)
    evaluator.run(1)
    (tmp_path / "model.pt").unlink()
    # the best weights are evaluated once more at the end of a training
    evaluator.run(2)
    assert os.listdir(tmp_path) == []
    network.weight.data.fill_(0.6)
    evaluator.run(3)
    assert os.listdir(tmp_path) == ["model.pt"]


def go_on(folder: Path, values: list[float]) -> SupervisedEvaluator:
    """A process that starts a training, or resumes it, for as many epochs as there are weights to go through."""
    network = Constant()
    saver = BestModelSaver(folder / "model.pt", network)
    evaluator = constant_evaluator(network, saver)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    path = folder / "checkpoint.pt"
    done = torch.load(path, weights_only=True)["epoch"] if path.is_file() else 0
    trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=done + len(values),
        train_data_loader=DataLoader(Dataset(pairs(1, seed=2)), batch_size=1),
        network=network,
        optimizer=optimizer,
        loss_function=lambda pred, target: pred.mean(),
        prepare_batch=PrepareRegistrationBatch(),
        train_handlers=[
            ValidationHandler(1, evaluator),
            TrainingCheckpoint(path, network, optimizer, None, evaluator, saver, resume=done > 0),
        ],
    )

    def set_weight() -> None:
        network.weight.data.fill_(values[trainer.state.epoch - done - 1])

    trainer.add_event_handler(Events.EPOCH_STARTED, set_weight)
    trainer.run()
    assert trainer.state.epoch == done + len(values)
    return evaluator


def test_best_weights_outlive_an_interruption(tmp_path: Path) -> None:
    # weights that a process goes through, weight on disk afterwards, its epoch, whether it was written by this process
    processes = [
        ([0.5, 0.3], 0.5, 1, True),
        ([0.5, 0.4], 0.5, 1, False),
        ([0.45, 0.7, 0.2], 0.7, 6, True),
        ([0.1], 0.7, 6, False),
    ]
    written = 0
    for values, best, epoch, new in processes:
        evaluator = go_on(tmp_path, values)
        assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item() == pytest.approx(best)
        assert evaluator.state.best_metric == pytest.approx(best)
        assert evaluator.state.best_metric_epoch == epoch
        assert ((tmp_path / "model.pt").stat().st_mtime_ns != written) == new
        written = (tmp_path / "model.pt").stat().st_mtime_ns


def test_best_weights_that_are_gone_are_made_anew(tmp_path: Path) -> None:
    go_on(tmp_path, [0.5, 0.3])
    (tmp_path / "model.pt").unlink()
    go_on(tmp_path, [0.2, 0.4, 0.1])
    # those of the best epoch since, or the training would end without any
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item() == pytest.approx(0.4)


# ---- weights ----


def small(channels: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, channels, 3), nn.Conv3d(channels, 1, 1))


class Payload:
    """Runs something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("whole", [False, True], ids=["state dict", "state of a training"])
@pytest.mark.parametrize("path_type", [str, Path])
def test_weights_are_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: bool, path_type: Callable[[Path], Any]
) -> None:
    source, target = small(), small()
    assert not same(dict(source.state_dict()), dict(target.state_dict()))
    state = dict(source.state_dict())
    torch.save({"network": state, "epoch": 3, "optimizer": {}} if whole else state, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, LOGGER):
        LoadWeights(path_type(tmp_path / "w.pt"), target)()
    assert same(dict(target.state_dict()), dict(source.state_dict()))
    assert f"'{tmp_path / 'w.pt'}'" in caplog.text


def test_weights_are_loaded_when_an_engine_starts(tmp_path: Path) -> None:
    source, network = Constant(), Constant()
    source.weight.data.fill_(0.25)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    evaluator = constant_evaluator(network, BestModelSaver(tmp_path / "best.pt", network))
    loader = LoadWeights(tmp_path / "w.pt", network)
    loader.attach(evaluator)
    assert network.weight.item() == 0.0
    evaluator.run()
    assert evaluator.state.metrics["val_weight"] == 0.25


def test_later_steps_do_not_change_the_file(tmp_path: Path) -> None:
    source, network = small(), small()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    LoadWeights(tmp_path / "w.pt", network)()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    LoadWeights(tmp_path / "w.pt", network)()
    assert same(dict(network.state_dict()), dict(source.state_dict()))


def test_settings_that_older_weights_do_not_have(tmp_path: Path) -> None:
    """Whether the network is diffeomorphic is in its state, but was not always."""

    def net(diffeomorphic: bool) -> SACBNet:
        return SACBNet(2, base_channels=1, num_clusters=2, diffeomorphic=diffeomorphic)

    state = net(True).state_dict()
    torch.save(state, tmp_path / "new.pt")
    torch.save({name: value for name, value in state.items() if name != "integration_steps"}, tmp_path / "old.pt")
    network = net(False)
    LoadWeights(tmp_path / "new.pt", network)()
    assert network.integration_steps == 7 and same(dict(network.state_dict()), dict(state))
    LoadWeights(tmp_path / "old.pt", network)()
    assert network.integration_steps == 0


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{name}": value for name, value in state.items()}


def spoilt(value: float) -> dict[str, torch.Tensor]:
    state = dict(small().state_dict())
    state["1.bias"] = torch.full_like(state["1.bias"], value)
    return state


# what is in the file, exception, message
ILL_WEIGHTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing": (lambda p: None, FileNotFoundError, r"w\.pt'"),
    "folder": (lambda p: p.mkdir(), FileNotFoundError, r"w\.pt'"),
    "empty": (lambda p: p.write_bytes(b""), ValueError, r"w\.pt' is (damaged|not)"),
    "text": (lambda p: p.write_text("weights\nof a network\n"), ValueError, r"w\.pt' is (damaged|not)"),
    "binary": (lambda p: p.write_bytes(bytes(range(256)) * 8), ValueError, r"w\.pt' is (damaged|not)"),
    "half": (
        lambda p: (torch.save(small().state_dict(), p), p.write_bytes(p.read_bytes()[:-300])),
        ValueError,
        r"w\.pt' is (damaged|not)",
    ),
    "module": (lambda p: torch.save(small(), p), ValueError, r"w\.pt' is (damaged|not)"),
    "array": (lambda p: p.write_bytes(pickle.dumps({"a": np.ones(2)})), ValueError, r"w\.pt' is (damaged|not)"),
    "list": (lambda p: torch.save([torch.ones(2)], p), ValueError, r"w\.pt' is not a state dict of tensors"),
    "tensor": (lambda p: torch.save(torch.ones(2), p), ValueError, r"w\.pt' is not a state dict of tensors"),
    "numbers": (lambda p: torch.save({"0.weight": 3}, p), ValueError, r"w\.pt' is not a state dict of tensors"),
    "training of numbers": (
        lambda p: torch.save({"network": {"0.weight": 3}}, p),
        ValueError,
        r"w\.pt' is not a state dict of tensors",
    ),
    "nothing": (lambda p: torch.save({}, p), ValueError, r"w\.pt' holds .* another network: 4 parameters are missing"),
    "wider network": (
        lambda p: torch.save(small(3).state_dict(), p),
        ValueError,
        r"w\.pt'.* another network: 3 have another shape.*0\.weight",
    ),
    "longer network": (
        lambda p: torch.save(nn.Sequential(*small(), nn.Conv3d(1, 1, 1)).state_dict(), p),
        ValueError,
        r"w\.pt'.* another network: 2 are unknown.*2\.bias, 2\.weight",
    ),
    "shorter network": (
        lambda p: torch.save(nn.Sequential(small()[0]).state_dict(), p),
        ValueError,
        r"w\.pt'.* another network: 2 .*missing.*1\.bias, 1\.weight",
    ),
    "NaN": (
        lambda p: torch.save(spoilt(float("nan")), p),
        ValueError,
        r"w\.pt' has NaN or infinite values in 1 tensors \(1\.bias\)",
    ),
    "infinite": (lambda p: torch.save({"network": spoilt(float("inf"))}, p), ValueError, r"w\.pt' has NaN or infinite"),
    "other names": (
        lambda p: torch.save(renamed(dict(small().state_dict())), p),
        ValueError,
        r"w\.pt'.* another network: 4 .*missing.*4 are unknown.*module\.0\.bias",
    ),
}


@pytest.mark.parametrize(("write", "error", "message"), ILL_WEIGHTS.values(), ids=ILL_WEIGHTS)
def test_files_that_are_no_weights_are_refused_in_one_sentence(
    tmp_path: Path, write: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    write(tmp_path / "w.pt")
    network = small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        LoadWeights(tmp_path / "w.pt", network)()
    assert str(caught.value).isprintable(), str(caught.value)
    # and nothing of them is loaded
    assert same(dict(network.state_dict()), before)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_file_cut_anywhere(tmp_path: Path, zipped: bool) -> None:
    network = small()
    torch.save(network.state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in range(0, len(whole) - 1, 13 if zipped else 3):
        (tmp_path / "w.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"w\.pt'"):
            LoadWeights(tmp_path / "w.pt", network)()
    (tmp_path / "w.pt").write_bytes(whole)
    LoadWeights(tmp_path / "w.pt", network)()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"0.weight": x}, lambda x: {"network": {}, "epoch": x}])
def test_nothing_in_a_file_is_run(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(Payload(tmp_path / "ran")), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt' is (damaged|not)"):
        LoadWeights(tmp_path / "w.pt", small())()
    assert os.listdir(tmp_path) == ["w.pt"]
    # it would have been
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()
