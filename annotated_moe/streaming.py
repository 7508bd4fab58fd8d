# Generated from book/chapters/11_streaming.md, book/chapters/17b_pictures.md by `make sync`; edit the chapters.
"""Grok-1's files fill 318 GB, and a large laptop has 24 GB of memory.
But a token uses two experts of eight, uses each of their weights once,
and is done with it before the next layer begins. So the weights may
stay on disk. This chapter runs the model from its files, a layer at a
time, reading only what the router asks for. By its end you will have
`load(path, stream=True)`, a product that multiplies bytes where the
file left them, and the proof that the streamed model says what the
resident one says.
"""

import functools
import itertools
import mmap
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import (
    Array,
    Bool,
    Float,
    Float32,
    Int,
    Int8,
    Int32,
    Shaped,
    UInt,
)
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from tqdm import tqdm

from annotated_moe.cache import KVCache
from annotated_moe.checkpoints import Opened
from annotated_moe.checkpoints import place as place_weight
from annotated_moe.config import (
    LayerSpec,
    ModelConfig,
    Place,
    all_places,
    place_of,
)
from annotated_moe.families.vision import SeeingConfig, SeeingModel
from annotated_moe.generate import Model
from annotated_moe.linear import PRODUCTS
from annotated_moe.model import (
    Cache,
    DecoderLayer,
    Params,
    check_room,
    constrain_residual,
    embed,
    head_table,
    param_specs,
    place_params,
    positions_of,
    tied_logits,
    unembed,
)
from annotated_moe.moe import Experts, Route
from annotated_moe.placement import here
from annotated_moe.quantization import QuantizedTensor, tile_rows
from annotated_moe.rms_norm import rms_norm


