"""Decoding and prefill, against the published formulation of the same model.

    python benchmarks/decode.py [--rounds 9] [--tokens 16]

Grok-1's shape at width 512: 8 layers, 8 experts of which 2 are active, eight-bit
weights drawn at random. `published` is the released formulation written in
today's JAX: each token repeated once for each of its experts, every expert on
every repeated token and the wanted one picked by a one-hot mask, whole weights
dequantized in every step, layers one after another in the program. Both run
compiled, on the same weights, in turns. First they must agree on the logits.
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from annotated_moe.checkpoints import groups_for
from annotated_moe.config import ModelConfig
from annotated_moe.families.grok import grok_config
from annotated_moe.model import decode_step, init_cache, param_specs, prefill
from annotated_moe.params import ParamSpec
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.rope import rope
from annotated_moe.sampling import greedy
from annotated_moe.turned import SMALLEST, turn


@dataclass(frozen=True)
class Sizes:
    """What the published formulation asks of a model."""

    vocab_size: int = 8192
    context: int = 256
    d_model: int = 512
    d_ff: int = 1792
    num_layers: int = 8
    q_heads: int = 8
    kv_heads: int = 2
    head_size: int = 64
    num_experts: int = 8
    top_k: int = 2
    embedding_multiplier: float = 512**0.5
    output_multiplier: float = 3**-0.5
    attn_multiplier: float = 64**-0.5
    rope_base: float = 10000.0
    dtype: str = "bfloat16"


SIZES = Sizes()


def config_of(sizes: Sizes) -> ModelConfig:
    return grok_config(**asdict(sizes))


CONFIG = config_of(SIZES)
PROMPT = 128


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Quantized like the release: eight groups where its shards split the input."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> Any:
        if spec.matrix:
            weight = rng.integers(-127, 128, spec.shape, np.int8)
            scale = 3**0.5 / 127 / spec.shape[-2] ** 0.5
            shape = (*spec.shape[:-2], groups_for(spec), spec.shape[-1])
            return QuantizedTensor(
                jnp.asarray(weight), jnp.full(shape, scale, jnp.bfloat16)
            )
        if spec.axes[-1] is None and "embed" not in spec.axes:
            return jnp.ones(spec.shape)                 # a norm's gain
        x = rng.standard_normal(spec.shape, np.float32) / config.d_model**0.5
        return jnp.asarray(x, jnp.float32 if spec.float32 else config.dtype)

    return {
        module: {name: draw(spec) for name, spec in leaves.items()}
        for module, leaves in param_specs(config).items()
    }


def unstack(params: dict[str, dict[str, Any]], config: ModelConfig) -> dict[str, Any]:
    """The release keeps a parameter a layer, not one stack of all layers."""
    layers = []
    for i in range(config.num_layers):
        layer = {}
        for module, leaves in params.items():
            if module.startswith("decoder_layer/"):
                short = module.removeprefix("decoder_layer/")
                for name, w in leaves.items():
                    layer[f"{short}/{name}"] = jax.tree.map(lambda a: a[i], w)  # noqa: B023
        layers.append(layer)
    return {
        "layers": layers,
        "table": params["in_out_embed"]["embeddings"],
        "norm": params["rms_norm"]["scale"],
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-5)
    return (scale * y).astype(x.dtype)


def whole(q: QuantizedTensor, dtype: Any) -> jax.Array:
    """All of a weight, int8 times scale, in the compute dtype."""
    *lead, _, f = q.shape
    w = q.weight.astype(dtype).reshape(*lead, q.scales.shape[-2], -1, f)
    return (w * q.scales.astype(dtype)[..., None, :]).reshape(q.shape)


def published_attention(
    w: dict[str, Any], x: jax.Array, memory: Any, step: jax.Array, c: Sizes
) -> tuple[jax.Array, Any]:
    b, t, _ = x.shape
    dtype = x.dtype

    def heads(name: str) -> jax.Array:
        y = x @ whole(w[f"multi_head_attention/{name}/w"], dtype)
        return y.reshape(b, t, -1, c.head_size)

    positions = step[:, None] + jnp.arange(t)
    q, k = (rope(heads(name), positions, c.rope_base) for name in ("query", "key"))
    write = jax.vmap(
        lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=0)
    )
    k, v = write(memory[0], k, step), write(memory[1], heads("value"), step)
    q = q.reshape(b, t, c.kv_heads, -1, c.head_size)
    s = jnp.einsum("btkrh,bskh->bkrts", q, k).astype(jnp.float32)
    s = 30.0 * jnp.tanh(s * c.attn_multiplier / 30.0)
    seen = jnp.arange(k.shape[1]) <= positions[..., None]
    s = jnp.where(seen[:, None, None], s, -1e30)
    p = jax.nn.softmax(s).astype(dtype)
    y = jnp.einsum("bkrts,bskh->btkrh", p, v).reshape(b, t, -1)
    return y @ whole(w["multi_head_attention/linear/w"], dtype), (k, v)


def published_moe(w: dict[str, Any], x: jax.Array, c: Sizes) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    probs = jax.nn.softmax(flat.astype(jnp.float32) @ w["router/w"])
    gates, index = jax.lax.top_k(probs, c.top_k)
    repeated = jnp.repeat(flat, c.top_k, axis=0)                  # [N * A, D]
    mask = jax.nn.one_hot(index.reshape(-1), c.num_experts, axis=0)  # [E, N * A]

    def experts(rows: jax.Array, name: str, dtype: Any) -> jax.Array:
        weight = whole(w[f"moe/{name}/w"], x.dtype).astype(dtype)
        every = jax.vmap(lambda one: rows.astype(dtype) @ one)(weight)
        return jnp.einsum("en,enf->nf", mask, every.astype(jnp.float32))

    gate = jax.nn.gelu(experts(repeated, "linear", x.dtype), approximate=True)
    hidden = gate * experts(repeated, "linear_v", x.dtype)
    out = experts(hidden, "linear_1", jnp.float32)
    out = out.reshape(*gates.shape, -1) * gates[..., None].astype(x.dtype)
    return out.sum(axis=1).astype(x.dtype).reshape(x.shape)


@functools.partial(jax.jit, static_argnames="c", donate_argnames="memory")
def published(
    params: Any, tokens: jax.Array, memory: Any, step: jax.Array, c: Sizes
) -> tuple[jax.Array, Any]:
    """Tokens [B, T] at `step` -> logits of the last one [B, V], the new memory."""
    dtype = jnp.dtype(c.dtype)
    h = params["table"][tokens].astype(dtype)
    h = h * jnp.asarray(c.embedding_multiplier, dtype)
    new = []
    for w, kv in zip(params["layers"], memory):
        x = norm(h, w["rms_norm/scale"])
        y, kv = published_attention(w, x, kv, step, c)
        h = h + norm(y, w["rms_norm_1/scale"])
        y = published_moe(w, norm(h, w["rms_norm_2/scale"]), c)
        h = h + norm(y, w["rms_norm_3/scale"])
        new.append(kv)
    h = norm(h[:, -1], params["norm"])
    logits = h @ params["table"].astype(dtype).T
    return (logits * jnp.asarray(c.output_multiplier, dtype)).astype(jnp.float32), new


def empty_memory(c: Sizes, batch: int) -> Any:
    shape = (batch, c.context, c.kv_heads, c.head_size)
    return [
        (jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))
        for _ in range(c.num_layers)
    ]


def as_loaded(params: Any) -> Any:
    """Eight-bit weights stored as `load` stores them on this backend."""
    if jax.default_backend() != "cpu":
        return params

    def one(w: Any) -> Any:
        wide = whole(w) and math.prod(w.shape[-2:]) >= SMALLEST
        return turn(w) if wide else w

    def whole(w: Any) -> bool:
        return isinstance(w, QuantizedTensor)

    return jax.tree.map(one, params, is_leaf=whole)


class Ours:
    """The package's own functions, as `Model.generate_ids` calls them."""

    def __init__(self, params: Any, sizes: Sizes):
        self.params, self.config = as_loaded(params), config_of(sizes)

    def start(self, tokens: jax.Array) -> jax.Array:
        b, t = tokens.shape
        lengths = np.full(b, t, np.int32)
        cache = init_cache(self.config, b, self.config.context)
        logits, self.cache = prefill(self.params, tokens, lengths, cache, self.config)
        return logits

    def step(self, tokens: jax.Array) -> jax.Array:
        logits, self.cache = decode_step(self.params, tokens, self.cache, self.config)
        return logits


