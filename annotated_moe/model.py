# Generated from book/chapters/07b_layer.md, book/chapters/08_model.md, book/chapters/20b_flash.md, book/chapters/22_balance.md, book/chapters/29b_pages.md by `make sync`; edit the chapters.
"""The decoder: a layer, the stack of them, the table at both ends, and
the programs that read a prompt and add a token.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from annotated_moe.cache import (
    PAD_POSITION,
    CacheKind,
    KVCache,
    cache_kind,
    share,
)
from annotated_moe.config import (
    LayerSpec,
    ModelConfig,
    Place,
    all_places,
    segments,
)
from annotated_moe.linear import PRODUCTS, product
from annotated_moe.moe import DROPLESS, UPDATES, Losses
from annotated_moe.params import ParamSpec, get_parameter, record_specs
from annotated_moe.placement import here
from annotated_moe.quantization import LazySlice, read_slice, tile_rows
from annotated_moe.rms_norm import RMSNorm, rms_norm


# %% book/chapters/07b_layer.md, cell 18
class DecoderLayer(hk.Module):
    """Attention and experts, each between two norms. Source: Grok-1."""

    def __init__(
        self, spec: LayerSpec, dtype: str, name: str = "decoder_layer"
    ) -> None:
        super().__init__(name=name)
        self.spec, self.dtype = spec, dtype

    def __call__(
        self,
        h: Float32[Array, "B T D"],
        positions: Int32[Array, "B T"],
        real: Bool[Array, "B T"],
        cache: KVCache | None = None,
        layer: int | Int32[Array, ""] = 0,
        train: str | None = None,
    ) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
        """h after the layer, the longer cache, the router's losses.

        `real` is false at padding; `layer` is its index in the cache;
        `train` names the way that experts take to have a gradient.
        """
        h, cache = self.attend(h, positions, cache, layer)
        x = self.norm(h, "rms_norm_2")
        part = self.spec.feed_forward.build()
        y, losses = part(x, real, self.dtype, train)
        return self.add(h, y, "rms_norm_3"), cache, losses

    @hk.transparent
    def attend(
        self,
        h: Float32[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache | None,
        layer: int | Int32[Array, ""],
    ) -> tuple[Float32[Array, "B T D"], KVCache | None]:
        """h after attention, and the longer cache."""
        x = self.norm(h, "rms_norm")
        attention = self.spec.attention.build()
        y, cache = attention(x, positions, cache, layer)
        return self.add(h, y, "rms_norm_1"), cache

    @hk.transparent
    def norm(
        self, h: Float32[Array, "B T D"], name: str
    ) -> Float32[Array, "B T D"]:
        return RMSNorm(self.spec.norm_eps, name)(h)

    @hk.transparent
    def add(
        self, h: Float32[Array, "B T D"], y: Float32[Array, "B T D"],
        name: str,
    ) -> Float32[Array, "B T D"]:
        """h plus what a part says, normed in the models that do."""
        return h + (self.norm(y, name) if self.spec.post_norm else y)


# %% book/chapters/07b_layer.md, cell 20
class InOutEmbed(hk.Module):
    """A table with a row of D numbers for each of V tokens."""

    def __init__(
        self, vocab_size: int, d_model: int, name: str = "in_out_embed"
    ) -> None:
        super().__init__(name=name)
        self.shape = vocab_size, d_model

    def __call__(self) -> Any:
        init = hk.initializers.RandomNormal(self.shape[1] ** -0.5)
        axes = "vocab", "table"
        return get_parameter(
            "embeddings", self.shape, axes, init, float32=True
        )


# %% book/chapters/07b_layer.md, cell 21
def embed(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"],
    config: ModelConfig,
) -> Float32[Array, "B T D"]:
    """Rows of the table times the multiplier, in float32."""
    h = table[tokens].astype(jnp.float32)
    return h * config.embedding_multiplier


# %% book/chapters/07b_layer.md, cell 22
def tied_logits(
    h: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """Every row of `h` times every row of the table, in `h.dtype`."""
    table = table.astype(h.dtype)
    return jnp.dot(h, table.T, preferred_element_type=jnp.float32)


# %% book/chapters/07b_layer.md, cell 23
def tied_logits_tiled(
    h: Float[Array, "N D"], table: Float[Array, "V D"]
) -> Float32[Array, "N V"]:
    """`tied_logits` without a second copy of the table.

    Few rows are multiplied one by one, in float32.
    """
    n, v = h.shape[0], table.shape[0]
    tile = tile_rows(v, 512)
    tiles = table.reshape(v // tile, tile, -1)

    def add_tile(t: Array, y: Array) -> Array:
        words = read_slice(LazySlice(tiles, (t,)))          # [tile, D]
        if n > 8:
            part = tied_logits(h, words)                    # [N, tile]
        else:
            rows = jnp.split(h.astype(jnp.float32), n)
            words = words.astype(jnp.float32)
            part = jnp.concatenate(
                [tied_logits(row, words) for row in rows])
        return jax.lax.dynamic_update_slice(y, part, (0, t * tile))

    y = jnp.zeros((n, v), jnp.float32)
    return jax.lax.fori_loop(0, v // tile, add_tile, y)


# %% book/chapters/07b_layer.md, cell 26
def all_tied_logits(
    h: Float[Array, "N D"], table: Any,
    train: bool = False,
) -> Float32[Array, "N V"]:
    """One of the two, wherever it runs; a weight's own product."""
    if train:
        return tied_logits(h, table)
    if type(table) in PRODUCTS:
        return product(h, table)

    def run(h: Array, table: Array) -> Array:
        y = jax.lax.platform_dependent(
            h, table, cpu=tied_logits_tiled, default=tied_logits
        )
        return here().total(y, "table")

    axes = (None, "table"), ("vocab", "table")
    return here().split(run, axes, (None, None))(h, table)


