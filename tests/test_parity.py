"""Tiny random models of `transformers`, and what they compute.

Needs the extra `parity` (torch and transformers), which CI installs.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import model as M
from annotated_moe.attention import AttentionSpec, Causal
from annotated_moe.config import as_segments
from annotated_moe.generate import pad_rows
from annotated_moe.rope import Rope

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
tf = pytest.importorskip("transformers", reason="needs the extra `parity`")

ATOL = 1e-4                                    # of logits, in float32
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LLAMA4 = {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 8,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "attn_temperature_tuning": True,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "no_rope_layer_interval": 4,
    "rope_parameters": LLAMA3,
}
CASES = {
    "llama": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", {**EXPERTS, "sliding_window": 5}),
    "qwen3": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 12,
        },
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 1.0},
    ),
    "llama4": ("Llama4ForCausalLM", LLAMA4),
}


def in_layers(config, change):
    """A model with `change` of each of its layers' specs."""
    layers = [change(config.layer(i)) for i in range(config.num_layers)]
    return replace(config, layers=as_segments(layers))


def in_part(part, **fields):
    """`fields` of the parts that have them: attention or feed_forward."""
    def change(layer):
        old = getattr(layer, part)
        own = {n: v for n, v in fields.items() if hasattr(old, n)}
        return replace(layer, **{part: replace(old, **own)})

    return partial(in_layers, change=change)


def without_norms(config):
    """Attention that norms no queries and keys, and clips nothing."""
    def change(layer):
        a = layer.attention
        plain = AttentionSpec(
            a.q_heads, a.kv_heads, a.head_size, a.multiplier, rope=a.rope,
            mask=a.mask, bias=a.bias,
        )
        return replace(layer, attention=plain)

    return in_layers(config, change)


def everywhere_rope(config):
    """RoPE in the layers that have none, as in the others."""
    rope = config.layer(0).attention.rope
    return in_part("attention", rope=rope)(config)


attention, network = partial(in_part, "attention"), partial(in_part, "feed_forward")
OLD_ROUTER = network(router="softmax_top_k")
# What each model is without one thing that it has.
SWITCHES = {
    "llama": {
        "bias of attention": attention(bias=False),
        "bias of the network": network(bias=False),
        "slower RoPE": attention(rope=Rope(10000.0)),
        "activation": network(activation="gelu"),
        "base of RoPE": attention(rope=Rope(500.0)),
        "eps": partial(in_layers, change=partial(replace, norm_eps=0.1)),
        "eps of the last norm": partial(replace, norm_eps=0.1),
        "output matrix": partial(replace, tied=True),
    },
    "mistral": {"window": attention(mask=Causal())},
    "mixtral": {"window": attention(mask=Causal()), "router": OLD_ROUTER},
    "qwen3": {"norms": without_norms, "router": OLD_ROUTER},
    "olmoe": {
        "norms": without_norms,
        "whole norms' eps": attention(norm_eps=10.0),
        "clip": attention(clip=None),
        "router": network(router="top_k_softmax"),
    },
    "llama4": {
        "chunks": attention(mask=Causal()),
        "temperature": attention(floor=None),
        "layers without RoPE": everywhere_rope,
        "norms": attention(qk_norm_eps=None),
        "router": OLD_ROUTER,
        "gates on what is read": network(gate_input=False),
        "slower RoPE": attention(rope=Rope(10000.0)),
    },
}


class Reference:
    """A model of theirs on disk, ours loaded from it, and tokens."""

    def __init__(self, name, folder):
        architecture, options = CASES[name]
        torch.manual_seed(7)
        made = getattr(tf, architecture)
        config = made.config_class(**{**SIZES, **options})
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        self.theirs = made(config).eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.theirs.save_pretrained(folder)
        self.ours = am.load(folder, dtype="float32")
        rng = np.random.default_rng(3)
        self.tokens = rng.integers(3, 96, (2, 20)).astype(np.int32)

    def logits(self, tokens, **options):
        with torch.no_grad():
            ids = torch.tensor(tokens, dtype=torch.long)
            return self.theirs(ids, **options).logits.numpy()


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    name = request.param
    return name, Reference(name, tmp_path_factory.mktemp(name))


def test_logits(case):
    name, pair = case
    want = pair.logits(pair.tokens)
    np.testing.assert_allclose(pair.ours.logits(pair.tokens), want, atol=ATOL)
    assert want.std() > 0.5


@pytest.fixture
def optimized():
    """Programs compiled as a user's are, and as those of other tests are not."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    jax.clear_caches()
    yield
    jax.config.update(name, before)
    jax.clear_caches()


OTHERS = [pytest.param(n, marks=pytest.mark.full) for n in CASES if n != "qwen3"]


@pytest.mark.parametrize("case", ["qwen3", *OTHERS], indirect=True)
def test_with_the_compiler_s_optimizations(case, optimized):
    """Logits, and steps on a cache, of programs that nobody hurried."""
    test_logits(case)
    test_cached_steps_and_greedy_tokens(case)


def test_cached_steps_and_greedy_tokens(case):
    name, pair = case
    want = pair.logits(pair.tokens)
    lengths = np.array([9, 12], np.int32)
    rows = [list(map(int, row[:n])) for row, n in zip(pair.tokens, lengths)]
    cache = M.init_cache(pair.ours.config, 2, 32)
    prompt = pad_rows(rows, 16)
    logits, cache = pair.ours.prefill(prompt, lengths, cache)
    at = np.arange(2)
    for step in range(8):
        np.testing.assert_allclose(logits, want[at, lengths + step - 1], atol=ATOL)
        new = jnp.asarray(pair.tokens[at, lengths + step])
        logits, cache = pair.ours.decode_step(new, cache)
    for row, new in zip(rows, pair.ours.generate_ids(rows, 4)):
        for token in new:
            best = pair.logits([row])[0, -1]
            assert token == best.argmax()
            row.append(token)


def test_padding_on_either_side(case):
    name, pair = case
    mask = np.ones((2, 20), bool)
    mask[0, :6] = mask[1, 15:] = False
    ours = pair.ours.logits(pair.tokens, mask=mask)
    for row, seen in enumerate(mask):
        alone = pair.logits(pair.tokens[row : row + 1, seen])
        np.testing.assert_allclose(ours[row, seen], alone[0], atol=ATOL)
    assert not ours[~mask].any()


def logits_of(config, params, tokens):
    """Of a configuration that may have fewer parameters than there are."""
    own = {
        module: {name: params[module][name] for name in leaves}
        for module, leaves in M.param_specs(config).items()
    }
    return np.asarray(M.all_logits(own, jnp.asarray(tokens), config))


def test_no_switch_is_decoration(case):
    name, pair = case
    want = pair.logits(pair.tokens)
    for switch, off in SWITCHES[name].items():
        config = off(pair.ours.config)
        assert config != pair.ours.config, switch
        apart = np.abs(logits_of(config, pair.ours.params, pair.tokens) - want)
        assert apart.max() > 10 * ATOL, (switch, apart.max())


def test_no_expert_is_decoration(case):
    """Neither those that a router picks nor the one that is always there."""
    name, pair = case
    kinds = {"llama4": ["/moe/", "/shared/"], "llama": [], "mistral": []}
    want = pair.logits(pair.tokens)
    for kind in kinds.get(name, ["/moe/"]):
        params = {
            module: jax.tree.map(jnp.zeros_like, leaves)
            if kind in f"{module}/" else leaves
            for module, leaves in pair.ours.params.items()
        }
        off = logits_of(pair.ours.config, params, pair.tokens)
        assert np.abs(off - want).max() > 10 * ATOL, kind
