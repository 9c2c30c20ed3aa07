# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from monai_sacb.utils import find_bundle_root, running_bundle


def make_bundle(folder: Path) -> None:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text("{}")


# folders that are bundles, folders that are none, where the bundle is
CASES = {
    "nothing": ([], [], "."),
    "itself": (["."], [], "."),
    "itself before a subfolder": ([".", "bundle", "other"], [], "."),
    "clone": (["bundle"], ["monai_sacb/apps", "tests"], "bundle"),
    "bundle before another name": (["a_bundle", "bundle"], [], "bundle"),
    "only subfolder": (["zoo_sacb"], ["aaa/configs", "zzz"], "zoo_sacb"),
    "two levels down": (["models/zoo_sacb"], [], "."),
    "no metadata": ([], ["bundle/configs"], "."),
}


@pytest.mark.parametrize(("bundles", "others", "expected"), CASES.values(), ids=CASES)
def test_where_the_bundle_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundles: list[str], others: list[str], expected: str
) -> None:
    for folder in bundles:
        make_bundle(tmp_path / folder)
    for folder in others:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a_file").write_text("x")
    monkeypatch.chdir(tmp_path)
    found = find_bundle_root()
    assert isinstance(found, str)
    assert found == expected
    if bundles and expected != ".":
        assert (tmp_path / found / "configs" / "metadata.json").is_file()


def test_folder_named_metadata_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle" / "configs" / "metadata.json").mkdir(parents=True)
    make_bundle(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    assert find_bundle_root() == "real"


def test_several_subfolders_are_not_chosen_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # "its only subfolder that is a bundle": another bundle's weights must not be taken by chance
    for name in ("sacb_brain", "spleen"):
        make_bundle(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert find_bundle_root() == "."


def test_follows_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path / "one" / "bundle")
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert find_bundle_root() == "bundle"
    monkeypatch.chdir(tmp_path / "two")
    assert find_bundle_root() == "."


def test_bundle_that_is_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI puts it behind the first entry of the search path; a bundle without the file is another one."""
    for name in ("here", "other", "wanted", "older"):
        make_bundle(tmp_path / name)
    for name in ("here", "wanted", "older"):
        (tmp_path / name / "mark.json").write_text("{}")
    folders = [str(tmp_path / name) for name in ("here", "other", "wanted", "older")]
    monkeypatch.setattr("sys.path", folders)
    assert running_bundle("mark.json") == folders[2]
    monkeypatch.setattr("sys.path", folders[:2])
    assert running_bundle("mark.json") == folders[0]
    monkeypatch.setattr("sys.path", ["", folders[1]])
    assert running_bundle("mark.json") == "."
