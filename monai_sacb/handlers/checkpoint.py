# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import io
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from torch import nn

from monai.engines import Workflow

from monai_sacb.utils import (
    compare_states,
    is_writer,
    not_finite,
    read_checkpoint,
    replacing,
    wait_for_processes,
)

__all__ = ["BestModelSaver", "LoadWeights", "TrainingCheckpoint"]


# the disk, the quota, or the largest size of a file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_atomically(content: Any, path: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None) -> None:
    """
    ``torch.save`` to a temporary name, on the disk, then rename: a reader never meets half a file.

    Args:
        content: what to save.
        path: the file.
        previous: a name for the file that was there before, which is replaced otherwise.

    Raises:
        OSError: When the file cannot be written, as on a full disk; the files that were there stay.
    """
    # in memory first: an error of writing is then one of the system, with its reason
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = Path(path)
    try:
        with replacing(path, alone=True) as temporary:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                # renamed before its content is on the disk, it could be empty after a power cut
                os.fsync(file.fileno())
            if previous is not None and path.is_file():
                os.replace(path, previous)
    except OSError as error:
        if error.errno not in FULL:
            raise
        size = f"{buffer.getbuffer().nbytes / 1e6:.1f} MB"
        raise OSError(f"no space for the {size} of '{path}' ({error.strerror}); what was there is kept.") from error


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel``, or itself."""
    module = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    return module


def unwrapped_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a network, without the prefix that ``DistributedDataParallel`` adds."""
    return dict(unwrapped(network).state_dict())


def _load_state(network: nn.Module, state: Any, path: str | os.PathLike[str]) -> None:
    """Load a state dict, strictly; refuse with a sentence what is not one of this network, whatever file it is from."""
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"'{path}' is not a state dict of tensors.")
    # entries that older states do not have
    optional = getattr(unwrapped(network), "optional_state", ())
    expected, given = (
        {name: value for name, value in entries.items() if name not in optional}
        for entries in (unwrapped_state(network), state)
    )
    difference = compare_states(expected, given)
    if difference is not None:
        raise ValueError(f"'{path}' holds the weights of another network: {difference}.")
    broken = not_finite(state)
    if broken:
        raise ValueError(f"'{path}' has NaN or infinite values in {len(broken)} tensors ({', '.join(broken[:3])}).")
    unwrapped(network).load_state_dict(state)


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """
    Load the weights in a file into a network, strictly.

    Args:
        network: the network.
        path: a plain state dict, or the state of a whole training; nothing in it is executed.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is not a state dict, or that of another network, or has values that are not finite.
    """
    state = read_checkpoint(path)
    if isinstance(state, Mapping) and isinstance(state.get("network"), Mapping):
        state = state["network"]
    _load_state(network, state, path)


