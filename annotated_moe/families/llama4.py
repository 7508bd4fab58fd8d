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

from dataclasses import replace
from typing import Any

from annotated_moe.attention import Chunk, UnitAttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, as_segments
from annotated_moe.families.llama import (
    GLU,
    NORMS,
    QKVO,
    LlamaFamily,
    projections,
    write_attention,
)
from annotated_moe.families.vision import SeeingFamily
from annotated_moe.formats.hub import FAMILIES, Fields, WeightName
from annotated_moe.moe import FeedForwardSpec, MoESpec, SharedMoESpec
from annotated_moe.rope import Llama3Rope, Rope


# %% book/chapters/18_llama4.md, cell 51
def llama4_layers(
    num_layers: int,
    attention: UnitAttentionSpec,
    chunk: int | None,
    dense: FeedForwardSpec,
    experts: SharedMoESpec,
    bare: set[int],
    sparse: set[int],
    norm_eps: float = 1e-5,
) -> list[LayerSpec]:
    """Layers in `bare` have no RoPE and see all, the others a chunk;
    those in `sparse` have experts.
    """
    near = replace(attention, floor=None)
    if chunk is not None:
        near = replace(near, mask=Chunk(chunk))
    far = replace(attention, rope=None)
    return [
        LayerSpec(
            far if i in bare else near,
            experts if i in sparse else dense, norm_eps,
        )
        for i in range(num_layers)
    ]


# %% book/chapters/18_llama4.md, cell 52
def llama4_config(
    context: int, num_experts: int, moe_every: int, rope: Rope,
    qk_norm_eps: float | None,
) -> ModelConfig:
    """The Llama 4 models of 48 layers. Source: their config.json."""
    attention = UnitAttentionSpec(
        40, 8, 128, 128**-0.5, rope=rope, qk_norm_eps=qk_norm_eps,
        floor=8192, scale=0.1,
    )
    experts = SharedMoESpec(
        num_experts, 1, 8192, "silu", "sigmoid",
        shared=FeedForwardSpec(8192, "silu"), gate_input=True,
    )
    layers = llama4_layers(
        48, attention, 8192, FeedForwardSpec(16384, "silu"), experts,
        set(range(3, 48, 4)), set(range(moe_every - 1, 48, moe_every)),
    )
    return ModelConfig(
        202048, context, 5120, as_segments(layers),
        pad_id=200018, eos_ids=(200001, 200007, 200008),
    )


# %% book/chapters/18_llama4.md, cell 53
SCOUT_ROPE = Llama3Rope(500000.0, 16.0, 1.0, 1.0, 8192)
LLAMA_4S = {
    "llama-4-scout": llama4_config(10485760, 16, 1, SCOUT_ROPE, 1e-5),
    "llama-4-maverick": llama4_config(
        1048576, 128, 2, Rope(500000.0), None),
}


# %% book/chapters/18_llama4.md, cell 54
LLAMA4_ATTENTION = projections(
    "self_attn.", "multi_head_attention/", QKVO,
    {"q": "halves", "k": "halves"},
)
LLAMA4_DENSE = projections("feed_forward.", "", GLU)
LLAMA4_EXPERTS = (
    WeightName("feed_forward.router.weight", "router/w", "transpose"),
    WeightName("feed_forward.experts.gate_up_proj", "moe/linear/w",
               "first half"),
    WeightName("feed_forward.experts.gate_up_proj", "moe/linear_v/w",
               "second half"),
    WeightName("feed_forward.experts.down_proj", "moe/linear_1/w"),
    *projections("feed_forward.shared_expert.", "shared/", GLU),
)


# %% book/chapters/18_llama4.md, cell 55
def int_list(fields: Fields, name: str, usual: list[int]) -> list[int]:
    """A list of ints that may be absent."""
    found = fields.get(name, usual)
    if not isinstance(found, list) or any(
        type(i) is not int for i in found
    ):
        raise fields.error(f"{name} must list ints: {found!r:.80}")
    return found


