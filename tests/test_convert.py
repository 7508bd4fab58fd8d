"""Converting: round trips, memory, kills, and everything that may go wrong."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import annotated_moe as am
from annotated_moe import checkpoints, cli
from annotated_moe.cli import bytes_in
from annotated_moe.convert import (
    TARGETS,
    convert,
    pickle_parts,
    plan_hub,
    quantize_files,
)
from annotated_moe.families.grok import grok_config
from annotated_moe.formats import lazy, writing
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.grok1 import our_path, release_names
from annotated_moe.formats.lazy import as_bytes
from annotated_moe.formats.safetensors import open_arrays
from annotated_moe.model import flat_specs

SIZES = {
    "vocab_size": 96, "context": 16, "d_model": 64, "d_ff": 96, "num_layers": 11,
    "q_heads": 4, "kv_heads": 2, "head_size": 8, "num_experts": 3, "eos_ids": (5,),
    "embedding_multiplier": 8.0, "attn_multiplier": 0.3,
}  # fmt: skip
CONFIG = grok_config(**SIZES)
ATTENTION = "decoder_layer/multi_head_attention"


def tensors(config, quantized=True, seed=0):
    """(module, name) -> tensor; no two layers and no two experts are alike."""
    rng, made = np.random.default_rng(seed), {}
    for path, spec in flat_specs(config).items():
        shape = spec.shape
        if quantized and spec.matrix:
            several = path[0].endswith(("linear_1", "attention/linear"))
            scales = rng.random((*shape[:-2], 8 if several else 1, shape[-1]))
            weight = rng.integers(-127, 128, shape, np.int8)
            w = am.QuantizedTensor(weight, scales.astype(ml_dtypes.bfloat16))
        else:
            w = rng.standard_normal(shape, np.float32)
        made[path] = w
    return made


def model(config=CONFIG, quantized=True):
    params = {}
    for (module, leaf), w in tensors(config, quantized).items():
        params.setdefault(module, {})[leaf] = w
    return am.Model(config, params)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One model in three layouts, as `save` and `convert` wrote it."""
    home = tmp_path_factory.mktemp("made")
    am.save(model(), home / "ours")
    (home / "ours" / "notes.txt").write_text("by the way")
    convert(home / "ours", home / "grok-1", "grok-1")
    convert(home / "ours", home / "hf", "hf")
    convert(home / "ours", home / "shards", "hf", max_shard_size=100_000)
    return home


@pytest.fixture
def copy(made, tmp_path):
    def of(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return of


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def left_behind(folder, *but):
    return sorted(p.name for p in folder.iterdir() if p.name not in but)


def said(error, *words):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert str(word) in text, text


def refused(call, *words):
    with pytest.raises(CheckpointError) as error:
        call()
    said(error, *words)


# Round trips


def test_there_and_back_is_bit_identical(made, tmp_path):
    """Grok-1 -> ours -> HF in shards -> ours -> Grok-1 -> HF -> Grok-1."""
    steps = [
        ("a", made / "grok-1", "native"), ("b", tmp_path / "a", "hf"),
        ("c", tmp_path / "b", "native"), ("d", tmp_path / "c", "grok-1"),
        ("e", tmp_path / "d", "hf"), ("f", tmp_path / "e", "grok-1"),
    ]  # fmt: skip
    for name, source, to in steps:
        size = 10**5 if to == "hf" else None
        convert(source, tmp_path / name, to, size)
    for one, other in ["ac", "df", "be"]:
        assert content(tmp_path / one) == content(tmp_path / other)
    assert content(tmp_path / "a") == content(made / "ours")
    assert content(tmp_path / "d") == content(made / "grok-1")
    assert left_behind(tmp_path) == list("abcdef")


@pytest.mark.parametrize("name", ["grok-1", "hf", "shards"])
def test_every_layout_loads_as_the_same_model(made, name):
    want = am.load(made / "ours", dtype="float32")
    got = am.load(made / name, dtype="float32")
    assert got.config == want.config == replace(CONFIG, dtype="float32")
    for module, leaves in want.params.items():
        for leaf, w in leaves.items():
            other = got.params[module][leaf]
            for a, b in [(w, other)] if not hasattr(w, "scales") else [
                (w.weight, other.weight), (w.scales, other.scales)
            ]:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["grok-1", "shards"])
