# Generated from book/chapters/11_streaming.md by `make sync`; edit the chapter.
"""Grok-1's files fill 318 GB, and a large laptop has 24 GB of memory.
But a token uses two experts of eight, uses each of their weights once,
and is done with it before the next layer begins. So the weights may
stay on disk. This chapter runs the model from its files, a layer at a
time, reading only what the router asks for. By its end you will have
`load(path, stream=True)`, a product that multiplies bytes where the
file left them, and the proof that the streamed model says what the
resident one says.
"""

import mmap
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, UInt
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided

from annotated_moe import quantization
from annotated_moe.attention import KVCache
from annotated_moe.mixtral import PAST
from annotated_moe.model import (
    Kind,
    Model,
    ModelConfig,
    Params,
    Place,
    Shared,
    attention_half,
    embed,
    kinds,
    layer_function,
    modules_of,
    place_of,
    router_of,
    stack_of,
    style_of,
    tied_logits,
)
from annotated_moe.moe import Experts, Style, expert
from annotated_moe.rms_norm import rms_norm
from annotated_moe.vision import Seen, merge


# %% book/chapters/11_streaming.md, cell 8
def to_digits(
    x: Float[Array, "N D"],
) -> tuple[Int8[Array, "3 N D"], Float32[Array, "N 1"]]:
    """x = step * (254**2 * d[0] + 254 * d[1] + d[2]), nearly.

    `step` is a row's largest magnitude / (127 * 254**2); no element is
    off by more than 2 steps, 2.5e-7 of that magnitude.
    """
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=1, keepdims=True)       # [N, 1]
    rest, digits = x / jnp.where(peak == 0, 1, peak) * 127, []
    for _ in range(3):
        digit = jnp.round(rest)                     # -127 ... 127
        rest = (rest - digit) * 254
        digits.append(digit.astype(jnp.int8))
    return jnp.stack(digits), peak / (127 * 254**2)


# %% book/chapters/11_streaming.md, cell 11
def digits_dot(
    digits: Int8[Array, "3 N D"], w: Int8[Array, "D F"]
) -> Float32[Array, "N F"]:
    """The number that `digits` spell, times w; D up to 2**17."""
    _, n, d = digits.shape
    rows = digits.reshape(3 * n, d)
    y = jnp.dot(rows, w, preferred_element_type=jnp.int32)
    a, b, c = y.reshape(3, n, -1).astype(jnp.float32)
    return (a * 254 + b) * 254 + c


# %% book/chapters/11_streaming.md, cell 14
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mapped(quantization.OwnProduct):
    """A matrix [D, F] that begins `skip` bytes into `raw`.

    `raw` is memory that a file is mapped to, as unsigned integers of
    the width of `dtype`, which is what the file holds: the matrix, or
    if `transposed` its transpose; `pitch` elements from the start of
    a row to that of the next. int8 comes with bfloat16 `scales` [G, F].
    """

    raw: Any
    skip: Any
    scales: Any
    shape: tuple[int, int] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    pitch: int = field(metadata={"static": True})
    transposed: bool = field(default=False, metadata={"static": True})

    def times(self, x: Float[Array, "N D"]) -> Float32[Array, "N F"]:
        """x times the matrix, a tile of rows at a time."""
        as_is, turned = float_product, float_transposed
        if self.scales is not None:
            as_is, turned = int8_product, int8_transposed
        product = turned if self.transposed else as_is
        return in_chunks(partial(product, w=self), x)


# %% book/chapters/11_streaming.md, cell 15
def read_tile(w: Mapped, start: Any, rows: int) -> Any:
    """Rows start : start + rows of what stands in the file."""
    f, size = w.shape[0 if w.transposed else 1], w.raw.dtype.itemsize
    at, shift = w.skip // size + start * w.pitch, w.skip % size * 8
    count = (rows - 1) * w.pitch + f
    raw = jax.lax.dynamic_slice(w.raw, (at,), (count,))
    if size > 1:
        after = jax.lax.dynamic_slice(w.raw, (at + 1,), (count,))
        raw = straddling(raw, after, shift)
    raw = jax.lax.bitcast_convert_type(raw, jnp.dtype(w.dtype))
    raw = jnp.pad(raw, (0, w.pitch - f))        # after the last row
    return raw.reshape(rows, w.pitch)[:, :f]


