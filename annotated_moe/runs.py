# Generated from book/chapters/23b_runs.md by `make sync`; edit the chapter.
"""A run may take weeks. In that time a machine is rebooted, a disk
fills, a number overflows, and somebody wants to know how far it is.
This page puts a loop around the step. A bar and a log say how it goes,
and every few hundred steps its state is saved. The run may be killed at
any moment, without a warning. Started again, it ends with the weights
that it would have had, to the last bit. Then the same run is spread
over a mesh. At its end you have all of what `annotated-moe train
run.toml` does; an appendix reads the file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32
from tqdm import tqdm

from annotated_moe import hosts
from annotated_moe.config import ModelConfig, all_places, place_of
from annotated_moe.data import Packed, batch_at
from annotated_moe.model import (
    Params,
    apply_layer,
    embed,
    flat_specs,
    place_params,
    split_reports,
    unembed,
)
from annotated_moe.specs import Size, Spec
from annotated_moe.tokenizer import write_whole
from annotated_moe.training import (
    Count,
    Trainer,
    TrainSpec,
    TrainState,
    gradient,
    make_optimizer,
    positions_in_documents,
    within_documents,
)


# %% book/chapters/23b_runs.md, cell 7
def named_arrays(state: Any) -> dict[str, Any]:
    """Path -> array, for each array of a state."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): a for path, a in leaves}


# %% book/chapters/23b_runs.md, cell 8
@jax.jit
def sums_of_bits(state: Any) -> dict[str, UInt32[Array, ""]]:
    """Path -> sum of an array's words, modulo 2**32."""
    def total(a: Array) -> Array:
        kind = f"uint{8 * a.dtype.itemsize}"
        words = jax.lax.bitcast_convert_type(a, kind)
        return jnp.sum(words, dtype=jnp.uint32)

    return {n: total(a) for n, a in named_arrays(state).items()}


# %% book/chapters/23b_runs.md, cell 9
class Checkpoints:
    """The last few states of a run, each of them whole.

    In `folder`, which is made; at most `keep` are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder.absolute()
        if jax.process_index() == 0:
            for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(
            self.folder, options=options)

    def save(self, state: Any, about: dict[str, Any]) -> None:
        """Write `state`, all or nothing. OSError if it cannot be."""
        step = int(state.step)
        size = sum(a.nbytes for a in named_arrays(state).values())
        free = shutil.disk_usage(self.folder).free
        if size > free:     # or threads of the writer say it at length
            raise self.unwritten(
                step, f"it has {size / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free")
        sums = {n: int(s) for n, s in sums_of_bits(state).items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(named_arrays(state)),
            about=ocp.args.JsonSave({"run": about, "sums": sums}),
        )
        try:
            self.manager.save(step, args=items, force=True)
            self.manager.wait_until_finished()
        except Exception as error:
            why = str(error).splitlines()[0].rsplit(": ", 1)[-1]
            why = why.split(" [")[0]        # the number of the error
            raise self.unwritten(step, why) from error

    def unwritten(self, step: int, why: str) -> OSError:
        """What to say of a state that could not be written."""
        whole = [s for s in self.manager.all_steps() if s < step]
        last = (f"the one of step {max(whole)} is whole" if whole
                else "none was saved before")
        return OSError(
            f"{self.folder}: the state of step {step} could not be "
            f"written ({why}); {last}: make room and give the same "
            "command again"
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest state, or None."""
        return self.manager.latest_step()

    def damaged(self) -> ValueError:
        """What to say of a newest state that is not whole."""
        older = sorted(set(self.manager.all_steps()) - {self.latest})
        then = f"to go on from step {older[-1]}" if older else (
            "to begin anew")
        return ValueError(
            f"{self.folder / str(self.latest)} is damaged or no state "
            f"of a run: delete that folder {then}"
        )

    def read(self, item: str, how: Any) -> Any:
        """An item of the newest state; ValueError if it is damaged."""
        items = ocp.args.Composite(**{item: how})
        try:
            return self.manager.restore(self.latest, args=items)[item]
        except Exception as error:          # of many classes
            raise self.damaged() from error

    def about(self) -> dict[str, Any]:
        """What was saved beside the newest state."""
        return self.read("about", ocp.args.JsonRestore())["run"]

    def restore(self, like: Any) -> Any:
        """The newest state, laid out as `like` says.

        ValueError if it is damaged.
        """
        names = named_arrays(like)
        found = self.read("state", ocp.args.StandardRestore(names))
        tree = jax.tree.structure(like)
        state = jax.tree.unflatten(tree, [found[n] for n in names])
        sums = self.read("about", ocp.args.JsonRestore())["sums"]
        if sums != {n: int(s) for n, s in sums_of_bits(state).items()}:
            raise self.damaged()
        return state


