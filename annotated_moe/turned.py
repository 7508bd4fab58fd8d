# Generated from book/chapters/27_int8_on_a_cpu.md by `make sync`; edit the chapter.
"""To write one token, a processor reads the weights of two experts a
layer and multiplies each number once. So it can be as fast as its
memory and no faster, and a one-byte weight should take a quarter of the
time of a four-byte weight. In the product that we have so far it does
not. By the end of this chapter the same integers are stored in another
order, XLA compiles their product into one loop, and you have measured
what share of a plain read it reaches. You will know from the compiled
text, and not from a stopwatch alone, why other ways of writing that
product are several times slower. And `load` will do this on a CPU to
every eight-bit matrix that it keeps in memory, except small ones.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from annotated_moe.checkpoints import STORED
from annotated_moe.generate import Model
from annotated_moe.linear import PRODUCTS
from annotated_moe.model import head_table
from annotated_moe.moe import BLOCK_ROWS
from annotated_moe.quantization import (
    Index,
    LazySlice,
    QuantizedTensor,
    cpu_has_bfloat16,
    group_size,
    quantize,
    tile_rows,
)

# %% book/chapters/27_int8_on_a_cpu.md, cell 13
MOST = 2048                             # inputs a run


def runs_of(d: int, groups: int, parts: int = 1) -> int:
    """Into how many equal runs D is cut: the fewest that do.

    A run lies in one group of scales and in one of `parts`, and has
    at most `MOST` inputs; but where that would leave fewer than 64 of
    them, as with a prime, it is as long as it may.
    """
    least = math.lcm(groups, parts)
    counts = range(least, d // 64 + 1, least)
    fits = (n for n in counts if d % n == 0 and d // n <= MOST)
    return next(fits, least)


# %% book/chapters/27_int8_on_a_cpu.md, cell 15
@jax.tree_util.register_pytree_node_class
class TurnedTensor(QuantizedTensor):
    """int8 `runs` [*E, R, F, D/R] and bfloat16 `scales` [*E, G, F].

    Stands for [*E, D, F]: input d is number d % (D/R) of run
    d // (D/R). A pytree of two leaves, as every quantized weight.
    """

    runs: Any

    def __init__(self, runs: Any, scales: Any) -> None:
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "scales", scales)

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.runs, self.scales), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "TurnedTensor":
        return cls(*leaves)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, runs, f, size = self.runs.shape
        return (*lead, runs * size, f)

    @property
    def weight(self) -> Any:
        """The integers as [*E, D, F], bit for bit."""
        if isinstance(self.runs, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.shape, self.runs.dtype)
        return self.runs.swapaxes(-1, -2).reshape(self.shape)

    def specs(self, weight: Any, scales: Any) -> "TurnedTensor":
        """What cuts D cuts the runs, or the inputs of the only one."""
        *lead, d, f = weight
        runs = (d, f, None)
        if self.runs.shape[-3] == 1:
            runs = (None, f, d)
        return TurnedTensor(P(*lead, *runs), scales)

    def __repr__(self) -> str:
        return f"TurnedTensor({self.runs!r}, {self.scales!r})"


# %% book/chapters/27_int8_on_a_cpu.md, cell 16
def turn(q: QuantizedTensor, parts: int = 1) -> TurnedTensor:
    """The same weight, turned; `parts`: into how many D is cut.

    ValueError when `scales` does not belong to `weight`.
    """
    group_size(q)
    *lead, d, f = q.shape
    runs = runs_of(d, q.scales.shape[-2], parts)
    cut = jnp.asarray(q.weight).reshape(*lead, runs, d // runs, f)
    return TurnedTensor(cut.swapaxes(-1, -2), q.scales)


# %% book/chapters/27_int8_on_a_cpu.md, cell 19
def run_of(w: TurnedTensor, index: Index, r: Any) -> Array:
    """int8 [F, D/R]: one run of one matrix, and nothing else."""
    f, size = w.runs.shape[-2:]
    cut = (1,) * len(index) + (1, f, size)
    at = (*index, r, 0, 0)
    return jax.lax.dynamic_slice(w.runs, at, cut).reshape(f, size)


def row_by_run(
    x: Float32[Array, " D"], w: TurnedTensor, index: Index
) -> Float32[Array, "R F"]:
    """One row times each run. Not added up here: see the chapter."""
    runs, f, size = w.runs.shape[-3:]

    def dot(r: Any) -> Array:
        part = jax.lax.dynamic_slice(x, (r * size,), (size,))
        wide = run_of(w, index, r).astype(jnp.float32)
        return jnp.dot(part, wide.T)[None]                  # [1, F]

    if runs == 1:
        return dot(0)

    def keep(r: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice(y, dot(r), (r, 0))

    empty = jnp.zeros((runs, f), jnp.float32)
    return jax.lax.fori_loop(0, runs, keep, empty)


# %% book/chapters/27_int8_on_a_cpu.md, cell 20
def rows_by_tile(
    x: Float[Array, "N D"], w: TurnedTensor, index: Index, dtype: Any
) -> Float32[Array, "N F"]:
    """Rows times tiles of about a million weights, cast to `dtype`."""
    runs, f, size = w.runs.shape[-3:]
    rows = tile_rows(f, max(128, 2**20 // size))
    tiles, in_group = f // rows, runs // w.scales.shape[-2]
    lead, n = (1,) * len(index), len(x)

    def times(r: Any, first: Any) -> Array:
        at, cut = (*index, r, first, 0), (*lead, 1, rows, size)
        tile = jax.lax.dynamic_slice(w.runs, at, cut)
        tile = tile.reshape(rows, size).astype(dtype)
        part = jax.lax.dynamic_slice(x, (0, r * size), (n, size))
        at, cut = (*index, r // in_group, first), (*lead, 1, rows)
        s = jax.lax.dynamic_slice(w.scales, at, cut).reshape(1, rows)
        return jax.lax.dot_general(
            part.astype(dtype), tile, (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        ) * s.astype(jnp.float32)

    def add(t: Array, y: Array) -> Array:
        r, first = t // tiles, t % tiles * rows
        old = jax.lax.dynamic_slice(y, (0, first), (n, rows))
        new = old + times(r, first)
        return jax.lax.dynamic_update_slice(y, new, (0, first))

    if tiles == 1 and runs <= 16:       # a turn of a loop costs more
        return reduce(jnp.add, [times(r, 0) for r in range(runs)])
    zero = jnp.zeros((n, f), jnp.float32)
    return jax.lax.fori_loop(0, runs * tiles, add, zero)


# %% book/chapters/27_int8_on_a_cpu.md, cell 21
def rows_one_by_one(
    x: Float[Array, "N D"], w: TurnedTensor, index: Index
) -> Float32[Array, "N F"]:
    """Each row in float32 by itself, and the scales."""
    scales = w.scales[index].astype(jnp.float32)            # [G, F]
    runs = w.runs.shape[-3]
    in_group = runs // len(scales)              # runs of one group
    each = [row_by_run(row, w, index) for row in x.astype(jnp.float32)]
    y = jnp.stack(each)                                  # [N, R, F]
    parts = [y[:, r] * scales[r // in_group] for r in range(runs)]
    return reduce(jnp.add, parts)


# %% book/chapters/27_int8_on_a_cpu.md, cell 25
def few_rows() -> int:
    """Up to how many rows are multiplied one by one."""
    return 4 if cpu_has_bfloat16() else 8


def turned_matmul(
    x: Float[Array, "N D"], w: TurnedTensor, index: Index = ()
) -> Float32[Array, "N F"]:
    """x times w[index]: few rows one by one, more in tiles.

    Few are multiplied in float32, and any number on a processor
    without bfloat16 units; else in `x.dtype`. Sums are float32.
    ValueError for scales that do not fit.
    """
    group_size(w)
    index = tuple(jnp.asarray(i, jnp.int32) for i in index)
    if len(x) <= few_rows() and w.runs.shape[-1] < 4096:
        return rows_one_by_one(x, w, index)
    wide = jnp.float32 if not cpu_has_bfloat16() else x.dtype
    return rows_by_tile(x, w, index, wide)


PRODUCTS[TurnedTensor] = turned_matmul


# %% book/chapters/27_int8_on_a_cpu.md, cell 30
def swap_last_two(block: np.ndarray) -> np.ndarray:
    """A copy with the last two axes swapped, by bands that caches hold.
    """
    *lead, d, f = block.shape
    out = np.empty((*lead, f, d), block.dtype)
    for at in np.ndindex(*lead):
        for i in range(0, d, 64):
            out[at][:, i : i + 64] = block[at][i : i + 64].T
    return out


@dataclass(frozen=True)
class TurnedSource:
    """`source` [*E, D, F] as [*E, R, F, D/R], turned when read.

    An index asks for whole runs, or for a piece of one run.
    """

    source: Any
    count: int                              # R

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, d, f = self.source.shape
        return (*lead, self.count, f, d // self.count)

    def __getitem__(self, index: tuple) -> np.ndarray:
        *lead, runs, columns, inside = index
        size = self.shape[-1]
        first, last, _ = runs.indices(self.count)
        start, stop, _ = inside.indices(size)
        rows = slice(first * size + start, (last - 1) * size + stop)
        block = np.asarray(self.source[(*lead, rows, columns)])
        *above, _, f = block.shape
        cut = (*above, last - first, stop - start, f)
        return swap_last_two(block.reshape(cut))


# %% book/chapters/27_int8_on_a_cpu.md, cell 31
SMALLEST = 2**16                        # numbers of a matrix


def stored_on_cpu(q: QuantizedTensor, parts: int) -> QuantizedTensor:
    """How `load` keeps an eight-bit weight in a CPU's memory.

    Turned, unless its matrices have fewer numbers than `SMALLEST`.
    """
    if math.prod(q.shape[-2:]) < SMALLEST:
        return q
    runs = runs_of(q.shape[-2], q.scales.shape[-2], parts)
    return TurnedTensor(TurnedSource(q.weight, runs), q.scales)


STORED["cpu"] = stored_on_cpu


# %% book/chapters/27_int8_on_a_cpu.md, cell 35
def rows_if_turned(w: Any, n: int, a: int, count: int) -> int | None:
    """1 if `count` experts are chosen up to twice, on average.

    None, which is no wish, for more choices, other weights and small
    matrices.
    """
    kind = type(w.stack if isinstance(w, LazySlice) else w)
    if kind is not TurnedTensor or math.prod(w.shape[-2:]) < 2**16:
        return None
    return 1 if n * a <= 2 * count else None


BLOCK_ROWS[TurnedTensor] = BLOCK_ROWS[LazySlice] = rows_if_turned


# %% book/chapters/27_int8_on_a_cpu.md, cell 36
def int8_head(model: Model) -> Model:
    """`model` with an output matrix in 8 bits, a scale for each token.

    On a CPU turned as other weights are. What is saved does not
    change. ValueError on a mesh or where weights stay on disk.
    """
    if model.mesh is not None or not model.in_memory:
        raise ValueError(
            "an output matrix in 8 bits needs a model in the memory of "
            "one device: load it without mesh and stream"
        )
    table = jnp.asarray(head_table(model.params, model.config))
    q = quantize(table.T)                                   # [D, V]
    if jax.default_backend() == "cpu":
        q = turn(q)
    params = {**model.params, "head": {"embeddings": q}}
    return replace(model, params=params)
