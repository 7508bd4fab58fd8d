# Generated from book/chapters/04_attention.md, book/chapters/16_mixtral.md, book/chapters/18_llama4.md, book/chapters/20b_flash.md, book/chapters/23_training.md, book/chapters/29_caches.md by `make sync`; edit the chapters.
"""To choose the next word a transformer looks back at every word before
it. What it looks at are keys and values, computed once a token and
kept; if each head of Grok-1 kept its own, one conversation of 8,192
tokens would hold 12 GiB of them. This chapter builds attention that
fits. By its end you will have query heads that share keys and values, a
cache in which batch rows of different length decode together and
conversations come and go, a softmax that reads the longest prompt
without ever holding all its scores, and one module that does the three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from annotated_moe.cache import (
    PAD_POSITION,
    EightBitHeads,
    KeptHeads,
    KVCache,
    RingCache,
)
from annotated_moe.linear import Linear
from annotated_moe.placement import here
from annotated_moe.rms_norm import RMSNorm, rms_norm
from annotated_moe.rope import DOCUMENT_STRIDE, Rope
from annotated_moe.specs import Positive, Size, Spec


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
    q = q.reshape(b, t, k.shape[2], -1, h).transpose(0, 2, 3, 1, 4)
    s = jnp.einsum(                             # q is [B, K, R, T, H]
        "bkrth,bskh->bkrts", q, k, preferred_element_type=jnp.float32
    )
    s *= multiplier
    return softcap * jnp.tanh(s / softcap) if softcap else s


# %% book/chapters/04_attention.md, cell 14
def is_past(
    q: Int32[Array, "B T 1"], k: Int32[Array, "#B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where a key is there and does not follow its query.

    `q` and `k` are positions, counted from 0. A negative one says
    that there is no key.
    """
    return (k >= 0) & (k <= q)


def causal_mask(
    positions: Int32[Array, "B T"], slots: int
) -> Bool[Array, "B T {slots}"]:
    """`is_past` for keys at positions 0, 1, ..., slots - 1."""
    return is_past(positions[..., None], jnp.arange(slots)[None, None])


# %% book/chapters/04_attention.md, cell 17
MASK_VALUE = -1e30


def attend(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Bool[Array, "B T S"],
    multiplier: float,
    softcap: float | None = None,
) -> Float[Array, "B T Q V"]:
    """Softmax attention, all scores at once: memory grows with T x S.

    Scores and softmax in float32, weights in `v.dtype`, sums in
    float32; returns `q.dtype`. K must divide Q, else ValueError.
    Source: Vaswani et al. (2017), section 3.2.
    """
    s = attention_scores(q, k, multiplier, softcap)
    s = jnp.where(mask[:, None, None], s, MASK_VALUE)  # [B, K, R, T, S]
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    y = jnp.einsum(
        "bkrts,bskh->bkrth", p, v, preferred_element_type=jnp.float32
    )
    y = y.transpose(0, 3, 1, 2, 4)                  # [B, T, K, R, V]
    return y.reshape(*q.shape[:3], -1).astype(q.dtype)


# %% book/chapters/04_attention.md, cell 55
SoftmaxState = tuple[
    Float32[Array, "B K R T"],
    Float32[Array, "B K R T"],
    Float32[Array, "B K R T V"],
]


def absorb_block(
    state: SoftmaxState,
    s: Float32[Array, "B K R T S"],
    v: Float[Array, "B S K V"],
) -> SoftmaxState:
    """Take scores `s` and values `v` into (top, total, y).

    The attention so far is y / total. Computes in float32, with the
    weights rounded to `v.dtype` for the sum of values.
    Source: Milakov & Gimelshein (2018), algorithm 3, for the
    normaliser; Rabe & Staats (2021) for the values.
    """
    top, total, y = state
    higher = jnp.maximum(top, s.max(-1))                  # [B, K, R, T]
    fade = jnp.exp(top - higher)
    p = jnp.exp(s - higher[..., None])                 # [B, K, R, T, S]
    part = jnp.einsum(
        "bkrts,bskh->bkrth", p.astype(v.dtype), v,
        preferred_element_type=jnp.float32,
    )
    return higher, fade * total + p.sum(-1), fade[..., None] * y + part


# %% book/chapters/04_attention.md, cell 56
Sees = Callable[[Array, Array], Bool[Array, "B T S"]]


