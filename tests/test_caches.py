"""Heads in eight bits, and pages of a pool: against full caches of floats."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import cli
from annotated_moe.attention import (
    Causal,
    Window,
    attend_any,
    attend_by_head,
    attend_to_kept,
)
from annotated_moe.cache import (
    CACHE_KINDS,
    NO_PAGE,
    PAD_POSITION,
    EightBitHeads,
    HeadBits,
    KVCache,
    Paged,
    PagedCache,
    RingCache,
    eight_bit,
    share,
    take_pages,
)
from annotated_moe.config import Segment
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import Model, Session
from annotated_moe.model import decode_step, init_cache, init_params, share_prefix
from annotated_moe.parallel import make_mesh, use_mesh
from annotated_moe.plan import abstract_cache, abstract_mesh, cache_bytes

K, H, V = 2, 4, 3
TINY = grok_config(
    vocab_size=64, context=32, d_model=32, d_ff=32, num_layers=2, q_heads=4,
    kv_heads=2, head_size=8, num_experts=4, embedding_multiplier=6.0,
    attn_multiplier=8**-0.5, dtype="float32",
)  # fmt: skip


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def floats(rows, slots, layers=1, kind=KVCache):
    k = jnp.zeros((layers, rows, slots, K, H))
    return kind(k, jnp.zeros((*k.shape[:-1], V)), jnp.zeros(rows, jnp.int32))


def paged(rows, slots, page, pages, kind="float"):
    kind = Paged(page, pages, CACHE_KINDS[kind])
    return kind.keep(floats(rows, slots, 2))


@jax.jit
def write(cache, k, v, new):
    """`new[b]` tokens of each row, into both layers; what layer 1 then sees."""
    cache = cache.reserve(new)
    at = cache.length[:, None] + jnp.arange(k.shape[1])
    at = jnp.where(jnp.arange(k.shape[1]) < new[:, None], at, PAD_POSITION)
    for layer in (0, 1):
        cache, keys, values, _ = cache.update(layer, k + layer, v + layer, at)
    return replace(cache, length=cache.length + new), keys, values


def as_floats(x):
    return np.asarray(x.astype(jnp.float32))


class Story:
    """Random turns of a paged cache, and each row's tokens as a plain list."""

    rows, slots, page, pages, most = 4, 24, 4, 14, 6

    def __init__(self, seed, kind):
        self.chance = np.random.default_rng(seed)
        self.cache = paged(self.rows, self.slots, self.page, self.pages, kind)
        self.full = [np.zeros((0, K, H))] * self.rows
        self.kind, self.refused, self.shared = kind, 0, 0

    def rounded(self, x):
        return np.asarray(x) if self.kind == "float" else as_floats(eight_bit(x))

    def turn(self):
        others = [self.evict, self.insert, self.share]
        self.chance.choice([self.write] * 4 + others * 2)()
        self.check()

    def write(self):
        new = self.chance.integers(0, self.most + 1, self.rows)
        new = np.minimum(new, self.slots - np.asarray(self.cache.length))
        x = jnp.asarray(
            self.chance.standard_normal((self.rows, self.most, K, H)), jnp.float32
        )
        try:
            self.cache.check(new)
        except ValueError as error:
            assert "are free" in str(error)
            self.refused += 1
            return
        self.cache, keys, values = write(
            self.cache, x, x[..., :V], jnp.asarray(new, jnp.int32)
        )
        for row, n in enumerate(new):
            rounded = self.rounded(x[row, :n] + 1)
            self.full[row] = np.concatenate([self.full[row], rounded])
            own = as_floats(keys[row])[: len(self.full[row])]
            np.testing.assert_array_equal(own, self.full[row])
            if self.kind == "float":
                seen = np.asarray(values[row])[: len(own)]
                np.testing.assert_array_equal(seen, self.full[row][..., :V])

    def evict(self):
        row = int(self.chance.integers(self.rows))
        self.cache, self.full[row] = self.cache.evict(row), self.full[row][:0]

    def insert(self):
        row, n = self.chance.integers([self.rows, self.slots + 1])
        x = jnp.asarray(self.chance.standard_normal((1, self.slots, K, H)), jnp.float32)
        other, k, _ = write(
            floats(1, self.slots, 2), x, x[..., :V], jnp.asarray([n], jnp.int32)
        )
        try:
            self.cache = self.cache.insert(int(row), other)
        except ValueError as error:
            assert "are free" in str(error)
            self.refused += 1
            return
        self.full[row] = self.rounded(k[0, :n])

    def share(self):
        row, source = (int(i) for i in self.chance.permutation(self.rows)[:2])
        if have := len(self.full[source]):
            n = int(self.chance.integers(1, have + 1))
            self.cache = share(self.cache, row, source, n)
            self.full[row], self.shared = self.full[source][:n], self.shared + 1

    def check(self):
        """Every row is as its list, and every page has the users it counts."""
        cache = self.cache
        assert cache.length.tolist() == [len(row) for row in self.full]
        table = np.asarray(cache.table)
        used = np.bincount(table[table != NO_PAGE], minlength=self.pages)
        np.testing.assert_array_equal(used, cache.users[0])
        nothing = jnp.zeros((self.rows, self.most, K, H))
        _, keys, _ = write(
            cache, nothing, nothing[..., :V], jnp.zeros(self.rows, jnp.int32)
        )
        for row, full in enumerate(self.full):
            np.testing.assert_array_equal(as_floats(keys[row])[: len(full)], full)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_a_paged_cache_is_a_full_cache_for_each_row(seed, kind):
    story = Story(seed, kind)
    for _ in range(40):
        story.turn()
    assert story.refused > 1 and story.shared > 3


