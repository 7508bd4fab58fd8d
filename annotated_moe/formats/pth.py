# Generated from book/chapters/15_meta.md by `make sync`; edit the chapter.
"""Files of torch.save: a zip and the pickle in it, read without running
anything.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from annotated_moe.formats.files import (
    MAX_JSON,
    CheckpointError,
    map_file,
    other_file,
)
from annotated_moe.formats.pickles import (
    MARK,
    OTHER_OPS,
    PUSH_OPS,
    Machine,
    Node,
    memoize,
    note_call,
    note_state,
    parse,
    set_items,
)


# %% book/chapters/15_meta.md, cell 5
def unicode_op(text: str) -> bytes:
    """BINUNICODE: four bytes of length, and the text."""
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def long_op(n: int) -> bytes:
    """LONG1: a byte of length, and the number's bytes."""
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_op(values: tuple[int, ...]) -> bytes:
    """MARK, the numbers, TUPLE."""
    return b"(" + b"".join(map(long_op, values)) + b"t"


def global_op(full: str) -> bytes:
    """GLOBAL: a name that pickle would import."""
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


# %% book/chapters/15_meta.md, cell 6
STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.CharStorage": np.dtype("i1"),
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED = "collections.OrderedDict"


# %% book/chapters/15_meta.md, cell 7
def tensor_program(key: str, w: np.ndarray) -> bytes:
    """Push a tensor: all of the storage `key`, in C order."""
    code = next(n for n, d in STORAGES.items() if d == w.dtype)
    strides = tuple(s // w.itemsize for s in w.strides)
    storage = b"".join([
        b"(", unicode_op("storage"), global_op(code), unicode_op(key),
        unicode_op("cpu"), long_op(w.size), b"tQ",
    ])
    hooks = global_op(ORDERED) + b")R"
    shape = long_op(0) + tuple_op(w.shape) + tuple_op(strides)
    args = b"(" + storage + shape + b"\x89" + hooks + b"t"
    return global_op(TENSOR) + args + b"R"


# %% book/chapters/15_meta.md, cell 8
def pth_program(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle of a dict of tensors, as `torch.save` would say it."""
    items = [
        unicode_op(name) + tensor_program(str(i), w)
        for i, (name, w) in enumerate(arrays.items())
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def pth_bytes(arrays: dict[str, np.ndarray], root: str = "x") -> bytes:
    """A .pth of small arrays in C order, as PyTorch reads it."""
    members = {
        "data.pkl": pth_program(arrays),
        "byteorder": b"little",
        **{f"data/{i}": w.tobytes()
           for i, w in enumerate(arrays.values())},
        "version": b"3\n",
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data)
    return file.getvalue()


# %% book/chapters/15_meta.md, cell 11
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def check_start(data: np.ndarray) -> None:
    """CheckpointError unless these are the bytes of a zip file."""
    start = data[: len(LEGACY)].tobytes()
    if start == LEGACY:
        raise CheckpointError(
            "was written by a PyTorch before 1.6, as one long pickle; "
            "load it in PyTorch and torch.save it again"
        )
    if start[:4] != b"PK\x03\x04":
        raise CheckpointError(
            other_file(data[:64].tobytes())
            or "is no zip file, which a .pth is: fetch it again"
        )


# %% book/chapters/15_meta.md, cell 12
BROKEN_ZIP = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError,
    OverflowError, EOFError, struct.error,
)


def zip_directory(path: Path) -> list[zipfile.ZipInfo]:
    """The zip's table of contents; CheckpointError if it has none."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except BROKEN_ZIP as error:
        why = " ".join(str(error).split())[:80]
        raise CheckpointError(
            f"has no sound zip directory ({why}): fetch it again"
        ) from None


# %% book/chapters/15_meta.md, cell 13
LOCAL_HEADER = struct.Struct("<4s22xHH")    # PK34, ..., two lengths
Span = tuple[int, int]                      # first byte, end


def member_span(data: np.ndarray, member: zipfile.ZipInfo) -> Span:
    """Where a member's bytes begin and end; stored as they are."""
    shown, at = repr(member.filename[:80]), member.header_offset
    packed = member.compress_type or member.flag_bits & 1
    if packed or member.compress_size != member.file_size:
        raise CheckpointError(
            f"holds {shown} compressed or encrypted, so that it cannot "
            "be mapped: torch.save it again"
        )
    if not 0 <= at <= len(data) - LOCAL_HEADER.size:
        raise CheckpointError(f"ends before {shown}: fetch it again")
    start, name, extra = LOCAL_HEADER.unpack_from(data.data, at)
    begin = at + LOCAL_HEADER.size + name + extra
    end = begin + member.file_size
    if start != b"PK\x03\x04" or end > len(data):
        raise CheckpointError(
            f"has no room for {shown} where its directory says: "
            "fetch it again"
        )
    return begin, end


# %% book/chapters/15_meta.md, cell 14
def member_spans(
    data: np.ndarray, members: list[zipfile.ZipInfo]
) -> dict[str, Span]:
    """Name -> span of each member; none there twice, none shared."""
    spans: dict[str, Span] = {}
    last = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.filename in spans or member.header_offset < last:
            raise CheckpointError(
                f"holds {member.filename[:80]!r} twice, or within "
                "another member: do not use this file"
            )
        begin, last = member_span(data, member)
        spans[member.filename] = begin, last
    return spans


def below_root(spans: dict[str, Span]) -> dict[str, Span]:
    """The members by their names below the archive's one folder."""
    roots = [name for name in spans if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"holds {len(roots)} files data.pkl; a .pth has one"
        )
    root = roots[0].removesuffix("data.pkl")
    size = len(root)
    return {n[size:]: s for n, s in spans.items() if n.startswith(root)}


# %% book/chapters/15_meta.md, cell 16
IGNORED_KINDS = {"_io.BytesIO", "io.BytesIO", "_codecs.encode"}
TORCH_NAMES = {TENSOR, PARAMETER, ORDERED, *STORAGES, *IGNORED_KINDS}


def look_up(full: str) -> Node:
    """Where pickle imports a name, we look it up."""
    if full in TORCH_NAMES:
        return Node(full)
    if full.startswith("torch.") and full.endswith("Storage"):
        raise CheckpointError(
            f"holds a {full[:40]!r}; supported are "
            f"{', '.join(STORAGES)}"
        )
    raise CheckpointError(
        f"names {full[:80]!r}, which no tensor needs; it "
        "was refused and nothing was run: do not use this file"
    )


# %% book/chapters/15_meta.md, cell 17
def read_line(machine: Machine) -> str:
    """The bytes up to the next line's end, as text."""
    rest = machine.data[machine.at : machine.at + 256]
    size = bytes(rest).find(b"\n")
    if size < 0:
        raise machine.malformed("a name without an end")
    text = bytes(machine.take(size + 1))[:-1]
    return text.decode("ascii", "replace")


def pop_name(machine: Machine) -> Node:
    """STACK_GLOBAL, as newer pickles have it: the name was pushed."""
    pair = machine.pop_many(2)
    if not all(isinstance(part, str) for part in pair):
        raise machine.malformed("a name that is not text")
    return look_up(".".join(pair))


# %% book/chapters/15_meta.md, cell 18
def note_torch_call(machine: Machine) -> Any:
    """REDUCE, NEWOBJ: we note the call; an OrderedDict is a dict."""
    kinds = TENSOR, PARAMETER, ORDERED, *sorted(IGNORED_KINDS)
    node = note_call(machine, kinds)
    if node.kind != ORDERED:
        return node
    if node.args:
        raise machine.malformed("an OrderedDict with arguments")
    return {}


def note_storage(machine: Machine) -> Node:
    """BINPERSID: PyTorch finds a storage here. We note which."""
    return Node("storage", (machine.pop(),))


# %% book/chapters/15_meta.md, cell 19
def long_text(machine: Machine) -> str:
    """BINUNICODE, of at most a thousand bytes."""
    size = machine.number(4)
    if size > 1000:
        raise machine.malformed(f"a name of {size} bytes")
    try:
        return str(machine.take(size), "utf-8")
    except UnicodeDecodeError:
        raise machine.malformed("this is no text") from None


def memoize_at(machine: Machine, index: int) -> None:
    """BINPUT: what is on top, into the memo. The next index only."""
    if index != len(machine.memo):
        raise machine.malformed(f"memo {index} out of order")
    memoize(machine)


def set_item(machine: Machine) -> None:
    """SETITEM: one name and value, into the dict below them."""
    name, value = machine.pop_many(2)
    machine.stack += [MARK, name, value]
    set_items(machine)


def drop_or_note_state(machine: Machine) -> None:
    """BUILD: attributes of an OrderedDict are dropped, others noted."""
    if len(machine.stack) > 1 and isinstance(machine.stack[-2], dict):
        machine.pop()
    else:
        note_state(machine)


# %% book/chapters/15_meta.md, cell 20
TORCH_PUSH_OPS: dict[str, Callable[[Machine], Any]] = {
    **PUSH_OPS,
    "GLOBAL": lambda m: look_up(f"{read_line(m)}.{read_line(m)}"),
    "STACK_GLOBAL": pop_name,
    "REDUCE": note_torch_call,
    "NEWOBJ": note_torch_call,
    "BINPERSID": note_storage,
    "BINUNICODE": long_text,
}
TORCH_OTHER_OPS: dict[str, Callable[[Machine], Any]] = {
    **OTHER_OPS,
    "BINPUT": lambda m: memoize_at(m, m.number(1)),
    "LONG_BINPUT": lambda m: memoize_at(m, m.number(4)),
    "SETITEM": set_item,
    "BUILD": drop_or_note_state,
}
MAX_TORCH_INSTRUCTIONS = 200_000


# %% book/chapters/15_meta.md, cell 22
def find_storage(
    node: Any, spans: dict[str, Span]
) -> tuple[np.dtype, int, int]:
    """Dtype, first byte and number of elements of a storage."""
    match node:
        case Node(
            kind="storage",
            args=((
                "storage", Node() as kind, str(key), _, int(count)
            ),),
        ):
            dtype = STORAGES.get(kind.kind)
            span = spans.get(f"data/{key}")
        case _:
            raise CheckpointError("is a tensor without a storage")
    if dtype is None or span is None:
        raise CheckpointError(
            f"lacks the storage {key[:40]!r} that its pickle names"
        )
    size = span[1] - span[0]
    if count * dtype.itemsize != size:
        raise CheckpointError(
            f"has {size} bytes in data/{key[:40]}, which is another "
            f"number of {dtype} than its pickle says"
        )
    return dtype, span[0], count


# %% book/chapters/15_meta.md, cell 23
def are_sizes(values: Any) -> bool:
    """Whether `values` is a tuple of at most eight sizes."""
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(n) is int and 0 <= n < 2**40 for n in values)
    )


