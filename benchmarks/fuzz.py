"""Mutated files for the three readers of untrusted bytes.

    python benchmarks/fuzz.py [--count 100000] [--seed 0]

A third of the files each go to the pickle reader, the safetensors reader and
the reader of .pth files.
Hypothesis draws where and how each is damaged. A reader may return arrays
or raise CheckpointError. Anything else is a failure: another exception,
more than two seconds of computing, a gigabyte of memory, or a forbidden act (an import,
`exec`, `compile`, a process, a socket, opening another file), of which
Python's audit hooks tell us.
"""

import argparse
import contextlib
import gc
import io
import json
import pickle
import resource
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from annotated_moe.convert import import_op, pickle_parts
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.lazy import as_bytes
from annotated_moe.formats.pickles import (
    ALLOWED,
    OPCODES,
    Interpreted,
    interpret,
    read_pickled,
)
from annotated_moe.formats.pth import (
    TORCH_NAMES,
    global_op,
    open_pth,
    pth_bytes,
    pth_program,
)
from annotated_moe.formats.safetensors import open_arrays, safetensors_parts
from annotated_moe.quantization import QuantizedTensor

SECONDS, MEMORY = 2, 2**30
FORBIDDEN = (
    "import", "exec", "compile", "os.", "subprocess.", "socket.", "ctypes.",
    "pickle.find_class", "marshal.", "shutil.", "tempfile.", "code.", "pty.",
)


def joined(parts) -> bytes:
    return b"".join(bytes(as_bytes(part.data)) for part in parts)


def pickles() -> list[bytes]:
    """What we write, and what Python's own pickler writes."""
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = np.arange(24, dtype=np.int8).reshape(4, 6)
    pair = QuantizedTensor(weight, np.ones((2, 6), ml_dtypes.bfloat16))
    bf16 = small.astype(ml_dtypes.bfloat16)
    ours = [joined(pickle_parts(w, "x")) for w in (small, pair, bf16)]
    return [*ours, pickle.dumps(small, protocol=4), pickle.dumps(weight, protocol=4)]


def tensors() -> list[bytes]:
    many = {f"layer.{i}.w": np.full((2, 3), i, np.int8) for i in range(12)}
    mixed = {
        "a": np.ones((2, 2), np.float32),
        "b.weight": np.ones((3, 4), np.int8),
        "b.scales": np.ones((1, 4), ml_dtypes.bfloat16),
        "c": np.float32(1).reshape(()),
    }
    return [joined(safetensors_parts(arrays)) for arrays in (many, mixed)]


def numbers() -> st.SearchStrategy[int]:
    edges = [0, 1, 7, 8, 255, 2**16, 2**24, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, -1]
    return st.sampled_from(edges) | st.integers(0, 200)


# Damage to bytes: an edit is a place (in thousandths), a kind and data.
WORDS = [
    b"cos\nsystem\n", import_op("os", "system"), import_op("builtins", "eval"),
    import_op("__main__", "QuantizedWeight8bit"), b"\x8c\x04exec", b"R.", b"\x81", b"b",
    b"\x8e" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"(" * 9, b"h\x00", b"\x94" * 9,
    b'"F32"', b'"I8"', b'"data_offsets"', b"[0,0]", b"{", b"}", b"9" * 30, b"null",
    b"1e999", b"-1", b'"a":', b"\\ud800", b"[" * 2000,
    *(import_op(*name.rsplit(".", 1)) for name in ALLOWED),
]  # fmt: skip
EDITS = st.tuples(
    st.integers(0, 999),
    st.sampled_from(["set", "set", "put", "cut", "drop", "copy", "size"]),
    st.binary(min_size=1, max_size=2) | st.sampled_from(WORDS),
    st.integers(1, 64),
)


def edit(data: bytes, change) -> bytes:
    where, kind, new, size = change
    at = where * (len(data) + 1) // 1000
    if kind == "set":
        return data[:at] + new + data[at + len(new) :]
    if kind == "put":
        return data[:at] + new + data[at:]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + size :]
    if kind == "copy":
        return data[:at] + data[at : at + size] + data[at:]
    return new.ljust(8, b"\0")[:8] + data[8:]           # a header's length


# Damage to meaning: a header that is sound JSON and says something else.
JUNK = st.one_of(
    numbers(), st.none(), st.booleans(), st.floats(), st.text(max_size=3),
    st.lists(numbers(), max_size=3),
    st.sampled_from(["F32", "I8", "BF16", "F64", "U8"]),
)  # fmt: skip
CLAIMS = st.lists(
    st.tuples(
        st.integers(0, 11),
        st.sampled_from(["dtype", "shape", "data_offsets", ""]),
        JUNK,
    ),
    min_size=1,
    max_size=3,
)


def claim(data: bytes, claims) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = list(header)
    for index, field, value in claims:
        entry = header[names[index % len(names)]]
        if field and isinstance(entry, dict):
            entry[field] = value
        else:
            header[names[index % len(names)]] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# Programs that no pickler writes, of instructions that exist.
PROGRAMS = st.lists(
    st.sampled_from([*(bytes([c]) for c in OPCODES), *WORDS, *pickles()]), max_size=40
)
PICKLE = st.one_of(
    st.tuples(st.sampled_from(pickles()), st.lists(EDITS, min_size=1, max_size=4)),
    st.tuples(PROGRAMS.map(lambda p: b"\x80\x04" + b"".join(p)), st.just([])),
)
TENSORS = st.tuples(st.sampled_from(tensors()), st.lists(EDITS, min_size=1, max_size=4))
CLAIMED = st.builds(claim, st.sampled_from(tensors()), CLAIMS)


