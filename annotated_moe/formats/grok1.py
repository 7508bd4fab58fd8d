# Generated from book/chapters/09_checkpoints.md, book/chapters/09c_layouts.md by `make sync`; edit the chapters.
"""The names of the release's files, and their order.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from annotated_moe.config import ModelConfig
from annotated_moe.families.grok import grok_config
from annotated_moe.formats.files import (
    CheckpointError,
    list_folder,
    read_json,
)
from annotated_moe.formats.lazy import stack_tensors
from annotated_moe.formats.pickles import read_pickled
from annotated_moe.model import flat_specs


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


# %% book/chapters/09c_layouts.md, cell 10
FIELD_NAMES = {
    "vocab_size": "vocab_size",
    "pad_token": "pad_id",
    "eos_token": "eos_ids",
    "sequence_len": "context",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
    "emb_size": "d_model",
    "key_size": "head_size",
    "num_q_heads": "q_heads",
    "num_kv_heads": "kv_heads",
    "num_layers": "num_layers",
    "attn_output_multiplier": "attn_multiplier",
    "num_experts": "num_experts",
    "num_selected_experts": "top_k",
}
# How the release was sharded and initialized: no part of the model.
IGNORED = {
    "shard_activations",
    "data_axis",
    "model_axis",
    "embedding_init_scale",
}


# %% book/chapters/09c_layouts.md, cell 11
def ffn_size(d_model: int, widening: int | float) -> int:
    """F of the release: 6144 and 8 give 32768."""
    return -(-(int(widening * d_model) * 2 // 3) // 8) * 8


# %% book/chapters/09c_layouts.md, cell 12
def release_config(path: Path) -> ModelConfig:
    """A `config.json` of the release, or Grok-1 where there is none."""
    if not os.path.lexists(path):
        return grok_config()
    raw = read_json(path)
    inner = raw.pop("model", {})
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: 'model' must be an object")
    flat = {k: v for k, v in {**raw, **inner}.items() if k[:1] != "_"}
    flat = {k: v for k, v in flat.items() if k not in IGNORED}
    widening = flat.pop("widening_factor", 8)
    for name in flat:
        if name not in FIELD_NAMES:
            raise CheckpointError(
                f"{path} has the field {name[:40]!r}, which is not "
                f"supported; known are {', '.join(FIELD_NAMES)}"
            )
    if type(widening) not in (int, float) or not 0 < widening < 2**31:
        raise CheckpointError(
            f"{path}: widening_factor must be positive: {widening!r}"
        )
    layers = flat.get("num_layers", 1)
    if type(layers) is not int or not 0 < layers < 10_000:
        raise CheckpointError(
            f"{path}: num_layers must be an int from 1 to 9999: "
            f"{layers!r}"
        )
    values = {FIELD_NAMES[name]: value for name, value in flat.items()}
    if "eos_ids" in values:
        values["eos_ids"] = (values["eos_ids"],)
    try:
        width = grok_config(**values).d_model
        return grok_config(**values, d_ff=ffn_size(width, widening))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


# %% book/chapters/09c_layouts.md, cell 15
def read_release(
    folder: Path, config: ModelConfig
) -> dict[tuple[str, str], Any]:
    """(module, name) -> tensor of a Grok-1 checkpoint, mapped."""
    paths = {"/".join(path): path for path in flat_specs(config)}
    names = release_names(paths, config.num_layers)
    files = release_files(folder, names)
    tensors: dict[tuple[str, str], Any] = {}
    layers: dict[tuple[str, str], dict[int, Any]] = {}
    interpreted: dict[int, Any] = {}
    for file, name in zip(files, names, strict=True):
        ours, layer = our_path(name)
        path = paths[ours]
        w = read_pickled(file, interpreted)
        if layer is None:
            tensors[path] = w
        else:
            layers.setdefault(path, {})[layer] = w
    for path, by_layer in layers.items():
        parts = [by_layer[i] for i in range(config.num_layers)]
        tensors[path] = stack_tensors(folder, "/".join(path), parts)
    return tensors
