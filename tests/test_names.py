# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Bundle configs find our components by their bare names, and no name hides one of MONAI's."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import monai
from monai.bundle import ConfigParser

import monai_sacb

SUBPACKAGES = (
    "apps data engines handlers inferers losses metrics networks networks.blocks networks.layers networks.nets "
    "transforms utils visualize"
)
OURS = {
    name: f"monai_sacb.{package}"
    for package in SUBPACKAGES.split()
    for name in importlib.import_module(f"monai_sacb.{package}").__all__
}


def monai_names() -> set[str]:
    """Every class and function defined anywhere in MONAI."""
    names: set[str] = set()
    for module in pkgutil.walk_packages(monai.__path__, "monai."):
        try:
            content = importlib.import_module(module.name)
        except Exception:
            continue
        names |= {
            name
            for name, value in vars(content).items()
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("monai.")
        }
    return names


def test_no_name_is_monais() -> None:
    theirs = monai_names()
    assert {"SupervisedTrainer", "Warp", "DiceLoss", "CheckpointSaver", "VoxelMorph"} <= theirs
    defined = {
        name
        for module in pkgutil.walk_packages(monai_sacb.__path__, "monai_sacb.")
        if not module.name.endswith("__main__") and ".bundle.bundle" not in module.name
        for name, value in vars(importlib.import_module(module.name)).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("monai_sacb")
        if not name.startswith("_")
    }
    assert set(OURS) <= defined | {"__version__"}
    assert defined & theirs == set()


@pytest.mark.parametrize("name", sorted(name for name in OURS))
def test_found_by_bare_and_by_dotted_name(name: str) -> None:
    for target in (name, f"{OURS[name]}.{name}"):
        parser = ConfigParser(
            {"imports": ["$import monai_sacb"], "x": {"_target_": target, "_mode_": "callable"}},
        )
        parser.parse()
        found = parser.get_parsed_content("x")
        expected = getattr(importlib.import_module(OURS[name]), name)
        # callables are wrapped in a partial when they have no arguments
        assert getattr(found, "func", found) is expected


def test_dotted_name_needs_no_import() -> None:
    code = (
        "from monai.bundle import ConfigParser; import sys; assert 'monai_sacb' not in sys.modules;"
        "p = ConfigParser({'x': {'_target_': 'monai_sacb.networks.nets.SACBNet'}});"
        "p.parse(); sys.stdout.write(type(p.get_parsed_content('x')).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith("SACBNet"), result.stderr