def test_a_layout_loads_onto_a_mesh(made, name):
    mesh = am.make_mesh(2, 2)
    got = am.load(made / name, mesh=mesh).params[f"{ATTENTION}/query"]["w"]
    want = am.load(made / "ours").params[f"{ATTENTION}/query"]["w"]
    np.testing.assert_array_equal(got.weight, want.weight)


def test_floats_convert_too(tmp_path):
    config = replace(CONFIG, dtype="float32")       # as the hf layout will say
    am.save(model(config, quantized=False), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "grok-1")
    convert(tmp_path / "b", tmp_path / "c", "hf")
    convert(tmp_path / "c", tmp_path / "d")
    assert content(tmp_path / "a") == content(tmp_path / "d")
    names = load_file(tmp_path / "c" / "model.safetensors")
    assert not any(name.endswith("_scale") for name in names)


def test_a_dense_model_goes_to_grok_1_but_has_no_hf_name(tmp_path):
    dense = grok_config(**SIZES | {"num_experts": 1, "top_k": 1})
    am.save(model(dense), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "grok-1")
    convert(tmp_path / "b", tmp_path / "c")
    assert content(tmp_path / "a") == content(tmp_path / "c")
    refused(lambda: convert(tmp_path / "a", tmp_path / "x", "hf"), "no architecture")
    assert left_behind(tmp_path) == ["a", "b", "c"]


def test_what_lies_beside_the_weights_comes_along(made):
    for name in ("grok-1", "hf", "shards"):
        assert (made / name / "notes.txt").read_text() == "by the way"


def test_the_tokenizer_comes_along(tmp_path):
    convert(checkpoints.small_model(), tmp_path / "hf", "hf")
    words = "In the beginning"
    small, got = am.load(dtype="float32"), am.load(tmp_path / "hf", dtype="float32")
    assert got.tokenizer.encode(words) == small.tokenizer.encode(words)
    assert (tmp_path / "hf" / "training.json").exists()


# What others will read


class QuantizedWeight8bit:
    pass


QuantizedWeight8bit.__module__ = "__main__"


def unpickled(data):
    name = QuantizedWeight8bit.__name__
    with patch.object(sys.modules["__main__"], name, QuantizedWeight8bit, create=True):
        return pickle.loads(data)


def test_python_unpickles_what_we_assemble(made):
    files = sorted((made / "grok-1" / "ckpt-0").iterdir())
    paths = {"/".join(path): path for path in flat_specs(CONFIG)}
    names = release_names(paths, CONFIG.num_layers)
    assert [f.name for f in files] == [f"tensor{i:05d}_000" for i in range(len(names))]
    want = tensors(CONFIG)
    for file, name in zip(files, names, strict=True):
        got, (path, layer) = unpickled(file.read_bytes()), our_path(name)
        w = want[paths[path]]
        pairs = [(got, w)]
        if isinstance(w, am.QuantizedTensor):
            pairs = [(got.weight, w.weight), (got.scales, w.scales)]
        for a, b in pairs:
            b = b if layer is None else b[layer]
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
            assert a.shape == b.shape


@pytest.mark.parametrize("shape", [(), (1,), (255,), (256, 1), (70000, 1)])
def test_a_pickle_of_any_shape(shape):
    w = np.ones(shape, np.float32)
    parts = pickle_parts(w, "x")
    data = b"".join(bytes(as_bytes(part.data)) for part in parts)
    got = unpickled(data)
    assert got.shape == shape and (got == 1).all() and got.dtype == np.float32


