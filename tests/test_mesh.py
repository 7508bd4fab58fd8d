"""Any mesh: what loads, what is read, what is copied, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints
from annotated_moe.checkpoints import BYTES_READ, quantize_params
from annotated_moe.families.grok import grok_config
from annotated_moe.formats.files import CheckpointError
from annotated_moe.model import (
    decode_step,
    flat_specs,
    init_cache,
    init_params,
    param_specs,
    prefill,
)
from annotated_moe.parallel import partition_specs, shardings
from annotated_moe.quantization import QuantizedTensor

SIZES = {
    "vocab_size": 50, "context": 32, "d_model": 64, "d_ff": 128, "num_layers": 2,
    "q_heads": 16, "head_size": 8, "num_experts": 4, "embedding_multiplier": 8.0,
    "dtype": "float32",
}  # fmt: skip
TINY = grok_config(kv_heads=4, **SIZES)
PROMPTS = [[5, 9, 33], [17, 2, 8, 40, 41], [3]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder whose second products have 4 groups: fewer than shards."""
    make = jax.jit(lambda key: quantize_params(init_params(key, TINY), TINY, 4))
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
    folder, data, model, expert, prompts = json.loads(line)
    mesh = am.make_mesh(data, model, expert)
    net = am.load(folder, mesh=mesh, dtype="float32")
    logits = net.logits(np.arange(1, 13).reshape(3, 4))
    ids = net.generate_ids(prompts, max_new_tokens=4)
    print(json.dumps([np.asarray(logits).tolist(), ids]))
"""


@pytest.mark.parametrize(
    "meshes",
    [[(2, 16, 1), (2, 4, 4)],
     pytest.param([(1, 16, 1), (8, 4, 1), (1, 16, 2)], marks=pytest.mark.full)],
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


# Fewer key heads than shards


@pytest.mark.parametrize(
    "kv_heads", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 8))]
)
def test_any_number_of_key_heads_on_eight_shards(kv_heads):
    config = grok_config(kv_heads=kv_heads, **SIZES)
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(1))
    mesh = am.make_mesh(1, 8)
    specs = partition_specs(params, param_specs(config), mesh)
    where = shardings(specs, mesh)
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


SPECS = {
    name: spec for (module, leaf), spec in flat_specs(TINY).items()
    for name in [f"{module}/{leaf}"]
}


def place(name, w, mesh):
    """A parameter of TINY, but of the shape that `w` has."""
    return checkpoints.place(name, w, SPECS[name], mesh, "float32")


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_device_reads_its_part_once(shape, groups):
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (2, 4, 128, 64)).astype(np.int8)
    scales = rng.random((2, 4, groups, 64)).astype(ml_dtypes.bfloat16)
    source = QuantizedTensor(Watched(weight), Watched(scales))
    path = "decoder_layer/moe/linear_1/w"
    BYTES_READ.clear()
    w = place(path, source, am.make_mesh(*shape))
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
    placed = place("decoder_layer/rms_norm/scale", norm, am.make_mesh(2, 4))
    assert norm.slices == [512] and len(placed.addressable_shards) == 8


def test_a_device_never_shares_memory_with_the_file():
    norm = np.ones((2, 64), np.float32)
    placed = place("decoder_layer/rms_norm/scale", norm, am.make_mesh(1, 8))
    norm[:] = 7
    assert np.asarray(placed).max() == 1


def test_an_expert_is_read_by_the_devices_that_hold_it():
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (2, 4, 64, 128)).astype(np.int8)
    scales = np.ones((2, 4, 1, 128), ml_dtypes.bfloat16)
    source = QuantizedTensor(Watched(weight), Watched(scales))
    path = "decoder_layer/moe/linear/w"
    w = place(path, source, am.make_mesh(expert=4, model=2))
    np.testing.assert_array_equal(w.weight, weight)
    assert {s.data.shape for s in w.weight.addressable_shards} == {(2, 1, 64, 64)}
    assert source.weight.slices == [weight.nbytes // 8] * 8


# What is refused


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3), ["1 x 1 x 3", "data * model = 3 does not divide the table of "
                  "in_out_embed/embeddings, of which there are 64",
                  "no mesh of 3 devices would do, one of 1 or 2 or 4 "]),
        ((3, 2), ["3 x 1 x 2", "data * model = 6 does not divide the table"]),
        ((1, 1, 8), ["1 x 8 x 1", "expert = 8 does not divide the experts of "
                     "decoder_layer/moe/linear/w, of which there are 4",
                     "of 8 devices, 1 x 1 x 8 or 1 x 2 x 4 or 1 x 4 x 2 or"]),
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
        ({"q_heads": 4}, ["model = 8 does not divide 4 query heads",
                          "of 8 devices, 1 x 2 x 4 or 1 x 4 x 2 or 2 x 1 x 4"]),
        ({"d_ff": 100}, ["model = 8 does not divide the mlp of", "there are 100",
                         "1 x 2 x 4 or 1 x 4 x 2"]),
        ({"d_model": 36}, ["data * model = 8 does not divide the table of"]),
        ({"kv_heads": 2, "head_size": 2},
         ["model = 8 does not divide 2 key heads of size 2 in decoder_layer/"]),
    ],
)  # fmt: skip
def test_the_error_names_the_axis_and_what_would_do(tmp_path, change, words):
    config = grok_config(**{**SIZES, "kv_heads": 4, **change})
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_mesh(tmp_path, config, am.make_mesh(1, 8))
    text = str(error.value)
    for word in words:
        assert word in text, text
    assert text.count(" x ") <= 2 + 2 + 4 * 2 and len(text) < 300 + len(str(tmp_path))


def test_what_is_advised_fits():
    config = grok_config(**SIZES | {"q_heads": 4}, kv_heads=4)
    advised = list(checkpoints.fitting_meshes(config, 8))
    assert "1 x 2 x 4" in advised and "1 x 1 x 8" not in advised
    for mesh in advised:
        data, expert, model = map(int, mesh.split(" x "))
        assert data * expert * model == 8
        checkpoints.check_mesh(Path("x"), config, am.make_mesh(data, model, expert))


def test_grok_1_fits_what_it_should():
    grok, sizes = am.PRESETS["grok-1"], (1, 2, 4, 8, 16, 32)

    def fits(data, model, expert=1):
        mesh = {"data": data, "expert": expert, "model": model}
        return not checkpoints.indivisible(grok, mesh)

    both = [(d, n // d) for n in sizes for d in sizes if n % d == 0 and fits(d, n // d)]
    assert len(both) == 20 and (1, 16) in both and (1, 32) not in both
    assert fits(1, 8, 8) and fits(4, 16, 8) and not fits(1, 8, 16)
