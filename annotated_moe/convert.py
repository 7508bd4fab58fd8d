# Generated from book/chapters/10_convert.md by `make sync`; edit the chapter.
"""Grok-1 takes 318 GB on disk, so a program that loads it to write it
down again in another layout needs a machine with 318 GB of memory, and
some hours in which nothing may happen. This chapter holds a block of 16
MiB, and anything may happen. By its end you will have `annotated-moe
convert`, which carries a checkpoint between three layouts a block at a
time, goes on where it was killed, and puts nothing under the new name
before the last byte is safe.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from annotated_moe import checkpoints as ck
from annotated_moe.checkpoints import CheckpointError, Part
from annotated_moe.model import ModelConfig, Variations
from annotated_moe.quantization import QuantizedTensor, quantize
from annotated_moe.vision import (
    IMAGE_FILES,
    IMAGE_IDS,
    preprocessor_config,
    vision_names,
    write_vision,
)


# %% book/chapters/10_convert.md, cell 6
def text(word: str) -> bytes:
    """SHORT_BINUNICODE: a text of at most 255 bytes."""
    data = word.encode()
    return b"\x8c" + bytes([len(data)]) + data


# %% book/chapters/10_convert.md, cell 7
def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL: two texts, and pickle imports what they name."""
    return text(module) + text(name) + b"\x93"


# %% book/chapters/10_convert.md, cell 8
def integer(value: int) -> bytes:
    """The shortest of BININT1, BININT2 and BININT."""
    if 0 <= value < 2**8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 2**16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little", signed=True)


# %% book/chapters/10_convert.md, cell 9
def dtype_program(dtype: np.dtype) -> bytes:
    """What leaves `dtype` on pickle's stack."""
    codes = {"float32": ("f4", "<"), "int8": ("i1", "|")}
    if dtype.name in codes:
        code, order = codes[dtype.name]
        what, sizes = text(code), (-1, -1, 0)
    else:
        order = "<"
        what, sizes = named("ml_dtypes", "bfloat16"), (2, 2, 64)
    made = named("numpy", "dtype") + what + b"\x89\x88\x87R"
    state = integer(3) + text(order) + b"NNN"
    return made + b"(" + state + b"".join(map(integer, sizes)) + b"tb"


# %% book/chapters/10_convert.md, cell 10
def array_parts(w: Any, name: str) -> list[Part]:
    """An array's program, its data, and the end of its program."""
    made = named("numpy.core.multiarray", "_reconstruct")
    made += named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    shape = b"(" + b"".join(map(integer, w.shape)) + b"t"
    head = made + b"(" + integer(1) + shape + dtype_program(w.dtype)
    data = Part(w, name)
    width, op = (4, b"B") if data.size < 2**32 else (8, b"\x8e")
    head += b"\x89" + op + data.size.to_bytes(width, "little")
    return [around(head), data, around(b"tb")]


# %% book/chapters/10_convert.md, cell 11
def around(data: bytes) -> Part:
    """Bytes that belong to no tensor."""
    return Part(np.frombuffer(data, np.uint8))


# %% book/chapters/10_convert.md, cell 12
def pickle_parts(w: Any, name: str) -> list[Part]:
    """One file of the Grok-1 layout: an array, or int8 and scales."""
    start, stop = around(b"\x80\x04"), around(b".")
    if not isinstance(w, QuantizedTensor):
        return [start, *array_parts(w, name), stop]
    pair = named("__main__", "QuantizedWeight8bit") + b")\x81}("
    return [
        start,
        around(pair + text("weight")),
        *array_parts(w.weight, f"{name}.weight"),
        around(text("scales")),
        *array_parts(w.scales, f"{name}.scales"),
        around(b"ub"),
        stop,
    ]


# %% book/chapters/10_convert.md, cell 15
Plan = dict[str, list[Part]]
Tensors = dict[str, Any]


# %% book/chapters/10_convert.md, cell 16
def part_of(w: Any, index: int | None) -> Any:
    """One layer, or one expert of a layer; all of it for None."""
    if index is None:
        return w
    if isinstance(w, QuantizedTensor):
        return QuantizedTensor(w.weight[index], w.scales[index])
    return w[index]


# %% book/chapters/10_convert.md, cell 17
def plan_ours(tensors: Tensors, config: ModelConfig, most: int) -> Plan:
    parts = ck.safetensors_parts(ck.flat_arrays(tensors))
    return {ck.ONE_FILE: parts}


