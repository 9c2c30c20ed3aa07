# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``monai-sacb``, or ``python -m monai_sacb``."""

from __future__ import annotations

import _thread
import inspect
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import fire

from monai_sacb.apps.applying import apply
from monai_sacb.apps.atlas_bundle import label_bundle
from monai_sacb.apps.bundle_copy import bundle
from monai_sacb.apps.convert_field import convert
from monai_sacb.apps.evaluating import Evaluation, evaluate
from monai_sacb.apps.exporting import export
from monai_sacb.apps.information import info
from monai_sacb.apps.registering import PairsResult, register
from monai_sacb.apps.registration import RegistrationResult
from monai_sacb.apps.reporting import report
from monai_sacb.data import convert_pickled_folder
from monai_sacb.utils import json_text, sentence
from monai_sacb.version import __version__

__all__ = ["main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    "register": register,
    "apply": apply,
    "evaluate": evaluate,
    "report": report,
    "convert": convert,
    "info": info,
    "bundle": bundle,
    "export": export,
    "label_bundle": label_bundle,
    "convert_dataset": convert_pickled_folder,
}
# exit codes
BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
# seconds
RESENT_AFTER = 0.05
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _command(word: str) -> str:
    """The command that a word is, also with hyphens; any other word as it is."""
    name = word.replace("-", "_")
    return name if name in COMMANDS else word


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def _converted(option: str, kind: Any, value: str) -> Any:
    """What a word stands for; paths and names stay text: a folder called 2024_01 is no number."""
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        if value.lower() not in BOOLEANS:
            raise ValueError(f"option '--{option}' must be true or false, got '{value}'.")
        return BOOLEANS[value.lower()]
    number = next((k for k in (int, float) if k in kinds), None)
    if number is None:
        if not value.strip():
            raise ValueError(f"option '--{option}' is empty.")
        # a shell expands it at the start of a word only
        return os.path.expanduser(value)
    try:
        converted = number(value)
    except ValueError:
        converted = math.nan
    if not math.isfinite(converted):
        raise ValueError(f"option '--{option}' must be a {'whole ' if number is int else ''}number, got '{value}'.")
    return converted


def _parsed(arguments: Sequence[str]) -> list[str]:
    """
    The arguments as fire takes them for Python values of the right types.

    Refuses what fire would find only after the work is done, or take for something else.
    """
    name, *rest = arguments
    # as options, commands may be written with hyphens
    name = _command(name)
    if name not in COMMANDS:
        raise ValueError(f"unknown command '{name}'; there is: {', '.join(COMMANDS)}.")
    parameters = inspect.signature(COMMANDS[name]).parameters
    kinds = get_type_hints(COMMANDS[name])
    options = ", ".join(f"--{parameter}" for parameter in parameters)
    given: dict[str, Any] = {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not _is_flag(flag):
            raise ValueError(f"unexpected argument '{flag}' of '{name}'; there is: {options}.")
        option = flag[2:].replace("-", "_")
        if option not in parameters:
            raise ValueError(f"unknown option '{flag}' of '{name}'; there is: {options or 'none'}.")
        if option in given:
            raise ValueError(f"option '{flag}' of '{name}' is given twice.")
        if not equals:
            if rest and not _is_flag(rest[0]):
                value = rest.pop(0)
            elif kinds[option] is bool:
                value = "true"
            else:
                raise ValueError(f"option '{flag}' of '{name}' needs a value.")
        given[option] = _converted(option, kinds[option], value)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"'{name}' needs --{' and --'.join(missing)}.")
    return [name, *(f"--{option}={value!r}" for option, value in given.items())]


