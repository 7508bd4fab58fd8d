# Generated from book/chapters/13_plan.md, book/chapters/24_comparisons.md, book/chapters/92_hlo.md by `make sync`; edit the chapters.
"""The first time Grok-1's decode step was compiled for a slice of eight
TPUs, each of them moved 116 GB to make one token. It should have moved
11. Nothing was wrong: each logit came out right to the last bit, and
every test passed. It was only ten times too slow, and nobody could have
known, because nobody had said what a token must cost. By the end of
this chapter you can say it, for any model on any machine and before the
first byte is downloaded: what each device holds, what it must read for
a token, and how many tokens a second that allows at most.
"""

import argparse
import difflib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from annotated_moe.cache import CACHE_KINDS, CacheKind
from annotated_moe.checkpoints import (
    counts_near,
    groups_for,
    indivisible,
    open_checkpoint,
)
from annotated_moe.config import ModelConfig, all_places
from annotated_moe.families import PRESETS
from annotated_moe.hlo import bytes_moved, collectives, plain_bytes
from annotated_moe.model import (
    Cache,
    Params,
    constrain_residual,
    decode_step,
    flat_specs,
    head_table,
    init_cache,
    layer_weights,
    param_specs,
    place_params,
)
from annotated_moe.moe import MoESpec, capacity
from annotated_moe.parallel import (
    EXCHANGES,
    FEW,
    AnyMesh,
    fit_spec,
    group_repeats,
    partition_spec,
    partition_specs,
    shardings,
    use_mesh,
)
from annotated_moe.params import ParamSpec, record_specs
from annotated_moe.quantization import QuantizedTensor


# %% book/chapters/13_plan.md, cell 9
@dataclass(frozen=True)
class Hardware:
    """What one device can do, by its maker's data sheet.

    Bytes, bytes a second, operations a second; 0 where there is none.
    """

    about: str
    memory: float
    bandwidth: float                        # of that memory
    flops: float                            # bfloat16, dense
    link: float = 0.0                       # to other devices, one way
    disk: float = 0.0                       # sequential reads


# %% book/chapters/13_plan.md, cell 10
GIB = 2.0**30

HARDWARE = {
    "laptop": Hardware("laptop: 8 Zen 4 cores, DDR5-5600, NVMe",
                       24 * GIB, 89.6e9, 1.95e12, disk=7.45e9),
    "h100": Hardware("NVIDIA H100 SXM", 85.5e9, 3.35e12, 989e12, 450e9),
    "v5e": Hardware("TPU v5e", 16 * GIB, 819e9, 197e12, 200e9),
    "v5p": Hardware("TPU v5p", 95 * GIB, 2765e9, 459e12, 600e9),
    "v6e": Hardware("TPU v6e", 32 * GIB, 1638e9, 918e12, 400e9),
}


# %% book/chapters/13_plan.md, cell 14
def kind_of(spec: ParamSpec) -> str:
    """Which part of a model a parameter belongs to, by its axes."""
    if "experts" in spec.axes:
        return "experts"
    if "vocab" in spec.axes:
        return "embedding"
    if "heads" in spec.axes or "kv_heads" in spec.axes:
        return "attention"
    return "dense blocks" if "mlp" in spec.axes else "router and norms"


# %% book/chapters/13_plan.md, cell 15
def parameter_kinds(config: ModelConfig) -> dict[tuple[str, str], str]:
    """(module, name) -> kind; two kinds are known by their use alone.

    A "lookup table" is an embedding that nothing is multiplied by, and
    "other inputs" are read for what is not text.
    """
    head = head_table(param_specs(config), config)
    others = record_specs(config.other_parameters)
    kinds = {}
    for (module, name), spec in flat_specs(config).items():
        kind = kind_of(spec)
        if kind == "embedding" and spec is not head:
            kind = "lookup table"
        if module in others:
            kind = "other inputs"
        kinds[module, name] = kind
    return kinds


# %% book/chapters/13_plan.md, cell 16
def experts_of(config: ModelConfig) -> dict[str, MoESpec]:
    """Module -> the experts of its layer, where there are any."""
    return {
        module: place.spec.feed_forward
        for place in all_places(config)
        for module in place_params(param_specs(config), place)
        if isinstance(place.spec.feed_forward, MoESpec)
    }