def test_a_copy_is_made_of_a_begun_page_and_of_no_other():
    cache = paged(3, 12, 4, 9)
    x = normal(3, 6, K, H)
    cache, _, _ = write(cache, x, x[..., :V], jnp.array([6, 0, 0]))
    cache = share(share(cache, 1, 0, 6), 2, 0, 4)
    assert cache.users[0].tolist()[:3] == [3, 2, 0]
    cache, keys, _ = write(cache, x + 5, x[..., :V], jnp.array([1, 1, 1]))
    table = np.asarray(cache.table)
    assert len(set(table[:, 0])) == 1 and len(set(table[:, 1])) == 3
    np.testing.assert_array_equal(keys[0, :6], keys[1, :6])
    np.testing.assert_array_equal(keys[1, 6], x[1, 0] + 6)
    np.testing.assert_array_equal(keys[0, 6], x[0, 0] + 6)
    np.testing.assert_array_equal(keys[2, 4], x[2, 0] + 6)


def test_taking_pages_does_not_copy_the_pool():
    cache = jax.eval_shape(lambda: paged(4, 4096, 16, 1024))
    new = jax.ShapeDtypeStruct((4,), jnp.int32)
    job = jax.jit(take_pages, donate_argnums=0).lower(cache, new)
    memory = job.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100_000 < memory.output_size_in_bytes


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_number_moves_by_half_a_step_at_most(scale):
    x = normal(5, 7, 16, scale=scale).at[0, 0].set(0)
    kept = eight_bit(x)
    assert kept.numbers.dtype == jnp.int8 and not as_floats(kept)[0, 0].any()
    off = abs(as_floats(kept) - x)
    assert (off <= np.asarray(kept.scales) * 0.5001).all() and off.max() > 0
    assert (abs(np.asarray(kept.numbers)).max(-1)[1:] == 127).all()


