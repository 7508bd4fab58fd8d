"""RoPE against the release's recordings, float64, and its own claims."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.rope import rope, rope_angles

RECORDED = np.load(Path(__file__).parent / "fixtures" / "rope.npz")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
turn = jax.jit(rope, static_argnames="base")


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def integers(*shape, below, seed=0):
    x = np.random.default_rng(seed).integers(0, below, shape)
    return jnp.asarray(x, jnp.int32)


def recorded_positions(case):
    rows, tokens = RECORDED["x"].shape[:2]
    counted = np.tile(np.arange(tokens), [rows, 1])
    return jnp.asarray(
        {
            "offset0": counted,
            "offset_vec": RECORDED["offset_vec_offset"][:, None] + counted,
            "const_position5": np.full_like(counted, 5),
        }[case],
        jnp.int32,
    )


def in_float64(x, positions, base=10000.0):
    """Split halves as one complex product."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    rates = base ** (-np.arange(half) / half)
    phases = np.asarray(positions, np.float64)[..., None, None] * rates
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * phases)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["f32", "f32e", "bf16", "bf16e"])
@pytest.mark.parametrize("case", ["offset0", "offset_vec", "const_position5"])
def test_matches_grok_1(case, mode, compiled):
    dtype = DTYPES[mode.removesuffix("e")]
    x = jnp.asarray(RECORDED["x"], dtype)
    y = (turn if compiled else rope)(x, recorded_positions(case))
    assert y.dtype == dtype
    y, expected = np.asarray(y, np.float32), RECORDED[f"{case}_{mode}"]
    if dtype == jnp.float32:
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    else:
        # Float32 inside and one rounding: the same bits, but for a tie that
        # another processor's last float32 bit may tip.
        np.testing.assert_allclose(y, expected, rtol=2**-7)
        assert (y == expected).mean() > 0.99


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("head_size", [2, 8, 64, 128])
def test_matches_float64(head_size, base):
    x = normal(2, 5, 3, head_size)
    positions = integers(2, 5, below=64)
    np.testing.assert_allclose(
        turn(x, positions, base), in_float64(x, positions, base), atol=3e-5
    )


def test_angles_stay_good_to_the_end_of_the_context():
    positions = jnp.arange(8192)[None]
    angles = rope_angles(positions, 128)
    exact = np.arange(8192)[:, None] * 10000.0 ** (-np.arange(64) / 64)
    assert angles.dtype == jnp.float32
    assert np.abs(np.asarray(angles[0], np.float64) - exact).max() < 5e-4


def test_bfloat16_input_still_gets_float32_angles():
    x = normal(1, 4, 2, 128).astype(jnp.bfloat16)
    positions = jnp.array([[257, 4097, 8175, 8191]])
    once = turn(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    y = turn(x, positions)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y), np.asarray(once))


def test_position_zero_changes_nothing():
    x = normal(2, 3, 4, 16)
    np.testing.assert_array_equal(turn(x, jnp.zeros([2, 3], jnp.int32)), x)


def test_scores_depend_on_distance_only():
    q, k = normal(2, 1, 1, 1, 64)

    def score(at_q, at_k):
        at_q, at_k = jnp.array([[at_q]]), jnp.array([[at_k]])
        return np.vdot(turn(q, at_q), turn(k, at_k))

    for distance in [0, 1, 7, 300]:
        first = score(distance, 0)
        for start in [1, 50, 1000, 4000]:
            assert score(start + distance, start) == pytest.approx(first, abs=2e-3)
    assert abs(score(7, 0) - score(0, 7)) > 0.1
    assert abs(score(7, 0) - score(0, 0)) > 0.1


def test_neighbouring_pairs_under_a_permutation():
    x = normal(2, 6, 3, 32)
    positions = integers(2, 6, below=500)
    z = np.asarray(x)[..., 0::2] + 1j * np.asarray(x)[..., 1::2]
    z = z * np.exp(1j * np.asarray(rope_angles(positions, 32)))[:, :, None]
    shuffle = np.r_[0:32:2, 1:32:2]
    np.testing.assert_allclose(
        turn(x[..., shuffle], positions),
        np.concatenate([z.real, z.imag], axis=-1),
        atol=1e-5,
    )


def test_rows_stand_where_their_own_cache_ends():
    x = np.asarray(normal(2, 12, 4, 16))
    whole = turn(x, np.tile(np.arange(12, dtype=np.int32), [2, 1]))
    steps = np.array([4, 9], np.int32)
    new = np.stack([x[0, 4:7], x[1, 9:12]])
    turned = turn(new, steps[:, None] + np.arange(3, dtype=np.int32))
    whole, turned = np.asarray(whole), np.asarray(turned)
    np.testing.assert_allclose(turned[0], whole[0, 4:7], atol=1e-6)
    np.testing.assert_allclose(turned[1], whole[1, 9:12], atol=1e-6)


@pytest.mark.parametrize("head_size", [1, 7, 127])
def test_odd_head_size_is_one_clear_error(head_size):
    positions = jnp.zeros([1, 2], jnp.int32)
    message = f"RoPE needs an even head size, got {head_size}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        rope_angles(positions, head_size)
    with pytest.raises(ValueError, match=f"^{message}$"):
        rope(jnp.ones([1, 2, 3, head_size]), positions)