# %% book/chapters/13_plan.md, cell 17
def token_weights(config: ModelConfig) -> dict[str, int]:
    """Kind -> how many weights of it one token makes use of."""
    experts, counts = experts_of(config), dict[str, int]()
    kinds = parameter_kinds(config)
    for (module, name), spec in flat_specs(config).items():
        size, kind = math.prod(spec.shape), kinds[module, name]
        if kind == "experts":
            moe = experts[module]
            size = size // moe.num_experts * moe.top_k
        counts[kind] = counts.get(kind, 0) + size
    return counts


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token makes use of."""
    specs = flat_specs(config).values()
    total = sum(math.prod(spec.shape) for spec in specs)
    return total, sum(token_weights(config).values())


# %% book/chapters/13_plan.md, cell 20
def abstract_weight(
    spec: ParamSpec, dtype: Any, groups: int | None = None
) -> Any:
    """A weight without numbers; with `groups` of scales, in int8."""
    if groups is None:
        kind = "float32" if spec.float32 else dtype
        return jax.ShapeDtypeStruct(spec.shape, kind)
    *lead, _, f = spec.shape
    return QuantizedTensor(
        jax.ShapeDtypeStruct(spec.shape, jnp.int8),
        jax.ShapeDtypeStruct((*lead, groups, f), jnp.bfloat16),
    )


# %% book/chapters/13_plan.md, cell 21
def abstract_params(
    config: ModelConfig, eight_bits: bool = False
) -> Params:
    """Every weight without its numbers, matrices in 8 bits if asked.

    Those in 8 bits have the groups of scales that Grok-1's have.
    Beside them its table is in float32; others publish 16 bits.
    """
    def one(spec: ParamSpec) -> Any:
        if "vocab" in spec.axes and not eight_bits:
            spec = replace(spec, float32=False)
        small = eight_bits and spec.matrix
        groups = groups_for(spec) if small else None
        return abstract_weight(spec, config.dtype, groups)

    return {
        module: {name: one(spec) for name, spec in leaves.items()}
        for module, leaves in param_specs(config).items()
    }


# %% book/chapters/13_plan.md, cell 22
def abstract_mesh(
    data: int = 1, model: int = 1, expert: int = 1
) -> AbstractMesh:
    """`make_mesh` of devices that need not be there."""
    names = "data", "expert", "model"
    auto = (AxisType.Auto,) * 3
    return AbstractMesh((data, expert, model), names, axis_types=auto)


# %% book/chapters/13_plan.md, cell 23
def check_divides(config: ModelConfig, mesh: AnyMesh) -> None:
    """ValueError for a mesh that `load` would refuse."""
    if wrong := indivisible(config, dict(mesh.shape)):
        raise ValueError(
            f"a {mesh_text(mesh.shape)} mesh does not divide the model:"
            f" {wrong}"
        )


def mesh_text(sizes: Any) -> str:
    """Sizes by name as text: 1 x 1 x 8."""
    return " x ".join(str(size) for size in sizes.values())


# %% book/chapters/13_plan.md, cell 24
def repeat_scales(w: Any, spec: ParamSpec, mesh: AnyMesh) -> Any:
    """`w` with as many scales as `fit_groups` would give it."""
    if not isinstance(w, QuantizedTensor):
        return w
    times = group_repeats(w, partition_spec(spec.axes), mesh)
    *lead, groups, f = w.scales.shape
    shape = (*lead, times * groups, f)
    scales = jax.ShapeDtypeStruct(shape, w.scales.dtype)
    return QuantizedTensor(w.weight, scales)


# %% book/chapters/13_plan.md, cell 25
def with_shardings(tree: Any, where: Any) -> Any:
    """Shapes and dtypes, told where their arrays would lie."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        tree, where,
    )


def on_mesh(
    params: Params, config: ModelConfig, mesh: AnyMesh
) -> Params:
    """Weights as `load` would place them: shapes, dtypes, shardings.

    ValueError when the mesh does not divide a weight.
    """
    check_divides(config, mesh)
    specs = param_specs(config)
    fitted = {
        module: {
            name: repeat_scales(w, specs[module][name], mesh)
            for name, w in leaves.items()
        }
        for module, leaves in params.items()
    }
    where = partition_specs(fitted, specs, mesh)
    return with_shardings(fitted, shardings(where, mesh))


# %% book/chapters/13_plan.md, cell 26
def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )


# %% book/chapters/13_plan.md, cell 31
def abstract_cache(
    config: ModelConfig, mesh: AnyMesh, batch: int, context: int,
    kv_cache: str | CacheKind = "float",
) -> Cache:
    """The cache of `init_cache`, not made: shapes and shardings."""
    make = partial(init_cache, config, batch, context, kv_cache)
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with jax.sharding.use_abstract_mesh(abstract):
        cache = jax.eval_shape(make)

    def where(a: Any, axes: Any) -> NamedSharding:
        spec = fit_spec(partition_spec(axes), a.shape, mesh)
        return NamedSharding(mesh, spec)

    cut = (jax.tree.map(where, c, c.axes) for c in cache.places)
    return with_shardings(cache, Cache(tuple(cut)))


def cache_bytes(cache: Cache) -> int:
    """Bytes that a device holds of the keys and values of all slots."""
    return sum(
        device_bytes(replace(kept, length=None))
        for kept in cache.places
    )


# %% book/chapters/13_plan.md, cell 34
def active_experts(moe: MoESpec, batch: int) -> float:
    """How many experts of a layer are asked by `batch` tokens.

    On average, if the router spreads tokens evenly.
    """
    skipped = (1 - moe.top_k / moe.num_experts) ** batch
    return moe.num_experts * (1 - skipped)


