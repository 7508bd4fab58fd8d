# Generated from book/chapters/04_attention.md by `make sync`; edit the chapter.
"""To choose the next word a transformer looks back at every word before
it. What it looks at are keys and values, computed once a token and
kept; if each head of Grok-1 kept its own, one conversation of 8,192
tokens would hold 12 GiB of them. This chapter builds attention that
fits: query heads that share keys and values, a cache in which rows of
different length decode together, and a running softmax that reads the
longest prompt in memory that does not grow with its square.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from annotated_moe import sharding
from annotated_moe.rope import rope
from annotated_moe.sharding import matmul


# %% book/chapters/04_attention.md, cell 6
def attention_scores(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    multiplier: float,
    softcap: float | None = None,
) -> Float32[Array, "B K R T S"]:
    """Every query times every key, scaled and capped, in float32.

    Query head i reads key head i // R, where R = Q / K.
    K must divide Q, else ValueError.
    Source: Ainslie et al. (2023); the cap as in Grok-1.
    """
    b, t, heads, h = q.shape
    if heads % k.shape[2]:
        raise ValueError(
            f"{heads} query heads cannot share {k.shape[2]} key heads"
        )
    q = q.reshape(b, t, k.shape[2], -1, h)             # [B, T, K, R, H]
    s = jnp.einsum(
        "btkrh,bskh->bkrts", q, k, preferred_element_type=jnp.float32
    )
    s *= multiplier
    return softcap * jnp.tanh(s / softcap) if softcap else s


# %% book/chapters/04_attention.md, cell 20
def causal_mask(
    positions: Int32[Array, "B T"], slots: int
) -> Bool[Array, "B T {slots}"]:
    """True where a token may read a slot: slot <= position.

    Positions count from 0. One at or past `slots` sees every slot.
    """
    return jnp.arange(slots) <= positions[..., None]        # [B, T, S]


# %% book/chapters/04_attention.md, cell 23
HIDDEN = -1e30


def attend(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    multiplier: float,
    softcap: float | None = None,
) -> Float[Array, "B T Q H"]:
    """Softmax attention, all scores at once: memory grows with T x S.

    Scores and softmax in float32, weights in `v.dtype`, sums in
    float32; returns `q.dtype`. K must divide Q, else ValueError.
    Source: Vaswani et al. (2017), section 3.2; casts as in Grok-1.
    """
    s = attention_scores(q, k, multiplier, softcap)
    s = jnp.where(mask[:, None, None], s, HIDDEN)      # [B, K, R, T, S]
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    y = jnp.einsum(
        "bkrts,bskh->btkrh", p, v, preferred_element_type=jnp.float32
    )
    return y.reshape(q.shape).astype(q.dtype)


# %% book/chapters/04_attention.md, cell 32
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, and how many tokens each row has.

    `k` and `v` are [L, B, S, K, H] in the compute dtype, `length` is
    int32 [B]. A pytree: `scan`, `jit` and `donate` see three arrays,
    and shapes or shardings may stand in their place. Layers that look
    back only so far have theirs in `near_k` and `near_v`, which Grok-1
    has not.
    """

    k: Any
    v: Any
    length: Any
    near_k: Any = None
    near_v: Any = None


# %% book/chapters/04_attention.md, cell 33
def write_cache(
    stack: Float[Array, "L B S K H"],
    layer: int | Int32[Array, ""],
    x: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
) -> Float[Array, "L B S K H"]:
    """Put `x` at `positions` of `stack[layer]`, cast to its dtype.

    A position outside 0 .. S - 1 is dropped, never clamped or wrapped.
    A `layer` that is not there, or other axes, are a ValueError.
    """
    if isinstance(layer, int) and not 0 <= layer < len(stack):
        raise ValueError(f"no layer {layer} in a cache of {len(stack)}")
    if x.shape[:1] + x.shape[2:] != stack.shape[1:2] + stack.shape[3:]:
        raise ValueError(f"{x.shape} does not fit cache {stack.shape}")
    rows = jnp.arange(stack.shape[1])[:, None]              # [B, 1]
    x = x.astype(stack.dtype).reshape(*x.shape[:2], -1)     # [B, T, KH]
    # Heads as one axis: with two, XLA copies the stack on a TPU.
    flat = stack.reshape(*stack.shape[:3], -1)             # [.., S, KH]
    flat = flat.at[layer, rows, positions].set(
        x, mode="drop", wrap_negative_indices=False
    )
    return flat.reshape(stack.shape)


