"""Rules, meshes and products on eight simulated devices."""

import math
import re
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe.attention import AttentionSpec
from annotated_moe.checkpoints import quantize_params
from annotated_moe.families import PRESETS
from annotated_moe.families.grok import grok_config
from annotated_moe.linear import matmul
from annotated_moe.model import (
    all_logits,
    decode_step,
    flat_specs,
    init_cache,
    init_params,
    param_specs,
    prefill,
)
from annotated_moe.moe import MoE, MoESpec
from annotated_moe.parallel import (
    MESH_AXES,
    axis_size,
    current_mesh,
    fit,
    fit_groups,
    fit_spec,
    make_mesh,
    partition_spec,
    partition_specs,
    shardings,
    weight_spec,
)
from annotated_moe.params import ParamSpec, record_specs
from annotated_moe.placement import here
from annotated_moe.quantization import (
    LazySlice,
    QuantizedTensor,
    dequantize,
    quantize,
)

# data, model, expert
EIGHT = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (1, 2, 4), (1, 4, 2), (2, 2, 2)]
SHAPES = [*EIGHT, (1, 4), (2, 2), (4, 1), (1, 2), (2, 1), (1, 1), (1, 1, 4)]
UP, DOWN = ("embed", "mlp"), ("mlp", "embed")
quantized = jax.jit(quantize, static_argnums=1)


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def abstract(data, model, expert=1):
    return AbstractMesh((data, expert, model), ("data", "expert", "model"))


def place(tree, specs, mesh):
    return jax.device_put(tree, shardings(specs, mesh))


# Logical axes.

# The rules of the release, each for one parameter of a layer.
GROK = {
    "multi_head_attention/query/w": P("data", "model"),
    "multi_head_attention/key/w": P("data", "model"),
    "multi_head_attention/value/w": P("data", "model"),
    "multi_head_attention/linear/w": P("model", "data"),
    "moe/linear/w": P(None, "data", "model"),
    "moe/linear_v/w": P(None, "data", "model"),
    "moe/linear_1/w": P(None, "model", "data"),
    "linear/w": P("data", "model"),
    "linear_v/w": P("data", "model"),
    "linear_1/w": P("model", "data"),
    "router/w": P("data"),
    "in_out_embed/embeddings": P(None, ("data", "model")),
    "rms_norm/scale": P(),
    "rms_norm_1/scale": P(),
    "rms_norm_2/scale": P(),
    "rms_norm_3/scale": P(),
}


@pytest.mark.parametrize("num_experts", [8, 1])
def test_the_cuts_of_grok_1_are_those_of_the_release(num_experts):
    mesh, tried = abstract(2, 4), set()
    specs = flat_specs(grok_config(num_experts=num_experts))
    for (module, name), spec in specs.items():
        path = f"{module}/{name}".removeprefix("decoder_layer/")
        tried.add(path)
        rule = P(*[None] * (spec.axes[0] == "layers"), *GROK[path])
        ours = fit_spec(partition_spec(spec.axes), spec.shape, mesh)
        assert ours == fit_spec(rule, spec.shape, mesh), path
    other = "moe/" if num_experts == 1 else "linear"
    assert tried >= {p for p in GROK if not p.startswith((other, "router"))}


@pytest.mark.parametrize("name", ["mpl", "heads ", ""])
def test_an_axis_that_nobody_knows_is_named_with_what_to_do(name):
    with pytest.raises(ValueError, match=f"cuts the axis '{name}': add it there"):
        partition_spec(("embed", name))
    specs = {"decoder_layer/moe/shared": {"w": ParamSpec((2, 8), (None, name))}}
    params = {"decoder_layer/moe/shared": {"w": normal(2, 8)}}
    with pytest.raises(ValueError, match="add it there"):
        partition_specs(params, specs, abstract(1, 8))


def test_every_family_names_axes_of_the_table():
    for config in PRESETS.values():
        for spec in flat_specs(config).values():
            assert set(spec.axes) <= set(MESH_AXES)