# %% book/chapters/13_plan.md, cell 35
def read_share(
    w: Any, spec: ParamSpec, moe: MoESpec, batch: int
) -> float:
    """The share of its experts that the busiest device reads, at least.

    Its part of those that are asked, and never less than one.
    """
    a = jax.tree.leaves(w)[0]
    shape = a.sharding.shard_shape(a.shape)
    held = shape[spec.axes.index("experts")]
    asked = active_experts(moe, batch) * held / moe.num_experts
    return max(asked, 1) / held


# %% book/chapters/13_plan.md, cell 36
def step_needs(
    params: Params, cache: Cache, config: ModelConfig, batch: int
) -> dict[str, float]:
    """Bytes that one device must read to decode one token a row.

    Each weight in use once, and every slot of the cache.
    """
    experts, kinds = experts_of(config), parameter_kinds(config)
    needs = {"experts": 0.0}
    for (module, name), spec in flat_specs(config).items():
        w, kind = params[module][name], kinds[module, name]
        size = float(device_bytes(w))
        if kind == "experts":
            size *= read_share(w, spec, experts[module], batch)
        elif kind == "lookup table":
            size *= min(1, batch / config.vocab_size)
        if kind != "other inputs":
            needs[kind] = needs.get(kind, 0.0) + size
    return {**needs, "cache": float(cache_bytes(cache))}


# %% book/chapters/13_plan.md, cell 37
UNITS = (
    (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"),
)


def amount(size: int | float) -> str:
    """Bytes with three digits: 39.9 GB."""
    unit, name = next((u for u in UNITS if size >= u[0]), UNITS[-1])
    value = size / unit
    digits = max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:.{digits}f} {name}"


# %% book/chapters/13_plan.md, cell 40
def step_flops(config: ModelConfig, batch: int, context: int) -> float:
    """Operations of one decode step on all devices together.

    Two for each weight that a token is multiplied by, and attention
    over every slot that a layer keeps.
    """
    used = token_weights(config)
    for kind in ("lookup table", "other inputs"):
        used.pop(kind, None)
    cache = jax.eval_shape(partial(init_cache, config, 1, context))
    attention = sum(
        2.0 * len(place.layers) * kept.slots
        * place.spec.attention.q_heads
        * (kept.k.shape[-1] + kept.v.shape[-1])
        for place, kept in zip(all_places(config), cache.places)
    )
    return batch * (2 * sum(used.values()) + attention)


# %% book/chapters/13_plan.md, cell 45
@dataclass(frozen=True)
class Plan:
    """What running a model would take; bytes and operations a device.

    What stands below `unread` only a compiler knows.
    """

    model: str
    hardware: str
    mesh: dict[str, int]                    # data, expert, model
    batch: int
    context: int
    parameters: int
    active: int                             # for one token
    weights: int
    cache: int
    needs: dict[str, float]                 # read in a step, by kind
    flops: float
    unread: float = 0.0                     # of weights, in any step
    kv_cache: str = "float"                 # how the cache is kept
    compiler: str = ""                      # "CPU" or a TPU slice
    compile_seconds: float = 0.0
    arguments: int = 0                      # as that compiler counts
    temporaries: int = 0
    collectives: list[list[Any]] = field(default_factory=list)
    moved: float | None = None              # by the program for a TPU
    exchanges: list[list[Any]] = field(default_factory=list)


# %% book/chapters/13_plan.md, cell 46
def temporaries_known(plan: Plan) -> bool:
    """Whether it was compiled for the hardware that will run it."""
    if plan.compiler == "CPU":
        return not HARDWARE[plan.hardware].link
    return bool(plan.compiler)


def held(plan: Plan) -> int:
    """Bytes that one device must have room for.

    Another machine's temporaries are not counted.
    """
    both = plan.weights + plan.cache
    return both + plan.temporaries * temporaries_known(plan)


def fits(plan: Plan) -> bool:
    """Whether a device's memory holds all of it."""
    return held(plan) <= HARDWARE[plan.hardware].memory


# %% book/chapters/13_plan.md, cell 47
def unread_bytes(
    params: Params, config: ModelConfig, batch: int
) -> float:
    """Bytes of a device's weights that no step reads, experts aside."""
    shares = {
        "other inputs": 1.0,
        "lookup table": max(0.0, 1 - batch / config.vocab_size),
    }
    return sum(
        device_bytes(params[module][name]) * shares.get(kind, 0.0)
        for (module, name), kind in parameter_kinds(config).items()
    )


# %% book/chapters/13_plan.md, cell 48
def disk_bytes(plan: Plan) -> float:
    """Bytes a step must read from disk, memory being kept full.

    What every token uses is kept first, then as many experts as fit.
    """
    if fits(plan):
        return 0.0
    experts = plan.needs["experts"]
    always = sum(plan.needs.values()) - plan.needs["cache"] - experts
    spare = HARDWARE[plan.hardware].memory - always
    spare -= plan.cache + plan.temporaries
    if spare < 0:
        return experts - spare
    idle = plan.weights - always - plan.unread
    return experts * max(0.0, 1 - spare / idle)


