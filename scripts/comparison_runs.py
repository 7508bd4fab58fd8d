"""Train the runs of the chapter on comparisons, each arm at several rates.

    python scripts/comparison_runs.py [--only equal-total] [--most 3]

Texts, models and the step are the chapter's own cells. Each arm is trained from
seed 0 at every rate of the grid, which grows until the best is not at its end, and
from two more seeds at the best one. A run that is in
annotated_moe/measured/comparisons.csv is not done again, so the command may be stopped
and given again; to begin anew, delete the file.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from typing import Any

from cells import ROOT, names_before
from tqdm import tqdm

CHAPTER = "book/chapters/24_comparisons.md"
RUNS = ROOT / "annotated_moe/measured/comparisons.csv"
COLUMNS = ["arm", "optimizer", "steps", "rate", "seed", "step", "bits"]
STEPS, POINTS, SEEDS = 200, 4, 3
GRID = [0.004, 0.008, 0.016]
# Name -> arm, optimizer, steps.
STUDIES = {
    "experts": ("experts", "adamw", STEPS),
    "equal-active": ("equal active", "adamw", STEPS),
    "equal-total": ("equal total", "adamw", STEPS),
    "muon": ("experts", "muon", STEPS),
}

Run = tuple[str, str, int, float, int]      # arm, optimizer, steps, rate, seed


def read() -> dict[Run, float]:
    """Runs that are done -> bits a byte at their end."""
    if not RUNS.exists():
        return {}
    done = {}
    with open(RUNS, encoding="utf-8", newline="") as file:
        for r in csv.DictReader(file):
            steps, rate, seed = int(r["steps"]), float(r["rate"]), int(r["seed"])
            if int(r["step"]) == steps:
                run = r["arm"], r["optimizer"], steps, rate, seed
                done[run] = float(r["bits"])
    return done


def wanted(arm: str, optimizer: str, steps: int) -> Iterator[Run]:
    """The runs of a study in turn; the best rate is known after the grid."""
    rates = sorted(GRID)
    while True:
        for rate in rates:
            yield arm, optimizer, STEPS, rate, 0
        done = read()
        bits = {rate: done[arm, optimizer, STEPS, rate, 0] for rate in rates}
        best = min(bits, key=bits.__getitem__)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            break
    for seed in range(SEEDS):
        yield arm, optimizer, steps, best, seed


def train(p: dict[str, Any], run: Run) -> None:
    """Do a run and add its lines to the file."""
    arm, optimizer, steps, rate, seed = run
    spec = p["spec_of"](steps, rate, seed, optimizer=optimizer)
    start = time.perf_counter()
    every = steps // POINTS if optimizer == "adamw" else None   # curves that are drawn
    found = p["run"](p["ARMS"][arm], spec, every)
    fresh = not RUNS.exists()
    with open(RUNS, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for step, bits in found:
            writer.writerow([*run, step, f"{bits:.4f}"])
    tqdm.write(f"{run} {found[-1][1]:.4f} {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STUDIES)
    parser.add_argument("--most", type=int, help="stop after so many runs")
    args = parser.parse_args()
    p, left = names_before(CHAPTER, "comparisons-costs"), args.most
    for name in [args.only] if args.only else list(STUDIES):
        for run in wanted(*STUDIES[name]):
            if left == 0:
                return
            if run not in read():
                train(p, run)
                left = left and left - 1


if __name__ == "__main__":
    main()
