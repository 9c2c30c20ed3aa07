# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import RegistrationImages, registration_images
from monai_sacb.networks import cluster_labels
from monai_sacb.networks.nets import SACBNet
from monai_sacb.transforms import WarpByDDFd

SHAPE = (32, 32, 32)


class Shift(torch.nn.Module):
    """In the place of a network: a number of voxels along the first axis."""

    def __init__(self, voxels: float) -> None:
        super().__init__()
        self.voxels = voxels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        dims = image.dim() - 2
        ddf = torch.zeros(image.shape[0], dims, *image.shape[2:])
        ddf[:, 0] = self.voxels
        return ddf


def ball(shape: Sequence[int], radius: float, offset: float) -> torch.Tensor:
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    centre = torch.tensor([(n - 1) / 2 for n in shape])
    centre[0] += offset
    return torch.sigmoid(radius - (places - centre.view(-1, *[1] * len(shape))).norm(dim=0))[None]


def pairs(number: int = 1, shape: Sequence[int] = SHAPE, offset: float = 3.0) -> list[dict[str, torch.Tensor]]:
    """Balls, those that move by an offset along the first axis."""
    return [
        {
            f"{role}_image": MetaTensor(ball(shape, 7.0 + i, shift), meta={"filename_or_obj": f"/data/{role}.nii.gz"})
            for role, shift in (("moving", offset), ("fixed", 0.0))
        }
        for i in range(number)
    ]


def evaluate(
    folder: Path,
    network: torch.nn.Module,
    data: list[dict[str, torch.Tensor]],
    epochs: Sequence[int] = (1,),
    batch_size: int = 1,
    **kwargs: Any,
) -> EventAccumulator:
    """What TensorBoard finds after evaluations at some epochs."""
    writer = SummaryWriter(folder)
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=network,
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpByDDFd("moving_image", "warped_image"),
        val_handlers=[RegistrationImages(writer, network, **kwargs)],
    )
    for epoch in epochs:
        engine.run(epoch)
    # not closed: an evaluation's images are on the disk when it has ended
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def pictures(events: EventAccumulator, tag: str) -> list[np.ndarray]:
    found = []
    for event in events.Images(tag):
        with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            assert (event.width, event.height) == picture.size
            found.append(np.asarray(picture.convert("RGB"), dtype=np.float64))
    return found


