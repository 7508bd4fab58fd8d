# Generated from book/chapters/07_sharding.md by `make sync`; edit the chapter.
"""Split a model over devices.
"""

# %% book/chapters/07_sharding.md, cell 1
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from annotated_moe import quantization
from annotated_moe.quantization import QuantizedTensor, Row


# %% book/chapters/07_sharding.md, cell 2
RULES = (
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


# %% book/chapters/07_sharding.md, cell 3
def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    devices = jax.devices()
    if data * model > len(devices):
        raise ValueError(
            f"a {data} x {model} mesh needs {data * model} devices, {len(devices)} are here"
        )
    grid = np.array(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# %% book/chapters/07_sharding.md, cell 4
def current_mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


# %% book/chapters/07_sharding.md, cell 5
def axis_size(mesh, axis) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[n] for n in names if n is not None)


# %% book/chapters/07_sharding.md, cell 6
def fit(axis, size: int, mesh):
    """The axis if it divides `size` evenly, else None: replicate."""
    return axis if axis and size % axis_size(mesh, axis) == 0 else None


# %% book/chapters/07_sharding.md, cell 7
def spec_for(path: str) -> P:
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            return spec
    raise ValueError(f"no partition rule matches parameter {path}: add one to RULES")


# %% book/chapters/07_sharding.md, cell 8
def fit_spec(spec: P, shape: tuple[int, ...], mesh: Any) -> P:
    """`spec` with every axis dropped that does not divide its dimension."""
    return P(*(fit(axis, size, mesh) for axis, size in zip(spec, shape)))


# %% book/chapters/07_sharding.md, cell 9
def weight_spec(spec: P, w: Any, mesh: Any) -> Any:
    """One PartitionSpec an array of `w`: the scales follow their weight."""
    if isinstance(w, Row):
        return Row(weight_spec(P(None, *spec), w.stack, mesh), P())
    if isinstance(w, QuantizedTensor):
        fitted = fit_spec(spec, w.shape, mesh)
        return QuantizedTensor(fitted, fit_spec(fitted, w.scales.shape, mesh))
    return fit_spec(spec, w.shape, mesh)


# %% book/chapters/07_sharding.md, cell 10
def partition_specs(params: dict, mesh: Any) -> dict:
    """A PartitionSpec for every array of a (nested) Haiku parameter dict."""
    specs: dict = {}
    for module, leaves in params.items():
        specs[module] = {}
        for name, w in leaves.items():
            spec = spec_for(f"{module}/{name}")
            if module.startswith("decoder_layer"):
                spec = P(None, *spec)
            specs[module][name] = weight_spec(spec, w, mesh)
    return specs


# %% book/chapters/07_sharding.md, cell 11
def shardings(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )


# %% book/chapters/07_sharding.md, cell 12
def fit_groups(q: QuantizedTensor, spec: P, mesh: Any) -> QuantizedTensor:
    """Repeat scales until every device's rows have groups of their own."""
    rows = axis_size(mesh, fit(spec[-2], q.shape[-2], mesh))
    groups = q.scales.shape[-2]
    if groups == 1 or groups % rows == 0:
        return q
    times = math.lcm(groups, rows) // groups
    return QuantizedTensor(q.weight, np.repeat(np.asarray(q.scales), times, axis=-2))


# %% book/chapters/07_sharding.md, cell 13
def matmul(x, w, axes):
    """x [N, D] @ w [D, F] -> float32 [N, F]; w's axes are split over `axes`.

    Without a mesh this is `quantization.matmul`. With one, each device
    multiplies the block that it holds and sums over the axis that splits D.
    """
    mesh = current_mesh()
    if mesh is None:
        return quantization.matmul(x, w)
    rows, cols = (fit(a, s, mesh) for a, s in zip(axes, w.shape))

    def local(x, w):
        y = quantization.matmul(x, w)
        return jax.lax.psum(y, rows) if rows else y

    return jax.shard_map(
        local,
        in_specs=(P(None, rows), weight_spec(P(*axes), w, mesh)),
        out_specs=P(None, cols),
        check_vma=False,
    )(x, w)