def check_bounds(
    count: int, offset: int, shape: tuple, strides: tuple
) -> None:
    """CheckpointError unless all elements are in the storage."""
    last = sum((n - 1) * s for n, s in zip(shape, strides))
    many = math.prod(shape)
    inside = offset + (last + 1 if many else 0) <= count
    if len(shape) != len(strides) or not inside or many > count:
        raise CheckpointError(
            f"has shape {shape} and strides {strides} from element "
            f"{offset} on, in a storage of {count} elements"
        )


# %% book/chapters/15_meta.md, cell 24
def view_of(
    data: np.ndarray, node: Any, spans: dict[str, Span]
) -> np.ndarray:
    """The tensor that a node describes, as a view of its file."""
    match node:
        case Node(
            kind=str(kind), args=(inner, *_)
        ) if kind == PARAMETER:
            node = inner
    match node:
        case Node(
            kind=str(kind),
            args=(storage, offset, shape, strides, *rest),
        ) if kind == TENSOR and 2 <= len(rest) <= 3:
            dtype, begin, count = find_storage(storage, spans)
        case _:
            raise CheckpointError("is no tensor")
    if not all(map(are_sizes, (shape, strides, (offset,)))):
        raise CheckpointError("has a shape that no tensor has")
    check_bounds(count, offset, shape, strides)
    steps = tuple(s * dtype.itemsize for s in strides)
    first = begin + offset * dtype.itemsize
    return np.ndarray(shape, dtype, data.data, first, steps)


