# Generated from book/chapters/19_vocabularies.md by `make sync`; edit the chapter.
"""Grok-1's pieces come from SentencePiece; Llama 3's come in a text
file of 128,000 lines, Llama 4's in one of 200,000, Qwen's and OLMoE's
in JSON. This chapter opens all of them behind the one `Tokenizer`. Then
it writes a conversation in the form that an instruct model was trained
on, by running a program that came with the weights. By its end that
program cannot reach your files, and a message of 49 characters can no
longer put words into the mouth of the system.
"""

import base64
import binascii
import codecs
import importlib
import json
import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


# %% book/chapters/19_vocabularies.md, cell 7
def kind_of(data: bytes) -> str:
    """Which of four formats the bytes of a tokenizer file are in."""
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n", data):
        return "tiktoken"
    if not re.match(rb"\s*\{", data):
        return "sentencepiece"
    tekken = b'"default_num_special_tokens"' in data
    return "tekken" if tekken else "huggingface"


# %% book/chapters/19_vocabularies.md, cell 8
class MissingExtra(ImportError, ValueError):
    """A library that only some tokenizers need is not installed."""


# %% book/chapters/19_vocabularies.md, cell 9
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
class Roles:
    """A vocabulary of another kind, under SentencePiece's methods.

    `specials` are the strings that stand for one id each where they
    are meant and for ordinary text where somebody typed them;
    `hidden` are the ids for which `decode` shows nothing; `roles`
    says which ids are "bos", "eos", "pad" and "unk".
    """

    specials: dict[str, int]
    hidden: frozenset[int]
    roles: dict[str, int]
    size: int

    def get_piece_size(self) -> int:
        return self.size

    def pad_id(self) -> int:
        return self.roles.get("pad", -1)

    def bos_id(self) -> int:
        return self.roles.get("bos", -1)

    def eos_id(self) -> int:
        return self.roles.get("eos", -1)

    def unk_id(self) -> int:
        return self.roles.get("unk", -1)


