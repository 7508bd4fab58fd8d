# Generated from book/chapters/04_attention.md, book/chapters/16_mixtral.md by `make sync`; edit the chapters.
"""Keys and values that are kept: a full cache, and a ring.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from annotated_moe import placement


# %% book/chapters/04_attention.md, cell 35
def write_cache(
    stack: Float[Array, "L B S K H"],
    layer: int | Int32[Array, ""],
    x: Float[Array, "B T K H"],
    slots: Int32[Array, "B T"],
) -> Float[Array, "L B S K H"]:
    """Put `x` into `slots` of `stack[layer]`, cast to its dtype.

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

Update = tuple[
    "KVCache",
    Float[Array, "B S K H"],
    Float[Array, "B S K V"],
    Int32[Array, "B S"],
]


# %% book/chapters/04_attention.md, cell 42
def put_row(
    stack: Float[Array, "L B S K H"],
    row: int | Int[Array, ""],
    x: Float[Array, "L _ K H"],
) -> Float[Array, "L B S K H"]:
    """Put `x` into the first slots of batch row `row`."""
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
        return replace(self, k=wide, v=wide, length=("batch",))

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

    def insert(
        self, row: int | Int[Array, ""], other: "KVCache"
    ) -> "KVCache":
        """Batch row `row` becomes row 0 of `other`.

        ValueError if that has more slots, or there is no such row.
        """
        length = set_length(self.length, row, other.length[0])
        k = put_row(self.k, row, other.k[:, 0])
        v = put_row(self.v, row, other.v[:, 0])
        return replace(self, k=k, v=v, length=length)

    def evict(self, row: int | Int[Array, ""]) -> "KVCache":
        """Batch row `row` is empty; its slots will be written over."""
        return replace(self, length=set_length(self.length, row, 0))


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
    stack: Float[Array, "L B S K H"],
    layer: int | Int32[Array, ""],
    x: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    end: Int32[Array, " B"],
) -> Float[Array, "L B S K H"]:
    """Put `x` into the ring: position p into slot p % S, if it lasts.

    What later positions of the same call would overwrite is dropped,
    and so is padding: no two tokens of a row go to the same slot.
    """
    slots = stack.shape[2]
    lasts = positions >= end[:, None] - slots
    real = positions < PAD_POSITION
    at = jnp.where(lasts & real, positions % slots, slots)
    return write_cache(stack, layer, x, at)


# %% book/chapters/16_mixtral.md, cell 35
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
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        old = ring_positions(self.length, self.slots)
        return (
            new,
            jnp.concatenate([self.k[layer], k], axis=1),
            jnp.concatenate([self.v[layer], v], axis=1),
            jnp.concatenate([old, positions], axis=1),
        )

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
