# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The command line: `annotated-moe generate` streams text to standard
output, and says everything else on standard error.
"""

import argparse
import atexit
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from annotated_moe import checkpoints, hosts
from annotated_moe.model import Model
from annotated_moe.sharding import make_mesh
from annotated_moe.streaming import StreamedModel, watched
from annotated_moe.vision import IMAGE, read_image
from annotated_moe.vocabularies import split_at


# %% book/chapters/09_checkpoints.md, cell 181
def say(text: str) -> None:
    """Status goes to stderr: stdout holds the text and nothing else."""
    print(text, file=sys.stderr, flush=True)


# %% book/chapters/09_checkpoints.md, cell 182
def mesh_of(devices: int) -> Mesh | None:
    """`devices` devices, simulated where there are only CPUs."""
    if not 1 <= devices <= 512:
        raise ValueError(f"--devices must be 1 to 512, not {devices}")
    if devices == 1:
        return None
    with suppress(RuntimeError):
        # Only CPUs heed this, and only before a device is first used.
        jax.config.update("jax_num_cpu_devices", devices)
    return make_mesh(model=devices)


# %% book/chapters/09_checkpoints.md, cell 183
def open_model(
    path: str | None, devices: int, dtype: str, stream: bool = False
) -> tuple[Model, str]:
    """The model, and a sentence about it."""
    start = time.perf_counter()
    mesh = mesh_of(devices)
    model = checkpoints.load(path, mesh, dtype, stream)
    spent = time.perf_counter() - start
    kind = jax.devices()[0].platform.upper()
    total, _ = checkpoints.parameter_counts(model.config)
    name = path or "the small model"
    where = f"{devices} {kind} device{'s' if devices > 1 else ''}"
    if stream:
        where += ", from disk as they are needed,"
    return model, (
        f"Loaded {name} of {total / 1e6:,.1f} million parameters "
        f"onto {where} in {spent:.1f} s."
    )


# %% book/chapters/09_checkpoints.md, cell 184
def room(model: Model, prompt: list[int]) -> int:
    """At most 128 new tokens, and never more than the context holds."""
    left = model.config.context - len(prompt) + 1
    return max(1, min(128, left))


# %% book/chapters/09_checkpoints.md, cell 185
def read_on(
    model: Model, prompt: list[int], ids: Iterator[int]
) -> Iterator[str]:
    """New text as it reads after the prompt, first space included."""
    text = model.words().stream()
    for token in prompt:
        text.push(token)
    for token in ids:
        yield text.push(token)
    yield text.flush()


# %% book/chapters/09_checkpoints.md, cell 186
def prompt_ids(
    model: Model, args: argparse.Namespace, images: list[Any]
) -> tuple[list[int], Any]:
    """Ids and tiles of the prompt, or the conversation it opens."""
    prompt = args.prompt
    if images and IMAGE not in prompt:
        prompt = IMAGE * len(images) + prompt
    if args.chat:
        content = message_parts(prompt) if images else prompt
        message = {"role": "user", "content": content}
        prompt = model.words().chat([message])
    return model.with_images(prompt, images)


# %% book/chapters/09_checkpoints.md, cell 187
def message_parts(prompt: str) -> list[dict[str, str]]:
    """A message's content, its images apart from its text."""
    return [
        {"type": "image"} if part == IMAGE
        else {"type": "text", "text": part}
        for part in split_at(prompt, [IMAGE]) if part
    ]


# %% book/chapters/09_checkpoints.md, cell 188
def ends(model: Model, chat: bool) -> tuple[int, ...]:
    """The ids that end a text; in a chat, a turn as well."""
    ids = model.config.stop_ids
    return ids + model.words().turn_ids if chat else ids


# %% book/chapters/09_checkpoints.md, cell 189
def run_generate(args: argparse.Namespace) -> None:
    images = [read_image(path) for path in args.image]
    model, status = open_model(
        args.model, args.devices, args.dtype, args.stream
    )
    prompt, tiles = prompt_ids(model, args, images)
    new = args.max_new_tokens
    ids = model.stream_ids(
        prompt,
        max_new_tokens=room(model, prompt) if new is None else new,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop_ids=ends(model, args.chat),
        image=tiles,
    )
    say(f"{status}\nCompiling, which takes some seconds ...\n")
    if isinstance(model, StreamedModel):
        ids = watched(model, ids)
    start = "" if args.chat else args.prompt
    say("\n" + rate(show(start, read_on(model, prompt, ids))))


# %% book/chapters/09_checkpoints.md, cell 190
def show(prompt: str, pieces: Iterator[str]) -> list[float]:
    """Print pieces as they come; when each token did."""
    times: list[float] = []
    for piece in pieces:
        text = piece if times else prompt + piece
        print(text, end="", flush=True)
        times.append(time.perf_counter())
    print(flush=True)
    return times[:-1]                       # the last was no token


# %% book/chapters/09_checkpoints.md, cell 191
def rate(times: list[float]) -> str:
    """The first two tokens waited for a compiler and do not count."""
    text = f"{len(times)} new tokens"
    if len(times) < 3:
        return text
    speed = (len(times) - 2) / (times[-1] - times[1])
    if speed < 1:
        return f"{text}, {1 / speed:.1f} seconds each once compiled"
    return f"{text}, {speed:,.0f} a second once compiled"


