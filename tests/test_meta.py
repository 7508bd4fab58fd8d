"""Meta's .pth files: read without running them, pieces joined lazily."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints as ck
from annotated_moe.attention import Chunk
from annotated_moe.convert import convert
from annotated_moe.families import llama4
from annotated_moe.families.images import ImageSettings
from annotated_moe.families.vision import image_settings
from annotated_moe.formats import lazy, meta, pth
from annotated_moe.formats.files import CheckpointError
from annotated_moe.formats.hub import Fields
from annotated_moe.formats.pth import open_pth, pth_bytes, pth_program
from annotated_moe.formats.safetensors import open_folder
from annotated_moe.moe import FeedForwardSpec, SharedMoESpec
from annotated_moe.rope import Llama3Rope, Rope

ARRAYS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c.weight": np.arange(8).astype(ml_dtypes.bfloat16),
    "d.weight": np.arange(-3, 4, dtype=np.int8),
}


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], method=zipfile.ZIP_STORED, comment=b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = comment
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_program(program: bytes, arrays=ARRAYS) -> bytes:
    return zipped({**members(pth_bytes(arrays)), "x/data.pkl": program})


def opened(tmp_path, data: bytes):
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(data)
    return open_pth(path)


def refused(tmp_path, data: bytes, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, data)
    text = str(caught.value)
    assert "consolidated.00.pth" in text and "\n" not in text, text
    for word in words:
        assert word in text, text


def test_arrays_come_back_as_views(tmp_path):
    got = opened(tmp_path, pth_bytes(ARRAYS))
    assert list(got) == list(ARRAYS)
    for name, want in ARRAYS.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want)
        assert not got[name].flags.owndata and not got[name].flags.writeable


def test_storage_at_odd_bytes(tmp_path):
    """A zip puts a member wherever the names before it end."""
    for size in range(1, 9):
        got = opened(tmp_path, pth_bytes(ARRAYS, "r" * size))
        np.testing.assert_array_equal(got["a.weight"], ARRAYS["a.weight"])


def strided(shape, strides, offset=0, numel=24):
    """A program whose only tensor looks at storage 0 in its own way."""
    w = np.zeros(numel, np.float32)
    old = pth.long_op(0) + pth.tuple_op((numel,)) + pth.tuple_op((1,))
    program = pth.tensor_program("0", w)
    assert old in program
    new = pth.long_op(offset) + pth.tuple_op(shape) + pth.tuple_op(strides)
    return b"\x80\x02}(" + pth.unicode_op("w") + program.replace(old, new) + b"u."


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((6, 4), (1, 6), 0), ((2, 3), (6, 2), 7), ((4,), (6,), 5), ((), (), 23),
     ((0, 3), (3, 1), 24)],
)  # fmt: skip
def test_strided_views(tmp_path, shape, strides, offset):
    got = opened(tmp_path, with_program(strided(shape, strides, offset)))["w"]
    flat = np.arange(24, dtype=np.float32)[offset:]
    want = np.lib.stride_tricks.as_strided(flat, shape, [4 * s for s in strides])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((6, 4), (1, 6), 1), ((25,), (1,), 0), ((3, 9), (0, 1), 0), ((2,), (24,), 0),
     ((1,), (1,), 24), ((-1,), (1,), 3), ((2,), (-1,), 3), ((2,), (1,), -1),
     ((2, 2), (1,), 0), ((2**62,), (1,), 0), ((1,) * 9, (1,) * 9, 0)],
)  # fmt: skip
def test_views_beyond_the_storage(tmp_path, shape, strides, offset):
    refused(tmp_path, with_program(strided(shape, strides, offset)), "'w', which has")


def test_other_spellings_of_the_pickle(tmp_path):
    """OrderedDict with attributes, Parameter, protocol 4, memo, extras."""
    w = pth.tensor_program("0", ARRAYS["a.weight"])
    ordered = pth.global_op(pth.ORDERED) + b")R"
    attributes = b"}" + pth.unicode_op("_metadata") + ordered + b"sb"
    start = b"\x80\x02" + ordered + b"q\x00("
    program = start + pth.unicode_op("w") + w + b"u" + attributes
    got = opened(tmp_path, with_program(program + b"."))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    parameter = pth.global_op(pth.PARAMETER) + b"(" + w + b"\x88" + ordered + b"tR"
    program = b"\x80\x02}" + pth.unicode_op("w") + parameter + b"s."
    got = opened(tmp_path, with_program(program))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    module, name = pth.TENSOR.rsplit(".", 1)
    short = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    newer = w.replace(pth.global_op(pth.TENSOR), short + b"\x93")
    assert newer != w
    program = b"\x80\x04}\x94(" + pth.unicode_op("w") + newer + b"\x94u."
    got = opened(tmp_path, with_program(program))
    np.testing.assert_array_equal(got["w"], ARRAYS["a.weight"])

    extra = pickle.dumps(io.BytesIO(b"state \xff"), protocol=2)[2:-1]
    start = b"\x80\x02}" + b"(" + pth.unicode_op("wo._extra_state") + extra
    got = opened(tmp_path, with_program(start + pth.unicode_op("w") + w + b"u."))
    assert list(got) == ["w"]


def test_nothing_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for protocol in (2, 4):
        program = pickle.dumps({"w": Evil()}, protocol)
        refused(tmp_path, with_program(program), "mkdir", "nothing was run")
    assert not (tmp_path / "ran").exists()


def test_refused_files(tmp_path, monkeypatch):
    good = pth_bytes(ARRAYS)
    parts = members(good)
    legacy = pth.LEGACY + b"\x80\x02}."
    refused(tmp_path, legacy, "before 1.6", "torch.save it again")
    refused(tmp_path, b"\x80\x02}.", "no zip file")
    refused(tmp_path, b"", "consolidated.00.pth")
    refused(tmp_path, good[:-30], "zip directory")
    refused(tmp_path, zipped(parts, zipfile.ZIP_DEFLATED), "compressed")
    refused(tmp_path, zipped({**parts, "x/byteorder": b"big"}), "little-endian")
    refused(tmp_path, zipped({**parts, "y/data.pkl": b"}."}), "2 files data.pkl")
    refused(tmp_path, zipped({"x/version": b"3"}), "0 files data.pkl")
    lacking = {n: d for n, d in parts.items() if n != "x/data/2"}
    refused(tmp_path, zipped(lacking), "c.weight", "lacks the storage '2'")
    short = {**parts, "x/data/0": parts["x/data/0"][:-4]}
    refused(tmp_path, zipped(short), "a.weight", "92 bytes")
    renamed = good.replace(b"x/data/1", b"x/data/0")
    refused(tmp_path, renamed, "'x/data/0' twice")
    code = pth.global_op("torch.FloatStorage")
    double = pth_program(ARRAYS).replace(code, pth.global_op("torch.DoubleStorage"))
    refused(tmp_path, with_program(double), "torch.DoubleStorage")
    refused(tmp_path, with_program(b"\x80\x02)."), "no dict of tensors")
    empty = b"\x80\x02}" + pth.unicode_op("w") + b")s."
    refused(tmp_path, with_program(empty), "'w', which is no")
    refused(tmp_path, with_program(b"\x80\x02}r\x00\x00\x00\x7f."), "memo")
    refused(tmp_path, with_program(b"\x80\x02" + b"}0" * 10), "POP")
    monkeypatch.setattr(pth, "MAX_TORCH_INSTRUCTIONS", 200)
    refused(tmp_path, with_program(b"\x80\x02" + b"}" * 300), "200 pickle")


def test_directory_that_lies(tmp_path):
    """The central directory's offsets and flags are checked."""
    good = pth_bytes(ARRAYS)
    at = good.index(b"PK\x01\x02")
    encrypted = good[: at + 8] + b"\x01" + good[at + 9 :]
    refused(tmp_path, encrypted, "encrypted")
    far = good[: at + 42] + struct.pack("<I", len(good) - 8) + good[at + 46 :]
    refused(tmp_path, far)
    sizes = struct.pack("<II", 10**6, 10**6)
    long = good[: at + 20] + sizes + good[at + 28 :]
    refused(tmp_path, long, "x/data.pkl")


