# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``monai-sacb``, or ``python -m monai_sacb``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import fire

from monai_sacb.apps.bundle_copy import bundle
from monai_sacb.data import convert_pickled_folder
from monai_sacb.version import __version__

__all__ = ["main"]


COMMANDS: dict[str, Callable[..., str]] = {"bundle": bundle, "convert_dataset": convert_pickled_folder}


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what fire would find only after the work is done, or take for something else."""
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"unknown command '{name}'; there is: {', '.join(COMMANDS)}.")
    parameters = inspect.signature(COMMANDS[name]).parameters
    options = ", ".join(f"--{parameter}" for parameter in parameters)
    given: set[str] = set()
    while rest:
        flag, equals, _ = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument '{flag}' of '{name}'; there is: {options}.")
        option = flag[2:].replace("-", "_")
        if option not in parameters:
            raise ValueError(f"unknown option '{flag}' of '{name}'; there is: {options}.")
        if option in given:
            raise ValueError(f"option '{flag}' of '{name}' is given twice.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"option '{flag}' of '{name}' needs a value.")
            rest.pop(0)
        given.add(option)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"'{name}' needs --{' and --'.join(missing)}.")


def _quoted(arguments: Sequence[str]) -> list[str]:
    """The arguments with values as Python strings: a folder called 2024_01 is no number to fire."""
    quoted = [arguments[0]]
    for argument in arguments[1:]:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            quoted.append(repr(argument))
        else:
            quoted.append(f"{flag}={value!r}" if equals else flag)
    return quoted


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A mistake ends in one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        sys.stdout.write(f"monai-sacb {__version__}\n")
        return
    try:
        if not arguments or "--help" in arguments or "-h" in arguments:
            fire.Fire(COMMANDS, command=[a for a in arguments if a in COMMANDS] + ["--help"], name="monai-sacb")
            return
        _check_arguments(arguments)
        fire.Fire(COMMANDS, command=_quoted(arguments), name="monai-sacb")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"monai-sacb: {error}\n")
        sys.exit(2)
