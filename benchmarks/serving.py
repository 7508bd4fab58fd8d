"""What eight slots of an engine gain over one: the same requests, in turns.

    python benchmarks/serving.py [--rounds 3] [--kinds float32 int8 dense]

64 requests of mixed length, a third greedy, a third drawn, a third drawn from a cut,
to the Mixtral of 190 million parameters that `programs.py` writes, and in float32 to
one without a choice ("dense"): of the same layers, with the two experts that a token
has. And what one step of the model takes with one row and with eight, which says what
can be gained. Writes annotated_moe/measured/serving-KIND.csv, KIND being the kind of
processor; lines of kinds that are not asked for stay.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from programs import SIZES, Ours, write_model
from table import MEASURED, kind_of, processor

from annotated_moe.generate import Session
from annotated_moe.serving import Engine, Request

SLOTS = 1, 8
KINDS = ["float32", "int8", "dense"]
WAYS: list[dict[str, Any]] = [
    {}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
]  # fmt: skip


def requests(count: int = 64) -> list[Request]:
    """Prompts of 8 to 128 tokens; 4 to 128 new ones, most of them few."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(8, 129, count)
    new = rng.geometric(1 / 32, count).clip(4, 128)
    return [
        Request(rng.integers(3, 8192, n).tolist(), int(m), seed=i, stop_ids=(),
                **WAYS[i % len(WAYS)])
        for i, (n, m) in enumerate(zip(prompts, new))
    ]  # fmt: skip


def through(model: Any, slots: int) -> float:
    """Tokens a second of all requests through so many slots."""
    asked = requests()
    engine = Engine(model, slots=slots, max_waiting=len(asked))
    for request in asked:
        engine.submit(request)
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return engine.stats.new_tokens / (time.perf_counter() - start)


def alone(model: Any, rows: int, steps: int = 20) -> float:
    """Rows a second of the model's step, with nothing around it."""
    rng = np.random.default_rng(1)
    session = Session(model, rows, 256)
    session.prefill(rng.integers(3, 8192, (rows, 64)).tolist())
    taken = []
    for _ in range(steps):
        tokens = rng.integers(3, 8192, rows).astype(np.int32)
        start = time.perf_counter()
        session.step(tokens).block_until_ready()
        taken.append(time.perf_counter() - start)
    return rows / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, help="where models are, or will be")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    path, lines = MEASURED / f"serving-{kind_of(processor())}.csv", []
    if path.exists():
        with path.open() as file:
            lines = [x for x in csv.reader(file) if x[0] not in ("kind", *args.kinds)]
    for kind in args.kinds:
        files, sizes = folder / "mixtral", SIZES
        if kind == "dense":
            files = folder / "dense"
            sizes = SIZES | {"num_local_experts": SIZES["num_experts_per_tok"]}
        if not files.exists():
            write_model(files, sizes)
        model = Ours(files, "float32" if kind == "dense" else kind).model
        runs: list[tuple[str, int, Callable[[Any, int], float]]] = [
            (name, n, run)
            for name, run in (("engine", through), ("step", alone)) for n in SLOTS
        ]  # fmt: skip
        found: dict[tuple[str, int], list[float]] = {}
        for turn in range(args.rounds + 1):
            for name, n, run in runs:
                rate = run(model, n)
                if turn:                        # the first one compiles
                    found.setdefault((name, n), []).append(rate)
        for (name, n), rates in found.items():
            some = statistics.median(rates), min(rates), max(rates)
            lines.append([kind, name, n, *(f"{rate:.4g}" for rate in some)])
            print(*lines[-1], sep=",", flush=True)
    with path.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["kind", "what", "rows", "median", "least", "most"], *lines])
    print(f"kept in {path.name}")


if __name__ == "__main__":
    main()
