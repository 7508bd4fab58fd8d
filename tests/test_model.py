"""The whole model against the release's recordings, and what users rely on."""

import inspect
import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.config import Segment, all_places, as_segments, place_of
from annotated_moe.families import PRESETS
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import RUN_CHECKS, Model, Session, bucket
from annotated_moe.model import (
    all_logits,
    apply_layer,
    decode_step,
    decoder,
    decoder_to_train,
    embed,
    flat_specs,
    forward_to_train,
    init_cache,
    init_params,
    layer_weights,
    param_specs,
    prefill,
    tied_logits,
    tied_logits_tiled,
)
from annotated_moe.moe import FeedForwardSpec
from annotated_moe.parallel import current_mesh, fit_spec, make_mesh, partition_spec
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.sampling import (
    NO_TOKEN,
    choose,
    greedy,
    keep,
    least_of_nucleus,
    least_of_top_k,
    sample,
    settings_per_row,
)
from annotated_moe.specs import from_json, to_json
from annotated_moe.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = {k: dict(np.load(FIXTURES / f"model_{k}.npz")) for k in ("dense", "mixed")}
SAMPLED = np.load(FIXTURES / "model_sampling.npz")
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {
    "vocab_size": 64, "context": 16, "d_model": 32, "d_ff": 88, "num_layers": 2,
    "q_heads": 4, "kv_heads": 2, "head_size": 8, "embedding_multiplier": 32**0.5,
    "attn_multiplier": 0.25, "dtype": "float32",
}  # fmt: skip
SMALL = grok_config(**SIZES)
CONFIGS = {"dense": grok_config(**SIZES, num_experts=1), "mixed": SMALL}
# At p = 0 the release keeps whatever rounding leaves; ours refuses p = 0.
NUCLEI = np.unpackbits(SAMPLED["top_p.kept.f32"]).reshape(10, 6, 512)[:9]


def stacked(recorded):
    """The recording's parameters, a layer each, as this package stacks them."""
    flat: dict[str, list] = {}
    for name in sorted(n for n in recorded if n.startswith("param.")):
        path = name.removeprefix("param.").split("|", 1)[1].replace("|", "/")
        layered = path.startswith("decoder_layer_")
        if layered:
            path = "decoder_layer/" + path.split("/", 1)[1]
        flat.setdefault(path, []).append(recorded[name])
    arrays = {
        p: np.stack(w) if p.startswith("decoder_layer/") else w[0]
        for p, w in flat.items()
    }
    params: dict[str, dict] = {}
    for path, w in arrays.items():
        if path.endswith(".scales"):
            continue
        if path.endswith(".weight_i8"):
            path = path.removesuffix(".weight_i8")
            scales = jnp.asarray(arrays[f"{path}.scales"], jnp.bfloat16)
            w = QuantizedTensor(jnp.asarray(w), scales)
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = jax.tree.map(jnp.asarray, w)
    return params


@cache
def weights(kind):
    return stacked(RECORDED[kind])


def agrees(kind, name, ours, mode, real=None):
    """float32 to 1e-4. bfloat16 as near to the release's float32 and compiled
    bfloat16 runs as its run with every rounding (`bf16e`) is to float32.
    """
    select = slice(None) if real is None else real
    modes = ("f32", "bf16", "bf16e")
    exact, coarse, rounded = (RECORDED[kind][f"{name}.{m}"][select] for m in modes)
    ours = np.asarray(ours)[select]
    if mode == "f32":
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-4)
        return
    for measure in (np.max, np.mean):
        spread = measure(abs(rounded - exact))
        assert measure(abs(ours - exact)) <= spread
        assert measure(abs(ours - coarse)) <= spread


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_whole_batch_matches_the_release(kind, mode):
    r, config = RECORDED[kind], replace(CONFIGS[kind], dtype=DTYPES[mode])
    real = np.arange(r["tokens"].shape[1]) < r["lengths"][:, None]
    logits = all_logits(weights(kind), jnp.asarray(r["tokens"]), config)
    agrees(kind, "logits", logits, mode, real)
    logits = Model(config, weights(kind)).logits(r["tokens"], r["lengths"])
    agrees(kind, "logits", logits, mode, real)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_ragged_batch_through_the_cache_matches_the_release(kind, mode):
    r, config = RECORDED[kind], replace(CONFIGS[kind], dtype=DTYPES[mode])
    params, lengths = weights(kind), jnp.asarray(r["lengths"])
    cache = init_cache(config, 2, config.context)
    logits, cache = prefill(params, jnp.asarray(r["tokens"]), lengths, cache, config)
    agrees(kind, "prefill_last_logits", logits, mode)
    steps = []
    for tokens in r["decode_tokens"]:
        logits, cache = decode_step(params, jnp.asarray(tokens), cache, config)
        steps.append(logits)
    agrees(kind, "decode_logits", jnp.stack(steps), mode)
    assert cache.length.tolist() == (r["lengths"] + len(steps)).tolist()


