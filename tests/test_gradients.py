"""Both backward passes by hand, against JAX's of the plain computation."""

import sys
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe import attention
from annotated_moe.attention import (
    FLASH_FROM,
    Chunk,
    Window,
    attend,
    attend_any,
    attend_flash,
    attend_pallas,
    attend_to_train,
    is_past,
    visible_tiles,
)
from annotated_moe.cache import PAD_POSITION
from annotated_moe.families.grok import grok_config
from annotated_moe.model import forward_to_train, init_params
from annotated_moe.moe import (
    DROPLESS,
    FeedForwardSpec,
    MoE,
    MoESpec,
    SharedMoESpec,
    blocks_with_gradient,
    every_expert,
    gated,
    ragged_with_gradient,
    route,
)
from annotated_moe.parallel import make_mesh
from annotated_moe.placement import here
from annotated_moe.plan import tpu_devices
from annotated_moe.quantization import quantize

WAYS = {
    "blocks of 1": partial(blocks_with_gradient, block=1),
    "blocks of 16": partial(blocks_with_gradient, block=16),
    "blocks": blocks_with_gradient,
    "ragged": ragged_with_gradient,
}
RULES = {"causal": is_past, "window": Window(30).sees, "chunk": Chunk(48).sees}


def normal(*shape, seed=0, scale=1.0):
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(x, jnp.float32)


def close(got, want, tolerance=1e-5):
    """Within `tolerance` of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        size = max(float(np.abs(np.asarray(b, np.float32)).max()), 1e-30)
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), 0, tolerance * size
        )


def arrays_in(jaxpr):
    """Abstract values of every array that a program makes, loops included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


# Experts.


def job(n, a, e, d=16, f=24):
    shapes = {"linear": (e, d, f), "linear_v": (e, d, f), "linear_1": (e, f, d)}
    w = {
        name: normal(*shape, seed=i, scale=shape[1] ** -0.5)
        for i, (name, shape) in enumerate(shapes.items(), 3)
    }
    x = normal(n, d)
    r = route(x, normal(d, e, seed=1), a)
    return x, r.gates, r.experts, w


def slopes(way, x, gates, experts, w):
    def loss(x, gates, w):
        y = way(x, gates, experts, w)
        return jnp.sum(y.astype(jnp.float32) * normal(*y.shape, seed=9)), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, w)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, a, e", [(1, 2, 4), (75, 2, 6), (33, 1, 5), (20, 5, 5)])
def test_dropless_is_every_expert_there_and_back(way, n, a, e):
    x, gates, experts, w = job(n, a, e)
    want = slopes(every_expert, x, gates, experts, w)
    close(slopes(WAYS[way], x, gates, experts, w), want)


@pytest.mark.parametrize("way", WAYS)
def test_padding_and_experts_that_nobody_chose_have_no_slope(way):
    x, gates, experts, w = job(75, 2, 6)
    experts = jnp.where((experts == 1) | (experts == 4), 5, experts)
    experts = jnp.where(jnp.arange(75)[:, None] < 60, experts, 6)
    want = slopes(every_expert, x, gates, experts, w)
    got = slopes(WAYS[way], x, gates, experts, w)
    close(got, want)
    (dx, dgates, dw), y = got
    assert (y[60:] == 0).all() and (dx[60:] == 0).all() and (dgates[60:] == 0).all()
    for name in w:
        assert (dw[name][jnp.array([1, 4])] == 0).all() and (dw[name][0] != 0).any()
    nobody = slopes(WAYS[way], x, gates, jnp.full_like(experts, 6), w)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nobody))


def test_a_block_reads_its_own_expert_and_its_own_tokens():
    """NaN in the weights of an idle expert and in padding goes nowhere."""
    x, gates, experts, w = job(40, 2, 6)
    experts = jnp.where(experts == 3, 2, experts)
    experts = jnp.where(jnp.arange(40)[:, None] < 30, experts, 6)
    want = slopes(blocks_with_gradient, x, gates, experts, w)
    broken = {name: stack.at[3].set(jnp.nan) for name, stack in w.items()}
    got = slopes(blocks_with_gradient, x.at[30:].set(jnp.nan), gates, experts, broken)
    close(got, want, 0)


def test_the_walk_keeps_nothing_of_an_expert_s_width():
    x, gates, experts, w = job(512, 2, 4, d=8, f=96)

    def largest(way):
        def loss(x, gates, w):
            return jnp.sum(way(x, gates, experts, w) ** 2)

        made = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, gates, w)
        return max(a.size for a in arrays_in(made.jaxpr))

    assert largest(blocks_with_gradient) == 128 * 96 < 512 * 2 * 96
    assert largest(ragged_with_gradient) >= 512 * 2 * 96