# %% book/chapters/11_streaming.md, cell 16
def straddling(
    word: UInt[Array, " M"], after: UInt[Array, " M"], shift: Any
) -> UInt[Array, " M"]:
    """The words that begin `shift` bits into `word`, little-endian."""
    bits = 8 * word.dtype.itemsize
    low = jax.lax.shift_right_logical(word, shift.astype(word.dtype))
    shift = (bits - shift).astype(word.dtype)   # all bits: leaves 0
    return low | jax.lax.shift_left(after, shift)


# %% book/chapters/11_streaming.md, cell 17
def int8_product(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """x times a quantized matrix: integers first, scales after."""
    (n, d), f = x.shape, w.shape[1]
    group = d // w.scales.shape[0]
    rows = quantization.tile_rows(group, max(128, min(8 * n, 1024)))
    digits, step = to_digits(x)

    def add_tile(t, total):
        tile = read_tile(w, t * rows, rows)
        part = jax.lax.dynamic_slice(
            digits, (0, 0, t * rows), (3, n, rows)
        )
        at = t * rows // group, 0
        s = jax.lax.dynamic_slice(w.scales, at, (1, f))
        return total + digits_dot(part, tile) * s.astype(jnp.float32)

    zero = jnp.zeros((n, f), jnp.float32)
    return step * jax.lax.fori_loop(0, d // rows, add_tile, zero)


# %% book/chapters/11_streaming.md, cell 18
def float_product(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """x times a float matrix, a tile of which is cast to `x.dtype`."""
    n, d = x.shape
    rows = quantization.tile_rows(d, 128)

    def add_tile(t, total):
        tile = read_tile(w, t * rows, rows).astype(x.dtype)
        part = jax.lax.dynamic_slice(x, (0, t * rows), (n, rows))
        return total + jnp.dot(
            part, tile, preferred_element_type=jnp.float32
        )

    zero = jnp.zeros((n, w.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, d // rows, add_tile, zero)


# %% book/chapters/11_streaming.md, cell 19
def int8_transposed(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """`int8_product` with a file that holds the transpose."""
    (groups, f), n = w.scales.shape, len(x)
    rows = quantization.tile_rows(f, 64)
    digits, step = to_digits(x)
    runs = jnp.split(digits, groups, axis=2)            # [3, N, D/G]

    def put_tile(t, y):
        tile = read_tile(w, t * rows, rows)                 # [rows, D]
        at, size = (0, t * rows), (groups, rows)
        s = jax.lax.dynamic_slice(w.scales, at, size)
        cut = jnp.split(tile, groups, axis=1)
        sums = [digits_dot(a, b.T) for a, b in zip(runs, cut)]
        part = sum(y * by for y, by in zip(sums, s.astype(jnp.float32)))
        return jax.lax.dynamic_update_slice(y, part, (0, t * rows))

    zero = jnp.zeros((n, f), jnp.float32)
    return step * jax.lax.fori_loop(0, f // rows, put_tile, zero)


# %% book/chapters/11_streaming.md, cell 20
def few_logits(
    h: Float[Array, "N D"], words: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """`tied_logits`, faster for few rows: in float32, row by row."""
    words = words.astype(jnp.float32)
    if h.dtype == jnp.bfloat16:
        words = jax.lax.reduce_precision(words, 8, 7)
    h = h.astype(jnp.float32)
    return jnp.stack([jnp.sum(row * words, axis=1) for row in h])


# %% book/chapters/11_streaming.md, cell 21
def float_transposed(
    x: Float[Array, "N D"], w: Mapped
) -> Float32[Array, "N F"]:
    """`float_product` with a file that holds the transpose."""
    n, f = len(x), w.shape[1]
    rows = quantization.tile_rows(f, 32 if n <= 8 else 512)
    product = few_logits if n <= 8 else tied_logits

    def put_tile(t, y):
        part = product(x, read_tile(w, t * rows, rows))
        return jax.lax.dynamic_update_slice(y, part, (0, t * rows))

    y = jnp.zeros((n, f), jnp.float32)
    return jax.lax.fori_loop(0, f // rows, put_tile, y)


# %% book/chapters/11_streaming.md, cell 22
MOST_ROWS = 512


# %% book/chapters/11_streaming.md, cell 23
def in_chunks(
    product: Callable[[Array], Array], x: Float[Array, "N D"]
) -> Float32[Array, "N F"]:
    """`product` of at most MOST_ROWS rows at a time."""
    n, d = x.shape
    if n <= MOST_ROWS:
        return product(x)
    x = jnp.pad(x, ((0, -n % MOST_ROWS), (0, 0)))
    y = jax.lax.map(product, x.reshape(-1, MOST_ROWS, d))
    return y.reshape(len(x), -1)[:n]


# %% book/chapters/11_streaming.md, cell 24
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


# %% book/chapters/11_streaming.md, cell 25
def address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


# %% book/chapters/11_streaming.md, cell 26
ALIGNED = 64                                    # bytes, JAX wants it
MOST_BYTES = 2**31 - 2 * ALIGNED                # int32 counts them


# %% book/chapters/11_streaming.md, cell 27
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


# %% book/chapters/11_streaming.md, cell 28
def stretch(w: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """The stretch of memory that holds a matrix, the pitch of its
    rows, and whether these are columns. A copy only of other layouts.
    """
    for turned, a in enumerate((w, w.T)):
        (n, width), (step, one), size = a.shape, a.strides, a.itemsize
        if one == size and step % size == 0 and step >= width * size:
            pitch = step // size
            count = (n - 1) * pitch + width
            flat = as_strided(a, (count,), (size,), writeable=False)
            return flat, pitch, bool(turned)
    return stretch(w.copy())


# %% book/chapters/11_streaming.md, cell 29
def mapped(weight: np.ndarray, scales: Any = None) -> Mapped:
    """A matrix of a checkpoint, ready to be multiplied by."""
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


# %% book/chapters/11_streaming.md, cell 35
def layer_of(w: Any, layer: int, *index: int) -> Any:
    """One layer of a stack, or of a list of layers, not copied.

    With `index`, an expert of it. What is no array is not made yet
    where that can be avoided.
    """
    for i in (layer, *index):
        w = w[i]
    return w


# %% book/chapters/11_streaming.md, cell 36
@dataclass
class Reading:
    """What has been read so far; grows as the model runs."""

    bytes: int = 0
    matrices: Counter = field(default_factory=Counter)

    def count(self, name: tuple, size: int) -> None:
        self.bytes += size
        self.matrices[name] += 1


# %% book/chapters/11_streaming.md, cell 37
Views = list[Any]


# %% book/chapters/11_streaming.md, cell 38
class Labels:
    """Which file each weight is in, and where. Nothing is read."""

    def __init__(self, params: Params) -> None:
        self.params, self.reading = params, Reading()
        self.report: Callable[[int], None] | None = None
        self.reader = ThreadPoolExecutor(1, "reads-ahead")
        names = files_of(params)
        self.opened = {name: state_of(name) for name in names}

    def views(self, module: str, layer: int, *index: int) -> Any:
        """A matrix, or that of expert `index`, and its scales."""
        w, at = self.params[module]["w"], (layer, *index)
        if not isinstance(w, quantization.QuantizedTensor):
            return layer_of(w, *at), None
        return layer_of(w.weight, *at), layer_of(w.scales, *at)


# %% book/chapters/11_streaming.md, cell 39
class Shelf(Labels):
    """Weights that stay on disk, fetched a matrix at a time."""

    def matrix(self, module: str, layer: int, *index: int) -> Mapped:
        """Matrix `w` of a module, or of expert `index` in it."""
        weight, scales = self.views(module, layer, *index)
        check_unchanged(weight, self.opened)
        weight = np.asarray(weight)
        self.reading.count((module, layer, *index), weight.nbytes)
        return mapped(weight, scales)

    def vector(self, module: str, name: str, layer: int) -> jax.Array:
        """A norm's gain, a router, a bias: small, and float32."""
        w = layer_of(self.params[module][name], layer)
        check_unchanged(w, self.opened)
        w = np.asarray(w)
        self.reading.count((module, layer), w.nbytes)
        return jnp.asarray(w, jnp.float32)


# %% book/chapters/11_streaming.md, cell 40
def arrays_of(w: Any) -> Iterator[Any]:
    """The arrays that a weight is made of: of layers, of experts."""
    w = getattr(w, "weight", w)
    w = getattr(w, "source", w)
    parts = getattr(w, "parts", None)
    if parts is None:
        yield w
    for part in parts or ():
        yield from arrays_of(part)


# %% book/chapters/11_streaming.md, cell 41
def files_of(params: Params) -> set[str]:
    """The names of all files that hold a weight."""
    leaves = [w for module in params.values() for w in module.values()]
    views = [view for w in leaves for view in arrays_of(w)]
    return {name for view in views if (name := file_of(view)[1])}


# %% book/chapters/11_streaming.md, cell 42
def state_of(name: str) -> tuple[int, int, int]:
    """Size, time of change and inode. ValueError if there is none."""
    try:
        s = os.stat(name)
    except OSError as error:
        raise ValueError(
            f"{name}, which the model is read from, is gone: {error}"
        ) from None
    return s.st_size, s.st_mtime_ns, s.st_ino


# %% book/chapters/11_streaming.md, cell 43
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


# %% book/chapters/11_streaming.md, cell 44
def read_ahead(views: Views) -> None:
    """Ask the system to read what is not in its page cache yet."""
    for view in (part for w in views for part in arrays_of(w)):
        mapping, _ = file_of(view)
        if mapping is None or not hasattr(mmap, "MADV_WILLNEED"):
            continue
        base = address(np.frombuffer(mapping, np.int8))
        first, last = (at - base for at in byte_bounds(view))
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, start, last - start)


# %% book/chapters/11_streaming.md, cell 45
LAYER = "decoder_layer/"
BLOCKS = ("linear", "linear_v", "linear_1")     # as in Experts


# %% book/chapters/11_streaming.md, cell 46
def layer_modules(params: Params, kind: Kind) -> list[str]:
    """The modules of such a layer that every token needs."""
    return [module for module in modules_of(params, kind)
            if module.startswith(LAYER) and "/moe/" not in module]


# %% book/chapters/11_streaming.md, cell 47
def is_matrix(module: str, name: str) -> bool:
    return name == "w" and not module.endswith("/router")


# %% book/chapters/11_streaming.md, cell 48
def layer_weights(
    shelf: Shelf, at: Place, kind: Kind, dtype: str
) -> Params:
    """A layer's parameters except its experts'; biases in `dtype`."""
    found: dict[str, dict[str, Any]] = {}
    for module in layer_modules(shelf.params, kind):
        leaves = found[module.removeprefix(LAYER)] = {}
        row = getattr(at, stack_of(module))
        for name in shelf.params[module]:
            if is_matrix(module, name):
                leaves[name] = shelf.matrix(module, row)
                continue
            w = shelf.vector(module, name, row)
            leaves[name] = w.astype(dtype) if name == "b" else w
    return found


# %% book/chapters/11_streaming.md, cell 49
def layer_ahead(shelf: Shelf, c: ModelConfig, layer: int) -> None:
    """Have the matrices that `layer_weights` will return read."""
    at, kind = place_of(c, layer), kinds(c)[layer]
    modules = [m for m in layer_modules(shelf.params, kind)
               if "w" in shelf.params[m] and is_matrix(m, "w")]
    views = [shelf.views(m, getattr(at, stack_of(m)))[0]
             for m in modules]
    shelf.reader.submit(read_ahead, views)


# %% book/chapters/11_streaming.md, cell 50
ONE_LAYER = partial(
    jax.jit, static_argnames=("c", "kind"), donate_argnames="cache"
)


# %% book/chapters/11_streaming.md, cell 51
@ONE_LAYER
def attend_and_route(
    weights: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: Int32[Array, ""],
    c: ModelConfig,
    kind: Kind,
) -> Any:
    """h after attention; what experts read; gates; experts; what a
    shared expert says, or None; cache.
    """
    def run(h, cache):
        job = h, positions, cache, layer, c, kind
        h, x, cache = attention_half(*job)
        x = x.reshape(-1, c.d_model)                        # [N, D]
        routed, x = router_of(c)(x), x.astype(c.dtype)
        said = Shared(c)(x) if c.shared_expert else None
        return h, x, routed.gates, routed.experts, said, cache

    return applied(run, weights, h, cache)


# %% book/chapters/11_streaming.md, cell 52
def applied(run: Callable, weights: Params, *inputs: Any) -> Any:
    """`run`, a function of Haiku modules, on these weights."""
    transformed: Any = hk.without_apply_rng(hk.transform(run))
    return transformed.apply(weights, *inputs)


# %% book/chapters/11_streaming.md, cell 53
@ONE_LAYER
def whole_layer(
    weights: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: Int32[Array, ""],
    c: ModelConfig,
    kind: Kind,
) -> tuple[Float32[Array, "B T D"], KVCache | None]:
    """A layer without experts, where nothing has to be chosen."""
    weights = {LAYER + module: w for module, w in weights.items()}
    run = layer_function(c, kind).apply
    h, cache, _ = run(weights, h, positions, cache, layer)
    return h, cache


# %% book/chapters/11_streaming.md, cell 54
@partial(jax.jit, static_argnames="style", donate_argnames="y")
def add_expert(
    y: Float32[Array, "N D"],
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    choices: Int32[Array, " C"],
    w: Experts,
    style: Style,
) -> Float32[Array, "N D"]:
    """Add to y what one expert says to the `choices` that are its.

    Choice i is token i // A; N * A stands for none.
    """
    token = choices // gates.shape[1]
    xs = x.at[token].get(mode="fill", fill_value=0)         # [C, D]
    gate = gates.ravel().at[choices].get(mode="fill", fill_value=0)
    xs, gate = style.weigh(xs, gate, gate)
    out = expert(xs, w, style=style) * gate[:, None]
    return y.at[token].add(out, mode="drop")


# %% book/chapters/11_streaming.md, cell 55
MOST_CHOICES = 1024


# %% book/chapters/11_streaming.md, cell 56
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


# %% book/chapters/11_streaming.md, cell 57
def stream_experts(
    shelf: Shelf,
    layer: int,
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[np.ndarray, "N A"],
    style: Style,
) -> Float32[Array, "N D"]:
    """What the chosen experts add; -1 in `experts` is none.

    `layer` counts only layers that have experts.
    """
    flat = experts.reshape(-1)
    chosen = [int(e) for e in np.unique(flat) if e >= 0]
    modules = [f"{LAYER}moe/{block}" for block in BLOCKS]
    views = [
        shelf.views(m, layer, e)[0] for e in chosen for m in modules
    ]
    shelf.reader.submit(read_ahead, views)
    y = jnp.zeros(x.shape, jnp.float32)
    for e in chosen:
        w = Experts(*(shelf.matrix(m, layer, e) for m in modules))
        mine = np.flatnonzero(flat == e)
        for choices in in_batches(mine, flat.size):
            y = add_expert(y, x, gates, choices, w, style)
    return y


# %% book/chapters/11_streaming.md, cell 58
@partial(jax.jit, static_argnames="eps", donate_argnames="h")
def add_normed(
    h: Float32[Array, "B T D"],
    y: Float32[Array, "N D"],
    said: Float32[Array, "N D"] | None = None,
    scale: Float32[Array, " D"] | None = None,
    eps: float = 1e-5,
) -> Float32[Array, "B T D"]:
    """h plus what the experts and the shared one said, maybe normed."""
    y = (y if said is None else y + said).reshape(h.shape)
    return h + (y if scale is None else rms_norm(y, scale, eps))


# %% book/chapters/11_streaming.md, cell 59
def stream_layer(
    shelf: Shelf,
    layer: int,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    real: np.ndarray,
    c: ModelConfig,
) -> tuple[Float32[Array, "B T D"], KVCache | None]:
    """One layer; tokens that are not `real` choose no expert."""
    at, kind = place_of(c, layer), kinds(c)[layer]
    w = layer_weights(shelf, at, kind, c.dtype)
    job = w, h, positions, cache, np.int32(at.cache), c, kind
    if not kind.experts:
        return whole_layer(*job)
    h, x, gates, experts, said, cache = attend_and_route(*job)
    known = np.where(real.reshape(-1, 1), np.asarray(experts), -1)
    style, norm = style_of(c), w.get("rms_norm_3", {})
    y = stream_experts(shelf, at.experts, x, gates, known, style)
    h = add_normed(h, y, said, norm.get("scale"), c.norm_eps)
    return h, cache


# %% book/chapters/11_streaming.md, cell 60
def rows_of(table: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a table that is an array, or something like it."""
    if isinstance(table, np.ndarray):
        return table[rows]
    return np.concatenate([table[int(i) : int(i) + 1] for i in rows])


# %% book/chapters/11_streaming.md, cell 61
@jax.jit
def word_logits(
    h: Float[Array, "N D"], table: Mapped
) -> Float32[Array, "N V"]:
    """`tied_logits`, with a table of which a tile is ever cast."""
    shape = table.shape[::-1]                               # [D, V]
    turned = replace(table, shape=shape, transposed=True)
    return float_transposed(h, turned)


# %% book/chapters/11_streaming.md, cell 62
def pieces(table: Any) -> Iterator[np.ndarray]:
    """The table in runs of words of at most 256 MiB each."""
    words, width = table.shape
    size = words * width * np.dtype(table.dtype).itemsize
    count = 1 << (-(-size // 2**28) - 1).bit_length()
    run = -(-words // count)
    for start in range(0, words, run):
        yield np.ascontiguousarray(table[start : start + run])


# %% book/chapters/11_streaming.md, cell 63
@dataclass(frozen=True)
class LayerByLayer(Model):
    """A model whose `params` are arrays in files, one layer a time."""

    shelf: Shelf = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shelf", Shelf(self.params))

    def table(self, module: str = "in_out_embed") -> Any:
        """The embedding, or another table of words, in its file."""
        table = self.params[module]["embeddings"]
        check_unchanged(table, self.shelf.opened)
        return table


# %% book/chapters/11_streaming.md, cell 64
class Embedding(LayerByLayer):
    """From tokens to h."""

    def embed(self, tokens: np.ndarray) -> Float32[Array, "B T D"]:
        """Only these tokens' rows are read."""
        rows = jnp.asarray(rows_of(self.table(), tokens.reshape(-1)))
        self.shelf.reading.bytes += rows.nbytes
        own = {"in_out_embed": {"embeddings": rows}}
        at = jnp.arange(tokens.size).reshape(tokens.shape)
        return embed(own, at, self.config)


# %% book/chapters/11_streaming.md, cell 65
class Layers(Embedding):
    """All of them, one at a time."""

    def forward(
        self, tokens: Any, positions: Any, cache: Any,
        real: np.ndarray, seen: Seen | None = None,
    ) -> tuple[Float32[Array, "B T D"], Any]:
        """All layers; the next one's attention is read ahead."""
        h = self.embed(np.asarray(tokens))
        h = h if seen is None else merge(h, seen)
        depth, shelf = self.config.num_layers, self.shelf
        positions = jnp.asarray(positions, jnp.int32)
        for layer in range(depth):
            if layer + 1 < depth:
                layer_ahead(shelf, self.config, layer + 1)
            job = shelf, layer, h, positions, cache, real
            h, cache = stream_layer(*job, self.config)
            if shelf.report:
                shelf.report(layer + 1)
        return h, cache


# %% book/chapters/11_streaming.md, cell 66
class Halves(Layers):
    """From h to logits."""

    def unembed(
        self, h: Float32[Array, "N D"]
    ) -> Float32[Array, "N V"]:
        """Logits; the table is read once, whatever N is."""
        c, shelf = self.config, self.shelf
        head = "in_out_embed" if c.tied else "lm_head"
        table, last = self.table(head), self.params["rms_norm"]["scale"]
        check_unchanged(last, shelf.opened)
        gain = jnp.asarray(np.asarray(last), jnp.float32)
        h, y = rms_norm(h, gain, c.norm_eps).astype(c.dtype), []
        for words in pieces(table):
            y.append(word_logits(h, mapped(words)))
            shelf.reading.count((head,), words.nbytes)
        by = jnp.asarray(c.output_multiplier, c.dtype)
        return jnp.concatenate(y, axis=1) * by.astype(jnp.float32)


# %% book/chapters/11_streaming.md, cell 67
def keep_last(
    last: Float32[Array, "B D"],
    h: Float32[Array, "B T D"],
    index: Int[np.ndarray, " B"],
) -> Float32[Array, "B D"]:
    """h[b, index[b]] where there is such a token, else last[b]."""
    inside = (index >= 0) & (index < h.shape[1])
    picked = h[np.arange(len(h)), np.where(inside, index, 0)]
    return jnp.where(inside[:, None], picked, last)


# %% book/chapters/11_streaming.md, cell 68
MOST_TOKENS = 4096


def part_of(seen: Seen | None, index: Any) -> Seen | None:
    """What a part of the batch's tokens has seen of its images."""
    return seen and Seen(seen.features, seen.places[index])


# %% book/chapters/11_streaming.md, cell 69
class AllLogits(Halves):
    """Logits of whole texts."""

    def all_logits(
        self, tokens: Any, lengths: Any, seen: Seen | None = None
    ) -> Any:
        """Logits at every token, so many rows at a time as fit."""
        b, t = tokens.shape
        rows, parts = max(1, MOST_TOKENS // t), []
        for i in range(0, b, rows):
            some = tokens[i : i + rows]
            positions = np.broadcast_to(np.arange(t), some.shape)
            real = positions < lengths[i : i + rows, None]
            own = part_of(seen, slice(i, i + rows))
            h, _ = self.forward(some, positions, None, real, own)
            y = self.unembed(h.reshape(-1, h.shape[-1]))
            parts.append(y.reshape(*some.shape, -1))
        return jnp.concatenate(parts)


# %% book/chapters/11_streaming.md, cell 70
class Prefill(AllLogits):
    """Prompts."""

    def prefill(
        self, tokens: Any, lengths: Any, cache: KVCache,
        seen: Seen | None = None,
    ) -> Any:
        """Each prompt's last logits, and its cache; in runs of tokens
        if they are many. ValueError if they are more than the slots.
        """
        (b, t), before = tokens.shape, np.asarray(cache.length)
        if t > cache.k.shape[2]:
            raise ValueError(f"{t} tokens, {cache.k.shape[2]} slots")
        last = jnp.zeros((b, self.config.d_model))
        step = max(1, MOST_TOKENS // b)
        for start in range(0, int(lengths.max()), step):
            at = np.arange(start, min(start + step, t))
            real = at < lengths[:, None]
            positions = np.where(real, before[:, None] + at, PAST)
            job = tokens[:, at], positions, cache, real
            own = part_of(seen, (slice(None), at))
            h, cache = self.forward(*job, own)
            last = keep_last(last, h, lengths - 1 - start)
            there = before + np.minimum(lengths, at[-1] + 1)
            there = jnp.asarray(there, jnp.int32)
            cache = replace(cache, length=there)
        return self.unembed(last), cache


# %% book/chapters/11_streaming.md, cell 71
class StreamedModel(Prefill):
    """A model that runs from its files. See `Model` for its use."""

    def decode_step(self, tokens: Any, cache: KVCache) -> Any:
        """One more token a row: its logits, and the longer cache."""
        at, tokens = cache.length[:, None], np.asarray(tokens)[:, None]
        real = np.ones(tokens.shape, bool)
        h, grown = self.forward(tokens, at, cache, real)
        length = at[:, 0] + 1
        return self.unembed(h[:, 0]), replace(grown, length=length)


# %% book/chapters/11_streaming.md, cell 80
# VT100: make a line below, save the cursor, go there, clear; go back.
BELOW, BACK = "\x1bD\x1b[A\x1b7\x1bD\r\x1b[K", "\x1b8"


# %% book/chapters/11_streaming.md, cell 81
def status(text: str) -> None:
    """A line on stderr: on a terminal, below the text and rewritten."""
    if sys.stderr.isatty():
        print(BELOW + text + BACK, end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


# %% book/chapters/11_streaming.md, cell 82
class Progress:
    """Says which layer a streamed model is at, and seconds a token."""

    def __init__(self, model: StreamedModel) -> None:
        self.model, self.token = model, 0
        model.shelf.report = self.layer_done
        self.begin()

    def begin(self) -> None:
        """The next token starts now."""
        self.token, self.bytes = self.token + 1, self.read()
        self.start = self.said = time.perf_counter()

    def read(self) -> int:
        return self.model.shelf.reading.bytes

    def layer_done(self, layer: int) -> None:
        """On a terminal at every layer, in a log every 5 seconds."""
        now, depth = time.perf_counter(), self.model.config.num_layers
        if not sys.stderr.isatty() and now < self.said + 5:
            return
        self.said, spent = now, now - self.start
        status(f"token {self.token}: layer {layer} of {depth}, "
               f"{spent:.1f} s")


# %% book/chapters/11_streaming.md, cell 83
def watched(model: StreamedModel, ids: Iterable[int]) -> Iterator[int]:
    """`ids` as they come, with a `status` for each."""
    progress = Progress(model)
    for token in ids:
        spent = time.perf_counter() - progress.start
        size = (progress.read() - progress.bytes) / 1e9
        status(
            f"token {progress.token}: {spent:.1f} s a token, "
            f"{size:.3g} GB read, {size / spent:.2g} GB/s"
        )
        yield token
        progress.begin()
