"""Short trials before the small model's long run: which optimizer, how fast.

    python scripts/small_texts.py FOLDER
    python scripts/train_small.py FOLDER --only tokenizer
    python scripts/small_trials.py FOLDER [--only NAME]

Each trial has about the same minutes, not the same steps, on two cores. Writes
annotated_moe/measured/small_trials.csv: bits per byte of FOLDER/held_out.json
by domain, and their mean. With --only, that line anew.
"""

import argparse
import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from train_small import RECIPE

from annotated_moe.data import batch_at, pack, split_texts
from annotated_moe.recipes import read_inputs, read_recipe
from annotated_moe.training import (
    LossSpec,
    OptimizerSpec,
    ScheduleSpec,
    Trainer,
    TrainSpec,
    bits_per_byte,
)

CSV = Path(__file__).parent.parent / "annotated_moe/measured/small_trials.csv"
# Steps that took about 147 seconds each.
TRIALS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "rate": 2.5e-3, "weight_decay": 0.05, "steps": 260},
    "muon": {"optimizer": "muon", "rate": 3e-3, "weight_decay": 0.1, "steps": 200},
}


def trial(
    folder: Path, optimizer: str, rate: float, weight_decay: float, steps: int,
    batch: int = 8, balance: float = 0.05, dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    recipe = read_recipe(folder / RECIPE.name)
    config, tokenizer, texts = read_inputs(recipe)
    rows = pack(split_texts(texts, recipe.data.validation)[0], tokenizer, 256)
    spec = TrainSpec(
        steps=steps, batch=batch, length=256,
        optimizer=OptimizerSpec(optimizer, rate, weight_decay),
        loss=LossSpec(z=1e-4, balance=balance, router_z=1e-4),
        schedule=ScheduleSpec(warmup=40, decay=steps // 4),
    )  # fmt: skip
    trainer = Trainer(replace(config, dtype=dtype), spec)
    state, start, report = trainer.begin(), 0.0, {}
    for i in range(steps):
        state, report = trainer.step(state, batch_at(rows, i, batch, spec.seed))
        if i == 0:
            jax.block_until_ready(report)       # compiled
            start = time.perf_counter()
    jax.block_until_ready(report)
    found: dict[str, Any] = {
        "optimizer": optimizer, "rate": rate, "weight_decay": weight_decay,
        "batch": batch, "dtype": dtype, "balance": balance, "steps": steps,
        "tokens": steps * batch * 256, "seconds": round(time.perf_counter() - start),
        "evenness": round(float(report["balance"]), 3),
    }  # fmt: skip
    held = json.loads((folder / "held_out.json").read_text("utf-8"))
    bits = {
        name: bits_per_byte(trainer, state.params, pack(own, tokenizer, 256), own)
        for name, own in held.items()
    }
    bits["mean"] = sum(bits.values()) / len(bits)
    return found | {name: round(value, 4) for name, value in bits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=sorted(TRIALS))
    args = parser.parse_args()
    lines: dict[str, dict[str, Any]] = {}
    if args.only and CSV.exists():
        with CSV.open(newline="") as file:
            lines = {line["trial"]: line for line in csv.DictReader(file)}
    for name in [args.only] if args.only else TRIALS:
        lines[name] = {"trial": name, **trial(args.folder, **TRIALS[name])}
        print(lines[name], flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(lines.values()))))
        writer.writeheader()
        writer.writerows(lines.values())


if __name__ == "__main__":
    main()
