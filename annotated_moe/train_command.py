# Generated from book/chapters/95_recipes.md by `make sync`; edit the chapter.
"""`annotated-moe train`: needs the extra `train` when it runs.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from annotated_moe import hosts
from annotated_moe.tokenizer import needed


# %% book/chapters/95_recipes.md, cell 22
@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Within it, Ctrl-C ends the process, in one line.

    An interrupt inside of a compiler may crash; and a run survives to
    be killed at any moment. `train` is more patient in its loop.
    """
    def end(*_: Any) -> None:
        say = "stopped; the same command goes on from what was saved"
        os.write(2, f"\nannotated-moe: {say}\n".encode())
        os._exit(130)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, end) if main else None
    try:
        yield
    except KeyboardInterrupt as error:      # the loop's own
        print(f"annotated-moe: {error}", file=sys.stderr)
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


# %% book/chapters/95_recipes.md, cell 23
def run_train(args: argparse.Namespace) -> None:
    for library in ("optax", "orbax.checkpoint"):
        needed(library, "annotated-moe train", "train")
    recipes = importlib.import_module("annotated_moe.recipes")
    recipe = recipes.read_recipe(args.config)
    args.devices = recipe.mesh.devices
    if args.hosts is not None and args.devices < (args.processes or 1):
        raise ValueError(
            f"{args.config}: [mesh] has {args.devices} devices, and "
            f"each of {args.processes} processes needs one at least"
        )

    def run(args: argparse.Namespace) -> None:
        with contextlib.nullcontext() if args.hosts else ends_at_once():
            recipes.train_recipe(recipe)
        if jax.process_index() == 0:
            print(f"Trained: {recipe.folder / 'model'}",
                  file=sys.stderr)

    hosts.run_multihost(run)(args)


def add_train(commands: Any) -> None:
    text = "train a model as a file says; go on where it stopped"
    sub = commands.add_parser("train", help=text, description=text)
    sub.set_defaults(run=run_train)
    sub.add_argument("config", metavar="CONFIG", help="a file of TOML")
    hosts.add_options(sub)
