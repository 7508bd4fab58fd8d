"""Rings against a full cache, the router, norms, files, presets."""

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import attention, cache, model, moe
from annotated_moe.attention import (
    Causal,
    NormedAttentionSpec,
    Window,
)
from annotated_moe.cache import PAD_POSITION, KVCache, RingCache
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.families.mixtral import window_of
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.hub import FAMILIES, Fields
from annotated_moe.moe import MoESpec

Q, K, H = 4, 2, 8
TOTAL = 40


def normal(seed, *shape):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def empty(kind, rows, slots, layers=2, dtype=jnp.float32):
    stack = jnp.zeros((layers, rows, slots, K, H), dtype)
    return kind(stack, stack, jnp.zeros(rows, jnp.int32))


@partial(jax.jit, static_argnames=("size", "block"))
def look(cache, q, k, v, positions, size, block=None):
    """Attention of layer 1 through a cache and a window of `size`."""
    new, k, v, held = cache.update(1, k, v, positions)
    sees = Window(size).sees
    if block:
        return attention.attend_blockwise(
            q, k, v, positions, held, 0.35, sees=sees, block=block
        ), new
    mask = sees(positions[..., None], held[:, None])
    return attention.attend(q, k, v, mask, 0.35), new


class Story:
    """Random q, k, v of some rows, read in calls of ragged length.

    The reference computes each token in NumPy's float64 from the true keys:
    nothing of the package's is in it.
    """

    def __init__(self, seed, rows, window, cache):
        rng = np.random.default_rng(seed)
        self.window, self.cache = window, cache
        self.q = rng.standard_normal((rows, TOTAL, Q, H)).astype(np.float32)
        self.k = rng.standard_normal((rows, TOTAL, K, H)).astype(np.float32)
        self.v = rng.standard_normal((rows, TOTAL, K, H)).astype(np.float32)
        self.n = np.zeros(rows, np.int32)
        self.rows = rows

    def expected(self, b, p):
        first = max(0, p - self.window + 1)
        k, v = (
            np.repeat(x[b, first : p + 1], Q // K, axis=1).astype(np.float64)
            for x in (self.k, self.v)
        )
        s = np.einsum("qh,sqh->qs", self.q[b, p].astype(np.float64), k) * 0.35
        e = np.exp(s - s.max(-1, keepdims=True))
        return np.einsum("qs,sqh->qh", e / e.sum(-1, keepdims=True), v)

    def call(self, lengths, width, size=None, block=None):
        """Read `lengths[b]` more of each row, padded to `width`; compare."""
        where = self.n[:, None] + np.arange(width)
        real = np.arange(width) < np.array(lengths)[:, None]
        positions = jnp.asarray(np.where(real, where, PAD_POSITION), jnp.int32)
        rows, at = np.arange(self.rows)[:, None], np.minimum(where, TOTAL - 1)
        q, k, v = (
            jnp.asarray(np.where(real[..., None, None], x[rows, at], 7.0))
            for x in (self.q, self.k, self.v)
        )
        y, new = look(self.cache, q, k, v, positions, size or self.window, block)
        y = np.asarray(y)
        for b, length in enumerate(lengths):
            for t in range(length):
                want = self.expected(b, self.n[b] + t)
                np.testing.assert_allclose(y[b, t], want, rtol=0, atol=3e-6)
        self.n = self.n + np.array(lengths, np.int32)
        self.cache = replace(new, length=jnp.asarray(self.n))


@pytest.mark.parametrize("seed", range(9))
def test_a_ring_is_a_full_cache_with_a_mask(seed):
    """Windows 1 to 9; ragged prompts, shorter and longer than them; steps."""
    rng = np.random.default_rng(seed)
    story = Story(seed, 3, seed + 1, empty(RingCache, 3, seed + 1))
    for width in (12, 1, 1, 1, 12, 1, 1, 1):
        lengths = rng.integers(1, width + 1, 3)
        lengths[rng.integers(3)] = width
        story.call(lengths.tolist(), width)
    assert not np.any(story.cache.k[0])         # the other layer's ring


@pytest.mark.parametrize("slots, window", [(24, 100), (24, 24), (24, 5), (7, 3)])
def test_a_ring_may_be_larger_or_smaller_than_its_window(slots, window):
    """Never wrong while a row has no more tokens than slots, or W <= slots."""
    story = Story(20, 2, window, empty(RingCache, 2, slots))
    for lengths, width in [((9, 2), 9), ((1, 1), 1), ((6, 8), 8), ((1, 1), 1)]:
        story.call(lengths, width)
    for _ in range(6):
        story.call((1, 1), 1)


def test_a_ring_that_is_too_short_fails_this_test():
    story = Story(21, 1, 5, empty(RingCache, 1, 4))
    story.call((7,), 7)
    with pytest.raises(AssertionError):
        story.call((1,), 1)


def test_a_window_that_sees_one_token_more_fails_this_test():
    story = Story(21, 1, 5, empty(RingCache, 1, 6))
    story.call((4,), 4, size=6)
    with pytest.raises(AssertionError):
        story.call((2,), 2, size=6)


def test_long_prompts_in_blocks():
    story = Story(22, 2, 5, empty(RingCache, 2, 5))
    story.call((13, 4), 13, block=4)
    story.call((1, 1), 1)
    story.call((2, 7), 7, block=4)


def test_what_is_kept_does_not_depend_on_the_order_of_writing():
    """Two tokens for one slot: the later lasts, whichever is written last."""
    at = jnp.arange(11, dtype=jnp.int32)[None]
    x, stack = normal(30, 1, 11, K, H), jnp.zeros([1, 1, 4, K, H])
    end = jnp.array([11], jnp.int32)
    ring = cache.write_ring(stack, 0, x, at, end)
    back = cache.write_ring(stack, 0, x[:, ::-1], at[:, ::-1], end)
    np.testing.assert_array_equal(ring, back)
    held = cache.ring_positions(end, 4)[0]
    np.testing.assert_array_equal(ring[0, 0], x[0, held])


def test_padding_alone_changes_nothing():
    story = Story(23, 2, 4, empty(RingCache, 2, 4))
    story.call((6, 6), 6)
    before = story.cache
    story.call((0, 3), 4)
    for name in ("k", "v"):
        old, new = getattr(before, name)[1], getattr(story.cache, name)[1]
        np.testing.assert_array_equal(old[0], new[0])
        assert np.any(old[1] != new[1])
    story.call((1, 1), 1)


def test_what_a_ring_holds():
    """Slot by slot, against a list that is appended to."""
    for slots in range(1, 10):
        for end in range(25):
            held = cache.ring_positions(jnp.array([end], jnp.int32), slots)[0]
            last = list(range(end))[-slots:]
            assert sorted(p for p in held.tolist() if p >= 0) == last
            assert all(p % slots == i for i, p in enumerate(held.tolist()))


def test_how_many_tokens_a_row_has():
    past = PAD_POSITION
    positions = jnp.array([[5, 6, past], [past] * 3, [0, past, past]], jnp.int32)
    ends = cache.end_after(jnp.array([5, 4, 0], jnp.int32), positions)
    assert ends.tolist() == [7, 4, 1]


def test_the_ring_takes_the_caches_dtype():
    ring = empty(RingCache, 1, 4, dtype=jnp.bfloat16)
    at = jnp.arange(6, dtype=jnp.int32)[None]
    x = normal(31, 1, 6, K, H)
    new, k, v, _ = ring.update(1, x, x, at)
    assert new.k.dtype == new.v.dtype == k.dtype == v.dtype == jnp.bfloat16
    held = new.k[1, 0, 1].astype(jnp.float32)
    np.testing.assert_allclose(held, x[0, 5], rtol=0.01)


# Rows come and go.


@pytest.mark.parametrize("kind, slots", [(RingCache, 5), (KVCache, 5), (KVCache, 3)])
def test_a_row_moves_into_a_ring(kind, slots):
    """From a ring as large, or a full cache no larger: then steps agree."""
    one = Story(32, 1, 5, empty(kind, 1, slots))
    one.call((3,), 3)
    many = Story(33, 2, 5, empty(RingCache, 2, 5))
    many.call((9, 12), 12)
    for name in ("q", "k", "v"):
        getattr(many, name)[0] = getattr(one, name)[0]
    many.cache = many.cache.evict(0).insert(0, one.cache)
    many.n = np.array(many.cache.length)
    assert many.n.tolist() == [3, 12]
    for _ in range(8):
        many.call((1, 1), 1)


@pytest.mark.parametrize("kind, slots", [(RingCache, 4), (RingCache, 6), (KVCache, 6)])
def test_a_row_that_would_lie_in_other_slots_is_refused(kind, slots):
    with pytest.raises(ValueError, match="slots"):
        empty(RingCache, 2, 5).insert(0, empty(kind, 1, slots))


def test_an_evicted_row_sees_nothing_of_the_old_one():
    story = Story(34, 1, 5, empty(RingCache, 1, 5))
    story.call((9,), 9)
    story.cache, story.n = story.cache.evict(0), np.zeros(1, np.int32)
    story.call((1,), 1)
    story.call((3,), 4)


def test_a_window_larger_than_the_cache_keeps_all():
    """Then a full cache is no larger, and says what it has no room for."""
    make = partial(Window(5).empty_cache, dtype=jnp.float32)
    for slots, kind in [(3, KVCache), (5, RingCache), (9, RingCache)]:
        shape = (1, 1, slots, K, H)
        made = make(shape, shape)
        assert type(made) is kind and made.slots == min(5, slots)


# Whole models.


def small_config(attention=None, network=None):
    attention = attention or NormedAttentionSpec(
        Q, K, H, H**-0.5, mask=Window(5), whole_norm=True, clip=0.8
    )
    network = network or MoESpec(4, 2, 32, "silu", "top_k_softmax")
    layer = LayerSpec(attention, network)
    return ModelConfig(64, 64, 32, (Segment((layer,), 2),), dtype="float32")


@pytest.fixture(scope="module")
def small():
    c = small_config()
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(1), c)
    tokens = np.random.default_rng(3).integers(1, 64, [2, TOTAL]).astype(np.int32)
    return c, params, tokens, np.asarray(model.all_logits(params, tokens, c))