# %% book/chapters/10_convert.md, cell 18
def plan_grok(tensors: Tensors, config: ModelConfig, most: int) -> Plan:
    plan = {}
    for i, name in enumerate(ck.grok_paths(config)):
        path, layer = ck.our_path(name)
        file = f"tensor{i:05d}_000"
        w = part_of(tensors[path], layer)
        plan[f"ckpt-0/{file}"] = pickle_parts(w, file)
    return plan


# %% book/chapters/10_convert.md, cell 19
def their_tensors(
    family: ck.Family, tensors: Tensors, config: ModelConfig
) -> Iterator[tuple[str, Any]]:
    """(name, array) of every tensor of a family's layout.

    Rows of one name are parts of one tensor, behind one another.
    """
    rows = [row for row in family.weights if row[1] in tensors]
    for theirs in dict.fromkeys(row[0] for row in rows):
        parts = [row for row in rows if row[0] == theirs]
        for name, index in their_names(family, parts[0], config):
            found = [
                changed(tensors[path], index, ck.CHANGES[change][1],
                        config)
                for _, path, change in parts
            ]
            for i, end in enumerate(("", "_scale")[: len(found[0])]):
                own = [arrays[i] for arrays in found]
                joined = own[0] if len(own) == 1 else ck.Joined(own)
                yield name + end, joined


# %% book/chapters/10_convert.md, cell 20
def their_names(
    family: ck.Family, row: tuple[str, str, str], config: ModelConfig
) -> Iterator[tuple[str, list[int]]]:
    """Each tensor that a row stands for, and its index in our stack."""
    theirs, path, _ = row
    if config.vision and path.startswith("vision/"):
        names = vision_names(theirs, config.vision)
        stacked = "{i}" in theirs
        yield from ((n, [i][:stacked]) for i, n in enumerate(names))
        return
    if not path.startswith("decoder_layer/"):
        yield ck.their_name(family, theirs, None, None), []
        return
    each = "{expert}" in theirs
    experts = range(config.num_experts) if each else [None]
    for i, layer in enumerate(ck.layers_of(path, config)):
        for expert in experts:
            name = ck.their_name(family, theirs, layer, expert)
            yield name, [i] if expert is None else [i, expert]


# %% book/chapters/10_convert.md, cell 21
def changed(
    w: Any, index: list[int], write: ck.Change, config: ModelConfig
) -> list[Any]:
    """A tensor as the layout wants it, and its scales if it has any."""
    for i in index:
        w = part_of(w, i)
    if isinstance(w, QuantizedTensor):
        return [write(w.weight, config), write(w.scales, config)]
    return [write(w, config)]


# %% book/chapters/10_convert.md, cell 22
def in_shards(arrays: Tensors, most: int) -> list[Tensors]:
    """Groups of at most `most` bytes, or of a single tensor."""
    groups: list[Tensors] = [{}]
    room = most
    for name, w in arrays.items():
        size = Part(w).size
        if size > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][name] = w
        room -= size
    return groups


# %% book/chapters/10_convert.md, cell 23
def architecture(config: ModelConfig) -> str:
    """The one whose files can say all that `config` says.

    CheckpointError if there is none.
    """
    for name, family in ck.FAMILIES.items():
        known = {row[1] for row in family.weights}
        if set(ck.expected(config)) - known:
            continue
        settings = family_settings(name, config)
        with contextlib.suppress(CheckpointError):
            if ck.settings_of(Path(name), family, settings) == config:
                return name
    raise CheckpointError(
        "no architecture of the hf layout is a model like this one: "
        "write it with --to ours"
    )