def test_specs_are_recorded_and_nothing_is_allocated():
    spec = AttentionSpec(48, 8, 128, multiplier=1.0)
    h = jnp.zeros((1, 1, 6144))
    found = record_specs(lambda: spec.build()(h, jnp.zeros((1, 1), jnp.int32)))
    assert found["multi_head_attention/key"] == {
        "w": ParamSpec((6144, 1024), ("embed", "kv_heads"), True, False)
    }
    own = record_specs(lambda: hk.get_parameter("x", (3, 2), jnp.float32, jnp.ones))
    assert own == {"~": {"x": ParamSpec((3, 2), (None, None))}}


# Meshes and axes.


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh(shape):
    mesh = make_mesh(*shape)
    data, model, expert = (*shape, 1)[:3]
    assert mesh.shape == {"data": data, "expert": expert, "model": model}
    assert list(mesh.devices.flat) == jax.devices()[: math.prod(shape)]
    assert current_mesh() is None
    with jax.set_mesh(mesh):
        assert current_mesh() == mesh.abstract_mesh
    assert current_mesh() is None


def test_a_mesh_without_devices(any_types):
    with pytest.raises(ValueError, match=r"16 devices .* 8; .*jax_num_cpu_devices"):
        make_mesh(4, 4)
    for wrong in [(0, 8), (8, 0), (-1, -8), (1, 8, 0)]:
        with pytest.raises(ValueError, match="has no devices"):
            make_mesh(*wrong)
    for wrong in [(1.0,), (True, 2), (1, "2"), (None,)]:
        with pytest.raises(TypeError, match="sizes are whole numbers: "):
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
    with pytest.raises(ValueError, match="pipe"):
        fit("pipe", 8, abstract(2, 4))
    with pytest.raises(ValueError, match="too many axes"):
        fit_spec(P("data", "model"), (8,), abstract(2, 4))


# Scales and stacks.


def test_scales_and_stacks_follow_their_weight():
    q = jax.eval_shape(lambda: quantize(jnp.zeros([4, 64, 32]), 8))
    spec = P(None, "model", "data")
    both = weight_spec(spec, q, abstract(2, 4))
    assert (both.weight, both.scales) == (spec, spec)
    lazy = weight_spec(P("model", "data"), LazySlice(q, (0,)), abstract(2, 4))
    assert (lazy.stack.weight, lazy.stack.scales, lazy.index) == (spec, spec, (P(),))
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
        matmul(x, q, ("mlp", None))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 12, 48])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_repeated_scales_are_exact(groups, parts):
    q = quantized(normal(2, 48, 8), groups)
    spec, mesh = P(None, "model", "data"), abstract(1, parts)
    fitted = fit_groups(q, spec, mesh)
    expected = 1 if groups == 1 else math.lcm(groups, parts)
    assert fitted.scales.shape == (2, expected, 8)
    assert fitted.weight is q.weight
    np.testing.assert_array_equal(
        dequantize(jax.tree.map(jnp.asarray, fitted)), dequantize(q)
    )
    assert weight_spec(spec, fitted, mesh).weight == fit_spec(spec, q.shape, mesh)


def test_scales_stay_where_the_axis_is_dropped():
    q = quantized(normal(60, 8), 4)
    assert fit_groups(q, P("model", "data"), abstract(1, 8)) is q


@pytest.mark.parametrize("groups, parts", [(8, 2), (8, 4), (8, 8), (4, 8), (1, 8)])
def test_each_device_holds_the_scales_of_its_rows(groups, parts):
    w, mesh = normal(64, 8), make_mesh(1, parts)
    q = quantized(w, groups)
    down = partition_spec(DOWN)
    whole, fitted = dequantize(q), fit_groups(q, down, mesh)
    there = place(fitted, weight_spec(down, fitted, mesh), mesh)
    for a, b in zip(there.weight.addressable_shards, there.scales.addressable_shards):
        assert a.device == b.device
        weight, scales = (jnp.asarray(np.asarray(s.data)) for s in (a, b))
        own = QuantizedTensor(weight, scales)
        np.testing.assert_array_equal(dequantize(own), np.asarray(whole)[a.index])


# Products.


