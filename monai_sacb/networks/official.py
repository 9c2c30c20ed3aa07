# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints of the method's original implementation."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import compare_states, read_checkpoint

__all__ = ["load_official_checkpoint"]

# original name -> ours; the SACB blocks follow from _BLOCK and _BLOCK_PARTS
_PREFIXES = {
    "encoder.conv0.0.": "encoder.levels.0.0.",
    "encoder.conv0.1.": "encoder.levels.0.1.",
    "encoder.conv0.2.": "encoder.levels.0.2.",
    **{f"encoder.conv{level}.{i}.": f"encoder.levels.{level}.{i}." for level in (1, 2, 3, 4) for i in (1, 2)},
    "conv1.1.": "finest_estimator.refine.0.",
    "conv1.2.": "finest_estimator.refine.1.",
    "conv1_out.1.": "finest_estimator.flow.0.",
    "conv1_out.2.": "finest_estimator.flow.1.",
    "conv1_out.3.": "finest_estimator.flow.2.",
}
_BLOCK = re.compile(r"sacb_proj([2-5])\.(w$|get_kernel\.|get_bias\.|proj_in\.)(.*)")
_BLOCK_PARTS = {"w": "weight", "get_kernel.": "gate_mlp.", "get_bias.": "bias_mlp.", "proj_in.": "proj_in."}
# voxel coordinates of the one image size that the original was built for
_GRIDS = re.compile(r"transformer\.\d+\.grid$")


def _translate(name: str) -> str | None:
    """Our name of an original parameter, or None where it has none."""
    block = _BLOCK.match(name)
    if block:
        level, part, rest = block.groups()
        # our estimators are listed coarsest first
        return f"estimators.{5 - int(level)}.sacb.{_BLOCK_PARTS[part]}{rest}"
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return None


def _numpy_scalar_globals() -> list[Any]:
    """What a pickled NumPy scalar (a best Dice, say) needs to be read without running code from the file."""
    # NumPy 2 has moved it
    core = "numpy._core" if int(np.__version__.split(".")[0]) >= 2 else "numpy.core"
    scalar = importlib.import_module(f"{core}.multiarray").scalar
    names = {f"{module}.multiarray.scalar" for module in ("numpy.core", "numpy._core")}
    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    return [*((scalar, name) for name in sorted(names)), np.dtype, *dtypes]


def _read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(path, _numpy_scalar_globals())
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in state.items())
    ):
        raise ValueError(f"'{path}' is not a SACB-Net checkpoint: it has no 'state_dict' of tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_official_checkpoint(path: str | os.PathLike[str], num_clusters: int | Sequence[int] = 7) -> SACBNet:
    """
    Build a :py:class:`SACBNet` from a checkpoint of the method's original implementation.

    Nothing in the file is executed. The original's buffers of voxel coordinates are dropped, so that the network takes
    images of any size; widths and the number of image channels are read off the weights.

    Args:
        path: the original's ``.pth.tar`` file, a dictionary with ``state_dict`` (or the state dict itself).
        num_clusters: clusters of the blocks, which the weights do not tell; see :py:class:`SACBNet`.

    Returns:
        the network, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is not such a checkpoint, or is one of the original's other block variant.
    """
    state = _read(path)
    for name, value in state.items():
        if re.match(r"sacb_proj\d\.proj_in\.conv\.weight$", name) and set(value.shape[2:]) == {1}:
            raise ValueError(
                f"'{path}' belongs to the other block variant of the original implementation: its {name} is a 1x1x1 "
                "convolution, this network's is 3x3x3. It cannot be loaded."
            )
    renamed: dict[str, torch.Tensor] = {}
    foreign = []
    for name, value in state.items():
        if _GRIDS.match(name):
            continue
        ours = _translate(name)
        if ours is None:
            foreign.append(name)
        else:
            renamed[ours] = value
    first = renamed.get("encoder.levels.0.0.conv.weight")
    if foreign or first is None or first.dim() != 5:
        what = f"unknown parameter '{foreign[0]}'" if foreign else "no encoder.conv0.0.conv.weight of a 3-D convolution"
        raise ValueError(f"'{path}' is not a SACB-Net checkpoint in the original layout: {what}.")
    net = SACBNet(spatial_dims=3, in_channels=first.shape[1], base_channels=first.shape[0], num_clusters=num_clusters)
    difference = compare_states(dict(net.named_parameters()), renamed)
    if difference is not None:
        raise ValueError(f"'{path}' is not a complete SACB-Net checkpoint in the original layout: {difference}.")
    net.load_state_dict(renamed)
    return net.eval()
