# Generated from book/chapters/06_quantization.md by `make sync`; edit the chapter.
"""Grok-1 has 315.7 billion weights. In float32 they fill 1.3 terabytes,
in bfloat16 half of that, and the published files half of that again,
because nearly every weight is an eight-bit integer that shares a scale
with its neighbours. This chapter builds the format, derives how wrong
it can make a matrix product and a logit, and measures that neither is
worse. By its end you will have a product that reads the integers a tile
at a time and never writes the matrix out in a wider type, so that what
was saved on disk stays saved while the model runs.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from annotated_moe.linear import PRODUCTS, product


# %% book/chapters/06_quantization.md, cell 9
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTensor:
    """int8 `weight` [*E, D, F] times bfloat16 `scales` [*E, G, F].

    Input feature d belongs to group d // (D / G). A pytree of two
    leaves: whatever maps over arrays (`jit`, `scan`, `device_put`,
    partition specs) sees `weight` and `scales`.
    Source: `QuantizedWeight8bit` of the Grok-1 release.
    """

    weight: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix (or stack) that this stands for."""
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def specs(self, weight: Any, scales: Any) -> "QuantizedTensor":
        """Its own, where [*E, D, F] and [*E, G, F] have these."""
        return QuantizedTensor(weight, scales)

    def __getitem__(self, index: Any) -> "LazySlice":
        """One matrix, or one stack, of those behind one another."""
        return LazySlice(self, (index,))


# %% book/chapters/06_quantization.md, cell 10
def group_size(q: QuantizedTensor) -> int:
    """How many input features share a scale: D / G.

    Raises ValueError when `scales` does not belong to `weight`.
    """
    *lead, d, f = q.shape
    scales = tuple(q.scales.shape)
    groups = scales[-2] if len(scales) == q.ndim else 0
    if not groups or d % groups or scales != (*lead, groups, f):
        raise ValueError(
            f"scales {scales} do not fit a weight of shape {q.shape}"
        )
    return d // groups


# %% book/chapters/06_quantization.md, cell 11
def quantize(
    w: Float[Array, "*E D F"], groups: int = 1
) -> QuantizedTensor:
    """Round `w` to int8, one bfloat16 scale a group and column.

    Groups cut the input axis D into equal runs. A group whose peak is
    below 1.5e-36 becomes zeros. Raises ValueError when `groups` does
    not divide D, or when `w` is concrete and not finite.
    """
    *lead, d, f = w.shape
    if groups < 1 or d % groups:
        raise ValueError(f"{groups} groups do not divide {d} inputs")
    grouped = w.astype(jnp.float32).reshape(*lead, groups, -1, f)
    peak = jnp.max(jnp.abs(grouped), axis=-2)               # [*E, G, F]
    # Of the weights: a maximum may lose a NaN on a CPU.
    traced = isinstance(peak, jax.core.Tracer)
    if not traced and not jnp.isfinite(w).all():
        raise ValueError("cannot quantize a weight with NaN or inf")
    scales = bfloat16_scales(peak)
    step = jnp.where(scales == 0, 1, scales)
    q = jnp.round(grouped / step[..., None, :]).astype(jnp.int8)
    scales = scales.astype(jnp.bfloat16)
    return QuantizedTensor(q.reshape(w.shape), scales)


