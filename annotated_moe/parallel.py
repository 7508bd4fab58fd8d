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
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from annotated_moe.params import Axes, ParamSpec
from annotated_moe.placement import PLACEMENTS, OneDevice
from annotated_moe.quantization import LazySlice, QuantizedTensor

# %% book/chapters/07_sharding.md, cell 3
AnyMesh = Mesh | AbstractMesh
MeshAxis = str | tuple[str, ...] | None


# %% book/chapters/07_sharding.md, cell 8
def make_mesh(data: int = 1, model: int = 1, expert: int = 1) -> Mesh:
    """A grid of data x expert x model devices with these axis names.

    Takes the first devices of `jax.devices()`. Raises ValueError when
    a size is below 1 or devices are lacking.
    """
    shape = f"{data} x {expert} x {model}"
    devices, wanted = jax.devices(), data * expert * model
    if min(data, expert, model) < 1:
        raise ValueError(f"a {shape} mesh has no devices")
    if wanted > len(devices):
        raise ValueError(
            f"a {shape} mesh needs {wanted} devices and there"
            f" are {len(devices)}; to simulate them on a CPU, begin"
            f' with jax.config.update("jax_num_cpu_devices", {wanted})'
        )
    grid = np.array(devices[:wanted]).reshape(data, expert, model)
    auto = (AxisType.Auto,) * 3
    return Mesh(grid, ("data", "expert", "model"), axis_types=auto)


# %% book/chapters/07_sharding.md, cell 9
MESH_AXES: dict[str | None, MeshAxis] = {
    "embed": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "expert",
    "table": ("data", "model"),             # the width of an embedding
    "batch": "data",
}


# %% book/chapters/07_sharding.md, cell 16
def axis_size(mesh: AnyMesh, axis: MeshAxis) -> int:
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


# %% book/chapters/07_sharding.md, cell 17
def fit(axis: MeshAxis, size: int, mesh: AnyMesh) -> MeshAxis:
    """`axis` if it cuts `size` into equal parts, else None: whole."""
    parts = axis_size(mesh, axis)
    return axis if parts > 1 and size % parts == 0 else None


# %% book/chapters/07_sharding.md, cell 18
def fit_spec(spec: P, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """`spec` as far as it fits `shape`: one entry for each dimension.

    Raises ValueError when `spec` has more entries than `shape`.
    """
    missing = len(shape) - len(spec)
    if missing < 0:
        raise ValueError(f"{spec} has too many axes for shape {shape}")
    wishes = (*spec, *[None] * missing)
    return P(*(fit(a, n, mesh) for a, n in zip(wishes, shape)))


# %% book/chapters/07_sharding.md, cell 19
def partition_spec(axes: Axes) -> P:
    """Which mesh axes cut an array whose axes count what `axes` say."""
    return P(*(MESH_AXES.get(axis) for axis in axes))


# %% book/chapters/07_sharding.md, cell 22
def weight_spec(spec: P, w: Any, mesh: AnyMesh) -> Any:
    """`w` with a fitted spec in place of each array.

    Raises ValueError when the cut would part rows from their scales.
    """
    if isinstance(w, LazySlice):
        above = (None,) * len(w.index)
        stack = weight_spec(P(*above, *spec), w.stack, mesh)
        return LazySlice(stack, (P(),) * len(w.index))
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
    params: dict[str, dict[str, Any]],
    specs: dict[str, dict[str, ParamSpec]],
    mesh: AnyMesh,
) -> dict[str, dict[str, Any]]:
    """`params` (module -> name -> weight) with a spec for each array.

    `specs` say what each parameter is. Needs shapes only.
    """
    return {
        module: {
            name: weight_spec(
                partition_spec(specs[module][name].axes), w, mesh
            )
            for name, w in leaves.items()
        }
        for module, leaves in params.items()
    }


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
def is_axes(value: Any) -> bool:
    """Whether this names the axes of one array."""
    return isinstance(value, tuple) and all(
        axis is None or isinstance(axis, str) for axis in value
    )


def is_weight(w: Any) -> bool:
    """Whether this is one weight, of however many arrays."""
    return isinstance(w, (QuantizedTensor, LazySlice))