# %% book/chapters/04_attention.md, cell 38
Running = tuple[
    Float32[Array, "B K R T"],
    Float32[Array, "B K R T"],
    Float32[Array, "B K R T H"],
]


def absorb_block(
    running: Running,
    s: Float32[Array, "B K R T S"],
    v: Float[Array, "B S K H"],
) -> Running:
    """Take scores `s` and values `v` into (top, total, y).

    The attention so far is y / total. Computes in float32, with the
    weights rounded to `v.dtype` for the sum of values.
    Source: Milakov & Gimelshein (2018), algorithm 3.
    """
    top, total, y = running
    higher = jnp.maximum(top, s.max(-1))                  # [B, K, R, T]
    fade = jnp.exp(top - higher)
    p = jnp.exp(s - higher[..., None])                 # [B, K, R, T, S]
    part = jnp.einsum(
        "bkrts,bskh->bkrth", p.astype(v.dtype), v,
        preferred_element_type=jnp.float32,
    )
    return higher, fade * total + p.sum(-1), fade[..., None] * y + part


# %% book/chapters/04_attention.md, cell 39
def absorb_all(
    score: Callable[[Array], Float32[Array, "B K R T S"]],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sees: Callable[[Array], Bool[Array, "B T S"]],
    shape: tuple[int, ...],
    block: int,
) -> Running:
    """Absorb the slots that a token `sees`, `block` at a time.

    `shape` is (K, R, T, H); `block` divides the number of slots.
    """
    (b, slots), (kv, r, t, h) = k.shape[:2], shape

    def body(running, start):
        ks = jax.lax.dynamic_slice_in_dim(k, start, block, axis=1)
        vs = jax.lax.dynamic_slice_in_dim(v, start, block, axis=1)
        seen = sees(start + jnp.arange(block))[:, None, None]
        s = jnp.where(seen, score(ks), HIDDEN)
        return absorb_block(running, s, vs), None

    top = jnp.full((b, kv, r, t), HIDDEN, jnp.float32)
    nothing = top, jnp.zeros((b, kv, r, t)), jnp.zeros((b, kv, r, t, h))
    body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, nothing, jnp.arange(0, slots, block))[0]


# %% book/chapters/04_attention.md, cell 40
def attend_blockwise(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int32[Array, "B T"],
    multiplier: float,
    softcap: float | None = None,
    block: int = 512,
    sees: Callable[[Array], Bool[Array, "B T S"]] | None = None,
) -> Float[Array, "B T Q H"]:
    """`attend` under `causal_mask`, in memory that grows with T.

    `sees` gives another mask, for the slots that it is asked about.
    The same casts; sums in another order. Returns `q.dtype`.
    A `block` below 1, or K not dividing Q, is a ValueError.
    Source: Dao et al. (2022), algorithm 1, in plain JAX.
    """
    if block < 1:
        raise ValueError(f"a block needs at least 1 slot, got {block}")
    slots, (_, t, heads, h) = k.shape[1], q.shape
    shape = k.shape[2], heads // k.shape[2], t, h
    last = jnp.minimum(positions, slots - 1)[..., None]
    sees = sees or (lambda slots: slots <= last)
    sizes = ((0, 0), (0, -slots % block), (0, 0), (0, 0))
    k, v = jnp.pad(k, sizes), jnp.pad(v, sizes)
    how: Any = {"multiplier": multiplier, "softcap": softcap}
    score = partial(attention_scores, q, **how)
    _, total, y = absorb_all(score, k, v, sees, shape, block)
    y = (y / total[..., None]).transpose(0, 3, 1, 2, 4)
    return y.reshape(q.shape).astype(q.dtype)             # [B, T, Q, H]