def part(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """The inside of one of the six parts, without its title: it begins 15 % below the part's upper edge."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 3
    return picture[row * height + int(0.15 * height) : (row + 1) * height, column * width : (column + 1) * width]


def colour(picture: np.ndarray) -> float:
    """How far from grey it is on average; of a map of differences that are all zero: nearly nothing."""
    return float(np.ptp(picture, axis=2).mean())


@pytest.mark.parametrize("shape", [SHAPE, (32, 40)], ids=["volumes", "slices"])
def test_tags_steps_and_sizes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    network = SACBNet(spatial_dims=len(shape), base_channels=2, num_clusters=3).eval()
    events = evaluate(tmp_path, network, pairs(2, shape), epochs=(2, 5))
    assert set(events.Tags()["images"]) == {"registration", "clusters"}
    for tag, size in (("registration", (1000, 800)), ("clusters", (1200, 500))):
        assert [(event.step, event.width, event.height) for event in events.Images(tag)] == [(2, *size), (5, *size)]
        first, second = pictures(events, tag)
        assert first.std() > 10
        # neither the network nor the pair has changed
        np.testing.assert_array_equal(first, second)


def test_no_clusters_of_other_networks(tmp_path: Path) -> None:
    events = evaluate(tmp_path, Shift(0), pairs())
    assert events.Tags()["images"] == ["registration"]


def test_nothing_changes_by_no_shift(tmp_path: Path) -> None:
    (picture,) = pictures(evaluate(tmp_path, Shift(0), pairs()), "registration")
    fixed, moving, warped = (part(picture, 0, i) for i in range(3))
    before, after = (part(picture, 1, i) for i in range(2))

    def inside(image: np.ndarray) -> np.ndarray:
        """What is not white, of one size: parts may differ by a pixel."""
        rows, columns = ((image < 250).all(2).any(axis) for axis in (1, 0))
        return np.asarray(Image.fromarray(image[np.ix_(rows, columns)].astype(np.uint8)).resize((64, 64)), dtype=float)

    assert np.abs(inside(moving) - inside(warped)).mean() < 1
    assert np.abs(inside(fixed) - inside(moving)).mean() > 5
    assert colour(before) == pytest.approx(colour(after), rel=0.02) and colour(before) > 5


def test_differences_depend_on_the_field_and_the_images(tmp_path: Path) -> None:
    def differences(name: str, voxels: float, offset: float) -> tuple[float, float]:
        events = evaluate(tmp_path / name, Shift(voxels), pairs(offset=offset))
        (picture,) = pictures(events, "registration")
        before, after = (colour(part(picture, 1, i)) for i in range(2))
        return before, after

    before, right = differences("right", 3.0, 3.0)
    _, none = differences("none", 0.0, 3.0)
    _, wrong = differences("wrong", -3.0, 3.0)
    far, _ = differences("far", 0.0, 6.0)
    aligned, _ = differences("aligned", 0.0, 0.0)
    assert right < 0.2 * before and none == pytest.approx(before, rel=0.02) and wrong > 1.3 * before
    assert aligned < 0.2 * before and far > 1.3 * before


def test_grid_is_that_of_the_field(tmp_path: Path) -> None:
    """All else is the same where the images are."""
    still, moved = (
        pictures(evaluate(tmp_path / str(voxels), Shift(voxels), pairs(), warped_key="moving_image"), "registration")[0]
        for voxels in (0.0, 1.0)
    )
    different = (np.abs(still - moved) > 20).any(2)
    rows, columns = np.nonzero(different)
    assert different.sum() > 1000
    assert rows.min() > still.shape[0] / 2 and columns.min() > still.shape[1] * 2 / 3


def test_first_pair_of_a_batch(tmp_path: Path) -> None:
    data = pairs(3)
    a, b, c = (
        pictures(evaluate(tmp_path / name, Shift(1), chosen, batch_size=size), "registration")[0]
        for name, chosen, size in (("a", data, 1), ("b", data, 3), ("c", data[1:], 1))
    )
    np.testing.assert_array_equal(a, b)
    assert (a != c).any(2).mean() > 0.01


def test_whose_clusters_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = SACBNet(base_channels=2, num_clusters=3).eval()
    shown: list[tuple[Any, ...]] = []
    monkeypatch.setattr(registration_images, "plot_clusters", lambda *args: (shown.append(args), Figure())[1])
    data = pairs(2)
    evaluate(tmp_path, network, data, batch_size=2)
    images = [data[0][f"{role}_image"] for role in ("moving", "fixed")]
    expected = cluster_labels(network, torch.cat(images)[None].as_subclass(torch.Tensor))
    ((*given, title),) = shown
    for image, source in zip(given[:2], images):
        assert torch.equal(torch.as_tensor(image), source[0])
    for clusters, labels in zip(given[2:], expected):
        assert torch.equal(clusters, labels[0])
    assert not torch.equal(given[2], given[3]) and title == "moving on fixed"


def test_clusters_are_those_of_the_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SACBNet(base_channels=2, num_clusters=3).eval()
    data = pairs(2)
    a, b, c = (
        pictures(evaluate(tmp_path / name, network, chosen, **kwargs), "clusters")[0]
        for name, chosen, kwargs in (("a", data, {}), ("b", data[:1], {}), ("c", data[1:], {}))
    )
    # of the first pair, whatever comes after, and they are left in peace
    np.testing.assert_array_equal(a, b)
    assert (a != c).any(2).mean() > 0.01
    # the images in the first column are grey, the clusters beside them are not
    width = a.shape[1] // 5
    assert colour(a[:, :width]) < 1 < colour(a[:, width:])


def test_network_runs_no_more_often(tmp_path: Path) -> None:
    network = SACBNet(base_channels=2, num_clusters=3).eval()
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    evaluate(tmp_path, network, pairs(2), epochs=(1, 2))
    assert len(calls) == 4
    assert not any(module._forward_hooks for module in network.modules() if module is not network)


def test_other_keys(tmp_path: Path) -> None:
    (given,) = pictures(evaluate(tmp_path / "a", Shift(3), pairs(), warped_key="moving_image"), "registration")
    (warped,) = pictures(evaluate(tmp_path / "b", Shift(3), pairs()), "registration")
    assert colour(part(given, 1, 1)) > 5 * colour(part(warped, 1, 1))
    with pytest.raises(KeyError, match="absent"):
        evaluate(tmp_path / "c", Shift(3), pairs(), ddf_key="absent")


def test_process_that_writes_nothing() -> None:
    network = SACBNet(base_channels=2, num_clusters=3).eval()
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(pairs()), batch_size=1),
        network=network,
        prepare_batch=PrepareRegistrationBatch(),
        val_handlers=[RegistrationImages(None, network, warped_key="absent")],
    )
    engine.run()
    assert engine.state.iteration == 1
