"""The tokenizer: recorded cases, any ids, any text, broken files."""

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from annotated_moe import tokenizer as module
from annotated_moe.tokenizer import Tokenizer, take_characters

FIXTURES = Path(__file__).parent / "fixtures"
MODEL = FIXTURES / "tokenizer.model"
RECORDED = json.loads((FIXTURES / "tokenizer.json").read_text("utf-8"))
SOURCES = [Path(module.__file__), Path(__file__)]
TEXTS = [path.read_text("utf-8").replace("▁", "_") for path in SOURCES]
SYMBOLS = "aé▂日🦜 \t\n\r\0\x1f\x85\u00a0\u2028\ufeff\ufffd\U0010ffff"


def foreign(**options):
    """A model with the library's own defaults instead of ours."""
    model = io.BytesIO()
    options = {"vocab_size": 400, "hard_vocab_limit": False} | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")),
        model_writer=model,
        minloglevel=2,
        **options,
    )
    return Tokenizer(model.getvalue())


MAKE = {
    "recorded": lambda: Tokenizer(MODEL),
    "ours": lambda: Tokenizer.train(TEXTS, 420),
    "no dummy prefix": lambda: Tokenizer.train(TEXTS, 420, add_dummy_prefix=False),
    "trims spaces": lambda: Tokenizer.train(TEXTS, 420, remove_extra_whitespaces=True),
    "unigram, no bytes": lambda: foreign(model_type="unigram"),
    "bpe, no bytes": lambda: foreign(model_type="bpe"),
    "characters": lambda: foreign(model_type="char"),
    "own mark for unknown": lambda: foreign(unk_surface="▁?", model_type="bpe"),
}


@pytest.fixture(scope="module", params=MAKE)
def any_model(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def ours():
    return MAKE["ours"]()


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([stream.push(i) for i in ids]) + stream.flush()


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and "[" not in message.replace("[BOS]", "")
    for part in parts:
        assert part in message
    return True


# What the release recorded


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["prompt"][:12])
def test_recorded_ids_and_text(case):
    tokenizer = Tokenizer(MODEL)
    assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert tokenizer.decode(case["sampled_ids"]) == case["text"]
    assert streamed(tokenizer, case["sampled_ids"]) == case["text"]


def test_recorded_layout():
    tokenizer = Tokenizer(MODEL)
    ids = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id
    assert (ids, tokenizer.vocab_size) == ((0, 1, 2, 3), 512)


# A stream is a decode


def test_stream_is_decode_for_any_ids(any_model):
    rng, size = random.Random(0), any_model.vocab_size
    table = any_model.backend.processor
    raw = [i for i in range(size) if table.is_byte(i)] or [0]
    spaced = [i for i in range(size) if table.id_to_piece(i).startswith("▁")]
    pools = [range(size), raw, spaced + [0, 1, 2, 3], raw + spaced + [0, 3]]
    for _ in range(600):
        pool = rng.choice(pools)
        ids = rng.choices(pool, k=rng.randrange(14))
        assert streamed(any_model, ids) == any_model.decode(ids), ids


def test_every_pair_of_bytes():
    tokenizer = Tokenizer(MODEL)
    byte = [tokenizer.backend.processor.piece_to_id(f"<0x{i:02X}>") for i in range(256)]
    for first in range(256):
        for second in range(0, 256, 15):
            text = take_characters(bytes([first, second]), True)
            expected = tokenizer.decode([byte[first], byte[second]])
            assert text == (expected, b"")


@pytest.mark.parametrize("text", ["é", "日", "🦜", "e\u0301", "👩‍🚀"])
def test_no_part_of_a_character_is_shown(ours, text):
    data = text.encode()
    ids = [ours.backend.processor.piece_to_id(f"<0x{b:02X}>") for b in data]
    stream, shown = ours.stream(), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        assert shown == data[:count].decode(errors="ignore")
    assert shown == text and stream.flush() == ""


def test_a_stream_that_stops_within_a_character(ours):
    byte = ours.backend.processor.piece_to_id
    ids = [byte(f"<0x{b:02X}>") for b in "🦜".encode()[:3]]
    stream = ours.stream()
    assert [stream.push(i) for i in ids] == ["", "", ""]
    assert stream.flush() == ours.decode(ids) == "\ufffd" * 3
    assert stream.flush() == ""


def test_special_pieces_show_nothing(ours):
    hello = ours.encode("def f(x): return x")
    woven = [0] + [i for token in hello for i in (token, 0, 1, 2)]
    assert streamed(ours, woven) == ours.decode(woven) == "def f(x): return x"


