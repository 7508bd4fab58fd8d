"""Plans: what a device holds, reads and sends, counted in two ways."""

import argparse
import json
import math
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import annotated_moe as am
from annotated_moe import checkpoints
from annotated_moe import plan as planning
from annotated_moe.attention import (
    AttentionSpec,
    Chunk,
    NormedAttentionSpec,
    UnitAttentionSpec,
    Window,
)
from annotated_moe.checkpoints import groups_for, small_model
from annotated_moe.config import LayerSpec, ModelConfig, as_segments
from annotated_moe.families import PRESETS
from annotated_moe.families.grok import grok_config
from annotated_moe.families.vision import SeeingConfig, VisionSpec
from annotated_moe.model import init_cache
from annotated_moe.moe import FeedForwardSpec, MoESpec, SharedMoESpec
from annotated_moe.parallel import (
    fit_groups,
    make_mesh,
    partition_spec,
    partition_specs,
    shardings,
)
from annotated_moe.params import record_specs
from annotated_moe.plan import (
    HARDWARE,
    Plan,
    abstract_cache,
    abstract_mesh,
    abstract_params,
    active_experts,
    bound,
    cache_bytes,
    device_bytes,
    disk_bytes,
    fits,
    make_plan,
    on_mesh,
    parameter_counts,
    recorded,
    step_flops,
    step_needs,
    step_seconds,
    table,
    usual_mesh,
)
from annotated_moe.quantization import QuantizedTensor, quantize

GROK = PRESETS["grok-1"]
TINY = grok_config(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=3, q_heads=8,
    kv_heads=8, head_size=8, num_experts=4, embedding_multiplier=8.0,
)  # fmt: skip


def on_first(tree):
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    return sum(shard.data.nbytes for a in jax.tree.leaves(tree)
               for shard in a.addressable_shards if shard.device == first)


def placed(params, config, mesh):
    """Real arrays, cut as the published rules and `fit_groups` say."""
    specs = planning.param_specs(config)
    fitted = {
        module: {
            name: fit_groups(w, partition_spec(specs[module][name].axes), mesh)
            if isinstance(w, QuantizedTensor) else w
            for name, w in leaves.items()
        }
        for module, leaves in params.items()
    }
    where = shardings(partition_specs(fitted, specs, mesh), mesh)
    return jax.device_put(fitted, where)


def same_places(arrays, shapes):
    """Whether real arrays are what was planned, and lie there."""
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(shapes), strict=True)
    return all((a.shape, a.dtype) == (s.shape, s.dtype)
               and a.sharding.is_equivalent_to(s.sharding, a.ndim)
               for a, s in pairs)


SMALL = str(small_model())


# What a device holds.


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_where_the_loader_puts_them(sizes, dtype, monkeypatch):
    monkeypatch.setattr(checkpoints, "STORED", {})      # as files have them
    mesh = make_mesh(*sizes)
    model = am.load(mesh=mesh, dtype=dtype)
    config, params = planning.weights_of(SMALL)
    if dtype == "bfloat16":
        assert config == model.config
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
                          am.load(dtype=dtype).params)
    plan = on_mesh(params, model.config, mesh)
    assert same_places(model.params, plan)
    assert device_bytes(plan) == on_first(model.params)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (8, 1, 1), (1, 2, 4)])
def test_groups_that_are_fewer_than_devices(sizes):
    """Scales are repeated as `fit_groups` repeats real ones."""
    mesh, specs = make_mesh(*sizes), planning.param_specs(TINY)
    params = {
        module: {name: quantize(w, min(2, groups_for(spec))) if spec.matrix else w
                 for name, spec in leaves.items()
                 for w in [jnp.zeros(spec.shape)]}
        for module, leaves in specs.items()
    }
    shapes = jax.eval_shape(lambda: params)
    plan = on_mesh(shapes, TINY, mesh)
    assert same_places(placed(params, TINY, mesh), plan)
    scales = plan["decoder_layer/moe/linear_1"]["w"].scales
    assert scales.shape[-2] == max(2, sizes[1])


