# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""Load real checkpoints without running a byte of them.
"""

# %% book/chapters/09_checkpoints.md, cell 1
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from annotated_moe import sharding
from annotated_moe.model import PRESETS, Model, ModelConfig, init_params
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.tokenizer import Tokenizer


# %% book/chapters/09_checkpoints.md, cell 2
class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe, incomplete or not supported."""


# %% book/chapters/09_checkpoints.md, cell 3
@dataclass
class Node:
    """A pickled object, described and never made."""

    kind: str                                               # a dotted global name
    args: tuple = ()
    state: Any = None


# %% book/chapters/09_checkpoints.md, cell 4
MARK = object()


# %% book/chapters/09_checkpoints.md, cell 5
ARRAY = "numpy.core.multiarray._reconstruct"


# %% book/chapters/09_checkpoints.md, cell 6
DTYPE = "numpy.dtype"


# %% book/chapters/09_checkpoints.md, cell 7
QUANTIZED = "__main__.QuantizedWeight8bit"


# %% book/chapters/09_checkpoints.md, cell 8
ALLOWED = {
    ARRAY: ARRAY,
    "numpy._core.multiarray._reconstruct": ARRAY,
    "numpy.ndarray": "numpy.ndarray",
    DTYPE: DTYPE,
    "ml_dtypes.bfloat16": "ml_dtypes.bfloat16",
    QUANTIZED: QUANTIZED,
}