# %% book/chapters/04_attention.md, cell 48
class Linear(hk.Module):
    """x times `w` [D, F], which may be quantized, plus maybe `b` [F].

    `axes` names the mesh axes that split D and F.
    """

    def __init__(
        self, size: int, axes: tuple[str | None, str | None], name: str,
        bias: bool = False,
    ):
        super().__init__(name=name)
        self.size, self.axes, self.bias = size, axes, bias

    def __call__(
        self, x: Float[Array, "*B D"]
    ) -> Float32[Array, "*B F"]:
        *lead, d = x.shape
        init = hk.initializers.VarianceScaling(1.0)
        w = hk.get_parameter("w", (d, self.size), jnp.float32, init)
        y = matmul(x.reshape(-1, d), w, self.axes)
        if self.bias:
            zeros = jnp.zeros
            y += hk.get_parameter("b", y.shape[-1:], jnp.float32, zeros)
        return y.reshape(*lead, self.size)


# %% book/chapters/04_attention.md, cell 49
BLOCKWISE_ABOVE = 1024                                      # slots


def attend_causal(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int32[Array, "B T"],
    multiplier: float,
    softcap: float | None,
) -> Float[Array, "B T Q H"]:
    """Causal attention, in blocks where the scores would be many."""
    if q.shape[1] > 1 and k.shape[1] > BLOCKWISE_ABOVE:
        return attend_blockwise(q, k, v, positions, multiplier, softcap)
    mask = causal_mask(positions, k.shape[1])
    return attend(q, k, v, mask, multiplier, softcap)


# %% book/chapters/04_attention.md, cell 50
def project(
    x: Float[Array, "B T D"], heads: int, head_size: int, name: str,
    bias: bool = False,
) -> Float32[Array, "B T {heads} {head_size}"]:
    """`x` through the Linear `name`, cut into heads."""
    y = Linear(heads * head_size, ("data", "model"), name, bias)(x)
    return y.reshape(*x.shape[:2], heads, head_size)


def extend(
    cache: KVCache,
    layer: int | Int32[Array, ""],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
) -> KVCache:
    """`write_cache` for keys and values; `length` is the caller's."""
    return replace(
        cache,
        k=write_cache(cache.k, layer, k, positions),
        v=write_cache(cache.v, layer, v, positions),
    )


