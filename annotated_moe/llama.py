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

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

# %% book/chapters/15_llama.md, cell 2
Scaling = tuple[float, float, float, int]


# %% book/chapters/15_llama.md, cell 9
EVERY_LLAMA: dict[str, Any] = {
    # In what all Llamas differ from Grok-1, as ModelConfig's fields.
    "num_experts": 1,               # one dense block, no router
    "top_k": 1,
    "post_norm": False,             # norms before sublayers only
    "activation": "silu",           # `swiglu`
    "tied": False,                  # an output matrix of its own
    "attn_softcap": None,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
}


# %% book/chapters/15_llama.md, cell 15
def swiglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """silu(gate) * up in float32, then `dtype`.

    Source: Shazeer (2020), section 2.
    """
    return (jax.nn.silu(gate) * up).astype(dtype)


# %% book/chapters/15_llama.md, cell 34
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


# %% book/chapters/15_llama.md, cell 42
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


# %% book/chapters/15_llama.md, cell 43
LLAMA_1 = EVERY_LLAMA | {
    "vocab_size": 32000,
    "context": 2048,
    "norm_eps": 1e-6,
    "rope_base": 10000.0,
    "eos_id": 2,
}
LLAMA_2 = LLAMA_1 | {"context": 4096, "norm_eps": 1e-5}


# %% book/chapters/15_llama.md, cell 44
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


# %% book/chapters/15_llama.md, cell 45
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


# %% book/chapters/15_llama.md, cell 59
ATTENTION = "decoder_layer/multi_head_attention"
HUB_ENDS = (
    ("model.embed_tokens.weight", "in_out_embed/embeddings", "as is"),
    ("model.norm.weight", "rms_norm/scale", "as is"),
    ("lm_head.weight", "lm_head/embeddings", "as is"),
)
HUB_NORMS = (
    ("input_layernorm.weight", "decoder_layer/rms_norm/scale", "as is"),
    ("post_attention_layernorm.weight",
     "decoder_layer/rms_norm_2/scale", "as is"),
)


# %% book/chapters/15_llama.md, cell 60
HUB_ATTENTION = (
    ("self_attn.q_proj.weight", f"{ATTENTION}/query/w", "transpose"),
    ("self_attn.k_proj.weight", f"{ATTENTION}/key/w", "transpose"),
    ("self_attn.v_proj.weight", f"{ATTENTION}/value/w", "transpose"),
    ("self_attn.o_proj.weight", f"{ATTENTION}/linear/w", "transpose"),
    ("self_attn.q_proj.bias", f"{ATTENTION}/query/b", "as is"),
    ("self_attn.k_proj.bias", f"{ATTENTION}/key/b", "as is"),
    ("self_attn.v_proj.bias", f"{ATTENTION}/value/b", "as is"),
    ("self_attn.o_proj.bias", f"{ATTENTION}/linear/b", "as is"),
)


# %% book/chapters/15_llama.md, cell 61
HUB_MLP = (
    ("mlp.gate_proj.weight", "decoder_layer/linear/w", "transpose"),
    ("mlp.up_proj.weight", "decoder_layer/linear_v/w", "transpose"),
    ("mlp.down_proj.weight", "decoder_layer/linear_1/w", "transpose"),
    ("mlp.gate_proj.bias", "decoder_layer/linear/b", "as is"),
    ("mlp.up_proj.bias", "decoder_layer/linear_v/b", "as is"),
    ("mlp.down_proj.bias", "decoder_layer/linear_1/b", "as is"),
)
WEIGHTS = HUB_ENDS + HUB_NORMS + HUB_ATTENTION + HUB_MLP


# %% book/chapters/15_llama.md, cell 62
HUB_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "attention_bias": "attn_bias",
}
FIELDS = HUB_FIELDS | {"mlp_bias": "mlp_bias"}
HUB_DEFAULTS = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}


# %% book/chapters/15_llama.md, cell 63
HUB_SPECIAL = (
    "head_dim rope_theta rope_scaling rope_parameters pad_token_id "
    "eos_token_id dtype torch_dtype"
)
HUB_IGNORED = "attention_dropout pretraining_tp name_or_path"
HUB_CONSTANTS = {
    "post_norm": False, "activation": "silu", "attn_softcap": None,
    "embedding_multiplier": 1.0, "output_multiplier": 1.0,
}


# %% book/chapters/15_llama.md, cell 64
def size_in(raw: dict[str, Any], name: str) -> int:
    """A field that must be a size; ValueError, naming it, if not."""
    value = raw.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name} must be an int >= 1: {value!r}")
    return value


# %% book/chapters/15_llama.md, cell 65
def read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling, in the newer spelling or the older."""
    rope = raw.get("rope_parameters")
    if rope is None:
        rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
        rope |= raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError("rope_parameters must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type is {kind!r}; known are 'default' and 'llama3'"
        )
    scaling = None
    if kind == "llama3":
        scaling = tuple(rope.get(name) for name in ROPE_SCALING)
    return {"rope_base": rope.get("rope_theta", 10000.0),
            "rope_scaling": scaling}


ROPE_SCALING = (
    "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
)


# %% book/chapters/15_llama.md, cell 66
def read_hub(raw: dict[str, Any]) -> dict[str, Any]:
    """What Llama's relatives have in common, as our settings.

    ValueError for what is not supported.
    """
    heads = size_in(raw, "num_attention_heads")
    size = raw.get("head_dim")
    if size is None:
        size = size_in(raw, "hidden_size") // heads
    eos, pad = raw.get("eos_token_id"), raw.get("pad_token_id")
    end = tuple(eos) if isinstance(eos, list) else eos
    if type(size) is not int or size < 1:
        raise ValueError(f"head_dim must be an int >= 1: {size!r}")
    return {
        **HUB_CONSTANTS,
        **read_rope(raw),
        "kv_heads": raw.get("num_key_value_heads", heads),
        "head_size": size,
        "attn_multiplier": size**-0.5,
        "eos_id": () if end is None else end,
        "pad_id": 0 if pad in (None, -1) else pad,
        "dtype": read_dtype(raw),
    }


# %% book/chapters/15_llama.md, cell 67
def read_llama(raw: dict[str, Any]) -> dict[str, Any]:
    return read_hub(raw) | {"num_experts": 1, "top_k": 1}


def read_dtype(raw: dict[str, Any]) -> str:
    """What the weights are; a half is as precise as none of ours is."""
    name = raw.get("dtype", raw.get("torch_dtype"))
    return "float32" if name == "float32" else "bfloat16"


# %% book/chapters/15_llama.md, cell 68
def write_hub(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that `read_hub` reads, from our settings."""
    rope = {"rope_type": "default"}
    if values["rope_scaling"]:
        rope = dict(zip(ROPE_SCALING, values["rope_scaling"]))
        rope["rope_type"] = "llama3"
    end = values["eos_id"]
    return {
        "hidden_act": "silu",
        "head_dim": values["head_size"],
        "rope_parameters": {"rope_theta": values["rope_base"], **rope},
        "eos_token_id": list(end) if type(end) is tuple else end,
        "pad_token_id": values["pad_id"],
        "dtype": values["dtype"],
    }
