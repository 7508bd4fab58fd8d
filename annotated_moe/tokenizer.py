# Generated from book/chapters/01_tokenizer.md by `make sync`; edit the chapter.
"""A model computes with integers; people write characters. Between the
two stands a table of text pieces, one integer each, and a rule that
cuts any string into pieces of the table. This chapter learns such a
table by hand, then with the library that Grok-1 uses, and ends with a
`Tokenizer` that opens any SentencePiece model and turns the ids of a
running model back into text as they come, without ever tearing a
character in two.
"""

import io
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import sentencepiece as spm

from annotated_moe import vocabularies


# %% book/chapters/01_tokenizer.md, cell 19
def training_bytes(texts: Iterable[str]) -> Iterable[bytes]:
    """The texts as UTF-8, without the trainer's reserved character."""
    for text in [texts] if isinstance(texts, str) else texts:
        yield text.replace("\u2585", " ").encode()


def reason(error: Exception) -> str:
    """What SentencePiece complains of, without its source lines."""
    if "sentences_.empty()" in str(error):
        return "there is no text to learn from"
    return str(error).rpartition("] ")[2] or str(error)


# %% book/chapters/01_tokenizer.md, cell 20
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


# %% book/chapters/01_tokenizer.md, cell 21
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


# %% book/chapters/01_tokenizer.md, cell 31
def read_model(source: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of a `.model` file, given its path or the bytes."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise type(error)(
            f"cannot read the tokenizer {os.fspath(source)!r} "
            f"({error.strerror}); give the path of a SentencePiece "
            "model or of another tokenizer, such as 'tokenizer.model'"
        ) from error


# %% book/chapters/01_tokenizer.md, cell 32
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


