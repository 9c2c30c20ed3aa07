# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_sacb.networks import (
    available_models,
    find_model,
    load_pretrained,
    pretrained,
    stored_setting,
)
from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import bundle_source, file_digest


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "mine.pt"
    torch.save(SACBNet(base_channels=2).state_dict(), path)
    return path


def write_card(weights: Path, card: Any) -> None:
    weights.with_suffix(".json").write_text(card if isinstance(card, str) else json.dumps(card))


@pytest.mark.parametrize("name", ["none", "None", "NONE"])
def test_no_model(name: str) -> None:
    model = find_model(name)
    assert model.weights is None and model.network(model.parser()) is None
    assert model.bundle_root == bundle_source()


def test_weights_with_their_settings(weights: Path) -> None:
    write_card(
        weights,
        {
            "sha256": file_digest(weights),
            "settings": {"network_def#base_channels": 2, "working_grid#spacing": 2.0, "refine_after_network": 7},
        },
    )
    model = find_model(weights)
    assert model.name == "mine" and model.sha256 == file_digest(weights)
    parser = model.parser(device=torch.device("cpu"))
    assert parser.get_parsed_content("working_grid")["spacing"] == 2.0 and parser["refine_after_network"] == 7
    network = model.network(parser)
    assert network is not None and not network.training
    expected = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_bundle_of_somebody_else(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "models").mkdir(parents=True)
    (folder / "configs").mkdir()
    config = json.loads((bundle_source() / "configs" / "inference.json").read_text())
    config["network_def"]["base_channels"] = 2
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "models" / "model.pt").write_bytes(weights.read_bytes())
    model = find_model(folder)
    network = model.network(model.parser(device=torch.device("cpu")))
    assert isinstance(network, SACBNet) and model.name == "theirs"


CARDS = [
    ("{", "is not a JSON file"),
    ([1], "is not the card of a model"),
    ({"settings": 3}, "is not the card of a model"),
    ({"sha256": "0" * 64}, "is not the file that"),
    ({"settings": {"refinement": {"_target_": "os.getcwd"}}}, "has the setting 'refinement', which is refused"),
    ({"settings": {"working_grid": {"_target_": "os.getcwd"}}}, "has the setting 'working_grid', which is refused"),
    ({"settings": {"working_grid#spacing": "$__import__('os').getcwd()"}}, "which is refused"),
    ({"settings": {"thresholds": ["%/etc/passwd"]}}, "which is refused"),
    ({"settings": {"imports": []}}, "which is refused"),
    ({"settings": {"thresholds": {"path": "ran"}, "thresholds#_target_": "os.mkdir"}}, "'thresholds#_target_', which"),
    ({"settings": {"thresholds::_target_": "os.mkdir"}}, "'thresholds::_target_', which"),
    ({"settings": {"thresholds#a::_target_": "os.mkdir"}}, "'thresholds#a::_target_', which"),
    ({"settings": {"network_def#a#_mode_": "debug"}}, "'network_def#a#_mode_', which"),
]


@pytest.mark.parametrize("card, message", CARDS)
def test_cards_that_are_refused(weights: Path, card: Any, message: str) -> None:
    write_card(weights, card)
    with pytest.raises(ValueError, match=message):
        find_model(weights)


@pytest.mark.parametrize("name", ["brian", "missing.pt"])
def test_unknown_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no model '{name}': give one of"):
        find_model(name)
    with pytest.raises(FileNotFoundError, match="is no bundle"):
        find_model(tmp_path)


@pytest.fixture
def own_models(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the models that came with the package: one with a card that gives it a name."""
    write_card(weights, {"name": "spine", "sha256": file_digest(weights), "settings": {"network_def#base_channels": 2}})
    monkeypatch.setattr(pretrained, "_models_folder", lambda: weights.parent)
    return weights.parent


def test_models_that_came_along(own_models: Path, tmp_path: Path) -> None:
    torch.save({}, own_models / "bare.pt")
    assert available_models() == ["bare", "spine"]
    network = load_pretrained("spine")
    expected = torch.load(own_models / "mine.pt", weights_only=True)
    assert isinstance(network, SACBNet) and not network.training
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    x = torch.rand(1, 2, 16, 16, 16)
    with torch.no_grad():
        ddf = network(x)
    assert ddf.shape == (1, 3, 16, 16, 16) and ddf.abs().max() > 0
    with pytest.raises(FileNotFoundError, match="there is no model 'brian': give one of bare, spine, none"):
        load_pretrained("brian")
    with pytest.raises(ValueError, match="'none' is no network: give one of bare, spine"):
        load_pretrained("none")


def test_other_weights_than_the_card_says(own_models: Path) -> None:
    state = torch.load(own_models / "mine.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, own_models / "mine.pt")
    with pytest.raises(ValueError, match="is not the file that"):
        load_pretrained("spine")


def test_broken_card_concerns_its_model_alone(own_models: Path) -> None:
    torch.save({}, own_models / "bare.pt")
    (own_models / "bare.json").write_text("{")
    assert available_models() == ["bare", "spine"]
    load_pretrained("spine")
    with pytest.raises(ValueError, match="is not a JSON file"):
        load_pretrained("bare")


def test_two_models_of_one_name(own_models: Path) -> None:
    torch.save({}, own_models / "other.pt")
    (own_models / "other.json").write_text('{"name": "spine"}')
    with pytest.raises(ValueError, match="both call themselves 'spine'"):
        find_model("spine")


@pytest.mark.parametrize("width", [1, 2, 5])
def test_stored_width(tmp_path: Path, width: int) -> None:
    path, state = tmp_path / "x.pt", SACBNet(2, base_channels=width, num_clusters=2).state_dict()
    for content in (state, {"network": state, "epoch": 3}):
        torch.save(content, path)
        assert stored_setting(path, "base_channels", 4) == width


@pytest.mark.parametrize("content", [None, {"a": torch.zeros(3)}, [1, 2], torch.nn.Linear(2, 3).state_dict()])
def test_width_where_none_is_stored(tmp_path: Path, content: Any) -> None:
    """What is wrong with the file is said when the weights are loaded."""
    path = tmp_path / "x.pt"
    if content is not None:
        torch.save(content, path)
    assert stored_setting(path, "base_channels", 6) == 6
    assert stored_setting(None, "base_channels", 6) == 6


@pytest.mark.parametrize("seen", [False, True])
def test_stored_input(tmp_path: Path, seen: bool) -> None:
    path, state = tmp_path / "x.pt", SACBNet(2, base_channels=2, num_clusters=2, self_similarity=seen).state_dict()
    torch.save(state, path)
    assert stored_setting(path, "self_similarity", not seen) is seen
    # of a version that had no such setting
    torch.save({key: value for key, value in state.items() if key != "self_similarity"}, path)
    assert stored_setting(path, "self_similarity", True) is False
    with pytest.raises(ValueError, match="name must be 'base_channels' or 'self_similarity', got 'x'"):
        stored_setting(path, "x", 1)


def test_width_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"x.pt' is not a readable checkpoint"):
        stored_setting(tmp_path / "x.pt", "base_channels", 6)


@pytest.mark.parametrize("width", [2, 3])
def test_weights_need_no_card_for_their_width(tmp_path: Path, width: int) -> None:
    expected = SACBNet(base_channels=width)
    torch.save(expected.state_dict(), tmp_path / "x.pt")
    loaded = load_pretrained(tmp_path / "x.pt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in expected.state_dict().items())