def heads(seed, tokens=3, slots=40, scale=1.0):
    q = normal(2, tokens, 3 * K, 16, seed=seed, scale=scale)
    k, v = (normal(2, slots, K, 16, seed=seed + i, scale=scale) for i in (1, 2))
    at = jnp.tile(jnp.arange(slots, dtype=jnp.int32), (2, 1))
    return q, k, v, at[:, -tokens:] - jnp.array([[0], [7]], jnp.int32), at


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mask", [Causal(), Window(9)])
def test_attention_to_eight_bits_is_attention_to_what_they_stand_for(
    tokens, softcap, mask
):
    q, k, v, at, key_at = heads(3, tokens)
    k, v = eight_bit(k), eight_bit(v)
    rest = at, key_at, 0.25, softcap, mask.sees
    exact = attend_any(q, k.astype(jnp.float32), v.astype(jnp.float32), *rest)
    for way in (attend_by_head, attend_to_kept):
        np.testing.assert_allclose(way(q, k, v, *rest), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_error_of_attention_stays_within_its_bound(seed, scale):
    """|dy| <= tanh(e / 2) * (max v - min v) + max of the values' half steps."""
    q, k, v, at, key_at = heads(seed, 1, scale=scale)
    rest = at, key_at, 0.25, 30.0, Causal().sees
    k8, v8 = eight_bit(k), eight_bit(v)
    y, near = attend_any(q, k, v, *rest), attend_to_kept(q, k8, v8, *rest)
    size = abs(q).sum(-1).reshape(2, 1, K, 3)
    step = k8.scales.max(1)[:, None] / 2  # [B, 1, K, 1]
    e = 0.25 * size * step
    spread = (v.max(1) - v.min(1))[:, None, :, None]  # [B, 1, K, 1, H]
    bound = jnp.tanh(e / 2)[..., None] * spread
    bound += v8.scales.max(1)[:, None, :, None] / 2
    off = abs(near - y).reshape(2, 1, K, 3, 16)
    assert (off <= bound + 1e-6).all() and (off.max() > bound.max() / 200)


def test_an_opponent_comes_near_the_bound_and_not_past_it():
    """Each key's rounding goes the way in which the query says most."""
    q, k = normal(1, 1, 1, 128, seed=1), normal(1, 256, 1, 128, seed=2)
    step = abs(k).max(-1, keepdims=True) / 127
    good = jnp.arange(256)[None, :, None, None] < 128
    up = jnp.where(good, 0.499, -0.499) * jnp.sign(q)
    k = jnp.where(abs(k) > 126 * step, k, (jnp.round(k / step) - up) * step)
    v = jnp.where(good, 1.0, -1.0) * jnp.ones(k.shape)
    at = jnp.arange(256, dtype=jnp.int32)[None]
    rest = at[:, -1:], at, 128**-0.5, None, Causal().sees
    near = attend_to_kept(q, eight_bit(k), eight_bit(v), *rest)
    off = near - attend_any(q, k, v, *rest)
    e = 128**-0.5 * abs(q).sum() * step.max() / 2
    bound = jnp.tanh(e / 2) * 2 + 1 / 254
    assert 0.5 * bound < abs(off).max() < bound


def model_of(config, kv_cache="float", mesh=None):
    params = jax.jit(partial(init_params, config=config))(jax.random.key(0))
    return Model(config, params, mesh=mesh, kv_cache=kv_cache)


PROMPTS = [[5, 6, 7, 8, 9], [11] * 12, [3], [40, 2, 9]]


def logits_of(model, kv_cache=None, few=False):
    """A story of four rows: they step apart, one leaves, another comes."""
    session, found = Session(model, 4, 32, kv_cache), []
    found.append(session.prefill(PROMPTS))
    if few:
        session.cache = session.cache.evict(2)
        found.append(session.step(np.array([4, 5, 6, 7])))
        return np.stack([np.asarray(y, np.float32) for y in found])
    for active in ([1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1]) * 3:
        found.append(session.step(np.array([4, 5, 6, 7]), np.array(active)))
    session.cache = session.cache.evict(1)
    alone = Session(model, 1, 32, kv_cache)
    alone.prefill([[9, 9, 1]])
    session.cache = session.cache.insert(1, alone.cache)
    for _ in range(3):
        found.append(session.step(np.array([1, 2, 3, 4])))
    return np.stack([np.asarray(y, np.float32) for y in found])


def real(y):
    """Logits of rows that took a step, the others' mean nothing."""
    y = y.copy()
    y[2:10:3, [0, 2]], y[3:10:3, 1] = 0, 0
    return y


WINDOW = replace(TINY, layers=(Segment(tuple(
    replace(TINY.layer(0), attention=replace(TINY.layer(0).attention, mask=mask))
    for mask in (Window(6), Causal())), 1),))  # fmt: skip


def test_a_model_says_the_same_from_pages_and_nearly_so_from_eight_bits():
    """Its first layer has a ring, its second a full cache, or pages."""
    model = model_of(WINDOW)
    exact = real(logits_of(model))
    np.testing.assert_array_equal(real(logits_of(model, Paged(4, 18))), exact)
    eight = real(logits_of(model, "int8"))
    assert 0 < abs(eight - exact).max() < 0.05 * exact.std()
    np.testing.assert_array_equal(real(logits_of(model, "paged-int8")), eight)


@pytest.mark.parametrize("sizes, kind", [((2, 2), "paged-int8"), ((3, 1), "paged")])
def test_on_a_mesh(sizes, kind):
    mesh = make_mesh(data=sizes[0], model=sizes[1])
    whole = logits_of(model_of(TINY), kind, few=True)
    apart = logits_of(model_of(TINY, kind, mesh), few=True)
    np.testing.assert_allclose(apart, whole, rtol=0, atol=2e-3 if "8" in kind else 2e-5)


def test_on_a_mesh_each_part_has_pages_of_its_own():
    with use_mesh(make_mesh(data=2, model=2)):
        (cache,) = init_cache(TINY, 4, 32, Paged(8, 9)).places
    assert cache.users.shape == (2, 5) and cache.k.shape == (2, 10, 8, 2, 8)
    assert {s.data.shape for s in cache.k.addressable_shards} == {(2, 5, 8, 1, 8)}
    cache = replace(cache, length=jnp.array([8, 8, 8, 8]))
    with pytest.raises(ValueError, match="rows 3 and 0 are on different devices"):
        share(cache, 3, 0, 8)


@pytest.mark.parametrize("kind", ["float", "paged", "int8"])
def test_a_shared_prefix_is_as_if_it_were_read(kind):
    model, prefix = model_of(TINY), [7, 3, 9, 1, 5, 5, 2]
    session = Session(model, 3, 32, Paged(4, 8) if kind == "paged" else kind)
    session.prefill([prefix, [], []])
    session.cache = share_prefix(session.cache, 1, 0, 7)
    session.cache = share_prefix(session.cache, 2, 0, 5)
    assert session.cache.length.tolist() == [7, 7, 5]
    many = session.prefill([[1, 2], [8, 9, 4], [6]])
    for row, text in enumerate([prefix + [1, 2], prefix + [8, 9, 4], prefix[:5] + [6]]):
        alone = Session(model, 1, 32, kind).prefill([text])
        atol = 0.02 if kind == "int8" else 1e-5
        np.testing.assert_allclose(many[row], alone[0], rtol=0, atol=atol)


def test_too_few_pages_are_one_error_before_anything_is_written():
    session = Session(model_of(TINY), 2, 32, Paged(4, 4))
    session.prefill([[1] * 8, [2] * 4])
    before = jax.tree.map(np.asarray, session.cache)
    message = "2 pages of 4 tokens are wanted and 1 are free: evict a row"
    for step in (
        lambda: session.step(np.array([1, 1])),
        lambda: session.prefill([[1], [2, 3]]),
    ):
        with pytest.raises(ValueError, match=message):
            step()
    alone = Session(session.model, 1, 32, "float")
    alone.prefill([[1] * 16])
    with pytest.raises(ValueError, match="4 pages of 4 tokens are wanted and 2"):
        session.cache.insert(1, alone.cache)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(session.cache)):
        np.testing.assert_array_equal(a, b)
    session.step(np.array([1, 1]), np.array([False, True]))
    session.cache = session.cache.evict(1)
    session.step(np.array([1, 1]), np.array([True, False]))
    with pytest.raises(ValueError, match="33 tokens, 32 slots"):
        session.prefill([[1] * 24, []])


