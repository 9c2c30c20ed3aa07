# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_sacb.data import load_pairs, load_request, load_subjects

LOGGER = "monai_sacb.data.datalist"


def write_volume(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4), dtype=np.uint8), np.eye(4)), path)


def write_dataset(folder: Path, names: Sequence[str], content: Any, labels: bool = True) -> Path:
    """A folder with tiny volumes ``images/<name>.nii.gz`` (and ``labels``) and a dataset.json."""
    for name in names:
        write_volume(folder / "images" / f"{name}.nii.gz")
        if labels:
            write_volume(folder / "labels" / f"{name}.nii.gz")
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def entry(name: str) -> dict[str, str]:
    return {"image": f"./images/{name}.nii.gz", "label": f"./labels/{name}.nii.gz"}


def image(name: str) -> str:
    return f"./images/{name}.nii.gz"


def image_names(subjects: Sequence[dict[str, str]]) -> list[str]:
    return [Path(subject["image"]).name.split(".")[0] for subject in subjects]


def pair(moving: str, fixed: str) -> dict[str, str]:
    return {"fixed": image(fixed), "moving": image(moving)}


# content of dataset.json for subjects a ... f -> the names that are trained on, and evaluated on
SPLITS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "validation list": (
        {"training": [entry(n) for n in "acb"], "validation": [entry(n) for n in "fd"]},
        ["a", "c", "b"],
        ["f", "d"],
    ),
    "strings": (
        {"training": [image(n) for n in "abc"], "validation": [image("d")]},
        ["a", "b", "c"],
        ["d"],
    ),
    "strings and objects": (
        {"training": [image("a"), entry("b"), image("c")], "validation": [entry("d")]},
        ["a", "b", "c"],
        ["d"],
    ),
    "validation subjects in the training list": (
        {"training": [entry(n) for n in "abcde"], "validation": [image("b"), image("d")]},
        ["a", "c", "e"],
        ["b", "d"],
    ),
    "pairs of training subjects": (
        {"training": [entry(n) for n in "abcdef"], "registration_val": [pair("e", "b"), pair("b", "e")]},
        ["a", "c", "d", "f"],
        ["e", "b"],
    ),
    "pairs of subjects that no list names": (
        {"training": [entry(n) for n in "abc"], "registration_val": [pair("e", "f")]},
        ["a", "b", "c"],
        ["e", "f"],
    ),
    "validation list and pairs": (
        {
            "training": [entry(n) for n in "abcd"],
            "validation": [entry("f")],
            "registration_val": [pair("d", "f")],
        },
        ["a", "b", "c"],
        ["f", "d"],
    ),
    "other spelling of one path": (
        {"training": [entry(n) for n in "abc"], "validation": [{"image": "images/../labels/.././images//b.nii.gz"}]},
        ["a", "c"],
        ["b"],
    ),
    "test lists are neither": (
        {
            "training": [entry(n) for n in "abc"],
            "validation": [entry("d")],
            "test": [image("e")],
            "registration_test": [pair("e", "f")],
        },
        ["a", "b", "c"],
        ["d"],
    ),
    "empty validation list": (
        {"training": [entry(n) for n in "fbdaec"], "validation": [], "registration_val": []},
        ["b", "d", "a", "c"],
        ["e", "f"],
    ),
}


@pytest.mark.parametrize(("content", "training", "validation"), SPLITS.values(), ids=SPLITS)
def test_who_is_trained_on_and_who_is_evaluated(
    tmp_path: Path, content: dict[str, Any], training: list[str], validation: list[str]
) -> None:
    folder = write_dataset(tmp_path, "abcdef", content)
    trained = load_subjects(folder)
    evaluated = load_subjects(folder, "validation")
    assert image_names(trained) == training
    assert image_names(evaluated) == validation
    for subject in [*trained, *evaluated]:
        assert all(Path(path).is_file() for path in subject.values())
    assert not {s["image"] for s in trained} & {s["image"] for s in evaluated}


