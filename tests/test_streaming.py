"""Streaming: what the resident model says, from files that are only read."""

import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import annotated_moe as am
from annotated_moe import streaming
from annotated_moe.attention import (
    MASK_VALUE,
    Attention,
    AttentionSpec,
    Chunk,
    NormedAttentionSpec,
    UnitAttentionSpec,
    Window,
    attention_scores,
)
from annotated_moe.checkpoints import quantize_params
from annotated_moe.config import LayerSpec, ModelConfig, Segment, all_places, place_of
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import Model
from annotated_moe.linear import product
from annotated_moe.model import (
    apply_layer,
    embed,
    init_cache,
    init_params,
    layer_weights,
    param_specs,
    unembed,
)
from annotated_moe.moe import (
    FeedForwardSpec,
    MoE,
    MoESpec,
    Route,
    SharedMoESpec,
)
from annotated_moe.params import get_parameter
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.rope import Llama3Rope
from annotated_moe.streaming import StreamedModel, mapped, to_digits

BFLOAT16 = ml_dtypes.bfloat16
TINY = grok_config(
    vocab_size=40, context=32, d_model=16, d_ff=88, num_layers=3,
    q_heads=4, kv_heads=2, head_size=4, num_experts=8, dtype="float32",
)  # fmt: skip
PROMPTS = [[3, 9, 4, 1, 22, 7, 30], [5], [8, 8, 13, 2]]


# A family that is defined here and nowhere else


@dataclass(frozen=True)
class SinkSpec(AttentionSpec):
    def build(self):
        return SinkAttention(self)


class SinkAttention(Attention):
    """Each head has a score of its own for looking at nothing."""

    @hk.transparent
    def per_head(self):
        shape = (self.spec.q_heads,)
        return {"sinks": get_parameter("sinks", shape, ("heads",), jnp.zeros)}

    def attend(self, q, k, v, positions, key_positions, sinks):
        mask = self.spec.mask.sees(positions[..., None], key_positions[:, None])
        s = attention_scores(q, k, self.spec.multiplier)
        s = jnp.where(mask[:, None, None], s, MASK_VALUE)
        sinks = sinks.reshape(1, *s.shape[1:3], 1, 1)
        s = jnp.concatenate([s, jnp.broadcast_to(sinks, (*s.shape[:4], 1))], -1)
        p = jax.nn.softmax(s, axis=-1)[..., :-1]
        y = jnp.einsum("bkrts,bskh->btkrh", p, v)
        return y.reshape(*q.shape[:3], -1).astype(q.dtype)


@dataclass(frozen=True)
class BiasedMoESpec(MoESpec):
    def build(self):
        return BiasedMoE(self)


class Selection(hk.Module):
    def __call__(self, count):
        return get_parameter("b", (count,), (None,), jnp.zeros, float32=True)


class BiasedMoE(MoE):
    """Experts with biases, and a bias that only helps an expert be chosen."""

    def parameters(self, d):
        wide = {"linear/b": ((self.spec.width,), ("mlp",))}
        return super().parameters(d) | wide | {"linear_1/b": ((d,), ("embed",))}

    @hk.transparent
    def route(self, x, real=None):
        routed = super().route(x, real)
        bias = Selection("selection")(self.spec.num_experts)
        scores = jax.nn.sigmoid(routed.logits)
        _, experts = jax.lax.top_k(scores + bias, self.spec.top_k)
        gates = jnp.take_along_axis(scores, experts, axis=1)
        return Route(routed.probs, gates, experts, routed.logits)

    def expert(self, x, gates, w):
        hidden = product(x, w["linear"]) + w["linear/b"]
        hidden = jnp.clip(hidden, -3, 3) * product(x, w["linear_v"])
        y = product(hidden.astype(x.dtype), w["linear_1"]) + w["linear_1/b"]
        return y * gates[:, None]


# Configurations: one of everything


SIZES = {"q_heads": 4, "kv_heads": 2, "head_size": 4, "multiplier": 0.5}
EXPERTS = MoESpec(4, 2, 24, activation="silu", router="top_k_softmax")


def model_of(*layers, **rest):
    return ModelConfig(48, 64, 16, layers, dtype="float32", **rest)


