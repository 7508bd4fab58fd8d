"""RMSNorm against the release's recordings, float64, and its own claims."""

from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.rms_norm import RMSNorm, rms_norm

RECORDED = np.load(Path(__file__).parent / "fixtures" / "rms_norm.npz")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
norm = jax.jit(rms_norm, static_argnames="eps")


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def in_float64(x, scale, eps=1e-5):
    x = np.asarray(x, np.float64)
    mean_square = (x**2).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * np.asarray(scale, np.float64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["f32", "f32e", "bf16", "bf16e"])
def test_matches_grok_1(mode, compiled):
    dtype = DTYPES[mode.removesuffix("e")]
    x = jnp.asarray(RECORDED["x"], dtype)
    y = (norm if compiled else rms_norm)(x, jnp.asarray(RECORDED["scale"]))
    assert y.dtype == dtype
    y, expected = np.asarray(y, np.float32), RECORDED[mode]
    if dtype == jnp.float32:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    else:
        # Float32 inside and one rounding: the same bits, but for a tie that
        # another processor's last float32 bit may tip.
        np.testing.assert_allclose(y, expected, rtol=2**-7)
        assert (y == expected).mean() > 0.99


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7)])
def test_any_leading_axes(shape):
    x = normal(*shape)
    scale = jnp.asarray(np.linspace(-1, 2, 7), jnp.float32)
    np.testing.assert_allclose(norm(x, scale), in_float64(x, scale), atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-3, 3e-3, 1e-2, 1.0])
def test_epsilon_stands_under_the_root(size):
    x = size * normal(4, 64)
    scale = jnp.ones(64)
    np.testing.assert_allclose(norm(x, scale), in_float64(x, scale), atol=1e-6)


def test_epsilon_at_its_own_size():
    # mean square == eps: half of the sum under the root is epsilon's.
    y = norm(jnp.full([16], 1e-2), jnp.ones(16), eps=1e-4)
    np.testing.assert_allclose(y, 0.5**0.5, rtol=1e-5)


def test_bfloat16_is_float32_rounded_once():
    x = (100 * normal(8, 6144)).astype(jnp.bfloat16)
    scale = 1 + 0.3 * normal(6144, seed=1)
    once = norm(x.astype(jnp.float32), scale).astype(jnp.bfloat16)
    y = norm(x, scale)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y), np.asarray(once))


def test_squares_beyond_bfloat16_precision_are_summed_in_float32():
    # Width 2**15 of ones: a bfloat16 running sum would stop at 256.
    y = norm(jnp.ones([1, 2**15], jnp.bfloat16), jnp.ones(2**15))
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)


def test_module_has_one_float32_parameter_called_scale():
    module = hk.without_apply_rng(hk.transform(lambda x: RMSNorm()(x)))
    params = module.init(None, jnp.ones([2, 5, 32], jnp.bfloat16))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == {
        "rms_norm": {"scale": ((32,), jnp.float32)}
    }
    np.testing.assert_array_equal(params["rms_norm"]["scale"], 1.0)
    params = {"rms_norm": {"scale": jnp.asarray(RECORDED["scale"])}}
    y = module.apply(params, jnp.asarray(RECORDED["x"]))
    np.testing.assert_allclose(y, RECORDED["f32"], atol=1e-6)


def test_gradient_is_at_right_angles_to_the_input():
    x, target = normal(2, 64)

    def loss(x):
        return ((rms_norm(x, jnp.ones(64), eps=0.0) - target) ** 2).sum()

    slope = jax.jit(jax.grad(loss))(x)
    assert jnp.linalg.norm(slope) > 1
    assert abs(slope @ x) < 1e-4