def test_names_and_orientation_of_the_hugging_face_layout(made):
    got, want = load_file(made / "hf" / "model.safetensors"), tensors(CONFIG)
    query = want[f"{ATTENTION}/query", "w"]
    moe = want["decoder_layer/moe/linear_1", "w"]
    name = "model.layers.10.attn.q_proj.weight"
    np.testing.assert_array_equal(got[name], query.weight[10].T)
    np.testing.assert_array_equal(got[f"{name}_scale"], query.scales[10].T)
    name = "model.layers.2.moe_block.experts.1.linear_1.weight"
    assert got[name].shape == (64, 96) and got[name].dtype == np.int8
    np.testing.assert_array_equal(got[name], moe.weight[2, 1].T)
    np.testing.assert_array_equal(got[f"{name}_scale"], moe.scales[2, 1].T)
    table = want["in_out_embed", "embeddings"]
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], table)
    assert "model.layers.0.pre_moe_norm.scale" in got and "model.norm.scale" in got
    assert len(got) == 2 + 11 * (4 + 1 + 8 + 3 * 3 * 2)
    settings = json.loads((made / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["Grok1ModelForCausalLM"]
    assert settings["num_experts_per_tok"] == 2 and settings["hidden_size"] == 64


def test_the_library_reads_every_file_we_write(made):
    for path in made.rglob("*.safetensors"):
        theirs, ours = load_file(path), open_arrays(path)
        assert sorted(theirs) == sorted(ours)
        for name, array in theirs.items():
            assert array.dtype == ours[name].dtype and not ours[name].flags.owndata
            assert array.tobytes() == ours[name].tobytes()
            assert ours[name].flags.aligned


def test_shards_keep_to_their_size(made):
    index = json.loads((made / "shards" / "model.safetensors.index.json").read_text())
    sizes = {}
    for path in (made / "shards").glob("*.safetensors"):
        arrays = load_file(path)
        sizes[path.name] = sum(w.nbytes for w in arrays.values())
        assert all(index["weight_map"][name] == path.name for name in arrays)
    count = len(sizes)
    assert sorted(sizes) == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert max(sizes.values()) <= 100_000 and count > 5
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own():
    plan = plan_hub(tensors(CONFIG), CONFIG, 1)
    assert len(plan) == 2 + 11 * (4 + 1 + 8 + 3 * 3 * 2) + 1


# Memory


def stored(folder):
    return checkpoints.stored(checkpoints.open_checkpoint(folder))


def test_convert_holds_less_than_twice_the_largest_tensor(tmp_path, monkeypatch):
    """30 MB in all, of which no file's tensor has more than 1.1 MB."""
    config = grok_config(**SIZES | {
        "d_model": 256, "d_ff": 1024, "num_layers": 8, "num_experts": 4,
        "vocab_size": 512})
    am.save(model(config), tmp_path / "a")
    steps = ["ab hf", "bc grok-1", "cd native", "de hf"]
    for (source, target), to in map(str.split, steps):
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / target, to)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        arrays = stored(tmp_path / "c") if target != "b" else {}
        largest = max([1024 * 1024, *(w.nbytes for w in arrays.values())])
        assert largest < 1.1e6 and peak < 2 * largest, (source, to, peak)
    assert sum(w.nbytes for w in arrays.values()) > 25 * largest
    assert content(tmp_path / "a") == content(tmp_path / "d")


@pytest.mark.parametrize("most", [1, 7, 100, 10**9])
def test_pieces_are_the_array_in_order(monkeypatch, most):
    monkeypatch.setattr(lazy, "BLOCK", most)
    w = np.arange(2 * 3 * 5, dtype=np.int8).reshape(2, 3, 5)
    for array in (w, w.T, w[:, 1], w[0, 0, 0], w.astype(np.float32)[:0]):
        got = list(lazy.iter_blocks(array))
        data = b"".join(bytes(as_bytes(p)) for p in got)
        assert data == array.tobytes()
        assert all(p.nbytes <= max(most, array.itemsize) for p in got)


def test_a_stack_is_what_it_stacks():
    w = np.arange(120).reshape(2, 3, 4, 5)
    stack = lazy.StackedArray([lazy.StackedArray(list(part)) for part in w])
    assert stack.shape == w.shape and stack.dtype == w.dtype
    for index in [
        slice(None), 1, (1, 2), (slice(0, 2), 1), (slice(1, 2), slice(0, 2), 3),
        (slice(None),) * 4, (1, slice(None), slice(1, 3)), (), -1,
    ]:  # fmt: skip
        np.testing.assert_array_equal(np.asarray(stack[index]), w[index])
    np.testing.assert_array_equal(np.asarray(stack), w)


# Kills


KILLED = """
import os, sys
from annotated_moe.formats import lazy, writing
from annotated_moe.convert import convert
import annotated_moe.convert
sys.modules["annotated_moe.convert"].SYNC = 1
lazy.BLOCK = 1000
left, append = int(sys.argv[3]), writing.append_bytes
def dying(path, data):
    global left
    left -= len(data)
    if left < 0:
        with open(path, "ab") as file:
            file.write(data[: len(data) // 2])
        os.kill(os.getpid(), 9)
    append(path, data)
writing.append_bytes = dying
convert(sys.argv[1], sys.argv[2], sys.argv[4], 10**5 if sys.argv[4] == "hf" else None)
"""


def run(script, *words, **options):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, to",
    [("ours", "hf"), pytest.param("hf", "native", marks=pytest.mark.full),
     pytest.param("ours", "grok-1", marks=pytest.mark.full)],
)
def test_killed_at_three_random_points_then_resumed(made, tmp_path, name, to):
    """A block torn in its middle each time; the end is as if nothing had been."""
    size = 10**5 if to == "hf" else None
    convert(made / name, tmp_path / "whole", to, size)
    total = sum(len(data) for data in content(tmp_path / "whole").values())
    partial, chance = tmp_path / ".again.partial", random.Random(f"{name} {to}")
    for _ in range(3):
        point = chance.randrange(1000, total // 4)
        done = run(KILLED, made / name, tmp_path / "again", point, to)
        assert done.returncode == -9, done.stderr
        assert left_behind(tmp_path) == [".again.partial", "whole"]
        refused(lambda: am.load(partial))
    heard, append = [], writing.append_bytes
    rewritten = []

    def seen(path, data):
        rewritten.append(len(data))
        append(path, data)

    with patch.object(writing, "append_bytes", seen), patch.object(
        lazy, "BLOCK", 1000
    ):
        convert(
            made / name, tmp_path / "again", to, size, lambda d, t: heard.append((d, t))
        )
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert left_behind(tmp_path) == ["again", "whole"]
    assert heard[-1][0] == heard[-1][1]
    assert 0 < sum(rewritten) < total - 3000        # not everything again


def test_a_killed_conversion_of_something_else_is_left_alone(made, tmp_path):
    target = tmp_path / "again"
    run(KILLED, made / "ours", target, 20_000, "grok-1")
    before = content(tmp_path)
    refused(lambda: convert(made / "ours", target, "hf"), ".again.partial", "remove it")
    refused(lambda: convert(made / "hf", target, "grok-1"), "another conversion")
    assert content(tmp_path) == before


def test_a_source_that_changed_is_not_gone_on_with(copy, tmp_path):
    source = copy("ours")
    run(KILLED, source, tmp_path / "x", 20_000, "grok-1")
    (source / "notes.txt").write_text("changed")
    refused(lambda: convert(source, tmp_path / "x", "grok-1"), "source has changed")


def test_a_source_that_changes_on_the_way(copy, tmp_path):
    source = copy("ours")

    def meddle(done, total):
        (source / "notes.txt").write_text("changed")

    call = lambda: convert(source, tmp_path / "x", tell=meddle)  # noqa: E731
    refused(call, source, "changed while it was read")
    assert left_behind(tmp_path) == ["ours"]


def test_two_at_a_time_are_refused(made, tmp_path):
    from annotated_moe.convert import locked

    with locked(tmp_path / ".x.partial"):
        refused(lambda: convert(made / "ours", tmp_path / "x"), "another convert")
    convert(made / "ours", tmp_path / "x")


def test_a_partial_folder_that_lost_a_file(made, tmp_path):
    run(KILLED, made / "ours", tmp_path / "x", 20_000, "grok-1")
    (tmp_path / ".x.partial" / "ckpt-0" / "tensor00000_000").unlink()
    refused(lambda: convert(made / "ours", tmp_path / "x", "grok-1"), "remove it")


# Faults, each with one sentence and nothing left behind


FULL = """
import resource, signal, sys
from annotated_moe.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("to", TARGETS)
def test_a_file_that_may_not_grow(made, tmp_path, to):
    """A limit of the operating system's own stops the writing for real."""
    source = made / ("hf" if to == "native" else "ours")
    done = run(FULL, 5000, source, tmp_path / "x", "--to", to)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "cannot be written: File too large; make room" in last
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up(made, tmp_path, monkeypatch):
    append, room = writing.append_bytes, 100_000

    def full(path, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            with patch("builtins.open", side_effect=OSError(errno.ENOSPC, "No space")):
                append(path, data)
        append(path, data)

    monkeypatch.setattr(writing, "append_bytes", full)
    words = ("No space", "make room")
    refused(lambda: convert(made / "ours", tmp_path / "x", "hf"), *words)
    assert room < 0 and left_behind(tmp_path) == []


def test_a_disk_that_is_full_from_the_start(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(lambda: convert(made / "ours", tmp_path / "x"), "has 1,000", "make room")
    assert left_behind(tmp_path) == []


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shard(folder, i):
    return sorted(folder.glob("model-*.safetensors"))[i]


def test_a_shard_that_is_missing(copy):
    folder = copy("shards")
    shard(folder, 2).unlink()
    refused(lambda: am.load(folder), "index.json names", "00003-of", "missing")


def test_a_shard_missing_from_the_index(copy):
    folder = copy("shards")
    gone = shard(folder, 2).name
    change_index(
        folder, lambda m: [m.pop(name) for name in list(m) if m[name] == gone]
    )
    with pytest.warns(UserWarning, match=f"{gone} is not read: .* not name it"):
        refused(lambda: am.load(folder), folder, "lacks model.")


def test_a_tensor_missing_from_its_shard(copy):
    folder = copy("shards")
    change_index(folder, lambda m: m.update(extra=shard(folder, 0).name))
    refused(lambda: am.load(folder), shard(folder, 0), "lacks 'extra'")


def test_two_tensors_for_one_parameter(copy):
    folder = copy("shards")
    first, second = shard(folder, 0), shard(folder, 1)
    name, w = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: w}, second)
    refused(lambda: am.load(folder), second, name, "two tensors")


def test_two_tensors_for_one_parameter_in_one_file(copy):
    """A header that has a name twice; the library takes the last."""
    path = copy("ours") / "model.safetensors"
    data = path.read_bytes()
    names = b'"decoder_layer/rms_norm_1/scale"', b'"decoder_layer/rms_norm_2/scale"'
    path.write_bytes(data.replace(*names))
    refused(lambda: am.load(path.parent), path, "rms_norm_2/scale' twice")


def test_a_parameter_both_quantized_and_not(copy):
    path = copy("ours") / "model.safetensors"
    name = f"{ATTENTION}/key/w"
    extra = np.zeros(flat_specs(CONFIG)[f"{ATTENTION}/key", "w"].shape, np.float32)
    save_file({**load_file(path), name: extra}, path)
    refused(lambda: am.load(path.parent), path, name)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["ours", "hf", "shards", "grok-1"])
