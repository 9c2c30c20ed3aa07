# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""An atlas as a segmentation model: its bundle is used as MONAI Label uses it, and as any bundle."""

from __future__ import annotations

import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from label_task import LabelTask
from synthetic_pair import MakePair, Pair, blobs, deformation, grid_points, structures

from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor

from monai_sacb.apps import AtlasSegmentation, label_bundle, register
from monai_sacb.apps.cli import main
from monai_sacb.networks.nets import ResNetPyramidEncoder, SACBNet
from monai_sacb.utils import bundle_source, file_digest

IDS = [3, 1021]
NAMES = {"3": "Outer", "1021": "inner part", "77": "not there"}


def array(path: str | Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def dice(first: np.ndarray, second: np.ndarray) -> dict[int, float]:
    return {i: 2 * ((first == i) & (second == i)).sum() / ((first == i).sum() + (second == i).sum()) for i in IDS}


@pytest.fixture(scope="session")
def bundle(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the pair's moving image, which is aligned with the fixed one."""
    folder = tmp_path_factory.mktemp("label")
    (folder / "names.json").write_text(json.dumps(NAMES))
    made = label_bundle(
        str(folder / "atlas"), pair.moving, pair.moving_label, names=str(folder / "names.json"), affine=False, refine=40
    )
    return Path(made)


@pytest.fixture(scope="session")
def task(bundle: Path) -> LabelTask:
    return LabelTask(bundle)


@pytest.fixture
def quick(pair: Pair, tmp_path: Path) -> Path:
    """A bundle of its own, which is done at once."""
    return Path(label_bundle(str(tmp_path / "quick"), pair.moving, pair.moving_label, affine=False, refine=0))


def test_answer_is_the_label_map_of_a_registration(task: LabelTask, pair: Pair, registered: Path) -> None:
    labels, affine = task(pair.fixed)
    assert np.array_equal(affine, nib.load(pair.fixed).affine)
    assert np.array_equal(labels, array(registered / "warped_label.nii.gz"))
    before, after = (dice(map_, array(pair.fixed_label)) for map_ in (array(pair.moving_label), labels))
    assert min(after.values()) > 0.93 and all(after[i] > before[i] + 0.05 for i in IDS)


def test_answer_holds_what_the_labels_say(task: LabelTask, pair: Pair) -> None:
    data = task.data(pair.fixed)
    assert task.labels == {"outer": 3, "inner part": 1021}
    assert sorted(torch.unique(data["pred"].as_tensor()).tolist()) == [0, *IDS]
    assert data["pred"].dtype == torch.int16
    assert task.metadata["network_data_format"]["outputs"]["pred"]["dtype"] == "int16"
    [numbers] = json.loads(json.dumps(data["result"]))["registration"]
    assert numbers["similarity"] > numbers["similarity_affine"] + 0.1 and numbers["folds_percent"] < 1
    assert "registration" not in data["pred"].meta


@pytest.mark.parametrize("geometry", ["LPI", "oblique and anisotropic"])
def test_subject_in_another_geometry(geometry: str, task: LabelTask, make_pair: MakePair) -> None:
    turn = nib.eulerangles.euler2mat(0.2, -0.1, 0.3) if geometry.startswith("oblique") else np.eye(3)
    affine = np.eye(4)
    axes = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1]]) if geometry == "LPI" else np.eye(3)
    affine[:3, :3] = turn @ axes @ np.diag([1.6, 2.2, 3.0])
    other = make_pair(fixed_affine=affine)
    labels, written = task(other.fixed)
    # a header with oblique axes is read by ITK's rules, to seven digits
    assert np.allclose(written, nib.load(other.fixed).affine, rtol=1e-6, atol=1e-6)
    assert labels.shape == nib.load(other.fixed).shape
    assert min(dice(labels, array(other.fixed_label)).values()) > 0.9


