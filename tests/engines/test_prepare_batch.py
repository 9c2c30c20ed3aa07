# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.utils import CommonKeys

from monai_sacb.engines import PrepareRegistrationBatch

SHAPES: dict[str, tuple[int, ...]] = {
    "volumes": (1, 1, 4, 5, 6),
    "batch": (3, 1, 4, 5, 6),
    "channels": (2, 3, 4, 5, 6),
    "slices": (2, 1, 4, 5),
}


def batch(shape: tuple[int, ...], labels: tuple[str, ...] = (), meta: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {
        "fixed_image": torch.rand(shape, generator=generator),
        "moving_image": torch.rand(shape, generator=generator),
        "other": "x",
    }
    for key in labels:
        # label maps and fields of view
        result[key] = torch.randint(0, 3, (shape[0], 1, *shape[2:]), dtype=torch.uint8, generator=generator)
        if key.endswith("landmarks"):
            result[key] = torch.rand(shape[0], 7, len(shape) - 2, generator=generator)
    if meta:
        for i, key in enumerate(["fixed_image", "moving_image", *labels]):
            affine = torch.diag(torch.tensor([i + 1.0, 1, 1, 1], dtype=torch.float64))
            result[key] = MetaTensor(result[key], affine=affine, meta={"filename_or_obj": f"{key}.nii.gz"})
    return result


@pytest.mark.parametrize("meta", [False, True], ids=["plain", "meta"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_input_is_moving_then_fixed(shape: tuple[int, ...], meta: bool) -> None:
    data = batch(shape, meta=meta)
    image, target = PrepareRegistrationBatch()(data)
    channels = shape[1]
    assert tuple(image.shape) == (shape[0], 2 * channels, *shape[2:])
    assert torch.equal(image[:, :channels], torch.as_tensor(data["moving_image"]).as_subclass(torch.Tensor))
    assert torch.equal(image[:, channels:], torch.as_tensor(data["fixed_image"]).as_subclass(torch.Tensor))
    assert target.keys() == {"moving_image", "fixed_image"}


@pytest.mark.parametrize("meta", [False, True], ids=["plain", "meta"])
@pytest.mark.parametrize(
    "labels",
    [
        (),
        ("moving_label",),
        ("fixed_label",),
        ("moving_label", "fixed_label"),
        ("moving_field_of_view", "fixed_field_of_view"),
        ("fixed_field_of_view", "moving_label"),
        ("moving_landmarks", "fixed_landmarks"),
        ("fixed_landmarks", "moving_label"),
        ("moving_label", "fixed_label", "moving_field_of_view", "fixed_field_of_view"),
    ],
    ids=str,
)
def test_target_holds_what_the_batch_has(labels: tuple[str, ...], meta: bool) -> None:
    data = batch((2, 1, 4, 5, 6), labels, meta)
    image, target = PrepareRegistrationBatch()(data)
    assert target.keys() == {"moving_image", "fixed_image", *labels}
    for key, value in target.items():
        assert torch.equal(value, torch.as_tensor(data[key]).as_subclass(torch.Tensor)), key
        assert value.dtype == data[key].dtype
    # the meta data of two images cannot be those of one
    assert all(type(value) is torch.Tensor for value in (image, *target.values()))


def test_arrays_are_taken() -> None:
    data = batch((1, 1, 4, 5, 6), ("moving_label",))
    arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in data.items()}
    image, target = PrepareRegistrationBatch()(arrays)
    assert torch.equal(image, torch.cat([data["moving_image"], data["fixed_image"]], 1))
    assert torch.equal(target["moving_label"], data["moving_label"])


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["string", "device"])
def test_everything_goes_to_the_device(device: Any) -> None:
    image, target = PrepareRegistrationBatch()(batch((1, 1, 4, 5, 6), ("fixed_label",)), device, non_blocking=True)
    assert {value.device.type for value in (image, *target.values())} == {"meta"}
    assert tuple(image.shape) == (1, 2, 4, 5, 6)


def test_arguments_are_those_of_to() -> None:
    data = batch((1, 1, 4, 5, 6))
    image, target = PrepareRegistrationBatch()(data, dtype=torch.float64)
    assert image.dtype == target["moving_image"].dtype == torch.float64
    torch.testing.assert_close(image[:, :1], data["moving_image"].double())
    with pytest.raises(TypeError, match="colour"):
        PrepareRegistrationBatch()(data, colour="red")


@pytest.mark.parametrize("missing", ["moving_image", "fixed_image"])
def test_a_pair_has_two_images(missing: str) -> None:
    data = batch((1, 1, 4, 5, 6))
    del data[missing]
    with pytest.raises(KeyError, match=missing):
        PrepareRegistrationBatch()(data)


@pytest.mark.parametrize("shape", [(1, 1, 4, 5, 7), (2, 1, 4, 5, 6)], ids=["size", "batch"])
def test_images_of_different_shapes_are_refused(shape: tuple[int, ...]) -> None:
    data = {**batch((1, 1, 4, 5, 6)), "fixed_image": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        PrepareRegistrationBatch()(data)


class Difference(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.weight * (image[:, :1] - image[:, 1:])


def test_in_an_evaluator() -> None:
    pairs = [{key: value[0] for key, value in batch((1, 1, 4, 5, 6)).items()} for _ in range(3)]
    for i, pair in enumerate(pairs):
        pair["moving_image"] = pair["moving_image"] + i
    seen: list[torch.Tensor] = []
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(pairs), batch_size=1),
        network=Difference(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=lambda item: (seen.append(item[CommonKeys.PRED]), item)[1],
    )
    evaluator.run()
    assert len(seen) == 3
    for prediction, pair in zip(seen, pairs):
        torch.testing.assert_close(prediction, pair["moving_image"] - pair["fixed_image"])


def test_in_a_trainer() -> None:
    pairs = [{key: value[0] for key, value in batch((1, 1, 4, 5, 6)).items()} for _ in range(2)]
    network = Difference()
    targets: list[dict[str, torch.Tensor]] = []

    def loss(prediction: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
        targets.append(target)
        return (prediction - target["moving_image"]).square().mean()

    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(pairs), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=loss,
        prepare_batch=PrepareRegistrationBatch(),
    ).run()
    assert len(targets) == 1
    assert torch.equal(targets[0]["fixed_image"], torch.stack([p["fixed_image"] for p in pairs]))
    # the gradient of the loss arrived
    moving, fixed = targets[0]["moving_image"], targets[0]["fixed_image"]
    gradient = (2 * (moving - fixed - moving) * (moving - fixed)).mean()
    torch.testing.assert_close(network.weight.detach(), 1.0 - 0.1 * gradient)


ENTRIES = [f"{role}_{entry}" for entry in ("label", "field_of_view", "landmarks") for role in ("moving", "fixed")]


@pytest.mark.parametrize("meta", [False, True], ids=["plain", "meta"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_directions(shape: tuple[int, ...], meta: bool) -> None:
    data = batch(shape, (*ENTRIES, "moving_anatomy", "fixed_anatomy"), meta)
    image, target = PrepareRegistrationBatch(symmetric=True)(data)
    number, swapped = shape[0], {"moving": "fixed", "fixed": "moving"}
    assert len(image) == 2 * number and target.keys() == (data.keys() - {"other"}) | {"reverse"}
    assert all(type(value) is torch.Tensor for value in (image, *target.values()))
    for key in target.keys() - {"reverse"}:
        role, entry = key.split("_", 1)
        assert torch.equal(target[key][:number], torch.as_tensor(data[key])), key
        assert torch.equal(target[key][number:], torch.as_tensor(data[f"{swapped[role]}_{entry}"])), key
        assert torch.equal(target[f"{swapped[role]}_{entry}"][target["reverse"]], target[key]), key
    assert torch.equal(image, torch.cat([target["moving_image"], target["fixed_image"]], 1))
    assert torch.equal(target["reverse"].sort().values, torch.arange(2 * number))


def test_what_one_image_has_alone_has_no_other_direction() -> None:
    data = batch((2, 1, 4, 5, 6), ("moving_label", "fixed_field_of_view", "moving_landmarks", "fixed_landmarks"))
    _, target = PrepareRegistrationBatch(symmetric=True)(data)
    keys = {"moving_image", "fixed_image", "moving_landmarks", "fixed_landmarks", "reverse"}
    assert target.keys() == keys


@pytest.mark.parametrize("missing", ["moving_image", "fixed_image"])
def test_both_directions_need_two_images(missing: str) -> None:
    data = batch((1, 1, 4, 5, 6))
    del data[missing]
    with pytest.raises(KeyError, match=missing):
        PrepareRegistrationBatch(symmetric=True)(data)


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_symmetric_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=f"symmetric must be True or False, got {value!r}"):
        PrepareRegistrationBatch(symmetric=value)
