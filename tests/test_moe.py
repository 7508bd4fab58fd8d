"""Router, experts and their dispatch: recordings, corner cases, faults."""

from functools import partial
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe import sharding
from annotated_moe.moe import (
    Experts,
    MoE,
    Route,
    Router,
    block_rows,
    capacity,
    capacity_and_drop,
    check_shapes,
    dropped,
    every_expert,
    expert,
    load_balancing_loss,
    places,
    plan_blocks,
    route,
    router_z_loss,
    rows_of_block,
    sharded_experts,
    sort_and_tile,
)
from annotated_moe.quantization import QuantizedTensor, Row, dequantize, quantize

RECORDED = np.load(Path(__file__).parent / "fixtures" / "moe.npz")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
STATIC = "num_experts"
every = jax.jit(every_expert, static_argnames=STATIC)
seats = jax.jit(capacity_and_drop, static_argnames=(STATIC, "factor"))
tiles = jax.jit(sort_and_tile, static_argnames=(STATIC, "block"))
sharded = jax.jit(sharded_experts, static_argnames=STATIC)
WAYS = {
    "every": every,
    "seats": partial(seats, factor=8.0),
    "tiles": tiles,
    "sharded": sharded,
}


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def random_experts(e, d, f, seed=0):
    shapes = [(e, d, f), (e, d, f), (e, f, d)]
    return Experts(
        *(normal(*s, seed=seed + i, scale=s[1] ** -0.5) for i, s in enumerate(shapes))
    )


def random_job(n, a, e, d=16, f=24, seed=0):
    x = normal(n, d, seed=seed)
    r = route(x, normal(d, e, seed=seed + 1), a)
    return x, r.gates, r.experts, random_experts(e, d, f, seed + 2), e


def by_hand(x, gates, experts, w, num_experts):
    """The definition, in float64, one token and one choice at a time."""
    x, gates = np.asarray(x, np.float64), np.asarray(gates, np.float64)
    gate, up, down = (np.asarray(m, np.float64) for m in w)
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
    return Experts(*(recorded_tensor(f"moe.{name}") for name in Experts._fields))


def recorded_job(dtype):
    x = jnp.asarray(RECORDED["moe.x"]).reshape(-1, 32).astype(dtype)
    r = route(x, jnp.asarray(RECORDED["moe.router_w"]), 2)
    return x, r.gates, r.experts, recorded_experts(), 8


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
    names = [f"dense_plain.{name}" for name in Experts._fields]
    w = Experts(*(jnp.asarray(RECORDED[name]) for name in names))
    x = jnp.asarray(RECORDED["moe.x"]).reshape(-1, 32)
    want = RECORDED["dense_plain.out.f32"].reshape(-1, 32)
    np.testing.assert_allclose(expert(x, w), want, atol=1e-5)


@pytest.mark.parametrize("mode", DTYPES)
def test_quantized_expert_matches_the_recording(mode):
    x = jnp.asarray(RECORDED["moe.x"])[0].astype(DTYPES[mode])
    got = jax.jit(expert)(x, recorded_experts(), (jnp.int32(3),))
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
    got = WAYS[way](*recorded_job(jnp.bfloat16))
    assert np.abs(got - want).max() <= spread("moe")


@pytest.mark.parametrize("way", WAYS)
def test_float_experts_are_not_skipped(way):
    assert RECORDED["moe_unquantized.is_identity"] == 1  # the release's fault
    x, gates, experts, w, e = recorded_job(jnp.float32)
    plain = Experts(*(dequantize(m) for m in w))
    got = WAYS[way](x, gates, experts, plain, e)
    np.testing.assert_allclose(got, tiles(x, gates, experts, w, e), atol=1e-5)
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
    x, gates, experts, w, e = random_job(40, 1, 8)
    job = (x, gates, jnp.full_like(experts, crowded), w, e)
    want = by_hand(*job)
    for name, way in WAYS.items():
        np.testing.assert_allclose(way(*job), want, atol=2e-5, err_msg=name)