def test_subject_that_lies_elsewhere(pair: Pair, tmp_path: Path) -> None:
    """Turned, shifted out of the atlas's field of view, in other units of intensity: the affine stage finds it."""
    folder = label_bundle(str(tmp_path / "atlas"), pair.moving, pair.moving_label, refine=20)
    image = nib.load(pair.fixed)
    away = np.eye(4)
    away[:3, :3], away[:3, 3] = nib.eulerangles.euler2mat(0.25, 0.1, -0.2), (150.0, -90.0, 40.0)
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(20 * values, away @ image.affine), tmp_path / "far.nii.gz")
    labels, written = LabelTask(folder)(tmp_path / "far.nii.gz")
    assert np.allclose(written, nib.load(tmp_path / "far.nii.gz").affine, rtol=1e-6, atol=1e-6)
    assert dice(labels, array(pair.fixed_label))[3] > 0.85


def test_network_is_used(pair: Pair, tmp_path: Path) -> None:
    model = "hippocampus_unsupervised"
    folder = label_bundle(str(tmp_path / "atlas"), pair.moving, pair.moving_label, model=model, affine=False, refine=0)
    state = torch.load(Path(folder) / "models" / "model.pt", weights_only=True)
    shipped = torch.load(bundle_source() / "models" / f"{model}.pt", weights_only=True)
    assert state.keys() == {f"network.{key}" for key in [*shipped, *SACBNet.optional_state]} and len(state) > 10
    assert all(torch.equal(state[f"network.{key}"], value) for key, value in shipped.items())
    labels, _ = LabelTask(folder)(pair.fixed)
    assert not np.array_equal(labels, array(pair.moving_label))
    card = json.loads((Path(folder) / "docs" / "model_card.json").read_text())
    metadata = json.loads((Path(folder) / "configs" / "metadata.json").read_text())
    assert any("SACB-Net" in reference for reference in metadata["references"])
    assert card["name"] == model and "CC-BY-SA" in (Path(folder) / "docs" / "data_license.txt").read_text()
    register(
        fixed=pair.fixed,
        moving=pair.moving,
        moving_label=pair.moving_label,
        output_dir=str(tmp_path / "out"),
        model=model,
        affine="false",
        refine=0,
    )
    assert np.array_equal(labels, array(tmp_path / "out" / "warped_label.nii.gz"))


def test_files(bundle: Path) -> None:
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "atlas/image.nii.gz",
        "atlas/label.nii.gz",
        "atlas/labels.json",
        "configs/inference.json",
        "configs/logging.conf",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.pt",
    }
    assert not any(path.is_symlink() for path in bundle.rglob("*"))
    assert stat.S_IMODE(bundle.stat().st_mode) & 0o055 == 0o055
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    source = json.loads((bundle_source() / "configs" / "metadata.json").read_text())
    assert "monai_sacb" in metadata["required_packages_version"]
    # without a network, there is nothing of its paper in it
    assert source.keys() - metadata.keys() <= {"data_source", "label_classes", "eval_metrics", "references"}
    # the atlas is not of this project's authors
    assert all("not stated" in metadata[key] and "monai_sacb" not in metadata[key] for key in ("authors", "copyright"))
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "3": "Outer",
        "1021": "inner part",
    }
    assert json.loads((bundle / "atlas" / "labels.json").read_text()) == [
        {"id": 3, "name": "Outer", "atlas_id": 3},
        {"id": 1021, "name": "inner part", "atlas_id": 1021},
    ]
    text = (bundle / "docs" / "README.md").read_text()
    assert "| 1021 | inner part |" in text and "monai_sacb" in text and "{" not in text
    # no paths of the machine it was written on
    for name in ("configs/inference.json", "configs/metadata.json", "docs/README.md"):
        assert str(bundle.parent) not in (bundle / name).read_text()


def test_atlas_is_the_same_image(bundle: Path, pair: Pair) -> None:
    for copy, original in (("image", pair.moving), ("label", pair.moving_label)):
        ours, theirs = nib.load(bundle / "atlas" / f"{copy}.nii.gz"), nib.load(original)
        assert np.array_equal(ours.dataobj, theirs.dataobj) and np.allclose(ours.affine, theirs.affine, atol=1e-5)