def placed(params, config, mesh):
    """Each array where the axes of its parameter say, scales like weights."""

    def put(w, axes):
        spec = fit_spec(partition_spec(axes), w.shape, mesh)
        return jax.device_put(w, jax.sharding.NamedSharding(mesh, spec))

    return {
        m: {n: jax.tree.map(partial(put, axes=param_specs(config)[m][n].axes), w)
            for n, w in leaves.items()}
        for m, leaves in params.items()
    }  # fmt: skip


@pytest.mark.parametrize("data, model, expert", [(1, 2, 1), (2, 1, 4)])
def test_a_mesh_changes_nothing(data, model, expert):
    mesh = make_mesh(data, model, expert)
    params = {m: {n: q.weight * q.scales.astype(jnp.float32).repeat(
                      q.weight.shape[-2] // q.scales.shape[-2], axis=-2)
                  if isinstance(q, QuantizedTensor) else q for n, q in leaves.items()}
              for m, leaves in weights("mixed").items()}  # fmt: skip
    whole = Model(SMALL, params)
    split = Model(SMALL, placed(params, SMALL, mesh), mesh=mesh)
    tokens = RECORDED["mixed"]["tokens"]
    a, b = whole.logits(tokens), split.logits(tokens)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    prompts = [[5, 6, 7], [8, 9]]
    how = {"max_new_tokens": 4, "temperature": 0.5, "seed": 3}
    assert split.generate_ids(prompts, **how) == whole.generate_ids(prompts, **how)
    assert current_mesh() is None


@pytest.mark.parametrize("p, kept", list(zip(SAMPLED["top_p.values"], NUCLEI)))
def test_nucleus_matches_the_release_in_float32(p, kept):
    logits = jnp.asarray(SAMPLED["logits"][:, 0])
    ours = jnp.isfinite(keep(logits, least_of_nucleus, jnp.full(6, p)))
    np.testing.assert_array_equal(ours, kept)


def test_sampling_matches_the_release():
    logits = np.where(SAMPLED["sample.mask"], SAMPLED["logits"][:, 0], -np.inf)
    heat, p = jnp.asarray(SAMPLED["sample.temperature"]), SAMPLED["sample.nucleus_p"]
    noise = jnp.asarray(SAMPLED["sample.gumbel.f32"][:, 0])
    none = jnp.zeros(6, jnp.int32)
    logits = jnp.asarray(logits, jnp.float32)
    drawn = choose(logits, noise, heat, none, jnp.asarray(p))
    assert drawn.tolist() == SAMPLED["sample.token_id.f32"][:, 0].tolist()
    probs = jax.nn.softmax(
        keep(logits / heat[:, None], least_of_nucleus, jnp.asarray(p))
    )
    best = jnp.take_along_axis(probs, SAMPLED["sample.top_k_token_ids.f32"], axis=1)
    np.testing.assert_allclose(best, SAMPLED["sample.top_k_probs.f32"], atol=1e-6)


@pytest.mark.parametrize("p", [1e-6, 1e-7, 1e-8, 1e-30])
def test_a_tiny_nucleus_is_the_largest_and_only_it(p):
    logits = jax.random.normal(jax.random.key(0), [64, 300])
    kept = jnp.isfinite(keep(logits, least_of_nucleus, jnp.full(64, p)))
    assert kept.sum(axis=1).tolist() == [1] * 64
    assert (kept.argmax(1) == logits.argmax(1)).all()
    noise = jax.random.gumbel(jax.random.key(1), logits.shape)
    whole = jnp.zeros(64, jnp.int32)
    drawn = choose(logits, noise, jnp.ones(64), whole, jnp.full(64, p))
    assert drawn.tolist() == logits.argmax(1).tolist()


def test_the_nucleus_is_the_fewest_that_reach_p():
    logits = jax.random.normal(jax.random.key(2), [40, 300])
    chances = np.asarray(jax.nn.softmax(logits), np.float64)
    for p in (0.1, 0.5, 0.9, 0.999):
        kept = np.isfinite(keep(logits, least_of_nucleus, jnp.full(40, p)))
        mass = np.where(kept, chances, 0)
        least = np.where(kept, chances, np.inf).min(1)
        assert (mass.sum(1) > p - 1e-5).all()
        assert (mass.sum(1) - least < p + 1e-5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_give_no_token(bad):
    logits = jnp.zeros((3, 9)).at[1, 4].set(bad)
    settings = settings_per_row(3, 0.7, 1.0, None, 0)
    for tokens in (greedy(logits), sample(logits, 0, settings)):
        assert tokens[1] == NO_TOKEN and min(tokens[0], tokens[2]) >= 0


def test_settings_for_each_row():
    s = settings_per_row(3, [0.0, 1.0, 2.0], 0.5, None, 2**32 - 2)
    assert s.temperature.tolist() == [0, 1, 2] and s.top_p.tolist() == [0.5] * 3
    assert s.top_k.tolist() == [0] * 3
    assert s.seed.tolist() == [2**32 - 2, 2**32 - 1, 0]
    assert settings_per_row(2, 0, 1, [5, 6], [8, 9]).seed.tolist() == [8, 9]
    assert settings_per_row(2, 0, 1, [5, 6], [8, 9]).top_k.tolist() == [5, 6]


def test_top_k_keeps_k_and_ties():
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]] * 4)
    kept = jnp.isfinite(keep(logits, least_of_top_k, jnp.array([1, 2, 0, 99])))
    assert kept.sum(axis=1).tolist() == [1, 3, 5, 5]


