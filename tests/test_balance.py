"""Routers that keep experts busy: what each promises, and where it may run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.config import ModelConfig, Segment
from annotated_moe.families.grok import grok_config
from annotated_moe.model import (
    forward_to_train,
    init_params,
    param_specs,
    split_reports,
    update_routers,
)
from annotated_moe.moe import (
    FeedForwardSpec,
    MoESpec,
    SharedMoESpec,
    expert_load,
    quantile_bias,
    route_biased,
    route_expert_choice,
    route_noisy,
    route_renormalised,
    update_bias,
)
from annotated_moe.specs import from_json, to_json

N, D, E, A = 64, 16, 8, 2
LEARNED = ["noisy_top_k", "expert_choice", "selection_bias", "quantile"]
CAUSAL = ["softmax_top_k", "noisy_top_k", "selection_bias", "quantile"]
ROUTER = "decoder_layer/router"


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X, W = normal(0, N, D) + normal(1, D), normal(2, D, E) / 4
REAL = jnp.arange(N) < 40


def config_of(router: str, **options: Any) -> ModelConfig:
    base = grok_config(
        vocab_size=64, context=32, d_model=32, d_ff=32, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=4, dtype="float32",
    )  # fmt: skip
    experts = MoESpec(4, 2, 32, router=router, **options)
    layer = replace(base.layer(0), feed_forward=experts)
    return replace(base, layers=(Segment((layer,), 2),))


def params_of(config: ModelConfig) -> Any:
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    for name in ("bias", "noise"):
        if name in params[ROUTER]:
            w = 0.1 * normal(5, *params[ROUTER][name].shape)
            params[ROUTER] = {**params[ROUTER], name: w}
    return params


TOKENS = jax.random.randint(jax.random.key(3), [2, 16], 2, 64)


def loss(
    params: Any, config: ModelConfig, key: Any = None, lengths: Any = None
) -> jax.Array:
    logits, _ = forward_to_train(params, TOKENS, config, lengths, key=key)
    rows = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(rows, TOKENS[:, 1:, None], axis=2).mean()


slopes = jax.jit(jax.value_and_grad(loss), static_argnums=1)


def test_expert_choice_gives_equal_loads_and_none_to_padding() -> None:
    r = route_expert_choice(X, W, A)
    assert expert_load(r.experts, E).tolist() == [N * A / E] * E
    taken = np.asarray(r.experts) < E
    np.testing.assert_array_equal(r.gates, np.where(taken, r.probs, 0))
    for e in range(E):  # those it left score no higher than those it took
        own = taken[:, e]
        assert r.probs[own, e].min() >= r.probs[~own, e].max()
    padded = route_expert_choice(X, W, A, REAL)
    assert (np.asarray(padded.experts)[40:] == E).all()
    few = route_expert_choice(X, W, A, jnp.arange(N) < 5)
    assert expert_load(few.experts, E).tolist() == [5] * E


def test_bias_goes_against_the_load_and_rests_where_it_is_even() -> None:
    bias = jnp.zeros((2, 3))
    load = jnp.array([[5.0, 1.0, 3.0], [4.0, 4.0, 4.0]])
    moved = update_bias(bias, load, 0.25)
    np.testing.assert_allclose(moved, [[-0.25, 0.25, 0], [0, 0, 0]])
    own = jnp.zeros(E)
    before = expert_load(route_biased(X, W, own, A).experts, E)
    for _ in range(300):
        load = expert_load(route_biased(X, W, own, A).experts, E)
        own = update_bias(own, load, 0.003)
    assert before.max() > 1.5 * N * A / E and load.max() < 1.2 * N * A / E


def test_a_bias_chooses_and_does_not_weigh() -> None:
    bias = jnp.zeros(E).at[3].set(5.0)
    r = route_biased(X, W, bias, A)
    assert (r.experts == 3).any(axis=1).all()
    scores = jax.nn.sigmoid(r.logits)
    own = jnp.take_along_axis(scores, r.experts, axis=1)
    np.testing.assert_allclose(r.gates, own / own.sum(1, keepdims=True), rtol=1e-5)
    far = route_biased(1000 * X, W, bias, A)
    assert all(jnp.isfinite(a).all() for a in far)


def test_noise_needs_a_key() -> None:
    still = route_noisy(X, W, W, A)
    for ours, theirs in zip(still, route_renormalised(X, W, A)):
        np.testing.assert_array_equal(ours, theirs)
    a, b = (route_noisy(X, W, W, A, jax.random.key(i)) for i in (0, 1))
    assert (a.experts != b.experts).any() and (a.experts != still.experts).any()
    np.testing.assert_allclose(a.gates.sum(axis=1), 1, rtol=1e-5)
    quiet = route_noisy(X, W, jnp.full_like(W, 0) - 50 * X.mean(0)[:, None], A,
                        jax.random.key(0))  # fmt: skip
    assert (quiet.experts == still.experts).mean() > 0.9


def test_noise_is_in_training_alone_and_each_layer_has_its_own() -> None:
    config = config_of("noisy_top_k")
    params = params_of(config)
    run = jax.jit(forward_to_train, static_argnums=2)
    logits = {k: run(params, TOKENS, config, None, key=k and jax.random.key(k))[0]
              for k in (None, 1, 2)}  # fmt: skip
    again, _ = run(params, TOKENS, config, None, key=jax.random.key(1))
    np.testing.assert_array_equal(logits[1], again)
    assert jnp.abs(logits[1] - logits[2]).max() > 1e-2
    model = am.Model(config, params)
    whole = np.asarray(model.logits(TOKENS))
    np.testing.assert_array_equal(whole, model.logits(TOKENS))
    plain = config_of("top_k_softmax")
    bare = {**params, ROUTER: {"w": params[ROUTER]["w"]}}
    np.testing.assert_array_equal(whole, am.Model(plain, bare).logits(TOKENS))
    noise = {**params[ROUTER], "noise": params[ROUTER]["noise"] + 1}
    other = am.Model(config, {**params, ROUTER: noise})
    np.testing.assert_array_equal(whole, other.logits(TOKENS))


def test_a_quantile_gives_each_expert_its_share() -> None:
    bias, real = jnp.zeros(E), jnp.ones(N, bool)
    scores = jax.nn.sigmoid(X @ W)
    loads = []
    for _ in range(20):
        r = route_biased(X, W, bias, A)
        loads.append(float(expert_load(r.experts, E).max()))
        bias = quantile_bias(scores, bias, A, real)
    assert loads[0] > 1.5 * N * A / E and loads[-1] <= 1.15 * N * A / E
    assert abs(bias.mean()) < 1e-6
    short = quantile_bias(scores[:40], jnp.zeros(E), A, real[:40])
    ours = quantile_bias(scores, jnp.zeros(E), A, REAL)
    np.testing.assert_allclose(ours, short, atol=1e-6)
    kept = quantile_bias(scores, short, A, jnp.zeros(N, bool))
    np.testing.assert_array_equal(kept, short)
    assert jnp.isfinite(quantile_bias(scores, bias, E, real)).all()


def test_a_bias_reports_its_load_and_nothing_else_changes(monkeypatch: Any) -> None:
    """In the gradient's place, of each layer; padding is not counted."""
    config = config_of("selection_bias")
    params = params_of(config)
    value, grads = slopes(params, config)
    load = grads[ROUTER]["bias"]
    assert load.shape == (2, 4) and load.sum(axis=1).tolist() == [64.0, 64.0]
    _, short = slopes(params, config, None, jnp.array([16, 5]))
    assert short[ROUTER]["bias"].sum(axis=1).tolist() == [42.0, 42.0]
    monkeypatch.setattr("annotated_moe.moe.report", lambda x, bias, news: x)
    bare = jax.jit(jax.value_and_grad(lambda p: loss(p, config)))
    value_2, plain = bare(params)
    assert value_2 == value and (plain[ROUTER]["bias"] == 0).all()
    plain[ROUTER]["bias"] = load
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_optimizer_sees_zeros_and_the_rule_moves_the_rest() -> None:
    for router, moved in (("selection_bias", True), ("softmax_top_k", False)):
        config = config_of(router)
        params = params_of(config)
        _, grads = slopes(params, config)
        plain, reports = split_reports(grads, config)
        assert set(reports) == ({(ROUTER, "bias")} if moved else set())
        new = update_routers(params, reports, config, 0.5)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), new, dict(params))
        for module, leaves in same.items():
            for name, unmoved in leaves.items():
                own = (module, name) == (ROUTER, "bias")
                assert unmoved != own
                assert own == bool((plain[module][name] == 0).all()), (module, name)
        if moved:
            assert param_specs(config)[ROUTER]["bias"].update == "load"