# %% book/chapters/09_checkpoints.md, cell 9
class Parser:
    """A pickle machine that knows the two dozen opcodes an array needs."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"ends early: byte {self.at} announces {size} bytes, {len(self.data) - self.at} are left"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, width: int) -> str:
        return str(self.take(self.number(width)), "utf-8")

    def pop(self) -> Any:
        if not self.stack:
            raise CheckpointError(f"is malformed: empty stack at byte {self.at}")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise CheckpointError(f"is malformed: no mark before byte {self.at}")

    def named(self) -> Node:
        name, module = self.pop(), self.pop()
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise CheckpointError(f"names {full}, which no tensor needs: refused, nothing was run")
        return Node(ALLOWED[full])

    def call(self, new: bool) -> Node:
        args, function = self.pop(), self.pop()
        callable_ = (QUANTIZED,) if new else (ARRAY, DTYPE)
        if not isinstance(function, Node) or function.kind not in callable_ or function.args:
            raise CheckpointError(f"calls something that is not an array at byte {self.at}: refused, nothing was run")
        return Node(function.kind, ("called", *args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1] if self.stack else None
        if not isinstance(target, Node) or not target.args or target.state is not None:
            raise CheckpointError(f"is malformed: nothing to build at byte {self.at}")
        target.state = state

    def set_items(self) -> None:
        items = self.since_mark()
        if not self.stack or not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise CheckpointError(f"is malformed: no dict before byte {self.at}")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    def get(self, index: int) -> Any:
        if index >= len(self.memo):
            raise CheckpointError(f"is malformed: memo {index} does not exist at byte {self.at}")
        return self.memo[index]


# %% book/chapters/09_checkpoints.md, cell 10
def tuple_of(n):
    return lambda p: tuple(reversed([p.pop() for _ in range(n)]))


# %% book/chapters/09_checkpoints.md, cell 11
PUSH: dict[int, Callable[[Parser], Any]] = {
    ord("N"): lambda p: None,
    0x88: lambda p: True,
    0x89: lambda p: False,
    ord("K"): lambda p: p.number(1),
    ord("M"): lambda p: p.number(2),
    ord("J"): lambda p: p.number(4, signed=True),
    0x8A: lambda p: p.number(p.number(1), signed=True),
    0x8C: lambda p: p.text(1),
    ord("X"): lambda p: p.text(4),
    ord("C"): lambda p: p.take(p.number(1)),
    ord("B"): lambda p: p.take(p.number(4)),
    0x8E: lambda p: p.take(p.number(8)),
    ord(")"): lambda p: (),
    0x85: tuple_of(1),
    0x86: tuple_of(2),
    0x87: tuple_of(3),
    ord("t"): lambda p: tuple(p.since_mark()),
    ord("}"): lambda p: {},
    ord("("): lambda p: MARK,
    ord("h"): lambda p: p.get(p.number(1)),
    ord("j"): lambda p: p.get(p.number(4)),
    0x93: lambda p: p.named(),
    ord("R"): lambda p: p.call(new=False),
    0x81: lambda p: p.call(new=True),
}


# %% book/chapters/09_checkpoints.md, cell 12
DO: dict[int, Callable[[Parser], Any]] = {
    0x80: lambda p: p.take(1),
    0x95: lambda p: p.take(8),
    0x94: lambda p: p.memo.append(p.stack[-1] if p.stack else None),
    ord("b"): Parser.build,
    ord("u"): Parser.set_items,
}


# %% book/chapters/09_checkpoints.md, cell 13
def parse(data: memoryview) -> Any:
    """What a pickle describes, as Nodes; only arrays and their parts are let through."""
    p = Parser(data)
    while (code := p.number(1)) != ord("."):
        if code in PUSH:
            p.stack.append(PUSH[code](p))
        elif code in DO:
            DO[code](p)
        else:
            raise CheckpointError(f"uses pickle opcode {code:#04x} at byte {p.at - 1}, which no tensor needs: refused, nothing was run")
    if len(p.stack) != 1 or p.at != len(data):
        raise CheckpointError("is malformed: bytes are left over at its end")
    return p.stack[0]


# %% book/chapters/09_checkpoints.md, cell 14
DTYPES = {"f4": np.dtype("<f4"), "i1": np.dtype("i1"), "ml_dtypes.bfloat16": np.dtype(ml_dtypes.bfloat16)}


# %% book/chapters/09_checkpoints.md, cell 15
def as_dtype(node):
    code = node.args[1] if isinstance(node, Node) and node.kind == DTYPE and len(node.args) > 1 else None
    name = code.kind if isinstance(code, Node) else code
    order = node.state[1] if node and isinstance(node.state, tuple) and len(node.state) > 1 else None
    if name not in DTYPES or order not in ("<", "|"):
        raise CheckpointError(f"holds dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


# %% book/chapters/09_checkpoints.md, cell 16
def as_array(node) -> np.ndarray:
    state = node.state if isinstance(node, Node) and node.kind == ARRAY else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise CheckpointError("does not hold an array")
    _, shape, dtype, fortran, raw = state
    dtype = as_dtype(dtype)
    good = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not good or not isinstance(raw, memoryview) or fortran:
        raise CheckpointError(f"holds an array of shape {shape} that is not plain C order")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise CheckpointError(f"announces shape {shape} of {dtype}, but holds {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)


# %% book/chapters/09_checkpoints.md, cell 17
def as_tensor(node):
    if isinstance(node, Node) and node.kind == QUANTIZED:
        state = node.state
        if not isinstance(state, dict) or set(state) != {"weight", "scales"}:
            raise CheckpointError("is a QuantizedWeight8bit without `weight` and `scales`")
        weight, scales = as_array(state["weight"]), as_array(state["scales"])
        return QuantizedTensor(weight, scales)
    return as_array(node)


# %% book/chapters/09_checkpoints.md, cell 18
def read_pickled(path: Path):
    """One tensor of a Grok-1 checkpoint, mapped from disk: nothing is copied or run."""
    try:
        return as_tensor(parse(memoryview(np.memmap(path, np.uint8, "r"))))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except (ValueError, TypeError, UnicodeDecodeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a pickled tensor: {error}") from None


# %% book/chapters/09_checkpoints.md, cell 19
IGNORED = {"shard_activations", "data_axis", "model_axis", "embedding_init_scale"}


# %% book/chapters/09_checkpoints.md, cell 20
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


# %% book/chapters/09_checkpoints.md, cell 21
def ffn_size(d_model, widening):
    """Two thirds of the widened size, rounded up to a multiple of 8."""
    return -(-(int(widening * d_model) * 2 // 3) // 8) * 8


# %% book/chapters/09_checkpoints.md, cell 22
def read_json(path):
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return content


# %% book/chapters/09_checkpoints.md, cell 23
def grok_config(path):
    """The release's config.json, with its own field names, or Grok-1 itself."""
    if not path.exists():
        return PRESETS["grok-1"]
    raw = read_json(path)
    flat = {**raw, **raw.get("model", {})}
    flat = {k: v for k, v in flat.items() if k != "model" and k[0] != "_" and k not in IGNORED}
    widening = flat.pop("widening_factor", 8)
    values = {}
    for name, value in flat.items():
        if name not in GROK_NAMES:
            raise CheckpointError(f"{path} has a field {name!r} that is not supported; remove it if it changes nothing")
        values[GROK_NAMES[name]] = value
    config = make_config(path, values)
    return replace(config, d_ff=ffn_size(config.d_model, widening))


# %% book/chapters/09_checkpoints.md, cell 24
def make_config(path, values):
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


# %% book/chapters/09_checkpoints.md, cell 25
def expected(config):
    """path -> shape of every parameter, layers stacked; nothing is allocated."""
    tree = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    return {f"{m}/{n}": w.shape for m, leaves in tree.items() for n, w in leaves.items()}


