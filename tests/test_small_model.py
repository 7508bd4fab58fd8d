"""The trained model inside the package: small, whole, and trained."""

import json
import math
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.checkpoints import small_model
from annotated_moe.config import place_of
from annotated_moe.model import apply_layer, embed, flat_specs, layer_weights
from annotated_moe.moe import Router
from annotated_moe.quantization import QuantizedTensor

PROSE = """And he said unto them, Go ye into all the city, and speak unto the
people that are in the house of the LORD. And it came to pass in the morning,
that the king rose up, and the servants of the king went out to meet him."""
CODE = '''def read(self, size=None):
    """Read at most size bytes from the file."""
    if self.closed:
        raise ValueError("read of closed file")
    return self._buffer[:size]
'''


@pytest.fixture(scope="module")
def model():
    return am.load(dtype="float32")


def loss(model, text):
    tokens = np.array([model.tokenizer.encode(text)])
    logits = jax.nn.log_softmax(model.logits(tokens)[:, :-1])
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
    return -float(picked.mean())


def test_fits_in_eight_megabytes():
    size = sum(p.stat().st_size for p in Path(small_model()).iterdir())
    assert size <= 8e6


def test_is_grok_shaped_and_quantized(model):
    ours, big = model.config.layer(0), am.PRESETS["grok-1"].layer(0)
    assert model.config.tied and len(model.config.layers) == 1
    assert ours.post_norm and ours.norm_eps == big.norm_eps
    for part, names in {
        "attention": ("softcap", "rope", "mask", "bias", "value_size"),
        "feed_forward": ("num_experts", "top_k", "activation", "router"),
    }.items():
        for name in names:
            mine, theirs = (getattr(getattr(x, part), name) for x in (ours, big))
            assert mine == theirs, name
    for (module, name), spec in flat_specs(model.config).items():
        w = model.params[module][name]
        assert isinstance(w, QuantizedTensor) == spec.matrix, module


@pytest.mark.parametrize("text", [PROSE, CODE], ids=["prose", "code"])
def test_predicts_text_far_better_than_chance(model, text):
    chance = math.log(model.config.vocab_size)
    assert loss(model, text) < 0.55 * chance
    words = np.array(text.split())
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert loss(model, text) < loss(model, shuffled) - 0.5


def test_training_log_belongs_to_the_model(model):
    log = json.loads((Path(small_model()) / "training.json").read_text())
    first, last = log["validation"][0], log["validation"][-1]
    assert log["curve"][0]["nll"] > 6 and last["step"] == log["steps"]
    assert last["bits_per_byte"] < first["bits_per_byte"] - 0.2
    assert list(log["held_out"]) == ["prose", "plays", "code", "dictionary", "sums"]
    for part in log["held_out"].values():
        assert abs(part["loss_int8"] / part["loss"] - 1) < 0.005
    # What the log says of all held-out texts, a sample of them says too.
    for name, texts in held_out().items():
        said = log["held_out"][name]["loss"]
        assert abs(mean_loss(model, texts) / said - 1) < 0.3, name


def held_out():
    return json.loads((Path(small_model()) / "held_out.json").read_text())


def mean_loss(model, texts):
    ids = [model.tokenizer.encode(text, add_eos=True)[:256] for text in texts]
    count = [len(row) - 1 for row in ids]
    rows = np.zeros((len(ids), 256), int)
    for row, own in zip(rows, ids):
        row[: len(own)] = own
    logits = jax.nn.log_softmax(model.logits(rows, np.array([len(i) for i in ids])))
    picked = jnp.take_along_axis(logits[:, :-1], jnp.array(rows)[:, 1:, None], -1)
    return -sum(float(p[:n].sum()) for p, n in zip(picked, count)) / sum(count)


def test_routing_is_what_the_routers_chose(model):
    """Seven moments of training; the last are almost those of int8 weights."""
    path = Path(small_model()) / "routing.npz"
    with np.load(path, allow_pickle=False) as file:
        kept = dict(file)
    c, m = len(kept["steps"]), len(kept["tokens"])
    assert c == len(kept["share"]) and kept["share"][-1] == 1
    assert kept["experts"].shape == kept["gates"].shape == (c, 4, m, 2)
    assert kept["experts"].max() < 8 and path.stat().st_size < 400_000
    for d, name in enumerate(kept["names"]):
        own = kept["tokens"][kept["domain"] == d]
        texts = held_out()[name]
        ids = [i for t in texts for i in model.tokenizer.encode(t, add_eos=True)]
        assert own.tolist() == ids[: len(own)], name
    assert np.all(kept["gates"][..., 0] >= kept["gates"][..., 1])
    small = kept["tokens"].reshape(-1, 256)[::2]
    asked = experts_of(model, small).reshape(4, 5, 256, 2)
    saved = kept["experts"][-1].reshape(4, 5, 2, 256, 2)[:, :, 0]
    assert (asked == saved).mean() > 0.95


def experts_of(model, rows):
    """int [L, N, A], by listening at every router."""
    found = []

    def listen(call, args, options, context):
        out = call(*args, **options)
        if isinstance(context.module, Router) and out is not None:
            found.append(np.asarray(out.experts))
        return out

    config, (b, t) = model.config, rows.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    h = embed(model.params["in_out_embed"]["embeddings"], jnp.array(rows), config)
    with hk.intercept_methods(listen):
        for i in range(config.num_layers):
            place, index = place_of(config, i)
            own = layer_weights(model.params, place, config, index)
            h, _, _ = apply_layer(
                own, place, config, h, positions, jnp.ones((b, t), bool)
            )
    return np.stack(found)


def test_one_token_judges_and_every_digit_is_one(model):
    encode = model.tokenizer.encode
    for word in (" right", " wrong"):
        assert len(encode(f"1{word}")) == len(encode("1")) + 1
    assert len(encode("1234567890")) == 11      # and the space before it