def test_all_ways_agree_in_bfloat16():
    x, *rest = random_job(24, 2, 8)
    want = by_hand(x.astype(jnp.bfloat16).astype(jnp.float32), *rest)
    size = np.abs(want).max()
    for name, way in WAYS.items():
        got = way(x.astype(jnp.bfloat16), *rest)
        assert got.dtype == jnp.float32
        assert 0 < np.abs(got - want).max() < 0.02 * size, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["int8", "row", "int8 row"])
def test_weights_of_every_kind(way, kind):
    x, gates, experts, w, e = random_job(24, 2, 4)
    held = [quantize(m, groups=2) for m in w] if "int8" in kind else list(w)
    want = by_hand(x, gates, experts, [dequantize(m) if "int8" in kind else m
                                       for m in held], e)  # fmt: skip
    if "row" in kind:
        stacks = [jax.tree.map(lambda m: jnp.stack([0 * m, m]), m) for m in held]
        held = [Row(stack, jnp.int32(1)) for stack in stacks]
    got = WAYS[way](x, gates, experts, Experts(*held), e)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("block", [1, 3, 16, 128])
def test_block_size_does_not_matter(block):
    job = random_job(20, 2, 5)
    np.testing.assert_allclose(tiles(*job, block=block), tiles(*job), atol=1e-5)


def test_company_does_not_matter_without_drops():
    job = random_job(40, 2, 8)
    x, gates, experts, w, e = job
    together = tiles(*job)
    for n in [0, 17, 39]:
        alone = tiles(x[n : n + 1], gates[n : n + 1], experts[n : n + 1], w, e)
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
    assert places(experts, 5).max() == max(seen) - 1


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
def test_a_dropped_choice_adds_nothing(factor):
    x, gates, experts, w, e = random_job(60, 2, 5)
    kept = jnp.where(dropped(experts, e, factor), 0, gates)
    want = by_hand(x, kept, experts, w, e)
    got = seats(x, gates, experts, w, e, factor=factor)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert (factor > 1.4) == (not dropped(experts, e, factor).any())


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
    assert block_rows(2, 2, 8) == block_rows(32, 2, 8) == 8
    assert block_rows(33, 2, 8) == 16 and block_rows(10**6, 2, 8) == 128


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
        return jnp.sum(capacity_and_drop(x, gates, job[2], w, 8, 1.5) ** 2)

    grad = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(job[0], job[1], job[3])
    rows = 8 * capacity(512, 2, 8, 1.5)
    assert max(a.size for a in arrays_in(grad.jaxpr)) <= rows * 32


@pytest.mark.parametrize("n", [1, 24])
def test_sort_and_tile_never_writes_all_experts_as_floats(n):
    x, gates, experts, w, e = random_job(n, 2, 8, d=64, f=96)
    w = Experts(*(quantize(m) for m in w))
    made = jax.make_jaxpr(sort_and_tile, static_argnums=4)(x, gates, experts, w, e)
    floats = [a for a in arrays_in(made.jaxpr) if a.dtype.kind == "f"]
    assert max(a.size for a in floats) < 8 * 64 * 96


# --- gradients --------------------------------------------------------------


