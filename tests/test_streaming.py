"""Streaming: what the resident model says, from files that are only read."""

import json
import os
import pickle
import sys
from collections import Counter
from dataclasses import asdict, replace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints, cli, streaming
from annotated_moe.model import (
    Place,
    embed,
    init_cache,
    layer_function,
    split_params,
    unembed,
    weights_of,
)
from annotated_moe.streaming import Mapped, mapped, to_digits

BFLOAT16 = ml_dtypes.bfloat16
TINY = am.ModelConfig(
    vocab_size=40, context=32, d_model=16, d_ff=88, num_layers=11,
    q_heads=4, kv_heads=2, head_size=4, num_experts=8, dtype="float32",
)
PROMPTS = [[3, 9, 4, 1, 22, 7, 30], [5], [8, 8, 13, 2]]


class QuantizedWeight8bit:
    """Pickled under the name that the release used."""

    def __init__(self, weight, scales):
        self.weight, self.scales = weight, scales


QuantizedWeight8bit.__module__ = "__main__"


def random_tensors(config, kind):
    """Path -> tensor of all layers; matrices are int8, float32 or bfloat16."""
    rng, tensors = np.random.default_rng(0), {}
    for path, shape in checkpoints.expected(config).items():
        spread = shape[-2] ** -0.5 if len(shape) > 1 else 1
        w = (spread * rng.standard_normal(shape)).astype(np.float32)
        if path.endswith("/router/w"):
            w *= 4
        elif path.endswith("/w") and kind == "int8":
            groups = 4 if path.endswith(("/linear_1/w", "attention/linear/w")) else 1
            weight = rng.integers(-127, 128, shape).astype(np.int8)
            scales = spread / 73 * (0.5 + rng.random((*shape[:-2], groups, shape[-1])))
            w = am.QuantizedTensor(weight, scales.astype(BFLOAT16))
        elif kind == "bfloat16":
            w = w.astype(BFLOAT16)
        tensors[path] = w
    return tensors


def write_release(folder, config, tensors):
    """The Grok-1 layout: one pickle a tensor and layer."""
    flat = {}
    for path, w in tensors.items():
        if not path.startswith("decoder_layer/"):
            flat[f"language_model/{path}"] = w
            continue
        for i in range(config.num_layers):
            name = f"transformer/{path.replace('layer', f'layer_{i}', 1)}"
            if isinstance(w, am.QuantizedTensor):
                flat[name] = QuantizedWeight8bit(w.weight[i], w.scales[i])
            else:
                flat[name] = w[i]
    (folder / "ckpt-0").mkdir(parents=True)
    main, name = sys.modules["__main__"], QuantizedWeight8bit.__name__
    with patch.object(main, name, QuantizedWeight8bit, create=True):
        for i, key in enumerate(sorted(flat)):
            data = pickle.dumps(flat[key], protocol=4)
            (folder / f"ckpt-0/tensor{i:05d}_000").write_bytes(data)
    names = {ours: theirs for theirs, ours in checkpoints.GROK_NAMES.items()}
    values = {names[k]: v for k, v in asdict(config).items() if k in names}
    values["widening_factor"] = config.d_ff * 1.5 / config.d_model
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write(folder, layout, kind, config=TINY):
    tensors = random_tensors(config, kind)
    if layout == "grok":
        return write_release(folder, config, tensors)
    params = {}
    for path, w in tensors.items():
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = w
    am.save(am.Model(config, params), folder)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write(tmp_path_factory.mktemp("int8") / "model", "grok", "int8")


def streamed(folder, dtype="float32"):
    return am.load(folder, dtype=dtype, stream=True)


def both(folder, dtype="float32"):
    return am.load(folder, dtype=dtype), streamed(folder, dtype)


def assert_same_logits(resident, streamed):
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
        np.testing.assert_allclose(got[i, :n], want[i, :n], rtol=0, atol=1e-5)


def assert_same_tokens(resident, streamed):
    """Greedy and drawn, of rows of different length."""
    options = {"temperature": [1.0, 0.0, 0.7], "top_p": 0.9, "top_k": 20}
    job = (PROMPTS, 9)
    expected = resident.generate_ids(*job, **options)
    assert streamed.generate_ids(*job, **options) == expected


# The numbers of the resident model


def test_says_what_the_resident_model_says(release):
    models = both(release)
    assert_same_logits(*models)
    assert_same_tokens(*models)


FULL = [("ours", "int8"), ("ours", "float32")]
LAYOUTS = [("grok", "bfloat16")]
LAYOUTS += [pytest.param(*case, marks=pytest.mark.full) for case in FULL]