# %% book/chapters/07b_layer.md, cell 27
Params = Mapping[str, Mapping[str, Any]]    # module -> name -> weight


# %% book/chapters/07b_layer.md, cell 28
def head_table(params: Params, config: ModelConfig) -> Any:
    """The output matrix, [V, D], or a weight [D, V] in its place."""
    module = "in_out_embed" if config.tied else "lm_head"
    return params.get("head", params[module])["embeddings"]


def unembed(
    params: Params,
    h: Float32[Array, "B T D"],
    config: ModelConfig,
    train: bool = False,
) -> Float32[Array, "B T V"]:
    """Logits: the last norm, the output matrix, the multiplier."""
    *lead, d = h.shape
    h = rms_norm(h, params["rms_norm"]["scale"], config.norm_eps)
    h = h.reshape(-1, d)                                    # [N, D]
    h = h.astype(config.dtype) if train else h
    y = all_tied_logits(h, head_table(params, config), train)
    return y.reshape(*lead, -1) * config.output_multiplier


# %% book/chapters/07b_layer.md, cell 30
def outer_parameters(config: ModelConfig) -> None:
    """Ask for the parameters before and after the layers."""
    InOutEmbed(config.vocab_size, config.d_model)()
    config.other_parameters()
    if not config.tied:
        InOutEmbed(config.vocab_size, config.d_model, "lm_head")()
    RMSNorm(config.norm_eps)(jnp.zeros((1, config.d_model)))


# %% book/chapters/07b_layer.md, cell 31
def layer_parameters(place: Place, config: ModelConfig) -> None:
    """Ask for the parameters of a layer: run it on one token."""
    h, at = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), int)
    layer = DecoderLayer(place.spec, config.dtype, place.name)
    layer(h, at, at == 0, train="capacity")


# %% book/chapters/07b_layer.md, cell 32
@functools.cache
def param_specs(
    config: ModelConfig,
) -> dict[str, dict[str, ParamSpec]]:
    """Module -> name -> what each parameter is; layers stacked."""
    specs = record_specs(partial(outer_parameters, config))
    for place in all_places(config):
        asked = record_specs(partial(layer_parameters, place, config))
        for module, leaves in asked.items():
            specs[module] = {
                name: replace(
                    spec, shape=(len(place.layers), *spec.shape),
                    axes=("layers", *spec.axes),
                )
                for name, spec in leaves.items()
            }
    return specs


# %% book/chapters/07b_layer.md, cell 33
def flat_specs(
    config: ModelConfig,
) -> dict[tuple[str, str], ParamSpec]:
    """(module, name) -> what a parameter is."""
    return {
        (module, name): spec
        for module, leaves in param_specs(config).items()
        for name, spec in leaves.items()
    }


