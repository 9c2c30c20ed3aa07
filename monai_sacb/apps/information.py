# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``info``: what is installed, what it can run on, and which models came along."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from monai_sacb.networks import available_models
from monai_sacb.utils import bundle_source
from monai_sacb.version import __version__

__all__ = ["info"]

PACKAGES = ("monai", "torch", "numpy", "itk", "nibabel", "pytorch-ignite")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """
    Versions, devices and models.

    Returns:
        the versions of this package and of those it works with, the devices that can be named, and the models that
        ``register`` finds by name.
    """
    devices = ["cpu"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            "monai-sacb": __version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "devices": devices,
        "threads": torch.get_num_threads(),
        "models": [*available_models(), "none"],
        "bundle": str(bundle_source()),
    }
