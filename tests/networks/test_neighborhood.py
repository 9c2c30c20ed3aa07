# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_sacb.networks.layers.neighborhood import window_mean


@pytest.mark.parametrize("library", [True, False], ids=["oneDNN", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 7, 5), (2, 3, 4, 6, 5), (1, 1, 1, 3, 2), (2, 20, 3, 4, 3)])
def test_window_mean(shape: tuple[int, ...], dtype: torch.dtype, library: bool, relative_error) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = (1, 1) + (3,) * (len(shape) - 2)
    expected = ndimage.uniform_filter(x.double().numpy(), size, mode="constant")
    with torch.backends.mkldnn.flags(enabled=library), torch.autocast("cpu", torch.bfloat16):
        for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            y = window_mean(layout)
            assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert relative_error(y, expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert np.abs(expected).max() > 0.1
