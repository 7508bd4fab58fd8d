# Generated from book/chapters/07_sharding.md, book/chapters/21_experts_in_parallel.md, book/chapters/23b_runs.md by `make sync`; edit the chapters.
"""Grok-1's weights fill 318 GB, and an accelerator with 80 GB of memory
is a large one. No single device can hold the model, so eight hold an
eighth each, and every product has to be computed where its weights lie.
This chapter writes a short table that says who holds what, and a
product that lets weights stay where they are. By its end a layer with
attention and experts runs on eight devices and computes what one would.
You will have read in the compiled program what the devices say to each
other, and weighed the full model on each of them without allocating a
byte of it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from annotated_moe.moe import capacity
from annotated_moe.params import Axes, ParamSpec
from annotated_moe.placement import PLACEMENTS, OneDevice
from annotated_moe.quantization import LazySlice, QuantizedTensor


# %% book/chapters/07_sharding.md, cell 7
def make_mesh(data: int = 1, model: int = 1, expert: int = 1) -> Mesh:
    """A grid of data x expert x model devices with these axis names.

    Takes the first devices of `jax.devices()`. Raises TypeError for a
    size that is no whole number, ValueError when one is below 1 or
    devices are lacking.
    """
    shape = f"{data} x {expert} x {model}"
    if {type(data), type(expert), type(model)} != {int}:
        raise TypeError(f"a mesh's sizes are whole numbers: {shape}")
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


# %% book/chapters/07_sharding.md, cell 14
AnyMesh = Mesh | AbstractMesh
MeshAxis = str | tuple[str, ...] | None

MESH_AXES: dict[str | None, MeshAxis] = {
    "embed": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "experts": "expert",
    "table": ("data", "model"),             # the width of an embedding
    "batch": "data",
    "tokens": None,                         # or the rows they lie in
    "vocab": None,
    "layers": None,
    None: None,
}


def partition_spec(
    axes: Axes, table: Mapping[str | None, MeshAxis] = MESH_AXES
) -> P:
    """Which mesh axes cut an array whose axes count what `axes` say.

    ValueError for a name that `table` does not have.
    """
    for axis in axes:
        if axis not in table:
            raise ValueError(
                f"MESH_AXES does not say what cuts the axis {axis!r}: "
                "add it there, with None to keep it whole everywhere"
            )
    return P(*(table[axis] for axis in axes))


# %% book/chapters/07_sharding.md, cell 19
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


def fit(axis: MeshAxis, size: int, mesh: AnyMesh) -> MeshAxis:
    """`axis` if it cuts `size` into equal parts, else None: whole."""
    parts = axis_size(mesh, axis)
    return axis if parts > 1 and size % parts == 0 else None


# %% book/chapters/07_sharding.md, cell 20
def fit_spec(spec: P, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """`spec` as far as it fits `shape`: one entry for each dimension.

    Raises ValueError when `spec` has more entries than `shape`.
    """
    missing = len(shape) - len(spec)
    if missing < 0:
        raise ValueError(f"{spec} has too many axes for shape {shape}")
    wishes = (*spec, *[None] * missing)
    return P(*(fit(a, n, mesh) for a, n in zip(wishes, shape)))


# %% book/chapters/07_sharding.md, cell 23
def weight_spec(spec: P, w: Any, mesh: AnyMesh) -> Any:
    """`w` with a fitted spec in place of each array.

    Raises ValueError when the cut would part weights from their scales.
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
    return w.specs(fitted, scales)


# %% book/chapters/07_sharding.md, cell 24
def group_repeats(
    q: QuantizedTensor, spec: P, mesh: AnyMesh
) -> int:
    """How often to repeat each scale: 1 where groups fit the cut."""
    parts = axis_size(mesh, fit_spec(spec, q.shape, mesh)[-2])
    groups = q.scales.shape[-2]
    return 1 if groups == 1 else math.lcm(groups, parts) // groups


def fit_groups(
    q: QuantizedTensor, spec: P, mesh: AnyMesh
) -> QuantizedTensor:
    """Repeat scales until each device's inputs have their own groups.

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


def shardings(specs: Any, mesh: AnyMesh) -> Any:
    """A tree of specs as a tree of shardings, for `jax.device_put`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


