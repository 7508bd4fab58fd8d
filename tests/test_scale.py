"""Plans: what a device holds, reads and sends, counted in two ways."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import annotated_moe as am
from annotated_moe import checkpoints, cli, scale
from annotated_moe.model import PRESETS, ModelConfig, init_cache, init_params
from annotated_moe.scale import (
    HARDWARE,
    Exchange,
    Plan,
    array_bytes,
    bound,
    busy_experts,
    bytes_moved,
    compile_decode,
    device_bytes,
    disk_bytes,
    empty_cache,
    exchanges,
    fits,
    group_size,
    largest_movers,
    on_mesh,
    parse_program,
    published,
    recorded,
    step_flops,
    step_needs,
    step_seconds,
)

GROK = PRESETS["grok-1"]
TINY = ModelConfig(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=3, q_heads=8,
    kv_heads=8, head_size=8, num_experts=4, embedding_multiplier=8.0,
)  # fmt: skip
SMALL = str(checkpoints.small_model())


def abstract(data, model):
    return AbstractMesh((data, model), ("data", "model"))


# Bytes moved, on programs small enough to count by hand.

HEAD = "HloModule tiny, is_scheduled=true\n\n"
SLICE = """%fused (p.0: f32[64,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[64,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero)
  ROOT %flat = f32[8,128]{1,0} bitcast(%cut)
}

"""
MAIN = """ENTRY %main (a: f32[64,8,128], i: s32[]) -> f32[8,128] {
  %a = f32[64,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[8,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused
}
"""


def test_a_fused_slice_reads_what_it_returns():
    assert bytes_moved(HEAD + SLICE + MAIN) == 2 * 8 * 128 * 4 + 4


def test_a_slice_that_stands_alone_is_read_and_written():
    text = """ENTRY %main (a: s8[64,256], i: s32[]) -> bf16[1,256] {
  %a = s8[64,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %cut = s8[1,256]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,256}
  ROOT %wide = bf16[1,256]{1,0} convert(%cut)
}
"""
    assert bytes_moved(HEAD + text) == (256 + 256) + (256 + 512)


def test_what_a_fusion_uses_otherwise_it_reads_whole():
    both = SLICE.replace("bitcast(%cut)", "add(%cut, %p.0)")
    assert bytes_moved(HEAD + both + MAIN) == 64 * 8 * 128 * 4 + 4 + 8 * 128 * 4


UPDATE = """%put (p.0: f32[64,128], p.1: f32[1,128], p.2: s32[]) -> f32[64,128] {
  %p.0 = f32[64,128]{1,0} parameter(0)
  %p.1 = f32[1,128]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2)
}

ENTRY %main (a: f32[64,128], b: f32[1,128], i: s32[]) -> f32[64,128] {
  %a = f32[64,128]{1,0} parameter(0)
  %b = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = f32[64,128]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%put
}
"""


def test_an_update_in_place_moves_what_is_new():
    assert bytes_moved(HEAD + UPDATE) == 2 * 128 * 4 + 4
    plain = UPDATE.replace("fusion(%a, %b, %i)", "dynamic-update-slice(%a, %b, %i)")
    assert bytes_moved(HEAD + plain) == 2 * 128 * 4
    copied = UPDATE.replace("fusion(%a, %b, %i)", "copy(%a)")
    assert bytes_moved(HEAD + copied) == 2 * 64 * 128 * 4


LOOP = """%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %y = f32[8]{0} negate(%x)
  %n = s32[] get-tuple-element(%s), index=0
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %y)
}

%test (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %m = s32[] LIMIT
  ROOT %less = pred[] compare(%n, %m), direction=LT
}