# %% book/chapters/09_checkpoints.md, cell 26
def grok_paths(config):
    """Every file's parameter path, in the order in which the release numbers them."""
    paths = []
    for path in expected(config):
        if path.startswith("decoder_layer/"):
            rest = path.removeprefix("decoder_layer/")
            paths += [f"transformer/decoder_layer_{i}/{rest}" for i in range(config.num_layers)]
        else:
            paths.append(f"language_model/{path}")
    return sorted(paths)


# %% book/chapters/09_checkpoints.md, cell 27
def check_shape(where, path, w, shape):
    if tuple(w.shape) != tuple(shape):
        raise CheckpointError(f"{where} holds {path} of shape {tuple(w.shape)}; expected {tuple(shape)}")
    if isinstance(w, QuantizedTensor):
        lead, groups, out = w.scales.shape[:-2], *w.scales.shape[-2:]
        good = lead == w.shape[:-2] and out == w.shape[-1] and groups and w.shape[-2] % groups == 0
        if w.weight.dtype != np.int8 or not good:
            raise CheckpointError(f"{where} holds scales of shape {w.scales.shape} that do not fit {path} of shape {w.shape}")


# %% book/chapters/09_checkpoints.md, cell 28
def read_grok(folder, config):
    """path -> tensor, the layers of one path stacked but not copied."""
    names = grok_paths(config)
    files = {i: folder / f"tensor{i:05d}_000" for i in range(len(names))}
    present = {f.name for f in folder.iterdir() if f.name.startswith("tensor")}
    missing = [f"{f.name} ({names[i]})" for i, f in files.items() if f.name not in present]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more files")
    extra = sorted(present - {f.name for f in files.values()})
    if extra:
        raise CheckpointError(f"{folder} holds {extra[0]}, which this configuration of {config.num_layers} layers has no place for")
    shapes = expected(config)
    tensors: dict[str, Any] = {}
    for i, name in enumerate(names):
        path, layer = split_name(name)
        w = read_pickled(files[i])
        check_shape(files[i], name, w, shapes[path][layer is not None :])
        if layer is None:
            tensors[path] = w
        else:
            tensors.setdefault(path, {})[layer] = w
    return {p: stack(w, names) if isinstance(w, dict) else w for p, w in tensors.items()}


# %% book/chapters/09_checkpoints.md, cell 29
def split_name(name):
    """transformer/decoder_layer_3/router/w -> (decoder_layer/router/w, 3)."""
    module, rest = name.split("/", 1)
    if module == "language_model":
        return rest, None
    layer, rest = rest.split("/", 1)
    return f"decoder_layer/{rest}", int(layer.removeprefix("decoder_layer_"))


# %% book/chapters/09_checkpoints.md, cell 30
@dataclass(frozen=True)
class Stack:
    """Arrays of equal shape behind one another, copied only where they are indexed."""

    parts: list

    @property
    def shape(self):
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self):
        return self.parts[0].dtype

    def __getitem__(self, index):
        layers = range(len(self.parts))[index[0]]
        return np.stack([self.parts[i][index[1:]] for i in layers])


# %% book/chapters/09_checkpoints.md, cell 31
def stack(layers, names):
    parts = [layers[i] for i in range(len(layers))]
    quantized = [isinstance(w, QuantizedTensor) for w in parts]
    if not any(quantized):
        return Stack(parts)
    if not all(quantized) or len({w.scales.shape for w in parts}) > 1:
        raise CheckpointError("layers disagree on how they are quantized")
    return QuantizedTensor(Stack([w.weight for w in parts]), np.stack([w.scales for w in parts]))


# %% book/chapters/09_checkpoints.md, cell 32
def on_devices(source, spec, mesh, dtype):
    """One array of which every device reads only the part that it keeps."""
    if mesh is None:
        return jnp.asarray(source[(slice(None),) * len(source.shape)], dtype)
    where = jax.sharding.NamedSharding(mesh, sharding.fit_spec(spec, source.shape, mesh))
    def piece(index):
        return np.asarray(source[index], dtype)
    return jax.make_array_from_callback(source.shape, where, piece)


