"""Rooms of `formats`: files that are not what they seem, and NaN among weights."""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

import annotated_moe as am
from annotated_moe.convert import convert
from annotated_moe.families.grok import grok_config
from annotated_moe.formats import lazy
from annotated_moe.formats.files import CheckpointError, map_file, read_json
from annotated_moe.formats.lazy import (
    ConcatenatedArray,
    LazyArray,
    StackedArray,
    first_not_finite,
    stack_tensors,
)
from annotated_moe.formats.pickles import read_pickled
from annotated_moe.formats.pth import open_pth
from annotated_moe.formats.safetensors import (
    open_arrays,
    open_folder,
    parse_safetensors,
    safetensors_parts,
)
from annotated_moe.formats.writing import Watcher, write_file
from annotated_moe.model import init_params

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 4976698672
"""
SMALL = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.int8),
    "c": np.ones((3, 1), np.float16),
}


def refused(action, *words):
    """One line, of a readable length, with these words."""
    with pytest.raises(CheckpointError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert str(word) in text, text
    return text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One small model in each layout."""
    home = tmp_path_factory.mktemp("made")
    config = grok_config(
        vocab_size=32, context=8, d_model=16, d_ff=24, num_layers=2,
        q_heads=2, kv_heads=1, head_size=8, num_experts=2,
    )  # fmt: skip
    params = init_params(jax.random.key(0), config)
    am.save(am.Model(config, params), home / "ours")
    convert(home / "ours", home / "hf", "hf")
    convert(home / "ours", home / "shards", "hf", 5_000)
    convert(home / "ours", home / "grok-1", "grok-1")
    return home


@pytest.fixture
def copy(made, tmp_path):
    def one(name):
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return one


# What fetching leaves behind


def test_cut_anywhere(tmp_path):
    """A file that was cut is said to be cut, wherever that was."""
    path, data = tmp_path / "x.safetensors", save(SMALL)
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        refused(lambda: open_arrays(path), path, "was cut", "fetch")
    path.write_bytes(b"")
    refused(lambda: open_arrays(path), path, "is empty")
    path.write_bytes(data + b"\0\0")
    refused(lambda: open_arrays(path), path, "2 bytes behind its last tensor")


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 0.0001])
def test_cut_shards(copy, share):
    folder = copy("shards")
    path = sorted(folder.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[: max(1, int(share * len(data)))])
    refused(lambda: am.load(folder), path, "was cut", "fetch")


FILES = [
    ("ours", "model.safetensors"), ("ours", "config.json"),
    ("hf", "model.safetensors"), ("hf", "config.json"),
    ("shards", "model-00002"), ("shards", "model.safetensors.index.json"),
    ("grok-1", "ckpt-0/tensor00000_000"), ("grok-1", "ckpt-0/tensor00020_000"),
    ("grok-1", "config.json"),
]  # fmt: skip