# %% book/chapters/07b_layer.md, cell 37
def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 weights, module -> name -> array.

    Those of the layers are stacked [L, ...]; the embedding has rows of
    length about 1. Under `jax.eval_shape` nothing is allocated.
    """
    key, own = jax.random.split(key)
    outer = hk.transform(partial(outer_parameters, config))
    params: dict[str, Any] = dict(outer.init(own))
    for place in all_places(config):
        layer = hk.transform(partial(layer_parameters, place, config))
        key, own = jax.random.split(key)
        keys = jax.random.split(own, len(place.layers))
        params |= jax.lax.map(layer.init, keys)
    return params


# %% book/chapters/08_model.md, cell 4
def place_params(params: Params, place: Place) -> Params:
    """The stacks of a place's layers.

    ValueError unless each holds as many layers as the place has.
    """
    found = {
        module: leaves for module, leaves in params.items()
        if f"{module}/".startswith(f"{place.name}/")
    }
    for module, leaves in found.items():
        for name, w in leaves.items():
            if w.shape[0] != len(place.layers):
                raise ValueError(
                    f"{module}/{name} holds {w.shape[0]} layers, "
                    f"the configuration {len(place.layers)}"
                )
    return found


# %% book/chapters/08_model.md, cell 5
def layer_weights(
    params: Params, place: Place, config: ModelConfig, index: Any
) -> Params:
    """Layer `index` of a place: matrices unread, the rest cut out."""
    specs = param_specs(config)
    return {
        module: {
            name: LazySlice(w, (index,))
            if specs[module][name].matrix else w[index]
            for name, w in leaves.items()
        }
        for module, leaves in place_params(params, place).items()
    }


# %% book/chapters/08_model.md, cell 6
def apply_layer(
    weights: Params,
    place: Place,
    config: ModelConfig,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    cache: KVCache | None = None,
    index: int | Int32[Array, ""] = 0,
    train: str | None = None,
    key: Array | None = None,
) -> tuple[Float32[Array, "B T D"], KVCache | None, Losses]:
    """What a layer with these weights makes of h; see DecoderLayer.

    `key`: what a layer draws at random in training; None: nothing is.
    """
    def run() -> Any:
        layer = DecoderLayer(place.spec, config.dtype, place.name)
        return layer(h, positions, real, cache, index, train)

    return hk.transform(run).apply(weights, key)


# %% book/chapters/08_model.md, cell 9
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The caches of all layers: one for each place, in order."""

    places: tuple[KVCache, ...]

    @property
    def length(self) -> Any:
        """How many tokens each batch row has, int32 [B]."""
        return self.places[0].length

    def with_length(self, length: Int32[Array, " B"]) -> "Cache":
        longer = (replace(c, length=length) for c in self.places)
        return Cache(tuple(longer))

    def reserve(self, new: Int32[Array, "..."]) -> "Cache":
        """With room for `new` more tokens a row."""
        return Cache(tuple(c.reserve(new) for c in self.places))

    def insert(
        self, row: int | Int[Array, ""], other: "Cache"
    ) -> "Cache":
        """Batch row `row` becomes row 0 of `other`."""
        pairs = zip(self.places, other.places, strict=True)
        return Cache(tuple(a.insert(row, b) for a, b in pairs))

    def evict(self, row: int | Int[Array, ""]) -> "Cache":
        """Batch row `row` is empty."""
        return Cache(tuple(c.evict(row) for c in self.places))


# %% book/chapters/08_model.md, cell 10
def constrain_residual(
    h: Float32[Array, "B T D"],
) -> Float32[Array, "B T D"]:
    """The residual stream's layout on a mesh, layer after layer."""
    return here().constrain(h, ("tokens", None, "embed"))


# %% book/chapters/08_model.md, cell 11
def decoder(
    params: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    config: ModelConfig,
    cache: Cache | None = None,
) -> tuple[Float32[Array, "B T D"], Cache | None]:
    """All layers; each pattern is compiled once and scanned."""
    done: list[Any] = []
    h = constrain_residual(h)
    for places in segments(config):
        caches: tuple[Any, ...] = (None,) * len(places)
        if cache is not None:
            first = len(done)
            caches = cache.places[first : first + len(places)]

        def body(carry: Any, index: Array, places: Any = places) -> Any:
            h, caches = carry
            after = []
            for place, kept in zip(places, caches):
                w = layer_weights(params, place, config, index)
                h, kept, _ = apply_layer(
                    w, place, config, h, positions, real, kept, index
                )
                h = constrain_residual(h)
                after.append(kept)
            return (h, tuple(after)), None

        repeats = jnp.arange(len(places[0].layers))
        (h, caches), _ = jax.lax.scan(body, (h, caches), repeats)
        h = constrain_residual(h)       # or XLA may choose another
        done += caches
    return h, None if cache is None else Cache(tuple(done))


