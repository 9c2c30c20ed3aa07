# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES
from scipy.ndimage import gaussian_filter
from torch import nn

from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, LoadImaged, ResampleToMatchd, ScaleIntensityRangePercentilesd

from monai_sacb.inferers import RegistrationInferer, refine_ddf
from monai_sacb.networks.layers import exponential, warp
from monai_sacb.networks.nets import SACBNet
from monai_sacb.transforms import InvertDDFd, PadPaird, RegisterPaird, TransformPointsd, WarpByDDFd

SHAPES = [(40, 36), (24, 20, 22)]


def smooth(shape: tuple[int, ...], sigma: float, seed: int) -> torch.Tensor:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return torch.from_numpy((noise - noise.min()) / (noise.max() - noise.min())).float()


def pair(shape: tuple[int, ...], channels: int = 1, strength: float = 1.5) -> dict[str, Any]:
    """A moving image, and what it looks like through a known field: the fixed image."""
    moving = torch.stack([smooth(shape, 1.5, seed) for seed in range(channels)])
    noise = torch.stack([smooth(shape, 4, seed) - 0.5 for seed in range(10, 10 + len(shape))])
    ddf = exponential((strength * noise / noise.std())[None])
    fixed = warp(moving[None], ddf, padding_mode="border")[0]
    affines = [torch.from_numpy(GEOMETRIES[name]) for name in ("LIA", "oblique ASL")]
    images = [
        MetaTensor(image, affine=affine, meta={"filename_or_obj": name})
        for image, affine, name in zip((moving, fixed), affines, ("m.nii.gz", "f.nii.gz"))
    ]
    return {"moving_image": images[0], "fixed_image": images[1], "truth": ddf[0]}


class Shift(nn.Module):
    """A network that says the same everywhere, by its one parameter, and counts how it is called."""

    def __init__(self, shift: float = 0.5) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.calls: list[tuple[bool, bool, tuple[int, ...], torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), tuple(x.shape), x.dtype))
        return self.shift * torch.ones(len(x), x.dim() - 2, *x.shape[2:])


