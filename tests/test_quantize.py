"""8-bit weights for every family: how far they are off, and the files."""

import functools
from dataclasses import replace

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints, convert, model
from annotated_moe.attention import (
    AttentionSpec,
    Chunk,
    NormedAttentionSpec,
    UnitAttentionSpec,
    Window,
)
from annotated_moe.checkpoints import groups_for
from annotated_moe.config import LayerSpec, ModelConfig, Segment, place_of
from annotated_moe.families.grok import grok_config
from annotated_moe.formats import lazy
from annotated_moe.formats.files import CheckpointError
from annotated_moe.model import flat_specs
from annotated_moe.moe import FeedForwardSpec, MoESpec, Route, SharedMoESpec
from annotated_moe.params import ParamSpec
from annotated_moe.quantization import as_float, change_bound, dequantize, quantize
from annotated_moe.rope import Rope

HEADS = (4, 2, 8, 8**-0.5)


def of(*pattern, repeats=1, **sizes):
    return ModelConfig(
        48, 64, 32, (Segment(pattern, repeats),), dtype="float32", **sizes)


def experts(router, **more):
    return MoESpec(4, 2, 48, "silu", router, **more)


DENSE, ROPE = FeedForwardSpec(40, "silu"), Rope()
NORMED = NormedAttentionSpec(*HEADS, rope=ROPE)
FAR = UnitAttentionSpec(*HEADS, floor=4, scale=0.5)
NEAR = UnitAttentionSpec(*HEADS, rope=ROPE, mask=Chunk(8), qk_norm_eps=1e-5)
SHARED = SharedMoESpec(
    4, 1, 48, "silu", "sigmoid", shared=FeedForwardSpec(48, "silu"), gate_input=True)
FAMILY = {
    "llama": of(
        LayerSpec(AttentionSpec(*HEADS, rope=ROPE, bias=True),
                  FeedForwardSpec(48, "silu", True)), repeats=2),
    "mixtral": of(
        LayerSpec(AttentionSpec(*HEADS, rope=ROPE, mask=Window(7)),
                  experts("top_k_softmax")), repeats=2),
    "qwen": of(
        LayerSpec(NORMED, experts("top_k_softmax")), LayerSpec(NORMED, DENSE),
        tied=True),
    "olmoe": of(
        LayerSpec(NormedAttentionSpec(
            *HEADS, rope=ROPE, whole_norm=True, clip=0.7), experts("softmax_top_k")),
        repeats=2),
    "llama4": of(LayerSpec(NEAR, DENSE), LayerSpec(FAR, SHARED)),
    "grok": grok_config(
        vocab_size=48, context=64, d_model=32, d_ff=48, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=4, embedding_multiplier=32**0.5,
        attn_multiplier=8**-0.5, dtype="float32"),
}
TOKENS = np.random.default_rng(5).integers(1, 48, (3, 20))


def random_params(config, seed=7):
    rng, params = np.random.default_rng(seed), {}
    for (module, leaf), spec in flat_specs(config).items():
        w = rng.standard_normal(spec.shape)
        if leaf == "w":
            w *= spec.shape[-2] ** -0.5 * (4 if "router" in module else 1)
        elif leaf == "scale":
            w = 1 + 0.2 * w
        params.setdefault(module, {})[leaf] = jnp.asarray(w, jnp.float32)
    return params


def matrices(config, params):
    """(path, a matrix without its stack) of all that may be quantized."""
    for (module, leaf), spec in flat_specs(config).items():
        w = params[module][leaf]
        if spec.matrix:
            for i in np.ndindex(w.shape[:-2]):
                yield module, leaf, i, w


def roomy(config):
    """The model with seats for all, so that its training way drops nothing."""
    def wider(layer):
        part = layer.feed_forward
        if isinstance(part, MoESpec):
            part = replace(part, capacity_factor=float(part.num_experts))
        return replace(layer, feed_forward=part)

    return replace(config, layers=tuple(
        replace(s, pattern=tuple(map(wider, s.pattern))) for s in config.layers))


