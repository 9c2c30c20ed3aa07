# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What memory a registration takes, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping

from monai_sacb.utils import available_memory_mb

__all__ = ["check_memory", "expected_memory_mb"]


def expected_memory_mb(
    costs: Mapping[str, float], native: int, working: int, network: bool, refine: int, fine: int = 0
) -> float:
    """
    Memory that the process will have taken at its peak, in MB.

    Args:
        costs: the numbers ``costs`` of ``register.json``.
        native: voxels of both images as they come.
        working: voxels of the working grid.
        network: whether there is one.
        refine: steps of the refinement.
        fine: voxels of the finer grid that the refinement ends on; 0 where it does not.
    """
    refined = max(working if refine else 0, fine)
    compute = max(costs["network_mb_per_million"] * working * network, costs["refinement_mb_per_million"] * refined)
    # the field is found before anything is made at the images' own size
    found = costs["reading_mb_per_million"] * native + compute
    written = costs["native_mb_per_million"] * native + costs["field_mb_per_million"] * max(working, fine)
    return costs["base_mb"] + max(found, written) / 1e6


def check_memory(expected: float) -> None:
    """
    Refuse what would not fit, before the system ends the process without a word.

    Args:
        expected: memory of the whole process at its peak, in MB.

    Raises:
        ValueError: When that is more than the process may have.
    """
    available = available_memory_mb()
    if available is not None and expected > available:
        raise ValueError(
            f"registering these images takes about {expected:.0f} MB of memory, and {available:.0f} MB are available; "
            "resample them to larger voxels or crop them first."
        )