# %% book/chapters/13_plan.md, cell 49
def step_seconds(plan: Plan) -> dict[str, float]:
    """The least time of one step, by what it would wait for."""
    machine = HARDWARE[plan.hardware]
    sent = sum(size for _, _, size in plan.collectives)
    work = {
        "memory": (sum(plan.needs.values()), machine.bandwidth),
        "arithmetic": (plan.flops, machine.flops),
        "link": (sent, machine.link),
        "disk": (disk_bytes(plan), machine.disk),
    }
    return {
        name: size / rate if rate else math.inf
        for name, (size, rate) in work.items() if size
    }


# %% book/chapters/13_plan.md, cell 50
def bound(plan: Plan) -> tuple[str, float]:
    """What binds, and the most tokens a second, all rows together.

    0 tokens where it does not fit and there is no disk.
    """
    seconds = step_seconds(plan)
    name = max(seconds, key=lambda key: seconds[key])
    return name, plan.batch / seconds[name]


# %% book/chapters/13_plan.md, cell 51
def usual_mesh(devices: int, config: ModelConfig) -> dict[str, int]:
    """Sizes by name: a key head for each `model` shard at most.

    What is left divides the experts, and then the data.
    """
    heads = (s.spec.attention.kv_heads for s in all_places(config))
    model = math.gcd(devices, *heads)
    counts = [moe.num_experts for moe in experts_of(config).values()]
    expert = math.gcd(devices // model, *counts) if counts else 1
    data = devices // (model * expert)
    return {"data": data, "expert": expert, "model": model}


# %% book/chapters/13_plan.md, cell 52
MOST_DEVICES = 512


def fewest_devices(
    config: ModelConfig, params: Params, hardware: str, batch: int,
    context: int, kv_cache: str = "float",
) -> int:
    """The smallest power of two of devices that hold the model.

    With 5 % of memory to spare. 1 for a machine without links.
    """
    machine, devices = HARDWARE[hardware], 1
    while devices <= MOST_DEVICES:
        mesh = abstract_mesh(**usual_mesh(devices, config))
        with suppress(ValueError):          # it does not divide
            size = device_bytes(on_mesh(params, config, mesh))
            cache = abstract_cache(
                config, mesh, batch, context, kv_cache
            )
            size += cache_bytes(cache)
            if size <= 0.95 * machine.memory or not machine.link:
                return devices
        devices *= 2
    raise ValueError(
        f"{MOST_DEVICES} devices of {hardware} do not hold it; say how"
        " many with --devices or --mesh"
    )


# %% book/chapters/13_plan.md, cell 55
def compile_decode(
    config: ModelConfig, params: Params, cache: Cache, mesh: Mesh
) -> Any:
    """One decode step, compiled for the mesh and not run."""
    rows = cache.length.shape
    whole = NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        job = decode_step.lower(params, tokens, cache, config)
        return job.compile()


# %% book/chapters/13_plan.md, cell 56
Report = Callable[[Any, Plan, ModelConfig], dict[str, Any]]
REPORTS: list[Report] = []


def report_memory(
    program: Any, plan: Plan, config: ModelConfig
) -> dict[str, Any]:
    """What the program takes and, beside that, needs while it runs."""
    memory = program.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes + fresh,
    }


REPORTS.append(report_memory)


# %% book/chapters/13_plan.md, cell 57
def make_plan(
    name: str, config: ModelConfig, params: Params, mesh: AnyMesh,
    hardware: str, batch: int = 1, context: int | None = None,
    compiler: str = "", kv_cache: str = "float",
) -> Plan:
    """What decoding with these weights on this mesh takes.

    `params` need no numbers: `abstract_params`. `context`: tokens a
    row, None for the model's; `kv_cache`: one of `cache.CACHE_KINDS`.
    With a `compiler`, "CPU" or a TPU slice,
    a step is compiled for the devices of `mesh`, and its program read.
    ValueError when the mesh does not divide a weight.
    """
    context = config.context if context is None else context
    placed = on_mesh(params, config, mesh)
    cache = abstract_cache(config, mesh, batch, context, kv_cache)
    total, active = parameter_counts(config)
    plan = Plan(
        name, hardware, dict(mesh.shape), batch, context, total, active,
        weights=device_bytes(placed), cache=cache_bytes(cache),
        needs=step_needs(placed, cache, config, batch),
        flops=step_flops(config, batch, context) / mesh.size,
        unread=unread_bytes(placed, config, batch), compiler=compiler,
        kv_cache=kv_cache,
    )
    if not compiler:
        return plan
    if not isinstance(mesh, Mesh):
        raise ValueError("an abstract mesh has nothing to compile for")
    begun = time.perf_counter()
    program = compile_decode(config, placed, cache, mesh)
    spent = time.perf_counter() - begun
    fields: dict[str, Any] = {"compile_seconds": spent}
    for report in REPORTS:
        fields |= report(program, plan, config)
    return replace(plan, **fields)


