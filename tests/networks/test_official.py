# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import io
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_sacb.networks import load_official_checkpoint
from monai_sacb.networks.nets import SACBNet

State = dict[str, torch.Tensor]

# parameters of the original, none of which may be lost or swapped: prefix there, prefix here
UNITS = [
    *[(f"encoder.conv0.{i}", f"encoder.levels.0.{i}") for i in (0, 1, 2)],
    *[(f"encoder.conv{level}.{i}", f"encoder.levels.{level}.{i}") for level in (1, 2, 3, 4) for i in (1, 2)],
    ("conv1.1", "finest_estimator.refine.0"),
    ("conv1.2", "finest_estimator.refine.1"),
    *[(f"conv1_out.{i}", f"finest_estimator.flow.{i - 1}") for i in (1, 2, 3)],
    *[(f"sacb_proj{level}.proj_in", f"estimators.{i}.sacb.proj_in") for i, level in enumerate((5, 4, 3, 2))],
]
MLPS = [
    (f"sacb_proj{level}.{theirs}.{layer}", f"estimators.{i}.sacb.{ours}.{layer}")
    for i, level in enumerate((5, 4, 3, 2))
    for theirs, ours in (("get_kernel", "gate_mlp"), ("get_bias", "bias_mlp"))
    for layer in (0, 2, 4)
]


def to_original(net: SACBNet) -> State:
    """The network's parameters in the original layout, with the original's buffers of voxel coordinates."""
    ours, state = {name: p.detach() for name, p in net.named_parameters()}, OrderedDict()
    for theirs, here in UNITS:
        for part in ("weight", "bias"):
            state[f"{theirs}.conv.{part}"] = ours.pop(f"{here}.conv.{part}")
    for theirs, here in MLPS:
        for part in ("weight", "bias"):
            state[f"{theirs}.{part}"] = ours.pop(f"{here}.{part}")
    for i, level in enumerate((5, 4, 3, 2)):
        state[f"sacb_proj{level}.w"] = ours.pop(f"estimators.{i}.sacb.weight")
    if ours:
        raise RuntimeError(f"parameters without an original name: {list(ours)}")
    for i in range(4):
        state[f"transformer.{i}.grid"] = torch.zeros(1, 3, *[32 // 2**i] * 3)
    return state


@pytest.fixture(scope="module")
def net() -> SACBNet:
    torch.manual_seed(4)
    return SACBNet(base_channels=2, num_clusters=3).eval()


@pytest.fixture
def state(net: SACBNet) -> State:
    return to_original(net)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pth.tar"


def same_network(a: SACBNet, b: SACBNet) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["state_dict", "bare", "module", "ordered first", "no grids", "legacy"])
def test_loads(net: SACBNet, state: State, path: Path, layout: str) -> None:
    if layout == "module":
        state = {f"module.{name}": value for name, value in state.items()}
    if layout == "no grids":
        state = {name: value for name, value in state.items() if "grid" not in name}
    if layout == "ordered first":
        state = OrderedDict(sorted(state.items(), reverse=True))
    checkpoint = state if layout == "bare" else {"state_dict": state}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=layout != "legacy")
    loaded = load_official_checkpoint(path, num_clusters=3)
    assert same_network(loaded, net) and not loaded.training
    x = torch.rand(1, 2, 20, 40, 33, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ddf = loaded(x)
        assert torch.equal(ddf, net(x)) and ddf.abs().max() > 0.5


def test_width_channels_and_clusters(path: Path) -> None:
    torch.manual_seed(5)
    net = SACBNet(in_channels=2, base_channels=3)
    torch.save({"state_dict": to_original(net)}, path)
    loaded = load_official_checkpoint(str(path), num_clusters=(2, 3, 4, 5))
    assert same_network(loaded, net) and loaded.in_channels == 2
    assert [e.sacb.clusterer.num_clusters for e in loaded.estimators] == [5, 4, 3, 2]
    assert [e.sacb.clusterer.num_clusters for e in load_official_checkpoint(path).estimators] == [7] * 4


def test_the_original_file(shared_parity: Path) -> None:
    path = shared_parity / "sacb_net_official_layout.pth.tar"
    loaded = load_official_checkpoint(path)
    original = torch.load(path, weights_only=True)["state_dict"]
    here = to_original(loaded)
    assert set(here) == set(original)
    assert all(torch.equal(here[name], original[name]) for name in here if "grid" not in name)


def test_half_precision(net: SACBNet, state: State, path: Path) -> None:
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, path)
    loaded = load_official_checkpoint(path, num_clusters=3)
    for actual, expected in zip(loaded.parameters(), net.parameters()):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected.half().float())


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_numbers_beside_the_weights(net: SACBNet, state: State, path: Path, module: str) -> None:
    """A best Dice as NumPy scalar, as NumPy of either generation writes it."""
    extra = {"epoch": 3, "best_dsc": np.float64(0.77), "count": np.int64(4), "f": np.float32(1.5), "b": np.bool_(True)}
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)]).state_dict()
    torch.save({"state_dict": state, "optimizer": optimizer, **extra}, path)
    content = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(content, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = re.sub(rb"numpy\._?core\.multiarray", f"{module}.multiarray".encode(), data)
            target.writestr(name, data)
    path.write_bytes(content.getvalue())
    assert same_network(load_official_checkpoint(path, num_clusters=3), net)


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"checkpoint '{path}' does not exist")):
        load_official_checkpoint(path)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load_official_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"PK\x03\x04nothing", b"\x80\x02garbage", bytes(range(256)) * 20, b"}q\x00.", b"\n\n\n"],
)
def test_garbage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is not a readable checkpoint of tensors and numbers")):
        load_official_checkpoint(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(state: State, path: Path, share: float, zipped: bool) -> None:
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is not a readable checkpoint")):
        load_official_checkpoint(path)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_the_file_is_executed(state: State, path: Path, tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "executed"
    torch.save({"state_dict": state, "x": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is not a readable checkpoint of tensors and numbers")):
        load_official_checkpoint(path)
    assert not trace.exists()
    # the file would have done it
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_objects_beside_the_weights(state: State, path: Path) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint of tensors and numbers"):
        load_official_checkpoint(path)


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"state_dict": None}, {"state_dict": {}}, {"epoch": 3}, [1, 2], torch.zeros(3), 4.5, {"state_dict": {"a": 1}}],
)
def test_no_state_dict(path: Path, checkpoint: object) -> None:
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=re.escape(f"'{path}' is not a SACB-Net checkpoint: it has no 'state_dict'")):
        load_official_checkpoint(path)


