"""What Grok-1's experts move on eight v5p, one expert a device, by exchange.

    python scripts/experts_on_tpu.py > annotated_moe/plans/experts-v5p-2x2x2.json

Compiles router and experts of 64 layers for a slice that need not be there, and
reads the program; figures are a device's and a layer's. Wants the TPU compiler:
pip install "annotated-moe[tpu]".
"""

import json
import re
import sys
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import annotated_moe as am
from annotated_moe.config import all_places
from annotated_moe.hlo import bytes_moved, collectives, plain_bytes
from annotated_moe.model import DecoderLayer, constrain_residual, layer_weights
from annotated_moe.moe import block_rows
from annotated_moe.parallel import EXCHANGES, use_mesh
from annotated_moe.plan import (
    abstract_params,
    device_bytes,
    mesh_of,
    on_mesh,
    tpu_devices,
)

GROK = am.PRESETS["grok-1"]
(SLOT,) = all_places(GROK)
MOE, LAYERS, DEVICES = SLOT.spec.feed_forward, len(SLOT.layers), 8
NAMES = "moe", "router", "rms_norm_2", "rms_norm_3"


class OnlyExperts(DecoderLayer):
    @hk.transparent
    def attend(self, h, positions, cache, layer):
        return h, cache


def experts_of_all_layers(params, h, real):
    def body(h, index):
        weights = layer_weights(params, SLOT, GROK, index)

        def run():
            layer = OnlyExperts(SLOT.spec, GROK.dtype, SLOT.name)
            return layer(h, None, real, None, index)[0]

        h = hk.transform(run).apply(weights, None)
        return constrain_residual(h), None

    return jax.lax.scan(body, constrain_residual(h), jnp.arange(LAYERS))[0]


def sent_in(text: str, tokens: int, runs: float) -> dict[str, list]:
    """Kind -> [times, bytes that a device sends], a layer."""
    found: dict[str, list] = {}
    for one in collectives(text, DEVICES, runs):
        if one.times < LAYERS:  # before the loop or after it
            continue
        entry = found.setdefault(one.kind, [0.0, 0.0])
        entry[0] += one.times / LAYERS
        entry[1] += one.sent / LAYERS
    # Of a ragged one only the rows that are asked for: each of a device's
    # tokens goes to A of the devices, or comes back, and one in 8 stays.
    for shape in re.findall(r"= (\S+) ragged-all-to-all\(", text):
        rows = tokens / DEVICES * MOE.top_k * (1 - 1 / DEVICES)
        entry = found.setdefault("ragged-all-to-all", [0.0, 0.0])
        entry[0] += 1
        entry[1] += rows * plain_bytes(shape) / tokens
    return found


def compiled(mesh: Mesh, params, exchange: str, rows: int, tokens: int) -> dict:
    shape = rows, tokens // rows
    whole = NamedSharding(mesh, P())
    h = jax.ShapeDtypeStruct((*shape, GROK.d_model), jnp.float32, sharding=whole)
    real = jax.ShapeDtypeStruct(shape, bool, sharding=whole)
    with use_mesh(mesh, exchange):
        # A new function each time: jit remembers what it traced.
        program = (
            jax.jit(partial(experts_of_all_layers)).lower(params, h, real).compile()
        )
    text = program.as_text()
    mean = -(-tokens * MOE.top_k // MOE.num_experts)
    runs = -(-mean // block_rows(tokens, MOE.top_k, 1))
    apart = exchange != "sum" and rows % DEVICES == 0
    stream = 2 * tokens * GROK.d_model * 4 / (DEVICES if apart else 1)
    return {
        "exchange": exchange,
        "tokens": tokens,
        "rows": rows,
        "weights": device_bytes(params) / LAYERS,
        "stream": stream,
        "runs": runs,
        "moved": bytes_moved(text, runs) / LAYERS,
        "sent": sent_in(text, tokens, runs),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = mesh_of(tpu_devices("v5p:2x2x2"), expert=DEVICES)
    params = on_mesh(abstract_params(GROK, True), GROK, mesh)
    params = {
        m: w
        for m, w in params.items()
        if m.startswith("decoder_layer") and any(name in m.split("/") for name in NAMES)
    }
    found = []
    for tokens, rows in ((1, 1), (1024, 8)):
        for exchange in EXCHANGES:
            found.append(compiled(mesh, params, exchange, rows, tokens))
            print(found[-1], file=sys.stderr)
    json.dump(found, sys.stdout, indent=1)
    print()


main()