def read(small, calls, slots=TOTAL):
    c, params, tokens, whole = small
    cache, n = model.init_cache(c, 2, slots), np.zeros(2, np.int32)
    for more in calls:
        part = np.zeros([2, max(more)], np.int32)
        for b in (0, 1):
            part[b, : more[b]] = tokens[b, n[b] : n[b] + more[b]]
        if more == (1, 1):
            last, cache = model.decode_step(params, part[:, 0], cache, c)
        else:
            last, cache = model.prefill(params, part, np.int32(more), cache, c)
        n += np.int32(more)
        np.testing.assert_allclose(last, whole[[0, 1], n - 1], atol=2e-5)
    return cache


def test_prompts_and_steps_agree_with_all_at_once(small):
    calls = [(12, 3), *[(1, 1)] * 7, (4, 12), *[(1, 1)] * 7]
    (kept,) = read(small, calls).places
    assert isinstance(kept, RingCache) and kept.k.shape == (2, 2, 5, K, H)
    assert kept.length.tolist() == [30, 29]


def test_in_blocks_where_the_scores_would_be_many(small, monkeypatch):
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 6)
    jax.clear_caches()
    read(small, [(12, 3), (1, 1), (4, 12), (1, 1)])
    jax.clear_caches()


@pytest.mark.parametrize("shape", [
    pytest.param((2, 2, 1), marks=pytest.mark.full), (1, 2, 2),
    pytest.param((2, 1, 2), marks=pytest.mark.full),
])  # fmt: skip
def test_prompts_and_steps_on_a_mesh(small, shape):
    """Rows over `data`, heads over `model`; each row keeps its own length."""
    data, tensor, expert = shape
    with jax.set_mesh(am.make_mesh(data=data, model=tensor, expert=expert)):
        read(small, [(12, 3), *[(1, 1)] * 2, (2, 9), (1, 1)])


