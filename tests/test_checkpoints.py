"""Checkpoints: recorded outputs, files that are wrong, files that mean harm."""

import errno
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import annotated_moe as am
from annotated_moe import checkpoints
from annotated_moe.families.grok import grok_config
from annotated_moe.formats import pickles, writing
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.grok1 import release_names
from annotated_moe.formats.pickles import as_tensor, parse, read_pickled
from annotated_moe.model import decode_step, flat_specs, init_cache, prefill

FIXTURES = Path(__file__).parent / "fixtures"


class QuantizedWeight8bit:
    """Pickled under the name that the release used."""

    def __init__(self, weight, scales):
        self.weight, self.scales = weight, scales


QuantizedWeight8bit.__module__ = "__main__"


def dump(tensor):
    """The `__main__` of a test run is pytest's; the class is there for a moment."""
    main, name = sys.modules["__main__"], QuantizedWeight8bit.__name__
    with patch.object(main, name, QuantizedWeight8bit, create=True):
        return pickle.dumps(tensor, protocol=4)


def write_release(folder, tensors, config):
    """Path -> tensor in the Grok-1 layout; `config` as it stands in JSON."""
    (folder / "ckpt-0").mkdir(parents=True)
    for i, name in enumerate(sorted(tensors)):
        path = folder / f"ckpt-0/tensor{i:05d}_000"
        path.write_bytes(dump(tensors[name]))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURES / "checkpoint_mixed.npz") as arrays:
        return dict(arrays)


def tensors_of(recorded):
    """Plain attention, quantized experts, two layers."""
    tensors = {}
    for key, value in recorded.items():
        if not key.startswith("param."):
            continue
        name = key.removeprefix("param.").removesuffix(".weight_i8")
        if key.endswith(".weight_i8"):
            scales = recorded[f"param.{name}.scales"].astype(ml_dtypes.bfloat16)
            tensors[name] = QuantizedWeight8bit(value, scales)
        elif not key.endswith(".scales"):
            tensors[name] = value
    return tensors


@pytest.fixture
def release(recorded, tmp_path):
    config = json.loads(str(recorded["config"]))
    return write_release(tmp_path / "release", tensors_of(recorded), config)


def one_sentence(error, *words):
    """What a reader sees: one line, of a readable length, with these words."""
    assert error.type is CheckpointError
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert str(word) in text, text
    return text


def complaint(folder, *words, **options):
    with pytest.raises(CheckpointError) as error:
        am.load(folder, **options)
    return one_sentence(error, *words)


# Recorded outputs


def assert_as_recorded(model, recorded):
    tokens, lengths = recorded["tokens"], recorded["lengths"]
    assert len(set(lengths)) > 1
    got = np.asarray(model.logits(tokens, lengths))
    for row, n in enumerate(lengths):
        want = recorded["logits.f32"][row, :n]
        np.testing.assert_allclose(got[row, :n], want, rtol=0, atol=1e-4)
    with model.on_mesh():
        cache = init_cache(model.config, len(tokens), model.config.context)
        step, cache = prefill(model.params, tokens, lengths, cache, model.config)
        np.testing.assert_allclose(
            step, recorded["prefill_last_logits.f32"], rtol=0, atol=1e-4
        )
        for new, want in zip(recorded["decode_tokens"], recorded["decode_logits.f32"]):
            step, cache = decode_step(model.params, new, cache, model.config)
            np.testing.assert_allclose(step, want, rtol=0, atol=1e-4)


FULL = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (4, 2, 1), (1, 1, 8), (2, 2, 2)]
MESHES = [(0, 0, 0), (8, 1, 1), (2, 4, 1), (1, 2, 4)]
MESHES += [pytest.param(*mesh, marks=pytest.mark.full) for mesh in FULL]


@pytest.mark.parametrize("data, model, expert", MESHES)
def test_matches_grok_1_on_any_devices(release, recorded, data, model, expert):
    """Prefill and decode, rows of different length together."""
    mesh = am.make_mesh(data, model, expert) if data else None
    loaded = am.load(release, mesh=mesh, dtype="float32")
    assert loaded.config.layer(0).feed_forward.width == 88
    assert loaded.config.dtype == "float32"
    assert_as_recorded(loaded, recorded)


def test_an_unquantized_checkpoint_runs_its_experts(recorded, tmp_path):
    """The release skips them, and every MoE layer returns its input."""
    tensors = tensors_of(recorded)
    for name, w in tensors.items():
        if isinstance(w, QuantizedWeight8bit):
            tensors[name] = floats(am.QuantizedTensor(w.weight, w.scales))
    config = json.loads(str(recorded["config"]))
    write_release(tmp_path / "float", tensors, config)
    assert_as_recorded(am.load(tmp_path / "float", dtype="float32"), recorded)


def test_a_device_holds_only_its_part(release):
    model = am.load(release, mesh=am.make_mesh(2, 4))
    w = model.params["decoder_layer/moe/linear"]["w"].weight
    assert w.shape == (2, 8, 32, 88)
    assert {shard.data.shape for shard in w.addressable_shards} == {(2, 8, 16, 22)}


TINY = grok_config(
    vocab_size=40, context=16, d_model=16, d_ff=24, num_layers=12,
    q_heads=4, kv_heads=2, head_size=4, num_experts=4,
)


