# Generated from book/chapters/13_scale.md by `make sync`; edit the chapter.
"""The first question anyone asks of Grok-1 is what they need to run it,
and the usual answer arrives after a download of 318 GB. It can come
before. A model's shapes are known, the rules that cut it up are known,
and the compiler will compile for machines that are not there. This
chapter turns a preset and a mesh into bytes a device, exchanges a step,
and a bound on tokens a second; it finds, in a compiled program, a
mistake that made every token cost ten times what it should; and it ends
with `annotated-moe plan`, which answers the question in seconds.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe import checkpoints, sharding
from annotated_moe import model as network
from annotated_moe.attention import KVCache
from annotated_moe.model import PRESETS, ModelConfig, Params
from annotated_moe.quantization import QuantizedTensor

# %% book/chapters/13_scale.md, cell 3
Number = int | float


# %% book/chapters/13_scale.md, cell 6
@dataclass(frozen=True)
class Hardware:
    """What one device can do, by its maker's data sheet.

    Bytes, bytes a second, operations a second; 0 where there is none.
    """

    about: str
    memory: float
    bandwidth: float                        # of that memory
    flops: float                            # bfloat16, dense
    ops8: float                             # int8, dense
    link: float = 0.0                       # to other devices, one way
    disk: float = 0.0                       # sequential reads


# %% book/chapters/13_scale.md, cell 7
HARDWARE = {
    "laptop": Hardware("laptop: 8 Zen 4 cores, DDR5-5600, NVMe",
                       32e9, 89.6e9, 0.97e12, 3.9e12, disk=7.45e9),
    "h100": Hardware("NVIDIA H100 SXM",
                     80e9, 3.35e12, 989e12, 1979e12, 450e9),
    "v5e": Hardware("TPU v5e",
                    16e9, 819e9, 197e12, 393e12, 200e9),
    "v5p": Hardware("TPU v5p",
                    95.0 * 2**30, 2765e9, 459e12, 918e12, 600e9),
    "v6e": Hardware("TPU v6e",
                    32e9, 1638e9, 918e12, 1836e12, 400e9),
}


# %% book/chapters/13_scale.md, cell 11
def abstract(tree: Any) -> Any:
    """Every array of a tree as its shape and dtype."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree
    )


# %% book/chapters/13_scale.md, cell 12
def published(config: ModelConfig, eight_bits: bool = True) -> Params:
    """Shapes of a preset's weights, in 8 bits as Grok-1's are."""
    def made() -> Any:
        params = dict(network.init_params(jax.random.key(0), config))
        if not eight_bits:
            return params
        return checkpoints.quantize_params(params)

    return jax.eval_shape(made)


# %% book/chapters/13_scale.md, cell 13
def rule(path: str) -> P:
    """The partition rule of a parameter, its stack of layers kept."""
    spec = sharding.spec_for(path)
    return P(None, *spec) if path.startswith("decoder_layer") else spec


def as_loaded(path: str, w: Any, mesh: Any, dtype: str) -> Any:
    """The arrays that `checkpoints.place` makes of `w`: shapes only."""
    if isinstance(w, QuantizedTensor):
        # One zero, seen as an array: `fit_groups` wants values.
        zero = np.zeros((), jnp.bfloat16)
        scales = np.broadcast_to(zero, w.scales.shape)
        w = QuantizedTensor(w.weight, scales)
        return abstract(sharding.fit_groups(w, rule(path), mesh))
    kept = path.endswith("/scale") or "/router/" in path
    kept = kept or path.startswith("vision/")
    return jax.ShapeDtypeStruct(w.shape, "float32" if kept else dtype)


# %% book/chapters/13_scale.md, cell 14
def on_mesh(params: Params, mesh: Any, dtype: str) -> Params:
    """`params` as `load` places them: shapes, dtypes, shardings.

    ValueError when the mesh does not divide a weight.
    """
    fitted = {
        module: {
            name: as_loaded(f"{module}/{name}", w, mesh, dtype)
            for name, w in leaves.items()
        }
        for module, leaves in params.items()
    }
    check_divides(fitted, mesh)
    specs = sharding.partition_specs(fitted, mesh)
    return with_shardings(fitted, sharding.shardings(specs, mesh))