# %% book/chapters/19_vocabularies.md, cell 13
class Table(Roles, ABC):
    """What `Tokenizer` asks of a table, beside its ids."""

    @abstractmethod
    def encode(self, text: bytes) -> list[int]:
        """Ids of UTF-8 text; special strings in it are only letters."""

    @abstractmethod
    def encode_special(self, text: str) -> list[int]:
        """Ids of `text`, its special strings taken at their word."""

    @abstractmethod
    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Text of `ids`, with the special strings or without."""

    @abstractmethod
    def stream(self) -> Any:
        """Something to `push` ids to that `decode`s as they come."""


# %% book/chapters/19_vocabularies.md, cell 14
def split_at(text: str, marks: Iterable[str]) -> list[str]:
    """`text` cut around every mark, the longest first."""
    ordered = sorted(marks, key=len, reverse=True)
    if not ordered:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, ordered))})", text)


# %% book/chapters/19_vocabularies.md, cell 15
def encode_marked(
    text: str,
    specials: dict[str, int],
    plain: Callable[[str], list[int]],
) -> list[int]:
    """Ids of `text` where each special string is its one id."""
    ids: list[int] = []
    for part in split_at(text, specials):
        ids += [specials[part]] if part in specials else plain(part)
    return ids


# %% book/chapters/19_vocabularies.md, cell 16
class ByteStream:
    """Bytes to text as they come, whole characters at a time."""

    def __init__(self, table: "ByteTable") -> None:
        self.table = table
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        hidden = token in self.table.hidden
        piece = b"" if hidden else self.table.pieces[token]
        return self.decoder.decode(piece)

    def flush(self) -> str:
        return self.decoder.decode(b"", True)


# %% book/chapters/19_vocabularies.md, cell 17
class ByteTable(Table):
    """Every id is a string of bytes, and a text is their sum."""

    def __init__(
        self,
        pieces: list[bytes],
        specials: dict[str, int],
        roles: dict[str, int],
        plain: Callable[[str], list[int]],
    ) -> None:
        self.pieces, self.size = pieces, len(pieces)
        self.specials, self.roles, self.plain = specials, roles, plain
        self.hidden = frozenset(specials.values())

    def encode(self, text: bytes) -> list[int]:
        return self.plain(text.decode())

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        shown = [i for i in ids if specials or i not in self.hidden]
        data = b"".join([self.pieces[i] for i in shown])
        return data.decode("utf-8", "replace")

    def stream(self) -> ByteStream:
        return ByteStream(self)

    def encode_special(self, text: str) -> list[int]:
        return encode_marked(text, self.specials, self.plain)


# %% book/chapters/19_vocabularies.md, cell 18
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


# %% book/chapters/19_vocabularies.md, cell 19
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
OPENER, SPACES = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = "|".join([
    ENDINGS, OPENER + r"\p{L}+", r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", SPACES,
])


# %% book/chapters/19_vocabularies.md, cell 20
LLAMA4_PATTERN = "|".join([
    f"{OPENER}{UPPER}*{LOWER}+{ENDINGS}?",
    f"{OPENER}{UPPER}+{LOWER}*{ENDINGS}?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES,
])


# %% book/chapters/19_vocabularies.md, cell 21
def reserved(name: str, start: int, stop: int) -> list[str]:
    """Names that Meta keeps free for later."""
    stem = f"{name}_reserved" if name else "reserved"
    return [f"<|{stem}_special_token_{i}|>" for i in range(start, stop)]


# %% book/chapters/19_vocabularies.md, cell 22
def marks(names: str) -> list[str]:
    return [f"<|{name}|>" for name in names.split()]


# %% book/chapters/19_vocabularies.md, cell 23
LLAMA3_SPECIALS = [
    *marks("begin_of_text end_of_text"), *reserved("", 0, 2),
    *marks("finetune_right_pad_id step_id start_header_id"),
    *marks("end_header_id eom_id eot_id python_tag image"),
    *reserved("", 2, 246),
]


# %% book/chapters/19_vocabularies.md, cell 24
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


# %% book/chapters/19_vocabularies.md, cell 25
@dataclass(frozen=True)
class MetaForm:
    """What a tiktoken file does not say about itself."""

    pattern: str
    specials: list[str]
    pad: str
    eot: str


# %% book/chapters/19_vocabularies.md, cell 26
META_FORMS = {
    128_000: MetaForm(LLAMA3_PATTERN, LLAMA3_SPECIALS,
                      "<|finetune_right_pad_id|>", "<|eot_id|>"),
    200_000: MetaForm(LLAMA4_PATTERN, LLAMA4_SPECIALS,
                      "<|finetune_right_pad|>", "<|eot|>"),
}


# %% book/chapters/19_vocabularies.md, cell 27
def stretches(text: str) -> Iterator[str]:
    """`text` in parts that tiktoken can take, cut as Meta cuts it."""
    for at in range(0, len(text), 400_000):
        part, start = text[at : at + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part):
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[start:cut]
                start = cut
        yield part[start:]


# %% book/chapters/19_vocabularies.md, cell 28
def byte_pairs(
    ranks: dict[bytes, int], pattern: str, name: str
) -> Callable[[str], list[int]]:
    """Text to ranks by tiktoken, which fetches nothing."""
    library = needed("tiktoken", name)
    coder = library.Encoding(
        name="given", pat_str=pattern, mergeable_ranks=ranks,
        special_tokens={},
    )
    plain = coder.encode_ordinary
    return lambda text: [
        i for part in stretches(text) for i in plain(part)
    ]


# %% book/chapters/19_vocabularies.md, cell 29
def open_tiktoken(data: bytes, name: str, settings: Any) -> Table:
    """Meta's `tokenizer.model`; the special tokens follow the ranks."""
    ranks = read_ranks(data, name)
    form = META_FORMS.get(len(ranks))
    if form is None:
        known = " or ".join(f"{n:,}" for n in META_FORMS)
        raise ValueError(
            f"{name} has {len(ranks):,} base tokens, but the tiktoken "
            f"files of Llama 3 and 4 have {known}: is it whole?"
        )
    specials = {s: len(ranks) + i for i, s in enumerate(form.specials)}
    roles = {
        "bos": specials["<|begin_of_text|>"],
        "eos": specials["<|end_of_text|>"],
        "pad": specials[form.pad],
        "eot": specials[form.eot],
    }
    pieces = [*ranks, *(s.encode() for s in specials)]
    plain = byte_pairs(ranks, form.pattern, name)
    return ByteTable(pieces, specials, roles, plain)