def _help(name: str | None) -> str:
    """
    What there is to say of a command, by its docstring, or of all of them.

    Not fire's own: that offers short options and arguments by position, which are refused, and cuts texts off.
    """
    if name is None:
        listed = [f"  {command}\n      {_paragraphs(function)[0]}" for command, function in COMMANDS.items()]
        commands = "\n".join(listed)
        usage, more = "usage: monai-sacb COMMAND --OPTION VALUE ...", "monai-sacb COMMAND --help lists its options."
        return f"{usage}\n\n{commands}\n\n{more}"
    function = COMMANDS[name]
    paragraphs = _paragraphs(function)
    # of an option, a line with its name and perhaps others that are indented more
    described = next((re.split(r"\n {4}(?=\w)", part)[1:] for part in paragraphs if part.startswith("Args:")), [])
    texts = dict(text.split(": ", 1) for text in described)
    parameters, kinds = inspect.signature(function).parameters, get_type_hints(function)
    options = []
    for option, parameter in parameters.items():
        value = "[true|false]" if kinds[option] is bool else "VALUE"
        note = " (needed)" if parameter.default is parameter.empty else ""
        if parameter.default not in (parameter.empty, None):
            note = f" (default: {str(parameter.default).lower()})"
        options.append(f"  --{option} {value}{note}\n      " + re.sub(r"\n +", "\n      ", texts[option]))
    about = [part for part in paragraphs if not re.match(r"\w+:\n", part)]
    return "\n\n".join([f"usage: monai-sacb {name}{' --OPTION VALUE ...' * bool(options)}", *about, *options])


def _paragraphs(function: Callable[..., Any]) -> list[str]:
    """The docstring of a function, for the eye."""
    return (inspect.getdoc(function) or "").replace("``", "'").split("\n\n")


def _shown(result: Any) -> str:
    """What the command line prints of a result."""
    if isinstance(result, RegistrationResult):
        similarity, dice = result.metrics["similarity"], result.metrics.get("dice")
        lines = [f"verdict: {result.verdict}", *(f"  {reason}" for reason in result.reasons)]
        lines.append(f"similarity: {similarity['before']:.3f} before, {similarity['after']:.3f} after")
        if dice and dice["after"]["mean"] is not None:
            lines.append(f"Dice: {dice['before']['mean']:.3f} before, {dice['after']['mean']:.3f} after")
        lines += [f"folds: {result.metrics['folds_percent']:.4f} %", f"results: {result.output_dir}"]
        return "\n".join(lines)
    if isinstance(result, (PairsResult, Evaluation)):
        return result.table()
    return json_text(result) if isinstance(result, Mapping) else str(result)


def _exit_code(result: Any) -> int:
    if isinstance(result, PairsResult):
        return {"error": BAD_INPUT, "failed": FAILED}.get(result.verdict, 0)
    return FAILED if isinstance(result, RegistrationResult) and result.verdict == "failed" else 0


def _say(text: str) -> None:
    # a process may have no stdout
    if sys.stdout is not None:
        sys.stdout.write(f"{text}\n")


def _complain(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"monai-sacb: {text}\n")


@contextmanager
def _surely_interrupted() -> Iterator[None]:
    """
    Clean up when a scheduler ends the process, too, and whenever the signal comes.

    An exception that is raised inside a callback from C, as of a weak reference, is reported and dropped there; an
    interruption among them is sent once more, a little later.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    report = sys.unraisablehook
    sent: list[threading.Timer] = []

    def send() -> None:
        # SIGINT may be ignored, as in the background of a shell; the handler of SIGTERM is our own
        if os.name == "posix":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            _thread.interrupt_main(signal.SIGTERM)

    def unraisable(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            report(dropped)
            return
        sent.append(threading.Timer(RESENT_AFTER, send))
        sent[-1].daemon = True
        sent[-1].start()

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        # not the main thread: signals are somebody else's
        yield
        return
    sys.unraisablehook = unraisable
    try:
        yield
        if sent:
            # it came when the work was just done
            raise KeyboardInterrupt
    finally:
        for timer in sent:
            timer.cancel()
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line.

    Exit codes: 0 done, 2 bad input or usage with one line on stderr, 3 registered but the verdict is failed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        _say(f"monai-sacb {__version__}")
        return
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # what matters of its remarks on headers is said in one sentence
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
    try:
        if not arguments or "--help" in arguments or "-h" in arguments:
            commands = [name for name in map(_command, arguments) if name in COMMANDS]
            _say(_help(commands[0] if commands else None))
            return
        with _surely_interrupted():
            result = fire.Fire(COMMANDS, command=_parsed(arguments), name="monai-sacb", serialize=_shown)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        _complain(sentence(error))
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        _complain("interrupted; nothing is left half-written.")
        sys.exit(INTERRUPTED)
    code = _exit_code(result)
    if code:
        sys.exit(code)
