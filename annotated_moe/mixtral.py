# Generated from book/chapters/16_mixtral.md by `make sync`; edit the chapter.
"""The chapter on Mixtral.
"""

# %% book/chapters/16_mixtral.md, cell 1
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


# %% book/chapters/16_mixtral.md, cell 2
def route_renormalised(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """The `top_k` largest logits, and a softmax over these alone.

    Float32 inside. Source: Mixtral; Qwen3 with `norm_topk_prob`.
    """
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    best, experts = jax.lax.top_k(logits, top_k)            # [N, A]
    probs, gates = jax.nn.softmax(logits), jax.nn.softmax(best)
    return Route(probs, gates, experts, logits)


# %% book/chapters/16_mixtral.md, cell 3
Sees = Callable[[Array, Array], Bool[Array, "B T S"]]


# %% book/chapters/16_mixtral.md, cell 4
def within_window(
    window: int, q: Int32[Array, "B T 1"], k: Int32[Array, "B 1 S"]
) -> Bool[Array, "B T S"]:
    """True where position `k` is one of the last `window` up to `q`."""
    return k > q - window


# %% book/chapters/16_mixtral.md, cell 5
def ring_positions(
    end: Int32[Array, " B"], slots: int
) -> Int32[Array, "B S"]:
    """Which position each slot of a ring holds once `end` were written.

    Negative where nothing was written yet.
    """
    last = end[:, None] - 1                                 # [B, 1]
    return last - (last - jnp.arange(slots)) % slots


# %% book/chapters/16_mixtral.md, cell 6
PAST = 2**30                                    # position of padding


# %% book/chapters/16_mixtral.md, cell 7
def ends(
    length: Int32[Array, " B"], positions: Int32[Array, "B T"]
) -> Int32[Array, " B"]:
    """How many tokens each row has with those at `positions`."""
    after = jnp.where(positions < PAST, positions + 1, 0)
    return jnp.maximum(length, after.max(axis=1))


# %% book/chapters/16_mixtral.md, cell 8
def write_ring(
    stack: Float[Array, "L B S K H"],
    layer: int | Int32[Array, ""],
    x: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    end: Int32[Array, " B"],
) -> Float[Array, "L B S K H"]:
    """Put `x` into the ring: position p into slot p % S, if it lasts.

    What later positions of the same call would overwrite is dropped.
    """
    slots = stack.shape[2]
    lasts = positions >= end[:, None] - slots
    at = jnp.where(lasts & (positions < PAST), positions % slots, slots)
    return write_cache(stack, layer, x, at)


# %% book/chapters/16_mixtral.md, cell 9
def near_keys(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int32[Array, "B T"],
    cache: KVCache,
    layer: int | Int32[Array, ""],
) -> tuple[Any, Any, Any, KVCache]:
    """Keys, values and positions to look at, and the longer cache."""
    end = ends(cache.length, positions)
    near_k = write_ring(cache.near_k, layer, k, positions, end)
    near_v = write_ring(cache.near_v, layer, v, positions, end)
    slots, old = near_k.shape[2], cache
    cache = replace(cache, near_k=near_k, near_v=near_v)
    if k.shape[1] == 1:
        at = ring_positions(end, slots)
        return near_k[layer], near_v[layer], at, cache
    at = ring_positions(old.length, slots)
    keys, values = (
        jnp.concatenate([ring[layer], new.astype(ring.dtype)], axis=1)
        for ring, new in ((old.near_k, k), (old.near_v, v))
    )
    at = jnp.concatenate([at, positions], axis=1)
    return keys, values, at, cache


# %% book/chapters/16_mixtral.md, cell 10
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

    job = q, k, v
    if q.shape[1] > 1 and k.shape[1] > BLOCKWISE_ABOVE:
        y = attend_blockwise(*job, positions, multiplier, softcap,
                             sees=seen)
    else:
        mask = seen(jnp.arange(k.shape[1]))
        y = attend(*job, mask, multiplier, softcap)
    return y, cache


# %% book/chapters/16_mixtral.md, cell 11
def norm_heads(
    whole: bool,
    eps: float,
    q: Float[Array, "B T Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Any:
    """Queries and keys through a norm of their own, before RoPE.

    One gain a feature of a head, the same for all heads (Qwen3), or
    with `whole` the norm of the whole projection (OLMoE).
    """
    def normed(x, name):
        wide = x.reshape(*x.shape[:2], -1) if whole else x
        return RMSNorm(eps, name)(wide).reshape(x.shape)

    return normed(q, "query_norm"), normed(k, "key_norm"), v


# %% book/chapters/16_mixtral.md, cell 12
def clip_heads(clip: float, *heads: Float[Array, "B T _ H"]) -> Any:
    """Queries, keys and values between -clip and clip. Source: OLMoE."""
    return [jnp.clip(x, -clip, clip) for x in heads]


# %% book/chapters/16_mixtral.md, cell 13
WEIGHTS = HUB_ENDS + HUB_NORMS + HUB_ATTENTION + (
    ("block_sparse_moe.gate.weight", "decoder_layer/router/w",
     "transpose"),
    ("{expert}.w1.weight", "decoder_layer/moe/linear/w", "transpose"),
    ("{expert}.w3.weight", "decoder_layer/moe/linear_v/w", "transpose"),
    ("{expert}.w2.weight", "decoder_layer/moe/linear_1/w", "transpose"),
)
EXPERT = "block_sparse_moe.experts.{i}"


# %% book/chapters/16_mixtral.md, cell 14
QWEN_WEIGHTS = HUB_ENDS + HUB_NORMS + HUB_ATTENTION + HUB_MLP + (
    ("self_attn.q_norm.weight", f"{ATTENTION}/query_norm/scale", "as is"),
    ("self_attn.k_norm.weight", f"{ATTENTION}/key_norm/scale", "as is"),
    ("mlp.gate.weight", "decoder_layer/router/w", "transpose"),
    ("{expert}.gate_proj.weight", "decoder_layer/moe/linear/w",
     "transpose"),
    ("{expert}.up_proj.weight", "decoder_layer/moe/linear_v/w",
     "transpose"),
    ("{expert}.down_proj.weight", "decoder_layer/moe/linear_1/w",
     "transpose"),
)
QWEN_EXPERT = "mlp.experts.{i}"


# %% book/chapters/16_mixtral.md, cell 15
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
    "mlp_only_layers": [], "decoder_sparse_step": 1, "num_experts": None,
}


# %% book/chapters/16_mixtral.md, cell 16
def read_mixtral(raw: dict[str, Any]) -> dict[str, Any]:
    return read_hub(raw) | {"router": "top_k_softmax"}


def write_mixtral(values: dict[str, Any]) -> dict[str, Any]:
    return write_hub(values)


# %% book/chapters/16_mixtral.md, cell 17
def read_renormalise(raw: dict[str, Any]) -> dict[str, Any]:
    """`norm_topk_prob`: whether a token's gates sum to one."""
    norm = raw.get("norm_topk_prob", False)
    if type(norm) is not bool:
        raise ValueError(f"norm_topk_prob must be a bool: {norm!r}")
    return {"router": "top_k_softmax" if norm else "softmax_top_k"}


def write_renormalise(values: dict[str, Any]) -> dict[str, Any]:
    norm = values["router"] == "top_k_softmax"
    return write_hub(values) | {"norm_topk_prob": norm}


# %% book/chapters/16_mixtral.md, cell 18
def read_olmoe(raw: dict[str, Any]) -> dict[str, Any]:
    return read_hub(raw) | read_renormalise(raw) | {"qk_norm": "whole"}


def read_qwen(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported in Qwen3")
    count = raw.get("num_local_experts", raw.get("num_experts"))
    ours = {"qk_norm": "head", "num_experts": count}
    return read_hub(raw) | read_renormalise(raw) | ours
