# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import io
import operator
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

from monai_sacb.data import PickledVolumeReader, read_pickled_arrays
from monai_sacb.transforms import LoadVolumed

DTYPES = "?bBhHiIlLqQefdgFD"


def volumes(dtype: str = "f", order: str = "C", shape: tuple[int, ...] = (3, 4, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = np.asarray((rng.random(shape) * 100).astype(dtype), order=order)
    return image, np.asarray(rng.integers(0, 9, shape).astype(">i2"), order=order)


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


def same(actual: list[np.ndarray], expected: Any) -> bool:
    return len(actual) == len(expected) and all(
        a.dtype.newbyteorder("=") == np.asarray(e).dtype.newbyteorder("=")
        and a.shape == np.shape(e)
        and np.array_equal(a, e)
        for a, e in zip(actual, expected)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_wrote(tmp_path: Path, protocol: int, dtype: str) -> None:
    for order in "CF":
        image, label = volumes(dtype, order)
        for content in ((image, label), [label, image], (image[::2, :, 1], label[..., :0]), (image, np.float64(2.5))):
            path = write(tmp_path / "a.pkl", content, protocol)
            assert same(read_pickled_arrays(path), pickle.loads(path.read_bytes()))
        assert same(read_pickled_arrays(write(tmp_path / "a.pkl", image, protocol)), [image])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_of_another_numpy(tmp_path: Path, protocol: int) -> None:
    """What numpy 1 wrote differs from what numpy 2 writes in the names of modules."""
    old, new = b"numpy.core.", b"numpy._core."
    written = pickle.dumps(volumes(), protocol=protocol)
    other = io.BytesIO()
    here = new if new in written else old
    there = old if here == new else new
    # protocol 4 and 5 have names with their lengths, in frames with theirs
    if protocol < 4:
        other.write(written.replace(here, there))
    else:
        for name in (b"multiarray", b"numeric"):
            full = here + name
            short = b"\x8c" + bytes([len(full)]) + full
            changed = b"\x8c" + bytes([len(there + name)]) + there + name
            written = written.replace(short, changed)
        difference = len(there) - len(here)
        position = written.index(b"\x95")
        (length,) = struct.unpack("<Q", written[position + 1 : position + 9])
        # of the one frame that holds the name
        other.write(written[: position + 1] + struct.pack("<Q", length + difference) + written[position + 9 :])
    assert there in other.getvalue() and here not in other.getvalue()
    assert same(read_pickled_arrays(write(tmp_path / "a.pkl", other.getvalue())), volumes())


def test_of_python_2(tmp_path: Path) -> None:
    """Byte strings for everything, as Python 2 wrote an array in protocol 2."""
    array = np.arange(200, 206, dtype="<f4").reshape(2, 3)
    data = array.tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(data) + b"tb."
    )
    assert same([pickle.loads(content, encoding="latin1")], [array])
    assert same(read_pickled_arrays(write(tmp_path / "a.pkl", content)), [array])


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    pass


PWNED = "echo x > pwned"
ARRAY = np.ones((2, 2), np.float32)
RECONSTRUCT, RECONSTRUCT_ARGUMENTS, STATE = ARRAY.__reduce__()
HUGE = (1, (2**20, 2**20), np.dtype("f4"), False, b"\0" * 16)
# each with the part of the message that says why; by which protocols it is written
FORBIDDEN: dict[str, tuple[Any, str]] = {
    "os.system": (Call(os.system, PWNED), r"'(posix|nt|os)\.system'"),
    "eval": (Call(eval, "open('pwned', 'w')"), r"(__builtin__|builtins)\.eval'"),
    "exec beside arrays": ((ARRAY, Call(exec, "open('pwned', 'w')")), r"(__builtin__|builtins)\.exec'"),
    "getattr": (Call(getattr, Call(__import__, "os"), "system"), r"(__builtin__|builtins)\.(getattr|__import__)'"),
    "nested": (Call(RECONSTRUCT, np.ndarray, Call(os.system, PWNED), b"b"), r"\.system'"),
    "in the state": (Call(RECONSTRUCT, *RECONSTRUCT_ARGUMENTS, state=(1, Call(os.system, PWNED))), r"\.system'"),
    "of the standard library": (Call(operator.attrgetter, "system"), r"operator\.attrgetter'"),
    "own class": (Plain(), r"test_pickle_reader\.Plain'|copy_?reg\._reconstructor'"),
    "numpy's loader": (Call(np.load, "a.npy"), r"'numpy\.load'"),
    "other numpy": (Call(np.ones, (3, 3)), r"'numpy.*\.ones'"),
    "decode": (Call(codecs.decode, b"x", "latin1"), r"'_codecs\.decode'"),
    "encode by another codec": (Call(codecs.encode, "x", "rot13"), r"encodes a str as 'rot13'"),
    "encode of bytes": (Call(codecs.encode, b"x", "zlib"), r"encodes a bytes as 'zlib'"),
    "objects": (np.array([None, 1], dtype=object), r"type 'O8'"),
    "text": (np.array(["a", "bc"]), r"type 'U2'"),
    "dates": (np.array(["2020-01-01"], dtype="M8[D]"), r"type 'M8'"),
    "structured": (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), r"type 'V8'"),
    "dictionary": ({"image": ARRAY}, r"a dict"),
    "number beside": ((ARRAY, 3), r"a int"),
    "nested tuple": (((ARRAY, ARRAY),), r"a tuple"),
    "nothing": ((), r"no arrays"),
    "None": (None, r"a NoneType"),
    "text alone": ("image", r"a str"),
    "claims more than there is": (Call(RECONSTRUCT, *RECONSTRUCT_ARGUMENTS, state=HUGE), r"has 16 bytes"),
    "negative size": (
        Call(RECONSTRUCT, *RECONSTRUCT_ARGUMENTS, state=(1, (-2, -2), np.dtype("f4"), False, b"\0" * 16)),
        r"shape \(-2, -2\)",
    ),
    "many axes": (
        Call(RECONSTRUCT, *RECONSTRUCT_ARGUMENTS, state=(1, (1,) * 40, np.dtype("u1"), False, b"\0")),
        r"has the shape",
    ),
    "values in a list": (
        Call(RECONSTRUCT, *RECONSTRUCT_ARGUMENTS, state=(1, (2,), np.dtype("f4"), False, [1, 2])),
        r"in a list",
    ),
    # the array's own constructor would take the memory at once
    "constructor": (Call(np.ndarray, (2**40,)), r"not a whole pickle file"),
    "dtype alone": (np.dtype("f4"), r"a DType"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("content", "message"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pkl", content, protocol)
    with pytest.raises(ValueError, match=message) as caught:
        read_pickled_arrays(path)
    assert "\n" not in str(caught.value) and "a.pkl" in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_the_attack_would_have_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(FORBIDDEN["exec beside arrays"][0]))
    assert (tmp_path / "pwned").exists()


ENCODE = b"c_codecs\nencode\n"
# written by hand: what pickle itself would not write
OPCODES: dict[str, bytes] = {
    "attributes of a function": ENCODE + b"}S'__code__'\nNsb.",
    "slots of a function": ENCODE + b"N}S'_call'\nNs\x86b.",
    "state of the class of arrays": b"cnumpy\nndarray\n(I1\ntb.",
    "instance of a class": b"(icnumpy\nndarray\n.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "persistent object": b"Pxyz\n.",
    "extension": b"\x82\x01.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
    "dotted name of a builtin": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
    "far place in memory": b"Nr\xff\xff\xff\xff.",
    "far place in memory as text": b"Np4000000000\n.",
    "long text promised": b"\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "long bytes promised": b"\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "long array of bytes promised": b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"x.",
    "long frame promised": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "unknown operation": b"\xff.",
    "empty stack": b".",
    "no end": b"N",
    "out of band": b"\x80\x05\x97.",
    "text": b"this is not a pickle",
    "empty": b"",
    "NIfTI": struct.pack("<i", 348) + bytes(400),
}


@pytest.mark.parametrize("content", OPCODES.values(), ids=OPCODES)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.pkl' (is refused: .*|is not a whole pickle file of numpy arrays)\.$"):
        read_pickled_arrays(write(tmp_path / "a.pkl", content))
    # nothing has been changed by trying
    assert same(read_pickled_arrays(write(tmp_path / "a.pkl", volumes(), 2)), volumes())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cut_short_and_damaged(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(volumes(), protocol=protocol)
    for length in range(0, len(content) - 1, 7):
        with pytest.raises(ValueError, match=r"a\.pkl'"):
            read_pickled_arrays(write(tmp_path / "a.pkl", content[:length]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            arrays = read_pickled_arrays(write(tmp_path / "a.pkl", bytes(damaged)))
        except ValueError:
            continue
        assert all(isinstance(array, np.ndarray) and array.dtype.kind in "biufc" for array in arrays)


def test_memory_of_a_bomb(tmp_path: Path) -> None:
    """No more memory than a few times the file, whatever it claims."""
    import tracemalloc

    path = write(tmp_path / "a.pkl", FORBIDDEN["claims more than there is"][0])
    tracemalloc.start()
    with pytest.raises(ValueError):
        read_pickled_arrays(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(("item", "index"), [("image", 0), ("label", 1), (0, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 7)])
def test_reader(tmp_path: Path, item: str | int, index: int, shape: tuple[int, ...]) -> None:
    # by name, of an image and its label map; by index, of whatever there is
    content = (*volumes("f", "F", shape), np.ones(shape, np.uint8))[: 2 if isinstance(item, str) else 3]
    reader = PickledVolumeReader(item)
    array, meta = reader.get_data(reader.read([write(tmp_path / "a.pkl", content)]))
    np.testing.assert_array_equal(array, content[index])
    assert array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative
    np.testing.assert_array_equal(meta["affine"], np.eye(4))
    np.testing.assert_array_equal(meta["original_affine"], np.eye(4))
    assert list(meta["spatial_shape"]) == list(shape) and meta["space"] == "RAS"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((*volumes(), *volumes()), r"must hold an image and perhaps its label map, (got|it holds) 4 arrays"),
        ((np.ones((3, 4), np.complex64),), r"holds complex numbers"),
    ],
)
def test_what_the_reader_refuses(tmp_path: Path, content: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PickledVolumeReader("image").read(write(tmp_path / "a.pkl", content))


def test_reader_with_affine(tmp_path: Path) -> None:
    affine = [[-2.0, 0, 0, 3], [0, 1, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]]
    path = write(tmp_path / "a.pkl", volumes())
    image = Compose(
        [
            LoadImaged("image", reader=PickledVolumeReader(affine=affine)),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )({"image": str(path)})["image"]
    # the first axis ran from right to left
    np.testing.assert_array_equal(image[0], volumes()[0][::-1])
    assert image.affine.tolist() == [[2.0, 0, 0, -1], *affine[1:]]


@pytest.mark.parametrize("suffix", [".pkl", ".PKL", ".pickle"])
def test_image_and_label_of_one_file(tmp_path: Path, suffix: str) -> None:
    path = str(write(tmp_path / f"subject_7{suffix}", volumes()))
    keys = ["image", "label", "moving_label", "source"]
    loaded = Compose([LoadVolumed(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS", labels=None)])(
        dict.fromkeys(keys, path)
    )
    image, label = volumes()
    for key, expected in zip(keys, (image, label, label, image)):
        assert isinstance(loaded[key], MetaTensor) and loaded[key].dtype == torch.float32
        np.testing.assert_array_equal(loaded[key][0], expected)
        assert loaded[key].meta["filename_or_obj"] == path
        assert loaded[key].affine.tolist() == np.eye(4).tolist()


def test_named_reader_wins(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.pkl", volumes()))
    loaded = LoadVolumed("image")({"image": path}, PickledVolumeReader("label"))
    np.testing.assert_array_equal(loaded["image"], volumes()[1])
    loaded = LoadVolumed("image", reader=PickledVolumeReader(1))({"image": path})
    np.testing.assert_array_equal(loaded["image"], volumes()[1])


def test_one_sentence_through_the_loader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", Call(os.system, PWNED))
    with pytest.raises(ValueError, match=r"^cannot read image '.*a\.pkl': .* refers to '\w+\.system'"):
        LoadVolumed("image")({"image": str(path)})
    write(path, volumes()[0])
    with pytest.raises(ValueError, match=r"^cannot read label '.*a\.pkl': .* no item 'label', it holds 1 array"):
        LoadVolumed("label")({"label": str(path)})
    with pytest.raises(ValueError, match=r"^cannot read image '.*b\.pkl': .*[Nn]o such file"):
        LoadVolumed("image")({"image": str(tmp_path / "b.pkl")})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.pkl", True), ("a.PKL", True), ("a.pickle", True), ("a.pkl.nii.gz", False), ("a.npy", False), ("pkl", False)],
)
def test_suffixes(name: str, expected: bool) -> None:
    assert PickledVolumeReader().verify_suffix(name) is expected
    assert PickledVolumeReader().verify_suffix(["b.pkl", name]) is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item": "mask"}, "'mask'"),
        ({"item": -1}, "-1"),
        ({"item": True}, "True"),
        ({"item": 1.0}, "1.0"),
        ({"affine": np.eye(3)}, "4 x 4"),
        ({"affine": np.full((4, 4), np.nan)}, "finite"),
    ],
)
def test_ill_formed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PickledVolumeReader(**arguments)


def test_one_file_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", volumes())
    with pytest.raises(ValueError, match="got 2"):
        PickledVolumeReader().read([path, path])
