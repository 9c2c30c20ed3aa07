# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from monai.transforms import Compose, LambdaD, RandFlipd, ScaleIntensityd, ScaleIntensityRanged

from monai_sacb.networks.nets import SACBNet
from monai_sacb.transforms import LoadVolumed, SelectLabelsd
from monai_sacb.utils import settings_digest

ROOT = Path(__file__).resolve().parents[2]
MAKE = """Compose([LoadVolumed(["image"]), SelectLabelsd("label", [1, 2]), ScaleIntensityd("image", 0.0, 1.0),
    RandFlipd("image", prob=0.5), LambdaD("image", lambda x: x * 2)])"""


def make(**settings: Any) -> Compose:
    return Compose(
        [
            LoadVolumed(["image"]),
            SelectLabelsd("label", settings.get("label_ids", [1, 2])),
            ScaleIntensityd("image", 0.0, settings.get("maximum", 1.0)),
            RandFlipd(settings.get("key", "image"), prob=settings.get("prob", 0.5)),
            LambdaD("image", settings.get("function", lambda x: x * 2)),
        ]
    )


def test_same_settings_same_digest() -> None:
    first, second = make(), make()
    second.set_random_state(seed=5)
    assert settings_digest(first) == settings_digest(second)
    assert settings_digest(SACBNet(3, 1, 4)) == settings_digest(SACBNet(3, 1, 4).eval())


@pytest.mark.parametrize(
    "other",
    [{"label_ids": [1, 3]}, {"maximum": 2.0}, {"key": "label"}, {"prob": 0.4}, {"function": lambda x: x * 3}],
    ids=lambda other: next(iter(other)),
)
def test_another_setting_another_digest(other: dict[str, Any]) -> None:
    assert settings_digest(make()) != settings_digest(make(**other))


def test_networks_and_plain_values() -> None:
    nets = [
        SACBNet(3, 1, 4),
        SACBNet(3, 1, 4, num_clusters=5),
        SACBNet(3, 1, 4, scaled_matching=True),
        SACBNet(2, 1, 4),
    ]
    assert len({settings_digest(net) for net in nets}) == 4
    values = [1, 2, "1", [1], (1,), {"a": 1}, {"a": 2}, torch.ones(2), torch.zeros(2), {1}, None, ScaleIntensityRanged]
    assert len({settings_digest(value) for value in values}) == len(values)
    loop: list[Any] = []
    loop.append(loop)
    assert settings_digest(loop) == settings_digest(loop) != settings_digest([])


def test_another_run_has_the_same_digest() -> None:
    code = (
        "from monai.transforms import *\nfrom monai_sacb.transforms import *\n"
        f"from monai_sacb.utils import settings_digest\nprint(settings_digest({MAKE}))"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(2)
    }
    assert len(found) == 1 and len(found.pop().strip()) == 64