@pytest.mark.parametrize("axes", [UP, DOWN, ("table", None)])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_on_every_mesh(shape, axes):
    w, x = normal(64, 48) / 8, normal(5, 64, seed=1)
    mesh = make_mesh(*shape)
    kinds = [w, quantized(w, 8), LazySlice(jnp.stack([w, -w]), (jnp.int32(1),))]
    product = jax.jit(lambda x, kinds: [matmul(x, w, axes) for w in kinds])
    specs = [weight_spec(partition_spec(axes), w, mesh) for w in kinds]
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


# Parts of a computation.


def run(mesh, f, params, specs, *inputs):
    """A function of Haiku modules on a mesh: its program, its result."""
    f = hk.without_apply_rng(hk.transform(f))
    there = place(params, partition_specs(params, specs, mesh), mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda params, *a: f.apply(params, *a))
        program = step.lower(there, *inputs).compile()
    return program.as_text(), np.asarray(program(there, *inputs))


def random_params(specs, groups=1):
    def random(spec):
        w = normal(*spec.shape, seed=sum(spec.shape)) / 8
        return quantized(w, groups) if spec.matrix and groups else w

    return jax.tree.map(random, specs)


REAL = jnp.asarray([[True] * 5 + [False], [True] * 6])


@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("shape", [*EIGHT, (1, 1, 4)])
def test_experts_on_every_mesh(shape, groups):
    x = normal(2, 6, 32, seed=2)

    def f(x):
        return MoESpec(4, 2, 64).build()(x, REAL)[0]

    specs = record_specs(lambda: f(x))
    params = random_params(specs, groups)
    _, whole = run(make_mesh(), f, params, specs, x)
    text, parts = run(make_mesh(*shape), f, params, specs, x)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert not whole[0, 5].any() and whole.std() > 0.1
    if shape[0] == 1:  # one sum, over one axis or over two
        assert exchanges(text) == ["all-reduce"]


def test_experts_that_the_mesh_cannot_deal_out_are_everywhere():
    x = normal(2, 6, 32)

    def f(x):
        return MoESpec(3, 2, 64).build()(x, REAL)[0]

    specs = record_specs(lambda: f(x))
    params = random_params(specs)
    _, whole = run(make_mesh(), f, params, specs, x)
    _, parts = run(make_mesh(1, 2, 4), f, params, specs, x)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


class Biased(MoE):
    def parameters(self, d):
        return super().parameters(d) | {"linear_1/b": ((d,), ("embed",))}

    def expert(self, x, gates, w):
        b = here().once(w["linear_1/b"], "mlp")
        return super().expert(x, gates, w) + gates[:, None] * b


@pytest.mark.parametrize("shape", EIGHT)
def test_a_bias_is_added_once(shape):
    x = normal(2, 6, 32)

    def f(x):
        return Biased(MoESpec(4, 2, 64))(x, REAL)[0]

    specs = record_specs(lambda: f(x))
    params = random_params(specs)
    params["moe/linear_1"]["b"] = normal(4, 32)
    _, whole = run(make_mesh(), f, params, specs, x)
    _, parts = run(make_mesh(*shape), f, params, specs, x)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_a_name_that_is_cut_here_and_whole_there_is_refused():
    with jax.set_mesh(make_mesh(1, 4)):
        f = here().split(lambda a, b: a, (("heads",), ("heads",)), ("heads",))
        with pytest.raises(ValueError, match=r"'heads' in one .* of shape \(2,\)"):
            f(jnp.zeros(4), jnp.zeros(2))


def test_parts_know_which_they_are():
    def f(x):
        first = here().first(x.shape[0], "experts")
        alone = here().once(jnp.ones(1), "experts")
        return x + first, here().total(alone, "experts")

    with jax.set_mesh(make_mesh(1, 2, 4)):
        g = here().split(f, (("experts",),), (("experts",), (None,)))
        numbers, one = g(jnp.zeros(8))
        np.testing.assert_array_equal(numbers, [0, 0, 2, 2, 4, 4, 6, 6])
        np.testing.assert_array_equal(one, [1])
        assert type(here()).__name__ == "OnMesh"
    assert type(here()).__name__ == "OneDevice"


