# Generated from book/chapters/08_model.md by `make sync`; edit the chapter.
"""Sixty-four layers and a sampler.
"""

# %% book/chapters/08_model.md, cell 1
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from annotated_moe import quantization, sharding
from annotated_moe.attention import KVCache, Linear, MultiHeadAttention
from annotated_moe.moe import MoE, Router, load_balancing_loss, router_z_loss
from annotated_moe.quantization import QuantizedTensor, Row
from annotated_moe.rms_norm import RMSNorm
from annotated_moe.tokenizer import Tokenizer


# %% book/chapters/08_model.md, cell 2
@dataclass(frozen=True)
class ModelConfig:
    """Every number that makes a family member; the defaults are Grok-1."""

    vocab_size: int = 131072
    context: int = 8192
    d_model: int = 6144
    d_ff: int = 32768
    num_layers: int = 64
    q_heads: int = 48
    kv_heads: int = 8
    head_size: int = 128
    num_experts: int = 8
    top_k: int = 2
    embedding_multiplier: float = 78.38367176906169
    output_multiplier: float = 0.5773502691896257
    attn_multiplier: float = 0.08838834764831845
    attn_softcap: float | None = 30.0
    rope_base: float = 10000.0
    pad_id: int = 0
    eos_id: int = 2
    dtype: str = "bfloat16"


# %% book/chapters/08_model.md, cell 3
class DecoderLayer(hk.Module):
    def __init__(self, config, name="decoder_layer"):
        super().__init__(name=name)
        self.config = config

    def __call__(self, h, positions, cache=None, layer=0, train=False):
        c = self.config
        attention = MultiHeadAttention(c.q_heads, c.kv_heads, c.head_size, c.attn_multiplier, c.attn_softcap, c.rope_base)
        y, cache = attention(RMSNorm(name="rms_norm")(h).astype(c.dtype), positions, cache, layer)
        h = h + RMSNorm(name="rms_norm_1")(y)
        y, aux = self.feed_forward(RMSNorm(name="rms_norm_2")(h), train)
        h = h + RMSNorm(name="rms_norm_3")(y)
        return h, cache, aux

    @hk.transparent
    def feed_forward(self, x, train):
        c = self.config
        if c.num_experts == 1:
            up, down = ("data", "model"), ("model", "data")
            x = x.astype(c.dtype)
            gate = jax.nn.gelu(Linear(c.d_ff, up, "linear")(x), approximate=True)
            hidden = (gate * Linear(c.d_ff, up, "linear_v")(x)).astype(c.dtype)
            return Linear(c.d_model, down, "linear_1")(hidden), {}
        flat = x.reshape(-1, c.d_model)
        routed = Router(c.num_experts, c.top_k)(flat)
        y = MoE(c.num_experts, c.d_ff)(flat.astype(c.dtype), routed, train)
        aux = {"balance": load_balancing_loss(routed.probs, routed.experts), "z": router_z_loss(routed.logits)}
        return y.reshape(x.shape), aux


# %% book/chapters/08_model.md, cell 4
def layer_function(config):
    return hk.without_apply_rng(hk.transform(lambda *a, **k: DecoderLayer(config)(*a, **k)))


# %% book/chapters/08_model.md, cell 5
def norm_function():
    return hk.without_apply_rng(hk.transform(lambda h: RMSNorm()(h)))


# %% book/chapters/08_model.md, cell 6
def init_params(key, config):
    h = jnp.zeros((1, 1, config.d_model))
    pos = jnp.zeros((1, 1), jnp.int32)
    k0, k1 = jax.random.split(key)
    keys = jax.random.split(k1, config.num_layers)
    layers = jax.vmap(lambda k: layer_function(config).init(k, h, pos, train=True))(keys)
    table = jax.random.normal(k0, (config.vocab_size, config.d_model)) / config.d_model**0.5
    return {"in_out_embed": {"embeddings": table}, **layers, **norm_function().init(k0, h)}


# %% book/chapters/08_model.md, cell 7
def split_params(params):
    return hk.data_structures.partition(lambda module, name, w: module.startswith("decoder_layer"), params)