# %% book/chapters/09_checkpoints.md, cell 192
def bytes_by_dtype(tensors: dict[str, Any]) -> dict[str, int]:
    """What the arrays of each dtype take; none of them is read."""
    sizes: dict[str, int] = {}
    for w in checkpoints.flat_arrays(tensors).values():
        name = f"bytes of {w.dtype}"
        sizes[name] = sizes.get(name, 0) + checkpoints.Part(w).size
    return sizes


# %% book/chapters/09_checkpoints.md, cell 193
def run_info(args: argparse.Namespace) -> None:
    folder = Path(args.path or args.model or checkpoints.small_model())
    config, read, where = checkpoints.find_layout(folder)
    total, active = checkpoints.parameter_counts(config)
    about = {
        "layout": checkpoints.LAYOUTS[read],
        "parameters": f"{total:,}, {active:,} active per token",
    }
    sizes = bytes_by_dtype(read(where, config))
    sizes["bytes of weights"] = sum(sizes.values())
    about |= {name: f"{size:,}" for name, size in sizes.items()}
    if args.verify:
        count = checkpoints.verify(folder)
        about["checksums"] = f"{count:,} tensors are as written"
    for name, value in {**about, **vars(config)}.items():
        print(f"{name:22s}{value}")


# %% book/chapters/09_checkpoints.md, cell 194
FOLDER = "checkpoint folder [the small model]"


# %% book/chapters/09_checkpoints.md, cell 195
def add_generate(commands: Any) -> None:
    text = "stream text for a prompt"
    sub = commands.add_parser("generate", help=text, description=text)
    sub.set_defaults(run=hosts.run_multihost(run_generate))
    hosts.add_options(sub)
    add, number, real = sub.add_argument, {"type": int}, {"type": float}
    add("--model", help=FOLDER)
    add("--prompt", required=True, help="text to go on from")
    text = "the prompt is a user's message to an instruct model"
    add("--chat", action="store_true", help=text)
    text = "show it a picture; again for more; <|image|> says where"
    add("--image", action="append", default=[], metavar="FILE",
        help=text)
    add("--max-new-tokens", **number, help="[128, or what fits]")
    add("--temperature", **real, default=0.8, help="0 is greedy [0.8]")
    add("--top-p", **real, default=0.95, help="nucleus [0.95]")
    add("--top-k", **number, help="keep the k likeliest tokens [all]")
    add("--seed", **number, default=0, help="same seed, same text [0]")
    add("--devices", **number, default=1, help="shard over so many [1]")
    dtypes = ["bfloat16", "float32"]
    add("--dtype", choices=dtypes, default=dtypes[0], help="[bfloat16]")
    text = "leave the weights on disk: for models larger than memory"
    add("--stream", action="store_true", help=text)


# %% book/chapters/09_checkpoints.md, cell 196
def add_info(commands: Any) -> None:
    text = "print a checkpoint's layout, size and configuration"
    sub = commands.add_parser("info", help=text, description=text)
    sub.set_defaults(run=run_info)
    sub.add_argument("path", nargs="?", metavar="PATH", help=FOLDER)
    sub.add_argument("--model", help="the same, as an option")
    text = "hold every tensor against its checksum"
    sub.add_argument("--verify", action="store_true", help=text)


# %% book/chapters/09_checkpoints.md, cell 197
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


# %% book/chapters/09_checkpoints.md, cell 198
class Version(argparse.Action):
    """Looks the version up when asked for it: that takes a while."""

    def __call__(self, parser: Any, *_: Any) -> None:
        from importlib.metadata import version

        print(f"annotated-moe {version('annotated-moe')}")
        parser.exit()


# %% book/chapters/09_checkpoints.md, cell 199
def add_convert(commands: Any) -> None:
    from annotated_moe import convert

    convert.add_convert(commands)


def add_quantize(commands: Any) -> None:
    from annotated_moe import convert

    convert.add_quantize(commands)


def add_plan(commands: Any) -> None:
    from annotated_moe import scale

    scale.add_plan(commands)


# %% book/chapters/09_checkpoints.md, cell 200
ADD = {
    "generate": add_generate,
    "convert": add_convert,
    "quantize": add_quantize,
    "info": add_info,
    "plan": add_plan,
}


# %% book/chapters/09_checkpoints.md, cell 201
def make_parser(command: str) -> argparse.ArgumentParser:
    """For one command, or for all where it is none of them."""
    text = "Run the mixture-of-experts model that the book builds."
    parser = Parser("annotated-moe", description=text)
    text = "print the version and exit"
    parser.add_argument("--version", action=Version, nargs=0, help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in [ADD[command]] if command in ADD else ADD.values():
        add(commands)
    return parser


# %% book/chapters/09_checkpoints.md, cell 202
def spare_collector() -> None:
    """Look for no garbage in what was imported, nor at the exit.

    Of a short command, such as `info`, that takes a fifth of the time.
    """
    gc.freeze()
    atexit.register(gc.disable)


# %% book/chapters/09_checkpoints.md, cell 203
def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for bad input (one line says why), 130."""
    if argv is None:
        spare_collector()
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
