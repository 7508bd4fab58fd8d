"""Train the runs of the chapter on balance: three seeds of each.

    python scripts/balance_runs.py [--only remedies] [--steps 1500]

The task, the model and the step are the chapter's own cells. Writes a line a
run to annotated_moe/measured/balance.csv; with --only, the lines of one study anew.
"""

import argparse
import csv
import time
from dataclasses import replace
from typing import Any

from cells import ROOT, names_before
from tqdm import tqdm

from annotated_moe.moe import FeedForwardSpec, MoESpec, SharedMoESpec

CHAPTER = "book/chapters/22_balance.md"
RUNS = ROOT / "annotated_moe/measured/balance.csv"
COLUMNS = ["study", "name", "factor", "seed", "steps", "loss", "unlimited",
           "busiest", "evenness", "dropped", "seconds"]  # fmt: skip
STUDIES = ["start", "remedies", "seats", "grain"]
SEEDS, CHUNKS = 3, 10


def studies(p: dict[str, Any]) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """Study, name, configuration, options of each kind of run."""
    routed = p["routed_by"]
    plain = routed("softmax_top_k")
    biased = routed("selection_bias")
    found: list[Any] = [
        ("start", str(common), plain, {"common": common})
        for common in (0.0, 0.5, 1.0, 2.0, 3.0)
    ]
    found += [
        ("remedies", "nothing", plain, {}),
        ("remedies", "balance loss", plain, {"balance": 0.02}),
        ("remedies", "noise", routed("noisy_top_k"), {}),
        ("remedies", "noise and loss", routed("noisy_top_k"), {"balance": 0.02}),
        ("remedies", "expert choice", routed("expert_choice"), {}),
        ("remedies", "sigmoid, no bias", biased, {"rate": 0.0}),
        ("remedies", "bias, rate 0.001", biased, {"rate": 0.001}),
        ("remedies", "bias, rate 0.01", biased, {"rate": 0.01}),
        ("remedies", "quantile", routed("quantile"), {}),
    ]
    for factor in (0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        found += [
            ("seats", "nothing", routed("softmax_top_k", factor), {}),
            ("seats", "balance loss", routed("softmax_top_k", factor),
             {"balance": 0.02}),
        ]  # fmt: skip
    with_experts = p["with_experts"]
    for e, a, f in ((8, 2, 32), (16, 4, 16), (32, 8, 8)):
        spec = MoESpec(e, a, f, router="selection_bias")
        found.append(("grain", f"{a} of {e}", with_experts(spec), {}))
        shared = FeedForwardSpec(f)
        one = SharedMoESpec(e - 1, a - 1, f, router="selection_bias", shared=shared)
        found.append(("grain", f"1 + {a - 1} of {e - 1}", with_experts(one), {}))
    found += [
        ("grain", "dense, same work", with_experts(FeedForwardSpec(64)), {}),
        ("grain", "dense, same size", with_experts(FeedForwardSpec(256)), {}),
    ]
    return found


def run(p: dict[str, Any], config: Any, seed: int, steps: int, options: Any) -> Any:
    """What is measured at the end of a run, and its seconds without compiling."""
    jax = p["jax"]
    options = dict(options)
    state = p["begin"](seed, config, options.pop("common", p["COMMON"]))
    keys = jax.random.split(jax.random.key(seed), CHUNKS)
    for i, key in enumerate(keys):
        state, nll = p["train"](state, key, config, steps // CHUNKS, **options)
        jax.block_until_ready(nll)
        if i == 0:
            start = time.perf_counter()
    seconds = (time.perf_counter() - start) * CHUNKS / (CHUNKS - 1)
    params, asked = state[0], config
    got = p["measure"](params, p["held_out"], config)
    # Who answers has no later tokens: its tokens choose for themselves.
    if getattr(config.layer(0).feed_forward, "router", "") == "expert_choice":
        layer = config.layer(0).feed_forward
        asked = p["with_experts"](replace(layer, router="softmax_top_k"))
    free = p["answer_loss"](params, p["held_out"], asked)
    return got._replace(unlimited=free), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STUDIES)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    kept: list[dict[str, Any]] = []
    if args.only and RUNS.exists():
        with open(RUNS, encoding="utf-8", newline="") as file:
            kept = [r for r in csv.DictReader(file) if r["study"] != args.only]
    p = names_before(CHAPTER, "balance-alone")
    wanted = [s for s in studies(p) if args.only in (None, s[0])]
    for study, name, config, options in tqdm(wanted):
        spec = config.layer(0).feed_forward
        factor = getattr(spec, "capacity_factor", "")
        for seed in range(SEEDS):
            got, seconds = run(p, config, seed, args.steps, options)
            row = {"study": study, "name": name, "factor": factor, "seed": seed}
            row |= {"steps": args.steps, "seconds": f"{seconds:.2f}"}
            row |= {c: f"{float(getattr(got, c)):.4f}" for c in COLUMNS[5:10]}
            kept.append(row)
    kept.sort(key=lambda r: STUDIES.index(r["study"]))
    RUNS.parent.mkdir(exist_ok=True)
    with open(RUNS, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


if __name__ == "__main__":
    main()
