# Generated from book/chapters/09b_safetensors.md by `make sync`; edit the chapter.
"""Files that are on disk before they count, with the checksum of each
tensor, and folders that appear whole or not at all.
"""

import hashlib
import json
import math
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.lazy import as_bytes, iter_blocks


# %% book/chapters/09b_safetensors.md, cell 27
@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a file: a tensor, or, unnamed, what is around."""

    data: Any
    name: str = ""

    @property
    def size(self) -> int:
        itemsize = np.dtype(self.data.dtype).itemsize
        return math.prod(self.data.shape) * itemsize


# %% book/chapters/09b_safetensors.md, cell 29
def fsync_path(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# %% book/chapters/09b_safetensors.md, cell 30
class Watcher:
    """Told how files grow; `sums` has the sha256 of each tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    def read(self, block: np.ndarray) -> None:
        """A block of what is copied, before it is written."""

    def wrote(self, path: Path, size: int) -> None:
        """A block of `size` bytes was written, or was there already."""

    def closed(self, path: Path) -> None:
        """A file is whole."""
        fsync_path(path)


# %% book/chapters/09b_safetensors.md, cell 31
def append_bytes(path: Path, data: memoryview) -> None:
    """`data` to the end of a file; one sentence when it has no room."""
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; make room or "
            "choose another folder"
        ) from None


# %% book/chapters/09b_safetensors.md, cell 32
def write_part(
    path: Path, part: Part, skip: int, watcher: Watcher
) -> None:
    """Append `part` but for its first `skip` bytes; note its sha256."""
    digest = hashlib.sha256()
    for block in iter_blocks(part.data):
        watcher.read(block)
        data = as_bytes(block)
        digest.update(data)
        append_bytes(path, data[skip:])
        skip = max(skip - len(data), 0)
        watcher.wrote(path, len(data))
        del block, data             # before the next is made
    if part.name:
        watcher.sums[part.name] = digest.hexdigest()


# %% book/chapters/09b_safetensors.md, cell 33
def write_file(
    path: Path, parts: list[Part], watcher: Watcher, done: int = 0
) -> None:
    """Write a file of `parts`, of which `done` bytes are there."""
    with open(path, "ab") as file:
        file.truncate(done)
    for part in parts:
        skip = min(done, part.size)
        done -= skip
        summed = not part.name or part.name in watcher.sums
        if skip == part.size and summed:
            watcher.wrote(path, part.size)
        else:
            write_part(path, part, skip, watcher)
    watcher.closed(path)


# %% book/chapters/09b_safetensors.md, cell 36
def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` as the whole of a file, on disk when this returns."""
    text = json.dumps(content, indent=1) + "\n"
    path.write_bytes(b"")
    append_bytes(path, memoryview(text.encode()))
    fsync_path(path)


# %% book/chapters/09b_safetensors.md, cell 37
def replace_folder(
    new: Path, target: Path, old: Path, written: Container[str]
) -> None:
    """Rename `new` to `target`; what was there becomes `old`.

    Files at `target` whose names are not in `written` stay there.
    """
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    for file in old.iterdir():
        if file.name not in written:
            file.rename(target / file.name)
