# Generated from book/chapters/19_vocabularies.md by `make sync`; edit the chapter.
"""An instruct model reads a conversation in the form that it was
trained on, and that form is a program that came with the weights. This
chapter runs it. By the end the program cannot reach your files, a
message of 49 characters can no longer put words into the mouth of the
system, you have measured what a token before the first word is good
for, and one class opens the tokenizers of Llama, Mixtral, Qwen and
OLMoE.
"""

import base64
import binascii
import codecs
import importlib
import json
import operator
import re
import warnings
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
from pathlib import Path
from types import ModuleType
from typing import Any

from annotated_moe.templates import render_apart
from annotated_moe.tokenizer import (
    COMPANIONS,
    FORMATS,
    Backend,
    SentencePieceBackend,
    Tokenizer,
    TokenizerFile,
    TokenizerFormat,
    piece_byte,
    replace_all,
    split_at,
)


# %% book/chapters/19_vocabularies.md, cell 8
COMPANIONS += [
    "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json",
]


# %% book/chapters/19_vocabularies.md, cell 9
def damaged(name: str, what: str, why: str) -> ValueError:
    return ValueError(
        f"{name} is not {what} or is damaged ({why[:120]}); compare "
        "its size with the original and copy it again"
    )


def parse_json(data: bytes, name: str, what: str) -> dict[str, Any]:
    """A JSON object, or ValueError that names the file."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(name, what, str(error)) from None
    if not isinstance(content, dict):
        raise damaged(name, what, "it holds no JSON object")
    return content


# %% book/chapters/19_vocabularies.md, cell 10
def read_settings(companions: Mapping[str, bytes]) -> dict[str, Any]:
    """The settings of `tokenizer_config.json` and its older kin."""
    settings: dict[str, Any] = {}
    for name in ["special_tokens_map.json", "tokenizer_config.json"]:
        if name in companions:
            found = parse_json(companions[name], repr(name), "JSON")
            settings |= {
                k: v for k, v in found.items() if v is not None}
    return settings


def token_text(token: Any) -> str:
    """A token is written as a string or as a table around one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