def test_a_checksum_that_is_wrong(copy, name):
    folder = copy(name)
    assert am.verify(folder) == len(json.loads(
        (folder / "checksums.json").read_text())["sha256"])
    files = [*folder.glob("*.safetensors"), *folder.glob("ckpt-0/tensor00001_000")]
    path = sorted(files)[-1]
    if name == "grok-1":
        data = path.read_bytes()
        path.write_bytes(data[:-10] + b"\x7f" + data[-9:])
    else:
        damage(path)
    am.load(folder)                             # sound, as far as shapes can tell
    refused(lambda: am.verify(folder), "does not match its checksum")


@pytest.mark.parametrize("name, to", [
    ("ours", "native"), ("grok-1", "native"), ("hf", "hf"), ("shards", "native"),
])  # fmt: skip
def test_damage_is_not_copied_with_fresh_checksums(copy, tmp_path, name, to):
    """In what is read in its order and in what is turned around; and in 8 bits."""
    folder = copy(name)
    arrays = checkpoints.stored(checkpoints.open_checkpoint(folder))
    for wrong in (min(arrays), max(arrays)):
        file, at = checkpoints.place_in_file(arrays[wrong])
        before = Path(file).read_bytes()
        data = bytearray(before)
        data[at + 5] ^= 1
        Path(file).write_bytes(data)
        for job in (
            lambda: am.verify(folder),
            lambda: convert(folder, tmp_path / "out", to),
            lambda: quantize_files(folder, tmp_path / "out"),
        ):
            refused(job, f"{wrong} does not match its checksum", "fetch it again")
        assert left_behind(tmp_path) == [name]
        Path(file).write_bytes(before)
    convert(folder, tmp_path / "out", to)


