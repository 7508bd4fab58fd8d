"""Train the small model that ships inside the package.

    python scripts/small_texts.py FOLDER
    python scripts/train_small.py FOLDER [--out annotated_moe/small] [--only STEP]

Learns a vocabulary from the texts in FOLDER, runs `annotated-moe train` with
scripts/small.toml, quantizes what comes out to eight bits, measures it, and
writes it to --out with its training.json, MODEL_CARD.md, held_out.json and
routing.npz. A run that was stopped goes on. Needs the extra `train`.
"""

import argparse
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import io_callback
from small_texts import NAMES, pair_is_held

from annotated_moe import moe
from annotated_moe.checkpoints import quantize_params, save
from annotated_moe.config import place_of
from annotated_moe.data import pack, split_texts
from annotated_moe.generate import Model
from annotated_moe.model import apply_layer, embed, place_params
from annotated_moe.recipes import Recipe, read_inputs, read_recipe, read_texts
from annotated_moe.runs import Checkpoints, named_arrays, read_log
from annotated_moe.tokenizer import Tokenizer
from annotated_moe.training import Trainer, bits_per_byte, predicted

RECIPE = Path(__file__).with_name("small.toml")
CARD = Path(__file__).with_name("small_card.md")
# Half of what the release quantizes is split over model shards: see chapter 06.
GROUPS = 8
VOCAB = 2048
# Sums are one line, over and over: their pieces are learned from fewer pages.
SUM_PAGES = 1000
SHARES = [0.01, 0.03, 0.10, 0.25, 0.50, 0.75, 1.0]
PROMPTS = ["In the beginning", "MACBETH.\nWhat", "def read_line(self", "12 + 30 ="]
TEMPERATURES = [0.0, 0.6, 1.0]


def learn_vocabulary(recipe: Recipe) -> Tokenizer:
    texts: list[str] = []
    for name in NAMES:
        files = type(recipe.data)((name,), separator=recipe.data.separator)
        own = read_texts(recipe.path.parent, files, recipe.folder.resolve())
        kept, _ = split_texts(own, recipe.data.validation)
        texts += kept[:SUM_PAGES] if name == "sums" else kept
    return Tokenizer.train(texts, VOCAB)


def held_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Everything that is held back, by domain."""
    found = {}
    for name in NAMES:
        files = type(recipe.data)((name,), separator=recipe.data.separator)
        own = read_texts(recipe.path.parent, files, recipe.folder.resolve())
        found[name] = split_texts(own, recipe.data.validation)[1]
    return found


def sample_rows(held: dict[str, list[str]], tokenizer: Tokenizer) -> np.ndarray:
    """Two rows of 256 tokens a domain, in the order of the domains."""
    rows = []
    for name in NAMES:
        ids = [i for t in held[name] for i in tokenizer.encode(t, add_eos=True)]
        rows += [ids[:256], ids[256:512]]
    return np.asarray(rows, np.int32)                           # [10, 256]


def routing(model: Model, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates [L, M, A] of all tokens of `rows` [B, T]."""
    seen: list[Any] = []

    def watched(x: jax.Array, w: jax.Array, top_k: int) -> moe.Route:
        found = moe.route(x, w, top_k)
        io_callback(lambda e, g: seen.append((np.array(e), np.array(g))),
                    None, found.experts, found.gates, ordered=True)  # fmt: skip
        return found

    config, (b, t) = model.config, rows.shape
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
    h = embed(model.params["in_out_embed"]["embeddings"], rows, config)
    usual = moe.ROUTERS["softmax_top_k"]
    moe.ROUTERS["softmax_top_k"] = watched
    try:
        for i in range(config.num_layers):
            place, index = place_of(config, i)
            own = jax.tree.map(
                lambda w, at=index: w[at], place_params(model.params, place)
            )
            h, _, _ = apply_layer(
                own, place, config, h, positions, np.ones((b, t), bool)
            )
        jax.block_until_ready(h)
    finally:
        moe.ROUTERS["softmax_top_k"] = usual
    experts = np.stack([e for e, _ in seen]).astype(np.uint8)
    return experts, np.stack([g for _, g in seen]).astype(np.float16)