def test_a_tiny_temperature_is_greedy_and_not_nan():
    logits = jax.random.normal(jax.random.key(0), [4, 50])
    noise = jax.random.gumbel(jax.random.key(1), [4, 50])
    ones = jnp.ones(4)
    drawn = choose(logits, noise, 1e-30 * ones, jnp.zeros(4, jnp.int32), ones)
    assert drawn.tolist() == jnp.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("v", [64, 1000, 1009])
def test_tied_logits_two_ways(n, v, dtype):
    h = jax.random.normal(jax.random.key(0), [n, 32], dtype)
    table = jax.random.normal(jax.random.key(1), [v, 32], dtype)
    a, b = tied_logits(h, table), tied_logits_tiled(h, table)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scan_is_the_loop_over_layers(kind):
    config, params = CONFIGS[kind], weights(kind)
    h = jax.random.normal(jax.random.key(0), [2, 5, 32])
    positions = jnp.tile(jnp.arange(5), [2, 1])
    real = positions >= 0
    scanned, cache = decoder(params, h, positions, real, config)
    (place,) = all_places(config)
    for i in range(config.num_layers):
        own = layer_weights(params, place, config, i)
        h, _, _ = apply_layer(own, place, config, h, positions, real)
    np.testing.assert_allclose(scanned, h, atol=1e-5)
    assert cache is None
    deeper = replace(config, layers=(replace(config.layers[0], repeats=3),))
    with pytest.raises(ValueError, match="holds 2 layers"):
        decoder(params, h, positions, real, deeper)


def mixed_stack():
    """One dense layer, then twice (dense, sparse): two segments, three places."""
    sparse = SMALL.layer(0)
    dense = replace(sparse, feed_forward=FeedForwardSpec(40))
    layers = Segment((dense,), 1), Segment((dense, sparse), 2)
    return replace(SMALL, layers=layers)


def test_segments_are_the_layers_one_by_one():
    config = mixed_stack()
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    names = [place.name for place in all_places(config)]
    assert names == ["decoder_layer", "decoder_layer_1", "decoder_layer_2"]
    assert [list(s.layers) for s in all_places(config)] == [[0], [1, 3], [2, 4]]
    h = jax.random.normal(jax.random.key(0), [1, 5, 32])
    positions = jnp.arange(5)[None]
    scanned, _ = decoder(params, h, positions, positions >= 0, config)
    for i in range(5):
        place, index = place_of(config, i)
        assert config.layer(i) == place.spec
        own = layer_weights(params, place, config, index)
        h, _, _ = apply_layer(own, place, config, h, positions, positions >= 0)
    np.testing.assert_allclose(scanned, h, atol=1e-5)
    rows = [[3, 1, 4, 1, 5], [9, 2]]
    model = Model(config, params)
    for row, new in zip(rows, model.generate_ids(rows, max_new_tokens=4)):
        for token in new:
            assert token == int(model.logits([row])[0, -1].argmax())
            row = [*row, token]
    with pytest.raises(ValueError, match="no layer 5 of 5"):
        config.layer(5)


