# Generated from book/chapters/10_convert.md, book/chapters/14_hub.md, book/chapters/15_meta.md by `make sync`; edit the chapters.
"""Grok-1 takes 318 GB on disk, so a program that loads it to write it
down again in another layout needs a machine with 318 GB of memory, and
some hours in which nothing may happen. This chapter holds a block of 16
MiB, and anything may happen. By its end you will have `annotated-moe
convert`, which carries a checkpoint from one layout to another a block
at a time, goes on where it was killed, and puts nothing under the new
name before the last byte is safe; and `annotated-moe quantize`, which
rounds a model to 8 bits on the way.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from annotated_moe.checkpoints import (
    Opened,
    Tensors,
    Verification,
    groups_for,
    meta_tokenizer,
    open_checkpoint,
)
from annotated_moe.config import ModelConfig
from annotated_moe.families.grok import grok_sizes, like_grok
from annotated_moe.formats import lazy
from annotated_moe.formats.files import CheckpointError, list_folder
from annotated_moe.formats.grok1 import (
    FIELD_NAMES,
    ffn_size,
    our_path,
    release_names,
)
from annotated_moe.formats.hub import (
    FAMILIES,
    TRANSFORMS,
    Entry,
    Family,
    Fields,
    entries,
)
from annotated_moe.formats.lazy import ConcatenatedArray, StackedArray
from annotated_moe.formats.meta import find_meta, meta_companions
from annotated_moe.formats.native import flat_arrays, native_settings
from annotated_moe.formats.safetensors import (
    DTYPE_CODES,
    INDEX,
    ONE_FILE,
    safetensors_parts,
)
from annotated_moe.formats.writing import (
    Part,
    Watcher,
    fsync_path,
    write_file,
    write_json,
)
from annotated_moe.model import flat_specs
from annotated_moe.params import ParamSpec
from annotated_moe.quantization import QuantizedTensor, quantize

# %% book/chapters/10_convert.md, cell 8
SYNC = 2**25
JOURNAL = "journal"


# %% book/chapters/10_convert.md, cell 9
class Journal(Watcher):
    """Notes in `file` what is safe; `done` is file -> bytes.

    What is read is shown to `source`, if there is one.
    """

    def __init__(
        self, file: IO[bytes], tell: Callable,
        source: Verification | None = None,
    ) -> None:
        super().__init__()
        self.file, self.tell, self.source = file, tell, source
        self.done: dict[str, int] = {}
        self.noted: set[str] = set()
        self.waiting = 0

    def note(self, **line: Any) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def read(self, block: np.ndarray) -> None:
        if self.source is not None:
            self.source.read(block)

    def wrote(self, path: Path, size: int) -> None:
        self.tell(size)
        self.waiting += size
        if self.waiting >= SYNC:
            self.closed(path)

    def closed(self, path: Path) -> None:
        """What `path` holds by now is put on disk, then noted."""
        fsync_path(path)
        new = set(self.sums) - self.noted
        sums = {name: self.sums[name] for name in sorted(new)}
        self.note(file=path.name, at=path.stat().st_size, sums=sums)
        self.noted |= new
        self.waiting = 0


# %% book/chapters/10_convert.md, cell 10
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


# %% book/chapters/10_convert.md, cell 11
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


# %% book/chapters/10_convert.md, cell 14
def files_of(folder: Path) -> list[Path]:
    """The checkpoint's files, and what stands beside it."""
    inside = folder / "ckpt-0"
    names = [folder / name for name in sorted(list_folder(folder))]
    if inside in names:
        names += [inside / name for name in sorted(list_folder(inside))]
    return [path for path in names if path.is_file()]


# %% book/chapters/10_convert.md, cell 15
def job_of(folder: Path, to: str, most: int) -> str:
    """A name for one conversion of one state of one folder."""
    stats = [(str(p), p.stat()) for p in files_of(folder)]
    state = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    words = json.dumps([state, to, most, lazy.BLOCK])
    return hashlib.sha256(words.encode()).hexdigest()


# %% book/chapters/10_convert.md, cell 18
def text_op(word: str) -> bytes:
    """SHORT_BINUNICODE: a text of at most 255 bytes."""
    data = word.encode()
    return b"\x8c" + bytes([len(data)]) + data


def import_op(module: str, name: str) -> bytes:
    """STACK_GLOBAL: two texts, and pickle imports what they name."""
    return text_op(module) + text_op(name) + b"\x93"


def int_op(value: int) -> bytes:
    """The shortest of BININT1, BININT2 and BININT."""
    if 0 <= value < 2**8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 2**16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little", signed=True)