def test_expert_choice_alone_looks_ahead() -> None:
    run = jax.jit(forward_to_train, static_argnums=2)
    other = TOKENS.at[:, -1].set((TOKENS[:, -1] + 7) % 64)
    for router in [*CAUSAL, "expert_choice"]:
        config = config_of(router, capacity_factor=2.0)     # none is dropped
        params = params_of(config)
        a, b = (run(params, t, config)[0][:, :-1] for t in (TOKENS, other))
        assert (float(jnp.abs(a - b).max()) > 1e-3) == (router == "expert_choice")


def test_expert_choice_does_not_generate() -> None:
    config = config_of("expert_choice")
    model = am.Model(config, params_of(config))
    calls = [
        lambda: model.generate_ids([[3]], 2),
        lambda: next(iter(model.stream_ids([3], 2))),
        lambda: model.logits(TOKENS),
        lambda: am.Session(model, 1, 8),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="'expert_choice' .* does not generate"):
            call()


@pytest.mark.parametrize("router", LEARNED)
def test_there_and_back(router: str, tmp_path: Path) -> None:
    config = config_of(router)
    assert from_json(to_json(config)) == config
    model = am.Model(config, params_of(config))
    am.save(model, tmp_path / "saved")
    again = am.load(tmp_path / "saved", dtype="float32")
    assert again.config == config
    for module, leaves in model.params.items():
        for name, w in leaves.items():
            np.testing.assert_array_equal(w, again.params[module][name])
    if router != "expert_choice":
        whole = np.asarray(model.logits(TOKENS))
        new = again.generate_ids(np.asarray(TOKENS[:, :8]).tolist(), 1)
        assert new == [[int(row[7].argmax())] for row in whole]
        streamed = am.load(tmp_path / "saved", dtype="float32", stream=True)
        np.testing.assert_allclose(streamed.logits(TOKENS), whole, atol=1e-5)


