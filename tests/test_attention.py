"""Attention against the release's recordings, float64, and its own claims."""

from dataclasses import replace
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe import attention, parallel
from annotated_moe.attention import (
    MASK_VALUE,
    Attention,
    AttentionSpec,
    absorb_block,
    attend,
    attend_any,
    attend_blockwise,
    attention_scores,
    causal_mask,
    is_past,
)
from annotated_moe.cache import PAD_POSITION, KVCache
from annotated_moe.params import get_parameter
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.rope import rope

RECORDED = np.load(Path(__file__).parent / "fixtures" / "attention.npz")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
NAMES = ("query", "key", "value", "linear")

# The recorded module: 4 query heads over 2 keys of 8, multiplier 0.35.
SPEC = AttentionSpec(4, 2, 8, 0.35, softcap=30.0)


def transformed(module):
    return hk.without_apply_rng(hk.transform(lambda *inputs: module()(*inputs)))


layer = transformed(SPEC.build)
run = jax.jit(layer.apply)

PLAIN = {
    f"multi_head_attention/{name}": {"w": jnp.asarray(RECORDED[f"mha.{name}"])}
    for name in NAMES
}
QUANTIZED = {
    f"multi_head_attention/{name}": {
        "w": QuantizedTensor(
            jnp.asarray(RECORDED[f"mha_quant.{name}.weight_i8"]),
            jnp.asarray(RECORDED[f"mha_quant.{name}.scales"], jnp.bfloat16),
        )
    }
    for name in NAMES
}

# Row 0 has six real tokens. Row 1 has an id 0 at position 2: what comes
# after it shows the release's fault.
SOUND = np.arange(9) < np.array([[6], [2]])


def normal(*shape, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype)


def counted(rows, tokens, start=0):
    start = np.broadcast_to(start, [rows])[:, None]
    return jnp.asarray(start + np.arange(tokens), jnp.int32)


def empty_cache(rows, slots, dtype=jnp.float32, kv=2, h=8):
    zeros = jnp.zeros([1, rows, slots, kv, h], dtype)
    return KVCache(zeros, zeros, jnp.zeros(rows, jnp.int32))


def recorded_cache(start, dtype):
    k, v = (jnp.asarray(RECORDED[f"mha_mem.{n}0"], dtype)[None] for n in "kv")
    return KVCache(k, v, start)


def run_case(case, dtype):
    """What this module makes of a recorded case: y, cache."""
    x = jnp.asarray(RECORDED["mha.x"], dtype)
    if case == "mha_nomem":
        return run(PLAIN, x, counted(2, 9))
    if case == "mha_prefill":
        return run(PLAIN, x, counted(2, 9), empty_cache(2, 9, dtype))
    if case == "mha_quant":
        return run(QUANTIZED, x[:1], counted(1, 9))
    over = case == "mha_mem_over"
    start = RECORDED["mha_mem_over.step0" if over else "mha_mem.step0"]
    x = jnp.asarray(RECORDED["mha_mem.x"], dtype)
    cache = recorded_cache(jnp.asarray(start), dtype)
    return run(PLAIN, x, counted(2, 1, start), cache)


def recorded(case, mode):
    """Recorded y, with the batch axis that `mha_quant` lost, and what to compare."""
    y = RECORDED[f"{case}.{mode}.y"]
    if case == "mha_quant":
        return y[None], SOUND[:1]
    rows = {"mha_mem_1tok": [[1], [1]], "mha_mem_over": [[1], [0]]}
    return y, np.array(rows[case], bool) if case in rows else SOUND


CASES = ["mha_nomem", "mha_prefill", "mha_mem_1tok", "mha_mem_over", "mha_quant"]


@pytest.mark.parametrize("case", CASES)
def test_matches_grok_1_in_float32(case):
    y, _ = run_case(case, jnp.float32)
    expected, sound = recorded(case, "f32")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[sound], expected[sound], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_matches_grok_1_in_bfloat16(case):
    """No further off than the release's own ways to run are from each other."""
    y, _ = run_case(case, jnp.bfloat16)
    runs = {}
    for mode in ("f32", "bf16", "bf16e"):
        expected, sound = recorded(case, mode)
        runs[mode] = expected[sound]

    def apart(a, b, of):
        return of(np.abs(a - b))

    y = np.asarray(y)[sound]
    pairs = (("f32", "bf16"), ("f32", "bf16e"), ("bf16", "bf16e"))
    for of in (np.max, np.mean):
        spread = max(apart(runs[a], runs[b], of) for a, b in pairs)
        nearest = min(apart(y, runs[mode], of) for mode in ("bf16", "bf16e"))
        assert 0 < nearest <= spread
    # and from the exact result no further, on the whole, than the release
    assert apart(y, runs["f32"], np.mean) <= apart(
        runs["bf16e"], runs["f32"], np.mean
    )