# %% book/chapters/08_model.md, cell 8
def pick(module, name, stack, layer):
    if name == "w" and "router" not in module:
        return Row(stack, layer)
    return stack[layer]


# %% book/chapters/08_model.md, cell 9
def decoder(params, h, positions, config, cache=None, train=False):
    layers, _ = split_params(params)
    apply = layer_function(config).apply

    def train_body(h, weights):
        h, _, aux = apply(weights, h, positions, train=True)
        return h, aux

    def body(carry, layer):
        h, cache = carry
        weights = {m: {n: pick(m, n, w, layer) for n, w in leaves.items()} for m, leaves in layers.items()}
        h, cache, aux = apply(weights, h, positions, cache, layer)
        return (h, cache), aux

    if train:
        h, aux = jax.lax.scan(train_body, h, layers)
    else:
        (h, cache), aux = jax.lax.scan(body, (h, cache), jnp.arange(config.num_layers))
    return h, cache, jax.tree.map(jnp.mean, aux)


# %% book/chapters/08_model.md, cell 10
def embed(params, tokens, config):
    dtype = config.dtype
    h = params["in_out_embed"]["embeddings"][tokens].astype(dtype)
    return (h * jnp.asarray(config.embedding_multiplier, dtype)).astype(jnp.float32)


# %% book/chapters/08_model.md, cell 11
def tied_logits(h, table):
    """h [N, D] times the embedding table [V, D]: float32 [N, V]."""
    return jnp.dot(h, table.astype(h.dtype).T, preferred_element_type=jnp.float32)