def random_params(quantized):
    """Twelve layers, of which no two are alike."""
    rng, params = np.random.default_rng(0), {}
    for (module, leaf), spec in flat_specs(TINY).items():
        shape = spec.shape
        w = rng.standard_normal(shape).astype(np.float32)
        if quantized and spec.matrix:
            groups = 4 if module.endswith(("linear_1", "attention/linear")) else 1
            weight = rng.integers(-127, 128, shape).astype(np.int8)
            scales = rng.random((*shape[:-2], groups, shape[-1]))
            w = am.QuantizedTensor(weight, scales.astype(ml_dtypes.bfloat16))
        params.setdefault(module, {})[leaf] = w
    return params


def floats(w):
    """`dequantize`, by NumPy."""
    if not isinstance(w, am.QuantizedTensor):
        return np.asarray(w)
    weight, scales = np.asarray(w.weight), np.asarray(w.scales)
    times = weight.shape[-2] // scales.shape[-2]
    return weight * scales.astype(np.float32).repeat(times, axis=-2)


@pytest.fixture(scope="module")
def tiny():
    return am.Model(TINY, random_params(quantized=True))


def released_tensors(model):
    """The tree that the release would have written."""
    tensors = {}
    for module, leaves in model.params.items():
        for leaf, w in leaves.items():
            if not module.startswith("decoder_layer"):
                tensors[f"language_model/{module}/{leaf}"] = np.asarray(w)
                continue
            rest = module.removeprefix("decoder_layer/")
            for i in range(model.config.num_layers):
                one = jax.tree.map(lambda a, i=i: np.asarray(a[i]), w)
                if isinstance(one, am.QuantizedTensor):
                    one = QuantizedWeight8bit(one.weight, one.scales)
                tensors[f"transformer/decoder_layer_{i}/{rest}/{leaf}"] = one
    return tensors


SETTINGS = {
    "vocab_size": 40, "sequence_len": 16, "_note": "a comment",
    "model": {
        "emb_size": 16, "widening_factor": 2, "key_size": 4, "num_q_heads": 4,
        "num_kv_heads": 2, "num_layers": 12, "num_experts": 4,
    },
}  # fmt: skip


def as_in_files(params):
    """What lies turned in memory, as files have it."""
    return jax.tree.map(
        lambda w: am.QuantizedTensor(w.weight, w.scales)
        if isinstance(w, am.QuantizedTensor) else w,
        params, is_leaf=lambda w: isinstance(w, am.QuantizedTensor),
    )