def test_a_list_of_layers_is_a_pattern_or_runs():
    a = SMALL.layer(0)
    b = replace(a, norm_eps=1e-6)
    assert as_segments([a] * 4) == (Segment((a,), 4),)
    assert as_segments([a, a, b] * 2) == (Segment((a, a, b), 2),)
    assert as_segments([a, a, b]) == (Segment((a,), 2), Segment((b,), 1))
    assert as_segments([a]) == (Segment((a,), 1),)


def test_params_are_what_their_specs_say():
    for config in (SMALL, CONFIGS["dense"], mixed_stack(), replace(SMALL, tied=False)):
        shapes = jax.eval_shape(partial(init_params, config=config), jax.random.key(0))
        made = {(m, n): w.shape for m, leaves in shapes.items()
                for n, w in leaves.items()}  # fmt: skip
        specs = flat_specs(config)
        assert made == {path: spec.shape for path, spec in specs.items()}
        for (module, name), spec in specs.items():
            assert len(spec.axes) == len(spec.shape)
            assert spec.matrix == (name == "w" and "router" not in module)
            assert ("experts" in spec.axes) == ("/moe/" in module)
            kept = name in ("scale", "embeddings") or "router" in module
            assert spec.float32 == kept
        assert ("lm_head", "embeddings") in specs or config.tied


def test_training_has_losses_and_gradients_everywhere():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), SMALL)
    tokens = jnp.asarray(RECORDED["mixed"]["tokens"])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        logits, losses = forward_to_train(params, tokens, SMALL)
        return jax.nn.logsumexp(logits).mean() + sum(losses.values()), losses

    (_, losses), grads = loss(params)
    assert set(losses) == {"balance", "z"} and losses["balance"] > 0.9
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    table = params["in_out_embed"]["embeddings"]
    assert 0.5 < float(embed(table, tokens, SMALL).std()) < 2


def test_padding_changes_no_loss_of_training():
    config = grok_config(**SIZES, num_experts=2)  # a seat for every token
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), [2, 6], 0, 64)
    run = jax.jit(forward_to_train, static_argnums=2)
    _, losses = run(params, tokens, config)
    wider = jnp.pad(tokens, [(0, 0), (0, 6)], constant_values=9)
    _, same = run(params, wider, config, jnp.array([6, 6]))
    for name in losses:
        np.testing.assert_allclose(losses[name], same[name], rtol=1e-5)
    h = jnp.ones((1, 3, 32))
    one = jnp.zeros((1, 3), int)
    _, none = decoder_to_train(weights("dense"), h, one, one == 0, CONFIGS["dense"])
    assert none == {}


def test_float_experts_run():
    """The release's MoE returns its input when the weights are not quantized."""
    params = dict(weights("mixed"))
    wanted = all_logits(params, jnp.array([[5, 6, 7]]), SMALL)
    for name in ("linear", "linear_v", "linear_1"):
        q = params[f"decoder_layer/moe/{name}"]["w"]
        w = q.weight.astype(jnp.float32) * q.scales.astype(jnp.float32)
        params[f"decoder_layer/moe/{name}"] = {"w": w}
    ours = all_logits(params, jnp.array([[5, 6, 7]]), SMALL)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_token_zero_does_not_blind_its_row():
    params = weights("mixed")
    whole = all_logits(params, jnp.array([[7, 8, 0, 9]]), SMALL)
    cache = init_cache(SMALL, 1, 16)
    logits, cache = prefill(params, jnp.array([[7, 8]]), jnp.array([2]), cache, SMALL)
    for i, token in enumerate([0, 9]):
        logits, cache = decode_step(params, jnp.array([token]), cache, SMALL)
        np.testing.assert_allclose(logits, whole[:, 2 + i], atol=1e-4)
    other = all_logits(params, jnp.array([[30, 8, 0, 9]]), SMALL)
    assert np.abs(whole[0, -1] - other[0, -1]).max() > 0.05