# %% book/chapters/13_plan.md, cell 62
def recorded(topology: str) -> Plan:
    """Grok-1's plan for a slice, as `plan --json` once wrote it.

    ValueError for a slice of which there is no record.
    """
    name = topology.replace(":", "-") + ".json"
    file = files("annotated_moe") / "plans" / name
    if not file.is_file():
        raise ValueError(f"no plan for {topology} was recorded")
    return Plan(**json.loads(file.read_text()))


# %% book/chapters/13_plan.md, cell 65
def memory_lines(plan: Plan) -> list[tuple[str, str]]:
    """What a device holds, and whether it has room."""
    have, spare = HARDWARE[plan.hardware].memory, []
    both = amount(held(plan))
    answer = "fits" if fits(plan) else "does not fit"
    if fits(plan) and not temporaries_known(plan):
        answer += ", if the device's own compiler"
        free = amount(have - held(plan))
        spare = [("", f"takes less than {free} of temporaries")]
    extra = "not compiled, not counted"
    if plan.compiler:
        extra = f"{amount(plan.temporaries)} as compiled for "
        extra += plan.compiler
        extra += "" if temporaries_known(plan) else ", not counted"
    return [
        ("weights", amount(plan.weights)),
        ("cache", f"{amount(plan.cache)}, {plan.kv_cache}"),
        ("temporaries", extra),
        ("together", f"{both} of {amount(have)}: {answer}"),
        *spare,
    ]


# %% book/chapters/13_plan.md, cell 66
def step_lines(plan: Plan) -> list[tuple[str, str]]:
    """What a device does in one step."""
    total = sum(plan.needs.values())
    needs = plan.needs.items()
    parts = [f"{kind} {amount(n)}" for kind, n in needs if n]
    pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    lines = [("must read", amount(total))]
    lines += [("", ", ".join(pair)) for pair in pairs]
    if plan.moved is not None:
        ratio = f"{plan.moved / total:.2f} times that"
        lines.append(("moves", f"{amount(plan.moved)}, {ratio}"))
    lines.append(("computes", f"{plan.flops / 1e9:,.1f} GFLOP"))
    for kind, times, sent in plan.collectives:
        lines.append(("sends", f"{amount(sent)} in {times} {kind}"))
    if size := disk_bytes(plan):
        lines.append(("from disk", f"{amount(size)} at least"))
    return lines


# %% book/chapters/13_plan.md, cell 67
def bound_lines(plan: Plan) -> list[tuple[str, str]]:
    """How long a step takes at least, and what it waits for."""
    lines = [
        (name, "never: there is none" if math.isinf(spent)
         else f"{1e3 * spent:,.3f} ms")
        for name, spent in step_seconds(plan).items()
    ]
    name, speed = bound(plan)
    if not speed:
        return [*lines, ("at most", "nothing: it does not fit")]
    rate = f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}"
    text = f"{rate} tokens a second; {name} binds"
    return [*lines, ("at most", text)]


# %% book/chapters/13_plan.md, cell 68
def count(number: int) -> str:
    """A number of weights in words: 315.7 billion."""
    if number < 1e9:
        return f"{number / 1e6:,.1f} million"
    return f"{number / 1e9:,.1f} billion"


def table(plan: Plan) -> str:
    """A plan for people, 72 columns wide but for a long path."""
    about = HARDWARE[plan.hardware].about
    whole, active = count(plan.parameters), count(plan.active)
    names = " x ".join(plan.mesh)
    devices = math.prod(plan.mesh.values())
    parts = [
        (f"{plan.model} on {devices} x {about}", [
            ("mesh", f"{mesh_text(plan.mesh)} ({names})"),
            ("batch", f"{plan.batch}, {plan.context:,} tokens a row"),
            ("parameters", f"{whole}, {active} for a token")]),
        ("A device holds", memory_lines(plan)),
        ("A device, to decode one token a row", step_lines(plan)),
        ("A step takes at least", bound_lines(plan)),
    ]
    return "\n".join(
        "\n".join([title, *(f"  {a:13}{b}" for a, b in lines)])
        for title, lines in parts
    )


# %% book/chapters/24_comparisons.md, cell 10
def training_flops(config: ModelConfig, length: int) -> int:
    """Multiplications and additions a token costs, there and back.

    In rows of `length` tokens. What is computed a second time for the
    gradient is not counted, nor what is no product.
    Source: Chowdhery et al. (2023), appendix B.
    """
    used = token_weights(config)
    unused = used.get("lookup table", 0) + used.get("other inputs", 0)
    pairs = 0
    for i in range(config.num_layers):
        heads = config.layer(i).attention
        value = heads.value_size or heads.head_size
        pairs += length * heads.q_heads * (heads.head_size + value)
    return 6 * (sum(used.values()) - unused + pairs)


