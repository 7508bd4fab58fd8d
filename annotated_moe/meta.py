# Generated from book/chapters/14_meta.md by `make sync`; edit the chapter.
"""Llama 3.1 405B lies in eight files of 101 GB. Each is a zip with a
pickle inside, and none holds one whole matrix: every file has an eighth
of each. This chapter reads such a folder without running the pickle and
without ever holding the model. By its end `load` understands
`params.json` beside `consolidated.00.pth`, and you can say of any byte
in these files which row of which matrix it belongs to.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from annotated_moe import checkpoints as ck
from annotated_moe.checkpoints import CheckpointError, Machine, Node
from annotated_moe.model import ModelConfig, kinds
from annotated_moe.vision import VISION_META, VisionConfig, vision_names


# %% book/chapters/14_meta.md, cell 5
def word(text: str) -> bytes:
    """BINUNICODE: four bytes of length, and the text."""
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


# %% book/chapters/14_meta.md, cell 6
def number(n: int) -> bytes:
    """LONG1: a byte of length, and the number's bytes."""
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


# %% book/chapters/14_meta.md, cell 7
def name_of(full: str) -> bytes:
    """GLOBAL: where pickle would import."""
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


# %% book/chapters/14_meta.md, cell 8
def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


# %% book/chapters/14_meta.md, cell 9
STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.CharStorage": np.dtype("i1"),
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED = "collections.OrderedDict"


# %% book/chapters/14_meta.md, cell 10
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