@pytest.mark.parametrize(
    "sizes, batch", [((1, 8, 1), 1), ((2, 4, 1), 4), ((2, 4, 1), 3), ((2, 2, 2), 2)]
)
def test_the_cache_is_where_the_model_puts_it(sizes, batch):
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        there = init_cache(TINY, batch, 32)
    plan = abstract_cache(TINY, mesh, batch, 32)
    assert same_places(there, plan)
    imagined = abstract_cache(TINY, abstract_mesh(*sizes), batch, 32)
    assert cache_bytes(imagined) == cache_bytes(plan)


def test_grok_1_on_meshes_that_are_not_there():
    params, sizes = abstract_params(GROK, True), {}
    for shape in [(1, 1, 1), (1, 8, 1), (4, 8, 1), (2, 16, 1), (1, 8, 8)]:
        mesh = abstract_mesh(*shape)
        sizes[shape] = device_bytes(on_mesh(params, GROK, mesh))
    assert round(sizes[1, 1, 1] / 1e9) == 318
    assert round(sizes[1, 8, 1] / 1e9, 1) == 39.8
    assert abs(sizes[2, 16, 1] / sizes[4, 8, 1] - 1) < 0.001
    assert sizes[4, 8, 1] * 31 < sizes[1, 1, 1] < sizes[4, 8, 1] * 32
    experts = 64 * 8 * 3 * 6144 * 32768 / 64
    assert experts < sizes[1, 8, 8] < 1.25 * experts


@pytest.mark.parametrize("shape", [(1, 6, 1), (5, 1, 1), (1, 48, 1), (1, 8, 3)])
def test_a_mesh_that_does_not_divide(shape):
    with pytest.raises(ValueError, match="mesh does not divide the model: "):
        on_mesh(abstract_params(GROK), GROK, abstract_mesh(*shape))


def test_the_usual_mesh():
    """Key heads first, then experts, then the data."""
    def shape(n, config):
        return tuple(usual_mesh(n, config).values())

    assert shape(8, GROK) == (1, 1, 8) and shape(32, GROK) == (1, 4, 8)
    assert shape(256, GROK) == (4, 8, 8)
    dense = grok_config(num_experts=1)
    assert shape(16, dense) == (2, 1, 8)


# What a step needs.


def test_a_step_reads_two_experts_of_eight():
    mesh = abstract_mesh(model=8)
    params = on_mesh(abstract_params(GROK, True), GROK, mesh)
    cache = abstract_cache(GROK, mesh, 1, 8192)
    needs = step_needs(params, cache, GROK, 1)
    weights = 64 * 2 * 3 * 6144 * 32768
    scales = 64 * 2 * (2 * 32768 + 8 * 6144) * 2
    assert needs["experts"] == (weights + scales) / 8
    assert needs["cache"] == 8192 * 256 * 1024 / 8
    assert needs["embedding"] == 131072 * 6144 * 4 / 8
    small = (257 + 8 * 64) * 6144 * 4
    assert needs["router and norms"] == small
    all_of_it = device_bytes(params)
    idle = needs["experts"] * 3
    assert sum(needs.values()) == all_of_it - idle + needs["cache"]


@pytest.mark.parametrize("expert, batch, read", [
    (8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1.75), (1, 64, 8), (8, 64, 1),
])
def test_the_busiest_device_reads_an_expert_at_least(expert, batch, read):
    """By hand, in experts a layer: its share of what is asked, or one."""
    mesh = abstract_mesh(expert=expert)
    params = on_mesh(abstract_params(GROK), GROK, mesh)
    cache = abstract_cache(GROK, mesh, batch, 16)
    needs = step_needs(params, cache, GROK, batch)["experts"]
    assert math.isclose(needs / (64 * 3 * 6144 * 32768 * 2), read, rel_tol=1e-6)


