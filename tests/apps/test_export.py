# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Exported networks give the numbers of the network itself."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from monai_sacb.apps import export
from monai_sacb.apps.exporting import exported_agreement, load_exported, save_exported
from monai_sacb.networks.layers import KMeans
from monai_sacb.networks.nets import SACBNet

# even, odd, anisotropic
SIZES = [(32, 48, 32), (33, 35, 37), (50, 18, 9)]
# the packages of the extra 'export'
needs_onnx = pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="onnx and onnxruntime are not installed"
)


class Slabs(nn.Module):
    """Injected clusters, the same in every runtime: slabs of the image, each with one of its own features."""

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num = points.shape[1]
        labels = (3 * torch.arange(num, device=points.device)).div(num, rounding_mode="floor")
        return labels.unsqueeze(0).expand(points.shape[0], -1), points[:, torch.tensor([0, num // 2, num - 1])]


def small_network(clusterer: type[Slabs] | None = None, spatial_dims: int = 3, **settings: int) -> SACBNet:
    torch.manual_seed(0)
    net = SACBNet(spatial_dims, base_channels=2, num_clusters=3, scaled_matching=True).eval()
    for estimator in net.estimators:
        estimator.sacb.clusterer = Slabs() if clusterer else KMeans(3, **settings)
    return net


def pairs(batch: int, spatial: Sequence[int]) -> torch.Tensor:
    return torch.rand(batch, 2, *spatial, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(
    ("suffix", "spatial"),
    [
        *((".ts", spatial) for spatial in SIZES),
        pytest.param(".onnx", SIZES[0], marks=[needs_onnx, pytest.mark.slow]),
        pytest.param(".onnx", SIZES[1], marks=needs_onnx),
        pytest.param(".onnx", SIZES[2], marks=[needs_onnx, pytest.mark.slow]),
        *(pytest.param(".pt2", spatial, marks=pytest.mark.slow) for spatial in SIZES),
    ],
)
def test_injected_clusters(tmp_path: Path, relative_error, suffix: str, spatial: tuple[int, ...]) -> None:
    net, path = small_network(Slabs), tmp_path / f"net{suffix}"
    save_exported(net, path, None if path.suffix == ".ts" else spatial)
    runner = load_exported(path)
    with torch.no_grad():
        for batch in (1, 2, 3):
            x = pairs(batch, spatial)
            expected = net(x)
            assert expected.abs().max() > 0.1
            assert relative_error(runner(x), expected) < 1e-4


def end_to_end(net: SACBNet, path: Path, spatial: tuple[int, ...], check_same_field) -> None:
    save_exported(net, path, None if path.suffix == ".ts" else spatial)
    runner = load_exported(path)
    with torch.no_grad():
        for batch in (1, 3):
            x = pairs(batch, spatial)
            check_same_field(runner(x), net(x))


@pytest.mark.parametrize("suffix", [".ts", pytest.param(".onnx", marks=needs_onnx)])
def test_clusters_of_its_own(tmp_path: Path, check_same_field, suffix: str) -> None:
    """With few passes of k-means, which a recording unrolls; :py:func:`test_default_network` has all."""
    net = small_network(spatial_dims=2, num_starts=2, subsample_passes=2, full_passes=1, subsample_size=500)
    end_to_end(net, tmp_path / f"net{suffix}", (33, 60), check_same_field)


@pytest.mark.slow
@pytest.mark.parametrize("spatial", SIZES)
@pytest.mark.parametrize("suffix", [".ts", pytest.param(".onnx", marks=needs_onnx), ".pt2"])
def test_default_network(tmp_path: Path, check_same_field, suffix: str, spatial: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    end_to_end(SACBNet().eval(), tmp_path / f"net{suffix}", spatial, check_same_field)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(SACBNet(base_channels=2).state_dict(), path)
    return str(path)


def test_command(weights: str, tmp_path: Path, check_same_field) -> None:
    """TorchScript as MONAI's ckpt_export writes it, for any size."""
    target = tmp_path / "new" / "net.ts"
    result = export(weights, str(target))
    assert result["file"] == str(target) and "any size" in result["input"]
    assert result["close_voxels_percent"] >= 99.9 and result["median_difference_voxels"] < 1e-4
    assert [path.name for path in target.parent.iterdir()] == ["net.ts"]
    files = {"metadata.json": "", "inference.json": ""}
    scripted = torch.jit.load(target, _extra_files=files)
    assert b"network_data_format" in files["metadata.json"] and b"SACBNet" in files["inference.json"]
    net = SACBNet(base_channels=2).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        x = pairs(1, (34, 40, 33))
        check_same_field(scripted(x), net(x))


def test_other_field_is_not_handed_over(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_sacb.apps.exporting.load_exported", lambda path: lambda x: 0.0 * x[:, [0, 0, 0]])
    with pytest.raises(RuntimeError, match=r"not that of .* voxels are within 0\.05 voxels of it, not 99\.9"):
        export(weights, str(tmp_path / "out" / "net.ts"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), 0.051])
def test_agreement_sees_a_difference(value: float) -> None:
    net = small_network(Slabs)

    def other(x: torch.Tensor) -> torch.Tensor:
        field = net(x)
        # one axis at one voxel in fifty
        field.flatten(2)[:, 1, ::50] += value
        return field

    assert exported_agreement(net, other, (32, 32, 32))["close_share"] == pytest.approx(0.98, abs=1e-3)
    assert exported_agreement(net, net, (32, 32, 32)) == {"close_share": 1.0, "median_difference": 0.0}


ILL_CASES = [
    ({"output": "net.pt"}, ValueError, r"exported to a file \.ts, \.onnx, \.pt2, got the ending '\.pt'"),
    ({"output": "net.pt2"}, ValueError, r"a .pt2 file takes images of one size, 3 numbers of voxels; got size None"),
    ({"output": "net.pt2", "size": "32x32"}, ValueError, r"3 numbers of voxels; got size \[32, 32\]"),
    ({"output": "net.pt2", "size": "32x0x32"}, ValueError, r"3 numbers of voxels; got size \[32, 0, 32\]"),
    ({"output": "net.pt2", "size": "32x-1x32"}, ValueError, "size must be whole numbers like .*, got '32x-1x32'"),
    ({"output": "net.ts", "size": "32x32x32"}, ValueError, "a .ts file takes images of any size"),
    ({"output": "."}, IsADirectoryError, "is a folder; a file is needed"),
    ({"output": "net.ts", "size": "32x40x32"}, ValueError, r"it has none of its own, got size \[32, 40, 32\]"),
    ({"output": "new/net.foo"}, ValueError, r"got the ending '\.foo'"),
    ({"output": "net.ts", "model": "none"}, ValueError, "'none' is no network"),
    ({"output": "net.ts", "model": "there_is_no_such"}, FileNotFoundError, "there is no model 'there_is_no_such'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ILL_CASES)
def test_ill_arguments(
    weights: str, tmp_path: Path, arguments: dict[str, str], error: type[Exception], message: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(error, match=message):
        export(arguments.get("model", weights), str(folder / arguments["output"]), arguments.get("size"))
    assert list(folder.rglob("*")) == []


class Unscriptable(nn.Module):
    def forward(self, x: torch.Tensor, **more: int) -> torch.Tensor:
        return x


def test_network_that_cannot_be_scripted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written as TorchScript: .*variable number of arguments[^\n]*$"):
        save_exported(Unscriptable().eval(), tmp_path / "net.ts", None)


def test_file_of_another_kind(weights: str) -> None:
    with pytest.raises(ValueError, match=r"is a file \.ts, \.onnx, \.pt2, got the ending '\.pt'"):
        load_exported(weights)


def test_without_onnx(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_sacb.apps.exporting.has_onnxruntime", False)
    with pytest.raises(ModuleNotFoundError, match="pip install onnx onnxruntime onnxscript"):
        export(weights, str(tmp_path / "net.onnx"), "32x32x32")
    assert not list(tmp_path.glob("*.onnx"))