@pytest.mark.parametrize("mode", ["f32", "bf16"])
def test_writes_what_grok_1_writes(mode):
    dtype, atol = DTYPES[mode], {"f32": 1e-5, "bf16": 0.05}[mode]
    _, cache = run_case("mha_prefill", dtype)
    for name in "kv":
        written = np.asarray(getattr(cache, name)[0], np.float32)
        expected = RECORDED[f"mha_prefill.{mode}.{name}"]
        np.testing.assert_allclose(written, expected, rtol=0, atol=atol)
    if mode == "f32":
        _, cache = run_case("mha_mem_1tok", dtype)
        for name in "kv":
            expected = RECORDED[f"mha_mem_1tok.f32.{name}"]
            written = getattr(cache, name)[0]
            np.testing.assert_allclose(written, expected, rtol=0, atol=1e-5)


def heads_of(x, positions):
    def project(name, heads):
        w = PLAIN[f"multi_head_attention/{name}"]["w"]
        return (x @ w).reshape(*x.shape[:2], heads, 8)

    q, k = rope(project("query", 4), positions), rope(project("key", 2), positions)
    return q, k, project("value", 2)


def test_with_the_release_s_mask_every_token_matches():
    """Under `id > 0` too, padding and all: only the mask was different."""
    x = jnp.asarray(RECORDED["mha.x"])
    mask = causal_mask(counted(2, 9), 9)
    mask &= RECORDED["mha.key_padding_mask"][:, None] > 0
    y = attend(*heads_of(x, counted(2, 9)), mask, 0.35, 30.0)
    y = y.reshape(2, 9, -1) @ PLAIN["multi_head_attention/linear"]["w"]
    expected = RECORDED["mha_nomem.f32.y"]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_a_token_0_does_not_blind_its_row():
    """The release let row 1 see nothing; here an id has no say."""
    y, cache = run_case("mha_mem_1tok", jnp.float32)
    blinded = RECORDED["mha_mem_1tok_masked.f32.y"]
    np.testing.assert_allclose(y[0], blinded[0], rtol=0, atol=1e-5)
    assert np.abs(y[1] - blinded[1]).max() > 1
    # what the release computed for it: the plain mean of all slots
    mean = np.repeat(cache.v[0, 1].mean(0), 2, axis=0).reshape(-1)
    mean = mean @ PLAIN["multi_head_attention/linear"]["w"]
    np.testing.assert_allclose(mean, blinded[1, 0], rtol=0, atol=1e-5)


def test_past_the_end_nothing_is_overwritten():
    """Row 1 is at position 16 of 12 slots: the release wrote on slot 11."""
    y, cache = run_case("mha_mem_over", jnp.float32)
    k0, v0 = RECORDED["mha_mem.k0"], RECORDED["mha_mem.v0"]
    np.testing.assert_array_equal(cache.k[0, 1], k0[1])
    np.testing.assert_array_equal(cache.v[0, 1], v0[1])
    assert not np.allclose(RECORDED["mha_mem_over.f32.k"][1, 11], k0[1, 11])
    # row 0, at position 11, is the last that fits
    written = RECORDED["mha_mem_over.f32.k"][0]
    np.testing.assert_allclose(cache.k[0, 0], written, rtol=0, atol=1e-5)
    # and the token that found no place reads what is there
    at = counted(2, 1, RECORDED["mha_mem_over.step0"])
    q, _, _ = heads_of(jnp.asarray(RECORDED["mha_mem.x"]), at)
    expected = attend_in_float64(q[1:], k0[1:], v0[1:], [[11]], 0.35, 30.0)
    expected = expected.reshape(1, -1) @ PLAIN["multi_head_attention/linear"]["w"]
    np.testing.assert_allclose(y[1], expected, rtol=0, atol=1e-5)


def test_quantized_attention_takes_any_batch():
    """The release's quantized projection lost the batch axis."""
    x = jnp.asarray(RECORDED["mha.x"])
    both, _ = run(QUANTIZED, x, counted(2, 9))
    for row in range(2):
        alone, _ = run(QUANTIZED, x[row : row + 1], counted(1, 9))
        np.testing.assert_allclose(both[row], alone[0], rtol=0, atol=1e-5)