def attend_blockwise(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None = None,
    sees: Sees = is_past,
    block: int = 512,
) -> Float[Array, "B T Q V"]:
    """`attend` under the mask `sees`, in memory that grows with T.

    `sees` is asked for queries' and keys' positions. The same casts;
    sums in another order. A `block` of keys below 1, or K not dividing
    Q, is a ValueError.
    Source: Rabe & Staats (2021), in blocks of keys alone.
    """
    if block < 1:
        raise ValueError(f"a block needs at least 1 slot, got {block}")
    fill = -k.shape[1] % block
    wide = (0, 0), (0, fill), (0, 0), (0, 0)
    k, v = jnp.pad(k, wide), jnp.pad(v, wide)
    at = jnp.pad(key_positions, wide[:2], constant_values=PAD_POSITION)

    def body(state: Any, start: Array) -> Any:
        ks, vs, ps = (
            jax.lax.dynamic_slice_in_dim(a, start, block, axis=1)
            for a in (k, v, at)
        )
        seen = sees(positions[..., None], ps[:, None])[:, None, None]
        s = attention_scores(q, ks, multiplier, softcap)
        s = jnp.where(seen, s, MASK_VALUE)
        return absorb_block(state, s, vs), None

    b, t, heads, _ = q.shape
    shape = b, k.shape[2], heads // k.shape[2], t
    top = jnp.full(shape, MASK_VALUE, jnp.float32)
    empty = top, jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))
    # Backward computes a block's scores again instead of keeping them.
    body = jax.checkpoint(body, prevent_cse=False)
    starts = jnp.arange(0, k.shape[1], block)
    _, total, y = jax.lax.scan(body, empty, starts)[0]
    y = (y / total[..., None]).transpose(0, 3, 1, 2, 4)
    return y.reshape(b, t, heads, -1).astype(q.dtype)


# %% book/chapters/04_attention.md, cell 64
BLOCKWISE_ABOVE = 1024                                      # slots


def attend_any(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None = None,
    sees: Sees = is_past,
) -> Float[Array, "B T Q V"]:
    """`attend`, or in blocks where the scores would be many."""
    if q.shape[1] > 1 and k.shape[1] > BLOCKWISE_ABOVE:
        return attend_blockwise(
            q, k, v, positions, key_positions, multiplier, softcap, sees
        )
    mask = sees(positions[..., None], key_positions[:, None])
    return attend(q, k, v, mask, multiplier, softcap)


WAYS_TO_ATTEND: list[Callable[..., Array]] = [attend_any]


# %% book/chapters/04_attention.md, cell 77
@dataclass(frozen=True)
class Causal(Spec):
    """Which positions a layer sees: all up to its own.

    What is seen decides what must be kept.
    """

    def sees(
        self, q: Int32[Array, "B T 1"], k: Int32[Array, "#B 1 S"]
    ) -> Bool[Array, "B T S"]:
        return is_past(q, k)

    def empty_cache(
        self, k_shape: tuple[int, ...], v_shape: tuple[int, ...],
        dtype: Any,
    ) -> KVCache:
        """For keys and values [L, B, S, K, H], of rows without tokens.
        """
        k, v = jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype)
        return KVCache(k, v, jnp.zeros(k_shape[1], jnp.int32))


# %% book/chapters/04_attention.md, cell 78
@dataclass(frozen=True)
class AttentionSpec(Spec):
    """Grouped-query attention, as a layer of it is described."""

    q_heads: Size                           # a multiple of kv_heads
    kv_heads: Size                          # what the cache pays for
    head_size: Size                         # features a head
    multiplier: Positive                    # of scores: head_size**-0.5
    softcap: Positive | None = None         # None: no cap
    rope: Rope | None = Rope()              # None: no rotation
    mask: Causal = Causal()
    bias: bool = False                      # of the four projections
    value_size: Size | None = None          # None: head_size

    def check(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"{self.q_heads} query heads cannot share "
                f"{self.kv_heads} key heads"
            )
        if self.rope and self.head_size % 2:
            raise ValueError(
                f"RoPE needs an even head_size, not {self.head_size}"
            )

    @property
    def value_width(self) -> int:
        return self.value_size or self.head_size

    def build(self) -> "Attention":
        return Attention(self)

    def empty_cache(
        self, layers: int, batch: int, slots: int, dtype: Any
    ) -> KVCache:
        """For L layers of these; `slots` tokens a row, if all are kept.
        """
        copies = here().head_copies(self.kv_heads, self.q_heads)
        lead = layers, batch, slots, copies * self.kv_heads
        return self.mask.empty_cache(
            (*lead, self.head_size), (*lead, self.value_width), dtype
        )