def test_something_else(net: SACBNet, path: Path) -> None:
    torch.save(torch.nn.Conv3d(1, 4, 3).state_dict(), path)
    with pytest.raises(ValueError, match="SACB-Net checkpoint in the original layout: unknown parameter 'weight'"):
        load_official_checkpoint(path)
    # our own layout is not the original's
    torch.save({"state_dict": net.state_dict()}, path)
    with pytest.raises(ValueError, match=r"unknown parameter 'integration_steps'"):
        load_official_checkpoint(path)


def test_the_other_block_variant(state: State, path: Path) -> None:
    for level in (2, 3, 4, 5):
        weight = state[f"sacb_proj{level}.proj_in.conv.weight"]
        state[f"sacb_proj{level}.proj_in.conv.weight"] = weight[:, :, :1, :1, :1].clone()
        del state[f"sacb_proj{level}.proj_in.conv.bias"]
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    message = r"other block variant .* its sacb_proj\d\.proj_in\.conv\.weight is a 1x1x1 convolution, .* 3x3x3"
    with pytest.raises(ValueError, match=message) as caught:
        load_official_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("conv1_out.3.conv.bias", "finest_estimator.flow.2.conv.bias"),
        ("sacb_proj2.w", "estimators.3.sacb.weight"),
        ("sacb_proj5.get_kernel.4.weight", "estimators.0.sacb.gate_mlp.4.weight"),
        ("encoder.conv4.2.conv.weight", "encoder.levels.4.2.conv.weight"),
    ],
)
def test_missing_and_misshapen_parameter(state: State, path: Path, name: str, ours: str) -> None:
    value = state.pop(name)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=rf"not a complete SACB-Net .*1 parameters are missing \({re.escape(ours)}\)"):
        load_official_checkpoint(path)
    state[name] = torch.cat([value, value])
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=rf"original layout: 1 have another shape \({re.escape(ours)}\)"):
        load_official_checkpoint(path)


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2,), ()])
def test_first_convolution_of_another_dimension(state: State, path: Path, shape: tuple[int, ...]) -> None:
    state["encoder.conv0.0.conv.weight"] = torch.zeros(shape)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=r"no encoder\.conv0\.0\.conv\.weight of a 3-D convolution"):
        load_official_checkpoint(path)


def test_surplus_parameter(state: State, path: Path) -> None:
    state["sacb_proj3.get_kernel.6.weight"] = torch.zeros(2)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=r"1 are unknown \(estimators\.2\.sacb\.gate_mlp\.6\.weight\)"):
        load_official_checkpoint(path)


@pytest.mark.parametrize(("clusters", "message"), [(0, "got 0"), ((1, 2), "length 4, got 2")])
def test_ill_clusters(state: State, path: Path, clusters: object, message: str) -> None:
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(path, num_clusters=clusters)


def test_names_that_are_no_strings(path: Path) -> None:
    torch.save({"state_dict": {0: torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_official_checkpoint(path)


def test_broken_storage_key(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    key = re.findall(rb"\d{6,}", content)[-1]
    at = content.rindex(key)
    path.write_bytes(content[:at] + bytes([(content[at] - 47) % 10 + 48]) + content[at + 1 :])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_official_checkpoint(path)


def test_message_is_plain(state: State, path: Path) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint") as caught:
        load_official_checkpoint(path)
    assert "\x1b" not in str(caught.value) and "This file can still be loaded" not in str(caught.value)