ENTRY %main (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%s), condition=%test, body=%body
}
"""


def test_loops_count_as_often_as_they_run():
    fixed = HEAD + LOOP.replace("LIMIT", "constant(64)")
    assert bytes_moved(fixed) == bytes_moved(fixed, 7) == 64 * 64
    known = fixed.replace("body=%body", 'body=%body, x={"known_trip_count":{"n":"5"}}')
    assert bytes_moved(known) == 5 * 64
    asked = HEAD + LOOP.replace("LIMIT", "get-tuple-element(%s), index=0")
    assert bytes_moved(asked) == 64 and bytes_moved(asked, 2.5) == 160


def test_tiles_are_padded_and_other_memories_are_free():
    assert array_bytes("f32", "3,130", "1,0", "T(8,128)") == 8 * 256 * 4
    assert array_bytes("f32", "130,3", "0,1", "T(8,128)") == 8 * 256 * 4
    assert array_bytes("bf16", "2,5", "1,0", "T(8,128)(2,1)") == 8 * 128 * 2
    assert array_bytes("s8", "6144,4096", "1,0", "T(32,128)(4,1)") == 6144 * 4096
    assert array_bytes("f32", "3,130", "1,0", "T(8,128)S(1)") == 0
    assert array_bytes("pred", "", "", "") == 1
    text = """ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0:T(256)} parameter(0)
  %s = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]) copy-start(%a)
  %d = f32[256]{0:T(256)S(1)} copy-done(%s)
  ROOT %n = f32[256]{0:T(256)} negate(%d)
}
"""
    assert bytes_moved(HEAD + text) == 1024 + 1024


def test_a_compiled_product_moves_its_operands_and_its_result():
    a, b = jnp.zeros([48, 512]), jnp.zeros([512, 40])
    text = jax.jit(jnp.dot).lower(a, b).compile().as_text()
    assert bytes_moved(text) == 4 * (48 * 512 + 512 * 40 + 48 * 40)
    size, _, shape = largest_movers(text)[0]
    assert size <= bytes_moved(text) and "f32" in shape


@pytest.mark.parametrize("text", ["", "HloModule x\n", "%f () -> f32[] {\n}\n"])
def test_text_that_is_no_program(text):
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        parse_program(text)


# Exchanges.


@pytest.mark.parametrize(
    "after, n",
    [
        ("channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, x=1", 2),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c'}, d={2}", 8),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'c'}", 4),
        ("replica_groups={}", 16),
    ],
)
def test_groups_of_devices(after, n):
    assert group_size(after, 16) == n


def test_bytes_sent_around_a_ring():
    sent = [Exchange(kind, 8, 100, 2.0).sent for kind in (
        "all-reduce", "all-gather", "reduce-scatter", "collective-permute")]
    assert sent == [350, 1400, 175, 200]
    assert Exchange("all-reduce", 1, 100, 2.0).sent == 0


@pytest.fixture(scope="module")
def programs():
    """TINY's decode step on three meshes."""
    found = {}
    for shape in [(1, 8), (2, 4), (1, 1)]:
        mesh = am.make_mesh(*shape)
        params = on_mesh(published(TINY), mesh, TINY.dtype)
        cache = empty_cache(TINY, mesh, 1, 32)
        found[shape] = compile_decode(TINY, params, cache, mesh).as_text()
    return found


def test_the_exchanges_of_a_row_of_devices(programs):
    """Counted by hand: two sums a layer, one of logits."""
    found = list(exchanges(programs[1, 8], 8, 2))
    assert {e.devices for e in found} == {8}
    sums = [e for e in found if e.kind == "all-reduce"]
    wide = [e for e in sums if e.bytes >= 4 * 64]
    count = sum(e.times for e in wide)
    size = sum(e.times * e.bytes for e in wide)
    assert count == 2 * TINY.num_layers + 1
    assert size == 4 * (2 * TINY.num_layers * TINY.d_model + TINY.vocab_size)


def test_experts_are_asked_as_often_as_the_data_says(programs):
    """On two rows of `data` each expert sums its hidden features."""
    more = {n: sum(e.sent for e in exchanges(programs[2, 4], 8, n)) for n in (2, 3)}
    hidden = TINY.d_ff // 4 * 4                         # [N, F_Y], float32
    assert more[3] - more[2] == 2 * TINY.num_layers * hidden * 2 * (2 - 1) / 2


def test_one_device_says_nothing(programs):
    assert not list(exchanges(programs[1, 1], 1))


# What a device holds.


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_where_the_loader_puts_them(shape, dtype):
    mesh = am.make_mesh(*shape)
    there = am.load(mesh=mesh, dtype=dtype).params
    _, params = scale.model_named(SMALL)
    plan = on_mesh(params, mesh, dtype)
    assert jax.tree.structure(dict(there)) == jax.tree.structure(dict(plan))
    for a, s in zip(jax.tree.leaves(there), jax.tree.leaves(plan)):
        assert (a.shape, a.dtype) == (s.shape, s.dtype)
        assert a.sharding.is_equivalent_to(s.sharding, a.ndim)
    first = jax.devices()[0]
    held = [b.data.nbytes for a in jax.tree.leaves(there)
            for b in a.addressable_shards if b.device == first]
    assert device_bytes(plan) == sum(held)