# %% book/chapters/04_attention.md, cell 81
def project(
    x: Float[Array, "B T D"], heads: int, size: int, name: str,
    bias: bool,
) -> Float32[Array, "B T {heads} {size}"]:
    """`x` through the Linear `name`, cut into heads."""
    axes = "embed", "heads" if name == "query" else "kv_heads"
    y = Linear(heads * size, axes, name, bias)(x)
    return y.reshape(*x.shape[:2], heads, size)


# %% book/chapters/04_attention.md, cell 82
def look_back(
    attend: Callable[..., Array],
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    per_head: dict[str, Array],
) -> tuple[Float[Array, "B T Q V"], KVCache | None]:
    """`attend` to the cache, extended first, or to k and v alone.

    `per_head` are further arguments of `attend`; the first axis of
    each counts heads. ValueError where the cache has other heads.
    """
    if cache is not None and cache.k.shape[3] != k.shape[2]:
        raise ValueError(
            f"a cache of {cache.k.shape[3]} heads, where {k.shape[2]} "
            "come in: make it on the same devices"
        )

    def run(
        q: Array, k: Array, v: Array, positions: Array, cache: Any,
        layer: Any, per_head: dict[str, Array],
    ) -> Any:
        at = positions
        if cache is not None:
            cache, k, v, at = cache.update(layer, k, v, positions)
        return attend(q, k, v, positions, at, **per_head), cache

    heads, rows = ("batch", None, "heads", None), ("batch", None)
    kept = None if cache is None else cache.axes
    own = {name: ("heads",) + (None,) * (w.ndim - 1)
           for name, w in per_head.items()}
    axes = heads, heads, heads, rows, kept, (), own
    run = here().split(run, axes, (heads, kept))
    return run(q, k, v, positions, cache, jnp.asarray(layer), per_head)


# %% book/chapters/04_attention.md, cell 83
class Attention(hk.Module):
    """Grouped-query attention with RoPE, soft cap, maybe a cache."""

    def __init__(
        self, spec: AttentionSpec, name: str = "multi_head_attention"
    ) -> None:
        super().__init__(name=name)
        self.spec = spec

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
        s = self.spec
        q = project(x, s.q_heads, s.head_size, "query", s.bias)
        k = project(x, s.kv_heads, s.head_size, "key", s.bias)
        v = project(x, s.kv_heads, s.value_width, "value", s.bias)
        k, v = here().gather_heads(k, v, s.q_heads)
        q, k, v = self.prepare(q, k, v, positions)
        k, v = here().spread_heads(k, v, s.q_heads)
        q, k, v = (z.astype(x.dtype) for z in (q, k, v))
        y, cache = look_back(
            self.attend, q, k, v, positions, cache, layer,
            self.per_head(),
        )
        y = y.reshape(*x.shape[:2], -1)                     # [B, T, QV]
        axes = "heads", "embed"
        return Linear(x.shape[-1], axes, "linear", s.bias)(y), cache

    @hk.transparent
    def prepare(
        self, q: Array, k: Array, v: Array, positions: Array
    ) -> tuple[Array, Array, Array]:
        """Heads [B, T, Q or K, H] as they will be compared."""
        if (turn := self.spec.rope) is None:
            return q, k, v
        return turn.turn(q, positions), turn.turn(k, positions), v

    @hk.transparent
    def per_head(self) -> dict[str, Array]:
        """More for `attend`; the first axis of each counts heads."""
        return {}

    def attend(
        self, q: Array, k: Any, v: Any, positions: Array,
        key_positions: Array,
    ) -> Array:
        """What `attend_any` does."""
        s = self.spec
        return WAYS_TO_ATTEND[-1](
            q, k, v, positions, key_positions, s.multiplier, s.softcap,
            s.mask.sees,
        )


# %% book/chapters/16_mixtral.md, cell 7
def within_window(
    q: Int32[Array, "B T 1"], k: Int32[Array, "#B 1 S"], size: int
) -> Bool[Array, "B T S"]:
    """True where a key is one of the last `size` up to its query."""
    return is_past(q, k) & (k > q - size)