class Published:
    """The same two steps in the published formulation."""

    def __init__(self, params: Any, sizes: Sizes):
        self.params, self.config = unstack(params, config_of(sizes)), sizes

    def start(self, tokens: jax.Array) -> jax.Array:
        b, self.at = tokens.shape
        return self.run(tokens, empty_memory(self.config, b), np.zeros(b, np.int32))

    def run(self, tokens: jax.Array, memory: Any, step: np.ndarray) -> jax.Array:
        logits, self.memory = published(self.params, tokens, memory, step, self.config)
        return logits

    def step(self, tokens: jax.Array) -> jax.Array:
        steps = np.full(len(tokens), self.at, np.int32)
        self.at += 1
        return self.run(tokens[:, None], self.memory, steps)


def logits_of(side: Any, prompt: jax.Array) -> jax.Array:
    """Logits after the prompt, and after each of four more tokens."""
    steps = [side.start(prompt)]
    for i in range(4):
        steps.append(side.step(prompt[:, i]))
    return jnp.stack(steps)


def check_agreement(params: Any, prompt: jax.Array) -> None:
    """In float32 both must say the same, and in bfloat16 nearly that.

    Random routers are often undecided and change their choice at the smallest
    rounding, so in bfloat16 the bound is loose; unrelated logits differ by 1.1.
    """
    exact_sizes, gaps = replace(SIZES, dtype="float32"), []
    exact = logits_of(Published(params, exact_sizes), prompt)
    for side in (
        Ours(params, exact_sizes),
        Ours(params, SIZES),
        Published(params, SIZES),
    ):
        gap = jnp.abs(logits_of(side, prompt) - exact).mean() / exact.std()
        gaps.append(float(gap))
    print("mean difference from the published formulation in float32, in spreads:")
    print(f"ours, float32 {gaps[0]:.1e}; ours, bfloat16 {gaps[1]:.2f};", end=" ")
    print(f"published, bfloat16 {gaps[2]:.2f}")
    if gaps[0] > 1e-3 or max(gaps) > 0.3:
        raise SystemExit("the two formulations do not agree")


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def decode(side: Any, prompt: jax.Array, count: int) -> float:
    """Tokens a second of a row, greedy, each token read back by Python."""
    side.start(prompt[:, :16]).block_until_ready()
    token = prompt[:, 0]

    def run() -> None:
        nonlocal token
        for _ in range(count):
            token = greedy(side.step(token))
            np.asarray(token)

    return count / seconds(run)


