# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The weights of Grok-1 were published as 770 pickles, and a pickle is
a program: whoever wrote it decides what runs on your machine when you
load it. This chapter reads such files without running any of them. By
its end you will have `load`, which looks at a folder, works out its
layout, holds every tensor against the configuration, and puts each on
its devices while reading only the bytes that a device keeps.
"""

import hashlib
import json
import math
import os
import pickletools
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe import llama, llama4, mixtral, sharding
from annotated_moe.model import (
    PRESETS,
    Model,
    ModelConfig,
    init_params,
    kinds,
    stack_of,
)
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.streaming import StreamedModel
from annotated_moe.tokenizer import (
    COMPANIONS,
    FORMATS,
    Tokenizer,
    open_tokenizer,
)
from annotated_moe.vision import (
    IMAGE_FILES,
    IMAGE_IDS,
    VISION_HF,
    VisionConfig,
    preprocessor_config,
    read_vision,
    vision_config,
    vision_names,
)


# %% book/chapters/09_checkpoints.md, cell 6
class CheckpointError(ValueError):
    """A checkpoint is damaged, unsafe, incomplete or not supported."""


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
    "numpy._core.multiarray._reconstruct": ARRAY,
    "numpy.ndarray": "numpy.ndarray",
    DTYPE: DTYPE,
    BFLOAT16: BFLOAT16,
    QUANTIZED: QUANTIZED,
}
MARK = object()


# %% book/chapters/09_checkpoints.md, cell 9
class Cursor:
    """A place in the bytes of one file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

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
        """The next byte. Most of what is read is single bytes."""
        if self.at == len(self.data):
            self.take(1)                    # says that there is none
        self.at += 1
        return self.data[self.at - 1]


# %% book/chapters/09_checkpoints.md, cell 10
class Reader(Cursor):
    """Numbers and texts, from the place on."""

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def text(self) -> str:
        """At most 255 bytes, behind a byte that counts them."""
        try:
            return str(self.take(self.byte()), "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"is malformed before byte {self.at}: this is no text"
            ) from None


# %% book/chapters/09_checkpoints.md, cell 11
class Machine(Reader):
    """Pickle's stack machine, describing where pickle would act."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"is malformed at byte {self.at}: {why}")

    def pop(self) -> Any:
        if not self.stack:
            raise self.broken("the stack is empty")
        return self.stack.pop()

    def several(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.pop()) is not MARK:
            items.append(item)
        return items[::-1]


# %% book/chapters/09_checkpoints.md, cell 12
def named(machine: Machine) -> Node:
    """STACK_GLOBAL: pickle imports here. We look the name up."""
    module, name = machine.several(2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise machine.broken("a name that is not text")
    full = f"{module}.{name}"
    kind = ALLOWED.get(full)
    if kind is None:
        raise CheckpointError(
            f"names {full[:80]!r}, which no tensor needs; it "
            "was refused and nothing was run: do not use this file"
        )
    return Node(kind)


# %% book/chapters/09_checkpoints.md, cell 13
def call(machine: Machine, callable_kinds: tuple[str, ...]) -> Node:
    """REDUCE, NEWOBJ: pickle calls here. We note the arguments."""
    function, args = machine.several(2)
    good = isinstance(function, Node) and function.args is None
    if not good or function.kind not in callable_kinds:
        raise machine.broken("a call that makes no array")
    if not isinstance(args, tuple):
        raise machine.broken("a call without arguments")
    return Node(function.kind, args)


# %% book/chapters/09_checkpoints.md, cell 14
def build(machine: Machine) -> None:
    """BUILD: pickle runs `__setstate__` here. We note the state."""
    target, state = machine.several(2)
    good = isinstance(target, Node) and target.args is not None
    if not good or target.state is not None:
        raise machine.broken("a state for something that takes none")
    target.state = state
    machine.stack.append(target)


# %% book/chapters/09_checkpoints.md, cell 15
def set_items(machine: Machine) -> None:
    """SETITEMS: names and values into the dict below the mark."""
    items = machine.since_mark()
    target, names = machine.pop(), items[::2]
    good = isinstance(target, dict) and len(items) % 2 == 0
    if not good or not all(isinstance(name, str) for name in names):
        raise machine.broken("a dict of something else than names")
    target.update(zip(names, items[1::2], strict=True))
    machine.stack.append(target)


# %% book/chapters/09_checkpoints.md, cell 16
def recall(machine: Machine, index: int) -> Any:
    if index >= len(machine.memo):
        raise machine.broken(f"memo {index} was never written")
    return machine.memo[index]


# %% book/chapters/09_checkpoints.md, cell 17
def memorize(machine: Machine) -> None:
    item = machine.pop()
    machine.stack.append(item)
    machine.memo.append(item)


# %% book/chapters/09_checkpoints.md, cell 18
PUSH: dict[str, Callable[[Machine], Any]] = {
    "NONE": lambda m: None,
    "NEWTRUE": lambda m: True,
    "NEWFALSE": lambda m: False,
    "BININT1": Machine.byte,
    "BININT2": lambda m: m.number(2),
    "BININT": lambda m: m.number(4, signed=True),
    "LONG1": lambda m: m.number(m.byte(), signed=True),
    "SHORT_BINUNICODE": Machine.text,
    "SHORT_BINBYTES": lambda m: m.take(m.byte()),
    "BINBYTES": lambda m: m.take(m.number(4)),
    "BINBYTES8": lambda m: m.take(m.number(8)),
    "EMPTY_TUPLE": lambda m: (),
    "TUPLE1": lambda m: m.several(1),
    "TUPLE2": lambda m: m.several(2),
    "TUPLE3": lambda m: m.several(3),
    "TUPLE": lambda m: tuple(m.since_mark()),
    "EMPTY_DICT": lambda m: {},
    "MARK": lambda m: MARK,
}


# %% book/chapters/09_checkpoints.md, cell 19
PUSH |= {
    "BINGET": lambda m: recall(m, m.byte()),
    "LONG_BINGET": lambda m: recall(m, m.number(4)),
    "STACK_GLOBAL": named,
    "REDUCE": lambda m: call(m, (ARRAY, DTYPE)),
    "NEWOBJ": lambda m: call(m, (QUANTIZED,)),
}
DO: dict[str, Callable[[Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MEMOIZE": memorize,
    "SETITEMS": set_items,
    "BUILD": build,
}


# %% book/chapters/09_checkpoints.md, cell 20
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


# %% book/chapters/09_checkpoints.md, cell 21
def step(machine: Machine, push: dict = PUSH, do: dict = DO) -> bool:
    """Carry out one instruction; False when it was STOP."""
    code = machine.byte()
    name = OPCODES.get(code)
    if name in push:
        machine.stack.append(push[name](machine))
    elif name in do:
        do[name](machine)
    elif name != "STOP":
        raise CheckpointError(
            f"uses the pickle instruction {name or hex(code)}, which "
            "no tensor needs; it was refused and nothing was run"
        )
    return name != "STOP"


# %% book/chapters/09_checkpoints.md, cell 22
MOST_STEPS = 1000


# %% book/chapters/09_checkpoints.md, cell 23
def parse(
    data: memoryview,
    push: dict = PUSH,
    do: dict = DO,
    most: int = MOST_STEPS,
) -> Any:
    """What a pickle describes. Runs nothing, imports nothing."""
    machine = Machine(data)
    for _ in range(most):
        if not step(machine, push, do):
            break
    else:
        raise CheckpointError(
            f"has more than {most} pickle instructions, which no "
            "tensor needs; it was refused and nothing was run"
        )
    if len(machine.stack) != 1 or machine.at != len(data):
        raise machine.broken("something is left over at the end")
    return machine.stack[0]


# %% book/chapters/09_checkpoints.md, cell 26
DTYPES = {
    "f4": np.dtype("<f4"),
    "i1": np.dtype("i1"),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


# %% book/chapters/09_checkpoints.md, cell 27
def as_dtype(node: Any) -> np.dtype:
    """The dtype that a node describes, if tensors come in it."""
    good = isinstance(node, Node) and node.kind == DTYPE and node.args
    code = node.args[0] if good else None
    name = code.kind if isinstance(code, Node) else code
    state: Any = node.state if good else None
    whole = isinstance(state, tuple) and len(state) > 1
    order = state[1] if whole else None
    if not isinstance(name, str) or name not in DTYPES:
        shown = f" {name[:40]!r}" if isinstance(name, str) else ""
        wanted = ", ".join(DTYPES)
        raise CheckpointError(f"has a dtype{shown} other than {wanted}")
    if order not in ("<", "|"):
        raise CheckpointError("has a dtype that is not little-endian")
    return DTYPES[name]


# %% book/chapters/09_checkpoints.md, cell 28
def as_array(node: Any) -> np.ndarray:
    """The array that a node describes, as a view of its file."""
    whole = isinstance(node, Node) and node.kind == ARRAY
    state = node.state if whole else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise CheckpointError("holds no array where one was expected")
    _, shape, dtype_node, fortran, raw = state
    dtype = as_dtype(dtype_node)
    sizes = shape if isinstance(shape, tuple) else (None,)
    good = all(type(n) is int and 0 < n < 2**40 for n in sizes)
    if not good or len(sizes) > 8:
        raise CheckpointError("has a shape that no tensor has")
    if fortran is not False or not isinstance(raw, memoryview):
        raise CheckpointError("holds an array that is not in C order")
    size = math.prod(sizes) * dtype.itemsize
    if size != len(raw):
        raise CheckpointError(
            f"announces {dtype} of shape {sizes}, which takes {size} "
            f"bytes, but holds {len(raw)}"
        )
    return np.frombuffer(raw, dtype).reshape(sizes)


# %% book/chapters/09_checkpoints.md, cell 29
Tensor = np.ndarray | QuantizedTensor


# %% book/chapters/09_checkpoints.md, cell 30
def as_tensor(node: Any) -> Tensor:
    """A plain array, or the release's pair of int8 and scales."""
    if not isinstance(node, Node) or node.kind != QUANTIZED:
        return as_array(node)
    s = node.state
    if not isinstance(s, dict) or set(s) != {"weight", "scales"}:
        raise CheckpointError("does not hold `weight` and `scales`")
    return QuantizedTensor(as_array(s["weight"]), as_array(s["scales"]))


