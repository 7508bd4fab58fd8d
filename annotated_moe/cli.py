# Generated from book/chapters/99_command_line.md by `make sync`; edit the chapter.
"""A reader without Python at hand types `annotated-moe generate
--prompt "In the beginning"`. Text goes to standard output as it comes;
everything else goes to standard error, and bad input is one line that
says what to do. By the end of this page you will have that program:
`generate`, `info`, `convert`, `quantize`, `plan`, train, and serve and
chat. It is plumbing, and none of it is needed to understand the model.
"""

import argparse
import contextlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from annotated_moe import hosts
from annotated_moe.cache import CACHE_KINDS
from annotated_moe.chat import chat_ids
from annotated_moe.chat_command import add_chat
from annotated_moe.checkpoints import (
    Opened,
    load,
    open_checkpoint,
    small_model,
    verify,
)
from annotated_moe.config import DTYPES
from annotated_moe.convert import TARGETS, convert, quantize_files
from annotated_moe.families.images import IMAGE, read_image
from annotated_moe.formats.native import flat_arrays
from annotated_moe.formats.writing import Part
from annotated_moe.generate import Model
from annotated_moe.model import flat_specs
from annotated_moe.parallel import EXCHANGES, make_mesh
from annotated_moe.plan import add_plan, parameter_counts, parse_mesh
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.serve_command import add_serve
from annotated_moe.specs import to_json
from annotated_moe.streaming import StreamedModel, with_progress
from annotated_moe.tokenizer import split_at
from annotated_moe.train_command import add_train


# %% book/chapters/99_command_line.md, cell 3
def say(text: str) -> None:
    """Status goes to stderr: stdout holds the text and nothing else."""
    print(text, file=sys.stderr, flush=True)


# %% book/chapters/99_command_line.md, cell 4
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


# %% book/chapters/99_command_line.md, cell 5
COMMANDS: dict[str, Callable[[Any], None]] = {}