def test_what_cannot_be_shared_or_inserted_is_one_clear_error():
    cache = replace(paged(2, 8, 4, 4), length=jnp.array([3, 0]))
    for row, source, n in [(1, 0, 4), (1, 0, 0), (0, 0, 3)]:
        with pytest.raises(ValueError, match=f"cannot begin with {n} tokens of row 0"):
            share(cache, row, source, n)
    with pytest.raises(ValueError, match="no row 2 in a batch of 2"):
        share(cache, 2, 0, 1)
    with pytest.raises(ValueError, match="no row 2 in a batch of 2"):
        cache.insert(2, floats(1, 8, 2))
    ring = replace(floats(2, 4, kind=RingCache), length=jnp.array([9, 0]))
    with pytest.raises(ValueError, match="a ring keeps the end of row 0"):
        share(ring, 1, 0, 5)
    assert share(ring, 1, 0, 9).length.tolist() == [9, 9]
    short = replace(ring, length=jnp.array([4, 0]))
    assert share(short, 1, 0, 2).length.tolist() == [4, 2]
    with pytest.raises(ValueError, match="does not fit into pages"):
        cache.insert(0, ring)
    with pytest.raises(ValueError, match="kv_cache must be 'float' or 'int8'"):
        am.load(kv_cache="int4")