def damaged(pair) -> bytes:
    data, edits = pair
    for change in edits:
        data = edit(data, change)
    return data


# A .pth: damage to the zip, or to the program in a sound zip.
SOME = {
    "layers.0.w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "norm": np.ones(3, np.float16),
    "b": np.ones((2, 2), ml_dtypes.bfloat16),
}
PTH_WORDS = st.sampled_from([
    *map(global_op, sorted(TORCH_NAMES)), *(bytes([c]) for c in OPCODES),
    b"cos\nsystem\n",
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\xff" * 8,
    b"x/data/0", b"x/data.pkl", b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"r\xff\xff\xff\x7f",
])  # fmt: skip
PTH_EDITS = st.tuples(
    st.integers(0, 999),
    st.sampled_from(["set", "set", "set", "put", "cut", "drop", "copy"]),
    st.binary(min_size=1, max_size=2) | PTH_WORDS,
    st.integers(1, 64),
)


def around(program: bytes) -> bytes:
    """The .pth of SOME, with another program in it."""
    new = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pth_bytes(SOME))) as old,
        zipfile.ZipFile(new, "w") as archive,
    ):
        for member in old.infolist():
            inner = member.filename == "x/data.pkl"
            archive.writestr(member.filename, program if inner else old.read(member))
    return new.getvalue()


FEW = st.lists(PTH_EDITS, min_size=1, max_size=4)
PTH = st.tuples(st.just(pth_bytes(SOME)), FEW).map(damaged)
PTH_PROGRAM = st.tuples(st.just(pth_program(SOME)), FEW).map(damaged).map(around)

SEEN: Interpreted = {}
for sound in pickles():
    interpret(memoryview(sound), SEEN)


def bytes_of(w) -> list[bytes]:
    parts = (w.weight, w.scales) if isinstance(w, QuantizedTensor) else (w,)
    return [part.tobytes() for part in parts]


def read_twice(path: Path):
    """A pickle alone, and after sound ones that it may be like: the same."""
    got = []
    for seen in ({}, dict(SEEN)):
        try:
            got.append(read_pickled(path, seen))
        except CheckpointError as error:
            got.append(error)
    alone, later = got
    assert type(alone) is type(later), (alone, later)
    if isinstance(alone, CheckpointError):
        raise alone
    assert bytes_of(alone) == bytes_of(later)
    return later


CASES = {
    "pickle": (read_twice, PICKLE.map(damaged)),
    "pth": (open_pth, PTH | PTH_PROGRAM),
    "safetensors": (open_arrays, TENSORS.map(damaged) | CLAIMED),
}
GOOD = {"pickle": pickles()[0], "pth": pth_bytes(SOME), "safetensors": tensors()[0]}


class Guard:
    """Notes forbidden acts, while a reader runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.on = str(path), False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        other = event == "open" and str(args[0]) != self.path
        if other or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r}"[:200])


def too_slow(*_) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def attempt(reader, path: Path, data: bytes, guard: Guard) -> str:
    """What became of one file; an AssertionError if it was not allowed."""
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)       # of computing
    gc.disable()                        # Hypothesis listens to the collector
    guard.on = True
    try:
        got = reader(path)
    except CheckpointError as error:
        got = error
    finally:
        guard.on = False
        gc.enable()
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert not guard.seen, guard.seen
    if isinstance(got, CheckpointError):
        assert "\n" not in str(got) and len(str(got)) < 1000
        return "refused"
    arrays = got.values() if isinstance(got, dict) else [got]
    for w in arrays:
        parts = (w.weight, w.scales) if isinstance(w, QuantizedTensor) else (w,)
        assert sum(part.nbytes for part in parts) <= len(data)
        assert sum(map(len, bytes_of(w))) <= len(data)
    return "read"


def fuzz_one(kind, count, start, path, guard, outcomes) -> None:
    reader, strategy = CASES[kind]

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(data):
        outcomes[kind, attempt(reader, path, data, guard)] += 1

    one()


def fuzz(count: int, start: int, folder: Path) -> Counter:
    """`count` files; how many of each kind were read and refused."""
    path = folder / "file"
    outcomes: Counter = Counter()
    for kind, (reader, _) in CASES.items():         # import what a first use imports
        path.write_bytes(GOOD[kind])
        reader(path)
        path.write_bytes(b"\x00" * 9)
        with contextlib.suppress(CheckpointError):
            reader(path)
    b"x".decode("cp437")                            # a zip's old names
    guard = Guard(path)
    before = signal.signal(signal.SIGPROF, too_slow)
    for kind in CASES:
        fuzz_one(kind, -(-count // len(CASES)), start, path, guard, outcomes)
    signal.signal(signal.SIGPROF, before)
    return outcomes


def memory_now() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmSize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # An allocation beyond a gigabyte more than now is a MemoryError, a failure.
    most = memory_now() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    begin, rss = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(args.count, args.seed, Path(folder))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss
    for (kind, what), number in sorted(outcomes.items()):
        print(f"{kind:12s} {what:8s} {number:7,d}")
    total = sum(outcomes.values())
    spent = time.perf_counter() - begin
    print(f"{total:,} files, {spent:.0f} s, +{grown / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