# %% book/chapters/23b_runs.md, cell 13
def bad_array(
    tree: Params, config: ModelConfig, last_first: bool = False
) -> str:
    """The first array that is not finite, with its layer; or ""."""
    found = []
    for (module, name), spec in flat_specs(config).items():
        w = np.asarray(tree[module][name])
        bad = ~np.isfinite(w)
        if not bad.any():
            continue
        if spec.axes[0] != "layers":
            found.append((-1, f"{module}/{name}"))
            continue
        index = int(bad.reshape(w.shape[0], -1).any(axis=1).argmax())
        if last_first:
            bad = bad[::-1].reshape(w.shape[0], -1).any(axis=1)
            index = w.shape[0] - 1 - int(bad.argmax())
        place = next(p for p in all_places(config)
                     if f"{module}/".startswith(f"{p.name}/"))
        found.append((place.layers[index], f"{module}/{name}"))
    if not found:
        return ""
    layer, name = (max if last_first else min)(found)
    return name if layer < 0 else f"layer {layer}, {name}"


# %% book/chapters/23b_runs.md, cell 14
def bad_output(
    params: Params, rows: Packed, config: ModelConfig
) -> str:
    """The first place whose output is not finite; or ""."""
    tokens, documents = (jnp.asarray(a)[:, :-1] for a in rows)
    positions, real = positions_in_documents(documents)
    inside = within_documents(config)
    run = jax.jit(partial(apply_layer, train="blocks"),
                  static_argnums=(1, 2))
    h = embed(params["in_out_embed"]["embeddings"], tokens, config)
    if not jnp.isfinite(h).all():
        return "the embedded tokens"
    for i in range(config.num_layers):
        place, index = place_of(inside, i)
        own = jax.tree.map(lambda w, at=index: w[at],
                           place_params(params, place))
        h, _, losses = run(own, place, inside, h, positions, real)
        if not jnp.isfinite(h).all():
            return f"layer {i}, its output"
        for name, loss in losses.items():
            if not jnp.isfinite(loss):
                return f"layer {i}, the router's loss {name!r}"
    logits = jax.jit(partial(unembed, config=config, train=True))
    finite = jnp.isfinite(logits(params, h)).all()
    return "" if finite else "the logits"


# %% book/chapters/23b_runs.md, cell 15
def square(a: Array) -> np.ndarray:
    """On the host, where an overflow is infinite and no warning."""
    with np.errstate(over="ignore"):
        return np.square(np.asarray(a))


def find_fault(
    state: TrainState, rows: Packed, config: ModelConfig,
    spec: TrainSpec,
) -> str:
    """What is not finite in a step from `state`, and where."""
    params = state.params
    if where := bad_array(params, config):
        return f"a weight: {where}"
    if where := bad_output(params, rows, config):
        return f"what is computed: {where}"
    arrays = jax.tree.map(jnp.asarray, rows)
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    slope = jax.jit(partial(gradient, config=config, spec=spec))
    grads, _ = slope(params, arrays, key=key)
    grads, _ = split_reports(grads, config)
    # Squares, since a length is a sum of them and may overflow too.
    squares = jax.tree.map(square, grads)
    if where := bad_array(squares, config, last_first=True):
        return f"a gradient: {where}"
    update = jax.jit(make_optimizer(config, spec).update)
    changes, _ = update(grads, state.memory, params)
    where = bad_array(jax.tree.map(square, changes), config)
    return f"what the optimizer adds to a weight: {where}"


# %% book/chapters/23b_runs.md, cell 18
def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off by a kill is not."""
    found = []
    text = path.read_text("utf-8") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


@contextlib.contextmanager
def naming(path: Path, done: str = "written") -> Iterator[None]:
    """An OSError within it becomes a sentence about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:             # a sentence already
            raise
        raise OSError(
            f"{path} cannot be {done}: {error.strerror}"
        ) from error


class RunLog:
    """Lines of JSON, those after `step` taken away.

    OSError names the file where it cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        with naming(path):
            kept = [line for line in read_log(path)
                    if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(path, text.encode())

    def write(self, **values: Any) -> None:
        rounded = {name: float(f"{value:.6g}")
                   if isinstance(value, float) else value
                   for name, value in values.items()}
        with naming(self.path), open(
            self.path, "a", encoding="utf-8"
        ) as file:
            file.write(json.dumps(rounded) + "\n")


# %% book/chapters/23b_runs.md, cell 19
@dataclass(frozen=True)
class RunSpec(Spec):
    """Where a run is written down, and how often, in steps."""

    folder: str
    save_every: Size = 200
    keep: Size = 3                          # checkpoints
    log_every: Size = 10
    evaluate_every: Count = 0               # 0: at the end alone


# %% book/chapters/23b_runs.md, cell 20
def gathered(tree: Any, trainer: Trainer) -> Any:
    """Arrays as this process's own, from wherever they lie."""
    everywhere = trainer.like.step.sharding
    gather = jax.jit(hosts.identity, out_shardings=everywhere)
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)),
                        gather(tree))


