# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai.data import DataLoader, MetaTensor

from monai_sacb.data import PairDataset, collate_pairs
from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.losses import RegistrationLoss
from monai_sacb.networks.layers import warp
from monai_sacb.transforms import PointsToVoxelsd

SIZE = (4, 5, 6)


def image(seed: int) -> MetaTensor:
    return MetaTensor(torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(seed)))


def label(seed: int, dtype: torch.dtype = torch.uint8) -> MetaTensor:
    maps = torch.randint(3, (1, *SIZE), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return MetaTensor(maps, meta={"label_ids": "1 2"})


def points(seed: int, number: int) -> torch.Tensor:
    return 3 * torch.rand(number, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_batches_of_partly_labelled_subjects(num_workers: int, dtype: torch.dtype) -> None:
    subjects = [{"image": image(i), "label": label(i, dtype)} for i in range(3)]
    del subjects[2]["label"]
    pairs = [(0, 1), (1, 0), (0, 2), (0, 1), (2, 0), (2, 1)]
    dataset = PairDataset(subjects, pairs=pairs, progress=False)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate_pairs))
    # no moving subject of the last batch has labels: there is nothing to fill
    assert [{k for k in batch if k.endswith("label")} for batch in batches] == [
        {"moving_label", "fixed_label"},
        {"moving_label", "fixed_label"},
        {"fixed_label"},
    ]
    for batch, chosen in zip(batches, zip(pairs[::2], pairs[1::2])):
        for i, pair in enumerate(chosen):
            for role, subject in zip(("moving", "fixed"), pair):
                assert torch.equal(batch[f"{role}_image"][i].as_tensor(), subjects[subject]["image"].as_tensor())
                if f"{role}_label" in batch:
                    found = batch[f"{role}_label"][i].as_tensor()
                    assert (
                        torch.equal(found, subjects[subject]["label"].as_tensor())
                        if subject < 2
                        else (found == -1).all()
                    )
    assert "label" in subjects[0] and "label" not in subjects[2]
    assert subjects[0]["label"].dtype == dtype


def pair(seed: int, labels: bool, landmarks: int | None) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for k, role in enumerate(("moving", "fixed")):
        result[f"{role}_image"] = image(10 * seed + k)
        if labels:
            result[f"{role}_label"] = label(10 * seed + k)
        if landmarks is not None:
            result[f"{role}_points"] = points(10 * seed + k, landmarks)
    return dict(PointsToVoxelsd(allow_missing_keys=True)(result))


@pytest.mark.parametrize("other", [pair(1, False, None), pair(1, False, 5), pair(1, True, 1), pair(1, True, 0)])
def test_terms_of_a_mixed_batch_are_those_of_its_pairs(other: dict[str, torch.Tensor]) -> None:
    loss = RegistrationLoss(label_weight=1.0, num_labels=2, landmark_weight=0.5)
    field = 0.7 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))

    def terms(pairs: list[dict[str, torch.Tensor]], ddf: torch.Tensor) -> dict[str, float]:
        loss(ddf, PrepareRegistrationBatch()(collate_pairs(pairs))[1])
        return {name: float(value) for name, value in loss.last_terms.items()}

    both = [pair(0, True, 3), other]
    found = terms(both, field)
    alone = [terms([p], field[i : i + 1]) for i, p in enumerate(both)]
    # a term counts for the pairs that have what it compares
    counted = {
        "label": [a["label"] for a, p in zip(alone, both) if "fixed_label" in p],
        "landmarks": [a["landmarks"] for a, p in zip(alone, both) if len(p.get("fixed_landmarks", ()))],
    }
    for name, values in counted.items():
        assert found[name] > 0.05
        assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name


def test_landmarks_are_filled_with_nan() -> None:
    batch = collate_pairs([pair(0, True, 2), pair(1, True, 4), pair(2, True, None)])
    assert batch["fixed_landmarks"].shape == batch["moving_points"].shape == (3, 4, 3)
    assert batch["fixed_landmarks"].isnan().sum(1).tolist() == [[2] * 3, [0] * 3, [4] * 3]
    assert torch.equal(batch["moving_points"][0, :2], points(0, 2))


def test_nothing_is_added_where_nothing_differs() -> None:
    batch = collate_pairs([pair(0, False, None), pair(1, False, None)])
    assert set(batch) == {"moving_image", "fixed_image"}
    assert warp(batch["moving_image"], torch.zeros(2, 3, *SIZE)).shape == (2, 1, *SIZE)
    # what is no pair goes the way of MONAI
    assert collate_pairs([torch.ones(2), torch.zeros(2)]).shape == (2, 2)
