# Generated from book/chapters/16_mixtral.md by `make sync`; edit the chapter.
"""A layer that looks back 4,096 tokens has no use for the 4,097th. Kept
the plain way, Mistral 7B's keys and values for 32,768 tokens still fill
4 GiB, of which a decode step reads one eighth. Mixtral and its kin
differ from Grok-1 in four such things: how a router weighs its choice,
how far a layer looks, what its cache keeps, and how large a query may
grow. By this chapter's end each of the four is a few lines of code, the
cache is an eighth and gives the same numbers, the files of Mistral,
Mixtral, Qwen3 and OLMoE load, and twelve published models are a line
each, whose parameters a cell counts.
"""

from dataclasses import replace
from typing import Any

from annotated_moe.attention import AttentionSpec, Causal, Window
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.families.llama import (
    ATTENTION,
    NORMS,
    LlamaFamily,
    check_layer_types,
    write_attention,
)
from annotated_moe.formats.hub import FAMILIES, Fields, WeightName
from annotated_moe.moe import FeedForwardSpec, MoESpec
from annotated_moe.rope import Rope


# %% book/chapters/16_mixtral.md, cell 69
def window_of(spec: AttentionSpec) -> int | None:
    """The size of a window, or None."""
    return spec.mask.size if isinstance(spec.mask, Window) else None


# %% book/chapters/16_mixtral.md, cell 70
class MistralFamily(LlamaFamily):
    """Llama with a window, the same in all layers."""

    model_type = "mistral"
    defaults = {
        "num_key_value_heads": 8, "sliding_window": 4096,
        "max_position_embeddings": 131072, "eos_token_id": 2,
    }
    window: int | None = 4096               # where a file has no field

    def read_window(self, fields: Fields) -> int | None:
        name = "sliding_window"
        if name not in fields.raw:
            return self.window
        return None if fields.get(name) is None else fields.size(name)

    def read_attention(self, fields: Fields) -> AttentionSpec:
        spec = super().read_attention(fields)
        size = self.read_window(fields)
        if size is None:
            return spec
        return replace(spec, mask=Window(size))

    def read_network(self, fields: Fields) -> FeedForwardSpec | MoESpec:
        return FeedForwardSpec(fields.size("intermediate_size"), "silu")

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        attention = self.read_attention(fields)
        kind = "sliding" if window_of(attention) else "full"
        check_layer_types(fields, f"{kind}_attention")
        layer = LayerSpec(
            attention, self.read_network(fields), self.read_eps(fields)
        )
        return [layer] * fields.size("num_hidden_layers")

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        layer = config.layer(0)
        return {
            **write_attention(layer.attention),
            "sliding_window": window_of(layer.attention),
            "rms_norm_eps": layer.norm_eps,
            "intermediate_size": layer.feed_forward.width,
        }


FAMILIES["MistralForCausalLM"] = MistralFamily()


# %% book/chapters/16_mixtral.md, cell 72
def expert_names(
    router: str, expert: str, theirs: tuple[str, str, str]
) -> tuple[WeightName, ...]:
    """A router's name, and those of gate, up and down matrices."""
    names = {f"{router}.weight": "router/w"}
    for a, b in zip(theirs, ("linear", "linear_v", "linear_1")):
        names[f"{expert}.{a}.weight"] = f"moe/{b}/w"
    return tuple(WeightName(*n, "transpose") for n in names.items())


MIXTRAL_EXPERTS = expert_names(
    "block_sparse_moe.gate", "block_sparse_moe.experts.{expert}",
    ("w1", "w3", "w2"),
)


# %% book/chapters/16_mixtral.md, cell 73
def experts_of(layer: LayerSpec) -> MoESpec:
    """A layer's experts; ValueError where it has none."""
    if not isinstance(layer.feed_forward, MoESpec):
        raise ValueError("this architecture needs experts in layers")
    return layer.feed_forward


class MixtralFamily(MistralFamily):
    """Experts in each layer, and maybe a window."""

    model_type = "mixtral"
    defaults = {
        "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "eos_token_id": 2,
    }
    rope_base = 1e6
    norm_eps = 1e-5
    window = None

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        return NORMS + ATTENTION + MIXTRAL_EXPERTS

    def read_network(self, fields: Fields) -> MoESpec:
        return MoESpec(
            fields.size("num_local_experts", 8),
            fields.size("num_experts_per_tok", 2),
            fields.size("intermediate_size"), "silu", "top_k_softmax",
        )

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        experts = experts_of(config.layer(0))
        return {
            **super().write_layers(config),
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
        }


FAMILIES["MixtralForCausalLM"] = MixtralFamily()


# %% book/chapters/16_mixtral.md, cell 82
def mixtral_config(
    layers: int, q_heads: int, kv_heads: int, d_ff: int,
    head_size: int = 128,
    *,
    d_model: int | None = None,
    vocab_size: int = 32000,
    context: int = 32768,
    num_experts: int = 8,                   # 1: Mistral, a dense model
    top_k: int = 2,
    rope_base: float = 1e6,
    window: int | None = None,
) -> ModelConfig:
    """A model as Mistral makes them. Source: Mistral's releases."""
    attention = AttentionSpec(
        q_heads, kv_heads, head_size, head_size**-0.5,
        rope=Rope(rope_base),
        mask=Causal() if window is None else Window(window),
    )
    part: FeedForwardSpec | MoESpec = FeedForwardSpec(d_ff, "silu")
    if num_experts > 1:
        rule = "top_k_softmax"
        part = MoESpec(num_experts, top_k, d_ff, "silu", rule)
    layer = LayerSpec(attention, part)
    return ModelConfig(
        vocab_size, context, d_model or q_heads * head_size,
        (Segment((layer,), layers),), eos_ids=(2,),
    )


MIXTRALS = {
    "mistral-7b": mixtral_config(
        32, 32, 8, 14336, num_experts=1, rope_base=1e4, window=4096),
    "mistral-7b-v0.3": mixtral_config(
        32, 32, 8, 14336, num_experts=1, vocab_size=32768),
    "mixtral-8x7b": mixtral_config(32, 32, 8, 14336),
    "mixtral-8x22b": mixtral_config(56, 48, 8, 16384, context=65536),
    "mixtral-8x22b-instruct": mixtral_config(
        56, 48, 8, 16384, context=65536, vocab_size=32768),
}