def test_gradients_of_capacity_and_drop():
    x, gates, experts, w, e = random_job(40, 2, 5)
    kept = jnp.where(dropped(experts, e, 1.0), 0.0, 1.0)
    assert kept.min() == 0

    def through_seats(x, gates, w):
        return jnp.sum(seats(x, gates, experts, w, e, factor=1.0) ** 2)

    def through_all(x, gates, w):
        return jnp.sum(every(x, gates * kept, experts, w, e) ** 2)

    got = jax.grad(through_seats, argnums=(0, 1, 2))(x, gates, w)
    want = jax.grad(through_all, argnums=(0, 1, 2))(x, gates, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("way", [sort_and_tile, sharded_experts])
def test_sort_and_tile_says_that_it_has_no_gradient(way):
    x, *rest = random_job(8, 2, 4)
    with pytest.raises(NotImplementedError, match="train with capacity_and_drop"):
        jax.grad(lambda x: jnp.sum(way(x, *rest)))(x)


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


@pytest.mark.parametrize(
    "way", [every_expert, capacity_and_drop, sort_and_tile, sharded_experts]
)
def test_a_wrong_number_of_experts_is_refused(way):
    x, gates, experts, w, _ = random_job(8, 2, 4)
    with pytest.raises(ValueError, match="4 experts in w, not 8"):
        way(x, gates, experts, w, 8)


def test_choices_that_do_not_fit_the_tokens_are_refused():
    x, gates, experts, w, e = random_job(8, 2, 4)
    for bad in [(x, gates[:, :1], experts), (x[:7], gates, experts)]:
        with pytest.raises(ValueError, match=r"both must be \[N, A\]"):
            check_shapes(*bad, w, e)


def test_a_block_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="holds nothing"):
        plan_blocks(jnp.zeros((4, 1), jnp.int32), 2, 0)


# --- modules ----------------------------------------------------------------


@hk.without_apply_rng
@hk.transform
def layer(x, train=False):
    return MoE(4, 24)(x, Router(4, 2)(x), train)


def test_parameters_have_the_checkpoint_s_names():
    params = layer.init(jax.random.key(0), normal(3, 16))
    shapes = {f"{module}/{name}": w.shape
              for module, leaves in params.items()
              for name, w in leaves.items()}  # fmt: skip
    assert shapes == {
        "router/w": (16, 4),
        "moe/linear/w": (4, 16, 24),
        "moe/linear_v/w": (4, 16, 24),
        "moe/linear_1/w": (4, 24, 16),
    }


def test_module_takes_float_and_quantized_weights():
    x = normal(6, 16)
    params = layer.init(jax.random.key(0), x)
    experts = Experts(*(params[f"moe/{n}"]["w"] for n in Experts._fields))
    r = route(x, params["router"]["w"], 2)
    want = by_hand(x, r.gates, r.experts, experts, 4)
    np.testing.assert_allclose(layer.apply(params, x), want, atol=2e-5)
    eighth = {n: {"w": w["w"] if n == "router" else quantize(w["w"])}
              for n, w in params.items()}  # fmt: skip
    got = layer.apply(eighth, x)
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_module_trains_by_capacity_and_serves_without():
    x = normal(64, 16) + 2  # a crowd
    params = layer.init(jax.random.key(0), x)
    r = route(x, params["router"]["w"], 2)
    lost = dropped(r.experts, 4, 1.5).any(1)
    assert 0 < lost.sum() < 64
    serving, training = layer.apply(params, x), layer.apply(params, x, train=True)
    gap = np.abs(serving - training).max(1)
    assert gap[~lost].max() < 1e-5 < 1e-2 < gap[lost].max()
    grads = jax.grad(lambda p: jnp.sum(layer.apply(p, x, True) ** 2))(params)
    assert all(np.abs(g["w"]).max() > 0 for g in grads.values())


def test_a_route_passes_jit():
    r = jax.jit(route, static_argnums=2)(normal(3, 16), normal(16, 8), 2)
    assert isinstance(r, Route) and r.experts.shape == (3, 2)


# --- devices ----------------------------------------------------------------


@pytest.mark.parametrize("data, model", [(1, 1), (1, 8), (2, 4), (8, 1), (1, 3)])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_sharded_experts_equal_whole_ones(data, model, kind):
    assert jax.device_count() >= data * model, "conftest.py simulates eight devices"
    x, gates, experts, w, e = random_job(24, 2, 4, d=32, f=64)
    if kind == "int8":
        w = Experts(quantize(w.linear), quantize(w.linear_v), quantize(w.linear_1, 8))
    whole = tiles(x, gates, experts, w, e)
    with jax.set_mesh(sharding.make_mesh(data=data, model=model)):
        split = sharded(x, gates, experts, w, e)
    np.testing.assert_allclose(split, whole, atol=2e-5)
