# Generated from book/chapters/30_serving.md by `make sync`; edit the chapter.
"""A batch is as slow as its slowest row. Eight people ask; seven get
their few words, and their rows then compute for nobody until the eighth
has its page, while a ninth waits outside. The release of Grok-1 was
built around the cure, a batch whose rows come and go, and stopped short
of it. By the end of this chapter you will have the programs for such a
batch: they choose a token for rows of different age, put a new prompt
among rows that write, copy the beginning of a row, and record which
experts a row was given. A loop of thirty lines runs them, and every
request gets, token for token, what it would have had alone. The next
chapter makes an engine of it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from annotated_moe.cache import KVCache
from annotated_moe.config import ModelConfig, all_places
from annotated_moe.model import Cache, DecoderLayer, constrain_cache
from annotated_moe.moe import Route, Router
from annotated_moe.sampling import Sampling, token_noise, unless_broken
from annotated_moe.steps import take_row

# %% book/chapters/30_serving.md, cell 6
TOP = 8                                     # logprobs a token


class Choice(NamedTuple):
    """A token a row, and if asked what the model thought of it."""

    tokens: Any                             # int32 [B]
    logprobs: Any = None                    # float32 [B]
    top_ids: Any = None                     # int32 [B, TOP]
    top_logprobs: Any = None                # float32 [B, TOP]


# %% book/chapters/30_serving.md, cell 8
def in_order(x: Float32[Array, "B V"]) -> Int32[Array, "B V"]:
    """Integers that compare as these numbers do; -0.0 is below 0.0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def largest(
    holds: Callable[[Array], Array], rows: int
) -> Int32[Array, " {rows}"]:
    """The largest integer of which `holds`, a row; or the least.

    `holds` takes int32 [B] and gives bool [B], false from some on.
    """
    def add_bit(i: Array, low: Array) -> Array:
        more = low + (jnp.int32(1) << (31 - i))         # may wrap
        return jnp.where(holds(more), more, low)

    least = jnp.full(rows, -(2**31), jnp.int32)
    return jax.lax.fori_loop(0, 32, add_bit, least)


# %% book/chapters/30_serving.md, cell 9
def keep_likely(
    logits: Float32[Array, "B V"], k: Int[Array, " B"],
    p: Float32[Array, " B"],
) -> Float32[Array, "B V"]:
    """The k largest, of these the nucleus, without sorting.

    What `sample` keeps, to the rounding of sums held to `p`.
    """
    order = in_order(logits)
    rows, v = order.shape
    k = jnp.where(k > 0, jnp.minimum(k, v), v)
    least = largest(
        lambda at: (order >= at[:, None]).sum(-1) >= k, rows)
    kept = jnp.where(order >= least[:, None], logits, -jnp.inf)
    share = jax.nn.softmax(kept)
    least = largest(
        lambda at: jnp.where(order < at[:, None], share, 0).sum(-1)
        < 1 - p, rows)
    least = jnp.minimum(least, order.max(axis=-1))
    return jnp.where(order >= least[:, None], kept, -jnp.inf)


# %% book/chapters/30_serving.md, cell 12
def draw(
    logits: Float32[Array, "B V"], steps: Int32[Any, " B"],
    settings: Sampling, cut: bool,
) -> Int32[Array, " B"]:
    """Token `steps[b]` of each row b, as `sample` would choose it.

    `cut` False: no row has a top_k or top_p.
    """
    noise = jax.vmap(token_noise)
    random = noise(settings.seed, steps, logits)            # [B, V]
    heat = jnp.asarray(settings.temperature)
    best = logits.max(axis=-1, keepdims=True)
    warm = (logits - best) / jnp.where(heat > 0, heat, 1)[:, None]
    if cut:
        warm = keep_likely(warm, settings.top_k, settings.top_p)
    drawn = jnp.argmax(warm + random, axis=-1)
    return jnp.where(heat > 0, drawn, jnp.argmax(logits, axis=-1))


# %% book/chapters/30_serving.md, cell 13
@partial(jax.jit, static_argnames=("how", "ranked"))
def choose_rows(
    logits: Float32[Array, "B V"],
    steps: Int32[Any, " B"],
    settings: Sampling,
    shift: Float32[Any, "B V"] | None = None,
    how: str = "cut",
    ranked: bool = False,
) -> Choice:
    """A token a row, of logits to which `shift` is added first.

    `how`: "greedy", "drawn", or "cut" if a row has top_k or top_p.
    `ranked`: log-probabilities, too, of the logits as they came.
    """
    moved = logits if shift is None else logits + shift
    if how == "greedy":
        tokens = jnp.argmax(moved, axis=-1)
    else:
        tokens = draw(moved, steps, settings, how == "cut")
    tokens = unless_broken(logits, tokens)
    if not ranked:
        return Choice(tokens)
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, jnp.maximum(tokens, 0)[:, None], 1)
    top, ids = jax.lax.top_k(logs, min(TOP, logs.shape[-1]))
    return Choice(tokens, own[:, 0], ids, top)


# %% book/chapters/30_serving.md, cell 15
@partial(jax.jit, donate_argnames="cache")
def place_row(
    cache: Cache, row: Int[Any, ""], side: Cache, at: Int[Any, ""] = 0
) -> Cache:
    """The cache, in whose `row` is now row `at` of what was read.

    All of it: slots that were not read are zero.
    """
    def widen(part: KVCache, slots: int) -> KVCache:
        more = 0, max(slots - part.slots, 0)

        def pad(x: Array, axes: tuple[str | None, ...]) -> Array:
            if axes[0] != "layers":             # not [L, B, S, ...]
                return x
            return jnp.pad(x, [(0, 0), (0, 0), more, (0, 0), (0, 0)])

        return jax.tree.map(pad, part, part.axes)

    one = take_row(side, jnp.asarray(at, jnp.int32))
    wide = Cache(tuple(
        widen(part, old.slots)
        for part, old in zip(one.places, cache.places)
    ))
    return constrain_cache(cache.insert(row, wide))


