# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``monai-sacb``, or ``python -m monai_sacb``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import fire

from monai_sacb.version import __version__

__all__ = ["main"]


def _bundle(output_dir: str) -> str:
    """Write a copy of the MONAI bundle that came with the package.

    Args:
        output_dir: the new folder; it must not exist yet.
    """
    # imported here: the command line answers without the seconds that MONAI takes to import
    from monai_sacb.apps.bundle import bundle

    return bundle(str(output_dir))


COMMANDS: dict[str, Callable[..., str]] = {"bundle": _bundle}


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what fire would find only after the work is done: unknown commands and flags."""
    if not arguments or arguments[0].startswith("-"):
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"unknown command '{name}'; there is: {', '.join(COMMANDS)}.")
    known = set(inspect.signature(COMMANDS[name]).parameters)
    for argument in rest:
        if argument == "--":
            return
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--help" and flag[2:].replace("-", "_") not in known:
            raise ValueError(f"unknown option '{flag}' of '{name}'; there is: --{', --'.join(sorted(known))}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A mistake ends in one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        sys.stdout.write(f"monai-sacb {__version__}\n")
        return
    try:
        _check_arguments(arguments)
        fire.Fire(COMMANDS, command=arguments, name="monai-sacb")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"monai-sacb: {error}\n")
        sys.exit(2)
