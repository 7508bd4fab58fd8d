# Generated from book/chapters/23_training.md by `make sync`; edit the chapter.
"""Texts, split and packed into rows, in an order that a step decides.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from annotated_moe.tokenizer import Tokenizer


# %% book/chapters/23_training.md, cell 14
def held_back(text: str, share: float) -> bool:
    """Whether a text is of the `share` that is kept for validation.

    A function of the text alone, so that no text is on both sides.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_texts(
    texts: Iterable[str], share: float
) -> tuple[list[str], list[str]]:
    """Texts to learn from, and those that are held back."""
    sides: tuple[list[str], list[str]] = [], []
    for text in texts:
        sides[held_back(text, share)].append(text)
    return sides


# %% book/chapters/23_training.md, cell 17
class Packed(NamedTuple):
    """Rows of T + 1 tokens, and the document that each token is in.

    The first T are read, the last T predicted. Documents are numbered
    from 0; padding has -1.
    """

    tokens: Any                             # int32 [B, T+1]
    documents: Any                          # int32 [B, T+1]


def pack(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> Packed:
    """All texts, an end after each, as rows of `length` + 1 tokens.

    The last row is padded. ValueError where there is no text.
    """
    if not any(texts):
        raise ValueError("there is no text to pack into rows")
    ids = [tokenizer.encode(text, add_eos=True) for text in texts]
    stream = np.concatenate(ids).astype(np.int32)
    number = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    count = max(1, -(-(len(stream) - 1) // length))
    fill = (0, count * length + 1 - len(stream))
    stream = np.pad(stream, fill, constant_values=0)
    number = np.pad(number, fill, constant_values=-1)
    at = np.arange(count)[:, None] * length + np.arange(length + 1)
    return Packed(stream[at], number[at].astype(np.int32))


# %% book/chapters/23_training.md, cell 20
@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `count`, in the order of one pass."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_at(
    rows: Packed, step: int, size: int, seed: int
) -> Packed:
    """The `size` rows that step `step` reads: a function of its
    arguments.

    Each pass over the rows has an order of its own.
    """
    count = len(rows.tokens)
    passes, at = np.divmod(np.arange(step * size, step * size + size),
                           count)
    picked = [int(shuffled(count, seed, int(epoch))[i])
              for epoch, i in zip(passes, at)]
    return Packed(rows.tokens[picked], rows.documents[picked])