def test_a_loop_over_experts_runs_for_those_held():
    base = replace(BASE, batch=64)
    for expert, runs in [(1, 8), (2, 4), (8, 1)]:
        plan = replace(base, mesh={"data": 1, "expert": expert, "model": 1})
        assert math.isclose(planning.expert_runs(GROK, plan), runs, rel_tol=1e-6)
    assert planning.expert_runs(grok_config(num_experts=1), base) == 1
    assert planning.expert_runs(GROK, replace(BASE, batch=1)) == 2


def test_more_rows_ask_more_experts():
    rng = np.random.default_rng(0)
    moe = GROK.layer(0).feed_forward
    for batch in [1, 2, 5, 20]:
        draws = rng.random([4000, batch, 8]).argsort(-1)[..., :2]
        seen = np.mean([len(np.unique(d)) for d in draws])
        assert abs(active_experts(moe, batch) - seen) < 0.05
    assert active_experts(moe, 1) == 2


def test_operations_of_a_step():
    total, active = parameter_counts(GROK)
    assert (total, active) == (315684820992, 83756587008)
    attention = 4 * 64 * 48 * 128
    assert step_flops(GROK, 3, 100) == 3 * (2 * active + 100 * attention)


# Families, by their parts alone.

HEADS = AttentionSpec(8, 8, 8, 8**-0.5)
NORMED = NormedAttentionSpec(8, 8, 8, 8**-0.5)
WINDOW = replace(HEADS, mask=Window(8))
LOCAL = UnitAttentionSpec(8, 8, 8, 8**-0.5, mask=Chunk(16))
GLOBAL = UnitAttentionSpec(8, 8, 8, 8**-0.5, rope=None, floor=8)
EXPERTS, WIDE = MoESpec(4, 2, 128, "silu"), FeedForwardSpec(192, "silu")
SHARED = SharedMoESpec(4, 1, 128, "silu", shared=FeedForwardSpec(128, "silu"))


def family(*layers, tied=False):
    layers = as_segments([LayerSpec(a, f) for a, f in layers])
    return ModelConfig(64, 32, 64, layers, tied=tied)