# %% book/chapters/13_scale.md, cell 15
def with_shardings(tree: Any, where: Any) -> Any:
    """Shapes and dtypes, told where their arrays would lie."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        tree, where,
    )


# %% book/chapters/13_scale.md, cell 16
def check_divides(params: Params, mesh: Any) -> None:
    """ValueError for a weight that its rule cannot cut on this mesh."""
    for module, leaves in params.items():
        for name, w in leaves.items():
            for axis, size in zip(rule(f"{module}/{name}"), w.shape):
                parts = sharding.axis_size(mesh, axis)
                if size % parts:
                    both = " x ".join(map(str, mesh.shape.values()))
                    raise ValueError(
                        f"a {both} mesh does not divide {module}/{name}"
                        f": {parts} parts of {size}; choose data and"
                        " model so that they divide every matrix"
                    )


# %% book/chapters/13_scale.md, cell 17
def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


# %% book/chapters/13_scale.md, cell 18
IN_8_BITS = ("grok-1",)


# %% book/chapters/13_scale.md, cell 19
def model_named(name: str) -> tuple[ModelConfig, Params]:
    """Configuration and weights' shapes of a preset or checkpoint.

    To compute in bfloat16, as `load` does unless told otherwise.
    """
    if name in PRESETS:
        config = replace(PRESETS[name], dtype="bfloat16")
        return config, published(config, name in IN_8_BITS)
    if not Path(name).exists():
        raise ValueError(
            f"{name!r} is neither a folder nor a preset; presets are"
            f" {', '.join(PRESETS)}"
        )
    config, read, where = checkpoints.find_layout(Path(name))
    params: dict[str, dict[str, Any]] = {}
    for path, w in read(where, config).items():
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = shape_of(w)
    return replace(config, dtype="bfloat16"), params


# %% book/chapters/13_scale.md, cell 20
def shape_of(w: Any) -> Any:
    """A tensor on disk as a shape; float ones are cast when loaded."""
    if not isinstance(w, QuantizedTensor):
        return jax.ShapeDtypeStruct(w.shape, jnp.float32)
    weight = jax.ShapeDtypeStruct(w.weight.shape, jnp.int8)
    scales = jax.ShapeDtypeStruct(w.scales.shape, jnp.bfloat16)
    return QuantizedTensor(weight, scales)


# %% book/chapters/13_scale.md, cell 25
def empty_cache(
    config: ModelConfig, mesh: Mesh, batch: int, context: int
) -> KVCache:
    """The cache of `init_cache`, not made: shapes and shardings.

    Compiles `init_cache` and asks where it would put things.
    """
    make = partial(network.init_cache, config, batch, context)
    with jax.set_mesh(mesh):
        made = network.init_cache.lower(config, batch, context)
        program = made.compile()
        shapes = jax.eval_shape(make)
    return with_shardings(shapes, program.output_shardings)


# %% book/chapters/13_scale.md, cell 26
def busy_experts(config: ModelConfig, batch: int) -> float:
    """How many experts of a layer are asked by `batch` tokens.

    On average, if the router spreads tokens evenly.
    """
    if config.num_experts == 1:
        return 1.0
    skipped = (1 - config.top_k / config.num_experts) ** batch
    return config.num_experts * (1 - skipped)


# %% book/chapters/13_scale.md, cell 27
KINDS = (
    ("experts", r"^decoder_layer/moe/"),
    ("attention", r"^decoder_layer/multi_head_attention/"),
    ("embedding", r"^(in_out_embed|lm_head)/"),
    ("router and norms", r"^(decoder_layer/)?(router/|rms_norm)"),
    ("dense blocks", r"^decoder_layer/(linear|shared)"),
    ("vision", r"^vision/"),
)


def kind_of(path: str) -> str:
    """Which part of the model a parameter belongs to."""
    return next(kind for kind, words in KINDS if re.search(words, path))


# %% book/chapters/13_scale.md, cell 28
def weights_by_kind(params: Params) -> dict[str, float]:
    """Bytes a device holds; the first four kinds, and what else is."""
    sizes = dict.fromkeys([kind for kind, _ in KINDS[:4]], 0.0)
    for module, leaves in params.items():
        for name, w in leaves.items():
            kind = kind_of(f"{module}/{name}")
            sizes[kind] = sizes.get(kind, 0.0) + device_bytes(w)
    return sizes


# %% book/chapters/13_scale.md, cell 29
def unread(params: Params, config: ModelConfig, batch: int) -> float:
    """Bytes of a table of which a step reads no more than its rows."""
    if config.tied:
        return 0.0
    table = device_bytes(params["in_out_embed"]["embeddings"])
    return table * max(0.0, 1 - batch / config.vocab_size)


# %% book/chapters/13_scale.md, cell 30
def cache_bytes(cache: KVCache) -> int:
    """Keys and values, those of layers that look less far included."""
    return device_bytes(replace(cache, length=None))


# %% book/chapters/13_scale.md, cell 31
def step_needs(
    params: Params, cache: KVCache, config: ModelConfig, batch: int
) -> dict[str, float]:
    """Bytes that one device must read to decode one token a row.

    Each weight in use once, and every slot of the cache.
    """
    needs = weights_by_kind(params)
    share = busy_experts(config, batch) / config.num_experts
    needs["experts"] *= share
    needs["embedding"] -= unread(params, config, batch)
    needs.pop("vision", None)                   # for images only
    return {**needs, "cache": float(cache_bytes(cache))}


# %% book/chapters/13_scale.md, cell 32
def step_flops(config: ModelConfig, batch: int, context: int) -> float:
    """Operations of one decode step on all devices together.

    Two for each weight a token is multiplied by, and attention over
    every slot that a layer keeps.
    """
    _, active = checkpoints.parameter_counts(config)
    shapes = checkpoints.expected(config)
    idle = [n for n in shapes if kind_of(n) == "vision"]
    idle += [] if config.tied else ["in_out_embed/embeddings"]
    active -= sum(math.prod(shapes[name]) for name in idle)
    few = min(network.near_slots(config) or context, context)
    slots = sum(few if kind.near else context
                for kind in network.kinds(config))
    heads = config.q_heads * config.head_size
    return batch * (2.0 * active + 4.0 * slots * heads)


# %% book/chapters/13_scale.md, cell 33
UNITS = (
    (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"),
)


def amount(size: Number) -> str:
    """Bytes with three digits: 39.9 GB."""
    unit, name = next((u for u in UNITS if size >= u[0]), UNITS[-1])
    value = size / unit
    digits = max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:.{digits}f} {name}"


# %% book/chapters/13_scale.md, cell 39
class Op(NamedTuple):
    """One line of a compiled program."""

    name: str
    shape: str                              # with layout, as printed
    kind: str
    operands: tuple[str, ...]
    inside: str                             # between the parentheses
    after: str                              # attributes
    root: bool


Program = dict[str, dict[str, Op]]          # computation -> name -> Op


# %% book/chapters/13_scale.md, cell 40
def closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[:60]!r}")


# %% book/chapters/13_scale.md, cell 41
def parse_op(line: str) -> Op | None:
    """`ROOT %name = shape kind(operands), attributes`, or None."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    text = line[head.end():]
    cut = closing(text) + 1 if text[0] == "(" else text.index(" ")
    shape, text = text[:cut], text[cut:].lstrip()
    kind, text = text.split("(", 1)
    end = closing("(" + text) - 1
    inside, after = text[:end], text[end + 1:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    root = head[1] is not None
    return Op(head[2], shape, kind, operands, inside, after, root)


# %% book/chapters/13_scale.md, cell 42
def parse_program(text: str) -> tuple[Program, str]:
    """The computations of `compiled.as_text()`, and which is first."""
    program: Program = {}
    entry, here = "", {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            here = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif op := parse_op(line):
            here[op.name] = op
    if not entry:
        raise ValueError("this is not the text of a compiled program")
    return program, entry


# %% book/chapters/13_scale.md, cell 43
def called(op: Op, role: str = "calls") -> str:
    """The computation that `op` names in that role."""
    found = re.search(rf"\b{role}=%?([\w.\-]+)", op.after)
    if not found:
        raise ValueError(f"{op.name} names no {role}")
    return found[1]


# %% book/chapters/13_scale.md, cell 44
def root_of(ops: dict[str, Op]) -> Op:
    """The line whose value a computation returns."""
    return next(op for op in ops.values() if op.root)


# %% book/chapters/13_scale.md, cell 45
def times_around(program: Program, loop: Op, unknown: Number) -> float:
    """How often a loop runs; `unknown` where the data decides."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.after)
    if told:
        return float(told[1])
    test = program[called(loop, "condition")]
    for name in root_of(test).operands:
        if test[name].kind == "constant":
            return float(test[name].inside)
    return float(unknown)


# %% book/chapters/13_scale.md, cell 46
Line = tuple[float, dict[str, Op], Op]


# %% book/chapters/13_scale.md, cell 47
def lines_run(
    program: Program, start: str, unknown: Number, times: Number = 1.0
) -> Iterator[Line]:
    """(how often, its computation, line) of all that is run.

    Loops and calls are entered, fusions are not; of a conditional
    every branch counts.
    """
    ops = program[start]
    for op in ops.values():
        inner, count = [], times
        if op.kind == "while":
            inner = [called(op, "body")]
            count *= times_around(program, op, unknown)
        elif op.kind == "call":
            inner = [called(op, "to_apply")]
        elif op.kind == "conditional":
            inner = re.findall(r"%([\w.\-]+)", op.after)
            inner = [name for name in inner if name in program]
        for name in inner:
            yield from lines_run(program, name, unknown, count)
        if not inner:
            yield times, ops, op


# %% book/chapters/13_scale.md, cell 48
WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
    "f64": 8,
}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


# %% book/chapters/13_scale.md, cell 49
def array_bytes(kind: str, sizes: str, order: str, tail: str) -> int:
    """Bytes of one array in main memory, its tile's padding included.

    `tail` is what a layout says behind its order: `T(8,128)` pads the
    two minor axes, and `S(1)` is not main memory and counts nothing.
    """
    if re.search(r"S\([1-9]", tail):
        return 0
    shape = integers(sizes)
    tile = re.match(r"T\(([\d,]+)\)", tail)
    if tile and shape:
        minor = zip(reversed(integers(tile[1])), integers(order))
        for size, axis in minor:
            shape[axis] = -(-shape[axis] // size) * size
    return math.prod(shape) * WIDTHS.get(kind, 0)


# %% book/chapters/13_scale.md, cell 50
def value_bytes(shape: str) -> int:
    """Bytes of a printed shape, which may be a tuple of arrays."""
    return sum(array_bytes(*found) for found in ARRAY.findall(shape))


# %% book/chapters/13_scale.md, cell 51
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def bytes_read(program: Program, ops: dict[str, Op], name: str) -> int:
    """How much of `name` the rest of a fused computation reads.

    Slices and gathers read what they return, updates in place none of
    what they update, anything else the whole.
    """
    whole, total = value_bytes(ops[name].shape), 0
    if not whole:
        return 0
    for op in ops.values():
        if name in op.operands:
            total += read_by(program, ops, op, name, whole)
    return min(total, whole)


# %% book/chapters/13_scale.md, cell 52
def read_by(
    program: Program, ops: dict[str, Op], op: Op, name: str, whole: int
) -> int:
    """How much of `name`, of `whole` bytes, this line reads."""
    first = op.operands[0] == name
    if op.kind in SLICES and first:
        return value_bytes(op.shape)
    if op.kind in UPDATES and first:
        return 0
    renamed = op.kind == "bitcast" or "output_to_operand" in op.after
    if renamed:
        return 0 if op.root else bytes_read(program, ops, op.name)
    if op.kind != "fusion":
        return whole
    inner, asked = program[called(op)], 0
    for place in (i for i, o in enumerate(op.operands) if o == name):
        asked += bytes_read(program, inner, argument(inner, place))
    return asked


# %% book/chapters/13_scale.md, cell 53
def argument(ops: dict[str, Op], place: int) -> str:
    """The name of a computation's parameter number `place`."""
    return next(
        op.name for op in ops.values()
        if op.kind == "parameter" and op.inside == str(place)
    )


# %% book/chapters/13_scale.md, cell 54
def bytes_written(program: Program, ops: dict[str, Op], op: Op) -> int:
    """What a fused computation with this root writes."""
    if op.kind == "tuple":
        parts = (ops[name] for name in op.operands)
        return sum(bytes_written(program, ops, part) for part in parts)
    if op.kind == "bitcast":
        return bytes_written(program, ops, ops[op.operands[0]])
    if op.kind == "fusion":
        inner = program[called(op)]
        return bytes_written(program, inner, root_of(inner))
    if op.kind in UPDATES:
        part = ops[op.operands[UPDATES[op.kind]]]
        return min(value_bytes(op.shape), value_bytes(part.shape))
    return value_bytes(op.shape)


# %% book/chapters/13_scale.md, cell 55
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast",
    "after-all", "partition-id", "replica-id", "copy-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done",
}


# %% book/chapters/13_scale.md, cell 56
def line_bytes(program: Program, ops: dict[str, Op], op: Op) -> int:
    """Bytes to and from main memory of one line that is run."""
    if op.kind in FREE:
        return 0
    if op.kind == "fusion":
        return fusion_bytes(program, ops, op)
    whole = [value_bytes(ops[name].shape) for name in op.operands]
    if op.kind in SLICES:
        size = value_bytes(op.shape)
        return size + min(size, whole[0])
    if op.kind in UPDATES:
        return 2 * whole[UPDATES[op.kind]]
    if op.kind.endswith("-start"):
        # (operands, results, ...): what is read is not written again.
        landed = ARRAY.findall(op.shape)[:1]
        return sum(whole) + sum(array_bytes(*a) for a in landed)
    return sum(whole) + value_bytes(op.shape)


# %% book/chapters/13_scale.md, cell 57
def fusion_bytes(
    program: Program, ops: dict[str, Op], op: Op
) -> int:
    """A fusion reads what its lines use and writes its result once."""
    inner, total = program[called(op)], 0
    for place, name in enumerate(op.operands):
        used = bytes_read(program, inner, argument(inner, place))
        total += min(used, value_bytes(ops[name].shape))
    written = bytes_written(program, inner, root_of(inner))
    return total + min(written, value_bytes(op.shape))


# %% book/chapters/13_scale.md, cell 58
def bytes_moved(text: str, unknown: Number = 1.0) -> float:
    """Bytes one device reads and writes in a run of the program.

    `text` is `compiled.as_text()`; `unknown` says how often loops run
    whose end the data decides.
    """
    program, entry = parse_program(text)
    lines = lines_run(program, entry, unknown)
    sizes = (n * line_bytes(program, ops, op) for n, ops, op in lines)
    return float(sum(sizes))


# %% book/chapters/13_scale.md, cell 59
def largest_movers(
    text: str, unknown: Number = 1.0, most: int = 8
) -> list[tuple[float, str, str]]:
    """(bytes, kind, shape) of the lines that move most."""
    program, entry = parse_program(text)
    lines = lines_run(program, entry, unknown)
    found = [(n * line_bytes(program, ops, op), op.kind, op.shape)
             for n, ops, op in lines]
    return sorted(found, reverse=True)[:most]


# %% book/chapters/13_scale.md, cell 62
class Exchange(NamedTuple):
    """A collective, what a device puts in, and how often it is run."""

    kind: str
    devices: int                            # that take part together
    bytes: int                              # a device's operand
    times: float

    @property
    def sent(self) -> float:
        """Bytes a device sends in all of them, around a ring."""
        n = self.devices
        hops = {
            "all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0,
            "reduce-scatter": (n - 1) / n, "all-to-all": (n - 1) / n,
            "collective-permute": 1.0,
        }
        return self.times * self.bytes * hops[self.kind]


# %% book/chapters/13_scale.md, cell 63
def group_size(after: str, devices: int) -> int:
    """How many devices a collective's attributes bring together.

    Groups are printed as lists, as `[2,4]<=[8]`, or as mesh axes.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", after):
        return len(integers(found[1]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", after):
        return int(found[1])
    by_axes = r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}"
    if found := re.search(by_axes, after):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"\w+", found[2])
        return math.prod(int(sizes[axis]) for axis in axes)
    return devices


# %% book/chapters/13_scale.md, cell 64
EXCHANGES = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(-start)?$"
)


def exchanges(
    text: str, devices: int, unknown: Number = 1.0
) -> Iterator[Exchange]:
    """The collectives of a compiled program, fused ones included."""
    program, entry = parse_program(text)
    for times, ops, op in lines_run(program, entry, unknown):
        lines = [(ops, op)]
        if op.kind == "fusion":
            inner = program[called(op)]
            lines = [(inner, line) for line in inner.values()]
        for around, line in lines:
            found = EXCHANGES.match(line.kind)
            if found:
                shapes = [around[name].shape for name in line.operands]
                size = sum(map(plain_bytes, shapes))
                n = group_size(line.after, devices)
                yield Exchange(found[1], n, size, times)


# %% book/chapters/13_scale.md, cell 65
def plain_bytes(shape: str) -> int:
    """Bytes of a printed shape wherever it lies, without padding."""
    return sum(
        math.prod(integers(sizes)) * WIDTHS.get(kind, 0)
        for kind, sizes, _, _ in ARRAY.findall(shape)
    )


# %% book/chapters/13_scale.md, cell 66
def compile_decode(
    config: ModelConfig, params: Params, cache: KVCache, mesh: Mesh
) -> Any:
    """One decode step, compiled for the mesh and not run."""
    rows = cache.length.shape
    whole = NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        job = network.decode_step.lower(params, tokens, cache, config)
        return job.compile()


# %% book/chapters/13_scale.md, cell 67
def grid(devices: Any, data: int, model: int) -> Mesh:
    """`sharding.make_mesh` for devices that JAX does not list."""
    if data * model != len(devices):
        raise ValueError(
            f"a {data} x {model} mesh has {data * model} devices, and"
            f" there are {len(devices)}"
        )
    auto = (AxisType.Auto, AxisType.Auto)
    array = np.array(devices).reshape(data, model)
    return Mesh(array, ("data", "model"), axis_types=auto)


# %% book/chapters/13_scale.md, cell 68
def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice that is not there: "v5p:2x2x2".

    ValueError without the extra `tpu`, or for no such slice.
    """
    kind = topology.split(":")[0]
    if kind not in ("v5e", "v5p", "v6e") or ":" not in topology:
        raise ValueError(
            f"no topology {topology!r}: write v5p:2x2x2, v5e:4x8 or"
            " v6e:4x4"
        )
    if find_spec("libtpu") is None:
        raise ValueError(
            f"{topology} needs the TPU compiler:"
            ' pip install "annotated-moe[tpu]"'
        )
    return describe(topology)


# %% book/chapters/13_scale.md, cell 69
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",              # ask no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # nor guess what is here
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}