# %% book/chapters/08_model.md, cell 16
def positions_of(
    start: Int32[Array, " B"], t: int, lengths: Any = None
) -> tuple[Int32[Array, "B {t}"], Bool[Array, "B {t}"]]:
    """Positions from `start` on, and which tokens are real.

    Past a row's `lengths` is padding, which stands at PAD_POSITION.
    """
    positions = start[:, None] + jnp.arange(t)              # [B, T]
    real = jnp.ones(positions.shape, bool)
    if lengths is not None:
        real = jnp.arange(t) < jnp.asarray(lengths)[:, None]
        positions = jnp.where(real, positions, PAD_POSITION)
    return positions, real


# %% book/chapters/08_model.md, cell 17
def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    cache: Cache | None = None,
    lengths: Int[Array, " B"] | None = None,
    inputs: Any = None,
) -> tuple[Float32[Array, "B T D"], Cache | None]:
    """Tokens through embedding and layers: h, and the longer cache.

    With a cache, row b's tokens follow the `cache.length[b]` that it
    has; those past `lengths[b]` are padding, which no cache keeps.
    `inputs`: what else a prompt holds, for models that take it.
    """
    b, t = tokens.shape
    start = jnp.zeros(b, jnp.int32) if cache is None else cache.length
    positions, real = positions_of(start, t, lengths)
    new = jnp.asarray(t if lengths is None else lengths, jnp.int32)
    cache = None if cache is None else cache.reserve(new)
    h = embed(params["in_out_embed"]["embeddings"], tokens, config)
    h = h if inputs is None else config.merge(h, inputs)
    h, cache = decoder(params, h, positions, real, config, cache)
    if cache is not None:
        cache = cache.with_length(start + new)
    return h, cache


# %% book/chapters/08_model.md, cell 18
@partial(jax.jit, static_argnames="config")
def all_logits(
    params: Params, tokens: Int[Array, "B T"], config: ModelConfig,
    lengths: Int[Array, " B"] | None = None, inputs: Any = None,
) -> Float32[Array, "B T V"]:
    """The logits at every token, without a cache."""
    h, _ = forward(params, tokens, config, None, lengths, inputs)
    return unembed(params, h, config)


# %% book/chapters/08_model.md, cell 29
def constrain_cache(cache: Cache) -> Cache:
    """Keep the cache's layout on a mesh from step to step."""
    def held(part: KVCache) -> KVCache:
        return jax.tree.map(here().constrain, part, part.axes)

    return Cache(tuple(map(held, cache.places)))


@partial(
    jax.jit, static_argnames=("config", "batch", "slots", "kv_cache")
)
def init_cache(
    config: ModelConfig, batch: int, slots: int,
    kv_cache: str | CacheKind = "float",
) -> Cache:
    """An empty cache in `config.dtype` for `slots` tokens a row.

    `kv_cache`: how they are kept, one of `CACHE_KINDS`, or its name.
    """
    kind = cache_kind(kv_cache)
    return constrain_cache(Cache(tuple(
        kind.keep(place.spec.attention.empty_cache(
            len(place.layers), batch, slots, config.dtype
        ))
        for place in all_places(config)
    )))


