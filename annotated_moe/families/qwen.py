# Generated from book/chapters/16_mixtral.md by `make sync`; edit the chapter.
"""Qwen3 with experts: a norm a head, and layers without experts.
"""

from typing import Any

from annotated_moe.attention import NormedAttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.families.llama import (
    ATTENTION,
    MLP,
    NORMS,
    LlamaFamily,
    check_layer_types,
    write_attention,
)
from annotated_moe.families.mixtral import expert_names
from annotated_moe.formats.hub import FAMILIES, Fields, WeightName
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.rope import Rope


# %% book/chapters/16_mixtral.md, cell 10
def qwen_config(
    layers: int, q_heads: int, kv_heads: int, d_model: int, d_ff: int,
    *,
    num_experts: int = 128,
    context: int = 40960,
    rope_base: float = 1e6,
) -> ModelConfig:
    """Qwen3 with experts. Source: its config.json."""
    attention = NormedAttentionSpec(
        q_heads, kv_heads, 128, 128**-0.5, rope=Rope(rope_base)
    )
    experts = MoESpec(num_experts, 8, d_ff, "silu", "top_k_softmax")
    layer = LayerSpec(attention, experts, 1e-6)
    return ModelConfig(
        151936, context, d_model, (Segment((layer,), layers),),
        norm_eps=1e-6, pad_id=151643, eos_ids=(151645, 151643),
    )


# %% book/chapters/16_mixtral.md, cell 11
LONG = 262144                               # tokens of the later ones
QWENS = {
    "qwen3-30b-a3b": qwen_config(48, 32, 4, 2048, 768),
    "qwen3-235b-a22b": qwen_config(94, 64, 4, 4096, 1536),
    "qwen3-30b-a3b-2507": qwen_config(
        48, 32, 4, 2048, 768, context=LONG, rope_base=1e7),
    "qwen3-235b-a22b-2507": qwen_config(
        94, 64, 4, 4096, 1536, context=LONG, rope_base=5e6),
    "qwen3-coder-30b-a3b": qwen_config(
        48, 32, 4, 2048, 768, context=LONG, rope_base=1e7),
    "qwen3-coder-480b-a35b": qwen_config(
        62, 96, 8, 6144, 2560, num_experts=160, context=LONG,
        rope_base=1e7),
}


# %% book/chapters/16_mixtral.md, cell 12
QK_NORMS = tuple(
    WeightName(f"self_attn.{a}_norm.weight",
               f"multi_head_attention/{b}_norm/scale")
    for a, b in (("q", "query"), ("k", "key"))
)
QWEN_EXPERTS = expert_names(
    "mlp.gate", "mlp.experts.{expert}",
    ("gate_proj", "up_proj", "down_proj"),
)


def router_for(fields: Fields) -> str:
    """`norm_topk_prob`: whether a token's gates sum to one."""
    renormalised = fields.flag("norm_topk_prob")
    return "top_k_softmax" if renormalised else "softmax_top_k"


# %% book/chapters/16_mixtral.md, cell 14
class QwenFamily(LlamaFamily):
    """Qwen3-MoE: dense layers may stand among sparse ones."""

    model_type = "qwen3_moe"
    defaults = {
        "num_key_value_heads": 4, "max_position_embeddings": 32768,
    }
    whole_norm = False

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        sparse = isinstance(spec.feed_forward, MoESpec)
        last = QWEN_EXPERTS if sparse else MLP
        return NORMS + ATTENTION + QK_NORMS + last

    def read_attention(self, fields: Fields) -> NormedAttentionSpec:
        plain = super().read_attention(fields)
        fields.only("qkv_bias", False)
        fields.only("use_qk_norm", True)
        return NormedAttentionSpec(
            plain.q_heads, plain.kv_heads, plain.head_size,
            plain.multiplier, rope=plain.rope, bias=plain.bias,
            norm_eps=self.read_eps(fields), whole_norm=self.whole_norm,
        )

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        fields.only("use_sliding_window", False)
        fields.get("sliding_window")
        fields.get("max_window_layers")
        fields.only("shared_expert_intermediate_size", 0)
        check_layer_types(fields, "full_attention")
        count = fields.get("num_experts", 128)
        if fields.get("num_local_experts") is not None:
            count = fields.size("num_local_experts")
        width = fields.size("moe_intermediate_size", 768)
        experts: FeedForwardSpec | MoESpec = MoESpec(
            count, fields.size("num_experts_per_tok", 8), width,
            "silu", router_for(fields),
        )
        dense = FeedForwardSpec(
            fields.size("intermediate_size", 6144), "silu"
        )
        step = fields.size("decoder_sparse_step", 1)
        bare = fields.get("mlp_only_layers", [])
        n = fields.size("num_hidden_layers")
        if not isinstance(bare, list) or any(
            type(i) is not int or not 0 <= i < n for i in bare
        ):
            raise fields.error(
                f"mlp_only_layers must list layers below {n}: {bare!r:.80}"
            )
        attention = self.read_attention(fields)
        eps = self.read_eps(fields)
        return [
            LayerSpec(attention, dense, eps)
            if i in bare or (i + 1) % step else
            LayerSpec(attention, experts, eps)
            for i in range(n)
        ]

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        layers = [config.layer(i) for i in range(config.num_layers)]
        parts = [layer.feed_forward for layer in layers]
        sparse = [p for p in parts if isinstance(p, MoESpec)]
        dense = [p for p in parts if not isinstance(p, MoESpec)]
        if not sparse:
            raise ValueError("a Qwen3-MoE has experts in some layer")
        experts = sparse[0]
        return {
            **write_attention(layers[0].attention),
            "rms_norm_eps": layers[0].norm_eps,
            "num_experts": experts.num_experts,
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.width,
            "intermediate_size": (dense or sparse)[0].width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [
                i for i, p in enumerate(parts)
                if not isinstance(p, MoESpec)
            ],
            "norm_topk_prob": experts.router == "top_k_softmax",
            "use_sliding_window": False,
        }


FAMILIES["Qwen3MoeForCausalLM"] = QwenFamily()