MIXED = model_of(
    Segment(
        (
            LayerSpec(
                AttentionSpec(**SIZES, bias=True, rope=Llama3Rope(context=16)),
                FeedForwardSpec(40, "silu", bias=True),
            ),
        ),
        1,
    ),
    Segment(
        (
            LayerSpec(
                NormedAttentionSpec(**SIZES, mask=Window(7), clip=0.7), EXPERTS
            ),
            LayerSpec(
                SinkSpec(**SIZES, value_size=6), BiasedMoESpec(4, 2, 24), post_norm=True
            ),
        ),
        2,
    ),
    Segment(
        (
            LayerSpec(
                UnitAttentionSpec(**SIZES, mask=Chunk(8)),
                SharedMoESpec(
                    4, 1, 24, "silu", "sigmoid",
                    shared=FeedForwardSpec(32, "silu"), gate_input=True,
                ),
            ),
            LayerSpec(
                UnitAttentionSpec(**SIZES, rope=None, floor=4),
                FeedForwardSpec(40, "silu"),
            ),
        ),
        1,
    ),
    embedding_multiplier=2.0, output_multiplier=0.5,
)  # fmt: skip
GROK = grok_config(
    vocab_size=48, context=64, d_model=16, d_ff=24, num_layers=2, q_heads=4,
    kv_heads=2, head_size=4, num_experts=4, dtype="float32",
)  # fmt: skip
DENSE = replace(GROK, layers=(Segment(MIXED.layers[0].pattern, 2),))


def random_tensors(config, kind="float32"):
    """Module -> name -> tensor; matrices are int8, float32 or bfloat16."""
    rng, params = np.random.default_rng(7), {}
    for module, leaves in param_specs(config).items():
        params[module] = {}
        for name, spec in leaves.items():
            w = rng.standard_normal(spec.shape).astype(np.float32)
            if spec.matrix:
                w = weight_of(w, kind, spec, rng)
            elif module.endswith("norm") or name == "scale":
                w = 1 + 0.3 * w
            elif module.endswith("router"):
                w *= 4 * spec.shape[-2] ** -0.5
            params[module][name] = w
    return params


def weight_of(w, kind, spec, rng):
    spread = spec.shape[-2] ** -0.5
    if kind != "int8":
        return (spread * w).astype(BFLOAT16 if kind == "bfloat16" else np.float32)
    groups = 4 if spec.axes[-2] in ("heads", "mlp") else 1
    weight = rng.integers(-127, 128, w.shape).astype(np.int8)
    scales = 0.5 + rng.random((*w.shape[:-2], groups, w.shape[-1]))
    return QuantizedTensor(weight, (spread / 73 * scales).astype(BFLOAT16))


def each_array(params, change):
    """`params` with each array changed, told its name."""
    new = {}
    for module, leaves in params.items():
        new[module] = {}
        for name, w in leaves.items():
            key = f"{module}/{name}"
            if isinstance(w, QuantizedTensor):
                new[module][name] = QuantizedTensor(
                    change(f"{key}.weight", w.weight), change(f"{key}.scales", w.scales)
                )
            else:
                new[module][name] = change(key, w)
    return new


def write(path, params):
    """The parameters' arrays as a file."""
    arrays = {}
    each_array(params, lambda key, w: arrays.setdefault(key, np.ascontiguousarray(w)))
    save_file(arrays, path)
    return path


def views(path, params):
    """The same parameters as views of the file, which is only read."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())

    def view(key, w):
        begin, end = header[key]["data_offsets"]
        return data[start + begin : start + end].view(w.dtype).reshape(w.shape)

    return each_array(params, view)


def transpose(key, w):
    """Matrices in the other order: a view of what other files hold."""
    if w.ndim < 3 or key.endswith(".scales"):
        return w
    return np.ascontiguousarray(np.swapaxes(w, -1, -2)).swapaxes(-1, -2)


def both(folder, config, kind="float32", dtype="float32"):
    """The resident model and the streamed one, of one file."""
    config, params = replace(config, dtype=dtype), random_tensors(config, kind)
    path = write(folder / "model.safetensors", params)
    resident = Model(config, cast(params, config))
    return resident, StreamedModel(config, views(path, params))


def cast(params, config):
    """As a model in memory holds them: all but some in its dtype."""
    specs = param_specs(config)

    def one(module, name, w):
        if isinstance(w, QuantizedTensor):
            return jax.tree.map(jnp.asarray, w)
        own = jnp.float32 if specs[module][name].float32 else config.dtype
        return jnp.asarray(w, own)

    return {m: {n: one(m, n, w) for n, w in ws.items()} for m, ws in params.items()}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A file with int8 weights of TINY."""
    params = random_tensors(TINY, "int8")
    return write(tmp_path_factory.mktemp("int8") / "model.safetensors", params)