@pytest.mark.parametrize("layout, kind", LAYOUTS)
def test_every_layout_and_kind_of_weight(tmp_path, layout, kind):
    assert_same_logits(*both(write(tmp_path / "model", layout, kind)))


def test_a_dense_model(tmp_path):
    config = replace(TINY, num_experts=1, top_k=1, num_layers=2)
    models = both(write(tmp_path / "model", "ours", "int8", config))
    assert_same_logits(*models)
    assert_same_tokens(*models)


def test_bfloat16_is_as_near_to_float32_as_the_resident_model(release):
    """Both round; each rounds elsewhere, once in a while."""
    tokens = np.arange(1, 37).reshape(3, 12)
    exact = np.asarray(am.load(release, dtype="float32").logits(tokens))
    models = both(release, "bfloat16")
    resident, ours = (np.asarray(model.logits(tokens)) for model in models)
    off = np.abs(resident - exact).mean()
    assert 0 < np.abs(ours - exact).mean() < 1.5 * off
    assert np.abs(ours - resident).mean() < 1.5 * off


def test_bfloat16_rounds_where_the_resident_model_rounds():
    """From one h, a layer of each differs as the order of float32 sums does.

    Now and then a sum so falls on the other side of a rounding, in one row;
    a rounding that one of them leaves out would move them all a thousandfold.
    """
    resident, model = both(None, "bfloat16")
    c, tokens = resident.config, np.arange(100, 132).reshape(2, 16)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    stacks = split_params(resident.params)[0]
    run = layer_function(c).apply

    def of_layer(i):
        return weights_of(stacks, Place(i, i, i, i))

    one_layer = jax.jit(lambda h, i: run(of_layer(i), h, positions)[0])
    h = embed(resident.params, jnp.asarray(tokens), c)
    assert (model.embed(tokens) == h).all()
    for layer in range(c.num_layers):
        job = model.shelf, layer, h, positions, None, np.ones((2, 16), bool), c
        got, _ = streaming.stream_layer(*job)
        h = one_layer(h, jnp.int32(layer))
        off = np.abs(np.asarray(got) - np.asarray(h))
        assert h.std() > 1 and np.median(off) < 1e-5 and off.max() < 1e-2
    want = unembed(resident.params, h, c).reshape(32, -1)
    assert np.median(np.abs(model.unembed(h.reshape(32, -1)) - want)) < 1e-5


def test_text_comes_out_of_the_small_model():
    resident, model = both(None)
    prompt = "And God said"
    want = resident.generate([prompt], max_new_tokens=12)
    assert model.generate([prompt], max_new_tokens=12) == want
    pieces = list(model.stream(prompt, max_new_tokens=12, temperature=0.8, seed=5))
    again = list(resident.stream(prompt, max_new_tokens=12, temperature=0.8, seed=5))
    assert pieces == again and len(pieces) > 6
    ids = list(model.stream_ids([3, 4], max_new_tokens=12))
    assert ids == list(resident.stream_ids([3, 4], max_new_tokens=12))


def test_a_long_prompt_is_read_in_runs(release, monkeypatch):
    resident, model = both(release)
    want = resident.generate_ids(PROMPTS, 4)
    monkeypatch.setattr(streaming, "MOST_TOKENS", 9)        # 3 a row
    monkeypatch.setattr(streaming, "MOST_CHOICES", 2)
    assert model.generate_ids(PROMPTS, 4) == want
    assert_same_logits(resident, model)


def test_a_prompt_beyond_the_slots_is_refused(release):
    model = streamed(release)
    cache = init_cache(model.config, 1, 4)
    with pytest.raises(ValueError, match="5 tokens, 4 slots"):
        model.prefill(np.ones((1, 5), np.int32), np.array([5]), cache)


# Other families

BASE = replace(
    TINY, vocab_size=48, context=64, d_ff=24, num_layers=4, num_experts=4,
    embedding_multiplier=1.0, output_multiplier=1.0, attn_multiplier=0.5,
    attn_softcap=None, norm_eps=1e-6, post_norm=False, activation="silu", tied=False,
)  # fmt: skip
FAMILY = {
    "llama": replace(
        BASE, num_experts=1, top_k=1, attn_bias=True, mlp_bias=True,
        rope_scaling=(8.0, 1.0, 4.0, 16),
    ),
    "mixtral": replace(BASE, router="top_k_softmax", attn_window=7, num_layers=2),
    "qwen": replace(
        BASE, router="top_k_softmax", qk_norm="head", dense_layers=(1,), dense_ff=40,
        tied=True,
    ),
    "olmoe": replace(BASE, qk_norm="whole", qkv_clip=0.7, num_layers=2),
    "llama4": replace(
        BASE, router="sigmoid_input", top_k=1, moe_every=2, dense_ff=40,
        shared_expert=True, qk_norm="after_rope", nope_every=4, attn_chunk=8,
        attn_temperature=(4, 0.5),
    ),
}  # fmt: skip