def test_zip64(tmp_path):
    """Sizes in the 64-bit extra field, as files over 4 GiB have them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members(pth_bytes(ARRAYS)).items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    got = opened(tmp_path, file.getvalue())
    np.testing.assert_array_equal(got["a.weight"], ARRAYS["a.weight"])


# A tiny Llama 3 and a tiny Llama 4, and how Meta cuts them into files.
LLAMA3 = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 24,
    "multiple_of": 8, "ffn_dim_multiplier": 0.6, "norm_eps": 1e-5,
    "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip
LLAMA4_PARAMS = {
    **LLAMA3, "ffn_exp": 1.0, "rope_scaling_factor": 16, "rope_high_freq_factor": 1,
    "nope_layer_interval": 2, "use_qk_norm": True, "attention_chunk_size": 4,
    "attn_temperature_tuning": True, "floor_scale": 4.0, "attn_scale": 0.1,
    "moe_args": {"num_experts": 2, "capacity_factor": 1.0, "auto_scale_F": False,
                 "top_k": 1, "interleave_moe_layer_step": 2},
}  # fmt: skip
D, H, F, V, MOE_F = 32, 8, 56, 24, 16


def random_weights(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {n: (rng.normal(size=s) / 4).astype(dtype) for n, s in shapes.items()}


def attention_shapes(i):
    at = f"layers.{i}.attention"
    square = {f"{at}.{w}.weight": (D, D) for w in ("wq", "wk", "wv", "wo")}
    return {**square, f"layers.{i}.attention_norm.weight": (D,),
            f"layers.{i}.ffn_norm.weight": (D,)}  # fmt: skip


def llama3_weights(dtype=np.float32):
    shapes = {"tok_embeddings.weight": (V, D), "output.weight": (V, D)}
    shapes["norm.weight"] = (D,)
    for i in range(2):
        ff = f"layers.{i}.feed_forward"
        shapes |= attention_shapes(i)
        shapes |= {f"{ff}.w1.weight": (F, D), f"{ff}.w3.weight": (F, D)}
        shapes[f"{ff}.w2.weight"] = (D, F)
    return random_weights(shapes, dtype)


def llama4_weights():
    """Layer 0 dense, layer 1 with two experts, in the names of the code."""
    full = llama3_weights()
    ff = "layers.1.feed_forward"
    for w in ("w1", "w2", "w3"):
        del full[f"{ff}.{w}.weight"]
    shapes = {f"{ff}.router_DE": (D, 2), f"{ff}.experts.w2": (2, MOE_F, D)}
    for w in ("w1", "w3"):
        shapes[f"{ff}.experts.{w}"] = (2, D, MOE_F)
        shapes[f"{ff}.shared_expert.{w}.weight"] = (MOE_F, D)
    shapes[f"{ff}.shared_expert.w2.weight"] = (D, MOE_F)
    return {**full, **random_weights(shapes)}


AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1,
        "output": 0, "tok_embeddings": 0}  # fmt: skip


def axis_of(name):
    if ".experts." in name:
        return 1 if name.endswith("w2") else 2
    return AXES.get(name.removesuffix(".weight").rsplit(".", 1)[-1])


def pieces_of(full, files, table_axis=0):
    """What each file holds; norms and routers are in all of them."""
    ranks = [{} for _ in range(files)]
    for name, w in full.items():
        axis = table_axis if name.startswith("tok") else axis_of(name)
        parts = [w] * files if axis is None else np.split(w, files, axis)
        for rank, part in zip(ranks, parts):
            rank[name] = part
    return ranks


def fused(rank):
    """One file's tensors under the names that Llama 4's release uses."""
    out = {}
    for name, w in rank.items():
        i, _, rest = name.removeprefix("layers.").partition(".")
        layer, ff = f"layers.{i}", f"layers.{i}.feed_forward"
        sparse = f"{ff}.router_DE" in rank
        new = {
            "attention_norm.weight": f"{layer}.attention.wqkv.layer_norm_weight",
            "ffn_norm.weight": f"{ff}.norm.weight" if sparse
            else f"{ff}.mlp.layer_norm_weight",
            "feed_forward.w2.weight": f"{ff}.mlp.fc2_weight",
            "feed_forward.experts.w1": f"{ff}.experts.moe_w_in_eD_F",
            "feed_forward.experts.w2": f"{ff}.experts.moe_w_out_eF_D",
            "feed_forward.experts.w3": f"{ff}.experts.moe_w_swiglu_eD_F",
            "feed_forward.shared_expert.w1.weight": f"{ff}.w_in_shared_FD.weight",
            "feed_forward.shared_expert.w2.weight": f"{ff}.w_out_shared_DF.weight",
            "feed_forward.shared_expert.w3.weight": f"{ff}.w_swiglu_FD.weight",
        }.get(rest, name)  # fmt: skip
        if rest in ("attention.wk.weight", "attention.wv.weight"):
            continue
        if rest == "feed_forward.w3.weight":
            continue
        if rest == "attention.wq.weight":
            new = f"{layer}.attention.wqkv.weight"
            w = np.concatenate(
                [rank[f"{layer}.attention.{n}.weight"] for n in ("wq", "wk", "wv")]
            )
        if rest == "feed_forward.w1.weight":
            new = f"{ff}.mlp.fc1_weight"
            w = np.concatenate([w, rank[f"{ff}.w3.weight"]])
        out[new] = w.reshape(-1, w.shape[-1]) if ".experts." in rest else w
    return out


def write_folder(folder, ranks, params):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, rank in enumerate(ranks):
        rank = {n: np.ascontiguousarray(w) for n, w in rank.items()}
        rank["rope.freqs"] = np.full(4, i, np.float32)      # ignored
        (folder / f"consolidated.{i:02d}.pth").write_bytes(pth_bytes(rank))
    return folder


def read(folder):
    return ck.open_checkpoint(folder).read()


def part(tensors, path):
    module, name = path.rsplit("/", 1)
    return tensors[module, name]


def same(a, b):
    assert list(a) == list(b)
    for path in a:
        x, y = np.asarray(a[path][:]), np.asarray(b[path][:])
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_llama3_files_join_to_the_same_bits(tmp_path, dtype):
    full = llama3_weights(dtype)
    one = read(write_folder(tmp_path / "1", pieces_of(full, 1), LLAMA3))
    for files in (2, 4):
        for axis in (0, 1):
            folder = tmp_path / f"{files}{axis}"
            same(one, read(write_folder(folder, pieces_of(full, files, axis), LLAMA3)))
    w1 = part(one, "decoder_layer/linear/w")
    np.testing.assert_array_equal(w1[1][:], full["layers.1.feed_forward.w1.weight"].T)
    query = full["layers.1.attention.wq.weight"].reshape(4, H // 2, 2, D)
    want = query.swapaxes(1, 2).reshape(D, D).T
    path = "decoder_layer/multi_head_attention/query/w"
    np.testing.assert_array_equal(part(one, path)[1][:], want)
    value = part(one, "decoder_layer/multi_head_attention/value/w")
    np.testing.assert_array_equal(
        value[0][:], full["layers.0.attention.wv.weight"].T
    )


def test_llama4_names_and_files_join_to_the_same_bits(tmp_path):
    full = llama4_weights()
    one = read(write_folder(tmp_path / "1", pieces_of(full, 1), LLAMA4_PARAMS))
    for files in (1, 2, 4):
        ranks = [fused(rank) for rank in pieces_of(full, files)]
        folder = write_folder(tmp_path / f"f{files}", ranks, LLAMA4_PARAMS)
        same(one, read(folder))
    up = part(one, "decoder_layer_1/moe/linear_v/w")
    assert up.shape == (1, 2, D, MOE_F)
    np.testing.assert_array_equal(
        up[0][1][:], full["layers.1.feed_forward.experts.w3"][1]
    )
    assert part(one, "decoder_layer/linear/w").shape == (1, D, F)


def llama_logits(full, ids, params):
    """Llama 3 in plain NumPy, complex RoPE and all."""
    heads, eps = params["n_heads"], params["norm_eps"]

    def norm(x, g):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * g

    rates = params["rope_theta"] ** (-np.arange(0, H, 2) / H)
    waves = 2 * np.pi / rates
    blend = (8192 / waves - 1) / 3
    between = (1 - blend) * rates / 8 + blend * rates
    rates = np.where(waves > 8192, rates / 8, np.where(waves < 2048, rates, between))
    turn = np.exp(1j * np.outer(np.arange(len(ids)), rates))[:, None]

    def turned(x):
        x = x.reshape(len(ids), heads, H // 2, 2)
        z = (x[..., 0] + 1j * x[..., 1]) * turn
        return np.stack([z.real, z.imag], -1).reshape(len(ids), heads, H)

    h = full["tok_embeddings.weight"][ids].astype(np.float64)
    for i in range(params["n_layers"]):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in full.items()}
        x = norm(h, w["attention_norm.weight"])
        q = turned(x @ w["attention.wq.weight"].T)
        k = turned(x @ w["attention.wk.weight"].T)
        v = (x @ w["attention.wv.weight"].T).reshape(len(ids), heads, H)
        s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(H)
        s = np.where(np.tri(len(ids), dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        y = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
        h = h + y.reshape(len(ids), D) @ w["attention.wo.weight"].T
        x = norm(h, w["ffn_norm.weight"])
        gate = x @ w["feed_forward.w1.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (x @ w["feed_forward.w3.weight"].T)
        h = h + hidden @ w["feed_forward.w2.weight"].T
    return norm(h, full["norm.weight"]) @ full["output.weight"].T


def test_logits_of_a_loaded_llama(tmp_path):
    """Two files and their params.json, against the model in NumPy."""
    full = llama3_weights()
    folder = write_folder(tmp_path / "m", pieces_of(full, 2), LLAMA3)
    model = am.load(folder, dtype="float32")
    ids = np.random.default_rng(1).integers(0, V, 12)
    want = llama_logits(full, ids, LLAMA3)
    got = np.asarray(model.logits(ids[None].astype(np.int32)))[0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("to", ["native", "hf"])
def test_converted(tmp_path, to):
    """Into both layouts, whose logits are the same."""
    for name, full, params in [
        ("3", pieces_of(llama3_weights(), 2), LLAMA3),
        ("4", [fused(rank) for rank in pieces_of(llama4_weights(), 2)], LLAMA4_PARAMS),
    ]:
        folder = write_folder(tmp_path / name, full, params)
        (folder / "checklist.chk").write_text("of Meta's files only")
        (folder / "README").write_text("copied")
        convert(folder, tmp_path / f"{name} {to}", to)
        names = {path.name for path in (tmp_path / f"{name} {to}").iterdir()}
        assert names == {"checksums.json", "config.json", "model.safetensors", "README"}
        opened = ck.open_checkpoint(tmp_path / f"{name} {to}")
        same(read(folder), opened.read())
        original = ck.open_checkpoint(folder)
        assert original.layout.name == "Meta"
        dtype = "float32" if to == "hf" else original.config.dtype   # of the weights
        assert opened.config == replace(original.config, dtype=dtype)
        assert ck.verify(tmp_path / f"{name} {to}")


class Watched:
    """An array that notes which rows of it were asked for."""

    def __init__(self, w, seen):
        self.w, self.seen, self.shape, self.dtype = w, seen, w.shape, w.dtype

    def __getitem__(self, index):
        self.seen.append((id(self.w), self.w[index].size))
        return self.w[index]


def test_assembled_is_an_array():
    whole = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    full = slice(None)
    tries = [
        (full,), (2, 3, 4), (full, slice(1, 5)), (full, full, slice(4, 1)),
        (slice(1, 4, 2), slice(0, 6, 3), slice(None, None, 4)), (-1, slice(-3, None)),
        (full, 0), (1, full, 2), (slice(0, 0),), (),
    ]  # fmt: skip
    for axis in range(3):
        cuts = [1, 3, 4] if axis < 2 else [1, 3]
        w = lazy.ShardedArray(np.split(whole, cuts, axis), axis)
        assert w.shape == whole.shape and len(w) == 4 and w.nbytes == whole.nbytes
        for index in tries:
            np.testing.assert_array_equal(w[index], whole[index])
        np.testing.assert_array_equal(np.asarray(w), whole)
        for i in range(4):
            np.testing.assert_array_equal(np.asarray(w[i].T), whole[i].T)
            np.testing.assert_array_equal(w[i].T[1:3, ::2], whole[i].T[1:3, ::2])
        for i in (0, 3, -1):
            assert axis == 0 or isinstance(w[i], lazy.ShardedArray)
            np.testing.assert_array_equal(np.asarray(w[i]), whole[i])
        blocks = [np.asarray(block) for block in lazy.iter_blocks(w)]
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
        with pytest.raises(IndexError):
            w[0, 9]
        with pytest.raises(IndexError):
            w[full, ::-1]


def test_assembled_reads_what_is_asked():
    seen = []
    parts = [Watched(np.ones((4, 8)), seen) for _ in range(4)]
    w = lazy.ShardedArray(parts, 0)
    assert w[4:8, 2:4].shape == (4, 2) and seen == [(id(parts[1].w), 8)]
    seen.clear()
    assert w[7:9].shape == (2, 8)
    assert seen == [(id(parts[1].w), 8), (id(parts[2].w), 8)]


def test_large_assembled_tensors_are_written_in_blocks(monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 64)
    whole = np.arange(3 * 5 * 8, dtype=np.float32).reshape(3, 5, 8)
    w = lazy.ShardedArray(np.split(whole, 2, 2), 2)
    blocks = list(lazy.iter_blocks(w))
    assert max(block.nbytes for block in blocks) <= 64
    assert b"".join(lazy.as_bytes(b) for b in blocks) == whole.tobytes()


def complains_of(work, *words):
    with pytest.raises(CheckpointError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text


def complains(folder, *words):
    complains_of(lambda: read(folder), str(folder), *words)


def test_folders_that_are_refused(tmp_path):
    full, numbers = llama3_weights(), iter(range(100))

    def folder(change=lambda ranks: None, params=LLAMA3, files=2):
        ranks = pieces_of(full, files)
        change(ranks)
        return write_folder(tmp_path / str(next(numbers)), ranks, params)

    wo, w1 = "layers.1.attention.wo.weight", "layers.0.feed_forward.w1.weight"

    def drop(ranks):
        for rank in ranks:
            del rank[wo]

    def drop_one(ranks):
        del ranks[1][wo]

    def add(ranks):
        for rank in ranks:
            rank["layers.2.attention.wo.weight"] = rank[wo]

    def shorten(ranks):
        for rank in ranks:
            rank[w1] = rank[w1][:-1]

    def shorten_one(ranks):
        ranks[1][w1] = ranks[1][w1][:-1]

    def other_norm(ranks):
        ranks[1]["norm.weight"] = ranks[1]["norm.weight"] + 1

    def quantize(ranks):
        for rank in ranks:
            rank[w1] = rank[w1].astype(np.int8)

    complains(folder(drop), f"lacks {wo}")
    complains(folder(drop_one), "consolidated.01.pth lacks", wo)
    complains(folder(add), "layers.2.attention.wo.weight", "no place")
    complains(folder(shorten), w1, "expects (32, 56)")
    complains(folder(shorten_one), "consolidated.01.pth", w1, "(27, 32)")
    complains(folder(other_norm), "norm.weight is not the same in all files")
    complains(folder(quantize), "decoder_layer/linear/w are not alike", "int8")
    gap = folder(files=4)
    (gap / "consolidated.01.pth").unlink()
    complains(gap, "lacks consolidated.01.pth")
    few = {**LLAMA3, "n_kv_heads": 2}
    complains(folder(params=few, files=4), "4 files", "kv_heads = 2")
    wide = {**LLAMA3, "multiple_of": 128}
    complains(folder(params=wide), w1, "expects (32, 128)")
    for bad, words in [
        ({"head_colour": 1}, "'head_colour'"), ({"dim": "32"}, "dim must be an int"),
        ({"n_layers": 0}, "n_layers must be"), ({"norm_eps": float("nan")}, "norm_eps"),
        ({"use_scaled_rope": 1}, "true or false"), ({"n_heads": 5}, "dim / n_heads"),
        ({"head_dim": 4}, "head_dim is 4"), ({"moe_args": 3}, "moe_args"),
        ({"moe_args": {"num_experts": 2}}, "lacks the field 'ffn_exp'"),
        ({"moe_args": {"num_experts": 2, "depth": 2}, "ffn_exp": 1}, "'depth'"),
        ({"n_kv_heads": 3}, "key heads"), ({"vocab_size": 2}, "eos_ids"),
        ({"quantization_args": {"scheme": "int4"}}, "'quantization_args'"),
    ]:  # fmt: skip
        complains(folder(params={**LLAMA3, **bad}), words)
    for name in ("dim", "n_heads", "n_layers"):
        lacks = {n: v for n, v in LLAMA3.items() if n != name}
        complains(folder(params=lacks), f"lacks the field {name!r}")


def test_fused_tensors_that_do_not_fit(tmp_path):
    full, ff = llama4_weights(), "layers.1.feed_forward.experts.moe_w_in_eD_F"
    ranks = [fused(rank) for rank in pieces_of(full, 2)]
    for rank in ranks:
        rank[ff] = rank[ff][:-1]
    folder = write_folder(tmp_path / "a", ranks, LLAMA4_PARAMS)
    complains(folder, ff, "2 experts", "not divide")
    ranks = [fused(rank) for rank in pieces_of(full, 2)]
    wqkv = "layers.0.attention.wqkv.weight"
    for rank in ranks:
        rank[wqkv] = rank[wqkv][:-1]
    folder = write_folder(tmp_path / "b", ranks, LLAMA4_PARAMS)
    complains(folder, wqkv, "no whole heads")


@pytest.mark.parametrize("axis", [0, 1])
def test_vocabulary_from_the_embedding(tmp_path, axis):
    params = {**LLAMA3, "vocab_size": -1}
    del params["rope_theta"], params["use_scaled_rope"]
    ranks = pieces_of(llama3_weights(), 2, axis)
    config = meta.meta_config(write_folder(tmp_path / "m", ranks, params))
    assert config.vocab_size == V
    assert config.layer(0).attention.rope == Rope(10000.0)


# As Meta's params.json say it, against the widths of the published tensors.
PUBLISHED = [
    ("Llama 2 7B", 4096, {}, 11008),
    ("Llama 2 70B", 8192, {"ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 28672),
    ("Llama 3 8B", 4096, {"ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 14336),
    ("Llama 3 70B", 8192, {"ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 28672),
    ("Llama 3.1 405B", 16384, {"ffn_dim_multiplier": 1.2, "multiple_of": 4096}, 53248),
    ("Llama 3.2 1B", 2048, {"ffn_dim_multiplier": 1.5, "multiple_of": 256}, 8192),
]  # fmt: skip


@pytest.mark.parametrize("name, dim, fields, width", PUBLISHED)
def test_published_widths(name, dim, fields, width):
    assert meta.dense_width(Fields(Path("p"), {"dim": dim, **fields})) == width


OLD = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": 32000}
CODE = {"multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
        "rope_theta": 1e6, "vocab_size": 32016}  # fmt: skip
NEW = {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128256}
SCALED = NEW | {"use_scaled_rope": True}
PARAMS = {
    "llama-1-7b": OLD | {"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6},
    "llama-1-13b": OLD | {"dim": 5120, "n_layers": 40, "n_heads": 40, "norm_eps": 1e-6},
    "llama-1-33b": OLD | {"dim": 6656, "n_layers": 60, "n_heads": 52, "norm_eps": 1e-6},
    "llama-1-65b": OLD | {"dim": 8192, "n_layers": 80, "n_heads": 64},
    "llama-2-7b": OLD | {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "llama-2-13b": OLD | {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "llama-2-70b": OLD | {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8,
                          "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    "code-llama-7b": CODE | {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "code-llama-13b": CODE | {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "code-llama-34b": CODE | {"dim": 8192, "n_layers": 48, "n_heads": 64,
                              "n_kv_heads": 8, "vocab_size": 32000},
    "llama-3-8b": NEW | {"dim": 4096, "n_layers": 32, "n_heads": 32,
                         "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    "llama-3.1-70b": SCALED | {"dim": 8192, "n_layers": 80, "n_heads": 64,
                               "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    "llama-3.1-405b": SCALED | {"dim": 16384, "n_layers": 126, "n_heads": 128,
                                "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
    "llama-3.2-1b": SCALED | {"dim": 2048, "n_layers": 16, "n_heads": 32,
                              "multiple_of": 256, "ffn_dim_multiplier": 1.5},
    "llama-3.2-3b": SCALED | {"dim": 3072, "n_layers": 28, "n_heads": 24,
                              "multiple_of": 256, "ffn_dim_multiplier": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_published_files_are_the_presets(tmp_path, name):
    """Contexts, Llama 3.2's factor and tied head are in no file."""
    (tmp_path / "params.json").write_text(json.dumps(PARAMS[name]))
    assert meta.meta_config(tmp_path) == am.PRESETS[name]