def streamed(path, config=TINY):
    return StreamedModel(config, views(path, random_tensors(config, "int8")))


def assert_same_logits(resident, streamed, atol=1e-5):
    """Of rows of different length."""
    lengths = np.array([len(row) for row in PROMPTS])
    tokens = np.zeros((len(PROMPTS), lengths.max()), np.int32)
    for row, ids in zip(tokens, PROMPTS):
        row[: len(ids)] = ids
    want = np.asarray(resident.logits(tokens, lengths))
    got = np.asarray(streamed.logits(tokens, lengths))
    assert got.shape == want.shape and got.dtype == np.float32
    for i, n in enumerate(lengths):
        assert want[i, :n].std() > 0.1
        np.testing.assert_allclose(got[i, :n], want[i, :n], rtol=0, atol=atol)


def assert_same_tokens(resident, streamed):
    """Greedy and drawn, of rows of different length."""
    options = {"temperature": [1.0, 0.0, 0.7], "top_p": 0.9, "top_k": 20}
    expected = resident.generate_ids(PROMPTS, 9, **options)
    assert streamed.generate_ids(PROMPTS, 9, **options) == expected


# The numbers of the resident model


LONG = np.random.default_rng(5).integers(1, 48, (3, 41))
ROWS = [30, 3, 17]                      # two rings of 7 or 8 and more are filled


def steps(model):
    """Logits behind ragged prompts, then of tokens fed one at a time."""
    lengths = np.array(ROWS, np.int32)
    padded = np.where(np.arange(30) < lengths[:, None], LONG[:, :30], 0)
    cache = init_cache(model.config, 3, 64)
    y, cache = model.prefill(padded.astype(np.int32), lengths, cache)
    found = [y]
    for step in range(8):
        tokens = LONG[np.arange(3), lengths + step].astype(np.int32)
        y, cache = model.decode_step(jnp.asarray(tokens), cache)
        found.append(y)
    return np.stack([np.asarray(y) for y in found], axis=1)


def whole(model):
    """What `steps` should be: the same texts, read at once."""
    y = np.asarray(model.logits(LONG))
    return np.stack([row[n - 1 : n + 8] for row, n in zip(y, ROWS)])


def turn(config, kind):
    """A model whose matrices lie the other way round."""
    return StreamedModel(config, each_array(random_tensors(config, kind), transpose))


KINDS = [
    pytest.param(GROK, "float32", id="grok-float32"),
    pytest.param(GROK, "int8", id="grok-int8", marks=pytest.mark.full),
    pytest.param(MIXED, "float32", id="mixed-float32"),
    pytest.param(MIXED, "int8", id="mixed-int8", marks=pytest.mark.full),
]


@pytest.mark.parametrize("config, kind", KINDS)
def test_says_what_the_resident_model_says(tmp_path, config, kind):
    """Prompts with padding and eight cached steps, every kind of layer."""
    resident, model = both(tmp_path, config, kind)
    want = steps(resident)
    assert want.std() > 0.1
    np.testing.assert_allclose(steps(model), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["float32", pytest.param("int8", marks=pytest.mark.full)]
)
def test_matrices_that_lie_the_other_way_round(tmp_path, kind):
    """As in other files: the same numbers, read where they are."""
    resident, model = both(tmp_path, GROK, kind)
    turned = turn(GROK, kind)
    np.testing.assert_allclose(whole(turned), whole(resident), rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole(model), whole(resident), rtol=0, atol=1e-5)
    key = "decoder_layer/multi_head_attention/key", "w", 0
    assert turned.store.fetch(*key).transposed
    assert not model.store.fetch(*key).transposed


def test_tokens_of_the_resident_model(release):
    resident = Model(TINY, cast(random_tensors(TINY, "int8"), TINY))
    model = streamed(release)
    assert_same_logits(resident, model)
    assert_same_tokens(resident, model)


def test_bfloat16_weights_and_a_dense_model(tmp_path):
    assert_same_logits(*both(tmp_path, DENSE, "bfloat16"))


def test_bfloat16_is_as_near_to_float32_as_the_resident_model(tmp_path):
    """Both round; each rounds elsewhere, once in a while."""
    tokens = np.arange(1, 37).reshape(3, 12)
    exact = np.asarray(both(tmp_path, GROK, "int8")[0].logits(tokens))
    models = both(tmp_path, GROK, "int8", "bfloat16")
    resident, ours = (np.asarray(model.logits(tokens)) for model in models)
    off = np.abs(resident - exact).mean()
    assert 0 < np.abs(ours - exact).mean() < 1.5 * off
    assert np.abs(ours - resident).mean() < 1.5 * off