# %% book/chapters/19_vocabularies.md, cell 34
TEKKEN_SPECIALS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]


# %% book/chapters/19_vocabularies.md, cell 35
def tekken_specials(content: dict[str, Any], count: int) -> list[str]:
    """The first `count` ids: those that have a name, then filler."""
    listed = content.get("special_tokens")
    names = [f"<SPECIAL_{i}>" for i in range(count)]
    if listed is None:
        return [*TEKKEN_SPECIALS, *names[len(TEKKEN_SPECIALS) :]]
    for token in listed:
        names[token["rank"]] = token["token_str"]
    return names


# %% book/chapters/19_vocabularies.md, cell 36
def open_tekken(data: bytes, name: str, settings: Any) -> Table:
    """Mistral's `tekken.json`; the special tokens come first."""
    content = parse_json(data, name, "a tekken file")
    try:
        config = content["config"]
        count = config["default_num_special_tokens"]
        learned = config["default_vocab_size"] - count
        vocab = content["vocab"][:learned]
        pieces = [base64.b64decode(v["token_bytes"]) for v in vocab]
        names = tekken_specials(content, count)
        pattern = config["pattern"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise damaged(name, "a tekken file", repr(error)) from None
    ranks = {piece: i for i, piece in enumerate(pieces)}
    specials = {s: i for i, s in enumerate(names)}
    if len(ranks) != learned or len(specials) != count:
        raise damaged(name, "a tekken file", "pieces are missing")
    base = byte_pairs(ranks, pattern, name)
    kinds = {"unk": "<unk>", "bos": "<s>", "eos": "</s>",
             "pad": "<pad>"}
    roles = {k: specials[s] for k, s in kinds.items() if s in specials}
    pieces = [*(s.encode() for s in names), *pieces]
    return ByteTable(pieces, specials, roles,
                     lambda text: [count + i for i in base(text)])


# %% book/chapters/19_vocabularies.md, cell 37
def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 wrote bytes in its vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    codes = shown + [256 + i for i in range(len(rest))]
    return {chr(c): b for c, b in zip(codes, shown + rest)}


# %% book/chapters/19_vocabularies.md, cell 38
def piece_bytes(piece: str, alphabet: dict[str, int]) -> bytes:
    """The bytes of a piece; an added token may be written as it is."""
    if all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return piece.encode()


# %% book/chapters/19_vocabularies.md, cell 39
LOCAL = {"Replace", "ByteFallback", "Fuse", "Metaspace", "WordPiece"}


# %% book/chapters/19_vocabularies.md, cell 40
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


# %% book/chapters/19_vocabularies.md, cell 41
class TextStream:
    """Ids to text by the library's own `decode`, as they come."""

    def __init__(self, table: "TextTable") -> None:
        self.table = table
        self.head: list[int] = []
        self.run: list[int] = []                # bytes of characters

    def push(self, token: int) -> str:
        if token in self.table.hidden:
            return ""
        self.run.append(token)
        return "" if token in self.table.raw else self.flush()

    def flush(self) -> str:
        """What the run adds; a head makes the first space right."""
        before = self.table.decode(self.head)
        both = self.head + self.run
        if not before:
            self.head = both
        self.run = []
        return self.table.decode(both)[len(before) :]


# %% book/chapters/19_vocabularies.md, cell 42
class TextTable(Table):
    """A `tokenizer.json` whose pieces are text, bytes if need be."""

    def __init__(
        self, library: "Library", roles: dict[str, int]
    ) -> None:
        self.library, self.roles = library, roles
        self.size, self.hidden = library.size, library.hidden
        self.specials = library.specials
        raw = re.compile("<0x[0-9A-F]{2}>")
        pieces = library.pieces.items()
        self.raw = {i for i, p in pieces if raw.fullmatch(p)}

    def encode(self, text: bytes) -> list[int]:
        return self.library.plain(text.decode())

    def encode_special(self, text: str) -> list[int]:
        return self.library.encode_special(text)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        shown = [i for i in ids if specials or i not in self.hidden]
        return self.library.decode(shown)

    def stream(self) -> TextStream:
        return TextStream(self)


# %% book/chapters/19_vocabularies.md, cell 43
def is_marker(token: dict[str, Any]) -> bool:
    """Whether an added token has a meaning beyond its letters."""
    shape = re.fullmatch("<[|｜].+[|｜]>", token["content"])
    return bool(token["special"] or shape)


# %% book/chapters/19_vocabularies.md, cell 44
def mark(form: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Flag every marker as special; all markers, and those to hide."""
    added = form["added_tokens"] = form.get("added_tokens") or []
    flagged = {t["content"] for t in added if t["special"]}
    for token in added:
        token["special"] = is_marker(token)
    return {t["content"] for t in added if t["special"]}, flagged


# %% book/chapters/19_vocabularies.md, cell 45
def open_coder(kind: Any, form: str, plain: bool) -> Any:
    """The library's object; `plain` takes markers for letters."""
    coder = kind.from_str(form)
    coder.no_truncation()
    coder.no_padding()
    coder.encode_special_tokens = plain
    return coder


# %% book/chapters/19_vocabularies.md, cell 46
class Library:
    """The `tokenizers` library on one file."""

    def __init__(self, form: dict[str, Any], kind: Any) -> None:
        marked, flagged = mark(form)
        self.kind, self.form = kind, json.dumps(form)
        self.coder = open_coder(kind, self.form, plain=True)
        vocab = self.coder.get_vocab(with_added_tokens=True)
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.size = max(self.pieces, default=-1) + 1
        self.specials = {s: vocab[s] for s in marked}
        self.hidden = frozenset(vocab[s] for s in flagged)

    @cached_property
    def marked(self) -> Any:
        return open_coder(self.kind, self.form, plain=False)

    def plain(self, text: str) -> list[int]:
        return self.coder.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        return self.marked.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.coder.decode(ids, skip_special_tokens=False)


# %% book/chapters/19_vocabularies.md, cell 47
class LibraryBytes(ByteTable):
    """A `tokenizer.json` whose pieces are bytes."""

    def __init__(self, library: Library, roles: dict[str, int]) -> None:
        alphabet, found = byte_alphabet(), library.pieces
        names = [found.get(i, "") for i in range(library.size)]
        pieces = [piece_bytes(name, alphabet) for name in names]
        super().__init__(pieces, library.specials, roles, library.plain)
        self.library, self.hidden = library, library.hidden

    def encode_special(self, text: str) -> list[int]:
        return self.library.encode_special(text)


# %% book/chapters/19_vocabularies.md, cell 48
def roles_of(
    settings: dict[str, Any], ids: dict[str, int]
) -> dict[str, int]:
    """The ids of the tokens that `tokenizer_config.json` names."""
    roles = {}
    for role in ["bos", "eos", "pad", "unk"]:
        text = token_text(settings.get(f"{role}_token"))
        if text in ids:
            roles[role] = ids[text]
    return roles


# %% book/chapters/19_vocabularies.md, cell 49
def token_text(token: Any) -> str:
    """A token is written as a string or as a table around one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


# %% book/chapters/19_vocabularies.md, cell 50
def open_huggingface(data: bytes, name: str, settings: Any) -> Table:
    """A `tokenizer.json`, through the library that writes them."""
    kind = needed("tokenizers", name).Tokenizer
    form = parse_json(data, name, "a tokenizer.json")
    decoder = form.get("decoder")
    try:
        library = Library(form, kind)
        byte_level = (decoder or {}).get("type") == "ByteLevel"
        local = byte_level or decodes_locally(decoder)
    except Exception as error:              # the library has no class
        raise damaged(name, "a tokenizer.json", str(error)) from None
    if not local:
        raise ValueError(
            f"{name} has a decoder that we cannot stream: expected "
            f"ByteLevel, or of {sorted(LOCAL)}, not {str(decoder)[:60]}"
        )
    ids = {piece: i for i, piece in library.pieces.items()}
    roles = roles_of(settings, ids)
    return (LibraryBytes if byte_level else TextTable)(library, roles)


# %% book/chapters/19_vocabularies.md, cell 51
OPENERS: dict[str, Callable[[bytes, str, Any], Table]] = {
    "tiktoken": open_tiktoken,
    "tekken": open_tekken,
    "huggingface": open_huggingface,
}


# %% book/chapters/19_vocabularies.md, cell 52
FILE_NAMES = {
    "huggingface": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "tiktoken": "tokenizer.model",
    "tekken": "tekken.json",
}
TOKENIZERS = list(dict.fromkeys(FILE_NAMES.values()))


# %% book/chapters/19_vocabularies.md, cell 53
def open_table(
    data: bytes, name: str, beside: dict[str, bytes]
) -> Table | None:
    """The vocabulary in `data`, or None if it is SentencePiece's."""
    opener = OPENERS.get(kind_of(data))
    if opener is None:
        return None
    return opener(data, name, read_settings(beside))


# %% book/chapters/19_vocabularies.md, cell 60
BESIDE = [
    "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
]


# %% book/chapters/19_vocabularies.md, cell 61
def read_beside(
    source: str | os.PathLike[str] | bytes,
) -> dict[str, bytes]:
    """The files of settings that stand in the tokenizer's folder."""
    if isinstance(source, bytes):
        return {}
    folder = Path(source).parent
    found = {name: folder / name for name in BESIDE}
    return {n: p.read_bytes() for n, p in found.items() if p.is_file()}


# %% book/chapters/19_vocabularies.md, cell 62
def file_name(data: bytes) -> str:
    """What programs expect such a tokenizer file to be called."""
    return FILE_NAMES[kind_of(data)]


# %% book/chapters/19_vocabularies.md, cell 63
def read_settings(beside: dict[str, bytes]) -> dict[str, Any]:
    """The settings of `tokenizer_config.json` and its older kin."""
    settings: dict[str, Any] = {}
    for name in ["special_tokens_map.json", "tokenizer_config.json"]:
        if name in beside:
            found = parse_json(beside[name], repr(name), "JSON")
            given = {k: v for k, v in found.items() if v is not None}
            settings |= given
    return settings


# %% book/chapters/19_vocabularies.md, cell 64
def specials_of(table: Any) -> dict[str, int]:
    """Special string -> id; in SentencePiece, the control pieces."""
    if isinstance(table, Table):
        return table.specials
    ids = range(table.get_piece_size())
    return {table.id_to_piece(i): i for i in ids if table.is_control(i)}


# %% book/chapters/19_vocabularies.md, cell 65
def turn_ids(table: Any) -> tuple[int, ...]:
    """Ids that end an answer: the end of text, and of a turn."""
    found = [table.eos_id()]
    if isinstance(table, Table):
        found.append(table.roles.get("eot", -1))
    return tuple(i for i in found if i >= 0)


# %% book/chapters/19_vocabularies.md, cell 66
def encode_special(table: Any, text: str) -> list[int]:
    """Ids of `text`, its special strings taken at their word."""
    if isinstance(table, Table):
        return table.encode_special(text)
    return encode_marked(
        text, specials_of(table),
        lambda part: table.encode(part.encode()),
    )


# %% book/chapters/19_vocabularies.md, cell 67
def decode_special(table: Any, ids: list[int]) -> str:
    """Text of `ids`, special ones by name."""
    if isinstance(table, Table):
        return table.decode(ids, specials=True)
    names = {i: name for name, i in specials_of(table).items()}
    text, run = "", list[int]()
    for i in ids:
        if i in names:
            text, run = text + table.decode(run) + names[i], []
        else:
            run.append(i)
    return text + table.decode(run)


# %% book/chapters/19_vocabularies.md, cell 70
def named_templates(beside: dict[str, bytes]) -> dict[str, str]:
    """Name -> chat template; one without a name is the "default"."""
    if "chat_template.jinja" in beside:
        text = beside["chat_template.jinja"].decode("utf-8", "replace")
        return {"default": text}
    found = read_settings(beside).get("chat_template")
    if "chat_template.json" in beside:
        data = beside["chat_template.json"]
        new = parse_json(data, "'chat_template.json'", "JSON")
        found = new.get("chat_template", found)
    if not isinstance(found, list):
        return {"default": found} if isinstance(found, str) else {}
    named = [part for part in found if isinstance(part, dict)]
    return {str(t.get("name")): str(t.get("template")) for t in named}


# %% book/chapters/19_vocabularies.md, cell 71
def pick_template(
    beside: dict[str, bytes], name: str | None, tools: Any
) -> str:
    """The template of this name; with tools, one made for tools."""
    known = named_templates(beside)
    if name is None:
        use = bool(tools) and "tool_use" in known
        name = "tool_use" if use else "default"
    if name not in known:
        raise ValueError(
            f"this tokenizer has no chat template {name!r} beside it "
            f"(it has {sorted(known) or 'none'}): add a "
            "chat_template.jinja, or give plain text instead"
        )
    return known[name]


# %% book/chapters/19_vocabularies.md, cell 72
MAX_SECONDS, MAX_BYTES, MAX_TEXT = 5, 2**30, 2**22


# %% book/chapters/19_vocabularies.md, cell 73
def sandbox(library: ModuleType, extension: Any) -> Any:
    """The environment that published templates are written for."""
    base: Any = library.sandbox.ImmutableSandboxedEnvironment

    class Strict(base):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise library.sandbox.SecurityError(
                f"the attribute {attribute!r} is not for templates"
            )

    def refuse(message: str) -> None:
        raise library.TemplateError(message)

    loops = "jinja2.ext.loopcontrols"
    env = Strict(trim_blocks=True, lstrip_blocks=True,
                 extensions=[loops, extension])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = strftime_now
    return env


# %% book/chapters/19_vocabularies.md, cell 74
def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None,
    separators: Any = None, sort_keys: bool = False,
) -> str:
    """JSON without the escapes that Jinja adds for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)


# %% book/chapters/19_vocabularies.md, cell 75
def strftime_now(form: str) -> str:
    """Today, as some templates tell the model."""
    return datetime.now().strftime(form)


# %% book/chapters/19_vocabularies.md, cell 76
def generation_tag(extension: Any) -> Any:
    """`{% generation %}` marks answers for training; prints them."""
    class Generation(extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            end = ["name:endgeneration"]
            return parser.parse_statements(end, drop_needle=True)

    return Generation


# %% book/chapters/19_vocabularies.md, cell 77
def render(template: str, variables: dict[str, Any]) -> str:
    """Run a template here and now; only `render_apart` should."""
    library = importlib.import_module("jinja2")
    importlib.import_module("jinja2.sandbox")
    extension = importlib.import_module("jinja2.ext").Extension
    env = sandbox(library, generation_tag(extension))
    text, size = [], 0
    for part in env.from_string(template).generate(**variables):
        text.append(part)
        size += len(part)
        if size > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT:,} characters")
    return "".join(text)


# %% book/chapters/19_vocabularies.md, cell 78
def limit_process() -> None:
    """Bound what this process may take, where the system can."""
    try:
        import resource
    except ImportError:                     # Windows has only the clock
        return
    for kind, most in [(resource.RLIMIT_CPU, MAX_SECONDS),
                       (resource.RLIMIT_AS, MAX_BYTES)]:
        resource.setrlimit(kind, (most, most))


# %% book/chapters/19_vocabularies.md, cell 79
def answer(request: str) -> dict[str, str]:
    """The text of a request, or what is wrong with it."""
    limit_process()
    try:
        return {"text": render(**json.loads(request))}
    except MemoryError:
        return {"error": f"more than {MAX_BYTES:,} bytes of memory"}
    except Exception as error:              # it may do anything
        return {"error": str(error) or type(error).__name__}


# %% book/chapters/19_vocabularies.md, cell 80
def render_apart(template: str, variables: dict[str, Any]) -> str:
    """Render in a process of its own; ValueError says what failed."""
    needed("jinja2", "a chat template")
    request = json.dumps({"template": template, "variables": variables})
    found = find_spec("annotated_moe.vocabularies")
    command = [sys.executable, "-P", str(found and found.origin)]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True,
            timeout=60 + MAX_SECONDS, check=True,
        )
        reply = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        reply = {"error": f"more than {MAX_SECONDS} seconds, or died"}
    if "error" in reply:
        why = " ".join(reply["error"].split())[:200]
        raise ValueError(f"the chat template was stopped: {why}")
    return reply["text"]


# %% book/chapters/19_vocabularies.md, cell 83
PRIVATE = range(0xF0000, 0xFFFFE)           # characters without meaning


# %% book/chapters/19_vocabularies.md, cell 84
def stand_ins(specials: Iterable[str], used: str) -> dict[str, str]:
    """A private character for each special string, not in `used`."""
    taken = set(used)
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    return dict(zip(specials, free))


# %% book/chapters/19_vocabularies.md, cell 85
def disarm(value: Any, hide: Callable[[str], str]) -> Any:
    """The same messages, every string in them seen by `hide`."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {disarm(k, hide): disarm(v, hide)
                for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [disarm(part, hide) for part in value]
    return value


# %% book/chapters/19_vocabularies.md, cell 86
def swap(text: str, table: dict[str, str]) -> str:
    """`text` with each key of `table` replaced, the longest first."""
    parts = split_at(text, table)
    return "".join([table.get(part, part) for part in parts])


# %% book/chapters/19_vocabularies.md, cell 87
def noted(seen: list[str]) -> Callable[[str], str]:
    """Leaves each string as it is, and in `seen`."""
    def note(text: str) -> str:
        seen.append(text)
        return text

    return note


# %% book/chapters/19_vocabularies.md, cell 88
def check_messages(messages: Any, given: dict[str, Any]) -> str:
    """All that was typed; ValueError for what is no conversation."""
    rows = isinstance(messages, (list, tuple)) and messages
    if not rows or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            "messages must be a list of tables such as "
            "{'role': 'user', 'content': 'Hello'}"
        )
    typed: list[str] = []
    disarm([messages, given], noted(typed))
    try:
        json.dumps([messages, given])
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages must be JSON: {error}") from None
    return "\n".join(typed)