# %% book/chapters/09_checkpoints.md, cell 31
Span = tuple[int, int, np.dtype, tuple[int, ...]]   # begin, end, ...


def spans_of(data: memoryview, w: Tensor) -> list[Span]:
    """Where in its file each array of a tensor lies, and as what."""
    start = np.frombuffer(data, np.uint8).ctypes.data
    arrays: Any = [w]
    if isinstance(w, QuantizedTensor):
        arrays = [w.weight, w.scales]
    spans = []
    for array in arrays:
        begin = array.ctypes.data - start
        end = begin + array.nbytes
        spans.append((begin, end, array.dtype, array.shape))
    return spans


def around(data: memoryview, spans: list[Span]) -> list[memoryview]:
    """What a file holds beside its arrays: the program."""
    begins, ends, *_ = zip(*sorted(s[:2] for s in spans), strict=True)
    pairs = zip((0, *ends), (*begins, len(data)), strict=True)
    return [data[a:b] for a, b in pairs]


# %% book/chapters/09_checkpoints.md, cell 32
Seen = dict[int, tuple[memoryview, list[Span]]]     # by a file's length


def interpret(data: memoryview, seen: Seen) -> Tensor:
    """The tensor in a file, from one like it if that was `seen`."""
    if len(data) in seen:
        like, spans = seen[len(data)]
        if around(data, spans) == around(like, spans):
            arrays = [
                np.frombuffer(data[a:b], dtype).reshape(shape)
                for a, b, dtype, shape in spans
            ]
            return QuantizedTensor(*arrays) if arrays[1:] else arrays[0]
    w = as_tensor(parse(data))
    seen[len(data)] = data, spans_of(data, w)
    return w


# %% book/chapters/09_checkpoints.md, cell 33
def read_pickled(path: Path, seen: Seen | None = None) -> Tensor:
    """One tensor of a Grok-1 file, mapped into memory, not copied.

    Raises CheckpointError, naming the file. Nothing in it is run.
    """
    try:
        data = np.memmap(str(path), np.uint8, "r").data
    except (OSError, ValueError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    try:
        return interpret(data, {} if seen is None else seen)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


# %% book/chapters/09_checkpoints.md, cell 45
def zeros(make: Any, shape: Any, dtype: Any, *_: Any) -> jax.Array:
    """In place of every initial value of a layer."""
    return jnp.zeros(shape, dtype)


# %% book/chapters/09_checkpoints.md, cell 46
@cache
def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter; layers are stacked in front."""
    def made() -> Any:
        with hk.custom_creator(zeros):
            return init_params(jax.random.key(0), config)

    tree = jax.eval_shape(lambda: hk.transform(made).apply({}, None))
    return {
        f"{module}/{name}": tuple(leaf.shape)
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
    }


# %% book/chapters/09_checkpoints.md, cell 47
def grok_paths(config: ModelConfig) -> list[str]:
    """The release's path of every file, in the files' order."""
    paths = []
    for path in expected(config):
        top, rest = path.split("/", 1)
        if top == "decoder_layer":
            layers = range(config.num_layers)
            paths += [f"transformer/{top}_{i}/{rest}" for i in layers]
        else:
            paths.append(f"language_model/{path}")
    return sorted(paths)


# %% book/chapters/09_checkpoints.md, cell 48
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token makes use of."""
    sizes = {path: math.prod(s) for path, s in expected(config).items()}
    experts = sum(n for path, n in sizes.items() if "/moe/" in path)
    total = sum(sizes.values())
    idle = experts * (config.num_experts - config.top_k)
    return total, total - idle // config.num_experts


# %% book/chapters/09_checkpoints.md, cell 53
GROK_NAMES = {
    "vocab_size": "vocab_size",
    "pad_token": "pad_id",
    "eos_token": "eos_id",
    "sequence_len": "context",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
    "emb_size": "d_model",
    "key_size": "head_size",
    "num_q_heads": "q_heads",
    "num_kv_heads": "kv_heads",
    "num_layers": "num_layers",
    "attn_output_multiplier": "attn_multiplier",
    "num_experts": "num_experts",
    "num_selected_experts": "top_k",
}
# How the release was sharded and initialized: no part of the model.
IGNORED = {
    "shard_activations",
    "data_axis",
    "model_axis",
    "embedding_init_scale",
}


# %% book/chapters/09_checkpoints.md, cell 54
MOST_JSON = 2**24


# %% book/chapters/09_checkpoints.md, cell 55
def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; ValueError for a name met twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"it holds {twice[:80]!r} twice")
    return dict(pairs)


# %% book/chapters/09_checkpoints.md, cell 56
def read_json(path: Path) -> dict[str, Any]:
    """The one JSON object in a file, or a CheckpointError."""
    try:
        if path.stat().st_size > MOST_JSON or not path.is_file():
            raise ValueError(f"no file of at most {MOST_JSON} bytes")
        text = path.read_text("utf-8")
        content = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return content


# %% book/chapters/09_checkpoints.md, cell 57
def refuse_unknown(path: Path, names: Any, known: Any) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CheckpointError(
            f"{path} has the field {unknown[0][:40]!r}, which is not "
            f"supported; known are {', '.join(sorted(known))}"
        )


# %% book/chapters/09_checkpoints.md, cell 58
def make_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    pairs: dict[str, Any] = {
        n: tuple(v) for n, v in values.items() if type(v) is list
    }
    try:
        if isinstance(values.get("vision"), dict):
            pairs["vision"] = vision_config(values["vision"])
        config = ModelConfig(**{**values, **pairs})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    numbers = [n for n in asdict(config).values() if type(n) is int]
    if config.num_layers > 9999 or max(numbers) >= 2**31:
        raise CheckpointError(f"{path} is beyond the size of any model")
    return config


