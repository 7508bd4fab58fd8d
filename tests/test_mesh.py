"""Any mesh: what loads, what is read, what is copied, what is refused."""

import json
import os
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints, sharding
from annotated_moe.checkpoints import BYTES_READ, quantize_params
from annotated_moe.formats.files import CheckpointError
from annotated_moe.model import (
    decode_step,
    init_cache,
    init_params,
    prefill,
)
from annotated_moe.quantization import QuantizedTensor

SIZES = {
    "vocab_size": 50, "context": 32, "d_model": 64, "d_ff": 128, "num_layers": 2,
    "q_heads": 16, "head_size": 8, "num_experts": 4, "embedding_multiplier": 8.0,
    "dtype": "float32",
}  # fmt: skip
TINY = am.ModelConfig(kv_heads=4, **SIZES)
EIGHT = am.ModelConfig(kv_heads=8, **SIZES)
PROMPTS = [[5, 9, 33], [17, 2, 8, 40, 41], [3]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder whose second products have 4 groups: fewer than shards."""
    make = jax.jit(lambda key: quantize_params(init_params(key, TINY), 4))
    folder = tmp_path_factory.mktemp("mesh") / "tiny"
    am.save(am.Model(TINY, make(jax.random.key(0))), folder)
    return folder


# Thirty-two devices, in a process of their own

THIRTY_TWO = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 32)
import numpy as np
import annotated_moe as am

for line in sys.stdin:
    folder, data, model, prompts = json.loads(line)
    mesh = am.make_mesh(data, model)
    net = am.load(folder, mesh=mesh, dtype="float32")
    logits = net.logits(np.arange(1, 13).reshape(3, 4))
    ids = net.generate_ids(prompts, max_new_tokens=4)
    print(json.dumps([np.asarray(logits).tolist(), ids]))
"""


@pytest.mark.parametrize(
    "meshes",
    [[(2, 16)], pytest.param([(1, 16), (8, 4)], marks=pytest.mark.full)],
)
def test_sixteen_and_thirty_two_devices(tiny, meshes):
    """Four key heads on 16 shards, three rows on 1, 2 and 8."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    jobs = "\n".join(json.dumps([str(tiny), *mesh, PROMPTS]) for mesh in meshes)
    run = subprocess.run([sys.executable, "-c", THIRTY_TWO], input=jobs, env=env,
                         text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    alone = am.load(tiny, dtype="float32")
    wanted = np.asarray(alone.logits(np.arange(1, 13).reshape(3, 4)))
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(meshes) and wanted.std() > 0.05
    for logits, ids in found:
        np.testing.assert_allclose(logits, wanted, atol=1e-5)
        assert ids == alone.generate_ids(PROMPTS, max_new_tokens=4)


# Heads and rows


@pytest.mark.parametrize(
    "kv, q, model, copies",
    [(8, 48, 1, 1), (8, 48, 4, 1), (8, 48, 8, 1), (4, 16, 8, 2), (1, 8, 8, 8),
     (2, 8, 4, 2), (6, 24, 4, 2), (3, 24, 8, 8), (2, 6, 4, 1), (5, 5, 8, 1)],
)  # fmt: skip
def test_copies_make_heads_whole(kv, q, model, copies):
    with jax.set_mesh(am.make_mesh(1, model)):
        assert sharding.head_copies(kv, q) == copies
        if q % model == 0:
            assert kv * copies % model == 0 and q % (kv * copies) == 0
    assert sharding.head_copies(kv, q) == 1


@pytest.mark.parametrize(
    "config, shape, rows, held",
    [(TINY, (1, 8), 3, (2, 3, 16, 1, 8)), (TINY, (2, 4), 4, (2, 2, 16, 1, 8)),
     (TINY, (2, 4), 3, (2, 3, 16, 1, 8)), (EIGHT, (1, 8), 3, (2, 3, 16, 1, 8)),
     (TINY, (4, 2), 4, (2, 1, 16, 2, 8)), (TINY, (8, 1), 3, (2, 3, 16, 4, 8))],
)  # fmt: skip
def test_a_device_caches_its_rows_and_its_heads(config, shape, rows, held):
    with jax.set_mesh(am.make_mesh(*shape)):
        cache = init_cache(config, rows, 16)
    for stack in (cache.k, cache.v):
        assert {s.data.shape for s in stack.addressable_shards} == {held}


def collectives(config, shape, rows):
    """Kinds of exchange in a layer of a decode step, as compiled."""
    init = jax.jit(lambda key: quantize_params(init_params(key, config)))
    mesh = am.make_mesh(*shape)
    with jax.set_mesh(mesh):
        params = init(jax.random.key(0))
        specs = sharding.partition_specs(params, mesh)
        params = jax.device_put(params, sharding.shardings(specs, mesh))
        cache = init_cache(config, rows, 16)
        tokens = np.ones(rows, np.int32)
        program = decode_step.lower(params, tokens, cache, config).compile()
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    entry, found = False, []
    for line in program.as_text().splitlines():
        if not line.startswith(" "):
            entry = line.startswith("ENTRY")
        hit = re.search(rf" ({kinds})(-start)?\(", line)
        if hit and not entry:
            found.append(hit[1])
    return sorted(found)


@pytest.mark.parametrize(
    "config, shape, gathers",
    [(EIGHT, (1, 8), 0), (TINY, (1, 8), 1), (TINY, (2, 4), 1)],
)
def test_a_layer_exchanges_no_more_than_it_must(config, shape, gathers):
    found = collectives(config, shape, 4)
    assert set(found) <= {"all-reduce", "all-gather"}
    assert found.count("all-gather") == gathers
    if shape[0] == 1:
        assert found.count("all-reduce") == 2


@pytest.mark.parametrize(
    "kv_heads", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 8))]
)
def test_any_number_of_key_heads_on_eight_shards(kv_heads):
    config = am.ModelConfig(kv_heads=kv_heads, **SIZES)
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(1))
    mesh = am.make_mesh(1, 8)
    where = sharding.shardings(sharding.partition_specs(params, mesh), mesh)
    placed = jax.device_put(params, where)

    def run(params):
        tokens = np.arange(1, 17).reshape(2, 8).astype(np.int32)
        cache = init_cache(config, 2, 16)
        lengths = np.array([5, 8], np.int32)
        first, cache = prefill(params, tokens, lengths, cache, config)
        second, cache = decode_step(params, tokens[:, 0], cache, config)
        return np.stack([first, second])

    alone = run(params)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(placed), alone, atol=1e-5)


# What is read


class Watched:
    """An array that may be sliced, and not be read in any other way."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.ndim, self.slices = array.ndim, []

    def __getitem__(self, index):
        part = self.array[index]
        self.slices.append(part.nbytes)
        return part

    def __array__(self, *_, **__):
        raise AssertionError("read as a whole")


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_device_reads_its_part_once(shape, groups):
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (2, 4, 128, 64)).astype(np.int8)
    scales = rng.random((2, 4, groups, 64)).astype(ml_dtypes.bfloat16)
    source = QuantizedTensor(Watched(weight), Watched(scales))
    path = "decoder_layer/moe/linear_1/w"
    BYTES_READ.clear()
    w = checkpoints.place(path, source, am.make_mesh(*shape), "float32")
    np.testing.assert_array_equal(w.weight, weight)
    repeat = w.scales.shape[2] // groups
    np.testing.assert_array_equal(w.scales, np.repeat(scales, repeat, axis=2))
    assert source.weight.slices == [weight.nbytes // 8] * 8
    model = shape[1] if groups > 1 else 1
    parts = [n.data.nbytes for n in w.scales.addressable_shards]
    assert len(source.scales.slices) == shape[0] * model
    assert max(source.scales.slices) <= parts[0]
    assert BYTES_READ[path] == weight.nbytes + sum(parts) // (8 // shape[0] // model)


def test_what_all_devices_keep_is_read_once():
    norm = Watched(np.ones((2, 64), np.float32))
    placed = checkpoints.place(
        "decoder_layer/rms_norm/scale", norm, am.make_mesh(2, 4), "float32")
    assert norm.slices == [512] and len(placed.addressable_shards) == 8


def test_a_device_never_shares_memory_with_the_file():
    norm = np.ones((2, 64), np.float32)
    placed = checkpoints.place(
        "decoder_layer/rms_norm/scale", norm, am.make_mesh(1, 8), "float32")
    norm[:] = 7
    assert np.asarray(placed).max() == 1


# What is refused


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3), ["1 x 3", "data * model = 3 does not divide d_model = 64",
                  "no mesh of 3 devices"]),
        ((3, 2), ["3 x 2", "data * model = 6 does not divide d_model = 64"]),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide(tiny, shape, words):
    BYTES_READ.clear()
    with pytest.raises(CheckpointError) as error:
        am.load(tiny, mesh=am.make_mesh(*shape))
    assert "\n" not in str(error.value) and not BYTES_READ
    for word in [*words, str(tiny)]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q_heads": 4}, ["model = 8 does not divide q_heads = 4",
                          "of 8 devices, 2 x 4 or 4 x 2 or 8 x 1 would do"]),
        ({"d_ff": 100}, ["model = 8 does not divide d_ff = 100", "2 x 4 or 4 x 2"]),
        ({"d_model": 36}, ["data * model = 8 does not divide d_model = 36"]),
        ({"kv_heads": 2, "head_size": 2},
         ["model = 8 does not divide kv_heads * head_size = 4"]),
    ],
)  # fmt: skip
def test_the_error_names_the_axis_and_what_would_do(tmp_path, change, words):
    config = am.ModelConfig(**{**SIZES, "kv_heads": 4, **change})
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_mesh(tmp_path, config, am.make_mesh(1, 8))
    for word in words:
        assert word in str(error.value)


def test_grok_1_fits_what_it_should():
    grok = am.PRESETS["grok-1"]
    fits = [(d, n // d) for n in (1, 2, 4, 8, 16, 32) for d in (1, 2, 4, 8, 16, 32)
            if n % d == 0 and not checkpoints.indivisible(grok, d, n // d)]
    assert len(fits) == 20 and (1, 16) in fits and (1, 32) not in fits
