"""Streaming: what the resident model says, from files that are only read."""

import json
import os
import sys
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
from annotated_moe.config import LayerSpec, ModelConfig, Segment, all_slots, slot_of
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import Model
from annotated_moe.linear import product
from annotated_moe.model import (
    embed,
    init_cache,
    layer_weights,
    one_layer,
    param_specs,
    unembed,
)
from annotated_moe.moe import (
    ROUTERS,
    FeedForwardSpec,
    MoE,
    MoESpec,
    Route,
    SharedMoESpec,
)
from annotated_moe.params import get_parameter
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.rope import Llama3Rope
from annotated_moe.streaming import Mapped, StreamedModel, mapped, to_digits

needs_load = pytest.mark.skipif(not hasattr(am, "load"), reason="load is not there yet")
BFLOAT16 = ml_dtypes.bfloat16
TINY = grok_config(
    vocab_size=40, context=32, d_model=16, d_ff=88, num_layers=11,
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
    def route(self, x):
        routed = super().route(x)
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
                UnitAttentionSpec(**SIZES, rope=None, floor=4), FeedForwardSpec(40, "silu")
            ),
        ),
        1,
    ),
    embedding_multiplier=2.0, output_multiplier=0.5,
)  # fmt: skip
GROK = replace(
    grok_config(
        vocab_size=48, context=64, d_model=16, d_ff=24, num_layers=3, q_heads=4,
        kv_heads=2, head_size=4, num_experts=4, dtype="float32",
    ),
)  # fmt: skip


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
                both = change(f"{key}.weight", w.weight), change(f"{key}.scales", w.scales)
                new[module][name] = QuantizedTensor(*both)
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
        return jnp.asarray(w, jnp.float32 if specs[module][name].float32 else config.dtype)

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


@pytest.mark.parametrize("config", [GROK, MIXED], ids=["grok", "mixed"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_says_what_the_resident_model_says(tmp_path, config, kind):
    """Prompts with padding, eight cached steps, texts at once; and matrices
    that lie the other way round.
    """
    resident, model = both(tmp_path, config, kind)
    want = steps(resident)
    assert want.std() > 0.1
    np.testing.assert_allclose(steps(model), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole(model), whole(resident), rtol=0, atol=1e-5)
    turned = each_array(random_tensors(config, kind), transpose)
    turned = StreamedModel(config, turned)
    np.testing.assert_allclose(steps(turned), want, rtol=0, atol=1e-5)
    for each, lies in ((model, False), (turned, True)):
        key = each.store.fetch("decoder_layer/multi_head_attention/key", "w", 0)
        assert isinstance(key, Mapped) and key.transposed == lies
