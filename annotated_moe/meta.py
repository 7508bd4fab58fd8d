# Generated from book/chapters/14_meta.md by `make sync`; edit the chapter.
"""Llama's largest model lies in sixteen files of 50 GB, each a zip with
a pickle inside, and no file holds one whole matrix: every one of them
has a slice of each. This chapter reads such a folder without running
the pickle and without ever holding the model. By its end `load`
understands `params.json` and `consolidated.00.pth`, and you can say of
any byte on the disk which row of which matrix it belongs to.
"""

# %% book/chapters/14_meta.md, cell 1
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from annotated_moe import checkpoints as ck
from annotated_moe.checkpoints import CheckpointError, Machine, Node


# %% book/chapters/14_meta.md, cell 3
STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.CharStorage": np.dtype("i1"),
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED = "collections.OrderedDict"


# %% book/chapters/14_meta.md, cell 4
def word(text: str) -> bytes:
    """BINUNICODE: four bytes of length, and the text."""
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


# %% book/chapters/14_meta.md, cell 5
def number(n: int) -> bytes:
    """LONG1: a byte of length, and the number's bytes."""
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


# %% book/chapters/14_meta.md, cell 6
def name_of(full: str) -> bytes:
    """GLOBAL: where pickle would import."""
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


# %% book/chapters/14_meta.md, cell 7
def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


