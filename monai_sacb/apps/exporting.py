# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``export``: a model as one file that runs without this package, checked before it is handed over."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.jit.frontend import FrontendError
from tqdm import tqdm

from monai.bundle import ConfigParser
from monai.data import load_net_with_metadata, save_net_with_metadata
from monai.networks import convert_to_torchscript
from monai.utils import optional_import

from monai_sacb.networks import find_model
from monai_sacb.networks.pretrained import RegistrationModel
from monai_sacb.utils import first_line, replacing

__all__ = ["export", "exported_agreement", "load_exported", "save_exported"]

onnx, has_onnx = optional_import("onnx")
onnxruntime, has_onnxruntime = optional_import("onnxruntime")

SUFFIXES = (".ts", ".onnx", ".pt2")
# the first with 3-D GridSample
OPSET = 20
# k-means makes the network discontinuous: a voxel between two clusters may fall to either, here or there
CLOSE_VOXELS, CLOSE_SHARE = 0.05, 0.999
# two, since a recording of one image takes its number for a constant
BATCH = 2
# sizes to check a file with that takes any
ANY_SIZES = {2: ((64, 48), (45, 37)), 3: ((48, 64, 32), (45, 37, 50))}

Runner = Callable[[torch.Tensor], torch.Tensor]


def _test_pair(batch: int, channels: int, spatial: Sequence[int]) -> torch.Tensor:
    """Pairs of smooth random images with some noise, ``(batch, 2 * channels, *spatial)``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    mode = "trilinear" if len(spatial) == 3 else "bilinear"
    coarse = torch.rand([batch, 2 * channels, *(max(2, size // 8) for size in spatial)], generator=generator)
    image = F.interpolate(coarse, list(spatial), mode=mode, align_corners=True)
    return 0.9 * image + 0.1 * torch.rand(image.shape, generator=generator)


def _save_torchscript(network: nn.Module, path: Path, model: RegistrationModel | None) -> None:
    meta: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if model is not None:
        # what MONAI's ckpt_export puts inside
        configs = model.bundle_root / "configs"
        if (configs / "metadata.json").is_file():
            meta = ConfigParser.load_config_file(str(configs / "metadata.json"))
        files = {"inference.json": (configs / "inference.json").read_bytes()}
    try:
        scripted = convert_to_torchscript(network)
    except (FrontendError, RuntimeError) as error:
        raise ValueError(f"the network cannot be written as TorchScript: {first_line(error)}.") from error
    save_net_with_metadata(
        scripted, str(path), include_config_vals=False, append_timestamp=False, meta_values=meta, more_extra_files=files
    )


def _save_onnx(network: nn.Module, path: Path, example: torch.Tensor) -> None:
    with warnings.catch_warnings():
        # sizes that become constants are what is wanted, and the newer exporter takes minutes for unrolled k-means
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["pred"],
            dynamic_axes={"image": {0: "batch"}, "pred": {0: "batch"}},
        )
    content = onnx.load(str(path))
    content.doc_string = (
        "SACB-Net of monai_sacb. image: moving and fixed image as channels, scaled to [0, 1]. pred: displacement in "
        "voxels of the fixed grid, channel i along array axis i; warped(p) = moving(p + pred(p))."
    )
    onnx.save(content, str(path))


def _check_form(network: nn.Module, path: Path, size: Sequence[int] | None) -> None:
    """Whether there can be such a file of the network; with a size, it is not TorchScript."""
    dims = int(getattr(network, "spatial_dims", 3))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a network is exported to a file {', '.join(SUFFIXES)}, got the ending '{path.suffix}'.")
    if path.suffix == ".onnx" and not (has_onnx and has_onnxruntime):
        raise ModuleNotFoundError("export to .onnx needs more packages: pip install onnx onnxruntime onnxscript.")
    if path.suffix == ".ts":
        if size is not None:
            raise ValueError(f"a .ts file takes images of any size; it has none of its own, got size {list(size)}.")
    elif size is None or len(size) != dims or min(size) < 1:
        raise ValueError(f"a {path.suffix} file takes images of one size, {dims} numbers of voxels; got size {size}.")


def save_exported(
    network: nn.Module, path: str | os.PathLike[str], size: Sequence[int] | None, model: RegistrationModel | None = None
) -> None:
    """
    Write a network to a file that runs without this package.

    Args:
        network: a :py:class:`monai_sacb.networks.nets.SACBNet` on the CPU, in evaluation mode.
        path: the file, ``.ts`` (TorchScript), ``.onnx`` or ``.pt2`` (torch.export).
        size: spatial size of the images, which all but TorchScript need, since they record operations on one size.
        model: where the network is from: its metadata go into a TorchScript file.

    Raises:
        ValueError: When the ending is another, the size is missing or does not fit, or the network cannot be scripted.
        ModuleNotFoundError: When a package for ``.onnx`` is missing.
    """
    path = Path(path)
    _check_form(network, path, size)
    if size is None:
        _save_torchscript(network, path, model)
        return
    example = _test_pair(BATCH, int(getattr(network, "in_channels", 1)), size)
    with torch.no_grad():
        if path.suffix == ".onnx":
            _save_onnx(network, path, example)
        else:
            batch = torch.export.Dim("batch", min=1, max=1024)
            torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), path)


def load_exported(path: str | os.PathLike[str]) -> Runner:
    """
    A file of :py:func:`save_exported` as a function from ``(B, 2 * in_channels, *spatial)`` to the field, on the CPU.

    Args:
        path: the file.

    Raises:
        ValueError: When the ending is another.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"an exported network is a file {', '.join(SUFFIXES)}, got the ending '{path.suffix}'.")
    if path.suffix == ".ts":
        scripted: Runner = load_net_with_metadata(str(path))[0]
        return scripted
    if path.suffix == ".pt2":
        exported: Runner = torch.export.load(path).module()
        return exported
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def exported_agreement(network: nn.Module, runner: Runner, spatial: Sequence[int]) -> dict[str, float]:
    """
    How the field of an exported network agrees with the network's own, on made-up pairs, one alone and two at a time.

    Args:
        network: the network, on the CPU.
        runner: what :py:func:`load_exported` gives.
        spatial: size of the images.

    Returns:
        ``close_share``, the share of voxels whose displacements differ by less than 0.05 voxels, and
        ``median_difference`` in voxels; the worse of the two batches.
    """
    shares, medians = [], []
    for batch in (1, BATCH):
        x = _test_pair(batch, int(getattr(network, "in_channels", 1)), spatial)
        with torch.no_grad():
            difference = (runner(x) - network(x)).abs()
        # NaN is not close
        shares.append((difference.amax(1) < CLOSE_VOXELS).double().mean().item())
        medians.append(difference.median().item())
    return {"close_share": min(shares), "median_difference": max(medians)}