def saved_params(recipe: Recipe, trainer: Trainer, step: int) -> Any:
    """The weights that a run had at a step."""
    kept = Checkpoints(recipe.folder / "checkpoints", recipe.run.keep)
    like = named_arrays(trainer.like)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    state = kept.manager.restore(step, args=items)["state"]
    tree = jax.tree.structure(trainer.like)
    return jax.tree.unflatten(tree, [state[name] for name in like]).params


def write_routing(
    recipe: Recipe, trainer: Trainer, rows: np.ndarray, tokenizer: Tokenizer,
    path: Path,
) -> None:  # fmt: skip
    """Who chose whom, at a few steps of the run that were saved."""
    kept = Checkpoints(recipe.folder / "checkpoints", recipe.run.keep)
    there, last = np.array(kept.manager.all_steps()), kept.latest
    steps = [int(there[abs(there - share * last).argmin()]) for share in SHARES]
    found = []
    for step in steps:
        params = saved_params(recipe, trainer, step)
        found.append(routing(Model(trainer.config, params, tokenizer), rows))
    np.savez_compressed(
        path, steps=np.array(steps, np.int32),
        share=np.array(steps, np.float32) / last,
        tokens=rows.reshape(-1), names=np.array(NAMES),
        domain=np.repeat(np.arange(5, dtype=np.uint8), rows.size // 5),
        experts=np.stack([e for e, _ in found]),
        gates=np.stack([g for _, g in found]),
    )  # fmt: skip


def sums_right(model: Model) -> dict[str, float]:
    """The share of greedy answers after `a + b =` that are right."""
    def all_pairs() -> Iterator[tuple[int, int, bool]]:
        for a in range(100):
            for b in range(100):
                yield a, b, pair_is_held(a, b)

    rng, shares = np.random.default_rng(0), {}
    for name, side in ("new", True), ("learned", False):
        pairs = [(a, b) for a, b, held in all_pairs() if held == side]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))[:500]]
        prompts = [f"20 + 30 = 50 right\n{a} + {b} =" for a, b in pairs]
        texts = []
        for i in range(0, len(prompts), 100):
            texts += model.generate(prompts[i : i + 100], max_new_tokens=6)
        answers = [re.match(r" *(\d+)\b", text) for text in texts]
        right = [found is not None and int(found[1]) == a + b
                 for found, (a, b) in zip(answers, pairs)]
        shares[name] = round(float(np.mean(right)), 4)
    return shares


def judged_right(model: Model, held: list[str]) -> dict[str, float]:
    """How often ` right` or ` wrong` is said where it is so."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    verdicts = [tokenizer.encode(f"1{word}")[-1] for word in (" right", " wrong")]
    hits: list[list[bool]] = [[], []]
    for text in held[:60]:
        ids = np.asarray([tokenizer.encode(text)])[:, : model.config.context]
        best = np.asarray(model.logits(ids))[0][:, verdicts].argmax(axis=-1)
        for at in np.flatnonzero(np.isin(ids[0, 1:], verdicts)):
            truth = verdicts.index(ids[0, at + 1])
            hits[truth].append(bool(best[at] == truth))
    return {"right": round(float(np.mean(hits[0])), 4),
            "wrong": round(float(np.mean(hits[1])), 4)}  # fmt: skip


def samples(model: Model) -> Iterator[str]:
    """Texts from four prompts at three temperatures, as they come."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for prompt in PROMPTS:
        yield f"### `{json.dumps(prompt)[1:-1]}`\n"
        for t in TEMPERATURES:
            ids = tokenizer.encode_prompt(prompt)
            (new,) = model.generate_ids([ids], 80, temperature=t, seed=0)
            text = tokenizer.decode([*ids, *new]).strip("\n")
            yield f"At {t}:\n\n````text\n{text}\n````\n"


def table(log: dict[str, Any]) -> str:
    lines = ["| domain | held-out bytes | bits per byte | int8 |", "|---|--:|--:|--:|"]
    for name, one in log["held_out"].items():
        lines.append(f"| {name} | {one['bytes']:,} | {one['bits_per_byte']:.3f} "
                     f"| {one['bits_per_byte_int8']:.3f} |")
    return "\n".join(lines)