@pytest.mark.parametrize("row", [-1, 2])
def test_a_traced_row_that_is_not_there_changes_nothing(row):
    x = normal(2, 6, K, H)
    cache, _, _ = write(paged(2, 8, 4, 4), x, x[..., :V], jnp.array([3, 6]))
    other, _, _ = write(floats(1, 8, 2), x[:1], x[:1, :, :, :V], jnp.array([5]))
    for change in (lambda c, r: c.insert(r, other), lambda c, r: c.evict(r)):
        after = jax.jit(change)(cache, jnp.int32(row))
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["float", "paged"])
def test_a_step_widens_no_cache_of_bfloat16(kind):
    """XLA for a CPU writes bfloat16 by way of float32: all layers, in each layer."""
    config = replace(TINY, dtype="bfloat16", context=512)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    cache = jax.eval_shape(lambda: init_cache(config, 3, 512, kind))
    (place,) = cache.places
    assert isinstance(place.k, HeadBits) and isinstance(place.v, HeadBits)
    tokens = jax.ShapeDtypeStruct((3,), jnp.int32)
    step = decode_step.lower(params, tokens, cache, config).compile()
    layers = place.k.bits.size
    found = re.findall(r"^ +%\S+ = (f32|bf16)\[([\d,]+)\]", step.as_text(), re.M)
    wide = [s for _, s in found if np.prod([*map(int, s.split(","))]) >= layers]
    assert len(found) > 100 and not wide


def test_bits_of_heads_are_the_heads():
    """Written, put, extended and read: as an array of bfloat16 would be."""
    x = normal(2, 4, K, H).astype(jnp.bfloat16)
    caches = [
        replace(floats(2, 8, 3, kind), k=k, v=k)
        for kind in (KVCache, RingCache)
        for k in (jnp.zeros((3, 2, 8, K, H), jnp.bfloat16),)
    ]
    for cache in caches:
        bits = CACHE_KINDS["float"].keep(cache)
        assert isinstance(bits.k, HeadBits) and bits.k.shape == cache.k.shape
        for at in (jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]]), jnp.array([[5], [9]])):
            mine = x[:, : at.shape[1]]
            cache, keys, _, where = cache.update(1, mine, mine, at)
            bits, kept, _, there = bits.update(1, mine, mine, at)
            np.testing.assert_array_equal(kept.astype(x.dtype), keys)
            np.testing.assert_array_equal(where, there)
        cache, bits = (c.insert(1, c.evict(1)) for c in (cache, bits))
        np.testing.assert_array_equal(bits.v.astype(x.dtype), cache.v)


def test_a_kind_is_chosen_once_and_counted_by_the_plan(tmp_path):
    model = am.load(dtype="float32", kv_cache="int8")
    (kept,) = Session(model, 1, 16).cache.places
    assert isinstance(kept.k, EightBitHeads) and type(kept) is KVCache
    streamed = am.load(dtype="float32", kv_cache="paged", stream=True)
    assert isinstance(Session(streamed, 1, 16).cache.places[0], PagedCache)
    text = "And the king said"
    plain = am.load(dtype="float32").generate(text, max_new_tokens=4)
    assert streamed.generate(text, max_new_tokens=4) == plain
    grok, mesh = am.PRESETS["grok-1"], abstract_mesh()
    half = cache_bytes(abstract_cache(grok, mesh, 1, 8192, "int8"))
    assert half == 2 * 64 * 8192 * 8 * (128 + 4)
    argv = ["generate", "--prompt", "x", "--kv-cache", "int8"]
    assert cli.make_parser("generate").parse_args(argv).kv_cache == "int8"