# %% book/chapters/08_model.md, cell 12
def tied_logits_tiled(h, table):
    """The same, a tile of the table at a time."""
    n, v = h.shape[0], table.shape[0]
    tile = quantization.tile_rows(v, 512)
    dtype = jnp.float32 if n == 1 else h.dtype

    def body(t, y):
        rows = jax.lax.dynamic_slice_in_dim(table, t * tile, tile).astype(dtype)
        part = jnp.dot(h.astype(dtype), rows.T, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice(y, part, (0, t * tile))

    return jax.lax.fori_loop(0, v // tile, body, jnp.zeros((n, v), jnp.float32))


# %% book/chapters/08_model.md, cell 13
def tied_logits_on_mesh(h, table, train=False):
    if train:
        return tied_logits(h, table)
    product = partial(jax.lax.platform_dependent, cpu=tied_logits_tiled, default=tied_logits)
    mesh = sharding.current_mesh()
    axis = mesh and sharding.fit(("data", "model"), table.shape[1], mesh)
    if not axis:
        return product(h, table)
    return jax.shard_map(
        lambda h, table: jax.lax.psum(product(h, table), axis),
        in_specs=(P(None, axis), P(None, axis)), out_specs=P(), check_vma=False,
    )(h, table)


# %% book/chapters/08_model.md, cell 14
def unembed(params, h, config, train=False):
    """h [B, T, D] -> float32 logits [B, T, V]: norm, tied table, multiplier."""
    *lead, d = h.shape
    h = norm_function().apply({"rms_norm": params["rms_norm"]}, h)
    table = params["in_out_embed"]["embeddings"]
    y = tied_logits_on_mesh(h.reshape(-1, d).astype(config.dtype), table, train)
    scale = jnp.asarray(config.output_multiplier, config.dtype)
    return y.reshape(*lead, -1) * scale.astype(jnp.float32)


# %% book/chapters/08_model.md, cell 15
def forward(params, tokens, config, cache=None, train=False):
    """tokens [B, T] -> h [B, T, D], cache, auxiliary losses."""
    rows, t = tokens.shape
    start = jnp.zeros(rows, jnp.int32) if cache is None else cache.length
    positions = start[:, None] + jnp.arange(t)
    h = embed(params, tokens, config)
    return decoder(params, h, positions, config, cache, train)


# %% book/chapters/08_model.md, cell 16
@partial(jax.jit, static_argnames="config")
def all_logits(params, tokens, config):
    h, _, _ = forward(params, tokens, config)
    return unembed(params, h, config)


# %% book/chapters/08_model.md, cell 17
def cache_spec(shape, mesh):
    return sharding.fit_spec(P(None, "data", None, "model", None), shape, mesh)


# %% book/chapters/08_model.md, cell 18
def pin(cache):
    """Keep the cache's layout on the mesh the same from step to step."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return cache
    spec = cache_spec(cache.k.shape, mesh)
    k, v = (jax.lax.with_sharding_constraint(x, spec) for x in (cache.k, cache.v))
    return KVCache(k, v, jax.lax.with_sharding_constraint(cache.length, P()))


# %% book/chapters/08_model.md, cell 19
@partial(jax.jit, static_argnames=("config", "batch", "slots"))
def init_cache(config, batch, slots):
    shape = (config.num_layers, batch, slots, config.kv_heads, config.head_size)
    zeros = jnp.zeros(shape, config.dtype)
    return pin(KVCache(zeros, zeros, jnp.zeros(batch, jnp.int32)))


# %% book/chapters/08_model.md, cell 20
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(params, tokens, lengths, cache, config):
    """Right-padded tokens [B, T] -> logits of each row's last token [B, V], cache."""
    h, cache, _ = forward(params, tokens, config, cache)
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    logits = unembed(params, last, config)[:, 0]
    return logits, pin(KVCache(cache.k, cache.v, lengths))


# %% book/chapters/08_model.md, cell 21
@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(params, tokens, cache, config):
    """One new token a row [B] -> logits [B, V], cache."""
    h, cache, _ = forward(params, tokens[:, None], config, cache)
    logits = unembed(params, h, config)[:, 0]
    return logits, pin(KVCache(cache.k, cache.v, cache.length + 1))


# %% book/chapters/08_model.md, cell 22
def keep_top_k(logits, k):
    """Logits [B, V] with all but each row's k largest at -inf; k [B], 0 keeps all."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(k > 0, k, logits.shape[-1])
    least = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


# %% book/chapters/08_model.md, cell 23
def keep_nucleus(logits, p):
    """The fewest largest logits whose probability reaches p [B]."""
    ranked = jnp.sort(logits, axis=-1)
    tail = jnp.cumsum(jax.nn.softmax(ranked), axis=-1)
    least = jnp.argmax(tail >= 1 - p[:, None], axis=-1)
    least = jnp.take_along_axis(ranked, least[:, None], axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


# %% book/chapters/08_model.md, cell 24
def choose(logits, noise, temperature, top_k, top_p):
    """The Gumbel trick: argmax of filtered logits plus noise [B, V] -> int32 [B]."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
    kept = keep_nucleus(keep_top_k(scaled, top_k), top_p)
    drawn = jnp.argmax(kept + noise, axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))


# %% book/chapters/08_model.md, cell 25
class Sampling(NamedTuple):
    seed: Any                                               # uint32 [B]
    temperature: Any                                        # float32 [B]
    top_k: Any                                              # int32 [B]
    top_p: Any                                              # float32 [B]


# %% book/chapters/08_model.md, cell 26
@jax.jit
def sample(logits, step, how):
    """Token `step` of every row, each from its own seed."""
    def noise(seed):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits.shape[-1:])

    return choose(logits, jax.vmap(noise)(how.seed), how.temperature, how.top_k, how.top_p)


# %% book/chapters/08_model.md, cell 27
@jax.jit
def greedy(logits, step, how):
    return jnp.argmax(logits, axis=-1)