# %% book/chapters/07_sharding.md, cell 36
@dataclass(frozen=True)
class OneOfMany(OneDevice):
    """One device's part of a computation that was split.

    `cut` says which mesh axis cuts what.
    """

    cut: dict[str | None, MeshAxis]

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: Axes, summed: bool,
    ) -> Array:
        y = product(x, w)
        return self.total(y, axes[0] or "") if summed else y

    def total(self, y: Array, axis: str) -> Array:
        along = self.cut.get(axis)
        return jax.lax.psum(y, along) if along else y

    def once(self, y: Array, axis: str) -> Array:
        along = self.cut.get(axis)
        if not along:
            return y
        return jnp.where(jax.lax.axis_index(along) == 0, y, 0)

    def first(self, count: int, axis: str) -> Any:
        along = self.cut.get(axis)
        return jax.lax.axis_index(along) * count if along else 0


PART: ContextVar[OneOfMany | None] = ContextVar("PART", default=None)


# %% book/chapters/07_sharding.md, cell 37
@dataclass(frozen=True)
class OnMesh(OneDevice):
    """On all devices of the current mesh."""

    mesh: AnyMesh

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: Axes, summed: bool,
    ) -> Array:
        """Each device multiplies the block it holds, then they sum
        over the axis that cuts D. Source: Pope et al. (2023), 3.2.
        """
        spec = partition_spec(axes)
        d, f = fit_spec(spec, w.shape, self.mesh)

        def local(x: Array, w: Any) -> Array:
            y = product(x, w)                               # [N, F_Y]
            return jax.lax.psum(y, d) if d else y

        blocks = P(None, d), weight_spec(spec, w, self.mesh)
        return jax.shard_map(
            local, in_specs=blocks, out_specs=P(None, f),
            check_vma=False,
        )(x, w)

    def split(
        self, function: Callable[..., Any], in_axes: Any, out_axes: Any
    ) -> Callable[..., Any]:
        """`function`, run by each device on its parts of the arrays."""
        def run(*arrays: Any) -> Any:
            cut: dict[str | None, MeshAxis] = {}

            def spec_of(a: Any, axes: Axes) -> Any:
                spec = partition_spec(axes)
                fitted = fit_spec(spec, a.shape, self.mesh)
                cut.update(zip(axes, fitted))
                return weight_spec(spec, a, self.mesh)

            specs = jax.tree.map(
                spec_of, arrays, in_axes, is_leaf=is_weight
            )
            out = jax.tree.map(
                lambda axes: P(*(cut.get(a) for a in axes)),
                out_axes, is_leaf=is_axes,
            )

            def local(*arrays: Any) -> Any:
                token = PART.set(OneOfMany(cut))
                try:
                    return function(*arrays)
                finally:
                    PART.reset(token)

            return jax.shard_map(
                local, in_specs=specs, out_specs=out, check_vma=False
            )(*arrays)

        return run

    def constrain(self, x: Array, axes: Axes) -> Array:
        spec = fit_spec(partition_spec(axes), x.shape, self.mesh)
        return jax.lax.with_sharding_constraint(x, spec)

    def head_copies(self, kv_heads: int, q_heads: int) -> int:
        """So often that `model` cuts the copies between heads. Once
        where it does not divide the query heads: then all are whole.
        """
        axis = fit(MESH_AXES["heads"], q_heads, self.mesh)
        return math.lcm(kv_heads, axis_size(self.mesh, axis)) // kv_heads

    def spread_heads(
        self, k: Array, v: Array, q_heads: int
    ) -> tuple[Array, Array]:
        copies = self.head_copies(k.shape[2], q_heads)
        if copies == 1:
            return k, v
        sizes = [k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]]
        flat = [z.reshape(*z.shape[:2], -1) for z in (k, v)]
        # Gathered together, in one exchange.
        both = self.constrain(
            jnp.concatenate(flat, 2), (None, None, None)
        )
        parts = jnp.split(both, sizes[:1], axis=2)
        spread = []
        for z, part in zip((k, v), parts):
            heads = jnp.repeat(part.reshape(z.shape), copies, axis=2)
            axes = None, None, "heads", None
            spread.append(self.constrain(heads, axes))
        return spread[0], spread[1]


# %% book/chapters/07_sharding.md, cell 38
def find_mesh() -> OneDevice | None:
    """The part that is being computed, or the mesh, or nothing."""
    if part := PART.get():
        return part
    mesh = current_mesh()
    return None if mesh is None else OnMesh(mesh)


PLACEMENTS.append(find_mesh)
