# Generated from book/chapters/08_model.md by `make sync`; edit the chapter.
"""One layer of Grok-1 holds 4.9 billion weights, and the model is that
layer sixty-four times. Written as a loop it would be compiled
sixty-four times over; run without a cache it would say its 8,192nd word
by thinking through the 8,191 before it once more. This chapter puts the
pieces together so that the layer is compiled once and every token is
computed once: the stack, the tied embeddings, the sampler, and the loop
around them. It ends with text coming out of a model small enough to
ship inside this package.
"""

import contextlib
import functools
import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, cast

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from annotated_moe import llama, llama4, mixtral, quantization, sharding
from annotated_moe.attention import (
    KVCache,
    Linear,
    MultiHeadAttention,
    as_they_are,
    attend_cached,
    turn_both,
)
from annotated_moe.llama import slow_down, swiglu
from annotated_moe.mixtral import PAST
from annotated_moe.moe import (
    MoE,
    Router,
    Style,
    geglu,
    load_balancing_loss,
    route,
    router_z_loss,
)
from annotated_moe.quantization import Row
from annotated_moe.rms_norm import RMSNorm
from annotated_moe.tokenizer import Tokenizer
from annotated_moe.vision import (
    IMAGE,
    Seen,
    VisionConfig,
    check_images,
    image_features,
    merge,
    places_of,
    read_prompt,
    vision_params,
)


# %% book/chapters/08_model.md, cell 3
@dataclass(frozen=True)
class Variations:
    """In what other families differ; the defaults are Grok-1's way."""

    norm_eps: float = 1e-5          # of every norm
    post_norm: bool = True          # a norm after each sublayer too
    activation: str = "gelu"        # or "silu"
    router: str = "softmax_top_k"   # see ROUTERS
    moe_every: int = 1              # experts in every nth layer
    dense_layers: tuple[int, ...] = ()  # layers without, besides
    dense_ff: int = 0               # their hidden features; 0: d_ff
    shared_expert: bool = False     # one more expert, for every token
    tied: bool = True               # the embedding is the output matrix
    attn_bias: bool = False         # of the four projections
    mlp_bias: bool = False          # of a dense block's matrices
    qk_norm: str = "none"           # see QK_NORMS
    qkv_clip: float | None = None   # most a query, key or value may be
    rope_scaling: tuple[float, float, float, int] | None = None
    nope_every: int = 0             # no RoPE in every nth layer; 0: all
    nope_layers: tuple[int, ...] = ()   # layers without, besides
    attn_window: int | None = None  # tokens a layer looks back
    attn_chunk: int | None = None   # the same by chunks, where RoPE is
    attn_temperature: tuple[int, float] | None = None   # without RoPE
    vision: VisionConfig | None = None  # an encoder of images


# %% book/chapters/08_model.md, cell 4
@dataclass(frozen=True)
class Settings(Variations):
    """What makes a family member; Grok-1 unless told otherwise.

    ValueError for numbers that no model can have.
    """

    vocab_size: int = 131072        # pieces of the tokenizer, or more
    context: int = 8192             # tokens a row may hold
    d_model: int = 6144             # features of a token between layers
    d_ff: int = 32768               # hidden features of one expert
    num_layers: int = 64
    q_heads: int = 48               # a multiple of kv_heads
    kv_heads: int = 8               # what the cache pays for
    head_size: int = 128            # features a head, even for RoPE
    num_experts: int = 8            # 1: one dense block, no router
    top_k: int = 2                  # experts a token
    embedding_multiplier: float = 78.38367176906169  # sqrt(d_model)
    output_multiplier: float = 0.5773502691896257    # 1 / sqrt(3)
    attn_multiplier: float = 0.08838834764831845     # head_size**-0.5
    attn_softcap: float | None = 30.0                # None: no cap
    rope_base: float = 10000.0      # slowest angle: about 1 / this
    pad_id: int = 0                 # fills rows on the right, unread
    eos_id: int | tuple[int, ...] = 2   # ends a text; or each of them
    dtype: str = "bfloat16"         # of products; or "float32"


# %% book/chapters/08_model.md, cell 5
@dataclass(frozen=True)
class ModelConfig(Settings):
    """The settings, checked when they are put together."""

    def __post_init__(self) -> None:
        check_sizes(self)
        check_numbers(self)
        check_ids(self)
        check_variations(self)
        check_eyes(self)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ids = self.eos_id
        return ids if isinstance(ids, tuple) else (ids,)


# %% book/chapters/08_model.md, cell 6
SIZES = (
    "vocab_size", "context", "d_model", "d_ff", "num_layers",
    "q_heads", "kv_heads", "head_size", "num_experts", "top_k",
    "moe_every",
)


