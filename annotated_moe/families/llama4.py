# Generated from book/chapters/18_llama4.md by `make sync`; edit the chapter.
"""Llama 4 Scout Instruct was published with a context of 10,485,760
tokens. Keep the keys and values of its 48 layers for that many and they
fill 1,920 GiB, more than nine times what its weights fill. And memory
is the smaller trouble: at such distances RoPE turns by angles that no
training text was long enough to show, and a softmax over ten million
keys has next to nothing left for the one that matters. This chapter
builds the answers, each a few lines long: layers that look no further
than their chunk, layers without rotation whose queries grow with their
position, and a router that picks one expert and turns down what it
reads. By its end you will have the published models as presets and
their files as models, a cache a quarter the size, and a test for a
mistake that Meta's own code makes from the second chunk on.
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


# %% book/chapters/18_llama4.md, cell 64
def llama4_layers(
    num_layers: int,
    attention: UnitAttentionSpec,
    chunk: int | None,
    dense: FeedForwardSpec,
    experts: FeedForwardSpec | MoESpec,
    bare: set[int],
    sparse: set[int],
    norm_eps: float = 1e-5,
    full: set[int] | None = None,
) -> list[LayerSpec]:
    """Layers in `bare` have no RoPE and growing queries, the others
    RoPE and a norm; those in `sparse` have experts.

    Those in `full`, by default the `bare` ones, see everything, the
    others their chunk; all see everything if `chunk` is None.
    """
    full = bare if full is None else full
    layers = []
    for i in range(num_layers):
        own = replace(attention, rope=None)
        if i not in bare:
            own = replace(attention, floor=None)
        if chunk is not None and i not in full:
            own = replace(own, mask=Chunk(chunk))
        part = experts if i in sparse else dense
        layers.append(LayerSpec(own, part, norm_eps))
    return layers


# %% book/chapters/18_llama4.md, cell 67
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


# %% book/chapters/18_llama4.md, cell 68
SCOUT = llama4_config(
    10485760, 16, 1, Llama3Rope(500000.0, 16.0, 1.0, 1.0, 8192), 1e-5
)
MAVERICK = llama4_config(1048576, 128, 2, Rope(500000.0), None)
LLAMA_4S = {
    "llama-4-scout": SCOUT,                         # Instruct
    "llama-4-scout-base": replace(SCOUT, context=262144),
    "llama-4-maverick": MAVERICK,                   # Instruct
    "llama-4-maverick-base": replace(MAVERICK, context=262144),
}


# %% book/chapters/18_llama4.md, cell 70
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


# %% book/chapters/18_llama4.md, cell 71
def int_list(fields: Fields, name: str, usual: list[int]) -> list[int]:
    """A list of ints that may be absent."""
    found = fields.get(name, usual)
    if not isinstance(found, list) or any(
        type(i) is not int for i in found
    ):
        raise fields.error(f"{name} must list ints: {found!r:.80}")
    return found


def read_bare(fields: Fields, n: int) -> set[int]:
    """The layers without RoPE."""
    step = fields.size("no_rope_layer_interval", 4)
    usual = [int((i + 1) % step != 0) for i in range(n)]
    turns = int_list(fields, "no_rope_layers", usual) or usual
    if len(turns) != n:
        raise fields.error("no_rope_layers must have an entry a layer")
    return {i for i, turn in enumerate(turns) if not turn}


def read_sparse(fields: Fields, n: int) -> set[int]:
    """The layers with experts."""
    usual: list[int] = []
    if fields.get("moe_layers") is None:
        step = fields.size("interleave_moe_layer_step", 1)
        usual = list(range(step - 1, n, step))
    fields.get("interleave_moe_layer_step")
    sparse = int_list(fields, "moe_layers", usual)
    for i in sparse:
        if not 0 <= i < n:
            raise fields.error(f"moe_layers names layer {i} of {n}")
    return set(sparse)


# %% book/chapters/18_llama4.md, cell 74
FULL, CHUNKED = LAYER_TYPES = "full_attention", "chunked_attention"


def read_full(fields: Fields, n: int, bare: set[int]) -> set[int]:
    """The layers that see everything."""
    types = fields.get("layer_types", [])
    if not types:
        return bare
    if not isinstance(types, list) or len(types) != n or not all(
        name in LAYER_TYPES for name in types
    ):
        raise fields.error(
            f"layer_types must name {FULL} or {CHUNKED} for each of {n}"
            f" layers: {types!r:.80}"
        )
    return {i for i, name in enumerate(types) if name == FULL}


def read_chunk(fields: Fields) -> int | None:
    """Tokens in a chunk; None where the file says null."""
    name = "attention_chunk_size"
    return None if fields.get(name) is None else fields.size(name)


# %% book/chapters/18_llama4.md, cell 75
def read_parts(
    fields: Fields, some: bool
) -> tuple[FeedForwardSpec, FeedForwardSpec | MoESpec]:
    """A dense block; and experts, if `some` layers have them."""
    width = fields.size("intermediate_size_mlp", 16384)
    dense = FeedForwardSpec(width, "silu")
    names = (
        "intermediate_size", "num_local_experts", "num_experts_per_tok"
    )
    if not some:
        for name in names:
            fields.get(name)
        return dense, dense
    width, count, top_k = map(fields.size, names, (8192, 16, 1))
    shared = FeedForwardSpec(width, "silu")
    return dense, SharedMoESpec(
        count, top_k, width, "silu", "sigmoid", shared=shared,
        gate_input=True,
    )


def write_parts(
    parts: list[FeedForwardSpec | MoESpec],
) -> dict[str, Any]:
    """The fields of what `parts` compute, a layer each."""
    sparse = [i for i, p in enumerate(parts) if isinstance(p, MoESpec)]
    said: dict[str, Any] = {"moe_layers": sparse}
    for part in parts:
        if isinstance(part, MoESpec):
            said["intermediate_size"] = part.width
            said["num_local_experts"] = part.num_experts
            said["num_experts_per_tok"] = part.top_k
        else:
            said["intermediate_size_mlp"] = part.width
    return said


# %% book/chapters/18_llama4.md, cell 76
class Llama4Family(LlamaFamily):
    """Llama 4's texts."""

    model_type = "llama4_text"
    rope_base = 500000.0
    norm_eps = 1e-5
    defaults = {
        "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "eos_token_id": 2,
        "attention_chunk_size": 8192,
    }

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        sparse = isinstance(spec.feed_forward, MoESpec)
        part = LLAMA4_EXPERTS if sparse else LLAMA4_DENSE
        return NORMS + LLAMA4_ATTENTION + part

    def read_attention(self, fields: Fields) -> UnitAttentionSpec:
        plain = super().read_attention(fields)
        normed = fields.flag("use_qk_norm", True)
        # The first files say 4 where later ones say true.
        growing = bool(fields.get("attn_temperature_tuning", True))
        floor = fields.size("floor_scale", 8192)
        return UnitAttentionSpec(
            plain.q_heads, plain.kv_heads, plain.head_size,
            plain.multiplier, rope=plain.rope, bias=plain.bias,
            qk_norm_eps=self.read_eps(fields) if normed else None,
            floor=floor if growing else None,
            scale=fields.number("attn_scale", 0.1),
        )

    def read_layers(self, fields: Fields) -> list[LayerSpec]:
        n = fields.size("num_hidden_layers")
        bare, sparse = read_bare(fields, n), read_sparse(fields, n)
        dense, experts = read_parts(fields, bool(sparse))
        return llama4_layers(
            n, self.read_attention(fields), read_chunk(fields), dense,
            experts, bare, sparse, self.read_eps(fields),
            read_full(fields, n, bare),
        )

    def write_layers(self, config: ModelConfig) -> dict[str, Any]:
        n = config.num_layers
        layers = [config.layer(i) for i in range(n)]
        found = [layer.attention for layer in layers]
        near = [a for a in found if a.rope is not None]
        far = [a for a in found if a.rope is None]
        first, last = (near + far)[0], (near + far)[-1]
        if not isinstance(first, UnitAttentionSpec) or not isinstance(
            last, UnitAttentionSpec
        ):
            raise ValueError("this is no Llama 4's attention")
        masks = [a.mask for a in found]
        chunks = [m.size for m in masks if isinstance(m, Chunk)]
        return {
            **write_attention(first),
            **write_parts([layer.feed_forward for layer in layers]),
            "rms_norm_eps": layers[0].norm_eps,
            "attention_chunk_size": chunks[0] if chunks else None,
            "no_rope_layers": [int(a in near) for a in found],
            "layer_types": [CHUNKED if isinstance(m, Chunk) else FULL
                            for m in masks],
            "use_qk_norm": first.qk_norm_eps is not None,
            "attn_temperature_tuning": last.floor is not None,
            "floor_scale": last.floor or 8192,
            "attn_scale": last.scale,
        }


FAMILIES["Llama4ForCausalLM"] = Llama4Family()
FAMILIES["Llama4ForConditionalGeneration"] = SeeingFamily(
    Llama4Family(), "llama4"
)