def test_labels_and_other_files_come_with_the_subject(tmp_path: Path) -> None:
    # what is no file is passed over
    training = [{**entry(n), "mask": f"labels/{n}.nii.gz", "age": 30, "id": f"subject {n}"} for n in "abc"]
    content = {"training": training, "validation": [entry("d")], "registration_val": [pair("b", "d")]}
    folder = write_dataset(tmp_path, "abcd", content)
    (a, _) = load_subjects(folder)
    assert a == {
        "image": str(tmp_path / "images" / "a.nii.gz"),
        "label": str(tmp_path / "labels" / "a.nii.gz"),
        "mask": str(tmp_path / "labels" / "a.nii.gz"),
    }
    # the pair names the image only; the label is known from the training list
    d, b = load_subjects(folder, "validation")
    assert image_names([d, b]) == ["d", "b"]
    assert b["label"] == str(tmp_path / "labels" / "b.nii.gz")
    assert b["mask"] == b["label"]
    assert set(d) == {"image", "label"}


@pytest.mark.parametrize(
    "listed",
    [
        {"points": "keypointsTr/{}.csv"},
        {"keypoints": "./keypointsTr/{}.csv"},
        # as in the lists of the challenge
        {"keypoints": "./keypointsTr/{}.nii.gz"},
        {"points": "keypointsTr/{}.csv", "keypoints": "absent.csv"},
    ],
    ids=str,
)
def test_points(tmp_path: Path, listed: dict[str, str]) -> None:
    training = [{**entry(n), **{key: path.format(n) for key, path in listed.items()}} for n in "abcd"]
    content = {"training": training, "registration_val": [pair("c", "d")], "registration_test": [pair("c", "d")]}
    folder = write_dataset(tmp_path, "abcd", content)
    (folder / "keypointsTr").mkdir()
    for name in "abcd":
        (folder / "keypointsTr" / f"{name}.csv").write_text("1,2,3\n")
    for subjects in (load_subjects(folder), load_subjects(folder, "validation"), load_request(folder)["data"]):
        assert len(subjects) == 2
        for subject in subjects:
            assert subject.keys() == {"image", "label", "points"}
            assert subject["points"] == subject["image"].replace("images", "keypointsTr").replace(".nii.gz", ".csv")


def test_test_subjects_are_not_trained_on(tmp_path: Path) -> None:
    # that test images are not there is common: only some get them
    content = {"training": [entry(n) for n in "abcdefg"], "test": [entry("a"), "images/none.nii.gz"]}
    folder = write_dataset(tmp_path, "abcdefg", {**content, "registration_test": [pair("b", "c")]})
    assert image_names(load_subjects(folder)) == ["d", "e"]
    assert image_names(load_subjects(folder, "validation")) == ["f", "g"]


def test_all_mentions_of_a_subject_count(tmp_path: Path) -> None:
    labels = {"moving_label": "labels/c.nii.gz", "fixed_label": "labels/d.nii.gz"}
    content = {"training": [entry(n) for n in "ab"], "registration_val": [{**pair("c", "d"), **labels}, pair("d", "c")]}
    folder = write_dataset(tmp_path, "abcd", content)
    for subjects in (load_subjects(folder, "validation"), load_request(folder)["data"]):
        assert [Path(subject["label"]).name for subject in subjects] == ["c.nii.gz", "d.nii.gz"]
    content["registration_val"].append({**pair("d", "c"), "fixed_label": "labels/a.nii.gz"})
    write_dataset(tmp_path, "abcd", content)
    with pytest.raises(ValueError, match=r"gives '.*c\.nii\.gz' two files as label: '.*c\.nii\.gz', '.*a\.nii\.gz'"):
        load_subjects(folder, "validation")


def test_a_subject_is_listed_once(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "abcd", {"training": [entry(n) for n in "abcdb"]})
    with pytest.raises(ValueError, match=r"'training' lists '.*b\.nii\.gz' 2 times"):
        load_subjects(folder)


@pytest.mark.parametrize("listed", [{"keypoints": 3}, {"keypoints": None}, {"points": None}, {}], ids=str)
def test_no_points(tmp_path: Path, listed: dict[str, Any]) -> None:
    folder = write_dataset(tmp_path, "abcd", {"training": [{**entry(n), **listed} for n in "abcd"]})
    assert all(subject.keys() == {"image", "label"} for subject in load_subjects(folder))


@pytest.mark.parametrize("key", ["points", "keypoints"])
def test_points_that_do_not_exist(tmp_path: Path, key: str) -> None:
    folder = write_dataset(tmp_path, "abcd", {"training": [{**entry(n), key: f"{n}.nii.gz"} for n in "abcd"]})
    name = "a.csv" if key == "keypoints" else "a.nii.gz"
    with pytest.raises(FileNotFoundError, match=rf"training\[0\]: points '.*{re.escape(name)}' does not exist"):
        load_subjects(folder)


