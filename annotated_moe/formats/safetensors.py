# Generated from book/chapters/09b_safetensors.md, book/chapters/15_meta.md by `make sync`; edit the chapters.
"""A safetensors file is eight bytes, a piece of JSON, and the weights:
nothing in it can run. It can still lie, or be half of itself, or hold
one weight that is no number and turns every word the model says into
the same one. This chapter reads such files and believes nothing in
them, and writes them block by block, so that a writer that was
interrupted goes on where it stopped. By its end you will have both, for
one file and for a model cut into many.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from annotated_moe.formats.files import (
    MAX_JSON,
    CheckpointError,
    Extent,
    list_folder,
    map_file,
    parse_json,
    read_json,
    refuse_other_file,
)
from annotated_moe.formats.pth import open_pth
from annotated_moe.formats.writing import Part


# %% book/chapters/09b_safetensors.md, cell 12
def read_header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    """What a safetensors file says it holds, and where that begins.

    `data` is the file's bytes; CheckpointError is the end of a
    sentence that begins with its path.
    """
    size = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) >= 8 and not 2 <= size <= MAX_JSON:
        refuse_other_file(data.data)
        raise CheckpointError(
            f"is no safetensors file: it begins with a header of {size}"
            f" bytes, and headers have 2 to {MAX_JSON}"
        )
    if len(data) < 8 + size:
        raise CheckpointError(
            f"was cut within its header, at byte {len(data)}: fetch "
            "the file again"
        )
    try:
        header = parse_json(data[8 : 8 + size].tobytes())
    except CheckpointError as error:
        raise CheckpointError(f"has a header that {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + size


# %% book/chapters/09b_safetensors.md, cell 13
DTYPE_CODES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
}


# %% book/chapters/09b_safetensors.md, cell 14
def as_extent(name: str, entry: Any) -> Extent:
    """Where a tensor lies behind the header, and as what."""
    match entry:
        case {
            "dtype": str(code),
            "shape": list(shape),
            "data_offsets": [begin, end],
            **others,
        } if not others and len(shape) <= 8:
            numbers = [*shape, begin, end]
        case _:
            numbers = [None]
    if not all(type(n) is int and 0 <= n < 2**53 for n in numbers):
        raise CheckpointError(f"has a malformed entry {name[:80]!r}")
    if code not in DTYPE_CODES:
        raise CheckpointError(
            f"holds {name[:80]!r} in the dtype {code[:20]!r}; "
            f"supported are {', '.join(DTYPE_CODES)}"
        )
    dtype = DTYPE_CODES[code]
    size = math.prod(shape) * dtype.itemsize
    if size != end - begin:
        raise CheckpointError(
            f"holds {name[:80]!r} of shape {tuple(shape)}, which takes "
            f"{size} bytes, in {end - begin}"
        )
    return Extent(begin, end, dtype, tuple(shape))


# %% book/chapters/09b_safetensors.md, cell 15
def check_extents(extents: dict[str, Extent], size: int) -> None:
    """CheckpointError unless they fill `size` bytes, each once."""
    last = max((extent.end for extent in extents.values()), default=0)
    if last > size:
        raise CheckpointError(
            f"was cut: its header names {last:,} bytes of tensors, and "
            f"{size:,} are there; fetch the file again"
        )
    at = 0
    for name, extent in sorted(extents.items(), key=lambda e: e[1][:2]):
        if extent.begin != at:
            raise CheckpointError(
                f"holds {name[:80]!r} from byte {extent.begin}, but "
                f"what comes before it ends at {at}"
            )
        at = extent.end
    if at < size:
        raise CheckpointError(
            f"holds {size - at:,} bytes behind its last tensor, which "
            "have no name: fetch the file again"
        )


# %% book/chapters/09b_safetensors.md, cell 16
def parse_safetensors(data: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> view of `data`, the bytes of a safetensors file."""
    header, start = read_header(data)
    extents = {n: as_extent(n, entry) for n, entry in header.items()}
    check_extents(extents, len(data) - start)
    return {
        name: data[start + e.begin : start + e.end]
        .view(e.dtype)
        .reshape(e.shape)
        for name, e in extents.items()
    }


