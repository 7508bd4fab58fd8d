# Generated from book/chapters/18_llama4.md by `make sync`; edit the chapter.
"""Llama 4 Scout was published with a context of 10,485,760 tokens. Keep
the keys and values of its 48 layers for that many and they fill 1,920
GiB, more than nine times what its weights fill. And memory is the
smaller trouble: at such distances RoPE turns by angles that no training
text was long enough to show, and a softmax over ten million keys has
next to nothing left for the one that matters. This chapter builds the
answers, each a few lines long: layers that look no further than their
chunk, layers without rotation whose queries grow hotter with distance,
and a router that picks one expert and turns down what it hears. By its
end you will have both published models as presets, a cache a quarter
the size, and a test for a mistake that Meta's own code makes from the
second chunk on.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from annotated_moe.llama import (
    ATTENTION,
    HUB_DEFAULTS,
    HUB_ENDS,
    HUB_FIELDS,
    HUB_IGNORED,
    HUB_MLP,
    HUB_NORMS,
    HUB_SPECIAL,
    read_hub,
    size_in,
    write_hub,
)
from annotated_moe.moe import Route
from annotated_moe.rms_norm import rms_norm

# %% book/chapters/18_llama4.md, cell 2
Settings = dict[str, Any]                       # of a ModelConfig


# %% book/chapters/18_llama4.md, cell 6
PLAIN: Settings = {
    "vocab_size": 202048, "d_model": 5120, "num_layers": 48,
    "q_heads": 40, "kv_heads": 8, "head_size": 128,
    "attn_multiplier": 128**-0.5, "attn_softcap": None,
    "rope_base": 500000.0, "post_norm": False, "activation": "silu",
    "embedding_multiplier": 1.0, "output_multiplier": 1.0,
    "tied": False, "pad_id": 200018,
    "eos_id": (200001, 200007, 200008),
}


# %% book/chapters/18_llama4.md, cell 7
NEW: Settings = {
    "attn_chunk": 8192,                 # where a layer has RoPE
    "nope_every": 4,                    # every fourth has none
    "attn_temperature": (8192, 0.1),    # ... and grows hotter
    "router": "sigmoid_input", "top_k": 1, "shared_expert": True,
    "d_ff": 8192,                       # of an expert
    "dense_ff": 16384,                  # of a layer without experts
}


# %% book/chapters/18_llama4.md, cell 8
PRESETS: dict[str, Settings] = {
    "llama-4-scout": PLAIN | NEW | {
        "context": 10485760, "num_experts": 16,
        "rope_scaling": (16.0, 1.0, 1.0, 8192), "qk_norm": "after_rope",
    },
    "llama-4-maverick": PLAIN | NEW | {
        "context": 1048576, "num_experts": 128, "moe_every": 2,
    },
}


# %% book/chapters/18_llama4.md, cell 14
def within_chunk(
    chunk: int, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where positions `q` and `k` lie in the same chunk.

    Chunks are counted from position 0 of each row, `chunk` tokens
    each. What lies ahead is not hidden here. Source: Llama 4's release.
    """
    return q // chunk == k // chunk


# %% book/chapters/18_llama4.md, cell 38
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


# %% book/chapters/18_llama4.md, cell 48
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


# %% book/chapters/18_llama4.md, cell 52
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


# %% book/chapters/18_llama4.md, cell 64
WEIGHTS = HUB_ENDS + HUB_NORMS + (
    ("self_attn.q_proj.weight", f"{ATTENTION}/query/w", "halves"),
    ("self_attn.k_proj.weight", f"{ATTENTION}/key/w", "halves"),
    ("self_attn.v_proj.weight", f"{ATTENTION}/value/w", "transpose"),
    ("self_attn.o_proj.weight", f"{ATTENTION}/linear/w", "transpose"),
    ("self_attn.q_proj.bias", f"{ATTENTION}/query/b", "halves"),
    ("self_attn.k_proj.bias", f"{ATTENTION}/key/b", "halves"),
    ("self_attn.v_proj.bias", f"{ATTENTION}/value/b", "as is"),
    ("self_attn.o_proj.bias", f"{ATTENTION}/linear/b", "as is"),
) + tuple(
    (row[0].replace("mlp.", "feed_forward."), *row[1:])
    for row in HUB_MLP if row[1].endswith("/w")
) + (
    ("feed_forward.router.weight", "decoder_layer/router/w",
     "transpose"),
    ("feed_forward.experts.gate_up_proj", "decoder_layer/moe/linear/w",
     "first half"),
    ("feed_forward.experts.gate_up_proj",
     "decoder_layer/moe/linear_v/w", "second half"),
    ("feed_forward.experts.down_proj", "decoder_layer/moe/linear_1/w",
     "as is"),
) + tuple(
    (f"feed_forward.shared_expert.{theirs}_proj.weight",
     f"decoder_layer/shared/{ours}/w", "transpose")
    for theirs, ours in (("gate", "linear"), ("up", "linear_v"),
                         ("down", "linear_1"))
)