def test_renumbered(pair: Pair, tmp_path: Path) -> None:
    folder = label_bundle(
        str(tmp_path / "atlas"), pair.moving, pair.moving_label, affine=False, refine=0, renumber=True
    )
    task = LabelTask(folder)
    assert task.labels == {"3": 1, "1021": 2}
    labels, _ = task(pair.fixed)
    assert labels.dtype == np.uint8
    assert np.array_equal(np.array([0, *IDS])[labels], array(pair.moving_label))
    assert "| 2 | 1021 | 1021 |" in (Path(folder) / "docs" / "README.md").read_text()


def test_readme_of_unusual_names(pair: Pair, tmp_path: Path) -> None:
    """Its commands are for a shell, and its table is one."""
    (tmp_path / "names.json").write_text(json.dumps({"3": "left | right", "1021": " inner\npart "}))
    given = {"names": str(tmp_path / "names.json"), "affine": False, "refine": 0}
    folder = Path(label_bundle(str(tmp_path / "my atlas"), pair.moving, pair.moving_label, **given))
    text = (folder / "docs" / "README.md").read_text()
    assert "--conf models 'my atlas' " in text and "--config_file 'my atlas/configs/inference.json' " in text
    assert "`model/my atlas`" in text
    assert "| 3 | left \\| right |\n| 1021 | inner part |\n" in text
    assert LabelTask(folder).labels == {"left | right": 3, "inner part": 1021}


def test_labels_stored_as_floats(pair: Pair, tmp_path: Path) -> None:
    stored = nib.load(pair.moving_label)
    nib.save(nib.Nifti1Image(array(pair.moving_label).astype(np.float32), stored.affine), tmp_path / "label.nii.gz")
    folder = label_bundle(str(tmp_path / "atlas"), pair.moving, str(tmp_path / "label.nii.gz"), affine=False, refine=0)
    assert np.array_equal(LabelTask(folder)(pair.fixed)[0], array(pair.moving_label))


def several(pair: Pair, folder: Path, fusion: str) -> Path:
    """Two atlases that are the subject, of which one has lost a structure, and a third without the other structure."""
    image, truth = nib.load(pair.fixed), array(pair.fixed_label)
    lines = ["image,label"]
    for number, lost in enumerate((None, 3, 1021)):
        labels = np.where(truth == lost, 0, truth) if lost else truth
        nib.save(nib.Nifti1Image(labels.astype(np.int16), image.affine), folder / f"label_{number}.nii.gz")
        lines.append(f"{pair.fixed},label_{number}.nii.gz")
    (folder / "atlases.csv").write_text("\n".join(lines) + "\n")
    made = label_bundle(
        str(folder / "several"), atlases=str(folder / "atlases.csv"), affine=False, refine=0, fusion=fusion
    )
    return Path(made)


@pytest.mark.parametrize("fusion", ["majority", "locally_weighted"])
def test_several_atlases(fusion: str, pair: Pair, tmp_path: Path) -> None:
    folder = several(pair, tmp_path, fusion)
    data = LabelTask(folder).data(pair.fixed)
    assert np.array_equal(data["pred"].array[0], array(pair.fixed_label))
    assert [entry["atlas"] for entry in data["result"]["registration"]] == [f"image_{i}.nii.gz" for i in (1, 2, 3)]
    assert len(list((folder / "atlas").glob("*.nii.gz"))) == 6


def test_the_atlas_that_resembles_the_subject_decides(pair: Pair, tmp_path: Path) -> None:
    """Two of three atlases are noise with wrong labels."""
    image, truth = nib.load(pair.fixed), array(pair.fixed_label)
    noise = np.random.default_rng(0).random(image.shape).astype(np.float32) * (np.asarray(image.dataobj) > 0)
    for name in ("noise", "same_noise"):
        nib.save(nib.Nifti1Image(noise, image.affine), tmp_path / f"{name}.nii.gz")
    nib.save(
        nib.Nifti1Image(np.where(truth > 0, 1024 - truth, 0).astype(np.int16), image.affine), tmp_path / "wrong.nii.gz"
    )
    (tmp_path / "a.csv").write_text(
        f"image,label\n{pair.fixed},{pair.fixed_label}\nnoise.nii.gz,wrong.nii.gz\nsame_noise.nii.gz,wrong.nii.gz\n"
    )
    scores = {}
    for fusion in ("majority", "locally_weighted"):
        made = label_bundle(
            str(tmp_path / fusion), atlases=str(tmp_path / "a.csv"), affine=False, refine=0, fusion=fusion
        )
        scores[fusion] = dice(LabelTask(made)(pair.fixed)[0], truth)[3]
    assert scores["majority"] < 0.1 and scores["locally_weighted"] > 0.95


