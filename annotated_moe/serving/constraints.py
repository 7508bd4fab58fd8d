# Generated from book/chapters/31b_grammar.md by `make sync`; edit the chapter.
"""A program that uses a model's answers needs them in a form that it
can read: a JSON object with given fields, one word of three, a date. A
prompt can ask for the form, and mostly gets it. By the end of this
chapter every answer that ends by itself has it. Before each token we
forbid every token after which no continuation could still satisfy the
rule, so that even a model which never learned JSON writes it without a
mistake. The server's field `response_format` takes the rule, and
enforces every one that it takes.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from annotated_moe.generate import Model
from annotated_moe.tokenizer import Tokenizer, needed


# %% book/chapters/31b_grammar.md, cell 5
@lru_cache(maxsize=4)
def piece_reader(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What gives the bytes of an id; none of one that is no text."""
    backend: Any = tokenizer.backend
    raw, hidden = getattr(backend, "raw", None), set[int]()
    if raw is None and not hasattr(backend, "byte_of"):
        hidden |= backend.hidden
        return lambda i: b"" if i in hidden else backend.pieces[i]
    anchor = tokenizer.encode("a")
    before = len(backend.decode(anchor, False))

    def read(i: int) -> bytes:
        if raw is not None and i in raw:    # such as <0x41>
            return bytes([int(backend.pieces[i][3:5], 16)])
        if raw is None and (byte := backend.byte_of(i)):
            return byte
        return backend.decode([*anchor, i], False)[before:].encode()

    return read


def spelled(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of an id."""
    return piece_reader(tokenizer)(token)


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id."""
    return [*map(piece_reader(tokenizer), range(tokenizer.vocab_size))]


# %% book/chapters/31b_grammar.md, cell 8
class Vocabulary:
    """A tokenizer, in the form that `llguidance` asks for."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        pieces = token_bytes(tokenizer)
        empty = [i for i, piece in enumerate(pieces) if not piece]
        for i in empty:                     # a mark, in no UTF-8
            pieces[i] = b"\xff<%d>" % i
        self.special_token_ids, self.tokens = empty, pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.longest = max(map(len, pieces))

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids = self.tokenizer.encode(data.decode("utf-8", "replace"))
        if b"".join([self.tokens[i] for i in ids]) == data:
            return ids
        return self.greedy(data)

    def greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        while data:
            sizes = range(min(self.longest, len(data)), 0, -1)
            size = next((n for n in sizes if data[:n] in self.ids), 0)
            if not size:                    # a byte without a token
                return ids
            ids.append(self.ids[data[:size]])
            data = data[size:]
        return ids


# %% book/chapters/31b_grammar.md, cell 9
class Grammar:
    """A constraint: what `llguidance` allows next."""

    def __init__(self, matcher: Any, known: int, size: int) -> None:
        self.matcher, self.known, self.size = matcher, known, size

    def mask(self) -> np.ndarray:
        """bool [V]; ValueError if the grammar became too complex."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise ValueError(first_line(self.matcher.get_error()))
        allowed = np.zeros(self.size, bool)
        most = min(self.known, self.size)
        allowed[:most] = np.unpackbits(
            bits, bitorder="little")[:most].astype(bool)
        return allowed

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def done(self) -> bool:
        return self.matcher.is_stopped()


def first_line(text: str) -> str:
    return " ".join(text.split())[:160]


# %% book/chapters/31b_grammar.md, cell 10
@lru_cache(maxsize=4)
def open_vocabulary(tokenizer: Tokenizer, end: int) -> Any:
    """The library's view of a tokenizer; made once."""
    library = needed("llguidance", "response_format", "serve")
    return library.LLTokenizer(
        library.TokenizerWrapper(Vocabulary(tokenizer, end)))


def grammar_for(model: Model, kind: str, rule: Any) -> Grammar:
    """A constraint by a "json_schema" or a "regex"; ValueError."""
    library = needed("llguidance", "response_format", "serve")
    tokenizer = model.require_tokenizer()
    ends = [*model.config.eos_ids, *tokenizer.stop_ids]
    if not ends:
        raise ValueError("this model has no token that ends a text")
    make = library.LLMatcher
    source = (make.grammar_from_regex(rule) if kind == "regex" else
              make.grammar_from_json_schema(json.dumps(rule),
                                            overrides=COMPACT))
    limits = library.LLParserLimits(
        max_lexer_states=20_000, verbose_errors=False)
    vocabulary = open_vocabulary(tokenizer, ends[0])
    matcher = make(vocabulary, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(first_line(matcher.get_error()))
    return Grammar(
        matcher, tokenizer.vocab_size, model.config.vocab_size)


# Space between the parts has no bound, so it may be all that comes.
COMPACT = {"whitespace_flexible": False}