# %% book/chapters/01_tokenizer.md, cell 35
def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`; on failure `path` stays as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# %% book/chapters/01_tokenizer.md, cell 36
class Vocabulary:
    """The pieces of one tokenizer file, numbered from 0.

    Takes the path of a SentencePiece model or of another file that
    `vocabularies` reads, or its bytes, and keeps those as
    `model_bytes`. `pad_id`, `bos_id`, `eos_id` and `unk_id` are None
    where the file names no such piece.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        self.model_bytes = read_model(source)
        self.beside = vocabularies.read_beside(source)
        name = name_of(source)
        self.processor = open_any(self.model_bytes, name, self.beside)
        self.vocab_size: int = self.processor.get_piece_size()
        self.pad_id = optional(self.processor.pad_id())
        self.bos_id = optional(self.processor.bos_id())
        self.eos_id = optional(self.processor.eos_id())
        self.unk_id = optional(self.processor.unk_id())
        self.turn_ids = vocabularies.turn_ids(self.processor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to `path`, all of it or nothing."""
        write_whole(Path(path), self.model_bytes)


# %% book/chapters/01_tokenizer.md, cell 37
def name_of(source: str | os.PathLike[str] | bytes) -> str:
    """What an error message calls `source`."""
    given = isinstance(source, bytes)
    return "the tokenizer" if given else repr(os.fspath(source))


def open_any(model: bytes, name: str, beside: dict[str, bytes]) -> Any:
    """The vocabulary in `model`, whichever format it is in."""
    other = vocabularies.open_table(model, name, beside)
    return open_model(model, name) if other is None else other


# %% book/chapters/01_tokenizer.md, cell 38
def optional(token: int) -> int | None:
    """SentencePiece says -1 for a piece that does not exist."""
    return token if token >= 0 else None


def required(token: int | None, piece: str) -> int:
    """`token`, or ValueError if the model has no such piece."""
    if token is None:
        raise ValueError(f"this vocabulary has no {piece} piece")
    return token


def in_range(token: SupportsIndex, vocab_size: int) -> int:
    """`token` as an int, or ValueError if no piece has this id."""
    token = operator.index(token)
    if not 0 <= token < vocab_size:
        message = f"token id {token} is not one of the {vocab_size} ids"
        raise ValueError(f"{message} of this vocabulary")
    return token


# %% book/chapters/01_tokenizer.md, cell 42
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


# %% book/chapters/01_tokenizer.md, cell 44
class TokenStream:
    """Ids to text as they come; joined, the text is `decode(ids)`.

    Shows no character in part, and nothing for [PAD] and its like.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._head: list[int] = []
        self._bytes = b""

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes, often all of its own."""
        token = in_range(token, self.vocabulary.vocab_size)
        table = self.vocabulary.processor
        before = table.decode(self._head)
        if table.is_byte(token):
            self._bytes += bytes.fromhex(table.id_to_piece(token)[3:5])
            text, self._bytes = take_characters(self._bytes, False)
        else:
            after = table.decode([*self._head, token])
            text = self.flush() + after[len(before) :]
        if not before:
            self._head.append(token)
        return text

    def flush(self) -> str:
        """The rest: U+FFFD for the bytes of an unfinished character."""
        text, self._bytes = take_characters(self._bytes, True)
        return text


# %% book/chapters/01_tokenizer.md, cell 49
class Encoder(Vocabulary):
    """Text to token ids."""

    def encode(
        self, text: str, add_bos: bool = False, add_eos: bool = False,
        specials: bool = False,
    ) -> list[int]:
        """Ids of `text`; like Grok-1, adds no [BOS] unless asked.

        `[EOS]` and its like in `text` are letters, as anything is that
        somebody typed; with `specials` they are the ids they name.
        """
        bos = [required(self.bos_id, "[BOS]")] if add_bos else []
        eos = [required(self.eos_id, "[EOS]")] if add_eos else []
        data, table = text.encode(), self.processor
        if specials:
            return bos + vocabularies.encode_special(table, text) + eos
        return bos + table.encode(data) + eos


# %% book/chapters/01_tokenizer.md, cell 50
class Decoder(Encoder):
    """And token ids to text."""

    def decode(
        self, ids: Iterable[SupportsIndex], specials: bool = False
    ) -> str:
        """Text of `ids`; ValueError if one is out of range.

        Shows nothing for [EOS] and its like, or with `specials` names.
        """
        checked = [in_range(i, self.vocab_size) for i in ids]
        if specials:
            return vocabularies.decode_special(self.processor, checked)
        return self.processor.decode(checked)

    def stream(self) -> TokenStream:
        """A `TokenStream`: `push(id)` each id, then `flush()`."""
        other = isinstance(self.processor, vocabularies.Table)
        return OtherStream(self) if other else TokenStream(self)


# %% book/chapters/01_tokenizer.md, cell 51
class Tokenizer(Decoder):
    """One tokenizer file: encode, decode, stream, save."""

    def save_in(self, folder: str | os.PathLike[str]) -> None:
        """Write it to `folder` by its usual name, with its settings."""
        name = vocabularies.file_name(self.model_bytes)
        self.save(Path(folder) / name)
        for name, data in self.beside.items():
            write_whole(Path(folder) / name, data)

    def chat(self, messages: Any, **options: Any) -> list[int]:
        """Ids of a conversation, by the template beside the file.

        `messages` are tables such as {"role": "user", "content": "Hi"};
        options are those of `vocabularies.chat_ids`.
        """
        return vocabularies.chat_ids(
            self.processor, self.beside, messages, **options
        )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, **options: Any
    ) -> "Tokenizer":
        """Learn from `texts`; options are those of `train_model`."""
        return cls(train_model(texts, vocab_size, **options))


# %% book/chapters/01_tokenizer.md, cell 59
class OtherStream(TokenStream):
    """The same for a table that is not SentencePiece's."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._inner = vocabulary.processor.stream()

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes."""
        token = in_range(token, self.vocabulary.vocab_size)
        return self._inner.push(token)

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character."""
        return self._inner.flush()