def with_gradient(config, tokens, params):
    """Logits [B, T, V] by the way that has a gradient, and the chosen experts.

    The same function as `Model.logits`; the test compares the two.
    """
    chosen, config = [], roomy(config)

    def spy(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(y, Route):
            chosen.append(jnp.sort(y.experts).reshape(*tokens.shape, -1))
        return y

    table = params["in_out_embed"]["embeddings"]
    h = model.embed(table, jnp.asarray(tokens), config)
    b, t = tokens.shape
    positions, real = model.positions_of(jnp.zeros(b, jnp.int32), t)
    with hk.intercept_methods(spy):
        for layer in range(config.num_layers):
            place, i = place_of(config, layer)
            stacks = model.place_params(params, place)
            own = jax.tree.map(lambda w, i=i: w[i], stacks)
            h, *_ = model.apply_layer(
                own, place, config, h, positions, real, train="capacity")
    return model.unembed(params, h, config, train=True), chosen


def sent_alike(config, shape, ours, theirs):
    """[B, T], True for tokens that no flipped choice has reached.

    It reaches all tokens behind it, which look back; in the last layer itself.
    """
    last = isinstance(config.layer(config.num_layers - 1).feed_forward, MoESpec)
    reached = np.zeros(shape, bool)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        flips = np.asarray(a != b).any(-1)
        final = last and i == len(ours)
        reached |= flips if final else np.logical_or.accumulate(flips, axis=1)
    return ~reached


def in_8_bits(config, params):
    run = jax.jit(lambda params: checkpoints.quantize_params(params, config))
    return run(params)


@functools.cache
def reader(config):
    """One program: logits, choices, and the bounds of the logits `at`.

    The gradients are taken one after the other: vmapped over many, XLA's CPU
    compiler (JAX 0.10.2) gets that of a norm over few features wrong.
    """
    def read(params, quantized, tokens, at):
        def pick(params):
            logits, chosen = with_gradient(config, tokens, params)
            return logits[at], (logits, chosen)

        y, back, (logits, chosen) = jax.vjp(pick, params, has_aux=True)
        bounds = jax.lax.map(
            lambda one: change_bound(back(one)[0], quantized), jnp.eye(len(y))
        )
        return logits, chosen, bounds

    return jax.jit(read, compiler_options={"xla_backend_optimization_level": 0})


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def held_to_the_bound(config, params, quantized, tokens, count=64):
    """|change| / worst and change / typical of sampled logits, and the tokens
    whose choices did not stay, for which no bound is derived: [B, T]."""
    rng = np.random.default_rng(3)
    sizes = *tokens.shape, config.vocab_size
    at = tuple(rng.integers(0, size, count) for size in sizes)
    read = reader(config)
    want, ours, (worst, typical) = read(params, quantized, tokens, at)
    whole = {
        m: {n: as_float(w) for n, w in ws.items()} for m, ws in quantized.items()}
    other, theirs, _ = read(whole, quantized, tokens, at)
    got = np.asarray(am.Model(config, quantized).logits(tokens))
    np.testing.assert_allclose(got, other, atol=1e-4)
    alike = sent_alike(config, tokens.shape, ours, theirs)
    change, keep = got[at] - np.asarray(want)[at], alike[at[:2]]
    return np.abs(change / worst)[keep], (change / typical)[keep], ~alike


@pytest.mark.parametrize("name", [
    name if name in ("grok", "qwen", "llama4")
    else pytest.param(name, marks=pytest.mark.full) for name in FAMILY
])  # fmt: skip
def test_products_and_logits_of_every_family_are_within_the_bound(name):
    config, params = FAMILY[name], random_params(FAMILY[name])
    quantized = in_8_bits(config, params)
    x = np.random.default_rng(1).standard_normal((6, 48)).astype(np.float32)
    count, ratios = 0, []
    for module, leaf, i, w in matrices(config, params):
        q = quantized[module][leaf]
        rows, times = x[:, : w.shape[-2]], w.shape[-2] // q.scales.shape[-2]
        step = np.asarray(q.scales[i], np.float32).repeat(times, 0)
        error = rows @ (np.asarray(q.weight[i]) * step - np.asarray(w[i]))
        worst = np.abs(rows) @ step / 2
        typical = np.sqrt(rows**2 @ step**2 / 12)
        assert (np.abs(error) <= worst + 1e-5).all(), module
        ratios.append(np.sqrt(np.mean((error / typical) ** 2)))
        count += 1
    assert count >= 14 and 0.8 < np.mean(ratios) < 1.2
    worst, typical, flipped = held_to_the_bound(config, params, quantized, TOKENS)
    print(name, len(worst), worst.max(), rms(typical), flipped.sum())
    assert worst.max() <= 1 and 0.75 < rms(typical) < 1.3
    assert len(worst) >= 32 and flipped.mean() < 0.4


def test_the_bound_notices_scales_of_another_group():
    config, params = FAMILY["mixtral"], random_params(FAMILY["mixtral"])
    quantized = in_8_bits(config, params)
    name = "decoder_layer/multi_head_attention/linear"
    q = quantized[name]["w"]
    moved = am.QuantizedTensor(q.weight, jnp.roll(q.scales, 1, axis=-2))
    wrong = {**quantized, name: {"w": moved}}
    _, typical, _ = held_to_the_bound(config, params, wrong, TOKENS)
    assert rms(typical) > 5


def test_what_is_never_quantized():
    for config in FAMILY.values():
        for (module, leaf), spec in flat_specs(config).items():
            path = f"{module}/{leaf}"
            small = "router", "norm", "embed", "lm_head"
            never = any(word in path for word in small) or leaf == "b"
            assert spec.matrix == (not never), path


def save(config, folder, dtype=np.float32):
    params = jax.tree.map(lambda w: np.asarray(w, dtype), random_params(config))
    am.save(am.Model(config, params), folder)
    return params


@pytest.mark.parametrize("name", ["llama4", "llama"])
def test_files_hold_what_memory_would(tmp_path, name, monkeypatch):
    config = FAMILY[name]
    params = save(config, tmp_path / "a", ml_dtypes.bfloat16)
    monkeypatch.setattr(lazy, "BLOCK", 4 * 32 * 20)      # 20 columns
    convert.quantize_files(tmp_path / "a", tmp_path / "b")
    wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    want = in_8_bits(config, wide)
    got = am.load(tmp_path / "b", dtype="float32").params
    for module, leaves in want.items():
        for leaf, w in leaves.items():
            there = got[module][leaf]
            if isinstance(there, am.QuantizedTensor):  # turned, on a CPU
                there = am.QuantizedTensor(there.weight, there.scales)
            pair = there, w
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{module}/{leaf}")
    assert am.verify(tmp_path / "b") > 10
    convert.quantize_files(tmp_path / "b", tmp_path / "c")      # the second time
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in "bc"]
    assert files[0] == files[1]


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    config, params = FAMILY["llama"], random_params(FAMILY["llama"])
    w = params["decoder_layer/linear_v"]["w"]
    params["decoder_layer/linear_v"]["w"] = w.at[1, 2, 3].set(jnp.nan)
    am.save(am.Model(config, params), tmp_path / "a")
    with pytest.raises(CheckpointError, match="decoder_layer/linear_v/w: .* NaN"):
        convert.quantize_files(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_groups_divide_whatever_the_width():
    spec = ParamSpec((1, 20, 3), (None, "mlp", "embed"), matrix=True)
    assert groups_for(spec) == 4 and groups_for(spec, 3) == 1
    assert groups_for(ParamSpec((1, 20, 3), (None, "embed", "mlp"), True)) == 1
    q = quantize(jnp.ones((1, 20, 3)), groups_for(spec))
    assert q.scales.shape == (1, 4, 3)
    np.testing.assert_allclose(dequantize(q), 1, rtol=0.01)


def test_a_cpu_widens_no_stack_of_bfloat16_weights():
    """Scratch of a model in bfloat16: less than half of its weights."""
    layer = replace(
        FAMILY["mixtral"].layer(0), feed_forward=MoESpec(4, 2, 128, "silu"))
    config = replace(
        FAMILY["mixtral"], d_model=64, layers=(Segment((layer,), 8),),
        dtype="bfloat16")
    params, count = {}, 0
    for (module, leaf), spec in flat_specs(config).items():
        shape = jax.ShapeDtypeStruct(spec.shape, "bfloat16")
        params.setdefault(module, {})[leaf] = shape
        count += shape.size
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = model.all_logits.lower(params, ids, config).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < count


def test_a_nan_among_many_is_not_lost_in_a_maximum():
    w = jnp.ones((512, 512)).at[3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN"):
        quantize(w)