def attend_in_float64(q, k, v, positions, multiplier, softcap):
    """One token of one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, head in np.ndindex(q.shape[:3]):
        kv = head // (q.shape[2] // k.shape[2])
        until = min(positions[b][t] + 1, k.shape[1])
        s = k[b, :until, kv] @ q[b, t, head] * multiplier
        s = softcap * np.tanh(s / softcap) if softcap else s
        p = np.exp(s - s.max())
        y[b, t, head] = p @ v[b, :until, kv] / p.sum()
    return y


def qkv(tokens, slots, heads, kv, rows=2, h=16, dtype=jnp.float32, gain=1.0):
    return (
        gain * normal(rows, tokens, heads, h, seed=1, dtype=dtype),
        gain * normal(rows, slots, kv, h, seed=2, dtype=dtype),
        normal(rows, slots, kv, h, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("heads, kv", [(1, 1), (6, 6), (6, 1), (6, 2), (6, 3)])
def test_attend_matches_float64(heads, kv, softcap):
    q, k, v = qkv(5, 11, heads, kv)
    positions = counted(2, 5, [0, 6])
    mask = causal_mask(positions, 11)
    y = attend(q, k, v, mask, 0.7, softcap)
    expected = attend_in_float64(q, k, v, positions, 0.7, softcap)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_grouped_queries_are_multi_head_with_repeated_keys():
    q, k, v = qkv(5, 11, 6, 2)
    mask = causal_mask(counted(2, 5), 11)
    shared = attend(q, k, v, mask, 0.7, 30.0)
    k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    own = attend(q, k, v, mask, 0.7, 30.0)
    np.testing.assert_allclose(shared, own, rtol=0, atol=1e-6)


def test_scores_stay_float32_in_bfloat16():
    """A bfloat16 has a unit of 0.25 at 40: these scores need finer ones."""
    q, k, _ = qkv(8, 64, 2, 1, h=64, dtype=jnp.bfloat16)
    s = attention_scores(q, k, 1.0)
    assert s.dtype == jnp.float32
    exact = np.einsum(
        "bthd,bsd->bhts", np.asarray(q, np.float64), np.asarray(k[:, :, 0], np.float64)
    )
    np.testing.assert_allclose(s[:, 0], exact, rtol=0, atol=1e-4)


def test_capped_scores_stay_in_their_band():
    q, k, _ = qkv(8, 64, 2, 1, gain=20.0)
    assert np.abs(attention_scores(q, k, 1.0)).max() > 1000
    capped = attention_scores(q, k, 1.0, 30.0)
    assert 29 < np.abs(capped).max() <= 30
    assert (jax.nn.softmax(capped) > 0).all()


def test_causal_mask_sees_itself_and_the_past():
    mask = causal_mask(jnp.array([[0, 1], [3, 9]]), 4)
    expected = [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_the_future_has_no_influence():
    params = layer.init(jax.random.key(0), normal(1, 1, 32), counted(1, 1))
    x = normal(1, 8, 32)
    whole, _ = run(params, x, counted(1, 8))
    changed, _ = run(params, x.at[:, 5:].add(100.0), counted(1, 8))
    np.testing.assert_array_equal(whole[:, :5], changed[:, :5])
    assert np.abs(whole[:, 5] - changed[:, 5]).max() > 0.1


@pytest.mark.parametrize("dtype, atol", [("float32", 5e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_cached_is_uncached(chunk, dtype, atol):
    x = jnp.asarray(normal(3, 12, 32), dtype)
    whole, _ = run(PLAIN, x, counted(3, 12))
    cache, parts = empty_cache(3, 20, dtype), []
    for t in range(0, 12, chunk):
        now = slice(t, t + chunk)
        y, cache = run(PLAIN, x[:, now], counted(3, 12)[:, now], cache)
        parts.append(y)
    y = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(y, whole, rtol=0, atol=atol)


def test_rows_of_different_length_decode_together():
    lengths, programs = np.array([3, 7, 1, 5]), []
    x = normal(4, 12, 32)

    @jax.jit
    def step(*inputs):
        programs.append(inputs[0].shape)
        return layer.apply(PLAIN, *inputs)

    real = np.arange(8) < lengths[:, None]
    at = jnp.where(real, counted(4, 8), PAD_POSITION)
    junk = np.where(real, 0.0, 1000.0)[..., None]
    _, cache = step(x[:, :8] + junk, at, empty_cache(4, 12))
    assert np.abs(cache.v).max() < 100
    for i in range(4):
        token = np.take_along_axis(x, (lengths + i)[:, None, None], axis=1)
        y, cache = step(jnp.asarray(token), counted(4, 1, lengths + i), cache)
        for row, n in enumerate(lengths + i):
            one = slice(row, row + 1)
            alone, _ = run(PLAIN, x[one, : n + 1], counted(1, n + 1))
            np.testing.assert_allclose(y[row, 0], alone[0, n], rtol=0, atol=5e-6)
    assert programs == [(4, 8, 32), (4, 1, 32)]


def test_layers_of_one_cache_do_not_touch():
    zeros = jnp.zeros([3, 2, 9, 2, 8])
    cache = KVCache(zeros, zeros, jnp.zeros(2, jnp.int32))
    x = jnp.asarray(RECORDED["mha.x"])
    y, cache = layer.apply(PLAIN, x, counted(2, 9), cache, 1)
    np.testing.assert_allclose(y, run_case("mha_nomem", jnp.float32)[0], atol=1e-5)
    assert cache.k[1].all() and not cache.k[::2].any() and not cache.v[::2].any()
    traced = run(PLAIN, x, counted(2, 9), KVCache(zeros, zeros, cache.length), 2)[1]
    np.testing.assert_allclose(traced.k[2], cache.k[1], rtol=0, atol=1e-5)


def blockwise(q, k, v, positions, softcap, **options):
    at = counted(len(k), k.shape[1])
    return attend_blockwise(q, k, v, positions, at, 0.7, softcap, **options)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("block", [1, 7, 16, 64])
def test_blockwise_is_plain(block, softcap):
    q, k, v = qkv(9, 40, 6, 2, rows=3)
    positions = counted(3, 9, [0, 13, 31])
    plain = attend(q, k, v, causal_mask(positions, 40), 0.7, softcap)
    blocks = blockwise(q, k, v, positions, softcap, block=block)
    np.testing.assert_allclose(blocks, plain, rtol=0, atol=3e-6)


def test_blockwise_is_plain_in_bfloat16():
    q, k, v = qkv(9, 40, 6, 2, rows=3, dtype=jnp.bfloat16)
    positions = counted(3, 9, [0, 13, 31])
    blocks = blockwise(q, k, v, positions, 30.0, block=16)
    assert blocks.dtype == jnp.bfloat16
    exact = attend_in_float64(q, k, v, positions, 0.7, 30.0)
    off = np.abs(np.asarray(blocks, np.float64) - exact)
    assert off.max() < 0.03 and off.mean() < 0.004


def test_blockwise_never_sees_its_own_padding():
    """A position past the end sees the slots there are, as `attend` does."""
    q, k, v = qkv(3, 10, 2, 1)
    positions = counted(2, 3, [9, 40])
    plain = attend(q, k, v, causal_mask(positions, 10), 0.7, 30.0)
    blocks = blockwise(q, k, v, positions, 30.0, block=16)
    np.testing.assert_allclose(blocks, plain, rtol=0, atol=3e-6)


def test_blockwise_has_the_same_gradient():
    q, k, v = qkv(9, 40, 6, 2)
    positions = counted(2, 9, [0, 31])

    def energy(attention):
        return jax.grad(lambda *x: jnp.sum(attention(*x) ** 2), argnums=(0, 1, 2))

    plain = energy(lambda *x: attend(*x, causal_mask(positions, 40), 0.7, 30.0))
    blocks = energy(lambda *x: blockwise(*x, positions, 30.0, block=16))
    for a, b in zip(plain(q, k, v), blocks(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)


def scratch(attention, tokens):
    def shape(heads):
        return jax.ShapeDtypeStruct((1, tokens, heads, 32), jnp.float32)

    at = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    program = jax.jit(attention).lower(shape(2), shape(1), shape(1), at)
    return program.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_tokens_not_their_square():
    def plain(q, k, v, at):
        return attend(q, k, v, causal_mask(at, k.shape[1]), 0.2, 30.0)

    def blocks(q, k, v, at):
        return attend_blockwise(q, k, v, at, at, 0.2, 30.0)

    assert scratch(plain, 8192) > 3.5 * scratch(plain, 4096)
    assert scratch(blocks, 8192) < 2.2 * scratch(blocks, 4096)
    assert scratch(blocks, 8192) < scratch(plain, 8192) / 8


@pytest.mark.parametrize(
    "tokens, slots, expected", [(1, 1025, False), (2, 1024, False), (2, 1025, True)]
)
def test_blocks_are_used_where_scores_would_be_many(
    tokens, slots, expected, monkeypatch
):
    used = []

    def spy(*inputs):
        used.append(inputs[0].shape)
        return attend_blockwise(*inputs)

    monkeypatch.setattr(attention, "attend_blockwise", spy)
    x, at = normal(1, tokens, 32), counted(1, tokens, 1000)
    y, _ = layer.apply(PLAIN, x, at, empty_cache(1, slots))
    assert bool(used) == expected and np.isfinite(y).all()


def test_a_long_prompt_is_the_same_block_by_block(monkeypatch):
    x, at = normal(1, 1100, 32), counted(1, 1100)
    blocks, _ = layer.apply(PLAIN, x, at)
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 2000)
    plain, _ = layer.apply(PLAIN, x, at)
    np.testing.assert_allclose(blocks, plain, rtol=0, atol=1e-5)


def test_parameters_carry_the_checkpoint_s_names():
    params = layer.init(jax.random.key(0), normal(1, 1, 32), counted(1, 1))
    shapes = {path: w["w"].shape for path, w in params.items()}
    assert shapes == {path: w["w"].shape for path, w in PLAIN.items()}


@pytest.mark.parametrize("data, model", [(1, 2), (2, 4)])
def test_a_mesh_changes_nothing(data, model):
    x = jnp.asarray(RECORDED["mha.x"])
    cache = empty_cache(2, 12)
    whole, kept = run(PLAIN, x, counted(2, 9), cache)
    copies = max(1, model // 2)                 # of each of two key heads
    held = replace(cache, k=jnp.repeat(cache.k, copies, 3),
                   v=jnp.repeat(cache.v, copies, 3))
    with jax.set_mesh(parallel.make_mesh(data=data, model=model)):
        assert SPEC.empty_cache(1, 2, 12, x.dtype).k.shape == held.k.shape
        split, new = jax.jit(layer.apply)(PLAIN, x, counted(2, 9), held)
        if copies > 1:
            with pytest.raises(ValueError, match="cache of 2 heads, where 4 come"):
                layer.apply(PLAIN, x, counted(2, 9), cache)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)
    for i in range(copies):
        np.testing.assert_allclose(new.k[:, :, :, i::copies], kept.k, atol=1e-5)


def test_a_layer_without_rope_and_with_wide_values():
    """Values of a size of their own, as the projections' shapes say."""
    spec = replace(SPEC, rope=None, value_size=5, bias=True)
    odd = transformed(spec.build)
    x = normal(2, 6, 32)
    params = odd.init(jax.random.key(0), x, counted(2, 6))
    shapes = {path: {n: w.shape for n, w in of.items()} for path, of in params.items()}
    assert shapes == {
        "multi_head_attention/query": {"w": (32, 32), "b": (32,)},
        "multi_head_attention/key": {"w": (32, 16), "b": (16,)},
        "multi_head_attention/value": {"w": (32, 10), "b": (10,)},
        "multi_head_attention/linear": {"w": (20, 32), "b": (32,)},
    }
    params = jax.tree.map(lambda w: w + 0.1, params)
    cache = spec.empty_cache(1, 2, 6, jnp.float32)
    assert cache.k.shape[-1] == 8 and cache.v.shape[-1] == 5
    y, cache = odd.apply(params, x, counted(2, 6), cache)

    def project(name):
        of = params[f"multi_head_attention/{name}"]
        return np.float64(x) @ np.float64(of["w"]) + np.float64(of["b"])

    q = project("query").reshape(2, 6, 4, 8)
    k = project("key").reshape(2, 6, 2, 8)
    v = project("value").reshape(2, 6, 2, 5)
    expected = attend_in_float64(q, k, v, counted(2, 6), 0.35, 30.0)
    of = params["multi_head_attention/linear"]
    expected = expected.reshape(2, 6, -1) @ np.float64(of["w"]) + np.float64(of["b"])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cache.v[0], v, rtol=0, atol=1e-5)


