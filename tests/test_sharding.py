"""Rules, meshes and products on eight simulated devices."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe import sharding
from annotated_moe.checkpoints import quantize_params
from annotated_moe.model import (
    PRESETS,
    ModelConfig,
    all_logits,
    decode_step,
    init_cache,
    init_params,
    prefill,
)
from annotated_moe.moe import Experts, sharded_experts
from annotated_moe.quantization import QuantizedTensor, Row, dequantize, quantize
from annotated_moe.sharding import (
    RULES,
    axis_size,
    constrain,
    current_mesh,
    fit,
    fit_groups,
    fit_spec,
    make_mesh,
    matmul,
    partition_specs,
    shardings,
    spec_for,
    weight_spec,
)

EIGHT = [(1, 8), (2, 4), (4, 2), (8, 1)]
SHAPES = [*EIGHT, (1, 4), (2, 2), (4, 1), (1, 2), (2, 1), (1, 1)]
UP, DOWN = ("data", "model"), ("model", "data")
quantized = jax.jit(quantize, static_argnums=1)


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def abstract(data, model):
    return AbstractMesh((data, model), ("data", "model"))


def place(tree, specs, mesh):
    return jax.device_put(tree, shardings(specs, mesh))


# Rules.

GROK = {
    "multi_head_attention/query/w": P("data", "model"),
    "multi_head_attention/key/w": P("data", "model"),
    "multi_head_attention/value/w": P("data", "model"),
    "multi_head_attention/linear/w": P("model", "data"),
    "moe/linear/w": P(None, "data", "model"),
    "moe/linear_v/w": P(None, "data", "model"),
    "moe/linear_1/w": P(None, "model", "data"),
    "decoder_layer/linear/w": P("data", "model"),
    "decoder_layer/linear_v/w": P("data", "model"),
    "decoder_layer/linear_1/w": P("model", "data"),
    "router/w": P("data"),
    "in_out_embed/embeddings": P(None, ("data", "model")),
    "rms_norm/scale": P(),
    "rms_norm_1/scale": P(),
    "rms_norm_2/scale": P(),
    "rms_norm_3/scale": P(),
}


@pytest.mark.parametrize("path", GROK)
def test_rules_are_those_of_the_release(path):
    assert spec_for(path) == GROK[path]
    assert spec_for(f"decoder_layer/{path}") == GROK[path]


@pytest.mark.parametrize(
    "path",
    [
        "decoder_layer/moe/linear_1/b",
        "decoder_layer/moe/linear_2/w",
        "decoder_layer/my_router/w",
        "decoder_layer/router/w/more",
        "w",
        "",
    ],
)
def test_a_path_without_a_rule_is_named_with_what_to_do(path):
    with pytest.raises(ValueError, match=rf"parameter {path}: add one to .*RULES"):
        spec_for(path)


def test_an_unmatched_parameter_stops_the_tree():
    params = {"decoder_layer/moe/shared": {"w": normal(2, 8, 8)}}
    with pytest.raises(ValueError, match="decoder_layer/moe/shared/w"):
        partition_specs(params, abstract(1, 8))


def test_the_first_rule_wins(monkeypatch):
    first = ((r"linear/w", P("model")), *RULES)
    monkeypatch.setattr(sharding, "RULES", first)
    assert spec_for("decoder_layer/moe/linear/w") == P("model")
    monkeypatch.setattr(sharding, "RULES", (*RULES, first[0]))
    assert spec_for("decoder_layer/moe/linear/w") == P(None, "data", "model")


# Meshes and axes.


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh(shape):
    mesh = make_mesh(*shape)
    assert mesh.shape == {"data": shape[0], "model": shape[1]}
    assert list(mesh.devices.flat) == jax.devices()[: math.prod(shape)]
    assert current_mesh() is None
    with jax.set_mesh(mesh):
        assert current_mesh() == mesh.abstract_mesh
    assert current_mesh() is None


def test_a_mesh_without_devices():
    with pytest.raises(ValueError, match=r"16 devices .* 8; .*jax_num_cpu_devices"):
        make_mesh(4, 4)
    for wrong in [(0, 8), (8, 0), (-1, -8)]:
        with pytest.raises(ValueError, match="has no devices"):
            make_mesh(*wrong)


def test_axes_that_do_not_divide_are_dropped():
    mesh = abstract(2, 4)
    fitted = [fit("model", n, mesh) for n in (8, 6, 4, 2)]
    assert fitted == ["model", None, "model", None]
    assert fit(("data", "model"), 16, mesh) == ("data", "model")
    assert fit(("data", "model"), 12, mesh) is None
    assert fit(None, 8, mesh) is None
    assert fit("data", 8, abstract(1, 8)) is None
    assert axis_size(mesh, ("data", "model")) == 8
    assert axis_size(mesh, None) == 1
    assert fit_spec(P("data", "model"), (3, 4), mesh) == P(None, "model")
    assert fit_spec(P("data"), (4, 4), mesh) == P("data", None)
    assert fit_spec(P(), (4,), mesh) == P(None)


def test_axes_that_cannot_be():
    with pytest.raises(ValueError, match="expert"):
        fit("expert", 8, abstract(2, 4))
    with pytest.raises(ValueError, match="too many axes"):
        fit_spec(P("data", "model"), (8,), abstract(2, 4))


# Scales and stacks.


def test_scales_and_rows_follow_their_weight():
    q = jax.eval_shape(lambda: quantize(jnp.zeros([4, 64, 32]), 8))
    spec = P(None, "model", "data")
    both = weight_spec(spec, q, abstract(2, 4))
    assert (both.weight, both.scales) == (spec, spec)
    row = weight_spec(P("model", "data"), Row(q, 0), abstract(2, 4))
    assert (row.stack.weight, row.stack.scales, row.index) == (spec, spec, P())
    one = jax.eval_shape(lambda: quantize(jnp.zeros([64, 32]), 1))
    both = weight_spec(P("model", "data"), one, abstract(2, 4))
    assert (both.weight, both.scales) == (P("model", "data"), P(None, "data"))


@pytest.mark.parametrize("groups", [3, 4, 6])
def test_groups_that_would_part_from_their_rows(groups):
    q = quantized(normal(48, 8), groups)
    with pytest.raises(ValueError, match="fit_groups"):
        weight_spec(P("model", None), q, abstract(1, 8))
    x = normal(3, 48)
    with jax.set_mesh(make_mesh(1, 8)), pytest.raises(ValueError, match="fit_groups"):
        matmul(x, q, ("model", None))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 12, 48])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_repeated_scales_are_exact(groups, parts):
    q = quantized(normal(2, 48, 8), groups)
    spec, mesh = P(None, "model", "data"), abstract(1, parts)
    fitted = fit_groups(q, spec, mesh)
    expected = 1 if groups == 1 else math.lcm(groups, parts)
    assert fitted.scales.shape == (2, expected, 8)
    assert fitted.weight is q.weight
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, fitted)),
                                  dequantize(q))
    assert weight_spec(spec, fitted, mesh).weight == fit_spec(spec, q.shape, mesh)


def test_scales_stay_where_the_axis_is_dropped():
    q = quantized(normal(60, 8), 4)
    assert fit_groups(q, P("model", "data"), abstract(1, 8)) is q


@pytest.mark.parametrize("groups, parts", [(8, 2), (8, 4), (8, 8), (4, 8), (1, 8)])
def test_each_device_holds_the_scales_of_its_rows(groups, parts):
    w, mesh = normal(64, 8), make_mesh(1, parts)
    q = quantized(w, groups)
    whole, fitted = dequantize(q), fit_groups(q, P(*DOWN), mesh)
    there = place(fitted, weight_spec(P(*DOWN), fitted, mesh), mesh)
    for a, b in zip(there.weight.addressable_shards, there.scales.addressable_shards):
        assert a.device == b.device
        weight, scales = (jnp.asarray(np.asarray(s.data)) for s in (a, b))
        own = QuantizedTensor(weight, scales)
        np.testing.assert_array_equal(dequantize(own), np.asarray(whole)[a.index])


# Products.


@pytest.mark.parametrize("axes", [UP, DOWN, (("data", "model"), None)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_on_every_mesh(shape, axes):
    w, x = normal(64, 48) / 8, normal(5, 64, seed=1)
    mesh = make_mesh(*shape)
    kinds = [w, quantized(w, 8), Row(jnp.stack([w, -w]), jnp.int32(1))]
    product = jax.jit(lambda x, kinds: [matmul(x, w, axes) for w in kinds])
    specs = [weight_spec(P(*axes), w, mesh) for w in kinds]
    whole = product(x, kinds)
    with jax.set_mesh(mesh):
        parts = product(x, place(kinds, specs, mesh))
    for a, b in zip(parts, whole):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, np.asarray(b), atol=1e-5)
    np.testing.assert_allclose(whole[0], np.asarray(x) @ np.asarray(w), atol=1e-5)


def test_products_whose_axes_do_not_divide():
    w, x = normal(60, 42) / 8, normal(5, 60, seed=1)
    with jax.set_mesh(make_mesh(2, 4)):
        for axes in [UP, DOWN]:
            y = matmul(x, w, axes)
            np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w), atol=1e-5)


def test_products_that_do_not_fit():
    with jax.set_mesh(make_mesh(2, 4)), pytest.raises(ValueError, match="does not fit"):
        matmul(normal(5, 64), normal(32, 16), UP)


@pytest.mark.parametrize("shape", EIGHT)
def test_experts_on_every_mesh(shape):
    into, back = normal(2, 4, 32, 64) / 6, normal(4, 64, 32, seed=1) / 8
    w = jax.jit(lambda *w: Experts(*[quantize(a, 8) for a in w]))(*into, back)
    x, gates = normal(6, 32, seed=2), jnp.full([6, 2], 0.5)
    experts = jnp.asarray([[0, 1], [1, 2], [3, 0], [2, 3], [1, 3], [0, 2]], jnp.int32)
    mesh = make_mesh(*shape)
    run = jax.jit(partial(sharded_experts, num_experts=4))
    whole = run(x, gates, experts, w)
    up, down = P(None, *UP), P(None, *DOWN)
    specs = [weight_spec(s, a, mesh) for s, a in zip((up, up, down), w)]
    with jax.set_mesh(mesh):
        parts = run(x, gates, experts, place(w, Experts(*specs), mesh))
    np.testing.assert_allclose(parts, np.asarray(whole), atol=1e-5)


def test_two_products_and_one_sum():
    mesh, x = make_mesh(1, 8), normal(3, 64)
    weights = [normal(64, 128), normal(128, 64)]
    specs = [weight_spec(P(*a), w, mesh) for a, w in zip((UP, DOWN), weights)]
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x, w: matmul(jax.nn.gelu(matmul(x, w[0], UP)), w[1], DOWN))
        text = f.lower(x, place(weights, specs, mesh)).compile().as_text()
    assert text.count(" all-reduce(") == 1
    for other in ["all-gather", "reduce-scatter", "all-to-all", "collective-permute"]:
        assert f" {other}(" not in text


def test_constrain():
    x = normal(4, 8)
    assert constrain(x, None, "model") is x
    with jax.set_mesh(make_mesh(2, 4)):
        y = jax.jit(lambda x: constrain(x, "data", "model"))(x)
        assert y.sharding.spec == P("data", "model")
        y = jax.jit(lambda x: constrain(x, "data", "model"))(x[:3])
        assert y.sharding.shard_shape(y.shape) == (3, 2)
        with pytest.raises(ValueError, match="too many axes"):
            constrain(x, None, None, None)


# The whole model.

TINY = ModelConfig(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=2, q_heads=8,
    kv_heads=4, head_size=8, num_experts=4, embedding_multiplier=8.0,
    dtype="float32",
)  # fmt: skip
ODD = ModelConfig(
    vocab_size=50, context=32, d_model=36, d_ff=52, num_layers=2, q_heads=6,
    kv_heads=2, head_size=6, num_experts=3, embedding_multiplier=6.0,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    make = jax.jit(lambda key: quantize_params(init_params(key, TINY)))
    return make(jax.random.key(0))


def steps(params, config):
    """Logits of a prefill of rows of different length, then of 4 steps."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, config.vocab_size, [2, 16]).astype(np.int32)
    lengths = np.array([9, 16], np.int32)
    cache = init_cache(config, 2, 32)
    logits, cache = prefill(params, tokens, lengths, cache, config)
    found = [np.asarray(logits)]
    for _ in range(4):
        logits, cache = decode_step(params, found[-1].argmax(-1), cache, config)
        found.append(np.asarray(logits))
    return np.stack(found)