# %% book/chapters/06_quantization.md, cell 12
def bfloat16_scales(
    peak: Float[Array, "*E G F"],
) -> Float[Array, "*E G F"]:
    """peak / 127 in float32, already rounded to bfloat16's 8 bits.

    Zero where the quotient is too small to be a normal number.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    scales = jnp.where(peak < 127 * tiny, 0, peak / 127)
    return jax.lax.reduce_precision(scales, 8, 7)


# %% book/chapters/06_quantization.md, cell 13
def dequantize(
    q: QuantizedTensor, dtype: Any = jnp.float32
) -> Float[Array, "*E D F"]:
    """The matrix that `q` stands for: product in float32, then cast.

    Raises ValueError when `scales` does not belong to `weight`.
    """
    *lead, _, f = q.shape
    w = q.weight.reshape(*lead, -1, group_size(q), f)
    scales = q.scales.astype(jnp.float32)[..., None, :]
    w = w.astype(jnp.float32) * scales
    return w.reshape(q.shape).astype(dtype)


# %% book/chapters/06_quantization.md, cell 19
def step_of_each_weight(q: QuantizedTensor) -> Float32[Array, "*E D F"]:
    """What one more in a weight's integer adds: its group's scale."""
    scales = q.scales.astype(jnp.float32)                   # [*E, G, F]
    return jnp.repeat(scales, group_size(q), axis=-2)


# %% book/chapters/06_quantization.md, cell 33
def change_bound(
    gradients: Any, quantized: Any
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """How far 8 bits move a number: the worst case, and typically.

    `gradients` holds the number's derivative by each float weight,
    `quantized` what the weights became: pytrees with the same leaves,
    float arrays in the one, in the other a `QuantizedTensor` for each
    that was rounded. To first order in the step. ValueError when
    scales do not fit. Source: the triangle inequality; Bennett (1948).
    """
    def reach(q, g):
        rounded = isinstance(q, QuantizedTensor)
        return g * step_of_each_weight(q) if rounded else 0 * g

    def whole(q):
        return isinstance(q, QuantizedTensor)

    parts = jax.tree.map(reach, quantized, gradients, is_leaf=whole)
    every = [part.ravel() for part in jax.tree.leaves(parts)]
    far = jnp.concatenate(every)                    # of each weight
    return jnp.abs(far).sum() / 2, jnp.sqrt((far**2).sum() / 12)


# %% book/chapters/06_quantization.md, cell 41
Index = tuple[Any, ...]                                     # of a stack


def whole_matmul(
    x: Float[Array, "N D"], q: QuantizedTensor, index: Index = ()
) -> Float[Array, "N F"]:
    """x times q[index]: product first, scale after; float32.

    The int8 weights are cast to `x.dtype`, which is exact.
    """
    scales = q.scales[index].astype(jnp.float32)            # [G, F]
    groups, f = scales.shape
    xg = x.reshape(len(x), groups, -1).swapaxes(0, 1)      # [G, N, D/G]
    wg = q.weight[index].reshape(groups, -1, f).astype(x.dtype)
    y = jnp.einsum(
        "gnd,gdf->gnf", xg, wg, preferred_element_type=jnp.float32
    )
    return jnp.sum(y * scales[:, None], axis=0)


# %% book/chapters/06_quantization.md, cell 51
def read_rows(
    stack: Shaped[Array, "*E D F"],
    index: Index,
    start: Any,
    rows: int,
) -> Shaped[Array, "{rows} F"]:
    """Rows start : start + rows of stack[index], and nothing else."""
    size = (1,) * len(index) + (rows, stack.shape[-1])
    tile = jax.lax.dynamic_slice(stack, (*index, start, 0), size)
    return tile.reshape(rows, stack.shape[-1])


# %% book/chapters/06_quantization.md, cell 52
def tile_rows(group: int, target: int) -> int:
    """The divisor of `group` nearest to `target`, as a ratio."""
    divisors = [t for t in range(1, group + 1) if group % t == 0]
    return min(divisors, key=lambda t: max(t / target, target / t))


# %% book/chapters/06_quantization.md, cell 55
@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (Linux, x86).
    """
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "ignore")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16"})