@pytest.mark.parametrize("way", ["blocks", "ragged"])
def test_bfloat16_weights_get_bfloat16_slopes(way):
    x, gates, experts, w = job(300, 2, 4)
    want = slopes(every_expert, x, gates, experts, w)
    x, w = jax.tree.map(lambda z: z.astype(jnp.bfloat16), (x, w))
    got = slopes(DROPLESS[way], x, gates, experts, w)
    (dx, dgates, dw), _ = got
    assert {z.dtype for z in (dx, *dw.values())} == {jnp.dtype("bfloat16")}
    assert dgates.dtype == jnp.float32
    close(got, want, 0.02)


class Biased(MoE):
    def parameters(self, d):
        return super().parameters(d) | {"linear_1/b": ((d,), ("embed",))}

    def expert(self, x, gates, w):
        b = here().once(w["linear_1/b"], "mlp")
        return super().expert(x, gates, w) + gates[:, None] * b


SHARED = SharedMoESpec(4, 2, 48, shared=FeedForwardSpec(16), gate_input=True)
LAYERS = {"biased": lambda: Biased(MoESpec(4, 2, 48)), "gated input": SHARED.build}


@pytest.mark.parametrize(
    "name", [pytest.param("biased", marks=pytest.mark.full), "gated input"]
)
def test_a_family_s_experts_on_a_mesh(name):
    """On 2 x 2 x 2 and under remat, by each way; capacity has seats for all."""
    x, real = normal(2, 21, 32), jnp.arange(21) < jnp.array([[21], [13]])

    @hk.without_apply_rng
    @hk.transform
    def layer(x, train=None):
        part = LAYERS[name]()
        object.__setattr__(part.spec, "capacity_factor", 4.0)
        return part(x, real, train=train)[0]

    params = layer.init(jax.random.key(0), x)
    params = jax.tree.map(lambda w: w + normal(*w.shape, seed=5, scale=0.1), params)

    def run(params, x, train, remat=False):
        def loss(params, x):
            y = layer.apply(params, x, train)
            return jnp.sum(y * normal(*y.shape, seed=6))

        loss = jax.checkpoint(loss) if remat else loss
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    run = jax.jit(run, static_argnames=("train", "remat"))
    want = run(params, x, "capacity")
    for train in ("blocks", "ragged"):
        close(run(params, x, train), want)
    close(run(params, x, "blocks", remat=True), want)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        for train in ("capacity", "blocks", "ragged"):
            close(run(params, x, train), want)


def test_what_has_no_gradient_is_refused():
    x, gates, experts, w = job(8, 2, 4)
    for way in (blocks_with_gradient, ragged_with_gradient):
        bad = w | {"linear": quantize(w["linear"])}
        with pytest.raises(
            ValueError, match="linear is a QuantizedTensor, which has no"
        ):
            way(x, gates, experts, bad)

    def more(scale):
        def expert(x, gates, w):
            return gated(x, gates, w) * scale

        return jnp.sum(blocks_with_gradient(x, gates, experts, w, expert))

    with pytest.raises(ValueError, match="must get its weights as arguments"):
        jax.grad(more)(2.0)


def test_an_unknown_dispatch_is_refused():
    config = grok_config(16, 16, 8, 8, 1, 2, 1, 4, dtype="float32")
    params = jax.eval_shape(partial(init_params, config=config), jax.random.key(0))
    with pytest.raises(ValueError, match="dispatch is 'seats': .* capacity, blocks"):
        forward_to_train(params, jnp.zeros((1, 2), int), config, dispatch="seats")


def test_without_tokamax_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ImportError, match="dispatch='tokamax' needs the package"):
        DROPLESS["tokamax"](*job(8, 2, 4))


def test_tokamax_gives_the_same():
    pytest.importorskip("tokamax")
    x, gates, experts, w = job(75, 2, 6)
    experts = jnp.where(jnp.arange(75)[:, None] < 60, experts, 6)
    want = slopes(every_expert, x, gates, experts, w)
    close(slopes(DROPLESS["tokamax"], x, gates, experts, w), want)


# Attention.


def at_once(q, k, v, at, key_at, multiplier, softcap, sees):
    mask = sees(at[..., None], key_at[:, None])
    return attend(q, k, v, mask, multiplier, softcap)


