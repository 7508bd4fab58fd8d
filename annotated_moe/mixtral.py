# Generated from book/chapters/16_mixtral.md by `make sync`; edit the chapter.
"""A layer that looks back 4,096 tokens has no use for the 4,097th. Kept
the plain way, Mistral 7B's keys and values for 32,768 tokens still fill
4 GiB, of which a decode step reads one eighth. Mixtral and its kin
change four such things in Grok-1: how a router weighs its choice, how
far a layer looks, what the cache keeps, and how large a query may grow.
By this chapter's end each change is a few lines, the cache is an eighth
and gives the same numbers, and five published models are five rows of a
table whose parameters a cell counts.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from annotated_moe.attention import (
    BLOCKWISE_ABOVE,
    KVCache,
    attend,
    attend_blockwise,
    write_cache,
)
from annotated_moe.llama import (
    ATTENTION,
    HUB_ATTENTION,
    HUB_DEFAULTS,
    HUB_ENDS,
    HUB_FIELDS,
    HUB_MLP,
    HUB_NORMS,
    read_hub,
    write_hub,
)
from annotated_moe.moe import Route
from annotated_moe.rms_norm import RMSNorm


# %% book/chapters/16_mixtral.md, cell 4
def route_renormalised(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits, and a softmax over these alone.

    Float32 inside; a token's gates sum to 1. ValueError unless there
    are `top_k` experts. Source: Mixtral; Qwen3 (`norm_topk_prob`).
    """
    if not 1 <= top_k <= w.shape[-1]:
        raise ValueError(f"top_k={top_k} of {w.shape[-1]} experts")
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.softmax(best)
    return Route(probs, gates, experts, logits)


# %% book/chapters/16_mixtral.md, cell 7
Sees = Callable[[Array, Array], Bool[Array, "B T S"]]


