# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Lambda, Randomizable, RandomizableTrait, Transform

from monai_sacb.data.disk_cache import DiskCacheDataset, file_hashing
from monai_sacb.utils import subject_names

__all__ = ["PairDataset"]

logger = logging.getLogger(__name__)


def _is_random(transform: Any) -> bool:
    """Whether a transform, or one of a sequence of them, draws random numbers from a state of its own."""
    if isinstance(transform, Compose):
        return any(_is_random(part) for part in transform.flatten().transforms)
    return isinstance(transform, Randomizable) and isinstance(transform, RandomizableTrait)


class PairDataset(Dataset):
    """
    Pairs of subjects for registration. Each subject is loaded, transformed and cached once, not once for every pair.

    An item is a dictionary with every key of the two subjects under ``moving_<key>`` and ``fixed_<key>``
    (``moving_image``, ``fixed_image``, ``moving_label``, ...), names of the two, of the files of their images, under
    ``moving_subject`` and ``fixed_subject``, and the number of the pair under ``pair_index``, passed through
    ``pair_transform``.

    Random transforms are seeded anew for each item from torch's generator, so that a training that is resumed with the
    state of that generator goes on with the same augmentation. Several processes that share a training have the same
    state of it; each then draws for all of them, and takes seeds of its own (see ``process``).

    Args:
        data: the subjects, dictionaries of paths with the key ``image`` and, where there are any, ``label`` and others;
            or a dataset of subjects, which is then used as it is, without ``transform`` and cache.
        transform: transform of one subject.
        pairs: (moving, fixed) index pairs. Defaults to all ordered pairs of two different subjects.
        pair_transform: transform of one pair.
        label_ids: label values that some subject must have in the file of its ``label``; needs a
            :py:class:`monai_sacb.transforms.SelectLabelsd` in ``transform``. Checked at the start; without a full cache
            in memory only whether the first labelled subject has any of them, since all would have to be loaded.
        all_labels: whether a label id that no subject has is an error; if not, it is logged, and only if none of the
            ids is there it is an error.
        cache_rate: fraction of the subjects that is loaded at the start and kept in memory; with 0, a subject is loaded
            and transformed whenever a pair needs it.
        cache_dir: folder where transformed subjects are kept instead, each from when it is first needed, see
            :py:class:`DiskCacheDataset`. ``cache_rate`` is then of no effect.
        num_workers: threads that fill the cache.
        progress: whether to show a bar while the cache is filled.
        process: rank of this process, and number of the processes that share a training.
        required_keys: entries, such as ``label``, that two subjects at least must have: what a training is to use.

    Raises:
        ValueError: When there are no subjects, no pairs, or a pair or label id does not exist.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]] | Dataset,
        transform: Callable | None = None,
        pairs: Sequence[Sequence[int]] | None = None,
        pair_transform: Callable | None = None,
        label_ids: Sequence[int] | None = None,
        all_labels: bool = True,
        cache_rate: float = 1.0,
        num_workers: int | None = 1,
        progress: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        required_keys: Sequence[str] = (),
        process: Sequence[int] = (0, 1),
    ) -> None:
        if isinstance(data, Dataset) and (transform is not None or cache_dir is not None):
            raise ValueError("transform and cache_dir belong to the dataset of subjects when data is a dataset.")
        if not isinstance(cache_rate, (int, float)) or not 0 <= cache_rate <= 1:
            raise ValueError(f"cache_rate must be between 0 and 1, got {cache_rate!r}.")
        if len(process) != 2 or not 0 <= process[0] < process[1]:
            raise ValueError(f"process must be a rank and the number of processes, got {tuple(process)}.")
        self.process = tuple(process)
        self.data = data
        num_subjects = self.num_subjects
        if num_subjects == 0:
            raise ValueError("the list of subjects is empty.")
        if pairs is None and num_subjects < 2:
            raise ValueError(f"at least 2 subjects are needed to form a pair, got {num_subjects}.")
        if pairs is not None:
            if len(pairs) == 0:
                raise ValueError("the list of pairs is empty.")
            for pair in pairs:
                if len(pair) != 2 or not all(0 <= index < num_subjects for index in pair):
                    raise ValueError(f"a pair must be two indices below {num_subjects}, got {tuple(pair)}.")
        for key in required_keys:
            # a dataset of subjects would have to be loaded
            if not isinstance(data, Dataset) and sum(key in subject for subject in data) < 2:
                raise ValueError(f"the training needs the entry '{key}', but less than two of its subjects have it.")
        self.pairs = pairs
        self.pair_transform = pair_transform
        if transform is not None and not isinstance(transform, Transform):
            # CacheDataset does not cache what a plain function returns
            transform = Lambda(transform)
        self.subjects: Dataset
        if isinstance(data, Dataset):
            self.subjects = data
        elif cache_dir is not None:
            self.subjects = DiskCacheDataset(data, Compose() if transform is None else transform, cache_dir)
        else:
            self.subjects = CacheDataset(
                data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=progress
            )
        candidates = (getattr(self.subjects, "transform", None), pair_transform)
        self._random: list[Any] = [candidate for candidate in candidates if _is_random(candidate)]
        self._log_entries()
        images = [] if isinstance(data, Dataset) else [subject.get("image") for subject in data]
        self._names = subject_names(images) if all(isinstance(image, str) for image in images) else []  # type: ignore[arg-type]
        if label_ids is not None:
            if cache_rate == 1.0 and cache_dir is None:
                self._check_labels(label_ids, all_labels, range(num_subjects))
            else:
                labelled = (i for i in range(num_subjects) if "label" in data[i])
                self._check_labels(label_ids, False, list(itertools.islice(labelled, 1)))

    @property
    def num_subjects(self) -> int:
        """Number of subjects."""
        return len(self.data)  # type: ignore[arg-type]

    def _log_entries(self) -> None:
        """Say which entries some subjects have and others lack."""
        if isinstance(self.data, Dataset):
            return
        counts = Counter(key for subject in self.data if isinstance(subject, Mapping) for key in subject)
        partial = {str(key): number for key, number in counts.items() if number < self.num_subjects}
        if partial:
            parts = ", ".join(f"{number} have '{key}'" for key, number in sorted(partial.items()))
            logger.info(f"Of {self.num_subjects} subjects {parts}; pairs differ in what they hold.")

    def _check_labels(self, label_ids: Sequence[int], all_labels: bool, subjects: Sequence[int]) -> None:
        found: set[int] = set()
        labelled = 0
        for index in subjects:
            label = self.subjects[index].get("label")
            if isinstance(label, MetaTensor) and "label_ids" in label.meta:
                labelled += 1
                found |= {int(label_id) for label_id in label.meta["label_ids"].split()}
        # one subject without any label may be a crop that lies beside them all
        if labelled == 0 or (len(subjects) < self.num_subjects and not found - {0}):
            return
        missing = sorted(set(label_ids) - found)
        if missing:
            message = (
                f"label ids {missing} are configured, but none of the {labelled} labelled subjects that were looked at "
                f"has them; found are {sorted(found)}."
            )
            if all_labels or len(missing) == len(set(label_ids)):
                raise ValueError(message)
            if len(subjects) == self.num_subjects:
                logger.warning(message)
        extra = sorted(found - set(label_ids) - {0})
        if extra:
            logger.info(f"Label ids {extra} are in the data but not configured; they count as background.")

    def fingerprint(self) -> str:
        """
        Hash of the pairs, of the subjects, and of the sizes and times of their files.

        Raises:
            ValueError: When the subjects are a dataset of their own, whose files are not known.
        """
        if isinstance(self.data, Dataset):
            raise ValueError("only a list of subjects has a fingerprint, not a dataset.")
        parts = [file_hashing(subject) for subject in self.data]
        pairs = None if self.pairs is None else [[int(index) for index in pair] for pair in self.pairs]
        return hashlib.sha256(repr((parts, pairs)).encode()).hexdigest()

    def __len__(self) -> int:
        if self.pairs is not None:
            return len(self.pairs)
        number = self.num_subjects
        return number * (number - 1)

    def pair_indices(self, index: int) -> tuple[int, int]:
        """The (moving, fixed) subjects of an item."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} pairs, got index {index}.")
        index %= len(self)
        if self.pairs is not None:
            moving, fixed = self.pairs[index]
            return int(moving), int(fixed)
        moving, fixed = divmod(index, self.num_subjects - 1)
        # the diagonal, a subject with itself, is left out
        return moving, fixed + (fixed >= moving)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._random:
            rank, number = self.process
            # the items of all processes at this step draw one after the other, as those of a batch do
            seeds = torch.randint(2**31, (number, len(self._random)))[rank]
            for transform, seed in zip(self._random, seeds.tolist()):
                transform.set_random_state(seed=seed)
        pair: dict[str, Any] = {"pair_index": index % len(self)}
        for role, subject in zip(("moving", "fixed"), self.pair_indices(index)):
            # shallow copies: the cached tensors are shared by many pairs
            pair.update({f"{role}_{key}": value for key, value in self.subjects[subject].items()})
            if self._names:
                pair[f"{role}_subject"] = self._names[subject]
        result = pair if self.pair_transform is None else self.pair_transform(pair)
        return result