def test_a_stream_after_a_prompt_keeps_the_space(ours):
    ids = ours.encode("a b")
    stream = ours.stream()
    assert [stream.push(i) for i in ids][-1] in (" b", "b")
    assert streamed(ours, ids) == "a b"
    assert ours.decode(ours.encode("b")) == "b"


# Any text comes back


def test_any_text_comes_back(ours):
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(400):
        low, high = rng.choice(ranges)
        letters = [chr(rng.randrange(low, high)) for _ in range(6)]
        text = "".join(rng.choices([*SYMBOLS, *letters, "  ", "12"], k=12))
        assert "▁" not in text
        ids = ours.encode(text)
        assert ours.decode(ids) == streamed(ours, ids) == text
        assert not {0, 1, 2, 3} & set(ids)


def test_source_code_comes_back(ours):
    for text in [*TEXTS, "", " ", "   ", "\n", "\n\n  x", "\tx \r\n", "1e10 0x00"]:
        assert ours.decode(ours.encode(text)) == text


def test_digits_and_line_breaks_stand_alone():
    tokenizer = Tokenizer.train([*TEXTS, "1024\n\n\tx = 1024 " * 999], 420)
    pieces = [tokenizer.backend.processor.id_to_piece(i) for i in range(6 + 256, 420)]
    assert not [p for p in pieces if len(p) > 1 and set(p) & set("0124\n\t")]
    assert tokenizer.encode("a\n\n\tb")[1:4] == [4, 4, 5]


def test_a_prompt_cannot_forge_special_ids(any_model):
    ids = any_model.encode("[PAD] [BOS] [EOS] <s> </s> <pad>")
    special = {any_model.pad_id, any_model.bos_id, any_model.eos_id}
    assert not special & set(ids)


def test_bos_and_eos_only_on_request(ours):
    plain = ours.encode("x")
    assert 1 not in plain and 2 not in plain
    assert ours.encode("x", add_bos=True, add_eos=True) == [1, *plain, 2]
    assert ours.encode("", add_bos=True, add_eos=True) == [1, 2]


def test_a_prompt_of_grok_1_begins_with_nothing(ours):
    plain = ours.encode("x y")
    assert ours.encode_prompt("x y") == plain
    assert ours.encode_prompt("x y", add_bos=False) == plain
    assert ours.encode_prompt("x y", add_bos=True) == [1, *plain]


def test_special_pieces_at_their_word(ours):
    """Only the beginning of a text has a space put before it."""
    for text in ["a[EOS]b", "[BOS]a", "a [EOS] b", "[BOS][BOS]", "", " [PAD]  x[EOS] "]:
        ids = ours.encode(text, specials=True)
        assert ours.decode(ids, specials=True) == text
        alone = module.SentencePieceBackend(ours.model_bytes)
        assert alone.encode_special(text, {}) == ids
        assert alone.decode(ids, True) == text
        named = {p: ids.count(i) for i, p in enumerate(["[PAD]", "[BOS]", "[EOS]"])}
        assert named == {p: text.count(p) for p in named}


def test_absent_special_pieces_are_none():
    bare = foreign(bos_id=-1, eos_id=-1, unk_id=0)
    found = bare.pad_id, bare.bos_id, bare.eos_id, bare.unk_id
    assert found == (None, None, None, 0)
    with pytest.raises(ValueError, match="no .BOS. piece"):
        bare.encode("x", add_bos=True)
    with pytest.raises(ValueError, match="no .EOS. piece"):
        bare.encode("x", add_eos=True)


# What cannot be encoded or decoded


def test_a_negative_id_is_a_mistake():
    tokenizer = Tokenizer(MODEL)
    with pytest.raises(ValueError) as error:
        tokenizer.decode([300, -1])
    assert one_line(error, "-1")
    with pytest.raises(ValueError) as error:
        tokenizer.stream().push(-1)
    assert one_line(error, "-1")


@pytest.mark.parametrize("beyond", [512, 2**31, 2**70])
def test_an_id_beyond_the_table_is_no_text(beyond):
    """A model's table may be larger than its tokenizer's."""
    tokenizer = Tokenizer(MODEL)
    ids = tokenizer.encode("a naïve 🦜 talks")
    woven = [beyond] + [i for token in ids for i in (token, beyond)]
    assert tokenizer.decode(woven) == streamed(tokenizer, woven) == "a naïve 🦜 talks"
    assert tokenizer.decode(woven, specials=True) == "a naïve 🦜 talks"
    assert tokenizer.decode([beyond]) == streamed(tokenizer, [beyond]) == ""


