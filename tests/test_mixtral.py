"""Mixtral's pieces: rings against a full cache, routers, norms, presets."""

from dataclasses import replace
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe import attention, mixtral, model, sharding
from annotated_moe.attention import KVCache
from annotated_moe.mixtral import PAST, PRESETS
from annotated_moe.model import ModelConfig
from annotated_moe.moe import route

Q, K, H = 4, 2, 8
TOTAL = 40

SMALL = {
    "vocab_size": 64,
    "context": 64,
    "d_model": 32,
    "d_ff": 32,
    "num_layers": 2,
    "q_heads": Q,
    "kv_heads": K,
    "head_size": H,
    "num_experts": 4,
    "post_norm": False,
    "activation": "silu",
    "router": "top_k_softmax",
    "tied": False,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
    "attn_multiplier": H**-0.5,
    "attn_softcap": None,
    "dtype": "float32",
}


def normal(seed, *shape):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


# --- attention, call by call -------------------------------------------------


class Story:
    """Random q, k, v of some rows, read in calls of ragged length.

    The reference computes each call in NumPy's float64 from the true keys,
    with a mask: nothing of the module's is in it.
    """

    def __init__(self, seed, rows, window, slots, softcap=None):
        rng = np.random.default_rng(seed)
        self.rows, self.window, self.softcap = rows, window, softcap
        self.jits = {}
        self.q = rng.standard_normal((rows, TOTAL, Q, H)).astype(np.float32)
        self.k = rng.standard_normal((rows, TOTAL, K, H)).astype(np.float32)
        self.v = rng.standard_normal((rows, TOTAL, K, H)).astype(np.float32)
        self.n = np.zeros(rows, np.int32)
        full, near = np.zeros((1, rows, 0, K, H)), np.zeros((2, rows, slots, K, H))
        self.cache = KVCache(
            jnp.asarray(full, jnp.float32),
            jnp.asarray(full, jnp.float32),
            jnp.zeros(rows, jnp.int32),
            jnp.asarray(near, jnp.float32),
            jnp.asarray(near, jnp.float32),
        )

    def expected(self, b, p):
        lo = max(0, p - self.window + 1)
        k = np.repeat(self.k[b, lo : p + 1], Q // K, axis=1).astype(np.float64)
        v = np.repeat(self.v[b, lo : p + 1], Q // K, axis=1).astype(np.float64)
        s = np.einsum("qh,sqh->qs", self.q[b, p].astype(np.float64), k) * 0.35
        s = self.softcap * np.tanh(s / self.softcap) if self.softcap else s
        e = np.exp(s - s.max(-1, keepdims=True))
        return np.einsum("qs,sqh->qh", e / e.sum(-1, keepdims=True), v)

    def call(self, lengths, width, look=mixtral.attend_near):
        """Read `lengths[b]` more of each row, padded to `width`; compare."""
        where = self.n[:, None] + np.arange(width)
        real = np.arange(width) < np.array(lengths)[:, None]
        positions = np.where(real, where, PAST).astype(np.int32)

        def take(x):
            at = np.minimum(where, TOTAL - 1)
            y = x[np.arange(self.rows)[:, None], at]
            return jnp.asarray(np.where(real[..., None, None], y, 7.0))

        job = [take(x) for x in (self.q, self.k, self.v)]
        sees = partial(mixtral.within_window, self.window)
        rest = {"multiplier": 0.35, "softcap": self.softcap, "sees": sees}
        jit = jax.jit(partial(look, layer=1, **rest))
        y, cache = self.jits.setdefault(look, jit)(
            *job, jnp.asarray(positions), self.cache
        )
        y = np.asarray(y)
        for b, length in enumerate(lengths):
            for t in range(length):
                want = self.expected(b, self.n[b] + t)
                np.testing.assert_allclose(y[b, t], want, rtol=0, atol=3e-6)
        self.n = self.n + np.array(lengths, np.int32)
        self.cache = replace(cache, length=jnp.asarray(self.n))


@pytest.mark.parametrize("seed", range(9))
def test_a_ring_is_a_full_cache_with_a_mask(seed):
    """Windows 1 to 9; ragged prompts, shorter and longer than them; steps."""
    rng = np.random.default_rng(seed)
    story = Story(seed, rows=3, window=seed + 1, slots=seed + 1)
    for width in (12, 1, 1, 1, 12, 1, 1, 1):
        lengths = rng.integers(1, width + 1, 3)
        lengths[rng.integers(3)] = width
        story.call(lengths.tolist(), width)
    assert not np.any(story.cache.near_k[0])  # the other layer's ring


@pytest.mark.parametrize("slots, window", [(24, 100), (24, 24), (24, 5), (7, 3)])
def test_a_ring_may_be_larger_or_smaller_than_its_window(slots, window):
    """Never wrong while a row has no more tokens than slots, or W <= slots."""
    story = Story(20, rows=2, window=window, slots=slots)
    for lengths, width in [((9, 2), 9), ((1, 1), 1), ((6, 8), 8), ((1, 1), 1)]:
        story.call(lengths, width)
    for _ in range(6):
        story.call((1, 1), 1)


def test_a_ring_that_is_too_short_fails_this_test():
    story = Story(21, rows=1, window=5, slots=4)
    story.call((7,), 7)
    with pytest.raises(AssertionError):
        story.call((1,), 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_prompts_in_blocks(monkeypatch, softcap):
    asked = []

    def blocks(*job, **options):
        asked.append(job[0].shape)
        return attention.attend_blockwise(*job, block=4, **options)

    monkeypatch.setattr(mixtral, "BLOCKWISE_ABOVE", 6)
    monkeypatch.setattr(mixtral, "attend_blockwise", blocks)
    story = Story(22, rows=2, window=5, slots=5, softcap=softcap)
    story.call((13, 4), 13)
    story.call((1, 1), 1)
    story.call((2, 7), 7)
    assert len(asked) == 2


def test_what_is_kept_does_not_depend_on_the_order_of_writing():
    """Two tokens for one slot: the later lasts, whichever is written last."""
    at = jnp.arange(11, dtype=jnp.int32)[None]
    x, empty = normal(30, 1, 11, K, H), jnp.zeros([1, 1, 4, K, H])
    end = jnp.array([11], jnp.int32)
    ring = mixtral.write_ring(empty, 0, x, at, end)
    back = mixtral.write_ring(empty, 0, x[:, ::-1], at[:, ::-1], end)
    np.testing.assert_array_equal(ring, back)
    held = mixtral.ring_positions(end, 4)[0]
    np.testing.assert_array_equal(ring[0, 0], x[0, held])


def test_padding_alone_changes_nothing():
    story = Story(23, rows=2, window=4, slots=4)
    story.call((6, 6), 6)
    before = story.cache
    story.call((0, 3), 4)
    for name in ("near_k", "near_v"):
        old, new = getattr(before, name), getattr(story.cache, name)
        np.testing.assert_array_equal(old[:, 0], new[:, 0])
        assert np.any(old[:, 1] != new[:, 1])
    story.call((1, 1), 1)


def test_without_a_cache_tokens_look_at_each_other():
    story = Story(24, rows=1, window=3, slots=3)
    at = jnp.arange(12, dtype=jnp.int32)[None]
    q, k, v = (jnp.asarray(x[:, :12]) for x in (story.q, story.k, story.v))
    sees = partial(mixtral.within_window, 3)
    y, cache = mixtral.attend_near(q, k, v, at, None, 0, 0.35, None, sees)
    assert cache is None
    for p in range(12):
        np.testing.assert_allclose(y[0, p], story.expected(0, p), atol=3e-6)


def test_what_a_ring_holds():
    """Slot by slot, against a list that is appended to."""
    for slots in range(1, 10):
        for end in range(25):
            held = mixtral.ring_positions(jnp.array([end], jnp.int32), slots)[0]
            last = list(range(end))[-slots:]
            assert sorted(p for p in held.tolist() if p >= 0) == last
            assert all(p % slots == i for i, p in enumerate(held.tolist()))


def test_how_many_tokens_a_row_has():
    positions = jnp.array([[5, 6, PAST], [PAST] * 3, [0, PAST, PAST]], jnp.int32)
    ends = mixtral.ends(jnp.array([5, 4, 0], jnp.int32), positions)
    assert ends.tolist() == [7, 4, 1]


def test_the_ring_takes_the_caches_dtype():
    story = Story(25, rows=1, window=4, slots=4)
    half = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.ndim == 5 else a, story.cache
    )
    at = jnp.arange(6, dtype=jnp.int32)[None]
    q, k, v = (jnp.asarray(x[:, :6]) for x in (story.q, story.k, story.v))
    sees = partial(mixtral.within_window, 4)
    y, cache = mixtral.attend_near(q, k, v, at, half, 0, 0.35, None, sees)
    assert cache.near_k.dtype == jnp.bfloat16 and y.dtype == jnp.float32
    held = cache.near_k[0, 0, 1].astype(jnp.float32)
    np.testing.assert_allclose(held, k[0, 5], rtol=0.01)


MESHES = [(1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("data, tensor", MESHES)
def test_a_ring_on_a_mesh(data, tensor):
    """Rows over `data`, heads over `model`; each row keeps its own length."""

    def run(*job, layer, **rest):
        look = partial(mixtral.attend_near, **rest)
        return attention.attend_on_mesh(*job, layer, look)

    with jax.set_mesh(sharding.make_mesh(data=data, model=tensor)):
        story = Story(26, rows=2, window=5, slots=5)
        for lengths, width in [((9, 2), 9), ((1, 1), 1), ((2, 9), 9)]:
            story.call(lengths, width, run)


# --- whole models ------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    c = ModelConfig(**SMALL, attn_window=5, qk_norm="whole", qkv_clip=0.8)
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
    cache = read(small, calls)
    assert cache.k.shape[0] == 0 and cache.near_k.shape == (2, 2, 5, K, H)
    assert cache.length.tolist() == [30, 29]


def test_prompts_and_steps_on_a_mesh(small):
    with jax.set_mesh(sharding.make_mesh(data=2, model=2)):
        read(small, [(12, 3), *[(1, 1)] * 4])


def test_a_short_cache_needs_a_shorter_ring(small):
    c = small[0]
    shapes = jax.eval_shape(partial(model.init_cache, c, 1, 3))
    assert shapes.near_k.shape[2] == 3


# --- the router, norms, presets ----------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_renormalised_gates(top_k):
    x, w = normal(0, 50, 16), normal(1, 16, 5)
    ours, theirs = (f(x, w, top_k) for f in (mixtral.route_renormalised, route))
    scaled = theirs.gates / theirs.gates.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    np.testing.assert_allclose(ours.gates, scaled, rtol=1e-5)
    np.testing.assert_array_equal(ours.probs, theirs.probs)
    half = mixtral.route_renormalised(x.astype(jnp.bfloat16), w, top_k)
    assert half.gates.dtype == jnp.float32


@pytest.mark.parametrize("top_k", [0, 6])
def test_more_experts_than_there_are(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} of 5 experts"):
        mixtral.route_renormalised(normal(0, 3, 16), normal(1, 16, 5), top_k)


@pytest.mark.parametrize("whole", [False, True])
def test_norms_of_queries_and_keys(whole):
    q, k, v = normal(2, 2, 3, Q, H), normal(3, 2, 3, K, H), normal(4, 2, 3, K, H)
    both = hk.without_apply_rng(hk.transform(partial(mixtral.norm_heads, whole, 1e-6)))
    params = both.init(jax.random.key(0), q, k, v)
    sizes = {"query_norm": Q * H, "key_norm": K * H} if whole else {}
    gains = {
        m: {"scale": normal(5, sizes.get(m, H))} for m in ("query_norm", "key_norm")
    }
    assert jax.tree.map(jnp.shape, gains) == jax.tree.map(jnp.shape, dict(params))
    new_q, new_k, new_v = both.apply(gains, q, k, v)
    for x, y, name in ((q, new_q, "query_norm"), (k, new_k, "key_norm")):
        x = np.asarray(x, np.float64)
        axes = (2, 3) if whole else 3
        x = x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + 1e-6)
        gain = np.asarray(gains[name]["scale"])
        gain = gain.reshape(-1, H) if whole else gain
        np.testing.assert_allclose(y, x * gain, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(new_v, v)


def test_clipping():
    q, k = normal(6, 1, 2, Q, H), normal(7, 1, 2, K, H)
    for x, y in zip((q, k, k), mixtral.clip_heads(0.5, q, k, k)):
        np.testing.assert_array_equal(y, np.clip(x, -0.5, 0.5))


PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.1),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.1, 22.2),
    "olmoe-1b-7b": (6.92, 1.28),
}


def test_the_published_models_have_their_published_sizes():
    assert set(PRESETS) == set(PUBLISHED)
    for name, (total, active) in PUBLISHED.items():
        c = ModelConfig(**PRESETS[name])
        init = partial(model.init_params, config=c)
        shapes = jax.eval_shape(init, jax.random.key(0))
        sizes = {
            m: sum(w.size for w in leaves.values()) for m, leaves in shapes.items()
        }
        every = sum(sizes.values())
        experts = sum(n for m, n in sizes.items() if "/moe/" in m)
        reads = every - experts * (1 - c.top_k / c.num_experts)
        assert every / 1e9 == pytest.approx(total, abs=0.06)
        assert reads / 1e9 == pytest.approx(active, abs=0.06)
        assert c.attn_multiplier == pytest.approx(c.head_size**-0.5)
