# Generated from book/chapters/15_llama.md by `make sync`; edit the chapter.
"""The chapter on Llama.
"""

# %% book/chapters/15_llama.md, cell 1
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


# %% book/chapters/15_llama.md, cell 2
def swiglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """silu(gate) * up in float32, then `dtype`. Source: Shazeer (2020)."""
    return (jax.nn.silu(gate) * up).astype(dtype)


# %% book/chapters/15_llama.md, cell 3
Scaling = tuple[float, float, float, int]


# %% book/chapters/15_llama.md, cell 4
def slow_down(
    rates: Float32[Array, " H/2"], scaling: Scaling
) -> Float32[Array, " H/2"]:
    """RoPE's rates for a context longer than a model was trained on.

    `scaling` is (factor, low, high, old context). Pairs that turn less
    than `low` times in the old context turn `factor` times slower,
    those that turn more than `high` times stay, between is a blend.
    Source: Llama 3.1, `apply_scaling`.
    """
    factor, low, high, context = scaling
    turns = context * rates / (2 * math.pi)                 # [H/2]
    if high == low:
        return jnp.where(turns < low, rates / factor, rates)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * rates / factor + keep * rates