# %% book/chapters/10_convert.md, cell 19
def dtype_program(dtype: np.dtype) -> bytes:
    """What leaves `dtype` on pickle's stack."""
    codes = {"float32": ("f4", "<"), "int8": ("i1", "|")}
    if dtype.name in codes:
        code, order = codes[dtype.name]
        what, sizes = text_op(code), (-1, -1, 0)
    else:
        order = "<"
        what, sizes = import_op("ml_dtypes", "bfloat16"), (2, 2, 64)
    made = import_op("numpy", "dtype") + what + b"\x89\x88\x87R"
    state = int_op(3) + text_op(order) + b"NNN"
    return made + b"(" + state + b"".join(map(int_op, sizes)) + b"tb"


# %% book/chapters/10_convert.md, cell 20
def unnamed(data: bytes) -> Part:
    """Bytes that belong to no tensor."""
    return Part(np.frombuffer(data, np.uint8))


def array_parts(w: Any, name: str) -> list[Part]:
    """An array's program, its data, and the end of its program."""
    made = import_op("numpy.core.multiarray", "_reconstruct")
    made += import_op("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    shape = b"(" + b"".join(map(int_op, w.shape)) + b"t"
    head = made + b"(" + int_op(1) + shape + dtype_program(w.dtype)
    data = Part(w, name)
    width, op = (4, b"B") if data.size < 2**32 else (8, b"\x8e")
    head += b"\x89" + op + data.size.to_bytes(width, "little")
    return [unnamed(head), data, unnamed(b"tb")]


# %% book/chapters/10_convert.md, cell 21
def pickle_parts(w: Any, name: str) -> list[Part]:
    """One file of the Grok-1 layout: an array, or int8 and scales."""
    start, stop = unnamed(b"\x80\x04"), unnamed(b".")
    if not isinstance(w, QuantizedTensor):
        return [start, *array_parts(w, name), stop]
    pair = import_op("__main__", "QuantizedWeight8bit") + b")\x81}("
    return [
        start,
        unnamed(pair + text_op("weight")),
        *array_parts(w.weight, f"{name}.weight"),
        unnamed(text_op("scales")),
        *array_parts(w.scales, f"{name}.scales"),
        unnamed(b"ub"),
        stop,
    ]


# %% book/chapters/10_convert.md, cell 24
FilePlan = dict[str, list[Part]]                # file -> what it holds
Planner = Callable[[Tensors, ModelConfig, int], FilePlan]
Describer = Callable[[ModelConfig, Tensors], dict[str, Any]]


# %% book/chapters/10_convert.md, cell 25
def slice_of(w: Any, index: tuple[int, ...]) -> Any:
    """One layer, or one expert of a layer; all of it for ()."""
    if isinstance(w, QuantizedTensor):
        return QuantizedTensor(
            slice_of(w.weight, index), slice_of(w.scales, index)
        )
    for i in index:
        w = w[i]
    return w


# %% book/chapters/10_convert.md, cell 26
def plan_native(
    tensors: Tensors, config: ModelConfig, most: int
) -> FilePlan:
    """One file in our own layout."""
    return {ONE_FILE: safetensors_parts(flat_arrays(tensors))}


# %% book/chapters/10_convert.md, cell 27
def plan_release(
    tensors: Tensors, config: ModelConfig, most: int
) -> FilePlan:
    """A pickle for each tensor of each layer, as Grok-1's release."""
    paths = {"/".join(path): path for path in tensors}
    plan = {}
    names = release_names(paths, config.num_layers)
    for i, name in enumerate(names):
        path, layer = our_path(name)
        w = tensors[paths[path]]
        file = f"tensor{i:05d}_000"
        own = w if layer is None else slice_of(w, (layer,))
        plan[f"ckpt-0/{file}"] = pickle_parts(own, file)
    return plan


# %% book/chapters/10_convert.md, cell 29
def release_settings(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` of the release. CheckpointError for a model that
    it cannot describe.
    """
    attention = config.layer(0).attention
    if like_grok(config) != config:
        raise CheckpointError(
            "the grok-1 layout describes models of Grok-1's "
            "architecture, and this is none: write it with --to native"
        )
    assert attention.rope is not None
    if (attention.softcap, attention.rope.base) != (30.0, 10000.0):
        raise CheckpointError(
            "the grok-1 layout has no field for a soft cap other than "
            "30 or a RoPE base other than 10000"
        )
    width = config.layer(0).feed_forward.width
    widening = -(-3 * width // 2) / config.d_model
    if ffn_size(config.d_model, widening) != width:
        raise CheckpointError(
            f"the grok-1 layout has no widening_factor for a width of "
            f"{width}: it must be a multiple of 8"
        )
    sizes = grok_sizes(config)
    flat = {name: sizes[ours] for name, ours in FIELD_NAMES.items()}
    if len(config.eos_ids) != 1:
        raise CheckpointError(
            "the grok-1 layout has one eos_token, this model "
            f"{len(config.eos_ids)}"
        )
    flat["eos_token"] = config.eos_ids[0]
    return {**flat, "widening_factor": widening}


# %% book/chapters/10_convert.md, cell 30
TARGETS: dict[str, tuple[Planner, Describer]] = {
    "native": (plan_native, lambda c, _: native_settings(c)),
    "grok-1": (plan_release, lambda c, _: release_settings(c)),
}


# %% book/chapters/10_convert.md, cell 33
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


# %% book/chapters/10_convert.md, cell 34
def check_disk_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs {needed:,} bytes more and its disk has "
            f"{free:,}: make room or choose another disk"
        )


# %% book/chapters/10_convert.md, cell 35
WEIGHTS = {"config.json", "checksums.json", INDEX, "ckpt-0"}
WEIGHT_SUFFIXES = {".safetensors"}


def companions(folder: Path) -> list[Path]:
    """The tokenizer and whatever else lies beside the weights."""
    names = list_folder(folder) - WEIGHTS
    files = [folder / n for n in sorted(names) if n[0] != "."]
    other = [p for p in files if p.suffix not in WEIGHT_SUFFIXES]
    return [path for path in other if path.is_file()]


# %% book/chapters/10_convert.md, cell 36
def write_plan(new: Path, plan: FilePlan, journal: Journal) -> None:
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
        write_file(path, parts, journal, at)
        fsync_path(path.parent)


# %% book/chapters/10_convert.md, cell 37
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
        fsync_path(new / file.name)
    ordered = dict(sorted(sums.items()))    # also after a resumption
    write_json(new / "checksums.json", {"sha256": ordered})
    write_json(new / "config.json", settings)
    (new / JOURNAL).unlink()
    fsync_path(new)
    os.rename(new, target)
    fsync_path(target.parent)


# %% book/chapters/10_convert.md, cell 38
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


# %% book/chapters/10_convert.md, cell 39
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


# %% book/chapters/10_convert.md, cell 40
def silent(done: int, total: int) -> None:
    """Nobody watches."""


class Counter:
    """Adds up what a journal hears, for somebody who watches."""

    def __init__(
        self, total: int, tell: Callable[[int, int], None]
    ) -> None:
        self.total, self.tell, self.done = total, tell, 0

    def __call__(self, size: int) -> None:
        self.done += size
        self.tell(self.done, self.total)


# %% book/chapters/10_convert.md, cell 41
FileMaker = Callable[[Path, ModelConfig], FilePlan]
FILE_MAKERS: list[FileMaker] = []


def added_files(folder: Path, config: ModelConfig) -> FilePlan:
    """Files that a folder's layout has not and a copy should have."""
    plan: FilePlan = {}
    for make in FILE_MAKERS:
        plan |= make(folder, config)
    return plan


# %% book/chapters/10_convert.md, cell 42
def check_options(to: str, most: int | None) -> int:
    """The size of a shard; ValueError for what makes no sense."""
    if to not in TARGETS:
        raise ValueError(f"to must be {', '.join(TARGETS)}: {to!r}")
    if most is not None and (to != "hf" or most < 1):
        raise ValueError(
            f"max_shard_size is a number of bytes, for hf only: {most}"
        )
    return 5 * 10**9 if most is None else most


# %% book/chapters/10_convert.md, cell 43
def verification(
    opened: Opened, tell: Callable[[int], None]
) -> Verification | None:
    """For a checkpoint that has checksums, else None."""
    if not os.path.lexists(opened.folder / "checksums.json"):
        return None
    return Verification(opened, tell)


# %% book/chapters/10_convert.md, cell 44
def carry_out(
    opened: Opened,
    target: Path,
    plan: FilePlan,
    settings: dict[str, Any],
    job: Callable[[], str],
    tell: Callable[[int, int], None],
) -> None:
    """Write `plan` to the partial folder, and let that be `target`."""
    folder = opened.folder
    new = target.parent / f".{target.name}.partial"
    total = sum(part.size for parts in plan.values() for part in parts)
    if not new.is_dir():
        check_disk_space(target, total)
    count = Counter(total, tell)
    if (source := verification(opened, count)) is not None:
        count.total += source.size
    with locked(new) as file:
        journal, before = Journal(file, count, source), job()
        begin(journal, new, before)
        with cleared(new):
            write_plan(new, plan, journal)
            if source is not None:
                source.finish()
            if job() != before:
                raise CheckpointError(
                    f"{folder} was changed while it was read: "
                    "start again"
                )
            finish(new, target, folder, settings, journal.sums)


# %% book/chapters/10_convert.md, cell 45
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "native",
    max_shard_size: int | None = None,
    tell: Callable[[int, int], None] = silent,
) -> None:
    """Write the checkpoint `source` in another layout to `target`.

    `to` is a name in `TARGETS`; for "hf", shards have at most
    `max_shard_size` bytes [5 GB]. Raises CheckpointError and leaves
    nothing behind, also where `source` does not match checksums of its
    own; killed, the same call goes on. `tell(done, total)` hears of
    bytes.
    """
    most = check_options(to, max_shard_size)
    target = Path(target).absolute()
    opened = open_checkpoint(Path(source))
    folder, (plan_for, settings_for) = opened.folder, TARGETS[to]
    check_target(folder, target)
    tensors = opened.read()
    settings = settings_for(opened.config, tensors)
    plan = plan_for(tensors, opened.config, most)
    plan |= added_files(folder, opened.config)
    job = partial(job_of, folder, to, most)
    carry_out(opened, target, plan, settings, job, tell)


# %% book/chapters/10_convert.md, cell 53
BF16 = DTYPE_CODES["BF16"]


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix [D, F] in 8 bits: its `weight` or its `scales`.

    Made when its values are asked for, a block of columns at a time.
    """

    source: Any
    name: str
    groups: int
    what: str

    @property
    def shape(self) -> tuple[int, ...]:
        d, f = self.source.shape
        return (d if self.what == "weight" else self.groups, f)

    @property
    def dtype(self) -> np.dtype:
        eight = np.dtype(np.int8)
        return eight if self.what == "weight" else BF16

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return rounded(np.asarray(self.source), self)


# %% book/chapters/10_convert.md, cell 54
@partial(jax.jit, static_argnames=("groups", "what"))
def round_block(
    w: Float[Array, "D F"], groups: int, what: str
) -> tuple[Array, Bool[Array, ""]]:
    """`weight` or `scales` of some columns, and if all are finite."""
    q = quantize(w, groups)
    return getattr(q, what), jnp.isfinite(w).all()


# %% book/chapters/10_convert.md, cell 55
def rounded(w: np.ndarray, r: Rounded) -> np.ndarray:
    """`w` as `r` says. CheckpointError if it is not finite."""
    out, inputs = np.empty(r.shape, r.dtype), len(w)
    step = max(1, lazy.BLOCK // (16 * inputs))
    for start in range(0, w.shape[1], step):
        some = slice(start, start + step)
        new, finite = round_block(w[:, some], r.groups, r.what)
        if not finite:
            why = "cannot quantize a weight with NaN or inf"
            raise CheckpointError(f"{r.name}: {why}")
        out[:, some] = new
    return out


# %% book/chapters/10_convert.md, cell 56
def to_round(w: Any, name: str, groups: int, what: str) -> Any:
    """`Rounded` for every matrix of a stack of them."""
    if len(w.shape) == 2:
        return Rounded(w, name, groups, what)
    return StackedArray([
        to_round(w[i], name, groups, what) for i in range(w.shape[0])
    ])


# %% book/chapters/10_convert.md, cell 57
def in_8_bits(name: str, w: Any, spec: ParamSpec) -> Any:
    """A tensor as it will be written; nothing is rounded yet."""
    if isinstance(w, QuantizedTensor) or not spec.matrix:
        return w
    groups = groups_for(spec)
    return QuantizedTensor(*(
        to_round(w, name, groups, what) for what in ("weight", "scales")
    ))


# %% book/chapters/10_convert.md, cell 58
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
    opened = open_checkpoint(Path(source))
    folder, config = opened.folder, opened.config
    check_target(folder, target)
    specs = flat_specs(config)
    tensors = {
        path: in_8_bits("/".join(path), w, specs[path])
        for path, w in opened.read().items()
    }
    plan = plan_native(tensors, config, 0)
    settings = native_settings(config)
    job = partial(job_of, folder, "8 bits", 0)
    carry_out(opened, target, plan, settings, job, tell)


# %% book/chapters/14_hub.md, cell 32
def write_tensor(w: Any, entry: Entry) -> list[Any]:
    """A tensor as the layout wants it, and its scales if it has any."""
    w = slice_of(w, entry.index)
    change = TRANSFORMS[entry.transform].write
    if isinstance(w, QuantizedTensor):
        both = w.weight, w.scales
        return [change(part, entry.spec) for part in both]
    return [change(w, entry.spec)]


def hub_tensors(
    family: Family, tensors: Tensors, config: ModelConfig
) -> Iterator[tuple[str, Any]]:
    """(name, array) of every tensor of a family's layout.

    Entries of one name are parts of one tensor, behind one another.
    """
    named: dict[str, list[Entry]] = {}
    for entry in entries(family, config):
        named.setdefault(entry.name, []).append(entry)
    for name, parts in named.items():
        arrays = [write_tensor(tensors[e.path], e) for e in parts]
        for i, end in enumerate(("", "_scale")[: len(arrays[0])]):
            own = [pair[i] for pair in arrays]
            whole = own[0] if len(own) == 1 else ConcatenatedArray(own)
            yield name + end, whole


# %% book/chapters/14_hub.md, cell 33
def architecture_of(config: ModelConfig) -> str:
    """The one whose files can say all that `config` says.

    CheckpointError if there is none.
    """
    for name, family in FAMILIES.items():
        with contextlib.suppress(ValueError, AttributeError):
            raw = {"architectures": [name], **family.write(config)}
            if family.configure(Fields(Path(name), raw)) == config:
                return name
    raise CheckpointError(
        "no architecture of the hf layout is a model like this one: "
        "write it with --to native"
    )


def written_dtype(config: ModelConfig, tensors: Tensors) -> str:
    """The dtype of most numbers; of products where they are in int8."""
    sizes: dict[str, int] = {}
    for w in tensors.values():
        if isinstance(w, QuantizedTensor):
            return config.dtype
        name = str(w.dtype)
        sizes[name] = sizes.get(name, 0) + Part(w).size
    return max(sizes, key=lambda name: sizes[name])


def hub_settings(
    config: ModelConfig, tensors: Tensors
) -> dict[str, Any]:
    """A `config.json` of the layout for this model and its weights."""
    name = architecture_of(config)
    family = FAMILIES[name]
    settings = family.write(config)
    dtype = written_dtype(config, tensors)
    for fields in (settings, settings.get("text_config", {})):
        for field in fields.keys() & {"dtype", "torch_dtype"}:
            fields[field] = dtype
    return {
        "architectures": [name], "model_type": family.model_type,
        **settings,
    }


# %% book/chapters/14_hub.md, cell 34
def in_shards(
    arrays: dict[str, Any], most: int
) -> list[dict[str, Any]]:
    """Groups of at most `most` bytes, or of a single tensor."""
    groups: list[dict[str, Any]] = [{}]
    room = most
    for name, w in arrays.items():
        size = Part(w).size
        if size > room and groups[-1]:
            groups.append({})
            room = most
        groups[-1][name] = w
        room -= size
    return groups


def plan_hub(
    tensors: Tensors, config: ModelConfig, most: int
) -> FilePlan:
    """One file, or shards and their index."""
    family = FAMILIES[architecture_of(config)]
    arrays = dict(hub_tensors(family, tensors, config))
    groups = in_shards(arrays, most)
    about = {"format": "pt"}                # as transformers writes it
    if len(groups) == 1:
        return {ONE_FILE: safetensors_parts(groups[0], about)}
    plan: FilePlan = {}
    index: dict[str, str] = {}
    total = sum(Part(w).size for w in arrays.values())
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        plan[file] = safetensors_parts(group, about)
        index |= dict.fromkeys(group, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    text = json.dumps(content, indent=1).encode()
    plan[INDEX] = [Part(np.frombuffer(text, np.uint8))]
    return plan


TARGETS["hf"] = plan_hub, hub_settings


# %% book/chapters/15_meta.md, cell 32
WEIGHTS |= {
    "params.json", "checklist.chk", "pytorch_model.bin.index.json"
}
WEIGHT_SUFFIXES |= {".pth", ".bin"}


# %% book/chapters/15_meta.md, cell 70
def meta_files(folder: Path, config: ModelConfig) -> FilePlan:
    """What stands beside the weights elsewhere, and not here."""
    names = list_folder(folder)
    if find_meta(folder, names) is None:
        return {}
    files = meta_companions(config)
    if tokenizer := meta_tokenizer(folder, config):
        files[tokenizer.format.file_name] = tokenizer.model_bytes
    return {
        name: [Part(np.frombuffer(data, np.uint8))]
        for name, data in files.items() if name not in names
    }


FILE_MAKERS.append(meta_files)