def test_a_cache_shorter_than_the_window_refuses_more(small):
    c, params, tokens, _ = small
    short = model.init_cache(c, 2, 3)
    with pytest.raises(ValueError, match="9 tokens, 3 slots"):
        model.prefill(params, tokens[:, :9], np.int32([9, 9]), short, c)


# The router, norms, clips.


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_renormalised_gates(top_k):
    x, w = normal(0, 50, 16), normal(1, 16, 5)
    ours, theirs = (f(x, w, top_k) for f in (moe.route_renormalised, moe.route))
    scaled = theirs.gates / theirs.gates.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    np.testing.assert_allclose(ours.gates, scaled, rtol=1e-5)
    np.testing.assert_array_equal(ours.probs, theirs.probs)
    half = moe.route_renormalised(x.astype(jnp.bfloat16), w, top_k)
    assert half.gates.dtype == jnp.float32


@pytest.mark.parametrize("top_k", [0, 6])
def test_more_experts_than_there_are(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} of 5 experts"):
        moe.route_renormalised(normal(0, 3, 16), normal(1, 16, 5), top_k)


def rms(x, axes, gain):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + 1e-6) * gain


@pytest.mark.parametrize("whole", [False, True])
def test_norms_of_queries_and_keys(whole):
    q, k = normal(2, 2, 3, Q, H), normal(3, 2, 3, K, H)
    run = partial(attention.norm_qk, eps=1e-6, whole=whole)
    both = hk.without_apply_rng(hk.transform(run))
    made = both.init(jax.random.key(0), q, k)
    sizes = {"query_norm": Q * H, "key_norm": K * H} if whole else {}
    gains = {
        m: {"scale": normal(5, sizes.get(m, H))} for m in ("query_norm", "key_norm")
    }
    assert jax.tree.map(jnp.shape, gains) == jax.tree.map(jnp.shape, dict(made))
    for x, y, name in zip((q, k), both.apply(gains, q, k), gains):
        gain = np.asarray(gains[name]["scale"])
        gain = gain.reshape(-1, H) if whole else gain
        want = rms(x, (2, 3) if whole else 3, gain)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_the_clip_comes_after_the_norm_and_cuts_values_too():
    spec = NormedAttentionSpec(Q, K, H, H**-0.5, rope=None, clip=0.5)
    q, k, v = normal(6, 1, 2, Q, H), normal(7, 1, 2, K, H), normal(8, 1, 2, K, H)
    at = jnp.zeros((1, 2), jnp.int32)
    layer = hk.without_apply_rng(
        hk.transform(lambda *job: spec.build().prepare(*job))
    )
    params = layer.init(jax.random.key(0), q, k, v, at)
    want = rms(q, 3, 1), rms(k, 3, 1), v
    for y, x in zip(layer.apply(params, q, k, v, at), want):
        np.testing.assert_allclose(y, np.clip(x, -0.5, 0.5), atol=1e-6)