def test_a_source_is_read_once_where_it_can_be(made, tmp_path, monkeypatch):
    """What is copied in the order of its file is hashed as it passes."""
    passed = []
    finish = checkpoints.Verification.finish

    def watched(self):
        passed.append(sum(self.done.values()) / self.size)
        finish(self)

    monkeypatch.setattr(checkpoints.Verification, "finish", watched)
    convert(made / "grok-1", tmp_path / "a")
    convert(made / "shards", tmp_path / "b")
    assert passed[0] == 1 > passed[1] > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_configuration_says_the_dtype_of_the_weights(dtype):
    halves = {
        path: w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for path, w in tensors(CONFIG, quantized=False).items()
    }
    _, describe = TARGETS["hf"]
    said = describe(CONFIG, halves)
    assert {said[name] for name in ("dtype", "torch_dtype") if name in said} == {dtype}
    assert describe(CONFIG, tensors(CONFIG))["torch_dtype"] == CONFIG.dtype


def test_a_checksum_is_the_sha256_of_the_stored_bytes(made):
    sums = json.loads((made / "hf" / "checksums.json").read_text())["sha256"]
    for name, w in load_file(made / "hf" / "model.safetensors").items():
        assert sums.pop(name) == hashlib.sha256(w.tobytes()).hexdigest()
    assert sums == {}


