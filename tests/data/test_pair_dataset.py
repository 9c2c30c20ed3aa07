# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, MapTransform, Transform

from monai_sacb.data import PairDataset
from monai_sacb.transforms import LoadVolumed, SelectLabelsd

LOGGER = "monai_sacb.data.pair_dataset"


class Count(MapTransform):
    """Replaces the number of a subject by a tensor, and counts how often it did for each."""

    def __init__(self, keys: Sequence[str] = ("image",)) -> None:
        super().__init__(keys)
        self.calls: Counter[int] = Counter()
        self.lock = threading.Lock()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        with self.lock:
            self.calls[data["image"]] += 1
        return {**data, **{key: torch.full((1, 2), float(data[key])) for key in self.keys}}


class Squared(Transform):
    """A pair transform with an output that depends on both images."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, "difference": data["moving_image"] - data["fixed_image"]}


def subjects(number: int) -> list[dict[str, Any]]:
    return [{"image": i} for i in range(number)]


def numbers(item: Mapping[str, Any]) -> tuple[int, int]:
    return int(item["moving_image"].flatten()[0]), int(item["fixed_image"].flatten()[0])


def labelled(folder: Path, label_values: Sequence[Sequence[int] | None]) -> list[dict[str, str]]:
    """Subjects on disk whose label maps hold these values; None for a subject without label map."""
    data = []
    for i, values in enumerate(label_values):
        files = {"image": np.full((3, 3, 3), i, np.float32)}
        if values is not None:
            files["label"] = np.resize(np.array([0, *values], np.int16), (3, 3, 3))
        paths = {}
        for key, array in files.items():
            paths[key] = str(folder / f"{key}_{i}.nii.gz")
            nib.save(nib.Nifti1Image(array, np.eye(4)), paths[key])
        data.append(paths)
    return data


def label_transform(label_ids: Sequence[int]) -> Compose:
    return Compose(
        [
            LoadVolumed(["image", "label"], allow_missing_keys=True),
            EnsureChannelFirstd(["image", "label"], allow_missing_keys=True),
            SelectLabelsd("label", label_ids, allow_missing_keys=True),
        ]
    )


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_every_ordered_pair_once(number: int) -> None:
    dataset = PairDataset(subjects(number), Count(), progress=False)
    assert len(dataset) == number * (number - 1)
    found = [numbers(dataset[i]) for i in range(len(dataset))]
    assert sorted(found) == sorted(itertools.permutations(range(number), 2))
    assert found == [dataset.pair_indices(i) for i in range(len(dataset))]
    # iteration ends by itself
    assert [numbers(item) for item in itertools.islice(dataset, 1000)] == found


@pytest.mark.parametrize("pairs", [[(2, 0), (0, 2), (1, 3), (2, 0)], [[3, 1]], np.array([[1, 2], [3, 0]]), [(1, 1)]])
def test_given_pairs_are_moving_then_fixed(pairs: Any) -> None:
    dataset = PairDataset(subjects(4), Count(), pairs=pairs, progress=False)
    expected = [(int(m), int(f)) for m, f in pairs]
    assert len(dataset) == len(expected)
    assert [numbers(dataset[i]) for i in range(len(dataset))] == expected


@pytest.mark.parametrize("pairs", [None, [(2, 0), (0, 1)]])
def test_negative_index(pairs: list[tuple[int, int]] | None) -> None:
    dataset = PairDataset(subjects(3), Count(), pairs=pairs, progress=False)
    for i in range(len(dataset)):
        assert numbers(dataset[i - len(dataset)]) == numbers(dataset[i])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=rf"index {index}\b"):
            dataset[index]


@pytest.mark.parametrize("num_workers", [None, 1, 2])
def test_each_subject_is_transformed_once(num_workers: int | None) -> None:
    count = Count()
    dataset = PairDataset(subjects(5), count, num_workers=num_workers, progress=False)
    for _ in range(2):
        for i in range(len(dataset)):
            dataset[i]
    assert count.calls == dict.fromkeys(range(5), 1)


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(tmp_path, [[1], [1], [1]])
    read: list[str] = []
    load = nib.load
    monkeypatch.setattr(
        nib, "load", lambda path, *args, **kwargs: (read.append(str(path)), load(path, *args, **kwargs))[1]
    )
    dataset = PairDataset(data, label_transform([1]), label_ids=[1], progress=False)
    items = [dataset[i] for i in range(len(dataset))]
    assert sorted(read) == sorted(path for subject in data for path in subject.values())
    assert [numbers(item) for item in items] == list(itertools.permutations(range(3), 2))


def test_without_cache_the_same_pairs() -> None:
    count = Count()
    dataset = PairDataset(subjects(3), count, cache_rate=0.0, progress=False)
    assert not count.calls
    assert [numbers(dataset[i]) for i in range(6)] == list(itertools.permutations(range(3), 2))
    assert count.calls == dict.fromkeys(range(3), 4)


def test_entries_of_both_subjects() -> None:
    data = [{"image": i, "label": 10 + i, "name": f"s{i}"} for i in range(3)]
    del data[1]["label"]
    transform = Lambdad(["image", "label"], lambda x: torch.full((1,), float(x)), allow_missing_keys=True)
    dataset = PairDataset(data, transform, pairs=[(2, 0), (0, 1)], progress=False)
    first, second = dataset[0], dataset[1]
    assert {key: value if isinstance(value, str) else float(value) for key, value in first.items()} == {
        "pair_index": 0,
        "moving_image": 2,
        "moving_label": 12,
        "moving_name": "s2",
        "fixed_image": 0,
        "fixed_label": 10,
        "fixed_name": "s0",
    }
    assert set(second) == {"pair_index", "moving_image", "moving_label", "moving_name", "fixed_image", "fixed_name"}


def test_pair_transform_sees_the_pair_and_not_the_cache() -> None:
    count = Count()
    dataset = PairDataset(subjects(3), count, pair_transform=Squared(), progress=False)
    for i, (moving, fixed) in enumerate(itertools.permutations(range(3), 2)):
        assert dataset[i]["difference"].tolist() == [[moving - fixed] * 2]
    # entries that a transform replaces or adds stay with the pair
    replaced = PairDataset(
        subjects(3),
        count,
        pair_transform=Lambdad(["moving_image"], lambda x: x + 100, overwrite=True),
        progress=False,
    )
    assert [numbers(replaced[0]) for _ in range(3)] == [(100, 1)] * 3
    assert set(replaced.subjects[0]) == {"image"}


def test_dataset_of_subjects_is_used_as_it_is() -> None:
    count = Count()
    own = Dataset(subjects(3), count)
    dataset = PairDataset(own, pair_transform=Squared())
    assert dataset.subjects is own
    assert not count.calls
    assert dataset.num_subjects == 3
    assert [numbers(dataset[i]) for i in range(len(dataset))] == list(itertools.permutations(range(3), 2))
    assert dataset[0]["difference"].tolist() == [[-1.0, -1.0]]
    # its own affair whether it keeps anything
    assert sum(count.calls.values()) == 14


def test_pairs_of_a_dataset_of_subjects() -> None:
    dataset = PairDataset(Dataset(subjects(4), Count()), pairs=[(3, 1), (0, 2)])
    assert [numbers(dataset[i]) for i in range(2)] == [(3, 1), (0, 2)]
    with pytest.raises(ValueError, match=r"\(4, 0\)"):
        PairDataset(Dataset(subjects(4), Count()), pairs=[(3, 1), (4, 0)])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_a_data_loader(num_workers: int) -> None:
    dataset = PairDataset(subjects(3), Count(), progress=False)
    batches = list(DataLoader(dataset, batch_size=2, num_workers=num_workers))
    assert [b["moving_image"][:, 0, 0].tolist() for b in batches] == [[0, 0], [1, 1], [2, 2]]
    assert [b["fixed_image"][:, 0, 0].tolist() for b in batches] == [[1, 2], [0, 2], [0, 1]]


# label values of the subjects, configured ids -> ids that are logged as not configured
EXTRA: dict[str, tuple[list[Sequence[int] | None], list[int], list[int]]] = {
    "as configured": ([[1, 2], [2, 1]], [1, 2], []),
    "spread over the subjects": ([[1], [2], [3]], [3, 1, 2], []),
    "one more": ([[1, 2, 7], [1]], [2, 1], [7]),
    "several more": ([[1, 40], [300, 1], [-3]], [1], [-3, 40, 300]),
    "unlabelled subjects": ([None, [1, 9], None], [1], [9]),
}


@pytest.mark.parametrize(("values", "label_ids", "extra"), EXTRA.values(), ids=EXTRA)
def test_label_ids_that_are_not_configured_are_logged(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    values: list[Sequence[int] | None],
    label_ids: list[int],
    extra: list[int],
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        dataset = PairDataset(
            labelled(tmp_path, values), label_transform(label_ids), label_ids=label_ids, progress=False
        )
    messages = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    messages = [message for message in messages if "not configured" in message]
    assert len(messages) == bool(extra)
    if extra:
        assert str(extra) in messages[0]
    # the values themselves: configured ones numbered anew, others background
    for (moving, _), item in zip(itertools.permutations(range(len(values)), 2), dataset):
        expected = {0} | {label_ids.index(v) + 1 for v in values[moving] or () if v in label_ids}
        if values[moving] is None:
            assert "moving_label" not in item
        else:
            assert set(torch.unique(item["moving_label"].as_tensor()).tolist()) == expected


@pytest.mark.parametrize(
    ("values", "label_ids", "missing"),
    [
        ([[1, 2], [1]], [1, 2, 3], [3]),
        ([[1, 2], None], [7, 1, 5], [5, 7]),
        ([[0], [0]], [1], [1]),
    ],
    ids=["one", "several", "empty label maps"],
)
def test_label_ids_that_nobody_has_are_refused(
    tmp_path: Path, values: list[Sequence[int] | None], label_ids: list[int], missing: list[int]
) -> None:
    labels = sum(v is not None for v in values)
    with pytest.raises(ValueError, match=rf"label ids \[{', '.join(map(str, missing))}\] .* none of the {labels} "):
        PairDataset(labelled(tmp_path, values), label_transform(label_ids), label_ids=label_ids, progress=False)


@pytest.mark.parametrize("disk", [False, True])
def test_wrong_label_ids_are_refused_without_a_full_cache(tmp_path: Path, disk: bool) -> None:
    cache: dict[str, Any] = {"cache_dir": tmp_path / "cache"} if disk else {"cache_rate": 0.0}
    data = labelled(tmp_path, [None, [1, 2], [3]])
    with pytest.raises(ValueError, match=r"label ids \[3, 7\] .*; found are \[0, 1, 2\]"):
        PairDataset(data, label_transform([7, 3]), label_ids=[7, 3], **cache)
    # some of them, or an image beside all labels, prove nothing
    PairDataset(data, label_transform([7, 2]), label_ids=[7, 2], **cache)
    PairDataset(labelled(tmp_path, [[0], [1]]), label_transform([1]), label_ids=[1], **cache)


@pytest.mark.parametrize(
    ("label_ids", "missing"), [([1, 2, 3], [3]), ([9, 1, 7], [7, 9]), ([2, 1], [])], ids=["one", "several", "none"]
)
def test_missing_label_ids_may_be_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, label_ids: list[int], missing: list[int]
) -> None:
    data = labelled(tmp_path, [[1, 2], [1]])
    with caplog.at_level(logging.INFO, LOGGER):
        dataset = PairDataset(data, label_transform(label_ids), label_ids=label_ids, all_labels=False, progress=False)
    warnings = [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno == logging.WARNING]
    assert len(warnings) == bool(missing)
    assert not missing or f"label ids {missing} " in warnings[0]
    assert set(torch.unique(dataset[1]["fixed_label"].as_tensor()).tolist()) == {
        0,
        *(i for i, label_id in enumerate(label_ids, start=1) if label_id in (1, 2)),
    }


def test_if_no_label_id_is_there_it_is_an_error(tmp_path: Path) -> None:
    data = labelled(tmp_path, [[1, 2], [1]])
    for all_labels in (True, False):
        with pytest.raises(ValueError, match=r"label ids \[7, 9\] .* found are \[0, 1, 2\]"):
            PairDataset(data, label_transform([9, 7]), label_ids=[9, 7], all_labels=all_labels, progress=False)


def test_label_ids_of_data_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        dataset = PairDataset(labelled(tmp_path, [None, None]), label_transform([1]), label_ids=[1], progress=False)
    assert [numbers(item) for item in dataset] == [(0, 1), (1, 0)]
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_label_ids_of_a_dataset_of_subjects(tmp_path: Path) -> None:
    data = Dataset(labelled(tmp_path, [[1], [2]]), label_transform([1, 2]))
    assert len(PairDataset(data, label_ids=[1, 2])) == 2
    with pytest.raises(ValueError, match=r"label ids \[3\]"):
        PairDataset(Dataset(labelled(tmp_path, [[1], [2]]), label_transform([1, 3])), label_ids=[1, 3])


def test_cached_labels_keep_their_geometry(tmp_path: Path) -> None:
    dataset = PairDataset(labelled(tmp_path, [[1], [1]]), label_transform([1]), progress=False)
    item = dataset[0]
    for key in ("moving_image", "fixed_image", "moving_label", "fixed_label"):
        assert isinstance(item[key], MetaTensor)
        assert Path(str(item[key].meta["filename_or_obj"])).name.startswith(key.split("_")[1])
    assert Path(str(item["moving_image"].meta["filename_or_obj"])).name == "image_0.nii.gz"
    assert Path(str(item["fixed_image"].meta["filename_or_obj"])).name == "image_1.nii.gz"


# (arguments, message)
ILL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no subjects": ({"data": []}, r"subjects is empty"),
    "no subjects but pairs": ({"data": [], "pairs": [(0, 1)]}, r"subjects is empty"),
    "empty dataset": ({"data": Dataset([])}, r"subjects is empty"),
    "one subject": ({"data": subjects(1)}, r"got 1"),
    "no pairs": ({"data": subjects(3), "pairs": []}, r"pairs is empty"),
    "index too large": ({"data": subjects(3), "pairs": [(0, 1), (1, 3)]}, r"below 3, got \(1, 3\)"),
    "negative index": ({"data": subjects(3), "pairs": [(-1, 1)]}, r"below 3, got \(-1, 1\)"),
    "three of a kind": ({"data": subjects(3), "pairs": [(0, 1, 2)]}, r"got \(0, 1, 2\)"),
    "single": ({"data": subjects(3), "pairs": [(0,)]}, r"got \(0,\)"),
    "transform of a dataset": ({"data": Dataset(subjects(3)), "transform": Count()}, r"transform"),
}


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES.values(), ids=ILL_CASES)
def test_ill_formed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairDataset(**arguments, progress=False)


def test_one_subject_with_itself() -> None:
    # a pair that is asked for is given, also of a single subject
    assert numbers(PairDataset(subjects(1), Count(), pairs=[(0, 0)], progress=False)[0]) == (0, 0)