def family_tensors(config, kind="float32"):
    """Random ones, with norms and biases that matter."""
    rng, tensors = np.random.default_rng(7), random_tensors(config, kind)
    for path, w in tensors.items():
        if path.endswith(("/scale", "/b")):
            spread = 0.3 * rng.standard_normal(w.shape)
            w = spread + (1 if path.endswith("/scale") else 0)
            tensors[path] = w.astype(np.float32)
        elif path.endswith("embeddings"):
            tensors[path] = rng.standard_normal(w.shape).astype(np.float32)
    return tensors


def tree(tensors):
    params = {}
    for path, w in tensors.items():
        module, leaf = path.rsplit("/", 1)
        params.setdefault(module, {})[leaf] = w
    return params


def turned(w):
    """The same numbers in the other order: a view of what Hugging Face has."""
    if isinstance(w, am.QuantizedTensor):
        return am.QuantizedTensor(turned(w.weight), w.scales)
    return np.ascontiguousarray(np.swapaxes(w, -1, -2)).swapaxes(-1, -2)


LONG = np.random.default_rng(5).integers(1, 48, (3, 41))
ROWS = [30, 3, 17]                      # two rings of 7 or 8 and more are filled


def steps(model, ends=(30, 41)):
    """Logits behind ragged prompts, then of tokens fed one at a time."""
    lengths = np.array(ROWS)
    padded = np.where(np.arange(30) < lengths[:, None], LONG[:, :30], 0)
    cache = init_cache(model.config, 3, 64)
    y, cache = model.prefill(padded.astype(np.int32), lengths, cache)
    found = [y]
    for step in range(11):
        tokens = LONG[np.arange(3), lengths + step].astype(np.int32)
        y, cache = model.decode_step(jnp.asarray(tokens), cache)
        found.append(y)
    return np.stack([np.asarray(y) for y in found], axis=1)


def whole(model):
    """What `steps` should be: the same texts, read at once."""
    y = np.asarray(model.logits(LONG))
    return np.stack([row[n - 1 : n + 11] for row, n in zip(y, ROWS)])


# One with chunks, a ring, dense, sparse and shared layers stands for the rest.
KINDS = [("llama4", "float32")]
KINDS += [
    pytest.param(name, "float32", marks=pytest.mark.full)
    for name in FAMILY if name != "llama4"
]
KINDS += [pytest.param("llama", "int8", marks=pytest.mark.full)]


@pytest.mark.parametrize("name, kind", KINDS)
def test_every_family_says_what_the_resident_model_says(tmp_path, name, kind):
    """Across the borders of windows and chunks; matrices either way round."""
    config, tensors = FAMILY[name], family_tensors(FAMILY[name], kind)
    am.save(am.Model(config, tree(tensors)), tmp_path / "model")
    resident, stream = both(tmp_path / "model")
    swapped = {path: turned(w) if path.endswith("/w") else w
               for path, w in tensors.items()}
    other = streaming.StreamedModel(config, tree(swapped))
    want = steps(resident)
    assert want.std() > 0.1
    np.testing.assert_allclose(want, whole(resident), rtol=0, atol=2e-4)
    for model, lies in ((stream, False), (other, True)):
        np.testing.assert_allclose(steps(model), want, rtol=0, atol=1e-4)
        key = model.shelf.matrix("decoder_layer/multi_head_attention/key", 1)
        assert key.transposed == lies
    np.testing.assert_allclose(whole(stream), whole(resident), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama4", pytest.param("mixtral", marks=pytest.mark.full)]
)
def test_rings_are_filled_in_runs(monkeypatch, name):
    """A prompt read in runs must find in the ring what earlier runs left."""
    model = streaming.StreamedModel(FAMILY[name], tree(family_tensors(FAMILY[name])))
    want = steps(model)
    monkeypatch.setattr(streaming, "MOST_TOKENS", 15)       # 5 a row
    np.testing.assert_allclose(steps(model), want, rtol=0, atol=1e-4)
    assert init_cache(model.config, 3, 64).near_k.shape[2] == 7 + (name == "llama4")


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
    config = FAMILY["llama4"]
    tensors = family_tensors(config)
    want = whole(streaming.StreamedModel(config, tree(tensors)))
    lazy = {path: Promise(w) if w.ndim > 1 else w for path, w in tensors.items()}
    model = streaming.StreamedModel(config, tree(lazy))
    np.testing.assert_allclose(whole(model), want, atol=2e-5)