# %% book/chapters/13_scale.md, cell 70
def describe(topology: str) -> list[Any]:
    """Ask libtpu for a slice's devices, without its messages."""
    from jax.experimental import topologies

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
    except Exception as error:
        raise ValueError(
            f"the TPU compiler knows no slice {topology!r}"
        ) from error
    return list(found.devices)


# %% book/chapters/13_scale.md, cell 74
@dataclass(frozen=True)
class Plan:
    """What running a model would take; bytes and seconds a device."""

    model: str
    hardware: str
    mesh: tuple[int, int]                   # data, model
    batch: int
    context: int
    parameters: int
    active: int                             # for one token
    weights: int
    cache: int
    temporaries: int
    compiler: str                           # "CPU" or a TPU slice
    arguments: int                          # as that compiler counts
    needs: dict[str, float]                 # read in a step, by kind
    flops: float
    exchanges: list[list[Any]]              # kind, times, bytes sent
    moved: float | None = None              # by the TPU's program
    compile_seconds: float = 0.0
    unread: float = 0.0                     # of weights, in any step


# %% book/chapters/13_scale.md, cell 75
def knows(plan: Plan) -> bool:
    """Whether it was compiled for its hardware: a CPU, or a slice."""
    return plan.compiler != "CPU" or not HARDWARE[plan.hardware].link


