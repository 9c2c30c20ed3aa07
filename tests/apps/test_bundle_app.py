# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from monai_sacb.apps import bundle
from monai_sacb.utils import bundle_source

PARTS = ("LICENSE", "configs", "docs", "models")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_source_is_a_bundle() -> None:
    source = bundle_source()
    metadata = json.loads((source / "configs" / "metadata.json").read_text())
    assert {"version", "monai_version", "network_data_format"} <= metadata.keys()
    for name in ("train", "evaluate", "inference"):
        assert "run" in json.loads((source / "configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["copy", "new/folders/copy", "two words"])
def test_copy_is_complete(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert bundle(target) == str(target)
    source = bundle_source()
    expected = {name: data for name, data in contents(source).items() if name.split(os.sep)[0] in PARTS}
    assert {"LICENSE", os.path.join("configs", "train.json"), os.path.join("configs", "metadata.json")} <= set(expected)
    assert contents(target) == expected
    assert os.listdir(target.parent) == [target.name]


def test_copy_is_independent_of_the_source(tmp_path: Path) -> None:
    before = contents(bundle_source())
    target = Path(bundle(tmp_path / "copy"))
    (target / "configs" / "train.json").write_text("{}")
    assert contents(bundle_source()) == before
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_others_may_read_the_copy(tmp_path: Path) -> None:
    target = Path(bundle(tmp_path / "copy"))
    assert stat.S_IMODE(target.stat().st_mode) & 0o055 == 0o055


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundle("copy") == "copy"
    assert (tmp_path / "copy" / "configs" / "inference.json").is_file()


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_existing_target_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"there' exists already"):
        bundle(target)
    assert os.listdir(tmp_path) == ["there"]
    assert target.read_text() == "mine" if kind == "file" else len(os.listdir(target)) == (kind == "folder")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_nothing_is_left_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    copied = []
    copytree = shutil.copytree

    def failing(source: Path, *args: object, **kwargs: object) -> object:
        if copied:
            raise error
        copied.append(source)
        return copytree(source, *args, **kwargs)

    monkeypatch.setattr(shutil, "copytree", failing)
    with pytest.raises(type(error)):
        bundle(tmp_path / "copy")
    assert copied
    assert os.listdir(tmp_path) == []


def test_folder_of_the_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        bundle(tmp_path / "file" / "copy")