def test_a_tensor_without_a_checksum_and_the_reverse(copy):
    path = copy("ours") / "checksums.json"
    sums = json.loads(path.read_text())["sha256"]
    name = min(sums)
    path.write_text(json.dumps({"sha256": {**sums, "no/such": "0"}}))
    refused(lambda: am.verify(path.parent), "'no/such' has no tensor")
    path.write_text(json.dumps({"sha256": {k: sums[k] for k in sums if k != name}}))
    refused(lambda: am.verify(path.parent), name, "no checksum")
    path.unlink()
    refused(lambda: am.verify(path.parent), "no checksums.json")


@pytest.mark.parametrize("name", ["ours", "shards"])
def test_a_tensor_of_another_shape(copy, name):
    folder = copy(name)
    path = sorted(folder.glob("*.safetensors"))[-1]
    arrays = load_file(path)
    victim = next(n for n in sorted(arrays) if arrays[n].ndim > 1)
    arrays[victim] = arrays[victim][:-1].copy()
    save_file(arrays, path)
    words = {"ours": [victim.removesuffix(".scales"), "shape"],
             "shards": ["tensors of decoder_layer/moe/", "are not alike"]}
    refused(lambda: am.load(folder), folder, *words[name])


@pytest.mark.parametrize("name, field, value, word", [
    ("ours", "d_model", 88, "(96, 88)"),
    ("hf", "intermediate_size", 88, "(11, 3, 64, 88)"),
    ("hf", "num_hidden_layers", 12, "model.layers.11."),
    ("hf", "num_hidden_layers", 10, "model.layers.10."),
    ("hf", "num_hidden_layers", 10**9, "model.layers.11."),
    ("hf", "num_experts", 4, "experts.3."),
    ("grok-1", "num_layers", 12, "tensor"),
    ("grok-1", "num_layers", 10, "config.json belong"),
])  # fmt: skip
def test_config_and_weights_that_disagree(copy, name, field, value, word):
    folder = copy(name)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, field: value}))
    refused(lambda: am.load(folder), folder, word)


@pytest.mark.parametrize("field, value, word", [
    ("architectures", ["GemmaForCausalLM"], "GemmaForCausalLM"),
    ("architectures", [3], "architecture none"),
    ("architectures", {"a": 1}, "architecture none"),
    ("tie_word_embeddings", False, "tie_word_embeddings is False"),
    ("rms_norm_eps", 1e-6, "rms_norm_eps"),
    ("sliding_window", 4096, "sliding_window"),
    ("num_attention_heads", None, "lacks the field 'num_attention_heads'"),
    ("num_attention_heads", 3, "3 query heads"),
])  # fmt: skip
def test_an_hf_configuration_that_is_not_ours(copy, field, value, word):
    path = copy("hf") / "config.json"
    settings = json.loads(path.read_text()) | {field: value}
    if value is None:
        del settings[field]
    path.write_text(json.dumps(settings))
    refused(lambda: am.load(path.parent), path, word)


def test_hf_fields_that_may_be_left_out(copy):
    path = copy("hf") / "config.json"
    settings = json.loads(path.read_text())
    for name in ("rope_theta", "torch_dtype", "quantization_config", "rms_norm_eps"):
        del settings[name]
    path.write_text(json.dumps({**settings, "use_cache": True, "_note": 1}))
    assert checkpoints.open_checkpoint(path.parent).config == CONFIG


def test_an_output_matrix_must_be_the_embedding(copy):
    path = copy("hf") / "model.safetensors"
    arrays = load_file(path)
    head = arrays["model.embed_tokens.weight"].copy()
    save_file({**arrays, "lm_head.weight": head}, path)
    am.load(path.parent)
    head[0, 0] += 1
    save_file({**arrays, "lm_head.weight": head}, path)
    refused(lambda: am.load(path.parent), "lm_head.weight is not the embedding")