# %% book/chapters/11_streaming.md, cell 7
def to_digits(
    x: Float[Array, "N D"],
) -> tuple[Int8[Array, "3 N D"], Float32[Array, "N 1"]]:
    """x = step * (254**2 * d[0] + 254 * d[1] + d[2]), nearly.

    `step` is a vector's largest magnitude / (127 * 254**2); no element
    is off by more than 2 steps, 2.5e-7 of that magnitude.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)       # [N, 1]
    rest, digits = x / jnp.where(peak == 0, 1, peak) * 127, []
    for _ in range(3):
        digit = jnp.round(rest)                     # -127 ... 127
        rest = (rest - digit) * 254
        digits.append(digit.astype(jnp.int8))
    return jnp.stack(digits), peak / (127 * 254**2)


# %% book/chapters/11_streaming.md, cell 10
def digits_dot(
    digits: Int8[Array, "3 N D"], w: Int8[Array, "D F"]
) -> Float32[Array, "N F"]:
    """The number that `digits` spell, times w; D up to 2**17."""
    _, n, d = digits.shape
    stacked = digits.reshape(3 * n, d)
    y = jnp.dot(stacked, w, preferred_element_type=jnp.int32)
    a, b, c = y.reshape(3, n, -1).astype(jnp.float32)
    return (a * 254 + b) * 254 + c


# %% book/chapters/11_streaming.md, cell 13
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mapped:
    """A matrix [D, F] that lies in a file, `skip` bytes into `raw`.

    `raw` is memory that a file is mapped to, as unsigned integers of
    the width of `dtype`, which is what the file holds: the matrix, or
    if `transposed` its transpose; `pitch` elements from the start of
    a line to that of the next. int8 comes with bfloat16 `scales`
    [G, F], other types with None.
    """

    raw: Any
    skip: Any
    scales: Any
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    pitch: int = field(metadata={"static": True})
    transposed: bool = field(default=False, metadata={"static": True})


# %% book/chapters/11_streaming.md, cell 14
def read_tile(
    w: Mapped, start: int | Int[Array, ""], lines: int
) -> Shaped[Array, "{lines} _"]:
    """Lines start : start + lines of what stands in the file."""
    width = w.shape[0 if w.transposed else 1]
    size = w.raw.dtype.itemsize                     # bytes a word
    skip = jnp.asarray(w.skip)                      # in bytes
    first = skip // size + start * w.pitch          # in words
    count = (lines - 1) * w.pitch + width
    raw = jax.lax.dynamic_slice(w.raw, (first,), (count,))
    if size > 1:
        after = jax.lax.dynamic_slice(w.raw, (first + 1,), (count,))
        raw = straddling(raw, after, skip % size * 8)
    raw = jax.lax.bitcast_convert_type(raw, jnp.dtype(w.dtype))
    raw = jnp.pad(raw, (0, w.pitch - width))        # after the last
    return raw.reshape(lines, w.pitch)[:, :width]


# %% book/chapters/11_streaming.md, cell 15
def straddling(
    word: UInt[Array, " M"],
    after: UInt[Array, " M"],
    shift: Int[Array, ""],
) -> UInt[Array, " M"]:
    """The words that begin `shift` bits into `word`, little-endian."""
    bits = 8 * word.dtype.itemsize
    shift = shift.astype(word.dtype)
    low = jax.lax.shift_right_logical(word, shift)
    high = jax.lax.shift_left(after, bits - shift)  # all bits: leaves 0
    return low | high


# %% book/chapters/11_streaming.md, cell 16
def int8_product(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """x times a quantized matrix: integers first, scales after."""
    (n, d), f = x.shape, w.shape[1]
    group = d // w.scales.shape[0]
    lines = tile_rows(group, max(256, min(8 * n, 1024)))
    digits, step = to_digits(x)

    def add_tile(t, total):
        tile = read_tile(w, t * lines, lines)
        part = jax.lax.dynamic_slice(
            digits, (0, 0, t * lines), (3, n, lines)
        )
        at = t * lines // group, 0
        s = jax.lax.dynamic_slice(w.scales, at, (1, f))
        return total + digits_dot(part, tile) * s.astype(jnp.float32)

    zero = jnp.zeros((n, f), jnp.float32)
    return step * jax.lax.fori_loop(0, d // lines, add_tile, zero)


# %% book/chapters/11_streaming.md, cell 17
def float_product(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """x times a float matrix, a tile of which is cast to `x.dtype`."""
    n, d = x.shape
    lines = tile_rows(d, 128)

    def add_tile(t, total):
        tile = read_tile(w, t * lines, lines).astype(x.dtype)
        part = jax.lax.dynamic_slice(x, (0, t * lines), (n, lines))
        return total + jnp.dot(
            part, tile, preferred_element_type=jnp.float32
        )

    zero = jnp.zeros((n, w.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, d // lines, add_tile, zero)


# %% book/chapters/11_streaming.md, cell 18
def int8_transposed(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """`int8_product` with a file that holds the transpose."""
    (groups, f), n = w.scales.shape, len(x)
    lines = tile_rows(f, 64)
    digits, step = to_digits(x)
    runs = jnp.split(digits, groups, axis=2)            # [3, N, D/G]

    def put_tile(t, y):
        tile = read_tile(w, t * lines, lines)           # [lines, D]
        at, size = (0, t * lines), (groups, lines)
        s = jax.lax.dynamic_slice(w.scales, at, size)
        cut = jnp.split(tile, groups, axis=1)
        sums = [digits_dot(a, b.T) for a, b in zip(runs, cut)]
        part = sum(y * by for y, by in zip(sums, s.astype(jnp.float32)))
        return jax.lax.dynamic_update_slice(y, part, (0, t * lines))

    zero = jnp.zeros((n, f), jnp.float32)
    return step * jax.lax.fori_loop(0, f // lines, put_tile, zero)


# %% book/chapters/11_streaming.md, cell 19
def few_logits(
    h: Float[Array, "N D"], words: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """`tied_logits`, faster for few h: in float32, one by one."""
    words = words.astype(jnp.float32)
    if h.dtype == jnp.bfloat16:
        words = jax.lax.reduce_precision(words, 8, 7)
    h = h.astype(jnp.float32)
    return jnp.stack([jnp.sum(one * words, axis=1) for one in h])


# %% book/chapters/11_streaming.md, cell 20
def float_transposed(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """`float_product` with a file that holds the transpose."""
    n, f = len(x), w.shape[1]
    lines = tile_rows(f, 32 if n <= 8 else 512)
    product = few_logits if n <= 8 else tied_logits

    def put_tile(t, y):
        part = product(x, read_tile(w, t * lines, lines))
        return jax.lax.dynamic_update_slice(y, part, (0, t * lines))

    y = jnp.zeros((n, f), jnp.float32)
    return jax.lax.fori_loop(0, f // lines, put_tile, y)


# %% book/chapters/11_streaming.md, cell 21
MOST_VECTORS = 512


def in_chunks(
    product: Callable[[Array], Array], x: Float[Array, "N D"]
) -> Float32[Array, "N F"]:
    """`product` of at most MOST_VECTORS of x's N vectors at a time."""
    n, d = x.shape
    if n <= MOST_VECTORS:
        return product(x)
    x = jnp.pad(x, ((0, -n % MOST_VECTORS), (0, 0)))
    y = jax.lax.map(product, x.reshape(-1, MOST_VECTORS, d))
    return y.reshape(len(x), -1)[:n]


