"""The trained model inside the package: small, whole, and trained."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.checkpoints import small_model
from annotated_moe.model import flat_specs
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
    assert log["curve"][0]["nll"] > 7 > 3.5 > log["curve"][-1]["nll"]
    for part in ("prose", "code"):
        assert abs(log[f"loss_{part}"] - log[f"loss_{part}_int8"]) < 0.01