# %% book/chapters/07_sharding.md, cell 33
def matmul_in_blocks(
    product: Callable[[Array, Any], Array],
    x: Float[Array, "N D"], w: Any, axes: Axes, mesh: AnyMesh,
    tokens: MeshAxis = None,
) -> Float[Array, "N F"]:
    """`product`, of whose weight each device holds a block.

    Each device multiplies its block; then they sum over what cuts D.
    `tokens` may cut N. Source: Pope et al. (2023), section 3.2.
    """
    spec = partition_spec(axes)
    d, f = fit_spec(spec, w.shape, mesh)
    n = fit(tokens, len(x), mesh)

    def local(x: Array, w: Any) -> Array:
        y = product(x, w)                                   # [N, F_Y]
        return jax.lax.psum(y, d) if d else y

    return jax.shard_map(
        local, mesh=mesh, check_vma=False,
        in_specs=(P(n, d), weight_spec(spec, w, mesh)),
        out_specs=P(n, f),
    )(x, w)


# %% book/chapters/07_sharding.md, cell 55
@dataclass(frozen=True)
class OneOfMany(OneDevice):
    """One device's part of a computation that was split.

    `cut` says which mesh axis cuts what; what is missing is whole.
    """

    cut: dict[str | None, MeshAxis]
    alone: ClassVar[bool] = False

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: Axes, summed: bool,
    ) -> Array:
        y = product(x, w)
        return self.total(y, axes[0] or "") if summed else y

    def along(self, *axes: str) -> tuple[str, ...]:
        """The mesh axes that cut these."""
        found = [self.cut.get(axis) or () for axis in axes]
        each = [(f,) if isinstance(f, str) else f for f in found]
        return sum(each, ())

    def total(self, y: Array, *axes: str) -> Array:
        along = self.along(*axes)
        return jax.lax.psum(y, along) if along else y

    def once(self, y: Array, axis: str) -> Array:
        along = self.along(axis)
        if not along:
            return y
        return jnp.where(jax.lax.axis_index(along) == 0, y, 0)

    def first(self, count: int, axis: str) -> Any:
        along = self.along(axis)
        return jax.lax.axis_index(along) * count if along else 0

    def exchange(
        self, run: Callable[[Array, Array, Array], Array], x: Array,
        gates: Array, experts: Array, held: int,
    ) -> Array:
        return self.total(run(x, gates, experts), "mlp", "experts")


PART: ContextVar[OneOfMany | None] = ContextVar("PART", default=None)


# %% book/chapters/07_sharding.md, cell 56
def is_axes(value: Any) -> bool:
    """Whether this names the axes of one array."""
    return isinstance(value, tuple) and all(
        axis is None or isinstance(axis, str) for axis in value
    )


def is_weight(w: Any) -> bool:
    """Whether this is one weight, of however many arrays."""
    return isinstance(w, (QuantizedTensor, LazySlice))


# %% book/chapters/07_sharding.md, cell 57
def split_over(
    mesh: AnyMesh, function: Callable[..., Any], in_axes: Any,
    out_axes: Any, part: Callable[..., OneOfMany] = OneOfMany,
    table: Mapping[str | None, MeshAxis] = MESH_AXES,
) -> Callable[..., Any]:
    """`function`, run by each device on its parts of the arrays.

    `in_axes` and `out_axes` name what the axes of each array count,
    `table` says what cuts them, and a device answers as a `part`.
    ValueError when one name would be cut here and whole there.
    """
    def run(*arrays: Any) -> Any:
        cut: dict[str | None, MeshAxis] = {}

        def spec_of(a: Any, axes: Axes) -> Any:
            spec = partition_spec(axes, table)
            for axis, along in zip(axes, fit_spec(spec, a.shape, mesh)):
                if cut.setdefault(axis, along) != along:
                    raise ValueError(
                        f"{mesh.shape} cuts {axis!r} in one array and "
                        f"cannot in another, of shape {a.shape}"
                    )
            return weight_spec(spec, a, mesh)

        def local(*arrays: Any) -> Any:
            token = PART.set(part(cut))
            try:
                return function(*arrays)
            finally:
                PART.reset(token)

        specs = jax.tree.map(
            spec_of, arrays, in_axes, is_leaf=is_weight
        )
        out = jax.tree.map(
            lambda axes: P(*(cut.get(a) for a in axes)),
            out_axes, is_leaf=is_axes,
        )
        return jax.shard_map(
            local, mesh=mesh, check_vma=False,
            in_specs=specs, out_specs=out,
        )(*arrays)

    return run


