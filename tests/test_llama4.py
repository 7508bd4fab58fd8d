"""Llama 4: chunks, heat, the norm without gains, the gate on the input."""

import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import llama4, sharding
from annotated_moe.attention import KVCache
from annotated_moe.llama import swiglu
from annotated_moe.mixtral import attend_near
from annotated_moe.model import (
    ModelConfig,
    all_logits,
    decode_step,
    embed,
    init_cache,
    init_params,
    kinds,
    period,
    place_of,
    prefill,
    run_layer,
    split_params,
    unembed,
)
from annotated_moe.moe import Experts, Style, capacity_and_drop, expert, sort_and_tile
from annotated_moe.rms_norm import rms_norm
from annotated_moe.rope import rope

TINY = ModelConfig(
    **llama4.PRESETS["llama-4-maverick"]
    | {
        "vocab_size": 32, "context": 64, "d_model": 16, "d_ff": 12, "dense_ff": 20,
        "num_layers": 2, "nope_every": 2, "q_heads": 4, "kv_heads": 2, "head_size": 8,
        "attn_multiplier": 8**-0.5, "num_experts": 3, "qk_norm": "after_rope",
        "rope_base": 100.0, "rope_scaling": (4.0, 1.0, 2.0, 16), "attn_chunk": 6,
        "attn_temperature": (4, 0.3), "pad_id": 0, "eos_id": 1, "dtype": "float32",
    }
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(2, 32, (4, 24))
LENGTHS = np.array([4, 9, 15, 1])                           # chunk 6


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def random_params(config):
    rng = np.random.default_rng(1)
    key = jax.random.key(0)
    shapes = jax.eval_shape(partial(init_params, config=config), key)

    def draw(path, w):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, w.shape), jnp.float32)
        width = w.shape[-1] if path[-1].key == "embeddings" else w.shape[-2]
        return jnp.asarray(rng.standard_normal(w.shape) / width**0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def whole(params):
    return np.asarray(all_logits(params, TOKENS, TINY))


# The chunk rule


def test_chunks_stand_still():
    at = jnp.arange(10)[None]
    same = llama4.within_chunk(4, at[..., None], at[:, None])[0]
    wanted = np.kron(np.eye(3, dtype=bool), np.ones((4, 4), bool))[:10, :10]
    np.testing.assert_array_equal(same, wanted)


def test_a_token_hears_nothing_from_another_chunk_without_global_layers(params):
    """Change the first chunk: chunked layers alone carry none of it on."""
    other = TOKENS.copy()
    other[:, :6] = (other[:, :6] + 7) % 30 + 2
    deaf = replace(TINY, nope_layers=(), nope_every=0)
    apart = all_logits(params, TOKENS, deaf) - all_logits(params, other, deaf)
    assert np.abs(apart[:, :6]).max() > 0.1 and np.abs(apart[:, 6:]).max() == 0
    apart = all_logits(params, TOKENS, TINY) - all_logits(params, other, TINY)
    assert (np.abs(apart).max(axis=-1) > 1e-3).all()


def check_cached(params, whole):
    """Prompts shorter and longer than a chunk, then 9 steps, as uncached."""
    rows = np.arange(len(LENGTHS))
    prompt = np.where(np.arange(16) < LENGTHS[:, None], TOKENS[:, :16], 0)
    cache = init_cache(TINY, len(rows), 24)
    assert cache.near_k.shape == (1, 4, 6, 2, 8) == cache.near_v.shape
    assert cache.k.shape == (1, 4, 24, 2, 8)
    logits, cache = prefill(params, prompt, LENGTHS, cache, TINY)
    for step in range(9):
        np.testing.assert_allclose(logits, whole[rows, LENGTHS - 1 + step], atol=2e-5)
        column = TOKENS[rows, LENGTHS + step]
        logits, cache = decode_step(params, column, cache, TINY)


def test_ragged_rows_cross_borders_in_the_cache(params, whole):
    check_cached(params, whole)


def test_a_second_prompt_continues_the_first(params, whole):
    cache, eight = init_cache(TINY, 4, 24), np.full(4, 8)
    _, cache = prefill(params, TOKENS[:, :8], eight, cache, TINY)
    logits, _ = prefill(params, TOKENS[:, 8:16], eight, cache, TINY)
    np.testing.assert_allclose(logits, whole[:, 15], atol=2e-5)


def test_without_the_rule_decoding_departs_at_the_second_chunk(params, whole):
    """What Meta's code does, which passes no mask with a single token."""
    broken = replace(TINY, attn_chunk=None)
    cache, gaps = init_cache(broken, 4, 24), []
    for t in range(12):
        logits, cache = decode_step(params, TOKENS[:, t], cache, broken)
        gaps.append(np.abs(logits - whole[:, t]).max())
    assert max(gaps[:6]) < 2e-5 and min(gaps[6:]) > 0.05


def test_many_keys_in_blocks_keep_the_chunk_rule(monkeypatch):
    """The running softmax over blocks, and all scores at once."""
    q = normal(1, 40, 4, 8)
    k, v = normal(1, 40, 2, 8, seed=1), normal(1, 40, 2, 8, seed=2)
    at = jnp.arange(40)[None]
    sees = partial(llama4.within_chunk, 7)

    def run():
        look = partial(attend_near, multiplier=0.3, softcap=None, sees=sees)
        return jax.jit(lambda: look(q, k, v, at, None, 0)[0])()

    at_once = run()
    monkeypatch.setattr("annotated_moe.mixtral.BLOCKWISE_ABOVE", 16)
    np.testing.assert_allclose(at_once, run(), atol=1e-5)


def test_scouts_cache_at_a_million_tokens():
    scout = ModelConfig(**llama4.PRESETS["llama-4-scout"])
    cache = jax.eval_shape(lambda: init_cache(scout, 1, 2**20))
    assert isinstance(cache, KVCache)
    assert cache.k.shape == (12, 1, 2**20, 8, 128)
    assert cache.near_v.shape == (36, 1, 8192, 8, 128)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
    assert size - 4 == 4096 * (12 * 2**20 + 36 * 8192)


# Heat


def test_heat_follows_the_formula_and_leaves_short_texts_alone():
    at = jnp.array([[0, 8190, 8191, 16382, 16383, 10485759]])
    q, k = normal(1, 6, 2, 4), normal(1, 6, 1, 4, seed=1)
    hot, same = llama4.heat_queries(q, k, at, rope, (8192, 0.1))
    wanted = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 1281])
    np.testing.assert_allclose(hot / q, wanted[None, :, None, None] * np.ones_like(q),
                               rtol=1e-6)
    np.testing.assert_array_equal(same, k)
    assert llama4.heat_queries(q, k, at, rope, None)[0] is q


