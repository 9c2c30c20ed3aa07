# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_sacb.visualize import plot_clusters


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 8)])
def test_every_panel_shows_its_level(shape: tuple[int, ...]) -> None:
    fixed = torch.rand(shape)
    clusters = torch.stack([torch.randint(1, level + 1, shape) for level in (2, 3, 4, 25)])
    moving_clusters = clusters.flip(1)
    figure = plot_clusters(fixed.flip(0), fixed, moving_clusters, clusters, "one on other")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:5] == ["fixed", "level 2", "level 3", "level 4", "level 5"]
    assert titles[5:] == ["moving", "level 2, warped", "level 3, warped", "level 4, warped", "level 5"]
    middle = (..., shape[2] // 2) if len(shape) == 3 else (...,)
    for offset, maps in ((1, clusters), (6, moving_clusters)):
        for i in range(4):
            shown = np.asarray(figure.axes[offset + i].images[0].get_array())
            assert np.array_equal(shown, ((maps[i] - 1) % 20).numpy()[middle].T)


@pytest.mark.parametrize("change", ["moving", "clusters", "levels", "dims"])
def test_ill_formed(change: str) -> None:
    shape = (4,) if change == "dims" else (6, 5)
    moving, clusters = torch.rand(shape), torch.ones(3 if change == "levels" else 4, *shape)
    fixed = torch.rand(6, 4) if change == "moving" else torch.rand(shape)
    with pytest.raises(ValueError, match="must be of one 2-D or 3-D grid, with 4 levels"):
        plot_clusters(moving, fixed, clusters[:, :-1] if change == "clusters" else clusters, clusters)
