# Generated from book/chapters/07_sharding.md by `make sync`; edit the chapter.
"""Grok-1's weights fill 318 GB, and an accelerator with 80 GB of memory
is a large one. No single device can hold the model, so eight hold an
eighth each, and every product has to be computed where its weights lie.
This chapter writes the nine rules that say who holds what, and a
product that lets weights stay where they are. It proves that eight
devices then compute what one would, reads the compiled program to see
what they say to each other, and weighs the full model on each of them
without allocating a byte of it.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from annotated_moe import quantization
from annotated_moe.quantization import QuantizedTensor, Row, Weight

# %% book/chapters/07_sharding.md, cell 3
AnyMesh = Mesh | AbstractMesh
Axis = str | tuple[str, ...] | None


# %% book/chapters/07_sharding.md, cell 8
def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A grid of `data` x `model` devices with these two axis names.

    Takes the first devices of `jax.devices()`. Raises ValueError when
    a size is below 1 or devices are lacking.
    """
    devices, wanted = jax.devices(), data * model
    if data < 1 or model < 1:
        raise ValueError(f"a {data} x {model} mesh has no devices")
    if wanted > len(devices):
        raise ValueError(
            f"a {data} x {model} mesh needs {wanted} devices and there"
            f" are {len(devices)}; to simulate them on a CPU, begin"
            f' with jax.config.update("jax_num_cpu_devices", {wanted})'
        )
    grid = np.array(devices[:wanted]).reshape(data, model)
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(grid, ("data", "model"), axis_types=auto)


# %% book/chapters/07_sharding.md, cell 12
RULES: tuple[tuple[str, P], ...] = (
    (r"multi_head_attention/(query|key|value)/w", P("data", "model")),
    (r"multi_head_attention/linear/w", P("model", "data")),
    (r"moe/linear(_v)?/w", P(None, "data", "model")),
    (r"moe/linear_1/w", P(None, "model", "data")),
    (r"decoder_layer/linear(_v)?/w", P("data", "model")),
    (r"decoder_layer/linear_1/w", P("model", "data")),
    (r"router/w", P("data")),
    (r"in_out_embed/embeddings", P(None, ("data", "model"))),
    (r"rms_norm(_\d)?/scale", P()),
)


# %% book/chapters/07_sharding.md, cell 13
FAMILY_RULES: tuple[tuple[str, P], ...] = (
    (r"multi_head_attention/(query|key|value)/b", P("model")),
    (r"multi_head_attention/linear/b", P("data")),
    (r"(query|key)_norm/scale", P()),
    (r"decoder_layer/linear(_v)?/b", P("model")),
    (r"decoder_layer/linear_1/b", P("data")),
    (r"shared/linear(_v)?/w", P("data", "model")),
    (r"shared/linear_1/w", P("model", "data")),
    (r"lm_head/embeddings", P(None, ("data", "model"))),
    (r"vision/.+", P()),
)


# %% book/chapters/07_sharding.md, cell 14
def spec_for(path: str) -> P:
    """The spec of the first rule that matches the end of `path`.

    It is for one layer, not for a stack. Raises ValueError when no
    rule matches.
    """
    for pattern, spec in (*RULES, *FAMILY_RULES):
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    raise ValueError(
        f"no partition rule matches parameter {path}: add one to"
        " annotated_moe.sharding.RULES, P() to keep it whole everywhere"
    )


# %% book/chapters/07_sharding.md, cell 18
def axis_size(mesh: AnyMesh, axis: Axis) -> int:
    """How many parts `axis` cuts a dimension into; 1 for None.

    A tuple of names counts as their product. Raises ValueError for a
    name that the mesh does not have.
    """
    names = axis if isinstance(axis, tuple) else (axis,)
    unknown = set(names) - {None, *mesh.axis_names}
    if unknown:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, not {unknown}"
        )
    return math.prod(mesh.shape[n] for n in names if n is not None)


def fit(axis: Axis, size: int, mesh: AnyMesh) -> Axis:
    """`axis` if it cuts `size` into equal parts, else None: whole."""
    parts = axis_size(mesh, axis)
    return axis if parts > 1 and size % parts == 0 else None


