"""Eight-bit weights turned for a CPU: the product, its program, load and save."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import turned
from annotated_moe.checkpoints import (
    BYTES_READ,
    open_checkpoint,
    place,
    small_model,
)
from annotated_moe.linear import product
from annotated_moe.model import decode_step, flat_specs, init_cache
from annotated_moe.moe import block_rows, rows_for
from annotated_moe.parallel import partition_spec, shardings, weight_spec
from annotated_moe.quantization import (
    LazySlice,
    QuantizedTensor,
    dequantize,
    quantize,
)
from annotated_moe.turned import (
    TurnedSource,
    TurnedTensor,
    int8_head,
    runs_of,
    stored_on_cpu,
    turn,
)

SHIPPED = open_checkpoint(small_model())


def random_tensor(*lead, d, f, groups=1, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (*lead, d, f), np.int8)
    scales = rng.uniform(0.5, 1, (*lead, groups, f)) / 100
    scales = jnp.asarray(scales, jnp.bfloat16)
    return QuantizedTensor(jnp.asarray(weight), scales)


def same(a, b):
    np.testing.assert_array_equal(a.weight, b.weight)
    np.testing.assert_array_equal(a.scales, b.scales)


# The layout


def test_runs():
    assert [runs_of(d, 1) for d in (1, 2048, 2049, 6144)] == [1, 1, 3, 3]
    assert runs_of(32768, 8) == 16 and runs_of(512, 8) == 8
    assert runs_of(6144, 1, 4) == 4 and runs_of(6144, 8, 4) == 8
    assert runs_of(4111, 1) == 1 and runs_of(24, 4) == 4  # a prime; a few inputs


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_turned_and_back_to_the_bit(groups, parts):
    q = random_tensor(2, 3, d=24, f=10, groups=groups)
    w = turn(q, parts)
    assert w.shape == q.shape and w.ndim == 4
    assert w.runs.shape[-3] % groups == w.runs.shape[-3] % parts == 0
    same(w, q)
    np.testing.assert_array_equal(dequantize(w), dequantize(q))
    leaves, kind = jax.tree.flatten(w)
    assert isinstance(kind.unflatten(leaves), TurnedTensor) and len(leaves) == 2


def test_a_source_reads_what_is_asked():
    q = random_tensor(2, d=24, f=10)
    for count in (1, 4):
        whole = np.asarray(turn(q, count).runs)
        source = TurnedSource(q.weight, count)
        assert source.shape == whole.shape
        every = slice(None)
        size = 24 // count
        inside = slice(size // 2, size) if count == 1 else every
        runs = every if count == 1 else slice(1, 3)
        for index in [(every,) * 4, (slice(1, 2), runs, slice(3, 7), inside)]:
            np.testing.assert_array_equal(source[index], whole[index])


# The product


@pytest.mark.parametrize("bfloat16, rows", [(True, 1), (True, 9), (False, 8)])
@pytest.mark.parametrize("d, groups", [(96, 1), (96, 4), (4100, 1), (4111, 1)])
def test_product_is_the_formula(monkeypatch, bfloat16, rows, d, groups):
    monkeypatch.setattr(turned, "cpu_has_bfloat16", lambda: bfloat16)
    q = random_tensor(2, 3, d=d, f=130, groups=groups)
    x = np.random.default_rng(1).standard_normal((rows, d), np.float32)
    w = LazySlice(turn(q), (jnp.int32(1), jnp.int32(2)))
    exact = x.astype(np.float64) @ np.asarray(dequantize(q))[1, 2]
    np.testing.assert_allclose(product(jnp.asarray(x), w), exact, atol=2e-5 * d**0.5)
    short = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(short, np.float64) @ np.asarray(dequantize(q))[1, 2]
    np.testing.assert_allclose(product(short, w), exact, atol=2e-5 * d**0.5)


def test_scales_must_fit():
    w = turn(random_tensor(d=24, f=10))
    with pytest.raises(ValueError, match="do not fit"):
        product(jnp.ones((1, 24)), replace_scales(w, 5))


def replace_scales(w, groups):
    return TurnedTensor(w.runs, jnp.ones((groups, 10), jnp.bfloat16))


def program(rows, d, f):
    """A loop over layers and experts around one product, as a model has it."""
    q = turn(random_tensor(3, 4, d=d, f=f))
    x = jnp.ones((rows, d), jnp.bfloat16)

    def layers(x, q):
        def experts(i, total):
            w = LazySlice(q, (i // 4,))[i % 4]
            return total + product(x, w)

        return jax.lax.fori_loop(0, 12, experts, jnp.zeros((rows, f)))

    compiled = jax.jit(layers).lower(x, q).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("d", [2048, 6144])
@pytest.mark.parametrize("rows", [1, 4])
def test_few_rows_write_no_wide_weight(d, rows):
    """Slice, conversion and dot in one loop: no copy, turned or not."""
    text, scratch = program(rows, d, 512)
    assert "transpose_copy" not in text
    assert scratch < d * 512 / 4  # bytes, of d * 512 weights
    wide = re.findall(r"^ +%\S+ = (?:f32|bf16)\[512,\d{4}\]\S* (\w+)", text, re.M)
    fused = text.split("ENTRY")[0].count("dynamic-slice")
    assert fused and "fusion" not in wide and "copy" not in wide


def test_many_rows_widen_a_tile():
    _, scratch = program(64, 2048, 4096)
    assert scratch < 2048 * 4096  # a float32 copy has 4 times that


# Load and save


@pytest.fixture
def however_small(monkeypatch):
    """The shipped model's matrices, which `load` would leave alone, are turned."""
    monkeypatch.setattr(turned, "SMALLEST", 0)


