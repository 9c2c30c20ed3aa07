# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from torch.utils.data import RandomSampler

from monai.transforms import Compose, EnsureChannelFirstd
from monai.utils import set_determinism

from monai_sacb.data import (
    PairDataset,
    atlas_to_subject,
    convert_pickled_folder,
    describe_folder,
    load_request,
    load_subjects,
    make_pairs,
    read_pairs_csv,
    required_entries,
    subject_to_atlas,
)
from monai_sacb.transforms import LoadVolumed

SHAPE = (4, 5, 6)


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(SHAPE, dtype=np.float32), rng.choice([0, 2, 41, 255], SHAPE).astype(np.int32)


def pickled(folder: Path, names: dict[str, int], labelled: bool = True) -> Path:
    """A folder of pickled subjects; each name with the seed of its volumes."""
    for name, seed in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(volume(seed) if labelled else volume(seed)[0]))
    return folder


IXI = {f"Train/subject_{i}.pkl": i for i in (10, 2, 3)} | {"Val/subject_4.pkl": 4, "Val/subject_5.pkl": 5}
IXI |= {"Test/subject_6.pkl": 6, "atlas.pkl": 0}


def names(data: list[dict[str, str]]) -> list[str]:
    return [Path(subject["image"]).name.split(".")[0] for subject in data]


def named_pairs(request: dict[str, Any]) -> list[tuple[str, str]] | None:
    found = names(request["data"])
    return None if request["pairs"] is None else [(found[m], found[f]) for m, f in request["pairs"]]


@pytest.mark.parametrize("change", [str, str.lower, str.upper])
def test_folder_of_pickled_subjects(tmp_path: Path, change: Callable[[str], str]) -> None:
    files = {f"{change(Path(name).parts[0])}/{Path(name).name}": s for name, s in IXI.items() if "/" in name}
    folder = pickled(tmp_path, {**files, "atlas.pkl": 0})
    (folder / change("Train") / "._subject_2.pkl").write_bytes(b"left by a file system")
    (folder / change("Train") / "readme.txt").write_text("")
    assert names(load_subjects(folder)) == ["subject_10", "subject_2", "subject_3"]
    assert names(load_subjects(folder, "test")) == ["atlas", "subject_6"]
    assert set(names(load_subjects(folder, "validation"))) == {"atlas", "subject_4", "subject_5"}
    assert all(subject["label"] == subject["image"] for subject in load_subjects(folder))
    assert named_pairs(load_request(folder)) == [("atlas", "subject_4"), ("atlas", "subject_5")]


def test_folder_without_labels_or_atlas(tmp_path: Path) -> None:
    folder = pickled(tmp_path, {f"train/{i}.pkl": i for i in range(5)}, labelled=False)
    assert names(load_subjects(folder)) == ["0", "1", "2"]
    assert names(load_subjects(folder, "validation")) == ["3", "4"]
    assert all(set(subject) == {"image"} for subject in load_subjects(folder))
    assert make_pairs(folder, "validation")["pairs"] is None
    with pytest.raises(ValueError, match="names no atlas"):
        make_pairs(folder, "training", "atlas_to_subject")
    assert describe_folder(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError, match=r"no dataset\.json"):
        load_subjects(tmp_path / "nowhere")


def test_dataset_json_comes_first(tmp_path: Path) -> None:
    folder = pickled(tmp_path, IXI)
    entries = ["Train/subject_3.pkl", "Train/subject_2.pkl"]
    (folder / "dataset.json").write_text(json.dumps({"training": entries, "validation": ["Val/subject_4.pkl"]}))
    assert names(load_subjects(folder)) == ["subject_3", "subject_2"]