def test_a_family_reads_the_experts_it_needs():
    """One expert a token in every second layer, the shared one once a layer."""
    config = FAMILY["llama4"]
    model = streaming.StreamedModel(config, tree(family_tensors(config)))
    prefill(model, [[5]])
    counts = model.shelf.reading.matrices
    moe = Counter(key[1] for key in counts if key[0] == "decoder_layer/moe/linear")
    assert moe == dict.fromkeys(range(2), 1)
    for module in ("decoder_layer/shared/linear", "decoder_layer/linear_v"):
        assert [counts[module, i] for i in range(3)] == [1, 1, 0]
    assert counts["lm_head",] == 1 and counts["in_out_embed",] == 0


# What is read


def experts_read(model):
    """(layer, expert) -> how often its first matrix was fetched."""
    counts = model.shelf.reading.matrices
    found = {key[1:]: n for key, n in counts.items() if key[0].endswith("moe/linear")}
    assert sum(n for key, n in counts.items() if "/moe/" in key[0]) == 3 * sum(
        found.values()
    )
    return Counter(found)


def prefill(model, prompts):
    lengths = np.array([len(row) for row in prompts])
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, ids in zip(tokens, prompts):
        row[: len(ids)] = ids
    cache = init_cache(model.config, len(prompts), 16)
    return model.prefill(tokens, lengths, cache)


def test_prefill_reads_each_chosen_expert_once(release):
    model = streamed(release)
    prefill(model, PROMPTS)
    read = experts_read(model)
    assert set(read.values()) == {1}
    assert 2 * TINY.num_layers < len(read) <= 8 * TINY.num_layers


def test_one_token_reads_two_experts_a_layer_and_nothing_else(release):
    model = streamed(release)
    logits, cache = prefill(model, [[5]])
    read = experts_read(model)
    layers = Counter(layer for layer, _ in read)
    assert layers == dict.fromkeys(range(TINY.num_layers), 2)
    before = model.shelf.reading.bytes
    model.decode_step(jnp.array([7]), cache)
    c = TINY
    heads = c.q_heads + 2 * c.kv_heads + c.q_heads
    matrices = c.d_model * heads * c.head_size + 2 * 3 * c.d_model * c.d_ff
    floats = c.d_model * c.num_experts + 4 * c.d_model
    layers = c.num_layers * (matrices + 4 * floats)
    table = 4 * c.d_model * (c.vocab_size + 1)
    assert model.shelf.reading.bytes - before == layers + table


def test_experts_that_were_not_counted_do_not_matter(tmp_path):
    """The counts are honest: garbage in all other experts changes nothing."""
    tensors = random_tensors(TINY, "int8")
    model = streamed(write_release(tmp_path / "a", TINY, tensors))
    want, _ = prefill(model, [[5, 6]])
    read = experts_read(model)
    for block in ("linear", "linear_v", "linear_1"):
        w = tensors[f"decoder_layer/moe/{block}/w"].weight
        for layer in range(TINY.num_layers):
            for e in range(TINY.num_experts):
                if (layer, e) not in read:
                    w[layer, e] = 99
    other = streamed(write_release(tmp_path / "b", TINY, tensors))
    np.testing.assert_array_equal(prefill(other, [[5, 6]])[0], want)
    layer, e = min(read)
    tensors["decoder_layer/moe/linear/w"].weight[layer, e] = 99
    third = streamed(write_release(tmp_path / "c", TINY, tensors))
    assert np.abs(prefill(third, [[5, 6]])[0] - want).max() > 1e-3


def test_padding_chooses_no_expert(release):
    """Rows of one token beside a long one: only real tokens count."""
    model = streamed(release)
    prefill(model, PROMPTS)
    together = experts_read(model)
    alone = Counter()
    for row in PROMPTS:
        model = streamed(release)
        prefill(model, [row])
        alone |= experts_read(model)
    assert together == alone


OPENED = []


def note_open(event, args):
    if event == "open" and isinstance(args[0], str | os.PathLike):
        OPENED.append((os.fspath(args[0]), args[1], args[2]))


def test_no_file_is_opened_for_writing(release):
    sys.addaudithook(note_open)
    try:
        model = streamed(release)
        model.generate_ids([[5]], 2)
        mine = [job for job in OPENED if job[0].startswith(str(release))]
    finally:
        OPENED.clear()
    assert len(mine) >= 2 + 13 * TINY.num_layers // 2
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    assert not [job for job in mine if job[2] & writing]