def test_padding_on_the_right_changes_no_heat(params, whole):
    """The heat counts a row's own tokens, whatever its row is filled with."""
    padded = np.where(np.arange(24) < LENGTHS[:, None], TOKENS, 0)
    together = all_logits(params, padded, TINY)
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(together[row, :n], whole[row, :n], atol=2e-5)


# The norm


def test_the_norm_without_gains_bounds_scores_and_commutes_with_rope():
    at = jnp.arange(5)[None]
    q, k = normal(1, 5, 4, 16, scale=50), normal(1, 5, 2, 16, seed=1, scale=50)
    a, b = llama4.turn_and_norm(q, k, at, rope, 1e-5)
    one = jnp.ones(16)
    np.testing.assert_allclose(a, rope(rms_norm(q, one), at), atol=1e-4)
    np.testing.assert_allclose(b, rope(rms_norm(k, one), at), atol=1e-4)
    np.testing.assert_allclose(jnp.sum(a**2, axis=-1), 16, rtol=1e-4)
    assert not np.allclose(a, rms_norm(q, one), atol=0.1)   # it did turn


def test_the_norms_eps_is_the_configurations():
    q = normal(1, 2, 1, 8, scale=1e-3)
    at = jnp.arange(2)[None]
    large, _ = llama4.turn_and_norm(q, q, at, rope, 1.0)
    assert np.abs(large).max() < 0.01


# The router


