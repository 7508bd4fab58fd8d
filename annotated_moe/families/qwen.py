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
from annotated_moe.families.mixtral import expert_names, experts_of
from annotated_moe.formats.hub import FAMILIES, Fields, WeightName
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.rope import Rope

# %% book/chapters/16_mixtral.md, cell 74
QK_NORMS = tuple(
    WeightName(f"self_attn.{a}_norm.weight",
               f"multi_head_attention/{b}_norm/scale")
    for a, b in (("q", "query"), ("k", "key"))
)
QWEN_EXPERTS = expert_names(
    "mlp.gate", "mlp.experts.{expert}",
    ("gate_proj", "up_proj", "down_proj"),
)


def read_router(fields: Fields) -> str:
    """`norm_topk_prob`: whether a token's gates sum to one."""
    renormalised = fields.flag("norm_topk_prob")
    return "top_k_softmax" if renormalised else "softmax_top_k"


def write_router(experts: MoESpec) -> dict[str, Any]:
    """How many experts, and how they are chosen."""
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.router == "top_k_softmax",
    }


# %% book/chapters/16_mixtral.md, cell 75
def read_sparse(fields: Fields) -> list[bool]:
    """For each layer, whether it has experts."""
    n = fields.size("num_hidden_layers")
    step = fields.size("decoder_sparse_step", 1)
    bare = fields.get("mlp_only_layers", [])
    if not isinstance(bare, list) or any(
        type(i) is not int or not 0 <= i < n for i in bare
    ):
        raise fields.error(
            f"mlp_only_layers must list layers below {n}: {bare!r:.80}"
        )
    return [i not in bare and (i + 1) % step == 0 for i in range(n)]


# %% book/chapters/16_mixtral.md, cell 76
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

    def read_experts(self, fields: Fields) -> MoESpec:
        count = fields.size("num_experts", 128)
        return MoESpec(
            fields.size("num_local_experts", count),
            fields.size("num_experts_per_tok", 8),
            fields.size("moe_intermediate_size", 768), "silu",
            read_router(fields),
        )

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        fields.only("use_sliding_window", False)
        fields.get("sliding_window")        # without meaning then
        fields.get("max_window_layers")
        fields.only("shared_expert_intermediate_size", 0)
        check_layer_types(fields, "full_attention")
        width = fields.size("intermediate_size", 6144)
        dense = FeedForwardSpec(width, "silu")
        experts = self.read_experts(fields)
        attention = self.read_attention(fields)
        eps = self.read_eps(fields)
        return [
            LayerSpec(attention, experts if sparse else dense, eps)
            for sparse in read_sparse(fields)
        ]

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        layers = [config.layer(i) for i in range(config.num_layers)]
        dense = [i for i, layer in enumerate(layers)
                 if not isinstance(layer.feed_forward, MoESpec)]
        sparse = [i for i in range(len(layers)) if i not in dense]
        experts = experts_of(layers[(sparse + dense)[0]])
        plain = layers[(dense + sparse)[0]].feed_forward
        return {
            **write_attention(layers[0].attention),
            "rms_norm_eps": layers[0].norm_eps,
            **write_router(experts),
            "num_local_experts": experts.num_experts,
            "moe_intermediate_size": experts.width,
            "intermediate_size": plain.width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "use_sliding_window": False,
        }


FAMILIES["Qwen3MoeForCausalLM"] = QwenFamily()


# %% book/chapters/16_mixtral.md, cell 84
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