# %% book/chapters/18_llama4.md, cell 65
FIELDS = HUB_FIELDS | {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "intermediate_size_mlp": "dense_ff",
    "attention_chunk_size": "attn_chunk",
}
DEFAULTS = HUB_DEFAULTS | {"attention_chunk_size": None}
SPECIAL = HUB_SPECIAL + (
    " use_qk_norm attn_temperature_tuning floor_scale attn_scale "
    "no_rope_layers no_rope_layer_interval moe_layers layer_types "
    "interleave_moe_layer_step"
)
IGNORED = HUB_IGNORED + (
    " router_jitter_noise for_llm_compressor cache_implementation"
)


# %% book/chapters/18_llama4.md, cell 66
def layers_in(raw: Settings, name: str, default: Any) -> list[int]:
    """A list of numbers that a configuration may leave out."""
    found = raw.get(name)
    found = list(default) if found is None or found == [] else found
    good = type(found) is list and all(type(i) is int for i in found)
    if not good:
        raise ValueError(f"{name} must be a list of ints: {found!r}")
    return found


# %% book/chapters/18_llama4.md, cell 67
def read_places(raw: dict[str, Any]) -> dict[str, Any]:
    """Which layers have no RoPE, and which have experts."""
    n = min(size_in(raw, "num_hidden_layers"), 10000)
    nth = raw.get("no_rope_layer_interval", 4)
    step = raw.get("interleave_moe_layer_step", 1)
    if any(type(x) is not int or x < 1 for x in (nth, step)):
        raise ValueError("layer intervals must be ints >= 1")
    usual = [int((i + 1) % nth != 0) for i in range(n)]
    turns = layers_in(raw, "no_rope_layers", usual)
    every = list(range(step - 1, n, step))
    sparse = layers_in(raw, "moe_layers", every)
    check_types(raw, turns)
    bare = [i for i, turn in enumerate(turns) if not turn]
    dense = sorted(set(range(n)) - set(sparse))
    return {
        "nope_every": nth if turns == usual and bare else 0,
        "nope_layers": () if turns == usual else tuple(bare),
        "moe_every": step if sparse == every else 1,
        "dense_layers": () if sparse == every else tuple(dense),
    }


# %% book/chapters/18_llama4.md, cell 68
def check_types(raw: dict[str, Any], turns: list[int]) -> None:
    """ValueError unless exactly the layers with RoPE are chunked."""
    if len(turns) != raw["num_hidden_layers"]:
        raise ValueError("no_rope_layers must have an entry a layer")
    names = ["full_attention", "chunked_attention"]
    known = [names[bool(turn)] for turn in turns]
    if raw.get("layer_types") not in (None, [], known):
        raise ValueError(
            "layer_types must be chunked_attention where "
            "no_rope_layers is 1, full_attention where it is 0"
        )


# %% book/chapters/18_llama4.md, cell 69
def read_llama4(raw: dict[str, Any]) -> dict[str, Any]:
    heat = raw.get("attn_temperature_tuning", True)
    pair = raw.get("floor_scale", 8192), raw.get("attn_scale", 0.1)
    normed = raw.get("use_qk_norm", True)
    return {
        **read_hub(raw), **read_places(raw),
        "router": "sigmoid_input",
        "shared_expert": True,
        "qk_norm": "after_rope" if normed else "none",
        "attn_temperature": pair if heat else None,
    }


# %% book/chapters/18_llama4.md, cell 70
def write_llama4(values: dict[str, Any]) -> dict[str, Any]:
    n, nth = values["num_layers"], values["nope_every"]
    bare = {i for i in range(n) if nth and (i + 1) % nth == 0}
    turns = [int(i not in bare | {*values["nope_layers"]})
             for i in range(n)]
    step, dense = values["moe_every"], values["dense_layers"]
    names = ["full_attention", "chunked_attention"]
    heat = values["attn_temperature"]
    return {
        **write_hub(values),
        "no_rope_layers": turns,
        "no_rope_layer_interval": nth or n + 1,
        "layer_types": [names[turn] for turn in turns],
        "moe_layers": [i for i in range(step - 1, n, step)
                       if i not in dense],
        "interleave_moe_layer_step": step,
        "use_qk_norm": values["qk_norm"] == "after_rope",
        "attn_temperature_tuning": heat is not None,
        "floor_scale": heat[0] if heat else 8192,
        "attn_scale": heat[1] if heat else 0.1,
    }