# %% book/chapters/16_mixtral.md, cell 8
def within_window(
    window: int, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where position `k` is one of the last `window` up to `q`.

    Positions after `q` pass too: that they are hidden is the caller's.
    """
    return k > q - window


# %% book/chapters/16_mixtral.md, cell 30
def ring_positions(
    end: Int32[Array, " B"], slots: int
) -> Int32[Array, "B S"]:
    """Which position each slot of a ring holds once `end` were written.

    The last `slots` of them; negative where nothing was written yet.
    """
    last = end[:, None] - 1                                 # [B, 1]
    return last - (last - jnp.arange(slots)) % slots


# %% book/chapters/16_mixtral.md, cell 33
PAST = 2**30                                    # position of padding


# %% book/chapters/16_mixtral.md, cell 34
def ends(
    length: Int32[Array, " B"], positions: Int32[Array, "B T"]
) -> Int32[Array, " B"]:
    """How many tokens each row has with those at `positions`.

    `length` is how many it had; what stands at `PAST` is not counted.
    """
    after = jnp.where(positions < PAST, positions + 1, 0)
    return jnp.maximum(length, after.max(axis=1))


# %% book/chapters/16_mixtral.md, cell 35
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
    at = jnp.where(lasts & (positions < PAST), positions % slots, slots)
    return write_cache(stack, layer, x, at)


# %% book/chapters/16_mixtral.md, cell 38
def near_keys(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
) -> tuple[Any, Any, Any, KVCache]:
    """Keys, values and positions to look at, and the longer cache.

    For T = 1 the ring, S slots, written first; else the ring as it was
    and the new tokens, S + T. `length` is left to the caller.
    """
    end = ends(cache.length, positions)
    near_k = write_ring(cache.near_k, layer, k, positions, end)
    near_v = write_ring(cache.near_v, layer, v, positions, end)
    slots, old = near_k.shape[2], cache
    cache = replace(cache, near_k=near_k, near_v=near_v)
    if k.shape[1] == 1:
        at = ring_positions(end, slots)
        return near_k[layer], near_v[layer], at, cache
    keys, values = (
        jnp.concatenate([ring[layer], new.astype(ring.dtype)], axis=1)
        for ring, new in ((old.near_k, k), (old.near_v, v))
    )
    at = jnp.concatenate([ring_positions(old.length, slots), positions],
                         axis=1)
    return keys, values, at, cache


# %% book/chapters/16_mixtral.md, cell 39
def attend_near(
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    multiplier: float,
    softcap: float | None,
    sees: Sees,
) -> tuple[Float[Array, "B T Q H"], KVCache | None]:
    """Attention to what `sees` allows, over a ring if there is one."""
    at = positions                                          # [B, S]
    if cache is not None:
        k, v, at, cache = near_keys(k, v, positions, cache, layer)

    def seen(slots):
        key = at.at[:, slots].get(mode="fill", fill_value=PAST)
        query, key = positions[..., None], key[:, None]
        return (key >= 0) & (key <= query) & sees(query, key)

    job, rest = (q, k, v), (multiplier, softcap)
    if q.shape[1] > 1 and k.shape[1] > BLOCKWISE_ABOVE:
        y = attend_blockwise(*job, positions, *rest, sees=seen)
    else:
        y = attend(*job, seen(jnp.arange(k.shape[1])), *rest)
    return y, cache


# %% book/chapters/16_mixtral.md, cell 59
def norm_heads(
    whole: bool,
    eps: float,
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Any:
    """Queries and keys through a norm of their own, before RoPE.

    One gain a feature of a head, `scale` [H], the same for all heads
    (Qwen3), or with `whole` the norm of the whole projection, [Q*H] and
    [K*H] (OLMoE). Values pass as they are. Inside a Haiku transform.
    """
    def normed(x, name):
        wide = x.reshape(*x.shape[:2], -1) if whole else x
        return RMSNorm(eps, name)(wide).reshape(x.shape)

    return normed(q, "query_norm"), normed(k, "key_norm"), v


# %% book/chapters/16_mixtral.md, cell 60
def clip_heads(clip: float, *heads: Float[Array, "B T _ H"]) -> Any:
    """Queries, keys and values cut to -clip .. clip. Source: OLMoE."""
    return [jnp.clip(x, -clip, clip) for x in heads]


# %% book/chapters/16_mixtral.md, cell 67
KIN: dict[str, Any] = {
    "post_norm": False, "activation": "silu", "tied": False,
    "embedding_multiplier": 1.0, "output_multiplier": 1.0,
    "attn_softcap": None, "head_size": 128,
    "attn_multiplier": 128**-0.5,
}


# %% book/chapters/16_mixtral.md, cell 68
MIXTRAL: dict[str, Any] = KIN | {
    "vocab_size": 32000, "kv_heads": 8, "num_experts": 8, "top_k": 2,
    "router": "top_k_softmax", "rope_base": 1e6, "eos_id": 2,
}


# %% book/chapters/16_mixtral.md, cell 69
QWEN: dict[str, Any] = KIN | {
    "vocab_size": 151936, "context": 40960, "kv_heads": 4,
    "num_experts": 128, "top_k": 8, "router": "top_k_softmax",
    "rope_base": 1e6, "norm_eps": 1e-6, "qk_norm": "head",
    "pad_id": 151643, "eos_id": (151645, 151643),
}


# %% book/chapters/16_mixtral.md, cell 70
OLMOE: dict[str, Any] = KIN | {
    "vocab_size": 50304, "context": 4096, "kv_heads": 16,
    "num_experts": 64, "top_k": 8, "qk_norm": "whole",
    "pad_id": 1, "eos_id": 50279,
}


# %% book/chapters/16_mixtral.md, cell 71
PRESETS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": MIXTRAL | {
        "context": 32768, "num_layers": 32, "q_heads": 32,
        "d_model": 4096, "d_ff": 14336,
    },
    "mixtral-8x22b": MIXTRAL | {
        "context": 65536, "num_layers": 56, "q_heads": 48,
        "d_model": 6144, "d_ff": 16384,
    },
    "qwen3-30b-a3b": QWEN | {
        "num_layers": 48, "q_heads": 32, "d_model": 2048, "d_ff": 768,
    },
    "qwen3-235b-a22b": QWEN | {
        "num_layers": 94, "q_heads": 64, "d_model": 4096, "d_ff": 1536,
    },
    "olmoe-1b-7b": OLMOE | {
        "num_layers": 16, "q_heads": 16, "d_model": 2048, "d_ff": 1024,
    },
}


# %% book/chapters/16_mixtral.md, cell 79
WEIGHTS = HUB_ENDS + HUB_NORMS + HUB_ATTENTION + (
    ("block_sparse_moe.gate.weight", "decoder_layer/router/w",
     "transpose"),
    ("{expert}.w1.weight", "decoder_layer/moe/linear/w", "transpose"),
    ("{expert}.w3.weight", "decoder_layer/moe/linear_v/w", "transpose"),
    ("{expert}.w2.weight", "decoder_layer/moe/linear_1/w", "transpose"),
)
EXPERT = "block_sparse_moe.experts.{i}"


# %% book/chapters/16_mixtral.md, cell 80
QWEN_WEIGHTS = HUB_ENDS + HUB_NORMS + HUB_ATTENTION + HUB_MLP + (
    ("self_attn.q_norm.weight", f"{ATTENTION}/query_norm/scale",
     "as is"),
    ("self_attn.k_norm.weight", f"{ATTENTION}/key_norm/scale",
     "as is"),
    ("mlp.gate.weight", "decoder_layer/router/w", "transpose"),
    ("{expert}.gate_proj.weight", "decoder_layer/moe/linear/w",
     "transpose"),
    ("{expert}.up_proj.weight", "decoder_layer/moe/linear_v/w",
     "transpose"),
    ("{expert}.down_proj.weight", "decoder_layer/moe/linear_1/w",
     "transpose"),
)
QWEN_EXPERT = "mlp.experts.{i}"


# %% book/chapters/16_mixtral.md, cell 81
FIELDS = HUB_FIELDS | {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "sliding_window": "attn_window",
}
OLMOE_FIELDS = HUB_FIELDS | {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "clip_qkv": "qkv_clip",
}
QWEN_FIELDS = HUB_FIELDS | {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_ff",
    "intermediate_size": "dense_ff",
    "decoder_sparse_step": "moe_every",
    "mlp_only_layers": "dense_layers",
}
DEFAULTS: dict[str, Any] = HUB_DEFAULTS | {
    "sliding_window": None, "clip_qkv": None,
}
QWEN_DEFAULTS: dict[str, Any] = HUB_DEFAULTS | {
    "mlp_only_layers": [], "decoder_sparse_step": 1,
    "num_experts": None,
}


# %% book/chapters/16_mixtral.md, cell 82
def read_mixtral(raw: dict[str, Any]) -> dict[str, Any]:
    return read_hub(raw) | {"router": "top_k_softmax"}


def write_mixtral(values: dict[str, Any]) -> dict[str, Any]:
    return write_hub(values)


# %% book/chapters/16_mixtral.md, cell 83
def read_renormalise(raw: dict[str, Any]) -> dict[str, Any]:
    """`norm_topk_prob`: whether a token's gates sum to one."""
    norm = raw.get("norm_topk_prob", False)
    if type(norm) is not bool:
        raise ValueError(f"norm_topk_prob must be a bool: {norm!r}")
    return {"router": "top_k_softmax" if norm else "softmax_top_k"}


def write_renormalise(values: dict[str, Any]) -> dict[str, Any]:
    norm = values["router"] == "top_k_softmax"
    return write_hub(values) | {"norm_topk_prob": norm}


# %% book/chapters/16_mixtral.md, cell 84
def read_olmoe(raw: dict[str, Any]) -> dict[str, Any]:
    return read_hub(raw) | read_renormalise(raw) | {"qk_norm": "whole"}


def read_qwen(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported in Qwen3")
    count = raw.get("num_local_experts", raw.get("num_experts"))
    ours = {"qk_norm": "head", "num_experts": count}
    return read_hub(raw) | read_renormalise(raw) | ours
