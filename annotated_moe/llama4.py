# Generated from book/chapters/18_llama4.md by `make sync`; edit the chapter.
"""Llama 4 Scout was published with a context of 10,485,760 tokens. Keep
the keys and values of its 48 layers for that many and they fill 1,920
GiB, nine times what its weights fill. And memory is the smaller
trouble: at such distances RoPE turns by angles that no training text
was long enough to show, and a softmax over ten million keys has next to
nothing left for the one that matters. This chapter builds the answers,
each a few lines long: layers that look no further than their chunk,
layers without rotation whose queries grow hotter with distance, and a
router that picks one expert and turns down what it hears. By its end
you will have both published models as presets, a cache a quarter the
size, and a test for a mistake that Meta's own code makes from the
second chunk on.
"""

# %% book/chapters/18_llama4.md, cell 1
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from annotated_moe.moe import Route
from annotated_moe.rms_norm import rms_norm


# %% book/chapters/18_llama4.md, cell 5
PLAIN: dict[str, Any] = {
    "vocab_size": 202048, "d_model": 5120, "num_layers": 48,
    "q_heads": 40, "kv_heads": 8, "head_size": 128,
    "attn_multiplier": 128**-0.5, "attn_softcap": None,
    "rope_base": 500000.0, "post_norm": False, "activation": "silu",
    "embedding_multiplier": 1.0, "output_multiplier": 1.0,
    "tied": False, "pad_id": 200018,
    "eos_id": (200001, 200007, 200008),
}


# %% book/chapters/18_llama4.md, cell 6
NEW: dict[str, Any] = {
    "attn_chunk": 8192,                 # where a layer has RoPE
    "nope_every": 4,                    # every fourth has none
    "attn_temperature": (8192, 0.1),    # ... and grows hotter
    "router": "sigmoid_input", "top_k": 1, "shared_expert": True,
    "d_ff": 8192,                       # of an expert
    "dense_ff": 16384,                  # of a layer without experts
}


# %% book/chapters/18_llama4.md, cell 7
PRESETS: dict[str, dict[str, Any]] = {
    "llama-4-scout": PLAIN | NEW | {
        "context": 10485760, "num_experts": 16,
        "rope_scaling": (16.0, 1.0, 1.0, 8192), "qk_norm": "after_rope",
    },
    "llama-4-maverick": PLAIN | NEW | {
        "context": 1048576, "num_experts": 128, "moe_every": 2,
    },
}


# %% book/chapters/18_llama4.md, cell 13
def within_chunk(
    chunk: int, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where positions `q` and `k` lie in the same chunk.

    Chunks are counted from position 0 of each row, `chunk` tokens
    each. What lies ahead is not hidden here. Source: Llama 4's release.
    """
    return q // chunk == k // chunk


# %% book/chapters/18_llama4.md, cell 37
def heat_queries(
    q: Float[Array, "B T Q H"], k: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"], turn: Callable,
    temperature: tuple[int, float] | None,
) -> Any:
    """No rotation; queries grow with the logarithm of their position.

    `temperature` is (floor, scale): nothing changes for the first
    `floor` - 1 tokens. None: never. `turn` is not called. Positions
    are those of a row's own tokens. Returns q in float32, and k.
    Source: Llama 4's release; Nakanishi (2025).
    """
    if temperature is None:
        return q, k
    floor, scale = temperature
    heat = jnp.floor((positions + 1) / floor)               # [B, T]
    heat = jnp.log1p(heat) * scale + 1
    return q * heat[..., None, None], k


# %% book/chapters/18_llama4.md, cell 47
def turn_and_norm(
    q: Float[Array, "B T Q H"], k: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"], turn: Callable, eps: float,
) -> Any:
    """Queries and keys turned, then each head's rescaled to unit RMS.

    No learned gains. Norms in float32; returns q and k in their dtypes.
    Source: Llama 4's release.
    """
    one = jnp.ones(q.shape[-1])
    q, k = turn(q, positions), turn(k, positions)
    return rms_norm(q, one, eps), rms_norm(k, one, eps)


# %% book/chapters/18_llama4.md, cell 51
def route_sigmoid(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits; each gate is a sigmoid by itself.

    Float32 inside. The gate scales what the expert reads; `probs`, for
    the losses of training, is a softmax over all.
    Source: Llama 4's release.
    """
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.sigmoid(best)
    return Route(probs, gates, experts, logits)