def test_prefill_goes_on_from_a_cache():
    params, row = weights("mixed"), jnp.array([[7, 8, 9, 10, 11, 12]])
    whole = all_logits(params, row, SMALL)[:, -1]
    cache = init_cache(SMALL, 1, 16)
    _, cache = prefill(params, row[:, :4], jnp.array([4]), cache, SMALL)
    logits, cache = prefill(params, row[:, 4:], jnp.array([2]), cache, SMALL)
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    assert cache.length.tolist() == [6]
    with pytest.raises(ValueError, match="17 tokens, 16 slots"):
        prefill(params, jnp.zeros((1, 17), int), jnp.array([17]), cache, SMALL)


def test_rows_join_leave_and_wait():
    """What a server does: some rows step, one leaves, another takes its place."""
    params = weights("mixed")
    whole = all_logits(params, jnp.array([[7, 8, 9, 10], [20, 21, 22, 23]]), SMALL)
    cache = init_cache(SMALL, 2, 16)
    prompt, two = jnp.array([[7, 8], [20, 21]]), jnp.array([2, 2])
    _, cache = prefill(params, prompt, two, cache, SMALL)
    kept = np.asarray(cache.places[0].k[:, 0])
    for step, token in enumerate([22, 23]):
        active = jnp.array([False, True])
        new = jnp.array([50, token])
        logits, cache = decode_step(params, new, cache, SMALL, active)
        np.testing.assert_allclose(logits[1], whole[1, 2 + step], atol=1e-4)
    assert cache.length.tolist() == [2, 4]
    np.testing.assert_array_equal(cache.places[0].k[:, 0], kept)
    logits, cache = decode_step(params, jnp.array([9, 1]), cache, SMALL)
    np.testing.assert_allclose(logits[0], whole[0, 2], atol=1e-4)
    other = init_cache(SMALL, 1, 8)
    _, other = prefill(params, jnp.array([[30, 31]]), two[:1], other, SMALL)
    cache = cache.evict(1)
    assert cache.length.tolist() == [3, 0]
    cache = cache.insert(1, other)
    logits, cache = decode_step(params, jnp.array([10, 32]), cache, SMALL)
    alone = all_logits(params, jnp.array([[30, 31, 32]]), SMALL)
    np.testing.assert_allclose(logits[0], whole[0, 3], atol=1e-4)
    np.testing.assert_allclose(logits[1], alone[0, 2], atol=1e-4)


@cache
def model():
    return Model(SMALL, weights("mixed"))


def test_greedy_is_the_argmax_of_the_whole():
    row = [5, 6, 7]
    for token in model().generate_ids([row], max_new_tokens=14)[0]:
        logits = model().logits([row])
        assert token == int(logits[0, -1].argmax())
        row = [*row, token]
    assert len(row) == 17  # one more than the context


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_neighbours(temperature):
    prompts = [[5, 6, 7], [8], [9] * 8, [10, 11]]
    how = {"max_new_tokens": 6, "temperature": temperature, "top_k": 20}
    together = model().generate_ids(prompts, seed=7, **how)
    for i, prompt in enumerate(prompts):
        assert model().generate_ids([prompt], seed=7 + i, **how) == [together[i]]
    seeds = [10, 9, 8, 7]
    backwards = model().generate_ids(prompts[::-1], seed=seeds, **how)
    assert backwards[::-1] == together


def test_stop_ids_end_one_row_only():
    prompts = [[5, 6, 7], [8, 9]]
    whole = model().generate_ids(prompts, max_new_tokens=8)
    stop = whole[0][2]
    ended = model().generate_ids(prompts, max_new_tokens=8, stop_ids={stop})
    for row, all_of_it in zip(ended, whole):
        n = all_of_it.index(stop) if stop in all_of_it else len(all_of_it)
        assert row == all_of_it[:n]
    assert ended[0] != whole[0]


def test_nothing_asked_nothing_given():
    assert model().generate_ids([[1], [2]], max_new_tokens=0) == [[], []]
    assert model().generate_ids([]) == []


def test_arrays_are_prompts_too():
    rows = np.array([[5, 6, 7], [8, 9, 10]])
    a = model().generate_ids(rows, max_new_tokens=3)
    assert a == model().generate_ids(rows.tolist(), max_new_tokens=3)


