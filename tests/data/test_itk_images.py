# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import locale
import os
import subprocess
import sys
import threading

import itk
import numpy as np
import pytest
from itk_oracle import GRIDS, LPS

from monai_sacb.data.itk_images import array_to_itk, quiet_itk

needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/fd/2"), reason="this system does not tell where stderr leads"
)


def state() -> tuple[str, bool, str]:
    return os.readlink("/proc/self/fd/2"), itk.Object.GetGlobalWarningDisplay(), locale.setlocale(locale.LC_ALL)


def test_image_lies_where_its_affine_says() -> None:
    array = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    affine = LPS @ GRIDS["oblique"]
    image = array_to_itk(array, affine)
    for voxel in ((0, 0, 0), (3, 4, 5), (1, 0, 2)):
        place = image.TransformIndexToPhysicalPoint(list(voxel))
        np.testing.assert_allclose(list(place), (affine @ [*voxel, 1])[:3], atol=1e-6)
        assert image.GetPixel(list(voxel)) == array[voxel]
    array[...] = 0
    assert image.GetPixel([1, 0, 2]) != 0


@needs_proc
def test_all_is_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    before = state()
    with pytest.raises(KeyError), quiet_itk():
        os.write(2, b"from a library")
        assert state()[:2] == (os.devnull, False)
        with quiet_itk():
            os.write(2, b"from a library")
        assert state()[:2] == (os.devnull, False)
        raise KeyError
    assert state() == before
    os.write(2, b"from us")
    assert capfd.readouterr().err == "from us"


@needs_proc
def test_threads_wait_for_each_other() -> None:
    before, entered, leave = state(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet_itk():
            entered.set()
            leave.wait(10)

    def second() -> None:
        entered.wait(10)
        threading.Timer(0.2, leave.set).start()
        with quiet_itk():
            # had it not waited, the first would end within this one
            leave.wait(10)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert state() == before


@pytest.mark.skipif(os.name != "posix", reason="the shell that closes stderr is of POSIX")
def test_without_stderr() -> None:
    program = "from monai_sacb.data.itk_images import quiet_itk\nwith quiet_itk(): pass\nprint('done')"
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -c "$0" 2>&-', program], stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