@pytest.fixture(scope="module")
def alone(tiny):
    return steps(tiny, TINY)


@pytest.mark.parametrize("shape", EIGHT)
def test_the_whole_model_prefills_and_decodes_alike(shape, tiny, alone):
    mesh = make_mesh(*shape)
    there = place(tiny, partition_specs(tiny, mesh), mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(steps(there, TINY), alone, atol=1e-5)
    assert alone.std() > 0.1


def test_a_model_that_hardly_divides():
    params = jax.jit(lambda key: init_params(key, ODD))(jax.random.key(1))
    tokens = np.random.default_rng(4).integers(1, 50, [2, 5]).astype(np.int32)
    whole, mesh = all_logits(params, tokens, ODD), make_mesh(2, 4)
    there = place(params, partition_specs(params, mesh), mesh)
    with jax.set_mesh(mesh):
        parts = all_logits(there, tokens, ODD)
    np.testing.assert_allclose(parts, np.asarray(whole), atol=1e-5)


def test_what_a_device_holds_is_what_the_specs_say(tiny):
    for shape in SHAPES:
        mesh = make_mesh(*shape)
        where = shardings(partition_specs(tiny, mesh), mesh)
        assert jax.tree.structure(where) == jax.tree.structure(tiny)
        there = jax.tree.leaves(jax.device_put(tiny, where))
        for a, s in zip(there, jax.tree.leaves(where)):
            held = {b.data.shape for b in a.addressable_shards}
            assert held == {s.shard_shape(a.shape)}


def test_grok_1_on_eight_devices_that_are_not_there():
    init = partial(init_params, config=PRESETS["grok-1"])
    params = jax.eval_shape(lambda key: quantize_params(init(key)), jax.random.key(0))
    mesh = abstract(1, 8)
    where = shardings(partition_specs(params, mesh), mesh)
    size = {"all": 0, "one": 0, "copied": 0}
    for a, s in zip(jax.tree.leaves(params), jax.tree.leaves(where)):
        assert isinstance(s, NamedSharding)
        one = math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize
        size["all"] += a.size * a.dtype.itemsize
        size["one"] += one
        size["copied"] += one if one == a.size * a.dtype.itemsize else 0
    assert round(size["all"] / 1e9, 1) == 318.2
    assert round(size["one"] / 1e9, 1) == 39.8
    assert size["copied"] == 64 * 6144 * 8 * 4 + 257 * 6144 * 4