def test_one_program_a_bucket_and_a_donated_cache():
    config = grok_config(**{**SIZES, "context": 64})
    m, size = Model(config, weights("mixed")), decode_step._cache_size
    m.generate_ids([[1] * 3], max_new_tokens=20)
    before = prefill._cache_size(), size()
    for n in (1, 9, 12):
        m.generate_ids([[1] * n], max_new_tokens=20)
    assert (prefill._cache_size(), size()) == before
    widths = [bucket(n, 100) for n in (1, 16, 17, 64, 65, 99)]
    assert widths == [16, 16, 32, 64, 100, 100]
    cache = init_cache(SMALL, 1, 16)
    _, new = decode_step(weights("mixed"), jnp.array([1]), cache, SMALL)
    assert cache.places[0].k.is_deleted() and not new.places[0].k.is_deleted()


def test_masked_logits_are_those_of_the_rows_alone():
    tokens = np.array([[9, 9, 5, 6, 7], [5, 6, 9, 9, 9], [1, 2, 3, 4, 5]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1] * 5])
    y = model().logits(tokens, mask=mask)
    for row, own, found in zip(tokens, mask.astype(bool), y):
        alone = model().logits([row[own]])[0]
        np.testing.assert_allclose(found[own], alone, atol=1e-4)
        assert (found[~own] == 0).all()
    short = model().logits(tokens[1:2], [2])
    np.testing.assert_allclose(short, y[1:2], atol=1e-4)


def test_broken_weights_are_an_error_at_the_step():
    params = {**weights("mixed"), "rms_norm": {"scale": jnp.full(32, jnp.nan)}}
    broken = Model(SMALL, params)
    for heat in (0.0, 0.8):
        with pytest.raises(ValueError, match="prompt 0: logits are NaN or infinite"):
            broken.generate_ids([[5], [6]], 2, temperature=heat)


def test_a_model_is_a_line_an_object_and_a_key():
    a, b = model(), Model(SMALL, weights("mixed"))
    assert repr(a) == "<Model: 2 layers, width 32, 64 tokens, float32>"
    assert a == a and a != b and hash(a) != hash(b) and {a: 1}[a] == 1


OPTIONS = ["max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop_ids",
           "images"]  # fmt: skip


def test_options_are_in_the_signatures_with_one_default():
    found = []
    for name in ("generate", "stream", "generate_ids", "stream_ids"):
        known = inspect.signature(getattr(Model, name)).parameters
        assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in known.values())
        assert list(known)[2:9] == OPTIONS
        more = ["speculate"] if name.endswith("ids") else ["add_bos", "speculate"]
        assert list(known)[9:] == more and known["speculate"].default == 0
        found.append([known[option].default for option in OPTIONS])
        with pytest.raises(TypeError, match="unexpected keyword .*'temprature'"):
            getattr(model(), name)([[1]], temprature=1.0)
        # Python's own message begins with this name; the tests' hook drops it.
        assert getattr(Model, name).__qualname__ == name
    assert found == [[32, 0.0, 1.0, None, 0, None, None]] * 4


def test_a_session_is_announced_and_so_are_its_prompts(monkeypatch):
    seen = []
    checks = [*RUN_CHECKS, lambda mesh, call, inputs: seen.append((call, inputs))]
    monkeypatch.setattr("annotated_moe.generate.RUN_CHECKS", checks)
    net = model()
    session = Session(net, 1, 16)
    tokens = greedy(session.prefill([[5, 6, 7]]))
    row = [int(tokens[0]), int(greedy(session.step(tokens))[0])]
    assert row == net.generate_ids([[5, 6, 7]], max_new_tokens=2)[0]
    assert [call for call, _ in seen] == [
        "Session",
        "prefill",
        "generate_ids",
        "Session",
        "prefill",
    ]
    assert seen[0][1]["slots"] == 16 and seen[2][1]["prompts"] == [[5, 6, 7]]


def test_text_in_text_out():
    tokenizer = Tokenizer(FIXTURES / "tokenizer.model")
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((config.vocab_size, 32), np.float32) / 32**0.5
    params = {**weights("mixed"), "in_out_embed": {"embeddings": jnp.asarray(table)}}
    m = Model(config, params, tokenizer)
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
    (text,) = m.generate(["expert"], **options)
    assert m.generate("expert", **options) == text  # one for one
    prompt = tokenizer.encode("expert")
    ids = m.generate_ids([prompt], stop_ids=(2,), **options)
    assert m.generate([prompt], **options) == [text]
    assert text == tokenizer.decode(ids[0])
    assert "".join(m.stream("expert", **options)) == text
    stop = ids[0][3]
    short = "".join(m.stream("expert", stop_ids=[stop], **options))
    assert short == tokenizer.decode(ids[0][: ids[0].index(stop)])
    with pytest.raises(ValueError, match="temperature"):
        m.stream("expert", max_new_tokens=2, temperature=-1.0)  # at once
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        m.generate([""])
    with pytest.raises(ValueError, match="no tokenizer"):
        model().generate(["expert"])
    picture = np.zeros((4, 4, 3), np.uint8)
    for ask in (lambda: m.generate("a", images=picture),
                lambda: m.generate(["a"], images=[picture]),
                lambda: m.stream("a", images=picture),
                lambda: m.generate_ids([[5]], 2, images=[np.zeros((1, 3, 4, 4))]),
                lambda: m.logits([[5]], images=[np.zeros((1, 3, 4, 4))])):  # fmt: skip
        with pytest.raises(ValueError, match="this model reads text: leave out images"):
            ask()
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        m.generate(["a", "b"], images=[picture])
    with pytest.raises(TypeError, match="images must be a list"):
        m.generate(["a"], images=picture)


