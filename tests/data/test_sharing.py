# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The pairs of several processes are together those of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import run_processes
from torch.utils.data import DataLoader, Dataset, RandomSampler

from monai.transforms import RandGaussianNoised

from monai_sacb.data import PairDataset, SharedRandomSampler, share_dataset
from monai_sacb.losses import RegistrationLoss
from monai_sacb.utils import (
    from_writer,
    gather_rows,
    is_writer,
    join_processes,
    process_rank,
    process_share,
    wait_for_processes,
    world_size,
)


def together(function: Callable[[], Any], number: int, folder: Path) -> list[Any]:
    """What a function returns in each of several processes."""

    def work() -> None:
        join_processes("cpu")
        torch.save(function(), folder / f"{process_rank()}.pt")
        wait_for_processes()

    assert run_processes(work, number=number) == [0] * number
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


class Subjects(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full([1, 3, 3], float(index))}


def noisy(process: tuple[int, int]) -> PairDataset:
    noise = RandGaussianNoised(["moving_image", "fixed_image"], prob=1.0)
    return PairDataset(Subjects(), pair_transform=noise, process=process)


def epochs(dataset: PairDataset, sampler: Any, batch_size: int) -> list[dict[str, Any]]:
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
    return [batch for _ in range(2) for batch in loader]


@pytest.mark.parametrize(("number", "asked", "drawn"), [(2, 8, 8), (2, 7, 8), (3, 30, 30)])
def test_batches_of_a_step_are_one_batch(number: int, asked: int, drawn: int, tmp_path: Path) -> None:
    """The same pairs with the same random noise; also where all pairs are drawn more than once."""

    def share() -> Any:
        torch.manual_seed(0)
        dataset = noisy((process_rank(), world_size()))
        return epochs(dataset, SharedRandomSampler(dataset, asked), 2), torch.get_rng_state()

    results = together(share, number, tmp_path)
    torch.manual_seed(0)
    dataset = noisy((0, 1))
    whole = epochs(dataset, RandomSampler(dataset, num_samples=drawn), 2 * number)
    assert len({tuple(batch["pair_index"].tolist()) for batch in whole}) > 1
    for i, batch in enumerate(whole):
        for key, values in batch.items():
            parts = torch.stack([steps[i][key] for steps, _ in results], 1).flatten(0, 1)
            assert torch.equal(parts, values), key
    for _, state in results:
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("process", [(0, 0), (1, 1), (-1, 2), (0,)])
def test_ill_process(process: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="process must be a rank and the number of processes, got"):
        PairDataset(Subjects(), process=process)


def test_alone() -> None:
    dataset = Subjects()
    assert (process_rank(), world_size(), is_writer()) == (0, 1, True)
    assert share_dataset(dataset) is dataset and process_share(3) == [0, 1, 2] and process_share(0) == []
    assert gather_rows({2: "b", 1: "a"}) == {1: "a", 2: "b"} and list(gather_rows({2: "b", 1: "a"})) == [1, 2]
    assert sorted(SharedRandomSampler(dataset, 4)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1, got 0"):
        SharedRandomSampler(dataset, 0)


def test_shares_and_gathered_rows(tmp_path: Path) -> None:
    def share() -> Any:
        own = [item["image"].max().item() for item in share_dataset(Subjects())]
        few = [process_share(2), process_share(2, at_least_one=True)]
        rows = gather_rows({int(i): f"{process_rank()}" for i in (*own, 9)})
        return own, few, rows, from_writer(process_rank() + 5), is_writer()

    results = together(share, 3, tmp_path)
    assert [own for own, *_ in results] == [[0, 3], [1], [2]]
    assert [few for _, few, *_ in results] == [[[0], [0]], [[1], [1]], [[], [1]]]
    # what several have had is that of the first of them
    assert all(rows == {0: "0", 1: "1", 2: "2", 3: "0", 9: "0"} for _, _, rows, *_ in results)
    assert [result[3:] for result in results] == [(5, True), (5, False), (5, False)]


def test_terms_that_some_pairs_lack(tmp_path: Path) -> None:
    """The mean over the processes of each term is its value for all pairs, in one batch."""
    generator = torch.Generator().manual_seed(0)
    images, ddf = (torch.rand(6, 2, 12, 10, generator=generator) for _ in range(2))
    labels = torch.randint(0, 3, (6, 2, 12, 10), generator=generator)
    labels[[0, 1, 4], 1] = -1
    points = torch.rand(6, 2, 5, 2, generator=generator) * 9
    points[[2, 3], 0] = torch.nan
    points[4, 1, 2:] = torch.nan

    def terms(part: slice, **options: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        loss = RegistrationLoss(label_weight=2.0, landmark_weight=0.5, num_labels=2, **options)
        pred = ddf[part].clone().requires_grad_()
        target = {
            f"{role}_{key}": values[part, i : i + 1] if key != "landmarks" else values[part, i]
            for i, role in enumerate(("moving", "fixed"))
            for key, values in (("image", images), ("label", labels), ("landmarks", points))
        }
        loss(pred, target).backward()
        return loss.last_terms, pred.grad

    parts = together(lambda: terms(slice(2 * process_rank(), 2 * process_rank() + 2), all_processes=True), 3, tmp_path)
    whole, grad = terms(slice(None))
    assert whole.keys() == {"similarity", "regularization", "label", "landmarks"}
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part, _ in parts]).mean(), value)
    torch.testing.assert_close(torch.cat([part for _, part in parts]) / 3, grad)
    # without it, they are not
    alone = [terms(slice(2 * i, 2 * i + 2))[0].get("label", torch.zeros(())) for i in range(3)]
    assert abs(torch.stack(alone).mean() - whole["label"]) > 0.01
