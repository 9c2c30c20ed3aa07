# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from monai_sacb.utils import new_folder, replacing

NAMES = ["model.pt", "warped.nii.gz", "noextension", ".hidden", "two words.tar.gz"]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", NAMES)
def test_file_appears_only_when_the_block_has_ended(tmp_path: Path, name: str) -> None:
    target = tmp_path / "deep" / "er" / name
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
        assert temporary != target
        assert temporary.parent == target.parent
        # file writers choose the format by the extensions
        assert "".join(temporary.suffixes).endswith("".join(target.suffixes))
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == [name]


def test_old_file_is_whole_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("ne")
        assert target.read_text() == "old"
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["state.json"]


def test_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    target.write_text("old")
    with open(target, encoding="utf-8") as reader:
        with replacing(target) as temporary:
            temporary.write_text("a much longer new content")
        # renamed over, not written into
        assert reader.read() == "old"


@pytest.mark.parametrize(
    "error", [ValueError("stop"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("old", [None, "old"])
def test_nothing_is_left_on_failure(tmp_path: Path, error: BaseException, old: str | None) -> None:
    target = tmp_path / "state.json"
    if old is not None:
        target.write_text(old)
    with pytest.raises(type(error)) as caught, replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert names(tmp_path) == ([] if old is None else ["state.json"])
    if old is not None:
        assert target.read_text() == old


def test_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"state\.json"), replacing(target) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["state.json"]
    assert names(target) == ["inside"]


def test_writers_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    # the outer block ends last
    assert target.read_text() == "first"
    assert names(tmp_path) == ["state.json"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "ordinary").write_text("x")
        with replacing(tmp_path / "replaced") as temporary:
            temporary.write_text("x")
        now = os.umask(umask)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "replaced")]
    assert modes[0] == modes[1] == 0o666 & ~umask
    assert now == umask


def test_string_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing("plain.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "plain.txt").read_text() == "x"


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "state.json"):
        pytest.fail("the block must not run")


def test_folder_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_folder(target) as temporary:
        (temporary / "a.txt").write_text("new")
        assert temporary.parent == target.parent and not target.exists()
        # nobody else looks into it meanwhile
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert names(target.parent) == ["new"] and (target / "a.txt").read_text() == "new"
    (tmp_path / "other").mkdir()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["ValueError", "KeyboardInterrupt"])
def test_no_folder_on_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "new") as temporary:
        (temporary / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_folder_that_is_there_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="there' exists already"), new_folder(target):
        pytest.fail("nothing should be written")
    assert names(tmp_path) == ["there"]


def test_private_until_it_is_done(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.nii.gz") as file, new_folder(tmp_path / "folder") as folder:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    path = tmp_path / "a[1].nii.gz"
    others = [".a1-abc_1234.nii.gz", ".a[1]-abc.nii.gz", "a[1]-abc_1234.nii.gz", ".a[1]-abc_1234.nii"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(path) as temporary:
        kept = tmp_path / "copy"
        kept.write_bytes(b"half")
    # as if the process had been killed
    kept.rename(temporary)
    with replacing(path):
        pass
    assert temporary.exists()
    with replacing(path, alone=True):
        pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, path.name])