def _parsed_size(size: str | None) -> list[int] | None:
    if size is None:
        return None
    if not re.fullmatch(r"\d+([x,]\d+)*", size):
        raise ValueError(f"size must be whole numbers like 160x192x160, got '{size}'.")
    return [int(number) for number in re.split("[x,]", size)]


def export(model: str, output: str, size: str | None = None) -> dict[str, Any]:
    """
    Write a model to one file that runs without this package, where its field has been found to be the same.

    The network takes the moving and the fixed image as the two channels of one tensor, each scaled to [0, 1], any
    number of pairs at once, and gives the field in voxels of the fixed grid. K-means puts a voxel between two clusters
    to the one or the other as the last digit has it; therefore the same is: 99.9 % of the voxels within 0.05 voxels.

    Args:
        model: a name among those of ``info``, a file of weights, or a bundle's folder.
        output: the file to write: .ts is TorchScript, which takes images of any size; .onnx is for ONNX Runtime, .pt2
            for torch.export.load, both for images of one size.
        size: that size, such as 160x192x160; smaller images can be padded with zeros at the far ends of their axes.

    Returns:
        the file, what it takes, and how well it agrees.

    Raises:
        FileNotFoundError: When there is no such model.
        ModuleNotFoundError: When a package for ``.onnx`` is missing.
        RuntimeError: When the file's field is another than the model's; then there is no file.
        ValueError: When an argument is wrong.
    """
    spatial = _parsed_size(size)
    if Path(output).is_dir():
        raise IsADirectoryError(f"output '{output}' is a folder; a file is needed.")
    found = find_model(model)
    network = found.network(found.parser(device=torch.device("cpu")))
    if network is None:
        raise ValueError(f"'{model}' is no network; nothing can be exported.")
    # before there is anything on the disk
    _check_form(network, Path(output), spatial)
    sizes = [spatial] if spatial is not None else ANY_SIZES[int(getattr(network, "spatial_dims", 3))]
    with replacing(output) as temporary, tqdm(total=1 + len(sizes), desc="exporting", leave=False) as bar:
        save_exported(network, temporary, spatial, found)
        bar.update()
        runner = load_exported(temporary)
        agreement = []
        for shape in sizes:
            agreement.append(exported_agreement(network, runner, shape))
            bar.update()
        share = min(entry["close_share"] for entry in agreement)
        if not share >= CLOSE_SHARE:
            raise RuntimeError(
                f"the exported network's field is not that of '{model}': {100 * share:.2f} % of the voxels are within "
                f"{CLOSE_VOXELS} voxels of it, not {100 * CLOSE_SHARE:.1f} %."
            )
    return {
        "file": str(output),
        "model": found.name,
        "input": f"(any number of pairs, moving and fixed image, {'any size' if spatial is None else size})",
        "close_voxels_percent": 100 * share,
        "median_difference_voxels": max(entry["median_difference"] for entry in agreement),
    }
