# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlays for public data sets, on small folders in exactly their layout."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from monai.bundle import ConfigParser, ConfigWorkflow

from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import bundle_source

Make = Callable[..., ConfigWorkflow]

CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"
SHAPE = (32, 36, 40)
# the FreeSurfer ids in the files of IXI, of which publications score these positions
IXI_FILE_IDS = (
    *(0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 30, 31, 41, 42, 43, 44, 46, 47, 49, 50, 51),
    *(52, 53, 54, 58, 60, 62, 63, 72, 77, 80, 85, 251, 252, 253, 254, 255),
)
IXI_SCORED = (1, 2, 3, 5, 6, *range(7, 17), 18, 20, 21, 22, 23, *range(25, 33), 34, 36)
LPBA_IDS = (
    *(*range(21, 35), *range(41, 51), *range(61, 69), *range(81, 93)),
    *(101, 102, 121, 122, *range(161, 167)),
)
DKT31 = (2, 3, *range(5, 32), 34, 35)
SUBCORTICAL = (4, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28, 43, 49, 50, 51, 52, 53, 54, 58, 60)
# overlay, from its protocol: label ids, weights of the smoothness, who is registered to whom, size
PROTOCOLS: list[tuple[str, list[int], dict[str, float], tuple[str, str], list[int]]] = [
    ("data_ixi", [IXI_FILE_IDS[i] for i in IXI_SCORED], {"regularization": 3.0}, ("atlas_to_subject",) * 2, [-1] * 3),
    ("data_lpba", list(LPBA_IDS), {"regularization": 1.0}, ("all", "auto"), [-1] * 3),
    ("data_abdomen_ct", list(range(1, 14)), {"regularization": 0.5}, ("all", "all"), [-1] * 3),
    (
        "data_oasis",
        [hemisphere + i for hemisphere in (1000, 2000) for i in DKT31] + list(SUBCORTICAL),
        {"regularization": 1.0},
        ("all", "auto"),
        [-1] * 3,
    ),
    ("data_hippocampus", [1, 2], {"gradient": 0.1, "bending": 1.0}, ("all", "auto"), [48, 64, 48]),
]


def labels_of(overlay: str) -> dict[str, int]:
    labels: dict[str, int] = json.loads((CONFIGS / f"{overlay}.json").read_text())["labels"]
    return labels


def volume(ids: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label map: one arrangement of regions, differently deformed for every seed."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    for axis in range(3):
        noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 5)
        grid[axis] += 1.5 * noise / noise.std()
    places = np.random.default_rng(0).uniform(3, np.array(SHAPE) - 3, (len(ids), 3))
    distance = ((grid[None] - places[:, :, None, None, None]) ** 2).sum(1)
    nearest = distance.argmin(0)
    label = np.where(distance.min(0) < 60, np.array(ids)[nearest], 0)
    brightness = np.random.default_rng(1).uniform(0.3, 1.0, len(ids))
    image = np.where(label > 0, brightness[nearest], 0.0) + 0.02 * rng.random(SHAPE)
    return (image / image.max()).astype(np.float32), label.astype(np.int16)


def pickled(path: Path, ids: Sequence[int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(volume(ids, seed)))


@pytest.fixture
def ixi(tmp_path: Path) -> Path:
    """As the release: Train, Val, Test and the atlas, FreeSurfer labels, also such as are not scored."""
    folder, ids = tmp_path / "IXI_data", [*labels_of("data_ixi").values(), 5, 251]
    for i, section in enumerate(["Train"] * 3 + ["Val"] * 2 + ["Test"]):
        pickled(folder / section / f"subject_{i}.pkl", ids, i)
    pickled(folder / "atlas.pkl", ids, 99)
    return folder


@pytest.fixture
def lpba(tmp_path: Path) -> Path:
    folder, ids = tmp_path / "LPBA_data", [*labels_of("data_lpba").values(), 181, 182]
    for i, section in enumerate(["Train"] * 3 + ["Val"] * 2):
        pickled(folder / section / f"subject_{i}.pkl", ids, i)
    return folder


def parsed(*overlays: str, **options: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in overlays])
    for key, value in options.items():
        parser[key] = value
    return parser


@pytest.mark.parametrize(("overlay", "ids", "weights", "pairs", "size"), PROTOCOLS)
def test_protocols(
    overlay: str, ids: list[int], weights: dict[str, float], pairs: tuple[str, str], size: list[int]
) -> None:
    parser = parsed("train", overlay)
    assert parser.get_parsed_content("label_ids") == ids
    assert len(set(parser.get_parsed_content("label_names"))) == len(ids)
    found = parser.get_parsed_content("loss").weights
    assert found == {"similarity": 1.0, "label": 0.0, "landmarks": 0.0, "inverse_consistency": 0.0, **weights}
    assert (parser.get_parsed_content("pairs"), parser.get_parsed_content("val_pairs")) == pairs
    assert parser.get_parsed_content("spatial_size") == size
    if overlay != "data_oasis":
        assert parser.get_parsed_content("label_groups") == {}


