"""One table: how fast several programs run one model, and a plain read of its bytes.

    python benchmarks/table.py [--rounds 5] [--only NAME ...] [--no-store]

The model is a Mixtral of 190 million random weights. Each program has a process of
its own, which is stopped while another runs, and they take turns: a round has every
program once. All must first agree on what follows some prompts. A rate of decoding
is that of the tokens after the first: the time of 33 new tokens less that of one.

The figures are kept in annotated_moe/measured/bench-KIND.json, KIND being the kind of
processor; where a median differs by a quarter from the kept one, a line says so.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from programs import PROGRAMS, SIZES, shapes, write_model

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "annotated_moe/measured"
KEPT = 3                                        # runs in a file
QUARTER = 0.25
ROWS = {
    "decode, batch 1": (1, 16), "decode, batch 8": (8, 16), "prefill of 512": (1, 512),
}
STEPS = 32                                      # of decoding
FLAGS = "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2"
KINDS = "amx_bf16", "avx512_bf16", "avx512f", "avx2"
VERSIONS = "jax", "numpy", "torch", "transformers", "xllamacpp", "gguf"
# How far log-probabilities may lie from those of our float32, on average, in the
# median prompt: a router in doubt may choose another expert after any rounding.
BOUNDS = {
    "ours, bfloat16": 0.1, "ours, int8": 0.3, "transformers, float32": 1e-4,
    "transformers, bfloat16": 0.1, "llama.cpp, f16": 0.1, "llama.cpp, Q8_0": 0.3,
}


def processor() -> dict[str, Any]:
    """Name, flags that matter, cores, as Linux says; elsewhere what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "ignore")
    except OSError:
        text = ""
    found = {
        key: match[1].strip()
        for key in ("model name", "flags")
        if (match := re.search(rf"^{key}\s*:(.*)$", text, re.MULTILINE))
    }
    has = found.get("flags", "").split()
    flags = [flag for flag in FLAGS if flag in has]
    name = found.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "flags": flags, "threads": os.cpu_count() or 1}


def kind_of(cpu: dict[str, Any]) -> str:
    """What a file of figures is named after: the widest units, and the threads."""
    units = [flag for flag in KINDS if flag in cpu["flags"]] or [platform.machine()]
    return f"{units[0]}-{cpu['threads']}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing(needs: tuple[str, ...]) -> str:
    """What to do about packages that a program needs and that are not here; ''."""
    lacking = [name for name in needs if importlib.util.find_spec(name) is None]
    if not lacking:
        return ""
    if "annotated_moe" in lacking:
        return "annotated_moe is not installed: pip install -e ."
    are = "is" if len(lacking) == 1 else "are"
    return (
        f"{' and '.join(lacking)} {are} not installed: "
        "pip install -c requirements.txt -r requirements-bench.txt"
    )


class Worker:
    """A program in its process, which sleeps unless it is asked."""

    def __init__(self, name: str, folder: Path) -> None:
        program = Path(__file__).with_name("programs.py")
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(program), name, str(folder)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )
        self.read()
        self.signal("SIGSTOP")

    def signal(self, name: str) -> None:
        if hasattr(signal, name):               # Windows has none: idle is enough
            self.process.send_signal(getattr(signal, name))

    def read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def ask(self, call: str, **more: Any) -> Any:
        self.signal("SIGCONT")
        print(json.dumps({"call": call, **more}), file=self.process.stdin, flush=True)
        answer = self.read()
        self.signal("SIGSTOP")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def check(worker: Worker, reference: Any) -> tuple[Any, float | None]:
    """Log-probabilities after some prompts, and how far they are from the reference.

    None and None of a program that has none; SystemExit if it is too far.
    """
    words = np.random.default_rng(1).integers(3, SIZES["vocab_size"], 24).tolist()
    prompts = [words[:n] for n in (1, 3, 7, 15, 24)]
    answers = [worker.ask("logprobs", prompt=prompt) for prompt in prompts]
    if answers[0] is None:
        return None, None
    found = np.array(answers, float)                        # NaN where not told
    if reference is None:
        return found, None
    gap = float(np.median(np.nanmean(np.abs(found - reference), axis=1)))
    if not gap <= BOUNDS[worker.name]:
        raise SystemExit(
            f"{worker.name} computes another model: its log-probabilities lie "
            f"{gap:.1e} from our float32's, and {BOUNDS[worker.name]:.0e} is allowed"
        )
    return found, gap