# %% book/chapters/16_mixtral.md, cell 13
@dataclass(frozen=True)
class Window(Causal):
    """The last `size` positions, a layer's own among them."""

    size: Size = 4096

    def sees(
        self, q: Int32[Array, "B T 1"], k: Int32[Array, "#B 1 S"]
    ) -> Bool[Array, "B T S"]:
        return within_window(q, k, self.size)

    def empty_cache(
        self, k_shape: tuple[int, ...], v_shape: tuple[int, ...],
        dtype: Any,
    ) -> KVCache:
        """A ring of `size` slots, or fewer slots that hold all."""
        if k_shape[2] < self.size:
            return super().empty_cache(k_shape, v_shape, dtype)
        k, v = (
            jnp.zeros((*shape[:2], self.size, *shape[3:]), dtype)
            for shape in (k_shape, v_shape)
        )
        return RingCache(k, v, jnp.zeros(k_shape[1], jnp.int32))


# %% book/chapters/16_mixtral.md, cell 48
def norm_qk(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    eps: float,
    whole: bool = False,
) -> tuple[Array, Array]:
    """Queries and keys through a norm of their own, before RoPE.

    One gain a feature of a head, `scale` [H], the same for all heads
    (Qwen3), or with `whole` the norm of the whole projection, [Q*H] and
    [K*H] (OLMoE). Inside a Haiku transform.
    """
    def normed(x: Array, name: str) -> Array:
        wide = x.reshape(*x.shape[:2], -1) if whole else x
        return RMSNorm(eps, name)(wide).reshape(x.shape)

    return normed(q, "query_norm"), normed(k, "key_norm")


# %% book/chapters/16_mixtral.md, cell 53
@dataclass(frozen=True)
class NormedAttentionSpec(AttentionSpec):
    """Attention whose queries and keys are normed, and maybe clipped.

    Source: Qwen3, where each head is; OLMoE, where the whole
    projection is, and queries, keys and values are cut at `clip`.
    """

    norm_eps: Positive = 1e-6
    whole_norm: bool = False                # or head by head
    clip: Positive | None = None

    def build(self) -> "NormedAttention":
        return NormedAttention(self)


