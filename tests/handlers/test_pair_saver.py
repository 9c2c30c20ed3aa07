# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairSaver
from monai_sacb.transforms import DDFToDisplacementd, SaveRegistrationd, WarpByDDFd

SHAPE = (4, 5, 6)


class Shift(torch.nn.Module):
    """In the place of a network: one voxel along the first axis, for every pair."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(image.shape[0], 3, *image.shape[2:])
        ddf[:, 0] = 1.0
        return ddf


class Collect:
    """In the place of a transform that writes."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def __call__(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    @property
    def numbers(self) -> list[int]:
        return [int(item["number"]) for item in self.items]


def pairs(number: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(number):
        pair: dict[str, Any] = {"number": i}
        for role in ("moving", "fixed"):
            image = torch.rand(1, *SHAPE, generator=generator)
            affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
            pair[f"{role}_image"] = MetaTensor(image, affine=affine, meta={"filename_or_obj": f"/d/{role}{i}.nii.gz"})
        result.append(pair)
    return result


def evaluator(saver: PairSaver, data: list[dict[str, Any]], batch_size: int = 1) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=Shift(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpByDDFd("moving_image", "warped_image"),
        val_handlers=[saver],
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(("max_pairs", "expected"), [(None, 5), (0, 0), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_first_pairs_are_passed_on(max_pairs: int | None, expected: int, batch_size: int) -> None:
    collect = Collect()
    evaluator(PairSaver(collect, max_pairs), pairs(5), batch_size).run()
    assert collect.numbers == list(range(expected))


def test_all_pairs_by_default() -> None:
    collect = Collect()
    evaluator(PairSaver(collect), pairs(4)).run()
    assert collect.numbers == [0, 1, 2, 3]


def test_items_hold_the_pair_and_the_results() -> None:
    collect = Collect()
    data = pairs(3)
    evaluator(PairSaver(collect), data, batch_size=2).run()
    for item, pair in zip(collect.items, data):
        assert {"moving_image", "fixed_image", "number", "pred", "warped_image"} <= item.keys()
        for key in ("moving_image", "fixed_image"):
            assert torch.equal(item[key].as_tensor(), pair[key].as_tensor())
            assert item[key].meta["filename_or_obj"] == pair[key].meta["filename_or_obj"]
        # without the axis of the batch
        assert tuple(item["pred"].shape) == (3, *SHAPE)
        assert tuple(item["warped_image"].shape) == (1, *SHAPE)
        torch.testing.assert_close(
            item["warped_image"].as_tensor()[:, :-1], pair["moving_image"].as_tensor()[:, 1:], atol=1e-5, rtol=0
        )


def test_every_evaluation_saves_anew() -> None:
    collect = Collect()
    engine = evaluator(PairSaver(collect, 2), pairs(3))
    for epoch in (1, 2, 3):
        engine.run(epoch)
    assert collect.numbers == [0, 1] * 3


def test_files_of_the_saved_pairs(tmp_path: Path) -> None:
    transform = Compose([DDFToDisplacementd(), SaveRegistrationd(tmp_path)])
    engine = evaluator(PairSaver(transform, 2), pairs(3))
    for epoch in (1, 2):
        engine.run(epoch)
    assert sorted(os.listdir(tmp_path)) == ["moving0_to_fixed0", "moving1_to_fixed1"]
    for i in range(2):
        folder = tmp_path / f"moving{i}_to_fixed{i}"
        assert sorted(os.listdir(folder)) == ["displacement.nii.gz", "warped.nii.gz"]
        # one voxel of 2 mm to the right is 2 mm against x in LPS
        field = np.asarray(nib.load(folder / "displacement.nii.gz").dataobj)
        np.testing.assert_allclose(field.reshape(-1, 3), np.tile([-2.0, 0, 0], (field.size // 3, 1)), atol=1e-6)
        warped = np.asarray(nib.load(folder / "warped.nii.gz").dataobj)
        np.testing.assert_allclose(warped[:-1], pairs(3)[i]["moving_image"][0, 1:].numpy(), atol=1e-5)


def test_metrics_do_not_see_what_the_transform_does() -> None:
    def spoil(item: dict[str, Any]) -> None:
        item.clear()

    engine = evaluator(PairSaver(spoil), pairs(2))
    outputs: list[set[str]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: outputs.append(set(engine.state.output[0])))
    engine.run()
    assert len(outputs) == 2 and all("pred" in keys for keys in outputs)


def test_errors_of_the_transform_are_not_swallowed() -> None:
    def fail(item: dict[str, Any]) -> None:
        raise OSError(f"no space for {item['number']}")

    with pytest.raises(OSError, match="no space for 0"):
        evaluator(PairSaver(fail), pairs(2)).run()
    # ... of a transform that is not called
    evaluator(PairSaver(fail, 0), pairs(2)).run()