# %% book/chapters/09_checkpoints.md, cell 33
def place(path, w, mesh, dtype):
    """A parameter, read onto its devices in the dtype that the model computes with."""
    spec = sharding.spec_for(path)
    if path.startswith("decoder_layer/"):
        spec = P(None, *spec)
    if isinstance(w, QuantizedTensor):
        scales = w.scales if mesh is None else sharding.fit_groups(w, spec, mesh).scales
        spec = P(*spec, *(None,) * (len(w.shape) - len(spec)))
        specs = spec if mesh is None else sharding.weight_spec(spec, QuantizedTensor(w.weight, scales), mesh)
        if mesh is None:
            return QuantizedTensor(on_devices(w.weight, None, None, np.int8), on_devices(scales, None, None, jnp.bfloat16))
        return QuantizedTensor(on_devices(w.weight, specs.weight, mesh, np.int8), on_devices(np.asarray(scales), specs.scales, mesh, jnp.bfloat16))
    kept = path.endswith("/scale") or "router" in path
    return on_devices(w, spec, mesh, jnp.float32 if kept else dtype)


# %% book/chapters/09_checkpoints.md, cell 34
OUR_FORMAT = "annotated-moe"


# %% book/chapters/09_checkpoints.md, cell 35
def read_ours(folder, config):
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    tensors = {}
    for name, shape in expected(config).items():
        if f"{name}.weight" in arrays and f"{name}.scales" in arrays:
            tensors[name] = QuantizedTensor(arrays.pop(f"{name}.weight"), arrays.pop(f"{name}.scales"))
        elif name in arrays:
            tensors[name] = arrays.pop(name)
        else:
            raise CheckpointError(f"{path} lacks {name}")
        check_shape(path, name, tensors[name], shape)
    if arrays:
        raise CheckpointError(f"{path} holds {sorted(arrays)[0]}, which its configuration has no place for")
    return tensors


# %% book/chapters/09_checkpoints.md, cell 36
def our_config(path):
    raw = read_json(path)
    known = {f.name for f in fields(ModelConfig)}
    unknown = sorted(set(raw) - known - {"format"})
    if unknown:
        raise CheckpointError(f"{path} has a field {unknown[0]!r} that is not supported")
    return make_config(path, {k: v for k, v in raw.items() if k != "format"})


# %% book/chapters/09_checkpoints.md, cell 37
def find_tokenizer(folder, config):
    path = folder / "tokenizer.model"
    if not path.exists():
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{path} has {tokenizer.vocab_size} pieces, the model only {config.vocab_size}")
    return tokenizer


# %% book/chapters/09_checkpoints.md, cell 38
def load(path=None, mesh=None, dtype="bfloat16"):
    """A model from a checkpoint; without a path, the small one in this package."""
    folder = Path(path) if path is not None else Path(str(files("annotated_moe") / "small"))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the folder that holds ckpt-0/ or model.safetensors")
    if folder.name == "ckpt-0":
        folder = folder.parent
    settings = folder / "config.json"
    if (folder / "ckpt-0").is_dir():
        config, read, where = grok_config(settings), read_grok, folder / "ckpt-0"
    elif settings.exists() and read_json(settings).get("format") == OUR_FORMAT:
        config, read, where = our_config(settings), read_ours, folder
    else:
        raise CheckpointError(f"{folder} holds neither ckpt-0/ (Grok-1) nor a config.json of format {OUR_FORMAT!r}; other layouts are not supported")
    config = replace(config, dtype=dtype)
    params = {}
    for name, w in read(where, config).items():
        module, leaf = name.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = place(name, w, mesh, dtype)
    return Model(config, params, find_tokenizer(folder, config), mesh)


# %% book/chapters/09_checkpoints.md, cell 39
def quantize_params(params, groups=8):
    """Quantize as the release does: the matrices of attention and experts."""
    split = ("linear_1", "multi_head_attention/linear")
    def one(module, name, w):
        if name != "w" or "router" in module:
            return w
        return quantize(w, groups if module.endswith(split) else 1)
    return {m: {n: one(m, n, w) for n, w in leaves.items()} for m, leaves in params.items()}


# %% book/chapters/09_checkpoints.md, cell 40
def flat_arrays(params):
    """Haiku's two-level dict as `module/name` -> array; scales get names of their own."""
    flat = {}
    for module, leaves in params.items():
        for name, w in leaves.items():
            if isinstance(w, QuantizedTensor):
                flat[f"{module}/{name}.weight"] = np.asarray(w.weight)
                flat[f"{module}/{name}.scales"] = np.asarray(w.scales)
            else:
                flat[f"{module}/{name}"] = np.asarray(w)
    return flat


# %% book/chapters/09_checkpoints.md, cell 41
def save(model, path):
    """Write `model` in our own layout: all of it or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    try:
        save_file(flat_arrays(model.params), new / "model.safetensors")
        settings = {"format": OUR_FORMAT, **asdict(model.config)}
        (new / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save(new / "tokenizer.model")
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