# %% book/chapters/23b_runs.md, cell 21
@contextlib.contextmanager
def patient(bar: Any) -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C asks to stop and a step is finished.

    A second Ctrl-C ends the process at once, as a kill would. What is
    yielded says whether the run was asked. Processes that run together
    are not patient: the others would wait.
    """
    asked: list[bool] = []

    def ask(*_: Any) -> None:
        if asked:
            os._exit(130)
        asked.append(True)
        bar.set_postfix_str("stopping after this step")

    main = threading.current_thread() is threading.main_thread()
    if not main or jax.process_count() > 1:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


class NotFinite(ValueError):
    """A step is not finite; nothing was saved after it."""


# %% book/chapters/23b_runs.md, cell 22
def train(
    trainer: Trainer, rows: Packed, run: RunSpec, folder: Path,
    about: dict[str, Any],
    evaluate: Callable[[Params], float] | None = None,
) -> TrainState:
    """Train, from where `folder` left off, to the last step.

    `about` says what run it is and is saved with each state.
    `evaluate` gives bits per byte. NotFinite where a step is not;
    OSError where a state cannot be saved. Ctrl-C saves a state first
    and is a KeyboardInterrupt then.
    """
    spec, first = trainer.spec, jax.process_index() == 0
    kept = Checkpoints(folder / "checkpoints", run.keep)
    fresh = kept.latest is None
    state = trainer.begin() if fresh else kept.restore(trainer.like)
    start, tokens = int(state.step), spec.batch * spec.length
    log = RunLog(folder / "log.jsonl", start) if first else None
    bar = tqdm(
        total=spec.steps * tokens, initial=start * tokens,
        unit=" tokens", unit_scale=True, file=sys.stderr,
        disable=not first,
    )
    with bar, patient(bar) as stopping:
        clock, since = time.perf_counter(), start
        for i in range(start, spec.steps):
            batch = batch_at(rows, i, spec.batch, spec.seed)
            state, report = trainer.step(state, batch)
            if not report.pop("finite"):
                whole = gathered(state, trainer)
                why = find_fault(whole, batch, trainer.config, spec)
                raise NotFinite(
                    f"step {i} is not finite, {why}; "
                    f"nothing was saved after step {kept.latest or 0}"
                )
            bar.update(tokens)
            done, last = i + 1, i + 1 == spec.steps
            if done % run.log_every == 0 or last:
                values = {n: float(v) for n, v in report.items()}
                spent = time.perf_counter() - clock
                speed = (done - since) * tokens / spent
                bar.set_postfix_str(f"loss {values['nll']:.3f}")
                if log:
                    log.write(step=done, **values,
                              tokens_per_second=round(speed))
                clock, since = time.perf_counter(), done
            every = run.evaluate_every or spec.steps
            if evaluate and (done % every == 0 or last):
                bits = evaluate(state.params)
                if log:
                    log.write(step=done, bits_per_byte=bits)
                clock, since = time.perf_counter(), done
            stop = stopping()
            if done % run.save_every == 0 or last or stop:
                kept.save(state, about)
                clock, since = time.perf_counter(), done
            if stop and not last:
                raise KeyboardInterrupt(
                    f"stopped after step {done}, which is saved: the "
                    "same command goes on from there"
                )
    return state


# %% book/chapters/23b_runs.md, cell 29
def check_same_run(
    folder: Path, found: dict[str, Any], about: dict[str, Any]
) -> None:
    """ValueError where a folder holds another run."""
    may_change = "train.steps", "train.schedule.decay"
    old, new = hosts.named_leaves(found), hosts.named_leaves(about)
    for name in {**new, **old}:
        if name in may_change or old.get(name) == new.get(name):
            continue
        raise ValueError(
            f"{folder} holds a run with {name} = {old.get(name)!r}; "
            f"this one has {new.get(name)!r}: give it another [run] "
            "folder, or the same value to go on"
        )


def digest(rows: Packed) -> str:
    """The same for the same rows alone."""
    found = hashlib.sha256()
    for a in rows:
        found.update(np.ascontiguousarray(a).tobytes())
    return found.hexdigest()[:16]