def test_int8_without_its_scales(copy):
    path = copy("hf") / "model.safetensors"
    arrays, name = load_file(path), "model.layers.3.attn.k_proj.weight"
    del arrays[f"{name}_scale"]
    save_file(arrays, path)
    refused(lambda: am.load(path.parent), f"lacks {name}_scale")


LOCKED = """
import contextlib, io, os, sys
from annotated_moe import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["info"])                          # imports what it will need
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)    # root may read anything
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def public():
    """A folder that another user may enter; pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["ours", "ours/model.safetensors", "ours/config.json"])
def test_no_read_permission(made, public, what):
    folder = shutil.copytree(made / "ours", public / "ours")
    assert run(LOCKED, "info", folder).returncode == 0
    victim = public / what
    victim.chmod(0)
    done = run(LOCKED, "info", folder)
    victim.chmod(0o755)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert str(victim) in line and "Permission denied" in line


def test_no_permission_to_write(made, public):
    folder = shutil.copytree(made / "ours", public / "ours")
    (public / "locked").mkdir(mode=0o555)
    done = run(LOCKED, "convert", folder, public / "locked" / "x")
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "locked" in line and "Permission denied" in line
    assert left_behind(public / "locked") == []


@pytest.mark.parametrize("name, what", [
    ("ours", ""), ("ours", "config.json"), ("ours", "model.safetensors"),
    ("grok-1", "ckpt-0"), ("grok-1", "ckpt-0/tensor00003_000"),
    ("grok-1", "config.json"), ("shards", "model.safetensors.index.json"),
])  # fmt: skip
def test_a_symlink_loop(copy, tmp_path, name, what):
    path = copy(name) / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)
    refused(lambda: am.load(tmp_path / name), path, "symbolic links")
    refused(lambda: convert(tmp_path / name, tmp_path / "x"), path, "symbolic links")
    assert left_behind(tmp_path) == [name]


@pytest.mark.parametrize("change, word", [
    ({"attn_softcap": None}, "soft cap"),
    ({"attn_softcap": 20.0}, "soft cap"),
    ({"rope_base": 5000.0}, "RoPE base"),
    ({"d_ff": 100}, "width of 100"),
    ({"eos_ids": (5, 6)}, "one eos_token"),
    ({"eos_ids": ()}, "one eos_token"),
])  # fmt: skip
def test_what_the_release_cannot_say(tmp_path, change, word):
    config = grok_config(**SIZES | change)
    am.save(model(config, quantized=False), tmp_path / "a")
    refused(lambda: convert(tmp_path / "a", tmp_path / "x", "grok-1"), word)
    assert left_behind(tmp_path) == ["a"]


def test_another_architecture_is_none_of_the_releases(tmp_path):
    layer = replace(CONFIG.layer(0), post_norm=False)
    segment = replace(CONFIG.layers[0], pattern=(layer,))
    config = replace(CONFIG, layers=(segment,))
    am.save(model(config, quantized=False), tmp_path / "a")
    refused(lambda: convert(tmp_path / "a", tmp_path / "x", "grok-1"), "--to native")
    assert left_behind(tmp_path) == ["a"]


