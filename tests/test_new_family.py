"""A family that the package does not know, defined in this file alone.

Attention with a sink a head and a value head size of its own, a sigmoid
router with a selection bias, experts with biases, a table of names. It
runs cached, on a mesh, quantized, from disk, there and back, planned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe.attention import (
    MASK_VALUE,
    Attention,
    AttentionSpec,
    attention_scores,
)
from annotated_moe.checkpoints import quantize_params
from annotated_moe.config import LayerSpec, ModelConfig, Segment
from annotated_moe.convert import convert
from annotated_moe.formats.hub import (
    ENDS,
    FAMILIES,
    Family,
    Fields,
    WeightName,
)
from annotated_moe.linear import matmul
from annotated_moe.model import init_cache, init_params
from annotated_moe.moe import MoE, MoESpec, Route
from annotated_moe.params import get_parameter
from annotated_moe.placement import here
from annotated_moe.plan import abstract_params, make_plan


@dataclass(frozen=True)
class HeadSinkSpec(AttentionSpec):
    def build(self) -> "SinkAttention":
        return SinkAttention(self)


class SinkAttention(Attention):
    """Each head may look at nothing, by a learned score."""

    @hk.transparent
    def per_head(self) -> dict[str, Any]:
        shape = (self.spec.q_heads,)
        init = hk.initializers.RandomNormal()
        return {"sinks": get_parameter("sinks", shape, ("heads",), init)}

    def attend(
        self, q: Any, k: Any, v: Any, positions: Any, key_positions: Any, *, sinks: Any
    ) -> Any:
        s = attention_scores(q, k, self.spec.multiplier)
        seen = self.spec.mask.sees(positions[..., None], key_positions[:, None])
        s = jnp.where(seen[:, None, None], s, MASK_VALUE)
        b, kv, r, t, _ = s.shape
        nothing = jnp.broadcast_to(
            sinks.astype(jnp.float32).reshape(1, kv, r, 1, 1), (b, kv, r, t, 1)
        )
        p = jax.nn.softmax(jnp.concatenate([s, nothing], -1), -1)[..., :-1]
        y = jnp.einsum("bkrts,bskh->btkrh", p.astype(v.dtype), v)
        return y.reshape(b, t, kv * r, -1).astype(q.dtype)


@dataclass(frozen=True)
class BiasedSpec(MoESpec):
    def build(self) -> "BiasedMoE":
        return BiasedMoE(self)


class BiasedRouter(hk.Module):
    def __init__(self, spec: MoESpec) -> None:
        super().__init__(name="router")
        self.spec = spec

    def __call__(self, x: Any) -> Route:
        d, e = x.shape[-1], self.spec.num_experts
        init = hk.initializers.RandomNormal(d**-0.5)
        w = get_parameter("w", (d, e), ("embed", None), init, float32=True)
        init = hk.initializers.RandomNormal(0.3)
        bias = get_parameter("bias", (e,), (None,), init, float32=True)
        logits = x.astype(jnp.float32) @ w
        scores = jax.nn.sigmoid(logits)
        _, experts = jax.lax.top_k(scores + bias, self.spec.top_k)
        gates = jnp.take_along_axis(scores, experts, axis=-1)
        return Route(scores, gates, experts, logits)


class BiasedMoE(MoE):
    @hk.transparent
    def route(self, x: Any, real: Any = None) -> Route:
        return BiasedRouter(self.spec)(x)

    def parameters(self, d: int) -> Any:
        f = self.spec.width
        return super().parameters(d) | {
            "linear/b": ((f,), ("mlp",)),
            "linear_v/b": ((f,), ("mlp",)),
            "linear_1/b": ((d,), ("embed",)),
        }

    def expert(self, x: Any, gates: Any, w: Any) -> Any:
        into, back = ("embed", "mlp"), ("mlp", "embed")
        gate = matmul(x, w["linear"], into) + w["linear/b"]
        up = matmul(x, w["linear_v"], into) + w["linear_v/b"]
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        y = matmul(hidden, w["linear_1"], back, summed=False)
        y += here().once(w["linear_1/b"], "mlp")
        return y * gates[:, None]


def new_config() -> ModelConfig:
    attention = HeadSinkSpec(4, 2, 16, 0.25, value_size=24)
    layer = LayerSpec(attention, BiasedSpec(8, 2, 48, "silu"))
    return ModelConfig(
        64, 128, 32, (Segment((layer,), 3),), eos_ids=(1,), dtype="float32"
    )


class NewFamily(Family):
    model_type = "new"
    ends = ENDS

    def layer(self, spec: LayerSpec) -> tuple[WeightName, ...]:
        each = [
            WeightName(f"attn.{n}.weight", f"multi_head_attention/{n}/w", "transpose")
            for n in ("query", "key", "value", "linear")
        ]
        for n in ("linear", "linear_v", "linear_1"):
            each += [
                WeightName(f"mlp.{{expert}}.{n}.weight", f"moe/{n}/w", "transpose"),
                WeightName(f"mlp.{{expert}}.{n}.bias", f"moe/{n}/b"),
            ]
        return (
            WeightName("norm_1.weight", "rms_norm/scale"),
            WeightName("norm_2.weight", "rms_norm_2/scale"),
            WeightName("attn.sinks", "multi_head_attention/sinks"),
            WeightName("router.weight", "router/w", "transpose"),
            WeightName("router.bias", "router/bias"),
            *each,
        )

    def read(self, fields: Fields) -> ModelConfig:
        fields.only("width", 32)
        return new_config()

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config != new_config():
            raise ValueError("another model")
        return {"width": 32}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    FAMILIES["NewForCausalLM"] = NewFamily()
    yield
    del FAMILIES["NewForCausalLM"]


@pytest.fixture(scope="module")
def model() -> am.Model:
    config = new_config()
    params: Any = init_params(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    for leaves in params.values():
        if "b" in leaves:
            shape = leaves["b"].shape
            leaves["b"] = jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.1
    return am.Model(config, params)


IDS = np.random.default_rng(1).integers(2, 64, (2, 12))


def cached_logits(model: am.Model) -> np.ndarray:
    session = am.Session(model, 2, 16)
    out = [session.prefill(IDS[:, :4].tolist())]
    out += [session.step(IDS[:, t]) for t in range(4, 12)]
    return np.stack([np.asarray(y) for y in out], 1)


def test_the_sinks_and_biases_count(model: am.Model) -> None:
    params = jax.tree.map(lambda w: w, dict(model.params))
    y = np.asarray(model.logits(IDS))
    for path, leaf in (
        ("decoder_layer/multi_head_attention", "sinks"),
        ("decoder_layer/router", "bias"),
        ("decoder_layer/moe/linear_1", "b"),
    ):
        w = params[path][leaf]
        w = w + jnp.arange(w.size).reshape(w.shape)
        changed = params | {path: {**params[path], leaf: w}}
        other = am.Model(model.config, changed)
        assert np.abs(np.asarray(other.logits(IDS)) - y).max() > 1e-3


def test_cached(model: am.Model) -> None:
    whole = np.asarray(model.logits(IDS))
    np.testing.assert_allclose(cached_logits(model), whole[:, 3:], atol=1e-5)


def test_there_and_back_and_sharded(model: am.Model, tmp_path: Path) -> None:
    am.save(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "native")
    names = ["model.safetensors", "config.json", "checksums.json"]
    for name in names:
        first = (tmp_path / "native" / name).read_bytes()
        assert first == (tmp_path / "again" / name).read_bytes(), name
    y = np.asarray(model.logits(IDS))
    mesh = am.make_mesh(data=1, expert=2, model=2)
    for folder in ("native", "hf"):
        sharded = am.load(tmp_path / folder, mesh=mesh, dtype="float32")
        np.testing.assert_allclose(np.asarray(sharded.logits(IDS)), y, atol=1e-5)
        np.testing.assert_allclose(cached_logits(sharded), y[:, 3:], atol=1e-5)


def test_quantized(model: am.Model, tmp_path: Path) -> None:
    small = am.Model(model.config, quantize_params(model.params, model.config))
    y = np.asarray(model.logits(IDS))
    z = np.asarray(small.logits(IDS))
    assert 0 < np.abs(z - y).mean() < 0.05 * y.std()
    am.save(small, tmp_path / "eight")
    again = am.load(tmp_path / "eight", dtype="float32")
    np.testing.assert_allclose(np.asarray(again.logits(IDS)), z, atol=1e-5)


def test_streamed(model: am.Model, tmp_path: Path) -> None:
    am.save(model, tmp_path / "native")
    streamed = am.load(tmp_path / "native", dtype="float32", stream=True)
    y = np.asarray(model.logits(IDS))
    np.testing.assert_allclose(np.asarray(streamed.logits(IDS)), y, atol=1e-5)
    np.testing.assert_allclose(cached_logits(streamed), y[:, 3:], atol=1e-5)


def bytes_of_device_0(tree: Any) -> int:
    shards = [s for w in jax.tree.leaves(tree) for s in w.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device.id == 0)


def test_planned(model: am.Model, tmp_path: Path) -> None:
    """A plan says what a device then holds of weights and cache."""
    am.save(model, tmp_path / "native")
    mesh = am.make_mesh(data=1, expert=2, model=2)
    placed = am.load(tmp_path / "native", mesh=mesh, dtype="float32")
    config = placed.config
    plan = make_plan("new", config, abstract_params(config), mesh, "h100", 2, 16)
    assert plan.parameters == sum(w.size for w in jax.tree.leaves(model.params))
    assert plan.weights == bytes_of_device_0(placed.params)
    with jax.set_mesh(mesh):
        (cache,) = init_cache(config, 2, 16).places
    assert plan.cache == bytes_of_device_0([cache.k, cache.v])
    assert 0 < plan.needs["experts"] < plan.weights