def prompts_of(rows: int, tokens: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, SIZES["vocab_size"], (rows, tokens)).tolist()


def steps_of(name: str) -> int:
    """How many tokens a program decodes after the first."""
    return getattr(PROGRAMS[name][0], "steps", STEPS)


def turn(worker: Worker, seed: int) -> dict[str, list[float]]:
    """A program's turn: for each row, seconds of one new token, and of more."""
    worker.ask("complete", prompts=prompts_of(1, 16, seed), count=1)    # awake again
    seconds = {}
    for row, (batch, tokens) in ROWS.items():
        counts = [1] if "prefill" in row else [1, 1 + steps_of(worker.name)]
        prompts = prompts_of(batch, tokens, seed)
        seconds[row] = [
            worker.ask("complete", prompts=prompts, count=count) for count in counts
        ]
    return seconds


def rates(turns: list[dict[str, list[float]]], steps: int) -> dict[str, list[float]]:
    """Tokens a second of each row, a turn a value.

    The seconds of a first token are the least of all turns: a difference of two
    times that were both disturbed says nothing.
    """
    found = {}
    for row, (batch, tokens) in ROWS.items():
        least = min(own[row][0] for own in turns)
        found[row] = [
            batch * tokens / own[row][0] if len(own[row]) == 1
            else batch * steps / (own[row][1] - least)
            for own in turns
        ]
    return found


def step_bytes(batch: int, width: int) -> float:
    """Bytes of weights that a step reads, `width` a number.

    Of the experts those that somebody asks for, on average; of the embedding nothing.
    """
    share = SIZES["num_experts_per_tok"] / SIZES["num_local_experts"]
    asked = 1 - (1 - share) ** batch
    total = 0.0
    for name, shape in shapes(SIZES):
        if "embed_tokens" not in name:
            total += float(np.prod(shape)) * (asked if ".experts." in name else 1)
    return total * width


def spread(values: list[float]) -> dict[str, float]:
    return {
        name: float(f"{f(values):.4g}")
        for name, f in (("median", statistics.median), ("least", min), ("most", max))
    }


def reading(speeds: list[float]) -> dict[str, dict[str, dict[str, float]]]:
    """The rows of a program that would only read its weights."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for kind, width in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        table[f"a plain read of the {kind} bytes"] = {
            row: spread([batch * x / step_bytes(batch, width) for x in speeds])
            for row, (batch, _) in ROWS.items() if "decode" in row
        }
    return table


def measure(names: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Check every program, run them in turns; figures, agreement and what lacks."""
    lacking = {name: missing(PROGRAMS[name][0].needs) for name in names}
    workers: list[Worker] = []
    agreement: dict[str, float] = {}
    found: dict[str, list[Any]] = {}
    reference = None
    try:
        for name in names:
            if lacking[name]:
                continue
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            worker = Worker(name, folder)
            workers.append(worker)
            if name == "plain read":
                worker.ask("read")
                continue
            own, gap = check(worker, reference)
            reference = own if reference is None else reference
            if gap is not None:
                agreement[name] = float(f"{gap:.2g}")
            turn(worker, 0)                                 # compiles, warms up
        for i in range(rounds):
            print(f"round {i + 1} of {rounds} ...", file=sys.stderr, flush=True)
            for worker in workers:
                reads = worker.name == "plain read"
                one = worker.ask("read") if reads else turn(worker, 1 + i)
                found.setdefault(worker.name, []).append(one)
    finally:
        for worker in workers:
            worker.close()
    speeds = found.pop("plain read", [])
    figures = {
        name: {
            row: spread(values)
            for row, values in rates(turns, steps_of(name)).items()
        }
        for name, turns in found.items()
    }
    if speeds:
        figures |= reading(speeds)
    return {
        "read, bytes a second": spread(speeds) if speeds else None,
        "agreement": agreement,
        "missing": {name: why for name, why in lacking.items() if why},
        "figures": figures,
    }


