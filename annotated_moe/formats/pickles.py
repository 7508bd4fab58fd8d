# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The weights of Grok-1 were published as 770 pickles, and a pickle is
a program: whoever wrote it decides what runs on your machine when you
load it. This chapter reads such files without running any of them. By
its end you will have a reader that returns each tensor as a view of its
file, refuses everything else in one sentence, and knows which of the
770 numbered files is which matrix of which layer.
"""

import math
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from annotated_moe.formats.files import (
    CheckpointError,
    Extent,
    map_file,
    refuse_other_file,
)
from annotated_moe.quantization import QuantizedTensor


# %% book/chapters/09_checkpoints.md, cell 7
@dataclass(eq=False, repr=False)
class Node:
    """A pickled object as described by its file; nothing is made.

    `kind` is a dotted name, `args` what it would be called with
    (None before the call), `state` what `BUILD` hands it.
    """

    kind: str
    args: tuple | None = None
    state: Any = None


# %% book/chapters/09_checkpoints.md, cell 8
ARRAY = "numpy.core.multiarray._reconstruct"
DTYPE = "numpy.dtype"
BFLOAT16 = "ml_dtypes.bfloat16"
QUANTIZED = "__main__.QuantizedWeight8bit"
ALLOWED = {
    ARRAY: ARRAY,
    "numpy._core.multiarray._reconstruct": ARRAY,   # since NumPy 2
    "numpy.ndarray": "numpy.ndarray",
    DTYPE: DTYPE,
    BFLOAT16: BFLOAT16,
    QUANTIZED: QUANTIZED,
}


# %% book/chapters/09_checkpoints.md, cell 10
MARK = object()


class Machine:
    """Pickle's stack machine, describing where pickle would act."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def malformed(self, why: str) -> CheckpointError:
        return CheckpointError(f"is malformed at byte {self.at}: {why}")

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, not copied."""
        left = len(self.data) - self.at
        if size > left:
            raise CheckpointError(
                f"ends early: at byte {self.at} it wants {size} more "
                f"and has {left}; fetch the file again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def short_text(self) -> str:
        """At most 255 bytes, behind a byte that counts them."""
        try:
            return str(self.take(self.byte()), "utf-8")
        except UnicodeDecodeError:
            raise self.malformed("this is no text") from None

    def pop(self) -> Any:
        if not self.stack:
            raise self.malformed("the stack is empty")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.pop()) is not MARK:
            items.append(item)
        return items[::-1]


# %% book/chapters/09_checkpoints.md, cell 11
def look_up_name(machine: Machine) -> Node:
    """STACK_GLOBAL: pickle imports here. We look the name up."""
    module, name = machine.pop_many(2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise machine.malformed("a name that is not text")
    full = f"{module}.{name}"
    if full not in ALLOWED:
        raise CheckpointError(
            f"names {full[:80]!r}, which no tensor needs; it "
            "was refused and nothing was run: do not use this file"
        )
    return Node(ALLOWED[full])


# %% book/chapters/09_checkpoints.md, cell 12
def note_call(machine: Machine, callable_kinds: Iterable[str]) -> Node:
    """REDUCE, NEWOBJ: pickle calls here. We note the arguments."""
    function, args = machine.pop_many(2)
    if not isinstance(function, Node) or function.args is not None:
        raise machine.malformed("a call of what is no function")
    if function.kind not in callable_kinds:
        raise machine.malformed("a call that makes no array")
    if not isinstance(args, tuple):
        raise machine.malformed("a call without arguments")
    return Node(function.kind, args)


# %% book/chapters/09_checkpoints.md, cell 13
def note_state(machine: Machine) -> None:
    """BUILD: pickle runs `__setstate__` here. We note the state."""
    target, state = machine.pop_many(2)
    if not isinstance(target, Node) or target.args is None:
        raise machine.malformed("a state for what is no object")
    if target.state is not None:
        raise machine.malformed("a second state for one object")
    target.state = state
    machine.stack.append(target)


# %% book/chapters/09_checkpoints.md, cell 14
def set_items(machine: Machine) -> None:
    """SETITEMS: names and values into the dict below the mark."""
    items = machine.pop_to_mark()
    target, names, values = machine.pop(), items[::2], items[1::2]
    if not isinstance(target, dict) or len(names) != len(values):
        raise machine.malformed("items without a dict to take them")
    if not all(isinstance(name, str) for name in names):
        raise machine.malformed("a dict of something else than names")
    target.update(zip(names, values, strict=True))
    machine.stack.append(target)


def memoize(machine: Machine) -> None:
    """MEMOIZE: what is on top, into the memo as well."""
    machine.memo.append(machine.pop())
    machine.stack.append(machine.memo[-1])


def recall(machine: Machine, index: int) -> Any:
    """BINGET: what the memo holds there."""
    if index >= len(machine.memo):
        raise machine.malformed(f"memo {index} was never written")
    return machine.memo[index]


# %% book/chapters/09_checkpoints.md, cell 15
PUSH_OPS: dict[str, Callable[[Machine], Any]] = {
    "NONE": lambda m: None,
    "NEWTRUE": lambda m: True,
    "NEWFALSE": lambda m: False,
    "BININT1": Machine.byte,
    "BININT2": lambda m: m.number(2),
    "BININT": lambda m: m.number(4, signed=True),
    "LONG1": lambda m: m.number(m.byte(), signed=True),
    "SHORT_BINUNICODE": Machine.short_text,
    "SHORT_BINBYTES": lambda m: m.take(m.byte()),
    "BINBYTES": lambda m: m.take(m.number(4)),
    "BINBYTES8": lambda m: m.take(m.number(8)),
    "EMPTY_TUPLE": lambda m: (),
    "TUPLE1": lambda m: m.pop_many(1),
    "TUPLE2": lambda m: m.pop_many(2),
    "TUPLE3": lambda m: m.pop_many(3),
    "TUPLE": lambda m: tuple(m.pop_to_mark()),
    "EMPTY_DICT": lambda m: {},
    "MARK": lambda m: MARK,
    "BINGET": lambda m: recall(m, m.byte()),
    "LONG_BINGET": lambda m: recall(m, m.number(4)),
    "STACK_GLOBAL": look_up_name,
    "REDUCE": lambda m: note_call(m, (ARRAY, DTYPE)),
    "NEWOBJ": lambda m: note_call(m, (QUANTIZED,)),
}
OTHER_OPS: dict[str, Callable[[Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MEMOIZE": memoize,
    "SETITEMS": set_items,
    "BUILD": note_state,
}
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


# %% book/chapters/09_checkpoints.md, cell 16
def step(machine: Machine, push: dict, other: dict) -> bool:
    """Carry out one instruction; False when it was STOP."""
    code = machine.byte()
    name = OPCODES.get(code)
    if name in push:
        machine.stack.append(push[name](machine))
    elif name in other:
        other[name](machine)
    elif name != "STOP":
        raise CheckpointError(
            f"uses the pickle instruction {name or hex(code)}, which "
            "no tensor needs; it was refused and nothing was run"
        )
    return name != "STOP"


# %% book/chapters/09_checkpoints.md, cell 17
MAX_INSTRUCTIONS = 1000


def parse(
    data: memoryview,
    push: dict = PUSH_OPS,
    other: dict = OTHER_OPS,
    most: int = MAX_INSTRUCTIONS,
) -> Any:
    """What a pickle describes. Runs nothing, imports nothing.

    `push` and `other` are the instructions it may use, `most` how many
    of them. CheckpointError for anything else.
    """
    machine = Machine(data)
    for _ in range(most):
        if not step(machine, push, other):
            break
    else:
        raise CheckpointError(
            f"has more than {most} pickle instructions, which no "
            "tensor needs; it was refused and nothing was run"
        )
    if len(machine.stack) != 1 or machine.at != len(data):
        raise machine.malformed("something is left over at the end")
    return machine.stack[0]


# %% book/chapters/09_checkpoints.md, cell 20
PICKLED_DTYPES = {
    "f4": np.dtype("<f4"),
    "i1": np.dtype("i1"),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def as_dtype(node: Any) -> np.dtype:
    """The dtype that a node describes, if tensors come in it."""
    if not isinstance(node, Node) or node.kind != DTYPE:
        raise CheckpointError("holds no dtype where one was expected")
    match node.args, node.state:
        case (code, *_), (_, order, *_):
            name = code.kind if isinstance(code, Node) else code
        case _:
            raise CheckpointError("holds a dtype that is not complete")
    if not isinstance(name, str) or name not in PICKLED_DTYPES:
        shown = f" {name[:40]!r}" if isinstance(name, str) else ""
        wanted = ", ".join(PICKLED_DTYPES)
        raise CheckpointError(f"has a dtype{shown} other than {wanted}")
    if order not in ("<", "|"):
        raise CheckpointError("has a dtype that is not little-endian")
    return PICKLED_DTYPES[name]


# %% book/chapters/09_checkpoints.md, cell 21
def as_shape(sizes: Any) -> tuple[int, ...]:
    """At most eight sizes, none of them zero."""
    if not isinstance(sizes, tuple) or len(sizes) > 8:
        raise CheckpointError("has a shape that no tensor has")
    if not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
        raise CheckpointError("has a shape that no tensor has")
    if 0 in sizes:
        raise CheckpointError(
            f"holds an empty array, of shape {sizes}: its weights were "
            "never written; fetch the file again"
        )
    return sizes


# %% book/chapters/09_checkpoints.md, cell 22
def as_array(node: Any) -> np.ndarray:
    """The array that a node describes, as a view of its file."""
    state = node.state if isinstance(node, Node) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise CheckpointError("holds no array where one was expected")
    if node.kind != ARRAY:
        raise CheckpointError("holds no array where one was expected")
    _, sizes, dtype_node, fortran, raw = state
    dtype, shape = as_dtype(dtype_node), as_shape(sizes)
    if fortran is not False or not isinstance(raw, memoryview):
        raise CheckpointError("holds an array that is not in C order")
    size = math.prod(shape) * dtype.itemsize
    if size != len(raw):
        raise CheckpointError(
            f"announces {dtype} of shape {shape}, which takes {size} "
            f"bytes, but holds {len(raw)}"
        )
    return np.frombuffer(raw, dtype).reshape(shape)


# %% book/chapters/09_checkpoints.md, cell 23
Tensor = np.ndarray | QuantizedTensor


def as_tensor(node: Any) -> Tensor:
    """A plain array, or the release's pair of int8 and scales."""
    if not isinstance(node, Node) or node.kind != QUANTIZED:
        return as_array(node)
    arrays = node.state
    if not isinstance(arrays, dict) or arrays.keys() != {
        "weight", "scales"
    }:
        raise CheckpointError("does not hold `weight` and `scales`")
    weight, scales = arrays["weight"], arrays["scales"]
    return QuantizedTensor(as_array(weight), as_array(scales))


