"""Taps and edits change nothing they should not; each measure is its formula."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe import lens
from annotated_moe.attention import AttentionSpec, NormedAttentionSpec
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import Model
from annotated_moe.model import all_logits, init_params, unembed
from annotated_moe.moe import FeedForwardSpec, MoESpec, Route, SharedMoESpec
from annotated_moe.rope import Rope

E, A, V = 4, 2, 64
GROK = grok_config(
    vocab_size=V, context=32, d_model=16, d_ff=24, num_layers=2, q_heads=4,
    kv_heads=2, head_size=8, num_experts=E, dtype="float32",
)  # fmt: skip
ROWS = np.random.default_rng(0).integers(0, V, (2, 12))
N = ROWS.size


def mixed() -> ModelConfig:
    """A dense layer, then in turn a plain and a shared mixture with other attention."""
    attention = AttentionSpec(4, 2, 8, 0.35, rope=Rope())
    normed = NormedAttentionSpec(4, 2, 8, 0.35, rope=Rope())
    dense = LayerSpec(attention, FeedForwardSpec(24))
    moe = LayerSpec(normed, MoESpec(E, A, 24, "silu", "top_k_softmax"))
    shared = SharedMoESpec(E, A, 24, router="sigmoid", shared=FeedForwardSpec(24))
    other = replace(moe, feed_forward=shared, attention=attention)
    layers = Segment((dense,), 1), Segment((moe, other), 2)
    return replace(GROK, layers=layers, tied=False)


def model_of(config: ModelConfig) -> Model:
    return Model(config, init_params(jax.random.key(1), config))


@pytest.fixture(scope="module")
def grok() -> Model:
    return model_of(GROK)


def banned(model: Model, *pairs: tuple[int, int]) -> jax.Array:
    """One edit for each (layer, expert)."""
    found = np.zeros((len(pairs), model.config.num_layers, 1, E), bool)
    for i, (layer, expert) in enumerate(pairs):
        found[i, layer, 0, expert] = True
    return jnp.array(found)


@pytest.mark.parametrize("config", [
    pytest.param(GROK, id="grok", marks=pytest.mark.full),
    pytest.param(mixed(), id="mixed"),
])  # fmt: skip
def test_taps_are_the_forward_pass(config):
    model = model_of(config)
    taps = lens.tap(model, ROWS)
    expected = all_logits(model.params, jnp.array(ROWS), config)
    ours = unembed(model.params, taps.hidden[-1], config)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    every = lens.logit_lens(model, taps.hidden)
    np.testing.assert_allclose(every[-1], expected, atol=1e-5)
    layers = lens.expert_layers(config)
    assert taps.experts.shape == (len(layers), N, A)
    assert taps.hidden.shape[0] == config.num_layers + 1
    np.testing.assert_allclose(taps.pattern.sum(-1), 1, atol=1e-5)
    assert not np.triu(taps.pattern, 1).any()
    none = lens.Ablate(jnp.zeros((1, config.num_layers, 1, E), bool))
    (nats,) = lens.losses(model, ROWS, none)
    logs = jax.nn.log_softmax(expected[:, :-1])
    picked = jnp.take_along_axis(logs, ROWS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(nats, -picked, atol=1e-5)


def test_layers_of_a_pattern_are_in_order():
    """Places interleave: each layer's output is the next one's input."""
    model = model_of(mixed())
    taps = lens.tap(model, ROWS)
    ban = banned(model, *((layer, 0) for layer in range(1, 5)))
    for i, layer in enumerate(range(1, 5)):
        own = lens.tap(model, ROWS, lens.Ablate(ban[i]))
        same = [bool((a == b).all()) for a, b in zip(own.hidden, taps.hidden)]
        assert same == [depth <= layer for depth in range(6)]


def test_the_pattern_is_what_attention_weighs():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 5, heads, 8))
        for i, heads in enumerate((4, 2, 2))
    )

    def attend(q: Any, k: Any, v: Any, scale: float) -> Any:
        from annotated_moe.attention import attend, causal_mask

        at = jnp.tile(jnp.arange(5), (2, 1))
        return attend(q, k, v, causal_mask(at, 5), scale)

    p = lens.pattern(attend, (q, k, v, 0.3), {})
    expected = jnp.einsum("bqts,bsqh->btqh", p, jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(attend(q, k, v, 0.3), expected, atol=1e-5)


def test_an_expert_that_nobody_chose_is_not_missed(grok):
    taps = lens.tap(grok, ROWS[:1, :3])
    used = lens.is_chosen(taps.experts, E).any(axis=1)  # [L, E]
    idle = [tuple(map(int, at)) for at in np.argwhere(~used)]
    busy = [tuple(map(int, at)) for at in np.argwhere(used)]
    assert idle, "draw other weights: each expert was chosen"
    each = banned(grok, *idle, *busy)
    edits = jnp.concatenate([jnp.zeros_like(each[:1]), each])
    for way in (lens.Ablate, lens.Reroute):
        plain, *moved = np.asarray(lens.losses(grok, ROWS[:1, :3], way(edits)))
        gap = [np.abs(one - plain).max() for one in moved]
        assert max(gap[: len(idle)]) == 0 < min(gap[len(idle) :])


PROBS = jnp.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
ROUTE = Route(
    PROBS, jnp.array([[0.4, 0.3], [0.4, 0.3]]), jnp.array([[0, 1], [3, 2]]), PROBS
)


def test_edits_by_hand():
    first = jnp.array([[True, False, False, False]])
    assert lens.without(ROUTE, first).experts.tolist() == [[4, 1], [3, 2]]
    sent = lens.elsewhere(ROUTE, first)
    assert sent.experts.tolist() == [[2, 1], [3, 2]]
    assert (sent.gates == ROUTE.gates).all()
    two = jnp.array([[True, True, False, False]])
    assert lens.elsewhere(ROUTE, two).experts.tolist() == [[2, 3], [3, 2]]
    three = jnp.array([[True, True, True, False]])  # one is left for two
    assert lens.elsewhere(ROUTE, three).experts.tolist() == [[3, 4], [3, 1 + 3]]
    empty = ROUTE._replace(experts=jnp.array([[0, 4], [4, 4]]))
    assert lens.elsewhere(empty, first).experts.tolist() == [[1, 4], [4, 4]]
    own = jnp.array([[False] * 4, [False, False, False, True]])
    assert lens.elsewhere(ROUTE, own).experts.tolist() == [[0, 1], [1, 2]]


def test_a_rerouted_token_has_as_many_experts(grok):
    plain = lens.tap(grok, ROWS)
    token = 7
    ban = np.zeros((2, N, E), bool)
    ban[0, token, int(plain.experts[0, token, 0])] = True
    moved = lens.tap(grok, ROWS, lens.Reroute(jnp.array(ban)))
    chosen = lens.is_chosen(moved.experts, E)
    assert (chosen.sum(-1) == A).all()
    other = (chosen[0] != lens.is_chosen(plain.experts, E)[0]).any(-1)
    assert np.flatnonzero(other).tolist() == [token]
    changed = np.asarray(moved.hidden[1] != plain.hidden[1]).any(-1).reshape(-1)
    assert np.flatnonzero(changed).tolist() == [token]


def test_measures_by_hand():
    experts = np.array([[0, 1], [0, 2], [1, 0], [2, 1]])
    final = np.array([[1, 0], [2, 3], [2, 3], [1, 2]])
    assert lens.saturation(experts, final) == (2 + 1 + 0 + 2) / 8
    both = lens.coactivation(experts, E)
    assert np.allclose(both[0], [0, 2 / 3, 1 / 3, 0])
    assert np.allclose(both[2], [1 / 2, 1 / 2, 0, 0])
    assert np.isnan(both[3]).all()
    by = lens.specialisation(experts, np.array([0, 0, 1, 1]), E, 3)
    assert np.allclose(by[:, 0], [1, 0.5, 0.5, 0]) and np.isnan(by[:, 2]).all()
    sure = np.array([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0]])
    assert np.allclose(lens.entropy(sure), [1.5, 0])
    counts = np.array([[[2, 0], [0, 2]], [[1, 1], [1, 1]]])
    assert np.allclose(lens.mutual_information(counts), [1, 0])
    assert np.isclose(lens.rank_correlation([1, 2, 3, 4], [10, 9, 8, -5]), -1)
    # Ranks 2, 2, 2, 4, 5 and 1 to 5: 8 over the root of 8 * 10.
    tied = lens.rank_correlation([5, 5, 5, 7, 8], [1, 2, 3, 4, 5])
    assert np.isclose(tied, 8 / 80**0.5)


def test_looking_back_by_hand():
    p = np.zeros((1, 1, 1, 4, 4), np.float32)
    p[0, 0, 0, [1, 2, 3], [0, 1, 0]] = 1
    assert np.isclose(lens.looks_back(p, 1)[0, 0], 2 / 3)
    assert lens.looks_back(p, 3, 2)[0, 0] == 1


def test_what_ships_with_the_package():
    seen = lens.routing_over_training()
    c, m = len(seen.steps), len(seen.tokens)
    assert seen.experts.shape == seen.gates.shape and seen.experts.shape[0] == c
    assert seen.experts.shape[2] == m == len(seen.domain)
    assert set(lens.held_out()) == set(seen.names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (Segment((mixed().layer(0),), 2),)}, "no layer of this model has"),
        (
            {"layers": (Segment((GROK.layer(0),), 1), Segment((replace(
                GROK.layer(0), feed_forward=MoESpec(8, 2, 24)),), 1))},
            r"\[\(4, 2\), \(8, 2\)\] do not fit",
        ),
    ],
    ids=["dense", "uneven"],
)  # fmt: skip
def test_models_that_it_refuses(change, said):
    config = replace(GROK, **change)
    with pytest.raises(ValueError, match=said):
        lens.tap(Model(config, {}), ROWS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[0], r"whole numbers \[B, T\]"),
        (ROWS / 2, "float64"),
        (np.zeros((1, 33), int), "T up to 32"),
        (ROWS - 1, "ids from -1"),
    ],
)
def test_rows_that_it_refuses(grok, rows, said):
    with pytest.raises(ValueError, match=said):
        lens.check_model(grok, rows)


def test_edits_and_places_that_it_refuses(grok):
    with pytest.raises(ValueError, match="it must be .edits, 2 layers, 1 or 24 tokens"):
        lens.losses(grok, ROWS, lens.Ablate(jnp.zeros((1, 2, 5, E), bool)))
    with pytest.raises(ValueError, match="one device"):
        lens.tap(replace(grok, mesh=object()), ROWS)