def exchanges(text, inside=None):
    """Kinds of exchange in a program; `inside` False leaves out ENTRY's."""
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    entry, found = False, []
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            entry = line.startswith("ENTRY")
        hit = re.search(rf" ({kinds})(-start)?\(", line)
        if hit and not (entry and inside):
            found.append(hit[1])
    return sorted(found)


def test_two_products_and_one_sum():
    mesh, x = make_mesh(1, 8), normal(3, 64)
    weights = [normal(64, 128), normal(128, 64)]
    specs = [
        weight_spec(partition_spec(a), w, mesh) for a, w in zip((UP, DOWN), weights)
    ]
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x, w: matmul(jax.nn.gelu(matmul(x, w[0], UP)), w[1], DOWN))
        text = f.lower(x, place(weights, specs, mesh)).compile().as_text()
    assert text.count(" all-reduce(") == 1
    for other in ["all-gather", "reduce-scatter", "all-to-all", "collective-permute"]:
        assert f" {other}(" not in text


def test_constrain():
    x = normal(4, 8)
    assert here().constrain(x, (None, "mlp")) is x
    with jax.set_mesh(make_mesh(2, 4)):
        y = jax.jit(lambda x: here().constrain(x, ("batch", "mlp")))(x)
        assert y.sharding.spec == P("data", "model")
        y = jax.jit(lambda x: here().constrain(x, ("batch", "mlp")))(x[:3])
        assert y.sharding.shard_shape(y.shape) == (3, 2)
        with pytest.raises(ValueError, match="too many axes"):
            here().constrain(x, (None, None, None))


# Heads and rows.