@pytest.mark.parametrize("change, context, rope", [
    ({"norm_eps": 1e-6}, 2048, Rope(1e4)), ({}, 4096, Rope(1e4)),
    ({"rope_theta": 1e6}, 16384, Rope(1e6)), ({"rope_theta": 5e5}, 8192, Rope(5e5)),
    ({"use_scaled_rope": False}, 8192, Rope(5e5)),
    ({"use_scaled_rope": True}, 131072, Llama3Rope(5e5, 8.0)),
])  # fmt: skip
def test_what_a_generation_has(tmp_path, change, context, rope):
    plain = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 24}
    (tmp_path / "params.json").write_text(json.dumps(plain | change))
    config = meta.meta_config(tmp_path)
    assert (config.context, config.layer(0).attention.rope) == (context, rope)


def test_an_output_matrix_that_is_the_embedding(tmp_path, monkeypatch):
    """As in Llama 3.2; it may be missing, and must be no other."""
    full = llama3_weights()
    tied = am.load(write_folder(tmp_path / "m", pieces_of(full, 1), LLAMA3)).config
    sizes = {"small": replace(tied, tied=True)}
    monkeypatch.setattr(meta, "LLAMAS", sizes)
    complains(tmp_path / "m", "output.weight is not tok_embeddings.weight")
    ids = np.arange(12, dtype=np.int32)[None]
    logits = []
    for output in ({"output.weight": full["tok_embeddings.weight"]}, {}):
        own = {n: w for n, w in full.items() if n != "output.weight"} | output
        folder = write_folder(tmp_path / str(len(own)), pieces_of(own, 2), LLAMA3)
        logits.append(np.asarray(am.load(folder, dtype="float32").logits(ids)))
    np.testing.assert_array_equal(*logits)