# %% book/chapters/08_model.md, cell 28
def bucket(size, most):
    """The power of two, at least 16 and at most `most`, that holds `size`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


# %% book/chapters/08_model.md, cell 29
def pad_rows(rows, width):
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


# %% book/chapters/08_model.md, cell 30
@dataclass(frozen=True)
class Model:
    """A configuration, its weights, and how to run them."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    mesh: Any = None

    def on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def logits(self, tokens, lengths=None):
        """int32[B, T] -> float32[B, T, V]; at and past a row's length they mean nothing."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be a [B, T] array, got shape {tokens.shape}")
        t = tokens.shape[1]
        lengths = np.full(len(tokens), t) if lengths is None else np.asarray(lengths)
        if lengths.shape != (len(tokens),) or lengths.min() < 1 or lengths.max() > t:
            raise ValueError(f"lengths must be {len(tokens)} numbers from 1 to {t}, got {lengths.tolist()}")
        rows = [row[:n] for row, n in zip(tokens.tolist(), lengths)]
        self.check(rows, 1)
        padded = pad_rows(rows, bucket(t, self.config.context))
        with self.on_mesh():
            return all_logits(self.params, padded, self.config)[:, :t]

    def check(self, prompts, max_new_tokens):
        c = self.config
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: give it at least one token")
            wrong = [t for t in prompt if not 0 <= t < c.vocab_size]
            if wrong:
                raise ValueError(f"prompt {i} holds token {wrong[0]}; ids run from 0 to {c.vocab_size - 1}")
            if len(prompt) + max_new_tokens - 1 > c.context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and asks for {max_new_tokens} more; "
                    f"the context holds {c.context}: shorten the prompt or lower max_new_tokens"
                )

    def stream_ids(self, prompts, max_new_tokens=32, temperature=0.0, top_p=1.0, top_k=None, seed=0) -> Iterator[list[int]]:
        """The next token of every row, step by step."""
        rows = len(prompts)
        self.check(prompts, max_new_tokens)
        how = sampling(rows, temperature, top_p, top_k, seed)
        pick = sample if (how.temperature > 0).any() else greedy
        longest = max(map(len, prompts))
        slots = bucket(longest + max_new_tokens - 1, self.config.context)
        padded = pad_rows(prompts, bucket(longest, self.config.context))
        lengths = np.array([len(p) for p in prompts], np.int32)
        with self.on_mesh():
            cache = init_cache(self.config, rows, slots)
            logits, cache = prefill(self.params, padded, lengths, cache, self.config)
            for step in range(max_new_tokens):
                tokens = pick(logits, step, how)
                yield np.asarray(tokens).tolist()
                if step + 1 < max_new_tokens:
                    logits, cache = decode_step(self.params, tokens, cache, self.config)

    def generate_ids(self, prompts, max_new_tokens=32, temperature=0.0, top_p=1.0, top_k=None, seed=0, stop_ids=()):
        """New tokens of every row; a stop id ends its row and is left out."""
        new: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        if not going or max_new_tokens == 0:
            return new
        for tokens in self.stream_ids(prompts, max_new_tokens, temperature, top_p, top_k, seed):
            going -= {i for i in going if tokens[i] in stop_ids}
            for i in going:
                new[i].append(tokens[i])
            if not going:
                break
        return new

    def generate(self, prompts, **options):
        ids = [self.text_ids(p) for p in prompts]
        options.setdefault("stop_ids", (self.config.eos_id,))
        return [self.tokenizer.decode(row) for row in self.generate_ids(ids, **options)]

    def text_ids(self, prompt):
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.model: use generate_ids")
        return self.tokenizer.encode(prompt)

    def stream(self, prompt, stop_ids=None, **options) -> Iterator[str]:
        """Text as the tokens come."""
        stop = (self.config.eos_id,) if stop_ids is None else stop_ids
        text = self.tokenizer.stream()
        for (token,) in self.stream_ids([self.text_ids(prompt)], **options):
            if token in stop:
                break
            yield text.push(token)
        yield text.flush()


# %% book/chapters/08_model.md, cell 31
def sampling(rows, temperature, top_p, top_k, seed):
    """One setting a row from numbers or sequences; a single seed counts up over rows."""
    seeds = np.arange(rows) + seed if np.ndim(seed) == 0 else np.asarray(seed)
    every = np.ones(rows)
    return Sampling(
        seeds.astype(np.uint32),
        np.asarray(temperature * every, np.float32),
        np.asarray((top_k or 0) * every, np.int32),
        np.asarray(top_p * every, np.float32),
    )


# %% book/chapters/08_model.md, cell 32
PRESETS = {"grok-1": ModelConfig()}