@pytest.mark.parametrize(
    ("pair_list", "names", "pairs"),
    [
        (None, ["a", "b"], [(0, 1)]),
        ("registration_val", ["a", "b"], [(0, 1)]),
        ("registration_test", ["d", "c", "a"], [(0, 1), (2, 1)]),
    ],
)
def test_the_list_that_is_registered(
    tmp_path: Path, pair_list: str | None, names: list[str], pairs: list[tuple[int, int]]
) -> None:
    lists = {"registration_val": [pair("a", "b")], "registration_test": [pair("d", "c"), pair("a", "c")]}
    folder = write_dataset(tmp_path, "abcd", {"training": [entry(n) for n in "abcd"], **lists})
    request = load_request(folder, pair_list=pair_list)
    assert image_names(request["data"]) == names and request["pairs"] == pairs


@pytest.mark.parametrize(
    ("pair_list", "message"),
    [("registration_test", r"has no list 'registration_test' of pairs"), ("validation", r"one of .*got 'validation'")],
)
def test_a_list_that_is_not_there(tmp_path: Path, pair_list: str, message: str) -> None:
    content = {"training": [entry(n) for n in "abcd"], "registration_val": [pair("a", "b")], "registration_test": []}
    folder = write_dataset(tmp_path, "abcd", content)
    with pytest.raises(ValueError, match=message):
        load_request(folder, pair_list=pair_list)


def test_labels_of_a_pair(tmp_path: Path) -> None:
    listed = {**pair("c", "d"), "moving_label": "labels/c.nii.gz", "fixed_label": "labels/d.nii.gz"}
    folder = write_dataset(tmp_path, "abcd", {"training": [entry("a"), entry("b")], "registration_val": [listed]})
    subjects = load_subjects(folder, "validation")
    assert subjects == [
        {"image": str(tmp_path / "images" / f"{n}.nii.gz"), "label": str(tmp_path / "labels" / f"{n}.nii.gz")}
        for n in "cd"
    ]


@pytest.mark.parametrize(
    ("number", "held_out"), [(4, 2), (5, 2), (19, 2), (24, 2), (26, 3), (34, 3), (40, 4)], ids=lambda n: str(n)
)
def test_last_tenth_by_name_is_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, held_out: int
) -> None:
    names = [f"s{i:02d}" for i in range(number)]
    shuffled = list(np.random.default_rng(0).permutation(names))
    folder = write_dataset(tmp_path, names, {"training": [entry(n) for n in shuffled]})
    with caplog.at_level(logging.INFO, LOGGER):
        evaluated = load_subjects(folder, "validation")
    assert image_names(evaluated) == names[-held_out:]
    assert len(caplog.messages) == 1
    assert f"{held_out} of {number}" in caplog.text
    for name in names:
        assert (f"{name}.nii.gz" in caplog.text) == (name in names[-held_out:])
    # the order of the file is kept
    assert image_names(load_subjects(folder)) == [n for n in shuffled if n not in names[-held_out:]]


def test_a_given_split_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"training": [entry("a"), entry("b")], "validation": [entry("c")]}
    folder = write_dataset(tmp_path, "abc", content)
    with caplog.at_level(logging.INFO, LOGGER):
        load_subjects(folder)
        load_subjects(folder, "validation")
    assert caplog.messages == []


@pytest.mark.parametrize("spelling", ["folder", "file", "string", "dots"])
def test_ways_to_name_the_dataset(tmp_path: Path, spelling: str) -> None:
    content = {"training": [entry("a"), entry("b")], "validation": [entry("c")]}
    folder = write_dataset(tmp_path / "set", "abc", content)
    (folder / "dataset.json").rename(folder / ("l2r.json" if spelling == "file" else "dataset.json"))
    given: Any = {
        "folder": folder,
        "file": folder / "l2r.json",
        "string": str(folder),
        "dots": folder / "images" / "..",
    }[spelling]
    assert [s["image"] for s in load_subjects(given)] == [str(folder / "images" / f"{n}.nii.gz") for n in "ab"]


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"training": [entry("a"), entry("b")], "registration_val": [pair("c", "d")]}
    write_dataset(tmp_path / "set", "abcd", content)
    monkeypatch.chdir(tmp_path)
    for section in ("training", "validation"):
        for subject in load_subjects("set", section):
            assert all(os.path.isabs(path) for path in subject.values()), subject
    # the spelling of the folder does not matter
    assert load_subjects("set") == load_subjects(tmp_path / "set")
    assert load_pairs(tmp_path / "set", load_subjects("set", "validation")) == [(0, 1)]