def attention_slopes(way, q, k, v, at, key_at, softcap, sees):
    def loss(q, k, v):
        y = way(q, k, v, at, key_at, 0.4, softcap, sees)
        y = jnp.where((at != PAD_POSITION)[..., None, None], y, 0)
        return jnp.sum(y.astype(jnp.float32) * normal(*y.shape, seed=9)), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def rows(t, slots=None, dtype=jnp.float32):
    """Three rows that begin anywhere; the second ends in padding."""
    slots = slots or t
    q = normal(3, t, 8, 16, seed=5)
    k, v = normal(3, slots, 2, 16, seed=6), normal(3, slots, 2, 24, seed=7)
    at = jnp.array([[0], [70], [9]]) + jnp.arange(t)
    key_at = jnp.array([[0], [70], [9]]) + jnp.arange(slots)
    at = at.at[1, t * 2 // 3 :].set(PAD_POSITION)
    key_at = key_at.at[1, t * 2 // 3 :].set(PAD_POSITION)
    return *(z.astype(dtype) for z in (q, k, v)), at, key_at


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rule", RULES)
def test_flash_is_plain_attention_there_and_back(rule, softcap):
    job = *rows(101), softcap, RULES[rule]
    want = attention_slopes(at_once, *job)
    for block in (16, 64, 128):
        got = attention_slopes(partial(attend_flash, block=block), *job)
        close(got, want)
        assert (got[0][0][1, 67:] == 0).all() and (got[0][1][1, 67:] == 0).all()


def test_flash_looks_back_at_more_slots_than_tokens():
    q, k, v, at, key_at = rows(40, 90)
    at = jnp.where(at == PAD_POSITION, at, at + 50)
    job = q, k, v, at, key_at, 3.0, is_past
    close(attention_slopes(attend_flash, *job), attention_slopes(at_once, *job))


def test_flash_in_bfloat16():
    job = 3.0, is_past
    want = attention_slopes(at_once, *rows(101), *job)
    got = attention_slopes(attend_flash, *rows(101, dtype=jnp.bfloat16), *job)
    assert {z.dtype for z in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    close(got, want, 0.03)


def test_empty_tiles_are_not_visited():
    """The counts, and NaN in keys that every query's block is too far from."""
    line = jnp.arange(256)[None]
    for sees, count in [(is_past, 36), (Window(33).sees, 15), (Chunk(64).sees, 12)]:
        assert int(visible_tiles(line, line, sees, 32).visits) == count
    q, k, v, at, key_at = rows(256)
    at, key_at = at.at[:].set(line), key_at.at[:].set(line)
    q, at = q[:, 128:], at[:, 128:]
    sees = Window(33).sees
    k, v = (z.at[:, :96].set(jnp.nan) for z in (k, v))
    way = partial(attend_flash, block=32)
    grads, y = attention_slopes(way, q, k, v, at, key_at, 3.0, sees)
    assert all(np.isfinite(z).all() for z in (*grads, y))
    assert (grads[1][:, :96] == 0).all()


def test_a_query_that_sees_nothing_gets_nothing():
    q, k, v, at, key_at = rows(20)
    job = q, k, v, jnp.minimum(at, 90) - 100, key_at, 3.0, is_past
    assert all(
        (z == 0).all() for z in jax.tree.leaves(attention_slopes(attend_flash, *job))
    )


def test_memory_of_the_gradient_grows_with_the_tokens():
    def scratch(way, t):
        def total(q, k, v, at):
            return way(q, k, v, at, at, 0.4, 30.0, is_past).sum()

        q, k = (jax.ShapeDtypeStruct((1, t, h, 16), jnp.float32) for h in (4, 1))
        at = jax.ShapeDtypeStruct((1, t), jnp.int32)
        grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        memory = grad.lower(q, k, k, at).compile().memory_analysis()
        return memory.temp_size_in_bytes

    for way, growth in [(at_once, 4), (attend_flash, 2), (attend_to_train, 2)]:
        assert growth - 0.3 < scratch(way, 4096) / scratch(way, 2048) < growth + 0.2


def test_only_a_gradient_takes_the_tiles():
    q, k, v, at, key_at = rows(FLASH_FROM)
    job = q, k, v, at, key_at, 0.4, 3.0, is_past
    assert attend_to_train in attention.WAYS_TO_ATTEND
    np.testing.assert_array_equal(attend_to_train(*job), attend_any(*job))

    def scores_made(t):
        def loss(q):
            return attend_to_train(q, k[:, :t], v[:, :t], at[:, :t], key_at[:, :t],
                                   *job[5:]).sum()  # fmt: skip

        made = jax.make_jaxpr(jax.grad(loss))(q[:, :t])
        return any(a.size == 3 * 8 * t * t for a in arrays_in(made.jaxpr))

    assert scores_made(FLASH_FROM - 1) and not scores_made(FLASH_FROM)
    want = attention_slopes(at_once, q, k, v, at, key_at, 3.0, is_past)
    close(attention_slopes(attend_to_train, q, k, v, at, key_at, 3.0, is_past), want)


def test_impossible_blocks_are_one_clear_error():
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        attend_flash(*rows(8), 0.4, block=0)


@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_interpreted_is_the_walk(rule):
    job = *rows(50), 0.4, 3.0, RULES[rule]
    got = attend_pallas(*job, block=16, interpret=True)
    np.testing.assert_allclose(got, attend_flash(*job), atol=2e-6)


def test_the_tpu_s_compiler_takes_the_kernel():
    """At Grok-1's heads, for a slice that is not there."""
    pytest.importorskip("libtpu")
    mesh = Mesh(np.array(tpu_devices("v5p:2x2x1")[:1]), ("one",))

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    at = shape(1, 8192, dtype=jnp.int32)
    q, k = shape(1, 8192, 48, 128), shape(1, 8192, 8, 128)
    run = partial(attend_pallas, multiplier=128**-0.5, softcap=30.0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(run).lower(q, k, k, at, at).compile()
    assert "tpu_custom_call" in program.as_text()