# %% book/chapters/04_attention.md, cell 51
def attend_cached(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    multiplier: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T Q H"], KVCache | None]:
    """Attend over the cache, extended first, or over k and v alone."""
    if cache is not None:
        cache = extend(cache, layer, k, v, positions)
        k, v = cache.k[layer], cache.v[layer]             # [B, S, K, H]
    y = attend_causal(q, k, v, positions, multiplier, softcap)
    return y, cache


# %% book/chapters/04_attention.md, cell 52
def check_heads(cache: KVCache | None, heads: int) -> None:
    """ValueError unless a cache holds as many heads as come in."""
    if cache is not None and cache.k.shape[3] != heads:
        raise ValueError(
            f"a cache of {cache.k.shape[3]} heads, where this mesh "
            f"holds {heads}: make it with init_cache on the mesh"
        )


# %% book/chapters/04_attention.md, cell 53
def attend_on_mesh(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    run: Callable,
) -> tuple[Float[Array, "B T Q H"], KVCache | None]:
    """`run`, such as `attend_cached`: on a mesh, rows are cut over
    `data` and heads over `model`.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return run(q, k, v, positions, cache, layer)
    check_heads(cache, k.shape[2])
    rows = sharding.fit("data", q.shape[0], mesh)
    x = P(rows, None, sharding.fit("model", q.shape[2], mesh), None)
    store = jax.tree.map(
        lambda a: P(None, *x) if a.ndim == 5 else P(rows), cache
    )
    return jax.shard_map(
        run,
        in_specs=(x, x, x, P(rows), store, P()),
        out_specs=(x, store),
        check_vma=False,
    )(q, k, v, positions, cache, jnp.asarray(layer))


# %% book/chapters/04_attention.md, cell 54
def as_they_are(*heads: Float[Array, "B T _ H"]) -> Any:
    """Queries, keys and values of which nothing is asked first."""
    return heads


def turn_both(
    q: Float[Array, "B T Q H"], k: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"], turn: Callable,
) -> Any:
    """Queries and keys, turned."""
    return turn(q, positions), turn(k, positions)


# %% book/chapters/04_attention.md, cell 55
@dataclass(frozen=True)
class Changes:
    """What may be done otherwise between the projections."""

    ready: Callable = as_they_are               # first of all
    turn: Callable = turn_both                  # rotation, or not
    look: Callable = attend_cached              # cache and attention
    bias: bool = False                          # of the projections


# %% book/chapters/04_attention.md, cell 56
class AttentionSizes(hk.Module):
    """What `MultiHeadAttention` is told, checked."""

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        head_size: int,
        multiplier: float,
        softcap: float | None = 30.0,
        rope_base: float = 10000.0,
        name: str = "multi_head_attention",
        **changes: Any,
    ):
        super().__init__(name=name)
        if kv_heads < 1 or q_heads % kv_heads:
            heads = f"{q_heads} query heads cannot share {kv_heads}"
            raise ValueError(f"{heads} key heads")
        if head_size % 2:
            raise ValueError(f"RoPE needs even heads, not {head_size}")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is positive or None: {softcap}")
        self.q_heads, self.kv_heads = q_heads, kv_heads
        self.head_size, self.rope_base = head_size, rope_base
        self.multiplier, self.softcap = multiplier, softcap
        self.changes = Changes(**changes)


# %% book/chapters/04_attention.md, cell 57
class Projections(AttentionSizes):
    """Queries, keys and values of a layer."""

    @hk.transparent
    def heads(self, x: Float[Array, "B T D"]) -> Any:
        """`x` through three projections, each cut into its heads."""
        size, bias = self.head_size, self.changes.bias
        q = project(x, self.q_heads, size, "query", bias)
        k = project(x, self.kv_heads, size, "key", bias)
        v = project(x, self.kv_heads, size, "value", bias)
        return q, k, v


# %% book/chapters/04_attention.md, cell 58
class MultiHeadAttention(Projections):
    """Grouped-query attention with RoPE, soft cap, maybe a cache."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache | None = None,
        layer: int | Int32[Array, ""] = 0,
    ) -> tuple[Float32[Array, "B T D"], KVCache | None]:
        """Attend from `x` at `positions`, a cache extended first.

        Heads are rounded to `x.dtype`; the result is float32.
        """
        ours = self.changes
        q, k, v = ours.ready(*self.heads(x))
        k, v = sharding.spread_heads(k, v, self.q_heads)
        turn = partial(rope, base=self.rope_base)
        q, k = ours.turn(q, k, positions, turn)
        q, k, v = (z.astype(x.dtype) for z in (q, k, v))
        look: Any = partial(ours.look, multiplier=self.multiplier,
                            softcap=self.softcap)
        job = q, k, v, positions, cache, layer
        y, cache = attend_on_mesh(*job, look)
        y = y.reshape(*x.shape[:2], -1)                     # [B, T, QH]
        axes = "model", "data"
        out = Linear(x.shape[-1], axes, "linear", ours.bias)
        return out(y), cache
