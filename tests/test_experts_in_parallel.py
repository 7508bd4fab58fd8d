"""Tokens apart: both exchanges against one device, and what they send."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.checkpoints import load, quantize_params, save
from annotated_moe.families.grok import grok_config
from annotated_moe.model import (
    decode_step,
    forward_to_train,
    init_cache,
    init_params,
)
from annotated_moe.moe import every_expert, number_among_held
from annotated_moe.parallel import FEW, make_mesh, seating, use_mesh
from annotated_moe.placement import here

N, D, F, E, A = 32, 16, 32, 8, 2
AXES = {
    "linear": ("experts", "embed", "mlp"),
    "linear_v": ("experts", "embed", "mlp"),
    "linear_1": ("experts", "mlp", "embed"),
}
APART = "all_to_all", "ring"
MESHES = {"1x8x1": (1, 1, 8), "2x4x1": (2, 1, 4), "1x4x2": (1, 2, 4)}


def layer(x, gates, w, experts):
    """A loop over experts, of those that a device holds."""

    def held_here(x, gates, experts, w):
        held = len(w["linear"])

        def run(x, gates, experts):
            own, y = number_among_held(experts, held), 0
            for e in range(held):
                gate = jnp.where(own == e, gates, 0).sum(axis=1)
                hidden = jax.nn.gelu(
                    here().matmul(jnp.dot, x, w["linear"][e], ("embed", "mlp"), True)
                )
                up = here().matmul(jnp.dot, x, w["linear_v"][e], ("embed", "mlp"), True)
                y += (hidden * up) @ w["linear_1"][e] * gate[:, None]
            return y

        return here().exchange(run, x, gates, experts, held)

    rows, choices = ("tokens", "embed"), ("tokens", None)
    split = here().split(held_here, (rows, choices, choices, AXES), rows)
    return split(x, gates, experts, w)


@pytest.fixture(scope="module")
def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {"linear": (E, D, F), "linear_v": (E, D, F), "linear_1": (E, F, D)}
    w = {n: jax.random.normal(next(keys), s) / 6 for n, s in shapes.items()}
    x = jax.random.normal(next(keys), (N, D))
    gates = jax.nn.softmax(jax.random.normal(next(keys), (N, A)))
    even = jax.random.permutation(next(keys), jnp.tile(jnp.arange(E), (N, 1)), 1, True)
    even = even[:, :A].astype(jnp.int32)
    padding = jnp.arange(N)[:, None] % 3 == 0
    # "one": more tokens for one device than the few seats.
    return (x, gates, w), {
        "even": even,
        "padding": jnp.where(padding, E, even),
        "one": jnp.where(jnp.arange(A) == 0, 5, jnp.full_like(even, E)),
    }


def both_ways(x, gates, w, routes):
    def loss(x, gates, w):
        parts = [jnp.sin(layer(x, gates, w, routes[name])) for name in sorted(routes)]
        return sum(p.sum() for p in parts), parts

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, w)


@pytest.mark.parametrize("exchange", APART)
@pytest.mark.parametrize("name", MESHES)
def test_forward_and_backward_equal_one_device(inputs, name, exchange):
    arrays, routes = inputs
    wanted = both_ways(*arrays, routes)
    with use_mesh(make_mesh(*MESHES[name]), exchange):
        found = jax.jit(lambda *a: both_ways(*a))(*arrays, routes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_the_loop_is_the_published_way(inputs):
    (x, gates, w), routes = inputs
    with jax.default_matmul_precision("float32"):
        ours = layer(x, gates, w, routes["even"])
        theirs = every_expert(x, gates, routes["even"], w)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # tanh GELU there


def test_seats_hold_each_token_once_a_device():
    experts = jnp.array([[0, 1], [7, 2], [8, 8], [3, 2]])  # two a device; 8: none
    order, sent = seating(experts, 2, 4)
    assert sent.tolist() == [1, 2, 0, 1]
    assert [order[d, : sent[d]].tolist() for d in range(4)] == [[0], [1, 3], [], [1]]
    assert all(sorted(row) == [0, 1, 2, 3] for row in order.tolist())


def lowered(inputs, exchange, **options):
    arrays, routes = inputs
    with use_mesh(make_mesh(expert=8), exchange):
        job = jax.jit(lambda *a: layer(*a)).trace(*arrays, routes["even"])
        return job.lower(**options)


def test_what_is_sent(inputs):
    text = lowered(inputs, "all_to_all").compile().as_text()
    few = -(-int(FEW * (N // 8) * A) // 8)
    assert few == 2 and "conditional" in text
    for seats in (few, N // 8):
        assert re.search(rf"f32\[(1|8),{seats},{D}\]\S* all-to-all", text) or re.search(
            rf"\(f32\[1,{seats},{D}\].*all-to-all", text
        )
    assert "all-reduce" in lowered(inputs, "sum").compile().as_text()
    text = lowered(inputs, "ring").compile().as_text()
    assert "all-gather" in text and "reduce-scatter" in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_elsewhere_only_filled_seats_travel(inputs, platform):
    text = lowered(inputs, "all_to_all", lowering_platforms=(platform,)).as_text()
    assert text.count("ragged_all_to_all") == 2
    assert f"tensor<8x2x{D}xf32>" not in text  # nor few seats of all rows
    assert f"tensor<8x2x{D}xf32>" in lowered(inputs, "all_to_all").as_text()


def test_experts_that_do_not_divide_are_refused(inputs):
    (x, gates, w), routes = inputs
    for exchange in APART:
        refused = pytest.raises(ValueError, match="8 experts cannot be dealt out to 3")
        with use_mesh(make_mesh(expert=3), exchange), refused:
            layer(x[:30], gates[:30], w, routes["even"][:30])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = grok_config(
        vocab_size=50, context=32, d_model=64, d_ff=128, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=8, embedding_multiplier=8.0,
        dtype="float32",
    )  # fmt: skip
    params = init_params(jax.random.key(1), config)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save(am.Model(config, quantize_params(params, config)), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "exchange"),
    [pytest.param("2x4x1", "all_to_all", marks=pytest.mark.full), ("1x4x2", "ring")],
)
def test_a_model_loads_and_speaks_with_tokens_apart(tiny, name, exchange):
    """8-bit weights, ragged prompts; 8 rows are cut, 3 are not."""
    alone = load(tiny, dtype="float32")
    model = load(tiny, make_mesh(*MESHES[name]), "float32", exchange=exchange)
    tokens = np.random.default_rng(0).integers(0, 50, (8, 7))
    lengths = np.array([7, 1, 3, 7, 2, 5, 6, 4])
    np.testing.assert_allclose(
        model.logits(tokens, lengths), alone.logits(tokens, lengths), atol=1e-4
    )
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    assert model.generate_ids(prompts, 3) == alone.generate_ids(prompts, 3)
    assert model.generate_ids(prompts[:3], 3) == alone.generate_ids(prompts[:3], 3)


def test_a_program_is_of_one_exchange(tiny):
    """The same function, arguments and mesh: the name alone differs."""
    model, mesh = load(tiny, dtype="float32"), make_mesh(expert=8)
    texts = set()
    for exchange in ("sum", *APART):
        own = replace(model, mesh=mesh, exchange=exchange)
        with own.on_mesh():
            cache = init_cache(model.config, 8, 16)
            held = cache.places[0].k.sharding.shard_shape(cache.places[0].k.shape)
            assert held[1] == (8 if exchange == "sum" else 1)
            tokens = np.zeros(8, np.int32)
            job = decode_step.lower(model.params, tokens, cache, model.config)
            texts.add(job.as_text())
    assert len(texts) == 3


def test_an_unknown_exchange_is_named(tiny):
    with pytest.raises(ValueError, match="'sum' or 'all_to_all' or 'ring': 'post'"):
        load(tiny, make_mesh(expert=8), exchange="post")


@pytest.mark.parametrize("exchange, dispatch", [
    pytest.param("ring", "blocks", marks=pytest.mark.full),
    ("all_to_all", "ragged"),
    pytest.param("ring", "ragged", marks=pytest.mark.full),
    pytest.param("all_to_all", "blocks", marks=pytest.mark.full),
])  # fmt: skip
def test_training_with_tokens_apart(exchange, dispatch):
    """Every weight's gradient, through a dropless way and an exchange."""
    config = grok_config(
        vocab_size=64, context=32, d_model=32, d_ff=48, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=4, top_k=2, dtype="float32",
    )  # fmt: skip
    params = init_params(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
    lengths = jnp.array([12, 3, 12, 7, 12, 12, 1, 12])

    def loss(params):
        logits, losses = forward_to_train(
            params, tokens, config, lengths, dispatch=dispatch)
        real = jnp.arange(12) < lengths[:, None]
        return (jnp.sin(logits).sum(-1) * real).sum() + sum(losses.values())

    want = jax.jit(jax.value_and_grad(loss))(params)
    with use_mesh(make_mesh(1, 2, 4), exchange):
        got = jax.jit(jax.value_and_grad(loss))(params)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(abs(a).max()))