def test_groups_and_numbering_of_oasis() -> None:
    parser = parsed("train", "data_oasis")
    by_name = parser.get_parsed_content("labels")
    groups = {
        name: {by_name[member] for member in members}
        for name, members in parser.get_parsed_content("label_groups").items()
    }
    cortical = {hemisphere + i for hemisphere in (1000, 2000) for i in DKT31}
    assert groups == {"cortical": cortical, "subcortical": set(SUBCORTICAL)}
    # FreeSurfer's own names say which side and structure an id is
    assert by_name["left_hippocampus"] == 17 and by_name["right_hippocampus"] == 53
    assert by_name["left_precentral"] == 1024 and by_name["right_insula"] == 2035
    renumbered = parsed("train", "data_oasis", renumbered=True).get_parsed_content("label_ids")
    assert sorted(renumbered[:62]) == [i for i in range(39, 105) if i not in (68, 69, 101, 102)]
    assert renumbered[62:] == [1, *range(5, 14), 15, 16, 18, *range(22, 30)]


def test_intensities_of_brains() -> None:
    """Of IXI as they are, between 0 and 1; of LPBA40, from the smallest to the largest value."""
    image = torch.tensor([0.2, 0.4, 0.7]).view(1, 3, 1, 1)
    for overlay, expected in (("data_ixi", [0.2, 0.4, 0.7]), ("data_lpba", [0.0, 0.4, 1.0])):
        scaled = parsed("train", overlay).get_parsed_content("scale_intensity")({"image": image})["image"]
        torch.testing.assert_close(torch.as_tensor(scaled).flatten(), torch.tensor(expected))


@pytest.mark.parametrize("overlay", [name for name, *_ in PROTOCOLS])
@pytest.mark.parametrize("more", [[], ["learn2reg"]], ids=["files", "learn2reg"])
def test_every_overlay_registers(overlay: str, more: list[str], workflow: Make, sample: Path, tmp_path: Path) -> None:
    """The sample's images stand in: only what the overlay says of images, size and network counts."""
    network = workflow("train", overlay).parser.get_parsed_content("network")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    flow = workflow(
        "inference",
        overlay,
        *more,
        workflow_type="infer",
        ckpt_path=str(tmp_path / "model.pt"),
        dataset_dir=None,
        moving_image=str(sample / "images" / "brain_00.nii.gz"),
        fixed_image=str(sample / "images" / "brain_01.nii.gz"),
    )
    flow.run()
    name = "submission/*.nii.gz" if more else "registered/*/displacement.nii.gz"
    (written,) = (tmp_path / "output").glob(name)
    field = np.asarray(nib.load(written).dataobj)
    assert np.isfinite(field).all() and np.abs(field).max() > 0


