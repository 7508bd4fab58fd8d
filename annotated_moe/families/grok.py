"""Grok-1, and smaller models of its architecture."""

from annotated_moe.attention import AttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.rope import Rope

# %% 08
def grok_config(
    vocab_size: int = 131072,
    context: int = 8192,
    d_model: int = 6144,
    d_ff: int = 32768,
    num_layers: int = 64,
    q_heads: int = 48,
    kv_heads: int = 8,
    head_size: int = 128,
    num_experts: int = 8,                   # 1: a dense network
    top_k: int = 2,
    embedding_multiplier: float = 78.38367176906169,  # sqrt(d_model)
    output_multiplier: float = 0.5773502691896257,    # 1 / sqrt(3)
    attn_multiplier: float = 0.08838834764831845,     # 1 / sqrt(128)
    attn_softcap: float | None = 30.0,
    rope_base: float = 10000.0,
    pad_id: int = 0,
    eos_ids: tuple[int, ...] = (2,),
    dtype: str = "bfloat16",
) -> ModelConfig:
    """A model of Grok-1's architecture; by default Grok-1.

    Source: the release, `run.py` and `model.py`.
    """
    attention = AttentionSpec(
        q_heads, kv_heads, head_size, attn_multiplier, attn_softcap,
        Rope(rope_base),
    )
    experts: FeedForwardSpec | MoESpec = FeedForwardSpec(d_ff)
    if num_experts != 1:
        experts = MoESpec(num_experts, top_k, d_ff)
    layer = LayerSpec(attention, experts, post_norm=True)
    return ModelConfig(
        vocab_size, context, d_model, (Segment((layer,), num_layers),),
        embedding_multiplier, output_multiplier, tied=True,
        pad_id=pad_id, eos_ids=eos_ids, dtype=dtype,
    )