@pytest.fixture(scope="module")
def real():
    """TINY with two groups of scales."""
    make = jax.jit(lambda key: checkpoints.quantize_params(
        dict(init_params(key, TINY)), groups=2))
    return make(jax.random.key(0))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
def test_groups_that_are_fewer_than_devices(shape, real):
    """Scales are repeated as the loader would repeat real ones."""
    mesh = am.make_mesh(*shape)
    plan = on_mesh(scale.abstract(real), mesh, "bfloat16")
    for path in ["moe/linear_1", "multi_head_attention/linear"]:
        w = checkpoints.place(
            f"decoder_layer/{path}/w", real[f"decoder_layer/{path}"]["w"],
            mesh, "bfloat16",
        )
        s = plan[f"decoder_layer/{path}"]["w"]
        assert s.scales.shape == w.scales.shape
        assert w.scales.sharding.is_equivalent_to(s.scales.sharding, w.scales.ndim)
    assert plan["decoder_layer/moe/linear_1"]["w"].scales.shape[-2] == max(2, shape[1])


@pytest.mark.parametrize("shape, batch", [((1, 8), 1), ((2, 4), 4), ((2, 4), 3)])
def test_the_cache_is_where_the_model_puts_it(shape, batch):
    mesh = am.make_mesh(*shape)
    with jax.set_mesh(mesh):
        there = init_cache(TINY, batch, 32)
    plan = empty_cache(TINY, mesh, batch, 32)
    for a, s in zip(jax.tree.leaves(there), jax.tree.leaves(plan)):
        assert (a.shape, a.dtype) == (s.shape, s.dtype)
        assert a.sharding.is_equivalent_to(s.sharding, a.ndim)


def test_grok_1_on_meshes_that_are_not_there():
    sizes = {}
    for shape in [(1, 1), (1, 4), (1, 8), (4, 8), (2, 16)]:
        sizes[shape] = device_bytes(on_mesh(published(GROK), abstract(*shape),
                                            "bfloat16"))
    assert round(sizes[1, 1] / 1e9) == 317
    assert round(sizes[1, 8] / 1e9, 1) == 39.6
    assert abs(sizes[2, 16] / sizes[4, 8] - 1) < 0.001
    assert sizes[4, 8] * 31 < sizes[1, 1] < sizes[4, 8] * 32


@pytest.mark.parametrize("shape", [(1, 6), (5, 1), (1, 48), (5, 8)])
def test_a_mesh_that_does_not_divide(shape):
    with pytest.raises(ValueError, match=r"does not divide \w+/.*choose data and"):
        on_mesh(published(GROK), abstract(*shape), "bfloat16")


# What a step needs.


def test_a_step_reads_two_experts_of_eight():
    mesh = am.make_mesh(1, 8)
    params = on_mesh(published(GROK), mesh, "bfloat16")
    cache = empty_cache(GROK, mesh, 1, 8192)
    needs = step_needs(params, cache, GROK, 1)
    weights = 64 * 2 * 3 * 6144 * 32768
    scales = 64 * 2 * (2 * 32768 + 8 * 6144) * 2
    assert needs["experts"] == (weights + scales) / 8
    assert needs["cache"] == 8192 * 256 * 1024 / 8
    assert needs["embedding"] == 131072 * 6144 * 2 / 8
    small = (257 + 8 * 64) * 6144 * 4
    assert needs["router and norms"] == small
    all_of_it = device_bytes(params)
    idle = needs["experts"] * 3
    assert sum(needs.values()) == all_of_it - idle + needs["cache"]


def test_more_rows_ask_more_experts():
    rng = np.random.default_rng(0)
    for batch in [1, 2, 5, 20]:
        draws = rng.random([4000, batch, 8]).argsort(-1)[..., :2]
        seen = np.mean([len(np.unique(d)) for d in draws])
        assert abs(busy_experts(GROK, batch) - seen) < 0.05
    assert busy_experts(GROK, 1) == 2
    assert busy_experts(replace(GROK, num_experts=1), 9) == 1