# %% book/chapters/15_meta.md, cell 25
def tensors_in(
    data: np.ndarray, spans: dict[str, Span]
) -> dict[str, np.ndarray]:
    """Name -> view of `data`, by what the pickle in it says."""
    order = data[slice(*spans.get("byteorder", (0, 0)))].tobytes()
    if order not in (b"", b"little"):
        raise CheckpointError("is not little-endian: save it anew")
    begin, end = spans["data.pkl"]
    if end - begin > MAX_JSON:
        raise CheckpointError(
            f"has a pickle of {end - begin} bytes; the most is "
            f"{MAX_JSON}"
        )
    described = parse(
        data[begin:end].data, TORCH_PUSH_OPS, TORCH_OTHER_OPS,
        MAX_TORCH_INSTRUCTIONS,
    )
    if not isinstance(described, dict):
        raise CheckpointError("holds no dict of tensors")
    tensors = {}
    for name, node in described.items():
        if name.endswith("_extra_state"):       # not a weight
            continue
        try:
            tensors[name] = view_of(data, node, spans)
        except CheckpointError as error:
            raise CheckpointError(
                f"holds {name[:80]!r}, which {error}"
            ) from None
    return tensors


# %% book/chapters/15_meta.md, cell 26
def open_pth(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a file of `torch.save`, mapped, not copied.

    Raises CheckpointError, naming the file. Nothing in it is run.
    """
    data = map_file(path)
    try:
        check_start(data)
        spans = below_root(member_spans(data, zip_directory(path)))
        return tensors_in(data, spans)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
