"""Caches: what is written, looked at, inserted and evicted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from annotated_moe import parallel
from annotated_moe.attention import AttentionSpec, Causal, Window, attend, attend_any
from annotated_moe.cache import (
    PAD_POSITION,
    KVCache,
    RingCache,
    end_after,
    write_cache,
)

K, H, V = 2, 4, 3


def normal(*shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype)


def counted(rows, tokens, start=0):
    start = np.broadcast_to(start, [rows])[:, None]
    return jnp.asarray(start + np.arange(tokens), jnp.int32)


def empty(kind, rows, slots, layers=1):
    k = jnp.zeros((layers, rows, slots, K, H))
    return kind(k, jnp.zeros((*k.shape[:-1], V)), jnp.zeros(rows, jnp.int32))


@pytest.mark.parametrize("compiled", [False, True])
def test_writes_only_where_told(compiled):
    write = jax.jit(write_cache) if compiled else write_cache
    stack = normal(3, 2, 5, 1, 4)
    x = normal(2, 2, 1, 4, seed=1)
    expected = np.array(stack)
    expected[1, 0, 3:5] = x[0]
    expected[1, 1, 0:2] = x[1]
    at = jnp.array([[3, 4], [0, 1]])
    np.testing.assert_array_equal(write(stack, jnp.int32(1), x, at), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("first", [-7, -1, 4, 5, 6, PAD_POSITION, 2**31 - 2])
def test_a_write_outside_is_dropped(first, dtype):
    stack = normal(1, 1, 5, 1, 4, dtype=dtype)
    x = normal(1, 2, 1, 4, seed=1)
    at = jnp.array([[first, first + 1]], jnp.int32)
    after = write_cache(stack, 0, x, at)
    expected = np.array(stack)
    for i, slot in enumerate([first, first + 1]):
        if 0 <= slot < 5:
            expected[0, 0, slot] = x[0, i].astype(dtype)
    assert after.dtype == dtype
    np.testing.assert_array_equal(after, expected)


def memory_of(function, *shapes):
    program = jax.jit(function, donate_argnums=0).lower(*shapes).compile()
    return program.memory_analysis()


def test_neither_a_write_nor_a_row_needs_a_copy_of_the_cache():
    cache = jax.eval_shape(lambda: empty(KVCache, 4, 4096, layers=8))
    other = jax.eval_shape(lambda: empty(KVCache, 1, 64, layers=8))
    x = jax.ShapeDtypeStruct((4, 1, K, H), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    at = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    for memory in (
        memory_of(write_cache, cache.k, index, x, at),
        memory_of(lambda c, row, o: c.insert(row, o), cache, index, other),
    ):
        assert memory.temp_size_in_bytes < 100_000 < memory.output_size_in_bytes


def test_update_hands_back_its_layer_and_touches_no_other():
    cache = empty(KVCache, 2, 5, layers=3)
    k, v, at = normal(2, 2, K, H), normal(2, 2, K, V, seed=1), counted(2, 2, [0, 3])
    new, keys, values, key_positions = cache.update(1, k, v, at)
    np.testing.assert_array_equal(key_positions, counted(2, 5))
    for row, start in enumerate([0, 3]):
        np.testing.assert_array_equal(keys[row, start : start + 2], k[row])
        np.testing.assert_array_equal(values[row, start : start + 2], v[row])
    assert np.count_nonzero(keys) == k.size and np.count_nonzero(values) == v.size
    np.testing.assert_array_equal(new.k[1], keys)
    assert not new.k[::2].any() and not new.v[::2].any()
    np.testing.assert_array_equal(new.length, cache.length)


KINDS = {"all": (KVCache, Causal()), "window": (RingCache, Window(5))}


def steps_of(kind, mask, q, k, v, cache, positions):
    cache, keys, values, at = cache.update(0, k, v, positions)
    end = jnp.where(positions < PAD_POSITION, positions + 1, 0).max(axis=1)
    cache = replace(cache, length=jnp.maximum(cache.length, end))
    return attend_any(q, keys, values, positions, at, 0.5, None, mask.sees), cache


def heads(rows, tokens, seed=0):
    """Queries, keys and values."""
    return (
        normal(rows, tokens, 2 * K, H, seed=seed),
        normal(rows, tokens, K, H, seed=seed + 1),
        normal(rows, tokens, K, V, seed=seed + 2),
    )


def by_definition(mask, q, k, v):
    """All of a text at once, without a cache."""
    at = counted(len(q), q.shape[1])
    return attend(q, k, v, mask.sees(at[..., None], at[:, None]), 0.5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 14])
def test_in_pieces_is_at_once(name, chunk):
    kind, mask = KINDS[name]
    whole = heads(2, 14)
    cache = empty(kind, 2, 5 if name == "window" else 14)
    parts = []
    for t in range(0, 14, chunk):
        now = [x[:, t : t + chunk] for x in whole]
        at = counted(2, now[0].shape[1], t)
        y, cache = steps_of(kind, mask, *now, cache, at)
        parts.append(y)
    y = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(y, by_definition(mask, *whole), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_evicted_and_another_conversation_takes_it(name):
    """Its neighbours see nothing of it, and it sees nothing of the old one."""
    kind, mask = KINDS[name]
    slots = 5 if name == "window" else 20
    first, second = heads(3, 20), heads(1, 20, seed=10)
    lengths = np.array([7, 9, 4])
    at = counted(3, 9)
    at = jnp.where(at < lengths[:, None], at, PAD_POSITION)
    prompt = [x[:, :9] for x in first]
    _, cache = steps_of(kind, mask, *prompt, empty(kind, 3, slots), at)
    assert cache.length.tolist() == [7, 9, 4]

    small = 5 if name == "window" else 8
    part = [x[:, :6] for x in second]
    _, other = steps_of(kind, mask, *part, empty(kind, 1, small), counted(1, 6))
    cache = cache.evict(1)
    assert cache.length.tolist() == [7, 0, 4]
    cache = jax.jit(lambda c, row, o: c.insert(row, o))(cache, 1, other)
    assert cache.length.tolist() == [7, 6, 4]

    joined = [x.at[1].set(y[0]) for x, y in zip(first, second, strict=True)]
    expected = by_definition(mask, *joined)
    for _ in range(8):
        at = cache.length[:, None]
        now = [jnp.take_along_axis(x, at[..., None, None], axis=1) for x in joined]
        y, cache = steps_of(kind, mask, *now, cache, at)
        for row, n in enumerate(np.asarray(at)[:, 0]):
            np.testing.assert_allclose(y[row, 0], expected[row, n], rtol=0, atol=2e-6)


def test_an_evicted_row_can_be_filled_in_place():
    """Without `insert`: a shorter text over the longer one that was there."""
    old, new = heads(1, 12), heads(1, 6, seed=20)
    _, cache = steps_of(KVCache, Causal(), *old, empty(KVCache, 1, 12), counted(1, 12))
    y, cache = steps_of(KVCache, Causal(), *new, cache.evict(0), counted(1, 6))
    assert cache.length.tolist() == [6] and cache.k[0, 0, 6:].all()
    np.testing.assert_allclose(y, by_definition(Causal(), *new), rtol=0, atol=2e-6)


def test_room():
    assert empty(KVCache, 1, 7).room == 7
    assert empty(RingCache, 1, 7).room is None


def test_what_does_not_fit_is_one_clear_error(monkeypatch):
    # Without the signatures' own checks, as in use.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    cache = empty(KVCache, 2, 6, layers=2)
    k, v = normal(2, 1, K, H), normal(2, 1, K, V)
    for absent in (-1, 2):
        with pytest.raises(ValueError, match=f"no layer {absent} in a cache of 2"):
            cache.update(absent, k, v, counted(2, 1))
    with pytest.raises(ValueError, match="does not fit cache"):
        write_cache(cache.k, 0, normal(2, 1, K + 1, H), counted(2, 1))
    with pytest.raises(ValueError, match="7 slots do not fit into 6"):
        cache.insert(0, empty(KVCache, 1, 7, layers=2))
    with pytest.raises(ValueError, match="a ring of 4 slots is none of 6"):
        empty(RingCache, 2, 6).insert(0, empty(RingCache, 1, 4))
    for absent in (-1, 2):
        with pytest.raises(ValueError, match=f"no row {absent} in a batch of 2"):
            cache.insert(absent, empty(KVCache, 1, 6, layers=2))
        with pytest.raises(ValueError, match=f"no row {absent} in a batch of 2"):
            cache.evict(absent)


@pytest.mark.parametrize("row", [-1, 2, 9])
def test_a_traced_row_that_is_not_there_changes_nothing(row):
    """Neither the last row, as a clamped write would, nor one from the end."""
    cache = replace(empty(KVCache, 2, 6), length=jnp.array([3, 4]))
    cache = replace(cache, k=normal(*cache.k.shape))
    other = replace(empty(KVCache, 1, 6), length=jnp.array([5]))
    for change in (lambda c, r: c.insert(r, other), lambda c, r: c.evict(r)):
        after = jax.jit(change)(cache, jnp.int32(row))
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(a, b)


def test_shapes_and_axes_may_stand_for_arrays():
    cache = empty(KVCache, 2, 6)
    shapes = jax.eval_shape(lambda: cache)
    assert isinstance(shapes, KVCache) and shapes.v.shape == (1, 2, 6, K, V)
    arrays, names = jax.tree.leaves(cache), [cache.axes.k, cache.axes.v]
    assert all(len(n) == a.ndim for n, a in zip([*names, cache.axes.length], arrays))


def test_a_spec_makes_the_cache_that_its_mask_needs():
    spec = AttentionSpec(4, 2, 8, 0.35)
    full = spec.empty_cache(3, 2, 100, jnp.bfloat16)
    assert type(full) is KVCache and full.k.shape == (3, 2, 100, 2, 8)
    assert full.k.dtype == jnp.bfloat16 and full.length.tolist() == [0, 0]
    ring = replace(spec, mask=Window(16)).empty_cache(3, 2, 100, jnp.float32)
    assert type(ring) is RingCache and ring.slots == 16
    short = replace(spec, mask=Window(16)).empty_cache(3, 2, 10, jnp.float32)
    assert short.slots == 10


def test_a_row_is_inserted_on_a_mesh():
    cache = empty(KVCache, 4, 6)
    other = replace(empty(KVCache, 1, 6), k=normal(1, 1, 6, K, H))
    whole = cache.insert(2, other)
    mesh = parallel.make_mesh(data=2, model=2)
    specs = jax.tree.map(
        parallel.partition_spec, cache.axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    placed = jax.device_put(cache, parallel.shardings(specs, mesh))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda c, o: c.insert(2, o))(placed, other)
    np.testing.assert_array_equal(split.k, whole.k)


def test_padding_adds_no_length():
    positions = jnp.array([[7, PAD_POSITION], [PAD_POSITION] * 2], jnp.int32)
    assert end_after(jnp.array([7, 4]), positions).tolist() == [8, 4]


def test_a_ring_shows_new_tokens_as_it_keeps_them():
    cache = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, empty(RingCache, 1, 5))
    k, v = normal(1, 3, K, H), normal(1, 3, K, V)
    new, keys, values, _ = cache.update(0, k, v, counted(1, 3))
    assert keys.dtype == values.dtype == new.k.dtype == jnp.bfloat16
