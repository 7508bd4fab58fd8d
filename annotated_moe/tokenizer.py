# Generated from book/chapters/01_tokenizer.md by `make sync`; edit the chapter.
"""A model computes with integers; people write characters. Between the
two stands a table of text pieces, one integer each, and a rule that
cuts any string into pieces of the table. By the end of this chapter you
will have learned such a table by hand, found that the library behind
Grok-1's vocabulary learns the same one, and seen why 131,072 pieces are
right for Grok-1 and 2,048 for the small model that ships here.
"""

import io
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import sentencepiece as spm


# %% book/chapters/01_tokenizer.md, cell 21
def training_bytes(texts: Iterable[str]) -> Iterable[bytes]:
    """The texts as UTF-8, without the trainer's reserved character."""
    for text in [texts] if isinstance(texts, str) else texts:
        yield text.replace("\u2585", " ").encode()


def reason(error: Exception) -> str:
    """What SentencePiece complains of, without its source lines."""
    if "sentences_.empty()" in str(error):
        return "there is no text to learn from"
    return str(error).rpartition("] ")[2] or str(error)


# %% book/chapters/01_tokenizer.md, cell 22
TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 2**30,
    "minloglevel": 2,
}
SPECIAL_PIECES: dict[str, Any] = {
    "pad_id": 0, "pad_piece": "[PAD]",
    "bos_id": 1, "bos_piece": "[BOS]",
    "eos_id": 2, "eos_piece": "[EOS]",
    "unk_id": 3, "unk_piece": "[UNK]",
}


# %% book/chapters/01_tokenizer.md, cell 23
def train_model(
    texts: Iterable[str],
    vocab_size: int,
    whole: Sequence[str] = ("\n", "\t"),
    **options: Any,
) -> bytes:
    """Learn a vocabulary; returns the bytes of a `.model` file.

    `whole` are strings that are always one piece; `options` override
    or extend `TRAINER_OPTIONS`. Writes no file and prints nothing.
    Raises ValueError if `texts` cannot fill a table of `vocab_size`.
    Source: Kudo & Richardson (2018); layout of ids as in Grok-1.
    """
    model = io.BytesIO()
    settings = TRAINER_OPTIONS | SPECIAL_PIECES | options
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=training_bytes(texts),
            model_writer=model,
            vocab_size=vocab_size,
            user_defined_symbols=list(whole),
            **settings,
        )
    except (RuntimeError, ValueError) as error:
        message = f"cannot learn {vocab_size} pieces: {reason(error)}"
        raise ValueError(message) from error
    return model.getvalue()


