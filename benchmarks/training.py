"""Steps of training: experts in blocks against other ways and dense networks.

    python benchmarks/training.py [--rounds 7] [--write]

Two sizes of model, each a Grok-1 of a few layers whose eight experts (two active)
are trained four ways: in blocks, as the package does; by `ragged_dot`; with a
fixed number of seats; and with every expert on every token. Beside them stand dense
networks of equal active and of equal total parameters. All take turns in one run, a
step each, and the median of the rounds counts. With --write it goes to
annotated_moe/measured/throughput.csv.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from annotated_moe.config import ModelConfig, Segment
from annotated_moe.data import Packed
from annotated_moe.families.grok import grok_config
from annotated_moe.moe import (
    DROPLESS,
    Expert,
    Experts,
    FeedForwardSpec,
    MoESpec,
    capacity_and_drop,
    gated,
)
from annotated_moe.training import OptimizerSpec, Trainer, TrainSpec

MEASURED = Path(__file__).parent.parent / "annotated_moe/measured/throughput.csv"
COLUMNS = ["size", "arm", "optimizer", "milliseconds", "fastest", "slowest"]
E, A, T = 8, 2, 128


@dataclass(frozen=True)
class Size:
    """A model, and the rows of a step."""

    d_model: int
    width: int                              # of one expert
    layers: int
    vocabulary: int
    batch: int


SIZES = {
    "chapter": Size(128, 128, 3, 1024, 16),
    "larger": Size(256, 384, 3, 1024, 16),
}


def every_expert_once(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    w: Experts,
    apply: Expert = gated,
) -> jax.Array:
    """Each expert on each token, with a gate of zero where it was not chosen.

    Half the products of `every_expert`, which repeats a token for each choice.
    """
    n, count = len(x), len(w["linear"])
    all_gates = jnp.zeros((n, count)).at[jnp.arange(n)[:, None], experts].add(
        gates, mode="drop"
    )
    return jax.vmap(apply, in_axes=(None, 1, 0))(x, all_gates, w).sum(axis=0)


WAYS: dict[str, Any] = {
    "blocks": DROPLESS["blocks"],
    "ragged": DROPLESS["ragged"],
    "seats": partial(capacity_and_drop, factor=1.5),
    "every expert": every_expert_once,
}


@contextmanager
def trained_by(way: Any) -> Iterator[None]:
    """While a step is traced: what it takes for "blocks"."""
    before = DROPLESS["blocks"]
    DROPLESS["blocks"] = way
    try:
        yield
    finally:
        DROPLESS["blocks"] = before


def config_of(size: Size, feed_forward: Any) -> ModelConfig:
    head = size.d_model // 4
    base = grok_config(
        vocab_size=size.vocabulary, context=T, d_model=size.d_model, d_ff=1,
        num_layers=size.layers, num_experts=1, q_heads=4, kv_heads=2, head_size=head,
        embedding_multiplier=size.d_model**0.5, attn_multiplier=head**-0.5,
        dtype="float32",
    )  # fmt: skip
    layer = replace(base.layer(0), feed_forward=feed_forward)
    return replace(base, layers=(Segment((layer,), size.layers),))


class Arm:
    """A model that is trained, a timed step at a time."""

    def __init__(self, config: ModelConfig, batch: int, optimizer: str, way: Any):
        rng, shape = np.random.default_rng(0), (batch, T + 1)
        tokens = rng.integers(0, config.vocab_size, shape, np.int32)
        self.rows, self.times = Packed(tokens, np.zeros(shape, np.int32)), list[float]()
        spec = TrainSpec(500, batch, T, optimizer=OptimizerSpec(name=optimizer))
        self.trainer = Trainer(config, spec)
        self.state = self.trainer.begin()
        with trained_by(way):
            self.step()
        self.times.clear()

    def step(self) -> None:
        start = time.perf_counter()
        self.state, _ = self.trainer.step(self.state, self.rows)
        jax.block_until_ready(self.state.params)
        self.times.append(1e3 * (time.perf_counter() - start))


def arms_of(size: Size) -> dict[tuple[str, str], Arm]:
    experts = config_of(size, MoESpec(E, A, size.width))
    blocks = WAYS["blocks"]
    found = {
        (name, "adamw"): Arm(experts, size.batch, "adamw", way)
        for name, way in WAYS.items()
    }
    found["blocks", "muon"] = Arm(experts, size.batch, "muon", blocks)
    for name, count in (("equal active", A), ("equal total", E)):
        dense = config_of(size, FeedForwardSpec(count * size.width))
        found[name, "adamw"] = Arm(dense, size.batch, "adamw", blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    lines = []
    for name, size in SIZES.items():
        arms = arms_of(size)
        for _ in range(args.rounds):
            for arm in arms.values():
                arm.step()
        ours = statistics.median(arms["blocks", "adamw"].times)
        for (arm, optimizer), found in arms.items():
            median, times = statistics.median(found.times), found.times
            lines.append([name, arm, optimizer, *(
                f"{t:.1f}" for t in (median, min(times), max(times)))])
            print(f"{name:8} {arm:13} {optimizer:6}{median:7.0f} ms a step;"
                  f" throughput of blocks: {median / ours:.2f} times its own")
    if args.write:
        with open(MEASURED, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *lines])


if __name__ == "__main__":
    main()
