# Generated from book/chapters/03_rope.md, book/chapters/04_attention.md, book/chapters/15_llama.md, book/chapters/23_training.md by `make sync`; edit the chapters.
"""Attention compares tokens with tokens and never asks where they
stand: to the last word of a sentence, *dog bites man* and *man bites
dog* are one bag of three words. Rotary position embedding turns every
query and key by an angle that grows with its position, and then two
tokens score by what they are and how far apart they stand, and by
nothing else. By the end of this chapter you will have that in two short
functions, know the two ways in which the world lays out its pairs and
how to get from one to the other, and have seen what becomes of the
angles in bfloat16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from annotated_moe.specs import Positive, Size, Spec


# %% book/chapters/03_rope.md, cell 9
def rope_angles(
    positions: Int32[Array, "B T"],
    head_size: int,
    base: float = 10000.0,
    freq_scaling: Callable[[Array], Array] | None = None,
) -> Float32[Array, "B T {head_size//2}"]:
    """Angle in radians of each pair of features at each position.

    Pair i turns by base**(-2 i / head_size) a token, or by what
    `freq_scaling` makes of these frequencies. Computed in float32. An
    odd `head_size` is a ValueError.
    Source: Su et al. (2021), section 3.2.2; base as in Grok-1.
    """
    if head_size % 2:
        raise ValueError(
            f"RoPE needs an even head size, got {head_size}"
        )
    evens = jnp.arange(0, head_size, 2, dtype=jnp.float32)  # [H/2]
    inv_freq = 1.0 / base ** (evens / head_size)            # [H/2]
    inv_freq = freq_scaling(inv_freq) if freq_scaling else inv_freq
    return positions[..., None].astype(jnp.float32) * inv_freq


# %% book/chapters/03_rope.md, cell 13
def rope(
    x: Float[Array, "B T heads H"],
    positions: Int32[Array, "B T"],
    base: float = 10000.0,
    freq_scaling: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T heads H"]:
    """Turn the feature pairs (i, i + H/2) of `x` by `rope_angles`.

    Computes in float32 and returns `x.dtype`. An odd head size is a
    ValueError.
    Source: Su et al. (2021), section 3.4.2; halves as in Grok-1.
    """
    angles = rope_angles(positions, x.shape[-1], base, freq_scaling)
    cos = jnp.cos(angles)[:, :, None]                   # [B, T, 1, H/2]
    sin = jnp.sin(angles)[:, :, None]                   # [B, T, 1, H/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(y, axis=-1).astype(x.dtype)


# %% book/chapters/04_attention.md, cell 76
@dataclass(frozen=True)
class Rope(Spec):
    """How a layer turns its queries and keys."""

    base: Positive = 10000.0        # slowest angle: about 1 / this

    def turn(
        self, x: Float[Array, "B T heads H"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T heads H"]:
        """`x` turned by its positions, as `rope` does."""
        return rope(x, positions, self.base)


# %% book/chapters/15_llama.md, cell 33
def scale_rope_frequencies(
    inv_freq: Float32[Array, " pairs"],
    factor: float,
    low: float,
    high: float,
    context: int,
) -> Float32[Array, " pairs"]:
    """RoPE's frequencies for a context longer than a model's own.

    `inv_freq` is in radians a token, `context` the tokens that the
    model was first trained on. Pairs that turn less than `low` times in
    that context turn `factor` times slower, those that turn more than
    `high` times stay, between is a blend. ValueError if high < low.
    Source: Llama 3.1, `apply_scaling`; Peng et al. (2023), 3.2.
    """
    if high < low:
        raise ValueError(f"rope_scaling: high {high} below low {low}")
    turns = context * inv_freq / (2 * math.pi)              # [H/2]
    if high == low:
        return jnp.where(turns < low, inv_freq / factor, inv_freq)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * inv_freq / factor + keep * inv_freq


# %% book/chapters/15_llama.md, cell 34
@dataclass(frozen=True)
class Llama3Rope(Rope):
    """RoPE for a longer context, by four numbers. See
    `scale_rope_frequencies`.
    """

    factor: Positive = 8.0
    low: Positive = 1.0
    high: Positive = 4.0
    context: Size = 8192

    def check(self) -> None:
        if self.high < self.low:
            raise ValueError(
                f"rope_scaling: high {self.high} below low {self.low}"
            )

    def turn(
        self, x: Float[Array, "B T heads H"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T heads H"]:
        def scaled(inv_freq: Array) -> Array:
            return scale_rope_frequencies(
                inv_freq, self.factor, self.low, self.high, self.context
            )

        return rope(x, positions, self.base, scaled)


# %% book/chapters/23_training.md, cell 6
DOCUMENT_STRIDE = 2**15                 # places a document may have


@dataclass(frozen=True)
class RopeInDocument(Rope):
    """Another's turn, by the place in a document.

    A position is document * DOCUMENT_STRIDE + place.
    """

    inner: Rope = Rope()

    def turn(
        self, x: Float[Array, "B T heads H"],
        positions: Int32[Array, "B T"],
    ) -> Float[Array, "B T heads H"]:
        return self.inner.turn(x, positions % DOCUMENT_STRIDE)
