# Generated from book/chapters/18_llama4.md, book/chapters/93_images.md by `make sync`; edit the chapters.
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

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

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
from annotated_moe.families.vision import (
    VISION_META,
    SeeingConfig,
    SeeingFamily,
    VisionSpec,
    preprocessor_config,
    seeing,
)
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.hub import (
    FAMILIES,
    TRANSFORMS,
    Fields,
    WeightName,
    WeightTransform,
    halves,
    unchanged,
)
from annotated_moe.formats.meta import (
    META_COMPANIONS,
    META_ENDS,
    META_FAMILIES,
    META_LAYER,
    STOPS,
    MetaFamily,
    dense_width,
    ffn_width,
    read_heads,
    read_rope_base,
)
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


# %% book/chapters/18_llama4.md, cell 80
def part_of_qkv(
    w: np.ndarray, spec: LayerSpec, which: int
) -> np.ndarray:
    """Queries (0), keys (1) or values (2) of one file's wqkv."""
    attention = spec.attention
    heads = (
        attention.q_heads, attention.kv_heads, attention.kv_heads
    )
    sizes = [len(w) * n // sum(heads) for n in heads]
    whole = not any(n % attention.head_size for n in sizes)
    if sum(sizes) != len(w) or not whole:
        raise CheckpointError(
            f"has {len(w)} outputs in a file, which are no whole heads "
            f"of {attention.head_size}, {' + '.join(map(str, heads))} "
            "of them in all files"
        )
    start = sum(sizes[:which])
    return w[start : start + sizes[which]]


def halves_of_qkv(which: int) -> WeightTransform:
    """Queries or keys, in the order of chapter 3."""
    turn = TRANSFORMS["halves"].read
    return WeightTransform(
        lambda w, spec: turn(part_of_qkv(w, spec, which), spec),
        unchanged,
    )


# %% book/chapters/18_llama4.md, cell 81
def by_expert(w: np.ndarray, spec: LayerSpec) -> np.ndarray:
    """[E * in, out] as [E, in, out]."""
    assert isinstance(spec.feed_forward, MoESpec)
    experts = spec.feed_forward.num_experts
    if math.prod(w.shape[:-1]) % experts:
        raise CheckpointError(
            f"has shape {w.shape}, which {experts} experts do not "
            "divide"
        )
    return w.reshape(experts, -1, w.shape[-1])


TRANSFORMS |= {
    "queries of three": halves_of_qkv(0),
    "keys of three": halves_of_qkv(1),
    "values of three": WeightTransform(
        lambda w, spec: part_of_qkv(w, spec, 2).T, unchanged),
    "first of two": WeightTransform(
        lambda w, spec: halves(w.T)[0], unchanged),
    "second of two": WeightTransform(
        lambda w, spec: halves(w.T)[1], unchanged),
    "experts": WeightTransform(by_expert, unchanged),
}


# %% book/chapters/18_llama4.md, cell 82
ATTENTION_OF_THREE = (
    WeightName("attention.wqkv.layer_norm_weight", "rms_norm/scale"),
    *(
        WeightName("attention.wqkv.weight",
                   f"multi_head_attention/{ours}/w", change)
        for ours, change in (
            ("query", "queries of three"), ("key", "keys of three"),
            ("value", "values of three"))
    ),
    WeightName("attention.wo.weight", "multi_head_attention/linear/w",
               "transpose"),
)
TRAINED_DENSE = ATTENTION_OF_THREE + (
    WeightName("feed_forward.mlp.layer_norm_weight",
               "rms_norm_2/scale"),
    WeightName("feed_forward.mlp.fc1_weight", "linear/w",
               "first of two"),
    WeightName("feed_forward.mlp.fc1_weight", "linear_v/w",
               "second of two"),
    WeightName("feed_forward.mlp.fc2_weight", "linear_1/w",
               "transpose"),
)


# %% book/chapters/18_llama4.md, cell 83
def meta_expert_names(
    router: str, experts: dict[str, str], shared: dict[str, str]
) -> tuple[WeightName, ...]:
    """Names of a router, of experts and of the shared expert."""
    return (
        WeightName(f"feed_forward.{router}", "router/w"),
        *(
            WeightName(f"feed_forward.{theirs}", f"moe/{ours}/w",
                       "experts")
            for ours, theirs in experts.items()
        ),
        *(
            WeightName(f"feed_forward.{theirs}.weight",
                       f"shared/{ours}/w", "transpose")
            for ours, theirs in shared.items()
        ),
    )


TRAINED_EXPERTS = ATTENTION_OF_THREE + (
    WeightName("feed_forward.norm.weight", "rms_norm_2/scale"),
) + meta_expert_names(
    "router_DE",
    {"linear": "experts.moe_w_in_eD_F",
     "linear_v": "experts.moe_w_swiglu_eD_F",
     "linear_1": "experts.moe_w_out_eF_D"},
    {"linear": "w_in_shared_FD", "linear_v": "w_swiglu_FD",
     "linear_1": "w_out_shared_DF"},
)
SAVED_EXPERTS = tuple(
    name for name in META_LAYER
    if not name.theirs.startswith("feed_forward.")
) + meta_expert_names(
    "router_DE",
    {"linear": "experts.w1", "linear_v": "experts.w3",
     "linear_1": "experts.w2"},
    {"linear": "shared_expert.w1", "linear_v": "shared_expert.w3",
     "linear_1": "shared_expert.w2"},
)


# %% book/chapters/18_llama4.md, cell 84
def read_moe_args(
    fields: Fields
) -> tuple[SharedMoESpec, int]:
    """The experts, and that each so-many-th layer has them."""
    inner = fields.inner("moe_args")
    if inner is None:
        raise fields.error("moe_args must describe the experts")
    number = inner.size("num_experts")
    share = inner.number("capacity_factor", 1.0) + 1
    width = ffn_width(
        int(fields.number("ffn_exp") * fields.size("dim")),
        fields.number("ffn_dim_multiplier"),
        fields.size("multiple_of", 256),
        share if inner.flag("auto_scale_F", True) else 1.0,
    )
    every = inner.size("interleave_moe_layer_step", 1)
    top_k = inner.size("top_k", 1)
    inner.finish(frozenset())
    return SharedMoESpec(
        number, top_k, width, "silu", "sigmoid",
        shared=FeedForwardSpec(width, "silu"), gate_input=True,
    ), every


# %% book/chapters/18_llama4.md, cell 85
def read_meta_attention(fields: Fields) -> UnitAttentionSpec:
    """Attention, as a layer with RoPE has it and one without."""
    heads, kv_heads, size = read_heads(fields)
    base, eps = read_rope_base(fields), fields.number("norm_eps", 1e-5)
    factor = fields.number("rope_scaling_factor", 16.0)
    high = fields.number("rope_high_freq_factor", 1.0)
    rope = Rope(base)
    if fields.flag("use_scaled_rope"):
        rope = Llama3Rope(base, factor, 1.0, high, 8192)
    floor = fields.number("floor_scale", 8192)
    if floor % 1:
        raise fields.error(f"floor_scale must be whole: {floor}")
    growing = fields.flag("attn_temperature_tuning")
    return UnitAttentionSpec(
        heads, kv_heads, size, size**-0.5, rope=rope,
        qk_norm_eps=eps if fields.flag("use_qk_norm") else None,
        floor=int(floor) if growing else None,
        scale=fields.number("attn_scale", 0.1),
    )


# %% book/chapters/18_llama4.md, cell 86
def read_meta_layers(fields: Fields) -> list[LayerSpec]:
    """What each layer is."""
    n = fields.size("n_layers")
    attention = read_meta_attention(fields)
    experts, every = read_moe_args(fields)
    dense = FeedForwardSpec(dense_width(fields), "silu")
    chunk = bare = None
    if fields.get("attention_chunk_size") is not None:
        chunk = fields.size("attention_chunk_size")
    if fields.get("nope_layer_interval") is not None:
        bare = fields.size("nope_layer_interval")
    return llama4_layers(
        n, attention, chunk, dense, experts,
        set(range(bare - 1, n, bare)) if bare else set(),
        set(range(every - 1, n, every)),
        fields.number("norm_eps", 1e-5),
    )


# %% book/chapters/18_llama4.md, cell 87
def read_side(fields: Fields, name: str) -> int:
    """The side of a square; CheckpointError for another shape."""
    size = fields.inner(name)
    if size is None:
        raise fields.error(f"lacks the field {name!r}")
    height = size.size("height")
    if size.size("width") != height:
        raise fields.error(f"{name} must be a square")
    return height


def read_vision_args(
    fields: Fields, d_model: int, vocab_size: int
) -> VisionSpec:
    """The encoder that `vision_args` describe."""
    ratio = 1 / fields.number("pixel_shuffle_ratio")
    if ratio % 1:
        raise fields.error("pixel_shuffle_ratio must be 1 / n")
    width = fields.size("dim")
    spec = VisionSpec(
        image_size=read_side(fields, "image_size"),
        patch_size=read_side(fields, "patch_size"),
        width=width, layers=fields.size("n_layers"),
        heads=fields.size("n_heads"),
        d_ff=int(width * fields.number("mlp_ratio")),
        shuffle=int(ratio), adapter_width=fields.size("output_dim"),
        d_model=d_model, image_id=min(200092, vocab_size - 1),
    )
    fields.finish(frozenset())
    return spec


# %% book/chapters/18_llama4.md, cell 88
class MetaLlama4(MetaFamily):
    """Llama 4 as Meta publishes it; `trained`: by the names of the
    program that trained it, or of the published one.
    """

    ends = META_ENDS + VISION_META

    def __init__(self, trained: bool) -> None:
        self.trained = trained

    def matches(
        self, raw: Mapping[str, Any], names: Collection[str]
    ) -> bool:
        joined = any(".wqkv." in name for name in names)
        return "moe_args" in raw and joined == self.trained

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        if isinstance(spec.feed_forward, MoESpec):
            return TRAINED_EXPERTS if self.trained else SAVED_EXPERTS
        return TRAINED_DENSE if self.trained else META_LAYER

    def read(self, fields: Fields) -> ModelConfig:
        words, width = fields.size("vocab_size"), fields.size("dim")
        scaled = fields.flag("use_scaled_rope")
        config = ModelConfig(
            words, 10485760 if scaled else 1048576, width,
            as_segments(read_meta_layers(fields)),
            norm_eps=fields.number("norm_eps", 1e-5),
            pad_id=200018 if words == 202048 else 0,
            eos_ids=STOPS.get(words, (2,)),
        )
        vision = fields.inner("vision_args")
        if vision is None:
            return config
        spec = read_vision_args(vision, width, words)
        return seeing(config, spec)


META_FAMILIES[:0] = [MetaLlama4(True), MetaLlama4(False)]
STOPS[202048] = (200001, 200007, 200008)


# %% book/chapters/93_images.md, cell 12
def image_companion(config: ModelConfig) -> bytes | None:
    """`preprocessor_config.json`, for a model that sees."""
    if isinstance(config, SeeingConfig):
        return preprocessor_config(config.vision)
    return None


META_COMPANIONS["preprocessor_config.json"] = image_companion