def held(plan: Plan) -> int:
    """Bytes that one device must have room for.

    Another machine's temporaries are not counted.
    """
    both = plan.weights + plan.cache
    return both + plan.temporaries if knows(plan) else both


# %% book/chapters/13_scale.md, cell 76
def fits(plan: Plan) -> bool:
    """Whether a device's memory holds all of it."""
    return held(plan) <= HARDWARE[plan.hardware].memory


# %% book/chapters/13_scale.md, cell 77
def disk_bytes(plan: Plan) -> float:
    """Bytes a step must read from disk, memory being kept full.

    What every token uses is kept first, then as many experts as fit.
    """
    if fits(plan):
        return 0.0
    experts = plan.needs["experts"]
    always = sum(plan.needs.values()) - plan.needs["cache"] - experts
    spare = HARDWARE[plan.hardware].memory - always
    spare -= plan.cache + plan.temporaries
    if spare < 0:
        return experts - spare
    idle = plan.weights - always - plan.unread
    return experts * max(0.0, 1 - spare / idle)


# %% book/chapters/13_scale.md, cell 78
def step_seconds(plan: Plan) -> dict[str, float]:
    """The least time of one step, by what it would wait for."""
    machine = HARDWARE[plan.hardware]
    sent = sum(size for _, _, size in plan.exchanges)
    work = {
        "memory": (sum(plan.needs.values()), machine.bandwidth),
        "arithmetic": (plan.flops, machine.flops),
        "link": (sent, machine.link),
        "disk": (disk_bytes(plan), machine.disk),
    }
    return {
        name: amount / rate if rate else math.inf
        for name, (amount, rate) in work.items() if amount
    }