def test_small_matrices_stay_as_files_have_them():
    q = random_tensor(2, d=256, f=255)
    assert stored_on_cpu(q, 1) is q
    w = stored_on_cpu(random_tensor(2, d=256, f=256), 1)
    assert isinstance(w, TurnedTensor)
    kinds = {type(w) for leaves in am.load().params.values() for w in leaves.values()}
    assert QuantizedTensor in kinds and TurnedTensor not in kinds


def test_load_turns_and_save_turns_back(tmp_path, however_small):
    model = am.load(dtype="float32")
    am.save(model, tmp_path / "saved")
    for name in ("model.safetensors", "checksums.json"):
        there = (tmp_path / "saved" / name).read_bytes()
        assert there == (small_model() / name).read_bytes()
    for (module, name), stored in SHIPPED.read().items():
        w = model.params[module][name]
        assert isinstance(w, TurnedTensor) == isinstance(stored, QuantizedTensor)
    assert am.verify(tmp_path / "saved")


def test_a_step_of_a_model_has_no_transposed_copy(however_small):
    model = am.load(dtype="float32")
    cache = init_cache(model.config, 1, 32)
    args = model.params, jnp.zeros(1, jnp.int32), cache, model.config
    text = decode_step.lower(*args).compile().as_text()
    assert "transpose_copy" not in text


def test_streamed_weights_stay_as_they_are(however_small):
    model = am.load(dtype="float32", stream=True)
    kinds = {type(w) for leaves in model.params.values() for w in leaves.values()}
    assert TurnedTensor not in kinds


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 4, 1), (4, 1, 2)])
def test_each_device_reads_its_part_turned(sizes, however_small):
    """On a mesh that cuts inputs, outputs or experts; and multiplies the same."""
    data, model, expert = sizes
    mesh = am.make_mesh(data=data, model=model, expert=expert)
    specs = {"/".join(path): s for path, s in flat_specs(SHIPPED.config).items()}
    for name in ("linear", "linear_1"):
        full = f"decoder_layer/moe/{name}/w"
        q = SHIPPED.read()[f"decoder_layer/moe/{name}", "w"]
        BYTES_READ.clear()
        w = place(full, q, specs[full], mesh, "float32", stored_on_cpu)
        np.testing.assert_array_equal(w.weight, q.weight[:])
        assert BYTES_READ[full] < 1.3 * q.weight[:].nbytes
        held = {shard.data.nbytes for shard in w.runs.addressable_shards}
        assert held == {q.weight[:].nbytes // 8}


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 4, 1), (8, 1, 1)])
def test_a_mesh_says_what_one_device_says(sizes, however_small):
    data, model, expert = sizes
    mesh = am.make_mesh(data=data, model=model, expert=expert)
    tokens = np.arange(16).reshape(2, 8) % 50
    there = am.load(dtype="float32", mesh=mesh).logits(tokens)
    here = am.load(dtype="float32").logits(tokens)
    np.testing.assert_allclose(there, here, atol=2e-3)


def test_one_mesh_says_what_one_device_says(however_small):
    """Stands for the meshes of `test_a_mesh_says_what_one_device_says`."""
    test_a_mesh_says_what_one_device_says((2, 2, 2), however_small)


def test_a_weight_turned_for_one_device_goes_onto_a_mesh():
    mesh = am.make_mesh(1, 4)
    spec = partition_spec(("mlp", "embed"))
    for groups in (1, 8):
        w = turn(random_tensor(d=64, f=16, groups=groups))
        there = jax.device_put(w, shardings(weight_spec(spec, w, mesh), mesh))
        same(there, w)
        assert {s.data.nbytes for s in there.runs.addressable_shards} == {256}


# Blocks, and the head


def test_blocks_of_one_row_while_choices_are_few():
    w = {"linear": turn(random_tensor(8, d=256, f=256))}
    stack = turn(random_tensor(2, 8, d=256, f=256))
    lazy = {"linear": LazySlice(stack, (jnp.int32(0),))}
    plain = {"linear": random_tensor(8, d=256, f=256)}
    for n in (1, 2, 8):
        assert rows_for(w, n, 2) == rows_for(lazy, n, 2) == 1
    for n, rows in ((9, 8), (64, 32), (4096, 128)):
        assert rows_for(w, n, 2) == rows_for(lazy, n, 2) == rows
    for n in (2, 8, 64):
        assert rows_for(plain, n, 2) == block_rows(n, 2, 8)


def test_head_in_eight_bits_is_within_its_bound(tmp_path):
    model = am.load(dtype="float32")
    headed = int8_head(model)
    tokens = np.arange(12).reshape(1, 12)
    before, after = (np.asarray(m.logits(tokens))[0] for m in (model, headed))
    table = jnp.asarray(model.params["in_out_embed"]["embeddings"], jnp.float32)
    step = np.asarray(quantize(table.T).scales, np.float64)[0]
    width = table.shape[1]
    gain = np.abs(np.asarray(model.params["rms_norm"]["scale"])).max()
    most = step / 2 * gain * width * abs(model.config.output_multiplier)
    moved = np.abs(after - before)
    assert moved.max() > 0 and (moved <= most).all()
    assert moved.max() < 0.1 * before.std()
    am.save(headed, tmp_path / "saved")
    there = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert there == (small_model() / "model.safetensors").read_bytes()


def test_head_in_eight_bits_is_refused_on_a_mesh():
    model = replace(am.load(dtype="float32"), mesh=am.make_mesh(1, 8))
    with pytest.raises(ValueError, match="one device"):
        int8_head(model)
