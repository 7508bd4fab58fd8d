"""How the cost of a model grows with batch, context, experts and depth.

    python benchmarks/growth.py [--only batch ...] [--rounds 5]

A small Mixtral in bfloat16 is varied along one axis at a time, the rest as in BASE:
for each, a prompt is read and one more token decoded. Writes time (the least of some
runs: other programs only add to it), memory and seconds of compiling to
annotated_moe/measured/growth-KIND.csv, KIND being the kind of processor. With more
experts each stays as wide and two are active, so that the weights grow and the work
of a token does not.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import MEASURED, kind_of, processor

from annotated_moe.families.mixtral import mixtral_config
from annotated_moe.model import decode_step, flat_specs, init_cache, prefill

BASE = {"batch": 1, "context": 256, "experts": 8, "depth": 4}
AXES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "context": (128, 256, 512, 1024, 2048, 4096, 8192),
    "experts": (4, 8, 16, 32, 64),
    "depth": (4, 8, 16, 32, 64),
}
PROMPT = 128                                    # tokens; the whole context on that axis
COLUMNS = (
    "axis", "value", "weights_mb", "cache_mb", "prefill_temporary_mb",
    "step_temporary_mb", "prefill_compile_s", "step_compile_s", "prefill_ms", "step_ms",
)


def config_of(size: dict[str, int]) -> Any:
    config = mixtral_config(
        size["depth"], 4, 2, 512, head_size=64, d_model=256, vocab_size=4096,
        context=size["context"], num_experts=size["experts"], rope_base=1e4,
    )
    return replace(config, dtype="bfloat16")


def random_params(config: Any) -> dict[str, dict[str, jax.Array]]:
    rng, params = np.random.default_rng(0), {}
    for (module, name), spec in flat_specs(config).items():
        x = rng.standard_normal(spec.shape, np.float32) * spec.shape[-1] ** -0.5
        wide = spec.float32 or not spec.matrix
        own = jnp.asarray(x, jnp.float32 if wide else config.dtype)
        params.setdefault(module, {})[name] = own
    return params


def megabytes(tree: Any) -> float:
    return sum(a.nbytes for a in jax.tree.leaves(tree)) / 1e6


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """The least of some runs."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def measure(axis: str, value: int, rounds: int) -> dict[str, Any]:
    jax.clear_caches()                          # or nothing would be compiled again
    size = {**BASE, axis: value}
    config, batch, slots = config_of(size), size["batch"], size["context"]
    length = slots - 1 if axis == "context" else PROMPT
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(3, 4096, (batch, length), np.int32)
    lengths = np.full(batch, length, np.int32)
    cache = init_cache(config, batch, slots)
    read, read_seconds = compiled(prefill, params, tokens, lengths, cache, config)
    step, step_seconds = compiled(decode_step, params, tokens[:, 0], cache, config)

    def run_prefill() -> Any:                   # a new cache each time: it is donated
        return read(params, tokens, lengths, init_cache(config, batch, slots))

    _, full = run_prefill()

    def run_step() -> Any:
        nonlocal full
        y, after = step(params, tokens[:, 0], full)
        full = after.with_length(jnp.asarray(lengths))      # always the same token
        return y

    run_step()
    found = (
        axis, value, megabytes(params), megabytes(cache),
        read.memory_analysis().temp_size_in_bytes / 1e6,
        step.memory_analysis().temp_size_in_bytes / 1e6,
        read_seconds, step_seconds,
        milliseconds(run_prefill, max(1, rounds // 2)),
        milliseconds(run_step, 3 * rounds),
    )
    rounded = (x if isinstance(x, str | int) else f"{x:.4g}" for x in found)
    return dict(zip(COLUMNS, rounded))


def keep(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write lines into the file, in place of those of the same axes."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {line["axis"] for line in lines}
    lines = [*lines, *(line for line in kept if line["axis"] not in new)]
    order = list(AXES)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: order.index(line["axis"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=AXES, help="these axes anew")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    path = MEASURED / f"growth-{kind_of(processor())}.csv"
    print(",".join(COLUMNS))
    for axis in args.only or AXES:
        lines = []
        for value in AXES[axis]:
            lines.append(measure(axis, value, args.rounds))
            print(",".join(map(str, lines[-1].values())), flush=True)
        keep(path, lines)
    print(f"kept in {path.name}")


if __name__ == "__main__":
    main()
