# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The processes that share a training or a list of pairs, as ``torchrun`` starts them; without any, this one alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist

__all__ = [
    "from_writer",
    "gather_rows",
    "is_writer",
    "join_processes",
    "process_device",
    "process_rank",
    "process_share",
    "wait_for_processes",
    "world_size",
]

T = TypeVar("T")
# torchrun ends the others when one process dies; what may differ by so much is the time to load the data
PATIENCE = timedelta(hours=2)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """Number of this process among those that work together; 0 where it is alone."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Number of processes that work together; 1 where this one is alone."""
    return dist.get_world_size() if _together() else 1


def is_writer() -> bool:
    """Whether this is the process that writes what there is one of: tables, checkpoints, pictures, curves."""
    return process_rank() == 0


def process_share(number: int, at_least_one: bool = False) -> list[int]:
    """
    Which of as many items are this process's: every n-th, of n processes.

    Args:
        number: of items, at least 1 with ``at_least_one``.
        at_least_one: give the last item to a process that would have none; it is then another one's, too.
    """
    share = list(range(process_rank(), number, world_size()))
    return share or ([number - 1] if at_least_one else [])


def _check_started() -> None:
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            "this config is for several processes: start it by 'torchrun --nproc_per_node=N -m monai.bundle run ...' "
            f"(the environment has no {', '.join(missing)})."
        )


def process_device() -> torch.device:
    """
    The device of this process: the GPU of its number on its machine, or the CPU where there is no GPU.

    Raises:
        ValueError: When the process was not started by ``torchrun``, or its machine has fewer GPUs than processes.
    """
    _check_started()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, number = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= number:
        raise ValueError(f"this machine has {number} GPUs for more processes: start as many, or give --device cpu.")
    return torch.device("cuda", rank)


def join_processes(device: str | torch.device) -> None:
    """
    Let the processes that ``torchrun`` has started find each other: by NCCL on GPUs, by gloo on CPUs.

    Args:
        device: the device of this process.

    Raises:
        ValueError: When it was not started by ``torchrun``.
    """
    _check_started()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not _together():
        idist.initialize("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def wait_for_processes() -> None:
    """Go on when all processes have come here."""
    if world_size() > 1:
        dist.barrier()


def from_writer(value: T) -> T:
    """The value that the writer has, in every process; anything that can be pickled."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_rows(rows: Mapping[int, T]) -> dict[int, T]:
    """
    What each process has found out about its pairs, together, in all processes.

    Args:
        rows: by the number of the pair. One that several processes have had counts once.

    Returns:
        those of all processes, in the order of the pairs.
    """
    parts: list[Mapping[int, T]] = [rows]
    if world_size() > 1:
        parts = [{} for _ in range(world_size())]
        dist.all_gather_object(parts, dict(rows))
    merged = {pair: row for part in reversed(parts) for pair, row in part.items()}
    return dict(sorted(merged.items()))
