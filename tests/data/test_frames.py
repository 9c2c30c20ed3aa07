# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_sacb.data.frames import LPS_TO_RAS, lps_affine, turned_vectors


@pytest.mark.parametrize("spatial", [(), (4, 5), (4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    vectors = 1 + torch.rand(3, *spatial, dtype=dtype)
    turned = turned_vectors(vectors)
    assert turned.dtype == dtype
    assert torch.equal(turned, torch.stack([-vectors[0], -vectors[1], vectors[2]]))


def test_affine() -> None:
    """A place that a grid's affine gives is the same place in the other frame."""
    affine = torch.eye(4, dtype=torch.float32)
    affine[:3] = torch.rand(3, 4) + 0.5
    x, y, z, _ = affine.double().numpy() @ (3.0, 2.0, 1.0, 1.0)
    assert np.allclose(lps_affine(affine) @ (3.0, 2.0, 1.0, 1.0), (-x, -y, z, 1.0))
    assert np.array_equal(LPS_TO_RAS @ lps_affine(affine), affine.double().numpy())