# %% book/chapters/07_sharding.md, cell 58
@dataclass(frozen=True)
class OnMesh(OneDevice):
    """On all devices of a mesh; arrays look whole.

    Another way to use a mesh overrides the table or a part's answers.
    """

    mesh: AnyMesh
    alone: ClassVar[bool] = False
    table: ClassVar[Mapping[str | None, MeshAxis]] = MESH_AXES
    part: ClassVar[type[OneOfMany]] = OneOfMany

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: Axes, summed: bool,
    ) -> Array:
        tokens = self.table["tokens"]
        return matmul_in_blocks(product, x, w, axes, self.mesh, tokens)

    def split(
        self, function: Callable[..., Any], in_axes: Any, out_axes: Any
    ) -> Callable[..., Any]:
        return split_over(
            self.mesh, function, in_axes, out_axes, self.part,
            self.table,
        )

    def constrain(self, x: Array, axes: Axes) -> Array:
        wish = partition_spec(axes, self.table)
        spec = fit_spec(wish, x.shape, self.mesh)
        return jax.lax.with_sharding_constraint(x, spec)

    def parts(self, size: int, axis: str) -> int:
        return axis_size(
            self.mesh, fit(self.table[axis], size, self.mesh))

    def head_copies(self, kv_heads: int, q_heads: int) -> int:
        return copies_of_heads(kv_heads, q_heads, self.mesh)

    def gather_heads(
        self, k: Array, v: Array, q_heads: int
    ) -> tuple[Array, Array]:
        return gather_parted_heads(k, v, q_heads, self.mesh)

    def spread_heads(
        self, k: Array, v: Array, q_heads: int
    ) -> tuple[Array, Array]:
        copies = self.head_copies(k.shape[2], q_heads)
        if copies == 1:
            return k, v
        axes = None, None, "heads", None
        k, v = (jnp.repeat(z, copies, axis=2) for z in (k, v))
        return self.constrain(k, axes), self.constrain(v, axes)


# %% book/chapters/07_sharding.md, cell 59
EXCHANGES: dict[str, type[OnMesh]] = {"sum": OnMesh}
EXCHANGE = jax.make_user_context("sum")


def check_exchange(name: str) -> None:
    """ValueError unless `name` is one of `EXCHANGES`."""
    if name not in EXCHANGES:
        known = " or ".join(map(repr, EXCHANGES))
        raise ValueError(f"exchange must be {known}: {name!r}")


@contextmanager
def use_mesh(mesh: Mesh, exchange: str = "sum") -> Iterator[None]:
    """Compute on `mesh`; `exchange` says how tokens reach experts."""
    check_exchange(exchange)
    with EXCHANGE(exchange), jax.set_mesh(mesh):
        yield


# %% book/chapters/07_sharding.md, cell 60
def current_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def find_mesh() -> OneDevice | None:
    """The part that is being computed, or the mesh, or nothing."""
    if part := PART.get():
        return part
    mesh = current_mesh()
    return None if mesh is None else EXCHANGES[EXCHANGE.value](mesh)


PLACEMENTS.append(find_mesh)


# %% book/chapters/07_sharding.md, cell 67
def copies_of_heads(
    kv_heads: int, q_heads: int, mesh: AnyMesh
) -> int:
    """So often that `model` cuts the copies between heads.

    Once where it does not divide the query heads: then all are whole.
    """
    axis = fit(MESH_AXES["heads"], q_heads, mesh)
    return math.lcm(kv_heads, axis_size(mesh, axis)) // kv_heads