def assert_same_params(a, b):
    a, b = as_in_files(a), as_in_files(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("devices", [1, 8])
def test_files_are_in_string_order(tiny, tmp_path, devices):
    """decoder_layer_10 comes before decoder_layer_2."""
    folder = write_release(tmp_path / "twelve", released_tensors(tiny), SETTINGS)
    names = release_names(map("/".join, flat_specs(TINY)), 12)
    assert names == sorted(released_tensors(tiny))
    layers = [name.split("/")[1] for name in names if "router" in name]
    assert layers[:4] == [f"decoder_layer_{i}" for i in (0, 1, 10, 11)]
    mesh = am.make_mesh(2, devices // 2) if devices > 1 else None
    loaded = am.load(folder, mesh=mesh, dtype="float32")
    assert loaded.config == replace(TINY, dtype="float32")
    if devices == 1:
        assert_same_params(loaded.params, tiny.params)
    for module, leaves in tiny.params.items():
        for leaf, w in leaves.items():
            got = loaded.params[module][leaf]
            np.testing.assert_array_equal(floats(got), floats(w))


def test_the_folder_itself_or_its_ckpt_0(release):
    inside = am.load(release / "ckpt-0")
    assert_same_params(inside.params, am.load(str(release)).params)


def test_without_a_config_it_is_grok_1(release):
    (release / "config.json").unlink()
    complaint(release, "lacks tensor00026_000", "transformer/decoder_layer_10/")


# Files that are wrong


SMALL = np.arange(6, dtype=np.float32).reshape(2, 3)


def pair(shape=(4, 6), groups=2):
    weight = np.arange(np.prod(shape)).reshape(shape).astype(np.int8)
    scales = np.ones((*shape[:-2], groups, shape[-1]), ml_dtypes.bfloat16)
    return QuantizedWeight8bit(weight, scales)


class Described:
    """An array as pickle describes it, with whatever state one likes."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        make = np._core.multiarray._reconstruct
        return make, (np.ndarray, (0,), b"b"), self.state


class Typed:
    """A dtype with any code and state."""

    def __init__(self, code, *state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


F4 = np.dtype("<f4")
RAW = SMALL.tobytes()
ORDER = (3, "<", None, None, None, -1, -1, 0)


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


P4 = b"\x80\x04"
QUANTIZED = named("__main__", "QuantizedWeight8bit")
SYSTEM = named("os", "system")
TOUCH = text("touch struck") + pickle.TUPLE1
BOMB = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))


class Shell:
    def __reduce__(self):
        return os.system, ("touch struck",)


HARM = {
    "REDUCE": dump(Shell()),
    "REDUCE, protocol 0": pickle.dumps(Shell(), protocol=0),
    "REDUCE, protocol 5": pickle.dumps(Shell(), protocol=5),
    "STACK_GLOBAL": P4 + SYSTEM + TOUCH + pickle.REDUCE + b".",
    "GLOBAL": b"cos\nsystem\n(S'touch struck'\ntR.",
    "INST": b"(S'touch struck'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch struck'\no.",
    "OBJ, modern": P4 + b"(" + QUANTIZED + b"o.",
    "NEWOBJ": P4 + named("subprocess", "Popen") + TOUCH + pickle.NEWOBJ + b".",
    "NEWOBJ_EX": P4 + QUANTIZED + b")}" + pickle.NEWOBJ_EX + b".",
    "BUILD, setstate": P4 + QUANTIZED + b")\x81}(" + text("__setstate__")
    + SYSTEM + b"ub" + TOUCH + b"b.",
    "BUILD, attributes": P4 + QUANTIZED + b")\x81}(" + text("__class__")
    + QUANTIZED + b"ub.",
    "BUILD, twice": P4 + QUANTIZED + b")\x81}b}b.",
    "getattr": P4 + named("builtins", "getattr") + b".",
    "eval inside a tensor": dump(
        QuantizedWeight8bit(np.zeros((2, 2), np.int8), Shell())
    ),
    "dotted": P4 + named("numpy", "ndarray.tofile") + b".",
    "dtype of a call": P4 + named("numpy", "dtype") + TOUCH + b"R" + TOUCH + b"R.",
    "persistent id": b"Pos.system\n.",
    "persistent id, binary": P4 + text("os.system") + b"Q.",
    "extension 1": P4 + b"\x82\x01.",
    "extension 2": P4 + b"\x83\x01\x00.",
    "extension 4": P4 + b"\x84\x01\x00\x00\x00.",
    "newline in a name": P4 + named("os\nall is well", "x\x1b[2J") + b".",
    "buffer out of band": b"\x80\x05\x97.",
}
WRONG = {
    "empty": b"",
    "only a stop": b".",
    "no stop": P4 + b")",
    "not a pickle": b"PK\x03\x04" * 100,
    "two values": P4 + b")).",
    "bytes behind the end": dump(SMALL) + b"\0",
    "huge length": P4 + b"\x8e" + b"\xff" * 8,
    "huge frame": P4 + b"\x95" + b"\xff" * 8,
    "huge text": P4 + b"\x8d" + b"\xff" * 8,
    "LONG4": P4 + b"\x8b\xff\xff\xff\x7f",
    "LONG1": P4 + b"\x8a\xff.",
    "stack underrun": P4 + b"\x87.",
    "no mark": P4 + b"))t.",
    "only a mark": P4 + b"(.",
    "mark as a value": P4 + b"(\x94h\0h\0\x87.",
    "memo never written": P4 + b"h\x05.",
    "memo of nothing": P4 + b"\x94.",
    "itself": P4 + b"}\x94(" + text("weight") + b"h\0" + text("scales") + b"h\0u.",
    "itself as state": P4 + QUANTIZED + b")\x81\x94h\x00b.",
    "bomb": P4 + BOMB + b"\x86" * 60 + b".",
    "bomb as a name": P4 + BOMB + b"\x93.",
    "bomb as an argument": P4 + named("numpy", "dtype") + BOMB + b"R.",
    "a dict as a key": P4 + b"}(})u.",
    "bomb as a key": P4 + b"}(" + BOMB + b")u.",
    "deep": P4 + b")" + b"\x85" * 900 + b".",
    "deeper": P4 + b")" + b"\x85" * 10**6 + b".",
    "wide": P4 + b"(" + b")" * 10**6 + b"t.",
    "names that are numbers": P4 + b"K\x01K\x02\x93.",
    "keys that are numbers": P4 + b"}(K\x01K\x02u.",
    "keys without values": P4 + b"}(" + text("weight") + b"u.",
    "text that is none": P4 + b"\x8c\x02\xff\xfe.",
    "objects": dump(np.array([None, 1])),
    "dtype O": dump(Described(1, (2, 3), Typed("O8", *ORDER), False, RAW)),
    "dtype of words": dump(Described(1, (2, 3), Typed("x" * 200, *ORDER), False, RAW)),
    "dtype a number": dump(Described(1, (2, 3), Typed(4, *ORDER), False, RAW)),
    "dtype a tensor": dump(Described(1, (2, 3), SMALL, False, RAW)),
    "dtype without state": dump(Described(1, (2, 3), Typed("f4"), False, RAW)),
    "float64": dump(SMALL.astype("f8")),
    "structured": dump(np.zeros(2, [("a", "f4")])),
    "big-endian": dump(SMALL.astype(">f4")),
    "Fortran order": dump(Described(1, (2, 3), F4, True, RAW)),
    "Fortran order, real": dump(np.asfortranarray(SMALL)),
    "negative size": dump(Described(1, (-2, -3), F4, False, RAW)),
    "no rows": dump(np.zeros((0, 3), np.float32)),
    "bool sizes": dump(Described(1, (True, 6), F4, False, RAW)),
    "sizes of floats": dump(Described(1, (2.0, 3), F4, False, RAW)),
    "sizes in a dict": dump(Described(1, {}, F4, False, RAW)),
    "one size": dump(Described(1, 6, F4, False, RAW)),
    "another size": dump(Described(1, (2, 4), F4, False, RAW)),
    "huge sizes": dump(Described(1, (2**62, 2**62), F4, False, RAW)),
    "long sizes": dump(Described(1, (2**2000,) * 8, F4, False, RAW)),
    "hundred axes": dump(Described(1, (1,) * 99 + (6,), F4, False, RAW)),
    "no bytes": dump(Described(1, (2, 3), F4, False, "text")),
    "short state": dump(Described(1, (2, 3), F4)),
    "no state": P4 + named("numpy.core.multiarray", "_reconstruct") + b")R.",
    "not called": P4 + named("numpy.core.multiarray", "_reconstruct") + b".",
    "called twice": P4 + named("numpy", "dtype") + b")R)R.",
    "called with a dict": P4 + named("numpy", "dtype") + b"}R.",
    "class called": P4 + named("numpy", "ndarray") + b")R.",
    "pair called": P4 + QUANTIZED + b")R.",
    "pair called, with its state": dump(pair()).replace(b")\x81", b")R"),
    "pair without state": P4 + QUANTIZED + b")\x81.",
    "pair of one": P4 + QUANTIZED + b")\x81}(" + text("weight") + b"Nub.",
    "pair of nothing": dump(QuantizedWeight8bit(None, None)),
    "pair of pairs": dump(QuantizedWeight8bit(pair(), pair())),
    "a number": dump(5),
    "a list": dump([1, 2]),
    "a tuple": dump((SMALL, SMALL)),
    "a dict": dump({"weight": SMALL}),
}


@pytest.mark.parametrize("data", [*HARM.values(), *WRONG.values()], ids=[*HARM, *WRONG])
def test_refused_in_one_sentence_and_nothing_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle, "loads", None)
    path = tmp_path / "tensor00007_000"
    path.write_bytes(dump(SMALL))
    read_pickled(path)                          # NumPy imports what it needs
    path.write_bytes(data)
    loaded, start = set(sys.modules), time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        read_pickled(path)
    one_sentence(error, path)
    assert time.perf_counter() - start < 5
    assert os.listdir(tmp_path) == [path.name]
    assert set(sys.modules) == loaded


@pytest.mark.parametrize(
    "name, culprit",
    [
        ("REDUCE", "system"),
        ("STACK_GLOBAL", "os.system"),
        ("NEWOBJ", "subprocess.Popen"),
        ("getattr", "builtins.getattr"),
        ("dotted", "numpy.ndarray.tofile"),
        ("GLOBAL", "GLOBAL"),
        ("extension 1", "EXT1"),
        ("persistent id", "PERSID"),
    ],
)
def test_the_culprit_is_named(name, culprit):
    with pytest.raises(CheckpointError, match="nothing was run") as error:
        parse(memoryview(HARM[name]))
    one_sentence(error, culprit)


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_pickled(tmp_path)
    one_sentence(error, tmp_path)


def same_bytes(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["f4", "i1", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3, 70)])
def test_agrees_with_pickle(tmp_path, dtype, shape):
    want = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    (tmp_path / "a").write_bytes(dump(want))
    same_bytes(read_pickled(tmp_path / "a"), want)
    both = QuantizedWeight8bit(want, want)              # one array, met twice
    (tmp_path / "b").write_bytes(dump(both))
    got = read_pickled(tmp_path / "b")
    same_bytes(got.weight, want)
    same_bytes(got.scales, want)


def test_the_older_name_of_reconstruct(tmp_path):
    """NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core."""
    new = dump(SMALL)
    old = new.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
    size = new[3:11], (int.from_bytes(new[3:11], "little") - 1).to_bytes(8, "little")
    assert len(old) == len(new) - 1
    same_bytes(as_tensor(parse(memoryview(old.replace(*size)))), SMALL)


def test_arrays_are_views_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(dump(SMALL))
    got = read_pickled(tmp_path / "a")
    assert not got.flags.owndata and not got.flags.writeable


def test_cut_off_anywhere(tmp_path):
    for tensor in (SMALL, pair()):
        data, path = dump(tensor), tmp_path / "tensor"
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError) as error:
                read_pickled(path)
            one_sentence(error, path)


def survives(data):
    """Whether it still is a tensor; any error but one is the reader's."""
    try:
        got = as_tensor(parse(memoryview(data)))
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    parts = jax.tree.leaves(got)
    allowed = ("float32", "int8", "bfloat16")
    assert all(a.dtype.name in allowed and a.ndim <= 8 for a in parts)
    return True


def outcome(read, data):
    """The arrays that a reader makes of a file, or what it complains of."""
    try:
        parts = jax.tree.leaves(read(memoryview(data)))
    except CheckpointError as error:
        return str(error)
    return [(a.dtype.name, a.shape, a.tobytes()) for a in parts]


def test_random_damage():
    """A file like one already seen is read the same, or refused the same."""
    rng = np.random.default_rng(0)
    files = [dump(SMALL), dump(pair()), dump(pair((2, 4, 6), 4))]
    alive, seen = 0, {}
    for file in files:
        pickles.interpret(memoryview(file), seen)
    assert len(seen) == 3
    for trial in range(600):
        data = bytearray(files[trial % len(files)])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        alive += survives(bytes(data))
        slow = outcome(lambda d: as_tensor(parse(d)), data)
        assert outcome(lambda d: pickles.interpret(d, dict(seen)), data) == slow
    assert 0 < alive < 600


def test_a_file_like_one_seen_needs_no_machine(monkeypatch):
    one, other, seen = dump(pair()), bytearray(dump(pair())), {}
    pickles.interpret(memoryview(one), seen)
    monkeypatch.setattr(pickles, "parse", None)
    at = other.index(pair().weight.tobytes())
    other[at] ^= 1
    got = pickles.interpret(memoryview(other), seen)
    assert got.weight.ravel()[0] == pair().weight.ravel()[0] ^ 1
    other[at - 1] ^= 1
    with pytest.raises(TypeError):              # not like it: to the machine
        pickles.interpret(memoryview(other), seen)


def test_random_programs():
    """Only instructions that are carried out, in any order."""
    rng = np.random.default_rng(1)
    known = [*pickles.PUSH_OPS, *pickles.OTHER_OPS]
    codes = [code for code, name in pickles.OPCODES.items() if name in known]
    whole = [QUANTIZED, text("weight"), text("scales"), named("numpy", "dtype"),
             b"h\0", b"h\1", b"K\2", dump(SMALL)[11:-1], b"(", b")", b"\x94"]
    for _ in range(600):
        pieces = [whole[i] for i in rng.integers(0, len(whole), 12)]
        pieces += [bytes([codes[i]]) for i in rng.integers(0, len(codes), 12)]
        rng.shuffle(pieces)
        survives(P4 + b"".join(map(bytes, pieces)) + b".")


# Checkpoints that are not what their configuration says


EXPERT = "transformer/decoder_layer_1/moe/linear_1/w"
NORM = "transformer/decoder_layer_0/rms_norm_2/scale"
QUERY = "transformer/decoder_layer_1/multi_head_attention/query/w"
ROUTER = "transformer/decoder_layer_0/router/w"


def with_scales(change):
    def fault(tensors):
        w = tensors[EXPERT]
        tensors[EXPERT] = QuantizedWeight8bit(w.weight, change(w.scales))

    return fault


def put(name, change):
    def fault(tensors):
        tensors[name] = change(tensors[name])

    return fault


def quantized(w):
    scales = np.ones((1, w.shape[-1]), ml_dtypes.bfloat16)
    return QuantizedWeight8bit(w.astype(np.int8), scales)


FAULTS = {
    "scales in float32": (with_scales(lambda s: s.astype("f4")), EXPERT),
    "groups that do not divide": (with_scales(lambda s: s.repeat(3, 1)), EXPERT),
    "scales of another width": (with_scales(lambda s: s[..., :5].copy()), EXPERT),
    "scales of fewer experts": (with_scales(lambda s: s[:4]), EXPERT),
    "scales without groups": (with_scales(lambda s: s[:, 0].copy()), EXPERT),
    "scales that are one number": (with_scales(lambda s: s[0, 0, :1]), EXPERT),
    "layers with other groups": (
        with_scales(lambda s: s.repeat(2, 1)), "decoder_layer/moe/linear_1/w"
    ),
    "int8 alone": (put(EXPERT, lambda w: w.weight), EXPERT),
    "float32 with scales": (
        put(EXPERT, lambda w: QuantizedWeight8bit(w.weight.astype("f4"), w.scales)),
        EXPERT,
    ),
    "one layer quantized": (put(QUERY, quantized), "multi_head_attention/query/w"),
    "a quantized norm": (put(NORM, quantized), NORM),
    "a quantized router": (put(ROUTER, quantized), ROUTER),
    "transposed": (put(ROUTER, lambda w: w.T.copy()), ROUTER),
    "another size": (put(NORM, lambda w: w[:-1].copy()), NORM),
    "an int8 router": (put(ROUTER, lambda w: w.astype(np.int8)), ROUTER),
}


@pytest.mark.parametrize("fault, name", FAULTS.values(), ids=FAULTS)
def test_a_wrong_tensor(recorded, tmp_path, fault, name):
    tensors = tensors_of(recorded)
    fault(tensors)
    config = json.loads(str(recorded["config"]))
    folder = write_release(tmp_path / "wrong", tensors, config)
    ours = re.sub(r"transformer/decoder_layer_\d", "decoder_layer", name)
    complaint(folder, folder / "ckpt-0", ours)


def test_a_missing_tensor(release):
    (release / "ckpt-0/tensor00003_000").unlink()
    name = "transformer/decoder_layer_0/moe/linear_1/w"
    complaint(release, "tensor00003_000", name)


def test_an_extra_tensor(release):
    (release / "ckpt-0/tensor00026_000").write_bytes(dump(SMALL))
    complaint(release, "tensor00026_000", "config.json")


def test_a_harmful_tensor_among_good_ones(release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (release / "ckpt-0/tensor00003_000").write_bytes(HARM["REDUCE"])
    complaint(release, "tensor00003_000", "system", "nothing was run")
    assert not Path("struck").exists()


def test_other_files_beside_tensors_do_not_matter(release):
    (release / "ckpt-0/README").write_text("by the way")
    am.load(release)


CONFIGS = {
    "no JSON": ("{", "not readable"),
    "empty": ("", "not readable"),
    "not text": (b"\xff\xfe\x00", "not readable"),
    "a list": ("[1]", "one JSON object"),
    "nested too deep": ("[" * 10**5, "not readable"),
    "an unknown field": ('{"rope_theta": 1}', "rope_theta"),
    "an unknown inner field": ('{"model": {"num_heads": 8}}', "num_heads"),
    "model is a number": ('{"model": 3}', "must be an object"),
    "a size of text": ('{"model": {"emb_size": "32"}}', "d_model"),
    "a size of null": ('{"vocab_size": null}', "vocab_size"),
    "a size of half": ('{"sequence_len": 0.5}', "context"),
    "true": ('{"model": {"num_layers": true}}', "num_layers must be"),
    "a list of sizes": ('{"model": {"key_size": [8]}}', "head_size"),
    "zero": ('{"model": {"num_layers": 0}}', "num_layers"),
    "huge": ('{"vocab_size": 1e400}', "vocab_size"),
    "long": ('{"vocab_size": %s}' % ("9" * 5000), "not readable"),
    "layers without end": ('{"model": {"num_layers": 999999999}}', "to 9999"),
    "infinite": ('{"output_multiplier_scale": Infinity}', "output_multiplier"),
    "not a number": ('{"embedding_multiplier_scale": NaN}', "embedding_multiplier"),
    "widening of text": ('{"model": {"widening_factor": "8"}}', "widening_factor"),
    "widening of nan": ('{"model": {"widening_factor": NaN}}', "widening_factor"),
    "widening infinite": ('{"widening_factor": Infinity}', "widening_factor"),
    "widening of nothing": ('{"widening_factor": 1e-9}', "width must be"),
    "heads that do not divide": ('{"model": {"num_q_heads": 7}}', "7 query heads"),
    "a token outside": ('{"eos_token": 131072}', "eos_ids"),
}


READER = """
import json, sys
import annotated_moe as am
said = []
for folder in sys.stdin.read().split():
    try:
        am.load(folder)
    except Exception as error:
        said.append([type(error).__name__, str(error)])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """In one process without checked signatures: they would object first."""
    home = tmp_path_factory.mktemp("configs")
    for i, (content, _) in enumerate(CONFIGS.values()):
        (home / f"{i}" / "ckpt-0").mkdir(parents=True)
        data = content if isinstance(content, bytes) else content.encode()
        (home / f"{i}" / "config.json").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READER], capture_output=True, text=True, check=True,
        input="\n".join(str(home / f"{i}") for i in range(len(CONFIGS))),
    )
    return dict(zip(CONFIGS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_configuration(answers, name):
    kind, said = answers[name]
    assert kind == "CheckpointError" and "\n" not in said and len(said) < 600
    assert "config.json" in said and CONFIGS[name][1] in said


def test_the_widening_factor_counts(release):
    settings = json.loads((release / "config.json").read_text())
    settings["model"]["widening_factor"] = 8
    (release / "config.json").write_text(json.dumps(settings))
    complaint(release, "moe/linear/w", "(2, 8, 32, 88)", "(2, 8, 32, 176)")


# Folders and options


def test_folders_that_are_no_checkpoint(tmp_path):
    complaint(tmp_path / "absent", "absent", "not a folder")
    (tmp_path / "file").write_text("")
    complaint(tmp_path / "file", "not a folder")
    complaint(tmp_path, tmp_path, "holds no checkpoint", "Grok-1", "Hugging Face")
    config = '{"architectures": ["GemmaForCausalLM"], "hidden_size": 8}'
    (tmp_path / "config.json").write_text(config)
    save_file({"a": SMALL}, tmp_path / "model.safetensors")
    complaint(tmp_path, "GemmaForCausalLM", "other layouts are not supported")


@pytest.mark.parametrize("dtype", ["float16", "int8", "f4", "", ["float32"]])
def test_another_dtype_is_refused(dtype, any_types):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        am.load(dtype=dtype)


def test_stream_is_a_yes_or_a_no(any_types):
    with pytest.raises(TypeError, match="stream must be True or False: 'no'"):
        am.load(stream="no")


def test_a_mesh_with_other_axes_is_refused():
    mesh = jax.make_mesh((2,), ("x",))
    with pytest.raises(ValueError, match="needs axes .'data', 'expert', 'model'"):
        am.load(mesh=mesh)


def test_a_tokenizer_larger_than_the_model(release, recorded):
    """It loads, for ids; a text that needs an id the model lacks is an error."""
    path = release / "tokenizer.model"
    path.write_bytes((FIXTURES / "tokenizer.model").read_bytes())
    model = am.load(release, dtype="float32")
    assert model.tokenizer.vocab_size > model.config.vocab_size
    assert len(model.generate_ids([[1, 2, 3]], max_new_tokens=2)[0]) <= 2
    beyond = model.tokenizer.decode([model.tokenizer.vocab_size - 1])
    with pytest.raises(ValueError, match="model has") as error:
        model.generate(beyond)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_none(release):
    path = release / "tokenizer.model"
    path.write_bytes(b"nonsense")
    complaint(release, path)
    path.unlink()
    assert am.load(release).tokenizer is None


# Weights that are no numbers


NUMBERS = [
    ("language_model/in_out_embed/embeddings", (3, 5), "in_out_embed/embeddings",
     [3, 5]),
    ("transformer/decoder_layer_1/rms_norm_2/scale", (7,),
     "decoder_layer/rms_norm_2/scale", [1, 7]),
    ("transformer/decoder_layer_0/multi_head_attention/query/w", (2, 4),
     "decoder_layer/multi_head_attention/query/w", [0, 2, 4]),
]


@pytest.mark.parametrize("name, at, ours, where", NUMBERS, ids=[n[2] for n in NUMBERS])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_a_weight_that_is_no_number(
    recorded, tmp_path, name, at, ours, where, value, mesh
):
    tensors = tensors_of(recorded)
    tensors[name] = tensors[name].copy()
    tensors[name][at] = value
    config = json.loads(str(recorded["config"]))
    folder = write_release(tmp_path / "nan", tensors, config)
    options = {"mesh": am.make_mesh(*mesh)} if mesh else {}
    complaint(folder, folder, f"{ours} holds {float(value)} at {where}", **options)


def test_a_scale_that_is_no_number(recorded, tmp_path):
    tensors = tensors_of(recorded)
    w = tensors[EXPERT]
    scales = w.scales.copy()
    scales[3, 0, 6] = np.nan
    tensors[EXPERT] = QuantizedWeight8bit(w.weight, scales)
    folder = write_release(
        tmp_path / "nan", tensors, json.loads(str(recorded["config"])))
    complaint(folder, "decoder_layer/moe/linear_1/w", "nan at [1, 3, 0, 6]")


RESIDENT = """
import resource, sys
import jax
import annotated_moe as am
from annotated_moe import checkpoints
if sys.argv[2] == "unchecked":
    checkpoints.first_not_finite = lambda block: None
am.load(sys.argv[1], dtype="float32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_looking_for_nan_takes_no_memory(tmp_path):
    """120 MB of weights: not one copy more than without looking."""
    config = grok_config(
        vocab_size=64, context=16, d_model=512, d_ff=2048, num_layers=2, q_heads=4,
        kv_heads=2, head_size=8, num_experts=4)
    params = {}
    for (module, leaf), spec in flat_specs(config).items():
        w = np.full(spec.shape, 0.5, np.float32)
        params.setdefault(module, {})[leaf] = w
    am.save(am.Model(config, params), tmp_path / "large")
    peaks = []
    for how in ("unchecked", "checked"):
        words = [sys.executable, "-c", RESIDENT, str(tmp_path / "large"), how]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 12, peaks


# Our own layout


@pytest.fixture
def saved(tiny, tmp_path):
    am.save(tiny, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("kind", ["quantized", "float", "sharded"])
def test_there_and_back(tiny, tmp_path, kind):
    model = tiny
    if kind == "float":
        model = am.Model(TINY, random_params(quantized=False))
    am.save(model, tmp_path / "new" / "ours")
    mesh = am.make_mesh(2, 4) if kind == "sharded" else None
    loaded = am.load(tmp_path / "new" / "ours", mesh=mesh, dtype="float32")
    assert loaded.config == replace(TINY, dtype="float32")
    if kind == "sharded":
        am.save(loaded, tmp_path / "again")
        loaded = am.load(tmp_path / "again", dtype="float32")
    assert_same_params(loaded.params, model.params)
    half = am.load(tmp_path / "new" / "ours")
    assert half.config.dtype == "bfloat16"
    assert half.params["in_out_embed"]["embeddings"].dtype == jnp.float32
    assert half.params["decoder_layer/router"]["w"].dtype == jnp.float32


def test_the_tokenizer_is_saved(tmp_path):
    model = am.load()
    am.save(model, tmp_path / "copy")
    again = am.load(tmp_path / "copy")
    words = "In the beginning"
    assert again.tokenizer.encode(words) == model.tokenizer.encode(words)
    bare = am.Model(model.config, model.params)
    am.save(bare, tmp_path / "copy")
    assert am.load(tmp_path / "copy").tokenizer is None


def test_everyone_may_read_what_was_saved(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        am.save(tiny, tmp_path / "ours")
    finally:
        os.umask(before)
    for path in [tmp_path / "ours", *(tmp_path / "ours").iterdir()]:
        want = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == want


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_save_changes_nothing(tiny, saved, monkeypatch):
    (saved / "notes.txt").write_text("mine")
    before = snapshot(saved.parent)

    append = writing.append_bytes

    def full(path, data):
        """A disk with room for the header and no more."""
        if path.stat().st_size:
            monkeypatch.setattr("builtins.open", lambda *_, **__: full_disk())
        append(path, data)

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in (saved, saved.parent / "other"):
        monkeypatch.setattr(writing, "append_bytes", full)
        with pytest.raises(CheckpointError, match="No space") as error:
            am.save(tiny, target)
        monkeypatch.undo()
        one_sentence(error, "model.safetensors cannot be written", "make room")
    assert snapshot(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["ours"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failed_exchange_brings_the_old_back(tiny, saved, monkeypatch, failure):
    before = snapshot(saved.parent)
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise failure("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(failure):
        am.save(tiny, saved)
    assert snapshot(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["ours"]


def test_saving_again_replaces_only_what_is_ours(tiny, saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "tokenizer.model").write_bytes(b"old")
    am.save(tiny, saved)
    names = sorted(path.name for path in saved.iterdir())
    ours = ["checksums.json", "config.json", "model.safetensors"]
    assert names == [*ours, "notes.txt"]
    assert [path.name for path in saved.parent.iterdir()] == ["ours"]


def test_saving_elsewhere_is_refused(tiny, release, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"format": "pt"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    before = snapshot(tmp_path)
    for name in ("file", "foreign", "broken", "release"):
        with pytest.raises(CheckpointError) as error:
            am.save(tiny, tmp_path / name)
        one_sentence(error, tmp_path / name)
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    am.save(tiny, tmp_path / "empty")
    assert am.load(tmp_path / "empty").config.num_layers == 12


FIRST = "decoder_layer/moe/linear/w"
ARRAYS = {
    "missing": ("router/w", lambda a: a.pop("decoder_layer/router/w")),
    "scales missing": (FIRST, lambda a: a.pop(f"{FIRST}.scales")),
    "extra": ("surplus", lambda a: a.update(surplus=SMALL)),
    "both kinds": (
        f"{FIRST}.",
        lambda a: a.update({FIRST: np.zeros((12, 4, 16, 24), "f4")}),
    ),
    "another shape": ("rms_norm/scale", lambda a: a.update({"rms_norm/scale": SMALL})),
    "another dtype": (
        "rms_norm/scale", lambda a: a.update({"rms_norm/scale": np.zeros(16)})
    ),
    "scales in float32": (
        FIRST,
        lambda a: a.update({f"{FIRST}.scales": np.ones((12, 4, 1, 24), "f4")}),
    ),
}


@pytest.mark.parametrize("name, change", ARRAYS.values(), ids=ARRAYS)
def test_wrong_arrays_in_our_layout(saved, name, change):
    path = saved / "model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    complaint(saved, saved, name)


def test_a_damaged_safetensors_file(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    for broken in (
        b"", data[:4], data[:100], data[:-1], data + b"\0", b"\xff" * 8 + data[8:],
        data[:8] + b"x" * header + data[8 + header :],
        data.replace(b'"F32"', b'"F33"', 1), data.replace(b'"I8"', b'"U8"', 1),
    ):
        path.write_bytes(broken)
        complaint(saved, path)
    path.unlink()
    complaint(saved, path)


def set_in(settings, path, value):
    *above, last = path
    for key in above:
        settings = settings[key]
    settings[last] = value


LAYER = ("layers", 0, "pattern", 0)


@pytest.mark.parametrize("path, value, word", [
    ((*LAYER, "feed_forward", "router"), "softmax", "router must be text one of"),
    (("layers", 0, "repeats"), 0, "repeats must be an int of 1 or more"),
    (("layers", 0, "repeats"), 11, "(11, "),
    (("layers", 0, "repeats"), 10**9, "(1000000000, "),
    ((*LAYER, "feed_forward", "top_k"), 5, "top_k"),
    (("dtype",), "float64", "dtype must be text one of float32, bfloat16"),
    (("vocab_size",), 2**30, "expects (1073741824"),
    (("vocab_size",), 10**30, "vocab_size must be an int of 1 or more, in 32 bits"),
    (("vocab_size",), "40", "vocab_size must be an int"),
    (("num_layers",), 12, "ModelConfig has no field 'num_layers'"),
    ((*LAYER, "attention", "spec"), "Shell", "spec is 'Shell', which is not known"),
    ((*LAYER, "attention"), 5, "attention must be AttentionSpec"),
    (("layers",), [], "at least one layer"),
    (("format",), "annotated-moe-1", "written by another version"),
    (("spec",), "Rope", "Rope has no field"),
    (("norm_eps",), float("nan"), "norm_eps must be a number above 0"),
])  # fmt: skip
def test_a_wrong_configuration_of_ours(saved, path, value, word):
    file = saved / "config.json"
    settings = json.loads(file.read_text())
    set_in(settings, path, value)
    file.write_text(json.dumps(settings))
    complaint(saved, saved, word)


def test_our_configuration_nested_too_deep(saved):
    text = '{"format": "annotated-moe-2", "layers": ' + "[" * 10**5 + "]" * 10**5 + "}"
    (saved / "config.json").write_text(text)
    complaint(saved, saved / "config.json")


def test_quantize_params_like_the_release():
    floating, groups = random_params(quantized=False), 4
    params = checkpoints.quantize_params(
        jax.tree.map(jnp.asarray, floating), TINY, groups)
    seen = {}
    for module, leaves in params.items():
        for name, w in leaves.items():
            if isinstance(w, am.QuantizedTensor):
                seen[module.removeprefix("decoder_layer/")] = w.scales.shape[-2]
            else:
                assert name in ("scale", "embeddings") or module.endswith("router")
    attention = "multi_head_attention"
    assert seen == {
        **{f"{attention}/{name}": 1 for name in ("query", "key", "value")},
        f"{attention}/linear": groups,
        "moe/linear": 1, "moe/linear_v": 1, "moe/linear_1": groups,
    }


@pytest.mark.parametrize("there", ["absolute", "relative", "nothing"])
def test_a_link_is_not_written_over(tmp_path, there):
    model = am.load(dtype="float32")
    am.save(model, tmp_path / "real")
    (tmp_path / "real" / "notes.txt").write_text("mine")
    leads = {"absolute": tmp_path / "real", "relative": "real", "nothing": "none"}
    (tmp_path / "link").symlink_to(leads[there])
    with pytest.raises(CheckpointError, match="link is a symbolic link"):
        am.save(model, tmp_path / "link")
    assert (tmp_path / "real" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_an_empty_path():
    for call in (am.load, checkpoints.open_checkpoint):
        with pytest.raises(CheckpointError, match="path of a checkpoint is empty"):
            call("")