@pytest.mark.parametrize("wrong", [None, 5, {"a": 1}])
def test_what_is_no_list_of_prompts(wrong, any_types):
    with pytest.raises(TypeError, match="prompts are a text, or a list of texts"):
        am.load().generate(wrong)


@pytest.mark.parametrize(
    "error, prompts, options",
    [
        ("prompt 1 is empty", [[1], []], {}),
        ("prompt 0 holds token 64", [[1, 64]], {}),
        ("prompt 0 holds token -1", [[-1]], {}),
        ("prompt 0 is no list of integer", [[1.5]], {}),
        ("prompt 0 is no list of integer", [1, 2], {}),
        ("prompt 0 of 9 tokens asks for 9", [[1] * 9], {"max_new_tokens": 9}),
        ("prompt 0 of 17 tokens", [[1] * 17], {"max_new_tokens": 0}),
        ("max_new_tokens", [[1]], {"max_new_tokens": -1}),
        ("temperature", [[1]], {"temperature": -0.1}),
        ("temperature", [[1]], {"temperature": float("nan")}),
        ("top_p", [[1]], {"top_p": 0.0}),
        ("top_p", [[1]], {"top_p": 1.1}),
        ("top_k", [[1]], {"top_k": 0}),
        ("seed must be one number", [[1], [2]], {"seed": [1, 2, 3]}),
        ("seed must be an integer", [[1]], {"seed": -1}),
        ("speculate must be 0 or more", [[1]], {"speculate": -1}),
    ],
)
def test_requests_that_cannot_be_run(error, prompts, options):
    with pytest.raises(ValueError, match=error):
        model().generate_ids(prompts, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "tokens, lengths",
    [([1, 2], None), ([[]], None), ([[1, 2]], [3]), ([[1, 2]], [0]),
     ([[1, 2]], [1, 2]), ([[1, 2]], [1.5]), ([[1, 99]], None), ([[1.5]], None)],
)  # fmt: skip
def test_logits_refuses(tokens, lengths):
    with pytest.raises(ValueError):
        model().logits(tokens, lengths)


def test_a_str_is_not_a_list_of_ids():
    for prompts in ("text", ["text"]):
        with pytest.raises(TypeError, match="lists of ids; `generate` takes texts"):
            model().generate_ids(prompts)
    with pytest.raises(TypeError, match="a prompt is a str or ids"):
        model().generate([5])


@pytest.mark.parametrize(
    "mask, error",
    [([[1, 0, 1]], "stand together"), ([[0, 0, 0]], "a token in each row"),
     ([[1, 1]], "must be like tokens")],
)  # fmt: skip
def test_masks_that_make_no_sense(mask, error):
    with pytest.raises(ValueError, match=error):
        model().logits([[1, 2, 3]], mask=mask)
    with pytest.raises(ValueError, match="lengths or a mask"):
        model().logits([[1, 2, 3]], [3], [[1, 1, 1]])


@pytest.mark.parametrize(
    "change, error",
    [
        ({"d_model": 0}, "d_model must be an int of 1 or more: 0"),
        ({"kv_heads": 3}, "4 query heads cannot share 3"),
        ({"head_size": 7}, "even head_size, not 7"),
        ({"top_k": 9}, "top_k=9 of only num_experts=8"),
        ({"attn_softcap": 0.0}, "softcap must be a number above 0 or None: 0.0"),
        ({"rope_base": float("inf")}, "base must be a number above 0: inf"),
        ({"eos_ids": (64,)}, r"eos_ids \(64,\) is beyond vocab_size=64"),
        ({"pad_id": 64}, r"pad_id \(64,\) is beyond vocab_size=64"),
        ({"num_layers": 0}, "repeats must be an int of 1 or more: 0"),
        ({"dtype": "float16"}, "dtype must be text one of float32, bfloat16"),
    ],
)
def test_configurations_that_make_no_model(change, error):
    with pytest.raises(ValueError, match=error):
        grok_config(**{**SIZES, **change})