# Files.

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral",
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}
MIXTRAL = MISTRAL | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
    "attention_dropout": 0.0, "num_experts_per_tok": 2,
    "num_local_experts": 8, "output_router_logits": False,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "transformers_version": "4.36.0.dev0",
}
MIXTRAL_22B = MIXTRAL | {
    "hidden_size": 6144, "intermediate_size": 16384,
    "max_position_embeddings": 65536, "num_attention_heads": 48,
    "num_hidden_layers": 56, "router_jitter_noise": 0.0,
}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}
QWEN_235B = QWEN | {
    "hidden_size": 4096, "intermediate_size": 12288,
    "max_window_layers": 94, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_hidden_layers": 94,
}
LATER = {"max_position_embeddings": 262144, "rope_theta": 10000000}
CODER = LATER | {
    "qkv_bias": False, "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096,
    "model_type": "olmoe", "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16,
    "output_router_logits": False, "pad_token_id": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304,
}
# What their publishers put beside the weights; of Qwen3 the ids that end a
# text and fill a row are those of generation_config.json.
PUBLISHED = {
    "mistral-7b": MISTRAL,
    "mistral-7b-v0.3": MISTRAL | {
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "mixtral-8x7b": MIXTRAL,
    "mixtral-8x22b": MIXTRAL_22B,
    "mixtral-8x22b-instruct": MIXTRAL_22B | {"vocab_size": 32768},
    "qwen3-30b-a3b": QWEN,
    "qwen3-235b-a22b": QWEN_235B,
    "qwen3-30b-a3b-2507": QWEN | LATER,
    "qwen3-235b-a22b-2507": QWEN_235B | LATER | {"rope_theta": 5000000},
    "qwen3-coder-30b-a3b": QWEN | CODER,
    "qwen3-coder-480b-a35b": QWEN | CODER | {
        "hidden_size": 6144, "intermediate_size": 8192,
        "max_window_layers": 62, "moe_intermediate_size": 2560,
        "num_attention_heads": 96, "num_experts": 160,
        "num_hidden_layers": 62, "num_key_value_heads": 8},
    "olmoe-1b-7b": OLMOE,
}


def config_of(raw):
    fields = Fields(Path("config.json"), raw)
    config = FAMILIES[raw["architectures"][0]].read(fields)
    fields.finish()
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_presets_are_what_was_published(name):
    assert config_of(PUBLISHED[name]) == am.PRESETS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_reads_as_the_same(name):
    config = am.PRESETS[name]
    family = FAMILIES[PUBLISHED[name]["architectures"][0]]
    fields = Fields(Path("config.json"), family.write(config))
    assert family.read(fields) == config
    fields.finish()


def test_a_field_that_is_absent_means_what_its_program_takes_it_for():
    """A window of 4,096 in Mistral's, none in Mixtral's."""
    for raw, window in [(MISTRAL, 4096), (MIXTRAL, None)]:
        raw = {k: v for k, v in raw.items() if k != "sliding_window"}
        assert window_of(config_of(raw).layer(0).attention) == window
    assert window_of(
        config_of(MISTRAL | {"sliding_window": None}).layer(0).attention
    ) is None


@pytest.mark.parametrize("raw, why", [
    (MISTRAL | {"sliding_window": 0}, "sliding_window must be an int >= 1: 0"),
    (MISTRAL | {"layer_types": ["full_attention"] * 32},
     "layer_types may name 'sliding_attention' alone"),
    (MIXTRAL | {"layer_types": ["sliding_attention"] * 32},
     "layer_types may name 'full_attention' alone"),
    (MIXTRAL | {"num_local_experts": 1, "num_experts_per_tok": 2}, "top_k=2"),
    (QWEN | {"use_sliding_window": True}, "use_sliding_window is True"),
    (QWEN | {"mlp_only_layers": [48]}, "must list layers below 48"),
    (QWEN | {"mlp_only_layers": 3}, "must list layers below 48"),
    (QWEN | {"shared_expert_intermediate_size": 512}, "shared_expert"),
    (QWEN | {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    (OLMOE | {"clip_qkv": -1.0}, "clip_qkv must be positive"),
])
def test_what_is_not_known_is_refused(raw, why):
    with pytest.raises((CheckpointError, ValueError), match=why):
        config_of(raw)


def test_which_layers_of_a_qwen_have_experts():
    raw = QWEN | {
        "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = config_of(raw)
    sparse = [isinstance(config.layer(i).feed_forward, MoESpec) for i in range(6)]
    assert sparse == [False, True, False, False, False, True]
    family = FAMILIES["Qwen3MoeForCausalLM"]
    assert family.read(Fields(Path("x"), family.write(config))) == config


def test_a_model_without_experts_is_no_mixtral_qwen_or_olmoe():
    config = am.PRESETS["mistral-7b"]
    for name in ("Mixtral", "Qwen3Moe", "Olmoe"):
        with pytest.raises(ValueError, match="needs experts"):
            FAMILIES[f"{name}ForCausalLM"].write(config)


COUNTED = {
    "mistral-7b": (7.24, 7.24),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.1),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.1, 22.2),
    "qwen3-coder-480b-a35b": (480.2, 35.5),
    "olmoe-1b-7b": (6.92, 1.28),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_published_models_have_their_published_sizes(name):
    c = am.PRESETS[name]
    every = experts = 0
    for spec in model.flat_specs(c).values():
        every += prod(spec.shape)
        experts += prod(spec.shape) if "experts" in spec.axes else 0
    part = c.layer(0).feed_forward
    used = part.top_k / part.num_experts if experts else 1
    total, active = COUNTED[name]
    assert every / 1e9 == pytest.approx(total, abs=0.06)
    assert (every - experts * (1 - used)) / 1e9 == pytest.approx(active, abs=0.06)


def cache_bytes(config):
    """Of one row that fills the context."""
    make = partial(model.init_cache, config, 1, config.context)
    shapes = jax.eval_shape(make).places
    leaves = jax.tree.leaves([(c.k, c.v) for c in shapes])
    return sum(a.size * a.dtype.itemsize for a in leaves)


def test_a_window_makes_the_cache_of_mistral_an_eighth():
    config = am.PRESETS["mistral-7b"]
    layer = config.layer(0)
    layer = replace(layer, attention=replace(layer.attention, mask=Causal()))
    full = replace(config, layers=(Segment((layer,), 32),))
    assert (cache_bytes(config), cache_bytes(full)) == (2**29, 2**32)