@pytest.mark.full
def test_bfloat16_rounds_where_the_resident_model_rounds(tmp_path):
    """From one h, a layer of each differs as the order of float32 sums does.

    Now and then a sum so falls on the other side of a rounding, in one row;
    a rounding that one of them leaves out would move them all a thousandfold.
    """
    two = replace(MIXED, layers=(replace(MIXED.layers[1], repeats=1),))
    resident, model = both(tmp_path, two, "int8", "bfloat16")
    c, tokens = resident.config, jnp.arange(8, 40).reshape(2, 16)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    real = jnp.ones((2, 16), bool)
    h = embed(resident.params["in_out_embed"]["embeddings"], tokens, c)
    assert (streaming.stream_embed(model.store, np.asarray(tokens)) == h).all()
    for layer in range(c.num_layers):
        place, index = place_of(c, layer)
        got, _ = streaming.stream_layer(
            model.store, place, index, h, positions, real, None
        )
        weights = layer_weights(resident.params, place, c, index)
        run = jax.jit(apply_layer, static_argnums=(1, 2))
        h = run(weights, place, c, h, positions, real)[0]
        off = np.abs(np.asarray(got) - np.asarray(h))
        assert h.std() > 1 and np.median(off) < 1e-5 and off.max() < 3e-2
    want = unembed(resident.params, h, c).reshape(32, -1)
    ours = streaming.stream_unembed(model.store, h.reshape(32, -1))
    assert np.median(np.abs(ours - want)) < 1e-5


def test_long_prompts_are_read_in_runs(tmp_path, monkeypatch):
    """What a run needs of earlier ones it must find, in rings too."""
    _, model = both(tmp_path, MIXED)
    want, texts = steps(model), np.asarray(model.logits(LONG))
    monkeypatch.setattr(streaming, "MOST_TOKENS", 15)       # 5 a row
    monkeypatch.setattr(streaming, "MOST_CHOICES", 2)
    np.testing.assert_allclose(steps(model), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.logits(LONG), texts, rtol=0, atol=1e-5)


def test_a_row_that_is_not_active_stays_as_it_is(tmp_path):
    resident, model = both(tmp_path, GROK)
    active, found = np.array([True, False, True]), []
    for each in (resident, model):
        _, cache = prefill(each, PROMPTS)
        y, cache = each.decode_step(np.array([1, 2, 3], np.int32), cache, active)
        assert (np.asarray(cache.length) == [8, 1, 5]).all()
        found.append(np.asarray(y)[active])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_a_prompt_beyond_the_slots_is_refused(release):
    model = streamed(release)
    cache = init_cache(model.config, 1, 4)
    with pytest.raises(ValueError, match="5 tokens, 4 slots"):
        model.prefill(np.ones((1, 5), np.int32), np.array([5]), cache)


@dataclass(frozen=True)
class Seeing(ModelConfig):
    """What a prompt holds besides is added to its tokens."""

    def merge(self, h, inputs):
        return h + inputs


