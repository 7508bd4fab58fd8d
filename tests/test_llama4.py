"""Llama 4 against its published formulas, written out in float64."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.attention import (
    Causal,
    Chunk,
    UnitAttentionSpec,
    attend,
    attend_blockwise,
    is_past,
    scale_queries_by_position,
)
from annotated_moe.cache import RingCache
from annotated_moe.config import LayerSpec, ModelConfig, as_segments
from annotated_moe.convert import architecture_of
from annotated_moe.families.llama4 import LLAMA_4S, llama4_layers
from annotated_moe.families.vision import VisionSpec, seeing
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.hub import FAMILIES, Fields
from annotated_moe.model import (
    all_logits,
    decode_step,
    forward_to_train,
    init_cache,
    param_specs,
    prefill,
)
from annotated_moe.moe import (
    FeedForwardSpec,
    SharedMoESpec,
    route_sigmoid,
)
from annotated_moe.parallel import partition_specs, shardings
from annotated_moe.plan import parameter_counts
from annotated_moe.rope import Llama3Rope, Rope

CHUNK, FLOOR, SCALE, BASE, SCALING = 6, 4, 0.3, 100.0, (4.0, 1.0, 2.0, 16)
HEADS, KEYS, SIZE, EXPERTS = 4, 2, 8, 3
ATTENTION = UnitAttentionSpec(
    HEADS, KEYS, SIZE, SIZE**-0.5, rope=Llama3Rope(BASE, *SCALING),
    qk_norm_eps=1e-3, floor=FLOOR, scale=SCALE,
)
MOE = SharedMoESpec(
    EXPERTS, 1, 12, "silu", "sigmoid", shared=FeedForwardSpec(10, "silu"),
    gate_input=True,
)
LAYERS = llama4_layers(                     # near and dense, far and sparse
    2, ATTENTION, CHUNK, FeedForwardSpec(20, "silu"), MOE, bare={1}, sparse={1},
)
TINY = ModelConfig(32, 64, 16, as_segments(LAYERS * 2), dtype="float32")
TOKENS = np.random.default_rng(0).integers(2, 32, (4, 24))
LENGTHS = np.array([4, 9, 15, 1])


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def random_params(config):
    rng = np.random.default_rng(1)

    def draw(spec):
        if len(spec.shape) == 1 or spec.axes == ("layers", None):
            return jnp.asarray(rng.uniform(0.5, 1.5, spec.shape), jnp.float32)
        w = rng.standard_normal(spec.shape) * 1.5 / spec.shape[-2] ** 0.5
        return jnp.asarray(w, jnp.float32)

    return {
        module: {name: draw(spec) for name, spec in leaves.items()}
        for module, leaves in param_specs(config).items()
    }


# The published formulas


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def published_rope(x):
    """Complex turns of the pairs (i, i + H/2), slowed as in Llama 3.1."""
    factor, low, high, context = SCALING
    rates = BASE ** -(np.arange(0, SIZE, 2) / SIZE)
    turns = context * rates / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    rates = keep * rates + (1 - keep) * rates / factor
    a, b = np.split(x, 2, axis=-1)
    z = (a + 1j * b) * np.exp(1j * np.outer(np.arange(len(x)), rates))[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def published_attention(x, w, bare):
    """Of one text [T, D], token by token; every fact is said once more here."""
    q, k, v = (
        (x @ w[name]).reshape(len(x), -1, SIZE) for name in ("query", "key", "value")
    )
    if bare:
        place = np.arange(len(x))
        grown = 1 + SCALE * np.log(1 + np.floor((place + 1) / FLOOR))
        q = q * grown[:, None, None]
    else:
        q, k = (rms(published_rope(z), 1e-3) for z in (q, k))
    y = np.zeros((len(x), HEADS, SIZE))
    for t in range(len(x)):
        start = 0 if bare else t // CHUNK * CHUNK
        for head in range(HEADS):
            own = head // (HEADS // KEYS)
            s = k[start : t + 1, own] @ q[t, head] / SIZE**0.5
            p = np.exp(s - s.max())
            y[t, head] = p / p.sum() @ v[start : t + 1, own]
    return y.reshape(len(x), -1) @ w["linear"]


def published_glu(x, gate, up, down):
    return (x @ gate * sigmoid(x @ gate) * (x @ up)) @ down


def published_experts(x, w):
    """One expert hears what its own logit lets through; another hears all."""
    y = published_glu(x, *w["shared"])
    logits = x @ w["router"]
    for n, e in enumerate(logits.argmax(1)):
        heard = x[n] * sigmoid(logits[n, e])
        y[n] += published_glu(heard, *(stack[e] for stack in w["moe"]))
    return y


def published_logits(tokens, params):
    """Of one text, in float64, from our parameters."""

    def take(path, i=...):
        module, name = path.rsplit("/", 1)
        return np.float64(params[module][name])[i]

    h = take("in_out_embed/embeddings")[tokens]
    for i in range(TINY.num_layers):
        place, at = i % 2, i // 2
        lead = f"decoder_layer_{place}/" if place else "decoder_layer/"

        def glu(path, lead=lead, at=at):
            names = "linear", "linear_v", "linear_1"
            return [take(f"{lead}{path}{name}/w", at) for name in names]

        names = "query", "key", "value", "linear"
        w = {name: take(f"{lead}multi_head_attention/{name}/w", at) for name in names}
        x = rms(h, 1e-5) * take(f"{lead}rms_norm/scale", at)
        h = h + published_attention(x, w, bare=place == 1)
        x = rms(h, 1e-5) * take(f"{lead}rms_norm_2/scale", at)
        if place == 1:
            h = h + published_experts(x, {
                "router": take(f"{lead}router/w", at),
                "moe": glu("moe/"), "shared": glu("shared/"),
            })
        else:
            h = h + published_glu(x, *glu(""))
    x = rms(h, 1e-5) * take("rms_norm/scale")
    return x @ take("lm_head/embeddings").T


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def published(params):
    return np.stack([published_logits(row, params) for row in TOKENS])


def test_matches_the_published_model(params, published):
    logits = all_logits(params, TOKENS, TINY)
    assert published.std() > 1
    np.testing.assert_allclose(logits, published, atol=2e-4)


def test_training_computes_the_same(params, published):
    """By seats, with the gate on the input; here everyone finds one."""
    roomy = replace(MOE, capacity_factor=9.0)
    config = changed(lambda layer: (
        replace(layer, feed_forward=roomy) if layer.feed_forward == MOE else layer
    ))
    logits, losses = forward_to_train(params, jnp.asarray(TOKENS), config)
    np.testing.assert_allclose(logits, published, atol=2e-4)
    assert set(losses) == {"balance", "z"}


def changed(change):
    """TINY with `change` made to each layer."""
    layers = [change(layer) for layer in LAYERS] * 2
    return replace(TINY, layers=as_segments(layers))


def attends(**fields):
    """Other attention, in the layers where it is there to be changed."""

    def change(layer):
        near = layer.attention.rope is not None
        own = {k: v for k, v in fields.items() if near or k in ("floor", "scale")}
        return replace(layer, attention=replace(layer.attention, **own))

    return changed(change)


def thinks(**fields):
    def change(layer):
        part = layer.feed_forward
        part = replace(part, **fields) if isinstance(part, SharedMoESpec) else part
        return replace(layer, feed_forward=part)

    return changed(change)


VARIANTS = {
    "chunk": attends(mask=Chunk(CHUNK + 1)),
    "rope": attends(rope=Rope(BASE)),
    "norm": attends(qk_norm_eps=None),
    "norm's eps": attends(qk_norm_eps=1e-5),
    "growing queries": attends(floor=None),
    "their scale": attends(scale=0.1),
    "router": thinks(router="softmax_top_k"),
    "gate": thinks(gate_input=False),
    "activation": thinks(activation="gelu"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_matters(params, published, name):
    logits = all_logits(params, TOKENS, VARIANTS[name])
    assert np.abs(logits - published).max() > 0.02


# The cache


def check_cached(params, published):
    """Prompts shorter and longer than a chunk, then 9 steps."""
    rows = np.arange(len(LENGTHS))
    prompt = np.where(np.arange(16) < LENGTHS[:, None], TOKENS[:, :16], 0)
    cache = init_cache(TINY, len(rows), 24)
    logits, cache = prefill(params, prompt, LENGTHS, cache, TINY)
    for step in range(9):
        want = published[rows, LENGTHS - 1 + step]
        np.testing.assert_allclose(logits, want, atol=2e-4)
        column = TOKENS[rows, LENGTHS + step]
        logits, cache = decode_step(params, column, cache, TINY)


def test_rows_cross_borders_in_the_cache_each_at_its_own_time(params, published):
    check_cached(params, published)


def test_a_second_prompt_continues_the_first(params, published):
    cache, eight = init_cache(TINY, 4, 24), np.full(4, 8)
    _, cache = prefill(params, TOKENS[:, :8], eight, cache, TINY)
    logits, _ = prefill(params, TOKENS[:, 8:16], eight, cache, TINY)
    np.testing.assert_allclose(logits, published[:, 15], atol=2e-4)


def test_a_row_that_moves_in_keeps_its_chunks(params, published):
    """Rings and full caches take in a row, and go on at its own border."""
    one = init_cache(TINY, 1, 24)
    _, one = prefill(params, TOKENS[2:3, :11], np.array([11]), one, TINY)
    cache = init_cache(TINY, 2, 24)
    first = TOKENS[:2, :9]
    _, cache = prefill(params, first, np.array([9, 4]), cache, TINY)
    cache = cache.evict(1).insert(1, one)
    for t in range(3):
        column = np.array([TOKENS[0, 9 + t], TOKENS[2, 11 + t]])
        logits, cache = decode_step(params, column, cache, TINY)
        want = published[[0, 2], [9 + t, 11 + t]]
        np.testing.assert_allclose(logits, want, atol=2e-4)


def test_only_layers_without_rope_keep_all():
    places = init_cache(TINY, 2, 24).places
    assert [type(kept) is RingCache for kept in places] == [True, False]
    assert [kept.slots for kept in places] == [CHUNK, 24]


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)])
def test_on_a_mesh(params, published, shape):
    mesh = am.make_mesh(*shape)
    specs = partition_specs(params, param_specs(TINY), mesh)
    placed = jax.device_put(params, shardings(specs, mesh))
    with jax.set_mesh(mesh):
        check_cached(placed, published)


# Its parts


@pytest.mark.parametrize("size", [1, 4, 7, 40])
def test_a_chunk_is_a_block_of_the_causal_mask(size):
    at = jnp.arange(30)[None]
    sees = Chunk(size).sees(at[..., None], at[:, None])[0]
    blocks = np.kron(np.eye(30, dtype=bool), np.ones((size, size), bool))[:30, :30]
    np.testing.assert_array_equal(sees, blocks & np.tri(30, dtype=bool))


def test_many_keys_in_blocks_keep_the_chunks(monkeypatch, params, published):
    """The running softmax over blocks, and all scores at once."""
    asked = []

    def blocks(*inputs):
        asked.append(inputs[-1].__self__)
        return attend_blockwise(*inputs, block=5)

    monkeypatch.setattr("annotated_moe.attention.BLOCKWISE_ABOVE", 12)
    monkeypatch.setattr("annotated_moe.attention.attend_blockwise", blocks)
    jax.clear_caches()
    logits = all_logits(params, TOKENS, TINY)
    np.testing.assert_allclose(logits, published, atol=2e-4)
    assert asked == [Chunk(CHUNK), Causal()]
    jax.clear_caches()


def test_blocks_that_a_chunk_hides_whole():
    """No key in a block is seen: nothing of it may stay in the sums."""
    q = normal(1, 40, 4, 8)
    k, v = normal(1, 40, 2, 8, seed=1), normal(1, 40, 2, 8, seed=2)
    at = jnp.arange(40)[None]
    sees = Chunk(7).sees
    once = attend(q, k, v, sees(at[..., None], at[:, None]), 0.3)
    run = attend_blockwise(q, k, v, at, at, 0.3, None, sees, 3)
    np.testing.assert_allclose(once, run, atol=1e-5)
    full = attend_blockwise(q, k, v, at, at, 0.3, None, is_past, 3)
    assert np.abs(full - once).max() > 0.1


def test_queries_grow_by_the_formula_and_not_in_short_texts():
    at = jnp.array([[0, 8190, 8191, 16382, 16383, 10485759]])
    q = normal(1, 6, 2, 4)
    grown = scale_queries_by_position(q, at, 8192, 0.1)
    wanted = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 1281])
    np.testing.assert_allclose(grown / q, np.broadcast_to(
        wanted[:, None, None], q.shape), rtol=1e-6)
    np.testing.assert_array_equal(grown[:, :2], q[:, :2])


def test_each_gate_is_a_sigmoid_of_its_own_logit():
    x, w = normal(20, 8), normal(8, 5, seed=1)
    routed = route_sigmoid(x, w, 2)
    logits = np.float64(x) @ np.float64(w)
    order = np.argsort(-logits, axis=1)[:, :2]
    np.testing.assert_array_equal(routed.experts, order)
    best = np.take_along_axis(logits, order, axis=1)
    np.testing.assert_allclose(routed.gates, sigmoid(best), rtol=1e-4)
    np.testing.assert_allclose(routed.logits, logits, atol=1e-5)
    np.testing.assert_allclose(routed.probs.sum(-1), 1, rtol=1e-5)
    assert route_sigmoid(x.astype("bfloat16"), w, 1).gates.dtype == jnp.float32


# Presets and files


def test_presets_are_the_published_models():
    """With the image encoder to the last parameter what the hub holds."""
    for name, config in LLAMA_4S.items():
        scout, base = "scout" in name, "base" in name
        whole, _ = parameter_counts(seeing(config, VisionSpec()))
        assert whole == (108_641_793_536 if scout else 401_583_781_376), name
        _, active = parameter_counts(config)
        assert abs(active / 17.2e9 - 1) < 0.005
        instruct = 10485760 if scout else 1048576
        assert config.context == (262144 if base else instruct)
        layers = [config.layer(i) for i in range(48)]
        bare = [i for i, x in enumerate(layers) if x.attention.rope is None]
        assert bare == list(range(3, 48, 4))
        sparse = [i for i, x in enumerate(layers)
                  if isinstance(x.feed_forward, SharedMoESpec)]
        assert sparse == list(range(0 if scout else 1, 48, 1 if scout else 2))
        near = layers[0].attention
        assert near.mask == Chunk(8192) and near.floor is None
        assert near.qk_norm_eps == (1e-5 if scout else None)
        assert not config.tied and am.PRESETS[name] == config


def fields_of(config, **changes):
    raw = FAMILIES["Llama4ForCausalLM"].write(config) | changes
    raw = {name: value for name, value in raw.items() if value != "gone"}
    return Fields(Path("config.json"), raw)


def read(config, **changes):
    return FAMILIES["Llama4ForCausalLM"].configure(fields_of(config, **changes))


@pytest.mark.parametrize("name", LLAMA_4S)
def test_a_preset_is_written_and_read(name):
    assert read(LLAMA_4S[name]) == LLAMA_4S[name]


def experts_in(config):
    return [i for i in range(config.num_layers)
            if isinstance(config.layer(i).feed_forward, SharedMoESpec)]


def test_layers_with_experts_are_those_that_the_file_names():
    scout = LLAMA_4S["llama-4-scout"]
    assert experts_in(read(scout, moe_layers=[1, 2])) == [1, 2]
    assert experts_in(read(scout, moe_layers=[])) == []
    every_third = {"moe_layers": "gone", "interleave_moe_layer_step": 3}
    assert experts_in(read(scout, **every_third)) == list(range(2, 48, 3))
    nobody = {"moe_layers": None, "interleave_moe_layer_step": 3}
    assert experts_in(read(scout, **nobody)) == list(range(2, 48, 3))


@pytest.mark.parametrize("changes, said", [
    ({"moe_layers": "all"}, "moe_layers must list ints: 'all'"),
    ({"moe_layers": [48]}, "moe_layers names layer 48 of 48"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers must have an entry a layer"),
    ({"layer_types": ["sliding_attention"] * 48}, "layer_types must name full"),
    ({"layer_types": ["full_attention"]}, "for each of 48 layers"),
    ({"attention_chunk_size": 0}, "attention_chunk_size"),
])
def test_fields_that_are_refused(changes, said):
    with pytest.raises(CheckpointError, match=said):
        read(LLAMA_4S["llama-4-scout"], **changes)


def test_what_a_layer_sees_is_said_by_layer_types():
    """Where there are none, by `no_rope_layers`."""
    scout = LLAMA_4S["llama-4-scout"]
    assert read(scout, layer_types="gone") == scout
    c = read(scout, layer_types=["full_attention"] * 48)
    assert {type(c.layer(i).attention.mask) for i in range(48)} == {Causal}
    turned = [c.layer(i).attention.rope is not None for i in range(4)]
    assert turned == [True, True, True, False]
    assert read(c) == c
    assert read(scout, attention_chunk_size="gone") == scout
    alone = {"layer_types": "gone", "attention_chunk_size": None}
    assert read(scout, **alone) == c


def test_a_small_model_without_experts():
    """The fields of MobileLLM-R1, of which the experts' are zero."""
    raw = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 48, "intermediate_size_mlp": 40, "moe_layers": [],
        "interleave_moe_layer_step": 0, "num_experts_per_tok": 0,
        "num_local_experts": 0, "no_rope_layers": [1, 1],
        "layer_types": ["full_attention"] * 2, "attention_chunk_size": 64,
        "attn_temperature_tuning": False, "tie_word_embeddings": True,
    }
    fields = Fields(Path("config.json"), raw)
    config = FAMILIES["Llama4ForCausalLM"].configure(fields)
    fields.finish()
    (segment,) = config.layers
    assert segment.repeats == 2
    assert segment.pattern[0].feed_forward == FeedForwardSpec(40, "silu")
    assert segment.pattern[0].attention.mask == Causal()
    assert read(config) == config


def test_growing_queries_are_spelled_in_two_ways():
    scout = LLAMA_4S["llama-4-scout"]
    assert read(scout, attn_temperature_tuning=4) == scout
    c = read(scout, attn_temperature_tuning=False)
    assert c.layer(3).attention.floor is None and read(c) == c


def test_attention_of_another_family_is_not_written():
    plain = replace(ATTENTION, qk_norm_eps=1e-5, floor=None)
    moe = replace(MOE, shared=FeedForwardSpec(12, "silu"))
    config = replace(TINY, layers=as_segments([LayerSpec(plain, moe)] * 2))
    assert architecture_of(config) == "Llama4ForCausalLM"
    for other in (
        replace(plain, multiplier=0.3), replace(plain, softcap=30.0),
        replace(plain, qk_norm_eps=1e-4), am.PRESETS["llama-3-8b"].layer(0).attention,
    ):
        layers = [LayerSpec(plain, moe), LayerSpec(other, moe)]
        with pytest.raises(CheckpointError, match="no architecture"):
            architecture_of(replace(TINY, layers=as_segments(layers)))