# %% book/chapters/01_tokenizer.md, cell 44
def open_model(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Parse `model`; `name` is what an error message calls it."""
    if not model:
        raise ValueError(f"{name} is empty; copy the file again")
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        processor.decode(list(range(processor.get_piece_size())))
    except (RuntimeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{name} is not a SentencePiece model or is damaged; "
            "compare its size with the original and copy it again"
        ) from error
    return processor


# %% book/chapters/01_tokenizer.md, cell 47
def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`; on failure `path` stays as it was."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# %% book/chapters/01_tokenizer.md, cell 48
# Field 3 of a model are its normalizer's settings, here in 4 bytes:
# their fields 3, add_dummy_prefix, and 4, remove_extra_whitespaces,
# are both to be 0.
NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


# %% book/chapters/01_tokenizer.md, cell 51
def split_at(text: str, marks: Iterable[str]) -> list[str]:
    """`text` cut around every mark, the longest first."""
    ordered = sorted(filter(None, marks), key=len, reverse=True)
    if not ordered:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, ordered))})", text)


# %% book/chapters/01_tokenizer.md, cell 52
def replace_all(text: str, table: Mapping[str, str]) -> str:
    """`text` with each key of `table` replaced, the longest first."""
    parts = split_at(text, table)
    return "".join([table.get(part, part) for part in parts])


# %% book/chapters/01_tokenizer.md, cell 53
@runtime_checkable
class Stream(Protocol):
    """Ids to text as they come."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


@runtime_checkable
class Backend(Protocol):
    """What every kind of tokenizer file has to offer.

    `specials` are strings that stand for one id each; `roles` says
    which ids are "bos", "eos", "pad" and "unk", or "eot", which ends
    a turn as "eos" ends a text; `prompt` are the ids that the model's
    own tokenizer puts before a prompt and after it. `letters` are
    characters in a text that stand for a special string which is to
    be spelled.
    """

    size: int
    specials: dict[str, int]
    roles: dict[str, int]
    prompt: tuple[list[int], list[int]]

    def encode(self, text: str) -> list[int]: ...
    def encode_special(
        self, text: str, letters: Mapping[str, str]) -> list[int]: ...
    def decode(self, ids: Sequence[int], specials: bool) -> str: ...
    def stream(self) -> Stream: ...


# %% book/chapters/01_tokenizer.md, cell 54
def role_ids(processor: Any) -> dict[str, int]:
    """The ids of [BOS], [EOS], [PAD] and [UNK], of those there are."""
    found = {
        "bos": processor.bos_id(), "eos": processor.eos_id(),
        "pad": processor.pad_id(), "unk": processor.unk_id(),
    }
    return {role: i for role, i in found.items() if i >= 0}


# %% book/chapters/01_tokenizer.md, cell 55
def control_pieces(processor: Any) -> dict[str, int]:
    """The pieces that no text contains, like [EOS], and their ids."""
    ids = range(processor.get_piece_size())
    return {
        processor.id_to_piece(i): i for i in ids
        if processor.is_control(i)
    }


# %% book/chapters/01_tokenizer.md, cell 56
def encode_pieces(
    self: "SentencePieceBackend", text: str, letters: Mapping[str, str]
) -> list[int]:
    """Ids of `text`, in which each special string is its one id."""
    ids: list[int] = []
    for number, part in enumerate(split_at(text, self.specials)):
        if part in self.specials:
            ids.append(self.specials[part])
        else:
            table = self.inner if number else self.processor
            ids += table.encode(replace_all(part, letters).encode())
    return ids


# %% book/chapters/01_tokenizer.md, cell 57
def decode_pieces(
    self: "SentencePieceBackend",
    ids: Sequence[int],
    specials: bool = False,
) -> str:
    """Text of `ids`; the special pieces by name, or not at all."""
    text, table = "", self.processor
    names = self.names(specials)
    for name, run in groupby(ids, names.get):
        part = list(run)
        text += table.decode(part) if name is None else name * len(part)
        if name != "":                      # something went before
            table = self.inner
    return text


# %% book/chapters/01_tokenizer.md, cell 58
def piece_names(
    self: "SentencePieceBackend", specials: bool
) -> dict[int, str]:
    """What stands in a text for ids that are not text."""
    found = self.specials.items() if specials else ()
    return {i: piece for piece, i in found}


# %% book/chapters/01_tokenizer.md, cell 60
def take_characters(data: bytes, final: bool) -> tuple[str, bytes]:
    """Split UTF-8 `data` into text and the bytes still to wait for.

    With `final` there is nothing to wait for. Each byte that belongs
    to no character becomes one U+FFFD, as in SentencePiece.
    """
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data" and not final:
                break
            text, data = text + "\ufffd", data[1:]
    return text, data


# %% book/chapters/01_tokenizer.md, cell 62
def piece_byte(self: "SentencePieceBackend", token: int) -> bytes:
    """The byte of a piece such as <0x41>; of others, nothing."""
    if not self.processor.is_byte(token):
        return b""
    return bytes.fromhex(self.processor.id_to_piece(token)[3:5])


# %% book/chapters/01_tokenizer.md, cell 63
class PieceStream:
    """Ids to text as they come; joined, the text is `decode(ids)`.

    Shows no character in part, and nothing for [PAD] and its like.
    """

    def __init__(self, backend: "SentencePieceBackend") -> None:
        self.backend = backend
        self.head: list[int] = []
        self.data = b""

    def push(self, token: int) -> str:
        """The text that `token` completes, often all of its own."""
        before = self.backend.decode(self.head)
        byte = self.backend.byte_of(token)
        if byte:
            text, self.data = take_characters(self.data + byte, False)
        else:
            after = self.backend.decode([*self.head, token])
            text = self.flush() + after[len(before) :]
        if not before:
            self.head.append(token)
        return text

    def flush(self) -> str:
        """The rest: U+FFFD for the bytes of an unfinished character."""
        text, self.data = take_characters(self.data, True)
        return text


# %% book/chapters/01_tokenizer.md, cell 64
class SentencePieceBackend:
    """A SentencePiece model; its methods are those of `Backend`."""

    def __init__(self, model: bytes, name: str = "the model") -> None:
        self.model, self.name = model, name
        self.processor = open_model(model, name)
        self.size: int = self.processor.get_piece_size()
        self.specials = control_pieces(self.processor)
        self.roles = role_ids(self.processor)
        self.prompt: tuple[list[int], list[int]] = ([], [])

    @cached_property
    def inner(self) -> Any:
        """The library for what is not the beginning of a text."""
        return open_model(self.model + NO_PREFIX, self.name)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text.encode())

    def stream(self) -> PieceStream:
        return PieceStream(self)

    encode_special, decode = encode_pieces, decode_pieces
    names, byte_of = piece_names, piece_byte


