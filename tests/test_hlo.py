"""Compiled programs read: on small texts, and on what a compiler says."""

import functools

import jax
import jax.numpy as jnp
import pytest

from annotated_moe.families.grok import grok_config
from annotated_moe.hlo import (
    Collective,
    array_bytes,
    bytes_moved,
    collectives,
    devices_together,
    largest_movers,
    parse_program,
)
from annotated_moe.parallel import make_mesh
from annotated_moe.plan import (
    abstract_cache,
    abstract_params,
    compile_decode,
    on_mesh,
)

TINY = grok_config(
    vocab_size=64, context=32, d_model=64, d_ff=128, num_layers=3, q_heads=8,
    kv_heads=8, head_size=8, num_experts=4, embedding_multiplier=8.0,
)  # fmt: skip


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


# Collectives.


@pytest.mark.parametrize(
    "after, n",
    [
        ("channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, x=1", 2),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c'}, d={2}", 8),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'c'}", 4),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c':(2)2}, x=1", 4),
        ("replica_groups={}", 16),
    ],
)
def test_groups_of_devices(after, n):
    assert devices_together(after, 16) == n


def test_bytes_sent_around_a_ring():
    sent = [Collective(kind, 8, 100, 2.0).sent for kind in (
        "all-reduce", "all-gather", "reduce-scatter", "collective-permute")]
    assert sent == [350, 1400, 175, 200]
    assert Collective("all-reduce", 1, 100, 2.0).sent == 0

@functools.cache
def program(data, expert, model):
    """TINY's decode step on a mesh."""
    mesh = make_mesh(data=data, expert=expert, model=model)
    params = on_mesh(abstract_params(TINY, True), TINY, mesh)
    cache = abstract_cache(TINY, mesh, 1, 32)
    return compile_decode(TINY, params, cache, mesh).as_text()


def test_the_collectives_of_a_row_of_devices():
    """Counted by hand: two sums a layer, one of logits; the embedding."""
    found = list(collectives(program(1, 1, 8), 8, 2))
    assert {c.devices for c in found} == {8}
    sums = [c for c in found if c.kind == "all-reduce"]
    assert sum(c.times for c in sums) == 2 * TINY.num_layers + 1
    size = sum(c.times * c.bytes for c in sums)
    assert size == 4 * (2 * TINY.num_layers * TINY.d_model + TINY.vocab_size)
    others = [c for c in found if c.kind != "all-reduce"]
    assert sum(c.times for c in others) == 1
    assert all(4 * TINY.d_model // 8 >= c.bytes for c in others)


def test_experts_are_asked_as_often_as_the_data_says():
    """On two rows of `data` each expert sums its hidden features."""
    more = {n: sum(c.sent for c in collectives(program(2, 1, 4), 8, n))
            for n in (2, 3)}
    hidden = 128 // 4 * 4                               # [N, F_Y], float32
    assert more[3] - more[2] == 2 * TINY.num_layers * hidden * 2 * (2 - 1) / 2


def test_experts_apart_say_no_more_than_their_sum():
    """What a loop over asked experts sends does not grow with them."""
    sent = [sum(c.sent for c in collectives(program(1, 2, 4), 8, n))
            for n in (1, 4)]
    assert sent[0] == sent[1] > 0


def test_one_device_says_nothing():
    assert not list(collectives(program(1, 1, 1), 1))