# %% book/chapters/19_vocabularies.md, cell 89
def token_names(table: Any, settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its kin, which templates print."""
    names = {i: name for name, i in specials_of(table).items()}
    ids = {"bos": table.bos_id(), "eos": table.eos_id(),
           "pad": table.pad_id()}
    own = {f"{k}_token": names[i] for k, i in ids.items() if i in names}
    given = {k: token_text(v) for k, v in settings.items()
             if k.endswith("_token") and token_text(v)}
    return own | given


# %% book/chapters/19_vocabularies.md, cell 90
def chat_ids(
    table: Any,
    beside: dict[str, bytes],
    messages: Any,
    add_generation_prompt: bool = True,
    tools: Any = None,
    template: str | None = None,
    **variables: Any,
) -> list[int]:
    """Ids of a conversation, special strings only from the template.

    `tools` are described to the model if its template can; `template`
    is a name where the folder has several; other `variables` go to
    the template. ValueError where it is missing, fails or is unsafe.
    """
    text, back = chat_text(
        table, beside, messages, template, tools=tools,
        add_generation_prompt=add_generation_prompt, **variables,
    )
    if not back:
        return encode_special(table, text)
    return encode_marked(
        text, specials_of(table),
        lambda part: table.encode(swap(part, back).encode()),
    )


# %% book/chapters/19_vocabularies.md, cell 91
def chat_text(
    table: Any, beside: dict[str, bytes], messages: Any,
    template: str | None, **variables: Any,
) -> tuple[str, dict[str, str]]:
    """The rendered text, and what its private characters stand for."""
    source = pick_template(beside, template, variables.get("tools"))
    typed = check_messages(messages, variables)
    forged = [s for s in specials_of(table) if s in typed]
    hidden = stand_ins(forged, source + typed)
    given = {"messages": messages, "documents": None, **variables}
    safe = disarm(given, lambda text: swap(text, hidden))
    named = token_names(table, read_settings(beside))
    text = render_apart(source, {**named, **safe})
    return text, {mark: s for s, mark in hidden.items()}


# %% book/chapters/19_vocabularies.md, cell 94
if __name__ == "__main__" and "__file__" in globals():
    sys.stdout.write(json.dumps(answer(sys.stdin.read())))