@pytest.mark.parametrize("change", [{"layers": ()}, {"layers": (1,)}])
def test_layers_that_make_no_model(change):
    with pytest.raises(ValueError, match="layer"):
        replace(SMALL, **change)
    with pytest.raises(ValueError, match="needs a layer"):
        Segment((), 2)


def test_configurations_that_do():
    assert grok_config(**SIZES, attn_softcap=None, num_experts=1, top_k=9)
    specs = flat_specs(PRESETS["grok-1"])
    sizes = [np.prod(spec.shape, dtype=int) for spec in specs.values()]
    assert sum(sizes) == 315_684_820_992 and len(sizes) == 12 + 2
    matrices = [n for n, spec in zip(sizes, specs.values()) if spec.matrix]
    assert sum(matrices) == 314_874_789_888


def test_a_configuration_is_json():
    for config in (*PRESETS.values(), mixed_stack()):
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    "change, error",
    [
        ({"spec": "os.system"}, "'os.system', which is not known"),
        ({"spec": None}, "None, which is not known"),
        ({"width": 5}, "ModelConfig has no field 'width'"),
        ({"context": "8"}, "context must be an int of 1 or more: '8'"),
        ({"context": None}, "context must be an int of 1 or more: None"),
        ({"layers": [[]]}, "layers must be a list of Segment"),
    ],
)
def test_json_that_is_no_configuration(change, error):
    with pytest.raises(ValueError, match=error):
        from_json({**to_json(SMALL), **change})
    raw = to_json(SMALL)
    del raw["context"]
    with pytest.raises(ValueError, match="missing 1 required .*'context'"):
        from_json(raw)


def test_quantized_attention_at_batch_2():
    """In the release quantized projections lose the batch axis."""
    params = {
        m: {
            n: quantize(w) if "attention" in m and n == "w" else w
            for n, w in leaves.items()
        }
        for m, leaves in weights("dense").items()
    }
    rows = jnp.array([[5, 6, 7], [8, 9, 10]])
    both = all_logits(params, rows, CONFIGS["dense"])
    for i in range(2):
        one = all_logits(params, rows[i : i + 1], CONFIGS["dense"])
        np.testing.assert_allclose(both[i], one[0], atol=1e-4)


@pytest.mark.parametrize("kind", [list, set, iter, np.array])
def test_stop_ids_of_any_kind(kind, any_types):
    model = am.load(dtype="float32")
    (new,) = model.generate_ids([[1]], max_new_tokens=5)
    stop = kind([new[2]])
    want = new[: new.index(new[2])]
    assert model.generate_ids([[1]], max_new_tokens=5, stop_ids=stop) == [want]
    stop = kind([new[2]])
    assert list(model.stream_ids([1], max_new_tokens=5, stop_ids=stop)) == want


@pytest.mark.parametrize("stop", [["1"], [1.5], "ab", 5, [[1]]])
def test_what_is_no_stop_id(stop, any_types):
    with pytest.raises(TypeError, match="stop_ids must be token ids"):
        am.load().generate_ids([[1]], stop_ids=stop)


def test_a_session_takes_only_what_it_has_room_for(any_types):
    model = am.load(dtype="float32")
    top = model.config.vocab_size
    session = am.Session(model, 2, 16)
    for wrong in ([[-1], [1]], [[top], [1]], [[1.9], [1]], [[1] * 17, [1]]):
        with pytest.raises(ValueError):
            session.prefill(wrong)
    session.prefill([[1] * 10, []])
    with pytest.raises(ValueError, match="17 tokens, 16 slots"):
        session.prefill([[1] * 7, [1]])
    for wrong in ([1], 1, [1, top], [1, -1], [1.5, 1]):
        with pytest.raises(ValueError):
            session.step(wrong)
    for _ in range(6):
        session.step([1, -1], [True, False])
    with pytest.raises(ValueError, match="17 tokens, 16 slots"):
        session.step([1, 1])
    session.step([-1, 1], [False, True])
    assert session.cache.length.tolist() == [16, 1]