def test_operations_of_a_step():
    _, active = checkpoints.parameter_counts(GROK)
    attention = 4 * 64 * 48 * 128
    assert step_flops(GROK, 3, 100) == 3 * (2 * active + 100 * attention)


# Families.

LIKE = replace(
    TINY, num_layers=4, embedding_multiplier=1.0, output_multiplier=1.0,
    attn_softcap=None, post_norm=False, activation="silu", tied=False,
)  # fmt: skip
FAMILY = {
    "llama": replace(LIKE, num_experts=1, top_k=1, attn_bias=True, mlp_bias=True),
    "mixtral": replace(LIKE, router="top_k_softmax", attn_window=8),
    "qwen": replace(LIKE, qk_norm="head", dense_layers=(1,), dense_ff=192, tied=True),
    "llama4": replace(
        LIKE, router="sigmoid_input", top_k=1, moe_every=2, dense_ff=192,
        shared_expert=True, nope_every=4, attn_chunk=16, attn_temperature=(8, 0.1),
    ),
}  # fmt: skip


def on_first(tree):
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    return sum(shard.data.nbytes for a in jax.tree.leaves(tree)
               for shard in a.addressable_shards if shard.device == first)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_step_of_every_family_against_real_arrays(name, eight_bits):
    config, mesh = FAMILY[name], am.make_mesh(2, 4)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype),
                          published(config, eight_bits))
    plan = on_mesh(published(config, eight_bits), mesh, "bfloat16")
    sizes = {}
    for module, leaves in params.items():
        for leaf, w in leaves.items():
            path = f"{module}/{leaf}"
            there = checkpoints.place(path, w, mesh, "bfloat16")
            sizes[path] = on_first(there)
            assert device_bytes(plan[module][leaf]) == sizes[path], path
    with jax.set_mesh(mesh):
        cache = init_cache(config, 2, 32)
    abstract_cache = empty_cache(config, mesh, 2, 32)
    needs = step_needs(plan, abstract_cache, config, 2)
    held = on_first(replace(cache, length=None))
    assert needs["cache"] == scale.cache_bytes(abstract_cache) == held
    chosen = sum(n for path, n in sizes.items() if "/moe/" in path)
    skipped = chosen * (1 - busy_experts(config, 2) / config.num_experts)
    table = sizes["in_out_embed/embeddings"]
    unread = 0 if config.tied else table * 62 / 64
    assert math.isclose(
        sum(needs.values()), sum(sizes.values()) - skipped - unread + held
    )
    assert (needs["experts"] == 0) == (name == "llama")
    assert ("dense blocks" in needs) == (name != "mixtral")


def test_caches_hold_what_layers_see():
    """Of 32 slots: windows of 8 in all layers, chunks of 16 in three of four."""
    mesh = am.make_mesh(1, 1)
    slots = {name: scale.cache_bytes(empty_cache(c, mesh, 1, 32)) // (2 * 2 * 8 * 8)
             for name, c in FAMILY.items()}
    assert slots == {"llama": 128, "qwen": 128, "mixtral": 32, "llama4": 80}


def test_operations_of_families():
    """By hand: every matrix twice, attention over what is seen."""
    d, f, wide, v, head = 64, 128, 192, 64, 8
    attention = 4 * d * 64
    at = 4 * 64                                         # a slot of a layer
    small = {"llama": 9 * d + 4 * (3 * 64 + d + 2 * f + d),
             "mixtral": 9 * d + 4 * 4 * d,
             "qwen": 9 * d + 4 * 2 * head + 3 * 4 * d, "llama4": 9 * d + 2 * 4 * d}
    layers = {"llama": 4 * 3 * d * f, "mixtral": 4 * 2 * 3 * d * f,
              "qwen": 3 * 2 * 3 * d * f + 3 * d * wide,
              "llama4": 2 * 2 * 3 * d * f + 2 * 3 * d * wide}
    seen = {"llama": 128, "mixtral": 32, "qwen": 128, "llama4": 80}
    for name, config in FAMILY.items():
        used = 4 * attention + layers[name] + small[name] + v * d
        assert step_flops(config, 3, 32) == 3 * (2 * used + seen[name] * at)


