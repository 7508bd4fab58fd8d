# Generated from book/chapters/30_serving.md by `make sync`; edit the chapter.
"""The programs of an engine: a token for each row, a row of a cache
copied, and the experts of a step.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32, UInt32

from annotated_moe.cache import KVCache
from annotated_moe.config import ModelConfig, all_places
from annotated_moe.model import Cache, DecoderLayer, constrain_cache
from annotated_moe.moe import Router
from annotated_moe.sampling import Sampling, choose, unless_broken

# %% book/chapters/30_serving.md, cell 10
TOP = 8                                     # logprobs a token


class Choice(NamedTuple):
    """A token a row, and if asked what the model thought of it."""

    tokens: Any                             # int32 [B]
    logprobs: Any = None                    # float32 [B]
    top_ids: Any = None                     # int32 [B, TOP]
    top_logprobs: Any = None                # float32 [B, TOP]


# %% book/chapters/30_serving.md, cell 11
@partial(jax.jit, static_argnames=("drawn", "ranked"))
def choose_rows(
    logits: Float32[Array, "B V"],
    steps: Int32[Any, " B"],
    settings: Sampling,
    shift: Float32[Any, "B V"] | None = None,
    drawn: bool = True,
    ranked: bool = False,
) -> Choice:
    """Token `steps[b]` of each row b, as `sample` would choose it.

    `shift` is added to the logits first. `drawn` False: every row is
    greedy. `ranked`: log-probabilities, too, of the logits as they
    came.
    """
    def noise(
        seed: UInt32[Array, ""], step: Int32[Array, ""]
    ) -> Float32[Array, " V"]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits.shape[-1:])

    moved = logits if shift is None else logits + shift
    tokens = jnp.argmax(moved, axis=-1)
    if drawn:
        random = jax.vmap(noise)(settings.seed, steps)      # [B, V]
        tokens = choose(
            moved, random, settings.temperature, settings.top_k,
            settings.top_p,
        )
    tokens = unless_broken(logits, tokens)
    if not ranked:
        return Choice(tokens)
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, jnp.maximum(tokens, 0)[:, None], 1)
    top, ids = jax.lax.top_k(logs, min(TOP, logs.shape[-1]))
    return Choice(tokens, own[:, 0], ids, top)


# %% book/chapters/30_serving.md, cell 12
@partial(jax.jit, donate_argnames=("cache", "logits"))
def place_row(
    cache: Cache, logits: Float32[Array, "B V"], row: Int[Any, ""],
    one: Cache, last: Float32[Array, "1 V"],
) -> tuple[Cache, Float32[Array, "B V"]]:
    """A prompt that was read apart, and its last logits, in `row`."""
    cache = cache.evict(row).insert(row, one)
    return constrain_cache(cache), logits.at[row].set(last[0])


# %% book/chapters/30_serving.md, cell 13
def batch_axes(part: KVCache) -> Any:
    """Where a cache's arrays count batch rows; -1: they do not."""
    def find(axes: tuple[str | None, ...]) -> int:
        return axes.index("batch") if "batch" in axes else -1

    return jax.tree.map(
        find, part.axes, is_leaf=lambda x: type(x) is tuple)


def can_copy(cache: Cache) -> bool:
    """Whether a row's first tokens can be taken out of a cache.

    Not out of a ring, which has forgotten them.
    """
    return all(
        part.room is not None
        and all(at >= 0 for at in jax.tree.leaves(batch_axes(part)))
        for part in cache.places
    )


# %% book/chapters/30_serving.md, cell 14
@partial(jax.jit, donate_argnames="one")
def empty_row(one: Cache) -> Cache:
    """A cache of one row, without what it holds."""
    return constrain_cache(one.evict(0))


@jax.jit
def copy_row(
    cache: Cache, row: Int[Any, ""], length: Int[Any, ""]
) -> Cache:
    """A cache of one row: the first `length` tokens of `row`."""
    def cut(x: Array, at: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, row, 1, at)

    one = Cache(tuple(
        jax.tree.map(cut, part, batch_axes(part))
        for part in cache.places
    ))
    length = jnp.asarray(length, jnp.int32)[None]
    return constrain_cache(one.with_length(length))


# %% book/chapters/30_serving.md, cell 15
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recording(KVCache):
    """A cache that also keeps each layer's experts, [L, B, A].

    Of the last token that each row has read. It has the `inner`
    cache's keys and values.
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


# %% book/chapters/30_serving.md, cell 16
def record(cache: Cache, config: ModelConfig, active: int) -> Cache:
    """The same cache, ready to keep `active` experts a token."""
    found = []
    for part, place in zip(cache.places, all_places(config)):
        shape = len(place.layers), len(part.length), active
        none = jnp.full(shape, -1, jnp.int32)
        inner = replace(part, length=None)
        found.append(Recording(None, None, part.length, inner, none))
    return Cache(tuple(found))


def unrecord(
    cache: Cache, config: ModelConfig
) -> tuple[Cache, dict[int, Any]]:
    """The cache that was inside, and layer -> experts [B, A]."""
    inner, experts = [], {}
    for part, place in zip(cache.places, all_places(config)):
        assert isinstance(part, Recording)
        inner.append(replace(part.inner, length=part.length))
        experts |= dict(zip(place.layers, part.experts))
    return Cache(tuple(inner)), experts


# %% book/chapters/30_serving.md, cell 17
def recording() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, layers write their experts into a `Recording`."""
    heard: list[Any] = []

    def layer(
        call: Any, h: Any, positions: Any, real: Any, kept: Any,
        index: Any, *rest: Any,
    ) -> Any:
        heard.clear()
        inner = replace(kept.inner, length=kept.length)
        h, inner, losses = call(
            h, positions, real, inner, index, *rest)
        kept = replace(kept, inner=replace(inner, length=None))
        for experts in heard:                               # [B*T, A]
            last = jnp.maximum(real.sum(axis=1) - 1, 0)     # [B]
            of_row = experts.reshape(*real.shape, -1)
            chosen = jnp.take_along_axis(
                of_row, last[:, None, None], axis=1)[:, 0]
            chosen = kept.experts.at[index].set(chosen)
            kept = replace(kept, experts=chosen)
        return h, kept, losses

    def wire(call: Any, args: Any, options: Any, context: Any) -> Any:
        module, named = context.module, context.method_name
        if named == "__call__" and isinstance(module, DecoderLayer):
            return layer(call, *args, **options)
        out = call(*args, **options)
        if named == "__call__" and isinstance(module, Router):
            heard.append(out.experts)
        return out

    return hk.intercept_methods(wire)
