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

# %% book/chapters/08_model.md, cell 1
import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
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

from annotated_moe import quantization, sharding
from annotated_moe.attention import KVCache, Linear, MultiHeadAttention
from annotated_moe.moe import (
    MoE,
    Router,
    geglu,
    load_balancing_loss,
    router_z_loss,
)
from annotated_moe.quantization import Row
from annotated_moe.rms_norm import RMSNorm
from annotated_moe.tokenizer import Tokenizer


# %% book/chapters/08_model.md, cell 3
@dataclass(frozen=True)
class ModelConfig:
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
    eos_id: int = 2                 # ends a text
    dtype: str = "bfloat16"         # of products; or "float32"

    def __post_init__(self) -> None:
        check_sizes(self)
        check_numbers(self)


# %% book/chapters/08_model.md, cell 4
SIZES = (
    "vocab_size", "context", "d_model", "d_ff", "num_layers",
    "q_heads", "kv_heads", "head_size", "num_experts", "top_k",
)


# %% book/chapters/08_model.md, cell 5
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


# %% book/chapters/08_model.md, cell 6
NUMBERS = (
    "embedding_multiplier", "output_multiplier", "attn_multiplier",
    "attn_softcap", "rope_base",
)
DTYPES = ("float32", "bfloat16")


# %% book/chapters/08_model.md, cell 7
def check_numbers(c: ModelConfig) -> None:
    for name in NUMBERS:
        value = getattr(c, name)
        if value is None and name == "attn_softcap":
            continue
        real = type(value) in (int, float) and math.isfinite(value)
        if not real or value <= 0:
            raise ValueError(f"{name} must be positive: {value!r}")
        object.__setattr__(c, name, float(value))
    for name in ("pad_id", "eos_id"):
        value = getattr(c, name)
        if type(value) is not int or not 0 <= value < c.vocab_size:
            raise ValueError(f"{name} is not a token id: {value!r}")
    if type(c.dtype) is not str or c.dtype not in DTYPES:
        raise ValueError(
            f"dtype must be 'float32' or 'bfloat16': {c.dtype!r}"
        )


# %% book/chapters/08_model.md, cell 9
Losses = dict[str, Float32[Array, "*L"]]


