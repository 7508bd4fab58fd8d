"""8-bit weights for every family: how far they are off, and the files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints, cli, convert
from annotated_moe.checkpoints import CheckpointError, expected, may_be_quantized
from annotated_moe.quantization import dequantize

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


def with_noise(params, quantized, seed):
    """Weights each off by an even spread over one step: chapter 06's picture."""
    rng = np.random.default_rng(seed)

    def noisy(w, q):
        if not isinstance(q, am.QuantizedTensor):
            return w
        *lead, d, f = q.shape
        step = np.asarray(q.scales, np.float32)
        step = np.repeat(step, d // step.shape[-2], axis=-2)
        return w + step * rng.uniform(-0.5, 0.5, w.shape).astype(np.float32)

    return {m: {n: noisy(w, quantized[m][n]) for n, w in ws.items()}
            for m, ws in params.items()}


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
    want = np.asarray(am.Model(config, params).logits(TOKENS))

    def change(weights):
        logits = np.asarray(am.Model(config, weights).logits(TOKENS))
        return np.sqrt(np.mean((logits - want) ** 2))

    forecast = max(change(with_noise(params, quantized, seed)) for seed in range(4))
    print(name, change(quantized), forecast, want.std(), np.mean(ratios))
    assert 0 < change(quantized) < 1.5 * forecast < 0.25 * want.std()


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
    monkeypatch.setattr(checkpoints, "BLOCK", 4 * 32 * 20)      # 20 columns
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