def test_details_on_a_finer_grid(pair: Pair, tmp_path: Path) -> None:
    # a model whose working grid has voxels three times as large as those of the images
    weights = tmp_path / "coarse.pt"
    torch.manual_seed(0)
    torch.save(SACBNet().state_dict(), weights)
    card = {"sha256": file_digest(weights), "settings": {"working_grid#spacing": 6.0}}
    weights.with_suffix(".json").write_text(json.dumps(card))
    scores = {}
    for fine in (0, 20):
        folder = label_bundle(
            str(tmp_path / f"fine_{fine}"),
            pair.moving,
            pair.moving_label,
            model=str(weights),
            affine=False,
            refine=40,
            fine=fine,
        )
        scores[fine] = dice(LabelTask(folder)(pair.fixed)[0], array(pair.fixed_label))[3]
    assert scores[20] > scores[0] + 0.01


def test_batch_and_threads_change_nothing(task: LabelTask, pair: Pair) -> None:
    network = task.network
    network.refine = 5
    try:
        images = [torch.from_numpy(array(path).astype(np.float32))[None] for path in (pair.fixed, pair.moving)]
        affine = torch.from_numpy(nib.load(pair.fixed).affine)
        alone = [network(MetaTensor(image[None], affine=affine)) for image in images]
        both = network(MetaTensor(torch.stack(images), affine=affine))
        assert torch.equal(both, torch.cat(alone)) and not torch.equal(alone[0], alone[1])
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(network, MetaTensor(images[i % 2][None], affine=affine)) for i in range(4)]
            assert all(torch.equal(job.result(), alone[i % 2]) for i, job in enumerate(jobs))
    finally:
        network.refine = 40