def test_what_a_prompt_holds_besides_is_merged(tmp_path, monkeypatch):
    config = Seeing(**{name: getattr(GROK, name) for name in GROK.__dataclass_fields__})
    resident, model = both(tmp_path, config)
    inputs = np.random.default_rng(3).standard_normal((3, 16, 16)).astype(np.float32)
    want, _ = prefill(resident, PROMPTS, inputs)
    got, _ = prefill(model, PROMPTS, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(got - prefill(model, PROMPTS)[0]).max() > 0.1
    monkeypatch.setattr(streaming, "MOST_TOKENS", 9)
    got, _ = prefill(model, PROMPTS, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


class Promise:
    """A stack of layers that is made when it is asked for."""

    def __init__(self, w):
        self.w, self.shape, self.dtype = w, w.shape, w.dtype

    def __getitem__(self, index):
        part = self.w[index]
        return Promise(part) if part.ndim > 2 else part

    def __array__(self, dtype=None, copy=None):
        return np.array(self.w, dtype)


def test_weights_that_are_made_when_asked_for():
    params = random_tensors(GROK)
    want, _ = prefill(StreamedModel(GROK, params), PROMPTS)
    lazy = each_array(params, lambda _, w: Promise(w) if w.ndim > 1 else w)
    got, _ = prefill(StreamedModel(GROK, lazy), PROMPTS)
    np.testing.assert_allclose(got, want, atol=1e-5)


# What is read


def prefill(model, prompts, inputs=None):
    lengths = np.array([len(row) for row in prompts], np.int32)
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, ids in zip(tokens, prompts):
        row[: len(ids)] = ids
    cache = init_cache(model.config, len(prompts), 16)
    return model.prefill(tokens, lengths, cache, inputs)


def experts_read(model, leaf="linear"):
    """(layer, expert) -> how often its first matrix was fetched."""
    counts = model.store.counts.weights
    return Counter({key[2:]: n for key, n in counts.items()
                    if key[0].endswith(f"moe/{leaf}") and key[1] == "w"})


def test_a_family_reads_the_experts_it_needs(tmp_path):
    """Of one token: two biased experts, one beside the shared; in every layer."""
    _, model = both(tmp_path, MIXED)
    prefill(model, [[5]])
    counts, chosen = model.store.counts.weights, Counter()
    for key, times in counts.items():
        assert times == 1, key
        if "/moe/" in key[0]:
            chosen[key[0].split("/")[0], *key[1:3]] += 1
    # three matrices an expert, and two biases where it has them
    assert chosen == {
        ("decoder_layer_1", "w", 0): 6, ("decoder_layer_1", "w", 1): 6,
        ("decoder_layer_2", "w", 0): 6, ("decoder_layer_2", "w", 1): 6,
        ("decoder_layer_2", "b", 0): 4, ("decoder_layer_2", "b", 1): 4,
        ("decoder_layer_3", "w", 0): 3,
    }  # fmt: skip
    every = {(s.name, i) for s in all_places(MIXED) for i in range(len(s.layers))}
    assert every == {(key[0].split("/")[0], key[2]) for key in counts if len(key) > 2}
    assert counts["decoder_layer_3/shared/linear", "w", 0] == 1
    assert counts["output matrix",] == 1


def test_prefill_reads_each_chosen_expert_once(release):
    model = streamed(release)
    prefill(model, PROMPTS)
    read = experts_read(model)
    assert set(read.values()) == {1}
    assert read == experts_read(model, "linear_v") == experts_read(model, "linear_1")
    assert 2 * TINY.num_layers < len(read) <= 8 * TINY.num_layers


def test_one_token_reads_two_experts_a_layer_and_nothing_else(release):
    model = streamed(release)
    _, cache = prefill(model, [[5]])
    layers = Counter(layer for layer, _ in experts_read(model))
    assert layers == dict.fromkeys(range(TINY.num_layers), 2)
    before = model.store.counts.bytes
    model.decode_step(jnp.array([7]), cache)
    size = 0
    for leaves in random_tensors(TINY, "int8").values():
        for w in leaves.values():
            part = w if isinstance(w, QuantizedTensor) else None
            arrays = [w] if part is None else [part.weight, part.scales]
            share = 2 / 8 if part is not None and w.ndim == 4 else 1
            size += sum(share * a.nbytes for a in arrays)
    assert model.store.counts.bytes - before == size + 4 * TINY.d_model


def test_experts_that_were_not_counted_do_not_matter(tmp_path):
    """The counts are honest: garbage in all other experts changes nothing."""
    params = random_tensors(TINY, "int8")

    def logits(name):
        path = write(tmp_path / name, params)
        model = StreamedModel(TINY, views(path, params))
        return prefill(model, [[5, 6]])[0], experts_read(model)

    want, read = logits("a")
    for block in ("linear", "linear_v", "linear_1"):
        w = params[f"decoder_layer/moe/{block}"]["w"].weight
        for layer in range(TINY.num_layers):
            for e in range(8):
                if (layer, e) not in read:
                    w[layer, e] = 99
    np.testing.assert_array_equal(logits("b")[0], want)
    layer, e = min(read)
    params["decoder_layer/moe/linear"]["w"].weight[layer, e] = 99
    assert np.abs(logits("c")[0] - want).max() > 1e-3


def test_padding_chooses_no_expert(release):
    """Rows of one and two tokens in sixteen: only real tokens count."""
    model, rows = streamed(release), [[5], [8, 8]]
    prefill(model, rows)
    together = experts_read(model)
    alone = Counter()
    for row in rows:
        model = streamed(release)
        cache = init_cache(model.config, 1, 16)
        model.prefill(np.array([row], np.int32), np.array([len(row)], np.int32), cache)
        alone |= experts_read(model)
    assert together == alone


def test_the_weights_are_not_copied(release):
    model = streamed(release)
    key = "decoder_layer/moe/linear", "w", 2, 5
    w, (view, _) = model.store.fetch(*key), model.store.parts(*key)
    start = w.raw.unsafe_buffer_pointer() + int(w.skip)
    assert start == view.__array_interface__["data"][0]
    assert not view.flags.owndata and not view.flags.writeable


def test_a_layer_is_compiled_once(release):
    model = streamed(release)
    ids = model.stream_ids([5], 4)
    next(ids), next(ids)
    compiled = [streaming.attend_and_route, streaming.add_expert]
    compiled.append(streaming.add_to_residual)
    before = [f._cache_size() for f in compiled]
    assert all(n > 0 for n in before)
    next(ids), next(ids)
    assert [f._cache_size() for f in compiled] == before


# Files that change


@pytest.fixture
def scratch(tmp_path):
    return write(tmp_path / "scratch.safetensors", random_tensors(TINY, "int8"))


def complaint(model, *words):
    with pytest.raises(ValueError) as error:
        model.generate_ids([[5, 6, 7]], 2)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    for word in words:
        assert word in text, text


def test_a_file_that_shrinks(scratch):
    model = streamed(scratch)
    os.truncate(scratch, scratch.stat().st_size // 2)
    complaint(model, scratch.name, "has changed", "load the model again")


def test_a_file_that_is_written_to_or_gone(scratch):
    model = streamed(scratch)
    model.generate_ids([[5, 6, 7]], 1)
    os.utime(scratch, ns=(0, 0))
    complaint(model, scratch.name, "has changed")
    scratch.unlink()
    complaint(model, scratch.name, "is gone")


@pytest.mark.parametrize(
    "sizes, exchange",
    [
        ((2, 2, 2), "all_to_all"),
        pytest.param((1, 8, 1), "ring", marks=pytest.mark.full),
        pytest.param((2, 2, 2), "sum", marks=pytest.mark.full),
    ],
)
def test_a_mesh_with_experts_dealt_out(sizes, exchange, tmp_path):
    """From int8 files, tokens apart: what one in memory says, and few bytes."""
    config = replace_experts(TINY)
    params = jax.jit(lambda key: quantize_params(init_params(key, config), config))
    am.save(am.Model(config, params(jax.random.key(0))), tmp_path / "m")
    mesh = am.make_mesh(data=sizes[0], expert=sizes[1], model=sizes[2])
    how = {"mesh": mesh, "dtype": "float32", "exchange": exchange}
    one = am.load(tmp_path / "m", dtype="float32")
    model = am.load(tmp_path / "m", stream=True, **how)
    tokens = np.arange(8 * 3).reshape(8, 3)
    want, got = one.logits(tokens), model.logits(tokens)
    largest = float(np.abs(want).max())
    assert np.abs(got - want).max() < 1e-5 * largest
    rows = tokens.tolist()
    model.store.counts.weights.clear()
    made = model.generate_ids(rows[:1], max_new_tokens=3)
    assert made == one.generate_ids(rows[:1], max_new_tokens=3)
    # Of each layer, only the experts that somebody chose.
    read = {key[2:] for key in model.store.counts.weights if len(key) == 4}
    assert 0 < len(read) < config.num_layers * 8


def replace_experts(config):
    """Wider, so that each mesh divides it."""
    layer = config.layer(0)
    experts = replace(layer.feed_forward, width=64)
    layer = replace(layer, feed_forward=experts)
    return replace(config, layers=(Segment((layer,), 2),))


def test_a_matrix_beyond_int32_is_refused(monkeypatch):
    monkeypatch.setattr(streaming, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="cannot stream a matrix of 1,024 bytes"):
        mapped(np.zeros((16, 16), np.float32))


# Products


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 3e30])
def test_digits_spell_the_number(scale):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, 4000)) * scale).astype(np.float32)
    x[1] *= np.logspace(-9, 0, 4000, dtype=np.float32)
    x[2] = 0
    x[3] = np.sign(x[3]) * np.abs(x[3]).max()
    digits, step = (np.asarray(a, np.float64) for a in to_digits(jnp.asarray(x)))
    spelled = step * (254**2 * digits[0] + 254 * digits[1] + digits[2])
    peak = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(spelled - x) <= 2.5e-7 * peak).all()
    assert np.abs(digits).max() <= 127


