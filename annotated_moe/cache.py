# Generated from book/chapters/04_attention.md, book/chapters/08_model.md, book/chapters/16_mixtral.md, book/chapters/29_caches.md, book/chapters/29b_pages.md by `make sync`; edit the chapters.
"""Keys and values that are kept: a full cache, and a ring.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Num

from annotated_moe import placement
from annotated_moe.placement import here
from annotated_moe.specs import Size, Spec


# %% book/chapters/04_attention.md, cell 35
@functools.singledispatch
def write_cache(
    stack: Any,
    layer: int | Int32[Array, ""],
    x: Num[Array, "B T K H"],
    slots: Int32[Array, "B T"],
) -> Any:
    """Put `x` into `slots` of `stack[layer]`, cast to its dtype.

    `stack` is an array [L, B, S, K, H].
    A slot outside 0 .. S - 1 is dropped, never clamped or wrapped.
    A `layer` that is not there, or other axes, are a ValueError.
    """
    if isinstance(layer, int) and not 0 <= layer < len(stack):
        raise ValueError(f"no layer {layer} in a cache of {len(stack)}")
    if x.shape[:1] + x.shape[2:] != stack.shape[1:2] + stack.shape[3:]:
        raise ValueError(f"{x.shape} does not fit cache {stack.shape}")
    rows = jnp.arange(stack.shape[1])[:, None]              # [B, 1]
    x, shape, heads = x.astype(stack.dtype), stack.shape, stack.shape[3]
    # On a TPU the wrong one of two shapes copies the stack in each
    # layer: K x H where a device has one head, [KH] where it has more.
    if placement.here().parts(heads, "kv_heads") == heads:
        x = x.reshape(*x.shape[:2], -1)                     # [B, T, KH]
        stack = stack.reshape(*shape[:3], -1)
    stack = stack.at[layer, rows, slots].set(
        x, mode="drop", wrap_negative_indices=False
    )
    return stack.reshape(shape)


# %% book/chapters/04_attention.md, cell 41
PAD_POSITION = 2**30

# Arrays [B, S, K, H or V], or what stands for them.
Heads = Any
Update = tuple["KVCache", Heads, Heads, Int32[Array, "B S"]]


# %% book/chapters/04_attention.md, cell 42
@functools.singledispatch
def put_row(
    stack: Any, row: int | Int[Array, ""], x: Num[Array, "L _ K H"]
) -> Any:
    """Put `x` into the first slots of batch row `row` of a stack."""
    used, slots = x.shape[1], stack.shape[2]
    if used > slots:
        raise ValueError(f"{used} slots do not fit into {slots}")
    return stack.at[:, row, :used].set(
        x, mode="drop", wrap_negative_indices=False
    )


def set_length(
    length: Int32[Array, " B"], row: int | Int[Array, ""],
    n: int | Int32[Array, ""],
) -> Int32[Array, " B"]:
    """`length` with `n` at batch row `row`, which must be there.

    A traced `row` that is not there is dropped.
    """
    if isinstance(row, int) and not 0 <= row < len(length):
        raise ValueError(f"no row {row} in a batch of {len(length)}")
    return length.at[row].set(
        n, mode="drop", wrap_negative_indices=False
    )


# %% book/chapters/04_attention.md, cell 43
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of L layers, and how many tokens each row has.

    `k` is [L, B, S, K, H], `v` [L, B, S, K, V], in the compute dtype,
    `length` int32 [B]. A pytree: shapes or axes may stand for arrays.
    """

    k: Any
    v: Any
    length: Any

    @property
    def slots(self) -> int:
        """S: for how many tokens of a row there is room."""
        return self.k.shape[2]

    @property
    def room(self) -> int | None:
        """How many tokens a row may have; None: any number."""
        return self.slots

    @property
    def axes(self) -> "KVCache":
        """What each axis of each array counts."""
        wide = ("layers", "batch", None, "heads", None)
        k, v = jax.tree.map(lambda _: wide, (self.k, self.v))
        return replace(self, k=k, v=v, length=("batch",))

    def check(self, new: Any) -> None:
        """ValueError where rows have no room for `new` more tokens."""
        longest = int((np.asarray(self.length) + new).max(initial=0))
        if self.room is not None and longest > self.room:
            raise ValueError(f"{longest} tokens, {self.room} slots")

    def reserve(self, new: Int32[Array, "..."]) -> "KVCache":
        """With room for `new` more tokens a row; here it is there."""
        return self

    def update(
        self,
        layer: int | Int32[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int32[Array, "B T"],
    ) -> Update:
        """With these keys and values; and what a layer then looks at:
        all slots' keys, values and positions. `length` is the caller's
        to change, after the last layer.
        """
        keys = write_cache(self.k, layer, k, positions)
        values = write_cache(self.v, layer, v, positions)
        at = jnp.tile(jnp.arange(self.slots), (k.shape[0], 1))
        new = replace(self, k=keys, v=values)
        return new, keys[layer], values[layer], at

    def first_row(self) -> tuple[Heads, Heads]:
        """Keys and values [L, S, K, H or V] of row 0."""
        return self.k[:, 0], self.v[:, 0]

    def insert(
        self, row: int | Int[Array, ""], other: "KVCache"
    ) -> "KVCache":
        """Batch row `row` becomes row 0 of `other`.

        ValueError if that has more slots, or there is no such row.
        """
        length = set_length(self.length, row, other.length[0])
        k, v = other.first_row()
        k, v = put_row(self.k, row, k), put_row(self.v, row, v)
        return replace(self, k=k, v=v, length=length)

    def evict(self, row: int | Int[Array, ""]) -> "KVCache":
        """Batch row `row` is empty; its slots will be written over."""
        return replace(self, length=set_length(self.length, row, 0))


# %% book/chapters/08_model.md, cell 28
@dataclass(frozen=True)
class CacheKind(Spec):
    """How keys and values are kept: here as they come."""

    def keep(self, cache: KVCache) -> KVCache:
        """This cache, which is empty, as one of this kind."""
        return cache


CACHE_KINDS: dict[str, CacheKind] = {"float": CacheKind()}


def cache_kind(kind: str | CacheKind) -> CacheKind:
    """A kind, or the one of this name; ValueError if there is none."""
    if isinstance(kind, CacheKind):
        return kind
    if kind not in CACHE_KINDS:
        known = " or ".join(map(repr, CACHE_KINDS))
        raise ValueError(f"kv_cache must be {known}: {kind!r}")
    return CACHE_KINDS[kind]


# %% book/chapters/16_mixtral.md, cell 28
def ring_positions(
    end: Int32[Array, " B"], slots: int
) -> Int32[Array, "B {slots}"]:
    """Which position each slot of a ring holds once `end` were written.

    The last `slots` of them; negative where nothing was written yet.
    """
    last = end[:, None] - 1                                 # [B, 1]
    return last - (last - jnp.arange(slots)) % slots


# %% book/chapters/16_mixtral.md, cell 31
def end_after(
    length: Int32[Array, " B"], positions: Int32[Array, "B T"]
) -> Int32[Array, " B"]:
    """How many tokens each row has with those at `positions`.

    `length` is how many it had; padding is not counted.
    """
    after = jnp.where(positions < PAD_POSITION, positions + 1, 0)
    return jnp.maximum(length, after.max(axis=1))


# %% book/chapters/16_mixtral.md, cell 32
def write_ring(
    stack: Any,
    layer: int | Int32[Array, ""],
    x: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    end: Int32[Array, " B"],
) -> Any:
    """Put `x` into the ring [L, B, S, K, H]: position p into slot
    p % S, if it lasts.

    What later positions of the same call would overwrite is dropped,
    and so is padding: no two tokens of a row go to the same slot.
    """
    slots = stack.shape[2]
    lasts = positions >= end[:, None] - slots
    real = positions < PAD_POSITION
    at = jnp.where(lasts & real, positions % slots, slots)
    return write_cache(stack, layer, x, at)


# %% book/chapters/16_mixtral.md, cell 35
@functools.singledispatch
def extend(kept: Any, x: Num[Array, "B T K H"]) -> Any:
    """An array [B, S, K, H] that is kept, and then `x`, alike."""
    return jnp.concatenate([kept, x.astype(kept.dtype)], axis=1)


# %% book/chapters/16_mixtral.md, cell 36
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(KVCache):
    """The last S tokens of each row: position p is in slot p % S."""

    @property
    def room(self) -> int | None:
        return None

    def update(
        self,
        layer: int | Int32[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int32[Array, "B T"],
    ) -> Update:
        """With these keys and values; and what a layer then looks at.

        For T = 1 the ring, S slots, written first; else the ring as it
        was and the new tokens, S + T.
        """
        end = end_after(self.length, positions)
        new = replace(
            self,
            k=write_ring(self.k, layer, k, positions, end),
            v=write_ring(self.v, layer, v, positions, end),
        )
        if k.shape[1] == 1:
            at = ring_positions(end, self.slots)
            return new, new.k[layer], new.v[layer], at
        old = ring_positions(self.length, self.slots)
        at = jnp.concatenate([old, positions], axis=1)
        keys, values = self.k[layer], self.v[layer]
        return new, extend(keys, k), extend(values, v), at

    def insert(
        self, row: int | Int[Array, ""], other: KVCache
    ) -> KVCache:
        """Batch row `row` becomes row 0 of `other`.

        ValueError unless that is as large a ring, or a full cache that
        is no larger: in these a position is in the same slot.
        """
        if isinstance(other, RingCache) and other.slots != self.slots:
            raise ValueError(
                f"a ring of {other.slots} slots is none of {self.slots}"
            )
        return super().insert(row, other)


# %% book/chapters/29_caches.md, cell 6
class KeptHeads(ABC):
    """What stands for an array of heads in a cache; it has a shape.

    `like` makes an array one of its kind, `astype` is the way back.
    The first of its arrays is shaped as the heads are.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.tree.leaves(self)[0].shape

    @abstractmethod
    def like(self, x: Any) -> Any:
        """Heads as arrays, or of this kind already, as this kind."""

    def __getitem__(self, index: Any) -> Any:
        """Of the leading axes: a layer, a row, a run of slots."""
        return jax.tree.map(lambda a: a[index], self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EightBitHeads(KeptHeads):
    """Heads in 8-bit integers, and a scale for each.

    `numbers` int8 [..., H], `scales` float32 [..., 1]; the heads are
    their product. To a cache it looks like an array.
    """

    numbers: Any
    scales: Any

    def like(self, x: Any) -> "EightBitHeads":
        return eight_bit(x)

    def astype(self, dtype: Any) -> Array:
        return (self.numbers * self.scales).astype(dtype)


# %% book/chapters/29_caches.md, cell 7
def eight_bit(x: Any) -> EightBitHeads:
    """Heads [..., H] in eight bits, unless they are already.

    The largest number of a head becomes 127 or -127, others the
    nearest integer; a head of zeros stays one.
    """
    if isinstance(x, EightBitHeads):
        return x
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis=-1, keepdims=True) / 127
    numbers = jnp.round(x / jnp.where(scales == 0, 1, scales))
    return EightBitHeads(numbers.astype(jnp.int8), scales)


# %% book/chapters/29_caches.md, cell 10
@write_cache.register
def write_kept(
    stack: KeptHeads, layer: int | Int32[Array, ""], x: Any,
    slots: Int32[Array, "B T"],
) -> KeptHeads:
    """`write_cache`, of each array that the heads consist of."""
    return jax.tree.map(
        lambda a, new: write_cache(a, layer, new, slots),
        stack, stack.like(x),
    )


@put_row.register
def put_kept_row(
    stack: KeptHeads, row: int | Int[Array, ""], x: Any
) -> KeptHeads:
    return jax.tree.map(
        lambda a, new: put_row(a, row, new), stack, stack.like(x)
    )


@extend.register
def extend_kept(kept: KeptHeads, x: Any) -> KeptHeads:
    return jax.tree.map(extend, kept, kept.like(x))


# %% book/chapters/29_caches.md, cell 11
@dataclass(frozen=True)
class EightBit(CacheKind):
    """Keys and values in eight bits, full caches and rings alike."""

    def keep(self, cache: KVCache) -> KVCache:
        def zeros(a: Array) -> EightBitHeads:
            scales = jnp.zeros((*a.shape[:-1], 1))
            return EightBitHeads(jnp.zeros(a.shape, jnp.int8), scales)

        return replace(cache, k=zeros(cache.k), v=zeros(cache.v))


CACHE_KINDS["int8"] = EightBit()


# %% book/chapters/29_caches.md, cell 25
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadBits(KeptHeads):
    """Heads in bfloat16, whose bits are held as `bits` uint16 [..., H].
    """

    bits: Any

    def like(self, x: Any) -> "HeadBits":
        return head_bits(x)

    def astype(self, dtype: Any) -> Array:
        heads = jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16)
        return heads.astype(dtype)


def head_bits(x: Any) -> HeadBits:
    """Heads [..., H], cast to bfloat16, as their bits."""
    if isinstance(x, HeadBits):
        return x
    x = x.astype(jnp.bfloat16)
    return HeadBits(jax.lax.bitcast_convert_type(x, jnp.uint16))


# %% book/chapters/29_caches.md, cell 29
@dataclass(frozen=True)
class AsItComes(CacheKind):
    """Keys and values in the compute dtype, to the bit."""

    def keep(self, cache: KVCache) -> KVCache:
        on_cpu = here().alone and jax.default_backend() == "cpu"
        if not on_cpu or cache.k.dtype != jnp.bfloat16:
            return cache
        k, v = head_bits(cache.k), head_bits(cache.v)
        return replace(cache, k=k, v=v)


CACHE_KINDS["float"] = AsItComes()


# %% book/chapters/29b_pages.md, cell 6
NO_PAGE = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(KVCache):
    """Rows' tokens in pages of one pool.

    `k` and `v` are the pool, [L, pages, page, K, H or V]. `table` int32
    [B, S / page] names the page of each run of a row's slots, or
    NO_PAGE; a page is the same place in every layer. `users` int32
    [parts, pages / parts] counts the rows that have a page. Where a
    mesh cuts the rows into parts, each part numbers its pages from 0.
    """

    table: Any
    users: Any

    @property
    def page(self) -> int:
        """How many tokens fit on a page."""
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        return self.table.shape[1] * self.page

    @property
    def part(self) -> np.ndarray:
        """The part that each row is in, [B]."""
        rows, parts = len(self.table), len(self.users)
        return np.arange(rows) // (rows // parts)

    @property
    def axes(self) -> "PagedCache":
        full, rows = super().axes, ("batch", None)
        return PagedCache(full.k, full.v, full.length, rows, rows)

    def check(self, new: Any) -> None:
        """ValueError where rows lack slots, or the pool pages."""
        super().check(new)
        check_pages(self, new)

    def reserve(self, new: Int32[Array, "..."]) -> "PagedCache":
        """With pages for `new` more tokens a row, as far as they last.

        A page that is begun, and shared, is copied for its row.
        """
        new, axes = jnp.broadcast_to(new, self.length.shape), self.axes
        return here().split(take_pages, (axes, ("batch",)), axes)(
            self, new
        )

    def pages_of(
        self, rows: Int[Array, " rows"]
    ) -> Int32[Array, "rows width"]:
        """The pages of these rows, counted through the whole pool."""
        return count_through(self.table, self.users, rows)

    def slots_of(
        self, rows: Int[Array, " rows"], positions: Int[Array, "rows T"]
    ) -> Int[Array, "rows T"]:
        """Which slots of the pool positions of rows have; -1: none."""
        pages = jnp.take_along_axis(
            self.pages_of(rows), positions // self.page, axis=1,
            mode="fill", fill_value=NO_PAGE,
        )
        at = pages * self.page + positions % self.page
        return jnp.where(pages == NO_PAGE, -1, at)

    def update(
        self,
        layer: int | Int32[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int32[Array, "B T"],
    ) -> Update:
        """With these tokens; and what a layer then sees: all slots."""
        rows = jnp.arange(len(self.table))
        at = self.slots_of(rows, positions).reshape(1, -1)
        new = replace(
            self, k=write_pool(self.k, layer, k, at),
            v=write_pool(self.v, layer, v, at),
        )
        pages = self.pages_of(rows)
        keys = gather_pages(new.k, layer, pages)
        values = gather_pages(new.v, layer, pages)
        shown = jnp.tile(jnp.arange(self.slots), (len(rows), 1))
        return new, keys, values, shown

    def first_row(self) -> tuple[Heads, Heads]:
        every = jnp.arange(self.k.shape[0])[:, None]        # [L, 1]
        pages = self.pages_of(jnp.arange(1))                # [1, width]
        k = gather_pages(self.k, every, pages)
        return k, gather_pages(self.v, every, pages)

    def insert(
        self, row: int | Int[Array, ""], other: KVCache
    ) -> "PagedCache":
        """Batch row `row` becomes row 0 of `other`, on its own pages.

        ValueError if there is no such row, or too few pages, which can
        be seen only outside of a compiled function.
        """
        return insert_on_pages(self, row, other)

    def evict(self, row: int | Int[Array, ""]) -> "PagedCache":
        """Batch row `row` is empty; pages that nobody has are free."""
        length = set_length(self.length, row, 0)
        left = self.pages_of(jnp.atleast_1d(jnp.asarray(row)))
        table = self.table.at[row].set(
            NO_PAGE, mode="drop", wrap_negative_indices=False
        )
        users = count_users(self.users, left, -1)
        return replace(self, length=length, table=table, users=users)


# %% book/chapters/29b_pages.md, cell 7
def write_pool(
    pool: Any, layer: int | Int32[Array, ""], x: Any,
    at: Int[Array, "1 N"],
) -> Any:
    """Put `x` [B, T, K, H] into a layer's slots `at` of the pool."""
    as_row = jax.tree.map(
        lambda a: a.reshape(len(a), 1, -1, *a.shape[3:]), pool
    )
    x = x.reshape(1, -1, *x.shape[2:])
    new = write_cache(as_row, layer, x, at)
    return jax.tree.map(lambda a, b: a.reshape(b.shape), new, pool)


def write_layers(pool: Any, x: Any, at: Int[Array, "1 S"]) -> Any:
    """Put a row `x` [L, S, K, H] into the pool's slots `at`."""
    as_rows = jax.tree.map(
        lambda a: a.reshape(1, len(a), -1, *a.shape[3:]), pool
    )
    every = jnp.tile(at, (x.shape[0], 1))                   # [L, S]
    new = write_cache(as_rows, 0, x, every)
    return jax.tree.map(lambda a, b: a.reshape(b.shape), new, pool)


def gather_pages(
    pool: Any, layer: Any, pages: Int[Array, "rows width"]
) -> Any:
    """A layer's heads [., S, K, H], page after page.

    NO_PAGE gives page 0, at positions that a row has not reached.
    """
    def gather(a: Array) -> Array:
        found = a.at[layer, pages].get(
            mode="clip", wrap_negative_indices=False
        )                                       # [., width, page, K, H]
        return found.reshape(len(found), -1, *a.shape[3:])

    return jax.tree.map(gather, pool)


# %% book/chapters/29b_pages.md, cell 8
def insert_on_pages(
    cache: PagedCache, row: int | Int[Array, ""], other: KVCache
) -> PagedCache:
    """`cache.insert`: empty the row, take pages, write its slots."""
    if isinstance(other, RingCache):
        raise ValueError("a ring's row does not fit into pages")
    n, emptied = other.length[0], cache.evict(row)
    length = set_length(emptied.length, row, n)
    new = length - emptied.length
    if is_known(new) and is_known(cache.users):
        emptied.check(new)
    grown = emptied.reserve(new)
    k, v = other.first_row()
    slots = jnp.arange(k.shape[1])[None]
    slots = jnp.where(slots < n, slots, PAD_POSITION)
    at = grown.slots_of(jnp.atleast_1d(jnp.asarray(row)), slots)
    return replace(
        grown, length=length, k=write_layers(grown.k, k, at),
        v=write_layers(grown.v, v, at),
    )


# %% book/chapters/29b_pages.md, cell 9
def pages_wanted(cache: Any, new: Any) -> tuple[Any, Any]:
    """For `new` more tokens: which rows need a copy of a page that
    they share, and how many new pages each. NumPy or JAX.
    """
    rows, at = np.arange(len(cache.table)), cache.length // cache.page
    # A full row has begun no page: any entry will do for it.
    at = at * (at < cache.table.shape[1])
    begun = cache.table[rows, at]
    inside = (cache.length % cache.page > 0) & (begun != NO_PAGE)
    # NO_PAGE reads the last page's users, and `inside` is False.
    shared = cache.users[cache.part, begun] > 1
    have = (cache.table != NO_PAGE).sum(axis=1)
    most = (cache.length + new) * (new > 0)
    more = -(-most // cache.page) - have
    return inside & shared & (new > 0), more * (more > 0)


def check_pages(cache: Any, new: Any) -> None:
    """ValueError where the pool has too few free pages."""
    length, table, users = map(
        np.asarray, (cache.length, cache.table, cache.users)
    )
    there = replace(cache, length=length, table=table, users=users)
    new = np.broadcast_to(np.asarray(new, np.int32), length.shape)
    copies, more = pages_wanted(there, new)
    want = (copies + more).reshape(len(users), -1).sum(axis=1)
    free = (users == 0).sum(axis=1)
    if (want > free).any():
        i = int((want - free).argmax())
        raise ValueError(
            f"{want[i]} pages of {cache.page} tokens are wanted and "
            f"{free[i]} are free: evict a row, or make a cache with "
            "more pages"
        )


# %% book/chapters/29b_pages.md, cell 10
def is_known(a: Any) -> bool:
    """Whether this process can look at the numbers now."""
    return not isinstance(a, jax.core.Tracer) and a.is_fully_addressable


def count_through(
    table: Int32[Array, "B width"], users: Int32[Array, "parts each"],
    rows: Int[Array, " rows"],
) -> Int32[Array, "rows width"]:
    """Lines of a table whose parts each count their pages from 0."""
    own = table.at[rows].get(
        mode="fill", fill_value=NO_PAGE, wrap_negative_indices=False
    )
    part = rows // (len(table) // len(users))
    first = part[:, None] * users.shape[1]
    return jnp.where(own == NO_PAGE, NO_PAGE, own + first)


def count_users(
    users: Int32[Array, "parts each"], pages: Int[Array, "rows width"],
    by: int,
) -> Int32[Array, "parts each"]:
    """With `by` more users of each of these pages."""
    flat = users.reshape(-1).at[pages].add(
        by, mode="drop", wrap_negative_indices=False
    )
    return flat.reshape(users.shape)


# %% book/chapters/29b_pages.md, cell 11
def take_pages(
    cache: PagedCache, new: Int32[Array, " B"]
) -> PagedCache:
    """`cache.reserve`, on a device that has whole parts."""
    copies, more = pages_wanted(cache, new)                     # [B]
    parts, each = cache.users.shape
    count = copies + more
    before = jnp.cumsum(count.reshape(parts, -1), axis=1)
    before = before.ravel() - count
    free = jnp.stack([
        jnp.flatnonzero(users == 0, size=each, fill_value=NO_PAGE)
        for users in cache.users
    ])                                                # [parts, each]
    columns = np.arange(cache.table.shape[1])
    have = (cache.table != NO_PAGE).sum(axis=1)[:, None]
    added = (columns >= have) & (columns < have + more[:, None])
    begun = columns == cache.length[:, None] // cache.page
    copied = copies[:, None] & begun                        # [B, width]
    nth = jnp.where(copied, 0, columns - have + copies[:, None])
    pages = free.at[cache.part[:, None], before[:, None] + nth].get(
        mode="fill", fill_value=NO_PAGE
    )
    changed, rows = added | copied, jnp.arange(len(cache.table))
    table = jnp.where(changed, pages, cache.table).astype(jnp.int32)
    longer = replace(cache, table=table)
    old, fresh = cache.pages_of(rows), longer.pages_of(rows)
    users = count_users(
        cache.users, jnp.where(changed, fresh, NO_PAGE), 1
    )
    users = count_users(users, jnp.where(copied, old, NO_PAGE), -1)
    source, target = (
        jnp.where(copied, pages, NO_PAGE).max(axis=1)
        for pages in (old, fresh)
    )

    def copy(pool: Array) -> Array:
        content = pool.at[:, source].get(
            mode="clip", wrap_negative_indices=False
        )
        return pool.at[:, target].set(
            content, mode="drop", wrap_negative_indices=False
        )

    k, v = jax.tree.map(copy, (cache.k, cache.v))
    return replace(longer, k=k, v=v, users=users)


# %% book/chapters/29b_pages.md, cell 12
@dataclass(frozen=True)
class Paged(CacheKind):
    """Keys and values on pages of a pool that the rows share.

    A layer with a window keeps its ring, which is short already.
    """

    page: Size = 16                         # tokens on a page
    pages: Size | None = None       # in all; None: as for full rows
    heads: CacheKind = AsItComes()          # and how heads are kept

    def keep(self, cache: KVCache) -> KVCache:
        cache = self.heads.keep(cache)
        if type(cache) is not KVCache:
            return cache
        rows, slots = cache.k.shape[1:3]
        width = -(-slots // self.page)
        pages = self.pages or rows * width
        parts = here().parts(rows, "batch")
        while here().parts(pages, "batch") != parts:
            pages += 1

        def pool(a: Array) -> Array:
            shape = a.shape[0], pages, self.page, *a.shape[3:]
            return jnp.zeros(shape, a.dtype)

        k, v = jax.tree.map(pool, (cache.k, cache.v))
        table = jnp.full((rows, width), NO_PAGE, jnp.int32)
        users = jnp.zeros((parts, pages // parts), jnp.int32)
        return PagedCache(k, v, cache.length, table, users)


CACHE_KINDS["paged"] = Paged()
CACHE_KINDS["paged-int8"] = Paged(heads=EightBit())


# %% book/chapters/29b_pages.md, cell 15
def check_share(cache: KVCache, row: int, source: int, n: int) -> None:
    """ValueError unless row `source` has n tokens for another row."""
    rows = len(cache.length)
    for at in (row, source):
        if not 0 <= at < rows:
            raise ValueError(f"no row {at} in a batch of {rows}")
    have = int(cache.length[source])
    if row == source or not 0 < n <= have:
        raise ValueError(
            f"row {row} cannot begin with {n} tokens of row {source}, "
            f"which has {have}"
        )


# %% book/chapters/29b_pages.md, cell 16
@functools.singledispatch
def share(cache: KVCache, row: int, source: int, n: int) -> KVCache:
    """Row `row` becomes the first `n` tokens of row `source`.

    They are copied. ValueError if there are fewer, or no such row.
    """
    check_share(cache, row, source, n)
    k, v = jax.tree.map(
        lambda a: a.at[:, row].set(a[:, source]), (cache.k, cache.v)
    )
    length = set_length(cache.length, row, n)
    return replace(cache, k=k, v=v, length=length)


@share.register
def share_ring(
    cache: RingCache, row: int, source: int, n: int
) -> KVCache:
    """A part of a row only while the ring has lost nothing of it."""
    have = int(cache.length[source])
    if n != have and have > cache.slots:
        raise ValueError(
            f"a ring keeps the end of row {source}, not its first {n} "
            "tokens: share all of them"
        )
    return share.dispatch(KVCache)(cache, row, source, n)


# %% book/chapters/29b_pages.md, cell 17
@share.register
def share_pages(
    cache: PagedCache, row: int, source: int, n: int
) -> KVCache:
    """Nothing is copied: both rows have the same pages."""
    check_share(cache, row, source, n)
    if cache.part[row] != cache.part[source]:
        raise ValueError(
            f"rows {row} and {source} are on different devices, whose "
            "pages they cannot share"
        )
    cache = cache.evict(row)
    first = jnp.arange(cache.table.shape[1]) * cache.page < n
    own = jnp.where(first, cache.table[source], NO_PAGE)
    table = cache.table.at[row].set(own)
    cache = replace(
        cache, table=table, length=set_length(cache.length, row, n)
    )
    pages = cache.pages_of(jnp.array([row]))
    users = count_users(cache.users, pages, 1)
    return replace(cache, users=users)