# %% book/chapters/07_sharding.md, cell 68
def gather_parted_heads(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K V"],
    q_heads: int, mesh: AnyMesh,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K V"]]:
    """All heads on each device where one would hold parts of a head.

    In one exchange. Elsewhere, and where `model` cuts neither, as they
    are.
    """
    flat = [z.reshape(*z.shape[:2], -1) for z in (k, v)]  # [B, T, KH]
    axis = MESH_AXES["kv_heads"]
    cut = all(fit(axis, z.shape[2], mesh) for z in flat)
    if not cut or copies_of_heads(k.shape[2], q_heads, mesh) == 1:
        return k, v

    def local(*parts: Array) -> list[Array]:
        widths = np.cumsum([z.shape[2] for z in parts])[:-1]
        both = jnp.concatenate(parts, axis=2)
        every = jax.lax.all_gather(both, axis, axis=2)   # [B, T, n, .]
        return jnp.split(every, widths, axis=3)

    part = P(None, None, axis)
    whole = jax.shard_map(
        local, mesh=mesh, check_vma=False,
        in_specs=(part, part), out_specs=[P(), P()],
    )(*flat)
    return whole[0].reshape(k.shape), whole[1].reshape(v.shape)


# %% book/chapters/21_experts_in_parallel.md, cell 10
def seating(
    experts: Int[Array, "own A"], held: int, devices: int
) -> tuple[Int[Array, "devices own"], Int[Array, " devices"]]:
    """For each device our tokens, those that it is sent first.

    And how many these are. Each device has `held` experts.
    """
    device = jnp.arange(devices)[:, None, None]
    wanted = jnp.any(experts // held == device, axis=-1)
    order = jnp.argsort(~wanted, axis=1, stable=True)
    return order, wanted.sum(axis=1)


# %% book/chapters/21_experts_in_parallel.md, cell 13
def deal_padded(
    benches: Float[Array, "devices own D"],
    sent: Int[Array, " devices"], received: Int[Array, " devices"],
    axis: str, few: int,
) -> Float[Array, "devices own D"]:
    """Bench i goes to device i; the one from device i becomes bench i.

    `few` seats of each travel if nobody fills more, else all.
    """
    def every(benches: Array) -> Array:
        return jax.lax.all_to_all(benches, axis, 0, 0)

    def some(benches: Array) -> Array:
        empty = benches.shape[1] - few
        there = every(benches[:, :few])
        return jnp.pad(there, ((0, 0), (0, empty), (0, 0)))

    if few >= benches.shape[1]:
        return every(benches)
    most = jnp.maximum(sent.max(), received.max())
    fits = jax.lax.pmax(most, axis) <= few
    return jax.lax.cond(fits, some, every, benches)


# %% book/chapters/21_experts_in_parallel.md, cell 14
def deal_ragged(
    benches: Float[Array, "devices own D"],
    sent: Int[Array, " devices"], received: Int[Array, " devices"],
    axis: str,
) -> Float[Array, "devices own D"]:
    """`deal_padded`, in which only filled seats travel."""
    devices, own, _ = benches.shape
    flat = benches.reshape(devices * own, -1)
    starts = own * jnp.arange(devices, dtype=jnp.int32)
    mine = own * jax.lax.axis_index(axis)
    there = jax.lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), starts, sent.astype(jnp.int32),
        jnp.full_like(starts, mine), received.astype(jnp.int32),
        axis_name=axis,
    )
    return there.reshape(benches.shape)


def deal(
    benches: Float[Array, "devices own D"],
    sent: Int[Array, " devices"], received: Int[Array, " devices"],
    axis: str, few: int,
) -> Float[Array, "devices own D"]:
    """Benches to their devices, as the backend can."""
    return jax.lax.platform_dependent(
        benches, sent, received,
        cpu=partial(deal_padded, axis=axis, few=few),
        default=partial(deal_ragged, axis=axis),
    )


# %% book/chapters/21_experts_in_parallel.md, cell 15
FEW = 1.5                                   # seats, over the mean


@dataclass(frozen=True)
class TokensApart(OneOfMany):
    """A device's part where each device has tokens of its own."""

    def expert_axis(self, held: int) -> str:
        """The mesh axis that deals experts out.

        ValueError where experts are whole and tokens are not.
        """
        if not self.along("experts"):
            devices = jax.lax.axis_size(self.along("tokens"))
            raise ValueError(
                f"{held} experts cannot be dealt out to {devices} "
                "devices: give the mesh an axis `expert` that divides "
                "them"
            )
        return self.along("experts")[0]