# %% book/chapters/13_scale.md, cell 79
def bound(plan: Plan) -> tuple[str, float]:
    """What binds, and the most tokens a second, all rows together.

    No more than 0 where it does not fit and there is no disk.
    """
    seconds = step_seconds(plan)
    name = max(seconds, key=lambda key: seconds[key])
    return name, plan.batch / seconds[name]


# %% book/chapters/13_scale.md, cell 80
def make_plan(
    name: str, config: ModelConfig, params: Params, mesh: Mesh,
    hardware: str, batch: int, context: int, compiler: str = "CPU",
) -> Plan:
    """Compile one decode step for `mesh`, and add it all up."""
    params = on_mesh(params, mesh, config.dtype)
    cache = empty_cache(config, mesh, batch, context)
    begun = time.perf_counter()
    program = compile_decode(config, params, cache, mesh)
    spent = time.perf_counter() - begun
    total, active = checkpoints.parameter_counts(config)
    return Plan(
        name, hardware, tuple(mesh.shape.values()), batch, context,
        total, active, device_bytes(params),
        cache_bytes(cache),
        needs=step_needs(params, cache, config, batch),
        flops=step_flops(config, batch, context) / mesh.size,
        **read_program(program, config, batch, mesh.size, compiler),
        compile_seconds=spent,
        unread=unread(params, config, batch),
    )