# %% book/chapters/01_tokenizer.md, cell 69
COMPANIONS: list[str] = []                  # names, or patterns


@dataclass(frozen=True)
class TokenizerFile:
    """The bytes of a tokenizer and what stands beside them.

    `name` is what an error calls it; `folder` is None for bytes that
    came from no file; `companions` are other files by their names.
    """

    data: bytes
    name: str
    folder: Path | None
    companions: dict[str, bytes]


# %% book/chapters/01_tokenizer.md, cell 70
@dataclass(frozen=True)
class TokenizerFormat:
    """How to know a format, how to open it, and its usual name."""

    file_name: str
    matches: Callable[[TokenizerFile], bool]
    open: Callable[[TokenizerFile], Backend]


FORMATS = [TokenizerFormat(
    "tokenizer.model", lambda file: True,
    lambda file: SentencePieceBackend(file.data, file.name),
)]


# %% book/chapters/01_tokenizer.md, cell 71
def read_tokenizer(
    source: str | os.PathLike[str] | bytes,
) -> TokenizerFile:
    """A tokenizer and its companions, given its path or its bytes."""
    if isinstance(source, bytes):
        return TokenizerFile(source, "the tokenizer", None, {})
    path, name = Path(source), repr(os.fspath(source))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise type(error)(
            f"cannot read the tokenizer {name} ({error.strerror}); "
            "give the path of a SentencePiece model or of another "
            "tokenizer, such as 'tokenizer.model'"
        ) from error
    return TokenizerFile(data, name, path.parent, {
        file.relative_to(path.parent).as_posix(): file.read_bytes()
        for pattern in COMPANIONS
        for file in sorted(path.parent.glob(pattern)) if file.is_file()
    })


# %% book/chapters/01_tokenizer.md, cell 72
def encode_text(
    self: "Tokenizer", text: str, add_bos: bool = False,
    add_eos: bool = False, specials: bool = False,
) -> list[int]:
    """Ids of `text`, and nothing else unless asked.

    `[EOS]` and its like in `text` are letters, as anything is that
    somebody typed; with `specials` they are the ids they name.
    ValueError for half a surrogate pair, or if [BOS] does not exist.
    """
    bos = [required(self.bos_id, "[BOS]")] if add_bos else []
    eos = [required(self.eos_id, "[EOS]")] if add_eos else []
    text.encode()                           # or no text: ValueError
    if specials:
        return bos + self.backend.encode_special(text, {}) + eos
    return bos + self.backend.encode(text) + eos


# %% book/chapters/01_tokenizer.md, cell 73
def required(token: int | None, piece: str) -> int:
    """`token`, or ValueError if the model has no such piece."""
    if token is None:
        raise ValueError(f"this vocabulary has no {piece} piece")
    return token


# %% book/chapters/01_tokenizer.md, cell 74
def prompt_ids(
    self: "Tokenizer", text: str, add_bos: bool | None = None
) -> list[int]:
    """Ids of a text to go on from, as the model was trained to see it.

    `add_bos` True or False puts [BOS] first, or does not; None does
    what the tokenizer that came with the model does.
    """
    before, after = self.backend.prompt
    if add_bos is not None:
        before = [i for i in before if i != self.bos_id]
    if add_bos:
        before = [required(self.bos_id, "[BOS]"), *before]
    return before + self.encode(text) + after