# %% book/chapters/21_experts_in_parallel.md, cell 16
@dataclass(frozen=True)
class AllToAll(TokensApart):
    """Tokens travel to their experts, and results travel back.

    Source: GShard, section 3.2, but nothing is dropped.
    """

    def exchange(
        self, run: Callable[[Array, Array, Array], Array], x: Array,
        gates: Array, experts: Array, held: int,
    ) -> Array:
        if not self.along("tokens"):
            return super().exchange(run, x, gates, experts, held)
        axis = self.expert_axis(held)
        n, (own, d) = jax.lax.axis_size(axis), x.shape
        few = capacity(own, min(experts.shape[1], n), n, FEW)
        order, sent = seating(experts, held, n)
        choices, gates = (
            jax.lax.all_to_all(z[order], axis, 0, 0)
            .reshape(n * own, -1) for z in (experts, gates)
        )
        mine = choices // held == jax.lax.axis_index(axis)
        received = mine.any(axis=-1).reshape(n, own).sum(axis=1)
        xs = deal(x[order], sent, received, axis, few)
        y = run(xs.reshape(n * own, d), gates, choices)
        back = deal(y.reshape(n, own, d), received, sent, axis, few)
        total = jnp.zeros((own, d), y.dtype).at[order].add(back)
        return self.total(total, "mlp")


# %% book/chapters/21_experts_in_parallel.md, cell 17
@dataclass(frozen=True)
class Ring(TokensApart):
    """All tokens are gathered, and of the results each its own."""

    def exchange(
        self, run: Callable[[Array, Array, Array], Array], x: Array,
        gates: Array, experts: Array, held: int,
    ) -> Array:
        if not self.along("tokens"):
            return super().exchange(run, x, gates, experts, held)
        axis = self.expert_axis(held)
        every = [jax.lax.all_gather(z, axis, tiled=True)
                 for z in (x, gates, experts)]
        y = jax.lax.psum_scatter(
            run(*every), axis, scatter_dimension=0, tiled=True
        )
        return self.total(y, "mlp")


# %% book/chapters/21_experts_in_parallel.md, cell 18
APART: dict[str | None, MeshAxis] = {
    **MESH_AXES, "tokens": "expert", "batch": ("expert", "data"),
}


class AllToAllOnMesh(OnMesh):
    """On a mesh, tokens apart, by all-to-all."""

    table: ClassVar[Mapping[str | None, MeshAxis]] = APART
    part: ClassVar[type[OneOfMany]] = AllToAll


class RingOnMesh(OnMesh):
    """On a mesh, tokens apart, around a ring."""

    table: ClassVar[Mapping[str | None, MeshAxis]] = APART
    part: ClassVar[type[OneOfMany]] = Ring


EXCHANGES |= {"all_to_all": AllToAllOnMesh, "ring": RingOnMesh}


# %% book/chapters/23b_runs.md, cell 33
GATHERS: ContextVar[bool] = ContextVar("GATHERS", default=False)


@dataclass(frozen=True)
class GatherWeights(OnMesh):
    """On a mesh whose axis `data` cuts the batch: weights travel."""

    def matmul(
        self, product: Callable[[Array, Any], Array], x: Array, w: Any,
        axes: Axes, summed: bool,
    ) -> Array:
        cut = (a if a != "data" else None for a in partition_spec(axes))
        d, f = fit_spec(P(*cut), w.shape, self.mesh)
        rows = EXCHANGES[EXCHANGE.value].table["batch"]
        n = fit(rows, x.shape[0], self.mesh)
        hold = jax.lax.with_sharding_constraint
        w = hold(w.astype(x.dtype), P(d, f))
        return hold(product(hold(x, P(n, d)), w), P(n, f))

    def split(
        self, function: Callable[..., Any], in_axes: Any, out_axes: Any
    ) -> Callable[..., Any]:
        # What devices do by themselves, they do as the exchange says.
        on_mesh = EXCHANGES[EXCHANGE.value](self.mesh)
        return on_mesh.split(function, in_axes, out_axes)


def find_gathering() -> OneDevice | None:
    """It, while a training step is traced, outside of devices' parts.
    """
    mesh = current_mesh()
    if mesh is None or PART.get() or not GATHERS.get():
        return None
    return GatherWeights(mesh)


PLACEMENTS.append(find_gathering)


# %% book/chapters/23b_runs.md, cell 34
@contextlib.contextmanager
def gathering_weights(
    mesh: Mesh, exchange: str = "sum"
) -> Iterator[None]:
    """The context of a training step on a mesh."""
    token = GATHERS.set(True)
    try:
        with use_mesh(mesh, exchange):
            yield
    finally:
        GATHERS.reset(token)