def test_paths_outside_the_folder(tmp_path: Path) -> None:
    write_dataset(tmp_path / "store", "abc", {})
    training = [{"image": f"../store/images/{n}.nii.gz"} for n in "ab"]
    content = {"training": training, "validation": [str(tmp_path / "store" / "images" / "c.nii.gz")]}
    folder = write_dataset(tmp_path / "lists", "", content)
    subjects = load_subjects(folder) + load_subjects(folder, "validation")
    assert [s["image"] for s in subjects] == [str(tmp_path / "store" / "images" / f"{n}.nii.gz") for n in "abc"]


def test_pairs_are_moving_then_fixed(tmp_path: Path) -> None:
    listed = [("d", "b"), ("b", "d"), ("c", "d"), ("d", "b")]
    content = {
        "training": [entry(n) for n in "abcdef"],
        "registration_val": [pair(*names) for names in listed],
        "registration_test": [pair("a", "f")],
    }
    folder = write_dataset(tmp_path, "abcdef", content)
    subjects = load_subjects(folder, "validation")
    pairs = load_pairs(folder, subjects)
    assert pairs is not None
    assert [(image_names(subjects)[m], image_names(subjects)[f]) for m, f in pairs] == listed
    # positions in whatever list is given
    everyone = [{"image": str(tmp_path / "images" / f"{n}.nii.gz")} for n in "fedcba"]
    assert load_pairs(folder, everyone) == [(2, 4), (4, 2), (3, 2), (2, 4)]
    assert load_pairs(folder, everyone, "registration_test") == [(5, 0)]


@pytest.mark.parametrize("listed", [None, []])
def test_no_pairs(tmp_path: Path, listed: list[Any] | None) -> None:
    content: dict[str, Any] = {"training": [entry("a"), entry("b")], "validation": [entry("c")]}
    if listed is not None:
        content["registration_val"] = listed
    folder = write_dataset(tmp_path, "abc", content)
    assert load_pairs(folder, load_subjects(folder, "validation")) is None


def test_request_of_a_dataset(tmp_path: Path) -> None:
    content = {"training": [entry("a"), entry("b")], "validation": [entry("c"), entry("d")]}
    folder = write_dataset(tmp_path / "one", "abcd", content)
    assert load_request(folder) == {"data": load_subjects(folder, "validation"), "pairs": None}


# content of dataset.json -> names of the pairs (moving, fixed) that are registered, None for all of these subjects
REQUESTS: dict[str, tuple[dict[str, Any], list[tuple[str, str]] | list[str]]] = {
    "validation pairs": (
        {"training": [entry("a")], "validation": [entry("b"), entry("c")], "registration_val": [pair("d", "c")]},
        [("d", "c")],
    ),
    "validation pairs before test pairs": (
        {"training": [], "registration_test": [pair("a", "b")], "registration_val": [pair("d", "c"), pair("c", "d")]},
        [("d", "c"), ("c", "d")],
    ),
    "test pairs": (
        {"training": [entry("a")], "validation": [entry("b")], "registration_test": [pair("a", "d"), pair("b", "a")]},
        [("a", "d"), ("b", "a")],
    ),
    "nothing but pairs": ({"registration_test": [pair("b", "a")]}, [("b", "a")]),
    "validation subjects": ({"training": [entry("a"), entry("b")], "validation": [entry("d"), entry("c")]}, ["d", "c"]),
    "training subjects": ({"training": [entry(n) for n in "cab"], "validation": []}, ["c", "a", "b"]),
}