# %% book/chapters/14_meta.md, cell 8
def tensor_program(key: str, w: np.ndarray) -> bytes:
    """Push a tensor: all of the storage `key`, in C order."""
    code = next(n for n, d in STORAGES.items() if d == w.dtype)
    strides = tuple(s // w.itemsize for s in w.strides)
    storage = b"".join(
        [b"(", word("storage"), name_of(code), word(key), word("cpu"),
         number(w.size), b"tQ"]
    )
    hooks = name_of(ORDERED) + b")R"
    shape = number(0) + numbers(w.shape) + numbers(strides)
    args = b"(" + storage + shape + b"\x89" + hooks + b"t"
    return name_of(TENSOR) + args + b"R"


# %% book/chapters/14_meta.md, cell 9
def pth_program(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle of a dict of tensors, as `torch.save` would say it."""
    items = [
        word(name) + tensor_program(str(i), w)
        for i, (name, w) in enumerate(arrays.items())
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


# %% book/chapters/14_meta.md, cell 10
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


# %% book/chapters/14_meta.md, cell 11
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


# %% book/chapters/14_meta.md, cell 12
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
            "is no zip file, which a .pth is: fetch it again"
        )


# %% book/chapters/14_meta.md, cell 13
BROKEN_ZIP = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError,
    OverflowError, EOFError, struct.error,
)


# %% book/chapters/14_meta.md, cell 14
def members_of(path: Path) -> list[zipfile.ZipInfo]:
    """The zip's table of contents; CheckpointError if it has none."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except BROKEN_ZIP as error:
        why = " ".join(str(error).split())[:80]
        raise CheckpointError(
            f"has no sound zip directory ({why}): fetch it again"
        ) from None


# %% book/chapters/14_meta.md, cell 15
LOCAL = struct.Struct("<4s22xHH")        # PK34, ..., two lengths


# %% book/chapters/14_meta.md, cell 16
def extent(
    data: np.ndarray, member: zipfile.ZipInfo
) -> tuple[int, int]:
    """Where a member's bytes begin and end; stored as they are."""
    shown, at = repr(member.filename[:80]), member.header_offset
    packed = member.compress_type or member.flag_bits & 1
    if packed or member.compress_size != member.file_size:
        raise CheckpointError(
            f"holds {shown} compressed or encrypted, so that it cannot "
            "be mapped: torch.save it again"
        )
    if not 0 <= at <= len(data) - LOCAL.size:
        raise CheckpointError(f"ends before {shown}: fetch it again")
    start, name, extra = LOCAL.unpack_from(data.data, at)
    begin = at + LOCAL.size + name + extra
    end = begin + member.file_size
    if start != b"PK\x03\x04" or end > len(data):
        raise CheckpointError(
            f"has no room for {shown} where its directory says: "
            "fetch it again"
        )
    return begin, end


# %% book/chapters/14_meta.md, cell 17
def extents(
    data: np.ndarray, members: list[zipfile.ZipInfo]
) -> dict[str, tuple[int, int]]:
    """Name -> begin and end of every member; none twice, none shared."""
    spans, last = {}, 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.filename in spans or member.header_offset < last:
            raise CheckpointError(
                f"holds {member.filename[:80]!r} twice, or within "
                "another member: do not use this file"
            )
        begin, last = extent(data, member)
        spans[member.filename] = begin, last
    return spans


# %% book/chapters/14_meta.md, cell 18
def below_root(
    spans: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """The members by their names below the archive's one folder."""
    roots = [name for name in spans if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(
            f"holds {len(roots)} files data.pkl; a .pth has one"
        )
    root = roots[0].removesuffix("data.pkl")
    size = len(root)
    return {n[size:]: s for n, s in spans.items() if n.startswith(root)}


# %% book/chapters/14_meta.md, cell 19
IGNORED_KINDS = {"_io.BytesIO", "io.BytesIO", "_codecs.encode"}
NAMES = {TENSOR, PARAMETER, ORDERED, *STORAGES, *IGNORED_KINDS}


# %% book/chapters/14_meta.md, cell 20
def line(machine: Machine) -> str:
    """The bytes up to the next line's end, as text."""
    rest = machine.data[machine.at : machine.at + 256]
    size = bytes(rest).find(b"\n")
    if size < 0:
        raise machine.broken("a name without an end")
    text = bytes(machine.take(size + 1))[:-1]
    return text.decode("ascii", "replace")


# %% book/chapters/14_meta.md, cell 21
def looked_up(full: str) -> Node:
    """Where pickle imports a name, we look it up."""
    if full in NAMES:
        return Node(full)
    if full.startswith("torch.") and full.endswith("Storage"):
        raise CheckpointError(
            f"holds a {full[:40]!r}; supported are {', '.join(STORAGES)}"
        )
    raise CheckpointError(
        f"names {full[:80]!r}, which no tensor needs; it "
        "was refused and nothing was run: do not use this file"
    )


# %% book/chapters/14_meta.md, cell 22
def stacked_name(machine: Machine) -> Node:
    """STACK_GLOBAL, as newer pickles have it: the name was pushed."""
    pair = machine.several(2)
    if not all(isinstance(part, str) for part in pair):
        raise machine.broken("a name that is not text")
    return looked_up(".".join(pair))


# %% book/chapters/14_meta.md, cell 23
def reduce(machine: Machine) -> Any:
    """REDUCE, NEWOBJ: we note the call; an OrderedDict is a dict."""
    kinds = TENSOR, PARAMETER, ORDERED, *sorted(IGNORED_KINDS)
    node = ck.call(machine, kinds)
    if node.kind != ORDERED:
        return node
    if node.args:
        raise machine.broken("an OrderedDict with arguments")
    return {}


# %% book/chapters/14_meta.md, cell 24
def storage(machine: Machine) -> Node:
    """BINPERSID: PyTorch finds a storage here. We note which."""
    return Node("storage", (machine.pop(),))


# %% book/chapters/14_meta.md, cell 25
def long_text(machine: Machine) -> str:
    """BINUNICODE, of at most a thousand bytes."""
    size = machine.number(4)
    if size > 1000:
        raise machine.broken(f"a name of {size} bytes")
    try:
        return str(machine.take(size), "utf-8")
    except UnicodeDecodeError:
        raise machine.broken("this is no text") from None


# %% book/chapters/14_meta.md, cell 26
def put(machine: Machine, index: int) -> None:
    """BINPUT: what is on top, into the memo. The next index only."""
    if index != len(machine.memo):
        raise machine.broken(f"memo {index} out of order")
    ck.memorize(machine)


# %% book/chapters/14_meta.md, cell 27
def set_item(machine: Machine) -> None:
    """SETITEM: one name and value, into the dict below them."""
    name, value = machine.several(2)
    machine.stack += [ck.MARK, name, value]
    ck.set_items(machine)


# %% book/chapters/14_meta.md, cell 28
def build(machine: Machine) -> None:
    """BUILD: attributes of an OrderedDict are dropped, others noted."""
    if len(machine.stack) > 1 and isinstance(machine.stack[-2], dict):
        machine.pop()
    else:
        ck.build(machine)


# %% book/chapters/14_meta.md, cell 29
PUSH: dict[str, Callable[[Machine], Any]] = {
    **ck.PUSH,
    "GLOBAL": lambda m: looked_up(f"{line(m)}.{line(m)}"),
    "STACK_GLOBAL": stacked_name,
    "REDUCE": reduce,
    "NEWOBJ": reduce,
    "BINPERSID": storage,
    "BINUNICODE": long_text,
}
DO: dict[str, Callable[[Machine], Any]] = {
    **ck.DO,
    "BINPUT": lambda m: put(m, m.number(1)),
    "LONG_BINPUT": lambda m: put(m, m.number(4)),
    "SETITEM": set_item,
    "BUILD": build,
}


# %% book/chapters/14_meta.md, cell 30
MOST_STEPS = 200_000


# %% book/chapters/14_meta.md, cell 31
Spans = dict[str, tuple[int, int]]


# %% book/chapters/14_meta.md, cell 32
def storage_of(
    node: Any, spans: Spans
) -> tuple[np.dtype, int, int]:
    """Dtype, first byte and number of elements of a storage."""
    whole = isinstance(node, Node) and node.kind == "storage"
    said = node.args[0] if whole and node.args else None
    if not isinstance(said, tuple) or len(said) != 5:
        raise CheckpointError("holds a tensor without a storage")
    tag, kind, key, _, count = said
    named = isinstance(tag, str) and isinstance(key, str)
    if not named or tag != "storage" or not isinstance(kind, Node):
        raise CheckpointError("holds a storage without a name")
    dtype, span = STORAGES.get(kind.kind), spans.get(f"data/{key}")
    if dtype is None or span is None:
        raise CheckpointError(
            f"lacks the storage {key[:40]!r} that its pickle names"
        )
    size = span[1] - span[0]
    if type(count) is not int or count * dtype.itemsize != size:
        raise CheckpointError(
            f"holds {size} bytes in data/{key[:40]}, which is another "
            f"number of {dtype} than its pickle says"
        )
    return dtype, span[0], count


# %% book/chapters/14_meta.md, cell 33
def are_sizes(values: Any) -> bool:
    """Whether `values` is a tuple of at most eight sizes."""
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(n) is int and 0 <= n < 2**40 for n in values)
    )


# %% book/chapters/14_meta.md, cell 34
def view_of(data: np.ndarray, node: Any, spans: Spans) -> np.ndarray:
    """The tensor that a node describes, as a view of its file."""
    if isinstance(node, Node) and node.kind == PARAMETER and node.args:
        node = node.args[0]
    whole = isinstance(node, Node) and node.kind == TENSOR
    args: tuple = node.args or () if whole else ()
    if not 6 <= len(args) <= 7:
        raise CheckpointError("is no tensor")
    dtype, begin, count = storage_of(args[0], spans)
    offset, shape, strides = args[1:4]
    sizes = are_sizes(shape) and are_sizes(strides)
    if not sizes or not are_sizes((offset,)):
        raise CheckpointError("has a shape that no tensor has")
    check_bounds(count, offset, shape, strides)
    steps = tuple(s * dtype.itemsize for s in strides)
    first = begin + offset * dtype.itemsize
    return np.ndarray(shape, dtype, data.data, first, steps)


# %% book/chapters/14_meta.md, cell 35
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


# %% book/chapters/14_meta.md, cell 36
def tensors_in(data: np.ndarray, spans: Spans) -> dict[str, np.ndarray]:
    """Name -> view of `data`, by what the pickle in it says."""
    order = data[slice(*spans.get("byteorder", (0, 0)))].tobytes()
    if order not in (b"", b"little"):
        raise CheckpointError("is not little-endian: torch.save it anew")
    begin, end = spans["data.pkl"]
    if end - begin > ck.MOST_JSON:
        raise CheckpointError(
            f"has a pickle of {end - begin} bytes; the most is "
            f"{ck.MOST_JSON}"
        )
    said = ck.parse(data[begin:end].data, PUSH, DO, MOST_STEPS)
    if not isinstance(said, dict):
        raise CheckpointError("holds no dict of tensors")
    tensors = {}
    for name, node in said.items():
        if name.endswith("_extra_state"):       # not a weight
            continue
        try:
            tensors[name] = view_of(data, node, spans)
        except CheckpointError as error:
            raise CheckpointError(f"{name[:80]!r} {error}") from None
    return tensors


# %% book/chapters/14_meta.md, cell 37
def open_pth(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a .pth file, mapped, not copied.

    Raises CheckpointError, naming the file. Nothing in it is run.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    try:
        check_start(data)
        spans = below_root(extents(data, members_of(path)))
        return tensors_in(data, spans)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
