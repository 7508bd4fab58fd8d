# Generated from book/chapters/01_tokenizer.md, book/chapters/19_vocabularies.md by `make sync`; edit the chapters.
"""A model computes with integers; people write characters. Between the
two stands a table of text pieces, one integer each, and a rule that
cuts any string into pieces of the table. By the end of this chapter you
will have learned such a table by hand, found that the library behind
Grok-1's vocabulary learns the same one, and seen why 131,072 pieces are
right for Grok-1 and 2,048 for the small model that ships here.
"""

import base64
import binascii
import codecs
import importlib
import io
import json
import operator
import os
import re
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import ModuleType
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
def split_at(text: str, separators: Iterable[str]) -> list[str]:
    """`text` cut around every separator, the longest first."""
    ordered = sorted(filter(None, separators), key=len, reverse=True)
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
    TypeError for what is no text, ValueError for half a surrogate pair
    in it, or if [BOS] does not exist.
    """
    if not isinstance(text, str):
        raise TypeError(f"encode takes a text: {text!r:.80}")
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


# %% book/chapters/19_vocabularies.md, cell 9
COMPANIONS += [
    "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json",
]


# %% book/chapters/19_vocabularies.md, cell 10
def damaged(name: str, what: str, why: str) -> ValueError:
    return ValueError(
        f"{name} is not {what} or is damaged ({why[:120]}); compare "
        "its size with the original and copy it again"
    )


# %% book/chapters/19_vocabularies.md, cell 11
def parse_json(data: bytes, name: str, what: str) -> dict[str, Any]:
    """A JSON object, or ValueError that names the file."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(name, what, str(error)) from None
    if not isinstance(content, dict):
        raise damaged(name, what, "it holds no JSON object")
    return content


# %% book/chapters/19_vocabularies.md, cell 12
def read_settings(companions: Mapping[str, bytes]) -> dict[str, Any]:
    """The settings of `tokenizer_config.json` and its older kin."""
    settings: dict[str, Any] = {}
    for name in ["special_tokens_map.json", "tokenizer_config.json"]:
        if name in companions:
            found = parse_json(companions[name], repr(name), "JSON")
            settings |= {
                k: v for k, v in found.items() if v is not None}
    return settings


# %% book/chapters/19_vocabularies.md, cell 13
def token_text(token: Any) -> str:
    """The text of a token that is a string, or a table with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


# %% book/chapters/19_vocabularies.md, cell 17
class MissingExtra(ImportError, ValueError):
    """A library that only some tokenizers need is not installed."""


# %% book/chapters/19_vocabularies.md, cell 18
def needed(
    module: str, what: str, extra: str = "tokenizers"
) -> ModuleType:
    """The library `module`, imported when something needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtra(
            f"{what} needs the library {module!r}: "
            f"pip install 'annotated-moe[{extra}]'"
        ) from None


# %% book/chapters/19_vocabularies.md, cell 59
def is_json(file: TokenizerFile) -> bool:
    """Whether it is a `tokenizer.json`, by its first character."""
    return re.match(rb"\s*\{", file.data) is not None


# %% book/chapters/19_vocabularies.md, cell 60
def is_ranks(file: TokenizerFile) -> bool:
    """Whether it is Meta's: a piece in base64, a space, a number."""
    line = rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n"
    return re.match(line, file.data) is not None


# %% book/chapters/19_vocabularies.md, cell 61
PLAIN_TOKEN: dict[str, Any] = {
    "id": None, "content": "", "single_word": False, "lstrip": False,
    "rstrip": False, "normalized": False, "special": False,
}
ROLES = ["bos", "eos", "pad", "unk"]


def named_tokens(settings: Mapping[str, Any]) -> list[str]:
    """The tokens that settings give a name or a place in a list."""
    found = [settings.get(f"{role}_token") for role in ROLES]
    for name in ["additional_special_tokens", "extra_special_tokens"]:
        more = settings.get(name) or []
        found += more.values() if isinstance(more, dict) else more
    return [text for text in map(token_text, found) if text]