# %% book/chapters/13_scale.md, cell 81
def read_program(
    program: Any, config: ModelConfig, batch: int, devices: int,
    compiler: str,
) -> dict[str, Any]:
    """The fields of a plan that only a compiler knows."""
    text, memory = program.as_text(), program.memory_analysis()
    unknown = busy_experts(config, batch)
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    fields = {
        "compiler": compiler,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes + fresh,
        "exchanges": add_up(exchanges(text, devices, unknown)),
    }
    if compiler != "CPU":
        fields["moved"] = bytes_moved(text, unknown)
    return fields


# %% book/chapters/13_scale.md, cell 82
def add_up(found: Iterator[Exchange]) -> list[list[Any]]:
    """[kind, how often, bytes sent] for each kind of exchange."""
    kinds: dict[str, list[Exchange]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    return [
        [kind, round(sum(e.times for e in group)),
         sum(e.sent for e in group)]
        for kind, group in kinds.items()
    ]


# %% book/chapters/13_scale.md, cell 83
def usual_mesh(devices: int, config: ModelConfig) -> tuple[int, int]:
    """(data, model): a key head for each model shard at most."""
    model = math.gcd(devices, config.kv_heads)
    return devices // model, model


# %% book/chapters/13_scale.md, cell 84
def fewest_devices(
    config: ModelConfig, params: Params, hardware: str, batch: int,
    context: int,
) -> int:
    """The smallest power of two of devices that hold the model.

    With 5 % of memory to spare. 1 for a machine without links.
    """
    machine = HARDWARE[hardware]
    for n in [1, 2, 4, 8, 16, 32, MOST_DEVICES]:
        mesh = grid(jax.devices()[:n], *usual_mesh(n, config))
        cache = empty_cache(config, mesh, batch, context)
        weights = on_mesh(params, mesh, config.dtype)
        size = device_bytes((weights, cache))
        if size <= 0.95 * machine.memory or not machine.link:
            return n
    raise ValueError(
        f"{MOST_DEVICES} devices of {hardware} do not hold it; say how"
        " many with --devices or --mesh"
    )


# %% book/chapters/13_scale.md, cell 85
def recorded(topology: str) -> Plan:
    """Grok-1's plan for a slice, as `plan --json` once wrote it.

    ValueError for a slice of which there is no record.
    """
    name = topology.replace(":", "-") + ".json"
    file = files("annotated_moe") / "plans" / name
    if not file.is_file():
        raise ValueError(f"no plan for {topology} was recorded")
    fields = json.loads(file.read_text())
    data, model = fields.pop("mesh")
    return Plan(**fields, mesh=(data, model))


# %% book/chapters/13_scale.md, cell 91
MOST_DEVICES = 64


# %% book/chapters/13_scale.md, cell 92
def simulate(devices: int) -> None:
    """Let this process have so many devices, none of them real."""
    if not 1 <= devices <= 512:
        raise ValueError(f"--devices must be 1 to 512, not {devices}")
    jax.config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):
        # Only before a device is first used.
        count = max(devices, MOST_DEVICES)
        jax.config.update("jax_num_cpu_devices", count)