# strategy, section -> pairs
ATLAS_CASES: dict[str, tuple[str, str, list[tuple[str, str]] | None]] = {
    "all of training": ("all", "training", None),
    "none named in validation": ("auto", "validation", [("atlas", "subject_4"), ("atlas", "subject_5")]),
    "none named in training": ("auto", "training", None),
    "listed": ("listed", "test", [("atlas", "subject_6")]),
    "atlas to subject": (
        "atlas_to_subject",
        "training",
        [("atlas", "subject_10"), ("atlas", "subject_2"), ("atlas", "subject_3")],
    ),
    "subject to atlas": (
        "subject_to_atlas",
        "training",
        [("subject_10", "atlas"), ("subject_2", "atlas"), ("subject_3", "atlas")],
    ),
    "in validation": ("subject_to_atlas", "validation", [("subject_4", "atlas"), ("subject_5", "atlas")]),
    "in test": ("atlas_to_subject", "test", [("atlas", "subject_6")]),
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("strategy", "section", "expected"), ATLAS_CASES.values(), ids=ATLAS_CASES)
def test_strategies(
    tmp_path: Path, strategy: str, section: str, expected: list[tuple[str, str]] | None, converted: bool
) -> None:
    folder = pickled(tmp_path / "pkl", IXI)
    if converted:
        folder = Path(convert_pickled_folder(folder, tmp_path / "nifti"))
    request = make_pairs(folder, section, strategy)
    found = named_pairs(request)
    assert found == expected if expected is None else sorted(found or []) == sorted(expected)
    # the atlas does not move to itself, and is there once
    assert names(request["data"]).count("atlas") == (0 if expected is None else 1)
    keys = ["image", "label"]
    dataset = PairDataset(
        request["data"], Compose([LoadVolumed(keys), EnsureChannelFirstd(keys)]), request["pairs"], progress=False
    )
    seeds = {Path(name).stem: seed for name, seed in IXI.items()}
    for i, (moving, fixed) in enumerate(expected or ()):
        j = (found or []).index((moving, fixed))
        for role, name in (("moving", moving), ("fixed", fixed)):
            for key, array in zip(keys, volume(seeds[name])):
                np.testing.assert_array_equal(dataset[j][f"{role}_{key}"][0], array)
        assert i < len(dataset)


def test_atlas_given_by_the_user(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "pkl", IXI)
    other = str(pickled(tmp_path, {"mine.pkl": 9}) / "mine.pkl")
    request = make_pairs(folder, "training", "atlas_to_subject", other)
    assert request["data"][-1] == {"image": other, "label": other}
    assert request["pairs"] == [(3, 0), (3, 1), (3, 2)]
    # a subject as the atlas is not appended again
    inside = str(folder / "Train" / "subject_2.pkl")
    request = make_pairs(folder, "training", "subject_to_atlas", {"image": inside})
    assert len(request["data"]) == 3 and request["pairs"] == [(0, 1), (2, 1)]