# %% book/chapters/09_checkpoints.md, cell 37
def array_extents(data: memoryview, tensor: Tensor) -> list[Extent]:
    """Where in `data` each array of a tensor lies: they are views."""
    start = np.frombuffer(data, np.uint8).ctypes.data
    arrays: tuple[Any, ...] = (tensor,)
    if isinstance(tensor, QuantizedTensor):
        arrays = tensor.weight, tensor.scales
    extents = []
    for array in arrays:
        begin = array.ctypes.data - start
        end = begin + array.nbytes
        extents.append(Extent(begin, end, array.dtype, array.shape))
    return extents


# %% book/chapters/09_checkpoints.md, cell 38
def program_bytes(
    data: memoryview, extents: list[Extent]
) -> list[memoryview]:
    """What a file holds beside its arrays."""
    pieces, at = [], 0
    for extent in sorted(extents, key=lambda extent: extent.begin):
        pieces.append(data[at : extent.begin])
        at = extent.end
    return [*pieces, data[at:]]


# %% book/chapters/09_checkpoints.md, cell 44
Interpreted = dict[int, tuple[memoryview, list[Extent]]]


def interpret(data: memoryview, interpreted: Interpreted) -> Tensor:
    """The tensor in a file, from one like it if there was one.

    `interpreted` is extended: length -> a file of that length.
    """
    if len(data) in interpreted:
        like, extents = interpreted[len(data)]
        if program_bytes(data, extents) == program_bytes(like, extents):
            arrays = [
                np.frombuffer(data[e.begin : e.end], e.dtype)
                .reshape(e.shape)
                for e in extents
            ]
            pair = len(arrays) == 2
            return QuantizedTensor(*arrays) if pair else arrays[0]
    tensor = as_tensor(parse(data))
    interpreted[len(data)] = data, array_extents(data, tensor)
    return tensor


# %% book/chapters/09_checkpoints.md, cell 45
def read_pickled(
    path: Path, interpreted: Interpreted | None = None
) -> Tensor:
    """One tensor of a Grok-1 file, mapped into memory, not copied.

    Raises CheckpointError, naming the file. Nothing in it is run.
    `interpreted` may be shared by the files of one folder.
    """
    data = map_file(path).data
    interpreted = {} if interpreted is None else interpreted
    try:
        refuse_other_file(data)
        return interpret(data, interpreted)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