class Sinks(Attention):
    """One more score a query head, which takes weight and gives nothing."""

    @hk.transparent
    def per_head(self):
        heads = self.spec.q_heads
        return {"sink": get_parameter("sink", (heads,), ("heads",), jnp.ones)}

    def attend(self, q, k, v, positions, key_positions, sink):
        s = attention_scores(q, k, self.spec.multiplier, self.spec.softcap)
        mask = self.spec.mask.sees(positions[..., None], key_positions[:, None])
        s = jnp.where(mask[:, None, None], s, MASK_VALUE)
        sink = sink.reshape(1, k.shape[2], -1, 1, 1)
        top = jnp.maximum(s.max(-1, keepdims=True), sink)
        p = jnp.exp(s - top)
        p /= p.sum(-1, keepdims=True) + jnp.exp(sink - top)
        return jnp.einsum("bkrts,bskh->btkrh", p, v).reshape(q.shape)


def test_a_family_may_add_parameters_of_heads_and_attend_its_own_way():
    """What a mesh cuts by heads is cut for them too."""
    x, at = jnp.asarray(RECORDED["mha.x"]), counted(2, 9)
    odd = transformed(lambda: Sinks(SPEC))
    params = odd.init(jax.random.key(0), x, at)
    assert params["multi_head_attention"]["sink"].shape == (4,)
    gone = {**PLAIN, "multi_head_attention": {"sink": jnp.full(4, -1e9)}}
    plain, _ = run(PLAIN, x, at)
    np.testing.assert_allclose(odd.apply(gone, x, at)[0], plain, rtol=0, atol=1e-5)
    each = {**PLAIN, "multi_head_attention": {"sink": jnp.arange(4.0)}}
    whole, _ = odd.apply(each, x, at)
    assert np.abs(whole - plain).max() > 0.1
    with jax.set_mesh(parallel.make_mesh(data=1, model=2)):
        split, _ = jax.jit(odd.apply)(each, x, at)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [64, 1500])
