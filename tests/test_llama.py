"""Llama against the published formulas, written out in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from annotated_moe.attention import Attention, AttentionSpec
from annotated_moe.config import Segment
from annotated_moe.families.llama import LLAMAS, llama_config
from annotated_moe.model import all_logits, param_specs
from annotated_moe.moe import swiglu
from annotated_moe.plan import parameter_counts
from annotated_moe.rope import (
    Llama3Rope,
    Rope,
    rope_angles,
    scale_rope_frequencies,
)

# What the published formulas need, in one place.
SIZES = SimpleNamespace(
    vocab_size=64, d_model=32, d_ff=80, num_layers=2, q_heads=4, kv_heads=2,
    head_size=16, rope_base=500000.0, rope_scaling=(8.0, 1.0, 4.0, 32), norm_eps=1e-5,
)
TOY = replace(
    llama_config(
        2, 4, 2, 80, 16, vocab_size=64, context=48, d_model=32,
        rope=Llama3Rope(500000.0, 8.0, 1.0, 4.0, 32),
    ),
    dtype="float32",
)


def varied(attention=None, network=None, layer=None, **whole):
    """TOY with other fields of its attention, its network, its layers, itself."""
    old = TOY.layer(0)
    spec = replace(
        old,
        attention=replace(old.attention, **attention or {}),
        feed_forward=replace(old.feed_forward, **network or {}),
        **layer or {},
    )
    return replace(TOY, layers=(Segment((spec,), TOY.num_layers),), **whole)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def published_rates(size, base, scaling=None):
    """Meta's `precompute_freqs_cis` and `apply_scaling`, hand by hand."""
    rates = [base ** -(2 * i / size) for i in range(size // 2)]
    if scaling is None:
        return np.array(rates)
    factor, low, high, context = scaling
    changed = []
    for rate in rates:
        length = 2 * math.pi / rate
        if length < context / high:
            changed.append(rate)
        elif length > context / low:
            changed.append(rate / factor)
        else:
            smooth = (context / length - low) / (high - low)
            changed.append((1 - smooth) * rate / factor + smooth * rate)
    return np.array(changed)


def published_attention(x, w, c):
    """Complex turns of neighbouring features, keys and values repeated."""

    def heads(name):
        return (x @ w[name]).reshape(len(x), -1, c.head_size)

    def turn(y):
        rates = published_rates(c.head_size, c.rope_base, c.rope_scaling)
        turns = np.exp(1j * np.outer(np.arange(len(x)), rates))[:, None]
        pairs = np.ascontiguousarray(y).view(np.complex128)
        return (pairs * turns).view(np.float64)

    repeat = c.q_heads // c.kv_heads
    q, k = turn(heads("query")), turn(heads("key"))
    k, v = np.repeat(k, repeat, 1), np.repeat(heads("value"), repeat, 1)
    s = np.einsum("tqh,sqh->qts", q, k) / c.head_size**0.5
    s = np.where(np.tri(len(x), dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("qts,sqh->tqh", p, v).reshape(len(x), -1) @ w["linear"]


def published_llama(tokens, weights, layers, c):
    """Pre-norm blocks of attention and SwiGLU; a head of its own."""

    def norm(h, scale):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    h = weights["embedding"][tokens]
    for w in layers:
        h = h + published_attention(norm(h, w["norm"]), w, c)
        x = norm(h, w["norm_2"])
        gate = x @ w["gate"]
        h = h + (gate * sigmoid(gate) * (x @ w["up"])) @ w["down"]
    return norm(h, weights["norm"]) @ weights["head"].T


def halves(w, size):
    """Columns of each head: the even features, then the odd ones."""
    shuffle = np.r_[0:size:2, 1:size:2]
    return w.reshape(len(w), -1, size)[..., shuffle].reshape(w.shape)


def random_weights(c, seed=0):
    rng = np.random.default_rng(seed)
    wide, narrow = c.q_heads * c.head_size, c.kv_heads * c.head_size
    shapes = {
        "query": (c.d_model, wide),
        "key": (c.d_model, narrow),
        "value": (c.d_model, narrow),
        "linear": (wide, c.d_model),
        "gate": (c.d_model, c.d_ff),
        "up": (c.d_model, c.d_ff),
        "down": (c.d_ff, c.d_model),
    }

    def normal(*shape):
        return rng.normal(size=shape) * 1.5 / shape[0] ** 0.5

    layers = [
        {name: normal(*shape) for name, shape in shapes.items()}
        | {name: rng.uniform(0.5, 2, c.d_model) for name in ("norm", "norm_2")}
        for _ in range(c.num_layers)
    ]
    ends = {"head": 0.5 * rng.normal(size=(c.vocab_size, c.d_model))}
    # Small rows, so that the epsilon of the first norm is felt.
    ends["embedding"] = 0.02 * rng.normal(size=(c.vocab_size, c.d_model))
    ends["norm"] = rng.uniform(0.5, 2, c.d_model)
    return ends, layers


def as_ours(ends, layers, c):
    """The same weights under our paths, queries and keys shuffled."""
    paths = {
        "norm": "decoder_layer/rms_norm/scale",
        "norm_2": "decoder_layer/rms_norm_2/scale",
        "gate": "decoder_layer/linear/w",
        "up": "decoder_layer/linear_v/w",
        "down": "decoder_layer/linear_1/w",
    }
    for name in ("query", "key", "value", "linear"):
        paths[name] = f"decoder_layer/multi_head_attention/{name}/w"
    flat = {
        "in_out_embed/embeddings": ends["embedding"],
        "lm_head/embeddings": ends["head"],
        "rms_norm/scale": ends["norm"],
    }
    for name, path in paths.items():
        shuffled = name in ("query", "key")
        flat[path] = np.stack(
            [halves(w[name], c.head_size) if shuffled else w[name] for w in layers]
        )
    # What only a variant with norms after its sublayers asks for.
    for name in ("rms_norm_1", "rms_norm_3"):
        flat[f"decoder_layer/{name}/scale"] = np.ones((c.num_layers, c.d_model))
    params = {}
    for path, w in flat.items():
        module, name = path.rsplit("/", 1)
        params.setdefault(module, {})[name] = jnp.asarray(w, jnp.float32)
    return params


@pytest.fixture(scope="module")
def case():
    ends, layers = random_weights(SIZES)
    tokens = np.random.default_rng(1).integers(0, TOY.vocab_size, 40)
    expected = published_llama(tokens, ends, layers, SIZES)
    return as_ours(ends, layers, SIZES), jnp.asarray(tokens[None], jnp.int32), expected


def logits(params, tokens, config):
    own = {module: params[module] for module in param_specs(config)}
    return all_logits(own, tokens, config)[0]


def test_the_paths_are_those_of_the_model():
    ours = as_ours(*random_weights(SIZES), SIZES)
    made = param_specs(varied(layer={"post_norm": True}))
    shapes = {m: {n: w.shape for n, w in leaves.items()} for m, leaves in ours.items()}
    assert shapes == {
        m: {n: spec.shape for n, spec in leaves.items()} for m, leaves in made.items()
    }


def test_matches_the_published_model(case):
    params, tokens, expected = case
    assert expected.std() > 1
    np.testing.assert_allclose(logits(params, tokens, TOY), expected, atol=1e-4)


VARIANTS = {
    "post_norm": varied(layer={"post_norm": True}),
    "activation": varied(network={"activation": "gelu"}),
    "tied": varied(tied=True),
    "last norm_eps": varied(norm_eps=1e-4),
    "norm_eps": varied(layer={"norm_eps": 1e-6}),
    "rope base": varied(attention={"rope": Llama3Rope(1e4, 8.0, 1.0, 4.0, 32)}),
    "rope scaling": varied(attention={"rope": Rope(500000.0)}),
    "softcap": varied(attention={"softcap": 30.0}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_matters(case, name):
    params, tokens, expected = case
    got = logits(params, tokens, VARIANTS[name])
    assert np.abs(got - expected).max() > (1e-5 if "last" in name else 1e-3)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_complex_attention_equals_halves_after_a_shuffle(kv_heads):
    c = SimpleNamespace(**vars(SIZES) | {
        "kv_heads": kv_heads, "rope_scaling": None, "rope_base": 10000.0})
    _, (w, _) = random_weights(c, seed=kv_heads)
    x = np.random.default_rng(2).normal(size=(30, c.d_model))
    expected = published_attention(x, w, c)

    @hk.without_apply_rng
    @hk.transform
    def attention(x, positions):
        layer = Attention(AttentionSpec(4, kv_heads, 16, 0.25))
        return layer(x, positions)[0]

    apply = jax.jit(attention.apply)

    def ours(*shuffled):
        tree = {
            f"multi_head_attention/{name}": {
                "w": jnp.float32(halves(w[name], 16) if name in shuffled else w[name])
            }
            for name in ("query", "key", "value", "linear")
        }
        return apply(tree, jnp.float32(x)[None], jnp.arange(30)[None])[0]

    np.testing.assert_allclose(ours("query", "key"), expected, atol=1e-5)
    assert np.abs(ours() - expected).max() > 0.1


def test_swiglu_in_float64_and_rounded_once():
    gate, up = np.random.default_rng(3).normal(size=(2, 5, 200)) * 4
    exact = gate * sigmoid(gate) * up
    gate, up = jnp.float32(gate), jnp.float32(up)
    np.testing.assert_allclose(swiglu(gate, up, jnp.float32), exact, atol=1e-5)
    rounded = swiglu(gate, up, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    once = swiglu(gate, up, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded, once)


SCALINGS = [
    (8.0, 1.0, 4.0, 8192),
    (32.0, 1.0, 4.0, 8192),
    (16.0, 1.0, 1.0, 8192),
    (4.0, 1e9, 1e9, 256),
    (2.0, 0.5, 8.0, 100),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("size, base", [(128, 500000.0), (64, 500000.0), (16, 1e4)])
def test_frequencies_scaled_as_published(scaling, size, base):
    rates = rope_angles(jnp.array([[1]]), size, base)[0, 0]
    slower = scale_rope_frequencies(rates, *scaling)
    exact = published_rates(size, base, scaling)
    assert slower.dtype == jnp.float32
    np.testing.assert_allclose(slower, exact, rtol=2e-5)
    assert (slower <= rates).all() and (slower >= rates / scaling[0] * 0.9999).all()


def test_limits_in_the_wrong_order_are_one_clear_error():
    with pytest.raises(ValueError, match="rope_scaling: high 1.0 below low 4.0"):
        scale_rope_frequencies(jnp.ones(4), 8.0, 4.0, 1.0, 8192)
    with pytest.raises(ValueError, match="rope_scaling: high 1.0 below low 4.0"):
        Llama3Rope(500000.0, 8.0, 4.0, 1.0, 8192)


# As Meta's papers, model cards and files count them.
PUBLISHED = {
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-33b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "code-llama-7b": 6_738_546_688,
    "code-llama-13b": 13_016_028_160,
    "code-llama-34b": 33_743_970_304,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}


def test_presets_are_the_published_sizes():
    assert list(LLAMAS) == list(PUBLISHED)
    for name, c in LLAMAS.items():
        attention = c.layer(0).attention
        assert parameter_counts(c) == (PUBLISHED[name],) * 2, name
        assert c.d_model == attention.q_heads * attention.head_size
        assert attention.multiplier == attention.head_size**-0.5
        assert c.tied == name.startswith("llama-3.2")
        old = "-3" not in name.removesuffix("34b").replace("-33b", "")
        assert c.eos_ids == (2,) if old else 128001 in c.eos_ids
        # Published: 1e-6 for Llama 1, but 1e-5 for its largest.
        fine = name.startswith("llama-1") and name != "llama-1-65b"
        assert c.norm_eps == c.layer(0).norm_eps == (1e-6 if fine else 1e-5)


ROPES = {
    "llama-1": (Rope(1e4), 2048),
    "llama-2": (Rope(1e4), 4096),
    "code-llama": (Rope(1e6), 16384),
    "llama-3": (Rope(5e5), 8192),
    "llama-3.1": (Llama3Rope(5e5, 8.0, 1.0, 4.0, 8192), 131072),
    "llama-3.2": (Llama3Rope(5e5, 32.0, 1.0, 4.0, 8192), 131072),
    "llama-3.3": (Llama3Rope(5e5, 8.0, 1.0, 4.0, 8192), 131072),
}


def test_presets_scale_what_they_were_trained_to_scale():
    for name, c in LLAMAS.items():
        generation = name.rsplit("-", 1)[0]
        assert (c.layer(0).attention.rope, c.context) == ROPES[generation], name
