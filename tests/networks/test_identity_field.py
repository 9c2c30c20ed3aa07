# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai.networks.blocks import Warp

from monai_sacb.networks.nets import IdentityField


@pytest.mark.parametrize("shape", [(1, 2, 5, 6), (2, 2, 5, 6, 7), (3, 4, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = torch.rand(shape, dtype=dtype)
    network = IdentityField()
    ddf = network(pair)
    assert ddf.shape == (shape[0], len(shape) - 2, *shape[2:]) and ddf.dtype == dtype
    moving = pair.chunk(2, 1)[0]
    assert torch.allclose(Warp()(moving, ddf), moving, atol=1e-5)
    assert network.state_dict() == {}
    assert torch.equal(torch.jit.script(network)(pair), ddf)
