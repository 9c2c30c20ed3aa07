# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairMetric, RegistrationFigure, registration_figure
from monai_sacb.transforms import WarpByDDFd


class Shift(torch.nn.Module):
    """In the place of a network: one voxel along the first axis, for every pair."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        dims = image.dim() - 2
        ddf = torch.zeros(image.shape[0], dims, *image.shape[2:])
        ddf[:, 0] = 1.0
        return ddf


def ball(shape: tuple[int, ...], radius: float, offset: float) -> torch.Tensor:
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    centre = torch.tensor([(n - 1) / 2 for n in shape])
    centre[0] += offset
    return (places - centre.view(-1, *[1] * len(shape))).norm(dim=0)[None] - radius


def pairs(number: int, shape: tuple[int, ...] = (20, 22, 18), labels: bool = True) -> list[dict[str, torch.Tensor]]:
    result = []
    for i in range(number):
        pair: dict[str, Any] = {}
        for role, offset in (("moving", 1.0), ("fixed", 0.0)):
            distance = ball(shape, 5.0 + i, offset)
            name = f"/data/{role}_{i}.nii.gz"
            pair[f"{role}_image"] = MetaTensor(torch.sigmoid(-distance), meta={"filename_or_obj": name})
            if labels:
                pair[f"{role}_label"] = (distance < 0).to(torch.uint8)
        result.append(pair)
    return result


def evaluate(
    figure: RegistrationFigure, data: list[dict[str, torch.Tensor]], batch_size: int = 1, runs: int = 1
) -> SupervisedEvaluator:
    def dice(*keys: str) -> PairMetric:
        return PairMetric(DiceMetric(include_background=False, num_classes=2), keys)

    labels = "fixed_label" in data[0]
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=Shift(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpByDDFd(
            ["moving_image", "moving_label"],
            ["warped_image", "warped_label"],
            mode=["bilinear", "nearest"],
            allow_missing_keys=True,
        ),
        key_val_metric={"val_dice": dice("warped_label", "fixed_label")} if labels else None,
        additional_metrics={"val_dice_before": dice("moving_label", "fixed_label")},
        val_handlers=[figure],
    )
    for epoch in range(runs):
        engine.run(epoch + 1)
    return engine


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"), dtype=np.float64)


@pytest.mark.parametrize("shape", [(20, 22, 18), (20, 22)], ids=["volumes", "slices"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_picture_is_written(tmp_path: Path, shape: tuple[int, ...], labels: bool) -> None:
    path = tmp_path / "deep" / "registration.png"
    evaluate(RegistrationFigure(path), pairs(2, shape, labels))
    assert os.listdir(path.parent) == ["registration.png"]
    picture = pixels(path)
    height, width, _ = picture.shape
    assert height > 500 and width > 500
    # none of its six parts is blank
    for row in range(2):
        for column in range(3):
            part = picture[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3]
            assert part.std() > 10, (row, column)
    # two of them are in colour
    colour = np.ptp(picture, axis=2)
    assert colour[: height // 2].mean() < 1 < colour[height // 2 :].mean()


def test_picture_depends_on_the_pair(tmp_path: Path) -> None:
    data = pairs(2)
    for name, chosen in (("a", data), ("b", data[::-1]), ("c", data[:1])):
        evaluate(RegistrationFigure(str(tmp_path / f"{name}.png")), chosen)
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    # the first pair, whatever comes after
    np.testing.assert_array_equal(a, c)
    assert (a != b).any(2).mean() > 0.01


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    shown: list[tuple[Any, ...]] = []

    def plot(*args: Any) -> Figure:
        shown.append(args)
        return Figure()

    monkeypatch.setattr(registration_figure, "plot_registration", plot)
    data = pairs(3)
    evaluate(RegistrationFigure(tmp_path / "r.png"), data, batch_size)
    ((moving, fixed, warped, ddf, title),) = shown
    assert torch.equal(torch.as_tensor(moving), data[0]["moving_image"][0])
    assert torch.equal(torch.as_tensor(fixed), data[0]["fixed_image"][0])
    torch.testing.assert_close(
        torch.as_tensor(warped[:-1]).as_subclass(torch.Tensor), data[0]["moving_image"][0, 1:].as_tensor()
    )
    assert tuple(ddf.shape) == (3, 20, 22, 18)
    assert (ddf[0] == 1).all() and not ddf[1:].any()
    # the shift brings the balls together
    before = 2 * ((data[0]["moving_label"] == 1) & (data[0]["fixed_label"] == 1)).sum().item()
    before /= (data[0]["moving_label"].sum() + data[0]["fixed_label"].sum()).item()
    assert 0.5 < before < 0.95
    assert title == f"moving_0 on fixed_0: Dice {before:.3f} before, 1.000 after"


def test_title_without_dice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(registration_figure, "plot_registration", lambda *args: (titles.append(args[4]), Figure())[1])
    evaluate(RegistrationFigure(tmp_path / "r.png"), pairs(1, labels=False))
    evaluate(RegistrationFigure(tmp_path / "r.png", dice="val_other"), pairs(1))
    assert titles == ["moving_0 on fixed_0"] * 2


def test_every_evaluation_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(registration_figure, "plot_registration", lambda *args: (titles.append(args[4]), Figure())[1])
    engine = evaluate(RegistrationFigure(tmp_path / "r.png"), pairs(3), runs=2)
    engine.data_loader = DataLoader(Dataset(pairs(3)[1:]), batch_size=1)
    engine.state.epoch_length = 2
    engine.run(3)
    assert [title.split(":")[0] for title in titles] == ["moving_0 on fixed_0"] * 2 + ["moving_1 on fixed_1"]


def test_other_keys_and_format(tmp_path: Path) -> None:
    figure = RegistrationFigure(tmp_path / "r.svg", warped_key="moving_image", dice="val_dice_before")
    evaluate(figure, pairs(1))
    text = (tmp_path / "r.svg").read_text()
    assert text.count("<image") >= 5 and "</svg>" in text


def test_missing_entry(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="absent"):
        evaluate(RegistrationFigure(tmp_path / "r.png", warped_key="absent"), pairs(1))
    assert os.listdir(tmp_path) == []


def test_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.png"
    evaluate(RegistrationFigure(path), pairs(1))
    before = path.read_bytes()
    save = Figure.savefig

    def failing(self: Figure, target: Path, **kwargs: Any) -> None:
        save(self, target, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", failing)
    with pytest.raises(OSError, match="disk full"):
        evaluate(RegistrationFigure(path), pairs(2)[1:])
    assert os.listdir(tmp_path) == ["r.png"]
    assert path.read_bytes() == before