def test_what_is_no_number_stays_none():
    x = jnp.ones((3, 8)).at[0, 2].set(jnp.nan).at[1, 3].set(jnp.inf)
    w = mapped(np.ones((8, 4), np.int8), np.ones((1, 4), BFLOAT16))
    y = np.asarray(product(x, w))
    assert not np.isfinite(y[:2]).any()
    np.testing.assert_allclose(y[2], 8, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16"])
def test_a_matrix_anywhere_in_a_file(tmp_path, kind):
    """At every distance from an aligned byte, and at the very end."""
    rng, (d, f) = np.random.default_rng(2), (24, 10)
    w = rng.integers(-127, 128, (d, f)).astype(kind)
    scales = rng.random((4, f)).astype(BFLOAT16) if kind == "int8" else None
    x = rng.standard_normal((3, d)).astype(np.float32)
    exact = w.astype(np.float64)
    if scales is not None:
        exact *= np.repeat(scales.astype(np.float64), d // 4, axis=0)
    for before, after in ((0, 0), (1, 0), (63, 7), (64, 64), (130, 500)):
        path = tmp_path / f"{before}"
        path.write_bytes(b"b" * before + w.tobytes() + b"a" * after)
        view = np.memmap(path, np.uint8, "r")[before : before + w.nbytes]
        got = product(jnp.asarray(x), mapped(view.view(w.dtype).reshape(d, f), scales))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, x @ exact, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 11, 600])
