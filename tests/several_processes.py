# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes on one machine, as ``torchrun`` starts them, without its seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

# of a machine that has much else to do
TIMEOUT = 400


def _run(function: Callable[..., None], rank: int, number: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # the threads of the parent do not come along
    torch.set_num_threads(1)
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # nothing of the parent's is to be cleaned up here
    os._exit(code)


def run_processes(function: Callable[..., None], *arguments: Any, number: int = 2) -> list[int | None]:
    """Call a function in several processes that can find each other; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(function, rank, number, port, arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