# %% book/chapters/09b_safetensors.md, cell 17
def open_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file, mapped, not copied.

    Raises CheckpointError, naming the file.
    """
    data = map_file(path)
    try:
        return parse_safetensors(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


# %% book/chapters/09b_safetensors.md, cell 28
def safetensors_parts(
    arrays: dict[str, Any], metadata: dict[str, str] | None = None
) -> list[Part]:
    """A safetensors file of `arrays`, the widest dtypes first.

    Every tensor then begins at a multiple of its own item size.
    `metadata` are the texts of the header's `__metadata__`.
    """
    codes = {dtype: code for code, dtype in DTYPE_CODES.items()}
    parts = [Part(w, name) for name, w in arrays.items()]
    parts.sort(key=lambda p: (-np.dtype(p.data.dtype).itemsize, p.name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = metadata
    at = 0
    for part in parts:
        header[part.name] = {
            "dtype": codes[np.dtype(part.data.dtype)],
            "shape": list(part.data.shape),
            "data_offsets": [at, at + part.size],
        }
        at += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return [Part(np.frombuffer(start, np.uint8)), *parts]


# %% book/chapters/09b_safetensors.md, cell 47
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"


def read_index(
    folder: Path, names: set[str], file: str = INDEX
) -> dict[str, str]:
    """Tensor -> shard, as the index says; each shard is in `names`."""
    path = folder / file
    index: Any = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no 'weight_map' of names")
    if not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{path} has no 'weight_map' of names")
    for shard in sorted(set(index.values()) - names):
        raise CheckpointError(
            f"{path} names {shard[:80]!r}, which is missing: fetch it"
        )
    return index


# %% book/chapters/09b_safetensors.md, cell 48
def warn_of_others(
    folder: Path, names: set[str], used: set[str], why: str
) -> None:
    """A warning for safetensors files of a folder that are not read."""
    others = {name for name in names if name.endswith(".safetensors")}
    for name in sorted(others - used)[:3]:
        text = f"{folder / name} is not read: {why}"
        warnings.warn(text, stacklevel=2)


# %% book/chapters/09b_safetensors.md, cell 49
OTHER_WEIGHTS = {
    ".bin": "pickles of PyTorch, which are not read here: fetch the "
    "model's safetensors, or load them in transformers, whose "
    "save_pretrained writes safetensors",
    ".gguf": "a file of llama.cpp, which is not read here: fetch the "
    "model's safetensors",
    ".pt": "pickles of PyTorch, which are not read here: save them as "
    "safetensors from PyTorch",
    ".pth": "pickles of PyTorch: Meta's layout is consolidated.00.pth "
    "and on, with params.json beside them",
    ".h5": "weights for TensorFlow: fetch the model's safetensors",
    ".msgpack": "weights for Flax: fetch the model's safetensors",
    ".npz": "arrays of NumPy: save them as safetensors",
    ".onnx": "a graph for ONNX: fetch the model's safetensors",
}


# %% book/chapters/09b_safetensors.md, cell 50
def describe_weights(names: set[str]) -> str:
    """What a folder without `model.safetensors` holds instead.

    The end of a sentence that begins with the folder, or "".
    """
    for name in sorted(names):
        if name.endswith(".safetensors"):
            if "-of-" in name:
                return f"holds {name} but no {INDEX}: fetch the index"
            return (
                f"holds {name} but no {ONE_FILE}: if it is the whole "
                "model, give it that name"
            )
    for name in sorted(names):
        suffix = Path(name).suffix
        if suffix in OTHER_WEIGHTS:
            return f"holds {name}, {OTHER_WEIGHTS[suffix]}"
    return ""


# %% book/chapters/09b_safetensors.md, cell 51
Reader = Callable[[Path], dict[str, np.ndarray]]    # of one file


def open_shards(
    folder: Path,
    names: set[str],
    file: str = INDEX,
    reader: Reader = open_arrays,
) -> dict[str, np.ndarray]:
    """Name -> array of the shards that the index `file` names, and of
    no other file.
    """
    index = read_index(folder, names, file)
    shards, arrays = set(index.values()), {}
    warn_of_others(folder, names, shards, f"{file} does not name it")
    for shard in sorted(shards):
        for name, array in reader(folder / shard).items():
            if name not in index:
                raise CheckpointError(
                    f"{folder / shard} holds {name[:80]!r}, which the "
                    "index does not name: fetch both again"
                )
            if index[name] != shard:
                raise CheckpointError(
                    f"{folder / shard} holds {name[:80]!r}, which the "
                    f"index places in {index[name]!r}: one parameter "
                    "has two tensors"
                )
            arrays[name] = array
    for name in sorted(set(index) - set(arrays)):
        raise CheckpointError(
            f"{folder / index[name]} lacks {name[:80]!r}, which the "
            "index places there"
        )
    return arrays


# %% book/chapters/09b_safetensors.md, cell 52
READERS: dict[str, Reader] = {ONE_FILE: open_arrays}


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """Name -> array of one file of weights, or of all shards.

    Where there is an index, it decides which files are the model.
    CheckpointError for a shard that is missing or not as it says.
    """
    names = list_folder(folder)
    for one_file, reader in READERS.items():
        file = f"{one_file}.index.json"
        if file in names:
            return open_shards(folder, names, file, reader)
        if one_file in names:
            why = f"{one_file} is the model"
            warn_of_others(folder, names, {one_file}, why)
            return reader(folder / one_file)
    found = describe_weights(names) or (
        f"holds neither {ONE_FILE} nor {INDEX}: fetch the weights"
    )
    raise CheckpointError(f"{folder} {found}")


# %% book/chapters/15_meta.md, cell 31
READERS["pytorch_model.bin"] = open_pth
OTHER_WEIGHTS[".bin"] = (
    "which is not read: the weights of PyTorch that are read are "
    "pytorch_model.bin, or several and pytorch_model.bin.index.json; "
    "better, fetch the model's safetensors"
)