# %% book/chapters/10_convert.md, cell 24
def family_settings(name: str, config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` of architecture `name`."""
    family, values = ck.FAMILIES[name], asdict(config)
    named = {n: values[ours] for n, ours in family.fields.items()}
    text = {**named, **family.fixed, **family.write(values)}
    if not family.text:
        return {"architectures": [name], **text}
    return {
        "architectures": [name],
        family.text: {**text, "model_type": "llama4_text"},
        "vision_config": write_vision(values["vision"]),
        **{n: values["vision"][o] for n, o in IMAGE_IDS.items()},
    }


# %% book/chapters/10_convert.md, cell 25
def plan_hf(tensors: Tensors, config: ModelConfig, most: int) -> Plan:
    """One file, or shards and their index."""
    family = ck.FAMILIES[architecture(config)]
    arrays = dict(their_tensors(family, tensors, config))
    groups = in_shards(arrays, most)
    if len(groups) == 1:
        return {ck.ONE_FILE: ck.safetensors_parts(groups[0])}
    plan: Plan = {}
    index: dict[str, str] = {}
    total = sum(Part(w).size for w in arrays.values())
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        plan[file] = ck.safetensors_parts(group)
        index |= dict.fromkeys(group, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    plan[ck.INDEX] = [around(json.dumps(content, indent=1).encode())]
    return plan


# %% book/chapters/10_convert.md, cell 26
GROK_HF = "Grok1ModelForCausalLM"
MODEL_TYPES = {
    GROK_HF: "grok-1",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Llama4ForCausalLM": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
}


# %% book/chapters/10_convert.md, cell 27
def hf_settings(config: ModelConfig) -> dict[str, Any]:
    name = architecture(config)
    settings = family_settings(name, config)
    if name == GROK_HF:
        scheme = {"quant_method": "int8-weight-scale", "bits": 8}
        settings["quantization_config"] = scheme
    return {**settings, "model_type": MODEL_TYPES[name]}


# %% book/chapters/10_convert.md, cell 28
def grok_settings(config: ModelConfig) -> dict[str, Any]:
    standard, values = ModelConfig(), asdict(config)
    names = [f.name for f in fields(Variations)]
    for name in ("attn_softcap", "rope_base", *names):
        if values[name] != getattr(standard, name):
            raise CheckpointError(
                f"the grok-1 layout has no field for {name}, which is "
                f"{values[name]} here, {getattr(standard, name)} there"
            )
    widening = -(-3 * config.d_ff // 2) / config.d_model
    if ck.ffn_size(config.d_model, widening) != config.d_ff:
        raise CheckpointError(
            f"the grok-1 layout has no widening_factor for d_ff="
            f"{config.d_ff}: it must be a multiple of 8"
        )
    flat = {n: values[ours] for n, ours in ck.GROK_NAMES.items()}
    return {**flat, "widening_factor": widening}


# %% book/chapters/10_convert.md, cell 29
TARGETS: dict[str, tuple[Callable, Callable]] = {
    "ours": (plan_ours, ck.our_settings),
    "grok-1": (plan_grok, grok_settings),
    "hf": (plan_hf, hf_settings),
}


# %% book/chapters/10_convert.md, cell 30
SYNC = 2**25
JOURNAL = "journal"


# %% book/chapters/10_convert.md, cell 31
class Journal(ck.Watcher):
    """Notes in `file` what is safe; `done` is file -> bytes."""

    def __init__(self, file: IO[bytes], tell: Callable) -> None:
        super().__init__()
        self.file, self.tell = file, tell
        self.done: dict[str, int] = {}
        self.noted: set[str] = set()
        self.waiting = 0

    def note(self, **line: Any) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def wrote(self, path: Path, size: int) -> None:
        self.tell(size)
        self.waiting += size
        if self.waiting >= SYNC:
            self.closed(path)

    def closed(self, path: Path) -> None:
        """What `path` holds by now is put on disk, then noted."""
        ck.sync(path)
        new = set(self.sums) - self.noted
        sums = {name: self.sums[name] for name in sorted(new)}
        self.note(file=path.name, at=path.stat().st_size, sums=sums)
        self.noted |= new
        self.waiting = 0


# %% book/chapters/10_convert.md, cell 32
def replay(journal: Journal) -> str | None:
    """Take up the lines that are there; which job they belong to."""
    job, end = None, 0
    journal.file.seek(0)
    for line in journal.file.read().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)
        end += len(line)
        job = entry.get("job", job)
        journal.sums |= entry.get("sums", {})
        if "file" in entry:
            journal.done[entry["file"]] = entry["at"]
    journal.file.truncate(end)
    journal.noted = set(journal.sums)
    return job


# %% book/chapters/10_convert.md, cell 33
def files_of(folder: Path) -> list[Path]:
    """The checkpoint's files, and what stands beside it."""
    inside = folder / "ckpt-0"
    names = [folder / name for name in sorted(ck.names_in(folder))]
    if inside in names:
        names += [inside / name for name in sorted(ck.names_in(inside))]
    return [path for path in names if path.is_file()]


# %% book/chapters/10_convert.md, cell 34
def job_of(folder: Path, to: str, most: int) -> str:
    """A name for one conversion of one state of one folder."""
    stats = [(str(p), p.stat()) for p in files_of(folder)]
    state = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    words = json.dumps([state, to, most, ck.BLOCK])
    return hashlib.sha256(words.encode()).hexdigest()


# %% book/chapters/10_convert.md, cell 35
@contextmanager
def locked(folder: Path) -> Iterator[IO[bytes]]:
    """The journal of a partial folder, for one process at a time."""
    import fcntl  # which Windows lacks: it may import this module

    folder.mkdir(exist_ok=True)
    with open(folder / JOURNAL, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder} is being written by another convert: wait "
                "for it, or choose another folder"
            ) from None
        yield file


# %% book/chapters/10_convert.md, cell 36
def check_target(source: Path, target: Path) -> None:
    """CheckpointError unless `target` is a free name in a folder."""
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{target.parent} is not a folder: make it first"
        )
    folder = target.is_dir() and not target.is_symlink()
    empty = folder and not os.listdir(target)
    if os.path.lexists(target) and not empty:
        raise CheckpointError(
            f"{target} exists already: choose another name"
        )
    inside = target.parent.resolve() / target.name
    if inside.is_relative_to(source.resolve()):
        raise CheckpointError(
            f"{target} lies within {source}: choose another folder"
        )


# %% book/chapters/10_convert.md, cell 37
def check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed:,} bytes more and its disk has "
            f"{free:,}: make room or choose another disk"
        )


# %% book/chapters/10_convert.md, cell 38
WEIGHTS = {
    "config.json", "checksums.json", ck.INDEX, "ckpt-0",
    "params.json", "checklist.chk",             # Meta's
}

def companions(folder: Path) -> list[Path]:
    """The tokenizer and whatever else lies beside the weights."""
    names = ck.names_in(folder) - WEIGHTS
    files = [folder / n for n in sorted(names) if n[0] != "."]
    weights = {".safetensors", ".pth"}
    other = [p for p in files if p.suffix not in weights]
    return [path for path in other if path.is_file()]


# %% book/chapters/10_convert.md, cell 39
def write_plan(new: Path, plan: Plan, journal: Journal) -> None:
    """Every file of the plan, from where the journal says it stands."""
    for name, parts in plan.items():
        path = new / name
        path.parent.mkdir(exist_ok=True)
        at = journal.done.get(path.name, 0)
        if at and (not path.is_file() or path.stat().st_size < at):
            raise CheckpointError(
                f"{new} is not as its journal says: remove it and "
                "start again"
            )
        ck.write_file(path, parts, journal, at)
        ck.sync(path.parent)


# %% book/chapters/10_convert.md, cell 40
def finish(
    new: Path,
    target: Path,
    folder: Path,
    settings: dict[str, Any],
    sums: dict[str, str],
) -> None:
    """Add what is small, then give `new` its name."""
    for file in companions(folder):
        shutil.copyfile(file, new / file.name)
        ck.sync(new / file.name)
    ordered = dict(sorted(sums.items()))    # also after a resumption
    ck.write_json(new / "checksums.json", {"sha256": ordered})
    ck.write_json(new / "config.json", settings)
    (new / JOURNAL).unlink()
    ck.sync(new)
    os.rename(new, target)
    ck.sync(target.parent)


# %% book/chapters/10_convert.md, cell 41
@contextmanager
def cleared(new: Path) -> Iterator[None]:
    """Remove `new` when an error ends the work, not when a kill."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            what = f"{error.filename or new}: {error.strerror}"
            raise CheckpointError(what) from None
        raise


# %% book/chapters/10_convert.md, cell 42
def begin(journal: Journal, new: Path, job: str) -> None:
    """Take up the journal, or start one, for this job and no other."""
    found = replay(journal)
    if found is None:
        journal.note(job=job)
    elif found != job:
        raise CheckpointError(
            f"{new} holds the beginning of another conversion, or "
            "its source has changed since: remove it and start again"
        )


# %% book/chapters/10_convert.md, cell 43
def counter(total: int, tell: Callable[[int, int], None]) -> Callable:
    """Adds up what a journal hears, for somebody who watches."""
    done = 0

    def add(size: int) -> None:
        nonlocal done
        done += size
        tell(done, total)

    return add


# %% book/chapters/10_convert.md, cell 44
def silent(done: int, total: int) -> None:
    """Nobody watches."""


# %% book/chapters/10_convert.md, cell 45
def check_options(to: str, most: int | None) -> int:
    """The size of a shard; ValueError for what makes no sense."""
    if to not in TARGETS:
        raise ValueError(f"to must be {', '.join(TARGETS)}: {to!r}")
    if most is not None and (to != "hf" or most < 1):
        raise ValueError(
            f"max_shard_size is a number of bytes, for hf only: {most}"
        )
    return 5 * 10**9 if most is None else most


# %% book/chapters/10_convert.md, cell 46
def unsaid(folder: Path, c: ModelConfig) -> Plan:
    """The file of settings that a folder of Meta's has not."""
    names = ck.names_in(folder)
    said = names & set(IMAGE_FILES) or "params.json" not in names
    if c.vision is None or said:
        return {}
    text = json.dumps(preprocessor_config(c.vision), indent=1)
    return {IMAGE_FILES[0]: [around(text.encode())]}


# %% book/chapters/10_convert.md, cell 47
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "ours",
    max_shard_size: int | None = None,
    tell: Callable[[int, int], None] = silent,
) -> None:
    """Write the checkpoint `source` in another layout to `target`.

    `to` is "ours", "grok-1" or "hf"; for "hf", shards have at most
    `max_shard_size` bytes [5 GB]. Raises CheckpointError and leaves
    nothing behind; killed, the same call goes on. `tell(done, total)`
    hears of bytes.
    """
    most = check_options(to, max_shard_size)
    target = Path(target).absolute()
    config, read, where = ck.find_layout(Path(source))
    folder, (plan_for, settings_for) = ck.beside(where), TARGETS[to]
    check_target(folder, target)
    settings = settings_for(config)
    plan = plan_for(read(where, config), config, most)
    plan |= unsaid(folder, config)
    job = partial(job_of, folder, to, most)
    carry_out(folder, target, plan, settings, job, tell)


# %% book/chapters/10_convert.md, cell 48
def carry_out(
    folder: Path,
    target: Path,
    plan: Plan,
    settings: dict[str, Any],
    job: Callable[[], str],
    tell: Callable[[int, int], None],
) -> None:
    """Write `plan` to the partial folder, and let that be `target`."""
    new = target.parent / f".{target.name}.partial"
    total = sum(part.size for parts in plan.values() for part in parts)
    if not new.is_dir():
        check_room(target, total)
    with locked(new) as file:
        journal, before = Journal(file, counter(total, tell)), job()
        begin(journal, new, before)
        with cleared(new):
            write_plan(new, plan, journal)
            if job() != before:
                raise CheckpointError(
                    f"{folder} was changed while it was read: "
                    "start again"
                )
            finish(new, target, folder, settings, journal.sums)


# %% book/chapters/10_convert.md, cell 58
class Bar:
    """Progress on stderr: a line that moves, or one each tenth."""

    def __init__(self) -> None:
        self.start, self.shown = time.perf_counter(), -1
        self.moves = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        share = 100 * done // total
        share -= 0 if self.moves else share % 10
        if share <= self.shown:
            return
        self.shown = share
        speed = done / 1e6 / max(time.perf_counter() - self.start, 1e-6)
        of = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        line = f"{share:3d} %  {of}, {speed:,.0f} MB/s"
        end = "\r" if self.moves and share < 100 else "\n"
        wide = f"{line:50s}" if self.moves else line
        print(wide, end=end, file=sys.stderr, flush=True)


# %% book/chapters/10_convert.md, cell 59
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

def size_of(word: str) -> int:
    """"5GB" as a number of bytes; ValueError for anything else."""
    number = word.upper().rstrip("KMGTB")
    unit = word.upper()[len(number) :]
    if unit not in UNITS or not number.isdecimal():
        raise ValueError(f"no size: {word!r}; write 500MB, or 5GB")
    return int(number) * UNITS[unit]


# %% book/chapters/10_convert.md, cell 60
def run_convert(args: argparse.Namespace) -> None:
    most = args.max_shard_size
    size = None if most is None else size_of(most)
    try:
        convert(args.source, args.target, args.to, size, Bar())
    except KeyboardInterrupt:
        print(
            "\nStopped; the same command goes on from here.",
            file=sys.stderr,
        )
        raise


# %% book/chapters/10_convert.md, cell 61
def add_convert(commands: Any) -> None:
    """The subcommand `convert`, for `annotated-moe`'s parser."""
    text = "write a checkpoint in another layout, a block at a time"
    sub = commands.add_parser("convert", help=text, description=text)
    sub.set_defaults(run=run_convert)
    add = sub.add_argument
    add("source", metavar="SRC", help="checkpoint folder, any layout")
    add("target", metavar="DST", help="new folder")
    add("--to", choices=list(TARGETS), default="ours", help="[ours]")
    size = "of a file, such as 500MB; with --to hf [5GB]"
    add("--max-shard-size", metavar="SIZE", help=size)


# %% book/chapters/10_convert.md, cell 64
@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix [D, F] in 8 bits: its `weight` or its `scales`.

    Made when its values are asked for, a block of columns at a time.
    """

    source: Any
    path: str
    what: str

    @property
    def shape(self) -> tuple[int, ...]:
        d, f = self.source.shape
        whole = self.what == "weight"
        return (d if whole else ck.groups_for(self.path, d), f)

    @property
    def dtype(self) -> np.dtype:
        eight = np.dtype(np.int8)
        return eight if self.what == "weight" else BFLOAT16

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return rounded(np.asarray(self.source), self)


# %% book/chapters/10_convert.md, cell 65
BFLOAT16 = ck.CODES["BF16"]


# %% book/chapters/10_convert.md, cell 66
def rounded(w: np.ndarray, r: Rounded) -> np.ndarray:
    """`w` as `r` says. CheckpointError if it is not finite."""
    out, inputs = np.empty(r.shape, r.dtype), len(w)
    groups = ck.groups_for(r.path, inputs)
    step = max(1, ck.BLOCK // (16 * inputs))
    for start in range(0, w.shape[1], step):
        some = slice(start, start + step)
        new, good = round_block(w[:, some], groups, r.what)
        if not good:
            why = "cannot quantize a weight with NaN or inf"
            raise CheckpointError(f"{r.path}: {why}")
        out[:, some] = new
    return out


# %% book/chapters/10_convert.md, cell 67
@partial(jax.jit, static_argnames=("groups", "what"))
def round_block(
    w: Float[Array, "D F"], groups: int, what: str
) -> tuple[Array, Bool[Array, ""]]:
    """`weight` or `scales` of some columns, and if all are finite."""
    q = quantize(w, groups)
    return getattr(q, what), jnp.isfinite(w).all()


# %% book/chapters/10_convert.md, cell 68
def to_round(w: Any, path: str, what: str) -> Any:
    """`Rounded` for every matrix of a stack of them."""
    if len(w.shape) == 2:
        return Rounded(w, path, what)
    matrices = (w[i] for i in range(w.shape[0]))
    return ck.Stack([to_round(m, path, what) for m in matrices])


# %% book/chapters/10_convert.md, cell 69
def in_8_bits(path: str, w: Any) -> Any:
    """A tensor as it will be written; nothing is rounded yet."""
    if isinstance(w, QuantizedTensor) or not ck.may_be_quantized(path):
        return w
    names = ("weight", "scales")
    return QuantizedTensor(*(to_round(w, path, n) for n in names))


# %% book/chapters/10_convert.md, cell 70
def quantize_files(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tell: Callable[[int, int], None] = silent,
) -> None:
    """Write the checkpoint `source` in 8 bits, in our layout.

    What is quantized already is copied. Errors, and what is left
    behind by them: as of `convert`.
    """
    target = Path(target).absolute()
    config, read, where = ck.find_layout(Path(source))
    folder = ck.beside(where)
    check_target(folder, target)
    found = read(where, config)
    tensors = {path: in_8_bits(path, w) for path, w in found.items()}
    plan = plan_ours(tensors, config, 0)
    settings = ck.our_settings(config)
    job = partial(job_of, folder, "8 bits", 0)
    carry_out(folder, target, plan, settings, job, tell)


# %% book/chapters/10_convert.md, cell 71
def run_quantize(args: argparse.Namespace) -> None:
    quantize_files(args.source, args.target, Bar())


# %% book/chapters/10_convert.md, cell 72
def add_quantize(commands: Any) -> None:
    """The subcommand `quantize`, for `annotated-moe`'s parser."""
    text = "write a checkpoint with matrices of 8-bit integers"
    sub = commands.add_parser("quantize", help=text, description=text)
    sub.set_defaults(run=run_quantize)
    sub.add_argument("source", metavar="SRC", help="checkpoint folder")
    sub.add_argument("target", metavar="DST", help="new folder")