def header(run: dict[str, Any]) -> str:
    cpu = run["processor"]
    flags = " ".join(cpu["flags"]) or "none that matter"
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    model = "512 wide, 8 layers, 8 experts of which 2, expert width 1,792"
    return (
        f"Mixtral of 190 million weights: {model}\n"
        f"{run['date']}, {cpu['name']}, {cpu['threads']} threads ({flags})\n"
        f"{versions}\n"
        f"tokens a second: medians of {run['rounds']} rounds (least-most)"
    )


def cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return "-"
    digits = 0 if figure["median"] >= 100 else 1
    low, mid, high = (
        f"{figure[name]:,.{digits}f}" for name in ("least", "median", "most")
    )
    return f"{mid} ({low}-{high})"


def table(run: dict[str, Any]) -> str:
    """The figures of a run as text, and a line for each program that lacks."""
    lines = [header(run), ""]
    lines.append(f"{'':34}" + "".join(f"{row:>24}" for row in ROWS))
    for name, figures in run["figures"].items():
        cells = "".join(f"{cell(figures.get(row)):>24}" for row in ROWS)
        lines.append(f"{name:34}{cells}")
    lines += [f"{name}: {why}" for name, why in run["missing"].items()]
    return "\n".join(lines)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each median that is a quarter or more above or below the old one."""
    lines = []
    for name, figures in new["figures"].items():
        for row, figure in figures.items():
            kept = old["figures"].get(name, {}).get(row)
            if kept is None:
                continue
            change = figure["median"] / kept["median"] - 1
            if abs(change) >= QUARTER:
                lines.append(
                    f"{name}, {row}: {figure['median']:,g} tokens a second, "
                    f"{change:+.0%} against {kept['median']:,g} of {old['date']}"
                )
    return lines


def runs_of(path: Path) -> list[dict[str, Any]]:
    """The runs that a file keeps, oldest first; none where there is no file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def keep(path: Path, run: dict[str, Any]) -> None:
    """Add a run to the file, which holds the last few."""
    runs = [*runs_of(path), run][-KEPT:]
    text = json.dumps({"runs": runs}, indent=1)
    flat = re.sub(r"[{\[][^{}\[\]]*[}\]]", lambda m: " ".join(m[0].split()), text)
    path.write_text(flat + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, metavar="NAME",
                        help=f"of {', '.join(PROGRAMS)}")
    parser.add_argument("--no-store", action="store_true", help="keep no figures")
    parser.add_argument("--folder", type=Path, help="for the model's files, 1.6 GB")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    first = next(iter(PROGRAMS))                # what the others must agree with
    names = [name for name in PROGRAMS if name in [first, *(args.only or PROGRAMS)]]
    cpu = processor()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)) / "model"
        if not (folder / "model.safetensors").exists():
            write_model(folder)
        found = measure(names, folder, args.rounds)
    run = {
        "date": datetime.date.today().isoformat(), "processor": cpu,
        "versions": versions(), "rounds": args.rounds, **found,
    }
    path = MEASURED / f"bench-{kind_of(cpu)}.json"
    print(table(run))
    kept = runs_of(path)
    if kept:
        lines = changes(kept[-1], run)
        print("\n".join(["", *lines]) if lines else
              f"\nno figure changed by a quarter since {kept[-1]['date']}")
    if args.only or args.no_store:
        return
    keep(path, run)
    print(f"kept in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