def read_prompt(side: Any, prompt: jax.Array, count: int) -> float:
    """Prompt tokens a second."""
    return prompt.size / seconds(lambda: side.start(prompt).block_until_ready())


def measure(what: Any, sides: Any, prompt: jax.Array, rounds: int, count: int) -> Any:
    results: list[list[float]] = [[] for _ in sides]
    for side in sides:
        what(side, prompt, 2)
    for _ in range(rounds):
        for side, result in zip(sides, results):
            result.append(what(side, prompt, count))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16, help="a round of decoding")
    batches = {"type": int, "nargs": "+", "default": [1, 8]}
    parser.add_argument("--batches", **batches)
    args = parser.parse_args()
    params = random_params(CONFIG)
    rng = np.random.default_rng(1)
    shape = max(8, *args.batches), PROMPT
    prompt = jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)
    print(f"JAX {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores")
    check_agreement(params, prompt[:1])

    sides = Ours(params, SIZES), Published(params, SIZES)
    print(f"\n{'tokens/s':24}{'ours':>8} {'(min-max)':16}", end="")
    print(f"{'published':>10} {'(min-max)':16}{'ratio':>6}")
    for name, what, batch in (
        *((f"decode, batch {b}", decode, b) for b in args.batches),
        (f"prefill of {PROMPT} tokens", read_prompt, 1),
    ):
        pair = measure(what, sides, prompt[:batch], args.rounds, args.tokens)
        if what is decode:
            pair = [[batch * x for x in side] for side in pair]
        (a, b), line = (statistics.median(side) for side in pair), f"{name:24}"
        for median, side, width in ((a, pair[0], 8), (b, pair[1], 10)):
            span = f"({min(side):.1f}-{max(side):.1f})"
            line += f"{median:>{width}.1f} {span:16}"
        print(f"{line}{a / b:6.1f}", flush=True)


if __name__ == "__main__":
    main()