def measure(
    recipe: Recipe, trainer: Trainer, whole: Model, small: Model,
    held: dict[str, list[str]],
) -> dict[str, Any]:  # fmt: skip
    assert whole.tokenizer is not None
    lines = read_log(recipe.folder / "log.jsonl")
    keys = ("step", "nll", "balance", "router_z", "grad_norm", "rate")
    curve = [{k: row[k] for k in keys} for row in lines if "nll" in row]
    speeds = [row["tokens_per_second"] for row in lines if "nll" in row]
    a_step = recipe.train.batch * recipe.train.length
    log: dict[str, Any] = {
        "steps": recipe.train.steps,
        "tokens": recipe.train.steps * a_step,
        # Without evaluations, saving, and what else the processor did between.
        "seconds": round(sum(
            a_step * recipe.run.log_every / speed for speed in speeds)),
        "processor": processor(), "python": platform.python_version(),
        "jax": jax.__version__, "curve": curve,
        "validation": [{"step": row["step"], "bits_per_byte": row["bits_per_byte"]}
                       for row in lines if "bits_per_byte" in row],
        "held_out": {},
    }  # fmt: skip
    eight = jax.tree.map(np.asarray, dequantized(small))
    for name, texts in held.items():
        rows = pack(texts, whole.tokenizer, recipe.train.length)
        one: dict[str, Any] = {
            "texts": len(texts), "bytes": sum(len(t.encode()) for t in texts),
        }  # fmt: skip
        for end, params in ("", whole.params), ("_int8", eight):
            bits = bits_per_byte(trainer, params, rows, texts)
            one[f"bits_per_byte{end}"] = round(bits, 4)
            blind = len(texts) * math.log2(trainer.config.vocab_size)
            nats = (bits * one["bytes"] - blind) * math.log(2)
            one["tokens"] = int(predicted(rows.documents).sum())
            one[f"loss{end}"] = round(nats / one["tokens"], 4)
        log["held_out"][name] = one
    log["sums"] = {"answered": sums_right(small),
                   "judged": judged_right(small, held["sums"])}
    return log


def dequantized(model: Model) -> Any:
    """The weights of an int8 model as float32 arrays."""
    return {
        module: {name: w.dequantize() if hasattr(w, "dequantize") else w
                 for name, w in leaves.items()}
        for module, leaves in model.params.items()
    }  # fmt: skip


def processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("annotated_moe/small"))
    parser.add_argument("--only", choices=["tokenizer", "measure"])
    args = parser.parse_args()
    copy = args.folder / RECIPE.name
    shutil.copy(RECIPE, copy)
    recipe = read_recipe(copy)
    if not (args.folder / "tokenizer.model").exists():
        learn_vocabulary(recipe).save(args.folder / "tokenizer.model")
    if args.only is None:
        program = Path(sys.executable).with_name("annotated-moe")
        subprocess.run([program, "train", copy], check=True)
    if args.only != "tokenizer":
        finish(recipe, args.out)


def finish(recipe: Recipe, out: Path) -> None:
    """Everything after the run, from its newest checkpoint."""
    config, tokenizer, _ = read_inputs(recipe)
    trainer = Trainer(config, recipe.train)
    last = Checkpoints(recipe.folder / "checkpoints", recipe.run.keep).latest
    assert last is not None
    params = jax.tree.map(np.asarray, saved_params(recipe, trainer, last))
    whole = Model(config, params, tokenizer)
    small = Model(config, quantize_params(params, config, GROUPS), tokenizer)
    save(small, out)
    held = held_texts(recipe)
    shown = json.loads((recipe.path.parent / "held_out.json").read_text("utf-8"))
    shutil.copy(recipe.path.parent / "held_out.json", out)
    rows = sample_rows(shown, tokenizer)
    write_routing(recipe, trainer, rows, tokenizer, out / "routing.npz")
    log = measure(recipe, trainer, whole, small, held)
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    write_card(log, small, out)


def write_card(log: dict[str, Any], small: Model, out: Path) -> None:
    answered, judged = log["sums"]["answered"], log["sums"]["judged"]
    text = CARD.read_text("utf-8").format(
        table=table(log), samples="\n".join(samples(small)),
        steps=log["steps"], tokens=log["tokens"] / 1e6, minutes=log["seconds"] / 60,
        processor=log["processor"], python=log["python"], jax=log["jax"],
        new=answered["new"], learned=answered["learned"],
        right=judged["right"], wrong=judged["wrong"],
    )  # fmt: skip
    (out / "MODEL_CARD.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