def error(ddf: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean distance from the true field in voxels, away from the border."""
    inner = (slice(None), *[slice(3, -3)] * (truth.dim() - 1))
    return float((torch.as_tensor(ddf) - truth)[inner].norm(dim=0).mean())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_known_field_is_found_without_a_network(shape: tuple[int, ...], channels: int) -> None:
    data = pair(shape, channels)
    result = RegisterPaird()(data)
    assert result.keys() == {*data, "pred", "warped_image"}
    ddf, warped, truth = result["pred"], result["warped_image"], data["truth"]
    assert ddf.shape == truth.shape and ddf.dtype == warped.dtype == torch.float32
    assert warped.shape == data["fixed_image"].shape
    assert error(ddf, truth) < 0.45 * error(torch.zeros_like(truth), truth)
    before, after = ((x - data["fixed_image"]).abs().mean() for x in (data["moving_image"], warped))
    assert after < 0.4 * before
    for x in (ddf, warped):
        assert isinstance(x, MetaTensor) and not x.requires_grad
        assert torch.equal(x.affine, data["fixed_image"].affine) and x.meta["filename_or_obj"] == "f.nii.gz"
    torch.testing.assert_close(
        warped.as_tensor(), warp(data["moving_image"].as_tensor()[None], ddf.as_tensor()[None])[0]
    )
    # nothing is random
    again = RegisterPaird()(data)
    assert torch.equal(again["pred"], ddf)


def test_moving_and_fixed_are_not_mixed_up() -> None:
    data = pair(SHAPES[1])
    swapped = RegisterPaird(moving_key="fixed_image", fixed_key="moving_image")(data)
    assert error(swapped["pred"], data["truth"]) > error(torch.zeros_like(data["truth"]), data["truth"])
    assert swapped["pred"].meta["filename_or_obj"] == "m.nii.gz"
    inverse = InvertDDFd()({"pred": data["truth"], "moving_image": data["moving_image"]})["inverse_ddf"]
    assert error(swapped["pred"], inverse) < 0.5 * error(torch.zeros_like(data["truth"]), inverse.as_tensor())


@pytest.mark.parametrize("training", [False, True])
def test_network_gives_the_field(training: bool) -> None:
    data, network = pair(SHAPES[1]), Shift().train(training)
    result = RegisterPaird(network, ddf_key="ddf", warped_key="warped")(data)
    assert result.keys() == {*data, "ddf", "warped"}
    assert (result["ddf"] == 0.5).all() and not result["ddf"].requires_grad
    # in evaluation mode, without gradients, and as it was afterwards
    assert network.calls == [(False, False, (1, 2, *SHAPES[1]), torch.float32)]
    assert network.training is training and network.shift.grad is None and network.shift.requires_grad


def test_moving_image_comes_first() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.new_zeros(1, 2, *x.shape[2:])

    data = pair(SHAPES[0])
    result = RegisterPaird(network)(data)
    assert torch.equal(seen[0][0, :1], data["moving_image"].as_tensor())
    assert torch.equal(seen[0][0, 1:], data["fixed_image"].as_tensor())
    torch.testing.assert_close(result["warped_image"].as_tensor(), data["moving_image"].as_tensor())


def test_network_and_refinement() -> None:
    data = pair(SHAPES[1], strength=1.0)
    data["truth"] = data["truth"] + 0.0
    start = error(torch.full_like(data["truth"], 0.3), data["truth"])
    alone = RegisterPaird(Shift(0.3))(data)
    refined = RegisterPaird(Shift(0.3), RegistrationInferer(iterations=60))(data)
    assert error(alone["pred"], data["truth"]) == pytest.approx(start)
    assert error(refined["pred"], data["truth"]) < 0.6 * start


def test_refinement_in_one_scale() -> None:
    data = pair(SHAPES[1])
    ddf = RegisterPaird(inferer=RegistrationInferer(iterations=100))(data)["pred"]
    assert error(ddf, data["truth"]) < 0.5 * error(torch.zeros_like(data["truth"]), data["truth"])


def test_inferer_of_ones_own() -> None:
    """Whatever gives a field."""

    def inferer(inputs: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        moving, fixed = inputs.chunk(2, 1)
        ddf = network(inputs)
        assert not ddf.any()
        for spacing in (4, 2):
            ddf = refine_ddf(moving, fixed, ddf, iterations=30, spacing=spacing)
        return ddf

    data = pair(SHAPES[1])
    ddf = RegisterPaird(inferer=inferer, warped_key=None)(data)
    assert "warped_image" not in ddf
    assert error(ddf["pred"], data["truth"]) < 0.5 * error(torch.zeros_like(data["truth"]), data["truth"])


@pytest.mark.parametrize("shape", [(33, 40), (32, 20, 33)], ids=str)
def test_sacb_net(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = SACBNet(len(shape), base_channels=2).eval()
    data = pair(shape)
    result = RegisterPaird(network)(data)
    inputs = torch.cat([data["moving_image"].as_tensor(), data["fixed_image"].as_tensor()])[None]
    with torch.no_grad():
        assert torch.equal(result["pred"].as_tensor(), network(inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    data = pair(SHAPES[0])
    data = {key: (100 * value).to(dtype) for key, value in data.items() if key != "truth"}
    result = RegisterPaird(Shift())(data)
    assert result["pred"].dtype == result["warped_image"].dtype == torch.float32
    assert data["moving_image"].dtype == dtype


def test_plain_tensors() -> None:
    data = {key: torch.as_tensor(value.as_tensor()) for key, value in pair(SHAPES[0]).items() if key != "truth"}
    result = RegisterPaird(Shift())(data)
    assert all(type(result[key]) is torch.Tensor for key in ("pred", "warped_image"))


def test_from_files_in_a_dataset(tmp_path: Path) -> None:
    """As in anybody's pipeline: two files, resampled to one grid, registered once, and what follows from the field."""
    shape = (22, 24, 20)
    moving = smooth(shape, 1.5, 0)
    noise = torch.stack([smooth(shape, 4, seed) - 0.5 for seed in (1, 2, 3)])
    fixed = warp(moving[None, None], exponential((1.5 * noise / noise.std())[None]), padding_mode="border")[0, 0]
    for name, image in (("m", moving), ("f", fixed)):
        nib.save(nib.Nifti1Image(image.numpy(), GEOMETRIES["oblique ASL"]), tmp_path / f"{name}.nii.gz")
    keys = ["moving_image", "fixed_image"]
    register = RegisterPaird()
    transform = Compose(
        [
            LoadImaged(keys, ensure_channel_first=True),
            ResampleToMatchd("moving_image", key_dst="fixed_image"),
            ScaleIntensityRangePercentilesd(keys, 0.5, 99.5, 0, 1, clip=True),
            register,
            WarpByDDFd("moving_image", "warped_again"),
            TransformPointsd(output_keys="partners"),
            TransformPointsd("partners", "back", inverse=True),
        ]
    )
    points = torch.from_numpy(nib.affines.apply_affine(GEOMETRIES["oblique ASL"], [[10, 11, 9], [7, 15, 12]])).float()
    files = [{"moving_image": tmp_path / "m.nii.gz", "fixed_image": tmp_path / "f.nii.gz", "fixed_points": points}]
    dataset = CacheDataset(files, transform, progress=False)
    (batch,) = DataLoader(dataset, batch_size=1)
    assert batch["warped_image"].shape == (1, 1, *shape) and batch["pred"].shape == (1, 3, *shape)
    assert torch.equal(batch["warped_image"], batch["warped_again"])
    before, after = ((x - batch["fixed_image"]).abs().mean() for x in (batch["moving_image"], batch["warped_image"]))
    assert after < 0.5 * before
    np.testing.assert_allclose(batch["warped_image"].affine[0], GEOMETRIES["oblique ASL"], atol=1e-5)
    torch.testing.assert_close(batch["back"][0], points, rtol=0, atol=0.02)
    assert (batch["partners"][0] - points).norm(dim=1).min() > 0.1


def test_can_be_sent_to_another_process() -> None:
    data = pair(SHAPES[0])
    for register in (RegisterPaird(), RegisterPaird(Shift(), RegistrationInferer(5))):
        again = pickle.loads(pickle.dumps(register))
        assert torch.equal(again(data)["pred"], register(data)["pred"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices() -> None:
    data, network = pair(SHAPES[1]), Shift()
    result = RegisterPaird(device="cuda")(data)
    assert result["pred"].device.type == result["warped_image"].device.type == "cpu"
    assert error(result["pred"], data["truth"]) < 0.5 * error(torch.zeros_like(data["truth"]), data["truth"])
    RegisterPaird(network, device="cuda")
    assert network.shift.device.type == "cuda"


def test_device() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.device)
        return torch.zeros(1, 2, *x.shape[2:], device=x.device)

    data = pair(SHAPES[0])
    result = RegisterPaird(network, device="meta", warped_key=None)
    # nothing is there to be checked or brought back, but it was asked for
    with pytest.raises(NotImplementedError):
        result(data)
    assert seen == [torch.device("meta")]
    assert RegisterPaird(Shift(), device="cpu").device == torch.device("cpu")


def ill_images(moving: Any, fixed: Any) -> Callable[[], Any]:
    return lambda: RegisterPaird(Shift())({"moving_image": moving, "fixed_image": fixed})


IMAGE = torch.rand(1, 8, 9, 10)
NAMED = MetaTensor(torch.rand(1, 8, 9, 11), meta={"filename_or_obj": "/d/f.nii.gz"})
ILL_ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "network": (lambda: RegisterPaird("net.pt"), r"network must be callable or None, got 'net.pt'"),  # type: ignore
    "inferer": (lambda: RegisterPaird(inferer=50), r"inferer must be callable or None, got 50"),  # type: ignore
    "nothing to do": (lambda: RegisterPaird(inferer=RegistrationInferer()), r"must have iterations, got 0"),
    "sizes": (
        ill_images(IMAGE, NAMED),
        r"^moving_image has shape \[1, 8, 9, 10\], but fixed_image '/d/f.nii.gz' has \[1, 8, 9, 11\]; .*PadPaird\)\.$",
    ),
    "channels": (ill_images(IMAGE, IMAGE.expand(2, -1, -1, -1)), r"\[1, 8, 9, 10\].*\[2, 8, 9, 10\]"),
    "slice and volume": (ill_images(IMAGE, IMAGE[..., 0]), r"\[1, 8, 9, 10\].*\[1, 8, 9\]"),
    "batch": (ill_images(IMAGE[None], IMAGE[None]), r"moving_image must be an image .*\[1, 1, 8, 9, 10\]"),
    "no channels": (ill_images(IMAGE[0, 0], IMAGE[0, 0]), r"moving_image must be an image .*\[9, 10\]"),
    "path": (ill_images(IMAGE, "f.nii.gz"), r"fixed_image must be an image .*got str"),
    "NaN": (ill_images(IMAGE, IMAGE / 0 * 0), r"fixed_image has 720 NaN or infinite voxels"),
    "field of another size": (
        lambda: RegisterPaird(lambda x: x)({"moving_image": IMAGE, "fixed_image": IMAGE}),
        r"must return a field \[1, 3, 8, 9, 10\], got \[1, 2, 8, 9, 10\]",
    ),
    "no field": (
        lambda: RegisterPaird(inferer=lambda x, net: None)({"moving_image": IMAGE, "fixed_image": IMAGE}),
        r"must return a field \[1, 3, 8, 9, 10\], got NoneType",
    ),
}


@pytest.mark.parametrize(("call", "message"), ILL_ARGUMENTS.values(), ids=ILL_ARGUMENTS)
def test_ill_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_helps_with_sizes() -> None:
    data = {"moving_image": MetaTensor(torch.rand(1, 8, 9)), "fixed_image": MetaTensor(torch.rand(1, 10, 7))}
    assert Compose([PadPaird(), RegisterPaird(Shift())])(data)["pred"].shape == (2, 10, 9)


@pytest.mark.parametrize("key", ["moving_image", "fixed_image"])
def test_missing_keys(key: str) -> None:
    data = {"moving_image": IMAGE, "fixed_image": IMAGE}
    del data[key]
    with pytest.raises(KeyError, match=key):
        RegisterPaird(Shift())(data)
