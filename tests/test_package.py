# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, and the rules of the house that a machine can see."""

from __future__ import annotations

import ast
import configparser
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "monai_sacb").rglob("*.py"))


def packages() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options"]["packages"].split())


def test_every_package_is_listed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert packages() == found | {"monai_sacb.bundle"}


@pytest.mark.slow
def test_wheel_carries_the_package_and_the_bundle(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    expected = {str(path.relative_to(ROOT)) for path in SOURCES} | {"monai_sacb/py.typed"}
    for path in (ROOT / "bundle").rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            expected.add("monai_sacb/" + str(path.relative_to(ROOT)))
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_of_the_house(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Copyright (c) the monai_sacb contributors\n# SPDX-License-Identifier: Apache-2.0\n")
    assert "from __future__ import annotations" in text
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            assert not any(isinstance(d, (ast.List, ast.Dict, ast.Set)) for d in defaults), node.name


def test_public_names_have_docstrings_and_shapes() -> None:
    import importlib

    undocumented = []
    for name in packages() - {"monai_sacb", "monai_sacb.bundle"}:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            if callable(value) and not (value.__doc__ or "").strip():
                undocumented.append(f"{name}.{public}")
    assert undocumented == []