# %% book/chapters/92_hlo.md, cell 37
def expert_runs(config: ModelConfig, plan: Plan) -> float:
    """How often a device's loop over asked experts runs in a layer.

    Of the busiest device, in the layers that ask most; 1 without any.
    """
    runs, parts = [1.0], plan.mesh["expert"]
    for moe in experts_of(config).values():
        cut = parts if moe.num_experts % parts == 0 else 1
        runs.append(active_experts(moe, plan.batch) / cut)
    return max(runs)


# %% book/chapters/92_hlo.md, cell 38
def report_collectives(
    program: Any, plan: Plan, config: ModelConfig
) -> dict[str, Any]:
    """What the devices send one another: [kind, times, bytes sent]."""
    devices = math.prod(plan.mesh.values())
    unknown = expert_runs(config, plan)
    kinds: dict[str, list[Any]] = {}
    for one in collectives(program.as_text(), devices, unknown):
        entry = kinds.setdefault(one.kind, [one.kind, 0, 0.0])
        entry[1] += one.times
        entry[2] += one.sent
    found = [[kind, round(n), sent] for kind, n, sent in kinds.values()]
    return {"collectives": found}


# %% book/chapters/92_hlo.md, cell 39
def report_moved(
    program: Any, plan: Plan, config: ModelConfig
) -> dict[str, Any]:
    """What a TPU's program moves to and from memory.

    Not a CPU's: that computes bfloat16 by way of float32.
    """
    if plan.compiler == "CPU":
        return {}
    unknown = expert_runs(config, plan)
    return {"moved": bytes_moved(program.as_text(), unknown)}


# %% book/chapters/92_hlo.md, cell 40
REPORTS += [report_collectives, report_moved]