# %% book/chapters/14_meta.md, cell 11
def pth_program(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle of a dict of tensors, as `torch.save` would say it."""
    items = [
        word(name) + tensor_program(str(i), w)
        for i, (name, w) in enumerate(arrays.items())
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


# %% book/chapters/14_meta.md, cell 12
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


# %% book/chapters/14_meta.md, cell 15
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


# %% book/chapters/14_meta.md, cell 16
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


# %% book/chapters/14_meta.md, cell 17
BROKEN_ZIP = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError,
    OverflowError, EOFError, struct.error,
)


# %% book/chapters/14_meta.md, cell 18
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


# %% book/chapters/14_meta.md, cell 19
LOCAL = struct.Struct("<4s22xHH")        # PK34, ..., two lengths


# %% book/chapters/14_meta.md, cell 20
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


# %% book/chapters/14_meta.md, cell 21
def extents(
    data: np.ndarray, members: list[zipfile.ZipInfo]
) -> dict[str, tuple[int, int]]:
    """Name -> begin and end of each member; none twice or shared."""
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


# %% book/chapters/14_meta.md, cell 22
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


# %% book/chapters/14_meta.md, cell 24
IGNORED_KINDS = {"_io.BytesIO", "io.BytesIO", "_codecs.encode"}
NAMES = {TENSOR, PARAMETER, ORDERED, *STORAGES, *IGNORED_KINDS}


# %% book/chapters/14_meta.md, cell 25
def line(machine: Machine) -> str:
    """The bytes up to the next line's end, as text."""
    rest = machine.data[machine.at : machine.at + 256]
    size = bytes(rest).find(b"\n")
    if size < 0:
        raise machine.broken("a name without an end")
    text = bytes(machine.take(size + 1))[:-1]
    return text.decode("ascii", "replace")


# %% book/chapters/14_meta.md, cell 26
def looked_up(full: str) -> Node:
    """Where pickle imports a name, we look it up."""
    if full in NAMES:
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


# %% book/chapters/14_meta.md, cell 27
def stacked_name(machine: Machine) -> Node:
    """STACK_GLOBAL, as newer pickles have it: the name was pushed."""
    pair = machine.several(2)
    if not all(isinstance(part, str) for part in pair):
        raise machine.broken("a name that is not text")
    return looked_up(".".join(pair))


# %% book/chapters/14_meta.md, cell 28
def reduce(machine: Machine) -> Any:
    """REDUCE, NEWOBJ: we note the call; an OrderedDict is a dict."""
    kinds = TENSOR, PARAMETER, ORDERED, *sorted(IGNORED_KINDS)
    node = ck.call(machine, kinds)
    if node.kind != ORDERED:
        return node
    if node.args:
        raise machine.broken("an OrderedDict with arguments")
    return {}


# %% book/chapters/14_meta.md, cell 29
def storage(machine: Machine) -> Node:
    """BINPERSID: PyTorch finds a storage here. We note which."""
    return Node("storage", (machine.pop(),))


# %% book/chapters/14_meta.md, cell 30
def long_text(machine: Machine) -> str:
    """BINUNICODE, of at most a thousand bytes."""
    size = machine.number(4)
    if size > 1000:
        raise machine.broken(f"a name of {size} bytes")
    try:
        return str(machine.take(size), "utf-8")
    except UnicodeDecodeError:
        raise machine.broken("this is no text") from None


# %% book/chapters/14_meta.md, cell 31
def put(machine: Machine, index: int) -> None:
    """BINPUT: what is on top, into the memo. The next index only."""
    if index != len(machine.memo):
        raise machine.broken(f"memo {index} out of order")
    ck.memorize(machine)


# %% book/chapters/14_meta.md, cell 32
def set_item(machine: Machine) -> None:
    """SETITEM: one name and value, into the dict below them."""
    name, value = machine.several(2)
    machine.stack += [ck.MARK, name, value]
    ck.set_items(machine)


# %% book/chapters/14_meta.md, cell 33
def build(machine: Machine) -> None:
    """BUILD: attributes of an OrderedDict are dropped, others noted."""
    if len(machine.stack) > 1 and isinstance(machine.stack[-2], dict):
        machine.pop()
    else:
        ck.build(machine)


# %% book/chapters/14_meta.md, cell 34
PUSH: dict[str, Callable[[Machine], Any]] = {
    **ck.PUSH,
    "GLOBAL": lambda m: looked_up(f"{line(m)}.{line(m)}"),
    "STACK_GLOBAL": stacked_name,
    "REDUCE": reduce,
    "NEWOBJ": reduce,
    "BINPERSID": storage,
    "BINUNICODE": long_text,
}


# %% book/chapters/14_meta.md, cell 35
DO: dict[str, Callable[[Machine], Any]] = {
    **ck.DO,
    "BINPUT": lambda m: put(m, m.number(1)),
    "LONG_BINPUT": lambda m: put(m, m.number(4)),
    "SETITEM": set_item,
    "BUILD": build,
}


# %% book/chapters/14_meta.md, cell 36
MOST_STEPS = 200_000


# %% book/chapters/14_meta.md, cell 37
Spans = dict[str, tuple[int, int]]


# %% book/chapters/14_meta.md, cell 38
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


# %% book/chapters/14_meta.md, cell 39
def are_sizes(values: Any) -> bool:
    """Whether `values` is a tuple of at most eight sizes."""
    return (
        isinstance(values, tuple)
        and len(values) <= 8
        and all(type(n) is int and 0 <= n < 2**40 for n in values)
    )


# %% book/chapters/14_meta.md, cell 40
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


# %% book/chapters/14_meta.md, cell 41
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


# %% book/chapters/14_meta.md, cell 42
def tensors_in(data: np.ndarray, spans: Spans) -> dict[str, np.ndarray]:
    """Name -> view of `data`, by what the pickle in it says."""
    order = data[slice(*spans.get("byteorder", (0, 0)))].tobytes()
    if order not in (b"", b"little"):
        raise CheckpointError("is not little-endian: save it anew")
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


# %% book/chapters/14_meta.md, cell 43
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


# %% book/chapters/14_meta.md, cell 51
@dataclass(frozen=True, eq=False, repr=False)
class Assembled(ck.Lazy):
    """Arrays beside one another along `axis`, not copied.

    `w[3]` is a lazy row; another index (integers, slices, or an
    array of rows) copies what it names and no more.
    """

    parts: list
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(p.shape[self.axis] for p in self.parts)
        return tuple(sizes)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def T(self) -> "Assembled":
        axis = len(self.shape) - 1 - self.axis
        return Assembled([part.T for part in self.parts], axis)

    def __getitem__(self, index: Any) -> Any:
        return assembled_item(self, index)


# %% book/chapters/14_meta.md, cell 52
def cut(w: Assembled, spans: list[slice]) -> Iterator[np.ndarray]:
    """What `spans` name of each part; parts beside them are unread."""
    before, after = spans[: w.axis], spans[w.axis + 1 :]
    start, stop, step = spans[w.axis].indices(w.shape[w.axis])
    at = 0
    for part in w.parts:
        size = part.shape[w.axis]
        first = max(start, at)
        first += (start - first) % step
        mine = slice(first - at, min(stop, at + size) - at, step)
        if mine.start < mine.stop:
            yield part[(*before, mine, *after)]
        at += size


# %% book/chapters/14_meta.md, cell 53
def as_span(index: Any, size: int) -> slice:
    """One axis' index as a slice that steps forward."""
    if isinstance(index, slice):
        if (index.step or 1) < 1:
            raise IndexError("a step must be at least 1")
        return index
    at = range(size)[index]
    return slice(at, at + 1)


# %% book/chapters/14_meta.md, cell 54
def assembled_item(w: Assembled, index: Any) -> Any:
    """`w[index]`: one row stays lazy, all else is read."""
    index = index if isinstance(index, tuple) else (index,)
    alone = len(index) == 1 and not isinstance(index[0], slice)
    index += (slice(None),) * (len(w.shape) - len(index))
    if isinstance(index[0], np.ndarray):
        return np.stack([w[(int(i), *index[1:])] for i in index[0]])
    if alone and len(w.shape) > 1:
        return row_of(w, range(len(w))[index[0]])
    spans = [as_span(i, n) for i, n in zip(index, w.shape)]
    blocks = list(cut(w, spans))
    if not blocks:                              # nothing, in its shape
        spans[w.axis] = slice(0)
        blocks = [w.parts[0][tuple(spans)]]
    whole = blocks[0]
    if len(blocks) > 1:
        whole = np.concatenate(blocks, w.axis)
    keep = (slice(None) if isinstance(i, slice) else 0 for i in index)
    return whole[tuple(keep)]


# %% book/chapters/14_meta.md, cell 55
def row_of(w: Assembled, row: int) -> Assembled:
    """Row `row` of axis 0, still lazy."""
    if w.axis:
        return Assembled([part[row] for part in w.parts], w.axis - 1)
    for part in w.parts:
        if row < len(part):
            break
        row -= len(part)
    return Assembled([part[row]], 0)


# %% book/chapters/14_meta.md, cell 58
def columns(pieces: list[np.ndarray]) -> Assembled:
    """[out/R, in] of each file: ours is [in, out]."""
    return Assembled([piece.T for piece in pieces], 1)


# %% book/chapters/14_meta.md, cell 59
def rows(pieces: list[np.ndarray]) -> Assembled:
    """[out, in/R] of each file: ours is [in, out]."""
    return Assembled([piece.T for piece in pieces], 0)


# %% book/chapters/14_meta.md, cell 60
def split_halves(
    pieces: list[np.ndarray], head_size: int
) -> list[np.ndarray]:
    """Each head's even rows, then its odd ones: only views."""
    return [
        piece[start + odd : start + head_size : 2]
        for piece in pieces
        for start in range(0, len(piece), head_size)
        for odd in (0, 1)
    ]


# %% book/chapters/14_meta.md, cell 64
LAYER = "decoder_layer"
ATTENTION = f"{LAYER}/multi_head_attention"
MOE, SHARED = f"{LAYER}/moe", f"{LAYER}/shared"
Row = tuple[str, str, str]
WHOLE: tuple[Row, ...] = (
    ("tok_embeddings.weight", "in_out_embed/embeddings", "table"),
    ("output.weight", "lm_head/embeddings", "words"),
    ("norm.weight", "rms_norm/scale", "copies"),
)


# %% book/chapters/14_meta.md, cell 65
BOTH: tuple[Row, ...] = (
    ("attention_norm.weight", f"{LAYER}/rms_norm/scale", "copies"),
    ("ffn_norm.weight", f"{LAYER}/rms_norm_2/scale", "copies"),
    ("attention.wq.weight", f"{ATTENTION}/query/w", "turned"),
    ("attention.wk.weight", f"{ATTENTION}/key/w", "turned"),
    ("attention.wv.weight", f"{ATTENTION}/value/w", "columns"),
    ("attention.wo.weight", f"{ATTENTION}/linear/w", "rows"),
    ("feed_forward.w1.weight", f"{LAYER}/linear/w", "columns"),
    ("feed_forward.w3.weight", f"{LAYER}/linear_v/w", "columns"),
    ("feed_forward.w2.weight", f"{LAYER}/linear_1/w", "rows"),
)


# %% book/chapters/14_meta.md, cell 66
FF = "feed_forward"


# %% book/chapters/14_meta.md, cell 67
FUSED: tuple[Row, ...] = (
    ("attention.wqkv.layer_norm_weight",
     f"{LAYER}/rms_norm/scale", "copies"),
    (f"{FF}.mlp.layer_norm_weight",
     f"{LAYER}/rms_norm_2/scale", "copies"),
    (f"{FF}.norm.weight", f"{LAYER}/rms_norm_2/scale", "copies"),
    ("attention.wqkv.weight", f"{ATTENTION}/query/w", "query of 3"),
    ("attention.wqkv.weight", f"{ATTENTION}/key/w", "key of 3"),
    ("attention.wqkv.weight", f"{ATTENTION}/value/w", "value of 3"),
    (f"{FF}.mlp.fc1_weight", f"{LAYER}/linear/w", "upper half"),
    (f"{FF}.mlp.fc1_weight", f"{LAYER}/linear_v/w", "lower half"),
    (f"{FF}.mlp.fc2_weight", f"{LAYER}/linear_1/w", "rows"),
)


# %% book/chapters/14_meta.md, cell 68
EXPERTS: tuple[Row, ...] = (
    (f"{FF}.router_DE", f"{LAYER}/router/w", "copies"),
    (f"{FF}.experts.moe_w_in_eD_F", f"{MOE}/linear/w", "experts"),
    (f"{FF}.experts.moe_w_swiglu_eD_F", f"{MOE}/linear_v/w", "experts"),
    (f"{FF}.experts.moe_w_out_eF_D", f"{MOE}/linear_1/w", "out"),
    (f"{FF}.w_in_shared_FD.weight", f"{SHARED}/linear/w", "columns"),
    (f"{FF}.w_swiglu_FD.weight", f"{SHARED}/linear_v/w", "columns"),
    (f"{FF}.w_out_shared_DF.weight", f"{SHARED}/linear_1/w", "rows"),
    (f"{FF}.experts.w1", f"{MOE}/linear/w", "experts"),
    (f"{FF}.experts.w3", f"{MOE}/linear_v/w", "experts"),
    (f"{FF}.experts.w2", f"{MOE}/linear_1/w", "out"),
    (f"{FF}.shared_expert.w1.weight", f"{SHARED}/linear/w", "columns"),
    (f"{FF}.shared_expert.w3.weight",
     f"{SHARED}/linear_v/w", "columns"),
    (f"{FF}.shared_expert.w2.weight", f"{SHARED}/linear_1/w", "rows"),
)


# %% book/chapters/14_meta.md, cell 69
META_WEIGHTS = WHOLE + BOTH + FUSED + EXPERTS


# %% book/chapters/14_meta.md, cell 70
Way = Callable[[list[np.ndarray], ModelConfig], Assembled]
WAYS: dict[str, Way] = {
    "columns": lambda pieces, c: columns(pieces),
    "rows": lambda pieces, c: rows(pieces),
    "turned": lambda pieces, c: columns(
        split_halves(pieces, c.head_size)
    ),
    "words": lambda pieces, c: Assembled(pieces, 0),
}


# %% book/chapters/14_meta.md, cell 71
def table(pieces: list[np.ndarray], c: ModelConfig) -> Assembled:
    """[V/R, D] of each file, or [V, D/R]: the shape says which."""
    return Assembled(pieces, int(pieces[0].shape[-1] != c.d_model))


# %% book/chapters/14_meta.md, cell 72
def copies(pieces: list[np.ndarray], c: ModelConfig) -> Assembled:
    """The same in all files, which is checked."""
    if any(ck.as_bytes(p) != ck.as_bytes(pieces[0]) for p in pieces):
        raise CheckpointError(
            "is not the same in all files: they are not of one model"
        )
    return Assembled(pieces[:1], 0)


# %% book/chapters/14_meta.md, cell 73
def of_three(
    pieces: list[np.ndarray], which: int, c: ModelConfig
) -> list[np.ndarray]:
    """Queries (0), keys (1) or values (2) of each file's wqkv."""
    heads = c.q_heads, c.kv_heads, c.kv_heads
    sizes = [n // len(pieces) * c.head_size for n in heads]
    if len(pieces[0]) != sum(sizes):
        raise CheckpointError(
            f"has {len(pieces[0])} rows in each file; expected "
            f"{' + '.join(map(str, sizes))}"
        )
    start = sum(sizes[:which])
    return [piece[start : start + sizes[which]] for piece in pieces]


# %% book/chapters/14_meta.md, cell 74
def half(pieces: list[np.ndarray], lower: int) -> list[np.ndarray]:
    """The upper (0) or lower (1) half of each file's rows."""
    size = len(pieces[0]) // 2
    start = lower * size
    return [piece[start : start + size] for piece in pieces]


# %% book/chapters/14_meta.md, cell 75
def by_expert(
    pieces: list[np.ndarray], axis: int, c: ModelConfig
) -> Assembled:
    """[E * in, out] of each file as [E, in, out], cut along `axis`."""
    flat = [p.reshape(-1, p.shape[-1]) for p in pieces]
    e = c.num_experts
    if len(flat[0]) % e:
        raise CheckpointError(
            f"has {len(flat[0])} rows, which {e} experts do not divide"
        )
    whole = [p.reshape(e, -1, p.shape[-1]) for p in flat]
    return Assembled(whole, axis)


# %% book/chapters/14_meta.md, cell 76
WAYS |= {
    "table": table,
    "copies": copies,
    "query of 3": lambda p, c: WAYS["turned"](of_three(p, 0, c), c),
    "key of 3": lambda p, c: WAYS["turned"](of_three(p, 1, c), c),
    "value of 3": lambda p, c: columns(of_three(p, 2, c)),
    "upper half": lambda p, c: columns(half(p, 0)),
    "lower half": lambda p, c: columns(half(p, 1)),
    "experts": lambda p, c: by_expert(p, 2, c),
    "out": lambda p, c: by_expert(p, 1, c),
}


# %% book/chapters/14_meta.md, cell 77
def pth_files(folder: Path) -> list[Path]:
    """consolidated.00.pth and on; CheckpointError for a gap."""
    found = sorted(
        name for name in ck.names_in(folder)
        if name.startswith("consolidated.") and name.endswith(".pth")
    )
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    for there, name in zip(found, wanted):
        if there != name:
            raise CheckpointError(
                f"{folder} lacks {name} but has {there}: fetch it"
            )
    return [folder / name for name in found]


# %% book/chapters/14_meta.md, cell 78
def refuse_other(files: list[Path], ranks: list[dict]) -> None:
    """CheckpointError unless all files hold alike pieces of all."""
    first = ranks[0]
    for file, rank in zip(files, ranks):
        for name in sorted(set(first) ^ set(rank)):
            lacks = file if name in first else files[0]
            raise CheckpointError(
                f"{lacks} lacks {name[:80]!r}, which other files have"
            )
        for name, w in rank.items():
            a, b = first[name], w
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise CheckpointError(
                    f"{file}: {name[:80]!r} is {b.dtype} {b.shape}; in "
                    f"{files[0].name} it is {a.dtype} {a.shape}"
                )


# %% book/chapters/14_meta.md, cell 79
def open_ranks(folder: Path) -> dict[str, list[np.ndarray]]:
    """Name -> its piece in each file; tables of angles left out."""
    files = pth_files(folder)
    ranks = [open_pth(file) for file in files]
    refuse_other(files, ranks)
    names = [n for n in ranks[0] if not n.endswith("rope.freqs")]
    return {name: [rank[name] for rank in ranks] for name in names}


# %% book/chapters/14_meta.md, cell 80
def layers_with(path: str, config: ModelConfig) -> list[int]:
    """The layers that have a parameter: with experts, without, all."""
    block = path.split("/")[1]
    sparse = block in ("router", "moe", "shared")
    dense = block in ("linear", "linear_v", "linear_1")
    return [
        i for i, kind in enumerate(kinds(config))
        if not (sparse and not kind.experts or dense and kind.experts)
    ]


# %% book/chapters/14_meta.md, cell 81
def one_of(
    where: Path,
    arrays: dict[str, list[np.ndarray]],
    path: str,
    before: str,
) -> tuple[str, str]:
    """Under which of its names a parameter is there, and the way."""
    rows = [row for row in META_WEIGHTS if row[1] == path]
    spelled = [(name, way) for name, _, way in rows]
    for name, way in spelled:
        if before + name in arrays:
            return before + name, way
    names = " or ".join(before + name for name, _ in spelled)
    raise CheckpointError(f"{where} lacks {names or path}")


# %% book/chapters/14_meta.md, cell 82
def check_heads(where: Path, config: ModelConfig, files: int) -> None:
    """CheckpointError where a file would hold part of a head."""
    for name in ("q_heads", "kv_heads"):
        if getattr(config, name) % files:
            raise CheckpointError(
                f"{where} has {files} files, which do not divide "
                f"{name} = {getattr(config, name)}; Meta publishes "
                "such models with each key head repeated and counted"
            )


# %% book/chapters/14_meta.md, cell 83
BY_ROWS = ("attn.wo.weight", "mlp.c_proj.weight")
BY_COLUMNS = tuple(
    f"{name}.{kind}" for kind in ("weight", "bias")
    for name in ("attn.wq", "attn.wk", "attn.wv", "mlp.c_fc",
                 "conv1._linear", "vision_projection")
)


# %% book/chapters/14_meta.md, cell 84
def image_weights(
    where: Path, arrays: dict, used: set, path: str, c: ModelConfig
) -> Any:
    """A parameter of the encoder of images, from all files."""
    theirs, _, way = next(r for r in VISION_META if r[1] == path)
    change, stacked = ck.CHANGES[way][0], "{i}" in theirs
    shape, parts = ck.expected(c)[path], []
    for name in vision_names(theirs, cast(VisionConfig, c.vision)):
        if name not in arrays:
            raise CheckpointError(f"{where} lacks {name}")
        used.add(name)
        if name.endswith(BY_ROWS + BY_COLUMNS):
            axis = int(name.endswith(BY_ROWS))
            w = Assembled(arrays[name], axis)
        else:
            w = copies(arrays[name], c)
        parts.append(change(w, c))
        check = f"{name} as {path}"
        ck.check_tensor(where, check, parts[-1], shape[stacked:])
    return ck.stack_layers(where, path, parts) if stacked else parts[0]


# %% book/chapters/14_meta.md, cell 85
def read_meta(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Path -> tensor of Meta's layout, mapped from disk and joined
    lazily. CheckpointError for one missing, left over or misshapen.
    """
    arrays, used = open_ranks(folder), set()
    check_heads(folder, config, len(next(iter(arrays.values()))))

    def one(path: str, before: str, shape: tuple) -> Assembled:
        name, way = one_of(folder, arrays, path, before)
        used.add(name)
        try:
            w = WAYS[way](arrays[name], config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name} {error}") from None
        ck.check_tensor(folder, f"{name} as {path}", w, shape)
        return w

    def all_of(path: str, shape: tuple) -> Any:
        if path.startswith("vision/"):
            return image_weights(folder, arrays, used, path, config)
        if not path.startswith(f"{LAYER}/"):
            return one(path, "", shape)
        layers = layers_with(path, config)
        parts = [one(path, f"layers.{i}.", shape[1:]) for i in layers]
        return ck.stack_layers(folder, path, parts)

    shapes = ck.expected(config)
    tensors = {path: all_of(path, shapes[path]) for path in shapes}
    refuse_rest(folder, set(arrays) - used)
    return tensors


# %% book/chapters/14_meta.md, cell 86
def refuse_rest(folder: Path, names: set[str]) -> None:
    """CheckpointError for tensors that nothing asked for."""
    if names:
        raise CheckpointError(
            f"{folder} holds {min(names)[:80]!r}, which its "
            "params.json has no place for"
        )


# %% book/chapters/14_meta.md, cell 87
WHOLE_NUMBERS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim",
    "vocab_size", "multiple_of", "attention_chunk_size",
    "nope_layer_interval", "num_experts", "top_k",
    "interleave_moe_layer_step", "max_batch_size", "max_seq_len",
}


# %% book/chapters/14_meta.md, cell 88
REALS = {
    "ffn_dim_multiplier", "ffn_exp", "norm_eps", "rope_theta",
    "rope_scaling_factor", "rope_high_freq_factor", "floor_scale",
    "attn_scale", "capacity_factor",
}


# %% book/chapters/14_meta.md, cell 89
SWITCHES = {
    "use_scaled_rope", "use_qk_norm", "attn_temperature_tuning",
    "auto_scale_F",
}
MOE_FIELDS = {
    "num_experts", "top_k", "interleave_moe_layer_step",
    "capacity_factor", "auto_scale_F",
}


# %% book/chapters/14_meta.md, cell 90
OBJECTS = {"moe_args", "vision_args"}
FIELDS = (WHOLE_NUMBERS | REALS | SWITCHES | OBJECTS) - MOE_FIELDS
LLAMA4 = {
    "head_dim", "ffn_exp", "attention_chunk_size", "use_qk_norm",
    "rope_scaling_factor", "rope_high_freq_factor", "moe_args",
    "nope_layer_interval", "attn_temperature_tuning", "floor_scale",
    "attn_scale",
}


# %% book/chapters/14_meta.md, cell 91
def good_value(name: str, value: Any) -> bool:
    """Whether a field of params.json holds what it should."""
    if name in SWITCHES:
        return type(value) is bool
    if name == "vocab_size" and value == -1:
        return type(value) is int
    whole = type(value) is int
    number = whole or name in REALS and type(value) is float
    return number and 0 < value < 2**31


# %% book/chapters/14_meta.md, cell 92
def check_params(path: Path, raw: Any, known: set[str]) -> dict:
    """The fields that are set; CheckpointError for a wrong one."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: moe_args must be an object")
    values = {n: v for n, v in raw.items() if v is not None}
    ck.refuse_unknown(path, values, known)
    for name, value in values.items():
        if name not in OBJECTS and not good_value(name, value):
            switch = name in SWITCHES
            kind = "true or false" if switch else "a number above 0"
            raise CheckpointError(
                f"{path}: {name} is {str(value)[:40]}; expected {kind}"
            )
    return values


# %% book/chapters/14_meta.md, cell 93
def need(path: Path, values: dict, name: str) -> Any:
    if name not in values:
        raise CheckpointError(f"{path} lacks the field {name!r}")
    return values[name]


# %% book/chapters/14_meta.md, cell 94
def ffn_width(
    hidden: int,
    multiplier: int | float,
    multiple: int,
    share: int | float = 1,
) -> int:
    """Two thirds of `hidden`, scaled, up to a multiple of `multiple`.

    Source: llama-models, `FeedForward` and `MoE`.
    """
    hidden = int(multiplier * int(2 * hidden / 3))
    return -(-int(hidden / share) // multiple) * multiple


# %% book/chapters/14_meta.md, cell 95
def widths(path: Path, raw: dict, moe: dict) -> dict[str, int]:
    """d_ff and dense_ff, as the release computes them."""
    dim, multiple = raw["dim"], raw.get("multiple_of", 256)
    by = raw.get("ffn_dim_multiplier", 1)
    dense = ffn_width(4 * dim, by, multiple)
    if not moe:
        return {"d_ff": dense}
    by = need(path, raw, "ffn_dim_multiplier")
    hidden = int(need(path, raw, "ffn_exp") * dim)
    share = moe.get("capacity_factor", 1.0) + 1
    share = share if moe.get("auto_scale_F", True) else 1
    wide = ffn_width(hidden, by, multiple, share)
    return {"d_ff": wide, "dense_ff": dense}


# %% book/chapters/14_meta.md, cell 98
def vocabulary(folder: Path, raw: dict) -> int:
    """V of params.json; where it is -1 or missing, of the embedding."""
    said = raw.get("vocab_size", -1)
    if said > 0:
        return said
    pieces = open_ranks(folder).get("tok_embeddings.weight", [])
    if not pieces or pieces[0].ndim != 2:
        raise CheckpointError(f"{folder} lacks tok_embeddings.weight")
    rows, width = pieces[0].shape
    return rows * len(pieces) if width == raw["dim"] else rows


# %% book/chapters/14_meta.md, cell 99
def positions(raw: dict) -> dict[str, Any]:
    """RoPE's base and scaling, and the context each generation has."""
    llama4, scaled = LLAMA4 & set(raw), raw.get("use_scaled_rope")
    modern = llama4 or "rope_theta" in raw or "use_scaled_rope" in raw
    base = raw.get("rope_theta", 5e5 if modern else 1e4)
    values: dict[str, Any] = {
        "rope_base": float(base),
        "context": 8192 if modern else 4096,
    }
    factor, high = 8, 4
    if llama4:
        factor = raw.get("rope_scaling_factor", 16)
        high = raw.get("rope_high_freq_factor", 1)
        values["context"] = 1048576
    if scaled:
        values["rope_scaling"] = (float(factor), 1.0, float(high), 8192)
        values["context"] = 10485760 if llama4 else 131072
    return values


# %% book/chapters/14_meta.md, cell 100
def llama4_values(raw: dict) -> dict[str, Any]:
    """What only Llama 4 has, except its experts."""
    values: dict[str, Any] = {}
    if raw.get("use_qk_norm"):
        values["qk_norm"] = "after_rope"
    if raw.get("attn_temperature_tuning"):
        floor = raw.get("floor_scale", 8192)
        whole = int(floor) if floor == int(floor) else floor
        values["attn_temperature"] = whole, raw.get("attn_scale", 0.1)
    values["attn_chunk"] = raw.get("attention_chunk_size")
    values["nope_every"] = raw.get("nope_layer_interval", 0)
    return values


# %% book/chapters/14_meta.md, cell 101
def expert_values(path: Path, moe: dict) -> dict[str, Any]:
    """Llama 4's experts, or a dense model."""
    if not moe:
        return {"num_experts": 1, "top_k": 1}
    if need(path, moe, "num_experts") < 2:
        raise CheckpointError(f"{path}: num_experts must be at least 2")
    return {
        "num_experts": moe["num_experts"],
        "top_k": moe.get("top_k", 1),
        "moe_every": moe.get("interleave_moe_layer_step", 1),
        "router": "sigmoid_input",
        "shared_expert": True,
    }


# %% book/chapters/14_meta.md, cell 102
EYES = {
    "dim": "width", "n_layers": "layers", "n_heads": "heads",
    "output_dim": "features",
}
EYE_FIELDS = {
    *EYES, "image_size", "patch_size", "mlp_ratio",
    "pixel_shuffle_ratio",
}


# %% book/chapters/14_meta.md, cell 103
def side(path: Path, eyes: dict, name: str) -> Any:
    """The side of a square; CheckpointError for another shape."""
    size = eyes[name]
    square = isinstance(size, dict) and size == dict.fromkeys(
        ("height", "width"), size.get("height")
    )
    if not square:
        raise CheckpointError(f"{path}: {name} must be a square")
    return size["height"]


# %% book/chapters/14_meta.md, cell 104
def vision_values(path: Path, eyes: Any, d: int, v: int) -> Any:
    """`vision_args` as a VisionConfig; None where there are none."""
    if eyes is None:
        return None
    if not isinstance(eyes, dict):
        raise CheckpointError(f"{path}: vision_args must be an object")
    ck.refuse_unknown(path, eyes, EYE_FIELDS)
    for name in sorted(EYE_FIELDS):
        need(path, eyes, name)
    try:
        return VisionConfig(
            **{ours: eyes[name] for name, ours in EYES.items()},
            image_size=side(path, eyes, "image_size"),
            patch_size=side(path, eyes, "patch_size"),
            d_ff=int(eyes["dim"] * eyes["mlp_ratio"]), d_model=d,
            shuffle=round(1 / eyes["pixel_shuffle_ratio"]),
            image_id=min(200092, v - 1),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        why = f"{path}: vision_args: {error}"
        raise CheckpointError(why) from None


# %% book/chapters/14_meta.md, cell 105
STOPS = {
    128256: (128001, 128008, 128009),           # Llama 3
    202048: (200001, 200007, 200008),           # Llama 4
}
ALL_LLAMAS = {
    "post_norm": False, "activation": "silu", "tied": False,
    "attn_softcap": None,
    "embedding_multiplier": 1.0, "output_multiplier": 1.0,
}


# %% book/chapters/14_meta.md, cell 106
def meta_config(folder: Path) -> ModelConfig:
    """`params.json` as a configuration.

    Raises CheckpointError for a field that is unknown or wrong.
    """
    path = folder / "params.json"
    raw = check_params(path, ck.read_json(path), FIELDS)
    moe = check_params(path, raw.get("moe_args", {}), MOE_FIELDS)
    dim, heads = need(path, raw, "dim"), need(path, raw, "n_heads")
    size, rest = divmod(dim, heads)
    if rest or raw.get("head_dim", size) != size:
        raise CheckpointError(
            f"{path}: a head has dim / n_heads features, and {dim} / "
            f"{heads} is not head_dim = {raw.get('head_dim', 'whole')}"
        )
    words = vocabulary(folder, raw)
    return ck.make_config(path, {
        **ALL_LLAMAS, **positions(raw), **llama4_values(raw),
        **expert_values(path, moe), **widths(path, raw, moe),
        "d_model": dim, "num_layers": need(path, raw, "n_layers"),
        "q_heads": heads, "kv_heads": raw.get("n_kv_heads", heads),
        "head_size": size, "attn_multiplier": size**-0.5,
        "norm_eps": raw.get("norm_eps", 1e-5),
        "vocab_size": words, "eos_id": STOPS.get(words, 2),
        "vision": vision_values(
            path, raw.get("vision_args"), dim, words
        ),
    })


# %% book/chapters/14_meta.md, cell 107
def find_meta(folder: Path, names: set[str]) -> ck.Layout | None:
    """Meta's layout, if these are the names of its files."""
    if not {"params.json", "consolidated.00.pth"} <= names:
        return None
    return meta_config(folder), read_meta, folder


# %% book/chapters/14_meta.md, cell 108
ck.DETECTORS.append(find_meta)
ck.LAYOUTS[read_meta] = "Meta"
