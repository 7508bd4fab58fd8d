# Generated from book/chapters/16_mixtral.md by `make sync`; edit the chapter.
"""OLMoE: a norm over whole projections, and clipped queries.
"""

from dataclasses import replace
from typing import Any

from annotated_moe.attention import NormedAttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.families.llama import (
    check_layer_types,
    write_attention,
)
from annotated_moe.families.mixtral import experts_of
from annotated_moe.families.qwen import (
    QwenFamily,
    read_router,
    write_router,
)
from annotated_moe.formats.hub import FAMILIES, Fields
from annotated_moe.moe import MoESpec
from annotated_moe.rope import Rope


# %% book/chapters/16_mixtral.md, cell 77
class OlmoeFamily(QwenFamily):
    """Experts in every layer."""

    model_type = "olmoe"
    defaults = {
        "max_position_embeddings": 4096, "eos_token_id": 50279,
        "pad_token_id": 1,
    }
    norm_eps = 1e-5
    whole_norm = True

    def read_attention(self, fields: Fields) -> NormedAttentionSpec:
        attention = super().read_attention(fields)
        if fields.get("clip_qkv") is None:
            return attention
        return replace(attention, clip=fields.number("clip_qkv"))

    def read_experts(self, fields: Fields) -> MoESpec:
        return MoESpec(
            fields.size("num_experts", 64),
            fields.size("num_experts_per_tok", 8),
            fields.size("intermediate_size", 2048), "silu",
            read_router(fields),
        )

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        check_layer_types(fields, "full_attention")
        layer = LayerSpec(
            self.read_attention(fields), self.read_experts(fields),
            self.read_eps(fields),
        )
        return [layer] * fields.size("num_hidden_layers")

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        layer = config.layer(0)
        attention, experts = layer.attention, experts_of(layer)
        if not isinstance(attention, NormedAttentionSpec):
            raise ValueError("an OLMoE norms its queries and keys")
        return {
            **write_attention(attention),
            "rms_norm_eps": layer.norm_eps,
            **write_router(experts),
            "intermediate_size": experts.width,
            "clip_qkv": attention.clip,
        }


FAMILIES["OlmoeForCausalLM"] = OlmoeFamily()


# %% book/chapters/16_mixtral.md, cell 85
def olmoe_config(
    layers: int = 16, heads: int = 16, d_model: int = 2048,
    d_ff: int = 1024, num_experts: int = 64, top_k: int = 8,
) -> ModelConfig:
    """OLMoE, by default 1B-7B. Source: its config.json."""
    attention = NormedAttentionSpec(
        heads, heads, 128, 128**-0.5, rope=Rope(10000.0),
        norm_eps=1e-5, whole_norm=True,
    )
    experts = MoESpec(num_experts, top_k, d_ff, "silu")
    layer = LayerSpec(attention, experts, 1e-5)
    return ModelConfig(
        50304, 4096, d_model, (Segment((layer,), layers),),
        pad_id=1, eos_ids=(50279,),
    )


OLMOES = {"olmoe-1b-7b": olmoe_config()}
