# Generated from book/chapters/15_llama.md by `make sync`; edit the chapter.
"""Give the small model of this book, which learned on 256 tokens at a
time, a text of 1,024, and it reads the second half worse, by more than
half a nat a token, than if it forgot everything every 256 tokens. Llama
3.1 went from 8,192 tokens to 131,072, and its file says how in four
numbers. This chapter is about Llama, of which many open models are a
variation: what it leaves out of Grok-1, what each of its generations
changed, and how those four numbers work. By its end you will have
fifteen Llamas, from 1 to 405 billion parameters, as a page of plain
data, a proof that the complex numbers in which they were published
compute what this book computes, and the small model reading its 1,024
tokens, mended in a line and without training.
"""

# %% book/chapters/15_llama.md, cell 1
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Scaling = tuple[float, float, float, int]


# %% book/chapters/15_llama.md, cell 8
# In what all Llamas differ from Grok-1, as ModelConfig's fields.
EVERY_LLAMA: dict[str, Any] = {
    "num_experts": 1,               # one dense block, no router
    "top_k": 1,
    "post_norm": False,             # norms before sublayers only
    "activation": "silu",           # `swiglu`
    "tied": False,                  # an output matrix of its own
    "attn_softcap": None,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
}


# %% book/chapters/15_llama.md, cell 14
def swiglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """silu(gate) * up in float32, then `dtype`.

    Source: Shazeer (2020), section 2.
    """
    return (jax.nn.silu(gate) * up).astype(dtype)


# %% book/chapters/15_llama.md, cell 33
def slow_down(
    rates: Float32[Array, " pairs"], scaling: Scaling
) -> Float32[Array, " pairs"]:
    """RoPE's rates for a context longer than a model was trained on.

    `rates` are radians a token, `scaling` is (factor, low, high, old
    context in tokens). Pairs that turn less than `low` times in the
    old context turn `factor` times slower, those that turn more than
    `high` times stay, between is a blend. ValueError if high < low.
    Source: Llama 3.1, `apply_scaling`; Peng et al. (2023), 3.2.
    """
    factor, low, high, context = scaling
    if high < low:
        raise ValueError(f"rope_scaling: high {high} below low {low}")
    turns = context * rates / (2 * math.pi)                 # [H/2]
    if high == low:
        return jnp.where(turns < low, rates / factor, rates)
    keep = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * rates / factor + keep * rates


# %% book/chapters/15_llama.md, cell 41
def sized(
    layers: int, q_heads: int, kv_heads: int, d_ff: int,
    head_size: int = 128,
) -> dict[str, Any]:
    """The fields in which the members of one generation differ."""
    return {
        "num_layers": layers,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "d_ff": d_ff,
        "head_size": head_size,
        "d_model": q_heads * head_size,
        "attn_multiplier": head_size**-0.5,
    }


# %% book/chapters/15_llama.md, cell 42
LLAMA_1 = EVERY_LLAMA | {
    "vocab_size": 32000,
    "context": 2048,
    "norm_eps": 1e-6,
    "rope_base": 10000.0,
    "eos_id": 2,
}
LLAMA_2 = LLAMA_1 | {"context": 4096, "norm_eps": 1e-5}


# %% book/chapters/15_llama.md, cell 43
LLAMA_3 = LLAMA_2 | {
    "vocab_size": 128256,
    "context": 8192,
    "rope_base": 500000.0,
    "eos_id": (128001, 128009),
}
LLAMA_3_1 = LLAMA_3 | {
    "context": 131072,
    "rope_scaling": (8.0, 1.0, 4.0, 8192),
    "eos_id": (128001, 128008, 128009),
}
LLAMA_3_2 = LLAMA_3_1 | {
    "rope_scaling": (32.0, 1.0, 4.0, 8192),
    "tied": True,
}


# %% book/chapters/15_llama.md, cell 44
# Source: the params.json or config.json beside each model's weights.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-1-7b": LLAMA_1 | sized(32, 32, 32, 11008),
    "llama-1-13b": LLAMA_1 | sized(40, 40, 40, 13824),
    "llama-1-33b": LLAMA_1 | sized(60, 52, 52, 17920),
    "llama-1-65b": LLAMA_1 | sized(80, 64, 64, 22016),
    "llama-2-7b": LLAMA_2 | sized(32, 32, 32, 11008),
    "llama-2-13b": LLAMA_2 | sized(40, 40, 40, 13824),
    "llama-2-70b": LLAMA_2 | sized(80, 64, 8, 28672),
    "llama-3-8b": LLAMA_3 | sized(32, 32, 8, 14336),
    "llama-3-70b": LLAMA_3 | sized(80, 64, 8, 28672),
    "llama-3.1-8b": LLAMA_3_1 | sized(32, 32, 8, 14336),
    "llama-3.1-70b": LLAMA_3_1 | sized(80, 64, 8, 28672),
    "llama-3.1-405b": LLAMA_3_1 | sized(126, 128, 8, 53248),
    "llama-3.2-1b": LLAMA_3_2 | sized(16, 32, 8, 8192, 64),
    "llama-3.2-3b": LLAMA_3_2 | sized(28, 24, 8, 8192),
    "llama-3.3-70b": LLAMA_3_1 | sized(80, 64, 8, 28672),
}