@pytest.mark.parametrize(("content", "expected"), REQUESTS.values(), ids=REQUESTS)
def test_what_is_registered_of_a_dataset(tmp_path: Path, content: dict[str, Any], expected: list[Any]) -> None:
    request = load_request(dataset_dir=str(write_dataset(tmp_path, "abcd", content)))
    assert request.keys() == {"data", "pairs"}
    names = image_names(request["data"])
    if isinstance(expected[0], str):
        assert names == expected and request["pairs"] is None
    else:
        assert [(names[m], names[f]) for m, f in request["pairs"]] == expected
        assert sorted(names) == sorted({name for names in expected for name in names})
    # labels are known from the lists of subjects
    listed = {Path(e["image"]).name[0] for e in [*content.get("training", []), *content.get("validation", [])]}
    assert [("label" in subject) for subject in request["data"]] == [name in listed for name in names]


@pytest.mark.parametrize("labels", [(), ("moving_label",), ("fixed_label",), ("moving_label", "fixed_label")], ids=str)
def test_request_of_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: tuple[str, ...]) -> None:
    write_dataset(tmp_path, "mf", {})
    files = {"moving_image": image("m"), "fixed_image": str(tmp_path / "images" / "f.nii.gz")}
    files |= {key: f"labels/{key[0]}.nii.gz" for key in labels}
    monkeypatch.chdir(tmp_path)
    # files are taken, whatever dataset there is
    request = load_request(tmp_path / "absent", **files)
    expected = []
    for role in ("moving", "fixed"):
        subject = {"image": str(tmp_path / "images" / f"{role[0]}.nii.gz")}
        if f"{role}_label" in labels:
            subject["label"] = str(tmp_path / "labels" / f"{role[0]}.nii.gz")
        expected.append(subject)
    assert request == {"data": expected, "pairs": [(0, 1)]}


