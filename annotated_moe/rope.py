# Generated from book/chapters/03_rope.md by `make sync`; edit the chapter.
"""Attention compares tokens with tokens and never asks where they
stand: *dog bites man* and *man bites dog* are to it one bag of three
words. Rotary position embedding turns every query and key by an angle
that grows with its position, and then two tokens score by what they are
and how far apart they stand, and by nothing else. By the end of this
chapter you will have that in two short functions, know the two ways in
which the world lays out its pairs and how to get from one to the other,
and have seen what becomes of the angles in bfloat16.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


# %% book/chapters/03_rope.md, cell 9
def rope_angles(
    positions: Int32[Array, "B T"],
    head_size: int,
    base: float = 10000.0,
    change: Callable[[Array], Array] | None = None,
) -> Float32[Array, "B T {head_size//2}"]:
    """Angle in radians of each pair of features at each position.

    Pair i turns by base**(-2 i / head_size) a token, or by what
    `change` makes of these rates. Computed in float32. An odd
    `head_size` is a ValueError.
    Source: Su et al. (2021), section 3.2.2; base as in Grok-1.
    """
    if head_size % 2:
        raise ValueError(
            f"RoPE needs an even head size, got {head_size}"
        )
    evens = jnp.arange(0, head_size, 2, dtype=jnp.float32)  # [H/2]
    rates = 1.0 / base ** (evens / head_size)               # [H/2]
    rates = change(rates) if change else rates
    return positions[..., None].astype(jnp.float32) * rates


# %% book/chapters/03_rope.md, cell 13
def rope(
    x: Float[Array, "B T heads H"],
    positions: Int32[Array, "B T"],
    base: float = 10000.0,
    change: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T heads H"]:
    """Turn the feature pairs (i, i + H/2) of `x` by `rope_angles`.

    Computes in float32 and returns `x.dtype`. An odd head size is a
    ValueError.
    Source: Su et al. (2021), section 3.4.2; halves as in Grok-1.
    """
    angles = rope_angles(positions, x.shape[-1], base, change)
    cos = jnp.cos(angles)[:, :, None]                   # [B, T, 1, H/2]
    sin = jnp.sin(angles)[:, :, None]                   # [B, T, 1, H/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(y, axis=-1).astype(x.dtype)
