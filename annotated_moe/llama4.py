# Generated from book/chapters/18_llama4.md by `make sync`; edit the chapter.
"""The chapter on Llama 4.
"""

# %% book/chapters/18_llama4.md, cell 1
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from annotated_moe.moe import Route
from annotated_moe.rms_norm import rms_norm


# %% book/chapters/18_llama4.md, cell 2
def route_sigmoid(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits; each gate is a sigmoid by itself.

    Float32 inside. The gate scales what the expert reads.
    Source: Llama 4's release.
    """
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.sigmoid(best)
    return Route(probs, gates, experts, logits)


# %% book/chapters/18_llama4.md, cell 3
def within_chunk(
    chunk: int, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where positions `q` and `k` lie in the same chunk."""
    return q // chunk == k // chunk


# %% book/chapters/18_llama4.md, cell 4
def turn_and_norm(
    q: Float[Array, "B T Q H"], k: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"], turn: Callable, eps: float,
) -> Any:
    """Queries and keys turned, then rescaled to unit length a feature."""
    one = jnp.ones(q.shape[-1])
    q, k = turn(q, positions), turn(k, positions)
    return rms_norm(q, one, eps), rms_norm(k, one, eps)


# %% book/chapters/18_llama4.md, cell 5
def heat_queries(
    q: Float[Array, "B T Q H"], k: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"], turn: Callable,
    temperature: tuple[int, float] | None,
) -> Any:
    """No rotation; queries grow with the logarithm of their position.

    Source: Llama 4's release; Nakanishi (2025).
    """
    if temperature is None:
        return q, k
    floor, scale = temperature
    heat = jnp.floor((positions + 1) / floor)               # [B, T]
    heat = jnp.log1p(heat) * scale + 1
    return q * heat[..., None, None], k
