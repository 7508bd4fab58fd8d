"""Meta's .pth files: read without running them, pieces joined lazily."""

import io
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from annotated_moe import meta
from annotated_moe.meta import CheckpointError, open_pth, pth_bytes, pth_program

ARRAYS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c.weight": np.arange(8).astype(ml_dtypes.bfloat16),
    "d.weight": np.arange(-3, 4, dtype=np.int8),
}


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], method=zipfile.ZIP_STORED, comment=b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = comment
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_program(program: bytes, arrays=ARRAYS) -> bytes:
    return zipped({**members(pth_bytes(arrays)), "x/data.pkl": program})


def opened(tmp_path, data: bytes):
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(data)
    return open_pth(path)


def refused(tmp_path, data: bytes, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    text = str(caught.value)
    assert "consolidated.00.pth" in text and "\n" not in text, text
    for word in words:
        assert word in text, text


def test_arrays_come_back_as_views(tmp_path):
    got = opened(tmp_path, pth_bytes(ARRAYS))
    assert list(got) == list(ARRAYS)
    for name, want in ARRAYS.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want)
        assert not got[name].flags.owndata and not got[name].flags.writeable


def test_storage_at_odd_bytes(tmp_path):
    """A zip puts a member wherever the names before it end."""
    for size in range(1, 9):
        got = opened(tmp_path, pth_bytes(ARRAYS, "r" * size))
        np.testing.assert_array_equal(got["a.weight"], ARRAYS["a.weight"])


def strided(shape, strides, offset=0, numel=24):
    """A program whose only tensor looks at storage 0 in its own way."""
    w = np.zeros(numel, np.float32)
    old = meta.number(0) + meta.numbers((numel,)) + meta.numbers((1,))
    program = meta.tensor_program("0", w)
    assert old in program
    new = meta.number(offset) + meta.numbers(shape) + meta.numbers(strides)
    return b"\x80\x02}(" + meta.word("w") + program.replace(old, new) + b"u."


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((6, 4), (1, 6), 0), ((2, 3), (6, 2), 7), ((4,), (6,), 5), ((), (), 23),
     ((0, 3), (3, 1), 24)],
)  # fmt: skip
def test_strided_views(tmp_path, shape, strides, offset):
    got = opened(tmp_path, with_program(strided(shape, strides, offset)))["w"]
    flat = np.arange(24, dtype=np.float32)[offset:]
    want = np.lib.stride_tricks.as_strided(flat, shape, [4 * s for s in strides])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((6, 4), (1, 6), 1), ((25,), (1,), 0), ((3, 9), (0, 1), 0), ((2,), (24,), 0),
     ((1,), (1,), 24), ((-1,), (1,), 3), ((2,), (-1,), 3), ((2,), (1,), -1),
     ((2, 2), (1,), 0), ((2**62,), (1,), 0), ((1,) * 9, (1,) * 9, 0)],
)  # fmt: skip
def test_views_beyond_the_storage(tmp_path, shape, strides, offset):
    refused(tmp_path, with_program(strided(shape, strides, offset)), "'w' has")


def test_other_spellings_of_the_pickle(tmp_path):
    """OrderedDict with attributes, Parameter, protocol 4, memo, extras."""
    w = meta.tensor_program("0", ARRAYS["a.weight"])
    ordered = meta.name_of(meta.ORDERED) + b")R"
    attributes = b"}" + meta.word("_metadata") + ordered + b"sb"
    program = b"\x80\x02" + ordered + b"q\x00(" + meta.word("w") + w + b"u" + attributes
    got = opened(tmp_path, with_program(program + b"."))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    parameter = meta.name_of(meta.PARAMETER) + b"(" + w + b"\x88" + ordered + b"tR"
    program = b"\x80\x02}" + meta.word("w") + parameter + b"s."
    got = opened(tmp_path, with_program(program))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    module, name = meta.TENSOR.rsplit(".", 1)
    short = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    newer = w.replace(meta.name_of(meta.TENSOR), short + b"\x93")
    assert newer != w
    program = b"\x80\x04}\x94(" + meta.word("w") + newer + b"\x94u."
    got = opened(tmp_path, with_program(program))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    extra = pickle.dumps(io.BytesIO(b"state \xff"), protocol=2)[2:-1]
    start = b"\x80\x02}" + b"(" + meta.word("wo._extra_state") + extra
    got = opened(tmp_path, with_program(start + meta.word("w") + w + b"u."))
    assert list(got) == ["w"]


def test_nothing_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in (2, 4):
        program = pickle.dumps({"w": Evil()}, protocol)
        refused(tmp_path, with_program(program), "mkdir", "nothing was run")
    assert not (tmp_path / "ran").exists()


def test_refused_files(tmp_path):
    good = pth_bytes(ARRAYS)
    parts = members(good)
    legacy = meta.LEGACY + b"\x80\x02}."
    refused(tmp_path, legacy, "before 1.6", "torch.save it again")
    refused(tmp_path, b"\x80\x02}.", "no zip file")
    refused(tmp_path, b"", "consolidated.00.pth")
    refused(tmp_path, good[:-30], "zip directory")
    refused(tmp_path, zipped(parts, zipfile.ZIP_DEFLATED), "compressed")
    refused(tmp_path, zipped({**parts, "x/byteorder": b"big"}), "little-endian")
    refused(tmp_path, zipped({**parts, "y/data.pkl": b"}."}), "2 files data.pkl")
    refused(tmp_path, zipped({"x/version": b"3"}), "0 files data.pkl")
    lacking = {n: d for n, d in parts.items() if n != "x/data/2"}
    refused(tmp_path, zipped(lacking), "c.weight", "lacks the storage '2'")
    short = {**parts, "x/data/0": parts["x/data/0"][:-4]}
    refused(tmp_path, zipped(short), "a.weight", "92 bytes")
    renamed = good.replace(b"x/data/1", b"x/data/0")
    refused(tmp_path, renamed, "'x/data/0' twice")
    code = meta.name_of("torch.FloatStorage")
    double = pth_program(ARRAYS).replace(code, meta.name_of("torch.DoubleStorage"))
    refused(tmp_path, with_program(double), "torch.DoubleStorage")
    refused(tmp_path, with_program(b"\x80\x02)."), "no dict of tensors")
    refused(tmp_path, with_program(b"\x80\x02}" + meta.word("w") + b")s."), "'w' is no")
    refused(tmp_path, with_program(b"\x80\x02}r\x00\x00\x00\x7f."), "memo")
    refused(tmp_path, with_program(b"\x80\x02" + b"}0" * 10), "POP")
    refused(tmp_path, with_program(b"\x80\x02" + b"}" * 300_000), "200000")


def test_directory_that_lies(tmp_path):
    """The central directory's offsets and flags are checked."""
    good = pth_bytes(ARRAYS)
    at = good.index(b"PK\x01\x02")
    encrypted = good[: at + 8] + b"\x01" + good[at + 9 :]
    refused(tmp_path, encrypted, "encrypted")
    far = good[: at + 42] + struct.pack("<I", len(good) - 8) + good[at + 46 :]
    refused(tmp_path, far)
    sizes = struct.pack("<II", 10**6, 10**6)
    long = good[: at + 20] + sizes + good[at + 28 :]
    refused(tmp_path, long, "x/data.pkl")


def test_zip64(tmp_path):
    """Sizes in the 64-bit extra field, as files over 4 GiB have them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members(pth_bytes(ARRAYS)).items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    got = opened(tmp_path, file.getvalue())
    np.testing.assert_array_equal(got["a.weight"], ARRAYS["a.weight"])