def test_a_router_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match="router must be .*expert_choice.*: 'best'"):
        MoESpec(8, 2, 32, router="best")


@pytest.mark.parametrize("router", [
    name if name == "noisy_top_k" else pytest.param(name, marks=pytest.mark.full)
    for name in LEARNED
])  # fmt: skip
def test_on_a_mesh_as_on_one_device(router: str) -> None:
    """Loss, gradient, reports, and the same noise for the same key."""
    config = config_of(router)
    params, key = params_of(config), jax.random.key(4)
    value, grads = slopes(params, config, key)
    model = am.Model(config, params)
    mesh = am.make_mesh(data=1, expert=2, model=2)
    with jax.set_mesh(mesh):
        value_2, grads_2 = slopes(params, config, key)
    np.testing.assert_allclose(value_2, value, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_2)
    ):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(path))
    if router != "expert_choice":
        there = am.Model(config, params, mesh=mesh)
        ours, theirs = (np.asarray(m.logits(TOKENS)) for m in (model, there))
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_shared_expert_and_a_bias_together() -> None:
    """As in DeepSeek-V3: fine experts, one that reads all, and a bias."""
    base = config_of("selection_bias")
    fine = SharedMoESpec(7, 3, 16, router="selection_bias", shared=FeedForwardSpec(16))
    layer = replace(base.layer(0), feed_forward=fine)
    config = replace(base, layers=(Segment((layer,), 2),))
    _, grads = slopes(params_of(config), config)
    assert grads[ROUTER]["bias"].sum(axis=1).tolist() == [96.0, 96.0]