# %% book/chapters/19_vocabularies.md, cell 62
def stated_tokens(file: TokenizerFile) -> list[dict[str, Any]]:
    """The tokens that the files beside a tokenizer add to it."""
    settings = read_settings(file.companions)
    named = named_tokens(settings)
    listed = settings.get("added_tokens_decoder")
    if listed is None and "added_tokens.json" in file.companions:
        name = "added_tokens.json"
        ids = parse_json(file.companions[name], repr(name), "JSON")
        listed = {i: {"content": s, "special": s in named}
                  for s, i in ids.items()}
    try:
        tokens = [PLAIN_TOKEN | {
            k: v for k, v in {**token, "id": int(i)}.items()
            if k in PLAIN_TOKEN} for i, token in (listed or {}).items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise damaged("the list of added tokens beside " + file.name,
                      "a list of tokens", repr(error)) from None
    tokens = [t for t in tokens if token_text(t["content"])]
    tokens.sort(key=operator.itemgetter("id"))
    known = {token["content"] for token in tokens}
    return tokens + [
        PLAIN_TOKEN | {"content": text, "special": True}
        for text in dict.fromkeys(named) if text not in known]


# %% book/chapters/19_vocabularies.md, cell 63
def is_marker(token: Mapping[str, Any]) -> bool:
    """Whether an added token has a meaning beyond its letters."""
    shape = re.fullmatch("<[|｜].+[|｜]>", token["content"])
    return bool(token["special"] or shape)


# %% book/chapters/19_vocabularies.md, cell 64
def roles_of(
    settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, int]:
    """The ids of the tokens that `tokenizer_config.json` names."""
    texts = {r: token_text(settings.get(f"{r}_token")) for r in ROLES}
    return {r: ids[text] for r, text in texts.items() if text in ids}


# %% book/chapters/19_vocabularies.md, cell 65
def flagged_prompt(
    settings: Mapping[str, Any], roles: Mapping[str, int], bos: bool
) -> tuple[list[int], list[int]]:
    """What `add_bos_token` and `add_eos_token` put around a prompt;
    `bos` is for where the first of them is not given."""
    add = {"bos": settings.get("add_bos_token", bos),
           "eos": settings.get("add_eos_token", False)}
    first, last = ([roles[r]] if add[r] and r in roles else []
                   for r in ("bos", "eos"))
    return first, last


# %% book/chapters/19_vocabularies.md, cell 66
class ByteStream:
    """Bytes to text as they come, whole characters at a time."""

    def __init__(self, backend: "ByteBackend") -> None:
        self.backend = backend
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        hidden = token in self.backend.hidden
        piece = b"" if hidden else self.backend.pieces[token]
        return self.decoder.decode(piece)

    def flush(self) -> str:
        return self.decoder.decode(b"", True)


# %% book/chapters/19_vocabularies.md, cell 67
class ByteBackend:
    """Every id is a string of bytes, and a text is their sum."""

    def __init__(self, pieces: list[bytes], coder: Any) -> None:
        self.pieces, self.coder, self.size = pieces, coder, len(pieces)
        self.specials: dict[str, int] = coder.specials
        self.hidden: frozenset[int] = coder.hidden
        self.roles: dict[str, int] = coder.roles
        self.prompt: tuple[list[int], list[int]] = coder.prompt

    def encode(self, text: str) -> list[int]:
        return self.coder.encode(text)

    def encode_special(
        self, text: str, letters: Mapping[str, str]
    ) -> list[int]:
        return self.coder.encode_special(text, letters)

    def decode(self, ids: Sequence[int], specials: bool) -> str:
        shown = [i for i in ids if specials or i not in self.hidden]
        data = b"".join([self.pieces[i] for i in shown])
        return data.decode("utf-8", "replace")

    def stream(self) -> Any:
        return ByteStream(self)


# %% book/chapters/19_vocabularies.md, cell 68
def read_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Piece -> rank, from lines of base64 and a number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            why = f"line {number + 1} is no base64 piece and rank"
            raise damaged(name, "a tiktoken file", why) from None
    if list(ranks.values()) != list(range(len(data.splitlines()))):
        why = "its ranks do not count up from 0"
        raise damaged(name, "a tiktoken file", why)
    return ranks


# %% book/chapters/19_vocabularies.md, cell 69
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
OPENER, SPACES = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = "|".join([
    ENDINGS, OPENER + r"\p{L}+", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", SPACES,
])
LLAMA4_PATTERN = "|".join([
    f"{OPENER}{UPPER}*{LOWER}+{ENDINGS}?",
    f"{OPENER}{UPPER}+{LOWER}*{ENDINGS}?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES,
])


# %% book/chapters/19_vocabularies.md, cell 70
def reserved(name: str, start: int, stop: int) -> list[str]:
    """Names that Meta keeps free for later."""
    stem = f"{name}_reserved" if name else "reserved"
    return [f"<|{stem}_special_token_{i}|>" for i in range(start, stop)]


def marks(names: str) -> list[str]:
    """`a b` as `<|a|>` and `<|b|>`."""
    return [f"<|{name}|>" for name in names.split()]


# %% book/chapters/19_vocabularies.md, cell 71
LLAMA3_SPECIALS = [
    *marks("begin_of_text end_of_text"), *reserved("", 0, 2),
    *marks("finetune_right_pad_id step_id start_header_id"),
    *marks("end_header_id eom_id eot_id python_tag image"),
    *reserved("", 2, 246),
]
LLAMA4_SPECIALS = [
    *marks("begin_of_text end_of_text"),
    *marks("fim_prefix fim_middle fim_suffix"),
    *marks("header_start header_end eom eot step"),
    *reserved("text_post_train", 0, 6),
    *marks("python_start python_end finetune_right_pad"),
    *reserved("text_post_train", 8, 69),
    *marks("image_start image_end"), *reserved("vision", 0, 2),
    *marks("tile_x_separator tile_y_separator"),
    *reserved("vision", 2, 6), *marks("image"),
    *reserved("vision", 6, 7), *marks("patch"),
    *reserved("vision", 7, 1048), *reserved("reasoning", 0, 8),
    *marks("reasoning_thinking_start reasoning_thinking_end"),
    *reserved("", 0, 904),
]


# %% book/chapters/19_vocabularies.md, cell 72
@dataclass(frozen=True)
class MetaForm:
    """What a tiktoken file does not say about itself."""

    pattern: str
    specials: list[str]
    pad: str
    eot: str


# %% book/chapters/19_vocabularies.md, cell 73
META_FORMS = {
    128_000: MetaForm(LLAMA3_PATTERN, LLAMA3_SPECIALS,
                      "<|finetune_right_pad_id|>", "<|eot_id|>"),
    200_000: MetaForm(LLAMA4_PATTERN, LLAMA4_SPECIALS,
                      "<|finetune_right_pad|>", "<|eot|>"),
}


# %% book/chapters/19_vocabularies.md, cell 74
def stretches(text: str) -> Iterator[str]:
    """`text` in parts that tiktoken can take, cut as Meta cuts it."""
    for at in range(0, len(text), 400_000):
        part, start = text[at : at + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part):
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[start:cut]
                start = cut
        yield part[start:]


# %% book/chapters/19_vocabularies.md, cell 75
class RankCoder:
    """Text to ids by tiktoken, which fetches nothing."""

    def __init__(
        self, ranks: dict[bytes, int], form: MetaForm,
        specials: dict[str, int], settings: Mapping[str, Any],
    ) -> None:
        self.specials = specials
        self.hidden = frozenset(specials.values())
        self.library = needed("tiktoken", "this tokenizer").Encoding(
            name="given", pat_str=form.pattern, mergeable_ranks=ranks,
            special_tokens={})
        start = len(ranks)
        self.roles = {r: start + form.specials.index(s) for r, s in {
            "bos": "<|begin_of_text|>", "eos": "<|end_of_text|>",
            "pad": form.pad, "eot": form.eot}.items()}
        self.roles |= roles_of(settings, specials)
        self.prompt = flagged_prompt(settings, self.roles, bos=True)

    def encode(self, text: str) -> list[int]:
        plain = self.library.encode_ordinary
        return [i for part in stretches(text) for i in plain(part)]

    def encode_special(
        self, text: str, letters: Mapping[str, str]
    ) -> list[int]:
        return [i for part in split_at(text, self.specials) for i in (
            [self.specials[part]] if part in self.specials
            else self.encode(replace_all(part, letters)))]


# %% book/chapters/19_vocabularies.md, cell 76
def open_ranks(file: TokenizerFile) -> Backend:
    """Meta's `tokenizer.model`; the special tokens follow the ranks."""
    ranks = read_ranks(file.data, file.name)
    form = META_FORMS.get(len(ranks))
    if form is None:
        known = " or ".join(f"{n:,}" for n in META_FORMS)
        raise ValueError(
            f"{file.name} has {len(ranks):,} base tokens, but the "
            f"tiktoken files of Llama 3 and 4 {known}: is it whole?"
        )
    names = dict(enumerate(form.specials, len(ranks)))
    names |= {t["id"]: t["content"] for t in stated_tokens(file)
              if t["id"] is not None and t["id"] >= len(ranks)}
    pieces = [*ranks, *(names.get(i, "").encode()
                        for i in range(len(ranks), max(names) + 1))]
    specials = {text: i for i, text in names.items()}
    settings = read_settings(file.companions)
    coder = RankCoder(ranks, form, specials, settings)
    return ByteBackend(pieces, coder)


# %% book/chapters/19_vocabularies.md, cell 82
def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 wrote bytes in its vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    codes = shown + [256 + i for i in range(len(rest))]
    return {chr(c): b for c, b in zip(codes, shown + rest)}


# %% book/chapters/19_vocabularies.md, cell 83
def piece_bytes(piece: str, alphabet: Mapping[str, int]) -> bytes:
    """The bytes of a piece; an added token may be written as it is."""
    if all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return piece.encode()


# %% book/chapters/19_vocabularies.md, cell 84
LOCAL = {"Replace", "ByteFallback", "Fuse", "Metaspace", "WordPiece"}


# %% book/chapters/19_vocabularies.md, cell 85
def decodes_locally(decoder: dict[str, Any] | None) -> bool:
    """Whether a piece's text depends only on what stands before it."""
    if decoder is None or decoder.get("type") in LOCAL:
        return True
    if decoder.get("type") == "Strip":
        return not decoder.get("stop")
    inner = decoder.get("decoders", [None])
    return decoder.get("type") == "Sequence" and all(
        part is not None and decodes_locally(part) for part in inner
    )


# %% book/chapters/19_vocabularies.md, cell 86
class TextStream:
    """Ids to text by the library's own `decode`, as they come."""

    def __init__(self, backend: "TextBackend") -> None:
        self.backend = backend
        self.head: list[int] = []               # up to the first text
        self.run: list[int] = []                # bytes of characters

    def push(self, token: int) -> str:
        if token in self.backend.hidden:
            return ""
        self.run.append(token)
        return "" if token in self.backend.raw else self.flush()

    def flush(self) -> str:
        """What the run adds; a head makes the first space right."""
        before = self.backend.decode(self.head, True)
        both = self.head + self.run
        if not before:
            self.head = both
        self.run = []
        return self.backend.decode(both, True)[len(before) :]


# %% book/chapters/19_vocabularies.md, cell 87
class TextBackend(ByteBackend):
    """A `tokenizer.json` whose pieces are text, bytes if need be."""

    def __init__(self, pieces: list[bytes], coder: Any) -> None:
        super().__init__(pieces, coder)
        raw = re.compile(b"<0x[0-9A-F]{2}>")
        self.raw = {i for i, p in enumerate(pieces) if raw.fullmatch(p)}

    def decode(self, ids: Sequence[int], specials: bool) -> str:
        shown = [i for i in ids if specials or i not in self.hidden]
        return self.coder.library.decode(
            shown, skip_special_tokens=False)

    def stream(self) -> Any:
        return TextStream(self)


# %% book/chapters/19_vocabularies.md, cell 88
def complete(form: dict[str, Any], file: TokenizerFile) -> set[str]:
    """Add to a `tokenizer.json` what stands beside it, and flag every
    marker as special; returns those that are to be hidden."""
    added = form["added_tokens"] = list(form.get("added_tokens") or [])
    known = {token["content"] for token in added}
    for token in stated_tokens(file):
        if token["content"] not in known:
            free = max([t["id"] for t in added], default=-1) + 1
            token["id"] = free if token["id"] is None else token["id"]
            added.append(token)
    hidden = {t["content"] for t in added if t["special"]}
    for token in added:
        token["special"] = is_marker(token)
    return hidden


# %% book/chapters/19_vocabularies.md, cell 89
def renamed(
    form: dict[str, Any], letters: Mapping[str, str]
) -> dict[str, Any]:
    """A `tokenizer.json` whose tokens are called as in `letters`."""
    names = {special: c for c, special in letters.items()}
    added = [{**t, "content": names.get(t["content"], t["content"])}
             for t in form["added_tokens"]]
    model = dict(form["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        vocab = {names.get(s, s): i for s, i in vocab.items()}
    else:
        vocab = [[names.get(s, s), score] for s, score in vocab]
    model["vocab"] = vocab
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return {**form, "added_tokens": added, "model": model}


def change_places(
    text: str, specials: Iterable[str], letters: Mapping[str, str]
) -> str:
    """Private characters for special strings, and the reverse."""
    table = {special: special for special in specials}
    table |= {special: c for c, special in letters.items()}
    return replace_all(text, table | dict(letters))


# %% book/chapters/19_vocabularies.md, cell 90
def open_library(kind: Any, form: dict[str, Any], plain: bool) -> Any:
    """The library's object; `plain` takes markers for letters."""
    library = kind.from_str(json.dumps(form))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = plain
    return library


def library_prompt(library: Any) -> tuple[list[int], list[int]]:
    """What a `tokenizer.json` itself puts around a prompt."""
    bare = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []


# %% book/chapters/19_vocabularies.md, cell 91
def encode_at_word(
    self: "LibraryCoder", text: str, letters: Mapping[str, str]
) -> list[int]:
    """Ids of `text`, special strings at their word."""
    library = self.marked
    if letters:
        text = change_places(text, self.specials, letters)
        form = renamed(self.form, letters)
        library = open_library(self.kind, form, plain=False)
    return library.encode(text, add_special_tokens=False).ids


# %% book/chapters/19_vocabularies.md, cell 92
class LibraryCoder:
    """The `tokenizers` library on one file."""

    def __init__(self, form: dict[str, Any], file: Any) -> None:
        self.kind = needed("tokenizers", file.name).Tokenizer
        hidden, self.form = complete(form, file), form
        self.library = open_library(self.kind, form, plain=True)
        self.vocab = self.library.get_vocab(with_added_tokens=True)
        self.specials = {
            t["content"]: self.vocab[t["content"]]
            for t in form["added_tokens"] if t["special"]}
        self.hidden = frozenset(self.vocab[s] for s in hidden)
        self.prompt = library_prompt(self.library)
        settings = read_settings(file.companions)
        self.roles = dict(zip(["bos"], self.prompt[0]))
        self.roles |= roles_of(settings, self.vocab)

    @cached_property
    def marked(self) -> Any:
        return open_library(self.kind, self.form, plain=False)

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    encode_special = encode_at_word


# %% book/chapters/19_vocabularies.md, cell 93
def open_json(file: TokenizerFile) -> Backend:
    """A `tokenizer.json`, through the library that writes them."""
    form = parse_json(file.data, file.name, "a tokenizer.json")
    decoder = form.get("decoder")
    if "model" not in form:
        raise damaged(file.name, "a tokenizer.json", "no model in it")
    try:
        byte_level = (decoder or {}).get("type") == "ByteLevel"
        local = byte_level or decodes_locally(decoder)
        coder = LibraryCoder(form, file)
    except MissingExtra:
        raise
    except Exception as error:              # the library has no class
        raise damaged(
            file.name, "a tokenizer.json", str(error)) from None
    if not local:
        raise ValueError(
            f"{file.name} has a decoder that we cannot stream: not "
            f"ByteLevel or {sorted(LOCAL)}, but {str(decoder)[:60]}"
        )
    pieces = [b""] * (max(coder.vocab.values(), default=-1) + 1)
    alphabet = byte_alphabet() if byte_level else {}
    for piece, i in coder.vocab.items():
        pieces[i] = piece_bytes(piece, alphabet)
    return (ByteBackend if byte_level else TextBackend)(pieces, coder)


# %% book/chapters/19_vocabularies.md, cell 95
def token_pattern(
    tokens: Sequence[Mapping[str, Any]]
) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest first, each in a group."""
    parts = []
    for token in tokens:
        text = re.escape(token["content"])
        if token["single_word"]:
            text = rf"(?<!\w){text}(?!\w)"
        left = r"\s*" if token["lstrip"] else ""
        right = r"\s*" if token["rstrip"] else ""
        parts.append(f"({left}{text}{right})")
    return re.compile("|".join(parts) or "(?!)")


# %% book/chapters/19_vocabularies.md, cell 96
def prepend_scheme(settings: Mapping[str, Any]) -> str:
    """Whether a space goes before the "first" part of a text, before
    "always" each, or "never" any."""
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") else "first"


# %% book/chapters/19_vocabularies.md, cell 97
def encode_part(
    self: "AddedPieces", part: str, at: int, letters: Mapping[str, str]
) -> list[int]:
    """Ids of what stands at `at`, between two added tokens."""
    part = replace_all(part, letters)
    if at == 0 and self.prepend != "never":
        return self.processor.encode(part.encode())
    if self.prepend == "always" and part[:1] not in ("", " "):
        part = f" {part}"
    return self.inner.encode(part.encode())


# %% book/chapters/19_vocabularies.md, cell 98
def encode_around(
    self: "AddedPieces", text: str, letters: Mapping[str, str],
    tokens: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Ids of `text`, in which each of `tokens`, or of all that were
    added, is one id."""
    tokens = self.added if tokens is None else tokens
    ids, at = list[int](), 0
    for match in token_pattern(tokens).finditer(text):
        ids += encode_part(self, text[at : match.start()], at, letters)
        ids.append(tokens[(match.lastindex or 0) - 1]["id"])
        at = match.end()
    return ids + encode_part(self, text[at:], at, letters)


# %% book/chapters/19_vocabularies.md, cell 99
def added_byte(self: "AddedPieces", token: int) -> bytes:
    """As `piece_byte`, for an id that may not be a piece."""
    return b"" if token in self.shown else piece_byte(self, token)


def with_ids(
    stated: list[dict[str, Any]], base: SentencePieceBackend
) -> list[dict[str, Any]]:
    """The control pieces and `stated`, the longest first, each with
    an id: that of its piece, or the next where nobody says one."""
    known = {token["content"] for token in stated}
    tokens = [PLAIN_TOKEN | {"content": s, "id": i, "special": True}
              for s, i in base.specials.items() if s not in known]
    free = max([t["id"] or 0 for t in stated] + [base.size - 1]) + 1
    for token in stated:
        piece = base.processor.piece_to_id(token["content"])
        is_piece = base.processor.id_to_piece(piece) == token["content"]
        if token["id"] is None:
            token["id"] = piece if is_piece else free
            free += not is_piece
    tokens += stated
    return sorted(tokens, key=lambda t: len(t["content"]), reverse=True)


# %% book/chapters/19_vocabularies.md, cell 100
class AddedPieces(SentencePieceBackend):
    """A SentencePiece model, and tokens that were added to it."""

    def __init__(self, file: TokenizerFile) -> None:
        super().__init__(file.data, file.name)
        settings, own = read_settings(file.companions), self.size
        self.prepend = prepend_scheme(settings)
        self.added = with_ids(stated_tokens(file), self)
        ids = {t["content"]: t["id"] for t in self.added}
        self.size = max([own - 1, *ids.values()]) + 1
        self.specials = {
            t["content"]: t["id"] for t in self.added if is_marker(t)}
        self.roles |= roles_of(settings, ids)
        self.shown = dict.fromkeys(range(own, self.size), "")
        self.shown |= {i: s for s, i in ids.items()}
        self.plain = self.shown | {
            t["id"]: "" for t in self.added if t["special"]}
        for i in filter(self.processor.is_control, range(own)):
            self.plain.pop(i, None)         # the library hides these

    def encode(self, text: str) -> list[int]:
        tokens = [t for t in self.added if not is_marker(t)]
        return encode_around(self, text, {}, tokens)

    def names(self, specials: bool) -> dict[int, str]:
        return self.shown if specials else self.plain

    encode_special, byte_of = encode_around, added_byte


# %% book/chapters/19_vocabularies.md, cell 101
BOS_CLASSES = {"LlamaTokenizer", "CodeLlamaTokenizer"}
BOS_MODELS = {"llama", "mistral", "mixtral"}


def folder_bos(folder: Path | None) -> bool:
    """Whether a folder is of a family whose prompts begin with [BOS]:
    Meta's, which hold params.json, and some of Hugging Face's."""
    if folder is None:
        return False
    with suppress(OSError, ValueError):
        data = (folder / "config.json").read_bytes()
        return parse_json(data, "", "").get("model_type") in BOS_MODELS
    return (folder / "params.json").is_file()


# %% book/chapters/19_vocabularies.md, cell 102
def open_pieces(file: TokenizerFile) -> Backend:
    """A SentencePiece model, as the files beside it complete it."""
    backend = AddedPieces(file)
    settings = read_settings(file.companions)
    bos = str(settings.get("tokenizer_class")).removesuffix("Fast")
    expects = bos in BOS_CLASSES
    if "add_bos_token" not in settings and folder_bos(file.folder):
        expects, name = True, "tokenizer_config.json"
        own = parse_json(file.companions.get(name, b"{}"), name, "JSON")
        own["add_bos_token"] = True
        file.companions[name] = json.dumps(own, indent=1).encode()
    backend.prompt = flagged_prompt(settings, backend.roles, expects)
    return backend


# %% book/chapters/19_vocabularies.md, cell 103
FORMATS[:0] = [
    TokenizerFormat("tokenizer.json", is_json, open_json),
    TokenizerFormat("tokenizer.model", is_ranks, open_ranks),
    TokenizerFormat("tokenizer.model", lambda file: True, open_pieces),
]