# %% book/chapters/08_model.md, cell 10
class DecoderLayer(hk.Module):
    """Attention and experts, each between two norms. Source: Grok-1."""

    def __init__(
        self, config: ModelConfig, name: str = "decoder_layer"
    ) -> None:
        super().__init__(name=name)
        self.config = config

    def __call__(
        self,
        h: Float32[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache | None = None,
        layer: int | Int32[Array, ""] = 0,
        train: bool = False,
    ) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
        c = self.config
        h, x, cache = attention_half(h, positions, cache, layer, c)
        y, losses = feed_forward(x, c, train)
        return h + RMSNorm(name="rms_norm_3")(y), cache, losses


# %% book/chapters/08_model.md, cell 11
def attention_half(
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    cache: KVCache | None,
    layer: int | Int32[Array, ""],
    c: ModelConfig,
) -> tuple[
    Float32[Array, "B T D"], Float32[Array, "B T D"], KVCache | None
]:
    """h after attention, what the experts read of it, the cache."""
    x = RMSNorm(name="rms_norm")(h).astype(c.dtype)
    y, cache = attention_of(c)(x, positions, cache, layer)
    h = h + RMSNorm(name="rms_norm_1")(y)
    return h, RMSNorm(name="rms_norm_2")(h), cache


# %% book/chapters/08_model.md, cell 12
def attention_of(c: ModelConfig) -> MultiHeadAttention:
    """The attention that a configuration asks for."""
    return MultiHeadAttention(
        c.q_heads, c.kv_heads, c.head_size,
        c.attn_multiplier, c.attn_softcap, c.rope_base,
    )


# %% book/chapters/08_model.md, cell 13
def feed_forward(
    x: Float32[Array, "B T D"], c: ModelConfig, train: bool
) -> tuple[Float32[Array, "B T D"], Losses]:
    """The experts, or with num_experts == 1 one dense block."""
    if c.num_experts == 1:
        return dense(x.astype(c.dtype), c), {}
    flat = x.reshape(-1, c.d_model)                         # [N, D]
    routed = Router(c.num_experts, c.top_k)(flat)
    y = MoE(c.num_experts, c.d_ff)(flat.astype(c.dtype), routed, train)
    balance = load_balancing_loss(routed.probs, routed.experts)
    z = router_z_loss(routed.logits)
    return y.reshape(x.shape), {"balance": balance, "z": z}


# %% book/chapters/08_model.md, cell 14
def dense(
    x: Float[Array, "B T D"], c: ModelConfig
) -> Float32[Array, "B T D"]:
    """A GEGLU block for every token. Source: Grok-1's DenseBlock."""
    gate = Linear(c.d_ff, ("data", "model"), "linear")(x)   # [B, T, F]
    up = Linear(c.d_ff, ("data", "model"), "linear_v")(x)
    hidden = geglu(gate, up, x.dtype)
    return Linear(c.d_model, ("model", "data"), "linear_1")(hidden)


# %% book/chapters/08_model.md, cell 15
def layer_function(config: ModelConfig) -> hk.Transformed:
    """`init(key, h, positions)` and `apply(weights, h, positions)`."""
    def run(*job: Any, **options: Any) -> Any:
        return DecoderLayer(config)(*job, **options)

    return hk.without_apply_rng(hk.transform(run))


# %% book/chapters/08_model.md, cell 16
def norm_function() -> hk.Transformed:
    """The one norm after the last layer."""
    return hk.without_apply_rng(hk.transform(lambda h: RMSNorm()(h)))


# %% book/chapters/08_model.md, cell 17
Params = Mapping[str, Mapping[str, Any]]


# %% book/chapters/08_model.md, cell 18
def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 weights, module -> name -> array.

    Those of the layers are stacked [L, ...]; the embedding has rows of
    length about 1. Under `jax.eval_shape` nothing is allocated.
    """
    h = jnp.zeros((1, 1, config.d_model))
    positions = jnp.zeros((1, 1), jnp.int32)
    init = partial(layer_function(config).init, train=True)
    k0, k1 = jax.random.split(key)
    keys = jax.random.split(k1, config.num_layers)
    layers = jax.vmap(lambda k: init(k, h, positions))(keys)
    size = (config.vocab_size, config.d_model)
    table = jax.random.normal(k0, size) / config.d_model**0.5
    norm = norm_function().init(k0, h)
    return {"in_out_embed": {"embeddings": table}, **layers, **norm}


# %% book/chapters/08_model.md, cell 19
def split_params(params: Params) -> tuple[Params, Params]:
    """The layers' stacks, and everything else."""
    def of_layer(module: str, name: str, w: Any) -> bool:
        return module.startswith("decoder_layer")

    return hk.data_structures.partition(of_layer, params)


# %% book/chapters/08_model.md, cell 27
def weights_of(layers: Params, layer: Int32[Array, ""]) -> Params:
    """One layer's weights: `Row`s for products, else slices."""
    def pick(module: str, name: str, stack: Any) -> Any:
        lazy = name == "w" and "router" not in module
        return Row(stack, layer) if lazy else stack[layer]

    return hk.data_structures.map(pick, layers)


# %% book/chapters/08_model.md, cell 28
def check_depth(layers: Params, depth: int) -> None:
    """ValueError unless every stack holds `depth` layers."""
    for module, leaves in layers.items():
        for name, w in leaves.items():
            if w.shape[0] != depth:
                raise ValueError(
                    f"{module}/{name} holds {w.shape[0]} layers, "
                    f"the configuration {depth}"
                )


# %% book/chapters/08_model.md, cell 29
def keep(h: Float32[Array, "B T D"]) -> Float32[Array, "B T D"]:
    """The residual stream's layout on a mesh, layer after layer."""
    return sharding.constrain(h, None, None, "data")


# %% book/chapters/08_model.md, cell 30
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
    check_depth(layers, config.num_layers)
    if train:
        return decoder_to_train(layers, h, positions, config)
    apply = layer_function(config).apply

    def body(carry, layer):
        weights = weights_of(layers, layer)
        h, cache, _ = apply(
            weights, keep(carry[0]), positions, carry[1], layer
        )
        return (keep(h), cache), None

    depth = jnp.arange(config.num_layers)
    (h, cache), _ = jax.lax.scan(body, (keep(h), cache), depth)
    return keep(h), cache, {}


# %% book/chapters/08_model.md, cell 31
def decoder_to_train(
    layers: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    config: ModelConfig,
) -> tuple[Float32[Array, "B T D"], None, Losses]:
    """The stack with a gradient: experts drop what finds no seat."""
    apply = layer_function(config).apply

    def body(h, weights):
        h, _, losses = apply(weights, h, positions, train=True)
        return h, losses

    h, losses = jax.lax.scan(body, h, layers)               # [L] each
    return h, None, jax.tree.map(jnp.mean, losses)


# %% book/chapters/08_model.md, cell 43
def embed(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig
) -> Float32[Array, "B T D"]:
    """Rows of the table times the multiplier, rounded as in Grok-1."""
    dtype = config.dtype
    h = params["in_out_embed"]["embeddings"][tokens].astype(dtype)
    multiplier = jnp.asarray(config.embedding_multiplier, dtype)
    return (h * multiplier).astype(jnp.float32)


# %% book/chapters/08_model.md, cell 44
def tied_logits(
    h: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """Every row of `h` times every row of the table, in `h.dtype`."""
    table = table.astype(h.dtype)
    return jnp.dot(h, table.T, preferred_element_type=jnp.float32)


# %% book/chapters/08_model.md, cell 45
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


# %% book/chapters/08_model.md, cell 50
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


# %% book/chapters/08_model.md, cell 51
def unembed(
    params: Params,
    h: Float32[Array, "B T D"],
    config: ModelConfig,
    train: bool = False,
) -> Float32[Array, "B T V"]:
    """Logits: the last norm, the tied table, the multiplier."""
    *lead, d = h.shape
    h = norm_function().apply({"rms_norm": params["rms_norm"]}, h)
    h = h.reshape(-1, d).astype(config.dtype)               # [N, D]
    table = params["in_out_embed"]["embeddings"]
    y = tied_logits_on_mesh(h, table, train)
    scale = jnp.asarray(config.output_multiplier, config.dtype)
    return y.reshape(*lead, -1) * scale.astype(jnp.float32)


# %% book/chapters/08_model.md, cell 52
def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    cache: KVCache | None = None,
    train: bool = False,
) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
    """Tokens through embedding and layers: h, cache, losses.

    With a cache, row b's tokens stand behind its first `length[b]`.
    """
    rows, t = tokens.shape
    zero = jnp.zeros(rows, jnp.int32)
    start = zero if cache is None else cache.length
    positions = start[:, None] + jnp.arange(t)              # [B, T]
    h = embed(params, tokens, config)
    return decoder(params, h, positions, config, cache, train)


# %% book/chapters/08_model.md, cell 53
@partial(jax.jit, static_argnames="config")
def all_logits(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig
) -> Float32[Array, "B T V"]:
    """The logits at every token, without a cache."""
    h, _, _ = forward(params, tokens, config)
    return unembed(params, h, config)


# %% book/chapters/08_model.md, cell 56
def pin(cache: KVCache) -> KVCache:
    """Keep the cache's layout on the mesh from step to step."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return cache
    spec = P(None, "data", None, "model", None)
    spec = sharding.fit_spec(spec, cache.k.shape, mesh)
    hold = jax.lax.with_sharding_constraint
    return KVCache(
        hold(cache.k, spec),
        hold(cache.v, spec),
        hold(cache.length, P()),
    )


# %% book/chapters/08_model.md, cell 57
@partial(jax.jit, static_argnames=("config", "batch", "slots"))
def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache [L, B, S, K, H] in `config.dtype`, on the mesh."""
    copies = sharding.head_copies(config.kv_heads, config.q_heads)
    heads = (copies * config.kv_heads, config.head_size)
    shape = (config.num_layers, batch, slots, *heads)
    k, v = (jnp.zeros(shape, config.dtype) for _ in "kv")
    return pin(KVCache(k, v, jnp.zeros(batch, jnp.int32)))


# %% book/chapters/08_model.md, cell 58
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    config: ModelConfig,
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
    h, grown, _ = forward(params, tokens, config, cache)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    logits = unembed(params, last, config)[:, 0]
    new = replace(cast(KVCache, grown), length=length)
    return logits, pin(new)


# %% book/chapters/08_model.md, cell 59
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


# %% book/chapters/08_model.md, cell 66
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


# %% book/chapters/08_model.md, cell 67
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


# %% book/chapters/08_model.md, cell 72
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


# %% book/chapters/08_model.md, cell 75
class Sampling(NamedTuple):
    """How to choose, one setting a row."""

    seed: Any                                   # uint32 [B]
    temperature: Any                            # float32 [B], 0: greedy
    top_k: Any                                  # int32 [B], 0: all
    top_p: Any                                  # float32 [B], 1: all


# %% book/chapters/08_model.md, cell 76
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


# %% book/chapters/08_model.md, cell 77
@jax.jit
def greedy(
    logits: Float32[Array, "B V"], step: Any = 0, how: Any = None
) -> Int32[Array, " B"]:
    """The largest logit of every row; takes what `sample` takes."""
    return jnp.argmax(logits, axis=-1)


# %% book/chapters/08_model.md, cell 78
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


# %% book/chapters/08_model.md, cell 79
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


# %% book/chapters/08_model.md, cell 80
def bucket(size: int, most: int) -> int:
    """The power of two from 16 up that holds `size`, at most `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


# %% book/chapters/08_model.md, cell 81
def pad_rows(
    rows: list[list[int]], width: int, pad: int = 0
) -> np.ndarray:
    """int32 [B, width]: the rows, filled up on the right."""
    tokens = np.full((len(rows), width), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


# %% book/chapters/08_model.md, cell 82
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


# %% book/chapters/08_model.md, cell 83
def check_rows(
    prompts: Any, new: Any, c: ModelConfig
) -> list[list[int]]:
    """`check_row` for all, and for the number of new tokens."""
    if type(new) is not int or new < 0:
        raise ValueError(f"max_new_tokens must be 0 or more: {new!r}")
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list, not one str: [prompt]")
    return [check_row(i, row, new, c) for i, row in enumerate(prompts)]


# %% book/chapters/08_model.md, cell 85
def token_steps(
    model: "Steps", rows: list[list[int]], how: Sampling, count: int
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
    with model.on_mesh():
        cache = init_cache(c, len(rows), slots)
        logits, cache = model.prefill(padded, lengths, cache)
        tokens = pick(logits, 0, how)
    yield np.asarray(tokens).tolist()
    for step in range(1, count):
        with model.on_mesh():
            logits, cache = model.decode_step(tokens, cache)
            tokens = pick(logits, step, how)
        yield np.asarray(tokens).tolist()


# %% book/chapters/08_model.md, cell 86
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


# %% book/chapters/08_model.md, cell 87
def stream_text(
    ids: Iterable[int], tokenizer: Tokenizer
) -> Iterator[str]:
    """One row's tokens as text, whole characters at a time."""
    text = tokenizer.stream()
    for token in ids:
        yield text.push(token)
    yield text.flush()


# %% book/chapters/08_model.md, cell 88
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


# %% book/chapters/08_model.md, cell 89
class Steps(Runnable):
    """The compiled programs, on these weights."""

    def all_logits(self, tokens: Any, lengths: Any) -> Any:
        return all_logits(self.params, tokens, self.config)

    def prefill(self, tokens: Any, lengths: Any, cache: KVCache) -> Any:
        return prefill(self.params, tokens, lengths, cache, self.config)

    def decode_step(self, tokens: Any, cache: KVCache) -> Any:
        return decode_step(self.params, tokens, cache, self.config)


# %% book/chapters/08_model.md, cell 90
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


# %% book/chapters/08_model.md, cell 91
class IdModel(Steps):
    """What a model does with token ids."""

    def logits(
        self, tokens: Any, lengths: Any = None
    ) -> Float32[Array, "B T V"]:
        """Logits of int [B, T]; past a row's length without meaning."""
        rows, t = check_tokens(tokens, lengths, self.config)
        width = bucket(t, self.config.context)
        padded = pad_rows(rows, width, self.config.pad_id)
        with self.on_mesh():
            lengths = np.array([len(row) for row in rows], np.int32)
            return self.all_logits(padded, lengths)[:, :t]

    def generate_ids(
        self, prompts: Any, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """New ids for each list of ids; a stop id ends a row, unseen.

        Each option is one number, or one a prompt; a single seed counts
        up. TypeError or ValueError for what cannot be run.
        """
        rows = check_rows(prompts, max_new_tokens, self.config)
        how = sampling(len(rows), temperature, top_p, top_k, seed)
        steps = token_steps(self, rows, how, max_new_tokens)
        return collect(steps, len(rows), stop_ids)


# %% book/chapters/08_model.md, cell 92
class StreamModel(IdModel):
    """Token ids one by one."""

    def stream_ids(
        self, prompt: Any, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """The new ids of one list of ids, each as it comes."""
        rows = check_rows([prompt], max_new_tokens, self.config)
        how = sampling(1, temperature, top_p, top_k, seed)
        steps = token_steps(self, rows, how, max_new_tokens)
        ids = (token for (token,) in steps)
        return takewhile(lambda token: token not in stop_ids, ids)


# %% book/chapters/08_model.md, cell 93
class Model(StreamModel):
    """Logits, and text or ids that go on from a prompt."""

    def generate(self, prompts: Any, **options: Any) -> list[str]:
        """New text for each text. Options: those of `generate_ids`;
        `stop_ids` is the end of text unless given.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list, not one str")
        rows = [self.text_ids(prompt) for prompt in prompts]
        options.setdefault("stop_ids", (self.config.eos_id,))
        new = self.generate_ids(rows, **options)
        return [self.words().decode(row) for row in new]

    def stream(
        self, prompt: str, max_new_tokens: int = 32,
        temperature: Any = 0.0, top_p: Any = 1.0, top_k: Any = None,
        seed: Any = 0, stop_ids: Collection[int] | None = None,
    ) -> Iterator[str]:
        """The new text of one prompt, piece by piece as it comes.

        Joined, it is what `generate` gives: SentencePiece drops the
        space before a first word, of new text too.
        """
        stop = (self.config.eos_id,) if stop_ids is None else stop_ids
        ids = self.stream_ids(
            self.text_ids(prompt), max_new_tokens, temperature, top_p,
            top_k, seed, stop,
        )
        return stream_text(ids, self.words())


# %% book/chapters/08_model.md, cell 99
PRESETS = {"grok-1": ModelConfig()}