# %% book/chapters/13_scale.md, cell 93
def mesh_sizes(text: str) -> tuple[int, int]:
    """"2x4" as (2, 4)."""
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise ValueError(
            f"--mesh must be DATAxMODEL such as 1x8, not {text!r}"
        )
    return int(found[1]), int(found[2])


# %% book/chapters/13_scale.md, cell 94
def check_job(args: argparse.Namespace, config: ModelConfig) -> int:
    """The context to plan for; ValueError if the job makes no sense."""
    context = config.context if args.context is None else args.context
    if args.batch < 1:
        raise ValueError(f"--batch must be 1 or more, not {args.batch}")
    if not 1 <= context <= config.context:
        raise ValueError(
            f"--context must be 1 to {config.context}, not {context}"
        )
    ways = [args.mesh, args.devices]
    if None not in ways:
        raise ValueError("--mesh and --devices say the same: give one")
    return context


# %% book/chapters/13_scale.md, cell 95
def hardware_of(args: argparse.Namespace) -> str:
    """The hardware asked for; a topology's own when it names one."""
    slices = args.topology and args.topology.split(":")[0]
    if slices and args.hardware not in (None, slices):
        raise ValueError(
            f"--topology {args.topology} is no {args.hardware}:"
            " leave --hardware out"
        )
    return slices or args.hardware or "h100"


# %% book/chapters/13_scale.md, cell 96
def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    config, params = model_named(args.model)
    context = check_job(args, config)
    sizes = mesh_sizes(args.mesh) if args.mesh else None
    wanted = math.prod(sizes) if sizes else args.devices
    simulate(1 if wanted is None else wanted)
    hardware = hardware_of(args)
    job = hardware, args.batch, context
    if args.topology:
        devices = tpu_devices(args.topology)
        wanted = wanted or len(devices)
    else:
        wanted = wanted or fewest_devices(config, params, *job)
        devices = jax.devices()[:wanted]
    mesh = grid(devices, *(sizes or usual_mesh(wanted, config)))
    compiler = args.topology or "CPU"
    return make_plan(args.model, config, params, mesh, *job, compiler)


