# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a network has looked at: the clusters of its blocks, on the grid of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from monai_sacb.networks.nets import SACBNet

__all__ = ["CLUSTER_LEVELS", "ClusterRecorder", "cluster_labels"]

# levels with a block, finest first; level l has voxels of 2^(l - 1) voxels of the image
CLUSTER_LEVELS = (2, 3, 4, 5)


def _registration_network(network: nn.Module) -> SACBNet | None:
    """The network itself, or the one in a module around it, where it has as many levels as the paper's."""
    found = next((module for module in network.modules() if isinstance(module, SACBNet)), None)
    return found if found is not None and len(found.estimators) == len(CLUSTER_LEVELS) else None


class ClusterRecorder:
    """
    Keep the clusters of all blocks of a network while a block of code runs.

    Args:
        network: a :py:class:`monai_sacb.networks.nets.SACBNet`, or a module around one.

    Raises:
        ValueError: When there is no ``SACBNet``, or not one of five levels.
    """

    def __init__(self, network: nn.Module) -> None:
        found = _registration_network(network)
        if found is None:
            raise ValueError(
                f"clusters are those of a SACBNet with {1 + len(CLUSTER_LEVELS)} levels, got {type(network).__name__}."
            )
        self._network = found
        # the coarsest level works first
        self._blocks: list[Any] = [estimator.sacb for estimator in reversed(found.estimators)]
        self._labels: list[list[torch.Tensor]] = [[] for _ in self._blocks]
        self._hooks: list[Any] = []

    @staticmethod
    def fits(network: nn.Module) -> bool:
        """Whether there is something to record in this network."""
        return _registration_network(network) is not None

    def __enter__(self) -> ClusterRecorder:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Forget what has been recorded, and record from now on."""
        self.stop()
        for labels, block in zip(self._labels, self._blocks):
            labels.clear()

            def keep(_: nn.Module, __: Any, result: tuple[torch.Tensor, ...], kept: list = labels) -> None:
                kept.append(result[0].detach())

            # looked up now: another clusterer may have been assigned since
            self._hooks.append(block.clusterer.register_forward_hook(keep))

    def stop(self) -> None:
        """Record no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def maps(self, spatial: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The clusters of the last forward pass.

        Args:
            spatial: size of the images that the network has been given.

        Returns:
            as :py:func:`cluster_labels`.

        Raises:
            ValueError: When nothing has been recorded.
        """
        padded = [self._network.padded_size(size) for size in spatial]
        maps: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for level, labels in zip(CLUSTER_LEVELS, self._labels):
            if len(labels) < 2:
                raise ValueError("no clusters have been recorded: the network has not run, or not in Python.")
            # every block has seen the fixed image first
            for found, label in zip(maps, (labels[-1], labels[-2])):
                step = 2 ** (level - 1)
                label = label.view(len(label), *(size // step for size in padded)) + 1
                for axis, size in enumerate(spatial, start=1):
                    label = label.repeat_interleave(step, axis).narrow(axis, 0, size)
                found.append(label)
        moving, fixed = (torch.stack(found, 1).to(torch.int16) for found in maps)
        return moving, fixed


def cluster_labels(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The regions that a network has divided two images into, by the clusters of its blocks.

    Numbers are arbitrary: those of one level have nothing to do with those of another, nor with those of the other
    image. From coarse to fine, the blocks of the levels 4 to 2 see the moving image as the levels before have warped
    it; that of level 5 sees it as it is. Of a network of several passes they are those of the last one, which sees the
    moving image as the passes before have warped it.

    Args:
        network: a :py:class:`monai_sacb.networks.nets.SACBNet`.
        images: ``(B, 2 * C, *spatial)``, the moving image's channels before the fixed image's.

    Returns:
        labels from 1, ``(B, 4, *spatial)``, int16, one channel for each of the levels 2, 3, 4 and 5, every voxel with
        the label of the coarser voxel that holds it: those of the moving image, of which the levels 2 to 4 lie on the
        grid of the fixed image and level 5 on its own; and those of the fixed image, on its grid.

    Raises:
        ValueError: When the network has no such blocks.
    """
    with torch.no_grad(), ClusterRecorder(network) as recorder:
        network(images)
    return recorder.maps(images.shape[2:])