def test_pairs_listed_for_training(tmp_path: Path) -> None:
    folder = pickled(tmp_path, IXI)
    pair = {"moving": "Train/subject_2.pkl", "fixed": "Train/subject_3.pkl"}
    held_out = {"moving": "Val/subject_4.pkl", "fixed": "Train/subject_3.pkl"}
    content = {
        "training": sorted(name for name in IXI if "Train" in name),
        "validation": ["Val/subject_4.pkl", "Val/subject_5.pkl"],
        "training_paired_images": [pair, held_out],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    assert named_pairs(make_pairs(folder, "training", "listed")) == [("subject_2", "subject_3")]
    with pytest.raises(ValueError, match="no list 'registration_val'"):
        make_pairs(folder, "validation", "listed")


def test_pairs_as_functions() -> None:
    assert atlas_to_subject(4, 1) == [(1, 0), (1, 2), (1, 3)]
    assert subject_to_atlas(4, 3) == [(0, 3), (1, 3), (2, 3)]
    for function, index in itertools.product((atlas_to_subject, subject_to_atlas), (-1, 4)):
        with pytest.raises(ValueError, match=f"got {index}"):
            function(4, index)


def test_pairs_of_a_csv_file(tmp_path: Path) -> None:
    pickled(tmp_path, {"a.pkl": 1, "b.pkl": 2})
    nib.save(nib.Nifti1Image(volume(3)[0], np.eye(4)), tmp_path / "c d.nii.gz")
    nib.save(nib.Nifti1Image(volume(3)[1], np.eye(4)), tmp_path / "c_label.nii.gz")
    (tmp_path / "pairs.csv").write_bytes(
        b"\xef\xbb\xbffixed, moving,moving_label\r\nb.pkl,./a.pkl,\r\n\r\n"
        b'a.pkl,"c d.nii.gz",c_label.nii.gz\r\nc d.nii.gz,a.pkl,\r\n'
    )
    for request in (read_pairs_csv(tmp_path / "pairs.csv"), make_pairs(None, "test", str(tmp_path / "pairs.csv"))):
        a, b = str(tmp_path / "a.pkl"), str(tmp_path / "b.pkl")
        image, label = str(tmp_path / "c d.nii.gz"), str(tmp_path / "c_label.nii.gz")
        assert request == {
            "data": [{"image": a, "label": a}, {"image": b, "label": b}, {"image": image, "label": label}],
            "pairs": [(0, 1), (2, 0), (0, 2)],
        }


# content of the file and message
BAD_CSV: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"must begin with"),
    "no header": (b"a.pkl,b.pkl\n", r"moving,fixed .* got 'a\.pkl,b\.pkl'"),
    "one column": (b"moving\na.pkl\n", r"got 'moving'"),
    "unknown column": (b"moving,fixed,label\na.pkl,b.pkl,\n", r"got 'moving,fixed,label'"),
    "column twice": (b"moving,fixed,fixed\na.pkl,b.pkl,b.pkl\n", r"fixed,fixed"),
    "semicolons": (b"moving;fixed\na.pkl;b.pkl\n", r"got 'moving;fixed'"),
    "no pairs": (b"moving,fixed\n\n", r"lists no pairs"),
    "too few values": (b"moving,fixed\na.pkl\n", r"line 2 must have 2 values, got 1"),
    "too many values": (b"moving,fixed\na.pkl,b.pkl\na.pkl,b.pkl,x\n", r"line 3 must have 2 values, got 3"),
    "empty path": (b"moving,fixed\na.pkl,\n", r"line 2: fixed is empty"),
    "missing file": (b"moving,fixed\na.pkl,c.pkl\n", r"line 2: fixed: image '.*c\.pkl' does not exist"),
    "missing label": (b"moving,fixed,moving_label\na.pkl,b.pkl,c.pkl\n", r"line 2: moving: label .* does not exist"),
    "two labels": (
        b"moving,fixed,moving_label\na.pkl,b.pkl,a.pkl\na.pkl,b.pkl,b.pkl\n",
        r"line 3 gives '.*a\.pkl' another label",
    ),
    "not text": (b"moving,fixed\n\xff\xfe\x00,b\n", r"not a CSV file in UTF-8"),
    "open quotes": (b'moving,fixed\n"a.pkl,b.pkl\n', r"not a CSV file"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv_file(tmp_path: Path, content: bytes, message: str) -> None:
    pickled(tmp_path, {"a.pkl": 1, "b.pkl": 2})
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_pairs_csv(tmp_path / "pairs.csv")
    assert "pairs.csv" in str(caught.value) and "\n" not in str(caught.value)


ILL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown strategy": ({"strategy": "random"}, r"'random'"),
    "unknown section": ({"section": "train"}, r"'train'"),
    "no dataset": ({"dataset_dir": None}, r"need a dataset_dir"),
    "atlas without use": ({"atlas": "atlas.pkl"}, r"got 'auto'"),
    "atlas for a CSV": ({"atlas": "atlas.pkl", "strategy": "a.csv"}, r"got 'a\.csv'"),
    "missing atlas": ({"atlas": "mine.pkl", "strategy": "atlas_to_subject"}, r"mine\.pkl' does not exist"),
    "missing CSV": ({"strategy": "mine.csv"}, r"no file of pairs at '.*mine\.csv'"),
    "no pairs listed": ({"strategy": "listed"}, r"training_paired_images"),
}


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES.values(), ids=ILL_CASES)
def test_ill_formed(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = pickled(tmp_path, IXI)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_pairs(**{"dataset_dir": folder, **arguments})


def test_conversion(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "pkl", IXI)
    target = Path(convert_pickled_folder(folder, tmp_path / "nifti"))
    content = json.loads((target / "dataset.json").read_text())
    assert [len(content[section]) for section in ("training", "validation", "test")] == [3, 2, 1]
    assert content["numTraining"] == 3 and content["atlas"] == {
        "image": "./atlas.nii.gz",
        "label": "./atlas_label.nii.gz",
    }
    assert len(content["registration_val"]) == 2 and len(content["registration_test"]) == 1
    for entry in [*content["training"], *content["validation"], *content["test"]]:
        seed = int(Path(entry["image"]).name.split("_")[1].split(".")[0])
        for key, expected in zip(("image", "label"), volume(seed)):
            image = nib.load(target / entry[key])
            np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
            np.testing.assert_array_equal(image.affine, np.eye(4))
        assert nib.load(target / entry["label"]).get_data_dtype() == np.uint8
    # nothing temporary, and nothing is made twice
    files = {path: path.stat().st_mtime_ns for path in target.rglob("*.nii.gz")}
    assert len(files) == 14 and not [path for path in target.rglob("*") if path.name.startswith(".")]
    gone = target / content["training"][1]["label"]
    gone.unlink()
    convert_pickled_folder(folder, target)
    again = {path: path.stat().st_mtime_ns for path in target.rglob("*.nii.gz")}
    assert {path for path in files if again[path] != files[path]} == {gone}


def test_conversion_stops_at_a_bad_file_and_goes_on(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "pkl", IXI)
    bad = folder / "Train" / "subject_3.pkl"
    for content, message in (
        (b"no pickle", r"subject_3\.pkl' is not a whole pickle"),
        (pickle.dumps(volume(3)[0]), r"subject_3\.pkl' holds 1 arrays instead of 2"),
        (pickle.dumps((volume(3)[0], volume(3)[0])), r"subject_3\.pkl': the label map has values that are no whole"),
        (pickle.dumps((volume(3)[0], volume(3)[1][1:])), r"subject_3\.pkl': the image has size \(4, 5, 6\)"),
        (pickle.dumps((np.ones(3), np.ones(3))), r"subject_3\.pkl': the image has 1 dimensions"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert_pickled_folder(folder, tmp_path / "nifti")
        assert not (tmp_path / "nifti" / "dataset.json").exists()
    pickled(folder, {"Train/subject_3.pkl": 3})
    convert_pickled_folder(folder, tmp_path / "nifti")
    assert len(load_subjects(tmp_path / "nifti")) == 3


def test_conversion_of_other_files_into_the_same_folder(tmp_path: Path) -> None:
    target = tmp_path / "nifti"
    convert_pickled_folder(pickled(tmp_path / "first", IXI), target)
    shifted = {name: seed + 20 for name, seed in IXI.items()}
    convert_pickled_folder(pickled(tmp_path / "second", shifted), target)
    for entry in json.loads((target / "dataset.json").read_text())["training"]:
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        for key, expected in zip(("image", "label"), volume(shifted[f"Train/{name}.pkl"])):
            np.testing.assert_array_equal(np.asarray(nib.load(target / entry[key]).dataobj), expected)
    (target / "dataset.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match=r"dataset\.json' is there already"):
        convert_pickled_folder(tmp_path / "first", target)


def test_folders_of_pickles_with_and_without_labels(tmp_path: Path) -> None:
    folder = pickled(tmp_path, IXI)
    first = min((folder / "Train").iterdir())
    first.write_bytes(pickle.dumps(volume(1)[0]))
    with pytest.raises(ValueError, match=rf"holds a label map, but '.*{first.name}' of the same folder holds none"):
        describe_folder(folder)
    first.write_bytes(pickle.dumps((*volume(1), volume(2)[0])))
    with pytest.raises(ValueError, match=rf"{first.name}' must hold an image and perhaps its label map, got 3 arrays"):
        describe_folder(folder)


def test_the_atlas_has_the_label_map_that_the_lists_give_it(tmp_path: Path) -> None:
    folder = Path(convert_pickled_folder(pickled(tmp_path / "pkl", IXI), tmp_path / "nifti"))
    content = json.loads((folder / "dataset.json").read_text())
    entry = content["training"][0]
    atlas = str(folder / entry["image"])
    given = make_pairs(folder, "validation", "atlas_to_subject", atlas)
    content["atlas"] = entry["image"]
    (folder / "dataset.json").write_text(json.dumps(content))
    for request in (given, make_pairs(folder, "validation", "atlas_to_subject")):
        subject = request["data"][request["pairs"][0][0]]
        assert subject["image"] == str(Path(atlas)) and Path(subject["label"]) == folder / entry["label"]


def test_conversion_of_the_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' has no folder Train"):
        convert_pickled_folder(tmp_path / "nowhere", tmp_path / "nifti")
    folder = pickled(tmp_path / "pkl", IXI)
    with pytest.raises(ValueError, match="other than input_dir"):
        convert_pickled_folder(folder, folder)


def test_random_pairs_of_many_subjects() -> None:
    """As the bundle draws them: other pairs in each epoch, the same ones again from the same seed."""
    dataset = PairDataset([{"image": i} for i in range(300)], cache_rate=0.0)
    assert len(dataset) == 89700

    def epochs() -> list[list[int]]:
        set_determinism(7)
        sampler = RandomSampler(dataset, num_samples=500)
        return [list(sampler) for _ in range(3)]

    first, second = epochs(), epochs()
    set_determinism(None)
    assert first == second
    assert first[0] != first[1] != first[2]
    assert all(len(set(epoch)) == 500 and max(epoch) > 80000 for epoch in first)


def test_entries_that_a_training_needs() -> None:
    assert required_entries(label=1, points=0.0) == ["label"]
    assert required_entries(label=0.5, points=2.0) == ["label", "points"]
    for weight in ("abc", -1, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match=rf"the loss of label must be .* got {weight!r}"):
            required_entries(label=weight)  # type: ignore[arg-type]