# %% book/chapters/11_streaming.md, cell 22
def mapped_matmul(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """x times a matrix in a file, of which a tile is ever cast."""
    as_is, turned = float_product, float_transposed
    if w.scales is not None:
        as_is, turned = int8_product, int8_transposed
    product = turned if w.transposed else as_is
    return in_chunks(partial(product, w=w), x)


PRODUCTS[Mapped] = mapped_matmul


# %% book/chapters/11_streaming.md, cell 23
def file_of(view: Any) -> tuple[Any, str | None]:
    """The mapping that `view` looks into, and the file's name.

    (None, None) for an array in ordinary memory.
    """
    base: Any = view
    name = None
    while base is not None and not isinstance(base, mmap.mmap):
        name = getattr(base, "filename", name)
        holder = isinstance(base, memoryview)
        base = base.obj if holder else getattr(base, "base", None)
    return base, None if name is None else str(name)


# %% book/chapters/11_streaming.md, cell 24
def address(a: np.ndarray) -> int:
    """Where an array's first byte is in memory."""
    return a.__array_interface__["data"][0]


# %% book/chapters/11_streaming.md, cell 25
ALIGNED = 64                                    # bytes, JAX wants it


def to_jax(view: np.ndarray) -> tuple[jax.Array, np.int32]:
    """The bytes of `view` without a copy, and where in them it starts.

    JAX takes over memory at multiples of 64 bytes only, and a file
    puts its tensors anywhere: so begin up to 63 bytes earlier. Only
    words that lie askew at the very end of a file are copied.
    """
    view, size = np.ascontiguousarray(view), view.itemsize
    mapping, _ = file_of(view)
    data, skip = view.reshape(-1).view(np.uint8), 0
    if mapping is not None:
        data = np.frombuffer(mapping, np.uint8)
        skip = address(view) % ALIGNED
    begin = address(view) - address(data) - skip
    end = begin + view.nbytes + ALIGNED
    if skip % size and end > len(data):
        return to_jax(view.copy())
    data = data[begin:end]
    words = data[: len(data) // size * size].view(f"u{size}")
    return jax.device_put(words), np.int32(skip)


# %% book/chapters/11_streaming.md, cell 26
def stretch(w: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """The memory that holds a matrix [D, F], from its first number to
    its last; the pitch; and whether it lies transposed.

    A copy only of what lies in neither way.
    """
    for turned, a in enumerate((w, w.T)):
        (n, width), (step, one), size = a.shape, a.strides, a.itemsize
        if one == size and step % size == 0 and step >= width * size:
            pitch = step // size
            count = (n - 1) * pitch + width
            flat = as_strided(a, (count,), (size,), writeable=False)
            return flat, pitch, bool(turned)
    return stretch(w.copy())


# %% book/chapters/11_streaming.md, cell 27
MOST_BYTES = 2**31 - 2 * ALIGNED                # int32 counts them


def mapped(weight: np.ndarray, scales: Any = None) -> Mapped:
    """A matrix [D, F] of a checkpoint, ready to be multiplied by.

    `scales` [G, F] come with int8. ValueError beyond 2 GiB.
    """
    flat, pitch, turned = stretch(weight)
    if flat.nbytes > MOST_BYTES:
        raise ValueError(
            f"cannot stream a matrix of {flat.nbytes:,} bytes: the "
            f"most is {MOST_BYTES:,}; load it without stream=True"
        )
    small = None if scales is None else jnp.asarray(scales)
    raw, skip = to_jax(flat)
    (d, f), dtype = weight.shape, str(weight.dtype)
    return Mapped(raw, skip, small, (d, f), dtype, pitch, turned)


# %% book/chapters/11_streaming.md, cell 34
@dataclass
class ReadCounts:
    """What has been read so far; grows as the model runs.

    `weights` counts each (module, name, layer of its stack, expert).
    """

    bytes: int = 0
    weights: Counter = field(default_factory=Counter)

    def add(self, key: tuple, size: int) -> None:
        self.bytes += size
        self.weights[key] += 1


# %% book/chapters/11_streaming.md, cell 35
def arrays_of(w: Any) -> Iterator[Any]:
    """The arrays that a weight is made of: of layers, of experts."""
    w = getattr(w, "weight", w)
    w = getattr(w, "source", w)
    parts = getattr(w, "parts", None)
    if parts is None:
        yield w
    for part in parts or ():
        yield from arrays_of(part)


# %% book/chapters/11_streaming.md, cell 36
def weight_files(params: Params) -> set[str]:
    """The names of all files that hold a weight."""
    leaves = [w for module in params.values() for w in module.values()]
    views = [view for w in leaves for view in arrays_of(w)]
    return {name for view in views if (name := file_of(view)[1])}


# %% book/chapters/11_streaming.md, cell 37
def state_of(name: str) -> tuple[int, int, int]:
    """A file's size, time of change and inode.

    ValueError where there is no such file.
    """
    try:
        s = os.stat(name)
    except OSError as error:
        raise ValueError(
            f"{name}, which the model is read from, is gone: {error}"
        ) from None
    return s.st_size, s.st_mtime_ns, s.st_ino


# %% book/chapters/11_streaming.md, cell 38
def check_unchanged(w: Any, opened: dict) -> None:
    """ValueError if a file that `w` is in is no longer what it was.

    Reading beyond the end of a mapped file that has shrunk would kill
    the process.
    """
    for name in {file_of(view)[1] for view in arrays_of(w)} - {None}:
        state = state_of(str(name))
        if state != opened.setdefault(name, state):
            raise ValueError(
                f"{name} has changed since the model was loaded from "
                "it: load the model again"
            )


# %% book/chapters/11_streaming.md, cell 39
def read_ahead(views: list[Any]) -> None:
    """Ask the system to read what is not in its page cache yet."""
    for view in (part for w in views for part in arrays_of(w)):
        mapping, _ = file_of(view)
        if mapping is None or not hasattr(mmap, "MADV_WILLNEED"):
            continue
        base = address(np.frombuffer(mapping, np.int8))
        first, last = (at - base for at in byte_bounds(view))
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, start, last - start)


# %% book/chapters/11_streaming.md, cell 40
Key = tuple[Any, ...]           # module, name, index into the stacks


class WeightStore:
    """Weights that stay in their files, fetched one at a time.

    `counts` says what was fetched. `layer_done`, where there is one,
    is told after each layer how many are done.
    """

    def __init__(self, params: Params, config: ModelConfig) -> None:
        self.params, self.config = params, config
        self.specs = param_specs(config)
        self.counts = ReadCounts()
        self.layer_done: Callable[[int], None] | None = None
        self.reader = ThreadPoolExecutor(1, "reads-ahead")
        files = weight_files(params)
        self.opened = {name: state_of(name) for name in files}

    def parts(self, module: str, name: str, *index: int) -> list[Any]:
        """One weight of a stack, not read yet; maybe its scales."""
        w = self.params[module][name]
        both = [w]
        if isinstance(w, QuantizedTensor):
            both = [w.weight, w.scales]
        for i in index:
            both = [stack[i] for stack in both]
        return both

    def fetch(self, module: str, name: str, *index: int) -> Any:
        """A matrix where it lies; anything else as a small array."""
        parts = self.parts(module, name, *index)
        for part in parts:
            check_unchanged(part, self.opened)
        weight, *scales = map(np.asarray, parts)
        size = sum(a.nbytes for a in (weight, *scales))
        self.counts.add((module, name, *index), size)
        spec = self.specs[module][name]
        if spec.matrix:
            return mapped(weight, *scales)
        dtype = jnp.float32 if spec.float32 else self.config.dtype
        return jnp.array(weight, dtype)

    def announce(self, keys: Iterable[Key]) -> None:
        """Have the matrices among these read while we compute."""
        views = [self.parts(module, name, *index)[0]
                 for module, name, *index in keys
                 if self.specs[module][name].matrix]
        self.reader.submit(read_ahead, views)


# %% book/chapters/11_streaming.md, cell 41
@dataclass(frozen=True)
class Location:
    """Where a parameter is stored; stands in for its value."""

    module: str
    name: str
    shape: tuple[int, ...]


def without_place(module: str, place: Place) -> str:
    """A module's name within its layer."""
    return module.removeprefix(f"{place.name}/")


# %% book/chapters/11_streaming.md, cell 42
@functools.cache
def expert_locations(
    config: ModelConfig, place: Place
) -> dict[str, Location]:
    """Where each parameter of a layer's experts is, by its name.

    Nowhere in a layer without experts.
    """
    own = place_params(param_specs(config), place)
    if not any("experts" in spec.axes
               for leaves in own.values() for spec in leaves.values()):
        return {}
    stand_ins = {
        without_place(module, place): {
            name: Location(module, name, spec.shape[1:])
            for name, spec in leaves.items()
        }
        for module, leaves in own.items()
    }

    def ask() -> Experts:
        experts: Any = place.spec.feed_forward.build()
        return experts.weights(config.d_model)

    return hk.transform(ask).apply(stand_ins, None)


# %% book/chapters/11_streaming.md, cell 45
@functools.cache
def layer_keys(config: ModelConfig, place: Place) -> tuple[Key, ...]:
    """Module and name of what every token needs of a layer."""
    experts = {(at.module, at.name)
               for at in expert_locations(config, place).values()}
    every = [(module, name)
             for module, leaves in place_params(
                 param_specs(config), place).items()
             for name in leaves]
    return tuple(key for key in every if key not in experts)


def fetch_layer(store: WeightStore, place: Place, index: int) -> Params:
    """A layer's parameters but its experts', in modules without the
    name of the place: layers that are alike share a program.
    """
    found: dict[str, dict[str, Any]] = {}
    for module, name in layer_keys(store.config, place):
        leaves = found.setdefault(without_place(module, place), {})
        leaves[name] = store.fetch(module, name, index)
    return found


# %% book/chapters/11_streaming.md, cell 46
def laid_out(kept: KVCache | None) -> KVCache | None:
    """A place's cache, held on a mesh as its axes say."""
    if kept is None:
        return None
    return jax.tree.map(here().constrain, kept, kept.axes)


@partial(
    jax.jit, static_argnames=("spec", "dtype"), donate_argnames="cache"
)
def attend_and_route(
    weights: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    index: Int32[Array, ""],
    spec: LayerSpec,
    dtype: str,
) -> Any:
    """h after attention; what experts read; gates; experts; what all
    tokens get besides, or None; the longer cache.
    """
    def run() -> Any:
        layer = DecoderLayer(spec, dtype)
        after, kept = layer.attend(h, positions, cache, index)
        x = layer.norm(after, "rms_norm_2").reshape(-1, h.shape[-1])
        moe: Any = spec.feed_forward.build()
        routed, x = moe.route(x), x.astype(dtype)           # [N, D]
        beside, kept = moe.always(x), laid_out(kept)
        experts = here().constrain(routed.experts, (None, None))
        return after, x, routed.gates, experts, beside, kept

    return hk.transform(run).apply(weights, None)


# %% book/chapters/11_streaming.md, cell 47
@partial(
    jax.jit, static_argnames=("spec", "dtype"), donate_argnames="cache"
)
def dense_layer(
    weights: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    cache: KVCache | None,
    index: Int32[Array, ""],
    spec: LayerSpec,
    dtype: str,
) -> tuple[Float32[Array, "B T D"], KVCache | None]:
    """A layer without experts, where nothing has to be chosen."""
    def run() -> Any:
        layer = DecoderLayer(spec, dtype, "layer")
        return layer(h, positions, real, cache, index)

    weights = {f"layer/{module}": w for module, w in weights.items()}
    h, cache, _ = hk.transform(run).apply(weights, None)
    return constrain_residual(h), laid_out(cache)


# %% book/chapters/11_streaming.md, cell 48
@partial(jax.jit, static_argnames="spec", donate_argnames="y")
def add_expert(
    y: Float32[Array, "N D"],
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    choices: Int32[Array, " C"],
    w: Experts,
    spec: LayerSpec,
) -> Float32[Array, "N D"]:
    """Add to y what one expert, of weights `w`, says to `choices`.

    Choice i is token i // A; N * A stands for none.
    """
    token = choices // gates.shape[1]
    xs = x.at[token].get(mode="fill", fill_value=0)         # [C, D]
    gate = gates.ravel().at[choices].get(mode="fill", fill_value=0)

    def run() -> Array:
        experts: Any = spec.feed_forward.build()
        return experts.expert(xs, gate, w)

    out = hk.transform(run).apply({}, None)
    return y.at[token].add(out, mode="drop")


# %% book/chapters/11_streaming.md, cell 49
MOST_CHOICES = 1024


def in_batches(
    choices: np.ndarray, nobody: int
) -> Iterator[np.ndarray]:
    """At most MOST_CHOICES at a time, filled up to one of few sizes."""
    for start in range(0, len(choices), MOST_CHOICES):
        some = choices[start : start + MOST_CHOICES]
        power = max(16, 1 << (len(some) - 1).bit_length())
        size = min(s for s in (1, 4, power) if s >= len(some))
        full = np.full(size, nobody, np.int32)
        full[: len(some)] = some
        yield full


# %% book/chapters/11_streaming.md, cell 50
@functools.singledispatch
def stream_experts(
    store: WeightStore,
    place: Place,
    index: int,
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[np.ndarray, "N A"],
) -> Float32[Array, "N D"]:
    """What the chosen experts add; -1 in `experts` is none."""
    flat = experts.reshape(-1)
    chosen = [int(e) for e in np.unique(flat) if e >= 0]
    found = expert_locations(store.config, place)
    store.announce((at.module, at.name, index, e)
                   for e in chosen for at in found.values())
    y = jnp.zeros(x.shape, jnp.float32)
    for e in chosen:
        w = {name: store.fetch(at.module, at.name, index, e)
             for name, at in found.items()}
        mine = np.flatnonzero(flat == e)
        for choices in in_batches(mine, flat.size):
            y = add_expert(y, x, gates, choices, w, place.spec)
    return y


# %% book/chapters/11_streaming.md, cell 51
@partial(
    jax.jit, static_argnames=("spec", "dtype"), donate_argnames="h"
)
def add_to_residual(
    weights: Params,
    h: Float32[Array, "B T D"],
    y: Float32[Array, "N D"],
    beside: Float32[Array, "N D"] | None,
    spec: LayerSpec,
    dtype: str,
) -> Float32[Array, "B T D"]:
    """h plus what the experts and `beside` say, normed if need be."""
    def run() -> Array:
        both = y if beside is None else y + beside
        layer = DecoderLayer(spec, dtype)
        return layer.add(h, both.reshape(h.shape), "rms_norm_3")

    return constrain_residual(hk.transform(run).apply(weights, None))


# %% book/chapters/11_streaming.md, cell 52
def stream_layer(
    store: WeightStore,
    place: Place,
    index: int,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    cache: KVCache | None,
) -> tuple[Float32[Array, "B T D"], KVCache | None]:
    """One layer; tokens that are not `real` choose no expert."""
    weights = fetch_layer(store, place, index)
    spec, dtype, at = place.spec, store.config.dtype, np.int32(index)
    if not expert_locations(store.config, place):
        return dense_layer(
            weights, h, positions, real, cache, at, spec, dtype
        )
    h, x, gates, experts, beside, cache = attend_and_route(
        weights, h, positions, cache, at, spec, dtype
    )
    choices = np.where(np.asarray(real).reshape(-1, 1), experts, -1)
    y = stream_experts(store, place, index, x, gates, choices)
    return add_to_residual(weights, h, y, beside, spec, dtype), cache


# %% book/chapters/11_streaming.md, cell 53
def table_rows(table: Any, tokens: np.ndarray) -> np.ndarray:
    """Some rows of a table that is an array, or something like it."""
    if isinstance(table, np.ndarray):
        return table[tokens]
    return np.concatenate(
        [np.asarray(table[int(i) : int(i) + 1]) for i in tokens]
    )


def stream_embed(
    store: WeightStore, tokens: Int[np.ndarray, "B T"],
    inputs: Any = None,
) -> Float32[Array, "B T D"]:
    """Only these tokens' rows of the table are read.

    `inputs`: what else a prompt holds, for models that take it.
    """
    table = store.params["in_out_embed"]["embeddings"]
    check_unchanged(table, store.opened)
    rows = jnp.array(table_rows(table, tokens.reshape(-1)))
    store.counts.bytes += rows.nbytes
    at = jnp.arange(tokens.size).reshape(tokens.shape)
    h = embed(rows, at, store.config)
    return h if inputs is None else store.config.merge(h, inputs)


# %% book/chapters/11_streaming.md, cell 54
@jax.jit
def word_logits(
    h: Float[Array, "N D"], table: Mapped
) -> Float32[Array, "N V"]:
    """`tied_logits`, with a table of which a tile is ever cast."""
    shape = table.shape[::-1]                               # [D, V]
    turned = replace(table, shape=shape, transposed=True)
    return float_transposed(h, turned)


# %% book/chapters/11_streaming.md, cell 55
def table_pieces(table: Any) -> Iterator[np.ndarray]:
    """The table in equal runs of words of at most 256 MiB each."""
    words, width = table.shape
    size = words * width * np.dtype(table.dtype).itemsize
    count = 1 << (-(-size // 2**28) - 1).bit_length()
    run = -(-words // count)
    for start in range(0, words, run):
        yield np.ascontiguousarray(table[start : start + run])


# %% book/chapters/11_streaming.md, cell 56
@functools.singledispatch
def stream_unembed(
    store: WeightStore, h: Float32[Array, "N D"]
) -> Float32[Array, "N V"]:
    """Logits; the table is read once, whatever N is."""
    config = store.config
    table = head_table(store.params, config)
    check_unchanged(table, store.opened)
    gain = store.fetch("rms_norm", "scale")
    h = rms_norm(h, gain, config.norm_eps)
    y = []
    for words in table_pieces(table):
        y.append(word_logits(h, mapped(words)))
        store.counts.add(("output matrix",), words.nbytes)
    return jnp.concatenate(y, axis=1) * config.output_multiplier


# %% book/chapters/11_streaming.md, cell 57
@dataclass(frozen=True)
class PartlyRead:
    """A weight in a file, whose reading is counted.

    With `chosen`, a stack of experts; the others are zeros, not read.
    """

    source: Any
    key: Key
    counts: ReadCounts
    chosen: frozenset[int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.chosen is None:
            block = np.asarray(self.source[index])
            self.counts.add(self.key, block.nbytes)
            return block
        experts, *rest = index
        held = range(*experts.indices(len(self.source)))
        sizes = [len(range(*s.indices(n)))
                 for s, n in zip(rest, self.shape[1:])]
        block = np.zeros((len(held), *sizes), self.dtype)
        for i, e in enumerate(held):
            if e in self.chosen:
                block[i] = self.source[e][tuple(rest)]
                self.counts.add((*self.key, e), block[i].nbytes)
        return block


# %% book/chapters/11_streaming.md, cell 58
class MeshStore(WeightStore):
    """A store that lays weights out on a mesh when they are fetched."""

    def __init__(
        self, params: Params, config: ModelConfig, mesh: Mesh
    ) -> None:
        super().__init__(params, config)
        self.mesh = mesh

    def fetch(
        self, module: str, name: str, *index: int,
        chosen: frozenset[int] | None = None,
    ) -> Any:
        """On each device its part; of experts maybe the chosen."""
        parts = self.parts(module, name, *index)
        for part in parts:
            check_unchanged(part, self.opened)
        key, spec = (module, name, *index), self.specs[module][name]
        parts = [PartlyRead(part, key, self.counts, chosen)
                 for part in parts]
        w = QuantizedTensor(*parts) if parts[1:] else parts[0]
        spec = replace(spec, axes=spec.axes[len(index) :])
        full = f"{module}/{name}"
        dtype = self.config.dtype
        return place_weight(full, w, spec, self.mesh, dtype)


# %% book/chapters/11_streaming.md, cell 59
@partial(jax.jit, static_argnames="spec")
def ask_experts(
    weights: Params, x: Float[Array, "N D"],
    gates: Float32[Array, "N A"], experts: Int[Array, "N A"],
    spec: LayerSpec,
) -> Float32[Array, "N D"]:
    """What a layer's experts add; a negative choice is none."""
    def run() -> Array:
        moe: Any = spec.feed_forward.build()
        real = (experts >= 0).any(axis=1)                   # [N]
        return moe.dispatch(x, Route(gates, gates, experts, gates),
                            real)

    return hk.transform(run).apply(weights, None)


@stream_experts.register
def _(
    store: MeshStore, place: Place, index: int,
    x: Float[Array, "N D"], gates: Float32[Array, "N A"],
    experts: Int[np.ndarray, "N A"],
) -> Float32[Array, "N D"]:
    chosen = frozenset(int(e) for e in np.unique(experts) if e >= 0)
    weights: dict[str, dict[str, Any]] = {}
    for at in expert_locations(store.config, place).values():
        own = weights.setdefault(without_place(at.module, place), {})
        own[at.name] = store.fetch(
            at.module, at.name, index, chosen=chosen)
    return ask_experts(weights, x, gates, experts, place.spec)


# %% book/chapters/11_streaming.md, cell 60
whole_unembed = jax.jit(unembed, static_argnames="config")


@stream_unembed.register
def _(
    store: MeshStore, h: Float32[Array, "N D"]
) -> Float32[Array, "N V"]:
    config = store.config
    module = "in_out_embed" if config.tied else "lm_head"
    params = {
        "rms_norm": {"scale": store.fetch("rms_norm", "scale")},
        module: {"embeddings": store.fetch(module, "embeddings")},
    }
    return whole_unembed(params, h[:, None], config)[:, 0]


# %% book/chapters/11_streaming.md, cell 61
def own_lengths(cache: Cache | None) -> dict[int, Any]:
    """Each place's cache by number, with a `length` of its own.

    A layer's program takes its cache over, and all share one `length`.
    """
    caches = () if cache is None else cache.places
    return {i: replace(kept, length=jnp.array(kept.length))
            for i, kept in enumerate(caches)}


# %% book/chapters/11_streaming.md, cell 62
@partial(jax.jit, donate_argnames="kept")
def reserve_in_place(
    kept: KVCache, new: Int32[Array, "..."]
) -> KVCache:
    longer = laid_out(kept.reserve(new))
    assert longer is not None
    return longer


def make_room(cache: Cache, new: Any) -> Cache:
    """With room for `new` more tokens a row; the old one is gone."""
    wanted = jnp.atleast_1d(jnp.asarray(new, jnp.int32))
    kept = own_lengths(cache).values()
    return Cache(tuple(reserve_in_place(c, wanted) for c in kept))


# %% book/chapters/11_streaming.md, cell 63
def stream_decoder(
    store: WeightStore,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    cache: Cache | None = None,
) -> tuple[Float32[Array, "B T D"], Cache | None]:
    """All layers; while one is computed, the next one is read."""
    config, kept = store.config, own_lengths(cache)
    places = all_places(config)
    for layer in range(config.num_layers):
        if layer + 1 < config.num_layers:
            place, index = place_of(config, layer + 1)
            store.announce((*key, index)
                           for key in layer_keys(config, place))
        place, index = place_of(config, layer)
        i = places.index(place)
        h, kept[i] = stream_layer(
            store, place, index, h, positions, real, kept.get(i)
        )
        if store.layer_done is not None:
            store.layer_done(layer + 1)
    if cache is None:
        return h, None
    return h, Cache(tuple(kept[i] for i in range(len(places))))


# %% book/chapters/11_streaming.md, cell 64
MOST_TOKENS = 4096                              # a run of all rows


# %% book/chapters/11_streaming.md, cell 65
def keep_last(
    last: Float32[Array, "B D"],
    h: Float32[Array, "B T D"],
    index: Int[np.ndarray, " B"],
) -> Float32[Array, "B D"]:
    """h[b, index[b]] where there is such a token, else last[b]."""
    inside = (index >= 0) & (index < h.shape[1])
    picked = h[np.arange(len(h)), np.where(inside, index, 0)]
    return jnp.where(inside[:, None], picked, last)


# %% book/chapters/11_streaming.md, cell 66
def stream_all_logits(
    store: WeightStore, tokens: Any, lengths: Any, inputs: Any = None
) -> Any:
    """Logits of whole texts, so many batch rows a time as fit."""
    (b, t), parts = tokens.shape, []
    h = stream_embed(store, np.asarray(tokens), inputs)
    start = jnp.zeros(b, jnp.int32)
    positions, real = positions_of(start, t, lengths)
    rows = max(1, MOST_TOKENS // t)
    for i in range(0, b, rows):
        some = slice(i, i + rows)
        y, _ = stream_decoder(
            store, h[some], positions[some], real[some]
        )
        y = stream_unembed(store, y.reshape(-1, y.shape[-1]))
        parts.append(y.reshape(-1, t, y.shape[-1]))
    return jnp.concatenate(parts)


# %% book/chapters/11_streaming.md, cell 67
def stream_prefill(
    store: WeightStore, tokens: Any, lengths: Any, cache: Cache,
    inputs: Any = None,
) -> Any:
    """Each prompt's last logits, and the longer cache.

    In runs of tokens if they are many. ValueError if they are
    more than the cache's slots.
    """
    check_room(cache, tokens.shape[1])
    b, t = tokens.shape
    before, lengths = np.array(cache.length), np.asarray(lengths)
    h = stream_embed(store, np.asarray(tokens), inputs)
    positions, real = positions_of(jnp.asarray(before), t, lengths)
    cache = make_room(cache, lengths)
    last = jnp.zeros((b, h.shape[-1]))
    run = max(1, MOST_TOKENS // b)
    for i in range(0, int(lengths.max()), run):
        some = slice(i, i + run)
        y, grown = stream_decoder(
            store, h[:, some], positions[:, some],
            real[:, some], cache,
        )
        assert grown is not None
        last = keep_last(last, y, lengths - 1 - i)
        done = before + np.minimum(lengths, i + run)
        cache = grown.with_length(jnp.asarray(done, jnp.int32))
    return stream_unembed(store, last), cache


# %% book/chapters/11_streaming.md, cell 68
def stream_decode_step(
    store: WeightStore, tokens: Any, cache: Cache, active: Any = None
) -> Any:
    """One more token a batch row that is active: its logits."""
    start = jnp.array(cache.length)
    lengths = None
    if active is not None:
        lengths = np.asarray(active).astype(np.int32)
    positions, real = positions_of(start, 1, lengths)
    cache = make_room(cache, 1 if lengths is None else lengths)
    h = stream_embed(store, np.asarray(tokens)[:, None])
    h, grown = stream_decoder(
        store, h, positions, real, cache
    )
    assert grown is not None
    length = start + (1 if lengths is None else lengths)
    logits = stream_unembed(store, h[:, 0])
    return logits, grown.with_length(length)


# %% book/chapters/11_streaming.md, cell 69
@dataclass(frozen=True, eq=False, repr=False)
class StreamedModel(Model):
    """A model that runs from its files; `params` are arrays in them.

    Otherwise a `Model`.
    """

    in_memory: ClassVar[bool] = False
    store: WeightStore = field(init=False)

    def __post_init__(self) -> None:
        store = WeightStore(self.params, self.config)
        if self.mesh is not None:
            store = MeshStore(self.params, self.config, self.mesh)
        object.__setattr__(self, "store", store)

    def all_logits(
        self, tokens: Any, lengths: Any, inputs: Any = None
    ) -> Any:
        return stream_all_logits(self.store, tokens, lengths, inputs)

    def prefill(
        self, tokens: Any, lengths: Any, cache: Cache,
        inputs: Any = None,
    ) -> Any:
        return stream_prefill(
            self.store, tokens, lengths, cache, inputs
        )

    def decode_step(
        self, tokens: Any, cache: Cache, active: Any = None
    ) -> Any:
        return stream_decode_step(self.store, tokens, cache, active)


# %% book/chapters/11_streaming.md, cell 70
STREAMED_CLASSES: dict[type, Callable[..., StreamedModel]] = {
    ModelConfig: StreamedModel
}


def load_from_disk(
    opened: Opened, mesh: Mesh | None, dtype: str
) -> StreamedModel:
    """The model of a checkpoint, of which no weight is read yet."""
    config = replace(opened.config, dtype=dtype)
    params: dict[str, dict[str, Any]] = {}
    for (module, name), w in opened.read().items():
        params.setdefault(module, {})[name] = w
    tokenizer = opened.tokenizer()
    kind = STREAMED_CLASSES[type(config)]
    return kind(config, params, tokenizer, mesh)


# %% book/chapters/11_streaming.md, cell 86
# VT100: make a line below, save the cursor, go there, clear; go back.
BELOW, BACK = "\x1bD\x1b[A\x1b7\x1bD\r\x1b[K", "\x1b8"


class StatusLine:
    """stderr for `tqdm`: on a terminal the line below the text.

    Elsewhere, a line for each status.
    """

    def write(self, text: str) -> None:
        text = text.strip()
        if sys.stderr.isatty():
            sys.stderr.write(BELOW + text + BACK)
        elif text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


# %% book/chapters/11_streaming.md, cell 87
SECONDS, SECONDS_IN_LOG = 0.1, 5.0          # between two statuses


def with_progress(
    model: StreamedModel, ids: Iterable[int]
) -> Iterator[int]:
    """`ids` as they come; stderr says which layer each is at.

    On a terminal as soon as it takes a moment, in a log every 5
    seconds; and what each took.
    """
    store, line, ids = model.store, StatusLine(), iter(ids)
    wait = SECONDS if sys.stderr.isatty() else SECONDS_IN_LOG
    width = min(72, shutil.get_terminal_size().columns - 1)
    for count in itertools.count(1):
        start, before = time.perf_counter(), store.counts.bytes
        with tqdm(
            total=model.config.num_layers, desc=f"token {count}",
            unit=" layers", file=line, leave=False, ncols=width,
            delay=wait, mininterval=wait, miniters=1,
        ) as bar:
            store.layer_done = lambda done: bar.update(done - bar.n)
            token = next(ids, None)
        if token is None:
            return
        spent = time.perf_counter() - start
        size = (store.counts.bytes - before) / 1e9
        line.write(f"token {count}: {spent:.1f} s a token, "
                   f"{size:.3g} GB read, {size / spent:.2g} GB/s")
        line.flush()
        yield token


# %% book/chapters/17b_pictures.md, cell 46
@dataclass(frozen=True, eq=False, repr=False)
class StreamedSeeingModel(StreamedModel, SeeingModel):
    """A model that sees, run from its files."""

    @cached_property
    def encoder(self) -> Params:
        return {
            module: {name: self.store.fetch(module, name)
                     for name in leaves}
            for module, leaves in super().encoder.items()
        }


STREAMED_CLASSES[SeeingConfig] = StreamedSeeingModel