class LoadWeights:
    """
    Load weights into a network when called, or when an engine that it is attached to starts.

    Against MONAI's ``CheckpointLoader``, a file of another network is refused in one sentence.

    Args:
        path: file with the state dict.
        network: the network.
        not_path: a file that this must not be, since it will be written to.
    """

    def __init__(
        self, path: str | os.PathLike[str], network: nn.Module, not_path: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = path
        self.network = network
        self.not_path = not_path

    def attach(self, engine: Workflow) -> None:
        """Load when the engine starts."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Workflow | None = None) -> None:
        if self.not_path is not None and os.path.realpath(self.path) == os.path.realpath(self.not_path):
            raise ValueError(
                f"'{self.path}' would be overwritten by the training that starts from it; use another folder."
            )
        load_weights(self.network, self.path)
        logging.getLogger(__name__).info(f"Loaded weights from '{self.path}'.")


class BestModelSaver:
    """
    Keep the weights with the best key metric of an evaluator, as a plain state dict. Of several processes that share a
    training, the first writes it.

    Args:
        path: the file; written to a temporary name and renamed.
        network: the network. Weights that are not finite are refused with a ``ValueError``.
    """

    def __init__(self, path: str | os.PathLike[str], network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network
        self._saved: float | None = None

    def attach(self, engine: Workflow) -> None:
        """Compare after every validation; the evaluator itself keeps the best value."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        best = engine.state.best_metric
        is_best = engine.state.metrics.get(engine.state.key_metric_name) == best
        if is_best and best != self._saved:
            state = unwrapped_state(self.network)
            broken = not_finite(state)
            if broken:
                raise ValueError(
                    f"the training has diverged: {len(broken)} tensors of the network have NaN or infinite values "
                    f"({', '.join(broken[:3])})."
                )
            if is_writer():
                save_atomically(state, self.path)
            self._saved = best

    def restored(self, best: float) -> None:
        """Take note of the best value of a resumed training, whose weights are on disk already."""
        self._saved = best


def _random_states() -> dict[str, Any]:
    """States of all random number generators, of types that ``torch.load(weights_only=True)`` reads."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


class TrainingCheckpoint:
    """
    Save the whole state of a training after every few epochs, and go on from it.

    The state is: the network, the optimizer, the schedule, the epoch, the random number generators, and the best metric
    so far. It is written to a temporary name and renamed. The one before stays beside it, as ``checkpoint_previous.pt``
    of ``checkpoint.pt``, and a training goes on from there if the newest is damaged. A training that begins anew leaves
    the state of an earlier one as ``checkpoint_replaced.pt``. Attach it after the handlers that validate and that
    change the learning rate, whose effect belongs to the epoch. Of several processes that share a training, the first
    writes the file and all read it; their random states are the same. They go on when it is written.

    Args:
        path: the file of the state.
        network, optimizer, lr_scheduler: what is trained, with what.
        evaluator: evaluator whose best metric is kept.
        best_saver: the handler that saves the best weights, told about a resumed best value.
        resume: whether to go on from the file, with the learning rate it remembers. A missing file starts a new
            training, and says so.
        interval: epochs between saves; the last epoch is always saved.
        summary_writer: TensorBoard's writer of the curves, which keeps values back for minutes; those of the epochs in
            the state are on the disk before it.

    Raises:
        ValueError: When ``interval`` is below 1, or, at the start, the file is not a state of such a training.
        OSError: When the state cannot be written, as on a full disk. The last ones are kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        evaluator: Workflow | None = None,
        best_saver: BestModelSaver | None = None,
        resume: bool = False,
        interval: int = 1,
        summary_writer: Any = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}.")
        self.path = Path(path)
        self.previous_path, self.replaced_path = (
            self.path.with_name(f"{self.path.stem}_{which}{self.path.suffix}") for which in ("previous", "replaced")
        )
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.best_saver = best_saver
        self.summary_writer = summary_writer
        self.resume = resume
        self.interval = interval
        self.logger = logging.getLogger(__name__)
        # whether the file is worth keeping when the next one comes
        self._newest_is_whole = False

    def attach(self, engine: Workflow) -> None:
        """Load when the trainer starts, save when an epoch has ended."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Workflow) -> None:
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            if self.summary_writer is not None:
                self.summary_writer.flush()
            if is_writer():
                previous = self.previous_path if self._newest_is_whole else None
                save_atomically(self.state_dict(engine), self.path, previous)
                self._newest_is_whole = True
            wait_for_processes()

    def state_dict(self, engine: Workflow) -> dict[str, Any]:
        """Everything that a later run needs to go on after the engine's current epoch."""
        state: dict[str, Any] = {
            "network": unwrapped_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "scaler": None if engine.scaler is None else engine.scaler.state_dict(),
            "epoch": engine.state.epoch,
            "epoch_length": engine.state.epoch_length,
            "random": _random_states(),
        }
        if self.evaluator is not None:
            # plain numbers, whatever type the metric has
            state["best_metric"] = float(self.evaluator.state.best_metric)
            state["best_metric_epoch"] = int(self.evaluator.state.best_metric_epoch)
        return state

    def _begin_anew(self) -> None:
        """Put an earlier training's states out of the way, or a kill before the first save would bring them back."""
        newest = next((path for path in (self.path, self.previous_path) if path.is_file()), None)
        if newest is not None:
            os.replace(newest, self.replaced_path)
            self.logger.warning(
                f"Training begins anew; the state of an earlier one, '{newest}', is kept as '{self.replaced_path}'."
            )
        self.previous_path.unlink(missing_ok=True)

    def _read(self) -> tuple[Path, Any] | None:
        """The newest state that can be read, and its file; None where there is no file."""
        there = [path for path in (self.path, self.previous_path) if path.is_file()]
        for path in there:
            try:
                state = read_checkpoint(path)
            except ValueError as error:
                if path == there[-1]:
                    raise
                self.logger.warning(f"{error} The state before it, '{there[-1]}', is used.")
                continue
            self._newest_is_whole = path == self.path
            return path, state
        return None

    def _started(self, engine: Workflow) -> None:
        if is_writer() and not self.resume:
            self._begin_anew()
        if not self.resume:
            return
        found = self._read()
        if found is None:
            self.logger.warning(f"Nothing to resume at '{self.path}': training starts from the beginning.")
            return
        path, state = found
        keys = {"network", "optimizer", "lr_scheduler", "scaler", "epoch", "epoch_length", "random"}
        if not isinstance(state, Mapping) or not keys <= state.keys():
            raise ValueError(f"'{path}' is not the state of a training.")
        if state["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"'{path}' has epochs of {state['epoch_length']} iterations, this training of "
                f"{engine.state.epoch_length}."
            )
        _load_state(self.network, state["network"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self._restore_schedule(self.lr_scheduler, state["lr_scheduler"])
        if engine.scaler is not None and state["scaler"] is not None:
            engine.scaler.load_state_dict(state["scaler"])
        best_is_lost = self.best_saver is not None and not self.best_saver.path.is_file()
        if best_is_lost:
            self.logger.warning("The best weights so far are not on disk any more: the next validation sets the best.")
        elif self.evaluator is not None and "best_metric" in state:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
            if self.best_saver is not None:
                self.best_saver.restored(state["best_metric"])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * state["epoch_length"]
        _restore_random_states(state["random"])
        self.logger.info(f"Resumed after epoch {state['epoch']} of {engine.state.max_epochs} from '{path}'.")

    def _restore_schedule(self, scheduler: torch.optim.lr_scheduler.LRScheduler, state: Mapping[str, Any]) -> None:
        """Go on with the schedule; one that is longer or shorter than before goes on at its own value."""
        total = getattr(scheduler, "total_iters", None)
        scheduler.load_state_dict(dict(state))
        if total is None or total == state.get("total_iters"):
            return
        schedule: Any = scheduler
        schedule.total_iters = total
        for group, rate in zip(self.optimizer.param_groups, schedule._get_closed_form_lr()):
            group["lr"] = rate
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
