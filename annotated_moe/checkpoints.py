# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The weights of Grok-1 were published as 770 pickles, and a pickle is
a program: whoever wrote it decides what runs on your machine when you
load it. This chapter reads such files without running any of them. By
its end you will have `load`, which looks at a folder, works out its
layout, holds every tensor against the configuration, and puts each on
its devices while reading only the bytes that a device keeps.
"""

# %% book/chapters/09_checkpoints.md, cell 1
import json
import math
import os
import pickletools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from annotated_moe import sharding
from annotated_moe.model import PRESETS, Model, ModelConfig, init_params
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.streaming import StreamedModel
from annotated_moe.tokenizer import Tokenizer


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
class Reader:
    """A cursor over the bytes of one file."""

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

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def text(self) -> str:
        """At most 255 bytes, behind a byte that counts them."""
        try:
            return str(self.take(self.number(1)), "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"is malformed before byte {self.at}: this is no text"
            ) from None


# %% book/chapters/09_checkpoints.md, cell 10
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


# %% book/chapters/09_checkpoints.md, cell 11
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


# %% book/chapters/09_checkpoints.md, cell 12
def call(machine: Machine, callable_kinds: tuple[str, ...]) -> Node:
    """REDUCE, NEWOBJ: pickle calls here. We note the arguments."""
    function, args = machine.several(2)
    good = isinstance(function, Node) and function.args is None
    if not good or function.kind not in callable_kinds:
        raise machine.broken("a call that makes no array")
    if not isinstance(args, tuple):
        raise machine.broken("a call without arguments")
    return Node(function.kind, args)


# %% book/chapters/09_checkpoints.md, cell 13
def build(machine: Machine) -> None:
    """BUILD: pickle runs `__setstate__` here. We note the state."""
    target, state = machine.several(2)
    good = isinstance(target, Node) and target.args is not None
    if not good or target.state is not None:
        raise machine.broken("a state for something that takes none")
    target.state = state
    machine.stack.append(target)


# %% book/chapters/09_checkpoints.md, cell 14
def set_items(machine: Machine) -> None:
    """SETITEMS: names and values into the dict below the mark."""
    items = machine.since_mark()
    target, names = machine.pop(), items[::2]
    good = isinstance(target, dict) and len(items) % 2 == 0
    if not good or not all(isinstance(name, str) for name in names):
        raise machine.broken("a dict of something else than names")
    target.update(zip(names, items[1::2], strict=True))
    machine.stack.append(target)


# %% book/chapters/09_checkpoints.md, cell 15
def recall(machine: Machine, index: int) -> Any:
    if index >= len(machine.memo):
        raise machine.broken(f"memo {index} was never written")
    return machine.memo[index]


# %% book/chapters/09_checkpoints.md, cell 16
def memorize(machine: Machine) -> None:
    item = machine.pop()
    machine.stack.append(item)
    machine.memo.append(item)


# %% book/chapters/09_checkpoints.md, cell 17
PUSH: dict[str, Callable[[Machine], Any]] = {
    "NONE": lambda m: None,
    "NEWTRUE": lambda m: True,
    "NEWFALSE": lambda m: False,
    "BININT1": lambda m: m.number(1),
    "BININT2": lambda m: m.number(2),
    "BININT": lambda m: m.number(4, signed=True),
    "LONG1": lambda m: m.number(m.number(1), signed=True),
    "SHORT_BINUNICODE": Machine.text,
    "SHORT_BINBYTES": lambda m: m.take(m.number(1)),
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


# %% book/chapters/09_checkpoints.md, cell 18
PUSH |= {
    "BINGET": lambda m: recall(m, m.number(1)),
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


# %% book/chapters/09_checkpoints.md, cell 19
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


# %% book/chapters/09_checkpoints.md, cell 20
def step(machine: Machine) -> bool:
    """Carry out one instruction; False when it was STOP."""
    code = machine.number(1)
    name = OPCODES.get(code, f"{code:#04x}")
    if name in PUSH:
        machine.stack.append(PUSH[name](machine))
    elif name in DO:
        DO[name](machine)
    elif name != "STOP":
        raise CheckpointError(
            f"uses the pickle instruction {name}, which no tensor "
            "needs; it was refused and nothing was run"
        )
    return name != "STOP"


# %% book/chapters/09_checkpoints.md, cell 21
MOST_STEPS = 1000


# %% book/chapters/09_checkpoints.md, cell 22
def parse(data: memoryview) -> Any:
    """What a pickle describes. Runs nothing, imports nothing."""
    machine = Machine(data)
    for _ in range(MOST_STEPS):
        if not step(machine):
            break
    else:
        raise CheckpointError(
            f"has more than {MOST_STEPS} pickle instructions, which no "
            "tensor needs; it was refused and nothing was run"
        )
    if len(machine.stack) != 1 or machine.at != len(data):
        raise machine.broken("something is left over at the end")
    return machine.stack[0]


# %% book/chapters/09_checkpoints.md, cell 25
DTYPES = {
    "f4": np.dtype("<f4"),
    "i1": np.dtype("i1"),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


# %% book/chapters/09_checkpoints.md, cell 26
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


# %% book/chapters/09_checkpoints.md, cell 27
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


# %% book/chapters/09_checkpoints.md, cell 28
Tensor = np.ndarray | QuantizedTensor


# %% book/chapters/09_checkpoints.md, cell 29
def as_tensor(node: Any) -> Tensor:
    """A plain array, or the release's pair of int8 and scales."""
    if not isinstance(node, Node) or node.kind != QUANTIZED:
        return as_array(node)
    s = node.state
    if not isinstance(s, dict) or set(s) != {"weight", "scales"}:
        raise CheckpointError("does not hold `weight` and `scales`")
    return QuantizedTensor(as_array(s["weight"]), as_array(s["scales"]))


