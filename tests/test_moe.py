"""Router, experts and their dispatch: recordings, corner cases, faults."""

from functools import partial
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.moe import (
    ACTIVATIONS,
    FeedForwardSpec,
    MoE,
    MoESpec,
    Route,
    block_rows,
    capacity,
    capacity_and_drop,
    check_shapes,
    dropped,
    every_expert,
    geglu,
    glu,
    load_balancing_loss,
    network,
    number_among_held,
    one_expert,
    plan_blocks,
    position_in_expert,
    route,
    router_z_loss,
    rows_of_block,
    sort_and_tile,
)
from annotated_moe.parallel import make_mesh
from annotated_moe.quantization import (
    LazySlice,
    QuantizedTensor,
    dequantize,
    quantize,
)

RECORDED = np.load(Path(__file__).parent / "fixtures" / "moe.npz")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
NAMES = ("linear", "linear_v", "linear_1")
every = jax.jit(every_expert)
seats = jax.jit(capacity_and_drop, static_argnames=("apply", "factor"))
tiles = jax.jit(sort_and_tile, static_argnames=("apply", "block"))
WAYS = {"every": every, "seats": partial(seats, factor=8.0), "tiles": tiles}


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def random_experts(e, d, f, seed=0):
    shapes = {"linear": (e, d, f), "linear_v": (e, d, f), "linear_1": (e, f, d)}
    return {
        name: normal(*shape, seed=seed + i, scale=shape[1] ** -0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }


def random_job(n, a, e, d=16, f=24, seed=0):
    x = normal(n, d, seed=seed)
    r = route(x, normal(d, e, seed=seed + 1), a)
    return x, r.gates, r.experts, random_experts(e, d, f, seed + 2)


def by_hand(x, gates, experts, w):
    """The definition, in float64, one token and one choice at a time."""
    x, gates = np.asarray(x, np.float64), np.asarray(gates, np.float64)
    gate, up, down = (np.asarray(w[name], np.float64) for name in NAMES)
    y = np.zeros_like(x)
    for n, picked in enumerate(np.asarray(experts)):
        for a, e in enumerate(picked):
            g = x[n] @ gate[e]
            gelu = g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
            y[n] += gates[n, a] * ((gelu * (x[n] @ up[e])) @ down[e])
    return y


def recorded_tensor(name):
    scales = jnp.asarray(RECORDED[f"{name}.scales"], jnp.bfloat16)
    return QuantizedTensor(jnp.asarray(RECORDED[f"{name}.weight_i8"]), scales)


def recorded_experts():
    return {name: recorded_tensor(f"moe.{name}") for name in NAMES}


def recorded_job(dtype):
    x = jnp.asarray(RECORDED["moe.x"]).reshape(-1, 32).astype(dtype)
    r = route(x, jnp.asarray(RECORDED["moe.router_w"]), 2)
    return x, r.gates, r.experts, recorded_experts()


def spread(case):
    """How far the recording's own bfloat16 run is from its float32 run."""
    return np.abs(RECORDED[f"{case}.out.bf16"] - RECORDED[f"{case}.out.f32"]).max()


# --- the recordings ---------------------------------------------------------


@pytest.mark.parametrize("mode", DTYPES)
def test_router_matches_the_recording(mode):
    x = jnp.asarray(RECORDED["router.x"]).reshape(-1, 32).astype(DTYPES[mode])
    got = route(x, jnp.asarray(RECORDED["router.w"]), 2)
    fields = {"probs": "probs", "gates": "gate", "logits": "logits"}
    for ours, theirs in fields.items():
        want = RECORDED[f"router.out.{mode}.{theirs}"]
        np.testing.assert_allclose(
            getattr(got, ours), want.reshape(12, -1), atol=1e-5, rtol=1e-5
        )
    want = RECORDED[f"router.out.{mode}.index"].reshape(12, 2)
    np.testing.assert_array_equal(got.experts, want)


def test_float_expert_matches_the_recording():
    w = {name: jnp.asarray(RECORDED[f"dense_plain.{name}"]) for name in NAMES}
    x = jnp.asarray(RECORDED["moe.x"]).reshape(-1, 32)
    want = RECORDED["dense_plain.out.f32"].reshape(-1, 32)
    np.testing.assert_allclose(glu(x, w), want, atol=1e-5)


@pytest.mark.parametrize("mode", DTYPES)
def test_quantized_expert_matches_the_recording(mode):
    x = jnp.asarray(RECORDED["moe.x"])[0].astype(DTYPES[mode])
    third = one_expert(recorded_experts(), jnp.int32(3))
    got = jax.jit(glu)(x, third)
    want = RECORDED[f"dense_quant_expert3.out.{mode}"]
    bound = 1e-5 if mode == "f32" else spread("dense_quant_expert3")
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("way", WAYS)
def test_layer_matches_the_float32_recording(way):
    # The release rounds its output to bfloat16 even here; half a unit in
    # the last of eight bits is what that may move.
    want = RECORDED["moe.out.f32"].reshape(-1, 32)
    got = WAYS[way](*recorded_job(jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_layer_is_within_the_bfloat16_spread(way):
    want = RECORDED["moe.out.bf16"].reshape(-1, 32)
    got = WAYS[way](*recorded_job(jnp.bfloat16)).astype(jnp.float32)
    assert np.abs(got - want).max() <= spread("moe")


def test_every_expert_makes_the_casts_of_the_release():
    """Each bit of the release, evaluated one operation at a time."""
    x, gates, experts, w = recorded_job(jnp.bfloat16)
    w = {name: dequantize(q, jnp.bfloat16) for name, q in w.items()}
    got = every_expert(x, gates, experts, w)
    assert got.dtype == jnp.bfloat16
    want = RECORDED["moe.out.bf16e"].reshape(-1, 32)
    np.testing.assert_array_equal(got.astype(jnp.float32), want)


def test_our_roundings_move_less_than_the_release_s():
    x, gates, experts, w = recorded_job(jnp.bfloat16)
    whole = {name: dequantize(q) for name, q in w.items()}
    exact = by_hand(x.astype(jnp.float32), gates, experts, whole)
    ours = np.abs(tiles(x, gates, experts, w) - exact).mean()
    theirs = np.abs(RECORDED["moe.out.bf16e"].reshape(-1, 32) - exact).mean()
    assert 0 < 2 * ours < theirs


@pytest.mark.parametrize("way", WAYS)
def test_float_experts_are_not_skipped(way):
    assert RECORDED["moe_unquantized.is_identity"] == 1  # the release's fault
    x, gates, experts, w = recorded_job(jnp.float32)
    whole = {name: dequantize(q) for name, q in w.items()}
    got = WAYS[way](x, gates, experts, whole)
    np.testing.assert_allclose(got, tiles(x, gates, experts, w), atol=1e-5)
    assert np.abs(got - x).max() > 1


# --- all ways agree ---------------------------------------------------------

CORNERS = {
    "one token": (1, 2, 8),
    "one token, one choice": (1, 1, 8),
    "one choice": (20, 1, 8),
    "five experts": (33, 2, 5),
    "fewer choices than a block": (3, 2, 8),
    "all experts": (9, 3, 3),
    "one expert": (7, 1, 1),
    "more experts than choices": (2, 2, 13),
    "several blocks": (300, 2, 4),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_all_ways_agree(corner):
    job = random_job(*CORNERS[corner])
    want = by_hand(*job)
    for name, way in WAYS.items():
        way = partial(seats, factor=13.0) if name == "seats" else way
        got = way(*job)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("crowded", [0, 4, 7])
def test_all_ways_agree_when_all_go_to_one_expert(crowded):
    x, gates, experts, w = random_job(40, 1, 8)
    experts = jnp.full_like(experts, crowded)
    want = by_hand(x, gates, experts, w)
    for name, way in WAYS.items():
        got = way(x, gates, experts, w)
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


def test_all_ways_agree_in_bfloat16():
    x, *rest = random_job(24, 2, 8)
    want = by_hand(x.astype(jnp.bfloat16).astype(jnp.float32), *rest)
    size = np.abs(want).max()
    for name, way in WAYS.items():
        got = way(x.astype(jnp.bfloat16), *rest)
        assert got.dtype == (jnp.bfloat16 if name == "every" else jnp.float32)
        assert 0 < np.abs(got - want).max() < 0.02 * size, name


KINDS = [(way, kind) for way in WAYS for kind in ("int8", "slice", "int8 slice")]


@pytest.mark.parametrize(
    "way, kind",  # training reads no slices
    [(way, kind) for way, kind in KINDS if way != "seats" or "slice" not in kind],
)
def test_weights_of_every_kind(way, kind):
    x, gates, experts, held = random_job(24, 2, 4)
    if "int8" in kind:
        held = {name: quantize(m, groups=2) for name, m in held.items()}
        whole = {name: dequantize(q) for name, q in held.items()}
    want = by_hand(x, gates, experts, whole if "int8" in kind else held)
    if "slice" in kind:
        stacks = jax.tree.map(lambda m: jnp.stack([0 * m, m]), held)
        held = {name: LazySlice(stack, (jnp.int32(1),))
                for name, stack in stacks.items()}  # fmt: skip
    got = WAYS[way](x, gates, experts, held)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_none_adds_nothing(way):
    x, gates, experts, w = random_job(24, 2, 4)
    none = jnp.zeros((24, 2), bool).at[3].set(True).at[7, 1].set(True)
    want = by_hand(x, jnp.where(none, 0, gates), experts, w)
    got = WAYS[way](x, gates, jnp.where(none, 4, experts), w)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert (got[3] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_nobody_chooses_anybody(way):
    x, gates, experts, w = random_job(5, 2, 4)
    assert (WAYS[way](x, gates, jnp.full_like(experts, 4), w) == 0).all()


@pytest.mark.parametrize("block", [1, 3, 16, 128])
def test_block_size_does_not_matter(block):
    job = random_job(20, 2, 5)
    np.testing.assert_allclose(tiles(*job, block=block), tiles(*job), atol=1e-5)


def test_company_does_not_matter_without_drops():
    x, gates, experts, w = random_job(40, 2, 8)
    together = tiles(x, gates, experts, w)
    for n in [0, 17, 39]:
        alone = tiles(x[n : n + 1], gates[n : n + 1], experts[n : n + 1], w)
        np.testing.assert_allclose(alone[0], together[n], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_broken_token_stays_alone(way):
    x, *rest = random_job(20, 2, 8)
    got = WAYS[way](x.at[3].set(jnp.nan), *rest)
    assert np.isnan(got[3]).all()
    healthy = np.delete(np.asarray(got), 3, axis=0)
    np.testing.assert_allclose(healthy, np.delete(by_hand(x, *rest), 3, 0), atol=2e-5)


# --- capacity ---------------------------------------------------------------


@pytest.mark.parametrize(
    "n, a, e, factor, seats",
    [(8192, 2, 8, 1.0, 2048), (8192, 2, 8, 1.5, 3072), (48, 2, 8, 1.0, 12),
     (10, 2, 8, 1.0, 3), (10, 2, 8, 100.0, 10), (1, 2, 8, 0.1, 1)],
)  # fmt: skip
def test_capacity(n, a, e, factor, seats):
    assert capacity(n, a, e, factor) == seats


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_capacity_refuses_a_factor_that_is_not_positive(factor):
    with pytest.raises(ValueError, match="not positive"):
        capacity(8, 2, 8, factor)


def test_dropped_is_what_a_queue_would_drop():
    experts = random_job(60, 2, 5)[2]
    room = capacity(60, 2, 5, 0.8)
    seen, want = [0] * 5, []
    for e in np.asarray(experts).reshape(-1):
        want.append(seen[e] >= room)
        seen[e] += 1
    want = np.reshape(want, (60, 2))
    assert 5 < want.sum() < 60
    np.testing.assert_array_equal(dropped(experts, 5, 0.8), want)
    assert position_in_expert(experts, 5).max() == max(seen) - 1


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
def test_a_dropped_choice_adds_nothing(factor):
    x, gates, experts, w = random_job(60, 2, 5)
    kept = jnp.where(dropped(experts, 5, factor), 0, gates)
    want = by_hand(x, kept, experts, w)
    got = seats(x, gates, experts, w, factor=factor)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert (factor > 1.4) == (not dropped(experts, 5, factor).any())


# --- blocks -----------------------------------------------------------------


@pytest.mark.parametrize("n, a, e, block", [(1, 1, 4, 8), (50, 2, 5, 8), (64, 3, 6, 1)])
def test_blocks_hold_each_choice_once_and_one_expert_each(n, a, e, block):
    experts = random_job(n, a, e)[2]
    plan = plan_blocks(experts, e, block)
    flat, found = np.asarray(experts).reshape(-1), []
    for j in range(int(plan.first[-1])):
        owner, choices = rows_of_block(plan, j, block)
        real = np.asarray(choices)[np.asarray(choices) < n * a]
        assert len(real) > 0 and set(flat[real]) == {int(owner)}
        found += real.tolist()
    assert sorted(found) == list(range(n * a))
    assert plan.first[-1] == sum(-(-c // block) for c in np.bincount(flat))


def test_block_rows():
    assert block_rows(1, 2, 8) == block_rows(2, 1, 8) == 1
    assert block_rows(2, 2, 8) == 2 and block_rows(4, 2, 8) == block_rows(8, 2, 8) == 4
    assert block_rows(8, 2, 2) == 8 and block_rows(1, 1, 8) == 1
    assert block_rows(9, 2, 8) == block_rows(20, 2, 8) == 8
    assert block_rows(32, 2, 8) == 16 and block_rows(64, 2, 8) == 32
    assert block_rows(256, 2, 8) == 64 and block_rows(10**6, 2, 8) == 128


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
def test_a_block_is_high_enough_for_nearly_every_expert(n):
    """A second block reads the expert's weights again."""
    chosen = np.random.default_rng(0).random((2000, n, 8)).argsort(-1)[..., :2]
    loads = (chosen[..., None] == np.arange(8)).sum((1, 2))
    blocks = -(-loads // block_rows(n, 2, 8))
    assert blocks.sum() < 1.05 * (loads > 0).sum()


@pytest.mark.parametrize("n, a, e", [(1, 2, 8), (17, 2, 5), (200, 2, 8)])
def test_the_claimed_worst_case_of_blocks(n, a, e):
    block = block_rows(n, a, e)
    bound = min(n * a, n * a // block + min(e, n * a))
    for seed in range(10):
        experts = random_job(n, a, e, seed=seed)[2]
        assert plan_blocks(experts, e, block).first[-1] <= bound


# --- work and memory --------------------------------------------------------


def arrays_in(jaxpr):
    """Every array that a jaxpr and the jaxprs inside it compute."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


def test_training_makes_no_one_hot_of_seats():
    job = random_job(512, 2, 8, d=16, f=32)

    def loss(x, gates, w):
        return jnp.sum(capacity_and_drop(x, gates, job[2], w) ** 2)

    grad = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(job[0], job[1], job[3])
    rows = 8 * capacity(512, 2, 8, 1.5)
    assert max(a.size for a in arrays_in(grad.jaxpr)) <= rows * 32


@pytest.mark.parametrize("n", [1, 24])
def test_sort_and_tile_never_writes_all_experts_as_floats(n):
    x, gates, experts, w = random_job(n, 2, 8, d=64, f=96)
    w = {name: quantize(m) for name, m in w.items()}
    made = jax.make_jaxpr(sort_and_tile)(x, gates, experts, w)
    floats = [a for a in arrays_in(made.jaxpr) if a.dtype.kind == "f"]
    assert max(a.size for a in floats) < 8 * 64 * 96


# --- gradients --------------------------------------------------------------


def test_gradients_of_capacity_and_drop():
    x, gates, experts, w = random_job(40, 2, 5)
    kept = jnp.where(dropped(experts, 5, 1.0), 0.0, 1.0)
    assert kept.min() == 0

    def through_seats(x, gates, w):
        return jnp.sum(seats(x, gates, experts, w, factor=1.0) ** 2)

    def through_all(x, gates, w):
        return jnp.sum(every(x, gates * kept, experts, w) ** 2)

    got = jax.grad(through_seats, argnums=(0, 1, 2))(x, gates, w)
    want = jax.grad(through_all, argnums=(0, 1, 2))(x, gates, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))


def test_sort_and_tile_says_that_it_has_no_gradient():
    x, *rest = random_job(8, 2, 4)
    with pytest.raises(NotImplementedError, match="train with capacity_and_drop"):
        jax.grad(lambda x: jnp.sum(sort_and_tile(x, *rest)))(x)


# --- losses -----------------------------------------------------------------


def test_load_balancing_loss_is_the_formula():
    r = route(normal(50, 16), normal(16, 8, seed=1), 2)
    share = np.bincount(np.asarray(r.experts).reshape(-1), minlength=8) / 100
    want = 8 * np.sum(share * np.asarray(r.probs).mean(0))
    np.testing.assert_allclose(load_balancing_loss(r.probs, r.experts), want, rtol=1e-5)


def test_load_balancing_loss_pushes_away_from_the_crowded_expert():
    logits = jnp.zeros((16, 4)).at[:, 2].set(0.1)
    experts = jnp.full((16, 1), 2)

    def loss(z):
        return load_balancing_loss(jax.nn.softmax(z), experts)

    slope = jax.grad(loss)(logits).sum(0)
    assert slope[2] > 0 and (np.delete(slope, 2) < 0).all()


def test_router_z_loss_is_the_formula():
    logits = normal(20, 8, scale=5)
    want = np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(1)) ** 2)
    np.testing.assert_allclose(router_z_loss(logits), want, rtol=1e-5)


def test_router_z_loss_survives_large_logits():
    assert np.isfinite(router_z_loss(jnp.full((2, 8), 1e4)))


# --- bad input --------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_route_refuses_an_impossible_top_k(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} of 8 experts"):
        route(normal(3, 16), normal(16, 8), top_k)


@pytest.mark.parametrize("way", [every_expert, capacity_and_drop, sort_and_tile])
def test_weights_of_several_counts_of_experts_are_refused(way):
    x, gates, experts, w = random_job(8, 2, 4)
    w["linear_1"] = w["linear_1"][:3]
    with pytest.raises(ValueError, match="several counts of experts.*'linear_1': 3"):
        way(x, gates, experts, w)


def test_choices_that_do_not_fit_the_tokens_are_refused():
    x, gates, experts, w = random_job(8, 2, 4)
    assert check_shapes(x, gates, experts, w) == 4
    for bad in [(x, gates[:, :1], experts), (x[:7], gates, experts)]:
        with pytest.raises(ValueError, match=r"both must be \[N, A\]"):
            check_shapes(*bad, w)


def test_a_block_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="holds nothing"):
        plan_blocks(jnp.zeros((4, 1), jnp.int32), 2, 0)


# --- modules ----------------------------------------------------------------

SPEC = MoESpec(num_experts=4, top_k=2, width=24)


@hk.without_apply_rng
@hk.transform
def layer(x, real=None, train=None, dtype=jnp.float32):
    real = jnp.ones(x.shape[:2], bool) if real is None else real
    return SPEC.build()(x, real, dtype, train)


apply = jax.jit(layer.apply, static_argnums=(3, 4))
init = jax.jit(layer.init)


def output(params, x, real=None, train=None, dtype=jnp.float32):
    return apply(params, x, real, train, dtype)[0]


def experts_of(params):
    return {name: params[f"moe/{name}"]["w"] for name in NAMES}


def whole_layer(params, x):
    flat = x.reshape(-1, x.shape[-1])
    r = route(flat, params["router"]["w"], 2)
    return by_hand(flat, r.gates, r.experts, experts_of(params)).reshape(x.shape)


def test_parameters_have_the_checkpoint_s_names():
    params = init(jax.random.key(0), normal(1, 3, 16))
    shapes = {f"{module}/{name}": w.shape
              for module, leaves in params.items()
              for name, w in leaves.items()}  # fmt: skip
    assert shapes == {
        "router/w": (16, 4),
        "moe/linear/w": (4, 16, 24),
        "moe/linear_v/w": (4, 16, 24),
        "moe/linear_1/w": (4, 24, 16),
    }


def test_a_fresh_layer_keeps_the_size_of_its_input():
    params = init(jax.random.key(0), normal(1, 3, 16))
    for name, d in [("linear", 16), ("linear_v", 16), ("linear_1", 24)]:
        assert 0.8 < np.std(params[f"moe/{name}"]["w"]) * d**0.5 < 1.2


def test_module_takes_float_and_quantized_weights():
    x = normal(2, 3, 16)
    params = init(jax.random.key(0), x)
    want = whole_layer(params, x)
    np.testing.assert_allclose(output(params, x), want, atol=2e-5)
    eighth = {n: {"w": w["w"] if n == "router" else quantize(w["w"])}
              for n, w in params.items()}  # fmt: skip
    got = output(eighth, x)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_module_routes_in_float32_and_computes_in_the_dtype():
    x = normal(2, 40, 16)
    params = init(jax.random.key(0), x)
    got = output(params, x, dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32
    want = whole_layer(params, x)
    size = np.abs(want).max()
    assert 1e-4 * size < np.abs(got - want).max() < 0.03 * size  # no token elsewhere


def test_module_trains_by_capacity_and_serves_without():
    x = normal(1, 64, 16) + 2  # a crowd
    params = init(jax.random.key(0), x)
    r = route(x[0], params["router"]["w"], 2)
    lost = dropped(r.experts, 4, 1.5).any(1)
    assert 0 < lost.sum() < 64
    serving, training = output(params, x), output(params, x, train="capacity")
    gap = np.abs(serving - training)[0].max(1)
    assert gap[~lost].max() < 1e-5 < 1e-2 < gap[lost].max()
    grads = jax.grad(lambda p: jnp.sum(output(p, x, train="capacity") ** 2))(params)
    assert all(np.abs(g["w"]).max() > 0 for g in grads.values())


def padded_batch():
    """Two rows of 16 tokens, and the same with padding before and after."""
    x, pad = normal(2, 16, 16), normal(2, 16, 16, seed=1) + 5
    real = jnp.ones((2, 16), bool)
    longer = jnp.concatenate([pad[:, :8], x, pad[:, 8:]], axis=1)
    return x, longer, jnp.pad(real, ((0, 0), (8, 8)))


@pytest.mark.parametrize("train", [None, "capacity"])
def test_padding_changes_no_answer_and_no_loss(train):
    x, longer, real = padded_batch()
    params = init(jax.random.key(0), x)
    y, losses = apply(params, x, None, train)
    got, got_losses = apply(params, longer, real, train)
    if not train:  # more tokens, more seats: training may drop others
        np.testing.assert_allclose(got[:, 8:24], y, atol=1e-5)
    assert (got[~real] == 0).all()
    for name, loss in losses.items():
        np.testing.assert_allclose(got_losses[name], loss, rtol=1e-5)
        counted = apply(params, longer, None, train)[1][name]
        assert abs(counted / loss - 1) > 0.05  # as it was


def test_padding_takes_no_seat():
    """Padding stands in front and wants the same experts as a crowd."""
    x = normal(1, 16, 16) + 2
    longer = jnp.concatenate([jnp.tile(x, (1, 3, 1)), x], axis=1)
    real = jnp.arange(64)[None] >= 48
    params = init(jax.random.key(0), x)
    want = whole_layer(params, x)
    got = output(params, longer, real, train="capacity")[:, 48:]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert dropped(route(longer[0], params["router"]["w"], 2).experts, 4)[48:].any()


def test_padding_is_computed_by_no_expert():
    """No block is made for it, and NaN in it goes nowhere."""
    experts = random_job(32, 2, 4)[2]
    none = jnp.where(jnp.arange(32)[:, None] < 20, experts, 4)
    with_none = plan_blocks(none, 4, 8)
    alone = plan_blocks(experts[:20], 4, 8)
    np.testing.assert_array_equal(with_none.first, alone.first)
    for j in range(int(alone.first[-1])):
        (e, rows), (f, alone_rows) = (
            rows_of_block(plan, j, 8) for plan in (with_none, alone)
        )
        assert e == f
        np.testing.assert_array_equal(np.where(rows == 64, 40, rows), alone_rows)
    x, longer, real = padded_batch()
    broken = jnp.where(real[..., None], longer, jnp.nan)
    params = init(jax.random.key(0), x)
    got = output(params, broken, real)
    assert (got[~real] == 0).all()
    np.testing.assert_allclose(got[:, 8:24], whole_layer(params, x), atol=2e-5)


def test_a_layer_of_padding_alone_has_finite_losses():
    x = normal(1, 8, 16)
    params = init(jax.random.key(0), x)
    y, losses = apply(params, x, jnp.zeros((1, 8), bool))
    assert (y == 0).all() and all(np.isfinite(v) for v in losses.values())


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k=5 of only num_experts=4"):
        MoESpec(num_experts=4, top_k=5, width=8)
    for field in [{"router": "dice"}, {"activation": "dice"}, {"capacity_factor": 0.0}]:
        with pytest.raises(ValueError, match=next(iter(field))):
            MoESpec(num_experts=4, top_k=2, width=8, **field)


def test_the_expert_of_a_subclass_is_what_is_applied():
    class Doubled(MoE):
        def expert(self, x, gates, w):
            return 2 * super().expert(x, gates, w)

    @hk.without_apply_rng
    @hk.transform
    def doubled(x):
        return Doubled(SPEC)(x, jnp.ones(x.shape[:2], bool))[0]

    x = normal(1, 6, 16)
    params = init(jax.random.key(0), x)
    want = 2 * output(params, x)
    np.testing.assert_allclose(doubled.apply(params, x), want, rtol=1e-5)


def test_every_activation_is_applied():
    x = normal(1, 6, 16)
    outputs = []
    for name in ACTIVATIONS:
        dense = hk.without_apply_rng(
            hk.transform(lambda x, name=name: network(x, FeedForwardSpec(24, name)))
        )
        params = dense.init(jax.random.key(0), x)
        w = {name: leaves["w"] for name, leaves in params.items()}
        want = glu(x, w, ACTIVATIONS[name])
        np.testing.assert_allclose(dense.apply(params, x), want, atol=1e-6)
        outputs.append(want)
    assert len(outputs) < 2 or np.abs(outputs[0] - outputs[1]).max() > 0.1


def test_biases_of_a_dense_network_are_added():
    x, spec = normal(1, 3, 16), FeedForwardSpec(24, bias=True)
    dense = hk.without_apply_rng(hk.transform(lambda x: network(x, spec)))
    params = dense.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1, params)
    p = {name: (leaves["w"], leaves["b"]) for name, leaves in params.items()}
    gate, up = (x @ p[name][0] + p[name][1] for name in ("linear", "linear_v"))
    want = geglu(gate, up, jnp.float32) @ p["linear_1"][0] + p["linear_1"][1]
    np.testing.assert_allclose(dense.apply(params, x), want, atol=1e-5)


def test_a_route_passes_jit():
    r = jax.jit(route, static_argnums=2)(normal(3, 16), normal(16, 8), 2)
    assert isinstance(r, Route) and r.experts.shape == (3, 2)


# --- devices ----------------------------------------------------------------


def test_on_one_device_all_experts_are_held():
    experts = jnp.array([[0, 3], [4, 1]])
    np.testing.assert_array_equal(number_among_held(experts, 4), experts)
    np.testing.assert_array_equal(number_among_held(experts, 3), [[0, 3], [3, 1]])


@pytest.mark.parametrize(
    "data, expert, model",
    [(1, 1, 1), (1, 1, 8), (2, 1, 4), (8, 1, 1), (1, 1, 3), (1, 4, 1), (1, 2, 2)],
)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_sharded_experts_equal_whole_ones(data, expert, model, kind):
    assert jax.device_count() >= data * expert * model, "conftest.py simulates eight"
    x, real = normal(2, 12, 32), jnp.arange(12) < jnp.array([[12], [7]])
    spec = MoESpec(num_experts=4, top_k=2, width=64)
    split = hk.without_apply_rng(hk.transform(lambda x, real: spec.build()(x, real)[0]))
    params = jax.jit(split.init)(jax.random.key(0), x, real)
    if kind == "int8":
        groups = {"moe/linear": 1, "moe/linear_v": 1, "moe/linear_1": 8}
        for name, count in groups.items():
            params[name] = {"w": quantize(params[name]["w"], count)}
    whole = jax.jit(split.apply)(params, x, real)
    with jax.set_mesh(make_mesh(data=data, expert=expert, model=model)):
        got = jax.jit(split.apply)(params, x, real)
    assert len(got.sharding.device_set) == data * expert * model
    np.testing.assert_allclose(got, whole, atol=2e-5)
