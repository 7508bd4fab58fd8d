"""int8 weights: recorded outputs, derived bounds, odd shapes, bad input.

`fixtures/quantization.npz` holds the parts `linear_*` and one quantized
expert of a recorded run of the Grok-1 release (int8 weights, scales,
inputs, outputs in four modes).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from annotated_moe.linear import product as any_product
from annotated_moe.quantization import (
    LazySlice,
    QuantizedTensor,
    as_float,
    change_bound,
    dequantize,
    matmul_by_group,
    quantize,
    quantized_matmul,
    read_rows,
    read_slice,
    tile_rows,
    tiled_matmul,
    whole_matmul,
)

PRODUCTS = [whole_matmul, matmul_by_group, tiled_matmul, quantized_matmul]
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(scope="module")
def recorded():
    return np.load(Path(__file__).parent / "fixtures" / "quantization.npz")


def tensor(recorded, name):
    return QuantizedTensor(
        jnp.asarray(recorded[f"{name}.weight_i8"]),
        jnp.asarray(recorded[f"{name}.scales"], jnp.bfloat16),
    )


def by_formula(q):
    """float64 value of each weight by plain indexing: no reshape, no repeat."""
    weight = np.asarray(q.weight, np.float64)
    scales = np.asarray(q.scales, np.float64)
    size = weight.shape[-2] // scales.shape[-2]
    return weight * scales[..., np.arange(weight.shape[-2]) // size, :]


def random_tensor(seed, *lead, d, f, groups):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (*lead, d, f))
    scales = rng.uniform(0.5, 2, (*lead, groups, f)) / 127
    return QuantizedTensor(
        jnp.asarray(weight, jnp.int8), jnp.asarray(scales, jnp.bfloat16)
    )


# Against the release


@pytest.mark.parametrize("case", ["linear_colscale", "linear_rowgroups"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_recorded_linear_in_float32(recorded, case, product):
    x = jnp.asarray(recorded["linear.x"][0])
    y = product(x, tensor(recorded, f"{case}.w"))
    np.testing.assert_allclose(y, recorded[f"{case}.out.f32"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["linear_colscale", "linear_rowgroups"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_recorded_linear_in_bfloat16(recorded, case, product):
    """No further from either bfloat16 run than these are from float32."""
    x = jnp.asarray(recorded["linear.x"][0], jnp.bfloat16)
    y = np.asarray(product(x, tensor(recorded, f"{case}.w")))
    f32, fused, each = (recorded[f"{case}.out.{m}"] for m in ("f32", "bf16", "bf16e"))
    spread = max(np.abs(fused - f32).max(), np.abs(each - f32).max())
    assert 0 < spread < 0.1
    assert np.abs(y - fused).max() <= spread
    assert np.abs(y - each).max() <= spread


@pytest.mark.parametrize("mode, dtype", [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_recorded_plain_linear(recorded, mode, dtype):
    x = jnp.asarray(recorded["linear.x"][0], dtype)
    w = jnp.asarray(recorded["linear_plain_bias.w"])
    y = any_product(x, w) + recorded["linear_plain_bias.b"]
    out = {m: recorded[f"linear_plain_bias.out.{m}"][0] for m in ("f32", "bf16")}
    spread = np.abs(out["bf16"] - out["f32"]).max()
    atol = 1e-5 if mode == "f32" else spread
    np.testing.assert_allclose(y, out[mode], rtol=0, atol=atol)


@pytest.mark.parametrize("mode, dtype", [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_recorded_expert(recorded, mode, dtype):
    """Three quantized products in a row; the last has two groups."""
    x = jnp.asarray(recorded["expert3.x"][0], dtype)
    gate, up, down = (
        tensor(recorded, f"expert3.{n}") for n in ("linear", "linear_v", "linear_1")
    )
    assert down.scales.shape[-2] == 2
    hidden = jax.nn.gelu(any_product(x, gate), approximate=True) * any_product(x, up)
    y = np.asarray(any_product(hidden.astype(dtype), down))
    out = {m: recorded[f"expert3.out.{m}"] for m in ("f32", "bf16", "bf16e")}
    out = {m: a.reshape(y.shape) for m, a in out.items()}
    spread = max(np.abs(out[m] - out["f32"]).max() for m in ("bf16", "bf16e"))
    atol = 1e-5 if mode == "f32" else spread
    np.testing.assert_allclose(y, out[mode], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    ["linear_colscale.w", "linear_rowgroups.w", "expert3.linear", "expert3.linear_1"],
)
def test_recorded_weights_are_dequantized_and_requantized(recorded, name):
    q = tensor(recorded, name)
    np.testing.assert_array_equal(dequantize(q), by_formula(q).astype(np.float32))
    again = quantize(dequantize(q), q.scales.shape[-2])
    peaked = np.abs(q.weight).reshape(q.scales.shape[-2], -1, q.shape[-1]).max(1) == 127
    assert peaked.any()
    same = np.asarray(again.scales, np.float32) == np.asarray(q.scales, np.float32)
    assert same[peaked].all()


# quantize and dequantize


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "shape, groups", [((64, 5), 1), ((3, 86, 7), 2), ((43, 2), 43)]
)
def test_error_of_a_weight_is_at_most_half_a_step(shape, groups, compiled):
    w = np.random.default_rng(0).standard_t(2, shape).astype(np.float32)
    f = jax.jit(quantize, static_argnums=1) if compiled else quantize
    q = f(jnp.asarray(w), groups)
    assert q.weight.dtype == jnp.int8 and q.scales.dtype == jnp.bfloat16
    assert q.shape == shape and q.scales.shape == (*shape[:-2], groups, shape[-1])
    size = shape[-2] // groups
    step = np.repeat(np.asarray(q.scales, np.float64), size, axis=-2)
    assert (np.abs(by_formula(q) - w) <= step * (0.5 + 1e-5)).all()
    peak = np.abs(w).reshape(*shape[:-2], groups, size, shape[-1]).max(-2)
    assert (np.abs(np.asarray(q.scales, np.float64) * 127 / peak - 1) <= 2**-8).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_every_peak_becomes_127_and_stays(compiled):
    f = jax.jit(quantize, static_argnums=1) if compiled else quantize
    bits = np.arange(0, 2**23, 61, dtype=np.uint32) | 0x3F800000
    peaks = jnp.asarray(np.stack([bits.view(np.float32), -bits.view(np.float32) / 3]))
    q = f(peaks, 1)
    assert (np.asarray(q.weight[0]) == 127).all()
    assert (np.asarray(q.weight[1]) == -42).all()
    again = f(dequantize(q), 1)
    np.testing.assert_array_equal(again.weight, q.weight)
    np.testing.assert_array_equal(again.scales, q.scales)


def test_groups_of_zeros_stay_zero_and_leave_the_others_alone():
    w = jnp.ones([4, 2]).at[:2, 0].set(0)
    q = quantize(w, 2)
    np.testing.assert_array_equal(q.weight[:, 0], [0, 0, 127, 127])
    assert float(q.scales[0, 0]) == 0 and float(q.scales[1, 0]) > 0
    assert jnp.isfinite(dequantize(q)).all()
    for product in PRODUCTS:
        y = product(jnp.ones([2, 4]), q)
        np.testing.assert_allclose(y, jnp.ones([2, 4]) @ dequantize(q), rtol=1e-6)


@pytest.mark.parametrize("size", [3e38, 1.0, 2e-36, 1e-37, 1e-40])
def test_extreme_sizes(size):
    w = np.array([[size], [-size / 2]], np.float32)
    q = quantize(jnp.asarray(w))
    assert jnp.isfinite(dequantize(q)).all()
    if size < 1e-36:
        assert not q.weight.any() and not q.scales.any()
    else:
        assert q.weight[0, 0] == 127
        np.testing.assert_allclose(dequantize(q), w, rtol=0.01)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_width_weights(dtype):
    w = jax.random.normal(jax.random.key(0), [32, 4]).astype(dtype)
    q, wide = quantize(w, 4), quantize(w.astype(jnp.float32), 4)
    np.testing.assert_array_equal(q.weight, wide.weight)
    assert dequantize(q, dtype).dtype == dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or inf"):
        quantize(jnp.ones([4, 4]).at[2, 1].set(bad), 2)


@pytest.mark.parametrize("groups", [3, 0, -1, 16])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=f"{groups} groups do not divide 8 inputs"):
        quantize(jnp.ones([8, 2]), groups)


# Products


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize(
    "d, groups", [(172, 2), (86, 2), (43, 1), (8, 8), (514, 2), (1, 1), (256, 1)]
)
def test_odd_sizes(product, dtype, n, d, groups):
    """Groups of 86, 43, 1 and 257: the float64 product, to rounding error."""
    q = random_tensor(d, d=d, f=5, groups=groups)
    x = np.random.default_rng(n).standard_normal((n, d)).astype(np.float32)
    x = jnp.asarray(x, dtype)
    y = product(x, q)
    assert y.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ by_formula(q)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_int8(product, dtype):
    """-128 is never made here, but a file may hold it."""
    weight = np.full((8, 2), -128, np.int8)
    weight[:, 1] = 127
    q = QuantizedTensor(jnp.asarray(weight), jnp.ones([2, 2], jnp.bfloat16))
    for n in (1, 3):
        y = product(jnp.ones([n, 8], dtype), q)
        np.testing.assert_array_equal(y, np.tile([-1024.0, 1016.0], (n, 1)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("index", [(), (2,), (1, 2), (-1, 0)])
def test_leading_indices(index, n, compiled):
    lead = (2, 3)[2 - len(index) :]
    q = random_tensor(7, *lead, d=24, f=6, groups=4)
    x = jax.random.normal(jax.random.key(n), [n, 24])
    exact = np.asarray(x, np.float64) @ by_formula(q)[index]
    for product in PRODUCTS:
        f = jax.jit(product) if compiled else product
        np.testing.assert_allclose(f(x, q, index), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("index", [(3,), (1, 2)])
def test_a_slice_is_the_slice_of_the_stack(dtype, index, compiled):
    """Of a stack that is quantized, or of one in `dtype`."""
    stack = random_tensor(1, *(4, 3)[: len(index)], d=16, f=6, groups=2)
    stack = dequantize(stack, dtype) if dtype else stack
    x = jax.random.normal(jax.random.key(0), [2, 16])
    cut = jax.tree.map(lambda a: a[index], stack)
    product = jax.jit(any_product) if compiled else any_product
    lazy = LazySlice(stack, tuple(map(jnp.int32, index)))
    assert lazy.shape == (16, 6) and lazy.ndim == 2
    np.testing.assert_allclose(
        product(x, lazy), any_product(x, cut), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(as_float(lazy), as_float(cut))
    if dtype:
        np.testing.assert_array_equal(read_slice(lazy), cut)
        assert read_slice(lazy).dtype == lazy.dtype == dtype


def test_indexing_goes_deeper_and_reads_nothing():
    stack = random_tensor(1, 2, 3, d=16, f=6, groups=2)
    x = jax.random.normal(jax.random.key(0), [2, 16])
    lazy = stack[1][2]
    assert isinstance(lazy, LazySlice) and lazy.stack is stack
    assert (lazy.index, lazy.shape, stack[1].shape) == ((1, 2), (16, 6), (3, 16, 6))
    np.testing.assert_array_equal(
        any_product(x, lazy), quantized_matmul(x, stack, (1, 2))
    )


def test_no_inputs():
    q = random_tensor(0, d=8, f=3, groups=2)
    assert any_product(jnp.zeros([0, 8]), q).shape == (0, 3)


def test_gradient_reaches_the_input():
    q = random_tensor(0, d=16, f=3, groups=2)
    x = jax.random.normal(jax.random.key(0), [4, 16])
    grad = jax.grad(lambda x: any_product(x, q).sum())(x)
    expected = np.tile(by_formula(q).sum(-1), (4, 1))
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_change_is_within_its_bound_and_of_its_size(groups):
    """A number that bends, of a matrix in 8 bits and of a gain that is not."""
    w = {
        "w": jax.random.normal(jax.random.key(0), [256, 16]) / 16,
        "gain": jnp.linspace(0.5, 1.5, 16),
    }
    q = w | {"w": quantize(w["w"], groups)}
    x = jax.random.normal(jax.random.key(1), [500, 256])

    def y(w, x):
        return jnp.sum(jnp.tanh(x @ w["w"]) * w["gain"])

    gradients = jax.vmap(jax.grad(y), (None, 0))(w, x)
    worst, typical = jax.vmap(change_bound, (0, None))(gradients, q)
    change = jax.vmap(y, (None, 0))(w | {"w": dequantize(q["w"])}, x)
    change -= jax.vmap(y, (None, 0))(w, x)
    assert (jnp.abs(change) <= worst).all()
    assert abs(np.sqrt(np.mean((change / typical) ** 2)) - 1) < 0.15
    size = jnp.square(step(q["w"], groups)[None] * gradients["w"])
    np.testing.assert_allclose(
        typical, jnp.sqrt(size.sum((1, 2)) / 12), rtol=1e-4
    )


def step(q, groups):
    return np.repeat(np.asarray(q.scales, np.float32), q.shape[0] // groups, axis=0)


@pytest.mark.parametrize("groups", [1, 4])
def test_error_of_the_product_within_both_bounds(groups):
    w = jax.random.normal(jax.random.key(0), [256, 32])
    x = jax.random.normal(jax.random.key(1), [64, 256])
    q = quantize(w, groups)
    step = np.repeat(np.asarray(q.scales, np.float64), 256 // groups, axis=0)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    error = np.asarray(any_product(x, q)) - exact
    worst = np.abs(x) @ step / 2
    typical = np.sqrt(np.square(x) @ step**2 / 12)
    assert (np.abs(error) <= worst + 1e-4).all()
    assert abs(np.sqrt(np.mean((error / typical) ** 2)) - 1) < 0.1


def test_bfloat16_rounds_no_weight():
    """The departure: scales after the product, so weights stay exact."""
    q = random_tensor(3, d=512, f=16, groups=4)
    x = jax.random.normal(jax.random.key(0), [8, 512]).astype(jnp.bfloat16)
    wide, value = np.asarray(x, np.float64), by_formula(q)
    exact = wide @ value
    release = wide @ value.astype(jnp.bfloat16).astype(np.float64)
    bound = 2**-8 * np.abs(wide) @ np.abs(value)
    assert (np.abs(release - exact) <= bound).all()
    for product in PRODUCTS:
        ours = np.abs(np.asarray(product(x, q)) - exact).max()
        assert ours < np.abs(release - exact).max() / 100


def test_scratch_memory():
    """The whole product writes the float matrix; tiles and rows do not."""
    q = random_tensor(0, 3, d=2048, f=1024, groups=1)
    one = jax.tree.map(lambda a: a[0], q)
    x = jnp.ones([1, 2048])

    def scratch(f, *args):
        compiled = jax.jit(f).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 2048 * 1024
    assert scratch(whole_matmul, x, one) >= 4 * size
    lazy = LazySlice(q, (jnp.int32(1),))
    target = 4 * tile_rows(2048, 2**20 // 1024) * 1024
    assert scratch(any_product, x, lazy) < 1.2 * target < 4 * size


def test_platform_is_chosen_when_lowered():
    q = random_tensor(0, d=64, f=8, groups=2)
    for platform, loops in [("cpu", 1), ("tpu", 0), ("cuda", 0)]:
        program = export.export(jax.jit(any_product), platforms=[platform])
        text = program(jnp.ones([2, 64]), q).mlir_module()
        assert text.count("stablehlo.while") == loops, platform


@pytest.mark.parametrize(
    "w",
    [
        random_tensor(0, d=9, f=3, groups=1),
        random_tensor(0, 2, d=8, f=3, groups=1),
        random_tensor(0, 2, d=9, f=3, groups=1)[0],
        jnp.ones([9, 3]),
        jnp.ones([2, 8, 3]),
    ],
)
def test_weights_that_do_not_fit_are_refused(w):
    with pytest.raises(ValueError, match="x of 8 features does not fit"):
        any_product(jnp.ones([2, 8]), w)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2,), (1, 2, 4)])
def test_scales_that_do_not_belong_are_refused(shape):
    q = QuantizedTensor(jnp.ones([8, 4], jnp.int8), jnp.ones(shape, jnp.bfloat16))
    for use in (dequantize, lambda q: any_product(jnp.ones([2, 8]), q)):
        with pytest.raises(ValueError, match="do not fit a weight of shape"):
            use(q)


def test_zero_groups_of_scales_are_refused():
    q = QuantizedTensor(jnp.ones([8, 4], jnp.int8), jnp.ones([0, 4], jnp.bfloat16))
    with pytest.raises(ValueError, match="do not fit"):
        dequantize(q)


# Pieces


def test_pytree():
    stack = random_tensor(0, 4, d=16, f=16, groups=2)
    x = jax.random.normal(jax.random.key(0), [3, 16])

    @jax.jit
    def scanned(x, stack):
        return jax.lax.scan(lambda x, q: (any_product(x, q), q.scales), x, stack)

    y, scales = scanned(x, jax.device_put(stack, jax.devices()[0]))
    for w in by_formula(stack):
        x = np.asarray(x, np.float64) @ w
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(scales, stack.scales)
    leaves, treedef = jax.tree.flatten(LazySlice(stack, (jnp.int32(0),)))
    assert [a.dtype for a in leaves] == [jnp.int8, jnp.bfloat16, jnp.int32]
    assert jax.tree.unflatten(treedef, leaves).shape == (16, 16)


def test_read_rows():
    stack = jnp.arange(2 * 3 * 6 * 4).reshape(2, 3, 6, 4)
    np.testing.assert_array_equal(
        read_rows(stack, (1, 2), jnp.int32(2), 3), stack[1, 2, 2:5]
    )
    np.testing.assert_array_equal(read_rows(stack[0, 0], (), 4, 2), stack[0, 0, 4:])


def test_tile_rows():
    assert [tile_rows(g, 128) for g in (86, 43, 257, 1, 6144)] == [86, 43, 257, 1, 128]
    for group in range(1, 200):
        for target in (1, 7, 128, 512):
            tile = tile_rows(group, target)
            assert group % tile == 0
            ratio = max(tile / target, target / tile)
            for other in range(1, group + 1):
                if group % other == 0:
                    assert ratio <= max(other / target, target / other)
