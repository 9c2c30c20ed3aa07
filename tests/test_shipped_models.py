# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The weights in the bundle are those that their cards, tables and licences speak of."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks import available_models, load_pretrained
from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import bundle_source, file_digest

BUNDLE = bundle_source()
# beside the tests: an installed package holds the bundle, but no benchmarks
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = sorted((BUNDLE / "models").glob("*.pt"))
MEGABYTE = 10**6


def card_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return content


def test_names() -> None:
    assert WEIGHTS and available_models() == sorted(card_of(path)["name"] for path in WEIGHTS)


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_card(path: Path) -> None:
    card = card_of(path)
    assert card["sha256"] == file_digest(path)
    assert path.stat().st_size < 25 * MEGABYTE
    for key in ("title", "data", "licence", "date", "versions"):
        assert card[key]
    command = card["training"]["command"]
    if command.startswith("benchmarks/"):
        # of several stages
        command = (ROOT / command.split()[0]).read_text(encoding="utf-8")
    assert "monai.bundle run training" in command and isinstance(card["training"]["seed"], int)
    assert 0.5 < card["metrics"]["val_dice/mean"] < 1
    assert f"models/{path.name}" in (BUNDLE / "docs" / "data_license.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_training_is_kept(path: Path) -> None:
    with open(BUNDLE / "docs" / f"{path.stem}_training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    assert epochs == list(range(1, card_of(path)["training"]["epochs"] + 1))
    losses = [float(row["train_loss"]) for row in rows]
    assert sum(losses[-5:]) < sum(losses[:5])
    dice = [float(row["val_dice"]) for row in rows if row["val_dice"]]
    assert max(dice) == pytest.approx(card_of(path)["training"]["best_val_dice"], abs=1e-5)
    picture = (BUNDLE / "docs" / f"{path.stem}_training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_network(path: Path) -> None:
    network = load_pretrained(card_of(path)["name"])
    assert isinstance(network, SACBNet) and not network.training
    coarse = torch.rand(2, 1, 1, 10, 10, 8, generator=torch.Generator().manual_seed(0))
    moving, fixed = (F.interpolate(image, size=(48, 48, 32), mode="trilinear") for image in coarse)
    with torch.inference_mode():
        there = network(torch.cat([moving, fixed], 1))
        same = network(torch.cat([fixed, fixed], 1))
    assert torch.isfinite(there).all() and there.abs().max() > 0.5
    # a trained network moves nothing far where there is nothing to be moved
    assert same.abs().mean() < 0.6 * there.abs().mean()