def test_a_matrix_that_lies_the_other_way_round(tmp_path, kind, n):
    rng, (d, f) = np.random.default_rng(4), (24, 134)
    w = rng.integers(-127, 128, (d, f)).astype(kind)
    scales = rng.random((4, f)).astype(BFLOAT16) if kind == "int8" else None
    x = rng.standard_normal((n, d)).astype(np.float32)
    exact = w.astype(np.float64)
    if scales is not None:
        exact *= np.repeat(scales.astype(np.float64), d // 4, axis=0)
    for before, after in ((0, 0), (33, 0), (130, 500)):
        path = tmp_path / f"{before}"
        path.write_bytes(b"b" * before + w.T.tobytes() + b"a" * after)
        view = np.memmap(path, np.uint8, "r")[before : before + w.nbytes]
        m = mapped(view.view(w.dtype).reshape(f, d).T, scales)
        assert m.transposed and m.shape == (d, f)
        got = product(jnp.asarray(x), m)
        np.testing.assert_allclose(got, x @ exact, rtol=1e-5, atol=2e-3)
        at = m.raw.unsafe_buffer_pointer() + int(m.skip)
        askew = before % w.itemsize and not after           # copied: see to_jax
        assert askew or at == view.__array_interface__["data"][0]


@pytest.mark.parametrize("kind", ["int8", "float32", "bfloat16"])
def test_two_matrices_side_by_side(tmp_path, kind):
    """As the gate and the up matrix of Llama 4: either half, either way round."""
    rng, (d, f) = np.random.default_rng(6), (12, 10)
    w = rng.integers(-127, 128, (d, 2 * f)).astype(kind)
    (tmp_path / "w").write_bytes(b"before" + w.tobytes())
    view = np.memmap(tmp_path / "w", np.uint8, "r")[6:].view(w.dtype).reshape(d, -1)
    x = rng.standard_normal((3, 12)).astype(np.float32)
    left, right = view[:, :f], view[:, f:]
    for half in (left, right, left.T, right.T, left[::-1]):
        part = x[:, : len(half)]
        ones = np.ones((1, half.shape[1]), BFLOAT16) if kind == "int8" else None
        m = mapped(half, ones)
        exact = part @ half.astype(np.float64)
        np.testing.assert_allclose(product(jnp.asarray(part), m), exact, atol=2e-3)
    assert mapped(view[:, f:]).pitch == 2 * f and mapped(view[::-1, :f]).pitch == f


def test_many_rows_and_many_groups():
    rng = np.random.default_rng(3)
    w = rng.integers(-127, 128, (96, 8)).astype(np.int8)
    scales = rng.random((8, 8)).astype(BFLOAT16)
    x = rng.standard_normal((1025, 96)).astype(np.float32)
    exact = x @ (w * np.repeat(scales.astype(np.float64), 12, axis=0))
    got = jax.jit(product)(jnp.asarray(x), mapped(w, scales))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-3)


# The small model, from its files, and the command line


OPENED = []


def note_open(event, args):
    if event == "open" and isinstance(args[0], str | os.PathLike):
        OPENED.append((os.fspath(args[0]), args[1], args[2]))


