# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno

import pytest

from monai_sacb.utils import first_line, sentence


def wrapped() -> RuntimeError:
    error = RuntimeError("Failed to instantiate the dataset")
    error.__cause__ = ValueError("the image is empty.")
    return error


@pytest.mark.parametrize(
    ("error", "line", "words"),
    [
        (ValueError("a\nb"), "a", "a"),
        (ValueError("a."), "a", "a."),
        (ValueError(), "ValueError", "ValueError"),
        (MemoryError(), "MemoryError", "there is not enough memory for this."),
        (KeyError("warped"), "'warped'", "KeyError: 'warped'"),
        (OSError(errno.ENOSPC, "No space left", "/x"), "[Errno 28] No space left: '/x'", "No space left: '/x'"),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left", "No space left"),
        (wrapped(), "Failed to instantiate the dataset", "the image is empty."),
    ],
)
def test_words_of_an_error(error: BaseException, line: str, words: str) -> None:
    assert first_line(error) == line
    assert sentence(error) == words