def test_a_tokenizer_one_folder_up(tmp_path):
    """As Llama 1 and 2 came; a nearer one goes first."""
    model = Path(ck.small_model()) / "tokenizer.model"
    shutil.copy(model, tmp_path / "tokenizer.model")
    params = {**LLAMA3, "vocab_size": 4096}
    full = llama3_weights()
    for name in ("tok_embeddings.weight", "output.weight"):
        full[name] = np.resize(full[name], (4096, D))
    folder = write_folder(tmp_path / "7B", pieces_of(full, 1), params)
    assert am.load(folder).tokenizer.decode([300]) == am.load().tokenizer.decode([300])
    convert(folder, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == model.read_bytes()
    (folder / "tokenizer.model").write_bytes(b"nearer")
    complains_of(lambda: am.load(folder), "7B/tokenizer.model")
    hub = am.load(tmp_path / "ours")
    assert hub.tokenizer is not None
    (tmp_path / "ours" / "tokenizer.model").unlink()
    assert am.load(tmp_path / "ours").tokenizer is None     # not Meta's layout


def test_widths_of_llama_4():
    raw = {"dim": 5120, "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "ffn_exp": 4.0,
           "moe_args": {"num_experts": 16}}  # fmt: skip
    fields = Fields(Path("p"), raw)
    experts, every = llama4.read_moe_args(fields)
    assert (experts.width, experts.shared.width, every) == (8192, 8192, 1)
    assert meta.dense_width(fields) == 16384


def test_configuration_of_llama_4(tmp_path):
    ranks = pieces_of(llama4_weights(), 1)
    c = meta.meta_config(write_folder(tmp_path / "m", ranks, LLAMA4_PARAMS))
    first, second = c.layer(0), c.layer(1)
    assert first.feed_forward == FeedForwardSpec(F, "silu")
    assert second.feed_forward == SharedMoESpec(
        2, 1, MOE_F, "silu", "sigmoid", shared=FeedForwardSpec(MOE_F, "silu"),
        gate_input=True,
    )  # fmt: skip
    near, far = first.attention, second.attention
    assert near.qk_norm_eps == 1e-5 and near.mask == Chunk(4)
    assert near.rope == Llama3Rope(5e5, 16.0, 1.0, 1.0, 8192)
    assert (far.rope, far.floor, far.scale) == (None, 4, 0.1)
    assert not c.tied and not first.post_norm and c.context == 10485760


def test_streaming_from_several_files(tmp_path):
    """Weights that stay in four .pth files, assembled as they are used."""
    if "disk" not in ck.LOADERS:
        pytest.skip("nothing streams here")
    ranks = [fused(rank) for rank in pieces_of(llama4_weights(), 4)]
    folder = write_folder(tmp_path / "m", ranks, LLAMA4_PARAMS)
    ids = np.random.default_rng(1).integers(0, V, (2, 12)).astype(np.int32)
    want = np.asarray(am.load(folder, dtype="float32").logits(ids))
    got = np.asarray(am.load(folder, dtype="float32", stream=True).logits(ids))
    np.testing.assert_allclose(got, want, atol=1e-4)


VISION_ARGS = {
    "image_size": {"height": 8, "width": 8}, "patch_size": {"height": 2, "width": 2},
    "dim": 16, "n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 12,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip


def image_weights():
    eyes = "vision_embeddings.vision_encoder"
    shapes = {f"{eyes}.class_embedding": (16,), "vision_projection.weight": (D, 12),
              f"{eyes}.positional_embedding_vlm": (17, 16),
              f"{eyes}.conv1._linear.weight": (16, 12),
              "vision_embeddings.vision_adapter.mlp.c_fc.weight": (12, 64),
              "vision_embeddings.vision_adapter.mlp.c_proj.weight": (12, 12),
              }  # fmt: skip
    norms = [f"{eyes}.ln_pre", f"{eyes}.ln_post"]
    for i in range(2):
        at = f"{eyes}.transformer.resblocks.{i}"
        norms += [f"{at}.ln_1", f"{at}.ln_2"]
        linear = {f"attn.{w}": (16, 16) for w in ("wq", "wk", "wv", "wo")}
        linear |= {"mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    for norm in norms:
        shapes |= {f"{norm}.weight": (16,), f"{norm}.bias": (16,)}
    return random_weights(shapes)


def image_axis(name):
    """As Meta's resharding program has it, but for what it copies."""
    if name.endswith(("wo.weight", "c_proj.weight")):
        return 1
    cut = ("wq", "wk", "wv", "c_fc", "_linear", "vision_projection")
    return 0 if name.rsplit(".", 1)[0].endswith(cut) else None


def test_images_join_to_the_same_bits(tmp_path):
    text, eyes = llama4_weights(), image_weights()
    params = {**LLAMA4_PARAMS, "vision_args": VISION_ARGS}

    def folder(files, params=params, eyes=eyes):
        ranks = [fused(rank) for rank in pieces_of(text, files)]
        for name, w in eyes.items():
            axis = image_axis(name)
            parts = [w] * files if axis is None else np.split(w, files, axis)
            for rank, part in zip(ranks, parts):
                rank[name] = part
        where = tmp_path / f"{files}-{len(eyes)}-{len(params['vision_args'])}"
        return write_folder(where, ranks, params)

    one = read(folder(1))
    same(one, read(folder(2)))
    block = "vision_embeddings.vision_encoder.transformer.resblocks.1"
    got = np.asarray(part(one, "vision/layer/query/w")[1])
    heads = eyes[f"{block}.attn.wq.weight"].reshape(2, 4, 2, 16)
    np.testing.assert_array_equal(got, heads.swapaxes(1, 2).reshape(16, 16).T)
    vision = meta.meta_config(folder(1)).vision
    assert (vision.shuffle, vision.d_ff, vision.image_id) == (2, 64, V - 1)
    few = {n: w for n, w in eyes.items() if n != "vision_projection.weight"}
    complains(folder(2, eyes=few), "lacks vision_projection.weight")
    odd = {**VISION_ARGS, "patch_window": 1}
    complains(folder(1, {**params, "vision_args": odd}), "'patch_window'")
    tall = {**VISION_ARGS, "patch_size": {"height": 2, "width": 4}}
    complains(folder(1, {**params, "vision_args": tall}), "patch_size", "square")


@pytest.mark.parametrize("files", [1, 2])
def test_how_images_are_prepared(tmp_path, files):
    """Meta's files say nothing of it; elsewhere that is refused."""
    pytest.importorskip("tokenizers")
    params = {**LLAMA4_PARAMS, "vision_args": VISION_ARGS}
    ranks = [fused(rank) for rank in pieces_of(llama4_weights(), files)]
    for name, w in image_weights().items():
        axis = image_axis(name)
        parts = [w] * files if axis is None else np.split(w, files, axis)
        for rank, part in zip(ranks, parts):
            rank[name] = part
    folder = write_folder(tmp_path / "m", ranks, params)
    words = {"version": "1.0", "added_tokens": [], "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None,
             "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(words))
    model = am.load(folder, dtype="float32")
    spec = model.config.vision
    assert image_settings(model.tokenizer.companions, spec) == ImageSettings(8)
    plain = ck.find_tokenizer(folder)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        image_settings(plain.companions, spec)
    convert(folder, tmp_path / "hf", "hf")
    data = (tmp_path / "hf" / "preprocessor_config.json").read_bytes()
    assert data == model.tokenizer.companions["preprocessor_config.json"]


@pytest.fixture
def hub(tmp_path):
    """A folder of the hub, and a function for what its model says."""
    source = write_folder(tmp_path / "m", pieces_of(llama3_weights(), 1), LLAMA3)
    convert(source, tmp_path / "hub", "hf")
    ids = np.arange(8, dtype=np.int32)[None]

    def logits(folder):
        return np.asarray(am.load(folder, dtype="float32").logits(ids))

    return tmp_path / "hub", logits


@pytest.mark.parametrize("shards", [1, 3])
def test_the_hubs_bin_files(hub, shards):
    """Its older files are read as `torch.save` writes them."""
    folder, logits = hub
    before, arrays, index = logits(folder), open_folder(folder), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        file = file if shards > 1 else "pytorch_model.bin"
        own = {n: np.array(arrays[n]) for n in sorted(arrays)[i::shards]}
        (folder / file).write_bytes(pth_bytes(own))
        index |= dict.fromkeys(own, file)
    if shards > 1:
        text = json.dumps({"weight_map": index})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(logits(folder), before)
    convert(folder, folder.parent / "ours")
    assert not [p for p in (folder.parent / "ours").iterdir() if ".bin" in p.name]
    np.testing.assert_array_equal(logits(folder.parent / "ours"), before)


def test_bin_files_of_other_names(hub):
    folder, logits = hub
    (folder / "model.safetensors").unlink()
    (folder / "weights.bin").write_bytes(pth_bytes(ARRAYS))
    words = str(folder), "weights.bin", "which is not read", "pytorch_model.bin"
    complains_of(lambda: logits(folder), *words)
    complains_of(lambda: convert(folder, folder.parent / "x"), *words)