TWO = [entry("a"), entry("b")]
# (function, content of dataset.json, exception, message)
ILL_CASES: dict[str, tuple[Callable[[Path], Any], Any, type[Exception], str]] = {
    "unknown section": (lambda d: load_subjects(d, "tests"), {"training": TWO}, ValueError, r"'tests'"),
    "no folder": (lambda d: load_subjects(d / "absent"), {"training": TWO}, FileNotFoundError, r"absent"),
    "no dataset.json": (lambda d: load_subjects(d / "images"), {"training": TWO}, FileNotFoundError, r"images"),
    "not JSON": (load_subjects, "training: [a, b]", ValueError, r"dataset\.json' is not a JSON"),
    "binary": (load_subjects, "\udcff\udcfe", ValueError, r"dataset\.json' is not a JSON"),
    "JSON list": (load_subjects, [entry("a")], ValueError, r"dataset\.json' is not a dataset description"),
    "JSON number": (load_subjects, "3", ValueError, r"dataset\.json' is not a dataset description"),
    "other JSON object": (load_subjects, {"name": "x"}, ValueError, r"dataset\.json' is not a dataset description"),
    "training is a number": (load_subjects, {"training": 5}, ValueError, r"dataset\.json' is not a dataset"),
    "training is an object": (load_subjects, {"training": entry("a")}, ValueError, r"dataset\.json' is not a dataset"),
    "validation is an object": (
        load_subjects,
        {"training": TWO, "validation": entry("c")},
        ValueError,
        r"'validation' must be a list, got dict",
    ),
    "pairs are a number": (load_subjects, {"training": TWO, "registration_val": 5}, ValueError, r"registration_val"),
    "pairs are an object": (
        load_subjects,
        {"training": TWO, "registration_val": pair("a", "b")},
        ValueError,
        r"registration_val",
    ),
    "entry is a number": (
        load_subjects,
        {"training": [entry("a"), 17], "validation": [entry("c")]},
        ValueError,
        r"training\[1\].*17",
    ),
    "entry without image": (
        load_subjects,
        {"training": [{"label": "labels/a.nii.gz"}], "validation": [entry("c")]},
        ValueError,
        r"training\[0\].*labels/a\.nii\.gz",
    ),
    "empty path": (load_subjects, {"training": ["", *TWO], "validation": [entry("c")]}, ValueError, r"training\[0\]"),
    "several labels": (
        load_subjects,
        {"training": [*TWO, {**entry("c"), "label": ["labels/c.nii.gz", "labels/d.nii.gz"]}], "validation": TWO},
        ValueError,
        r"training\[2\]: label .*labels/d\.nii\.gz",
    ),
    "missing image": (
        load_subjects,
        {"training": [entry("a"), entry("zz")], "validation": [entry("c")]},
        FileNotFoundError,
        r"training\[1\]: image '.*images/zz\.nii\.gz' does not exist",
    ),
    "missing label": (
        load_subjects,
        {"training": TWO, "validation": [{"image": image("c"), "label": "labels/yy.nii.gz"}]},
        FileNotFoundError,
        r"validation\[0\]: label '.*labels/yy\.nii\.gz' does not exist",
    ),
    "missing image of a pair": (
        load_subjects,
        {"training": TWO, "registration_val": [pair("c", "d"), pair("zz", "d")]},
        FileNotFoundError,
        r"registration_val\[1\] moving: image '.*zz\.nii\.gz'",
    ),
    "pair without moving": (
        load_subjects,
        {"training": TWO, "registration_val": [{"fixed": image("c")}]},
        ValueError,
        r"registration_val\[0\].*c\.nii\.gz",
    ),
    "pair is a list": (
        load_subjects,
        {"training": TWO, "registration_val": [[image("c"), image("d")]]},
        ValueError,
        r"registration_val\[0\].*c\.nii\.gz",
    ),
    "no training subjects": (load_subjects, {"training": []}, ValueError, r"lists 0 training"),
    "too few to hold out": (load_subjects, {"training": [entry(n) for n in "abc"]}, ValueError, r"lists 3 training"),
    "too few to hold out, validation": (
        lambda d: load_subjects(d, "validation"),
        {"training": [entry(n) for n in "abc"]},
        ValueError,
        r"lists 3 training",
    ),
    "one left to train on": (
        load_subjects,
        {"training": [entry(n) for n in "abc"], "validation": [entry("a"), entry("b")]},
        ValueError,
        r"has 1 training",
    ),
    "nobody left to train on": (load_subjects, {"training": [], "validation": TWO}, ValueError, r"has 0 training"),
    "unknown list of pairs": (
        lambda d: load_pairs(d, [], "registration_train"),
        {"training": TWO},
        ValueError,
        r"'registration_train'",
    ),
    "pair of strangers": (
        lambda d: load_pairs(d, load_subjects(d)),
        {"training": TWO, "validation": [entry("c")], "registration_val": [pair("c", "d")]},
        ValueError,
        r"registration_val\[0\] names '.*c\.nii\.gz'",
    ),
    "pairs of no dataset": (lambda d: load_pairs(d / "absent", []), {}, FileNotFoundError, r"absent"),
    "nothing to register": (lambda d: load_request(), {}, ValueError, r"moving_image and fixed_image, or dataset_dir"),
    "only labels": (
        lambda d: load_request(moving_label="m.nii.gz", fixed_label="f.nii.gz"),
        {},
        ValueError,
        r"moving_image and fixed_image",
    ),
    "only moving": (lambda d: load_request(d, moving_image="m.nii.gz"), {}, ValueError, r"only moving_image"),
    "only fixed": (lambda d: load_request(d, fixed_image="f.nii.gz"), {}, ValueError, r"only fixed_image"),
    "missing moving": (
        lambda d: load_request(moving_image=str(d / "m.nii.gz"), fixed_image=str(d / "images" / "a.nii.gz")),
        {},
        FileNotFoundError,
        r"moving: image '.*m\.nii\.gz' does not exist",
    ),
    "missing fixed label": (
        lambda d: load_request(
            moving_image=str(d / "images" / "a.nii.gz"),
            fixed_image=str(d / "images" / "b.nii.gz"),
            fixed_label=str(d / "nix.nii.gz"),
        ),
        {},
        FileNotFoundError,
        r"fixed: label '.*nix\.nii\.gz' does not exist",
    ),
    "one subject to register": (load_request, {"training": [entry("a")]}, ValueError, r"lists 1 subjects"),
    "nobody to register": (load_request, {"training": [], "validation": []}, ValueError, r"lists 0 subjects"),
    "request of an absent dataset": (lambda d: load_request(d / "absent"), {}, FileNotFoundError, r"absent"),
}


@pytest.mark.parametrize(("call", "content", "error", "message"), ILL_CASES.values(), ids=ILL_CASES)
def test_ill_formed(
    tmp_path: Path, call: Callable[[Path], Any], content: Any, error: type[Exception], message: str
) -> None:
    folder = write_dataset(tmp_path, "abcd", {})
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "dataset.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(error) as caught:
        call(folder)
    assert re.search(message, str(caught.value)), str(caught.value)
    # one sentence
    assert "\n" not in str(caught.value)