def test_each_gate_is_a_sigmoid_of_its_own_logit():
    x, w = normal(20, 8), normal(8, 5, seed=1)
    routed = llama4.route_sigmoid(x, w, 2)
    logits = np.asarray(x) @ np.asarray(w)
    order = np.argsort(-logits, axis=1)[:, :2]
    np.testing.assert_array_equal(routed.experts, order)
    best = np.take_along_axis(logits, order, axis=1)
    np.testing.assert_allclose(routed.gates, 1 / (1 + np.exp(-best)), rtol=1e-4)
    np.testing.assert_allclose(routed.logits, logits, atol=1e-5)
    np.testing.assert_allclose(routed.probs.sum(-1), 1, rtol=1e-5)
    assert llama4.route_sigmoid(x.astype("bfloat16"), w, 1).gates.dtype == jnp.float32


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gate_scales_what_the_expert_reads(top_k):
    """Both ways to compute against a loop, and not the output scaled."""
    w = Experts(normal(4, 8, 10), normal(4, 8, 10, seed=1), normal(4, 10, 8, seed=2))
    x = normal(9, 8, seed=3)
    routed = llama4.route_sigmoid(x, normal(8, 4, seed=4), top_k)
    style = Style(swiglu, scale_input=True)
    looped = np.zeros((9, 8), np.float32)
    outside = np.zeros((9, 8), np.float32)
    for n in range(9):
        for g, e in zip(routed.gates[n], routed.experts[n]):
            looped[n] += expert(x[n : n + 1] * g, w, (int(e),), style=style)[0]
            outside[n] += g * expert(x[n : n + 1], w, (int(e),), style=style)[0]
    job = x, routed.gates, routed.experts, w, 4
    np.testing.assert_allclose(sort_and_tile(*job, style=style), looped, atol=1e-4)
    seats = capacity_and_drop(*job, 9.0, style)
    np.testing.assert_allclose(seats, looped, atol=1e-4)
    assert np.abs(looped - outside).max() > 0.3


# Layers and switches


def test_layers_repeat_and_the_program_does_not_grow():
    scout, maverick = (ModelConfig(**llama4.PRESETS[f"llama-4-{name}"])
                       for name in ("scout", "maverick"))
    assert period(scout) == period(maverick) == 4
    bare = [i for i, kind in enumerate(kinds(scout)) if not kind.rope]
    assert bare == list(range(3, 48, 4))
    assert all(kind.experts and kind.near == kind.rope for kind in kinds(scout))
    sparse = [i for i, kind in enumerate(kinds(maverick)) if kind.experts]
    assert sparse == list(range(1, 48, 2))
    lines = set()
    for layers in (4, 40):
        deep = replace(TINY, num_layers=layers)
        shapes = jax.eval_shape(partial(init_params, config=deep), jax.random.key(0))
        row = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        lines.add(all_logits.lower(shapes, row, deep).as_text().count("\n"))
    assert len(lines) == 1


def test_two_periods_are_the_layers_one_by_one():
    """The scan over repeats finds each layer's weights."""
    deep = replace(TINY, num_layers=4)
    weights = random_params(deep)
    layers, _ = split_params(weights)
    assert period(deep) == 2

    @jax.jit
    def unrolled(tokens):
        h = embed(weights, tokens, deep)
        at = jnp.arange(8)[None]
        for i, kind in enumerate(kinds(deep)):
            h, _ = run_layer(layers, place_of(deep, i), kind, h, at, None, deep)
        return unembed(weights, h, deep)

    logits = all_logits(weights, TOKENS[:1, :8], deep)
    np.testing.assert_allclose(logits, unrolled(TOKENS[:1, :8]), atol=1e-5)


SWITCHES = {
    "attn_chunk": None, "nope_every": 0, "attn_temperature": None, "qk_norm": "none",
    "router": "top_k_softmax", "shared_expert": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_matters(params, whole, name):
    other = replace(TINY, **{name: SWITCHES[name]})
    logits = all_logits(params, TOKENS, other)
    assert np.abs(logits - whole).max() > 0.02


def test_each_preset_has_the_published_size():
    def total(c):
        shapes = jax.eval_shape(partial(init_params, config=c), jax.random.key(0))
        return {m: sum(w.size for w in leaves.values()) for m, leaves in shapes.items()}

    for name, experts, all_of, active in [
        ("llama-4-scout", 16, 107_770_141_000, 17.2e9),
        ("llama-4-maverick", 128, 400_712_340_000, 17.2e9),
    ]:
        c = ModelConfig(**llama4.PRESETS[name])
        sizes = total(c)
        assert abs(sum(sizes.values()) - all_of) < 1e6
        routed = sum(n for m, n in sizes.items() if "/moe/" in m)
        used = sum(sizes.values()) - routed * (1 - 1 / experts)
        assert abs(used / active - 1) < 0.005
        assert c.num_experts == experts and not c.tied


def test_the_code_that_llama_4_adds_is_short():
    """Presets, weight map and configuration apart: under 120 lines."""
    parts = [llama4.route_sigmoid, llama4.within_chunk, llama4.turn_and_norm,
             llama4.heat_queries]
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) < 120


# Meshes


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_on_a_mesh(params, whole, shape):
    """Prompts across borders, continued: what one device says uncached."""
    mesh = am.make_mesh(*shape)
    specs = sharding.partition_specs(params, mesh)
    placed = jax.device_put(params, sharding.shardings(specs, mesh))
    with jax.set_mesh(mesh):
        check_cached(placed, whole)