class NormedAttention(Attention):
    """`norm_qk`, the clip, then RoPE."""

    spec: NormedAttentionSpec

    @hk.transparent
    def prepare(
        self,
        q: Float[Array, "B T Q H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int32[Array, "B T"],
    ) -> tuple[Array, Array, Array]:
        s = self.spec
        q, k = norm_qk(q, k, s.norm_eps, s.whole_norm)
        if s.clip is not None:
            q, k, v = (jnp.clip(z, -s.clip, s.clip) for z in (q, k, v))
        return super().prepare(q, k, v, positions)


# %% book/chapters/18_llama4.md, cell 12
@dataclass(frozen=True)
class Chunk(Window):
    """Of the last `size` positions those of a layer's own chunk.

    Chunks are counted from position 0 of each batch row, `size` tokens
    each. Source: Llama 4's release.
    """

    def sees(
        self, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
    ) -> Bool[Array, "B T S"]:
        return is_past(q, k) & (q // self.size == k // self.size)


# %% book/chapters/18_llama4.md, cell 36
def scale_queries_by_position(
    q: Float[Array, "B T Q H"],
    positions: Int32[Array, "B T"],
    floor: int,
    scale: float,
) -> Float32[Array, "B T Q H"]:
    """Queries that grow with the logarithm of their position.

    Nothing changes for the first `floor` - 1 tokens of a row.
    Source: Llama 4's release; Nakanishi (2025).
    """
    growth = jnp.floor((positions + 1) / floor)             # [B, T]
    growth = jnp.log1p(growth) * scale + 1
    return q * growth[..., None, None]


# %% book/chapters/18_llama4.md, cell 49
@dataclass(frozen=True)
class UnitAttentionSpec(AttentionSpec):
    """Attention as in Llama 4: heads of unit RMS after RoPE, and where
    there is no RoPE queries that grow with their position.
    """

    qk_norm_eps: Positive | None = 1e-5     # None: no norm
    floor: Size | None = None               # None: queries do not grow
    scale: Positive = 0.1

    def build(self) -> "UnitAttention":
        return UnitAttention(self)


class UnitAttention(Attention):
    """RoPE and a norm without gains; or neither, and growing queries.
    """

    spec: UnitAttentionSpec

    @hk.transparent
    def prepare(
        self,
        q: Float[Array, "B T Q H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int32[Array, "B T"],
    ) -> tuple[Array, Array, Array]:
        s = self.spec
        q, k, v = super().prepare(q, k, v, positions)
        if s.rope is None:
            if s.floor is not None:
                q = scale_queries_by_position(
                    q, positions, s.floor, s.scale
                )
            return q, k, v
        if s.qk_norm_eps is not None:
            one = jnp.ones(s.head_size)
            q = rms_norm(q, one, s.qk_norm_eps)
            k = rms_norm(k, one, s.qk_norm_eps)
        return q, k, v


# %% book/chapters/20b_flash.md, cell 8
class Tiles(NamedTuple):
    """Which pairs of a block of queries and one of keys to visit."""

    order: Int[Array, " M"]                 # visited ones come first
    visits: Int[Array, ""]                  # how many are visited
    across: int                             # blocks of keys


def does_see(
    q: Int32[Array, "B T"], k: Int32[Array, "B S"], sees: Sees
) -> Bool[Array, "B T S"]:
    """What queries at `q` see of keys at `k`; padding sees nothing."""
    q = q[..., None]                                        # [B, T, 1]
    return sees(q, k[:, None]) & (q != PAD_POSITION)


def visible_tiles(
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    sees: Sees,
    block: int,
) -> Tiles:
    """The tiles that `sees` does not empty. `block` divides T and S."""
    b = len(positions)
    q, k = (at.reshape(b, -1, block).swapaxes(0, 1)     # [., B, block]
            for at in (positions, key_positions))

    def across(qs: Array) -> Array:
        return jax.lax.map(lambda ks: does_see(qs, ks, sees).any(), k)

    seen = jax.lax.map(across, q).ravel()
    order = jnp.argsort(~seen, stable=True)
    return Tiles(order, seen.sum(), len(k))


# %% book/chapters/20b_flash.md, cell 12
def cut(x: Array, i: Any, block: int) -> Array:
    """Block `i` of the second axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)


def put(x: Array, part: Array, i: Any, block: int) -> Array:
    """`x` with another block `i` of the second axis."""
    return jax.lax.dynamic_update_slice_in_dim(
        x, part, i * block, axis=1
    )


# %% book/chapters/20b_flash.md, cell 13
def walk_tiles(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None,
    sees: Sees,
    block: int,
) -> tuple[Float32[Array, "B T Q V"], Float32[Array, "B T K R"]]:
    """Attention, and the logarithm of each query's normaliser.

    A query that sees nothing gets 0.
    Source: FlashAttention-2, algorithm 1.
    """
    tiles = visible_tiles(positions, key_positions, sees, block)
    b, t, heads, _ = q.shape
    shape = b, t, k.shape[2], heads // k.shape[2]       # [B, T, K, R]

    def visit(n: Array, state: Any) -> Any:
        i, j = jnp.divmod(tiles.order[n], tiles.across)
        at = cut(positions, i, block)
        seen = does_see(at, cut(key_positions, j, block), sees)
        seen = seen[:, None, None]                   # [B, 1, 1, T, S]
        s = attention_scores(
            cut(q, i, block), cut(k, j, block), multiplier, softcap
        )
        s = jnp.where(seen, s, MASK_VALUE)
        top, total, y = (cut(z, i, block) for z in state)
        higher = jnp.maximum(top, s.max(-1).transpose(0, 3, 1, 2))
        p = jnp.exp(s - higher.transpose(0, 2, 3, 1)[..., None])
        p = jnp.where(seen, p, 0)
        part = jnp.einsum(
            "bkrts,bskh->btkrh", p.astype(v.dtype), cut(v, j, block),
            preferred_element_type=jnp.float32,
        )
        fade = jnp.exp(top - higher)
        total = fade * total + p.sum(-1).transpose(0, 3, 1, 2)
        new = higher, total, fade[..., None] * y + part
        return tuple(put(z, a, i, block) for z, a in zip(state, new))

    top = jnp.full(shape, MASK_VALUE, jnp.float32)
    empty = top, jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))
    top, total, y = jax.lax.fori_loop(0, tiles.visits, visit, empty)
    total = jnp.where(total > 0, total, 1)
    y = (y / total[..., None]).reshape(b, t, heads, -1)
    return y, top + jnp.log(total)


# %% book/chapters/20b_flash.md, cell 14
def walk_tiles_back(
    multiplier: float, softcap: float | None, sees: Sees, block: int,
    saved: Any, dy: Float[Array, "B T Q V"],
) -> tuple[Array, Array, Array, None, None]:
    """Slopes of q, k and v: once over the visible tiles.

    In float32. Source: FlashAttention-2, algorithm 2; the slope of the
    cap is ours.
    """
    q, k, v, positions, key_positions, y, norm = saved
    tiles = visible_tiles(positions, key_positions, sees, block)

    def by_key_head(x: Array) -> Array:
        return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])

    def beside_scores(x: Array, i: Array) -> Array:
        return cut(x, i, block).transpose(0, 2, 3, 1)[..., None]

    dy = by_key_head(dy.astype(jnp.float32))        # [B, T, K, R, V]
    delta = jnp.sum(dy * by_key_head(y), axis=-1)       # [B, T, K, R]

    def visit(n: Array, sums: Any) -> Any:
        i, j = jnp.divmod(tiles.order[n], tiles.across)
        at = cut(positions, i, block)
        seen = does_see(at, cut(key_positions, j, block), sees)
        seen = seen[:, None, None]                   # [B, 1, 1, T, S]
        qs, dys = cut(q, i, block), cut(dy, i, block)
        ks, vs = cut(k, j, block), cut(v, j, block)
        c = attention_scores(qs, ks, multiplier, softcap)
        p = jnp.exp(c - beside_scores(norm, i))
        p = jnp.where(seen, p, 0)
        dp = jnp.einsum("btkrh,bskh->bkrts", dys, vs)
        ds = multiplier * p * (dp - beside_scores(delta, i))
        if softcap:
            ds *= 1 - (c / softcap) ** 2
        parts = [
            (jnp.einsum("bkrts,bskh->btkrh", ds, ks), i),
            (jnp.einsum("bkrts,btkrh->bskh", ds, by_key_head(qs)), j),
            (jnp.einsum("bkrts,btkrh->bskh", p, dys), j),
        ]
        return tuple(
            put(z, cut(z, at, block) + part, at, block)
            for z, (part, at) in zip(sums, parts)
        )

    inputs = by_key_head(q), k, v
    zeros = tuple(jnp.zeros(z.shape, jnp.float32) for z in inputs)
    sums = jax.lax.fori_loop(0, tiles.visits, visit, zeros)
    dq, dk, dv = (s.reshape(z.shape).astype(z.dtype)
                  for s, z in zip(sums, (q, k, v)))
    return dq, dk, dv, None, None


# %% book/chapters/20b_flash.md, cell 15
@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def flash(
    q: Array, k: Array, v: Array, positions: Array,
    key_positions: Array, multiplier: float, softcap: float | None,
    sees: Sees, block: int,
) -> Array:
    """Attention by tiles, of whole blocks."""
    y, _ = walk_tiles(q, k, v, positions, key_positions, multiplier,
                      softcap, sees, block)
    return y.astype(q.dtype)


def flash_there(
    q: Array, k: Array, v: Array, positions: Array,
    key_positions: Array, multiplier: float, softcap: float | None,
    sees: Sees, block: int,
) -> tuple[Array, Any]:
    """What `flash` computes, and what `walk_tiles_back` needs."""
    y, norm = walk_tiles(q, k, v, positions, key_positions, multiplier,
                         softcap, sees, block)
    saved = q, k, v, positions, key_positions, y, norm
    return y.astype(q.dtype), saved


flash.defvjp(flash_there, walk_tiles_back)


# %% book/chapters/20b_flash.md, cell 16
def whole_blocks(x: Array, block: int, fill: Any = 0) -> Array:
    """`x`, its second axis filled up to a multiple of `block`."""
    wide = [(0, 0)] * x.ndim
    wide[1] = 0, -x.shape[1] % block
    return jnp.pad(x, wide, constant_values=fill)


def attend_flash(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None = None,
    sees: Sees = is_past,
    block: int = 64,
) -> Float[Array, "B T Q V"]:
    """`attend` under the mask `sees`, by tiles that it does not empty.

    Arrays grow with T + S, also the gradient's, but for the list of
    tiles: T x S / block**2 numbers. `sees` is asked of all T x S pairs.
    A tile that one row of the batch needs is visited for all rows.
    Queries at PAD_POSITION, and such as see nothing, give 0. Casts are
    those of `attend`; backward float32.
    A `block` below 1, or K not dividing Q, is a ValueError.
    Source: Dao et al. (2022); Dao (2024).
    """
    if block < 1:
        raise ValueError(f"a block needs at least 1 slot, got {block}")
    t = q.shape[1]
    q, k, v = (whole_blocks(z, block) for z in (q, k, v))
    positions, key_positions = (
        whole_blocks(at, block, PAD_POSITION)
        for at in (positions, key_positions)
    )
    y = flash(q, k, v, positions, key_positions, multiplier, softcap,
              sees, block)
    return y[:, :t]


# %% book/chapters/20b_flash.md, cell 29
FLASH_FROM = 256                                            # tokens


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_to_train(
    q: Array, k: Array, v: Array, positions: Array,
    key_positions: Array, multiplier: float, softcap: float | None,
    sees: Sees,
) -> Array:
    """`attend_any`; with a gradient, `attend_flash` of long rows."""
    return attend_any(
        q, k, v, positions, key_positions, multiplier, softcap, sees
    )


def attend_there(
    q: Array, k: Array, v: Array, positions: Array,
    key_positions: Array, multiplier: float, softcap: float | None,
    sees: Sees,
) -> tuple[Array, Any]:
    """The output, and the function from its slope to the inputs'."""
    way = attend_flash if q.shape[1] >= FLASH_FROM else attend_any

    def run(q: Array, k: Array, v: Array) -> Array:
        return way(q, k, v, positions, key_positions, multiplier,
                   softcap, sees)

    return jax.vjp(run, q, k, v)


def attend_back(
    multiplier: float, softcap: float | None, sees: Sees, back: Any,
    dy: Array,
) -> tuple[Any, ...]:
    """Slopes of q, k and v; positions have none."""
    return *back(dy), None, None


attend_to_train.defvjp(attend_there, attend_back)
WAYS_TO_ATTEND.append(attend_to_train)


# %% book/chapters/20b_flash.md, cell 41
def attend_pallas(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None = None,
    sees: Sees = is_past,
    block: int = 128,
    interpret: bool = False,
) -> Float[Array, "B T Q V"]:
    """`attend_flash`, forward alone, as a kernel for TPUs.

    Checked by `interpret` and compiled for a v5p; never run on one.
    Source: Dao (2024), algorithm 1.
    """
    from jax.experimental import pallas as pl

    def kernel(
        at: Any, key_at: Any, q: Any, k: Any, v: Any, y: Any
    ) -> None:
        def visit(j: Array, seen: Array, state: Any) -> Any:
            top, total, sums = state
            keys = k[pl.ds(j * block, block), :]            # [block, H]
            s = multiplier * jax.lax.dot_general(
                q[...], keys, (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )                                       # [block, block]
            s = softcap * jnp.tanh(s / softcap) if softcap else s
            s = jnp.where(seen, s, MASK_VALUE)
            higher = jnp.maximum(top, s.max(1, keepdims=True))
            p = jnp.where(seen, jnp.exp(s - higher), 0)
            fade = jnp.exp(top - higher)
            part = jnp.dot(
                p.astype(v.dtype), v[pl.ds(j * block, block), :],
                preferred_element_type=jnp.float32,
            )
            total = fade * total + p.sum(1, keepdims=True)
            return higher, total, fade * sums + part

        def step(j: Array, state: Any) -> Any:
            keys_at = key_at[:, :, pl.ds(j * block, block)]
            seen = sees(at[...], keys_at) & (at[...] != PAD_POSITION)
            seen = seen[0]                          # [block, block]
            return jax.lax.cond(
                jnp.max(seen.astype(jnp.int32)) > 0,
                lambda state: visit(j, seen, state),
                lambda state: state, state,
            )

        top = jnp.full((block, 1), MASK_VALUE, jnp.float32)
        empty = top, jnp.zeros((block, 1)), jnp.zeros(y.shape)
        turns = k.shape[0] // block
        _, total, sums = jax.lax.fori_loop(0, turns, step, empty)
        total = jnp.where(total > 0, total, 1)
        y[...] = (sums / total).astype(y.dtype)

    t, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (whole_blocks(z, block).swapaxes(1, 2)
               for z in (q, k, v))                      # [B, Q, T, H]
    at, key_at = (whole_blocks(a, block, PAD_POSITION)
                  for a in (positions, key_positions))
    b, heads, rows, h = q.shape
    slots, width = v.shape[2:]
    out = jax.ShapeDtypeStruct((b, heads, rows, width), q.dtype)
    y = pl.pallas_call(
        kernel,
        grid=(b, heads, rows // block),
        in_specs=[
            pl.BlockSpec((1, block, 1), lambda b, q, i: (b, i, 0)),
            pl.BlockSpec((1, 1, slots), lambda b, q, i: (b, 0, 0)),
            pl.BlockSpec((None, None, block, h),
                         lambda b, q, i: (b, q, i, 0)),
            pl.BlockSpec((None, None, slots, h),
                         lambda b, q, i: (b, q // group, 0, 0)),
            pl.BlockSpec((None, None, slots, width),
                         lambda b, q, i: (b, q // group, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, block, width),
                               lambda b, q, i: (b, q, i, 0)),
        out_shape=out,
        interpret=interpret,
    )(at[..., None], key_at[:, None], q, k, v)
    return y.swapaxes(1, 2)[:, :t]


# %% book/chapters/23_training.md, cell 7
@dataclass(frozen=True)
class WithinDocument(Causal):
    """What another mask shows of a layer's own document.

    A position is document * DOCUMENT_STRIDE + place.
    """

    inner: Causal = Causal()

    def sees(
        self, q: Int32[Array, "B T 1"], k: Int32[Array, "#B 1 S"]
    ) -> Bool[Array, "B T S"]:
        same = q // DOCUMENT_STRIDE == k // DOCUMENT_STRIDE
        place_q, place_k = q % DOCUMENT_STRIDE, k % DOCUMENT_STRIDE
        return same & self.inner.sees(place_q, place_k)


# %% book/chapters/29_caches.md, cell 12
def attend_by_head(
    q: Float[Array, "B T Q H"],
    k: EightBitHeads,
    v: EightBitHeads,
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float,
    softcap: float | None,
    sees: Sees,
) -> Float[Array, "B T Q V"]:
    """`attend` to heads in eight bits, one key head after another.

    In float32, and the scales after the sums: a head's integers are
    cast where they are used, and no other copy of them is made.
    """
    b, t, heads, h = q.shape
    q_of = q.reshape(b, t, k.shape[2], -1, h).astype(jnp.float32)
    seen = sees(positions[..., None], key_positions[:, None])[:, None]

    def one(i: Array) -> Array:
        def of(a: Array) -> Array:
            own = jax.lax.dynamic_index_in_dim(a, i, 2, keepdims=False)
            return own.astype(jnp.float32)

        def scale(x: EightBitHeads) -> Array:
            return of(x.scales)[:, None, None, :, 0]  # [B, 1, 1, S]

        s = jnp.einsum("btrh,bsh->brts", of(q_of), of(k.numbers))
        s *= multiplier * scale(k)                    # [B, R, T, S]
        s = softcap * jnp.tanh(s / softcap) if softcap else s
        s = jnp.where(seen, s, MASK_VALUE)
        p = jax.nn.softmax(s, axis=-1) * scale(v)
        return jnp.einsum("brts,bsh->btrh", p, of(v.numbers))

    y = jax.lax.map(one, jnp.arange(k.shape[2]))   # [K, B, T, R, V]
    y = jnp.moveaxis(y, 0, 2).reshape(b, t, heads, -1)
    return y.astype(q.dtype)


# %% book/chapters/29_caches.md, cell 13
attend_to_arrays = WAYS_TO_ATTEND[-1]
FEW_QUERIES = 16


def attend_to_kept(
    q: Float[Array, "B T Q H"], k: Any, v: Any,
    positions: Int32[Array, "B T"],
    key_positions: Int32[Array, "B S"],
    multiplier: float, softcap: float | None, sees: Sees,
) -> Float[Array, "B T Q V"]:
    """As ever, or to heads in eight bits.

    Few queries on a CPU go head by head. Otherwise keys and values are
    cast to `q.dtype` first.
    """
    def as_arrays(
        q: Array, k: Any, v: Any, positions: Array, at: Array
    ) -> Array:
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        return attend_to_arrays(
            q, k, v, positions, at, multiplier, softcap, sees
        )

    def by_head(
        q: Array, k: Any, v: Any, positions: Array, at: Array
    ) -> Array:
        return attend_by_head(
            q, k, v, positions, at, multiplier, softcap, sees
        )

    given = q, k, v, positions, key_positions
    if not isinstance(k, KeptHeads):
        return attend_to_arrays(*given, multiplier, softcap, sees)
    if q.shape[1] > FEW_QUERIES or not isinstance(k, EightBitHeads):
        return as_arrays(*given)
    return jax.lax.platform_dependent(
        *given, cpu=by_head, default=as_arrays
    )


WAYS_TO_ATTEND.append(attend_to_kept)