# %% book/chapters/08_model.md, cell 30
def check_room(cache: Cache, tokens: int) -> None:
    """ValueError where a cache has fewer slots than `tokens`."""
    for part in cache.places:
        if part.room is not None and tokens > part.room:
            raise ValueError(f"{tokens} tokens, {part.room} slots")


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    config: ModelConfig,
    inputs: Any = None,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Read prompts, padded on the right: each row's last logits.

    0 <= lengths <= T; a row of length 0 is left as it is, its logits
    mean nothing. The cache that is handed in is gone afterwards. Rows
    must have slots for their tokens; ValueError where T is more than
    there are.
    """
    check_room(cache, tokens.shape[1])
    h, grown = forward(params, tokens, config, cache, lengths, inputs)
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    last = jnp.take_along_axis(h, at, axis=1)
    assert grown is not None
    return unembed(params, last, config)[:, 0], constrain_cache(grown)


# %% book/chapters/08_model.md, cell 31
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(
    params: Params,
    tokens: Int[Array, " B"],
    cache: Cache,
    config: ModelConfig,
    active: Bool[Array, " B"] | None = None,
) -> tuple[Float32[Array, "B V"], Cache]:
    """One more token a row: its logits, and the longer cache.

    Rows that are not `active` stay as they are. A row whose slots are
    all taken attends without the new token; the caller must not let it
    come to that. The old cache is gone.
    """
    lengths = None if active is None else active.astype(jnp.int32)
    h, grown = forward(params, tokens[:, None], config, cache, lengths)
    assert grown is not None
    return unembed(params, h, config)[:, 0], constrain_cache(grown)


# %% book/chapters/20b_flash.md, cell 30
def decoder_to_train(
    params: Params,
    h: Float32[Array, "B T D"],
    positions: Int32[Array, "B T"],
    real: Bool[Array, "B T"],
    config: ModelConfig,
    dispatch: str = "blocks",
    remat: bool = False,
    key: Array | None = None,
) -> tuple[Float32[Array, "B T D"], Losses]:
    """All layers with a gradient; options as in forward_to_train.

    With `remat`, the gradient computes each layer again instead of
    keeping what was computed in it. Losses are means over the layers
    that have them. Each layer gets a key of its own from `key`.
    """
    found: dict[str, list[Array]] = {}
    for places in segments(config):
        keys = None
        if key is not None:
            key, own = jax.random.split(key)
            layers = len(places[0].layers), len(places)
            keys = jax.random.split(own, layers)

        def body(h: Array, inputs: Any, places: Any = places) -> Any:
            losses = []
            stacks, keys = inputs
            for i, (place, own) in enumerate(zip(places, stacks)):
                h, _, loss = apply_layer(
                    own, place, config, h, positions, real,
                    train=dispatch,
                    key=None if keys is None else keys[i],
                )
                losses.append(loss)
            return h, losses

        stacks = [place_params(params, place) for place in places]
        if remat:
            body = jax.checkpoint(body, prevent_cse=False)
        h, losses = jax.lax.scan(body, h, (stacks, keys))
        for loss in losses:
            for name, values in loss.items():           # [repeats]
                found.setdefault(name, []).append(values)
    means = {n: jnp.concatenate(v).mean() for n, v in found.items()}
    return h, means


# %% book/chapters/20b_flash.md, cell 31
def forward_to_train(
    params: Params,
    tokens: Int[Array, "B T"],
    config: ModelConfig,
    lengths: Int[Array, " B"] | None = None,
    dispatch: str = "blocks",
    key: Array | None = None,
) -> tuple[Float32[Array, "B T V"], Losses]:
    """Logits, with a gradient, and the losses of the routers.

    `dispatch`: how tokens come to experts. "blocks", "ragged" and
    "tokamax" drop none; "capacity" drops what finds no seat. `key` is
    for what a layer draws at random; None: nothing is. ValueError for
    another name.
    """
    known = "capacity", *DROPLESS
    if dispatch not in known:
        raise ValueError(
            f"dispatch is {dispatch!r}: it must be one of "
            f"{', '.join(known)}"
        )
    b, t = tokens.shape
    start = jnp.zeros(b, jnp.int32)
    positions, real = positions_of(start, t, lengths)
    h = embed(params["in_out_embed"]["embeddings"], tokens, config)
    h, losses = decoder_to_train(
        params, h, positions, real, config, dispatch, key=key
    )
    return unembed(params, h, config, train=True), losses


# %% book/chapters/22_balance.md, cell 32
Reports = dict[tuple[str, str], Any]        # module, name -> news


def split_reports(
    grads: Params, config: ModelConfig
) -> tuple[Params, Reports]:
    """A gradient with zeros for what is no gradient, and the reports.

    What an optimizer gets, and what `update_routers` does.
    """
    own = {path for path, spec in flat_specs(config).items()
           if spec.update}
    plain = {
        module: {name: jnp.zeros_like(g) if (module, name) in own else g
                 for name, g in leaves.items()}
        for module, leaves in grads.items()
    }
    return plain, {(m, name): grads[m][name] for m, name in own}


# %% book/chapters/22_balance.md, cell 33
def update_routers(
    params: Params, reports: Reports, config: ModelConfig,
    rate: float = 1e-3,
) -> Params:
    """The parameters that no optimizer moves, each by its own rule.

    `rate`: how far a bias goes in a step, DeepSeek-V3's by default.
    Of a batch in parts, give the mean of the parts' reports.
    """
    new = {module: dict(leaves) for module, leaves in params.items()}
    for (module, name), news in reports.items():
        rule = UPDATES[flat_specs(config)[module, name].update or ""]
        new[module][name] = rule(params[module][name], news, rate)
    return new


# %% book/chapters/29b_pages.md, cell 19
def share_prefix(cache: Cache, row: int, source: int, n: int) -> Cache:
    """Row `row` becomes the first `n` tokens of row `source`.

    As each place's cache can: on the same pages, or as a copy.
    ValueError if there are fewer, or no such row.
    """
    return Cache(tuple(
        share(part, row, source, n) for part in cache.places
    ))
