# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_pair import Pair

import monai_sacb
from monai_sacb.apps import cli, registration
from monai_sacb.apps.cli import _surely_interrupted, main
from monai_sacb.data import read_volume, write_volume
from monai_sacb.utils import bundle_source

# what is typed, and what the one line on stderr must name
MISTAKES = {
    "unknown command": (["regster"], r"regster"),
    "unknown command with options": (["regster", "--output_dir=x"], r"regster"),
    "unknown option": (["bundle", "--output_dir", "copy", "--force"], r"--force"),
    "unknown option with value": (["bundle", "--outputdir=copy"], r"--outputdir"),
    "option is a prefix of the right one": (["bundle", "--output", "copy"], r"--output\b"),
    "unknown short option": (["bundle", "--output_dir=copy", "-f"], r"-f\b"),
    "unknown option before any command": (["--verbose"], r"--verbose"),
    "argument without option": (["bundle", "copy"], r"copy"),
    "surplus argument": (["bundle", "--output_dir", "copy", "surplus"], r"surplus"),
    # fire would call the method of that name on the result
    "surplus argument that names a method": (["bundle", "--output_dir=copy", "upper"], r"upper"),
    "option twice": (["bundle", "--output_dir=copy", "--output-dir", "other"], r"--output-dir"),
    "version with more": (["--version", "surplus"], r"--version|surplus"),
    "missing argument": (["bundle"], r"output_dir"),
    "option without value": (["bundle", "--output_dir"], r"output_dir"),
    "option followed by another": (["bundle", "--output_dir", "--output_dir"], r"output_dir"),
    "conversion without folders": (["convert_dataset"], r"--input_dir and --output_dir"),
    "conversion with an unknown option": (
        ["convert_dataset", "--input_dir=a", "--output_dir=b", "--force"],
        r"--force",
    ),
    "conversion of nothing": (["convert_dataset", "--input_dir=a", "--output_dir=b"], r"'a' has no folder Train"),
    "registration of nothing": (["register"], r"register needs output_dir"),
    "registration without images": (["register", "--output_dir", "out"], r"a fixed and a moving image, or pairs"),
    "registration with an unknown option": (
        ["register", "--fixed", "a.nii", "--moving", "b.nii", "--output_dir", "out", "--fxed_label", "c.nii"],
        r"--fxed_label",
    ),
    "steps that are no number": (
        ["register", "--output_dir=out", "--refine", "many"],
        r"'--refine' must be a whole num",
    ),
    "steps that are not whole": (["register", "--output_dir=out", "--refine=1.5"], r"'--refine' must be a whole num"),
    "fill that is not finite": (
        ["register", "--output_dir=out", "--fill=nan"],
        r"'--fill' must be a number, got 'nan'",
    ),
    "neither true nor false": (
        ["register", "--output_dir=out", "--keep_dtype=2"],
        r"'--keep_dtype' must be true or fal",
    ),
    "missing image": (
        ["register", "--fixed=2024_01", "--moving=b.nii", "--output_dir=out", "--dry_run"],
        r"moving '.*b.nii' does not exist",
    ),
    "unknown model": (
        ["register", "--fixed=a.nii", "--moving=b.nii", "--output_dir=out", "--model=brian"],
        r"there is no model 'brian'",
    ),
    "missing pairs": (["register", "--pairs=p.csv", "--output_dir=out"], r"cannot read pairs 'p.csv': No such file"),
    "apply of nothing": (["apply", "--transform=out"], r"needs --input and --output"),
    "apply of a missing image": (
        ["apply", "--transform=out", "--input=a.nii", "--output=b.nii.gz"],
        r"input 'a.nii' does not exist",
    ),
    "report of nothing": (["report", "--output_dir=out"], r"out"),
    "evaluation of nothing": (["evaluate", "--transform=out"], r"evaluate needs fixed_label and moving_label"),
    "conversion of no field": (["convert", "--input=a.h5", "--output=b.nii.gz"], r"a.h5"),
    "information about something": (["info", "--verbose"], r"--verbose"),
    "empty name": (["bundle", "--output_dir="], r"option '--output_dir' is empty"),
}


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code is None or isinstance(stop.code, int)
        return stop.code or 0
    return 0


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    output = capsys.readouterr()
    assert output.out == f"monai-sacb {monai_sacb.__version__}\n"
    assert output.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["bundle", "--output_dir", "copy"],
        ["bundle", "--output_dir=copy"],
        ["bundle", "--output-dir", "copy"],
    ],
    ids=" ".join,
)
def test_bundle_is_copied(capsys: pytest.CaptureFixture[str], own_folder: Path, arguments: list[str]) -> None:
    assert exit_code(arguments) == 0
    output = capsys.readouterr()
    assert output.out == "copy\n"
    assert output.err == ""
    source = bundle_source()
    copy = files(own_folder / "copy")
    assert copy
    for name in ("LICENSE", *(f"configs/{n}.json" for n in ("train", "evaluate", "inference", "metadata"))):
        assert copy[os.path.normpath(name)] == (source / name).read_bytes()
    assert {n for n in files(source) if n.startswith("configs")} == {n for n in copy if n.startswith("configs")}