# %% book/chapters/01_tokenizer.md, cell 75
def check_id(token: SupportsIndex) -> int:
    """`token` as an int; ValueError if it is negative."""
    token = operator.index(token)
    if token < 0:
        raise ValueError(f"token id {token} is not one of 0, 1, 2 ...")
    return token


def decode_ids(
    self: "Tokenizer", ids: Iterable[SupportsIndex],
    specials: bool = False,
) -> str:
    """Text of `ids`; nothing for ids that this file does not have.

    Shows nothing for [EOS] and its like, or with `specials` names.
    ValueError for a negative id.
    """
    known = [i for i in map(check_id, ids) if i < self.vocab_size]
    return self.backend.decode(known, specials)


# %% book/chapters/01_tokenizer.md, cell 76
class TokenStream:
    """`push` each id, then `flush`: joined, `decode` of the ids."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.size = tokenizer.vocab_size
        self.stream = tokenizer.backend.stream()

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes; ValueError below 0."""
        token = check_id(token)
        return self.stream.push(token) if token < self.size else ""

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character."""
        return self.stream.flush()


def open_stream(self: "Tokenizer") -> TokenStream:
    """A `TokenStream`: `push(id)` each id, then `flush()`."""
    return TokenStream(self)


# %% book/chapters/01_tokenizer.md, cell 77
def require_ids(
    self: "Tokenizer", ids: list[int], vocab_size: int
) -> list[int]:
    """The same ids; ValueError if a model of this size lacks one."""
    for i in ids:
        if i >= vocab_size:
            piece = self.decode([i], specials=True)
            raise ValueError(
                f"this text needs token {i} ({piece!r}), but the model "
                f"has only {vocab_size}: leave it out of the text, or "
                "use the tokenizer that came with the model"
            )
    return ids


# %% book/chapters/01_tokenizer.md, cell 78
def save_model(self: "Tokenizer", path: str | os.PathLike[str]) -> None:
    """Write the model to `path`, all of it or nothing."""
    write_whole(Path(path), self.model_bytes)


def save_files(
    self: "Tokenizer", folder: str | os.PathLike[str]
) -> None:
    """Write it to `folder` by its usual name, and its companions."""
    self.save(Path(folder) / self.format.file_name)
    for name, data in self.companions.items():
        write_whole(Path(folder) / name, data)


# %% book/chapters/01_tokenizer.md, cell 79
def train_on(
    cls: "type[Tokenizer]", texts: Iterable[str], vocab_size: int,
    **options: Any,
) -> "Tokenizer":
    """Learn from `texts`; options are those of `train_model`."""
    return cls(train_model(texts, vocab_size, **options))


# %% book/chapters/01_tokenizer.md, cell 80
class Tokenizer:
    """One tokenizer file: encode, decode, stream, save.

    Takes the path of the file, or its bytes, and keeps those as
    `model_bytes`. `pad_id`, `bos_id`, `eos_id` and `unk_id` are None
    where the file names no such piece; `stop_ids` end an answer.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        file = read_tokenizer(source)
        self.model_bytes, self.companions = file.data, file.companions
        self.format = next(f for f in FORMATS if f.matches(file))
        self.backend = self.format.open(file)
        self.vocab_size, roles = self.backend.size, self.backend.roles
        self.pad_id, self.bos_id = roles.get("pad"), roles.get("bos")
        self.eos_id, self.unk_id = roles.get("eos"), roles.get("unk")
        self.stop_ids = tuple(
            roles[role] for role in ("eos", "eot") if role in roles)

    encode, encode_prompt, decode = encode_text, prompt_ids, decode_ids
    stream, check_ids = open_stream, require_ids
    save, save_in, train = save_model, save_files, classmethod(train_on)


# %% book/chapters/01_tokenizer.md, cell 85
def open_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer in `folder`, or None where there is no file.

    Names are tried in the order of `FORMATS`. ValueError says what is
    wrong with a file, OSError that it cannot be read.
    """
    for file_name in dict.fromkeys(f.file_name for f in FORMATS):
        if os.path.lexists(Path(folder) / file_name):
            return Tokenizer(Path(folder) / file_name)
    return None