# %% book/chapters/13_scale.md, cell 97
def memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a device holds, and whether it has room."""
    have = amount(HARDWARE[plan.hardware].memory)
    answer = "fits" if fits(plan) else "does not fit"
    extra = f"{amount(plan.temporaries)} as compiled for "
    extra += plan.compiler + ("" if knows(plan) else ", not counted")
    return [
        ("weights", amount(plan.weights)),
        ("cache", amount(plan.cache)),
        ("temporaries", extra),
        ("together", f"{amount(held(plan))} of {have}: {answer}"),
    ]


# %% book/chapters/13_scale.md, cell 98
def step_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a device does in one step."""
    total = sum(plan.needs.values())
    needs = {kind: n for kind, n in plan.needs.items() if n}
    parts = [f"{kind} {amount(n)}" for kind, n in needs.items()]
    pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    rows = [("must read", amount(total))]
    rows += [("", ", ".join(pair)) for pair in pairs]
    if plan.moved is not None:
        ratio = f"{plan.moved / total:.2f} times that"
        rows.append(("moves", f"{amount(plan.moved)}, {ratio}"))
    rows.append(("computes", f"{plan.flops / 1e9:,.1f} GFLOP"))
    for kind, times, sent in plan.exchanges:
        rows.append(("sends", f"{amount(sent)} in {times} {kind}"))
    if size := disk_bytes(plan):
        rows.append(("from disk", f"{amount(size)} at least"))
    return rows


# %% book/chapters/13_scale.md, cell 99
def bound_rows(plan: Plan) -> list[tuple[str, str]]:
    """How long a step takes at least, and what it waits for."""
    seconds = step_seconds(plan)
    rows = [(name, "never: there is none") if math.isinf(spent)
            else (name, f"{1e3 * spent:,.3f} ms")
            for name, spent in seconds.items()]
    name, speed = bound(plan)
    if not speed:
        return [*rows, ("at most", "nothing: it does not fit")]
    rate = f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}"
    return [*rows, ("at most", f"{rate} tokens a second; {name} binds")]


# %% book/chapters/13_scale.md, cell 100
def count(number: int) -> str:
    """A number of weights in words: 315.7 billion."""
    if number < 1e9:
        return f"{number / 1e6:,.1f} million"
    return f"{number / 1e9:,.1f} billion"


def table(plan: Plan) -> str:
    """A plan for people, 72 columns wide but for a long path."""
    data, model = plan.mesh
    about = HARDWARE[plan.hardware].about
    whole, active = count(plan.parameters), count(plan.active)
    parts = [
        (f"{plan.model} on {data * model} x {about}", [
            ("mesh", f"{data} x {model} (data x model)"),
            ("rows", f"{plan.batch}, {plan.context:,} tokens each"),
            ("parameters", f"{whole}, {active} for a token")]),
        ("A device holds", memory_rows(plan)),
        ("A device, to decode one token a row", step_rows(plan)),
        ("A step takes at least", bound_rows(plan)),
    ]
    return "\n".join(
        "\n".join([title, *(f"  {a:13}{b}" for a, b in rows)])
        for title, rows in parts
    )


# %% book/chapters/13_scale.md, cell 101
def run_plan(args: argparse.Namespace) -> None:
    """Print a plan as a table, or as JSON."""
    plan = plan_of(args)
    text = json.dumps(asdict(plan), indent=1)
    print(text if args.json else table(plan))


# %% book/chapters/13_scale.md, cell 102
def add_plan(commands: Any) -> None:
    """The subcommand `plan` of the command line."""
    text = "say what running a model takes, before any download"
    sub = commands.add_parser("plan", help=text, description=text)
    sub.set_defaults(run=run_plan)
    add, number = sub.add_argument, {"type": int}
    add("model", help=f"{' or '.join(PRESETS)}, or a checkpoint folder")
    add("--hardware", choices=list(HARDWARE), help="[h100]")
    add("--devices", **number, help="how many [the fewest that fit]")
    add("--mesh", help="devices as DATAxMODEL, such as 1x8")
    add("--topology", help="a TPU slice, v5p:2x2x2: ask its compiler")
    add("--batch", **number, default=1, help="rows at once [1]")
    add("--context", **number, help="tokens a row [the model's]")
    add("--json", action="store_true", help="for programs")