# %% book/chapters/19_vocabularies.md, cell 11
def template_files(companions: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> template, of those that are files of their own."""
    found = {}
    for path, data in companions.items():
        if path.endswith(".jinja"):
            name = path.split("/")[-1].removesuffix(".jinja")
            name = "default" if path == "chat_template.jinja" else name
            found[name] = data.decode("utf-8", "replace")
    return found


def named_templates(companions: Mapping[str, bytes]) -> dict[str, str]:
    """Name -> chat template; one without a name is the "default"."""
    if files := template_files(companions):
        return files
    found = read_settings(companions).get("chat_template")
    if "chat_template.json" in companions:
        data = companions["chat_template.json"]
        new = parse_json(data, "'chat_template.json'", "JSON")
        found = new.get("chat_template", found)
    if not isinstance(found, list):
        return {"default": found} if isinstance(found, str) else {}
    named = [part for part in found if isinstance(part, dict)]
    return {str(t.get("name")): str(t.get("template")) for t in named}


# %% book/chapters/19_vocabularies.md, cell 12
def pick_template(
    companions: Mapping[str, bytes], name: str | None, tools: Any
) -> tuple[str, str]:
    """A template's name and text; `name` may be a template itself."""
    known = named_templates(companions)
    if name is None:
        use = tools is not None and "tool_use" in known
        name = "tool_use" if use else "default"
    if name in known:
        return name, known[name]
    if "{{" in name or "{%" in name:
        return "given", name
    raise ValueError(
        f"this tokenizer has no chat template {name!r} beside it "
        f"(it has {sorted(known) or 'none'}): add a "
        "chat_template.jinja, or give plain text instead"
    )


# %% book/chapters/19_vocabularies.md, cell 13
class MissingExtra(ImportError, ValueError):
    """A library that only some tokenizers need is not installed."""


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


# %% book/chapters/19_vocabularies.md, cell 24
PRIVATE = range(0xF0000, 0xFFFFE)           # characters without meaning


def stand_ins(marks: Iterable[str], used: str) -> dict[str, str]:
    """A private character for each of `marks`, none of them `used`."""
    taken = set(used)
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    return dict(zip(marks, free))


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


# %% book/chapters/19_vocabularies.md, cell 25
def typed_text(messages: Any, given: dict[str, Any]) -> str:
    """All that was typed; ValueError for what is no conversation."""
    rows = isinstance(messages, (list, tuple)) and messages
    if not rows or not all(isinstance(m, dict) for m in messages):
        raise ValueError(
            "messages must be a list of tables such as "
            "{'role': 'user', 'content': 'Hello'}"
        )
    typed: list[str] = []

    def note(text: str) -> str:
        typed.append(text)
        return text

    disarm([messages, given], note)
    try:
        json.dumps([messages, given])
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages must be JSON: {error}") from None
    return "\n".join(typed)


# %% book/chapters/19_vocabularies.md, cell 26
def token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and its kin, which templates print."""
    names = {i: s for s, i in tokenizer.backend.specials.items()}
    roles = tokenizer.backend.roles
    own = {f"{role}_token": names[i]
           for role, i in roles.items() if i in names}
    settings = read_settings(tokenizer.companions)
    return own | {k: token_text(v) for k, v in settings.items()
                  if k.endswith("_token") and token_text(v)}


# %% book/chapters/19_vocabularies.md, cell 27
def mark_end(messages: list[Any], mark: str) -> list[Any]:
    """The messages, `mark` and a space behind the last one's text."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content}{mark} "}]
    parts = list(content) if isinstance(content, list) else []
    for i, part in reversed([*enumerate(parts)]):
        if isinstance(part, dict) and "text" in part:
            parts[i] = {**part, "text": f"{part['text']}{mark} "}
            return [*before, {**last, "content": parts}]
    raise ValueError("the last message has no text to continue")


def cut_at_end(text: str, mark: str) -> str:
    """What stands before the last `mark`."""
    if mark not in text:
        raise ValueError("the chat template drops the last message")
    before, _, after = text.rpartition(mark)
    return before if after[:1] == " " else before.rstrip()


# %% book/chapters/19_vocabularies.md, cell 28
def chat_text(
    tokenizer: Tokenizer, template: str, messages: Any, goes_on: bool,
    asked: list[str], variables: dict[str, Any],
) -> tuple[str, dict[str, str], list[str]]:
    """The rendered text, what private characters in it stand for, and
    which of the variables `asked` the template does not read."""
    needed("jinja2", "a chat template")
    typed = typed_text(messages, variables)
    forged = [s for s in tokenizer.backend.specials if s in typed]
    hidden = stand_ins([*forged, ""], template + typed)
    end = hidden.pop("")                    # of the last message
    messages = [{k: v for k, v in m.items() if v is not None}
                for m in messages]
    if goes_on:
        messages = mark_end(messages, end)
    safe = disarm({"messages": messages, **variables},
                  lambda text: replace_all(text, hidden))
    done = render_apart(template, token_names(tokenizer) | safe, asked)
    text = cut_at_end(done["text"], end) if goes_on else done["text"]
    return text, {c: s for s, c in hidden.items()}, done["unread"]


# %% book/chapters/19_vocabularies.md, cell 29
def refuse_unread(unread: list[str], name: str) -> None:
    """ValueError for a name that a template does not read.

    Tools and documents are offered to every template, so for them
    there is a warning.
    """
    for option in unread:
        text = f"the chat template {name!r} does not read {option!r}"
        if option not in ("tools", "documents"):
            raise ValueError(f"{text}: is it spelled right?")
        text += ": the model will not see them"
        warnings.warn(text, stacklevel=3)


# %% book/chapters/19_vocabularies.md, cell 30
def chat_ids(
    self: Tokenizer, messages: Any,
    add_generation_prompt: bool | None = None, tools: Any = None,
    template: str | None = None, documents: Any = None,
    continue_final_message: bool = False,
    chat_template: str | None = None, **variables: Any,
) -> list[int]:
    """Ids of a conversation, special tokens only from its template.

    The model answers next, unless `add_generation_prompt` is False,
    or goes on with the last message if `continue_final_message`.
    `template` (or `chat_template`) is a name or a template. Other
    `variables` go to it; ValueError for one that it does not read.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError("go on with a message, or begin an answer")
    wanted = chat_template if template is None else template
    name, source = pick_template(self.companions, wanted, tools)
    given = {"tools": tools, "documents": documents}
    asked = [k for k, v in given.items() if v and name != "tool_use"]
    given["add_generation_prompt"] = not (
        continue_final_message or add_generation_prompt is False)
    text, letters, unread = chat_text(
        self, source, messages, continue_final_message,
        [*asked, *variables], given | variables)
    refuse_unread(unread, name)
    return self.backend.encode_special(text, letters)


Tokenizer.chat = chat_ids  # type: ignore[attr-defined]


# %% book/chapters/19_vocabularies.md, cell 43
def is_json(file: TokenizerFile) -> bool:
    """Whether it is a `tokenizer.json`, by its first character."""
    return re.match(rb"\s*\{", file.data) is not None


def is_ranks(file: TokenizerFile) -> bool:
    """Whether it is Meta's: a piece in base64, a space, a number."""
    line = rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n"
    return re.match(line, file.data) is not None


# %% book/chapters/19_vocabularies.md, cell 44
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


# %% book/chapters/19_vocabularies.md, cell 45
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


# %% book/chapters/19_vocabularies.md, cell 46
def is_marker(token: Mapping[str, Any]) -> bool:
    """Whether an added token has a meaning beyond its letters."""
    shape = re.fullmatch("<[|｜].+[|｜]>", token["content"])
    return bool(token["special"] or shape)


# %% book/chapters/19_vocabularies.md, cell 47
def roles_of(
    settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, int]:
    """The ids of the tokens that `tokenizer_config.json` names."""
    texts = {r: token_text(settings.get(f"{r}_token")) for r in ROLES}
    return {r: ids[text] for r, text in texts.items() if text in ids}


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


# %% book/chapters/19_vocabularies.md, cell 48
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


# %% book/chapters/19_vocabularies.md, cell 49
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


# %% book/chapters/19_vocabularies.md, cell 50
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


# %% book/chapters/19_vocabularies.md, cell 51
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


# %% book/chapters/19_vocabularies.md, cell 52
def reserved(name: str, start: int, stop: int) -> list[str]:
    """Names that Meta keeps free for later."""
    stem = f"{name}_reserved" if name else "reserved"
    return [f"<|{stem}_special_token_{i}|>" for i in range(start, stop)]


def marks(names: str) -> list[str]:
    """`a b` as `<|a|>` and `<|b|>`."""
    return [f"<|{name}|>" for name in names.split()]


# %% book/chapters/19_vocabularies.md, cell 53
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


# %% book/chapters/19_vocabularies.md, cell 54
@dataclass(frozen=True)
class MetaForm:
    """What a tiktoken file does not say about itself."""

    pattern: str
    specials: list[str]
    pad: str
    eot: str


META_FORMS = {
    128_000: MetaForm(LLAMA3_PATTERN, LLAMA3_SPECIALS,
                      "<|finetune_right_pad_id|>", "<|eot_id|>"),
    200_000: MetaForm(LLAMA4_PATTERN, LLAMA4_SPECIALS,
                      "<|finetune_right_pad|>", "<|eot|>"),
}


# %% book/chapters/19_vocabularies.md, cell 55
def stretches(text: str) -> Iterator[str]:
    """`text` in parts that tiktoken can take, cut as Meta cuts it."""
    for at in range(0, len(text), 400_000):
        part, start = text[at : at + 400_000], 0
        for run in re.finditer(r"\s+|\S+", part):
            for cut in range(run.start() + 25_000, run.end(), 25_000):
                yield part[start:cut]
                start = cut
        yield part[start:]


# %% book/chapters/19_vocabularies.md, cell 56
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


# %% book/chapters/19_vocabularies.md, cell 57
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


# %% book/chapters/19_vocabularies.md, cell 62
def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 wrote bytes in its vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    codes = shown + [256 + i for i in range(len(rest))]
    return {chr(c): b for c, b in zip(codes, shown + rest)}


def piece_bytes(piece: str, alphabet: Mapping[str, int]) -> bytes:
    """The bytes of a piece; an added token may be written as it is."""
    if all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return piece.encode()


# %% book/chapters/19_vocabularies.md, cell 63
LOCAL = {"Replace", "ByteFallback", "Fuse", "Metaspace", "WordPiece"}


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


# %% book/chapters/19_vocabularies.md, cell 64
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


# %% book/chapters/19_vocabularies.md, cell 65
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


# %% book/chapters/19_vocabularies.md, cell 66
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


# %% book/chapters/19_vocabularies.md, cell 67
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


# %% book/chapters/19_vocabularies.md, cell 68
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


# %% book/chapters/19_vocabularies.md, cell 69
Prompt = tuple[list[int], list[int]]


def roles_and_prompt(
    settings: Mapping[str, Any], vocab: Mapping[str, int], own: Prompt
) -> tuple[dict[str, int], Prompt]:
    """Which ids have a role, and what goes around a prompt.

    `own` is what the file puts there; settings go before it.
    """
    roles = roles_of(settings, vocab)
    if {"add_bos_token", "add_eos_token"} & settings.keys():
        return roles, flagged_prompt(settings, roles, bos=False)
    return dict(zip(["bos"], own[0])) | roles, own


# %% book/chapters/19_vocabularies.md, cell 70
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


# %% book/chapters/19_vocabularies.md, cell 71
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
        own = library_prompt(self.library)
        self.roles, self.prompt = roles_and_prompt(
            read_settings(file.companions), self.vocab, own)

    @cached_property
    def marked(self) -> Any:
        return open_library(self.kind, self.form, plain=False)

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    encode_special = encode_at_word


# %% book/chapters/19_vocabularies.md, cell 72
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


# %% book/chapters/19_vocabularies.md, cell 74
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


# %% book/chapters/19_vocabularies.md, cell 75
def prepend_scheme(settings: Mapping[str, Any]) -> str:
    """Whether a space goes before the "first" part of a text, before
    "always" each, or "never" any."""
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") else "first"


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


# %% book/chapters/19_vocabularies.md, cell 76
def with_ids(
    stated: list[dict[str, Any]], base: SentencePieceBackend
) -> list[dict[str, Any]]:
    """The control pieces and `stated`, each with an id, the longest
    first. One that is a piece has the id of the piece; one of which
    nobody says an id gets the next."""
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


# %% book/chapters/19_vocabularies.md, cell 77
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

    def byte_of(self, token: int) -> bytes:
        return b"" if token in self.shown else piece_byte(self, token)

    encode_special = encode_around


# %% book/chapters/19_vocabularies.md, cell 78
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


# %% book/chapters/19_vocabularies.md, cell 79
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


# %% book/chapters/19_vocabularies.md, cell 80
FORMATS[:0] = [
    TokenizerFormat("tokenizer.json", is_json, open_json),
    TokenizerFormat("tokenizer.model", is_ranks, open_ranks),
    TokenizerFormat("tokenizer.model", lambda file: True, open_pieces),
]


# %% book/chapters/19_vocabularies.md, cell 81
TOKENIZERS = list(dict.fromkeys(form.file_name for form in FORMATS))
BESIDE = [name.split("/")[0] for name in COMPANIONS]
specials_of = operator.attrgetter("specials")


def encode_marked(
    text: str, specials: Mapping[str, int],
    plain: Callable[[str], list[int]],
) -> list[int]:
    """Ids of `text` where each special string is its one id."""
    ids: list[int] = []
    for part in split_at(text, specials):
        ids += [specials[part]] if part in specials else plain(part)
    return ids


for new, name in [("companions", "beside"), ("backend", "processor"),
                  ("stop_ids", "turn_ids")]:
    setattr(Tokenizer, name, property(operator.attrgetter(new)))
