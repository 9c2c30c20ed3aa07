# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # one core each, also for the processes that tests start
    torch.set_num_threads(1)
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        os.environ.setdefault(_name, "1")


@pytest.fixture(scope="session")
def parity() -> Callable[[str], dict[str, np.ndarray]]:
    """``parity("warp")``: the arrays that the original implementation gave, from ``tests/parity/warp.npz``."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(TESTS / "parity" / f"{name}.npz") as recorded:
            return dict(recorded)

    return load


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    """Folder of the recordings that are too large for the repository; a test that asks for it skips without."""
    folder = TESTS.parents[1] / "shared" / "parity"
    for name in ("sacb_net.npz", "sacb_net_official_layout.pth.tar"):
        if not (folder / name).is_file():
            pytest.skip(f"the recording {name} of the original network is not in ../shared/parity")
    return folder


@pytest.fixture(scope="session")
def relative_error() -> Callable[[object, object], float]:
    """``relative_error(a, b)`` = max|a - b| / max|b|, of arrays or tensors of one shape; infinite for any NaN."""

    def plain(x: object) -> np.ndarray:
        return x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)

    def error(a: object, b: object) -> float:
        actual, expected = plain(a), plain(b)
        if actual.shape != expected.shape:
            raise ValueError(f"shapes differ: {actual.shape} and {expected.shape}.")
        value = np.abs(actual - expected).max() / np.abs(expected).max()
        return float(value) if np.isfinite(value) else float("inf")

    return error


@pytest.fixture(scope="session")
def check_same_field() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """``check_same_field(a, b)``: equal but for a voxel at the border of two clusters that falls to the other one."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        difference = (actual - expected).abs()
        assert (difference < 0.05).float().mean() >= 0.999
        assert difference.median() < 1e-4
        assert expected.abs().max() > 0.5 and actual.abs().max() > 0.5

    return check