def test_a_text_that_needs_more_ids_than_a_model_has():
    tokenizer = Tokenizer(MODEL)
    ids = tokenizer.encode("experts")
    assert tokenizer.check_ids(ids, max(ids) + 1) == ids
    with pytest.raises(ValueError) as error:
        tokenizer.check_ids(ids, max(ids))
    piece = tokenizer.decode([max(ids)])
    assert one_line(error, f"token {max(ids)} ({piece!r})", f"only {max(ids)}")


def test_integers_of_any_library():
    tokenizer = Tokenizer(MODEL)
    ids = tokenizer.encode("experts")
    for dtype in [np.int32, np.uint16, np.int64]:
        array = np.array(ids, dtype)
        assert tokenizer.decode(array) == "experts"
        assert streamed(tokenizer, array) == "experts"
    assert tokenizer.decode(i for i in ids) == "experts"


def test_only_a_text_is_encoded(ours, any_types):
    with pytest.raises(TypeError, match=r"encode takes a text: \[1, 2\]"):
        ours.encode([1, 2])


def test_half_a_surrogate_pair_is_no_text(ours):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ours.encode("a\ud83e")


# Broken files


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.model"
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer(path)
    assert one_line(error, str(path), "No such file", "SentencePiece")
    with pytest.raises(OSError) as error:
        Tokenizer(str(tmp_path))
    assert one_line(error, str(tmp_path), "directory")


BROKEN = {
    "empty": b"",
    "text": b"{'tokenizer': 1}",
    "zeros": bytes(4096),
    "first half": MODEL.read_bytes()[:3000],
    "last byte gone": MODEL.read_bytes()[:-1],
    "second half": MODEL.read_bytes()[3000:],
    "a piece that is no UTF-8": MODEL.read_bytes().replace(b"the", b"t\xffe"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name, capfd):
    path = tmp_path / "broken.model"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert one_line(error, str(path), "copy")
    with pytest.raises(ValueError) as error:
        Tokenizer(BROKEN[name])
    assert one_line(error, "the tokenizer is")
    assert capfd.readouterr().err == ""


def test_damage_is_refused_or_harmless():
    """No flipped byte may crash the process or break a later call."""
    rng, loaded = random.Random(0), 0
    whole = MODEL.read_bytes()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = Tokenizer(bytes(data))
        except ValueError:
            continue
        loaded += 1
        assert isinstance(tokenizer.decode(tokenizer.encode("def é 12\n")), str)
        assert isinstance(streamed(tokenizer, range(tokenizer.vocab_size)), str)
    assert 0 < loaded < 200


# Saving


def test_save_and_load(tmp_path, ours):
    path = tmp_path / "tokenizer.model"
    ours.save(path)
    assert path.read_bytes() == ours.model_bytes
    again = Tokenizer(str(path))
    assert again.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    assert os.listdir(tmp_path) == ["tokenizer.model"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, ours, monkeypatch, step):
    def full(*_):
        raise OSError("disk full")

    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"old")
    monkeypatch.setattr(module.os, step, full)
    with pytest.raises(OSError, match="disk full"):
        ours.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["tokenizer.model"]


# Training


def test_training_is_quiet_and_repeatable(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    first = Tokenizer.train(iter(TEXTS), 420)
    second = Tokenizer.train((text for text in TEXTS), 420)
    assert first.model_bytes == second.model_bytes
    assert first.vocab_size == 420
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_training_on_one_string_is_training_on_one_text():
    alone, listed = Tokenizer.train(TEXTS[0], 400), Tokenizer.train(TEXTS[:1], 400)
    assert alone.model_bytes == listed.model_bytes


def test_long_texts_and_reserved_characters_are_not_dropped():
    long = "zebra crossing " * 20_000 + "\u2585"
    tokenizer = Tokenizer.train([*TEXTS, long], 420)
    assert len(tokenizer.encode("zebra crossing")) == 2


@pytest.mark.parametrize(
    ("texts", "size", "part"),
    [
        ([], 400, "no text"),
        (["", ""], 400, "no text"),
        (["abc abc"], 400, "too high"),
        (TEXTS, 100, "smaller than required"),
        (["a\ud83e"], 400, "surrogates"),
    ],
)
def test_training_says_what_is_wrong(texts, size, part):
    with pytest.raises(ValueError, match=f"cannot learn {size} pieces: .*{part}"):
        Tokenizer.train(texts, size)


def test_an_unknown_training_option_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        Tokenizer.train(TEXTS, 400, nonsense=1)


def test_options_override_the_defaults():
    tokenizer = Tokenizer.train(TEXTS, 420, whole=("\n", "<|code|>"), eos_id=-1)
    assert tokenizer.eos_id is None
    assert len(tokenizer.encode("<|code|>")) == 2          # after the dummy prefix
