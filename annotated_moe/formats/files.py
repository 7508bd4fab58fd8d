# Generated from book/chapters/09_checkpoints.md, book/chapters/09b_safetensors.md by `make sync`; edit the chapters.
"""Files of unknown origin: what they are, mapped without being read,
and the JSON in them; the error that names what is wrong.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


# %% book/chapters/09_checkpoints.md, cell 6
class CheckpointError(ValueError):
    """A checkpoint is damaged, unsafe, incomplete or not supported."""


# %% book/chapters/09_checkpoints.md, cell 31
WEB_PAGE = (
    "is a web page: fetch the file again, logged in if it asks for that"
)
OTHER_FILES = {
    b"version https://": "is a Git LFS pointer and not the file that "
    "it stands for: run `git lfs pull` in its folder",
    b"/annex/objects/": "is a git-annex pointer and not the file that "
    "it stands for: run `git annex get` in its folder",
    b"<!DOCTYPE": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": WEB_PAGE,
    b"GGUF": "is a GGUF file, which llama.cpp reads and this program "
    "does not: fetch the model's safetensors",
    b"PK\x03\x04": "is a zip, as torch.save writes them: fetch the "
    "model's safetensors, or save them from PyTorch",
    b"\x89HDF": "is an HDF5 file: fetch the model's safetensors",
}


def other_file(start: bytes) -> str:
    """What a file is that begins like this and holds no weights.

    The end of a sentence that begins with the file's path, or "".
    """
    start = start.lstrip()
    for first, sentence in OTHER_FILES.items():
        if start[: len(first)].lower() == first.lower():
            return sentence
    return ""


# %% book/chapters/09_checkpoints.md, cell 32
def refuse_other_file(data: memoryview) -> None:
    """CheckpointError where the bytes of a file hold no weights."""
    start = bytes(data[:64])
    if sentence := other_file(start):
        raise CheckpointError(sentence)
    if start and not any(start):
        raise CheckpointError(
            "begins with zeros, as a file does that was not fetched to "
            "the end: fetch it again"
        )
    first_line = start.lstrip().split(b"\n")[0].decode("latin-1")
    prose = first_line.isascii() and first_line.isprintable()
    if prose and len(first_line) >= 8 and " " in first_line:
        raise CheckpointError(
            f"is a text that begins {first_line[:40]!r}, and no "
            "weights: fetch the file again"
        )


# %% book/chapters/09_checkpoints.md, cell 35
def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [size], mapped and not read.

    Raises CheckpointError, naming the file, where it cannot be read
    or is empty.
    """
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise CheckpointError(
                f"{path} is empty: fetch the file again"
            )
        return np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            why = f"a link to {os.readlink(path)}, which is missing"
        message = f"{path} is not readable: {why}"
        raise CheckpointError(message) from None


# %% book/chapters/09_checkpoints.md, cell 36
class Extent(NamedTuple):
    """Where in its file an array lies, in bytes, and as what."""

    begin: int
    end: int
    dtype: np.dtype
    shape: tuple[int, ...]


# %% book/chapters/09_checkpoints.md, cell 54
def list_folder(folder: Path) -> set[str]:
    """The names in a folder, or a CheckpointError."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a folder: give the one that holds "
            "ckpt-0/ or config.json"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not readable: {error.strerror}"
        ) from None


# %% book/chapters/09b_safetensors.md, cell 7
def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; ValueError for a name met twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"it holds {twice[:80]!r} twice")
    return dict(pairs)


# %% book/chapters/09b_safetensors.md, cell 8
def parse_json(data: bytes) -> dict[str, Any]:
    """The one JSON object in `data`, no name of it met twice.

    CheckpointError, the end of a sentence, for anything else.
    """
    try:
        text = data.decode()
        content = json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not readable: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError("must hold one JSON object")
    return content


# %% book/chapters/09b_safetensors.md, cell 11
MAX_JSON = 2**24                                # bytes


def read_json(path: Path) -> dict[str, Any]:
    """The one JSON object in a file, or a CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON or not path.is_file():
            raise ValueError(f"no file of at most {MAX_JSON} bytes")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        message = f"{path} is not readable: {why}"
        raise CheckpointError(message) from None
    try:
        if sentence := other_file(data[:64]):
            raise CheckpointError(sentence)
        return parse_json(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