def test_any_mask_is_the_same_in_blocks(slots):
    """A mask of one's own, over keys that lie in any order."""

    def near(q, k):
        return is_past(q, k) & (k > q - 5)

    q, k, v = qkv(6, slots, 6, 2)
    order = np.random.default_rng(7).permuted(np.tile(np.arange(slots), (2, 1)), axis=1)
    order[:, :3] = -1                                   # nothing written there
    at, positions = jnp.asarray(order, jnp.int32), counted(2, 6, [10, 40])
    mask = near(positions[..., None], at[:, None])
    assert (mask.sum(-1) <= 5).all() and mask.any(-1).all()
    y = attend_any(q, k, v, positions, at, 0.7, 30.0, near)
    plain = attend(q, k, v, mask, 0.7, 30.0)
    np.testing.assert_allclose(y, plain, rtol=0, atol=3e-6)


def test_a_hidden_block_leaves_nothing_behind():
    """Before any score was seen, and after."""
    v = normal(1, 4, 1, 2)
    s = normal(1, 1, 1, 3, 4, seed=5)
    hidden = jnp.full_like(s, MASK_VALUE)
    state = jnp.full((1, 1, 1, 3), MASK_VALUE), jnp.zeros((1, 1, 1, 3))
    state = (*state, jnp.zeros((1, 1, 1, 3, 2)))
    for scores, values in ((hidden, v + 9), (s, v), (hidden, v - 9)):
        state = absorb_block(state, scores, values)
    _, total, y = state
    expected = jax.nn.softmax(s) @ v[:, :, 0]
    np.testing.assert_allclose(y / total[..., None], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"q_heads": 5}, "5 query heads cannot share 2 key heads"),
        ({"kv_heads": 0}, "kv_heads must be an int of 1 or more: 0"),
        ({"head_size": 7}, "even head_size, not 7"),
        ({"softcap": 0.0}, "softcap must be a number above 0 or None: 0.0"),
        ({"softcap": -30.0}, "softcap must be a number above 0 or None: -30.0"),
        ({"rope": "yes"}, "rope must be Rope or None: 'yes'"),
        ({"bias": 1}, "bias must be true or false: 1"),
    ],
)
def test_impossible_sizes_are_one_clear_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **sizes)


def test_an_odd_head_is_fine_without_rope():
    assert replace(SPEC, head_size=7, rope=None).value_width == 7


def test_bad_arguments_are_one_clear_error():
    q, k, v = qkv(3, 10, 3, 2)
    mask = causal_mask(counted(2, 3), 10)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attend(q, k, v, mask, 0.7)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        blockwise(q, k, v, counted(2, 3), None)
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        blockwise(q[:, :, :2], k, v, counted(2, 3), None, block=0)
    with pytest.raises(ValueError, match="a cache of 3 heads, where 2 come in"):
        layer.apply(PLAIN, normal(2, 1, 32), counted(2, 1), empty_cache(2, 4, kv=3))
