# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from monai_sacb.apps import memory
from monai_sacb.apps.memory import check_memory, expected_memory_mb
from monai_sacb.utils import available_memory_mb, peak_memory_mb, resources

COSTS = {
    "base_mb": 1000,
    "reading_mb_per_million": 10,
    "native_mb_per_million": 50,
    "field_mb_per_million": 100,
    "network_mb_per_million": 400,
    "refinement_mb_per_million": 300,
}


@pytest.mark.parametrize(
    ("native", "working", "network", "refine", "fine", "expected"),
    [
        (0, 0, False, 0, 0, 1000),
        (2_000_000, 10**6, False, 0, 0, 1200),
        (2_000_000, 10**6, False, 5, 0, 1320),
        (2_000_000, 500_000, True, 5, 0, 1220),
        # the two grids one after the other
        (2_000_000, 500_000, True, 5, 10**6, 1320),
        (210_000_000, 10**6, True, 0, 0, 11_600),
        (210_000_000, 10**6, True, 5, 8 * 10**6, 12_300),
    ],
)
def test_expected(native: int, working: int, network: bool, refine: int, fine: int, expected: float) -> None:
    assert expected_memory_mb(COSTS, native, working, network, refine, fine) == pytest.approx(expected)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_mb", lambda: 8000.0)
    check_memory(8000)
    with pytest.raises(ValueError, match=r"takes about 8001 MB of memory, and 8000 MB are available; resample"):
        check_memory(8001)
    monkeypatch.setattr(memory, "available_memory_mb", lambda: None)
    check_memory(1e9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where Linux tells")
def test_available_is_less_than_there_is() -> None:
    available = available_memory_mb()
    assert available is not None
    assert 0 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6 + peak_memory_mb()


def test_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  24000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n")
    (tmp_path / "statm").write_text("5000 0 3 1\n")
    for name, place in (("MEMINFO", "meminfo"), ("OWN", "statm"), ("CGROUP", ".")):
        monkeypatch.setattr(resources, name, tmp_path / place)
    assert available_memory_mb() == pytest.approx(8_000_000 * 1024 / 1e6)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    assert available_memory_mb() == pytest.approx(8192)
    (tmp_path / "memory.max").write_text("4000000000\n")
    assert available_memory_mb() == pytest.approx(1000)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    assert available_memory_mb() == pytest.approx(1500)
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "none")
    assert available_memory_mb() is None