@partial(jax.jit, donate_argnames="logits")
def place_logits(
    logits: Float32[Array, "B V"], row: Int[Any, ""],
    last: Float32[Array, "_ V"], at: Int[Any, ""] = 0,
) -> Float32[Array, "B V"]:
    """The logits, in whose `row` are now those of prompt `at`'s end."""
    return logits.at[row].set(last[at])


# %% book/chapters/30_serving.md, cell 22
def can_copy(cache: Cache) -> bool:
    """Whether a row's first tokens can be taken out: not of a ring."""
    return all(part.room is not None for part in cache.places)


@jax.jit
def copy_row(
    cache: Cache, row: Int[Any, ""], length: Int[Any, ""]
) -> Cache:
    """A cache of one row: the first `length` tokens of `row`.

    As many slots as the cache has; those behind them are zero.
    """
    def blank(x: Array, axes: tuple[str | None, ...]) -> Array:
        if axes[0] != "layers":                 # not [L, B, S, ...]
            return x
        there = jnp.arange(x.shape[2]) < length             # [S]
        return jnp.where(there[:, None, None], x, 0)

    one = take_row(cache, jnp.asarray(row, jnp.int32))
    kept = Cache(tuple(
        jax.tree.map(blank, part, part.axes) for part in one.places))
    length = jnp.asarray(length, jnp.int32)[None]
    return constrain_cache(kept.with_length(length))


# %% book/chapters/30_serving.md, cell 25
@partial(jax.jit, static_argnames="slots")
def fewer_slots(cache: Cache, slots: int) -> Cache:
    """The first `slots` slots of full caches; rows are cut to them."""
    def cut(x: Array, axes: tuple[str | None, ...]) -> Array:
        return x[:, :, :slots] if axes[0] == "layers" else x

    short = Cache(tuple(
        jax.tree.map(cut, part, part.axes) for part in cache.places
    ))
    length = jnp.minimum(cache.length, slots)
    return constrain_cache(short.with_length(length))


# %% book/chapters/30_serving.md, cell 27
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recording(KVCache):
    """A cache that also keeps each layer's experts, [L, B, A].

    Of the last token that each row has read. Keys and values are in
    the `inner` cache.
    """

    inner: KVCache
    experts: Any

    @property
    def slots(self) -> int:
        return self.inner.slots

    @property
    def room(self) -> int | None:
        return self.inner.room

    @property
    def axes(self) -> "Recording":
        return replace(
            self, length=("batch",),
            inner=replace(self.inner.axes, length=None),
            experts=("layers", "batch", None),
        )


# %% book/chapters/30_serving.md, cell 28
def record(cache: Cache, config: ModelConfig, active: int) -> Cache:
    """The same cache, ready to keep `active` experts a token."""
    found = []
    for part, place in zip(cache.places, all_places(config)):
        shape = len(place.layers), part.length.shape[0], active
        none = np.full(shape, -1, np.int32)
        inner = replace(part, length=None)
        found.append(Recording(None, None, part.length, inner, none))
    return Cache(tuple(found))


def unrecord(cache: Cache) -> tuple[Cache, list[Array]]:
    """The cache that was inside, and each place's experts."""
    inner, experts = [], []
    for part in cache.places:
        assert isinstance(part, Recording)
        inner.append(replace(part.inner, length=part.length))
        experts.append(part.experts)
    return Cache(tuple(inner)), experts


def in_layers(experts: list[Any], config: ModelConfig) -> np.ndarray:
    """Places' experts on the host, layer by layer, int32 [L, B, A]."""
    found = dict[int, np.ndarray]()
    for own, place in zip(experts, all_places(config)):
        found |= dict(zip(place.layers, np.asarray(own)))
    return np.stack([found[layer] for layer in sorted(found)])


# %% book/chapters/30_serving.md, cell 29
def recording() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, layers write their experts into a `Recording`."""
    heard: list[Any] = []                               # [B*T, A] each

    def layer(
        call: Any, h: Any, positions: Any, real: Any, kept: Any,
        index: Any, train: str | None = None,
    ) -> Any:
        heard.clear()
        inner = replace(kept.inner, length=kept.length)
        h, inner, losses = call(
            h, positions, real, inner, index, train)
        kept = replace(kept, inner=replace(inner, length=None))
        for experts in heard:
            last = jnp.maximum(real.sum(axis=1) - 1, 0)     # [B]
            of_row = experts.reshape(*real.shape, -1)   # [B, T, A]
            chosen = jnp.take_along_axis(
                of_row, last[:, None, None], axis=1)[:, 0]
            chosen = kept.experts.at[index].set(chosen)
            kept = replace(kept, experts=chosen)
        return h, kept, losses

    def wire(call: Any, args: Any, options: Any, context: Any) -> Any:
        module, cache = context.module, [*args[3:4]]
        if isinstance(module, DecoderLayer) and any(
            isinstance(kept, Recording) for kept in cache
        ) and context.method_name == "__call__":
            return layer(call, *args, **options)
        out = call(*args, **options)
        if isinstance(module, Router) and isinstance(out, Route):
            heard.append(out.experts)
        return out

    return hk.intercept_methods(wire)