# %% book/chapters/09_checkpoints.md, cell 30
def read_pickled(path: Path) -> Tensor:
    """One tensor of a Grok-1 file, mapped into memory, not copied.

    Raises CheckpointError, naming the file. Nothing in it is run.
    """
    try:
        data = np.memmap(path, np.uint8, "r").data
    except (OSError, ValueError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    try:
        return as_tensor(parse(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


# %% book/chapters/09_checkpoints.md, cell 39
@cache
def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter; layers are stacked in front."""
    tree = jax.eval_shape(
        lambda seed: init_params(jax.random.key(seed), config),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    return {
        f"{module}/{name}": tuple(leaf.shape)
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
    }


# %% book/chapters/09_checkpoints.md, cell 40
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


# %% book/chapters/09_checkpoints.md, cell 41
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token makes use of."""
    sizes = {path: math.prod(s) for path, s in expected(config).items()}
    experts = sum(n for path, n in sizes.items() if "/moe/" in path)
    total = sum(sizes.values())
    idle = experts * (config.num_experts - config.top_k)
    return total, total - idle // config.num_experts


# %% book/chapters/09_checkpoints.md, cell 46
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


# %% book/chapters/09_checkpoints.md, cell 47
def read_json(path: Path) -> dict[str, Any]:
    """The one JSON object in a file, or a CheckpointError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path} is not readable: {error}"
        raise CheckpointError(message) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return content


# %% book/chapters/09_checkpoints.md, cell 48
def refuse_unknown(path: Path, names: Any, known: Any) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CheckpointError(
            f"{path} has the field {unknown[0][:40]!r}, which is not "
            f"supported; known are {', '.join(sorted(known))}"
        )


# %% book/chapters/09_checkpoints.md, cell 49
def make_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    try:
        config = ModelConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    numbers = [n for n in asdict(config).values() if type(n) is int]
    if config.num_layers > 9999 or max(numbers) >= 2**31:
        raise CheckpointError(f"{path} is beyond the size of any model")
    return config


# %% book/chapters/09_checkpoints.md, cell 50
def ffn_size(d_model: int, widening: int | float) -> int:
    """F of the release: 6144 and 8 give 32768."""
    return -(-(int(widening * d_model) * 2 // 3) // 8) * 8


# %% book/chapters/09_checkpoints.md, cell 51
def grok_config(path: Path) -> ModelConfig:
    """A `config.json` of the release, or Grok-1 where there is none."""
    if not path.exists():
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


# %% book/chapters/09_checkpoints.md, cell 53
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


# %% book/chapters/09_checkpoints.md, cell 54
def may_be_quantized(path: str) -> bool:
    """Attention's and the experts' matrices; no norm, no router."""
    return path.endswith("/w") and "/router/" not in path


# %% book/chapters/09_checkpoints.md, cell 55
def check_tensor(
    where: Path, name: str, w: Tensor, shape: tuple[int, ...]
) -> None:
    if tuple(w.shape) != shape:
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(w.shape)}; the "
            f"configuration expects {shape}"
        )
    if not isinstance(w, QuantizedTensor):
        if w.dtype not in (np.float32, ml_dtypes.bfloat16):
            raise CheckpointError(
                f"{where}: {name} is {w.dtype}; "
                "expected float32 or bfloat16"
            )
    elif may_be_quantized(name):
        check_scales(where, name, w)
    else:
        raise CheckpointError(f"{where}: {name} may not be quantized")


# %% book/chapters/09_checkpoints.md, cell 56
def grok_files(folder: Path, names: list[str]) -> list[Path]:
    """One file a name, in order; both sets must be the same."""
    files = [f"tensor{i:05d}_000" for i in range(len(names))]
    found = {p.name for p in folder.glob("tensor*")}
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


# %% book/chapters/09_checkpoints.md, cell 57
def our_path(name: str) -> tuple[str, int | None]:
    """transformer/decoder_layer_3/a/w -> decoder_layer/a/w and 3."""
    top, rest = name.split("/", 1)
    if top == "language_model":
        return rest, None
    layer, rest = rest.split("/", 1)
    return f"decoder_layer/{rest}", int(layer.rsplit("_", 1)[1])


# %% book/chapters/09_checkpoints.md, cell 58
@dataclass(frozen=True)
class Stack:
    """Arrays of one shape and dtype behind one another, not copied."""

    parts: list

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def __getitem__(self, index: tuple) -> np.ndarray:
        layers = range(len(self.parts))[index[0]]
        return np.stack([self.parts[i][index[1:]] for i in layers])


# %% book/chapters/09_checkpoints.md, cell 59
def stack_layers(where: Path, path: str, parts: list[Tensor]) -> Any:
    """One lazily stacked tensor from those of all layers."""
    pairs = [w for w in parts if isinstance(w, QuantizedTensor)]
    if not pairs:
        return Stack(parts)
    shapes = {w.scales.shape for w in pairs}
    if len(pairs) < len(parts) or len(shapes) > 1:
        raise CheckpointError(
            f"{where}: the layers of {path} are not all quantized alike"
        )
    scales = np.stack([w.scales for w in pairs])
    return QuantizedTensor(Stack([w.weight for w in pairs]), scales)


# %% book/chapters/09_checkpoints.md, cell 60
def read_grok(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Path -> tensor of a Grok-1 checkpoint, mapped from disk."""
    names, shapes = grok_paths(config), expected(config)
    files = grok_files(folder, names)
    tensors: dict[str, Any] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    for file, name in zip(files, names, strict=True):
        path, layer = our_path(name)
        w = read_pickled(file)
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


# %% book/chapters/09_checkpoints.md, cell 61
def on_devices(
    source: Any, spec: P, mesh: Mesh | None, dtype: Any
) -> jax.Array:
    """An array of which each device reads the part that it keeps."""
    def read(index: Any) -> np.ndarray:
        return np.asarray(source[index], dtype)

    if mesh is None:
        return jnp.array(read((slice(None),) * len(source.shape)))
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(source.shape, where, read)


# %% book/chapters/09_checkpoints.md, cell 62
def place(path: str, w: Any, mesh: Mesh | None, dtype: str) -> Any:
    """Put one parameter on its devices, by the partition rules."""
    spec = sharding.spec_for(path)
    if path.startswith("decoder_layer/"):
        spec = P(None, *spec)
    if isinstance(w, QuantizedTensor):
        return place_quantized(w, spec, mesh)
    if path.endswith("/scale") or "/router/" in path:
        dtype = "float32"
    if mesh is not None:
        spec = sharding.fit_spec(spec, w.shape, mesh)
    return on_devices(w, spec, mesh, dtype)


# %% book/chapters/09_checkpoints.md, cell 63
def place_quantized(
    w: QuantizedTensor, spec: P, mesh: Mesh | None
) -> QuantizedTensor:
    """Both arrays; each device's rows get scales of their own."""
    specs = QuantizedTensor(spec, spec)
    if mesh is not None:
        w = sharding.fit_groups(w, spec, mesh)
        specs = sharding.weight_spec(spec, w, mesh)
    scales = np.asarray(w.scales)
    return QuantizedTensor(
        on_devices(w.weight, specs.weight, mesh, jnp.int8),
        on_devices(scales, specs.scales, mesh, jnp.bfloat16),
    )


# %% book/chapters/09_checkpoints.md, cell 64
OUR_FORMAT = "annotated-moe"


# %% book/chapters/09_checkpoints.md, cell 65
def flat_arrays(params: dict) -> dict[str, np.ndarray]:
    """Haiku's dict of dicts as path -> array; scales get their own."""
    flat = {}
    for module, leaves in params.items():
        for name, w in leaves.items():
            path = f"{module}/{name}"
            if isinstance(w, QuantizedTensor):
                flat[f"{path}.weight"] = np.asarray(w.weight)
                flat[f"{path}.scales"] = np.asarray(w.scales)
            else:
                flat[path] = np.asarray(w)
    return flat


# %% book/chapters/09_checkpoints.md, cell 66
def write_parts(model: Model, folder: Path) -> None:
    weights = folder / "model.safetensors"
    config = folder / "config.json"
    save_file(flat_arrays(model.params), weights)
    settings = {"format": OUR_FORMAT, **asdict(model.config)}
    config.write_text(json.dumps(settings, indent=1) + "\n")
    # safetensors makes files that only their owner may read.
    shutil.copymode(config, weights)
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.model")


# %% book/chapters/09_checkpoints.md, cell 67
def refuse_streamed(model: Model) -> None:
    if isinstance(model, StreamedModel):
        raise CheckpointError(
            "a streamed model is on disk already: copy its folder, or "
            "load it without stream=True to save it elsewhere"
        )


# %% book/chapters/09_checkpoints.md, cell 68
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


# %% book/chapters/09_checkpoints.md, cell 69
PARTS = {"config.json", "model.safetensors", "tokenizer.model"}


# %% book/chapters/09_checkpoints.md, cell 70
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


# %% book/chapters/09_checkpoints.md, cell 71
def is_ours(folder: Path) -> bool:
    settings = folder / "config.json"
    if not settings.is_file():
        return False
    return read_json(settings).get("format") == OUR_FORMAT


# %% book/chapters/09_checkpoints.md, cell 72
def our_config(path: Path) -> ModelConfig:
    raw = read_json(path)
    del raw["format"]
    refuse_unknown(path, raw, [f.name for f in fields(ModelConfig)])
    return make_config(path, raw)


# %% book/chapters/09_checkpoints.md, cell 73
def open_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file: {error}"
        ) from None


# %% book/chapters/09_checkpoints.md, cell 74
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


# %% book/chapters/09_checkpoints.md, cell 75
def quantize_params(params: dict, groups: int = 8) -> dict:
    """Every matrix that Grok-1 quantizes, as `QuantizedTensor`."""
    split = ("linear_1", "multi_head_attention/linear")

    def one(module: str, name: str, w: Any) -> Any:
        if not may_be_quantized(f"{module}/{name}"):
            return w
        return quantize(w, groups if module.endswith(split) else 1)

    return {
        module: {name: one(module, name, w) for name, w in ws.items()}
        for module, ws in params.items()
    }


# %% book/chapters/09_checkpoints.md, cell 76
def find_layout(folder: Path) -> tuple[ModelConfig, Callable, Path]:
    """The configuration, the reader, and the folder it reads."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the one that holds "
            "ckpt-0/ or model.safetensors"
        )
    folder = folder.parent if folder.name == "ckpt-0" else folder
    settings = folder / "config.json"
    if (folder / "ckpt-0").is_dir():
        return grok_config(settings), read_grok, folder / "ckpt-0"
    if is_ours(folder):
        return our_config(settings), read_ours, folder
    raise CheckpointError(
        f"{folder} holds neither ckpt-0/ (Grok-1) nor a config.json of "
        f"format {OUR_FORMAT!r}; other layouts are not supported yet"
    )


# %% book/chapters/09_checkpoints.md, cell 77
def find_tokenizer(
    folder: Path, config: ModelConfig
) -> Tokenizer | None:
    """`tokenizer.model`, if there; its ids must fit the model."""
    path = folder / "tokenizer.model"
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} pieces, but the "
            f"model's vocabulary is {config.vocab_size}"
        )
    return tokenizer


# %% book/chapters/09_checkpoints.md, cell 78
def small_model() -> Path:
    """The folder of the trained model inside this package."""
    return Path(str(files("annotated_moe") / "small"))


# %% book/chapters/09_checkpoints.md, cell 79
def check_mesh(mesh: Mesh | None, stream: bool) -> None:
    axes = getattr(mesh, "axis_names", ())
    if mesh is not None and set(axes) != {"data", "model"}:
        raise ValueError("mesh needs axes data, model: use make_mesh")
    if stream and mesh is not None:
        why = "stream=True runs on one device: leave out the mesh"
        raise ValueError(why)


# %% book/chapters/09_checkpoints.md, cell 80
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
    check_mesh(mesh, stream)
    folder = small_model() if path is None else Path(path)
    config, read, where = find_layout(folder)
    config = replace(config, dtype=dtype)
    params: dict[str, dict] = {}
    for name, w in read(where, config).items():
        module, leaf = name.rsplit("/", 1)
        w = w if stream else place(name, w, mesh, dtype)
        params.setdefault(module, {})[leaf] = w
    beside = where.parent if where.name == "ckpt-0" else where
    kind = StreamedModel if stream else Model
    return kind(config, params, find_tokenizer(beside, config), mesh)