def test_the_weights_are_not_copied(release):
    model = streamed(release)
    w = model.shelf.matrix("decoder_layer/moe/linear", 3, 5)
    view, _ = model.shelf.views("decoder_layer/moe/linear", 3, 5)
    start = w.raw.unsafe_buffer_pointer() + int(w.skip)
    assert start == view.__array_interface__["data"][0]
    assert not view.flags.owndata and not view.flags.writeable


def test_a_layer_is_compiled_once(release):
    model = streamed(release)
    ids = model.stream_ids([5], 4)
    next(ids), next(ids)
    compiled = [streaming.attend_and_route, streaming.add_expert, streaming.add_normed]
    before = [f._cache_size() for f in compiled]
    assert all(n > 0 for n in before)
    next(ids), next(ids)
    assert [f._cache_size() for f in compiled] == before


# Files that change


@pytest.fixture
def scratch(tmp_path):
    return write(tmp_path / "model", "grok", "int8")


def complaint(model, *words):
    with pytest.raises(ValueError) as error:
        model.generate_ids([[5, 6, 7]], 2)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("which", [0, 2, 9])
def test_a_file_that_shrinks(scratch, which):
    model = streamed(scratch)
    path = sorted((scratch / "ckpt-0").iterdir())[which]
    os.truncate(path, path.stat().st_size // 2)
    complaint(model, path.name, "has changed", "load the model again")


def test_a_file_that_is_written_to_or_gone(scratch):
    model = streamed(scratch)
    path = sorted((scratch / "ckpt-0").iterdir())[4]
    os.utime(path, ns=(0, 0))
    complaint(model, path.name, "has changed")
    path.unlink()
    complaint(model, path.name, "is gone")


def test_a_file_that_is_too_short_from_the_start(scratch):
    path = sorted((scratch / "ckpt-0").iterdir())[4]
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(am.CheckpointError, match=f"{path.name} ends early"):
        am.load(scratch, stream=True)


def test_a_mesh_is_refused(release):
    with pytest.raises(ValueError, match="one device: leave out the mesh") as error:
        am.load(release, mesh=am.make_mesh(model=2), stream=True)
    assert "\n" not in str(error.value)


def test_a_matrix_beyond_int32_is_refused(monkeypatch):
    monkeypatch.setattr(streaming, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="cannot stream a matrix of 1,024 bytes"):
        mapped(np.zeros((16, 16), np.float32))


def test_a_streamed_model_is_not_saved(release, tmp_path):
    with pytest.raises(ValueError, match="on disk already"):
        am.save(am.load(release, stream=True), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


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
    y = np.asarray(w.times(x))
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
        got = mapped(view.view(w.dtype).reshape(d, f), scales).times(jnp.asarray(x))
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
        got = m.times(jnp.asarray(x))
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
        np.testing.assert_allclose(m.times(jnp.asarray(part)), exact, atol=2e-3)
    assert mapped(view[:, f:]).pitch == 2 * f and mapped(view[::-1, :f]).pitch == f


def test_many_rows_and_many_groups():
    rng = np.random.default_rng(3)
    w = rng.integers(-127, 128, (96, 8)).astype(np.int8)
    scales = rng.random((8, 8)).astype(BFLOAT16)
    x = rng.standard_normal((1025, 96)).astype(np.float32)
    exact = x @ (w * np.repeat(scales.astype(np.float64), 12, axis=0))
    got = jax.jit(Mapped.times)(mapped(w, scales), jnp.asarray(x))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-3)


# The command line


def test_generate_streams(capsys):
    job = ["generate", "--prompt", "In the", "--max-new-tokens", "12"]
    job += ["--dtype", "float32"]
    assert cli.main(job) == 0
    want = capsys.readouterr().out
    assert cli.main([*job, "--stream"]) == 0
    got = capsys.readouterr()
    assert got.out == want
    lines = [line for line in got.err.splitlines() if " s a token, " in line]
    assert len(lines) == 12 and lines[11].startswith("token 12: ")


def test_a_terminal_sees_the_layers(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    job = ["generate", "--prompt", "In the", "--max-new-tokens", "12", "--stream"]
    job += ["--dtype", "float32"]
    assert cli.main(job) == 0
    text = capsys.readouterr().err
    depth = am.load(stream=True).config.num_layers
    assert f"token 2: layer 1 of {depth}, " in text
    assert f"token 2: layer {depth} of {depth}, " in text


def test_stream_on_two_devices_is_refused(capsys):
    job = ["generate", "--prompt", "a", "--stream", "--devices", "2"]
    assert cli.main(job) == 2
    err = capsys.readouterr().err
    assert "one device" in err and err.count("\n") == 1
