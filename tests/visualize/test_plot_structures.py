# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from monai_sacb.visualize import plot_structures

NAN, INF = float("nan"), float("inf")


def test_boxes_are_where_the_quartiles_are(tmp_path: Path) -> None:
    before = np.array([[0.1, 0.5], [0.2, NAN], [0.3, INF], [0.4, 0.7], [0.5, 0.6]])
    figure = plot_structures(before, before + 0.2, ["left", "right"], "val_dice")
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["left", "right"]
    assert ax.get_xlabel() == "val_dice" and ax.yaxis_inverted()
    spans = [patch.get_path().get_extents() for patch in ax.patches]
    # two structures before, then two after; values that are not finite do not count
    assert [(s.x0, s.x1) for s in spans] == [
        pytest.approx(span) for span in ((0.2, 0.4), (0.55, 0.65), (0.4, 0.6), (0.75, 0.85))
    ]
    assert spans[0].y1 < spans[2].y0 and spans[2].y1 < spans[1].y0
    assert pyplot.get_fignums() == []
    figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(("pairs", "names"), [(0, ["a"]), (1, ["a", "b", "c"]), (30, [str(i) for i in range(83)])])
def test_sizes(pairs: int, names: list[str], tmp_path: Path) -> None:
    values = np.full((pairs, len(names)), 0.5)
    figure = plot_structures(values, values, names)
    figure.savefig(tmp_path / "figure.png")
    assert len(figure.axes[0].get_yticklabels()) == len(names)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (3, 2)])
def test_ill_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(pairs, 2 structures\), got \(4, 2\) and"):
        plot_structures(np.zeros((4, 2)), np.zeros(shape), ["a", "b"])