def make_parser(command: str) -> argparse.ArgumentParser:
    """For one command, or for all where it is none of them."""
    text = "Run the mixture-of-experts model that the book builds."
    parser = Parser("annotated-moe", description=text)
    parser.add_argument(
        "--version", action="version",
        version=f"annotated-moe {version('annotated-moe')}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    names = [command] if command in COMMANDS else list(COMMANDS)
    for name in names:
        COMMANDS[name](commands)
    return parser


# %% book/chapters/99_command_line.md, cell 6
def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for bad input (one line says why), 130."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(words[0] if words else "").parse_args(words)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        say(f"annotated-moe: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# %% book/chapters/99_command_line.md, cell 7
def add_sampling(sub: argparse.ArgumentParser) -> None:
    """The options of `Model.stream`, with the same defaults."""
    usual = inspect.signature(Model.stream).parameters
    about: dict[str, tuple[Callable[[str], Any], str]] = {
        "max_new_tokens": (int, "how many tokens at most"),
        "temperature": (float, "0 is greedy"),
        "top_p": (float, "nucleus: the share of probability to keep"),
        "top_k": (int, "keep the k likeliest tokens; all unless given"),
        "seed": (int, "same seed, same text"),
        "speculate": (int, "guess so many tokens a step; same text"),
    }
    for name, (kind, text) in about.items():
        default = usual[name].default
        shown = "" if default is None else f" [{default}]"
        option = f"--{name.replace('_', '-')}"
        sub.add_argument(
            option, type=kind, default=default, help=text + shown
        )


# %% book/chapters/99_command_line.md, cell 8
def check_mesh_options(args: argparse.Namespace) -> None:
    """Count the devices of --mesh; ValueError for senseless options."""
    sizes = {"expert": 1}
    if args.mesh is not None:
        if args.devices != 1:
            raise ValueError(
                "--mesh and --devices say the same: give one")
        sizes = parse_mesh(args.mesh)
        args.devices = math.prod(sizes.values())
    if args.exchange != "sum" and sizes["expert"] == 1:
        raise ValueError(
            f"--exchange {args.exchange} needs a --mesh that deals "
            "experts out, such as 1x8x1"
        )


def mesh_for(args: argparse.Namespace) -> Mesh | None:
    """The mesh asked for, simulated where there are only CPUs.

    Without --mesh, all devices cut experts by their width.
    """
    devices = args.devices
    if not 1 <= devices <= 512:
        what = f"--mesh {args.mesh}" if args.mesh else "--devices"
        raise ValueError(
            f"{what} must be 1 to 512 devices, not {devices}"
        )
    if devices == 1:
        return None
    with contextlib.suppress(RuntimeError):
        # Only CPUs heed this, and only before a device is first used.
        jax.config.update("jax_num_cpu_devices", devices)
    if args.mesh is None:
        return make_mesh(model=devices)
    return make_mesh(**parse_mesh(args.mesh))


# %% book/chapters/99_command_line.md, cell 9
def load_model(args: argparse.Namespace) -> tuple[Model, str]:
    """The model, and a sentence about it."""
    start, devices = time.perf_counter(), args.devices
    model = load(
        args.model, mesh_for(args), args.dtype, args.stream,
        args.exchange, args.kv_cache,
    )
    spent = time.perf_counter() - start
    if model.tokenizer is None:
        raise ValueError(
            f"{args.model} has no tokenizer, without which no text can "
            "be read: put its tokenizer.model or tokenizer.json there"
        )
    kind = jax.devices()[0].platform.upper()
    total, _ = parameter_counts(model.config)
    where = f"{devices} {kind} device{'s' if devices > 1 else ''}"
    if args.stream:
        where += ", from disk as they are needed,"
    name = args.model or "the small model"
    return model, (
        f"Loaded {name} of {total / 1e6:,.1f} million parameters onto "
        f"{where} in {spent:.1f} s."
    )


# %% book/chapters/99_command_line.md, cell 10
def message_parts(prompt: str) -> list[dict[str, str]]:
    """A message's content, its images apart from its text."""
    return [
        {"type": "image"} if part == IMAGE
        else {"type": "text", "text": part}
        for part in split_at(prompt, [IMAGE]) if part
    ]


def ids_of_prompt(
    model: Model, args: argparse.Namespace, images: list[Any]
) -> tuple[list[int], Any]:
    """Ids and tiles of the prompt, or the conversation it opens."""
    prompt: Any = args.prompt
    if images and IMAGE not in prompt:
        prompt = IMAGE * len(images) + prompt
    if args.chat:
        content = message_parts(prompt) if images else prompt
        message = {"role": "user", "content": content}
        prompt = chat_ids(model.require_tokenizer(), [message])
    return model.read_prompt(prompt, images or None, args.add_bos)


# %% book/chapters/99_command_line.md, cell 11
def read_on(
    model: Model, prompt: list[int], ids: Iterator[int]
) -> Iterator[str]:
    """New text as it reads after the prompt."""
    text = model.require_tokenizer().stream()
    for token in prompt:
        text.push(token)
    for token in ids:
        yield text.push(token)
    yield text.flush()


# %% book/chapters/99_command_line.md, cell 12
def show(prompt: str, pieces: Iterator[str]) -> list[float]:
    """Print pieces as they come; when each token did."""
    times: list[float] = []
    for piece in pieces:
        text = piece if times else prompt + piece
        print(text, end="", flush=True)
        times.append(time.perf_counter())
    print(flush=True)
    return times[:-1]                       # the last was no token


# %% book/chapters/99_command_line.md, cell 13
def rate(times: list[float]) -> str:
    """How many tokens came, and how fast."""
    text = f"{len(times)} new tokens"
    if len(times) < 3:
        return text
    speed = (len(times) - 2) / (times[-1] - times[1])
    if speed < 1:
        return f"{text}, {1 / speed:.1f} seconds each once compiled"
    return f"{text}, {speed:,.0f} a second once compiled"


# %% book/chapters/99_command_line.md, cell 14
def run_generate(args: argparse.Namespace) -> None:
    images = [read_image(path) for path in args.image]
    model, status = load_model(args)
    prompt, tiles = ids_of_prompt(model, args, images)
    stop = model.config.eos_ids
    if args.chat:
        stop += model.require_tokenizer().stop_ids
    ids = model.stream_ids(
        prompt, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_p=args.top_p,
        top_k=args.top_k, seed=args.seed, stop_ids=stop, images=tiles,
        speculate=args.speculate,
    )
    say(f"{status}\nCompiling, which takes some seconds ...\n")
    if isinstance(model, StreamedModel):
        ids = with_progress(model, ids)
    start = "" if args.chat else args.prompt
    say("\n" + rate(show(start, read_on(model, prompt, ids))))


def generate_on_mesh(args: argparse.Namespace) -> None:
    check_mesh_options(args)
    hosts.run_multihost(run_generate)(args)


# %% book/chapters/99_command_line.md, cell 15
FOLDER = "checkpoint folder, any layout [the small model]"


def add_generate(commands: Any) -> None:
    text = "stream text for a prompt"
    sub = commands.add_parser("generate", help=text, description=text)
    sub.set_defaults(run=generate_on_mesh)
    add = sub.add_argument
    add("--model", help=FOLDER)
    add("--prompt", required=True, help="text to go on from")
    add_sampling(sub)
    add("--add-bos", action=argparse.BooleanOptionalAction,
        help="begin with the token of a beginning [as the model does]")
    add("--chat", action="store_true",
        help="the prompt is a user's message to an instruct model")
    add("--image", action="append", default=[], metavar="FILE",
        help="show it a picture; again for more; <|image|> says where")
    add("--devices", type=int, default=1, help="shard over so many [1]")
    add("--mesh", help="instead: DATAxEXPERTxMODEL, such as 1x8x1")
    add("--exchange", choices=list(EXCHANGES), default="sum",
        help="how tokens reach the experts of other devices [sum]")
    add("--dtype", choices=list(DTYPES), help="[what is fast here]")
    add("--kv-cache", choices=list(CACHE_KINDS), default="float",
        help="how keys and values are kept [float]")
    add("--stream", action="store_true",
        help="leave the weights on disk, for models larger than memory")
    hosts.add_options(sub)


COMMANDS["generate"] = add_generate


# %% book/chapters/99_command_line.md, cell 16
def bytes_by_dtype(
    tensors: dict[tuple[str, str], Any],
) -> dict[str, int]:
    """What the arrays of each dtype take; none of them is read."""
    sizes: dict[str, int] = {}
    for w in flat_arrays(tensors).values():
        name = f"bytes of {w.dtype}"
        sizes[name] = sizes.get(name, 0) + Part(w).size
    return sizes


def bytes_loaded(opened: Opened, dtype: str) -> int:
    """What `load` would hold of it, computing in `dtype`.

    A parameter that is kept exact gets a dtype that holds both the
    file's numbers and `dtype`'s: float16 and bfloat16 give float32.
    """
    specs, total = flat_specs(opened.config), 0
    for path, w in opened.read().items():
        own = np.dtype(dtype)
        if isinstance(w, QuantizedTensor):
            total += Part(w.weight).size + Part(w.scales).size
            continue
        if specs[path].float32:
            own = jnp.promote_types(w.dtype, own)
        total += math.prod(w.shape) * own.itemsize
    return total


def lines_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a configuration, each with where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from lines_of(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and type(value[0]) is dict:
        for i, inner in enumerate(value):
            yield from lines_of(inner, f"{name}[{i}]")
    else:
        yield name, value


# %% book/chapters/99_command_line.md, cell 17
def run_info(args: argparse.Namespace) -> None:
    folder = small_model() if args.path is None else args.path
    opened = open_checkpoint(folder)
    total, active = parameter_counts(opened.config)
    about = {
        "layout": opened.layout.name,
        "parameters": f"{total:,}, {active:,} active per token",
    }
    sizes = bytes_by_dtype(opened.read())
    sizes["bytes of weights"] = sum(sizes.values())
    about |= {name: f"{size:,}" for name, size in sizes.items()}
    about["bytes in memory"] = ", ".join(
        f"{bytes_loaded(opened, dtype):,} with --dtype {dtype}"
        for dtype in DTYPES
    )
    if args.verify:
        count = verify(folder)
        about["checksums"] = f"{count:,} tensors are as written"
    for name, value in about.items():
        print(f"{name:22s}{value}")
    for name, value in lines_of(to_json(opened.config)):
        print(f"{name:42s} {value}")


# %% book/chapters/99_command_line.md, cell 18
def add_info(commands: Any) -> None:
    text = "print a checkpoint's layout, size and configuration"
    sub = commands.add_parser("info", help=text, description=text)
    sub.set_defaults(run=run_info)
    sub.add_argument("path", nargs="?", metavar="PATH", help=FOLDER)
    sub.add_argument(
        "--verify", action="store_true",
        help="hold every tensor against its checksum",
    )


# %% book/chapters/99_command_line.md, cell 19
COMMANDS["info"] = add_info


# %% book/chapters/99_command_line.md, cell 22
BYTE_UNITS = {
    "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}


def bytes_in(word: str) -> int:
    """"5GB" as a number of bytes; ValueError for anything else."""
    number = word.upper().rstrip("KMGTB")
    unit = word.upper()[len(number) :]
    if unit not in BYTE_UNITS or not number.isdecimal():
        raise ValueError(f"no size: {word!r}; write 500MB, or 5GB")
    return int(number) * BYTE_UNITS[unit]


@contextlib.contextmanager
def byte_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is told of (bytes done, bytes in all).

    It is there from the first byte on.
    """
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def tell(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(tqdm(
                    unit="B", unit_scale=True, file=sys.stderr)))
            bars[0].total = total
            bars[0].update(done - bars[0].n)

        try:
            yield tell
        except KeyboardInterrupt:
            say("\nStopped; the same command goes on from here.")
            raise


def say_written(target: str) -> None:
    """What a writer has made, where, and in which layout."""
    opened = open_checkpoint(target)
    sizes = bytes_by_dtype(opened.read())
    total, _ = parameter_counts(opened.config)
    say(f"Wrote {total:,} parameters, {sum(sizes.values()):,} bytes, "
        f"to {target} in the layout {opened.layout.name}.")


# %% book/chapters/99_command_line.md, cell 23
def run_convert(args: argparse.Namespace) -> None:
    size = args.max_shard_size
    most = None if size is None else bytes_in(size)
    if most is not None and args.to != "hf":
        raise ValueError(
            f"--max-shard-size {size} is for --to hf, not for --to "
            f"{args.to}, which has no shards: leave it out"
        )
    if most == 0:
        raise ValueError(
            f"--max-shard-size {size} leaves no room for a tensor: "
            "write 500MB, or 5GB"
        )
    with byte_bar() as tell:
        convert(args.source, args.target, args.to, most, tell)
    say_written(args.target)


def add_convert(commands: Any) -> None:
    text = "write a checkpoint in another layout, a block at a time"
    sub = commands.add_parser("convert", help=text, description=text)
    sub.set_defaults(run=run_convert)
    add = sub.add_argument
    add("source", metavar="SRC", help="checkpoint folder, any layout")
    add("target", metavar="DST", help="new folder")
    add("--to", choices=list(TARGETS), default="native",
        help="[native]")
    add("--max-shard-size", metavar="SIZE",
        help="of a file, such as 500MB; with --to hf [5GB]")


COMMANDS["convert"] = add_convert


# %% book/chapters/99_command_line.md, cell 24
def in_8_bits_already(opened: Opened) -> bool:
    """Whether no matrix is left to quantize."""
    specs = flat_specs(opened.config)
    return all(
        isinstance(w, QuantizedTensor)
        for path, w in opened.read().items() if specs[path].matrix
    )


def run_quantize(args: argparse.Namespace) -> None:
    if in_8_bits_already(open_checkpoint(args.source)):
        say(f"{args.source} is in 8 bits already: its copy is the same "
            "numbers in our own layout.")
    with byte_bar() as tell:
        quantize_files(args.source, args.target, tell)
    say_written(args.target)


def add_quantize(commands: Any) -> None:
    text = "write a checkpoint with matrices of 8-bit integers"
    sub = commands.add_parser("quantize", help=text, description=text)
    sub.set_defaults(run=run_quantize)
    sub.add_argument("source", metavar="SRC", help="checkpoint folder")
    sub.add_argument("target", metavar="DST", help="new folder")


COMMANDS["quantize"] = add_quantize
COMMANDS["plan"] = add_plan
COMMANDS["train"] = add_train
COMMANDS["serve"] = add_serve
COMMANDS["chat"] = add_chat
