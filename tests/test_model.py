"""The whole model against the release's recordings, and what users rely on."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.model import (
    PRESETS,
    Model,
    ModelConfig,
    all_logits,
    bucket,
    choose,
    decode_step,
    decoder,
    embed,
    forward,
    init_cache,
    init_params,
    keep_nucleus,
    keep_top_k,
    layer_function,
    prefill,
    split_params,
    tied_logits,
    tied_logits_tiled,
    unembed,
)
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.sharding import (
    current_mesh,
    make_mesh,
    partition_specs,
    shardings,
)
from annotated_moe.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = {k: dict(np.load(FIXTURES / f"model_{k}.npz")) for k in ("dense", "mixed")}
SAMPLED = np.load(FIXTURES / "model_sampling.npz")
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
SMALL = ModelConfig(
    vocab_size=64,
    context=16,
    d_model=32,
    d_ff=88,
    num_layers=2,
    q_heads=4,
    kv_heads=2,
    head_size=8,
    embedding_multiplier=32**0.5,
    attn_multiplier=0.25,
    dtype="float32",
)
CONFIGS = {"dense": replace(SMALL, num_experts=1), "mixed": SMALL}
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


@pytest.mark.parametrize("data, model", [(1, 1), (1, 2), (2, 2), (1, 8), (2, 4)])
def test_a_mesh_changes_nothing(data, model):
    mesh = make_mesh(data, model)
    params = weights("mixed")
    placed = jax.device_put(params, shardings(partition_specs(params, mesh), mesh))
    whole, split = Model(SMALL, params), Model(SMALL, placed, mesh=mesh)
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
    ours = jnp.isfinite(keep_nucleus(logits, jnp.full(6, p)))
    np.testing.assert_array_equal(ours, kept)


def test_sampling_matches_the_release():
    logits = np.where(SAMPLED["sample.mask"], SAMPLED["logits"][:, 0], -np.inf)
    heat, p = jnp.asarray(SAMPLED["sample.temperature"]), SAMPLED["sample.nucleus_p"]
    noise = jnp.asarray(SAMPLED["sample.gumbel.f32"][:, 0])
    none = jnp.zeros(6, jnp.int32)
    logits = jnp.asarray(logits, jnp.float32)
    drawn = choose(logits, noise, heat, none, jnp.asarray(p))
    assert drawn.tolist() == SAMPLED["sample.token_id.f32"][:, 0].tolist()
    probs = jax.nn.softmax(keep_nucleus(logits / heat[:, None], jnp.asarray(p)))
    best = jnp.take_along_axis(probs, SAMPLED["sample.top_k_token_ids.f32"], axis=1)
    np.testing.assert_allclose(best, SAMPLED["sample.top_k_probs.f32"], atol=1e-6)


def test_top_k_keeps_k_and_ties():
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]] * 4)
    kept = jnp.isfinite(keep_top_k(logits, jnp.array([1, 2, 0, 99])))
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
    table = jax.random.normal(jax.random.key(1), [v, 32])
    a, b = tied_logits(h, table), tied_logits_tiled(h, table)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scan_is_the_loop_over_layers(kind):
    config, params = CONFIGS[kind], weights(kind)
    h = jax.random.normal(jax.random.key(0), [2, 5, 32])
    positions = jnp.tile(jnp.arange(5), [2, 1])
    scanned, _, losses = decoder(params, h, positions, config)
    apply = jax.jit(layer_function(config).apply)
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda w: w[i], split_params(params)[0])  # noqa: B023
        h, _, _ = apply(layer, h, positions)
    np.testing.assert_allclose(scanned, h, atol=1e-5)
    assert losses == {}
    with pytest.raises(ValueError, match="holds 2 layers"):
        decoder(params, h, positions, replace(config, num_layers=3))


def test_training_has_losses_and_gradients_everywhere():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), SMALL)
    tokens = jnp.asarray(RECORDED["mixed"]["tokens"])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        h, cache, losses = forward(params, tokens, SMALL, train=True)
        assert cache is None
        logits = unembed(params, h, SMALL, train=True)
        return jax.nn.logsumexp(logits).mean() + sum(losses.values()), losses

    (_, losses), grads = loss(params)
    assert set(losses) == {"balance", "z"} and losses["balance"] > 0.9
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert 0.5 < float(embed(params, tokens, SMALL).std()) < 2


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
    logits, cache = prefill(
        params, jnp.array([[7, 8]]), jnp.array([2]), cache, SMALL
    )
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


@cache
def model():
    return Model(SMALL, weights("mixed"))


def test_greedy_is_the_argmax_of_the_whole():
    row = [5, 6, 7]
    for token in model().generate_ids([row], max_new_tokens=14)[0]:
        logits = model().logits([row])
        assert token == int(logits[0, -1].argmax())
        row = [*row, token]
    assert len(row) == 17                       # one more than the context


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
    config = replace(SMALL, context=64)
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
    assert cache.k.is_deleted() and not new.k.is_deleted()


def test_text_in_text_out():
    tokenizer = Tokenizer(FIXTURES / "tokenizer.model")
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((config.vocab_size, 32), np.float32) / 32**0.5
    params = {**weights("mixed"), "in_out_embed": {"embeddings": jnp.asarray(table)}}
    m = Model(config, params, tokenizer)
    options = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5}
    (text,) = m.generate(["expert"], **options)
    ids = m.generate_ids([tokenizer.encode("expert")], stop_ids=(2,), **options)
    assert text == tokenizer.decode(ids[0])
    assert "".join(m.stream("expert", **options)) == text
    stop = ids[0][3]
    short = "".join(m.stream("expert", stop_ids=[stop], **options))
    assert short == tokenizer.decode(ids[0][: ids[0].index(stop)])
    with pytest.raises(TypeError, match="must be a list"):
        m.generate("expert")
    with pytest.raises(ValueError, match="temperature"):
        m.stream("expert", max_new_tokens=2, temperature=-1.0)  # at once
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        m.generate([""])
    with pytest.raises(ValueError, match="no tokenizer"):
        model().generate(["expert"])


@pytest.mark.parametrize(
    "error, prompts, options",
    [
        ("prompt 1 is empty", [[1], []], {}),
        ("prompt 0 holds token 64", [[1, 64]], {}),
        ("prompt 0 holds token -1", [[-1]], {}),
        ("prompt 0 is no list of integer", [[1.5]], {}),
        ("prompt 0 is no list of integer", ["text"], {}),
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
        ("seed must be an integer", [[1]], {"seed": 0.5}),
    ],
)
def test_requests_that_cannot_be_run(error, prompts, options):
    with pytest.raises(ValueError, match=error):
        model().generate_ids(prompts, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "tokens, lengths",
    [([1, 2], None), ([[]], None), ([[1, 2]], [3]), ([[1, 2]], [0]),
     ([[1, 2]], [1, 2]), ([[1, 2]], [1.5]), ([[1, 99]], None)],
)  # fmt: skip
def test_logits_refuses(tokens, lengths):
    with pytest.raises(ValueError):
        model().logits(tokens, lengths)


def test_a_str_is_not_a_list_of_prompts():
    with pytest.raises(TypeError, match="must be a list"):
        model().generate_ids("text")


@pytest.mark.parametrize(
    "change, error",
    [
        ({"d_model": 0}, "d_model must be an int"),
        ({"kv_heads": 3}, "no multiple of kv_heads=3"),
        ({"head_size": 7}, "head_size must be even"),
        ({"top_k": 9}, "top_k=9 of only num_experts=8"),
        ({"attn_softcap": 0.0}, "attn_softcap must be positive"),
        ({"rope_base": float("inf")}, "rope_base must be positive"),
        ({"eos_id": 64}, "eos_id is not a token id"),
        ({"dtype": "float16"}, "dtype must be"),
    ],
)
def test_configurations_that_make_no_model(change, error):
    with pytest.raises(ValueError, match=error):
        replace(SMALL, **change)


def test_configurations_that_do():
    assert replace(SMALL, attn_softcap=None, num_experts=1, top_k=2)
    init = partial(init_params, config=PRESETS["grok-1"])
    shapes = jax.eval_shape(init, jax.random.key(0))
    sizes = [w.size for w in jax.tree.leaves(shapes)]
    assert round(sum(sizes) / 1e9, 1) == 315.7
    assert len(sizes) == 12 + 2


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