def test_a_dense_model_on_a_laptop_reads_what_does_not_fit():
    big = Plan(
        model="m", hardware="laptop", mesh=(1, 1), batch=1, context=16, parameters=0,
        active=0, weights=41 * 10**9, cache=10**9, temporaries=10**9, compiler="CPU",
        arguments=0, needs={"experts": 0.0, "dense blocks": 40e9, "cache": 1e9},
        flops=1e9, exchanges=[], unread=1e9,
    )  # fmt: skip
    assert disk_bytes(big) == 40e9 + 2e9 - 32e9
    moe = replace(big, needs={"experts": 10e9, "attention": 5e9, "cache": 1e9})
    # 32 - 5 - 2 = 25 GB hold some of 35: one table of 1 GB is no expert.
    assert math.isclose(disk_bytes(moe), 10e9 * (1 - 25 / 35))


def test_presets_come_as_they_were_published():
    for name, config in PRESETS.items():
        params = scale.model_named(name)[1]
        w = params["decoder_layer/multi_head_attention/query"]["w"]
        assert isinstance(w, am.QuantizedTensor) == (name == "grok-1")
        total, _ = checkpoints.parameter_counts(config)
        held = device_bytes(on_mesh(params, abstract(1, 1), "bfloat16"))
        assert name == "grok-1" or 2 * total <= held < 2.01 * total


def test_a_plan_for_a_family(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny-4", FAMILY["llama4"])
    text = said(capsys, "tiny-4", "--mesh", "2x4", "--batch", "2")
    for words in ["dense blocks", "experts", "fits", "all-reduce", "binds"]:
        assert words in text


# Bounds.

BASE = Plan(
    model="m", hardware="h100", mesh=(1, 8), batch=2, context=16, parameters=0,
    active=0, weights=40 * 10**9, cache=10**9, temporaries=10**9, compiler="CPU",
    arguments=0, needs={"experts": 9e9, "attention": 1e9, "cache": 1e9}, flops=1e9,
    exchanges=[["all-reduce", 4, 1e6]],
)  # fmt: skip


def test_what_binds_is_what_takes_longest():
    assert fits(BASE) and bound(BASE) == ("memory", 2 / (11e9 / 3.35e12))
    busy = replace(BASE, flops=1e15)
    assert bound(busy) == ("arithmetic", 2 / (1e15 / 989e12))
    talkative = replace(BASE, exchanges=[["all-reduce", 1, 4e9], ["x", 1, 5e9]])
    assert bound(talkative) == ("link", 2 / (9e9 / 450e9))


def test_temporaries_of_another_machine_are_not_counted():
    wide = replace(BASE, temporaries=50 * 10**9)
    assert fits(wide) and "not counted" in scale.table(wide)
    assert not fits(replace(wide, hardware="laptop"))
    assert not fits(replace(wide, hardware="v5p", compiler="v5p:2x2x2",
                            temporaries=70 * 10**9))


def test_what_does_not_fit_comes_from_disk_or_not_at_all():
    large = replace(BASE, weights=100 * 10**9)
    assert not fits(large) and bound(large) == ("disk", 0.0)
    laptop = replace(large, hardware="laptop", exchanges=[])
    # 32 - 1 - 1 - 1 = 29 GB hold some of 99 GB of experts.
    assert math.isclose(disk_bytes(laptop), 9e9 * (1 - 29 / 99))
    name, speed = bound(laptop)
    assert name == "disk" and math.isclose(speed, 2 * 7.45e9 / disk_bytes(laptop))
    needs = {**BASE.needs, "attention": 50e9}
    tight = replace(laptop, needs=needs)
    assert disk_bytes(tight) == 9e9 + 50e9 - 30e9
    assert disk_bytes(BASE) == 0 and "disk" not in step_seconds(BASE)


def test_hardware_is_plausible():
    for machine in HARDWARE.values():
        assert machine.ops8 > machine.flops > machine.bandwidth > machine.link
        assert bool(machine.link) != bool(machine.disk)


# The slice that was compiled for: issue 3's figures.


def check_grok_on_eight(plan):
    mesh = abstract(1, 8)
    weights = device_bytes(on_mesh(published(GROK), mesh, "bfloat16"))
    assert plan.weights == weights
    assert abs(plan.arguments - plan.cache - weights) < 0.01 * weights
    kinds = ("experts", "attention", "cache")
    assert plan.moved is not None
    assert 1 < plan.moved / sum(plan.needs[kind] for kind in kinds) < 1.15
    assert fits(plan) and bound(plan)[0] == "memory"
    assert plan.temporaries < 0.1e9


def test_the_recorded_slice():
    check_grok_on_eight(recorded("v5p:2x2x2"))
    with pytest.raises(ValueError, match="no plan for v5p:9x9x9 was recorded"):
        recorded("v5p:9x9x9")


needs_tpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="the extra `tpu` is not installed"
)