FAMILY = {
    "dense": family(*[(replace(HEADS, bias=True),
                       FeedForwardSpec(128, "silu", bias=True))] * 4),
    "windows": family(*[(WINDOW, EXPERTS)] * 4),
    "mixed": family((NORMED, EXPERTS), (NORMED, WIDE), (NORMED, EXPERTS),
                    (NORMED, EXPERTS), tied=True),
    "chunks": family((LOCAL, WIDE), (LOCAL, SHARED), (LOCAL, WIDE),
                     (GLOBAL, SHARED)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_step_of_every_family_against_real_arrays(name, eight_bits):
    config, mesh = FAMILY[name], make_mesh(2, 2, 2)
    shapes = abstract_params(config, eight_bits)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    there, plan = placed(zeros, config, mesh), on_mesh(shapes, config, mesh)
    assert same_places(there, plan) and device_bytes(plan) == on_first(there)
    with jax.set_mesh(mesh):
        cache = init_cache(config, 2, 32)
    imagined = abstract_cache(config, mesh, 2, 32)
    needs = step_needs(plan, imagined, config, 2)
    held = on_first([replace(kept, length=None) for kept in cache.places])
    assert needs["cache"] == cache_bytes(imagined) == held
    skipped = 0.0
    for module, leaves in there.items():
        if "/moe/" in module:
            top_k = {"windows": 2, "mixed": 2, "chunks": 1}[name]
            share = (1 - top_k / 4) ** 2
            skipped += on_first(leaves) * min(share, 0.5)
    table = on_first(there["in_out_embed"])
    unread = 0 if config.tied else table * 62 / 64
    assert math.isclose(
        sum(needs.values()), on_first(there) - skipped - unread + held
    )
    assert planning.unread_bytes(plan, config, 2) == unread
    assert (needs["experts"] == 0) == (name == "dense")
    assert ("dense blocks" in needs) == (name != "windows")


def test_caches_hold_what_layers_see():
    """Of 32 slots: windows of 8 in all layers, chunks of 16 in three of four."""
    mesh = abstract_mesh()
    slots = {name: cache_bytes(abstract_cache(c, mesh, 1, 32)) // (2 * 2 * 8 * 8)
             for name, c in FAMILY.items()}
    assert slots == {"dense": 128, "mixed": 128, "windows": 32, "chunks": 80}


def test_operations_of_families():
    """By hand: every matrix twice, attention over what is seen."""
    d, f, wide, v, head = 64, 128, 192, 64, 8
    attention = 4 * d * 64
    at = 4 * 64                                         # a slot of a layer
    small = {"dense": 9 * d + 4 * (3 * 64 + d + 2 * f + d),
             "windows": 9 * d + 4 * 4 * d,
             "mixed": 9 * d + 4 * 2 * head + 3 * 4 * d, "chunks": 9 * d + 2 * 4 * d}
    layers = {"dense": 4 * 3 * d * f, "windows": 4 * 2 * 3 * d * f,
              "mixed": 3 * 2 * 3 * d * f + 3 * d * wide,
              "chunks": 2 * 2 * 3 * d * f + 2 * 3 * d * wide}
    seen = {"dense": 128, "windows": 32, "mixed": 128, "chunks": 80}
    for name, config in FAMILY.items():
        used = 4 * attention + layers[name] + small[name] + v * d
        assert step_flops(config, 3, 32) == 3 * (2 * used + seen[name] * at), name


def test_a_dense_model_on_a_laptop_reads_what_does_not_fit():
    big = replace(
        BASE, hardware="laptop", mesh=dict.fromkeys(BASE.mesh, 1), batch=1,
        weights=41 * 10**9, needs={"experts": 0.0, "dense blocks": 40e9, "cache": 1e9},
        collectives=[], unread=1e9,
    )
    memory = HARDWARE["laptop"].memory
    assert disk_bytes(big) == 40e9 + 2e9 - memory
    moe = replace(big, needs={"experts": 10e9, "attention": 5e9, "cache": 1e9})
    # So much is left for 35 GB of experts: one table of 1 GB is none.
    spare = memory - 5e9 - 2e9
    assert math.isclose(disk_bytes(moe), 10e9 * (1 - spare / 35e9))


def test_presets_in_bfloat16_weigh_two_bytes_a_parameter():
    for name, config in PRESETS.items():
        config, params = planning.weights_of(name)
        kinds = {type(w) for leaves in params.values() for w in leaves.values()}
        assert (QuantizedTensor in kinds) == (name == "grok-1")
        total, active = parameter_counts(config)
        held = device_bytes(on_mesh(params, config, abstract_mesh()))
        assert name == "grok-1" or 2 * total <= held < 2.01 * total
        assert active <= total


# Bounds.

BASE = Plan(
    model="m", hardware="h100", mesh={"data": 1, "expert": 1, "model": 8},
    batch=2, context=16, parameters=0, active=0, weights=40 * 10**9,
    cache=10**9, temporaries=10**9, compiler="CPU", arguments=0,
    needs={"experts": 9e9, "attention": 1e9, "cache": 1e9}, flops=1e9,
    collectives=[["all-reduce", 4, 1e6]],
)  # fmt: skip


def test_what_binds_is_what_takes_longest():
    assert fits(BASE) and bound(BASE) == ("memory", 2 / (11e9 / 3.35e12))
    busy = replace(BASE, flops=1e15)
    assert bound(busy) == ("arithmetic", 2 / (1e15 / 989e12))
    talkative = replace(BASE, collectives=[["all-reduce", 1, 4e9], ["x", 1, 5e9]])
    assert bound(talkative) == ("link", 2 / (9e9 / 450e9))


def test_temporaries_of_another_machine_are_not_counted():
    wide = replace(BASE, temporaries=50 * 10**9)
    assert fits(wide) and "not counted" in table(wide)
    assert "not compiled" in table(replace(wide, compiler=""))
    small = replace(wide, weights=10**9, hardware="laptop")
    assert not fits(small) and fits(replace(small, compiler=""))
    assert not fits(replace(wide, hardware="v5p", compiler="v5p:2x2x2",
                            temporaries=70 * 10**9))


def test_what_does_not_fit_comes_from_disk_or_not_at_all():
    large = replace(BASE, weights=100 * 10**9)
    assert not fits(large) and bound(large) == ("disk", 0.0)
    laptop = replace(large, hardware="laptop", collectives=[])
    # What 1 + 1 + 1 GB leave holds a part of 99 GB of experts.
    memory = HARDWARE["laptop"].memory
    share = (memory - 3e9) / 99e9
    assert math.isclose(disk_bytes(laptop), 9e9 * (1 - share))
    name, speed = bound(laptop)
    assert name == "disk" and math.isclose(speed, 2 * 7.45e9 / disk_bytes(laptop))
    needs = {**BASE.needs, "attention": 50e9}
    tight = replace(laptop, needs=needs)
    assert disk_bytes(tight) == 9e9 + 50e9 - (memory - 2e9)
    assert disk_bytes(BASE) == 0 and "disk" not in step_seconds(BASE)


def test_hardware_is_plausible():
    for machine in HARDWARE.values():
        assert machine.flops > machine.bandwidth > machine.link
        assert machine.bandwidth > machine.disk
        assert bool(machine.link) != bool(machine.disk)


def test_how_many_devices_hold_it():
    params = abstract_params(GROK, True)
    want = {"laptop": 1, "h100": 4, "v5e": 32, "v5p": 4, "v6e": 16}
    for name, devices in want.items():
        assert planning.fewest_devices(GROK, params, name, 1, 8192) == devices
    with pytest.raises(ValueError, match="512 devices of v5e do not hold it"):
        planning.fewest_devices(GROK, params, "v5e", 2**20, 8192)


# Plans.


def test_a_plan_without_a_compiler():
    """The record's figures, but for what only a compiler knows."""
    plan = make_plan("grok-1", GROK, abstract_params(GROK, True),
                     abstract_mesh(model=8), "v5p")
    old = recorded("v5p:2x2x2")
    same = replace(
        old, compiler="", compile_seconds=0.0, arguments=0, temporaries=0,
        collectives=[], moved=None,
    )
    assert plan == same and plan != old


def test_what_a_compiler_adds():
    """It takes as arguments what the plan says, and one token a row."""
    config, mesh = FAMILY["chunks"], make_mesh(2, 2, 2)
    plan = make_plan("tiny", config, abstract_params(config, True), mesh,
                     "h100", 2, 32, "CPU")
    extra = plan.arguments - plan.weights - plan.cache
    assert 0 <= extra <= 64 and plan.temporaries > 0
    assert {kind for kind, _, _ in plan.collectives} >= {"all-reduce"}
    assert plan.moved is None and plan.compile_seconds > 0
    for words in ["dense blocks", "experts", "fits", "all-reduce", "binds"]:
        assert words in table(plan)


# The slice that was compiled for: issue 3's figures.


def check_grok_on_eight(plan):
    params = on_mesh(abstract_params(GROK, True), GROK, abstract_mesh(model=8))
    weights = device_bytes(params)
    assert plan.weights == weights
    assert abs(plan.arguments - plan.cache - weights) < 0.01 * weights
    kinds = ("experts", "attention", "cache")
    assert plan.moved is not None
    assert 1 < plan.moved / sum(plan.needs[kind] for kind in kinds) < 1.15
    assert plan.moved < 1.05 * sum(plan.needs.values())
    assert fits(plan) and bound(plan)[0] == "memory"
    assert plan.temporaries < 0.1e9


def test_the_recorded_slice():
    check_grok_on_eight(recorded("v5p:2x2x2"))
    with pytest.raises(ValueError, match="no plan for v5p:9x9x9 was recorded"):
        recorded("v5p:9x9x9")


# The command line; how it answers what `argparse` refuses is in test_cli.


def asked(*words):
    parser = argparse.ArgumentParser()
    planning.add_plan_options(parser)
    return parser.parse_args(words)


def said(capsys, *words):
    planning.run_plan(asked(*words))
    out, err = capsys.readouterr()
    assert err == ""
    return out


needs_tpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="the extra `tpu` is not installed"
)


@needs_tpu
def test_the_slice_compiled_again(capsys):
    job = ["grok-1", "--topology", "v5p:2x2x2", "--json"]
    plan = Plan(**json.loads(said(capsys, *job)))
    check_grok_on_eight(plan)
    old = recorded("v5p:2x2x2")
    assert abs(plan.moved - old.moved) < 0.01 * old.moved
    assert plan.needs == old.needs
    sums = [size for p in (plan, old) for kind, _, size in p.collectives
            if kind == "all-reduce"]
    assert abs(sums[0] - sums[1]) < 0.01 * sums[1]


@needs_tpu
def test_copied_heads_do_not_copy_the_cache(capsys):
    job = ["grok-1", "--topology", "v5e:4x8", "--mesh", "2x16", "--json"]
    plan = json.loads(said(capsys, *job))
    assert plan["moved"] < 1.15 * sum(plan["needs"].values())


@needs_tpu
@pytest.mark.parametrize("name", ["v5p:3x3x3"])
def test_slices_that_do_not_exist(name):
    with pytest.raises(ValueError, match=f"no slice '{name}'"):
        planning.tpu_devices(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_slice_without_the_compiler():
    with pytest.raises(ValueError, match=r'pip install "annotated-moe\[tpu\]"'):
        planning.tpu_devices("v5p:2x2x2")
    with pytest.raises(ValueError, match=r"plan\.recorded\('v5p:2x2x2'\)$"):
        planning.tpu_devices("v5p:2x2x2")


def test_an_answer_counts_on_what_it_knows():
    """Temporaries of another compiler are a condition, not a silence."""
    eight = make_plan("x", GROK, abstract_params(GROK, True),
                      abstract_mesh(model=8), "h100", 64)
    lines = planning.memory_lines(eight)
    free = HARDWARE["h100"].memory - planning.held(eight)
    assert lines[-2][1].endswith(": fits, if the device's own compiler")
    assert lines[-1][1] == (
        f"takes less than {planning.amount(free)} of temporaries")
    known = planning.memory_lines(replace(eight, compiler="v5p:2x2x2"))
    assert known[-1][1].endswith(": fits")
    crowd = make_plan("x", GROK, abstract_params(GROK, True),
                      abstract_mesh(model=8), "h100", 512)
    assert planning.memory_lines(crowd)[-1][1].endswith("does not fit")


def test_a_plan_for_a_checkpoint(capsys):
    job = [SMALL, "--mesh", "2x4", "--batch", "4", "--context", "64"]
    text = said(capsys, *job)
    assert max(map(len, text.splitlines()[1:])) <= 72
    for words in ["8 x NVIDIA H100", "2 x 1 x 4 (data", "batch        4, 64 tokens",
                  "5.6 million, 2.1 million for a token",
                  "fits", "as compiled for CPU", "all-reduce", "binds"]:
        assert words in text
    plan = json.loads(said(capsys, *job, "--json"))
    model = am.load(mesh=am.make_mesh(2, 4))
    assert plan["weights"] == on_first(model.params)
    assert plan["parameters"] == parameter_counts(model.config)[0]
    assert Plan(**plan).mesh == {"data": 2, "expert": 1, "model": 4}


def test_a_plan_finds_how_many_devices(capsys):
    assert "1 x NVIDIA H100" in said(capsys, SMALL)
    text = said(capsys, SMALL, "--hardware", "laptop")
    assert "laptop" in text and "from disk" not in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["grok-9"], r"'grok-9' is neither a folder nor a preset; .* mean grok-1\?$"),
        (["xyzzy"], "'xyzzy' is neither a folder nor a preset; presets are grok-1"),
        ([SMALL, "--mesh", "8"], "--mesh must be DATAxMODEL or .*, not '8'"),
        ([SMALL, "--mesh", "0x8"], "--mesh must be DATAxMODEL"),
        (["grok-1", "--mesh", "1x6"], "a 1 x 1 x 6 mesh does not divide the model"),
        ([SMALL, "--mesh", "1x2", "--devices", "2"], "give one"),
        ([SMALL, "--devices", "0"], "--devices 0 asks for 0 devices: 1 to 512 can"),
        ([SMALL, "--mesh", "64x64"], "--mesh 64x64 asks for 4096 devices: 1 to 512"),
        (["grok-1", "--mesh", "1x3"], "model = 3 does not divide 8 key heads of "),
        (["grok-1", "--devices", "7"],
         "7 devices cannot share the model: --devices 3 or 4 or 6 or 8 would do"),
        (["grok-1", "--topology", "v5p:2x2x2", "--devices", "4"],
         "v5p:2x2x2 has 8 devices, and --devices 4 asks for 4"),
        (["grok-1", "--topology", "v5p:2x2x2", "--mesh", "1x2"],
         "v5p:2x2x2 has 8 devices, and --mesh 1x2 asks for 2"),
        ([SMALL, "--topology", "v5e:x"], "no topology 'v5e:x'"),
        ([SMALL, "--topology", "v5p:2x2"], "no topology 'v5p:2x2'"),
        ([SMALL, "--batch", "0"], "--batch must be 1 or more, not 0"),
        (["grok-1", "--context", "8193"], "--context must be 1 to 8192, not 8193"),
        ([SMALL, "--topology", "v9:2x2"], "no topology 'v9:2x2': write v5p:2x2x2"),
        ([SMALL, "--topology", "v5p"], "no topology 'v5p'"),
        ([SMALL, "--topology", "v6e:"], "no topology 'v6e:'"),
        ([SMALL, "--topology", "v5p:2x2x2", "--hardware", "h100"], "is no h100"),
        (["/"], "holds no checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        planning.plan_of(asked(*words))
    assert "\n" not in str(error.value)


def test_no_step_reads_what_only_images_need():
    plain = FAMILY["dense"]
    eyes = VisionSpec(d_model=plain.d_model, image_id=5)
    config, mesh = SeeingConfig(**vars(plain), vision=eyes), abstract_mesh()
    shapes = on_mesh(abstract_params(config), config, mesh)
    blind = on_mesh(abstract_params(plain), plain, mesh)
    others = record_specs(config.other_parameters)
    sight = device_bytes({m: shapes[m] for m in others})
    unread = planning.unread_bytes(blind, plain, 2)
    assert sight > 0
    assert math.isclose(planning.unread_bytes(shapes, config, 2), sight + unread)
    cache = abstract_cache(config, mesh, 2, 32)
    assert step_needs(shapes, cache, config, 2) == step_needs(blind, cache, plain, 2)


def test_a_twentieth_of_memory_is_spared(monkeypatch):
    params, mesh = abstract_params(GROK, True), abstract_mesh(model=4)
    size = device_bytes(on_mesh(params, GROK, mesh))
    size += cache_bytes(abstract_cache(GROK, mesh, 1, 8192))
    for share, devices in [(0.94, 4), (0.97, 8)]:
        tight = replace(HARDWARE["h100"], memory=size / share)
        monkeypatch.setitem(HARDWARE, "h100", tight)
        assert planning.fewest_devices(GROK, params, "h100", 1, 8192) == devices
