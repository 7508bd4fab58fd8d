# Generated from book/chapters/09_checkpoints.md, book/chapters/09b_safetensors.md, book/chapters/15_meta.md by `make sync`; edit the chapters.
"""Arrays that are read when a part of them is asked for, and any array
in blocks: as bytes, and searched for what is not finite.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from annotated_moe.formats.files import CheckpointError
from annotated_moe.quantization import QuantizedTensor


# %% book/chapters/09_checkpoints.md, cell 56
class LazyArray(ABC):
    """An array-like with shape and dtype that reads on indexing."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """The part of the array that `index` names."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> "TransposedArray":
        return TransposedArray(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self[:], dtype)


class TransposedArray(LazyArray):
    """A lazy matrix with its axes exchanged."""

    def __init__(self, source: LazyArray) -> None:
        self.source, self.dtype = source, source.dtype
        self.shape = source.shape[::-1]

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        first, second = (*index, slice(None))[:2]
        return self.source[second, first].T


# %% book/chapters/09_checkpoints.md, cell 57
class StackedArray(LazyArray):
    """Arrays of one shape and dtype along a new first axis, not copied.

    `stack[3]` is a part; any other index copies what it names.
    """

    def __init__(self, parts: list) -> None:
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (len(parts), *parts[0].shape)

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        first, rest = (*index, slice(None))[0], index[1:]
        if not isinstance(first, slice):
            part = self.parts[first]
            return part[rest] if rest else part
        return np.stack([part[rest] for part in self.parts[first]])


# %% book/chapters/09_checkpoints.md, cell 58
def describe_tensor(w: Any) -> str:
    """A tensor's dtype and shape, and those of its scales."""
    if isinstance(w, QuantizedTensor):
        scales = describe_tensor(w.scales)
        return f"{describe_tensor(w.weight)} with scales {scales}"
    return f"{w.dtype} {tuple(w.shape)}"


def stack_tensors(where: Path, path: str, parts: list) -> Any:
    """One lazily stacked tensor from those of all layers or experts.

    CheckpointError, naming `where` and `path`, if they are not alike.
    """
    first = describe_tensor(parts[0])
    for i, w in enumerate(parts):
        if 0 in w.shape:
            raise CheckpointError(
                f"{where}: {path} is empty, of shape {tuple(w.shape)}: "
                "it was never written; fetch or save it again"
            )
        if (other := describe_tensor(w)) != first:
            raise CheckpointError(
                f"{where}: tensors of {path} are not alike: number 0"
                f" is {first}, number {i} is {other}"
            )
    if not isinstance(parts[0], QuantizedTensor):
        return StackedArray(parts)
    weights = StackedArray([w.weight for w in parts])
    scales = StackedArray([w.scales for w in parts])
    return QuantizedTensor(weights, scales)