@pytest.mark.parametrize(
    "kv, q, model, copies",
    [(8, 48, 1, 1), (8, 48, 4, 1), (8, 48, 8, 1), (4, 16, 8, 2), (1, 8, 8, 8),
     (2, 8, 4, 2), (6, 24, 4, 2), (3, 24, 8, 8), (2, 6, 4, 1), (5, 5, 8, 1)],
)  # fmt: skip
def test_copies_make_heads_whole(kv, q, model, copies):
    with jax.set_mesh(make_mesh(1, model)):
        assert here().head_copies(kv, q) == copies
        if q % model == 0:
            assert kv * copies % model == 0 and q % (kv * copies) == 0
    assert here().head_copies(kv, q) == 1


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (1, 4, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("kv, value_size", [(1, None), (2, 12), (4, 6)])
def test_heads_are_gathered_in_one_exchange(kv, value_size, shape):
    spec = AttentionSpec(8, kv, 8, multiplier=8**-0.5, value_size=value_size)
    x = normal(2, 6, 32)

    def f(x):
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        return spec.build()(x, positions)[0]

    specs = record_specs(lambda: f(x))
    params = random_params(specs, 0)
    _, whole = run(make_mesh(), f, params, specs, x)
    text, parts = run(make_mesh(*shape), f, params, specs, x)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    if shape[0] == 1:
        gathers = [] if kv % shape[1] == 0 else ["all-gather"]
        assert exchanges(text) == [*gathers, "all-reduce"]


SIZES = {
    "vocab_size": 50, "context": 32, "d_model": 64, "d_ff": 128, "num_layers": 2,
    "q_heads": 16, "head_size": 8, "num_experts": 4, "embedding_multiplier": 8.0,
    "dtype": "float32",
}  # fmt: skip
FOUR = grok_config(kv_heads=4, **SIZES)
SAME = grok_config(kv_heads=8, **SIZES)


@pytest.mark.parametrize(
    "config, shape, rows, held",
    [(FOUR, (1, 8), 3, (2, 3, 16, 1, 8)), (FOUR, (2, 4), 4, (2, 2, 16, 1, 8)),
     (FOUR, (2, 4), 3, (2, 3, 16, 1, 8)), (SAME, (1, 8), 3, (2, 3, 16, 1, 8)),
     (FOUR, (4, 2), 4, (2, 1, 16, 2, 8)), (FOUR, (8, 1), 3, (2, 3, 16, 4, 8))],
)  # fmt: skip
def test_a_device_caches_its_rows_and_its_heads(config, shape, rows, held):
    with jax.set_mesh(make_mesh(*shape)):
        (cache,) = init_cache(config, rows, 16).places
    for stack in (cache.k, cache.v):
        assert {s.data.shape for s in stack.addressable_shards} == {held}


@pytest.mark.parametrize(
    "config, shape, gathers",
    [(SAME, (1, 8), 0), (FOUR, (1, 8), 1), (FOUR, (2, 4), 1), (SAME, (1, 2, 4), 0)],
)
def test_a_layer_exchanges_no_more_than_it_must(config, shape, gathers):
    """In a decode step of the whole model, as compiled."""
    mesh = make_mesh(*shape)
    params = jax.jit(lambda key: quantize_params(init_params(key, config), config))(
        jax.random.key(0)
    )
    with jax.set_mesh(mesh):
        params = place(params, partition_specs(params, param_specs(config), mesh), mesh)
        cache = init_cache(config, 4, 16)
        tokens = np.ones(4, np.int32)
        program = decode_step.lower(params, tokens, cache, config).compile()
    found = exchanges(program.as_text(), inside=True)
    assert set(found) <= {"all-reduce", "all-gather"}
    assert found.count("all-gather") == gathers
    if shape[0] == 1:
        assert found.count("all-reduce") == 2


# The whole model.

TINY = grok_config(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=2, q_heads=8,
    kv_heads=4, head_size=8, num_experts=4, embedding_multiplier=8.0,
    dtype="float32",
)  # fmt: skip
ODD = grok_config(
    vocab_size=50, context=32, d_model=36, d_ff=52, num_layers=2, q_heads=6,
    kv_heads=2, head_size=6, num_experts=3, embedding_multiplier=6.0,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    make = jax.jit(lambda key: quantize_params(init_params(key, TINY), TINY))
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


@pytest.mark.parametrize("shape", [
    shape if shape in [(1, 8, 1), (8, 1, 1), (2, 2, 2)]
    else pytest.param(shape, marks=pytest.mark.full) for shape in EIGHT
])  # fmt: skip
def test_the_whole_model_prefills_and_decodes_alike(shape, tiny, alone):
    mesh = make_mesh(*shape)
    there = place(tiny, partition_specs(tiny, param_specs(TINY), mesh), mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(steps(there, TINY), alone, atol=1e-5)
    assert alone.std() > 0.1


def test_a_model_that_hardly_divides():
    params = jax.jit(lambda key: init_params(key, ODD))(jax.random.key(1))
    tokens = np.random.default_rng(4).integers(1, 50, [2, 5]).astype(np.int32)
    whole, mesh = all_logits(params, tokens, ODD), make_mesh(2, 4)
    there = place(params, partition_specs(params, param_specs(ODD), mesh), mesh)
    with jax.set_mesh(mesh):
        parts = all_logits(there, tokens, ODD)
    np.testing.assert_allclose(parts, np.asarray(whole), atol=1e-5)


def test_what_a_device_holds_is_what_the_specs_say(tiny):
    for shape in SHAPES:
        mesh = make_mesh(*shape)
        where = shardings(partition_specs(tiny, param_specs(TINY), mesh), mesh)
        assert jax.tree.structure(where) == jax.tree.structure(tiny)
        there = jax.tree.leaves(jax.device_put(tiny, where))
        for a, s in zip(there, jax.tree.leaves(where)):
            held = {b.data.shape for b in a.addressable_shards}
            assert held == {s.shard_shape(a.shape)}


def test_grok_1_on_eight_devices_that_are_not_there():
    init = partial(init_params, config=PRESETS["grok-1"])
    grok = PRESETS["grok-1"]
    params = jax.eval_shape(
        lambda key: quantize_params(init(key), grok), jax.random.key(0)
    )
    mesh = abstract(1, 8)
    where = shardings(partition_specs(params, param_specs(grok), mesh), mesh)
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
