# Generated from book/chapters/05_moe.md by `make sync`; edit the chapter.
"""Of Grok-1's 316 billion parameters, 232 billion sit out every token.
They are experts that were not asked: each layer keeps eight
feed-forward networks, and a router, one small matrix, reads the token
and picks two. So a model can know much and still answer at the price of
a model a quarter its size. The picking is easy. What is hard is the
multiplying, because every token now wants weights of its own and a
matrix product wants all its rows to want the same. This chapter builds
the router and four ways to bring tokens to experts, proves that they
agree, counts what each costs, and then trains a router, first badly,
then well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int

from annotated_moe import sharding
from annotated_moe.quantization import (
    QuantizedTensor,
    Row,
    Weight,
    dequantize,
    matmul,
)


# %% book/chapters/05_moe.md, cell 5
class Route(NamedTuple):
    """Where N tokens go. Gates are in falling order."""

    probs: Float32[Array, "N E"]
    gates: Float32[Array, "N A"]
    experts: Int[Array, "N A"]
    logits: Float32[Array, "N E"]


# %% book/chapters/05_moe.md, cell 6
def route(
    x: Float[Array, "N D"], w: Float[Array, "D E"], top_k: int
) -> Route:
    """Softmax over all experts, then the `top_k` most probable.

    Float32 inside; the gates are not renormalised. Raises ValueError
    unless 1 <= top_k <= E. Source: Grok-1's release.
    """
    if not 1 <= top_k <= w.shape[-1]:
        raise ValueError(f"top_k={top_k} of {w.shape[-1]} experts")
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32))
    probs = jax.nn.softmax(logits)                          # [N, E]
    gates, experts = jax.lax.top_k(probs, top_k)            # [N, A]
    return Route(probs, gates, experts, logits)


# %% book/chapters/05_moe.md, cell 13
class Experts(NamedTuple):
    """The weights of E experts: float arrays, quantized, or `Row`s."""

    linear: Weight                              # gate, [E, D, F]
    linear_v: Weight                            # up,   [E, D, F]
    linear_1: Weight                            # down, [E, F, D]


# %% book/chapters/05_moe.md, cell 14
def geglu(
    gate: Float32[Array, "*N F"], up: Float32[Array, "*N F"], dtype: Any
) -> Float[Array, "*N F"]:
    """gelu(gate) * up in float32, then `dtype`. GELU in tanh form."""
    return (jax.nn.gelu(gate, approximate=True) * up).astype(dtype)


# %% book/chapters/05_moe.md, cell 15
@dataclass(frozen=True)
class Style:
    """What families do differently inside an expert."""

    glu: Callable = geglu                       # (gate, up, dtype)
    scale_input: bool = False                   # else the output

    def weigh(self, x: Array, inside: Array, gates: Array) -> Any:
        """What an expert reads, and what its output is times."""
        if not self.scale_input:
            return x, gates
        x = (x * inside[:, None]).astype(x.dtype)           # [*, D]
        return x, jnp.ones_like(gates)


# %% book/chapters/05_moe.md, cell 16
def expert(
    x: Float[Array, "N D"],
    w: Experts,
    index: tuple[Any, ...] = (),
    rows: sharding.Axis = None,
    cols: sharding.Axis = None,
    style: Style = Style(),
) -> Float32[Array, "N D"]:
    """x through expert `index` of `w`; () when `w` is one expert.

    Inside `shard_map`, `rows` and `cols` name the mesh axes that split
    D and F of the block at hand; the sum over `cols` is left to do.
    """
    def total(y):
        return jax.lax.psum(y, rows) if rows else y

    gate = total(matmul(x, w.linear, index))                # [N, F]
    up = total(matmul(x, w.linear_v, index))
    return matmul(style.glu(gate, up, x.dtype), w.linear_1, index)


# %% book/chapters/05_moe.md, cell 21
def plain(w: Weight) -> Float[Array, "..."]:
    """`w` as an ordinary array; quantized weights become float32."""
    if isinstance(w, Row):
        return plain(jax.tree.map(lambda s: s[w.index], w.stack))
    if isinstance(w, QuantizedTensor):
        return dequantize(w)
    return jnp.asarray(w)


# %% book/chapters/05_moe.md, cell 22
def check_shapes(
    x: Array, gates: Array, experts: Array, w: Experts, num_experts: int
) -> None:
    """Raise ValueError unless tokens, choices and weights agree."""
    if gates.shape != experts.shape or len(experts) != len(x):
        raise ValueError(
            f"{len(x)} tokens with gates {gates.shape} and experts "
            f"{experts.shape}: both must be [N, A]"
        )
    held = w.linear.shape[-3]
    if held != num_experts:
        raise ValueError(f"{held} experts in w, not {num_experts}")


# %% book/chapters/05_moe.md, cell 23
def every_expert(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    num_experts: int,
) -> Float32[Array, "N D"]:
    """All experts on all N*A repeated tokens, as the release computes.

    For comparison: E times the rows that are needed, whole weights
    dequantized. Raises ValueError when shapes disagree.
    """
    check_shapes(x, gates, experts, w, num_experts)
    pick = jax.nn.one_hot(experts.reshape(-1), num_experts)  # [N*A, E]

    def all_then_pick(x, w):
        every = jnp.einsum("nd,edf->enf", x, plain(w).astype(x.dtype),
                           preferred_element_type=jnp.float32)
        return jnp.einsum("ne,enf->nf", pick, every)

    rows = jnp.repeat(x, experts.shape[1], axis=0)          # [N*A, D]
    gate = all_then_pick(rows, w.linear)                    # [N*A, F]
    up = all_then_pick(rows, w.linear_v)
    out = all_then_pick(geglu(gate, up, x.dtype), w.linear_1)
    out = out.reshape(*gates.shape, -1)                     # [N, A, D]
    return jnp.sum(out * gates[..., None], axis=1)


# %% book/chapters/05_moe.md, cell 28
def capacity(n: int, a: int, num_experts: int, factor: float) -> int:
    """Seats per expert: `factor` times the mean load, at most `n`.

    Raises ValueError unless `factor` is positive. Source: GShard.
    """
    if not factor > 0:
        raise ValueError(f"capacity factor {factor} is not positive")
    return min(n, math.ceil(factor * n * a / num_experts))


# %% book/chapters/05_moe.md, cell 29
def places(
    experts: Int[Array, "N A"], num_experts: int
) -> Int[Array, "N A"]:
    """How many earlier choices, token by token, took that expert."""
    flat = experts.reshape(-1)
    hot = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)  # [N*A, E]
    place = jnp.sum((jnp.cumsum(hot, axis=0) - 1) * hot, axis=-1)
    return place.reshape(experts.shape)


# %% book/chapters/05_moe.md, cell 30
def dropped(
    experts: Int[Array, "N A"], num_experts: int, factor: float = 1.5
) -> Bool[Array, "N A"]:
    """True where `capacity_and_drop` drops a token's choice.

    `jnp.argwhere` of it lists the dropped (token, choice) pairs.
    """
    n, a = experts.shape
    seats = capacity(n, a, num_experts, factor)
    return places(experts, num_experts) >= seats


# %% book/chapters/05_moe.md, cell 34
def experts_at_once(
    x: Float[Array, "E C D"], w: Experts, glu: Callable = geglu
) -> Float32[Array, "E C D"]:
    """Expert e on the rows x[e], as three batched products."""
    def times(x, w):
        return jnp.einsum("ecd,edf->ecf", x, plain(w).astype(x.dtype),
                          preferred_element_type=jnp.float32)

    gate, up = times(x, w.linear), times(x, w.linear_v)     # [E, C, F]
    return times(glu(gate, up, x.dtype), w.linear_1)


# %% book/chapters/05_moe.md, cell 35
def capacity_and_drop(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    num_experts: int,
    factor: float = 1.5,
    style: Style = Style(),
) -> Float32[Array, "N D"]:
    """C seats an expert; choices that find none add nothing.

    Differentiable: the way to train. Raises ValueError when shapes
    disagree or `factor` is not positive. Source: GShard, Switch.
    """
    check_shapes(x, gates, experts, w, num_experts)
    n, a = experts.shape
    seats = capacity(n, a, num_experts, factor)
    place, nobody = places(experts, num_experts), num_experts * seats
    seat = jnp.where(place < seats, experts * seats + place, nobody)
    token = jnp.broadcast_to(jnp.arange(n)[:, None], (n, a))
    guest = jnp.full(nobody, n).at[seat].set(token, mode="drop")
    rows = x.at[guest].get(mode="fill", fill_value=0)       # [E*C, D]
    inside = jnp.zeros(nobody).at[seat].set(gates, mode="drop")
    rows, gates = style.weigh(rows, inside, gates)
    rows = rows.reshape(num_experts, seats, -1)
    out = experts_at_once(rows, w, style.glu)
    out = out.reshape(nobody, -1)
    out = out.at[seat].get(mode="fill", fill_value=0)       # [N, A, D]
    return jnp.sum(out * gates[..., None], axis=1)


# %% book/chapters/05_moe.md, cell 40
class Blocks(NamedTuple):
    """Choices sorted by expert, and the blocks that cover them."""

    order: Int[Array, " N*A"]                   # choices, sorted
    starts: Int[Array, " E"]                    # where expert e begins
    counts: Int[Array, " E"]                    # how many it has
    first: Int[Array, " E+1"]                   # its first block


# %% book/chapters/05_moe.md, cell 41
def plan_blocks(
    experts: Int[Array, "N A"], num_experts: int, block: int
) -> Blocks:
    """Blocks of `block` rows, each for one expert. `first[E]` in all.

    Raises ValueError unless `block` is positive.
    """
    if block < 1:
        raise ValueError(f"a block of {block} rows holds nothing")
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)                  # [N*A]
    counts = jnp.bincount(flat, length=num_experts)         # [E]
    starts = jnp.cumsum(counts) - counts
    ends = jnp.cumsum(-(-counts // block))                  # in blocks
    first = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    return Blocks(order, starts, counts, first)


# %% book/chapters/05_moe.md, cell 42
def rows_of_block(
    plan: Blocks, j: Int[Array, ""] | int, block: int
) -> tuple[Int[Array, ""], Int[Array, " {block}"]]:
    """The expert of block `j` and its choices, `N*A` for padding."""
    e = jnp.searchsorted(plan.first[1:], j, side="right")
    row = (j - plan.first[e]) * block + jnp.arange(block)
    nobody = len(plan.order)
    choice = plan.order.at[plan.starts[e] + row].get(
        mode="fill", fill_value=nobody
    )
    return e, jnp.where(row < plan.counts[e], choice, nobody)


# %% book/chapters/05_moe.md, cell 46
def block_rows(n: int, a: int, num_experts: int) -> int:
    """Rows per block for `n` tokens with `a` experts each."""
    if n * a <= 2:
        return 1
    mean = -(-n * a // num_experts)
    return min(128, max(8, 1 << (mean - 1).bit_length()))


# %% book/chapters/05_moe.md, cell 47
def sort_and_tile(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    num_experts: int,
    rows: sharding.Axis = None, cols: sharding.Axis = None,
    block: int | None = None, style: Style = Style(),
) -> Float32[Array, "N D"]:
    """Dropless: walk over blocks of rows that share an expert.

    `rows`, `cols` as in `expert`; `block` by default `block_rows`.
    No reverse mode. ValueError when shapes disagree.
    """
    check_shapes(x, gates, experts, w, num_experts)
    n, a = experts.shape
    block = block or block_rows(n, a, num_experts)
    plan = plan_blocks(experts, num_experts, block)

    def add_block(j, y):
        e, choice = rows_of_block(plan, j, block)
        token = choice // a                                 # N: padding
        xs = x.at[token].get(mode="fill", fill_value=0)
        gate = gates.ravel().at[choice].get(mode="fill", fill_value=0)
        xs, gate = style.weigh(xs, gate, gate)
        out = expert(xs, w, (e,), rows, cols, style) * gate[:, None]
        return y.at[token].add(out, mode="drop")

    job = 0, plan.first[-1], add_block, jnp.zeros(x.shape, jnp.float32)
    return inference_only(jax.lax.fori_loop(*job))


# %% book/chapters/05_moe.md, cell 48
@jax.custom_vjp
def inference_only(y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`y`; raises NotImplementedError when it is differentiated."""
    return y


def refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "sort_and_tile has no gradient: train with capacity_and_drop"
    )


inference_only.defvjp(refuse, refuse)


# %% book/chapters/05_moe.md, cell 67
def load_balancing_loss(
    probs: Float32[Array, "N E"], experts: Int[Array, "N A"]
) -> Float32[Array, ""]:
    """E * sum of (share of choices) * (mean probability): 1 when even.

    Source: GShard, and Switch Transformer, eq. 4, for A >= 1 choices.
    """
    e = probs.shape[-1]
    share = jnp.mean(jax.nn.one_hot(experts, e), axis=(0, 1))
    return e * jnp.sum(share * jnp.mean(probs, axis=0))


# %% book/chapters/05_moe.md, cell 69
def router_z_loss(logits: Float32[Array, "N E"]) -> Float32[Array, ""]:
    """Mean squared log-sum-exp of the logits. Source: ST-MoE, eq. 5."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


# %% book/chapters/05_moe.md, cell 77
def sharded_experts(
    x: Float[Array, "N D"],
    gates: Float32[Array, "N A"],
    experts: Int[Array, "N A"],
    w: Experts,
    num_experts: int,
    style: Style = Style(),
) -> Float32[Array, "N D"]:
    """`sort_and_tile` on the current mesh, if there is one."""
    mesh, walk = sharding.current_mesh(), sort_and_tile
    if mesh is None:
        return walk(x, gates, experts, w, num_experts, style=style)
    rows = sharding.fit("data", x.shape[-1], mesh)
    cols = sharding.fit("model", w.linear.shape[-1], mesh)

    def local(x, gates, experts, w):
        y = walk(x, gates, experts, w, num_experts, rows, cols,
                 style=style)
        return jax.lax.psum(y, cols) if cols else y

    into = sharding.weight_spec(P(None, rows, cols), w.linear, mesh)
    out = sharding.weight_spec(P(None, cols, rows), w.linear_1, mesh)
    return jax.shard_map(
        local,
        in_specs=(P(None, rows), P(), P(), Experts(into, into, out)),
        out_specs=P(None, rows),
        check_vma=False,
    )(x, gates, experts, w)


# %% book/chapters/05_moe.md, cell 79
class Parameter(hk.Module):
    """A module that only holds the float32 parameter `w`."""

    def __call__(self, shape: tuple[int, ...], fan_in: int) -> Any:
        init = hk.initializers.TruncatedNormal(fan_in**-0.5)
        return hk.get_parameter("w", shape, jnp.float32, init)


# %% book/chapters/05_moe.md, cell 80
class Router(hk.Module):
    """`route` with a learned float32 `w` of shape [D, E]."""

    def __init__(
        self, num_experts: int, top_k: int, name: str = "router",
        rule: Callable = route,
    ):
        super().__init__(name=name)
        self.num_experts, self.top_k = num_experts, top_k
        self.rule = rule

    def __call__(self, x: Float[Array, "N D"]) -> Route:
        d = x.shape[-1]
        init = hk.initializers.TruncatedNormal(d**-0.5)
        shape = (d, self.num_experts)
        w = hk.get_parameter("w", shape, jnp.float32, init)
        return self.rule(x, w, self.top_k)


# %% book/chapters/05_moe.md, cell 81
class MoE(hk.Module):
    """The experts of a layer; with `train`, the way with a gradient."""

    def __init__(
        self, num_experts: int, d_ff: int, capacity_factor: float = 1.5,
        name: str = "moe", style: Style = Style(),
    ):
        super().__init__(name=name)
        self.num_experts, self.d_ff = num_experts, d_ff
        self.capacity_factor, self.style = capacity_factor, style

    @hk.transparent
    def weights(self, d: int) -> Experts:
        into = (self.num_experts, d, self.d_ff)
        back = (self.num_experts, self.d_ff, d)
        return Experts(
            Parameter("linear")(into, d),
            Parameter("linear_v")(into, d),
            Parameter("linear_1")(back, self.d_ff),
        )

    def __call__(
        self, x: Float[Array, "N D"], routed: Route, train: bool = False
    ) -> Float32[Array, "N D"]:
        w = self.weights(x.shape[-1])
        chosen = routed.gates, routed.experts
        job = (x, *chosen, w, self.num_experts)
        if not train:
            return sharded_experts(*job, self.style)
        return capacity_and_drop(*job, self.capacity_factor, self.style)
