# Generated from book/chapters/95_recipes.md by `make sync`; edit the chapter.
"""`annotated-moe train`: needs the extra `train` when it runs.
"""

import argparse
import importlib
import sys
from typing import Any

import jax

from annotated_moe import hosts
from annotated_moe.tokenizer import needed


# %% book/chapters/95_recipes.md, cell 20
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