# %% book/chapters/09b_safetensors.md, cell 21
class ConcatenatedArray(LazyArray):
    """Arrays behind one another along the last axis, not copied."""

    def __init__(self, parts: list) -> None:
        width = sum(part.shape[-1] for part in parts)
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (*parts[0].shape[:-1], width)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Some of it: `index` is for the axes before the last."""
        some = [np.asarray(part[index]) for part in self.parts]
        return np.concatenate(some, axis=-1)


# %% book/chapters/09b_safetensors.md, cell 22
BLOCK = 2**24                                   # bytes


def iter_blocks(w: Any) -> Iterator[np.ndarray]:
    """The elements of an array in C order, at most BLOCK bytes a time.

    Blocks of an ordinary array are views. A `LazyArray` is asked for
    each block by itself, a `StackedArray` for each of its parts.
    """
    if isinstance(w, StackedArray):
        for part in w.parts:
            yield from iter_blocks(part)
        return
    w = w if isinstance(w, LazyArray) else np.asarray(w)
    if w.nbytes <= BLOCK:
        yield np.asarray(w)
        return
    step = BLOCK * len(w) // w.nbytes           # along the first axis
    if step:
        for at in range(0, len(w), step):
            yield w[at : at + step]
    else:
        for i in range(len(w)):
            yield from iter_blocks(w[i])


# %% book/chapters/09b_safetensors.md, cell 23
def to_c_order(w: np.ndarray, tile: int = 128) -> np.ndarray:
    """`w` in C order: itself if it is, else copied tile by tile."""
    if w.flags.c_contiguous or w.ndim != 2:
        return np.ascontiguousarray(w)
    out = np.empty(w.shape, w.dtype)
    for i in range(0, w.shape[0], tile):
        for j in range(0, w.shape[1], tile):
            part = slice(i, i + tile), slice(j, j + tile)
            out[part] = w[part]
    return out


# %% book/chapters/09b_safetensors.md, cell 24
def as_bytes(w: np.ndarray) -> memoryview:
    """The bytes of an array in C order, copied only if they are not."""
    return to_c_order(w).reshape(-1).view(np.uint8).data


# %% book/chapters/09b_safetensors.md, cell 43
def all_finite(w: np.ndarray) -> bool:
    """Whether a float array is free of NaN and infinities."""
    bits = 8 * w.dtype.itemsize
    infinity = np.array(np.inf, w.dtype).view(f"i{w.dtype.itemsize}")
    positive = int(w.view(f"i{w.dtype.itemsize}").max(initial=0))
    negative = int(w.view(f"u{w.dtype.itemsize}").max(initial=0))
    limit = int(infinity)
    return positive < limit and negative < limit + 2 ** (bits - 1)


# %% book/chapters/09b_safetensors.md, cell 44
def first_not_finite(w: Any) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity in C order, or None.

    `w` is any array, lazy ones included; it is read once, in blocks.
    Arrays of whole numbers are not read at all.
    """
    if np.dtype(w.dtype).kind in "iub":
        return None
    before = 0
    for block in iter_blocks(w):
        if not all_finite(block):
            wrong = ~np.isfinite(np.ravel(block).astype(np.float32))
            where = before + int(wrong.argmax())
            return tuple(map(int, np.unravel_index(where, w.shape)))
        before += block.size
    return None


# %% book/chapters/15_meta.md, cell 38
def share(wanted: slice, whole: int, at: int, size: int) -> slice:
    """What `wanted`, a slice of `whole` entries, names of `size` of
    them from `at` on, counted from there.
    """
    start, stop, step = wanted.indices(whole)
    first = max(start, at)
    first += (start - first) % step
    return slice(first - at, min(stop, at + size) - at, step)


# %% book/chapters/15_meta.md, cell 40
class ShardedArray(LazyArray):
    """Arrays behind one another along `axis`, not copied.

    `w[3]` stays lazy; another index, of integers and of slices that
    step forward, copies what it names and reads no other part.
    """

    def __init__(self, parts: list, axis: int) -> None:
        sizes = list(parts[0].shape)
        sizes[axis] = sum(part.shape[axis] for part in parts)
        self.parts, self.axis = parts, axis
        self.shape, self.dtype = tuple(sizes), parts[0].dtype

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) == 1 < self.ndim and not isinstance(
            index[0], slice
        ):
            return self.entry(range(len(self))[index[0]])
        index += (slice(None),) * (self.ndim - len(index))
        spans = [as_span(i, n) for i, n in zip(index, self.shape)]
        blocks = list(self.blocks(spans))
        if not blocks:                          # nothing, in its shape
            spans[self.axis] = slice(0)
            blocks = [np.asarray(self.parts[0][tuple(spans)])]
        whole = blocks[0]
        if len(blocks) > 1:
            whole = np.concatenate(blocks, self.axis)
        return whole[tuple(
            slice(None) if isinstance(i, slice) else 0 for i in index
        )]

    def blocks(self, spans: list[slice]) -> Iterator[np.ndarray]:
        """What `spans` name of each part that has some of it."""
        before, after = spans[: self.axis], spans[self.axis + 1 :]
        whole, at = self.shape[self.axis], 0
        for part in self.parts:
            size = part.shape[self.axis]
            mine = share(spans[self.axis], whole, at, size)
            if mine.start < mine.stop:
                yield np.asarray(part[(*before, mine, *after)])
            at += size

    def entry(self, i: int) -> Any:
        """Entry `i` of the first axis, not read yet."""
        if self.axis:
            parts = [part[i] for part in self.parts]
            return ShardedArray(parts, self.axis - 1)
        for part in self.parts:
            if i < len(part):
                break
            i -= len(part)
        return part[i]


# %% book/chapters/15_meta.md, cell 41
def as_span(index: Any, size: int) -> slice:
    """One axis' index as a slice that steps forward."""
    if isinstance(index, slice):
        if (index.step or 1) < 1:
            raise IndexError("a step must be at least 1")
        return index
    at = range(size)[index]
    return slice(at, at + 1)