def test_targets_that_are_refused(made, copy, tmp_path):
    source = copy("ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    before = content(tmp_path)
    for name, word in [
        ("full", "exists"), ("link", "exists"), ("ours", "exists"),
        ("ours/inside", "lies within"), ("no/such/x", "not a folder"),
    ]:  # fmt: skip
        refused(lambda name=name: convert(source, tmp_path / name), word)
    assert content(tmp_path) == before
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert content(tmp_path / "empty") == content(made / "ours")


def test_options_that_make_no_sense(made, tmp_path):
    for to, size in [("pt", None), ("native", 5), ("grok-1", 5), ("hf", 0)]:
        with pytest.raises(ValueError, match="to must be|max_shard_size"):
            convert(made / "ours", tmp_path / "x", to, size)


# Headers that lie


def tampered(data, **fields):
    """The first tensor's entry with other fields."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[min(header)] |= fields
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize("fields, word", [
    ({"dtype": "F64"}, "dtype 'F64'"),
    ({"dtype": 5}, "malformed"),
    ({"shape": [2**60]}, "malformed"),
    ({"shape": [-1]}, "malformed"),
    ({"shape": [True]}, "malformed"),
    ({"shape": [1] * 9}, "malformed"),
    ({"shape": 4}, "malformed"),
    ({"shape": [0]}, "takes 0 bytes, in 16"),
    ({"shape": [5]}, "20 bytes, in 16"),
    ({"data_offsets": [0, 2**60]}, "malformed"),
    ({"data_offsets": [4, 20]}, "from byte 4"),
    ({"data_offsets": [16, 32]}, "comes before it"),
    ({"data_offsets": [16, 0]}, "-16"),
    ({"data_offsets": [0]}, "malformed"),
    ({"extra": 1}, "malformed"),
])  # fmt: skip
def test_a_header_that_lies(tmp_path, fields, word):
    arrays = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    save_file(arrays, tmp_path / "x")
    open_arrays(tmp_path / "x")
    (tmp_path / "x").write_bytes(tampered((tmp_path / "x").read_bytes(), **fields))
    refused(lambda: open_arrays(tmp_path / "x"), tmp_path / "x", word)


# The command


def test_the_command_shows_how_far_it_is(made, tmp_path, capsys):
    words = [str(made / "hf"), str(tmp_path / "x"), "--to", "grok-1"]
    assert cli.main(["convert", *words]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "100%" in err.splitlines()[-2]
    assert err.splitlines()[-1].endswith(f"to {words[1]} in the layout Grok-1.")
    assert cli.main(["convert", *words]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("word, size", [
    ("7", 7), ("500KB", 500_000), ("2mb", 2 * 10**6), ("5GB", 5 * 10**9),
    ("1TB", 10**12),
])  # fmt: skip
def test_sizes(word, size):
    assert bytes_in(word) == size
    for wrong in ("", "GB", "5 GB", "-5", "5GBGB", "5B", "1.5GB", "x"):
        with pytest.raises(ValueError, match="no size"):
            bytes_in(wrong)


@pytest.mark.parametrize("name, layout", [
    ("ours", "annotated-moe-2"), ("grok-1", "Grok-1"), ("shards", "Hugging Face")
])  # fmt: skip
def test_info_of_every_layout(made, capsys, name, layout):
    assert cli.main(["info", str(made / name), "--verify"]) == 0
    rows = capsys.readouterr().out.splitlines()
    lines = {row[:22].strip(): row[22:].strip() for row in rows}
    assert lines["layout"] == layout and lines["d_model"] == "64"
    assert lines["checksums"].endswith("as written")
    sizes = {}
    for w in tensors(CONFIG).values():
        for a in [w] if isinstance(w, np.ndarray) else [w.weight, w.scales]:
            sizes[a.dtype.name] = sizes.get(a.dtype.name, 0) + a.nbytes
    for dtype, size in sizes.items():
        assert lines[f"bytes of {dtype}"] == f"{size:,}"
    assert lines["bytes of weights"] == f"{sum(sizes.values()):,}"


def test_info_of_the_real_shapes_reads_only_heads(tmp_path, capsys):
    """318 GB of holes: a program that read them would not come back."""
    grok_1 = am.PRESETS["grok-1"]
    specs = {"/".join(path): spec for path, spec in flat_specs(grok_1).items()}
    (tmp_path / "ckpt-0").mkdir()

    class Hole:
        def __init__(self, shape, dtype):
            self.shape, self.dtype = shape, np.dtype(dtype)

    for i, name in enumerate(release_names(specs, grok_1.num_layers)):
        path, layer = our_path(name)
        shape = specs[path].shape[0 if layer is None else 1 :]
        w = Hole(shape, np.float32)
        if specs[path].matrix:
            scales = Hole((*shape[:-2], 8, shape[-1]), ml_dtypes.bfloat16)
            w = am.QuantizedTensor(Hole(shape, np.int8), scales)
        with open(tmp_path / f"ckpt-0/tensor{i:05d}_000", "wb") as file:
            for part in pickle_parts(w, ""):
                if isinstance(part.data, Hole):
                    file.seek(part.size, os.SEEK_CUR)
                else:
                    file.write(bytes(as_bytes(part.data)))
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert cli.main(["info", str(tmp_path)]) == 0
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert "bytes of int8         314,874,789,888" in capsys.readouterr().out
    assert after.ru_maxrss - before.ru_maxrss < 200 * 1024      # KiB