# %% book/chapters/06_quantization.md, cell 56
def tiled_matmul(
    x: Float[Array, "N D"], q: QuantizedTensor, index: Index = ()
) -> Float[Array, "N F"]:
    """`whole_matmul` a tile of rows at a time; one tile is ever wide.

    Up to eight rows are multiplied in float32, and any number on a
    processor without bfloat16 units; else in `x.dtype`. Sums are
    float32 in both cases.
    """
    (n, d), f = x.shape, q.shape[-1]
    group = d // q.scales.shape[-2]
    few_and_narrow = n < 32 and f < 1024
    target = 128 if few_and_narrow else max(128, 2**20 // f)
    rows = tile_rows(group, target)
    wide = n <= 8 or not cpu_has_bfloat16()
    dtype = jnp.float32 if wide else x.dtype

    def add_tile(t, total):
        start = t * rows
        w = read_rows(q.weight, index, start, rows).astype(dtype)
        s = read_rows(q.scales, index, start // group, 1)   # [1, F]
        xt = jax.lax.dynamic_slice(x, (0, start), (n, rows))
        xt = xt.astype(dtype)
        y = jnp.dot(xt, w, preferred_element_type=jnp.float32)
        return total + y * s.astype(jnp.float32)

    zero = jnp.zeros((n, f), jnp.float32)
    return jax.lax.fori_loop(0, d // rows, add_tile, zero)


# %% book/chapters/06_quantization.md, cell 62
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LazySlice:
    """`stack[index]` of a stack of weights, not read yet.

    `stack` is an array or a `QuantizedTensor`, `index` a tuple of
    integers. A pytree of both. Indexing goes deeper.
    """

    stack: Any
    index: Index

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[len(self.index) :])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    def __getitem__(self, index: Any) -> "LazySlice":
        return LazySlice(self.stack, (*self.index, index))


# %% book/chapters/06_quantization.md, cell 64
def cut_as_bits(
    w: Float[Array, "*L D F"], index: Index
) -> Float[Array, "D F"]:
    """w[index] of 16-bit floats, read as the integers they are."""
    w, index = jax.lax.optimization_barrier((w, index))
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits[index], w.dtype)


# %% book/chapters/06_quantization.md, cell 65
def read_slice(w: LazySlice) -> Float[Array, "..."]:
    """The matrix, of which a CPU does not widen more than that."""
    stack = jnp.asarray(w.stack)
    if not w.index or stack.dtype != jnp.bfloat16:
        return stack[w.index]
    index = tuple(jnp.asarray(i, jnp.int32) for i in w.index)
    return jax.lax.platform_dependent(
        stack, index, cpu=cut_as_bits, default=lambda w, i: w[i]
    )


# %% book/chapters/06_quantization.md, cell 66
MOST_GROUPS = 64                                    # one by one


def matmul_by_group(
    x: Float[Array, "N D"], q: QuantizedTensor, index: Index = ()
) -> Float[Array, "N F"]:
    """`whole_matmul`, a group of scales at a time if they are few."""
    scales = q.scales[index].astype(jnp.float32)            # [G, F]
    groups = len(scales)
    if groups > MOST_GROUPS:
        return whole_matmul(x, q, index)
    size = x.shape[1] // groups
    total = jnp.zeros((len(x), q.shape[-1]), jnp.float32)
    for g in range(groups):
        w = read_rows(q.weight, index, g * size, size).astype(x.dtype)
        xg = x[:, g * size : (g + 1) * size]
        y = jnp.dot(xg, w, preferred_element_type=jnp.float32)
        total = total + y * scales[g]
    return total


# %% book/chapters/06_quantization.md, cell 68
def quantized_matmul(
    x: Float[Array, "N D"], w: QuantizedTensor, index: Index = ()
) -> Float32[Array, "N F"]:
    """x times w[index], in tiles on a CPU. ValueError for scales that
    do not fit.
    """
    group_size(w)
    index = tuple(jnp.asarray(i, jnp.int32) for i in index)
    return jax.lax.platform_dependent(
        x, w, index, cpu=tiled_matmul, default=matmul_by_group
    )


# %% book/chapters/06_quantization.md, cell 69
def slice_matmul(
    x: Float[Array, "N D"], w: LazySlice
) -> Float32[Array, "N F"]:
    """x times a slice that is read where it is multiplied."""
    index = tuple(jnp.asarray(i, jnp.int32) for i in w.index)
    if index:       # or a loop over one expert cuts it out beforehand
        index = jax.lax.optimization_barrier(index)
    if isinstance(w.stack, QuantizedTensor):
        return PRODUCTS[type(w.stack)](x, w.stack, index)
    return product(x, read_slice(LazySlice(w.stack, index)))


PRODUCTS[QuantizedTensor] = quantized_matmul
PRODUCTS[LazySlice] = slice_matmul


# %% book/chapters/06_quantization.md, cell 70
def as_float(w: Any) -> Float[Array, "..."]:
    """A weight of any type as an array; quantized ones as float32."""
    if isinstance(w, LazySlice):
        return as_float(jax.tree.map(lambda s: s[w.index], w.stack))
    if isinstance(w, QuantizedTensor):
        return dequantize(w)
    return jnp.asarray(w)
