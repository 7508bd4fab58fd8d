# Generated from book/chapters/09c_layouts.md by `make sync`; edit the chapter.
"""Our own layout: a spec as JSON, and one safetensors file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from annotated_moe.config import ModelConfig
from annotated_moe.formats.files import CheckpointError, read_json
from annotated_moe.formats.safetensors import open_arrays
from annotated_moe.model import flat_specs
from annotated_moe.quantization import QuantizedTensor
from annotated_moe.specs import from_json, to_json

# %% book/chapters/09c_layouts.md, cell 18
FORMAT = "annotated-moe-2"


def native_settings(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says of a model."""
    return {"format": FORMAT, **to_json(config)}


def is_native(folder: Path) -> bool:
    """Whether a folder is in our layout, of this version or before."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    said = str(read_json(path).get("format"))
    return said.startswith("annotated-moe")


# %% book/chapters/09c_layouts.md, cell 19
def native_config(path: Path) -> ModelConfig:
    """The configuration that a `config.json` of ours describes."""
    raw = read_json(path)
    if raw.pop("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version, this one reads "
            f"{FORMAT}: convert the original checkpoint again"
        )
    try:
        config = from_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, ModelConfig):
        raise CheckpointError(f"{path} describes no model")
    return config


# %% book/chapters/09c_layouts.md, cell 20
def flat_arrays(
    tensors: Mapping[tuple[str, str], Any] | Mapping[tuple[str], Any],
) -> dict[str, Any]:
    """Name -> array; the scales of a quantized tensor get their own."""
    flat = {}
    for parts, w in tensors.items():
        path = "/".join(parts)
        if isinstance(w, QuantizedTensor):
            flat[f"{path}.weight"] = w.weight
            flat[f"{path}.scales"] = w.scales
        else:
            flat[path] = w
    return flat


# %% book/chapters/09c_layouts.md, cell 21
def read_native(
    folder: Path, config: ModelConfig
) -> dict[tuple[str, str], Any]:
    """(module, name) -> tensor of a checkpoint that `save` wrote."""
    file = folder / "model.safetensors"
    arrays = open_arrays(file)
    tensors: dict[tuple[str, str], Any] = {}
    for path in flat_specs(config):
        name = "/".join(path)
        parts = [f"{name}.weight", f"{name}.scales"]
        if name in arrays:
            tensors[path] = arrays.pop(name)
        elif all(part in arrays for part in parts):
            w, scales = (arrays.pop(part) for part in parts)
            tensors[path] = QuantizedTensor(w, scales)
        else:
            raise CheckpointError(f"{file} lacks {name}")
    if arrays:
        raise CheckpointError(
            f"{file} holds {min(arrays)}, which its configuration "
            "has no place for"
        )
    return tensors
