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
from annotated_moe import checkpoints, cli, convert, model
from annotated_moe.checkpoints import expected, may_be_quantized
from annotated_moe.formats import lazy
from annotated_moe.formats.files import CheckpointError
from annotated_moe.moe import MoE, Route, plain
from annotated_moe.quantization import change_bound, dequantize

BASE = am.ModelConfig(
    vocab_size=48, context=64, d_model=32, d_ff=48, num_layers=2, q_heads=4,
    kv_heads=2, head_size=8, num_experts=4, embedding_multiplier=1.0,
    output_multiplier=1.0, attn_multiplier=8**-0.5, attn_softcap=None,
    post_norm=False, activation="silu", tied=False, dtype="float32",
)  # fmt: skip
FAMILY = {
    "llama": replace(BASE, num_experts=1, top_k=1, attn_bias=True, mlp_bias=True),
    "mixtral": replace(BASE, router="top_k_softmax", attn_window=7),
    "qwen": replace(BASE, qk_norm="head", dense_layers=(1,), dense_ff=40, tied=True),
    "olmoe": replace(BASE, qk_norm="whole", qkv_clip=0.7),
    "llama4": replace(
        BASE, router="sigmoid_input", top_k=1, moe_every=2, dense_ff=40,
        shared_expert=True, qk_norm="after_rope", nope_every=2, attn_chunk=8,
        attn_temperature=(4, 0.5),
    ),
    "grok": replace(
        BASE, post_norm=True, activation="gelu", attn_softcap=30.0, tied=True,
        embedding_multiplier=32**0.5, output_multiplier=3**-0.5,
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(5).integers(1, 48, (3, 20))


def random_params(config, seed=7):
    rng, params = np.random.default_rng(seed), {}
    for path, shape in expected(config).items():
        w = rng.standard_normal(shape)
        if path.endswith("/w"):
            w *= shape[-2] ** -0.5 * (4 if "router" in path else 1)
        elif path.endswith("/scale"):
            w = 1 + 0.2 * w
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = jnp.asarray(w, jnp.float32)
    return params


def matrices(params):
    """(path, a matrix without its stack) of all that may be quantized."""
    for module, leaves in params.items():
        for leaf, w in leaves.items():
            if may_be_quantized(f"{module}/{leaf}"):
                for i in np.ndindex(w.shape[:-2]):
                    yield f"{module}/{leaf}", i, w


def with_gradient(config, tokens, params):
    """Logits [B, T, V] by the way that has a gradient, and the chosen experts.

    The same function as `Model.logits`, for `capacity_and_drop` with room for
    all drops nothing; the test compares the two.
    """
    chosen = []

    def spy(call, args, kwargs, context):
        if isinstance(context.module, MoE):
            context.module.capacity_factor = float(config.num_experts)
        y = call(*args, **kwargs)
        if isinstance(y, Route):
            chosen.append(jnp.sort(y.experts).reshape(*tokens.shape, -1))
        return y

    layers, _ = model.split_params(params)
    h = model.embed(params, jnp.asarray(tokens), config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with hk.intercept_methods(spy):
        for i, kind in enumerate(model.kinds(config)):
            own = model.slices_of(layers, model.place_of(config, i), kind)
            layer = model.layer_function(config, kind).apply
            h, _, _ = layer(own, h, positions, train=True)
    return model.unembed(params, h, config, train=True), chosen


def sent_alike(config, shape, ours, theirs):
    """[B, T], True for tokens that no flipped choice has reached.

    It reaches all tokens behind it, which look back; in the last layer itself.
    """
    last = model.kinds(config)[-1].experts
    reached = np.zeros(shape, bool)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        flips = np.asarray(a != b).any(-1)
        final = last and i == len(ours)
        reached |= flips if final else np.logical_or.accumulate(flips, axis=1)
    return ~reached


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
    whole = {m: {n: plain(w) for n, w in ws.items()} for m, ws in quantized.items()}
    other, theirs, _ = read(whole, quantized, tokens, at)
    got = np.asarray(am.Model(config, quantized).logits(tokens))
    np.testing.assert_allclose(got, other, atol=1e-4)
    alike = sent_alike(config, tokens.shape, ours, theirs)
    change, keep = got[at] - np.asarray(want)[at], alike[at[:2]]
    return np.abs(change / worst)[keep], (change / typical)[keep], ~alike


@pytest.mark.parametrize("name", FAMILY)
def test_products_and_logits_of_every_family_are_within_the_bound(name):
    config, params = FAMILY[name], random_params(FAMILY[name])
    quantized = jax.jit(checkpoints.quantize_params)(params)
    x = np.random.default_rng(1).standard_normal((6, 48)).astype(np.float32)
    count, ratios = 0, []
    for path, i, w in matrices(params):
        q = quantized[path[:-2]]["w"]
        rows, times = x[:, : w.shape[-2]], w.shape[-2] // q.scales.shape[-2]
        step = np.asarray(q.scales[i], np.float32).repeat(times, 0)
        error = rows @ (np.asarray(q.weight[i]) * step - np.asarray(w[i]))
        worst = np.abs(rows) @ step / 2
        typical = np.sqrt(rows**2 @ step**2 / 12)
        assert (np.abs(error) <= worst + 1e-5).all(), path
        ratios.append(np.sqrt(np.mean((error / typical) ** 2)))
        count += 1
    assert count >= 14 and 0.8 < np.mean(ratios) < 1.2
    worst, typical, flipped = held_to_the_bound(config, params, quantized, TOKENS)
    print(name, len(worst), worst.max(), rms(typical), flipped.sum())
    assert worst.max() <= 1 and 0.75 < rms(typical) < 1.3
    assert len(worst) >= 32 and flipped.mean() < 0.4


def test_the_bound_notices_scales_of_another_group():
    config, params = FAMILY["mixtral"], random_params(FAMILY["mixtral"])
    quantized = jax.jit(checkpoints.quantize_params)(params)
    name = "decoder_layer/multi_head_attention/linear"
    q = quantized[name]["w"]
    moved = am.QuantizedTensor(q.weight, jnp.roll(q.scales, 1, axis=-2))
    wrong = {**quantized, name: {"w": moved}}
    _, typical, _ = held_to_the_bound(config, params, wrong, TOKENS)
    assert rms(typical) > 5


def test_what_is_never_quantized():
    for config in FAMILY.values():
        paths = [path for path in expected(config) if not may_be_quantized(path)]
        for path in paths:
            small = "router", "norm", "embed", "lm_head", "/b"
            assert any(word in path for word in small), path
        for part in ("shared", "moe", "decoder_layer/linear", "attention"):
            ours = [p for p in expected(config) if part in p and p.endswith("/w")]
            assert all(may_be_quantized(path) for path in ours)
    assert not may_be_quantized("vision/layer_0/w")


def save(config, folder, dtype=np.float32):
    params = jax.tree.map(lambda w: np.asarray(w, dtype), random_params(config))
    am.save(am.Model(config, params), folder)
    return params


@pytest.mark.parametrize("name", ["llama4", "llama"])
def test_the_command_writes_what_memory_would_hold(tmp_path, name, monkeypatch):
    config = FAMILY[name]
    params = save(config, tmp_path / "a", ml_dtypes.bfloat16)
    monkeypatch.setattr(lazy, "BLOCK", 4 * 32 * 20)      # 20 columns
    job = ["quantize", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(job) == 0
    wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    want = jax.jit(checkpoints.quantize_params)(wide)
    got = am.load(tmp_path / "b", dtype="float32").params
    for module, leaves in want.items():
        for leaf, w in leaves.items():
            pair = got[module][leaf], w
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
    q = checkpoints.quantize_params(
        {"decoder_layer/linear_1": {"w": jnp.ones((1, 20, 3))}}
    )["decoder_layer/linear_1"]["w"]
    assert q.scales.shape == (1, 4, 3)
    np.testing.assert_allclose(dequantize(q), 1, rtol=0.01)


def test_a_cpu_widens_no_stack_of_bfloat16_weights():
    """Scratch of a model in bfloat16: less than half of its weights."""
    wide = {"num_layers": 8, "d_model": 64, "d_ff": 128, "dtype": "bfloat16"}
    config = replace(FAMILY["mixtral"], **wide)
    shapes = {path: jax.ShapeDtypeStruct(shape, "bfloat16")
              for path, shape in expected(config).items()}
    params = {}
    for path, shape in shapes.items():
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = shape
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = model.all_logits.lower(params, ids, config).compile()
    scratch = compiled.memory_analysis().temp_size_in_bytes
    assert scratch < sum(w.size for w in shapes.values())


def test_a_nan_among_many_is_not_lost_in_a_maximum():
    w = jnp.ones((512, 512)).at[3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN"):
        am.quantization.quantize(w)