def test_plain_bundle(
    bundle: Path, pair: Pair, task: LabelTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere, by the folder of the configs alone, also after it has been moved."""
    moved = tmp_path / "moved"
    shutil.copytree(bundle, moved)
    (tmp_path / "subjects").mkdir()
    for name, path in (("b", pair.fixed), ("a", pair.moving)):
        shutil.copy(path, tmp_path / "subjects" / f"{name}.nii.gz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    workflow = ConfigWorkflow(
        config_file=str(moved / "configs" / "inference.json"),
        workflow_type="inference",
        logging_file=False,
        dataset_dir=str(tmp_path / "subjects"),
        output_dir=str(tmp_path / "out"),
        device="cpu",
    )
    workflow.initialize()
    written_as = []
    save = nib.save
    monkeypatch.setattr(nib, "save", lambda image, path: (written_as.append(Path(path).name), save(image, path)))
    workflow.run()
    assert workflow.check_properties() == []
    # by other names and renamed
    assert len(written_as) == 2 and not {"a_seg.nii.gz", "b_seg.nii.gz"} & set(written_as)
    assert sorted(os.listdir(tmp_path / "out")) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    written = nib.load(tmp_path / "out" / "b_seg.nii.gz")
    labels, affine = task(pair.fixed)
    assert np.array_equal(written.dataobj, labels) and np.array_equal(written.affine, affine)
    assert written.get_data_dtype() == np.int16


def test_network_input_and_output(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick)
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        device="cpu",
        any=32,
    )


@pytest.mark.parametrize("way", ["parent", "absolute", "link", "no file"])
def test_path_out_of_the_bundle_is_refused(way: str, quick: Path, tmp_path: Path) -> None:
    shutil.copy(quick / "atlas" / "image.nii.gz", tmp_path / "outside.nii.gz")
    name: Any = {"parent": "atlas/../../outside.nii.gz", "absolute": str(tmp_path / "outside.nii.gz")}.get(way)
    if way == "link":
        name = "atlas/linked.nii.gz"
        (quick / name).symlink_to(tmp_path / "outside.nii.gz")
    path = quick / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["atlases"][0]["image"] = name
    path.write_text(json.dumps(config))
    parser = ConfigParser()
    parser.read_config(str(path))
    parser["bundle_root"] = str(quick)
    with pytest.raises(Exception) as caught:
        parser.get_parsed_content("network_def")
    message = str(caught.value) + str(caught.value.__cause__)
    assert ("leads out of the bundle" if name else "must be named by the path") in message


def test_bundle_behind_a_link_is_fine(quick: Path, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(quick)
    assert set(np.unique(LabelTask(tmp_path / "link")(pair.fixed)[0])) == {0, *IDS}


BAD_ATLASES = {
    "no list": (None, r"a list of entries with image and label, got None"),
    "empty": ([], r"a list of entries"),
    "a path": ("atlas/image.nii.gz", r"a list of entries"),
    "no label": ([{"image": "atlas/image.nii.gz"}], r"an image and a label"),
    "a number": ([{"image": 1, "label": "atlas/label.nii.gz"}], r"named by the path of a file in the bundle, got 1"),
    "missing": ([{"image": "atlas/none.nii.gz", "label": "atlas/label.nii.gz"}], r"none.nii.gz' does not exist"),
}


@pytest.mark.parametrize("atlases, message", BAD_ATLASES.values(), ids=BAD_ATLASES)
def test_bad_atlases(atlases: Any, message: str, quick: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        AtlasSegmentation(quick, atlases, torch.nn.Identity(), lambda data: data, {}, lambda *_: None)
    with pytest.raises(ValueError, match="refine"):
        AtlasSegmentation(quick, atlases, torch.nn.Identity(), lambda data: data, {}, lambda *_: None, refine=-1)
    with pytest.raises(ValueError, match="fine = 3 steps need fine_grid and fine_refinement"):
        AtlasSegmentation(quick, atlases, torch.nn.Identity(), lambda data: data, {}, lambda *_: None, fine=3)


BAD_IMAGES = {
    "two channels": (torch.rand(1, 2, 20, 20, 20), r"shape \(B, 1, D, H, W\), got \[1, 2, 20, 20, 20\]"),
    "2-D": (torch.rand(1, 1, 20, 20), r"got \[1, 1, 20, 20\]"),
    "empty": (torch.rand(1, 1, 0, 20, 20), r"got \[1, 1, 0, 20, 20\]"),
    "constant": (2 * torch.ones(1, 1, 20, 20, 20), r"finite and not constant, got 2 everywhere in subject 0"),
    "NaN": (torch.full((1, 1, 20, 20, 20), float("nan")), r"got 8000 NaN or infinite voxels in subject 0 of the batch"),
    "elsewhere": (
        MetaTensor(torch.rand(1, 1, 20, 20, 20), affine=torch.eye(4) + 900 * (torch.arange(16) == 3).view(4, 4)),
        r"do not overlap by their headers",
    ),
}


@pytest.mark.parametrize("image, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_image(image: torch.Tensor, message: str, task: LabelTask) -> None:
    with pytest.raises(ValueError, match=message):
        task.network(image)


def write_labels(pair: Pair, path: Path, values: dict[int, int]) -> str:
    labels = array(pair.moving_label).astype(np.int32)
    for old, new in values.items():
        labels[array(pair.moving_label) == old] = new
    nib.save(nib.Nifti1Image(labels, nib.load(pair.moving_label).affine), path)
    return str(path)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"atlas_image": None, "atlas_label": None}, r"either atlases, or atlas_image and atlas_label"),
    "no label map": ({"atlas_label": None}, r"both atlas_image and atlas_label"),
    "both ways": ({"atlases": "a.csv"}, r"either atlases, or"),
    "no such image": ({"atlas_image": "none.nii.gz"}, r"none.nii.gz' does not exist"),
    "no such names": ({"names": "none.json"}, r"cannot read names 'none.json': No such file"),
    "no such model": ({"model": "brian"}, r"there is no model 'brian'"),
    "fusion": ({"fusion": "staple"}, r"one of majority, locally_weighted, got 'staple'"),
    "refine": ({"refine": -1}, r"refine must be at least 0, got -1"),
    "kind": ({"output_dir": "my_Detection"}, r"'my_Detection' has 'detection' in it"),
    "two names in one": ({"output_dir": "brain,head"}, r"'brain,head' has a comma in it"),
    "no such list": (
        {"atlas_image": None, "atlas_label": None, "atlases": "a.csv"},
        r"cannot read atlases 'a.csv': No",
    ),
    "labels of no structure": ({"label": {3: 0, 1021: 0}}, r"the atlas has no label"),
    "negative label": ({"label": {3: -4}}, r"the atlas has the label -4"),
    "names are a list": ({"given": ["a"]}, r"must be a JSON object of ids and names"),
    "names by name": ({"given": {"Outer": 3}}, r"must be a JSON object of ids and names"),
    "names are a list of pairs": ({"given": [["3", "Outer"]]}, r"must be a JSON object of ids and names"),
    "names are a number": ({"given": 3}, r"must be a JSON object of ids and names"),
    "a label twice": (
        {"given": {"0003": "Outer", "1021": "inner", "3": "shell"}},
        r"names 'names.json' names the label 3 more than once, as '0003' and '3'\.",
    ),
    "a name is no text": ({"given": {"3": 3}}, r"gives the label 3 no name, but 3"),
    "a name is empty": ({"given": {"3": " "}}, r"gives the label 3 no name"),
    "a key twice": (
        {"text": '{"3": "a", "3": "b"}'},
        r"names 'names.json' names the label 3 more than once, as '3' and '3'\.",
    ),
    "names alike": ({"given": {"3": "Part", "1021": "part"}}, r"several labels are called 'Part'"),
    "background": ({"given": {"3": "Background"}}, r"the label 3 must not be called 'background'"),
}


@pytest.mark.parametrize("changes, message", MISTAKES.values(), ids=MISTAKES)
def test_mistake(
    changes: dict[str, Any], message: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"output_dir": "atlas", "atlas_image": pair.moving, "atlas_label": pair.moving_label, **changes}
    if "label" in changes:
        given["atlas_label"] = write_labels(pair, tmp_path / "label.nii.gz", given.pop("label"))
    if "given" in changes:
        (tmp_path / "names.json").write_text(json.dumps(given.pop("given")))
        given["names"] = "names.json"
    if "text" in changes:
        (tmp_path / "names.json").write_text(given.pop("text"))
        given["names"] = "names.json"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        label_bundle(**given)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "text",
    ["", "image\na.nii\n", "image,label\n", "image,label\na.nii\n", "image,label\na.nii, \n", "image,label\na,b,c\n"],
)
def test_bad_list_of_atlases(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=r"a\.csv' must have the columns image and label"):
        label_bundle(str(tmp_path / "atlas"), atlases=str(tmp_path / "a.csv"))


def test_files_as_spreadsheets_and_editors_write_them(pair: Pair, tmp_path: Path) -> None:
    """With a byte order mark, spaces behind commas, the columns in any order, and empty lines."""
    (tmp_path / "a.csv").write_text(f"\ufefflabel, image\n{pair.moving_label}, {pair.moving}\n\n , \n")
    (tmp_path / "names.json").write_text("\ufeff" + json.dumps(NAMES))
    folder = label_bundle(
        str(tmp_path / "atlas"), atlases=str(tmp_path / "a.csv"), names=str(tmp_path / "names.json"), refine=0
    )
    assert LabelTask(folder).labels == {"outer": 3, "inner part": 1021}
    assert np.array_equal(array(Path(folder) / "atlas" / "label.nii.gz"), array(pair.moving_label))


def test_an_atlas_has_one_vote(pair: Pair, tmp_path: Path) -> None:
    again = f"{Path(pair.moving).parent}/../{Path(pair.moving).parent.name}/{Path(pair.moving).name}"
    (tmp_path / "a.csv").write_text(f"image,label\n{pair.moving},{pair.moving_label}\n{again},{pair.moving_label}\n")
    with pytest.raises(ValueError, match=r"a\.csv' lists '.*' twice with one label map"):
        label_bundle(str(tmp_path / "atlas"), atlases=str(tmp_path / "a.csv"))


def test_existing_folder_is_left_alone(quick: Path, pair: Pair) -> None:
    before = {path: path.read_bytes() for path in quick.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="exists already"):
        label_bundle(str(quick), pair.moving, pair.moving_label)
    assert {path: path.read_bytes() for path in quick.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_nothing_is_left_on_failure(
    error: BaseException, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def failing(content: Any, path: Path) -> None:
        modes.append(stat.S_IMODE(path.parents[1].stat().st_mode))
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        label_bundle(str(tmp_path / "new" / "atlas"), pair.moving, pair.moving_label)
    # private until it is done
    assert modes == [0o700]
    assert os.listdir(tmp_path / "new") == []


def test_label_bundle_is_no_model_to_register_with(quick: Path, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quick' segments by an atlas, .* it is no model to register with"):
        register(fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / "out"), model=str(quick))
    assert not (tmp_path / "out").exists()


def test_model_that_is_part_of_a_larger_config(pair: Pair, tmp_path: Path) -> None:
    """What the network's entry refers to does not come along, so that its values do."""
    other = tmp_path / "other"
    shutil.copytree(bundle_source() / "configs", other / "configs")
    path = other / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["width"] = 2
    config["network_def"]["base_channels"] = "@width"
    path.write_text(json.dumps(config))
    (other / "models").mkdir()
    torch.save(SACBNet(base_channels=2).state_dict(), other / "models" / "model.pt")
    folder = label_bundle(str(tmp_path / "atlas"), pair.moving, pair.moving_label, model=str(other))
    network = json.loads((Path(folder) / "configs" / "inference.json").read_text())["registration_network"]
    assert (network["base_channels"], network["self_similarity"]) == (2, False)


def test_model_with_another_encoder(pair: Pair, tmp_path: Path) -> None:
    """A component within the network's entry, which refers to its neighbours."""
    other = tmp_path / "other"
    shutil.copytree(bundle_source() / "configs", other / "configs")
    path = other / "configs" / "inference.json"
    config = json.loads(path.read_text())
    overlay = json.loads((other / "configs" / "encoder_resnet.json").read_text())
    config["network_def"].update({name.partition("#")[2]: entry for name, entry in overlay.items()})
    path.write_text(json.dumps(config))
    (other / "models").mkdir()
    torch.manual_seed(0)
    network = SACBNet(encoder=ResNetPyramidEncoder())
    torch.save(network.state_dict(), other / "models" / "model.pt")
    given = {"model": str(other), "affine": False, "refine": 0}
    task = LabelTask(label_bundle(str(tmp_path / "atlas"), pair.moving, pair.moving_label, **given))
    assert isinstance(task.network.network.encoder, ResNetPyramidEncoder)
    assert set(np.unique(task(pair.fixed)[0])) == {0, *IDS}
    config["network_def"]["negative_slope"] = "$torch.float32"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the entry 'network_def' of its configs"):
        label_bundle(str(tmp_path / "none"), pair.moving, pair.moving_label, **given)


def test_command(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "atlas")
    options = ["--atlas_image", pair.moving, "--atlas_label", pair.moving_label, "--output_dir", target]
    main(["label-bundle", *options, "--affine", "false", "--refine", "7"])
    assert capsys.readouterr().out.strip() == target
    assert json.loads((tmp_path / "atlas" / "configs" / "inference.json").read_text())["refine"] == 7
    with pytest.raises(SystemExit) as stopped:
        main(["label-bundle", *options])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"monai-sacb: '{target}' exists already.\n"


def test_truth_of_the_helpers() -> None:
    """The pair is not aligned by itself: a model that returns the atlas's labels as they are would not do."""
    places = grid_points((30, 30, 30), np.diag([2.5, 2.5, 2.5, 1]) - np.array([[0, 0, 0, 36]] * 3 + [[0, 0, 0, 0]]))
    assert min(dice(structures(places), structures(deformation(places))).values()) < 0.85
    assert blobs(places).max() > 50
