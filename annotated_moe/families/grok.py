# Generated from book/chapters/07b_layer.md, book/chapters/10_convert.md, book/chapters/14_hub.md by `make sync`; edit the chapters.
"""Grok-1, and smaller models of its architecture.
"""

from typing import Any

from annotated_moe.attention import AttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.formats.hub import (
    FAMILIES,
    Family,
    Fields,
    WeightName,
    one_or_many,
    read_dtype,
    read_rope,
    stop_ids,
)
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.rope import Rope


# %% book/chapters/07b_layer.md, cell 7
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


# %% book/chapters/10_convert.md, cell 28
def grok_sizes(config: ModelConfig) -> dict[str, Any]:
    """What `grok_config` would have to be given for such a model."""
    layer = config.layer(0)
    attention, experts = layer.attention, layer.feed_forward
    count, chosen = 1, 1
    if isinstance(experts, MoESpec):
        count, chosen = experts.num_experts, experts.top_k
    return {
        "vocab_size": config.vocab_size,
        "context": config.context,
        "d_model": config.d_model,
        "d_ff": experts.width,
        "num_layers": config.num_layers,
        "q_heads": attention.q_heads,
        "kv_heads": attention.kv_heads,
        "head_size": attention.head_size,
        "num_experts": count,
        "top_k": chosen,
        "embedding_multiplier": config.embedding_multiplier,
        "output_multiplier": config.output_multiplier,
        "attn_multiplier": attention.multiplier,
        "attn_softcap": attention.softcap,
        "rope_base": attention.rope.base if attention.rope else 1.0,
        "pad_id": config.pad_id,
        "eos_ids": config.eos_ids,
        "dtype": config.dtype,
    }


def like_grok(config: ModelConfig) -> ModelConfig:
    """The model of Grok-1's architecture with a model's sizes."""
    return grok_config(**grok_sizes(config))


# %% book/chapters/14_hub.md, cell 18
GROK_LAYER = (
    WeightName("pre_attn_norm.scale", "rms_norm/scale"),
    WeightName("post_attn_norm.scale", "rms_norm_1/scale"),
    WeightName("pre_moe_norm.scale", "rms_norm_2/scale"),
    WeightName("post_moe_norm.scale", "rms_norm_3/scale"),
    *(
        WeightName(f"attn.{theirs}_proj.weight",
                   f"multi_head_attention/{ours}/w", "transpose")
        for theirs, ours in (("q", "query"), ("k", "key"),
                             ("v", "value"), ("o", "linear"))
    ),
    WeightName("moe_block.gate.weight", "router/w", "transpose"),
    *(
        WeightName(f"moe_block.experts.{{expert}}.{name}.weight",
                   f"moe/{name}/w", "transpose")
        for name in ("linear", "linear_v", "linear_1")
    ),
)


# %% book/chapters/14_hub.md, cell 19
class GrokFamily(Family):
    """The community's conversion of Grok-1.

    Source: `hpcai-tech/grok-1` on the hub, whose file names and fields
    these are.
    """

    model_type = "grok-1"
    ends = (
        WeightName("model.embed_tokens.weight",
                   "in_out_embed/embeddings"),
        WeightName("model.norm.scale", "rms_norm/scale"),
        WeightName("lm_head.weight", "lm_head/embeddings"),
    )

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        return GROK_LAYER

    def read(self, fields: Fields) -> ModelConfig:
        fields.only("rms_norm_eps", 1e-5)
        fields.only("tie_word_embeddings", True)
        fields.only("hidden_act", "gelu")
        heads = fields.size("num_attention_heads")
        width = fields.size("hidden_size")
        rope = read_rope(fields)
        return grok_config(
            vocab_size=fields.size("vocab_size"),
            context=fields.size("max_position_embeddings"),
            d_model=width,
            d_ff=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            q_heads=heads,
            kv_heads=fields.size("num_key_value_heads", heads),
            head_size=fields.size("head_dim", max(1, width // heads)),
            num_experts=fields.size("num_experts"),
            top_k=fields.size("num_experts_per_tok"),
            embedding_multiplier=fields.number(
                "embedding_multiplier_scale"),
            output_multiplier=fields.number("output_multiplier_scale"),
            attn_multiplier=fields.number("attn_output_multiplier"),
            attn_softcap=fields.number("max_attn_value"),
            rope_base=rope.base,
            pad_id=(*fields.ids("pad_token_id"), 0)[0],
            eos_ids=stop_ids(fields),
            dtype=read_dtype(fields),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        layer = config.layer(0)
        attention, experts = layer.attention, layer.feed_forward
        if not isinstance(experts, MoESpec):
            raise ValueError("this layout has no model without experts")
        if like_grok(config) != config:
            raise ValueError(
                "this model is none of Grok-1's architecture, which is "
                "all that this layout can say"
            )
        assert attention.rope is not None
        return {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context,
            "hidden_size": config.d_model,
            "intermediate_size": experts.width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": attention.q_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_size,
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "embedding_multiplier_scale": config.embedding_multiplier,
            "output_multiplier_scale": config.output_multiplier,
            "attn_output_multiplier": attention.multiplier,
            "max_attn_value": attention.softcap,
            "rope_theta": attention.rope.base,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "pad_token_id": config.pad_id,
            "eos_token_id": one_or_many(config.eos_ids),
            "torch_dtype": config.dtype,
            "quantization_config": {
                "quant_method": "int8-weight-scale", "bits": 8},
        }


FAMILIES["Grok1ModelForCausalLM"] = GrokFamily()
