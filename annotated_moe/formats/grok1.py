# Generated from book/chapters/09_checkpoints.md by `make sync`; edit the chapter.
"""The names of the release's files, and their order.
"""

from collections.abc import Iterable
from pathlib import Path

from annotated_moe.formats.files import CheckpointError, list_folder


# %% book/chapters/09_checkpoints.md, cell 47
def release_names(paths: Iterable[str], num_layers: int) -> list[str]:
    """The release's name of every file, in the files' order.

    `paths` are ours, in which all layers share a path:
    `decoder_layer/router/w` is a file for each of `num_layers`.
    """
    names = []
    for path in paths:
        top, rest = path.split("/", 1)
        if top == "decoder_layer":
            layers = range(num_layers)
            names += [f"transformer/{top}_{i}/{rest}" for i in layers]
        else:
            names.append(f"language_model/{path}")
    return sorted(names)


# %% book/chapters/09_checkpoints.md, cell 53
def our_path(name: str) -> tuple[str, int | None]:
    """transformer/decoder_layer_3/a/w -> decoder_layer/a/w and 3."""
    top, rest = name.split("/", 1)
    if top == "language_model":
        return rest, None
    layer, rest = rest.split("/", 1)
    return f"decoder_layer/{rest}", int(layer.rsplit("_", 1)[1])


# %% book/chapters/09_checkpoints.md, cell 55
def release_files(folder: Path, names: list[str]) -> list[Path]:
    """One file a name, in order; both sets must be the same."""
    files = [f"tensor{i:05d}_000" for i in range(len(names))]
    found = {n for n in list_folder(folder) if n.startswith("tensor")}
    for file, name in zip(files, names, strict=True):
        if file not in found:
            message = f"{folder} lacks {file}, which is {name}"
            raise CheckpointError(message)
    extra = sorted(found - set(files))
    if extra:
        raise CheckpointError(
            f"{folder} holds {extra[0]}, but this configuration has "
            f"only {len(files)} tensors: does config.json belong to it?"
        )
    return [folder / file for file in files]