def test_text_comes_out_of_the_small_model():
    resident, model = am.load(dtype="float32"), am.load(dtype="float32", stream=True)
    prompt = "And God said"
    want = resident.generate([prompt], max_new_tokens=12)
    assert model.generate([prompt], max_new_tokens=12) == want
    pieces = list(model.stream(prompt, max_new_tokens=12, temperature=0.8, seed=5))
    again = list(resident.stream(prompt, max_new_tokens=12, temperature=0.8, seed=5))
    assert pieces == again and len(pieces) > 6


def test_no_file_is_opened_for_writing():
    sys.addaudithook(note_open)
    try:
        am.load(dtype="float32", stream=True).generate_ids([[5]], 2)
        mine = [job for job in OPENED if "annotated_moe" in job[0]]
    finally:
        OPENED.clear()
    assert [job for job in mine if job[0].endswith(".safetensors")]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    weights = [job for job in mine if not job[0].endswith(".pyc")]
    assert not [job for job in weights if job[2] & writing]


def test_a_streamed_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="on disk already"):
        am.save(am.load(stream=True), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_generate_streams(capsys):
    cli = pytest.importorskip("annotated_moe.cli")

    job = ["generate", "--prompt", "In the", "--max-new-tokens", "12"]
    job += ["--dtype", "float32"]
    assert cli.main(job) == 0
    want = capsys.readouterr().out
    assert cli.main([*job, "--stream"]) == 0
    got = capsys.readouterr()
    assert got.out == want
    lines = [line for line in got.err.splitlines() if " s a token, " in line]
    assert len(lines) == 12 and lines[11].startswith("token 12: ")


@pytest.mark.parametrize("devices", [
    pytest.param(["--devices", "2"], marks=pytest.mark.full), ["--mesh", "1x2x2"],
])  # fmt: skip
def test_generate_streams_on_a_mesh(devices, capsys):
    cli = pytest.importorskip("annotated_moe.cli")

    job = ["generate", "--prompt", "In the", "--max-new-tokens", "6"]
    job += ["--dtype", "float32"]
    assert cli.main(job) == 0
    want = capsys.readouterr().out
    assert cli.main([*job, "--stream", *devices]) == 0
    assert capsys.readouterr().out == want


# The line of progress


def screen(text, width=80, height=5):
    """What a terminal shows: the few codes that `StatusLine` uses."""
    cells = [[" "] * width for _ in range(height)]
    x = y = 0
    kept = (0, 0)
    codes = {"\x1bD": "down", "\x1b[A": "up", "\x1b7": "keep", "\x1b8": "back",
             "\x1b[K": "clear"}  # fmt: skip
    while text:
        code = next((c for c in codes if text.startswith(c)), text[0])
        text = text[len(code) :]
        match codes.get(code):
            case "down":
                y += 1
            case "up":
                y -= 1
            case "keep":
                kept = x, y
            case "back":
                x, y = kept
            case "clear":
                cells[y][x:] = [" "] * (width - x)
            case None if code == "\r":
                x = 0
            case None if code == "\n":
                x, y = 0, y + 1
            case None:
                assert code != "\x1b", text[:20]
                cells[y][x] = code
                x += 1
    return ["".join(line).rstrip() for line in cells]


def fake_ids(model, words, out):
    """A token a word, for which two layers are computed."""
    for i, _ in enumerate(words):
        for layer in range(2):
            time.sleep(3e-3)
            model.store.layer_done(layer + 1)
            if i:
                seen = screen(out())
                assert seen[0] == "".join(words[:i])
                assert seen[1].startswith(f"token {i + 1}: ")
                assert f"{layer + 1}/2" in seen[1]
        model.store.counts.bytes += 3 * 10**9
        yield i


def test_the_status_stays_below_the_text(monkeypatch, capsys):
    """Text and status share a terminal, and neither writes over the other."""
    model = StreamedModel(DENSE, {})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(streaming, "SECONDS", 1e-3)
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    words, said = ["In", " the", " beginning"], ""

    def out():
        nonlocal said
        said += capsys.readouterr().err
        return said

    for i in streaming.with_progress(model, fake_ids(model, words, out)):
        print(words[i], end="", flush=True)
    last = screen(out())
    assert last[0] == "".join(words)
    assert last[1].startswith("token 3: 0.0 s a token, 3 GB")
    assert not any(last[2:])


def test_a_log_has_a_line_a_token(capsys):
    model = StreamedModel(DENSE, {})

    def ids():
        for i in range(3):
            model.store.layer_done(1)
            yield i

    assert list(streaming.with_progress(model, ids())) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["token 1", "token 2", "token 3"]
