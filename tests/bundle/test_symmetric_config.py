# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Training in both directions at once, as the overlay sets it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from monai.bundle import ConfigWorkflow

Make = Callable[..., ConfigWorkflow]


@pytest.mark.parametrize(("use_masks", "label_weight"), [(False, 0.0), (True, 1.0)])
def test_training_in_both_directions(workflow: Make, use_masks: bool, label_weight: float) -> None:
    flow = workflow("train", "symmetric", max_epochs=1, batch_size=2, use_masks=use_masks, label_weight=label_weight)
    network, sizes = flow.parser.get_parsed_content("network"), {True: set(), False: set()}
    network.register_forward_hook(lambda net, inputs, ddf: sizes[net.training].add(len(ddf)))
    seen: list[Any] = []
    loss = flow.parser.get_parsed_content("loss")
    loss.register_forward_hook(lambda module, inputs, value: seen.append(inputs[1]))
    flow.run()
    # in training alone
    assert sizes == {True: {4}, False: {1}}
    for target in seen:
        for entry in ("image", "label") if label_weight else ("image",):
            moving, fixed = target[f"moving_{entry}"], target[f"fixed_{entry}"]
            assert torch.equal(moving[:2], fixed[2:]) and torch.equal(moving[2:], fixed[:2])
    terms = {"similarity", "regularization", "inverse_consistency"} | ({"label"} if label_weight else set())
    assert loss.last_terms.keys() == terms
    metrics = flow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["loss_inverse_consistency"] > 0
    assert loss.weights["inverse_consistency"] == flow.parser["inverse_consistency_weight"] > 0


def test_weight_is_an_option(workflow: Make) -> None:
    flow = workflow("train", "symmetric", inverse_consistency_weight=0.0)
    assert flow.parser.get_parsed_content("loss").weights["inverse_consistency"] == 0
    assert flow.parser.get_parsed_content("train#trainer").prepare_batch.symmetric
    assert not flow.parser.get_parsed_content("validate#evaluator").prepare_batch.symmetric
    assert not workflow("train").parser.get_parsed_content("train#trainer").prepare_batch.symmetric