# %% book/chapters/92_hlo.md, cell 43
def exchange_bytes(
    moe: MoESpec, d: int, tokens: int, mesh: Mapping[str, int],
    exchange: str, padded: bool,
) -> float:
    """Bytes that a device sends for one layer's experts.

    Activations travel in bfloat16, results in float32. Tokens that
    the axis `expert` does not divide go through the sum. ValueError
    for an exchange that this has no formula for.
    """
    data, n, width = (mesh[a] for a in ("data", "expert", "model"))
    d = d // data
    if exchange == "sum" or tokens % n:
        return 2 * (n * width - 1) / (n * width) * tokens * d * 4
    own = tokens // n
    if exchange == "ring":
        seats = float(own)
    elif exchange != "all_to_all":
        raise ValueError(f"no formula for the exchange {exchange!r}")
    elif padded:
        seats = capacity(own, min(moe.top_k, n), n, FEW)
    else:                                   # those that somebody fills
        e, a = moe.num_experts, moe.top_k
        missed = math.comb(e - e // n, a) / math.comb(e, a)
        seats = own * (1 - missed)
    parts = 2 * (width - 1) / width * own * d * 4
    return (n - 1) * seats * d * (2 + 4) + parts


# %% book/chapters/92_hlo.md, cell 44
def compile_experts(
    config: ModelConfig, params: Params, mesh: Mesh, exchange: str,
    rows: int, tokens: int,
) -> Any:
    """A layer's router and experts for [rows, tokens], not run."""
    place = next(p for p in all_places(config)
                 if isinstance(p.spec.feed_forward, MoESpec))
    kept = {m: w for m, w in place_params(params, place).items()
            if "router" in m.split("/") or "moe" in m.split("/")}

    def experts(params: Params, h: Array, real: Array) -> Array:
        own = layer_weights(params, place, config, 0)
        own = {m.removeprefix(f"{place.name}/"): w
               for m, w in own.items()}

        def run() -> Array:
            moe: Any = place.spec.feed_forward.build()
            return moe(h, real, config.dtype)[0]

        h = constrain_residual(h)
        y = hk.transform(run).apply(own, None)
        return constrain_residual(y)

    whole, shape = NamedSharding(mesh, P()), (rows, tokens)
    h = jax.ShapeDtypeStruct(
        (*shape, config.d_model), jnp.float32, sharding=whole)
    real = jax.ShapeDtypeStruct(shape, bool, sharding=whole)
    with use_mesh(mesh, exchange):
        return jax.jit(experts).lower(kept, h, real).compile()


def sent_by_experts(
    text: str, mesh: Mapping[str, int], moe: MoESpec, tokens: int
) -> float:
    """Bytes that a device sends in such a program."""
    devices, n = math.prod(mesh.values()), mesh["expert"]
    sent = sum(one.sent for one in collectives(text, devices, 1))
    e, a = moe.num_experts, moe.top_k
    hit = 1 - math.comb(e - e // n, a) / math.comb(e, a)
    for shape in re.findall(r"= (\S+) ragged-all-to-all\(", text):
        sent += plain_bytes(shape) * hit * (n - 1) / n
    return sent


# %% book/chapters/92_hlo.md, cell 45
def plan_exchanges(
    config: ModelConfig, params: Params, mesh: Mesh, plan: Plan
) -> list[list[Any]]:
    """[exchange, tokens, bytes sent a layer], to decode and to read.

    Of the first layer that has experts; nothing where `expert` is 1.
    """
    sizes = dict(mesh.shape)
    moe = next(iter(experts_of(config).values()), None)
    if moe is None or sizes["expert"] == 1:
        return []
    padded, found = not HARDWARE[plan.hardware].link, []
    for t in (1, plan.context):
        tokens = plan.batch * t
        for exchange in EXCHANGES:
            if plan.compiler == "CPU":
                sent = exchange_bytes(moe, config.d_model, tokens,
                                      sizes, exchange, padded)
            else:
                program = compile_experts(
                    config, params, mesh, exchange, plan.batch, t)
                sent = sent_by_experts(
                    program.as_text(), sizes, moe, tokens)
            found.append([exchange, tokens, sent])
    return found


def exchange_lines(plan: Plan) -> list[tuple[str, str]]:
    """What each exchange sends, to decode and to read prompts."""
    lines: dict[str, list[str]] = {}
    for exchange, tokens, sent in plan.exchanges:
        own = lines.setdefault(exchange, [])
        own.append(f"{amount(sent)} for {tokens:,}")
    return [(name, ", ".join(own)) for name, own in lines.items()]


# %% book/chapters/92_hlo.md, cell 48
def topology_size(topology: str) -> int:
    """How many devices "v5p:2x2x2" has; ValueError for another form."""
    form = r"v5p:\d{1,3}(x\d{1,3}){2}|v(5|6)e:\d{1,3}x\d{1,3}"
    if not re.fullmatch(form, topology):
        raise ValueError(
            f"no topology {topology!r}: write v5p:2x2x2, v5e:4x8 or"
            " v6e:4x4"
        )
    return math.prod(map(int, topology[4:].split("x")))


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice that is not there: "v5p:2x2x2".

    ValueError without the extra `tpu`, or for no such slice.
    """
    topology_size(topology)
    if find_spec("libtpu") is None:
        advice = ""
        with suppress(ValueError):
            recorded(topology)
            advice = (
                "; what it said of grok-1 was kept:"
                f" annotated_moe.plan.recorded({topology!r})"
            )
        raise ValueError(
            f"{topology} needs the TPU compiler:"
            f' pip install "annotated-moe[tpu]"{advice}'
        )
    return describe_slice(topology)


# %% book/chapters/92_hlo.md, cell 49
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",              # ask no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # nor guess what is here
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}


# %% book/chapters/92_hlo.md, cell 50
def describe_slice(topology: str) -> list[Any]:
    """Ask libtpu for a slice's devices, without its messages."""
    from jax.experimental import topologies

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
    except Exception as error:
        raise ValueError(
            f"the TPU compiler knows no slice {topology!r}"
        ) from error
    return list(found.devices)


# %% book/chapters/92_hlo.md, cell 51
def mesh_of(
    devices: Any, data: int = 1, model: int = 1, expert: int = 1
) -> Mesh:
    """`make_mesh` of devices that JAX does not list."""
    sizes = {"data": data, "expert": expert, "model": model}
    wanted = math.prod(sizes.values())
    if wanted != len(devices):
        raise ValueError(
            f"a {mesh_text(sizes)} mesh has {wanted} devices, and there"
            f" are {len(devices)}"
        )
    grid = np.array(devices).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


# %% book/chapters/92_hlo.md, cell 54
IN_8_BITS = ("grok-1",)                     # as published


def weights_of(name: str) -> tuple[ModelConfig, Params]:
    """Configuration and weights without numbers, in bfloat16.

    Of a preset by its name, or of a checkpoint's folder, of which only
    headers are read.
    """
    if name in PRESETS:
        config = replace(PRESETS[name], dtype="bfloat16")
        return config, abstract_params(config, name in IN_8_BITS)
    if not Path(name).exists():
        near = difflib.get_close_matches(name, PRESETS)
        raise ValueError(
            f"{name!r} is neither a folder nor a preset; "
            + (f"did you mean {' or '.join(near)}?" if near else
               f"presets are {', '.join(PRESETS)}")
        )
    opened = open_checkpoint(Path(name))
    config = replace(opened.config, dtype="bfloat16")
    params: dict[str, dict[str, Any]] = {}
    for (module, leaf), w in opened.read().items():
        small = isinstance(w, QuantizedTensor)
        groups = w.scales.shape[-2] if small else None
        spec = flat_specs(config)[module, leaf]
        own = abstract_weight(spec, config.dtype, groups)
        params.setdefault(module, {})[leaf] = own
    return config, params


# %% book/chapters/92_hlo.md, cell 55
def simulate(devices: int) -> None:
    """Let this process have so many devices, none of them real."""
    jax.config.update("jax_platforms", "cpu")
    with suppress(RuntimeError):
        # Only before a device is first used.
        jax.config.update("jax_num_cpu_devices", devices)


# %% book/chapters/92_hlo.md, cell 56
def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by name of "1x2x4", or of "1x8": no cut of experts."""
    size = r"[1-9]\d{0,3}"
    if not re.fullmatch(rf"{size}(x{size}){{1,2}}", text):
        raise ValueError(
            "--mesh must be DATAxMODEL or DATAxEXPERTxMODEL, such as"
            f" 1x8 or 1x2x4, not {text!r}"
        )
    data, *expert, model = map(int, text.split("x"))
    return {"data": data, "expert": (expert or [1])[0], "model": model}


# %% book/chapters/92_hlo.md, cell 57
def check_job(args: argparse.Namespace, config: ModelConfig) -> int:
    """The context to plan for; ValueError if the job makes no sense."""
    context = config.context if args.context is None else args.context
    if args.batch < 1:
        raise ValueError(f"--batch must be 1 or more, not {args.batch}")
    if not 1 <= context <= config.context:
        raise ValueError(
            f"--context must be 1 to {config.context}, not {context}"
        )
    if args.mesh is not None and args.devices is not None:
        raise ValueError("--mesh and --devices say the same: give one")
    return context


def check_devices(
    args: argparse.Namespace, config: ModelConfig
) -> int | None:
    """How many devices are asked for; ValueError if they cannot be."""
    wanted, asked = args.devices, f"--devices {args.devices}"
    if args.mesh is not None:
        wanted = math.prod(parse_mesh(args.mesh).values())
        asked = f"--mesh {args.mesh}"
    if wanted is None:
        return None
    if not 1 <= wanted <= MOST_DEVICES:
        raise ValueError(
            f"{asked} asks for {wanted} devices: 1 to {MOST_DEVICES}"
            " can be planned for"
        )
    size = topology_size(args.topology) if args.topology else wanted
    if size != wanted:
        raise ValueError(
            f"{args.topology} has {size} devices, and {asked} asks for"
            f" {wanted}"
        )

    def divides(n: int) -> bool:
        return not indivisible(config, usual_mesh(n, config))

    if args.mesh is None and not divides(wanted):
        raise ValueError(
            f"{wanted} devices cannot share the model: --devices"
            f" {counts_near(wanted, divides)} would do"
        )
    return wanted


# %% book/chapters/92_hlo.md, cell 58
def hardware_of(args: argparse.Namespace) -> str:
    """The hardware asked for; a topology's own when it names one."""
    kind = args.topology and args.topology.split(":")[0]
    if kind and args.hardware not in (None, kind):
        raise ValueError(
            f"--topology {args.topology} is no {args.hardware}:"
            " leave --hardware out"
        )
    return kind or args.hardware or "h100"


# %% book/chapters/92_hlo.md, cell 59
def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    config, params = weights_of(args.model)
    context, hardware = check_job(args, config), hardware_of(args)
    wanted = check_devices(args, config)
    sizes = parse_mesh(args.mesh) if args.mesh else None
    if args.topology:
        simulate(1)
        devices = tpu_devices(args.topology)
        wanted = len(devices) if wanted is None else wanted
    else:
        if wanted is None:
            wanted = fewest_devices(
                config, params, hardware, args.batch, context,
                args.kv_cache,
            )
        simulate(wanted)
        devices = jax.devices()[:wanted]
    mesh = mesh_of(devices, **(sizes or usual_mesh(wanted, config)))
    plan = make_plan(
        args.model, config, params, mesh, hardware, args.batch, context,
        args.topology or "CPU", args.kv_cache,
    )
    placed = on_mesh(params, config, mesh)
    sent = plan_exchanges(config, placed, mesh, plan)
    return replace(plan, exchanges=sent)


# %% book/chapters/92_hlo.md, cell 60
def run_plan(args: argparse.Namespace) -> None:
    """Print a plan as a table, or as JSON."""
    plan = plan_of(args)
    text = json.dumps(asdict(plan), indent=1)
    print(text if args.json else table(plan))
    if plan.exchanges and not args.json:
        print("A device sends for a layer's experts, by exchange")
        for name, sent in exchange_lines(plan):
            print(f"  {name:13}{sent} tokens")


# %% book/chapters/92_hlo.md, cell 61
def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command `plan`."""
    add = parser.add_argument
    add("model", help=f"{' or '.join(PRESETS)}, or a checkpoint folder")
    add("--hardware", choices=list(HARDWARE), help="[h100]")
    add("--devices", type=int, help="how many [the fewest that fit]")
    add("--mesh", help="DATAxMODEL or DATAxEXPERTxMODEL, such as 1x8")
    add("--topology", help="a TPU slice, v5p:2x2x2: ask its compiler")
    add("--batch", type=int, default=1, help="rows at once [1]")
    add("--context", type=int, help="tokens a row [the model's]")
    add("--kv-cache", choices=list(CACHE_KINDS), default="float",
        help="how keys and values are kept [float]")
    add("--json", action="store_true", help="for programs")


def add_plan(commands: Any) -> None:
    """The subcommand `plan` of the command line."""
    text = "say what running a model takes, before any download"
    sub = commands.add_parser("plan", help=text, description=text)
    sub.set_defaults(run=run_plan)
    add_plan_options(sub)