def test_intensities_of_ct() -> None:
    """Hounsfield units between -500 and 800 become 0 to 1, whatever else the image holds."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "data_abdomen_ct.json")])
    units = torch.tensor([-1000.0, -500.0, 150.0, 800.0, 3000.0]).view(1, 5, 1, 1)
    scaled = parser.get_parsed_content("scale_intensity")({"image": units})["image"]
    torch.testing.assert_close(torch.as_tensor(scaled).flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def short(overlay: str) -> dict[str, Any]:
    return {"max_epochs": 1, "pairs_per_epoch": 2, "label_weight": 1.0 if overlay == "data_lpba" else 0.0}


@pytest.mark.parametrize(("overlay", "pairs"), [("data_ixi", 2), ("data_lpba", 2)])
def test_train_evaluate_and_register(
    overlay: str, pairs: int, workflow: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(overlay.removeprefix("data_"))
    given = {"dataset_dir": str(folder), **short(overlay)}
    workflow("train", overlay, **given).run()
    output = tmp_path / "output"
    flow = workflow(
        "train", overlay, "evaluate", **given, output_dir=str(tmp_path / "eval"), ckpt_path=str(output / "model.pt")
    )
    flow.run_id = "evaluating"
    flow.run()
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    labels = labels_of(overlay)
    assert summary["pairs"] == pairs
    for name in labels:
        assert f"val_dice/{name}" in summary and f"val_hd95_mm/{name}" in summary
    assert 0.1 < summary["val_dice_before/mean"] < 0.95 and 0 < summary["val_hd95_before_mm/mean"] < 10
    with open(tmp_path / "eval" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    moving = {row["moving"] for row in rows}
    assert moving == ({"atlas"} if overlay == "data_ixi" else {"subject_3", "subject_4"})
    flow = workflow(
        "inference",
        overlay,
        workflow_type="infer",
        dataset_dir=str(folder),
        output_dir=str(tmp_path / "infer"),
        ckpt_path=str(output / "model.pt"),
    )
    flow.run()
    written = sorted((tmp_path / "infer" / "registered").iterdir())
    assert len(written) == pairs
    for path in written:
        warped = np.asarray(nib.load(path / "warped_label.nii.gz").dataobj)
        # the labels of the file, also those that are not scored
        assert warped.shape == SHAPE and set(np.unique(warped)) - {0, *labels.values()}
        assert nib.load(path / "displacement.nii.gz").shape == (*SHAPE, 1, 3)


def test_test_list(workflow: Make, ixi: Path) -> None:
    flow = workflow("train", "data_ixi", dataset_dir=str(ixi), val_section="test")
    dataset = flow.parser.get_parsed_content("validate#dataset")
    assert [Path(dataset.data[i]["image"]).name for pair in dataset.pairs for i in pair] == [
        "atlas.pkl",
        "subject_5.pkl",
    ]


def test_interrupted_evaluation_goes_on(workflow: Make, lpba: Path, tmp_path: Path) -> None:
    flow = workflow("train", "data_lpba", dataset_dir=str(lpba))
    weights = str(tmp_path / "weights.pt")
    torch.save(flow.parser.get_parsed_content("network").state_dict(), weights)

    def evaluate(name: str, stop: bool = False, **options: Any) -> dict[str, Any]:
        flow = workflow(
            "train",
            "data_lpba",
            "evaluate",
            dataset_dir=str(lpba),
            ckpt_path=weights,
            output_dir=str(tmp_path / name),
            **options,
        )
        evaluator = flow.parser.get_parsed_content("validate#evaluator")
        if stop:

            def killed(engine: Any) -> None:
                raise RuntimeError("killed")

            # after the first pair has been written down
            evaluator.add_event_handler("ITERATION_COMPLETED", killed)
            with pytest.raises(RuntimeError, match="killed"):
                flow.parser.get_parsed_content("weights_loader")()
                evaluator.run()
            return {}
        flow.run_id = "evaluating"
        flow.run()
        summary: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return {key: value for key, value in summary.items() if not key.startswith(("seconds", "peak"))}

    whole = evaluate("whole")
    evaluate("parts", stop=True)
    assert len((tmp_path / "parts" / "pairs.jsonl").read_text().splitlines()) == 2
    assert evaluate("parts", resume=True) == whole and whole["pairs"] == 2


def test_fine_tuning_keeps_the_given_weights(workflow: Make, tmp_path: Path) -> None:
    weights = tmp_path / "output" / "model.pt"
    weights.parent.mkdir()
    torch.save(workflow("train").parser.get_parsed_content("network").state_dict(), weights)
    before = weights.read_bytes()
    with pytest.raises(RuntimeError) as caught:
        workflow("train", "finetune", init_path=str(tmp_path / "output" / ".." / "output" / "model.pt")).run()
    assert "would be overwritten by the training that starts from it" in str(caught.value.__cause__)
    assert weights.read_bytes() == before


def test_fine_tuning_starts_from_the_given_weights(workflow: Make, tmp_path: Path) -> None:
    torch.manual_seed(5)
    flow = workflow("train")
    state = flow.parser.get_parsed_content("network").state_dict()
    start = {name: 0.5 * value if value.is_floating_point() else value for name, value in state.items()}
    for i in range(4):
        start[f"estimators.{i}.matching.scale"] *= 2
    torch.save(start, tmp_path / "start.pt")
    options = {"init_path": str(tmp_path / "start.pt"), "max_epochs": 1, "pairs_per_epoch": 1}
    flow = workflow("train", "finetune", **options)
    assert flow.parser.get_parsed_content("optimizer").param_groups[0]["lr"] == 1e-4
    flow.run()
    tuned = torch.load(tmp_path / "output" / "model.pt", weights_only=True)
    changes = [(tuned[name].float() - value.float()).abs().max().item() for name, value in start.items()]
    # one step of Adam moves a weight by its learning rate at most
    assert 0 < max(changes) < 1.01e-4


def test_fine_tuning_takes_the_kind_of_network_from_the_weights(tmp_path: Path) -> None:
    # the default, weights of a network that sees the surroundings of voxels
    shipped = torch.load(bundle_source() / "models" / "model.pt", weights_only=True)
    wide = SACBNet(spatial_dims=3, in_channels=1, base_channels=8).state_dict()
    torch.save(wide, tmp_path / "wide.pt")
    for state, path in ((shipped, None), (wide, str(tmp_path / "wide.pt"))):
        parser = ConfigParser()
        parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", "finetune")])
        parser.update(
            {"bundle_root": str(bundle_source()), "device": "cpu", **({} if path is None else {"init_path": path})}
        )
        network = parser.get_parsed_content("network")
        parser.get_parsed_content("init_loader")()
        loaded = network.state_dict()
        # weights may be older than some of the settings that a state notes
        assert state.keys() <= loaded.keys() <= state.keys() | set(SACBNet.optional_state)
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_fine_tuning_without_weights(workflow: Make, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        workflow("train", "finetune", init_path=str(tmp_path / "missing.pt")).run()
    assert "missing.pt" in str(caught.value) + str(caught.value.__cause__)