def test_conversion(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    (own_folder / "2024" / "Train").mkdir(parents=True)
    for i in range(2):
        volumes = np.full((3, 4, 5), i, np.float32), np.full((3, 4, 5), 7 * i, np.int64)
        (own_folder / "2024" / "Train" / f"{i}.pkl").write_bytes(pickle.dumps(volumes))
    assert exit_code(["convert_dataset", "--input_dir", "2024", "--output_dir", "2025"]) == 0
    assert capsys.readouterr().out == "2025\n"
    assert set(files(own_folder / "2025")) == {
        "dataset.json",
        *(f"{key}sTr/{i}.nii.gz" for key in ("image", "label") for i in range(2)),
    }


NAMES = [
    "2026",
    "2026.10",
    "1e3",
    "007",
    "0x10",
    "None",
    "True",
    "a,b",
    "[a]",
    "run-1",
    "a b",
    "a=b",
    "it's",
    '"',
    "-x",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
def test_target_is_taken_literally(own_folder: Path, name: str, joined: bool) -> None:
    assert exit_code(["bundle", *([f"--output_dir={name}"] if joined else ["--output_dir", name])]) == 0
    assert os.listdir(own_folder) == [name]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], own_folder: Path, arguments: list[str], named: str
) -> None:
    assert exit_code(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("monai-sacb: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n"), output.err
    assert re.search(named, output.err)
    # refused before anything is done
    assert os.listdir(own_folder) == []


@pytest.mark.parametrize("target", ["there", "there/below"])
def test_target_that_cannot_be_made(capsys: pytest.CaptureFixture[str], own_folder: Path, target: str) -> None:
    (own_folder / "there").write_text("mine")
    assert exit_code(["bundle", "--output_dir", target]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("monai-sacb: ") and output.err.count("\n") == 1 and "there" in output.err
    assert (own_folder / "there").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [["bundle", "--help"], ["bundle", "-h"], ["bundle", "--output_dir", "copy", "--help"]], ids=" ".join
)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], own_folder: Path, arguments: list[str]) -> None:
    assert exit_code(arguments) == 0
    output = capsys.readouterr()
    text = output.out + output.err
    assert "output_dir" in text.lower() and "must not exist yet" in text
    assert os.listdir(own_folder) == []


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_holds_what_the_docstring_says_of_each_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert exit_code([command.replace("_", "-"), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    function = cli.COMMANDS[command]
    said = (inspect.getdoc(function) or "").replace("``", "'")
    for name, parameter in inspect.signature(function).parameters.items():
        found = re.search(rf"\n    {name}: (.*(?:\n {{8}}.*)*)", said)
        assert found is not None
        text = " ".join(found[1].split())
        note = r" \(needed\)" if parameter.default is parameter.empty else r"( \(default: \S+\))?"
        assert re.search(rf"--{name} (VALUE|\[true\|false\]){note} {re.escape(text)}", shown), name
    assert said.splitlines()[0] in shown and "Raises:" not in shown and "Returns:" not in shown


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_names_no_form_that_is_refused(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert exit_code([command, "--help"]) == 0
    shown = capsys.readouterr().out
    parameters = inspect.signature(cli.COMMANDS[command]).parameters
    # neither short options nor arguments by position
    options = re.findall(r"^ *(-\S+)", shown, re.MULTILINE)
    assert options == [f"--{name}" for name in parameters]
    assert "POSITIONAL" not in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "--help", "-h"])
def test_commands_are_listed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert exit_code(arguments) == 0
    output = capsys.readouterr()
    text = output.out + output.err
    assert "monai-sacb" in text and "bundle" in text and "MONAI bundle that came with the package" in text


def test_arguments_default_to_those_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["monai-sacb", "--version"])
    main()
    assert capsys.readouterr().out == f"monai-sacb {monai_sacb.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--fixed", "2024_01", "--refine", "007", "--fill", "-1000"],
            {"fixed": "2024_01", "refine": 7, "fill": -1000.0},
        ),
        (["--keep_dtype"], {"keep_dtype": True}),
        (["--keep-dtype", "TRUE", "--dry_run=no"], {"keep_dtype": True, "dry_run": False}),
        (["--keep_dtype", "--affine", "False"], {"keep_dtype": True, "affine": "False"}),
        (["--model", "None", "--device=cpu"], {"model": "None", "device": "cpu"}),
        (["--moving=[1, 2]", "--fixed", "{'a': 1}", "--pairs", "1e3"], {"moving": "[1, 2]", "pairs": "1e3"}),
    ],
)
def test_words_become_what_the_function_takes(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    @functools.wraps(cli.register)
    def register(*values: Any, **options: Any) -> str:
        # fire passes some by position
        seen.update(inspect.signature(cli.COMMANDS["register"]).bind(*values, **options).arguments)
        return "done"

    monkeypatch.setitem(cli.COMMANDS, "register", register)
    assert exit_code(["register", "--output_dir", "out", *words]) == 0
    assert seen["output_dir"] == "out"
    for name, value in expected.items():
        assert seen[name] == value and type(seen[name]) is type(value)


def pair_arguments(pair: Pair, output: str) -> list[str]:
    return ["register", f"--fixed={pair.fixed}", f"--moving={pair.moving}", "--affine=False", f"--output_dir={output}"]


@pytest.mark.parametrize(("verdict", "code"), [("good", 0), ("check", 0), ("failed", 3)])
def test_verdict_is_the_exit_code(
    quick_report: None,
    pair: Pair,
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verdict: str,
    code: int,
) -> None:
    monkeypatch.setattr(registration, "judge_registration", lambda *_: (verdict, ["For this reason."]))
    assert exit_code([*pair_arguments(pair, "2024_01"), "--refine=1"]) == code
    output = capsys.readouterr()
    assert output.out.startswith(f"verdict: {verdict}\n  For this reason.\n")
    assert "results: 2024_01" in output.out
    assert (own_folder / "2024_01" / "warped.nii.gz").is_file()


def test_many_pairs_end_with_a_table(
    quick_report: None, pair: Pair, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "pairs.csv").write_text(f"fixed,moving\n{pair.fixed},{pair.moving}\n{pair.fixed},gone.nii\n")
    assert exit_code(["register", "--pairs=pairs.csv", "--output_dir=out", "--affine=false", "--refine=1"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["output", "verdict"]
    assert lines[1].startswith("moving_to_fixed  ") and lines[2].startswith("gone_to_fixed")
    assert "gone.nii' does not exist" in lines[2]


def test_plan_is_printed(pair: Pair, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([*pair_arguments(pair, "out"), "--dry_run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"expected_seconds", "expected_memory_mb", "working_grid"} <= plan.keys()
    assert os.listdir(own_folder) == []


def test_information(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["info"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["monai-sacb"] == monai_sacb.__version__
    assert "cpu" in found["devices"] and "none" in found["models"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupted", "terminated"])
def test_interrupted_registration_leaves_nothing(pair: Pair, own_folder: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "monai_sacb", *pair_arguments(pair, "out"), "--refine=100000"],
        cwd=own_folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    # the work has begun when its temporary folder is there
    while not os.listdir(own_folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "monai-sacb: interrupted; nothing is left half-written."
    assert os.listdir(own_folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupted", "terminated"])
def test_interruption_within_a_callback_is_not_lost(number: int) -> None:
    class Thing:
        pass

    with pytest.raises(KeyboardInterrupt), _surely_interrupted():
        thing = Thing()
        # Python drops what is raised in such a callback
        reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
        assert reference() is None
        time.sleep(10)


def test_interruption_at_the_very_end_is_not_lost() -> None:
    class Thing:
        pass

    before = sys.unraisablehook, signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _surely_interrupted():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        assert reference() is None
    time.sleep(0.2)
    assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == before


def test_other_errors_in_a_callback_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(dropped.exc_type))

    class Thing:
        def __del__(self) -> None:
            raise ValueError("dropped")

    with _surely_interrupted():
        Thing()
    assert reported == [ValueError]


@pytest.mark.parametrize("name", ["t.h5", "t.mha", "t.nrrd", "t.nii"])
def test_truncated_file_is_one_line(
    pair: Pair, registered: Path, own_folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "t.h5":
        content = (registered / "transform.h5").read_bytes()
    else:
        write_volume(read_volume(pair.moving), own_folder / name)
        content = (own_folder / name).read_bytes()
    (own_folder / name).write_bytes(content[: len(content) // 2])
    transform, image = (name, pair.moving) if name == "t.h5" else (str(registered), name)
    arguments = ["--transform", transform, "--input", image, "--reference", pair.fixed, "--output", "out.nii.gz"]
    assert exit_code(["apply", *arguments]) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith("monai-sacb: ") and output.err.count("\n") == 1, output.err
    assert name in output.err
    assert os.listdir(own_folder) == [name]


def test_home_is_expanded(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_folder))
    assert exit_code(["bundle", "--output_dir=~/copy"]) == 0
    assert (own_folder / "copy" / "configs" / "inference.json").is_file()


def test_module_runs(own_folder: Path) -> None:
    (own_folder / "there").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "monai_sacb", "bundle", "--output_dir", "there"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "monai-sacb: 'there' exists already."