# %% book/chapters/18_llama4.md, cell 56
class Llama4Family(LlamaFamily):
    """Llama 4's texts."""

    model_type = "llama4_text"
    rope_base = 500000.0
    norm_eps = 1e-5

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        sparse = isinstance(spec.feed_forward, MoESpec)
        return NORMS + LLAMA4_ATTENTION + (LLAMA4_EXPERTS if sparse else LLAMA4_DENSE)

    def read_turns(self, fields: Fields, n: int) -> list[bool]:
        """For each layer, whether it has RoPE; the others see all."""
        nth = fields.size("no_rope_layer_interval", 4)
        usual = [int((i + 1) % nth != 0) for i in range(n)]
        turns = int_list(fields, "no_rope_layers", usual) or usual
        if len(turns) != n:
            raise fields.error("no_rope_layers must have an entry a layer")
        names = ["full_attention", "chunked_attention"]
        known = [names[bool(turn)] for turn in turns]
        if fields.get("layer_types", []) not in ([], known):
            raise fields.error(
                "layer_types must be chunked_attention where "
                "no_rope_layers is 1, full_attention where it is 0"
            )
        return [bool(turn) for turn in turns]

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        n = fields.size("num_hidden_layers")
        turns = self.read_turns(fields, n)
        step = fields.size("interleave_moe_layer_step", 1)
        sparse = int_list(
            fields, "moe_layers", list(range(step - 1, n, step))
        )
        plain = self.read_attention(fields)
        width = fields.size("intermediate_size", 8192)
        normed = fields.flag("use_qk_norm", True)
        growing = fields.flag("attn_temperature_tuning", True)
        floor = fields.size("floor_scale", 8192)
        eps = self.read_eps(fields)
        attention = UnitAttentionSpec(
            plain.q_heads, plain.kv_heads, plain.head_size,
            plain.multiplier, rope=plain.rope, bias=plain.bias,
            qk_norm_eps=eps if normed else None,
            floor=floor if growing else None,
            scale=fields.number("attn_scale", 0.1),
        )
        experts = SharedMoESpec(
            fields.size("num_local_experts", 16),
            fields.size("num_experts_per_tok", 1), width, "silu",
            "sigmoid", shared=FeedForwardSpec(width, "silu"),
            gate_input=True,
        )
        dense = FeedForwardSpec(
            fields.size("intermediate_size_mlp", 16384), "silu"
        )
        chunk = None
        if fields.get("attention_chunk_size") is not None:
            chunk = fields.size("attention_chunk_size")
        bare = {i for i, turn in enumerate(turns) if not turn}
        return llama4_layers(
            n, attention, chunk, dense, experts, bare, set(sparse), eps
        )

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        layers = [config.layer(i) for i in range(config.num_layers)]
        if not all(
            isinstance(layer.attention, UnitAttentionSpec)
            for layer in layers
        ):
            raise ValueError("this is no Llama 4's attention")
        parts = [layer.feed_forward for layer in layers]
        sparse = [p for p in parts if isinstance(p, SharedMoESpec)]
        dense = [p for p in parts if not isinstance(p, MoESpec)]
        near = [i.attention for i in layers if i.attention.rope]
        far = [i.attention for i in layers if not i.attention.rope]
        turns = [int(i.attention.rope is not None) for i in layers]
        names = ["full_attention", "chunked_attention"]
        first = (near or far)[0]
        grows = [a.floor for a in far]
        chunk = None
        if near and isinstance(near[0].mask, Chunk):
            chunk = near[0].mask.size
        experts = sparse[0] if sparse else SharedMoESpec(
            1, 1, 1, shared=FeedForwardSpec(1))
        return {
            **write_attention(first),
            "rms_norm_eps": layers[0].norm_eps,
            "intermediate_size": experts.width,
            "intermediate_size_mlp": (
                dense[0].width if dense else 16384),
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "attention_chunk_size": chunk,
            "no_rope_layers": turns,
            "no_rope_layer_interval": 4,
            "layer_types": [names[turn] for turn in turns],
            "moe_layers": [
                i for i, p in enumerate(parts)
                if isinstance(p, SharedMoESpec)
            ],
            "interleave_moe_layer_step": 1,
            "use_qk_norm": bool(near and near[0].qk_norm_eps),
            "attn_temperature_tuning": any(grows),
            "floor_scale": next(filter(None, grows), 8192),
            "attn_scale": far[0].scale if far else 0.1,
        }


FAMILIES["Llama4ForCausalLM"] = Llama4Family()
FAMILIES["Llama4ForConditionalGeneration"] = SeeingFamily(
    Llama4Family(), "llama4"
)