# %% book/chapters/09_checkpoints.md, cell 59
def ffn_size(d_model: int, widening: int | float) -> int:
    """F of the release: 6144 and 8 give 32768."""
    return -(-(int(widening * d_model) * 2 // 3) // 8) * 8


# %% book/chapters/09_checkpoints.md, cell 60
def grok_config(path: Path) -> ModelConfig:
    """A `config.json` of the release, or Grok-1 where there is none."""
    if not os.path.lexists(path):
        return PRESETS["grok-1"]
    raw = read_json(path)
    inner = raw.pop("model", {})
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: 'model' must be an object")
    flat = {k: v for k, v in {**raw, **inner}.items() if k[:1] != "_"}
    flat = {k: v for k, v in flat.items() if k not in IGNORED}
    widening = flat.pop("widening_factor", 8)
    refuse_unknown(path, flat, GROK_NAMES)
    if type(widening) not in (int, float) or not 0 < widening < 2**31:
        raise CheckpointError(
            f"{path}: widening_factor must be positive: {widening!r}"
        )
    values = {GROK_NAMES[name]: value for name, value in flat.items()}
    width = make_config(path, values).d_model
    values["d_ff"] = ffn_size(width, widening)
    return make_config(path, values)


# %% book/chapters/09_checkpoints.md, cell 62
def check_scales(where: Path, name: str, w: QuantizedTensor) -> None:
    *lead, d, f = w.shape
    scales = tuple(w.scales.shape)
    *above, groups, out = scales if len(scales) > 1 else (0, 0)
    fits = above == lead and out == f and groups and d % groups == 0
    dtypes = (w.weight.dtype, w.scales.dtype)
    if not fits or dtypes != (np.int8, ml_dtypes.bfloat16):
        wanted = ", ".join(map(str, (*lead, "G", f)))
        raise CheckpointError(
            f"{where}: {name} is {dtypes[0]} of shape {w.shape} with "
            f"{dtypes[1]} scales of shape {scales}; expected int8, and "
            f"bfloat16 scales ({wanted}) where G divides {d}"
        )


# %% book/chapters/09_checkpoints.md, cell 63
def may_be_quantized(path: str) -> bool:
    """Attention's and the experts' matrices; no norm, no router."""
    words = path.endswith("/w") and not path.startswith("vision/")
    return words and "/router/" not in path


# %% book/chapters/09_checkpoints.md, cell 64
FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16)


# %% book/chapters/09_checkpoints.md, cell 65
def check_tensor(
    where: Path, name: str, w: Any, shape: tuple[int, ...]
) -> None:
    if tuple(w.shape) != shape:
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(w.shape)}; the "
            f"configuration expects {shape}"
        )
    if not isinstance(w, QuantizedTensor):
        if w.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} is {w.dtype}; "
                "expected float32, bfloat16 or float16"
            )
    elif may_be_quantized(name):
        check_scales(where, name, w)
    else:
        raise CheckpointError(f"{where}: {name} may not be quantized")


# %% book/chapters/09_checkpoints.md, cell 66
def names_in(folder: Path) -> set[str]:
    """The names in a folder, or a CheckpointError."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a folder: give the one that holds "
            "ckpt-0/ or config.json"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not readable: {error.strerror}"
        ) from None


# %% book/chapters/09_checkpoints.md, cell 67
def grok_files(folder: Path, names: list[str]) -> list[Path]:
    """One file a name, in order; both sets must be the same."""
    files = [f"tensor{i:05d}_000" for i in range(len(names))]
    found = {n for n in names_in(folder) if n.startswith("tensor")}
    for file, name in zip(files, names, strict=True):
        if file not in found:
            message = f"{folder} lacks {file}, which is {name}"
            raise CheckpointError(message)
    extra = sorted(found - set(files))
    if extra:
        raise CheckpointError(
            f"{folder} holds {extra[0]}, but this configuration has "
            f"only {len(files)} tensors: does config.json belong to it?"
        )
    return [folder / file for file in files]


# %% book/chapters/09_checkpoints.md, cell 68
def our_path(name: str) -> tuple[str, int | None]:
    """transformer/decoder_layer_3/a/w -> decoder_layer/a/w and 3."""
    top, rest = name.split("/", 1)
    if top == "language_model":
        return rest, None
    layer, rest = rest.split("/", 1)
    return f"decoder_layer/{rest}", int(layer.rsplit("_", 1)[1])


# %% book/chapters/09_checkpoints.md, cell 69
@dataclass(frozen=True, eq=False)
class Stack:
    """Arrays of one shape and dtype behind one another, not copied.

    `stack[3]` is a part; any other index copies what it names.
    """

    parts: list

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        first, rest = (*index, slice(None))[0], index[1:]
        if not isinstance(first, slice):
            part = self.parts[first]
            return part[rest] if rest else part
        return np.stack([part[rest] for part in self.parts[first]])

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self[:], dtype)


# %% book/chapters/09_checkpoints.md, cell 70
def stack_layers(where: Path, path: str, parts: list) -> Any:
    """One lazily stacked tensor from those of all layers."""
    pairs = [w for w in parts if isinstance(w, QuantizedTensor)]
    if not pairs:
        if len({getattr(w, "dtype", None) for w in parts}) > 1:
            raise CheckpointError(
                f"{where}: the layers of {path} have several dtypes"
            )
        return Stack(parts)
    shapes = {w.scales.shape for w in pairs}
    if len(pairs) < len(parts) or len(shapes) > 1:
        raise CheckpointError(
            f"{where}: the layers of {path} are not all quantized alike"
        )
    weights = Stack([w.weight for w in pairs])
    return QuantizedTensor(weights, Stack([w.scales for w in pairs]))


# %% book/chapters/09_checkpoints.md, cell 71
def read_grok(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Path -> tensor of a Grok-1 checkpoint, mapped from disk."""
    names, shapes = grok_paths(config), expected(config)
    files = grok_files(folder, names)
    tensors: dict[str, Any] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    seen: Seen = {}
    for file, name in zip(files, names, strict=True):
        path, layer = our_path(name)
        w = read_pickled(file, seen)
        if layer is None:
            check_tensor(file, name, w, shapes[path])
            tensors[path] = w
        else:
            check_tensor(file, name, w, shapes[path][1:])
            layers.setdefault(path, {})[layer] = w
    for path, by_layer in layers.items():
        parts = [by_layer[i] for i in range(config.num_layers)]
        tensors[path] = stack_layers(folder, path, parts)
    return tensors


# %% book/chapters/09_checkpoints.md, cell 72
BYTES_READ: Counter[str] = Counter()            # path of a parameter


# %% book/chapters/09_checkpoints.md, cell 73
def read_block(source: Any, index: tuple, path: str) -> np.ndarray:
    """`source[index]`, the bytes it takes counted under `path`."""
    block = np.asarray(source[index])
    BYTES_READ[path] += block.nbytes
    return block


# %% book/chapters/09_checkpoints.md, cell 74
def on_devices(
    source: Any, spec: P, mesh: Mesh | None, dtype: Any, path: str = ""
) -> jax.Array:
    """An array of which each device reads the part that it keeps."""
    shape = tuple(source.shape)
    if mesh is None:
        whole = (slice(None),) * len(shape)
        return jnp.array(read_block(source, whole, path), dtype)
    where = NamedSharding(mesh, spec)
    indices = where.addressable_devices_indices_map(shape)
    mine: dict[Any, Any] = dict(indices)
    last, shards = None, []
    for device in sorted(mine, key=lambda d: (str(mine[d]), d.id)):
        index = mine[device]
        if index != last:
            block = read_block(source, index, path)
            # Never hand out the file's own memory: it may change.
            block = block.astype(dtype, copy=not block.flags.owndata)
        shard = jax.device_put(block, device)
        shards.append(shard.block_until_ready())
        last = index
    make = jax.make_array_from_single_device_arrays
    return make(shape, where, shards)


# %% book/chapters/09_checkpoints.md, cell 75
def place(path: str, w: Any, mesh: Mesh | None, dtype: str) -> Any:
    """Put one parameter on its devices, by the partition rules."""
    spec = sharding.spec_for(path)
    if path.startswith("decoder_layer/"):
        spec = P(None, *spec)
    if isinstance(w, QuantizedTensor):
        return place_quantized(w, spec, mesh, path)
    if path.endswith("/scale") or "/router/" in path:
        dtype = "float32"
    if mesh is not None:
        spec = sharding.fit_spec(spec, w.shape, mesh)
    return on_devices(w, spec, mesh, dtype, path)