@needs_tpu
def test_the_slice_compiled_again(capsys):
    job = ["plan", "grok-1", "--topology", "v5p:2x2x2", "--json"]
    assert cli.main(job) == 0
    plan = json.loads(capsys.readouterr().out)
    plan = Plan(**{**plan, "mesh": tuple(plan["mesh"])})
    check_grok_on_eight(plan)
    old = recorded("v5p:2x2x2")
    assert abs(plan.moved - old.moved) < 0.01 * old.moved
    assert plan.needs == old.needs
    sums = [size for p in (plan, old) for kind, _, size in p.exchanges
            if kind == "all-reduce"]
    assert abs(sums[0] - sums[1]) < 0.01 * sums[1]


@needs_tpu
def test_copied_heads_do_not_copy_the_cache(capsys):
    job = ["plan", "grok-1", "--topology", "v5e:4x8", "--mesh", "2x16", "--json"]
    assert cli.main(job) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["moved"] < 1.15 * sum(plan["needs"].values())


@needs_tpu
@pytest.mark.parametrize("name", ["v5p:3x3x3", "v5e:x", "v6e:"])
def test_slices_that_do_not_exist(name):
    with pytest.raises(ValueError, match=f"no slice '{name}'"):
        scale.tpu_devices(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_slice_without_the_compiler():
    with pytest.raises(ValueError, match=r'pip install "annotated-moe\[tpu\]"'):
        scale.tpu_devices("v5p:2x2x2")


# The command line.


def said(capsys, *words):
    code = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    assert code == 0 and err == ""
    return out


def test_a_plan_for_a_checkpoint(capsys):
    job = [SMALL, "--mesh", "2x4", "--batch", "4", "--context", "64"]
    text = said(capsys, *job)
    assert max(map(len, text.splitlines()[1:])) <= 72
    for words in ["8 x NVIDIA H100", "2 x 4 (data", "rows         4, 64 tokens",
                  "5.6 million, 2.1 million for a token",
                  "fits", "as compiled for CPU", "all-reduce", "binds"]:
        assert words in text
    plan = json.loads(said(capsys, *job, "--json"))
    model = am.load(mesh=am.make_mesh(2, 4))
    held = [b.data.nbytes for a in jax.tree.leaves(model.params)
            for b in a.addressable_shards if b.device.id == 0]
    assert plan["weights"] == sum(held)
    assert plan["parameters"] == checkpoints.parameter_counts(model.config)[0]


def test_a_plan_finds_how_many_devices(capsys):
    assert "1 x NVIDIA H100" in said(capsys, SMALL)
    text = said(capsys, SMALL, "--hardware", "laptop")
    assert "laptop" in text and "from disk" not in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["grok-9"], "'grok-9' is neither a folder nor a preset; presets are grok-1"),
        ([SMALL, "--hardware", "abacus"], "invalid choice: 'abacus'"),
        ([SMALL, "--mesh", "8"], "--mesh must be DATAxMODEL such as 1x8, not '8'"),
        ([SMALL, "--mesh", "0x8"], "--mesh must be DATAxMODEL"),
        (["grok-1", "--mesh", "1x6"], "a 1 x 6 mesh does not divide"),
        ([SMALL, "--mesh", "1x2", "--devices", "2"], "give one"),
        ([SMALL, "--devices", "0"], "--devices must be 1 to 512, not 0"),
        ([SMALL, "--mesh", "64x64"], "--devices must be 1 to 512, not 4096"),
        ([SMALL, "--batch", "0"], "--batch must be 1 or more, not 0"),
        (["grok-1", "--context", "8193"], "--context must be 1 to 8192, not 8193"),
        ([SMALL, "--topology", "v9:2x2"], "no topology 'v9:2x2': write v5p:2x2x2"),
        ([SMALL, "--topology", "v5p"], "no topology 'v5p'"),
        ([SMALL, "--topology", "v5p:2x2x2", "--hardware", "h100"], "is no h100"),
        (["/"], "holds neither"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    try:
        code = cli.main(["plan", *words])
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert sentence in err