@pytest.mark.parametrize("name, file", FILES)
@pytest.mark.parametrize("older", [False, True])
def test_a_git_lfs_pointer_in_place_of_a_file(copy, name, file, older):
    folder = copy(name)
    (path,) = folder.glob(f"{file}*")
    note = POINTER.replace(b"git-lfs", b"hawser") if older else POINTER
    path.write_bytes(note)
    refused(lambda: am.load(folder), path, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer(copy, name):
    folder = copy("hf")
    (folder / name).write_bytes(POINTER)
    refused(lambda: am.load(folder), folder / name, "git lfs pull")


def zipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return (tmp_path / "x.zip").read_bytes()


OTHERS = {
    "a pointer": (POINTER, "git lfs pull"),
    "git-annex": (b"/annex/objects/MD5E-s9--0123", "git annex get"),
    "a page": (b"<!doctype html>\n<html lang='en'>", "web page"),
    "a page, later": (b"\n\n  <html><head>", "web page"),
    "an error": (b"<?xml version='1.0'?><Error>", "web page"),
    "an answer": (b"Entry not found", "Entry not found"),
    "another": (b"Access to model x is restricted.\nLog in", "Access to model x"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "GGUF"),
    "zeros": (bytes(10_000), "zeros"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
}


@pytest.mark.parametrize("reader", [open_arrays, read_pickled, open_pth])
@pytest.mark.parametrize("data, word", OTHERS.values(), ids=OTHERS)
def test_something_else_in_place_of_weights(tmp_path, reader, data, word):
    path = tmp_path / "file"
    path.write_bytes(data)
    if reader is open_pth and data[:1] in (b"E", b"A", b"\0"):
        word = "no zip file"
    refused(lambda: reader(path), path, word)


@pytest.mark.parametrize("reader", [open_arrays, read_pickled])
def test_a_zip_in_place_of_weights(tmp_path, reader):
    (tmp_path / "file").write_bytes(zipped(tmp_path))
    refused(lambda: reader(tmp_path / "file"), "is a zip, as torch.save")


@pytest.mark.parametrize("reader", [open_arrays, read_pickled, open_pth, map_file])
def test_empty_missing_and_dangling(tmp_path, reader):
    (tmp_path / "empty").touch()
    refused(lambda: reader(tmp_path / "empty"), tmp_path / "empty", "is empty")
    refused(lambda: reader(tmp_path / "x"), tmp_path / "x", "No such file")
    (tmp_path / "link").symlink_to("blobs/0123")
    refused(lambda: reader(tmp_path / "link"), tmp_path / "link", "blobs/0123, which")
    refused(lambda: reader(tmp_path), tmp_path, "Is a directory")


@pytest.mark.parametrize("data", [
    save(SMALL), save({"x" * 52: np.ones(1, np.int8)}),
    save({f"{'x' * (8500 - 60)}": np.ones(1, np.int8)}),
])  # fmt: skip
def test_no_sound_file_is_taken_for_something_else(tmp_path, data):
    """Whatever letters the length of its header happens to be."""
    (tmp_path / "x").write_bytes(data)
    assert open_arrays(tmp_path / "x").keys() == load_file(tmp_path / "x").keys()


def test_headers_whose_length_spells_something():
    for word in (b"<h", b"<!", b"GG", b"PK", b"ve", b"En", b"  ", b"\n<"):
        size = int.from_bytes(word, "little")
        body = b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
        data = size.to_bytes(8, "little") + body.ljust(size) + b"\x07"
        assert parse_safetensors(np.frombuffer(data, np.uint8))["a"] == 7


# Empty tensors


def with_arrays(folder, change):
    path = folder / "model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    return path


@pytest.mark.parametrize("name", ["ours", "hf"])
@pytest.mark.parametrize("shape", [(0,), (0, 16), (16, 0), (2, 0, 16)])
def test_an_empty_tensor_that_is_needed(copy, name, shape):
    """As ZeRO-3 leaves them when its weights are not gathered."""
    folder, emptied = copy(name), []

    def change(arrays):
        emptied.append([n for n in arrays if "key/w" in n or "k_proj" in n][0])
        arrays[emptied[0]] = np.zeros(shape, np.float32)

    with_arrays(folder, change)
    text = refused(lambda: am.load(folder), folder, "is empty", "never written")
    assert emptied[0].removesuffix(".weight") in text


def test_an_empty_tensor_that_nobody_needs(copy):
    folder = copy("hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_arrays(folder, lambda a: a.update({name: np.zeros(0, np.float32)}))
    am.load(folder)


def test_an_empty_array_in_a_pickle(tmp_path):
    path = tmp_path / "tensor00000_000"
    path.write_bytes(pickle.dumps(np.zeros((0, 3), np.float32), protocol=4))
    refused(lambda: read_pickled(path), path, "empty array, of shape (0, 3)")


# Which files are the model


@pytest.mark.parametrize("name, word", [
    ("model-Q4_K_M.gguf", "llama.cpp"), ("tf_model.h5", "TensorFlow"),
    ("flax_model.msgpack", "Flax"), ("model.onnx", "ONNX"),
    ("model.fp16.safetensors", "give it that name"),
    ("model-00001-of-00002.safetensors", "fetch the index"),
    ("README.md", "fetch the weights"),
])  # fmt: skip
def test_other_weights_than_safetensors(copy, name, word):
    folder = copy("hf")
    (folder / "model.safetensors").rename(folder / name)
    refused(lambda: am.load(folder), folder, word)


def test_a_folder_with_a_gguf_alone(tmp_path):
    (tmp_path / "llama-3-8b.Q8_0.gguf").write_bytes(b"GGUF")
    refused(lambda: am.load(tmp_path), tmp_path, "Q8_0.gguf", "safetensors")


def same_params(a, b):
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


STRAYS = ["adapter_model.safetensors", "model.safetensors", "consolidated.safetensors",
          "model-00001-of-00099.safetensors"]


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("content", ["sound", "broken"])
def test_the_index_decides(copy, made, stray, content):
    """Whatever else lies there, and whether or not it can be read."""
    folder = copy("shards")
    data = save(SMALL) if content == "sound" else b"nonsense"
    (folder / stray).write_bytes(data)
    with pytest.warns(UserWarning) as heard:
        model = am.load(folder)
    (text,) = [str(w.message) for w in heard if "is not read" in str(w.message)]
    assert str(folder / stray) in text and "index.json does not name it" in text
    assert same_params(model, am.load(made / "shards"))


def test_one_file_and_no_index(copy, made):
    folder = copy("hf")
    save_file(SMALL, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="adapter_model.* is not read"):
        model = am.load(folder)
    assert same_params(model, am.load(made / "hf"))


def test_no_warning_where_there_is_nothing_to_say(copy):
    for name in ("hf", "shards", "ours"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            am.load(copy(name))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}},
                                     {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_names(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    refused(lambda: open_folder(tmp_path), path, "no 'weight_map' of names")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "", "lost"])
def test_an_index_that_points_elsewhere(tmp_path, shard):
    save_file(SMALL, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(lambda: open_folder(folder), path, "which is missing")


def test_json_of_a_stranger(tmp_path):
    path = tmp_path / "config.json"
    for text, word in [
        ('{"a": 1, "a": 2}', "holds 'a' twice"), ("[1]", "one JSON object"),
        ('{"a": {"b": 1, "b": 1}}', "holds 'b' twice"), ("{", "not readable"),
        ("[" * 10**5, "not readable"), (" " * (2**24 + 1), "at most 16777216"),
        ("\x00", "not readable"),
    ]:  # fmt: skip
        path.write_text(text)
        refused(lambda: read_json(path), path, word)
    path.write_text('{"a": {"b": 1}}')
    assert read_json(path) == {"a": {"b": 1}}


# NaN and infinity


FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


class Counted(LazyArray):
    """Says which parts of it were read."""

    def __init__(self, w):
        self.w, self.shape, self.dtype, self.read = w, w.shape, w.dtype, 0

    def __getitem__(self, index):
        self.read += self.w[index].nbytes
        return self.w[index]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_16_bits(dtype):
    """Each value alone is judged as NumPy judges it."""
    if np.dtype(dtype).itemsize == 2:
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
    else:
        edges = [0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
        edges += [edge | 0x80000000 for edge in edges]
        values = np.array(edges, np.uint32).view(dtype)
    with np.errstate(invalid="ignore"):
        want = np.isfinite(values.astype(np.float64))
    got = [lazy.all_finite(values[i : i + 1]) for i in range(len(values))]
    assert got == want.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_that_is_not_finite(dtype, bad, monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 64)
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (7,), (5, 9), (3, 4, 5), (2, 3, 4, 5)]:
        w = np.asarray(-abs(rng.standard_normal(shape)), dtype)
        assert first_not_finite(w) is None
        for index in {tuple(rng.integers(0, n) for n in shape) for _ in range(6)}:
            one = w.copy()
            one[index] = bad
            assert first_not_finite(one) == index
            assert first_not_finite(one.T) == index[::-1]
            assert first_not_finite(Counted(one)) == index if shape else True
            stack = StackedArray([w, one])
            assert first_not_finite(stack) == (1, *index)
            if len(shape) == 2:
                pair = ConcatenatedArray([w, one])
                assert first_not_finite(pair) == (index[0], index[1] + shape[1])
            one.ravel()[-1] = bad                   # a later one changes nothing
            assert first_not_finite(one) == index


def test_looking_for_what_is_not_finite_is_cheap(monkeypatch):
    """Read once, no further than needed; whole numbers not at all."""
    monkeypatch.setattr(lazy, "BLOCK", 4000)
    w = Counted(np.zeros((100, 100), np.float32))
    assert first_not_finite(w) is None and w.read == w.nbytes
    w = Counted(np.zeros((100, 100), np.float32))
    w.w[15, 3] = np.inf
    assert first_not_finite(w) == (15, 3) and w.read == 2 * 4000
    for dtype in (np.int8, np.uint8, np.int32, np.bool_):
        w = Counted(np.ones((100, 100), dtype))
        assert first_not_finite(w) is None and w.read == 0
    assert first_not_finite(np.zeros((0, 4), np.float32)) is None


# Writing


def test_metadata_is_what_others_read(tmp_path):
    parts = safetensors_parts(SMALL, {"format": "pt"})
    write_file(tmp_path / "x", parts, Watcher())
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "pt"}
    got = open_arrays(tmp_path / "x")
    assert got.keys() == SMALL.keys()
    for name, w in SMALL.items():
        np.testing.assert_array_equal(got[name], w)


@pytest.mark.parametrize("done", range(0, 170, 7))
def test_a_writer_goes_on_where_it_stopped(tmp_path, done):
    parts, whole = safetensors_parts(SMALL), Watcher()
    write_file(tmp_path / "whole", parts, whole)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "x").write_bytes(data[:done] + b"garbage")
    again = Watcher()
    write_file(tmp_path / "x", parts, again, min(done, len(data)))
    assert (tmp_path / "x").read_bytes() == data and again.sums == whole.sums


def test_paths_as_they_are_given(made):
    assert open_folder(Path(made / "hf")).keys() == open_folder(made / "shards").keys()


def test_empty_tensors_are_not_stacked():
    parts = [np.zeros((0, 3), np.float32)] * 2
    refused(lambda: stack_tensors(Path("folder"), "moe/linear/w", parts),
            "folder: moe/linear/w is empty, of shape (0, 3)", "never written")