# %% book/chapters/09_checkpoints.md, cell 76
def place_quantized(
    w: QuantizedTensor, spec: P, mesh: Mesh | None, path: str = ""
) -> QuantizedTensor:
    """Both arrays; each device's rows get scales of their own."""
    specs, scales = QuantizedTensor(spec, spec), w.scales
    if mesh is not None:
        times = sharding.group_repeats(w, spec, mesh)
        scales = Repeated(scales, times)
        w = QuantizedTensor(w.weight, scales)
        specs = sharding.weight_spec(spec, w, mesh)
    return QuantizedTensor(
        on_devices(w.weight, specs.weight, mesh, jnp.int8, path),
        on_devices(scales, specs.scales, mesh, jnp.bfloat16, path),
    )


# %% book/chapters/09_checkpoints.md, cell 77
@dataclass(frozen=True)
class Repeated:
    """`source` with each row of axis -2 `times` times, not copied."""

    source: Any
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, g, f = self.source.shape
        return (*lead, g * self.times, f)

    def __getitem__(self, index: tuple) -> np.ndarray:
        *lead, rows, columns = index
        start, stop, _ = rows.indices(self.shape[-2])
        first = start // self.times
        few = slice(first, -(-stop // self.times))
        block = np.asarray(self.source[(*lead, few, columns)])
        block = np.repeat(block, self.times, axis=-2)
        skip = start - first * self.times
        return block[..., skip : skip + stop - start, :]


# %% book/chapters/09_checkpoints.md, cell 80
CODES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
}


# %% book/chapters/09_checkpoints.md, cell 81
def read_header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    """What a safetensors file says it holds, and where that begins."""
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or size > min(len(data) - 8, MOST_JSON):
        raise CheckpointError(
            f"has a header of {size} bytes; it has {len(data)} in all, "
            f"and a header has at most {MOST_JSON}"
        )
    try:
        text = data[8 : 8 + size].tobytes().decode()
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a broken header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError("has a header that is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + size


# %% book/chapters/09_checkpoints.md, cell 82
def whole_numbers(values: Any, most: int) -> bool:
    """Whether `values` is a list of at most eight sizes or offsets."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(n) is int and 0 <= n <= most for n in values)
    )


# %% book/chapters/09_checkpoints.md, cell 83
def entry_of(
    name: str, entry: Any, most: int
) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of one tensor, all checked."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape: Any = fields.get("shape")
    span: Any = fields.get("data_offsets")
    known = set(fields) == {"dtype", "shape", "data_offsets"}
    sized = whole_numbers(shape, 2**40) and whole_numbers(span, most)
    if not known or not sized or len(span) != 2 or 0 in shape:
        raise CheckpointError(f"has a malformed entry {name[:80]!r}")
    code: Any = fields["dtype"]
    if not isinstance(code, str) or code not in CODES:
        shown = code[:20] if isinstance(code, str) else "no text"
        raise CheckpointError(
            f"holds {name[:80]!r} in the dtype {shown!r}; "
            f"supported are {', '.join(CODES)}"
        )
    dtype = CODES[code]
    size = math.prod(shape) * dtype.itemsize
    if size != span[1] - span[0]:
        raise CheckpointError(
            f"holds {name[:80]!r} of shape {tuple(shape)}, which takes "
            f"{size} bytes, in {span[1] - span[0]}"
        )
    return span[0], span[1], dtype, tuple(shape)


# %% book/chapters/09_checkpoints.md, cell 84
def arrays_in(data: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> view of `data`, the bytes of a safetensors file."""
    header, start = read_header(data)
    most, end = len(data) - start, 0
    entries = {n: entry_of(n, e, most) for n, e in header.items()}
    for name, entry in sorted(entries.items(), key=lambda e: e[1][:2]):
        if entry[0] != end:
            raise CheckpointError(
                f"holds {name[:80]!r} from byte {entry[0]}, but what "
                f"comes before it ends at {end}"
            )
        end = entry[1]
    if end != most:
        raise CheckpointError(
            f"has {most} bytes of tensors and names {end}: it was cut "
            "or something was added; fetch it again"
        )
    return {
        name: data[start + a : start + b].view(dtype).reshape(shape)
        for name, (a, b, dtype, shape) in entries.items()
    }


# %% book/chapters/09_checkpoints.md, cell 85
def open_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file, mapped, not copied.

    Raises CheckpointError, naming the file.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    try:
        return arrays_in(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


# %% book/chapters/09_checkpoints.md, cell 87
BLOCK = 2**24


# %% book/chapters/09_checkpoints.md, cell 88
class Lazy(ABC):
    """An array-like with shape and dtype that reads on indexing."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """The part of the array that `index` names."""

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self[:], dtype)


# %% book/chapters/09_checkpoints.md, cell 89
@dataclass(frozen=True, eq=False)
class Joined:
    """Arrays behind one another along the last axis, not copied."""

    parts: list

    @property
    def shape(self) -> tuple[int, ...]:
        width = sum(part.shape[-1] for part in self.parts)
        return (*self.parts[0].shape[:-1], width)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """A row, or some."""
        rows = [np.asarray(part[index]) for part in self.parts]
        return np.concatenate(rows, axis=-1)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self[:], dtype)


# %% book/chapters/09_checkpoints.md, cell 90
def pieces(w: Any) -> Iterator[np.ndarray]:
    """An array or `Stack` as views of at most BLOCK bytes, in order."""
    if isinstance(w, Stack):
        for part in w.parts:
            yield from pieces(part)
        return
    if isinstance(w, Joined):
        for i in range(w.shape[0]):
            yield from pieces(w[i])
        return
    w = w if isinstance(w, Lazy) else np.asarray(w)
    if w.nbytes <= BLOCK:
        yield np.asarray(w)
        return
    rows = BLOCK * len(w) // w.nbytes
    if rows:
        for at in range(0, len(w), rows):
            yield w[at : at + rows]
    else:
        for i in range(len(w)):
            yield from pieces(w[i])


# %% book/chapters/09_checkpoints.md, cell 91
@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a file: a tensor, or, unnamed, what is around."""

    data: Any
    name: str = ""

    @property
    def size(self) -> int:
        itemsize = np.dtype(self.data.dtype).itemsize
        return math.prod(self.data.shape) * itemsize


# %% book/chapters/09_checkpoints.md, cell 92
def safetensors_parts(arrays: dict[str, Any]) -> list[Part]:
    """A safetensors file of `arrays`, the widest dtypes first.

    Every tensor then begins at a multiple of its own item size.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    parts = [Part(w, name) for name, w in arrays.items()]
    parts.sort(key=lambda p: (-np.dtype(p.data.dtype).itemsize, p.name))
    header, at = {}, 0
    for part in parts:
        header[part.name] = {
            "dtype": codes[np.dtype(part.data.dtype)],
            "shape": list(part.data.shape),
            "data_offsets": [at, at + part.size],
        }
        at += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return [Part(np.frombuffer(start, np.uint8)), *parts]


# %% book/chapters/09_checkpoints.md, cell 93
def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# %% book/chapters/09_checkpoints.md, cell 94
class Watcher:
    """Told how files grow; `sums` has the sha256 of each tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    def wrote(self, path: Path, size: int) -> None:
        """A block of `size` bytes was written, or was there already."""

    def closed(self, path: Path) -> None:
        """A file is whole."""
        sync(path)


# %% book/chapters/09_checkpoints.md, cell 95
def append(path: Path, data: memoryview) -> None:
    """`data` to the end of a file; one sentence when it has no room."""
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; make room or "
            "choose another folder"
        ) from None


# %% book/chapters/09_checkpoints.md, cell 96
TILE = 128


# %% book/chapters/09_checkpoints.md, cell 97
def in_order(w: np.ndarray) -> np.ndarray:
    """`w` in C order: itself if it is, else copied tile by tile."""
    if w.flags.c_contiguous or w.ndim != 2:
        return np.ascontiguousarray(w)
    out = np.empty(w.shape, w.dtype)
    for i in range(0, w.shape[0], TILE):
        for j in range(0, w.shape[1], TILE):
            tile = slice(i, i + TILE), slice(j, j + TILE)
            out[tile] = w[tile]
    return out


# %% book/chapters/09_checkpoints.md, cell 98
def as_bytes(w: np.ndarray) -> memoryview:
    """The bytes of an array in C order, copied only if they are not."""
    return in_order(w).reshape(-1).view(np.uint8).data


# %% book/chapters/09_checkpoints.md, cell 100
def write_part(
    path: Path, part: Part, skip: int, watcher: Watcher
) -> None:
    """Append `part` but for its first `skip` bytes; note its sha256."""
    digest = hashlib.sha256()
    for piece in pieces(part.data):
        data = as_bytes(piece)
        digest.update(data)
        append(path, data[skip:])
        skip = max(skip - len(data), 0)
        watcher.wrote(path, len(data))
    if part.name:
        watcher.sums[part.name] = digest.hexdigest()


# %% book/chapters/09_checkpoints.md, cell 101
def write_file(
    path: Path, parts: list[Part], watcher: Watcher, at: int = 0
) -> None:
    """Write a file of `parts`, of which `at` bytes are there."""
    with open(path, "ab") as file:
        file.truncate(at)
    for part in parts:
        skip = min(at, part.size)
        at -= skip
        known = not part.name or part.name in watcher.sums
        if skip == part.size and known:
            watcher.wrote(path, part.size)
        else:
            write_part(path, part, skip, watcher)
    watcher.closed(path)


# %% book/chapters/09_checkpoints.md, cell 102
def flat_arrays(tensors: dict[str, Any]) -> dict[str, Any]:
    """Path -> array; the scales of a quantized tensor get their own."""
    flat = {}
    for path, w in tensors.items():
        if isinstance(w, QuantizedTensor):
            flat[f"{path}.weight"] = w.weight
            flat[f"{path}.scales"] = w.scales
        else:
            flat[path] = w
    return flat


# %% book/chapters/09_checkpoints.md, cell 103
OUR_FORMAT = "annotated-moe"


# %% book/chapters/09_checkpoints.md, cell 104
PARTS = {
    "config.json",
    "model.safetensors",
    "checksums.json",
    *(form.file_name for form in FORMATS),
    *(name.split("/")[0] for name in COMPANIONS),
}


# %% book/chapters/09_checkpoints.md, cell 105
def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    path.write_bytes(b"")
    append(path, memoryview(text.encode()))
    sync(path)


# %% book/chapters/09_checkpoints.md, cell 106
def our_settings(config: ModelConfig) -> dict[str, Any]:
    return {"format": OUR_FORMAT, **asdict(config)}


# %% book/chapters/09_checkpoints.md, cell 107
def write_parts(model: Model, folder: Path) -> None:
    tensors = {
        f"{module}/{name}": w
        for module, leaves in model.params.items()
        for name, w in leaves.items()
    }
    parts = safetensors_parts(flat_arrays(tensors))
    watcher = Watcher()
    write_file(folder / "model.safetensors", parts, watcher)
    ordered = dict(sorted(watcher.sums.items()))
    write_json(folder / "checksums.json", {"sha256": ordered})
    write_json(folder / "config.json", our_settings(model.config))
    if model.tokenizer is not None:
        model.tokenizer.save_in(folder)


# %% book/chapters/09_checkpoints.md, cell 108
def refuse_streamed(model: Model) -> None:
    if isinstance(model, StreamedModel):
        raise CheckpointError(
            "a streamed model is on disk already: copy its folder, or "
            "load it without stream=True to save it elsewhere"
        )


# %% book/chapters/09_checkpoints.md, cell 109
def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write `model` in our own layout to the folder `path`.

    An older checkpoint of ours there is replaced; any other folder
    that is not empty is refused (CheckpointError). All of it is
    written, or nothing.
    """
    refuse_streamed(model)
    target = Path(path).absolute()
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not is_ours(target):
        raise CheckpointError(
            f"{target} exists and is no checkpoint of format "
            f"{OUR_FORMAT!r}: choose another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-"
    )
    with scratch as folder:
        new = Path(folder) / "new"
        new.mkdir()
        write_parts(model, new)
        put_in_place(new, target, Path(folder) / "old")


# %% book/chapters/09_checkpoints.md, cell 110
def put_in_place(new: Path, target: Path, old: Path) -> None:
    """Rename `new` to `target`; what was there becomes `old`.

    Files that `save` does not write stay at `target`.
    """
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    for file in old.iterdir():
        if file.name not in PARTS:
            file.rename(target / file.name)


# %% book/chapters/09_checkpoints.md, cell 111
def is_ours(folder: Path) -> bool:
    settings = folder / "config.json"
    if not settings.is_file():
        return False
    return read_json(settings).get("format") == OUR_FORMAT


# %% book/chapters/09_checkpoints.md, cell 112
def our_config(path: Path) -> ModelConfig:
    raw = read_json(path)
    del raw["format"]
    refuse_unknown(path, raw, [f.name for f in fields(ModelConfig)])
    return make_config(path, raw)


# %% book/chapters/09_checkpoints.md, cell 113
def read_ours(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Path -> tensor of a checkpoint that `save` wrote."""
    file = folder / "model.safetensors"
    arrays, tensors = open_arrays(file), {}
    for path, shape in expected(config).items():
        parts = [f"{path}.weight", f"{path}.scales"]
        if path in arrays:
            w: Tensor = arrays.pop(path)
        elif all(part in arrays for part in parts):
            w = QuantizedTensor(*(arrays.pop(part) for part in parts))
        else:
            raise CheckpointError(f"{file} lacks {path}")
        check_tensor(file, path, w, shape)
        tensors[path] = w
    if arrays:
        raise CheckpointError(
            f"{file} holds {min(arrays)}, which its configuration "
            "has no place for"
        )
    return tensors


# %% book/chapters/09_checkpoints.md, cell 114
ATTENTION = "decoder_layer/multi_head_attention"
MOE = "decoder_layer/moe"
GROK_WEIGHTS = (
    ("model.embed_tokens.weight", "in_out_embed/embeddings", "as is"),
    ("model.norm.scale", "rms_norm/scale", "as is"),
    ("pre_attn_norm.scale", "decoder_layer/rms_norm/scale", "as is"),
    ("post_attn_norm.scale", "decoder_layer/rms_norm_1/scale", "as is"),
    ("pre_moe_norm.scale", "decoder_layer/rms_norm_2/scale", "as is"),
    ("post_moe_norm.scale", "decoder_layer/rms_norm_3/scale", "as is"),
    ("attn.q_proj.weight", f"{ATTENTION}/query/w", "transpose"),
    ("attn.k_proj.weight", f"{ATTENTION}/key/w", "transpose"),
    ("attn.v_proj.weight", f"{ATTENTION}/value/w", "transpose"),
    ("attn.o_proj.weight", f"{ATTENTION}/linear/w", "transpose"),
    ("moe_block.gate.weight", "decoder_layer/router/w", "transpose"),
    ("{expert}.linear.weight", f"{MOE}/linear/w", "transpose"),
    ("{expert}.linear_v.weight", f"{MOE}/linear_v/w", "transpose"),
    ("{expert}.linear_1.weight", f"{MOE}/linear_1/w", "transpose"),
)


# %% book/chapters/09_checkpoints.md, cell 115
Change = Callable[[Any, ModelConfig], Any]
CHANGES: dict[str, tuple[Change, Change]] = {
    "as is": (lambda w, c: w, lambda w, c: w),
    "transpose": (lambda w, c: w.T, lambda w, c: w.T),
    "halves": (
        lambda w, c: Halves(w, c.head_size),
        lambda w, c: Neighbours(w, c.head_size),
    ),
    "image halves": (
        lambda w, c: Halves(w, cast(VisionConfig, c.vision).head_size),
        lambda w, c: Neighbours(
            w, cast(VisionConfig, c.vision).head_size),
    ),
    "first half": (lambda w, c: split(w)[0], lambda w, c: w),
    "second half": (lambda w, c: split(w)[1], lambda w, c: w),
}


# %% book/chapters/09_checkpoints.md, cell 116
def split(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of the last axis."""
    half = w.shape[-1] // 2
    return w[..., :half], w[..., half:]


# %% book/chapters/09_checkpoints.md, cell 117
@dataclass(frozen=True, eq=False)
class Halves(Lazy):
    """[D, heads * size], each head's halves from neighbours' rows.

    `source` is [heads * size, D], or a bias [heads * size]. What is
    read is what an index names, in whole heads.
    """

    source: Any
    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.source.shape[::-1])
        object.__setattr__(self, "dtype", self.source.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        *rows, columns = (*index, *[slice(None)] * 2)[: len(self.shape)]
        start, stop, _ = columns.indices(self.shape[-1])
        first, size = start // self.size * self.size, self.size
        few = slice(first, -(-stop // size) * size)
        part = np.asarray(self.source[(few, *rows)])
        pairs = part.reshape(-1, size // 2, 2, *part.shape[1:])
        turned = pairs.swapaxes(1, 2).reshape(part.shape)
        return turned[start - first : stop - first].T


# %% book/chapters/09_checkpoints.md, cell 118
class Neighbours(Halves):
    """The way back: `source` is [D, heads * size], or a bias."""

    def __getitem__(self, index: Any) -> np.ndarray:
        part = np.asarray(self.source).T
        pairs = part.reshape(-1, 2, self.size // 2, *part.shape[1:])
        return pairs.swapaxes(1, 2).reshape(part.shape)[index]


# %% book/chapters/09_checkpoints.md, cell 119
GROK_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
    "attn_output_multiplier": "attn_multiplier",
    "max_attn_value": "attn_softcap",
    "rope_theta": "rope_base",
    "pad_token_id": "pad_id",
    "eos_token_id": "eos_id",
    "torch_dtype": "dtype",
}


# %% book/chapters/09_checkpoints.md, cell 120
@dataclass(frozen=True)
class Family:
    """One architecture of the Hugging Face layout, as data.

    `fixed` are fields that have one value here, `ignored` those that
    do not change what is computed, `defaults` those that may be left
    out. What no table can say, `read` turns into our settings and
    `write` into theirs; `special` are the fields that they know.
    """

    weights: tuple[tuple[str, str, str], ...]
    fields: dict[str, str]
    fixed: dict[str, Any]
    ignored: frozenset[str]
    layer: str = "model.layers.{i}."
    expert: str = "moe_block.experts.{i}"
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    read: Callable[[dict], dict] = lambda raw: {}
    write: Callable[[dict], dict] = lambda values: {}
    text: str = ""                  # the object with most of the fields


# %% book/chapters/09_checkpoints.md, cell 121
HOUSEKEEPING = (
    "architectures model_type auto_map transformers_version use_cache "
    "bos_token_id output_router_logits router_aux_loss_coef "
    "initializer_range quantization_config"
)


# %% book/chapters/09_checkpoints.md, cell 122
def fields_named(words: str) -> frozenset[str]:
    return frozenset(f"{HOUSEKEEPING} {words}".split())


# %% book/chapters/09_checkpoints.md, cell 123
FAMILIES = {
    "Grok1ModelForCausalLM": Family(
        GROK_WEIGHTS,
        GROK_FIELDS,
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        fields_named(""),
        defaults={
            "head_dim": None, "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
        },
    ),
}


# %% book/chapters/09_checkpoints.md, cell 124
def relative(
    weights: Any, fields: dict, defaults: dict, read: Any, write: Any,
    ignored: str = llama.HUB_IGNORED, special: str = "",
    **names: str,
) -> Family:
    """A family whose files are made as Llama's are."""
    return Family(
        weights, fields, {"hidden_act": "silu"}, fields_named(ignored),
        defaults={**defaults, "num_key_value_heads": None},
        special=frozenset(f"{llama.HUB_SPECIAL} {special}".split()),
        read=read, write=write, **names,
    )


# %% book/chapters/09_checkpoints.md, cell 125
NORM = "norm_topk_prob"
FAMILIES["LlamaForCausalLM"] = relative(
    llama.WEIGHTS, llama.FIELDS, llama.HUB_DEFAULTS,
    llama.read_llama, llama.write_hub,
)
FAMILIES["MixtralForCausalLM"] = relative(
    mixtral.WEIGHTS, mixtral.FIELDS, mixtral.DEFAULTS,
    mixtral.read_mixtral, mixtral.write_mixtral,
    llama.HUB_IGNORED + " router_jitter_noise", expert=mixtral.EXPERT,
)
FAMILIES["OlmoeForCausalLM"] = relative(
    mixtral.QWEN_WEIGHTS, mixtral.OLMOE_FIELDS, mixtral.DEFAULTS,
    mixtral.read_olmoe, mixtral.write_renormalise, special=NORM,
    expert=mixtral.QWEN_EXPERT,
)
FAMILIES["Qwen3MoeForCausalLM"] = relative(
    mixtral.QWEN_WEIGHTS, mixtral.QWEN_FIELDS, mixtral.QWEN_DEFAULTS,
    mixtral.read_qwen, mixtral.write_renormalise,
    llama.HUB_IGNORED + " sliding_window max_window_layers",
    f"{NORM} use_sliding_window num_local_experts",
    expert=mixtral.QWEN_EXPERT,
)
FAMILIES["Llama4ForCausalLM"] = relative(
    llama4.WEIGHTS, llama4.FIELDS, llama4.DEFAULTS,
    llama4.read_llama4, llama4.write_llama4,
    llama4.IGNORED, llama4.SPECIAL,
)


# %% book/chapters/09_checkpoints.md, cell 126
FAMILIES["Llama4ForConditionalGeneration"] = replace(
    FAMILIES["Llama4ForCausalLM"],
    weights=llama4.WEIGHTS + VISION_HF,
    prefix="language_model.",
    text="text_config",
)


# %% book/chapters/09_checkpoints.md, cell 127
def family_of(path: Path, raw: dict[str, Any]) -> Family:
    """The table for a Hugging Face `config.json`."""
    found = raw.get("architectures")
    name = found[0] if isinstance(found, list) and found else None
    if not isinstance(name, str) or name not in FAMILIES:
        shown = repr(name[:40]) if isinstance(name, str) else "none"
        raise CheckpointError(
            f"{path} names the architecture {shown}; other layouts are "
            f"not supported: known are {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


# %% book/chapters/09_checkpoints.md, cell 128
def hf_config(path: Path) -> ModelConfig:
    """A Hugging Face `config.json`, by its family's table."""
    raw = {k: v for k, v in read_json(path).items() if k[:1] != "_"}
    return settings_of(path, family_of(path, raw), raw)


# %% book/chapters/09_checkpoints.md, cell 129
def settings_of(
    path: Path, family: Family, raw: dict[str, Any]
) -> ModelConfig:
    """`config_of`, or `seeing_config` for a family that sees."""
    return (seeing_config if family.text else config_of)(
        path, family, raw
    )


# %% book/chapters/09_checkpoints.md, cell 130
def seeing_config(
    path: Path, family: Family, raw: dict[str, Any]
) -> ModelConfig:
    """A model that sees: its text's fields, and its encoder's."""
    known = {family.text, "vision_config", "dtype", "torch_dtype",
             "tie_word_embeddings", *IMAGE_IDS}
    refuse_unknown(path, set(raw) - family.ignored, known)
    text = raw.get(family.text)
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} lacks an object {family.text!r}")
    above = {k: raw[k] for k in ("dtype", "torch_dtype") if k in raw}
    text = {k: v for k, v in {**above, **text}.items() if k[:1] != "_"}
    config = config_of(path, family, text)
    try:
        eyes = read_vision(
            raw.get("vision_config"), config.d_model, raw
        )
        return replace(config, vision=eyes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


# %% book/chapters/09_checkpoints.md, cell 131
def config_of(
    path: Path, family: Family, raw: dict[str, Any]
) -> ModelConfig:
    """Their fields as our settings, by a family's table."""
    check_fields(path, family, raw)
    raw = {**family.defaults, **raw}
    names = {ours: name for name, ours in family.fields.items()}
    values = {ours: raw[name] for ours, name in names.items()}
    try:
        values |= family.read(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if values["head_size"] is None:
        config = make_config(path, {**values, "head_size": 2})
        values["head_size"] = config.d_model // config.q_heads
    return make_config(path, values)


# %% book/chapters/09_checkpoints.md, cell 132
def check_fields(
    path: Path, family: Family, raw: dict[str, Any]
) -> None:
    """CheckpointError for a field unknown, missing or unsupported."""
    for name, value in family.fixed.items():
        if raw.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} is {raw[name]!r}; only {value!r} "
                "is supported"
            )
    others = {*family.fixed, *family.ignored, *family.special}
    refuse_unknown(path, set(raw) - others, family.fields)
    later = {*family.defaults, *family.special}
    missing = sorted(set(family.fields) - later - set(raw))
    if missing:
        raise CheckpointError(f"{path} lacks the field {missing[0]!r}")
    check_scheme(path, raw)


# %% book/chapters/09_checkpoints.md, cell 133
def check_scheme(path: Path, raw: dict[str, Any]) -> None:
    """CheckpointError for quantized weights of another format."""
    scheme = raw.get("quantization_config") or {}
    known = isinstance(scheme, dict) and (
        scheme.get("quant_method", "") in ("", "int8-weight-scale")
    )
    if not known:
        raise CheckpointError(
            f"{path}: quantization_config is not supported; fetch the "
            "weights in bfloat16"
        )


# %% book/chapters/09_checkpoints.md, cell 134
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"


# %% book/chapters/09_checkpoints.md, cell 135
def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> shard; the shards named are those that are there."""
    path = folder / INDEX
    index: Any = read_json(path).get("weight_map")
    shards = index.values() if isinstance(index, dict) else [None]
    if not all(isinstance(shard, str) for shard in shards):
        raise CheckpointError(f"{path} has no 'weight_map' of names")
    there = {n for n in names_in(folder) if n.endswith(".safetensors")}
    for shard in sorted(set(shards) ^ there):
        if shard in there:
            what = f"does not name {shard}, which lies beside it"
        else:
            what = f"names {shard[:80]!r}, which is missing: fetch it"
        raise CheckpointError(f"{path} {what}")
    return index


# %% book/chapters/09_checkpoints.md, cell 136
def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """Name -> array of one safetensors file, or of all shards."""
    names = names_in(folder)
    if INDEX not in names:
        return open_arrays(folder / ONE_FILE)
    index, arrays = read_index(folder), {}
    for shard in sorted(set(index.values())):
        for name, array in open_arrays(folder / shard).items():
            if index.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard} holds {name[:80]!r}, which the "
                    f"index places in {index.get(name)!r}: one "
                    "parameter has two tensors"
                )
            arrays[name] = array
    lost = sorted(set(index) - set(arrays))
    if lost:
        raise CheckpointError(
            f"{folder / index[lost[0]]} lacks {lost[0][:80]!r}, which "
            "the index places there"
        )
    return arrays


# %% book/chapters/09_checkpoints.md, cell 137
def their_name(
    family: Family, name: str, layer: int | None, expert: int | None
) -> str:
    """A name of the weight map, for one layer and one expert."""
    before = "" if layer is None else family.layer.format(i=layer)
    before = family.prefix + before
    return before + name.format(expert=family.expert.format(i=expert))


# %% book/chapters/09_checkpoints.md, cell 138
@dataclass(frozen=True)
class Theirs:
    """What a folder holds in a family's layout, and what was taken."""

    where: Path
    arrays: dict[str, np.ndarray]
    family: Family
    config: ModelConfig
    used: set[str] = field(default_factory=set)

    def find(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise CheckpointError(f"{self.where} lacks {name}")
        self.used.add(name)
        return self.arrays[name]


# %% book/chapters/09_checkpoints.md, cell 139
def take(
    t: Theirs, name: str, row: tuple[str, str, str], shape: tuple
) -> Any:
    """One tensor of theirs, with its scales, as ours: only views."""
    _, path, change = row
    read, weight = CHANGES[change][0], t.find(name)
    w = read(weight, t.config)
    scale = f"{name}_scale"
    if weight.dtype == np.int8 and scale not in t.arrays:
        raise CheckpointError(f"{t.where}: {name} lacks {scale}")
    if scale in t.arrays:
        scales = t.find(scale)
        w = QuantizedTensor(w, read(scales, t.config))
    check_tensor(t.where, f"{name} as {path}", w, shape)
    return w


# %% book/chapters/09_checkpoints.md, cell 140
def gather(t: Theirs, row: tuple[str, str, str]) -> Any:
    """One of our stacks, from a tensor a layer, or one an expert."""
    theirs, path, _ = row
    shape = expected(t.config)[path]

    def one(layer: int | None, expert: int | None, axes: int) -> Any:
        name = their_name(t.family, theirs, layer, expert)
        return take(t, name, row, shape[axes:])

    def of_layer(layer: int) -> Any:
        if "{expert}" not in theirs:
            return one(layer, None, 1)
        experts = range(t.config.num_experts)
        parts = [one(layer, expert, 2) for expert in experts]
        return stack_layers(t.where, path, parts)

    if path.startswith("vision/"):
        return gather_vision(t, row)
    if not path.startswith("decoder_layer/"):
        return one(None, None, 0)
    parts = [of_layer(layer) for layer in layers_of(path, t.config)]
    return stack_layers(t.where, path, parts)


# %% book/chapters/09_checkpoints.md, cell 141
def gather_vision(t: Theirs, row: tuple[str, str, str]) -> Any:
    """The same for the encoder of images, which has its own layers."""
    theirs, path, _ = row
    shape, stacked = expected(t.config)[path], "{i}" in theirs
    names = vision_names(theirs, cast(VisionConfig, t.config.vision))
    parts = [take(t, name, row, shape[stacked:]) for name in names]
    return stack_layers(t.where, path, parts) if stacked else parts[0]


# %% book/chapters/09_checkpoints.md, cell 142
def layers_of(path: str, config: ModelConfig) -> list[int]:
    """The layers that have a parameter, in the order of its stack."""
    of = stack_of(path.rsplit("/", 1)[0])
    every = enumerate(kinds(config))
    if of == "layer":
        return [layer for layer, _ in every]
    wanted = of == "experts"
    return [layer for layer, kind in every if kind.experts == wanted]


# %% book/chapters/09_checkpoints.md, cell 143
def check_head(t: Theirs, table: np.ndarray) -> None:
    """CheckpointError if a tied model's output matrix is another."""
    name = f"{t.family.prefix}lm_head.weight"
    if name in t.used or name not in t.arrays:
        return
    head = t.find(name)
    same = (head.dtype, head.shape) == (table.dtype, table.shape)
    pairs = zip(pieces(head), pieces(table))
    if not same or any(as_bytes(a) != as_bytes(b) for a, b in pairs):
        raise CheckpointError(
            f"{t.where}: lm_head.weight is not the embedding, with "
            "which its configuration ties it"
        )


# %% book/chapters/09_checkpoints.md, cell 144
NO_WEIGHTS = ".rotary_emb.inv_freq"             # older files have it


# %% book/chapters/09_checkpoints.md, cell 145
def read_hf(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Path -> tensor of a Hugging Face checkpoint, mapped from disk."""
    settings = folder / "config.json"
    family = family_of(settings, read_json(settings))
    t, tensors = Theirs(folder, open_folder(folder), family, config), {}
    rows = {row[1]: row for row in family.weights}
    for path in expected(config):
        if path not in rows:
            raise CheckpointError(
                f"{settings}: this architecture has no {path}; "
                "num_experts must be at least 2"
            )
        tensors[path] = gather(t, rows[path])
    check_head(t, tensors["in_out_embed/embeddings"])
    extra = {n for n in t.arrays if not n.endswith(NO_WEIGHTS)} - t.used
    if extra:
        raise CheckpointError(
            f"{folder} holds {min(extra)[:80]!r}, which its "
            "configuration has no place for"
        )
    return tensors


# %% book/chapters/09_checkpoints.md, cell 146
def groups_for(path: str, inputs: int, most: int = 8) -> int:
    """Groups of scales: several where `model` cuts the inputs."""
    cut = ("/linear_1/w", "/multi_head_attention/linear/w")
    return math.gcd(inputs, most) if path.endswith(cut) else 1


# %% book/chapters/09_checkpoints.md, cell 147
def quantize_params(params: dict, groups: int = 8) -> dict:
    """Every matrix of the kinds that Grok-1 quantizes, in 8 bits."""
    def one(path: str, w: Any) -> Any:
        known = isinstance(w, QuantizedTensor)
        if known or not may_be_quantized(path):
            return w
        return quantize(w, groups_for(path, w.shape[-2], groups))

    return {
        module: {n: one(f"{module}/{n}", w) for n, w in ws.items()}
        for module, ws in params.items()
    }


# %% book/chapters/09_checkpoints.md, cell 148
Layout = tuple[ModelConfig, Callable, Path]
DETECTORS: list[Callable[[Path, set[str]], Layout | None]] = []


# %% book/chapters/09_checkpoints.md, cell 149
def find_layout(folder: Path) -> Layout:
    """The configuration, the reader, and the folder it reads."""
    folder = folder.parent if folder.name == "ckpt-0" else folder
    names, settings = names_in(folder), folder / "config.json"
    if "ckpt-0" in names:
        return grok_config(settings), read_grok, folder / "ckpt-0"
    raw = read_json(settings) if "config.json" in names else {}
    if raw.get("format") == OUR_FORMAT:
        return our_config(settings), read_ours, folder
    if "architectures" in raw:
        return hf_config(settings), read_hf, folder
    for detect in DETECTORS:
        if found := detect(folder, names):
            return found
    raise CheckpointError(
        f"{folder} holds neither ckpt-0/ (Grok-1) nor a config.json of "
        f"format {OUR_FORMAT!r} or with 'architectures' (the hub), "
        "nor params.json and consolidated.00.pth (Meta)"
    )


# %% book/chapters/09_checkpoints.md, cell 150
LAYOUTS: dict[Callable, str] = {
    read_grok: "Grok-1",
    read_ours: OUR_FORMAT,
    read_hf: "Hugging Face",
}


# %% book/chapters/09_checkpoints.md, cell 151
def beside(where: Path) -> Path:
    """Where the configuration and the tokenizer stand."""
    return where.parent if where.name == "ckpt-0" else where


# %% book/chapters/09_checkpoints.md, cell 152
def stored(where: Path) -> dict[str, np.ndarray]:
    """Every array in a checkpoint's files, by the name it has there."""
    if where.name != "ckpt-0":
        return open_folder(where)
    files = [n for n in names_in(where) if n.startswith("tensor")]
    seen: Seen = {}
    tensors = {n: read_pickled(where / n, seen) for n in sorted(files)}
    return flat_arrays(tensors)


# %% book/chapters/09_checkpoints.md, cell 153
def checksums(folder: Path) -> dict[str, str]:
    """Tensor -> sha256, as `checksums.json` says."""
    path = folder / "checksums.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} has no checksums.json: annotated-moe convert "
            "makes a copy that has"
        )
    sums = read_json(path).get("sha256")
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path} lacks the field 'sha256'")
    return sums


# %% book/chapters/09_checkpoints.md, cell 154
def verify(path: str | os.PathLike[str] | None = None) -> int:
    """Hold every tensor against its checksum; how many there are.

    Reads the whole checkpoint, a block at a time. Raises
    CheckpointError for the first tensor that is not what was written.
    """
    folder = small_model() if path is None else Path(path)
    where = find_layout(folder)[2]
    sums, arrays = checksums(beside(where)), stored(where)
    for name in sorted(set(arrays) ^ set(sums)):
        lacks = "checksum" if name in arrays else "tensor"
        raise CheckpointError(f"{where}: {name[:80]!r} has no {lacks}")
    for name, array in arrays.items():
        digest = hashlib.sha256()
        for piece in pieces(array):
            digest.update(as_bytes(piece))
        if digest.hexdigest() != sums[name]:
            raise CheckpointError(
                f"{where}: {name} does not match its checksum; it was "
                "changed or damaged: fetch it again"
            )
    return len(arrays)


# %% book/chapters/09_checkpoints.md, cell 155
def find_tokenizer(
    folder: Path, config: ModelConfig
) -> Tokenizer | None:
    """The tokenizer, if there is one; its ids must fit the model.

    `tokenizer.json` goes first: where both are, it has tokens that
    were added later.
    """
    try:
        tokenizer = open_tokenizer(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer is None:
        return None
    if tokenizer.vocab_size > config.vocab_size:
        path = folder / tokenizer.format.file_name
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} pieces, but the "
            f"model's vocabulary is {config.vocab_size}"
        )
    if config.vision is not None and (folder / "params.json").exists():
        meta_images(tokenizer, config.vision)
    return tokenizer


# %% book/chapters/09_checkpoints.md, cell 156
def meta_images(tokenizer: Tokenizer, eyes: VisionConfig) -> None:
    """Put beside a tokenizer of Meta's what its program takes."""
    if not set(IMAGE_FILES) & set(tokenizer.companions):
        text = json.dumps(preprocessor_config(eyes), indent=1)
        tokenizer.companions[IMAGE_FILES[0]] = text.encode()


# %% book/chapters/09_checkpoints.md, cell 157
def small_model() -> Path:
    """The folder of the trained model inside this package."""
    return Path(str(files("annotated_moe") / "small"))


# %% book/chapters/09_checkpoints.md, cell 158
def indivisible(c: ModelConfig, data: int, model: int) -> str:
    """The first size that a data x model mesh cannot cut, or ""."""
    kv = c.kv_heads * c.head_size
    wanted = [
        ("d_model", c.d_model, "data * model", data * model),
        ("d_ff", c.d_ff, "model", model),
        ("dense_ff", c.dense_ff, "model", model),
        ("q_heads", c.q_heads, "model", model),
        ("kv_heads * head_size", kv, "model", model),
    ]
    for name, size, axis, parts in wanted:
        if size % parts:
            return f"{axis} = {parts} does not divide {name} = {size}"
    return ""


# %% book/chapters/09_checkpoints.md, cell 159
def check_mesh(folder: Path, c: ModelConfig, mesh: Mesh) -> None:
    """ValueError unless `mesh` has our axes and divides the model."""
    axes = getattr(mesh, "axis_names", ())
    if set(axes) != {"data", "model"}:
        raise ValueError("mesh needs axes data, model: use make_mesh")
    data, model = mesh.shape["data"], mesh.shape["model"]
    wrong = indivisible(c, data, model)
    if not wrong:
        return
    n = data * model
    pairs = [(i, n // i) for i in range(1, n + 1) if n % i == 0]
    good = [f"{i} x {j}" for i, j in pairs if not indivisible(c, i, j)]
    advice = f"of {n} devices, {' or '.join(good)} would do"
    if not good:
        advice = f"no mesh of {n} devices would do, take another number"
    raise CheckpointError(
        f"{folder} does not fit a data x model mesh of "
        f"{data} x {model}: {wrong}; {advice}"
    )


# %% book/chapters/09_checkpoints.md, cell 160
def check_stream(mesh: Mesh | None, stream: bool) -> None:
    if stream and mesh is not None:
        why = "stream=True runs on one device: leave out the mesh"
        raise ValueError(why)


# %% book/chapters/09_checkpoints.md, cell 161
def load(
    path: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    stream: bool = False,
) -> Model:
    """A model from a checkpoint folder; without one, the small model.

    `mesh` comes from `make_mesh`; None is one device. `dtype` is what
    it computes in, "bfloat16" or "float32". With `stream`, weights
    stay on disk, for a model larger than memory. Raises CheckpointError
    for whatever is missing, left over, misshapen or unsafe, and
    ValueError for another dtype or mesh. Source: the Grok-1 release,
    `checkpoint.py`.
    """
    check_stream(mesh, stream)
    folder = small_model() if path is None else Path(path)
    config, read, where = find_layout(folder)
    if mesh is not None:
        check_mesh(folder, config, mesh)
    config = replace(config, dtype=dtype)
    params: dict[str, dict] = {}
    for name, w in read(where, config).items():
        module, leaf = name.rsplit("/", 1)
        w = w if stream else place(name, w, mesh, dtype)
        params.setdefault(module, {})[leaf] = w
    beside = where.parent if where.name == "ckpt-0" else where
    kind = StreamedModel if stream else Model
    return kind(config, params, find_tokenizer(beside, config), mesh)