# %% book/chapters/07_sharding.md, cell 19
def fit_spec(spec: P, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """`spec` as far as it fits `shape`: one entry for each dimension.

    Raises ValueError when `spec` has more entries than `shape`.
    """
    missing = len(shape) - len(spec)
    if missing < 0:
        raise ValueError(f"{spec} has too many axes for shape {shape}")
    wishes = (*spec, *[None] * missing)
    return P(*(fit(a, n, mesh) for a, n in zip(wishes, shape)))


# %% book/chapters/07_sharding.md, cell 22
def weight_spec(spec: P, w: Any, mesh: AnyMesh) -> Any:
    """`w` with a fitted spec in place of each array.

    Raises ValueError when the cut would part rows from their scales.
    """
    if isinstance(w, Row):
        return Row(weight_spec(P(None, *spec), w.stack, mesh), P())
    if not isinstance(w, QuantizedTensor):
        return fit_spec(spec, w.shape, mesh)
    fitted = fit_spec(spec, w.shape, mesh)
    groups, parts = w.scales.shape[-2], axis_size(mesh, fitted[-2])
    if groups > 1 and groups % parts:
        raise ValueError(
            f"{groups} groups of scales cannot be cut into {parts}:"
            " pass the weight through fit_groups first"
        )
    scales = fit_spec(fitted, w.scales.shape, mesh)
    return QuantizedTensor(fitted, scales)


# %% book/chapters/07_sharding.md, cell 23
def group_repeats(
    q: QuantizedTensor, spec: P, mesh: AnyMesh
) -> int:
    """How often to repeat each scale: 1 where groups fit the cut."""
    parts = axis_size(mesh, fit_spec(spec, q.shape, mesh)[-2])
    groups = q.scales.shape[-2]
    return 1 if groups == 1 else math.lcm(groups, parts) // groups


# %% book/chapters/07_sharding.md, cell 24
def fit_groups(
    q: QuantizedTensor, spec: P, mesh: AnyMesh
) -> QuantizedTensor:
    """Repeat scales until each device's rows have groups of their own.

    The weights that `q` stands for do not change by a bit. G becomes
    the least common multiple of G and the parts that D is cut into.
    """
    times = group_repeats(q, spec, mesh)
    if times == 1:
        return q
    scales = np.repeat(np.asarray(q.scales), times, axis=-2)
    return QuantizedTensor(q.weight, scales)


# %% book/chapters/07_sharding.md, cell 29
def partition_specs(
    params: dict[str, dict[str, Any]], mesh: AnyMesh
) -> dict[str, dict[str, Any]]:
    """`params` (module -> name -> weight) with a spec for each array.

    Modules under `decoder_layer` hold stacks of layers. Needs shapes
    only. Raises ValueError for a parameter without a rule.
    """
    specs: dict[str, dict[str, Any]] = {}
    for module, leaves in params.items():
        specs[module] = {}
        for name, w in leaves.items():
            spec = spec_for(f"{module}/{name}")
            if module.startswith("decoder_layer"):
                spec = P(None, *spec)
            specs[module][name] = weight_spec(spec, w, mesh)
    return specs


# %% book/chapters/07_sharding.md, cell 30
def shardings(specs: Any, mesh: AnyMesh) -> Any:
    """A tree of specs as a tree of shardings, for `jax.device_put`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


# %% book/chapters/07_sharding.md, cell 34
def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


# %% book/chapters/07_sharding.md, cell 35
def matmul(
    x: Float[Array, "N D"], w: Weight, axes: tuple[Axis, Axis]
) -> Float[Array, "N F"]:
    """x times w in float32; `axes` name what cuts w's D and F.

    Without a mesh, `quantization.matmul`. With one, each device
    multiplies the block it holds, then sums over the axis that cuts D.
    Raises ValueError when shapes do not fit. Source: Pope et al.
    (2023), section 3.2.
    """
    mesh = current_mesh()
    if mesh is None:
        return quantization.matmul(x, w)
    quantization.check_fits(x, w, ())
    d, f = (fit(a, n, mesh) for a, n in zip(axes, w.shape))

    def local(x, w):
        y = quantization.matmul(x, w)                       # [N, F_Y]
        return jax.lax.psum(y, d) if d else y

    blocks = (P(None, d), weight_spec(P(*axes), w, mesh))
    return jax.shard_map(
        local, in_specs=blocks, out_specs=P(None, f), check_vma=False
    )(x, w)


# %% book/chapters/07_sharding.md, cell 51
def constrain(
    x: Shaped[Array, "..."], *axes: Axis
) -> Shaped[Array, "..."]:
    """`x` itself, kept cut along `axes` as far as they fit.

    For use under `jit`. Without a mesh nothing happens. Raises
    ValueError when there are more axes than `x` has.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = fit_spec(P(*axes), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)


# %% book/chapters/07_sharding.md, cell 58
def head_copies(kv_heads: int, q_heads: int) -> int:
    """How often the current mesh holds each key head: mostly once.

    So often that `model` cuts the copies between heads. Once where
    `model` does not divide the query heads: then all stay whole.
    """
    mesh = current_mesh()
    if mesh is None:
        return 1
    parts = axis_size(mesh, fit("model", q_heads, mesh))
    return math.lcm(kv_heads, parts) // kv_heads


# %% book/chapters/07_sharding.md, cell 59
def spread_heads(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], q_heads: int
) -> tuple[Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Keys and values, each head as often as `head_copies` says."""
    copies = head_copies(k.shape[2], q_heads)
    if copies == 1:
        return k, v
    flat = [z.reshape(*z.shape[:2], -1) for z in (k, v)]    # [B, T, KH]
    whole = constrain(jnp.stack(flat, 2))     # gathered in one exchange
    b, t, *head = k.shape
    heads = jnp.repeat(whole.reshape(b, t, 2, *head), copies, axis=3)
    heads = constrain(heads, None, None, None, "model")
    return heads[:, :, 0], heads[:, :, 1]