# %% book/chapters/08_model.md, cell 7
def check_sizes(c: ModelConfig) -> None:
    for name in SIZES:
        value = getattr(c, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an int >= 1: {value!r}")
    if c.q_heads % c.kv_heads:
        raise ValueError(
            f"q_heads={c.q_heads}, no multiple of kv_heads={c.kv_heads}"
        )
    if c.head_size % 2:
        raise ValueError(f"head_size must be even: {c.head_size}")
    if c.top_k > c.num_experts > 1:
        raise ValueError(
            f"top_k={c.top_k} of only num_experts={c.num_experts}"
        )


# %% book/chapters/08_model.md, cell 8
NUMBERS = (
    "embedding_multiplier", "output_multiplier", "attn_multiplier",
    "attn_softcap", "rope_base", "norm_eps", "qkv_clip",
)
MAY_BE_NONE = {"attn_softcap", "qkv_clip"}
DTYPES = ("float32", "bfloat16")


# %% book/chapters/08_model.md, cell 9
def check_numbers(c: ModelConfig) -> None:
    for name in NUMBERS:
        value = getattr(c, name)
        if value is None and name in MAY_BE_NONE:
            continue
        real = type(value) in (int, float) and math.isfinite(value)
        if not real or value <= 0:
            raise ValueError(f"{name} must be positive: {value!r}")
        object.__setattr__(c, name, float(value))
    if type(c.dtype) is not str or c.dtype not in DTYPES:
        raise ValueError(
            f"dtype must be 'float32' or 'bfloat16': {c.dtype!r}"
        )


# %% book/chapters/08_model.md, cell 10
def check_ids(c: ModelConfig) -> None:
    ids = {"pad_id": (c.pad_id,), "eos_id": c.stop_ids}
    for name, values in ids.items():
        for value in values:
            if type(value) is not int or not 0 <= value < c.vocab_size:
                raise ValueError(f"{name} is not a token id: {value!r}")


# %% book/chapters/08_model.md, cell 11
LAYER_LISTS = ("dense_layers", "nope_layers")
SWITCHES = (
    "post_norm", "shared_expert", "tied", "attn_bias", "mlp_bias",
)
MAYBE_SIZES = ("dense_ff", "nope_every", "attn_window", "attn_chunk")


# %% book/chapters/08_model.md, cell 12
def check_variations(c: ModelConfig) -> None:
    for name in SWITCHES:
        if type(getattr(c, name)) is not bool:
            raise ValueError(f"{name} must be true or false")
    for name in MAYBE_SIZES:
        unset = None if name.startswith("attn") else 0
        value = getattr(c, name)
        if value != unset and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an int >= 1: {value!r}")
    for name in LAYER_LISTS:
        layers = getattr(c, name)
        if type(layers) is not tuple or not all(
            type(i) is int and 0 <= i < c.num_layers for i in layers
        ):
            raise ValueError(f"{name} must list layers: {layers!r}")
    check_named(c)
    check_pairs(c)


# %% book/chapters/08_model.md, cell 13
def check_named(c: ModelConfig) -> None:
    named = {"router": tuple(ROUTERS), "activation": tuple(GLUS),
             "qk_norm": QK_NORMS}
    for name, known in named.items():
        value = getattr(c, name)
        if value not in known:
            why = f"{name} must be one of {', '.join(known)}: {value!r}"
            raise ValueError(why)


# %% book/chapters/08_model.md, cell 14
def check_pairs(c: ModelConfig) -> None:
    for name, size in [("rope_scaling", 4), ("attn_temperature", 2)]:
        value = getattr(c, name)
        if value is None:
            continue
        good = type(value) is tuple and len(value) == size and all(
            type(x) in (int, float) and 0 < x < math.inf for x in value
        )
        if not good:
            why = f"{name} must be {size} positive numbers: {value!r}"
            raise ValueError(why)
    if c.attn_window and c.attn_chunk:
        raise ValueError("attn_window or attn_chunk, but not both")


# %% book/chapters/08_model.md, cell 15
def check_eyes(c: ModelConfig) -> None:
    """The encoder of images, if there is one, fits the model."""
    if c.vision is None:
        return
    if not isinstance(c.vision, VisionConfig):
        raise ValueError("vision must be a VisionConfig or None")
    if c.vision.d_model != c.d_model:
        raise ValueError(
            f"vision.d_model={c.vision.d_model}, d_model={c.d_model}"
        )
    if c.vision.image_id >= c.vocab_size:
        raise ValueError(
            f"vision.image_id={c.vision.image_id} is not a token id"
        )


# %% book/chapters/08_model.md, cell 16
GLUS = {"gelu": geglu, "silu": swiglu}
QK_NORMS = ("none", "head", "whole", "after_rope")
ROUTERS = {
    "softmax_top_k": route,
    "top_k_softmax": mixtral.route_renormalised,
    "sigmoid_input": llama4.route_sigmoid,
}


# %% book/chapters/08_model.md, cell 18
Losses = dict[str, Float32[Array, "*L"]]


# %% book/chapters/08_model.md, cell 19
class Kind(NamedTuple):
    """What a layer is like; in Grok-1 all are alike."""

    experts: bool = True            # experts, or a dense block
    rope: bool = True               # turned queries and keys, or not
    near: bool = False              # looks back only so far


LIKE_GROK = Kind()


# %% book/chapters/08_model.md, cell 20
@functools.cache
def kinds(c: ModelConfig) -> tuple[Kind, ...]:
    """The kind of every layer."""
    def kind(i: int) -> Kind:
        last = c.nope_every and (i + 1) % c.nope_every == 0
        rope = not last and i not in c.nope_layers
        sparse = c.num_experts > 1 and (i + 1) % c.moe_every == 0
        near = bool(c.attn_window or rope and c.attn_chunk)
        return Kind(sparse and i not in c.dense_layers, rope, near)

    return tuple(map(kind, range(c.num_layers)))


# %% book/chapters/08_model.md, cell 21
class DecoderLayer(hk.Module):
    """Attention and experts, each between two norms. Source: Grok-1."""

    def __init__(
        self, config: ModelConfig, kind: Kind = LIKE_GROK,
        name: str = "decoder_layer",
    ) -> None:
        super().__init__(name=name)
        self.config, self.kind = config, kind

    def __call__(
        self,
        h: Float32[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache | None = None,
        layer: int | Int32[Array, ""] = 0,
        train: bool = False,
    ) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
        c = self.config
        h, x, cache = attention_half(
            h, positions, cache, layer, c, self.kind
        )
        y, losses = feed_forward(x, c, train, self.kind)
        return h + post_normed(y, "rms_norm_3", c), cache, losses


# %% book/chapters/08_model.md, cell 22
def post_normed(
    y: Float32[Array, "B T D"], name: str, c: ModelConfig
) -> Float32[Array, "B T D"]:
    """What a sublayer adds: normed, in the models that do."""
    return RMSNorm(c.norm_eps, name)(y) if c.post_norm else y


# %% book/chapters/08_model.md, cell 23
def attention_half(
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    c: ModelConfig,
    kind: Kind = LIKE_GROK,
) -> tuple[
    Float32[Array, "B T D"], Float32[Array, "B T D"], KVCache | None
]:
    """h after attention, what the experts read of it, the cache."""
    x = RMSNorm(c.norm_eps, "rms_norm")(h).astype(c.dtype)
    y, cache = attention_of(c, kind)(x, positions, cache, layer)
    h = h + post_normed(y, "rms_norm_1", c)
    return h, RMSNorm(c.norm_eps, "rms_norm_2")(h), cache


# %% book/chapters/08_model.md, cell 24
def attention_of(
    c: ModelConfig, kind: Kind = LIKE_GROK
) -> MultiHeadAttention:
    """The attention that a configuration asks for."""
    return MultiHeadAttention(
        c.q_heads, c.kv_heads, c.head_size,
        c.attn_multiplier, c.attn_softcap, c.rope_base,
        ready=partial(ready, c), turn=partial(turned, c, kind),
        look=look_of(c, kind), bias=c.attn_bias,
    )


# %% book/chapters/08_model.md, cell 25
def ready(c: ModelConfig, *heads: Float[Array, "B T _ H"]) -> Any:
    """Queries, keys and values, normed or clipped where a model is."""
    if c.qk_norm in ("head", "whole"):
        whole = c.qk_norm == "whole"
        heads = mixtral.norm_heads(whole, c.norm_eps, *heads)
    if c.qkv_clip is not None:
        return mixtral.clip_heads(c.qkv_clip, *heads)
    return as_they_are(*heads)


# %% book/chapters/08_model.md, cell 26
def turned(
    c: ModelConfig, kind: Kind, q: Any, k: Any, positions: Any,
    turn: Any,
) -> Any:
    """Queries and keys with their places in them."""
    job = q, k, positions, turn
    if not kind.rope:
        return llama4.heat_queries(*job, c.attn_temperature)
    if c.rope_scaling:
        change = partial(slow_down, scaling=c.rope_scaling)
        job = q, k, positions, partial(turn, change=change)
    if c.qk_norm == "after_rope":
        return llama4.turn_and_norm(*job, c.norm_eps)
    return turn_both(*job)


# %% book/chapters/08_model.md, cell 27
def near_slots(c: ModelConfig) -> int | None:
    """How many tokens a layer that looks back only so far sees."""
    return c.attn_window or c.attn_chunk


def look_of(c: ModelConfig, kind: Kind) -> Any:
    """`attend_cached`, or `attend_near` with the rule of the layer."""
    if not kind.near:
        return attend_cached
    if c.attn_window:
        sees = partial(mixtral.within_window, c.attn_window)
    else:
        sees = partial(llama4.within_chunk, c.attn_chunk or c.context)
    return partial(mixtral.attend_near, sees=sees)


# %% book/chapters/08_model.md, cell 28
def feed_forward(
    x: Float32[Array, "B T D"], c: ModelConfig, train: bool,
    kind: Kind = LIKE_GROK,
) -> tuple[Float32[Array, "B T D"], Losses]:
    """The experts, or with num_experts == 1 one dense block."""
    if not kind.experts or c.num_experts == 1:
        return dense(x.astype(c.dtype), c), {}
    flat = x.reshape(-1, c.d_model)                         # [N, D]
    routed, rounded = router_of(c)(flat), flat.astype(c.dtype)
    experts = MoE(c.num_experts, c.d_ff, style=style_of(c))
    y = experts(rounded, routed, train)
    if c.shared_expert:
        y += Shared(c)(rounded)
    balance = load_balancing_loss(routed.probs, routed.experts)
    z = router_z_loss(routed.logits)
    return y.reshape(x.shape), {"balance": balance, "z": z}


# %% book/chapters/08_model.md, cell 29
def router_of(c: ModelConfig) -> Router:
    return Router(c.num_experts, c.top_k, rule=ROUTERS[c.router])


def style_of(c: ModelConfig) -> Style:
    """How the experts of a configuration compute."""
    return Style(GLUS[c.activation], c.router == "sigmoid_input")


# %% book/chapters/08_model.md, cell 30
def dense(
    x: Float[Array, "B T D"], c: ModelConfig
) -> Float32[Array, "B T D"]:
    """A GEGLU block for every token. Source: Grok-1's DenseBlock."""
    def linear(size, name, *axes):
        return Linear(size, axes, name, c.mlp_bias)

    width = c.dense_ff or c.d_ff
    gate = linear(width, "linear", "data", "model")(x)      # [B, T, F]
    up = linear(width, "linear_v", "data", "model")(x)
    hidden = GLUS[c.activation](gate, up, x.dtype)
    return linear(c.d_model, "linear_1", "model", "data")(hidden)


# %% book/chapters/08_model.md, cell 31
class Shared(hk.Module):
    """The expert that every token goes through, in models with one."""

    def __init__(self, c: ModelConfig, name: str = "shared") -> None:
        super().__init__(name=name)
        self.c = c

    def __call__(
        self, x: Float[Array, "N D"]
    ) -> Float32[Array, "N D"]:
        c, into, out = self.c, ("data", "model"), ("model", "data")
        gate = Linear(c.d_ff, into, "linear")(x)            # [N, F]
        up = Linear(c.d_ff, into, "linear_v")(x)
        hidden = GLUS[c.activation](gate, up, x.dtype)
        return Linear(c.d_model, out, "linear_1")(hidden)


# %% book/chapters/08_model.md, cell 32
def layer_function(
    config: ModelConfig, kind: Kind | None = None
) -> hk.Transformed:
    """`init(key, h, positions)` and `apply(weights, h, positions)`."""
    kind = kind or kinds(config)[0]

    def run(*job: Any, **options: Any) -> Any:
        return DecoderLayer(config, kind)(*job, **options)

    return hk.without_apply_rng(hk.transform(run))


# %% book/chapters/08_model.md, cell 33
def norm_function(eps: float = 1e-5) -> hk.Transformed:
    """The one norm after the last layer."""
    return hk.without_apply_rng(hk.transform(lambda h: RMSNorm(eps)(h)))


# %% book/chapters/08_model.md, cell 34
Params = Mapping[str, Mapping[str, Any]]


# %% book/chapters/08_model.md, cell 35
def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 weights, module -> name -> array.

    Those of the layers are stacked [L, ...]; the embedding has rows of
    length about 1. Under `jax.eval_shape` nothing is allocated.
    """
    h = jnp.zeros((1, 1, config.d_model))
    k0, k1 = jax.random.split(key)
    keys = jax.random.split(k1, config.num_layers)
    layers = init_layers(keys, config)
    size = (config.vocab_size, config.d_model)
    table = jax.random.normal(k0, size) / config.d_model**0.5
    norm = norm_function().init(k0, h)
    ends: dict[str, Any] = {"in_out_embed": {"embeddings": table}}
    if config.vision:
        ends |= vision_params(jax.random.fold_in(k0, 2), config.vision)
    if not config.tied:
        k2 = jax.random.fold_in(k0, 1)
        table = jax.random.normal(k2, size) / config.d_model**0.5
        ends["lm_head"] = {"embeddings": table}
    return {**ends, **layers, **norm}


# %% book/chapters/08_model.md, cell 36
def init_kind(keys: Array, config: ModelConfig, kind: Kind) -> Params:
    """Stacks for layers of one kind, a key for each."""
    h = jnp.zeros((1, 1, config.d_model))
    positions = jnp.zeros((1, 1), jnp.int32)
    init = partial(layer_function(config, kind).init, train=True)
    return jax.lax.map(lambda k: init(k, h, positions), keys)


def flat_paths(params: Params) -> list[tuple[str, str]]:
    return [(m, name) for m, ws in params.items() for name in ws]


# %% book/chapters/08_model.md, cell 37
def init_layers(keys: Array, config: ModelConfig) -> Params:
    """The stacks of all layers; in Grok-1 all have the same modules."""
    has = np.array([kind.experts for kind in kinds(config)])
    parts = [
        init_kind(keys[has == experts], config, Kind(experts))
        for experts in (True, False) if (has == experts).any()
    ]
    params: dict[str, dict] = {}
    for module, name in dict.fromkeys(sum(map(flat_paths, parts), [])):
        stacks = [p[module][name] for p in parts if module in p]
        params.setdefault(module, {})[name] = jnp.concatenate(stacks)
    return params


# %% book/chapters/08_model.md, cell 38
def split_params(params: Params) -> tuple[Params, Params]:
    """The layers' stacks, and everything else."""
    def of_layer(module: str, name: str, w: Any) -> bool:
        return module.startswith("decoder_layer")

    return hk.data_structures.partition(of_layer, params)


# %% book/chapters/08_model.md, cell 46
class Place(NamedTuple):
    """Where a layer's weights and cache lie: an index a stack."""

    layer: Any                      # of what every layer has
    experts: Any                    # among layers with experts
    dense: Any                      # among those without
    cache: Any                      # in the cache, full or near


# %% book/chapters/08_model.md, cell 47
def place_of(c: ModelConfig, layer: int) -> Place:
    """The place of a layer, from the kinds of those before it."""
    before = kinds(c)[:layer]
    experts = sum(kind.experts for kind in before)
    near = sum(kind.near for kind in before)
    here = layer < c.num_layers and kinds(c)[layer].near
    return Place(layer, experts, layer - experts,
                 near if here else layer - near)


# %% book/chapters/08_model.md, cell 48
EXPERTS = ("/moe/", "/router", "/shared/")
DENSE = tuple(f"decoder_layer/linear{end}" for end in ("", "_v", "_1"))


def stack_of(module: str) -> str:
    """Which index of a `Place` finds a module's weights."""
    if any(name in module for name in EXPERTS):
        return "experts"
    return "dense" if module in DENSE else "layer"


# %% book/chapters/08_model.md, cell 49
def weights_of(
    layers: Params, at: Place, kind: Kind = LIKE_GROK
) -> Params:
    """One layer's weights: `Row`s for products, else slices."""
    def pick(module: str, name: str, stack: Any) -> Any:
        index = getattr(at, stack_of(module))
        lazy = name == "w" and "router" not in module
        return Row(stack, index) if lazy else stack[index]

    return hk.data_structures.map(pick, modules_of(layers, kind))


def modules_of(layers: Params, kind: Kind) -> Params:
    """The modules that a layer of this kind has."""
    other = "dense" if kind.experts else "experts"
    return {m: w for m, w in layers.items() if stack_of(m) != other}


# %% book/chapters/08_model.md, cell 50
def check_depth(layers: Params, config: ModelConfig) -> None:
    """ValueError unless every stack holds as many layers as it must."""
    depths = place_of(config, config.num_layers)
    for module, leaves in layers.items():
        depth = getattr(depths, stack_of(module))
        for name, w in leaves.items():
            if w.shape[0] != depth:
                raise ValueError(
                    f"{module}/{name} holds {w.shape[0]} layers, "
                    f"the configuration {depth}"
                )


# %% book/chapters/08_model.md, cell 51
def keep(h: Float32[Array, "B T D"]) -> Float32[Array, "B T D"]:
    """The residual stream's layout on a mesh, layer after layer."""
    return sharding.constrain(h, None, None, "data")


# %% book/chapters/08_model.md, cell 52
def decoder(
    params: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    config: ModelConfig,
    cache: KVCache | None = None,
    train: bool = False,
) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
    """All layers. `train` returns mean losses, and allows gradients."""
    layers, _ = split_params(params)
    check_depth(layers, config)
    if train:
        return decoder_to_train(layers, h, positions, config)
    step = period(config)

    def body(carry, repeat):
        h, cache = carry
        for slot in range(step):
            at = place_in(config, slot, repeat)
            job = layers, at, kinds(config)[slot], keep(h), positions
            h, cache = run_layer(*job, cache, config)
        return (keep(h), cache), None

    repeats = jnp.arange(config.num_layers // step)
    (h, cache), _ = jax.lax.scan(body, (keep(h), cache), repeats)
    return keep(h), cache, {}


# %% book/chapters/08_model.md, cell 53
def run_layer(
    layers: Params,
    at: Place,
    kind: Kind,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    config: ModelConfig,
) -> tuple[Float32[Array, "B T D"], KVCache | None]:
    """The layer whose weights and cache lie `at` these places."""
    apply = layer_function(config, kind).apply
    weights = weights_of(layers, at, kind)
    h, cache, _ = apply(weights, h, positions, cache, at.cache)
    return h, cache


# %% book/chapters/08_model.md, cell 54
@functools.cache
def period(c: ModelConfig) -> int:
    """After how many layers their kinds repeat, if only after all."""
    every, n = kinds(c), c.num_layers
    steps = (s for s in range(1, n) if n % s == 0)
    return next((s for s in steps if every[s:] == every[:-s]), n)


def place_in(c: ModelConfig, slot: int, repeat: Any) -> Place:
    """The place of layer `slot` of the period, in the nth repeat."""
    first, step = place_of(c, slot), period(c)
    if step == c.num_layers > 1:
        return first
    after = place_of(c, slot + step)
    return Place(*(a + repeat * (b - a) for a, b in zip(first, after)))


# %% book/chapters/08_model.md, cell 55
def decoder_to_train(
    layers: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    config: ModelConfig,
) -> tuple[Float32[Array, "B T D"], None, Losses]:
    """The stack with a gradient: experts drop what finds no seat."""
    step = period(config)
    repeats = config.num_layers // step

    def body(h, weights):
        found = []
        for slot, kind in enumerate(kinds(config)[:step]):
            own = slices_of(weights, place_of(config, slot), kind)
            apply = layer_function(config, kind).apply
            h, _, losses = apply(own, h, positions, train=True)
            found += [losses] if losses else []
        return h, jax.tree.map(mean_of, *found) if found else {}

    rows = jax.tree.map(
        lambda w: w.reshape(repeats, -1, *w.shape[1:]), layers
    )
    h, losses = jax.lax.scan(body, h, rows)           # [repeats] each
    return h, None, jax.tree.map(jnp.mean, losses)


# %% book/chapters/08_model.md, cell 56
def mean_of(*values: Float32[Array, ""]) -> Float32[Array, ""]:
    return jnp.stack(values).mean()


def slices_of(layers: Params, at: Place, kind: Kind) -> Params:
    """One layer's weights, cut out of short stacks."""
    def pick(module: str, name: str, stack: Any) -> Any:
        return stack[getattr(at, stack_of(module))]

    return hk.data_structures.map(pick, modules_of(layers, kind))


# %% book/chapters/08_model.md, cell 68
def embed(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig
) -> Float32[Array, "B T D"]:
    """Rows of the table times the multiplier, rounded as in Grok-1."""
    dtype = config.dtype
    h = params["in_out_embed"]["embeddings"][tokens].astype(dtype)
    multiplier = jnp.asarray(config.embedding_multiplier, dtype)
    return (h * multiplier).astype(jnp.float32)


# %% book/chapters/08_model.md, cell 69
def tied_logits(
    h: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """Every row of `h` times every row of the table, in `h.dtype`."""
    table = table.astype(h.dtype)
    return jnp.dot(h, table.T, preferred_element_type=jnp.float32)


# %% book/chapters/08_model.md, cell 70
def tied_logits_tiled(
    h: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """`tied_logits` without a second copy of the table."""
    n, v = h.shape[0], table.shape[0]
    if n <= 8:
        rows = [tied_logits(row, table) for row in jnp.split(h, n)]
        return jnp.concatenate(rows)
    tile = quantization.tile_rows(v, 512)

    def add_tile(t, y):
        words = jax.lax.dynamic_slice_in_dim(table, t * tile, tile)
        part = tied_logits(h, words)                        # [N, tile]
        return jax.lax.dynamic_update_slice(y, part, (0, t * tile))

    y = jnp.zeros((n, v), jnp.float32)
    return jax.lax.fori_loop(0, v // tile, add_tile, y)


# %% book/chapters/08_model.md, cell 75
def tied_logits_on_mesh(
    h: Float[Array, "N D"],
    table: Float[Array, "V D"],
    train: bool = False,
) -> Float32[Array, "N V"]:
    """The faster of the two, on one device or on the current mesh."""
    if train:
        return tied_logits(h, table)
    product = partial(
        jax.lax.platform_dependent,
        cpu=tied_logits_tiled, default=tied_logits,
    )
    mesh = sharding.current_mesh()
    both = ("data", "model")
    axis = mesh and sharding.fit(both, table.shape[1], mesh)
    if not axis:
        return product(h, table)
    return jax.shard_map(
        lambda h, table: jax.lax.psum(product(h, table), axis),
        in_specs=(P(None, axis), P(None, axis)),
        out_specs=P(),
        check_vma=False,
    )(h, table)


# %% book/chapters/08_model.md, cell 76
def unembed(
    params: Params,
    h: Float32[Array, "B T D"],
    config: ModelConfig,
    train: bool = False,
) -> Float32[Array, "B T V"]:
    """Logits: the last norm, the tied table, the multiplier."""
    *lead, d = h.shape
    last = norm_function(config.norm_eps)
    h = last.apply({"rms_norm": params["rms_norm"]}, h)
    h = h.reshape(-1, d).astype(config.dtype)               # [N, D]
    head = "in_out_embed" if config.tied else "lm_head"
    table = params[head]["embeddings"]
    y = tied_logits_on_mesh(h, table, train)
    scale = jnp.asarray(config.output_multiplier, config.dtype)
    return y.reshape(*lead, -1) * scale.astype(jnp.float32)


# %% book/chapters/08_model.md, cell 77
def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    cache: KVCache | None = None,
    train: bool = False,
    lengths: Int[Array, " B"] | None = None,
    seen: Seen | None = None,
) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
    """Tokens through embedding and layers: h, cache, losses.

    With a cache, row b's tokens stand behind its first `length[b]`,
    and those past `lengths[b]` are padding, which no cache keeps. Where
    an image was `seen`, its rows stand in place of tokens.
    """
    rows, t = tokens.shape
    zero = jnp.zeros(rows, jnp.int32)
    start = zero if cache is None else cache.length
    positions = start[:, None] + jnp.arange(t)              # [B, T]
    if lengths is not None:
        real = jnp.arange(t) < lengths[:, None]
        positions = jnp.where(real, positions, PAST)
    h = embed(params, tokens, config)
    h = h if seen is None else merge(h, seen)
    return decoder(params, h, positions, config, cache, train)


# %% book/chapters/08_model.md, cell 78
@partial(jax.jit, static_argnames="config")
def all_logits(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig,
    seen: Seen | None = None,
) -> Float32[Array, "B T V"]:
    """The logits at every token, without a cache."""
    h, _, _ = forward(params, tokens, config, seen=seen)
    return unembed(params, h, config)


# %% book/chapters/08_model.md, cell 81
def pin(cache: KVCache) -> KVCache:
    """Keep the cache's layout on the mesh from step to step."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return cache

    def hold(a):
        wide = P(None, "data", None, "model", None)
        spec = wide if a.ndim == 5 else P()
        spec = sharding.fit_spec(spec, a.shape, mesh)
        return jax.lax.with_sharding_constraint(a, spec)

    return jax.tree.map(hold, cache)


# %% book/chapters/08_model.md, cell 82
@partial(jax.jit, static_argnames=("config", "batch", "slots"))
def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache [L, B, S, K, H] in `config.dtype`, on the mesh."""
    copies = sharding.head_copies(config.kv_heads, config.q_heads)
    heads = (copies * config.kv_heads, config.head_size)
    near = sum(kind.near for kind in kinds(config))

    def empty(layers, slots):
        shape = (layers, batch, slots, *heads)
        return [jnp.zeros(shape, config.dtype) for _ in "kv"]

    k, v = empty(config.num_layers - near, slots)
    none = jnp.zeros(batch, jnp.int32)
    if not near:
        return pin(KVCache(k, v, none))
    few = min(slots, near_slots(config) or slots)
    return pin(KVCache(k, v, none, *empty(near, few)))


# %% book/chapters/08_model.md, cell 83
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    config: ModelConfig,
    seen: Seen | None = None,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """Read prompts, padded on the right: each row's last logits.

    1 <= lengths <= T. ValueError if T is more than the cache's slots.
    The cache that is handed in is gone afterwards.
    """
    if tokens.shape[1] > cache.k.shape[2]:
        raise ValueError(
            f"{tokens.shape[1]} tokens, {cache.k.shape[2]} slots"
        )
    length = cache.length + lengths
    job = params, tokens, config, cache
    h, grown, _ = forward(*job, lengths=lengths, seen=seen)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    logits = unembed(params, last, config)[:, 0]
    new = replace(cast(KVCache, grown), length=length)
    return logits, pin(new)


# %% book/chapters/08_model.md, cell 84
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params,
    tokens: Int[Array, " B"],
    cache: KVCache,
    config: ModelConfig,
) -> tuple[Float32[Array, "B V"], KVCache]:
    """One more token a row: its logits, and the longer cache.

    A row whose slots are all taken attends without the new token; the
    caller must not let it come to that. The old cache is gone.
    """
    h, grown, _ = forward(params, tokens[:, None], config, cache)
    logits = unembed(params, h, config)[:, 0]
    new = replace(cast(KVCache, grown), length=cache.length + 1)
    return logits, pin(new)


# %% book/chapters/08_model.md, cell 91
def keep_top_k(
    logits: Float[Array, "B V"], k: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """All but each row's k largest become -inf; 0 keeps all.

    What equals the k-th stays too. Source: Fan et al. (2018).
    """
    v = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(k > 0, jnp.minimum(k, v), v)
    least = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


# %% book/chapters/08_model.md, cell 92
def keep_nucleus(
    logits: Float[Array, "B V"], p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Keep the fewest, largest logits whose probability reaches p.

    In the dtype of `logits`, which should be float32. What equals the
    least that is kept stays too. Source: Holtzman et al. (2020).
    """
    ranked = jnp.sort(logits, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ranked), axis=-1)
    cut = jnp.argmax(below >= 1 - p[:, None], axis=-1)
    least = jnp.take_along_axis(ranked, cut[:, None], axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


# %% book/chapters/08_model.md, cell 97
def choose(
    logits: Float32[Array, "B V"],
    noise: Float32[Array, "B V"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
) -> Int32[Array, " B"]:
    """A token a row: argmax of the filtered logits plus noise.

    Temperature 0 is greedy. Source: Maddison et al. (2014), section 2.
    """
    best = logits.max(axis=-1, keepdims=True)
    heat = jnp.where(temperature > 0, temperature, 1)[:, None]
    kept = keep_top_k((logits - best) / heat, top_k)
    kept = keep_nucleus(kept, top_p)
    drawn = jnp.argmax(kept + noise, axis=-1)
    greediest = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, drawn, greediest)


# %% book/chapters/08_model.md, cell 100
class Sampling(NamedTuple):
    """How to choose, one setting a row."""

    seed: Any                                   # uint32 [B]
    temperature: Any                            # float32 [B], 0: greedy
    top_k: Any                                  # int32 [B], 0: all
    top_p: Any                                  # float32 [B], 1: all


# %% book/chapters/08_model.md, cell 101
@jax.jit
def sample(
    logits: Float32[Array, "B V"],
    step: int | Int[Array, ""],
    how: Sampling,
) -> Int32[Array, " B"]:
    """Token `step` of every row, each from its own seed."""
    def noise(seed: UInt32[Array, ""]) -> Float32[Array, " V"]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits.shape[-1:])

    drawn = jax.vmap(noise)(how.seed)                       # [B, V]
    return choose(logits, drawn, how.temperature, how.top_k, how.top_p)


# %% book/chapters/08_model.md, cell 102
@jax.jit
def greedy(
    logits: Float32[Array, "B V"], step: Any = 0, how: Any = None
) -> Int32[Array, " B"]:
    """The largest logit of every row; takes what `sample` takes."""
    return jnp.argmax(logits, axis=-1)


# %% book/chapters/08_model.md, cell 103
def per_row(
    name: str, value: Any, rows: int, good: Any, need: str
) -> np.ndarray:
    """`value` for each row; ValueError unless all of it is `good`."""
    a = np.asarray(value)
    if a.shape not in ((), (rows,)):
        raise ValueError(
            f"{name} must be one number, or one for each of {rows} "
            f"prompts, not {a.size}"
        )
    if a.dtype.kind not in "iuf" or not np.all(good(a)):
        raise ValueError(f"{name} must be {need}, got {value!r}")
    return np.broadcast_to(a, (rows,))


# %% book/chapters/08_model.md, cell 104
def sampling(
    rows: int, temperature: Any, top_p: Any, top_k: Any, seed: Any
) -> Sampling:
    """One setting a row, from numbers or sequences.

    A single seed counts up over the rows. ValueError for what makes no
    sense, or for a sequence that is not as long as there are rows.
    """
    whole = "an integer from 0 to 2**32 - 1"
    seeds = per_row("seed", seed, rows,
                    lambda a: (a % 1 == 0) & (a >= 0) & (a < 2**32),
                    whole)
    if np.ndim(seed) == 0:
        seeds = seeds + np.arange(rows)
    heat = per_row("temperature", temperature, rows,
                   lambda a: (a >= 0) & np.isfinite(a), "0 or more")
    mass = per_row("top_p", top_p, rows,
                   lambda a: (a > 0) & (a <= 1), "above 0, at most 1")
    count = 2**31 - 1 if top_k is None else top_k
    count = per_row("top_k", count, rows,
                    lambda a: (a % 1 == 0) & (a >= 1) & (a < 2**31),
                    "an integer >= 1, or None")
    return Sampling(
        seeds.astype(np.uint32), heat.astype(np.float32),
        count.astype(np.int32), mass.astype(np.float32),
    )


# %% book/chapters/08_model.md, cell 105
def bucket(size: int, most: int) -> int:
    """The power of two from 16 up that holds `size`, at most `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


# %% book/chapters/08_model.md, cell 106
def pad_rows(
    rows: list[list[int]], width: int, pad: int = 0
) -> np.ndarray:
    """int32 [B, width]: the rows, filled up on the right."""
    tokens = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


# %% book/chapters/08_model.md, cell 107
def check_row(i: int, row: Any, new: int, c: ModelConfig) -> list[int]:
    """Prompt `i` as a list of ids; ValueError if it cannot be run."""
    ids = np.asarray(row)
    if ids.ndim == 1 and not len(ids):
        raise ValueError(f"prompt {i} is empty; it needs a token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"prompt {i} is no list of integer token ids")
    wrong = ids[(ids < 0) | (ids >= c.vocab_size)]
    if len(wrong):
        raise ValueError(
            f"prompt {i} holds token {wrong[0]}; "
            f"ids run from 0 to {c.vocab_size - 1}"
        )
    if len(ids) + max(new, 1) - 1 > c.context:
        raise ValueError(
            f"prompt {i} of {len(ids)} tokens asks for {new} more; "
            f"the context holds {c.context}"
        )
    return ids.tolist()


# %% book/chapters/08_model.md, cell 108
def check_rows(
    prompts: Any, new: Any, c: ModelConfig
) -> list[list[int]]:
    """`check_row` for all, and for the number of new tokens."""
    if type(new) is not int or new < 0:
        raise ValueError(f"max_new_tokens must be 0 or more: {new!r}")
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list, not one str: [prompt]")
    return [check_row(i, row, new, c) for i, row in enumerate(prompts)]


# %% book/chapters/08_model.md, cell 110
def seen_by(
    model: "Steps", rows: list[list[int]], images: Any,
    padded: np.ndarray,
) -> Seen | None:
    """What the prompts have seen; ValueError if it fits them not."""
    c, p = model.config, model.params
    if c.vision is None:
        if images is not None:
            raise ValueError("this model is blind: leave out images")
        return None
    tiles = check_images(rows, images, c.vision)
    if not len(tiles):
        return None
    eyes = {
        m: {name: w if isinstance(w, jax.Array) else np.asarray(w)
            for name, w in p[m].items()}
        for m in p if m.startswith("vision/")
    }
    with model.on_mesh():
        features = image_features(eyes, tiles, c.vision, c.dtype)
    return Seen(features, places_of(padded, c.vision.image_id))


# %% book/chapters/08_model.md, cell 111
RUN_CHECKS: list[Callable[[Any, str, dict[str, Any]], None]] = []


def announce(mesh: Any, call: str, **inputs: Any) -> None:
    """Give every check of `RUN_CHECKS` the mesh, call and inputs."""
    for check in RUN_CHECKS:
        check(mesh, call, inputs)


# %% book/chapters/08_model.md, cell 112
def token_steps(
    model: "Steps", rows: list[list[int]], how: Sampling, count: int,
    images: Any = None,
) -> Iterator[list[int]]:
    """The next token of every row, `count` times."""
    if not rows or not count:
        return
    c = model.config
    pick = sample if (how.temperature > 0).any() else greedy
    longest = max(map(len, rows))
    slots = bucket(longest + count - 1, c.context)
    padded = pad_rows(rows, bucket(longest, c.context), c.pad_id)
    lengths = np.array([len(row) for row in rows], np.int32)
    seen = seen_by(model, rows, images, padded)
    with model.on_mesh():
        cache = init_cache(c, len(rows), slots)
        logits, cache = model.prefill(padded, lengths, cache, seen)
        tokens = pick(logits, 0, how)
    yield np.asarray(tokens).tolist()
    for step in range(1, count):
        with model.on_mesh():
            logits, cache = model.decode_step(tokens, cache)
            tokens = pick(logits, step, how)
        yield np.asarray(tokens).tolist()


# %% book/chapters/08_model.md, cell 113
def collect(
    steps: Iterable[list[int]], rows: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Each row's tokens up to its first stop id, which is left out."""
    new: list[list[int]] = [[] for _ in range(rows)]
    going = set(range(rows))
    for tokens in steps:
        going -= {i for i in going if tokens[i] in stop_ids}
        for i in going:
            new[i].append(tokens[i])
        if not going:
            break
    return new


# %% book/chapters/08_model.md, cell 114
def stream_text(
    ids: Iterable[int], tokenizer: Tokenizer
) -> Iterator[str]:
    """One row's tokens as text, whole characters at a time."""
    text = tokenizer.stream()
    for token in ids:
        yield text.push(token)
    yield text.flush()


# %% book/chapters/08_model.md, cell 115
@dataclass(frozen=True)
class Runnable:
    """A configuration, its weights, and where and with what to run."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    mesh: Any = None

    def on_mesh(self) -> Any:
        """The context in which compiled functions are called."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.set_mesh(self.mesh)

    def text_ids(self, text: Any) -> list[int]:
        """Ids of one prompt; ValueError without a tokenizer."""
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str: {text!r}")
        return self.words().encode(text)

    def words(self) -> Tokenizer:
        """The tokenizer; ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("it has no tokenizer: use generate_ids")
        return self.tokenizer


# %% book/chapters/08_model.md, cell 116
class Steps(Runnable):
    """The compiled programs, on these weights."""

    def all_logits(
        self, tokens: Any, lengths: Any, seen: Seen | None = None
    ) -> Any:
        return all_logits(self.params, tokens, self.config, seen)

    def prefill(
        self, tokens: Any, lengths: Any, cache: KVCache,
        seen: Seen | None = None,
    ) -> Any:
        job = self.params, tokens, lengths, cache, self.config
        return prefill(*job, seen)

    def decode_step(self, tokens: Any, cache: KVCache) -> Any:
        return decode_step(self.params, tokens, cache, self.config)


# %% book/chapters/08_model.md, cell 117
def check_tokens(
    tokens: Any, lengths: Any, c: ModelConfig
) -> tuple[list[list[int]], int]:
    """Rows cut to their lengths, and T; ValueError if senseless."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [B, T], got {tokens.shape}")
    b, t = tokens.shape
    lengths = np.asarray([t] * b if lengths is None else lengths)
    if lengths.shape != (b,) or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be {b} integers")
    if lengths.min() < 1 or lengths.max() > t:
        raise ValueError(f"lengths must be from 1 to {t}: {lengths}")
    rows = [row[:n] for row, n in zip(tokens, lengths)]
    return check_rows(rows, 0, c), t


# %% book/chapters/08_model.md, cell 118
def check_mask(
    tokens: np.ndarray, lengths: Any, mask: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's tokens begin, and how many there are."""
    mask = np.asarray(mask).astype(bool)
    if lengths is not None:
        raise ValueError("give lengths or a mask, not both")
    if mask.shape != tokens.shape or not mask.any(-1).all():
        raise ValueError(
            f"mask {mask.shape} must be like tokens {tokens.shape}, "
            "with a token in each row"
        )
    first, count = mask.argmax(1), mask.sum(1)
    runs = np.abs(np.diff(mask.astype(int), axis=1)).sum(1)
    if (runs + mask[:, 0] + mask[:, -1] != 2).any():
        raise ValueError("a row's tokens must stand together in mask")
    return first, count


# %% book/chapters/08_model.md, cell 119
def masked_logits(
    model: "LogitsModel", tokens: Any, lengths: Any, mask: Any,
    images: Any = None,
) -> Float32[Array, "B T V"]:
    """Logits of rows that begin anywhere; zero where `mask` is not."""
    tokens = np.asarray(tokens)
    first, count = check_mask(tokens, lengths, mask)
    t = np.arange(tokens.shape[1])                          # [T]
    ahead, back = (t + first[:, None]), (t - first[:, None])
    rows = np.take_along_axis(tokens, ahead % len(t), axis=1)
    y = model.logits(rows, count, images=images)
    y = jnp.take_along_axis(y, back[..., None] % len(t), axis=1)
    return jnp.where(np.asarray(mask, bool)[..., None], y, 0)


# %% book/chapters/08_model.md, cell 120
class LogitsModel(Steps):
    """What a model says of tokens that are there."""

    def logits(
        self, tokens: Any, lengths: Any = None, mask: Any = None,
        images: Any = None,
    ) -> Float32[Array, "B T V"]:
        """Logits of int [B, T]; past a row's length without meaning.

        A `mask` [B, T] is true at tokens and false at padding, on the
        left or on the right, where the logits are then zero. `images`,
        for a model that sees: as for `generate_ids`.
        """
        if mask is not None:
            return masked_logits(self, tokens, lengths, mask, images)
        rows, t = check_tokens(tokens, lengths, self.config)
        announce(self.mesh, "logits", tokens=rows, images=images,
                 config=self.config)
        width = bucket(t, self.config.context)
        padded = pad_rows(rows, width, self.config.pad_id)
        seen = seen_by(self, rows, images, padded)
        with self.on_mesh():
            lengths = np.array([len(row) for row in rows], np.int32)
            return self.all_logits(padded, lengths, seen)[:, :t]


# %% book/chapters/08_model.md, cell 121
class IdModel(LogitsModel):
    """What a model does with token ids."""

    def generate_ids(
        self, prompts: Any, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] = (),
        images: Any = None,
    ) -> list[list[int]]:
        """New ids for each list of ids; a stop id ends a row, unseen.

        Each option is one number, or one a prompt; a single seed counts
        up. `images` holds float tiles [I, C, Y, X] for each prompt, or
        None. TypeError or ValueError for what cannot be run.
        """
        rows = check_rows(prompts, max_new_tokens, self.config)
        how = sampling(len(rows), temperature, top_p, top_k, seed)
        announce(self.mesh, "generate_ids", prompts=rows,
                 max_new_tokens=max_new_tokens, **how._asdict(),
                 stop_ids=set(stop_ids), images=images,
                 config=self.config)
        steps = token_steps(self, rows, how, max_new_tokens, images)
        return collect(steps, len(rows), stop_ids)


# %% book/chapters/08_model.md, cell 122
class StreamModel(IdModel):
    """Token ids one by one."""

    def stream_ids(
        self, prompt: Any, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] = (),
        image: Any = None,
    ) -> Iterator[int]:
        """The new ids of one list of ids, each as it comes."""
        rows = check_rows([prompt], max_new_tokens, self.config)
        how = sampling(1, temperature, top_p, top_k, seed)
        images = None if image is None else [image]
        announce(self.mesh, "stream_ids", prompt=rows[0],
                 max_new_tokens=max_new_tokens, **how._asdict(),
                 stop_ids=set(stop_ids), images=images,
                 config=self.config)
        steps = token_steps(self, rows, how, max_new_tokens, images)
        ids = (token for (token,) in steps)
        return takewhile(lambda token: token not in stop_ids, ids)


# %% book/chapters/08_model.md, cell 123
def images_of(given: Any) -> list[Any]:
    """One prompt's pictures: None, one, or several, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def images_each(prompts: list, images: Any) -> list[Any]:
    """What each prompt shows; ValueError for another number."""
    if images is None:
        return [None] * len(prompts)
    if not isinstance(images, (list, tuple)):
        raise TypeError("images must be a list: a picture a prompt")
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images for {len(prompts)} prompts: give "
            "a picture, a list of pictures, or None for each"
        )
    return list(images)


# %% book/chapters/08_model.md, cell 124
class SeeingModel(StreamModel):
    """Prompts in which pictures stand."""

    def with_images(
        self, prompt: Any, images: Any = None
    ) -> tuple[list[int], Any]:
        """Ids of a prompt, and tiles of its images or None.

        `prompt` is text, or ids such as `tokenizer.chat` gives; each
        `<|image|>` in it stands for one of `images`: one array uint8
        [height, width, 3], or a list. ValueError for what fits not.
        """
        pictures, eyes = images_of(images), self.config.vision
        if eyes is None and pictures:
            raise ValueError("this model is blind: leave out images")
        text = not isinstance(prompt, (list, tuple, np.ndarray))
        ids = self.text_ids(prompt) if text else prompt
        bare = not pictures and not (text and IMAGE in prompt)
        if eyes is None or bare:
            return ids, None
        return read_prompt(prompt, pictures, self.words(), eyes)


# %% book/chapters/08_model.md, cell 125
class ShownModel(SeeingModel):
    """Several prompts at once."""

    def all_with_images(
        self, prompts: Any, images: Any
    ) -> tuple[list[list[int]], list[Any]]:
        """`with_images` for each prompt; an error says for which."""
        rows, tiles = [], []
        shown = images_each(prompts, images)
        for i, (prompt, own) in enumerate(zip(prompts, shown)):
            try:
                row, seen = self.with_images(prompt, own)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
            rows.append(row)
            tiles.append(seen)
        return rows, tiles


# %% book/chapters/08_model.md, cell 126
class TextModel(ShownModel):
    """Texts that go on from texts."""

    def generate(
        self, prompts: Any, images: Any = None, **options: Any
    ) -> list[str]:
        """New text for each text. Options: those of `generate_ids`;
        `stop_ids` is the end of text unless given. `images`: for each
        prompt None, or what `with_images` takes.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list, not one str")
        rows, tiles = self.all_with_images(prompts, images)
        if any(one is not None for one in tiles):
            options["images"] = tiles
        options.setdefault("stop_ids", self.config.stop_ids)
        new = self.generate_ids(rows, **options)
        return [self.words().decode(row) for row in new]


# %% book/chapters/08_model.md, cell 127
class Model(TextModel):
    """Logits, and text or ids that go on from a prompt."""

    def stream(
        self, prompt: str, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] | None = None,
        images: Any = None,
    ) -> Iterator[str]:
        """The new text of one prompt, piece by piece as it comes.

        Joined, it is what `generate` gives: SentencePiece drops the
        space before a first word, of new text too.
        """
        stop = self.config.stop_ids if stop_ids is None else stop_ids
        row, tiles = self.with_images(prompt, images)
        ids = self.stream_ids(
            row, max_new_tokens, temperature, top_p, top_k, seed,
            stop, tiles,
        )
        return stream_text(ids, self.words())


# %% book/chapters/08_model.md, cell 133
PRESETS = {"grok-1": ModelConfig()} | {
    name: ModelConfig(**settings)
    for family in (llama, mixtral, llama4)
    for name, settings in family.PRESETS.items()
}
